"""The SQLite store: histories in one file, durable when a call returns."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Self

from ..abc import StoredHistory
from ..errors import SessionConflictError
from ..transport.sqlite import SqliteFile

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from types import TracebackType

    from ..transport.sqlite import Connection, SqliteStatistics

__all__ = ["SqliteStore"]

_APPLICATION_ID = 0x67725472
# Keys are bytes of UTF-8, which sort as code points do, hold any text, and have no collation.
# Entries stand in the order of their writing, which makes writing sequential.
_SCHEMA = (
    (
        "CREATE TABLE sessions"
        " (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, version INTEGER NOT NULL, entries INTEGER NOT NULL)",
        "CREATE TABLE entries"
        " (id INTEGER PRIMARY KEY, session INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL)",
        "CREATE UNIQUE INDEX entries_by_session ON entries (session, number)",
    ),
)
_LOAD = (
    "SELECT s.version, e.data FROM sessions s LEFT JOIN entries e ON e.session = s.id WHERE s.key = ? ORDER BY e.number"
)
_BEGIN = "INSERT INTO sessions (key, version, entries) VALUES (?, 1, ?) ON CONFLICT (key) DO NOTHING RETURNING id, ?"
_GO_ON = (
    "UPDATE sessions SET version = version + 1, entries = entries + ? WHERE key = ? AND version = ?"
    " RETURNING id, entries"
)
_REPLACE = "UPDATE sessions SET version = version + 1, entries = ? WHERE key = ? AND version = ? RETURNING id, entries"
_ADD = "INSERT INTO entries (session, number, data) VALUES (?, ?, ?)"
_LIST = "SELECT key FROM sessions WHERE key > ? AND key >= ? AND (? = x'' OR key < ?) ORDER BY key LIMIT ?"


class SqliteStore:
    """Sessions in the SQLite file at `path`: `async with SqliteStore("bot.db") as store: ...`, or `aclose` at the end.

    What a call has returned for survives a kill of the process and a loss of power. Any number of tasks
    may use the store; writes that come together are committed together. Other processes may use the
    file as well: whoever writes to a session that another has changed gets `SessionConflictError`.

    New files, and directories made for them, are private to their owner. What is deleted is overwritten
    in the file; `erase` makes sure that it stands nowhere else either.

    Every method raises `StoreError` when the file cannot be read or written: `kind` says whether it is
    damaged, the disk full, another process in the way for more than `busy_s` seconds, and so on. A file
    that was not closed is checked for damage when it is opened, which takes as long as reading it.
    `max_group` bounds the writes of one commit.
    """

    durability = "disk"

    def __init__(self, path: str | os.PathLike[str], *, busy_s: float = 5.0, max_group: int = 512) -> None:
        self._file = SqliteFile(path, _SCHEMA, application_id=_APPLICATION_ID, busy_s=busy_s, max_group=max_group)

    def __repr__(self) -> str:
        return f"<SqliteStore on {self._file!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""
        return await self._file.read(partial(_load, key=key.encode()), subject=key)

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries; raises `SessionConflictError` when the version is another one."""
        work = partial(_append, key=key.encode(), entries=tuple(entries), expected=expected_version)
        return await self._file.write(work, subject=key)

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries; raises `SessionConflictError` when the version is another one."""
        work = partial(_rewrite, key=key.encode(), entries=tuple(entries), expected=expected_version)
        return await self._file.write(work, subject=key)

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none. The write-ahead log may keep what it held for a while."""
        return await self._file.write(partial(_delete, key=key.encode()), subject=key)

    async def erase(self, key: str) -> bool:
        """Remove the session and every trace of it in the files of the store; False when there was none.

        Raises `StoreError` of the kind "locked" when the session is gone but another process kept the
        log from being emptied: erase again.
        """
        existed = await self.delete(key)
        await self._file.scrub()
        return existed

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, above `after`."""
        work = partial(_list, prefix=prefix.encode(), after=after.encode(), limit=limit)
        return await self._file.read(work, subject="")

    def statistics(self) -> SqliteStatistics:
        """How many writes and commits there were."""
        return self._file.statistics()

    async def aclose(self) -> None:
        """Finish what was begun and close the file; later calls raise `StoreError`."""
        await self._file.aclose()


def _load(connection: Connection, *, key: bytes) -> StoredHistory:
    rows = connection.execute(_LOAD, (key,)).fetchall()
    if not rows:
        return StoredHistory(0, ())
    return StoredHistory(rows[0][0], tuple(data for _version, data in rows if data is not None))


def _append(connection: Connection, *, key: bytes, entries: Sequence[bytes], expected: int) -> int:
    if expected == 0:
        rows = connection.execute(_BEGIN, (key, len(entries), len(entries))).fetchall()
    else:
        rows = connection.execute(_GO_ON, (len(entries), key, expected)).fetchall()
    _add(connection, rows, key=key, entries=entries, expected=expected)
    return expected + 1


def _rewrite(connection: Connection, *, key: bytes, entries: Sequence[bytes], expected: int) -> int:
    if expected == 0:
        return _append(connection, key=key, entries=entries, expected=0)
    rows = connection.execute(_REPLACE, (len(entries), key, expected)).fetchall()
    for session, _count in rows:
        connection.execute("DELETE FROM entries WHERE session = ?", (session,))
    _add(connection, rows, key=key, entries=entries, expected=expected)
    return expected + 1


def _add(
    connection: Connection,
    rows: Sequence[tuple[int, int]],
    *,
    key: bytes,
    entries: Sequence[bytes],
    expected: int,
) -> None:
    """Write the entries of the session that the one row is of; no row means that the version is another one."""
    if not rows:
        found = connection.execute("SELECT version FROM sessions WHERE key = ?", (key,)).fetchall()
        version = found[0][0] if found else 0
        raise SessionConflictError(f"the session is at version {version}, not at {expected}")
    ((session, count),) = rows
    first = count - len(entries)
    connection.executemany(_ADD, [(session, first + n, entry) for n, entry in enumerate(entries)])


def _delete(connection: Connection, *, key: bytes) -> bool:
    rows = connection.execute("DELETE FROM sessions WHERE key = ? RETURNING id", (key,)).fetchall()
    for (session,) in rows:
        connection.execute("DELETE FROM entries WHERE session = ?", (session,))
    return bool(rows)


def _list(connection: Connection, *, prefix: bytes, after: bytes, limit: int) -> list[str]:
    # No UTF-8 ends in 0xFF, so the last byte can be raised.
    end = prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else b""
    rows = connection.execute(_LIST, (after, prefix, end, end, limit)).fetchall()
    return [key.decode() for (key,) in rows]
