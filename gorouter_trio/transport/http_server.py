"""An HTTP/1.1 server on trio streams, parsed by httptools (llhttp): the simulator and the gateway stand on it.

One task serves one connection: it reads a request whole, calls the handler, and sends what the handler
replies, so replies keep the order of pipelined requests. Message syntax and framing follow RFC 9112; what
is ambiguous there (two lengths, a length beside chunked, bare line feeds) is refused, never guessed.

    server        owns the time-outs, the disconnect watches and the handler's containment
    connection    one stream: request parser in, replies out
    request       what came, whole
    reply         how to answer: `send` once, or `start`, `write`..., `finish`
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from email.utils import formatdate
from http import HTTPStatus
from math import inf
from typing import Final, NewType, TypeAlias, cast, final

import httptools
import msgspec
import trio

from .._contain import contain

__all__ = [
    "EncodedHeaders",
    "Handler",
    "Headers",
    "HttpServer",
    "HttpServerLimits",
    "HttpServerStatistics",
    "ServerReply",
    "ServerRequest",
    "encode_headers",
    "join_headers",
    "open_http_server",
    "serve_http",
    "serve_http_connection",
]

_LOG = logging.getLogger(__name__)

_RECEIVE_BYTES: Final = 65_536
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_VERSIONS: Final = frozenset({"1.0", "1.1"})
_LAST_CHUNK: Final = b"0\r\n\r\n"
_BODILESS: Final = frozenset({204, 304})
_FRAMING_HEADERS: Final = frozenset({"connection", "content-length", "transfer-encoding"})
_WATCHED_HEADERS: Final = frozenset({b"host", b"expect", b"content-length", b"transfer-encoding"})
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_CLOSE_S: Final = 1.0


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


_STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 600)}

EncodedHeaders = NewType("EncodedHeaders", bytes)
"""Header lines ready for the wire, made by `encode_headers`; blocks may be joined with `join_headers`."""

Headers: TypeAlias = "EncodedHeaders | Iterable[tuple[str, str]]"


def encode_headers(pairs: Iterable[tuple[str, str]]) -> EncodedHeaders:
    """Encode header *pairs*, once for many replies.

    Raises `ValueError` for a name or value that may not stand in a header, and for the framing headers (Connection,
    Content-Length, Transfer-Encoding), which belong to the server.
    """
    lines = []
    for name, value in pairs:
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"not a valid header line: {name!r}")
        if name.lower() in _FRAMING_HEADERS:
            raise ValueError(f"the server sets {name} itself")
        lines.append(f"{name}: {value}\r\n")
    return EncodedHeaders("".join(lines).encode("latin-1"))


def join_headers(*blocks: EncodedHeaders) -> EncodedHeaders:
    """Join encoded blocks into one."""
    return EncodedHeaders(b"".join(blocks))


class HttpServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Ceilings of a server. Any of the times may be `math.inf`, which also takes their cost away."""

    max_header_bytes: int = 65_536
    """Request line and headers together; more is answered 431."""
    max_body_bytes: int = 67_108_864
    """Request body after removing the chunking; more is answered 413."""
    max_connections: int = 10_000
    """Connections served at once; one more is answered 503 and closed."""
    idle_timeout_s: float = 75.0
    """Wait for the first byte of the next request; then the connection is closed."""
    request_timeout_s: float = 60.0
    """From the first byte of a request to its last; more is answered 408."""
    send_timeout_s: float = 60.0
    """One send to a client that does not read; then the connection is closed."""
    linger_s: float = 1.0
    """How long what a refused client still sends is read and thrown away, so that it gets to read the refusal."""
    drain_timeout_s: float = 10.0
    """How long running requests may go on after `HttpServer.drain`."""


class HttpServerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a server has done so far, and is doing."""

    connections: int
    """Open now."""
    accepted: int
    """Connections since the start."""
    requests: int
    """Complete requests handed to the handler."""
    refused: int
    """Connections ended with 400, 408, 413, 417, 431, 501, 503 or 505, without a handler."""
    handler_errors: int
    """Requests whose handler raised or did not reply."""


@final
class ServerRequest:
    """One request, read whole. The header names are lower case; the bytes are as they came."""

    __slots__ = ("body", "headers", "is_keep_alive", "method", "target", "version")

    def __init__(self, method: str, target: bytes, *, headers: list[tuple[bytes, bytes]], version: str) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.version = version
        self.body = b""
        self.is_keep_alive = True

    def __repr__(self) -> str:
        return f"<ServerRequest {self.method} {self.path}, {len(self.body)} bytes>"

    @property
    def path(self) -> str:
        """The path of the target, still percent-encoded; `*` and absolute targets are taken as they are meant."""
        target = self.target
        if not target.startswith(b"/"):
            _, slashes, rest = target.partition(b"://")
            target = b"/" + rest.partition(b"/")[2] if slashes else target
        return target.partition(b"?")[0].decode("latin-1")

    @property
    def query(self) -> str:
        """What follows the first `?` of the target, still percent-encoded."""
        return self.target.partition(b"?")[2].decode("latin-1")

    def get(self, name: str) -> str | None:
        """The value of the first header *name* (lower case), or `None`."""
        wanted = name.encode("latin-1")
        for key, value in self.headers:
            if key == wanted:
                return value.decode("latin-1")
        return None


class _RefusedError(Exception):
    """Stops the parser from inside a callback; the reason is in `_RequestParser.refusal`."""


@final
class _RequestParser:
    """Bytes in, whole requests out, no I/O. After a refusal it is dead; requests before it are still good."""

    def __init__(self, limits: HttpServerLimits) -> None:
        self.ready: deque[ServerRequest] = deque()
        self.refusal = 0
        self.wants_continue = False
        self.is_inside_request = False
        self._limits = limits
        self._parser = httptools.HttpRequestParser(self)
        self._in_head = False
        self._head_bytes = 0
        self._is_head_counted = True
        self._has_ended = False
        self._body_bytes = 0
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._watched: list[tuple[bytes, bytes]] = []
        self._request: ServerRequest | None = None
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Take what was received; finished requests are appended to `ready`, an unusable one sets `refusal`."""
        while data:
            data = self._feed(data)

    def _feed(self, data: bytes) -> bytes:
        """What is left to be fed: the parser stops behind a request that offers an upgrade."""
        self._head_bytes = self._head_bytes + len(data) if self._in_head else len(data)
        self._has_ended = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The offer is ignored, as RFC 9110 section 7.8 allows; but llhttp has then skipped the body.
            return data[upgrade.args[0] :] if self.refusal == 0 else b""
        except httptools.HttpParserError:
            self.refusal = self.refusal or 400
        else:
            self._bound_head()
        return b""

    def _bound_head(self) -> None:
        """Refuse a head that is too long already, though it has not come whole."""
        if self._in_head and self._has_ended:
            # It began somewhere behind other requests, which are not its bytes.
            self._head_bytes, self._is_head_counted = 0, False
        if self._in_head and self._head_bytes > self._limits.max_header_bytes:
            self.refusal = 431

    def _refuse(self, status: int) -> _RefusedError:
        self.refusal = status
        return _RefusedError()

    # Called by httptools.

    def on_message_begin(self) -> None:
        self.is_inside_request = True
        self._in_head = True
        self._is_head_counted = True
        self._target = b""
        self._headers = []
        self._watched = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: merging it into the headers would let it override what was checked
        name = name.lower()
        self._headers.append((name, value))
        if name in _WATCHED_HEADERS:
            self._watched.append((name, value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_bytes > self._limits.max_header_bytes or not self._is_head_counted:  # a bound; count exactly
            self._check_head_size()
        version = self._parser.get_http_version()
        if version not in _VERSIONS:
            raise self._refuse(505)
        self._body = []
        self._body_bytes = 0
        self._check_watched(version)
        method = self._parser.get_method().decode("ascii")
        self._request = ServerRequest(method, self._target, headers=self._headers, version=version)

    def _check_head_size(self) -> None:
        size = len(self._target) + sum([len(name) + len(value) + 4 for name, value in self._headers])
        if size > self._limits.max_header_bytes:
            raise self._refuse(431)

    def _check_watched(self, version: str) -> None:
        hosts = 0
        has_body = False
        for name, value in self._watched:
            if name == b"host":
                hosts += 1
            elif name == b"expect":
                self._expect(value, version)
            elif name == b"content-length":
                has_body = value != b"0"
                if int(value) > self._limits.max_body_bytes:
                    raise self._refuse(413)
            else:
                has_body = True
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            raise self._refuse(400)
        if self._parser.should_upgrade() and (has_body or self._parser.get_method() == b"CONNECT"):
            raise self._refuse(501)

    def _expect(self, value: bytes, version: str) -> None:
        if value.lower() != b"100-continue":
            raise self._refuse(417)
        self.wants_continue = version == "1.1"

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.max_body_bytes:
            raise self._refuse(413)
        self._body.append(body)

    def on_message_complete(self) -> None:
        request = cast("ServerRequest", self._request)
        request.body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        request.is_keep_alive = self._parser.should_keep_alive()
        self._request = None
        self._body = []
        self.wants_continue = False
        self.is_inside_request = False
        self._has_ended = True
        self.ready.append(request)


class _TimeoutQueue:
    """Expires connections that waited longer than one fixed time.

    The time is the same for all, so the order of arming is the order of expiry, and arming costs a dict
    operation instead of a cancel scope with a deadline (8 us here, a tenth of a whole request). One task
    serves all connections.
    """

    def __init__(self, timeout_s: float, expire: Callable[[_Connection], None]) -> None:
        self.timeout_s = timeout_s
        self._expire = expire
        self._since: dict[_Connection, float] = {}
        self._lot = trio.lowlevel.ParkingLot()

    def arm(self, connection: _Connection) -> None:
        if self.timeout_s == inf:
            return
        self._since[connection] = trio.current_time()
        if self._lot:
            self._lot.unpark()

    def disarm(self, connection: _Connection) -> None:
        self._since.pop(connection, None)

    async def run(self) -> None:
        while True:
            if not self._since:
                await self._lot.park()
                continue
            connection, since = next(iter(self._since.items()))
            left = since + self.timeout_s - trio.current_time()
            if left > 0:
                await trio.sleep(left)
            else:
                del self._since[connection]
                self._expire(connection)


@final
class ServerReply:
    """The answer to one request. Use `send` for a whole reply, or `start`, `write` and `finish` for a chunked one.

    Sending raises `trio.BrokenResourceError` once the client is gone; a handler need not catch it. A handler
    that returns before its reply is finished has failed: nothing sent gives a 500, a started reply is cut.
    """

    __slots__ = ("_connection", "_is_chunked", "_request", "_state")

    def __init__(self, connection: _Connection, request: ServerRequest) -> None:
        self._connection = connection
        self._request = request
        self._state = _FRESH
        self._is_chunked = False

    def __repr__(self) -> str:
        return f"<ServerReply {self._state}{', client gone' if self.is_disconnected else ''}>"

    @property
    def stream(self) -> trio.abc.Stream:
        """The stream of the connection, to look at: what is sent on it is the server's affair."""
        return self._connection.stream

    @property
    def is_started(self) -> bool:
        """Whether the head is sent, or being sent."""
        return self._state != _FRESH

    @property
    def is_finished(self) -> bool:
        """Whether nothing more may be sent: the reply is complete or aborted."""
        return self._state == _FINISHED

    @property
    def is_disconnected(self) -> bool:
        """Whether the client is known to be gone: a send failed, or an `open_disconnect_scope` noticed."""
        return self._connection.is_disconnected

    async def send(self, status: int, headers: Headers = (), *, body: bytes = b"", chunked: bool = False) -> None:
        """Send a whole reply in one write, framed by its length, or by one chunk when *chunked*."""
        self._check(_FRESH)
        bodiless = status in _BODILESS
        if chunked and self._request.version != "1.0" and not bodiless:
            head = self._head(status, headers, b"Transfer-Encoding: chunked\r\n")
            body = _chunk(body) + _LAST_CHUNK
        else:
            head = self._head(status, headers, b"" if bodiless else b"Content-Length: %d\r\n" % len(body))
        if bodiless or self._request.method == "HEAD":
            body = b""
        self._state = _FINISHED
        await self._connection.send(head + body)

    async def start(self, status: int, headers: Headers = (), *, first: bytes = b"") -> None:
        """Send the head of a streamed reply, and the *first* piece of its body in the same write."""
        self._check(_FRESH)
        self._is_chunked = self._request.version != "1.0" and status not in _BODILESS
        if not self._is_chunked:
            self._request.is_keep_alive = False  # HTTP/1.0 knows no chunks: the close is the end of the body
        head = self._head(status, headers, b"Transfer-Encoding: chunked\r\n" if self._is_chunked else b"")
        self._state = _STREAMING
        await self._connection.send(head + self._framed(first))

    async def write(self, data: bytes) -> None:
        """Send a piece of a streamed reply; an empty one sends nothing."""
        self._check(_STREAMING)
        if framed := self._framed(data):
            await self._connection.send(framed)
        else:
            await trio.lowlevel.checkpoint()

    async def finish(self, *, last: bytes = b"") -> None:
        """Send the *last* piece of a streamed reply and its end, in one write."""
        self._check(_STREAMING)
        self._state = _FINISHED
        framed = self._framed(last)
        if self._is_chunked and self._request.method != "HEAD":
            framed += _LAST_CHUNK
        if framed:
            await self._connection.send(framed)
        else:
            await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """Send nothing more: when the handler returns the connection is closed, so the client sees a cut reply."""
        self._state = _FINISHED
        self._request.is_keep_alive = False

    @asynccontextmanager
    async def open_disconnect_scope(self) -> AsyncIterator[trio.CancelScope]:
        """Cancel the body when the client goes away meanwhile (end of file counts), and set `is_disconnected`.

        Requests that the client pipelines meanwhile are kept for later. Ask `scope.cancelled_caught` after the block.
        """
        with trio.CancelScope() as scope:
            async with self._connection.watched(scope):
                yield scope

    def _check(self, expected: str) -> None:
        if self._state != expected:
            raise RuntimeError(f"this reply is {self._state}, not {expected}")

    def _framed(self, data: bytes) -> bytes:
        if not data or self._request.method == "HEAD":
            return b""
        return _chunk(data) if self._is_chunked else data

    def _head(self, status: int, headers: Headers, framing: bytes) -> bytes:
        encoded = headers if isinstance(headers, bytes) else encode_headers(headers)
        keep_alive = self._connection.may_keep_alive(self._request)
        self._request.is_keep_alive = keep_alive
        if not keep_alive:
            framing += b"Connection: close\r\n"
        elif self._request.version == "1.0":
            framing += b"Connection: keep-alive\r\n"
        return b"%b%b%b%b\r\n" % (_STATUS_LINES[status], self._connection.date_line(), encoded, framing)


_FRESH: Final = "fresh"
_STREAMING: Final = "streaming"
_FINISHED: Final = "finished"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


Handler: TypeAlias = Callable[[ServerRequest, ServerReply], Awaitable[None]]


@final
class _Connection:
    """One stream: reads requests, has them handled in order, sends the replies."""

    def __init__(self, core: _Core, stream: trio.abc.Stream) -> None:
        self.is_disconnected = False
        self.reply: ServerReply | None = None
        self._core = core
        self._stream = self.stream = stream
        # The socket itself, where there is one: SocketStream's error translation costs 8 us a call.
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) else None
        self._parser = _RequestParser(core.limits)
        self._scope = trio.CancelScope()
        self._early = bytearray()
        self._is_timed = False
        self._is_idle = False
        self._expired_request = False

    async def run(self) -> None:
        with self._scope:
            while (request := await self._next_request()) is not None:
                await self._handle(request)
                if self.is_disconnected or not request.is_keep_alive:
                    break
        if self._expired_request:
            await self.refuse(408)

    async def _handle(self, request: ServerRequest) -> None:
        reply = self.reply = ServerReply(self, request)
        self._core.requests += 1
        await self._core.handler(request, reply)
        if not reply.is_finished and not self.is_disconnected:
            raise RuntimeError(f"the handler of {request!r} returned without finishing its reply")

    # Reading.

    async def _next_request(self) -> ServerRequest | None:
        parser = self._parser
        while not parser.ready:
            if parser.refusal:
                await self.refuse(parser.refusal)
                return None
            if parser.wants_continue:
                parser.wants_continue = False
                await self.send(_CONTINUE)
            data = await self._receive()
            if not data:
                return None
            parser.feed(data)
        if self._is_timed:
            self._core.slow.disarm(self)
            self._is_timed = False
        return parser.ready.popleft()

    async def _receive(self) -> bytes:
        if self._early:
            data = bytes(self._early)
            self._early.clear()
            return data
        if self._parser.is_inside_request:
            return await self._receive_rest()
        core = self._core
        if core.is_draining:
            return b""
        self._is_idle = True
        core.idle.arm(self)
        try:
            return await self._read()
        finally:
            core.idle.disarm(self)
            self._is_idle = False

    async def _receive_rest(self) -> bytes:
        if not self._is_timed:
            self._core.slow.arm(self)
            self._is_timed = True
        return await self._read()

    async def _read(self) -> bytes:
        try:
            if self._socket is not None:
                return await self._socket.recv(_RECEIVE_BYTES)
            return bytes(await self._stream.receive_some(_RECEIVE_BYTES))
        except (trio.BrokenResourceError, OSError):
            self.is_disconnected = True
            return b""

    @asynccontextmanager
    async def watched(self, scope: trio.CancelScope) -> AsyncIterator[None]:
        """Read ahead while the body runs; cancel *scope* at the client's end of file."""
        watch_scope = trio.CancelScope()
        done = trio.Event()
        self._core.nursery.start_soon(self._watch, scope, watch_scope, done)
        try:
            yield
        finally:
            watch_scope.cancel()
            with trio.CancelScope(shield=True):  # bounded: the watch was cancelled just now, and waits for nothing else
                await done.wait()

    async def _watch(self, scope: trio.CancelScope, watch_scope: trio.CancelScope, done: trio.Event) -> None:
        try:
            with watch_scope:
                await self._read_ahead()
        finally:
            if self.is_disconnected:
                scope.cancel()
            done.set()

    async def _read_ahead(self) -> None:
        """Keep what comes for later, within bounds, until the client's end."""
        while len(self._early) < _RECEIVE_BYTES:
            data = await self._read()
            if not data:
                self.is_disconnected = True
                return
            self._early += data

    # Sending.

    async def send(self, data: bytes) -> None:
        if self.is_disconnected:
            raise trio.BrokenResourceError("the client is gone")
        stuck = self._core.stuck
        stuck.arm(self)
        try:
            await self._write(data)
        except (trio.BrokenResourceError, OSError) as exc:
            self.is_disconnected = True
            raise trio.BrokenResourceError("the client is gone") from exc
        finally:
            stuck.disarm(self)

    async def _write(self, data: bytes) -> None:
        if self._socket is not None:
            sent = await self._socket.send(data)
            if sent == len(data):
                return
            data = data[sent:]
        await self._stream.send_all(data)

    async def refuse(self, status: int) -> None:
        """Answer without a handler and let the client read it before the close resets the connection."""
        self._core.refused += 1
        with trio.move_on_after(self._core.limits.linger_s):
            body = _STATUS_LINES[status][9:-2]
            head = b"Content-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
            await self.send(b"%b%b%b%b" % (_STATUS_LINES[status], self.date_line(), head, body))
            # A client that was refused may leave as rudely as it likes; that is no error of a handler.
            with suppress(trio.BrokenResourceError):
                if isinstance(self._stream, trio.abc.HalfCloseableStream):
                    await self._stream.send_eof()
            while await self._read():
                pass

    async def fail(self) -> None:
        """Answer for a handler that raised: a 500 when nothing was sent, else the reply stays cut."""
        if self.reply is not None and not self.reply.is_started and not self.is_disconnected:
            with trio.move_on_after(self._core.limits.linger_s):
                self.reply.abort()
                body = b"Internal Server Error"
                head = b"Content-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
                await self.send(b"%b%b%b%b" % (_STATUS_LINES[500], self.date_line(), head, body))

    def may_keep_alive(self, request: ServerRequest) -> bool:
        return request.is_keep_alive and not self._core.is_draining

    def date_line(self) -> bytes:
        return self._core.date_line()

    # Ending.

    def stop_waiting(self) -> None:
        """Close because nothing came, or nobody read."""
        self._scope.cancel()

    def stop_if_idle(self) -> None:
        """Close unless a request is being read or answered."""
        if self._is_idle:
            self._scope.cancel()

    def stop_reading(self) -> None:
        """Answer 408: a request was begun and not ended in time."""
        self._expired_request = True
        self._scope.cancel()

    async def aclose(self) -> None:
        for timeouts in (self._core.idle, self._core.slow, self._core.stuck):
            timeouts.disarm(self)
        with trio.move_on_after(_CLOSE_S, shield=True):
            await self._stream.aclose()


@final
class _Core:
    """What the connections of one server share."""

    def __init__(
        self,
        handler: Handler,
        nursery: trio.Nursery,
        *,
        limits: HttpServerLimits,
        on_error: Callable[[Exception], None],
        wall: Callable[[], float] | None,
    ) -> None:
        self.handler = handler
        self.nursery = nursery
        self.limits = limits
        self.connections: set[_Connection] = set()
        self.is_draining = False
        self.accepted = 0
        self.requests = 0
        self.refused = 0
        self.handler_errors = 0
        self.idle = _TimeoutQueue(limits.idle_timeout_s, _Connection.stop_waiting)
        self.slow = _TimeoutQueue(limits.request_timeout_s, _Connection.stop_reading)
        self.stuck = _TimeoutQueue(limits.send_timeout_s, _Connection.stop_waiting)
        self._on_error = on_error
        self._wall = wall
        self._date_second = -1
        self._date_line = b""

    def start_timeouts(self) -> None:
        for timeouts in (self.idle, self.slow, self.stuck):
            if timeouts.timeout_s != inf:
                self.nursery.start_soon(timeouts.run)

    def date_line(self) -> bytes:
        """The Date header, remade once a second; nothing without a wall clock."""
        if self._wall is None:
            return b""
        second = int(self._wall())
        if second != self._date_second:
            self._date_second = second
            self._date_line = f"Date: {formatdate(second, usegmt=True)}\r\n".encode("ascii")
        return self._date_line

    async def run_contained(self, connection: _Connection) -> None:
        """Here ends an error of a handler: it is reported, and costs this connection only."""
        errors: list[Exception] = []
        await contain(connection.run, report=errors.append)
        for exc in errors:
            if not (connection.is_disconnected and isinstance(exc, trio.BrokenResourceError)):
                self.handler_errors += 1
                self._on_error(exc)
                await connection.fail()


@final
class HttpServer:
    """A running server; made by `open_http_server`, or handed out by `serve_http`."""

    def __init__(self, core: _Core) -> None:
        self._core = core
        self._accept_scope = trio.CancelScope()

    def __repr__(self) -> str:
        state = "draining" if self._core.is_draining else "running"
        return f"<HttpServer {state}, {len(self._core.connections)} connections>"

    def statistics(self) -> HttpServerStatistics:
        """A snapshot of the counters."""
        core = self._core
        return HttpServerStatistics(
            connections=len(core.connections),
            accepted=core.accepted,
            requests=core.requests,
            refused=core.refused,
            handler_errors=core.handler_errors,
        )

    def drain(self) -> None:
        """Stop accepting, close idle connections, and close the others after the reply they are at."""
        self._core.is_draining = True
        self._accept_scope.cancel()
        for connection in self._core.connections:
            connection.stop_if_idle()

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serve one connection until either side ends it, and close *stream*. Errors of the handler stay inside."""
        core = self._core
        connection = _Connection(core, stream)
        core.connections.add(connection)
        core.accepted += 1
        try:
            if len(core.connections) > core.limits.max_connections:
                await connection.refuse(503)
            else:
                await core.run_contained(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            core.connections.discard(connection)
            await connection.aclose()

    async def accept(self, listeners: Sequence[trio.abc.Listener[trio.abc.Stream]], connections: trio.Nursery) -> None:
        """Serve what *listeners* accept, each connection as a task of *connections*, until `drain`; closes them."""
        with self._accept_scope:
            await trio.serve_listeners(self.serve_stream, list(listeners), handler_nursery=connections)


def _log_error(exc: Exception) -> None:
    _LOG.error("a request handler failed", exc_info=exc)


@asynccontextmanager
async def open_http_server(
    handler: Handler,
    *,
    limits: HttpServerLimits | None = None,
    on_error: Callable[[Exception], None] = _log_error,
    wall: Callable[[], float] | None = None,
) -> AsyncIterator[HttpServer]:
    """Yield a server for streams that the caller brings (`HttpServer.serve_stream`); leaving it stops its helper tasks.

    *on_error* gets each exception of a handler and must not raise. *wall* (seconds since the epoch) dates the replies;
    without it they have no Date header, which virtual time wants. Leave only when no `serve_stream` runs any more.
    """
    async with trio.open_nursery() as nursery:
        core = _Core(handler, nursery, limits=limits or HttpServerLimits(), on_error=on_error, wall=wall)
        core.start_timeouts()
        yield HttpServer(core)
        nursery.cancel_scope.cancel()


async def serve_http(
    handler: Handler,
    listeners: Sequence[trio.abc.Listener[trio.abc.Stream]],
    *,
    limits: HttpServerLimits | None = None,
    on_error: Callable[[Exception], None] = _log_error,
    wall: Callable[[], float] | None = None,
    task_status: trio.TaskStatus[HttpServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *handler* on *listeners*, and close them in the end.

    The started value is the `HttpServer`. Returns after its `drain`, when running requests are done or
    `limits.drain_timeout_s` is over; cancelling stops at once and cuts running replies. The arguments are those of
    `open_http_server`.
    """
    limits = limits or HttpServerLimits()
    async with (
        open_http_server(handler, limits=limits, on_error=on_error, wall=wall) as server,
        trio.open_nursery() as connections,
    ):
        task_status.started(server)
        await server.accept(listeners, connections)
        connections.cancel_scope.deadline = trio.current_time() + limits.drain_timeout_s


async def serve_http_connection(
    stream: trio.abc.Stream,
    handler: Handler,
    *,
    limits: HttpServerLimits | None = None,
    on_error: Callable[[Exception], None] = _log_error,
    wall: Callable[[], float] | None = None,
) -> None:
    """Serve one connection on *stream* until either side ends it, and close it; arguments as of `open_http_server`."""
    async with open_http_server(handler, limits=limits, on_error=on_error, wall=wall) as server:
        await server.serve_stream(stream)
