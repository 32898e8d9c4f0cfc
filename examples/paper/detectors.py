"""Detectors: SSDLite on the demo's images with one class, and the paper's scale on COCO."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detection import evaluation, rendering
from detection.data import CocoImages, Target, collate
from detection.model import build_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.ops import box_iou

from paper.task import Task, device_of

JUDGED = 32  # training images over which the loss is taken
EXAMINED = 200  # validation images over which detections are counted
SIDE = 96  # pixels of the small detector's input
SHOWN_SCORE = 0.3  # boxes below it are not counted
HIT_IOU = 0.5

Images = Dataset[tuple[Tensor, Target]]


class Digits(Images):
    """The demo's images, kept in memory, with all digits as one class: a detector finds them in few rounds.

    Telling ten digits apart takes some thousand rounds of plain SGD, which a table of schemes cannot afford.
    """

    def __init__(self, images: CocoImages) -> None:
        self._items = [(image, {**t, "labels": torch.ones_like(t["labels"])}) for image, t in images]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return self._items[index]


def digits_detection(data_dir: Path) -> Task:
    """Find digits on 1,000 aerial photos with SSDLite and MobileNetV3-Small at 96 pixels: 942,152 parameters."""
    folder = rendering.digits(data_dir)
    return _task(
        partial(build_model, 2, backbone="small", size=SIDE),
        *(Digits(CocoImages(folder, split)) for split in ("train", "val")),
    )


def coco(data_dir: Path) -> Task:
    """Detect COCO's 80 classes with SSDLite and MobileNetV3-Large at 320 pixels."""
    train, val = (CocoImages(data_dir / "coco", split) for split in ("train", "val"))
    build = partial(build_model, len(train.categories) + 1, backbone="large", size=320)
    return _task(build, train, val)


def coco_resnet(data_dir: Path) -> Task:
    """Detect COCO's 80 classes with RetinaNet on a ResNet-50."""
    from torchvision.models.detection import retinanet_resnet50_fpn

    train, val = (CocoImages(data_dir / "coco", split) for split in ("train", "val"))
    none = dict(weights=None, weights_backbone=None)
    build = partial(retinanet_resnet50_fpn, **none, num_classes=len(train.categories) + 1)
    return _task(build, train, val)


def detection_loss(network: nn.Module, batch: Any) -> Tensor:
    """Return the sum of a torchvision detector's losses."""
    images, targets = batch
    device = device_of(network)
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return torch.stack(list(network([image.to(device) for image in images], targets).values())).sum()


def _task(build: Callable[[], nn.Module], train: Any, val: Any) -> Task:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:JUDGED]
    batch = collate([train[int(index)] for index in order])
    return Task(
        build=build,
        loss=detection_loss,
        train=train,
        judge=partial(_judge, batch),
        collate=collate,
        examine=partial(examine, val),
    )


def _judge(batch: Any, network: nn.Module) -> float:
    was_training = network.training
    network.train()  # torchvision's detectors compute losses in training only
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        loss = float(detection_loss(network, batch))
    network.train(was_training)
    return loss


# ----------------------------------------------------------------------------------------------- Fig. 4
def examine(images: Any, network: nn.Module) -> Mapping[str, float]:
    """Count what a detector finds in the first EXAMINED images.

    Returns:
        ap50: average precision at IoU 0.5 over all boxes, labels together.
        found: fraction of the objects found with a score of SHOWN_SCORE or more; false: other such boxes per image.
        top_score: mean over images of the best right box's score, 0 where there is none.
    """
    scores: list[float] = []
    hits: list[bool] = []
    best: list[float] = []
    objects = 0
    count = min(EXAMINED, len(images))
    for image, target in (images[index] for index in range(count)):
        (boxes,) = evaluation.detect(network, [image.to(device_of(network))])
        of_image = _hits({name: value.cpu() for name, value in boxes.items()}, target)
        image_scores = boxes["scores"].tolist()
        scores += image_scores
        hits += of_image
        best.append(max((s for s, hit in zip(image_scores, of_image) if hit), default=0.0))
        objects += len(target["boxes"])
    shown = np.array(scores) >= SHOWN_SCORE
    right = np.array(hits, dtype=bool)
    return {
        "ap50": average_precision(scores, hits, objects),
        "found": float((shown & right).sum() / objects),
        "false": float((shown & ~right).sum() / count),
        "top_score": float(np.mean(best)),
    }


def _hits(boxes: Mapping[str, Tensor], target: Target) -> list[bool]:
    """Match boxes to objects of their label, the best score first; an object counts once."""
    hits = [False] * len(boxes["scores"])
    overlap = box_iou(boxes["boxes"], target["boxes"])
    overlap[boxes["labels"][:, None] != target["labels"][None]] = 0.0
    for index in torch.argsort(boxes["scores"], descending=True).tolist():
        if overlap.shape[1] and float(overlap[index].max()) >= HIT_IOU:
            hits[index] = True
            overlap[:, int(overlap[index].argmax())] = 0.0
    return hits


def average_precision(scores: Sequence[float], hits: Sequence[bool], objects: int) -> float:
    """Return the area under the precision-recall curve, precision taken as its running maximum from the right."""
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    right = np.asarray(hits, dtype=np.float64)[order]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(np.sum(np.maximum.accumulate(precision[::-1])[::-1] * right) / objects) if len(right) else 0.0
