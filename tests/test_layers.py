"""Imports point down the layer list of docs/architecture.md, and `import torch_qgc` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import structure

import torch_qgc

PACKAGE = Path(torch_qgc.__file__).parent
GRAPH = structure.imports(PACKAGE)

# A room may import what stands on a line further down only. docs/architecture.md shows the same list.
LAYERS = [
    ["cli"],
    ["lightning", "integrations", "simulator"],
    ["ddp"],
    ["worker", "aggregator"],
    ["job"],
    ["protocol"],
    ["schemes"],
    ["planner"],
    ["kernels"],
    ["errors", "logs"],
]
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}


@pytest.mark.parametrize("module", sorted(set(GRAPH) - {""}))
def test_imports_point_down(module: str) -> None:
    """Also those in functions, under TYPE_CHECKING, and relative ones."""
    room = structure.room_of(module)
    assert room in DEPTH, f"{room} has no place in the layer list"
    for imported in GRAPH[module]:
        other = structure.room_of(imported)
        assert other == room or DEPTH[other] > DEPTH[room], f"{module} must not import {imported}"


def test_no_files_import_each_other() -> None:
    assert structure.circle(GRAPH) is None


def test_the_architecture_page_shows_the_same_layers() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    tree = page.split("```")[1].split()
    drawn = [[word.rstrip("/,") for word in line.split("#")[0].split()] for line in page.split("```")[1].splitlines()]
    assert tree
    assert [rooms for rooms in drawn if rooms] == LAYERS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch_qgc.job.rounds", {"job.rounds"}),
        ("from torch_qgc import job", {"job"}),
        ("from torch_qgc.job import rounds", {"job.rounds"}),
        ("from torch_qgc.job.rounds import Round", {"job.rounds"}),
        ("from . import exchange", {"worker.exchange"}),
        ("from ..job import rounds", {"job.rounds"}),
        ("from ..job.rounds import Round", {"job.rounds"}),
        ("if TYPE_CHECKING:\n    from torch_qgc.job.rounds import Round", {"job.rounds"}),
        ("def f():\n    from torch_qgc.job import rounds", {"job.rounds"}),
        ("import torch, numpy as np\nfrom torch_qgc_other import job", set()),
    ],
)
def test_every_kind_of_import_is_seen(tmp_path: Path, source: str, found: set[str]) -> None:
    package = tmp_path / "torch_qgc"
    for name in ("__init__", "job/__init__", "job/rounds", "worker/__init__", "worker/exchange", "worker/probe"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").write_text("")
    (package / "worker" / "probe.py").write_text(source)
    assert structure.imports(package)["worker.probe"] == found


def test_planner_knows_nothing_about_torch() -> None:
    for path in (PACKAGE / "planner").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path


@pytest.mark.parametrize("module", ["aggregator.process", "planner", "schemes", "cli.app"])
def test_aggregator_and_planner_run_without_torch(module: str) -> None:
    code = f"import sys, torch_qgc.{module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_public_name_is_there() -> None:
    for name in torch_qgc.__all__:
        assert name in dir(torch_qgc)
        assert getattr(torch_qgc, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = torch_qgc.missing


def test_import_is_light() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); from torch_qgc import *; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "heavy = {'lightning', 'triton', 'matplotlib', 'typer', 'rich', 'torchvision', 'transformers', 'accelerate'}; "
        "print(sorted(new & heavy))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
