"""Simulated jobs tell the decoder the temperature of every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.simulation import DEADLINE_S, delays_for, task
from test_schemes_codes import LATE

from torch_qgc.planner import make_plan
from torch_qgc.planner.temperature import LEAST
from torch_qgc.protocol.contract import ClosingRule
from torch_qgc.simulator import simulate
from torch_qgc.simulator.arrivals import Contribution
from torch_qgc.simulator.coding import SchemeCodec


def losses(decoder: str, lr: Any, **options: Any) -> np.ndarray:
    """Return what a run with this decoder ends at, for every step."""
    model, loss, dataset = task()
    trace = simulate(
        model, loss, dataset, make_plan(LATE, decoder=decoder), delays=delays_for(LATE), steps=20, lr=lr, batch_size=4,
        **options,
    )  # fmt: skip
    return trace.loss


@pytest.mark.parametrize(
    "clock", [{"deadline_s": DEADLINE_S}, {"rule": ClosingRule(deadline_s=DEADLINE_S, warmup_steps=1, late="fold")}]
)
def test_the_temperature_of_a_step_is_that_of_its_schedule(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    decode = SchemeCodec.decode

    def listen(*arguments: Any, temperature: float, **named: Any) -> None:
        told.append(temperature)
        decode(*arguments, temperature=temperature, **named)

    monkeypatch.setattr(SchemeCodec, "decode", listen)
    losses("annealed", lambda step: 0.02 * (1.0 - step / 20), **clock)
    np.testing.assert_allclose(told, 1.0 - np.arange(20) / 20, rtol=1e-12)
    told.clear()
    losses("annealed", 0.02, **clock)
    assert told == [LEAST] * 20


def test_at_the_top_of_a_schedule_late_workers_count_their_share_and_no_more() -> None:
    """Bit for bit "uncorrected": with independent rounds and no late payloads, r_k <= 1 and c_k = m_k."""
    flat, clock = (lambda step: 0.02), {"deadline_s": DEADLINE_S}
    np.testing.assert_array_equal(losses("annealed", flat, **clock), losses("uncorrected", flat, **clock))


def test_a_rate_without_a_schedule_is_decoded_without_bias_as_in_training() -> None:
    clock = {"deadline_s": DEADLINE_S}
    np.testing.assert_array_equal(losses("annealed", 0.02, **clock), losses("unbiased", 0.02, **clock))


def test_a_cold_round_decodes_to_the_bits_of_the_unbiased_decoder() -> None:
    codecs = [SchemeCodec(make_plan(LATE, decoder=decoder), 600, seed=0) for decoder in ("unbiased", "annealed")]
    vector = torch.randn(600, generator=torch.Generator().manual_seed(1))
    present = [k for k in range(len(LATE)) if codecs[0].active[k]]
    out = [[torch.zeros(600)] for _ in codecs]
    for codec, tracks in zip(codecs, out):
        payloads = {(k, 0): codec.encode(k, 0, vector, delivered=True) for k in present}
        codec.decode([Contribution(k, 0, 1) for k in present], payloads, None, tracks, step=0, temperature=1e-3)
    assert torch.equal(out[0][0], out[1][0])
    assert out[0][0].any()
