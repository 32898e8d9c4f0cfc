"""The entry point: run every scheme as often as asked, in one or several processes, with checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch

from torch_qgc.errors import ConfigError
from torch_qgc.simulator.experiment import Experiment, SchemeLike
from torch_qgc.simulator.gradients import Loss, Samples
from torch_qgc.simulator.trace import Trace
from torch_qgc.simulator.trajectory import Trajectory

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

__all__ = ["run_experiment", "simulate"]

Advance: TypeAlias = Callable[[int], None]  # is told of steps that were made
_Job: TypeAlias = tuple[str, int]  # name of the scheme, seed


@overload
def simulate(
    model: torch.nn.Module, loss: Loss, dataset: Samples, schemes: Mapping[str, SchemeLike], **options: Any
) -> dict[str, Trace]: ...


@overload
def simulate(model: torch.nn.Module, loss: Loss, dataset: Samples, schemes: SchemeLike, **options: Any) -> Trace: ...


def simulate(
    model: torch.nn.Module,
    loss: Loss,
    dataset: Samples,
    schemes: SchemeLike | Mapping[str, SchemeLike],
    *,
    processes: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
    **experiment: Any,
) -> Trace | dict[str, Trace]:
    """Train under one or several schemes in this process, on a virtual clock and with any number of workers.

        simulate(model, loss, dataset, {"ours": plan, "ideal": IDEAL}, delays=delays, deadline_s=2.0, steps=500, lr=0.1)

    Args:
        model: a module; copies of it are trained.
        loss: (model, batch) -> mean loss over the batch.
        dataset: a map-style data set.
        schemes: a Plan, BlockPlan, PartPlan, ErrorFeedback or IDEAL, or a mapping of names to these.
        processes, checkpoint, checkpoint_every, progress: see `run_experiment`.
        **experiment: the other fields of `Experiment`: delays, deadline_s, steps, lr, ...
    Returns:
        A trace, or one per name. A run depends bit for bit on its seed alone, and not on the other schemes, runs and
        processes, as long as the number of torch threads is the same; processes have one thread each.
    Raises:
        ConfigError, PlanError: see `Experiment`.
    """
    several = isinstance(schemes, Mapping)
    named: Mapping[str, SchemeLike] = schemes if isinstance(schemes, Mapping) else {"scheme": schemes}
    traces = run_experiment(
        Experiment(model=model, loss=loss, dataset=dataset, schemes=named, **experiment),
        processes=processes,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    return traces if several else traces["scheme"]


def run_experiment(
    experiment: Experiment,
    *,
    processes: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> dict[str, Trace]:
    """Run every scheme of an experiment as often as it says.

    Args:
        experiment: what is simulated.
        processes: the number of processes that share the runs, with one thread each. They are forked, which a model on
            CUDA does not allow.
        checkpoint: a folder of checkpoints. Runs that were interrupted go on from theirs, and finished ones are read.
            The files are pickles, which can run code: use folders of your own only.
        checkpoint_every: steps between two checkpoints of a run.
        progress: show a progress bar, which needs rich.
    Returns:
        name -> trace of all runs.
    Raises:
        ConfigError: processes below 1, or several with a model on CUDA.
    """
    device = next(experiment.model.parameters()).device
    if processes < 1 or checkpoint_every < 1 or (processes > 1 and device.type != "cpu"):
        raise ConfigError(
            f"expected processes >= 1 (1 with a model on {device}) and checkpoint_every >= 1, got {processes} and "
            f"{checkpoint_every}"
        )
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(name, experiment.seed + run) for run in range(experiment.runs) for name in experiment.schemes]
    runner = _Runner(experiment, folder, checkpoint_every)
    with _bar(len(jobs) * experiment.steps, progress) as advance:
        done = _in_processes(runner, jobs, processes, advance) if processes > 1 else _here(runner, jobs, advance)
    runs = range(experiment.seed, experiment.seed + experiment.runs)
    return {name: Trace.concatenate([done[name, seed] for seed in runs]) for name in experiment.schemes}


class _Runner:
    """Run one scheme once, beginning at its checkpoint if there is one."""

    def __init__(self, experiment: Experiment, folder: Path | None, checkpoint_every: int) -> None:
        self._experiment, self._folder, self._every = experiment, folder, checkpoint_every

    def __call__(self, job: _Job, advance: Advance) -> Trace:
        name, seed = job
        scheme = self._experiment.schemes[name]
        with torch.random.fork_rng():
            trajectory = Trajectory(self._experiment, scheme, seed)
            file = None if self._folder is None else self._folder / f"{self._experiment.fingerprint(scheme, seed)}.pt"
            if file is not None and file.exists():
                trajectory.load_state_dict(torch.load(file, weights_only=False))
                advance(trajectory.step)
            while not trajectory.done:
                trajectory.advance()
                if file is not None and (trajectory.done or trajectory.step % self._every == 0):
                    _save(trajectory.state_dict(), file)
                advance(1)
        return trajectory.trace()


def _save(state: dict[str, Any], file: Path) -> None:
    """Write a file so that an interruption leaves either the old or the new one."""
    partial = file.with_suffix(f".{os.getpid()}.partial")
    torch.save(state, partial)
    os.replace(partial, file)


def _here(runner: _Runner, jobs: list[_Job], advance: Advance) -> dict[_Job, Trace]:
    return {job: runner(job, advance) for job in jobs}


# ------------------------------------------------------------------------------------------- processes
_child: list[tuple[_Runner, Synchronized[int]]] = []  # in a child: the runner, and the steps of all children together


def _adopt(runner: _Runner, made: Synchronized[int]) -> None:
    torch.set_num_threads(1)
    _child.append((runner, made))


def _in_child(job: _Job) -> Trace:
    ((runner, made),) = _child

    def advance(steps: int) -> None:
        with made.get_lock():
            made.value += steps

    return runner(job, advance)


def _in_processes(runner: _Runner, jobs: list[_Job], processes: int, advance: Advance) -> dict[_Job, Trace]:
    """Run the jobs in forked children, so that models, losses and data sets need not be pickled."""
    context = get_context("fork")
    made = context.Value("q", 0)
    shown = 0
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_adopt, initargs=(runner, made)) as pool:
        futures = {pool.submit(_in_child, job): job for job in jobs}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                advance(made.value - shown)
                shown = made.value
                for future in finished:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return {job: future.result() for future, job in futures.items()}


@contextlib.contextmanager
def _bar(total: int, visible: bool) -> Iterator[Advance]:
    if not visible:
        yield lambda steps: None
        return
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError as error:
        raise ImportError("expected rich for a progress bar, got none: pip install 'torch_qgc[cli]'") from error
    from rich.console import Console

    columns = ("simulating", BarColumn(), MofNCompleteColumn(), "steps", TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda steps: bar.advance(task, steps)
