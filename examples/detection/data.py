"""COCO-format images as a torch data set, and who holds which of them."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset

from detection.settings import Settings

Target = dict[str, Tensor]


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """The images of one split of a COCO-format directory.

    Reads annotations/instances_<split>*.json and the images beside it, in a folder named like the file
    (`train2017` for instances_train2017.json). An item is an image [3, height, width], float32 in 0..1, and a
    target with `boxes` [n, 4] (x0, y0, x1, y1; pixels), `labels` [n] (1..C) and `image_id`. Crowd boxes and
    images without a usable box are left out of training, as torchvision's reference does. `limit` keeps the
    first images only.
    """

    def __init__(self, root: Path, split: str, *, limit: int | None = None) -> None:
        found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if not found:
            raise FileNotFoundError(
                f"expected {root}/annotations/instances_{split}*.json, got no such file;"
                " give --root the directory that holds `annotations` and the image folders"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
            self.coco = COCO(str(found[0]))
        self.folder = root / found[0].stem.removeprefix("instances_")
        self.category_ids: list[int] = sorted(self.coco.getCatIds())
        self.categories = [self.coco.cats[category]["name"] for category in self.category_ids]
        self.label_of = {category: label for label, category in enumerate(self.category_ids, start=1)}
        keep_empty = not split.startswith("train")
        self.image_ids = [i for i in sorted(self.coco.imgs) if keep_empty or self._annotations(i)][:limit]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.image_ids[index]
        image = Image.open(self.folder / self.coco.imgs[image_id]["file_name"]).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        annotations = self._annotations(image_id)
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor(self.labels(index), dtype=torch.int64)
        return pixels, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(image_id)}

    def labels(self, index: int) -> list[int]:
        """Return the labels (1..C) of one image without reading it."""
        return [self.label_of[a["category_id"]] for a in self._annotations(self.image_ids[index])]

    def site(self, index: int) -> int | None:
        """Return which site an image belongs to, where the data set says so."""
        return self.coco.imgs[self.image_ids[index]].get("site")

    def _annotations(self, image_id: int) -> list[dict]:
        annotations = self.coco.imgToAnns[image_id]
        return [a for a in annotations if not a.get("iscrowd", 0) and min(a["bbox"][2:]) >= 1]


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Keep images and targets as lists: they differ in size and number of boxes."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def partition(data: CocoImages, workers: int, *, placement: str, seed: int) -> list[list[int]]:
    """Say which worker holds which images.

    Args:
        placement: "local": images stay at the site they come from (or, where the data set has no sites, in
            contiguous blocks of image numbers); "shuffled": blocks of one random permutation.
    Returns:
        `workers` lists of indices that cover the data set, disjoint.
    """
    order = np.arange(len(data))
    sites = [data.site(index) for index in range(len(data))]
    if placement == "local" and None not in sites:
        return [[int(i) for i in order if sites[i] == worker] for worker in range(workers)]
    if placement == "shuffled":
        order = np.random.default_rng(seed).permutation(order)
    return [block.tolist() for block in np.array_split(order, workers)]


def held_by_workers(data: CocoImages, s: Settings) -> list[list[int]]:
    """Return the images each worker trains on: its partition, cut to as many whole batches as everybody's.

    Plain DDP needs epochs of equal length on all ranks; the partitions differ by a few images at most. A run
    of less than an epoch needs no more than `s.steps` batches.
    """
    partitions = partition(data, s.workers, placement=s.variant.placement, seed=s.seed)
    batches = min(min(map(len, partitions)) // s.batch_size, s.steps)
    if batches < 1:
        raise ValueError(
            f"expected at least one batch of {s.batch_size} images per worker, got "
            f"{[len(part) for part in partitions]} images; use a smaller --batch-size"
        )
    return [part[: batches * s.batch_size] for part in partitions]


def labels_only_at(data: CocoImages, partitions: Sequence[Sequence[int]], worker: int) -> list[int]:
    """Return the labels (1..C) that occur in this worker's images and in nobody else's."""
    held = [{label for index in part for label in data.labels(index)} for part in partitions]
    others = set().union(*(labels for k, labels in enumerate(held) if k != worker))
    return sorted(held[worker] - others)
