"""Questions about stored histories: what was asked, of which models, at what cost, and when.

Everything is added up from the entries themselves, in exact decimals, one session at a time, so that a store of any
size can be asked. Nothing here writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_log_entry, decode_roles
from ..wire.journal import TurnAbandoned, TurnAnswered, TurnStarted
from ..wire.result import CallRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from ..abc import HistoryStore

__all__ = ["Bucket", "CostPoint", "HistoryAnalyzer", "HistoryFilter", "HistoryStatistics", "ModelUsage"]

Bucket = Literal["minute", "hour", "day"]
"""The width of a point in time, in UTC."""

_WIDTHS_S: dict[Bucket, int] = {"minute": 60, "hour": 3_600, "day": 86_400}
_PAGE = 500
_FREE = Decimal(0)


class HistoryFilter(Struct, frozen=True, kw_only=True):
    """Which entries count: all of these must hold.

    `start_s` (inclusive) and `end_s` (exclusive) are wall-clock seconds since the epoch. `models` are the
    names that answered. `min_cost_usd` counts calls that are known to have cost at least that. With a filter
    on models, cost or finish reasons only entries that a call has made count.
    """

    start_s: float | None = None
    end_s: float | None = None
    models: Collection[str] = frozenset()
    roles: Collection[str] = frozenset()
    finish_reasons: Collection[str] = frozenset()
    min_cost_usd: Decimal | None = None

    def __post_init__(self) -> None:
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise ConfigError("end_s: must be after start_s")
        for name in ("models", "roles", "finish_reasons"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name}: must be a set of names, not the text {value!r}")
            msgspec.structs.force_setattr(self, name, frozenset(value))

    def admits(self, entry: _Entry) -> bool:
        """Whether `entry` counts."""
        is_in_time = (self.start_s is None or entry.at_s >= self.start_s) and (
            self.end_s is None or entry.at_s < self.end_s
        )
        return is_in_time and (not self.roles or entry.role in self.roles) and self._admits_call(entry.call)

    def _admits_call(self, call: CallRecord | None) -> bool:
        if not (self.models or self.finish_reasons or self.min_cost_usd is not None):
            return True
        return (
            call is not None
            and (not self.models or call.model in self.models)
            and (not self.finish_reasons or call.finish_reason in self.finish_reasons)
            and (self.min_cost_usd is None or (call.cost is not None and call.cost >= self.min_cost_usd))
        )


class ModelUsage(Struct, kw_only=True):
    """What one model was used for. `cost_usd` adds up the calls whose cost is known; `unpriced` counts the others."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = _FREE
    unpriced: int = 0

    def add(self, call: CallRecord) -> None:
        """Count one call."""
        self.calls += 1
        usage = call.usage
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens or 0
            self.completion_tokens += usage.completion_tokens or 0
            self.total_tokens += usage.total_tokens or (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
        if call.cost is None:
            self.unpriced += 1
        else:
            self.cost_usd += call.cost


class HistoryStatistics(ModelUsage, kw_only=True):
    """What histories add up to, over all models and by model.

    `entries` counts the messages that the filter admitted, of `total_entries`; `unreadable` those that this version
    cannot read. Turns are counted apart: `abandoned` ended without an answer, `in_doubt` may have been billed or have
    no end at all. `first_at_s` and `last_at_s` are the times of the first and the last entry that was admitted.
    """

    sessions: int = 0
    entries: int = 0
    total_entries: int = 0
    unreadable: int = 0
    abandoned: int = 0
    in_doubt: int = 0
    by_model: dict[str, ModelUsage] = msgspec.field(default_factory=dict)
    finish_reasons: dict[str, int] = msgspec.field(default_factory=dict)
    first_at_s: float | None = None
    last_at_s: float | None = None


class CostPoint(Struct, kw_only=True):
    """The calls that ended in one stretch of time, which begins `at_s` (wall-clock seconds since the epoch)."""

    at_s: float
    calls: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = _FREE
    unpriced: int = 0


class _Entry(Struct, frozen=True):
    role: str
    at_s: float
    call: CallRecord | None = None


class _Log:
    """One session's log, read entry by entry."""

    def __init__(self) -> None:
        self.unreadable = 0
        self.abandoned = 0
        self.in_doubt = 0

    def read(self, encoded: list[bytes]) -> Iterator[_Entry]:
        """The messages of the answered turns, in order."""
        started: TurnStarted | None = None
        for data in encoded:
            try:
                entry = decode_log_entry(data)
                found = _messages_of(entry, started) if isinstance(entry, TurnAnswered) else ()
            except DecodeError:
                self.unreadable += 1
                continue
            yield from found
            if isinstance(entry, TurnStarted):
                started = entry
                continue
            if isinstance(entry, TurnAbandoned):
                self.abandoned += not entry.maybe_billed
                self.in_doubt += entry.maybe_billed
            if isinstance(entry, (TurnAnswered, TurnAbandoned)):
                started = None
        self.in_doubt += started is not None


def _messages_of(entry: TurnAnswered, started: TurnStarted | None) -> list[_Entry]:
    asked = decode_roles(bytes(started.messages)) if started is not None and started.turn_id == entry.turn_id else []
    (role,) = decode_roles(b"[%b]" % bytes(entry.message))
    at_s = 0.0 if started is None else started.at_s
    return [*(_Entry(asked_as, at_s) for asked_as in asked), _Entry(role, entry.call.finished_at_s, entry.call)]


class HistoryAnalyzer:
    """Reads the histories in `store`: of one session (`key`), of those whose keys begin with `prefix`, or of all.

    Raises what the store raises. A session that changes meanwhile is read as it is when its turn comes.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store

    async def keys(self, prefix: str = "") -> list[str]:
        """The keys of all sessions that begin with `prefix`, in code-point order."""
        found: list[str] = []
        while page := await self._store.list_keys(prefix, after=found[-1] if found else "", limit=_PAGE):
            found += page
        return found

    async def statistics(
        self, *, key: str | None = None, prefix: str = "", only: HistoryFilter | None = None
    ) -> HistoryStatistics:
        """Calls, tokens, cost, models, finish reasons and times."""
        total = HistoryStatistics()
        reasons: Counter[str] = Counter()
        admits = (only or HistoryFilter()).admits
        async for log, entries in self._logs(key, prefix):
            total.sessions += 1
            for entry in log.read(entries):
                total.total_entries += 1
                if admits(entry):
                    _count(total, entry, reasons)
            total.unreadable += log.unreadable
            total.abandoned += log.abandoned
            total.in_doubt += log.in_doubt
        total.finish_reasons = dict(reasons.most_common())
        total.by_model = dict(sorted(total.by_model.items(), key=lambda item: (-item[1].cost_usd, item[0])))
        return total

    async def usage_by_model(
        self, *, key: str | None = None, prefix: str = "", only: HistoryFilter | None = None
    ) -> dict[str, ModelUsage]:
        """What each model was used for, the dearest first."""
        return (await self.statistics(key=key, prefix=prefix, only=only)).by_model

    async def cost_over_time(
        self, bucket: Bucket = "day", *, key: str | None = None, prefix: str = "", only: HistoryFilter | None = None
    ) -> list[CostPoint]:
        """One point for each stretch of time that has a call, in order."""
        if bucket not in _WIDTHS_S:
            raise ConfigError(f"bucket: must be one of {', '.join(_WIDTHS_S)}, not {bucket!r}")
        width = _WIDTHS_S[bucket]
        points: dict[float, CostPoint] = {}
        admits = (only or HistoryFilter()).admits
        async for log, entries in self._logs(key, prefix):
            for entry in log.read(entries):
                if entry.call is not None and admits(entry):
                    at_s = entry.at_s // width * width
                    _add_to(points.setdefault(at_s, CostPoint(at_s=at_s)), entry.call)
        return [points[at_s] for at_s in sorted(points)]

    async def _logs(self, key: str | None, prefix: str) -> AsyncIterator[tuple[_Log, list[bytes]]]:
        if key is not None:
            stored = await self._store.load(key)
            if stored.version:
                yield _Log(), list(stored.entries)
            return
        after = ""
        while page := await self._store.list_keys(prefix, after=after, limit=_PAGE):
            for found in page:
                yield _Log(), list((await self._store.load(found)).entries)
            after = page[-1]


def _count(total: HistoryStatistics, entry: _Entry, reasons: Counter[str]) -> None:
    total.entries += 1
    total.first_at_s = entry.at_s if total.first_at_s is None else min(total.first_at_s, entry.at_s)
    total.last_at_s = entry.at_s if total.last_at_s is None else max(total.last_at_s, entry.at_s)
    call = entry.call
    if call is None:
        return
    total.add(call)
    total.by_model.setdefault(call.model or "unknown", ModelUsage()).add(call)
    reasons["interrupted" if call.interrupted else call.finish_reason or "unknown"] += 1


def _add_to(point: CostPoint, call: CallRecord) -> None:
    usage = ModelUsage()
    usage.add(call)
    point.calls += 1
    point.total_tokens += usage.total_tokens
    point.cost_usd += usage.cost_usd
    point.unpriced += usage.unpriced
