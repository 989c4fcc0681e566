"""What HTTP is here: where requests go, what they say, and what a connection does for whoever owns it.

There is no I/O in this module. The parts around it:

    streams            bytes: sockets, memory, TLS; how they are made and dropped
    tls                contexts from settings, and the handshake
    proxy              tunnels: CONNECT and SOCKS 5
    compression        decoding gzip, deflate, br and zstd, bounded
    connection         HTTP/1.1 on a stream
    connector          from an origin to an open connection
    httpx_connection   a user's httpx transport or client in the place of a connection
    httpx_transport    the built-in transport with httpx's face

Why not `httpx.AsyncClient`: its pool scans all connections on every request and leaks slots when
requests are cancelled. Why the pool owns connections and does not call a transport of httpx: the same
bytes cost about 10 µs less per request without the request and response objects in between.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Awaitable, Sequence

    import trio

    from ..network import Proxy

__all__ = [
    "Connection",
    "ConnectionLimits",
    "Connector",
    "Network",
    "Origin",
    "RequestHead",
]

_LINE = re.compile(r"[^\r\n\0\u0100-\U0010ffff]*")


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

    @property
    def authority(self) -> str:
        """Host and port, always both, as a proxy wants them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ConnectionLimits(Struct, frozen=True, kw_only=True):
    """Bounds of one reply, in bytes, checked whenever something has been read.

    `max_header_bytes` holds for the head with its informational replies. `max_body_bytes` counts what
    arrives after the head, the framing of chunks included, and for a compressed body what it decodes to as
    well; that must not be more than `max_compression_ratio` times what arrived, once it is over 8 MiB.
    """

    max_header_bytes: int = 64 * 1024
    max_body_bytes: int = 64 * 1024 * 1024
    max_compression_ratio: int = 100


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
        self,
        origin: Origin,
        *,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        host: str | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        """Raises `ValueError` for what would break out of its line; `host` stands in for the origin's.

        A `proxy` that forwards requests to the origin is asked for the whole URL, with its own authorization.
        """
        self.method = method
        self.target = target
        self.url = f"{origin.scheme}://{origin.netloc}{target}"
        self.headers = tuple(headers)
        is_forwarded = proxy is not None and proxy.forwards(origin.scheme)
        lines = [f"{method} {self.url if is_forwarded else target} HTTP/1.1", f"Host: {host or origin.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if proxy is not None and is_forwarded and (authorization := proxy.authorization()):
            lines.append(f"Proxy-Authorization: {authorization.reveal()}")
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

    def wait_arrival(self) -> Awaitable[None] | None:
        """What to await before `take_arrival`; None where only `receive_some` can tell what comes next.

        Awaiting it raises `trio.ClosedResourceError` when the connection is closed; `take_arrival` says why.
        """

    def take_arrival(self) -> bytes | None:
        """What has arrived of the body, decoded; None when nothing has, empty at its end. Never waits."""

    async def receive_all(self) -> bytes:
        """The rest of the reply's body."""

    def close(self) -> None:
        """Drop the connection at once; whoever waits on it gets `StreamBrokenError`."""

    async def aclose(self) -> None:
        """`close`, and wait for what a user's transport needs to wait for."""


class Connector(Protocol):
    """Makes the connections of one origin."""

    async def connect(self) -> Connection:
        """A new connection; raises `ConnectError`."""


def _is_line(text: str) -> bool:
    """Whether it can stand on one line of an HTTP head."""
    return _LINE.fullmatch(text) is not None
