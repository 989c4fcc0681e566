"""The Redis client against real servers: all forms of it, and everything that may go wrong with them."""

from __future__ import annotations

import signal
import ssl
import time
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from redis_server import RedisProcess, free_port, fresh_prefix, running_redis, shared_redis

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError, StoreError
from gorouter_trio.testing.proxy import Chop, Cut, Delay, Stall, open_fault_proxy
from gorouter_trio.transport.memory import memory_stream_pair
from gorouter_trio.transport.resp import RespReader
from gorouter_trio.transport.resp_client import RedisClient, RedisScript

pytestmark = pytest.mark.net

ADD = RedisScript("return redis.call('INCRBY', KEYS[1], ARGV[1])", "0f6dd3e1e3d1b2ee9b6b6b1d9f2b8f5a4a3f9d77")


@pytest.fixture
async def redis():
    """A client of a server that others use as well."""
    async with RedisClient(shared_redis().url) as client:
        yield client


@pytest.fixture
def name():
    """A key that nobody else has."""
    return fresh_prefix()


async def test_commands(redis, name):
    """What goes in comes out; many callers share sends."""
    assert await redis.execute("SET", name, b"\x00\xff") == b"OK"
    assert await redis.execute("GET", name) == b"\x00\xff"
    assert await redis.execute("HSET", f"{name}h", "a", 1, b"b", 2.5) == 2
    assert await redis.execute("HGETALL", f"{name}h") == {b"a": b"1", b"b": b"2.5"}
    before = redis.statistics()

    async def count():
        for _ in range(20):
            await redis.execute("INCR", f"{name}n")

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(count)
    after = redis.statistics()
    assert await redis.execute("GET", f"{name}n") == b"1000"
    assert after.sends - before.sends < 250
    assert after.connected == 1


async def test_errors_keep_the_connection(redis, name):
    """A refusal is the caller's, and nobody else hears of it."""
    await redis.execute("SET", name, "a")
    with pytest.raises(StoreError, match=r"LPUSH.*WRONGTYPE") as caught:
        await redis.execute("LPUSH", name, "b")
    assert caught.value.kind == "foreign"
    with pytest.raises(StoreError, match="unknown command") as caught:
        await redis.execute("NONSENSE")
    assert caught.value.kind == "refused"
    assert redis.statistics().connected == 1


@pytest.mark.parametrize(
    ("url", "settings", "named"),
    [
        (None, {}, "the URL must be a text"),
        (b"redis://h", {}, "the URL must be a text"),
        ("redis://h", {"timeout_s": "5"}, "timeout_s"),
        ("redis://h", {"timeout_s": None}, "timeout_s"),
        ("redis://h", {"name": None}, "name"),
    ],
)
def test_settings_of_the_wrong_kind(url, settings, named):
    """A variable that is not set gives None, and one that is a text: each is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=f"^redis: {named}"):
        RedisClient(url, **settings)


@pytest.mark.parametrize(
    "command",
    [
        *[("MULTI",), ("SELECT", 1), ("blpop", "a", 0), (b"SUBSCRIBE", "a"), ()],
        *[("XREAD", "BLOCK", 0, "STREAMS", "a", "$"), (b"xread", b"block", 0, b"STREAMS", b"a", b"$")],
        # What is not answered would be answered with the next caller's reply.
        *[("UNSUBSCRIBE",), (b"unsubscribe", "a"), ("PUnsubscribe", "a*"), ("SUNSUBSCRIBE", "a")],
        *[("CLIENT", "REPLY", "SKIP"), (b"client", b"reply", b"OFF"), ("Client", "Reply", "ON")],
    ],
)
async def test_what_a_shared_connection_does_not_take(redis, command):
    """Commands that change or block it for everybody are refused before anything is sent."""
    with pytest.raises(ConfigError, match="redis:"):
        await redis.execute(*command)
    with pytest.raises(ConfigError, match="redis:"):
        await redis.execute_together(("PING",), command)
    assert await redis.execute("CLIENT", "GETNAME") == b"gorouter-trio"


async def test_transactions(redis, name):
    """A transaction is one step; an error in it is raised, and does not end the connection."""
    assert await redis.execute_together(("INCR", name), ("INCRBY", name, 5)) == [1, 6]
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await redis.execute_together(("INCR", name), ("LPUSH", name, 1))
    with pytest.raises(StoreError, match="to NONSENSE: ERR unknown command"):
        await redis.execute_together(("INCR", name), ("NONSENSE",))
    assert await redis.execute("GET", name) == b"7"


async def test_transactions_that_the_server_does_not_take():
    """They say why, in the words for the one command that was refused, and a replica is not asked again."""
    with running_redis("--save", "") as server:
        async with RedisClient(server.url) as client:
            await client.execute("CONFIG", "SET", "maxmemory", 1)
            with pytest.raises(StoreError, match="to SET: its memory is full") as caught:
                await client.execute_together(("SET", "a", "b"), ("GET", "a"))
            assert caught.value.kind == "full"
            await client.execute("CONFIG", "SET", "maxmemory", 0)
            await client.execute("REPLICAOF", "127.0.0.1", 1)
            with pytest.raises(StoreError, match="to SET: it is a replica") as caught:
                await client.execute_together(("GET", "a"), ("SET", "a", "b"))
            assert caught.value.kind == "read_only"
            assert client.statistics().connected == 1
            assert await client.execute("PING") == b"PONG"
            assert client.statistics().connected == 2


async def test_scripts(redis, name):
    """A server that has not the script yet, or any more, is sent its text."""
    for expected in (2, 4):
        assert await redis.evaluate(ADD, keys=(name,), args=(2,)) == expected
    await redis.execute("SCRIPT", "FLUSH")
    assert await redis.evaluate(ADD, keys=(name,), args=(2,)) == 6


async def test_blocking_commands(redis, name):
    """One that blocks keeps nobody else waiting; one that is cancelled takes nothing from the next."""
    async with trio.open_nursery() as nursery:

        async def pop():
            assert await redis.execute_blocking("BLPOP", name, 5, wait_s=5) == [name.encode(), b"a"]

        nursery.start_soon(pop)
        await trio.sleep(0.02)
        assert await redis.execute("PING") == b"PONG"
        with trio.move_on_after(0.02) as scope:
            await redis.execute_blocking("BLPOP", f"{name}other", 0, wait_s=5)
        assert scope.cancelled_caught
        await redis.execute("RPUSH", f"{name}other", "kept")
        await redis.execute("RPUSH", name, "a")
    assert await redis.execute_blocking("BLPOP", f"{name}other", 1, wait_s=1) == [f"{name}other".encode(), b"kept"]
    assert await redis.execute_blocking("BLPOP", name, 0.01, wait_s=0.01) is None


@pytest.mark.parametrize(
    "command", [(), ("SELECT", 3), (b"multi",), ("SUBSCRIBE", "c"), ("CLIENT", "REPLY", "OFF")], ids=str
)
async def test_what_no_connection_for_blocking_takes(redis, name, command):
    """What changes a connection that a later call gets is refused: that one would see another database."""
    with pytest.raises(ConfigError, match="redis:"):
        await redis.execute_blocking(*command, wait_s=0.01)
    await redis.execute_blocking("RPUSH", name, "here", wait_s=0.01)
    assert await redis.execute("LRANGE", name, 0, -1) == [b"here"]


async def test_cancelled_blocking_commands_leave_no_connection(autojump_clock):
    """An idle connection is still there for the next call when the one that would have had it was cancelled before."""
    async with trio.open_nursery() as nursery:
        server = Counting(nursery)
        async with RedisClient("redis://h", network=server) as client:
            for _ in range(3):
                await client.execute_blocking("BLPOP", "q", 0, wait_s=1)
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await client.execute_blocking("BLPOP", "q", 0, wait_s=1)
                assert scope.cancelled_caught
                assert server.connections == 1
        nursery.cancel_scope.cancel()


async def test_blocking_commands_leave_a_replica():
    """A connection to what is no master any more is not kept: the next call would get nothing but its refusal."""
    with running_redis("--save", "") as server:
        async with RedisClient(server.url) as client:
            await client.execute("REPLICAOF", "127.0.0.1", 1)
            for made in (2, 3):
                with pytest.raises(StoreError, match="replica"):
                    await client.execute_blocking("BLPOP", "q", 0.01, wait_s=0.01)
                assert client.statistics().connected == made


async def test_subscriptions(redis, name):
    """Messages come in order, by channel and by pattern; a cancelled `receive` loses none."""
    async with redis.subscribe(name, patterns=[f"{name}.*"]) as messages:
        with trio.move_on_after(0.01):
            await messages.receive()
        for number in range(5):
            await redis.execute("PUBLISH", name, number)
        await redis.execute("PUBLISH", f"{name}.x", "last")
        got = [await messages.receive() for _ in range(6)]
    assert [message.data for message in got] == [b"0", b"1", b"2", b"3", b"4", b"last"]
    assert got[5].channel == f"{name}.x".encode()


async def test_databases_and_sockets(name):
    """The database of the URL is the one used, over a Unix socket as well."""
    server = shared_redis()
    async with RedisClient(f"{server.url}/1") as one, RedisClient(f"unix://{server.socket}?db=1") as same:
        await one.execute("SET", name, "a")
        assert await same.execute("GET", name) == b"a"
    async with RedisClient(server.url) as zero:
        assert await zero.execute("EXISTS", name) == 0


async def test_passwords():
    """A password alone, and a user with one; a wrong one is refused at once, and shows nowhere."""
    users = (
        "--user",
        "default",
        "on",
        ">general",
        "~*",
        "&*",
        "+@all",
        "--user",
        "ada",
        "on",
        ">l0velace",
        "~a*",
        "+@all",
    )
    with running_redis("--save", "", *users) as server:
        for good in (":general", "ada:l0velace"):
            async with RedisClient(f"unix://{good}@{server.socket}") as client:
                assert await client.execute("SET", "a", "b") == b"OK"
        for bad in (":wr0ng", "ada:wr0ng"):
            async with RedisClient(f"unix://{bad}@{server.socket}") as client:
                with trio.fail_after(2), pytest.raises(StoreError, match="WRONGPASS") as caught:
                    await client.execute("GET", "a")
                assert caught.value.kind == "denied"
                assert "wr0ng" not in repr(caught.value) + repr(client)
        async with RedisClient(f"unix://{server.socket}") as client:
            with pytest.raises(StoreError, match=r"NOAUTH|AUTH") as caught:
                await client.execute("GET", "a")
            assert caught.value.kind == "denied"
        async with RedisClient(f"unix://ada:l0velace@{server.socket}") as client:
            with pytest.raises(StoreError, match="NOPERM") as caught:
                await client.execute("GET", "b")
            assert caught.value.kind == "denied"


async def test_tls(tmp_path):
    """rediss:// verifies the server's certificate, and says so where it does not verify."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = ("--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem", "--tls-ca-cert-file", "ca.pem")
    port = free_port()
    server = RedisProcess(tmp_path, "--save", "", "--tls-port", str(port), "--tls-auth-clients", "no", *files)
    try:
        server.start()
    except AssertionError as exc:
        if "tls" in str(exc).lower():
            pytest.skip("this redis-server was built without TLS")
        raise
    try:
        tls = gr.TlsConfig(ca_file=tmp_path / "ca.pem")
        async with RedisClient(f"rediss://127.0.0.1:{port}", tls=tls) as client:
            await client.execute("SET", "a", b"x" * 1_000_000)
            assert await client.execute("GET", "a") == b"x" * 1_000_000
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(client.execute, "INCR", f"n{number % 5}")
        async with RedisClient(f"rediss://127.0.0.1:{port}", timeout_s=0.3, tls=ssl.create_default_context()) as client:
            with pytest.raises(StoreError, match="does not verify") as caught:
                await client.execute("PING")
            assert caught.value.kind == "unreachable"
    finally:
        server.kill()


class OldServer:
    """A Redis of a version, in memory: what it knows of RESP3, and what it says of itself."""

    def __init__(self, nursery, *, version, knows_hello=False):
        self._nursery, self._version, self._knows_hello = nursery, version, knows_hello

    async def connect(self, _host, _port):
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream):
        reader = RespReader()
        while data := await stream.receive_some():
            for command in reader.feed(data):
                await stream.send_all(self._answer(command))

    def _answer(self, command):
        name = command[0].upper()
        if name == b"HELLO" and not self._knows_hello:
            return b"-ERR unknown command `HELLO`\r\n"
        if name == b"HELLO":
            return b"%%2\r\n+server\r\n+redis\r\n+version\r\n+%b\r\n" % self._version
        if name == b"INFO":
            info = b"# Server\r\nredis_version:%b\r\nredis_mode:standalone\r\n" % self._version
            return b"$%d\r\n%b\r\n" % (len(info), info)
        return b"$4\r\nECHO\r\n" if name == b"ECHO" else b"+OK\r\n"


async def test_resp2():
    """A server without HELLO is spoken to in RESP2, with its password and database."""
    async with trio.open_nursery() as nursery:
        network = OldServer(nursery, version=b"5.0.14")
        async with RedisClient("redis://:pw@h/3", network=network) as client:
            assert await client.execute("ECHO", "x") == b"ECHO"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("knows_hello", [False, True])
async def test_versions_that_are_too_old(knows_hello):
    """A server that lacks what is needed is refused, with its version and the one that is needed."""
    async with trio.open_nursery() as nursery:
        network = OldServer(nursery, version=b"3.2.100", knows_hello=knows_hello)
        async with RedisClient("redis://h", network=network) as client:
            with pytest.raises(StoreError, match=r"version 3\.2\.100; at least 5\.0") as caught:
                await client.execute("PING")
            assert caught.value.kind == "refused"
        nursery.cancel_scope.cancel()


class Closing(OldServer):
    """A Redis that ends each connection behind its first words."""

    def __init__(self, nursery, said):
        super().__init__(nursery, version=b"7.0.0")
        self.said = said

    async def _serve(self, stream):
        await stream.receive_some()
        if self.said:
            await stream.send_all(self.said)
        await stream.aclose()


@pytest.mark.parametrize(
    ("said", "kind", "match"),
    [
        (b"-ERR max number of clients reached\r\n", "locked", "max number of clients"),
        (b"", "unreachable", "cannot be reached in time.*closed the connection"),
    ],
)
async def test_a_server_that_ends_every_connection(autojump_clock, said, kind, match):
    """It is asked again until the deadline, and then nothing was done, for the reason that it gave."""
    async with trio.open_nursery() as nursery:
        async with RedisClient("redis://h", network=Closing(nursery, said), timeout_s=2) as client:
            for execute in (client.execute, client.execute_again):
                with pytest.raises(StoreError, match=match) as caught:
                    await execute("SET", "a", "b")
                assert caught.value.kind == kind
            assert client.statistics().attempts > 4
        nursery.cancel_scope.cancel()


async def test_something_else_than_redis():
    """What answers with something else is named as such at once."""

    async def serve(stream):
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        async with RedisClient(f"redis://127.0.0.1:{listener.socket.getsockname()[1]}") as client:
            with pytest.raises(StoreError, match="no Redis") as caught:
                await client.execute("PING")
            assert caught.value.kind == "foreign"
        nursery.cancel_scope.cancel()


# What goes wrong


async def test_nobody_is_there():
    """Nothing was sent: the call ends at its deadline with that, and a closed client says that it is closed."""
    async with RedisClient("redis://127.0.0.1:1", timeout_s=0.3) as client:
        start = trio.current_time()
        with pytest.raises(StoreError, match="cannot connect") as caught:
            await client.execute("PING")
        assert caught.value.kind == "unreachable"
        assert trio.current_time() - start < 0.6
    with pytest.raises(StoreError) as caught:
        await client.execute("PING")
    assert caught.value.kind == "closed"


async def test_a_killed_server_comes_back(record_property):
    """All callers wait for the same attempts, 0.1 s apart or more, and go on within a second of the server's return."""
    with running_redis("--appendonly", "yes", "--appendfsync", "always") as server:
        async with RedisClient(server.url) as client:
            await client.execute("SET", "a", "1")
            server.kill()
            with pytest.raises(StoreError):
                await client.execute("INCR", "a")
            waits = []

            async def ask():
                assert await client.execute_again("GET", "a") == b"1"
                waits.append(time.monotonic())

            async with trio.open_nursery() as nursery:
                for _ in range(200):
                    nursery.start_soon(ask)
                await trio.sleep(0.5)
                attempts = client.statistics().attempts
                back = time.monotonic()
                server.start()
                started_s = time.monotonic() - back
    assert attempts <= 2 + 6
    assert max(waits) - back - started_s < 1.0
    record_property(
        "figure",
        f"200 callers, {attempts} attempts in 0.5 s, answered {max(waits) - back - started_s:.2f} s after its start",
    )


async def test_a_stopped_server(record_property):
    """A server that does not answer (SIGSTOP) ends each call at its deadline; replies that come later are nobody's."""
    with running_redis() as server:
        async with RedisClient(server.url, timeout_s=0.4) as client:
            await client.execute("SET", "a", "1")
            server.signal(signal.SIGSTOP)
            took = []

            async def ask():
                start = trio.current_time()
                with pytest.raises(StoreError) as caught:
                    await client.execute("INCR", "a")
                assert caught.value.kind in {"timeout", "unreachable"}
                took.append(trio.current_time() - start)

            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(ask)
            await ask()
            server.signal(signal.SIGCONT)
            assert await client.execute_again("ECHO", "mine") == b"mine"
    assert max(took) < 0.7
    record_property("figure", f"21 calls against a stopped server ended within {max(took):.2f} s (deadline 0.4)")


async def test_full_memory_and_replicas():
    """What the server refuses because of its state has a kind of its own, and passes with that state."""
    with running_redis("--save", "", "--maxmemory", "1", "--maxmemory-policy", "noeviction") as server:
        async with RedisClient(server.url) as client:
            with pytest.raises(StoreError, match="memory is full") as caught:
                await client.execute("SET", "a", "b")
            assert caught.value.kind == "full"
            await client.execute("CONFIG", "SET", "maxmemory", 0)
            await client.execute("SET", "a", "b")
            await client.execute("REPLICAOF", "127.0.0.1", 1)
            with pytest.raises(StoreError, match="replica") as caught:
                await client.execute("SET", "a", "c")
            assert caught.value.kind == "read_only"
            await client.execute("REPLICAOF", "NO", "ONE")
            await client.execute("SET", "a", "d")


class Loading(OldServer):
    """A Redis that loads its data for so many commands."""

    left = 3

    def _answer(self, command):
        if command[0] == b"ECHO" and self.left:
            self.left -= 1
            return b"-LOADING Redis is loading the dataset in memory\r\n"
        return super()._answer(command)


async def test_a_loading_server(autojump_clock):
    """While it loads its data, commands that may be sent again wait for it, and others say why not."""
    async with trio.open_nursery() as nursery:
        network = Loading(nursery, version=b"7.0.0", knows_hello=True)
        async with RedisClient("redis://h", network=network) as client:
            with pytest.raises(StoreError, match="loading its data") as caught:
                await client.execute("ECHO", "x")
            assert caught.value.kind == "loading"
            assert await client.execute_again("ECHO", "x") == b"ECHO"
            assert client.statistics().resent == 2
        nursery.cancel_scope.cancel()


# Through a proxy that breaks things


class Hanging(OldServer):
    """A Redis that answers nothing on its first connection but the greeting, and takes `most` connections."""

    def __init__(self, nursery, *, most):
        super().__init__(nursery, version=b"7.0.0", knows_hello=True)
        self.most, self.made = most, 0

    async def connect(self, host, port):
        self.made += 1
        if self.made > self.most:
            raise ConnectionRefusedError
        return await super().connect(host, port)

    async def _serve(self, stream):
        reader: Any = RespReader()
        number = self.made
        while data := await stream.receive_some():
            for command in reader.feed(data):
                if number > 1 or command[0] == b"HELLO":
                    await stream.send_all(self._answer(command))


@pytest.mark.parametrize("most", [2, 1], ids=["back", "gone"])
async def test_a_connection_that_ends_at_the_deadline_of_another(autojump_clock, most):
    """Who has time left is sent again, and where that does not come through, what became of it is unknown."""
    async with trio.open_nursery() as nursery:
        async with RedisClient("redis://h", network=Hanging(nursery, most=most), timeout_s=5) as client:

            @nursery.start_soon
            async def run_out():
                with pytest.raises(StoreError) as caught:
                    await client.execute("ECHO", "x")
                assert (caught.value.kind, trio.current_time()) == ("timeout", start + 5)

            start = trio.current_time()
            await trio.sleep(4)
            if most == 2:
                assert await client.execute_again("ECHO", "x") == b"ECHO"
                assert trio.current_time() < start + 6
            else:
                with pytest.raises(StoreError, match=r"cannot connect.*; it was sent before") as caught:
                    await client.execute_again("ECHO", "x")
                assert caught.value.kind == "io"
                assert trio.current_time() == pytest.approx(start + 9)
        nursery.cancel_scope.cancel()


async def cancel_many(client, rng, *, cancels, tasks=64):
    """Cancel commands of all kinds at any time, until so many were; returns (cancels, replies), all of them right."""
    counts = [0, 0]
    prefix = fresh_prefix()
    await client.execute("RPUSH", f"{prefix}l", *range(3))

    async def one(text):
        kind = rng.randrange(5)
        if kind == 0:
            return await client.execute("ECHO", text) == text.encode()
        if kind == 1:
            return await client.execute_again("ECHO", text) == text.encode()
        if kind == 2:
            return await client.execute("LRANGE", f"{prefix}l", 0, -1) == [b"0", b"1", b"2"]
        if kind == 3:
            return await client.execute_together(("ECHO", text), ("ECHO", f"{text}!")) == [
                text.encode(),
                f"{text}!".encode(),
            ]
        return await client.execute("EVAL", "return {ARGV[1], #ARGV}", 0, text, "x") == [text.encode(), 2]

    async def ask(number):
        turn = 0
        while counts[0] < cancels:
            turn += 1
            with trio.move_on_after(rng.uniform(0.0, 0.02)):
                assert await one(f"{number}.{turn}")
                counts[1] += 1
                continue
            counts[0] += 1

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(ask, number)
    assert await client.execute("ECHO", "last") == b"last"
    return counts


@pytest.mark.parametrize("cancels", [10_000, pytest.param(1_000_000, marks=pytest.mark.long)])
async def test_cancelled_commands(rng, record_property, cancels):
    """Commands that are cancelled at any time, through a slow connection: no reply is ever somebody else's."""
    target = ("127.0.0.1", shared_redis().port)
    plan = [[Delay(latency_s=0.001, jitter_s=0.004)]]
    async with (
        open_fault_proxy(*target, plan=plan, rng=rng) as proxy,
        RedisClient(f"redis://{proxy.host}:{proxy.port}") as client,
    ):
        cancelled, replies = await cancel_many(client, rng, cancels=cancels)
        statistics = client.statistics()
    assert statistics.connected == 1
    assert statistics.in_flight == 0
    assert statistics.dropped > cancelled / 4
    record_property(
        "figure", f"{cancelled:,} cancelled, {replies:,} answered, 0 wrong; {statistics.dropped:,} replies dropped"
    )


async def test_connections_that_break_anywhere(rng, record_property):
    """Connections that are cut, stall, and come in bits: each call ends in time, with its own reply or an error."""
    target = ("127.0.0.1", shared_redis().port)

    def plan(_number):
        return [
            Chop(direction="down", size=rng.randint(1, 7)),
            rng.choice([Cut, Stall])(direction=rng.choice(["up", "down"]), after=rng.randint(0, 900)),
        ]

    outcomes = {"right": 0}
    async with open_fault_proxy(*target, plan=plan, rng=rng) as proxy:
        url = f"redis://{proxy.host}:{proxy.port}"
        async with RedisClient(url, timeout_s=0.25) as client:

            async def ask(number):
                for turn in range(8):
                    text = f"{number}.{turn}"
                    start = trio.current_time()
                    try:
                        assert await client.execute("ECHO", text) == text.encode()
                        outcomes["right"] += 1
                    except StoreError as exc:
                        outcomes[exc.kind] = outcomes.get(exc.kind, 0) + 1
                    assert trio.current_time() - start < 1.0

            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(ask, number)
    assert sum(outcomes.values()) == 80
    assert outcomes.keys() <= {"right", "io", "timeout", "unreachable"}
    record_property("figure", f"80 calls over breaking connections: {outcomes}")


class Counting(OldServer):
    """Counts the connections that it has; does not answer the commands in `silent`, and takes a second to connect.

    The streams that `pair` makes may have no `close` that does not wait, as those of a user's own network.
    """

    def __init__(self, nursery, *, silent=(), pair=memory_stream_pair):
        super().__init__(nursery, version=b"7.0.0", knows_hello=True)
        self.silent, self.connections = silent, 0
        self._pair = pair

    async def connect(self, _host, _port):
        await trio.sleep(1)
        ours, theirs = self._pair()
        self._nursery.start_soon(self._serve, theirs)
        return ours

    async def _serve(self, stream):
        self.connections += 1
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            await super()._serve(stream)
        self.connections -= 1

    def _answer(self, command):
        name = command[0].upper()
        if name in self.silent:
            return b""
        if name == b"SENTINEL":
            return b"*2\r\n$1\r\nm\r\n$1\r\n9\r\n"
        if name == b"SUBSCRIBE":
            return b">3\r\n+subscribe\r\n+c\r\n:1\r\n"
        return super()._answer(command)


async def use_subscription(client):
    async with client.subscribe("c") as subscription:
        await subscription.receive()


USES = {
    "a command": ("redis://h", lambda client: client.execute("PING")),
    "a blocking command": ("redis://h", lambda client: client.execute_blocking("BLPOP", "q", 0, wait_s=1e6)),
    "a subscription": ("redis://h", use_subscription),
    "a command through a sentinel": ("redis+sentinel://h/name", lambda client: client.execute("PING")),
}


PAIRS = pytest.mark.parametrize("pair", [memory_stream_pair, trio.testing.memory_stream_pair], ids=["ours", "others"])


@pytest.mark.parametrize("after_s", [0.5, 1.5, 2.5], ids=["at first", "later", "at last"])
@pytest.mark.parametrize("use", USES)
@PAIRS
async def test_closing_while_in_use(autojump_clock, use, after_s, pair):
    """Whatever waits for a connection, or for a reply on one, ends with the client, and the server has none left."""
    url, work = USES[use]
    silent = (b"HELLO",) if after_s == 1.5 else (b"PING", b"BLPOP", b"ROLE")
    async with trio.open_nursery() as nursery:
        server = Counting(nursery, silent=silent, pair=pair)
        client = RedisClient(url, network=server, timeout_s=10)
        ended = trio.Event()

        @nursery.start_soon
        async def run():
            with pytest.raises(StoreError) as caught:
                await work(client)
            assert caught.value.kind == "closed"
            ended.set()

        await trio.sleep(after_s)
        assert server.connections == (after_s > 1)
        await client.aclose()
        with trio.fail_after(2):
            await ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert server.connections == 0
        with pytest.raises(StoreError, match="the client is closed"):
            await work(client)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("use", ["a blocking command", "a subscription"])
@PAIRS
async def test_a_cancel_of_who_has_a_connection(autojump_clock, use, pair):
    """It goes with who has it."""
    url, work = USES[use]
    async with trio.open_nursery() as nursery:
        server = Counting(nursery, silent=(b"BLPOP",), pair=pair)
        async with RedisClient(url, network=server, timeout_s=10) as client:
            with trio.move_on_after(3):
                await work(client)
            await trio.testing.wait_all_tasks_blocked()
            assert server.connections == 0
        nursery.cancel_scope.cancel()


@PAIRS
async def test_a_connection_that_failed(autojump_clock, pair):
    """It is closed by the time that there is another one."""
    async with trio.open_nursery() as nursery:
        server = Counting(nursery, silent=(b"GET",), pair=pair)
        async with RedisClient("redis://h", network=server, timeout_s=3) as client:
            for _ in range(2):
                with pytest.raises(StoreError):
                    await client.execute("GET", "a")
                await client.execute("PING")
                assert server.connections == 1
        nursery.cancel_scope.cancel()


@PAIRS
async def test_a_cancel_while_a_master_is_asked(autojump_clock, pair):
    """Nothing is left open when who asked whether it is the master has gone."""
    async with trio.open_nursery() as nursery:
        server = Counting(nursery, silent=(b"ROLE",), pair=pair)
        async with RedisClient("redis+sentinel://h/name", network=server, timeout_s=10) as client:
            for _ in range(3):
                with trio.move_on_after(3):
                    await client.execute("PING")
                await trio.testing.wait_all_tasks_blocked()
                assert server.connections == 0
        nursery.cancel_scope.cancel()
