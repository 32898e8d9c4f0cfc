"""The Triton codec: interpreted, it equals the reference bit for bit; compiled, it neither spills nor fuses.

Triton decides at import whether it interprets, so these tests run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kernel_cases import DTYPES, KINDS, assert_statistics_equal, run_encode, same_bits, values_of

from torch_qgc.kernels import Encoded, decode_sum, derive_key, encode, payload_bytes, reference, report

triton = pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_interpreted_kernels")


def random_payloads(numel: int, bits: list[int], seed: int) -> list[Encoded]:
    g = torch.Generator().manual_seed(seed)
    payloads = []
    for b in bits:
        data = torch.randint(0, 256, (payload_bytes(numel, b),), dtype=torch.uint8, generator=g)
        payloads.append(Encoded(data, numel, b))
        (payloads[-1].planes if b == 32 else payloads[-1].scales).normal_(generator=g)
    return payloads


def assert_encode_equal(gpu: Any, bits: int, dtype: torch.dtype, kind: str, numel: int, l2: bool, device: str) -> None:
    values = values_of(kind, numel, bits).to(dtype)
    expected = run_encode(reference, values, bits, derive_key(0, 1, 2), l2, 5)
    room = Encoded(torch.empty_like(expected.buffer, device=device), numel, bits)
    got = Encoded(room.buffer, numel, bits, torch.empty(2, dtype=torch.float64, device=device))
    gpu.encode(values.to(device), derive_key(0, 1, 2), l2, 5, got)
    assert torch.equal(got.buffer.cpu(), expected.buffer), (bits, dtype, kind, numel, l2)
    assert_statistics_equal(got, expected)


def assert_decode_equal(gpu: Any, numel: int, bits: list[int], accumulate: bool, device: str) -> None:
    g = torch.Generator().manual_seed(numel)
    payloads = random_payloads(numel, bits, numel)
    weights = torch.randn(len(bits), generator=g).tolist()
    expected = torch.randn(numel, generator=g)
    got = expected.to(device, copy=True)
    there = [Encoded(p.buffer.to(device), numel, p.bits) for p in payloads]
    reference.decode_sum(payloads, weights, expected, accumulate)
    gpu.decode_sum(there, weights, got, accumulate)
    assert same_bits(got.cpu(), expected), (numel, bits, accumulate)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", [1, 3, 8, 13])
def test_interpreted_encode_equals_the_reference(bits: int) -> None:
    from torch_qgc.kernels import gpu

    kind, dtype = KINDS[bits % len(KINDS)], DTYPES[bits % len(DTYPES)]
    assert_encode_equal(gpu, bits, dtype, kind, (511, 512, 1025)[bits % 3], bits % 2 == 0, "cpu")


@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_encode_equals_the_reference_on_all_kinds(bits: int, dtype: torch.dtype) -> None:
    from torch_qgc.kernels import gpu

    for numel, kind in enumerate(KINDS, start=511):
        assert_encode_equal(gpu, bits, dtype, kind, numel, bits % 2 == 1, "cpu")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("numel", "bits"),
    [(0, [4]), (1, [2, 4]), (512, [8]), (700, [1, 16, 32, 4]), (9000, [3, 2, 4]), (700, [])],
)
def test_interpreted_decode_equals_the_reference(numel: int, bits: list[int]) -> None:
    from torch_qgc.kernels import gpu

    for accumulate in (False, True):
        assert_decode_equal(gpu, numel, bits, accumulate, "cpu")


def run_interpreted(selection: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "interpreted_",
        "-m",
        selection,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert re.search(r"[1-9]\d* passed", result.stdout)


@pytest.mark.skipif(INTERPRETING, reason="this is the inner process")
def test_interpreting_kernels_gives_the_references_bits() -> None:
    run_interpreted("not slow")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(INTERPRETING, reason="this is the inner process")
def test_interpreting_kernels_gives_the_references_bits_on_all_kinds() -> None:
    run_interpreted("slow")


ENCODE = {
    "values": "*fp32",
    "scales": "*fp32",
    "planes": "*i32",
    "statistics": "*fp64",
    "blocks": "i32",
    "base": "i32",
    "k1": "i32",
}
DECODE = {
    "addresses": "*i64",
    "bits": "*i32",
    "coefficients": "*fp32",
    "out": "*fp32",
    "payloads": "i32",
    "blocks": "i32",
}


def compile_for(arch: int, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> tuple[str, str]:
    """Compile ahead of time as a launch with 16-byte aligned tensors would; return PTX and disassembly."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torch_qgc.kernels.gpu import LAUNCH

    names = list(kernel.arg_names)
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t.startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=LAUNCH)
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return compiled.asm["ptx"], code


def assert_well_compiled(ptx: str, code: str, loads: int, stores: int) -> None:
    """Two columns per load and store, nothing spilled to local memory, nothing fused."""
    assert len(re.findall(r"\bLDG\.E\.64", code)) >= loads
    assert len(re.findall(r"\bSTG\.E\.64", code)) >= stores
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert not re.search(r"\bfma\.", ptx)


def slow(*parameters: Any) -> Any:
    return pytest.param(*parameters, marks=pytest.mark.slow)


compiled = pytest.mark.skipif(INTERPRETING, reason="interpreted functions cannot be compiled")


@compiled
@pytest.mark.parametrize("arch", [90, slow(80), slow(100)])
@pytest.mark.parametrize(
    ("bits", "l2", "dtype"),
    [
        (4, False, "fp32"),
        slow(1, True, "fp32"),
        slow(4, True, "fp32"),
        slow(8, False, "fp32"),
        slow(16, True, "fp32"),
    ],
)
def test_encode_compiles_without_spills_and_with_vector_access(arch: int, bits: int, l2: bool, dtype: str) -> None:
    from torch_qgc.kernels import gpu, gpu_kernels

    constants = {"BITS": bits, "F": gpu.field_bits(bits), "L2": l2, "TILE": gpu.TILE}
    ptx, code = compile_for(arch, gpu_kernels.encode_kernel, {**ENCODE, "values": f"*{dtype}"}, constants)
    assert_well_compiled(ptx, code, loads=32, stores=bits)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_encode_of_half_precision_loads_two_columns_at_once(dtype: str) -> None:
    from torch_qgc.kernels import gpu, gpu_kernels

    constants = {"BITS": 4, "F": 4, "L2": False, "TILE": gpu.TILE}
    _, code = compile_for(90, gpu_kernels.encode_kernel, {**ENCODE, "values": f"*{dtype}"}, constants)
    assert len(re.findall(r"\bLDG\.E\b(?!\.U16)", code)) >= 32
    assert not re.search(r"\b(LDL|STL)\b", code)


@compiled
@pytest.mark.parametrize("arch", [90, slow(80), slow(100)])
@pytest.mark.parametrize("field", [4, slow(1), slow(8), slow(16)])
def test_decode_compiles_without_spills_and_with_vector_access(arch: int, field: int) -> None:
    from torch_qgc.kernels import gpu, gpu_kernels

    constants = {"F": field, "ALIGNED": True, "TILE": gpu.TILE}
    ptx, code = compile_for(arch, gpu_kernels.decode_kernel, DECODE, constants)
    assert_well_compiled(ptx, code, loads=32 + field, stores=32)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_on_a_gpu_equals_the_reference(bits: int, dtype: torch.dtype) -> None:
    from torch_qgc.kernels import gpu

    for kind in KINDS:
        for numel in (0, 1, 511, 512, 513, 100_003):
            for l2 in (False, True):
                assert_encode_equal(gpu, bits, dtype, kind, numel, l2, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("numel", [0, 1, 511, 512, 513, 100_003])
def test_decode_on_a_gpu_equals_the_reference(numel: int) -> None:
    from torch_qgc.kernels import gpu

    for bits in (*([b] for b in range(1, 17)), [4] * 8, [2, 3, 32, 8, 16, 1], []):
        for accumulate in (False, True):
            assert_decode_equal(gpu, numel, bits, accumulate, "cuda")


@pytest.mark.gpu
def test_the_public_face_runs_triton_on_a_gpu_and_takes_misaligned_slices() -> None:
    values = values_of("gaussian", 100_003)
    for start in (0, 1, 3):
        here = encode(values[start:], 4, key=(1, 2))
        there = encode(values.cuda()[start:], 4, key=(1, 2))
        assert torch.equal(there.buffer.cpu(), here.buffer)
        out, out_there = torch.zeros(100_003 - start), torch.zeros(100_003 - start, device="cuda")
        decode_sum([here], [0.3], out)
        decode_sum([there], [0.3], out_there)
        assert torch.equal(out_there.cpu(), out)
    assert report()["cuda"].startswith("Triton")
