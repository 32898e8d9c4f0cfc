"""One run: train under a method until the horizon on the virtual clock, and look at it on the way."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lever_runs.methods import BATCH_SIZE, METHODS, make_job
from lever_runs.settings import SETTINGS, own_samples, slow_classes
from lever_runs.task import dataset, initial_model, loss, score
from torch_qgc.simulator import Experiment
from torch_qgc.simulator.arrivals import IndependentRounds
from torch_qgc.simulator.delays import DelaySource
from torch_qgc.simulator.machines import Load
from torch_qgc.simulator.trajectory import Trajectory

__all__ = ["LRS", "SEEN", "Outcome", "Run", "train"]

LRS = {"adam": (0.004, 0.012, 0.036), "momentum": (0.01, 0.03, 0.1)}
SEEN = np.geomspace(0.02, 1.0, 24)  # when a run is looked at, as parts of its horizon
AVERAGED = 0.1  # the part of the time so far over which parameters are averaged before they are looked at


@dataclass(frozen=True)
class Run:
    """What is run.

    Args:
        setting, data, method, optimizer, model: names of SETTINGS, `Data`, METHODS, LRS and MODELS.
        schedule: "constant", or "cosine" from the learning rate to 0 at the horizon.
        rounds: the horizon, in mean rounds of a job that waits for all.
        lr: learning rate.
        seed: of the model, the draws and the delays.
    """

    setting: str
    data: str
    method: str
    optimizer: str
    model: str
    schedule: str
    rounds: int
    lr: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came out.

    Attributes:
        steps: rounds that closed within the horizon.
        loss: of training samples at SEEN; inf once it has diverged.
        accuracy, slow_accuracy: at the horizon, of held-out digits, and of the slow workers' classes.
    """

    steps: int
    loss: list[float]
    accuracy: float
    slow_accuracy: float


def train(run: Run) -> Outcome:
    """Train, and return what came out."""
    setting = SETTINGS[run.setting]
    labels = dataset().tensors[1].numpy()
    parts = own_samples(setting, labels, run.seed)
    slow = slow_classes(setting, labels, parts)
    job = make_job(METHODS[run.method], setting, parts if run.data == "own" else None)
    fields: dict[str, Any] = dict(
        model=initial_model(run.model, run.seed),
        loss=loss,
        dataset=dataset(),
        schemes={run.method: job.plan},
        partitions=[parts[k].tolist() for k in job.workers] if run.data == "own" else None,
        optimizer="adam" if run.optimizer == "adam" else "sgd",
        momentum=0.0 if run.optimizer == "adam" else 0.9,
        batch_size=BATCH_SIZE,
        **job.options,
    )
    horizon_s = run.rounds * _waiting_round_s(run.setting)
    steps = _steps_within(horizon_s, Trajectory(Experiment(**fields, steps=1, lr=run.lr), job.plan, run.seed))

    def cosine(step: int) -> float:
        return run.lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))

    lr = run.lr if run.schedule == "constant" else cosine
    trajectory = Trajectory(Experiment(**fields, steps=steps, lr=lr), job.plan, run.seed)
    average = _Average(trajectory.model)
    scores: list[dict[str, float]] = []
    while not trajectory.done:
        trajectory.advance()
        while len(scores) < len(SEEN) and trajectory.now_s > SEEN[len(scores)] * horizon_s:
            scores.append(score(average.model(), slow))
        average.update(trajectory.now_s)
    curve = [s["loss"] if math.isfinite(s["loss"]) else math.inf for s in scores]
    return Outcome(trajectory.step, curve, scores[-1]["accuracy"], scores[-1]["slow"])


def _steps_within(horizon_s: float, trajectory: Trajectory) -> int:
    """Return how many steps it takes until the horizon has passed."""
    clock, step = copy.deepcopy(trajectory.arrivals), 0
    while clock.close(step).closed_at_s <= horizon_s:
        step += 1
    return step + 1


class _Average:
    """A model's parameters, averaged over the last part of the time so far with exponential weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._trained, self._averaged = model, copy.deepcopy(model)
        self._values = parameters_to_vector(model.parameters()).detach()
        self._now_s = 0.0

    def update(self, now_s: float) -> None:
        """Note the parameters that hold from now on."""
        weight = 1.0 - math.exp((self._now_s - now_s) / (AVERAGED * now_s))
        self._values.lerp_(parameters_to_vector(self._trained.parameters()).detach(), weight)
        self._now_s = now_s

    def model(self) -> torch.nn.Module:
        """Return a model with these parameters."""
        vector_to_parameters(self._values, self._averaged.parameters())
        return self._averaged


@cache
def _waiting_round_s(name: str) -> float:
    """Return the mean seconds of a round that waits for all, over 300 rounds."""
    job = make_job(METHODS["waiting"], SETTINGS[name], None)
    count = len(job.workers)
    delays = DelaySource(job.options["delays"], count, seed=99)
    clock = IndependentRounds(delays, None, np.ones(count, dtype=bool), np.ones(1), Load.plain(count))
    return [clock.close(step).closed_at_s for step in range(300)][-1] / 300
