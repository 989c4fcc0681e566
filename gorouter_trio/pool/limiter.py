"""Rates, kept by one number each: the generic cell rate algorithm. Pure; `now` is given.

Theory of operation. A meter has a rate and a tolerance. What is taken moves its *due time* ahead by as
long as the rate needs for it; the due time may be ahead of now by the tolerance at most before the next
taking, so that requests go out evenly, a few at once at most. An estimate that proves wrong, or
a request that never went out, moves the due time afterwards.

How close to a limit of N a minute this may come is for the server's window to say. One that slides, or
is fixed, allows N in a minute of its own clock, and sees requests with the jitter of the network: a pace
of exactly N would be too many in some minute. So the pace is N less a margin, and margin and tolerance
together must not be more than what the window forgives. A server that keeps a token bucket forgives more.
"""

from __future__ import annotations

import math
from typing import Protocol

__all__ = ["Gcra", "Meter", "TokenScale"]

_WINDOW_S = 60.0
_DECAY = 0.97
_PRIOR = 1.0
_LEAST_SCALE, _MOST_SCALE = 0.01, 8.0


class Meter(Protocol):
    """What a rate is kept by; see `Gcra`."""

    def ready_at(self, amount: float) -> float:
        """From when on `amount` may be taken."""

    def take(self, amount: float, now: float) -> None:
        """Take it, ready or not."""

    def adjust(self, amount: float) -> None:
        """What was taken turned out to be more by `amount`, or less if it is negative."""

    def available(self, now: float) -> float:
        """What may be taken at once now."""

    def is_full(self, now: float) -> bool:
        """Whether all that was ever taken is made up for."""


class Gcra:
    """A rate a minute, of requests or tokens.

    `margin` is the share of the limit that is left unused, `burst` the share that may be taken at once
    after a pause; it is never less than one request, or what one request takes.
    """

    __slots__ = ("_due_at", "_interval_s", "_tolerance_s", "per_minute")

    def __init__(self, per_minute: float, *, margin: float = 0.0, burst: float = 0.0) -> None:
        self.per_minute = per_minute
        self._interval_s = _WINDOW_S / (per_minute * (1.0 - margin))
        self._tolerance_s = _WINDOW_S * burst
        self._due_at = -math.inf

    def ready_at(self, amount: float) -> float:
        """From when on `amount` may be taken: what is more than the tolerance waits until all before it is paid."""
        return self._due_at - max(0.0, self._tolerance_s - amount * self._interval_s)

    def take(self, amount: float, now: float) -> None:
        """Take it, ready or not."""
        self._due_at = max(self._due_at, now) + amount * self._interval_s

    def adjust(self, amount: float) -> None:
        """What was taken turned out to be more by `amount`, or less if it is negative."""
        self._due_at += amount * self._interval_s

    def available(self, now: float) -> float:
        """What may be taken at once now, in its unit; negative when more was taken than there was."""
        return (self._tolerance_s - max(0.0, self._due_at - now)) / self._interval_s

    def is_full(self, now: float) -> bool:
        """Whether all that was ever taken is made up for."""
        return self._due_at <= now


class TokenScale:
    """How many tokens requests really use for each one estimated, learned from those that ended.

    An estimate has to take a completion for as long as it may become, which is several times too much;
    what is reserved in vain holds back others until the reply is there.
    """

    __slots__ = ("_estimated", "_used")

    def __init__(self) -> None:
        self._estimated = 0.0
        self._used = 0.0

    @property
    def scale(self) -> float:
        """Used for each estimated; 1 until something is known."""
        if self._estimated <= 0.0:
            return _PRIOR
        return min(max(self._used / self._estimated, _LEAST_SCALE), _MOST_SCALE)

    def learn(self, estimated: int, used: int) -> None:
        """A request that was estimated so has used so much; what is long ago counts less and less."""
        self._estimated = self._estimated * _DECAY + estimated
        self._used = self._used * _DECAY + used
