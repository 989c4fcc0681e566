"""Idle sessions give their memory back and are there again with the next message."""

from __future__ import annotations

import gc
import math

import pytest
import trio
import trio.testing
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.pool.workers import Ticket
from gorouter_trio.session.actor import SessionActor
from gorouter_trio.session.running import RunningTurn
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore, SqliteStore
from gorouter_trio.transport.sqlite import _Job


def turn_of(session, text):
    """The mail of a turn."""
    mail, _extras = session._turn(text, None, {})
    return mail


async def states(world, *keys):
    """What each session's actor does; `None` for one that is not active."""
    directory = world.client._runtime.sessions
    return [None if (actor := directory.active_actor(key)) is None else actor.statistics().state for key in keys]


KEEPERS = {gr.ChatResult, RunningTurn, SessionActor, Ticket, _Job}


async def test_an_idle_session_goes_and_comes_back(autojump_clock):
    """After the idle time the actor is gone, and the next turn is sent with the whole history."""
    async with open_world(sessions=gr.SessionConfig(idle_s=100)) as world:
        session = world.client.session("k", system="Be brief.")
        await session.ask("one")
        await trio.sleep(99)
        assert await states(world, "k") == ["idle"]
        await trio.sleep(2)
        assert await states(world, "k") == [None]
        await session.ask("two")
        assert [entry.message.content for entry in (await session.history())[::2]] == ["one", "two"]
        assert (await session.statistics()).turns == 2


async def test_use_keeps_a_session(autojump_clock):
    """The idle time counts from the last use, for each session of its own."""
    async with open_world(sessions=gr.SessionConfig(idle_s=100)) as world:
        for _ in range(5):
            await world.client.session("used").ask("q")
            await trio.sleep(60)
        await world.client.session("other").ask("q")
        await trio.sleep(70)
        assert await states(world, "used", "other") == [None, "idle"]


@pytest.mark.parametrize("overflow", ["block", "reject", "drop_oldest"])
async def test_passivating_takes_no_room(autojump_clock, overflow):
    """A session with a full mailbox passivates behind its mail, every turn of which is answered; as often as asked."""
    sessions = gr.SessionConfig(mailbox=1, overflow=overflow)
    async with open_world(SimulatorConfig(latency_s=5), sessions=sessions) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            for text in ("one", "two"):
                nursery.start_soon(session.ask, text)
                await trio.sleep(1)
            with trio.move_on_after(1):
                await world.client.passivate("k")
            nursery.start_soon(world.client.passivate, "k")
            await world.client.passivate("k")
            assert await states(world, "k") == [None]
        assert [entry.message.content for entry in (await session.history())[::2]] == ["one", "two"]


async def test_passivating_where_the_first_answer_is_enough(autojump_clock):
    """The asker that has its answer calls the others off, in the step in which the session goes to their mail.

    Whether that comes before or after is left to chance, so it is done often enough for either.
    """
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        for number in range(10):
            session = world.client.session(f"k{number}")

            async def ask(text, session, race):
                await session.ask(text)
                race.cancel()

            async with trio.open_nursery() as nursery, trio.open_nursery() as race:
                race.start_soon(ask, "a", session, race.cancel_scope)
                await trio.sleep(0.1)
                race.start_soon(ask, "b", session, race.cancel_scope)
                await trio.sleep(0.1)
                nursery.start_soon(world.client.passivate, session.key)
            assert trio.current_time() < 5 * (number + 1)


async def test_passivating_what_one_is_part_of(autojump_clock):
    """Neither a tool of the session's turn nor the holder of its stream waits for itself: each is told."""

    @gr.tool
    async def look() -> str:
        """Look."""
        with pytest.raises(gr.SessionBusyError):
            await world.client.passivate("k")
        return "seen"

    answers = replies(completion("", tool_calls=[("1", "look")]), completion())
    async with open_world(answer=answers) as world:
        assert (await world.client.session("k", tools=[look]).ask("q")).text == "Yes."
        assert world.sent[-1].contents[-1] == "seen"
    async with open_world() as world, world.client.session("k").stream("q") as stream:
        with pytest.raises(gr.SessionBusyError):
            await world.client.passivate("k")
        await stream.collect()


async def test_a_running_turn_is_use(autojump_clock):
    """A turn that takes longer than the idle time ends as it should."""
    async with open_world(
        SimulatorConfig(latency_s=50), sessions=gr.SessionConfig(idle_s=10), deadlines=gr.Deadlines(headers_s=100)
    ) as world:
        assert (await world.client.session("k").ask("q")).text
        await trio.sleep(25)
        assert await states(world, "k") == [None]


@pytest.mark.parametrize("idle", [True, False], ids=["idle", "not_yet_run"])
async def test_mail_while_a_session_is_closed(autojump_clock, idle):
    """Mail that comes in the step in which a session is closed gets one answer, an error; the next is served."""
    async with open_world() as world:
        session = world.client.session("k")
        if idle:
            await session.ask("one")
        actor = world.client._runtime.sessions.activate("k", session._options)
        assert actor.retire() is idle
        assert not actor.retire()
        answers = []

        async def ask(text):
            try:
                await actor.ask(turn_of(session, text))
            except (gr.ActorGoneError, gr.TurnInterruptedError) as exc:
                answers.append(type(exc))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "two")
            nursery.start_soon(ask, "three")
            nursery.start_soon(actor.aclose)
        assert len(answers) == 2
        # A turn that had begun is interrupted.
        assert set(answers) <= {gr.ActorGoneError} | ({gr.TurnInterruptedError} if not idle else set())
        assert actor.is_gone
        await session.ask("four")
        assert [entry.message.content for entry in (await session.history())[::2]] == ["one", "four"][not idle :]


async def test_a_session_that_ends_as_it_begins(autojump_clock):
    """The only one that is active, begun and closed in the same step: the client lives on.

    Which task is the first to wake up then is left to chance, so it is done often enough for either.
    """
    async with open_world(sessions=gr.SessionConfig(idle_s=1)) as world:
        session = world.client.session("k")
        for _ in range(20):
            await trio.sleep(2)
            await session._actor("k").aclose()
        assert (await session.ask("q")).text


async def test_an_open_stream_is_use(autojump_clock):
    """A stream that is held open longer than the idle time keeps its session."""
    async with open_world(sessions=gr.SessionConfig(idle_s=10)) as world:
        session = world.client.session("k")
        async with session.stream("q") as stream:
            await anext(stream)
            await trio.sleep(50)
            assert await states(world, "k") == ["running"]
            await stream.collect()
        assert len(await session.history()) == 2


async def test_the_cap_retires_the_least_recently_used(autojump_clock):
    """With more sessions than the cap, those that were used the longest time ago have gone."""
    async with open_world(sessions=gr.SessionConfig(max_active=3)) as world:
        for key in "abc":
            await world.client.session(key).ask("q")
        await world.client.session("a").ask("q")
        await world.client.session("d").ask("q")
        assert await states(world, *"abcd") == ["idle", None, "idle", "idle"]
        assert world.client._runtime.sessions.active == 3
        assert len(await world.client.session("b").history()) == 2


async def test_busy_sessions_do_not_go(autojump_clock):
    """When all are busy there are more than the cap, each turn ends well, and then those above the cap go."""
    async with open_world(SimulatorConfig(latency_s=5), sessions=gr.SessionConfig(max_active=2)) as world:
        texts = []

        async def ask(number):
            texts.append((await world.client.session(f"k{number}").ask("q")).text)

        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(ask, number)
            await trio.sleep(2)
            assert world.client._runtime.sessions.active == 10
        assert len(texts) == 10
        assert world.client._runtime.sessions.active <= 2
        await world.client.session("next").ask("q")
        assert world.client._runtime.sessions.active <= 2
        for number in range(10):
            assert len(await world.client.session(f"k{number}").history()) == 2


async def test_mail_and_retirement_never_miss_each_other(autojump_clock):
    """Messages of every kind at the very moment of the idle time all get their answer."""
    store = MemoryStore()
    async with open_world(sessions=gr.SessionConfig(idle_s=1), store=store) as world:
        session = world.client.session("k")
        for number in range(60):
            await session.ask("q")
            # Just before, at, and just behind the moment of retiring.
            await trio.sleep(1 + (number % 3 - 1) * 1e-9)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.history)
                nursery.start_soon(session.ask, "r")
                nursery.start_soon(session.interrupt)
        history = await session.history()
        assert len([entry for entry in history if entry.message.content == "q"]) == 60


async def test_a_session_that_retired_may_be_opened_differently(autojump_clock):
    """Other options are a conflict while the session is active, and its own business afterwards."""
    async with open_world(sessions=gr.SessionConfig(idle_s=10)) as world:
        await world.client.session("k", temperature=0).ask("q")
        with pytest.raises(gr.SessionConflictError):
            world.client.session("k", temperature=1)
        await trio.sleep(11)
        assert (await world.client.session("k", temperature=1).ask("q")).text


@pytest.mark.parametrize(("name", "value"), [("idle_s", 0), ("idle_s", -1), ("idle_s", math.nan), ("max_active", 0)])
def test_settings_are_checked(name, value):
    """A cap or a time that cannot be is refused by name."""
    with pytest.raises(gr.ConfigError, match=f"sessions.{name}"):
        gr.SessionConfig(**{name: value})


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_who_waits_keeps_nothing(tmp_path, is_streamed):
    """Idle workers, the threads of the store, and handlers of events hold no conversation that they have served."""
    before = {id(found) for found in gc.get_objects() if type(found) in KEEPERS}
    async with SqliteStore(tmp_path / "s.db") as store, open_world(store=store) as world:
        world.client.on(gr.ChatFinished, lambda _event: None)
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(take_turn, world.client.session(f"k{number}"), is_streamed)
        for number in range(10):
            await world.client._runtime.sessions.passivate(f"k{number}")
        await trio.testing.wait_all_tasks_blocked()
        gc.collect()
        kept = [found for found in gc.get_objects() if type(found) in KEEPERS]
        assert world.client.statistics().connections
        assert [found for found in kept if id(found) not in before] == []


async def take_turn(session, is_streamed):
    """Ask for an answer, and read it."""
    if is_streamed:
        async with session.stream("q") as stream:
            await stream.collect()
    else:
        await session.ask("q")
