"""Fig. 4: what the model of each scheme detects on one validation picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detection.evaluation import detect
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from torch import Tensor

from paper import plots
from paper.config import Detections, Experiments
from paper.contestants import IDEAL, label
from paper.convergence import Job, jobs, load_task
from paper.detectors import SHOWN_SCORE

COLUMNS = 5


def picture(experiments: Experiments, out: Path, data_dir: Path, path: Path) -> bool:
    """Draw the models that the first run has left; return False where there are none."""
    chosen = experiments.detections
    files = [
        (job, out / "runs" / f"{job.name}.pt") for job in jobs(experiments, [chosen.panel]) if _is_chosen(job, chosen)
    ]
    files = [(job, file) for job, file in files if file.exists()]
    if not files:
        return False
    task = load_task(files[0][0].workload.task, data_dir)
    image, target = task.pictures[chosen.picture]
    found: dict[str, Mapping[str, Tensor]] = {"true boxes": target}
    for job, file in files:
        network = task.build()
        network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        found[label(job.scheme)] = detect(network, [image])[0]
    _draw(image, found, task.pictures.categories, path)
    return True


def _is_chosen(job: Job, chosen: Detections) -> bool:
    return job.run == 0 and (job.scheme == IDEAL or job.quantizer == chosen.quantizer)


def _draw(image: Tensor, found: Mapping[str, Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    rows = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(1.9 * COLUMNS, 2.2 * rows), layout=ConstrainedLayoutEngine(h_pad=0.12))
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, boxes) in zip(grid.flat, found.items()):
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=8)
        _boxes(axes, boxes, names)
    plots.save(figure, path)


def _boxes(axes: Axes, boxes: Mapping[str, Any], names: Sequence[str]) -> None:
    scores = boxes.get("scores", torch.ones(len(boxes["boxes"])))
    colour = "#ffd92f" if "scores" in boxes else "white"
    for (x0, y0, x1, y1), named, score in zip(boxes["boxes"].tolist(), boxes["labels"].tolist(), scores.tolist()):
        if score < SHOWN_SCORE:
            continue
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.2))
        text = f"{names[named - 1]} {score:.2f}" if "scores" in boxes else names[named - 1]
        background = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axes.text(x0, y0, text, fontsize=6, verticalalignment="bottom", bbox=background)
