"""How many requests may be in flight: growth, cuts, cooldowns, and that a capacity is found wherever it goes."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.pool.concurrency import AdaptiveLimit


def test_slow_start_doubles() -> None:
    """Each success at the limit makes room for one more, so that a round trip doubles it, up to the bound."""
    limit = AdaptiveLimit(32, most=100)
    for expected in (64, 100, 100):
        for _ in range(limit.limit):
            limit.succeed(1.0, in_flight=limit.limit)
        assert limit.limit == expected


def test_growth_only_when_saturated() -> None:
    """Successes below the limit say nothing of what is beyond it."""
    limit = AdaptiveLimit(10, most=100)
    for _ in range(100):
        limit.succeed(1.0, in_flight=9)
    assert limit.limit == 10


def test_one_cut_an_episode() -> None:
    """The first refusal cuts by a fifth; more of them, and successes, change nothing for 15 seconds."""
    limit = AdaptiveLimit(50, most=100)
    assert limit.throttle(100.0, in_flight=50)
    assert limit.limit == 40
    for now in (100.0, 107.0, 114.9):
        assert not limit.throttle(now, in_flight=40)
        limit.succeed(now, in_flight=40)
    assert (limit.limit, limit.cuts) == (40, 1)
    assert limit.throttle(115.0, in_flight=40)
    assert limit.limit == 32


def test_a_lone_request_is_not_too_many() -> None:
    """A refusal of the only request in flight is no matter of how many there are."""
    limit = AdaptiveLimit(32, most=100)
    assert not limit.throttle(1.0, in_flight=1)
    assert limit.limit == 32


def test_failures_hold_growth_back() -> None:
    """A 5xx does not cut, but nothing grows for two seconds."""
    limit = AdaptiveLimit(10, most=100)
    limit.fail(5.0)
    limit.succeed(6.9, in_flight=10)
    assert limit.limit == 10
    limit.succeed(7.1, in_flight=10)
    assert limit.limit == 11


def test_what_was_served_is_counted() -> None:
    """Of 50 in flight at a refusal, the 10 that are answered are the capacity: the next cut goes right below it."""
    limit = AdaptiveLimit(50, most=100)
    limit.throttle(1.0, in_flight=50)
    for number in range(50):
        assert limit.marked_at == 1.0
        limit.end(sent_at=1.0, is_refused=number >= 10)
    assert limit.marked_at is None
    limit.throttle(20.0, in_flight=40)
    assert limit.limit == 9


def test_a_late_refusal_counts_nothing() -> None:
    """In a pause those that end are not followed by others: the few that are left are not what the other side takes."""
    limit = AdaptiveLimit(50, most=100)
    limit.throttle(1.0, in_flight=50)
    for number in range(50):
        limit.end(sent_at=1.0, is_refused=number >= 10)
    limit.throttle(1.5, in_flight=3)
    assert limit.marked_at is None
    limit.throttle(20.0, in_flight=40)
    assert limit.limit == 9


@given(
    st.lists(
        st.tuples(st.sampled_from(["succeed", "throttle", "fail", "end"]), st.floats(0, 20), st.integers(0, 300)),
        max_size=200,
    )
)
def test_it_stays_within_its_bounds(events: list[tuple[str, float, int]]) -> None:
    """Whatever happens: never below the least, never above the most, and no two cuts within 15 seconds."""
    limit = AdaptiveLimit(32, most=200, least=2)
    now, last_cut = 0.0, -15.0
    for kind, pause_s, number in events:
        now += pause_s
        before = limit.limit
        if kind == "succeed":
            limit.succeed(now, in_flight=number)
            assert limit.limit >= before
        elif kind == "throttle" and limit.throttle(now, in_flight=number):
            assert now - last_cut >= 15 - 1e-9
            last_cut = now
        elif kind == "fail":
            limit.fail(now)
            assert limit.limit == before
        elif kind == "end":
            limit.end(sent_at=now - number, is_refused=bool(number % 2))
        assert 2 <= limit.limit <= 200


def follow(
    capacities: list[int], *, took_s: float, seed: int, each_s: float = 90.0, loads: tuple[int, ...] = (1_000,)
) -> list[tuple[float, int, bool]]:
    """A provider with these capacities, one after the other, asked without end: time, limit, refused, of each reply.

    At most as many as its load are asked at a time; the last one holds for those that follow.
    """
    rng = random.Random(seed)
    limit = AdaptiveLimit(32, most=256)
    running: list[tuple[float, float, bool]] = []
    seen: list[tuple[float, int, bool]] = []
    now, paused_until, in_flight, taken = 0.0, 0.0, 0, 0
    while now < each_s * len(capacities):
        capacity = capacities[int(now / each_s)]
        load = loads[min(int(now / each_s), len(loads) - 1)]
        while in_flight < min(limit.limit, load) and now >= paused_until:
            in_flight += 1
            refused = taken >= capacity
            taken += not refused
            ends_at = now + (rng.uniform(0.02, 0.1) if refused else took_s * rng.lognormvariate(0, 0.3))
            heapq.heappush(running, (ends_at, now, refused))
        if now < paused_until and (not running or running[0][0] > paused_until):
            now = paused_until
            continue
        now, sent_at, refused = heapq.heappop(running)
        if refused:
            limit.throttle(now, in_flight=in_flight)
            paused_until = max(paused_until, now + 1.0)
        taken -= not refused
        in_flight -= 1
        if limit.marked_at is not None:
            limit.end(sent_at=sent_at, is_refused=refused)
        if not refused:
            # The free slot is taken again before the reply is looked at, if it may be.
            limit.succeed(now, in_flight=in_flight + (now >= paused_until))
        seen.append((now, limit.limit, refused))
    return seen


@pytest.mark.parametrize("took_s", [0.5, 1.0, 3.0])
def test_a_capacity_that_moves_is_followed(took_s: float, seed: int, record_property) -> None:
    """10, 80, 5: each is found within a minute, to a fifth, and held with few refusals."""
    capacities = [10, 80, 5]
    seen = follow(capacities, took_s=took_s, seed=seed)
    figures = []
    for number, capacity in enumerate(capacities):
        begin = number * 90.0
        late = [(limit, refused) for at, limit, refused in seen if begin + 60 <= at < begin + 90]
        off = max(abs(limit - capacity) / capacity for limit, _ in late)
        share = sum(refused for _, refused in late) / len(late)
        figures.append(f"{capacity}: within {off:.0%}, {share:.1%} refused")
        assert off <= 0.2
        assert share <= 0.05
    record_property("figure", f"{took_s:g} s a request: " + "; ".join(figures))


@pytest.mark.parametrize("load", [12, 20, 60])
def test_a_capacity_that_falls_below_the_load(load: int, seed: int, record_property) -> None:
    """Where the limit was far above what is asked for, it comes down to what is taken within a minute as well."""
    seen = follow([80, 5], took_s=1.0, seed=seed, loads=(1_000, load))
    late = [(limit, refused) for at, limit, refused in seen if at >= 90.0 + 60]
    off = max(abs(limit - 5) / 5 for limit, _ in late)
    share = sum(refused for _, refused in late) / len(late)
    record_property("figure", f"{load} asked at a time: 5 within {off:.0%}, {share:.1%} refused")
    assert off <= 0.2
    assert share <= 0.05
