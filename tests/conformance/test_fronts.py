"""One suite for every front of the runtime: the client of this process, and the one behind a gateway."""

from __future__ import annotations

from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
from gateways import open_gateway
from worlds import completion, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.abc import ClientProtocol, SessionProtocol
from gorouter_trio.errors import (
    BadRequestError,
    ConfigError,
    InvalidOutputError,
    RateLimitError,
    SessionConflictError,
    StreamNotFinishedError,
    TurnInterruptedError,
)
from gorouter_trio.events import StreamFinished, TextDelta, ToolCallDelta
from gorouter_trio.remote import open_remote
from gorouter_trio.simulator import SimulatorConfig

pytestmark = pytest.mark.net

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class Person(msgspec.Struct):
    name: str
    age: int


@pytest.fixture(params=["local", "remote"])
def front(request):
    """Opens a client of that kind; gives it with the world behind it."""

    @asynccontextmanager
    async def opened(**fields):
        if request.param == "local":
            async with open_world(**fields) as world:
                yield world.client, world
        else:
            async with open_gateway(**fields) as behind, open_remote(behind.url) as client:
                yield client, behind.world
                assert behind.errors == []

    return opened


def as_protocol(client: ClientProtocol) -> ClientProtocol:
    """Read by the type checker: both clients are one."""
    return client


def as_session(session: SessionProtocol) -> SessionProtocol:
    """Likewise."""
    return session


async def test_chat(front):
    """A chat of its own: text, message, usage, cost, model."""
    async with front() as (client, world):
        reply = await as_protocol(client).chat("[[say hello]]", system="Be brief.", temperature=0.0)
        assert reply.text == "hello"
        assert there(there(reply.usage).completion_tokens) > 0
        assert there(reply.cost) > 0
        assert there(reply.model).startswith("openai/")
        assert [m["role"] for m in world.sent[-1].messages] == ["system", "user"]
        assert world.sent[-1].body["temperature"] == 0


async def test_turns_and_history(front):
    """Turns are serial and remembered; history, statistics, undo, retry, edit, clear and fork."""
    async with front() as (client, world):
        session = as_session(client.session("user:42", system="You are concise."))
        assert (await session.ask("[[say one]]")).text == "one"
        assert (await session.ask("[[say two]]", turn_id="t2")).turn_id == "t2"
        assert [m["role"] for m in world.sent[-1].messages] == ["system", "user", "assistant", "user"]
        history = await session.history()
        assert [entry.message.content for entry in history] == ["[[say one]]", "one", "[[say two]]", "two"]
        assert history[3].turn_id == "t2"
        assert there(there(history[3].call).cost) > 0
        statistics = await session.statistics()
        assert (statistics.state, statistics.turns, statistics.length) == ("idle", 2, 2)
        fork = await session.fork("user:42/b")
        assert len(await fork.history()) == 4
        with pytest.raises(SessionConflictError):
            await session.fork("user:42/b")
        assert (await session.retry()).text == "two"
        assert await session.undo()
        assert len(await session.history()) == 2
        await session.compact()
        await session.clear()
        assert await session.history() == []
        assert not await session.undo()
        await session.aclose()
        assert len(await fork.history()) == 4


async def test_edit(front):
    """A past turn gives way to another one, with all after it."""
    async with front() as (client, _world):
        session = client.session("s")
        await session.ask("[[say one]]", turn_id="a")
        await session.ask("[[say two]]", turn_id="b")
        assert (await session.edit("a", "[[say three]]")).text == "three"
        assert [entry.message.content for entry in await session.history()] == ["[[say three]]", "three"]
        with pytest.raises(SessionConflictError):
            await session.edit("unknown", "x")


async def test_a_turn_happens_once(front):
    """Asked again under its id it gives the stored answer."""
    async with front() as (client, world):
        session = client.session("s")
        first = await session.ask("Something.", turn_id="t")
        again = await session.ask("Something.", turn_id="t")
        assert (first.text, first.generation_id) == (again.text, again.generation_id)
        assert len(world.sent) == 1
        async with session.stream("Something.", turn_id="t") as stream:
            assert (await stream.collect()).text == first.text
        assert len(world.sent) == 1


async def test_stream(front):
    """Pieces as they come, their end last, and the whole result; stored when the block is left."""
    async with front() as (client, _world):
        session = client.session("s")
        async with session.stream("Tell me a story.") as stream:
            with pytest.raises(StreamNotFinishedError):
                _ = stream.result
            events = [event async for event in stream]
        texts = [event.text for event in events if isinstance(event, TextDelta)]
        assert len(texts) > 3
        assert "".join(texts) == stream.result.text
        assert isinstance(events[-1], StreamFinished)
        assert [type(event) for event in events].count(StreamFinished) == 1
        assert (await session.history())[-1].message.content == stream.result.text
        async with client.stream("Again.") as stream:
            text = "".join([piece async for piece in stream.text])
        assert text == stream.result.text


async def test_tools_of_the_caller(front):
    """The calls come in the stream and in the answer; their results are the next turn."""
    async with front() as (client, _world):
        session = client.session("s")
        async with session.stream('[[call weather {"city": "Paris"}]]', tools=[WEATHER]) as stream:
            events = [event async for event in stream]
        call = stream.result.message.tool_calls[0]
        assert call.function.name == "weather"
        pieces = [event for event in events if isinstance(event, ToolCallDelta)]
        assert "".join(piece.arguments for piece in pieces) == call.function.arguments
        assert stream.result.finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        assert (await session.ask([result], tools=[WEATHER])).text


async def test_typed_answers(front):
    """A type makes a form of the answer, and the text a value; one that has it not is asked for again, and refused."""
    good, bad = completion('{"name":"Ada","age":36}'), completion("Ada is 36.")
    async with front(answer=replies(bad, good, bad)) as (client, world):
        reply = await client.chat("Ada, 36", response_type=Person)
        assert reply.value == Person("Ada", 36)
        assert len(world.sent) == 2
        session = client.session("s")
        with pytest.raises(InvalidOutputError) as caught:
            await session.ask("Ada", response_type=Person)
        assert there(caught.value.partial).text == "Ada is 36."


async def test_ask_for_users(front):
    """The session of a user, and of the same user in a group, are two."""
    async with front() as (client, _world):
        await client.ask("[[say one]]", user="u/1")
        await client.ask("[[say two]]", user="u/1", group="g")
        own = await client.session(gr.session_key("u/1")).history()
        assert [entry.message.content for entry in own] == ["[[say one]]", "one"]
        with pytest.raises(ConfigError, match="group"):
            await client.ask("x", group="g")


async def test_interrupt(front):
    """The running turn ends with what had arrived."""
    async with front(config=SimulatorConfig(tokens_per_s=20.0)) as (client, _world):
        session, caught = client.session("s"), []

        async def ask():
            with pytest.raises(TurnInterruptedError) as info:
                await session.ask("[[tokens 400]] A long one.")
            caught.append(info.value)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            with trio.fail_after(5):
                while not await session.interrupt():
                    await trio.sleep(0.02)  # until it runs
        assert caught
        assert not await session.interrupt()
        assert (await session.ask("[[say well]]")).text == "well"


async def test_cancelling(front):
    """Who stops waiting stops the turn, and the session is at once good for the next."""
    async with front(config=SimulatorConfig(tokens_per_s=20.0)) as (client, _world):
        session = client.session("s")
        with trio.move_on_after(0.2) as scope:
            await session.ask("[[tokens 400]] A long one.")
        assert scope.cancelled_caught
        assert (await session.statistics()).state == "idle"
        assert (await session.ask("[[say well]]")).text == "well"


async def test_leaving_a_stream_early(front):
    """What had arrived is stored as an interrupted answer."""
    async with front(config=SimulatorConfig(tokens_per_s=200.0)) as (client, _world):
        session = client.session("s")
        async with session.stream("[[tokens 400]] A long one.") as stream:
            async for _event in stream:
                break
        entries = await session.history()
        assert there(entries[-1].call).interrupted
        assert (await session.ask("[[say well]]")).text == "well"


async def test_errors_are_the_same(front):
    """What fails has the same class and says the same, wherever it is asked."""
    async with front(
        config=SimulatorConfig(fault_rates={"429_upstream": 1.0}), retry=gr.RetryPolicy(max_retries=0)
    ) as (
        client,
        _world,
    ):
        with pytest.raises(RateLimitError) as caught:
            await client.session("s").ask("Hello.")
        assert caught.value.status == 429
        with pytest.raises(BadRequestError):
            await client.chat([])
        with pytest.raises(BadRequestError):
            await client.chat("x", temperature="warm")
        session = client.session("s")
        for name in ("", 17, "\ud800"):
            for attempt in (
                lambda name=name: session.ask("x", turn_id=name),
                lambda name=name: session.stream("x", turn_id=name).__aenter__(),
                lambda name=name: session.edit(name, "x"),
                lambda name=name: session.undo(name),
                lambda name=name: session.fork(name),
            ):
                with pytest.raises(ConfigError):
                    await attempt()
            with pytest.raises(ConfigError):
                client.session(name)
        with pytest.raises(ConfigError, match="user"):
            await client.ask("x", user=17)
