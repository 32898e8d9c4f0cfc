"""What the examples share: settings, delays, files that survive a kill, torch's hooks, the command line, results."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from common import command, hooks, result
from common.delays import PROMPT_WAIT_S
from common.files import replacing
from common.job import Job
from common.launcher import JobError
from common.result import Result
from common.settings import Settings, warmup_cosine
from helpers.ranks import CONTEXT, run_ranks
from torch.nn.parallel import DistributedDataParallel
from typer import Option
from typer.testing import CliRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """An example's settings."""

    kind: Annotated[Literal["a", "b"], Option(help="Of something.")] = "a"


DEFAULTS = Options(
    steps=10, eval_every=5, batch_size=3, lr=0.5, slow_shift_s=0.1, slow_wait_s=0.5, out=Path("demo/test")
)


# ---------------------------------------------------------------------------------------------- delays
def test_one_worker_is_slow_and_the_others_almost_never_wait() -> None:
    delays = dataclasses.replace(DEFAULTS, workers=3, slow_worker=1, slow_shift_s=0.2, seed=7).delays
    drawn = np.array([[delays.seconds(worker, step) for step in range(2000)] for worker in range(3)])
    assert drawn[1].min() >= 0.2
    # Means of 2,000 draws; four standard errors of an exponential mean.
    assert drawn.mean(axis=1) == pytest.approx([PROMPT_WAIT_S, 0.7, PROMPT_WAIT_S], abs=4 * 0.5 / 2000**0.5)


def test_without_a_slow_worker_nobody_is_slow() -> None:
    assert dataclasses.replace(DEFAULTS, slow_worker=-1).delays.shift_s == (0.0,) * 4


def test_the_deadline_follows_the_usual_step_unless_one_is_chosen() -> None:
    assert DEFAULTS.deadline(0.4) == pytest.approx(0.6)
    assert dataclasses.replace(DEFAULTS, deadline_s=0.25).deadline(0.4) == 0.25
    assert dataclasses.replace(DEFAULTS, deadline_s=0.0).deadline(0.4) is None


def test_who_is_delayed_by_more_than_the_deadline_leaves_misses_rounds_and_nobody_without_one() -> None:
    late = DEFAULTS.delays.missed_rounds(0.6, 0.4)
    assert max(late[:3]) < 1e-6 < 0.3 < late[3]
    assert DEFAULTS.delays.missed_rounds(None, 0.4).tolist() == [0.0] * 4


def test_the_learning_rate_warms_up_and_ends_near_zero() -> None:
    factor = warmup_cosine(100, warmup_fraction=0.1)
    values = [factor(step) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert np.argmax(values) == 9
    assert values[9:] == sorted(values[9:], reverse=True)
    assert 0 < values[-1] < 0.001


# ----------------------------------------------------------------------------------------------- files
def test_a_file_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with replacing(path) as partial:
        partial.write_text("old")

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def write_for_ever(path: Path) -> None:
    """Replace a file by longer and longer ones, written in pieces."""
    for count in range(1, 1 << 30):
        with replacing(path) as partial, partial.open("w", buffering=1) as file:
            file.write(f"[{count}")
            for number in range(count % 100):
                file.write(f",\n{number}")
            file.write("]")


def test_a_file_that_is_replaced_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for run in range(10):
        writer = CONTEXT.Process(target=write_for_ever, args=(path,), daemon=True)
        writer.start()
        while not path.exists():
            time.sleep(0.001)
        for _ in range(50 + 7 * run):
            count, *numbers = json.loads(path.read_text())  # whoever reads meanwhile
            assert numbers == list(range(count % 100))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------- result
def a_result(title: str, *, hashes: tuple[str, ...] = ("aa", "aa"), plan: str = "") -> Result:
    ranks = [
        {"late": 0.6 * k, "computed": 1 - 0.6 * k, "sent": 2.0**19, "received": 2.0**20, "hash": text}
        for k, text in enumerate(hashes)
    ]
    curve = [{"step": 50, "time_s": 10.0, "loss": 2.5}, {"step": 100, "time_s": 20.0, "loss": 1.5}]
    return Result(title=title, numel=2**20, curve=curve, used=[1.0, 0.4], ranks=ranks, plan=plan)


def test_a_table_says_what_the_results_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    ours = a_result("ours", plan="Plan(...)\nSteps close after 0.25 s.")
    ours.save(tmp_path)
    assert Result.load(tmp_path) == ours
    results = [a_result("DDP", hashes=("aa", "bb")), ours]
    rows = dict(result.rows(results))
    assert rows["wall time"] == ["20 s"] * 2
    assert rows["time per step"] == ["200 ms"] * 2
    assert rows["steps late, by worker"] == ["0 60 %"] * 2
    assert rows["steps computed, by worker"] == ["100 40 %"] * 2
    assert rows["bytes sent per worker and step"] == ["0.50 MiB (0.125 of fp32)"] * 2
    assert rows["loss"] == ["1.500"] * 2
    assert rows["hash of the parameters, one if equal"] == ["aa bb", "aa"]
    result.show(results, Console(width=200))
    printed = capsys.readouterr().out
    assert "ours: Plan(...)\nSteps close after 0.25 s." in printed
    assert all(value in printed for values in rows.values() for value in values)


def test_the_parameter_hash_sees_every_bit() -> None:
    model = torch.nn.Linear(3, 3)
    before = result.parameter_hash(model)
    assert result.parameter_hash(model) == before
    with torch.no_grad():
        model.weight[1, 1] = torch.nextafter(model.weight[1, 1], torch.tensor(9.0))
    assert result.parameter_hash(model) != before


# ---------------------------------------------------------------------------------------- command line
def invoke(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, rank: bool = True) -> tuple[Any, list[Options]]:
    trained: list[Options] = []
    if rank:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "6")
    app = command.build(DEFAULTS, {"steps": 2, "eval_every": 1}, trained.append, "script.py", "Train something.")
    return CliRunner().invoke(app, arguments), trained


def test_settings_survive_the_way_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = dict(way="powersgd", steps=15, kind="b", slow_worker=-1, bits=3.5, resume=True, slow_wait_s=0.25)
    settings = dataclasses.replace(DEFAULTS, out=Path("x"), **changes)
    outcome, trained = invoke(settings.arguments(), monkeypatch)
    assert outcome.exit_code == 0, outcome.output
    assert trained == [dataclasses.replace(settings, workers=6)]  # as many as torchrun has started


def test_quick_shortens_the_job_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (settings,) = invoke(["--quick"], monkeypatch)
    assert (settings.steps, settings.eval_every) == (2, 1)
    _, (again,) = invoke(settings.arguments(), monkeypatch)
    assert again == settings


@pytest.mark.parametrize("arguments", [["--way", "horovod"], ["--way", "ddp", "--way", "qgc"], ["--steps", "7"]])
def test_what_a_rank_cannot_do_is_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, trained = invoke(arguments, monkeypatch)
    assert outcome.exit_code == 2
    assert trained == []


def test_a_way_that_fails_does_not_hide_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(words: list[str], folder: Path, **_: Any) -> None:
        way = words[words.index("--way") + 1]
        if way == "bf16":
            raise JobError("job bf16 ended with code 1")
        a_result(way).save(folder)

    monkeypatch.setattr(command, "launch", launch)
    words = [word for way in ("ddp", "bf16", "powersgd") for word in ("--way", way)]
    outcome, _ = invoke([*words, "--out", str(tmp_path)], monkeypatch, rank=False)
    assert outcome.exit_code == 1
    assert "job bf16 ended with code 1" in outcome.output
    assert "1.500" in outcome.output


# ---------------------------------------------------------------------------------------- torch's hooks
def one_step(rank: int, name: str) -> tuple[list[float], float]:
    """Make one step of gradient descent on a loss whose gradient is the rank's number plus one."""
    model = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    part_of_fp32 = hooks.attach(name, model)
    model(torch.full((1, 8), rank + 1.0)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return model.module.weight[0].tolist(), part_of_fp32()


@pytest.mark.parametrize(("name", "part"), [("ddp", 1.0), ("bf16", 0.5), ("powersgd", 1.0)])
def test_every_hook_averages_the_gradients(name: str, part: float) -> None:
    assert run_ranks(one_step, name, ranks=2) == [(pytest.approx([-1.5] * 8), part)] * 2  # bf16 has 1.5 exactly


def several_buckets(rank: int) -> float:
    """Train on more than one bucket, past the hook's first plain steps; return the last loss."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(300, 300), torch.nn.Tanh())]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.2)
    part_of_fp32 = hooks.attach("powersgd", model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(16):
        loss = model(torch.randn(4, 300)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert part_of_fp32() < 0.2
    return float(loss)


def test_power_sgd_takes_several_buckets_on_gloo() -> None:
    assert max(run_ranks(several_buckets)) < 1.0


# ------------------------------------------------------------------------------------------- stretches
def test_stretches_take_every_sample_once_per_epoch() -> None:
    job = Job.__new__(Job)
    job.s, job.workers = dataclasses.replace(DEFAULTS, eval_every=2, steps=10, batch_size=3), 2
    samples = [index for number in range(5) for index in job.stretch(range(17), number)]  # type: ignore[arg-type]
    assert len(samples) == 5 * 12
    for epoch in range(3):
        assert sorted(samples[17 * epoch : 17 * (epoch + 1)]) == list(range(17))
    assert samples[:17] != samples[17:34]


def test_steps_that_would_not_be_evaluated_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of --eval-every"):
        dataclasses.replace(DEFAULTS, steps=10, eval_every=4)
