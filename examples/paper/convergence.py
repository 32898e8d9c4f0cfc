"""Run the panels: every contestant, budget, quantizer and run is one job, whose result is kept in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.files import replacing
from torch import nn

from paper.config import Cluster, Experiments, Panel, Workload
from paper.contestants import IDEAL, contestant
from paper.task import Task
from paper.tasks import TASKS
from torch_qgc import simulator

POINTS = 25  # of a curve
LAST = 0.1  # part of the run whose mean is the final loss


@dataclass(frozen=True, kw_only=True)
class Job:
    """One curve of one run. The ideal SGD has neither budget nor quantizer."""

    panel: Panel
    workload: Workload
    scheme: str
    run: int
    bits: float = 0.0
    quantizer: str = ""

    @property
    def name(self) -> str:
        """A file name."""
        return f"{self.panel.key}-{self.bits:g}-{self.quantizer or 'none'}-{self.scheme}-{self.run}"

    @property
    def settings(self) -> str:
        """What the result depends on: a file of a job with other settings is not taken."""
        p = self.panel
        chosen = (
            self.cluster,
            p.optimizer,
            p.sampling,
            p.noise_ratio,
            p.alpha,
            self.workload.task,
            self.workload.steps,
        )
        return repr((*chosen, self.workload.batch_size, self.lr, self.scheme, self.bits, self.quantizer))

    @property
    def cluster(self) -> Cluster:
        """The workers of this job."""
        own = self.panel.cluster
        return own if self.workload.workers is None else replace(own, workers=self.workload.workers)

    @property
    def lr(self) -> float:
        """The learning rate of the panel's optimizer."""
        return self.workload.lr_sgd if self.panel.optimizer == "sgd" else self.workload.lr_adam


def jobs(experiments: Experiments, panels: Iterable[str]) -> list[Job]:
    """Return the jobs of some panels; first runs first, so that what was interrupted has whole runs of all panels."""
    found = []
    for panel in map(experiments.panel, panels):
        workload = experiments.workloads[panel.workload]
        for run in range(workload.runs):
            for scheme in panel.contestants:
                common = dict(panel=panel, workload=workload, scheme=scheme, run=run)
                if scheme == IDEAL:
                    found.append(Job(**common))
                else:
                    found += [Job(**common, bits=b, quantizer=q) for b in panel.bits for q in panel.quantizers]
    return sorted(found, key=lambda job: job.run)


def result(job: Job, out: Path) -> dict[str, Any] | None:
    """Return what a job has left in `out`/runs, or None."""
    path = out / "runs" / f"{job.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["settings"] == job.settings else None


def execute(pending: Sequence[Job], out: Path, data_dir: Path, *, processes: int) -> Iterator[Job]:
    """Run jobs and yield them as they end."""
    if processes == 1:
        for job in pending:
            _run(job, out, data_dir)
            yield job
        return
    # Spawned, not forked: torch may have started threads here.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_run, job, out, data_dir): job for job in pending}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    torch.set_num_threads(1)  # of each process: more of them only wait for each other


@lru_cache(maxsize=1)
def load_task(name: str, data_dir: Path) -> Task:
    """Return a task; the last one is kept."""
    return TASKS[name](data_dir)


def _run(job: Job, out: Path, data_dir: Path) -> None:
    task = load_task(job.workload.task, data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(job.run)
    network = task.build().to(device)
    trained: list[nn.Module] = []  # the simulator trains a copy, which it shows to `evaluate` alone

    def evaluate(model: nn.Module) -> dict[str, float]:
        trained[:] = [model]
        return {"loss": task.judge(model)}

    trace = simulator.simulate(
        network,
        task.loss,
        task.train,
        _scheme(job),
        delays=job.cluster.delays(job.run),
        deadline_s=job.cluster.deadline_s,
        steps=job.workload.steps,
        optimizer=job.panel.optimizer,
        lr=job.lr,
        batch_size=job.workload.batch_size,
        sampling=job.panel.sampling,
        collate=task.collate,
        seed=job.run,
        evaluate=evaluate,
        evaluate_every=max(1, job.workload.steps // POINTS),
    )
    record = {"settings": job.settings, **_summary(trace)}
    if task.examine is not None:
        record["examined"] = dict(task.examine(trained[0]))
    with replacing(out / "runs" / f"{job.name}.json") as path:
        path.write_text(json.dumps(record))


def _scheme(job: Job) -> Any:
    if job.scheme == IDEAL:
        return simulator.IDEAL
    late = job.cluster.delays(job.run).straggle_probability(job.cluster.deadline_s)
    quantizer: Any = job.quantizer
    return contestant(job.scheme).plan(late, job.panel, quantizer, job.bits, job.run)


def _summary(trace: simulator.Trace) -> dict[str, Any]:
    """Return what the tables need of a trace of one run."""
    steps = trace.evaluation_steps
    sent = np.concatenate([[0], trace.total_bits[0]])
    return {
        "loss": trace.evaluations["loss"][0].tolist(),
        "total_bits": sent[steps].tolist(),
    }


# ------------------------------------------------------------------------------------------------ tables
def run_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield what tables.summarize takes of each result."""
    for job, record in found:
        losses = np.array(record["loss"])
        last = max(1, round(LAST * len(losses)))
        final = float(losses[-last:].mean())
        yield {**_key(job), "initial_loss": float(losses[0]), "mean_loss": float(losses.mean()), "final_loss": final}


def curve_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield what tables.at_equal_bits takes: the mean over runs of each scheme's curve."""
    curves: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job, record in found:
        curves.setdefault((job.quantizer, job.scheme), []).append(record)
    for (quantizer, scheme), records in curves.items():
        bits, losses = (np.mean([record[name] for record in records], axis=0) for name in ("total_bits", "loss"))
        for spent, loss in zip(bits.tolist(), losses.tolist()):
            yield {"quantizer": quantizer, "scheme": scheme, "total_bits": spent, "loss": loss}


def largest_share(experiments: Experiments, row: Mapping[str, Any], runs: int) -> float:
    """Return the share of the data that our plan gives to one worker, mean over runs."""
    shares = []
    for run in range(runs):
        job = Job(
            **_job(experiments, row["panel"]), scheme="qgc", run=run, bits=row["bits"], quantizer=row["quantizer"]
        )
        shares.append(_scheme(job).shares.max())
    return float(np.mean(shares))


def _job(experiments: Experiments, key: str) -> dict[str, Any]:
    panel = experiments.panel(key)
    return {"panel": panel, "workload": experiments.workloads[panel.workload]}


def detection_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a row of tables.DETECTION_FIELDS for each result whose model was examined."""
    for job, record in found:
        if "examined" in record:
            yield {**_key(job), **record["examined"]}


def _key(job: Job) -> dict[str, Any]:
    names = ("bits", "quantizer", "scheme", "run")
    return {"panel": job.panel.key, **{name: getattr(job, name) for name in names}}


def collect(found: Iterable[Job], out: Path) -> list[tuple[Job, dict[str, Any]]]:
    """Return the results of all runs of which every job is done: contestants are compared over the same runs."""
    results = [(job, result(job, out)) for job in found]
    broken = {(job.panel.key, job.run) for job, record in results if record is None}
    return [(job, record) for job, record in results if record and (job.panel.key, job.run) not in broken]
