"""Training loops on several ranks of which one is late, for the tests of what a real loop does.

A loop is written as in a script: `def loop(rank, job): ...`; it makes its models with `job.wrap`, and returns what
must be equal on all ranks beside what `play` looks at anyway: parameters after every step, the optimizers' state and
hyperparameters, the number of steps. Lateness is no part of the loop: the late rank's forward pass waits, at steps
drawn at random, until it has seen that the others closed this step and the next one without it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

import torch_qgc as qgc
from helpers.ranks import PATIENCE_S, aggregators, run_ranks

mse = torch.nn.functional.mse_loss
RANKS, LATE = 3, 1
BATCH, STEPS = 4, 9
WARMUP = 3


# --- data and models -------------------------------------------------------------------------------------


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
    limits = qgc.Limits(chunk_numel=512, silence_s=PATIENCE_S, join_timeout_s=PATIENCE_S)
    options = {"limits": limits, "deadline_s": 0.05, "verify_every": 3, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broadcast_buffers
        state = qgc.QGCState(wrapped, network=qgc.Network(endpoints=(endpoint,)), **options)
    wrapped.register_comm_hook(state, qgc.qgc_hook)
    return wrapped, state


# --- being late -------------------------------------------------------------------------------------------


def closes_without_us(state: qgc.QGCState, *, steps: int = 2) -> bool:
    """Wait until the others have closed the step at hand, and some after it, without this rank."""
    connection = state.replica.joined()[0]
    last, give_up = state.step + steps - 1, time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        if connection.closed(last):
            return True
        time.sleep(0.005)
    return False


class Late:
    """Make a model's forward pass wait, at the first forward pass of some steps.

    Args:
        model: the DDP model.
        state: its state.
        at: steps; each is waited for once, and the one after it closes as well.
    """

    def __init__(self, model: torch.nn.Module, state: qgc.QGCState, at: set[int]) -> None:
        self.state, self.left = state, set(at)
        model.register_forward_pre_hook(self.before_forward, prepend=True)

    def before_forward(self, module: torch.nn.Module, args: Any) -> None:
        state = self.state
        if not module.training or not torch.is_grad_enabled() or state.replica.in_step or state.step not in self.left:
            return
        self.left.discard(state.step)
        if not state.replica.joined()[0].closed(state.step):  # else it is late already
            assert closes_without_us(state), f"the others did not close step {state.step + 1}"


# --- witnesses -------------------------------------------------------------------------------------------


class Witness:
    """Note a replica's parameters before the first forward pass of every step, after every update, and at the end."""

    def __init__(self, model: torch.nn.Module, state: qgc.QGCState) -> None:
        self.digests: dict[int, str] = {}
        self._state = state
        self._optimizers: list[torch.optim.Optimizer] = []
        model.register_forward_pre_hook(lambda *_: self.note(), prepend=True)
        self._hook = register_optimizer_step_post_hook(self._after_step)

    def note(self) -> None:
        """Note the parameters as they are, unless a step is under way."""
        if not self._state.replica.in_step:
            self.digests[self._state.step] = self._state.replica.layout.parameter_digest()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        layout = self._state.replica.layout
        if any(p in layout for group in optimizer.param_groups for p in group["params"]):
            if all(optimizer is not known for known in self._optimizers):
                self._optimizers.append(optimizer)
            self.note()

    def seen(self, **extra: Any) -> dict[str, Any]:
        """Return everything that must be equal on all ranks, and the report."""
        self.note()
        self._hook.remove()
        return {
            "digests": self.digests,
            "optimizers": [digest(o.state_dict()) for o in self._optimizers],
            "report": self._state.report(),
            **extra,
        }


def digest(value: Any) -> str:
    """Return a digest of whatever a loop holds: modules, tensors, numbers, and structures of them."""
    hashed = hashlib.blake2b(digest_size=8)

    def add(part: Any) -> None:
        if isinstance(part, torch.nn.Module):
            add(dict(part.named_parameters()))
        elif isinstance(part, torch.Tensor):
            hashed.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                hashed.update(repr(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            hashed.update(repr(part).encode())

    add(value)
    return hashed.hexdigest()


# --- loops as scripts write them --------------------------------------------------------------------------


class Job:
    """What a loop is handed: it makes coded models, and lets this rank be late.

    Args:
        rank: this rank.
        endpoints: of aggregators, one for each model.
        name: of the loop; it decides who is late, and when.
        steps: that the loop makes at least.
        every: steps between points at which the loop lets all ranks wait for each other.
        late: steps after which one rank is late at times; False: nobody is.
    """

    def __init__(self, rank: int, endpoints: list[str], *, name: str, steps: int, every: int, late: bool) -> None:
        rng = np.random.default_rng(list(name.encode()))
        free = [s for s in range(WARMUP + 1, steps - 2) if s % every < every - 2]
        self.late_rank = int(rng.integers(RANKS))
        self.late_at = set(rng.choice(free, size=min(2, len(free)), replace=False).tolist()) if late else set()
        self.rank, self._endpoints = rank, list(endpoints)
        self.states: list[qgc.QGCState] = []
        self.models: list[torch.nn.Module] = []
        self.witnesses: list[Witness] = []
        self.given_up = False

    def wrap(
        self, model: torch.nn.Module, *, ddp: dict[str, Any] | None = None, late: bool = True, **options: Any
    ) -> tuple[DistributedDataParallel, qgc.QGCState]:
        """Wrap a model in DDP with the hook; its forward pass is late at times."""
        wrapped, state = coded(model, self._endpoints.pop(0), ddp=ddp, **options)
        self.witnesses.append(Witness(wrapped, state))
        if late and self.rank == self.late_rank:
            Late(wrapped, state, self.late_at)
        self.states.append(state)
        self.models.append(wrapped)
        return wrapped, state


Loop = Callable[[int, Job], Any]


class Case:
    """A loop, and what is known about it.

    Args:
        loop: the loop.
        models: how many states it makes.
        steps, every: see `Job`.
        late: one rank is late at times.
        error: what every rank raises; None: nothing is raised.
        replays: late steps are replayed rather than thin.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        models: int = 1,
        steps: int = STEPS,
        every: int = 1 << 30,
        late: bool = True,
        error: str | None = None,
        replays: bool = False,
    ) -> None:
        self.loop, self.models, self.steps, self.every = loop, models, steps, every
        self.late, self.error, self.replays = late, error, replays


def play(rank: int, endpoints: list[str], name: str, case: Case) -> dict[str, Any]:
    """Run a loop on this rank; return what every model has seen, or the error."""
    job = Job(rank, endpoints, name=name, steps=case.steps, every=case.every, late=case.late)
    begun_s = time.monotonic()
    result: dict[str, Any] = {"late_rank": job.late_rank}
    try:
        result["extra"] = digest(case.loop(rank, job))
        result["models"] = [witness.seen() for witness in job.witnesses]
        for state in job.states:
            state.close()
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["trace"] = traceback.format_exc()
    result["took_s"] = time.monotonic() - begun_s
    for state in job.states:
        with contextlib.suppress(qgc.QGCError):
            state.close()
    return result


def play_all(rank: int, endpoints: tuple[str, ...], cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Run loops one after the other, all ranks together."""
    free, played = list(endpoints), {}
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # loaders have children
    for name, case in cases.items():
        taken, free = free[: case.models], free[case.models :]
        torch.manual_seed(rank)
        played[name] = play(rank, taken, name, case)
        gc.collect()
        dist.barrier()
    return played


def run_cases(cases: dict[str, Case], *, timeout_s: float = PATIENCE_S) -> list[dict[str, dict[str, Any]]]:
    """Run loops on RANKS forked ranks; return what was seen, by rank and by name."""
    with aggregators(sum(case.models for case in cases.values())) as endpoints:
        return run_ranks(play_all, endpoints, cases, ranks=RANKS, timeout_s=timeout_s)


def check_case(ranks: list[dict[str, Any]], case: Case) -> None:
    """Assert that all replicas were equal at all times although one was late, or that all have raised the error."""
    if case.error is not None:
        for rank in ranks:
            assert case.error in rank.get("error", "nothing happened"), [r.get("error") for r in ranks]
        return
    for rank in ranks:
        assert "error" not in rank, rank["trace"]
    for models in zip(*(rank["models"] for rank in ranks)):
        for model in models:
            assert model["optimizers"] == models[0]["optimizers"]
            assert not model["report"].rejections
            assert model["report"].steps == models[0]["report"].steps >= case.steps
            common = model["digests"].keys() & models[0]["digests"].keys()
            assert {s: model["digests"][s] for s in common} == {s: models[0]["digests"][s] for s in common}
            assert max(model["digests"]) == max(models[0]["digests"]) in common
        assert len(set(models[0]["digests"].values())) >= 3  # it did learn
    assert len({rank["extra"] for rank in ranks}) == 1, [rank["extra"] for rank in ranks]
    if case.late:
        reports = [model["report"] for model in ranks[ranks[0]["late_rank"]]["models"]]
        assert sum(r.replayed_steps if case.replays else r.thin_steps for r in reports) > 0, reports


# --- for tests of one loop --------------------------------------------------------------------------------


def run(function: Callable[..., Any], *args: Any, jobs: int = 1, timeout_s: float = PATIENCE_S) -> list[Any]:
    """Run function(rank, endpoint of each job's aggregator, *args) on every rank; return the values."""
    with aggregators(jobs) as endpoints:
        return run_ranks(function, *endpoints, *args, ranks=RANKS, timeout_s=timeout_s)


@contextlib.contextmanager
def closing(*states: qgc.QGCState) -> Iterator[None]:
    """Leave all jobs at the end."""
    yield
    for state in states:
        state.close()
