"""The whole simulator over memory streams in virtual time: replies, timing, faults, limits, counts and charges."""

from __future__ import annotations

import json
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import h11
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from wire_client import WireClient, WireReply

from gorouter_trio.simulator import (
    RequestRecord,
    SimulatedNetwork,
    Simulator,
    SimulatorConfig,
    _tokens,
    open_simulated_network,
)
from gorouter_trio.simulator.catalog import MODELS
from gorouter_trio.simulator.faults import FAULTS, FaultKind
from gorouter_trio.simulator.requests import ChatRequest, parse_chat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEY = ("Authorization", "Bearer sk-or-v1-0123456789abcdef")
CHAT = "/api/v1/chat/completions"
WALL = 1_795_300_000.0
MINI, SONNET = "openai/gpt-4o-mini", "anthropic/claude-sonnet-4.5"
CATALOG = {model.id: model for model in MODELS}


class Caller:
    """Talks to one simulator, each request on a connection of its own."""

    def __init__(self, simulator: Simulator, network: SimulatedNetwork) -> None:
        self.simulator = simulator
        self.network = network

    async def connect(self) -> WireClient:
        """A new connection."""
        return WireClient(await self.network.connect("openrouter.simulated", 80))

    async def get(self, target: str, *, headers: tuple[tuple[str, str], ...] = (KEY,)) -> WireReply:
        """GET a path below /api/v1."""
        client = await self.connect()
        reply = await client.request("GET", f"/api/v1{target}", headers=headers)
        await client.stream.aclose()
        return reply

    async def post(self, fields: dict[str, Any], *, headers: tuple[tuple[str, str], ...] = (KEY,)) -> WireReply:
        """POST a chat request as it is."""
        client = await self.connect()
        try:
            return await client.post(CHAT, fields, headers=headers)
        finally:
            await client.stream.aclose()

    async def chat(self, prompt: str | list[dict[str, Any]], **fields: Any) -> WireReply:
        """A chat request with a prompt or messages."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return await self.post({"model": MINI, "messages": messages, **fields})

    async def text(self, prompt: str | list[dict[str, Any]], **fields: Any) -> str:
        """The text of a whole reply."""
        return text_of(await self.chat(prompt, **fields))


def text_of(reply: WireReply) -> str:
    """The text of a whole reply or of a stream."""
    assert reply.status == 200, reply.body
    if reply.header("content-type") == "text/event-stream":
        chunks = [json.loads(event) for event in reply.events()[:-1]]
        return "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks)
    text = reply.json()["choices"][0]["message"]["content"]
    assert isinstance(text, str)
    return text


@asynccontextmanager
async def simulated(**fields: Any) -> AsyncIterator[Caller]:
    """A simulator with these settings, at a fixed time; checks its books in the end."""
    simulator = Simulator(SimulatorConfig(**fields), wall=lambda: WALL)
    async with open_simulated_network(simulator) as network:
        yield Caller(simulator, network)
    counts = simulator.statistics()
    assert counts.in_flight == 0
    assert counts.received == counts.refused + counts.processed
    assert counts.processed == counts.completed + counts.cancelled + counts.failed
    assert counts.charged_nanousd == sum(charge.nanousd for charge in simulator.ledger.charges())


# Replies.


async def test_replies_are_json_with_the_headers_of_the_api() -> None:
    """Content type, generation id, CORS and the rest, chunked and without a length."""
    async with simulated() as caller:
        reply = await caller.chat("Tell me about tides.")
        assert reply.headers == [
            ("Content-Type", "application/json"),
            ("Access-Control-Allow-Origin", "*"),
            ("Access-Control-Expose-Headers", "X-Generation-Id,X-Provider-Name,request-id,cf-ray"),
            ("Referrer-Policy", "no-referrer, strict-origin-when-cross-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Generation-Id", reply.json()["id"]),
            ("Transfer-Encoding", "chunked"),
        ]
        assert reply.json()["id"].startswith("gen-1795300000-")
        assert len(reply.json()["id"]) == len("gen-1795300000-") + 20
        assert reply.json()["created"] == WALL
        stream = await caller.chat("Tell me about tides.", stream=True)
        assert stream.headers[:2] == [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache")]
        assert {json.loads(event)["id"] for event in stream.events()[:-1]} == {stream.header("X-Generation-Id")}


async def test_replies_can_have_a_length() -> None:
    """`chunked=False` frames whole replies by Content-Length, and streams by chunks all the same."""
    async with simulated(chunked=False) as caller:
        reply = await caller.chat("Tell me about tides.")
        assert reply.header("content-length") == str(len(reply.body))
        assert reply.header("transfer-encoding") is None
        assert (await caller.chat("Tell me about tides.", stream=True)).header("transfer-encoding") == "chunked"


async def test_the_reply_depends_on_the_request_and_the_seed_only() -> None:
    """Not on the order of arrival, streaming, or JSON key order; on every word and on the seed."""

    async def texts(seed: int, prompts: list[str]) -> dict[str, str]:
        async with simulated(seed=seed) as caller:
            return {prompt: await caller.text(prompt) for prompt in prompts}

    prompts = [f"Tell me about tide number {n} of the year." for n in range(6)]
    forward, backward = await texts(1, prompts), await texts(1, prompts[::-1])
    assert forward == backward
    assert len(set(forward.values())) == len(prompts)
    assert all(await_other != forward[prompt] for prompt, await_other in (await texts(2, prompts)).items())
    async with simulated(seed=1) as caller:
        shuffled = {"messages": [{"content": prompts[0], "role": "user"}], "stream": True, "model": MINI}
        assert text_of(await caller.post(shuffled)) == forward[prompts[0]]
        assert await caller.text(prompts[0], model=SONNET) != forward[prompts[0]]
        assert await caller.text(prompts[0], temperature=0.5) != forward[prompts[0]]


async def test_equal_requests_get_the_same_text_and_ids_of_their_own() -> None:
    """The text repeats; the generation does not, and neither does its id."""
    async with simulated() as caller:
        replies = [(await caller.chat("Tell me about tides.")).json() for _ in range(5)]
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) == 1
    assert len({reply["id"] for reply in replies}) == 5


async def test_limits_cut_and_stops_stop() -> None:
    """A token limit cuts the same answer off, with finish reason length; a stop sequence ends it before itself."""
    async with simulated() as caller:
        whole = await caller.text("Tell me about tides.")
        for field in ("max_tokens", "max_completion_tokens"):
            reply = (await caller.chat("Tell me about tides.", **{field: 7})).json()
            assert whole.startswith(reply["choices"][0]["message"]["content"])
            assert reply["choices"][0]["finish_reason"] == "length"
            assert reply["usage"]["completion_tokens"] == 7
        word = whole.split()[5]
        reply = (await caller.chat("Tell me about tides.", stop=["no such text", word])).json()
        assert reply["choices"][0]["message"]["content"] == whole[: whole.index(word)]
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert await caller.text("Tell me about tides.", stop=word) == whole[: whole.index(word)]


async def test_lengths_are_spread_around_the_median() -> None:
    """Prose has the configured median length, and is not all of one length."""
    async with simulated(reply_tokens=60) as caller:
        replies = [(await caller.chat(f"Describe tide {n} in some detail.")).json() for n in range(60)]
    lengths = sorted(reply["usage"]["completion_tokens"] for reply in replies)
    assert 40 < lengths[30] < 90
    assert lengths[0] < 40
    assert lengths[-1] > 90


async def test_conversations_make_sense() -> None:
    """What was said before is known, through the whole protocol."""
    async with simulated() as caller:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "My name is Ada."}]
        answer = await caller.text(messages)
        assert answer.startswith("Nice to meet you, Ada!")
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "What is my name?"}]
        assert await caller.text(messages) == "Your name is Ada."
        parts = [{"type": "text", "text": "What is 6 x 7?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
        assert await caller.text([{"role": "user", "content": parts}]) == "6 x 7 = 42\n#### 42"
        assert len((await caller.text("Reply in one short sentence.")).split(". ")) == 1
        assert await caller.text("My name is Ada. Reply in one short sentence.") == "Nice to meet you, Ada!"


async def test_usage_and_cost_follow_from_the_tokens() -> None:
    """Counts agree with the tokenizer, cost with the model's prices to the nano-dollar, the ledger with both."""
    async with simulated() as caller:
        reply = (await caller.chat("Tell me about tides.", model="perplexity/sonar")).json()
        usage, model = reply["usage"], CATALOG["perplexity/sonar"]
        assert usage["prompt_tokens"] == _tokens.count("Tell me about tides.") + 4
        assert usage["completion_tokens"] == _tokens.count(reply["choices"][0]["message"]["content"])
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        nanousd = 1_000 * usage["total_tokens"] + 5_000_000
        assert model.request_nanousd == 5_000_000
        assert usage["cost"] == nanousd / 10**9
        charge = caller.simulator.ledger.find(reply["id"])
        assert charge is not None
        assert charge.nanousd == nanousd == caller.simulator.statistics().charged_nanousd


async def test_free_models_cost_nothing() -> None:
    """A `:free` variant is counted and not charged."""
    async with simulated() as caller:
        reply = (await caller.chat("Tell me about tides.", model="qwen/qwen3-coder:free")).json()
        assert reply["usage"]["cost"] == 0
        assert caller.simulator.statistics().charged_nanousd == 0
        assert caller.simulator.statistics().completion_tokens == reply["usage"]["completion_tokens"] > 0


# Reasoning, tools, structured replies.


async def test_reasoning_is_shown_hidden_or_left_out() -> None:
    """By the model, by request, with its effort, and counted even when it is not shown."""
    async with simulated() as caller:

        async def ask(**fields: Any) -> tuple[dict[str, Any], int]:
            reply = (await caller.chat("Tell me about tides.", **fields)).json()
            message: dict[str, Any] = reply["choices"][0]["message"]
            return message, reply["usage"]["completion_tokens_details"]["reasoning_tokens"]

        message, tokens = await ask()
        assert (message["reasoning"], "reasoning_details" in message, tokens) == (None, False, 0)
        message, tokens = await ask(model="deepseek/deepseek-r1-0528")
        assert _tokens.count(message["reasoning"]) == tokens > 0
        assert message["reasoning_details"][0]["text"] == message["reasoning"]
        low = (await ask(model=SONNET, reasoning={"effort": "low"}))[1]
        assert 0 < low < (await ask(model=SONNET, reasoning={"effort": "high"}))[1]
        assert (await ask(model=SONNET, reasoning={"max_tokens": 5}))[1] <= 5
        for fields in ({"reasoning": {"exclude": True}}, {"include_reasoning": False, "reasoning_effort": "low"}):
            message, tokens = await ask(model=SONNET, **fields)
            assert message["reasoning"] is None
            assert tokens > 0
        for reasoning in ({"enabled": False}, {"effort": "none"}):
            assert (await ask(model="openai/o3", reasoning=reasoning))[1] == 0


async def test_reasoning_can_use_up_the_whole_limit() -> None:
    """A limit spent on thinking leaves a 200 with empty content and finish reason length."""
    async with simulated() as caller:
        choice = (await caller.chat("Tides?", model="openai/o3", max_tokens=6)).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
        stream = await caller.chat("Tides?", model="openai/o3", max_tokens=6, stream=True)
        assert text_of(stream) == ""


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["city", "days"],
        },
    },
}
TIDE = {"type": "function", "function": {"name": "tide"}}


async def test_tools_are_called_when_forced() -> None:
    """`required` and a named function make a call with fitting arguments; `auto` and `none` answer in text."""
    async with simulated() as caller:
        named = {"type": "function", "function": {"name": "weather"}}
        for choice in ("required", named):
            reply = (await caller.chat("Is it raining in Aberdeen?", tools=[WEATHER], tool_choice=choice)).json()
            message = reply["choices"][0]["message"]
            assert reply["choices"][0]["finish_reason"] == "tool_calls"
            assert message["content"] is None
            (call,) = message["tool_calls"]
            assert call["function"]["name"] == "weather"
            arguments = json.loads(call["function"]["arguments"])
            assert isinstance(arguments["city"], str)
            assert 1 <= arguments["days"] <= 7
        for not_forced in ("auto", "none", None):
            reply = (await caller.chat("Is it raining?", tools=[WEATHER, TIDE], tool_choice=not_forced)).json()
            assert "tool_calls" not in reply["choices"][0]["message"]


async def test_directives_call_tools_and_results_are_taken_up() -> None:
    """A directive makes parallel calls once; after the results the reply is text about them."""
    prompt = 'Look it up. [[call weather {"city": "Aber", "days": 2}]] [[call tide]] [[call unknown]]'
    async with simulated() as caller:
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        reply = (await caller.chat(messages, tools=[WEATHER, TIDE])).json()
        message = reply["choices"][0]["message"]
        assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather", "tide"]
        assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Aber", "days": 2}'
        assert message["tool_calls"][1]["function"]["arguments"] == "{}"
        assert len({c["id"] for c in message["tool_calls"]}) == 2
        messages.append(message)
        for call, result in zip(message["tool_calls"], ("14 degrees", "high at 04:12"), strict=True):
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        assert await caller.text(messages, tools=[WEATHER, TIDE]) == (
            "According to weather: 14 degrees\nAccording to tide: high at 04:12"
        )
        one = (await caller.chat(prompt, tools=[WEATHER, TIDE], parallel_tool_calls=False)).json()
        assert len(one["choices"][0]["message"]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("model", "prefix"),
    [(MINI, "call_"), (SONNET, "toolu_01"), ("google/gemini-2.5-pro", "tool_weather_")],
)
async def test_providers_write_calls_in_their_own_ways(model: str, prefix: str) -> None:
    """Ids differ in form, arguments in spacing; a directive fills a forced call in, broken arguments pass."""
    named = {"type": "function", "function": {"name": "weather"}}
    async with simulated() as caller:
        for arguments, written in (
            ('{"city": "Aber"}', '{"city": "Aber"}'),
            ('{"city":"Aber","days":2}', '{"city": "Aber", "days": 2}' if model == SONNET else None),
            ("{broken}", "{broken}"),
        ):
            prompt = f"[[call weather {arguments}]]"
            reply = (await caller.chat(prompt, model=model, tools=[WEATHER, TIDE], tool_choice=named)).json()
            (call,) = reply["choices"][0]["message"]["tool_calls"]
            assert call["id"].startswith(prefix)
            assert call["function"]["arguments"] == (written or arguments)


async def test_a_token_limit_cuts_tool_arguments() -> None:
    """A model that runs out in the middle of a call leaves broken JSON and finish reason length."""
    async with simulated() as caller:
        prompt = '[[call weather {"city": "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch", "days": 2}]]'
        choice = (await caller.chat(prompt, tools=[WEATHER], max_tokens=10)).json()["choices"][0]
        assert choice["finish_reason"] == "length"
        with pytest.raises(json.JSONDecodeError):
            json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_structured_replies_are_json_that_fits() -> None:
    """`json_object` gives an object, `json_schema` a value for the schema."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
        "required": ["name", "tags"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with simulated() as caller:
        assert isinstance(json.loads(await caller.text("Tell me", response_format={"type": "json_object"})), dict)
        made = json.loads(await caller.text("Tell me", response_format=form))
        assert set(made) == {"name", "tags"}
        assert set(made["tags"]) <= {"a", "b"}
        assert "{" not in await caller.text("Tell me", response_format={"type": "text"})


async def test_say_and_tokens_are_obeyed_and_can_be_turned_off() -> None:
    """The directives for the text itself, and the switch."""
    async with simulated() as caller:
        assert await caller.text("[[say exactly – this]]") == "exactly – this"
        reply = (await caller.chat("[[tokens 200]] about tides")).json()
        assert reply["usage"]["completion_tokens"] == 200
        assert reply["choices"][0]["finish_reason"] == "stop"
        assert len((await caller.chat("[[tokens 200]] about tides", stream=True)).events()) == 204
    async with simulated(directives=False) as caller:
        assert await caller.text("[[say exactly this]]") != "exactly this"


# Bad requests.


@pytest.mark.parametrize("path", ["chat/completions", "completions", "embeddings", "batches"])
async def test_what_is_nested_beyond_measure_is_refused(path: str) -> None:
    """It is no error of the server's."""
    deep = b"[" * 1_000_000 + b"]" * 1_000_000  # Python 3.14 follows hundreds of thousands of levels
    async with simulated() as caller:
        client = await caller.connect()
        body = b'{"messages":[{"role":"user","content":"a"}],"metadata":%b}' % deep
        reply = await client.request("POST", f"/api/v1/{path}", headers=(KEY,), body=body)
        await client.stream.aclose()
        assert reply.status == 400


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, 'Input required: specify "prompt" or "messages"'),
        ({"messages": []}, 400, "Input must have at least 1 token."),
        ({"model": "x/y", "messages": [{"role": "user", "content": "a"}]}, 400, "x/y is not a valid model ID"),
        ({"models": ["x/y", "x/z"], "messages": [{"role": "user", "content": "a"}]}, 400, "x/y is not a valid"),
        (
            {"models": [MINI] * 4, "messages": [{"role": "user", "content": "a"}]},
            400,
            "'models' array must have 3 items or fewer.",
        ),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "unknown role 'king'"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "$.messages[0].content"),
        ({"messages": [{"role": "user", "content": "a"}], "temperature": 3}, 400, "temperature"),
        ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "a"}], "stop": list("abcde")}, 400, "stop"),
        (
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 10**9},
            400,
            "top_logprobs",
        ),
        ({"messages": [{"role": "user", "content": "a"}], "tool_choice": "required"}, 400, "tool_choice"),
        (
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [TIDE],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            400,
            "'f'",
        ),
        ({"messages": [{"role": "user", "content": "tide " * 20_000}], "model": "microsoft/phi-4"}, 400, "16384"),
    ],
)
async def test_bad_requests_are_refused_as_documented(fields: dict[str, Any], status: int, message: str) -> None:
    """The API's words where they are known; refused, never processed, never charged."""
    async with simulated() as caller:
        reply = await caller.post(fields)
        assert reply.status == status == reply.json()["error"]["code"]
        assert message in reply.json()["error"]["message"]
        assert (
            reply.header(
                "x-generation-id",
            )
            is not None
        )
        counts = caller.simulator.statistics()
        assert (counts.refused, counts.processed, counts.charged_nanousd) == (1, 0, 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'"text"', b"null", b"{}" * 2])
async def test_bodies_that_are_no_request_are_refused(body: bytes) -> None:
    """Not JSON, or not an object: 400 and not a 500."""
    async with simulated() as caller:
        client = await caller.connect()
        reply = await client.request("POST", CHAT, headers=(KEY,), body=body)
        assert reply.status == 400
        assert reply.json()["error"]["message"]
        await client.stream.aclose()


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["messages", "role", "content", "model", "tools", "function", "name", "stop", "type"]),
                inner,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    """Whatever comes, parsing ends in a request or in an error reply."""
    parsed = parse_chat(body)
    if isinstance(parsed, ChatRequest):
        assert parsed.read(0, MINI).tokens > 0
    else:
        assert parsed.status == 400


async def test_keys_are_checked() -> None:
    """No header, a wrong scheme, a wrong key; the documented bodies, without a generation id."""
    async with simulated() as caller:
        reply = await caller.post({}, headers=())
        assert (reply.status, reply.body) == (401, b'{"error":{"message":"Missing Authentication header","code":401}}')
        assert reply.header("x-generation-id") is None
        assert (await caller.get("/credits", headers=())).status == 401
        for value in ("Basic abc", "Bearer", "Bearer nonsense", "sk-or-v1-1"):
            reply = await caller.post({}, headers=(("Authorization", value),))
            assert (reply.status, reply.body) == (401, b'{"error":{"message":"User not found.","code":401}}')
        assert caller.simulator.statistics().received == 0
    async with simulated(api_keys=("sk-good",)) as caller:
        assert (await caller.get("/key", headers=(("Authorization", "bearer sk-good"),))).status == 200
        assert (await caller.get("/key")).status == 401


async def test_unknown_paths_are_404() -> None:
    """Wrong path, wrong method, wrong prefix."""
    async with simulated() as caller:
        client = await caller.connect()
        for method, path in (("GET", CHAT), ("POST", "/api/v1/models"), ("GET", "/"), ("GET", "/api/v1/model/x/y")):
            reply = await client.request(method, path, headers=(KEY,))
            assert (reply.status, reply.body) == (404, b'{"error":{"message":"Not Found","code":404}}')
        await client.stream.aclose()


async def test_models_are_chosen_as_the_api_does() -> None:
    """The default without a model, fallbacks in order, variants of a known model, and the router."""
    async with simulated(default_model=SONNET) as caller:

        async def served(**fields: Any) -> str:
            reply = await caller.post({"messages": [{"role": "user", "content": "a"}], **fields})
            name = reply.json()["model"]
            assert isinstance(name, str)
            return name

        assert await served() == CATALOG[SONNET].served_as
        assert await served(model="openrouter/auto") == CATALOG[SONNET].served_as
        assert await served(model="x/y", models=["x/z", MINI]) == CATALOG[MINI].served_as
        assert await served(models=[MINI]) == CATALOG[MINI].served_as
        assert await served(model=f"{MINI}:nitro") == CATALOG[MINI].served_as
        assert await served(model="qwen/qwen3-coder:free") == CATALOG["qwen/qwen3-coder:free"].served_as


# Time.


async def test_whole_replies_take_their_time(autojump_clock: trio.testing.MockClock) -> None:
    """Latency, then the first token, then the tokens at their speed."""
    async with simulated(latency_s=0.5, first_token_s=0.25, tokens_per_s=50) as caller:
        reply = (await caller.chat("Tell me about tides.")).json()
        expected = 0.75 + reply["usage"]["completion_tokens"] / 50
        assert trio.current_time() == pytest.approx(expected)
        (record,) = caller.simulator.recent_requests()
        assert record.duration_s == pytest.approx(expected)


async def test_streams_flow_at_their_speed(autojump_clock: trio.testing.MockClock) -> None:
    """The head after the latency, then a token each interval: the client sees them when they are due."""
    async with simulated(latency_s=1, first_token_s=0.5, tokens_per_s=10, comment_interval_s=0) as caller:
        client = await caller.connect()
        body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "[[tokens 5]]"}]}).encode()
        await client.send("POST", CHAT, headers=(KEY,), body=body)
        times: list[float] = []
        while not isinstance(event := await client.next_event(), h11.EndOfMessage):
            if isinstance(event, (h11.Response, h11.Data)):
                times.append(round(trio.current_time(), 6))
        assert times == [1.0, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.0]
        await client.stream.aclose()


async def test_comments_come_while_there_is_nothing_else(autojump_clock: trio.testing.MockClock) -> None:
    """One with the head, then one an interval, before and between the data events."""
    async with simulated(first_token_s=2.2, tokens_per_s=1, comment_interval_s=0.5) as caller:
        reply = await caller.chat("[[tokens 2]]", stream=True)
    blocks = reply.body.decode().split("\n\n")
    kinds = "".join("c" if block.startswith(":") else "d" for block in blocks if block)
    # With the head, at 0.5, 1, 1.5 and 2; the role at 2.2; at 2.7; a token at 3.2; at 3.7; the rest at 4.2.
    assert kinds == "cccccdcdcdddd"


async def test_jitter_varies_the_times_within_its_bounds(autojump_clock: trio.testing.MockClock) -> None:
    """Each request draws its own latency, the same again in another run."""
    async with simulated(latency_s=1, jitter=0.5) as caller:
        durations = []
        for number in range(40):
            started = trio.current_time()
            await caller.chat(f"Tell me about tide {number}.")
            durations.append(round(trio.current_time() - started, 9))
    assert all(0.5 <= duration <= 1.5 for duration in durations)
    assert max(durations) - min(durations) > 0.5
    async with simulated(latency_s=1, jitter=0.5) as caller:
        started = trio.current_time()
        await caller.chat("Tell me about tide 7.")
        assert round(trio.current_time() - started, 9) == durations[7]


async def test_slow_whole_replies_are_padded(autojump_clock: trio.testing.MockClock) -> None:
    """The 200 is committed early, and the body starts with padding at the interval."""
    async with simulated(latency_s=1, first_token_s=7, padding_interval_s=2) as caller:
        reply = await caller.chat("Tell me about tides.")
        assert trio.current_time() == pytest.approx(8)
        assert reply.pieces[:3] == [b"\n         \n"] * 3
        assert reply.body.startswith(b'\n         \n\n         \n\n         \n{"id"')
        assert reply.json()["usage"]["prompt_tokens"] > 0
        failed = await caller.chat("[[fault error_in_200]]")
        assert failed.body.strip() == b'{"error":{"message":"The operation was aborted","code":504}}'
    async with simulated(latency_s=1, padding_interval_s=2) as caller:
        assert (await caller.chat("Tell me about tides.")).body.startswith(b"{")


async def test_bodies_can_be_cut_anywhere() -> None:
    """Small writes cut lines and characters, and the whole is the same."""
    prompt = f"[[say {'naïve – 🧭 tides ' * 20}]]"
    async with simulated() as caller:
        whole, stream = await caller.chat(prompt), await caller.chat(prompt, stream=True)
    async with simulated(max_write_bytes=5) as caller:
        cut, cut_stream = await caller.chat(prompt), await caller.chat(prompt, stream=True)
    assert cut.body == whole.body
    assert cut_stream.body.replace(b": OPENROUTER PROCESSING\n\n", b"") == stream.body.replace(
        b": OPENROUTER PROCESSING\n\n", b""
    )
    broken = 0
    for piece in cut.pieces:
        assert 1 <= len(piece) <= 5
        try:
            piece.decode()
        except UnicodeDecodeError:
            broken += 1
    assert broken > 0
    assert len({len(piece) for piece in cut.pieces}) > 1


async def test_many_requests_share_the_time(autojump_clock: trio.testing.MockClock) -> None:
    """Requests do not wait for each other: 300 take as long as one."""
    async with simulated(latency_s=0.3) as caller:
        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(caller.chat, f"Tell me about tide {number}.")
        assert trio.current_time() == pytest.approx(0.3)
        counts = caller.simulator.statistics()
        assert (counts.completed, counts.max_in_flight) == (300, 300)


# Faults.


@pytest.mark.parametrize("kind", [kind for kind, fault in FAULTS.items() if fault.reply is not None])
@pytest.mark.parametrize("stream", [False, True])
async def test_faults_with_a_status(kind: FaultKind, stream: bool) -> None:
    """Each answers with its status, before anything of a stream; refusals are never processed."""
    async with simulated() as caller:
        reply = await caller.chat(f"[[fault {kind}]]", stream=stream)
        assert reply.status == int(kind[:3])
        if not kind.endswith("html"):
            assert reply.json()["error"]["code"] == reply.status
        counts = caller.simulator.statistics()
        assert counts.faults == 1
        assert (counts.refused, counts.failed) == ((1, 0) if FAULTS[kind].is_refusal else (0, 1))
        assert (counts.charged_nanousd > 0) is FAULTS[kind].is_charged
        (record,) = caller.simulator.recent_requests()
        assert (record.fault, record.status) == (kind, reply.status)


async def test_faults_inside_a_200() -> None:
    """An error instead of the reply, nothing but padding, an error in the middle; charged as they should be."""
    async with simulated() as caller:
        reply = await caller.chat("[[fault error_in_200]]")
        assert (reply.status, reply.json()) == (200, {"error": {"message": "The operation was aborted", "code": 504}})
        assert caller.simulator.statistics().charged_nanousd == 0
        reply = await caller.chat("[[fault mid_stream_error]] tell me about tides")
        choice = reply.json()["choices"][0]
        assert (choice["finish_reason"], choice["error"]["code"]) == ("error", 502)
        assert choice["message"]["content"]
        assert caller.simulator.statistics().charged_nanousd == 0
        reply = await caller.chat("[[fault whitespace_200]]")
        assert (reply.status, reply.body.strip()) == (200, b"")
        assert len(reply.body) == 33
        assert caller.simulator.statistics().charged_nanousd > 0
        assert caller.simulator.statistics().failed == 3


async def test_faults_inside_a_stream() -> None:
    """An error as the only event, in the middle, comments only; the end mark after the errors."""
    async with simulated() as caller:
        reply = await caller.chat("[[fault error_in_200]]", stream=True)
        assert reply.events() == ['{"error":{"message":"The operation was aborted","code":504}}', "[DONE]"]
        reply = await caller.chat("[[fault mid_stream_error]] tell me about tides", stream=True)
        chunks = [json.loads(event) for event in reply.events()[:-1]]
        assert len(chunks) > 1
        assert all("error" not in chunk for chunk in chunks[:-1])
        assert chunks[-1]["error"]["metadata"] == {"error_type": "provider_unavailable"}
        assert chunks[-1]["choices"] == [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]
        assert caller.simulator.statistics().charged_nanousd == 0
        reply = await caller.chat("[[fault whitespace_200]]", stream=True)
        assert reply.events() == []
        assert reply.body.startswith(b": OPENROUTER PROCESSING\n\n")
        assert caller.simulator.statistics().charged_nanousd > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_cut_replies(stream: bool, autojump_clock: trio.testing.MockClock) -> None:
    """A cut in the middle or before anything is a protocol error for the client; what was generated is charged."""
    async with simulated(tokens_per_s=100) as caller:
        for kind in ("stream_cut", "connection_cut"):
            with pytest.raises(h11.RemoteProtocolError):
                await caller.chat(f"[[fault {kind}]] tell me about tides", stream=stream)
        cut, vanished = caller.simulator.ledger.charges()
        assert cut.nanousd > 0
        assert vanished.nanousd > 0
        if stream:
            assert 0 < cut.completion_tokens < vanished.completion_tokens + 200
            assert cut.finish_reason is None
        assert [record.outcome for record in caller.simulator.recent_requests()] == ["failed", "failed"]
        assert [record.status for record in caller.simulator.recent_requests()] == [200, 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_requests_end_with_their_client(stream: bool, autojump_clock: trio.testing.MockClock) -> None:
    """Nothing ever comes; when the client gives up, so does the simulator."""
    async with simulated() as caller:
        with trio.move_on_after(10_000) as scope:
            await caller.chat("[[fault hang]]", stream=stream)
        assert scope.cancelled_caught
        await trio.sleep(1)
        counts = caller.simulator.statistics()
        assert (counts.in_flight, counts.processed) == (0, 1)
        assert (counts.cancelled, counts.failed) == ((1, 0) if stream else (0, 1))
        assert (counts.charged_nanousd == 0) is stream


@pytest.mark.parametrize("kind", ["stall", "mid_stream_stall"])
@pytest.mark.parametrize("stream", [False, True])
async def test_stalled_replies_only_keep_alive(kind: str, stream: bool, autojump_clock: trio.testing.MockClock) -> None:
    """After the head, and after a part of a stream, nothing but keep-alives comes until the client gives up."""
    async with simulated(latency_s=1, comment_interval_s=2) as caller:
        client = await caller.connect()
        fields = {"stream": stream, "messages": [{"role": "user", "content": f"[[fault {kind}]] about tides"}]}
        await client.send("POST", CHAT, headers=(KEY,), body=json.dumps(fields).encode())
        pieces = []
        with trio.move_on_after(100) as scope:
            while True:
                event = await client.next_event()
                pieces += [bytes(event.data)] if isinstance(event, h11.Data) else []
        assert scope.cancelled_caught
        await client.stream.aclose()
        await trio.sleep(5)
        alive = b": OPENROUTER PROCESSING\n\n" if stream else b"\n         \n"
        assert pieces.count(alive) == 50
        data = [piece for piece in pieces if piece != alive]
        assert len(data) == (1 if stream and kind == "mid_stream_stall" else 0)
        (charge,) = caller.simulator.ledger.charges()
        assert charge.cancelled is stream
        assert (charge.completion_tokens > 0) is (kind == "mid_stream_stall" or not stream)


async def test_a_fault_may_pass_after_some_attempts() -> None:
    """`xN` lets the first N equal requests fail and answers the next; other requests do not count."""
    async with simulated() as caller:
        statuses = []
        for _ in range(4):
            statuses.append((await caller.chat("[[fault 503 x2]] tides")).status)
            await caller.chat("[[fault 503 x2]] other tides")
    assert statuses == [503, 503, 200, 200]


async def test_fault_rates_hold_and_depend_on_the_request_only() -> None:
    """Shares come out as set; each request meets the same fate in every run, and a new one when it is sent again."""

    async def fates(order: list[int]) -> dict[int, tuple[int, int]]:
        async with simulated(fault_rates={"502": 0.2, "429_upstream": 0.1}) as caller:
            found = {}
            for number in order:
                first = (await caller.chat(f"Tide {number}?")).status
                found[number] = (first, (await caller.chat(f"Tide {number}?")).status)
            return found

    forward, backward = await fates(list(range(300))), await fates(list(range(300))[::-1])
    assert forward == backward
    statuses = [status for pair in forward.values() for status in pair]
    assert statuses.count(502) / len(statuses) == pytest.approx(0.2, abs=0.06)
    assert statuses.count(429) / len(statuses) == pytest.approx(0.1, abs=0.05)
    assert any(first == 502 and second == 200 for first, second in forward.values())


async def test_retry_after_can_be_set() -> None:
    """So that tests in real time need not wait for two minutes."""
    async with simulated(retry_after_s=0) as caller:
        for kind in ("402_in_flight", "429_upstream", "429_admission", "503"):
            assert (await caller.chat(f"[[fault {kind}]]")).header("retry-after") == "0"


# Clients that leave.


async def _leave_stream(caller: Caller, *, after_s: float, model: str) -> None:
    """Begin a stream of 100 tokens at 10 a second and leave it."""
    with trio.move_on_after(after_s):
        await caller.chat("[[tokens 100]] about tides", model=model, stream=True)
    await trio.sleep(60)


async def test_a_left_stream_is_billed_for_its_tokens_so_far(autojump_clock: trio.testing.MockClock) -> None:
    """Where the provider stops, generation stops at once and the rest is not charged."""
    async with simulated(tokens_per_s=10) as caller:
        await _leave_stream(caller, after_s=4.05, model=MINI)
        (charge,) = caller.simulator.ledger.charges()
        assert (charge.cancelled, charge.completion_tokens, charge.finish_reason) == (True, 40, None)
        assert charge.nanousd == charge.prompt_tokens * 150 + 40 * 600
        assert charge.duration_s == pytest.approx(4.05)
        assert caller.simulator.statistics().cancelled == 1


async def test_a_stream_left_before_its_first_token_is_free(autojump_clock: trio.testing.MockClock) -> None:
    """Without completion tokens there is no charge, for the prompt either; the generation can still be looked up."""
    async with simulated(latency_s=1, first_token_s=5, tokens_per_s=10) as caller:
        for after_s in (0.5, 3):
            await _leave_stream(caller, after_s=after_s, model=MINI)
        assert [charge.nanousd for charge in caller.simulator.ledger.charges()] == [0, 0]
        assert caller.simulator.statistics().cancelled == 2


async def test_some_providers_bill_a_left_stream_whole(autojump_clock: trio.testing.MockClock) -> None:
    """By provider as documented, or by setting."""
    for fields, model, tokens in (
        ({}, "google/gemini-2.5-flash", 100),
        ({}, "mistralai/mistral-nemo", 40),
        ({"cancel_billing": "everything"}, MINI, 100),
        ({"cancel_billing": "generated"}, "google/gemini-2.5-flash", 40),
    ):
        async with simulated(tokens_per_s=10, **fields) as caller:
            await _leave_stream(caller, after_s=4.05, model=model)
            (charge,) = caller.simulator.ledger.charges()
            assert (charge.completion_tokens, charge.cancelled) == (tokens, True), model


async def test_a_left_whole_reply_is_billed_to_its_end(autojump_clock: trio.testing.MockClock) -> None:
    """A disconnect does not cancel what is not streamed: it is generated and charged."""
    async with simulated(tokens_per_s=10) as caller:
        with trio.move_on_after(1):
            await caller.chat("[[tokens 100]] about tides")
        await trio.sleep(60)
        (charge,) = caller.simulator.ledger.charges()
        assert (charge.cancelled, charge.completion_tokens, charge.duration_s) == (False, 100, pytest.approx(10))
        counts = caller.simulator.statistics()
        assert (counts.completed, counts.failed, counts.cancelled) == (1, 0, 0)


async def test_an_error_leaves_the_network_as_it_is() -> None:
    """With its cause, and a group of the body's own stays a group."""
    with pytest.raises(LookupError) as caught:
        async with open_simulated_network(Simulator()):
            raise LookupError("mine") from OSError("why")
    assert isinstance(caught.value.__cause__, OSError)
    group = ExceptionGroup("mine", [LookupError()])
    with pytest.raises(ExceptionGroup, match="mine") as grouped:
        async with open_simulated_network(Simulator()):
            raise group
    assert grouped.value is group


# Money.


async def test_spent_credits_are_refused_with_what_is_affordable() -> None:
    """A 402 names the tokens that the rest pays for, and that many are then granted; free models go on."""
    async with simulated(credits_nanousd=1_000_000) as caller:
        reply = await caller.chat("Tides?", max_tokens=5_000)
        error = reply.json()["error"]
        assert (reply.status, error["metadata"]["limit_source"]) == (402, "openrouter_credits")
        affordable = int(error["message"].split("can only afford ")[1].split(".")[0])
        assert affordable == (1_000_000 - 150 * (_tokens.count("Tides?") + 4)) // 600
        assert (await caller.chat("Tides?", max_tokens=affordable + 1)).status == 402
        assert (await caller.chat("Tides?", max_tokens=affordable)).status == 200
        assert (await caller.chat("Tides?", model="qwen/qwen3-coder:free")).status == 200


async def test_embeddings_beyond_the_credits_are_refused_for_good() -> None:
    """Nothing is in flight that one could wait for, so the 402 has no Retry-After."""
    async with simulated(credits_nanousd=20) as caller:
        body = {"model": "openai/text-embedding-3-small", "input": "The tides of the harbour"}
        client = await caller.connect()
        reply = await client.post("/api/v1/embeddings", body, headers=(KEY,))
        await client.stream.aclose()
        assert (reply.status, reply.header("retry-after")) == (402, None)
        assert reply.json()["error"]["metadata"]["limit_source"] == "openrouter_credits"


async def test_key_and_credits_tell_what_was_spent() -> None:
    """The account's and the key's sums, exactly; another key has spent nothing."""
    async with simulated(credits_nanousd=50_000_000_000) as caller:
        cost = (await caller.chat("Tides?")).json()["usage"]["cost"]
        assert (await caller.get("/credits")).json() == {"data": {"total_credits": 50, "total_usage": cost}}
        reply = await caller.get("/key")
        assert reply.header("cache-control") == "private, no-store"
        data = reply.json()["data"]
        assert (data["usage"], data["limit"], data["label"]) == (cost, None, "sk-or-v1-012...def")
        other = await caller.get("/auth/key", headers=(("Authorization", "Bearer sk-or-v1-other-key"),))
        assert other.json()["data"]["usage"] == 0


async def test_generations_are_found_after_their_lag(autojump_clock: trio.testing.MockClock) -> None:
    """404 until the lag is over, then the charge; never one for an unknown id."""
    async with simulated(generation_lag_s=3, latency_s=0.5) as caller:
        reply = (await caller.chat("Tides?", stream=True)).header("x-generation-id")
        missing = await caller.get(f"/generation?id={reply}")
        assert (missing.status, missing.json()["error"]["message"]) == (404, f"Generation {reply} not found")
        await trio.sleep(3)
        data = (await caller.get(f"/generation?id={reply}")).json()["data"]
        charge = caller.simulator.ledger.find(reply or "")
        assert charge is not None
        assert (data["id"], data["streamed"], data["cancelled"]) == (reply, True, False)
        assert data["total_cost"] * 10**9 == pytest.approx(charge.nanousd)
        assert data["latency"] == 500
        assert data["created_at"] == "2026-11-21T22:26:40.000+00:00"
        assert (await caller.get("/generation?id=gen-1-x")).status == 404
        assert (await caller.get("/generation")).status == 404
        assert (await caller.get("/generation?id=x", headers=())).status == 401


async def test_memory_is_bounded() -> None:
    """The ledger and the log keep what they are told to; the sums keep everything."""
    simulator = Simulator(SimulatorConfig(ledger_size=3, log_size=2), wall=lambda: WALL)
    async with open_simulated_network(simulator) as network:
        caller = Caller(simulator, network)
        ids = [(await caller.chat(f"Tide {n}?")).json()["id"] for n in range(6)]
    assert [charge.generation_id for charge in simulator.ledger.charges()] == ids[3:]
    assert [record.generation_id for record in simulator.recent_requests()] == ids[4:]
    assert simulator.ledger.find(ids[0]) is None
    assert repr(simulator.ledger).startswith("<Ledger 3 generations, ")
    assert simulator.statistics().charged_nanousd > sum(charge.nanousd for charge in simulator.ledger.charges())


async def test_each_request_is_told_to_the_hook() -> None:
    """Once, when it has ended, with its outcome and its charge."""
    told: list[RequestRecord] = []
    simulator = Simulator(wall=lambda: WALL, on_request=told.append)
    async with open_simulated_network(simulator) as network:
        caller = Caller(simulator, network)
        await caller.chat("Tides?", stream=True)
        await caller.post({})
        await caller.get("/models")
    assert [(record.outcome, record.status, record.streamed) for record in told] == [
        ("completed", 200, True),
        ("refused", 400, False),
    ]
    assert told[0].charged_nanousd == simulator.statistics().charged_nanousd > 0
    assert told == simulator.recent_requests()


# The catalog.


async def test_models_are_listed_in_pages() -> None:
    """All at once or page by page, without a key, with the count and the link to the next page."""
    async with simulated() as caller:
        reply = await caller.get("/models", headers=())
        assert reply.header("cache-control") == "public, max-age=120, stale-while-revalidate=3600, stale-if-error=3600"
        whole = reply.json()
        assert whole["total_count"] == len(whole["data"]) == len(MODELS) >= 60
        assert whole["links"] == {"next": None}
        paged, target = [], "/models?offset=0&limit=30"
        while target:
            page = (await caller.get(target)).json()
            paged += page["data"]
            target = (page["links"]["next"] or "").removeprefix("/api/v1")
        assert paged == whole["data"]
        assert (await caller.get("/models?offset=1000")).json()["data"] == []
        assert (await caller.get("/models/count")).json() == {"data": {"count": len(MODELS)}}
        assert (await caller.get(f"/model/{MINI}")).json() == {"data": whole["data"][0]}
        for query in ("limit=0", "limit=1001", "limit=x", "offset=-1"):
            bad = await caller.get(f"/models?{query}")
            assert (bad.status, bad.json()["success"]) == (400, False)


# The network.


async def test_an_error_of_the_body_leaves_the_network_as_itself() -> None:
    """No exception group around a lone error, with connections open."""
    with pytest.raises(KeyError, match="mine"):
        async with open_simulated_network(Simulator()) as network:
            await network.connect("h", 1)
            raise KeyError("mine")


async def test_leaving_the_network_closes_it(autojump_clock: trio.testing.MockClock) -> None:
    """Open connections end, new ones are refused, running requests are counted as failed and not charged."""
    simulator = Simulator(SimulatorConfig(latency_s=100))
    async with open_simulated_network(simulator) as network:
        client = WireClient(await network.connect("h", 80))
        await client.send("POST", CHAT, headers=(KEY,), body=b'{"messages":[{"role":"user","content":"a"}]}')
        await trio.sleep(1)
        assert simulator.statistics().in_flight == 1
        assert repr(simulator) == "<Simulator seed 0, 1 in flight>"
        assert repr(network) == "<SimulatedNetwork open, 1 connections made>"
    assert await client.stream.receive_some() == b""
    with pytest.raises(OSError, match="closed"):
        await network.connect("h", 80)
    counts = simulator.statistics()
    assert (counts.in_flight, counts.failed, counts.charged_nanousd) == (0, 1, 0)


async def test_cancelling_around_the_network_passes_through(autojump_clock: trio.testing.MockClock) -> None:
    """An outer deadline in the middle of requests leaves nothing behind but itself."""
    simulator = Simulator(SimulatorConfig(latency_s=100))
    with trio.move_on_after(5) as scope:
        async with open_simulated_network(simulator) as network, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(Caller(simulator, network).chat, "Tides?")
            await trio.sleep(math.inf)
    assert scope.cancelled_caught
    assert simulator.statistics().in_flight == 0


async def test_the_base_url_is_plain_http() -> None:
    """What a client is given as its base URL leads through `connect` without TLS."""
    async with open_simulated_network(Simulator()) as network:
        assert network.base_url == "http://openrouter.simulated/api/v1"
