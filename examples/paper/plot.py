"""The experiments' figure: the final loss over the ideal's of every scheme in every panel."""

from __future__ import annotations

import io
from pathlib import Path

from common.files import replacing
from matplotlib.figure import Figure
from PIL import Image

from paper.config import Experiments
from paper.contestants import IDEAL, label
from paper.tables import Schemes

SHORT_NAMES = {"l2": "L2 scale", "max": "max norm"}
STYLES = {"l2": ("#1f77b4", "o", 0.15), "max": ("#d62728", "s", -0.15)}  # colour, marker, height above the line
COLUMNS = 4
FAR = 3.0  # what is further away is drawn as an arrow's tip at the border


def final_losses(experiments: Experiments, found: Schemes, path: Path) -> None:
    """Draw a field per panel and budget, a line per scheme: mean over runs and its 95 % interval."""
    fields = [(panel, bits) for panel in found.panels() for bits in found.budgets(panel)]
    rows = -(-len(fields) // COLUMNS)
    most = max(len(found.schemes(panel)) for panel in found.panels())
    figure = Figure(figsize=(3.4 * COLUMNS, (0.19 * most + 0.55) * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat[len(fields) :]:
        axes.axis("off")
    for axes, (panel, bits) in zip(grid.flat, fields):
        schemes = [scheme for scheme in found.schemes(panel) if scheme != IDEAL]
        axes.axvline(1.0, color="black", linewidth=0.8)
        for quantizer in found.quantizers(panel):
            colour, marker, above = STYLES[quantizer]
            for place, scheme in enumerate(schemes):
                row = found.of(panel, scheme, bits, quantizer)
                height, ratio = above - place, row["over_ideal"]
                low, high = (min(max(row[name], 0.5), FAR) for name in ("over_low", "over_high"))
                if row["runs"] > 1:
                    axes.plot([low, high], [height, height], color=colour, linewidth=1)
                shown = (FAR, ">") if ratio > FAR else (ratio, marker)
                axes.plot(shown[0], height, shown[1], color=colour, markersize=3.5, clip_on=False)
        axes.set_yticks([-place for place in range(len(schemes))], [label(scheme) for scheme in schemes], fontsize=6)
        axes.set(xscale="log", xlim=(0.85, FAR), ylim=(0.6 - len(schemes), 0.5))
        axes.set_xticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"], fontsize=6)
        axes.minorticks_off()
        axes.set_title(f"{experiments.panel(panel).heading}, {bits:g} bits", fontsize=7)
        axes.grid(alpha=0.3, axis="x")
    for quantizer, (colour, marker, _) in STYLES.items():
        grid.flat[0].plot([], [], marker, color=colour, markersize=3.5, label=SHORT_NAMES[quantizer])
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    with replacing(path) as partial:  # 64 colours: a third of the size, and nobody sees the difference
        Image.open(buffer).convert("RGB").quantize(64).save(partial, format="png", optimize=True)
