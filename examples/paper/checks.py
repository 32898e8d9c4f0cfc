"""Looks at the tables, one for each kind of claim: every check yields what it has found, and how far that agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paper.contestants import IDEAL, label
from paper.tables import Row, Schemes

CLOSE = 1.10  # "virtually identical", "tracks", "comparable": a final loss at most a tenth above
MODERATE = 1.5  # "only a moderate performance drop"
FAILS = 0.5  # "fails to converge": the final loss is above this part of the initial one
STUCK = 0.25  # "often trapped": in that part of the settings
CODES = ("bgc", "erasurehead", "sgc", "one_bit_sgc", "od", "osgc", "is_sgd")


@dataclass(frozen=True)
class Tables:
    """Everything that has been computed; what has not is empty."""

    schemes: Schemes
    allocation: Sequence[Row] = ()
    bits: Sequence[Row] = ()
    detections: Sequence[Row] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and how far it agrees with the claim.

    Fields:
        agrees: 1: fully, 0: not at all, between: in so many of the cases; None: there are too few runs to say.
    """

    text: str
    agrees: float | None


#: (tables, quantizer "l2" or "max") -> findings; none where nothing has been computed.
Check: TypeAlias = Callable[[Tables, str], Iterable[Finding]]


# ------------------------------------------------------------------------------------------------ Fig. 1
def _allocations(tables: Tables, quantizer: str, method: str) -> dict[int, list[Row]]:
    """Return a method's rows by system size, without the least budget, which leaves no choice."""
    bound = {"l2": "paper", "max": "max"}[quantizer]  # with the L2 scale goes the paper's
    chosen: dict[int, list[Row]] = {}
    for row in tables.allocation:
        if row["quantizer"].startswith(bound) and row["method"] == method and row["bits"] > 2:
            chosen.setdefault(int(row["workers"]), []).append(row)
    return chosen


def algorithm_is_optimal(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Algorithm 1 is nowhere more than GAP above the dynamic program."""
    for workers, rows in _allocations(tables, quantizer, "low_complexity").items():
        worst = max(row["worst"] for row in rows)
        settings = sum(int(row["draws"]) for row in rows)
        stuck = max(row["stuck"] for row in rows)
        yield Finding(f"K = {workers}: at most {worst:.2%} above the optimum in {settings} settings", stuck == 0)


def heuristics_get_stuck(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Greedy and relaxation are more than GAP above it in STUCK of the settings or more."""
    for method in ("greedy", "relaxation"):
        for workers, rows in _allocations(tables, quantizer, method).items():
            stuck = float(np.mean([row["stuck"] for row in rows]))
            yield Finding(f"{method}, K = {workers}: above it in {stuck:.0%} of settings", stuck >= STUCK)


# --------------------------------------------------------------------------------------- losses compared
def beats_all(*panels: str, loss: str = "final") -> Check:
    """Return the check that every other code is above ours in each of these panels."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel, bits in _settings(tables, panels, quantizer):
            codes = [code for code in CODES if code in tables.schemes.schemes(panel)]
            found = {code: tables.schemes.of(panel, code, bits, quantizer) for code in codes}
            ours = tables.schemes.of(panel, "qgc", bits, quantizer)
            if ours["runs"] < 2:
                lower = [code for code in codes if ours["final_loss"] < found[code]["final_loss"]]
                text = f"{panel}, one run: lower than {len(lower)} of {len(codes)} codes"
                yield Finding(text + _named(", not than", [c for c in codes if c not in lower]), None)
                continue
            beaten, level, better = (
                [c for c in codes if found[c][loss] == word] for word in ("above", "level", "below")
            )
            text = f"{panel}: below {len(beaten)} of {len(codes)} codes"
            text += _named(", level with", level) + _named(", above", better)
            yield Finding(text, len(beaten) / len(codes))

    return check


def _settings(tables: Tables, panels: Iterable[str], quantizer: str) -> Iterator[tuple[str, float]]:
    """Yield the panels that have been run with this quantizer, with their budgets."""
    for panel in panels:
        if quantizer in tables.schemes.quantizers(panel):
            for bits in tables.schemes.budgets(panel):
                yield panel, bits


def _named(word: str, names: Sequence[str]) -> str:
    return f"{word} {', '.join(label(name) for name in names)}" if names else ""


def close_to_ideal(*panels: str, limit: float = CLOSE, only: slice = slice(None)) -> Check:
    """Check that ours ends at most `limit` times as high as SGD; `only` picks budgets of each panel, rising."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel in panels:
            for _, bits in list(_settings(tables, [panel], quantizer))[only]:
                ratio = tables.schemes.of(panel, "qgc", bits, quantizer)["over_ideal"]
                yield Finding(f"{panel}, {bits:g} bits: {ratio:.2f} times the ideal's loss", ratio <= limit)

    return check


def comparable_at_high_budget(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours is close to SGD at the high budget."""
    for low, high in (("2a", "2b"), ("2d", "2e")):
        settings = [next(_settings(tables, [panel], quantizer), None) for panel in (low, high)]
        if None not in settings:
            ratios = [tables.schemes.of(panel, "qgc", bits, quantizer)["over_ideal"] for panel, bits in settings]
            text = f"{high}: {ratios[1]:.2f} times the ideal's loss (at the low budget of {low}: {ratios[0]:.2f})"
            yield Finding(text, ratios[1] <= CLOSE)


def osgc_degrades(*panels: str) -> Check:
    """Return the check that OSGC ends above ours, and not close to SGD."""

    def check(tables: Tables, quantizer: str) -> Iterator[Finding]:
        for panel, bits in _settings(tables, panels, quantizer):
            osgc, ours = (tables.schemes.of(panel, name, bits, quantizer) for name in ("osgc", "qgc"))
            times = osgc["final_loss"] / ours["final_loss"]
            text = f"{panel}, {bits:g} bits: {osgc['over_ideal']:.2f} times the ideal's loss, {times:.2f} times ours"
            degrades = osgc["final"] == "above" and osgc["over_ideal"] > CLOSE
            yield Finding(text, degrades if osgc["final"] else None)

    return check


def two_tracks_help(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours with one track is above ours with two."""
    for panel, bits in _settings(tables, ("2c", "2f"), quantizer):
        one, two = (tables.schemes.of(panel, name, bits, quantizer) for name in ("qgc_one_track", "qgc"))
        text = f"{panel}: {two['final_loss'] / one['final_loss']:.3f} times the loss with one track"
        yield Finding(text, one["final"] == "above" if one["final"] else None)


# ----------------------------------------------------------------------------------------- Fig. 3d, e, f
def everybody_gains(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """All codes end lower in 3d than in 2a."""
    found = tables.schemes
    names = [s for s in found.schemes("3d") if s in (*CODES, "qgc") and s in found.schemes("2a")]
    for panel, bits in _settings(tables, ["3d"], quantizer) if names else ():
        finals = {s: [found.of(p, s, bits, quantizer)["final_loss"] for p in (panel, "2a")] for s in names}
        higher = [s for s, (here, there) in finals.items() if here >= there]
        text = f"{len(names) - len(higher)} of {len(names)} end lower than in 2a" + _named(", not", higher)
        yield Finding(text, 1 - len(higher) / len(names))


def feedback_fails(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Schemes with error feedback end above FAILS times the initial loss."""
    for panel, bits in _settings(tables, ["3e"], quantizer):
        start = tables.schemes.of(panel, IDEAL)["initial_loss"]
        names = [s for s in tables.schemes.schemes(panel) if s.startswith(("ef_", "efc_"))]
        rows = {name: tables.schemes.of(panel, name, bits, quantizer) for name in names}
        cut = [name for name in names if rows[name]["cut"]]
        ends = [f"{label(name)} {rows[name]['final_loss']:.2f}" for name in names if name not in cut]
        parts = [*([_named("diverging:", cut)] if cut else []), *([f"final losses: {', '.join(ends)}"] if ends else [])]
        failed = [name for name in names if rows[name]["final_loss"] > FAILS * start]
        yield Finding("; ".join(parts), len(failed) / len(names))


def least_loss_per_bit(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """At a quarter, half and all of the bits that ours sends in 2a, its mean loss is the lowest."""
    for part in (0.25, 0.5, 1.0):
        rows = [row for row in tables.bits if row["quantizer"] == quantizer and row["part"] == part]
        at = {row["scheme"]: row["loss"] for row in rows if row["scheme"] in (*CODES, "qgc")}
        if "qgc" not in at or len(at) < 2:
            return
        ours = at.pop("qgc")
        best = min(at, key=lambda scheme: at[scheme])
        text = f"at {rows[0]['total_bits']:.3g} bits: ours {ours:.3f}, best other {label(best)} {at[best]:.3f}"
        yield Finding(text, ours < at[best])


# ------------------------------------------------------------------------------------------------ Fig. 4
def detects_like_sgd(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Ours scores within 0.05 of SGD and is close in average precision."""
    means = _detection_means(tables, quantizer)
    if {IDEAL, "qgc"} <= means.keys():
        ideal, ours = means[IDEAL], means["qgc"]
        yield Finding(
            f"score of the best box {ours['top_score']:.2f}, the ideal's {ideal['top_score']:.2f}",
            ours["top_score"] >= ideal["top_score"] - 0.05,
        )
        yield Finding(
            f"AP50 {ours['ap50']:.2f}, the ideal's {ideal['ap50']:.2f}", ours["ap50"] >= ideal["ap50"] / CLOSE
        )


def others_detect_worse(tables: Tables, quantizer: str) -> Iterator[Finding]:
    """Every other code has a lower average precision than ours."""
    means = _detection_means(tables, quantizer)
    codes = [code for code in CODES if code in means]
    if codes:
        ours = means["qgc"]["ap50"]
        worse = [code for code in codes if means[code]["ap50"] < ours]
        text = f"AP50 of ours {ours:.2f}, of " + ", ".join(f"{label(code)} {means[code]['ap50']:.2f}" for code in codes)
        yield Finding(text, len(worse) / len(codes))


def _detection_means(tables: Tables, quantizer: str) -> dict[str, dict[str, float]]:
    """Return the mean of every detection number over runs, by scheme; SGD is found under every quantizer."""
    found: dict[str, list[Row]] = {}
    for row in tables.detections:
        if row["quantizer"] in (quantizer, ""):
            found.setdefault(row["scheme"], []).append(row)
    means = {
        s: {name: float(np.mean([row[name] for row in rows])) for name in ("ap50", "top_score")}
        for s, rows in found.items()
    }
    return means if "qgc" in means else {}
