"""Validation loss and COCO average precision of a trained detector."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.files import replacing
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from detection.data import CocoImages, collate

STATISTICS_IMAGES = 128


class Snapshots:
    """Models kept along the way and at the end, to be judged when training is over.

    Args:
        folder: where they are kept, in `snapshot<step>.pt`.
        every_s: a model is kept every so many seconds.
        elapsed_s: at which the job goes on; what an interrupted run kept of later times is dropped.
    """

    def __init__(self, folder: Path, *, every_s: float, elapsed_s: float = 0.0) -> None:
        self._folder, self._every_s, self._next_s = folder, every_s, elapsed_s + every_s
        for path in folder.glob("snapshot*.pt"):
            if torch.load(path, weights_only=True)["time_s"] > elapsed_s:
                path.unlink(missing_ok=True)

    def take(self, model: nn.Module, step: int, time_s: float) -> bool:
        """Keep the model if it is time to; tell whether it was."""
        due = time_s >= self._next_s
        if due:
            self._next_s += self._every_s
            self.keep(model, step, time_s)
        return due

    def keep(self, model: nn.Module, step: int, time_s: float) -> None:
        """Keep the model."""
        with replacing(self._folder / f"snapshot{step:06d}.pt") as path:
            torch.save({"step": step, "time_s": time_s, "model": model.state_dict()}, path)


def snapshots(folder: Path) -> list[Path]:
    """Return the files of the models that were kept, in order; the last one is the job's result."""
    return sorted(folder.glob("snapshot*.pt"))


@torch.no_grad()
def gather_statistics(
    model: nn.Module, data: CocoImages, *, images: int = STATISTICS_IMAGES, batch_size: int = 8
) -> None:
    """Gather BatchNorm's statistics anew over training images of all workers, for every job alike.

    Those of a job are a matter of who gathered them: DDP takes rank 0's, who has seen its own images only.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    model.train()
    chosen = np.random.default_rng(0).permutation(len(data))[:images].tolist()
    for batch, targets in DataLoader(Subset(data, chosen), batch_size=batch_size, collate_fn=collate, drop_last=True):
        model(batch, targets)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


@torch.no_grad()
def detect(model: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return torchvision's detections, one dictionary of boxes, labels and scores per image."""
    model.eval()
    return model(list(images))


def coco_results(model: nn.Module, data: CocoImages, *, batch_size: int = 16) -> list[dict[str, Any]]:
    """Run the model over the data; return its detections in COCO's result format."""
    results = []
    for images, targets in DataLoader(data, batch_size=batch_size, collate_fn=collate):
        for target, found in zip(targets, detect(model, images)):
            results.extend(_coco_records(int(target["image_id"]), found, data.category_ids))
    return results


def _coco_records(image_id: int, found: dict[str, Tensor], category_ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    corners = found["boxes"]
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    for box, label, score in zip(boxes.tolist(), found["labels"].tolist(), found["scores"].tolist()):
        yield {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}


def ap50(data: CocoImages, results: Sequence[dict[str, Any]], labels: Sequence[int] | None = None) -> float:
    """Return COCO's average precision at IoU 0.5: the mean over labels (1..C), all of them by default.

    Labels that do not occur in the data do not count; nan where none does.
    """
    chosen = range(1, len(data.category_ids) + 1) if labels is None else labels
    if not chosen:
        return float("nan")
    if not results:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress by print
        evaluation = COCOeval(data.coco, data.coco.loadRes(list(results)), "bbox")
        evaluation.params.catIds = [data.category_ids[label - 1] for label in chosen]
        evaluation.params.imgIds = list(data.image_ids)
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # [recall, label]: boxes of all sizes
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
