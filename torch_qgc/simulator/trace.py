"""What a simulation records: arrays over runs and steps, confidence bands of them, and files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_qgc.errors import ConfigError
from torch_qgc.planner.checks import Floats

__all__ = ["Trace", "band", "load_traces", "save_traces"]

_PER_STEP = ("loss", "residual", "bits_sent", "virtual_time_s")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """The runs of one scheme: R runs of T steps with K workers, and E evaluations.

    Attributes:
        seeds: [R] int64, the seed of each run.
        loss: [R, T], the loss at the parameters before the step, over the data that the step's gradients were computed
            on; with whole partitions that is all of the data.
        contributions: [R, T, K] uint8, the payloads of each worker in the step's round; 2 if a late one was folded in.
        bits_sent: [R, T] int64, the size of all payloads that were begun while the round was open, in time or not.
        virtual_time_s: [R, T], when the step closed.
        residual: [R, T], ||ghat - g||^2 / ||g||^2 against the true gradient g at the step's parameters; NaN where g
            was not computed.
        evaluation_steps: [E] int64, the numbers of steps after which `evaluations` were made.
        evaluations: name -> [R, E].
    """

    seeds: NDArray[np.int64]
    loss: Floats
    contributions: NDArray[np.uint8]
    bits_sent: NDArray[np.int64]
    virtual_time_s: Floats
    residual: Floats
    evaluation_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    evaluations: Mapping[str, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs, steps = self.loss.shape
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(_PER_STEP, (runs, steps))
        expected |= {"seeds": (runs,), "contributions": (runs, steps, self.contributions.shape[-1])}
        got = {name: getattr(self, name).shape for name in expected}
        expected |= {name: (runs, len(self.evaluation_steps)) for name in self.evaluations}
        got |= {name: values.shape for name, values in self.evaluations.items()}
        if got != expected:
            raise ConfigError(f"trace: expected shapes {expected}, got {got}")

    @property
    def runs(self) -> int:
        """R."""
        return len(self.seeds)

    @property
    def steps(self) -> int:
        """T."""
        return int(self.loss.shape[1])

    @property
    def workers(self) -> int:
        """K."""
        return int(self.contributions.shape[2])

    @property
    def arrivals(self) -> NDArray[np.bool_]:
        """[R, T, K] bool: a payload of the worker entered the step's round."""
        return np.asarray(self.contributions > 0)

    @property
    def total_bits(self) -> NDArray[np.int64]:
        """[R, T] int64, bits sent in all steps up to this one."""
        return np.asarray(np.cumsum(self.bits_sent, axis=1))

    def band(self, name: str, level: float = 0.95) -> tuple[Floats, Floats, Floats]:
        """Return the mean over runs and the ends of its confidence interval, as `band` does.

        Args:
            name: a field of shape [R, T], "total_bits", or the name of an evaluation.
            level: the level of confidence, in (0, 1).
        """
        return band(self.evaluations[name] if name in self.evaluations else getattr(self, name), level)

    @classmethod
    def concatenate(cls, traces: Sequence[Trace]) -> Trace:
        """Put the runs of several traces of the same experiment into one trace.

        Raises:
            ConfigError: no traces, traces that differ in steps, workers or evaluations, or a seed that occurs twice.
        """
        kinds = {(t.steps, t.workers, tuple(t.evaluation_steps), tuple(sorted(t.evaluations))) for t in traces}
        seeds = np.concatenate([t.seeds for t in traces]) if traces else np.zeros(0, dtype=np.int64)
        if len(kinds) != 1 or len(np.unique(seeds)) != len(seeds):
            raise ConfigError(
                f"traces: expected runs of one experiment with different seeds, got {len(kinds)} kinds of traces and "
                f"seeds {seeds.tolist()}: give each call of simulate its own range of seeds"
            )
        stacked = {
            name: np.concatenate([getattr(t, name) for t in traces]) for name in ("seeds", "contributions", *_PER_STEP)
        }
        evaluations = {name: np.concatenate([t.evaluations[name] for t in traces]) for name in traces[0].evaluations}
        return cls(**stacked, evaluation_steps=traces[0].evaluation_steps, evaluations=evaluations)

    def to_dict(self) -> dict[str, Any]:
        """Return lists and numbers that JSON can hold; NaN and inf become None."""
        return {
            f.name: {name: _listed(values) for name, values in self.evaluations.items()}
            if f.name == "evaluations"
            else _listed(getattr(self, f.name))
            for f in fields(self)
        }

    def __repr__(self) -> str:
        last = f", last loss {self.loss[:, -1].mean():.4g}" if self.steps else ""
        return f"Trace({self.runs} runs, {self.steps} steps, {self.workers} workers{last})"


def band(values: NDArray[Any], level: float = 0.95) -> tuple[Floats, Floats, Floats]:
    """Return the mean over runs and Student's confidence interval for it.

    Args:
        values: [R, T].
        level: the level of confidence, in (0, 1).
    Returns:
        Mean, lower and upper end, [T] each. For a single run all three are the run itself.
    """
    from scipy.stats import t

    mean = values.mean(axis=0)
    if len(values) < 2:
        return mean, mean, mean
    reach = t.ppf(0.5 + level / 2.0, len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return mean, mean - reach, mean + reach


def save_traces(traces: Mapping[str, Trace], path: str | Path) -> None:
    """Write traces to a .npz file (which `load_traces` reads), .json, or .csv with a row per scheme, run and step.

    Raises:
        ConfigError: another suffix, or a name with a slash.
    """
    path = Path(path)
    if any("/" in name for name in traces):
        raise ConfigError(f"expected names of schemes without '/', got {list(traces)}: rename them")
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {}
        for name, trace in traces.items():
            arrays |= {f"{name}/{f.name}": getattr(trace, f.name) for f in fields(trace) if f.name != "evaluations"}
            arrays |= {f"{name}/evaluations/{key}": values for key, values in trace.evaluations.items()}
        np.savez_compressed(path, **arrays)
    elif path.suffix == ".json":
        path.write_text(json.dumps({name: trace.to_dict() for name, trace in traces.items()}))
    elif path.suffix == ".csv":
        _write_csv(traces, path)
    else:
        raise ConfigError(f"{path}: expected a name that ends in .npz, .json or .csv, got {path.suffix!r}")


def load_traces(path: str | Path) -> dict[str, Trace]:
    """Return the traces that `save_traces` wrote to a .npz file, in the same order.

    Raises:
        ConfigError: the file was not written by `save_traces`.
    """
    grouped: dict[str, dict[str, Any]] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            name, *rest = key.split("/")
            values = grouped.setdefault(name, {"evaluations": {}})
            if len(rest) > 1:
                values["evaluations"]["/".join(rest[1:])] = stored[key]
            else:
                values[rest[0] if rest else ""] = stored[key]
    try:
        return {name: Trace(**values) for name, values in grouped.items()}
    except TypeError as error:
        raise ConfigError(f"{path}: expected a file written by save_traces, got another ({error})") from error


def _write_csv(traces: Mapping[str, Trace], path: Path) -> None:
    names = sorted({name for trace in traces.values() for name in trace.evaluations})
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["scheme", "seed", "step", "arrived", *_PER_STEP, *names])
        for scheme, trace in traces.items():
            arrived = trace.arrivals.sum(axis=2)
            columns = {int(step): e for e, step in enumerate(trace.evaluation_steps)}
            for run, seed in enumerate(trace.seeds):
                for step in range(trace.steps):
                    row = [scheme, int(seed), step, int(arrived[run, step])]
                    row += [getattr(trace, name)[run, step].item() for name in _PER_STEP]
                    evaluated = columns.get(step + 1)  # after this step
                    for name in names:
                        known = evaluated is not None and name in trace.evaluations
                        row.append(trace.evaluations[name][run, evaluated].item() if known else "")
                    writer.writerow(row)


def _listed(values: NDArray[Any]) -> list[Any]:
    listed = values.astype(object)
    if values.dtype.kind == "f":
        listed[~np.isfinite(values)] = None
    return list(listed.tolist())
