"""What the jobs of the demo share, and in what they differ."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to train.

    Fields:
        title: what the report calls it.
        coded: trained by torch_qgc's hook; else plain DDP, which waits for everybody.
        late: "fold" or "drop" what comes after the deadline.
        decoder: "unbiased", or "uncorrected": whoever is late is ignored.
        bits: mean bits per coordinate that a worker sends; None: the setting's; 32: not quantized.
        placement: "local", "shuffled", or None: the setting's.
    """

    title: str
    coded: bool = True
    late: str = "fold"
    decoder: str = "unbiased"
    bits: int | None = None
    placement: str | None = None


JOBS = {
    "ddp": Job(title="DDP, waits", coded=False),
    "is_sgd": Job(title="IS-SGD, ignores the late", late="drop", decoder="uncorrected", bits=32),
    "qgc": Job(title="torch_qgc"),
}
VARIANTS = {
    "qgc_drop": Job(title="torch_qgc, late dropped", late="drop"),
    "qgc_shuffled": Job(title="torch_qgc, data shuffled", placement="shuffled"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a training process needs to know; written as JSON for the processes of a job.

    Fields:
        data: directory in COCO format.
        folder: where this job's logs, snapshots and result go.
        job: key of JOBS or VARIANTS.
        workers: processes.
        steps: updates; rounded to whole epochs, or one shorter epoch.
        batch_size: images per worker and step.
        size: side of the model's input in pixels; costs time with its square.
        bits: mean bits per coordinate; more: less noise, more traffic.
        deadline_s: seconds after the first worker's start at which a step closes; less: faster, more late.
        lr: Adam's peak learning rate.
        snapshots: how many models are kept along the way, for the curve of the validation loss.
    """

    data: Path
    folder: Path
    job: str = "qgc"
    workers: int = 4
    steps: int = 248
    batch_size: int = 4
    placement: str = "local"
    backbone: str = "small"
    size: int = 160
    bits: int = 8
    deadline_s: float = 0.25
    lr: float = 6e-3
    warmup_fraction: float = 0.1
    snapshots: int = 8
    seed: int = 0

    @property
    def variant(self) -> Job:
        """The job, with the settings it leaves open filled in."""
        job = (JOBS | VARIANTS)[self.job]
        return dataclasses.replace(job, bits=job.bits or self.bits, placement=job.placement or self.placement)

    def schedule(self, images_per_worker: int) -> tuple[int, int]:
        """Return epochs, as many as come nearest to `steps`, and the updates they make."""
        steps_per_epoch = images_per_worker // self.batch_size
        epochs = max(1, round(self.steps / steps_per_epoch))
        return epochs, epochs * steps_per_epoch

    def learning_rate_curve(self, total_steps: int) -> Callable[[int], float]:
        """Return the factor on the learning rate: a linear warm-up, then half a cosine down to zero."""
        warmup = max(1, round(self.warmup_fraction * total_steps))

        def factor(step: int) -> float:
            return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total_steps)))

        return factor

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=2))

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**fields | {"data": Path(fields["data"]), "folder": Path(fields["folder"])})
