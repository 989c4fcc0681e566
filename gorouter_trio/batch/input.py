"""A batch's input: a file of lines, read in pieces, as rows."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from .rows import BatchRow, RowProblem, RowReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["RowSource", "open_rows"]

_PIECE_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024 * 1024


class _LineSplitter:
    """Bytes in, lines out; a line above the limit comes as None. Sans I/O."""

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._begun: list[bytes] = []
        self._begun_bytes = 0

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that `data` ends, without their line ends."""
        *ended, rest = data.split(b"\n")
        for piece in ended:
            yield self._end_line(piece)
        self._begin_line(rest)

    def finish(self) -> Iterator[bytes | None]:
        """The last line, where it has no line end."""
        if self._begun_bytes:
            yield self._end_line(b"")

    def _begin_line(self, piece: bytes) -> None:
        self._begun_bytes += len(piece)
        if self._begun_bytes <= self._max_line_bytes:
            self._begun.append(piece)
        else:
            self._begun.clear()

    def _end_line(self, piece: bytes) -> bytes | None:
        self._begin_line(piece)
        line = b"".join(self._begun) if self._begun_bytes <= self._max_line_bytes else None
        self._begun.clear()
        self._begun_bytes = 0
        return line


class RowSource:
    """The rows of a file, one after the other: iterate it, in one task. Made by `open_rows`.

    Iterating raises `OSError` when reading fails. Each read from the file is a checkpoint; rows that
    were read together only check for cancellation.
    """

    def __init__(self, fd: int, *, max_line_bytes: int) -> None:
        self._fd = fd
        self._splitter = _LineSplitter(max_line_bytes)
        self._too_long = f"longer than {max_line_bytes} bytes"
        self._reader = RowReader()
        self._lines: Iterator[bytes | None] = iter(())
        self._ahead: deque[BatchRow | RowProblem] = deque()
        self._ended = False

    def __repr__(self) -> str:
        return f"<RowSource at line {self._reader.line_number}>"

    @property
    def line_number(self) -> int:
        """The line that was looked at last."""
        return self._reader.line_number

    def __aiter__(self) -> RowSource:
        return self

    async def __anext__(self) -> BatchRow | RowProblem:
        if await self.peek() is None:
            raise StopAsyncIteration
        return self._ahead.popleft()

    async def peek(self, count: int = 0) -> BatchRow | RowProblem | None:
        """The row that comes after `count` others, without taking it; None when there are not so many."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(self._ahead) <= count:
            row = self._parse_next()
            if row is not None:
                self._ahead.append(row)
            elif self._ended:
                return None
            else:
                await self._read()
        return self._ahead[count]

    def _parse_next(self) -> BatchRow | RowProblem | None:
        for line in self._lines:
            row = self._reader.skip(self._too_long) if line is None else self._reader.read(line)
            if row is not None:
                return row
        return None

    async def _read(self) -> None:
        # Through a thread, since a pipe waits for its writer; it costs as much as some twenty of the lines it brings.
        data = await trio.to_thread.run_sync(os.read, self._fd, _PIECE_BYTES, abandon_on_cancel=True)
        self._ended = not data
        self._lines = self._splitter.feed(data) if data else self._splitter.finish()


@asynccontextmanager
async def open_rows(path: str | int, *, max_line_bytes: int = _MAX_LINE_BYTES) -> AsyncIterator[RowSource]:
    """The rows of the file at `path`, or of an open descriptor, which stays open.

    A line above `max_line_bytes` is a problem and not kept in memory. Raises the `OSError`s of opening.
    """
    if isinstance(path, int):
        yield RowSource(path, max_line_bytes=max_line_bytes)
        return
    fd = await trio.to_thread.run_sync(_open, path, abandon_on_cancel=True)
    try:
        yield RowSource(fd, max_line_bytes=max_line_bytes)
    finally:
        os.close(fd)


def _open(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return fd
