"""A store that fails when it is told to, around any other, and writes down what becomes of turns."""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, TypeVar, final

import trio

from ..errors import DecodeError
from ..stores.keys import check_key
from ..wire.codec import decode_log_entry
from ..wire.journal import LogEntry, TurnAbandoned, TurnAnswered, TurnStarted
from .faults import FailStore, FaultPlan, HangStore, check_faults
from .log import EventLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..abc import HistoryStore, StoredHistory, StoredSession
    from .faults import Aim, Fault, StoreOperation

__all__ = ["FaultyStore"]

T = TypeVar("T")


@final
class FaultyStore:
    """`store` with faults: `FaultyStore(SqliteStore(path), [FailStore(operation="append", nth=2)], rng=...)`.

    A world wraps the stores of its clients by itself. `rng` is what probabilities are drawn from, `log` where
    operations, turns and faults are written; both have defaults for a store used alone, whose times are counted from
    its first operation. Raises `ConfigError` for faults that are none of a store.
    """

    def __init__(
        self,
        store: HistoryStore,
        faults: Sequence[Fault] | FaultPlan = (),
        *,
        rng: random.Random | None = None,
        log: EventLog | None = None,
    ) -> None:
        self.inside = store
        """The store that is wrapped: what goes through it meets no faults."""
        self.log = EventLog() if log is None else log
        self._plan = faults if isinstance(faults, FaultPlan) else _plan(faults, rng, self.log)
        self._keys: dict[str, None] = {}
        self._open_turns: dict[str, str] = {}
        self.struck = 0
        """How many operations a fault has struck."""

    def __repr__(self) -> str:
        return f"<FaultyStore around {self.inside!r}>"

    def has_plan(self, plan: FaultPlan) -> bool:
        """Whether the faults that it meets are those of `plan`."""
        return self._plan is plan

    @property
    def durability(self) -> str:
        """That of the store inside."""
        return self.inside.durability

    @property
    def keys_seen(self) -> list[str]:
        """The keys that were written to through this object, in the order of their first writing."""
        return list(self._keys)

    @property
    def open_turns(self) -> dict[str, str]:
        """The turns that were started through this object and have no end, by session: they run, or are in doubt."""
        return dict(self._open_turns)

    async def load(self, key: str) -> StoredHistory:
        """As the store inside does it."""
        return await self._run("load", key, lambda: self.inside.load(key))

    async def version(self, key: str) -> int:
        """As the store inside does it."""
        return await self._run("version", key, lambda: self.inside.version(key))

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As the store inside does it; what the entries say of turns is written down once they are stored."""

        async def append() -> int:
            version = await self.inside.append(key, entries, expected_version=expected_version)
            self._keys[key] = None
            for entry in entries:
                self._tell(key, entry)
            return version

        return await self._run("append", key, append)

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As the store inside does it."""

        async def rewrite() -> int:
            version = await self.inside.rewrite(key, entries, expected_version=expected_version)
            self._keys[key] = None
            self._open_turns.pop(key, None)
            for entry in entries:
                self._follow(key, _read(entry))
            return version

        return await self._run("rewrite", key, rewrite)

    async def delete(self, key: str) -> bool:
        """As the store inside does it."""
        return await self._run("delete", key, lambda: self._forget(key, self.inside.delete))

    async def erase(self, key: str) -> bool:
        """As the store inside does it."""
        return await self._run("erase", key, lambda: self._forget(key, self.inside.erase))

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """As the store inside does it."""
        return await self._run("list_keys", None, lambda: self.inside.list_keys(prefix, after=after, limit=limit))

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """As the store inside does it."""
        inside = self.inside
        return await self._run("list_sessions", None, lambda: inside.list_sessions(prefix, after=after, limit=limit))

    async def aclose(self) -> None:
        """Close the store inside."""
        await self._run("aclose", None, self.inside.aclose)

    async def _run(self, operation: StoreOperation, key: str | None, work: Callable[[], Awaitable[T]]) -> T:
        if key is not None:
            check_key(key)
        self.log.record("store", operation=operation, key=key)
        # First, since it counts operations: one that fails for another reason is one as well.
        aim = self._plan.on_store(operation=operation, key=key, now=self.log.now())
        if self._plan.on_operation(operation):
            self.struck += 1
            await trio.lowlevel.checkpoint()
            raise OSError(errno.EIO, "the store failed (simulated)")
        if aim is None:
            return await work()
        self.struck += 1
        return await _strike(aim, work, operation=operation, key=key)

    async def _forget(self, key: str, remove: Callable[[str], Awaitable[bool]]) -> bool:
        is_found = await remove(key)
        self._open_turns.pop(key, None)
        return is_found

    def _tell(self, key: str, encoded: bytes) -> None:
        entry = _read(encoded)
        if entry is None:
            self.log.record("entry", key=key, bytes=len(encoded))
            return
        self._follow(key, entry)
        self.log.record("turn", key=key, **_describe(entry))

    def _follow(self, key: str, entry: LogEntry | None) -> None:
        if isinstance(entry, TurnStarted):
            self._open_turns[key] = entry.turn_id
        elif isinstance(entry, (TurnAnswered, TurnAbandoned)):
            self._open_turns.pop(key, None)


def _read(encoded: bytes) -> LogEntry | None:
    """An entry of a session's log; None for something else."""
    try:
        return decode_log_entry(encoded)
    except DecodeError:
        return None


async def _strike(aim: Aim, work: Callable[[], Awaitable[T]], *, operation: str, key: str | None) -> T:
    match aim.fault:
        case FailStore(when="before", error=error):
            aim.strike(operation=operation, key=key, when="before")
            await trio.lowlevel.checkpoint()
            raise error()
        case FailStore(error=error):
            await work()
            aim.strike(operation=operation, key=key, when="after")
            raise error()
        case HangStore(when="before", for_s=for_s):
            aim.strike(operation=operation, key=key, when="before")
            await trio.sleep(for_s)
            return await work()
        case HangStore(for_s=for_s):
            result = await work()
            aim.strike(operation=operation, key=key, when="after")
            await trio.sleep(for_s)
            return result
        case fault:
            raise TypeError(f"{type(fault).__name__} is no fault of a store")


def _describe(entry: LogEntry) -> dict[str, object]:
    match entry:
        case TurnStarted(turn_id=turn_id):
            return {"turn": turn_id, "state": "started"}
        case TurnAnswered(turn_id=turn_id, call=call):
            state = "interrupted" if call.interrupted else "answered"
            return {"turn": turn_id, "state": state, "finish_reason": call.finish_reason, "attempts": call.attempts}
        case TurnAbandoned(turn_id=turn_id, reason=reason, maybe_billed=maybe_billed):
            return {"turn": turn_id, "state": "abandoned", "reason": reason, "maybe_billed": maybe_billed}
        case _:
            return {"turn": getattr(entry, "turn_id", None), "state": str(entry.__struct_config__.tag)}


def _plan(faults: Sequence[Fault], rng: random.Random | None, log: EventLog) -> FaultPlan:
    check_faults(faults, of_store=True)
    source = rng or random.Random(0)
    return FaultPlan(faults, rng=lambda _name: source, log=log)
