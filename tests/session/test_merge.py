"""Messages that come while a turn runs: taken together; and mailboxes that put out the oldest."""

from __future__ import annotations

import time

import pytest
import trio
import trio.testing
from histories import check_history
from worlds import errors, open_world

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.messages import ToolMessage

SLOW = SimulatorConfig(latency_s=1)
MERGE = gr.SessionConfig(double_texting="merge")


def texts(history):
    return [entry.message.content for entry in history]


class Askers:
    """Tasks that ask a session, each with what became of it."""

    def __init__(self, session, nursery):
        self.session, self.nursery = session, nursery
        self.ended = {}
        self.scopes = {}

    async def _ask(self, name, options):
        with trio.CancelScope() as self.scopes[name]:
            try:
                self.ended[name] = await self.session.ask(name, **options)
            except gr.GorouterError as exc:
                self.ended[name] = exc

    async def ask(self, *names, **options):
        for name in names:
            self.nursery.start_soon(self._ask, name, options)
            await trio.testing.wait_all_tasks_blocked(0.001)


async def test_messages_are_joined(autojump_clock):
    """What came while a turn ran is one turn, in order; each asker has the answer under its own id, once."""
    store = MemoryStore()
    async with open_world(SLOW, sessions=MERGE, store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first")
            await askers.ask("a", turn_id="A")
            await askers.ask("b")
            await askers.ask("c", turn_id="C")
        assert [sent.contents for sent in world.sent][-1][2:] == ["a", "b", "c"]
        assert len(world.sent) == 2
        ended = askers.ended
        assert [ended[name].turn_id for name in "abc"] == ["A", "A", "C"]
        assert len({(ended[name].text, ended[name].generation_id) for name in "abc"}) == 1
        for turn_id in ("A", "C"):
            again = await session.ask("", turn_id=turn_id)
            assert (again.text, again.turn_id) == (ended["a"].text, turn_id)
        async with world.another_client() as other:
            assert (await other.session("k").ask("", turn_id="C")).text == ended["a"].text
            assert (await other.session("k").statistics()).turns == 2
        assert len(world.sent) == 2
        assert texts(await session.history())[2:5] == ["a", "b", "c"]


async def test_what_cannot_be_joined_goes_alone(autojump_clock):
    """A stream, other options, or the result of a tool are turns of their own, and the order stays."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")

        async def stream():
            async with session.stream("s") as stream:
                await stream.collect()

        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first", "a", "b")
            nursery.start_soon(stream)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await askers.ask("c")
            await askers.ask("d", temperature=0)
            await askers.ask("e", temperature=0)
        users = [m["content"] for m in world.sent[-1].messages if m["role"] == "user"]
        assert users == ["first", "a", "b", "s", "c", "d", "e"]
        assert len(world.sent) == 5
        for sent in world.sent:
            assert check_history(sent.messages) == []


async def test_a_turn_that_cannot_be_sent_fails_alone(autojump_clock):
    """The error in its messages is nobody's else, and those that wait behind it are answered."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")

        async def ask_wrongly():
            with pytest.raises(gr.BadRequestError, match="answers no open call"):
                await session.ask(ToolMessage("nothing", "r"))

        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first")
            nursery.start_soon(ask_wrongly)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await askers.ask("a", "b")
        assert [askers.ended[name].turn_id for name in ("a", "b")] == [askers.ended["a"].turn_id] * 2
        assert texts(await session.history())[2:4] == ["a", "b"]


async def test_one_id_twice_is_one_message(autojump_clock):
    """The same turn asked twice while it waits is taken once; one that was answered before gives its answer."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")
        old = await session.ask("old", turn_id="O")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first")
            await askers.ask("a", turn_id="A")
            await askers.ask("again", turn_id="A")
            await askers.ask("older", turn_id="O")
            await askers.ask("b")
        assert askers.ended["older"] == old
        assert askers.ended["again"] == askers.ended["a"]
        users = [m["content"] for m in world.sent[-1].messages if m["role"] == "user"]
        assert users == ["old", "first", "a", "b"]


@pytest.mark.parametrize("leavers", [("a",), ("b",), ("a", "b"), ("b", "c"), ("a", "b", "c")])
async def test_askers_that_leave(autojump_clock, leavers):
    """One that leaves a joined turn leaves at once, and the turn goes on; it stops when the last one leaves."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first", "a", "b", "c")
            await trio.sleep(1.5)
            for name in leavers:
                askers.scopes[name].cancel()
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert trio.current_time() < 1.6
        answered = {name for name in "abc" if name in askers.ended}
        assert answered == set("abc") - set(leavers)
        assert all(isinstance(askers.ended[name], gr.ChatResult) for name in answered)
        assert len(await session.history()) == (6 if answered else 2)
        await session.ask("next")
        assert check_history(world.sent[-1].messages) == []


async def test_the_joined_turn_fails(autojump_clock):
    """Each asker gets the error, one of its own."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first", "a", "b", "c")
            world.api.answer = errors(400, "too long")
        failed = [askers.ended[name] for name in "abc"]
        assert all(isinstance(error, gr.BadRequestError) and "too long" in str(error) for error in failed)
        assert len({id(error) for error in failed}) == 3
        assert len(await session.history()) == 2


async def test_turns_that_are_taken_alone_after_their_joined_turn_failed(autojump_clock):
    """Each has the answer to its own message under its own id, and is taken back by itself."""
    store = MemoryStore()
    async with open_world(SLOW, sessions=MERGE, store=store) as world:
        session, simulated = world.client.session("k"), world.api.answer
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("[[say first]]")
            for name in "ABC":
                await askers.ask(name, turn_id=name)
            world.api.answer = errors(400, "too long")
        world.api.answer = simulated
        assert (await session.statistics()).turns == 2
        for _ in range(2):
            assert (await session.ask("[[say about B]]", turn_id="B")).text == "about B"
        assert (await session.statistics()).turns == 3
        assert (await session.ask("[[say about A]]", turn_id="A")).text == "about A"
        sent = len(world.sent)
        async with world.another_client(store=store) as other:
            for asked in (session, other.session("k")):
                for name in "AB":
                    again = await asked.ask("", turn_id=name)
                    assert (again.text, again.turn_id) == (f"about {name}", name)
                assert len(world.sent) == sent
        assert not await session.undo("C")
        assert await session.undo("A")
        assert texts(await session.history())[2:] == ["[[say about B]]", "about B"]
        assert await session.undo("B")
        assert len(await session.history()) == 2


async def test_taking_back_a_turn_that_was_joined(autojump_clock):
    """Undone or edited under its id, the turn goes in which it was taken."""
    store = MemoryStore()
    async with open_world(SLOW, sessions=MERGE, store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first")
            for name in "AB":
                await askers.ask(name, turn_id=name)
        await session.edit("B", "B?")
        assert world.sent[-1].contents[::2] == ["first", "B?"]
        async with world.another_client(store=store) as other:
            assert texts(await other.session("k").history())[2] == "B?"
            assert not await other.session("k").undo("B")


async def test_interrupting_a_joined_turn(autojump_clock):
    """All its askers are told."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first", "a", "b")
            await trio.sleep(1.5)
            assert await session.interrupt()
        assert all(isinstance(askers.ended[name], gr.TurnInterruptedError) for name in "ab")


async def test_joining_is_bounded(autojump_clock):
    """However many wait for room, a turn takes as many with it as the mailbox holds."""
    config = gr.SessionConfig(double_texting="merge", mailbox=4)
    async with open_world(SLOW, sessions=config) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            await Askers(session, nursery).ask("first", *map(str, range(20)))
        sizes = [len([m for m in sent.messages if m["role"] == "user"]) for sent in world.sent]
        assert sizes == [1, 6, 11, 16, 21]
        history = [text for text in texts(await session.history()) if str(text).isdigit()]
        assert history == list(map(str, range(20)))


async def test_a_joined_turn_has_the_time_of_its_last_asker(autojump_clock):
    """An asker with little time does not cut short the others."""
    async with open_world(SLOW, sessions=MERGE) as world:
        session = world.client.session("k")

        async def hurried():
            with trio.move_on_after(1.5):
                await session.ask("hurried")

        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("first")
            nursery.start_soon(hurried)
            await trio.testing.wait_all_tasks_blocked(0.001)
            await askers.ask("patient")
        assert isinstance(askers.ended["patient"], gr.ChatResult)


# Putting out the oldest


async def test_drop_oldest(autojump_clock):
    """Of many that come, the newest wait; the others are told, oldest first, at once."""
    config = gr.SessionConfig(mailbox=3, overflow="drop_oldest")
    async with open_world(SLOW, sessions=config) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            askers = Askers(session, nursery)
            await askers.ask("runs", *map(str, range(10)))
            assert list(askers.ended) == list(map(str, range(7)))
            assert all(isinstance(error, gr.SessionBusyError) for error in askers.ended.values())
            assert trio.current_time() < 0.1
        assert texts(await session.history())[::2] == ["runs", "7", "8", "9"]


async def test_a_crowd(autojump_clock, record_property):
    """10,000 senders on a slow session: as many wait as there is room for, the others are told at once."""
    config = gr.SessionConfig(mailbox=16, overflow="reject")
    async with open_world(SLOW, sessions=config, notes=False) as world:
        session = world.client.session("k")
        waits, outcomes = [], []

        async def send(number):
            began, at = time.perf_counter(), trio.current_time()
            try:
                await session.ask(str(number))
                outcomes.append("answered")
            except gr.SessionBusyError:
                outcomes.append("busy")
                waits.append(time.perf_counter() - began)
                assert trio.current_time() == at

        async def others():
            for number in range(20):
                began = trio.current_time()
                await world.client.session(f"other {number % 4}").ask("q")
                assert trio.current_time() - began < 1.5

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, -1)
            await trio.testing.wait_all_tasks_blocked(0.001)
            nursery.start_soon(others)
            for number in range(10_000):
                nursery.start_soon(send, number)
        assert (outcomes.count("answered"), outcomes.count("busy")) == (17, 9_984)
    p99_ms = sorted(waits)[len(waits) * 99 // 100] * 1000
    record_property("figure", f"10,000 senders: 17 answered, 9,984 refused, p99 {p99_ms:.3f} ms of real time")
    assert p99_ms <= 10
