"""From an origin to an open connection: the network, TLS on top, and users' httpx in their place."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, cast

import httpx
import trio

from ..errors import ConnectError
from .connection import HttpConnection
from .httpx_connection import HttpxConnector
from .streams import SocketNetwork, bottom, closable, drop, reason_of

if TYPE_CHECKING:
    from .http import Connection, ConnectionLimits, Connector, Network, Origin

__all__ = ["HttpConnector", "connector"]


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
            stream = closable(await self._network.connect(origin.host, origin.port))
        except (OSError, UnicodeError) as exc:
            # A name that cannot even be looked up is a UnicodeError.
            raise ConnectError(f"cannot connect to {origin.netloc}: {reason_of(exc)}") from exc
        if self._tls is None:
            return HttpConnection(stream, self._limits)
        try:
            secure = trio.SSLStream(stream, self._tls, server_hostname=origin.host, https_compatible=True)
            await secure.do_handshake()
        except (trio.BrokenResourceError, OSError, ValueError) as exc:
            await drop(bottom(stream))  # noqa: ASYNC120 - shields itself, bounded
            raise ConnectError(f"TLS with {origin.netloc} failed: {reason_of(exc)}") from exc
        except BaseException:
            await drop(bottom(stream))  # noqa: ASYNC102 - shields itself, bounded
            raise
        return HttpConnection(secure, self._limits)


def connector(
    origin: Origin, *, transport: object | None, tls: ssl.SSLContext | None, limits: ConnectionLimits
) -> Connector:
    """The connector for a client's `transport` setting; raises `TypeError` when it is none of the kinds."""
    if transport is None:
        return HttpConnector(origin, network=SocketNetwork(), tls=tls, limits=limits)
    if isinstance(transport, (httpx.AsyncBaseTransport, httpx.AsyncClient)):
        return HttpxConnector(transport, limits)
    if callable(getattr(transport, "connect", None)):
        return HttpConnector(origin, network=cast("Network", transport), tls=tls, limits=limits)
    raise TypeError("transport: must be an httpx transport or client, or have connect(host, port)")
