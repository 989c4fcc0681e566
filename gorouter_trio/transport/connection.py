"""HTTP/1.1 on a trio stream, parsed by httptools (llhttp).

Theory of operation. An `HttpConnection` belongs to one task at a time, which writes a request and
reads its reply; there is no pool here and no lock. Deadlines are the caller's cancel scopes. The
rule that keeps it safe is short: a connection is used again only if the last reply ended exactly
where the parser says, the peer wants to keep it, and nothing else arrived. Everything else, cancels
included, closes it.

httptools leaves some things to us: bodies that end with the connection, informational (1xx) replies,
replies to HEAD, a second reply that nobody asked for, the size of headers, and keep-alive, which may
only be read inside its callbacks.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import httptools
import trio

from ..errors import DecodeError, StreamBrokenError
from .compression import make_decoder
from .streams import SocketStream, bottom, quiet_check, reason_of

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from .compression import BodyDecoder
    from .http import ConnectionLimits, RequestHead

__all__ = ["HttpConnection"]

_READ_BYTES = 64 * 1024
# A longer request does not surely fit into the kernel's buffers, so its refusal has to be looked out for.
_LONG_REQUEST_BYTES = 64 * 1024
_LAST_STATUS = 599
# What a refusal says is read before the sending ends, as far as it comes at once and is no more than an error says.
_REFUSAL_S = 2.0
_REFUSAL_BYTES = 64 * 1024
# A peer that ends a used connection without a byte of a reply has most likely closed it before the request came, if
# that shows within a round trip, generously: this, or twice what connecting took. Later it may have worked for the
# request, which then is not free to be sent again.
_FOUND_CLOSED_S = 0.1


class HttpConnection:
    """One HTTP/1.1 connection.

    The owner calls `start`, then `receive_all` or `receive_some` to the end. Raises
    `StreamBrokenError` when the connection ends too early and `DecodeError` when what arrives is
    not HTTP or over the limits; after any error, and after a cancel, it must be closed.
    """

    __slots__ = (
        "_body_bytes",
        "_chunks",
        "_coding",
        "_decoder",
        "_decoding",
        "_found_closed_s",
        "_head_bytes",
        "_head_complete",
        "_header_count",
        "_is_bodiless",
        "_is_used",
        "_keep_alive",
        "_limits",
        "_now",
        "_parser",
        "_quiet",
        "_socket",
        "_started_at",
        "_stream",
        "_unexpected",
        "_watch_from",
        "headers",
        "is_closed",
        "is_complete",
        "is_sent",
        "on_body",
        "status",
    )

    def __init__(
        self, stream: trio.abc.Stream, limits: ConnectionLimits, *, decoding: bool = True, connect_s: float = 0.0
    ) -> None:
        """Not `decoding` leaves compressed bodies as they come. `connect_s` is how long it took to connect."""
        self._stream = stream
        self._found_closed_s = max(_FOUND_CLOSED_S, 2 * connect_s)
        self._socket = stream if isinstance(stream, SocketStream) else None
        self._decoding = decoding
        self._coding = ""
        self._decoder: BodyDecoder | None = None
        self._limits = limits
        self._watch_from = min(limits.max_header_bytes, limits.max_body_bytes)
        self._quiet = quiet_check(stream)
        self._now = trio.lowlevel.current_clock().current_time
        self._chunks: list[bytes] = []
        # A callback of the parser: a streamed reply calls it for every event, so it is the list's own.
        self.on_body = self._chunks.append
        self._parser = httptools.HttpResponseParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.is_sent = False
        self._started_at = 0.0
        self._head_bytes = 0
        self._body_bytes = 0
        self._head_complete = False
        self._header_count = 0
        self.is_complete = True
        self.is_closed = False
        self._is_used = False
        self._is_bodiless = False
        self._keep_alive = True
        self._unexpected = False

    def __repr__(self) -> str:
        return f"<HttpConnection {'closed' if self.is_closed else 'idle' if self.is_complete else 'busy'}>"

    @property
    def is_reusable(self) -> bool:
        """Whether the last reply has ended cleanly and the connection is open and quiet."""
        if not (self.is_complete and self._keep_alive) or self._unexpected:
            return False
        return self._quiet is None or self._quiet()

    async def start(self, head: RequestHead, body: bytes) -> None:
        """Send a request and wait for the head of its reply."""
        if self.is_closed:
            raise StreamBrokenError("the connection is closed", sent=False)
        self.headers = []
        self._chunks.clear()
        self._coding = ""
        self._decoder = None
        self.status = self._head_bytes = self._body_bytes = 0
        self._head_complete = self.is_complete = self.is_sent = False
        self._is_bodiless = head.method == "HEAD"
        self._started_at = self._now()
        request = head.render(body)
        if len(request) > _LONG_REQUEST_BYTES:
            await self._send_and_watch(request)
        else:
            try:
                await self._stream.send_all(request)
                # Only a whole request can be acted upon, so a send that failed half way was not one.
                self.is_sent = True
            except trio.ClosedResourceError:
                raise StreamBrokenError("the connection was closed", sent=False) from None
            except trio.BrokenResourceError as exc:
                # The peer may have answered before it stopped reading: a refusal says more than an error here.
                await self._receive_refusal(exc)
        while not self._head_complete:
            await self._receive()
        if not 200 <= self.status <= _LAST_STATUS:
            # There is no such status: what came on the way to it says nothing of what the server has done.
            raise DecodeError(f"the reply is not HTTP/1.1: its status is {self.status}")
        self._is_used = True
        if self._coding:
            self._decoder = self._make_decoder()

    async def receive_some(self) -> bytes:
        """The next piece of the body, decoded; empty at its end."""
        if self._decoder is not None:
            return await self._receive_decoded(self._decoder)
        # Not `_receive`: a stream waits here for every event, and each coroutine in between is paid twice.
        while not self._chunks:
            if self.is_complete:
                return b""
            try:
                received = await self._stream.receive_some(_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise self._broken_by(exc) from exc
            self._feed(received)
        return self._take_chunks()

    def wait_arrival(self) -> Awaitable[None] | None:
        """What to await before `take_arrival`: on a plain socket, for a body that is not compressed."""
        socket = self._socket
        if socket is None or self._decoder is not None or self._chunks or self.is_complete or self.is_closed:
            return None
        return socket.wait_arrival()

    def take_arrival(self) -> bytes | None:
        """What has arrived of the body; None when nothing has, empty at its end."""
        socket = self._socket
        if socket is None:
            return None
        try:
            received = socket.receive_nowait()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._broken_by(exc) from exc
        if received is None:
            return None
        self._feed(received)
        if self._chunks:
            return self._take_chunks()
        return b"" if self.is_complete else None

    async def receive_all(self) -> bytes:
        """The rest of the body; nothing is waited for when it is here already."""
        if self._decoder is not None:
            pieces = []
            while piece := await self._receive_decoded(self._decoder):
                pieces.append(piece)
            return b"".join(pieces)
        while not self.is_complete:
            await self._receive()
        return self._take_chunks()

    def close(self) -> None:
        """Drop the connection at once, without a TLS goodbye."""
        self.is_closed = True
        self._keep_alive = False
        bottom(self._stream).close()

    async def aclose(self) -> None:
        """The same, waiting for what a foreign stream has to wait for."""
        self.close()
        await bottom(self._stream).aclose()

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """Called by httptools; nothing of a reply that was not asked for may reach the one that was."""
        if self.is_complete:
            self._unexpected = True
            raise DecodeError("a reply that was not asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by httptools."""
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Called by httptools."""
        self.status = status = self._parser.get_status_code()
        if status >= 200:
            self._head_complete = True
            self._header_count = len(self.headers)
            self._keep_alive = self._parser.should_keep_alive()
            if self._decoding:
                self._coding = _coding_of(self.headers)
            if self._is_bodiless:
                # The parser cannot be told, and waits for a body: it is of no use any more.
                self._keep_alive = False
                self.is_complete = True
        elif status < 100:
            raise DecodeError(f"{status} is not a status")

    def on_message_complete(self) -> None:
        """Called by httptools; informational replies are complete as well, and are dropped."""
        if self._head_complete:
            self.is_complete = True
            # Fields after the body (trailers) are no headers.
            del self.headers[self._header_count :]
        else:
            self.headers = []

    # Sending

    async def _send_and_watch(self, request: memoryview) -> None:
        """Send and read at the same time; a reply, which can only be a refusal, ends the sending."""
        errors: list[StreamBrokenError | DecodeError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_for_refusal, errors, nursery.cancel_scope)
            try:
                await self._stream.send_all(request)
                self.is_sent = True
            except (trio.ClosedResourceError, trio.BrokenResourceError) as exc:
                # What the watcher finds says more: a refusal, or why the connection broke.
                errors.append(self._broken(f"sending failed: {exc}"))
        if self._head_complete:
            self._keep_alive = self._keep_alive and self.is_sent
        elif errors:
            raise errors[-1]

    async def _watch_for_refusal(
        self, errors: list[StreamBrokenError | DecodeError], sending: trio.CancelScope
    ) -> None:
        try:
            while not self._head_complete:
                await self._receive()
            if self.status >= 300:
                # Over TLS, a send that is cancelled takes with it what has not been read yet.
                await self._read_refusal()
        except (StreamBrokenError, DecodeError) as exc:
            errors.append(exc)
        sending.cancel()

    async def _read_refusal(self) -> None:
        with trio.move_on_after(_REFUSAL_S):
            while not (self.is_sent or self.is_complete or self._body_bytes > _REFUSAL_BYTES):
                await self._receive()

    async def _receive_refusal(self, cause: trio.BrokenResourceError) -> None:
        try:
            while not self._head_complete:
                await self._receive()
        except (StreamBrokenError, DecodeError):
            raise self._broken(f"sending failed: {cause}") from cause
        self._keep_alive = False

    # Receiving

    def _take_chunks(self) -> bytes:
        chunks = self._chunks
        if len(chunks) == 1:
            return chunks.pop()
        body = b"".join(chunks)
        chunks.clear()
        return body

    def _make_decoder(self) -> BodyDecoder | None:
        try:
            return make_decoder(self._coding, self._limits)
        except DecodeError:
            if self.status < 300:
                raise
            # An error is worth more than what it says of itself.
            return None

    async def _receive_decoded(self, decoder: BodyDecoder) -> bytes:
        """The next piece of a compressed body; what has arrived is not held back for more."""
        while True:
            if not decoder.needs_input:
                piece = decoder.decode()
            elif self._chunks:
                piece = decoder.decode(self._take_chunks())
            elif self.is_complete:
                decoder.finish()
                return b""
            else:
                await self._receive()
                continue
            if piece:
                return piece

    async def _receive(self) -> None:
        try:
            received = await self._stream.receive_some(_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._broken_by(exc) from exc
        self._feed(received)

    def _feed(self, received: bytes | bytearray) -> None:
        if not received:
            self._end_of_stream()
            return
        if self._head_complete:
            self._body_bytes += len(received)
        else:
            self._head_bytes += len(received)
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserUpgrade:
            raise DecodeError("the server switched protocols without being asked") from None
        except httptools.HttpParserError as exc:
            if not self.is_complete:
                raise DecodeError(f"the reply is not HTTP/1.1: {_dislike_of(exc)}") from exc
            # Bytes after the end: the reply is good, the connection is not.
            self._unexpected = True
        if self._head_bytes > self._watch_from or self._body_bytes > self._limits.max_body_bytes:
            self._check_limits()

    def _check_limits(self) -> None:
        """Look closer: what was read with the head is head and body."""
        limits = self._limits
        head_bytes, body_bytes = self._head_bytes, self._body_bytes
        if self._head_complete:
            head_bytes = sum(len(name) + len(value) for name, value in self.headers)
            body_bytes = body_bytes or sum(map(len, self._chunks))
        if head_bytes > limits.max_header_bytes:
            raise DecodeError(f"the reply's headers are over {limits.max_header_bytes} bytes")
        if body_bytes > limits.max_body_bytes:
            raise DecodeError(f"the reply's body is over {limits.max_body_bytes} bytes")

    def _end_of_stream(self) -> None:
        """A body without a length ends with the connection; anything else is cut."""
        self._keep_alive = False
        if not self._head_complete or any(_frames_body(name, value) for name, value in self.headers):
            raise self._broken("the server closed the connection before the end of the reply")
        self.is_complete = True

    def _broken_by(self, exc: trio.BrokenResourceError | trio.ClosedResourceError) -> StreamBrokenError:
        cause = exc.__cause__
        if isinstance(cause, ssl.SSLError) and "ALERT" in (cause.reason or "") and not (self.status or self._is_used):
            # With TLS 1.3 a server looks at the client's certificate when the client has sent its request already.
            return StreamBrokenError(f"the server ended TLS: {reason_of(exc)}", sent=False)
        return self._broken(str(exc) or reason_of(exc) or "the connection broke")

    def _broken(self, reason: str) -> StreamBrokenError:
        silent = self._is_used and not self._head_bytes and not self.is_closed
        found_closed = silent and self._now() - self._started_at < self._found_closed_s
        # Whoever has a status has had a request, whole or not.
        return StreamBrokenError(reason, sent=(self.is_sent or self.status >= 200) and not found_closed)


def _dislike_of(exc: Exception) -> str:
    """What the parser did not like; what a callback of ours raised is the context of the parser's error."""
    inner = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
    return str(inner or exc)


def _coding_of(headers: list[tuple[bytes, bytes]]) -> str:
    """The value of Content-Encoding."""
    coding = ""
    for name, value in headers:
        # By its length first: this is done for every header of every reply.
        if len(name) == 16 and name.lower() == b"content-encoding":
            coding = f"{coding},{value.decode('latin-1')}" if coding else value.decode("latin-1")
    return coding


def _frames_body(name: bytes, value: bytes) -> bool:
    return name.lower() == b"content-length" or (name.lower() == b"transfer-encoding" and b"chunked" in value.lower())
