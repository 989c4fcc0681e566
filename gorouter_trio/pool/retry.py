"""Retries, decided: what a failure means, whether to try again, and after how long. Pure.

Theory of operation. A failure is classified by one question: can the provider have processed the
request? *Unsent* and *refused* requests cannot have been billed and are tried again within the
limits. *Ambiguous* ones may have been, so they have a bound of their own and mark what follows as
`maybe_billed`. Every retry also takes tokens from a quota shared by the whole client: while the
other side is down, the quota drains and requests fail fast instead of being multiplied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from ..errors import (
    ApiError,
    ConnectError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    RateLimitError,
    StreamBrokenError,
)
from ..wire.faults import status_of

if TYPE_CHECKING:
    import random

    from ..config import RetryPolicy

__all__ = ["FailureKind", "GiveUp", "Retry", "RetryQuota", "RetryState", "classify", "decide"]

FailureKind = Literal["final", "unsent", "refused", "throttled", "failed", "ambiguous"]
"""`final` is never retried; `unsent` left nothing at the server; `refused` and `throttled` were answered
without work; `failed` was worked on in vain (500, 502); `ambiguous` may have been answered and billed."""

_REFUSED = frozenset({408, 409, 425, 503, 529})
_AMBIGUOUS = frozenset({504, 524})
_MAX_500 = 2
_DAILY = "openrouter_free_tier_daily"
_IN_FLIGHT = "openrouter_in_flight_budget"


class Retry(Struct, frozen=True):
    """Try again after `delay_s`; `maybe_billed` says that the failed attempt may be charged."""

    delay_s: float
    maybe_billed: bool


class GiveUp(Struct, frozen=True):
    """Raise the error; `maybe_billed` as above."""

    reason: str
    maybe_billed: bool


class RetryQuota:
    """A token bucket in front of all retries of a client.

    A retry takes its cost and a success gives back what the retry before it took, or one token.
    """

    __slots__ = ("_capacity", "_tokens")

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tokens = capacity

    @property
    def tokens(self) -> int:
        """What is left."""
        return self._tokens

    def take(self, cost: int) -> bool:
        """Take `cost` tokens if they are there."""
        if cost > self._tokens:
            return False
        self._tokens -= cost
        return True

    def give_back(self, cost: int) -> None:
        """A success after a retry that took `cost`, or a first try with `cost` 0."""
        if self._tokens < self._capacity:
            self._tokens = min(self._capacity, self._tokens + max(cost, 1))


class RetryState:
    """What one request has used of its limits so far; an `ambiguous_limit` stands in for the policy's."""

    __slots__ = ("ambiguous", "ambiguous_limit", "held_tokens", "maybe_billed", "retries", "server_errors")

    def __init__(self) -> None:
        self.retries = 0
        self.ambiguous = 0
        self.ambiguous_limit: int | None = None
        self.server_errors = 0
        self.held_tokens = 0
        self.maybe_billed = False


def classify(error: GorouterError) -> FailureKind:
    """What kind of failure an error is."""
    if isinstance(error, ConnectError):
        return "unsent"
    if isinstance(error, StreamBrokenError):
        return "ambiguous" if error.sent else "unsent"
    if isinstance(error, DeadlineExceededError):
        return {"connect": "unsent", "headers": "ambiguous", "first_data": "ambiguous"}.get(error.phase, "final")  # type: ignore[return-value]  # dict.get widens the literals
    if isinstance(error, ApiError):
        return _classify_api(error)
    return "final"


def _classify_api(error: ApiError) -> FailureKind:
    if isinstance(error, InsufficientCreditsError):
        in_flight = error.metadata.get("limit_source") == _IN_FLIGHT and error.retry_after_s is not None
        return "throttled" if in_flight else "final"
    if isinstance(error, RateLimitError):
        # The limit a minute of free models has the source of the daily one, and passes.
        daily = error.metadata.get("limit_source") == _DAILY and "-per-min" not in error.message
        return "final" if daily else "throttled"
    status = _decisive_status(error)
    if status in _AMBIGUOUS:
        return "ambiguous"
    if status in _REFUSED:
        return "throttled" if error.retry_after_s is not None else "refused"
    return "failed" if status in {500, 502} else "final"


def _decisive_status(error: ApiError) -> int:
    return error.status if error.status >= 300 else status_of(error.code, error.metadata)


def decide(
    error: GorouterError,
    *,
    policy: RetryPolicy,
    state: RetryState,
    quota: RetryQuota,
    rng: random.Random,
    remaining_s: float,
) -> Retry | GiveUp:
    """Whether to try again after `error`; counts what it allows in `state` and `quota`.

    `remaining_s` is the time left until the request's deadline: a wait that would not end before it
    is not begun.
    """
    kind = classify(error)
    billed = kind == "ambiguous"
    # A reply that cannot be read was an answer all the same.
    state.maybe_billed = state.maybe_billed or billed or isinstance(error, DecodeError)
    if kind == "final":
        return GiveUp("not retryable", state.maybe_billed)
    if state.retries >= policy.max_retries:
        return GiveUp("retries used up", state.maybe_billed)
    limit = policy.ambiguous_retries if state.ambiguous_limit is None else state.ambiguous_limit
    if billed and state.ambiguous >= limit:
        return GiveUp("the request may have been processed", state.maybe_billed)
    if _is_500(error) and state.server_errors >= _MAX_500:
        return GiveUp("the server keeps failing", state.maybe_billed)
    delay_s = _delay_s(error, policy=policy, retry=state.retries, rng=rng)
    if delay_s is None or delay_s >= remaining_s:
        return GiveUp("the wait is too long", state.maybe_billed)
    cost = policy.throttle_cost if kind == "throttled" else policy.transient_cost
    if not quota.take(cost):
        return GiveUp("the retry quota is used up", state.maybe_billed)
    state.held_tokens = cost
    state.retries += 1
    state.ambiguous += billed
    state.server_errors += _is_500(error)
    return Retry(delay_s, state.maybe_billed)


def _is_500(error: GorouterError) -> bool:
    return isinstance(error, ApiError) and _decisive_status(error) == 500


def _delay_s(error: GorouterError, *, policy: RetryPolicy, retry: int, rng: random.Random) -> float | None:
    """Full jitter, and at least what the server asked for; None when it asked for more than the cap."""
    ceiling_s = min(policy.base_delay_s * 2.0 ** min(retry, 60), policy.max_delay_s)
    delay_s = rng.random() * ceiling_s
    asked_s = error.retry_after_s if isinstance(error, ApiError) else None
    if asked_s is None:
        return delay_s
    return None if asked_s > policy.retry_after_cap_s else max(asked_s, delay_s)
