"""How a reply leaves the simulator: its headers, its pieces, and when they are due."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final, final

import trio
from msgspec import Struct

from ..transport.http_server import EncodedHeaders, ServerReply, encode_headers
from ._draws import Draws
from .forms import COMMENT, PADDING

if TYPE_CHECKING:
    from .config import SimulatorConfig
    from .faults import ErrorReply
    from .scenario import Latency, Wire

__all__ = [
    "JSON_HEADERS",
    "STREAM_HEADERS",
    "Outlet",
    "Pace",
]

_COMMON: Final = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers", "X-Generation-Id,X-Provider-Name,request-id,cf-ray"),
    ("Referrer-Policy", "no-referrer, strict-origin-when-cross-origin"),
    ("X-Content-Type-Options", "nosniff"),
)
JSON_HEADERS: Final = encode_headers([("Content-Type", "application/json"), *_COMMON])
STREAM_HEADERS: Final = encode_headers([("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), *_COMMON])
_MAX_PIECE: Final = 65_000
_IN_CHARACTER: Final = re.compile(rb"[\x80-\xff](?=[\x80-\xbf])")
_IN_END: Final = re.compile(rb"\n(?=\n)")


class Pace(Struct, frozen=True):
    """When the parts of one reply are due, in seconds after its request."""

    latency_s: float = 0.0
    first_token_s: float = 0.0
    tokens_per_s: float = 0.0

    @classmethod
    def draw(cls, config: SimulatorConfig, draws: Draws, *, latency: Latency | None = None) -> Pace:
        """The pace of one request: what the scenario says, or else the config, with its jitter."""
        if latency is not None:
            per_token_s = latency.per_token.draw(draws)
            return cls(
                latency.head.draw(draws), latency.first_token.draw(draws), 1 / per_token_s if per_token_s else 0.0
            )
        if not config.jitter:
            return cls(config.latency_s, config.first_token_s, config.tokens_per_s)
        return cls(
            draws.jittered(config.latency_s, jitter=config.jitter),
            draws.jittered(config.first_token_s, jitter=config.jitter),
            draws.jittered(config.tokens_per_s, jitter=config.jitter),
        )

    @property
    def is_instant(self) -> bool:
        """Whether nothing takes any time."""
        return not (self.latency_s or self.first_token_s or self.tokens_per_s)

    def due_s(self, tokens: int) -> float:
        """When this many tokens are out."""
        spent = tokens / self.tokens_per_s if self.tokens_per_s else 0.0
        return self.latency_s + self.first_token_s + spent


@final
class Outlet:
    """One reply on its way out. Times are counted from its making; every send raises as `ServerReply` does."""

    def __init__(self, reply: ServerReply, config: SimulatorConfig) -> None:
        self.status = 0
        self.generation_id: str | None = None
        self.draws = Draws(b"")
        self.wire: Wire | None = None
        self._reply = reply
        self._config = config
        self._started_at_s = trio.current_time()

    @property
    def cuts(self) -> bool:
        """Whether bodies go out in pieces."""
        return self._config.max_write_bytes > 0 or (self.wire is not None and self.wire.cut != "nowhere")

    def begin_again(self) -> None:
        """Count the times from now."""
        self._started_at_s = trio.current_time()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the request."""
        return trio.current_time() - self._started_at_s

    async def sleep_until(self, due_s: float) -> None:
        """Wait until *due_s* after the request, which may be over already."""
        left = due_s - self.elapsed_s
        if left > 0:
            await trio.sleep(left)

    async def comment_until(self, due_s: float) -> None:
        """The same for a stream: with a comment whenever the interval has passed in silence."""
        interval = self._config.comment_interval_s or math.inf
        while (left := due_s - self.elapsed_s) > interval:
            await trio.sleep(interval)
            await self.write(COMMENT)
        if left > 0:
            await trio.sleep(left)

    async def pad_until(self, due_s: float, *, latency_s: float) -> None:
        """The same for a whole reply: one that takes longer than the interval starts, and is padded."""
        interval = self._config.padding_interval_s
        pads_s = latency_s + interval
        while interval and pads_s < due_s:
            await self.sleep_until(pads_s)
            await self.write(PADDING)
            pads_s += interval
        await self.sleep_until(due_s)

    async def error(self, error: ErrorReply) -> None:
        """Answer with an error that has a status of its own."""
        self.status = error.status
        block = JSON_HEADERS
        if error.content_type != "application/json":
            block = encode_headers([("Content-Type", error.content_type)])
        if error.headers:
            block = EncodedHeaders(block + encode_headers(error.headers))
        await self._reply.send(error.status, self._named(block), body=error.body, chunked=self._config.chunked)

    async def whole(self, body: bytes, *, headers: EncodedHeaders = JSON_HEADERS, chunked: bool | None = None) -> None:
        """Answer 200 with a whole body, or end the one that was started with it."""
        if self._reply.is_started or self.cuts:
            await self.write(b"", headers=headers)
            await self.finish(body)
        else:
            self.status = 200
            chunked = self._config.chunked if chunked is None else chunked
            await self._reply.send(200, self._named(headers), body=body, chunked=chunked)

    async def write(self, data: bytes, *, headers: EncodedHeaders = JSON_HEADERS) -> None:
        """Send a piece of a 200, with its head when it is the first; cut up when the config says so."""
        pieces = self._cut(data) if self.cuts else [data] if data else []
        if not self._reply.is_started:
            self.status = 200
            await self._reply.start(200, self._named(headers), first=pieces.pop(0) if pieces else b"")
        for piece in pieces:
            await self._reply.write(piece)

    async def finish(self, last: bytes) -> None:
        """End a body that was written in pieces, with its *last* one."""
        pieces = self._cut(last) if self.cuts else [last]
        for piece in pieces[:-1]:
            await self._reply.write(piece)
        await self._reply.finish(last=pieces[-1] if pieces else b"")

    def _named(self, block: EncodedHeaders) -> EncodedHeaders:
        if self.generation_id is None:
            return block
        return EncodedHeaders(b"%bX-Generation-Id: %b\r\n" % (block, self.generation_id.encode("ascii")))

    def _cut(self, data: bytes) -> list[bytes]:
        wire = self.wire
        if wire is None or wire.cut == "nowhere":
            return self._cut_anywhere(data, self._config.max_write_bytes)
        if wire.cut == "anywhere":
            return self._cut_anywhere(data, wire.max_write_bytes)
        places = [found.end() for found in (_IN_CHARACTER if wire.cut == "characters" else _IN_END).finditer(data)]
        return [data[start:end] for start, end in pairwise([0, *places, len(data)]) if start < end]

    def _cut_anywhere(self, data: bytes, most: int) -> list[bytes]:
        pieces = []
        at = 0
        while at < len(data):
            size = self.draws.between(1, min(most, _MAX_PIECE))
            pieces.append(data[at : at + size])
            at += size
        return pieces
