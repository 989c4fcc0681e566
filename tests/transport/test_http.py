"""HTTP/1.1 connections: every form of a reply however it is cut, every way in which a peer can fail, no leaks."""

from __future__ import annotations

import socket
import struct
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from scripted import Peer, PlayedStream, chunks, reply

from gorouter_trio.errors import ConnectError, DecodeError, GorouterError, StreamBrokenError
from gorouter_trio.transport.connection import HttpConnection
from gorouter_trio.transport.connector import HttpConnector, connector
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.transport.memory import memory_stream_pair
from gorouter_trio.transport.streams import SocketNetwork, SocketStream

KEY = "sk-or-v1-c4n4ry0f7h3h34d3r"
ORIGIN = Origin("http", "host.example", 80)
HEAD = RequestHead(
    ORIGIN, method="POST", target="/api/v1/chat/completions", headers=[("Authorization", f"Bearer {KEY}"), ("X-A", "1")]
)
LIMITS = ConnectionLimits()


class Result:
    """What one exchange came to."""

    def __init__(self, connection: HttpConnection, body: bytes) -> None:
        self.status, self.body = connection.status, body
        self.headers = [(name.lower(), value) for name, value in connection.headers]
        self.reusable = connection.is_reusable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.status} {self.body!r} {self.headers} {self.reusable}"


async def exchange(
    pieces: Iterable[bytes | Exception],
    *,
    head: RequestHead = HEAD,
    limits: ConnectionLimits = LIMITS,
    somewhat: bool = False,
) -> Result:
    """Send a request to a peer that answers with the pieces, and take the reply, whole or piece by piece."""
    connection = HttpConnection(PlayedStream(pieces), limits)
    await connection.start(head, b"{}")
    if not somewhat:
        return Result(connection, await connection.receive_all())
    taken = bytearray()
    while piece := await connection.receive_some():
        taken += piece
    assert connection.is_complete
    assert await connection.receive_some() == b""
    return Result(connection, bytes(taken))


BODY = bytes(range(256)) + b"\r\n0\r\n\r\n"
CLOSE = ["Connection: close", "X-B: c"]


def _chunked(*, head: bytes = b"", end: bytes = b"0\r\n\r\n") -> bytes:
    pieces = [BODY[:1], BODY[1:100], BODY[100:]]
    return b"HTTP/1.1 200 OK\r\n" + head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(pieces, end=end)


REPLIES: dict[str, tuple[bytes, int, bytes, bool]] = {
    "by length": (reply(BODY, headers=["X-B: c"]), 200, BODY, True),
    "empty": (reply(b""), 200, b"", True),
    "an error": (reply(b"no", status=503), 503, b"no", True),
    "chunked": (_chunked(), 200, BODY, True),
    "chunked with trailers": (_chunked(end=b"0\r\nRetry-After: 9\r\nX-T: t\r\n\r\n"), 200, BODY, True),
    "chunked with extensions": (_chunked().replace(b"\r\n1\r\n", b"\r\n1;a=b;c\r\n"), 200, BODY, True),
    "wants to close": (reply(BODY, headers=CLOSE), 200, BODY, False),
    "chunked and closing": (_chunked(head=b"Connection: close\r\n"), 200, BODY, False),
    "1.0": (reply(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"), 200, BODY, False),
    "1.0 that keeps": (
        reply(BODY, headers=["Connection: keep-alive"]).replace(b"HTTP/1.1", b"HTTP/1.0"),
        200,
        BODY,
        True,
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\nX-B: c\r\n\r\n", 204, b"", True),
    "not modified": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 77\r\n\r\n", 304, b"", True),
    "continue first": (b"HTTP/1.1 100 Continue\r\nX-I: 1\r\n\r\n" + reply(BODY), 200, BODY, True),
    "hints first": (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 C\r\n\r\n" + reply(BODY),
        200,
        BODY,
        True,
    ),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi", 200, b"hi", True),
    "line ends before it": (b"\r\n\r\n" + reply(BODY), 200, BODY, True),
}


@pytest.mark.parametrize(("raw", "status", "body", "reusable"), REPLIES.values(), ids=REPLIES.keys())
async def test_every_form_of_a_reply_at_every_cut(raw: bytes, status: int, body: bytes, reusable: bool) -> None:
    """Status, headers, body and whether the connection can be used again do not depend on how the bytes arrive."""
    whole = await exchange([raw])
    assert (whole.status, whole.body, whole.reusable) == (status, body, reusable)
    assert not any(name in {b"retry-after", b"x-t", b"x-i", b"link"} for name, _ in whole.headers)
    assert await exchange([raw], somewhat=True) == whole
    assert await exchange([raw[i : i + 1] for i in range(len(raw))]) == whole
    for place in range(1, len(raw)):
        assert await exchange([raw[:place], raw[place:]], somewhat=place % 2 == 0) == whole, place


@pytest.mark.parametrize("end", [b"", OSError], ids=["end", "nothing more"])
async def test_a_body_that_ends_with_the_connection(end: object) -> None:
    """Without a length the end of the connection is the end of the body, and the connection is spent."""
    raw = b"HTTP/1.1 200 OK\r\nX-B: c\r\n\r\n" + BODY
    if end:
        with trio.move_on_after(0) as scope:
            await exchange([raw])
        assert scope.cancelled_caught
        return
    for place in range(1, len(raw)):
        result = await exchange([raw[:place], raw[place:], b""], somewhat=place % 2 == 0)
        assert (result.body, result.reusable) == (BODY, False)


async def test_a_reply_to_head_has_no_body() -> None:
    """The length in a reply to HEAD is not waited for; the connection is not used again."""
    head = RequestHead(ORIGIN, method="HEAD", target="/x", headers=[])
    result = await exchange([reply(b"")[:-4].replace(b"Length: 0", b"Length: 500") + b"\r\n\r\n"], head=head)
    assert (result.status, result.body, result.reusable) == (200, b"", False)


async def test_one_request_after_another() -> None:
    """A connection serves any number of requests, each with its own headers, status and body."""
    raws = [
        reply(b"one", headers=["X-N: 1"]),
        _chunked(),
        reply(b"three", status=404),
        b"HTTP/1.1 204 N\r\n\r\n",
        reply(b"5"),
    ]
    stream = PlayedStream(raws)
    connection = HttpConnection(stream, LIMITS)
    got = []
    for number in range(len(raws)):
        assert connection.is_reusable
        await connection.start(HEAD, b"%d" % number)
        got.append((connection.status, await connection.receive_all(), len(connection.headers)))
    assert got == [(200, b"one", 2), (200, BODY, 1), (404, b"three", 1), (204, b"", 0), (200, b"5", 1)]
    assert stream.sent.count(b"POST /api/v1/chat/completions HTTP/1.1\r\nHost: host.example\r\n") == 5
    assert stream.sent.endswith(b"X-A: 1\r\nContent-Length: 1\r\n\r\n4")


async def test_headers_of_a_reply_belong_to_it() -> None:
    """The header list that was handed out does not change with the next reply."""
    connection = HttpConnection(PlayedStream([reply(b"", headers=["X-N: 1"]), reply(b"", headers=["X-N: 2"])]), LIMITS)
    await connection.start(HEAD, b"")
    first = connection.headers
    await connection.receive_all()
    await connection.start(HEAD, b"")
    assert (b"X-N", b"1") in first
    assert (b"X-N", b"2") not in first


# --- more than was asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [reply(b"POISON", headers=["X-P: 1"]), b"HTTP/1.1 500 X\r\n", b"garbage", b"{}", b"\0", reply(b"P", headers=CLOSE)],
    ids=["a reply", "half a head", "garbage", "json", "nul", "a closing reply"],
)
@pytest.mark.parametrize(
    "raw", [reply(b"mine"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks([b"mine"])]
)
async def test_bytes_after_the_reply_never_reach_anybody(raw: bytes, more: bytes) -> None:
    """The reply is as it was, and the connection is not used again, however the surplus arrives."""
    for cut in range(len(more)):
        result = await exchange([raw + more[: len(more) - cut]])
        assert (result.status, result.body, result.reusable) == (200, b"mine", False)
        assert (b"x-p", b"1") not in result.headers
    apart = await exchange([raw[:-1], raw[-1:] + more])
    assert (apart.status, apart.body, apart.reusable) == (200, b"mine", False)


async def test_bytes_after_a_closing_reply() -> None:
    """After `Connection: close` anything may follow; the reply is good."""
    result = await exchange([reply(b"mine", headers=CLOSE) + reply(b"POISON")])
    assert (result.body, result.reusable) == (b"mine", False)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 1000, 100_000], ids=["dribbling", "in pieces", "at once"])
async def test_headers_over_the_cap(size: int) -> None:
    """Headers over the cap are refused, in one line or many, in one read or many, in final or informational replies."""
    limits = ConnectionLimits(max_header_bytes=2048)
    many = b"".join(b"X-%d: %b\r\n" % (i, b"y" * 50) for i in range(60))
    for raw in (
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 4000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + many + b"Content-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 100 C\r\n\r\n" * 300 + reply(b""),
        b"HTTP/1.1 200 " + b"r" * 4000 + b"\r\n\r\n",
    ):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        if size == 100_000 and raw.startswith((b"HTTP/1.1 100", b"HTTP/1.1 200 r")):
            continue  # in one read nothing is held that was not wanted
        with pytest.raises(DecodeError, match="headers are over 2048 bytes"):
            await exchange(pieces, limits=limits)


async def test_headers_under_the_cap() -> None:
    """A large body in the same read does not count as headers."""
    limits = ConnectionLimits(max_header_bytes=2048)
    result = await exchange([reply(b"z" * 50_000, headers=["X: " + "y" * 1900])], limits=limits)
    assert len(result.body) == 50_000


@pytest.mark.parametrize("size", [100, 100_000], ids=["in pieces", "at once"])
@pytest.mark.parametrize("somewhat", [False, True], ids=["whole", "streamed"])
async def test_bodies_over_the_cap(size: int, somewhat: bool) -> None:
    """A body over the cap is refused in each of its forms, also when it came together with the head."""
    limits = ConnectionLimits(max_body_bytes=5000)
    for raw in (
        reply(b"z" * 6000),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks([b"z" * 100] * 60),
        b"HTTP/1.1 200 OK\r\n\r\n" + b"z" * 6000,
    ):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        with pytest.raises(DecodeError, match="body is over 5000 bytes"):
            await exchange([*pieces, b""], limits=limits, somewhat=somewhat)
    fits = await exchange([reply(b"z" * 5000)], limits=limits, somewhat=somewhat)
    assert len(fits.body) == 5000


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["by length", "chunked", "continue first", "chunked with trailers"])
@pytest.mark.parametrize("end", [b"", trio.BrokenResourceError("reset")], ids=["closed", "reset"])
async def test_a_reply_that_is_cut(name: str, end: bytes | Exception) -> None:
    """A peer that goes before the end of the reply, at any byte, is an error and never a shorter reply."""
    raw = REPLIES[name][0]
    for place in range(len(raw)):
        with pytest.raises(StreamBrokenError) as broken:
            await exchange([raw[:place], end] if place else [end], somewhat=place % 2 == 0)
        assert broken.value.sent


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"<html>",
        b"\0" * 50,
        b"HTTP/1.1 2000 X\r\n\r\n",
        b"HTTP/1.1 abc X\r\n\r\n",
        b"HTTP/9 200 OK\r\n\r\n",
        b"HTTP/1.1 099 X\r\n\r\n",
        b"HTTP/1.1 000 X\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: a\n\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nraw",
        b"HTTP/1.1 101 X\r\n\r\n" + reply(b""),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n",
    ],
    ids=lambda raw: raw[:60].decode("latin-1"),
)
async def test_what_is_no_http(raw: bytes) -> None:
    """Anything else than HTTP/1.1 is a DecodeError that says what is wrong, at once and byte by byte."""
    for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
        with pytest.raises(DecodeError) as refused:
            await exchange([*pieces, b""])
        assert refused.value.message.isprintable()


@given(
    raw=st.binary(max_size=200) | st.sampled_from([r[0] for r in REPLIES.values()]),
    noise=st.binary(max_size=3),
    at=st.integers(0, 300),
)
def test_any_bytes_give_a_reply_or_a_typed_error(raw: bytes, noise: bytes, at: int) -> None:
    """Random bytes, and good replies with random bytes put in: the same outcome whole and byte by byte."""
    raw = raw[:at] + noise + raw[at:]
    outcomes = [trio.run(_outcome, pieces) for pieces in ([raw], [raw[i : i + 1] for i in range(len(raw))])]
    assert outcomes[0] == outcomes[1]


async def _outcome(pieces: list[bytes]) -> tuple[object, ...]:
    try:
        result = await exchange([*(p for p in pieces if p), b""])
    except GorouterError as error:
        return (type(error),)
    return (result.status, result.body, result.headers)


async def test_a_used_connection_that_was_found_closed_had_sent_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """On a used connection an end without a byte means that the peer had gone before; late, or on a new one, not."""
    for end in (b"", trio.BrokenResourceError("reset")):
        connection = HttpConnection(PlayedStream([reply(b"1"), end]), LIMITS)
        await connection.start(HEAD, b"")
        await connection.receive_all()
        with pytest.raises(StreamBrokenError) as found_closed:
            await connection.start(HEAD, b"")
        assert not found_closed.value.sent
    with pytest.raises(StreamBrokenError) as fresh:
        await exchange([b""])
    assert fresh.value.sent
    assert await _sent_after(delay_s=0.3, first=b"")
    assert not await _sent_after(delay_s=0.3, first=b"", connect_s=0.2)
    assert await _sent_after(delay_s=0.01, first=b"HTTP/1.1 2")
    assert not await _sent_after(delay_s=0.01, first=b"")


@pytest.mark.parametrize("status", [100, 199, 600, 700, 999])
async def test_a_status_that_there_is_not(status: int, autojump_clock: trio.testing.MockClock) -> None:
    """A reply with one says nothing of what became of the request (RFC 9110, section 15)."""
    with pytest.raises(GorouterError) as error:
        await exchange([b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status, b""])
    assert isinstance(error.value, DecodeError) or (status < 200 and isinstance(error.value, StreamBrokenError))


async def _sent_after(*, delay_s: float, first: bytes, connect_s: float = 0.0) -> bool:
    """Whether a request counts as sent when a used connection ends `delay_s` after it, `first` having come."""
    async with _served_in_memory(_answer_once_then(delay_s, first), connect_s=connect_s) as connection:
        await connection.start(HEAD, b"")
        await connection.receive_all()
        with pytest.raises(StreamBrokenError) as broken:
            await connection.start(HEAD, b"")
        return broken.value.sent


def _answer_once_then(delay_s: float, first: bytes) -> Callable[[Peer], Awaitable[None]]:
    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply(b"1"))
        await peer.request()
        await trio.sleep(delay_s)
        if first:
            await peer.send(first)

    return serve


@asynccontextmanager
async def _served_in_memory(
    serve: Callable[[Peer], Awaitable[None]],
    *,
    capacity: int = 65536,
    limits: ConnectionLimits = LIMITS,
    connect_s: float = 0.0,
) -> AsyncIterator[HttpConnection]:
    ours, theirs = memory_stream_pair(capacity)

    async def run() -> None:
        with suppress(trio.BrokenResourceError):
            await serve(Peer(theirs))
        theirs.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        yield HttpConnection(ours, limits, connect_s=connect_s)
        nursery.cancel_scope.cancel()


# --- long requests ----------------------------------------------------------------------------------------------------

LONG = b"x" * 3_000_000


async def test_a_long_request_is_sent_whole() -> None:
    """A body far over every buffer arrives, and the reply with it; the connection stays good."""

    async def serve(peer: Peer) -> None:
        for _ in range(2):
            request = await peer.request()
            assert request is not None
            await peer.send(reply(b"%d" % len(request.body)))

    async with _served_in_memory(serve) as connection:
        for _ in range(2):
            await connection.start(HEAD, LONG)
            assert await connection.receive_all() == b"3000000"
            assert connection.is_sent
            assert connection.is_reusable


@pytest.mark.parametrize("then", ["stays", "closes"])
async def test_a_refusal_before_the_whole_request(then: str) -> None:
    """A peer that answers and reads no more is heard, whether it closes or not; the connection is spent."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(reply(b"too large", status=413))
        if then == "stays":
            await trio.sleep_forever()

    async with _served_in_memory(serve) as connection:
        with trio.fail_after(5):
            await connection.start(HEAD, LONG)
            assert (connection.status, await connection.receive_all()) == (413, b"too large")
        assert not connection.is_sent
        assert not connection.is_reusable


@pytest.mark.parametrize("body", [LONG, b"x" * 100], ids=["long", "short"])
async def test_a_peer_that_goes_while_we_send(body: bytes) -> None:
    """A request that did not get out whole was not sent."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(10)

    async with _served_in_memory(serve, capacity=50) as connection:
        with pytest.raises(StreamBrokenError) as broken:
            await connection.start(HEAD, body)
        assert not broken.value.sent


async def test_cancelling_a_long_request() -> None:
    """Cancelled while it sends and watches, both ends stop, and no task is left."""

    async def serve(peer: Peer) -> None:
        await trio.sleep_forever()

    async with _served_in_memory(serve) as connection:
        before = trio.lowlevel.current_statistics().tasks_living
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.start, HEAD, LONG)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert trio.lowlevel.current_statistics().tasks_living == before
        connection.close()


async def test_closing_ends_a_long_request() -> None:
    """`close` from another task ends the sending of a long request, too."""

    async def serve(peer: Peer) -> None:
        await trio.sleep_forever()

    async with _served_in_memory(serve) as connection, trio.open_nursery() as nursery:
        nursery.start_soon(_expect_broken, connection.start, HEAD, LONG)
        await trio.testing.wait_all_tasks_blocked()
        connection.close()


async def _expect_broken(call: Callable[..., Awaitable[object]], *args: object) -> None:
    with pytest.raises(StreamBrokenError):
        await call(*args)


# --- closing and cancelling -------------------------------------------------------------------------------------------


async def test_close_wakes_whoever_waits() -> None:
    """`close` ends a wait for the head and a wait for the body with StreamBrokenError, and later use as well."""
    for pieces in ([], [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"]):
        connection = HttpConnection(PlayedStream(pieces), LIMITS)

        async def use(connection: HttpConnection = connection) -> None:
            await connection.start(HEAD, b"")
            await connection.receive_all()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_expect_broken, use)
            await trio.testing.wait_all_tasks_blocked()
            connection.close()
        assert connection.is_closed
        assert not connection.is_reusable
        with pytest.raises(StreamBrokenError) as later:
            await connection.start(HEAD, b"")
        assert not later.value.sent
        await connection.aclose()


async def test_reading_on_after_close() -> None:
    """Reading a reply whose connection was closed meanwhile is StreamBrokenError, on a real socket, too."""
    async with _served(_half_a_reply) as connection:
        await connection.start(HEAD, b"")
        assert await connection.receive_some() == b"ab"
        connection.close()
        connection.close()
        for _ in range(2):
            with pytest.raises(StreamBrokenError):
                await connection.receive_some()


async def _half_a_reply(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")
    await peer.wait_gone()


# --- real sockets -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _listening(serve: Callable[[Peer], Awaitable[None]], host: str = "127.0.0.1") -> AsyncIterator[int]:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await serve(Peer(stream))

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host=host)
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


def _plain(port: int, host: str = "127.0.0.1") -> HttpConnector:
    return HttpConnector(Origin("http", host, port), network=SocketNetwork(), tls=None, limits=LIMITS)


@asynccontextmanager
async def _served(serve: Callable[[Peer], Awaitable[None]]) -> AsyncIterator[HttpConnection]:
    async with _listening(serve) as port:
        connection = await _plain(port).connect()
        assert isinstance(connection, HttpConnection)
        try:
            yield connection
        finally:
            connection.close()


async def test_over_a_socket(no_leaks) -> None:
    """Requests and replies over TCP, on one connection, which is our own stream below."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            await peer.send(reply(request.body * 3))

    async with no_leaks(), _served(serve) as connection:
        assert isinstance(connection._stream, SocketStream)
        for number in range(3):
            await connection.start(HEAD, b"%d" % number)
            assert await connection.receive_all() == b"%d" % number * 3
            assert connection.is_reusable


async def test_a_body_larger_than_the_kernels_buffers(no_leaks) -> None:
    """Megabytes both ways over TCP."""

    async def serve(peer: Peer) -> None:
        request = await peer.request()
        assert request is not None
        await peer.send(reply(request.body))

    async with no_leaks(), _served(serve) as connection:
        await connection.start(HEAD, LONG * 2)
        assert await connection.receive_all() == LONG * 2


@pytest.mark.parametrize("how", ["closes", "resets", "talks"])
async def test_an_idle_connection_that_is_no_longer_good(how: str, no_leaks) -> None:
    """A peer that closes, resets or says something while nothing was asked is noticed before the next request."""
    asked = trio.Event()
    done = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply(b"1"))
        await asked.wait()
        if how == "talks":
            await peer.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            await peer.wait_gone()
        elif how == "resets":
            _reset(peer)
        done.set()

    async with no_leaks(), _served(serve) as connection:
        await connection.start(HEAD, b"")
        await connection.receive_all()
        assert connection.is_reusable
        asked.set()
        with trio.fail_after(5):
            while connection.is_reusable:
                await trio.sleep(0.001)


def _reset(peer: Peer) -> None:
    """Close with RST instead of FIN."""
    stream = peer.stream
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@pytest.mark.parametrize("when", ["at once", "in the head", "in the body"])
async def test_a_reset(when: str, no_leaks) -> None:
    """RST at any time is StreamBrokenError."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        raw = reply(b"x" * 50)
        await peer.send(b"" if when == "at once" else raw[:10] if when == "in the head" else raw[:-10])
        if when != "at once":
            await trio.sleep(0.02)
        _reset(peer)

    async def use(connection: HttpConnection) -> None:
        await connection.start(HEAD, b"")
        await connection.receive_all()

    async with no_leaks(), _served(serve) as connection:
        await _expect_broken(use, connection)


async def test_an_early_refusal_over_a_socket(no_leaks) -> None:
    """A 413 that is sent before the body was read arrives, though the peer closes with bytes unread."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(reply(b"too large", status=413, headers=["Connection: close"]))
        await trio.sleep(0.05)

    async with no_leaks(), _served(serve) as connection:
        await connection.start(HEAD, LONG * 4)
        assert (connection.status, await connection.receive_all()) == (413, b"too large")


async def test_cancel_at_any_time_then_close_leaves_nothing(no_leaks) -> None:
    """Cancelled at any step of connecting, sending and receiving, and closed: no socket, no task."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            await peer.send(reply(b"x" * 10)[:-5])
            await trio.lowlevel.checkpoint()
            await peer.send(b"x" * 5)
            assert request.method == "POST"

    async with _listening(serve) as port, no_leaks():
        for steps in range(14):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_use_once, port)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()


async def _use_once(port: int) -> None:
    connection = await _plain(port).connect()
    try:
        await connection.start(HEAD, b"{}")
        await connection.receive_all()
    finally:
        connection.close()


async def test_nobody_listens(no_leaks) -> None:
    """A refused connection is a ConnectError with the host, the port and the system's words."""
    async with _listening(_half_a_reply) as port:
        pass
    async with no_leaks():
        with pytest.raises(ConnectError, match=rf"cannot connect to 127\.0\.0\.1:{port}: Connection refused"):
            await _plain(port).connect()


@pytest.mark.parametrize(
    "host", ["no.such.host.invalid", "a" * 64 + ".example", "x..y"], ids=["unknown", "long", "empty label"]
)
async def test_a_name_that_leads_nowhere(host: str) -> None:
    """A name that cannot be resolved, or is none, is a ConnectError that names it."""
    with pytest.raises(ConnectError, match="cannot connect to ") as refused:
        await _plain(80, host).connect()
    assert host in refused.value.message


async def test_ipv6(no_leaks) -> None:
    """A host that is an IPv6 address is connected to, and stands in brackets in Host."""
    try:
        listeners = await trio.open_tcp_listeners(0, host="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    for listener in listeners:
        await listener.aclose()
    hosts: list[str] = []

    async def serve(peer: Peer) -> None:
        request = await peer.request()
        assert request is not None
        hosts.append(request.headers["host"])
        await peer.send(reply(b"six"))

    async with _listening(serve, "::1") as port, no_leaks():
        connection = await _plain(port, "::1").connect()
        await connection.start(RequestHead(Origin("http", "::1", port), method="GET", target="/", headers=[]), b"")
        assert await connection.receive_all() == b"six"
        connection.close()
    assert hosts == [f"[::1]:{port}"]


# --- networks of others -----------------------------------------------------------------------------------------------


class _StapledNetwork:
    """A network whose streams have no `close` that does not wait."""

    def __init__(self, serve: Callable[[Peer], Awaitable[None]], nursery: trio.Nursery) -> None:
        self._serve, self._nursery = serve, nursery
        self.ends: list[trio.abc.Stream] = []

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        ours, theirs = trio.testing.memory_stream_pair()
        self._nursery.start_soon(self._serve, Peer(theirs))
        self.ends.append(ours)
        return ours


async def test_a_stream_without_close() -> None:
    """Any trio stream will do: it is used, woken by `close`, and closed by `aclose`."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply(b"fine"))
        await peer.request()
        await peer.wait_gone()

    async with trio.open_nursery() as nursery:
        network = _StapledNetwork(serve, nursery)
        connection = await connector(ORIGIN, transport=network, tls=None, limits=LIMITS).connect()
        await connection.start(HEAD, b"")
        assert await connection.receive_all() == b"fine"
        nursery.start_soon(_expect_broken, connection.start, HEAD, b"")
        await trio.testing.wait_all_tasks_blocked()
        connection.close()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(StreamBrokenError):
            await connection.receive_some()
        await connection.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await network.ends[0].send_all(b"x")


async def test_what_is_no_transport() -> None:
    """A transport setting of another kind is a TypeError."""
    for wrong in (5, "x", object()):
        with pytest.raises(TypeError, match="transport: "):
            connector(ORIGIN, transport=wrong, tls=None, limits=LIMITS)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "netloc"),
    [
        (Origin("http", "h", 80), "h"),
        (Origin("http", "h", 443), "h:443"),
        (Origin("https", "h", 443), "h"),
        (Origin("https", "h", 80), "h:80"),
        (Origin("http", "::1", 8000), "[::1]:8000"),
        (Origin("https", "2001:db8::1", 443), "[2001:db8::1]"),
    ],
)
def test_host_headers(origin: Origin, netloc: str) -> None:
    """The port is left out where it is the scheme's own, and IPv6 stands in brackets."""
    assert origin.netloc == netloc
    assert bytes(RequestHead(origin, method="GET", target="/x", headers=[]).render(b"")).startswith(
        f"GET /x HTTP/1.1\r\nHost: {netloc}\r\n".encode()
    )


@pytest.mark.parametrize(
    ("method", "target", "headers", "host"),
    [
        ("GET\r\nX: y", "/", [], None), ("GET", "/\r\nX: y", [], None), ("GET", "/", [("A", "b\r\nX: y")], None),
        ("GET", "/", [("A\n", "b")], None), ("GET", "/", [("A", "b\0c")], None), ("GET", "/", [("A", "\u20ac")], None),
        ("GET", "/", [], "h\r\nX: y"),
    ],
)  # fmt: skip
def test_nothing_breaks_out_of_its_line(
    method: str, target: str, headers: list[tuple[str, str]], host: str | None
) -> None:
    """A line end in any part of the head is refused, without the value that may be a secret."""
    secret = [*headers, ("Authorization", f"Bearer {KEY}")]
    with pytest.raises(ValueError, match="not a line of HTTP") as refused:
        RequestHead(ORIGIN, method=method, target=target, headers=secret, host=host)
    frames = traceback.TracebackException.from_exception(refused.value, capture_locals=True).stack
    assert KEY not in str(
        [frame.locals for frame in frames if frame.filename.endswith("gorouter_trio/transport/http.py")]
    )
    with pytest.raises(ValueError, match="not a line of HTTP") as leaky:
        RequestHead(ORIGIN, method="GET", target="/", headers=[("Authorization", f"Bearer {KEY}\r\n")])
    assert KEY not in str(leaky.value)


async def test_the_key_is_in_no_repr_and_no_traceback(no_leaks) -> None:
    """Errors of the transport show the key neither in their text nor in the locals of any frame below the test."""
    assert KEY not in repr(HEAD)
    assert KEY not in repr(HEAD.render(b""))
    errors: list[BaseException] = []

    async def serve(peer: Peer) -> None:
        request = await peer.request()
        assert request is None or request.headers["authorization"] == f"Bearer {KEY}"
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab")

    async with no_leaks(), _served(serve) as connection:
        await _collect(errors, connection.start(HEAD, b""), connection.receive_all())
    async with no_leaks(), _served(serve) as connection:
        connection._stream.close()  # type: ignore[attr-defined]
        await _collect(errors, connection.start(HEAD, b"x"), connection.start(HEAD, LONG))
    await _collect(errors, exchange([b"SSH\r\n"]), exchange([trio.BrokenResourceError("x")]), exchange([b""]))
    assert len(errors) == 6
    for error in errors:
        assert KEY not in "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


async def _collect(errors: list[BaseException], *calls: Awaitable[object]) -> None:
    for call in calls:
        try:
            await call
        except GorouterError as error:
            errors.append(error)


def test_reprs_tell_the_state() -> None:
    """A connection's repr says whether it is idle, busy or closed."""

    async def main() -> list[str]:
        connection = HttpConnection(PlayedStream([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"]), LIMITS)
        seen = [repr(connection)]
        await connection.start(HEAD, b"")
        seen.append(repr(connection))
        connection.close()
        return [*seen, repr(connection)]

    assert trio.run(main) == ["<HttpConnection idle>", "<HttpConnection busy>", "<HttpConnection closed>"]


def test_pieces_of_a_long_reply_keep_their_order() -> None:
    """A long reply in random pieces is put together in order."""

    async def main() -> bytes:
        body = b"".join(b"%06d" % i for i in range(20_000))
        raw = reply(body)
        edges = [*range(0, len(raw), 997), len(raw)]
        result = await exchange([raw[a:b] for a, b in pairwise(edges)], somewhat=True)
        assert result.body == body
        return result.body

    assert len(trio.run(main)) == 120_000


async def test_a_refusal_before_the_whole_request_that_does_not_end(autojump_clock: trio.testing.MockClock) -> None:
    """What it says is not waited for without end before the sending ends, and neither is it read without end."""

    async def stalls(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(b"HTTP/1.1 413 X\r\nContent-Length: 9\r\n\r\ntoo")
        await trio.sleep(100)

    async def gushes(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(b"HTTP/1.1 413 X\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            await peer.send(b"400\r\n%b\r\n" % (b"x" * 1024))

    for serve, after_s in ((stalls, 2), (gushes, 0)):
        async with _served_in_memory(serve) as connection:
            started = trio.current_time()
            await connection.start(HEAD, LONG)
            assert (connection.status, trio.current_time() - started) == (413, after_s)
            assert not connection.is_complete
            assert not connection.is_reusable


async def test_a_refusal_before_the_whole_request_that_is_cut() -> None:
    """Who has begun to refuse has had the request, as far as it went: it is not as if nothing had been sent."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(b"HTTP/1.1 413 X\r\nContent-Length: 9\r\n\r\ntoo")

    async with _served_in_memory(serve) as connection:
        await connection.start(HEAD, LONG)
        with pytest.raises(StreamBrokenError) as broken:
            await connection.receive_all()
        assert (connection.status, broken.value.sent) == (413, True)
