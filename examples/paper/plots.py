"""The experiments' figures."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from paper import allocators
from paper.contestants import label
from paper.tables import Row

DPI = 100
SHORT_NAMES = {"paper": "paper's bound", "l2": "L2 scale", "max": "max norm"}
QUANTIZER_NAMES = {"l2": "L2 scale (the paper's quantizer)", "max": "max norm (ours)"}
# The same colour for a code wherever it appears; variants of it are dashed.
_COLOURS = {
    "sgd": "#000000",
    "qgc": "#d62728",
    "is_sgd": "#7f7f7f",
    "bgc": "#bcbd22",
    "erasurehead": "#17becf",
    "sgc": "#1f77b4",
    "one_bit_sgc": "#aec7e8",
    "od": "#2ca02c",
    "osgc": "#9467bd",
    "fractional_repetition": "#8c564b",
    "cyclic_mds": "#c49c94",
}
_STYLES = {"qgc_noise": "--", "qgc_noise_9": ":", "qgc_equal_bits": ":", "qgc_one_track": "--", "qgc_lmmse": ":"}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with 128 colours: a third of the size, and nobody sees the difference."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True)


def allocation(rows: Sequence[Row], path: Path) -> None:
    """Fig. 1: the mean residual over draws against the budget; a row per system size, a column per quantizer."""
    quantizers = list(dict.fromkeys(row["quantizer"] for row in rows))
    sizes = sorted({row["workers"] for row in rows})
    figure = Figure(figsize=(3.6 * len(quantizers), 2.7 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(quantizers), squeeze=False, sharex=True)
    styles = {
        "exact": dict(color="black", linewidth=2.5, alpha=0.4),
        "dp": dict(color="#1f77b4", marker="o", linestyle=""),
        "low_complexity": dict(color="#d62728", linestyle="--"),
        "greedy": dict(color="#ff7f0e", marker="+"),
        "relaxation": dict(color="#2ca02c", marker="x"),
        "equal": dict(color="#7f7f7f", linestyle="-."),
    }
    for line, workers in zip(grid, sizes):
        for axes, quantizer in zip(line, quantizers):
            for method, style in styles.items():
                points: dict[float, list[float]] = {}
                for row in rows:
                    if (row["quantizer"], row["workers"], row["method"]) == (quantizer, workers, method):
                        points.setdefault(row["bits"], []).append(row["residual"])
                means = [np.mean(values) for values in points.values()]
                shown = {"linewidth": 1, "markersize": 5, "fillstyle": "none", **style}
                axes.semilogy(list(points), means, label=allocators.LABELS[method], **shown)
            axes.set_title(f"K = {workers:g}, {allocators.QUANTIZERS[quantizer]}", fontsize=8)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("budget B / K, bits per coordinate", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("residual", fontsize=8)
    grid[0, 0].legend(fontsize=7, frameon=False)
    save(figure, path)


def convergence(rows: Iterable[Row], title: str, path: Path, *, over: str = "step") -> None:
    """Draw the curves of one panel: mean over runs, and the range from the lowest to the highest run.

    Args:
        rows: of tables.CURVE_FIELDS, of this panel.
        over: "step" or "total_bits".
    """
    curves = _grouped(rows)
    budgets = sorted({bits for bits, _, _ in curves if bits > 0})
    quantizers = [q for q in QUANTIZER_NAMES if any(q == quantizer for _, quantizer, _ in curves)]
    shape = (len(quantizers), len(budgets)) if len(budgets) > 1 else (1, len(quantizers))
    figure = Figure(figsize=(max(7.0, 3.1 * shape[1] + 2.2), 2.9 * shape[0]), layout="constrained")
    grid = figure.subplots(*shape, squeeze=False, sharex=True, sharey=True)
    cells = [(quantizer, bits) for quantizer in quantizers for bits in budgets]
    for axes, (quantizer, bits) in zip(grid.flat, cells):
        drawn = {s: points for (b, q, s), points in curves.items() if (b, q) in ((bits, quantizer), (0.0, ""))}
        if over == "total_bits":
            drawn.pop("sgd", None)  # it sends nothing
        for scheme, points in drawn.items():
            _curve(axes, scheme, points, over)
        axes.set_title(f"{QUANTIZER_NAMES[quantizer]}, B / K = {bits:g}", fontsize=8)
    _frame(grid, curves, title, over)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=7, frameon=False)
    save(figure, path)


def _curve(axes: Axes, scheme: str, points: Sequence[Row], over: str) -> None:
    base = scheme.removeprefix("ef_").removeprefix("efc_")
    colour = _COLOURS.get(base, _COLOURS["qgc"])
    style = ":" if scheme.startswith("efc_") else _STYLES.get(scheme, "-")
    x = [point[over] for point in points]
    lowest, loss, highest = ([point[name] for point in points] for name in ("lowest", "loss", "highest"))
    bold = 1.8 if scheme in ("sgd", "qgc") else 1.0
    axes.plot(x, loss, style, color=colour, linewidth=bold, label=label(scheme), zorder=2 + bold)
    axes.fill_between(x, lowest, highest, color=colour, alpha=0.12, linewidth=0)


def _frame(grid: np.ndarray, curves: Mapping[Any, Sequence[Row]], title: str, over: str) -> None:
    """Label the axes; what diverges leaves the picture at the top."""
    losses = np.array([point["loss"] for points in curves.values() for point in points])
    start = max(points[0]["loss"] for points in curves.values())
    floor = float(losses[np.isfinite(losses) & (losses > 0)].min())
    for axes in grid.flat:
        axes.set(yscale="log", ylim=(0.85 * floor, 1.4 * start))
        axes.grid(alpha=0.3, which="both")
    for axes in grid[-1]:
        axes.set_xlabel("round" if over == "step" else "bits sent by all workers", fontsize=8)
    for axes in grid[:, 0]:
        axes.set_ylabel("training loss", fontsize=8)
    grid.flat[0].figure.suptitle(title, fontsize=9)


def _grouped(rows: Iterable[Row]) -> dict[tuple[float, str, str], list[Row]]:
    grouped: dict[tuple[float, str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((float(row["bits"]), row["quantizer"], row["scheme"]), []).append(row)
    return grouped
