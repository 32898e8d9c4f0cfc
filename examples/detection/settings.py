"""What the jobs of the demo share, and in what they differ."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from common.delays import Delays
from common.files import replacing

# Seconds before a worker begins a step. The last worker is the slow one; it is on time now and then.
SHIFT_S = (0.00, 0.01, 0.02, 0.10)
WAIT_S = (0.01, 0.02, 0.02, 0.70)
SLOW_WORKER = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to train.

    Fields:
        title: what the report calls it.
        coded: trained by torch_qgc's hook; else DDP, which waits for everybody.
        way: how DDP's gradients are averaged, of common.hooks.TITLES.
        late: "fold" or "drop" what comes after the deadline.
        decoder: "unbiased", or "uncorrected": whoever is late is ignored.
        bits: mean bits per coordinate that a worker sends; None: the setting's; 32: not quantized.
        placement: "local", "shuffled", or None: the setting's.
    """

    title: str
    coded: bool = True
    way: str = "qgc"
    late: str = "fold"
    decoder: str = "unbiased"
    bits: int | None = None
    placement: str | None = None


JOBS = {
    "ddp": Job(title="DDP, waits", coded=False, way="ddp"),
    "is_sgd": Job(title="IS-SGD, ignores the late", late="drop", decoder="uncorrected", bits=32),
    "qgc": Job(title="torch_qgc"),
}
VARIANTS = {
    "ddp_bf16": Job(title="DDP, bf16 hook", coded=False, way="bf16"),
    "ddp_powersgd": Job(title="DDP, PowerSGD hook", coded=False, way="powersgd"),
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
        resume: go on from the checkpoint in `folder`, if there is one.
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
    resume: bool = False

    @property
    def variant(self) -> Job:
        """The job, with the settings it leaves open filled in."""
        job = (JOBS | VARIANTS)[self.job]
        return dataclasses.replace(job, bits=job.bits or self.bits, placement=job.placement or self.placement)

    @property
    def delays(self) -> Delays:
        """The delays that every job meets."""
        return Delays(shift_s=SHIFT_S, wait_s=WAIT_S, seed=self.seed)

    def schedule(self, images_per_worker: int) -> tuple[int, int]:
        """Return epochs, as many as come nearest to `steps`, and the updates they make."""
        steps_per_epoch = images_per_worker // self.batch_size
        epochs = max(1, round(self.steps / steps_per_epoch))
        return epochs, epochs * steps_per_epoch

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=2))

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**fields | {"data": Path(fields["data"]), "folder": Path(fields["folder"])})
