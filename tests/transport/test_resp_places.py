"""The Redis client where there are several servers: sentinels that name the master, and a cluster."""

from __future__ import annotations

import binascii
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from redis_server import RedisProcess, free_port, running_redis

from gorouter_trio.errors import StoreError
from gorouter_trio.stores import MemoryStore, RedisStore, import_kit_redis
from gorouter_trio.transport.resp import RespReader
from gorouter_trio.transport.resp_client import RedisClient

pytestmark = pytest.mark.net


@contextmanager
def running_sentinel(master: RedisProcess) -> Iterator[RedisProcess]:
    """A sentinel, which is enough by itself here, that takes a master for dead after 0.2 s."""
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        config = Path(directory) / "sentinel.conf"
        config.write_text(
            f"sentinel monitor main 127.0.0.1 {master.port} 1\n"
            "sentinel down-after-milliseconds main 200\n"
            "sentinel failover-timeout main 2000\n"
        )
        sentinel = RedisProcess(directory, port=free_port(), config=config)
        sentinel.start()
        try:
            yield sentinel
        finally:
            sentinel.kill()


async def wait_for(condition, *, within_s=10.0):
    """Poll until it holds."""
    with trio.fail_after(within_s):
        while not await condition():
            await trio.sleep(0.02)


@pytest.mark.parametrize("failovers", [1, pytest.param(20, marks=pytest.mark.long)])
async def test_sentinels(record_property, failovers):
    """The master is the one that a sentinel names; when it dies, writes go on with the next, and none twice."""
    took = []
    for _ in range(failovers):
        with ExitStack() as stack:
            master = stack.enter_context(running_redis(with_port=True))
            replica = stack.enter_context(
                running_redis("--save", "", "--replicaof", "127.0.0.1", str(master.port), with_port=True)
            )
            sentinel = stack.enter_context(running_sentinel(master))

            async def is_synced(master=master, sentinel=sentinel):
                info = master.ask("INFO", "replication")
                return "state=online" in info and "slaves=1" in sentinel.ask("INFO", "sentinel")

            await wait_for(is_synced)
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/main"
            start = 0.0
            async with RedisStore(url, timeout_s=10) as store:
                for number in range(20):
                    await store.append("k", [b"%d" % number], expected_version=number)
                    if number == 10:
                        # What the replica has not yet is what such a Redis may lose.
                        await wait_for(lambda master=master, replica=replica: _is_level(master, replica))
                        master.kill()
                        start = trio.current_time()
                    if number == 11:
                        took.append(trio.current_time() - start)
                assert [int(entry) for entry in (await store.load("k")).entries] == list(range(20))
    record_property("figure", f"{failovers} failovers: writes went on after at most {max(took):.1f} s; 0 lost, 0 twice")


async def _is_level(master: RedisProcess, replica: RedisProcess) -> bool:
    return _offset(master) == _offset(replica)


def _offset(server: RedisProcess) -> str:
    info = server.ask("INFO", "replication")
    return next(line for line in info.splitlines() if line.startswith("master_repl_offset"))


async def test_a_sentinel_that_does_not_know():
    """A master that no sentinel knows is said to be unknown, by the deadline."""
    with running_redis(with_port=True) as master, running_sentinel(master) as sentinel:
        async with RedisClient(f"redis+sentinel://127.0.0.1:{sentinel.port}/other", timeout_s=0.5) as client:
            with trio.fail_after(2), pytest.raises(StoreError, match="knows no master 'other'") as caught:
                await client.execute("PING")
            assert caught.value.kind == "unreachable"


@contextmanager
def running_cluster() -> Iterator[tuple[RedisProcess, RedisProcess]]:
    """Two nodes, the first with all slots but that of `{two}`, which the second has."""
    options = ("--save", "", "--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    with running_redis(*options, with_port=True) as one, running_redis(*options, with_port=True) as two:
        slot = binascii.crc_hqx(b"two", 0) % 16_384
        others = [str(number) for number in range(16_384) if number != slot]
        for first in range(0, len(others), 4000):
            assert "OK" in one.ask("CLUSTER", "ADDSLOTS", *others[first : first + 4000])
        two.ask("CLUSTER", "ADDSLOTS", str(slot))
        one.ask("CLUSTER", "SET-CONFIG-EPOCH", "1")
        two.ask("CLUSTER", "SET-CONFIG-EPOCH", "2")
        one.ask("CLUSTER", "MEET", "127.0.0.1", str(two.port))
        yield one, two


async def test_cluster():
    """A node that has not the slot says who has; that is remembered. A slot that moves is followed, key by key."""
    with running_cluster() as (one, two):

        async def is_whole():
            return all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in (one, two))

        await wait_for(is_whole)
        async with RedisClient(one.url) as client:
            for number in range(20):
                assert await client.execute("INCR", "{two}n") == number + 1
                assert await client.execute("INCR", "one") == number + 1
            assert client.is_cluster
            # Two nodes and no more than one detour.
            assert client.statistics().connected == 2
            assert client.statistics().commands < 60
            async with RedisStore(client, prefix="two") as store:
                for version in range(5):
                    await store.append("k", [b"%d" % version], expected_version=version)
                await store.append("a", [], expected_version=0)
                assert list(await store.list_keys()) == ["a", "k"]
                assert len((await store.load("k")).entries) == 5
            slot = str(binascii.crc_hqx(b"two", 0) % 16_384)
            ids = [node.ask("CLUSTER", "MYID").splitlines()[1] for node in (one, two)]
            one.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[1])
            two.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[0])
            assert await client.execute("SET", "{two}new", "a") == b"OK"
            assert await client.execute("GET", "{two}new") == b"a"
            assert "ASK" in two.ask("GET", "{two}new")
            assert await client.execute("GET", "{two}n") == b"20"
            for refused in (client.execute_together(("PING",)), client.execute_blocking("BLPOP", "a", 0, wait_s=1)):
                with pytest.raises(StoreError, match="cluster") as caught:
                    await refused
                assert caught.value.kind == "refused"


async def test_the_node_that_has_the_sessions_is_asked():
    """What is about a server and not about a key is said to the one that has the sessions: erasing, and reindexing."""
    with running_cluster() as (one, two):

        async def is_whole():
            return all("cluster_state:ok" in node.ask("CLUSTER", "INFO") for node in (one, two))

        await wait_for(is_whole)
        two.ask("CONFIG", "SET", "appendonly", "yes")
        async with RedisStore(one.url, prefix="two") as store:
            for key in ("k", "other"):
                await store.append(key, [b"a secret text"], expected_version=0)
            two.ask("DEL", "{two}:sessions")
            assert await store.reindex() == 2
            assert list(await store.list_keys()) == ["k", "other"]
            await store.append("k", [b"a secret text"], expected_version=1)
            await store.delete("other")
            assert await store.erase("k")
        async with RedisClient(one.url) as client:
            two.ask("SET", "chat_history:{two}", "[]")
            report = await import_kit_redis(client, MemoryStore())
            assert report.imported == 0
            assert "the node of the URL" in report.notes[0]
        files = [file for file in two.directory.rglob("*") if file.is_file()]
        assert any("aof" in file.name for file in files)
        assert [file for file in files if b"a secret text" in file.read_bytes()] == []


class Nodes:
    """A cluster in memory: the node at port 7000 has no slot, and says that all are at `home`; `down` are dead."""

    def __init__(self, nursery):
        self._nursery = nursery
        self.home = 7001
        self.down: set[int] = set()
        self.open: dict[trio.abc.Stream, int] = {}
        self.tried: list[int] = []

    async def connect(self, _host, port):
        self.tried.append(port)
        if port in self.down:
            raise ConnectionRefusedError
        ours, theirs = trio.testing.memory_stream_pair()
        self.open[theirs] = port
        self._nursery.start_soon(self._serve, theirs, port)
        return ours

    async def _serve(self, stream, port):
        reader = RespReader()
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            while data := await stream.receive_some():
                for command in reader.feed(data):
                    await stream.send_all(self._answer(command, port))
        del self.open[stream]

    def _answer(self, command, port):
        if command[0] == b"HELLO":
            return b"%2\r\n+version\r\n+7.0.0\r\n+mode\r\n+cluster\r\n"
        return b"-MOVED 12182 h:%d\r\n" % self.home if port == 7000 else b"+from %d\r\n" % port

    async def die(self, port):
        """The node is gone, with its connections."""
        self.down.add(port)
        for stream in [stream for stream, of in self.open.items() if of == port]:
            await stream.aclose()


@pytest.mark.parametrize("again", [False, True])
async def test_a_node_of_a_cluster_that_is_gone(autojump_clock, again):
    """Who has its slots now is asked of the node of the URL, again while that knows no better, and remembered."""
    async with trio.open_nursery() as nursery:
        nodes = Nodes(nursery)
        async with RedisClient("redis://h:7000", network=nodes, timeout_s=5, seed=1) as client:

            async def send():
                if again:
                    return await client.execute_again("GET", "foo")
                try:
                    return await client.execute("GET", "foo")
                except StoreError as exc:
                    if exc.kind != "io":
                        raise
                # The connection had broken: whether it was carried out was unknown. It is asked anew.
                return await client.execute("GET", "foo")

            assert await send() == b"from 7001"
            await nodes.die(7001)
            nodes.home = 7002
            assert await send() == b"from 7002"
            commands = client.statistics().commands
            assert await send() == b"from 7002"
            assert client.statistics().commands == commands + 1, "it is remembered"

            await nodes.die(7002)
            nodes.tried.clear()

            async def fail_over():
                await trio.sleep(2)
                nodes.home = 7003

            nursery.start_soon(fail_over)
            assert await send() == b"from 7003"
            assert 2 <= nodes.tried.count(7002) <= 20

            await nodes.die(7003)
            with pytest.raises(StoreError) as caught:
                await send()
            # Sent again, it was sent once before, and what became of that is unknown.
            assert caught.value.kind == ("io" if again else "unreachable")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("url", "told", "host"), [("h", "::1", "::1"), ("h", "", "h"), ("[::2]", "", "::2")])
async def test_where_a_node_sends_commands(autojump_clock, url, told, host):
    """An IPv6 address has no brackets there, and no host means that of the node which says so."""
    dialled = []

    class Network(Nodes):
        async def connect(self, host, port):
            dialled.append((host, port))
            return await super().connect(host, port)

        def _answer(self, command, port):
            return super()._answer(command, port).replace(b" h:", b" %b:" % told.encode())

    async with trio.open_nursery() as nursery, RedisClient(f"redis://{url}:7000", network=Network(nursery)) as client:
        assert await client.execute("GET", "foo") == b"from 7001"
        nursery.cancel_scope.cancel()
    assert dialled[1] == (host, 7001)
