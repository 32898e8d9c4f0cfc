"""The change test: exact against scipy, blind to sizes, quick to see what matters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torch_qgc.job import change
from torch_qgc.job.change import ChangeTest


def ranks_with(pairs: int, new: int, old: int) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct new and old values with that many pairs in which the new one is larger."""
    above = np.full(new, pairs // new) + (np.arange(new) < pairs % new)  # old values below each new one
    return above - 0.5 + 0.01 * np.arange(new), np.arange(old, dtype=float)


@pytest.mark.parametrize("level", [0.05, 1e-3, 1e-5])
def test_limits_are_those_of_the_exact_rank_test(level: float) -> None:
    tables = change._least_counts(64, level)
    for new, table in zip(change._NEWEST, tables):
        for old in (1, 9, 20, 32):
            least = int(table[old])
            for pairs, alarms in ((least, True), (least - 1, False)):
                if pairs <= new * old:
                    x, y = ranks_with(pairs, new, old)
                    exact = stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue
                    assert (exact <= level) == alarms
            if least > new * old:  # even a complete separation may be chance
                x, y = ranks_with(new * old, new, old)
                assert stats.mannwhitneyu(x, y, alternative="greater", method="exact").pvalue > level


@pytest.mark.parametrize("rate", [0.2, 1e-3])
def test_false_alarms_are_no_more_than_stated(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Independent windows of steps that differ by chance alone, even if every difference counts; and it is not idle."""
    monkeypatch.setattr(change, "_MARGIN", 1.0)
    rng, test, runs = np.random.default_rng(0), ChangeTest(64, 2, rate), 3000
    alarms = sum(test.newest(np.ones((2, 64)), rng.lognormal(size=(2, 64))) > 0 for _ in range(runs))
    assert alarms / runs < rate + 3 * np.sqrt(rate * (1 - rate) / runs)
    if rate > 0.1:
        assert alarms / runs > rate / 4


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.0, 10.0),
    st.floats(0.0, 10.0),
    st.sampled_from([0.0, 1e-9, 0.1]),
)
@settings(max_examples=100, deadline=None)
def test_a_change_of_size_is_no_change(seed: int, fixed: float, rate: float, jitter: float) -> None:
    """However time splits into fixed and per size: sizes that jump by powers of ten at the newest steps."""
    rng, test = np.random.default_rng(seed), ChangeTest(64, 1, 1e-6)
    newest = int(rng.integers(1, 40))
    sizes = np.repeat([1.0, 10.0 ** rng.integers(-3, 4)], [64 - newest, newest])
    noise = jitter * rng.exponential(size=64)
    assert test.newest(sizes[None], (fixed + rate * sizes + noise)[None]) == 0


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("kind", [0, 1])
def test_a_clear_change_is_seen_in_four_steps_in_any_kind_of_time(factor: float, kind: int) -> None:
    rng, test = np.random.default_rng(1), ChangeTest(64, 2, 1e-4)
    times = 1.0 + 0.1 * rng.random((2, 64))
    for newest in range(1, 5):
        changed = times.copy()
        changed[kind, -newest:] *= factor
        assert test.newest(np.ones((2, 64)), changed) == (4 if newest == 4 else 0)


def test_differences_below_five_percent_are_none() -> None:
    times = np.ones((1, 64))
    times[0, 32:] = 1.04
    assert ChangeTest(64, 1, 0.5).newest(np.ones((1, 64)), times) == 0
    times[0, 32:] = 1.06
    assert ChangeTest(64, 1, 0.5).newest(np.ones((1, 64)), times) > 0


def test_a_short_history_raises_no_alarm() -> None:
    test = ChangeTest(64, 2, 1e-4)
    for count in range(1, 12):
        times = np.ones((2, count))
        times[:, count // 2 :] = 100.0
        assert test.newest(np.ones((2, count)), times) == 0
