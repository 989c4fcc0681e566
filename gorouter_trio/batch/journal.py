"""The journal of a job: which rows were sent and which have their answers, in a SQLite file beside the output.

Theory of operation. A row goes through three promises, in this order: it is marked *sent* before it is sent; its line
is on the disk, in the output; it is marked *done*. So a row that is marked as sent and not as done was in flight when
the process was killed, unless its line stands in the output already. Everybody who waits for a promise at the same time
waits for one commit: while one group of marks and lines is being written, the next one gathers.

Rows are numbered from 0 as they stand in the input, and are marked in that order: those that the journal knows are the
first so many of the input. Of each it keeps a digest, so that a job which is taken up again with another input notices.

With a row it also keeps its *doubts*: how many times it was sent, before the time that its state is about, without
anybody knowing what became of that. Each may have been charged, and a budget counts each.
"""

from __future__ import annotations

from array import array
from functools import partial
from typing import TYPE_CHECKING, Final

import trio
from msgspec import Struct

from ..errors import GorouterError
from ..transport.sqlite import SqliteFile
from ..wire.codec import decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..transport.sqlite import Connection, SchemaStep
    from .output import OutputFile

__all__ = [
    "DONE",
    "RELEASED",
    "SENT",
    "UNKNOWN",
    "JournalState",
    "Recorder",
    "RowMark",
    "journal_file",
    "load_journal",
    "mark_rows",
    "write_facts",
]

_APPLICATION_ID: Final = 0x67726A62
_SCHEMA: tuple[SchemaStep, ...] = (
    (
        "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE rows (row INTEGER PRIMARY KEY, state INTEGER NOT NULL, digest INTEGER NOT NULL)",
        "CREATE TABLE parked (row INTEGER PRIMARY KEY, line BLOB NOT NULL)",
    ),
    (
        "CREATE TABLE parts (part INTEGER PRIMARY KEY, state TEXT NOT NULL, batch_id TEXT NOT NULL,"
        " model TEXT NOT NULL, rows BLOB NOT NULL, submitted_at REAL NOT NULL)",
    ),
)
UNKNOWN, SENT, DONE, RELEASED = range(4)
"""What is known of a row: nothing; it was sent; its answer is in the output or parked; it is known that it was not
sent."""

_MARK: Final = (
    "INSERT INTO rows (row, state, digest) VALUES (?, ?, ?) ON CONFLICT (row) DO UPDATE SET state = excluded.state"
)
# What the number of a state has above its two bits.
_DOUBTS: Final = 2
_MOST_DOUBTS: Final = 255
# Of a row that is to be run again as one in flight, one of the doubts is what its new state says.
_CHANGE: Final = "UPDATE rows SET state = ? | (max((state >> 2) - ?, 0) << 2) WHERE row = ?"
_FACT: Final = "INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)"


class RowMark(Struct, frozen=True):
    """A row by its number, the digest of its request, 64 bits with a sign, and how often it was sent before in vain."""

    row: int
    digest: int
    doubts: int = 0

    def values(self, state: int) -> tuple[int, int, int]:
        """The mark as the journal has it."""
        return self.row, state | min(self.doubts, _MOST_DOUBTS) << _DOUBTS, self.digest


class JournalState:
    """What a journal says at the beginning of a run: a state and a digest a row, lines that are parked, and facts.

    `doubts` are those of rows that have any, without the one that being in flight is.
    """

    def __init__(self) -> None:
        self.states = bytearray()
        self.doubts: dict[int, int] = {}
        self.digests = array("q")
        self.parked: dict[int, bytes] = {}
        self.facts: dict[str, object] = {}

    @property
    def rows(self) -> int:
        """How many rows it knows, the first of the input."""
        return len(self.states)

    def state(self, row: int) -> int:
        """What is known of a row."""
        return self.states[row] if row < len(self.states) else UNKNOWN

    def unknown_sends(self, row: int) -> int:
        """How many times the row was sent without anybody knowing what became of that."""
        return self.doubts.get(row, 0) + (self.state(row) == SENT)


class _Group:
    """Marks and lines that are made durable together."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int, int]] = []
        self.lines: list[bytes] = []
        self.parked: list[tuple[int, bytes]] = []
        self.unparked: list[tuple[int]] = []
        self.durable = trio.Event()

    def apply(self, connection: Connection) -> None:
        """Write what belongs into the journal; in a transaction."""
        connection.executemany(_MARK, self.marks)
        if self.parked:
            connection.executemany("INSERT OR REPLACE INTO parked (row, line) VALUES (?, ?)", self.parked)
        if self.unparked:
            connection.executemany("DELETE FROM parked WHERE row = ?", self.unparked)


class Recorder:
    """Keeps the promises of one run: `run` in a nursery, and any number of tasks that call the others.

    Without a `file` there are only lines, and nothing waits for the disk. What fails while it writes ends `run`,
    after `on_failure` was told.
    """

    def __init__(self, output: OutputFile, file: SqliteFile | None, *, on_failure: Callable[[], None]) -> None:
        self._output = output
        self._file = file
        self._on_failure = on_failure
        self._group = _Group()
        self._wake = trio.Event()
        self._is_closing = False
        self.ended = trio.Event()
        self.error: OSError | GorouterError | None = None
        self.commits = 0

    async def begin(self, mark: RowMark) -> None:
        """The row is about to be sent; returns when that is durable. A cancel takes the mark back."""
        if self._file is None:
            return
        try:
            await self._join(mark.values(SENT))
        except BaseException:
            self.release(mark)
            raise

    async def begin_all(self, marks: Sequence[RowMark]) -> None:
        """Rows are about to be sent together; returns when that is durable."""
        if self._file is not None and marks:
            self._group.marks.extend(mark.values(SENT) for mark in marks[1:])
            await self._join(marks[0].values(SENT))

    def release(self, mark: RowMark) -> None:
        """The row was not sent after all; one that had been sent before is in doubt as it was."""
        if self._file is not None:
            before = RowMark(mark.row, mark.digest, mark.doubts - 1) if mark.doubts else mark
            self._group.marks.append(before.values(SENT if mark.doubts else RELEASED))
            self._wake.set()

    async def finish(self, mark: RowMark, lines: Sequence[bytes], *, unparked: Sequence[int] = ()) -> None:
        """The row has its answer, which `lines` bring into the output, with those of rows that were parked."""
        group = self._group
        group.lines.extend(lines)
        group.unparked.extend((row,) for row in unparked)
        await self._join(mark.values(DONE))

    async def park(self, mark: RowMark, line: bytes) -> None:
        """The row has its answer, whose place in the output is not there yet."""
        self._group.parked.append((mark.row, line))
        await self._join(mark.values(DONE))

    def emit(self, lines: Sequence[bytes], *, unparked: Sequence[int]) -> None:
        """Lines that were parked get into the output, behind all that were given before. Never waits."""
        group = self._group
        group.lines.extend(lines)
        group.unparked.extend((row,) for row in unparked)
        self._wake.set()

    async def _join(self, mark: tuple[int, int, int]) -> None:
        group = self._group
        group.marks.append(mark)
        self._wake.set()
        await group.durable.wait()

    def close(self) -> None:
        """Write what has gathered, then end `run`."""
        self._is_closing = True
        self._wake.set()

    async def run(self) -> None:
        """Write group after group, until closed. Returns with `error` set where writing fails."""
        try:
            await self._write_groups()
        finally:
            self.ended.set()

    async def _write_groups(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            group, self._group = self._group, _Group()
            try:
                await self._write(group)
            except (OSError, GorouterError) as exc:
                self.error = exc
                self._on_failure()
                return
            group.durable.set()
            if self._is_closing and not self._wake.is_set():
                return

    async def _write(self, group: _Group) -> None:
        if group.lines:
            await self._output.write(b"".join(group.lines))
            if self._file is not None:
                await self._output.sync()
        if self._file is not None and (group.marks or group.unparked):
            self.commits += 1
            await self._file.write(group.apply, subject="")


def journal_file(path: str) -> SqliteFile:
    """The journal at `path`; whoever made it closes it."""
    return SqliteFile(path, _SCHEMA, application_id=_APPLICATION_ID)


async def load_journal(file: SqliteFile) -> JournalState:
    """What the journal says; raises `StoreError`."""
    return await file.read(_load, subject="")


async def write_facts(file: SqliteFile, facts: Mapping[str, object]) -> None:
    """Remember facts about the job, each any JSON value; raises `StoreError`."""
    rows = [(name, encode_json(value).decode()) for name, value in facts.items()]
    await file.write(lambda connection: _drop(connection.executemany(_FACT, rows)), subject="")


async def mark_rows(file: SqliteFile, rows: Sequence[int], *, state: int, facts: Mapping[str, object]) -> None:
    """Change what is known of rows, and facts with that; raises `StoreError`."""
    await file.write(partial(_mark_rows, rows=rows, state=state, facts=facts), subject="")


def _mark_rows(connection: Connection, *, rows: Sequence[int], state: int, facts: Mapping[str, object]) -> None:
    connection.executemany(_CHANGE, ((state, state == SENT, row) for row in rows))
    connection.executemany("DELETE FROM parked WHERE row = ?", ((row,) for row in rows))
    connection.executemany(_FACT, [(name, encode_json(value).decode()) for name, value in facts.items()])


def _load(connection: Connection) -> JournalState:
    state = JournalState()
    for row, mark, digest in connection.execute("SELECT row, state, digest FROM rows ORDER BY row"):
        # Rows are marked in order, and all of a group or none: there is no gap, except in a file of something else.
        while len(state.states) < row:
            state.states.append(UNKNOWN)
            state.digests.append(0)
        state.states.append(mark & 3)
        state.digests.append(digest)
        if doubts := mark >> _DOUBTS:
            state.doubts[row] = doubts
    state.parked = dict(connection.execute("SELECT row, line FROM parked").fetchall())
    state.facts = {name: decode_json(value) for name, value in connection.execute("SELECT name, value FROM facts")}
    return state


def _drop(_result: object) -> None:
    return None
