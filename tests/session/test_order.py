"""Many senders, one session: order, bounds, and what happens to a message that comes while a turn runs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import second_process
import trio
import trio.testing
from answering import open_sessions
from failing_store import FailingStore
from worlds import completion, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.config import ContextPolicy
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore, SqliteStore
from gorouter_trio.wire.codec import decode_log_entry
from gorouter_trio.wire.journal import TurnAbandoned, TurnAnswered, TurnStarted

SLOW = SimulatorConfig(latency_s=1)


def texts(history):
    return [entry.message.content for entry in history]


async def echo(request, reply):
    """Answer with the number of messages in the request."""
    await replies(completion(str(request.body.count(b'"role"'))))(request, reply)


@pytest.mark.parametrize("turns", [30, pytest.param(1_000, marks=pytest.mark.long)])
async def test_no_turn_is_lost_reordered_or_doubled(autojump_clock, record_property, turns):
    """64 senders with many turns each on one session: every turn once, in the order in which they were asked."""
    senders = 64
    asked: list[str] = []
    got: dict[str, str] = {}
    # So that the requests of so many turns do not fill the memory.
    kept = 50
    config = gr.SessionConfig(mailbox=4, context=ContextPolicy(max_turns=kept))
    async with open_world(answer=echo, notes=False, sessions=config) as world:
        session = world.client.session("k")

        async def send(sender):
            for turn in range(turns):
                text = f"{sender}.{turn}"
                asked.append(text)
                got[text] = (await session.ask(text)).text

        async with trio.open_nursery() as nursery:
            for sender in range(senders):
                nursery.start_soon(send, sender)
        history = texts(await session.history())
    assert len(asked) == len(history) // 2 == senders * turns
    # Order of arrival is the order of asking: the mailbox keeps it for those who wait for room as well.
    assert history[::2] == asked
    assert len(set(asked)) == len(asked)
    # The n-th turn was sent with the turns before it, and its answer went to the one who had asked.
    assert [got[text] for text in asked] == [str(2 * min(place, kept) + 1) for place in range(len(asked))]
    assert history[1::2] == [got[text] for text in asked]
    record_property("figure", f"{len(asked):,} turns: 0 lost, 0 reordered, 0 doubled")


async def test_sessions_run_side_by_side(autojump_clock):
    """Turns of one session wait for each other, turns of different sessions do not."""
    async with open_world(SLOW) as world:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(world.client.session(f"k{number % 5}").ask, "q")
        assert trio.current_time() == pytest.approx(4)


async def test_a_full_mailbox_blocks(autojump_clock):
    """With policy block, senders wait for room, in order, and all are served."""
    async with open_world(SLOW, sessions=gr.SessionConfig(mailbox=2)) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(session.ask, str(number))
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert (await session.statistics()).queued == 2
        assert texts(await session.history())[::2] == [str(number) for number in range(8)]


async def test_a_full_mailbox_rejects(autojump_clock):
    """With policy reject, 1,000 senders get at most what fits, and the others an answer at once."""
    config = gr.SessionConfig(mailbox=3, overflow="reject")
    outcomes = []
    async with open_world(SLOW, sessions=config) as world:
        session, other = world.client.session("k"), world.client.session("other")

        async def send(number):
            try:
                await session.ask(str(number))
                outcomes.append("answered")
            except gr.SessionBusyError:
                outcomes.append("busy")
                assert trio.current_time() < 0.01

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, 0)
            await trio.testing.wait_all_tasks_blocked(0.001)
            for number in range(1, 1000):
                nursery.start_soon(send, number)
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert (await session.statistics()).queued == 3
            with trio.fail_after(1.5):
                await other.ask("not disturbed")
        assert (outcomes.count("answered"), outcomes.count("busy")) == (4, 996)
        assert len(await session.history()) == 8


async def test_waiting_for_room_can_be_cancelled(autojump_clock):
    """A sender that is cancelled while it waits for room has posted nothing."""
    async with open_world(SLOW, sessions=gr.SessionConfig(mailbox=1)) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "runs")
            nursery.start_soon(session.ask, "waits")
            await trio.testing.wait_all_tasks_blocked(0.001)
            with trio.move_on_after(0.5) as scope:
                await session.ask("gives up")
            assert scope.cancelled_caught
        assert texts(await session.history())[::2] in (["runs", "waits"], ["waits", "runs"])
        assert (await session.statistics()).queued == 0


async def test_cancelling_an_asker_takes_its_queued_turn_out(autojump_clock):
    """The turn of an asker that leaves is never sent; the others keep their order."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        scopes = []

        async def send(text):
            with trio.CancelScope() as scope:
                scopes.append(scope)
                await session.ask(text)

        async with trio.open_nursery() as nursery:
            for text in ("a", "b", "c", "d"):
                nursery.start_soon(send, text)
                await trio.testing.wait_all_tasks_blocked(0.001)
            scopes[1].cancel()
            await trio.testing.wait_all_tasks_blocked(0.001)
            assert trio.current_time() < 1, "the asker left at once"
            assert (await session.statistics()).queued == 2
        assert texts(await session.history())[::2] == ["a", "c", "d"]
        assert [sent.contents[-1] for sent in world.sent] == ["a", "c", "d"]


async def test_double_texting_queue(autojump_clock):
    """By default, a message that comes while a turn runs waits for its turn."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "first")
            await trio.sleep(0.5)
            await session.ask("second")
        assert texts(await session.history())[::2] == ["first", "second"]


async def test_double_texting_reject(autojump_clock):
    """With reject, a turn is refused while another one runs or waits; what is no turn is not."""
    async with open_world(SLOW, sessions=gr.SessionConfig(double_texting="reject")) as world:
        session = world.client.session("k")
        await session.ask("before")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "first")
            await trio.sleep(0.5)
            with pytest.raises(gr.SessionBusyError, match="double_texting"):
                await session.ask("second")
            with pytest.raises(gr.SessionBusyError):
                async with session.stream("third"):
                    pass
            assert len(await session.history()) == 4
        await session.ask("fourth")
        assert texts(await session.history())[::2] == ["before", "first", "fourth"]


async def test_double_texting_reject_in_the_same_instant(autojump_clock):
    """Of ten turns that come at once, before any can have begun to run, nine are refused."""
    async with open_world(SLOW, sessions=gr.SessionConfig(double_texting="reject")) as world:
        session = world.client.session("k")
        await session.history()
        outcomes = []

        async def ask():
            try:
                await session.ask("q")
                outcomes.append("answered")
            except gr.SessionBusyError:
                outcomes.append("busy")

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert outcomes == ["busy"] * 9 + ["answered"]


async def test_double_texting_reject_during_a_stream(autojump_clock):
    """A stream that is being read is a running turn."""
    async with open_world(sessions=gr.SessionConfig(double_texting="reject")) as world:
        session = world.client.session("k")
        async with session.stream("first"), trio.open_nursery() as nursery:

            async def second():
                with pytest.raises(gr.SessionBusyError):
                    await session.ask("second")

            nursery.start_soon(second)
        await session.ask("third")


async def test_double_texting_interrupt(autojump_clock):
    """With interrupt, the newer message stops the running turn, whose asker is told, and is answered next."""
    async with open_world(SLOW, sessions=gr.SessionConfig(double_texting="interrupt")) as world:
        session = world.client.session("k")
        seen = []

        async def first():
            with pytest.raises(gr.TurnInterruptedError) as caught:
                await session.ask("first")
            seen.append(caught.value.maybe_billed)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(0.5)
            await session.ask("second")
        assert seen == [True]
        assert trio.current_time() == pytest.approx(1.5)
        assert texts(await session.history())[::2] == ["second"]


async def test_double_texting_interrupt_keeps_what_was_streamed(autojump_clock):
    """A stream that is interrupted by a newer message keeps what had arrived, for its holder and the history."""
    config = SimulatorConfig(tokens_per_s=10)
    async with open_world(config, sessions=gr.SessionConfig(double_texting="interrupt")) as world:
        session = world.client.session("k")
        pieces = []

        async def first():
            with pytest.raises(gr.TurnInterruptedError) as caught:
                async with session.stream("[[tokens 100]]") as stream:
                    async for text in stream.text:
                        pieces.append(text)  # noqa: PERF401 - what came before the error counts
            assert there(caught.value.partial).text == "".join(pieces)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(2)
            await session.ask("[[say second]]")
        history = await session.history()
        assert texts(history) == ["[[tokens 100]]", "".join(pieces), "[[say second]]", "second"]
        assert there(history[1].call).interrupted
        assert world.sent[-1].contents[1] == "".join(pieces)


async def test_two_clients_on_one_session(autojump_clock):
    """Two clients with one store and key: whoever comes second conflicts, and nothing interleaves."""
    store = MemoryStore()
    async with open_world(SLOW, store=store) as world, world.another_client() as other:
        one, two = world.client.session("k"), other.session("k")
        await one.ask("a")
        await two.ask("b")
        # `one` does not know of "b" yet.
        with pytest.raises(gr.SessionConflictError):
            await one.ask("c")
        assert len(world.sent) == 2, "the loser has sent nothing"
        await one.ask("d")
        assert world.sent[-1].contents[::2] == ["a", "b", "d"]
        assert texts(await two.history())[::2] == ["a", "b", "d"]


async def test_two_clients_at_the_same_time(autojump_clock):
    """When two clients start a turn at once, one is answered, the other one conflicts; the log stays in order."""
    store = FailingStore()  # one that takes its time
    async with open_world(SLOW, store=store) as world, world.another_client() as other:
        outcomes = []

        async def ask(client, text):
            try:
                await client.session("k").ask(text)
                outcomes.append("answered")
            except gr.SessionConflictError:
                outcomes.append("conflict")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, world.client, "one")
            nursery.start_soon(ask, other, "two")
        assert sorted(outcomes) == ["answered", "conflict"]
        assert len(await world.client.session("k").history()) == 2


@pytest.mark.parametrize("count", [25, pytest.param(2_000, marks=pytest.mark.long)])
async def test_two_processes_on_one_session(tmp_path, record_property, count):
    """Two processes with one file and one session: whoever comes second conflicts; what was answered is there, once."""
    path = str(tmp_path / "s.db")
    script = Path(second_process.__file__)
    acked: list[str] = []

    async def other():
        command = [sys.executable, str(script), path, "b", str(count)]
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr
        acked.extend(done.stdout.decode().split())

    mine: list[str] = []
    errors: dict[str, int] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        batches = itertools.count()
        while not acked and len(mine) < 100 * count:
            more, raised = await second_process.take_turns(path, f"a{next(batches)}.", 10)
            mine += more
            errors = {name: errors.get(name, 0) + raised.get(name, 0) for name in errors | raised}
    async with SqliteStore(path) as store:
        log = [decode_log_entry(entry) for entry in (await store.load(second_process.KEY)).entries]
    answered = [entry.turn_id for entry in log if isinstance(entry, TurnAnswered)]
    assert len(answered) == len(set(answered))
    assert set(mine) | set(acked) <= set(answered)
    # Nothing interleaves: each turn's end follows its start.
    for start, end in itertools.pairwise(log):
        if isinstance(start, TurnStarted):
            assert isinstance(end, (TurnAnswered, TurnAbandoned))
            assert start.turn_id == end.turn_id
    record_property("figure", f"{len(mine)} and {len(acked)} answered, {sum(errors.values())} conflicts here, 0 lost")


async def test_a_second_process_gets_a_conflict(tmp_path):
    """A process whose knowledge of a session is old has sent nothing when it learns so."""
    path = str(tmp_path / "s.db")
    async with SqliteStore(path) as store, open_sessions(store) as place:
        session = place.session(second_process.KEY)
        await session.ask("a")
        await trio.run_process([sys.executable, second_process.__file__, path, "b", "1"], capture_stdout=True)
        sent = place.pipeline.sent_bytes
        with pytest.raises(gr.SessionConflictError):
            await session.ask("c")
        assert place.pipeline.sent_bytes == sent
        await session.ask("d")
        assert texts(await session.history())[::2] == ["a", "[[say b0]]", "d"]


async def test_a_turn_that_another_client_took_over(autojump_clock):
    """A client that takes a running turn for a dead one's costs the runner its place in the log, not its answer."""
    store = MemoryStore()
    async with open_world(SLOW, store=store) as world, world.another_client() as other:
        caught = []

        async def first():
            with pytest.raises(gr.HistoryNotSaved) as info:
                await world.client.session("k").ask("[[say first]]")
            caught.append(info.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.sleep(0.5)
            await other.session("k").ask("second")
        assert there(caught[0].partial).text == "first"
        assert isinstance(caught[0].__cause__, gr.SessionConflictError)
        await world.client.session("k").ask("third")
        assert texts(await other.session("k").history())[::2] == ["second", "third"]
