"""What processes run out of: files that may be open, room on a disk; and what dies beside them: loaders' processes."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import torch
from helpers.script import Member
from helpers.stage import Stage
from helpers.training import train

from torch_qgc.protocol.gate import SPARE_DESCRIPTORS

pytestmark = pytest.mark.chaos


@contextlib.contextmanager
def at_most(limit: int, value: int) -> Iterator[None]:
    """Let this process have no more of something."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(limit, (soft, hard))


def free_descriptor() -> int:
    """Return the least number that no open file has."""
    found = os.dup(0)
    os.close(found)
    return found


# --- descriptors ------------------------------------------------------------------------------------------


def can_open_nothing(member: Member) -> Any:
    with contextlib.ExitStack() as limits:

        def after_step(step: int, *_: object) -> None:
            if member.rank == 2 and step == 10:
                limits.enter_context(at_most(resource.RLIMIT_NOFILE, free_descriptor()))

        return train(member, after_step=after_step, after_loop=lambda _: limits.close())


@pytest.mark.slow
def test_a_worker_that_can_open_nothing_comes_back_when_it_was_cut_off(stage: Stage) -> None:
    stage.proxy(2)
    stage.start(can_open_nothing)
    with stage.after(20, of=2):
        stage.cut(2)
    stage.end()
    stage.assert_equal()


def with_few_descriptors(member: Member) -> Any:
    """Train; rank 0's aggregator may open a few files more than what it needs."""
    few = contextlib.nullcontext() if member.rank else at_most(resource.RLIMIT_NOFILE, SPARE_DESCRIPTORS + 30)
    with contextlib.ExitStack() as limits:
        limits.enter_context(few)
        return train(member, before_loop=limits.close)


@pytest.mark.slow
def test_strangers_who_take_all_connections_keep_no_worker_out(stage: Stage) -> None:
    stage.proxy(2)
    stage.start(with_few_descriptors)
    with contextlib.ExitStack() as strangers:
        with stage.after(10, of=2):
            parts = urlsplit(stage.note(0, "endpoint"))
            for _ in range(100):
                strangers.enter_context(socket.create_connection((parts.hostname, parts.port)))
            stage.cut(2)
        stage.end()
    stage.assert_equal()


# --- a disk that is full ----------------------------------------------------------------------------------


def saves(catches: bool, member: Member) -> Any:
    """Train; rank 0 saves after steps 10 and 20, and has no room for it the second time."""
    path = member.folder / "checkpoint.pt"

    def save(step: int, ddp: Any, optimizer: Any, state: Any) -> None:
        parts = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "state": state.state_dict()}
        torch.save({"step": step, **parts}, path.with_suffix(".half"))
        path.with_suffix(".half").replace(path)

    def after_step(step: int, *parts: Any) -> None:
        if member.rank == 0 and step == 10:
            save(step, *parts)
        if member.rank == 0 and step == 20:
            member.board.fault()
            caught = contextlib.suppress(Exception) if catches else contextlib.nullcontext()
            with caught, at_most(resource.RLIMIT_FSIZE, 1024):
                save(step, *parts)

    return train(member, after_step=after_step)


def assert_kept(folder: Path) -> None:
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 10


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_job_by_name_and_spares_the_checkpoint_before(stage: Stage) -> None:
    stage.start(partial(saves, False), gate=99)
    stage.end()
    stage.assert_failed("worker 0 failed at step 21", but={0})
    assert_kept(stage.folder)


@pytest.mark.slow
def test_a_checkpoint_that_fails_and_is_done_without_costs_nothing(stage: Stage) -> None:
    stage.start(partial(saves, True), gate=99)
    stage.end()
    stage.assert_equal()
    assert_kept(stage.folder)


# --- a loader's own processes -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_the_loaders_processes_end_with_a_rank_that_is_killed(stage: Stage, rank: int) -> None:
    stage.start(partial(train, num_workers=2))
    with stage.after(20, of=rank):
        loaders = psutil.Process(stage.pid(rank)).children()
        assert len(loaders) >= 2
        stage.kill(rank)
    stage.end()
    if rank:
        stage.assert_equal()
    else:  # its aggregator ends with it, whatever its loaders' processes have inherited
        stage.assert_failed("rank 0")


@pytest.mark.slow
def test_a_loaders_process_that_is_killed_ends_the_job_by_name(stage: Stage) -> None:
    stage.start(partial(train, num_workers=2))
    with stage.after(20, of=2):
        psutil.Process(stage.pid(2)).children()[0].kill()
        stage.hit.add(2)
        stage.others_files = "pymp-*"  # of multiprocessing, in the process that was killed
    stage.end()
    stage.assert_failed("worker 2 failed", but={2})
    assert "Error" in stage.log(2)  # torch's own, or one of the connection over which it takes batches
