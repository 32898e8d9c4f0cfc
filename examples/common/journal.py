"""What a rank leaves behind while it trains: a line per computed step, and models along the way."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Journal:
    """One rank's log, in `rank<k>.jsonl`, and how long its steps kept it busy.

    Time counts from the construction: make it just before the loop, behind a barrier.

    Args:
        folder: where the log goes; it exists.
        rank: this rank.
        every: rank 0 keeps the model about every so many steps, in `snapshot<step>.pt`; None keeps none.
        step, elapsed_s: of the checkpoint from which the job goes on; what the log says of later steps is dropped.
    """

    def __init__(
        self, folder: Path, rank: int, *, every: int | None = None, step: int = 0, elapsed_s: float = 0.0
    ) -> None:
        self._folder, self._rank = folder, rank
        path = folder / f"rank{rank}.jsonl"
        earlier = [record for record in Tail(path).records() if record["step"] <= step]
        path.write_text("".join(json.dumps(record) + "\n" for record in earlier))
        self._lines = path.open("a", buffering=1)
        self._every = every
        self._last_snapshot = self.step = step
        self._waited_s = 0.0
        self.busy_s: dict[int, float] = {record["step"]: record["busy_s"] for record in earlier}
        self._begun_at = time.monotonic()
        self._started_at = self._begun_at - elapsed_s

    @property
    def computed(self) -> int:
        """Steps that this rank computed."""
        return len(self.busy_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the construction, pauses left out."""
        return time.monotonic() - self._started_at

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: for evaluation and checkpoints, which no way to communicate is to be charged for."""
        since = time.monotonic()
        yield
        self._started_at += time.monotonic() - since

    def begin(self) -> None:
        """Note that this rank begins a step: it has its batch."""
        self._begun_at = time.monotonic()

    def write(self, step: int, loss: float, model: nn.Module | None = None, *, waited_s: float = 0.0) -> None:
        """Note a step that this rank computed; it made `step` steps so far, replayed ones included.

        Args:
            waited_s: seconds that the rank has waited for results since it started, `state.report().wait_s`.
        """
        busy_s = round(time.monotonic() - self._begun_at - (waited_s - self._waited_s), 4)
        self._waited_s = waited_s
        record = {"step": step, "time_s": round(self.elapsed_s, 4), "loss": round(loss, 5), "busy_s": busy_s}
        self._lines.write(json.dumps(record | {"replayed": step - self.step - 1}) + "\n")
        self.step = step
        self.busy_s[step] = busy_s
        if self._every and self._rank == 0 and model is not None and step >= self._last_snapshot + self._every:
            self._last_snapshot = step
            state = {"step": step, "time_s": record["time_s"], "model": model.state_dict()}
            torch.save(state, self._folder / f"snapshot{step:06d}.pt")


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
