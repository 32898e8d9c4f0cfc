"""Train a small GPT with a loop that has no loader, in nanoGPT's style; start it with `torchrun --nproc-per-node 4`."""

import math
import sys
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import torch_qgc as qgc

max_iters = int(sys.argv[1]) if len(sys.argv) > 1 else 300
batch_size, block_size, accumulation = 8, 64, 2
learning_rate, warmup_iters = 3e-3, 20
eval_interval, eval_iters = 100, 20

torch.set_num_threads(1)
dist.init_process_group("gloo")
master = dist.get_rank() == 0

# The text: the running Python's standard library, as bytes.
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray(b"\n\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)
split = {"train": text[: len(text) * 9 // 10], "val": text[len(text) * 9 // 10 :]}


def get_batch(name):
    tokens = split[name]
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    windows = torch.stack([tokens[start : start + block_size + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


class GPT(nn.Module):
    def __init__(self, width=64, layers=2):
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(block_size, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, x, y):
        hidden = self.token(x) + self.place.weight[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        logits = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


torch.manual_seed(1337)
model = DistributedDataParallel(GPT())
torch.manual_seed(1337 + dist.get_rank())  # each rank draws batches of its own
state = qgc.QGCState(model, bits_per_coordinate=4, deadline_s=0.2)
model.register_comm_hook(state, qgc.qgc_hook)
optimizer = qgc.CodedAdamW(model.parameters(), state, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1)


def lr_at(iteration):
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / warmup_iters
    done = (iteration - warmup_iters) / max(max_iters - warmup_iters, 1)
    return learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def estimate_loss():
    model.eval()
    losses = {name: sum(model(*get_batch(name)).item() for _ in range(eval_iters)) / eval_iters for name in split}
    model.train()
    return losses


iteration = 0
while True:
    for group in optimizer.param_groups:
        group["lr"] = lr_at(iteration)

    # While rank 0 evaluates, the others go on: it is late then, like any other worker.
    if master and (iteration % eval_interval == 0 or iteration == max_iters):
        losses = estimate_loss()
        print(f"iteration {iteration}: train loss {losses['train']:.3f}, validation loss {losses['val']:.3f}")
    if iteration == max_iters:
        break

    for micro_step in range(accumulation):
        model.require_backward_grad_sync = micro_step == accumulation - 1
        x, y = state.thin(get_batch("train"))  # right before the forward pass
        loss = model(x, y) / accumulation
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iteration += 1

dist.destroy_process_group()
