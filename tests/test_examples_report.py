"""The detection demo: its table and its jobs. What needs downloads is marked slow."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")

from common import launcher
from common.result import Result
from detection import curves, report
from detection.settings import JOBS, SLOW_WORKER, Settings
from helpers.example_ranks import EXAMPLES


def outcome(title: str, wall_s: float, ap50_slow: float) -> report.Outcome:
    rank = {"late": 0.0, "computed": 1.0, "sent": 2.0**19, "received": 2.0**19, "hash": "aa"}
    rows = [{"step": 100, "time_s": wall_s}]
    curve = [(50, wall_s / 2, 4.0), (100, wall_s, 2.0)]
    return report.Outcome(
        result=Result(title=title, numel=2**18, curve=rows, used=[1.0] * 4, ranks=[rank] * 4),
        curve=curve,
        ap50=0.4,
        ap50_slow=ap50_slow,
        loss_equal_time=report.at_time(curve, 20.0),
        ap50_equal_time=0.3,
    )


def test_the_report_says_what_the_jobs_say(tmp_path: Path) -> None:
    both = [outcome("DDP", 40.0, math.nan), outcome("ours", 20.0, 0.25)]
    rows = dict(report.rows(both, ["8", "9"]))
    assert rows["wall time"] == ["40 s", "20 s"]
    assert rows["validation loss at equal time"] == ["4.00", "2.00"]
    assert rows["AP50, slow worker's own (8, 9)"] == ["–", "0.250"]
    text = report.markdown(both, Settings(data=tmp_path, folder=tmp_path), ["8", "9"])
    for name, values in rows.items():
        assert f"| {name} | " + " | ".join(values) + " |" in text


def test_the_loss_before_the_first_model_is_unknown() -> None:
    assert math.isnan(report.at_time([(10, 5.0, 3.0), (20, 10.0, 2.0)], 1.0))
    assert report.at_time([(10, 5.0, 3.0), (20, 10.0, 2.0)], 7.5) == 2.5


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    curves.curves({"loss": {"DDP": outcome("DDP", 40.0, 0.1).curve}}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_job_names_its_first_error_and_leaves_no_process(tmp_path: Path) -> None:
    from rich.console import Console

    script = tmp_path / "broken.py"
    script.write_text("import sys\nraise RuntimeError('no camera in ' + sys.argv[1])\n")
    command, console = [str(script), "train"], Console(quiet=True)
    with pytest.raises(launcher.JobError, match=r"RuntimeError: no camera in train(.|\n)*log\.txt"):
        launcher.launch(command, tmp_path / "ddp", workers=1, title="DDP", steps=10, console=console)


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
        found = Result.load(tmp_path / "demo" / job)
        assert found.steps == 24
        assert len(set(found.of_ranks("hash"))) == 1
    coded = Result.load(tmp_path / "demo" / "qgc")
    assert np.mean(coded.of_ranks("sent")) < 0.26 * 4 * coded.numel  # 8 bits of 32, and scales
    assert coded.ranks[SLOW_WORKER]["computed"] < 1  # it was late, and replayed
