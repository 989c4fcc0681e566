"""A world fills in what a client needs, answers from where it is told to, and tells on everybody."""

from __future__ import annotations

import msgspec
import pytest
import trio
from trio.testing import MockClock

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.simulator.catalog import MODELS
from gorouter_trio.stores import MemoryStore
from gorouter_trio.testing import (
    FailStore,
    FaultyStore,
    Link,
    ScriptedModel,
    SkewClock,
    World,
    check_history,
    open_world,
    run,
)
from gorouter_trio.transport.http_server import ServerReply, ServerRequest

ORPHAN = [{"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "call_1", "content": "?"}]


async def test_a_world_opens_inside_any_run(autojump_clock: MockClock) -> None:
    """`open_world` works in a trio run of the user's own, whatever its clock shows."""
    await trio.sleep(1_000)
    async with open_world(seed=3, link=Link(latency_s=0.5)) as world:
        assert world.now() == 0
        async with world.open_client() as client:
            assert (await client.chat("[[say Hello.]]")).text == "Hello."
        assert world.now() == pytest.approx(2)


@pytest.mark.parametrize("style", ["openai", "anthropic", "google", "x-ai", "qwen"])
def test_the_simulators_calls_are_a_history_that_is_taken(style: str) -> None:
    """The judge refuses no id that the simulated models make, however long the name of the tool is."""

    async def what_the_weather_in_a_city_will_be_like() -> str:
        return "Fine."

    model = next(model.id for model in MODELS if model.author == style)

    async def scenario(world: World) -> str:
        async with world.open_client(model=model) as client:
            prompt = "[[call what_the_weather_in_a_city_will_be_like {}]]"
            return (await client.chat(prompt, tools=[what_the_weather_in_a_city_will_be_like])).text

    assert run(scenario).value == "According to what_the_weather_in_a_city_will_be_like: Fine."


async def test_an_error_leaves_a_world_as_itself() -> None:
    """The body's exception comes out bare, not in groups of the world's nurseries."""
    with pytest.raises(LookupError, match=r"^'mine'$"):
        async with open_world() as world, world.open_client():
            raise KeyError("mine")


async def test_a_cancel_passes_through_a_world() -> None:
    """Cancelling what surrounds a world ends it without an error."""
    with trio.CancelScope() as scope:
        async with open_world() as world, world.open_client():
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


# --- clients ----------------------------------------------------------------------------------------------------------


async def test_clients_share_the_store() -> None:
    """A client that is opened later finds the histories of the one before."""
    async with open_world() as world:
        async with world.open_client() as client:
            await client.session("ada").ask("My name is Ada.")
        async with world.open_client() as client:
            reply = await client.session("ada").ask("What is my name?")
            assert "Ada" in reply.text
            assert len(await client.session("ada").history()) == 4
        assert world.store.keys_seen == ["ada"]


async def test_what_is_given_stands() -> None:
    """Settings of a config and by name are kept, and a store of the user's is wrapped."""
    store = MemoryStore()
    config = gr.ClientConfig(model="openai/gpt-4o", api_key="sk-mine", pool=gr.PoolLimits(max_connections=1))
    async with open_world() as world:
        async with world.open_client(config, store=store) as client:
            reply = await client.session("s").ask("Hi")
            assert reply.model == "openai/gpt-4o-2024-11-20"
            assert world.simulator.ledger.used_by("sk-mine") > 0
        assert (await store.load("s")).version == 2
        assert [event.fields["operation"] for event in world.log.events("store")] == ["load", "append", "append"]


async def test_the_first_open_client_is_at_hand() -> None:
    """`world.client` is the one that was opened first; without any it is an error."""
    async with open_world() as world:
        with pytest.raises(LookupError):
            _ = world.client
        async with world.open_client() as first:
            async with world.open_client() as second:
                assert world.client is first
                assert world.clients == [first, second]
            assert world.clients == [first]
        assert world.clients == []


def test_ids_and_jitter_come_from_the_seed() -> None:
    """Turn ids of the same seed are the same, of another seed others."""

    async def ask(world: World) -> str | None:
        async with world.open_client() as client:
            return (await client.session("s").ask("Hi")).turn_id

    assert run(ask, seed=1).value == run(ask, seed=1).value != run(ask, seed=2).value


async def test_a_store_is_wrapped_once() -> None:
    """Watching a store that is watched already changes nothing."""
    async with open_world() as world:
        store = world.watch(MemoryStore())
        assert world.watch(store) is store
        assert world.watch(world.store) is world.store


# --- servers ----------------------------------------------------------------------------------------------------------


async def test_a_faulty_store_of_the_users_meets_the_faults_of_the_world() -> None:
    """A `FaultyStore` with a plan of its own is wrapped as any other store."""
    async with open_world(faults=[FailStore(operation="append", nth=2, sticky=True)]) as world:
        own = FaultyStore(MemoryStore(), [FailStore(operation="append", nth=1)])
        watched = world.watch(own)
        with pytest.raises(OSError, match="simulated"):
            await watched.append("k", [b"{}"], expected_version=0)
        assert (own.struck, watched.struck) == (1, 0)
        with pytest.raises(OSError, match="simulated"):
            await watched.append("k", [b"{}"], expected_version=0)
        assert (own.struck, watched.struck) == (1, 1)
        async with world.open_client(store=own) as client:
            with pytest.raises(gr.StoreError):
                await client.session("user:1").ask("Hello?")
    assert len(world.log.events("store", operation="append")) == 3


async def test_a_world_refuses_a_setting_that_there_is_not() -> None:
    """Also where no run is around it."""
    with pytest.raises(TypeError, match="'lnk'"):
        async with open_world(lnk=Link()):  # type: ignore[call-arg]  # that is the point
            pass


async def test_a_model_takes_the_place_of_the_simulator() -> None:
    """Chats go to the model that is served, for all hosts or for one; everything else to the simulator."""
    async with open_world() as world:
        world.serve(ScriptedModel(["one", "two"]))
        world.serve(ScriptedModel(["other"]), host="other.example")
        async with (
            world.open_client() as client,
            world.open_client(base_url="http://other.example/api/v1") as other,
        ):
            assert (await client.chat("Hi")).text == "one"
            assert (await other.chat("Hi")).text == "other"
            assert (await client.chat("Hi")).text == "two"
            assert len(await client.models()) > 10
    assert world.simulator.statistics().received == 0


@pytest.mark.parametrize("at", ["backup.test", "backup.test:8080", "BACKUP.test", "[2001:db8::1]", "[2001:db8::1]:81"])
async def test_a_host_is_served_at_every_port(at: str) -> None:
    """A model is for a host, however a base URL spells it."""
    async with open_world() as world:
        for host in ("Backup.test", "[2001:db8::1]"):
            world.serve(ScriptedModel(["scripted"]), host=host)
        async with world.open_client(base_url=f"http://{at}/api/v1") as client:
            assert (await client.chat("Hi")).text == "scripted"


async def test_the_seed_of_a_simulator_can_be_chosen() -> None:
    """A simulator without a seed of its own takes the world's, so that worlds differ in what is said."""
    async with open_world(seed=1) as world, open_world(seed=2) as other:
        assert world.simulator.config.seed != other.simulator.config.seed
    async with open_world(seed=1, simulator=SimulatorConfig(seed=77)) as world:
        assert world.simulator.config.seed == 77


def test_a_server_that_fails_fails_the_world() -> None:
    """An exception of a handler is raised in the end, before what it made of the scenario."""

    class Broken:
        async def handler(self, _request: ServerRequest, _reply: ServerReply) -> None:
            raise ZeroDivisionError("in the server")

    async def chat(world: World) -> None:
        world.serve(Broken())
        async with world.open_client(retry=gr.RetryPolicy(max_retries=0)) as client:
            await client.chat("Hi")

    report = run(chat)
    assert isinstance(report.error, ZeroDivisionError)
    assert isinstance(report.error.__cause__, gr.ProviderError)
    assert report.events("failure")[0].fields == {"error": "ZeroDivisionError", "message": "in the server"}


# --- histories --------------------------------------------------------------------------------------------------------


async def test_a_history_that_no_provider_takes_is_refused() -> None:
    """A request with an orphan tool message is answered 400, kept, and in the log."""
    async with open_world() as world, world.open_client() as client:
        with pytest.raises(gr.BadRequestError, match="Provider returned error"):
            await client.chat(ORPHAN)
        assert len(world.invalid_histories) == 1
        assert "messages[1]" in world.invalid_histories[0]
        assert world.log.events("invalid_history")[0].fields["problems"] == world.invalid_histories
        assert world.simulator.statistics().received == 0


async def test_a_lenient_world_lets_it_pass() -> None:
    """With `strict=False` the simulator answers what it gets."""
    async with open_world(strict=False) as world, world.open_client() as client:
        assert (await client.chat(ORPHAN)).text
        assert world.invalid_histories == []


async def test_the_next_request_of_each_session_can_be_looked_at() -> None:
    """What a session would send next is judged without sending it, and nothing changes by looking."""
    async with open_world() as world, world.open_client() as client:
        await client.session("a").ask("One")
        await client.session("b").ask("[[say Two.]]")
        before = world.log.data
        requests = await world.next_requests("Three?")
        assert world.log.data == before
        assert len(await client.session("b").history()) == 2
    assert list(requests) == ["a", "b"]
    assert msgspec.json.decode(requests["b"])["messages"] == [
        {"role": "user", "content": "[[say Two.]]"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    assert all(check_history(body) == [] for body in requests.values())


async def test_a_turn_without_an_end_is_known(autojump_clock: MockClock) -> None:
    """A turn that runs is open, and closed again when it is answered or interrupted."""
    async with open_world(simulator=SimulatorConfig(latency_s=5)) as world, world.open_client() as client:
        session = client.session("s")
        with trio.move_on_after(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.ask, "Hi")
                await trio.sleep(1)
                assert list(world.store.open_turns) == ["s"]
                await trio.sleep_forever()
        assert world.store.open_turns == {}
        states = [event.fields["state"] for event in world.log.events("turn")]
        assert states == ["started", "abandoned"]


async def test_a_session_that_is_gone_is_not_looked_at(autojump_clock: MockClock) -> None:
    """Deleted while its turn runs, it has neither an open turn nor a next request; what was imported has one."""
    async with open_world(simulator=SimulatorConfig(latency_s=5)) as world, world.open_client() as client:
        await client.session("a").ask("Hi")
        stored = await world.store.load("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.session("b").ask, "Hi")
            await trio.sleep(1)
            assert list(world.store.open_turns) == ["b"]
            started = (await world.store.load("b")).entries
            await world.store.delete("b")
            assert world.store.open_turns == {}
            await world.store.rewrite("c", (*stored.entries, *started), expected_version=0)
            assert list(world.store.open_turns) == ["c"]
            await world.store.rewrite("d", stored.entries, expected_version=0)
            nursery.cancel_scope.cancel()
        await world.store.erase("c")
        assert list(await world.next_requests()) == ["a", "d"]
        assert world.store.open_turns == {}


# --- the log ----------------------------------------------------------------------------------------------------------


def test_the_log_tells_the_story_of_a_turn() -> None:
    """Store operations, connects, requests, what the simulator did and what became of the turn, in their order."""

    async def ask(world: World) -> None:
        async with world.open_client() as client:
            await client.session("s").ask("[[fault 502 x1]] Hi")
        world.record("mine", answer=42)

    report = run(ask)
    assert report.error is None
    kinds = [event.kind for event in report.events()]
    assert kinds[:6] == ["client", "store", "store", "turn", "connect", "request"]
    assert kinds.count("request") == 2
    turns = [event.fields for event in report.events("turn")]
    assert [turn["state"] for turn in turns] == ["started", "answered"]
    assert turns[1]["attempts"] == 2
    assert [event.fields["outcome"] for event in report.events("served")] == ["failed", "completed"]
    assert report.events("mine")[0].fields == {"answer": 42}


def test_the_log_holds_no_key() -> None:
    """The key of a client, and what was said, stay out of the log."""

    async def ask(world: World) -> None:
        async with world.open_client(api_key="sk-canary-key") as client:
            await client.session("s").ask("The canary sings at noon.")

    log = run(ask).log
    assert b"canary-key" not in log
    assert b"sings" not in log


def test_the_simulator_lives_by_the_wall_clock_of_the_world() -> None:
    """Generation ids carry the skewed time, which is the one that everybody in the world sees."""

    async def chat(world: World) -> str | None:
        async with world.open_client() as client:
            return (await client.chat("Hi")).generation_id

    generation_id = run(chat, start=5_000, faults=[SkewClock(at_s=0, by_s=1_000)]).value
    assert generation_id is not None
    assert generation_id.startswith("gen-6000-")
