"""What a launcher tells a worker through its environment, beside QGC_KEY_FILE; where a script says more, that holds."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch_qgc.errors import ConfigError

__all__ = ["ENDPOINTS", "RESTARTS", "WORKER", "WORKERS", "endpoints", "number", "variables"]

WORKER = "QGC_WORKER"  # this worker's number
WORKERS = "QGC_WORKERS"  # how many workers the job has
ENDPOINTS = "QGC_ENDPOINTS"  # of the aggregators that run already, with commas between them
RESTARTS = "QGC_RESTARTS"  # how often this worker was started again; for scripts that want to know


def number(variable: str) -> int | None:
    """Return the number in an environment variable, None if that is not set.

    Raises:
        ConfigError: it is something else.
    """
    text = os.environ.get(variable, "")
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{variable}: expected a number, 0 or larger, got {text!r}: `qgc run` sets it")
    return int(text)


def endpoints() -> tuple[str, ...]:
    """Return the addresses in QGC_ENDPOINTS, none if that is not set."""
    return tuple(filter(None, (each.strip() for each in os.environ.get(ENDPOINTS, "").split(","))))


def variables(worker: int, workers: int, endpoints: Sequence[str], restarts: int) -> dict[str, str]:
    """Return what is to be set for a worker."""
    return {
        WORKER: str(worker),
        WORKERS: str(workers),
        ENDPOINTS: ",".join(endpoints),
        RESTARTS: str(restarts),
    }
