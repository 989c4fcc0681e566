"""What every history store promises; put a store of your own through it by adding it to `STORES`.

An entry of `STORES` opens an empty store and, where `is_shared`, opens a second view on the same data.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import fresh_prefix, shared_redis

import gorouter_trio as gr
from gorouter_trio.abc import HistoryStore, StoredHistory, StoredSession
from gorouter_trio.stores import MemoryStore, RedisStore, SessionKey, SqliteStore
from gorouter_trio.testing import FaultyStore
from gorouter_trio.transport.resp_client import RedisClient

AT_S = 1_750_000_000.25
"""What every wall clock here says."""

KEYS = [
    "k",
    "a/b",
    "a_b",
    "a:b",
    "Иван",
    "Пётр",
    "____",
    "..",
    "x" * 4096,
    "\x00",
    " ",
    "é",
    "e\u0301",
    "K",
    "%",
    "*",
    "🌍",
]
ENTRIES = [b"{}", b'{"a":"\\u0000"}', "größe 🌍".encode(), bytes(range(256)), b"", b"x" * 100_000]


@asynccontextmanager
async def open_memory_store() -> AsyncIterator[MemoryStore]:
    """A store that lives as long as the process."""
    store = MemoryStore(wall=lambda: AT_S)
    yield store
    await store.aclose()


@asynccontextmanager
async def open_wrapped_store() -> AsyncIterator[HistoryStore]:
    """A store behind one that fails on demand, with no demand."""
    async with open_memory_store() as store:
        yield FaultyStore(store)


@asynccontextmanager
async def open_sqlite_store() -> AsyncIterator[SqliteStore]:
    """A store in a file of its own."""
    with tempfile.TemporaryDirectory() as directory:
        async with SqliteStore(Path(directory) / "histories.db", wall=lambda: AT_S) as store:
            yield store


class BroughtClient:
    """A client of a user's own, as far as the store can tell: it has `execute`, and nothing else."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def execute(self, *args):
        return await self._client.execute(*args)


@asynccontextmanager
async def open_redis_store() -> AsyncIterator[RedisStore]:
    """A store on a server that others use as well, with a prefix of its own."""
    async with RedisStore(shared_redis().url, prefix=fresh_prefix(), wall=lambda: AT_S) as store:
        yield store


@asynccontextmanager
async def open_brought_redis_store() -> AsyncIterator[RedisStore]:
    """A store over a client that was brought, whose sessions expire."""
    async with RedisClient(f"unix://{shared_redis().socket}") as client:
        store = RedisStore(BroughtClient(client), prefix=fresh_prefix(), ttl_s=600, wall=lambda: AT_S)
        async with store:
            yield store


STORES: dict[str, Callable[[], AbstractAsyncContextManager[HistoryStore]]] = {
    "memory": open_memory_store,
    "memory behind faults": open_wrapped_store,
    "sqlite": open_sqlite_store,
    "redis": open_redis_store,
    "redis, brought": open_brought_redis_store,
}


@pytest.fixture(params=STORES)
def opened(request):
    """What opens an empty store."""
    return STORES[request.param]


@pytest.fixture
async def store(opened):
    """An empty store."""
    async with opened() as made:
        yield made


async def test_a_session_that_was_never_written(store):
    """It has version 0 and no entries, and reading it creates nothing."""
    assert await store.load("k") == StoredHistory(0, ())
    assert await store.version("k") == 0
    assert list(await store.list_keys()) == []
    assert not await store.delete("k")


async def test_append_and_load(store):
    """Entries come back in order and byte for byte; the version counts the changes."""
    assert await store.append("k", ENTRIES[:2], expected_version=0) == 1
    assert await store.append("k", ENTRIES[2:], expected_version=1) == 2
    loaded = await store.load("k")
    assert loaded.version == 2
    assert list(loaded.entries) == ENTRIES


async def test_many_entries(store):
    """A thousand appends of one entry each are a thousand versions."""
    for number in range(1000):
        assert await store.append("k", [str(number).encode()], expected_version=number) == number + 1
    assert [int(entry) for entry in (await store.load("k")).entries] == list(range(1000))


async def test_nothing_appended_is_a_change(store):
    """Writing no entries makes a session with a version: a fork of an empty session exists."""
    assert await store.append("k", [], expected_version=0) == 1
    assert await store.load("k") == StoredHistory(1, ()) or list((await store.load("k")).entries) == []
    assert list(await store.list_keys()) == ["k"]


@pytest.mark.parametrize("method", ["append", "rewrite"])
@pytest.mark.parametrize("version", [0, 1, 3, -1])
async def test_another_version_conflicts_and_changes_nothing(store, method, version):
    """Whoever has not seen the last change writes nothing."""
    await store.append("k", [b"1"], expected_version=0)
    await store.append("k", [b"2"], expected_version=1)
    with pytest.raises(gr.SessionConflictError):
        await getattr(store, method)("k", [b"3"], expected_version=version)
    loaded = await store.load("k")
    assert (loaded.version, list(loaded.entries)) == (2, [b"1", b"2"])


async def test_writing_to_what_is_not_there(store):
    """A version of a session that does not exist conflicts, and creates nothing."""
    for method in (store.append, store.rewrite):
        with pytest.raises(gr.SessionConflictError):
            await method("k", [b"1"], expected_version=1)
    assert list(await store.list_keys()) == []


async def test_rewrite(store):
    """Rewriting replaces all entries as one change, also with none, and on a new session."""
    assert await store.rewrite("new", [b"0"], expected_version=0) == 1
    await store.append("k", [b"1", b"2"], expected_version=0)
    assert await store.rewrite("k", [b"3"], expected_version=1) == 2
    assert list((await store.load("k")).entries) == [b"3"]
    assert await store.rewrite("k", [], expected_version=2) == 3
    assert await store.append("k", [b"4"], expected_version=3) == 4
    assert list((await store.load("k")).entries) == [b"4"]
    assert list((await store.load("new")).entries) == [b"0"]


async def test_delete(store):
    """A deleted session is not there, and a new one can be in its place."""
    await store.append("k", [b"1"], expected_version=0)
    await store.append("other", [b"1"], expected_version=0)
    assert await store.delete("k")
    assert not await store.delete("k")
    assert (await store.load("k")).version == 0
    assert await store.append("k", [b"2"], expected_version=0) == 2
    assert list((await store.load("k")).entries) == [b"2"]
    assert list((await store.load("other")).entries) == [b"1"]


@pytest.mark.parametrize("how", ["delete", "erase"])
@pytest.mark.parametrize("method", ["append", "rewrite"])
async def test_no_version_comes_again(store, how, method):
    """Whoever has seen a session that has gone since neither writes to the new one in its place nor takes it for it."""
    write = getattr(store, method)
    for number in range(3):
        await store.append("k", [b"old"], expected_version=number)
    await store.append("other", [b"old"], expected_version=0)
    for key in ("k", "other"):
        await getattr(store, how)(key)
    version, seen = 0, set()
    for _ in range(5):
        version = await write("k", [b"new"], expected_version=version)
        seen.add(version)
        for old in {1, 2, 3} - {version}:
            with pytest.raises(gr.SessionConflictError):
                await write("k", [b"of old"], expected_version=old)
    assert seen == {4, 5, 6, 7, 8}
    assert set((await store.load("k")).entries) == {b"new"}
    assert await store.version("k") == 8
    assert (await store.list_sessions("k"))[0].version == 8
    # The versions of one session are above those of any that has gone: a store need not keep the names of those.
    assert await store.append("fresh", [], expected_version=0) == 4


async def test_keys_never_meet(store):
    """However alike two keys look, they are two sessions, and they are listed as they were given."""
    for number, key in enumerate(KEYS):
        await store.append(key, [str(number).encode()], expected_version=0)
    for number, key in enumerate(KEYS):
        assert list((await store.load(key)).entries) == [str(number).encode()]
    assert list(await store.list_keys()) == sorted(KEYS)


async def test_list_keys(store):
    """Keys come in code-point order, by prefix, in pages; special characters of anybody's patterns are none here."""
    keys = [f"u:{number:03}" for number in range(25)] + ["u", "u%", "u*", "u_1", "v", "U:000", "ü", "🌍", "\uffff"]
    for key in keys:
        await store.append(key, [], expected_version=0)
    assert list(await store.list_keys()) == sorted(keys)
    assert list(await store.list_keys("u:")) == [f"u:{number:03}" for number in range(25)]
    assert list(await store.list_keys("u%")) == ["u%"]
    assert list(await store.list_keys("u*")) == ["u*"]
    assert list(await store.list_keys("u_")) == ["u_1"]
    assert list(await store.list_keys("nobody")) == []
    pages: list[str] = []
    while page := await store.list_keys("u:", after=pages[-1] if pages else "", limit=10):
        assert len(page) <= 10
        pages += page
    assert pages == [f"u:{number:03}" for number in range(25)]


async def test_list_sessions(store):
    """What is known without the entries: version, how many entries, their bytes, and when the last change was."""
    await store.append("a", [b"12", b""], expected_version=0)
    await store.append("a", [b"345"], expected_version=1)
    await store.append("b", [b"1" * 100], expected_version=0)
    await store.rewrite("b", [b"22"], expected_version=1)
    await store.rewrite("c", [], expected_version=0)
    await store.append("gone", [b"1"], expected_version=0)
    await store.delete("gone")
    everything = [
        StoredSession("a", 2, 3, 5, AT_S),
        StoredSession("b", 2, 1, 2, AT_S),
        StoredSession("c", 1, 0, 0, AT_S),
    ]
    assert list(await store.list_sessions()) == everything
    assert list(await store.list_sessions("b")) == everything[1:2]
    assert list(await store.list_sessions(after="a", limit=1)) == everything[1:2]


async def test_a_limit_of_nothing(store):
    """Asked for no key, or for fewer, a store lists none."""
    await store.append("a", [], expected_version=0)
    for limit in (0, -1):
        assert list(await store.list_keys(limit=limit)) == []
        assert list(await store.list_sessions(limit=limit)) == []


async def test_a_limit_beyond_all(store):
    """However large it is, it is a limit."""
    await store.append("k", [b"1"], expected_version=0)
    assert list(await store.list_keys(limit=10**30)) == ["k"]
    assert [session.key for session in await store.list_sessions(limit=10**30)] == ["k"]


async def test_owners(store):
    """All of a tenant, or of a principal within it, has one prefix, however the names are written."""
    names = ["acme", "acme/x", "acme:", "ac%me", "", "acme/principal:bob"]
    made = [SessionKey(tenant=t, principal=p, id=i) for t in names for p in ("bob", "") for i in ("1", "bob/2")]
    for key in made:
        await store.append(str(key), [str(key).encode()], expected_version=0)
    for tenant in filter(None, names):
        found = [SessionKey.parse(key) for key in await store.list_keys(SessionKey.prefix(tenant=tenant))]
        assert sorted(found) == sorted(key for key in made if key.tenant == tenant)
        mine = await store.list_keys(SessionKey.prefix(tenant=tenant, principal="bob"))
        assert {SessionKey.parse(key).principal for key in mine} == {"bob"}
    for key in made:
        assert list((await store.load(str(key))).entries) == [str(key).encode()]


@pytest.mark.parametrize("key", ["", "\ud800", 42, b"k"])
async def test_keys_that_cannot_be(store, key):
    """An empty key, and one that is no text or no Unicode, is refused by every method and named."""
    for call in (store.load, store.version, store.delete, store.erase):
        with pytest.raises(gr.ConfigError, match="session: the key"):
            await call(key)
    for write in (store.append, store.rewrite):
        with pytest.raises(gr.ConfigError, match="session: the key"):
            await write(key, [b"1"], expected_version=0)
    assert list(await store.list_keys()) == []


async def test_durability_is_told(store):
    """A store says what a write survives; one that asks a server for it, once it was used."""
    await store.append("k", [], expected_version=0)
    assert store.durability in {"process", "disk", "none"}


async def test_what_was_loaded_stays_as_it_was(store):
    """A loaded history is a snapshot, and the caller's list is the caller's own."""
    mine = [b"1"]
    await store.append("k", mine, expected_version=0)
    mine.append(b"mine")
    before = await store.load("k")
    await store.append("k", [b"2"], expected_version=1)
    assert list(before.entries) == [b"1"]
    assert list((await store.load("k")).entries) == [b"1", b"2"]
    other = [b"3"]
    await store.rewrite("k", other, expected_version=2)
    other.append(b"mine")
    assert list((await store.load("k")).entries) == [b"3"]


async def test_one_of_many_writers_wins(store):
    """Of writers that have seen the same version, exactly one writes."""
    for version in range(5):
        outcomes: list[int] = []

        async def write(number, version=version, outcomes=outcomes):
            try:
                await store.append("k", [str(number).encode()], expected_version=version)
                outcomes.append(number)
            except gr.SessionConflictError:
                pass

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(write, number)
        assert len(outcomes) == 1
        assert (await store.load("k")).entries[-1] == str(outcomes[0]).encode()
    assert (await store.load("k")).version == 5


async def test_sessions_do_not_wait_for_each_other(store):
    """Many sessions are written at the same time, each with all its entries."""

    async def fill(number):
        for version in range(10):
            await store.append(f"k{number}", [b"%d.%d" % (number, version)], expected_version=version)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(fill, number)
    for number in range(50):
        assert list((await store.load(f"k{number}")).entries) == [b"%d.%d" % (number, v) for v in range(10)]


CALLS = {
    "load": lambda store: store.load("k"),
    "version": lambda store: store.version("k"),
    "append": lambda store: store.append("k", [b"2"], expected_version=1),
    "rewrite": lambda store: store.rewrite("k", [b"2"], expected_version=1),
    "delete": lambda store: store.delete("k"),
    "erase": lambda store: store.erase("k"),
    "list_keys": lambda store: store.list_keys(),
    "list_sessions": lambda store: store.list_sessions(),
}


@pytest.mark.parametrize("name", CALLS)
async def test_every_method_is_a_checkpoint(store, name):
    """Each call is a point where others run and cancels arrive."""
    await store.append("k", [b"1"], expected_version=0)
    with trio.testing.assert_checkpoints():
        await CALLS[name](store)
    with trio.testing.assert_checkpoints():
        await store.aclose()


@pytest.mark.parametrize("name", CALLS)
async def test_a_cancelled_call_did_everything_or_nothing(store, name):
    """Cancelled before it begins, a call changes nothing; cancelled later, its change is whole."""
    await store.append("k", [b"1"], expected_version=0)
    before = await store.load("k")
    with trio.CancelScope() as scope:
        scope.cancel()
        await CALLS[name](store)
    assert scope.cancelled_caught
    after = await store.load("k")
    assert (after.version, list(after.entries)) in [
        (before.version, list(before.entries)),
        (2, [b"1", b"2"] if name == "append" else [b"2"]),
        (0, []),
    ]
    await store.append("k", [b"3"], expected_version=after.version)


async def test_erase(store):
    """What was erased is gone, and the others are not."""
    await store.append("k", [b"1"], expected_version=0)
    await store.append("other", [b"2"], expected_version=0)
    assert await store.erase("k")
    assert not await store.erase("k")
    assert list(await store.list_keys()) == ["other"]
    assert (await store.load("k")).version == 0


async def test_repr_shows_no_history(store):
    """A store says what it is, not what is in it."""
    await store.append("k", [b"secret"], expected_version=0)
    assert "secret" not in repr(store)


async def test_closing_twice(opened):
    """`aclose` may be called again."""
    async with opened() as store:
        await store.aclose()


keys = st.sampled_from(["a", "b", "ab"])
some_entries = st.lists(st.binary(max_size=4), max_size=3)
writes = st.tuples(st.sampled_from(["append", "rewrite"]), keys, some_entries, st.sampled_from([0, 0, 0, 1, -1]))
listings = st.tuples(
    st.just("list_keys"), st.sampled_from(["", "a", "c"]), st.sampled_from(["", "a"]), st.integers(1, 3)
)
operations = st.one_of(writes, writes, st.tuples(st.just("delete"), keys), listings)


class Model:
    """A store as a dict of lists, which does to itself what it checks a store for."""

    def __init__(self):
        self.sessions: dict[str, tuple[int, list[bytes]]] = {}
        self.gone = 0

    async def step(self, store, name, *args):
        if name in {"append", "rewrite"}:
            await self.write(store, name, *args)
        elif name == "delete":
            version, _entries = self.sessions.pop(args[0], (0, []))
            self.gone = max(self.gone, version)
            assert await store.delete(args[0]) == (version > 0)
        else:
            prefix, after, limit = args
            expected = sorted(key for key in self.sessions if key.startswith(prefix) and key > after)[:limit]
            assert list(await store.list_keys(prefix, after=after, limit=limit)) == expected
            told = await store.list_sessions(prefix, after=after, limit=limit)
            assert list(told) == [self.describe(key) for key in expected]

    def describe(self, key):
        version, entries = self.sessions[key]
        return StoredSession(key, version, len(entries), sum(map(len, entries)), AT_S)

    async def write(self, store, name, key, entries, offset):
        version, stored = self.sessions.get(key, (0, []))
        if offset:
            with pytest.raises(gr.SessionConflictError):
                await getattr(store, name)(key, entries, expected_version=version + offset)
            return
        changed = (version or self.gone) + 1
        assert await getattr(store, name)(key, entries, expected_version=version) == changed
        self.sessions[key] = (changed, (stored if name == "append" else []) + entries)

    async def check(self, store):
        for key in ("a", "b", "ab"):
            loaded = await store.load(key)
            assert (loaded.version, list(loaded.entries)) == self.sessions.get(key, (0, []))
            assert await store.version(key) == loaded.version


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(operations, max_size=20))
def test_a_store_is_what_the_model_says(opened, steps):
    """Any sequence of operations gives what a dict of lists gives."""

    async def run():
        model = Model()
        async with opened() as store:
            for step in steps:
                await model.step(store, *step)
                await model.check(store)

    trio.run(run)


@pytest.mark.parametrize("method", ["append", "rewrite"])
async def test_a_memory_store_keeps_nothing_of_a_write_that_fails(method):
    """What is no bytes is refused, and neither makes the session nor counts as a change of it."""
    store = MemoryStore()
    entries: Any = [b"1", "2"]
    with pytest.raises(TypeError):
        await getattr(store, method)("k", entries, expected_version=0)
    assert await store.version("k") == 0
    await store.append("k", [b"1"], expected_version=0)
    with pytest.raises(TypeError):
        await getattr(store, method)("k", entries, expected_version=1)
    assert await store.load("k") == StoredHistory(1, (b"1",))
