"""The codec as torch operators: schemas, fake tensors, torch.compile; and what `report` says."""

from __future__ import annotations

import pytest
import torch
from helpers.ranks import run_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_qgc.kernels import decode_sum, derive_key, encode, native, ops, payload_bytes, reference, report

KEY = derive_key(1, 2, 3)


@pytest.mark.parametrize("bits", [1, 4, 16, 32])
def test_operators_pass_torchs_own_checks(bits: int) -> None:
    values = torch.randn(1300, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.torch_qgc.encode.default, (values, bits, *KEY, False, 0))
    payloads = [encode(values, bits, key=KEY).buffer] * 2
    for accumulate in (False, True):
        arguments = (payloads, [bits] * 2, [0.5, 0.25], torch.zeros(1300), accumulate)
        torch.library.opcheck(torch.ops.torch_qgc.decode_sum.default, arguments)


def test_fake_tensors_know_the_payloads_size() -> None:
    with FakeTensorMode():
        values = torch.empty(1300, dtype=torch.bfloat16)
        encoded = encode(values, 5, key=KEY)
        out = torch.empty(1300)
        decode_sum([encoded], [1.0], out)
    assert encoded.buffer.shape == (payload_bytes(1300, 5),)
    assert encoded.scales.shape == (3,)
    assert encoded.planes.shape == (3, 5, 16)


def compiled_and_plain(rank: int) -> list[bool]:
    """Compare a compiled function with the same one as it is, at two sizes."""

    def step(values: torch.Tensor) -> torch.Tensor:
        encoded = encode(2 * values, 4, key=KEY)
        out = torch.zeros_like(values)
        decode_sum([encoded], [0.5], out)
        return out + 1

    compiled, equal = torch.compile(step, fullgraph=True), []
    for numel in (700, 1300):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(0))
        equal.append(torch.equal(compiled(values), step(values)))
    return equal


@pytest.mark.slow
def test_a_compiled_function_sees_the_same_bits_without_graph_breaks() -> None:
    # In a process of its own: what the compiler starts must not be forked into other tests' ranks.
    assert run_ranks(compiled_and_plain, ranks=1) == [[True, True]]


def test_the_report_names_the_kernels_that_run() -> None:
    cpu = report()["cpu"]
    assert set(report()) == {"cpu", "cuda"}
    if native.missing() is None:
        assert isinstance(ops.backend(torch.device("cpu")), ops.Native)
        assert cpu == f"C++, {native.instruction_set()}"
    else:
        assert ops.backend(torch.device("cpu")) is reference
        assert "plain torch" in cpu
