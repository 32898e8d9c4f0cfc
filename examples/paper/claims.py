"""What section VI of the paper claims, and a rule for each claim that says from the tables whether it held here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paper import checks
from paper.checks import Check, Finding, Tables
from paper.config import QUANTIZERS


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper.

    Fields:
        figure: where the paper makes it.
        text: what it says.
        check: of checks.
    """

    figure: str
    text: str
    check: Check


@dataclass(frozen=True)
class Verdict:
    """A claim, and what became of it under one quantizer: it holds if all findings agree, in part if some do."""

    claim: Claim
    quantizer: str
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        agrees = [float(finding.agrees) for finding in self.findings if finding.agrees is not None]
        if not self.findings:
            return "not run"
        if not agrees:
            return "too few runs"
        mean = sum(agrees) / len(agrees)
        return "holds" if min(agrees) == 1 else "does not hold" if max(agrees) == 0 else f"in part ({mean:.0%})"


CLAIMS = (
    Claim(
        "1",
        "Algorithm 1 consistently matches the dynamic program's optimum",
        checks.algorithm_is_optimal,
    ),
    Claim(
        "1",
        "greedy and relaxation are often trapped in local optima, at both sizes",
        checks.heuristics_get_stuck,
    ),
    Claim(
        "2a, b, d, e",
        "ours ends below all baselines, at both sizes and budgets",
        checks.beats_all("2a", "2b", "2d", "2e"),
    ),
    Claim(
        "2a, b, d, e",
        "ours converges faster than all baselines (mean loss over the run)",
        checks.beats_all("2a", "2b", "2d", "2e", loss="mean"),
    ),
    Claim(
        "2a, d",
        "OSGC amplifies quantization noise: well above SGD and ours at a low budget",
        checks.osgc_degrades("2a", "2d"),
    ),
    Claim("2b, e", "as the budget grows ours becomes comparable to SGD", checks.comparable_at_high_budget),
    Claim("2c, f", "with Adam and two tracks ours ends below all baselines", checks.beats_all("2c", "2f")),
    Claim("2c, f", "the second track improves on one track", checks.two_tracks_help),
    Claim(
        "3a",
        "ours is virtually identical to SGD at a limited budget (4 bits)",
        checks.close_to_ideal("3a", only=slice(-1, None)),
    ),
    Claim(
        "3a",
        "ours drops only moderately at a severe budget (2.5 bits)",
        checks.close_to_ideal("3a", limit=checks.MODERATE, only=slice(1, 2)),
    ),
    Claim("3a", "quantized OSGC degrades at every budget", checks.osgc_degrades("3a")),
    Claim("3b", "with a ResNet ours stays below all baselines", checks.beats_all("3b")),
    Claim("3c", "with a GPT-2 transformer ours stays below all baselines", checks.beats_all("3c")),
    Claim("3d", "a larger range of delays helps everybody", checks.everybody_gains),
    Claim("3d", "there, too, ours ends below all baselines", checks.beats_all("3d")),
    Claim("3d", "there ours tracks SGD", checks.close_to_ideal("3d")),
    Claim("3e", "baselines with error feedback do not converge", checks.feedback_fails),
    Claim("3e", "ours tracks SGD", checks.close_to_ideal("3e")),
    Claim("3f", "at equal bits sent ours has the lowest loss", checks.least_loss_per_bit),
    Claim("4", "on detection ours ends below all baselines", checks.beats_all("4")),
    Claim("4", "ours detects as SGD does", checks.detects_like_sgd),
    Claim("4", "the baselines detect worse", checks.others_detect_worse),
)


def judge(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> list[Verdict]:
    """Return the verdict on every claim under both quantizers."""
    return [
        Verdict(claim, quantizer, list(claim.check(tables, quantizer))) for claim in claims for quantizer in QUANTIZERS
    ]
