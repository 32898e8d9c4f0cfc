"""Let tests import the modules of examples and benchmarks, fork ranks whatever ran before, and depend on no clock."""

import sys
from pathlib import Path

import hypothesis
import torch

# No test depends on how fast the machine is.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
sys.path.append(str(ROOT / "benchmarks"))

# Torch counts devices at a process's first backward; if there are any, it starts threads for them and refuses to train
# in forks from then on. `torch.library.opcheck` registers a device that does not exist: count before it does.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()
