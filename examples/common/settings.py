"""The options that the examples share; each example adds its own in a subclass."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from typer import Option

from common.delays import Delays

# Types of options whose default is the example's.
Steps = Annotated[int, Option(help="Updates of the parameters.")]
EvalEvery = Annotated[int, Option(help="Steps between two evaluations; a checkpoint is written at each.")]
BatchSize = Annotated[int, Option(help="Samples per worker and step.")]
LearningRate = Annotated[float, Option(help="Peak learning rate.")]
SlowShiftS = Annotated[float, Option(help="Seconds by which the slow worker is delayed at least.")]
SlowWaitS = Annotated[float, Option(help="Mean of its exponential delay on top, seconds.")]
Out = Annotated[Path, Option(help="Where journals, checkpoints, curves and results go.")]

DEADLINE_FACTOR = 1.5  # more: fewer workers are late; less: steps are shorter


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every example lets you choose."""

    steps: Steps
    eval_every: EvalEvery
    batch_size: BatchSize
    lr: LearningRate
    slow_shift_s: SlowShiftS
    slow_wait_s: SlowWaitS
    out: Out
    way: str = "qgc"  # of common.ways.TITLES; the command line takes several
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
    quick: Annotated[bool, Option("--quick", help="A few small steps: everything runs, nothing is learnt.")] = False

    QUICK: ClassVar[dict[str, Any]] = {}  # what --quick changes

    def __post_init__(self) -> None:
        if self.quick:
            for name, value in self.QUICK.items():
                object.__setattr__(self, name, value)
        if self.steps < 1 or self.eval_every < 1 or self.steps % self.eval_every:
            raise ValueError(
                f"--steps: expected a multiple of --eval-every, so that the last step is evaluated; got {self.steps} "
                f"and {self.eval_every}"
            )

    @property
    def delays(self) -> Delays:
        """The delays, the same for every way."""
        shift_s, wait_s = self.slow_shift_s, self.slow_wait_s
        return Delays.one_slow(
            self.workers, slow_worker=self.slow_worker, shift_s=shift_s, wait_s=wait_s, seed=self.seed
        )

    @property
    def folder(self) -> Path:
        """Where this way's files go."""
        return self.out / self.way

    def coding(self, compute_s: float) -> dict[str, Any]:
        """Return QGCState's arguments.

        Args:
            compute_s: what a step's forward and backward pass take without delays. The deadline follows from it unless
                one is chosen, and a first guess of how often each worker will be late; the job measures the rest.
        """
        deadline_s = DEADLINE_FACTOR * compute_s if self.deadline_s is None else self.deadline_s
        return {
            "straggle_probs": self.delays.missed_rounds(deadline_s, compute_s).tolist() if deadline_s else None,
            "bits_per_coordinate": self.bits,
            "downlink_bits": self.downlink_bits,
            "deadline_s": deadline_s or None,
            "seed": self.seed,
        }

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
