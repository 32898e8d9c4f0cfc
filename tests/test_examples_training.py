"""The classification and the language example: quick forms on four forked ranks, normal forms under torchrun."""

from __future__ import annotations

import argparse
import dataclasses
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

import classification_resnet50 as classification
import language_gpt2 as language
from common import job
from common.result import Result
from language import text

SOME_TEXT = inspect.getsourcefile(argparse)  # 100 kB of the standard library; all of it takes a second in every rank


@pytest.fixture(scope="module")
def some_digits() -> None:
    fetch_digits()


def train(rank: int, options: classification.Options | language.Options) -> None:
    example = classification if isinstance(options, classification.Options) else language
    example.train(options)


def finished(options: classification.Options | language.Options) -> Result:
    """Train on forked ranks; check what every example must leave behind."""
    run_ranks(train, options, ranks=options.workers, timeout_s=90.0)
    result = Result.load(options.folder)
    assert len(set(result.of_ranks("hash"))) == 1
    steps = list(range(options.eval_every, options.steps + 1, options.eval_every))
    assert [row["step"] for row in result.curve] == steps
    assert all(math.isfinite(value) for row in result.curve for value in row.values())
    assert (options.folder / job.CHECKPOINT).exists()
    return result


# ------------------------------------------------------------------------------------------ quick forms
@pytest.mark.usefixtures("some_digits")
def test_resnet_trains_with_few_bits_and_a_late_worker(tmp_path: Path) -> None:
    changes = classification.QUICK | dict(out=tmp_path, data_dir=DATA, slow_shift_s=0.4, deadline_s=0.15)
    options = dataclasses.replace(classification.DEFAULTS, **changes)
    result = finished(options)
    assert result.plan.startswith("Plan(4 workers")
    assert np.mean(result.of_ranks("sent")) < 4 * result.numel / 6
    assert result.ranks[3]["late"] > 0  # behind the warm-up it is late
    assert set(result.curve[-1]) == {"step", "time_s", "loss", "top-1 accuracy"}


def test_gpt2_trains_with_few_bits_and_a_late_worker(tmp_path: Path) -> None:
    changes = language.QUICK | dict(data=SOME_TEXT, out=tmp_path, slow_shift_s=0.4, deadline_s=0.15)
    options = dataclasses.replace(language.DEFAULTS, **changes)
    result = finished(options)
    assert np.mean(result.of_ranks("sent")) < 4 * result.numel / 6
    assert result.ranks[3]["late"] > 0
    loss, perplexity = result.curve[-1]["loss"], result.curve[-1]["perplexity"]
    assert loss < math.log(256)  # better than guessing a byte
    assert perplexity == pytest.approx(math.exp(loss))


class Killed(Exception):
    """Stands for a kill: nothing behind it is run, and what was being written stays as it is."""


def die_and_go_on(rank: int, options: language.Options) -> tuple[float, Result]:
    """Train to the end; train again, die behind the first checkpoint, go on; return how far the parameters differ."""
    ends = []
    for name in ("whole", "killed"):
        s = dataclasses.replace(options, out=options.out / name)
        if name == "killed":
            end_step = job.Job.end_step

            def dying(self: job.Job, loss: torch.Tensor, end_step=end_step) -> None:
                end_step(self, loss)
                if self.step == 5:
                    if self.state:
                        self.state.close()
                    raise Killed

            job.Job.end_step = dying
            with pytest.raises(Killed):
                language.train(s)
            job.Job.end_step = end_step
            torch.distributed.barrier()
            if rank == 0:  # files that were being written, cut in the middle
                for path in list(s.folder.iterdir()):
                    path.with_name(f"{path.name}.1.partial").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            s = dataclasses.replace(s, resume=True)
        language.train(s)
        torch.distributed.barrier()
        ends.append(torch.load(s.folder / job.CHECKPOINT, weights_only=True)["model"])
    differences = [(ends[0][name] - ends[1][name]).abs().max() for name in ends[0]]
    return float(max(differences)), Result.load(s.folder)


@pytest.mark.parametrize("way", ["ddp", "qgc"])
def test_a_job_that_was_killed_ends_where_an_uninterrupted_one_does(tmp_path: Path, way: str) -> None:
    changes = language.QUICK | dict(data=SOME_TEXT, way=way, out=tmp_path, workers=2, slow_worker=-1, val_limit=8)
    options = dataclasses.replace(language.DEFAULTS, **changes, deadline_s=0.0)
    for difference, result in run_ranks(die_and_go_on, options, ranks=2):
        assert difference == 0.0
        assert [row["step"] for row in result.curve] == [3, 6]
        assert result.curve[0]["time_s"] < result.curve[1]["time_s"]


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
                p.numel()
                for p in language.build_model(
                    dataclasses.replace(language.DEFAULTS, size=name, context=1024), v
                ).parameters()
            )
            for name, v in (("tiny", 256), ("small", 50257), ("124M", 50257))
        }
    assert sizes["124M"] == 124_439_808  # OpenAI's GPT-2 small
    assert sizes["tiny"] == pytest.approx(0.95e6, rel=0.01)  # of which 0.13 M are positions beyond the usual 128
    assert sizes["small"] == pytest.approx(16.3e6, rel=0.01)


def test_resnet_is_torchvisions() -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):
        ours, theirs = classification.build_model(classification.DEFAULTS, 1000), resnet50()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


# ---------------------------------------------------------------------------------------- other data
def test_an_image_folder_is_read(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (300, 260), "red").save(tmp_path / split / name / "1.jpg")
    folder = dataclasses.replace(classification.DEFAULTS, data="imagefolder", root=tmp_path)
    train_data, val_data, classes = classification.load_data(folder)
    assert classes == len(train_data) == len(val_data) == 3
    assert train_data[1][0].shape == val_data[1][0].shape == (3, 224, 224)
    with pytest.raises(FileNotFoundError, match="--root"):
        classification.load_data(dataclasses.replace(classification.DEFAULTS, data="fashion-mnist"))


# ------------------------------------------------------------------------------------------ normal forms
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", ["classification_resnet50.py", "language_gpt2.py"])
def test_the_example_learns_under_torchrun(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), "--out", str(tmp_path), "--data-dir", str(DATA)]
    done = subprocess.run([*command, "--way", "ddp", "--way", "qgc"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for way in ("ddp", "qgc"):
        curve = Result.load(tmp_path / way).curve
        assert curve[-1]["loss"] < 0.95 * curve[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "vocabulary"), [("kjv", "bytes"), ("stdlib", "gpt2")])
def test_other_text_and_gpt2s_byte_pairs(source: str, vocabulary: str) -> None:
    train_data, val_data, size = text.windows(source, vocabulary, 64, DATA)
    assert size == (50257 if vocabulary == "gpt2" else 256)
    assert len(train_data) > 10 * len(val_data) > 0
    assert int(max(window.max() for window in val_data)) < size
    if source == "kjv":
        assert "God created the heaven and the earth" in text.documents("kjv", DATA)[0]
