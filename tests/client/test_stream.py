"""`client.stream`: events, text and result, and every way of leaving."""

from __future__ import annotations

from contextlib import nullcontext

import msgspec
import pytest
import trio
import trio.testing
from worlds import DONE, EVENTS, JSON, chunk, open_world, streams, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig

USAGE = chunk({}, usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.5})
HELLO = (chunk({"content": "Hel"}), chunk({"content": "lo"}), chunk({}, finish="stop"), USAGE, DONE)
SLOW = SimulatorConfig(latency_s=1, tokens_per_s=10, comment_interval_s=0.2)


async def test_events(autojump_clock):
    """Iterating gives the deltas in order, and the result is there at the end."""
    async with open_world(answer=streams(*HELLO)) as world, world.client.stream("hi", temperature=0) as stream:
        assert [event async for event in stream] == [gr.TextDelta("Hel"), gr.TextDelta("lo")]
        assert stream.result.text == "Hello"
        assert stream.result.finish_reason == "stop"
        assert there(stream.result.usage).total_tokens == 3
        body = world.sent[0].body
        assert body["stream"] is True
        assert body["temperature"] == 0


async def test_text(autojump_clock):
    """`text` gives the pieces of text alone."""
    pieces = (chunk({"reasoning": "hm"}), *HELLO)
    async with open_world(answer=streams(*pieces)) as world, world.client.stream("hi") as stream:
        assert [text async for text in stream.text] == ["Hel", "lo"]
        assert stream.result.reasoning == "hm"


async def test_collect(autojump_clock):
    """`collect` reads to the end and gives what `chat` would."""
    async with open_world() as world:
        plain = await world.client.chat("Tell me about tides.", seed=4)
        async with world.client.stream("Tell me about tides.", seed=4) as stream:
            streamed = await stream.collect()
        assert streamed.message == plain.message
        assert streamed.usage == plain.usage
        assert streamed.cost is not None


async def test_mixed_ways_take_up_where_the_last_one_stopped(autojump_clock):
    """Events, then text, then collect: nothing twice, nothing lost."""
    pieces = [chunk({"content": text}) for text in "abcdef"]
    answer = streams(*pieces, chunk({}, finish="stop"), DONE)
    async with open_world(answer=answer) as world, world.client.stream("hi") as stream:
        first = await anext(stream)
        second = await anext(stream.text)
        third = await anext(stream)
        assert (first, second, third) == (gr.TextDelta("a"), "b", gr.TextDelta("c"))
        result = await stream.collect()
        assert result.text == "abcdef"
        assert await stream.collect() is result


async def test_result_before_the_end(autojump_clock):
    """There is no result before the end, and none of a stream that was left early."""
    async with open_world(answer=streams(*HELLO)) as world:
        async with world.client.stream("hi") as stream:
            with pytest.raises(gr.StreamNotFinishedError):
                _ = stream.result
            await anext(stream)
            with pytest.raises(gr.StreamNotFinishedError):
                _ = stream.result
        with pytest.raises(gr.StreamNotFinishedError):
            _ = stream.result


async def test_ended_stream_stays_ended(autojump_clock):
    """Iterating once more gives nothing, and is a checkpoint as ever."""
    async with open_world(answer=streams(*HELLO)) as world, world.client.stream("hi") as stream:
        await stream.collect()
        with trio.testing.assert_checkpoints():
            assert [event async for event in stream] == []


async def test_raw_chunks(autojump_clock):
    """With raw chunks, each chunk comes before the events that are made from it, those without events too."""
    async with open_world(answer=streams(*HELLO)) as world:
        async with world.client.stream("hi", raw_chunks=True) as stream:
            events = [event async for event in stream]
        kinds = [type(event).__name__ for event in events]
        assert kinds == ["RawChunk", "TextDelta", "RawChunk", "TextDelta", "RawChunk", "RawChunk"]
        last = events[-1]
        assert isinstance(last, gr.RawChunk)
        assert there(last.chunk.usage).total_tokens == 3


async def test_every_kind_of_delta(autojump_clock):
    """Reasoning, refusals and pieces of tool calls arrive as events of their own."""
    call = {"index": 1, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    more = {"index": 1, "function": {"arguments": ":1}"}}
    pieces = [
        chunk({"reasoning": "hm"}),
        chunk({"refusal": "no"}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [more]}),
        chunk({}, finish="tool_calls"),
        DONE,
    ]
    async with open_world(answer=streams(*pieces)) as world, world.client.stream("hi") as stream:
        assert [event async for event in stream] == [
            gr.ReasoningDelta("hm"),
            gr.RefusalDelta("no"),
            gr.ToolCallDelta(1, "c1", "f", '{"a"'),
            gr.ToolCallDelta(1, "", "", ":1}"),
        ]
        (merged,) = stream.result.message.tool_calls or []
        assert (merged.id, merged.function.name, merged.function.arguments) == ("c1", "f", '{"a":1}')


async def test_deltas_come_as_they_arrive(autojump_clock):
    """A stream is a stream: the first text is there long before the last."""
    async with open_world(SLOW) as world, world.client.stream("[[tokens 50]]") as stream:
        times = [trio.current_time() async for _text in stream.text]
        assert times[-1] - times[0] > 4
        assert len(set(times)) > 10


async def leave_by_break(stream):
    async for _event in stream:
        break


async def leave_by_error(stream):
    await anext(stream)
    raise ValueError("mine")


async def leave_by_cancel(stream):
    with trio.CancelScope() as scope:
        await anext(stream)
        scope.cancel()
        await anext(stream)
    assert scope.cancelled_caught


async def leave_by_deadline(stream):
    with trio.move_on_after(1.5) as scope:
        await stream.collect()
    assert scope.cancelled_caught


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_by_cancel, leave_by_deadline])
async def test_leaving_early_stops_the_server(autojump_clock, leave):
    """Leaving early closes the connection, which the server notices, and the pool is as before."""
    async with open_world(SLOW) as world:
        expected = pytest.raises(ValueError, match="mine") if leave is leave_by_error else nullcontext()
        with expected:
            async with world.client.stream("[[tokens 300]]") as stream:
                await leave(stream)
        await trio.sleep(3)
        statistics = world.client.statistics()
        assert (statistics.in_flight, statistics.queued, statistics.connections) == (0, 0, 0)
        assert world.simulator.statistics().cancelled == 1
        assert (await world.client.chat("[[say well]]")).text == "well"


async def test_stream_read_to_its_end_keeps_the_connection(autojump_clock):
    """When all has arrived, the connection is used again."""
    async with open_world() as world:
        for _ in range(3):
            async with world.client.stream("hi") as stream:
                await stream.collect()
            await trio.testing.wait_all_tasks_blocked()
        assert world.client.statistics().opened == 1


async def test_cut_stream_gives_its_deltas_first(autojump_clock):
    """A stream that is cut raises after what arrived, which is in `partial` too, and is never sent again."""

    async def cut(_request, reply):
        await reply.start(200, EVENTS)
        await reply.write(HELLO[0])
        await reply.write(HELLO[1])
        reply.abort()

    async with open_world(answer=cut) as world:
        seen = []
        with pytest.raises(gr.StreamBrokenError) as caught:
            async with world.client.stream("hi") as stream:
                async for text in stream.text:
                    seen.append(text)  # noqa: PERF401 - what was seen before the error counts
        assert seen == ["Hel", "lo"]
        partial = there(caught.value.partial)
        assert (partial.text, partial.interrupted, partial.finish_reason) == ("Hello", True, None)
        assert caught.value.maybe_billed
        assert len(world.sent) == 1


@pytest.mark.parametrize("together", [True, False])
async def test_error_in_a_stream_comes_after_its_deltas(autojump_clock, together):
    """An error event raises once everything before it was given out, also when both came in one read."""
    failure = chunk({}, finish="error", error={"code": 502, "message": "provider gone"})
    pieces = [HELLO[0], failure, DONE]
    async with open_world(answer=streams(b"".join(pieces)) if together else streams(*pieces)) as world:
        seen = []
        with pytest.raises(gr.ProviderError, match="provider gone") as caught:
            async with world.client.stream("hi") as stream:
                async for event in stream:
                    seen.append(event)  # noqa: PERF401 - as above
        assert seen == [gr.TextDelta("Hel")]
        assert caught.value.code == 502
        assert there(caught.value.partial).text == "Hel"
        assert len(world.sent) == 1


async def test_error_before_the_first_delta_is_raised_on_entering(autojump_clock):
    """What fails before there is anything to see fails in the `async with` itself, and may be retried before."""
    async with open_world() as world:
        with pytest.raises(gr.BadRequestError):
            async with world.client.stream("[[fault 400_provider]]"):
                pytest.fail("the body was entered")
        async with world.client.stream("[[fault 503 x1]] [[say yes]]") as stream:
            result = await stream.collect()
        assert result.text == "yes"
        assert result.call.attempts == 2


async def test_body_error_wins_over_nothing(autojump_clock):
    """A user's own error leaves the stream as it is, with the context that it had."""
    async with open_world(answer=streams(*HELLO)) as world:
        with pytest.raises(ValueError) as caught:
            async with world.client.stream("hi") as stream:
                try:
                    raise KeyError("first")
                except KeyError:
                    await anext(stream)
                    raise ValueError("second")  # noqa: B904 - the implicit context is what is tested
        assert isinstance(caught.value.__context__, KeyError)


async def test_slow_consumer_is_not_a_slow_stream(autojump_clock):
    """Deadlines run while a stream waits for data, not while its consumer thinks."""
    world_of_patience = open_world(answer=streams(*HELLO), deadlines=gr.Deadlines(data_idle_s=5))
    async with world_of_patience as world, world.client.stream("hi") as stream:
        await anext(stream)
        await trio.sleep(60)
        assert (await stream.collect()).text == "Hello"


async def test_reply_that_is_no_stream(autojump_clock):
    """A server that answers a streamed request with a whole reply is not believed."""

    async def whole(_request, reply):
        await reply.send(200, JSON, body=msgspec.json.encode({"choices": []}))

    async with open_world(answer=whole) as world:
        with pytest.raises(gr.GorouterError):
            async with world.client.stream("hi") as stream:
                await stream.collect()
