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
    AuthenticationError,
    BadRequestError,
    CircuitOpenError,
    ConnectError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    ModerationError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
    StreamBrokenError,
)
from ..wire.faults import status_of

if TYPE_CHECKING:
    import random

    from ..config import RetryPolicy

__all__ = [
    "FailureKind",
    "GiveUp",
    "Retry",
    "RetryQuota",
    "RetryState",
    "classify",
    "decide",
    "is_about_key",
    "is_daily",
    "is_free_tier",
    "is_in_flight",
    "warrants_fallback",
]

FailureKind = Literal["final", "unsent", "refused", "throttled", "failed", "ambiguous"]
"""`final` is never retried; `unsent` left nothing at the server; `refused` and `throttled` were answered
without work; `failed` was worked on in vain (500, 502); `ambiguous` may have been answered and billed."""

_REFUSED = frozenset({408, 409, 425, 503, 529})
_AMBIGUOUS = frozenset({504, 524})
_MAX_500 = 2
_MOST_SWITCHES = 8
_DAILY = "openrouter_free_tier_daily"
_IN_FLIGHT = "openrouter_in_flight_budget"
_KEY_LIMIT = "openrouter_key_limit"
_CONTEXT_LENGTH = "context_length_exceeded"
_UNKNOWN_MODEL = "is not a valid model ID"


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

    __slots__ = ("ambiguous", "ambiguous_limit", "held_tokens", "maybe_billed", "retries", "server_errors", "switches")

    def __init__(self) -> None:
        self.retries = 0
        self.ambiguous = 0
        self.ambiguous_limit: int | None = None
        self.server_errors = 0
        self.switches = 0
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
        return "throttled" if is_in_flight(error) else "final"
    if isinstance(error, RateLimitError):
        return "final" if is_daily(error) else "throttled"
    status = _decisive_status(error)
    if status in _AMBIGUOUS:
        return "ambiguous"
    if status in _REFUSED:
        return "throttled" if error.retry_after_s is not None else "refused"
    return "failed" if status in {500, 502} else "final"


def is_in_flight(error: ApiError) -> bool:
    """Whether it is a 402 for the requests in flight, which passes."""
    is_402 = isinstance(error, InsufficientCreditsError)
    return is_402 and error.metadata.get("limit_source") == _IN_FLIGHT and error.retry_after_s is not None


def is_free_tier(error: ApiError) -> bool:
    """Whether it is a 429 of a limit of the free models."""
    return isinstance(error, RateLimitError) and error.metadata.get("limit_source") == _DAILY


def is_daily(error: ApiError) -> bool:
    """Whether it is a 429 that ends with the day. The limit a minute of free models has the same source, and passes."""
    return is_free_tier(error) and "-per-min" not in error.message


def is_about_key(error: GorouterError) -> bool:
    """Whether an error is one of the key, so that the same request may do with another."""
    if isinstance(error, RateLimitError):
        return is_daily(error) or (error.retry_after_s is not None and "provider_name" not in error.metadata)
    if isinstance(error, PermissionDeniedError):
        return error.metadata.get("limit_source") == _KEY_LIMIT
    return isinstance(error, (AuthenticationError, InsufficientCreditsError))


def warrants_fallback(error: GorouterError) -> bool:
    """Whether another model may answer what this error kept one from answering, and it is not paid twice for that.

    That is so for what is wrong with the model or its providers, once the retries are over: it is limited,
    overloaded, down, unknown, too small for the context, or refuses what others may not. What is wrong with the
    request, the key or the credit is so with every model. Where something may have been billed, or a part of
    the answer was given out, there is no other try.
    """
    if error.maybe_billed or error.partial is not None:
        return False
    if isinstance(error, BadRequestError):
        # Of a model that there is not the API says no more than this, and says it with a 400.
        return error.metadata.get("error_type") == _CONTEXT_LENGTH or _UNKNOWN_MODEL in error.message
    return isinstance(error, (CircuitOpenError, ModerationError, NotFoundError, ProviderError, RateLimitError))


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
    cooldown_s: float = 0.0,
    has_other_key: bool = False,
) -> Retry | GiveUp:
    """Whether to try again after `error`; counts what it allows in `state` and `quota`.

    `remaining_s` is the time left until the request's deadline: a wait that would not end before it
    is not begun. `cooldown_s` is how long answers to other requests have asked all of them to wait.
    `has_other_key` says that there is a key that can be used at once: what was the fault of the first is
    tried again with that, and waits for nothing.
    """
    if has_other_key and is_about_key(error) and state.switches < _MOST_SWITCHES:
        state.switches += 1
        return Retry(0.0, state.maybe_billed)
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
    if delay_s is None or max(delay_s, cooldown_s) >= remaining_s:
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
