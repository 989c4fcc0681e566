"""How many requests may be in flight, learned from what the other side answers. Pure; `now` is given.

Theory of operation. Nobody says how many requests a provider takes at a time, and it changes. So the
limit starts small and grows by one with each success as long as it is what holds requests back (slow
start: it doubles a round trip). The first refusal (429) of an episode cuts it to a part of what was in
flight; more of them change nothing for a cooldown, because they are answers to requests that had left
before. If refusals go on after it, the next cut goes down to what was really served meanwhile
(Little's law: time spent in answered requests, over time), a quarter at least, so that a fall of capacity by
a large factor is followed in a few cuts. After the cooldown the limit grows again: quickly up to near the
*ceiling* where it was refused, by one a round trip around it, and faster and faster beyond it.

Failures (5xx) say nothing of capacity: they only hold growth back for a moment.
"""

from __future__ import annotations

import math

__all__ = ["AdaptiveLimit"]

_CUT = 0.8
_DEEPEST_CUT = 0.25
_COOLDOWN_S = 15.0
_NEAR = 0.9
_FAILURE_PAUSE_S = 2.0
_MEMORY_S = 4 * _COOLDOWN_S


class AdaptiveLimit:
    """A limit between `least` and `most`; fixed at `start` where that is all that it may be."""

    __slots__ = (
        "_ceiling",
        "_cut_at",
        "_least",
        "_most",
        "_quiet_until",
        "_round_left",
        "_served_s",
        "_step",
        "cuts",
        "limit",
    )

    def __init__(self, start: int, *, most: int, least: int = 1) -> None:
        self.limit = min(start, most)
        self.cuts = 0
        self._least = least
        self._most = most
        self._ceiling = math.inf
        self._quiet_until = -math.inf
        self._cut_at = -math.inf
        self._served_s = 0.0
        self._step = 1
        self._round_left = 0

    @property
    def is_cut(self) -> bool:
        """Whether it was ever refused, so that successes have to be told with their duration."""
        return self.cuts > 0

    def succeed(self, now: float, *, in_flight: int, took_s: float) -> None:
        """A request was answered; `in_flight` are those that run now, without it."""
        if self.cuts:
            self._served_s += took_s
        if in_flight < self.limit or self.limit >= self._most or now < self._quiet_until:
            return
        if not self.cuts:
            self.limit += 1
            return
        self._round_left -= 1
        if self._round_left <= 0:
            self._grow()

    def throttle(self, now: float, *, in_flight: int) -> bool:
        """A request was refused because there were too many, it among them; whether that cut the limit.

        A lone one was refused for another reason.
        """
        if in_flight <= 1 or (self.cuts and now < self._quiet_until):
            return False
        base = min(self.limit, max(in_flight, 1))
        target = min(base * _CUT, max(self._served(now), base * _DEEPEST_CUT))
        self._ceiling = min(float(base), target / _CUT)
        self.limit = max(self._least, round(target))
        self._quiet_until = now + _COOLDOWN_S
        self._cut_at = now
        self._served_s = 0.0
        self._step = 1
        self._round_left = self.limit
        self.cuts += 1
        return True

    def fail(self, now: float) -> None:
        """A request failed at the other side for a reason of its own."""
        self._quiet_until = max(self._quiet_until, now + _FAILURE_PAUSE_S)

    def _served(self, now: float) -> float:
        """How many requests were served at a time since the last cut; infinite when that is too long ago to say."""
        elapsed_s = now - self._cut_at
        return self._served_s / elapsed_s if _COOLDOWN_S <= elapsed_s <= _MEMORY_S else math.inf

    def _grow(self) -> None:
        near = math.ceil(self._ceiling * _NEAR)
        if self.limit < near:
            grown = min(self.limit + self._step, near)
            self._step *= 2
        elif self.limit <= self._ceiling:
            grown = self.limit + 1
            self._step = 1
        else:
            grown = self.limit + self._step
            self._step *= 2
        self.limit = min(grown, self._most)
        self._round_left = self.limit
