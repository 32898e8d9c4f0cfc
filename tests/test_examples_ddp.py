"""The scripts of examples/ddp run on four processes, and the quickstart shows what has changed from before to after."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import runpy
import subprocess
import sys
import time
from typing import Any

import pytest
import torch
from common.result import parameter_hash
from helpers.example_ranks import EXAMPLES, ROOT, as_under_torchrun, fetch_digits
from helpers.ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel

SCRIPTS = EXAMPLES / "ddp"
LATE_RANK, LATE_S = 3, 0.025  # per sample: a full step takes several deadlines, a thin one less than one


def run_script(rank: int, name: str, *args: str) -> dict[str, Any]:
    """Run a script as torchrun would, with one rank that is slow; the harness has made the process group."""
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [name, *args]
    forward = DistributedDataParallel.forward

    def slow_forward(model: DistributedDataParallel, inputs: torch.Tensor, *others: Any) -> Any:
        slow = name != "before.py" and rank == LATE_RANK and model.training and torch.is_grad_enabled()
        time.sleep(LATE_S * len(inputs) if slow else 0.0)
        return forward(model, inputs, *others)

    DistributedDataParallel.forward = slow_forward  # type: ignore[method-assign]
    with contextlib.redirect_stdout(io.StringIO()) as out, as_under_torchrun():
        names = runpy.run_path(str(SCRIPTS / name))
    report = names["state"].report() if "state" in names else None
    if report:
        names["state"].close()
    return {
        "printed": out.getvalue(),
        "hash": parameter_hash(names["model"]),
        "lr": names["optimizer"].param_groups[0]["lr"],
        "steps": report.steps if report else 0,
        "thin": report.thin_steps if report else 0,
        "bytes": report.bytes_sent / max(report.computed_steps, 1) / report.numel if report else 4.0,
    }


@pytest.mark.parametrize("name", ["before.py", "after.py"])
def test_the_script_learns_and_its_replicas_stay_equal(name: str) -> None:
    fetch_digits()
    ranks = run_ranks(run_script, name, "1")
    assert len({rank["hash"] for rank in ranks}) == 1
    printed = re.fullmatch(r"epoch 1: loss [\d.]+, validation accuracy ([\d.]+)\n", ranks[0]["printed"])
    assert printed
    assert float(printed[1]) > 0.5  # a tenth by guessing; 0.87 without a late rank
    if name == "after.py":
        assert {rank["steps"] for rank in ranks} == {32}  # 4,000 digits by 4 x 32, rounded up
        assert ranks[LATE_RANK]["thin"] > 0
        assert max(rank["bytes"] for rank in ranks) < 1.0  # of the 4 that fp32 takes


def test_the_loop_without_a_loader_learns_and_its_replicas_stay_equal() -> None:
    ranks = run_ranks(run_script, "nanogpt_style.py", "40")
    assert len({rank["hash"] for rank in ranks}) == 1
    assert len({rank["lr"] for rank in ranks}) == 1
    assert {rank["steps"] for rank in ranks} == {40}
    assert ranks[LATE_RANK]["thin"] > 0
    losses = re.findall(r"iteration (\d+): train loss [\d.]+, validation loss ([\d.]+)\n", ranks[0]["printed"])
    assert [iteration for iteration, _ in losses] == ["0", "40"]
    assert float(losses[-1][1]) < 4.0  # 5.5 by guessing, 3.1 without a late rank


def test_the_quickstart_shows_the_difference_of_the_two_scripts() -> None:
    before, after = ((SCRIPTS / name).read_text().splitlines() for name in ("before.py", "after.py"))
    difference = list(difflib.unified_diff(before, after, lineterm=""))
    (shown,) = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(), flags=re.DOTALL)
    assert shown.splitlines() == difference[2:]  # without the files' names
    changed = [line for line in difference[2:] if line[0] in "+-" and line[1:]]
    assert len([line for line in changed if line.startswith("-")]) == 3  # two lines and an import changed
    assert len([line for line in changed if line.startswith("+")]) == 5  # ... and two added


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["before.py", "after.py"])
def test_the_script_runs_under_torchrun(name: str) -> None:
    fetch_digits()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    finished = subprocess.run([*command, str(SCRIPTS / name)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    accuracies = re.findall(r"epoch (\d): loss [\d.]+, validation accuracy ([\d.]+)", finished.stdout)
    assert [epoch for epoch, _ in accuracies] == ["1", "2", "3"]
    assert float(accuracies[-1][1]) > 0.7
