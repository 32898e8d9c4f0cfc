"""Train torchvision's ResNet-50 with four unequal workers, one of them slow.

    python examples/classification_resnet50.py                                 torch_qgc, a few minutes on 2 cores
    python examples/classification_resnet50.py --way ddp --way qgc             and plain DDP, with a comparison
    python examples/classification_resnet50.py --quick                         everything runs, nothing is learnt
    torchrun --nproc-per-node 4 examples/classification_resnet50.py            where you start the processes yourself

5,000 real handwritten digits by default; --data fashion-mnist or --data imagefolder --root DIR for more.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from common import command, digits, hooks
from common.job import Job
from common.settings import Settings, warmup_cosine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import datasets, transforms
from torchvision.models.resnet import Bottleneck, ResNet
from typer import Option

import torch_qgc as qgc


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What this example lets you choose."""

    data: Annotated[
        Literal["digits", "fashion-mnist", "imagefolder"], Option(help="What to classify; see docs/examples.md.")
    ] = "digits"
    root: Annotated[Path | None, Option(help="Directory of the data, unless it is digits.")] = None
    width: Annotated[int, Option(help="Width of the first bottlenecks; 64 is ResNet-50.")] = 64


OUT = Path("demo/classification")
DEFAULTS = Options(steps=60, eval_every=15, batch_size=16, lr=0.02, slow_shift_s=0.5, slow_wait_s=1.5, out=OUT)
QUICK = dict(steps=6, eval_every=3, batch_size=2, val_limit=16, width=8, lr=1e-3, slow_wait_s=0.1)


def train(s: Options) -> None:
    """Train on this rank. What `if state` leads to is what torch_qgc adds to a DDP script."""
    job = Job(s)
    train_data, val_data, classes = load_data(s)
    model = build_model(s, classes).to(job.device)
    batch = next(iter(DataLoader(train_data, batch_size=s.batch_size)))
    compute_s = job.usual_step_s(lambda: classification_loss(model, batch), model)
    stretch = Subset(train_data, job.stretch(train_data, 0))  # what comes before an evaluation
    sgd = {"lr": s.lr, "momentum": 0.9, "weight_decay": 1e-4}

    ddp = DistributedDataParallel(model)
    state = None
    if s.way == "qgc":
        deadline_s = s.deadline(compute_s)
        state = qgc.QGCState(
            ddp,
            straggle_probs=s.delays.missed_rounds(deadline_s, compute_s),  # a first guess, which the job corrects
            bits_per_coordinate=s.bits,
            downlink_bits=s.downlink_bits,
            deadline_s=deadline_s,
            seed=s.seed,
        )
        ddp.register_comm_hook(state, qgc.qgc_hook)
        loader = state.loader(stretch, batch_size=s.batch_size, seed=s.seed)
        optimizer = qgc.CodedSGD(model.parameters(), state, **sgd)
    else:
        job.part_of_fp32 = hooks.attach(s.way, ddp)
        loader = DataLoader(stretch, batch_size=s.batch_size, sampler=DistributedSampler(stretch, seed=s.seed))
        optimizer = torch.optim.SGD(model.parameters(), **sgd)
    scheduler = LambdaLR(optimizer, warmup_cosine(s.steps))
    if state:
        state.bind(optimizer, scheduler=scheduler)  # so that a late worker can repeat the steps that it missed

    job.start(model, optimizer, scheduler, state)
    for number in range(len(job.curve), s.steps // s.eval_every):
        stretch.indices = job.stretch(train_data, number)
        (loader if state else loader.sampler).set_epoch(number)
        for batch in loader:
            job.begin_step()  # the injected delay
            loss = classification_loss(ddp, batch)
            loss.backward()
            if state:
                state.update()
            else:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            job.end_step(loss)
        if state:
            state.sync_buffers()  # BatchNorm's statistics, which each worker has gathered for itself
        with job.evaluation() as metrics:
            metrics |= evaluate(job, model, val_data)
    job.finish(hooks.TITLES[s.way])
    if state:
        state.close()


def build_model(s: Options, classes: int) -> ResNet:
    """Return an untrained ResNet-50 whose residual branches start at zero: a few dozen steps are stable then."""
    return ResNet(Bottleneck, [3, 4, 6, 3], classes, zero_init_residual=True, width_per_group=s.width)


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch of images and labels."""
    images, labels = (tensor.to(next(model.parameters()).device) for tensor in batch)
    return cross_entropy(model(as_rgb(images)), labels)


def evaluate(job: Job, model: nn.Module, data: Dataset[Any]) -> dict[str, float]:
    """Return the validation loss and top-1 accuracy; every rank sees a part of the data."""
    sums = torch.zeros(3, device=job.device)  # loss, right answers, images
    for images, labels in DataLoader(job.share(data), batch_size=64):
        scores, truth = model(as_rgb(images).to(job.device)), labels.to(job.device)
        loss, right = cross_entropy(scores, truth, reduction="sum"), (scores.argmax(1) == truth).sum()
        sums += torch.stack([loss, right, loss.new_tensor(len(labels))])
    dist.all_reduce(sums)
    loss_sum, right_sum, count = sums.tolist()
    return {"loss": loss_sum / count, "top-1 accuracy": right_sum / count}


def as_rgb(images: Tensor) -> Tensor:
    """Give grey images [n, 1, height, width] three channels."""
    return images.expand(-1, 3, -1, -1)


def load_data(s: Options) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return training data, validation data and the number of classes.

    Raises:
        FileNotFoundError: --root is missing, or does not hold the data.
    """
    if s.data == "digits":
        return *digits.datasets(s.data_dir), 10
    if s.root is None or not s.root.is_dir():
        raise FileNotFoundError(f"--data {s.data}: expected --root, a directory that holds it; got {s.root}")
    if s.data == "fashion-mnist":  # ROOT/FashionMNIST/raw/train-images-idx3-ubyte and so on
        pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.286, 0.353)])
        return *(datasets.FashionMNIST(str(s.root), train=train, transform=pixels) for train in (True, False)), 10
    # ImageNet, say: ROOT/train/<class>/*.jpg and ROOT/val/<class>/*.jpg
    normal = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augmented = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), *normal])
    centred = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), *normal])
    train_data = datasets.ImageFolder(str(s.root / "train"), transform=augmented)
    return train_data, datasets.ImageFolder(str(s.root / "val"), transform=centred), len(train_data.classes)


if __name__ == "__main__":
    command.build(DEFAULTS, QUICK, train, __file__, __doc__)()
