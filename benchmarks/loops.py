"""What a late rank costs loops of several kinds: their final losses, beside plain DDP's over the same seeds.

    python benchmarks/loops.py --seeds 10

Each loop is written once, as a script has it, and run by three processes over gloo: with plain DDP, and with torch_qgc
at 4 and at 8 bits where one rank, drawn by chance, is late again and again. A late rank does not begin a step before
the others have closed it and the next one without it, so the outcome depends little on how busy the machine is. The
data are 4,000 handwritten digits of 14 x 14 pixels; losses are those of 1,000 others.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torch_qgc as qgc
from torch_qgc.job.events import Event

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from common import digits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "loops.csv"
RANKS, BATCH, EPOCHS = 3, 16, 3
LATE = 0.15  # chance that the late rank is late for a step
DEADLINE_S = 0.1
FIELDS = ["loop", "way", "seed", "loss", "steps", "late_rank", "late_steps", "thin_steps", "hardware", "command"]

cross_entropy = torch.nn.functional.cross_entropy
guess = torch.nn.functional.binary_cross_entropy_with_logits


def small(dataset: TensorDataset) -> TensorDataset:
    """Return digits of 14 x 14 pixels, flat."""
    images, labels = dataset.tensors
    return TensorDataset(torch.nn.functional.avg_pool2d(images, 2).flatten(1), labels)


def mlp(inputs: int = 196, outputs: int = 10, hidden: int = 32) -> torch.nn.Sequential:
    """Return the model."""
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs))


# --- two ways to run a loop ------------------------------------------------------------------------------------


class PlainDDP:
    """DDP as it is."""

    def __init__(self, seed: int, train: TensorDataset) -> None:
        self.seed, self.train = seed, train

    def wrap(self, module: torch.nn.Module) -> DistributedDataParallel:
        """Wrap a model."""
        return DistributedDataParallel(module)

    def loader(self, model: DistributedDataParallel) -> Any:
        """Return batches of this rank, in another order at each iteration."""
        sampler: Any = DistributedSampler(self.train, seed=self.seed)
        batches = DataLoader(self.train, batch_size=BATCH, sampler=sampler)

        class Loader:
            def __len__(self) -> int:
                return len(batches)

            def __iter__(self) -> Iterator[Any]:
                sampler.set_epoch(sampler.epoch + 1)
                return iter(batches)

        return Loader()

    def thin(self, model: DistributedDataParallel, batch: Any) -> Any:
        """Return the batch."""
        return batch

    def close(self) -> dict[str, int]:
        """End the job; return what is known of late steps."""
        return {}


class OneLate(PlainDDP):
    """torch_qgc, with one rank late at random."""

    def __init__(self, seed: int, train: TensorDataset, bits: int) -> None:
        super().__init__(seed, train)
        self._bits, self._rng = bits, np.random.default_rng(seed)
        self.late_rank = int(self._rng.integers(RANKS))
        self.states: dict[DistributedDataParallel, qgc.QGCState] = {}
        self._newest: dict[DistributedDataParallel, int] = {}  # step of which a result has come

    def wrap(self, module: torch.nn.Module) -> DistributedDataParallel:
        """Wrap a model; its forward pass is late at times."""
        model = super().wrap(module)

        def note(event: Event) -> None:
            if event.name == "result" and event.step is not None:
                self._newest[model] = max(self._newest.get(model, -1), event.step)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broadcast_buffers
            state = qgc.QGCState(
                model, bits_per_coordinate=self._bits, deadline_s=DEADLINE_S, seed=self.seed, trace=note
            )
        model.register_comm_hook(state, qgc.qgc_hook)
        self.states[model] = state
        if len(self.states) == 1 and dist.get_rank() == self.late_rank:
            model.register_forward_pre_hook(lambda *_: self._be_late(model), prepend=True)
        return model

    def _be_late(self, model: DistributedDataParallel) -> None:
        step = self.states[model].step
        if step < 5 or not torch.is_grad_enabled() or self._rng.random() > LATE:
            return
        give_up_s = time.monotonic() + 20 * DEADLINE_S  # at the end of the loop there may be no next step
        while self._newest.get(model, -1) <= step and time.monotonic() < give_up_s:
            time.sleep(0.002)

    def loader(self, model: DistributedDataParallel) -> Any:
        """Return batches of this rank, thin where they have to be."""
        return self.states[model].loader(self.train, batch_size=BATCH, seed=self.seed)

    def thin(self, model: DistributedDataParallel, batch: Any) -> Any:
        """Return the batch, thin where it has to be."""
        return self.states[model].thin(batch)

    def close(self) -> dict[str, int]:
        """Leave the jobs, which compares replicas; return the late rank's counts."""
        report = next(iter(self.states.values())).report()
        counts = torch.tensor([report.late_steps, report.thin_steps])
        dist.broadcast(counts, self.late_rank)
        for state in self.states.values():
            state.close()
        late, thin = counts.tolist()
        return {"steps": report.steps, "late_rank": self.late_rank, "late_steps": late, "thin_steps": thin}


WAYS: dict[str, Callable[[int, TensorDataset], PlainDDP]] = {
    "ddp": PlainDDP,
    "4 bits": partial(OneLate, bits=4),
    "8 bits": partial(OneLate, bits=8),
}


# --- loops, as scripts have them -------------------------------------------------------------------------------


def plain(job: PlainDDP) -> torch.nn.Module:
    """Backward pass and optimizer."""
    model = job.wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    loader = job.loader(model)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.module


def accumulation(job: PlainDDP) -> torch.nn.Module:
    """Three batches an update, by a counter, without no_sync()."""
    model = job.wrap(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = job.loader(model)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader):
            (cross_entropy(model(x), y) / 3).backward()
            if (i + 1) % 3 == 0:
                optimizer.step()
                optimizer.zero_grad()
    return model.module


def average(job: PlainDDP) -> torch.nn.Module:
    """An exponential average of the model, which is what is judged."""
    model = job.wrap(mlp())
    ema = copy.deepcopy(model.module)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = job.loader(model)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                for old, new in zip(ema.parameters(), model.parameters()):
                    old.lerp_(new, 0.05)
    return ema


def sharpness_aware(job: PlainDDP) -> torch.nn.Module:
    """SAM: two backward passes an update."""
    model = job.wrap(mlp())
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
    loader = job.loader(model)
    for _ in range(EPOCHS):
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            with torch.no_grad():
                gradients = [p.grad for p in parameters if p.grad is not None]
                norm = torch.stack([g.norm() for g in gradients]).norm()
                moves = [0.05 * g / (norm + 1e-12) for g in gradients]
                torch._foreach_add_(parameters, moves)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            with torch.no_grad():
                torch._foreach_sub_(parameters, moves)
            optimizer.step()
            optimizer.zero_grad()
    return model.module


def by_hand(job: PlainDDP) -> torch.nn.Module:
    """Warm-up and cosine of the learning rate set by hand, and gradients clipped, in the loop."""
    model = job.wrap(mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    loader = job.loader(model)
    steps = EPOCHS * len(loader)
    for epoch in range(EPOCHS):
        for i, (x, y) in enumerate(loader):
            done = (epoch * len(loader) + i) / steps
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, 10 * done) * 0.5 * (1 + math.cos(math.pi * done))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return model.module


def adversarial(job: PlainDDP) -> torch.nn.Module:
    """A GAN whose generator makes one step where the discriminator makes two."""
    discriminator = job.wrap(mlp(outputs=1, hidden=64))
    generator = job.wrap(mlp(16, 196, hidden=64))
    torch.manual_seed(RANKS * job.seed + dist.get_rank())  # each rank's own noise
    of_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    of_g = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    loader = job.loader(discriminator)
    for _ in range(EPOCHS):
        for i, (x, _) in enumerate(loader):
            with torch.no_grad():
                fake = generator.module(torch.randn(len(x), 16))
            scores = discriminator(torch.cat([x, fake])).squeeze(1)
            of_d.zero_grad()
            guess(scores, torch.cat([torch.ones(len(x)), torch.zeros(len(fake))])).backward()
            of_d.step()
            if i % 2:
                noise = job.thin(generator, torch.randn(BATCH, 16))
                scores = discriminator.module(generator(noise))
                of_g.zero_grad()
                guess(scores, torch.ones_like(scores)).backward()
                of_g.step()
    return generator.module


LOOPS: dict[str, Callable[[PlainDDP], torch.nn.Module]] = {
    "plain": plain,
    "accumulation by a counter": accumulation,
    "EMA": average,
    "SAM": sharpness_aware,
    "learning rate and clipping by hand": by_hand,
    "GAN": adversarial,
}


@torch.no_grad()
def judged(module: torch.nn.Module, held_out: TensorDataset) -> float:
    """Return a classifier's cross entropy, or a generator's energy distance from the digits (Szekely & Rizzo)."""
    images, labels = held_out.tensors
    if module[-1].out_features == 10:  # type: ignore[index]
        return float(cross_entropy(module(images), labels))
    made = module(torch.randn(len(images), 16, generator=torch.Generator().manual_seed(0)))
    between, among, within = (torch.cdist(a, b).mean() for a, b in ((made, images), (made, made), (images, images)))
    return float(2 * between - among - within)


# --- running and reporting -------------------------------------------------------------------------------------


def run_all(seeds: int, out: Path) -> None:
    """Run every loop in both ways with all seeds, on this rank; rank 0 writes a line for each run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train, held_out = map(small, digits.datasets(ROOT / "data"))
    for seed in range(seeds):
        for name, loop in LOOPS.items():
            for way, make in WAYS.items():
                torch.manual_seed(seed)
                job = make(seed, train)
                module = loop(job)
                row = {"loop": name, "way": way, "seed": seed, "loss": judged(module, held_out), **job.close()}
                if dist.get_rank() == 0:
                    with out.open("a") as file:
                        print(json.dumps(row), file=file)
    dist.barrier()
    dist.destroy_process_group()


def interval(values: list[float]) -> str:
    """Return a mean, and half its 95 % t interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} +- {half:.4f}"


def show(rows: list[dict[str, Any]]) -> None:
    """Print what the rows say."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        losses[row["loop"], row["way"]].append(float(row["loss"]))
    table = Table(
        "loop", "DDP", "its spread over seeds", "bits, one rank late", "loss", "difference", "late or thin steps"
    )
    for name in LOOPS:
        base = losses[name, "ddp"]
        for way in list(WAYS)[1:]:
            reports = [row for row in rows if (row["loop"], row["way"]) == (name, way)]
            missed = statistics.mean((r["late_steps"] + r["thin_steps"]) / r["steps"] for r in reports)
            difference = interval([b - a for a, b in zip(base, losses[name, way])])
            spread, mine = f"{statistics.stdev(base):.4f}", interval(losses[name, way])
            table.add_row(name, interval(base), spread, way, mine, difference, f"{missed:.0%}")
    Console(width=150).print(table)


def main(seeds: Annotated[int, typer.Option(min=3, help="runs of each loop in either way")] = 10) -> None:
    """Run, save and print."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        subprocess.run([*torchrun, __file__, "--rank-of", str(seeds), str(out)], env=environment, check=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        for row in rows:
            row |= {"hardware": hardware, "command": f"python benchmarks/loops.py --seeds {seeds}"}
            writer.writerow(row)
    show(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        run_all(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
