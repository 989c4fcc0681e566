"""Turns with rounds of tools: what is written down and when, and what a turn that was cut off leaves."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import trio
import trio.testing
from failing_store import FailingStore
from histories import check_history
from tool_loop import ONE_ROUND, TOOLS, TWO_ROUNDS, Loop
from worlds import chunk, errors, open_world, streams, there

import gorouter_trio as gr
from gorouter_trio.security.rules import ToolRules
from gorouter_trio.session.turn import EntryOutOfOrderError
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.codec import decode_log_entry
from gorouter_trio.wire.messages import ToolMessage

SLOW = SimulatorConfig(latency_s=1, tokens_per_s=10, comment_interval_s=0, reply_tokens=20, reply_spread=0)


async def log_of(store, key="k"):
    """The kinds of the entries of a session's log."""
    return [type(decode_log_entry(entry)).__name__ for entry in (await store.load(key)).entries]


def brief(history):
    return [
        f"{type(entry.message).__name__[:4]}:{entry.message.content}" if entry.message.content else "calls"
        for entry in history
    ]


ROUND = ["TurnCalled", "ToolsAnswered"]


async def take(session, prompt, loop, how="ask", **options):
    """One turn with tools, whole or streamed."""
    if how == "ask":
        return await session.ask(prompt, rounds=loop, tools=TOOLS, **options)
    async with session.stream(prompt, rounds=loop, tools=TOOLS, **options) as stream:
        return await stream.collect()


async def next_is_right(world, session):
    world.api.answer = world.simulator.handler
    with trio.fail_after(60):
        assert (await session.ask("[[say well]]")).text == "well"
    assert check_history(world.sent[-1].messages) == []


@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_rounds_are_written_down_as_they_go(autojump_clock, how):
    """Each round is in the log before the next step, every request is valid, and the history shows all of it."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session, loop = world.client.session("k"), Loop()
        seen = []

        async def tool(_journal, call):
            seen.append(await log_of(store))
            return f"result of {call.id}"

        loop.tool = tool
        reply = await take(session, TWO_ROUNDS, loop, how, turn_id="t")
        assert reply.text
        assert reply.turn_id == "t"
        assert await log_of(store) == ["TurnStarted", *ROUND, *ROUND, "TurnAnswered"]
        assert seen == [["TurnStarted", "TurnCalled"]] * 2 + [["TurnStarted", *ROUND, "TurnCalled"]]
        history = await session.history()
        assert brief(history) == [
            f"User:{TWO_ROUNDS}",
            "calls",
            "Tool:result of a1",
            "Tool:result of a2",
            "calls",
            "Tool:result of b1",
            f"Assi:{reply.text}",
        ]
        assert [entry.call is not None for entry in history] == [False, True, False, False, True, False, True]
        assert {entry.turn_id for entry in history} == {"t"}
        for sent in world.sent:
            assert check_history(sent.messages) == []
        for before, after in itertools.pairwise(world.sent):
            assert after.messages[: len(before.messages)] == before.messages, "the prefix stays, as caches want it"
        assert [len(sent.messages) for sent in world.sent] == [1, 4, 6]
        again = await take(session, "", None, turn_id="t")
        assert (again.text, again.rounds) == (reply.text, reply.rounds)
        assert reply.rounds == tuple(there(entry.call) for entry in history if brief([entry]) == ["calls"])
        assert reply.cost is not None
        assert len(world.sent) == 3
        await next_is_right(world, session)


async def test_a_stream_over_rounds_is_one_sequence(autojump_clock):
    """Its reader sees what each reply says and what the tools tell in between, in order, and one result at the end."""
    async with open_world(SimulatorConfig(tokens_per_s=50)) as world:
        session, loop = world.client.session("k"), Loop()
        events = []
        async with session.stream(TWO_ROUNDS, rounds=loop, tools=TOOLS) as stream:
            events += [event async for event in stream]
            answer = stream.result.text
        kinds = [event.text if isinstance(event, gr.TextDelta) else "call" for event in events]
        said = [kind for kind in kinds if kind != "call"]
        assert sorted(said[:2]) == ["<a1>", "<a2>"]
        assert said[2:] == ["<b1>", *said[3:]]
        assert "".join(said[3:]) == answer
        assert kinds.index("call") < kinds.index(said[0])
        assert world.client.statistics().in_flight == 0
        await next_is_right(world, session)


@pytest.mark.parametrize("how", ["ask", "stream"])
@pytest.mark.parametrize("at_s", [0.5, 1.05, 1.5, 2.15])
async def test_interrupting_anywhere(autojump_clock, how, at_s):
    """Wherever it is stopped, what has run stays in the history, what had not is said to be, and the asker is told."""
    store = MemoryStore()
    async with open_world(SLOW, store=store) as world:
        session, loop, caught = world.client.session("k"), Loop(), []

        async def ask():
            with pytest.raises(gr.TurnInterruptedError) as info:
                await take(session, TWO_ROUNDS, loop, how, turn_id="t")
            caught.append(info.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(at_s)
            assert await session.interrupt()
        assert caught[0].maybe_billed
        log = await log_of(store)
        assert log[-1] in {"TurnAbandoned", "TurnAnswered"}
        await next_is_right(world, session)
        results = [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"]
        assert len(results) == 2 * log.count("TurnCalled") - ("b1" in loop.ran)
        for result in results:
            assert result.startswith("result of") or "whether it was carried out is unknown" in result
        if log[-1] == "TurnAbandoned":
            with pytest.raises(gr.TurnInDoubtError):
                await take(session, "", loop, how, turn_id="t")


@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_an_error_in_a_later_round(autojump_clock, how):
    """The asker gets the error itself, marked as billed; the rounds before it stay."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")

        async def tool(_journal, call):
            world.api.answer = errors(400, "too long")
            return f"result of {call.id}"

        with pytest.raises(gr.BadRequestError, match="too long") as caught:
            await take(session, ONE_ROUND, Loop(tool=tool), how)
        assert caught.value.maybe_billed
        assert not getattr(caught.value, "__notes__", [])
        assert await log_of(store) == ["TurnStarted", *ROUND, "TurnAbandoned"]
        await next_is_right(world, session)
        assert world.sent[-1].contents[-3:] == ["result of a1", "result of a2", "[[say well]]"]


@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_a_loop_that_fails(autojump_clock, how):
    """A mistake in the loop itself ends its turn with the cause, and the session lives."""
    async with open_world() as world:
        session = world.client.session("k")

        async def tool(_journal, _call):
            raise ZeroDivisionError

        with pytest.raises(gr.ActorGoneError, match="ExceptionGroup"):
            await take(session, ONE_ROUND, Loop(tool=tool), how)
        await next_is_right(world, session)


async def test_out_of_order(autojump_clock):
    """A loop that writes down what cannot be has an error, and the log stays in order."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")

        async def loop(journal):
            await journal.answered([ToolMessage("a1", "R")])

        with pytest.raises(gr.ActorGoneError, match="EntryOutOfOrder"):
            await session.ask(ONE_ROUND, rounds=loop, tools=TOOLS)
        kept = []

        async def late(journal):
            kept.append(journal)
            return await journal.send()

        await session.ask("q", rounds=late)
        with pytest.raises(EntryOutOfOrderError, match="does not run any more"):
            _ = kept[0].pending
        assert await log_of(store) == ["TurnStarted", "TurnAbandoned", "TurnStarted", "TurnAnswered"]


@pytest.mark.parametrize("operation", [3, 4, 5, 6])
@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_storing_a_round_fails(autojump_clock, how, operation):
    """A round that cannot be stored ends the turn; what was paid for is in the error, and nothing is lost that was."""
    store = FailingStore(faults={operation: "before"}, error=OSError)
    async with open_world(store=store) as world:
        session = world.client.session("k")
        with pytest.raises((gr.HistoryNotSaved, gr.StoreError)) as caught:
            await take(session, TWO_ROUNDS, Loop(), how)
        assert caught.value.maybe_billed
        if isinstance(caught.value, gr.HistoryNotSaved):
            assert there(caught.value.partial).message.tool_calls
        # The repair has stored what the failed write had, and the end.
        kinds = await log_of(store.inner)
        assert kinds == ["TurnStarted", *(ROUND * 2)[: operation - 2], "TurnAbandoned"]
        await next_is_right(world, session)


async def test_results_of_tools_outlive_an_interrupt(autojump_clock):
    """What a tool has returned is stored even if its turn is stopped while that is being done."""
    store = FailingStore(faults={4: "hang"})
    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(gr.TurnInterruptedError):
                    await take(session, ONE_ROUND, Loop())

            nursery.start_soon(ask)
            await trio.sleep(2)
            assert await session.interrupt()
        await next_is_right(world, session)
        assert [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"] == [
            "result of a1",
            "result of a2",
        ]


@pytest.mark.parametrize("moment", ["hang", "hang_after", "before", "after"])
@pytest.mark.parametrize("second_s", [0.5, 50])
async def test_results_of_tools_outlive_each_other(autojump_clock, moment, second_s):
    """A result whose writing is cut off is stored beside that of a tool which has run meanwhile, each once."""
    store = FailingStore(faults={4: moment}, error=OSError)

    @gr.tool
    async def first() -> str:
        return "paid"

    @gr.tool
    async def second() -> str:
        await trio.sleep(second_s)
        return "ran as well"

    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(gr.StoreError if moment in {"before", "after"} else gr.TurnInterruptedError):
                    await session.ask("[[call first#a1]] [[call second#a2]]", tools=[first, second])

            nursery.start_soon(ask)
            await trio.sleep(2)
            assert await session.interrupt() == moment.startswith("hang")
        tools = [e.message for e in await session.history() if isinstance(e.message, ToolMessage)]
        assert [message.tool_call_id for message in tools] == ["a1", "a2"]
        assert tools[0].content == "paid"
        if second_s < 2 and moment.startswith("hang"):
            assert tools[1].content == "ran as well"
        await next_is_right(world, session)


async def test_results_of_tools_outlive_a_question(autojump_clock):
    """What a tool has returned is stored even if its turn is stopped while the question of another is written down."""
    store = FailingStore(faults={4: "hang"})

    @gr.tool(rules=ToolRules(sensitive=True))
    async def asked() -> str:
        return "never"

    @gr.tool
    async def quick() -> str:
        await trio.sleep(0.5)
        return "paid"

    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(gr.TurnInterruptedError):
                    await session.ask("[[call asked#a1]] [[call quick#a2]]", tools=[asked, quick])

            nursery.start_soon(ask)
            await trio.sleep(2)
            assert await session.interrupt()
        contents = [e.message.content for e in await session.history() if isinstance(e.message, ToolMessage)]
        assert "paid" in contents
        await next_is_right(world, session)


@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_leaving_in_the_midst_of_tools(autojump_clock, how):
    """An asker that is cancelled while tools run stops them, and leaves when the log is in order."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session, loop = world.client.session("k"), Loop(tool_s=50)
        with trio.move_on_after(5) as scope:
            await take(session, ONE_ROUND, loop, how)
        assert scope.cancelled_caught
        assert trio.current_time() < 6
        assert await log_of(store) == ["TurnStarted", "TurnCalled", "TurnAbandoned"]
        assert (await session.statistics()).state == "idle"
        await next_is_right(world, session)


async def test_leaving_a_stream_early_in_a_later_round(autojump_clock):
    """What had been read of the last reply is stored, behind the rounds before it."""
    store = MemoryStore()
    prompt = "[[call f#a1]] [[tokens 100]]"
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        async with session.stream(prompt, rounds=Loop(), tools=TOOLS) as stream:
            async for text in stream.text:
                if text != "<a1>":
                    break
        history = await session.history()
        assert there(history[-1].call).interrupted
        assert str(history[-1].message.content).startswith(text)
        assert await log_of(store) == ["TurnStarted", *ROUND, "TurnAnswered"]
        await next_is_right(world, session)


async def test_calls_that_are_left_open_at_the_end(autojump_clock):
    """A loop that ends with an answer whose calls it does not run leaves a history that providers accept."""
    async with open_world() as world:
        session = world.client.session("k")

        async def loop(journal):
            return await journal.send()

        reply = await session.ask(ONE_ROUND, rounds=loop, tools=TOOLS)
        assert reply.message.tool_calls
        await next_is_right(world, session)


# A tool that asks its own session


async def test_a_tool_that_asks_its_own_session(autojump_clock):
    """It is told at once instead of waiting for itself, from a task of its own as well; others may ask."""
    async with open_world() as world:
        session, other = world.client.session("k"), world.client.session("other")
        said = []

        async def ask(work):
            with pytest.raises(gr.SessionBusyError, match="whose turn it is part of"):
                await work()
            said.append(True)

        async def tool(_journal, _call):
            await ask(lambda: session.ask("q"))
            await ask(session.history)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, session.clear)
            assert (await other.ask("[[say hello]]")).text == "hello"
            return "R"

        await take(session, "[[call f#a1]]", Loop(tool=tool))
        assert len(said) == 3
        await next_is_right(world, session)


async def test_a_tool_that_asks_its_own_session_through_another(autojump_clock):
    """A ring of two sessions is found as well, and interrupting does not do instead."""
    async with open_world(sessions=gr.SessionConfig(double_texting="interrupt")) as world:
        one, two = world.client.session("one"), world.client.session("two")
        said = []

        async def inner(_journal, _call):
            with pytest.raises(gr.SessionBusyError):
                await one.ask("q")
            said.append(True)
            return "R"

        async def outer(_journal, _call):
            return (await take(two, "[[call f#b]]", Loop(tool=inner))).text

        assert (await take(one, "[[call f#a1]]", Loop(tool=outer))).text
        assert said == [True]


async def test_a_ring_through_a_turn_that_was_joined(autojump_clock):
    """A ring of sessions is found where the message of a tool was taken in the turn of somebody else."""
    async with open_world(SLOW, sessions=gr.SessionConfig(double_texting="merge")) as world:
        one, two = world.client.session("one"), world.client.session("two")
        said = []

        async def inner(_journal, _call):
            with trio.fail_after(10), pytest.raises(gr.SessionBusyError, match="whose turn it is part of"):
                await one.ask("q")
            said.append(True)
            return "R"

        loop = Loop(tool=inner)

        async def outer(_journal, _call):
            return (await take(two, "[[call f#b]]", loop)).text

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, two, "first", loop)
            nursery.start_soon(take, one, "[[call f#a1]]", Loop(tool=outer))
            await trio.sleep(0.5)
            nursery.start_soon(take, two, "second", loop)
        assert said == [True]
        assert (await two.statistics()).turns == 2


@pytest.mark.parametrize("mailbox", [1, 16])
async def test_two_sessions_that_ask_each_other_at_the_same_time(autojump_clock, mailbox):
    """Each has a turn that runs already: the second to ask is told at once, and the first is answered."""
    async with open_world(SLOW, sessions=gr.SessionConfig(mailbox=mailbox)) as world:
        one, two = world.client.session("one"), world.client.session("two")
        said = []

        def asking(other, delay_s):
            async def tool(_journal, _call):
                await trio.sleep(delay_s)
                try:
                    return (await other.ask("[[say hello]]")).text
                except gr.SessionBusyError as exc:
                    said.append(str(exc))
                    return "busy"

            return tool

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(take, one, "[[call f#a]]", Loop(tool=asking(two, 1)))
                nursery.start_soon(take, two, "[[call f#b]]", Loop(tool=asking(one, 2)))
                await trio.sleep(0.5)
                nursery.start_soon(two.ask, "somebody else's, which is first in the line")
        assert len(said) == 1
        assert "whose turn it is part of" in said[0]
        assert [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"] == ["hello"]


# Taking up


async def crashed(world, loop, at_s, *, prompt=TWO_ROUNDS, **fields):
    """A store as a process leaves it that is killed while a turn runs, `at_s` seconds after its begin."""
    store, left = MemoryStore(), MemoryStore()
    async with world.another_client(store=store, **fields) as doomed, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: take(doomed.session("k"), prompt, loop, turn_id="t"))
        await trio.sleep(at_s)
        await left.append("k", (await store.load("k")).entries, expected_version=0)
        nursery.cancel_scope.cancel()
    return left


@pytest.mark.parametrize(("at_s", "entries"), [(0.5, 1), (1.5, 2), (2.5, 3), (3.5, 4), (4.5, 5)])
@pytest.mark.parametrize("harmless", [False, True])
async def test_a_crash_anywhere(autojump_clock, at_s, entries, harmless):
    """Nothing is sent or run again unasked; asked to resend, the turn goes on, and only harmless tools run again."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        store = await crashed(world, Loop(tool_s=1), at_s)
        assert len(await log_of(store)) == entries
        asked = len(world.sent)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            loop = Loop(tool_s=1, harmless=harmless)
            for _ in range(2):
                with pytest.raises(gr.TurnInDoubtError):
                    await take(session, TWO_ROUNDS, loop, turn_id="t")
            assert len(world.sent) == asked
            reply = await take(session, TWO_ROUNDS, loop, turn_id="t", resume="resend")
            assert reply.text
            assert len(reply.rounds) == 2
            was_running = {2: ["a1", "a2"], 4: ["b1"]}.get(entries, [])
            later = {1: ["a1", "a2", "b1"], 2: ["b1"], 3: ["b1"]}.get(entries, [])
            assert sorted(loop.ran) == sorted(later + (was_running if harmless else []))
            for sent in world.sent:
                assert check_history(sent.messages) == []
            contents = [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"]
            assert contents.count("in doubt") == (0 if harmless else len(was_running))
            assert (await take(session, "", loop, turn_id="t")).text == reply.text
            await next_is_right(world, session)


async def test_a_crash_in_the_midst_of_tools_and_another_turn(autojump_clock):
    """Somebody else's turn goes on over it: what the tools did is unknown, and is said to be."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        store = await crashed(world, Loop(tool_s=1, each=True), 1.5)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            await next_is_right(world, session)
            unknown = [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"]
            assert len(unknown) == 2
            assert all("unknown" in content for content in unknown)
            with pytest.raises(gr.TurnInDoubtError):
                await take(session, "", Loop(), turn_id="t")
            assert (await take(session, "[[say anew]]", Loop(), turn_id="t", resume="resend")).text == "anew"


async def test_a_fork_of_a_turn_in_doubt(autojump_clock):
    """What has run is known to the fork as well, and the turn is in doubt in both."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        store = await crashed(world, Loop(tool_s=1), 2.5)
        async with world.another_client(store=store) as client:
            fork = await client.session("k").fork("k2")
            assert brief(await fork.history()) == brief(await client.session("k").history())
            for session in (fork, client.session("k")):
                with pytest.raises(gr.TurnInDoubtError):
                    await session.ask("", turn_id="t")
            await next_is_right(world, fork)
            assert "result of a1" in world.sent[-1].contents


async def test_resuming_without_tools(autojump_clock):
    """Taken up without tools, the calls that were cut off are closed, and the model is asked to go on."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        store = await crashed(world, Loop(tool_s=1), 1.5)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            reply = await session.ask("", turn_id="t", resume="resend")
            assert reply.text
            assert check_history(world.sent[-1].messages) == []
            assert "not repeated" in str(world.sent[-1].contents)


@pytest.mark.parametrize("how", ["left", "broken", "interrupted"])
async def test_resuming_without_tools_as_a_stream(autojump_clock, how):
    """What has arrived of a stream that ends early is stored as an interrupted answer."""
    async with open_world(SLOW) as world:
        store = await crashed(world, Loop(tool_s=1), 4.5)
        assert (await log_of(store))[1:] == ROUND
        if how == "broken":
            world.api.answer = streams(chunk({"content": "cut"}))
        async with world.another_client(store=store) as client:
            session, caught = client.session("k"), []

            async def interrupt():
                await trio.sleep(1.5)
                await session.interrupt()

            async with trio.open_nursery() as nursery:
                if how == "interrupted":
                    nursery.start_soon(interrupt)
                try:
                    async with session.stream("", turn_id="t", resume="resend") as stream:
                        async for _event in stream:
                            if how == "left":
                                break
                except gr.GorouterError as exc:
                    caught.append(exc)
            kinds = {"left": [], "broken": [gr.StreamBrokenError], "interrupted": [gr.TurnInterruptedError]}
            assert [type(exc) for exc in caught] == kinds[how]
            last = (await session.history())[-1]
            assert last.message.content
            assert there(last.call).interrupted
            await next_is_right(world, session)


async def test_resume_is_checked(autojump_clock):
    """It needs the id of a turn, and has one value."""
    async with open_world() as world:
        session = world.client.session("k")
        with pytest.raises(gr.ConfigError, match="resume"):
            await session.ask("q", resume="resend")
        with pytest.raises(gr.ConfigError, match="resume"):
            await session.ask("q", resume="again", turn_id="t")  # type: ignore[call-overload]  # on purpose


# Deadlines


@pytest.mark.parametrize("how", ["ask", "stream"])
async def test_the_deadline_covers_the_whole_turn(autojump_clock, how):
    """A turn carries its asker's deadline over all rounds: tools are stopped, retries not begun beyond it."""
    async with open_world() as world:
        session, loop = world.client.session("k"), Loop(tool_s=5)
        with pytest.raises(trio.TooSlowError), trio.fail_after(2):
            await take(session, ONE_ROUND, loop, how)
        assert trio.current_time() == pytest.approx(2, abs=0.5)
        await next_is_right(world, session)


async def test_a_stream_is_not_opened_beyond_the_deadline(autojump_clock):
    """A wait before a retry that would end beyond the asker's deadline is not begun, for streams as well."""
    async with open_world(SimulatorConfig(retry_after_s=30)) as world:
        session = world.client.session("k")
        with trio.fail_after(10), pytest.raises(gr.OverloadedError):
            async with session.stream("[[fault 503]]"):
                pass
        assert trio.current_time() < 1


async def test_a_deadline_of_mail_from_elsewhere(autojump_clock):
    """The session itself keeps the deadline that its mail says, where its asker is not cancelled by it."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        mail, _extras = session._turn("q", None, {})
        late = msgspec.structs.replace(mail, turn_id="t", deadline=trio.current_time() + 0.5)
        with pytest.raises(gr.DeadlineExceededError) as caught:
            await session._actor(session.key).ask(late)
        assert caught.value.phase == "total"
        assert caught.value.maybe_billed
        assert trio.current_time() == pytest.approx(0.5)
        with pytest.raises(gr.DeadlineExceededError) as caught:
            await session._actor(session.key).ask(msgspec.structs.replace(late, turn_id="u"))
        assert not caught.value.maybe_billed
        assert len(world.sent) == 1, "whose time is over when its turn comes is not even begun"
        await next_is_right(world, session)
