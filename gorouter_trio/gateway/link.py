"""The other end of a gateway's connection: requests with answers, many at a time, over one WebSocket.

What comes is handed to whoever asked, as the text that it was; it can be no more than was granted. A connection that
breaks ends every call that runs on it with `LinkBrokenError`; beginning anew is the affair of who called.
"""

from __future__ import annotations

import math
import os
import ssl
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias, cast
from urllib.parse import SplitResult, urlsplit

import msgspec
import trio
from msgspec import Struct
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
    wrap_client_stream,
)

from ..errors import (
    AccessDeniedError,
    BadRequestError,
    ConfigError,
    ConnectError,
    DecodeError,
    GorouterError,
    InvalidTokenError,
    SessionBusyError,
)
from ..transport.tls import make_tls_context, open_tls
from ..wire.codec import make_decoder
from .protocol import (
    CLOSE_CODES,
    SUBPROTOCOL,
    VERSION,
    Ask,
    AskOptions,
    Cancel,
    ClientMessage,
    Grant,
    Hello,
    SessionRequest,
    Welcome,
    decode_client_message,
    decode_server_message,
    encode_text,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from ..network import TlsConfig
    from ..secret import Secret

__all__ = ["Call", "Head", "Link", "LinkBrokenError", "is_refused_by_tls", "open_link"]

_MAX_MESSAGE: Final = 67_108_864
_SPARE_BYTES: Final = 1_048_576
_CONNECT_S: Final = 10.0
_CLOSE_S: Final = 1.0
_CANCELLED_S: Final = 0.05
_SEND_S: Final = 10.0
_QUEUE: Final = 16
_LAST: Final = frozenset({"done", "failed", "accepted", "history_page", "session_statistics", "snapshot"})


class Head(Struct, frozen=True):
    """What all messages of a gateway begin with."""

    type: str
    id: int = 0
    seq: int = 0

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes for this request."""
        return self.type in _LAST


_decode_head = make_decoder(Head)


class LinkBrokenError(Exception):
    """The connection has ended; `code` is its close code, None where there was none."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        super().__init__(
            f"the connection to the gateway has ended ({code}: {reason or CLOSE_CODES.get(code or 0, '')})"
        )
        self.code = code
        self.reason = reason

    @property
    def is_for_good(self) -> bool:
        """Whether every other connection of this client would end as well, whatever is said on it."""
        return self.code in {4401, 4406}

    def fatal(self) -> GorouterError | None:
        """The error that asking again would only give again; None where it is worth a try."""
        match self.code:
            case 4401:
                return InvalidTokenError(self.reason or "the access token does not hold", problem="unknown")
            case 4406 | 4400 | 4409 | 1003 | 1009:
                return ConfigError(f"the gateway refuses what this client sends: {self.reason}")
            case _:
                return None


_Item: TypeAlias = tuple[Head, str]


class Call:
    """One request on one connection."""

    def __init__(self, link: Link, request_id: int, *, credit: int) -> None:
        self.id = request_id
        self._link = link
        self._items: deque[_Item] = deque()
        self._room = credit + _SPARE_BYTES
        self._news = trio.Event()
        self.is_over = False

    async def receive(self) -> _Item:
        """The next message about the request: what it begins with, and its text. Raises `LinkBrokenError`."""
        while not self._items:
            if self._link.broken is not None:
                raise self._link.broken
            self._news = trio.Event()
            await self._news.wait()
        head, text = self._items.popleft()
        self._room += len(text)
        return head, text

    def receive_nowait(self) -> _Item | None:
        """The next message that is there already."""
        if not self._items:
            return None
        head, text = self._items.popleft()
        self._room += len(text)
        return head, text

    def deliver(self, head: Head, text: str) -> bool:
        """Used by the link; False for more than may come."""
        self._room -= len(text)
        self._items.append((head, text))
        self.is_over = head.is_last
        self._news.set()
        return self._room > 0 or head.is_last

    def wake(self) -> None:
        """Used by the link: it has ended."""
        self._news.set()

    async def grant(self, credit: int) -> None:
        """Let so many bytes more come."""
        if not self.is_over:
            await self._link.send(Grant(id=self.id, credit=credit))

    async def cancel(self) -> None:
        """Stop the turn; its end comes all the same."""
        if not self.is_over:
            await self._link.send(Cancel(id=self.id))


class Link:
    """A connection; made by `open_link`."""

    def __init__(self, websocket: WebSocketConnection, welcome: Welcome) -> None:
        self._websocket = websocket
        self._calls: dict[int, Call] = {}
        self._last_id = 0
        self.welcome = welcome
        self.broken: LinkBrokenError | None = None
        self.is_draining = False
        self._closed = trio.Event()
        self._leaving = trio.Event()

    def __repr__(self) -> str:
        return f"<Link: {'broken' if self.broken else 'open'}, {len(self._calls)} calls>"

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs on it."""
        return not self._calls

    @property
    def has_room(self) -> bool:
        """Whether the gateway takes one more request on this connection."""
        return len(self._calls) < self.welcome.max_requests

    async def begin(self, request: ClientMessage | SessionRequest) -> Call:
        """Send a request, under an id of this connection; raises `LinkBrokenError`, `SessionBusyError`.

        Raises `BadRequestError` for one that the gateway would close the connection for, with all else that runs on it.
        """
        if self.broken is not None:
            raise self.broken
        if not self.has_room:
            raise SessionBusyError(f"{self.welcome.max_requests} requests run on this connection")
        await trio.lowlevel.checkpoint_if_cancelled()
        numbered = msgspec.structs.replace(request, id=self._last_id + 1)
        text = _checked_text(numbered, most=self.welcome.max_message_bytes)
        self._last_id += 1
        # As much as it may be granted later on, of which no more than this can be on its way.
        credit = max(request.credit, self.welcome.max_credit) if isinstance(request, Ask) else _MAX_MESSAGE
        call = Call(self, self._last_id, credit=credit)
        self._calls[call.id] = call
        try:
            # Nothing may come between: the ids go up in the order in which they are sent.
            await self._send_text(text)
        except BaseException:
            self._calls.pop(call.id, None)
            raise
        return call

    def end(self, call: Call) -> None:
        """Forget a call: what still comes for it is thrown away."""
        self._calls.pop(call.id, None)

    async def send(self, message: ClientMessage | SessionRequest) -> None:
        """Send a message; raises `LinkBrokenError`. Cancelling leaves no frame half sent."""
        await self._send_text(encode_text(message))

    async def _send_text(self, text: str) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _SEND_S) as scope:
                await self._websocket.send_message(text)
        except ConnectionClosed as exc:
            raise self._break(exc) from None
        if scope.cancelled_caught:
            raise self._end(LinkBrokenError(None, "the gateway does not read"))

    async def closed(self) -> None:
        """Wait for its end."""
        await self._closed.wait()

    async def leaving(self) -> None:
        """Wait for its end, or for the word that its gateway goes away."""
        await self._leaving.wait()

    async def run(self) -> None:
        """Hand out what comes, until the connection ends."""
        try:
            while True:
                self._route(str(await self._websocket.get_message()))
        except ConnectionClosed as exc:
            self._break(exc)
        except DecodeError as exc:
            self._end(LinkBrokenError(None, exc.message))
        except BaseException:
            self._end(LinkBrokenError(None, "it was closed here"))
            raise

    def _route(self, text: str) -> None:
        try:
            head = cast("Head", _decode_head(text))
        except (msgspec.DecodeError, ValueError) as exc:
            raise DecodeError(f"no message of a gateway: {exc}") from None
        if head.type == "draining":
            self.is_draining = True
            self._leaving.set()
        call = self._calls.get(head.id)
        if call is None:
            return
        if not call.deliver(head, text):
            raise DecodeError("the gateway sends more than was granted")
        if head.is_last:
            del self._calls[head.id]

    def _break(self, exc: ConnectionClosed) -> LinkBrokenError:
        reason = exc.reason
        broken = LinkBrokenError(None) if reason is None else LinkBrokenError(reason.code, reason.reason or "")
        return self._end(broken)

    def _end(self, broken: LinkBrokenError) -> LinkBrokenError:
        self.broken = self.broken or broken
        self._closed.set()
        self._leaving.set()
        for call in self._calls.values():
            call.wake()
        return self.broken


def _checked_text(request: ClientMessage | SessionRequest, *, most: int) -> str:
    """The text of a request; raises `BadRequestError` for what is none, or is longer than the gateway takes."""
    try:
        text = encode_text(request)
        decode_client_message(encode_text(_outline(request)))
    except DecodeError as exc:
        raise BadRequestError(exc.message, status=400) from None
    except (TypeError, ValueError) as exc:
        raise BadRequestError(f"the request cannot be written as JSON: {exc}", status=400) from None
    size = len(text) if text.isascii() else len(text.encode())
    if size > most:
        raise BadRequestError(f"the request is {size} bytes long; this gateway takes {most}", status=413)
    return text


def _outline(request: ClientMessage | SessionRequest) -> ClientMessage | SessionRequest:
    """The request without what is long, and was made by the decoders of these very fields."""
    if not isinstance(request, Ask):
        return request
    return msgspec.structs.replace(request, messages=None, options=AskOptions())


@asynccontextmanager
async def open_link(
    url: str,
    *,
    token: Secret | None = None,
    tls: TlsConfig | ssl.SSLContext | None = None,
    headers: Sequence[tuple[str, str]] = (),
    agent: str = "",
) -> AsyncIterator[Link]:
    """Connect, say hello, and run the link until the block is left, which closes it.

    Raises `ConnectError`, `ConfigError` for files of `tls` that cannot be used, `LinkBrokenError` when the gateway
    closes before its welcome, `AccessDeniedError` where it refuses the upgrade.
    """
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(_CONNECT_S) as scope:
            websocket, stream = await _connect(nursery, url, tls=tls, headers=headers)
            try:
                welcome = await _greet(websocket, token, agent)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
        if scope.cancelled_caught:
            raise ConnectError("the gateway did not answer in time")
        link = Link(websocket, welcome)
        nursery.start_soon(link.run)
        try:
            yield link
        finally:
            # Who is cancelled has no reader any more that could hear the answer to the close.
            is_cancelled = trio.current_effective_deadline() == -math.inf
            patience_s = _CANCELLED_S if is_cancelled else _CLOSE_S
            with trio.CancelScope(shield=True, deadline=trio.current_time() + patience_s):
                await websocket.aclose()
            # The library leaves the socket of a connection that the other side has closed.
            await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()


async def _connect(
    nursery: trio.Nursery,
    url: str,
    *,
    tls: TlsConfig | ssl.SSLContext | None,
    headers: Sequence[tuple[str, str]],
) -> tuple[WebSocketConnection, trio.abc.Stream]:
    stream: _Watched | None = None
    try:
        with trio.CancelScope() as handshake:
            inner, place = await _open_stream(url, tls)
            stream = _Watched(inner, on_end=handshake.cancel)
            # Its own ways to connect leave the socket of a refused handshake to the garbage collector.
            websocket = await wrap_client_stream(
                nursery,
                cast("trio.SocketStream", stream),  # any stream will do, which its annotation does not say
                place.netloc,
                (place.path or "/") + (f"?{place.query}" if place.query else ""),
                subprotocols=[SUBPROTOCOL],
                extra_headers=[(name.encode(), value.encode()) for name, value in headers],
                message_queue_size=_QUEUE,
                max_message_size=_MAX_MESSAGE,
                receive_buffer_size=None,
            )
            return websocket, stream
        raise trio.BrokenResourceError("the connection was closed in the handshake")
    except (ConnectionRejected, HandshakeError, OSError, trio.BrokenResourceError, ConnectionClosed) as exc:
        if stream is not None:
            await trio.aclose_forcefully(stream)
        raise _connect_error(exc) from None
    except BaseException:
        if stream is not None:
            await trio.aclose_forcefully(stream)
        raise


class _Watched(trio.abc.Stream):
    """A stream that tells of its end: the library goes on to wait for a handshake that cannot come any more."""

    def __init__(self, inner: trio.abc.Stream, *, on_end: Callable[[], object]) -> None:
        self._inner = inner
        self._on_end = on_end

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        data: bytes | bytearray = b""
        try:
            data = await self._inner.receive_some(max_bytes)
        finally:
            if not data:
                self._on_end()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`."""
        await self._inner.aclose()


async def _open_stream(
    url: str, tls: TlsConfig | ssl.SSLContext | None
) -> tuple[trio.SocketStream | trio.SSLStream[trio.abc.Stream], SplitResult]:
    place = urlsplit(url)
    is_secure = place.scheme == "wss"
    context = make_tls_context(tls, environ=os.environ) if is_secure else None
    host, port = place.hostname or "", place.port or (443 if is_secure else 80)
    tcp = await trio.open_tcp_stream(host, port)
    if context is None:
        return tcp, place
    try:
        return await open_tls(tcp, context, host=host, name=place.netloc), place
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise


def is_refused_by_tls(error: GorouterError) -> bool:
    """Whether one side has refused the other's certificate, or speaks no TLS: trying again would change nothing."""
    broken = error.__cause__
    cause = None if broken is None else broken.__cause__
    return isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError))


def _connect_error(exc: Exception) -> GorouterError:
    if isinstance(exc, ConnectionRejected):
        message = f"the gateway refuses the connection ({exc.status_code})"
        return AccessDeniedError(message) if exc.status_code in {401, 403} else ConnectError(message)
    return ConnectError(f"the gateway cannot be reached: {type(exc).__name__}: {exc}")


async def _greet(websocket: WebSocketConnection, token: Secret | None, agent: str) -> Welcome:
    hello = Hello(version=VERSION, token=None if token is None else token.reveal(), agent=agent)
    try:
        await websocket.send_message(encode_text(hello))
        welcome = decode_server_message(await websocket.get_message())
    except ConnectionClosed as exc:
        reason = exc.reason
        raise (LinkBrokenError(None) if reason is None else LinkBrokenError(reason.code, reason.reason or "")) from None
    if not isinstance(welcome, Welcome):
        raise DecodeError("the gateway did not begin with a welcome")
    return welcome
