"""What a job has to say when it is over, and tables of it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

import torch_qgc as qgc
from common.files import replacing

Row = dict[str, float]  # of a curve: step, time_s, and what an evaluation found by name


@dataclass(kw_only=True)
class Result:
    """What a job has to say.

    Fields:
        numel: parameters of the model.
        curve: its evaluations, the last one at its end.
        used: payloads per step that entered an update, by worker.
        ranks: by worker, counted since a resume: `late`, the part of the steps that closed without its gradient of that
            step; `computed`, the part for which it computed one (it replayed the rest); bytes `sent` and `received` per
            step; `hash` of every bit of its parameters.
        plan: as it prints, with the time after which steps close; empty without one.
        made: (steps, seconds) along the way, since a resume.
    """

    title: str
    numel: int
    curve: list[Row]
    used: list[float]
    ranks: list[dict[str, Any]]
    plan: str = ""
    made: list[tuple[int, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Updates of the parameters."""
        return int(self.curve[-1]["step"])

    @property
    def wall_s(self) -> float:
        """Seconds until all ranks had made all steps."""
        return self.curve[-1]["time_s"]

    def of_ranks(self, name: str) -> list[Any]:
        """Return a number of every rank."""
        return [rank[name] for rank in self.ranks]

    def save(self, folder: Path) -> None:
        """Write result.json."""
        with replacing(folder / "result.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2))

    @classmethod
    def load(cls, folder: Path) -> "Result":
        """Read what `save` wrote."""
        return cls(**json.loads((folder / "result.json").read_text()))


def gather(
    title: str,
    model: nn.Module,
    curve: list[Row],
    state: qgc.QGCState | None,
    part_of_fp32: float,
    made: list[tuple[int, float]],
) -> Result:
    """Gather what the ranks have to say; every rank gets it.

    torch_qgc has counted its bytes. gloo does not: those of a ring all-reduce are computed.
    """
    workers, numel = dist.get_world_size(), sum(p.numel() for p in model.parameters())
    used, plan, ring_bytes = [1.0] * workers, "", 2 * (workers - 1) / workers * 4 * numel * part_of_fp32
    mine = {"late": 0.0, "computed": 1.0, "sent": ring_bytes, "received": ring_bytes}
    if state:
        report, closing = state.report(), state.replica.courses.deadline_s(state.step)
        used, steps = report.contributions.tolist(), max(report.steps, 1)
        late, computed = report.late_steps + report.replayed_steps, report.computed_steps
        counts = {"late": late, "computed": computed, "sent": report.bytes_sent, "received": report.bytes_received}
        mine = {name: count / steps for name, count in counts.items()}
        plan = f"{state.plan}\nSteps close {f'after {closing:.3g} s' if closing else 'when all are in'}."
    ranks: list[Any] = [None] * workers
    dist.all_gather_object(ranks, mine | {"hash": parameter_hash(model)})
    return Result(title=title, numel=numel, curve=curve, used=used, ranks=ranks, plan=plan, made=made)


def parameter_hash(model: nn.Module) -> str:
    """Return a hash of every bit of the parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def rows(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """Return a table's rows: what it is, and its value for each job."""
    metrics = [name for name in results[0].curve[-1] if name not in ("step", "time_s")]
    texts: dict[str, Callable[[Result], str]] = {
        "wall time": lambda r: f"{r.wall_s:.0f} s",
        "time per step": lambda r: f"{1000 * r.wall_s / r.steps:.0f} ms",
        "steps": lambda r: str(r.steps),
        "steps late, by worker": lambda r: _percent(r.of_ranks("late")),
        "steps computed, by worker": lambda r: _percent(r.of_ranks("computed")),
        "gradients used per step, by worker": lambda r: _percent(r.used),
        "bytes sent per worker and step": lambda r: _mean_bytes(r, "sent"),
        "bytes received per worker and step": lambda r: _mean_bytes(r, "received"),
        **{name: (lambda r, name=name: f"{r.curve[-1][name]:.3f}") for name in metrics},
        "hash of the parameters, one if equal": lambda r: " ".join(sorted({*r.of_ranks("hash")})),
    }
    return [(name, [text(result) for result in results]) for name, text in texts.items()]


def _percent(values: Iterable[float]) -> str:
    return " ".join(f"{100 * value:.0f}" for value in values) + " %"


def _mean_bytes(result: Result, name: str) -> str:
    mean = sum(result.of_ranks(name)) / len(result.ranks)
    return f"{mean / 2**20:.2f} MiB ({mean / (4 * result.numel):.3f} of fp32)"


def show(results: Sequence[Result], console: Console, lines: Iterable[tuple[str, Sequence[str]]] = ()) -> None:
    """Print the plans of some jobs, and a table of `lines`, by default of `rows`."""
    table = Table("", *(result.title for result in results))
    for name, values in lines or rows(results):
        table.add_row(name, *values)
    for result in results:
        if result.plan:
            console.print(f"{result.title}: {result.plan}", highlight=False, soft_wrap=True)
    console.print(table)
