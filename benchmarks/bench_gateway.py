"""CPU of the serving process for one round trip of a message over a WebSocket, beside a bare trio-websocket echo.

The server is this process, and the only one that is measured; the clients are in a process of their own, so many
connections that each send a message and wait for its answer, again and again. Four servers take turns: an echo on
trio-websocket as it comes; the gateway with a request that needs no turn; the gateway with a turn of a session; and
the gateway with a chat of other people's clients over HTTP. The model's reply comes from memory, at no cost but that of
reading it; what a turn costs without a gateway is a row as well.

    python benchmarks/bench_gateway.py --json benchmarks/results/gateway.json
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import sys
import time
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import _harness
import _wire
import trio
from trio_websocket import ConnectionClosed, open_websocket_url, serve_websocket

sys.path.insert(0, str(_harness.HERE.parent))

import gorouter_trio as gr
from gorouter_trio.gateway import GatewayConfig, GatewayLimits, serve_gateway
from gorouter_trio.simulator import open_simulated_network
from gorouter_trio.transport.http_server import ServerReply, ServerRequest, encode_headers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio_websocket import WebSocketRequest

_JSON = encode_headers([("Content-Type", "application/json")])
_REPLY = json.dumps(
    {
        "id": "gen-1",
        "model": _wire.MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 40}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 40, "total_tokens": 43, "cost": 0.0001},
    }
).encode()
_OPEN = GatewayLimits(
    max_per_address=100_000,
    max_per_principal=100_000,
    max_unauthenticated=100_000,
    messages_per_s=1e9,
    message_burst=1_000_000_000,
    frames_per_s=1e9,
    frame_burst=1_000_000_000,
)


class _Api:
    """Answers every chat with the same reply."""

    @staticmethod
    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(200, _JSON, body=_REPLY)


# The clients


def message(kind: str, name: int, number: int) -> str:
    """What a client sends: an echo of the size of a turn, or a request."""
    if kind == "statistics":
        return f'{{"type":"statistics","id":{number},"session":"s{name}"}}'
    return f'{{"type":"ask","id":{number},"session":"s{name}","turn_id":"{number}","messages":"Tell me something."}}'


async def one_client(url: str, kind: str, *, name: int, count: int, is_greeting: bool) -> None:
    """So many round trips, one after the other."""
    async with open_websocket_url(url) as websocket:
        if is_greeting:
            await websocket.send_message('{"type":"hello","version":1}')
            await websocket.get_message()
        for number in range(1, count + 1):
            await websocket.send_message(message(kind, name, number))
            answer = await websocket.get_message()
            if '"failed"' in answer[:20]:
                raise SystemExit(answer)


async def load(url: str, kind: str, *, connections: int, count: int) -> None:
    """Many clients at once."""
    async with trio.open_nursery() as nursery:
        for name in range(connections):
            nursery.start_soon(partial(one_client, url, kind, name=name, count=count, is_greeting=kind != "echo"))


# The servers


@asynccontextmanager
async def open_echo() -> AsyncIterator[str]:
    """trio-websocket as it comes."""

    async def echo(request: WebSocketRequest) -> None:
        websocket = await request.accept()
        try:
            while True:
                await websocket.send_message(await websocket.get_message())
        except ConnectionClosed:
            return

    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_websocket, echo, "127.0.0.1", 0, ssl_context=None))
        yield f"ws://127.0.0.1:{server.port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_client() -> AsyncIterator[gr.Client]:
    """A client whose API answers from memory."""
    async with (
        open_simulated_network(_Api()) as network,  # type: ignore[arg-type]  # all that is asked of it is a handler
        gr.open_client(
            api_key=_wire.API_KEY,
            base_url=network.base_url,
            transport=network,
            insecure_http=True,
            model=_wire.MODEL,
            prices=gr.PricePolicy(on_start=False, refresh_s=None),
            ledger=gr.LedgerConfig(lookups=0),
        ) as client,
    ):
        yield client


@asynccontextmanager
async def open_gateway() -> AsyncIterator[str]:
    """The gateway in front of such a client."""
    async with open_client() as client, trio.open_nursery() as nursery:
        config = GatewayConfig(anonymous=True, limits=_OPEN)
        gateway = await nursery.start(partial(serve_gateway, client, config))
        yield gateway.url
        nursery.cancel_scope.cancel()


async def serve_clients(kind: str, *, connections: int, count: int) -> tuple[float, float]:
    """CPU of this process for all round trips, and how long they took."""
    opened = open_echo() if kind == "echo" else open_gateway()
    command = [sys.executable, __file__, "--load", kind, "--connections", str(connections), "--count", str(count)]
    async with opened as url:
        gc.collect()
        cpu, began = time.process_time(), time.perf_counter()
        await trio.run_process([*command, "--url", url])
        return time.process_time() - cpu, time.perf_counter() - began


async def ask_here(*, connections: int, count: int) -> tuple[float, float]:
    """The same turns without a gateway."""
    async with open_client() as client:
        cpu, began = time.process_time(), time.perf_counter()

        async def one(name: int) -> None:
            for number in range(count):
                await client.session(f"s{name}").ask("Tell me something.", turn_id=f"{number + 1}")

        async with trio.open_nursery() as nursery:
            for name in range(connections):
                nursery.start_soon(one, name)
        return time.process_time() - cpu, time.perf_counter() - began


def contenders(connections: int, count: int) -> dict[str, tuple[str, Callable[[], Awaitable[tuple[float, float]]]]]:
    """What is measured, by name."""
    serve = partial(serve_clients, connections=connections, count=count)
    return {
        "echo": ("bare trio-websocket echo", partial(serve, "echo")),
        "statistics": ("**gr gateway**, a request without a turn", partial(serve, "statistics")),
        "ask": ("session.ask, no gateway", partial(ask_here, connections=connections, count=count)),
        "turn": ("**gr gateway**, a turn of a session", partial(serve, "turn")),
    }


async def measure(connections: int, count: int, *, rounds: int) -> _harness.Table:
    """All of them in turn, after a round that does not count."""
    subjects = contenders(connections, count)
    rows = [_harness.Row(name, label) for name, (label, _run) in subjects.items()]
    table = _harness.Table(f"a round trip, {connections} connections", "µs", "echo", rows)
    for number in range(rounds + 1):
        for row in table.rows:
            cpu, took = await subjects[row.name][1]()
            if number:
                row.values.append(round(1e6 * cpu / connections / count, 2))
                row.requests += connections * count
                print(f"{row.name}: {connections * count / took:,.0f} round trips/s", file=sys.stderr)
    return table


def main() -> None:
    """Measure, show, save; or be the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures of no meaning")
    parser.add_argument("--load", metavar="KIND", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        trio.run(partial(load, args.url, args.load, connections=args.connections, count=args.count))
        return
    if args.quick:
        args.connections, args.count, args.rounds = 4, 5, 1
    table = trio.run(partial(measure, args.connections, args.count, rounds=args.rounds))
    versions = ["trio-websocket", "wsproto", "trio", "gorouter_trio", "msgspec"]
    report = _harness.report("gateway", [table], distributions=versions)
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
