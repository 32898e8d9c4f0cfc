"""Let tests import the modules of examples and benchmarks, fork ranks whatever ran before, and repeat themselves."""

import gc
import os
import signal
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from helpers.keys import SECRET

from torch_qgc.protocol.identity import KEY_FILE_VARIABLE

# No test depends on how fast the machine is, nor on luck: `make test` tries the same examples every time, and
# `make test-all` tries others, --hypothesis-profile=explore.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, derandomize=False)
hypothesis.settings.load_profile("same")

# In the background of a shell all that is started ignores Ctrl-C; tests of what it does send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
sys.path.append(str(ROOT / "benchmarks"))

# Torch counts devices at a process's first backward; if there are any, it starts threads for them and refuses to train
# in forks from then on. `torch.library.opcheck` registers a device that does not exist: count before it does.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()

# A forked child must not clear away what it has inherited: destructors that join a thread abort where there is none.
os.register_at_fork(after_in_child=gc.freeze)


@pytest.fixture(scope="session", autouse=True)
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let all processes find the key of `helpers.ranks.aggregators`."""
    path = tmp_path_factory.mktemp("keys") / "job.key"
    SECRET.save(path)
    os.environ[KEY_FILE_VARIABLE] = str(path)
    return path
