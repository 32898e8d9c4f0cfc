"""Train a detector on four workers that are slow for different reasons, in several ways, and compare.

    python examples/detection_mobilenetv3.py              three jobs, then a table, figures and a report
    python examples/detection_mobilenetv3.py --all        with the other ways
    python examples/detection_mobilenetv3.py --quick      a minute or two: everything runs, little is learnt

All jobs have the same time, data, seeds and workers: an ordinary one, one that pauses at random, one behind a slow link
and one with a slow processor. `train` is the script to read: an ordinary DDP script, where the lines that torch_qgc
asks for stand next to those they replace.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from common.job import Job
from common.launcher import JobError
from common.packages import DownloadError
from common.settings import warmup_cosine
from detection.data import CocoImages, batch_sizes, collate, held_by_workers
from detection.evaluation import Snapshots
from detection.model import build_model
from detection.settings import JOBS, PANELS, VARIANTS, Settings
from detection.workers import Worker, forever
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

import torch_qgc as qgc

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=False)


def train(s: Settings) -> None:
    """Train on this rank; torchrun starts it once per worker."""
    job = Job(s, cuda=False)
    worker = Worker(s, job.rank)  # its machine, emulated
    data = CocoImages(s.data, "train")

    model = build_model(len(data.categories) + 1, backbone=s.backbone, size=s.size)
    ddp = DistributedDataParallel(model)
    state = None
    if s.variant.coded:
        held = held_by_workers(data, s)
        state = qgc.QGCState(ddp, network=worker.network(), **options(s, held))
        ddp.register_comm_hook(state, qgc.qgc_hook)
        parts = held if s.panel == "stays" else None
        loader = state.loader(data, batch_size=s.batch_size, partitions=parts, collate_fn=collate, seed=s.seed)
        optimizer = qgc.CodedAdam(model.parameters(), state, lr=s.lr)
        weight = 1.0
    else:
        numel = sum(p.numel() for p in model.parameters())
        sizes = batch_sizes(s, gradient_bytes=4 * numel)
        job.part_of_fp32 = worker.attach(ddp)
        own = Subset(data, held_by_workers(data, s, sizes)[job.rank])
        loader = DataLoader(own, batch_size=int(sizes[job.rank]), shuffle=True, collate_fn=collate, drop_last=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
        # DDP averages over ranks; where data can move, it is samples that count alike.
        weight = float(sizes[job.rank] / sizes.mean()) if s.panel == "moves" else 1.0

    factor = warmup_cosine(s.total_s, warmup_fraction=s.warmup_fraction)
    scheduler = LambdaLR(optimizer, lambda step: factor(worker.seconds(step)))
    if state:
        state.bind(optimizer, scheduler=scheduler)  # so that a late worker can repeat the steps that it missed

    job.start(model, optimizer, scheduler, state)
    worker.start(job.step, job.began_s)
    snapshots = Snapshots(s.folder, every_s=s.total_s / s.snapshots, elapsed_s=job.began_s)
    for images, targets in forever(loader):
        if worker.seconds(job.step) >= s.total_s:
            break
        loss = sum(ddp(images, targets).values())
        worker.compute(len(images))  # the time that its machine takes
        (weight * loss).backward()
        if state:
            state.update()
        else:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        job.end_step(loss, completed=job.elapsed_s)
        if job.rank == 0 and snapshots.take(model, job.step, job.elapsed_s):
            job.checkpoint()

    ended_s = job.elapsed_s
    worker.stop()
    if state:
        state.sync_buffers()  # BatchNorm's statistics, which each worker has gathered for itself
    with job.evaluation():
        pass  # models are judged when all jobs have ended
    if job.rank == 0:
        snapshots.keep(model, job.step, ended_s)
    job.finish(s.variant.title)
    if state:
        state.close()
    worker.close()
    dist.destroy_process_group()


def options(s: Settings, held: list[list[int]]) -> dict:
    """Return what QGCState is told; where data can move, torch_qgc's defaults do."""
    own = {}
    if s.panel == "stays":  # everybody answers for the images that he has
        own = {"placement": np.eye(s.workers, dtype=bool), "partition_sizes": [len(part) for part in held]}
    if s.variant.auto:
        plan = {"plan": qgc.make_plan([0.05] * s.workers, **own)} if own else {}
        return {"deadline_s": "auto", "downlink_bits": s.downlink_bits, **plan}
    plan = qgc.make_plan([0.0] * s.workers, bits_per_coordinate=32, decoder="uncorrected", **own)
    return {"plan": plan, "deadline_s": s.deadline_s * s.pace, "late": "drop"}


@app.command("train")
def train_command(settings: Path) -> None:
    """Train on this rank with the settings in a JSON file: what `compare` starts under torchrun."""
    train(Settings.load(settings))


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    seconds: Annotated[float, typer.Option(help="How long each job trains.")] = Settings.seconds,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two: very little time.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All jobs, on both panels.")] = False,
    job: Annotated[list[str] | None, typer.Option(help=f"Only this job: {', '.join(JOBS | VARIANTS)}.")] = None,
    panel: Annotated[list[str] | None, typer.Option(help=f"Only this panel: {', '.join(PANELS)}.")] = None,
    data: Annotated[Literal["digits", "trees", "coco"], typer.Option(help="What to detect.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="COCO-format directory, with --data coco.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where downloads and rendered images are kept.")] = Path("data"),
    backbone: Annotated[Literal["small", "large"], typer.Option()] = "small",
    size: Annotated[int, typer.Option(help="Side of the model's input, pixels.")] = Settings.size,
    batch_size: Annotated[int, typer.Option(help="Images per worker and step.")] = Settings.batch_size,
    lr: Annotated[float | None, typer.Option(help="Adam's peak learning rate; each job's own best by default.")] = None,
    seed: Annotated[int, typer.Option()] = Settings.seed,
    out: Annotated[Path, typer.Option(help="Where logs, figures and the report go.")] = Path("demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Train in several ways for the same time, and compare."""
    if context.invoked_subcommand is not None:
        return
    _check(job or [], JOBS | VARIANTS, "--job")
    _check(panel or [], PANELS, "--panel")
    if (data == "coco") != (root is not None):
        raise typer.BadParameter("--data coco and --root DIR belong together", param_hint="--root")
    shared = Settings(
        data=(root or data_dir).resolve(),
        folder=out.resolve(),
        seconds=12.0 if quick else seconds,
        snapshots=2 if quick else Settings.snapshots,
        stop_s=1.0 if quick else Settings.stop_s,
        batch_size=batch_size,
        backbone=backbone,
        size=size,
        seed=seed,
        resume=resume,
    )
    from detection import demo, rendering  # not above: matplotlib would cost each worker a second

    console = Console()
    try:
        if data != "coco":
            with console.status("Preparing the data (once)"):
                made = rendering.digits(data_dir, seed=seed) if data == "digits" else rendering.trees(data_dir)
            shared = dataclasses.replace(shared, data=made.resolve())
        chosen = [
            dataclasses.replace(shared, panel=p, job=j, lr=lr or demo.tuned_lr(p, j), folder=shared.folder / p / j)
            for p in panel or (PANELS if everything else demo.PANELS)
            for j in job or (JOBS if everything else demo.JOBS)
        ]
        demo.run(Path(__file__).resolve(), chosen, shared.folder, console)
    except (DownloadError, JobError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _check(given: list[str], known: dict, option: str) -> None:
    unknown = set(given) - set(known)
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(known)}, got {', '.join(unknown)}", param_hint=option)


if __name__ == "__main__":
    app()
