"""API keys: several with weights, or one that a function gives; what each may do now, and its request heads.

Theory of operation. A key that the API refuses is left alone for a while, and the others go on: for long
after a 401, for less when it has no credit. A lone key is never left alone, because there is nothing to go
on with: its requests get their own answers. Of the keys that may be used now, the one that was used least for
its weight is next.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol, cast

from msgspec import Struct

from ..config import ApiKey, Secret, check_key
from ..errors import ApiError, ConfigError
from .limiter import Gcra, Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..config import ClientConfig, KeyProvider, RateLimits
    from ..transport.http import RequestHead
    from .concurrency import AdaptiveLimit

__all__ = ["HeadMaker", "KeyRing", "KeyState", "KeyStatistics", "Pause", "gcra", "pause_until"]

_LEAST_WEIGHT = 1e-9
# Of the keys that a function gave, the last few are remembered, and those about which there is something to remember.
_MOST_IDLE = 8
_MOST_PROVIDED = 1024
_UNLIMITED = 2**31


class HeadMaker(Protocol):
    """Makes the head of a request with a key; `extra` headers are added to the client's, and stand in for its own."""

    def __call__(
        self, method: str, path: str, extra: tuple[tuple[str, str], ...] = (), *, key: Secret | None = None
    ) -> RequestHead:
        """The head, made anew."""


class Pause(Struct, frozen=True):
    """Nothing is sent until a time (trio clock), because of an answer: requests wait, or a latch refuses them."""

    until: float
    error: ApiError
    is_latch: bool = False


class KeyStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of one API key. `name` is its name or number; `sent` counts requests that were given to it.

    `state` is `ready`, `paused` (the API asked for a wait), `cooling` (no credit), or `disabled` (refused as a
    key); `ready_in_s` is how long that lasts. `limit` are the requests in flight that it may have now, None for any.
    """

    name: str
    state: str
    ready_in_s: float
    in_flight: int
    limit: int | None
    sent: int


class KeyState:
    """One API key, and what holds for all requests that are made with it. Shows its name only."""

    __slots__ = (
        "free_latch",
        "governor",
        "heads",
        "in_flight",
        "index",
        "max_in_flight",
        "name",
        "on_full",
        "out",
        "pause",
        "rates",
        "requests",
        "secret",
        "sent",
        "tokens",
        "used",
        "weight",
    )

    def __init__(self, key: ApiKey, *, index: int, name: str, rates: RateLimits) -> None:
        rates = key.rates or rates
        self.index = index
        self.name = key.name or name
        self.secret = key.secret
        self.weight = max(key.weight, _LEAST_WEIGHT)
        self.rates = rates
        self.used = 0.0 if key.weight else 1.0 / _LEAST_WEIGHT
        self.sent = 0
        self.in_flight = 0
        self.max_in_flight = rates.max_in_flight or _UNLIMITED
        self.requests: Meter | None = gcra(rates, rates.requests_per_minute)
        self.tokens: Meter | None = gcra(rates, rates.tokens_per_minute)
        # Called when a request finds as many in flight as there may be.
        self.on_full: Callable[[], None] | None = None
        self.heads: dict[tuple[str, str], RequestHead] = {}
        # How many requests its credit lets be in flight, learned from the first that it did not.
        self.governor: AdaptiveLimit | None = None
        self.pause: Pause | None = None
        self.free_latch: Pause | None = None
        self.out: Pause | None = None

    @property
    def fingerprint(self) -> str:
        """What several processes know the key by, and nobody who has not got it."""
        return hashlib.sha256(b"gorouter-trio key " + self.secret.reveal().encode()).hexdigest()[:32]

    @property
    def has_rates(self) -> bool:
        """Whether there is a rate to keep."""
        return self.requests is not None or self.tokens is not None

    def is_forgettable(self, now: float) -> bool:
        """Whether a state made anew would let nothing more through than this one."""
        pauses = (self.pause, self.free_latch, self.out)
        meters = (meter for meter in (self.requests, self.tokens) if meter is not None)
        return (
            not self.in_flight
            and self.governor is None
            and all(pause_until(pause, now) <= now for pause in pauses)
            and all(meter.is_full(now) for meter in meters)
        )

    def __repr__(self) -> str:
        return f"<KeyState {self.name}: {self.in_flight} in flight>"

    def head(self, method: str, path: str, *, extra: tuple[tuple[str, str], ...], make: HeadMaker) -> RequestHead:
        """The head of a request with this key; made once unless it has headers or a query of its own."""
        if extra:
            return make(method, path, extra, key=self.secret)
        head = self.heads.get((method, path))
        if head is None:
            head = make(method, path, key=self.secret)
            # What is asked with a GET may have another path each time.
            if method == "POST":
                self.heads[method, path] = head
        return head

    def statistics(self, now: float) -> KeyStatistics:
        """A snapshot."""
        state, until = "ready", now
        if self.out is not None and self.out.until > now:
            state, until = "disabled" if self.out.error.status == 401 else "cooling", self.out.until
        elif self.pause is not None and self.pause.until > now:
            state, until = "paused", self.pause.until
        limits = [self.max_in_flight] + ([] if self.governor is None else [self.governor.limit])
        return KeyStatistics(
            name=self.name,
            state=state,
            ready_in_s=until - now,
            in_flight=self.in_flight,
            limit=None if min(limits) == _UNLIMITED else min(limits),
            sent=self.sent,
        )


def gcra(rates: RateLimits, per_minute: float | None) -> Gcra | None:
    """The meter of a rate, with the margins of `rates`; None without one."""
    return None if per_minute is None else Gcra(per_minute, margin=rates.margin, burst=rates.burst)


class KeyRing:
    """The keys of a client. With a `provider`, those that it gave last are remembered, and those that have to wait.

    The `index` of a key is no other's, also after a `change`; `changes` counts those.
    """

    __slots__ = ("_indexes", "_provided", "_rates", "_served", "changes", "keys", "provider")

    def __init__(self, config: ClientConfig) -> None:
        self._rates = config.rates
        self._indexes = itertools.count()
        self.changes = -1
        self._provided: OrderedDict[Secret, KeyState] = OrderedDict()
        self.change(config)

    def change(self, config: ClientConfig) -> None:
        """Take the keys of `config`, about which nothing is known yet."""
        self.changes += 1
        self.keys: tuple[KeyState, ...] = tuple(
            KeyState(key, index=next(self._indexes), name=str(number), rates=config.rates)
            for number, key in enumerate(config.keys)
        )
        self.provider = cast("KeyProvider", config.api_key) if not self.keys else None
        self._provided.clear()
        self._served = 0.0

    def __iter__(self) -> Iterator[KeyState]:
        return iter(self.keys or tuple(self._provided.values()))

    @property
    def is_lone(self) -> bool:
        """Whether there is one key only, or one at a time."""
        return len(self.keys) <= 1

    def ask(self) -> object:
        """What the provider gives now, or what to await for it; raises what it raises."""
        return cast("KeyProvider", self.provider)()

    def state_of(self, given: object, *, now: float) -> KeyState:
        """The key that the provider gave; raises `ConfigError` for what is no key."""
        if isinstance(given, str):
            given = Secret(given)
        if not isinstance(given, Secret):
            raise ConfigError(f"api_key: the function must give a str or a Secret, not a {type(given).__name__}")
        secret = given.stripped()
        state = self._provided.get(secret)
        if state is None:
            check_key(secret, "api_key: what the function gave")
            index = next(self._indexes)
            state = KeyState(ApiKey(key=secret), index=index, name=str(index), rates=self._rates)
            self._forget_old(now)
            self._provided[secret] = state
        self._provided.move_to_end(secret)
        return state

    def _forget_old(self, now: float) -> None:
        """Make room for one more."""
        provided = self._provided
        if len(provided) >= _MOST_IDLE:
            forgettable = [secret for secret, state in provided.items() if state.is_forgettable(now)]
            for secret in forgettable[: len(provided) + 1 - _MOST_IDLE]:
                del provided[secret]
        if len(provided) >= _MOST_PROVIDED:
            provided.popitem(last=False)

    def choose(self, usable: list[KeyState]) -> KeyState:
        """The one of these that is next by weight, which is charged for it."""
        best = min(usable, key=_used) if len(usable) > 1 else usable[0]
        # Who was away for a while has no claim on what it did not use.
        best.used = max(best.used, self._served) + 1.0 / best.weight
        self._served = max(self._served, best.used - 1.0 / best.weight)
        return best


def _used(key: KeyState) -> float:
    return key.used


def pause_until(pause: Pause | None, now: float) -> float:
    """When a pause ends, -inf when there is none now."""
    return -math.inf if pause is None or pause.until <= now else pause.until
