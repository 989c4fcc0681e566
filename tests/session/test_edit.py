"""Taking back and asking anew: retry, edit, undo, and the log that is written anew."""

from __future__ import annotations

import pytest
import trio
from failing_store import FailingStore
from histories import check_history
from tool_loop import ONE_ROUND, TOOLS, Loop
from worlds import completion, errors, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.messages import AssistantMessage, UserMessage

ABC = [completion(text) for text in ("A", "B", "C", "D", "E", "F")]


def texts(history):
    return [entry.message.content for entry in history]


async def talk(session, *prompts):
    for prompt in prompts:
        await session.ask(prompt, turn_id=prompt)


async def test_retry(autojump_clock):
    """The last turn is asked again with the history before it, and the new answer stands in its place."""
    async with open_world(answer=replies(*ABC)) as world:
        session = world.client.session("k", system="s")
        await talk(session, "a", "b")
        again = await session.retry(turn_id="b2")
        assert (again.text, again.turn_id) == ("C", "b2")
        assert world.sent[-1].contents == ["s", "a", "A", "b"]
        assert texts(await session.history()) == ["a", "A", "b", "C"]
        await session.ask("c")
        assert world.sent[-1].contents == ["s", "a", "A", "b", "C", "c"]
        assert (await session.ask("", turn_id="b")).text == "B", "the id keeps its answer"
        assert (await session.ask("", turn_id="b2")).text == "C"
        async with world.another_client(store=world.client._runtime.store) as other:
            await other.session("k", system="s").ask("d")
        assert world.sent[-1].contents == ["s", "a", "A", "b", "C", "c", "D", "d"]


@pytest.mark.parametrize("before", [(), (UserMessage("q"), AssistantMessage("a"))])
async def test_retrying_what_nobody_asked_for(autojump_clock, before):
    """An answer without a question, a greeting that was added, has no messages that are sent again."""
    store = MemoryStore()
    async with open_world(answer=replies(*ABC), store=store) as world:
        await gr.HistoryManager(store).add("k", [*before, AssistantMessage("hello")])
        session, said = world.client.session("k", system="s"), [message.content for message in before]
        assert (await session.retry()).text == "A"
        assert world.sent[-1].contents == ["s", *said]
        await session.ask("b")
        assert world.sent[-1].contents == ["s", *said, "A", "b"]
        assert texts(await session.history()) == [*said, "A", "b", "B"]


async def test_edit(autojump_clock):
    """A past turn is asked differently, and what followed it has gone."""
    async with open_world(answer=replies(*ABC)) as world:
        session = world.client.session("k")
        await talk(session, "a", "b", "c")
        answer = await session.edit("b", "B?", temperature=0)
        assert answer.text == "D"
        assert world.sent[-1].contents == ["a", "A", "B?"]
        assert world.sent[-1].body["temperature"] == 0
        assert texts(await session.history()) == ["a", "A", "B?", "D"]
        for gone in ("b", "c", "nothing"):
            with pytest.raises(gr.SessionConflictError, match=gone):
                await session.edit(gone, "q")
        with pytest.raises(gr.ConfigError):
            await session.edit("", "q")
        (first,) = [entry.turn_id for entry in await session.history() if entry.message.content == "a"]
        await session.edit(there(first), "A?")
        assert world.sent[-1].contents == ["A?"]


@pytest.mark.parametrize("work", ["retry", "edit"])
async def test_a_retry_that_fails_changes_nothing(autojump_clock, work):
    """Without a new answer the old one stays."""
    async with open_world(answer=replies(*ABC)) as world:
        session = world.client.session("k")
        await talk(session, "a", "b")
        world.api.answer = errors(400)
        with pytest.raises(gr.BadRequestError):
            await (session.retry() if work == "retry" else session.edit("a", "q"))
        assert texts(await session.history()) == ["a", "A", "b", "B"]
        world.api.answer = replies(completion("C"))
        await session.ask("c")
        assert world.sent[-1].contents == ["a", "A", "b", "B", "c"]


async def test_without_a_turn(autojump_clock):
    """There is nothing to take again, and nothing to undo."""
    async with open_world(answer=replies(*ABC)) as world:
        session = world.client.session("k")
        with pytest.raises(gr.SessionConflictError, match="no turn"):
            await session.retry()
        assert not await session.undo()
        assert not await session.undo("t")


async def test_undo(autojump_clock):
    """The last turn, or one and all after it, is no part of the history; the log still knows what was paid."""
    store = MemoryStore()
    async with open_world(answer=replies(*ABC), store=store) as world:
        session = world.client.session("k")
        await talk(session, "a", "b", "c", "d")
        assert await session.undo()
        assert texts(await session.history()) == ["a", "A", "b", "B", "c", "C"]
        assert await session.undo("b")
        await session.ask("e")
        assert world.sent[-1].contents == ["a", "A", "e"]
        statistics = await session.statistics()
        assert (statistics.turns, statistics.length, statistics.calls) == (5, 2, 5)
        assert str(statistics.cost_usd) == "1.25"
        assert (await session.ask("", turn_id="d")).text == "D"
        async with world.another_client() as other:
            assert texts(await other.session("k").history()) == ["a", "A", "e", "E"]


async def test_taking_a_turn_with_tools_again(autojump_clock):
    """A turn with rounds is replaced as a whole, and its tools run for the new one."""
    async with open_world() as world:
        session, loop = world.client.session("k"), Loop()
        await session.ask(ONE_ROUND, rounds=loop, tools=TOOLS)
        await session.retry(rounds=loop, tools=TOOLS)
        assert loop.ran == ["a1", "a2", "a1", "a2"] or sorted(loop.ran) == ["a1", "a1", "a2", "a2"]
        assert len(await session.history()) == 5
        assert check_history(world.sent[-1].messages) == []
        await session.undo()
        assert await session.history() == []


async def test_open_calls_come_back_with_their_turn(autojump_clock):
    """Undoing the turn that answered a call opens the call again, for another result."""
    call = completion(None, tool_calls=[("x", "f")])
    async with open_world(answer=replies(call, *ABC)) as world:
        session = world.client.session("k")
        await session.ask("a")
        await session.ask(gr.ToolMessage("x", "first"))
        assert await session.undo()
        await session.ask(gr.ToolMessage("x", "second"))
        assert world.sent[-1].contents == ["a", None, "second"]
        await session.retry()
        assert world.sent[-1].contents == ["a", None, "second"]
        assert check_history(world.sent[-1].messages) == []


# Compaction


async def test_compact(autojump_clock):
    """The log is shorter, what is sent is the same, and every turn id keeps its promise."""
    store = MemoryStore()
    async with open_world(answer=replies(*ABC), store=store) as world:
        session = world.client.session("k")
        await talk(session, "a", "b", "c")
        await session.undo()
        world.api.answer = errors(402)
        with pytest.raises(gr.InsufficientCreditsError):
            await session.ask("x", turn_id="x")
        world.api.answer = replies(*ABC[3:])
        await session.edit("b", "B?", turn_id="b2")
        before, cost = await session.history(), (await session.statistics()).cost_usd
        entries = len((await store.load("k")).entries)
        await session.compact()
        assert len((await store.load("k")).entries) < entries
        assert await session.history() == before
        async with world.another_client() as other:
            session = other.session("k")
            assert await session.history() == before
            assert (await session.ask("", turn_id="a")).text == "A"
            assert (await session.ask("", turn_id="b2")).text == "D"
            for turn_id in ("b", "c"):
                with pytest.raises(gr.SessionConflictError, match="compacted"):
                    await session.ask("", turn_id=turn_id)
            assert (await session.statistics()).cost_usd == cost
            await session.ask("e")
            assert world.sent[-1].contents == ["a", "A", "B?", "D", "e"]
            await session.compact()
            await session.compact()
            with pytest.raises(gr.SessionConflictError, match="compacted"):
                await session.ask("", turn_id="b")


@pytest.mark.parametrize("moment", ["before", "after", "hang", "hang_after"])
@pytest.mark.parametrize("work", ["compact", "undo"])
async def test_changing_the_log_fails(autojump_clock, work, moment):
    """Whether it has happened or not, the session knows, and the next turn is right."""
    store = FailingStore(error=OSError)
    async with open_world(answer=replies(*ABC), store=store) as world:
        session = world.client.session("k")
        await talk(session, "a", "b")
        store.fail_next(moment, skip=1 if work == "compact" else 0)
        with trio.move_on_after(5) as scope:
            with pytest.raises(gr.StoreError):
                await getattr(session, work)()
            scope.cancel()
            await trio.lowlevel.checkpoint()
        happened = work == "undo" and moment.endswith("after")
        await session.ask("c")
        assert world.sent[-1].contents == (["a", "A", "c"] if happened else ["a", "A", "b", "B", "c"])
