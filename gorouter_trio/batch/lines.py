"""Bytes into lines, and into the records of CSV. Sans I/O."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CsvError", "LineSplitter", "RecordSplitter", "Splitter", "parse_record"]


class CsvError(Exception):
    """A record of CSV that is broken; the text says how."""


class Splitter(Protocol):
    """Cuts a stream of bytes; a piece above the limit comes as None."""

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The pieces that `data` ends, without their line ends."""

    def finish(self) -> Iterator[bytes | None]:
        """The last piece, where it has no line end."""


class LineSplitter:
    """Bytes in, lines out; a line above the limit comes as None."""

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


class RecordSplitter:
    """Lines joined to records of CSV (RFC 4180): inside quotes a line end is text.

    A quote inside quotes is written twice, so that a record has ended when its quotes are even in number.
    """

    def __init__(self, max_record_bytes: int) -> None:
        self._lines = LineSplitter(max_record_bytes)
        self._max_record_bytes = max_record_bytes
        self._begun: list[bytes] = []
        self._begun_bytes = 0
        self._is_quoted = False

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The records that `data` ends."""
        for line in self._lines.feed(data):
            yield from self._take(line)

    def finish(self) -> Iterator[bytes | None]:
        """What is left, with a quote that nobody has closed where that is so."""
        for line in self._lines.finish():
            yield from self._take(line)
        if self._begun:
            yield b"\n".join(self._begun)

    def _take(self, line: bytes | None) -> Iterator[bytes | None]:
        if line is None or self._begun_bytes + len(line) > self._max_record_bytes:
            self._reset()
            yield None
            return
        self._begun.append(line)
        self._begun_bytes += len(line) + 1
        self._is_quoted ^= line.count(b'"') % 2 == 1
        if not self._is_quoted:
            record = b"\n".join(self._begun)
            self._reset()
            yield record

    def _reset(self) -> None:
        self._begun.clear()
        self._begun_bytes = 0
        self._is_quoted = False


def parse_record(record: str, *, delimiter: str) -> list[str]:
    """The fields of one record; raises `CsvError`."""
    # Where a record may end was decided before: here its line ends are text.
    record = record.removesuffix("\r")
    if len(record) > csv.field_size_limit():
        # That limit is one of the whole process, and not ours to change.
        return list(_split(record, delimiter))
    try:
        rows = list(csv.reader([record], delimiter=delimiter, strict=True))
    except csv.Error as exc:
        reason = "a quote is not closed" if record.count('"') % 2 else str(exc)
        raise CsvError(f"not CSV: {reason}") from exc
    return rows[0] if rows else []


def _split(record: str, delimiter: str) -> Iterator[str]:
    """The same as the reader of `csv` finds, with fields of any length."""
    at = 0
    while True:
        if record.startswith('"', at):
            end = _end_of_quoted(record, at + 1)
            yield record[at + 1 : end].replace('""', '"')
            at = end + 1
        else:
            end = record.find(delimiter, at)
            field = record[at:] if end < 0 else record[at:end]
            if "\r" in field or "\n" in field:
                raise CsvError("not CSV: a line end outside of quotes")
            yield field
            at += len(field)
        if at == len(record):
            return
        if not record.startswith(delimiter, at):
            raise CsvError(f"not CSV: {delimiter!r} expected after '\"'")
        at += 1


def _end_of_quoted(record: str, at: int) -> int:
    """Where the quote is that closes a field; one that is written twice is text."""
    while (end := record.find('"', at)) >= 0:
        if not record.startswith('"', end + 1):
            return end
        at = end + 2
    raise CsvError("not CSV: a quote is not closed")
