"""Quantized gradient coding for PyTorch DDP: few bits, steps that close at a deadline, unbiased decoding."""

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
