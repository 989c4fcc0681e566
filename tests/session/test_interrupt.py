"""Interrupts, cancels and leaving early: what is stored, who waits for what, and what the next turn finds."""

from __future__ import annotations

from typing import cast

import pytest
import trio
import trio.testing
from failing_store import FailingStore, Moment
from histories import check_history
from worlds import DONE, chunk, errors, open_world, streams, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig

SLOW = SimulatorConfig(latency_s=1, tokens_per_s=10, comment_interval_s=0)


def texts(history):
    return [entry.message.content for entry in history]


async def next_turn_is_right(world, session):
    """Ask once more and look at what was sent."""
    reply = await session.ask("[[say well]]")
    assert reply.text == "well"
    assert check_history(world.sent[-1].messages) == []
    statistics = world.client.statistics()
    assert (statistics.in_flight, statistics.queued) == (0, 0)


async def test_interrupt_without_a_turn(autojump_clock):
    """Nothing runs, nothing is interrupted: not in a new session, an idle one, or while its history is read."""
    store = FailingStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")
        assert not await session.interrupt()
        await session.ask("q")
        assert not await session.interrupt()
        store.fail_next("hang")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.history)
            await trio.testing.wait_all_tasks_blocked()
            assert not await session.interrupt()
            nursery.cancel_scope.cancel()
        await next_turn_is_right(world, session)


async def test_interrupt_stops_the_running_turn_ahead_of_the_queue(autojump_clock):
    """It passes the queue, its asker is told, and when it returns the history is in order; queued turns go on."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        answers = []

        async def ask(text):
            try:
                answers.append((await session.ask(text)).text)
            except gr.TurnInterruptedError:
                answers.append("interrupted")

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ask, f"[[say {number}]]")
                await trio.testing.wait_all_tasks_blocked(0.001)
            with trio.fail_after(0.1):
                assert await session.interrupt()
            assert (await session.statistics()).turns == 1
        assert answers == ["interrupted", "1", "2", "3"]
        assert texts(await session.history()) == ["[[say 1]]", "1", "[[say 2]]", "2", "[[say 3]]", "3"]


async def test_interrupt_while_the_session_loads(autojump_clock):
    """A turn that has not got as far as being sent is interrupted as well, and never sent."""
    store = FailingStore(faults={1: "hang"})
    async with open_world(store=store) as world:
        session = world.client.session("k")
        caught = []

        async def ask():
            with pytest.raises(gr.TurnInterruptedError) as info:
                await session.ask("q", turn_id="t")
            caught.append(info.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert (await session.statistics()).state == "loading"
            assert await session.interrupt()
        assert not caught[0].maybe_billed
        assert not world.sent
        assert (await session.ask("[[say yes]]", turn_id="t")).text == "yes"
        await next_turn_is_right(world, session)


@pytest.mark.parametrize("leave", ["interrupt", "cancel"])
async def test_interrupt_while_the_answer_is_stored(autojump_clock, leave):
    """What is answered is stored without being disturbed, and nobody who stops it has stopped anything."""
    store = FailingStore(faults={3: "slow"})
    async with open_world(store=store) as world:
        session = world.client.session("k")
        answers = []

        async def ask():
            with trio.move_on_after(0.5 if leave == "cancel" else 10):
                answers.append((await session.ask("[[say yes]]", turn_id="t")).text)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.4)
            if leave == "interrupt":
                assert not await session.interrupt()
                assert trio.current_time() == pytest.approx(1)
        assert store.operations == ["load", "append", "append"]
        assert answers == (["yes"] if leave == "interrupt" else [])
        assert (await session.ask("", turn_id="t")).text == "yes"
        await next_turn_is_right(world, session)


@pytest.mark.parametrize("moment", ["hang", "hang_after"])
async def test_interrupt_while_the_turn_is_written_down(autojump_clock, moment):
    """Cut off before it was sent, whether the store had it or not: not billed, and free to be asked again."""
    store = FailingStore(faults={2: moment})
    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(gr.TurnInterruptedError) as info:
                    await session.ask("q", turn_id="t")
                assert not info.value.maybe_billed

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(1):
                assert await session.interrupt()
        assert not world.sent
        assert (await session.ask("[[say yes]]", turn_id="t")).text == "yes"
        await next_turn_is_right(world, session)


async def test_interrupting_a_stream_stores_what_had_arrived(autojump_clock):
    """The holder gets `TurnInterruptedError` with the partial answer; the history has it, marked."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        pieces = []

        async def read():
            with pytest.raises(gr.TurnInterruptedError) as caught:
                async with session.stream("[[tokens 100]]", turn_id="t") as stream:
                    async for text in stream.text:
                        pieces.append(text)  # noqa: PERF401 - what came before the error counts
            assert there(caught.value.partial).text == "".join(pieces)
            assert caught.value.maybe_billed

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(3)
            assert await session.interrupt()
            history = await session.history()
        assert pieces
        assert texts(history) == ["[[tokens 100]]", "".join(pieces)]
        assert there(history[1].call).interrupted
        stored = await session.ask("again", turn_id="t")
        assert (stored.text, stored.interrupted) == ("".join(pieces), True)
        await next_turn_is_right(world, session)


async def test_the_holder_may_catch_the_interrupt_in_the_body(autojump_clock):
    """The interrupt is an error of iterating, so the body can handle it; leaving is clean then."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery, session.stream("[[tokens 100]]") as stream:
            await anext(stream)
            nursery.start_soon(session.interrupt)
            with pytest.raises(gr.TurnInterruptedError):
                await stream.collect()
        await next_turn_is_right(world, session)


async def test_other_errors_of_an_interrupted_body_stay(autojump_clock):
    """Only what the stream raises is translated: the body's own errors are the body's."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        with pytest.raises(gr.NotFoundError):
            async with session.stream("[[tokens 100]]") as stream:
                await anext(stream)
                await session.interrupt()
                world.api.answer = errors(404)
                await world.client.chat("something else")
        world.api.answer = world.simulator.handler
        await next_turn_is_right(world, session)


async def test_interrupt_of_a_stream_that_has_ended(autojump_clock):
    """A stream whose answer is whole is stored whole, even if its holder lingers."""
    async with open_world() as world:
        session = world.client.session("k")
        async with session.stream("[[say all of it]]") as stream:
            reply = await stream.collect()
            await session.interrupt()
        assert not reply.interrupted
        history = await session.history()
        assert history[1].call == reply.call
        assert texts(history)[1] == "all of it"


async def cancelled(session, prompt, after_s):
    with trio.move_on_after(after_s) as scope:
        await session.ask(prompt)
    assert scope.cancelled_caught
    return trio.current_time()


async def test_cancelling_the_asker_of_a_running_turn(autojump_clock):
    """The turn is interrupted, and the asker leaves only when the history is repaired."""
    store = FailingStore()
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        await cancelled(session, "q", 0.5)
        assert store.operations == ["load", "append", "append"]
        assert (await session.statistics()).state == "idle"
        await next_turn_is_right(world, session)
        assert world.sent[-1].contents == ["[[say well]]"]


async def test_a_cancelled_asker_waits_for_repair_within_the_grace(autojump_clock):
    """A store that hangs holds a cancelled asker for the grace and no longer."""
    store = FailingStore(faults={3: "hang"})
    async with open_world(SLOW, store=store, sessions=gr.SessionConfig(shutdown_grace_s=3)) as world:
        session = world.client.session("k")
        left_at = await cancelled(session, "q", 0.5)
        assert left_at == pytest.approx(3.5, abs=0.6)
        await next_turn_is_right(world, session)


async def test_cancelling_who_reads_the_history_frees_the_session(autojump_clock):
    """An operation whose asker has gone does not hold the session, however long the store takes."""
    store = FailingStore(faults={1: "hang"})
    async with open_world(store=store) as world:
        session = world.client.session("k")
        with trio.move_on_after(1):
            await session.history()
        await next_turn_is_right(world, session)
        assert trio.current_time() < 2


async def test_cancelling_a_clear(autojump_clock):
    """A clear that was cancelled has happened or not; the session knows which."""
    moments: list[tuple[Moment, int]] = [("hang", 2), ("hang_after", 0)]
    for moment, left in moments:
        store = FailingStore()
        async with open_world(store=store) as world:
            session = world.client.session("k")
            await session.ask("q")
            store.fail_next(moment)
            with trio.move_on_after(1) as scope:
                await session.clear()
            assert scope.cancelled_caught
            assert len(await session.history()) == left
            await next_turn_is_right(world, session)
            assert len(world.sent[-1].messages) == left + 1


async def test_leaving_a_stream_early_stores_the_partial_answer(autojump_clock):
    """What had been read is in the history when the `async with` is left, marked as interrupted."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        pieces = []
        async with session.stream("[[tokens 100]]") as stream:
            async for text in stream.text:
                pieces.append(text)
                if len(pieces) == 5:
                    break
        history = await session.history()
        assert texts(history)[1].startswith("".join(pieces))
        assert there(history[1].call).interrupted
        assert check_history([*world.sent[-1].messages]) == []
        await next_turn_is_right(world, session)


@gr.tool
async def step() -> str:
    return "done, and more, " * 10


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("prompt", ["[[tokens 40]]", "[[call step {}]] [[tokens 40]]"], ids=["plain", "tools"])
async def test_looking_at_a_stream_changes_nothing(autojump_clock, prompt, leaves):
    """What has been read so far is marked as interrupted, and neither the result nor what is stored is cut there."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        pieces = []
        async with session.stream(prompt, tools=[step]) as stream:
            async for event in stream:
                before = stream.so_far()
                if isinstance(event, gr.events.TextDelta):
                    pieces.append(event.text)
                    assert before.text.startswith("".join(pieces))
                    assert before.interrupted == (before.finish_reason is None)
                if leaves and len(pieces) == 3:
                    break
        stored = (await session.history())[-1]
        assert there(stored.call).interrupted == leaves
        assert there(stored.call).finish_reason == (None if leaves else "stop")
        assert str(stored.message.content).startswith("".join(pieces))
        if not leaves:
            assert len(pieces) > 3
            assert stored.message.content == stream.result.text == stream.so_far().text == "".join(pieces)
            assert not stream.so_far().interrupted
        await next_turn_is_right(world, session)


@pytest.mark.parametrize("kind", ["error", "cancel"])
async def test_leaving_a_stream_by_error_or_cancel(autojump_clock, kind):
    """The body's error or cancel leaves as it is, after the partial answer was stored."""
    store = FailingStore()
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        with trio.CancelScope() as scope, pytest.raises(ValueError) if kind == "error" else trio.CancelScope():
            async with session.stream("[[tokens 100]]") as stream:
                await anext(stream)
                if kind == "error":
                    raise ValueError
                scope.cancel()
                await trio.sleep_forever()
        assert store.operations == ["load", "append", "append"]
        history = await session.history()
        assert there(history[1].call).interrupted
        await next_turn_is_right(world, session)


async def test_a_stream_without_visible_text_is_left_out_later(autojump_clock):
    """Interrupted in the midst of reasoning or of a tool call, a turn leaves nothing that a provider would refuse."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    for delta in ({"reasoning": "hm"}, {"tool_calls": [call]}, {"content": "I will", "tool_calls": [call]}):
        async with open_world(answer=streams(chunk(delta), chunk({}, finish="tool_calls"), DONE)) as world:
            session = world.client.session("k")
            await session.interrupt()

            async def halfway(_request, reply, delta=delta):
                await reply.start(200, [("Content-Type", "text/event-stream")])
                await reply.write(chunk(delta))
                await trio.sleep(100)

            world.api.answer = halfway
            async with session.stream("q") as stream:
                await anext(stream)
            history = await session.history()
            assert there(history[1].call).interrupted
            assert not cast("gr.AssistantMessage", history[1].message).tool_calls
            world.api.answer = world.simulator.handler
            await next_turn_is_right(world, session)
            expected = ["q", "I will"] if "content" in delta else []
            assert world.sent[-1].contents == [*expected, "[[say well]]"]


@pytest.mark.parametrize("rest", ["error", "nothing"])
@pytest.mark.parametrize("looks", [False, True])
async def test_a_stream_that_breaks(autojump_clock, rest, looks):
    """An error in the stream is raised after its deltas, and what had arrived is stored as interrupted."""
    failure = [chunk({}, finish="error", error={"code": 502, "message": "gone"}), DONE] if rest == "error" else []
    async with open_world(answer=streams(chunk({"content": "Hel"}), *failure)) as world:
        session = world.client.session("k")
        seen = []
        with pytest.raises(gr.GorouterError, match=r"gone|the stream ended") as caught:
            async with session.stream("q") as stream:
                try:
                    async for event in stream:
                        seen.append(event)  # noqa: PERF401 - what came before the error counts
                finally:
                    assert not looks or stream.so_far().text == "Hel"
        assert seen == [gr.TextDelta("Hel")]
        assert there(caught.value.partial).text == "Hel"
        history = await session.history()
        assert texts(history) == ["q", "Hel"]
        assert there(history[1].call).interrupted
        world.api.answer = world.simulator.handler
        await next_turn_is_right(world, session)


async def test_a_stream_that_fails_to_open(autojump_clock):
    """An error before the first delta is raised on entering, and the turn is left out."""
    async with open_world(answer=errors(400)) as world:
        session = world.client.session("k")
        with pytest.raises(gr.BadRequestError):
            async with session.stream("q"):
                pytest.fail("the body was entered")
        world.api.answer = world.simulator.handler
        assert await session.history() == []
        await next_turn_is_right(world, session)


async def test_a_stream_read_to_its_end_is_durable_on_leaving(autojump_clock):
    """A clean return means that the answer is in the store, the very one that the stream gave."""
    store = FailingStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with session.stream("[[tokens 20]]") as stream:
            reply = await stream.collect()
            await trio.sleep(5)
        assert store.operations == ["load", "append", "append"]
        assert (await session.history())[1].call == reply.call
        assert reply.turn_id is not None
        assert not reply.interrupted


async def test_the_enclosing_deadline_of_entering_is_not_the_streams(autojump_clock):
    """A deadline that held while the stream was opened ends with its scope; reading goes on beyond it."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        manager = session.stream("[[tokens 100]]")
        with trio.fail_after(3):
            stream = await manager.__aenter__()
        reply = await stream.collect()
        await manager.__aexit__(None, None, None)
        assert trio.current_time() > 8
        assert there(reply.usage).completion_tokens == 100


@pytest.mark.parametrize("work", ["ask", "history", "clear", "fork"])
async def test_asking_the_session_in_its_own_stream(autojump_clock, work):
    """A task that holds the stream and asks the same session would wait for itself: it is told so."""
    async with open_world() as world:
        session = world.client.session("k")
        async with session.stream("q") as stream:
            await anext(stream)
            with pytest.raises(gr.SessionBusyError, match="holds a stream"):
                match work:
                    case "ask":
                        await session.ask("r")
                    case "history":
                        await session.history()
                    case "clear":
                        await session.clear()
                    case _:
                        await session.fork("k2")
            await stream.collect()
        await next_turn_is_right(world, session)


async def test_closing_a_session_from_its_own_stream(autojump_clock):
    """`aclose` and `interrupt` pass the queue, so they work there: the stream ends with what it has."""
    async with open_world(SLOW) as world:
        session = world.client.session("k")
        with pytest.raises(gr.TurnInterruptedError):
            async with session.stream("[[tokens 100]]") as stream:
                await anext(stream)
                await session.aclose()
                await stream.collect()
        assert len(await session.history()) == 2
        await next_turn_is_right(world, session)
