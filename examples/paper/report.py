"""docs/paper.md: every figure, and every claim with its verdict and numbers, made from the tables and the config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from paper import checks, gains
from paper.checks import Finding, Tables, detection_means
from paper.claims import Verdict, judge
from paper.config import Experiments, Panel
from paper.contestants import IDEAL, label
from paper.plots import SHORT_NAMES
from paper.tasks import TASKS

BITS_FIGURE = "3f"
#: What a reader should know before taking the numbers of a figure for what they seem.
NOTES = {
    "2c": "For codes with optimal shares the paper's second track is the first one times a constant c < 1, which is "
    "Adam with the learning rate divided by c ([planner.md](planner.md)): what one track lacks here, a larger learning "
    "rate would give it.",
    "3a": "At 2 bits everybody sends 2 bits: nothing is left to allot, and shares planned for the paper's bound weigh "
    "workers by a noise that is far above the real one.",
    "3e": "EF- adds what a payload has lost to the next gradient; with *scaled* the quantizer is divided by 1 + q "
    "first, which makes it a contraction, as the theory of error feedback asks for.",
    "4": "One run: the curves and average precisions of two schemes can differ by chance alone, by 0.1 and more.",
    "noise": "Batches are drawn by workers, each from its own share of the data, as `QGCState.loader` does.",
}


def markdown(experiments: Experiments, tables: Tables, pictures: Sequence[str]) -> str:
    """Return the report.

    Args:
        pictures: file names, as in docs/pictures.
    """
    verdicts = judge(tables)
    parts = [
        _introduction(experiments, tables),
        gains.in_short(tables),
        _summary(verdicts),
        gains.quantizer_and_plan(tables),
        gains.noise_aware(experiments, tables),
        *_figures(experiments, tables, verdicts, pictures),
        _settings(experiments),
        _limits(experiments),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


# --------------------------------------------------------------------------------------------- beginning
def _introduction(experiments: Experiments, tables: Tables) -> str:
    return f"""
# The paper's experiments, run with the simulator

Song & Choi, *Communication-Efficient Approximate Gradient Coding for Distributed Learning in Heterogeneous Systems*,
section VI: every figure at the scale of a laptop, on real but small data, and for every claim whether it held here.

```bash
python examples/paper/run.py --publish               # all of it; resumes where it was interrupted
python examples/paper/run.py --figure 3a --runs 10   # one figure, more runs
python examples/paper/run.py --scale paper           # COCO, ResNet-50, GPT-2, 50 runs, a GPU: written, not run
```

This page is generated: text, verdicts and numbers come from `benchmarks/results/paper_*.csv` and
`examples/paper/config.py`; scale: {experiments.scale}. The CPU times of single simulations add up to some twenty
minutes on two free cores; the run behind this page was made in several sittings on a machine shared with other jobs.

**What is compared.** The *ideal*, the paper's SGD (in 2c and f: Adam), has all gradients, unquantized. Everybody else
loses who is late and sends B / K bits per coordinate and worker on average; codes replicate data twice or so, as in the
paper. *Proposed* is the joint design of bits and shares. Each scheme runs with two quantizers that differ in one thing,
the scale of a block of 512 coordinates: its L2 norm, which is the paper's, with the paper's bound in the plan; and its
largest magnitude, which is ours, with the typical variance in the plan. So what the plan gains can be told from what
the quantizer gains. The paper's own setting, one L2 scale for the whole gradient, is noisier still at equal bits; low
budgets stand for it.

**The rule.** The loss is that of a fixed part of the training data; the final loss is the mean over the last tenth of
the evaluations. One scheme is *below* another if Student's 95 % confidence interval of the mean difference over paired
runs (same workers, delays, initial parameters and batches) leaves out zero; else they are *level*. Runs that end above
{tables.runs.cap:g} times the initial loss, or without a number, count as that. "Comparable to SGD" is a final loss at
most {checks.CLOSE:.2f} times the ideal's; "moderate" is {checks.MODERATE:g} times; "does not converge" is ending above
{checks.FAILS:.0%} of the initial loss. A claim *holds* if all that was looked at agrees, *in part* if some does; the
percentage says how much (for "below all baselines": of the baselines). With few runs a true difference passes as level,
so "level" is no proof of equality.
"""


def _summary(verdicts: Sequence[Verdict]) -> str:
    kinds = ("l2", "max")
    lines = ["## Every claim", "", "| figure | claim | L2 scale (paper) | max norm (ours) |", "|---|---|---|---|"]
    for claim in dict.fromkeys(v.claim for v in verdicts):
        mine = {v.quantizer: str(v) for v in verdicts if v.claim is claim}
        first = mine.get("l2", mine.get("paper", ""))
        lines.append(f"| {claim.figure} | {claim.text} | {first} | {mine.get('max', '')} |")
    for kind in kinds:
        counts = Counter(str(v).partition(" (")[0] for v in verdicts if v.quantizer == kind)
        told = ", ".join(f"{word}: {count}" for word, count in counts.most_common())
        lines += ["", f"With the {SHORT_NAMES[kind]}: {told}."]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- the figures
def _figures(
    experiments: Experiments, tables: Tables, verdicts: Sequence[Verdict], pictures: Sequence[str]
) -> Iterator[str]:
    if "paper_1.png" in pictures:
        text = ["## Fig. 1: allocators", "", "![residual against budget](pictures/paper_1.png)", ""]
        draws = experiments.allocation.draws
        text.append(
            f"*1 / sum of utilities, the bound of Lemma 2 in units of C N²; mean over {draws} draws of workers.*"
        )
        yield "\n".join([*text, "", *_findings(verdicts, "1")])
    for panel in experiments.panels:
        name = f"paper_{panel.key}.png"
        if name in pictures:
            yield _panel(experiments, panel, tables, verdicts, name)
        if panel.key == "2a" and f"paper_{BITS_FIGURE}.png" in pictures:
            text = ["## Fig. 3f: loss against bits sent", "", f"![loss against bits](pictures/paper_{BITS_FIGURE}.png)"]
            yield "\n".join([*text, "", "*The runs of figure 2a.*", "", *_findings(verdicts, BITS_FIGURE)])
    if "paper_4_pictures.png" in pictures:
        yield _detections(experiments, tables, verdicts)


def _panel(experiments: Experiments, panel: Panel, tables: Tables, verdicts: Sequence[Verdict], picture: str) -> str:
    workload = experiments.workloads[panel.workload]
    runs = len(tables.runs.values("final_loss", panel.key, panel.contestants[0]))
    workers = workload.workers or panel.cluster.workers
    lr = workload.lr_sgd if panel.optimizer == "sgd" else workload.lr_adam
    lines = [
        f"## {panel.heading}",
        "",
        f"![loss against rounds](pictures/{picture})",
        "",
        f"*{workers} workers, {runs} {'run' if runs == 1 else 'runs'} of {workload.steps} rounds, {panel.optimizer}, "
        f"learning rate {lr:g}; lines are means, bands go from the lowest to the highest run.*",
        "",
        *([NOTES[panel.key], ""] if panel.key in NOTES else []),
        *_losses(panel, tables),
        "",
        *_findings(verdicts, panel.key),
    ]
    return "\n".join(lines)


def _losses(panel: Panel, tables: Tables) -> Iterator[str]:
    columns = [(q, b) for q in panel.quantizers for b in panel.bits if b in tables.runs.budgets(panel.key)]
    yield "| final loss | " + " | ".join(f"{SHORT_NAMES[q]}, {b:g} bits" for q, b in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for scheme in tables.runs.schemes(panel.key):
        cells = []
        for quantizer, bits in columns:
            values = tables.runs.values("final_loss", panel.key, scheme, bits, quantizer)
            mean = sum(values) / len(values)
            cut = "≥ " if tables.runs.is_cut(panel.key, scheme, bits, quantizer) else ""
            spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{cut}{mean:.3f}{spread}")
        yield f"| {label(scheme)} | " + " | ".join(cells) + " |"


def _findings(verdicts: Iterable[Verdict], key: str) -> Iterator[str]:
    """List the claims about a figure; figures are named "2a, b, d" in claims."""
    for verdict in verdicts:
        if verdict.findings and _is_about(verdict.claim.figure, key):
            named = SHORT_NAMES[verdict.quantizer]
            of_this = [finding for finding in verdict.findings if _is_of(finding, key)] or verdict.findings
            yield (
                f"- *{verdict.claim.text}*, {named}: **{verdict}**. "
                + "; ".join(finding.text for finding in of_this)
                + "."
            )


def _is_of(finding: Finding, key: str) -> bool:
    """Findings about one of several figures begin with its name."""
    return finding.text.startswith((f"{key}:", f"{key},", f"{key} "))


def _is_about(figures: str, key: str) -> bool:
    number = figures[:1]
    letters = figures[1:].replace(",", "").split()
    return key == figures or (key[:1] == number and len(key) == 2 and (not letters or key[1:] in letters))


def _detections(experiments: Experiments, tables: Tables, verdicts: Sequence[Verdict]) -> str:
    chosen = experiments.detections
    lines = [
        "## Fig. 4: detections",
        "",
        "![detections of each scheme's model](pictures/paper_4_pictures.png)",
        "",
        f"*Validation image {chosen.picture} under the models of the first run, {SHORT_NAMES[chosen.quantizer]}; boxes "
        "with a score of 0.3 or more.*",
        "",
        "| model | quantizer | AP50 | objects found | false boxes per image | score of the best right box |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for quantizer in ("l2", "max"):
        for scheme, row in detection_means(tables, quantizer).items():
            if scheme != IDEAL or quantizer == "l2":
                kind = SHORT_NAMES[quantizer] if scheme != IDEAL else "none"
                cells = (f"{row['ap50']:.2f}", f"{row['found']:.0%}", f"{row['false']:.2f}", f"{row['top_score']:.2f}")
                lines.append(f"| {label(scheme)} | {kind} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Over 200 validation images at IoU 0.5; the last column is the mean over images, 0 where nothing is right.",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the end
def _settings(experiments: Experiments) -> str:
    lines = [
        "## Settings",
        "",
        "The text of the paper that this was made from lacks its numbers; these are chosen, and",
        "`examples/paper/config.py` says why.",
        "Delays are 1 s + Exp(mu_k), mu_k ~ U(mu_low, mu_high) drawn anew in every run; as many partitions as workers.",
        "",
        "| figure | K | B / K | mu | deadline | late on average | batches of | task |",
        "|---|---:|---|---|---:|---:|---|---|",
    ]
    for panel in experiments.panels:
        workload, c = experiments.workloads[panel.workload], panel.cluster
        bits = ", ".join(f"{b:g}" for b in panel.bits)
        lines.append(
            f"| {panel.key} | {workload.workers or c.workers} | {bits} | {c.mu_low:g}–{c.mu_high:g} /s | "
            f"{c.deadline_s:g} s | {c.mean_straggle_probability:.0%} | {workload.batch_size} per {panel.sampling} | "
            f"{workload.task} |"
        )
    lines.append("")
    used = {experiments.workloads[panel.workload].task for panel in experiments.panels}
    for name in (name for name in TASKS if name in used):
        lines.append(f"- `{name}`: {TASKS[name].__doc__}")
    return "\n".join(lines)


def _limits(experiments: Experiments) -> str:
    return """
## What this does not show

- Networks are small and trained for a short time: these are the first rounds of a training, where the paper has whole
  ones. A ResNet at an eighth of the width and a GPT-2 of two layers stand for ResNet-50 and GPT-2.
- The small scale's detector has one class, "digit". No COCO, no GPU and no run with `--scale paper` has been made.
- Codes of the literature are drawn once per run; learning rates are the same for all schemes and not tuned for each.
- Arrivals are independent between rounds, as in the paper. For jobs whose late workers miss the steps they are late
  for, with late payloads folded in, see [the simulator](simulator.md).
"""
