"""The circuit breaker: when it opens, what it lets through, and that one probe decides."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.config import BreakerPolicy
from gorouter_trio.pool.breaker import Breaker

POLICY = BreakerPolicy()


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    for _ in range(5):
        breaker.fail(now)
    assert not breaker.is_closed
    return breaker


def test_five_in_a_row() -> None:
    """The fifth request in a row that fails opens it; a success in between begins anew, and retries do not count."""
    breaker = Breaker(POLICY)
    for _ in range(4):
        assert not breaker.fail(1.0)
    breaker.succeed()
    for _ in range(4):
        assert not breaker.fail(1.0)
        assert not breaker.fail(1.0, is_retry=True)
    assert breaker.fail(1.0)
    assert breaker.state(1.0) == "open"


def test_half_of_the_attempts() -> None:
    """With every second one failing it opens after twenty attempts, within a window; with fewer it does not."""
    breaker = Breaker(POLICY)
    attempts = 0
    while breaker.is_closed:
        attempts += 2
        breaker.fail(attempts * 0.1)
        if cast("bool", breaker.is_closed):
            breaker.succeed()
    assert 20 <= attempts <= 24
    fewer = Breaker(POLICY)
    for number in range(1_000):
        fewer.fail(number * 0.1)
        fewer.succeed()
        fewer.succeed()
    assert fewer.is_closed


@pytest.mark.parametrize(
    ("open_s", "most_open_s", "times"),
    [(5.0, 10.0, [5, 10, 10]), (30.0, 10.0, [30, 30, 30]), (4.0, 10.0, [4, 8, 10]), (10.0, 10.0, [10, 10, 10])],
)
def test_it_stays_open_longer_and_longer(open_s: float, most_open_s: float, times: list[float]) -> None:
    """Each probe that fails doubles the time up to the longest, and never makes it less than the first was."""
    breaker = Breaker(BreakerPolicy(consecutive=1, open_s=open_s, most_open_s=most_open_s))
    breaker.fail(0.0)
    now, found = 0.0, []
    for _ in times:
        found.append(breaker.reopens_at - now)
        now = breaker.reopens_at
        breaker.begin_probe()
        breaker.fail(now, is_probe=True)
    assert found == times


def test_old_failures_are_forgotten() -> None:
    """Nineteen failures an hour ago do not add to one now."""
    breaker = Breaker(BreakerPolicy(consecutive=100))
    for number in range(19):
        breaker.fail(number * 0.01)
    assert not breaker.fail(3_600.0)
    assert breaker.is_closed


def test_one_probe() -> None:
    """After its time one request goes, and no other until that ended; success closes, failure opens for longer."""
    breaker = opened()
    assert not breaker.may_pass(4.9)
    assert breaker.may_pass(5.0)
    assert breaker.state(5.0) == "half_open"
    breaker.begin_probe()
    assert not breaker.may_pass(6.0)
    assert breaker.fail(7.0, is_probe=True)
    assert not breaker.may_pass(16.9)
    assert breaker.may_pass(17.0)
    breaker.begin_probe()
    breaker.end_probe()
    assert breaker.may_pass(17.0)
    breaker.begin_probe()
    breaker.succeed()
    assert breaker.state(17.0) == "closed"
    assert breaker.may_pass(17.0)


def test_stragglers_change_nothing() -> None:
    """What was sent before it opened and fails afterwards does not make it longer."""
    breaker = opened()
    for _ in range(50):
        assert not breaker.fail(4.0)
    assert breaker.may_pass(5.0)


def test_the_time_is_bounded() -> None:
    """However often the probe fails, the next is at most ten seconds away."""
    breaker, now = opened(), 0.0
    for _ in range(10):
        now = breaker.reopens_at
        breaker.begin_probe()
        breaker.fail(now, is_probe=True)
    assert breaker.reopens_at - now == 10


@given(st.lists(st.tuples(st.sampled_from("sfrp"), st.floats(0, 8)), max_size=120))
def test_never_two_probes(events: list[tuple[str, float]]) -> None:
    """Whatever comes: while a probe is out nothing else passes, and a closed breaker lets everything pass."""
    breaker, now, probing = Breaker(POLICY), 0.0, False
    for kind, pause_s in events:
        now += pause_s
        if breaker.is_closed:
            probing = False
        assert breaker.may_pass(now) == (breaker.is_closed or (now >= breaker.reopens_at and not probing))
        if kind == "p" and not breaker.is_closed and breaker.may_pass(now):
            breaker.begin_probe()
            probing = True
        elif kind == "s" and (probing or breaker.is_closed):
            breaker.succeed()
            assert breaker.is_closed
        elif kind in "fr":
            breaker.fail(now, is_retry=kind == "r", is_probe=probing)
            probing = False if not breaker.is_closed and breaker.reopens_at > now else probing


@pytest.mark.parametrize("consecutive", [1, 3])
def test_another_policy(consecutive: int) -> None:
    """The number in a row is the policy's."""
    breaker = Breaker(BreakerPolicy(consecutive=consecutive))
    for _ in range(consecutive - 1):
        assert not breaker.fail(0.0)
    assert breaker.fail(0.0)
