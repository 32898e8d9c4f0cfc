"""`qgc simulate`: what it prints and saves, and what it says about files that it cannot read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulation.tasks import least_squares, text
from test_cli import qgc, refused

from torch_qgc import schemes
from torch_qgc.cli.experiment import read_experiment
from torch_qgc.ddp.settings import UNKNOWN_LATE
from torch_qgc.planner import Plan
from torch_qgc.schemes import ErrorFeedback
from torch_qgc.simulator import IDEAL, Change, Machines, Task, load_traces
from torch_qgc.simulator.coding import plans_of

EXAMPLE = Path(__file__).parent.parent / "examples" / "simulation"

CONFIG = """
task = "simulation.tasks:least_squares"
deadline_s = 2.0
steps = 12
lr = 0.05
runs = 2
task_options = {samples = 60, features = 20}

[delays]
straggle_probs = [0.05, 0.1, 0.3]

[schemes.ideal]
[schemes.qgc]
norm = "l2"
[schemes."with memory"]
scheme = "is_sgd"
error_feedback = "acknowledged"
"""


def written(folder: Path, text_: str = CONFIG, name: str = "config.toml") -> str:
    path = folder / name
    path.write_text(text_)
    return str(path)


def own_task(*, size: int = 4) -> Task:
    """A task of the user's, by its import path."""
    made = least_squares(samples=30, features=size)
    return Task(model=made.model, loss=made.loss, dataset=made.dataset)


def test_simulate_prints_a_row_per_scheme_and_saves_traces_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "traces.npz", tmp_path / "curves.png"
    result = qgc("simulate", "--config", written(tmp_path), "--out", str(out), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    for word in ("ideal", "qgc", "with memory", "2 runs of 12 steps, 3 workers", "excess"):
        assert word in result.stdout
    traces = load_traces(out)
    assert list(traces) == ["ideal", "qgc", "with memory"]
    assert traces["qgc"].loss.shape == (2, 12)
    assert np.all(traces["ideal"].evaluations["excess"][:, -1] < traces["ideal"].evaluations["excess"][:, 0])
    assert plot.stat().st_size > 10_000


def test_simulate_in_json_with_fewer_steps(tmp_path: Path) -> None:
    result = qgc("simulate", "--config", written(tmp_path), "--steps", "3", "--runs", "1", "--json")
    rows = json.loads(result.stdout)
    assert rows["ideal"]["in time"] == 1.0
    assert rows["qgc"]["time, s"] <= 6.0
    assert rows["qgc"]["error"] > rows["ideal"]["error"]


def test_a_file_says_the_same_in_json(tmp_path: Path) -> None:
    content = {
        "task": "test_simulator_cli:own_task",
        "task_options": {"size": 5},
        "rule": {"deadline_s": 2.0, "late": "drop"},
        "steps": 3,
        "delays": {"mu": [1.0, 2.0], "shift": 0.5},
        "schemes": {"a": {"scheme": "qgc", "bits_per_coordinate": 5}, "b": {"scheme": "ideal"}},
    }
    experiment = read_experiment(Path(written(tmp_path, json.dumps(content), "config.json")))
    assert experiment.rule is not None
    assert (experiment.deadline_s, experiment.rule.late) == (None, "drop")
    late = np.exp([-1.5, -3.0])  # mu (deadline - shift)
    assert experiment.schemes == {"a": schemes.qgc(late, bits_per_coordinate=5), "b": IDEAL}
    assert sum(p.numel() for p in experiment.model.parameters()) == 5


def test_a_job_that_measures_its_machines_comes_from_a_table(tmp_path: Path) -> None:
    """It is told nothing of them: all alike, as in `QGCState`."""
    machines = "machines = {workers = 3, batch_s = [1.0, 1.0, 4.0]}"
    changed = CONFIG.replace("straggle_probs = [0.05, 0.1, 0.3]", machines).split('[schemes."with memory"]')[0]
    changed = changed.replace("deadline_s = 2.0", 'rule = {deadline_s = "auto"}\nbatch_size = 8\nreplan_every = 15')
    config = written(tmp_path, changed)
    experiment = read_experiment(Path(config))
    assert (experiment.rule.deadline_s, experiment.replans) == ("auto", 15)
    plan = experiment.schemes["qgc"]
    assert isinstance(plan, Plan)
    np.testing.assert_array_equal(plan.straggle_probs, np.full(3, UNKNOWN_LATE))
    rows = json.loads(qgc("simulate", "--config", config, "--steps", "60", "--runs", "1", "--json").stdout)
    assert rows["qgc"]["time, s"] < 0.6 * rows["ideal"]["time, s"]  # batches by speed


def test_the_manual_shows_the_example() -> None:
    manual = Path(__file__).parent.parent / "docs" / "simulator.md"
    (shown,) = re.findall(r"```toml\n(.*?)```", manual.read_text(), re.DOTALL)
    assert (EXAMPLE / "text.toml").read_text().endswith(shown)


def test_the_example_runs_in_its_folder() -> None:
    """In a process of its own: the console script does not put the current directory on sys.path by itself."""
    program = "from torch_qgc.cli import main; main()"
    command = [sys.executable, "-P", "-c", program] if sys.version_info >= (3, 11) else [sys.executable, "-c", program]
    command += ["simulate", "--config", "text.toml", "--steps", "2", "--runs", "1", "--json"]
    rows = json.loads(subprocess.run(command, cwd=EXAMPLE, capture_output=True, check=True).stdout)
    assert list(rows) == ["ideal", "qgc", "sgc, L2 scale", "is_sgd with memory"]


def test_a_task_comes_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task_of_mine.py").write_text("from test_simulator_cli import own_task\n\nnumber = 3\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    mine = CONFIG.replace("simulation.tasks:least_squares", "task_of_mine:own_task")
    config = written(tmp_path, mine.replace("samples = 60, features = 20", "size = 4"))
    assert read_experiment(Path(config)).evaluate is None
    refused(qgc("simulate", "--config", written(tmp_path, mine.replace(":own_task", ":number"))), "to be a function")


def test_recorded_delays_come_from_a_csv_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "delays.csv").write_text("1.0,2.5\n1.5,3.0\n")
    changed = CONFIG.replace("straggle_probs = [0.05, 0.1, 0.3]", 'csv = "delays.csv"')
    experiment = read_experiment(Path(written(tmp_path, changed)))
    plan = experiment.schemes["qgc"]
    np.testing.assert_allclose(plan.straggle_probs, [0.5 / 3, 2.5 / 3])  # one cautious pseudo-round
    memory = experiment.schemes["with memory"]
    assert isinstance(memory, ErrorFeedback)
    assert memory.acknowledged


MACHINES = """
[delays.machines]
workers = 3
batch_s = [1.0, 1.0, 3.0]
up_s = [0.1, 0.1, 3.0]
changes = [{of = "batch_s", factor = 5.0, workers = [1], start = 6}]
"""


def test_machines_come_from_a_table(tmp_path: Path) -> None:
    """Who is late follows from the batches and from each scheme's own bits."""
    changed = CONFIG.replace("[delays]\nstraggle_probs = [0.05, 0.1, 0.3]", MACHINES).replace(
        "steps = 12", "steps = 12\nbatch_size = 4\ndownlink_bits = 8"
    )
    changed = changed.replace('norm = "l2"', 'norm = "l2"\nbatches = [1.25, 1.25, 0.5]')
    changed = changed.replace('scheme = "is_sgd"\nerror', 'scheme = "is_sgd"\nbits_per_coordinate = 16\nerror')
    experiment = read_experiment(Path(written(tmp_path, changed)))
    assert isinstance(experiment.delays, Machines)
    assert experiment.delays.changes == (Change(of="batch_s", factor=5.0, workers=(1,), start=6),)
    assert experiment.downlink_bits == 8
    plans = {name: plans_of(experiment.schemes[name])[0] for name in ("qgc", "with memory")}
    few, many = (plan.straggle_probs for plan in plans.values())
    np.testing.assert_allclose(few, [0.5 / 1001, 994.5 / 1001, 0.5 / 1001])  # 3 * 0.5 + 3 * 4 / 32 < 2
    np.testing.assert_allclose(many, [0.5 / 1001, 994.5 / 1001, 1000.5 / 1001])  # 3 * 0.5 + 3 * 16 / 32 > 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 12", "steps = 'many'", "Expected `int`, got `str` - at `$.steps`"),
        ("steps = 12", "", "missing required field `steps`"),
        ("steps = 12", "steps = 12\nstep = 3", "unknown field `step`"),
        ("steps = 12", "steps =", "docs/simulator.md"),
        ("steps = 12", "steps = 0", "steps: expected at least 1"),
        ("[schemes.qgc]", "[schemes.qcg]", "schemes.qcg: expected scheme = one of ideal, qgc"),
        ("[schemes.qgc]", "[schemes.sgc]\nreplica = 2", "schemes.sgc: "),
        ("[schemes.qgc]", "[schemes.sgc]\nreplicas = 9", "schemes.sgc: replicas: expected"),
        ("[schemes.ideal]", "[schemes.ideal]\nbits_per_coordinate = 3", "expected no options"),
        ('"acknowledged"', '"always"', "error_feedback"),
        ('"is_sgd"', '"block_coordinate"', "around one plan"),
        ("straggle_probs", "probs", "unknown field `probs`"),
        ("straggle_probs = [0.05, 0.1, 0.3]", "mu = 1.0", "add workers"),
        ("straggle_probs = [0.05, 0.1, 0.3]", "mu = [1.0, 2.0]\nworkers = 3", "one number of workers, got [2, 3]"),
        ("straggle_probs = [0.05, 0.1, 0.3]", "", "one of mu, straggle_probs, csv and machines"),
        ("0.05, 0.1, 0.3", "0.05, 0.1, 1.0", "numbers in (0, 1)"),
        ("straggle_probs = [0.05, 0.1, 0.3]", "machines = {workers = 3, speed = 2.0}", "unknown field `speed`"),
        ("straggle_probs = [0.05, 0.1, 0.3]", "machines = {workers = 3, jitter = -1.0}", "machines: jitter: expected"),
        ('task = "simulation.tasks:least_squares"', "", "missing required field `task`"),
        ("tasks:least_squares", "tasks:most_squares", "no attribute 'most_squares'): write a function"),
        ("simulation.tasks:", "no_such_module:", "task: expected 'module:function' with a module that can be imported"),
        ("simulation.tasks:", "", "task: expected 'module:function'"),
        ("simulation.tasks:least_squares", "json:dumps", "task_options: json:dumps"),
        ("features = 20", "feature = 20", "task_options: simulation.tasks:least_squares"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CONFIG
    refused(qgc("simulate", "--config", written(tmp_path, CONFIG.replace(old, new))), message)


def test_other_files_are_refused(tmp_path: Path) -> None:
    refused(qgc("simulate", "--config", written(tmp_path, name="config.yaml")), ".toml or .json")
    missing = qgc("simulate", "--config", str(tmp_path / "none.toml"))
    assert missing.exit_code == 1
    assert "No such file" in missing.stderr


# ------------------------------------------------------------------------------------------------- tasks
@pytest.mark.parametrize("options", [{"model": "logistic"}, {"model": "mlp", "context": 3}])
def test_text_is_learnt(options: dict[str, Any]) -> None:
    task = text(samples=4000, **options)
    model, before = task.model, task.evaluate(task.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        task.loss(model, task.dataset.tensors).backward()
        optimizer.step()
    after = task.evaluate(model)
    assert after["validation_loss"] < before["validation_loss"] - 1.0
    assert after["accuracy"] > 0.25


def test_least_squares_knows_its_optimum() -> None:
    task = least_squares(samples=50, features=5)
    inputs, targets = task.dataset.tensors
    with torch.no_grad():
        task.model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)
    assert task.evaluate(task.model)["excess"] == pytest.approx(0.0, abs=1e-6)
