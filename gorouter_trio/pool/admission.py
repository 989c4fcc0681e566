"""What may be sent now, with which key; and what the answers say about that. Pure; `now` is given.

Theory of operation. A request passes a chain of limits that belong to its key (rates, requests in
flight, credit), to its model (what its provider takes, its circuit breaker), and to both together. It
passes all of them or none, and is charged for none then. What keeps it is a `Hold`: of everything, where
no key can take anything, or of its model alone. Refusals of the API become pauses of whatever they were
about, shared by all requests: of the model where its provider refuses, of the key where the API does.

A wait that is longer than anybody may be made to wait for becomes a *latch*: requests get the error at once
instead of a place in the queue. A latch ends with the wait that was asked for where that is certain, as with
the daily limit of free models; else soon, so that one absurd answer does not stop a model for years.

As long as nothing has gone wrong and there are no rates (`troubled_until` is past, `is_plain`), the two
counters of a route are all that there is to it, and the pool looks at nothing else.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

import msgspec
from msgspec import Struct

from ..config import BreakerPolicy
from ..errors import (
    ApiError,
    AuthenticationError,
    CircuitOpenError,
    ConfigError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
)
from .breaker import Breaker
from .concurrency import AdaptiveLimit
from .keys import KeyRing, KeyState, Pause, gcra, pause_until
from .limiter import Gcra, Meter, TokenScale
from .retry import classify, is_daily, is_free_tier, is_in_flight

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..config import ClientConfig
    from ..wire.responses import Usage

__all__ = ["Admission", "Applicant", "Hold", "ModelGate", "ModelStatistics", "Route", "Sharer"]

_MOST_GATES = 1024
_FORGOTTEN_AT_ONCE = 4
_NO_HINT_S = 1.0
_BLIND_LATCH_S = 60.0
_CREDIT_S = 60.0
_DISABLED_S = 300.0
_UNLIMITED = 2**31
_KEY_LIMIT = "openrouter_key_limit"
_NEVER_BREAKS = BreakerPolicy(consecutive=_UNLIMITED, least_attempts=_UNLIMITED)


class Hold(Struct, frozen=True):
    """What keeps a request: until a time, or `inf` until another one ends; of all requests or of its model's."""

    until: float
    by: str
    is_for_all: bool = False
    error: ApiError | None = None
    """The refusal that it comes from."""
    is_latch: bool = False
    """Whether requests are refused for it, instead of waiting."""
    is_of_key: bool = False
    """Whether it may end with a request for another model."""


class ModelStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of one model, over all keys.

    `limit` is how many of its requests may be in flight now, `cuts` how often that was cut. `held_by` says
    what keeps those that wait, None when nothing does. `breaker` is `closed`, `open` or `half_open`;
    `paused_s` is how long its provider still asked for a wait. `token_scale` are tokens used for each one estimated.
    """

    name: str
    in_flight: int
    limit: int
    cuts: int
    held_by: str | None
    breaker: str
    opened: int
    paused_s: float
    token_scale: float


class Applicant(Protocol):
    """A request that wants to be sent; admission notes here what it has taken for it."""

    gate: ModelGate
    key: KeyState | None
    """The only key that it can be sent with; None for any."""
    gives_up_at: float
    tokens: int
    """Estimated; 0 where nobody counts them."""
    route: Route | None
    charged: float
    is_probe: bool

    @property
    def lane(self) -> str:
        """The lane it waits in."""


class Sharer(Protocol):
    """Who puts limits that hold for several processes in place of those of one."""

    def share_key(self, key: KeyState) -> None:
        """The limits of a key."""

    def share_route(self, route: Route) -> None:
        """Those of a model with a key."""


class Route:
    """One model with one key."""

    __slots__ = ("adaptive", "gate", "in_flight", "key", "requests", "tokens")

    def __init__(self, gate: ModelGate, key: KeyState, *, start: int, most: int) -> None:
        rates = key.rates.models.get(gate.name)
        if rates is not None and rates.max_in_flight is not None:
            most = min(most, rates.max_in_flight)
        self.gate = gate
        self.key = key
        self.in_flight = 0
        self.adaptive = AdaptiveLimit(start, most=most)
        self.requests: Meter | None = None if rates is None else gcra(rates, rates.requests_per_minute)
        self.tokens: Meter | None = None if rates is None else gcra(rates, rates.tokens_per_minute)

    @property
    def has_rates(self) -> bool:
        """Whether there is a rate to keep."""
        return self.requests is not None or self.tokens is not None

    def __repr__(self) -> str:
        return f"<Route {self.gate.name!r}, key {self.key.name}: {self.in_flight} in flight>"


class ModelGate:
    """What holds for all requests for one model."""

    __slots__ = ("breaker", "held_by", "is_free", "name", "pause", "route", "routes", "scale")

    def __init__(self, name: str, breaker: Breaker) -> None:
        self.name = name
        self.is_free = name.endswith(":free")
        self.breaker = breaker
        self.scale = TokenScale()
        self.pause: Pause | None = None
        self.routes: dict[int, Route] = {}
        # The route with the only key, where there is one.
        self.route: Route | None = None
        self.held_by: str | None = None

    def is_of_use(self, now: float) -> bool:
        """Whether a new one would let through what this one holds back, or count from zero what is under way."""
        return (
            pause_until(self.pause, now) > now
            or self.breaker.state(now) == "open"
            or any(route.in_flight or route.has_rates for route in self.routes.values())
        )

    def statistics(self, now: float) -> ModelStatistics:
        """A snapshot."""
        routes = self.routes.values()
        return ModelStatistics(
            name=self.name,
            in_flight=sum(route.in_flight for route in routes),
            limit=sum(route.adaptive.limit for route in routes),
            cuts=sum(route.adaptive.cuts for route in routes),
            held_by=self.held_by,
            breaker=self.breaker.state(now),
            opened=self.breaker.opened,
            paused_s=max(0.0, pause_until(self.pause, now) - now),
            token_scale=self.scale.scale,
        )


class _FreeTier:
    """What all free models share."""

    __slots__ = ("meter", "pause")

    def __init__(self) -> None:
        self.meter: Gcra | None = None
        self.pause: Pause | None = None


class Admission:
    """The limits of one client; `ring` are its keys."""

    def __init__(self, config: ClientConfig, ring: KeyRing) -> None:
        self.ring = ring
        self._look_at_rates(config)
        self.troubled_until = -math.inf
        self._rates = config.rates
        self._breaker = config.breaker or _NEVER_BREAKS
        self._most = config.pool.max_connections
        self._start = config.pool.adaptive_from or self._most
        self._cap_s = config.retry.retry_after_cap_s
        self.gates: OrderedDict[str, ModelGate] = OrderedDict()
        self._free = _FreeTier()
        self._sharer: Sharer | None = None
        # What is no request for a model passes without limits.
        self.service = ModelGate("(service)", Breaker(_NEVER_BREAKS))
        if len(ring.keys) == 1:
            self.service.route = self._route(self.service, ring.keys[0])

    def _look_at_rates(self, config: ClientConfig) -> None:
        self.is_plain = len(self.ring.keys) == 1 and all((key.rates or config.rates).is_empty for key in config.keys)
        self.counts_tokens = any(
            rates.tokens_per_minute is not None
            for limits in (config.rates, *(key.rates for key in config.keys if key.rates is not None))
            for rates in (limits, *limits.models.values())
        )

    def forget_keys(self, config: ClientConfig) -> None:
        """The ring has other keys. What is known of models stays; requests in flight keep the routes that they have."""
        self._look_at_rates(config)
        for gate in (self.service, *self.gates.values()):
            gate.routes = {}
            gate.route = self._route(gate, self.ring.keys[0]) if len(self.ring.keys) == 1 else None

    def share(self, sharer: Sharer) -> None:
        """From now on, the limits are kept together with other processes; raises `ConfigError` where they cannot be."""
        if self.ring.provider is not None:
            raise ConfigError(
                "shared: limits can be shared for keys that are given, not for a function that gives them"
            )
        self._sharer = sharer
        for key in self.ring.keys:
            sharer.share_key(key)

    # Gates

    def make_gate(self, model: str, now: float) -> ModelGate:
        """A gate for a model that has none in `gates`; those of most models that are asked for are remembered."""
        gate = self.gates[model] = ModelGate(model, Breaker(self._breaker))
        if len(self.ring.keys) == 1:
            gate.route = self._route(gate, self.ring.keys[0])
        # More than one where there are too many, so that their number goes down again once they are of no use.
        for _ in range(min(len(self.gates) - _MOST_GATES, _FORGOTTEN_AT_ONCE)):
            self._forget_gate(now)
        return gate

    def _forget_gate(self, now: float) -> None:
        """Forget the oldest gate if it holds nothing."""
        oldest = next(iter(self.gates.values()))
        if oldest.is_of_use(now):
            self.gates.move_to_end(oldest.name)
        else:
            del self.gates[oldest.name]

    def _route(self, gate: ModelGate, key: KeyState) -> Route:
        route = gate.routes.get(key.index)
        if route is None:
            if self.ring.provider is not None:
                known = {known.index for known in self.ring}
                gate.routes = {number: old for number, old in gate.routes.items() if old.in_flight or number in known}
            is_service = gate is getattr(self, "service", gate)
            start, most = (_UNLIMITED, _UNLIMITED) if is_service else (self._start, self._most)
            route = gate.routes[key.index] = Route(gate, key, start=start, most=most)
            if self._sharer is not None:
                self._sharer.share_route(route)
        return route

    # Admitting

    def admit(self, applicant: Applicant, now: float) -> Hold | None:
        """Take what the request needs, or say what keeps it; None means that it may go, by `applicant.route`.

        Raises the error that it is refused with: of a latch, of keys that are all out, of a breaker, or
        that of a pause which ends after its deadline.
        """
        hold = None if applicant.gate is self.service else self._hold_of_model(applicant, now)
        if hold is None:
            keys = self.ring.keys if applicant.key is None else (applicant.key,)
            usable, holds, back_at = self._sort(applicant, keys, now)
            if usable:
                self._take(applicant, self.ring.choose(usable), now)
                return None
            hold = _together(holds, is_choice=applicant.key is None)
            if back_at < hold.until and not hold.is_latch:
                hold = msgspec.structs.replace(hold, until=back_at)
        if hold.error is not None and (hold.is_latch or hold.until >= applicant.gives_up_at):
            raise _again(hold.error, None if hold.is_latch else hold.until - now)
        applicant.gate.held_by = hold.by
        return hold

    def _hold_of_model(self, applicant: Applicant, now: float) -> Hold | None:
        """What keeps requests for the model, whatever the key."""
        gate = applicant.gate
        pause = gate.pause
        if pause is not None and pause.until > now:
            return _hold_of(pause, "the provider asked for a wait")
        if not gate.breaker.may_pass(now):
            return self._hold_of_breaker(applicant, now)
        return self._hold_of_free(now) if gate.is_free else None

    def _hold_of_breaker(self, applicant: Applicant, now: float) -> Hold:
        breaker = applicant.gate.breaker
        wait_s = max(0.0, breaker.reopens_at - now)
        if applicant.lane != "batch":
            name = f"the model {applicant.gate.name!r}" if applicant.gate.name else "the API"
            raise CircuitOpenError(f"{name} failed too often and is left alone for a while", retry_after_s=wait_s)
        return Hold(breaker.reopens_at if wait_s > 0 else math.inf, "the circuit breaker")

    def _hold_of_free(self, now: float) -> Hold | None:
        free = self._free
        if free.pause is not None and free.pause.until > now:
            return _hold_of(free.pause, "the rate of free models")
        if free.meter is not None and free.meter.ready_at(1.0) > now:
            return Hold(free.meter.ready_at(1.0), "the rate of free models")
        return None

    def _sort(
        self, applicant: Applicant, keys: Iterable[KeyState], now: float
    ) -> tuple[list[KeyState], list[Hold], float]:
        """The keys that can take the request now, what keeps it from others, and when the first is back of the rest."""
        usable, holds, outs = [], [], []
        for key in keys:
            out = key.out if key.out is not None and key.out.until > now else None
            if out is not None and applicant.gate is self.service and not isinstance(out.error, AuthenticationError):
                # What costs nothing needs no credit, and may be the very question how much there is.
                out = None
            if out is None and applicant.gate.is_free and pause_until(key.free_latch, now) > now:
                out = key.free_latch
            if out is not None:
                outs.append(out)
                continue
            hold = self._hold_of_key(key, applicant, now) if applicant.gate is not self.service else None
            if hold is None:
                usable.append(key)
            else:
                holds.append(hold)
        if outs and not usable and not holds:
            first = min(outs, key=_until)
            raise _again(first.error, first.until - now)
        return usable, holds, min(map(_until, outs), default=math.inf)

    def _hold_of_key(self, key: KeyState, applicant: Applicant, now: float) -> Hold | None:
        if key.pause is not None and key.pause.until > now:
            return _hold_of(key.pause, f"key {key.name}: the API asked for a wait", is_for_all=True)
        if key.in_flight >= key.max_in_flight:
            if key.on_full is not None:
                key.on_full()
            return Hold(math.inf, f"key {key.name}: max_in_flight", is_for_all=True)
        if key.governor is not None and key.in_flight >= key.governor.limit and not applicant.gate.is_free:
            return Hold(math.inf, f"key {key.name}: the credit for requests in flight", is_of_key=True)
        if key.requests is not None and key.requests.ready_at(1.0) > now:
            return Hold(key.requests.ready_at(1.0), f"key {key.name}: requests_per_minute", is_for_all=True)
        hold = self._hold_of_tokens(key.tokens, applicant, now, f"key {key.name}: ")
        if hold is not None:
            return msgspec.structs.replace(hold, is_for_all=True)
        return self._hold_of_route(key, applicant, now)

    def _hold_of_route(self, key: KeyState, applicant: Applicant, now: float) -> Hold | None:
        route = self._route(applicant.gate, key)
        if route.in_flight >= route.adaptive.limit:
            return Hold(math.inf, "requests in flight")
        if route.requests is not None and route.requests.ready_at(1.0) > now:
            return Hold(route.requests.ready_at(1.0), "requests_per_minute of the model")
        return self._hold_of_tokens(route.tokens, applicant, now, "the model: ")

    def _hold_of_tokens(self, meter: Meter | None, applicant: Applicant, now: float, whose: str) -> Hold | None:
        if meter is None:
            return None
        ready_at = meter.ready_at(self._charge(applicant))
        return Hold(ready_at, f"{whose}tokens_per_minute") if ready_at > now else None

    def _charge(self, applicant: Applicant) -> float:
        """How many tokens the request will have used, as far as one can tell."""
        if self._rates.counted_tokens == "worst_case":
            return applicant.tokens
        return applicant.tokens * applicant.gate.scale.scale

    def _take(self, applicant: Applicant, key: KeyState, now: float) -> None:
        gate = applicant.gate
        gate.held_by = None
        route = applicant.route = self._route(gate, key)
        route.in_flight += 1
        key.in_flight += 1
        key.sent += 1
        if gate is self.service:
            return
        applicant.charged = self._charge(applicant) if self.counts_tokens else 0.0
        for meter in (key.requests, route.requests, self._free.meter if gate.is_free else None):
            if meter is not None:
                meter.take(1.0, now)
        for meter in (key.tokens, route.tokens):
            if meter is not None:
                meter.take(applicant.charged, now)
        if not gate.breaker.is_closed:
            gate.breaker.begin_probe()
            applicant.is_probe = True

    # What became of it

    def release(self, route: Route) -> None:
        """A request is not in flight any more."""
        route.in_flight -= 1
        route.key.in_flight -= 1

    def refund(self, applicant: Applicant, *, was_sent: bool) -> None:
        """A request was not worked on: its tokens were not used, and its turn was not where nothing was sent."""
        route = applicant.route
        if route is None or route.gate is self.service:
            return
        self._correct(applicant, -applicant.charged)
        if not was_sent:
            for meter in (route.key.requests, route.requests, self._free.meter if route.gate.is_free else None):
                if meter is not None:
                    meter.adjust(-1.0)

    def settle(self, applicant: Applicant, usage: Usage) -> None:
        """What a request really used is known."""
        used = usage.total_tokens or (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        if not used or self._rates.counted_tokens == "worst_case":
            return
        applicant.gate.scale.learn(applicant.tokens, used)
        self._correct(applicant, used - applicant.charged)

    def _correct(self, applicant: Applicant, amount: float) -> None:
        route = applicant.route
        if route is None or amount == 0.0:
            return
        applicant.charged += amount
        for meter in (route.key.tokens, route.tokens):
            if meter is not None:
                meter.adjust(amount)

    def succeed(self, applicant: Applicant, now: float, *, is_retry: bool) -> None:
        """A request was answered as it should be."""
        route = applicant.route
        if route is None:
            return
        was_closed = route.gate.breaker.is_closed
        route.gate.breaker.succeed()
        if not is_retry:
            route.adaptive.succeed(now, in_flight=route.in_flight)
            self._grow_credit(route.key, now)
        if not was_closed:
            self._look_for_trouble()

    def fail(self, applicant: Applicant, error: GorouterError, *, now: float, is_retry: bool) -> None:
        """A request that was sent has failed."""
        route = applicant.route
        if route is None:
            return
        if isinstance(error, RateLimitError):
            self._throttle(route, error, now)
        elif isinstance(error, ApiError) and is_in_flight(error):
            self._learn_credit(route.key, error, now)
        elif isinstance(error, (AuthenticationError, InsufficientCreditsError, PermissionDeniedError)):
            self._leave_alone(route.key, error, now)
        elif isinstance(error, ApiError) and error.retry_after_s is not None:
            route.gate.pause = _later(route.gate.pause, self._pause(error, error.retry_after_s, now))
        if _is_models_fault(error):
            route.adaptive.fail(now)
            route.gate.breaker.fail(now, is_retry=is_retry, is_probe=applicant.is_probe)
        elif applicant.is_probe:
            self.end_probe(applicant)
        self._note_trouble(route)

    def end_probe(self, applicant: Applicant) -> None:
        """A probe ended without an answer that says anything."""
        applicant.gate.breaker.end_probe()
        applicant.is_probe = False

    def cooldown_until(self, gate: ModelGate, now: float) -> float:
        """When the pauses that hold for a model end that answers have asked for; -inf when there are none now."""
        keys = min((pause_until(key.pause, now) for key in self.ring), default=-math.inf)
        free = pause_until(self._free.pause, now) if gate.is_free else -math.inf
        return max(pause_until(gate.pause, now), keys, free)

    def has_other_key(self, applicant: Applicant, now: float) -> bool:
        """Whether a request whose key was refused can be sent with another one at once."""
        route = applicant.route
        if route is None:
            return False
        others = [key for key in self.ring.keys if key is not route.key]
        if applicant.gate.is_free:
            others = [key for key in others if pause_until(key.free_latch, now) <= now]
        return any(pause_until(key.out, now) <= now and pause_until(key.pause, now) <= now for key in others)

    def _throttle(self, route: Route, error: RateLimitError, now: float) -> None:
        """A 429: a pause of whatever was over its limit, and fewer requests in flight unless it was the free tier's."""
        wait_s = error.retry_after_s
        if is_daily(error):
            until = now + (_BLIND_LATCH_S if wait_s is None else wait_s)
            route.key.free_latch = _later(route.key.free_latch, Pause(until, error, is_latch=True))
            return
        pause = self._pause(error, _NO_HINT_S if wait_s is None else wait_s, now)
        if is_free_tier(error):
            self._free.pause = _later(self._free.pause, pause)
            self._free.meter = self._free.meter or gcra(self._rates, self._rates.free_requests_per_minute)
            return
        is_providers = wait_s is None or "provider_name" in error.metadata
        if is_providers:
            route.gate.pause = _later(route.gate.pause, pause)
        else:
            route.key.pause = _later(route.key.pause, pause)
        # Where the rate is known and kept, a window that was overdrawn all the same is no matter of concurrency.
        if is_providers or not (route.key.has_rates or route.has_rates):
            route.adaptive.throttle(now, in_flight=route.in_flight)

    def _pause(self, error: ApiError, wait_s: float, now: float) -> Pause:
        """A wait for all, or a latch where it is longer than anybody may be made to wait for."""
        return Pause(now + min(wait_s, self._cap_s), error, is_latch=wait_s > self._cap_s)

    def _learn_credit(self, key: KeyState, error: ApiError, now: float) -> None:
        """A 402 for the requests in flight: fewer of them. With none beside it there is only waiting."""
        if key.governor is None:
            key.governor = AdaptiveLimit(min(self._most, max(1, key.in_flight)), most=self._most)
        key.governor.throttle(now, in_flight=key.in_flight)
        if key.in_flight <= 1:
            key.pause = _later(key.pause, self._pause(error, error.retry_after_s or _NO_HINT_S, now))

    def _grow_credit(self, key: KeyState, now: float) -> None:
        governor = key.governor
        if governor is not None:
            governor.succeed(now, in_flight=key.in_flight)
            if governor.limit >= self._most:
                key.governor = None
                self._look_for_trouble()

    def _leave_alone(self, key: KeyState, error: ApiError, now: float) -> None:
        """A key that the API refuses; the others go on without it."""
        if self.ring.is_lone:
            return
        if isinstance(error, AuthenticationError) or error.metadata.get("limit_source") == _KEY_LIMIT:
            key.out = Pause(now + _DISABLED_S, error)
        elif isinstance(error, InsufficientCreditsError):
            key.out = Pause(now + _CREDIT_S, error)

    def _note_trouble(self, route: Route) -> None:
        """Until when requests have to be looked at closely, now that one has failed."""
        self.troubled_until = max(
            self.troubled_until,
            self._trouble_of_gate(route.gate),
            self._trouble_of_key(route.key),
            self._trouble_of_free(),
        )

    def _look_for_trouble(self) -> None:
        """The same anew, when something is over that had no end."""
        gates = map(self._trouble_of_gate, self.gates.values())
        keys = map(self._trouble_of_key, self.ring)
        self.troubled_until = max(self._trouble_of_free(), *gates, *keys)

    def _trouble_of_gate(self, gate: ModelGate) -> float:
        return _until(gate.pause) if gate.breaker.is_closed else math.inf

    def _trouble_of_key(self, key: KeyState) -> float:
        if key.governor is not None:
            return math.inf
        return max(_until(key.pause), _until(key.out), _until(key.free_latch))

    def _trouble_of_free(self) -> float:
        return _until(self._free.pause) if self._free.meter is None else math.inf


def _until(pause: Pause | None) -> float:
    return -math.inf if pause is None else pause.until


def _later(old: Pause | None, new: Pause) -> Pause:
    """The one that ends last: a refusal without a hint says nothing against the wait that another one asked for."""
    return old if old is not None and old.until > new.until else new


def _hold_of(pause: Pause, by: str, *, is_for_all: bool = False) -> Hold:
    return Hold(pause.until, by, is_for_all=is_for_all, error=pause.error, is_latch=pause.is_latch)


def _together(holds: list[Hold], *, is_choice: bool) -> Hold:
    """What keeps a request from every key: it ends with the first of them, and refuses only if all do.

    Without a choice, they are those of the one key that the request can be sent with, and keep no other key's.
    """
    first = min(holds, key=lambda hold: (hold.is_latch, hold.until))
    if is_choice and all(hold.is_for_all for hold in holds):
        return first
    is_of_key = any(hold.is_for_all or hold.is_of_key for hold in holds)
    if (first.is_for_all, first.is_of_key) == (False, is_of_key):
        return first
    return msgspec.structs.replace(first, is_for_all=False, is_of_key=is_of_key)


def _again(error: ApiError, retry_after_s: float | None) -> ApiError:
    """The error of an earlier answer, for a request that was not sent because of it."""
    return type(error)(
        error.message,
        status=error.status,
        code=error.code,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s if retry_after_s is None else retry_after_s,
    )


def _is_models_fault(error: GorouterError) -> bool:
    """Whether a failure is one of the model and its providers, and not of the request, the key or the network."""
    if isinstance(error, ProviderError):
        return classify(error) in {"failed", "ambiguous"} or error.status in {503, 529} or error.code in {503, 529}
    return isinstance(error, DecodeError) or classify(error) == "ambiguous"
