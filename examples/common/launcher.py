"""Run a job under torchrun, and show how far it is."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn

PROGRESS = "progress.json"  # written by rank 0: fields of the display
ERROR = re.compile(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt|Refused|JobFailed)\b.*")


class JobError(RuntimeError):
    """A job ended with an error."""


def launch(command: Sequence[str], folder: Path, *, workers: int, title: str, steps: int, console: Console) -> None:
    """Run a script and its arguments in `workers` processes of this machine, and wait for the end.

    `folder` is where the job says how far it is; it gets log.txt, all that its ranks print.

    Raises:
        JobError: a worker failed; the message holds the first errors of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # more threads wait for each other
    columns = "{task.description:<24}", BarColumn(), "{task.completed}/{task.total}", "loss {task.fields[loss]}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else `finally` is skipped, and workers stay
    log = folder / "log.txt"
    with log.open("wb") as out, Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task(title, total=steps, loss="-")
        process = subprocess.Popen([*torchrun, *command], stdout=out, stderr=out, env=environment)
        try:
            while process.poll() is None:
                if (folder / PROGRESS).exists():
                    progress.update(bar, **json.loads((folder / PROGRESS).read_text()))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
        finally:
            process.terminate()  # torchrun ends its workers
            process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        found = list(dict.fromkeys(line for line in lines if ERROR.match(line))) or lines
        first = "\n".join(found[:5])
        raise JobError(f"job {folder.name} ended with code {process.returncode}:\n{first}\nThe whole log: {log}")
