"""From an origin to an open connection: the network, a proxy's tunnel, TLS; and users' httpx in their place."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, cast

import trio

from ..errors import ConnectError
from .connection import HttpConnection
from .proxy import check_forwarded, open_tunnel
from .streams import SocketNetwork, UnixNetwork, bottom, closable, drop, reason_of
from .tls import make_tls_context, open_tls

if TYPE_CHECKING:
    import ssl

    from ..network import Proxy, TlsConfig
    from .http import Connection, ConnectionLimits, Connector, Network, Origin, RequestHead
    from .httpx_connection import HttpxUser

__all__ = ["HttpConnector", "connector"]


class HttpConnector:
    """Makes `HttpConnection`s: TCP or another network, through a proxy if there is one, and TLS on top for https.

    Not `decoding` leaves compressed bodies as they come. Raises `ConfigError` for certificates that cannot be used.
    """

    def __init__(
        self,
        origin: Origin,
        *,
        network: Network,
        tls: TlsConfig | ssl.SSLContext | None = None,
        limits: ConnectionLimits,
        proxy: Proxy | None = None,
        decoding: bool = True,
    ) -> None:
        self._origin = origin
        self._network = network
        self._limits = limits
        self._proxy = proxy
        self._decoding = decoding
        # Made once: loading the trust store takes tens of milliseconds.
        self._tls = make_tls_context(tls, environ=os.environ) if origin.scheme == "https" else None
        self._proxy_tls = (
            make_tls_context(tls, environ=os.environ, for_proxy=True)
            if proxy is not None and proxy.scheme == "https"
            else None
        )

    async def connect(self) -> Connection:
        """A new connection; raises `ConnectError`, having sent nothing. Cancelling leaves nothing open."""
        began = trio.current_time()
        stream = await self._dial()
        try:
            ready = await self._prepare(stream)
        except BaseException:
            await drop(bottom(stream))  # noqa: ASYNC102 - shields itself, bounded
            raise
        took_s = trio.current_time() - began
        if self._proxy is not None and self._proxy.forwards(self._origin.scheme):
            return _ForwardedConnection(
                ready, self._limits, decoding=self._decoding, connect_s=took_s, proxy=self._proxy
            )
        return HttpConnection(ready, self._limits, decoding=self._decoding, connect_s=took_s)

    async def _dial(self) -> trio.abc.Stream:
        """A stream to the origin, or to the proxy that leads to it."""
        origin, proxy = self._origin, self._proxy
        host, port = (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)
        try:
            return closable(await self._network.connect(host, port))
        except (OSError, UnicodeError) as exc:
            # A name that cannot even be looked up is a UnicodeError.
            name = origin.netloc if proxy is None else f"the proxy {proxy.url}"
            raise ConnectError(f"cannot connect to {name}: {reason_of(exc)}") from exc

    async def _prepare(self, stream: trio.abc.Stream) -> trio.abc.Stream:
        """What a request may be written to: the proxy's part, then TLS with the origin."""
        origin, proxy = self._origin, self._proxy
        if proxy is not None and self._proxy_tls is not None:
            stream = await open_tls(stream, self._proxy_tls, host=proxy.host, name=f"the proxy {proxy.url}")
        if proxy is not None and not proxy.forwards(origin.scheme):
            await open_tunnel(stream, proxy, origin=origin)
        if self._tls is not None:
            stream = await open_tls(stream, self._tls, host=origin.host, name=origin.netloc)
        return stream


class _ForwardedConnection(HttpConnection):
    """A connection to a proxy that fetches plain http itself: it may answer in the API's place."""

    __slots__ = ("_proxy",)

    def __init__(
        self, stream: trio.abc.Stream, limits: ConnectionLimits, *, decoding: bool, connect_s: float, proxy: Proxy
    ) -> None:
        super().__init__(stream, limits, decoding=decoding, connect_s=connect_s)
        self._proxy = proxy

    async def start(self, head: RequestHead, body: bytes) -> None:
        """Send a request and wait for the head of its reply; raises `ConnectError` for the proxy's own refusal."""
        await super().start(head, body)
        check_forwarded(self.status, self._proxy)


def connector(
    origin: Origin,
    *,
    transport: object | None = None,
    tls: TlsConfig | ssl.SSLContext | None = None,
    limits: ConnectionLimits,
    proxy: Proxy | None = None,
    unix_socket: str | None = None,
) -> Connector:
    """The connector for a client's settings; raises `TypeError` when they do not fit together, `ConfigError`."""
    if _is_of_httpx(transport) or (callable(transport) and not hasattr(transport, "connect")):
        for name, value in (("tls", tls), ("proxy", proxy)):
            if value is not None:
                raise TypeError(f"{name}: set it at the httpx transport or client that is given as transport")
        # Loads httpx, which few programs need.
        from .httpx_connection import HttpxConnector

        return HttpxConnector(cast("HttpxUser", transport), limits)
    if transport is not None and not callable(getattr(transport, "connect", None)):
        raise TypeError("transport: must be an httpx transport or client, or have connect(host, port)")
    own = SocketNetwork() if unix_socket is None else UnixNetwork(unix_socket)
    network = own if transport is None else cast("Network", transport)
    return HttpConnector(origin, network=network, tls=tls, limits=limits, proxy=proxy)


def _is_of_httpx(transport: object) -> bool:
    """Whether it is a transport or a client of httpx: a program that has one has loaded httpx."""
    httpx: Any = sys.modules.get("httpx")
    return httpx is not None and isinstance(transport, (httpx.AsyncBaseTransport, httpx.AsyncClient))
