"""The churn: twenty tasks on ten connections, cancelled after 0.2 to 6 ms, over real sockets. Nothing may stick."""

from __future__ import annotations

import random
import re
from contextlib import suppress

import pytest
import trio
from pooled import make_head
from scripted import DONE, Peer, chat, delta, stream

from gorouter_trio.config import ClientConfig, PoolLimits, RateLimits
from gorouter_trio.errors import GorouterError
from gorouter_trio.pool.streams import begin_reading
from gorouter_trio.pool.workers import Exchange, Lease, Pool, open_pool
from gorouter_trio.transport.connector import connector
from gorouter_trio.transport.http import ConnectionLimits, Origin
from gorouter_trio.wire.codec import decode_completion
from gorouter_trio.wire.mail import HttpCall

TASKS = 20
CONNECTIONS = 10
LIMITS: dict[str, object] = {
    "api_key": {"k": 2, "l": 1},
    "rates": RateLimits(requests_per_minute=60_000, tokens_per_minute=30_000_000, max_in_flight=4),
}
PLAIN = chat("fine")
STREAMED = stream(delta("a"), delta("b"), delta(finish="stop"), DONE)
_LENGTH = re.compile(rb"Content-Length: (\d+)")


class Server:
    """Answers after a moment, counts what it was asked."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.requests = 0

    async def serve(self, conn: trio.SocketStream) -> None:
        async with conn:
            with suppress(trio.BrokenResourceError):
                await self._serve(Peer(conn))

    async def _serve(self, peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            self.requests += 1
            raw = STREAMED if b"stream" in request.body else PLAIN
            await trio.sleep(self.rng.random() * 0.002)
            cut = self.rng.randrange(len(raw))
            await peer.send(raw[:cut])
            await peer.send(raw[cut:])


async def use(pool: Pool, streamed: bool) -> str:
    if not streamed:
        reply = await pool.request(HttpCall(body=b"{}"), lambda exchange: decode_completion(exchange.ticket.body))
        return str(reply.choices[0].message.content)  # type: ignore[index, union-attr]

    async def begin(exchange: Exchange, lease: Lease) -> object:
        return await begin_reading(pool, exchange, lease=lease, wall=lambda: 0.0)

    reader = await pool.request_stream(HttpCall(body=b"stream", streaming=True), begin)
    try:
        while await reader.read():  # type: ignore[attr-defined]
            pass
        return reader.result().text  # type: ignore[attr-defined, no-any-return]
    finally:
        reader.close()  # type: ignore[attr-defined]


@pytest.mark.net
@pytest.mark.parametrize(
    ("cancels", "limits"),
    [
        pytest.param(10_000, {}, id="10,000"),
        pytest.param(3_000, LIMITS, id="3,000 at limits"),
        pytest.param(1_000_000, {}, id="1,000,000", marks=[pytest.mark.long, pytest.mark.timeout(7_200)]),
        pytest.param(100_000, LIMITS, id="100,000 at limits", marks=[pytest.mark.long, pytest.mark.timeout(7_200)]),
    ],
)
async def test_churn(cancels: int, limits: dict[str, object], rng: random.Random, no_leaks, record_property) -> None:
    """Cancelled after 0.2 to 6 ms, again and again: then the next request is answered at once, and nothing is left."""
    server = Server(rng)
    counts = {"cancelled": 0, "answered": 0}
    fields = {"api_key": "k", "pool": PoolLimits(max_connections=CONNECTIONS), **limits}
    config = ClientConfig(**fields).resolved({})  # type: ignore[arg-type]  # by name

    async def churn(pool: Pool, number: int) -> None:
        while counts["cancelled"] < cancels:
            patience_s = 5.0 if rng.random() < 0.2 else rng.uniform(0.0002, 0.006)
            with trio.move_on_after(patience_s) as scope, suppress(GorouterError):
                assert await use(pool, streamed=number % 4 == 0) in {"fine", "ab"}
                counts["answered"] += 1
            counts["cancelled"] += scope.cancelled_caught

    async with no_leaks(), trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        origin = Origin("http", "127.0.0.1", listeners[0].socket.getsockname()[1])
        made = connector(origin, transport=None, tls=None, limits=ConnectionLimits())
        async with open_pool(config, made, make_head=make_head) as pool:
            started = trio.current_time()
            with trio.fail_after(max(50, cancels / 150)):
                async with trio.open_nursery() as churning:
                    for number in range(TASKS):
                        churning.start_soon(churn, pool, number)
            took_s = trio.current_time() - started
            with trio.fail_after(1):
                assert await use(pool, streamed=False) == "fine"
                assert await use(pool, streamed=True) == "ab"
            await trio.sleep(0.05)
            s = pool.statistics()
            assert (s.in_flight, s.queued, s.waiting) == (0, 0, 0)
            assert s.workers <= CONNECTIONS
            assert s.connections <= CONNECTIONS
            assert s.submitted == s.answered + s.failed + s.abandoned
            assert [key.in_flight for key in s.keys] == [0] * len(s.keys)
            assert [model.in_flight for model in s.models] == [0] * len(s.models)
            assert counts["answered"] > cancels / 10
            in_vain = server.requests - counts["answered"]
            assert in_vain > 300
            record_property("figure", f"{counts}, {in_vain} of them sent, {s.opened} connections, {took_s:.1f} s")
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()
