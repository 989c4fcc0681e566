"""Peers that do what a test says: a stream that plays pieces, a network in memory, replies in bytes."""

from __future__ import annotations

import json
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import trio

from gorouter_trio.transport.memory import MemoryStream, memory_stream_pair


class PlayedStream(trio.abc.Stream):
    """A stream that gives out pieces, one a read: bytes, `b""` for the end, or an exception to raise.

    After the last piece reads wait until it is closed. What is sent is kept in `sent`.
    """

    def __init__(self, pieces: Iterable[bytes | Exception]) -> None:
        self.pieces = list(pieces)
        self.sent = bytearray()
        self.is_closed = False
        self._closing = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_closed:
            raise trio.ClosedResourceError
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.is_closed:
            raise trio.ClosedResourceError
        if not self.pieces:
            await self._closing.wait()
            raise trio.ClosedResourceError
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        if max_bytes is not None and len(piece) > max_bytes:
            self.pieces.insert(0, piece[max_bytes:])
            return piece[:max_bytes]
        return piece

    def close(self) -> None:
        self.is_closed = True
        self._closing.set()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()


# --- replies ----------------------------------------------------------------------------------------------------------


def reply(body: bytes | Any = b"", *, status: int = 200, headers: Sequence[str] = ()) -> bytes:
    """A reply with a length; what is not bytes is sent as JSON."""
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", *headers, f"Content-Length: {len(encoded)}", "", ""]
    return "\r\n".join(lines).encode() + encoded


def chunks(pieces: Iterable[bytes], *, end: bytes = b"0\r\n\r\n") -> bytes:
    """Pieces in the chunked transfer coding, with its end."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end


def chat(text: str = "hello", **top: Any) -> bytes:
    """A whole chat reply."""
    message = {"role": "assistant", "content": text}
    return reply({"id": "gen-1", "model": "m", "choices": [{"finish_reason": "stop", "message": message}], **top})


def error(status: int, code: int | str | None = None, *, headers: Sequence[str] = (), **metadata: Any) -> bytes:
    """An error reply."""
    body = {"error": {"message": f"error {status}", "code": status if code is None else code, "metadata": metadata}}
    return reply(body, status=status, headers=headers)


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Generation-Id: gen-1\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def delta(text: str = "", finish: str | None = None, **top: Any) -> bytes:
    """One event of a streamed chat."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "gen-1", "model": "m", "choices": [choice], **top}).encode() + b"\n\n"


COMMENT = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"


def stream(*events: bytes) -> bytes:
    """A whole streamed reply, each event a chunk."""
    return STREAM_HEAD + chunks(events)


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """What a peer received: `number` counts all requests of its network, from 0."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    number: int

    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """The server's end of one connection."""

    def __init__(self, stream: trio.abc.Stream, network: Network | None = None) -> None:
        self.stream = stream
        self.network = network
        self._buffer = b""

    async def request(self) -> Request | None:
        """The next whole request, or None when the client has gone."""
        while b"\r\n\r\n" not in self._buffer:
            if not await self._receive():
                return None
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._buffer = rest
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            if not await self._receive():
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        method, target, _ = first.split(" ")
        return self._noted(Request(method, target, headers, body, 0))

    def _noted(self, request: Request) -> Request:
        if self.network is not None:
            request.number = len(self.network.requests)
            self.network.requests.append(request)
            self.network.times.append(trio.current_time())
        return request

    async def _receive(self) -> bool:
        try:
            received = await self.stream.receive_some(65536)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return False
        self._buffer += received
        return bool(received)

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            await self.stream.send_all(piece)

    async def wait_gone(self) -> None:
        """Wait until the client has closed the connection."""
        while await self._receive():
            pass


Serve = Callable[[Peer], Awaitable[None]]
Answer = Callable[[Request], "bytes | Awaitable[bytes]"]


@dataclass
class Network:
    """A network in memory: every connection is served by `serve` in a task of `nursery`.

    `refuse` are errors for the next connections, `connect_s` is how long connecting takes.
    """

    nursery: trio.Nursery
    serve: Serve
    capacity_bytes: int = 65536
    connect_s: float = 0.0
    refuse: list[Exception] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ends: list[tuple[MemoryStream, MemoryStream]] = field(default_factory=list)
    attempts: int = 0

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        self.attempts += 1
        await trio.sleep(self.connect_s)
        if self.refuse:
            raise self.refuse.pop(0)
        ours, theirs = memory_stream_pair(self.capacity_bytes)
        self.ends.append((ours, theirs))
        self.nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream: MemoryStream) -> None:
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await self.serve(Peer(stream, self))
        finally:
            stream.close()

    @property
    def open(self) -> int:
        """Connections that the client has not closed."""
        return sum(not ours.is_closed for ours, _ in self.ends)


def answering(answer: Answer) -> Serve:
    """Serve a connection by answering each request with the bytes that `answer` makes of it."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            made = answer(request)
            await peer.send(made if isinstance(made, bytes) else await made)

    return serve


def shown_by(error: BaseException) -> str:
    """A traceback of an error and what led to it, with the locals of all frames but those of tests."""
    shown: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.TracebackException.from_exception(seen, capture_locals=True).stack
        shown += [f"{seen!r} {seen}", *(f"{f.filename} {f.locals}" for f in frames if "/tests/" not in f.filename)]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(shown)
