"""The options that the examples share; each adds its own in a subclass, and says its defaults in an instance."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from typer import Option

from common.delays import PROMPT_WAIT_S, Delays


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every example lets you choose."""

    steps: Annotated[int, Option(help="Updates of the parameters.")]
    eval_every: Annotated[int, Option(help="Steps between two evaluations; each is followed by a checkpoint.")]
    batch_size: Annotated[int, Option(help="Samples per worker and step.")]
    lr: Annotated[float, Option(help="Peak learning rate.")]
    slow_shift_s: Annotated[float, Option(help="Seconds by which the slow worker is delayed at least.")]
    slow_wait_s: Annotated[float, Option(help="Mean of its exponential delay on top, seconds.")]
    out: Annotated[Path, Option(help="Where checkpoints, curves and results go.")]
    way: str = "qgc"  # of common.hooks.TITLES; the command line takes several
    workers: Annotated[int, Option(help="Processes on this machine.")] = 4
    deadline_s: Annotated[
        float | None,
        Option(help="Seconds after which a step closes; 0: never. By default half as much again as it takes."),
    ] = None
    bits: Annotated[float, Option(help="Mean bits per coordinate that a worker sends; 32: not quantized.")] = 4
    downlink_bits: Annotated[int, Option(help="Bits per coordinate of what comes back; 32: fp32.")] = 8
    slow_worker: Annotated[int, Option(help="The worker that is delayed in every step it computes; -1: none.")] = 3
    val_limit: Annotated[int, Option(help="Evaluate on that many validation samples at most.")] = 1000
    seed: Annotated[int, Option(help="Of the parameters, the data's order, the delays and the codec.")] = 0
    data_dir: Annotated[Path, Option(help="Where downloads are kept.")] = Path("data")
    resume: Annotated[bool, Option("--resume", help="Go on from the checkpoint in --out.")] = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eval_every < 1 or self.steps % self.eval_every:
            raise ValueError(
                f"--steps: expected a multiple of --eval-every, so that the last step is evaluated; got {self.steps} "
                f"and {self.eval_every}"
            )

    @property
    def delays(self) -> Delays:
        """The delays, the same for every way: one worker is slow, the others wait a hundredth of a second."""
        slow = np.arange(self.workers) == self.slow_worker
        return Delays(
            shift_s=tuple(np.where(slow, self.slow_shift_s, 0.0).tolist()),
            wait_s=tuple(np.where(slow, max(self.slow_wait_s, PROMPT_WAIT_S), PROMPT_WAIT_S).tolist()),
            seed=self.seed,
        )

    @property
    def folder(self) -> Path:
        """Where this way's files go."""
        return self.out / self.way

    def deadline(self, compute_s: float) -> float | None:
        """Return when steps close, given what forward and backward pass take without delays; None: never."""
        usual_s = 1.5 * compute_s  # more: fewer workers are late; less: steps are shorter
        return usual_s if self.deadline_s is None else self.deadline_s or None

    def arguments(self) -> list[str]:
        """Return the command line that makes these settings."""
        words = []
        for field in dataclasses.fields(self):
            option, value = "--" + field.name.replace("_", "-"), getattr(self, field.name)
            if isinstance(value, bool):
                words += [option] * value
            elif value is not None:
                words += [option, str(value)]
        return words


def warmup_cosine(total_steps: int, *, warmup_fraction: float = 0.1) -> Callable[[int], float]:
    """Return the factor on the learning rate, for LambdaLR: a linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(warmup_fraction * total_steps))

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps)))

    return factor
