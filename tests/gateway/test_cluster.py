"""Several gateways in front of one Redis: one owner a session, requests passed on, and what a kill -9 costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from gateways import ADA_KEY, BOB_KEY, ROOMY, open_gateway, open_talk, secured
from redis_server import fresh_prefix, shared_redis
from served import open_served_api
from worlds import open_world

from gorouter_trio.config import Secret
from gorouter_trio.errors import (
    ConfigError,
    ConnectError,
    DecodeError,
    GorouterError,
    SessionNotFoundError,
    StoreError,
    TurnInDoubtError,
)
from gorouter_trio.events import TextDelta
from gorouter_trio.gateway import ClusterConfig, GatewayConfig, serve_gateway
from gorouter_trio.gateway.cluster import Cluster, Owner
from gorouter_trio.gateway.link import Link, LinkBrokenError, open_link
from gorouter_trio.gateway.metrics import metrics_text
from gorouter_trio.gateway.protocol import Ask, Event, Welcome, decode_client_message, encode_text
from gorouter_trio.remote import open_remote
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import RedisStore
from gorouter_trio.transport.resp_client import RedisClient

pytestmark = pytest.mark.net

SECRET = "a secret of this test"
SUPPORT = Path(__file__).parents[1] / "support"


@asynccontextmanager
async def open_pair(*, is_secured=False, **fields):
    """Two gateways in this process, with a store, a guard and a place in the cluster each."""
    redis, prefix = shared_redis(), fresh_prefix()

    def guard():
        return {"security": secured()} if is_secured else {}

    def config(name):
        cluster = ClusterConfig(redis=redis.url, secret=Secret(SECRET), prefix=prefix, member_s=1.0)
        return GatewayConfig(anonymous=not is_secured, limits=ROOMY, cluster=cluster, name=name)

    async with (
        RedisStore(redis.url, prefix=prefix) as one,
        RedisStore(redis.url, prefix=prefix) as two,
        open_gateway(config("one"), store=one, **guard(), **fields) as first,
        open_gateway(config("two"), store=two, **guard(), **fields) as second,
    ):
        yield first, second


async def test_requests_are_passed_on():
    """Whatever gateway is asked, the session's owner answers: turns, streams, history, steering."""
    async with open_pair(config=SimulatorConfig(tokens_per_s=300.0)) as (first, second):
        async with open_remote(first.url) as here, open_remote(second.url) as there:
            assert (await here.session("s").ask("[[say one]]")).text == "one"
            async with there.session("s").stream("[[tokens 40]]") as stream:
                pieces = [event.text async for event in stream if isinstance(event, TextDelta)]
            assert "".join(pieces) == stream.result.text
            assert len(pieces) > 5
            assert len(first.world.sent) == 2
            assert second.world.sent == []
            assert len(await there.session("s").history()) == 4
            assert (await there.session("s").statistics()).turns == 2

            async def interrupt():
                while not await there.session("s").interrupt():
                    await trio.sleep(0.02)  # until it runs

            async with trio.open_nursery() as nursery:
                nursery.start_soon(interrupt)
                with pytest.raises(GorouterError) as caught:
                    await here.session("s").ask("[[tokens 900]]")
            assert type(caught.value).__name__ == "TurnInterruptedError"
            await there.session("s").clear()
            assert await here.session("s").history() == []
        assert first.errors == second.errors == []


async def test_cancelling_what_was_passed_on():
    """Who stops waiting at one gateway stops the turn at the other."""
    async with open_pair(config=SimulatorConfig(tokens_per_s=20.0)) as (first, second):  # noqa: SIM117 - one line each
        async with open_remote(first.url) as here, open_remote(second.url) as there:
            await here.session("s").ask("[[say one]]")
            with trio.move_on_after(0.3) as scope:
                await there.session("s").ask("[[tokens 900]]")
            assert scope.cancelled_caught
            assert (await here.session("s").statistics()).state == "idle"


async def test_sessions_of_principals():
    """Two principals' sessions of one name have two owners; the owner itself looks at the token."""
    async with open_pair(is_secured=True) as (first, second):  # noqa: SIM117 - one line each
        async with open_remote(first.url, token=ADA_KEY) as ada, open_remote(second.url, token=BOB_KEY) as bob:
            await ada.session("s").ask("[[say for ada]]")
            await bob.session("s").ask("[[say for bob]]")
            assert (len(first.world.sent), len(second.world.sent)) == (1, 1)
            async with open_remote(second.url, token=ADA_KEY) as again:
                assert [e.message.content for e in await again.session("s").history()][1] == "for ada"


def names_in_redis():
    """All keys there are."""
    return sorted(shared_redis().ask("KEYS", "*").splitlines())


async def test_foreign_sessions_are_not_passed_on():
    """Another's session is not looked for: nothing is asked of Redis, or of the gateway that has it."""
    async with open_pair(is_secured=True) as (first, second):  # noqa: SIM117 - one line each
        async with open_remote(first.url, token=BOB_KEY) as bob, open_remote(second.url, token=ADA_KEY) as ada:
            await bob.session("secret").ask("[[say hidden]]")
            known = names_in_redis()
            for name in ("secret", "missing"):
                session = ada.session(name, owner=("acme", "bob"))
                for reach in (session.history, session.statistics, session.interrupt, partial(session.ask, "x")):
                    with pytest.raises(SessionNotFoundError, match=f"there is no session '{name}'"):
                        await reach()
            assert names_in_redis() == known
            assert "gorouter_gateway_forwarded_total 0" in metrics_text(second.gateway._core)
            assert second.errors == first.errors == []


async def test_a_gateway_that_drains_gives_its_sessions_away():
    """Others have them at once, and what it is asked meanwhile is answered there."""
    async with open_pair() as (first, second), open_remote(first.url) as here, open_remote(second.url) as there:
        await here.session("s").ask("[[say one]]")
        first.gateway.drain()
        with trio.fail_after(5):
            assert (await there.session("s").ask("[[say two]]")).text == "two"
        assert len(second.world.sent) == 1
        assert len(await there.session("s").history()) == 4


class DeadOwner:
    """A cluster whose one session is a dead gateway's, until `dies` is called."""

    def __init__(self):
        self.forwarded = 0
        self.fails = False
        self._dead = trio.Event()
        self.asked = trio.Event()

    def dies(self):
        self._dead.set()

    async def owner(self, *names):
        await trio.lowlevel.checkpoint()
        return Owner(1, "x", "ws://dead", self._dead.is_set())

    async def link(self, url, token):
        self.asked.set()
        if not self.fails:
            await self._dead.wait()
        raise ConnectError("it does not answer")

    async def leave(self):
        await trio.lowlevel.checkpoint()

    async def aclose(self):
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def open_heir(ask, *messages):
    """A gateway that a session falls to, and its client, which has sent `messages` while its owner was looked for."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=400.0)) as behind, open_talk(behind.url) as talk:
        cluster = behind.gateway._core.cluster = cast("Any", DeadOwner())
        await talk.send(ask)
        await cluster.asked.wait()
        await talk.send(*messages)
        # They are answered in their order: what was said before is known by now.
        assert (await talk.request(type="statistics", id=99))["type"] == "snapshot"
        cluster.dies()
        yield behind, talk


async def test_a_cancel_while_the_owner_is_looked_for():
    """It holds for the gateway that the session falls to: the turn ends, and nothing is sent."""
    ask = {"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 60]]"}
    async with open_heir(ask, {"type": "cancel", "id": 1}) as (behind, talk):
        assert (await talk.until("failed", "done"))[-1]["error"]["code"] == "turn_interrupted"
        assert behind.world.sent == []


async def test_a_cancel_while_the_owner_is_out_of_reach():
    """It lives, and cannot be reached, for as long as it likes: the turn ends all the same."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        cluster = behind.gateway._core.cluster = cast("Any", DeadOwner())
        cluster.fails = True
        await talk.send({"type": "ask", "id": 1, "session": "s", "messages": "x"})
        await cluster.asked.wait()
        await talk.send({"type": "cancel", "id": 1})
        with trio.fail_after(20):
            assert (await talk.until("failed", "done"))[-1]["error"]["code"] == "turn_interrupted"
        assert behind.world.sent == behind.errors == []


async def test_a_grant_while_the_owner_is_looked_for():
    """So does this: what was granted comes."""
    ask = {"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 60]]", "stream": True, "credit": 0}
    async with open_heir(ask, {"type": "grant", "id": 1, "credit": 100_000}) as (_behind, talk):
        messages = await talk.until("done")
        assert [message["seq"] for message in messages] == list(range(1, len(messages) + 1))
        assert len(messages) > 5


async def test_credit_without_end_while_the_owner_is_looked_for():
    """More on top of all that there can be is no number that the next gateway would refuse."""
    most = 2**53 - 1
    ask = {"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 60]]", "stream": True, "credit": most}
    async with open_heir(ask, {"type": "grant", "id": 1, "credit": most}) as (behind, talk):
        relay = cast("Any", next(iter(behind.gateway._core.connections)))._steered[1]
        again = decode_client_message(encode_text(relay.request))
        assert isinstance(again, Ask)
        assert again.credit == most
        assert (await talk.until("done", "failed"))[-1]["type"] == "done"


class SlowRedis:
    """Keys, without their ends; each command takes a while."""

    def __init__(self):
        self.keys = {}

    async def execute(self, command, key, *args):
        await trio.sleep(0.05)
        if command == "SET":
            self.keys[key] = args[0]
        else:
            self.keys.pop(key, None)


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.12, 0.14, 0.2])
async def test_who_has_left_does_not_come_back(autojump_clock, after_s):
    """It says no more that it lives, whenever it leaves: between two signs of life, or in the middle of one."""
    redis = SlowRedis()
    config = ClusterConfig(redis=cast("Any", redis), secret=Secret(SECRET), url="ws://x", member_s=0.3)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(config, name="a", nursery=nursery, wall=lambda: 0.0)
        await nursery.start(cluster.run)
        assert list(redis.keys.values()) == ["ws://x"]
        await trio.sleep(after_s)
        await cluster.leave()
        assert redis.keys == {}
        await trio.sleep(10)
        assert redis.keys == {}


class IdleLink:
    """A link on which nothing runs."""

    def __init__(self):
        self.broken = None
        self.is_idle = True
        self._closed = trio.Event()

    def breaks(self):
        self.broken = LinkBrokenError(1006)
        self._closed.set()

    async def closed(self):
        await self._closed.wait()


@pytest.mark.parametrize("why", ["broken", "idle"])
async def test_nothing_is_begun_on_a_link_that_is_closed(autojump_clock, monkeypatch, why):
    """It is on another one, as soon as that is known: what was never sent would have been in doubt."""

    @asynccontextmanager
    async def open_one(_url, **_):
        try:
            yield IdleLink()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)

    monkeypatch.setattr("gorouter_trio.gateway.cluster.open_link", open_one)
    config = ClusterConfig(redis=cast("Any", SlowRedis()), secret=Secret(SECRET), url="ws://x")
    async with trio.open_nursery() as nursery:
        cluster = Cluster(config, name="a", nursery=nursery, wall=lambda: 0.0)
        first = cast("Any", await cluster.link("ws://y", None))
        if why == "broken":
            first.breaks()
        else:
            await trio.sleep(60.5)
        second = cast("Any", await cluster.link("ws://y", None))
        assert second is not first
        assert second.broken is None
        assert await cluster.link("ws://y", None) is second
        await trio.sleep(2)
        assert await cluster.link("ws://y", None) is second
        nursery.cancel_scope.cancel()


class Wire:
    """Takes what is sent."""

    async def send_message(self, _text):
        await trio.lowlevel.checkpoint()


async def test_credit_that_is_granted_later_is_credit():
    """Who lets a gateway send as much as it may is no victim of it, and neither are all others on the connection."""
    most = 4 * 1024 * 1024
    welcome = Welcome(
        version=1, principal=None, max_message_bytes=1_000, max_requests=9, max_credit=most, resume_s=60.0
    )
    link = Link(cast("Any", Wire()), welcome)
    call = await link.begin(Ask(id=1, messages="x", stream=True, credit=1))
    await call.grant(most)
    piece = encode_text(Event(id=1, seq=1, event=TextDelta("x" * 999_900)))
    for _ in range(4):
        link._route(piece)
    assert len(await call.receive()) == 2
    with pytest.raises(DecodeError, match="more than was granted"):
        for _ in range(4):
            link._route(piece)


async def test_proofs():
    """Only who knows the secret is a peer; a proof is good once, and not for long."""
    wall = [1_000.0]
    config = ClusterConfig(redis="redis://127.0.0.1:1", secret=Secret(SECRET), url="ws://x")
    async with trio.open_nursery() as nursery:
        cluster = Cluster(config, name="a", nursery=nursery, wall=lambda: wall[0])
        other = ClusterConfig(redis="redis://127.0.0.1:1", secret=Secret("another secret of it"), url="ws://x")
        stranger = Cluster(other, name="b", nursery=nursery, wall=lambda: wall[0])
        proof = cluster._proof()
        assert cluster.is_peer(proof)
        assert not cluster.is_peer(proof)
        assert not cluster.is_peer(stranger._proof())
        for wrong in ("", "x", "1 2 3", proof[:-1], proof.replace("1000", "1001"), "ü" + proof):
            assert not cluster.is_peer(wrong)
        late = cluster._proof()
        wall[0] += 61
        assert not cluster.is_peer(late)
        await cluster.aclose()
    for field, value in (("secret", Secret("short")), ("url", "http://x"), ("member_s", 0.0)):
        with pytest.raises(ConfigError, match=field):
            ClusterConfig(**cast("dict[str, Any]", {"redis": "redis://x", "secret": Secret(SECRET), field: value}))


def test_passwords_are_not_shown():
    """That of Redis stands in its URL, which a log of the configuration must not have; nor has it the secret."""
    cluster = ClusterConfig(redis="redis://:hunter2@db.example:6380/3", secret=Secret(SECRET), url="ws://x")
    shown = repr(GatewayConfig(anonymous=True, cluster=cluster))
    assert "Redis at db.example:6380, database 3" in shown
    assert "ws://x" in shown
    assert "hunter2" not in shown
    assert SECRET not in shown
    with pytest.raises(ConfigError, match="port") as caught:
        ClusterConfig(redis="redis://:hunter2@db.example:99999", secret=Secret(SECRET))
    assert "hunter2" not in str(caught.value)


async def test_a_redis_that_is_not_there():
    """Is told as it is, and the port is free again."""
    redis = RedisClient("redis://127.0.0.1:1", timeout_s=0.2)
    config = GatewayConfig(anonymous=True, cluster=ClusterConfig(redis=redis, secret=Secret(SECRET)))
    async with open_world() as world:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        with pytest.raises(StoreError):
            await serve_gateway(world.client, config, listeners=[listener])
        assert listener.socket.fileno() == -1


async def test_a_stranger_is_no_peer():
    """A header that proves nothing gives nothing."""
    async with open_pair() as (first, _second):
        async with open_link(first.url, headers=[("X-Gateway-Peer", "1 2 3")]) as link:
            assert link.welcome.max_requests == ROOMY.max_requests
        async with open_talk(first.url) as talk:
            assert (await talk.request(type="ask", id=1, session="s", messages="[[say x]]"))["type"] == "done"


# A kill -9 under load


class Worker:
    """A gateway in a process of its own, which can be killed and started again."""

    def __init__(self, *args):
        self._args = args
        self.url = ""

    async def start(self):
        environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}"}
        command = [sys.executable, str(SUPPORT / "gateway_worker.py"), *self._args]
        self.process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
        line = b""
        with trio.fail_after(120):
            while not line.endswith(b"\n"):
                line += await cast("trio.abc.ReceiveStream", self.process.stdout).receive_some()
        self.url = line.decode().strip()
        return self

    async def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        await self.process.wait()
        await cast("trio.abc.ReceiveStream", self.process.stdout).aclose()


@asynccontextmanager
async def open_workers(*args):
    workers = [Worker(*args), Worker(*args)]
    try:
        for worker in workers:
            await worker.start()
        yield workers
    finally:
        for worker in workers:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
                await worker.kill()


class Load:
    """Sessions that are asked all the time through the gateway that lives, and what came of it."""

    def __init__(self, client):
        self.told = {}
        self.in_doubt = 0
        self._client = client
        self._news = trio.Event()

    async def take_turns(self, name, *, until):
        """Take turns of the session, one after the other; when each was told, by its id."""
        session, number = self._client.session(name), 0
        told = self.told.setdefault(name, {})
        while not until.is_set():
            number += 1
            turn_id = f"{name}.{number}"
            try:
                reply = await session.ask(f"[[say {turn_id}]]", turn_id=turn_id)
            except TurnInDoubtError:
                self.in_doubt += 1
                continue
            assert reply.text == turn_id
            told[turn_id] = trio.current_time()
            self._news.set()
            self._news = trio.Event()

    async def wait_told(self, names, *, since):
        """Wait until each session was told a turn after that time; how long the last one took, from then on."""
        first = {}
        while len(first) < len(names):
            for name in names:
                after = [at for at in self.told.get(name, {}).values() if at > since]
                if after:
                    first.setdefault(name, min(after) - since)
            if len(first) < len(names):
                await self._news.wait()
        return max(first.values())


class Killing:
    """Kills one of two gateways again and again while sessions of both are asked through the other."""

    def __init__(self, api, workers, *, sessions, lease_s):
        self._api = api
        self._workers = workers
        self._sessions = sessions
        self.lease_s = lease_s
        self.told = self.lost = self.in_doubt = self.rounds = 0
        self.again = []
        self.slow = []

    async def round(self, client):
        """New sessions, half of them the other gateway's, which is killed when all have had a turn."""
        names = [f"k{self.rounds}.{number}" for number in range(self._sessions)]
        self.rounds += 1
        dying, staying = names[1::2], names[::2]
        async with open_remote(self._workers[1].url, patience_s=120.0) as other:
            for name in dying:
                # Whose it is from now on.
                await other.session(name).history()
        load, until = Load(client), trio.Event()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(partial(load.take_turns, name, until=until))
            await load.wait_told(names, since=-1.0)
            await self._workers[1].kill()
            nursery.start_soon(self._workers[1].start)
            killed_at = trio.current_time()
            self.again.append(await load.wait_told(dying, since=killed_at))
            # What the others took at the same time says how slow the machine was.
            gaps = [longest_gap(load.told[name].values(), since=killed_at) for name in staying]
            self.slow.append(max(gaps))
            until.set()
        await self._count(load, client)

    async def _count(self, load, client):
        self.in_doubt += load.in_doubt
        for name, told in load.told.items():
            history = [entry.turn_id for entry in (await client.session(name).history())[::2]]
            assert len(set(history)) == len(history), "a turn twice"
            self.told += len(told)
            self.lost += len(set(told) - set(history))

    def check(self, paid):
        """Nothing is lost, nothing is paid twice but what was under way, and all answer again within the lease."""
        assert self.lost == 0
        assert paid - self.told <= self.in_doubt
        # Each of the sessions that died had one turn under way.
        assert self.in_doubt <= self.rounds * self._sessions / 2
        for again, slow in zip(self.again, self.slow, strict=True):
            assert again < self.lease_s + 2 * slow, (again, slow)

    def figure(self, paid):
        """What came of it, in a line."""
        median = sorted(self.again)[len(self.again) // 2]
        return (
            f"{self.rounds} kills: {self.told} turns told, {self.lost} lost, {max(paid - self.told, 0)} paid beyond "
            f"them with {self.in_doubt} in doubt; sessions answered again after {median:.1f} s "
            f"(at most {max(self.again):.1f} s) with leases of {self.lease_s:g} s; the others took at most "
            f"{max(self.slow):.1f} s meanwhile"
        )


def longest_gap(times, *, since):
    """The longest time without an answer, from then on."""
    after = [since, *sorted(at for at in times if at > since), trio.current_time()]
    return max(later - earlier for earlier, later in pairwise(after))


async def kill_under_load(kills, *, sessions, lease_s):
    """Kill one gateway so many times; what came of it, and how many requests were paid."""
    redis = shared_redis()
    redis.ask("FLUSHALL")
    async with open_served_api(latency_s=0.02) as api, open_workers(api.base_url, redis.url, str(lease_s)) as workers:
        killing = Killing(api, workers, sessions=sessions, lease_s=lease_s)
        async with open_remote(workers[0].url, patience_s=120.0) as client:
            for _ in range(kills):
                await killing.round(client)
        return killing, (await api.statistics()).completed


@pytest.mark.timeout(120)
async def test_two_kills(figure):
    """A gateway is killed twice under load: nothing that was told is lost, and its sessions go on at the other one."""
    killing, paid = await kill_under_load(2, sessions=6, lease_s=1.0)
    figure(killing.figure(paid))
    killing.check(paid)


@pytest.mark.long
async def test_a_hundred_kills(figure):
    """Likewise, a hundred times."""
    killing, paid = await kill_under_load(100, sessions=16, lease_s=2.0)
    figure(killing.figure(paid))
    killing.check(paid)


async def test_sigterm(figure):
    """A process that is told to end drains, and ends with 0."""
    async with open_served_api(tokens_per_s=100.0) as api:
        worker = await Worker(api.base_url).start()
        async with open_remote(worker.url, patience_s=1.0) as client:
            async with client.session("s").stream("[[tokens 40]]") as stream:
                async for _event in stream:
                    break
                began = trio.current_time()
                worker.process.send_signal(signal.SIGTERM)
                assert (await stream.collect()).text
            assert await worker.process.wait() == 0
            took = trio.current_time() - began
            assert took < 11
            with pytest.raises(ConnectError):
                await client.session("s").history()
        await worker.process.stdout.aclose()
    figure(f"ended {took:.1f} s after SIGTERM, with a stream that was read to its end")
