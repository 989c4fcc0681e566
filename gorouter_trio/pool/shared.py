"""Limits and budgets that several processes keep together: each leases parts of them ahead, and uses those by itself.

Theory of operation. A backend has the counts; a request never waits for it. What a process may do it has at hand, as a
*stock*, which one task keeps filled: turns of a rate with the times from which they may be taken, places in flight,
money. The limits of the pool and the accounts of the budget look at the stock as they would look at a count of their
own; where it does not suffice they say so, and what waits for it is looked at again when more is there.

A rate is handed out as turns in the near future, each at the time at which the generic cell rate algorithm has it. So
it does not matter who takes a turn, and together they are as even as those of one process. A turn that was not taken
when it is a little old goes back.

Whatever a process has, it has for a time, and renews it. What a process that has died had in flight others may use
when that is over. Its money nobody can know about: by default it counts as spent, like any charge that stays unknown.

When the backend cannot be reached, what is at hand can be used up; then requests wait, until their deadlines. Places
in flight are at hand for as long as they were given: after that others may have them.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from contextlib import asynccontextmanager
from decimal import ROUND_CEILING, Decimal
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

import trio
from msgspec import Struct

from .._contain import contain
from ..errors import ConfigError, StoreError
from .money import ZERO, add_usd, subtract_usd

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Callable

    from ..config import RateLimits
    from .admission import Route
    from .budget import Account
    from .budget_gate import BudgetGate
    from .keys import KeyState

__all__ = [
    "MoneyAsk",
    "MoneyGrant",
    "RateAsk",
    "RateGrant",
    "SharedAccount",
    "SharedBackend",
    "SharedLimits",
    "SharedMeter",
    "SharedSlots",
    "SharedStatistics",
    "SlotAsk",
    "SlotGrant",
    "open_shared_limits",
]

_LOG = logging.getLogger("gorouter_trio.shared")
_WINDOW_S = 60.0
_HORIZON_S = 0.5
_LEAST_STALE_S = 0.02
_SPACING_S = 0.05
_RETRY_S = 0.5
_MOST_PIECES = 4096
_TINY = 1e-9
_SLOTS_TTL_S = 15.0
_MONEY_TTL_S = 30.0
_RENEWALS = 3
_IDLE_S = 2.0
_SHARE = 8
_AHEAD = 4
_CLOSE_S = 2.0
# What a backend may take for one answer; it holds up the renewal of everything else.
_ANSWER_S = 5.0
_NANO = Decimal(10) ** 9


class RateAsk(Struct, frozen=True, kw_only=True):
    """Turns of a rate: `count` of them, the first of `first` units and the others of `size`.

    A unit takes `interval_s` at the rate; `tolerance_s` is how far a pause lets turns be ahead, `horizon_s` how far
    ahead turns are given. `owed` units were used beyond what was given, or are given back if it is below 0.
    """

    interval_s: float
    tolerance_s: float
    horizon_s: float
    owed: float
    first: float
    size: float
    count: int


class RateGrant(Struct, frozen=True):
    """How many turns were given, and in how many seconds from the answer the first is; below 0 it was before that."""

    count: int
    first_in_s: float


class SlotAsk(Struct, frozen=True, kw_only=True):
    """Places for requests in flight, of `most` altogether: `in_use` are, `wanted` would be with those that wait."""

    holder: str
    in_use: int
    wanted: int
    most: int
    ttl_s: float


class SlotGrant(Struct, frozen=True):
    """How many places the holder has now, and whether another holder waits for some."""

    count: int
    others_wait: bool


class MoneyAsk(Struct, frozen=True, kw_only=True):
    """Money of a budget of `limit_nano` (billionths of a USD): `spent_nano` was spent so far by this holder, who wants
    to have `wanted_nano` at hand now, or gives back what is more. Less than `least_nano` is no use: then only what is
    held for requests in flight, `held_nano`, is kept.
    """

    holder: str
    spent_nano: int
    wanted_nano: int
    held_nano: int
    least_nano: int
    limit_nano: int
    ttl_s: float


class MoneyGrant(Struct, frozen=True):
    """What the holder has at hand now, and what was spent by all, in billionths of a USD."""

    at_hand_nano: int
    spent_nano: int


class SharedBackend(Protocol):
    """Where the counts are. What a call raises is noted; it is made again later, and may have counted or not."""

    async def take_rate(self, name: str, ask: RateAsk) -> RateGrant:
        """Give turns of a rate."""

    async def take_slots(self, name: str, ask: SlotAsk) -> SlotGrant:
        """Give or take back places in flight."""

    async def take_money(self, name: str, ask: MoneyAsk) -> MoneyGrant:
        """Give or take back money, and note what was spent."""


class SharedStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot: how often the backend was asked, how often in vain, and what it said last when it was."""

    asked: int
    failed: int
    failure: str


class _Part(Protocol):
    """One count that is shared."""

    def due_at(self) -> float:
        """When the backend should be asked (trio clock)."""

    async def sync(self, backend: SharedBackend) -> None:
        """Ask it."""


class SharedMeter:
    """A rate a minute, as `limiter.Gcra` is one, whose turns come from the backend. Times are of the trio clock."""

    __slots__ = (
        "_average",
        "_horizon_s",
        "_interval_s",
        "_is_short",
        "_name",
        "_next_at",
        "_now",
        "_owed",
        "_queued",
        "_short",
        "_stale_s",
        "_stock",
        "_taken",
        "_tolerance_s",
        "_wake",
        "per_minute",
    )

    def __init__(
        self,
        name: str,
        per_minute: float,
        *,
        rates: RateLimits,
        now: Callable[[], float],
        queued: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self.per_minute = per_minute
        self._name = name
        self._interval_s = _WINDOW_S / (per_minute * (1.0 - rates.margin))
        self._tolerance_s = _WINDOW_S * rates.burst
        # What is taken late comes too close to what is behind it: the margin has to make up for that.
        self._stale_s = max(_LEAST_STALE_S, _WINDOW_S * max(0.0, rates.margin - rates.burst) * 0.4)
        self._horizon_s = max(_HORIZON_S, 2 * self._interval_s)
        self._now, self._queued, self._wake = now, queued, wake
        self._stock: deque[list[float]] = deque()
        self._owed = self._short = 0.0
        self._is_short = False
        self._taken = 0
        self._average = 1.0
        self._next_at = -math.inf

    def __repr__(self) -> str:
        return f"<SharedMeter {self._name!r}: {len(self._stock)} turns at hand>"

    def ready_at(self, amount: float) -> float:
        """From when on `amount` may be taken; infinity where more has to be had first."""
        missing = amount
        for at, piece in self._stock:
            missing -= piece
            if missing <= _TINY:
                return at
        self._short = max(self._short, missing)
        if not self._is_short:
            self._is_short = True
            self._wake()
        return math.inf

    def take(self, amount: float, now: float) -> None:
        """Take it, ready or not."""
        self._taken += 1
        self._average += (amount - self._average) / 16
        stock = self._stock
        while amount > _TINY and stock and stock[0][0] <= now:
            used = min(amount, stock[0][1])
            amount -= used
            stock[0][1] -= used
            if stock[0][1] <= _TINY:
                stock.popleft()
        self._owed += amount if amount > _TINY else 0.0
        if len(stock) < self._taken // 2:
            self._wake()

    def adjust(self, amount: float) -> None:
        """What was taken turned out to be more by `amount`, or less if it is negative."""
        self._owed += amount

    def available(self, now: float) -> float:
        """What may be taken at once now, in its unit."""
        return sum(piece for at, piece in self._stock if at <= now)

    def is_full(self, now: float) -> bool:
        """Whether all that was ever taken is made up for: the backend alone knows."""
        return False

    def due_at(self) -> float:
        """When the backend should be asked."""
        if self._is_short or len(self._stock) < self._taken // 2:
            return self._next_at
        oldest = self._stock[0][0] + self._stale_s if self._stock else math.inf
        return max(self._next_at, min(oldest, self._next_at + 1.0 if self._owed or self._taken else math.inf))

    async def sync(self, backend: SharedBackend) -> None:
        """Give back what is old, and have more where more is needed."""
        ask = self._ask(self._now())
        self._next_at = self._now() + _SPACING_S
        self._owed -= ask.owed
        try:
            grant = await backend.take_rate(self._name, ask)
        except BaseException:
            self._owed += ask.owed
            raise
        now = self._now()
        end = self._fill(ask, grant, now)
        if grant.count < ask.count:
            # The rate is used up: there is nothing to be had before the horizon has moved on a little.
            self._next_at = max(self._next_at, end - self._horizon_s * 0.75)

    def _ask(self, now: float) -> RateAsk:
        stock = self._stock
        while stock and stock[0][0] + self._stale_s < now:
            self._owed -= stock.popleft()[1]
        is_short, self._is_short = self._is_short, False
        short, self._short = self._short, 0.0
        recent, self._taken = self._taken, 0
        wanted = max(self._queued() if is_short else 0, recent, 1 if is_short else 0) - len(stock)
        if is_short:
            wanted = max(wanted, 1)
        return RateAsk(
            interval_s=self._interval_s,
            tolerance_s=max(0.0, self._tolerance_s - self._interval_s),
            horizon_s=self._horizon_s,
            owed=self._owed,
            first=short if is_short else self._average,
            size=self._average,
            count=min(max(wanted, 0), _MOST_PIECES),
        )

    def _fill(self, ask: RateAsk, grant: RateGrant, now: float) -> float:
        """Put turns into the stock; returns when the next one would be."""
        at, amount = now + grant.first_in_s, ask.first
        for _ in range(grant.count):
            self._stock.append([at, amount])
            at += amount * self._interval_s
            amount = ask.size
        return at


class SharedSlots:
    """How many requests of a key may be in flight here: a part of what all processes may have together."""

    def __init__(
        self,
        name: str,
        key: KeyState,
        *,
        holder: str,
        now: Callable[[], float],
        queued: Callable[[], int],
        wake: Callable[[], None],
    ) -> None:
        self._name = name
        self._key = key
        self._most = key.max_in_flight
        self._holder = holder
        self._now, self._queued, self._wake = now, queued, wake
        self._is_short = False
        self._next_at = -math.inf
        self._renew_at = math.inf
        self._until = -math.inf
        key.max_in_flight = 0
        key.on_full = self._note_full

    def _note_full(self) -> None:
        if not self._is_short:
            self._is_short = True
            self._wake()

    def due_at(self) -> float:
        """When the backend should be asked."""
        if self._is_short:
            return self._next_at
        return max(self._next_at, self._renew_at)

    async def sync(self, backend: SharedBackend) -> None:
        """Have as many as are needed, as far as there are, and give back the others.

        Raises what the backend raises, and `StoreError` when it has not answered by when others may have the places.
        """
        key, now = self._key, self._now()
        is_short, self._is_short = self._is_short, False
        waiting = self._queued() if is_short else 0
        self._next_at = now + _SPACING_S
        ask = SlotAsk(
            holder=self._holder,
            in_use=key.in_flight,
            wanted=key.in_flight + waiting,
            most=self._most,
            ttl_s=_SLOTS_TTL_S,
        )
        grant = await self._take(backend, ask, now)
        key.max_in_flight = grant.count
        # Given when it was asked for at the earliest: counted from the answer on, it would be too long.
        self._until = now + _SLOTS_TTL_S
        # Of others who wait one hears by asking; what ends meanwhile is theirs, up to their part.
        wait_s = _SPACING_S * 2 if grant.others_wait else 1.0 if key.in_flight else _SLOTS_TTL_S / _RENEWALS
        is_idle = not grant.count and not key.in_flight
        self._renew_at = math.inf if is_idle else self._now() + wait_s

    async def _take(self, backend: SharedBackend, ask: SlotAsk, now: float) -> SlotGrant:
        ends_at = self._until if self._until > now else now + _SLOTS_TTL_S
        try:
            with trio.CancelScope(deadline=ends_at):
                return await backend.take_slots(self._name, ask)
            # Nobody has ended it but the deadline.
            raise StoreError("places in flight were not renewed in time", kind="timeout")
        finally:
            if self._now() >= self._until:
                self._key.max_in_flight = 0

    async def close(self, backend: SharedBackend) -> None:
        """Give all back."""
        ask = SlotAsk(holder=self._holder, in_use=0, wanted=0, most=self._most, ttl_s=_SLOTS_TTL_S)
        await backend.take_slots(self._name, ask)


class SharedAccount:
    """One account of the budget, whose limit holds for all processes; here is what they let this one spend."""

    def __init__(
        self, account: Account, *, holder: str, now: Callable[[], float], wake: Callable[[], None], name: str
    ) -> None:
        self._account = account
        self._holder = holder
        self._name = name
        self._now, self._wake = now, wake
        self._before_usd = account.spent_usd
        self._short_usd = self._largest_usd = ZERO
        self._spent_by_all = 0
        self._reported = -1
        self._used_at = self._renew_at = math.inf
        self._next_at = -math.inf
        self._at_hand = 0
        account.share(account.limit_usd, on_short=self._note_short)

    def _note_short(self, usd: Decimal) -> None:
        is_new = not self._short_usd
        self._short_usd = max(self._short_usd, usd)
        if is_new:
            self._wake()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing at hand, and nothing to tell."""
        return not self._at_hand and not self._short_usd and self._reported == self._spent_nano()

    def due_at(self) -> float:
        """When the backend should be asked."""
        if self._short_usd:
            return self._next_at
        return max(self._next_at, self._renew_at)

    async def sync(self, backend: SharedBackend) -> None:
        """Tell what was spent, and have as much at hand as is needed."""
        account, now = self._account, self._now()
        short_usd, self._short_usd = self._short_usd, ZERO
        spent = self._spent_nano()
        if short_usd or spent != self._reported or account.held_usd:
            self._used_at = now
        self._next_at = now + _SPACING_S
        least_usd = add_usd(account.held_usd, short_usd) if short_usd else ZERO
        grant = await self._ask(backend, spent, self._wanted_usd(short_usd), least_usd=least_usd)
        self._at_hand, self._spent_by_all, self._reported = grant.at_hand_nano, grant.spent_nano, spent
        at_hand_usd = Decimal(grant.at_hand_nano) / _NANO
        account.limit_usd = add_usd(self._before_usd, add_usd(Decimal(spent) / _NANO, at_hand_usd))
        account.beyond_usd = subtract_usd(account.total_usd, Decimal(grant.spent_nano) / _NANO)
        account.beyond_usd = max(subtract_usd(account.beyond_usd, at_hand_usd), ZERO)
        is_active = self._now() - self._used_at < _IDLE_S
        self._renew_at = self._now() + (_IDLE_S / 8 if is_active else _MONEY_TTL_S / _RENEWALS)
        if self.is_idle:
            self._renew_at = math.inf

    async def close(self, backend: SharedBackend) -> None:
        """Tell what was spent, and give back what is not; what reservations still hold stays until it is lost."""
        await self._ask(backend, self._spent_nano(), self._account.held_usd)

    async def _ask(
        self, backend: SharedBackend, spent: int, wanted_usd: Decimal, *, least_usd: Decimal = ZERO
    ) -> MoneyGrant:
        ask = MoneyAsk(
            holder=self._holder,
            spent_nano=spent,
            wanted_nano=_nano(wanted_usd),
            held_nano=_nano(self._account.held_usd),
            least_nano=_nano(least_usd),
            limit_nano=_nano(self._account.total_usd),
            ttl_s=_MONEY_TTL_S,
        )
        return await backend.take_money(self._name, ask)

    def _wanted_usd(self, short_usd: Decimal) -> Decimal:
        """What to have at hand: what is held, what is missing, and some more while it is used."""
        held = self._account.held_usd
        if self._now() - self._used_at >= _IDLE_S:
            return held
        self._largest_usd = max(short_usd, self._largest_usd)
        total_left = subtract_usd(self._account.total_usd, Decimal(self._spent_by_all) / _NANO)
        ahead = min(self._largest_usd * _AHEAD, max(total_left, ZERO) / _SHARE)
        return add_usd(held, max(short_usd, ahead))

    def _spent_nano(self) -> int:
        return _nano(subtract_usd(self._account.spent_usd, self._before_usd))


def _nano(usd: Decimal) -> int:
    """Billionths, rounded up: what is told may be more than it was, never less."""
    return int((usd * _NANO).to_integral_value(rounding=ROUND_CEILING))


class SharedLimits:
    """All that a client shares; made by `open_shared_limits`, whose task keeps the stock filled."""

    def __init__(self, backend: SharedBackend, *, holder: str, rng: random.Random) -> None:
        self.backend = backend
        self.holder = holder
        self._rng = rng
        self._now = trio.lowlevel.current_clock().current_time
        self._parts: dict[_Part, None] = {}
        self._accounts: dict[Account, SharedAccount] = {}
        self._slots: list[SharedSlots] = []
        self._wanted = trio.Event()
        self._asked = self._failed = 0
        self._failure = ""
        self._is_down = False
        self._gate: BudgetGate | None = None
        self.on_refill: Callable[[], None] = _do_nothing
        """Called when more may be at hand; set by the pool."""
        self.gates: dict[str, None] = {}
        """The models with limits of their own."""
        self.queued: Callable[[], int] = _none
        """How many requests wait; set by the pool."""

    def __repr__(self) -> str:
        return f"<SharedLimits of {self.holder}: {len(self._parts)} counts>"

    def statistics(self) -> SharedStatistics:
        """A snapshot; cheap."""
        return SharedStatistics(asked=self._asked, failed=self._failed, failure=self._failure)

    # What is shared

    def share_key(self, key: KeyState) -> None:
        """From now on, the limits of this key are those of all processes that have it."""
        key.requests = self._meter(f"{key.fingerprint}:requests", key.rates, key.rates.requests_per_minute)
        key.tokens = self._meter(f"{key.fingerprint}:tokens", key.rates, key.rates.tokens_per_minute)
        if key.rates.max_in_flight is not None:
            slots = SharedSlots(
                f"{key.fingerprint}:flight",
                key,
                holder=self.holder,
                now=self._now,
                queued=lambda: self.queued(),
                wake=self.wake,
            )
            self._slots.append(slots)
            self._parts[slots] = None

    def share_route(self, route: Route) -> None:
        """The same of one model with one key; its places in flight stay each process's own."""
        rates = route.key.rates.models.get(route.gate.name)
        if rates is not None:
            self.gates[route.gate.name] = None
            name = f"{route.key.fingerprint}:{route.gate.name}"
            route.requests = self._meter(f"{name}:requests", rates, rates.requests_per_minute)
            route.tokens = self._meter(f"{name}:tokens", rates, rates.tokens_per_minute)

    def share_budget(self, gate: BudgetGate) -> None:
        """The accounts with a limit, those that are there and those that will be opened, are those of all processes.

        Raises `ConfigError` for a budget that is bound by credits: each process asks for those by itself.
        """
        book = gate.book
        if book.budget.from_credits:
            raise ConfigError("budget.from_credits: cannot be shared; set budget.usd")
        self._gate = gate
        book.on_account = self._share_account
        self._share_account(book.client)

    def _share_account(self, account: Account) -> None:
        if not account.limit_usd.is_finite():
            return
        name = f"{account.kind}:{account.name}"
        shared = SharedAccount(account, holder=self.holder, now=self._now, wake=self.wake, name=name)
        self._accounts[account] = shared
        self._parts[shared] = None

    def _meter(self, name: str, rates: RateLimits, per_minute: float | None) -> SharedMeter | None:
        if per_minute is None:
            return None
        meter = SharedMeter(name, per_minute, rates=rates, now=self._now, queued=lambda: self.queued(), wake=self.wake)
        self._parts[meter] = None
        return meter

    # The task

    def wake(self) -> None:
        """Something is short."""
        self._wanted.set()

    async def run(self) -> None:
        """Keep the stock filled, until cancelled."""
        while True:
            next_at = min((part.due_at() for part in self._parts), default=math.inf)
            with trio.move_on_at(max(next_at, self._now())) if next_at < math.inf else trio.CancelScope():
                await self._wanted.wait()
            self._wanted = trio.Event()
            now = self._now()
            due = [part for part in self._parts if part.due_at() <= now]
            if due:
                await self._sync(due)
                continue
            # Woken for what was asked for just now: a little later, with what the others want by then.
            next_at = min((part.due_at() for part in self._parts), default=math.inf)
            if next_at < now + _RETRY_S:
                await trio.sleep_until(next_at)

    async def _sync(self, parts: list[_Part]) -> None:
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(self._sync_one, part)
        self.on_refill()
        if self._gate is not None:
            self._gate.recheck()
        for account, shared in list(self._accounts.items()):
            if not account.is_open and shared.is_idle:
                del self._accounts[account], self._parts[shared]

    async def _sync_one(self, part: _Part) -> None:
        self._asked += 1
        failed = self._failed
        with trio.move_on_after(_ANSWER_S) as scope:
            await contain(partial(part.sync, self.backend), report=self._note)
        if scope.cancelled_caught:
            self._note(StoreError(f"no answer within {_ANSWER_S:g} s", kind="timeout"))
        if self._failed == failed:
            self._is_down = False
        else:
            await trio.sleep(_RETRY_S * self._rng.uniform(0.5, 1.0))

    def _note(self, error: Exception) -> None:
        self._failed += 1
        if not self._is_down:
            _LOG.warning("shared limits cannot be had, requests may have to wait: %s", error)
        self._is_down = True
        self._failure = str(error)

    async def close(self) -> None:
        """Give back what is at hand."""
        held: list[SharedSlots | SharedAccount] = [*self._slots, *self._accounts.values()]
        for part in held:
            await contain(partial(part.close, self.backend), report=self._note)


def _do_nothing() -> None:
    """Nobody waits for more."""


def _none() -> Literal[0]:
    return 0


@asynccontextmanager
async def open_shared_limits(
    backend: SharedBackend | None, *, holder: str, rng: random.Random
) -> AsyncIterator[SharedLimits | None]:
    """What a client shares over `backend`; None without one. Leaving gives back what is at hand, within 2 s."""
    if backend is None:
        yield None
        return
    shared = SharedLimits(backend, holder=holder, rng=rng)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shared.run)
        try:
            yield shared
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                await shared.close()
