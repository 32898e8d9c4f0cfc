"""The detection demo: its table and its jobs. What needs downloads is marked slow."""

from __future__ import annotations

import dataclasses
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
from detection import comparison, curves, report
from detection import demo as detection_demo
from detection.comparison import Outcome, Point
from detection.settings import Settings
from helpers.example_ranks import EXAMPLES


def outcome(title: str, wall_s: float, folder: Path) -> Outcome:
    rank = {"late": 0.0, "computed": 1.0, "sent": 2.0**19, "received": 2.0**19, "hash": "aa"}
    rows = [{"step": 100, "time_s": wall_s}]
    return Outcome(
        settings=Settings(data=folder, folder=folder),
        result=Result(title=title, numel=2**18, curve=rows, used=[1.0] * 4, ranks=[rank] * 4, made=[(50, wall_s / 2)]),
        points=[
            Point(time_s=wall_s / 2, step=50, ap50=0.2, ap50_slow=0.1),
            Point(time_s=wall_s, step=100, ap50=0.4, ap50_slow=0.25),
        ],
    )


def test_the_report_says_what_the_jobs_say(tmp_path: Path) -> None:
    both = [outcome("DDP", 40.0, tmp_path), outcome("ours", 20.0, tmp_path)]
    rows = dict(report.rows(both, ["8", "9"]))
    assert rows["wall time"] == ["40 s", "20 s"]
    assert rows["seconds to AP50 0.3"] == ["30", "15"]
    assert rows["seconds to AP50 0.5"] == ["not reached"] * 2
    assert rows["AP50 at the end, slow workers' own (8, 9)"] == ["0.250"] * 2
    text = report.markdown({"moves": both}, both[0].settings, ["8", "9"])
    for name, values in rows.items():
        assert f"| {name} | " + " | ".join(values) + " |" in text


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    curves.curves([outcome("DDP", 40.0, tmp_path), outcome("ours", 20.0, tmp_path)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_job_with_other_settings_is_not_resumed(tmp_path: Path) -> None:
    from rich.console import Console

    settings = Settings(data=tmp_path, folder=tmp_path / "qgc", resume=True)
    settings.save(settings.folder / "settings.json")
    other = dataclasses.replace(settings, lr=settings.lr / 2)
    with pytest.raises(launcher.JobError, match="other settings"):
        comparison.run(tmp_path / "script.py", other, Console(quiet=True), title="")
    ended = outcome("ours", 20.0, tmp_path).result
    ended.save(settings.folder)
    assert comparison.run(tmp_path / "script.py", settings, Console(quiet=True), title="").wall_s == 20.0


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
    for name in ("moves_curves.png", "moves_detections.png", "report.md"):
        assert (tmp_path / "demo" / name).stat().st_size > 500
    for job in detection_demo.JOBS:
        found = Result.load(tmp_path / "demo" / "moves" / job)
        assert found.steps > 5
        assert len(set(found.of_ranks("hash"))) == 1
    coded = Result.load(tmp_path / "demo" / "moves" / "qgc")
    assert np.mean(coded.of_ranks("sent")) < 0.13 * 4 * coded.numel  # 4 bits of 32, and scales
