"""Rate limits: how many calls each caller may still make, within a bounded memory.

Theory of operation. A bucket belongs to one caller and one *lane* (a level of rules and a tool). It keeps when its
calls were, as a few groups of a time and a count. A call is allowed while the groups younger than the period hold
fewer than `limit` calls. While groups are to be had every call has its own, and the window slides exactly; when they
run out, two neighbours become one *at the later time*, those for which it matters least. So a call may count for
longer than it should, never shorter: **in every window of the period's length there are at most `limit` calls**,
whatever is merged.

A bucket takes at most 200 bytes once there are more than a few thousand; before, it may hold enough groups to be
exact for limits up to 64. Idle buckets are dropped, a part of the table at a time. A full table refuses new callers:
forgetting an active one would let it through too often.

Times are whole milliseconds of the clock that the caller reads, rounded so that nothing is allowed early.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from math import ceil, floor
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .rules import Principal, RateLimit

__all__ = ["Lane", "Level", "LimiterStatistics", "RateLimiter", "caller_of", "caller_of_source"]

_SHARDS = 256
_SWEEP_EVERY_S = 60.0 / _SHARDS
_SWEEPS_A_CALL = 4
# Eight bytes a group. With five, key, state and their place in a table come to at most 200 bytes.
_FEW_GROUPS = 5
_MANY_GROUPS = 64
_ROOMY_BUCKETS = 4_096
_COUNT_BITS = 20
_COUNT_MASK = (1 << _COUNT_BITS) - 1


class Lane(NamedTuple):
    """What a limit is counted by, beside the caller: the rule that sets it, and the tool."""

    level: str
    tool: str


class Level(NamedTuple):
    """A limit that applies to a call."""

    lane: Lane
    limit: RateLimit


class LimiterStatistics(Struct, frozen=True, kw_only=True):
    """How much a limiter remembers, and how often it refused."""

    buckets: int
    max_buckets: int
    refused: int
    refused_for_room: int


def caller_of(principal: Principal | None) -> bytes:
    """The caller in a form that no two share: nobody is not a principal called so, and tenants do not mix."""
    if principal is None:
        return b"nobody"
    tenant, name = principal.tenant.encode(), principal.id.encode()
    return b"principal:%d:%b:%b" % (len(tenant), tenant, name)


def caller_of_source(source: str) -> bytes:
    """Where an attempt came from, in the same form."""
    return b"source:" + source.encode("utf-8", "surrogatepass")


class RateLimiter:
    """Sliding windows for any number of callers. Not for several threads; `now` is a clock that never goes back."""

    def __init__(self, *, max_buckets: int = 1_000_000) -> None:
        self.max_buckets = max_buckets
        self._shards: list[dict[bytes, bytes]] = [{} for _ in range(_SHARDS)]
        # Where a caller may have buckets, and until when: what a reset has to look at.
        self._lanes: dict[Lane, int] = {}
        self._lanes_worth_a_look = 1_024
        self._key = secrets.token_bytes(16)
        self._buckets = 0
        self._hand = 0
        self._next_sweep: float | None = None
        self._refused = 0
        self._refused_for_room = 0

    def take(self, caller: bytes, levels: Iterable[Level], *, now: float) -> float | None:
        """Count one call at every level, or at none of them.

        Gives None when the call is counted, else the seconds until all levels have room for one.
        """
        self._sweep_some(now)
        found = [(level, self._key_of(caller, level.lane)) for level in levels]
        wait_s = max((self._wait(key, level.limit, now) for level, key in found), default=0.0)
        if wait_s > 0:
            self._refused += 1
            return wait_s
        new = sum(key not in self._shards[key[0]] for _, key in found)
        if self._buckets + new > self.max_buckets:
            self._refused_for_room += 1
            return max(level.limit.period_s for level, _ in found)
        for level, key in found:
            self._count(key, level, now)
        return None

    def wait_s(self, caller: bytes, level: Level, *, now: float) -> float:
        """Seconds until `caller` has room for a call at `level`, 0 when there is some; counts nothing."""
        return self._wait(self._key_of(caller, level.lane), level.limit, now)

    def reset(self, caller: bytes | None = None) -> None:
        """Forget the calls of one caller, or of all."""
        if caller is None:
            self._shards = [{} for _ in range(_SHARDS)]
            self._lanes.clear()
            self._buckets = 0
            return
        for lane in self._lanes:
            key = self._key_of(caller, lane)
            self._buckets -= self._shards[key[0]].pop(key, None) is not None

    def sweep(self, *, now: float) -> None:
        """Drop every idle bucket at once. Calls drop them by and by, so this is never needed."""
        for index in range(_SHARDS):
            self._sweep_shard(index, floor(now * 1000))

    def statistics(self) -> LimiterStatistics:
        """What is remembered now."""
        return LimiterStatistics(
            buckets=self._buckets,
            max_buckets=self.max_buckets,
            refused=self._refused,
            refused_for_room=self._refused_for_room,
        )

    def _key_of(self, caller: bytes, lane: Lane) -> bytes:
        """A keyed digest of 120 bits: as long for every caller, and nobody can look for two with the same one."""
        level, tool = lane.level.encode("utf-8", "surrogatepass"), lane.tool.encode("utf-8", "surrogatepass")
        text = b"%d:%b%d:%b%b" % (len(level), level, len(tool), tool, caller)
        return hashlib.blake2b(text, digest_size=15, key=self._key).digest()

    def _wait(self, key: bytes, limit: RateLimit, now: float) -> float:
        state = self._shards[key[0]].get(key)
        if state is None:
            return 0.0
        period_ms = ceil(limit.period_s * 1000)
        groups = _young(state, floor(now * 1000) - period_ms)
        excess = sum(group & _COUNT_MASK for group in groups) - limit.limit
        if excess < 0:
            return 0.0
        # The oldest groups have to go until the count is below the limit; the last of them says when that is.
        last = next(group for group in groups if (excess := excess - (group & _COUNT_MASK)) < 0)
        return max(((last >> _COUNT_BITS) + period_ms + 1) / 1000 - now, 0.001)

    def _count(self, key: bytes, level: Level, now: float) -> None:
        shard = self._shards[key[0]]
        state = shard.get(key)
        period_ms, at_ms = ceil(level.limit.period_s * 1000), ceil(now * 1000)
        self._buckets += state is None
        if state is not None:
            # Two tools of one name may declare different periods: what the longer one counts is kept.
            period_ms = max(period_ms, _period_ms(state))
        groups = [] if state is None else _young(state, floor(now * 1000) - period_ms)
        _add(groups, at_ms)
        _merge(groups, _FEW_GROUPS if self._buckets > _ROOMY_BUCKETS else _MANY_GROUPS)
        shard[key] = struct.pack(f"<I{len(groups)}q", period_ms, *groups)
        self._note_lane(level.lane, at_ms + period_ms, floor(now * 1000))

    def _note_lane(self, lane: Lane, until_ms: int, now_ms: int) -> None:
        """Remember the lane as long as it may have a bucket, so there are never more of them than buckets."""
        self._lanes[lane] = max(until_ms, self._lanes.get(lane, 0))
        if len(self._lanes) > self._lanes_worth_a_look:
            self._lanes = {lane: until for lane, until in self._lanes.items() if until > now_ms}
            self._lanes_worth_a_look = max(1_024, 2 * len(self._lanes))

    def _sweep_some(self, now: float) -> None:
        """Look at the next parts of the table that are due, a few a call at most."""
        if self._next_sweep is None:
            self._next_sweep = now + _SWEEP_EVERY_S
        for _ in range(_SWEEPS_A_CALL):
            if now < self._next_sweep:
                return
            self._next_sweep = max(self._next_sweep + _SWEEP_EVERY_S, now - _SHARDS * _SWEEP_EVERY_S)
            self._hand = (self._hand + 1) % _SHARDS
            self._sweep_shard(self._hand, floor(now * 1000))

    def _sweep_shard(self, index: int, now_ms: int) -> None:
        shard = self._shards[index]
        living = {key: state for key, state in shard.items() if _expiry_ms(state) > now_ms}
        if len(living) < len(shard):
            self._buckets -= len(shard) - len(living)
            self._shards[index] = living


# A state is the period in milliseconds, in four bytes, then its groups, oldest first: eight bytes each, the time above
# and the count below.


def _period_ms(state: bytes) -> int:
    return int.from_bytes(state[:4], "little")


def _expiry_ms(state: bytes) -> int:
    return (int.from_bytes(state[-8:], "little") >> _COUNT_BITS) + _period_ms(state)


def _young(state: bytes, after_ms: int) -> list[int]:
    """The groups whose time is after `after_ms`."""
    groups = struct.unpack(f"<I{len(state) // 8}q", state)[1:]
    return [group for group in groups if group >> _COUNT_BITS > after_ms]


def _add(groups: list[int], at_ms: int) -> None:
    """One call at `at_ms`; one that came with no later clock than the last joins it."""
    if groups and groups[-1] >> _COUNT_BITS >= at_ms:
        groups[-1] = _joined(groups[-1], 1)
    else:
        groups.append(at_ms << _COUNT_BITS | 1)


def _merge(groups: list[int], room: int) -> None:
    """Make two neighbours one, at the later time, until there are no more than `room`."""
    while len(groups) > room:
        costs = [
            ((later >> _COUNT_BITS) - (groups[i] >> _COUNT_BITS)) * (groups[i] & _COUNT_MASK)
            for i, later in enumerate(groups[1:])
        ]
        nearest = costs.index(min(costs))
        groups[nearest + 1] = _joined(groups[nearest + 1], groups[nearest] & _COUNT_MASK)
        del groups[nearest]


def _joined(group: int, count: int) -> int:
    """A count stops at its largest value, which is above every limit."""
    return group + min(count, _COUNT_MASK - (group & _COUNT_MASK))
