"""The C++ codec equals the reference bit for bit, at every instruction set, and never leaves its buffers."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers.kernel_cases import DTYPES, KINDS, assert_statistics_equal, run_encode, same_bits, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.kernels import Encoded, derive_key, native, ops, payload_bytes, reference

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=f"no C++ codec, {native.missing()}")

SIZES = (0, 1, 511, 512, 513, 2500)
LEVELS = [] if native.missing() else list(range(native.INSTRUCTION_SETS.index(native.instruction_set()) + 1))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_encode_equals_the_reference(bits: int, dtype: torch.dtype) -> None:
    for kind, numel, l2 in itertools.product(KINDS, SIZES, (False, True)):
        values = values_of(kind, numel, bits).to(dtype)
        key = derive_key(bits, numel, 0)
        expected = run_encode(reference, values, bits, key, l2, 5)
        for isa in LEVELS:
            got = run_encode(ops.Native(isa), values, bits, key, l2, 5)
            where = (kind, numel, l2, native.INSTRUCTION_SETS[isa])
            assert torch.equal(got.buffer, expected.buffer), where
            assert_statistics_equal(got, expected)


@given(
    st.integers(0, 1300),
    st.lists(st.sampled_from([*range(1, 17), 32]), max_size=6),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_decode_of_arbitrary_bytes_equals_the_reference(
    numel: int, bits: list[int], noise: bool, accumulate: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    payloads = []
    for b in bits:
        data = torch.randint(0, 256, (payload_bytes(numel, b),), dtype=torch.uint8, generator=g)
        payload = Encoded.from_buffer(data.numpy().tobytes(), numel, b)
        if not noise:  # else scales are any bit pattern: subnormal, inf, nan
            (payload.planes if b == 32 else payload.scales).normal_(generator=g)
        payloads.append(payload)
    weights = torch.randn(len(bits), generator=g).tolist()
    start = torch.randn(numel, generator=g)
    expected = start.clone()
    reference.decode_sum(payloads, weights, expected, accumulate)
    for isa in LEVELS:
        got = start.clone()
        ops.Native(isa).decode_sum(payloads, weights, got, accumulate)
        assert same_bits(got, expected)


@pytest.mark.parametrize("bits", [1, 3, 7, 13, 32])
@pytest.mark.parametrize("numel", [1, 511, 513, 1500])
def test_memory_around_the_buffers_is_not_touched(numel: int, bits: int) -> None:
    size, guard = payload_bytes(numel, bits), 4096
    for isa in LEVELS:
        room = torch.full((size + 2 * guard,), 0xA5, dtype=torch.uint8)
        out = Encoded(room[guard : guard + size], numel, bits, torch.zeros(2, dtype=torch.float64))
        if bits == 32:
            out.planes.copy_(values_of("gaussian", numel))
        else:
            ops.Native(isa).encode(values_of("gaussian", numel), (1, 2), False, 0, out)
        decoded = torch.full((numel + 2 * guard,), 7.0)
        target = decoded[guard : guard + numel]
        ops.Native(isa).decode_sum([out], [1.0], target, True)
        assert bool((torch.cat([room[:guard], room[-guard:]]) == 0xA5).all())
        assert bool((decoded[:guard] == 7).all())
        assert bool((decoded[-guard:] == 7).all())
        assert bool((target != 7).any())


def test_any_alignment_will_do() -> None:
    values = values_of("gaussian", 1030)
    expected = run_encode(reference, values[1:].clone(), 4, (1, 2), False, 0)
    got = run_encode(ops.Native(), values[1:], 4, (1, 2), False, 0)
    assert torch.equal(got.buffer, expected.buffer)
    wire = memoryview(b"xyz" + bytes(got.to_buffer()))[3:]
    out, room = torch.zeros(1029), torch.zeros(1032)
    reference.decode_sum([expected], [0.5], out, True)
    ops.Native().decode_sum([Encoded.from_buffer(wire, 1029, 4)], [0.5], room[3:], True)
    assert torch.equal(room[3:], out)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads: int, request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    numel = 7 * 256 * 1024 + 77  # enough for seven threads
    values = values_of("gaussian", numel)
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        encoded = run_encode(ops.Native(), values, 3, (1, 2), False, 0)
        out = torch.ones(numel)
        ops.Native().decode_sum([encoded, encoded], [0.5, 2.0], out, True)
        results.append((encoded, out))
    (one, out_one), (many, out_many) = results
    assert torch.equal(one.buffer, many.buffer)
    assert torch.equal(out_one, out_many)
    assert one.variance == pytest.approx(many.variance, rel=1e-12)


def test_a_large_odd_slice_with_all_kinds_of_values() -> None:
    values = torch.cat([values_of(kind, 12_500, seed) for seed, kind in enumerate(KINDS)] + [torch.ones(3)])
    assert values.numel() == 100_003
    for bits, l2 in ((2, True), (4, False), (11, False)):
        expected = run_encode(reference, values, bits, (8, 9), l2, 1 << 33)
        assert torch.equal(run_encode(ops.Native(), values, bits, (8, 9), l2, 1 << 33).buffer, expected.buffer)


def test_the_codec_survives_a_fork() -> None:
    values = values_of("gaussian", 2 * 256 * 1024)
    expected = run_encode(ops.Native(), values, 4, (1, 2), False, 0).buffer
    child = os.fork()
    if child == 0:
        same = torch.equal(run_encode(ops.Native(), values, 4, (1, 2), False, 0).buffer, expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_without_the_library_the_reference_runs_and_one_warning_says_what_it_costs() -> None:
    script = (
        "import torch, warnings\n"
        "from torch_qgc.kernels import encode, native, report\n"
        "native._PATH = native._PATH.with_name('absent.so')\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(2): encode(torch.ones(600), 4, key=(1, 2))\n"
        "print(len(caught), caught[0].category.__name__, str(caught[0].message))\n"
        "print(report()['cpu'])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    warning, report = result.stdout.splitlines()
    assert warning.startswith("1 RuntimeWarning")
    assert "times slower" in warning
    assert "compiler" in warning
    assert report.startswith("plain torch: it was not built")


def test_a_library_built_from_other_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI", 999)
    assert "expected 999" in (native.missing() or "")
