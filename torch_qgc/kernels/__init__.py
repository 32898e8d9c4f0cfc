"""The gradient codec: b bits per coordinate and one fp32 scale per 512, unbiased, equal on every machine.

    encoded = encode(gradient, 4, key=derive_key(seed, step, worker))
    decode_sum([encoded, ...], coefficients, out)

`reference.py` is the definition in plain torch; `codec.cpp` (CPU) and `gpu.py` (CUDA) equal it bit for bit.
Arguments are checked once: in `tensors.py`, and in `buffers.py` for those who have bytes and no torch. Names that need
torch are imported when they are first asked for. Format and reasons: docs/kernels.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .format import BLOCK, PASS_THROUGH, derive_key, payload_bytes

if TYPE_CHECKING:
    from .encoded import Encoded
    from .tensors import decode_sum, encode, report

__all__ = [
    "BLOCK",
    "PASS_THROUGH",
    "Encoded",
    "decode_sum",
    "derive_key",
    "encode",
    "payload_bytes",
    "report",
]

_WITH_TORCH = {"Encoded": "encoded", "decode_sum": "tensors", "encode": "tensors", "report": "tensors"}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _WITH_TORCH:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
