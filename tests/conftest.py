"""Let tests import the examples' modules, and fork ranks whatever ran before."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

# Torch counts devices at a process's first backward; if there are any, it starts threads for them and refuses to train
# in forks from then on. `torch.library.opcheck` registers a device that does not exist: count before it does.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()
