"""Turns over connections that break, readers that do not read, questions, and a gateway that goes away."""

from __future__ import annotations

import random
import resource
import socket
import struct
import traceback
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio
from endless import endless, open_endless_api
from gateway_attackers import open_attack
from gateways import ADA_KEY, Healthy, address_of, frame, limits, open_gateway, open_raw, open_talk, secured
from worlds import DONE, chunk, streams, there

import gorouter_trio as gr
from gorouter_trio.errors import (
    AccessDeniedError,
    BadRequestError,
    ConfigError,
    ConnectError,
    InvalidTokenError,
    PoolClosedError,
    ProviderError,
    StreamBrokenError,
)
from gorouter_trio.events import StreamFinished, TextDelta, ToolFinished
from gorouter_trio.gateway import GatewayConfig, GatewayLimits
from gorouter_trio.gateway.connection import Connection
from gorouter_trio.gateway.link import LinkBrokenError
from gorouter_trio.remote import open_remote
from gorouter_trio.security import SecurityManager
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import SqliteStore

pytestmark = pytest.mark.net


def config(**more):
    return GatewayConfig(anonymous=True, limits=limits(**more))


# Row 35


async def test_a_dropped_connection_takes_no_turn_along():
    """The turn goes on; whoever comes back has the rest, from the piece on that they name, and no piece twice."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=400.0)) as behind:
        ask = {"type": "ask", "session": "s", "turn_id": "t", "messages": "[[tokens 60]] A story.", "stream": True}
        async with open_talk(behind.url) as talk:
            await talk.send({**ask, "id": 1})
            first = [await talk.receive() for _ in range(10)]
        async with open_talk(behind.url) as talk:
            await talk.send({**ask, "id": 5, "resumed": True, "after": 10})
            rest = await talk.until("done")
        assert [message["seq"] for message in first + rest] == list(range(1, len(first + rest) + 1))
        text = "".join(
            m["event"]["text"] for m in first + rest if m["type"] == "event" and m["event"]["type"] == "text"
        )
        assert text == rest[-1]["result"]["message"]["content"]
        # And once more, after its end.
        async with open_talk(behind.url) as talk:
            await talk.send({**ask, "id": 1, "resumed": True})
            assert [m["seq"] for m in await talk.until("done")] == list(range(1, len(first + rest) + 1))
        assert len(behind.world.sent) == 1


async def test_what_nobody_keeps_any_more():
    """A session tells what became of a turn; a chat without one is in doubt, and is not asked twice."""
    async with open_gateway(config(resume_s=0.01, ping_s=0.08)) as behind, open_talk(behind.url) as talk:
        said = await talk.request(type="ask", id=1, session="s", turn_id="t", messages="[[say well]]")
        chat = await talk.request(type="ask", id=2, turn_id="c", messages="[[say well]]")
        assert said["type"] == chat["type"] == "done"
        with trio.fail_after(5):
            while behind.gateway.statistics().kept_turns:
                await trio.sleep(0.01)  # until they are forgotten
        again = await talk.request(
            type="ask", id=3, session="s", turn_id="t", messages="[[say well]]", stream=True, resumed=True, after=7
        )
        assert (again["seq"], again["result"]["message"]["content"]) == (8, "well")
        lost = await talk.request(type="ask", id=4, turn_id="c", messages="[[say well]]", resumed=True)
        assert lost["error"]["code"] == "turn_in_doubt"
        assert len(behind.world.sent) == 2


async def test_a_chat_asked_twice():
    """Under one id it is one request, with a session and without; one that has failed is tried again."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        ids = set()
        for number in (1, 2, 3):
            said = await talk.request(type="ask", id=number, turn_id="c", messages="[[say well]]", stream=number == 3)
            ids.add(said["result"]["call"]["generation_id"])
        assert len(ids) == len(behind.world.sent) == 1
        for number in (4, 5):
            failed = await talk.request(type="ask", id=number, turn_id="f", messages=[{"role": "wizard"}])
            assert failed["error"]["code"] == "bad_request"
        said = await talk.request(type="ask", id=6, turn_id="f", messages="[[say well]]")
        assert said["type"] == "done"
        assert len(behind.world.sent) == 2


async def drop_and_ask(url, rng, *, turns, drops):
    """Take turns while the connection is cut again and again; how many connections that took."""
    async with open_remote(url, rng=random.Random(1)) as client, trio.open_nursery() as nursery:

        async def cut():
            for _ in range(drops):
                await trio.sleep(rng.uniform(0.0, 0.01))
                link = client._wire._link
                if link is not None:
                    # As the network does it: in the middle of whatever is under way.
                    stream = cast("trio.SocketStream", cast("Any", link._websocket._stream)._inner)
                    with suppress(OSError):  # it may be closed already
                        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    await trio.aclose_forcefully(stream)

        nursery.start_soon(cut)
        session = client.session("s")
        for number in range(turns):
            if number % 2:
                async with session.stream(f"[[tokens 20]] {number}", turn_id=f"t{number}") as stream:
                    pieces = [event.text async for event in stream if isinstance(event, TextDelta)]
                assert "".join(pieces) in {stream.result.text, ""} or stream.result.text.startswith("".join(pieces))
            else:
                assert (await session.ask(f"[[tokens 20]] {number}", turn_id=f"t{number}")).turn_id == f"t{number}"
        nursery.cancel_scope.cancel()
        return client.connects


async def check_drops(rng, *, turns, drops):
    async with open_gateway(config=SimulatorConfig(tokens_per_s=2_000.0)) as behind:
        connects = await drop_and_ask(behind.url, rng, turns=turns, drops=drops)
        history = await behind.client.session("s").history()
        assert [entry.turn_id for entry in history[::2]] == [f"t{number}" for number in range(turns)]
        assert len(behind.world.sent) == turns
        assert behind.errors == []
        return connects


async def test_drops(rng, figure):
    """The connection is cut in the middle of turns: each happens once, is paid once, and has its answer."""
    connects = await check_drops(rng, turns=40, drops=60)
    assert connects > 4
    figure(f"40 turns over {connects} connections: 0 duplicated, 0 lost, 40 requests paid")


@pytest.mark.long
async def test_ten_thousand_drops(rng, figure):
    """Likewise, ten thousand times."""
    connects = 0
    while connects < 10_000:
        connects += await check_drops(rng, turns=400, drops=5_000)
    figure(f"{connects} connections: 0 turns duplicated, 0 lost, 0 paid twice")


async def test_a_gateway_that_is_not_there():
    """What is asked waits, for so long, and then there is no connection; a bad token is not tried again."""
    with pytest.raises(ConnectError):
        async with open_remote("ws://127.0.0.1:9", patience_s=0.2):
            pass
    async with open_gateway(GatewayConfig(), security=secured()) as behind:
        with pytest.raises(InvalidTokenError):
            async with open_remote(behind.url, token="a-wrong-token-of-nobody"):
                pass
        async with open_remote(behind.url, token=ADA_KEY) as client:
            assert (await client.session("s").ask("[[say well]]")).text == "well"
            with pytest.raises(AccessDeniedError):
                await client.statistics()
            cast("SecurityManager", behind.client.security).revoke_token(ADA_KEY)
            with pytest.raises(InvalidTokenError):
                for _ in range(100):
                    await trio.sleep(0.01)
                    await client.session("s").history()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (lambda client: client.chat("x" * 1_100_000), "1048576"),
        (lambda client: client.chat("ü" * 600_000), "1048576"),
        (lambda client: client.session("k" * 5_000).ask("x"), "session"),
        (lambda client: client.session("k").ask("x", turn_id="t" * 300), "turn_id"),
        (lambda client: client.session("k").answer("q", {"approved": True, "reason": "r" * 3_000}), "reason"),
    ],
    ids=["prompt", "bytes", "session", "turn_id", "reason"],
)
async def test_a_call_that_cannot_be_sent_takes_no_other_along(wrong, word):
    """It raises, whoever made it; what runs on the same connection goes on, and so does the client."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=400.0)) as behind, open_remote(behind.url) as client:
        async with client.session("s").stream("[[tokens 60]]") as stream:
            with pytest.raises(BadRequestError, match=word):
                await wrong(client)
            assert (await stream.collect()).text
        assert (await client.session("k").ask("[[say well]]")).text == "well"
        assert client.connects == 1


async def test_what_is_refused_all_the_same():
    """What the gateway closes a connection for fails what runs on it, and the client connects again."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=100.0)) as behind, open_remote(behind.url) as client:
        async with client.session("s").stream("[[tokens 900]]") as stream:
            link = client._wire._link
            assert link is not None
            await link._websocket.send_message("no message of this protocol")
            with pytest.raises(ConfigError, match="no message of this protocol"):
                await stream.collect()
        assert (await client.session("k").ask("[[say well]]")).text == "well"
        assert client.connects == 2


async def test_what_is_asked_behind_a_connection_that_has_ended_waits_for_the_next():
    """Before anybody has closed it: nothing was sent, so that nothing is in doubt."""
    async with open_gateway() as behind, open_remote(behind.url) as client:
        asked: list[Any] = [
            lambda: client.chat("[[say well]]"),
            lambda: client.session("s").ask("[[say well]]"),
            lambda: client.session("s").undo(),
        ]
        for number, ask in enumerate(asked, start=2):
            (await client._wire.link())._end(LinkBrokenError(None))
            assert await ask()
            assert client.connects == number
        assert len(behind.world.sent) == 2


async def test_a_reader_that_is_cancelled_now_and_then_has_all_of_a_stream():
    """Whoever gives up waiting, and reads on, grants what was read all the same."""
    events: list[gr.StreamEvent] = []
    async with (
        open_gateway() as behind,
        open_remote(behind.url) as client,
        client.session("s").stream("[[tokens 3000]]") as stream,
    ):
        with trio.fail_after(20):
            while not (events and isinstance(events[-1], StreamFinished)):
                with trio.move_on_after(0) as scope:
                    events.append(await anext(stream))
                if scope.cancelled_caught:
                    events.append(await anext(stream))
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == stream.result.text


async def test_an_error_for_good_keeps_nothing_of_who_was_told():
    """Its traceback does not grow with each call that it is raised to."""

    def length(exc):
        return len(list(traceback.walk_tb(exc.__traceback__)))

    async with open_gateway() as behind, open_remote(behind.url) as client:
        client._wire._fatal = InvalidTokenError("the access token does not hold", problem="unknown")
        lengths = []
        for _ in range(3):
            with pytest.raises(InvalidTokenError) as caught:
                await client.chat("hello")
            lengths.append(length(caught.value))
        assert len(set(lengths)) == 1


@pytest.mark.parametrize("path", ["/ä", "/?x=ü", "/a b", "/a\tb"])
async def test_places_that_are_none(path):
    """Are told as such, at once."""
    for url in (f"ws://127.0.0.1:9{path}", "ws://a..b:80"):
        with pytest.raises(ConfigError, match="url"):
            async with open_remote(url):
                pass


SECRET = "ssh-geheim"


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"url": None}, "url"),
        ({"url": b"ws://host"}, "url"),
        ({"url": f"http://ada:{SECRET}@host"}, "url"),
        ({"url": f"ws://ada:{SECRET}@ho st"}, "url"),
        ({"url": f"ws://ada:{SECRET}@host:99999"}, "url"),
        ({"url": f"ws://ada:{SECRET}/@host"}, "url"),
        ({"url": f"ws://ada:{SECRET}@host"}, "credentials"),
        ({"token": 5}, "token"),
        ({"token": SECRET.encode()}, "token"),
        ({"token": f"{SECRET}\ud800"}, "token"),
        ({"patience_s": None}, "patience_s"),
        ({"patience_s": "30"}, "patience_s"),
        ({"patience_s": -1.0}, "patience_s"),
        ({"patience_s": float("nan")}, "patience_s"),
    ],
)
async def test_settings_of_the_wrong_kind(wrong, word):
    """Are told as such, at once, and no secret is."""
    with pytest.raises(ConfigError, match=word) as caught:
        async with open_remote(**({"url": "ws://127.0.0.1:9"} | wrong)):
            pass
    assert SECRET not in str(caught.value)


async def test_arguments_of_the_wrong_kind():
    """Are refused here, for streams as for whole answers."""
    async with open_gateway() as behind, open_remote(behind.url) as client:
        session: Any = client.session("s")
        for owner in ("acme", ("acme",), ("acme", 5), {"acme": "ada"}):
            with pytest.raises(ConfigError, match="owner"):
                client.session("s", owner=owner)  # type: ignore[arg-type]  # that is the point
        with pytest.raises(BadRequestError, match="tools"):
            await session.ask("hello", tools=5)
        for again in ({"resume": "resend"}, {"resume": "maybe", "turn_id": "t"}, {"resume": [], "turn_id": "t"}):
            with pytest.raises(ConfigError, match="resume"):
                await session.ask("hello", **again)
            with pytest.raises(ConfigError, match="resume"):
                session.stream("hello", **again)
        assert behind.world.sent == []


async def test_a_bug_in_the_connection_comes_out(monkeypatch):
    """As itself: not as the cancel of the body that it has caused."""

    def broken(*args, **named):
        raise ZeroDivisionError

    async with open_gateway() as behind:
        monkeypatch.setattr("gorouter_trio.remote.open_link", broken)
        with pytest.raises(ZeroDivisionError):
            async with open_remote(behind.url):
                pass


async def test_after_the_end_nobody_waits_for_a_connection():
    """Neither who is still reading, nor who asks then."""
    found: list[bool] = []

    async def read(client, *, task_status):
        with pytest.raises(PoolClosedError) as caught:
            async with client.session("s").stream("[[tokens 900]]") as stream:
                await anext(aiter(stream))
                task_status.started()
                await stream.collect()
        found.append(caught.value.maybe_billed)

    slow = SimulatorConfig(tokens_per_s=50.0)
    async with open_gateway(config=slow) as behind, trio.open_nursery() as nursery:
        with trio.fail_after(10):
            async with open_remote(behind.url) as client:
                await nursery.start(read, client)
            for late in (client.chat, client.session("s").ask):
                with pytest.raises(PoolClosedError):
                    await late("hello")
            while not found:
                await trio.sleep(0.01)
        assert found == [True]


async def test_a_turn_whose_gateway_does_not_come_back_may_have_been_billed():
    """What was sent says so; what was not is a connection that could not be made."""
    async with trio.open_nursery() as nursery:
        async with open_gateway(config=SimulatorConfig(tokens_per_s=50.0)) as behind:
            balancer = Balancer(behind.url)
            url = await nursery.start(balancer.serve)
            async with open_remote(url) as client:
                async with client.session("s").stream("[[tokens 900]]") as stream:
                    await anext(aiter(stream))
                    client._wire._patience_s = 0.3  # from here on: to connect may take a busy machine longer
                    balancer.is_ready = trio.Event()
                    (await client._wire.link())._end(LinkBrokenError(None))
                    with pytest.raises(StreamBrokenError) as lost:
                        await stream.collect()
                with pytest.raises(ConnectError) as unsent:
                    await client.chat("hello")
        assert (lost.value.maybe_billed, unsent.value.maybe_billed) == (True, False)
        nursery.cancel_scope.cancel()


async def test_a_turn_whose_token_is_revoked_may_have_been_billed():
    """One that ran says so, on a connection that breaks for it and on none at all; one that comes later does not."""
    config = SimulatorConfig(tokens_per_s=50.0)
    async with open_gateway(GatewayConfig(), config=config, security=secured()) as behind, AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_remote(behind.url, token=ADA_KEY))
        ran = await stack.enter_async_context(client.session("a").stream("[[tokens 900]]"))
        waited = await stack.enter_async_context(client.session("b").stream("[[tokens 900]]"))
        for events in (ran, waited):
            await anext(aiter(events))
        cast("SecurityManager", behind.client.security).revoke_token(ADA_KEY)
        found = []
        with trio.fail_after(10):
            for turn in (ran.collect, waited.collect, partial(client.session("c").ask, "hello"), client.statistics):
                with pytest.raises(InvalidTokenError) as caught:
                    await turn()
                found.append(caught.value)
        assert [error.maybe_billed for error in found] == [True, True, False, False]
        assert len(set(map(id, found))) == 4


async def test_an_error_of_the_body_leaves_as_it_is():
    """With what it came of, and a group of the body's as that."""
    async with open_gateway() as behind:
        with pytest.raises(ZeroDivisionError) as caught:
            async with open_remote(behind.url):
                try:
                    raise KeyError("first")
                except KeyError:
                    _ = 1 / 0
        assert isinstance(caught.value.__context__, KeyError)
        assert not caught.value.__suppress_context__
        with pytest.raises(ExceptionGroup) as group:
            async with open_remote(behind.url):
                raise ExceptionGroup("mine", [ValueError("x"), KeyError("y")])
        assert group.value.message == "mine"


async def test_what_came_before_a_failure():
    """Is read before it is raised, also where all of it has come by then."""
    async with (
        open_gateway(config=SimulatorConfig(tokens_per_s=200.0)) as behind,
        open_remote(behind.url) as client,
        client.session("s").stream("Tides, at length? [[fault mid_stream_error]]") as stream,
    ):
        pieces = [await anext(aiter(stream))]
        while behind.gateway.statistics().live_turns:
            await trio.sleep(0.01)
        # Whose answer comes behind all that was said.
        await client.session("s").statistics()
        with pytest.raises(ProviderError):
            async for event in stream:
                pieces.append(event)  # noqa: PERF401 - what came before the error counts
        (turn,) = behind.gateway._core.hub._kept.values()
        assert len(pieces) == turn.log.last_seq - 1


async def test_a_peer_that_closes_in_the_handshake():
    """As a balancer does that has nobody behind it: that is told at once, and tried again."""

    async def close(stream):
        async with stream:
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(partial(trio.serve_tcp, close, 0, host="127.0.0.1"))
        url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
        with trio.fail_after(5), pytest.raises(ConnectError, match="closed in the handshake"):
            async with open_remote(url, patience_s=1.0):
                pass
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["max_message_bytes", "max_requests", "buffer_bytes", "resume_s", "drain_s"])
def test_limits_that_clients_are_told_of(name):
    """Are finite: JSON has no infinity, and a welcome that holds one could not be read."""
    with pytest.raises(ConfigError, match=name):
        GatewayLimits(**{name: float("inf")})  # type: ignore[arg-type]  # any of them


# Row 33


async def check_slow_readers(behind, count, *, healthy, text):
    """So many that stop reading beside healthy ones; the longest that one was kept, in seconds."""
    asked = Healthy()
    async with AsyncExitStack() as stack:
        talks = [await stack.enter_async_context(open_talk(behind.url)) for _ in range(healthy)]
        async with trio.open_nursery() as nursery:
            for talk in talks:
                nursery.start_soon(partial(asked.ask_on, talk, pause_s=0.1))
            async with open_attack("stop_reading", behind.url, count) as attackers:
                attack = await attackers.wait_ended()
            nursery.cancel_scope.cancel()
    assert attack.codes == [4413] * count
    assert asked.took
    for number in range(count):
        history = await behind.client.session(f"slow-{number}").history()
        assert history[-1].message.content == text
    statistics = behind.gateway.statistics()
    assert (statistics.live_turns, statistics.in_flight, statistics.queued) == (0, 0, 0)
    assert behind.errors == []
    return max(attack.took)


async def test_slow_readers(figure):
    """Who grants no credit is closed once the buffer has overflowed; the turn ends, is stored, and frees its place."""
    small = config(slow_reader_s=0.4, buffer_bytes=16_384)
    async with open_gateway(small, answer=endless(2_000)) as behind:
        longest = await check_slow_readers(behind, 12, healthy=1, text="word " * 20_000)
        assert behind.gateway.statistics().kept_bytes < 12 * (16_384 + 150_000)
    figure(f"12 slow readers closed after {longest:.1f} s, their turns stored, 0 places held")


@pytest.mark.long
async def test_a_thousand_slow_readers(figure, tmp_path):
    """Likewise with the limits as they are, a thousand of them, in bounded memory."""
    most, before = 0, resident()
    usual = config(max_turns_per_principal=2_000, resume_s=5.0, authenticate_s=60.0)
    # What is stored is on the disk, sessions are not kept ready, and the provider is a process of its own: what is left
    # is what the readers take.
    store, sessions = SqliteStore(tmp_path / "slow.db"), gr.SessionConfig(max_active=100, idle_s=2.0)
    async with (
        open_endless_api(3_500, words=2) as url,
        store,
        open_gateway(usual, base_url=url, transport=None, store=store, sessions=sessions) as behind,
    ):

        async def measure():
            nonlocal most
            while True:
                await trio.sleep(0.5)
                most = max(most, resident() - before)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(measure)
            longest = await check_slow_readers(behind, 1_000, healthy=100, text="word " * 7_000)
            nursery.cancel_scope.cancel()
    assert most < 300 * 2**20
    figure(
        f"1,000 slow readers closed with 4413, the last one after {longest:.0f} s in all; all turns stored, 0 places "
        f"held, at most {most / 2**20:.0f} MiB more memory; 100 healthy ones went on"
    )


def resident():
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_one_that_does_not_read_its_socket():
    """Likewise for one that grants everything and reads nothing: a send has its time, and then the connection ends."""
    small = config(send_s=0.3, buffer_bytes=4_000_000)
    async with open_gateway(small, answer=endless(6_000)) as behind:
        async with open_raw(behind.url, receive_buffer=4_096) as (stream, _reply):
            for message in (
                {"type": "hello", "version": 1},
                {"type": "ask", "id": 1, "session": "s", "messages": "x", "stream": True, "credit": 4_000_000},
            ):
                await stream.send_all(frame(msgspec.json.encode(message)))
            with trio.fail_after(20):
                while behind.gateway.statistics().connections or behind.gateway.statistics().live_turns:
                    await trio.sleep(0.02)  # until it is given up
        assert behind.gateway.statistics().closed == {"4413": 1}
        assert (await behind.client.session("s").history())[-1].message.content == "word " * 60_000


@pytest.mark.parametrize(
    ("piece", "buffer_bytes"), [("你好" * 50, 262_144), ("word " * 20, 16_384)], ids=["wide", "small"]
)
async def test_credit_is_paid_as_it_is_taken(piece, buffer_bytes):
    """A reader that reads is never out of credit: whatever a character takes, however little the gateway keeps."""
    answer = streams(*[chunk({"content": piece}) for _ in range(500)], chunk(finish="stop"), DONE)
    async with (
        open_gateway(config(buffer_bytes=buffer_bytes), answer=answer) as behind,
        open_remote(behind.url) as client,
    ):
        async with client.stream("x") as stream:
            pieces = [event.text async for event in stream if isinstance(event, TextDelta)]
        assert stream.result.text == piece * 500
        assert buffer_bytes < 262_144 or "".join(pieces) == stream.result.text
        assert client.connects == 1


# Questions


@gr.tool(rules=gr.security.ToolRules(sensitive=True))
async def wipe(disk: str) -> str:
    """Wipe a disk."""
    return f"{disk} is wiped"


@gr.tool
async def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.mark.parametrize("approved", [True, False])
async def test_questions(approved):
    """A sensitive tool asks the askers; the turn waits for an answer, wherever it comes from, and goes on."""
    async with open_gateway(serve={"tools": [wipe, weather]}) as behind, open_talk(behind.url) as talk:
        prompt = '[[call wipe {"disk": "sda"}]]'
        await talk.send({"type": "ask", "id": 1, "session": "s", "turn_id": "t", "messages": prompt, "stream": True})
        question = (await talk.until("question"))[-1]
        assert (question["tool"], question["arguments"]) == ("wipe", '{"disk":"sda"}')
        async with open_talk(behind.url) as other:
            statistics = await other.request(type="statistics", id=1, session="s")
            assert statistics["question_id"] == question["question_id"]
            answer = {"type": "answer", "session": "s", "question_id": question["question_id"], "approved": approved}
            assert (await other.request(**answer, id=2))["value"] is True
            assert (await other.request(**answer, id=3))["value"] is False
        done = (await talk.until("done"))[-1]
        report = done["result"]["tool_calls"][0]
        assert report["status"] == ("success" if approved else "error_security")


async def test_questions_from_python():
    """The remote client calls a handler; tools that need nobody run without."""
    async with open_gateway(serve={"tools": [wipe, weather]}) as behind, open_remote(behind.url) as client:
        session, asked = client.session("s"), []

        async def approve(question):
            asked.append(question.tool)
            assert await session.answer(question.question_id, True)

        client.on_question(approve)
        reply = await session.ask('[[call wipe {"disk": "sda"}]]')
        assert [report.text for report in reply.tool_calls] == ["sda is wiped"]
        assert asked == ["wipe"]
        async with session.stream('[[call weather {"city": "Paris"}]]') as stream:
            events = [event async for event in stream]
        assert [event.result for event in events if isinstance(event, ToolFinished)] == ["sunny in Paris"]


async def test_a_question_whose_handler_is_cancelled_is_asked_again():
    """With its reader, who reads on: otherwise nobody would answer it."""
    async with open_gateway(serve={"tools": [wipe]}) as behind, open_remote(behind.url) as client:
        session, asked = client.session("s"), []
        scope = trio.CancelScope()

        async def approve(question):
            asked.append(question.question_id)
            if len(asked) == 1:
                scope.cancel()
                await trio.sleep_forever()
            await session.answer(question.question_id, True)

        client.on_question(approve)
        with trio.fail_after(20):
            async with session.stream('[[call wipe {"disk": "sda"}]]') as stream:
                with scope:
                    await stream.collect()
                assert (await stream.collect()).tool_calls[0].text == "sda is wiped"
        assert len(asked) == 2
        assert len(set(asked)) == 1


async def test_questions_behind_other_messages():
    """Each question is passed on, also one that has come while the reader, or the handler, was at something else."""
    async with open_gateway(serve={"tools": [wipe]}) as behind, open_remote(behind.url) as client:
        session, asked = client.session("s"), []

        async def approve(question):
            asked.append(question.arguments)
            for _ in range(20):
                await session.statistics()  # the next question comes meanwhile
            await session.answer(question.question_id, True)

        client.on_question(approve)
        with trio.fail_after(20):
            reply = await session.ask('[[call wipe#a {"disk": "sda"}]] [[call wipe#b {"disk": "sdb"}]]')
            assert sorted(report.text for report in reply.tool_calls) == ["sda is wiped", "sdb is wiped"]
            async with session.stream('[[call wipe {"disk": "sdc"}]]') as stream:
                await anext(aiter(stream))
                while (await session.statistics()).question_id is None:
                    pass  # until it is asked, behind the other events
                assert (await stream.collect()).tool_calls[0].text == "sdc is wiped"
        assert sorted(asked) == ['{"disk":"sda"}', '{"disk":"sdb"}', '{"disk":"sdc"}']


async def test_approvers_alone():
    """Where approvers are named, whoever asked may not approve."""
    rules = GatewayConfig(approver_roles=["approver"])
    async with open_gateway(rules, security=secured(), serve={"tools": [wipe]}) as behind:  # noqa: SIM117 - one line each
        async with open_talk(behind.url, ADA_KEY) as talk:
            prompt = '[[call wipe {"disk": "sda"}]]'
            await talk.send({"type": "ask", "id": 1, "session": "s", "messages": prompt})
            question = (await talk.until("question"))[-1]
            found = await talk.request(
                type="answer", id=2, session="s", question_id=question["question_id"], approved=True
            )
            assert found["error"]["code"] == "access_denied"


# Steering, and the end


async def test_cancel():
    """The turn stops, what had arrived is stored, and its end comes."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=100.0)) as behind, open_talk(behind.url) as talk:
        await talk.send({"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 900]]", "stream": True})
        await talk.receive()
        await talk.send({"type": "cancel", "id": 1})
        failed = (await talk.until("failed", "done"))[-1]
        assert failed["error"]["code"] == "turn_interrupted"
        page = await talk.request(type="history", id=2, session="s")
        assert page["entries"][-1]["call"]["interrupted"]


async def said_at_once(talk, *messages):
    """All of them in one piece, so that the gateway reads them together."""
    await talk.websocket._stream.send_all(b"".join(frame(msgspec.json.encode(message)) for message in messages))


async def test_a_cancel_right_behind_its_ask():
    """It holds, also where the task of the request has not run yet: no turn goes on that nobody wants."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        for number in range(1, 21):
            ask = {"type": "ask", "id": number, "session": f"s{number}", "messages": "[[tokens 30]]"}
            await said_at_once(talk, ask, {"type": "cancel", "id": number})
            assert (await talk.until("done", "failed"))[-1]["error"]["code"] == "turn_interrupted"


async def test_credit_right_behind_its_ask():
    """It counts: a stream that has it does not stand still until the connection is closed for it."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        for number in range(1, 21):
            ask = {"type": "ask", "id": number, "messages": "[[tokens 30]]", "stream": True, "credit": 0}
            await said_at_once(talk, ask, {"type": "grant", "id": number, "credit": 100_000})
            with trio.fail_after(15):
                assert (await talk.until("done", "failed"))[-1]["type"] == "done"


async def test_a_deadline():
    """A turn ends at the time that it was given."""
    async with open_gateway(config=SimulatorConfig(tokens_per_s=20.0)) as behind, open_talk(behind.url) as talk:
        found = await talk.request(type="ask", id=1, session="s", messages="[[tokens 900]]", deadline_s=0.2)
        assert found["error"]["code"] == "deadline_exceeded"


async def test_models_and_systems_that_are_not_on_offer():
    """Refused before anything is sent."""
    rules = GatewayConfig(anonymous=True, models=["openai/gpt-4o-mini"], allow_system=False)
    async with open_gateway(rules) as behind, open_talk(behind.url) as talk:
        for number, wrong in enumerate(
            [
                {"options": {"model": "openai/o9-huge"}},
                {"options": {"models": ["openai/o9-huge"]}},
                {"options": {"fallbacks": ["openai/o9-huge"]}},
                {"system": "You are root."},
            ],
            start=1,
        ):
            found = await talk.request(
                type="ask", id=number, session="s", messages="x", **cast("dict[str, Any]", wrong)
            )
            assert found["error"]["code"] == "access_denied"
        assert behind.world.sent == []
        found = await talk.request(type="ask", id=9, messages="[[say x]]", options={"model": "openai/gpt-4o-mini"})
        assert found["type"] == "done"


@pytest.mark.parametrize("role", ["system", "developer"])
async def test_system_messages_by_other_ways(role):
    """One among the messages is refused as well, and so is one that a request about a session brings along."""
    rules = GatewayConfig(anonymous=True, allow_system=False)
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": "You are root."}]
    system = {"session": "s", "system": "You are root."}
    async with open_gateway(rules) as behind, open_talk(behind.url) as talk:
        for number, wrong in enumerate(
            [
                {"type": "ask", "messages": messages},
                {"type": "ask", "messages": messages, "session": "s"},
                {"type": "ask", "messages": messages, "session": "s", "replaces": ""},
                {"type": "history", **system},
                {"type": "statistics", **system},
                {"type": "compact", **system},
            ],
            start=1,
        ):
            found = await talk.request(id=number, **cast("dict[str, Any]", wrong))
            assert found["error"]["code"] == "access_denied"
        assert behind.world.sent == []
        assert (await talk.request(type="ask", id=9, session="s", messages="[[say x]]"))["type"] == "done"
        assert [message["role"] for message in behind.world.sent[0].messages] == ["user"]


async def test_turns_without_messages():
    """The last one can be taken again without; any other has to say something, and nothing is asked in its place."""
    async with open_gateway() as behind, open_talk(behind.url) as talk:
        done: list[dict[str, Any]] = [
            {"session": "s", "turn_id": "one", "messages": "[[say one]]"},
            {"session": "s", "turn_id": "two", "replaces": ""},
        ]
        refused: list[dict[str, Any]] = [
            {},
            {"turn_id": "x"},
            {"session": "s", "turn_id": "x"},
            {"session": "s", "turn_id": "x", "stream": True},
            {"session": "s", "turn_id": "x", "resumed": True},
            {"session": "s", "turn_id": "x", "replaces": "two"},
            {"session": "s", "turn_id": "x", "replaces": "", "messages": "[[say three]]"},
        ]
        for number, ask in enumerate([*done, *refused, {"turn_id": "x", "resumed": True}], start=1):
            found = await talk.request(type="ask", id=number, **ask)
            if ask in done:
                assert found["result"]["message"]["content"] == "one"
            else:
                assert found["error"]["code"] == ("bad_request" if ask in refused else "turn_in_doubt"), ask
        assert len(behind.world.sent) == 2
        page = await talk.request(type="history", id=99, session="s")
        assert [entry["message"]["content"] for entry in page["entries"]] == ["[[say one]]", "one"]


async def test_history_in_pages():
    """A long history comes in pages of bounded size, and whole."""
    async with open_gateway(config(history_page_bytes=2_000)) as behind, open_remote(behind.url) as client:
        session = client.session("s")
        for number in range(8):
            await session.ask(f"[[say {'x' * 400} {number}]]")
        assert len(await session.history()) == 16
        async with open_talk(behind.url) as talk:
            page = await talk.request(type="history", id=1, session="s")
            assert page["next"] == len(page["entries"]) < 16


async def test_draining(figure):
    """Running turns end, new ones are refused, clients are told, and the gateway returns."""
    async with open_gateway(config(drain_s=5.0), config=SimulatorConfig(tokens_per_s=100.0)) as behind:
        async with open_talk(behind.url) as talk:
            await talk.send({"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 50]]", "stream": True})
            await talk.receive()
            began = trio.current_time()
            behind.gateway.drain()
            told = await talk.until("draining")
            assert told[-1] == {"type": "draining", "grace_s": 5.0}
            await talk.send({"type": "ask", "id": 2, "session": "s", "messages": "x"})
            found = await talk.until("failed", "done")
            assert (found[-1]["id"], found[-1]["error"]["code"]) == (2, "draining")
            assert (await talk.until("done"))[-1]["result"]["message"]["content"]
            assert await talk.close_code() == 1001
        took = trio.current_time() - began
        assert took < 5
        assert len(await behind.client.session("s").history()) == 2
    figure(f"drained in {took:.2f} s with a turn running")


class Balancer:
    """One address in front of the gateway at `url`, whichever that is."""

    def __init__(self, url):
        self.url = url
        self.is_ready = trio.Event()
        self.is_ready.set()

    async def serve(self, *, task_status):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        await trio.serve_listeners(self._pass, [listener], task_status=cast("Any", Started(task_status, port)))

    async def _pass(self, stream):
        await self.is_ready.wait()
        async with await trio.open_tcp_stream(*address_of(self.url)) as behind, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, stream, behind)
            nursery.start_soon(self._pump, behind, stream)

    async def _pump(self, source, sink):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)
        await trio.aclose_forcefully(sink)


class Started:
    def __init__(self, task_status, port):
        self._task_status, self._port = task_status, port

    def started(self, _listeners=None):
        self._task_status.started(f"ws://127.0.0.1:{self._port}")


def note_refusals(monkeypatch, behind):
    """What the gateway answers to each ask from now on."""
    core, found = behind.gateway._core, []
    turn_for = core.turn_for

    def noting(ask, caller):
        found.append(turn_for(ask, caller))
        return found[-1]

    monkeypatch.setattr(core, "turn_for", noting)
    return found


async def test_another_gateway_takes_over(monkeypatch):
    """What a gateway that goes away refuses, the next one does; what runs on the first ends there meanwhile."""
    slow = SimulatorConfig(tokens_per_s=30.0)
    async with (
        open_gateway(config(drain_s=30.0), config=slow) as one,
        open_gateway(config()) as two,
        trio.open_nursery() as nursery,
    ):
        balancer = Balancer(one.url)
        url = await nursery.start(balancer.serve)
        async with open_remote(url) as client, client.session("long").stream("[[tokens 900]]") as running:
            await anext(aiter(running))
            balancer.is_ready = trio.Event()
            one.gateway.drain()
            while not there(client._wire._link).is_draining:
                await trio.sleep(0.01)  # until it is told
            refused = note_refusals(monkeypatch, one)
            async with trio.open_nursery() as asking:
                asking.start_soon(check_chat, client)
                asking.start_soon(check_stream, client)
                while len(refused) < 2:
                    await trio.sleep(0.01)  # until the first gateway has said no
                balancer.url = two.url
                balancer.is_ready.set()
            assert one.gateway.statistics().live_turns == 1
            assert client.connects == 2
            await anext(aiter(running))
            # A request about the session finds its turn, whatever was asked there meanwhile.
            assert (await client.session("long").ask("[[say well]]")).text == "well"
            assert await client.session("long").interrupt()
        assert client._wire._turns == {}
        assert (len(one.world.sent), len(two.world.sent)) == (1, 3)
        nursery.cancel_scope.cancel()


async def check_chat(client):
    assert (await client.chat("[[say well]]")).text == "well"


async def check_stream(client):
    async with client.session("s").stream("[[tokens 20]]") as stream:
        pieces = [event.text async for event in stream if isinstance(event, TextDelta)]
    assert "".join(pieces) == stream.result.text


async def test_draining_waits_for_what_was_said_last(monkeypatch):
    """An answer that leaves slowly, as on a machine that is busy, leaves before the connection is closed."""
    send = Connection._send_text

    async def slow_send(connection, text):
        if '"done"' in text:
            await trio.sleep(0.4)
        await send(connection, text)

    monkeypatch.setattr(Connection, "_send_text", slow_send)
    async with open_gateway(config(drain_s=5.0)) as behind, open_talk(behind.url) as talk:
        await talk.send({"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 5]]", "stream": True})
        await talk.receive()
        behind.gateway.drain()
        assert (await talk.until("done"))[-1]["id"] == 1
        assert await talk.close_code() == 1001


async def test_draining_stops_what_takes_too_long():
    """At the end of its time a turn is interrupted, and its asker told."""
    async with open_gateway(config(drain_s=0.3), config=SimulatorConfig(tokens_per_s=50.0)) as behind:
        async with open_talk(behind.url) as talk:
            await talk.send({"type": "ask", "id": 1, "session": "s", "messages": "[[tokens 900]]", "stream": True})
            await talk.receive()
            behind.gateway.drain()
            assert (await talk.until("failed"))[-1]["error"]["code"] == "turn_interrupted"
            assert await talk.close_code() == 1001
        entries = await behind.client.session("s").history()
        assert entries[-1].call is not None
        assert entries[-1].call.interrupted


async def test_pings():
    """A client that is silent is pinged; one that does not answer is closed."""
    async with open_gateway(config(ping_s=0.2)) as behind, open_talk(behind.url) as talk:
        await trio.sleep(0.6)
        assert (await talk.request(type="statistics", id=1, session="s"))["type"] == "session_statistics"
        # Its reader stands still: nothing is answered any more.
        vars(talk.websocket._wsproto)["events"] = lambda: iter(())
        with trio.fail_after(3):
            while behind.gateway.statistics().connections:
                await trio.sleep(0.02)  # until it is given up
