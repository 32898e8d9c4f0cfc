"""Imports point down the layer list of docs/architecture.md, and `import torch_qgc` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torch_qgc

PACKAGE = Path(torch_qgc.__file__).parent

# A module may import what stands on a higher-numbered line only.
LAYERS = [
    ["cli"],
    ["strategy", "simulator"],
    ["optim"],
    ["hook"],
    ["steps"],
    ["exchange", "update"],
    ["checkpoint", "data", "rendezvous", "report", "settings"],
    ["gradients", "serve"],
    ["worker", "aggregator", "layout"],
    ["decoder", "resultlog", "roster", "rounds"],
    ["transport", "wire", "schemes"],
    ["planner", "kernels"],
    ["errors"],
]
DEPTH = {module: depth for depth, modules in enumerate(LAYERS) for module in modules}


def imports_of(path: Path) -> set[str]:
    """Modules of the package (first component) that a file imports when it runs."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            if node.module and node.module.startswith("torch_qgc."):
                found.add(node.module.split(".")[1])
            elif node.module == "torch_qgc":
                found.update(alias.name for alias in node.names)

        def visit_Import(self, node: ast.Import) -> None:
            for alias in node.names:
                if alias.name.startswith("torch_qgc."):
                    found.add(alias.name.split(".")[1])

    Visitor().visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    if room in ("__init__", "__main__"):
        return
    assert room in DEPTH, f"{room} has no place in the layer list"
    for imported in imports_of(path):
        if imported != room:
            assert DEPTH[imported] > DEPTH[room], f"{room} must not import {imported}"


def test_planner_knows_nothing_about_torch() -> None:
    for path in (PACKAGE / "planner").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "torch" for name in names), path


@pytest.mark.parametrize("module", ["serve", "planner", "schemes", "cli.app"])
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
        "print(sorted(new & {'lightning', 'triton', 'matplotlib', 'typer', 'rich', 'torchvision', 'pycocotools'}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
