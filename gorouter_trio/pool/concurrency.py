"""How many requests may be in flight, learned from what the other side answers. Pure; `now` is given.

Theory of operation. Nobody says how many requests a provider takes at a time, and it changes. So the
limit starts small and grows by one with each success as long as it is what holds requests back (slow
start: it doubles a round trip). The first refusal (429) of an episode cuts it by a fifth; more of them
change nothing for a cooldown, because they answer requests that had left before.

In the moment of a refusal, the other side is full: of all requests in flight then, the ones that are
answered in the end are as many as it takes. A *mark* counts them. Once the last of them has ended the
capacity is known, and the next cut goes a little below it at once, however far that is: below the larger of
the last two counts. A refusal that comes late, in a pause in which those that have ended were not followed by
others, would count too few: there is a mark only where about as many are in flight as there were lately.

After the cooldown the limit grows again: by one a round trip up to the *ceiling* at which it was refused
and one beyond, then faster and faster. Failures (5xx) say nothing of capacity: they only hold growth back
for a moment.
"""

from __future__ import annotations

import math

__all__ = ["AdaptiveLimit"]

_BLIND_CUT = 0.8
_CUT = 0.9
_COOLDOWN_S = 15.0
_FAILURE_PAUSE_S = 2.0
_MARK_S = 60.0
_FULL = 0.9


class AdaptiveLimit:
    """A limit between `least` and `most`; fixed at `start` where that is all that it may be."""

    __slots__ = (
        "_ceiling",
        "_least",
        "_marked_left",
        "_marked_served",
        "_measured",
        "_most",
        "_peak",
        "_quiet_until",
        "_round_left",
        "_step",
        "cuts",
        "limit",
        "marked_at",
    )

    def __init__(self, start: int, *, most: int, least: int = 1) -> None:
        self.limit = min(start, most)
        self.cuts = 0
        self.marked_at: float | None = None
        self._least = least
        self._most = most
        self._marked_left = self._marked_served = 0
        # The most in flight since the last cut.
        self._peak = 0
        self._measured: tuple[int, ...] = ()
        self._ceiling: float = math.inf
        self._quiet_until = -math.inf
        self._step = 1
        self._round_left = 0

    def succeed(self, now: float, *, in_flight: int) -> None:
        """A request was answered; `in_flight` are those that run now, without it."""
        self._peak = max(self._peak, in_flight)
        if in_flight < self.limit or self.limit >= self._most or now < self._quiet_until:
            return
        if not self.cuts:
            self.limit += 1
            return
        self._round_left -= 1
        if self._round_left <= 0:
            self._grow()

    def throttle(self, now: float, *, in_flight: int) -> bool:
        """A request was refused, which is among those `in_flight`; whether that cut the limit.

        A lone one was refused for another reason than their number.
        """
        if in_flight <= 1:
            return False
        self._peak = max(self._peak, in_flight)
        is_full = in_flight >= _FULL * min(self._peak, self.limit)
        if is_full and (self.marked_at is None or now - self.marked_at > _MARK_S):
            self.marked_at = now
            self._marked_left, self._marked_served = in_flight, 0
        if self.cuts and now < self._quiet_until:
            return False
        if self._measured:
            # A mark that was made before the other side was full again counts too few.
            self._ceiling = min(max(self._measured), self.limit)
            cut = math.ceil(self._ceiling * _CUT)
        else:
            cut = math.floor(min(self.limit, in_flight) * _BLIND_CUT)
            self._ceiling = cut / _CUT
        self.limit = max(self._least, cut)
        self._quiet_until = now + _COOLDOWN_S
        self._step = 1
        self._round_left = self.limit
        self._peak = in_flight
        self.cuts += 1
        return True

    def end(self, *, sent_at: float, is_refused: bool) -> None:
        """A request is not in flight any more. Has to be told while there is a mark, which is `marked_at`."""
        if self.marked_at is None or sent_at > self.marked_at:
            return
        self._marked_left -= 1
        self._marked_served += not is_refused
        if self._marked_left <= 0:
            self._measured = (*self._measured[-1:], max(self._marked_served, self._least))
            self.marked_at = None

    def fail(self, now: float) -> None:
        """A request failed at the other side for a reason of its own."""
        self._quiet_until = max(self._quiet_until, now + _FAILURE_PAUSE_S)

    def _grow(self) -> None:
        if self.limit <= self._ceiling:
            self._step = 1
            self.limit += 1
        else:
            # There is more room than there was when it was measured.
            self._measured = ()
            self.limit = min(self.limit + self._step, self._most)
            self._step = min(self._step * 2, max(1, self.limit // 2))
        self._round_left = self.limit
