"""Quantized gradient coding for PyTorch DDP: few bits, steps that close at a deadline, unbiased decoding."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_qgc.errors import (
        CodecError,
        ConfigError,
        JobFailed,
        PlanError,
        ProtocolError,
        QGCError,
        Refused,
    )
    from torch_qgc.hook import QGCState, qgc_hook
    from torch_qgc.optim import CodedAdam, CodedAdamW, CodedSGD
    from torch_qgc.planner import Plan, make_plan
    from torch_qgc.rendezvous import Network
    from torch_qgc.settings import Limits

__version__ = "0.1.0"

__all__ = [
    "CodecError",
    "CodedAdam",
    "CodedAdamW",
    "CodedSGD",
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
    "make_plan",
    "qgc_hook",
]

# Imported when first asked for: an aggregator and `qgc plan` need no torch, which takes seconds to load.
_MODULES = {
    "hook": ("QGCState", "qgc_hook"),
    "optim": ("CodedAdam", "CodedAdamW", "CodedSGD"),
    "planner": ("Plan", "make_plan"),
    "rendezvous": ("Network",),
    "settings": ("Limits",),
    "errors": ("CodecError", "ConfigError", "JobFailed", "PlanError", "ProtocolError", "QGCError", "Refused"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
_ROOMS = ("kernels", "planner", "schemes", "simulator")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
