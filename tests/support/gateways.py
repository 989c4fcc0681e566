"""A gateway in front of a client of a simulated API, on a real socket of the loopback address."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, open_websocket_url
from worlds import World, open_world

import gorouter_trio as gr
from gorouter_trio.gateway import Gateway, GatewayConfig, GatewayLimits, serve_gateway
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig, SecurityManager

ADA_KEY = "key-of-ada-0123456789"
BOB_KEY = "key-of-bob-0123456789"
ROOT_KEY = "key-of-root-0123456789"
ADA = Principal(id="ada", tenant="acme")
BOB = Principal(id="bob", tenant="acme")
ROOT = Principal(id="root", tenant="acme", roles=frozenset({"operator"}))

# Many connections come from one address here.
ROOMY = GatewayLimits(max_per_address=100_000, max_per_principal=100_000, max_unauthenticated=100_000)


def secured(**more: Any) -> SecurityManager:
    """A guard that knows Ada, Bob and an operator by their keys."""
    auth = ApiKeyAuth(api_keys={ADA_KEY: ADA, BOB_KEY: BOB, ROOT_KEY: ROOT})
    settings: dict[str, Any] = {"auth": auth, "require_authentication": True, "default_policy": "allow-all", **more}
    return SecurityManager(SecurityConfig(**settings))


def limits(**more: Any) -> GatewayLimits:
    """Roomy ones, but for these."""
    return msgspec.structs.replace(ROOMY, **more)


@dataclass(slots=True)
class GatewayWorld:
    """A gateway, and what is behind it."""

    gateway: Gateway
    world: World
    errors: list[Exception]

    @property
    def url(self) -> str:
        return self.gateway.url

    @property
    def client(self) -> gr.Client:
        return self.world.client


@asynccontextmanager
async def open_gateway(
    gateway: GatewayConfig | None = None, *, serve: Mapping[str, Any] | None = None, **fields: Any
) -> AsyncIterator[GatewayWorld]:
    """A running gateway; `fields` are those of `open_world`, `serve` are arguments of `serve_gateway`."""
    if gateway is None:
        gateway = GatewayConfig(anonymous="security" not in fields, limits=ROOMY, operator_roles=["operator"])
    errors: list[Exception] = []
    async with open_world(**fields) as world, trio.open_nursery() as nursery:
        run = partial(serve_gateway, world.client, gateway, on_error=errors.append, **(serve or {}))
        yield GatewayWorld(await nursery.start(run), world, errors)
        nursery.cancel_scope.cancel()


class Talk:
    """A client that says exactly what the test says."""

    def __init__(self, websocket: WebSocketConnection) -> None:
        self.websocket = websocket

    async def send(self, *messages: object) -> None:
        for message in messages:
            text = message if isinstance(message, (str, bytes)) else msgspec.json.encode(message).decode()
            await self.websocket.send_message(text)

    async def receive(self) -> dict[str, Any]:
        return msgspec.json.decode(await self.websocket.get_message(), type=dict[str, Any])

    async def hello(self, token: str | None = None) -> dict[str, Any]:
        await self.send({"type": "hello", "version": 1} | ({} if token is None else {"token": token}))
        return await self.receive()

    async def until(self, *kinds: str) -> list[dict[str, Any]]:
        """What comes, up to the first message of one of the kinds."""
        found = [await self.receive()]
        while found[-1]["type"] not in kinds:
            found.append(await self.receive())
        return found

    async def request(self, **message: Any) -> dict[str, Any]:
        """Send a request, and its answer."""
        await self.send(message)
        return (await self.until("accepted", "failed", "done", "history_page", "session_statistics", "snapshot"))[-1]

    async def close_code(self) -> int | None:
        """Read until the gateway closes; its close code, None where it did not give one."""
        try:
            while True:
                await self.websocket.get_message()
        except ConnectionClosed as exc:
            return None if exc.reason is None else exc.reason.code


@asynccontextmanager
async def open_talk(
    url: str, token: str | None = None, *, greets: bool = True, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Talk]:
    """A connection, after the hello."""
    given = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    async with open_websocket_url(url, extra_headers=given, disconnect_timeout=1) as websocket:
        talk = Talk(websocket)
        try:
            if greets:
                welcome = await talk.hello(token)
                assert welcome["type"] == "welcome", welcome
            yield talk
        finally:
            if websocket.closed is not None:
                # The library leaves the socket of a connection that the other side has closed.
                await trio.aclose_forcefully(websocket._stream)


class Healthy:
    """Connections that ask now and then, and what each answer took, in seconds."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.number = 0

    async def ask_on(self, talk: Talk, *, pause_s: float) -> None:
        """Until cancelled."""
        while True:
            self.number += 1
            began = trio.current_time()
            answer = await talk.request(type="statistics", id=self.number, session="s")
            assert answer["type"] == "session_statistics"
            self.took.append(trio.current_time() - began)
            await trio.sleep(pause_s)

    def p99(self) -> float:
        """Of what was asked since the last time."""
        took = sorted(self.took)
        self.took.clear()
        return took[int(len(took) * 0.99)]


class LoopLag:
    """How far behind the loop of this process was at most: clients and gateway share it, and the machine has others."""

    def __init__(self) -> None:
        self.most_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due = trio.current_time() + 0.05
            await trio.sleep_until(due)
            self.most_s = max(self.most_s, trio.current_time() - due)


def address_of(url: str) -> tuple[str, int]:
    """Where a gateway listens."""
    host, _, port = url.removeprefix("ws://").rpartition(":")
    return host, int(port)


@asynccontextmanager
async def open_raw(
    url: str, *lines: str, path: str = "/", receive_buffer: int | None = None
) -> AsyncIterator[tuple[trio.SocketStream, bytes]]:
    """A TCP connection that has asked for an upgrade, and has its answer."""
    host, port = address_of(url)
    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect((host, port))
    stream = trio.SocketStream(sock)
    head = [f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade"]
    head += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", *lines]
    async with stream:
        await stream.send_all("\r\n".join([*head, "", ""]).encode())
        reply = b""
        while b"\r\n\r\n" not in reply:
            received = await stream.receive_some()
            if not received:
                break
            reply += received
        yield stream, reply


def frame(data: bytes, *, opcode: int = 1, fin: bool = True) -> bytes:
    """A client's frame; the mask is zero."""
    size = len(data)
    if size < 126:
        length = bytes([0x80 | size])
    else:
        length = b"\xfe" + struct.pack("!H", size) if size < 65_536 else b"\xff" + struct.pack("!Q", size)
    return bytes([opcode | (0x80 if fin else 0)]) + length + bytes(4) + data


async def close_code(stream: trio.abc.Stream) -> int | None:
    """The code of the close frame that comes, None where the connection just ends."""
    data = b""
    try:
        while received := await stream.receive_some():
            data += received
    except trio.BrokenResourceError:
        pass
    while data:
        size, skip = data[1], 2
        if size == 126:
            size, skip = int.from_bytes(data[2:4], "big"), 4
        if data[0] & 15 == 8:
            return int.from_bytes(data[skip : skip + 2], "big")
        data = data[skip + size :]
    return None
