"""What the demo's workers are emulated with: machines that pause, links that are slow, and a clock that all share."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from common.clock import BLOCK, SharedClock
from common.link import Relay
from common.machines import Emulation, Machine
from helpers.ranks import CONTEXT, run_ranks

PAUSING = Machine(sample_s=0.0, pause_every_s=4.0, pause_s=1.5)


def test_pauses_are_a_function_of_the_seed_and_come_as_often_and_as_long_as_they_should() -> None:
    drawn = PAUSING.pauses(4000.0, np.random.default_rng(7))
    assert drawn == PAUSING.pauses(4000.0, np.random.default_rng(7))
    starts, lengths = np.array(drawn).T
    assert np.all(starts[1:] >= (starts + lengths)[:-1])
    # A renewal process: 4000 / 5.5 pauses, four standard errors of an exponential mean.
    assert lengths.mean() == pytest.approx(1.5, abs=4 * 1.5 / len(drawn) ** 0.5)
    assert len(drawn) == pytest.approx(4000 / 5.5, rel=4 / (4000 / 5.5) ** 0.5)
    assert Machine(sample_s=0.1).pauses(4000.0, np.random.default_rng(7)) == []


def test_a_pace_stretches_everything() -> None:
    machine = Machine(sample_s=0.02, link_bytes_per_s=1e6, pause_every_s=4.0, pause_s=1.5)
    assert machine.at_pace(2.0) == Machine(sample_s=0.04, link_bytes_per_s=5e5, pause_every_s=8.0, pause_s=3.0)


def counting(numbers) -> None:
    emulation = Emulation(PAUSING)
    emulation.stand_still([(0.2, 60.0)])
    while True:
        numbers.value += 1
        time.sleep(0.01)


def test_a_machine_that_stands_still_does_nothing_until_it_goes_on() -> None:
    numbers = CONTEXT.Value("q", 0)
    process = CONTEXT.Process(target=counting, args=(numbers,), daemon=True)
    process.start()
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)  # it has stopped
    stopped_at = numbers.value
    assert stopped_at > 0
    os.kill(process.pid, signal.SIGCONT)
    while numbers.value == stopped_at:
        time.sleep(0.001)
    process.kill()
    process.join()


def test_a_relay_carries_every_byte_both_ways_no_faster_than_its_link() -> None:
    server = socket.create_server(("127.0.0.1", 0))

    def echo() -> None:
        connection, _ = server.accept()
        while piece := connection.recv(1 << 16):
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)

    threading.Thread(target=echo, daemon=True).start()
    relay = Relay(f"tcp://127.0.0.1:{server.getsockname()[1]}", bytes_per_s=1e6)
    host, port = relay.endpoint.removeprefix("tcp://").split(":")
    said = np.random.default_rng(0).bytes(200_000)
    began_s = time.monotonic()
    with socket.create_connection((host, int(port))) as client:
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        heard = b""
        while piece := client.recv(1 << 16):
            heard += piece
    assert heard == said
    assert time.monotonic() - began_s >= 0.2  # sleeping is never shorter than asked for
    relay.close()
    server.close()


def read_clock(rank: int, file: Path) -> list[float]:
    clock = SharedClock(file, step=2 * BLOCK, elapsed_s=5.0)
    times = []
    for step in range(2 * BLOCK, 7 * BLOCK):
        time.sleep(0.001 * (rank + 1))
        times.append(clock.at(step))
    return times


def test_every_rank_reads_the_same_times_and_they_go_forward(tmp_path: Path) -> None:
    (tmp_path / "clock").write_text("left by a job that was killed")
    ranks = run_ranks(read_clock, tmp_path / "clock", ranks=3)
    assert ranks[0] == ranks[1] == ranks[2]
    assert ranks[0][: 2 * BLOCK] == [5.0] * (2 * BLOCK)  # nobody knows yet how long steps take
    assert all(np.diff(ranks[0]) >= 0)
    assert ranks[0][-1] > 5.0
