"""Questions about stored histories: what was asked, of which models, at what cost, and when.

Everything is added up from the entries themselves, in exact decimals. A store that has a query language of its own
adds up by itself; of another, one session at a time is read, so that a store of any size can be asked. Both give the
same answers. Nothing here writes.

Entries are counted by what they have: one with a `call` is a call that was made, whatever its tag.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal, Protocol, cast, runtime_checkable

import msgspec
from msgspec import Struct

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_log_outline
from ..wire.result import CallRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from ..abc import HistoryStore
    from ..wire.outline import LogOutline

__all__ = [
    "BUCKETS",
    "COMPACTED",
    "MOST_TOKENS",
    "Bucket",
    "CostPoint",
    "HistoryAnalyzer",
    "HistoryFilter",
    "HistoryStatistics",
    "ModelUsage",
    "SummingStore",
]

Bucket = Literal["minute", "hour", "day"]
"""The width of a point in time, in UTC."""

BUCKETS: dict[Bucket, int] = {"minute": 60, "hour": 3_600, "day": 86_400}
"""The seconds in each."""

COMPACTED = "compacted"
"""The model and the finish reason of calls of which a compacted log has kept the sum."""

MOST_TOKENS = 10**12 - 1
"""The most that one call can have used; what says more, or less than nothing, counts as unknown."""

_PAGE = 500
_ENDS = ("answered", "abandoned")
_FREE = Decimal(0)


class HistoryFilter(Struct, frozen=True, kw_only=True):
    """Which entries count: all of these must hold.

    `start_s` (inclusive) and `end_s` (exclusive) are wall-clock seconds since the epoch; what has no time, as in
    imported histories, counts only without them. `models` are the names that answered, which may have a date that the
    one asked for had not. `min_cost_usd` counts calls that are known to have cost at least that. With a filter on
    models, cost or finish reasons only entries that a call has made count.
    """

    start_s: float | None = None
    end_s: float | None = None
    models: Collection[str] = frozenset()
    roles: Collection[str] = frozenset()
    finish_reasons: Collection[str] = frozenset()
    min_cost_usd: Decimal | None = None

    def __post_init__(self) -> None:
        for name, given in (("start_s", self.start_s), ("end_s", self.end_s)):
            if given is not None:
                msgspec.structs.force_setattr(self, name, _seconds(name, given))
        if self.min_cost_usd is not None:
            msgspec.structs.force_setattr(self, "min_cost_usd", _usd(self.min_cost_usd))
        if self.start_s is not None and self.end_s is not None and self.end_s <= self.start_s:
            raise ConfigError("end_s: must be after start_s")
        for name in ("models", "roles", "finish_reasons"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ConfigError(f"{name}: must be a set of names, not the text {value!r}")
            msgspec.structs.force_setattr(self, name, _names(name, value))

    def admits(self, entry: _Entry) -> bool:
        """Whether `entry` counts."""
        return (
            self._admits_time(entry.at_s)
            and (not self.roles or entry.role in self.roles)
            and self._admits_call(entry.call)
        )

    def _admits_time(self, at_s: float) -> bool:
        if self.start_s is None and self.end_s is None:
            return True
        return at_s > 0 and (self.start_s is None or at_s >= self.start_s) and (self.end_s is None or at_s < self.end_s)

    def _admits_call(self, call: CallRecord | None) -> bool:
        if not (self.models or self.finish_reasons or self.min_cost_usd is not None):
            return True
        return (
            call is not None
            and (not self.models or call.model in self.models)
            and (not self.finish_reasons or call.finish_reason in self.finish_reasons)
            and (self.min_cost_usd is None or (call.cost is not None and call.cost >= self.min_cost_usd))
        )


def _names(name: str, given: Collection[str]) -> frozenset[str]:
    try:
        names = frozenset(given)
        "".join(names).encode()
    except (TypeError, UnicodeEncodeError):
        raise ConfigError(f"{name}: must be a set of names, not {given!r}") from None
    return names


def _seconds(name: str, given: object) -> float:
    try:
        seconds = float(given) if isinstance(given, (int, float)) else math.nan
    except OverflowError:
        seconds = math.nan
    if math.isnan(seconds):
        raise ConfigError(f"{name}: must be seconds since the epoch, not {given!r}")
    return seconds


def _usd(given: object) -> Decimal:
    try:
        usd = Decimal(str(given))
    except InvalidOperation:
        usd = Decimal("NaN")
    if not usd.is_finite():
        raise ConfigError(f"min_cost_usd: must be an amount in USD, not {given!r}")
    return usd


class ModelUsage(Struct, kw_only=True):
    """What one model was used for. `cost_usd` adds up the calls whose cost is known; `unpriced` counts the others."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = _FREE
    unpriced: int = 0

    def merge(self, other: ModelUsage) -> None:
        """Count what `other` counts."""
        self.calls += other.calls
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.total_tokens += other.total_tokens
        self.cost_usd += other.cost_usd
        self.unpriced += other.unpriced


class HistoryStatistics(ModelUsage, kw_only=True):
    """What histories add up to, over all models and by model.

    `entries` counts the messages that the filter admitted, of `total_entries`; `unreadable` the stored entries that
    are no JSON of ours. Turns are counted apart: `abandoned` ended without an answer, `in_doubt` may have been billed
    or have no end at all. Of the calls that compacted logs have left out only number and cost are known: they count as
    those of a model "compacted", where nothing is filtered. `first_at_s` and `last_at_s` are the times of the first and
    the last entry that was admitted and has a time. `by_model` has the dearest first, `finish_reasons` the most
    frequent.
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

    def count_entry(self, at_s: float) -> None:
        """Count one message that was admitted."""
        self.entries += 1
        self.see_time(at_s)

    def count_calls(self, usage: ModelUsage, *, model: str | None, reason: str) -> None:
        """Count calls of one model that ended for one reason."""
        self.merge(usage)
        self.by_model.setdefault(model or "unknown", ModelUsage()).merge(usage)
        self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + usage.calls

    def see_time(self, at_s: float | None) -> None:
        """An entry was at `at_s`; no time and times up to 0 say nothing."""
        if at_s is not None and at_s > 0:
            self.first_at_s = at_s if self.first_at_s is None else min(self.first_at_s, at_s)
            self.last_at_s = at_s if self.last_at_s is None else max(self.last_at_s, at_s)

    def sort(self) -> None:
        """Put the dearest model and the most frequent reason first."""
        self.by_model = dict(sorted(self.by_model.items(), key=lambda item: (-item[1].cost_usd, item[0])))
        self.finish_reasons = dict(sorted(self.finish_reasons.items(), key=lambda item: (-item[1], item[0])))


class CostPoint(Struct, kw_only=True):
    """The calls that ended in one stretch of time, which begins `at_s` (wall-clock seconds since the epoch).

    Calls of which no time is known are at 0.
    """

    at_s: float
    calls: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = _FREE
    unpriced: int = 0

    def merge(self, usage: ModelUsage) -> None:
        """Count what `usage` counts."""
        self.calls += usage.calls
        self.total_tokens += usage.total_tokens
        self.cost_usd += usage.cost_usd
        self.unpriced += usage.unpriced


@runtime_checkable
class SummingStore(Protocol):
    """A store that can add up by itself. What it is asked about is one session, or all whose keys have a prefix."""

    async def summarize(self, *, key: str | None, prefix: str, only: HistoryFilter) -> HistoryStatistics:
        """The same statistics that the entries add up to one by one."""

    async def summarize_over_time(
        self, width_s: int, *, key: str | None, prefix: str, only: HistoryFilter
    ) -> list[CostPoint]:
        """One point for each stretch of `width_s` seconds that has a call, in order."""

    def can_summarize(self) -> bool:
        """Whether it can here."""


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
        self.compacted = ModelUsage()
        self._started: LogOutline | None = None

    def read(self, encoded: Sequence[bytes]) -> Iterator[_Entry]:
        """The messages of the answered turns, and the calls of all, in order."""
        for data in encoded:
            try:
                outline = decode_log_outline(data)
            except DecodeError:
                self.unreadable += 1
                continue
            yield from self._take(outline)
        self.in_doubt += self._started is not None

    def _take(self, outline: LogOutline) -> Iterator[_Entry]:
        if outline.type == "started" or outline.type in _ENDS:
            # A turn without an end that another one follows is in doubt as one that nothing follows.
            self.in_doubt += self._started is not None and not _is_end_of(self._started, outline)
        if outline.type == "started":
            self._started = outline
            return
        if outline.type == "answered":
            yield from self._asked(outline)
        else:
            for message in outline.messages:
                yield _Entry(message.role, outline.at_s)
        if outline.type == "abandoned":
            self.abandoned += not outline.maybe_billed
            self.in_doubt += outline.maybe_billed
        elif outline.type == "compacted":
            self.compacted.merge(ModelUsage(calls=outline.calls, cost_usd=outline.cost_usd, unpriced=outline.unpriced))
        if outline.type in _ENDS:
            self._started = None
        if outline.call is not None:
            role = "assistant" if outline.message is None else outline.message.role
            # An answer that was imported without its call has one that nothing was sent for.
            yield _Entry(role, outline.call.finished_at_s, outline.call if outline.call.attempts else None)

    def _asked(self, outline: LogOutline) -> Iterator[_Entry]:
        started = self._started
        if started is not None and started.turn_id == outline.turn_id:
            for message in started.messages:
                yield _Entry(message.role, started.at_s)


def _is_end_of(started: LogOutline, outline: LogOutline) -> bool:
    return outline.type in _ENDS and outline.turn_id == started.turn_id


_EVERYTHING = HistoryFilter()


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
        only = only or HistoryFilter()
        if (summing := self._summing()) is not None:
            return await summing.summarize(key=key, prefix=prefix, only=only)
        total = HistoryStatistics()
        async for entries in self._logs(key, prefix):
            _add_log(total, entries, only)
        total.sort()
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
        if bucket not in BUCKETS:
            raise ConfigError(f"bucket: must be one of {', '.join(BUCKETS)}, not {bucket!r}")
        width, only = BUCKETS[bucket], only or HistoryFilter()
        if (summing := self._summing()) is not None:
            return await summing.summarize_over_time(width, key=key, prefix=prefix, only=only)
        points: dict[float, CostPoint] = {}
        async for entries in self._logs(key, prefix):
            log = _Log()
            for entry in log.read(entries):
                if entry.call is not None and only.admits(entry):
                    at_s = entry.at_s // width * width
                    points.setdefault(at_s, CostPoint(at_s=at_s)).merge(_usage_of(entry.call))
            if log.compacted != ModelUsage() and only == _EVERYTHING:
                points.setdefault(0.0, CostPoint(at_s=0.0)).merge(log.compacted)
        return [points[at_s] for at_s in sorted(points)]

    def _summing(self) -> SummingStore | None:
        store = self._store
        return cast("SummingStore", store) if isinstance(store, SummingStore) and store.can_summarize() else None

    async def _logs(self, key: str | None, prefix: str) -> AsyncIterator[Sequence[bytes]]:
        async for found in self._asked(key, prefix):
            stored = await self._store.load(found)
            # One that was listed may have gone since.
            if stored.version:
                yield stored.entries

    async def _asked(self, key: str | None, prefix: str) -> AsyncIterator[str]:
        if key is not None:
            yield key
            return
        after = ""
        while page := await self._store.list_keys(prefix, after=after, limit=_PAGE):
            for found in page:
                yield found
            after = page[-1]


def _add_log(total: HistoryStatistics, entries: Sequence[bytes], only: HistoryFilter) -> None:
    log = _Log()
    for entry in log.read(entries):
        total.total_entries += 1
        if only.admits(entry):
            _add_entry(total, entry)
    if log.compacted != ModelUsage() and only == _EVERYTHING:
        total.count_calls(log.compacted, model=COMPACTED, reason=COMPACTED)
    total.sessions += 1
    total.unreadable += log.unreadable
    total.abandoned += log.abandoned
    total.in_doubt += log.in_doubt


def _add_entry(total: HistoryStatistics, entry: _Entry) -> None:
    total.count_entry(entry.at_s)
    call = entry.call
    if call is not None:
        reason = "interrupted" if call.interrupted else call.finish_reason or "unknown"
        total.count_calls(_usage_of(call), model=call.model, reason=reason)


def _tokens(count: int | None) -> int:
    """A count, and 0 for what no request has: earlier versions have stored what a provider said."""
    return count if count is not None and 0 <= count <= MOST_TOKENS else 0


def _usage_of(call: CallRecord) -> ModelUsage:
    usage = call.usage
    prompt = completion = total = 0
    if usage is not None:
        prompt, completion = _tokens(usage.prompt_tokens), _tokens(usage.completion_tokens)
        total = _tokens(usage.total_tokens) or prompt + completion
    return ModelUsage(
        calls=1,
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=total,
        cost_usd=_FREE if call.cost is None else call.cost,
        unpriced=int(call.cost is None),
    )
