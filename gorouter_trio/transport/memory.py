"""A pair of connected streams inside one process, for simulated networks and virtual time.

The pair behaves like a loopback TCP connection: each direction has a bounded buffer, `send_all` blocks while the peer's
buffer is full, data sent before a close is still readable, and *closed by us* (`trio.ClosedResourceError`) stays apart
from *broken by them* (`trio.BrokenResourceError`). There are no sockets and no threads, so it runs on a mock clock.
"""

from __future__ import annotations

from typing import final

import trio

__all__ = [
    "MemoryStream",
    "memory_stream_pair",
]

_DEFAULT_CAPACITY_BYTES = 65_536


class _Pipe:
    """One direction: a bounded byte buffer with one reader and one writer, each parked in its own lot."""

    __slots__ = ("buffer", "capacity", "readable", "reader_closed", "writable", "writer_done")

    def __init__(self, capacity: int) -> None:
        self.buffer = bytearray()
        self.capacity = capacity
        self.writer_done = False
        self.reader_closed = False
        self.readable = trio.lowlevel.ParkingLot()
        self.writable = trio.lowlevel.ParkingLot()

    def put(self, data: memoryview) -> int:
        """Take as much of *data* as fits and say how much that was."""
        taken = min(self.capacity - len(self.buffer), len(data))
        if taken > 0:
            self.buffer += data[:taken]
            self.readable.unpark_all()
        return taken

    def take(self, max_bytes: int | None) -> bytes:
        if max_bytes is None or max_bytes >= len(self.buffer):
            data = bytes(self.buffer)
            self.buffer.clear()
        else:
            data = bytes(self.buffer[:max_bytes])
            del self.buffer[:max_bytes]
        self.writable.unpark_all()
        return data

    def end_writing(self) -> None:
        self.writer_done = True
        self.readable.unpark_all()
        self.writable.unpark_all()

    def end_reading(self) -> None:
        self.reader_closed = True
        self.buffer.clear()
        self.readable.unpark_all()
        self.writable.unpark_all()


@final
class MemoryStream(trio.abc.HalfCloseableStream):
    """One end of `memory_stream_pair`. The owner closes it; `aclose` is idempotent and closes even when cancelled.

    A cancelled `send_all` may have sent a part of its data. A cancelled `receive_some` has taken nothing.
    """

    __slots__ = ("_closed", "_incoming", "_outgoing", "_receiving", "_sending")

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self._sending = False
        self._receiving = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "eof sent" if self._outgoing.writer_done else "open"
        return f"<MemoryStream {state}, {len(self._incoming.buffer)} bytes to read>"

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called on this end."""
        return self._closed

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what is there, at most *max_bytes*, waiting while there is nothing; `b""` is the peer's end of file.

        Raises `trio.ClosedResourceError` when this end is closed, also while waiting, and `trio.BusyResourceError` when
        another task is receiving.
        """
        _check_max_bytes(max_bytes)
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            pipe = self._incoming
            while not (self._closed or pipe.buffer or pipe.writer_done):
                await pipe.readable.park()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            return pipe.take(max_bytes)
        finally:
            self._receiving = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of *data*, waiting while the peer's buffer is full.

        Raises `trio.ClosedResourceError` when this end is closed or at its end of file, `trio.BrokenResourceError` when
        the peer has closed, `trio.BusyResourceError` when another task is sending.
        """
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            self._check_writable()
            pipe = self._outgoing
            rest = memoryview(data)
            while rest := rest[pipe.put(rest) :]:
                await pipe.writable.park()
                self._check_writable()
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the peer's buffer has room; raises like `send_all`."""
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            self._check_writable()
            pipe = self._outgoing
            while len(pipe.buffer) >= pipe.capacity:
                await pipe.writable.park()
                self._check_writable()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the peer that no more data comes; receiving goes on. Idempotent."""
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            self._outgoing.end_writing()
        finally:
            self._sending = False

    async def aclose(self) -> None:
        """Close this end: the peer reads what was sent and then end of file, and its sends break."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """`aclose` without a checkpoint, for cleanup in cancelled tasks."""
        if not self._closed:
            self._closed = True
            self._outgoing.end_writing()
            self._incoming.end_reading()

    def _begin_sending(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True

    def _check_writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._outgoing.writer_done:
            raise trio.ClosedResourceError("this stream sent its end of file")
        if self._outgoing.reader_closed:
            raise trio.BrokenResourceError("the peer closed the stream")


def memory_stream_pair(capacity_bytes: int = _DEFAULT_CAPACITY_BYTES) -> tuple[MemoryStream, MemoryStream]:
    """Return two connected ends; *capacity_bytes* is the size of the buffer of each direction."""
    if capacity_bytes < 1:
        raise ValueError("capacity_bytes must be at least 1")
    one_way, other_way = _Pipe(capacity_bytes), _Pipe(capacity_bytes)
    return MemoryStream(one_way, other_way), MemoryStream(other_way, one_way)


def _check_max_bytes(max_bytes: int | None) -> None:
    if max_bytes is None:
        return
    if not isinstance(max_bytes, int):
        raise TypeError("max_bytes must be an int or None")
    if max_bytes < 1:
        raise ValueError("max_bytes must be at least 1")
