"""Who is let in, how much of what they send, and what becomes of the others: each bound against the one connection."""

from __future__ import annotations

import gc
import json
import random
import resource
import socket
import struct
from collections import Counter
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from gateway_attackers import open_attack
from gateways import (
    ADA,
    ADA_KEY,
    BOB_KEY,
    ROOT_KEY,
    Healthy,
    LoopLag,
    address_of,
    close_code,
    frame,
    limits,
    open_gateway,
    open_raw,
    open_talk,
    secured,
)
from trio_websocket import HandshakeError

import gorouter_trio as gr
from gorouter_trio.errors import AccessDeniedError, ConfigError
from gorouter_trio.gateway import GatewayConfig, serve_gateway
from gorouter_trio.gateway.protocol import CLOSE_CODES
from gorouter_trio.security import Allow, ApiKeyAuth, CustomAuth, Principal, SecurityConfig
from gorouter_trio.stores import MemoryStore

pytestmark = pytest.mark.net

APP = "https://app.example.com"
HELLO = '{"type":"hello","version":1}'


def config(**more):
    given = {"origins": [APP], "operator_roles": ["operator"], "limits": limits(**more.pop("limits", {}))}
    return GatewayConfig(**{**given, **more})


# Row 30

ORIGINS = [
    (None, True),
    (APP, True),
    ("null", False),
    ("", False),
    ("https://APP.example.com", False),
    ("HTTPS://app.example.com", False),
    ("http://app.example.com", False),
    ("https://app.example.com:443", False),
    ("https://app.example.com:8443", False),
    ("https://app.example.com/", False),
    ("https://app.example.com.", False),
    ("https://app.example.com.evil.com", False),
    ("https://evil.com/https://app.example.com", False),
    ("https://app.example.com@evil.com", False),
    ("https://evil-app.example.com", False),
    ("https://sub.app.example.com", False),
    ("https://example.com", False),
    ("//app.example.com", False),
    ("app.example.com", False),
    ("https://app.example.com https://evil.com", False),
    ("https://app.example.com,https://evil.com", False),
    ("*", False),
]

TOKENS = [
    (ADA_KEY, True),
    (None, False),
    ("", False),
    (" ", False),
    ("wrong-key-of-nobody", False),
    (ADA_KEY[:-1], False),
    (ADA_KEY + "x", False),
    (ADA_KEY.upper(), False),
    ("\u2028" + ADA_KEY + "\x00", False),
    ("Bearer " + ADA_KEY, False),
    ("a" * 10_000, False),
]


async def test_handshakes(figure):
    """Origins are compared exactly, and without a good token nobody gets further, wherever it stands."""
    guard, vectors = secured(failed_attempts=None), 0
    async with open_gateway(config(), security=guard) as behind:
        for origin, is_good in ORIGINS:
            for token, is_known in TOKENS if origin in {None, APP} else TOKENS[:2]:
                for where in ("header", "hello"):
                    welcomed = await _is_welcomed(behind.url, origin, token, where)
                    assert welcomed == (is_good and is_known), (origin, token, where)
                    vectors += 1
        with trio.fail_after(3):
            while behind.gateway.statistics().connections:
                await trio.sleep(0.01)  # the far ends close
        assert behind.gateway.statistics().unauthenticated == 0
    figure(f"{vectors} handshakes with {len(ORIGINS)} origins and {len(TOKENS)} tokens: all as they should be")


async def _is_welcomed(url, origin, token, where):
    lines = [] if origin is None else [f"Origin: {origin}"]
    if where == "header" and token is not None:
        if not token.isascii() or not token.isprintable():
            # No server takes such a header.
            return False
        lines.append(f"Authorization: Bearer {token}")
    hello = {"type": "hello", "version": 1} | ({"token": token} if where == "hello" and token is not None else {})
    async with open_raw(url, *lines) as (stream, reply):
        if not reply.startswith(b"HTTP/1.1 101"):
            assert reply.startswith(b"HTTP/1.1 403")
            return False
        await stream.send_all(frame(json.dumps(hello).encode()))
        data = await stream.receive_some()
        if b'"welcome"' in data:
            return True
        assert data[0] == 0x88
        assert int.from_bytes(data[2:4], "big") == 4401
        return False


async def test_who_says_nothing(figure):
    """A connection without a hello is closed in time, whatever it does instead; a room full of them is kept small."""
    quick = config(limits={"authenticate_s": 0.3, "max_unauthenticated": 8}, anonymous=True)
    async with open_gateway(quick) as behind, trio.open_nursery() as nursery:
        began, ended = trio.current_time(), []
        host, port = address_of(behind.url)

        async def silent(data):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(data)
                await close_code(stream)
                ended.append(trio.current_time() - began)

        head = b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        whole = head + b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        whole += b"Sec-WebSocket-Version: 13\r\n\r\n"
        for data in (b"G", b"GET / HTTP/1.1\r\n", head, whole, whole + b"\x81", whole + b"\x89\x80mask"):
            nursery.start_soon(silent, data)
        await trio.sleep(0.1)
        for _ in range(6):
            nursery.start_soon(silent, b"G")
        await trio.sleep(0.1)
        assert behind.gateway.statistics().unauthenticated <= 8
    assert max(ended) < 2
    assert behind.errors == []
    figure(f"{len(ended)} silent connections gone after {max(ended):.2f} s with 0.3 s to say hello")


@pytest.mark.long
async def test_a_full_room(figure):
    """Three hundred that say nothing, with the limits as they are: 256 are let in, and all are gone after 5 s."""
    full = GatewayConfig(anonymous=True)
    gone, turned_away = [], 0
    async with open_gateway(full) as behind:
        host, port = address_of(behind.url)
        most = 0

        async def silent():
            nonlocal turned_away
            async with await trio.open_tcp_stream(host, port) as stream:
                began = trio.current_time()
                with suppress(trio.BrokenResourceError):
                    await stream.send_all(b"GET / HTTP/1.1\r\n")
                    await close_code(stream)
                took = trio.current_time() - began
                gone.append(took)
                turned_away += took < 2

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(silent)
            while len(gone) < 300:
                most = max(most, behind.gateway.statistics().unauthenticated)
                await trio.sleep(0.05)
        assert most <= 256
        assert turned_away == 300 - 256
        assert max(gone) < 7
        assert behind.gateway.statistics().unauthenticated == 0
        assert behind.errors == []
    figure(
        f"300 silent connections: at most {most} at a time, {turned_away} turned away, all gone after {max(gone):.1f} s"
    )


async def test_revoked(figure):
    """A token or a principal that is revoked loses its connections within a second; others keep theirs."""
    guard = secured()
    async with open_gateway(config(), security=guard) as behind:
        async with open_talk(behind.url, ADA_KEY) as ada, open_talk(behind.url, BOB_KEY) as bob:
            began = trio.current_time()
            guard.revoke_token(ADA_KEY)
            assert await ada.close_code() == 4401
            took = trio.current_time() - began
            assert took < 1
            assert (await bob.request(type="statistics", id=1, session="s"))["type"] == "session_statistics"
            guard.revoke_principal("bob", tenant="acme")
            assert await bob.close_code() == 4401
        assert behind.errors == []
    figure(f"closed {took * 1000:.0f} ms after the revocation")


async def test_another_guard():
    """It is asked about everybody who is connected: whom it does not know, or knows as somebody else, has to go."""
    people: dict[str | gr.Secret, Principal] = {ADA_KEY: ADA, BOB_KEY: Principal(id="eve", tenant="acme")}
    guard = SecurityConfig(auth=ApiKeyAuth(api_keys=people), require_authentication=True, default_policy="allow-all")
    quick = config(limits={"revoke_s": 0.05})
    async with open_gateway(quick, security=secured()) as behind, AsyncExitStack() as stack:
        ada, bob, *roots = [
            await stack.enter_async_context(open_talk(behind.url, key)) for key in (ADA_KEY, BOB_KEY, *[ROOT_KEY] * 12)
        ]
        assert (await roots[0].request(type="statistics", id=1))["type"] == "snapshot"
        behind.client.set_security(guard)
        with trio.fail_after(20):
            for talk in (bob, *roots):
                assert await talk.close_code() == 4401
        assert (await ada.request(type="ask", id=1, session="s", messages="[[say yes]]"))["type"] == "done"
        async with open_talk(behind.url, ADA_KEY) as again:
            assert (await again.request(type="statistics", id=1, session="s"))["type"] == "session_statistics"
        assert behind.errors == []


async def test_a_token_expires_and_a_newer_one_comes(figure):
    """At its end the connection closes; a newer token of the same principal keeps it open, another's closes it."""
    wall = [1_000.0]
    people = {
        "short": Principal(id="ada", expires_at_s=1_010.0),
        "long": Principal(id="ada", expires_at_s=2_000.0),
        "bob": Principal(id="bob"),
    }
    guard = secured(auth=CustomAuth(authenticate=people.get))
    serve = {"wall": lambda: wall[0]}
    quick = config(limits={"recheck_s": 0.05, "revoke_s": 0.05})
    seams = gr.Seams(wall=serve["wall"])
    async with open_gateway(quick, serve=serve, security=guard, seams=seams) as behind:  # noqa: SIM117 - one line each
        async with open_talk(behind.url, "short") as one, open_talk(behind.url, "short") as two:
            assert (await two.request(type="authenticate", id=1, token="long"))["type"] == "accepted"
            wall[0] = 1_011.0
            with trio.fail_after(2):
                assert await one.close_code() == 4401
            assert (await two.request(type="statistics", id=2, session="s"))["type"] == "session_statistics"
            await two.send({"type": "authenticate", "id": 3, "token": "bob"})
            assert await two.close_code() == 4401


class Forgetful:
    """A guard of the program's own that fails when it is asked again."""

    async def authenticate(self, _token, *, now, wall):
        await trio.lowlevel.checkpoint()
        return ADA

    def verify(self, _principal, *, wall):
        raise LookupError("no such table")

    def check(self, *_, **__):
        return Allow()

    def audit(self, _record):
        pass


async def test_a_guard_that_fails_when_it_is_asked_again():
    """Who cannot be told to hold does not; the gateway goes on."""
    quick = config(limits={"revoke_s": 0.02, "recheck_s": 0.05})
    async with open_gateway(quick, security=Forgetful()) as behind:
        for _ in range(2):
            async with open_talk(behind.url, ADA_KEY) as talk:
                with trio.fail_after(20):
                    assert await talk.close_code() == 4401
        assert behind.errors
        assert {str(error) for error in behind.errors} == {"no such table"}


class Doorman:
    """A guard of the program's own, with an error of its own choice."""

    async def authenticate(self, _token, *, now, wall):
        await trio.lowlevel.checkpoint()
        raise AccessDeniedError("this account is closed")

    def check(self, *_, **__):
        return Allow()

    def audit(self, _record):
        pass


async def test_a_guard_that_refuses_in_its_own_words():
    """It is the client's affair, as any refusal is: no bug of the gateway, after which it would be worth a new try."""
    async with open_gateway(config(), security=Doorman()) as behind:
        async with open_talk(behind.url, greets=False) as talk:
            await talk.send({"type": "hello", "version": 1, "token": ADA_KEY})
            assert await talk.close_code() == 4401
            assert talk.websocket.closed is not None
            assert talk.websocket.closed.reason == "this account is closed"
        assert behind.errors == []


async def test_a_gateway_without_a_guard():
    """It is not served unless that was meant."""
    async with open_gateway() as behind:
        with pytest.raises(ConfigError, match="security"):
            await serve_gateway(behind.client, GatewayConfig())


@pytest.mark.parametrize(
    "wrong",
    [
        {"origins": "https://a.example"},
        {"origins": ["*"]},
        {"origins": ["https://a.example/"]},
        {"origins": ["https://A.example"]},
        {"origins": ["null"]},
        {"models": "x"},
        {"operator_roles": "x"},
        {"anonymous": "no"},
        {"allow_system": 0},
        {"limits": None},
        {"limits": {"ping_s": 5}},
        {"cluster": "redis://localhost"},
        {"name": None},
    ],
)
def test_settings_that_cannot_be(wrong):
    """Named, and refused before anything is served."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        GatewayConfig(**wrong)


@pytest.mark.parametrize("value", [0, -1, float("nan"), "x", True])
def test_limits_that_cannot_be(value):
    """Likewise."""
    with pytest.raises(ConfigError, match=r"limits\.ping_s"):
        limits_of = msgspec.structs.replace(limits(), ping_s=1.0)
        msgspec.structs.replace(limits_of, ping_s=value)


# Rows 31 and 32

BAD = [
    ("binary", [frame(b"{}", opcode=2)], 1003),
    ("no UTF-8", [frame(b"\xff\xfe")], 1007),
    ("not masked", [b"\x81\x02{}"], 1002),
    ("reserved bits", [b"\xf1\x82mask{}"], 1002),
    ("unknown opcode", [frame(b"x", opcode=5)], 1002),
    ("a long ping", [frame(b"x" * 126, opcode=9)], 1002),
    ("a continuation of nothing", [frame(b"x", opcode=0)], 1002),
    ("no JSON", [frame(b"nonsense")], 4400),
    ("a second hello", [frame(HELLO.encode())], 4409),
    ("too long", [frame(b"x" * 70_000)], 1009),
    ("says that it will be too long", [b"\x81\xff" + struct.pack("!Q", 2**40) + bytes(4)], 1009),
    ("too long in pieces", [frame(b"x" * 40_000, fin=False), frame(b"x" * 40_000, opcode=0)], 1009),
    ("empty pieces for ever", [frame(b"", fin=False), *[frame(b"", opcode=0, fin=False)] * 300], 1008),
    ("a flood of pings", [frame(b"x", opcode=9) * 1_000], 1008),
    ("a flood of pongs", [frame(b"x", opcode=10) * 1_000], 1008),
    ("a flood of frames", [frame(b'{"type":"compact","id":%d,"session":"s"}' % n) for n in range(1, 2_000)], 1008),
    ("a message at a snail's pace", [b"\x81\x85mask"], 1008),
    ("ids that go down", [frame(b'{"type":"clear","id":%d,"session":"s"}' % number) for number in (2, 1)], 4409),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pieces", "code"), BAD, ids=[case[0] for case in BAD])
async def test_bad_input(name, pieces, code):
    """The one connection is closed with the documented code, at once; the one beside it does not notice."""
    small = config(anonymous=True, limits={"max_message_bytes": 65_536, "message_grace_s": 0.2, "message_burst": 50})
    async with open_gateway(small) as behind, open_talk(behind.url) as healthy:
        async with open_raw(behind.url) as (stream, reply):
            assert reply.startswith(b"HTTP/1.1 101")
            await stream.send_all(frame(HELLO.encode()))
            with trio.fail_after(3):
                try:
                    for piece in pieces:
                        await stream.send_all(piece)
                except trio.BrokenResourceError:
                    pass
                found = await close_code(stream)
        assert found == code
        assert found in CLOSE_CODES
        assert (await healthy.request(type="ask", id=1, messages="[[say well]]"))["type"] == "done"
        assert behind.errors == []


FLOODS = {case[0]: case[1] for case in BAD if "flood" in case[0] or "for ever" in case[0] or "too long" in case[0]}


@pytest.mark.long
async def test_a_siege(figure, tmp_path):
    """Two thousand floods, ten at a time: each is closed within a second, and takes no memory and nobody along."""
    floods = tmp_path / "floods"
    floods.write_bytes(msgspec.msgpack.encode([b"".join(pieces) for pieces in FLOODS.values()]))
    async with open_gateway(config(anonymous=True, limits={"max_message_bytes": 65_536})) as behind:
        async with open_talk(behind.url) as talk, trio.open_nursery() as nursery:
            asked, lag = Healthy(), LoopLag()
            nursery.start_soon(partial(asked.ask_on, talk, pause_s=0.02))
            await trio.sleep(3)
            alone = asked.p99()
            async with open_attack("flood", behind.url, 200, str(floods)) as attackers:
                await attackers.wait_ended()
            before = resident()
            nursery.start_soon(lag.run)
            asked.took.clear()
            async with open_attack("flood", behind.url, 2_000, str(floods)) as attackers:
                attack = await attackers.wait_ended()
            beside, asked_then = asked.p99(), asked.number
            grown = (resident() - before) / 2_000
            nursery.cancel_scope.cancel()
        assert asked_then > 100
        assert set(attack.codes) <= {1008, 1009, None}
        assert max(attack.took) < 1.0
        assert beside < 2 * alone + 0.01
        assert grown < 4_096
        assert behind.errors == []
    figure(
        f"2,000 floods closed after at most {max(attack.took):.2f} s (the loop up to {lag.most_s:.2f} s behind); "
        f"{grown:.0f} B left of each; p99 of a healthy one {alone * 1000:.0f} ms before, {beside * 1000:.0f} ms beside"
    )


REQUESTS = [
    (b"\x00\x01\x02", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    (b"GET", None),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    (b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nContent-Length: 0\r\n\r\n", 400),
]


@pytest.mark.parametrize(("data", "status"), REQUESTS, ids=range(len(REQUESTS)))
async def test_bad_requests(data, status):
    """Refused with the status that says so, or just closed; nothing of it is an error of the gateway."""
    quick = config(anonymous=True, limits={"authenticate_s": 0.5})
    async with open_gateway(quick) as behind:
        host, port = address_of(behind.url)
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(data)
            reply = b""
            with trio.move_on_after(2):
                try:
                    while received := await stream.receive_some():
                        reply += received
                        if status == 404:
                            break
                except trio.BrokenResourceError:
                    pass
        assert (int(reply.split(b" ")[1]) if reply else None) == status
        assert behind.errors == []


# Row 37


@pytest.mark.parametrize("cap", ["max_per_principal", "max_per_address", "max_connections"])
async def test_caps(cap, figure):
    """One above a cap is closed with 1013, and alone; the counts go back, also after a kill -9 of the clients."""
    async with open_gateway(config(limits={cap: 2}), security=secured()) as behind:
        async with open_talk(behind.url, ADA_KEY) as one, open_talk(behind.url, ADA_KEY) as two:
            async with open_talk(behind.url, greets=False) as third:
                await third.send({"type": "hello", "version": 1, "token": ADA_KEY})
                assert await third.close_code() == 1013
            if cap == "max_per_principal":
                async with open_talk(behind.url, BOB_KEY):
                    pass
            for talk in (one, two):
                assert (await talk.request(type="statistics", id=1, session="s"))["type"] == "session_statistics"
        await none_left(behind)
        for _ in range(3):
            async with open_raw(behind.url) as (stream, _reply):
                await stream.send_all(frame(b'{"type":"hello","version":1,"token":"%b"}' % ADA_KEY.encode()))
                await stream.receive_some()
                # What a kill -9 of a client looks like.
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await none_left(behind)
        async with open_talk(behind.url, ADA_KEY), open_talk(behind.url, ADA_KEY):
            assert behind.gateway.statistics().principals == 1
        assert behind.gateway.statistics().closed["1013"] == 1
    figure(f"{cap}: one above is closed with 1013; counts back at 0, after resets as well")


async def none_left(behind):
    """Wait until the gateway has noticed that all connections have ended."""
    with trio.fail_after(10):
        while behind.gateway.statistics().connections:
            await trio.sleep(0.01)  # the far ends close


# Row 36

REACHING: list[dict[str, Any]] = [
    {"type": "ask", "messages": "x"},
    {"type": "ask", "messages": "x", "stream": True, "turn_id": "t"},
    {"type": "ask", "replaces": "t", "messages": "hello"},
    {"type": "interrupt"},
    {"type": "history"},
    {"type": "clear"},
    {"type": "fork", "target": "other"},
    {"type": "undo"},
    {"type": "compact"},
    {"type": "close"},
    {"type": "answer", "question_id": "q", "approved": True},
    {"type": "statistics"},
]


async def test_foreign_sessions(figure):
    """Another's session and one that is not there get the same answers; one's own of that name is another."""
    async with open_gateway(config(), security=secured()) as behind:  # noqa: SIM117 - one line each
        async with open_talk(behind.url, BOB_KEY) as bob, open_talk(behind.url, ADA_KEY) as ada:
            done = await bob.request(type="ask", id=1, session="secret", turn_id="t", messages="[[say hidden]]")
            assert done["type"] == "done"
            number = 0
            for request in REACHING:
                answers = []
                for name in ("secret", "missing"):
                    number += 1
                    found = await ada.request(**request, id=number, session=name, owner=["acme", "bob"])
                    assert found["type"] == "failed"
                    answers.append(json.dumps({**found, "id": 0}).replace(name, "NAME"))
                assert answers[0] == answers[1], request
                assert "session_not_found" in answers[0]
            own = await ada.request(type="history", id=number + 1, session="secret")
            assert own["entries"] == []
            history = await bob.request(type="history", id=2, session="secret")
            assert [entry["message"]["content"] for entry in history["entries"]] == ["[[say hidden]]", "hidden"]
            assert len(behind.world.sent) == 1
            assert (await ada.request(type="statistics", id=number + 2))["error"]["code"] == "access_denied"
            async with open_talk(behind.url, ROOT_KEY) as root:
                assert (await root.request(type="statistics", id=1))["snapshot"]["connections"] == 3
    figure(f"{len(REACHING)} kinds of requests about a foreign and a missing session: the same answers")


class Noting(MemoryStore):
    """A store that notes what it is asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __getattribute__(self, name):
        if name in {"load", "load_nowait", "version", "append", "append_nowait", "rewrite", "delete", "erase"}:
            self.asked.append(name)
        return super().__getattribute__(name)


class Spawned(trio.abc.Instrument):
    """Counts the tasks that are begun, by name."""

    def __init__(self):
        self.names = Counter()

    def task_spawned(self, task):
        self.names[task.name] += 1


async def test_foreign_sessions_take_the_same_work(figure):
    """The same is done for another's session and one that is not there, so that the time says nothing either."""
    store, spawned = Noting(), Spawned()
    async with open_gateway(config(), security=secured(), store=store) as behind:  # noqa: SIM117 - one line each
        async with open_talk(behind.url, BOB_KEY) as bob, open_talk(behind.url, ADA_KEY) as ada:
            for number, turn_id in enumerate(("s", "t"), start=1):
                await bob.request(type="ask", id=number, session="secret", turn_id=turn_id, messages="[[say hidden]]")
            trio.lowlevel.add_instrument(spawned)
            number = 0
            for request in REACHING:
                work = []
                for name in ("secret", "missing"):
                    number += 1
                    store.asked.clear()
                    spawned.names.clear()
                    await ada.request(**request, id=number, session=name, owner=["acme", "bob"])
                    work.append((store.asked[:], dict(spawned.names), behind.client.active_sessions))
                assert work[0] == work[1], request
                assert work[0][0] == []
            trio.lowlevel.remove_instrument(spawned)
    figure(f"{len(REACHING)} kinds of requests: the same tasks begun, no call of the store, for both")


async def test_a_turn_of_somebody_else(figure):
    """A turn id of another principal joins nothing."""
    async with open_gateway(config(), security=secured()) as behind:  # noqa: SIM117 - one line each
        async with open_talk(behind.url, BOB_KEY) as bob, open_talk(behind.url, ADA_KEY) as ada:
            await bob.request(type="ask", id=1, turn_id="t", messages="[[say hidden]]")
            found = await ada.request(type="ask", id=1, turn_id="t", messages="x", resumed=True)
            assert found["error"]["code"] == "turn_in_doubt"
            found = await bob.request(type="ask", id=2, turn_id="t", messages="x", resumed=True)
            assert found["result"]["message"]["content"] == "hidden"


@pytest.mark.parametrize("name", ["é" * 100, "x" + "é" * 100, "€" * 100, "x€" * 60, "\U0001f600" * 60], ids=range(5))
async def test_why_it_was_closed_can_be_read(name):
    """A reason that is too long for its frame is cut between two characters."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        await talk.send({"type": "ask", "id": 1, name: 1})
        assert await talk.close_code() == 4400
        assert talk.websocket.closed is not None
        assert "unknown field" in str(talk.websocket.closed.reason)


# Row 34


async def test_a_place_that_is_none_costs_one_connection():
    """Messages cannot be numbered on from any number: who says to have had so many is closed, and nobody else."""
    async with open_gateway() as behind, open_talk(behind.url) as other:
        async with open_talk(behind.url) as talk:
            ask = '{"type":"ask","id":1,"session":"s","turn_id":"t","messages":"x","resumed":true,"after":%s}'
            await talk.send(ask % ("9" * 4_300))
            assert await talk.close_code() == 4400
        assert (await other.request(type="ask", id=1, session="s", messages="[[say yes]]"))["type"] == "done"
        assert behind.errors == []


async def test_a_bug_costs_one_connection():
    """An exception that nobody foresaw: a request fails, its connection closes with 1011, the others go on."""
    calls = []

    def broken(_token):
        calls.append(1)
        if len(calls) == 2:
            raise BaseExceptionGroup("a bug", [RuntimeError("x")])
        return Principal(id="ada")

    async with (
        open_gateway(config(), security=secured(auth=CustomAuth(authenticate=broken), token_cache_ttl_s=0.0)) as behind,
        open_talk(behind.url, "first-token-of-ada") as healthy,
    ):
        async with open_talk(behind.url, greets=False) as talk:
            await talk.send({"type": "hello", "version": 1, "token": "x" * 20})
            assert await talk.close_code() == 4401
        assert (await healthy.request(type="history", id=1, session="s"))["type"] == "history_page"


async def test_a_crash_in_a_request(monkeypatch):
    """Likewise for what goes wrong behind a request."""
    from gorouter_trio.gateway.backend import Backend

    async def crash(self, request, caller):
        raise ExceptionGroup("a bug", [RuntimeError("secret detail")])

    async with open_gateway() as behind, open_talk(behind.url) as healthy:
        with monkeypatch.context() as patched:
            patched.setattr(Backend, "act", crash)
            async with open_talk(behind.url) as talk:
                await talk.send({"type": "clear", "id": 1, "session": "s"})
                failed = await talk.receive()
                assert failed["error"] == {"code": "internal", "message": "an error inside the gateway"}
                assert await talk.close_code() == 1011
        assert len(behind.errors) == 1
        assert (await healthy.request(type="ask", id=1, messages="[[say well]]"))["type"] == "done"
        with trio.fail_after(3):
            while behind.gateway.statistics().closed.get("1011") != 1:
                await trio.sleep(0.01)  # the far end closes


# What takes no longer than it takes to be sent.
ODD = [case[1] for case in BAD if case[0] not in {"a message at a snail's pace", "a flood of frames"}]


async def crash_many(count, rng, *, patience_s=20):
    """So many connections that end in every odd way, beside twenty that work; bytes of memory that are left of them.

    Those that the gateway lets live are given up after `patience_s`.
    """
    async with open_gateway(notes=False) as behind, AsyncExitStack() as stack:
        healthy = [await stack.enter_async_context(open_talk(behind.url)) for _ in range(20)]
        begun = warm = 0

        async def crash_on(talk, choices):
            nonlocal begun, warm
            number = 0
            while begun < count:
                begun += 1
                number += 1
                if begun == count // 10:
                    warm = resident()
                with trio.move_on_after(patience_s):
                    await _crash_one(behind.url, choices.choice(ODD), choices)
                if number % 50 == 5:
                    await well(talk, number)
            await well(talk, number + 1)

        async with trio.open_nursery() as nursery:
            for talk in healthy:
                nursery.start_soon(crash_on, talk, random.Random(rng.random()))
        with trio.fail_after(10):
            while behind.gateway.statistics().connections > len(healthy):
                await trio.sleep(0.01)  # the far ends close
        statistics = behind.gateway.statistics()
        assert behind.errors == []
        assert statistics.unauthenticated == 0
        assert sum(statistics.closed.values()) > count * 0.9
        return resident() - warm


async def well(talk, request_id):
    """The connection works."""
    assert (await talk.request(type="ask", id=request_id, messages="[[say well]]"))["type"] == "done"


def resident():
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_crashing_connections(figure, rng):
    """Connections that end in every odd way take none along that works."""
    await crash_many(150, rng, patience_s=3)
    figure("150 crashing connections, 0 others dropped")


@pytest.mark.long
async def test_a_hundred_thousand_crashing_connections(figure, rng):
    """Likewise, and nothing is left of them."""
    left = await crash_many(100_000, rng)
    assert left < 32 * 2**20
    figure(
        f"100,000 crashing connections, 0 others dropped; {left / 2**20:.1f} MiB more after the last than after 10,000"
    )


async def _crash_one(url, pieces, rng):
    try:
        async with open_raw(url) as (stream, _reply):
            if rng.random() < 0.7:
                await stream.send_all(frame(HELLO.encode()))
            for piece in pieces:
                await stream.send_all(piece)
            if rng.random() < 0.5:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                await close_code(stream)
    except (trio.BrokenResourceError, HandshakeError):
        pass
