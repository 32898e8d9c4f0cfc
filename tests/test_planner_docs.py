"""The planner's page: its code runs, and what it shows is what comes out."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

PAGE = (Path(__file__).parent.parent / "docs" / "planner.md").read_text()


def test_every_block_runs_and_the_table_is_what_make_plan_prints() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    printed = []
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "docs/planner.md", "exec"), names)
        printed.append(out.getvalue())
    shown = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    assert printed[0] == shown[0]
    assert "partition 2" in printed[3]
    residuals = [float(line.split()[1]) for line in printed[1].splitlines()]
    assert residuals == sorted(residuals, reverse=True)
