"""What the plan, the quantizer and knowing about batch noise each gain: the report's tables beside the claims."""

from __future__ import annotations

from typing import Any

import numpy as np

from paper.checks import CODES, Tables
from paper.config import Experiments, Panel
from paper.contestants import IDEAL, contestant, label
from paper.plots import SHORT_NAMES
from paper.tables import difference


def in_short(tables: Tables) -> str:
    """Say in three sentences what the plan and the quantizer gain, over the low budgets of figures 2 and 3d."""
    asked = [panel for panel in ("2a", "2c", "2d", "2f", "3d") if panel in tables.runs.panels()]
    lines = ["## In short", ""]
    for quantizer, named in (("l2", "With the L2 scale"), ("max", "With the max norm")):
        ratios = [_best_and_ours(tables, panel, tables.runs.budgets(panel)[0], quantizer) for panel in asked]
        if ratios:
            best, ours = np.mean([(at, mine) for _, at, mine in ratios], axis=0)
            lines.append(
                f"- {named} at low budgets (figures {', '.join(asked)}) the best other code of each figure ends at "
                f"{best:.2f} times the ideal's loss on average, the proposed scheme at {ours:.2f}."
            )
    if "noise" in tables.runs.panels():
        ideal = tables.runs.mean("final_loss", "noise", IDEAL)
        for bits in tables.runs.budgets("noise"):
            at = [
                f"{label(scheme)} {tables.runs.mean('final_loss', 'noise', scheme, bits, 'max') / ideal:.2f}"
                for scheme in tables.runs.schemes("noise")
                if scheme != IDEAL
            ]
            lines.append(
                "- Where every worker has a batch of the same size, as in a training job, the final loss over the "
                f"ideal's is, with the max norm and {bits:g} bits: {'; '.join(at)}."
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _best_and_ours(tables: Tables, panel: str, bits: float, quantizer: str) -> tuple[str, float, float]:
    """Return the other code with the least final loss, that loss and ours, over the ideal's."""
    ideal = tables.runs.mean("final_loss", panel, IDEAL)
    codes = [code for code in CODES if code in tables.runs.schemes(panel)]
    at = {c: tables.runs.mean("final_loss", panel, c, bits, quantizer) / ideal for c in codes}
    best = min(at, key=lambda code: at[code])
    return best, at[best], tables.runs.mean("final_loss", panel, "qgc", bits, quantizer) / ideal


def quantizer_and_plan(tables: Tables) -> str:
    """Return a table of the best other code and ours, under both quantizers."""
    rows = []
    for panel in tables.runs.panels():
        if {"l2", "max"} <= set(tables.runs.quantizers(panel)) and set(CODES) & set(tables.runs.schemes(panel)):
            for bits in tables.runs.budgets(panel):
                cells = []
                for quantizer in ("l2", "max"):
                    best, at, ours = _best_and_ours(tables, panel, bits, quantizer)
                    cells += [f"{at:.2f} ({label(best)})", f"{ours:.2f}"]
                rows.append(f"| {panel} | {bits:g} | " + " | ".join(cells) + " |")
    if not rows:
        return ""
    head = """
## What the plan gains, and what the quantizer gains

Final loss over the ideal's (mean over runs). Along a row: from the best other code to ours with the same quantizer is
what the joint plan gains; from the L2 scale to the max norm with the same scheme is what the quantizer gains.

| figure | B / K | L2: best code | L2: proposed | max: best code | max: proposed |
|---|---:|---:|---:|---:|---:|
"""
    return head + "\n".join(rows)


def noise_aware(experiments: Experiments, tables: Tables) -> str:
    """Return a table of the paper's plan and noise-aware ones."""
    rows = []
    for panel in tables.runs.panels():
        aware = [scheme for scheme in tables.runs.schemes(panel) if scheme.startswith("qgc_noise")]
        for bits in tables.runs.budgets(panel) if aware else ():
            for quantizer in tables.runs.quantizers(panel):
                plain = tables.runs.values("final_loss", panel, "qgc", bits, quantizer)
                share = _largest_share(experiments.panel(panel), quantizer, bits, runs=len(plain))
                cells = [f"{share:.0%}", f"{sum(plain) / len(plain):.3f}"]
                for scheme in aware:
                    found = difference(tables.runs.values("final_loss", panel, scheme, bits, quantizer), plain)
                    cells.append(f"{found.ratio * sum(plain) / len(plain):.3f} {_word(found.verdict)}")
                cells += ["–"] * (2 - len(aware))  # not everywhere are both
                rows.append(f"| {panel} | {bits:g} | {SHORT_NAMES[quantizer]} | " + " | ".join(cells) + " |")
    if not rows:
        return ""
    head = """
## The noise-aware plan in mini-batch training

The paper's plan knows stragglers and quantization, not the noise of batches. In its experiments (figure 3a here) that
is right: batches belong to partitions, and a worker that answers for most of the data computes most of the batches. In
a training job every worker has a batch of the same size (*noise* here), and a plan that gives one worker nearly all of
the data throws the others' batches away. The noise-aware plan is told eta, how many times the noise of a batch exceeds
the signal: 1, or about what `simulator.noise_ratio` measures. Final losses; below, level and above are against the
paper's plan. The largest share is what the paper's plan gives to one worker, on average over runs; its delays do not
grow with it in the paper's model.

| figure | B / K | quantizer | largest share | paper's plan | noise-aware, eta = 1 | eta = 9 |
|---|---:|---|---:|---:|---:|---:|
"""
    return head + "\n".join(rows)


def _largest_share(panel: Panel, quantizer: str, bits: float, *, runs: int) -> float:
    plans: list[Any] = []
    for run in range(runs):
        late = panel.cluster.delays(run).straggle_probability(panel.cluster.deadline_s)
        kind: Any = quantizer
        plans.append(contestant("qgc").plan(late, panel, kind, bits, run))
    return float(np.mean([plan.shares.max() for plan in plans]))


def _word(verdict: int | None) -> str:
    return {None: "(one run)", -1: "(below)", 0: "(level)", 1: "(above)"}[verdict]
