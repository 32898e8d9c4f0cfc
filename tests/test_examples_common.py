"""What the examples share: delays, journals, checkpoints, ways to communicate, the command line, the closing report."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from common import closing, command, curve
from common.delays import PROMPT_WAIT_S, Delays
from common.journal import Journal, Tail
from common.launcher import JobError
from common.result import JobResult, RankResult, ring_bytes, waiting_s
from common.settings import BatchSize, EvalEvery, LearningRate, Out, Settings, SlowShiftS, SlowWaitS, Steps
from common.stretch import Stretch
from common.ways import TITLES, Way
from helpers.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from typer import Option
from typer.testing import CliRunner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """An example's settings."""

    steps: Steps = 10
    eval_every: EvalEvery = 5
    batch_size: BatchSize = 3
    lr: LearningRate = 0.5
    slow_shift_s: SlowShiftS = 0.1
    slow_wait_s: SlowWaitS = 0.5
    out: Out = Path("demo/test")
    kind: Annotated[Literal["a", "b"], Option(help="Of something.")] = "a"

    QUICK = {"steps": 2, "eval_every": 1}  # noqa: RUF012


# ---------------------------------------------------------------------------------------------- delays
def test_one_worker_is_slow_and_the_others_almost_never_wait() -> None:
    delays = Delays.one_slow(3, slow_worker=1, shift_s=0.2, wait_s=0.5, seed=7)
    drawn = np.array([[delays.seconds(worker, step) for step in range(2000)] for worker in range(3)])
    assert drawn[1].min() >= 0.2
    # Means of 2,000 draws; four standard errors of an exponential mean.
    assert drawn.mean(axis=1) == pytest.approx([PROMPT_WAIT_S, 0.7, PROMPT_WAIT_S], abs=4 * 0.5 / 2000**0.5)
    assert str(delays) == "0.00 + Exp(0.01), 0.20 + Exp(0.50), 0.00 + Exp(0.01)"


def test_without_a_slow_worker_nobody_is_slow() -> None:
    assert Delays.one_slow(4, slow_worker=-1, shift_s=0.2, wait_s=0.5).shift_s == (0.0,) * 4


def test_the_deadline_follows_the_usual_step_unless_one_is_chosen() -> None:
    assert Options().coding(0.4)["deadline_s"] == pytest.approx(0.6)
    assert Options(deadline_s=0.25).coding(0.4)["deadline_s"] == 0.25
    assert Options(deadline_s=0.0).coding(0.4)["deadline_s"] is None
    late = Options().coding(0.4)["straggle_probs"]
    assert late == pytest.approx(Options().delays.missed_rounds(0.6, 0.4).tolist())
    assert max(late[:3]) < 1e-6 < 0.3 < late[3]


# ---------------------------------------------------------------------------------- journal and result
def test_a_resumed_journal_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = Journal(tmp_path, 0)
    for step in (1, 2, 4, 5):
        first.begin()
        first.write(step, 1.0)
    resumed = Journal(tmp_path, 0, step=4, elapsed_s=100.0)
    assert (resumed.step, resumed.computed) == (4, 3)
    assert resumed.elapsed_s >= 100.0
    resumed.begin()
    resumed.write(6, 0.5)
    records = Tail(tmp_path / "rank0.jsonl").records()
    assert [record["step"] for record in records] == [1, 2, 4, 6]
    assert records[-1]["replayed"] == 1
    assert records[-1]["time_s"] >= 100.0


def test_waiting_counts_the_slowest_worker_of_each_step() -> None:
    always = {1: 1.0, 2: 5.0, 3: 1.0}
    seldom = {2: 3.0}  # 3.0 is its mean, so steps 1 and 3 count with it
    assert waiting_s([always, seldom], range(1, 4)) == pytest.approx(3.0 + 5.0 + 3.0)
    assert waiting_s([{}, {}], range(1, 4)) == 0.0


def a_result(job: str, *, waiting: float | None, hashes: list[str]) -> JobResult:
    ranks = [
        RankResult(
            wall_s=20.0,
            steps=100,
            computed_steps=100 - 60 * k,
            bytes_sent_per_step=2**19,
            parameter_hash=text,
            missed=0.6 * k,
            bytes_received_per_step=2**20,
        )
        for k, text in enumerate(hashes)
    ]
    return JobResult(
        job=job,
        numel=2**20,
        ranks=ranks,
        contributions=[1.0, 0.4],
        plan="Plan(...)" if waiting else "",
        deadline_s=0.25 if waiting else None,
        waiting_s=waiting,
        metrics={"loss": 1.5, "top-1 accuracy": 0.75},
    )


def test_the_closing_report_says_what_the_result_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result = a_result("qgc", waiting=80.0, hashes=["aa", "aa"])
    result.save(tmp_path)
    assert JobResult.load(tmp_path) == result
    closing.show(result, Console(width=200))
    printed = capsys.readouterr().out
    for text in (
        "Plan(...)\nSteps close after 0.25 s.",
        "60%",
        "0.50 MiB, 0.125 of the gradient in fp32 (4.00 MiB)",
        "20.0 s, 0.200 s per step; 60.0 s saved against waiting",
        "loss 1.500, top-1 accuracy 0.750",
        "aa, equal",
    ):
        assert text in printed
    assert "every step waited" in "\n".join(closing.summary(a_result("ddp", waiting=None, hashes=["aa", "aa"])))
    assert "DIFFER: aa bb" in "\n".join(closing.summary(a_result("qgc", waiting=80.0, hashes=["aa", "bb"])))
    assert "10.0 s lost" in "\n".join(closing.summary(a_result("qgc", waiting=10.0, hashes=["aa", "aa"])))


def test_a_comparison_has_a_row_for_every_job(tmp_path: Path) -> None:
    ours = a_result("qgc", waiting=80.0, hashes=["a", "a"])
    results = {"DDP": a_result("ddp", waiting=None, hashes=["a", "a"]), "ours": ours}
    closing.write_csv(results, tmp_path / "comparison.csv")
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == ["DDP", "ours"]
    assert float(rows[1]["step_s"]) == 0.2
    assert float(rows[1]["top-1 accuracy"]) == 0.75
    assert closing.comparison(results).row_count == len(closing.comparison_rows(list(results.values())))


def test_curves_are_read_as_they_were_written_and_drawn(tmp_path: Path) -> None:
    rows = [{"step": 4.0, "time_s": 1.5, "loss": 2.0}, {"step": 8.0, "time_s": 3.0, "loss": 1.0}]
    curve.write(rows, tmp_path)
    assert curve.read(tmp_path) == rows
    curve.draw({"one": rows, "two": rows}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------- command line
def invoke(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, rank: bool = True) -> tuple[Any, list[Options]]:
    trained: list[Options] = []
    if rank:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "6")
    app = command.build(Options, trained.append, "script.py", "Train something.")
    return CliRunner().invoke(app, arguments), trained


def test_settings_survive_the_way_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Options(
        way="powersgd", steps=15, kind="b", slow_worker=-1, bits=3.5, resume=True, out=Path("x"), slow_wait_s=0.25
    )
    outcome, trained = invoke(settings.arguments(), monkeypatch)
    assert outcome.exit_code == 0, outcome.output
    assert trained == [dataclasses.replace(settings, workers=6)]  # as many as torchrun has started


def test_quick_shortens_the_job_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (settings,) = invoke(["--quick"], monkeypatch)
    assert (settings.steps, settings.eval_every) == (2, 1)
    _, (again,) = invoke(settings.arguments(), monkeypatch)
    assert again == settings


def test_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, trained = invoke(["--way", "horovod"], monkeypatch)
    assert outcome.exit_code == 2
    assert trained == []


def test_several_ways_are_for_the_script_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, trained = invoke(["--way", "ddp", "--way", "qgc"], monkeypatch)
    assert outcome.exit_code == 2
    assert trained == []


def test_a_way_that_fails_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(words: list[str], folder: Path, **_: Any) -> None:
        way = words[words.index("--way") + 1]
        if way == "bf16":
            raise JobError("job bf16 ended with code 1")
        folder.mkdir(parents=True)
        a_result(way, waiting=None, hashes=["aa", "aa"]).save(folder)
        curve.write([{"step": 5.0, "time_s": 1.5, "loss": 2.0}], folder)

    monkeypatch.setattr(command, "launch", launch)
    words = [word for way in ("ddp", "bf16", "powersgd") for word in ("--way", way)]
    outcome, _ = invoke([*words, "--out", str(tmp_path)], monkeypatch, rank=False)
    assert outcome.exit_code == 1
    assert "job bf16 ended with code 1" in outcome.output
    assert "0.75" in outcome.output
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 3


# ------------------------------------------------------------------------------------------- four ways
def one_step(rank: int, name: str) -> list[float]:
    """Make one step of gradient descent on a loss whose gradient is the rank's number plus one."""
    model = torch.nn.Linear(8, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    way = Way(name, model, **({"bits_per_coordinate": 32} if name == "qgc" else {}))
    way.bind(torch.optim.SGD(model.parameters(), lr=1.0))
    model(torch.full((1, 8), rank + 1.0)).sum().backward()
    way.update()
    way.close()
    assert name == "qgc" or way.bytes_per_step == ring_bytes(
        8, workers=2, bytes_per_coordinate=2.0 if name == "bf16" else 4.0
    )
    return model.module.weight[0].tolist()


@pytest.mark.parametrize("name", TITLES)
def test_every_way_averages_the_gradients(name: str) -> None:
    assert run_ranks(one_step, name, ranks=2) == [pytest.approx([-1.5] * 8)] * 2  # bf16 has 1.5 exactly


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of ddp, bf16, powersgd, qgc, got 'horovod'"):
        Way("horovod", None)  # type: ignore[arg-type]


def several_buckets(rank: int, name: str) -> float:
    """Train on more than one bucket, past the hook's first plain steps; return the last loss."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(300, 300), torch.nn.Tanh())]
    model = DistributedDataParallel(torch.nn.Sequential(*layers), bucket_cap_mb=0.2)
    way = Way(name, model)
    way.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(16):
        loss = model(torch.randn(4, 300)).square().mean()
        loss.backward()
        way.update()
    assert way.bytes_per_step < 0.2 * 4 * 4 * 300 * 301
    return float(loss)


def test_power_sgd_takes_several_buckets_on_gloo() -> None:
    assert max(run_ranks(several_buckets, "powersgd")) < 1.0


# ------------------------------------------------------------------------------------------- stretches
def test_stretches_take_every_sample_once_per_epoch() -> None:
    stretch = Stretch(list(range(100, 117)), 12, seed=3)  # type: ignore[arg-type]
    samples: list[int] = []
    for number in range(5):
        stretch.move(number)
        assert len(stretch) == 12
        samples += [stretch[index] for index in range(12)]
    for epoch in range(3):
        assert sorted(samples[17 * epoch : 17 * (epoch + 1)]) == list(range(100, 117))
    assert samples[:17] != samples[17:34]


def test_steps_that_would_not_be_evaluated_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of --eval-every"):
        Options(steps=10, eval_every=4)
