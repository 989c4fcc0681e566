"""What an answer has besides its text: asked for, whole and streamed, and in every form a stream can fail in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
from worlds import open_world, there

import gorouter_trio as gr
from gorouter_trio.simulator import Scenario, Simulator, SimulatorConfig, Wire

ASKED: dict[str, Any] = {
    "logprobs": True,
    "top_logprobs": 3,
    "plugins": [gr.WebPlugin(max_results=2)],
    "modalities": ["text", "image"],
    "extra_headers": {"X-OpenRouter-Metadata": "enabled"},
}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}


async def test_whole_and_streamed_answers_have_the_same(autojump_clock):
    """Citations, images, log probabilities and routing are the same in both, and all are typed."""
    async with open_world() as world:
        whole = await world.client.chat("Tides?", **ASKED)
        async with world.client.stream("Tides?", **ASKED) as stream:
            events = [event async for event in stream]
            streamed = stream.result
    assert streamed.message == whole.message
    assert streamed.annotations == whole.annotations
    first, second = whole.annotations
    assert there(first.url_citation).end_index == there(second.url_citation).start_index
    (image,) = whole.images
    assert (image.media_type, there(image.data)[:4]) == ("image/png", b"\x89PNG")
    tokens = there(there(whole.logprobs).content)
    assert "".join(token.token for token in tokens) == whole.text
    assert all(len(there(token.top_logprobs)) == 3 for token in tokens)
    assert streamed.logprobs == gr.Logprobs(tokens)
    metadata = there(whole.call.openrouter_metadata)
    assert (metadata.strategy, there(metadata.endpoints).total) == ("direct", 1)
    assert streamed.call.openrouter_metadata == metadata
    assert there(there(whole.usage).server_tool_use_details).web_search_requests == 1
    kinds = {type(event).__name__ for event in events}
    assert kinds == {"AnnotationDelta", "TextDelta", "LogprobsDelta", "ImageDelta", "StreamFinished"}
    assert isinstance(events[0], gr.AnnotationDelta)


async def test_speech(autojump_clock):
    """Speech comes in a stream alone, in pieces that join to sound and transcript."""
    async with open_world() as world:
        asked: dict[str, Any] = {
            "modalities": ["text", "audio"],
            "audio": gr.AudioOutput(voice="alloy", format="pcm16"),
        }
        with pytest.raises(gr.BadRequestError, match="stream: true"):
            await world.client.chat("[[say Low tide at noon]]", **asked)
        async with world.client.stream("[[say Low tide at noon]]", **asked) as stream:
            events = [event async for event in stream]
        audio = there(stream.result.audio)
    assert audio.transcript == "Low tide at noon"
    assert len(there(audio.content)) == 4 * 480
    assert there(audio.expires_at) > 1_800_000_000
    pieces = [event.audio for event in events if isinstance(event, gr.AudioDelta)]
    assert b"".join(there(piece.content) for piece in pieces if piece.data) == audio.content
    assert {piece.id for piece in pieces if piece.data} == {audio.id}


async def test_a_batch_has_an_id_of_its_own(autojump_clock):
    """Also one that equals an earlier one, when others were deleted in between."""
    desk = Simulator(SimulatorConfig(batch_s=100))._desk

    def submit(text):
        ordered = {"custom_id": "1", "body": {"messages": [{"role": "user", "content": text}]}}
        submission = {"endpoint": "/v1/chat/completions", "model": "openai/gpt-4o-mini", "requests": [ordered]}
        answer: Any = desk.submit(json.dumps(submission).encode(), "sk-1")
        return json.loads(answer)["id"]

    first = submit("X")
    await trio.sleep(101)
    second = submit("Y")
    desk.delete(first)
    assert submit("Y") != second
    assert len(json.loads(desk.list(limit=10, after=None))["data"]) == 2


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-sonnet-4.5", "deepseek/deepseek-v3.2"])
async def test_refusals(autojump_clock, model):
    """A refusal has a text of its own, and no other."""
    async with open_world() as world:
        whole = await world.client.chat("[[refuse I would rather not.]]", model=model)
        async with world.client.stream("[[refuse I would rather not.]]", model=model) as stream:
            told = [event.text async for event in stream if isinstance(event, gr.RefusalDelta)]
    assert "".join(told) == whole.refusal == stream.result.refusal == "I would rather not."
    assert (whole.text, whole.finish_reason, stream.result.finish_reason) == ("", "content_filter", "content_filter")


async def test_the_echo_is_byte_faithful(autojump_clock):
    """What came with an answer goes back as it came, from whole answers and from streamed ones."""
    asked: dict[str, Any] = {**ASKED, "reasoning": {"effort": "low"}, "model": "anthropic/claude-sonnet-4.5"}
    async with open_world() as world:
        replies = [await world.client.chat("Tides?", **asked)]
        async with world.client.stream("Tides?", **asked) as stream:
            replies.append(await stream.collect())
        for reply in replies:
            for name in ("annotations", "images", "reasoning_details"):
                raw = bytes(getattr(reply.message, name))
                await world.client.chat([gr.UserMessage("Tides?"), reply.message, gr.UserMessage("And?")])
                assert b'"%b":%b' % (name.encode(), raw) in world.sent[-1].raw


FAILURES = ["chunk", "no_choices", "with_usage", "no_error", "bare", "named"]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
async def test_every_form_of_failing_in_a_stream(autojump_clock, failure, done):
    """Whatever a failure looks like, what came before it was given out, and then it is a `ProviderError`."""
    scenario = Scenario(wire=Wire(failure=failure, done=done))
    async with open_world(SimulatorConfig(scenario=scenario)) as world:
        seen = []
        with pytest.raises(gr.ProviderError) as caught:
            async with world.client.stream("Tides, at length? [[fault mid_stream_error]]") as stream:
                async for text in stream.text:
                    seen.append(text)  # noqa: PERF401 - what was seen before the error counts
        assert "".join(seen) == there(caught.value.partial).text != ""
        assert len(world.sent) == 1
    code = {"named": "server_error"}.get(failure, 502)
    assert (caught.value.status, caught.value.code) == (200, code)
    says = "MALFORMED_FUNCTION_CALL" if failure == "no_error" else "Provider disconnected unexpectedly"
    assert says in caught.value.message
    assert there(caught.value.generation_id).startswith("gen-")


@pytest.mark.parametrize("tool_calls", ["in_turn", "whole"])
@pytest.mark.parametrize("call_index", ["own", "shared", "absent"])
@pytest.mark.parametrize("call_ids", ["once", "empty"])
async def test_calls_without_numbers_of_their_own(autojump_clock, call_index, tool_calls, call_ids):
    """Parallel calls are told apart when they share a number and an id, or have no number."""
    wire = Wire(call_index=call_index, tool_calls=tool_calls, call_ids=call_ids)
    prompt = '[[call tide {"port": "Aber"}]] [[call tide {"port": "Bude"}]]'
    async with open_world(SimulatorConfig(scenario=Scenario(wire=wire))) as world:
        async with world.client.stream(prompt, tools=[TOOL]) as stream:
            events = [event async for event in stream if isinstance(event, gr.ToolCallDelta)]
        calls = there(stream.result.message.tool_calls or None)
    assert [call.function.arguments for call in calls] == ['{"port": "Aber"}', '{"port": "Bude"}']
    assert len({call.id for call in calls}) == 2
    joined = ["", ""]
    for event in events:
        joined[event.index] += event.arguments
    assert joined == [call.function.arguments for call in calls]


async def test_schemas_that_are_not_strict(autojump_clock):
    """The strictest provider refuses them as it does; others do not look."""
    good = {
        "type": "object",
        "properties": {"port": {"$ref": "#/$defs/port"}, "tags": {"type": "array", "items": {"type": "string"}}},
        "required": ["port", "tags"],
        "additionalProperties": False,
        "$defs": {
            "port": {
                "type": "object",
                "properties": {"kind": {"enum": ["ebb", "flood"]}},
                "required": ["kind"],
                "additionalProperties": False,
            }
        },
    }
    optional = {**good, "required": ["port"]}
    inside = {**good, "$defs": {"port": {"type": "object", "properties": {}, "required": []}}}
    async with open_world() as world:
        for schema, says in (
            (optional, "Missing 'tags'"),
            (inside, "'additionalProperties' is required"),
            ({"type": "array"}, 'type: "object"'),
        ):
            form = gr.JsonSchemaFormat(gr.JsonSchema(name="tide", schema=schema, strict=True))
            with pytest.raises(gr.BadRequestError, match="Provider returned error") as caught:
                await world.client.chat("Tide?", response_format=form)
            assert says in str(caught.value.metadata["raw"]).replace('\\"', '"')
            assert (await world.client.chat("Tide?", response_format=form, model="deepseek/deepseek-v3.2")).text
        form = gr.JsonSchemaFormat(gr.JsonSchema(name="tide", schema=good, strict=True))
        assert '"kind":"' in (await world.client.chat("Tide?", response_format=form)).text
