"""`client.chat`: what is sent for what is asked, and what comes back."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from scripted import Network, reply
from worlds import completion, errors, open_quiet_client, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig

PROMPTS = [
    ("hi", [{"role": "user", "content": "hi"}]),
    ("", [{"role": "user", "content": ""}]),
    (gr.UserMessage("hi"), [{"role": "user", "content": "hi"}]),
    ({"role": "user", "content": "hi", "name": "Ada"}, [{"role": "user", "content": "hi", "name": "Ada"}]),
    (
        [gr.SystemMessage("be brief"), {"role": "user", "content": "hi"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
    ),
    (gr.UserMessage([gr.TextPart("a")]), [{"role": "user", "content": [{"type": "text", "text": "a"}]}]),
    (
        [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "newer", "x": 1}], "field": None}],
        [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "newer", "x": 1}], "field": None}],
    ),
    (
        (gr.UserMessage("q"), gr.AssistantMessage("a"), gr.UserMessage("Größe 🌍")),
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "Größe 🌍"},
        ],
    ),
]


@pytest.mark.parametrize(("prompt", "messages"), PROMPTS)
async def test_prompt_forms(autojump_clock, prompt, messages):
    """A text, a message, a mapping, or a sequence of both is sent as the messages that it means."""
    async with open_world(answer=replies(completion())) as world:
        await world.client.chat(prompt)
        assert world.sent[0].messages == messages


@pytest.mark.parametrize("prompt", [[], (), 5, None, [5], {"role": "nobody", "content": "x"}, {}, ["hi"], "\ud800"])
async def test_what_is_no_prompt_is_refused_before_sending(autojump_clock, prompt):
    """What is no message is a `BadRequestError` at once, and the API never hears of it."""
    async with open_world(answer=replies(completion())) as world:
        with pytest.raises(gr.BadRequestError):
            await world.client.chat(prompt)
        assert not world.sent


async def test_options_are_sent_as_they_are(autojump_clock):
    """Zero is a value, None is null, and what is not named is not sent."""
    async with open_world(answer=replies(completion())) as world:
        await world.client.chat("hi", temperature=0, seed=0, top_p=None, stop=["a", "b"], frequency_penalty=0.0)
        body = world.sent[0].body
        assert body.pop("messages")
        assert body == {
            "model": "openai/gpt-4o-mini",
            "temperature": 0,
            "seed": 0,
            "top_p": None,
            "stop": ["a", "b"],
            "frequency_penalty": 0.0,
        }


async def test_default_options_and_extra_body(autojump_clock):
    """The client's model is the default, `extra_body` adds fields and wins, `routing_id` is sent as `session_id`."""
    async with open_world(model="a/b", answer=replies(completion())) as world:
        await world.client.chat("hi")
        await world.client.chat("hi", model="c/d", routing_id="r-1")
        await world.client.chat("hi", temperature=1.0, extra_body={"temperature": 2, "newer": {"x": None}})
        first, second, third = (sent.body for sent in world.sent)
        assert first["model"] == "a/b"
        assert "stream" not in first
        assert second["model"] == "c/d"
        assert second["session_id"] == "r-1"
        assert "routing_id" not in second
        assert third["temperature"] == 2
        assert third["newer"] == {"x": None}
        assert third["model"] == "a/b"


async def test_unknown_keyword_is_a_type_error(autojump_clock):
    """A misspelt option is the programmer's error, as it is for every function."""
    async with open_world(answer=replies(completion())) as world:
        misspelt: Any = {"temprature": 0}
        with pytest.raises(TypeError, match="temprature"):
            await world.client.chat("hi", **misspelt)
        with pytest.raises(TypeError, match="temprature"):
            world.client.session("k", **misspelt)
        with pytest.raises(TypeError, match="temprature"):
            async with world.client.stream("hi", **misspelt):
                pass
        assert not world.sent


async def test_headers(autojump_clock):
    """The key and the attribution go out in headers, and the key shows in no repr."""
    async with open_world(answer=replies(completion()), app_name="bot", referer="https://bot.test") as world:
        await world.client.chat("hi")
        headers = world.sent[0].headers
        assert headers["authorization"] == "Bearer sk-test"
        assert headers["x-title"] == "bot"
        assert headers["http-referer"] == "https://bot.test"
        assert headers["content-type"] == "application/json"
        assert "sk-test" not in repr(world.client)


async def test_result_fields(autojump_clock):
    """The result says everything that the reply said, and how long it took on the trio clock."""

    async def slowly(request, reply):
        await trio.sleep(2)
        await replies(completion("No.", refusal=None, reasoning="thinking"))(request, reply)

    seams = gr.Seams(wall=lambda: 1234.5)
    async with open_world(answer=slowly, seams=seams) as world:
        result = await world.client.chat("hi")
        assert result.text == result.message.content == "No."
        assert result.reasoning == "thinking"
        assert result.finish_reason == "stop"
        assert result.model == "test/model"
        assert result.generation_id == "gen-1"
        assert there(result.usage).total_tokens == 8
        assert result.cost == there(result.usage).cost == Decimal("0.25")
        assert result.duration_s == pytest.approx(2)
        assert result.call.ttft_s == pytest.approx(2)
        assert result.call.finished_at_s == 1234.5
        assert result.call.attempts == 1
        assert not result.interrupted
        assert result.turn_id is None


async def test_unknown_cost_is_none(autojump_clock):
    """A reply without usage costs an unknown amount, not nothing."""
    body = msgspec.json.encode({"choices": [{"message": {"role": "assistant", "content": "x"}}]})
    async with open_world(answer=replies(body)) as world:
        result = await world.client.chat("hi")
        assert result.cost is None
        assert result.usage is None


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, gr.BadRequestError),
        (401, gr.AuthenticationError),
        (402, gr.InsufficientCreditsError),
        (403, gr.PermissionDeniedError),
        (404, gr.NotFoundError),
        (422, gr.BadRequestError),
    ],
)
async def test_refusals_are_typed_and_final(autojump_clock, status, kind):
    """A refusal that no retry can help is raised at once, with its fields."""
    async with open_world(answer=errors(status, "because")) as world:
        with pytest.raises(kind) as caught:
            await world.client.chat("hi")
        assert caught.value.status == status
        assert caught.value.code == status
        assert caught.value.message == "because"
        assert caught.value.attempts == 1
        assert not caught.value.maybe_billed
        assert len(world.sent) == 1


async def test_error_inside_a_200(autojump_clock):
    """A 200 that carries an error is that error."""
    body = msgspec.json.encode({"error": {"code": 403, "message": "flagged"}})
    async with open_world(answer=replies(body)) as world:
        with pytest.raises(gr.PermissionDeniedError) as caught:
            await world.client.chat("hi")
        assert caught.value.status == 200
        assert caught.value.code == 403


async def test_retried_error_then_answer(autojump_clock):
    """What was refused for now is asked again, within the caller's own deadline."""
    async with open_world() as world:
        with trio.fail_after(60):
            result = await world.client.chat("[[fault 503 x2]] [[say fine]]")
        assert result.text == "fine"
        assert result.call.attempts == 3
        assert world.client.statistics().retries == 2


async def test_callers_deadline_ends_a_chat(autojump_clock):
    """`trio.fail_after` around a chat ends it on time, and the pool is as before."""
    async with open_world(SimulatorConfig(latency_s=100)) as world:
        with pytest.raises(trio.TooSlowError), trio.fail_after(3):
            await world.client.chat("hi")
        await trio.testing.wait_all_tasks_blocked()
        statistics = world.client.statistics()
        assert (statistics.in_flight, statistics.queued, statistics.abandoned) == (0, 0, 1)


async def test_service_endpoints(autojump_clock):
    """Models, key and credits are read out of their envelopes."""
    async with open_world(SimulatorConfig(credits_nanousd=2_500_000_000)) as world:
        models = await world.client.models()
        assert "openai/gpt-4o-mini" in {model.id for model in models}
        assert (await world.client.credits()).total_credits == Decimal("2.5")
        assert (await world.client.key()).usage == 0


async def test_a_history_with_parts_newer_than_this_package(autojump_clock):
    """A mapping with a part of a kind that nobody knew goes through a session, and its history can be read."""
    newer = {"type": "hologram", "hologram": {"url": "https://a.example/h"}}
    prompt = {"role": "user", "content": [{"type": "text", "text": "look"}, newer]}
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k")
        await session.ask(prompt)
        await session.ask("and?")
        assert world.sent[-1].messages[0] == prompt
        asked = (await session.history())[0].message
    assert asked == gr.UserMessage([gr.TextPart("look"), msgspec.Raw(msgspec.json.encode(newer))])


BODY = b'{"choices":[{"message":{"content":"x"},"text":"x","finish_reason":"stop"}]}'


async def _at_once(peer):
    while await peer.request() is not None:
        await peer.send(reply(BODY, headers=["Content-Type: application/json"]))


async def _padded(peer):
    """Says at once that it has begun, and pads what it says until it has come to something."""
    while await peer.request() is not None:
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            await trio.sleep(5)
            await peer.send(b"b\r\n\n         \n\r\n")
        await peer.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))


@pytest.mark.parametrize(("serve", "to_data_s"), [(_at_once, 0), (_padded, 20)], ids=["at once", "padded"])
@pytest.mark.parametrize("way", ["chat", "completion", "stream"])
async def test_times_apart(autojump_clock, way, serve, to_data_s):
    """To the first data is from the sending to what is no padding; a connection that is made is waited for before."""

    async def ask(client):
        if way == "chat":
            return (await client.chat("hi")).call
        if way == "completion":
            return (await client.completions("hi")).call
        async with client.stream("hi") as stream:
            return (await stream.collect()).call

    async with trio.open_nursery() as nursery:
        network = Network(nursery, serve, connect_s=3)
        fields = {"api_key": "sk-test", "base_url": "http://localhost/v1"}
        async with open_quiet_client(transport=network, **fields) as client:
            for connect_s in (3, 0):
                call = await ask(client)
                assert (call.queue_wait_s, call.ttft_s) == (connect_s, to_data_s)
                assert call.duration_s == connect_s + to_data_s
                await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_chat_after_the_client_is_closed(autojump_clock):
    """A client that is kept beyond its `async with` says so."""
    async with open_world() as world:
        client = world.client
        async with world.another_client() as other:
            await other.chat("hi")
        with pytest.raises(gr.PoolClosedError):
            await other.chat("hi")
        with pytest.raises(gr.PoolClosedError):
            async with other.stream("hi"):
                pass
        with pytest.raises(gr.ActorGoneError, match="closed"):
            await other.session("k").ask("hi")
        assert (await client.chat("still here")).text
