"""Ticks are round, inside the range and few; thinning keeps what the eye looks for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.analysis.axes import format_tick, linear_ticks, log_ticks, thin


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_even_and_inside(low, span):
    high = low + span
    ticks = linear_ticks(low, high)
    slack = 1e-6 * span + 1e-9 * abs(low)
    assert 1 <= len(ticks) <= 8
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    gaps = [after - before for before, after in zip(ticks, ticks[1:], strict=False)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps) if gaps else [], rel=1e-3)


def test_tick_values():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0.03, 0.31) == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert log_ticks(0.9, 120) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1e-6, 1) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert log_ticks(2.0, 5.0) == [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0]


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (1_500, "1500"),
        (20_000, "20k"),
        (1.5e6, "1.5M"),
        (1.65e-4, "1.65e-4"),
        (-0.25, "-0.25"),
        (4e11, "400B"),
    ],
)
def test_tick_labels(value, text):
    assert format_tick(value) == text


def test_thinning_keeps_ends_spikes_and_wide_gaps():
    y = [0.0] * 10_000
    y[4_321], y[7_000] = 9.0, -9.0
    y[2_000:3_000] = [math.nan] * 1_000
    x, kept = thin(list(range(10_000)), y, 400)
    assert len(x) <= 400 and x[0] == 0 and x[-1] == 9_999 and x == sorted(set(x))
    assert max(v for v in kept if v == v) == 9.0 and min(v for v in kept if v == v) == -9.0
    assert any(math.isnan(v) for v in kept)
    assert thin([1, 2], [3, 4], 400) == ([1, 2], [3, 4])
