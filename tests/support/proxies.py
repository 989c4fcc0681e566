"""A proxy as others run them: CONNECT, forwarding of plain http, and SOCKS 5, with or without a password."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

Dial = Callable[[str, int], Awaitable[trio.abc.Stream]]


async def _dial_here(host: str, port: int) -> trio.abc.Stream:
    return await trio.open_tcp_stream(host, port)


@dataclass
class FakeProxy:
    """What it was asked, and how it answers.

    `credentials` are "user:password" that it wants; `dial` is how it reaches hosts; `answer` stands in for its own
    answer to CONNECT, byte by byte as given.
    """

    credentials: str | None = None
    dial: Dial = _dial_here
    answer: bytes | None = None
    asked: list[str] = field(default_factory=list)

    async def serve(self, stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            first = await stream.receive_some(1)
            if first == b"\x05":
                await self._serve_socks(stream)
            elif first:
                await self._serve_http(stream, bytes(first))
        await trio.aclose_forcefully(stream)

    async def _serve_http(self, stream: trio.abc.Stream, buffer: bytes) -> None:
        while b"\r\n\r\n" not in buffer:
            received = await stream.receive_some(65_536)
            if not received:
                return
            buffer += received
        head, _, rest = buffer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.asked.append(lines[0])
        wanted = None if self.credentials is None else base64.b64encode(self.credentials.encode()).decode()
        if wanted is not None and f"Proxy-Authorization: Basic {wanted}" not in lines:
            await stream.send_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        method, target, _ = lines[0].split(" ")
        if method == "CONNECT":
            await self._tunnel(stream, target)
        else:
            await self._forward(stream, method, target, lines[1:], rest)

    async def _tunnel(self, stream: trio.abc.Stream, target: str) -> None:
        if self.answer is not None:
            await stream.send_all(self.answer)
            if not self.answer.startswith(b"HTTP/1.1 200"):
                return
        host, _, port = target.rpartition(":")
        try:
            far = await self.dial(host.strip("[]"), int(port))
        except OSError:
            await stream.send_all(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            return
        if self.answer is None:
            await stream.send_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await splice(stream, far)

    async def _forward(self, stream: trio.abc.Stream, method: str, target: str, lines: list[str], rest: bytes) -> None:
        host, slash, path = target.removeprefix("http://").partition("/")
        name, _, port = host.partition(":")
        far = await self.dial(name, int(port or 80))
        kept = [line for line in lines if not line.lower().startswith("proxy-")]
        await far.send_all("\r\n".join([f"{method} {slash}{path} HTTP/1.1", *kept, "", ""]).encode("latin-1") + rest)
        await splice(stream, far)

    async def _serve_socks(self, stream: trio.abc.Stream) -> None:
        methods = await self._exactly(stream, (await self._exactly(stream, 1))[0])
        if self.credentials is None:
            await stream.send_all(b"\x05\x00" if 0 in methods else b"\x05\xff")
        elif 2 not in methods:
            await stream.send_all(b"\x05\xff")
        else:
            await stream.send_all(b"\x05\x02")
            await self._exactly(stream, 1)
            user = await self._exactly(stream, (await self._exactly(stream, 1))[0])
            password = await self._exactly(stream, (await self._exactly(stream, 1))[0])
            is_right = f"{user.decode()}:{password.decode()}" == self.credentials
            await stream.send_all(b"\x01\x00" if is_right else b"\x01\x01")
        _, _, _, kind = await self._exactly(stream, 4)
        raw = await self._exactly(stream, {1: 4, 4: 16}.get(kind) or (await self._exactly(stream, 1))[0])
        host = raw.decode() if kind == 3 else str(ipaddress.ip_address(raw))
        port = int.from_bytes(await self._exactly(stream, 2), "big")
        self.asked.append(f"SOCKS {host}:{port}")
        try:
            far = await self.dial(host, port)
        except OSError:
            await stream.send_all(b"\x05\x05\x00\x01\0\0\0\0\0\0")
            return
        await stream.send_all(b"\x05\x00\x00\x03\x04name\x00\x50")
        await splice(stream, far)

    async def _exactly(self, stream: trio.abc.Stream, count: int) -> bytes:
        received = b""
        while len(received) < count:
            piece = await stream.receive_some(count - len(received))
            if not piece:
                raise OSError("gone")
            received += piece
        return received


async def splice(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
    """Carry bytes both ways until either side ends."""

    async def carry(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while received := await source.receive_some(65_536):
                await sink.send_all(received)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, one, other, nursery.cancel_scope)
        nursery.start_soon(carry, other, one, nursery.cancel_scope)
    await trio.aclose_forcefully(other)


@asynccontextmanager
async def listening(serve: Callable[[trio.abc.Stream], Awaitable[None]]) -> AsyncIterator[int]:
    """A server on the loopback address; yields its port. It closes what it accepted."""

    async def handle(stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await serve(stream)
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
