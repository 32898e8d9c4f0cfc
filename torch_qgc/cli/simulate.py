"""`qgc simulate`: run what a file describes, print a table, draw curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from torch_qgc.cli import tables
from torch_qgc.cli.pictures import figure, save
from torch_qgc.cli.reporting import reporting

if TYPE_CHECKING:
    from torch_qgc.simulator import Trace

__all__ = ["simulate", "traces_picture"]


def simulate(
    config: Annotated[Path, typer.Option(help="what to simulate: .toml or .json, see docs/simulator.md")],
    plot: Annotated[Path | None, typer.Option(help="save a picture: .png, .pdf or .svg; needs matplotlib")] = None,
    out: Annotated[Path | None, typer.Option(help="save the traces: .npz, .json or .csv")] = None,
    steps: Annotated[int | None, typer.Option(help="instead of the file's")] = None,
    runs: Annotated[int | None, typer.Option(help="instead of the file's")] = None,
    processes: Annotated[int, typer.Option(help="that runs are spread over", min=1)] = 1,
    checkpoint: Annotated[Path | None, typer.Option(help="folder from which an interrupted run goes on")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Train under several schemes on a virtual clock, and compare what comes out."""
    with reporting():
        # These import torch, which the other commands can do without.
        from torch_qgc.cli.experiment import read_experiment
        from torch_qgc.simulator import run_experiment, save_traces

        experiment = read_experiment(config, steps=steps, runs=runs)
        traces = run_experiment(experiment, processes=processes, checkpoint=checkpoint, progress=not as_json)
        if out is not None:
            save_traces(traces, out)
        if plot is not None:
            traces_picture(traces, plot)
    rows = {name: summary(trace) for name, trace in traces.items()}
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        _print(rows, next(iter(traces.values())))


def summary(trace: Trace) -> dict[str, float | None]:
    """Return what a trace ends with, as means over runs; None for what was not measured."""
    last = slice(-max(1, trace.steps // 10), None)  # a tenth, since single steps are noisy
    values: dict[str, NDArray[Any]] = {
        "loss": trace.loss[:, last],
        "in time": trace.arrivals,
        "error": trace.residual[np.isfinite(trace.residual)],
        "MB sent": trace.total_bits[:, -1] / 8e6,
        "time, s": trace.virtual_time_s[:, -1],
    }
    values |= {name: evaluated[:, -1] for name, evaluated in trace.evaluations.items()}
    return {name: float(np.mean(found)) if np.size(found) else None for name, found in values.items()}


def traces_picture(traces: Mapping[str, Trace], path: Path) -> None:
    """Save loss against steps, bits sent and virtual time, with 95 % bands over runs.

    Raises:
        ImportError: no matplotlib.
        PlanError: a suffix that is no picture format.
    """
    from torch_qgc.simulator.trace import band

    picture, axes = figure(3)
    for name, trace in traces.items():
        window = max(1, trace.steps // 50)
        steps = trace.steps // window * window
        loss = trace.loss[:, :steps].reshape(trace.runs, -1, window).mean(axis=2)  # single steps are noisy
        mean, low, high = band(loss)
        at = np.arange(window, steps + 1, window)
        bits, time_s = (x.mean(axis=0)[at - 1] for x in (trace.total_bits, trace.virtual_time_s))
        for axis, along in zip(axes, (at, bits / 8e6, time_s)):
            (line,) = axis.plot(along, mean, label=name)
            axis.fill_between(along, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for axis, label in zip(axes, ("step", "megabytes sent", "virtual time, s")):
        axis.set(xlabel=label, ylabel="loss")
    axes[0].legend(fontsize="small")
    save(picture, path)


def _print(rows: Mapping[str, Mapping[str, float | None]], example: Trace) -> None:
    columns = list(next(iter(rows.values())))
    table = tables.make_table(
        f"{example.runs} runs of {example.steps} steps, {example.workers} workers; loss: of the last tenth; "
        "error: ||decoded - g||² / ||g||²",
        ("scheme", *columns),
    )
    for name, row in rows.items():
        table.add_row(name, *("" if row[column] is None else f"{row[column]:.4g}" for column in columns))
    Console().print(table)
