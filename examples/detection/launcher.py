"""Run a job under torchrun, and show how far it is."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from detection.journal import JobResult, Tail
from detection.settings import Settings

POLL_S = 0.5


class JobError(RuntimeError):
    """A job ended with an error."""


def progress_bar(console: Console) -> Progress:
    """Return the display of `launch`: steps made, the mean loss, and how many steps each worker computed."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=8),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("by {task.fields[computed]}"),
        TimeElapsedColumn(),
        console=console,
    )


def launch(script: Path, settings: Settings, total_steps: int, progress: Progress) -> JobResult:
    """Run `script train SETTINGS` on every worker of this machine and wait for the result.

    Raises:
        JobError: a worker failed; the message holds the first errors of the log.
    """
    shutil.rmtree(settings.folder, ignore_errors=True)
    settings.folder.mkdir(parents=True)
    settings.save(settings.folder / "settings.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(settings.workers), str(script)]
    command += ["train", str(settings.folder / "settings.json")]
    # One thread each: several threads per worker on busy cores wait for each other at every operation.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log_path = settings.folder / "log.txt"
    task = progress.add_task(settings.variant.title, total=total_steps, loss="-", computed="starting")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else `finally` is skipped, and workers stay
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _follow(process, settings, progress, task)
        finally:
            _end(process)
    if process.returncode != 0:
        raise JobError(f"job {settings.job} ended with code {process.returncode}:\n{_errors(log_path)}")
    return JobResult.load(settings.folder)


def _follow(process: "subprocess.Popen[bytes]", settings: Settings, progress: Progress, task: TaskID) -> None:
    """Show the logs' news until the job ends; the loss is the mean over workers of their newest losses."""
    logs = [Tail(settings.folder / f"rank{rank}.jsonl") for rank in range(settings.workers)]
    losses: list[deque[float]] = [deque(maxlen=16) for _ in logs]
    computed, step = [0] * settings.workers, 0
    running = True
    while running:
        try:
            process.wait(POLL_S)
            running = False
        except subprocess.TimeoutExpired:
            pass
        for rank, log in enumerate(logs):
            for record in log.records():
                step = max(step, record["step"])
                losses[rank].append(record["loss"])
                computed[rank] += 1
        if all(losses):
            loss = sum(sum(recent) / len(recent) for recent in losses) / len(losses)
            counts = " ".join(map(str, computed))
            progress.update(task, completed=step, loss=f"{loss:.2f}", computed=counts)
    progress.stop_task(task)


def _errors(log: Path) -> str:
    """Return the first errors in a log, and where to read on."""
    pattern = re.compile(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|Refused|JobFailed)\b.*")
    lines = log.read_text(errors="replace").splitlines()
    found = list(dict.fromkeys(line for line in lines if pattern.match(line)))
    return "\n".join([*(found or lines)[:5], f"The whole log: {log}"])


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Leave no worker behind when the user interrupts."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                continue
