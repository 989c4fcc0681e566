"""The server of the benchmarks, in a process of its own: canned bytes, checked requests.

It does as little as a server can, so that the client is what is measured: the replies are encoded before the first
request comes, and a request is compared with the expected one by its bytes once they were seen to be right. It also
counts, so that a contender which sends less, or something else, fails the run.

    python benchmarks/_server.py        prints the port, serves until its stdin is closed

GET /stats returns and resets the counters; GET /gap?0.02 sets the time between the events of a stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys

import _wire

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_ADDED = {"usage": {"include": True}, "stream_options": {"include_usage": True}}
_HEADERS_WANTED = (b"authorization: bearer " + _wire.API_KEY.encode(), b"content-type: application/json")


class Server:
    """What the connections share."""

    def __init__(self) -> None:
        self.plain = _wire.plain_reply()
        self.head = _wire.stream_head()
        self.events = [_wire.framed(event) for event in _wire.stream_events()]
        self.events[-1] += _wire.LAST_CHUNK
        self.whole_stream = self.head + b"".join(self.events)
        self.gap_s = 0.0
        self.phases = random.Random(0)
        self.loop = asyncio.get_running_loop()
        self._known: dict[bytes, bool] = {}
        self._heads: dict[bytes, tuple[int, bool]] = {}
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.connections = self.requests = 0
        self.wrong: list[str] = []

    def head_facts(self, head: bytes) -> tuple[int, bool]:
        """Length of the body that follows, and whether the headers are there that every contender must send."""
        facts = self._heads.get(head)
        if facts is None:
            length = _LENGTH.search(head)
            lower = head.lower()
            facts = (int(length[1]) if length else 0, all(wanted in lower for wanted in _HEADERS_WANTED))
            self._heads[head] = facts
        return facts

    def is_stream(self, body: bytes) -> bool:
        """Whether the request wants a stream; what is wrong with it is noted."""
        streaming = self._known.get(body)
        if streaming is None:
            streaming = self._check(body)
            if len(self._known) < 1_000:
                self._known[body] = streaming
        return streaming

    def _check(self, body: bytes) -> bool:
        sent = json.loads(body)
        streaming = sent.get("stream", False)
        messages = sent["messages"]
        # A session sends its history first, and an id that keeps it with one provider; its last message is the one that
        # all send.
        sent.pop("session_id", None)
        # What SDKs add by themselves and the API takes as its defaults.
        for name, value in _ADDED.items():
            if sent.get(name) == value:
                del sent[name]
        if not streaming:
            sent.pop("stream", None)
        if sent | {"messages": messages[-1:]} != _wire.request(streaming=streaming):
            self.wrong.append(body.decode()[:500])
        return streaming

    def control(self, target: str) -> bytes:
        """Answer GET /stats and GET /gap?SECONDS."""
        path, _, value = target.partition("?")
        if path == "/gap":
            self.gap_s = float(value)
        facts = {
            "connections": self.connections,
            "requests": self.requests,
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:1],
        }
        self.reset()
        body = json.dumps(facts).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body)


class Connection(asyncio.Protocol):
    """One client connection: requests in, canned replies out."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._buffer = b""
        self._tick: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport  # type: ignore[assignment]  # a TCP server's transport writes
        self._server.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        if self._tick is not None:
            self._tick.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length, complete = self._server.head_facts(head)
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head, body, complete=complete)

    def _answer(self, head: bytes, body: bytes, *, complete: bool) -> None:
        server = self._server
        if head.startswith(b"GET /"):
            self._transport.write(server.control(head.split(b" ", 2)[1].decode()))
            self._transport.close()
            return
        server.requests += 1
        if not complete:
            server.wrong.append(head.decode("latin-1"))
        if not server.is_stream(body):
            self._transport.write(server.plain)
        elif server.gap_s:
            self._transport.write(server.head)
            # Streams of different users do not tick together.
            first = server.loop.time() + server.phases.random() * server.gap_s
            self._tick = server.loop.call_at(first, self._send_event, 0, first)
        else:
            self._transport.write(server.whole_stream)

    def _send_event(self, position: int, due: float) -> None:
        server = self._server
        self._transport.write(server.events[position])
        position += 1
        if position < len(server.events):
            due += server.gap_s
            self._tick = server.loop.call_at(due, self._send_event, position, due)


async def main() -> None:
    """Serve until stdin is closed, which is when the harness ends, however it ends."""
    server = Server()
    listener = await server.loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
