"""The experiments of Song & Choi's section VI: one place for every number, at two scales.

The text that this was made from lacks the paper's numbers (workers, partitions, deadline, budgets, ranges, batch size,
alpha); only Adam's rate of 0.001 and the 50 runs are there. What stands here instead is chosen, and says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from torch_qgc.errors import ConfigError
from torch_qgc.planner.delays import ShiftedExponential

SCALES = ("small", "paper")
Quantizer = Literal["l2", "max"]
QUANTIZERS: tuple[Quantizer, ...] = ("l2", "max")  # the paper's scale of a block, and ours


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers whose delays are 1 s and an exponential: T_k = 1 + Exp(mu_k), mu_k ~ U(mu_low, mu_high): eq. (37).

    Fields:
        workers: K; there are as many partitions (the paper's baselines need no more).
        mu_low, mu_high: more: less often late.
        deadline_s: when a round closes, > 1; more: less often late, slower.
    """

    workers: int = 10
    # p = exp(-mu (T - 1)) between .61 and .05, .22 on average: unreliable enough to tell the codes apart.
    mu_low: float = 0.5
    mu_high: float = 3.0
    deadline_s: float = 2.0

    def __post_init__(self) -> None:
        if not (self.workers >= 2 and 0 < self.mu_low <= self.mu_high and self.deadline_s > 1):
            raise ConfigError(f"expected 2 or more workers, 0 < mu_low <= mu_high and a deadline above 1 s, got {self}")

    @property
    def mean_straggle_probability(self) -> float:
        """E exp(-mu (T - 1)) over mu ~ U(mu_low, mu_high)."""
        wait_s = self.deadline_s - 1.0
        if self.mu_high == self.mu_low:
            return math.exp(-self.mu_low * wait_s)
        tails = math.exp(-self.mu_low * wait_s) - math.exp(-self.mu_high * wait_s)
        return tails / ((self.mu_high - self.mu_low) * wait_s)

    def delays(self, run: int) -> ShiftedExponential:
        """Return the delay model of one run: every run draws its own workers, the same for all schemes."""
        mu = np.random.default_rng([run, self.workers]).uniform(self.mu_low, self.mu_high, self.workers)
        return ShiftedExponential(mu=mu, shift=1.0)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, and for how long.

    Fields:
        task: key of tasks.TASKS.
        steps: rounds.
        batch_size: samples per partition and round.
        lr_sgd, lr_adam: constant learning rates, the same for all schemes.
        runs: independent repetitions: workers, delays, codes, initial parameters and batches are drawn anew.
        workers: instead of the panel's, where a step is dear; None: the panel's.
    """

    task: str
    steps: int
    batch_size: int
    runs: int
    lr_sgd: float
    lr_adam: float = 1e-3  # the paper's
    workers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of convergence curves: every contestant under every budget and quantizer.

    Fields:
        key: as in the paper; a panel that the paper does not have is named by a word.
        workload: key of WORKLOADS.
        contestants: keys of contestants.CONTESTANTS.
        bits: budgets, in mean bits per coordinate and worker: B / K.
        sampling: "partition": a batch of every partition, the same for all who hold it, as in the paper: who answers
            for more data computes more; "worker": a batch for every worker, drawn from its share, as in training.
        noise_ratio: eta that the noise-aware plan is told: as much batch noise as signal.
        alpha: weight of the bias in the second track; larger: closer to unbiased.
    """

    key: str
    title: str
    contestants: tuple[str, ...]
    bits: tuple[float, ...]
    workload: str = "main"
    cluster: Cluster = Cluster()
    optimizer: Literal["sgd", "adam"] = "sgd"
    quantizers: tuple[Quantizer, ...] = QUANTIZERS
    sampling: Literal["partition", "worker"] = "partition"
    noise_ratio: float = 1.0
    alpha: float = 1.0

    @property
    def heading(self) -> str:
        """What figures and the report call it."""
        return f"Fig. {self.key}: {self.title}" if self.key[0].isdigit() else f"Not in the paper: {self.title}"

    def __post_init__(self) -> None:
        if not self.contestants or not self.bits or min(self.bits) < 2:
            raise ConfigError(f"panel {self.key}: expected contestants and budgets of 2 bits or more, got {self}")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Fig. 1: what the bit allocators make of a budget.

    Fields:
        workers: two system sizes.
        bits: budgets B / K.
        dimension: coordinates under one scale when blocks are not cut, as the paper's bound D / (4 L^2) has it.
        draws: of the workers.
    """

    workers: tuple[int, ...] = (10, 20)
    bits: tuple[float, ...] = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
    dimension: int = 5_400_000  # MobileNetV3-Large has 5.4 M parameters
    draws: int = 10


@dataclass(frozen=True, kw_only=True)
class Experiments:
    """All of them, at one scale."""

    scale: str
    allocation: Allocation
    panels: tuple[Panel, ...]
    workloads: dict[str, Workload]

    def panel(self, key: str) -> Panel:
        """Return a panel by its key.

        Raises:
            ConfigError: there is none.
        """
        for panel in self.panels:
            if panel.key == key:
                return panel
        raise ConfigError(f"expected a panel out of {', '.join(p.key for p in self.panels)}, got {key!r}")


# ---------------------------------------------------------------------------------------- who takes part
BASELINES = ("is_sgd", "bgc", "erasurehead", "sgc", "one_bit_sgc", "od", "osgc")
EXACT = ("fractional_repetition", "cyclic_mds")
ALL = ("sgd", *BASELINES, "qgc")
ADAM = ("sgd", *BASELINES, "qgc", "qgc_one_track", "qgc_lmmse")
FEW = ("sgd", "is_sgd", "bgc", "erasurehead", "sgc", "od", "osgc", "qgc")
ABLATION = ("sgd", "osgc", "qgc", "qgc_equal_bits", "qgc_noise")
EQUAL_BATCHES = ("sgd", "is_sgd", "osgc", "qgc", "qgc_noise", "qgc_noise_9")
FEEDBACK = (
    "sgd",
    *(f"ef_{name}" for name in ("bgc", "erasurehead", "sgc", "od", "osgc")),
    *(f"efc_{name}" for name in ("sgc", "osgc")),
    "qgc",
)

# ------------------------------------------------------------------------------------------------- panels
# The codec has a scale per 512 coordinates where the paper has one per gradient, and so far less noise at equal bits:
# with the L2 scale 2 and 3 bits have the relative variance (15 and 4 on real gradients) of 8 and 9 bits or so under one
# scale for 5.4 million coordinates. Hence low budgets; 2.5 is little above the 2 that everybody sends at least.
LOW, HIGH = 2.5, 4.0
LARGE = Cluster(workers=20)
PANELS = (
    Panel(key="2a", title="SGD, K = 10, low budget", contestants=(*ALL, *EXACT), bits=(LOW,)),
    Panel(key="2b", title="SGD, K = 10, high budget", contestants=ALL, bits=(HIGH,)),
    Panel(key="2c", title="Adam, K = 10", contestants=ADAM, bits=(LOW,), optimizer="adam"),
    Panel(key="2d", title="SGD, K = 20, low budget", contestants=ALL, bits=(LOW,), cluster=LARGE),
    Panel(key="2e", title="SGD, K = 20, high budget", contestants=ALL, bits=(HIGH,), cluster=LARGE),
    Panel(key="2f", title="Adam, K = 20", contestants=ADAM, bits=(LOW,), cluster=LARGE, optimizer="adam"),
    # At 2 bits nothing is left to allot: everybody sends a sign and a magnitude of 0 or 1.
    Panel(key="3a", title="ablation against OSGC", contestants=ABLATION, bits=(2.0, 2.5, 3.0, 4.0)),
    Panel(key="3b", title="ResNet", contestants=FEW, bits=(LOW,), workload="resnet"),
    Panel(key="3c", title="GPT-2", contestants=FEW, bits=(LOW,), workload="transformer"),
    # Twice the upper bound: p between .61 and .002, .11 on average.
    Panel(key="3d", title="more heterogeneous", contestants=ALL, bits=(LOW,), cluster=Cluster(mu_high=6.0)),
    Panel(key="3e", title="error feedback", contestants=FEEDBACK, bits=(LOW,)),
    # Ours: in the paper's figures batches belong to partitions, so a large share means a large batch.
    Panel(key="noise", title="equal batches", contestants=EQUAL_BATCHES, bits=(LOW, HIGH), sampling="worker"),
    Panel(key="4", title="detection", contestants=FEW, bits=(LOW,), workload="detection"),
)
# Fig. 3f is Fig. 2a over transmitted bits.

SMALL = {
    "main": Workload(task="digits", steps=100, batch_size=8, runs=5, lr_sgd=0.2),
    "resnet": Workload(task="digits_resnet", steps=60, batch_size=8, runs=3, lr_sgd=0.1, workers=6),
    "transformer": Workload(task="text", steps=60, batch_size=4, runs=3, lr_sgd=0.2, workers=6),
    "detection": Workload(task="digits_detection", steps=100, batch_size=4, runs=1, lr_sgd=0.05, workers=4),
}
# Not run: it needs COCO and a GPU. The rates are torchvision's and the GPT-2 recipe's usual ones, without schedules.
PAPER = {
    "main": Workload(task="coco", steps=5000, batch_size=8, runs=50, lr_sgd=0.05),
    "resnet": Workload(task="coco_resnet", steps=5000, batch_size=8, runs=50, lr_sgd=0.02),
    "transformer": Workload(task="text_gpt2", steps=5000, batch_size=8, runs=50, lr_sgd=0.1),
    "detection": Workload(task="coco", steps=5000, batch_size=8, runs=1, lr_sgd=0.05),
}


def experiments(scale: str, *, runs: int | None = None, steps: int | None = None) -> Experiments:
    """Return every experiment at a scale.

    Args:
        scale: "small" or "paper".
        runs, steps: instead of every workload's own.
    Raises:
        ConfigError: another scale, or counts below 1.
    """
    if scale not in SCALES:
        raise ConfigError(f"scale: expected one of {', '.join(SCALES)}, got {scale!r}")
    changes = {name: count for name, count in (("runs", runs), ("steps", steps)) if count is not None}
    if any(count < 1 for count in changes.values()):
        raise ConfigError(f"expected runs and steps of 1 or more, got {changes}")
    workloads = SMALL if scale == "small" else PAPER
    return Experiments(
        scale=scale,
        allocation=Allocation(draws=10 if scale == "small" else 50),
        panels=PANELS,
        workloads={name: replace(workload, **changes) for name, workload in workloads.items()},
    )
