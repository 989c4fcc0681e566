"""Fair turns: order inside a flow, equal shares of flows, weights of lanes, holds, and the cost of it all."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.pool.fairness import FairQueue, Flow

WEIGHTS = {"interactive": 90.0, "batch": 10.0}


@dataclass(eq=False)
class Item:
    """One request: where it was put, and as which of its flow."""

    lane: str
    group: str
    flow: str
    number: int = 0
    cost: float = 1.0
    place: Flow | None = field(default=None, repr=False)


def push(queue: FairQueue[Item], *items: Item) -> None:
    for item in items:
        queue.push(item, lane=item.lane, group=item.group, flow=item.flow)


def filled(*flows: tuple[str, str, str], each: int = 100, cost: float = 1.0) -> FairQueue[Item]:
    queue: FairQueue[Item] = FairQueue(WEIGHTS)
    for number in range(each):
        push(queue, *(Item(lane, group, flow, number, cost) for lane, group, flow in flows))
    return queue


def take(queue: FairQueue[Item], count: int) -> list[Item]:
    taken = []
    for _ in range(count):
        item = queue.head()
        assert item is not None
        assert queue.head() is item
        queue.take_head()
        assert item.place is None
        taken.append(item)
    return taken


def test_first_come_first_served_in_a_flow() -> None:
    """The requests of one flow leave in the order in which they came."""
    queue = filled(("interactive", "m", "a"))
    assert [item.number for item in take(queue, 100)] == list(range(100))
    assert queue.head() is None
    assert not queue.size


def test_flows_take_turns() -> None:
    """A flow with a thousand requests delays one with a single request by one turn."""
    queue = filled(("batch", "m", "big"), each=1_000)
    push(queue, Item("batch", "m", "small"))
    assert "small" in [item.flow for item in take(queue, 2)]


def test_every_flow_has_the_same_share_whatever_its_model() -> None:
    """99 flows of one model and one of another: each gets a hundredth."""
    flows = [("interactive", "popular", f"f{number}") for number in range(99)]
    queue = filled(*flows, ("interactive", "rare", "alone"), each=20)
    counts = Counter(item.flow for item in take(queue, 1_000))
    assert set(counts.values()) == {10}


def test_shares_of_lanes() -> None:
    """Nine of ten go to the interactive lane, the tenth to the batch; when one is empty the other has all."""
    queue = filled(("interactive", "m", "a"), ("batch", "m", "b"), each=1_000)
    counts = Counter(item.lane for item in take(queue, 1_000))
    assert counts == {"interactive": 900, "batch": 100}
    rest = Counter(item.lane for item in take(queue, 1_000))
    assert rest == {"interactive": 100, "batch": 900}


def test_a_lane_saves_nothing_up() -> None:
    """A lane that comes after a long time has its share from then on, and not more."""
    queue = filled(("batch", "m", "b"), each=3_000)
    take(queue, 2_000)
    push(queue, *(Item("interactive", "m", "a", number) for number in range(1_000)))
    first = take(queue, 100)
    assert first[0].lane == "interactive" or first[1].lane == "interactive"
    assert 85 <= Counter(item.lane for item in first)["interactive"] <= 95


def test_a_lane_without_weight_waits_for_the_others() -> None:
    """Weight 0 is served when nothing else is there."""
    queue: FairQueue[Item] = FairQueue({"interactive": 1.0, "batch": 0.0})
    push(queue, *(Item("batch", "m", "b", n) for n in range(5)), *(Item("interactive", "m", "a", n) for n in range(50)))
    lanes = [item.lane for item in take(queue, 55)]
    assert lanes.count("batch") == 5
    assert lanes[-4:] == ["batch"] * 4


def test_what_costs_more_has_fewer_turns() -> None:
    """A flow of requests that cost four turns gets a quarter of the requests of one that costs one."""
    queue: FairQueue[Item] = FairQueue(WEIGHTS)
    for number in range(400):
        push(queue, Item("batch", "m", "long", number, 4.0), Item("batch", "m", "short", number))
    counts = Counter(item.flow for item in take(queue, 250))
    assert counts["short"] / counts["long"] == pytest.approx(4, rel=0.05)


def test_a_held_model_holds_nobody_else() -> None:
    """Requests of a model that is held are passed over, in both lanes, until it is freed or its time is over."""
    queue = filled(("interactive", "full", "a"), ("interactive", "free", "b"), ("batch", "full", "c"), each=10)
    seen = []
    while (item := queue.head()) is not None:
        if item.group == "full":
            queue.hold_head(5.0 if item.lane == "interactive" else math.inf)
        else:
            queue.take_head()
            seen.append(item.flow)
    assert seen == ["b"] * 10
    assert (queue.size, queue.next_due()) == (20, 5.0)
    queue.free_due(4.9)
    assert queue.head() is None
    queue.free_due(5.0)
    assert {item.flow for item in take(queue, 10)} == {"a"}
    assert queue.head() is None
    queue.free("full")
    assert {item.flow for item in take(queue, 10)} == {"c"}


def test_holds_do_not_pile_up() -> None:
    """A group that is freed and held again and again leaves one mark in the heap, or two."""
    queue = filled(("batch", "m", "a"), each=1)
    for number in range(1_000):
        assert queue.head() is not None
        queue.hold_head(1_000.0 - number * 0.5)
        queue.free("m")
    queue.head()
    queue.hold_head(2_000.0)
    assert len(queue._holds) <= 1_001
    for _ in range(1_000):
        queue.free("m")
        queue.head()
        queue.hold_head(2_000.0)
    assert len(queue._holds) <= 1_001


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("push"),
            st.sampled_from(["interactive", "batch"]),
            st.sampled_from("mn"),
            st.sampled_from("abc"),
            st.sampled_from([1.0, 2.5, 16.0]),
        ),
        st.tuples(st.sampled_from(["take", "remove", "hold", "free", "due"]), st.integers(0, 50)),
    ),
    max_size=120,
)


@given(OPERATIONS)
def test_nothing_is_lost_and_order_holds(operations: list[tuple[Any, ...]]) -> None:
    """After anything: each item leaves once, in the order of its flow, held models do not, and the sizes are right."""
    queue: FairQueue[Item] = FairQueue(WEIGHTS)
    inside: list[Item] = []
    held: dict[tuple[str, str], float] = {}
    now, number = 0.0, 0
    for kind, *details in operations:
        if kind == "push":
            lane, group, flow, cost = details
            item = Item(lane, group, flow, number, cost)
            number += 1
            if not any((i.lane, i.group) == (lane, group) for i in inside):
                held.pop((lane, group), None)
            push(queue, item)
            inside.append(item)
        elif kind == "remove":
            if inside:
                item = inside.pop(details[0] % len(inside))
                assert queue.remove(item)
                assert not queue.remove(item)
        elif kind == "free":
            group = "mn"[details[0] % 2]
            queue.free(group)
            held = {key: until for key, until in held.items() if key[1] != group}
        elif kind == "due":
            now += details[0]
            queue.free_due(now)
            held = {key: until for key, until in held.items() if until > now}
        else:
            head = queue.head()
            ready = [i for i in inside if (i.lane, i.group) not in held]
            assert (head is None) == (not ready)
            if head is None:
                continue
            assert head in ready
            if kind == "hold":
                until = math.inf if details[0] % 2 else now + details[0] + 1
                queue.hold_head(until)
                held[head.lane, head.group] = until
            else:
                queue.take_head()
                same = [i for i in inside if (i.lane, i.group, i.flow) == (head.lane, head.group, head.flow)]
                assert head is same[0]
                inside.remove(head)
        held = {key: until for key, until in held.items() if any((i.lane, i.group) == key for i in inside)}
        assert queue.size == len(inside)
        assert queue.size_of("batch") == sum(i.lane == "batch" for i in inside)
    assert set(queue.clear()) == set(inside)
    assert queue.size == 0


@given(st.lists(st.integers(1, 60), min_size=2, max_size=12), st.integers(0, 2**32))
def test_no_flow_waits_for_more_than_its_turns(backlogs: list[int], seed: int) -> None:
    """While flows have something to send, none is ever more than one turn ahead of another."""
    queue: FairQueue[Item] = FairQueue(WEIGHTS)
    rng = random.Random(seed)
    items = [Item("batch", rng.choice("mn"), f"f{f}", n) for f, backlog in enumerate(backlogs) for n in range(backlog)]
    groups = {f"f{f}": rng.choice("mn") for f in range(len(backlogs))}
    for item in items:
        item.group = groups[item.flow]
    push(queue, *items)
    served: Counter[str] = Counter()
    left = Counter(item.flow for item in items)
    while all(left.values()):
        (item,) = take(queue, 1)
        served[item.flow] += 1
        left[item.flow] -= 1
        counts = [served[f"f{f}"] for f in range(len(backlogs))]
        assert max(counts) - min(counts) <= 2


def test_the_cost_does_not_grow(record_property) -> None:
    """An operation takes as long with 100,000 queued in 10,000 flows as with 1,000 in 100, as far as caches allow."""

    def cost_us(flows: int) -> float:
        queue = filled(*(("batch", f"m{f % 50}", f"f{f}") for f in range(flows)), each=10)
        fresh = [Item("batch", f"m{n % 50}", f"f{n % flows}") for n in range(3_000)]
        began = time.process_time()
        for item in fresh:
            push(queue, item)
            queue.head()
            queue.take_head()
        return (time.process_time() - began) / len(fresh) * 1e6

    few, many = (min(cost_us(flows) for _ in range(3)) for flows in (100, 10_000))
    record_property("figure", f"push and take: {few:.1f} µs with 1,000 queued, {many:.1f} µs with 100,000")
    assert many < few * 5
