"""From a configuration file, TOML or JSON, to an experiment."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from torch_qgc import schemes
from torch_qgc.cli.delays import read_delays
from torch_qgc.ddp.settings import UNKNOWN_LATE
from torch_qgc.errors import ConfigError, PlanError
from torch_qgc.planner import Plan
from torch_qgc.planner.checks import Floats, per_worker
from torch_qgc.planner.delays import DelayModel, Empirical, ShiftedExponential
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.schemes import Scheme
from torch_qgc.simulator import IDEAL, Experiment, Machines, Task
from torch_qgc.simulator.delays import DelaySource, workers_of
from torch_qgc.simulator.experiment import SchemeLike
from torch_qgc.simulator.machines import Load

__all__ = ["read_experiment"]

#: What `scheme = "..."` may say.
_SCHEMES: dict[str, Callable[..., Scheme]] = {
    make.__name__: make
    for make in (
        schemes.qgc,
        schemes.osgc,
        schemes.is_sgd,
        schemes.bgc,
        schemes.sgc,
        schemes.one_bit_sgc,
        schemes.erasurehead,
        schemes.optimal_decoding,
        schemes.expander,
        schemes.fractional_repetition,
        schemes.cyclic,
        schemes.cyclic_mds,
        schemes.ye_abbe,
        schemes.block_coordinate,
    )
}


#: Steps of the trial run that says how often machines miss the deadline.
_TRIAL_STEPS = 1000


class Delays(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The table [delays]: machines, shifted exponentials, chances to be late at the deadline, or a CSV of seconds."""

    workers: int | None = None
    mu: float | list[float] | None = None
    shift: float | list[float] = 1.0
    straggle_probs: list[float] | None = None
    csv: str | None = None
    machines: Machines | None = None


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The file: a task, delays, schemes by name, and fields of `Experiment`."""

    task: str
    schemes: dict[str, dict[str, Any]]
    delays: Delays
    steps: int
    task_options: dict[str, Any] = {}
    deadline_s: float | None = None
    rule: ClosingRule | None = None
    replan_every: int | None = None
    downlink_bits: int = 32
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    max_grad_norm: float | None = None
    batch_size: int | None = None
    sampling: Literal["worker", "partition"] = "worker"
    micro_batch: int | None = None
    runs: int = 1
    seed: int = 0
    evaluate_every: int = 0
    exact_every: int = 0


def read_experiment(path: Path, *, steps: int | None = None, runs: int | None = None) -> Experiment:
    """Return the experiment that a file describes.

    Args:
        path: .toml or .json.
        steps, runs: numbers that replace the file's.
    Raises:
        ConfigError: the file does not describe an experiment; the message names the field.
        PlanError: a scheme cannot be made with the options given.
        OSError: the file cannot be read.
    """
    config = _read(path)
    if steps is not None:
        config = msgspec.structs.replace(config, steps=steps)
    if runs is not None:
        config = msgspec.structs.replace(config, runs=runs)
    deadline_s = config.deadline_s if config.rule is None else config.rule.deadline_s
    delays = _delays(config.delays, None if deadline_s == "auto" else deadline_s, path.parent)
    made = {
        name: _scheme(name, dict(options), _late(delays, deadline_s, options))
        for name, options in config.schemes.items()
    }
    task = _task(config.task, config.task_options)
    read = {"schemes", "delays", "task", "task_options", "rule"}
    kept = {name: value for name, value in msgspec.structs.asdict(config).items() if name not in read}
    return Experiment(
        model=task.model,
        loss=task.loss,
        dataset=task.dataset,
        evaluate=task.evaluate,
        collate=task.collate,
        schemes=made,
        delays=delays,
        rule=config.rule,
        **kept,
    )


def _read(path: Path) -> Config:
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: expected a name that ends in .toml or .json, got {path.suffix!r}")
    text = path.read_bytes()
    try:
        if path.suffix == ".json":
            return msgspec.json.decode(text, type=Config)
        made: Config = msgspec.toml.decode(text, type=Config)
        return made
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # TOMLDecodeError comes as the former
        raise ConfigError(f"{path}: {error}; docs/simulator.md shows an example") from error


def _late(delays: DelayModel | Machines, deadline_s: float | Literal["auto"] | None, options: dict[str, Any]) -> Floats:
    """Return each worker's chance to be late, which a scheme is designed for."""
    if deadline_s == "auto":  # as a job that has yet to measure its workers
        return np.full(workers_of(delays), UNKNOWN_LATE)
    if deadline_s is None:
        return np.zeros(workers_of(delays))
    if isinstance(delays, Machines):
        batches = per_worker(options.get("batches", 1.0), delays.workers, "batches")
        size = float(options.get("bits_per_coordinate", 4.0)) / 32.0  # the planner's default, and the mean of its bits
        load = Load(batches, np.full(delays.workers, size), size)
        delays = Empirical(delays_s=DelaySource(delays, delays.workers, 0).delays_s(_TRIAL_STEPS, load))
    return np.atleast_1d(delays.straggle_probability(deadline_s))


def _delays(config: Delays, deadline_s: float | None, folder: Path) -> DelayModel | Machines:
    given = [name for name in ("mu", "straggle_probs", "csv", "machines") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"delays: expected one of mu, straggle_probs, csv and machines, got {given or 'none'}")
    if config.machines is not None:
        return config.machines
    if config.csv is not None:
        return Empirical(delays_s=read_delays(folder / config.csv))
    if config.mu is not None:
        counts = {len(x) for x in (config.mu, config.shift) if isinstance(x, list)}
        counts |= set() if config.workers is None else {config.workers}
        if len(counts) != 1:
            raise ConfigError(f"delays: expected one number of workers, got {sorted(counts) or 'none: add workers'}")
        workers = counts.pop()
        return ShiftedExponential(
            mu=per_worker(config.mu, workers, "mu"), shift=per_worker(config.shift, workers, "shift")
        )
    shift = np.asarray(config.shift, dtype=np.float64)
    late = np.asarray(config.straggle_probs, dtype=np.float64)
    if deadline_s is None or not np.all((late > 0) & (late < 1)) or not np.all(shift < deadline_s):
        raise ConfigError(
            f"delays.straggle_probs: expected numbers in (0, 1), a deadline and a shift below it, got {late.tolist()}, "
            f"{deadline_s} and {config.shift}"
        )
    return ShiftedExponential(mu=-np.log(late) / (deadline_s - shift), shift=np.broadcast_to(shift, late.shape))


def _scheme(name: str, options: dict[str, Any], late: Floats) -> SchemeLike:
    """Return a scheme for the workers' chances to be late, unless its options state others."""
    kind = options.pop("scheme", name)
    feedback = options.pop("error_feedback", False)
    if feedback not in (False, True, "acknowledged"):
        raise ConfigError(f"schemes.{name}: expected error_feedback = true or 'acknowledged', got {feedback!r}")
    if kind == IDEAL:
        if options or feedback:
            raise ConfigError(f"schemes.{name}: expected no options of {IDEAL!r}, got {sorted(options)}")
        return IDEAL
    if kind not in _SCHEMES:
        raise ConfigError(f"schemes.{name}: expected scheme = one of {IDEAL}, {', '.join(_SCHEMES)}, got {kind!r}")
    try:
        made = _SCHEMES[kind](options.pop("straggle_probs", late), **options)
    except TypeError as error:
        raise ConfigError(f"schemes.{name}: {error}") from error
    except PlanError as error:
        raise PlanError(f"schemes.{name}: {error}") from error
    if not feedback:
        return made
    if not isinstance(made, Plan):
        raise ConfigError(f"schemes.{name}: expected error_feedback around one plan, got {kind}, which has several")
    return schemes.error_feedback(made, acknowledged=feedback == "acknowledged")


def _task(name: str, options: dict[str, Any]) -> Task:
    """Return what the function behind "module:function" returns; modules in the current directory are found first."""
    module, _, function = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"task: expected 'module:function' with a module that can be imported from {folder} or is installed, got "
            f"{name!r} ({error}): write a function that returns torch_qgc.simulator.Task, see docs/simulator.md"
        ) from error
    if not callable(make):
        raise ConfigError(f"task: expected {name!r} to be a function, got {type(make).__name__}")
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ConfigError(f"task_options: {name}: {error}") from error
    task = make(**options)
    if not isinstance(task, Task):
        raise ConfigError(f"task: expected {name} to return torch_qgc.simulator.Task, got {type(task).__name__}")
    return task
