"""The Lightning example, in its quick form on forked ranks."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.ranks import run_ranks

pytest.importorskip("lightning")
pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import lightning_classification as example  # noqa: E402
from common import digits  # noqa: E402
from common.packages import DownloadError  # noqa: E402
from common.result import Result  # noqa: E402
from test_strategy import as_under_torchrun  # noqa: E402

DATA = ROOT / "data"


@pytest.fixture(scope="module", autouse=True)
def some_digits() -> None:
    try:
        digits.load(DATA)
    except DownloadError as error:
        pytest.skip(f"needs the digits, a download of 1.4 MB: {error}")


def train(rank: int, options: example.Options) -> None:
    as_under_torchrun(rank)
    example.train(options)


def crash_and_go_on(rank: int, options: example.Options) -> None:
    """Train, stop with an error behind the first checkpoint, and go on from it."""
    as_under_torchrun(rank)
    noted = example.Example.on_train_batch_end

    def failing(self: Any, trainer: Any, *args: Any) -> None:
        noted(self, trainer, *args)
        if trainer.global_step == 5:
            raise RuntimeError("on purpose")

    example.Example.on_train_batch_end = failing
    with pytest.raises(RuntimeError, match="on purpose"):
        example.train(options)
    example.Example.on_train_batch_end = noted
    example.train(dataclasses.replace(options, resume=True))


def test_the_example_trains_with_few_bits_and_a_late_worker(tmp_path: Path) -> None:
    changes = example.QUICK | dict(out=tmp_path, data_dir=DATA, slow_shift_s=0.6, deadline_s=0.2)
    options = dataclasses.replace(example.DEFAULTS, **changes)
    run_ranks(train, options, ranks=4)
    result = Result.load(options.folder)
    assert len(set(result.of_ranks("hash"))) == 1
    assert result.ranks[3]["late"] > 0  # behind the warm-up it is late
    assert np.mean(result.of_ranks("sent")) < 4 * result.numel / 6
    assert result.plan.startswith("Plan(4 workers")
    assert [row["step"] for row in result.curve] == [3, 6]
    assert all(math.isfinite(value) for row in result.curve for value in row.values())


@pytest.mark.slow
def test_the_example_ends_where_it_would_have_without_a_crash(tmp_path: Path) -> None:
    # Plain DDP does not: in mid-epoch Lightning has it draw the first batches again.
    changes = example.QUICK | dict(data_dir=DATA, workers=2, slow_worker=-1, deadline_s=0.0)
    options = dataclasses.replace(example.DEFAULTS, **changes)
    hashes = []
    for name, job in {"whole": train, "crashed": crash_and_go_on}.items():
        run_ranks(job, dataclasses.replace(options, out=tmp_path / name), ranks=2)
        result = Result.load(tmp_path / name / "qgc")
        assert [row["step"] for row in result.curve] == [3, 6]
        hashes.append(set(result.of_ranks("hash")))
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 1


def test_hooks_that_lightning_would_drop_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected ddp or qgc, got bf16"):
        dataclasses.replace(example.DEFAULTS, way="bf16", out=tmp_path)
