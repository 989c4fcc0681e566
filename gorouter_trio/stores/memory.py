"""The memory store: histories live as long as the process; the specification of every other store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..abc import StoredHistory, StoredSession
from ..config import Seams
from ..errors import SessionConflictError
from .keys import check_key

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MemoryStore"]


class _Session:
    __slots__ = ("bytes", "entries", "updated_at_s", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.entries: list[bytes] = []
        self.bytes = 0
        self.updated_at_s = 0.0


class MemoryStore:
    """Sessions in a dict. Each method changes everything or nothing, in one step, after its checkpoint.

    `wall` gives the time of changes, in seconds since the epoch; by default that of the system.
    """

    durability = "process"

    def __init__(self, *, wall: Callable[[], float] | None = None) -> None:
        self._sessions: dict[str, _Session] = {}
        self._deleted_version = 0
        self._wall = wall or Seams().wall

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._sessions)} sessions>"

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""
        await trio.lowlevel.checkpoint()
        return self.load_nowait(key)

    def load_nowait(self, key: str) -> StoredHistory:
        """`load`, without a checkpoint."""
        session = self._sessions.get(key)
        if session is None:
            check_key(key)
            return StoredHistory(0, ())
        return StoredHistory(session.version, tuple(session.entries))

    async def version(self, key: str) -> int:
        """The version of the session, 0 for one that was never written."""
        await trio.lowlevel.checkpoint()
        check_key(key)
        session = self._sessions.get(key)
        return 0 if session is None else session.version

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries; raises `SessionConflictError` when the version is another one."""
        await trio.lowlevel.checkpoint()
        return self.append_nowait(key, entries, expected_version=expected_version)

    def append_nowait(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """`append`, without a checkpoint."""
        added = _exactly(entries)
        session = self._changed(key, expected_version)
        session.entries += added
        session.bytes += sum(map(len, added))
        return session.version

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries; raises `SessionConflictError` when the version is another one."""
        await trio.lowlevel.checkpoint()
        added = _exactly(entries)
        session = self._changed(key, expected_version)
        session.entries = added
        session.bytes = sum(map(len, added))
        return session.version

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none."""
        await trio.lowlevel.checkpoint()
        check_key(key)
        session = self._sessions.pop(key, None)
        if session is None:
            return False
        self._deleted_version = max(self._deleted_version, session.version)
        return True

    async def erase(self, key: str) -> bool:
        """Remove the session; nothing else holds it. False when there was none."""
        return await self.delete(key)

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, above `after`."""
        await trio.lowlevel.checkpoint()
        keys = sorted(key for key in self._sessions if key.startswith(prefix) and key > after)
        return keys[: max(limit, 0)]

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """What is known of these sessions besides their entries."""
        return [
            StoredSession(key, session.version, len(session.entries), session.bytes, session.updated_at_s)
            for key in await self.list_keys(prefix, after=after, limit=limit)
            for session in [self._sessions[key]]
        ]

    async def aclose(self) -> None:
        """Nothing to release; the histories stay readable."""
        await trio.lowlevel.checkpoint()

    def _changed(self, key: str, expected_version: int) -> _Session:
        """The session, one version on; made if it is not there, above every version that was deleted."""
        session = self._sessions.get(key)
        version = 0 if session is None else session.version
        if version != expected_version:
            raise SessionConflictError(f"the session is at version {version}, not at {expected_version}")
        if session is None:
            check_key(key)
        # What can fail comes before what is changed.
        now_s = self._wall()
        if session is None:
            session = self._sessions[key] = _Session(self._deleted_version)
        session.version += 1
        session.updated_at_s = now_s
        return session


def _exactly(entries: Sequence[bytes]) -> list[bytes]:
    """Copies: what an encoder gives has up to its length once more behind it, for as long as it is kept."""
    return [bytes(memoryview(entry)) for entry in entries]
