"""An HTTP/2 server on trio, by the h2 library: many requests at a time on one connection, resets and all."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import trio


@dataclass
class H2Request:
    """One request, and what it is answered with; `reset` is set when the client gave it up."""

    connection: H2Connection
    stream_id: int
    headers: dict[str, str]
    body: bytearray = field(default_factory=bytearray)
    reset: trio.Event = field(default_factory=trio.Event)

    def json(self) -> Any:
        return json.loads(self.body)

    async def start(self, content_type: str, *headers: tuple[str, str], status: int = 200) -> None:
        head = [(":status", str(status)), ("content-type", content_type), *headers]
        self.connection.h2.send_headers(self.stream_id, head)
        await self.connection.flush()

    async def send(self, data: bytes, *, end: bool = False) -> None:
        await self.connection.send_data(self.stream_id, data, end=end)


Handler = Callable[[H2Request], Awaitable[None]]


class H2Connection:
    """One client connection, its streams each in a task."""

    def __init__(self, stream: trio.abc.Stream, handler: Handler, requests: list[H2Request]) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.peak = 0
        self.closed = trio.Event()
        self._stream = stream
        self._handler = handler
        self._requests = requests
        self._open: dict[int, H2Request] = {}
        self._lock = trio.Lock()
        self._window = trio.Event()

    async def run(self) -> None:
        self.h2.initiate_connection()
        await self.flush()
        async with trio.open_nursery() as nursery:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while received := await self._stream.receive_some(65_536):
                    for event in self.h2.receive_data(received):
                        self._take(event, nursery)
                    await self.flush()
            nursery.cancel_scope.cancel()
        self.closed.set()

    def _take(self, event: h2.events.Event, nursery: trio.Nursery) -> None:
        if isinstance(event, h2.events.RequestReceived):
            request = H2Request(self, event.stream_id, {str(name): str(value) for name, value in event.headers})
            self._open[event.stream_id] = request
            self._requests.append(request)
            self.peak = max(self.peak, len(self._open))
        elif isinstance(event, h2.events.DataReceived):
            self._open[event.stream_id].body += event.data
            self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            nursery.start_soon(self._answer, self._open[event.stream_id])
        elif isinstance(event, h2.events.StreamReset):
            self._open.pop(event.stream_id).reset.set()
        elif isinstance(event, h2.events.WindowUpdated):
            self._window.set()
            self._window = trio.Event()

    async def _answer(self, request: H2Request) -> None:
        with suppress(h2.exceptions.ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            await self._handler(request)
        self._open.pop(request.stream_id, None)

    async def send_data(self, stream_id: int, data: bytes, *, end: bool) -> None:
        while data:
            room = min(self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size)
            if room <= 0:
                await self._window.wait()
                continue
            self.h2.send_data(stream_id, data[:room], end_stream=end and len(data) <= room)
            data = data[room:]
            await self.flush()

    async def flush(self) -> None:
        async with self._lock:
            data = self.h2.data_to_send()
            if data:
                await self._stream.send_all(data)


@dataclass
class H2Server:
    """Where it is, and what it was asked."""

    port: int = 0
    requests: list[H2Request] = field(default_factory=list)
    connections: list[H2Connection] = field(default_factory=list)


@asynccontextmanager
async def serving_h2(handler: Handler, tls: ssl.SSLContext) -> AsyncIterator[H2Server]:
    """A server on the loopback address that agrees to h2 only."""
    tls.set_alpn_protocols(["h2"])
    server = H2Server()

    async def handle(stream: trio.abc.Stream) -> None:
        secure = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        with suppress(trio.BrokenResourceError):
            await secure.do_handshake()
            connection = H2Connection(secure, handler, server.requests)
            server.connections.append(connection)
            await connection.run()
        await trio.aclose_forcefully(secure)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        server.port = listeners[0].socket.getsockname()[1]
        yield server
        nursery.cancel_scope.cancel()
