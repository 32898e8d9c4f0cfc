"""A state that is closed ends what it has started, and waits for nothing that cannot come."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc
from torch_qgc.aggregator.process import AggregatorProcess


def patience_at_the_end(rank: int, steps: int) -> tuple[list[float], list[int | None]]:
    """Make steps and close; return how long each aggregator was given to end by itself, and how it ended."""
    given: list[float] = []
    ended: list[int | None] = []
    stop = AggregatorProcess.stop

    def noting(self: AggregatorProcess, timeout_s: float = 10.0) -> None:
        given.append(timeout_s)
        stop(self, timeout_s)
        ended.append(self.poll())

    AggregatorProcess.stop = noting  # type: ignore[method-assign]
    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    state = qgc.QGCState(model)
    model.register_comm_hook(state, qgc.qgc_hook)
    for _ in range(steps):
        model(torch.ones(2, 4)).sum().backward()
    dist.barrier()
    state.close()
    state.close()
    return given, ended


@pytest.mark.parametrize("steps", [0, 1])
def test_a_job_is_waited_for_at_the_end_only_if_it_has_begun(steps: int) -> None:
    given, ended = run_ranks(patience_at_the_end, steps, ranks=1)[0]
    assert len(given) == len(ended) == 1
    assert (given[0] != 0) == (steps > 0)  # None: as long as it takes
    assert ended[0] is not None
    assert steps == 0 or ended[0] == 0  # its job was finished
