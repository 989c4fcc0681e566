"""The built-in transport with httpx's face, for programs that speak httpx."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import httpx
import trio

from ..errors import ConnectError, DecodeError, StreamBrokenError
from ..network import parse_proxy
from ..secret import Secret
from .connector import HttpConnector
from .http import ConnectionLimits, Origin, RequestHead
from .streams import SocketNetwork, drop

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator, Mapping

    from ..network import Proxy, TlsConfig
    from .http import Connection, Network

__all__ = ["HttpTransport"]


class HttpTransport(httpx.AsyncBaseTransport):
    """The built-in transport with httpx's face: `httpx.AsyncClient(transport=HttpTransport())`.

    Idle connections are kept per origin, at most `keep` of them, and closed by `aclose`. It must be used
    from one trio run. Of httpx's timeouts, `connect` holds for making a connection and `read` for
    sending a request and waiting for the head of its reply, and for each piece of its body. A request
    body is read to its end before it is sent, and compressed replies are httpx's to decode. `tls` and
    `proxy` are as in `ClientConfig`; proxies of the environment are not looked at.
    """

    def __init__(
        self,
        *,
        network: Network | None = None,
        tls: TlsConfig | ssl.SSLContext | None = None,
        limits: ConnectionLimits | None = None,
        proxy: str | Secret | None = None,
        keep: int = 16,
    ) -> None:
        """Raises `ConfigError` for a URL that is no proxy's; certificates are read for the first https request."""
        self._network = network or SocketNetwork()
        self._tls = tls
        self._limits = limits or ConnectionLimits()
        self._proxy = None if proxy is None else parse_proxy(_as_secret(proxy), field="proxy")
        # A traceback may show locals.
        del proxy
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
            await drop(connection)
        await trio.lowlevel.checkpoint()

    async def _give_back(self, origin: Origin, connection: Connection) -> None:
        """Keep the connection for the next request, or close it."""
        idle = self._idle.setdefault(origin, [])
        if connection.is_reusable and len(idle) < self._keep and not self._closed:
            idle.append(connection)
            await trio.lowlevel.checkpoint()
        else:
            await drop(connection)

    async def _start(self, origin: Origin, request: httpx.Request, *, body: bytes) -> Connection:
        """A connection that has the head of the reply. One that was found closed is replaced."""
        head = _head_of(request, origin, proxy=self._proxy)
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
                await drop(connection)  # noqa: ASYNC120 - shields itself, bounded
                if is_new or exc.sent:
                    raise
            except BaseException:
                await drop(connection)  # noqa: ASYNC102 - shields itself, bounded
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
            self._connectors[origin] = HttpConnector(
                origin, network=self._network, tls=self._tls, limits=self._limits, proxy=self._proxy, decoding=False
            )
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


def _as_secret(proxy: str | Secret) -> Secret:
    return Secret(proxy) if isinstance(proxy, str) else proxy


def _head_of(request: httpx.Request, origin: Origin, *, proxy: Proxy | None) -> RequestHead:
    skipped = {b"host", b"content-length", b"transfer-encoding"}
    raw = request.headers.raw
    try:
        return RequestHead(
            origin,
            method=request.method,
            target=request.url.raw_path.decode("ascii"),
            headers=[(k.decode("latin-1"), v.decode("latin-1")) for k, v in raw if k.lower() not in skipped],
            host=request.headers.get("host"),
            proxy=proxy,
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
        kind = httpx.ConnectError if exc.proxy_status is None else httpx.ProxyError
        return kind(exc.message, request=request)
    if isinstance(exc, StreamBrokenError):
        return httpx.ReadError(exc.message, request=request)
    return httpx.RemoteProtocolError(exc.message, request=request)
