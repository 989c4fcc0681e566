"""`client.stream`: events, text and result, and every way of leaving."""

from __future__ import annotations

from contextlib import nullcontext

import msgspec
import pytest
import trio
import trio.testing
from call_forms import now
from worlds import DONE, EVENTS, JSON, chunk, open_quiet_client, open_world, streams, there

import gorouter_trio as gr
from gorouter_trio._turns.stream import ChunkSource
from gorouter_trio.simulator import Simulator, SimulatorConfig, serve_simulator
from gorouter_trio.transport.http_server import encode_headers
from gorouter_trio.wire.responses import ReplyFunction, ReplyToolCall
from gorouter_trio.wire.stream import ChatChunk, ChunkChoice, Delta

USAGE = chunk({}, usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "cost": 0.5})
HELLO = (chunk({"content": "Hel"}), chunk({"content": "lo"}), chunk({}, finish="stop"), USAGE, DONE)
SLOW = SimulatorConfig(latency_s=1, tokens_per_s=10, comment_interval_s=0.2)


async def test_events(autojump_clock):
    """Iterating gives the deltas in order, and the result is there at the end."""
    async with open_world(answer=streams(*HELLO)) as world, world.client.stream("hi", temperature=0) as stream:
        *deltas, finished = [event async for event in stream]
        assert deltas == [gr.TextDelta("Hel"), gr.TextDelta("lo")]
        assert finished == gr.StreamFinished(finish_reason="stop", usage=stream.result.usage)
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
        assert kinds == ["RawChunk", "TextDelta", "RawChunk", "TextDelta", "RawChunk", "RawChunk", "StreamFinished"]
        last = events[-2]
        assert isinstance(last, gr.RawChunk)
        assert there(last.chunk.usage).total_tokens == 3


CITED = {"type": "url_citation", "url_citation": {"url": "https://a.example/", "title": "A", "start_index": 0}}
LOGPROBS = {"content": [{"token": "yes", "logprob": -0.5, "bytes": [121], "top_logprobs": [{"token": "no"}]}]}


async def test_every_kind_of_delta(autojump_clock):
    """Each kind of delta arrives as an event of its own, and the answer has them all."""
    call = {"index": 1, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    more = {"index": 1, "function": {"arguments": ":1}"}}
    pieces = [
        chunk({"reasoning": "hm"}),
        chunk({"refusal": "no"}),
        chunk({"annotations": [CITED, {"type": "newer"}]}),
        chunk({"content": "yes"}, choice={"logprobs": LOGPROBS}),
        chunk({"images": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}),
        chunk({"audio": {"id": "a", "data": "aGk=", "transcript": "h"}}),
        chunk({"audio": {"data": "aG8=", "transcript": "o", "expires_at": 7}}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [more]}),
        chunk({}, finish="tool_calls", choice={"native_finish_reason": "tool_use"}),
        chunk({}, finish="tool_calls", usage={"total_tokens": 3}, service_tier="flex"),
        DONE,
    ]
    async with open_world(answer=streams(*pieces)) as world, world.client.stream("hi") as stream:
        events = [event async for event in stream]
        result = stream.result
    cited, newer = result.annotations
    (image,) = result.images
    assert events == [
        gr.ReasoningDelta("hm"),
        gr.RefusalDelta("no"),
        gr.AnnotationDelta(cited),
        gr.AnnotationDelta(newer),
        gr.TextDelta("yes"),
        gr.LogprobsDelta(there(result.logprobs)),
        gr.ImageDelta(image),
        gr.AudioDelta(gr.OutputAudio(id="a", data="aGk=", transcript="h")),
        gr.AudioDelta(gr.OutputAudio(data="aG8=", transcript="o", expires_at=7)),
        gr.ToolCallDelta(0, "c1", "f", '{"a"'),
        gr.ToolCallDelta(0, "", "", ":1}"),
        gr.StreamFinished(finish_reason="tool_calls", native_finish_reason="tool_use", usage=result.usage),
    ]
    assert there(cited.url_citation).url == "https://a.example/"
    assert (newer.type, newer.url_citation) == ("newer", None)
    assert (image.media_type, image.data) == ("image/png", b"hi")
    assert result.audio == gr.OutputAudio(id="a", data="aGlobw==", transcript="ho", expires_at=7)
    assert there(result.audio).content == b"hiho"
    (merged,) = result.message.tool_calls or []
    assert (merged.id, merged.function.name, merged.function.arguments) == ("c1", "f", '{"a":1}')
    assert (result.refusal, result.service_tier) == ("no", "flex")


async def test_calls_that_share_an_index(autojump_clock):
    """An engine that numbers all its calls 0 is understood: the events count the calls of the answer."""
    calls = [{"index": 0, "id": "c", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    pieces = [*(chunk({"tool_calls": [call]}) for call in calls), chunk({}, finish="tool_calls"), DONE]
    async with open_world(answer=streams(*pieces)) as world, world.client.stream("hi") as stream:
        events = [event async for event in stream if isinstance(event, gr.ToolCallDelta)]
        assert [(event.index, event.name) for event in events] == [(0, "f"), (1, "g")]
        assert [call.function.name for call in stream.result.message.tool_calls or ()] == ["f", "g"]


async def test_reasoning_that_comes_in_blocks_alone(autojump_clock):
    """Blocks of reasoning are told once: only where there is no text of the same beside them."""
    blocks = [
        {"type": "reasoning.text", "text": "one ", "index": 0},
        {"type": "reasoning.summary", "summary": "two", "index": 1},
        {"type": "reasoning.encrypted", "data": "x", "index": 2},
    ]
    alone = [*(chunk({"reasoning_details": [block]}) for block in blocks), chunk({}, finish="stop"), DONE]
    both = [chunk({"reasoning": "one ", "reasoning_details": [blocks[0]]}), chunk({}, finish="stop"), DONE]
    for pieces, told in ((alone, ["one ", "two"]), (both, ["one "])):
        async with open_world(answer=streams(*pieces)) as world, world.client.stream("hi") as stream:
            events = [event async for event in stream]
            assert [event.text for event in events if isinstance(event, gr.ReasoningDelta)] == told
            assert stream.result.reasoning == "".join(told)


async def test_reasoning_in_blocks_after_a_round_of_tools(autojump_clock):
    """Whether there is text beside the blocks is each answer's own: the one after the tools may be another model's."""
    call = {"index": 0, "id": "c1", "function": {"name": "now", "arguments": "{}"}}
    block = {"type": "reasoning.text", "text": "two", "index": 0}
    first = [chunk({"reasoning": "one"}), chunk({"tool_calls": [call]}), chunk({}, finish="tool_calls"), DONE]
    second = [chunk({"reasoning_details": [block]}), chunk({"content": "noon"}), chunk({}, finish="stop"), DONE]

    async def answer(_request, reply):
        await reply.start(200, EVENTS)
        for piece in first if len(world.sent) == 1 else second:
            await reply.write(piece)
        await reply.finish()

    async with open_world(answer=answer) as world, world.client.stream("When?", tools=[now]) as stream:
        told = [event.text async for event in stream if isinstance(event, gr.ReasoningDelta)]
        assert (told, stream.result.reasoning) == (["one", "two"], "two")


async def test_the_generation_is_known_before_its_first_byte(autojump_clock):
    """The id in the header is there at once, and it is the id of a body that has none."""
    start = trio.Event()

    async def slow(_request, reply):
        named = encode_headers([("Content-Type", "text/event-stream"), ("X-Generation-Id", "gen-7")])
        await reply.start(200, named)
        await reply.write(b'data: {"choices":[{"delta":{"reasoning":"hm"}}]}\n\n')
        await start.wait()
        await reply.write(b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n' + DONE)
        await reply.finish()

    async with open_world(answer=slow) as world, world.client.stream("hi") as stream:
        assert stream.generation_id == "gen-7"
        start.set()
        assert (await stream.collect()).generation_id == "gen-7"


async def test_callbacks(autojump_clock):
    """Handlers, plain and async, are called in the order of the stream, and the result is returned."""
    told = []

    async def on_content(text):
        await trio.sleep(1)
        told.append(("content", text))

    async with open_world(answer=streams(chunk({"reasoning": "hm"}), *HELLO)) as world:
        async with world.client.stream("hi") as stream:
            result = await stream.run(
                on_content=on_content,
                on_reasoning=lambda text: told.append(("reasoning", text)),
                on_chunk=lambda one: told.append(("chunk", len(one.choices or ()))),
                on_complete=lambda whole: told.append(("complete", whole.text)),
                on_error=lambda exc: told.append(("error", exc)),
            )
        assert result is stream.result
    assert told == [
        ("chunk", 1),
        ("reasoning", "hm"),
        ("chunk", 1),
        ("content", "Hel"),
        ("chunk", 1),
        ("content", "lo"),
        ("chunk", 1),
        ("chunk", 1),
        ("complete", "Hello"),
    ]


def refuse(_text: str) -> None:
    raise gr.ToolError("the handler's own")


@pytest.mark.parametrize(("handler", "kind"), [(lambda _text: 1 // 0, ZeroDivisionError), (refuse, gr.ToolError)])
async def test_callbacks_that_fail(handler, kind, autojump_clock):
    """An error of a handler is nobody else's, also where it is one of this package."""
    told: list[object] = []
    async with open_world(answer=streams(*HELLO)) as world, world.client.stream("hi") as stream:
        with pytest.raises(kind):
            await stream.run(on_content=handler, on_error=told.append, on_complete=told.append)
    assert told == []


async def test_callbacks_of_a_stream_that_fails(autojump_clock):
    """`on_error` has the error, which is raised."""
    failure = chunk({}, finish="error", error={"code": "server_error", "message": "gone"})
    told = []
    async with open_world(answer=streams(HELLO[0], failure, DONE)) as world:
        async with world.client.stream("hi") as stream:
            with pytest.raises(gr.ProviderError, match="gone") as caught:
                await stream.run(on_content=told.append, on_error=told.append, on_complete=told.append)
        assert told == ["Hel", caught.value]


class Rounds(ChunkSource):
    """Two answers with a tool between them, as a loop of tools gives them out."""

    generation_id = None

    def __init__(self, result):
        call = ReplyToolCall(0, "c", "function", ReplyFunction("f", "{}"))
        asked = ChatChunk(choices=[ChunkChoice(Delta(tool_calls=[call]))])
        self.started = gr.ToolStarted(call_id="c", name="f", arguments="{}")
        self.finished = gr.ToolFinished(call_id="c", name="f", status="success", result="1", duration_s=0.0)
        self.steps = [[asked], (self.started,), (self.finished,), [asked], []]
        self.answer = result

    async def read(self):
        await trio.lowlevel.checkpoint()
        return self.steps.pop(0)

    def result(self):
        return self.answer


async def test_tools_between_answers(autojump_clock):
    """What tools do is told between the answers, whose calls are counted each for itself."""
    async with open_world() as world:
        result = await world.client.chat("[[say done]]")
    rounds = Rounds(result)
    asked = gr.ToolCallDelta(0, "c", "f", "{}")
    events = [event async for event in gr.ChatStream(rounds)]
    assert events[:4] == [asked, rounds.started, rounds.finished, asked]
    told = []
    await gr.ChatStream(Rounds(result)).run(on_tool_executing=told.append, on_tool_result=told.append)
    assert told == [rounds.started, rounds.finished]


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


@pytest.mark.net
async def test_comments_put_nothing_off_on_a_socket():
    """A stream that sends only comments ends by its idle deadline on real sockets too, which are read straight."""
    simulator = Simulator(SimulatorConfig(comment_interval_s=0.05))
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(serve_simulator, simulator)
        deadlines = gr.Deadlines(data_idle_s=0.3)
        async with open_quiet_client(api_key="sk-test", base_url=base_url, deadlines=deadlines) as client:
            with pytest.raises(gr.DeadlineExceededError), trio.fail_after(5):
                async with client.stream("[[fault mid_stream_stall]] [[tokens 50]]") as stream:
                    await stream.collect()
        nursery.cancel_scope.cancel()
