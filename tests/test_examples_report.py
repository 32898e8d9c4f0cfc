"""The detection demo: its logs, its table and its jobs. What needs downloads is marked slow."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")

from common import journal, launcher, plots, result
from detection import report
from detection.settings import JOBS, SLOW_WORKER, VARIANTS, Settings
from helpers.example_ranks import EXAMPLES


def test_a_tail_returns_each_whole_line_once(tmp_path: Path) -> None:
    tail = journal.Tail(tmp_path / "rank0.jsonl")
    assert tail.records() == []
    with (tmp_path / "rank0.jsonl").open("w", buffering=1) as file:
        file.write('{"step": 1}\n{"st')
        file.flush()
        assert tail.records() == [{"step": 1}]
        file.write('ep": 2}\n')
        assert tail.records() == [{"step": 2}]
        assert tail.records() == []


def test_a_journal_counts_replayed_steps_and_keeps_models(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    log = journal.Journal(tmp_path, 0, every=4)
    for step in (1, 2, 5, 6, 9, 10):
        log.write(step, 1.0 / step, model)
    records = journal.Tail(tmp_path / "rank0.jsonl").records()
    assert [record["replayed"] for record in records] == [0, 0, 2, 0, 2, 0]
    assert log.computed == 6
    kept = list(journal.snapshots(tmp_path))
    assert [snapshot["step"] for snapshot in kept] == [5, 9]
    assert torch.equal(kept[0]["model"]["weight"], model.weight)


def test_the_parameter_hash_sees_every_bit() -> None:
    model = torch.nn.Linear(3, 3)
    before = journal.parameter_hash(model)
    assert journal.parameter_hash(model) == before
    with torch.no_grad():
        model.weight[1, 1] = torch.nextafter(model.weight[1, 1], torch.tensor(9.0))
    assert journal.parameter_hash(model) != before


def outcome(job: str, wall_s: float, hashes: list[str], computed: list[int]) -> report.Outcome:
    ranks = [
        result.RankResult(
            wall_s=wall_s, steps=100, computed_steps=count, bytes_sent_per_step=2**19, parameter_hash=text
        )
        for count, text in zip(computed, hashes)
    ]
    shares = [count / 100 for count in computed]
    curve = [(50, wall_s / 2, 4.0), (100, wall_s, 2.0)]
    return report.Outcome(
        result=result.JobResult(job=job, numel=2**18, ranks=ranks, contributions=shares),
        title=(JOBS | VARIANTS)[job].title,
        curve=curve,
        ap50=0.4,
        ap50_slow=0.25 if job == "qgc" else math.nan,
        loss_equal_time=report.at_time(curve, 20.0),
        ap50_equal_time=0.3,
    )


def test_the_report_says_what_the_logs_say(tmp_path: Path) -> None:
    ddp = outcome("ddp", 40.0, ["aa"] * 4, [100] * 4)
    qgc = outcome("qgc", 20.0, ["bb"] * 3 + ["cc"], [100, 100, 100, 35])
    qgc.result.save(tmp_path)
    assert result.JobResult.load(tmp_path) == qgc.result
    rows = dict(report.rows([ddp, qgc], ["8", "9"]))
    assert rows["wall time"] == ["40 s", "20 s"]
    assert rows["time per step"] == ["400 ms", "200 ms"]
    assert rows["steps computed, by worker"] == ["100 100 100 100 %", "100 100 100 35 %"]
    assert rows["bytes sent per worker and step"] == ["0.50 MiB (0.50 x fp32)"] * 2
    assert rows["validation loss at equal time"] == ["4.00", "2.00"]
    assert rows["AP50, slow worker's own (8, 9)"] == ["–", "0.250"]
    assert rows["parameters of all workers"] == ["aa, equal", "DIFFER: bb cc"]
    text = report.markdown([ddp, qgc], Settings(data=tmp_path, folder=tmp_path), ["8", "9"])
    for name, values in rows.items():
        assert f"| {name} | " + " | ".join(values) + " |" in text
    assert report.table([ddp, qgc], ["8", "9"]).row_count == len(rows)


def test_the_loss_before_the_first_model_is_unknown() -> None:
    assert math.isnan(report.at_time([(10, 5.0, 3.0), (20, 10.0, 2.0)], 1.0))
    assert report.at_time([(10, 5.0, 3.0), (20, 10.0, 2.0)], 7.5) == 2.5


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    plots.curves({"loss": {"DDP": outcome("ddp", 40.0, ["a"] * 4, [100] * 4).curve}}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_job_names_its_first_error_and_leaves_no_process(tmp_path: Path) -> None:
    from rich.console import Console

    script = tmp_path / "broken.py"
    script.write_text("import sys\nraise RuntimeError('no camera in ' + sys.argv[1])\n")
    with (
        launcher.progress_bar(Console(quiet=True)) as progress,
        pytest.raises(launcher.JobError, match=r"RuntimeError: no camera in train(.|\n)*log\.txt"),
    ):
        launcher.launch(
            [str(script), "train"], tmp_path / "ddp", workers=1, title="DDP", total_steps=10, progress=progress
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_demo_runs_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "detection_mobilenetv3.py"), "--quick"]
    command += ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "demo")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in ("loss_vs_time.png", "detections.png", "report.md"):
        assert (tmp_path / "demo" / name).stat().st_size > 500
    for job in JOBS:
        ranks = result.JobResult.load(tmp_path / "demo" / job).ranks
        assert {rank.steps for rank in ranks} == {24}
        assert len({rank.parameter_hash for rank in ranks}) == 1
    coded = result.JobResult.load(tmp_path / "demo" / "qgc")
    fp32_bytes = 4 * coded.numel
    assert np.mean([rank.bytes_sent_per_step for rank in coded.ranks]) < 0.26 * fp32_bytes  # 8 bits of 32, and scales
    assert coded.ranks[SLOW_WORKER].computed_steps < 24  # it was late, and replayed
