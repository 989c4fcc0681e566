"""A history store that fails where a test wants it to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

import trio

from gorouter_trio.abc import HistoryStore, StoredHistory, StoredSession
from gorouter_trio.stores import MemoryStore

T = TypeVar("T")

Moment = Literal["before", "after", "hang", "hang_after", "deaf", "slow"]
"""Fail before or after the operation was carried out, or never return from it; `deaf` hangs and hears no cancel, `slow`
takes a second.
"""


class FailingStore:
    """Wraps a store; the operations named in `faults` fail, counted from 1 over all operations.

    `operations` tells what was asked for. `error` makes the exception.
    """

    def __init__(
        self,
        inner: HistoryStore | None = None,
        *,
        faults: dict[int, Moment] | None = None,
        error: Callable[[str], Exception] = RuntimeError,
    ) -> None:
        self.inner = inner or MemoryStore()
        self.faults = dict(faults or {})
        self.error = error
        self.operations: list[str] = []

    def fail_next(self, moment: Moment = "before", *, skip: int = 0) -> None:
        """Let the next operation fail, or the one after `skip` others."""
        self.faults[len(self.operations) + 1 + skip] = moment

    @property
    def durability(self) -> str:
        return self.inner.durability

    async def load(self, key: str) -> StoredHistory:
        return await self._run("load", lambda: self.inner.load(key))

    async def version(self, key: str) -> int:
        return await self._run("version", lambda: self.inner.version(key))

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        return await self._run("append", lambda: self.inner.append(key, entries, expected_version=expected_version))

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        return await self._run("rewrite", lambda: self.inner.rewrite(key, entries, expected_version=expected_version))

    async def erase(self, key: str) -> bool:
        return await self._run("erase", lambda: self.inner.erase(key))

    async def delete(self, key: str) -> bool:
        return await self._run("delete", lambda: self.inner.delete(key))

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        return await self._run("list_keys", lambda: self.inner.list_keys(prefix, after=after, limit=limit))

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        return await self._run("list_sessions", lambda: self.inner.list_sessions(prefix, after=after, limit=limit))

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def _run(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        self.operations.append(name)
        moment = self.faults.get(len(self.operations))
        if moment == "slow":
            await trio.sleep(1)
        elif moment in ("before", "hang", "deaf"):
            await self._fail(name, moment)
        result = await work()
        if moment in ("after", "hang_after"):
            await self._fail(name, moment)
        return result

    async def _fail(self, name: str, moment: Moment) -> None:
        with trio.CancelScope(shield=moment == "deaf"):
            if moment in ("before", "after"):
                raise self.error(f"{name} failed ({moment})")
            await trio.sleep(80_000)
