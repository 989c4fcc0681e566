"""`RedisLimits`: the counts of limits and budgets in a Redis, for all processes that have the same keys and budgets."""

from __future__ import annotations

import hashlib
import logging
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal, Self, cast

import trio
from msgspec import Struct

from ..errors import ConfigError
from ..stores.redis_server import inspect_server, inspect_through
from ..transport.resp_client import RedisClient, RedisExecutor, RedisScript
from .shared import MoneyGrant, RateGrant, SlotGrant

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence
    from types import TracebackType

    from ..network import TlsConfig
    from ..transport.resp import Argument, Reply
    from .budget import BudgetKind
    from .shared import MoneyAsk, RateAsk, SlotAsk

__all__ = ["RedisLimits", "SharedBudget"]

# Who spends renews what it has several times a second; who has not spent for two seconds has nothing at hand.
_LOST_AFTER_S: Final = (2.0, 30.0)
_NANO: Final = Decimal(10) ** 9
_LOG = logging.getLogger("gorouter_trio.shared")


def _script(source: str) -> RedisScript:
    return RedisScript(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


# Microseconds of the server's clock. The due time of a meter is what `limiter.Gcra` calls so.
_RATE: Final = _script(
    """
local interval, tolerance, horizon = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local owed, first, size, count = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local due = (tonumber(redis.call('GET', KEYS[1])) or 0) + owed * interval
local start = math.max(due, now - tolerance)
local at, given, amount = start, 0, first
while given < count and at <= now + horizon do
  given, at, amount = given + 1, at + amount * interval, size
end
if given > 0 then due = at end
local keep = math.ceil(math.max(due - now, 0) / 1000) + 120000
redis.call('SET', KEYS[1], string.format('%.0f', due), 'PX', string.format('%.0f', keep))
return {given, string.format('%.0f', start - now)}
"""
)

# One field a holder: "<places> <wanted> <until, ms>".
_SLOTS: Final = _script(
    """
local me, in_use, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local most, ttl = tonumber(ARGV[4]), tonumber(ARGV[5])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local all, held, waiting, holders = redis.call('HGETALL', KEYS[1]), 0, 0, 1
for at = 1, #all, 2 do
  local places, wants, till = string.match(all[at + 1], '^(%d+) (%d+) (%d+)$')
  if all[at] ~= me then
    if tonumber(till) < now then
      redis.call('HDEL', KEYS[1], all[at])
    else
      held = held + places
      if tonumber(places) > 0 or tonumber(wants) > 0 then holders = holders + 1 end
      if tonumber(wants) > tonumber(places) then waiting = 1 end
    end
  end
end
local given = math.min(wanted, most - held)
if waiting == 1 then given = math.min(given, math.max(math.floor(most / holders), 1)) end
given = math.max(given, 0)
if given == 0 and wanted == 0 then
  redis.call('HDEL', KEYS[1], me)
else
  -- Those in flight are so, whatever was given.
  redis.call('HSET', KEYS[1], me, math.max(given, in_use) .. ' ' .. wanted .. ' ' .. string.format('%.0f', now + ttl))
  redis.call('PEXPIRE', KEYS[1], ttl * 4)
end
return {given, waiting}
"""
)

# `spent` and `assumed`, and a field a holder: "<at hand> <spent so far> <until, ms>", in billionths of a USD. A holder
# that is lost keeps its field for a day, with nothing at hand: should it come back, it is known what it has told.
_MONEY: Final = _script(
    """
local me, told, wanted, limit = 'h:' .. ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local ttl, lost, day = tonumber(ARGV[5]), ARGV[6], 86400000
local function whole(number) return string.format('%.0f', number) end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local all, spent, assumed, others, mine, before = redis.call('HGETALL', KEYS[1]), 0, 0, 0, 0, 0
for at = 1, #all, 2 do
  if all[at] == 'spent' then spent = spent + all[at + 1] end
  if all[at] == 'assumed' then assumed = assumed + all[at + 1] end
  local hand, so_far, till = string.match(all[at + 1], '^(%d+) (%d+) (%d+)$')
  if hand then
    hand, so_far, till = tonumber(hand), tonumber(so_far), tonumber(till)
    if till < now and hand > 0 then
      if lost == 'spent' then spent, assumed = spent + hand, assumed + hand end
      hand = 0
      redis.call('HSET', KEYS[1], all[at], '0 ' .. whole(so_far) .. ' ' .. whole(till))
    end
    if all[at] == me then
      mine, before = hand, so_far
    elseif till + day < now then redis.call('HDEL', KEYS[1], all[at])
    else others = others + hand end
  end
end
local delta = math.max(told - before, 0)
spent, mine = spent + delta, math.max(mine - delta, 0)
local free = limit - spent - others - mine
if wanted > mine then mine = mine + math.min(wanted - mine, math.max(free, 0)) else mine = wanted end
if mine < tonumber(ARGV[7]) then mine = math.min(mine, tonumber(ARGV[8])) end
redis.call('HSET', KEYS[1], 'spent', whole(spent), 'assumed', whole(assumed), me,
  whole(mine) .. ' ' .. whole(math.max(told, before)) .. ' ' .. whole(now + ttl))
return {whole(mine), whole(spent), whole(assumed)}
"""
)

# The same without a change: what was spent, and assumed, with what lost holders had at hand; what others have there.
_LOOK: Final = _script(
    """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local all, spent, assumed, held = redis.call('HGETALL', KEYS[1]), 0, 0, 0
if #all == 0 then return {} end
for at = 1, #all, 2 do
  if all[at] == 'spent' then spent = spent + all[at + 1] end
  if all[at] == 'assumed' then assumed = assumed + all[at + 1] end
  local hand, till = string.match(all[at + 1], '^(%d+) %d+ (%d+)$')
  if hand and tonumber(till) >= now then held = held + hand
  elseif hand and ARGV[1] == 'spent' then spent, assumed = spent + hand, assumed + hand end
end
if spent + assumed + held == 0 then return {} end
local function whole(number) return string.format('%.0f', number) end
return {whole(spent), whole(assumed), whole(held)}
"""
)

# Who lives goes on telling what it spent since its own beginning, so what it has told stays; what it has at hand, too.
_FORGET: Final = _script(
    """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local all, was_used = redis.call('HGETALL', KEYS[1]), 0
for at = 1, #all, 2 do
  local hand, so_far, till = string.match(all[at + 1], '^(%d+) (%d+) (%d+)$')
  if hand and tonumber(hand) > 0 and tonumber(till) < now then
    was_used = 1
    redis.call('HSET', KEYS[1], all[at], '0 ' .. so_far .. ' ' .. till)
  elseif not hand and all[at + 1] ~= '0' then was_used = 1 end
end
if #all > 0 then redis.call('HSET', KEYS[1], 'spent', '0', 'assumed', '0') end
return was_used
"""
)


class SharedBudget(Struct, frozen=True, kw_only=True):
    """What all processes together made of a budget, in USD.

    `assumed_usd` is the part of `spent_usd` that processes had at hand when they died: requests of theirs may have been
    charged. `held_usd` is what living ones have at hand, for requests in flight and the next few.
    """

    spent_usd: Decimal
    assumed_usd: Decimal
    held_usd: Decimal


class RedisLimits:
    """Limits and budgets that all clients with the same `prefix` share: `open_client(shared=RedisLimits("redis://..."))`.

    `client` is a URL, a `RedisClient`, or any object with `async def execute(*args)`; what was given as an object stays
    its maker's to close. The limits are those of each client's settings, which must be the same everywhere. Keys of the
    API are told apart by a hash of them.

    `lost` says what becomes of the money that a process had at hand when it died: "spent", because requests of its may
    have been charged, or "free" after half a minute, with the budget overrun if they were. `tls` and `timeout_s` are
    for a URL. What the server keeps over a restart of its own is for its settings to say: see `docs/redis.md`.
    """

    def __init__(
        self,
        client: str | RedisClient | RedisExecutor,
        *,
        prefix: str = "gorouter",
        lost: Literal["spent", "free"] = "spent",
        lost_after_s: float = 30.0,
        timeout_s: float = 5.0,
        tls: TlsConfig | ssl.SSLContext | None = None,
    ) -> None:
        _check_prefix(prefix)
        # Not in a set: what is given need not be hashable.
        if lost not in ("spent", "free"):
            raise ConfigError(f"lost: must be 'spent' or 'free', not {lost!r}")
        _check_lost_after_s(lost_after_s)
        if not isinstance(client, str) and not callable(getattr(client, "execute", None)):
            raise ConfigError(f"client: must be a URL or have execute(*args), not a {type(client).__name__}")
        self._owns_client = isinstance(client, str)
        self._client: RedisClient | RedisExecutor = (
            RedisClient(client, timeout_s=timeout_s, tls=tls) if isinstance(client, str) else client
        )
        self._prefix = prefix
        self._lost = lost
        self._lost_after_s = lost_after_s
        self._is_inspected = False

    def __repr__(self) -> str:
        return f"<RedisLimits on {self._client!r}, prefix {self._prefix!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def take_rate(self, name: str, ask: RateAsk) -> RateGrant:
        """Give turns of a rate."""
        micro = 1e6
        args: tuple[Argument, ...] = (
            repr(ask.interval_s * micro),
            repr(ask.tolerance_s * micro),
            repr(ask.horizon_s * micro),
            repr(ask.owed),
            repr(float(ask.first)),
            repr(float(ask.size)),
            ask.count,
        )
        given, first_in = cast("tuple[int, bytes]", await self._run(_RATE, f"rate:{name}", args))
        return RateGrant(given, int(first_in) / micro)

    async def take_slots(self, name: str, ask: SlotAsk) -> SlotGrant:
        """Give or take back places in flight."""
        args: tuple[Argument, ...] = (ask.holder, ask.in_use, ask.wanted, ask.most, round(ask.ttl_s * 1000))
        given, waiting = cast("tuple[int, int]", await self._run(_SLOTS, f"slots:{name}", args))
        return SlotGrant(given, bool(waiting))

    async def take_money(self, name: str, ask: MoneyAsk) -> MoneyGrant:
        """Give or take back money, and note what was spent."""
        args: tuple[Argument, ...] = (
            ask.holder,
            ask.spent_nano,
            ask.wanted_nano,
            ask.limit_nano,
            round(min(ask.ttl_s, self._lost_after_s) * 1000),
            self._lost,
            ask.least_nano,
            ask.held_nano,
        )
        if not self._is_inspected:
            await self._inspect()
        mine, spent, _ = cast("tuple[bytes, bytes, bytes]", await self._run(_MONEY, f"budget:{name}", args))
        return MoneyGrant(int(mine), int(spent))

    async def read_budget(self, kind: BudgetKind, name: str = "") -> SharedBudget | None:
        """What was spent of a budget, and what is at hand; None where nothing is."""
        found = cast("list[bytes]", await self._run(_LOOK, f"budget:{kind}:{name}", (self._lost,)))
        if not found:
            return None
        spent, assumed, held = (Decimal(int(text)) / _NANO for text in found)
        return SharedBudget(spent_usd=spent, assumed_usd=assumed, held_usd=held)

    async def forget_budget(self, kind: BudgetKind, name: str = "") -> bool:
        """Begin a budget anew, as for the next month: what was spent is forgotten. False when nothing was.

        What living processes have at hand then is theirs still, and counts as it is spent.
        """
        return bool(await self._run(_FORGET, f"budget:{kind}:{name}", ()))

    async def aclose(self) -> None:
        """Close the connection where it is its own."""
        if self._owns_client and isinstance(self._client, RedisClient):
            await self._client.aclose()
        else:
            await trio.lowlevel.checkpoint()

    async def _inspect(self) -> None:
        """Warn of a server that would forget what was spent."""
        self._is_inspected = True
        client = self._client
        try:
            if isinstance(client, RedisClient):
                report = await inspect_server(client.execute_again, has_ttl=False)
            else:
                report = await inspect_through(client.execute, has_ttl=False)
        except BaseException:
            self._is_inspected = False
            raise
        for warning in report.warnings:
            _LOG.warning("%r, which keeps budgets: %s", self._client, warning)

    async def _run(self, script: RedisScript, name: str, args: Sequence[Argument]) -> Reply:
        key = f"{{{self._prefix}}}:{name}"
        client = self._client
        if isinstance(client, RedisClient):
            return await client.evaluate(script, keys=(key,), args=args)
        return await client.execute("EVAL", script.source, 1, key, *args)


def _check_prefix(prefix: object) -> None:
    if not isinstance(prefix, str) or not prefix or "{" in prefix or "}" in prefix or not prefix.isprintable():
        raise ConfigError("prefix: must be a printable text without braces that is not empty")


def _check_lost_after_s(seconds: object) -> None:
    least_s, most_s = _LOST_AFTER_S
    if not isinstance(seconds, (int, float)) or not least_s <= seconds <= most_s:
        raise ConfigError(f"lost_after_s: must be from 2 to 30, not {seconds!r}")
