"""Interfaces: what may be put in place of a part, and what every front of the runtime offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

__all__ = ["HistoryStore", "ImmediateStore", "StoredHistory"]


class StoredHistory(Struct, frozen=True):
    """A session as a store has it: encoded entries in order, and the version that they make."""

    version: int
    entries: Sequence[bytes]


class ImmediateStore(Protocol):
    """What a store may offer besides, where it has its data at hand: the same as `load` and `append`, without waiting.

    Sessions use it where it is there: a turn then costs two trips through the scheduler less.
    """

    def load_nowait(self, key: str) -> StoredHistory:
        """As `HistoryStore.load`."""

    def append_nowait(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.append`; what it raises has not happened."""


class HistoryStore(Protocol):
    """Where sessions are kept. Keys are any non-empty text; entries are opaque bytes.

    A version counts the changes of a session, from 0 for one that was never written. Whoever
    writes names the version that it has seen, so that two writers cannot interleave.

    A write that raises or is cancelled may have happened or not, but not in part: whoever asked for it
    loads again before the next one. A store may raise whatever it likes; an answer that it refuses
    reaches its asker in a `HistoryNotSaved`. Every method is a checkpoint.
    """

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries and return the new version; durable on return.

        Raises `SessionConflictError`, having written nothing, when the version is another one.
        """

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries and return the new version; as `append` otherwise."""

    async def delete(self, key: str) -> bool:
        """Remove the session with its version; False when there was none."""

    async def erase(self, key: str) -> bool:
        """Remove the session and every trace of it that the store can reach; False when there was none."""

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, at most `limit`, those above `after` only."""

    async def aclose(self) -> None:
        """Release what the store holds; whoever made the store closes it."""
