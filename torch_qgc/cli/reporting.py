"""Errors on the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from torch_qgc.errors import JobFailed, QGCError

__all__ = ["reporting"]


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Turn the library's errors into one message on stderr: 2 for bad input, 1 for a failure."""
    try:
        yield
    except (QGCError, ImportError, OSError) as error:
        typer.echo(f"qgc: {error}", err=True)
        bad_input = isinstance(error, QGCError) and not isinstance(error, JobFailed)
        raise typer.Exit(2 if bad_input else 1) from error
