"""The history manager: what it reads, keeps and changes, and how it gets on with active sessions."""

from __future__ import annotations

import random
import sqlite3
from decimal import Decimal
from typing import Any

import pytest
import trio
import trio.testing
from failing_store import FailingStore
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.stores import MemoryStore, SqliteStore
from gorouter_trio.wire.messages import AssistantMessage, ToolMessage, UserMessage
from gorouter_trio.wire.result import CallRecord, HistoryEntry

TALK: list[Any] = [UserMessage("hi"), HistoryEntry(AssistantMessage("hello"), CallRecord(model="m", finished_at_s=5.0))]


def texts(entries):
    return [entry.message.content for entry in entries]


async def test_reading_and_adding():
    """What was added is read, by key, with its calls; a session that is not there is empty."""
    manager = gr.HistoryManager(MemoryStore())
    assert await manager.entries("k") == []
    await manager.add("k", TALK)
    await manager.add("k", [UserMessage("more"), AssistantMessage("done")])
    entries = await manager.entries("k")
    assert texts(entries) == ["hi", "hello", "more", "done"]
    assert entries[1].call is not None
    assert entries[1].call.model == "m"
    assert [type(message) for message in await manager.messages("k")] == [UserMessage, AssistantMessage] * 2
    assert (await manager.analyzer.statistics()).calls == 1
    await manager.add("k", [])
    assert (await manager.sessions())[0].version == 2


async def test_what_cannot_stand_is_refused():
    """A question without its answer and a result without its call are named, and nothing is written."""
    manager = gr.HistoryManager(MemoryStore())
    for entries, says in (
        ([UserMessage("hi")], "the message at 0 was never answered"),
        ([*TALK, ToolMessage("x", "y"), AssistantMessage("z")], "the message at 2 answers no open call"),
    ):
        with pytest.raises(gr.ConfigError, match=says):
            await manager.add("k", entries)
    assert await manager.keys() == []
    for key in ("", "\ud800"):
        with pytest.raises(gr.ConfigError, match="session"):
            await manager.add(key, TALK)


@pytest.mark.parametrize("content", ["\ud800", [{"type": "text", "text": "x", "n": Decimal("NaN")}], [object()], None])
async def test_what_has_no_json_is_refused(content):
    """Nothing is written that could not be read again, and the session stays as it is."""
    manager = gr.HistoryManager(MemoryStore())
    await manager.add("k", TALK)
    odd: Any = UserMessage(content)
    with pytest.raises(gr.ConfigError, match="entries: cannot be written"):
        await manager.add("k", [odd, AssistantMessage("a")])
    assert texts(await manager.entries("k")) == ["hi", "hello"]


async def test_clear_delete_erase():
    """Clearing leaves an empty session, deleting none; by key, by prefix, or all."""
    manager = gr.HistoryManager(MemoryStore())
    for key in ("u:1", "u:2", "v"):
        await manager.add(key, TALK)
    await manager.clear("u:1")
    assert await manager.entries("u:1") == []
    assert await manager.keys() == ["u:1", "u:2", "v"]
    assert await manager.delete("u:1")
    assert not await manager.delete("u:1")
    assert await manager.erase("u:2")
    await manager.add("u:3", TALK)
    assert await manager.clear_all("u:") == 1
    assert texts(await manager.entries("v")) == ["hi", "hello"]
    assert await manager.delete_all("u:") == 1
    assert await manager.erase_all("") == 1
    assert await manager.keys() == []


async def test_clearing_what_is_not_there(autojump_clock):
    """Neither that nor compacting makes a session."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        manager, session = gr.HistoryManager(store, owner=world.client), world.client.session("k")
        await session.clear()
        await session.compact()
        await manager.clear("k")
        assert await manager.keys() == []
        async with world.another_client() as other:
            await other.session("k").ask("q")
        await session.clear()
        assert await manager.keys() == ["k"]
        assert await manager.entries("k") == []


@pytest.mark.parametrize("prefix", ["user:", ""])
async def test_erasing_again(tmp_path, prefix):
    """Where a reader kept the traces of what was deleted, erasing again removes them, though no session is left."""
    path = tmp_path / "h.db"
    async with SqliteStore(path, busy_s=0.01) as store:
        manager = gr.HistoryManager(store)
        await manager.add("user:1", [UserMessage("s3cret"), AssistantMessage("hello")])
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sessions").fetchone()
        with pytest.raises(gr.StoreError, match="try again") as caught:
            await manager.erase_all(prefix)
        assert caught.value.kind == "locked"
        reader.close()
        assert await manager.keys() == []
        assert await manager.erase_all(prefix) == 0
        assert [file.name for file in tmp_path.iterdir() if b"s3cret" in file.read_bytes()] == []


async def test_the_cache_is_asked_for_its_version():
    """What was read once is not loaded again, unless somebody has changed it since."""
    store = FailingStore()
    manager = gr.HistoryManager(store)
    await manager.add("k", TALK)
    for _ in range(3):
        assert texts(await manager.entries("k")) == ["hi", "hello"]
    assert store.operations.count("load") == 1
    await store.rewrite("k", [], expected_version=1)
    assert await manager.entries("k") == []
    await store.delete("k")
    assert await manager.entries("k") == []
    statistics = manager.statistics()
    assert (statistics.hits, statistics.misses, statistics.sessions) == (2, 3, 0)


async def test_a_session_that_was_made_anew_elsewhere(autojump_clock):
    """What another process has erased is told by no cache and sent by no session, however long the new one is."""
    store = MemoryStore()
    async with open_world(store=store) as world, world.another_client() as other:
        mine, theirs = world.client.session("k"), other.session("k")
        cache = gr.HistoryManager(store)
        await mine.ask("the secret [[say noted]]")
        assert texts(await cache.entries("k")) == ["the secret [[say noted]]", "noted"]
        await gr.HistoryManager(store, owner=other).erase("k")
        await theirs.ask("hello [[say hi]]")
        assert texts(await cache.entries("k")) == ["hello [[say hi]]", "hi"]
        with pytest.raises(gr.SessionConflictError):
            await mine.ask("go on")
        await mine.ask("go on [[say well]]")
        assert world.sent[-1].contents == ["hello [[say hi]]", "hi", "go on [[say well]]"]
        assert texts(await mine.history()) == ["hello [[say hi]]", "hi", "go on [[say well]]", "well"]


async def test_a_caller_may_change_what_it_got():
    """The list is the caller's own."""
    manager = gr.HistoryManager(MemoryStore())
    await manager.add("k", TALK)
    (await manager.entries("k")).clear()
    assert len(await manager.entries("k")) == 2


async def test_the_cache_is_bounded(autojump_clock):
    """By bytes, the least recently used going first, and by the time since the last use."""
    store = MemoryStore()
    manager = gr.HistoryManager(store, max_bytes=1_000, ttl_s=100, cleanup_s=10)
    for key in "abcd":
        await manager.add(key, TALK)
        await manager.entries(key)
    held = manager.statistics()
    assert 0 < held.bytes <= 1_000
    assert 0 < held.sessions < 4
    await trio.sleep(99)
    await manager.entries("d")
    await trio.sleep(50)
    await manager.entries("d")
    assert manager.statistics().sessions == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(manager.run)
        await trio.sleep(120)
        assert manager.statistics() == gr.history.HistoryCacheStatistics(0, 0, 2, 4)
        nursery.cancel_scope.cancel()
    await manager.entries("a")
    manager.forget()
    assert manager.statistics().bytes == 0


@pytest.mark.parametrize("field", ["ttl_s", "cleanup_s", "max_bytes"])
def test_settings_are_checked(field):
    """A number that cannot be is named."""
    with pytest.raises(gr.ConfigError, match=field):
        gr.HistoryManager(MemoryStore(), **{field: -1})  # type: ignore[arg-type]  # one of the numbers


async def test_changes_of_an_active_session(autojump_clock):
    """The turn that runs ends first; the next one knows what was added, and nobody meets a conflict."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        manager = gr.HistoryManager(store, owner=world.client)
        session = world.client.session("k")
        await session.ask("one")
        await manager.add("k", TALK)
        await session.ask("two")
        assert world.sent[-1].contents == ["one", "Yes.", "hi", "hello", "two"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "three")
            await trio.testing.wait_all_tasks_blocked()
            await manager.clear("k")
        await session.ask("four")
        assert world.sent[-1].contents == ["four"]
        assert await manager.delete("k")
        await session.ask("five")
        assert texts(await manager.entries("k")) == ["five", "Yes."]


async def test_many_changes_at_once(autojump_clock, seed):
    """Whatever comes together, nothing is lost: turns that meet a change ask again."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        manager = gr.HistoryManager(store, owner=world.client)
        session = world.client.session("k")

        async def add(number):
            await trio.sleep(random.Random(seed + number).random())
            await manager.add("k", [UserMessage(f"added {number}"), AssistantMessage("ok")])

        async def ask(number):
            await trio.sleep(random.Random(seed - number).random())
            while True:
                try:
                    return await session.ask(f"asked {number}")
                except (gr.SessionConflictError, gr.HistoryNotSaved):
                    pass

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(add, number)
                nursery.start_soon(ask, number)
        asked = [e.message.content for e in await manager.entries("k") if isinstance(e.message, UserMessage)]
        assert sorted(asked) == sorted(f"{kind} {n}" for kind in ("added", "asked") for n in range(20))


async def test_somebody_faster_each_time():
    """A writer that never stops is named in the end."""

    class Busy(FailingStore):
        async def version(self, key):
            found = await super().version(key)
            await self.inner.append(key, [], expected_version=found)
            return found

    manager = gr.HistoryManager(Busy())
    with pytest.raises(gr.SessionConflictError):
        await manager.add("k", TALK)
