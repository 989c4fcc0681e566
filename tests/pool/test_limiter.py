"""Rates: no stretch of time gets more than it may, all of it can be had, and what was wrong is put right."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.pool.limiter import Gcra, TokenScale


@given(
    per_minute=st.integers(1, 10_000),
    burst=st.sampled_from([0.0, 0.005, 0.1, 1.0]),
    asked=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 200)), min_size=1, max_size=40),
)
def test_no_window_gets_more_than_the_rate(per_minute: int, burst: float, asked: list[tuple[float, int]]) -> None:
    """Between any two takings lies what the rate gives in that time, what may go at once, and one request more."""
    meter = Gcra(per_minute, burst=burst)
    taken: list[tuple[float, int]] = []
    now = 0.0
    for pause_s, amount in asked:
        now = max(now + pause_s, meter.ready_at(amount))
        meter.take(amount, now)
        taken.append((now, amount))
    at_once = per_minute * burst
    for first, (begin, _) in enumerate(taken):
        total = 0
        for end, amount in taken[first:]:
            total += amount
            largest = max(amount for _, amount in taken[first:])
            allowed = (end - begin) * per_minute / 60 + max(at_once, largest) + 1e-6
            assert total <= allowed + largest * (1 + 1e-9), (total, allowed)


@given(per_minute=st.integers(1, 10_000), amount=st.integers(1, 50), margin=st.sampled_from([0.0, 0.015, 0.5]))
def test_all_of_the_rate_can_be_had(per_minute: int, amount: int, margin: float) -> None:
    """Whoever takes as soon as it may gets the rate, less the margin, exactly."""
    meter = Gcra(per_minute, margin=margin)
    now = 0.0
    for _ in range(100):
        now = max(now, meter.ready_at(amount))
        meter.take(amount, now)
    assert math.isclose(now, 99 * amount * 60 / (per_minute * (1 - margin)), rel_tol=1e-9)


def test_what_may_go_at_once() -> None:
    """A tenth of 60 a minute goes at once after a pause, and then one a second; the pause saves up no more."""
    meter = Gcra(60, burst=0.1)
    for now in (0.0, 1_000.0):
        assert meter.available(now) == 6
        count = 0
        while meter.ready_at(1) <= now:
            meter.take(1, now)
            count += 1
        assert count == 6
        assert meter.ready_at(1) == now + 1


@given(amount=st.floats(1, 1e5), wrong_by=st.floats(-0.99, 10))
def test_an_estimate_is_put_right(amount: float, wrong_by: float) -> None:
    """What was taken by a wrong estimate and corrected is as if the truth had been taken."""
    corrected, right = Gcra(1e6), Gcra(1e6)
    corrected.take(amount, 5.0)
    corrected.adjust(amount * wrong_by)
    right.take(amount * (1 + wrong_by), 5.0)
    assert math.isclose(corrected.ready_at(10), right.ready_at(10), rel_tol=1e-9)


def test_a_request_larger_than_everything() -> None:
    """What no burst could hold goes when all before it is paid for, and is paid for afterwards."""
    meter = Gcra(60, burst=0.1)
    meter.take(6, 0.0)
    assert meter.ready_at(1_000) == 6
    meter.take(1_000, 6.0)
    assert meter.ready_at(1) == 6 + 1_000 - 5


def test_the_scale_of_tokens() -> None:
    """It is 1 at first, follows what requests use, forgets what is long ago, and stays within bounds."""
    scale = TokenScale()
    assert scale.scale == 1
    for _ in range(50):
        scale.learn(4_000, 100)
    assert math.isclose(scale.scale, 0.025)
    for _ in range(200):
        scale.learn(4_000, 4_000)
    assert 0.95 < scale.scale <= 1
    for _ in range(500):
        scale.learn(1, 10**9)
    assert scale.scale == 8
