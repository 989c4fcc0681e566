"""The capacity of the simulated providers: so many requests a model at a time, and a queue in order of arrival."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from .scenario import Behaviour, Capacity, Scenario

__all__ = ["Course", "Slots"]

# Sums of floats may come out just before the edge of a phase that they were to hit.
_TOLERANCE_S: Final = 1e-6


@final
class Slots:
    """The places of one model. *capacity* says what there is now, None is no end; *next_change_s* gives the time on the
    trio clock at which it may be another one.
    """

    def __init__(self, capacity: Callable[[], Capacity | None], *, next_change_s: Callable[[], float]) -> None:
        self._capacity = capacity
        self._next_change_s = next_change_s
        self._waiting: OrderedDict[object, trio.Event] = OrderedDict()
        self.taken = 0
        self.most_taken = 0

    def take_nowait(self) -> bool:
        """Take a place if one is free and nobody waits."""
        if self._waiting or self._free() < 1:
            return False
        self._take()
        return True

    def can_wait(self) -> bool:
        """Whether the queue has room."""
        capacity = self._capacity()
        return capacity is None or len(self._waiting) < capacity.queue

    async def wait(self) -> None:
        """Wait for a place and take it. Cancelling leaves the queue."""
        mark = object()
        event = self._waiting[mark] = trio.Event()
        try:
            while next(iter(self._waiting)) is not mark or self._free() < 1:
                due_s = self._next_change_s()
                with trio.move_on_at(due_s) if math.isfinite(due_s) else trio.CancelScope():
                    await event.wait()
                event = self._waiting[mark] = trio.Event()
            self._take()
        finally:
            del self._waiting[mark]
            self._wake()

    def release(self) -> None:
        """Give a place back."""
        self.taken -= 1
        self._wake()

    def _take(self) -> None:
        self.taken += 1
        self.most_taken = max(self.most_taken, self.taken)

    def _free(self) -> float:
        capacity = self._capacity()
        return math.inf if capacity is None else capacity.concurrent - self.taken

    def _wake(self) -> None:
        if self._waiting and self._free() >= 1:
            next(iter(self._waiting.values())).set()


@final
class Course:
    """A scenario under way: how each model behaves now, and its places.

    It begins when it is made, or, if that is outside of a trio run, when it is first asked.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._began_s = trio.current_time() if trio.lowlevel.in_trio_run() else None
        self._slots: dict[str, Slots] = {}

    def behaviour(self, model: str) -> Behaviour:
        """How this model behaves now."""
        return self._scenario.at(model, self._elapsed_s())

    def slots(self, model: str) -> Slots:
        """The places of this model."""
        found = self._slots.get(model)
        if found is None:
            found = self._slots[model] = Slots(
                lambda: self.behaviour(model).capacity, next_change_s=self._next_change_s
            )
        return found

    def _next_change_s(self) -> float:
        elapsed_s = self._elapsed_s()
        return trio.current_time() + self._scenario.next_edge_s(elapsed_s) - elapsed_s + 2 * _TOLERANCE_S

    def _elapsed_s(self) -> float:
        now_s = trio.current_time()
        if self._began_s is None:
            self._began_s = now_s
        return now_s - self._began_s + _TOLERANCE_S
