"""Rate limits as the simulated service keeps them, and what they let through.

All arithmetic is in integers: nanoseconds, requests, tokens. Nothing here reads a clock or waits, and nothing is shared
with the limiter of the client, which these limits are to judge.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias, final

from msgspec import Struct

from ..errors import ConfigError
from ._words import check_words

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ALL_FREE",
    "Demand",
    "FreeTier",
    "Grant",
    "Limit",
    "LimitKind",
    "LimitScope",
    "LimitSource",
    "LimitWindow",
    "RateLimits",
    "Refused",
    "masked",
]

LimitKind = Literal["token_bucket", "fixed", "sliding"]
"""How a limit forgets: all the time, at the end of windows that begin at multiples of their length since the epoch, or
each request when the window has passed since it."""

LimitScope = Literal["key", "model", "key_model", "account"]
"""What has a count of its own."""

LimitSource = Literal["platform", "upstream", "free_tier"]
"""Whose limit it is, which decides the form of the 429: OpenRouter's, a provider's shared pool, or the free models'."""

ALL_FREE: Final = ":free"
"""Stands for all free variants of models, where a limit names those it is for."""

_NS: Final = 1_000_000_000
_DAY_S: Final = 86_400.0
_MAX_SCOPES: Final = 65_536
_MAX_WINDOWS: Final = 2_048


class Limit(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """At most so many requests, or tokens, in a window. Raises `ConfigError` for a value out of range."""

    requests: int | None = None
    tokens: int | None = None
    """Exactly one of the two is given."""
    window_s: float = 60.0
    kind: LimitKind = "sliding"
    """A token bucket starts full, holds what a window allows, and fills evenly."""
    per: LimitScope = "key"
    models: tuple[str, ...] = ()
    """The ids it is for; `:free` stands for all free variants. Empty is all models."""
    source: LimitSource = "platform"
    count: Literal["used", "worst_case"] = "used"
    """Which tokens: the prompt's at admission and the completion's when it is billed, which may overdraw the limit; or
    both at admission, as many as the request could come to cost, with nothing given back."""

    def __post_init__(self) -> None:
        check_words(self)
        if (self.requests is None) == (self.tokens is None):
            raise ConfigError("a limit needs requests or tokens, and not both")
        if self.amount < 1:
            raise ConfigError(f"a limit must allow at least 1, not {self.amount}")
        if not 0.001 <= self.window_s <= 366 * _DAY_S:
            raise ConfigError(f"window_s must be 0.001 to {366 * _DAY_S:.0f}, not {self.window_s!r}")

    @property
    def amount(self) -> int:
        """What it allows in a window, in its unit."""
        return self.requests if self.requests is not None else self.tokens or 0

    def covers(self, model: str) -> bool:
        """Whether it is for this model."""
        return not self.models or model in self.models or (ALL_FREE in self.models and model.endswith(ALL_FREE))


class FreeTier(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits of the `:free` models, counted for the whole account; the day ends at midnight UTC.

    Raises `ConfigError` for one that admits nothing.
    """

    requests_per_min: int = 20
    requests_per_day: int | None = None
    """None is 1,000 for an account that has bought 10 credits, else 50."""

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "requests_per_day"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"free_tier.{name} must be at least 1, not {value!r}")

    def limits(self, credits_nanousd: int) -> tuple[Limit, Limit]:
        """The same as limits, for an account that has bought so much."""
        day = self.requests_per_day
        if day is None:
            day = 1_000 if credits_nanousd >= 10 * _NS else 50
        free = (ALL_FREE,)
        return (
            Limit(requests=self.requests_per_min, per="account", models=free, source="free_tier"),
            Limit(requests=day, window_s=_DAY_S, kind="fixed", per="account", models=free, source="free_tier"),
        )


class Demand(Struct, frozen=True):
    """What a request asks of the limits."""

    key: str
    model: str
    prompt_tokens: int
    max_tokens: int


class Refused(Struct, frozen=True):
    """Which limit a request met. Nothing was counted as admitted anywhere."""

    limit: Limit
    remaining: int
    """In the limit's unit."""
    wait_s: float
    """Until an equal request would be admitted, if nobody else came; above 0."""
    reset_ms: int
    """The same as epoch milliseconds."""


class LimitWindow(Struct, frozen=True, kw_only=True):
    """What a limit let through in a stretch as long as its window that began at a multiple of that since the epoch."""

    limit: Limit
    scope: str
    """The key (masked), the model, both with a space between, or an empty string for the account."""
    start_s: float
    """Seconds since the epoch, by the server's clock."""
    admitted: int
    """Requests."""
    refused: int
    """Requests that this limit turned away."""
    used: int
    """What counted against the limit, in its unit."""


# How each kind counts. All of them: `wait_ns` is 0 when the amount fits, `take` may overdraw.


class _Meter(Protocol):
    def wait_ns(self, amount: int, now_ns: int, /) -> int: ...
    def take(self, amount: int, now_ns: int, /) -> None: ...
    def remaining(self, now_ns: int, /) -> int: ...


@final
class _TokenBucket:
    """The level is kept in amounts times nanoseconds, so filling is exact."""

    def __init__(self, limit: int, window_ns: int) -> None:
        self._limit = limit
        self._window_ns = window_ns
        self._level = limit * window_ns
        self._at_ns = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        missing = amount * self._window_ns - self._filled(now_ns)
        return max(0, -(-missing // self._limit))

    def take(self, amount: int, now_ns: int) -> None:
        self._level = self._filled(now_ns) - amount * self._window_ns
        self._at_ns = now_ns

    def remaining(self, now_ns: int) -> int:
        return max(0, self._filled(now_ns) // self._window_ns)

    def _filled(self, now_ns: int) -> int:
        return min(self._limit * self._window_ns, self._level + self._limit * (now_ns - self._at_ns))


@final
class _FixedWindow:
    def __init__(self, limit: int, window_ns: int) -> None:
        self._limit = limit
        self._window_ns = window_ns
        self._number = 0
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        fits = self._used_at(now_ns) + amount <= self._limit
        return 0 if fits else self._window_ns - now_ns % self._window_ns

    def take(self, amount: int, now_ns: int) -> None:
        self._used = self._used_at(now_ns) + amount
        self._number = now_ns // self._window_ns

    def remaining(self, now_ns: int) -> int:
        return max(0, self._limit - self._used_at(now_ns))

    def _used_at(self, now_ns: int) -> int:
        return self._used if now_ns // self._window_ns == self._number else 0


@final
class _SlidingWindow:
    def __init__(self, limit: int, window_ns: int) -> None:
        self._limit = limit
        self._window_ns = window_ns
        self._taken: deque[tuple[int, int]] = deque()
        self._used = 0

    def wait_ns(self, amount: int, now_ns: int) -> int:
        self._forget(now_ns)
        excess = self._used + amount - self._limit
        for at_ns, taken in self._taken if excess > 0 else ():
            excess -= taken
            if excess <= 0:
                return at_ns + self._window_ns - now_ns
        return 0

    def take(self, amount: int, now_ns: int) -> None:
        self._forget(now_ns)
        if amount:
            self._taken.append((now_ns, amount))
            self._used += amount

    def remaining(self, now_ns: int) -> int:
        self._forget(now_ns)
        return max(0, self._limit - self._used)

    def _forget(self, now_ns: int) -> None:
        while self._taken and self._taken[0][0] + self._window_ns <= now_ns:
            self._used -= self._taken.popleft()[1]


_METERS: Final[dict[LimitKind, type[_TokenBucket | _FixedWindow | _SlidingWindow]]] = {
    "token_bucket": _TokenBucket,
    "fixed": _FixedWindow,
    "sliding": _SlidingWindow,
}


@final
class _Count:
    """One limit for one scope: its meter, and the tallies of its last windows."""

    __slots__ = ("_windows", "limit", "meter", "scope", "window_ns")

    def __init__(self, limit: Limit, scope: str) -> None:
        self.limit = limit
        self.scope = scope
        self.window_ns = round(limit.window_s * _NS)
        self.meter: _Meter = _METERS[limit.kind](limit.amount, self.window_ns)
        self._windows: OrderedDict[int, list[int]] = OrderedDict()

    def tally(self, now_ns: int, *, admitted: int = 0, refused: int = 0, used: int = 0) -> None:
        number = now_ns // self.window_ns
        counts = self._windows.get(number)
        if counts is None:
            counts = self._windows[number] = [0, 0, 0]
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popitem(last=False)
        counts[0] += admitted
        counts[1] += refused
        counts[2] += used

    def windows(self) -> list[LimitWindow]:
        return [
            LimitWindow(
                limit=self.limit,
                scope=self.scope,
                start_s=number * self.window_ns / _NS,
                admitted=admitted,
                refused=refused,
                used=used,
            )
            for number, (admitted, refused, used) in self._windows.items()
        ]


Grant: TypeAlias = "list[_Count]"
"""The counts that the completion tokens of an admitted request go to."""


@final
class RateLimits:
    """All limits of one account. *now_ns* is the server's time since the epoch, and must not go back.

    A request is admitted by all limits or counted by none. Scopes beyond 65,536 push out those that were longest
    unused.
    """

    def __init__(self, limits: Sequence[Limit]) -> None:
        self._limits = tuple(limits)
        self._counts: OrderedDict[tuple[int, str], _Count] = OrderedDict()

    def admit(self, demand: Demand, now_ns: int) -> Grant | Refused:
        """Count a request in, or say which limit forbids it: the one with the longest wait."""
        asked = [
            (self._count(number, limit, demand), _asked(limit, demand))
            for number, limit in enumerate(self._limits)
            if limit.covers(demand.model)
        ]
        waits = [count.meter.wait_ns(amount, now_ns) for count, amount in asked]
        if waits and (wait_ns := max(waits)) > 0:
            count = asked[waits.index(wait_ns)][0]
            count.tally(now_ns, refused=1)
            reset_ms = -(-(now_ns + wait_ns) // 1_000_000)
            return Refused(count.limit, count.meter.remaining(now_ns), wait_ns / _NS, reset_ms)
        for count, amount in asked:
            count.meter.take(amount, now_ns)
            count.tally(now_ns, admitted=1, used=amount)
        return [count for count, _ in asked if count.limit.tokens is not None and count.limit.count == "used"]

    def settle(self, grant: Grant, completion_tokens: int, *, now_ns: int) -> None:
        """Count what an admitted request has made."""
        for count in grant:
            count.meter.take(completion_tokens, now_ns)
            count.tally(now_ns, used=completion_tokens)

    def windows(self) -> list[LimitWindow]:
        """What each limit let through, by limit, scope and time: the last 2,048 windows in which anything came."""
        counts = sorted(self._counts.items(), key=lambda item: item[0])
        return [window for _, count in counts for window in count.windows()]

    def remaining(self, limit: Limit, now_ns: int) -> int:
        """What an account-wide limit of these still allows."""
        count = self._counts.get((self._limits.index(limit), ""))
        return limit.amount if count is None else count.meter.remaining(now_ns)

    def _count(self, number: int, limit: Limit, demand: Demand) -> _Count:
        name = (number, _scope(limit, demand, key=demand.key))
        count = self._counts.get(name)
        if count is None:
            count = self._counts[name] = _Count(limit, _scope(limit, demand, key=masked(demand.key)))
            if len(self._counts) > _MAX_SCOPES:
                self._counts.popitem(last=False)
        else:
            self._counts.move_to_end(name)
        return count


def masked(key: str) -> str:
    """A key as the API shows it to its owner."""
    return f"{key[:12]}...{key[-3:]}"


def _scope(limit: Limit, demand: Demand, *, key: str) -> str:
    match limit.per:
        case "key":
            return key
        case "model":
            return demand.model
        case "key_model":
            return f"{key} {demand.model}"
        case "account":
            return ""


def _asked(limit: Limit, demand: Demand) -> int:
    """What admitting takes from a limit; one that no window could hold takes a whole window."""
    if limit.requests is not None:
        return 1
    tokens = demand.prompt_tokens + (demand.max_tokens if limit.count == "worst_case" else 0)
    return min(tokens, limit.amount)
