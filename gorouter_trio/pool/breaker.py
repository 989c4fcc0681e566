"""The circuit breaker of one model: what fails again and again is left alone for a while. Pure; `now` is given.

Theory of operation. Closed, it counts. It opens when so many requests in a row have failed, each counted
once however often it was tried, or when a share of all attempts within a window has. Open, it lets
nothing through until its time is over. Then, half open, it lets through one request, the probe: its
success closes the breaker, its failure opens it again for twice as long.

Successes are only counted up; failures take a note of the counts once a second, and what lies between
two notes is what happened meanwhile. So a success costs nothing but an addition.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..config import BreakerPolicy

__all__ = ["Breaker", "BreakerState"]

BreakerState = Literal["closed", "open", "half_open"]
"""Closed lets everything through, open nothing, half open one probe."""

_NOTE_S = 1.0


class Breaker:
    """Made closed."""

    __slots__ = (
        "_failures",
        "_notes",
        "_open_s",
        "_policy",
        "_probing",
        "is_closed",
        "opened",
        "reopens_at",
        "streak",
        "successes",
    )

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._notes: deque[tuple[float, int, int]] = deque()
        self._failures = 0
        self._open_s = policy.open_s
        self._probing = False
        self.is_closed = True
        self.reopens_at = 0.0
        self.opened = 0
        self.streak = 0
        self.successes = 0

    def state(self, now: float) -> BreakerState:
        """What it does now."""
        if self.is_closed:
            return "closed"
        return "open" if now < self.reopens_at else "half_open"

    def may_pass(self, now: float) -> bool:
        """Whether a request may go now; with the breaker half open it is the probe, and `begin_probe` has to follow."""
        return self.is_closed or (now >= self.reopens_at and not self._probing)

    def begin_probe(self) -> None:
        """The request that was let through half open is on its way."""
        self._probing = True

    def end_probe(self) -> None:
        """The probe ended without saying anything of the model: it was cancelled, or never went out."""
        self._probing = False

    def succeed(self) -> None:
        """A request was answered as it should be."""
        self.successes += 1
        self.streak = 0
        if not self.is_closed:
            self.is_closed = True
            self._probing = False
            self._open_s = self._policy.open_s
            self._notes.clear()

    def fail(self, now: float, *, is_retry: bool = False, is_probe: bool = False) -> bool:
        """A request failed at the model; whether the breaker has opened for that.

        What ends while the breaker is not closed was sent before it opened, and changes nothing, but for the probe.
        """
        if not self.is_closed:
            if is_probe:
                # A first time that is longer than the longest stands for that as well.
                self._open_s = max(min(self._open_s * 2, self._policy.most_open_s), self._policy.open_s)
                self._open(now)
            return is_probe
        self._failures += 1
        self.streak += not is_retry
        if self.streak >= self._policy.consecutive or self._is_share_over(now):
            self._open(now)
            return True
        return False

    def _open(self, now: float) -> None:
        self.is_closed = self._probing = False
        self.reopens_at = now + self._open_s
        self.opened += 1
        self.streak = 0

    def _is_share_over(self, now: float) -> bool:
        """Whether too many of the attempts in the window have failed."""
        notes, policy = self._notes, self._policy
        if not notes or now - notes[-1][0] >= _NOTE_S:
            # Before this failure, which belongs to what comes after the note.
            notes.append((now, self.successes, self._failures - 1))
        while len(notes) > 1 and now - notes[0][0] > policy.window_s:
            notes.popleft()
        _, successes, failures = notes[0]
        failed = self._failures - failures
        attempts = failed + self.successes - successes
        return attempts >= policy.least_attempts and failed >= policy.share * attempts
