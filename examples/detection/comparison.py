"""Run jobs one after the other, then judge the models that they kept, all by the same images."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.files import replacing
from common.launcher import JobError, launch
from common.result import Result
from rich.console import Console
from rich.progress import track
from torch import nn

from detection import evaluation
from detection.data import CocoImages, labels_only_at, partition
from detection.model import build_model
from detection.settings import MACHINES, SLOW_LINK, SLOW_PROCESSOR, Settings

VAL_IMAGES = 100
JUDGES = 2  # processes


@dataclass(frozen=True, kw_only=True)
class Point:
    """How good a job's model is at some time: seconds and steps since the start, and average precisions."""

    time_s: float
    step: int
    ap50: float
    ap50_slow: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job that has ended, and what its models along the way are worth.

    Fields:
        settings, result: the job.
        points: in order, the last one at its end.
    """

    settings: Settings
    result: Result
    points: Sequence[Point]

    @property
    def title(self) -> str:
        """What pictures call the job."""
        return self.result.title

    def seconds_to(self, level: float) -> float:
        """Return when an AP50 was reached first, between two points by interpolation; inf if it was not."""
        return seconds_to(level, [p.time_s for p in self.points], [p.ap50 for p in self.points])


def seconds_to(level: float, times_s: Sequence[float], values: Sequence[float]) -> float:
    """Return when a curve that begins with 0 at 0 first reaches a level; inf if it does not."""
    times, found = np.array([0.0, *times_s]), np.array([0.0, *values])
    reached = np.flatnonzero(found >= level)
    if not reached.size:
        return float("inf")
    after = int(reached[0])
    return float(np.interp(level, found[after - 1 : after + 1], times[after - 1 : after + 1])) if after else 0.0


def run(script: Path, settings: Settings, console: Console, *, title: str) -> Result:
    """Train one job, or take its result if it had ended before the comparison was resumed.

    Raises:
        JobError: it failed, or `settings.folder` holds a job with other settings.
    """
    if not settings.resume:
        shutil.rmtree(settings.folder, ignore_errors=True)
    file = settings.folder / "settings.json"
    if file.exists() and dataclasses.replace(Settings.load(file), resume=True) != settings:
        raise JobError(
            f"{settings.folder} holds a job with other settings: leave out --resume, or choose another --out"
        )
    if not (settings.folder / "result.json").exists():
        settings.save(file)
        launch(
            [str(script), "train", str(file)],
            settings.folder,
            workers=settings.workers,
            title=title,
            steps=round(settings.total_s),
            console=console,
        )
    return Result.load(settings.folder)


def judge(jobs: Sequence[tuple[Settings, Result]], console: Console) -> list[Outcome]:
    """Compute the average precision of every model that was kept, in two processes."""
    models = [(s, path) for s, _ in jobs for path in evaluation.snapshots(s.folder)]
    one_thread = dict(initializer=torch.set_num_threads, initargs=(1,))  # more of them only wait for each other
    with ProcessPoolExecutor(JUDGES, mp_context=get_context("spawn"), **one_thread) as pool:
        points = list(
            track(pool.map(_judged, models), "Evaluating", total=len(models), console=console, transient=True)
        )
    return [
        Outcome(settings=s, result=result, points=[point for (of, _), point in zip(models, points) if of is s])
        for s, result in jobs
    ]


def load(s: Settings, state: dict[str, Any], train: CocoImages) -> nn.Module:
    """Return a model that was kept, with BatchNorm's statistics gathered anew."""
    model = build_model(len(train.categories) + 1, backbone=s.backbone, size=s.size)
    model.load_state_dict(state)
    evaluation.gather_statistics(model, train)
    return model


def slow_labels(data: CocoImages, s: Settings) -> list[int]:
    """Return the labels of what only the two slow workers have, where data stay where they are."""
    held = partition(data, [1.0] * len(MACHINES), moves=False, seed=s.seed)
    return [label for worker in (SLOW_LINK, SLOW_PROCESSOR) for label in labels_only_at(data, held, worker)]


def _judged(kept_by: tuple[Settings, Path]) -> Point:
    """Judge a model. What is found is kept beside it, so that resuming does not judge it again."""
    s, path = kept_by
    scored = path.with_suffix(".json")
    if not scored.exists():
        kept: dict[str, Any] = torch.load(path, weights_only=True)
        train, val = CocoImages(s.data, "train"), CocoImages(s.data, "val", limit=VAL_IMAGES)
        found = evaluation.coco_results(load(s, kept["model"], train), val)
        slow = slow_labels(train, s)
        point = Point(
            time_s=kept["time_s"] / s.pace,
            step=kept["step"],
            ap50=evaluation.ap50(val, found),
            ap50_slow=evaluation.ap50(val, found, slow),
        )
        with replacing(scored) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(point)))
    return Point(**json.loads(scored.read_text()))
