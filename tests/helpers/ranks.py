"""Real processes for tests: fork K ranks with gloo, run a function on each, bring back what it returned."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch._dynamo  # imported before forking: each child would spend seconds on it
import torch.distributed as dist

from helpers.keys import door
from torch_qgc.aggregator.aggregator import Aggregator
from torch_qgc.aggregator.process import serve
from torch_qgc.protocol.server import Bounds, ZmqServer
from torch_qgc.protocol.transport import MonotonicClock

CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 240.0  # for what must happen, however busy the machine is; below pytest's own timeout, to say who hung


@dataclass
class Outcome:
    """What became of one rank: a value, an error (type name and text with traceback), or death."""

    value: Any = None
    error: str | None = None
    exitcode: int | None = None


def run_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 4, timeout_s: float = PATIENCE_S, check: bool = True
) -> list[Any]:
    """Run function(rank, *args) on every rank; return the values, or the outcomes if check is False."""
    with tempfile.TemporaryDirectory() as folder:
        started = [_start(function, rank, ranks, os.path.join(folder, "store"), args) for rank in range(ranks)]
        outcomes = _collect(started, timeout_s)
    if not check:
        return outcomes
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank} failed:\n{outcome.error}"
        assert outcome.exitcode == 0, f"rank {rank} ended with {outcome.exitcode}"
    return [outcome.value for outcome in outcomes]


@contextlib.contextmanager
def aggregators(count: int = 1, *, of: int = 1) -> Iterator[tuple[str, ...]]:
    """Serve jobs, one after the other or at once, with `of` aggregators each; yield the endpoints of all `count`.

    Forked from this process, which costs nothing; QGCState starts a new interpreter for its own.
    """
    processes, endpoints = [], []
    for index in range(count):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_aggregator_main, args=(sender, index % of, of), daemon=True)
        process.start()
        processes.append(process)
        endpoints.append(receiver.recv())
    try:
        yield tuple(endpoints)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _aggregator_main(sender: Connection, index: int, of: int) -> None:
    torch.set_num_threads(1)
    transport = ZmqServer("tcp://127.0.0.1:*", door(index), bounds=Bounds(message_bytes=64 << 20))
    sender.send(transport.endpoint)
    serve(Aggregator(index, of), transport, MonotonicClock())
    transport.close()


def _start(function: Callable[..., Any], rank: int, ranks: int, store: str, args: tuple[Any, ...]) -> Any:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_rank_main, args=(function, rank, ranks, store, args, sender), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def _rank_main(
    function: Callable[..., Any], rank: int, ranks: int, store: str, args: tuple[Any, ...], sender: Connection
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        sender.send(Outcome(value=function(rank, *args)))
    except BaseException as error:
        sender.send(Outcome(error=f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        os._exit(1)  # as a crashing script: no collective goodbye
    dist.destroy_process_group()


def _collect(started: list[Any], timeout_s: float) -> list[Outcome]:
    deadline = time.monotonic() + timeout_s
    outcomes = []
    for process, receiver in started:
        outcome = Outcome(error="timed out")
        try:
            if receiver.poll(max(0.0, deadline - time.monotonic())):
                outcome = receiver.recv()
        except EOFError:
            outcome = Outcome()
        process.join(max(1.0, deadline - time.monotonic()) if outcome.error != "timed out" else 0.1)
        if process.is_alive():
            process.kill()
            process.join()
            outcome.error = outcome.error or "did not end"
        outcome.exitcode = process.exitcode
        outcomes.append(outcome)
    return outcomes
