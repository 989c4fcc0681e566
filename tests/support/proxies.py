"""A proxy as others run them: CONNECT, forwarding of plain http, and SOCKS 5, with or without a password."""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio
from scripted import Peer, Request

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

    async def _serve_http(self, stream: trio.abc.Stream, first: bytes) -> None:
        peer = Peer(stream)
        peer._buffer = first
        async with trio.open_nursery() as nursery:
            far: trio.abc.Stream | None = None
            while (request := await peer.request()) is not None:
                self.asked.append(f"{request.method} {request.target}")
                if not self._is_allowed(request):
                    await stream.send_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                    break
                if request.method == "CONNECT":
                    await self._tunnel(stream, request.target)
                    break
                far = await self._forward(request, stream, far, nursery)
            nursery.cancel_scope.cancel()
        if far is not None:
            await trio.aclose_forcefully(far)

    def _is_allowed(self, request: Request) -> bool:
        if self.credentials is None:
            return True
        wanted = "Basic " + base64.b64encode(self.credentials.encode()).decode()
        return request.headers.get("proxy-authorization") == wanted

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

    async def _forward(
        self, request: Request, stream: trio.abc.Stream, far: trio.abc.Stream | None, nursery: trio.Nursery
    ) -> trio.abc.Stream:
        """Send a request on, without what is between the client and the proxy; replies come back by themselves."""
        host, slash, path = request.target.removeprefix("http://").partition("/")
        name, _, port = host.partition(":")
        if far is None:
            far = await self.dial(name, int(port or 80))
            nursery.start_soon(_carry, far, stream, nursery.cancel_scope)
        lines = [f"{request.method} {slash}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items() if not name.startswith("proxy-")]
        await far.send_all("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body)
        return far

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


async def _carry(source: trio.abc.Stream, sink: trio.abc.Stream, scope: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while received := await source.receive_some(65_536):
            await sink.send_all(received)
    scope.cancel()


async def splice(one: trio.abc.Stream, other: trio.abc.Stream) -> None:
    """Carry bytes both ways until either side ends."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_carry, one, other, nursery.cancel_scope)
        nursery.start_soon(_carry, other, one, nursery.cancel_scope)
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
