"""Tools in chats, streams and sessions: one loop, one report, whatever way the answers come."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from call_forms import REPLIES, STREAMS, add, now
from histories import check_history
from worlds import DONE, EVENTS, JSON, completion, open_world, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore

WAYS = ("chat", "stream", "ask", "session stream")
TWO_CALLS = "[[call f#a1]] [[call g#a2]]"


class Functions:
    """Two tools that note what they are called with."""

    def __init__(self, *, takes_s: float = 0.1) -> None:
        self.ran: list[str] = []
        self.takes_s = takes_s

    async def f(self, ctx: gr.ToolContext) -> str:
        """The one."""
        self.ran.append(ctx.call_id)
        await trio.sleep(self.takes_s)
        return "from f"

    async def g(self, ctx: gr.ToolContext) -> int:
        """The other."""
        self.ran.append(ctx.call_id)
        await trio.sleep(self.takes_s)
        return 7

    @property
    def tools(self) -> list[Any]:
        return [self.f, self.g]


async def take(client: Any, way: str, prompt: str, **options: Any) -> gr.ChatResult[Any]:
    """One turn in each of the ways there are."""
    result: gr.ChatResult[Any]
    if way == "chat":
        result = await client.chat(prompt, **options)
    elif way == "ask":
        result = await client.session("k").ask(prompt, **options)
    else:
        opened = client.stream if way == "stream" else client.session("k").stream
        async with opened(prompt, **options) as stream:
            result = await stream.collect()
    return result


def calls_of(result: gr.ChatResult[Any]) -> list[gr.ToolCall]:
    """The calls that the answer ends with."""
    calls = result.message.tool_calls
    assert isinstance(calls, list)
    return calls


def told(world: Any) -> dict[str, object]:
    """What the model was told of each call, in the last request."""
    return {m["tool_call_id"]: m["content"] for m in world.sent[-1].messages if m["role"] == "tool"}


@pytest.mark.parametrize("way", WAYS)
async def test_tools_run_until_there_is_an_answer(way, autojump_clock):
    """Calls run side by side, their results go back in order, and the report has a row each."""
    functions = Functions(takes_s=1)
    async with open_world() as world:
        began = trio.current_time()
        result = await take(world.client, way, TWO_CALLS, tools=functions.tools)
        assert 1 <= trio.current_time() - began < 2
        assert told(world) == {"a1": "from f", "a2": "7"}
        assert check_history(world.sent[-1].messages) == []
        offered = [tool["function"]["name"] for tool in world.sent[0].body["tools"]]
    assert offered == ["f", "g"]
    assert sorted(functions.ran) == ["a1", "a2"]
    assert [(row.call_id, row.name, row.status) for row in result.tool_calls] == [
        ("a1", "f", "success"),
        ("a2", "g", "success"),
    ]
    assert len(result.rounds) == 1
    assert result.rounds[0].finish_reason == "tool_calls"
    assert result.finish_reason == "stop"
    assert result.text


@pytest.mark.parametrize(
    ("way", "form"), [(way, form) for way in WAYS for form in (STREAMS if "stream" in way else REPLIES)]
)
async def test_every_form_of_calls(way, form, autojump_clock):
    """Calls in every form that the wire has them are run alike, streamed and not, and give the same report."""

    async def answer(_request, reply):
        is_first = len(world.sent) == 1
        if form in STREAMS:
            last = [{"id": "gen-2", "choices": [{"index": 0, "delta": {"content": "Done."}, "finish_reason": "stop"}]}]
            await reply.start(200, EVENTS)
            for chunk in STREAMS[form] if is_first else last:
                await reply.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
            await reply.write(DONE)
            await reply.finish()
            return
        message = {"role": "assistant", "content": None, "tool_calls": REPLIES[form]}
        body = {"id": "gen-1", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
        await reply.send(200, JSON, body=msgspec.json.encode(body) if is_first else completion("Done."))

    async with open_world(answer=answer) as world:
        result = await take(world.client, way, "go", tools=[add, now])
        assert told(world) == {"c1": "3", "c2": "noon"}
        assert check_history(world.sent[-1].messages) == []
    assert result.text == "Done."
    rows = [(row.call_id, row.name, row.status, row.arguments, row.text) for row in result.tool_calls]
    assert rows == [
        ("c1", "add", "success", {"a": 1, "b": 2}, "3"),
        ("c2", "now", "success", {}, "noon"),
    ]


@pytest.mark.parametrize("way", WAYS)
async def test_rounds_have_a_limit(way, autojump_clock):
    """At the limit the answer is the one with the calls; a session closes them, and its next turn is good."""
    functions = Functions()
    limits = gr.ToolLimits(max_rounds=2)
    async with open_world() as world:
        prompt = "[[call f#a1]] [[call2 f#b1]] [[call3 f#c1]]"
        result = await take(world.client, way, prompt, tools=functions.tools, tool_limits=limits)
        assert functions.ran == ["a1", "b1"]
        assert [call.id for call in calls_of(result)] == ["c1"]
        assert len(result.rounds) == 2
        if "s" in way and way != "stream":
            await world.client.session("k").ask("[[say well]]")
            assert check_history(world.sent[-1].messages) == []


@pytest.mark.parametrize("way", WAYS)
async def test_definitions_alone_are_the_callers_affair(way, autojump_clock):
    """Where only definitions are given, calls come back in the answer, and nothing is run."""
    definition = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    async with open_world() as world:
        result = await take(world.client, way, "[[call f#a1]]", tools=[definition])
        assert len(world.sent) == 1
    assert [call.id for call in calls_of(result)] == ["a1"]
    assert result.tool_calls == ()


@pytest.mark.parametrize("way", WAYS)
async def test_a_call_for_the_caller_among_others(way, autojump_clock):
    """Calls of which one is the caller's to run all come back: a round has its results together or not at all."""
    functions = Functions()
    definition = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
    async with open_world() as world:
        result = await take(world.client, way, TWO_CALLS, tools=[functions.f, definition])
        assert len(world.sent) == 1
    assert [call.id for call in calls_of(result)] == ["a1", "a2"]
    assert functions.ran == []


@pytest.mark.parametrize("way", WAYS)
async def test_a_tool_that_fails(way, autojump_clock):
    """The model is told little, the report has it all, and the turn goes on."""

    async def f() -> str:
        raise ValueError("the password is hunter2")

    async with open_world() as world:
        result = await take(world.client, way, "[[call f#a1]]", tools=[f])
        assert "hunter2" not in str(told(world))
    (row,) = result.tool_calls
    error = there(row.error)
    assert (row.status, error.type, error.message) == ("error_execution", "ValueError", "the password is hunter2")


@pytest.mark.parametrize("way", WAYS)
async def test_arguments_that_were_cut_off(way, autojump_clock):
    """A call that the limit of tokens has met is not what providers take back: they would refuse all that follows."""
    cut = '[[call f#a1 {"city": "Aberystwyth", "country": "Wales of the old times"}]]'

    async def f(city: str, country: str) -> str:
        return f"{city}, {country}"

    async with open_world() as world:
        result = await take(world.client, way, cut, tools=[f], max_completion_tokens=10)
        if way in {"ask", "session stream"}:
            await take(world.client, way, "And now?")
        assert gr.testing.check_history(world.sent[-1].messages) == []
        sent = next(message for message in world.sent[-1].messages if message.get("tool_calls"))
    assert sent["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert not result.tool_calls[0].has_run
    assert '{"city' in result.tool_calls[0].raw_arguments


@pytest.mark.parametrize("way", ["stream", "session stream"])
async def test_what_a_stream_tells_of_tools(way, autojump_clock):
    """One stream: the calls, what runs, then the text of the last answer and one finish."""
    functions = Functions()
    async with open_world() as world:
        client = world.client
        opened = client.stream if way == "stream" else client.session("k").stream
        async with opened(TWO_CALLS, tools=functions.tools) as stream:
            kinds = [type(event).__name__ async for event in stream]
            result = stream.result
    order = [kind for n, kind in enumerate(kinds) if n == 0 or kinds[n - 1] != kind]
    begun = order.index("ToolStarted")
    assert "ToolCallDelta" in order[:begun]
    assert kinds.count("ToolStarted") == kinds.count("ToolFinished") == 2
    assert order[begun:].index("ToolFinished") < order[begun:].index("TextDelta")
    assert kinds.count("StreamFinished") == 1
    assert kinds[-1] == "StreamFinished"
    assert len(result.tool_calls) == 2


@pytest.mark.parametrize("way", ["stream", "session stream"])
async def test_a_stream_that_is_left_while_tools_run(way, autojump_clock):
    """Its tools are cancelled; in a session the history is valid, and the next turn is taken at once."""
    functions = Functions(takes_s=1000)
    async with open_world() as world:
        client = world.client
        opened = client.stream if way == "stream" else client.session("k").stream
        async with opened(TWO_CALLS, tools=functions.tools) as stream:
            async for event in stream:
                if isinstance(event, gr.ToolStarted):
                    break
        assert trio.current_time() < 30
        result = await client.session("k").ask("[[say well]]")
        assert result.text == "well"
        assert check_history(world.sent[-1].messages) == []
        assert client.statistics().in_flight == 0


async def test_a_stream_that_is_left_after_its_turn_has_failed(autojump_clock):
    """Leaving it late is no matter of the next turn, which runs by then."""
    functions = Functions()
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        session = world.client.session("k", tools=functions.tools)
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                assert (await session.ask("[[say well]]")).text == "well"

            with pytest.raises(gr.StreamBrokenError):
                async with session.stream("[[fault stream_cut]] [[tokens 50]]") as stream:
                    try:
                        await stream.collect()
                    finally:
                        nursery.start_soon(ask)
                        with trio.CancelScope(shield=True):
                            await trio.sleep(0.5)


async def test_a_session_remembers_its_tools(autojump_clock):
    """Tools of a session hold for each of its turns, and the same tools are the same options."""
    functions = Functions()
    async with open_world() as world:
        tools = functions.tools
        session = world.client.session("k", tools=tools)
        assert (await session.ask("[[call f#a1]]")).tool_calls[0].status == "success"
        again = world.client.session("k", tools=tools)
        assert (await again.ask("[[call g#a2]]")).tool_calls[0].text == "7"
        with pytest.raises(gr.SessionConflictError):
            world.client.session("k", tools=[functions.f])
        without = await again.ask("[[call f#a3]]", tools=[])
        assert without.tool_calls == ()
    assert sorted(functions.ran) == ["a1", "a2"]


async def test_a_stored_answer_has_its_report(autojump_clock):
    """A turn asked again under its id gives the answer with the rows of its calls, also after a restart."""
    functions, store = Functions(), MemoryStore()
    async with open_world(store=store) as world:
        first = await world.client.session("k").ask(TWO_CALLS, tools=functions.tools, turn_id="t")
        async with world.another_client(store=store) as client:
            again = await client.session("k").ask(TWO_CALLS, tools=functions.tools, turn_id="t")
        assert len(world.sent) == 2
    assert sorted(functions.ran) == ["a1", "a2"]
    assert again.tool_calls == first.tool_calls
    assert len(again.rounds) == len(first.rounds)


@pytest.mark.parametrize("way", WAYS)
async def test_tools_and_a_form(way, autojump_clock):
    """Tools come first, and the last answer has the form that was asked for."""

    class Sum(msgspec.Struct):
        total: int

    async with open_world() as world:
        result = await take(world.client, way, "[[call add#c1]]", tools=[add], response_type=Sum)
    assert isinstance(result.value, Sum)
    assert [row.call_id for row in result.tool_calls] == ["c1"]


@pytest.mark.parametrize("way", WAYS)
async def test_wrong_tools_are_refused_before_anything_is_sent(way, autojump_clock):
    """What cannot be a tool is an error that says why."""

    def nameless(a: complex) -> str:
        return str(a)

    async with open_world() as world:
        with pytest.raises(gr.ConfigError):
            await take(world.client, way, "x", tools=[nameless, nameless])
        with pytest.raises(gr.BadRequestError, match="tool_limits"):
            await take(world.client, way, "x", tools=[add], tool_limits=5)
        with pytest.raises(gr.BadRequestError, match="approve"):
            await take(world.client, way, "x", tools=[add], approve=5)
        assert world.sent == []


# Approvals


@gr.tool(rules=gr.security.ToolRules(sensitive=True))
async def pay(amount: int) -> str:
    """Pays."""
    return f"paid {amount}"


CALL_PAY = '[[call pay#p1 {"amount": 5}]]'


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("approved", [True, False])
async def test_a_sensitive_tool_asks(way, approved, autojump_clock):
    """The callback is asked with the very arguments, and what it says is what happens."""
    asked: list[gr.ApprovalRequest] = []

    async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
        asked.append(request)
        return gr.ApprovalDecision(request=request, approved=approved, by="somebody")

    async with open_world() as world:
        result = await take(world.client, way, CALL_PAY, tools=[pay], approve=approve)
    assert [(request.tool, request.arguments) for request in asked] == [("pay", '{"amount":5}')]
    (row,) = result.tool_calls
    assert (row.status, row.has_run) == (("success", True) if approved else ("error_security", False))


@pytest.mark.parametrize("way", ["chat", "stream"])
async def test_without_anybody_to_ask(way, autojump_clock):
    """In a chat, which nobody finds again, a sensitive tool without a callback is refused."""
    async with open_world() as world:
        result = await take(world.client, way, CALL_PAY, tools=[pay])
    assert (result.tool_calls[0].status, result.tool_calls[0].has_run) == ("error_security", False)


@pytest.mark.parametrize("answer", [True, {"approved": True, "by": "me"}, False, {"approved": False}, "yes", None])
@pytest.mark.parametrize("way", ["ask", "session stream"])
async def test_a_session_waits_for_somebody(way, answer, autojump_clock):
    """The turn is parked with its question until somebody answers through the control plane."""
    is_approved = answer is True or answer == {"approved": True, "by": "me"}
    results = []
    async with open_world() as world:
        session = world.client.session("k")

        async def ask() -> None:
            results.append(await take(world.client, way, CALL_PAY, tools=[pay]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(100)
            statistics = await session.statistics()
            assert statistics.state == "parked"
            question_id = there(statistics.question_id)
            assert question_id.startswith("p1-")
            assert await session.answer(question_id, answer)
    (row,) = results[0].tool_calls
    assert row.has_run is is_approved


async def test_a_parked_turn_is_found_after_a_restart(autojump_clock):
    """The question outlives the client; the reply to it runs the tool, once, and the turn has its answer."""
    store = MemoryStore(wall=lambda: 1_800_000_000.0)
    async with open_world(store=store) as world:
        session = world.client.session("k", tools=[pay])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(session.ask, CALL_PAY, turn_id="t"))
            await trio.sleep(50)
            question_id = there((await session.statistics()).question_id)
            nursery.cancel_scope.cancel()
        async with world.another_client(store=store) as client:
            session = client.session("k", tools=[pay])
            assert await session.answer(question_id, True)
            result = await session.ask(CALL_PAY, turn_id="t")
            assert [row.text for row in result.tool_calls] == ["paid 5"]
            assert check_history(world.sent[-1].messages) == []
        async with world.another_client(store=store) as client:
            assert (await client.session("k").ask(CALL_PAY, turn_id="t")).text == result.text


async def test_a_late_reply_is_not_taken_for_one_to_another_call(autojump_clock):
    """Engines that number their calls anew in each answer ask about another call by the same id."""
    async with open_world(tools=gr.ToolLimits(approval_s=60)) as world:
        session = world.client.session("k", tools=[pay])
        asked, reports = [], []

        async def ask(amount: int) -> None:
            reply = await session.ask(f'[[call pay#call_0 {{"amount": {amount}}}]]')
            reports.extend(reply.tool_calls)

        for amount in (5, 5, 5000):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, amount)
                await trio.sleep(10)
                for late in asked:
                    assert not await session.answer(late, True)
                asked.append(there((await session.statistics()).question_id))
        assert len(set(asked)) == 3
        assert [report.has_run for report in reports] == [False] * 3


async def test_a_question_lapses(autojump_clock):
    """When nobody answers in time the call is not made, and the model is told."""
    async with open_world(tools=gr.ToolLimits(approval_s=60)) as world:
        began = trio.current_time()
        result = await world.client.session("k").ask(CALL_PAY, tools=[pay])
        assert trio.current_time() - began == pytest.approx(60, abs=2)
    assert (result.tool_calls[0].status, result.tool_calls[0].has_run) == ("error_security", False)
