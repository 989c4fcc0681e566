"""CPU of one event of a stream, each a read of its own, without a server: what 20 ms between events cost, repeatable.

Every stream has a pair of connected sockets that keep packets apart, filled when it begins, so that each read brings
one event and nothing is waited for. What is left is the way from the kernel to the consumer: trio's loop, the parser,
and what this library does between them. Filling the socket is in the figures of all of them. Needs Linux.

    python benchmarks/bench_events.py --json benchmarks/results/events.json
"""

from __future__ import annotations

import argparse
import gc
import itertools
import pathlib
import socket
import sys
import time
from typing import TYPE_CHECKING

import _harness
import _wire
import httptools
import trio
from _reading import Events

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

sys.path.insert(0, str(_harness.HERE.parent))

import gorouter_trio as gr
from gorouter_trio.transport.streams import SocketStream

_EVENTS = [_wire.framed(event) for event in _wire.stream_events()]


class FilledNetwork:
    """Connections on which the whole reply waits already, a packet an event."""

    def __init__(self) -> None:
        self._far: list[socket.socket] = []

    def connect_now(self) -> socket.socket:
        """Our end of a new connection."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
        far.setblocking(False)
        near.setblocking(False)
        for packet in (_wire.stream_head(), *_EVENTS, _wire.LAST_CHUNK):
            far.send(packet)
        self._far.append(far)
        return near

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """The same as a stream, for a client."""
        await trio.lowlevel.checkpoint()
        return SocketStream(self.connect_now())

    def close(self) -> None:
        """Close the far ends."""
        for far in self._far:
            far.close()
        self._far.clear()


class _Bare:
    """httptools on such a connection, as in bench_stream.py."""

    def __init__(self, near: socket.socket) -> None:
        self._socket = near
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._is_complete = False

    def on_message_complete(self) -> None:
        self._is_complete = True

    async def read(self) -> int:
        events = Events()
        while not self._is_complete:
            await trio.lowlevel.wait_readable(self._socket)
            self._parser.feed_data(self._socket.recv(65_536))
            events.feed(b"".join(self._pieces))
            self._pieces.clear()
        self._socket.close()
        return events.facts()[0]


def contenders(client: gr.Client, network: FilledNetwork) -> dict[str, tuple[str, Callable[[int], Awaitable[int]]]]:
    """What reads a stream: name, label, and a function that reads one whole and returns the length of its text."""

    async def bare(_number: int) -> int:
        return await _Bare(network.connect_now()).read()

    async def stream(_number: int) -> int:
        length = 0
        async with client.stream(_wire.PROMPT) as events:
            async for event in events:
                if isinstance(event, gr.TextDelta):
                    length += len(event.text)
        return length

    keys = map(str, itertools.count())

    async def session(_number: int) -> int:
        # A new one each time: what earlier rounds have said would have to be read first.
        ref, length = client.session(next(keys)), 0
        async with ref.stream(_wire.PROMPT) as events:
            async for text in events.text:
                length += len(text)
        await ref.aclose()
        return length

    return {
        "bare": ("bare httptools on trio", bare),
        "stream": ("**gr client.stream**", stream),
        "session": ("**gr session.stream**", session),
    }


async def run_lot(read: Callable[[int], Awaitable[int]], streams: int) -> None:
    """So many streams at once."""

    async def one(number: int) -> None:
        if await read(number) != len(_wire.STREAM_TEXT):
            raise SystemExit("the text is not whole")

    async with trio.open_nursery() as nursery:
        for number in range(streams):
            nursery.start_soon(one, number)


async def measure(streams: int, rounds: int) -> _harness.Table:
    """All of them in turn, after a round that does not count."""
    network = FilledNetwork()
    # A connection is used once: the next request would find another reply on it.
    pool = gr.PoolLimits(max_connections=streams, keepalive_s=0.0)
    async with gr.open_client(
        api_key=_wire.API_KEY,
        base_url="http://localhost",
        model=_wire.MODEL,
        transport=network,
        pool=pool,
        prices=gr.PricePolicy(on_start=False, refresh_s=None),  # Nothing here answers for them.
    ) as client:
        subjects = contenders(client, network)
        rows = [_harness.Row(name, label) for name, (label, _) in subjects.items()]
        table = _harness.Table(f"an event of a stream, {streams} in flight", "µs", "bare", rows)
        for number in range(rounds + 1):
            for row in table.rows:
                gc.collect()
                began = time.process_time()
                await run_lot(subjects[row.name][1], streams)
                spent = time.process_time() - began
                network.close()
                if number:
                    row.values.append(round(1e6 * spent / streams / len(_EVENTS), 3))
                    row.requests += streams
    return table


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--in-flight", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures of no meaning")
    args = parser.parse_args()
    if args.quick:
        args.in_flight, args.rounds = 4, 1
    table = trio.run(measure, args.in_flight, args.rounds)
    report = _harness.report("events", [table], distributions=["httptools", "trio", "gorouter_trio", "msgspec"])
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
