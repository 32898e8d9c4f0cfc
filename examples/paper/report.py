"""docs/paper.md: the figure, and every claim with its verdict and numbers, made from the tables and the config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paper import checks, tables
from paper.checks import CODES, Tables
from paper.claims import Verdict, judge
from paper.config import QUANTIZERS, Experiments
from paper.contestants import IDEAL, label
from paper.plot import SHORT_NAMES
from paper.tables import Schemes
from paper.tasks import TASKS

PICTURE = "paper_final_loss.png"
LOW = ("2a", "2c", "2d", "2f", "3d")  # panels at the low budget with all codes


def read(folder: Path) -> Tables:
    """Read the published tables."""
    schemes, allocation, bits, detections = (
        tables.read(folder / f"paper_{name}.csv") for name in ("schemes", "allocators", "bits", "detections")
    )
    return Tables(schemes=Schemes(schemes), allocation=allocation, bits=bits, detections=detections)


def markdown(experiments: Experiments, found: Tables) -> str:
    """Return the report."""
    verdicts = judge(found)
    parts = [
        INTRODUCTION,
        _in_short(found.schemes),
        _claims(verdicts),
        FIGURE,
        _findings(verdicts),
        _gains(found.schemes),
        _noise_aware(found.schemes),
        _settings(experiments, found.schemes),
        LIMITS,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


INTRODUCTION = f"""
# The paper's experiments, run with the simulator

Song & Choi, *Communication-Efficient Approximate Gradient Coding for Distributed Learning in Heterogeneous Systems*,
section VI: its experiments at the scale of a laptop, on real but small data, and for every claim whether it held
here.

```bash
python examples/paper/run.py --publish               # all of it; resumes where it was interrupted
python examples/paper/run.py --figure 3a --runs 10   # one figure, more runs
python examples/paper/run.py --scale paper           # COCO, ResNet-50, GPT-2, 50 runs, a GPU: written, not run
```

This page is generated from `benchmarks/results/paper_*.csv` and `examples/paper/config.py`; a test compares them.

**What is compared.** The *ideal* is the paper's SGD (in figures 2c and 2f Adam) with all gradients, unquantized. All
other schemes lose the gradients of late workers and send B / K bits per coordinate and worker on average; the codes
replicate the data about twice, as in the paper. *Proposed* is the joint design of bits and shares. Each scheme runs
with two quantizers that differ in the scale of a block of 512 coordinates. The first is the paper's: the block's L2
norm, with the paper's bound in the plan. The second is ours: the block's largest magnitude, with the typical variance
in the plan. So the gain of the plan can be told from the gain of the quantizer. The paper has one L2 scale for the
whole gradient, which is noisier at equal bits; low budgets stand for it.

**The rule.** The loss is that of a fixed part of the training data, and the final loss is the mean over the last
tenth of the evaluations. One scheme is *below* another if Student's 95 % confidence interval of the mean difference
over paired runs (same workers, delays, initial parameters and batches) excludes zero; otherwise they are *level*.
With few runs a true difference often passes as level, so "level" does not prove equality. Runs that end above
{tables.CAP:g} times the initial loss, or without a number, count as that. "Comparable to SGD" is a final loss of at
most {checks.CLOSE:.2f} times the ideal's, "moderate" is {checks.MODERATE:g} times, and "does not converge" is ending
above {checks.FAILS:.0%} of the initial loss. A claim *holds* if everything that was looked at agrees, and *in part*
if some of it does; the percentage says how much (for "below all baselines": of the baselines).
"""

FIGURE = f"""
## Final losses

![final loss over the ideal's, by scheme, in every experiment](pictures/{PICTURE})

*Final loss over the ideal's: mean over runs, and its 95 % interval over paired runs. An arrow's tip stands for more
than 3 times; figure 4 has one run and no intervals. The numbers are in `benchmarks/results/paper_schemes.csv`.*

- Figure 2c: for codes with optimal shares the paper's second track is the first one times a constant c < 1, which
  equals Adam with the learning rate divided by c ([planner.md](planner.md)). A larger learning rate would give one
  track the same.
- Figure 3a: at 2 bits everybody sends 2 bits, so there is nothing to allot, and shares that are planned for the
  paper's bound weigh workers by a noise far above the real one.
- Figure 3e: EF- adds what a payload has lost to the next gradient. With *scaled* the quantizer is divided by 1 + q
  first, which makes it a contraction, as the theory of error feedback asks for.
- Figure 4: with one run the losses and average precisions of two schemes can differ by chance alone.
- Equal batches (*noise* below) is not in the paper: every worker draws a batch of the same size from its own share of
  the data, as `QGCState.loader` does.
"""

GAINS = """
## What the plan gains, and what the quantizer gains

The table holds final losses over the ideal's, means over runs. In a row, the step from the best other code to ours with
the same quantizer is what the joint plan gains. The step from the L2 scale to the max norm with the same scheme is what
the quantizer gains.

| figure | B / K | L2: best code | L2: proposed | max: best code | max: proposed |
|---|---:|---:|---:|---:|---:|
"""

NOISE_AWARE = """
## The noise-aware plan in mini-batch training

The paper's plan knows stragglers and quantization, but not the noise of batches. In the paper's experiments that is
right: batches belong to partitions, and a worker that answers for most of the data computes most of the batches. In a
training job every worker has a batch of the same size, and a plan that gives one worker nearly all of the data throws
the others' batches away. The noise-aware plan is told eta, how many times the noise of a batch exceeds the signal. The
table holds final losses with equal batches; below, level and above are against the paper's plan, and the largest share
is what the paper's plan gives to one worker, on average over runs.

| B / K | quantizer | largest share | paper's plan | noise-aware, eta = 1 | eta = 9 |
|---:|---|---:|---:|---:|---:|
"""

SETTINGS = """
## Settings

The text of the paper that this was made from lacks its numbers. These are chosen, and `examples/paper/config.py` says
why. Delays are 1 s + Exp(mu_k), with mu_k ~ U(mu_low, mu_high) drawn anew in every run. There are as many partitions as
workers. Adam's learning rate in figures 2c and 2f is the paper's, 0.001.

| figures | K | mu | deadline | late on average | runs x rounds | batches of | SGD's learning rate | task |
|---|---:|---|---:|---:|---:|---|---:|---|
"""

LIMITS = """
## What this does not show

- The networks are small and trained for a short time: these are the first rounds of a training, where the paper has
  whole ones. A ResNet at an eighth of the width and a GPT-2 of two layers stand for ResNet-50 and GPT-2.
- The detector has one class, "digit". COCO, a GPU and `--scale paper` have not been run.
- Codes of the literature are drawn once per run. Learning rates are the same for all schemes and not tuned for each.
- Arrivals are independent between rounds, as in the paper. For jobs whose late workers miss the steps they are late
  for, and whose late payloads are folded in, see [the simulator](simulator.md).
"""


def _in_short(found: Schemes) -> str:
    """Say what the plan and the quantizer gain over the low budgets, and what becomes of it with equal batches."""
    asked = [panel for panel in LOW if panel in found.panels()]
    lines = ["## In short", ""]
    for quantizer, named in (("l2", "With the L2 scale"), ("max", "With the max norm")) if asked else ():
        ratios = [_best_and_ours(found, panel, found.budgets(panel)[0], quantizer) for panel in asked]
        best, ours = np.mean([(at, mine) for _, at, mine in ratios], axis=0)
        lines.append(
            f"- {named} at low budgets (figures {', '.join(asked)}) the best other code of each figure ends at "
            f"{best:.2f} times the ideal's loss on average, and the proposed scheme at {ours:.2f}."
        )
    for bits in found.budgets("noise"):
        names = [scheme for scheme in found.schemes("noise") if scheme != IDEAL]
        at = [f"{label(name)} {found.of('noise', name, bits, 'max')['over_ideal']:.2f}" for name in names]
        lines.append(
            "- Where every worker has a batch of the same size, as in a training job, the final loss over the ideal's "
            f"is, with the max norm and {bits:g} bits: {'; '.join(at)}."
        )
    return "\n".join(lines)


def _claims(verdicts: Sequence[Verdict]) -> str:
    lines = ["## Every claim", "", "| figure | claim | L2 scale (paper) | max norm (ours) |", "|---|---|---|---|"]
    for l2, ours in _pairs(verdicts):
        lines.append(f"| {l2.claim.figure} | {l2.claim.text} | {l2} | {ours} |")
    lines.append("")
    for column, quantizer in zip(zip(*_pairs(verdicts)), QUANTIZERS):  # the columns of the table above
        counts = Counter(str(verdict).partition(" (")[0] for verdict in column)
        told = ", ".join(f"{word} {count}" for word, count in counts.most_common())
        lines.append(f"With the {SHORT_NAMES[quantizer]}, the verdicts on the {len(column)} claims are: {told}.")
    return "\n".join(lines)


def _pairs(verdicts: Sequence[Verdict]) -> list[tuple[Verdict, ...]]:
    """Return the verdicts on each claim, in the order of QUANTIZERS."""
    return list(zip(*[iter(verdicts)] * len(QUANTIZERS)))


def _findings(verdicts: Sequence[Verdict]) -> str:
    lines = ["## What was found", ""]
    for pair in _pairs(verdicts):
        told = [
            f"**{SHORT_NAMES[verdict.quantizer]}:** " + "; ".join(finding.text for finding in verdict.findings)
            for verdict in pair
            if verdict.findings
        ]
        if told:
            lines.append(f"- {pair[0].claim.figure}, *{pair[0].claim.text}*. {'. '.join(told)}.")
    return "\n".join(lines)


def _best_and_ours(found: Schemes, panel: str, bits: float, quantizer: str) -> tuple[str, float, float]:
    """Return the other code with the least final loss, that loss and ours, over the ideal's."""
    codes = [code for code in CODES if code in found.schemes(panel)]
    at = {code: found.of(panel, code, bits, quantizer)["over_ideal"] for code in codes}
    best = min(at, key=lambda code: at[code])
    return best, at[best], found.of(panel, "qgc", bits, quantizer)["over_ideal"]


def _gains(found: Schemes) -> str:
    """Return a table of the best other code and ours, under both quantizers."""
    lines = GAINS.strip().splitlines()
    for panel in found.panels():
        for bits in found.budgets(panel) if set(CODES) & set(found.schemes(panel)) else ():
            told = [_best_and_ours(found, panel, bits, quantizer) for quantizer in QUANTIZERS]
            cells = [f"{at:.2f} ({label(best)}) | {ours:.2f}" for best, at, ours in told]
            lines.append(f"| {panel} | {bits:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _noise_aware(found: Schemes) -> str:
    """Return a table of the paper's plan and noise-aware ones with equal batches."""
    lines = NOISE_AWARE.strip().splitlines()
    for bits in found.budgets("noise"):
        for quantizer in found.quantizers("noise"):
            aware = [s for s in found.schemes("noise") if s.startswith("qgc_noise")]
            ours, *rows = (found.of("noise", scheme, bits, quantizer) for scheme in ("qgc", *aware))
            cells = [f"{ours['largest_share']:.0%}", f"{ours['final_loss']:.3f}"]
            cells += [f"{row['final_loss']:.3f} ({row['final'] or 'one run'})" for row in rows]
            lines.append(f"| {bits:g} | {SHORT_NAMES[quantizer]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(experiments: Experiments, found: Schemes) -> str:
    figures: dict[str, list[str]] = {}
    for panel in (panel for panel in experiments.panels if panel.key in found.panels()):
        workload, c = experiments.workloads[panel.workload], panel.cluster
        same = (
            f"| {workload.workers or c.workers} | {c.mu_low:g}–{c.mu_high:g} /s | {c.deadline_s:g} s | "
            f"{c.mean_straggle_probability:.0%} | {found.of(panel.key, IDEAL)['runs']:g} x {workload.steps} | "
            f"{workload.batch_size} per {panel.sampling} | {workload.lr_sgd:g} | {workload.task} |"
        )
        figures.setdefault(same, []).append(panel.key)
    lines = [*SETTINGS.strip().splitlines(), *(f"| {', '.join(keys)} {same}" for same, keys in figures.items()), ""]
    used = {experiments.workloads[panel.workload].task for panel in experiments.panels}
    lines += [f"- `{name}`: {TASKS[name].__doc__}" for name in TASKS if name in used]
    return "\n".join(lines)
