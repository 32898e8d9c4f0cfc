"""Run the panels: every contestant, budget, quantizer and run is one job, whose result is kept in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
    (out / "runs").mkdir(parents=True, exist_ok=True)
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
        return dict(task.judge(model))

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
        torch.save(trained[0].state_dict(), out / "runs" / f"{job.name}.pt")
    path = out / "runs" / f"{job.name}.json"
    path.with_suffix(".partial").write_text(json.dumps(record))
    path.with_suffix(".partial").replace(path)


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
    residual = trace.residual[0][np.isfinite(trace.residual[0])]
    return {
        "step": steps.tolist(),
        "loss": trace.evaluations["loss"][0].tolist(),
        "validation": float(trace.evaluations["validation"][0, -1]),
        "total_bits": sent[steps].tolist(),
        "residual": float(np.median(residual)) if len(residual) else float("nan"),
        "bits_per_step": float(trace.bits_sent[0].mean()),
        "arrived": float(trace.arrivals[0].mean()),
        "round_s": float(trace.virtual_time_s[0, -1] / trace.steps),
    }


# ------------------------------------------------------------------------------------------------ tables
def run_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a row of tables.RUN_FIELDS for each result."""
    for job, record in found:
        losses = np.array(record["loss"])
        last = max(1, round(LAST * len(losses)))
        yield {
            **_key(job),
            "run": job.run,
            "initial_loss": float(losses[0]),
            "mean_loss": float(losses.mean()),
            "final_loss": float(losses[-last:].mean()),
            **{name: record[name] for name in ("validation", "residual", "bits_per_step", "arrived", "round_s")},
        }


def curve_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield rows of tables.CURVE_FIELDS: the runs of each curve put together."""
    curves: dict[str, list[tuple[Job, dict[str, Any]]]] = {}
    for job, record in found:
        curves.setdefault(job.name.rsplit("-", 1)[0], []).append((job, record))
    for members in curves.values():
        losses = np.array([record["loss"] for _, record in members])  # [runs, points]
        bits = np.mean([record["total_bits"] for _, record in members], axis=0)
        for i, step in enumerate(members[0][1]["step"]):
            at = {"loss": losses[:, i].mean(), "lowest": losses[:, i].min(), "highest": losses[:, i].max()}
            at = {name: float(value) for name, value in at.items()}
            yield {**_key(members[0][0]), "step": step, "total_bits": float(bits[i]), **at}


def detection_rows(found: Iterable[tuple[Job, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield a row of tables.DETECTION_FIELDS for each result whose model was examined."""
    for job, record in found:
        if "examined" in record:
            yield {**_key(job), "run": job.run, **record["examined"]}


def _key(job: Job) -> dict[str, Any]:
    return {"panel": job.panel.key, "bits": job.bits, "quantizer": job.quantizer, "scheme": job.scheme}


def collect(found: Iterable[Job], out: Path) -> list[tuple[Job, dict[str, Any]]]:
    """Return the results of all runs of which every job is done: contestants are compared over the same runs."""
    results = [(job, result(job, out)) for job in found]
    broken = {(job.panel.key, job.run) for job, record in results if record is None}
    return [(job, record) for job, record in results if record and (job.panel.key, job.run) not in broken]
