"""The published tables: a line per scheme instead of every run, and questions to them."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.files import replacing
from numpy.typing import NDArray
from scipy.stats import t as student

from torch_qgc.errors import ConfigError

#: One row per panel, budget, quantizer and scheme.
#: initial_loss, final_loss: means over runs; lowest, highest: final losses of runs; cut: runs that ended above CAP.
#: over_ideal, over_low, over_high: the mean final loss over the ideal's, and its 95 % interval over paired runs.
#: final, mean: whether its final loss and its mean loss over the run are below, level with or above ours.
#: largest_share: of the data, that the plan gives to one worker, mean over runs; of ours.
SCHEME_FIELDS = (
    *("panel", "bits", "quantizer", "scheme", "runs", "initial_loss", "final_loss", "lowest", "highest", "cut"),
    *("over_ideal", "over_low", "over_high", "final", "mean", "largest_share"),
)
#: One row per scheme at a quarter, half and all of the bits that ours sends in figure 2a.
BITS_FIELDS = ("quantizer", "scheme", "part", "total_bits", "loss")
#: One row per trained detector: see detectors.examine.
DETECTION_FIELDS = ("panel", "bits", "quantizer", "scheme", "run", "ap50", "found", "false", "top_score")
_TEXT = {"panel", "quantizer", "scheme", "method", "final", "mean"}
CAP = 2.0  # times the initial loss: a run that ends above it, or without a number, counts as that

Row = Mapping[str, Any]


def write(path: Path, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows as CSV, floats with six digits."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v := row[name], float) else v for name in fields])


def read(path: Path) -> list[dict[str, Any]]:
    """Read what `write` wrote, numbers as float.

    Raises:
        ConfigError: no such file.
    """
    if not path.exists():
        raise ConfigError(
            f"expected {path}, got no such file: run the experiments first (python examples/paper/run.py)"
        )
    with path.open(newline="") as file:
        return [
            {name: value if name in _TEXT else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


# ------------------------------------------------------------------------------------- from runs to schemes
def interval(gaps: NDArray[np.float64], *, level: float = 0.95) -> tuple[float, float]:
    """Return Student's confidence interval of the mean of paired differences; infinite for a single one.

    Runs share workers, delays, initial parameters and batches, so their differences vary less than they do.
    """
    if len(gaps) < 2:
        return -np.inf, np.inf
    reach = student.ppf(0.5 + level / 2, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return float(gaps.mean() - reach), float(gaps.mean() + reach)


def against(theirs: NDArray[np.float64], ours: NDArray[np.float64]) -> str:
    """Say whether losses are "below" or "above" ours, "level" if the interval holds zero, or "" if there is one run."""
    low, high = interval(theirs - ours)
    return "" if len(ours) < 2 else "below" if high < 0 else "above" if low > 0 else "level"


def summarize(runs: Iterable[Row], largest_share: Callable[[Row, int], float]) -> list[dict[str, Any]]:
    """Put runs together to rows of SCHEME_FIELDS.

    Args:
        runs: panel, bits, quantizer, scheme, run, initial_loss, final_loss and mean_loss of each.
        largest_share: (a run of ours, number of its runs) -> the mean over these runs.
    """
    groups: dict[tuple[str, float, str, str], list[Row]] = {}
    for row in sorted(runs, key=lambda row: row["run"]):
        groups.setdefault((row["panel"], row["bits"], row["quantizer"], row["scheme"]), []).append(row)
    found = []
    for (panel, bits, quantizer, scheme), rows in groups.items():
        ideal = _losses(groups[panel, 0.0, "", "sgd"], "final_loss")
        ours = groups.get((panel, bits, quantizer, "qgc"))
        final = _losses(rows, "final_loss")
        low, high = 1 + np.array(interval(final - ideal)) / ideal.mean()
        found.append(
            {
                **dict(panel=panel, bits=bits, quantizer=quantizer, scheme=scheme, runs=len(rows)),
                "initial_loss": float(np.mean([row["initial_loss"] for row in rows])),
                "final_loss": float(final.mean()),
                "lowest": float(final.min()),
                "highest": float(final.max()),
                "cut": sum(not row["final_loss"] <= CAP * row["initial_loss"] for row in rows),
                "over_ideal": float(final.mean() / ideal.mean()),
                "over_low": float(low),
                "over_high": float(high),
                "final": against(final, _losses(ours, "final_loss")) if ours else "",
                "mean": against(_losses(rows, "mean_loss"), _losses(ours, "mean_loss")) if ours else "",
                "largest_share": largest_share(rows[0], len(rows)) if scheme == "qgc" else float("nan"),
            }
        )
    return found


def _losses(rows: Iterable[Row], field: str) -> NDArray[np.float64]:
    """Return one loss per run, cut where it is too high or no number."""
    tops = [(float(row[field]), CAP * float(row["initial_loss"])) for row in rows]
    return np.array([loss if loss <= top else top for loss, top in tops])  # NaN is not <= top


def at_equal_bits(curves: Iterable[Row]) -> list[dict[str, Any]]:
    """Return rows of BITS_FIELDS from figure 2a's mean curves: quantizer, scheme, total_bits and loss of each point."""
    points: dict[tuple[str, str], list[Row]] = {}
    for row in curves:
        points.setdefault((row["quantizer"], row["scheme"]), []).append(row)
    found = []
    for (quantizer, scheme), rows in points.items():
        ours = points.get((quantizer, "qgc"))
        if ours and np.isfinite(rows[-1]["loss"]):
            bits, losses = ([row[name] for row in rows] for name in ("total_bits", "loss"))
            for part in (0.25, 0.5, 1.0):
                spent = part * ours[-1]["total_bits"]
                values = (quantizer, scheme, part, spent, float(np.interp(spent, bits, losses)))
                found.append(dict(zip(BITS_FIELDS, values)))
    return found


# ------------------------------------------------------------------------------------------------ questions
class Schemes:
    """Rows of SCHEME_FIELDS. The ideal SGD, which sends nothing, is found under every budget and quantizer."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._found = {(row["panel"], row["bits"], row["quantizer"], row["scheme"]): row for row in self.rows}

    def panels(self) -> list[str]:
        """Return the panels there are rows of."""
        return list(dict.fromkeys(row["panel"] for row in self.rows))

    def budgets(self, panel: str) -> list[float]:
        """Return the budgets of a panel, rising."""
        return sorted({row["bits"] for row in self.rows if row["panel"] == panel and row["bits"] > 0})

    def quantizers(self, panel: str) -> list[str]:
        """Return the quantizers of a panel."""
        return list(dict.fromkeys(row["quantizer"] for row in self.rows if row["panel"] == panel and row["quantizer"]))

    def schemes(self, panel: str) -> list[str]:
        """Return the schemes of a panel."""
        return list(dict.fromkeys(row["scheme"] for row in self.rows if row["panel"] == panel))

    def of(self, panel: str, scheme: str, bits: float = 0.0, quantizer: str = "") -> Row:
        """Return a scheme's row.

        Raises:
            ConfigError: there is none.
        """
        row = self._found.get((panel, bits, quantizer, scheme)) or self._found.get((panel, 0.0, "", scheme))
        if row is None:
            raise ConfigError(f"expected runs of {scheme!r} in panel {panel} at {bits:g} bits, {quantizer}, got none")
        return row
