"""The experiments' tables: CSV files, and questions to them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from torch_qgc.errors import ConfigError

#: One row per point of a curve: mean and range over runs.
CURVE_FIELDS = ("panel", "bits", "quantizer", "scheme", "step", "total_bits", "loss", "lowest", "highest")
#: One row per run. validation: see task.Task; residual: median over rounds of the decoded gradient's relative error;
#: arrived: fraction of workers in a round; round_s: mean on the virtual clock.
RUN_FIELDS = (
    *("panel", "bits", "quantizer", "scheme", "run"),
    *("initial_loss", "mean_loss", "final_loss", "validation", "residual", "bits_per_step", "arrived", "round_s"),
)
#: One row per trained detector: see detectors.examine.
DETECTION_FIELDS = ("panel", "bits", "quantizer", "scheme", "run", "ap50", "found", "false", "top_score")
_TEXT = {"panel", "quantizer", "scheme", "method"}

Row = Mapping[str, Any]


def write(path: Path, fields: Sequence[str], rows: Iterable[Row]) -> None:
    """Write rows as CSV, floats with six digits; the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v := row[name], float) else v for name in fields])
    partial.replace(path)


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


@dataclass(frozen=True)
class Difference:
    """How one scheme's loss compares with another's over the same runs.

    Fields:
        ratio: of the mean losses.
        verdict: -1: lower, 1: higher, 0: level, None: too few runs to say.
    """

    ratio: float
    verdict: int | None


def difference(ours: Sequence[float], theirs: Sequence[float], *, level: float = 0.95) -> Difference:
    """Compare paired runs: lower or higher if Student's confidence interval of the mean difference leaves out zero.

    Runs share workers, delays, initial parameters and batches, so their differences vary less than they do.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    gaps = a - b
    ratio = float(a.mean() / b.mean())
    if len(gaps) < 2:
        return Difference(ratio, None)
    reach = student.ppf(0.5 + level / 2, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return Difference(ratio, 0 if abs(gaps.mean()) <= reach else int(np.sign(gaps.mean())))


class Runs:
    """Rows of RUN_FIELDS, asked by panel, budget, quantizer and scheme.

    The ideal SGD, which sends nothing, is found under every budget and quantizer. A run that has ended above `cap`
    times its initial loss, or without a number, counts as having ended there: otherwise one diverged run would hide
    all others.
    """

    cap = 2.0

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, float, str, str], list[Row]] = {}
        for row in sorted(rows, key=lambda row: row["run"]):
            key = row["panel"], float(row["bits"]), row["quantizer"], row["scheme"]
            self._rows.setdefault(key, []).append(row)

    def panels(self) -> list[str]:
        """Return the panels there are rows of."""
        return list(dict.fromkeys(key[0] for key in self._rows))

    def budgets(self, panel: str) -> list[float]:
        """Return the budgets of a panel, rising."""
        return sorted({key[1] for key in self._rows if key[0] == panel and key[1] > 0})

    def quantizers(self, panel: str) -> list[str]:
        """Return the quantizers of a panel."""
        return list(dict.fromkeys(key[2] for key in self._rows if key[0] == panel and key[2]))

    def schemes(self, panel: str) -> list[str]:
        """Return the schemes of a panel."""
        return list(dict.fromkeys(key[3] for key in self._rows if key[0] == panel))

    def values(self, field: str, panel: str, scheme: str, bits: float = 0.0, quantizer: str = "") -> list[float]:
        """Return one number per run; losses that are not finite, or too high, are cut.

        Raises:
            ConfigError: there are no such runs.
        """
        rows = self._of(panel, scheme, bits, quantizer)
        values = [float(row[field]) for row in rows]
        if field not in ("final_loss", "mean_loss"):
            return values
        tops = [self.cap * float(row["initial_loss"]) for row in rows]
        return [value if value <= top else top for value, top in zip(values, tops)]  # NaN is not <= top

    def is_cut(self, panel: str, scheme: str, bits: float = 0.0, quantizer: str = "") -> bool:
        """Return whether the final loss of any run is cut."""
        rows = self._of(panel, scheme, bits, quantizer)
        return not all(row["final_loss"] <= self.cap * row["initial_loss"] for row in rows)

    def _of(self, panel: str, scheme: str, bits: float, quantizer: str) -> list[Row]:
        rows = self._rows.get((panel, bits, quantizer, scheme)) or self._rows.get((panel, 0.0, "", scheme))
        if rows is None:
            raise ConfigError(f"expected runs of {scheme!r} in panel {panel} at {bits:g} bits, {quantizer}, got none")
        return rows

    def mean(self, field: str, panel: str, scheme: str, bits: float = 0.0, quantizer: str = "") -> float:
        """Return the mean of `values`."""
        return float(np.mean(self.values(field, panel, scheme, bits, quantizer)))
