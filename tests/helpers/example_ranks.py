"""Examples on the tests' forked ranks, and the data they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from common import digits
from common.packages import DownloadError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
DATA = ROOT / "data"


@contextlib.contextmanager
def as_under_torchrun() -> Iterator[None]:
    """Let a script believe that it makes and destroys the process group, which the harness has made."""
    made, destroyed = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *args: None
    try:
        yield
    finally:
        dist.barrier()
        dist.init_process_group, dist.destroy_process_group = made, destroyed


def fetch_digits() -> None:
    """Fetch the handwritten digits once, or skip the test where there is no package index."""
    try:
        digits.load(DATA)
    except DownloadError as error:
        pytest.skip(f"needs the digits, a download of 1.4 MB: {error}")
