"""A batch's output: one JSON line a result, in the form of OpenAI's Batch API, written as results come."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import msgspec
import trio
from msgspec import Struct

from ..errors import ApiError, BadRequestError, GorouterError
from ..wire.codec import encode_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .runner import BatchResult

__all__ = ["OutputFile", "OutputMode", "encode_row", "error_code", "open_output", "sync_directory"]

_LINE_ENDS = bytes.maketrans(b"\r\n", b"  ")
_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


class _Response(Struct, frozen=True):
    status_code: int
    request_id: str | None
    body: msgspec.Raw


class _Error(Struct, frozen=True, kw_only=True):
    """`code` is a text in every row, so that tools which want one type a column can read the file."""

    code: str
    message: str
    status: int | None
    maybe_billed: bool
    attempts: int
    retry_after_s: float | None
    generation_id: str | None
    line: int | None
    type: str
    cost_usd: Decimal | None


class _Row(Struct, frozen=True):
    """`maybe_billed` says that the request may have been charged more than its answer says, `cached` that the answer
    was there already and cost nothing."""

    id: str
    custom_id: str | None
    response: _Response | None
    error: _Error | None
    maybe_billed: bool
    cached: bool


def encode_row(result: BatchResult) -> bytes:
    """The line for one result, with its line end.

    The reply's JSON stands in it as it came. A request that the API refused with a status of its own
    has a `response` with that status and the error as its body; every failed one has an `error`.
    """
    number = result.index if result.line_number is None else result.line_number
    response = _error_response(result.error) if result.error is not None else _response(result)
    error = None if result.error is None else _error(result)
    maybe_billed = result.maybe_billed
    row = _Row(f"batch_req_{number}", result.custom_id, response, error, maybe_billed, result.cached)
    return encode_json(row) + b"\n"


def _response(result: BatchResult) -> _Response | None:
    if result.result is None or result.body is None:
        return None
    return _Response(200, result.result.generation_id, msgspec.Raw(_in_one_line(result.body)))


def _in_one_line(body: bytes) -> bytes:
    """The same JSON without line ends, which stand between its tokens only, and surely UTF-8."""
    if b"\n" in body or b"\r" in body:
        body = body.translate(_LINE_ENDS)
    if body.isascii():
        return body
    # The decoder does not look into the strings of fields that it does not know.
    return body.decode(errors="replace").encode()


def _error_response(error: GorouterError) -> _Response | None:
    # An error inside a 200 gets none: whoever looks for status 200 looks for an answer.
    if not isinstance(error, ApiError) or error.status < 300 or _is_unsent(error):
        return None
    body = {"error": {"message": error.message, "code": error.code, "metadata": dict(error.metadata)}}
    return _Response(error.status, error.generation_id, msgspec.Raw(encode_json(body)))


def _error(result: BatchResult) -> _Error:
    error = cast("GorouterError", result.error)
    from_api = isinstance(error, ApiError) and not _is_unsent(error)
    return _Error(
        code=error_code(error),
        message=error.message,
        status=error.status if isinstance(error, ApiError) and from_api else None,
        maybe_billed=result.maybe_billed,
        attempts=error.attempts,
        retry_after_s=error.retry_after_s if isinstance(error, ApiError) else None,
        generation_id=error.generation_id,
        line=result.line_number,
        type=type(error).__name__,
        cost_usd=_cost_of(error, is_known=not result.maybe_billed),
    )


def _cost_of(error: GorouterError, *, is_known: bool) -> Decimal | None:
    """What a request that failed has cost: that of the answers before its end; None when nobody knows."""
    if error.partial is not None:
        return error.partial.cost
    # What the API refuses is not charged; an error inside a reply comes after a generation has begun.
    was_begun = isinstance(error, ApiError) and error.status < 300 and not _is_unsent(error)
    return Decimal(0) if is_known and not was_begun else None


def _is_unsent(error: GorouterError) -> bool:
    """Whether the request was refused here, for its form."""
    return isinstance(error, BadRequestError) and error.attempts == 0


def error_code(error: GorouterError) -> str:
    """A short name for what went wrong: the API's own code, else a word made from the kind of error."""
    if _is_unsent(error):
        return "invalid_request"
    if isinstance(error, ApiError):
        return str(error.code)
    return _WORD.sub("_", type(error).__name__.removesuffix("Error")).lower()


class OutputFile:
    """Where rows are written; made by `open_output`. Used by one task at a time.

    Every write is whole lines and goes straight to the system, so that a killed process leaves whole
    lines except perhaps the last.
    """

    def __init__(self, fd: int, *, path: str | None = None) -> None:
        self.path = path
        self._fd = fd
        status = os.fstat(fd)
        self.is_file = stat.S_ISREG(status.st_mode)
        self.size = status.st_size if self.is_file else 0

    async def write(self, lines: bytes) -> None:
        """Write whole lines; raises `OSError`. A regular file is cut back to whole lines when it is full."""
        if self.is_file:
            # A row of 1 kB into a file was measured at 2.5 µs, and at 130 µs through a thread.
            await trio.lowlevel.checkpoint()
            self._write_to_file(lines)
        else:
            # A pipe or a terminal waits for its reader, who may never come.
            await trio.to_thread.run_sync(_write_all, self._fd, lines, abandon_on_cancel=True)

    async def sync(self) -> None:
        """Wait until what was written is on the disk; raises `OSError`."""
        if self.is_file:
            await trio.to_thread.run_sync(os.fdatasync, self._fd)
        else:
            await trio.lowlevel.checkpoint()

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes, and write behind them; raises `OSError`."""
        os.ftruncate(self._fd, size)
        os.lseek(self._fd, size, os.SEEK_SET)
        self.size = size

    def replace(self, path: str) -> None:
        """Put the file at `path`, whose name goes, in the place of this one, and write behind its end.

        A link to this one stays.
        """
        own = os.path.realpath(cast("str", self.path))
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(fd, path)
            os.fsync(fd)
            os.replace(path, own)
            sync_directory(own)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd = fd
        self.cut(os.fstat(fd).st_size)

    def close(self) -> None:
        """Close the file, where it has a name."""
        if self.path is not None:
            os.close(self._fd)

    def _write_to_file(self, lines: bytes) -> None:
        try:
            _write_all(self._fd, lines)
        except OSError:
            with suppress(OSError):
                self.cut(self.size)
            raise
        self.size += len(lines)


def _write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_directory(path: str) -> None:
    """Make the name of a file durable."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


OutputMode: TypeAlias = Literal["new", "overwrite", "append"]
"""What becomes of a file that has something in it: it is refused, emptied, or written behind its end."""


@asynccontextmanager
async def open_output(path: str | int, *, mode: OutputMode = "new") -> AsyncIterator[OutputFile]:
    """The file at `path`; or an open descriptor, which stays open.

    Raises `FileExistsError` for a file with something in it where it has to be new, `BlockingIOError` for one that
    another process writes to in the same way, and the `OSError`s of opening. Devices and pipes are written to as they
    are.
    """
    if isinstance(path, int):
        yield OutputFile(path)
        return
    fd = await trio.to_thread.run_sync(_open, path, mode, abandon_on_cancel=True)
    output = OutputFile(fd, path=path)
    try:
        yield output
    finally:
        output.close()


def _open(path: str, mode: OutputMode) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666) if _may_read(path) else os.open(path, os.O_WRONLY)
    try:
        _prepare(fd, path, mode)
    except OSError:
        os.close(fd)
        raise
    return fd


def _may_read(path: str) -> bool:
    """Whether it is a file or will be one: opening a pipe for both directions would not wait for its reader."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def _prepare(fd: int, path: str, mode: OutputMode) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return
    _lock(fd, path)
    if mode == "append":
        os.lseek(fd, 0, os.SEEK_END)
        return
    if status.st_size and mode == "new":
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.ftruncate(fd, 0)


def _lock(fd: int, path: str) -> None:
    """Keep others out until the file is closed, by a kill as well."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise BlockingIOError(exc.errno, "another process is writing to it", path) from exc
