"""What HTTP is here: where requests go, what they say, and what a connection does for whoever owns it.

There is no I/O in this module. The parts around it:

    streams            bytes: sockets, memory, TLS; how they are made and dropped
    connection         HTTP/1.1 on such a stream
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
    from collections.abc import Sequence

    import trio

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


class Connector(Protocol):
    """Makes the connections of one origin."""

    async def connect(self) -> Connection:
        """A new connection; raises `ConnectError`."""


def _is_line(text: str) -> bool:
    """Whether it can stand on one line of an HTTP head."""
    return _LINE.fullmatch(text) is not None
