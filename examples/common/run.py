"""One rank's part in an example's job: everything around the training loop that is not the training loop."""

import contextlib
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

from common import checkpoint, closing, curve
from common.journal import Journal
from common.result import JobResult, collect
from common.settings import Settings
from common.stretch import Stretch
from common.ways import TITLES, Way

MEASURED_STEPS = 4


class Run:
    """Delays, journal, evaluation, checkpoints, curve and closing report of one rank.

        run = Run(settings)
        ...model...
        way = Way(settings.way, model, **settings.coding(run.usual_step_s(...)))
        loader = run.loader(data, way)
        ...optimizer, scheduler...
        run.start(model, way, optimizer, scheduler)
        for _ in run.stretches():
            for batch in loader:
                run.begin_step()
                ...forward, backward, way.update()...
                run.end_step(loss)
            with run.evaluation() as metrics:
                metrics["loss"] = ...
        run.finish()

    Args:
        s: the example's settings.
    """

    def __init__(self, s: Settings) -> None:
        self.s = s
        torch.set_num_threads(1)
        torch.manual_seed(s.seed)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        s.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[curve.Row] = []

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 download what the others then find."""
        if self.rank:
            dist.barrier()
        yield
        if not self.rank:
            dist.barrier()

    def usual_step_s(self, forward: Callable[[], Tensor], model: nn.Module) -> float:
        """Measure a step's forward and backward pass while all workers compute: the slowest worker's median, seconds.

        Args:
            forward: returns the loss of a batch, which it need not train on.
            model: not yet DDP's; its gradients are cleared.
        """
        seconds = []
        for _ in range(MEASURED_STEPS):
            dist.barrier()
            since = time.monotonic()
            forward().backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - since)
        model.zero_grad()
        slowest = torch.tensor([statistics.median(seconds)], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    def start(self, model: nn.Module, way: Way, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Go on from the checkpoint if asked to, and start the clock. `model` is DDP's module."""
        self.model, self.way, self.optimizer, self.scheduler = model, way, optimizer, scheduler
        done = checkpoint.restore(self.s.folder, model, optimizer, scheduler, way.state) if self.s.resume else {}
        self.rows = done.get("rows", [])
        step, elapsed_s = (int(self.rows[-1]["step"]), self.rows[-1]["time_s"]) if self.rows else (0, 0.0)
        dist.barrier()
        self.journal = Journal(self.s.folder, self.rank, step=step, elapsed_s=elapsed_s)

    def loader(self, data: Dataset[Any], way: Way, **kwargs: Any) -> Any:
        """Make the loader of the job: an iteration gives the batches until the next evaluation."""
        s = self.s
        self._stretch = Stretch(data, s.eval_every * s.batch_size * self.workers, seed=s.seed)
        return way.loader(self._stretch, batch_size=s.batch_size, seed=s.seed, **kwargs)

    def stretches(self) -> Iterator[int]:
        """Yield the numbers of the stretches that are still to be trained on.

        Behind the loop over a stretch all workers are at the same step: the place for evaluation and checkpoints.
        """
        for number in range(len(self.rows), self.s.steps // self.s.eval_every):
            self._stretch.move(number)
            self.way.set_epoch(number)
            yield number

    def begin_step(self) -> None:
        """Meet the delay that is injected into this worker's step."""
        self.journal.begin()
        self.s.delays.wait(self.rank, self.way.state.step if self.way.state else self.journal.step)

    def end_step(self, loss: Tensor) -> None:
        """Note that a step was computed and applied."""
        step = self.way.state.step if self.way.state else self.journal.step + 1
        self.journal.write(step, loss.item(), waited_s=self.way.waited_s)

    def share(self, data: Dataset[Any]) -> Dataset[Any]:
        """Return this rank's part of the validation data, of `val_limit` samples drawn from it."""
        chosen = np.random.default_rng(self.s.seed).permutation(len(data))[: self.s.val_limit]
        return Subset(data, chosen[self.rank :: self.workers].tolist())

    def total(self, sums: Tensor) -> list[float]:
        """Add up a tensor over all ranks."""
        dist.all_reduce(sums)
        return sums.tolist()

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[dict[str, float]]:
        """Take what an evaluation finds into the curve, and write a checkpoint.

        with run.evaluation() as metrics:
            metrics["loss"] = ...
        """
        step = (len(self.rows) + 1) * self.s.eval_every
        dist.barrier()  # evaluating together means waiting for the slowest, and that is on the clock
        time_s = self.journal.elapsed_s
        with self.journal.paused():
            self.way.sync_buffers()
            self.model.eval()
            metrics: dict[str, float] = {}
            with torch.no_grad():
                yield metrics
            self.model.train()
            self.rows.append({"step": step, "time_s": round(time_s, 3)} | metrics)
            checkpoint.save(self.s.folder, self.model, self.optimizer, self.scheduler, self.way.state, rows=self.rows)
            dist.barrier()

    def finish(self) -> JobResult:
        """Write the curve and the result; rank 0 prints the closing report."""
        names = {name: value for name, value in self.rows[-1].items() if name not in ("step", "time_s")}
        result = collect(
            self.s.way,
            self.model,
            self.journal,
            self.rows[-1]["time_s"],
            state=self.way.state,
            bytes_per_step=self.way.bytes_per_step,
            metrics=names,
        )
        if self.rank == 0:
            curve.write(self.rows, self.s.folder)
            curve.draw({TITLES[self.s.way]: self.rows}, self.s.folder / "curve.png")
            closing.show(result, Console())
            result.save(self.s.folder)
        self.way.close()
        dist.barrier()
        return result
