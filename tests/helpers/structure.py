"""Which file imports which: the package's rooms, floors, arrows and circles.

`python tests/helpers/structure.py [FOLDER]` prints them, so that two commits can be compared.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

Graph = Mapping[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Return the package's modules by dotted name, the package's own name left out."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports: absolute or relative, in functions, under TYPE_CHECKING.

    `from package.room import name` counts as an import of `room.name` if that is a module, of `room` else.
    """
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        found = graph[name] = set()
        is_package = path.name == "__init__.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name.removeprefix(package.name + ".") for alias in node.names]
                found.update(t for t in targets if t in known)
            elif isinstance(node, ast.ImportFrom):
                base = _base(node, name, is_package, package.name)
                if base is None:
                    continue
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    found.add(inner if inner in known else base)
        found -= {name, ""}
    return graph


def _base(node: ast.ImportFrom, name: str, is_package: bool, package: str) -> str | None:
    """Return the module that `from ... import` names, without the package; None if it is another package's."""
    if node.level:
        parts = name.split(".") if name else []
        here = parts if is_package else parts[:-1]
        here = here[: len(here) - (node.level - 1)] if node.level > 1 else here
        return ".".join([*here, *(node.module or "").split(".")]).strip(".")
    module = node.module or ""
    if module == package:
        return ""
    return module.removeprefix(package + ".") if module.startswith(package + ".") else None


def room_of(module: str) -> str:
    """Return the first part of a module's name: the folder or file at the top of the package."""
    return module.split(".")[0]


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Return the rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for module, targets in graph.items():
        own = found.setdefault(room_of(module), set())
        own.update(room_of(t) for t in targets if room_of(t) != room_of(module))
    found.pop("", None)
    return found


def circle(graph: Graph) -> list[str] | None:
    """Return the modules of one circle of imports, None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def circles(graph: Graph) -> list[set[str]]:
    """Return the groups of modules that import each other, directly or round about."""
    reach = {m: _reachable(graph, m) for m in graph}
    groups: list[set[str]] = []
    for m in graph:
        group = {m} | {t for t in reach[m] if m in reach.get(t, ())}
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    todo: Iterable[str] = list(graph[start])
    while todo:
        seen.update(todo)
        todo = {t for m in todo for t in graph.get(m, ())} - seen
    return seen


def floors(graph: Graph) -> int:
    """Return the length of the longest chain of imports between rooms."""
    depth: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        depth[room] = 1 + max((depth[t] for t in graph.get(room, ())), default=0)
    return max(depth.values())


def main(package: Path) -> None:
    """Print the structure of a package."""
    graph = imports(package)
    between = rooms(graph)
    for room in sorted(between):
        print(f"{room:<14} -> {' '.join(sorted(between[room]))}")
    arrows = sum(len(targets) for targets in between.values())
    height = "no" if circle(between) else floors(between)
    print(f"{len(between)} rooms, {height} floors, {arrows} arrows, {len(circles(graph))} circles of files")
    for group in circles(graph):
        print("  circle:", " ".join(sorted(group)))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "torch_qgc"))
