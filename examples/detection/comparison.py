"""Run the jobs one after the other, then judge their models by the same images."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from common.launcher import launch
from common.result import Result, show
from rich.console import Console
from rich.progress import track
from torch import nn

from detection import evaluation, plots, report
from detection.curves import curves
from detection.data import CocoImages, held_by_workers, labels_only_at
from detection.model import build_model
from detection.report import Outcome
from detection.settings import SLOW_WORKER, Settings

VAL_IMAGES = 200  # for AP50
LOSS_IMAGES = 64  # for each point of the loss curve; evaluated after the jobs, so it costs them no time
PICTURED = 4


def run(script: Path, shared: Settings, jobs: Sequence[str], console: Console) -> list[Outcome]:
    """Train each job, evaluate all, and write the table, the figures and the report to `shared.folder`."""
    data = CocoImages(shared.data, "train")
    held = held_by_workers(data, shared)
    _, total_steps = shared.schedule(len(held[0]))
    results = [
        train(script, dataclasses.replace(shared, job=job, folder=shared.folder / job), total_steps, console)
        for job in jobs
    ]
    val = CocoImages(shared.data, "val", limit=VAL_IMAGES)
    slow_labels = labels_only_at(data, held, SLOW_WORKER)
    outcomes = evaluate(shared, dict(zip(jobs, results)), val, slow_labels, console)
    curves({"validation loss": {o.result.title: o.curve for o in outcomes}}, shared.folder / "loss_vs_time.png")
    models = {o.result.title: _load(shared, val, shared.folder / job / "model.pt") for job, o in zip(jobs, outcomes)}
    plots.detections(models, val, shared.folder / "detections.png", count=PICTURED)
    slow_names = [val.categories[label - 1] for label in slow_labels]
    (shared.folder / "report.md").write_text(report.markdown(outcomes, shared, slow_names))
    show(results, console, report.rows(outcomes, slow_names))
    console.print(f"Figures and report: {shared.folder}")
    return outcomes


def train(script: Path, settings: Settings, total_steps: int, console: Console) -> Result:
    """Train one job, or take its result if it had ended before the comparison was resumed."""
    if not settings.resume:
        shutil.rmtree(settings.folder, ignore_errors=True)
    if not (settings.folder / "result.json").exists():
        settings.folder.mkdir(parents=True, exist_ok=True)
        settings.save(settings.folder / "settings.json")
        launch(
            [str(script), "train", str(settings.folder / "settings.json")],
            settings.folder,
            workers=settings.workers,
            title=settings.variant.title,
            steps=total_steps,
            console=console,
        )
    return Result.load(settings.folder)


def evaluate(
    shared: Settings,
    results: Mapping[str, Result],
    val: CocoImages,
    slow_labels: Sequence[int],
    console: Console,
) -> list[Outcome]:
    """Compute validation losses along the way, and AP50 at the end and when the fastest job ended."""
    torch.set_num_threads(1)  # for so small a model more threads only wait for each other
    equal_s = min(result.wall_s for result in results.values())
    outcomes = []
    for job, result in track(results.items(), "Evaluating", console=console, transient=True):
        folder = shared.folder / job
        curve, best_early = [], None
        for snapshot in evaluation.snapshots(folder):
            model = _load(shared, val, snapshot["model"])
            loss = evaluation.validation_loss(model, val, images=LOSS_IMAGES)
            curve.append((snapshot["step"], snapshot["time_s"], loss))
            if snapshot["time_s"] <= equal_s:
                best_early = model
        model = _load(shared, val, folder / "model.pt")
        curve.append((result.steps, result.wall_s, evaluation.validation_loss(model, val, images=LOSS_IMAGES)))
        found = evaluation.coco_results(model, val)
        early = found if result.wall_s <= equal_s else _results(best_early, val)
        outcomes.append(
            Outcome(
                result=result,
                curve=curve,
                ap50=evaluation.ap50(val, found),
                ap50_slow=evaluation.ap50(val, found, slow_labels),
                ap50_equal_time=evaluation.ap50(val, early),
                loss_equal_time=report.at_time(curve, equal_s),
            )
        )
    return outcomes


def _results(model: nn.Module | None, val: CocoImages) -> list[dict]:
    return [] if model is None else evaluation.coco_results(model, val)


def _load(shared: Settings, val: CocoImages, state: Path | dict) -> nn.Module:
    model = build_model(len(val.categories) + 1, backbone=shared.backbone, size=shared.size)
    model.load_state_dict(torch.load(state, weights_only=True) if isinstance(state, Path) else state)
    return model
