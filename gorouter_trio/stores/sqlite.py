"""The SQLite store: histories in one file, durable when a call returns."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from ..abc import StoredHistory, StoredSession
from ..config import Seams
from ..errors import ConfigError, SessionConflictError, StoreError
from ..transport.sqlite import SqliteFile
from . import sqlite_query
from .keys import SessionKey, check_key, prefix_range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from ..transport.sqlite import Connection, SchemaStep, SqliteStatistics
    from .query import CostPoint, HistoryFilter, HistoryStatistics

__all__ = ["SqliteStore"]

_APPLICATION_ID = 0x67725472
_MOST_KEYS = 2**63 - 1
# SQLite counts in milliseconds, of 31 bits.
_MOST_BUSY_S = 2_000_000
_ENTRY_FORMAT = 1
"""Of what is in the entries. A session that a later one has written to is not read: an answer may be missing there."""


def _add_parts(connection: Connection) -> None:
    """Split the keys of sessions that were written before their parts had columns."""
    for session, key in connection.execute("SELECT id, key FROM sessions").fetchall():
        parts = SessionKey.parse(key.decode())
        if parts.tenant or parts.principal:
            change = "UPDATE sessions SET tenant = ?, principal = ? WHERE id = ?"
            connection.execute(change, (parts.tenant, parts.principal, session))


# Keys are bytes of UTF-8, which sort as code points do, hold any text, and have no collation.
# Entries stand in the order of their writing, which makes writing sequential.
_SCHEMA: tuple[SchemaStep, ...] = (
    (
        "CREATE TABLE sessions"
        " (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, version INTEGER NOT NULL, entries INTEGER NOT NULL)",
        "CREATE TABLE entries"
        " (id INTEGER PRIMARY KEY, session INTEGER NOT NULL, number INTEGER NOT NULL, data BLOB NOT NULL)",
        "CREATE UNIQUE INDEX entries_by_session ON entries (session, number)",
    ),
    (
        "ALTER TABLE sessions ADD COLUMN tenant TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE sessions ADD COLUMN principal TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE sessions ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE sessions ADD COLUMN updated_at REAL",
        "ALTER TABLE sessions ADD COLUMN format INTEGER NOT NULL DEFAULT 1",
        "UPDATE sessions SET bytes ="
        " (SELECT coalesce(sum(length(data)), 0) FROM entries WHERE entries.session = sessions.id)",
        _add_parts,
        "CREATE INDEX sessions_by_owner ON sessions (tenant, principal) WHERE tenant != '' OR principal != ''",
    ),
)
# No step of the schema, because older versions of this package go on with the file. What they delete is noted as well.
_DELETIONS = (
    "CREATE TABLE IF NOT EXISTS deletions (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS note_deletion AFTER DELETE ON sessions BEGIN"
    " INSERT INTO deletions VALUES (1, old.version)"
    " ON CONFLICT (id) DO UPDATE SET version = max(version, excluded.version);"
    " END",
)
_LOAD = (
    "SELECT s.version, s.format, e.data FROM sessions s LEFT JOIN entries e ON e.session = s.id"
    " WHERE s.key = ? ORDER BY e.number"
)
_BEGIN = (
    "INSERT INTO sessions (key, version, entries, bytes, updated_at, format, tenant, principal)"
    " VALUES (?, 1 + coalesce((SELECT version FROM deletions), 0), ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (key) DO NOTHING RETURNING id, entries, version"
)
_GO_ON = (
    "UPDATE sessions SET version = version + 1, entries = entries + ?, bytes = bytes + ?, updated_at = ?,"
    " format = max(format, ?) WHERE key = ? AND version = ? RETURNING id, entries, version"
)
_REPLACE = (
    "UPDATE sessions SET version = version + 1, entries = ?, bytes = ?, updated_at = ?, format = ?"
    " WHERE key = ? AND version = ? RETURNING id, entries, version"
)
_ADD = "INSERT INTO entries (session, number, data) VALUES (?, ?, ?)"
_LIST = "SELECT key FROM sessions WHERE key > ? AND key >= ? AND (? = x'' OR key < ?) ORDER BY key LIMIT ?"
_DESCRIBE = (
    "SELECT key, version, entries, bytes, updated_at FROM sessions"
    " WHERE key > ? AND key >= ? AND (? = x'' OR key < ?) ORDER BY key LIMIT ?"
)


class _Change(Struct, frozen=True):
    """Entries for a session that is at a version, and when they came."""

    key: bytes
    entries: tuple[bytes, ...]
    size: int
    expected: int
    at_s: float


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
    `max_group` bounds the writes of one commit. `erase_rewrites=False` is for files so large that an erasure would keep
    the sessions waiting too long: `vacuum` at a quiet hour is its other half then. `wall` gives the time of changes, in
    seconds since the epoch; by default that of the system.
    """

    durability = "disk"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_s: float = 5.0,
        max_group: int = 512,
        erase_rewrites: bool = True,
        wall: Callable[[], float] | None = None,
    ) -> None:
        _check_settings(path, busy_s=busy_s, max_group=max_group)
        self._erase_rewrites = erase_rewrites
        self._file = SqliteFile(
            path, _SCHEMA, additions=_DELETIONS, application_id=_APPLICATION_ID, busy_s=busy_s, max_group=max_group
        )
        self._wall = wall or Seams().wall

    def __repr__(self) -> str:
        return f"<SqliteStore on {self._file!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries.

        Raises `StoreError` of the kind "newer" when a later version of this package has written to it.
        """
        return await self._file.read(partial(_load, key=check_key(key)), subject=key)

    async def version(self, key: str) -> int:
        """The version of the session, 0 for one that was never written."""
        return await self._file.read(partial(_version, key=check_key(key)), subject=key)

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries; raises `SessionConflictError` when the version is another one."""
        change = self._change(key, entries, expected_version)
        return await self._file.write(partial(_append, change=change), subject=key)

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries; raises `SessionConflictError` when the version is another one."""
        change = self._change(key, entries, expected_version)
        return await self._file.write(partial(_rewrite, change=change), subject=key)

    async def delete(self, key: str) -> bool:
        """Remove the session; False when there was none. The write-ahead log may keep what it held for a while."""
        return await self._file.write(partial(_delete, key=check_key(key)), subject=key)

    async def erase(self, key: str) -> bool:
        """Remove the session and every trace of it, and of what was deleted before, in the files of the store.

        False when there was none. It rewrites the file, unless the store was made with `erase_rewrites=False`: what
        moves in a file leaves copies that nothing else reaches. Raises `StoreError` when the session is gone but its
        traces may be there, of the kind "locked" when another process kept the log from being emptied: erase again.
        """
        existed = await self.delete(key)
        await self._file.scrub(rewrite=self._erase_rewrites)
        return existed

    async def vacuum(self) -> None:
        """Rewrite the file: it becomes as small as it can be, and no trace of what was deleted is left.

        It takes as long as writing the file does, and needs as much room again; other changes wait meanwhile.
        """
        await self._file.scrub(rewrite=True)

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, above `after`."""
        work = partial(_list, find=_find(prefix, after, limit))
        return await self._file.read(work, subject="")

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """What is known of these sessions besides their entries."""
        work = partial(_describe, find=_find(prefix, after, limit))
        return await self._file.read(work, subject="")

    def can_summarize(self) -> bool:
        """Whether the SQLite that this Python has can cut JSON."""
        return sqlite_query.CAN_QUERY

    async def summarize(self, *, key: str | None, prefix: str, only: HistoryFilter) -> HistoryStatistics:
        """What `HistoryAnalyzer.statistics` gives; it keeps nobody else waiting."""
        asked = sqlite_query.question(*_range(key, prefix), only=only)
        return await self._file.survey(partial(sqlite_query.summarize, asked=asked))

    async def summarize_over_time(
        self, width_s: int, *, key: str | None, prefix: str, only: HistoryFilter
    ) -> list[CostPoint]:
        """What `HistoryAnalyzer.cost_over_time` gives; it keeps nobody else waiting."""
        asked = sqlite_query.question(*_range(key, prefix), only=only)
        return await self._file.survey(partial(sqlite_query.summarize_over_time, asked=asked, width_s=width_s))

    def statistics(self) -> SqliteStatistics:
        """How many writes and commits there were."""
        return self._file.statistics()

    async def aclose(self) -> None:
        """Finish what was begun and close the file; later calls raise `StoreError`."""
        await self._file.aclose()

    def _change(self, key: str, entries: Sequence[bytes], expected_version: int) -> _Change:
        size = sum(map(len, entries))
        return _Change(check_key(key), tuple(entries), size, expected_version, self._wall())


def _check_settings(path: object, *, busy_s: object, max_group: object) -> None:
    try:
        name = os.fsencode(path)  # type: ignore[arg-type]  # what it is not for, it refuses
    except (TypeError, UnicodeEncodeError):
        name = b""
    if not Path(os.fsdecode(name)).name or b"\0" in name or isinstance(path, bytes):
        raise ConfigError(f"path: must be the name of a file, not {path!r}")
    if not isinstance(busy_s, (int, float)) or not 0 <= busy_s <= _MOST_BUSY_S:
        raise ConfigError(f"busy_s: must be from 0 to {_MOST_BUSY_S:,} seconds, not {busy_s!r}")
    if not isinstance(max_group, int) or max_group < 1:
        raise ConfigError(f"max_group: must be a whole number from 1 on, not {max_group!r}")


def _load(connection: Connection, *, key: bytes) -> StoredHistory:
    rows = connection.execute(_LOAD, (key,)).fetchall()
    if not rows:
        return StoredHistory(0, ())
    version, written_in, _ = rows[0]
    if written_in > _ENTRY_FORMAT:
        raise StoreError(
            f"the session was written by a newer version (entries of format {written_in}, this one knows"
            f" {_ENTRY_FORMAT})",
            kind="newer",
        )
    return StoredHistory(version, tuple(data for _version, _format, data in rows if data is not None))


def _version(connection: Connection, *, key: bytes) -> int:
    rows = connection.execute("SELECT version FROM sessions WHERE key = ?", (key,)).fetchall()
    return int(rows[0][0]) if rows else 0


def _append(connection: Connection, *, change: _Change) -> int:
    count, size = len(change.entries), change.size
    if change.expected == 0:
        parts = SessionKey.parse(change.key.decode())
        new = (change.key, count, size, change.at_s, _ENTRY_FORMAT, parts.tenant, parts.principal)
        rows = connection.execute(_BEGIN, new).fetchall()
    else:
        known = (count, size, change.at_s, _ENTRY_FORMAT, change.key, change.expected)
        rows = connection.execute(_GO_ON, known).fetchall()
    return _add(connection, rows, change=change)


def _rewrite(connection: Connection, *, change: _Change) -> int:
    if change.expected == 0:
        return _append(connection, change=change)
    new = (len(change.entries), change.size, change.at_s, _ENTRY_FORMAT, change.key, change.expected)
    rows = connection.execute(_REPLACE, new).fetchall()
    for session, *_rest in rows:
        connection.execute("DELETE FROM entries WHERE session = ?", (session,))
    return _add(connection, rows, change=change)


def _add(connection: Connection, rows: Sequence[tuple[int, int, int]], *, change: _Change) -> int:
    """Write the entries of the session that the one row is of, and return its version; no row means another version."""
    if not rows:
        found = _version(connection, key=change.key)
        raise SessionConflictError(f"the session is at version {found}, not at {change.expected}")
    ((session, count, version),) = rows
    first = count - len(change.entries)
    connection.executemany(_ADD, [(session, first + n, entry) for n, entry in enumerate(change.entries)])
    return version


def _delete(connection: Connection, *, key: bytes) -> bool:
    rows = connection.execute("DELETE FROM sessions WHERE key = ? RETURNING id", (key,)).fetchall()
    for (session,) in rows:
        connection.execute("DELETE FROM entries WHERE session = ?", (session,))
    return bool(rows)


def _range(key: str | None, prefix: str) -> tuple[bytes, bytes]:
    """The least key asked about, and one that is above all of them."""
    if key is not None:
        return check_key(key), check_key(key) + b"\0"
    start, end = prefix_range(prefix)
    # No UTF-8 has such a byte.
    return start, end or b"\xff"


def _find(prefix: str, after: str, limit: int) -> tuple[bytes, bytes, bytes, bytes, int]:
    """What the keys of a listing are found by."""
    start, end = prefix_range(prefix)
    return (check_key(after) if after else b"", start, end, end, min(max(limit, 0), _MOST_KEYS))


def _list(connection: Connection, *, find: tuple[bytes, bytes, bytes, bytes, int]) -> list[str]:
    return [key.decode() for (key,) in connection.execute(_LIST, find).fetchall()]


def _describe(connection: Connection, *, find: tuple[bytes, bytes, bytes, bytes, int]) -> list[StoredSession]:
    return [StoredSession(key.decode(), *rest) for key, *rest in connection.execute(_DESCRIBE, find).fetchall()]
