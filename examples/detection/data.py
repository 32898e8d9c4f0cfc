"""COCO-format images as a torch data set, and who holds which of them."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from scipy.optimize import brentq
from torch import Tensor
from torch.utils.data import Dataset

from detection.settings import MACHINES, Settings
from torch_qgc.planner.batches import apportion
from torch_qgc.planner.checks import Ints

CORE_IMAGE_S = 0.01  # what a core of this machine takes for an image, about
LEAST_BATCH = 2  # BatchNorm cannot train on one image where a feature map has one pixel

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


def partition(data: CocoImages, parts: Sequence[float], *, moves: bool, seed: int) -> list[list[int]]:
    """Cut the data into parts, disjoint.

    Args:
        parts: how large they are in relation to each other.
        moves: parts are of one random permutation; else of the data's own order, or the sites where it names some.
    Returns:
        lists of indices that cover the data set.
    """
    order = np.arange(len(data))
    sites = [data.site(index) for index in range(len(data))]
    if not moves and None not in sites:
        return [[int(i) for i in order if sites[i] == site] for site in range(len(parts))]
    if moves:
        order = np.random.default_rng(seed).permutation(order)
    ends = np.round(np.cumsum(parts) / np.sum(parts) * len(order)).astype(int)
    return [block.tolist() for block in np.split(order, ends[:-1])]


def held_by_workers(data: CocoImages, s: Settings, sizes: Sequence[float] | None = None) -> list[list[int]]:
    """Return the images that each worker of a job trains on.

    Args:
        sizes: of its workers' batches. Data that can move are spread accordingly, and over those that take part only.
    """
    workers, moves = s.variant.workers, s.panel == "moves"
    held = partition(data, sizes if moves and sizes is not None else [1.0] * len(MACHINES), moves=moves, seed=s.seed)
    return held if len(held) == len(workers) else [held[worker] for worker in workers]


def batch_sizes(s: Settings, *, gradient_bytes: int) -> Ints:
    """Return the batches of DDP's workers, in images: alike, or by speed, as if somebody had told their speeds.

    With batches by speed a step takes T seconds, the least in which the workers that all wait for each other can do as
    many images as with equal batches: B_k = max(least, (T - F_k) / s_k), s_k seconds per image and F_k for the link.

    Args:
        gradient_bytes: in fp32.
    """
    machines, total = s.machines, s.batch_size * s.workers
    if not s.variant.by_speed:
        return np.full(s.workers, s.batch_size)
    ring_bytes = 2 * (s.workers - 1) / s.workers * gradient_bytes * (0.5 if s.variant.bf16 else 1.0)
    image_s = np.array([m.sample_s + CORE_IMAGE_S for m in machines])
    link_s = np.array([ring_bytes / m.link_bytes_per_s if m.link_bytes_per_s else 0.0 for m in machines])

    def batches(step_s: float) -> np.ndarray:
        return np.maximum((step_s - link_s) / image_s, LEAST_BATCH)

    step_s = brentq(lambda at: batches(at).sum() - total, 0.0, image_s.max() * total + link_s.max())
    return apportion(batches(step_s) / s.batch_size, s.batch_size, least=LEAST_BATCH)


def labels_only_at(data: CocoImages, partitions: Sequence[Sequence[int]], worker: int) -> list[int]:
    """Return the labels (1..C) that occur in this worker's images and in nobody else's."""
    held = [{label for index in part for label in data.labels(index)} for part in partitions]
    others = set().union(*(labels for k, labels in enumerate(held) if k != worker))
    return sorted(held[worker] - others)
