"""The sweep over levers: its jobs can train, its file survives an interruption, and its figures are what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from lever_runs.figures import best_lr, figures, time_to
from lever_runs.methods import BATCH_SIZE, METHODS, make_job
from lever_runs.rows import Rows
from lever_runs.settings import CLASSES, SETTINGS, own_samples, slow_classes
from lever_runs.training import SEEN, Outcome, Run

from torch_qgc.planner.batches import apportion

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 40))
RUN = Run("comp5", "own", "fold", "adam", "mlp", "constant", 200, 0.004, 3)


def outcome(*loss: float, slow: float = 0.5) -> Outcome:
    """A run whose loss was seen at the last of SEEN only, or at all of them."""
    return Outcome(7, [*[math.inf] * (len(SEEN) - len(loss)), *loss], 0.75, slow)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_makes_a_job_of_every_setting(name: str) -> None:
    """A round has the samples of K mean batches, at the rates that are expected; own data stay where they are."""
    setting = SETTINGS[name]
    parts = own_samples(setting, LABELS, seed=0)
    assert len(parts) == setting.machines.workers
    assert set(slow_classes(setting, LABELS, parts)) < set(range(CLASSES))
    for method in METHODS.values():
        for held in (parts, None):
            job = make_job(method, setting, held)
            if method.late != "ignore":
                job.plan.check_trainable()
            assert job.options["delays"].workers == job.plan.num_workers == len(job.workers)
            samples = apportion(job.plan.batches, BATCH_SIZE) @ (1.0 - job.plan.straggle_probs)
            assert samples <= BATCH_SIZE * setting.machines.workers * 1.05
            if held is not None:
                np.testing.assert_array_equal(np.asarray(job.plan.weights) > 0, np.eye(len(job.workers)) > 0)


def test_a_sweep_goes_on_where_a_row_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "levers.csv"
    other = Run("even", "shuffled", "waiting, batches", "momentum", "cnn", "cosine", 200, 0.1, 0)
    rows = Rows(path)
    rows.add(RUN, outcome(0.5), 1.0, "2 cores, x86", "python levers.py")
    rows.add(other, outcome(0.25, slow=math.nan), 2.0, "2 cores, x86", "python levers.py")
    whole = path.read_bytes()
    assert set(Rows(path).outcomes) == {RUN, other}
    assert Rows(path).outcomes[RUN] == outcome(0.5)
    for cut in (1, 20, 60):
        path.write_bytes(whole[:-cut])
        again = Rows(path)
        assert set(again.outcomes) == {RUN}
        again.add(other, outcome(0.25, slow=math.nan), 2.0, "2 cores, x86", "python levers.py")
        assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_the_time_to_a_loss_lies_between_two_looks() -> None:
    falling = np.linspace(2.0, 0.5, len(SEEN)).tolist()
    assert time_to(0.5, outcome(*falling)) == pytest.approx(1.0)
    assert time_to(0.4, outcome(*falling)) == math.inf
    assert time_to(3.0, outcome(*falling)) == pytest.approx(SEEN[0])
    between = (falling[3] + falling[4]) / 2
    assert time_to(between, outcome(*falling)) == pytest.approx(math.sqrt(SEEN[3] * SEEN[4]))
    assert time_to(falling[-1], outcome(*falling[-1:])) == pytest.approx(1.0)  # it had diverged before


def test_figures_compare_within_a_seed() -> None:
    """Seeds differ by far more than methods do."""
    seeds = range(5)
    waiting = {s: outcome(10.0**s) for s in seeds}
    method = {s: outcome(0.8 * 10.0**s * (1.01 if s % 2 else 0.99), slow=0.7) for s in seeds}
    ignoring = {s: outcome(0.5 * 10.0**s) for s in seeds}
    found = figures(method, waiting, ignoring, optimizer="adam", lr=0.012)
    assert (found.reached, found.at_edge) == (1.0, False)
    assert found.loss[0] == pytest.approx(0.8, rel=0.01)
    assert found.loss[2] - found.loss[1] < 0.05
    assert found.slow_accuracy == pytest.approx((0.7, 0.0))
    assert found.against_best[0] == pytest.approx(1.6, rel=0.01)
    assert found.worse
    assert not figures(ignoring, waiting, ignoring, optimizer="adam", lr=0.004).worse


def test_the_best_learning_rate_has_the_least_mean_loss() -> None:
    tuned = {0.1: [outcome(1.0), outcome(3.0)], 0.2: [outcome(0.5), outcome(math.inf)], 0.3: [outcome(1.5)] * 2}
    assert best_lr(tuned) == 0.3
