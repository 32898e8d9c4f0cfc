"""From an example's settings and training function to its command line."""

import dataclasses
import enum
import inspect
import os
import shutil
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from common import closing, curve
from common.launcher import JobError, launch, progress_bar
from common.packages import DownloadError
from common.result import JobResult
from common.settings import Settings
from common.ways import TITLES

S = TypeVar("S", bound=Settings)
WayName = enum.Enum("WayName", {name: name for name in TITLES})  # typer takes lists of enums only
Ways = Annotated[list[WayName], typer.Option("--way", help="How gradients are averaged; repeat it to compare.")]


def run(settings_type: type[S], train: Callable[[S], None], script: str, example: str) -> None:
    """Read the command line and train.

    Under torchrun this process is a rank, and trains. Otherwise it starts itself under torchrun, once for every
    --way, shows the progress, and reports.

    Args:
        settings_type: the example's settings; every field is an option.
        train: trains on one rank.
        script: the example's path.
        example: its docstring, for --help.
    """
    build(settings_type, train, script, example)()


def build(settings_type: type[S], train: Callable[[S], None], script: str, example: str) -> typer.Typer:
    """Return what `run` runs."""

    def command(way: list[WayName], **options: Any) -> None:
        if "RANK" in os.environ:
            options["workers"] = int(os.environ["WORLD_SIZE"])  # torchrun has the say
        try:
            each = [settings_type(way=name.value, **options) for name in way]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        try:
            if "RANK" not in os.environ:
                compare(each, script, Console())
            elif len(each) == 1:
                train(each[0])
            else:
                raise typer.BadParameter("one way per torchrun; without torchrun several are compared")
        except (DownloadError, JobError, FileNotFoundError) as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None

    hints = typing.get_type_hints(settings_type, include_extras=True)
    parameters = [inspect.Parameter("way", inspect.Parameter.KEYWORD_ONLY, default=[WayName.qgc], annotation=Ways)]
    parameters += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(settings_type)
        if f.name != "way"
    ]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = example
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def compare(each: list[S], script: str, console: Console) -> None:
    """Train in every way, one after the other; print closing reports and, if there are several, the comparison.

    Raises:
        JobError: a way failed; the others are reported first.
    """
    results: dict[str, JobResult] = {}
    errors = []
    with progress_bar(console) as progress:
        for s in each:
            if not s.resume:
                shutil.rmtree(s.folder, ignore_errors=True)
            command, title = [script, *s.arguments()], TITLES[s.way]
            try:
                launch(command, s.folder, workers=s.workers, title=title, total_steps=s.steps, progress=progress)
                results[title] = JobResult.load(s.folder)
            except JobError as error:
                errors.append(str(error))
    for title, result in results.items():
        console.rule(title)
        closing.show(result, console)
    out = each[0].out
    if len(results) > 1:
        console.print(closing.comparison(results))
        curve.draw({title: curve.read(out / result.job) for title, result in results.items()}, out / "curves.png")
        closing.write_csv(results, out / "comparison.csv")
    if errors:
        raise JobError("\n".join(errors))
    console.print(f"Curves, checkpoints and results: {out}")
