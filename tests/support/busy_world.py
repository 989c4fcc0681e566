"""A scenario that has everything in it: many sessions over some time, streams, cancels, faults; also a script.

`python busy_world.py SEED` prints the digest of the log of one run, for comparison with other processes.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from typing import TYPE_CHECKING

import trio

from gorouter_trio import GorouterError
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.testing import (
    Corrupt,
    Cut,
    Delay,
    Drop,
    Duplicate,
    FailStore,
    HangStore,
    Link,
    Refuse,
    RunReport,
    SkewClock,
    Stall,
    World,
    check_history,
    run,
)

if TYPE_CHECKING:
    from gorouter_trio import Client

DAY_S = 86_400.0

FAULTS = (
    Cut(probability=0.03, after_bytes=200),
    Cut(probability=0.02, direction="request", after_bytes=40, how="end"),
    Drop(probability=0.005, direction="request"),
    Delay(probability=0.03, by_s=2),
    Stall(probability=0.005, for_s=20),
    Corrupt(probability=0.01, after_bytes=12),
    Duplicate(probability=0.01, after_bytes=50),
    Refuse(probability=0.03),
    FailStore(probability=0.01),
    FailStore(probability=0.005, when="after"),
    HangStore(probability=0.005, for_s=2),
    SkewClock(at_s=DAY_S / 2, by_s=-3600),
)
SIMULATOR = SimulatorConfig(
    latency_s=0.4,
    first_token_s=0.2,
    tokens_per_s=60,
    jitter=0.5,
    reply_tokens=25,
    fault_rates={"429_upstream": 0.02, "502": 0.02, "mid_stream_error": 0.02, "error_in_200": 0.01},
)
LINK = Link(latency_s=0.04, jitter_s=0.03)


def run_busy_world(seed: int, *, sessions: int = 8, turns: int = 3, span_s: float = DAY_S) -> RunReport[list[str]]:
    """One run; its value are the histories that no provider would take, and the sessions without an end."""
    scenario = partial(live, sessions=sessions, turns=turns, span_s=span_s)
    return run(scenario, seed=seed, simulator=SIMULATOR, link=LINK, faults=FAULTS)


async def live(world: World, *, sessions: int, turns: int, span_s: float) -> list[str]:
    """Let people talk at random times until their turns are over, and look at what is left."""
    async with world.open_client() as client:
        async with trio.open_nursery() as nursery:
            for number in range(sessions):
                nursery.start_soon(_person, world, client, number, turns, span_s)
        await _be_cut_off(world, client, sessions)
        pool = client.statistics()
        world.record("pool", in_flight=pool.in_flight, queued=pool.queued, retries=pool.retries)
        assert (pool.in_flight, pool.queued) == (0, 0)
    requests = await world.next_requests()
    assert 0 < len(requests) <= sessions
    problems = [problem for body in requests.values() for problem in check_history(body)]
    return problems + world.invalid_histories


async def _be_cut_off(world: World, client: Client, chats: int) -> None:
    """Cancel many at once: trio delivers that in an order that depends on addresses, which must not show."""
    with trio.move_on_after(0.7):
        async with trio.open_nursery() as nursery:
            for number in range(chats):
                nursery.start_soon(_chat, world, client, f"Tell me about {number} at length, please.")
    # Until what they cost was looked up, or given up.
    await trio.sleep(3600)


async def _chat(world: World, client: Client, prompt: str) -> None:
    try:
        async with client.stream(prompt) as stream:
            await stream.collect()
    except GorouterError as exc:
        world.record("chat", prompt=prompt, error=type(exc).__name__)


async def _person(world: World, client: Client, number: int, turns: int, span_s: float) -> None:
    rng = world.rng(f"person/{number}")
    session = client.session(f"person:{number}", system="You are concise.")
    for at in sorted(rng.uniform(0, span_s) for _ in range(turns)):
        await trio.sleep(max(0.0, at - world.now()))
        with trio.move_on_after(rng.uniform(0, 3) if rng.random() < 0.15 else 3600):
            try:
                if rng.random() < 0.4:
                    async with session.stream(
                        f"Tell me about {rng.choice(['tea', 'rain', 'bees'])}, please."
                    ) as stream:
                        async for _event in stream:
                            if rng.random() < 0.005:
                                break
                else:
                    await session.ask(f"What is {rng.randint(1, 9)} + {rng.randint(1, 9)}?")
            except GorouterError as exc:
                world.record("person", number=number, error=type(exc).__name__)


def digest(log: bytes) -> str:
    """A short name for a log."""
    return hashlib.sha256(log).hexdigest()


if __name__ == "__main__":
    sys.stdout.write(digest(run_busy_world(int(sys.argv[1])).log))
