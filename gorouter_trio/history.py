"""`HistoryManager`: stored histories at hand, with a cache that never tells an old version."""

from __future__ import annotations

import math
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio
from msgspec import Struct

from .config import Seams
from .errors import ConfigError, DecodeError, SessionConflictError
from .session.log import entries_of
from .stores.query import HistoryAnalyzer
from .stores.turns import to_turns
from .wire.codec import decode_log_entry
from .wire.result import HistoryEntry

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .abc import HistoryStore, StoredSession
    from .wire.messages import Message

__all__ = ["HistoryCacheStatistics", "HistoryManager", "SessionOwner"]

_TRIES = 8
_PAGE = 500
_ANY_KEY = "erased"


class SessionOwner(Protocol):
    """Who has sessions of the store active: a `Client`."""

    async def passivate(self, key: str) -> None:
        """Wait until the session has nothing to do, and let it forget what it knows of the store."""


class HistoryCacheStatistics(Struct, frozen=True):
    """A snapshot: sessions held and their stored bytes, and how often one was found or had to be loaded."""

    sessions: int
    bytes: int
    hits: int
    misses: int


class _Cached(Struct):
    version: int
    entries: tuple[HistoryEntry, ...]
    bytes: int
    used_at: float


class HistoryManager:
    """The histories of `store`, one, those of a prefix, or all: `HistoryManager(store, owner=client)`.

    What was read is kept decoded, at most `max_bytes` of stored bytes and not longer than `ttl_s` after its last use;
    before it is given again the store is asked whether it is still the newest version. So a change by another task or
    process is always seen. What is due is dropped at the next use, at most every `cleanup_s`, or by `run`, which is for
    a nursery of the caller's. The store stays its maker's to close.

    Changes go through `owner`, if there is one: a session that is active there finishes what it was asked first, and
    loads anew afterwards. Elsewhere, and against a message that arrives at that very moment, the version of the session
    decides: whoever comes second gets `SessionConflictError`, which is tried again here.

    Every method raises what the store raises, and `ConfigError` for a key that cannot be one.
    """

    def __init__(
        self,
        store: HistoryStore,
        *,
        owner: SessionOwner | None = None,
        ttl_s: float = 1800.0,
        cleanup_s: float = 300.0,
        max_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        if not ttl_s > 0 or not cleanup_s > 0:
            raise ConfigError(f"{'cleanup_s' if ttl_s > 0 else 'ttl_s'}: must be above 0")
        if max_bytes < 0:
            raise ConfigError("max_bytes: must not be below 0")
        self._store = store
        self._owner = owner
        self._ttl_s = ttl_s
        self._cleanup_s = cleanup_s
        self._max_bytes = max_bytes
        self._seams = Seams()
        self._cache: OrderedDict[str, _Cached] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._cleanup_at = -math.inf

    def __repr__(self) -> str:
        return f"<HistoryManager of {self._store!r}: {len(self._cache)} sessions cached>"

    @property
    def analyzer(self) -> HistoryAnalyzer:
        """Statistics, cost over time and usage by model of the same store."""
        return HistoryAnalyzer(self._store)

    async def entries(self, key: str) -> list[HistoryEntry]:
        """The messages of the answered turns, in order, with their calls; none for a session that is not there."""
        now = trio.current_time()
        if now >= self._cleanup_at:
            self._drop_unused(now)
        version = await self._store.version(key)
        cached = self._cache.get(key)
        if cached is None or cached.version != version:
            self._misses += 1
            return list((await self._load(key)).entries)
        self._hits += 1
        cached.used_at = trio.current_time()
        self._cache.move_to_end(key)
        return list(cached.entries)

    async def messages(self, key: str) -> list[Message]:
        """The messages alone."""
        return [entry.message for entry in await self.entries(key)]

    async def add(self, key: str, entries: Iterable[HistoryEntry | Message]) -> None:
        """Add what was said elsewhere behind the history, as turns; the session is made if it is not there.

        Raises `ConfigError`, having written nothing, for messages that cannot stand so: the last one must be an
        answer, and tool messages come behind the answer that calls them. So it does for what has no JSON.
        """
        given = [entry if isinstance(entry, HistoryEntry) else HistoryEntry(entry) for entry in entries]
        try:
            turns = to_turns(given, turn_id=f"added-{self._seams.new_id()}", at_s=self._seams.wall())
            # A number that is none is written all the same, and nobody could read the session again.
            entries_of(map(decode_log_entry, turns.entries))
        except (TypeError, ValueError, RecursionError, DecodeError) as exc:
            raise ConfigError(f"entries: cannot be written as JSON messages: {exc}") from exc
        for fault in turns.set_aside:
            raise ConfigError(f"entries: the message at {fault.position} {fault.reason}")
        if given:
            await self._change(key, partial(self._store.append, key, turns.entries))

    async def clear(self, key: str) -> None:
        """Empty the history; the session stays. Its turn ids are forgotten."""
        await self._change(key, partial(self._empty, key))

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none."""
        return await self._remove(key, self._store.delete)

    async def erase(self, key: str) -> bool:
        """Remove the session and every trace of it that the store can reach; False when there was none."""
        return await self._remove(key, self._store.erase)

    async def delete_all(self, prefix: str) -> int:
        """Remove the sessions whose keys begin with `prefix`, all with an empty one; returns how many there were."""
        return await self._for_all(prefix, self.delete)

    async def erase_all(self, prefix: str) -> int:
        """Erase the sessions whose keys begin with `prefix`, all with an empty one; returns how many there were.

        What was deleted before is erased as well. So where it raises, that is tried again also when no session is left.
        """
        count = await self._for_all(prefix, self.delete)
        # Any key that the prefix is of will do: erasing takes what was deleted before along.
        await self._store.erase(prefix or _ANY_KEY)
        return count

    async def clear_all(self, prefix: str) -> int:
        """Empty the sessions whose keys begin with `prefix`, all with an empty one; returns how many there were."""
        return await self._for_all(prefix, self.clear)

    async def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, in code-point order."""
        return await self.analyzer.keys(prefix)

    async def sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> list[StoredSession]:
        """What is known of sessions without reading them, in the order of their keys, those above `after` only."""
        return list(await self._store.list_sessions(prefix, after=after, limit=limit))

    def statistics(self) -> HistoryCacheStatistics:
        """A snapshot of the cache; cheap."""
        return HistoryCacheStatistics(len(self._cache), self._bytes, self._hits, self._misses)

    def forget(self, key: str | None = None) -> None:
        """Drop what is cached of one session, or of all."""
        for dropped in list(self._cache) if key is None else [key]:
            cached = self._cache.pop(dropped, None)
            self._bytes -= 0 if cached is None else cached.bytes

    async def run(self) -> None:
        """Drop what is due every `cleanup_s`, until cancelled."""
        while True:
            await trio.sleep(self._cleanup_s)
            self._drop_unused(trio.current_time())

    def _drop_unused(self, now: float) -> None:
        self._cleanup_at = now + self._cleanup_s
        while self._cache:
            key, cached = next(iter(self._cache.items()))
            if cached.used_at + self._ttl_s > now:
                return
            self.forget(key)

    async def _load(self, key: str) -> _Cached:
        stored = await self._store.load(key)
        entries = tuple(entries_of(map(decode_log_entry, stored.entries)))
        cached = _Cached(stored.version, entries, sum(map(len, stored.entries)), trio.current_time())
        self.forget(key)
        if stored.version and cached.bytes <= self._max_bytes:
            self._cache[key] = cached
            self._bytes += cached.bytes
            while self._bytes > self._max_bytes:
                self.forget(next(iter(self._cache)))
        return cached

    async def _change(self, key: str, write: Callable[..., Awaitable[int]]) -> None:
        """Write at the version that the store has, again when somebody was faster."""
        for attempt in range(1, _TRIES + 1):
            await self._passivate(key)
            try:
                await write(expected_version=await self._store.version(key))
            except SessionConflictError:
                if attempt == _TRIES:
                    raise
            else:
                return

    async def _empty(self, key: str, *, expected_version: int) -> int:
        # A session that is not there is not made by this.
        return await self._store.rewrite(key, (), expected_version=expected_version) if expected_version else 0

    async def _remove(self, key: str, remove: Callable[[str], Awaitable[bool]]) -> bool:
        await self._passivate(key)
        self.forget(key)
        return await remove(key)

    async def _passivate(self, key: str) -> None:
        if self._owner is not None:
            await self._owner.passivate(key)

    async def _for_all(self, prefix: str, change: Callable[[str], Awaitable[object]]) -> int:
        count, after = 0, ""
        while page := await self._store.list_keys(prefix, after=after, limit=_PAGE):
            for key in page:
                await change(key)
            count, after = count + len(page), page[-1]
        return count
