"""What a session costs while it waits for its next message."""

from __future__ import annotations

import gc
import tracemalloc

import trio
import trio.testing
from worlds import completion, open_world, replies

SESSIONS = 2_000
MAX_BYTES = 8_000


async def test_an_idle_session_is_small(autojump_clock, record_property):
    """An active session that waits costs one task and less than 8 kB, besides its history."""
    async with open_world(answer=replies(completion()), notes=False) as world:

        async def activate(first: int, count: int) -> None:
            async with trio.open_nursery() as nursery:
                for number in range(first, first + count):
                    nursery.start_soon(world.client.session(f"session:{number}").history)

        await activate(0, 10)
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        tasks = trio.lowlevel.current_statistics().tasks_living
        tracemalloc.start()
        try:
            await activate(10, SESSIONS)
            await trio.testing.wait_all_tasks_blocked()
            gc.collect()
            per_session = tracemalloc.get_traced_memory()[0] / SESSIONS
        finally:
            tracemalloc.stop()
        assert trio.lowlevel.current_statistics().tasks_living == tasks + SESSIONS
    record_property("figure", f"{per_session:,.0f} bytes an idle session")
    assert per_session < MAX_BYTES


async def test_a_ref_is_small(autojump_clock, record_property):
    """A ref to a session that nobody has asked anything costs a few hundred bytes, and nothing when it is dropped."""
    async with open_world(answer=replies(completion())) as world:
        keys = [f"session:{number}" for number in range(SESSIONS)]
        gc.collect()
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            refs = [world.client.session(key) for key in keys]
            per_ref = (tracemalloc.get_traced_memory()[0] - before) / SESSIONS
            refs.clear()
            left = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
    record_property("figure", f"{per_ref:,.0f} bytes a ref")
    assert per_ref < 300
    assert left < 10_000
