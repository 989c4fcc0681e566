"""So many clients of a gateway, in a process of their own.

    python gateway_crowd.py URL COUNT

Connects and greets, prints `ready`, takes one turn on each connection for each line of its input, with the time in
seconds that this took on a line, and ends with its input.
"""

from __future__ import annotations

import resource
import sys
from contextlib import AsyncExitStack

import trio
from gateways import Talk, open_talk

_AT_A_TIME = 200


async def be_many(url: str, count: int) -> None:
    """All of them."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    talks: list[Talk] = []
    gate, ready = trio.CapacityLimiter(_AT_A_TIME), trio.Event()

    async def one() -> None:
        async with AsyncExitStack() as stack:
            async with gate:
                talks.append(await stack.enter_async_context(open_talk(url)))
            if len(talks) == count:
                ready.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await ready.wait()
        print("ready", flush=True)  # noqa: T201 - how it is told
        number = 0
        async for _line in trio.wrap_file(sys.stdin):
            number += 1
            began = trio.current_time()
            async with trio.open_nursery() as turns:
                for name, talk in enumerate(talks):
                    turns.start_soon(_take_turn, talk, gate, name, number)
            print(f"{trio.current_time() - began:.3f}", flush=True)  # noqa: T201 - how it is told
        nursery.cancel_scope.cancel()


async def _take_turn(talk: Talk, gate: trio.CapacityLimiter, name: int, number: int) -> None:
    async with gate:
        answer = await talk.request(type="ask", id=number, session=f"s{name}", messages="[[say well]]")
        assert answer["type"] == "done", answer


if __name__ == "__main__":
    trio.run(be_many, sys.argv[1], int(sys.argv[2]))
