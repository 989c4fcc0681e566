"""What users put around turns, and tools from elsewhere, are the same in chats, streams, asks and sessions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from call_forms import add
from histories import check_history
from worlds import completion, errors, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.transport.http_server import ServerReply, ServerRequest

WAYS = ("chat", "stream", "client.ask", "session.ask", "session.stream")
CALL = '[[call add#c1 {"a": 1, "b": 2}]]'


class Sum(msgspec.Struct):
    """What the model is asked for."""

    total: int


async def take(client: Any, way: str, prompt: str, **options: Any) -> gr.ChatResult[Any]:
    """One turn in one of the ways there are."""
    result: gr.ChatResult[Any]
    match way:
        case "chat":
            result = await client.chat(prompt, **options)
        case "client.ask":
            result = await client.ask(prompt, user="u", **options)
        case "session.ask":
            result = await client.session("k").ask(prompt, **options)
        case _:
            opened = client.stream if way == "stream" else client.session("k").stream
            async with opened(prompt, **options) as stream:
                result = await stream.collect()
    return result


@pytest.mark.parametrize("way", WAYS)
async def test_the_order_of_everything(way, autojump_clock):
    """Middleware is outside, hooks inside, events frame it; all of them once, however many rounds there are."""
    notes: list[str] = []
    contexts: list[gr.ChatContext] = []

    async def around(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        contexts.append(context)
        notes.append("in")
        await proceed()
        notes.append(f"out {there(state.result).text}")

    def note(text: str) -> Any:
        return lambda *_: notes.append(text)

    async with open_world() as world:
        client = world.client
        client.use(around)
        client.add_hook(gr.Hook(before=note("before"), after=note("after"), on_error=note("error")))
        with client.events(gr.ChatStarted, gr.ChatFinished) as feed:
            result = await take(client, way, f"[[say yes]] {CALL}", tools=[add])
            kinds = [type(await anext(feed)) for _ in range(2)]
    (context,) = contexts
    assert notes == ["in", "before", "after", f"out {result.text}"]
    assert kinds == [gr.ChatStarted, gr.ChatFinished]
    assert context.is_streamed is ("stream" in way)
    assert (context.session is None) is (way in {"chat", "stream"})
    assert context.turn_id == result.turn_id


@pytest.mark.parametrize("way", WAYS)
async def test_a_change_holds_for_every_round(way, autojump_clock):
    """What a middleware changes is what is sent, each time; a session keeps what its user said."""

    async def change(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        state.options["temperature"] = 0
        state.messages.insert(0, {"role": "system", "content": "Be brief."})
        await proceed()

    async with open_world() as world:
        world.client.use(change)
        await take(world.client, way, CALL, tools=[add])
        assert [sent.body["temperature"] for sent in world.sent] == [0, 0]
        assert [sent.contents[:2] for sent in world.sent] == [["Be brief.", CALL]] * 2
        assert all(check_history(sent.messages) == [] for sent in world.sent)
        if way.startswith("session"):
            history = await world.client.session("k").history()
            assert "Be brief." not in str(history)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}, "auto", "none"])
async def test_a_call_that_is_forced_is_forced_once(way, choice, autojump_clock):
    """A model that has to call a tool may answer after that: otherwise it would call until the last round."""
    async with open_world() as world:
        prompt = "What is one and two?" + (f" {CALL}" if choice == "auto" else "")
        result = await take(world.client, way, prompt, tools=[add], tool_choice=choice)
        choices = [sent.body["tool_choice"] for sent in world.sent]
    assert choices == ([choice] if choice == "none" else [choice, "auto"])
    assert result.text


@pytest.mark.parametrize("way", ["chat", "client.ask", "session.ask"])
async def test_a_call_that_is_forced_is_not_forced_when_asked_again(way, autojump_clock):
    """A model that has called its tool and answers in a wrong form is asked for the form, not made to call again."""
    answers = replies(completion(None, tool_calls=[("c1", "add")]), completion("3"), completion('{"total":3}'))
    async with open_world(answer=answers) as world:
        asked = {"tools": [add], "tool_choice": "required", "response_type": Sum}
        result = await take(world.client, way, "What is one and two?", **asked)
        choices = [sent.body["tool_choice"] for sent in world.sent]
    assert result.value == Sum(3)
    assert choices == ["required", "auto", "auto"]


class Veto(gr.GorouterError):
    """An error of the program's own."""


@pytest.mark.parametrize("way", WAYS)
async def test_a_hook_refuses(way, autojump_clock):
    """Nothing is sent, the error is the program's own, and a session goes on with its next turn."""

    def refuse(_context: gr.ChatContext, state: gr.ChatState) -> None:
        if "secret" in str(state.messages[-1]):
            raise Veto("not this")

    async with open_world() as world:
        world.client.add_hook(gr.Hook(before=refuse))
        with pytest.raises(Veto):
            await take(world.client, way, "the secret")
        assert world.sent == []
        assert (await take(world.client, way, "[[say fine]]")).text == "fine"
        assert world.sent[-1].contents == ["[[say fine]]"]


@pytest.mark.parametrize("way", WAYS)
async def test_what_fails_after_an_answer_takes_nothing_away(way, autojump_clock):
    """A hook that raises after the answer is an event; a session has the answer stored."""

    def fail(_context: gr.ChatContext, _state: gr.ChatState) -> None:
        raise ValueError("oops")

    async with open_world() as world:
        world.client.add_hook(gr.Hook(after=fail))
        with world.client.events(gr.HookFailed) as feed:
            assert (await take(world.client, way, "[[say yes]]")).text == "yes"
            assert isinstance((await anext(feed)).error, ValueError)


@pytest.mark.parametrize("way", WAYS)
async def test_a_form(way, autojump_clock):
    """An answer has the type that was asked for; one that has not is asked for again, except in a stream."""
    is_streamed = "stream" in way
    prompt = "Sum?" if is_streamed else "Sum? [[broken x1]]"
    async with open_world() as world:
        result = await take(world.client, way, prompt, response_type=Sum)
        assert isinstance(result.value, Sum)
        assert len(world.sent) == (1 if is_streamed else 2)
        assert len(result.rounds) == len(world.sent) - 1
        costs = [call.cost for call in (*result.rounds, result.call)]
        assert result.cost == sum(there(cost) for cost in costs)
        if way.startswith("session"):
            again = await take(world.client, way, "[[say well]]")
            assert again.text == "well"
            # The answer that had not the form is no part of the conversation.
            assert len(world.sent[-1].messages) == 3


@pytest.mark.parametrize("way", WAYS)
async def test_an_answer_that_never_has_the_form(way, autojump_clock):
    """The error has what was paid for; with `on_invalid="none"` the result says what is wrong."""
    async with open_world() as world:
        with pytest.raises(gr.InvalidOutputError) as error:
            await take(world.client, way, "Sum? [[broken]]", response_type=Sum)
        assert there(error.value.partial).cost
        lenient = gr.OutputPolicy(reasks=0, on_invalid="none")
        result = await take(world.client, way, "Sum? [[broken]]", response_type=Sum, output=lenient)
        assert result.value is None
        assert result.invalid


@pytest.mark.parametrize("way", WAYS)
async def test_fallbacks(way, autojump_clock):
    """A model that is not there gives way to the next one."""
    models = ["x-ai/grok-4", "openai/gpt-4o-mini"]

    async def answer(request: ServerRequest, reply: ServerReply) -> None:
        is_first = world.sent[-1].body["model"] == models[0]
        await (errors(404, "No endpoints found.") if is_first else world.simulator.handler)(request, reply)

    async with open_world(answer=answer) as world:
        result = await take(world.client, way, "[[say yes]]", model=models[0], fallbacks=models[1:])
        assert [sent.body["model"] for sent in world.sent] == models
    assert result.text == "yes"


@pytest.mark.parametrize("way", WAYS)
async def test_fallbacks_from_an_unknown_model(way, autojump_clock):
    """So does one that there is not, which the API answers as it does a wrong request."""
    models = ["no/such", "openai/gpt-4o"]
    async with open_world() as world:
        result = await take(world.client, way, "[[say yes]]", model=models[0], fallbacks=models[1:])
        assert [sent.body["model"] for sent in world.sent] == models
    assert result.text == "yes"
    assert there(result.model).startswith("openai/gpt-4o")


@pytest.mark.net
@pytest.mark.parametrize("way", ["stream", "session.ask", "session.stream"])
async def test_tools_of_a_server(way):
    """A server of tools over standard input gives them to a turn."""
    mcp = pytest.importorskip("gorouter_trio.tools.mcp")
    program = Path(__file__).parents[1] / "support" / "mcp_program.py"
    async with mcp.open_mcp([sys.executable, str(program)]) as server, open_world() as world:
        result = await take(world.client, way, CALL, tools=list(server.tools))
        assert [(row.name, row.status, row.text) for row in result.tool_calls] == [("add", "success", "3")]
        assert check_history(world.sent[-1].messages) == []
