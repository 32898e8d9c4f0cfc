"""The command `qgc run`: read its arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from torch_qgc.cli.reporting import reporting
from torch_qgc.cli.supervisor import Patience
from torch_qgc.errors import ConfigError
from torch_qgc.protocol.identity import KEY_FILE_VARIABLE

__all__ = ["run"]


def run(
    script: Annotated[str, typer.Argument(help="train.py")],
    arguments: Annotated[list[str] | None, typer.Argument(help="of the script")] = None,
    workers: Annotated[int, typer.Option(help="of the job, on all machines", min=1)] = 1,
    module: Annotated[bool, typer.Option("--module", "-m", help="the script is a module, as of python -m")] = False,
    max_restarts: Annotated[int, typer.Option(help="of one worker, in a row", min=0)] = 3,
    restart_delay_s: Annotated[
        float, typer.Option(help="before the first one; the next wait twice as long", min=0)
    ] = 1,
    grace_s: Annotated[float, typer.Option(help="from a signal to end to SIGKILL", min=0)] = 10,
    aggregators: Annotated[int, typer.Option(help="how many share the work", min=1)] = 1,
    encrypt: Annotated[bool, typer.Option(help="all that is sent, as workers with Network(encrypt=...)")] = True,
    first_worker: Annotated[int, typer.Option(help="several machines: number of the first one here", min=0)] = 0,
    local_workers: Annotated[
        int | None, typer.Option(help="several machines: how many here; default: all from the first one on", min=1)
    ] = None,
    bind: Annotated[
        str | None, typer.Option(help="several machines: tcp://host:port of the aggregator that runs here")
    ] = None,
    endpoints: Annotated[
        str | None, typer.Option(help="several machines: of the aggregators that run elsewhere, with commas")
    ] = None,
    key_file: Annotated[
        str | None,
        typer.Option(envvar=KEY_FILE_VARIABLE, help="several machines: the job's key, which `qgc keygen` has made"),
    ] = None,
) -> None:
    """Start a script once for each worker, with an aggregator; start a worker that fails again, alone."""
    from torch_qgc.cli.launcher import Job, launch

    with reporting():
        if not module and not Path(script).is_file():
            raise ConfigError(f"expected a script, got no file {script}: --module for a module")
        stop = workers if local_workers is None else first_worker + local_workers
        job = Job(
            command=[sys.executable, *(["-m"] if module else []), script, *(arguments or [])],
            workers=workers,
            here=range(first_worker, stop),
            aggregators=aggregators,
            bind=bind,
            endpoints=tuple(filter(None, (endpoints or "").split(","))),
            key_file=key_file,
            encrypt=encrypt,
            patience=Patience(max_restarts=max_restarts, first_delay_s=restart_delay_s),
            grace_s=grace_s,
        )
        status = launch(job)
    raise typer.Exit(status)
