"""Everything around a request: defaults of the client, headers, system messages, users, routing ids."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.client import session_key
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.codec import encode_call, encode_embeddings
from gorouter_trio.wire.mail import CallSettings


def yes():
    """An API that says yes."""
    return replies(completion("Yes."))


async def test_defaults_call_over_session_over_client(autojump_clock):
    """What a call says wins over its session, which wins over the client, field by field; zero is a value."""
    async with open_world(
        answer=yes(),
        model="a/b",
        models=["c/d"],
        provider=gr.ProviderPreferences(order=["x"]),
        options={"temperature": 1, "top_k": 5, "seed": 7},
    ) as world:
        session = world.client.session("k", temperature=0, top_k=6)
        await session.ask("q", top_k=0)
        await world.client.chat("q", model="e/f", models=[])
        body, plain = world.sent[0].body, world.sent[1].body
    assert {name: body[name] for name in ("model", "models", "temperature", "top_k", "seed", "provider")} == {
        "model": "a/b", "models": ["c/d"], "temperature": 0, "top_k": 0, "seed": 7, "provider": {"order": ["x"]},
    }  # fmt: skip
    assert (plain["model"], plain["models"], plain["temperature"]) == ("e/f", [], 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"models": ["a", "b", "c", "d"]}, "models"),
        ({"options": {"temperature": 3}}, "temperature"),
        ({"options": {"temprature": 1}}, "temprature"),
        ({"options": {"extra_headers": {"Host": "x"}}}, "Host"),
        ({"options": "temperature=1"}, "options"),
        ({"options": {"model": "a/b"}}, "options: model"),
        ({"models": None}, "models"),
        ({"models": "a/b"}, "models"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format"),
        ({"system": 5}, "system"),
    ],
)
def test_wrong_defaults_are_refused_when_they_are_made(fields, named):
    """A default that no request can have is a `ConfigError` that names it."""
    with pytest.raises(gr.ConfigError, match=named):
        gr.ClientConfig(**fields)


BAD = [
    {"temperature": 3},
    {"models": ["a", "b", "c", "d"]},
    {"tools": [{"type": "function", "function": {"name": "a b"}}]},
    {"reasoning": {"effort": "low", "max_tokens": 100}},
    {"lane": "fast lane"},
    {"tenant": 5},
    {"extra_headers": {"Authorization": "x"}},
    {"extra_body": {"messages": []}},
    {"extra_body": {"temperature": 3}},
    {"extra_body": "x"},
]


@pytest.mark.parametrize("options", BAD, ids=lambda options: next(iter(options)))
async def test_a_request_without_a_form_is_never_sent(autojump_clock, options):
    """Chat, stream, ask, session turns, session options and batches all refuse it before anything is sent."""
    async with open_world(answer=yes()) as world:
        client = world.client
        session = client.session("k")
        for call in (client.chat, client.ask, session.ask):
            with pytest.raises(gr.BadRequestError):
                await call("q", **options)
        with pytest.raises(gr.BadRequestError):
            async with client.stream("q", **options):
                pass
        with pytest.raises(gr.BadRequestError):
            client.session("other", **options)
        with pytest.raises(gr.BadRequestError):
            client.batch([], **options)
        assert not world.sent
        assert await session.history() == []


# What the API's description of a request for a chat names, but for its messages and what says whether it is streamed.
FIELDS = """
    model models route transforms max_completion_tokens max_tokens temperature top_p top_k min_p top_a frequency_penalty
    presence_penalty repetition_penalty seed stop logit_bias logprobs top_logprobs response_format structured_outputs
    tools tool_choice parallel_tool_calls reasoning reasoning_effort include_reasoning verbosity prediction modalities
    image_config audio service_tier session_id user metadata trace cache_control prompt_cache_key prompt_cache_options
    provider plugins stop_server_tools_when deferred_tools debug web_search_options x_search_filter
"""


def test_every_field_has_a_keyword():
    """Each is an option of a batch's request, and a keyword of a chat; the API's `session_id` is `routing_id` there."""
    options = set(gr.ChatOptions.__struct_fields__)
    assert options == set(FIELDS.split())
    settings = {"extra_body", "extra_headers", "lane", "tenant"}
    keywords = set(gr.ChatKeywords.__annotations__)
    assert keywords - settings == options - {"session_id"} | {"routing_id"}


async def test_a_filter_of_a_search(autojump_clock):
    """It is sent as it is given, in a chat as in a batch."""
    given = {"allowed_x_handles": ["gorouter"]}
    async with open_world(answer=yes()) as world:
        await world.client.chat("q", x_search_filter=given)
        row = {"messages": [{"role": "user", "content": "q"}], "x_search_filter": given}
        async with world.client.batch([row]) as results:
            assert [result.error async for result in results] == [None]
        assert [sent.body["x_search_filter"] for sent in world.sent] == [given, given]


async def test_a_bad_row_fails_alone(autojump_clock):
    """A request of a batch without a form is its own result's error; the others are sent."""
    good = {"messages": [{"role": "user", "content": "q"}]}
    async with open_world(answer=yes()) as world:
        async with world.client.batch([good, {**good, "temperature": 3}, good]) as results:
            found = {result.index: result.error async for result in results}
        assert [type(found[n]) for n in range(3)] == [type(None), gr.BadRequestError, type(None)]
        assert len(world.sent) == 2


async def test_options_of_two_levels_belong_together(autojump_clock):
    """What one option needs of another may stand on a level beneath it."""
    async with open_world(answer=yes(), options={"logprobs": True}) as world:
        await world.client.chat("q", top_logprobs=2)
        await world.client.session("k", top_logprobs=3).ask("q")
    async with open_world(answer=yes()) as other:
        await other.client.session("k", logprobs=True).ask("q", top_logprobs=2)
    bodies = [sent.body for sent in (*world.sent, *other.sent)]
    assert [(body["logprobs"], body["top_logprobs"]) for body in bodies] == [(True, 2), (True, 3), (True, 2)]


def test_extra_headers_have_no_case() -> None:
    """A header of a call takes the place of that of a level beneath, however their names are written."""
    _, beneath = encode_call({"extra_headers": {"X-One": "1", "X-Two": "2"}})
    _, settings = encode_call({"extra_headers": {"x-ONE": "3", "X-Three": "4"}}, beneath=beneath)
    assert settings.headers == (("x-ONE", "3"), ("X-Two", "2"), ("X-Three", "4"))
    _, settings = encode_call({"extra_headers": {"X-One": "5", "x-one": "6"}})
    assert settings.headers == (("x-one", "6"),)
    _, settings = encode_embeddings("q", "m", keywords={"extra_headers": {"x-two": "7"}}, beneath=beneath)
    assert settings.headers == (("X-One", "1"), ("x-two", "7"))


async def test_extra_headers(autojump_clock):
    """They are on the wire for that call alone, over those of the client, which may have some by default."""
    async with open_world(
        answer=yes(), app_name="App", options={"extra_headers": {"x-anthropic-beta": "a", "X-One": "1"}}
    ) as world:
        await world.client.chat("q", extra_headers={"X-One": "2", "X-Title": "Other"})
        await world.client.chat("q")
        await world.client.session("k").ask("q", extra_headers={"X-Two": "3"})
        first, second, third = ({name.lower(): value for name, value in sent.headers.items()} for sent in world.sent)
    assert (first["x-anthropic-beta"], first["x-one"], first["x-title"]) == ("a", "2", "Other")
    assert (second["x-one"], second["x-title"]) == ("1", "App")
    assert (third["x-one"], third["x-two"]) == ("1", "3")
    assert all(headers["authorization"] == "Bearer sk-test" for headers in (first, second, third))


async def test_the_default_system_message(autojump_clock):
    """It goes in front of conversations without one, is sent once each turn, and is stored nowhere."""
    store = MemoryStore()
    async with open_world(answer=yes(), system="Be brief.", store=store) as world:
        client = world.client
        await client.chat("q")
        await client.chat([gr.DeveloperMessage("mine"), gr.UserMessage('"system"')])
        await client.chat("q", system="Other.")
        await client.chat("q", system="")
        session = client.session("k")
        for _ in range(3):
            await session.ask("q")
        async with client.batch([{"messages": [{"role": "user", "content": "q"}]}]) as results:
            assert [result.error async for result in results] == [None]
        roles = [[message["role"] for message in sent.messages] for sent in world.sent]
        assert len(await session.history()) == 6
    assert roles[:4] == [["system", "user"], ["developer", "user"], ["system", "user"], ["user"]]
    assert world.sent[2].contents[0] == "Other."
    assert roles[4:7] == [["system", *["user", "assistant"] * turn, "user"] for turn in range(3)]
    assert roles[7] == ["system", "user"]
    assert not any(b"Be brief" in entry for entry in (await store.load("k")).entries)


async def test_a_system_message_that_is_none(autojump_clock):
    """What is no text, or has no UTF-8, is refused by name; an empty one is none, also as the default."""
    async with open_world(answer=yes(), system="") as world:
        client = world.client
        odd: Any
        for odd in ("\ud800", 5):
            with pytest.raises(gr.BadRequestError):
                await client.chat("q", system=odd)
            with pytest.raises(gr.BadRequestError):
                await client.session("k", system=odd).ask("q")
        await client.chat("q")
        assert [message["role"] for message in world.sent[0].messages] == ["user"]
        assert len(world.sent) == 1


async def test_ask_keeps_users_apart(autojump_clock):
    """Each user of each group has a session; without a user nothing is remembered."""
    async with open_world(answer=yes()) as world:
        client = world.client
        await client.ask("one", user="a/b")
        await client.ask("two", user="a_b")
        await client.ask("three", user="a/b", group="g")
        await client.ask("four", user="a/b")
        await client.ask("five")
        assert world.sent[3].contents == ["one", "Yes.", "four"]
        assert [len(world.sent[n].messages) for n in (1, 2, 4)] == [1, 1, 1]
        with pytest.raises(gr.ConfigError, match="group: needs a user"):
            await client.ask("q", group="g")
        with pytest.raises(gr.ConfigError, match="turn_id: needs a user"):
            await client.ask("q", turn_id="t")


async def test_a_chat_in_a_session(autojump_clock):
    """`session=` makes a chat or a stream a turn of that session."""
    async with open_world() as world:
        await world.client.chat("one", session="k")
        async with world.client.stream("two", session="k") as stream:
            await stream.collect()
        assert [entry.message.content for entry in (await world.client.session("k").history())[::2]] == ["one", "two"]


names = st.text(min_size=1, max_size=6, alphabet="ab:/%_2F3A5é")


@given(st.tuples(names, st.none() | names), st.tuples(names, st.none() | names))
def test_session_keys_are_injective(one, other):
    """Different users and groups never share a key."""
    keys = [session_key(user, group=group) for user, group in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


async def test_routing_ids(autojump_clock):
    """Turns of a session carry a hash of its key, the same in every run of the same API key, and never the key."""
    seen = []
    for key in ("sk-test", "sk-test", "sk-other"):
        async with open_world(answer=yes(), api_key=key) as world:
            session = world.client.session("user:ada")
            await session.ask("q")
            await session.ask("q")
            forked = await session.fork("user:ada/b")
            await forked.ask("q")
            await world.client.chat("q")
            seen.append([sent.body.get("session_id") for sent in world.sent])
            assert not any(b"ada" in sent.raw for sent in world.sent)
    first, second, other = seen
    assert first == second
    assert first[0] == first[1] != first[2]
    assert first[3] is None
    assert other[0] != first[0]
    assert len(first[0] or "") == 64


async def test_routing_ids_of_ones_own_and_none(autojump_clock):
    """A `routing_id` of a call or a session stands in for the hash, and a setting turns it off."""
    async with open_world(answer=yes()) as world:
        await world.client.session("k", routing_id="mine").ask("q")
        await world.client.session("l").ask("q", routing_id="this turn's")
        assert [sent.body["session_id"] for sent in world.sent] == ["mine", "this turn's"]
    async with open_world(answer=yes(), sessions=gr.SessionConfig(routing=False)) as world:
        await world.client.session("k").ask("q")
        assert "session_id" not in world.sent[0].body


def test_what_is_known_of_a_call_besides_its_body() -> None:
    """The model asked for and the bound on the completion, from wherever a call says them; what it leaves out stays."""
    _, beneath = encode_call({"model": "a/b", "max_tokens": 5, "tenant": "t"})
    assert beneath == CallSettings(model="a/b", max_tokens=5, tenant="t")
    assert encode_call({"temperature": 1}, beneath=beneath)[1] is beneath
    _, changed = encode_call({"extra_body": {"model": "c/d"}, "max_completion_tokens": 7}, beneath=beneath)
    assert changed == CallSettings(model="c/d", max_tokens=7, tenant="t")
