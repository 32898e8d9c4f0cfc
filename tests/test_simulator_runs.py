"""Whole simulations: the same bits for the same seed, checkpoints, traces and their files, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.simulation import DEADLINE_S, FEATURES, delays_for, task
from test_schemes_codes import LATE

from torch_qgc import schemes
from torch_qgc.errors import ConfigError
from torch_qgc.planner import make_plan
from torch_qgc.planner.delays import ShiftedExponential
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import Trace, load_traces, save_traces, simulate


# ---------------------------------------------------------------------------------------- reproducibility
def experiment(**options: Any) -> dict[str, Trace]:
    """Three schemes with state of every kind: moments, memories, payloads under way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, loss, dataset = task()
        model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
    named: dict[str, Any] = {
        "two tracks": make_plan(LATE, second_track="ridge"),
        "sgc": schemes.sgc(LATE),
    }
    if "rule" not in options:
        options["deadline_s"] = DEADLINE_S
        named["feedback"] = schemes.error_feedback(schemes.is_sgd(LATE))
    common: dict[str, Any] = dict(
        delays=delays_for(LATE), steps=12, optimizer="adam", lr=0.01, batch_size=4, runs=2, seed=5,
        evaluate=lambda m: {"size": float(sum(p.abs().sum() for p in m.parameters()))}, evaluate_every=5,
    )  # fmt: skip
    return simulate(model, loss, dataset, named, **{**common, **options})


def assert_same(left: dict[str, Trace], right: dict[str, Trace]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert json.dumps(left[name].to_dict()) == json.dumps(right[name].to_dict()), name


FOLDING = ClosingRule(deadline_s=DEADLINE_S, warmup_steps=1, late="fold")


@pytest.mark.parametrize("options", [{}, {"rule": FOLDING}], ids=["independent rounds", "running job"])
def test_the_same_seed_gives_the_same_bits(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    once = experiment(**options)
    torch.manual_seed(2)  # the caller's random numbers play no part
    state = torch.get_rng_state()
    assert_same(once, experiment(**options))
    assert torch.equal(state, torch.get_rng_state())
    other = experiment(**options, seed=6)
    assert not np.array_equal(once["sgc"].loss, other["sgc"].loss)
    # A run is what its seed says, whichever call makes it.
    np.testing.assert_array_equal(once["sgc"].loss[1], other["sgc"].loss[0])


def test_processes_change_nothing() -> None:
    assert_same(experiment(), experiment(processes=2))


class Interrupted(Exception):
    """What stops a simulation in its tests."""


@pytest.mark.parametrize("options", [{}, {"rule": FOLDING}], ids=["independent rounds", "running job"])
def test_an_interrupted_simulation_goes_on_from_its_checkpoint(options: dict[str, Any], tmp_path: Path) -> None:
    calls = 0

    def evaluate(m: torch.nn.Module) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interrupted
        return {"size": float(sum(p.abs().sum() for p in m.parameters()))}

    with pytest.raises(Interrupted):
        experiment(**options, checkpoint=tmp_path, checkpoint_every=4, evaluate=evaluate)
    assert len(list(tmp_path.glob("*.pt"))) == 2  # one scheme is through, one is not
    resumed = experiment(**options, checkpoint=tmp_path, checkpoint_every=4, evaluate=evaluate)
    assert calls < 6 + 4 * 2 * len(resumed)  # what was done was not done again
    assert_same(experiment(**options), resumed)
    assert not list(tmp_path.glob("*.partial"))


def test_checkpoints_of_another_experiment_are_left_alone(tmp_path: Path) -> None:
    experiment(checkpoint=tmp_path, steps=3)
    assert_same(experiment(checkpoint=tmp_path, steps=3, momentum=0.0, lr=0.02), experiment(steps=3, lr=0.02))


# ------------------------------------------------------------------------------------------------ traces
def test_traces_survive_files(tmp_path: Path) -> None:
    traces = experiment(steps=4)
    save_traces(traces, tmp_path / "traces.npz")
    assert_same(traces, load_traces(tmp_path / "traces.npz"))
    save_traces(traces, tmp_path / "traces.json")
    read = json.loads((tmp_path / "traces.json").read_text())
    assert read["sgc"]["loss"] == traces["sgc"].loss.tolist()
    assert read["sgc"]["residual"][0] == [None] * 4  # not known with batches
    save_traces(traces, tmp_path / "traces.csv")
    lines = (tmp_path / "traces.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 4
    assert lines[0] == "scheme,seed,step,arrived,loss,residual,bits_sent,virtual_time_s,size"
    with pytest.raises(ConfigError, match=r"\.npz, \.json or \.csv"):
        save_traces(traces, tmp_path / "traces.txt")


def test_runs_of_several_calls_are_put_side_by_side() -> None:
    both = experiment(steps=4)["sgc"]
    one, two = (experiment(steps=4, runs=1, seed=seed)["sgc"] for seed in (5, 6))
    assert_same({"": both}, {"": Trace.concatenate([one, two])})
    with pytest.raises(ConfigError, match="different seeds"):
        Trace.concatenate([one, one])


def test_the_band_is_students_interval() -> None:
    from scipy import stats

    trace = experiment(steps=4, runs=3)["sgc"]
    mean, low, high = trace.band("loss", level=0.9)
    for step in range(4):
        values = trace.loss[:, step]
        expected = stats.t.interval(0.9, 2, loc=values.mean(), scale=stats.sem(values))
        assert (low[step], high[step]) == pytest.approx(expected)
        assert mean[step] == pytest.approx(values.mean())
    assert trace.band("size")[0].shape == (2,)


# --------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"runs": 0}, "runs: expected at least 1"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"deadline_s": -1.0}, "deadline_s: expected seconds > 0"),
        ({"rule": ClosingRule(deadline_s=1.0)}, "deadline_s or rule, got both"),
        ({"delays": np.ones((3, 4))}, r"shape \[rounds, 6\]"),
        ({"delays": ShiftedExponential(mu=[1.0, 2.0])}, "of one worker or of all 6"),
        ({"delays": np.array([[1.0, 1, 1, 1, 1, np.inf]]), "deadline_s": None}, "never comes"),
        ({"optimizer": "lion"}, "optimizer: expected 'sgd'"),
        ({"optimizer": "adam", "momentum": 0.9}, "'adam' without momentum"),
        ({"lr": None}, "lr: expected"),
        ({"sampling": "data"}, "sampling: expected"),
        ({"partitions": [[0], [1]]}, "expected 6 as in the plan"),
        ({"processes": 0}, "processes >= 1"),
        ({"batch_sise": 3}, "unexpected keyword argument 'batch_sise'"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options: dict[str, Any], message: str) -> None:
    model, loss, dataset = task()
    common: dict[str, Any] = dict(delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=3, lr=0.1)
    with pytest.raises((ConfigError, TypeError), match=message):
        simulate(model, loss, dataset, make_plan(LATE), **{**common, **options})


@pytest.mark.parametrize(
    ("schemes_", "options", "message"),
    [
        ({}, {}, "at least one"),
        ({"a": make_plan(LATE), "b": make_plan([0.1] * 3)}, {}, "same number of workers"),
        ({"a": "best"}, {}, "a plan or 'ideal'"),
        (schemes.block_coordinate(LATE), {"batch_size": 2}, "BlockPlan"),
        (schemes.ye_abbe(LATE), {"batch_size": 2}, "PartPlan"),
        (
            schemes.ye_abbe(LATE),
            {"deadline_s": None, "rule": ClosingRule(deadline_s=1.0)},
            "which no running job takes",
        ),
        (
            schemes.error_feedback(schemes.is_sgd(LATE)),
            {"deadline_s": None, "rule": ClosingRule(deadline_s=1.0)},
            "which no running job takes",
        ),
    ],
)
def test_schemes_that_do_not_fit_are_refused(schemes_: Any, options: dict[str, Any], message: str) -> None:
    model, loss, dataset = task()
    common: dict[str, Any] = dict(delays=delays_for(LATE), deadline_s=DEADLINE_S, steps=3, lr=0.1)
    with pytest.raises(ConfigError, match=message):
        simulate(model, loss, dataset, schemes_, **{**common, **options})
