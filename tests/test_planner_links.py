"""The bits that a link carries, against the size of the payload."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_qgc.errors import PlanError
from torch_qgc.kernels import payload_bytes
from torch_qgc.planner import bits_within, make_plan

CHOICES = [*range(2, 17), 32]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**7), st.floats(0, 1e9), st.floats(0, 1e-3))
def test_the_payload_is_through_in_time_and_the_next_larger_one_is_not(
    numel: int, seconds: float, per_byte_s: float
) -> None:
    (bits,) = bits_within(seconds, [per_byte_s], numel)
    assert bits in CHOICES
    assert bits == 2 or payload_bytes(numel, int(bits)) * per_byte_s <= seconds
    for more in CHOICES[CHOICES.index(bits) + 1 :]:
        assert payload_bytes(numel, more) * per_byte_s > seconds


def test_every_worker_has_its_own_link_and_its_own_time() -> None:
    per_byte_s = np.array([1e-9, 1e-7, 1e-6])
    bits = bits_within(0.25, per_byte_s, 1_500_000)
    assert bits.tolist() == [32, 13, 2]
    assert bits_within([0.25, 0.1, -3.0], per_byte_s, 1_500_000).tolist() == [32, 5, 2]
    assert np.all(make_plan([0.1] * 3, bits_per_coordinate=8, most_bits=bits).bits <= bits)


@pytest.mark.parametrize(
    ("seconds", "per_byte_s", "numel", "message"),
    [
        (np.nan, [1e-9], 512, "seconds"),
        (1.0, [-1e-9], 512, "per_byte_s"),
        ([1.0, 1.0], [1e-9], 512, "seconds"),
        (1.0, [1e-9], 0, "numel"),
    ],
)
def test_links_that_cannot_be_are_refused(seconds: float, per_byte_s: list[float], numel: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        bits_within(seconds, per_byte_s, numel)
