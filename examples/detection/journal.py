"""What a job leaves behind: a line per computed step, models along the way, and a result."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Journal:
    """One rank's log, in `rank<k>.jsonl`; rank 0 also keeps the model about `every` so many steps.

    Time counts from the construction: make it just before the loop, behind a barrier.
    """

    def __init__(self, folder: Path, rank: int, *, every: int) -> None:
        self._folder, self._rank = folder, rank
        self._lines = (folder / f"rank{rank}.jsonl").open("w", buffering=1)
        self._every = every
        self._last_step, self._last_snapshot = 0, 0
        self.computed = 0
        self.started_at = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the construction."""
        return time.monotonic() - self.started_at

    def write(self, step: int, loss: float, model: nn.Module) -> None:
        """Note a step that this rank computed; it made `step` steps so far, replayed ones included."""
        record = {"step": step, "time_s": round(self.elapsed_s, 4), "loss": round(loss, 5)}
        self._lines.write(json.dumps(record | {"replayed": step - self._last_step - 1}) + "\n")
        self._last_step = step
        self.computed += 1
        if self._rank == 0 and step >= self._last_snapshot + self._every:
            self._last_snapshot = step
            state = {"step": step, "time_s": record["time_s"], "model": model.state_dict()}
            torch.save(state, self._folder / f"snapshot{step:06d}.pt")


@dataclass(kw_only=True)
class RankResult:
    """What a rank has to say after its job."""

    wall_s: float
    steps: int
    computed_steps: int
    bytes_sent_per_step: float
    parameter_hash: str


@dataclass(kw_only=True)
class JobResult:
    """What a job has to say; `contributions` are payloads per step that entered the update, by worker."""

    job: str
    numel: int
    ranks: list[RankResult]
    contributions: list[float]

    @property
    def wall_s(self) -> float:
        """Seconds until the last rank had made all steps."""
        return max(rank.wall_s for rank in self.ranks)

    @property
    def steps(self) -> int:
        """Updates of the parameters."""
        return self.ranks[0].steps

    def save(self, folder: Path) -> None:
        """Write result.json."""
        (folder / "result.json").write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> "JobResult":
        """Read what `save` wrote."""
        fields = json.loads((folder / "result.json").read_text())
        return cls(**fields | {"ranks": [RankResult(**rank) for rank in fields["ranks"]]})


def parameter_hash(model: nn.Module) -> str:
    """Return a hash of every bit of the parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def snapshots(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the models kept along the way: `step`, `time_s`, `model` (a state dict)."""
    for path in sorted(folder.glob("snapshot*.pt")):
        yield torch.load(path, weights_only=True)


class Tail:
    """Read what has been appended to a log since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def records(self) -> list[dict[str, Any]]:
        """Return the new records; a line that is still being written is left for later."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]
