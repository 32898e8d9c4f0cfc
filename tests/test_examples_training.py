"""The classification and the language example: quick forms on four forked ranks, normal forms under torchrun."""

from __future__ import annotations

import argparse
import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.example_ranks import DATA, ROOT, fetch_digits
from helpers.ranks import run_ranks

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import classification_resnet50 as classification
import language_gpt2 as language
from common import checkpoint, curve
from common.plots import COLOURS  # noqa: F401  # matplotlib, imported once and not in every rank
from common.result import JobResult
from language import text

SOME_TEXT = inspect.getsourcefile(argparse)  # 100 kB of the standard library; all of it takes a second in every rank


@pytest.fixture(scope="module")
def some_digits() -> None:
    fetch_digits()


def train(rank: int, options: classification.Options | language.Options) -> None:
    example = classification if isinstance(options, classification.Options) else language
    example.train(options)


def finished(options: classification.Options | language.Options) -> JobResult:
    """Train on forked ranks; check what every example must leave behind."""
    run_ranks(train, options, ranks=options.workers, timeout_s=90.0)
    result = JobResult.load(options.folder)
    assert {rank.steps for rank in result.ranks} == {options.steps}
    assert len({rank.parameter_hash for rank in result.ranks}) == 1
    rows = curve.read(options.folder)
    assert [row["step"] for row in rows] == list(range(options.eval_every, options.steps + 1, options.eval_every))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert (options.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (options.folder / checkpoint.NAME).exists()
    return result


# ------------------------------------------------------------------------------------------ quick forms
@pytest.mark.usefixtures("some_digits")
def test_resnet_trains_with_few_bits_and_a_late_worker(tmp_path: Path) -> None:
    options = classification.Options(quick=True, out=tmp_path, data_dir=DATA, slow_shift_s=0.4, deadline_s=0.15)
    result = finished(options)
    assert result.plan.startswith("Plan(4 workers")
    assert np.mean([rank.bytes_sent_per_step for rank in result.ranks]) < result.fp32_bytes / 6
    assert result.ranks[3].missed > 0  # behind the warm-up it is late
    assert result.waiting_s is not None
    assert result.waiting_s > options.steps * 0.4
    assert set(result.metrics or {}) == {"loss", "top-1 accuracy"}


def test_gpt2_trains_with_few_bits_and_a_late_worker(tmp_path: Path) -> None:
    options = language.Options(quick=True, data=SOME_TEXT, out=tmp_path, slow_shift_s=0.4, deadline_s=0.15)
    result = finished(options)
    assert np.mean([rank.bytes_sent_per_step for rank in result.ranks]) < result.fp32_bytes / 6
    assert result.ranks[3].missed > 0
    loss, perplexity = (result.metrics or {})["loss"], (result.metrics or {})["perplexity"]
    assert loss < math.log(256)  # better than guessing a byte
    assert perplexity == pytest.approx(math.exp(loss))


def stop_and_go_on(rank: int, options: language.Options) -> list[float]:
    """Train to the end, keeping the first checkpoint; then again from there. Return how far the parameters differ."""
    folder, ends = options.folder, []
    kept = folder / "first.pt"
    for resume in (False, True):
        if resume:
            torch.distributed.barrier()
            if rank == 0:
                (folder / checkpoint.NAME).write_bytes(kept.read_bytes())
        save = checkpoint.save

        def save_and_keep(*args, save=save, resume=resume, **kwargs):
            save(*args, **kwargs)
            if rank == 0 and not resume and not kept.exists():
                kept.write_bytes((folder / checkpoint.NAME).read_bytes())

        checkpoint.save = save_and_keep
        language.train(language.Options(**vars(options) | {"resume": resume}))
        checkpoint.save = save
        ends.append(torch.load(folder / checkpoint.NAME, weights_only=True)["model"])
    return [float((ends[0][name] - ends[1][name]).abs().max()) for name in ends[0]]


@pytest.mark.parametrize("way", ["ddp", "qgc"])
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(tmp_path: Path, way: str) -> None:
    options = language.Options(
        quick=True, data=SOME_TEXT, way=way, out=tmp_path, workers=2, slow_worker=-1, deadline_s=0.0, val_limit=8
    )
    assert set(run_ranks(stop_and_go_on, options, ranks=2)[0]) == {0.0}
    assert [row["step"] for row in curve.read(options.folder)] == [3, 6]


# ------------------------------------------------------------------------------------------------- text
def test_windows_hold_the_text_and_validation_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    lines = [f"{number} héllo\n" for number in range(4000)]
    path.write_text("".join(lines))
    train_data, val_data, size = text.windows(str(path), "bytes", 16, tmp_path)
    assert size == 256
    shown = [bytes(window.numpy().astype(np.uint8)) for window in train_data]
    held_out = [bytes(window.numpy().astype(np.uint8)) for window in val_data]
    assert {len(window) for window in shown + held_out} == {16}
    assert b"".join(held_out).startswith(b"0 h\xc3\xa9llo\n1 h")
    assert b"".join(shown).startswith(b"100 h")
    assert len(b"".join(held_out)) == pytest.approx(len(path.read_bytes()) / 20, rel=0.1)  # numbers grow longer


def test_the_standard_library_is_there_and_is_code() -> None:
    found = text.documents("stdlib", DATA)
    assert sum(map(len, found)) > 3e6
    assert sum("import " in source for source in found) > len(found) / 2


def test_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected stdlib, kjv or a text file, got 'latin'"):
        text.documents("latin", tmp_path)


def test_gpt2_has_the_size_it_is_called() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(
                p.numel() for p in language.build_model(language.Options(size=name, context=1024), v).parameters()
            )
            for name, v in (("tiny", 256), ("small", 50257), ("124M", 50257))
        }
    assert sizes["124M"] == 124_439_808  # OpenAI's GPT-2 small
    assert sizes["tiny"] == pytest.approx(0.95e6, rel=0.01)  # of which 0.13 M are positions beyond the usual 128
    assert sizes["small"] == pytest.approx(16.3e6, rel=0.01)


def test_resnet_is_torchvisions() -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):
        ours, theirs = classification.build_model(classification.Options(), 1000), resnet50()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


# ---------------------------------------------------------------------------------------- other data
def test_an_image_folder_is_read(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (300, 260), "red").save(tmp_path / split / name / "1.jpg")
    train_data, val_data, classes = classification.load_data(classification.Options(data="imagefolder", root=tmp_path))
    assert classes == len(train_data) == len(val_data) == 3
    assert train_data[1][0].shape == val_data[1][0].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError, match="--root"):
        classification.load_data(classification.Options(data="fashion-mnist"))


# ------------------------------------------------------------------------------------------ normal forms
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", ["classification_resnet50.py", "language_gpt2.py"])
def test_the_example_learns_under_torchrun(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), "--out", str(tmp_path), "--data-dir", str(DATA)]
    done = subprocess.run([*command, "--way", "ddp", "--way", "qgc"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "against waiting for all" in " ".join(done.stdout.split())  # however lines are broken
    for way in ("ddp", "qgc"):
        rows = curve.read(tmp_path / way)
        assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
        assert JobResult.load(tmp_path / way).steps == rows[-1]["step"]
    assert (tmp_path / "curves.png").exists()
    assert len((tmp_path / "comparison.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("source", "vocabulary"), [("kjv", "bytes"), ("stdlib", "gpt2")])
def test_other_text_and_gpt2s_byte_pairs(source: str, vocabulary: str) -> None:
    train_data, val_data, size = text.windows(source, vocabulary, 64, DATA)
    assert size == (50257 if vocabulary == "gpt2" else 256)
    assert len(train_data) > 10 * len(val_data) > 0
    assert int(max(window.max() for window in val_data)) < size
    if source == "kjv":
        assert "God created the heaven and the earth" in text.documents("kjv", DATA)[0]
