"""Tunnels through proxies: CONNECT (RFC 9110, 9.3.6) and SOCKS 5 (RFC 1928, 1929).

A proxy is asked for the host by its name and looks it up itself. Nothing that it says before the tunnel stands is taken
for a reply of the API: a refusal, a broken connection, and bytes that nobody asked for are `ConnectError`s, since
nothing was sent to the API yet. Requests hold a password, so they are views, of which a traceback shows no bytes.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING

import trio

from ..errors import ConnectError
from .streams import reason_of

if TYPE_CHECKING:
    from ..network import Proxy
    from .http import Origin

__all__ = ["check_forwarded", "open_tunnel"]

_HEAD_BYTES = 64 * 1024
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: ([^\r\n]*))?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_REASON_CHARACTERS = 100
_SOCKS_REFUSALS = {
    1: "general failure",
    2: "not allowed by its rules",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "time to live expired",
    7: "command not supported",
    8: "address type not supported",
}
_PROXY_AUTHENTICATION_REQUIRED = 407


async def open_tunnel(stream: trio.abc.Stream, proxy: Proxy, *, origin: Origin) -> None:
    """Ask the proxy at the other end of `stream` for a tunnel to the origin; afterwards the stream is one to it.

    Raises `ConnectError`; on an error or a cancel the caller drops the stream.
    """
    steps = _socks_steps if proxy.scheme == "socks5" else _connect_steps
    try:
        await steps(stream, proxy, origin)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise ConnectError(f"the proxy {proxy.url} broke the connection: {reason_of(exc)}") from exc


def check_forwarded(status: int, proxy: Proxy) -> None:
    """Raise `ConnectError` for a reply to a forwarded request that only a proxy itself can have given."""
    if status == _PROXY_AUTHENTICATION_REQUIRED:
        raise ConnectError(
            f"the proxy {proxy.url} refused the request: 407 Proxy Authentication Required", proxy_status=status
        )


# CONNECT


async def _connect_steps(stream: trio.abc.Stream, proxy: Proxy, origin: Origin) -> None:
    await stream.send_all(_connect_request(proxy, origin))
    status, reason = await _receive_head(stream, proxy)
    if not 200 <= status < 300:
        raise ConnectError(
            f"the proxy {proxy.url} refused to connect to {origin.authority}: {status} {reason}".rstrip(),
            proxy_status=status,
        )


def _connect_request(proxy: Proxy, origin: Origin) -> memoryview:
    lines = [f"CONNECT {origin.authority} HTTP/1.1", f"Host: {origin.authority}"]
    authorization = proxy.authorization()
    if authorization is not None:
        lines.append(f"Proxy-Authorization: {authorization.reveal()}")
    return memoryview("\r\n".join([*lines, "", ""]).encode("ascii"))


async def _receive_head(stream: trio.abc.Stream, proxy: Proxy) -> tuple[int, str]:
    """Status and reason of the proxy's answer; what comes before it (1xx) is passed over."""
    received = b""
    while True:
        end = _HEAD_END.search(received)
        if end is None:
            received += await _receive(stream, proxy)
            if len(received) > _HEAD_BYTES:
                raise ConnectError(f"the proxy {proxy.url} answered with more than {_HEAD_BYTES} bytes of headers")
            continue
        line = _STATUS_LINE.match(received)
        if line is None:
            raise ConnectError(f"the proxy {proxy.url} did not answer in HTTP/1.1")
        status, received = int(line[1]), received[end.end() :]
        if status >= 200:
            break
    if received and status < 300:
        raise ConnectError(f"the proxy {proxy.url} sent bytes through the tunnel before anything was asked for")
    return status, _printable(line[2] or b"")


async def _receive(stream: trio.abc.Stream, proxy: Proxy) -> bytes | bytearray:
    received = await stream.receive_some(_HEAD_BYTES)
    if not received:
        raise ConnectError(f"the proxy {proxy.url} closed the connection without an answer")
    return received


def _printable(reason: bytes) -> str:
    text = reason.decode("latin-1").strip()
    return "".join(character for character in text if character.isprintable())[:_REASON_CHARACTERS]


# SOCKS 5


async def _socks_steps(stream: trio.abc.Stream, proxy: Proxy, origin: Origin) -> None:
    # Without or with a password: what is not offered cannot be chosen.
    await stream.send_all(b"\x05\x01\x00" if proxy.user is None else b"\x05\x02\x00\x02")
    version, method = await _receive_exactly(stream, proxy, 2)
    if version != 5 or method not in {0, 2} or (method == 2 and proxy.user is None):
        why = "wants another kind of authentication" if version == 5 else "does not speak SOCKS 5"
        raise ConnectError(f"the proxy {proxy.url} {why}")
    if method == 2:
        await stream.send_all(_socks_password(proxy))
        if (await _receive_exactly(stream, proxy, 2))[1] != 0:
            raise ConnectError(f"the proxy {proxy.url} refused the user or the password")
    await stream.send_all(b"\x05\x01\x00" + _socks_address(origin.host) + origin.port.to_bytes(2, "big"))
    _version, answer, _reserved, kind = await _receive_exactly(stream, proxy, 4)
    if answer != 0:
        reason = _SOCKS_REFUSALS.get(answer, "no reason known")
        raise ConnectError(f"the proxy {proxy.url} refused to connect to {origin.authority}: {answer} {reason}")
    lengths = {1: 4, 4: 16}
    length = lengths[kind] if kind in lengths else (await _receive_exactly(stream, proxy, 1))[0]
    await _receive_exactly(stream, proxy, length + 2)


def _socks_password(proxy: Proxy) -> memoryview:
    parts = [b"" if part is None else part.reveal().encode() for part in (proxy.user, proxy.password)]
    return memoryview(b"\x01" + b"".join(bytes([len(part)]) + part for part in parts))


def _socks_address(host: str) -> bytes:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.encode("ascii")
        if len(name) > 255:
            raise ConnectError(f"the host's name is too long for SOCKS 5: {len(name)} bytes") from None
        return bytes([3, len(name)]) + name
    return bytes([1 if address.version == 4 else 4]) + address.packed


async def _receive_exactly(stream: trio.abc.Stream, proxy: Proxy, count: int) -> bytes:
    """So many bytes and no more: what follows the last answer belongs to the tunnel."""
    received = b""
    while len(received) < count:
        piece = await stream.receive_some(count - len(received))
        if not piece:
            raise ConnectError(f"the proxy {proxy.url} closed the connection without an answer")
        received += piece
    return received
