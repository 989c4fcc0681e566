"""Another store while the plugin lives: any, or a Redis, whose server is a real one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from failing_store import FailingStore
from redis_server import fresh_prefix, shared_redis
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import HistoryPlugin, RedisHistoryPlugin
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore, RedisStore
from gorouter_trio.wire.codec import decode_log_entry
from gorouter_trio.wire.journal import TurnAnswered

YES = completion("Yes.")


async def test_any_store(autojump_clock):
    """Turns are in the plugin's store while it lives, and in the former one before and after."""
    own, other = MemoryStore(), MemoryStore()
    async with open_world(answer=replies(YES), store=own) as world:
        session = world.client.session("s")
        await session.ask("1")
        name = await world.client.register(HistoryPlugin(other))
        await session.ask("2")
        await session.ask("3")
        await world.client.unregister(name)
        await session.ask("4")
        assert len(await session.history()) == 4
    assert (await own.version("s"), await other.version("s")) == (4, 4)


class Closing(FailingStore):
    """A store that takes its time, and nothing once it is closed."""

    is_closed = False

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        await trio.sleep(0.1)
        if self.is_closed:
            raise gr.StoreError("closed", kind="io")
        return await super().append(key, entries, expected_version=expected_version)

    async def aclose(self) -> None:
        self.is_closed = True


async def test_a_cancel_from_outside(autojump_clock):
    """The store is closed when the sessions have stored what they had."""
    store = Closing()
    slow = SimulatorConfig(latency_s=1, tokens_per_s=1, comment_interval_s=0)
    with trio.move_on_after(5):
        async with (
            open_world(slow, plugins=[HistoryPlugin(store, closes_store=True)]) as world,
            world.client.session("s").stream("Well?") as stream,
        ):
            await stream.collect()
    last = decode_log_entry((await store.load("s")).entries[-1])
    assert isinstance(last, TurnAnswered)
    assert store.is_closed


class Broken(MemoryStore):
    """A store whose server does not answer."""

    async def version(self, key: str) -> int:
        raise gr.StoreError("no answer", kind="io")


async def test_a_store_that_does_not_answer(autojump_clock):
    """The plugin has never been there, and the client keeps its store."""
    own = MemoryStore()
    async with open_world(answer=replies(YES), store=own) as world:
        with pytest.raises(gr.StoreError):
            await world.client.register(HistoryPlugin(Broken()))
        assert world.client.store is own


class Second(HistoryPlugin):
    name = "second"


@pytest.mark.parametrize("first_ends_first", [False, True])
async def test_ending_in_any_order(autojump_clock, first_ends_first):
    """Nobody's end puts a store into use that has been closed; with the last, the client's own is back."""
    own, stores = MemoryStore(), [Closing(), Closing()]
    async with open_world(answer=replies(YES), store=own) as world:
        client = world.client
        names = [
            await client.register(kind(store, closes_store=True))
            for kind, store in zip((HistoryPlugin, Second), stores, strict=True)
        ]
        assert client.store is stores[1]
        left = int(first_ends_first)
        await client.unregister(names[1 - left])
        assert client.store is stores[left]
        await client.session("s").ask("Well?")
        await client.unregister(names[left])
        assert client.store is own
        await client.session("s").ask("Well?")
    assert (await own.version("s"), await stores[left].version("s")) == (2, 2)


async def test_a_store_that_is_set_meanwhile(autojump_clock):
    """It stays when the plugin ends."""
    own, other, third = MemoryStore(), MemoryStore(), MemoryStore()
    async with open_world(answer=replies(YES), store=own) as world:
        name = await world.client.register(HistoryPlugin(other))
        world.client.set_store(third)
        await world.client.unregister(name)
        assert world.client.store is third


async def test_beginning_again(autojump_clock):
    """A plugin whose store did not answer can be begun once it does, and is closed when it has ended."""
    store = Closing()
    store.fail_next("before")
    plugin = HistoryPlugin(store, closes_store=True)
    async with open_world(answer=replies(YES)) as world:
        with pytest.raises(RuntimeError, match="version failed"):
            await world.client.register(plugin)
        assert not store.is_closed
        name = await world.client.register(plugin)
        assert world.client.store is store
        await world.client.unregister(name)
        assert store.is_closed


@pytest.mark.net
async def test_redis_again():
    """With a URL the plugin opens its client anew each time it begins."""
    plugin = RedisHistoryPlugin(shared_redis().url, prefix=fresh_prefix())
    async with open_world(answer=replies(YES)) as world:
        for turns in (2, 4):
            name = await world.client.register(plugin)
            await world.client.session("s").ask("Well?")
            assert len(await world.client.session("s").history()) == turns
            await world.client.unregister(name)


async def test_a_redis_that_is_not_there():
    """That is told each time the plugin is begun."""
    redis = gr.redis.RedisClient("redis://127.0.0.1:1/0", timeout_s=0.2)
    plugin = RedisHistoryPlugin(redis)
    async with open_world(answer=replies(YES)) as world:
        for _ in range(2):
            with pytest.raises(gr.StoreError, match="cannot connect"):
                await world.client.register(plugin)


@pytest.mark.net
async def test_redis(no_leaks):
    """With a URL the plugin opens its client and closes it; what sessions said is there for the next client."""
    prefix, url = fresh_prefix(), shared_redis().url
    for turns in (2, 4):
        async with no_leaks():
            plugin = RedisHistoryPlugin(url, prefix=prefix)
            async with open_world(answer=replies(YES), plugins=[plugin]) as world:
                await world.client.session("s").ask("Well?")
                assert len(await world.client.session("s").history()) == turns
                assert isinstance(world.client.store, RedisStore)


@pytest.mark.parametrize("store", [None, "redis://localhost", []])
def test_no_store(store):
    """What is no store is refused where the plugin is made, not with a bare AttributeError where it begins."""
    with pytest.raises(gr.ConfigError, match="history: needs a store"):
        HistoryPlugin(store)


@pytest.mark.parametrize("client", [5, None, object(), []])
def test_no_redis(client):
    """What is neither a URL nor a client nor a store is refused."""
    with pytest.raises(gr.ConfigError, match="redis history"):
        RedisHistoryPlugin(client)
