"""The command `qgc`. It needs typer and rich, which the extra `torch_qgc[cli]` brings."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the exit status is 2 for bad input, 1 for a failure."""
    try:
        from torch_qgc.cli.app import app
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"qgc: expected typer and rich, got no module {error.name!r}: pip install 'torch_qgc[cli]'")
    app()
