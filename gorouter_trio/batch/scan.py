"""An output that an earlier run has left: which rows it has, and the same file written anew without some, or in order.

Works on whole files and is run in threads.
"""

from __future__ import annotations

import os
import re
import stat
from array import array
from typing import TYPE_CHECKING

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_output_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..wire.batch import OutputLine

__all__ = ["FAILED", "FAILED_IN_DOUBT", "OutputScan", "read_line", "rewrite_output", "scan_output"]

_ANSWERED, FAILED, FAILED_IN_DOUBT = range(3)
"""What a line says of its row; in doubt is what may have been billed all the same."""

_ID = re.compile(rb'\{"id":"batch_req_(\d+)"')
_PIECE_BYTES = 1024 * 1024


class OutputScan:
    """What an output has: the number of each line's row, where the line begins, and how it ended.

    A row's number is that of its line in the input, or of its place where there are no lines: the `N` of its id.
    `size` is where the whole lines end. `in_doubt` are the rows whose lines say that they may have been billed more.
    """

    def __init__(self) -> None:
        self.numbers = array("q")
        self.offsets = array("q")
        self.failed = bytearray()
        self.in_doubt: list[int] = []
        self.size = 0

    @property
    def is_sorted(self) -> bool:
        """Whether the rows stand in the order of the input."""
        return all(a < b for a, b in zip(self.numbers, self.numbers[1:], strict=False))


def scan_output(path: str, take: Callable[[OutputLine], None]) -> OutputScan:
    """Read an output to the end of its last whole line, handing each line to `take`.

    Raises `ConfigError` for what is no output of a batch, and `OSError`.
    """
    scan = OutputScan()
    with open(path, "rb", buffering=_PIECE_BYTES) as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break
            row, line = read_line(text, f"{path}: line {number}")
            scan.numbers.append(row)
            scan.offsets.append(scan.size)
            scan.failed.append(_outcome(line))
            if line.maybe_billed:
                scan.in_doubt.append(row)
            scan.size += len(text)
            take(line)
    return scan


def rewrite_output(path: str, scan: OutputScan, *, keep: Callable[[int], bool], target: str) -> None:
    """Write the lines of the rows that are to be kept into `target`, in the order of the input, durably.

    Who may read the output may read that, and nobody else.
    """
    order = sorted(range(len(scan.numbers)), key=scan.numbers.__getitem__)
    ends = array("q", (*scan.offsets[1:], scan.size))
    with open(path, "rb") as source, open(target, "wb", buffering=_PIECE_BYTES, opener=_open_private) as copy:
        mode = stat.S_IMODE(os.fstat(source.fileno()).st_mode)
        if stat.S_IMODE(os.fstat(copy.fileno()).st_mode) != mode:
            os.fchmod(copy.fileno(), mode)
        copy.writelines(_lines(source.fileno(), scan, ends, [place for place in order if keep(place)]))
        copy.flush()
        os.fsync(copy.fileno())


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _outcome(line: OutputLine) -> int:
    if line.error is None:
        return _ANSWERED
    return FAILED_IN_DOUBT if line.maybe_billed else FAILED


def _lines(fd: int, scan: OutputScan, ends: array[int], places: list[int]) -> Iterator[bytes]:
    for place in places:
        start = scan.offsets[place]
        yield os.pread(fd, ends[place] - start, start)


def read_line(text: bytes, where: str) -> tuple[int, OutputLine]:
    """A line of an output and the number of its row; raises `ConfigError` for another, which stands at `where`."""
    found = _ID.match(text)
    try:
        line = decode_output_line(text)
    except DecodeError as exc:
        raise ConfigError(f"{where} is no line of a batch's output, so the job cannot go on: {exc.message}") from exc
    if found is None:
        raise ConfigError(f"{where} was not written by a job like this, so the job cannot go on")
    return int(found[1]), line
