"""A stage for each case: nothing may be left behind on it, and what was seen on it can be kept as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from helpers.measured import measured
from helpers.processes import adopting_orphans
from helpers.stage import Stage

#: Names a file that gets a line of what was seen in each case; benchmarks/chaos.py says what the columns are.
TABLE_VARIABLE = "CHAOS_CSV"

_HELD = pytest.StashKey[bool]()


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    made = Stage(tmp_path)
    with adopting_orphans():
        yield made
        try:
            made.close()
        finally:
            _keep(request.node, made)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    if call.when == "call":
        item.stash[_HELD] = call.excinfo is None
    return (yield)


def _keep(item: pytest.Item, stage: Stage) -> None:
    table = os.environ.get(TABLE_VARIABLE)
    if table and stage.ranks:
        held = "yes" if item.stash.get(_HELD, False) else "not yet"
        row = {"case": item.name.removeprefix("test_"), "held": held, **measured(stage)}
        with open(table, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
