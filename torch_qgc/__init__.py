"""Quantized gradient coding for PyTorch DDP: few bits, steps that close at a deadline, unbiased decoding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_qgc import kernels as kernels
    from torch_qgc import planner as planner
    from torch_qgc import schemes as schemes
    from torch_qgc import simulator as simulator
    from torch_qgc.ddp.network import Network
    from torch_qgc.ddp.optim import CodedAdam, CodedAdamW, CodedSGD
    from torch_qgc.ddp.settings import Limits
    from torch_qgc.ddp.state import QGCState, attach, qgc_hook
    from torch_qgc.errors import (
        CodecError,
        CollectiveFailed,
        ConfigError,
        JobFailed,
        PlanError,
        ProtocolError,
        QGCError,
        Refused,
    )
    from torch_qgc.planner import Plan, make_plan

__version__ = "0.1.0"

__all__ = [
    "CodecError",
    "CodedAdam",
    "CodedAdamW",
    "CodedSGD",
    "CollectiveFailed",
    "ConfigError",
    "JobFailed",
    "Limits",
    "Network",
    "Plan",
    "PlanError",
    "ProtocolError",
    "QGCError",
    "QGCState",
    "Refused",
    "attach",
    "make_plan",
    "qgc_hook",
]

# Names are imported when they are first used, since an aggregator and `qgc plan` need no torch, which takes seconds to
# load. Type checkers see the imports above instead, and report names that do not exist.
_MODULES = {
    "ddp.state": ("QGCState", "attach", "qgc_hook"),
    "ddp.optim": ("CodedAdam", "CodedAdamW", "CodedSGD"),
    "planner": ("Plan", "make_plan"),
    "ddp.network": ("Network",),
    "ddp.settings": ("Limits",),
    "errors": (
        "CodecError",
        "CollectiveFailed",
        "ConfigError",
        "JobFailed",
        "PlanError",
        "ProtocolError",
        "QGCError",
        "Refused",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_ROOMS = ("kernels", "planner", "schemes", "simulator")


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
