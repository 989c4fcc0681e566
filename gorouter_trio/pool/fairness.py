"""Who is next: lanes with weights, and fair turns of flows inside them. Pure; nothing here waits.

Theory of operation. A *flow* is a session or a tenant; what it queues goes out in order of arrival. The
flows that want one model make a *group*, and the groups of a lane take turns as long as they have flows,
so that every flow gets the same share whatever its model is (deficit round robin, twice). What costs
several times as much as others waits for several turns. Lanes share by weight: the one that was served
least, for its weight, is next, and who had nothing to send saves nothing up.

A group whose model can take nothing now is held, and with it nobody else. Where requests have their keys already, those
with one key are a *part* of the group, which is held and takes turns by itself. Every operation is O(1): turns
are kept in ordered dicts, where the first is found, the last is appended and any is removed at once. Only
timed holds are kept in a heap.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["MOST_COST", "FairQueue", "Flow", "Queued"]

MOST_COST = 16.0
_LEAST_WEIGHT = 1e-9


class Queued(Protocol):
    """What can stand in the queue; the queue keeps its place there, and None when it is not in it."""

    place: Flow | None
    cost: float
    """In turns, 1 to `MOST_COST`."""


Q = TypeVar("Q", bound=Queued)


class Flow:
    """Requests of one session or tenant to one model, in order; used by the queue alone."""

    __slots__ = ("deficit", "group", "items", "name")

    def __init__(self, name: str, group: _Group) -> None:
        self.name = name
        self.group = group
        self.items: OrderedDict[Queued, None] = OrderedDict()
        self.deficit = 0.0

    def first(self) -> Queued:
        return next(iter(self.items))


class _Group:
    """The flows of a lane that want the same model, or a part of them, the one whose turn it is first."""

    __slots__ = ("alarm_at", "deficit", "flows", "held_until", "is_held", "lane", "name", "part")

    def __init__(self, name: str, part: int | None, lane: _Lane) -> None:
        self.name = name
        self.part = part
        self.lane = lane
        self.flows: OrderedDict[str, Flow] = OrderedDict()
        self.deficit = 0.0
        self.is_held = False
        self.held_until = math.inf
        self.alarm_at = math.inf

    def settle(self) -> Flow:
        """Give turns until the first flow can pay for its first request."""
        flows = self.flows
        while True:
            flow = next(iter(flows.values()))
            cost = flow.first().cost
            if flow.deficit >= cost:
                return flow
            flow.deficit += 1.0
            if flow.deficit >= cost:
                return flow
            flows.move_to_end(flow.name)


class _Lane:
    """A lane: its groups, and those of them that can send, the one whose turn it is first."""

    __slots__ = ("groups", "name", "ready", "served", "size", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = max(weight, _LEAST_WEIGHT)
        self.groups: dict[str, dict[int | None, _Group]] = {}
        self.ready: OrderedDict[_Group, None] = OrderedDict()
        self.served = 0.0
        self.size = 0

    def all_groups(self) -> Iterator[_Group]:
        """Those that are held as well."""
        for parts in self.groups.values():
            yield from parts.values()

    def settle(self) -> _Group:
        """Give turns, one a flow, until the first group may send."""
        ready = self.ready
        while True:
            group = next(iter(ready))
            if group.deficit > 0.0:
                return group
            group.deficit += len(group.flows)
            if group.deficit > 0.0:
                return group
            ready.move_to_end(group)


class FairQueue(Generic[Q]):
    """Requests in lanes. `weights` are the shares of the lanes, of which one at least is above 0."""

    __slots__ = ("_clock", "_holds", "_lanes", "_served", "size")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._lanes = {name: _Lane(name, weight) for name, weight in weights.items()}
        self._served = 0.0
        self._holds: list[tuple[float, int, _Group]] = []
        self._clock = itertools.count()
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Q]:
        """Everything that is queued, in no order of meaning."""
        for lane in self._lanes.values():
            for group in lane.all_groups():
                for flow in group.flows.values():
                    yield from flow.items  # type: ignore[misc]  # nothing but Q is pushed

    def size_of(self, lane: str) -> int:
        """How many are queued in a lane."""
        return self._lanes[lane].size

    def first_of(self, group: str) -> Q | None:
        """The first item of a group, of whatever lane, held or not. It stays where it is."""
        for lane in self._lanes.values():
            found = lane.groups.get(group)
            if found is not None:
                members = next(iter(found.values()))
                return next(iter(members.flows.values())).first()  # type: ignore[return-value]  # nothing but Q is pushed
        return None

    def push(self, item: Q, *, lane: str, group: str, flow: str, part: int | None = None) -> None:
        """Queue an item behind those of its flow."""
        at = self._lanes[lane]
        parts = at.groups.get(group)
        if parts is None:
            parts = at.groups[group] = {}
        members = parts.get(part)
        if members is None:
            members = parts[part] = _Group(group, part, at)
            self._make_ready(members)
        found = members.flows.get(flow)
        if found is None:
            found = members.flows[flow] = Flow(flow, members)
        found.items[item] = None
        item.place = found
        at.size += 1
        self.size += 1

    def remove(self, item: Q) -> bool:
        """Take an item out, wherever it stands; False when it is not queued."""
        flow = item.place
        if flow is None:
            return False
        del flow.items[item]
        self._left(item, flow)
        return True

    def head(self) -> Q | None:
        """Who is next, of those that are not held. It stays where it is."""
        lane = self._next_lane()
        if lane is None:
            return None
        return lane.settle().settle().first()  # type: ignore[return-value]  # nothing but Q is pushed

    def take_head(self) -> None:
        """Take the head out and charge its flow, its group and its lane for it."""
        lane = self._next_lane()
        if lane is None:
            return
        group = lane.settle()
        flow = group.settle()
        item, _ = flow.items.popitem(last=False)
        cost = item.cost
        flow.deficit -= cost
        group.deficit -= cost
        self._served = lane.served
        lane.served += cost / lane.weight
        if flow.items and flow.deficit < flow.first().cost:
            group.flows.move_to_end(flow.name)
        if group.deficit <= 0.0:
            lane.ready.move_to_end(group)
        self._left(item, flow)

    def hold_head(self, until: float) -> None:
        """Pass over the group of the head, in its lane, until a time or until `free`; `inf` for the latter alone."""
        lane = self._next_lane()
        if lane is None:
            return
        group = lane.settle()
        del lane.ready[group]
        group.is_held = True
        group.held_until = until
        self._set_alarm(group)

    def free(self, group: str, part: int | None = None) -> None:
        """The model of a group can take something again, with any key or, where a part is named, with that one."""
        for lane in self._lanes.values():
            parts = lane.groups.get(group)
            if parts is None:
                continue
            for found in parts.values():
                if found.is_held and (part is None or found.part == part):
                    self._make_ready(found)

    def free_all(self) -> None:
        """Let everything be looked at again."""
        for lane in self._lanes.values():
            for group in lane.all_groups():
                if group.is_held:
                    self._make_ready(group)

    def free_due(self, now: float) -> None:
        """End the holds whose time is over."""
        holds = self._holds
        while holds and holds[0][0] <= now:
            _, _, group = heapq.heappop(holds)
            group.alarm_at = math.inf
            if not group.is_held or not group.flows:
                continue
            if group.held_until <= now:
                self._make_ready(group)
            else:
                self._set_alarm(group)

    def next_due(self) -> float:
        """When the next hold ends, `inf` for never; may be earlier, where a group was freed before."""
        return self._holds[0][0] if self._holds else math.inf

    def clear(self) -> list[Q]:
        """Take everything out and return it."""
        items = list(self)
        for item in items:
            self.remove(item)
        return items

    def _next_lane(self) -> _Lane | None:
        best = None
        for lane in self._lanes.values():
            if lane.ready and (best is None or lane.served < best.served):
                best = lane
        return best

    def _set_alarm(self, group: _Group) -> None:
        """See to it that the end of the hold is noticed; what is in the heap for this group already may do."""
        if group.held_until < group.alarm_at:
            group.alarm_at = group.held_until
            heapq.heappush(self._holds, (group.alarm_at, next(self._clock), group))

    def _make_ready(self, group: _Group) -> None:
        group.is_held = False
        lane = group.lane
        if not lane.ready:
            lane.served = max(lane.served, self._served)
        lane.ready[group] = None

    def _left(self, item: Queued, flow: Flow) -> None:
        """An item is out of its flow: what is empty now goes as well."""
        item.place = None
        self.size -= 1
        group = flow.group
        lane = group.lane
        lane.size -= 1
        if flow.items:
            return
        del group.flows[flow.name]
        if not group.flows:
            parts = lane.groups[group.name]
            del parts[group.part]
            if not parts:
                del lane.groups[group.name]
            lane.ready.pop(group, None)
