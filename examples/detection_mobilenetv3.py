"""Train a detector on four unequal workers, one of them slow, in three ways, and compare.

    python examples/detection_mobilenetv3.py              three jobs, then a table, two figures and a report
    python examples/detection_mobilenetv3.py --all        with variants of torch_qgc and torch's hooks
    python examples/detection_mobilenetv3.py --quick      a minute or two: everything runs, little is learnt

All jobs see the same data, seeds and delays: DDP's all-reduce, which waits for the slow worker; DDP that
ignores whoever is late; torch_qgc. `train` is the script to read: an ordinary DDP script, where the lines
that torch_qgc asks for stand next to those they replace.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import typer
from common import hooks
from common.files import replacing
from common.job import Job
from common.launcher import JobError
from common.packages import DownloadError
from common.settings import warmup_cosine
from detection.data import CocoImages, collate, held_by_workers
from detection.evaluation import Snapshots
from detection.model import build_model
from detection.settings import JOBS, VARIANTS, Settings
from rich.console import Console
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset

import torch_qgc as qgc

COMPUTE_S = 0.12  # a step without delays, about: only a first guess of how often each will be late needs it

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=False)


def train(s: Settings) -> None:
    """Train on this rank; torchrun starts it once per worker."""
    job = Job(s, cuda=False)
    data = CocoImages(s.data, "train")
    held = held_by_workers(data, s)
    epochs, total_steps = s.schedule(images_per_worker=len(held[0]))

    model = build_model(len(data.categories) + 1, backbone=s.backbone, size=s.size)
    ddp = DistributedDataParallel(model)
    state = None
    if s.variant.coded:
        state = qgc.QGCState(ddp, plan=make_plan(s, held), deadline_s=s.deadline_s, late=s.variant.late)
        ddp.register_comm_hook(state, qgc.qgc_hook)
        loader = state.loader(data, batch_size=s.batch_size, partitions=held, collate_fn=collate, seed=s.seed)
        optimizer = qgc.CodedAdam(model.parameters(), state, lr=s.lr)
    else:
        job.part_of_fp32 = hooks.attach(s.variant.way, ddp)  # torch's hooks, in the variants
        own = Subset(data, held[job.rank])
        loader = DataLoader(own, batch_size=s.batch_size, shuffle=True, collate_fn=collate)
        optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    scheduler = LambdaLR(optimizer, warmup_cosine(total_steps, warmup_fraction=s.warmup_fraction))
    if state:
        state.bind(optimizer, scheduler=scheduler)  # so that a late worker can repeat the steps that it missed

    job.start(model, optimizer, scheduler, state)
    snapshots = Snapshots(s.folder, every=max(1, total_steps // s.snapshots), step=job.step)
    for epoch in range(len(job.curve), epochs):
        if state:
            loader.set_epoch(epoch)  # also after a resume
        for images, targets in loader:
            job.begin_step()  # the injected delay
            loss = sum(ddp(images, targets).values())
            loss.backward()
            if state:
                state.update()
            else:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            job.end_step(loss)
            if job.rank == 0:
                snapshots.take(model, job.step, job.elapsed_s)
        if state:
            state.sync_buffers()  # BatchNorm's statistics, which each worker has gathered for itself
        with job.evaluation():
            pass  # a checkpoint; models are judged when all jobs have ended

    if job.rank == 0:
        with replacing(s.folder / "model.pt") as path:
            torch.save(model.state_dict(), path)
    job.finish(s.variant.title)
    if state:
        state.close()
    dist.destroy_process_group()


def make_plan(s: Settings, held: list[list[int]]) -> qgc.Plan:
    """Plan who sends how many bits, and which data he answers for."""
    if s.variant.decoder == "uncorrected":  # equal shares, and nobody is expected to be late
        return qgc.make_plan(np.zeros(s.workers), bits_per_coordinate=s.variant.bits, decoder="uncorrected")
    late = s.delays.missed_rounds(s.deadline_s, COMPUTE_S)
    own = {"placement": np.eye(s.workers, dtype=bool)} if s.variant.placement == "local" else {}
    sizes = [len(part) for part in held]
    return qgc.make_plan(late, bits_per_coordinate=s.variant.bits, partition_sizes=sizes, second_track=None, **own)


@app.command("train")
def train_command(settings: Path) -> None:
    """Train on this rank with the settings in a JSON file: what `compare` starts under torchrun."""
    train(Settings.load(settings))


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Updates per job, rounded to whole epochs.")] = Settings.steps,
    quick: Annotated[bool, typer.Option("--quick", help="A minute or two: very few steps.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Train the variants, too.")] = False,
    job: Annotated[list[str] | None, typer.Option(help=f"Only this job: {', '.join(JOBS | VARIANTS)}.")] = None,
    data: Annotated[Literal["digits", "trees", "coco"], typer.Option(help="What to detect.")] = "digits",
    root: Annotated[Path | None, typer.Option(help="COCO-format directory, with --data coco.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where downloads and rendered images are kept.")] = Path("data"),
    placement: Annotated[Literal["local", "shuffled"], typer.Option()] = "local",
    backbone: Annotated[Literal["small", "large"], typer.Option()] = "small",
    size: Annotated[int, typer.Option(help="Side of the model's input, pixels.")] = Settings.size,
    batch_size: Annotated[int, typer.Option(help="Images per worker and step.")] = Settings.batch_size,
    deadline_s: Annotated[float, typer.Option(help="Seconds after which a step closes.")] = Settings.deadline_s,
    bits: Annotated[int, typer.Option(help="Mean bits per coordinate.")] = Settings.bits,
    lr: Annotated[float, typer.Option(help="Adam's peak learning rate.")] = Settings.lr,
    seed: Annotated[int, typer.Option()] = Settings.seed,
    out: Annotated[Path, typer.Option(help="Where logs, figures and the report go.")] = Path("demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Train in three ways on the same data, seeds and delays, and compare."""
    if context.invoked_subcommand is not None:
        return
    unknown = set(job or []) - set(JOBS | VARIANTS)
    if unknown:
        raise typer.BadParameter(f"expected {', '.join(JOBS | VARIANTS)}, got {', '.join(unknown)}", param_hint="--job")
    if (data == "coco") != (root is not None):
        raise typer.BadParameter("--data coco and --root DIR belong together", param_hint="--root")
    shared = Settings(
        data=(root or data_dir).resolve(),
        folder=out.resolve(),
        steps=24 if quick else steps,
        snapshots=3 if quick else Settings.snapshots,
        batch_size=batch_size,
        placement=placement,
        backbone=backbone,
        size=size,
        bits=bits,
        deadline_s=deadline_s,
        lr=lr,
        seed=seed,
        resume=resume,
    )
    chosen = job or list(JOBS | VARIANTS if everything else JOBS)
    from detection import comparison, rendering  # not above: matplotlib would cost each worker a second

    console = Console()
    try:
        if data != "coco":
            with console.status("Preparing the data (once)"):
                made = rendering.digits(data_dir, seed=seed) if data == "digits" else rendering.trees(data_dir)
            shared = dataclasses.replace(shared, data=made.resolve())
        comparison.run(Path(__file__).resolve(), shared, chosen, console)
    except (DownloadError, JobError, FileNotFoundError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
