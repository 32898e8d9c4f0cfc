"""Train GPT-2 with four unequal workers, one of them slow.

    python examples/language_gpt2.py                                 torch_qgc, a minute or two on 2 cores
    python examples/language_gpt2.py --way ddp --way qgc             and plain DDP, with a comparison
    python examples/language_gpt2.py --quick                         everything runs, nothing is learnt
    python examples/language_gpt2.py --size 124M --data FILE         GPT-2 small with its own byte pairs
    torchrun --nproc-per-node 4 examples/language_gpt2.py            where you start the processes yourself

transformers' GPT-2 from its configuration, from scratch; by default one with 0.8 million parameters that reads bytes,
on the source of Python's standard library.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from common.command import run as run_command
from common.run import Run
from common.schedule import warmup_cosine
from common.settings import BatchSize, EvalEvery, LearningRate, Out, Settings, SlowShiftS, SlowWaitS, Steps
from common.ways import Way
from language.text import windows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from typer import Option

import torch_qgc as qgc

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a GPT-2 is."""

    layers: int
    width: int
    heads: int
    vocabulary: str


SIZES = {
    "tiny": Size(layers=4, width=128, heads=4, vocabulary="bytes"),  # 0.8 M parameters
    "small": Size(layers=4, width=256, heads=8, vocabulary="gpt2"),  # 16 M, most of them the vocabulary
    "124M": Size(layers=12, width=768, heads=12, vocabulary="gpt2"),  # GPT-2 small
}


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What this example lets you choose."""

    data: Annotated[str, Option(help="stdlib, kjv (a download of 10 MB), or a text file.")] = "stdlib"
    size: Annotated[Literal["tiny", "small", "124M"], Option(help="Of the model.")] = "tiny"
    context: Annotated[int, Option(help="Tokens per sample.")] = 128
    steps: Steps = 80
    eval_every: EvalEvery = 20
    batch_size: BatchSize = 8
    lr: LearningRate = 3e-3
    slow_shift_s: SlowShiftS = 0.1
    slow_wait_s: SlowWaitS = 0.7
    out: Out = Path("demo/language")

    QUICK: ClassVar[dict[str, Any]] = {
        "steps": 6,
        "eval_every": 3,
        "batch_size": 2,
        "context": 32,
        "val_limit": 16,
        "slow_wait_s": 0.1,
    }


def train(s: Options) -> None:
    """Train on this rank."""
    run = Run(s)
    with run.rank_zero_first():
        train_data, val_data, vocabulary = windows(s.data, SIZES[s.size].vocabulary, s.context, s.data_dir)
    model = build_model(s, vocabulary).to(run.device)
    tokens = next(iter(DataLoader(train_data, batch_size=s.batch_size)))
    compute_s = run.usual_step_s(lambda: next_token_loss(model, tokens.to(run.device)), model)

    ddp = DistributedDataParallel(model)
    way = Way(s.way, ddp, **s.coding(compute_s))
    loader = run.loader(train_data, way)
    adamw = {"lr": s.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if way.state:
        optimizer = qgc.CodedAdamW(model.parameters(), way.state, **adamw)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    scheduler = LambdaLR(optimizer, warmup_cosine(s.steps))
    way.bind(optimizer, scheduler=scheduler, max_grad_norm=MAX_GRAD_NORM)

    run.start(model, way, optimizer, scheduler)
    for _ in run.stretches():
        for tokens in loader:
            run.begin_step()
            loss = next_token_loss(ddp, tokens.to(run.device))
            loss.backward()
            way.update()
            run.end_step(loss)
        with run.evaluation() as metrics:
            metrics |= evaluate(run, model, val_data)
    run.finish()


def build_model(s: Options, vocabulary: int) -> GPT2LMHeadModel:
    """Return an untrained GPT-2; without dropout, since it sees every text at most once."""
    size = SIZES[s.size]
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=s.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy (nats) of each token given those before it."""
    return model(input_ids=tokens, labels=tokens).loss


def evaluate(run: Run, model: nn.Module, data: Dataset[Tensor]) -> dict[str, float]:
    """Return the validation loss (nats per token) and perplexity; every rank sees a part of the data."""
    sums = torch.zeros(2, device=run.device)  # loss, windows
    for tokens in DataLoader(run.share(data), batch_size=16):
        loss = next_token_loss(model, tokens.to(run.device))
        sums += torch.stack([loss * len(tokens), loss.new_tensor(len(tokens))])
    loss_sum, count = run.total(sums)
    return {"loss": loss_sum / count, "perplexity": math.exp(loss_sum / count)}


if __name__ == "__main__":
    run_command(Options, train, __file__, __doc__)
