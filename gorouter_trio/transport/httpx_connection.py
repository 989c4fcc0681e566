"""A user's httpx transport or client in the place of a connection."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import trio

from .._contain import contain
from ..errors import ConnectError, DecodeError, StreamBrokenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from .http import Connection, ConnectionLimits, RequestHead

__all__ = ["HttpxConnection", "HttpxConnector"]

_BUFFERED_PIECES = 10_000


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


class HttpxConnector:
    def __init__(self, user: httpx.AsyncBaseTransport | httpx.AsyncClient, limits: ConnectionLimits) -> None:
        self._user = user
        self._limits = limits

    async def connect(self) -> Connection:
        await trio.lowlevel.checkpoint()
        return HttpxConnection(self._user, max_body_bytes=self._limits.max_body_bytes)


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
