"""The memory store: histories live as long as the process; the specification of every other store."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..abc import StoredHistory
from ..errors import SessionConflictError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MemoryStore"]


class MemoryStore:
    """Sessions in a dict. Each method changes everything or nothing, in one step, after its checkpoint."""

    durability = "process"

    def __init__(self) -> None:
        self._sessions: dict[str, tuple[int, list[bytes]]] = {}

    def __repr__(self) -> str:
        return f"<MemoryStore: {len(self._sessions)} sessions>"

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""
        await trio.lowlevel.checkpoint()
        return self.load_nowait(key)

    def load_nowait(self, key: str) -> StoredHistory:
        """`load`, without a checkpoint."""
        version, entries = self._sessions.get(key, (0, []))
        return StoredHistory(version, tuple(entries))

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries; raises `SessionConflictError` when the version is another one."""
        await trio.lowlevel.checkpoint()
        return self.append_nowait(key, entries, expected_version=expected_version)

    def append_nowait(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """`append`, without a checkpoint."""
        version, stored = self._check(key, expected_version)
        stored.extend(entries)
        self._sessions[key] = (version + 1, stored)
        return version + 1

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries; raises `SessionConflictError` when the version is another one."""
        await trio.lowlevel.checkpoint()
        version, _stored = self._check(key, expected_version)
        self._sessions[key] = (version + 1, list(entries))
        return version + 1

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none."""
        await trio.lowlevel.checkpoint()
        return self._sessions.pop(key, None) is not None

    async def erase(self, key: str) -> bool:
        """Remove the session; nothing else holds it. False when there was none."""
        return await self.delete(key)

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, above `after`."""
        await trio.lowlevel.checkpoint()
        keys = sorted(key for key in self._sessions if key.startswith(prefix) and key > after)
        return keys[:limit]

    async def aclose(self) -> None:
        """Nothing to release; the histories stay readable."""
        await trio.lowlevel.checkpoint()

    def _check(self, key: str, expected_version: int) -> tuple[int, list[bytes]]:
        version, stored = self._sessions.get(key) or (0, [])
        if version != expected_version:
            raise SessionConflictError(f"the session is at version {version}, not at {expected_version}")
        return version, stored
