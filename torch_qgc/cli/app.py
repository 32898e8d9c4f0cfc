"""The commands: they read arguments, call the library, and print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from torch_qgc.cli import doctor as machine
from torch_qgc.cli import tables
from torch_qgc.cli.comparison import Budget, compare
from torch_qgc.cli.delays import lateness_from
from torch_qgc.cli.reporting import reporting
from torch_qgc.cli.run import run
from torch_qgc.cli.simulate import simulate
from torch_qgc.errors import ConfigError
from torch_qgc.planner import PlanOptions, make_plan
from torch_qgc.planner.options import DEFAULT_BITS_PER_COORDINATE, DEFAULT_NOISE_RATIO
from torch_qgc.protocol.contract import MOST_WORKERS
from torch_qgc.protocol.identity import KEY_FILE_VARIABLE, SHARE_A_KEY, Secret
from torch_qgc.protocol.server import Bounds

__all__ = ["app"]

app = typer.Typer(
    name="qgc", help="Plan and run quantized gradient coding.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command()(simulate)
app.command(context_settings={"allow_interspersed_args": False})(run)  # what follows the script is the script's


@app.command()
def plan(
    straggle_probs: Annotated[
        str | None, typer.Option(help="chance of each worker to miss a round: 0.05,0.1,0.3")
    ] = None,
    delays: Annotated[
        Path | None,
        typer.Option(help="or CSV of delays in seconds, a row per round, a column per worker; empty: never came"),
    ] = None,
    deadline_s: Annotated[str, typer.Option(help="with --delays: seconds, or auto")] = "auto",
    bits_per_coordinate: Annotated[
        float | None, typer.Option(help=f"mean over workers; default {DEFAULT_BITS_PER_COORDINATE:g}")
    ] = None,
    bit_budget: Annotated[int | None, typer.Option(help="or their sum over workers")] = None,
    num_partitions: Annotated[int | None, typer.Option(help="pieces of data; default: one per worker")] = None,
    norm: Annotated[str, typer.Option(help="scale of a block: max or l2")] = "max",
    variance: Annotated[str, typer.Option(help="quantization noise: typical, tight or paper")] = "typical",
    noise_ratio: Annotated[
        float, typer.Option(help="batch noise over signal, eta; 0: full gradients")
    ] = DEFAULT_NOISE_RATIO,
    allow_drop: Annotated[bool, typer.Option(help="let a worker send nothing if that is better")] = False,
    max_share: Annotated[float | None, typer.Option(help="most of the data that a worker answers for")] = None,
    decoder: Annotated[str, typer.Option(help="unbiased, annealed, hajek, ridge or uncorrected")] = "unbiased",
    second_track: Annotated[str, typer.Option(help="of Adam: hajek, ridge, lmmse or none")] = "auto",
    out: Annotated[Path | None, typer.Option(help="save the plan as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="save a picture: .png, .pdf or .svg; needs matplotlib")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Decide who answers for how much data, with how many bits, and compare with other schemes."""
    with reporting():
        options = PlanOptions(
            norm=norm,  # type: ignore[arg-type]  # refused below if it is another word
            variance=variance,
            noise_ratio=noise_ratio,
            allow_drop=allow_drop,
            max_share=max_share,
            decoder=decoder,
            second_track=None if second_track == "none" else second_track,
        )
        budget: Budget = {
            "bits_per_coordinate": bits_per_coordinate,
            "bit_budget": bit_budget,
            "num_partitions": num_partitions,
        }
        late = lateness_from(straggle_probs, delays, deadline_s, lambda p: make_plan(p, options=options, **budget))
        made = make_plan(late.straggle_probs, options=options, **budget)
        others = compare(made, budget, options)
        if out is not None:
            out.write_text(made.to_json())
        if plot is not None:
            from torch_qgc.cli.pictures import plan_picture

            plan_picture(made, plot, options)
    if as_json:
        residuals = {row.name: row.residual for row in others}
        found = {"deadline_s": late.deadline_s, "speedup": late.speedup, "residuals": residuals}
        typer.echo(json.dumps({"plan": json.loads(made.to_json()), **found}))
    else:
        tables.print_plan(made, late)
        if others:
            tables.print_comparison(others)


@app.command()
def aggregator(
    bind: Annotated[str, typer.Option(help="tcp://host:port; port * picks a free one")] = "tcp://127.0.0.1:*",
    index: Annotated[int, typer.Option(help="which aggregator this is")] = 0,
    count: Annotated[int, typer.Option(help="of how many")] = 1,
    threads: Annotated[int, typer.Option(help="threads that decode, and as many that encrypt", min=1)] = 1,
    key_file: Annotated[
        str | None, typer.Option(envvar=KEY_FILE_VARIABLE, help="the job's key, which `qgc keygen` has made")
    ] = None,
    encrypt: Annotated[bool, typer.Option(help="all that is sent, as workers with Network(encrypt=...)")] = True,
    max_message_mib: Annotated[int, typer.Option(help="larger messages are cut off", min=1)] = 256,
    trace: Annotated[Path | None, typer.Option(help="write the job's events to this file, a JSON line each")] = None,
) -> None:
    """Run an aggregator that workers dial in to, until their job is finished."""

    from torch_qgc.aggregator import process

    with reporting():
        if key_file is None:
            raise ConfigError(f"expected --key-file, got none: {SHARE_A_KEY}")
        serving = process.Serving(
            door=Secret.load(key_file).door_of(index, MOST_WORKERS, encrypt=encrypt),
            bind=bind,
            index=index,
            count=count,
            threads=threads,
            bounds=Bounds(message_bytes=max_message_mib << 20),
            trace=None if trace is None else str(trace),
        )
        status = process.run(serving)
    raise typer.Exit(status)


@app.command()
def keygen(file: Annotated[Path, typer.Argument(help="to be made; copy it to where it is needed")]) -> None:
    """Make the key by which aggregators that run on their own and the workers of their job know each other."""
    with reporting():
        Secret.make().save(file)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False) -> None:
    """Say what runs here: versions, kernels, devices."""
    facts = machine.examine()
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        tables.print_facts(facts)


if __name__ == "__main__":
    sys.exit(app())
