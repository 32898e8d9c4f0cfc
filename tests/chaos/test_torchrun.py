"""A job under torchrun, which ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stage import Stage

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

TESTS = Path(__file__).parent.parent
SCRIPT = """
import math, sys
from pathlib import Path
import torch, torch.distributed as dist
from helpers.script import Board, Member
from helpers.training import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
board = Board(2)
board.gate = math.inf
member = Member(dist.get_rank(), 2, Path(sys.argv[1]), board, lambda endpoint: endpoint)
train(member, steps=4000, after_step=lambda step, *_: member.note("step") if step == 20 else None)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_job_whose_torchrun_is_interrupted(stage: Stage, how: signal.Signals) -> None:
    script = stage.folder / "script.py"
    script.write_text(SCRIPT)
    shared = {"PYTHONPATH": str(TESTS), "PYTHONFAULTHANDLER": "1", "TMPDIR": str(stage.folder / "tmp")}
    options = ["--standalone", "--nproc-per-node", "2", "--log-dir", str(stage.folder)]
    with (stage.folder / "0.log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(stage.folder)],
            env={**os.environ, **shared},
            stdout=log,
            stderr=log,
        )
    for rank in range(2):
        stage.note(rank, "step")
    launcher.send_signal(how)
    stage.until(lambda: launcher.poll() is not None, "end of torchrun")
    assert launcher.returncode != 0
