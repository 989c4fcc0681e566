"""Streams: lent connections come back on every way out, errors before the first delta are retried, later ones never."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from decimal import Decimal

import pytest
import trio
import trio.testing
from pooled import ORIGIN, Place, make_head, open_place
from scripted import (
    COMMENT,
    DONE,
    STREAM_HEAD,
    Peer,
    Request,
    Serve,
    answering,
    chat,
    chunks,
    delta,
    error,
    reply,
    stream,
)

from gorouter_trio.config import ClientConfig, PoolLimits, RetryPolicy
from gorouter_trio.errors import (
    BadRequestError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    ProviderError,
    RateLimitError,
    StreamBrokenError,
)
from gorouter_trio.pool.attempts import AttemptRecord
from gorouter_trio.pool.streams import begin_reading
from gorouter_trio.pool.workers import Exchange, Lease, open_pool
from gorouter_trio.transport.connector import connector
from gorouter_trio.transport.http import ConnectionLimits, Origin
from gorouter_trio.wire.mail import HttpCall
from gorouter_trio.wire.stream import ChatChunk

WHOLE = (COMMENT, delta(), delta("Low "), COMMENT, delta("tide"), delta(finish="stop"))
LAST = delta(finish="stop", usage={"total_tokens": 9, "cost": 0.25})
NEVER = RetryPolicy(max_retries=0)


def frame(*events: bytes) -> bytes:
    """Events as chunks, without the end."""
    return chunks(events, end=b"")


async def test_a_whole_stream() -> None:
    """Text, usage, ids and times of a stream, and its connection serves the next request."""
    async with open_place(answering(lambda request: stream(*WHOLE, LAST, DONE))) as place:
        for _ in range(3):
            async with place.stream() as reader:
                assert place.statistics.in_flight == 1
                got = []
                while chunks_ := await reader.read():
                    got += chunks_
                result = reader.result()
            assert result.text == "Low tide"
            assert (result.call.usage.cost, result.generation_id) == (Decimal("0.25"), "gen-1")  # type: ignore[union-attr]
            assert (result.finish_reason, result.call.attempts, result.call.maybe_billed) == ("stop", 1, False)
            assert result.call.ttft_s is not None
            assert len(got) == 5
            await place.check_clean()
        assert place.statistics.opened == 1


async def test_the_end_in_a_later_read(autojump_clock: trio.testing.MockClock) -> None:
    """`[DONE]` and the end may come after the finish, in reads of their own: the connection is used again."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            for piece in (STREAM_HEAD + frame(*WHOLE), frame(LAST), frame(DONE), b"0\r\n", b"\r\n"):
                await peer.send(piece)
                await trio.sleep(0.1)

    async with open_place(serve) as place:
        for _ in range(3):
            started = trio.current_time()
            assert await place.read() == "Low tide"
            assert trio.current_time() - started == pytest.approx(0.2)
            await trio.sleep(0.5)
            await place.check_clean()
        assert place.statistics.opened == 1


async def test_an_end_that_never_comes(autojump_clock: trio.testing.MockClock) -> None:
    """A server that goes on after `[DONE]` costs its connection after a moment, and the caller nothing."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD, frame(*WHOLE, DONE))
        while True:
            await peer.send(frame(COMMENT))
            await trio.sleep(0.1)

    async with open_place(serve) as place:
        started = trio.current_time()
        assert await place.read() == "Low tide"
        assert trio.current_time() == started
        await trio.sleep(2)
        await place.check_clean()
        assert place.statistics.connections == 0


@pytest.mark.parametrize("finish", [True, False])
async def test_the_end_without_done(finish: bool) -> None:
    """The end of the reply is the end of the stream where it was finished, and a broken stream where it was not."""
    events = WHOLE if finish else WHOLE[:-1]
    async with open_place(answering(lambda request: stream(*events)), retry=NEVER) as place:
        if finish:
            assert await place.read() == "Low tide"
            assert place.statistics.connections == 1
        else:
            with pytest.raises(StreamBrokenError, match="before the reply was finished") as broken:
                await place.read()
            assert broken.value.partial is not None
            assert (broken.value.partial.text, broken.value.partial.interrupted) == ("Low tide", True)
            assert (broken.value.maybe_billed, broken.value.generation_id) == (True, "gen-1")
        await place.check_clean()


async def test_a_stream_that_is_cut_at_any_byte() -> None:
    """Cut anywhere, what was given out is a start of the truth, and only the finished answer ends without an error."""
    raw = stream(*WHOLE, LAST, DONE)
    finished = raw.index(b'"finish_reason": "stop"')
    place_at = 0

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(raw[:place_at])

    async with open_place(serve, retry=NEVER, breaker=None) as place:
        for place_at in range(len(STREAM_HEAD), len(raw), 3):
            text, broken = await _read_on(place)
            assert "Low tide".startswith(text)
            if place_at <= finished:
                assert isinstance(broken, StreamBrokenError), place_at
            if broken is not None:
                assert broken.maybe_billed
                assert (broken.partial.text if broken.partial else "") == text
        await place.check_clean()


async def _read_on(place: Place) -> tuple[str, GorouterError | None]:
    """The text that a stream gives out, and the error that it ends with."""
    text = ""
    try:
        async with place.stream() as reader:
            while read := await reader.read():
                text += text_of(read)
    except GorouterError as error:
        return text, error
    return text, None


def text_of(read: list[ChatChunk]) -> str:
    """What chunks add to the text."""
    deltas = [choice.delta for chunk in read for choice in chunk.choices or []]
    return "".join(str(delta.content or "") for delta in deltas if delta is not None)


# --- errors -----------------------------------------------------------------------------------------------------------

FIRST_ERRORS: dict[str, bytes] = {
    "a status": error(503),
    "the only event": stream(b'data: {"error":{"code":502,"message":"error in the stream"}}\n\n'),
    "after comments": stream(
        COMMENT, COMMENT, b'data: {"error":{"code":502,"message":"error in the stream"}}\n\n', DONE
    ),
    "after an empty delta": stream(
        delta(), b'data: {"error":{"code":"server_error","message":"error in the stream"},"choices":[]}\n\n'
    ),
    "with a finish": stream(delta(finish="error", error={"code": 502, "message": "error in the stream"})),
    "without an object": stream(delta(finish="error")),
    "json": reply({"error": {"code": 502, "message": "error in the body"}}, headers=["Content-Type: application/json"]),
    "padded json": reply(
        b"\n         \n" * 5 + b'{"error":{"code":502,"message":"x"}}',
        headers=["content-type: Application/JSON; charset=utf-8"],
    ),
    "padding alone": reply(b"\n         \n" * 5, headers=["Content-Type: application/json"]),
    "nothing": STREAM_HEAD + b"0\r\n\r\n",
    "comments alone": stream(COMMENT, COMMENT),
    "done alone": stream(DONE),
    "cut in the head": STREAM_HEAD[:-10],
    "cut after comments": STREAM_HEAD + frame(COMMENT),
}


@pytest.mark.parametrize("raw", FIRST_ERRORS.values(), ids=FIRST_ERRORS.keys())
async def test_an_error_before_the_first_delta_is_retried(raw: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """Whatever goes wrong before anything was given out, the consumer gets the second answer and no error."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            first = len(place.network.requests) == 1
            await peer.send(raw if first else stream(*WHOLE, LAST, DONE))
            if first and not (raw.endswith(b"0\r\n\r\n") or b"Content-Length" in raw):
                return

    async with open_place(serve) as place:
        async with place.stream() as reader:
            while await reader.read():
                pass
            assert (reader.result().text, reader.result().call.attempts) == ("Low tide", 2)
        assert len(place.network.requests) == 2
        await place.check_clean()


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (stream(b'data: {"error":{"code":400,"message":"bad"}}\n\n'), BadRequestError),
        (error(400), BadRequestError),
        (stream(b"data: {not json\n\n"), DecodeError),
        (stream(b'data: {"choices":"x"}\n\n'), DecodeError),
        (
            stream(
                b'data: {"error":{"code":429,"message":"m","metadata":{"limit_source":'
                b'"openrouter_free_tier_daily"}}}\n\n'
            ),
            RateLimitError,
        ),
        (reply(b"[]", headers=["Content-Type: application/json"]), DecodeError),
    ],
)
async def test_errors_that_are_not_retried(raw: bytes, kind: type[GorouterError]) -> None:
    """A first event that says that the request is wrong, or cannot be read, is raised on entering."""
    async with open_place(answering(lambda request: raw)) as place:
        with pytest.raises(kind) as raised:
            async with place.stream():
                pytest.fail("there is nothing to read")
        assert (raised.value.attempts, len(place.network.requests)) == (1, 1)
        await place.check_clean()


LATER = {
    "an error": (b'data: {"error":{"code":503,"message":"later"}}\n\n', ProviderError),
    "with a finish": (delta(finish="error", error={"code": 502, "message": "later"}), ProviderError),
    "without an object": (delta(finish="error"), ProviderError),
    "no json": (b"data: {\n\n", DecodeError),
    "cut": (b"", StreamBrokenError),
}


@pytest.mark.parametrize(("event", "kind"), LATER.values(), ids=LATER.keys())
@pytest.mark.parametrize("together", [True, False], ids=["in one read", "in reads"])
async def test_an_error_after_the_first_delta_is_never_retried(
    event: bytes, kind: type[GorouterError], together: bool
) -> None:
    """What came before the error is given out first, all of it, then the error with the partial answer; one request."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            pieces = [STREAM_HEAD + frame(delta("Low ")), frame(delta("tide")), *([frame(event)] if event else [])]
            for piece in [b"".join(pieces)] if together else pieces:
                await peer.send(piece)
                await trio.testing.wait_all_tasks_blocked()
            if not event:
                return

    async with open_place(serve) as place:
        text = ""
        with pytest.raises(kind) as raised:
            async with place.stream() as reader:
                while read := await reader.read():
                    text += text_of(read)
        assert text == "Low tide"
        found = raised.value
        assert found.partial is not None
        assert (found.partial.text, found.partial.interrupted, found.maybe_billed) == ("Low tide", True, True)
        assert (found.attempts, found.generation_id, len(place.network.requests)) == (1, "gen-1", 1)
        await place.check_clean()
        assert place.statistics.connections == 0


async def test_a_server_that_cannot_stream() -> None:
    """A whole reply in the place of a stream is a stream of one chunk."""
    body = json.loads(chat("at once").partition(b"\r\n\r\n")[2])
    body["usage"] = {"cost": 0.5}
    raw = reply(body, headers=["Content-Type: application/json"])
    async with open_place(answering(lambda request: raw)) as place:
        for _ in range(2):
            async with place.stream() as reader:
                assert len(await reader.read()) == 1
                assert await reader.read() == []
                result = reader.result()
            assert (result.text, result.cost, result.finish_reason) == ("at once", Decimal("0.5"), "stop")
            await place.check_clean()
        assert place.statistics.opened == 1


async def test_an_event_over_the_cap() -> None:
    """An event that grows over the body limit breaks the stream with a typed error, and the connection is closed."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD, frame(delta("a")))
        with suppress(trio.BrokenResourceError):
            while True:
                await peer.send(frame(b"data: " + b"x" * 100))

    async with open_place(serve, pool=PoolLimits(max_body_bytes=4096)) as place:
        with pytest.raises(DecodeError, match="over 4096 bytes") as raised:
            await place.read()
        assert raised.value.partial is not None
        await place.check_clean()
        assert place.statistics.connections == 0


# --- leases -----------------------------------------------------------------------------------------------------------


async def _endless(peer: Peer) -> None:
    await peer.request()
    await peer.send(STREAM_HEAD)
    while True:
        await peer.send(frame(delta("x")))
        await trio.sleep(0.01)


class LeftError(Exception):
    """What a consumer raises."""


async def _leave(place: Place) -> None:
    async with place.stream():
        pass


async def _leave_after_some(place: Place) -> None:
    async with place.stream() as reader:
        await reader.read()
        await reader.read()


async def _raise(place: Place) -> None:
    async with place.stream() as reader:
        await reader.read()
        raise LeftError


async def _cancel(place: Place) -> None:
    with trio.move_on_after(1):
        async with place.stream() as reader:
            while True:
                await reader.read()


async def _close_twice(place: Place) -> None:
    async with place.stream() as reader:
        reader.close()
        reader.close()
        with pytest.raises(StreamBrokenError):
            while True:
                await reader.read()


@pytest.mark.parametrize("use", [_leave, _leave_after_some, _raise, _cancel, _close_twice])
async def test_every_way_out_returns_the_lease(
    use: Callable[[Place], Awaitable[None]], autojump_clock: trio.testing.MockClock
) -> None:
    """Leaving early, by an error or by a cancel closes the connection, which stops the server and frees the slot."""
    stopped: list[bool] = []

    async def serve(peer: Peer) -> None:
        try:
            await _endless(peer)
        except trio.BrokenResourceError:
            stopped.append(True)

    async with open_place(serve, pool=PoolLimits(max_connections=1)) as place:
        for count in (1, 2):
            with suppress(LeftError):
                await use(place)
            await place.check_clean()
            await trio.sleep(0.1)
            assert (len(stopped), place.statistics.connections) == (count, 0)


async def test_a_stream_holds_its_slot() -> None:
    """While it is lent a connection counts as in flight, and the next request waits for it."""
    async with open_place(answering(lambda r: _by_kind(r)), pool=PoolLimits(max_connections=1)) as place:
        answers: list[str] = []

        async def ask() -> None:
            answers.append((await place.ask("after")).text)

        async with trio.open_nursery() as nursery, place.stream() as reader:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert (place.statistics.queued, answers) == (1, [])
            while await reader.read():
                pass
            await trio.testing.wait_all_tasks_blocked()
            assert answers == []
        assert answers == ["after"]
        await place.check_clean()


def _by_kind(request: Request) -> bytes:
    return stream(*WHOLE, LAST, DONE) if request.json().get("stream") else chat(request.json()["q"])


async def test_closing_the_pool_ends_lent_streams() -> None:
    """A consumer that waits for a stream when the pool closes gets StreamBrokenError, and no task is left."""
    ended: list[GorouterError] = []

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD, frame(delta("half")))
        await peer.wait_gone()

    async def consume(place: Place) -> None:
        with pytest.raises(StreamBrokenError) as broken:
            await place.read()
        ended.append(broken.value)

    async with trio.open_nursery() as nursery:
        before = trio.lowlevel.current_statistics().tasks_living
        async with open_place(serve) as place:
            nursery.start_soon(consume, place)
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before
    assert ended[0].partial is not None
    assert (ended[0].partial.text, ended[0].maybe_billed) == ("half", True)


async def test_a_stream_that_was_left_is_not_the_next_ones_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """The deadlines of a stream go with it: what follows on the same worker has its own."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if request.json().get("stream"):
                await peer.send(stream(*WHOLE, DONE))
            else:
                await trio.sleep(80)
                await peer.send(chat("late"))

    async with open_place(serve) as place:
        assert await place.read() == "Low tide"
        assert (await place.ask()).text == "late"
        await place.check_clean()


async def test_a_consumer_that_stops_reading_stops_the_server(no_leaks) -> None:
    """Backpressure over real sockets: what the server can send ahead is bounded by the kernel's buffers."""
    sent = 0

    async def serve(listener: trio.SocketListener, count: trio.Event) -> None:
        nonlocal sent
        conn = await listener.accept()
        async with conn:
            conn.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            peer = Peer(conn)
            await peer.request()
            await peer.send(STREAM_HEAD)
            event = frame(delta("x" * 10_000))
            with suppress(trio.BrokenResourceError):
                while True:
                    await peer.send(event)
                    sent += len(event)
                    count.set()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    origin = Origin("http", "127.0.0.1", listener.socket.getsockname()[1])
    config = ClientConfig(api_key="k").resolved({})
    made = connector(origin, transport=None, tls=None, limits=ConnectionLimits(max_body_bytes=10**12))
    async with no_leaks(), trio.open_nursery() as nursery, open_pool(config, made, make_head=make_head) as pool:
        nursery.start_soon(serve, listener, trio.Event())

        async def begin(exchange: Exchange, lease: Lease) -> object:
            return await begin_reading(pool, exchange, lease=lease, wall=lambda: 0.0)

        reader = await pool.request_stream(HttpCall(streaming=True), begin)
        seen = -1
        with trio.fail_after(10):
            while sent != seen:
                seen = sent
                await trio.sleep(0.1)
        assert sent < 8_000_000
        before = sent
        for _ in range(200):
            await reader.read()  # type: ignore[attr-defined]
        assert sent > before
        reader.close()  # type: ignore[attr-defined]
    await listener.aclose()


async def test_a_stream_that_begins_as_the_pool_ends_has_its_record(autojump_clock: trio.testing.MockClock) -> None:
    """Its connection is taken back before it is the consumer's; what was sent may be charged all the same."""
    begun, is_over = trio.Event(), trio.Event()
    records: list[AttemptRecord] = []

    async def begin(_exchange: Exchange, _lease: Lease) -> str:
        begun.set()
        await is_over.wait()
        return "begun"

    async def ask(place: Place) -> None:
        assert await place.pool.request_stream(HttpCall(streaming=True), begin) == "begun"

    async with trio.open_nursery() as nursery:
        async with open_place(answering(lambda r: stream(*WHOLE)), on_attempt=records.append) as place:
            nursery.start_soon(ask, place)
            await begun.wait()
        is_over.set()
    assert [(record.status, record.cancelled, record.maybe_billed) for record in records] == [(200, True, True)]


async def test_no_read_ahead_and_no_waiting_with_data(autojump_clock: trio.testing.MockClock) -> None:
    """Chunks are given out as they arrive: a delta is there at its time, not when the stream is over."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD)
        for text in "abc":
            await trio.sleep(10)
            await peer.send(frame(delta(text)))
        await peer.send(frame(delta(finish="stop"), DONE), b"0\r\n\r\n")

    async with open_place(serve) as place:
        started, seen = trio.current_time(), []
        async with place.stream() as reader:
            while read := await reader.read():
                seen.append((trio.current_time() - started, text_of(read)))
            assert reader.result().call.ttft_s == 10
            assert reader.result().call.duration_s == 30
        assert seen[:3] == [(10, "a"), (20, "b"), (30, "c")]


async def test_entering_under_a_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled before the first data, on entering, nothing is left behind."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD)
        await peer.wait_gone()

    async with open_place(serve) as place:
        with trio.move_on_after(5) as scope:
            async with place.stream():
                pytest.fail("there is nothing to read")
        assert scope.cancelled_caught
        await place.check_clean()
        with pytest.raises(DeadlineExceededError):
            async with place.stream(deadline=trio.current_time() + 5):
                pytest.fail("there is nothing to read")
        await place.check_clean()
        assert math.isinf(place.pool.idle[0].deadline_at)
    assert ORIGIN.netloc == "h.example"


async def test_plain_errors_for_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    """An HTTP error for a streamed request is raised as for a plain one, its body read, its connection kept."""
    answers: list[bytes] = [error(429, headers=["Retry-After: 3"]), stream(*WHOLE, LAST, DONE)]
    serve: Serve = answering(lambda request: answers.pop(0))
    async with open_place(serve) as place:
        started = trio.current_time()
        assert await place.read() == "Low tide"
        assert trio.current_time() - started == 3
        assert place.statistics.opened == 1
        await place.check_clean()
