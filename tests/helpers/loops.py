"""Training loops on several ranks of which one is late, for the tests of what a real loop does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from helpers.ranks import PATIENCE_S, aggregators, run_ranks

mse = torch.nn.functional.mse_loss
RANKS, LATE = 3, 1
BATCH, STEPS = 4, 9
LATE_AT = 4  # after the warm-up; it comes late to this step, and at least one more closes without it


def run(function: Callable[..., Any], *args: Any, jobs: int = 1, timeout_s: float = PATIENCE_S) -> list[Any]:
    """Run function(rank, endpoint of each job's aggregator, *args) on every rank; return the values."""
    with aggregators(jobs) as endpoints:
        return run_ranks(function, *endpoints, *args, ranks=RANKS, timeout_s=timeout_s)


def dataset(steps: int = STEPS, width: int = 6) -> TensorDataset:
    """Samples for that many steps of BATCH per rank."""
    x = torch.randn(steps * BATCH * RANKS, width, generator=torch.Generator().manual_seed(5))
    return TensorDataset(x, torch.sin(x).sum(1, keepdim=True))


def mlp(width: int = 6) -> torch.nn.Sequential:
    """A small model, the same on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(width, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))


def coded(
    model: torch.nn.Module, endpoint: str, *, ddp: dict[str, Any] | None = None, **options: Any
) -> tuple[DistributedDataParallel, qgc.QGCState]:
    """Wrap a model in DDP with the hook."""
    wrapped = DistributedDataParallel(model, **(ddp or {}))
    options = {"limits": qgc.Limits(chunk_numel=512, silence_s=20.0), "deadline_s": 0.1, "verify_every": 4, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broadcast_buffers
        state = qgc.QGCState(wrapped, network=qgc.Network(endpoints=(endpoint,)), **options)
    wrapped.register_comm_hook(state, qgc.qgc_hook)
    return wrapped, state


class Witness:
    """Note a replica's parameters at the beginning of every step, computed or replayed, and at the end."""

    def __init__(self, state: qgc.QGCState) -> None:
        self.digests: dict[int, str] = {}
        self._state = state
        steps: Any = state.replica
        verify = steps._state_if_due

        def noting() -> None:
            self.digests[state.step] = state.replica.layout.parameter_digest()
            verify()

        steps._state_if_due = noting

    def seen(self, **extra: Any) -> dict[str, Any]:
        """Return everything that must be equal on all ranks, and the report."""
        self.digests[self._state.step] = self._state.replica.layout.parameter_digest()
        return {"digests": self.digests, "report": self._state.report(), **extra}


def fall_behind(rank: int, *states: qgc.QGCState) -> None:
    """On the late rank: wait until the others have closed this step and the next without it."""
    if rank != LATE or not states[0].replica.may_be_late or states[0].replica.in_step or states[0].step != LATE_AT:
        return
    for state in states:
        assert state.replica.joined()[0].wait_closed(state.step + 1, PATIENCE_S)


@contextlib.contextmanager
def job(*states: qgc.QGCState) -> Iterator[None]:
    """Leave all jobs when every rank is done, so that nobody takes results away from a late one."""
    yield
    dist.barrier()
    for state in states:
        state.close()


def check_replicas(ranks: list[dict[str, Any]], *, steps: int = STEPS, changed: bool = True) -> None:
    """Assert that all replicas were equal after every step although one of them replayed some."""
    for rank in ranks:
        assert {k: v for k, v in rank.items() if k != "report"} == {k: v for k, v in ranks[0].items() if k != "report"}
        assert set(rank["digests"]) == set(range(steps + 1))
        assert not rank["report"].rejections
        # How many of each, beyond the late rank's: a busy machine decides.
        assert rank["report"].computed_steps + rank["report"].replayed_steps == steps
    assert not changed or len(set(ranks[0]["digests"].values())) == steps + 1
    assert ranks[LATE]["report"].replayed_steps >= 1
