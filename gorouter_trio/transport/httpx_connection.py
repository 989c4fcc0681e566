"""A user's httpx transport or client in the place of a connection."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import httpx
import trio

from .._contain import contain
from ..errors import ConfigError, ConnectError, DecodeError, StreamBrokenError
from .compression import make_decoder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from .compression import BodyDecoder
    from .http import Connection, ConnectionLimits, RequestHead

__all__ = ["HttpxConnection", "HttpxConnector", "HttpxUser"]

_BUFFERED_PIECES = 10_000
_KINDS = (httpx.AsyncBaseTransport, httpx.AsyncClient)


HttpxUser: TypeAlias = "httpx.AsyncBaseTransport | httpx.AsyncClient"


class HttpxConnection:
    """A user's httpx transport or client in the place of a connection.

    `httpx.AsyncClient` has a pool of its own, so it serves every worker; what it costs is known
    (benchmarks/README.md). Deadlines are the pool's: the timeouts of a transport are turned off,
    those of a client stay what the user made them. With `owned` it is this connection's alone, and
    `aclose` closes it.

    Bodies are decoded here and not by httpx, which would unpack whatever a read brings without a bound.
    """

    __slots__ = (
        "_chunks",
        "_decoder",
        "_limits",
        "_owned",
        "_received_bytes",
        "_response",
        "_scope",
        "_user",
        "headers",
        "is_closed",
        "status",
    )

    def __init__(self, user: HttpxUser, limits: ConnectionLimits, *, owned: bool = False) -> None:
        self._user = user
        self._limits = limits
        self._owned = owned
        self._received_bytes = 0
        self._decoder: BodyDecoder | None = None
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
        request.stream = _Body(body)
        self._received_bytes = 0
        with self._waiting():
            if isinstance(self._user, httpx.AsyncClient):
                response = await self._user.send(request, stream=True)
            else:
                request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"))
                response = await self._user.handle_async_request(request)
            self._response = response
            # What was read already, by a mock or a hook of the user's, httpx has decoded as well.
            is_read = response.is_stream_consumed
            self._chunks = response.aiter_bytes() if is_read else response.aiter_raw()
            self._decoder = None if is_read else self._make_decoder(response)
            self.status = response.status_code
            self.headers = list(response.headers.raw)

    async def receive_some(self) -> bytes:
        """The next piece of the body, decoded; empty at its end."""
        if self._chunks is None:
            return b""
        with self._waiting():
            return await self._receive(self._chunks)
        raise AssertionError("unreachable")

    def wait_arrival(self) -> None:
        """httpx can only be asked for the next piece."""
        return

    def take_arrival(self) -> None:
        """Nothing arrives beside what `receive_some` gives."""
        return

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
        if self._owned:
            await self._user.aclose()
        await trio.lowlevel.checkpoint()

    def _make_decoder(self, response: httpx.Response) -> BodyDecoder | None:
        try:
            return make_decoder(response.headers.get("content-encoding", ""), self._limits)
        except DecodeError:
            if response.status_code < 300:
                raise
            return None

    async def _receive(self, chunks: AsyncIterator[bytes]) -> bytes:
        decoder = self._decoder
        while True:
            if decoder is not None and not decoder.needs_input:
                piece = decoder.decode()
            else:
                chunk = await anext(chunks, None)
                if chunk is None:
                    break
                self._count(len(chunk))
                piece = chunk if decoder is None else decoder.decode(chunk)
            if piece:
                return piece
        if decoder is not None:
            decoder.finish()
        await self._finish()
        return b""

    def _count(self, received_bytes: int) -> None:
        self._received_bytes += received_bytes
        if self._received_bytes > self._limits.max_body_bytes:
            raise DecodeError(f"the reply's body is over {self._limits.max_body_bytes} bytes")

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


class HttpxConnector:
    """Hands out a user's transport or client, or one of its own for each connection from what makes them."""

    def __init__(self, user: HttpxUser | Callable[[], HttpxUser], limits: ConnectionLimits) -> None:
        self._user = user
        self._limits = limits

    async def connect(self) -> Connection:
        """A handle; opens nothing by itself. Raises `ConfigError` when what was made is no transport and no client."""
        await trio.lowlevel.checkpoint()
        user = self._user
        if isinstance(user, _KINDS):
            return HttpxConnection(user, self._limits)
        made = user()
        if not isinstance(made, _KINDS):
            raise ConfigError(f"transport: made a {type(made).__name__}, not an httpx transport or client")
        return HttpxConnection(made, self._limits, owned=True)


class _Body(httpx.ByteStream):
    """A request's body, read without a generator: trio complains of one that a cancel leaves in the middle."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._body = body

    def __aiter__(self) -> AsyncIterator[bytes]:
        return _Pieces(self._body)


class _Pieces:
    def __init__(self, body: bytes) -> None:
        self._left = [body]

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._left:
            raise StopAsyncIteration
        return self._left.pop()


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
