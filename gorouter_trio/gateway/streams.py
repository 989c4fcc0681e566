"""Byte streams with a guard: what a peer has sent before anybody looked, what it may send, and how long it may take."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from .frames import FrameMeter, Violation

if TYPE_CHECKING:
    from .config import GatewayLimits

__all__ = ["GuardedStream", "PrefixedStream", "is_upgrade", "read_head"]

_MAX_HEAD: Final = 16_384
_RECEIVE_BYTES: Final = 16_384
_UPGRADE: Final = re.compile(rb"\r\nupgrade[ \t]*:[ \t]*websocket[ \t]*\r\n", re.IGNORECASE)
# A line may stand empty before a request (RFC 9112 section 2.2); other control characters may not.
_NO_TEXT: Final = re.compile(rb"[^\r\n\x20-\x7e]")
_LINGER_S: Final = 1.0
_LAST_FRAME_S: Final = 0.3
_MAX_REASON: Final = 123


async def read_head(stream: trio.abc.Stream) -> bytes:
    """What a client sends until the end of its first request's head, or 16 KiB, or its end of file.

    What cannot become one, such as TLS where none is spoken, is not waited for: it has its answer at once.
    """
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD and not _NO_TEXT.match(head):
        received = await stream.receive_some(_MAX_HEAD)
        if not received:
            break
        head += received
    return head


def is_upgrade(head: bytes) -> bool:
    """Whether the request asks for a WebSocket."""
    end = head.find(b"\r\n\r\n")
    return end >= 0 and _UPGRADE.search(head[: end + 2]) is not None


class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream of which the first bytes were read already, and the address at its other end."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes, *, address: str = "") -> None:
        self._stream = stream
        self._prefix = prefix
        self.address = address

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """The bytes that were read, and then what comes."""
        if not self._prefix:
            return await self._stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        size = len(self._prefix) if max_bytes is None else max_bytes
        data, self._prefix = self._prefix[:size], self._prefix[size:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send."""
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Say that nothing more comes, where the stream can."""
        if isinstance(self._stream, trio.abc.HalfCloseableStream):
            await self._stream.send_eof()

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()


class GuardedStream(PrefixedStream):
    """The stream of a WebSocket connection, before the library: counts what comes, and gives no send for ever.

    A violation closes the connection right here: with a close frame, a moment for the client to read it, and an error
    to the library, for which the connection is broken then. `violation` says what it was.
    """

    def __init__(self, stream: trio.abc.Stream, prefix: bytes, *, address: str, limits: GatewayLimits) -> None:
        # What follows the head of the upgrade are frames.
        end = prefix.index(b"\r\n\r\n") + 4
        super().__init__(stream, prefix[end:], address=address)
        now = trio.current_time()
        self._head = prefix[:end]
        self._limits = limits
        self._meter = FrameMeter(limits, now=now)
        self._is_sending = False
        self._is_closing = False
        self._sending: trio.CancelScope | None = None
        self.violation: Violation | None = None
        self.received_at = now

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """What comes, if it may."""
        if self._is_closing:
            raise trio.ClosedResourceError
        if self._head:
            await trio.lowlevel.checkpoint()
            head, self._head = self._head, b""
            return head
        deadline = self._meter.deadline()
        if deadline == math.inf:
            data = await super().receive_some(_RECEIVE_BYTES)
        else:
            with trio.move_on_at(deadline) as scope:
                data = await super().receive_some(_RECEIVE_BYTES)
            if scope.cancelled_caught:
                raise await self._closed(Violation(1008, "a message that comes too slowly"))
        now = self.received_at = trio.current_time()
        violation = self._meter.feed(data, now)
        if violation is not None:
            raise await self._closed(violation)
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, or be broken after the time for a send."""
        if self._is_closing:
            raise trio.BrokenResourceError("the connection is being closed")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._is_sending = True
        # Who is cancelled ends its frame first, or a close frame could not follow it.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._limits.send_s) as scope:
            self._sending = scope
            await super().send_all(data)
        self._sending = None
        if scope.cancelled_caught:
            # Part of a frame may have gone: nothing can follow it.
            self.violation = self.violation or Violation(4413, "the client does not read")
            await trio.aclose_forcefully(self._stream)
            raise trio.BrokenResourceError("the client does not read")
        self._is_sending = False

    async def aclose(self) -> None:
        """The library is done with it: nothing more goes through, but a close frame that it owes; see `close_with`."""
        self._is_closing = True
        await trio.lowlevel.checkpoint()

    async def close_with(self, violation: Violation) -> None:
        """Send a close frame, wait a moment for the client to read it, and close; goes on where it was cut off."""
        self.violation = self.violation or violation
        self._is_closing = True
        with trio.move_on_after(_LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if not self._is_sending:
                # Once only, and nothing after it, even when this is cut off.
                self._is_sending = True
                await self._stream.send_all(_close_frame(violation))
            await self.send_eof()
            # Unread bytes would make the close a reset, which overtakes the close frame.
            while await self._stream.receive_some(_RECEIVE_BYTES):
                pass
        await self.abort()

    def hurry(self) -> None:
        """The connection ends: a frame that is on its way has a moment left."""
        if self._sending is not None:
            self._sending.deadline = min(self._sending.deadline, trio.current_time() + _LAST_FRAME_S)

    async def abort(self) -> None:
        """Close the stream beneath, at once."""
        self._is_closing = True
        await trio.aclose_forcefully(self._stream)

    async def _closed(self, violation: Violation) -> trio.BrokenResourceError:
        await self.close_with(violation)
        return trio.BrokenResourceError(violation.reason)


def _close_frame(violation: Violation) -> bytes:
    # Half a character would make the frame one that no client can read, with the code in it.
    reason = violation.reason.encode("utf-8", "replace")[:_MAX_REASON].decode("utf-8", "ignore").encode()
    return bytes((0x88, 2 + len(reason))) + violation.code.to_bytes(2, "big") + reason
