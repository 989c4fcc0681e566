"""Scripted models answer what is written, in the form that the real ones have, and scripted tools do too."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock

import gorouter_trio as gr
from gorouter_trio.testing import (
    Break,
    Fail,
    Hang,
    Link,
    Say,
    ScriptedModel,
    ScriptedRequest,
    ScriptedTool,
    ScriptEndedError,
    World,
    open_world,
    run,
    use_tool,
)

ONCE = gr.RetryPolicy(max_retries=0)


async def test_replies_come_in_order() -> None:
    """Each request takes the next reply, whole or streamed, with usage and a generation id."""
    model = ScriptedModel(["one", "two", Say("three", finish_reason="length")])
    async with open_world() as world, world.open_client() as client:
        world.serve(model)
        whole = await client.chat("first")
        async with client.stream("second") as stream:
            streamed = await stream.collect()
        cut = await client.chat("third")
    assert [whole.text, streamed.text, cut.text] == ["one", "two", "three"]
    assert cut.finish_reason == "length"
    for reply in (whole, streamed):
        assert reply.finish_reason == "stop"
        assert reply.generation_id
        assert reply.usage is not None
        assert reply.usage.prompt_tokens
        assert reply.cost is not None
    assert [request.text for request in model.requests] == ["first", "second", "third"]
    assert [request.is_stream for request in model.requests] == [False, True, False]


@pytest.mark.parametrize("streamed", [False, True])
async def test_tool_calls_and_their_results(streamed: bool) -> None:
    """A model calls tools, several in one message too, and sees what they answered."""
    weather = ScriptedTool("weather", [{"celsius": 3}, {"celsius": 9}], description="The weather of a city")

    def conclude(request: ScriptedRequest) -> str:
        return f"{request.tools} {sorted(request.tool_results.values())} {len(request.messages)}"

    model = ScriptedModel([[use_tool("weather", city="Paris"), use_tool("weather", city="Aber")], conclude])
    async with open_world() as world, world.open_client() as client:
        world.serve(model)
        prompt: list[gr.Message] = [gr.UserMessage("Compare.")]
        if streamed:
            async with client.stream(prompt, tools=[weather.definition]) as stream:
                reply = await stream.collect()
        else:
            reply = await client.chat(prompt, tools=[weather.definition])
        assert reply.finish_reason == "tool_calls"
        calls = list(reply.message.tool_calls or ())
        assert [call.function.arguments for call in calls] == ['{"city":"Paris"}', '{"city":"Aber"}']
        results = [
            gr.ToolMessage(tool_call_id=call.id, content=str(await weather(city=city)))
            for call, city in zip(calls, ("Paris", "Aber"), strict=True)
        ]
        final = await client.chat([*prompt, reply.message, *results], tools=[weather.definition])
    assert final.text == "['weather'] [\"{'celsius': 3}\", \"{'celsius': 9}\"] 4"
    assert weather.calls == [{"city": "Paris"}, {"city": "Aber"}]


async def test_arguments_can_be_broken_json() -> None:
    """A string is sent as it is, for a bot that has to bear what models make."""
    async with open_world() as world, world.open_client() as client:
        world.serve(ScriptedModel([[type(use_tool("x"))("weather", '{"city": "Par')]]))
        reply = await client.chat("Hi")
    calls = list(reply.message.tool_calls or ())
    assert calls[0].function.arguments == '{"city": "Par'


async def test_errors_have_their_status_and_wait(autojump_clock: MockClock) -> None:
    """A failure is the API's, with message, metadata and Retry-After; it is retried as a real one is."""
    model = ScriptedModel([Fail(429, "Slow down", retry_after_s=7), "fine", Fail(403, "No", metadata={"why": "x"})])
    async with open_world() as world, world.open_client() as client:
        world.serve(model)
        started_at = trio.current_time()
        reply = await client.chat("Hi")
        assert (reply.text, reply.call.attempts) == ("fine", 2)
        assert trio.current_time() - started_at >= 7
        with pytest.raises(gr.PermissionDeniedError, match="No") as caught:
            await client.chat("Hi")
        assert caught.value.metadata == {"why": "x"}


@pytest.mark.parametrize(("wait_s", "header"), [(2_592_000, "2592000"), (1e8, "100000000"), (0, "0"), (1.5, "1.500")])
async def test_a_long_wait_is_written_out(autojump_clock: MockClock, wait_s: float, header: str) -> None:
    """Whatever its size, a client can read the Retry-After."""
    async with open_world() as world, world.open_client(retry=ONCE) as client:
        world.serve(ScriptedModel([Fail(429, retry_after_s=wait_s)]))
        with pytest.raises(gr.RateLimitError) as caught:
            await client.chat("Hi")
    assert caught.value.retry_after_s == float(header)


@pytest.mark.parametrize("wait_s", [-1, float("inf"), float("nan")])
def test_a_wait_that_no_header_can_hold_is_refused(wait_s: float) -> None:
    """A mistake in a script is told where it is written."""
    with pytest.raises(gr.ConfigError, match="retry_after_s must be 0 or more"):
        Fail(429, retry_after_s=wait_s)


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-haiku-4.5"])
async def test_pieces_come_at_their_times(autojump_clock: MockClock, model: str) -> None:
    """The first piece comes after its time and the others at their distance; a whole reply takes as long."""
    async with open_world() as world, world.open_client(model=model) as client:
        world.serve(ScriptedModel([Say("one two three", after_s=2, every_s=1)], loop=True))
        async with client.stream("Hi") as stream:
            times = [round(world.now(), 6) async for _text in stream.text]
        assert times[0] == 2
        assert [b - a for a, b in itertools.pairwise(times)] == [1] * (len(times) - 1)
        started_at = world.now()
        await client.chat("Hi")
        assert world.now() - started_at == pytest.approx(times[-1])


async def test_reasoning_comes_before_the_text() -> None:
    """Both arrive, apart."""
    async with open_world() as world, world.open_client() as client:
        world.serve(ScriptedModel([Say("Yes.", reasoning="Let me think.")] * 2))
        reply = await client.chat("Hi")
        async with client.stream("Hi") as stream:
            streamed = await stream.collect()
    assert [(r.text, r.reasoning) for r in (reply, streamed)] == [("Yes.", "Let me think.")] * 2


async def test_a_break_cuts_the_connection() -> None:
    """A stream ends after so many pieces, a whole reply in its middle."""
    async with open_world() as world, world.open_client(retry=ONCE) as client:
        world.serve(ScriptedModel([Break("one two three four", after_pieces=3)] * 2))
        with pytest.raises(gr.StreamBrokenError) as caught:
            async with client.stream("Hi") as stream:
                await stream.collect()
        assert caught.value.partial is not None
        assert "one two three four".startswith(caught.value.partial.text)
        assert caught.value.partial.text != ""
        with pytest.raises(gr.StreamBrokenError):
            await client.chat("Hi")


@pytest.mark.parametrize("model", ["openai/gpt-4o-mini", "anthropic/claude-haiku-4.5"])
async def test_a_break_counts_pieces_of_text(model: str) -> None:
    """Whatever the form of the model's stream is, so many of them arrive."""
    async with open_world() as world, world.open_client(model=model, retry=ONCE) as client:
        world.serve(ScriptedModel([Break("one two three four", after_pieces=1)]))
        with pytest.raises(gr.StreamBrokenError) as caught:
            async with client.stream("Hi") as stream:
                await stream.collect()
        assert caught.value.partial is not None
        assert caught.value.partial.text == "one"


async def test_a_hanging_model_is_given_up(autojump_clock: MockClock) -> None:
    """Nothing comes, and the handler is gone when the client is."""
    async with open_world() as world, world.open_client(retry=ONCE) as client:
        world.serve(ScriptedModel([Hang(), "next"]))
        with pytest.raises(gr.DeadlineExceededError):
            await client.chat("Hi")
        assert (await client.chat("Hi")).text == "next"
        await trio.sleep(1)
        assert world.network.statistics().open == 1


async def test_functions_make_replies() -> None:
    """Sync, async, and functions that give functions; one function alone answers every request."""

    async def later(request: ScriptedRequest) -> Say:
        await trio.lowlevel.checkpoint()
        return Say(f"{request.number}: {request.model}")

    async with open_world() as world, world.open_client() as client:
        world.serve(ScriptedModel([later, lambda _request: later]))
        assert [(await client.chat("Hi")).text for _ in range(2)] == [
            "1: openai/gpt-4o-mini",
            "2: openai/gpt-4o-mini",
        ]
        world.serve(ScriptedModel(lambda request: request.text.upper()))
        assert [(await client.chat(text)).text for text in ("a", "b", "c")] == ["A", "B", "C"]


def test_a_script_that_ends_too_early_fails_the_run() -> None:
    """One request too many is an error of the test, not of the client."""

    async def chat(world: World) -> None:
        world.serve(ScriptedModel(["only one"]))
        async with world.open_client(retry=ONCE) as client:
            await client.chat("Hi")
            await client.chat("Again")

    report = run(chat)
    assert isinstance(report.error, ScriptEndedError)
    assert "request 2 to the model ('Again'); its script has 1" in str(report.error)


@pytest.mark.parametrize("reply", [42, [], [use_tool("a"), "text"]])
def test_what_is_no_reply_fails_the_run(reply: object) -> None:
    """A script that holds something else is told so."""

    async def chat(world: World) -> None:
        world.serve(ScriptedModel([reply]))  # type: ignore[list-item]  # that is the point
        async with world.open_client(retry=ONCE) as client:
            await client.chat("Hi")

    assert isinstance(run(chat).error, TypeError)


def test_an_iterator_starts_again_too() -> None:
    """With `loop`, what an iterator has given once is given again; of nothing, nothing can be."""

    async def scenario(world: World, model: ScriptedModel) -> list[str]:
        world.serve(model)
        async with world.open_client() as client:
            return [(await client.chat("Hi")).text for _ in range(5)]

    model = ScriptedModel((text for text in ["a", "b"]), loop=True)
    assert run(partial(scenario, model=model)).value == ["a", "b", "a", "b", "a"]
    with pytest.raises(ScriptEndedError, match="its script has 0 replies"):
        _ = run(partial(scenario, model=ScriptedModel([], loop=True))).value


@pytest.mark.parametrize("replies", ["hello", Say("hello"), Hang()])
def test_a_lone_reply_is_no_script(replies: Any) -> None:
    """A string would be taken letter by letter, another one fail in the server."""
    with pytest.raises(TypeError, match="not one alone"):
        ScriptedModel(replies)


async def test_a_scripted_tool_raises_and_ends() -> None:
    """Exceptions among the results are raised, functions are called, and one call too many is an error."""
    tool = ScriptedTool("t", [1, ValueError("no"), lambda x: x + 1])
    assert await tool() == 1
    with pytest.raises(ValueError, match="no"):
        await tool()
    assert await tool(x=1) == 2
    with pytest.raises(ScriptEndedError, match="called 4 times"):
        await tool()
    assert ScriptedTool("t", []).definition["type"] == "function"


async def test_a_scripted_tool_raises_a_class() -> None:
    """A class of exceptions is one to raise, not a function of the arguments."""
    with pytest.raises(TimeoutError):
        await ScriptedTool("weather", [TimeoutError])(city="Paris")


@pytest.mark.parametrize("results", ["sunny", b"sunny", {"celsius": 3}])
def test_one_result_is_no_list_of_results(results: object) -> None:
    """Letters and keys are not what was meant to be given out one by one."""
    with pytest.raises(TypeError, match="results: a list of results, not one"):
        ScriptedTool("weather", results)  # type: ignore[arg-type]  # that is the point


async def test_scripts_take_the_networks_time(autojump_clock: MockClock) -> None:
    """A scripted reply crosses the same network."""
    async with open_world(link=Link(latency_s=1)) as world, world.open_client() as client:
        world.serve(ScriptedModel(["Hi"]))
        await client.chat("Hi")
        assert world.now() == pytest.approx(4)
