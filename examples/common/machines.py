"""Machines that are slow for a reason: this machine's equal processes, made unequal in the ways that real ones are."""

# No `from __future__ import annotations` here: DDP inspects the hook's annotations and refuses strings.
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from common.link import Relay


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a worker's machine is like.

    Fields:
        sample_s: seconds that it takes for a sample. They are slept, so that cores are idle meanwhile, as if the
            model ran on a device of its own; what this machine's cores take for the model comes on top.
        link_bytes_per_s: what its link carries each way; None: as much as this machine does.
        pause_every_s, pause_s: it stands still now and then, after so many seconds for so many, both exponential with
            these means; 0: never.
    """

    sample_s: float
    link_bytes_per_s: float | None = None
    pause_every_s: float = 0.0
    pause_s: float = 0.0

    def at_pace(self, pace: float) -> "Machine":
        """Return the machine that takes so many times as long for everything."""
        link = self.link_bytes_per_s
        return Machine(
            sample_s=self.sample_s * pace,
            link_bytes_per_s=None if link is None else link / pace,
            pause_every_s=self.pause_every_s * pace,
            pause_s=self.pause_s * pace,
        )

    def pauses(self, total_s: float, rng: np.random.Generator) -> list[tuple[float, float]]:
        """Draw when it stands still, and for how long: seconds, in order, without overlaps."""
        drawn, at_s = [], 0.0
        while self.pause_every_s:
            at_s += rng.exponential(self.pause_every_s)
            length_s = rng.exponential(self.pause_s)
            if at_s >= total_s:
                break
            drawn.append((at_s, length_s))
            at_s += length_s
        return drawn


class Emulation:
    """Let this process be slow as a machine is.

    Args:
        machine: which.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._relays: list[Relay] = []
        self._stopper: subprocess.Popen[bytes] | None = None

    def compute(self, samples: int) -> None:
        """Take the time that the machine takes for the forward and backward pass of some samples."""
        time.sleep(samples * self._machine.sample_s)

    def slow_all_reduce(self, model: DistributedDataParallel, *, bf16: bool = False) -> None:
        """Let DDP's all-reduces take the time that a ring takes on the link: 2 (K - 1) / K of the bytes each way.

        gloo's connections cannot be slowed one by one, so the time is slept before the all-reduce.
        """
        bytes_per_s, average = self._machine.link_bytes_per_s, bf16_compress_hook if bf16 else allreduce_hook

        def hook(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future[Tensor]:
            if bytes_per_s is not None:
                workers, nbytes = dist.get_world_size(group), bucket.buffer().nbytes * (0.5 if bf16 else 1.0)
                time.sleep(2 * (workers - 1) / workers * nbytes / bytes_per_s)
            return average(group, bucket)

        model.register_comm_hook(dist.group.WORLD, hook)

    def through_link(self, endpoint: str) -> str:
        """Return the address at which this worker reaches an aggregator: through its link, byte for byte."""
        if self._machine.link_bytes_per_s is None:
            return endpoint
        self._relays.append(Relay(endpoint, self._machine.link_bytes_per_s))
        return self._relays[-1].endpoint

    def stand_still(self, pauses: Sequence[tuple[float, float]]) -> None:
        """Stop this whole process (SIGSTOP) at some times from now on, and let it go on after so many seconds."""
        lines, now_s = [], 0.0
        for at_s, length_s in pauses:
            wait_s, now_s = at_s - now_s, at_s + length_s
            for pause_s, name in ((wait_s, "STOP"), (length_s, "CONT")):
                lines.append(f"sleep {max(pause_s, 0.0):.3f}; kill -{name} {os.getpid()} || exit")
        if lines:
            self._stopper = subprocess.Popen(["sh", "-c", "\n".join(lines)], stderr=subprocess.DEVNULL)

    def stop_pausing(self) -> None:
        """Stand still no more."""
        if self._stopper is not None:
            self._stopper.terminate()
            self._stopper.wait()

    def close(self) -> None:
        """Be an ordinary process again."""
        self.stop_pausing()
        for relay in self._relays:
            relay.close()
