"""One rank's part in an example's job, apart from its model, data and loop."""

import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import torch_qgc as qgc
from common import result
from common.files import replacing
from common.launcher import PROGRESS
from common.result import Result

CHECKPOINT = "checkpoint.pt"
MADE_EVERY_S = 0.5  # between two entries of the steps that are made


class Job:
    """The process group, the injected delays, the clock, the curve of evaluations, the checkpoints and the result.
    `s` are settings with seed, delays, folder and resume; `cuda` trains on this machine's GPUs.
    """

    def __init__(self, s: Any, *, cuda: bool = torch.cuda.is_available()) -> None:
        self.s = s
        torch.set_num_threads(1)
        torch.manual_seed(s.seed)
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        s.folder.mkdir(parents=True, exist_ok=True)
        self.curve: list[result.Row] = []
        self.made: list[tuple[int, float]] = []
        self.state: qgc.QGCState | None = None
        self.part_of_fp32 = lambda: 1.0  # of DDP's bytes, that another hook sends; torch_qgc counts its own

    def usual_step_s(self, loss: Callable[[], Tensor], model: nn.Module) -> float:
        """Measure forward and backward pass of a batch while all workers compute: the slowest's median, seconds."""
        seconds = []
        for _ in range(4):
            dist.barrier()
            since = time.monotonic()
            loss().backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - since)
        model.zero_grad()
        slowest = torch.tensor([statistics.median(seconds)], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    def start(self, model: nn.Module, optimizer: Any, scheduler: Any, state: qgc.QGCState | None = None) -> None:
        """Go on from the checkpoint if asked to, and start the clock. `model` is DDP's module."""
        self.model, self.state = model, state
        self._parts = dict(model=model, optimizer=optimizer, scheduler=scheduler) | ({"qgc": state} if state else {})
        path = self.s.folder / CHECKPOINT
        if self.s.resume and path.exists():
            content = torch.load(path, weights_only=True, map_location="cpu")
            self.curve = content["curve"]
            for name, part in self._parts.items():
                part.load_state_dict(content[name])
        self.start_clock()

    def start_clock(self) -> None:
        """Start the clock, at the time and step where the curve ends, together with all ranks."""
        self._steps = int(self.curve[-1]["step"]) if self.curve else 0
        dist.barrier()
        self.began_s = self.curve[-1]["time_s"] if self.curve else 0.0
        self._zero_s = time.monotonic() - self.began_s

    @property
    def elapsed_s(self) -> float:
        """Seconds of training; evaluations and checkpoints do not count."""
        return time.monotonic() - self._zero_s

    @property
    def step(self) -> int:
        """Steps that the parameters have made."""
        return self.state.step if self.state else self._steps

    def begin_step(self) -> None:
        """Meet the delay that is injected into this worker's step."""
        time.sleep(self.s.delays.seconds(self.rank, self.step))

    def end_step(self, loss: Tensor, *, completed: float | None = None) -> None:
        """Let rank 0 say how far the job is: in steps, unless `completed` says it in something else."""
        self._steps += 1
        if self.rank == 0:
            if not self.made or self.elapsed_s > self.made[-1][1] + MADE_EVERY_S:
                self.made.append((self.step, round(self.elapsed_s, 2)))
            done = self.step if completed is None else round(completed)
            with replacing(self.s.folder / PROGRESS) as path:
                path.write_text(json.dumps({"completed": done, "loss": f"{loss.item():.2f}"}))

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[dict[str, float]]:
        """Take what an evaluation finds into the curve, and write a checkpoint; the clock stands still.

        Its place is behind the loop over a loader, where all workers are at the same step.
        """
        dist.barrier()  # evaluating together means waiting for the slowest, and that is on the clock
        row: result.Row = {"step": self.step, "time_s": round(self.elapsed_s, 3)}
        for buffer in self.model.buffers():  # plain DDP takes rank 0's statistics of BatchNorm
            dist.broadcast(buffer, 0)
        metrics: dict[str, float] = {}
        self.model.eval()
        with torch.no_grad():
            yield metrics
        self.model.train()
        self.curve.append(row | metrics)
        if self.rank == 0:
            self._save(self.curve)
        self.start_clock()

    def checkpoint(self) -> None:
        """Write a checkpoint between two steps. Of rank 0 alone, without waiting for others."""
        self._save([*self.curve, {"step": self.step, "time_s": round(self.elapsed_s, 3)}])

    def _save(self, curve: list[result.Row]) -> None:
        content = {name: part.state_dict() for name, part in self._parts.items()} | {"curve": curve}
        with replacing(self.s.folder / CHECKPOINT) as path:
            torch.save(content, path)

    def stretch(self, data: Dataset[Any], number: int) -> list[int]:
        """Return the samples to train on before evaluation `number`, by all workers together.

        All stretches run through one permutation of the data after the other, so every sample is met once per epoch of
        the data, however long a stretch is. Loaders call a stretch an epoch.
        """
        count = self.s.eval_every * self.s.batch_size * self.workers
        epochs, places = np.divmod(np.arange(count) + number * count, len(data))
        orders = {e: np.random.default_rng([self.s.seed, e]).permutation(len(data)) for e in np.unique(epochs)}
        return [int(orders[epoch][place]) for epoch, place in zip(epochs, places)]

    def share(self, data: Dataset[Any]) -> Dataset[Any]:
        """Return this rank's part of the validation data, of `val_limit` samples drawn from it."""
        chosen = np.random.default_rng(self.s.seed).permutation(len(data))[: self.s.val_limit]
        return Subset(data, chosen[self.rank :: self.workers].tolist())

    def finish(self, title: str) -> Result:
        """Gather, write and print the result. A collective, before the state is closed."""
        found = result.gather(title, self.model, self.curve, self.state, self.part_of_fp32(), self.made)
        if self.rank == 0:
            found.save(self.s.folder)
            result.show([found], Console())
        return found
