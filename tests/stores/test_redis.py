"""The Redis store: what it keeps, what it warns of, what a broken connection does to a write, and who may write."""

from __future__ import annotations

import json
import logging
import math
import re
import signal
import statistics
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from redis_server import RedisProcess, fresh_prefix, running_redis, shared_redis

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError, SessionConflictError, StoreError
from gorouter_trio.pool.shared import MoneyAsk
from gorouter_trio.session.log import entries_of
from gorouter_trio.stores import HistoryAnalyzer, MemoryStore, RedisClient, RedisStore, import_kit_redis
from gorouter_trio.stores.redis_server import decide_report, rewrite_files
from gorouter_trio.testing.proxy import Chop, Cut, Stall, open_fault_proxy
from gorouter_trio.wire.codec import decode_log_entry

pytestmark = pytest.mark.net


@pytest.fixture
async def store():
    """A store on a server that others use as well."""
    async with RedisStore(shared_redis().url, prefix=fresh_prefix()) as made:
        yield made


@pytest.fixture
async def client():
    """A client beside it."""
    async with RedisClient(shared_redis().url) as made:
        yield made


# What is said of the server

GOOD = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory": "0", "maxmemory-policy": "noeviction"}


@pytest.mark.parametrize(
    ("change", "role", "ttl", "durability", "warns"),
    [
        ({}, "master", False, "aof-always", ()),
        ({"appendfsync": "everysec"}, "master", False, "aof-everysec", ()),
        ({"appendfsync": "no"}, "master", False, "aof-no", ("appendfsync no",)),
        ({"appendonly": "no", "save": "3600 1"}, "master", False, "rdb", ("snapshots only",)),
        ({"appendonly": "no"}, "master", False, "none", ("keeps nothing",)),
        ({}, "slave", False, "aof-always", ("no master",)),
        ({"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}, "master", False, "aof-always", ("allkeys-lru",)),
        ({"maxmemory": "100mb", "maxmemory-policy": "volatile-ttl"}, "master", True, "aof-always", ("volatile-ttl",)),
        ({"maxmemory": "100mb", "maxmemory-policy": "volatile-ttl"}, "master", False, "aof-always", ()),
    ],
)
def test_what_settings_come_to(change, role, ttl, durability, warns):
    """What a server keeps, and each way in which it may lose something, in a sentence."""
    report = decide_report(GOOD | change, role=role, has_ttl=ttl)
    assert report.durability == durability
    assert len(report.warnings) == len(warns)
    for warning, words in zip(report.warnings, warns, strict=True):
        assert words in warning


async def test_a_server_that_would_lose_everything_is_warned_of(caplog):
    """The first use says loudly that nothing is kept; a server that keeps everything is used in silence."""
    with caplog.at_level(logging.WARNING, "gorouter_trio.stores.redis"):
        with running_redis("--appendonly", "yes", "--appendfsync", "always", "--save", "") as server:
            async with RedisStore(server.url) as store:
                assert store.durability == "unknown"
                assert await store.append("k", [b"1"], expected_version=0) == 1
                assert store.durability == "aof-always"
        assert not caplog.records
        async with RedisStore(shared_redis().url) as store:
            told = await store.check()
            await store.check()
    assert told.durability == "none"
    (record,) = caplog.records
    assert "loses every session" in record.getMessage()
    assert told.warnings[0] in record.getMessage()


async def test_a_server_that_does_not_tell():
    """Where CONFIG is forbidden, as hosted servers do it, the store works and says that it does not know."""
    users = ("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-config", "-role")
    with running_redis("--save", "", *users) as server:
        async with RedisStore(server.url) as store:
            assert await store.append("k", [b"1"], expected_version=0) == 1
            assert store.durability == "unknown"
            assert "unknown" in store.statistics().warnings[0]


class Foreign:
    """Somebody's own client, with errors of its own."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client

    async def execute(self, *args):
        try:
            return await self._client.execute(*args)
        except StoreError as exc:
            raise RuntimeError(exc.message) from exc


async def test_a_server_that_does_not_tell_a_client_of_ones_own():
    """The store and the limits work; where nobody answers, they raise what the client raises."""
    users = ("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-config", "-role")
    with running_redis("--save", "", *users) as server:
        async with RedisClient(server.url, timeout_s=0.3) as client:
            store, limits = RedisStore(Foreign(client)), gr.redis.RedisLimits(Foreign(client))
            assert await store.append("k", [b"1"], expected_version=0) == 1
            assert "unknown" in (await store.check()).warnings[0]
            money = MoneyAsk(
                holder="a", spent_nano=0, wanted_nano=1, held_nano=0, least_nano=0, limit_nano=1, ttl_s=30.0
            )
            assert (await limits.take_money("m", money)).at_hand_nano == 1
            server.kill()
            with pytest.raises(RuntimeError):
                await store.check()


@pytest.mark.parametrize(
    "fields",
    [
        *({"prefix": ""}, {"prefix": "a{b}"}, {"prefix": 5}, {"client": object()}),
        *({"ttl_s": value} for value in (0, -1, math.nan, math.inf, 1e14, "60")),
    ],
    ids=lambda fields: re.sub(r" at 0x\w+", "", str(fields)),
)
async def test_settings_that_cannot_be(fields):
    """One clear error each, before anything is connected."""
    with pytest.raises(ConfigError, match=next(iter(fields))):
        RedisStore(fields.pop("client", "redis://h"), **fields)


# What it keeps


async def test_a_clock_of_another_kind():
    """Whatever number it gives, the session can be read."""
    url, prefix = shared_redis().url, fresh_prefix()
    async with RedisStore(url, prefix=prefix, wall=lambda: Decimal("5.5")) as store:  # type: ignore[arg-type,return-value]
        await store.append("k", [b"1"], expected_version=0)
        assert (await store.load("k")).entries == (b"1",)
        assert [session.updated_at_s for session in await store.list_sessions()] == [5.5]


async def test_sessions_expire(client):
    """A session goes its time after its last change, from the listings too, and the index forgets it."""
    prefix = fresh_prefix()
    async with RedisStore(client, prefix=prefix, ttl_s=0.15) as store:
        await store.append("kept", [b"1"], expected_version=0)
        await store.append("gone", [b"1"], expected_version=0)
        await trio.sleep(0.1)
        await store.append("kept", [b"2"], expected_version=1)
        await trio.sleep(0.1)
        assert await store.version("gone") == 0
        assert list(await store.list_keys()) == ["kept"]
        assert await store.append("gone", [b"new"], expected_version=0) == 3
        await trio.sleep(0.2)
        # What was never listed again goes with the writes of others.
        await store.append("new", [b"1"], expected_version=0)
        assert await client.execute("ZCARD", f"{{{prefix}}}:sessions") == 1
        assert await client.execute("ZCARD", f"{{{prefix}}}:due") == 1
    async with RedisStore(client, prefix=prefix) as store:
        await store.append("new", [b"2"], expected_version=await store.version("new"))
        assert await client.execute("PTTL", f"{{{prefix}}}:s:new") == -1


@pytest.mark.parametrize("notice", ["write", "list", "delete", "other"])
async def test_no_version_of_an_expired_session_comes_again(client, notice):
    """A session that went by its time is gone for whoever has seen it, however the store comes to know of that."""
    prefix = fresh_prefix()
    async with RedisStore(client, prefix=prefix, ttl_s=600) as store:
        for number in range(3):
            await store.append("k", [b"old"], expected_version=number)
        # What its time does.
        await client.execute("DEL", f"{{{prefix}}}:s:k")
        if notice == "list":
            assert list(await store.list_keys()) == []
        elif notice == "delete":
            assert not await store.delete("k")
        elif notice == "other":
            await client.execute("ZADD", f"{{{prefix}}}:due", 1, "k")
            await store.append("other", [], expected_version=0)
            assert await client.execute("ZCARD", f"{{{prefix}}}:sessions") == 1
        version = await store.append("k", [b"new"], expected_version=0)
        assert version == 4
        for old in (1, 2, 3):
            with pytest.raises(SessionConflictError):
                await store.append("k", [b"of old"], expected_version=old)
        assert list((await store.load("k")).entries) == [b"new"]


async def test_many_entries_at_a_time(store):
    """A fork of a long session is one write."""
    entries = [b"%d" % number for number in range(10_000)]
    await store.append("k", entries, expected_version=0)
    assert list((await store.load("k")).entries) == entries
    (told,) = await store.list_sessions()
    assert (told.entries, told.bytes) == (10_000, sum(map(len, entries)))


async def test_data_of_others(store, client):
    """What is in the place of a session is named: something else's, or a newer version's; it is left as it is."""
    prefix = store._prefix
    await client.execute("SET", f"{{{prefix}}}:s:text", "hello")
    await client.execute("RPUSH", f"{{{prefix}}}:s:list", "hello")
    await client.execute("RPUSH", f"{{{prefix}}}:s:newer", "gr2 7 0 0 x", "entry")
    for key, kind in (("text", "foreign"), ("list", "foreign"), ("newer", "newer")):
        for call in (store.load(key), store.append(key, [b"1"], expected_version=0)):
            with pytest.raises(StoreError) as caught:
                await call
            assert caught.value.kind == kind
    assert await client.execute("LRANGE", f"{{{prefix}}}:s:newer", 0, -1) == [b"gr2 7 0 0 x", b"entry"]


async def test_reindex(store, client):
    """Sessions that an index has lost, as after restoring single keys, are found again."""
    for number in range(30):
        await store.append(f"k*{number:02}", [], expected_version=0)
    await client.execute("DEL", f"{{{store._prefix}}}:sessions")
    assert list(await store.list_keys()) == []
    assert await store.reindex() == 30
    assert len(await store.list_keys()) == 30


async def test_erasing_leaves_no_trace():
    """What was erased stands in no file of the server, nor does what was deleted before."""
    with running_redis("--appendonly", "yes") as server:
        async with RedisStore(server.url) as store:
            await store._ask("CONFIG", "SET", "save", "3600 1")
            await store.append("other", [b"stays"], expected_version=0)
            for key in ("a", "b"):
                await store.append(key, [b"s3cret " + key.encode()], expected_version=0)
            await store._ask("SAVE")
            assert _files_with(server.directory, b"s3cret")
            await store.delete("b")
            assert await store.erase("a")
            assert not _files_with(server.directory, b"s3cret")
            assert _files_with(server.directory, b"stays")


class Rewriting:
    """A server that takes a second to write its files, and refuses to begin meanwhile, as a Redis does."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.until = 0.0

    async def ask(self, *command):
        await trio.sleep(0.001)
        is_busy = trio.current_time() < self.until
        if command[0] == "INFO":
            return b"aof_enabled:1\r\nrdb_saves:1\r\naof_rewrite_in_progress:%d\r\n" % is_busy
        if command[0] == "CONFIG":
            return [b"save", b""]
        if is_busy and command[0] == "BGREWRITEAOF":
            raise StoreError("ERR Background append only file rewriting already in progress", kind="refused")
        if is_busy:
            raise StoreError("ERR Another child process is active (AOF?): can't BGSAVE right now", kind="refused")
        self.begun.append(command[0])
        self.until = trio.current_time() + 1
        return b"OK"


async def test_two_erasures_at_once(autojump_clock):
    """Each has the server write its files after its own deletion, the second behind the first: none is refused."""
    server = Rewriting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rewrite_files, server.ask)
        nursery.start_soon(rewrite_files, server.ask)
    assert sorted(server.begun) == ["BGREWRITEAOF", "BGREWRITEAOF", "BGSAVE", "BGSAVE"]


def _files_with(directory: Path, text: bytes) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and text in path.read_bytes()]


async def test_the_analyzer(store):
    """What histories add up to works on it as on every store."""
    assert (await HistoryAnalyzer(store).statistics()).calls == 0


# Writes over connections that break


@pytest.mark.parametrize("after", range(0, 30, 3))
async def test_a_write_counts_once(rng, after):
    """Wherever the connection breaks, with the write carried out or not, it is sent again and counts once."""
    server = shared_redis()
    async with RedisStore(server.url, prefix=fresh_prefix()) as plain:
        await plain.append("warm", [], expected_version=0)
        async with (
            open_fault_proxy("127.0.0.1", server.port, rng=rng) as proxy,
            RedisStore(f"redis://{proxy.host}:{proxy.port}", prefix=plain._prefix) as store,
        ):
            await store.check()
            bytes_down = proxy.statistics().bytes_down
            proxy.sever_all()
            proxy.set_plan([[Chop(size=7), Cut(direction="down", after=bytes_down + after)]] * 2)
            for version in range(6):
                assert await store.append("k", [b"%d" % version], expected_version=version) == version + 1
            assert list((await store.load("k")).entries) == [b"%d" % version for version in range(6)]


async def test_writes_while_connections_break_all_the_time(rng, record_property):
    """Twenty writers through connections that are cut and stall at random: each write is there once, in order."""
    server = shared_redis()

    def plan(_number):
        cut = rng.choice([Cut(direction="up", after=rng.randint(1, 9_000)), Cut(after=rng.randint(1, 1_200))])
        return [Stall(after=rng.randint(1, 1_200), for_s=0.05), cut]

    async with open_fault_proxy("127.0.0.1", server.port, plan=plan, rng=rng) as proxy:
        store = RedisStore(f"redis://{proxy.host}:{proxy.port}", prefix=fresh_prefix(), timeout_s=20)

        async def write(number):
            for version in range(15):
                data = b"%d.%d" % (number, version)
                assert await store.append(f"k{number}", [data], expected_version=version) == version + 1

        async with store:
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(write, number)
            for number in range(20):
                stored = await store.load(f"k{number}")
                assert list(stored.entries) == [b"%d.%d" % (number, version) for version in range(15)]
        cuts = len(proxy.strikes)
    assert cuts > 3
    record_property("figure", f"300 writes over {cuts} broken connections: 0 lost, 0 twice")


async def test_a_stopped_server_does_not_hold_a_turn(record_property):
    """The answer of a turn that cannot be stored reaches its asker in time, complete."""
    with running_redis("--appendonly", "yes") as server:
        async with (
            RedisStore(server.url, timeout_s=0.4) as store,
            gr.simulator.open_simulated_network(gr.simulator.Simulator()) as network,
            gr.open_client(
                api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network, store=store
            ) as client,
        ):
            session = client.session("k")
            await session.ask("[[say one]]")

            async def stop_when_sent():
                while (await session.statistics()).waits_for != "model":
                    await trio.lowlevel.checkpoint()
                server.signal(signal.SIGSTOP)

            start = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_when_sent)
                with pytest.raises(gr.HistoryNotSaved) as caught:
                    await session.ask("[[delay 0.1]] [[say paid]]")
            took_s = trio.current_time() - start
            server.signal(signal.SIGCONT)
            assert caught.value.partial is not None
            assert "paid" in caught.value.partial.text
            assert isinstance(caught.value.__cause__, StoreError)
            assert (await session.ask("[[say again]]")).text
    assert took_s < 3
    record_property("figure", f"paid answer delivered with HistoryNotSaved {took_s:.2f} s after it was asked for")


# Leases


async def test_a_lease_shuts_others_out(store):
    """Who has the lease writes; who has none, or an older one, conflicts and changes nothing."""
    first = await store.acquire_lease("k", owner="a", lease_s=5)
    assert first.lease is not None
    assert first.version == 0
    other = await store.acquire_lease("k", owner="b", lease_s=5)
    assert other.lease is None
    assert 4 < other.held_s <= 5
    with pytest.raises(SessionConflictError, match="owned by another process"):
        await store.append("k", [b"x"], expected_version=0)
    lease = first.lease
    assert await store.append_leased("k", [b"1"], expected_version=0, lease=lease, lease_s=5) == 1
    assert await store.rewrite_leased("k", [b"2"], expected_version=1, lease=lease, lease_s=5) == 2
    again = await store.acquire_lease("k", owner="a", lease_s=5)
    assert again.lease is not None
    assert again.lease.token > lease.token
    with pytest.raises(SessionConflictError):
        await store.append_leased("k", [b"x"], expected_version=2, lease=lease, lease_s=5)
    await store.release_leases([lease])
    assert (await store.acquire_lease("k", owner="b", lease_s=5)).lease is None
    await store.release_leases([again.lease])
    taken = await store.acquire_lease("k", owner="b", lease_s=5)
    assert taken.lease is not None
    assert taken.version == 2
    assert await store.renew_leases([again.lease, taken.lease], lease_s=5) == [again.lease]


@pytest.mark.parametrize("lease_s", [math.inf, 1e15])
async def test_a_lease_without_an_end(store, lease_s):
    """It is held for as long as the server can count, and renewed as any."""
    offer = await store.acquire_lease("k", owner="one", lease_s=lease_s)
    lease = offer.lease
    assert await store.append_leased("k", [b"1"], expected_version=0, lease=lease, lease_s=lease_s) == 1
    assert await store.renew_leases([lease], lease_s=lease_s) == []
    other = await store.acquire_lease("k", owner="other", lease_s=1)
    assert other.lease is None
    assert other.held_s > 1e9


async def test_a_lease_runs_out(store):
    """After its time anybody may have the session; its owner may go on until somebody has."""
    owner = (await store.acquire_lease("k", owner="a", lease_s=0.05)).lease
    await trio.sleep(0.08)
    assert await store.append_leased("k", [b"1"], expected_version=0, lease=owner, lease_s=0.05) == 1
    await trio.sleep(0.08)
    assert await store.renew_leases([owner], lease_s=0.05) == []
    await trio.sleep(0.08)
    taken = await store.acquire_lease("k", owner="b", lease_s=5)
    assert taken.lease is not None
    for call in (
        store.append_leased("k", [b"2"], expected_version=1, lease=owner, lease_s=5),
        store.rewrite_leased("k", [b"2"], expected_version=1, lease=owner, lease_s=5),
    ):
        with pytest.raises(SessionConflictError, match="owned by another process"):
            await call
    assert list((await store.load("k")).entries) == [b"1"]


async def test_who_waits_is_next(store):
    """A session that one process asks for again and again is had by another that waits for it."""
    first = (await store.acquire_lease("k", owner="a", lease_s=5)).lease
    assert (await store.acquire_lease("k", owner="b", lease_s=5)).lease is None
    await store.release_leases([first])
    assert (await store.acquire_lease("k", owner="a", lease_s=5)).lease is None
    assert (await store.acquire_lease("k", owner="b", lease_s=5)).lease is not None


# What the server is asked


async def test_no_command_grows_with_the_sessions(record_property):
    """MONITOR sees nothing that takes the longer the more sessions there are, whatever the store is asked to do."""
    with running_redis() as server:
        async with RedisClient(server.url) as client, RedisStore(client) as store:
            seen = await _monitored(server, store)
            before = await _slowest(client, store)
            for first in range(0, 20_000, 1000):
                pipeline: list[Any] = [
                    ("ZADD", "{gorouter}:sessions", 0, f"x{first + number}") for number in range(1000)
                ]
                pipeline += [("RPUSH", f"{{gorouter}}:s:x{first + n}", "gr1 1 0 0.0 w") for n in range(1000)]
                await client.execute_together(*pipeline)
            after = await _slowest(client, store)
    names = {line.split('"')[1].upper() for line in seen}
    assert names <= {
        *("HELLO", "CONFIG", "ROLE", "EVALSHA", "EVAL", "LRANGE", "LINDEX", "INFO", "GET", "SET", "RPUSH", "LSET"),
        *(
            "ZADD",
            "UNLINK",
            "PERSIST",
            "ZREM",
            "ZRANGEBYLEX",
            "LLEN",
            "INCR",
            "DEL",
            "PTTL",
            "PEXPIRE",
            "MULTI",
            "EXEC",
        ),
        *("HGET", "HSET", "EXISTS", "TYPE", "ZSCORE"),
    }
    assert not names & {"KEYS", "SCAN", "SMEMBERS", "HGETALL", "SORT"}
    record_property(
        "figure",
        f"{len(names)} commands seen; ping while listing: {before * 1e3:.2f} ms, with 20,000 {after * 1e3:.2f}",
    )
    assert after < 0.05


async def _monitored(server: RedisProcess, store: RedisStore) -> list[str]:
    """What the server carries out while each method of the store is used."""
    seen: list[str] = []
    with trio.socket.socket(trio.socket.AF_UNIX) as monitor:
        await monitor.connect(server.socket)
        await monitor.send(b"MONITOR\r\n")
        await monitor.recv(100)
        for version in range(3):
            await store.append("k", [b"1"], expected_version=version)
        await store.rewrite("k", [b"1"], expected_version=3)
        await store.load("k")
        await store.version("k")
        await store.list_sessions()
        lease = (await store.acquire_lease("k", owner="a", lease_s=1)).lease
        assert lease is not None
        await store.renew_leases([lease], lease_s=1)
        await store.release_leases([lease])
        await store.erase("k")
        seen += (await monitor.recv(1 << 20)).decode().splitlines()
    return [line for line in seen if '"' in line]


async def _slowest(client, store):
    """The 99th percentile of a ping while everything is listed."""
    took: list[float] = []
    async with trio.open_nursery() as nursery:

        async def ping():
            while True:
                start = time.perf_counter()
                await client.execute("PING")
                took.append(time.perf_counter() - start)

        nursery.start_soon(ping)
        for _ in range(2):
            await store.list_keys(limit=30_000)
        nursery.cancel_scope.cancel()
    return statistics.quantiles(took, n=100)[98] if len(took) > 2 else max(took, default=0.0)


# GoRouter Kit


async def test_sessions_of_gorouter_kit(client):
    """Both of its forms come in, entries with what they cost; what is torn or something else's is named."""
    prefix = f"{fresh_prefix()}*[x]:"
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    told = {"call_id": "gen-1", "model_used": "m", "usage": usage, "cost": 0.25, "timestamp": 1_700_000_000_000}
    entries = [
        {"message": {"role": "user", "content": "hi"}},
        {"message": {"role": "assistant", "content": "hello"}, "api_call_metadata": told},
    ]
    bare = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    await client.execute("SET", f"{prefix}user42", json.dumps(entries))
    await client.execute("SET", f"{prefix}old_one", json.dumps(bare))
    await client.execute("SET", f"{prefix}torn", '[{"message"')
    await client.execute("RPUSH", f"{prefix}list", "a")
    await client.execute("SET", f"{prefix[:-4]}other", "[]")
    store = MemoryStore()
    report = await import_kit_redis(client, store, prefix=prefix)
    assert report.imported == 2
    assert len(report.problems) == 2
    assert any("old_one" in note for note in report.notes)
    for key, cost in (("user42", "0.25"), ("old_one", None)):
        history = list(entries_of(map(decode_log_entry, (await store.load(key)).entries)))
        assert [entry.message.content for entry in history] == ["hi", "hello"]
        call = history[1].call
        if cost is not None:
            assert call is not None
            assert call.usage is not None
            assert str(call.usage.cost) == cost
    again = await import_kit_redis(client, store, prefix=prefix)
    assert (again.imported, again.unchanged) == (0, 2)
    await client.execute("SET", f"{prefix}user42", json.dumps(entries[:1]))
    assert "differs" in "".join((await import_kit_redis(client, store, prefix=prefix)).problems)
    assert (await import_kit_redis(client, store, prefix=prefix, replace=True)).replaced == 1
