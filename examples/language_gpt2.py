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
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from common import command, hooks
from common.job import Job
from common.settings import Settings, warmup_cosine
from language.text import windows
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
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


OUT = Path("demo/language")
DEFAULTS = Options(steps=80, eval_every=20, batch_size=8, lr=3e-3, slow_shift_s=0.1, slow_wait_s=0.7, out=OUT)
QUICK = dict(steps=6, eval_every=3, batch_size=2, context=32, val_limit=16, slow_wait_s=0.1)


def train(s: Options) -> None:
    """Train on this rank. What `if state` leads to is what torch_qgc adds to a DDP script."""
    job = Job(s)
    train_data, val_data, vocabulary = windows(s.data, SIZES[s.size].vocabulary, s.context, s.data_dir)
    model = build_model(s, vocabulary).to(job.device)
    tokens = next(iter(DataLoader(train_data, batch_size=s.batch_size))).to(job.device)
    compute_s = job.usual_step_s(lambda: next_token_loss(model, tokens), model)
    stretch = Subset(train_data, job.stretch(train_data, 0))  # what comes before an evaluation
    adamw = {"lr": s.lr, "betas": (0.9, 0.95), "weight_decay": 0.1}

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
        optimizer = qgc.CodedAdamW(model.parameters(), state, **adamw)
    else:
        job.part_of_fp32 = hooks.attach(s.way, ddp)
        loader = DataLoader(stretch, batch_size=s.batch_size, sampler=DistributedSampler(stretch, seed=s.seed))
        optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    scheduler = LambdaLR(optimizer, warmup_cosine(s.steps))
    if state:  # so that a late worker can repeat the steps that it missed
        state.bind(optimizer, scheduler=scheduler, max_grad_norm=MAX_GRAD_NORM)

    job.start(model, optimizer, scheduler, state)
    for number in range(len(job.curve), s.steps // s.eval_every):
        stretch.indices = job.stretch(train_data, number)
        (loader if state else loader.sampler).set_epoch(number)
        for tokens in loader:
            job.begin_step()  # the injected delay
            loss = next_token_loss(ddp, tokens.to(job.device))
            loss.backward()
            if state:
                state.update()
            else:
                clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            job.end_step(loss)
        with job.evaluation() as metrics:
            metrics |= evaluate(job, model, val_data)
    job.finish(hooks.TITLES[s.way])
    if state:
        state.close()


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


def evaluate(job: Job, model: nn.Module, data: Dataset[Tensor]) -> dict[str, float]:
    """Return the validation loss (nats per token) and perplexity; every rank sees a part of the data."""
    sums = torch.zeros(2, device=job.device)  # loss, windows
    for tokens in DataLoader(job.share(data), batch_size=16):
        loss = next_token_loss(model, tokens.to(job.device))
        sums += torch.stack([loss * len(tokens), loss.new_tensor(len(tokens))])
    dist.all_reduce(sums)
    loss_sum, count = sums.tolist()
    return {"loss": loss_sum / count, "perplexity": math.exp(loss_sum / count)}


if __name__ == "__main__":
    command.build(DEFAULTS, QUICK, train, __file__, __doc__)()
