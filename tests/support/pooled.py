"""A pool over a network in memory, and what can be asked of it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
import trio.testing
from scripted import Network, Serve

from gorouter_trio.config import ClientConfig, Secret
from gorouter_trio.pool.attempts import AttemptRecord
from gorouter_trio.pool.shared import SharedLimits
from gorouter_trio.pool.streams import ChatReader, begin_reading
from gorouter_trio.pool.workers import Exchange, Lease, Pool, PoolStatistics, open_pool
from gorouter_trio.transport.connector import connector
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.wire.codec import decode_completion, encode_json
from gorouter_trio.wire.mail import CallSettings, HttpCall
from gorouter_trio.wire.responses import ChatCompletion

ORIGIN = Origin("http", "h.example", 80)


@dataclass
class Asked:
    """One request and what became of it."""

    text: str
    exchange: Exchange
    reply: ChatCompletion


@dataclass
class Place:
    """The pool under test and the network that it uses."""

    pool: Pool
    network: Network

    async def ask(
        self,
        text: str = "x",
        *,
        deadline: float = math.inf,
        ambiguous_retries: int | None = None,
        flow: str = "",
        on_sent: Callable[[], None] | None = None,
        method: str = "POST",
        **settings: object,
    ) -> Asked:
        """A chat; the text of the reply, and the record of the exchange."""

        def decode(exchange: Exchange) -> Asked:
            reply = decode_completion(exchange.ticket.body)
            exchange.usage, exchange.reply_id = reply.usage, reply.id
            assert reply.choices
            message = reply.choices[0].message
            assert message is not None
            return Asked(str(message.content), exchange, reply)

        call = HttpCall(
            method=method,
            body=encode_json({"q": text}),
            deadline=deadline,
            flow=flow,
            settings=CallSettings(**settings),  # type: ignore[arg-type]  # checked by the struct
        )
        return await self.pool.request(call, decode, ambiguous_retries=ambiguous_retries, on_sent=on_sent)

    async def fetch(self, text: str = "x") -> bytes:
        """The bytes of a reply, whatever they are."""
        return await self.pool.request(HttpCall(body=encode_json({"q": text})), lambda exchange: exchange.ticket.body)

    @asynccontextmanager
    async def stream(self, text: str = "x", *, deadline: float = math.inf) -> AsyncIterator[ChatReader]:
        """A streamed chat, which has its first data."""

        async def begin(exchange: Exchange, lease: Lease) -> ChatReader:
            return await begin_reading(self.pool, exchange, lease=lease, wall=lambda: 0.0)

        call = HttpCall(body=encode_json({"q": text, "stream": True}), streaming=True, deadline=deadline)
        reader = await self.pool.request_stream(call, begin)
        try:
            yield reader
        finally:
            reader.close()

    async def read(self, text: str = "x") -> str:
        """A streamed chat, read to its end."""
        async with self.stream(text) as reader:
            while await reader.read():
                pass
            return reader.result().text

    @property
    def statistics(self) -> PoolStatistics:
        return self.pool.statistics()

    async def check_clean(self) -> None:
        """No request anywhere, every worker idle, no connection open but theirs, every request accounted for."""
        await trio.testing.wait_all_tasks_blocked()
        s = self.statistics
        assert (s.queued, s.waiting, s.in_flight) == (0, 0, 0), s
        assert s.submitted == s.answered + s.failed + s.abandoned, s
        assert self.network.open == s.connections, (self.network.open, s)
        assert len(set(map(id, self.pool.idle))) == s.workers, s


@asynccontextmanager
async def open_place(
    serve: Serve,
    *,
    transport: object | None = None,
    capacity_bytes: int = 65536,
    on_attempt: Callable[[AttemptRecord], None] | None = None,
    estimate: Callable[[HttpCall], int] | None = None,
    shared: SharedLimits | None = None,
    **fields: object,
) -> AsyncIterator[Place]:
    """A pool with the settings in `fields`, over connections that are served by `serve`."""
    async with trio.open_nursery() as nursery:
        network = Network(nursery, serve, capacity_bytes)
        config = ClientConfig(**{"api_key": "k", "base_url": "http://localhost", **fields}).resolved({})  # type: ignore[arg-type]
        limits = ConnectionLimits(
            max_header_bytes=config.pool.max_header_bytes, max_body_bytes=config.pool.max_body_bytes
        )
        made = connector(ORIGIN, transport=transport or network, tls=None, limits=limits)
        async with open_pool(
            config, made, make_head=make_head, on_attempt=on_attempt, estimate=estimate, shared=shared
        ) as pool:
            yield Place(pool, network)
        nursery.cancel_scope.cancel()


def make_head(
    method: str, path: str, extra: tuple[tuple[str, str], ...] = (), *, key: Secret | None = None
) -> RequestHead:
    shown = "k" if key is None else key.reveal()
    return RequestHead(ORIGIN, method=method, target=path, headers=[("Authorization", f"Bearer {shown}"), *extra])


async def together(*calls: Callable[[], Awaitable[object]]) -> None:
    """Run calls at the same time, each started when those before it wait."""
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
