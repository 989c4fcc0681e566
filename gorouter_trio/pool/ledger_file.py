"""A ledger on disk: a line of JSON for each row, appended by a thread, and read back.

Rows are collected while the thread writes, so the disk is never waited for where requests are sent. What a killed
process had not handed to the system is lost: the rows of some milliseconds. A row that was looked up stands in the file
several times, under the same run and number, and the last one counts.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import trio

from .._contain import contain, contain_sync
from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_ledger_row, encode_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from ..config import LedgerConfig
    from ..wire.ledger import LedgerRow

__all__ = ["LedgerFile", "LedgerReader", "open_ledger_file"]

_MOST_LINES: Final = 100_000
_LINE_BYTES: Final = 400
_RETRY_S: Final = 1.0
_LAST_S: Final = 5.0


class LedgerFile:
    """A `LedgerSink` that appends to a file; several processes may append to one.

    Rows that come while the disk does not take any are kept, about 100,000 of them; `dropped` counts those beyond.
    Failures are told to `report`, which must not raise.
    """

    def __init__(self, path: str | os.PathLike[str], *, report: Callable[[Exception], None]) -> None:
        self.path = Path(path)
        self._report = report
        # Filled here and emptied by the thread that writes, which alone changes the bytes that are on their way.
        self._lines: deque[bytes] = deque()
        self._unwritten = bytearray()
        self._writing = threading.Lock()
        self._is_begun = False
        self._has_lines = trio.Event()
        self.dropped = 0
        self.written = 0

    def __repr__(self) -> str:
        return f"<LedgerFile {self.path}, {self.written} written, {len(self._lines)} waiting, {self.dropped} dropped>"

    def write(self, row: LedgerRow) -> None:
        """See `LedgerSink`."""
        if len(self._lines) + len(self._unwritten) // _LINE_BYTES >= _MOST_LINES:
            self.dropped += 1
            return
        self._lines.append(encode_json(row))
        if not self._has_lines.is_set():
            self._has_lines.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write rows as they come; when cancelled, first what is left, blocking for five seconds at most.

        Raises `ConfigError` at once when the file cannot be written.
        """
        try:
            await trio.to_thread.run_sync(self._append)
        except OSError as exc:
            raise ConfigError(f"ledger.path: {self.path}: {exc.strerror}") from exc
        except ValueError:
            # A name that no file can have: with a zero byte, or a surrogate.
            raise ConfigError(f"ledger.path: must be the name of a file, not {str(self.path)!r}") from None
        task_status.started()
        try:
            while True:
                await self._has_lines.wait()
                if not await self._flush():
                    await trio.sleep(_RETRY_S)
        finally:
            self._write_last()

    async def _flush(self) -> bool:
        """Append what there is; what the disk does not take stays for the next time. Cancelling stops no thread."""
        self._has_lines = trio.Event()
        await contain(lambda: trio.to_thread.run_sync(self._append, abandon_on_cancel=True), report=self._report)
        if self._unwritten:
            self._has_lines.set()
        return not self._unwritten

    def _write_last(self) -> None:
        """Append what is left, before the program ends.

        Bounded by real time and not by trio's clock, which may be a mock that does not wait for a disk.
        """
        errors: list[Exception] = []
        thread = threading.Thread(target=lambda: contain_sync(self._append, report=errors.append), daemon=True)
        thread.start()
        thread.join(_LAST_S)
        for error in errors:
            self._report(error)

    def _append(self) -> None:
        """Write what there is, in a thread; the rest is kept when the disk takes only a part of it."""
        with self._writing:
            while self._lines:
                self._unwritten += self._lines.popleft() + b"\n"
                self.written += 1
            # Append mode, so that the lines of several processes do not overwrite each other.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if self._unwritten and not self._is_begun:
                    self._is_begun = True
                    # What a crash has torn stays a line by itself, and takes none of ours along.
                    self._unwritten[:0] = b"\n" if _is_torn(self.path) else b""
                while self._unwritten:
                    count = os.write(descriptor, self._unwritten)
                    del self._unwritten[:count]
            finally:
                os.close(descriptor)


@asynccontextmanager
async def open_ledger_file(
    config: LedgerConfig, *, report: Callable[[Exception], None]
) -> AsyncIterator[LedgerFile | None]:
    """The file of the settings, with its task; None where they name none. Leaving writes what is left.

    Raises `ConfigError` when the file cannot be written.
    """
    if config.path is None:
        yield None
        return
    async with trio.open_nursery() as nursery:
        file = LedgerFile(config.path, report=report)
        await nursery.start(file.run)
        try:
            yield file
        finally:
            nursery.cancel_scope.cancel()


def _is_torn(path: Path) -> bool:
    """Whether a file ends in the middle of a line; what is no file, or cannot be read, does not."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            if not file.tell():
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False


class LedgerReader:
    """Reads the rows of a ledger file, each once and as it was written last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.unreadable = 0
        """Lines that are no rows, such as one torn by a crash."""

    def rows(self) -> Iterator[LedgerRow]:
        """The rows in the order in which they were settled; those that never were come last."""
        open_rows: dict[tuple[str, int], LedgerRow] = {}
        found: set[tuple[str, int]] = set()
        for line in self._file:
            row = self._read(line)
            # What somebody else has looked up while its own process did so as well stands there twice.
            if row is None or (row.run, row.row) in found:
                continue
            # One that was given up may have been looked up again later.
            if row.state in {"reconciling", "unreconciled"}:
                open_rows[row.run, row.row] = row
                continue
            open_rows.pop((row.run, row.row), None)
            if row.state == "reconciled":
                found.add((row.run, row.row))
            yield row
        yield from open_rows.values()

    def _read(self, line: bytes) -> LedgerRow | None:
        try:
            return decode_ledger_row(line) if line.strip() else None
        except DecodeError:
            self.unreadable += 1
            return None
