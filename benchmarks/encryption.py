"""What keys cost: messages of a worker and results to several, through the sockets of both ends, four ways.

    python benchmarks/encryption.py --turns 3

"curve" is the default, "password" is Network(encrypt=False). The other two are for comparison, and no job uses them:
"none" is ZeroMQ's own sockets without keys, and "tag" is these with the least that tags on messages could cost, one
keyed BLAKE2b of each message at each end. One process is the aggregator, `--workers` others send a frame each and get
one that is the same for all of them, as in a step of a job. Ways take turns. Threads are those in which ZeroMQ moves,
encrypts and decrypts, at the aggregator.
"""

from __future__ import annotations

import csv
import hashlib
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
import zmq
from rich.console import Console
from rich.table import Table

from torch_qgc.protocol.client import ZmqClient
from torch_qgc.protocol.identity import Secret
from torch_qgc.protocol.server import ZmqServer

RESULTS = Path(__file__).parent / "results"
WAYS = ("none", "password", "tag", "curve")
SECRET = Secret(bytes(32))


class Bare:
    """ROUTER and DEALER without keys, with the methods of our own ends that are used here, and tags if asked for."""

    def __init__(self, kind: int, io_threads: int, endpoint: str | None = None, *, tags: bool = False) -> None:
        self._tags = tags
        self._newest: list[Any] = []  # the newest message, which is sent to many
        self._tagged: list[Any] = []  # and how it is sent
        self._context = zmq.Context(io_threads=io_threads)
        self._socket = self._context.socket(kind)
        self.endpoint = endpoint
        if endpoint is None:
            self._socket.bind("tcp://127.0.0.1:*")
            self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        else:
            self._socket.connect(endpoint)

    def poll(self, timeout_s: float) -> list[tuple[Any, list[Any]]]:
        """Return a message, as (peer, frames)."""
        received = self._socket.recv_multipart(copy=False)
        frames = [frame.buffer for frame in received]
        peer = frames.pop(0).tobytes() if self._socket.type == zmq.ROUTER else 0
        if self._tags and bytes(frames.pop(0)) != tag(frames):
            raise ValueError("expected the tag of this message, got another one")
        return [(peer, frames)]

    def send(self, peer: Any, frames: list[Any]) -> None:
        """Send a message."""
        if self._newest is not frames:
            self._newest, self._tagged = frames, [tag(frames), *frames] if self._tags else frames
        route = [peer] if self._socket.type == zmq.ROUTER else []
        self._socket.send_multipart([*route, *self._tagged], copy=False)

    def close(self) -> None:
        """Close the socket."""
        self._context.destroy()


def tag(frames: list[Any]) -> bytes:
    """Return the tag of a message."""
    state = hashlib.blake2b(key=SECRET.value, digest_size=16)
    for frame in frames:
        state.update(frame)
    return state.digest()


def serve(pipe: Connection, way: str, io_threads: int, workers: int, rounds: int) -> None:
    """Be the aggregator: gather a frame of each worker, send one to all."""
    server: Any
    if way in ("none", "tag"):
        server = Bare(zmq.ROUTER, io_threads, tags=way == "tag")
    else:
        door = SECRET.door_of(0, workers, encrypt=way == "curve")
        server = ZmqServer("tcp://127.0.0.1:*", door, io_threads=io_threads)
    pipe.send(server.endpoint)
    start, used = 0.0, 0.0
    for number in range(rounds + 1):
        got: dict[Any, list[Any]] = {}
        while len(got) < workers:
            got.update(server.poll(1.0))
        if number == 1:  # the one before has waited for connections to be made
            start, used = time.perf_counter(), cpu_s()
        frames = [b"result", bytes(next(iter(got.values()))[-1])]
        for peer in got:
            server.send(peer, frames)
    pipe.send((time.perf_counter() - start, cpu_s() - used))
    server.close()


def work(endpoint: str, way: str, worker: int, size: int, rounds: int) -> None:
    """Be a worker: send a frame, wait for the result."""
    client: Any
    if way in ("none", "tag"):
        client = Bare(zmq.DEALER, 1, endpoint, tags=way == "tag")
    else:
        client = ZmqClient([endpoint], [SECRET.pass_of(worker, 0, encrypt=way == "curve")])
    payload = os.urandom(size)
    for _ in range(rounds + 1):
        client.send(0, [b"push", payload])
        while not client.poll(1.0):
            pass
    client.close()


def cpu_s() -> float:
    """Return the processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(way: str, size: int, io_threads: int, workers: int, rounds: int) -> tuple[float, float]:
    """Return the aggregator's seconds and processor seconds per round."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(there, way, io_threads, workers, rounds))
    server.start()
    endpoint = here.recv()
    members = [context.Process(target=work, args=(endpoint, way, k, size, rounds)) for k in range(workers)]
    for member in members:
        member.start()
    wall_s, used_s = here.recv()
    for process in (server, *members):
        process.join()
    return wall_s / rounds, used_s / rounds


def spread(values: Sequence[float], scale: float) -> str:
    """Return the median and the range, as text."""
    return f"{statistics.median(values) * scale:.2f} ({min(values) * scale:.2f}-{max(values) * scale:.2f})"


def main(
    turns: Annotated[int, typer.Option(help="of each way")] = 3,
    workers: Annotated[int, typer.Option(help="processes that send and receive")] = 2,
    mebibytes: Annotated[int, typer.Option(help="that each worker sends in a turn")] = 64,
) -> None:
    """Print and save the time of a round, the aggregator's processor time, and ratios to no keys in the same turn."""
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, libzmq {zmq.zmq_version()}"
    command = f"python benchmarks/encryption.py --turns {turns} --workers {workers} --mebibytes {mebibytes}"
    rows = []
    for size in (64 << 10, 1 << 20):
        for io_threads in (1, 2):
            for turn in range(turns):
                bare_s = 0.0
                for way in WAYS:
                    round_s, used_s = measure(way, size, io_threads, workers, (mebibytes << 20) // size)
                    bare_s = round_s if way == "none" else bare_s
                    rows.append((size, io_threads, way, turn, round_s, used_s, round_s / bare_s))
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / "encryption.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ["frame_bytes", "io_threads", "way", "turn", "round_s", "aggregator_cpu_s", "ratio_to_none"]
        writer.writerow([*names, "hardware", "command"])
        for *what, round_s, used_s, ratio in rows:
            writer.writerow([*what, f"{round_s:.6f}", f"{used_s:.6f}", f"{ratio:.3f}", hardware, command])
    table = Table(
        "frame", "I/O threads", "way", "round, ms", "aggregator's CPU, ms", "round / none's", title="median (range)"
    )
    for size in (64 << 10, 1 << 20):
        for io_threads in (1, 2):
            for way in WAYS:
                found = zip(*(row[4:] for row in rows if row[:3] == (size, io_threads, way)))
                cells = [spread(values, scale) for values, scale in zip(found, (1e3, 1e3, 1.0))]
                table.add_row(f"{size >> 10} KiB", str(io_threads), way, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
