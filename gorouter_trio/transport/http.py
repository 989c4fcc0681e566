"""HTTP/1.1 on a trio stream, parsed by httptools (llhttp), and the httpx face of it.

Theory of operation. An `HttpConnection` belongs to one task at a time, which writes a request and
reads its reply; there is no pool here and no lock. Deadlines are the caller's cancel scopes. The
rule that keeps it safe is short: a connection is used again only if the last reply ended exactly
where the parser says, the peer wants to keep it, and nothing else arrived. Everything else, cancels
included, closes it.

httptools leaves some things to us: bodies that end with the connection, informational (1xx) replies,
replies to HEAD, a second reply that nobody asked for, the size of headers, and keep-alive, which may
only be read inside its callbacks.

Why not `httpx.AsyncClient`: its pool scans all connections on every request and leaks slots when
requests are cancelled. Why the pool calls `HttpConnection` and not `handle_async_request`: the same
bytes cost about 10 µs less per request without the request and response objects in between.
"""

from __future__ import annotations

import os
import re
import select
import socket as stdlib_socket
import ssl
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, cast

import httptools
import httpx
import trio
from msgspec import Struct

from .._contain import contain
from ..errors import ConnectError, DecodeError, StreamBrokenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

__all__ = [
    "Connection",
    "ConnectionLimits",
    "Connector",
    "HttpConnection",
    "HttpConnector",
    "HttpTransport",
    "HttpxConnection",
    "Network",
    "Origin",
    "RequestHead",
    "SocketNetwork",
    "SocketStream",
    "connector",
]

_READ_BYTES = 64 * 1024
_LINE = re.compile(r"[^\r\n\0\u0100-\U0010ffff]*")
# A longer request does not surely fit into the kernel's buffers, so its refusal has to be looked out for.
_LONG_REQUEST_BYTES = 64 * 1024
# A peer that closes a used connection within this time of a request, without a byte of a reply, has most likely
# closed it before the request came: one round trip, generously.
_FOUND_CLOSED_S = 1.0
_CLEANUP_S = 2.0
_BUFFERED_PIECES = 10_000


class Origin(Struct, frozen=True):
    """Where requests go: scheme, host and port."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


class ConnectionLimits(Struct, frozen=True, kw_only=True):
    """Bounds of one reply, in bytes, checked whenever something has been read.

    `max_header_bytes` holds for the head with its informational replies. `max_body_bytes` counts what
    arrives after the head, the framing of chunks included; for users' httpx transports, what they decode.
    """

    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024


class Network(Protocol):
    """What makes byte streams: sockets here, memory in tests and simulations."""

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A connected stream; raises `OSError` when there is none to be had."""


class RequestHead:
    """The head of a request, encoded once and used for every body that is sent to the same target.

    It holds the key in its Authorization header, so it shows nothing of itself.
    """

    __slots__ = ("_encoded", "headers", "method", "target", "url")

    def __init__(
        self, origin: Origin, *, method: str, target: str, headers: Sequence[tuple[str, str]], host: str | None = None
    ) -> None:
        """Raises `ValueError` for what would break out of its line; `host` stands in for the origin's."""
        self.method = method
        self.target = target
        self.url = f"{origin.scheme}://{origin.netloc}{target}"
        self.headers = tuple(headers)
        lines = [f"{method} {target} HTTP/1.1", f"Host: {host or origin.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers]
        broken = [line.partition(":")[0] for line in lines if not _is_line(line)]
        self._encoded = b"" if broken else "\r\n".join(lines).encode("latin-1") + b"\r\nContent-Length: "
        # A traceback may show locals, and these hold the key.
        del headers, lines
        if broken:
            raise ValueError(f"not a line of HTTP: {broken[0][:40]!r}")

    def __repr__(self) -> str:
        return f"<RequestHead {self.method} {self.target}>"

    def render(self, body: bytes) -> memoryview:
        """The whole request. A view, because a traceback that shows locals shows no bytes of it."""
        return memoryview(b"%b%d\r\n\r\n%b" % (self._encoded, len(body), body))


class Connection(Protocol):
    """One request after another to one origin; what a pool worker owns."""

    status: int
    headers: list[tuple[bytes, bytes]]

    @property
    def is_reusable(self) -> bool:
        """Whether the next request may go out on it."""

    @property
    def is_complete(self) -> bool:
        """Whether the last reply has arrived to its end."""

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""

    async def start(self, head: RequestHead, body: bytes) -> None:
        """Send a request and wait for the head of its reply, in `status` and `headers`."""

    async def receive_some(self) -> bytes:
        """The next piece of the reply's body, decoded; empty at its end."""

    async def receive_all(self) -> bytes:
        """The rest of the reply's body."""

    def close(self) -> None:
        """Drop the connection at once; whoever waits on it gets `StreamBrokenError`."""

    async def aclose(self) -> None:
        """`close`, and wait for what a user's transport needs to wait for."""


class SocketStream(trio.abc.Stream):
    """A TCP socket as a trio stream, with one system call a send.

    `send_all` is a checkpoint only when the kernel does not take everything at once: the read that
    follows every request is one always, and a second task switch a request is what it would cost.
    """

    __slots__ = ("_arrivals", "_socket")

    def __init__(self, socket: stdlib_socket.socket) -> None:
        socket.setblocking(False)
        self._socket = socket
        # Peeking at the socket costs an exception when nothing is there, which is the usual case.
        self._arrivals = select.poll()
        self._arrivals.register(socket, select.POLLIN)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Cancelling leaves an unknown part sent."""
        with memoryview(data) as view:
            sent = self._send(view)
            while sent < len(view):
                await trio.lowlevel.wait_writable(self._socket)
                with view[sent:] as rest:
                    sent += self._send(rest)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room."""
        await trio.lowlevel.wait_writable(self._socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, waiting for the first byte; empty once the peer has ended."""
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the socket is closed")
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes or _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, not even the peer's end: an idle connection that is still good."""
        return self._socket.fileno() >= 0 and not self._arrivals.poll(0)

    def close(self) -> None:
        """Close at once, waking whoever waits with `ClosedResourceError`."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    async def aclose(self) -> None:
        """Close at once."""
        self.close()
        await trio.lowlevel.checkpoint()

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the socket is closed") from exc
            raise trio.BrokenResourceError(f"sending failed: {exc}") from exc


class SocketNetwork:
    """TCP with happy eyeballs (RFC 8305)."""

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A connected TCP stream; raises `OSError`."""
        return await trio.open_tcp_stream(host, port)


class _InterruptibleStream(trio.abc.Stream):
    """Somebody's stream, with a `close` that does not wait.

    `close` wakes whoever waits on it; the stream itself is closed by `aclose`, which has to follow.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._scopes: set[trio.CancelScope] = set()
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._open():
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        with self._open():
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        with self._open():
            return await self._stream.receive_some(max_bytes)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._closed = True
        for scope in self._scopes:
            scope.cancel()

    async def aclose(self) -> None:
        self.close()
        await trio.aclose_forcefully(self._stream)

    @contextmanager
    def _open(self) -> Iterator[None]:
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise trio.ClosedResourceError("the stream was closed")


def _closable(stream: trio.abc.Stream) -> trio.abc.Stream:
    """The stream, or one in its place, with a `close` that does not wait."""
    if isinstance(stream, trio.SocketStream):
        return SocketStream(stdlib_socket.socket(fileno=stream.socket.detach()))
    return stream if callable(getattr(stream, "close", None)) else _InterruptibleStream(stream)


class HttpConnection:
    """One HTTP/1.1 connection.

    The owner calls `start`, then `receive_all` or `receive_some` to the end. Raises
    `StreamBrokenError` when the connection ends too early and `DecodeError` when what arrives is
    not HTTP or over the limits; after any error, and after a cancel, it must be closed.
    """

    __slots__ = (
        "_body_bytes",
        "_chunks",
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

    def __init__(self, stream: trio.abc.Stream, limits: ConnectionLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._watch_from = min(limits.max_header_bytes, limits.max_body_bytes)
        self._quiet = _quiet_check(stream)
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
        self._is_used = True

    async def receive_some(self) -> bytes:
        """The next piece of the body, decoded from its transfer coding; empty at its end."""
        # Not `_receive`: a stream waits here for every event, and each coroutine in between is paid twice.
        while not self._chunks:
            if self.is_complete:
                return b""
            try:
                received = await self._stream.receive_some(_READ_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise self._broken(str(exc) or "the connection broke") from exc
            self._feed(received)
        return self._take_chunks()

    async def receive_all(self) -> bytes:
        """The rest of the body; nothing is waited for when it is here already."""
        while not self.is_complete:
            await self._receive()
        return self._take_chunks()

    def close(self) -> None:
        """Drop the connection at once, without a TLS goodbye."""
        self.is_closed = True
        self._keep_alive = False
        _bottom(self._stream).close()

    async def aclose(self) -> None:
        """The same, waiting for what a foreign stream has to wait for."""
        self.close()
        await _bottom(self._stream).aclose()

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
        """Send and read at the same time; the head of a reply, which can only be a refusal, ends the sending."""
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
        except (StreamBrokenError, DecodeError) as exc:
            errors.append(exc)
        sending.cancel()

    async def _receive_refusal(self, cause: trio.BrokenResourceError) -> None:
        try:
            while not self._head_complete:
                await self._receive()
        except (StreamBrokenError, DecodeError):
            raise self._broken(f"sending failed: {cause}") from cause
        self._keep_alive = False

    # Receiving

    def _take_chunks(self) -> bytes:
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        return body

    async def _receive(self) -> None:
        try:
            received = await self._stream.receive_some(_READ_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._broken(str(exc) or "the connection broke") from exc
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
                raise DecodeError(f"the reply is not HTTP/1.1: {_reason_of(exc)}") from exc
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

    def _broken(self, reason: str) -> StreamBrokenError:
        silent = self._is_used and not self._head_bytes and not self.is_closed
        found_closed = silent and self._now() - self._started_at < _FOUND_CLOSED_S
        return StreamBrokenError(reason, sent=self.is_sent and not found_closed)


def _is_line(text: str) -> bool:
    """Whether it can stand on one line of an HTTP head."""
    return _LINE.fullmatch(text) is not None


def _reason_of(exc: Exception) -> str:
    """What the parser did not like; what a callback of ours raised is the context of the parser's error."""
    inner = exc.__context__ if isinstance(exc, httptools.HttpParserCallbackError) else None
    return str(inner or exc)


def _frames_body(name: bytes, value: bytes) -> bool:
    return name.lower() == b"content-length" or (name.lower() == b"transfer-encoding" and b"chunked" in value.lower())


class _Closable(Protocol):
    def close(self) -> None: ...

    async def aclose(self) -> None: ...


def _bottom(stream: trio.abc.Stream) -> _Closable:
    """The stream under the TLS, which closes without waiting."""
    while isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    return cast("_Closable", stream)


def _quiet_check(stream: trio.abc.Stream) -> Callable[[], bool] | None:
    """What tells whether an idle connection is still as the last reply left it, as far as its stream can say."""
    is_quiet: Callable[[], bool] | None = getattr(_bottom(stream), "is_quiet", None)
    if not isinstance(stream, trio.SSLStream) or is_quiet is None:
        return is_quiet
    # A record that came together with the end of a reply waits in here, where the socket does not show it.
    undecrypted = getattr(stream, "_incoming", None)

    def is_quiet_below_tls() -> bool:
        return is_quiet() and not (undecrypted is not None and undecrypted.pending)

    return is_quiet_below_tls


class Connector(Protocol):
    """Makes the connections of one origin."""

    async def connect(self) -> Connection:
        """A new connection; raises `ConnectError`."""


class HttpConnector:
    """Makes `HttpConnection`s: TCP or another network, and TLS on top for https."""

    def __init__(
        self, origin: Origin, *, network: Network, tls: ssl.SSLContext | None, limits: ConnectionLimits
    ) -> None:
        self._origin = origin
        self._network = network
        self._limits = limits
        # Made once: loading the trust store takes tens of milliseconds.
        self._tls = (tls or ssl.create_default_context()) if origin.scheme == "https" else None

    async def connect(self) -> Connection:
        """A new connection; raises `ConnectError`, having sent nothing. Cancelling leaves nothing open."""
        origin = self._origin
        try:
            stream = _closable(await self._network.connect(origin.host, origin.port))
        except (OSError, UnicodeError) as exc:
            # A name that cannot even be looked up is a UnicodeError.
            raise ConnectError(f"cannot connect to {origin.netloc}: {_reason(exc)}") from exc
        if self._tls is None:
            return HttpConnection(stream, self._limits)
        try:
            secure = trio.SSLStream(stream, self._tls, server_hostname=origin.host, https_compatible=True)
            await secure.do_handshake()
        except (trio.BrokenResourceError, OSError, ValueError) as exc:
            await _drop(_bottom(stream))  # noqa: ASYNC120 - shields itself, bounded
            raise ConnectError(f"TLS with {origin.netloc} failed: {_reason(exc)}") from exc
        except BaseException:
            await _drop(_bottom(stream))  # noqa: ASYNC102 - shields itself, bounded
            raise
        return HttpConnection(secure, self._limits)


async def _drop(closable: _Closable) -> None:
    """Close, and wait a little for what has to be waited for, whatever happens around it."""
    closable.close()
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
        await closable.aclose()


def _reason(exc: BaseException) -> str:
    """What went wrong, in the words of the system where it has some."""
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ else exc
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate does not verify: {cause.verify_message}"
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, stdlib_socket.gaierror):
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause)
    inner = cause.__cause__
    if isinstance(inner, BaseExceptionGroup) and isinstance(inner.exceptions[0], OSError):
        return _reason(inner.exceptions[0])
    return str(inner) if isinstance(inner, OSError) else str(cause)


# httpx: as the face of our transport, and users' own transports and clients in its place


class HttpxConnection:
    """A user's httpx transport or client in the place of a connection.

    `httpx.AsyncClient` has a pool of its own, so it serves every worker; what it costs is known
    (benchmarks/README.md). Deadlines are the pool's: the timeouts of a transport are turned off,
    those of a client stay what the user made them.
    """

    __slots__ = (
        "_chunks",
        "_max_body_bytes",
        "_received_bytes",
        "_response",
        "_scope",
        "_user",
        "headers",
        "is_closed",
        "status",
    )

    def __init__(self, user: httpx.AsyncBaseTransport | httpx.AsyncClient, *, max_body_bytes: int) -> None:
        self._user = user
        self._max_body_bytes = max_body_bytes
        self._received_bytes = 0
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes] | None = None
        self._scope: trio.CancelScope | None = None
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_closed = False

    @property
    def is_complete(self) -> bool:
        """Whether no reply is open."""
        return self._response is None

    @property
    def is_reusable(self) -> bool:
        """The user's object manages its own connections, so the handle is good while no reply is open."""
        return self._response is None and not self.is_closed

    async def start(self, head: RequestHead, body: bytes) -> None:
        """Send a request and wait for the head of its reply."""
        request = httpx.Request(head.method, head.url, headers=list(head.headers), content=body)
        self._received_bytes = 0
        with self._waiting():
            if isinstance(self._user, httpx.AsyncClient):
                response = await self._user.send(request, stream=True)
            else:
                request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"))
                response = await self._user.handle_async_request(request)
            self._response = response
            self._chunks = response.aiter_bytes()
            self.status = response.status_code
            self.headers = list(response.headers.raw)

    async def receive_some(self) -> bytes:
        """The next piece of the body, decoded; empty at its end."""
        if self._chunks is None:
            return b""
        with self._waiting():
            async for chunk in self._chunks:
                self._received_bytes += len(chunk)
                if self._received_bytes > self._max_body_bytes:
                    raise DecodeError(f"the reply's body is over {self._max_body_bytes} bytes")
                if chunk:
                    return chunk
            await self._finish()
        return b""

    async def receive_all(self) -> bytes:
        """The rest of the body."""
        pieces = []
        while piece := await self.receive_some():
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Stop waiting for the reply; `aclose` gives its connection back to httpx."""
        self.is_closed = True
        if self._scope is not None:
            self._scope.cancel()

    async def aclose(self) -> None:
        """Close the reply, which frees its place in the user's pool."""
        self.close()
        await self._finish()
        await trio.lowlevel.checkpoint()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """`close` ends what happens here; errors of httpx become ours."""
        if self.is_closed:
            raise StreamBrokenError("the connection is closed", sent=False)
        with trio.CancelScope() as self._scope, _map_httpx_errors():
            yield
        stopped, self._scope = self._scope.cancelled_caught, None
        if stopped:
            raise StreamBrokenError("the connection was closed")

    async def _finish(self) -> None:
        chunks, self._chunks = self._chunks, None
        response, self._response = self._response, None
        if response is not None:
            await response.aclose()
        if chunks is not None:
            with trio.CancelScope() as scope:
                scope.cancel()
                await contain(lambda: _end_generators(chunks), report=lambda _error: None)


async def _end_generators(chunks: AsyncIterator[bytes]) -> None:
    """Read on in a reply that was closed, in a scope that is cancelled, until its generators have ended.

    httpx reads through generators within generators, and trio complains of each that is left in the
    middle; they end by an exception only. What was buffered still comes before that, so the bound.
    """
    for _ in range(_BUFFERED_PIECES):
        if await anext(chunks, None) is None:
            return


class _map_httpx_errors:  # noqa: N801 - reads as the statement it is
    """httpx's exceptions as ours; a class, because it stands on the path of every request."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, (httpx.HTTPError, httpx.InvalidURL)):
            _forget_frames(exc)
            raise _from_httpx(exc) from exc


_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.InvalidURL,
    httpx.LocalProtocolError,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)


def _from_httpx(exc: httpx.HTTPError | httpx.InvalidURL) -> ConnectError | StreamBrokenError | DecodeError:
    text = str(exc) or type(exc).__name__
    if isinstance(exc, _NOTHING_SENT):
        return ConnectError(f"cannot connect: {text}")
    if isinstance(exc, httpx.DecodingError):
        return DecodeError(f"the reply's body cannot be decoded: {text}")
    return StreamBrokenError(f"the connection broke: {text}")


def _forget_frames(exc: BaseException | None) -> None:
    """Drop the tracebacks of an error and of what led to it: frames below httpx hold the request with its key."""
    while exc is not None:
        exc.__traceback__ = None
        exc = exc.__cause__ or exc.__context__


class _HttpxConnector:
    def __init__(self, user: httpx.AsyncBaseTransport | httpx.AsyncClient, limits: ConnectionLimits) -> None:
        self._user = user
        self._limits = limits

    async def connect(self) -> Connection:
        await trio.lowlevel.checkpoint()
        return HttpxConnection(self._user, max_body_bytes=self._limits.max_body_bytes)


def connector(
    origin: Origin, *, transport: object | None, tls: ssl.SSLContext | None, limits: ConnectionLimits
) -> Connector:
    """The connector for a client's `transport` setting; raises `TypeError` when it is none of the kinds."""
    if transport is None:
        return HttpConnector(origin, network=SocketNetwork(), tls=tls, limits=limits)
    if isinstance(transport, (httpx.AsyncBaseTransport, httpx.AsyncClient)):
        return _HttpxConnector(transport, limits)
    if callable(getattr(transport, "connect", None)):
        return HttpConnector(origin, network=cast("Network", transport), tls=tls, limits=limits)
    raise TypeError("transport: must be an httpx transport or client, or have connect(host, port)")


class HttpTransport(httpx.AsyncBaseTransport):
    """The built-in transport with httpx's face: `httpx.AsyncClient(transport=HttpTransport())`.

    Idle connections are kept per origin, at most `keep` of them, and closed by `aclose`. It must be used
    from one trio run. Of httpx's timeouts, `connect` holds for making a connection and `read` for
    sending a request and waiting for the head of its reply, and for each piece of its body. A request
    body is read to its end before it is sent.
    """

    def __init__(
        self,
        *,
        network: Network | None = None,
        tls: ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
        keep: int = 16,
    ) -> None:
        self._network = network or SocketNetwork()
        self._tls = tls
        self._limits = limits or ConnectionLimits()
        self._keep = keep
        self._connectors: dict[Origin, HttpConnector] = {}
        self._idle: dict[Origin, list[Connection]] = {}
        self._closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; raises httpx's exceptions. Cancelling closes the connection."""
        origin = _origin_of(request)
        body = await request.aread()
        try:
            connection = await self._start(origin, request, body=body)
        except (ConnectError, StreamBrokenError, DecodeError) as exc:
            raise _as_httpx(exc, request) from exc
        return httpx.Response(
            connection.status, headers=connection.headers, stream=_ResponseStream(self, origin, connection, request)
        )

    async def aclose(self) -> None:
        """Close the idle connections; those in use close when their reply is."""
        self._closed = True
        idle = [connection for connections in self._idle.values() for connection in connections]
        self._idle.clear()
        for connection in idle:
            await _drop(connection)
        await trio.lowlevel.checkpoint()

    async def _give_back(self, origin: Origin, connection: Connection) -> None:
        """Keep the connection for the next request, or close it."""
        idle = self._idle.setdefault(origin, [])
        if connection.is_reusable and len(idle) < self._keep and not self._closed:
            idle.append(connection)
            await trio.lowlevel.checkpoint()
        else:
            await _drop(connection)

    async def _start(self, origin: Origin, request: httpx.Request, *, body: bytes) -> Connection:
        """A connection that has the head of the reply. One that was found closed is replaced."""
        head = _head_of(request, origin)
        while True:
            connection = self._take_idle(origin)
            is_new = connection is None
            if connection is None:
                with _httpx_timeout(request, "connect"):
                    connection = await self._connect(origin)
            try:
                with _httpx_timeout(request, "read"):
                    await connection.start(head, body)
            except StreamBrokenError as exc:
                await _drop(connection)  # noqa: ASYNC120 - shields itself, bounded
                if is_new or exc.sent:
                    raise
            except BaseException:
                await _drop(connection)  # noqa: ASYNC102 - shields itself, bounded
                raise
            else:
                return connection

    def _take_idle(self, origin: Origin) -> Connection | None:
        idle = self._idle.get(origin, [])
        while idle:
            connection = idle.pop()
            if connection.is_reusable:
                return connection
            connection.close()
        return None

    async def _connect(self, origin: Origin) -> Connection:
        if origin not in self._connectors:
            self._connectors[origin] = HttpConnector(origin, network=self._network, tls=self._tls, limits=self._limits)
        return await self._connectors[origin].connect()


class _ResponseStream(httpx.AsyncByteStream):
    def __init__(
        self, transport: HttpTransport, origin: Origin, connection: Connection, request: httpx.Request
    ) -> None:
        self._transport = transport
        self._origin = origin
        self._connection: Connection | None = connection
        self._request = request

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        connection = self._connection
        if connection is None:
            raise StopAsyncIteration
        try:
            with _httpx_timeout(self._request, "read"):
                piece = await connection.receive_some()
        except (StreamBrokenError, DecodeError) as exc:
            connection.close()
            raise _as_httpx(exc, self._request) from exc
        if not piece:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._transport._give_back(self._origin, connection)  # noqa: SLF001 - one class in two parts


def _origin_of(request: httpx.Request) -> Origin:
    url = request.url
    if url.scheme not in {"http", "https"} or not url.host:
        raise httpx.UnsupportedProtocol("the URL must be http:// or https:// with a host", request=request)
    return Origin(url.scheme, url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80))


def _head_of(request: httpx.Request, origin: Origin) -> RequestHead:
    skipped = {b"host", b"content-length", b"transfer-encoding"}
    raw = request.headers.raw
    try:
        return RequestHead(
            origin,
            method=request.method,
            target=request.url.raw_path.decode("ascii"),
            headers=[(k.decode("latin-1"), v.decode("latin-1")) for k, v in raw if k.lower() not in skipped],
            host=request.headers.get("host"),
        )
    except ValueError as exc:
        del raw  # a traceback may show it
        raise httpx.LocalProtocolError(str(exc), request=request) from None


def _httpx_timeout(request: httpx.Request, name: str) -> AbstractContextManager[None]:
    timeouts: Mapping[str, float | None] = request.extensions.get("timeout", {})
    seconds = timeouts.get(name)
    # A cancel scope costs a tenth of a whole request: none where there is nothing to time.
    return nullcontext() if seconds is None else _timing(request, name, seconds)


@contextmanager
def _timing(request: httpx.Request, name: str, seconds: float) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        kind = httpx.ConnectTimeout if name == "connect" else httpx.ReadTimeout
        raise kind(f"no answer within {seconds} s", request=request)


def _as_httpx(exc: ConnectError | StreamBrokenError | DecodeError, request: httpx.Request) -> httpx.TransportError:
    if isinstance(exc, ConnectError):
        return httpx.ConnectError(exc.message, request=request)
    if isinstance(exc, StreamBrokenError):
        return httpx.ReadError(exc.message, request=request)
    return httpx.RemoteProtocolError(exc.message, request=request)
