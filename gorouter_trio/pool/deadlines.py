"""One watch over many deadlines: a task that wakes at the earliest of them.

Theory of operation. A cancel scope with a deadline costs about a fifth of a whole request, and nearly
none of those deadlines is ever reached. So what is watched only stores a number; the keeper sleeps
until the earliest one that it knows of, looks at all of them then, and expires those that are due.
Setting a deadline wakes the keeper only when it is earlier than what it sleeps for, and since most are
"now plus the same limit", that is rare. Expiry is exact: nothing is polled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .statistics import LagMeter

__all__ = ["Alarm", "DeadlineKeeper", "Watched"]


class Watched(Protocol):
    """Something with a deadline on the trio clock, `inf` for none."""

    deadline_at: float

    def expire(self) -> None:
        """The deadline has passed; must not wait. Called once for each time it was set."""


class DeadlineKeeper:
    """Expires what is in `watched`, which may change at any time."""

    __slots__ = ("_lag", "_scope", "_watched", "next_wake")

    def __init__(self, watched: Iterable[Watched], *, lag: LagMeter | None = None) -> None:
        self._watched = watched
        self._lag = lag
        self._scope = trio.CancelScope()
        self.next_wake = math.inf

    def hurry(self, deadline: float) -> None:
        """A deadline earlier than `next_wake` was set."""
        self.next_wake = deadline
        self._scope.deadline = deadline

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            with trio.CancelScope(deadline=self.next_wake) as self._scope:
                await trio.sleep_forever()
            now = trio.current_time()
            if self._lag is not None:
                self._lag.add(now - self.next_wake)
            self.next_wake = self._expire_due(now)

    def _expire_due(self, now: float) -> float:
        """Expire what is due and return the earliest deadline that is not."""
        earliest = math.inf
        for watched in list(self._watched):
            if watched.deadline_at <= now:
                watched.deadline_at = math.inf
                watched.expire()
            else:
                earliest = min(earliest, watched.deadline_at)
        return earliest


class Alarm:
    """Calls `ring` with the time at the earliest time that was set since it last did; one task."""

    __slots__ = ("_lag", "_ring", "_scope", "next_wake")

    def __init__(self, ring: Callable[[float], None], *, lag: LagMeter) -> None:
        self._ring = ring
        self._lag = lag
        self._scope = trio.CancelScope()
        self.next_wake = math.inf

    def set(self, at: float) -> None:
        """Ring at this time, or earlier if that was set already."""
        if at < self.next_wake:
            self.next_wake = at
            self._scope.deadline = at

    async def run(self) -> None:
        """Ring until cancelled."""
        while True:
            with trio.CancelScope(deadline=self.next_wake) as self._scope:
                await trio.sleep_forever()
            now = trio.current_time()
            self._lag.add(now - self.next_wake)
            self.next_wake = math.inf
            self._ring(now)
