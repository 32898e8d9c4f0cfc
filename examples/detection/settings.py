"""What the jobs of the demo share, and in what they differ."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from common.files import replacing
from common.machines import Machine

MACHINES = (
    Machine(sample_s=0.02),
    Machine(sample_s=0.02, pause_every_s=4.0, pause_s=1.5),
    Machine(sample_s=0.02, link_bytes_per_s=12.5e6),  # 100 Mbit/s
    Machine(sample_s=0.08),  # a processor that is four times slower
)
CAUSES = ("ordinary", "pauses", "slow link", "slow processor")
FAST = (0, 1)  # whom a job keeps that leaves the slow ones out
PAUSES, SLOW_LINK, SLOW_PROCESSOR = 1, 2, 3

#: Data that can move are spread over the workers at random; data that stay are trained on where they are.
PANELS = {"moves": "data can move", "stays": "data stay where they are"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to train.

    Fields:
        title: what tables and pictures call it.
        coded: trained by torch_qgc's hook; else DDP, which waits for everybody.
        by_speed: DDP's batches are such that nobody waits for a slow processor; it is told the true speeds.
        bf16: DDP averages gradients in bf16.
        workers: those that take part.
        auto: torch_qgc measures the workers, and chooses batches, bits and deadline; else the setting's deadline
            holds, who is late is ignored, and nothing is quantized: the average of the arrivals.
    """

    title: str
    coded: bool = False
    by_speed: bool = False
    bf16: bool = False
    workers: tuple[int, ...] = (0, 1, 2, 3)
    auto: bool = False


JOBS = {
    "ddp": Job(title="DDP, waits"),
    "fast": Job(title="DDP without the slow", workers=FAST),
    "speed": Job(title="DDP, batches by speed", by_speed=True),
    "arrivals": Job(title="average of the arrivals", coded=True),
    "qgc": Job(title="torch_qgc", coded=True, auto=True),
}
VARIANTS = {"bf16": Job(title="DDP, batches by speed, bf16", by_speed=True, bf16=True)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a training process needs to know; written as JSON for the processes of a job.

    Fields:
        data: directory in COCO format.
        folder: where this job's logs, snapshots and result go.
        job: key of JOBS or VARIANTS.
        panel: key of PANELS.
        seconds: how long the job takes; its learning rate follows the time.
        batch_size: images per worker and step, the mean over workers.
        size: side of the model's input in pixels; costs time with its square.
        deadline_s: of the average of the arrivals: seconds after the first worker's start at which a step closes.
        downlink_bits: of torch_qgc's results.
        lr: Adam's peak learning rate.
        snapshots: how many models are kept along the way, for the curve.
        stop_s: for so many seconds a worker is stopped in the middle of the job; 0: it is not.
        pace: how many times as long everything takes that is emulated, and the job. More: what this machine's own
            cores take matters less, where they are busy or slow.
        resume: go on from the checkpoint in `folder`, if there is one.
    """

    data: Path
    folder: Path
    job: str = "qgc"
    panel: str = "moves"
    seconds: float = 110.0
    batch_size: int = 8
    backbone: str = "small"
    size: int = 128
    deadline_s: float = 0.4
    downlink_bits: int = 8
    lr: float = 6e-3
    warmup_fraction: float = 0.1
    snapshots: int = 12
    stop_s: float = 6.0
    pace: float = 1.0
    seed: int = 0
    resume: bool = False

    @property
    def variant(self) -> Job:
        """The job."""
        return (JOBS | VARIANTS)[self.job]

    @property
    def machines(self) -> tuple[Machine, ...]:
        """Those of the workers that take part."""
        return tuple(MACHINES[worker].at_pace(self.pace) for worker in self.variant.workers)

    @property
    def total_s(self) -> float:
        """Seconds that the job really takes."""
        return self.seconds * self.pace

    @property
    def workers(self) -> int:
        """Processes."""
        return len(self.variant.workers)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with replacing(path) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=2))

    @classmethod
    def load(cls, path: Path) -> "Settings":
        """Read what `save` wrote."""
        fields = json.loads(path.read_text())
        return cls(**fields | {"data": Path(fields["data"]), "folder": Path(fields["folder"])})
