"""A stage for each case: nothing may be left behind on it, and what was seen on it can be kept as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.processes import adopting_orphans
from helpers.stage import Stage

#: Names a file that gets a line of what was seen in each case.
TABLE_VARIABLE = "CHAOS_CSV"


@pytest.fixture
def stage(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    with adopting_orphans():
        made = Stage(tmp_path)
        try:
            yield made
        finally:
            try:
                made.close()
            finally:
                _keep(request.node.name.removeprefix("test_"), made)


def _keep(case: str, stage: Stage) -> None:
    table = os.environ.get(TABLE_VARIABLE)
    if table and stage.ranks:
        row = {"case": case, **stage.measured()}
        with open(table, "a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
