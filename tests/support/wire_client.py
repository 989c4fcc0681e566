"""A small HTTP client on h11: an implementation that shares nothing with the servers it tests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import h11

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import trio


@dataclass
class WireReply:
    """A reply as it came; `pieces` are the parts of the body as they were received."""

    status: int = 0
    headers: list[tuple[str, str]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.pieces)

    def header(self, name: str) -> str | None:
        """The first header of this name."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def events(self) -> list[str]:
        """The `data:` lines of an event stream, in order, comments left out; checks the framing on the way."""
        text = self.body.decode()
        assert text.endswith("\n\n")
        blocks = text[:-2].split("\n\n")
        assert all(block.startswith(("data: ", ": ")) and "\n" not in block for block in blocks), blocks
        return [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]


class WireClient:
    """One connection; requests one after the other. Its owner closes the stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.CLIENT)

    async def request(
        self, method: str, target: str, *, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> WireReply:
        """One request and its whole reply."""
        await self.send(method, target, headers=headers, body=body)
        return await self.reply()

    async def post(
        self, target: str, value: Mapping[str, Any], *, headers: Sequence[tuple[str, str]] = ()
    ) -> WireReply:
        """POST a JSON value."""
        return await self.request("POST", target, headers=headers, body=json.dumps(value).encode())

    async def send(
        self, method: str, target: str, *, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> None:
        """Send a request and leave its reply to be read."""
        length = [("Content-Length", str(len(body)))] if body else []
        event = h11.Request(method=method, target=target, headers=[("Host", "test"), *length, *headers])
        data = self.http.send(event) or b""
        if body:
            data += self.http.send(h11.Data(data=body)) or b""
        data += self.http.send(h11.EndOfMessage()) or b""
        await self.stream.send_all(data)

    async def reply(self) -> WireReply:
        """The next reply, to its end; raises `h11.RemoteProtocolError` when it is cut."""
        reply = WireReply()
        while True:
            event = await self.next_event()
            if isinstance(event, h11.Response):
                reply.status = event.status_code
                reply.headers = [(name.decode(), value.decode()) for name, value in event.headers.raw_items()]
            elif isinstance(event, h11.Data):
                reply.pieces.append(bytes(event.data))
            elif isinstance(event, h11.EndOfMessage):
                if self.http.our_state is h11.DONE and self.http.their_state is h11.DONE:
                    self.http.start_next_cycle()
                return reply

    async def next_event(self) -> object:
        """The next event of h11, read from the stream as needed."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(bytes(await self.stream.receive_some()))
        return event
