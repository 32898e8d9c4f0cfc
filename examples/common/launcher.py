"""Run a job under torchrun, and show how far it is."""

import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.journal import Tail

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


def launch(
    command: Sequence[str], folder: Path, *, workers: int, title: str, total_steps: int, progress: Progress
) -> None:
    """Run a script and its arguments on every worker of this machine, and wait for the end.

    Args:
        command: the script's path and its arguments.
        folder: where the ranks write their journals; gets log.txt, all that they print.
        title, total_steps: what the progress bar shows.
    Raises:
        JobError: a worker failed; the message holds the first errors of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    # One thread each: several threads per worker on busy cores wait for each other at every operation.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    log_path = folder / "log.txt"
    task = progress.add_task(title, total=total_steps, loss="-", computed="starting")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else `finally` is skipped, and workers stay
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*torchrun, *command], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _follow(process, [Tail(folder / f"rank{rank}.jsonl") for rank in range(workers)], progress, task)
        finally:
            _end(process)
    if process.returncode != 0:
        raise JobError(f"job {folder.name} ended with code {process.returncode}:\n{_errors(log_path)}")


def _follow(process: "subprocess.Popen[bytes]", logs: Sequence[Tail], progress: Progress, task: TaskID) -> None:
    """Show the logs' news until the job ends; the loss is the mean over workers of their newest losses."""
    losses: list[deque[float]] = [deque(maxlen=16) for _ in logs]
    computed, step = [0] * len(logs), 0
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
