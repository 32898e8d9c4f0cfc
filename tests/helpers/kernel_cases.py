"""What the tests of all kernels share: gradients of every kind, and comparison with the reference."""

from __future__ import annotations

import pytest
import torch

from torch_qgc.kernels import Encoded, ops, payload_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("gaussian", "wide", "sparse", "subnormal", "tiny", "huge", "mixed", "extremes")


def values_of(kind: str, numel: int, seed: int = 0) -> torch.Tensor:
    """Make a gradient of some kind; wide spans many magnitudes in a block, mixed has several kinds of blocks."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(numel, generator=g)
    if kind == "wide":
        v *= (3 * torch.randn(numel, generator=g)).exp()
    if kind == "sparse":
        v *= torch.rand(numel, generator=g) < 0.05
    if kind == "subnormal":
        v *= 1e-41
    if kind == "tiny":
        v *= 2.0**-91
    if kind == "huge":
        v *= 1e38
    if kind == "mixed" and numel:
        v[: numel // 3] *= 1e-30
        v[numel // 2] = float("inf")
        v[-1] = float("nan")
    if kind == "extremes":
        v = v.sign() * 3.0
    return v


def run_encode(
    backend: ops.Backend, values: torch.Tensor, bits: int, key: tuple[int, int], l2: bool, first_block: int
) -> Encoded:
    """Encode into memory that held something else."""
    buffer = torch.full((payload_bytes(values.numel(), bits),), 0xA5, dtype=torch.uint8)
    out = Encoded(buffer, values.numel(), bits, torch.full((2,), 7.0, dtype=torch.float64))
    backend.encode(values, key, l2, first_block, out)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, where one NaN is as good as another."""
    return torch.equal(a.nan_to_num(1.5, 2.5, 3.5), b.nan_to_num(1.5, 2.5, 3.5)) and torch.equal(a.isnan(), b.isnan())


def assert_statistics_equal(got: Encoded, expected: Encoded) -> None:
    """Equal but for sums in fp32 of 32 terms each; at one bit the padding's share has been subtracted."""
    slack = 1e-6 * 512 * float(expected.scales.double().square().nan_to_num().sum()) if got.bits == 1 else 0
    assert got.variance == pytest.approx(expected.variance, rel=3e-6, abs=slack, nan_ok=True)
    assert got.squared_norm == pytest.approx(expected.squared_norm, rel=3e-6, nan_ok=True)
