"""The demo's picture of detections."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from detection.curves import COLOURS
from detection.data import CocoImages
from detection.evaluation import detect

SURE = 0.3  # boxes with a lower score are dashed


def detections(models: Mapping[str, nn.Module], data: CocoImages, path: Path, *, count: int) -> None:
    """Draw the first images of the data: a row per image, the people's boxes first, then each model's.

    Of every model there are as many boxes as there are objects, those with the highest scores, so that one sees what
    a model that is not sure of anything would say.
    """
    items = [data[index] for index in range(min(count, len(data)))]
    images, truth = [image for image, _ in items], [target for _, target in items]
    columns = {"true": truth}
    columns |= {
        title: [_best(found, len(target["labels"])) for found, target in zip(detect(model, images), truth)]
        for title, model in models.items()
    }
    figure = Figure(figsize=(2.6 * len(columns), 2.6 * len(items) + 0.3), layout="constrained")
    grid = figure.subplots(len(items), len(columns), squeeze=False)
    for column, (title, all_found) in enumerate(columns.items()):
        colour = "white" if column == 0 else COLOURS[(column - 1) % len(COLOURS)]
        grid[0, column].set_title(title, fontsize=9)
        for axes, image, found in zip(grid[:, column], images, all_found):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.axis("off")
            _draw_boxes(axes, found, data.categories, colour)
    figure.savefig(path, dpi=120)


def _best(found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    best = found["scores"].argsort(descending=True)[:count]
    return {key: values[best] for key, values in found.items()}


def _draw_boxes(axes: Axes, found: Mapping[str, Tensor], names: Sequence[str], colour: str) -> None:
    scores = found.get("scores")
    for number, ((x0, y0, x1, y1), label) in enumerate(zip(found["boxes"].tolist(), found["labels"].tolist())):
        score = None if scores is None else float(scores[number])
        style = "-" if score is None or score >= SURE else "--"
        axes.add_patch(
            Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.5, linestyle=style)
        )
        axes.text(
            x0,
            y0,
            names[label - 1] if score is None else f"{names[label - 1]} {score:.2f}",
            fontsize=7,
            color="black",
            verticalalignment="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
        )
