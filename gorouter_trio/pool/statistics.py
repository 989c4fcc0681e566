"""What the pool can be asked: snapshots, and the small meters that they are read from."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from .admission import ModelStatistics
from .keys import KeyStatistics

__all__ = ["LagMeter", "LaneStatistics", "PoolStatistics", "WaitMeter", "WorkerState", "WorkerStatistics"]

_LEAST_S = 0.001
_BUCKETS = 26


class LaneStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of one lane: requests queued now, and admitted so far, with what they waited for that in seconds.

    The quantiles are upper bounds, each at most twice the true value.
    """

    name: str
    queued: int
    admitted: int
    wait_mean_s: float
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float


class PoolStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of the pool.

    `submitted` counts requests that were taken, retries included; each ends as `answered` (whatever
    the status), `failed` (no answer, or its deadline passed in the queue) or `abandoned` (its caller
    left). `queued` requests wait for their turn, `waiting` ones for room in the queue. `in_flight` holds
    streams that are lent. `connections` are open now, `opened` were opened so far.

    `throttled` counts answers 429, `throttled_share` is their share of all answers. `lanes`, `models` and `keys` say
    where requests wait, and for what. `loop_lag_s` is how long a task that could run has waited for its turn lately,
    `loop_lag_max_s` the longest that it ever has.
    """

    queued: int
    waiting: int
    in_flight: int
    workers: int
    connections: int
    opened: int
    submitted: int
    answered: int
    failed: int
    abandoned: int
    retries: int
    retry_quota_tokens: int
    throttled: int = 0
    lanes: tuple[LaneStatistics, ...] = ()
    models: tuple[ModelStatistics, ...] = ()
    keys: tuple[KeyStatistics, ...] = ()
    loop_lag_s: float = 0.0
    loop_lag_max_s: float = 0.0

    @property
    def throttled_share(self) -> float:
        """The part of the answers that were 429, 0 to 1."""
        return self.throttled / self.answered if self.answered else 0.0


WorkerState = Literal["idle", "connecting", "waiting", "receiving", "lent"]
"""Without a request; opening a connection; waiting for a reply; reading its body; its connection is lent."""


class WorkerStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of one worker: in what state, for how many seconds, and for what request, if it has one.

    `flow` is the session or tenant whose turn it is, `key` the name of the API key.
    """

    state: WorkerState
    since_s: float
    is_connected: bool
    model: str = ""
    flow: str = ""
    lane: str = ""
    key: str = ""


class WaitMeter:
    """Waits, in buckets that double: mean, maximum and quantiles in the memory of a few numbers.

    Only waits above 0 are told one by one; whoever asks says how many there were in all.
    """

    __slots__ = ("_buckets", "_max_s", "_sum_s")

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self._sum_s = 0.0
        self._max_s = 0.0

    def add(self, wait_s: float) -> None:
        """One that had to wait."""
        self._sum_s += wait_s
        self._max_s = max(self._max_s, wait_s)
        number, bound_s = 0, _LEAST_S
        while wait_s > bound_s and number < _BUCKETS - 1:
            number, bound_s = number + 1, bound_s * 2
        self._buckets[number] += 1

    def statistics(self, name: str, *, queued: int, admitted: int) -> LaneStatistics:
        """A snapshot, of `admitted` in all."""
        return LaneStatistics(
            name=name,
            queued=queued,
            admitted=admitted,
            wait_mean_s=self._sum_s / admitted if admitted else 0.0,
            wait_p50_s=self._quantile_s(0.5, admitted),
            wait_p99_s=self._quantile_s(0.99, admitted),
            wait_max_s=self._max_s,
        )

    def _quantile_s(self, share: float, admitted: int) -> float:
        above = admitted * (1.0 - share)
        for number in range(_BUCKETS - 1, -1, -1):
            above -= self._buckets[number]
            if above < 0:
                return min(_LEAST_S * 2.0**number, self._max_s)
        return 0.0


class LagMeter:
    """How late tasks run that could have run before: the last figures, smoothed, and the largest."""

    __slots__ = ("lag_s", "max_s")

    def __init__(self) -> None:
        self.lag_s = 0.0
        self.max_s = 0.0

    def add(self, lag_s: float) -> None:
        """One more."""
        self.lag_s += 0.1 * (lag_s - self.lag_s)
        self.max_s = max(self.max_s, lag_s)
