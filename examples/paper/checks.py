"""Looks at the tables, one for each kind of claim: every check yields what it has found, and how far that agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paper.contestants import label
from paper.tables import Row, Runs, difference

CLOSE = 1.10  # "virtually identical", "tracks", "comparable": a final loss at most a tenth above
MODERATE = 1.5  # "only a moderate performance drop"
GAP = 1e-3  # residuals further apart than this are different
FAILS = 0.5  # "fails to converge": the final loss is above this part of the initial one
CODES = ("bgc", "erasurehead", "sgc", "one_bit_sgc", "od", "osgc", "is_sgd")


@dataclass(frozen=True)
class Tables:
    """Everything that has been computed; what has not is empty."""

    runs: Runs
    allocation: Sequence[Row] = ()
    curves: Sequence[Row] = ()
    detections: Sequence[Row] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and how far it agrees with the claim.

    Fields:
        agrees: 1: fully, 0: not at all, between: in so many of the cases; None: there are too few runs to say.
    """

    text: str
    agrees: float | None


#: (tables, quantizer) -> findings; none where nothing has been computed.
Check: TypeAlias = Callable[[Tables, str], Iterable[Finding]]


# ------------------------------------------------------------------------------------------------ Fig. 1
def _gaps(tables: Tables, quantizer: str, method: str) -> dict[int, list[float]]:
    """Return a method's relative excess over the dynamic program, by system size; the least budget is no choice."""
    chosen = [row for row in tables.allocation if row["quantizer"].startswith(quantizer)]
    best = {setting(row): row["residual"] for row in chosen if row["method"] == "dp"}
    gaps: dict[int, list[float]] = {}
    for row in chosen:
        if row["method"] == method and row["bits"] > 2:
            gaps.setdefault(int(row["workers"]), []).append(row["residual"] / best[setting(row)] - 1.0)
    return gaps


def setting(row: Row) -> tuple[object, ...]:
    """Return what the allocators of a row were given."""
    return row["quantizer"], row["workers"], row["bits"], row["draw"]


def algorithm_is_optimal(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Algorithm 1 is nowhere more than GAP above the dynamic program."""
    for workers, gaps in _gaps(tables, quantizer, "low_complexity").items():
        text = f"K = {workers}: at most {max(gaps):.2%} above the optimum in {len(gaps)} settings"
        yield Finding(text, max(gaps) <= GAP)


def heuristics_get_stuck(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Greedy and relaxation are more than GAP above it in a quarter of the settings or more."""
    for method in ("greedy", "relaxation"):
        for workers, gaps in _gaps(tables, quantizer, method).items():
            stuck = float(np.mean(np.array(gaps) > GAP))
            above = float(np.median([gap for gap in gaps if gap > GAP] or [0.0]))
            text = f"{method}, K = {workers}: above it in {stuck:.0%} of settings, there by {above:.1%} in the median"
            yield Finding(text, stuck >= 0.25)


# --------------------------------------------------------------------------------------- losses compared
def beats_all(*panels: str, field: str = "final_loss") -> Check:
    """Return the check that ours is below every other code in each of these panels."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel, bits in _settings(tables, panels, quantizer):
            mine = tables.runs.values(field, panel, "qgc", bits, quantizer)
            codes = [code for code in CODES if code in tables.runs.schemes(panel)]
            found = {c: difference(mine, tables.runs.values(field, panel, c, bits, quantizer)) for c in codes}
            if len(mine) < 2:
                lower = [code for code in codes if found[code].ratio < 1]
                text = f"{panel}, one run: lower than {len(lower)} of {len(codes)} codes"
                yield Finding(text + _named(", not than", [c for c in codes if c not in lower]), None)
                continue
            worse, level, better = ([c for c in codes if found[c].verdict == sign] for sign in (-1, 0, 1))
            text = f"{panel}: below {len(worse)} of {len(codes)} codes"
            text += _named(", level with", level) + _named(", above", better)
            yield Finding(text, len(worse) / len(codes))

    return check


def _settings(tables: Tables, panels: Iterable[str], quantizer: str) -> Iterator[tuple[str, float]]:
    """Yield the panels that have been run with this quantizer, with their budgets."""
    for panel in panels:
        if quantizer in tables.runs.quantizers(panel):
            for bits in tables.runs.budgets(panel):
                yield panel, bits


def _named(word: str, names: Sequence[str]) -> str:
    return f"{word} {', '.join(label(name) for name in names)}" if names else ""


def _to_ideal(tables: Tables, panel: str, scheme: str, bits: float, quantizer: str) -> float:
    """Return a scheme's final loss over the ideal SGD's."""
    return tables.runs.mean("final_loss", panel, scheme, bits, quantizer) / tables.runs.mean("final_loss", panel, "sgd")


def close_to_ideal(*panels: str, limit: float = CLOSE, only: slice = slice(None)) -> Check:
    """Check that ours ends at most `limit` times as high as SGD; `only` picks budgets of each panel, rising."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel in panels:
            for _, bits in list(_settings(tables, [panel], quantizer))[only]:
                ratio = _to_ideal(tables, panel, "qgc", bits, quantizer)
                yield Finding(f"{panel}, {bits:g} bits: {ratio:.2f} times the ideal's loss", ratio <= limit)

    return check


def comparable_at_high_budget(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours is close to SGD at the high budget."""
    for low, high in (("2a", "2b"), ("2d", "2e")):
        settings = [next(_settings(tables, [panel], quantizer), None) for panel in (low, high)]
        if None not in settings:
            ratios = [_to_ideal(tables, panel, "qgc", bits, quantizer) for panel, bits in settings]
            text = f"{high}: {ratios[1]:.2f} times the ideal's loss (at the low budget of {low}: {ratios[0]:.2f})"
            yield Finding(text, ratios[1] <= CLOSE)


def osgc_degrades(*panels: str) -> Check:
    """Return the check that OSGC ends above ours, and not close to SGD."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel, bits in _settings(tables, panels, quantizer):
            values = [tables.runs.values("final_loss", panel, name, bits, quantizer) for name in ("osgc", "qgc")]
            found = difference(*values)
            ratio = _to_ideal(tables, panel, "osgc", bits, quantizer)
            text = f"{panel}, {bits:g} bits: OSGC at {ratio:.2f} times the ideal's loss, {found.ratio:.2f} times ours"
            yield Finding(text, None if found.verdict is None else found.verdict > 0 and ratio > CLOSE)

    return check


def two_tracks_help(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours with two tracks is below ours with one."""
    for panel, bits in _settings(tables, ("2c", "2f"), quantizer):
        values = [tables.runs.values("final_loss", panel, s, bits, quantizer) for s in ("qgc", "qgc_one_track")]
        found = difference(*values)
        text = f"{panel}: {found.ratio:.3f} times the loss with one track"
        yield Finding(text, None if found.verdict is None else found.verdict < 0)


# ----------------------------------------------------------------------------------------- Fig. 3d, e, f
def everybody_gains(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """All codes end lower in 3d than in 2a."""
    schemes = [s for s in tables.runs.schemes("3d") if s in (*CODES, "qgc") and s in tables.runs.schemes("2a")]
    for panel, bits in _settings(tables, ["3d"], quantizer) if schemes else ():
        finals = {s: [tables.runs.mean("final_loss", p, s, bits, quantizer) for p in (panel, "2a")] for s in schemes}
        higher = [s for s, (here, there) in finals.items() if here >= there]
        text = f"{len(schemes) - len(higher)} of {len(schemes)} end lower than in 2a" + _named(", not", higher)
        yield Finding(text, 1 - len(higher) / len(schemes))


def feedback_fails(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Schemes with error feedback end above FAILS times the initial loss."""
    for panel, bits in _settings(tables, ["3e"], quantizer):
        start = tables.runs.mean("initial_loss", panel, "sgd")
        for scheme in (s for s in tables.runs.schemes(panel) if s.startswith(("ef_", "efc_"))):
            final = tables.runs.mean("final_loss", panel, scheme, bits, quantizer)
            diverges = tables.runs.is_cut(panel, scheme, bits, quantizer)
            text = f"{label(scheme)} {'diverges' if diverges else f'ends at {final:.2f}'}"
            if (plain := scheme.split("_", 1)[1]) in tables.runs.schemes("2a"):
                text += f" (without feedback {tables.runs.mean('final_loss', '2a', plain, bits, quantizer):.2f})"
            yield Finding(text, final > FAILS * start)


def least_loss_per_bit(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """At a quarter, half and all of the bits that ours sends in 2a, its mean loss is the lowest."""
    curves: dict[str, list[Row]] = {}
    for row in tables.curves:
        if row["panel"] == "2a" and row["quantizer"] == quantizer and row["scheme"] in (*CODES, "qgc"):
            curves.setdefault(row["scheme"], []).append(row)
    for part in (0.25, 0.5, 1.0):
        spent = part * curves["qgc"][-1]["total_bits"] if "qgc" in curves else 0.0
        at = {
            scheme: float(np.interp(spent, [p["total_bits"] for p in points], [p["loss"] for p in points]))
            for scheme, points in curves.items()
            if np.isfinite(points[-1]["loss"])
        }
        if "qgc" not in at or len(at) < 2:
            return
        rest = {scheme: loss for scheme, loss in at.items() if scheme != "qgc"}
        best = min(rest, key=lambda scheme: rest[scheme])
        named = ", ".join(f"{label(scheme)} {at[scheme]:.3f}" for scheme in ("qgc", "sgc", "osgc") if scheme in at)
        text = f"at {spent:.3g} bits: {named}, best other {label(best)} {rest[best]:.3f}"
        yield Finding(text, at["qgc"] < rest[best])


# ------------------------------------------------------------------------------------------------ Fig. 4
def detects_like_sgd(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours scores within 0.05 of SGD and is close in average precision."""
    means = detection_means(tables, quantizer)
    if {"sgd", "qgc"} <= means.keys():
        ideal, ours = means["sgd"], means["qgc"]
        yield Finding(
            f"score of the best box {ours['top_score']:.2f}, the ideal's {ideal['top_score']:.2f}",
            ours["top_score"] >= ideal["top_score"] - 0.05,
        )
        yield Finding(
            f"AP50 {ours['ap50']:.2f}, the ideal's {ideal['ap50']:.2f}", ours["ap50"] >= ideal["ap50"] / CLOSE
        )


def others_detect_worse(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Every other code has a lower average precision than ours."""
    means = detection_means(tables, quantizer)
    for scheme in (code for code in CODES if code in means):
        theirs, ours = means[scheme], means["qgc"]
        text = f"{label(scheme)}: AP50 {theirs['ap50']:.2f}, score of the best box {theirs['top_score']:.2f}"
        yield Finding(text, theirs["ap50"] < ours["ap50"])


def detection_means(tables: Tables, quantizer: str) -> dict[str, dict[str, float]]:
    """Return the mean of every detection number over runs, by scheme; SGD is found under every quantizer."""
    found: dict[str, list[Row]] = {}
    for row in tables.detections:
        if row["quantizer"] in (quantizer, ""):
            found.setdefault(row["scheme"], []).append(row)
    names = ("ap50", "found", "false", "top_score")
    means = {s: {name: float(np.mean([row[name] for row in rows])) for name in names} for s, rows in found.items()}
    return means if "qgc" in means else {}
