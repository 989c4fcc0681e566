"""A batch's input as rows: JSON Lines, CSV or Parquet, compressed or not, of a file or a pipe, read in pieces."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING, Literal, Protocol

import trio

from ..errors import ConfigError
from ..transport.compression import FileDecoder
from .lines import CsvError, LineSplitter, RecordSplitter, Splitter, parse_record
from .parquet import ParquetRows
from .rows import BatchRow, RowProblem, RowReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from .settings import InputFormat
    from .template import Template

__all__ = ["PACKED_MAGIC", "LimitedRows", "RowSource", "find_format", "open_rows"]

_PIECE_BYTES = 256 * 1024
_MAX_LINE_BYTES = 64 * 1024 * 1024
_LOOKED_AT = 100
PACKED_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_PACKED = (".gz", ".gzip", ".zst", ".zstd")
_FORMATS: dict[str, InputFormat] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_DELIMITERS = (",", ";", "\t")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"


class _Rows(Protocol):
    """Where rows come from."""

    @property
    def bytes_parsed(self) -> float:
        """How much of the file the rows that were given out are, as it is on the disk."""

    async def read(self) -> Iterator[BatchRow | RowProblem | None] | None:
        """The next rows, None for blank lines; None at the end."""


class RowSource:
    """The rows of a file, one after the other: iterate it, in one task. Made by `open_rows`.

    Iterating raises `OSError` when reading fails, `DecodeError` for compressed data that are broken, `ConfigError` for
    a file that cannot be in its format at all, and `StoreError` when there is no room for the ids of many rows. Each
    read from the file is a checkpoint; rows that were read together only check for cancellation.
    """

    def __init__(self, rows: _Rows, reader: RowReader, *, size: int | None) -> None:
        self._rows = rows
        self._reader = reader
        self._size = size
        self._parsed: Iterator[BatchRow | RowProblem | None] = iter(())
        self._ahead: deque[BatchRow | RowProblem] = deque()
        self._ended = False

    def __repr__(self) -> str:
        return f"<RowSource at line {self._reader.line_number}>"

    @property
    def line_number(self) -> int:
        """The line that was looked at last."""
        return self._reader.line_number

    @property
    def fraction(self) -> float | None:
        """The part of the file that was read, 0 to 1; None where its size is unknown."""
        if self._ended and not self._ahead:
            return 1.0
        return min(self._rows.bytes_parsed / self._size, 1.0) if self._size else None

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

    async def check(self) -> None:
        """Look at the first rows; raises `ConfigError` where there are none, or none is in the format at all."""
        first: RowProblem | None = None
        for count in range(_LOOKED_AT):
            row = await self.peek(count)
            if row is None:
                break
            if isinstance(row, BatchRow) or row.is_json:
                return
            first = first or row
        raise ConfigError("is empty" if first is None else f"is not JSON Lines: {first.message}")

    def _parse_next(self) -> BatchRow | RowProblem | None:
        return next((row for row in self._parsed if row is not None), None)

    async def _read(self) -> None:
        parsed = await self._rows.read()
        self._ended = parsed is None
        self._parsed = parsed or iter(())


class LimitedRows:
    """The first rows of a source; all of them where `limit` is None."""

    def __init__(self, source: RowSource, limit: int | None) -> None:
        self._source = source
        self._left = limit

    def __aiter__(self) -> LimitedRows:
        return self

    async def __anext__(self) -> BatchRow | RowProblem:
        if self._left is not None:
            if not self._left:
                await trio.lowlevel.checkpoint()
                raise StopAsyncIteration
            self._left -= 1
        return await self._source.__anext__()


class _Text:
    """Lines or records of a descriptor."""

    def __init__(self, fd: int, splitter: Splitter, parser: _LineParser | _CsvParser) -> None:
        self._fd = fd
        self._splitter = splitter
        self._parse = parser.parse
        self._decoder: FileDecoder | None = None
        self._has_ended = False
        self._bytes_read = 0
        self._bytes_unpacked = 0
        self._bytes_split = 0

    @property
    def bytes_parsed(self) -> float:
        """By what the rows were unpacked from."""
        return self._bytes_read * self._bytes_split / self._bytes_unpacked if self._bytes_unpacked else 0.0

    async def read(self) -> Iterator[BatchRow | RowProblem | None] | None:
        if self._has_ended:
            await trio.lowlevel.checkpoint()
            return None
        # Through a thread, since a pipe waits for its writer; it costs as much as some twenty of the lines it brings.
        data = await trio.to_thread.run_sync(os.read, self._fd, _PIECE_BYTES, abandon_on_cancel=True)
        if not self._bytes_read:
            coding = next((coding for magic, coding in PACKED_MAGIC.items() if data.startswith(magic)), None)
            self._decoder = None if coding is None else FileDecoder(coding)
        self._bytes_read += len(data)
        self._has_ended = not data
        return self._rows_of(data) if data else self._last_rows()

    def _rows_of(self, data: bytes) -> Iterator[BatchRow | RowProblem | None]:
        for piece in (data,) if self._decoder is None else self._decoder.feed(data):
            self._bytes_unpacked += len(piece)
            for line in self._splitter.feed(piece):
                self._bytes_split += 1 if line is None else len(line) + 1
                yield self._parse(line)

    def _last_rows(self) -> Iterator[BatchRow | RowProblem | None]:
        if self._decoder is not None:
            self._decoder.finish()
        for line in self._splitter.finish():
            yield self._parse(line)


class _LineParser:
    """JSON Lines."""

    def __init__(self, reader: RowReader, max_line_bytes: int) -> None:
        self._reader = reader
        self._too_long = f"longer than {max_line_bytes} bytes"

    def parse(self, line: bytes | None) -> BatchRow | RowProblem | None:
        return self._reader.skip(self._too_long) if line is None else self._reader.read(line)


class _CsvParser:
    """CSV: the first record names the columns."""

    def __init__(self, reader: RowReader, max_line_bytes: int, *, delimiter: str | None) -> None:
        self._reader = reader
        self._too_long = f"longer than {max_line_bytes} bytes, or a quote before it is not closed"
        self._delimiter = delimiter
        self._columns: list[str] | None = None

    def parse(self, record: bytes | None) -> BatchRow | RowProblem | None:
        if self._columns is None:
            if record is not None and record.strip():
                self._columns = self._header(record)
            return None
        if record is None:
            return self._reader.skip(self._too_long, is_json=True)
        if not record.strip():
            return None
        try:
            return self._row(record, self._columns)
        except (CsvError, UnicodeDecodeError) as exc:
            return self._reader.skip(str(exc) if isinstance(exc, CsvError) else _not_utf8(exc), is_json=True)

    def _row(self, record: bytes, columns: list[str]) -> BatchRow | RowProblem:
        fields = parse_record(record.decode(), delimiter=self._delimiter or ",")
        if len(fields) != len(columns):
            raise CsvError(f"has {len(fields)} fields, and the header names {len(columns)}")
        return self._reader.read_record(dict(zip(columns, fields, strict=True)), is_text=True)

    def _header(self, record: bytes) -> list[str]:
        if record.startswith(_UTF16):
            raise ConfigError("the CSV is not UTF-8 but UTF-16; save the file as UTF-8")
        try:
            text = record.removeprefix(_BOM).decode()
            if self._delimiter is None:
                self._delimiter = max(_DELIMITERS, key=text.count)
            names = [name.strip() for name in parse_record(text, delimiter=self._delimiter)]
        except (CsvError, UnicodeDecodeError) as exc:
            reason = str(exc) if isinstance(exc, CsvError) else _not_utf8(exc)
            raise ConfigError(f"the header of the CSV cannot be read: {reason}") from exc
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None or "" in names:
            what = "a column without a name" if not double else f"two columns {double!r}"
            raise ConfigError(f"the header of the CSV has {what}")
        return names


class _Table:
    """Rows of a Parquet file."""

    def __init__(self, table: ParquetRows, reader: RowReader) -> None:
        self._table = table
        self._reader = reader

    @property
    def bytes_parsed(self) -> float:
        """Unknown."""
        return 0.0

    async def read(self) -> Iterator[BatchRow | RowProblem | None] | None:
        # Not abandoned: the file must not be closed while a thread reads it.
        records = await trio.to_thread.run_sync(self._table.read)
        return (self._reader.read_record(record) for record in records) if records else None


def find_format(path: str | int, given: InputFormat = "auto") -> InputFormat:
    """The format of the rows in `path`, as it was given or as the name says."""
    if given != "auto":
        return given
    if isinstance(path, int):
        return "jsonl"
    name = path.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return _FORMATS.get(os.path.splitext(name)[1], "jsonl")


@asynccontextmanager
async def open_rows(
    path: str | int,
    *,
    input_format: InputFormat = "auto",
    template: Template | None = None,
    duplicates: Literal["refuse", "suffix"] = "refuse",
    max_line_bytes: int = _MAX_LINE_BYTES,
) -> AsyncIterator[RowSource]:
    """The rows of the file at `path`, or of an open descriptor, which stays open.

    gzip and zstd are told by their first bytes. `template` makes requests of columns. An id that a row before has is
    refused, or with "suffix" becomes `id-2`, `id-3`. In CSV and Parquet, rows count from 1 without the header. A line
    above `max_line_bytes` is a problem and not kept in memory. Raises the `OSError`s of opening, and `ConfigError` for
    Parquet that is none, that is in no file, or without its extra.
    """
    with closing(RowReader(template=template, duplicates=duplicates)) as reader:
        kind = find_format(path, input_format)
        if kind == "parquet":
            opened = _open_table(path, reader)
        else:
            opened = _open_text(path, reader, kind=kind, max_line_bytes=max_line_bytes)
        async with opened as source:
            yield source


@asynccontextmanager
async def _open_text(
    path: str | int, reader: RowReader, *, kind: InputFormat, max_line_bytes: int
) -> AsyncIterator[RowSource]:
    fd = path if isinstance(path, int) else await trio.to_thread.run_sync(_open, path, abandon_on_cancel=True)
    try:
        yield RowSource(_text(fd, kind, reader, max_line_bytes=max_line_bytes), reader, size=_size(fd))
    finally:
        if not isinstance(path, int):
            os.close(fd)


def _text(fd: int, kind: InputFormat, reader: RowReader, *, max_line_bytes: int) -> _Text:
    if kind == "jsonl":
        return _Text(fd, LineSplitter(max_line_bytes), _LineParser(reader, max_line_bytes))
    delimiter = "\t" if kind == "tsv" else None
    return _Text(fd, RecordSplitter(max_line_bytes), _CsvParser(reader, max_line_bytes, delimiter=delimiter))


@asynccontextmanager
async def _open_table(path: str | int, reader: RowReader) -> AsyncIterator[RowSource]:
    if isinstance(path, int):
        raise ConfigError("Parquet cannot be read from a pipe; give the name of a file")
    os.close(await trio.to_thread.run_sync(_open, path))
    table = await trio.to_thread.run_sync(ParquetRows, path)
    try:
        yield RowSource(_Table(table, reader), reader, size=None)
    finally:
        table.close()


def _open(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    return fd


def _size(fd: int) -> int | None:
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte {error.object[error.start]:#04x} at column {error.start + 1}"
