"""What can be seen of sessions while they run."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
import trio
import trio.testing
from failing_store import FailingStore
from tool_loop import ONE_ROUND, TOOLS, Loop
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig

SLOW = SimulatorConfig(latency_s=10)


async def test_whom_a_session_waits_for(autojump_clock):
    """The store, the API, a reader, tools, its next message: and since when."""
    store = FailingStore(faults={1: "slow"})
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        seen = []

        async def look(after_s):
            await trio.sleep(after_s)
            now = await session.statistics()
            seen.append((now.state, now.waits_for, round(now.since_s)))

        async def talk():
            await session.ask(ONE_ROUND, rounds=Loop(tool_s=10), tools=TOOLS)
            async with session.stream("q") as stream:
                await stream.collect()
                await trio.sleep(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            await look(0.5)
            await look(5.5)
            await look(8)
            await look(10)
            await look(10)
            await look(8)
        await look(7)
        assert seen == [
            ("loading", "store", 0),
            ("running", "model", 5),
            ("running", "tools", 3),
            ("running", "model", 3),
            ("running", "model", 3),
            ("running", "reader", 1),
            ("idle", "mail", 7),
        ]


async def test_what_waits_and_what_was_spent(autojump_clock):
    """Mail in the queue and askers outside it, turns, calls, and what is known of their cost."""
    async with open_world(SLOW, sessions=gr.SessionConfig(mailbox=2)) as world:
        session, quiet = world.client.session("k"), world.client.session("quiet")
        assert await quiet.statistics() == gr.SessionStatistics("idle", 0, 0, 0, 0)
        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(session.ask, str(number))
            await trio.sleep(5)
            now = await session.statistics()
            assert (now.queued, now.waiting, now.turns, now.cost_usd) == (2, 2, 0, None)
            inspected = world.client._runtime.sessions.inspect()
            assert list(inspected) == ["k"]
            assert inspected["k"].state == "running"
        now = await session.statistics()
        assert (now.turns, now.length, now.calls, now.unpriced) == (5, 5, 5, 0)
        assert now.cost_usd is not None
        assert now.cost_usd > 0
        unpriced = msgspec.json.decode(completion())
        del unpriced["usage"]["cost"]
        world.api.answer = replies(msgspec.json.encode(unpriced))
        await quiet.ask("q")
        assert ((await quiet.statistics()).cost_usd, (await quiet.statistics()).unpriced) == (None, 1)
        world.api.answer = replies(completion())
        await quiet.ask("q")
        assert (await quiet.statistics()).cost_usd == Decimal("0.25")
        assert "running" not in repr(world.client._runtime.sessions.active_actor("quiet"))


@pytest.mark.parametrize("state", ["gone"])
async def test_a_session_that_has_ended(autojump_clock, state):
    """An actor that somebody still holds says that it is gone."""
    async with open_world() as world:
        session = world.client.session("k")
        await session.ask("q")
        actor = world.client._runtime.sessions.active_actor("k")
        assert actor is not None
        await session.aclose()
        assert actor.statistics().state == state
