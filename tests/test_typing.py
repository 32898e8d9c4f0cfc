"""The public names have types: scripts that use them pass `mypy --strict`, and names that do not exist are reported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import typed_script

import torch_qgc

HELPERS = Path(__file__).parent / "helpers"
WRONG = """
import torch_qgc as qgc

qgc.make_plans([0.1])
qgc.Limits(log_step=3)
qgc.QGCState(3)
qgc.simulator.simulates()
"""


def mypy(*files: Path) -> subprocess.CompletedProcess[str]:
    """Run mypy as in a user's project, which has no configuration of ours."""
    roots = os.pathsep.join(str(path) for path in (Path(torch_qgc.__file__).parent.parent, HELPERS.parent))
    # Tensor.backward has no annotations in torch, so that no strict script can call it without this option.
    options = ["--config-file=", "--strict", "--untyped-calls-exclude=torch", "--cache-dir=.mypy_cache/users"]
    command = [sys.executable, "-m", "mypy", *options, *map(str, files)]
    environment = {**os.environ, "MYPYPATH": roots}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HELPERS.parent.parent)


@pytest.mark.slow
def test_users_scripts_are_typed() -> None:
    pytest.importorskip("lightning")
    checked = mypy(HELPERS / "typed_script.py", HELPERS / "typed_module.py")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_wrong_names_and_types_are_reported(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    found = re.findall(r"wrong.py:(\d+): error: .*\[([\w-]+)\]", mypy(script).stdout)
    assert found == [("4", "attr-defined"), ("5", "call-arg"), ("6", "arg-type"), ("7", "attr-defined")]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_typed_script_runs(optimizer: str, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert typed_script.train(optimizer, workers=1)["step"] == 8
    finally:
        dist.destroy_process_group()


def test_the_typed_simulation_runs() -> None:
    assert 0.0 < typed_script.compare_schemes() < 5.0
