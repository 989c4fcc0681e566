"""Clients that mean a gateway no good, in a process of their own, which costs the loop of the gateway nothing.

    python gateway_attackers.py KIND URL COUNT [FILE]

Prints `connected` once all of them are, where they all are at the same time, and at the end a line of JSON: how long
each of them was let, in seconds, and the codes they were closed with.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import cast

import msgspec
import trio
from gateways import address_of, close_code, frame, open_raw, open_talk

__all__ = ["Attack", "open_attack"]

SUPPORT = Path(__file__).parent
# The backlog of a listener is finite; a connection that it dropped looks like one for a minute.
_CONNECTING = 50
_FLOODING = 10


class Attack(msgspec.Struct):
    """What became of them."""

    took: list[float] = []
    codes: list[int | None] = []


class Attackers:
    """The process of the attackers, as those that are attacked see it."""

    def __init__(self, process: trio.Process) -> None:
        self._said = cast("trio.abc.ReceiveStream", process.stdout)
        self._buffer = b""

    async def wait_connected(self) -> None:
        """Until all of them are."""
        assert await self._line() == b"connected"

    async def wait_ended(self) -> Attack:
        """What became of them, once it is over."""
        line = await self._line()
        while line == b"connected":
            line = await self._line()
        return msgspec.json.decode(line, type=Attack)

    async def _line(self) -> bytes:
        while b"\n" not in self._buffer:
            received = await self._said.receive_some()
            assert received, "the attackers have ended"
            self._buffer += received
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line


@asynccontextmanager
async def open_attack(kind: str, url: str, count: int, *more: str) -> AsyncIterator[Attackers]:
    """Begin an attack; it ends with the block."""
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}"}
    command = [sys.executable, str(SUPPORT / "gateway_attackers.py"), kind, url, str(count), *more]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
    try:
        yield Attackers(process)
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            await cast("trio.abc.ReceiveStream", process.stdout).aclose()


# In that process


async def _dribble(url: str, count: int, attack: Attack, on_connected: Callable[[], None]) -> None:
    """A byte a second, half of them before and half after the upgrade."""
    gate = trio.CapacityLimiter(_CONNECTING)
    host, port = address_of(url)

    async def before() -> None:
        async with gate:
            opened = await trio.open_tcp_stream(host, port)
        on_connected()
        began = trio.current_time()
        async with opened as stream:
            await _drip(stream, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 60)
        attack.took.append(trio.current_time() - began)

    async def after() -> None:
        async with AsyncExitStack() as stack:
            async with gate:
                stream, _reply = await stack.enter_async_context(open_raw(url))
            on_connected()
            began = trio.current_time()
            await _drip(stream, b"\x81\xfe\x01\x00mask" + b"x" * 60)
        attack.took.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(before if number % 2 else after)


async def _drip(stream: trio.abc.Stream, data: bytes) -> None:
    with suppress(trio.BrokenResourceError):
        for byte in data:
            await stream.send_all(bytes([byte]))
            with trio.move_on_after(1):
                while await stream.receive_some():
                    pass
                return


async def _stop_reading(url: str, count: int, attack: Attack, on_connected: Callable[[], None]) -> None:
    """Ask for a long answer, and grant no more than a little of it."""
    gate = trio.CapacityLimiter(_CONNECTING)

    async def one(number: int) -> None:
        async with AsyncExitStack() as stack:
            async with gate:
                talk = await stack.enter_async_context(open_talk(url))
            on_connected()
            began = trio.current_time()
            request = {"type": "ask", "id": 1, "turn_id": "t", "messages": "x", "stream": True, "credit": 10_000}
            await talk.send({**request, "session": f"slow-{number}"})
            attack.codes.append(await talk.close_code())
            attack.took.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)


async def _flood(url: str, count: int, attack: Attack, on_connected: Callable[[], None]) -> None:
    """What the file holds, in turn, each on a connection of its own; ten at a time, with a pause after each."""
    floods = msgspec.msgpack.decode(Path(sys.argv[4]).read_bytes(), type=list[bytes])  # noqa: ASYNC240 - once, small
    on_connected()
    left = iter(range(count))

    async def offend() -> None:
        for number in left:
            async with open_raw(url) as (stream, _reply):
                await stream.send_all(frame(b'{"type":"hello","version":1}'))
                await stream.receive_some()
                began = trio.current_time()
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(floods[number % len(floods)])
                attack.codes.append(await close_code(stream))
                attack.took.append(trio.current_time() - began)
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for _ in range(_FLOODING):
            nursery.start_soon(offend)


_Attack = Callable[[str, int, Attack, Callable[[], None]], Awaitable[None]]
KINDS: dict[str, _Attack] = {"dribble": _dribble, "stop_reading": _stop_reading, "flood": _flood}


async def _attack(kind: str, url: str, count: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 200), hard))
    attack, left = Attack(), 1 if kind == "flood" else count

    def note_connected() -> None:
        nonlocal left
        left -= 1
        if not left:
            print("connected", flush=True)  # noqa: T201 - how it is told

    await KINDS[kind](url, count, attack, note_connected)
    print(msgspec.json.encode(attack).decode(), flush=True)  # noqa: T201 - how it is told


if __name__ == "__main__":
    trio.run(_attack, sys.argv[1], sys.argv[2], int(sys.argv[3]))
