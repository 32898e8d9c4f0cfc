"""GPT-2's architecture on the sources of the running Python's standard library: real text, nothing to download."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from language.text import Windows, windows
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from paper.task import Task, device_of, judging

JUDGED = 64  # windows over which the loss is taken


def text(data_dir: Path) -> Task:
    """Predict bytes with GPT-2's architecture at 2 layers of 64: 120,576 parameters, 64 bytes of context."""
    return _task("bytes", data_dir, context=64, width=64, layers=2, heads=2)


def text_gpt2(data_dir: Path) -> Task:
    """Predict GPT-2's tokens with GPT-2 small: 12 layers of 768, 124 million parameters, 1,024 tokens of context."""
    return _task("gpt2", data_dir, context=1024, width=768, layers=12, heads=12)


def language_loss(network: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross entropy of every next token, in nats."""
    batch = batch.to(device_of(network))
    logits = network(batch[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _task(vocabulary: str, data_dir: Path, *, context: int, **size: int) -> Task:
    train, _, tokens = windows("stdlib", vocabulary, context + 1, data_dir)
    some = _some(train)

    def judge(network: nn.Module) -> float:
        with judging(network):
            return float(language_loss(network, some))

    return Task(
        build=partial(_gpt2, tokens, context, **size),
        loss=language_loss,
        train=train,
        judge=judge,
    )


def _some(data: Windows) -> Tensor:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:JUDGED]
    return torch.stack([data[int(index)] for index in order])


def _gpt2(tokens: int, context: int, *, width: int, layers: int, heads: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config: Any = GPT2Config(
        vocab_size=tokens,
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        loss_type="ForCausalLM",
        resid_pdrop=0.0,  # a part of the data is seen once at most: there is nothing to regularise
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)
