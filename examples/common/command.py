"""From an example's settings and training function to its command line."""

import dataclasses
import enum
import inspect
import os
import shutil
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console

from common import result
from common.hooks import TITLES
from common.launcher import JobError, launch
from common.packages import DownloadError
from common.result import Result
from common.settings import Settings

WayName = enum.Enum("WayName", {name: name for name in TITLES})  # typer takes lists of enums only
OPTIONS = {
    "way": Annotated[list[WayName], typer.Option(help="How gradients are averaged; repeat it to compare.")],
    "quick": Annotated[bool, typer.Option("--quick", help="A few small steps: everything runs, nothing is learnt.")],
}


def build(
    defaults: Settings, quick_changes: Mapping[str, Any], train: Callable, script: str, about: str
) -> typer.Typer:
    """Return the example's command: every field of its settings is an option, `about` it is its help.

    Under torchrun this process is a rank, and trains. Otherwise it starts its script under torchrun, once for every
    --way, shows the progress, and compares.
    """

    def command(way: list[WayName], quick: bool, **options: Any) -> None:
        options |= quick_changes if quick else {}
        if "RANK" in os.environ:
            options["workers"] = int(os.environ["WORLD_SIZE"])  # torchrun has the say
        try:
            each = [dataclasses.replace(defaults, way=name.value, **options) for name in way]
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

    hints = typing.get_type_hints(type(defaults), include_extras=True) | OPTIONS
    values = vars(defaults) | {"way": [WayName[defaults.way]], "quick": False}
    kind = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, default=values[name], annotation=hints[name]) for name in values]
    )
    command.__annotations__ = {name: hints[name] for name in values}
    command.__doc__ = about
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def compare(each: Sequence[Settings], script: str, console: Console) -> None:
    """Train in every way, one after the other, and print the results, also where one fails.

    Raises:
        JobError: a way failed; those behind it were not tried.
    """
    results = []
    try:
        for s in each:
            if not s.resume:
                shutil.rmtree(s.folder, ignore_errors=True)
            command = [script, *s.arguments()]
            launch(command, s.folder, workers=s.workers, title=TITLES[s.way], steps=s.steps, console=console)
            results.append(Result.load(s.folder))
    finally:
        if results:
            result.show(results, console)
    console.print(f"Curves, checkpoints and results: {each[0].out}")
