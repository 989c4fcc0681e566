"""The HTTP/1.1 server: framing both ways, limits, pipelining, disconnects, containment, time-outs and draining."""

from __future__ import annotations

import math
import socket
import ssl
import struct
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
import trustme
from hypothesis import given
from hypothesis import strategies as st
from wire_client import WireClient

from gorouter_trio.transport.http_server import (
    HttpServer,
    HttpServerLimits,
    ServerReply,
    ServerRequest,
    _RequestParser,
    encode_headers,
    join_headers,
    open_http_server,
    serve_http,
    serve_http_connection,
)
from gorouter_trio.transport.memory import memory_stream_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gorouter_trio.transport.http_server import Handler

FOREVER = HttpServerLimits(idle_timeout_s=math.inf, request_timeout_s=math.inf, send_timeout_s=math.inf)


async def echo(request: ServerRequest, reply: ServerReply) -> None:
    """Replies with what it understood of the request."""
    told = f"{request.method} {request.path} {request.query} {request.get('x-test')} {len(request.body)}"
    await reply.send(200, [("Content-Type", "text/plain")], body=told.encode())


@asynccontextmanager
async def serving(
    handler: Handler, *, limits: HttpServerLimits = FOREVER, on_error: Callable[[Exception], None] | None = None
) -> AsyncIterator[WireClient]:
    """A client connected through memory to a server of its own, which must have ended when the block has."""
    ours, theirs = memory_stream_pair()
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            await serve_http_connection(theirs, handler, limits=limits, on_error=on_error or errors.append)
            assert theirs.is_closed

        nursery.start_soon(serve)
        yield WireClient(ours)
        await ours.aclose()
    if on_error is None:
        assert errors == []


async def read_all(stream: trio.abc.Stream) -> bytes:
    """What comes until the end of file."""
    received = b""
    while data := await stream.receive_some():
        received += data
    return received


async def raw_exchange(handler: Handler, request: bytes, *, limits: HttpServerLimits = FOREVER) -> bytes:
    """All bytes that come back for *request* on a connection of its own, whose client then sends no more."""
    async with serving(handler, limits=limits) as client:
        await client.stream.send_all(request)
        assert isinstance(client.stream, trio.abc.HalfCloseableStream)
        await client.stream.send_eof()
        return await read_all(client.stream)


# Whole replies.


async def test_whole_reply_has_exactly_these_bytes() -> None:
    """Status line, the handler's headers, the length, an empty line, the body; in one write."""
    got = await raw_exchange(echo, b"POST /a/b?c=1&d HTTP/1.1\r\nHost: h\r\nX-Test: y\r\nContent-Length: 3\r\n\r\nabc")
    assert got == (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 19\r\n\r\nPOST /a/b c=1&d y 3")


class CountingStream(trio.abc.Stream):
    """A stream that remembers the size of each send."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self.inner = inner
        self.sends: list[int] = []

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.sends.append(len(data))
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_whole_reply_is_one_send() -> None:
    """Head and body leave in a single send_all, so that no packet holds half of a small reply."""
    ours, theirs = memory_stream_pair()
    counting = CountingStream(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_http_connection(counting, echo, limits=FOREVER))
        await ours.send_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        got = await read_all(ours)
    assert counting.sends == [len(got)]


async def test_keep_alive_serves_one_request_after_another() -> None:
    """A connection stays open for more requests, each answered with its own body."""
    async with serving(echo) as client:
        for number in range(5):
            body = b"x" * number * 1_000
            reply = await client.request("POST", f"/{number}", headers=(("X-Test", "t"),), body=body)
            assert (reply.status, reply.body.decode()) == (200, f"POST /{number}  t {len(body)}")


async def test_pipelined_requests_are_answered_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """Several requests in one packet get their replies in the order they came, slow handlers included."""

    async def uneven(request: ServerRequest, reply: ServerReply) -> None:
        await trio.sleep(0.02 if request.path == "/0" else 0)
        await reply.send(200, body=request.path.encode())

    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % n for n in range(20))
    got = await raw_exchange(uneven, requests)
    assert [part.split(b"\r\n\r\n")[1] for part in got.split(b"HTTP/1.1 200 OK\r\n")[1:]] == [
        b"/%d" % n for n in range(20)
    ]


async def test_connection_close_is_said_and_done() -> None:
    """A request that asks for the close gets it, announced, and what follows it is not answered."""
    got = await raw_exchange(
        echo, b"GET /1 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n"
    )
    assert got.count(b"HTTP/1.1") == 1
    assert b"Connection: close\r\n" in got


async def test_http_1_0_closes_unless_asked_to_stay() -> None:
    """HTTP/1.0 closes by default, and stays, saying so, with `Connection: keep-alive`."""
    assert b"Connection: close\r\n" in await raw_exchange(echo, b"GET / HTTP/1.0\r\n\r\n")
    got = await raw_exchange(echo, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET / HTTP/1.0\r\n\r\n")
    assert got.count(b"HTTP/1.1 200") == 2
    assert got.count(b"Connection: keep-alive\r\n") == 1


async def test_head_sends_the_length_and_no_body() -> None:
    """HEAD gets the head that GET would get; the connection stays in step."""
    async with serving(echo) as client:
        reply = await client.request("HEAD", "/head")
        assert (reply.status, reply.header("content-length"), reply.body) == (200, "18", b"")
        assert (await client.request("GET", "/next")).body == b"GET /next  None 0"


async def test_bodiless_statuses_have_neither_length_nor_body() -> None:
    """204 and 304 end with their head, whatever the handler gives."""

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(int(request.path[1:]), body=b"not to be sent", chunked=request.query == "chunked")

    for target in ("/204", "/304", "/204?chunked"):
        got = await raw_exchange(handler, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        assert got.endswith(b"\r\n\r\n")
        assert b"Content-Length" not in got
        assert b"Transfer-Encoding" not in got


async def test_whole_reply_can_be_chunked() -> None:
    """`chunked` frames the body by one chunk instead of its length."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(200, body=b"x" * 300, chunked=True)

    got = await raw_exchange(handler, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert got == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n12c\r\n" + b"x" * 300 + b"\r\n0\r\n\r\n"


async def test_date_follows_the_injected_clock() -> None:
    """With a wall clock replies are dated by it, the line changing with the second."""
    now = [1_795_300_000.9]

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(200)
        now[0] += 0.2

    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_http_connection(theirs, handler, limits=FOREVER, wall=lambda: now[0]))
        client = WireClient(ours)
        dates = [(await client.request("GET", "/")).header("date") for _ in range(2)]
        await ours.aclose()
    assert dates == ["Sat, 21 Nov 2026 22:26:40 GMT", "Sat, 21 Nov 2026 22:26:41 GMT"]


# Streamed replies.


async def test_streamed_reply_is_chunked_as_written() -> None:
    """Each piece is a chunk of its own, the first goes with the head and the last with the end mark."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        assert not reply.is_started
        await reply.start(200, [("X-A", "b")], first=b"one")
        assert reply.is_started
        await reply.write(b"two")
        await reply.write(b"")
        await reply.finish(last=b"three")
        assert reply.is_finished

    got = await raw_exchange(handler, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert got == (
        b"HTTP/1.1 200 OK\r\nX-A: b\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
    )


async def test_streamed_reply_reaches_the_client_piece_by_piece() -> None:
    """Nothing waits for the end: the client has each piece before the next is written."""
    seen = trio.Event()

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200)
        await reply.write(b"first")
        await seen.wait()
        await reply.finish(last=b"second")

    async with serving(handler) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        received = b""
        while b"first" not in received:
            received += await client.stream.receive_some()
        assert b"second" not in received
        seen.set()
        while not received.endswith(b"0\r\n\r\n"):
            received += await client.stream.receive_some()
        assert b"second" in received


async def test_streamed_reply_to_http_1_0_ends_with_the_connection() -> None:
    """HTTP/1.0 knows no chunks: the bytes come bare and the close ends them, keep-alive or not."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200, first=b"a")
        await reply.finish(last=b"b")

    got = await raw_exchange(handler, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert got == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nab"


async def test_streamed_reply_to_head_has_no_body() -> None:
    """HEAD of a stream gets its head only, and the connection goes on."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200, first=b"a")
        await reply.write(b"b")
        await reply.finish(last=b"c")

    async with serving(handler) as client:
        for _ in range(2):
            reply = await client.request("HEAD", "/")
            assert (reply.status, reply.header("transfer-encoding"), reply.body) == (200, "chunked", b"")


async def test_a_reply_is_used_in_one_way_only() -> None:
    """Sending twice, writing before the start or after the end are errors of the handler, told to it."""
    told: list[str] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        with pytest.raises(RuntimeError) as early:
            await reply.write(b"x")
        await reply.send(200)
        with pytest.raises(RuntimeError) as late:
            await reply.send(200)
        told.extend([str(early.value), str(late.value), repr(reply)])

    await raw_exchange(handler, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert told == [
        "this reply is fresh, not streaming",
        "this reply is finished, not fresh",
        "<ServerReply finished>",
    ]


async def test_abort_cuts_the_reply() -> None:
    """An aborted stream has no end mark, and its connection is closed."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200, first=b"half")
        reply.abort()

    async with serving(handler) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        got = await read_all(client.stream)
    assert got.endswith(b"4\r\nhalf\r\n")


# What comes in.


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_requests_may_arrive_in_any_pieces(size: int) -> None:
    """A request cut anywhere is the same request: head, chunked body, trailers and the one after it."""
    data = (
        b"POST /p?q HTTP/1.1\r\nHost: h\r\nEmpty:\r\nX-Test: v\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\n4;ext=1\r\ndefg\r\n0\r\nX-Test: trailer\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n"
    )
    async with serving(echo) as client:

        async def send() -> None:
            for at in range(0, len(data), size):
                await client.stream.send_all(data[at : at + size])
                await trio.lowlevel.checkpoint()
            await client.stream.send_eof()  # type: ignore[attr-defined]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            got = await read_all(client.stream)
    assert [part.rpartition(b"\r\n\r\n")[2] for part in got.split(b"HTTP/1.1")[1:]] == [
        b"POST /p q v 7",
        b"GET /2  None 0",
    ]


async def test_request_properties() -> None:
    """Targets in all forms, header names in lower case, the first of repeated headers."""
    seen: list[ServerRequest] = []

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        seen.append(request)
        await reply.send(200)

    await raw_exchange(
        handler,
        b"GET http://host:80/abs/path?x=%20 HTTP/1.1\r\nHost: h\r\nA: 1\r\na: 2\r\n\r\n"
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
    )
    absolute, star = seen
    assert (absolute.path, absolute.query, absolute.get("a")) == ("/abs/path", "x=%20", "1")
    assert absolute.headers == [(b"host", b"h"), (b"a", b"1"), (b"a", b"2")]
    assert (star.method, star.path, star.get("missing")) == ("OPTIONS", "*", None)
    assert repr(absolute) == "<ServerRequest GET /abs/path, 0 bytes>"


async def test_expect_continue_is_answered_before_the_body_is_read() -> None:
    """A client that waits for 100 Continue gets it, and then the reply to its whole request."""
    async with serving(echo) as client:
        await client.stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert await client.stream.receive_some() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.stream.send_all(b"body")
        assert (await client.stream.receive_some()).endswith(b"POST /  None 4")


async def test_no_continue_when_the_body_has_come_along() -> None:
    """A 100 after the body is there would be noise."""
    got = await raw_exchange(
        echo, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nbody"
    )
    assert b"100 Continue" not in got


async def test_an_offer_to_upgrade_is_ignored() -> None:
    """A request that offers another protocol is answered as HTTP/1.1, and so are those after it."""
    got = await raw_exchange(
        echo,
        b"GET /1 HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
        b"GET /2 HTTP/1.1\r\nHost: h\r\n\r\nGET /3 HTTP/1.1\r\nHost: h\r\n\r\n",
    )
    assert [n for n in (b"/1", b"/2", b"/3") if b"GET %b " % n in got] == [b"/1", b"/2", b"/3"]


SMALL = HttpServerLimits(
    max_header_bytes=200,
    max_body_bytes=100,
    idle_timeout_s=math.inf,
    request_timeout_s=math.inf,
    send_timeout_s=math.inf,
)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nab",
            501,
        ),
        (b"POST / HTTP/1.1\r\nHost: a\r\nExpect: rain\r\n\r\n", 417),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n65\r\n" + b"x" * 101, 413),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 300, 431),
    ],
)
async def test_what_cannot_be_served_is_refused(request_bytes: bytes, status: int) -> None:
    """Malformed, ambiguous, too large or unknown: a status of its own, no handler, and the connection closed."""

    async def handler(_request: ServerRequest, _reply: ServerReply) -> None:
        pytest.fail("the handler was called")

    got = await raw_exchange(handler, request_bytes, limits=SMALL)
    assert got.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close\r\n" in got
    assert got.count(b"HTTP/1.1") == 1


async def test_good_requests_before_a_bad_one_are_served() -> None:
    """Pipelined after a good request, a bad one gets its refusal second."""
    got = await raw_exchange(echo, b"GET /ok HTTP/1.1\r\nHost: h\r\n\r\nrubbish\r\n\r\n")
    assert [part[:4] for part in got.split(b"HTTP/1.1")[1:]] == [b" 200", b" 400"]


async def test_limits_are_exact() -> None:
    """A head and a body of just the permitted size pass."""
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nX: "
    # What counts is the target and each header line with its separators.
    used = len("/") + len("hosta") + 4 + len("content-length100") + 4 + len("x") + 4
    for extra, status in ((0, b"200"), (1, b"431")):
        filler = b"y" * (200 - used + extra)
        got = await raw_exchange(echo, head + filler + b"\r\n\r\n" + b"b" * 100, limits=SMALL)
        assert got.startswith(b"HTTP/1.1 " + status)


async def test_a_header_that_never_ends_is_refused_while_it_comes() -> None:
    """The header limit holds for one endless line too, long before it ends."""
    async with serving(echo) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\nX: ")
        for _ in range(2):
            await client.stream.send_all(b"y" * 40_000)
        assert (await read_all(client.stream)).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize("body", [b"", b"x" * 3_000])
def test_what_comes_before_a_head_is_no_part_of_it(body: bytes) -> None:
    """Many requests in one piece, and the beginning of one more, are not taken for one that is too long."""
    parser = _RequestParser(HttpServerLimits(max_header_bytes=1_000))
    one = b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    parser.feed(one * 100 + one[:20])
    assert (len(parser.ready), parser.refusal) == (100, 0)
    parser.feed(one[20:])
    assert (len(parser.ready), parser.refusal) == (101, 0)
    # Counted all the same is one that begins there and is too long, as it comes and when it is whole.
    parser.feed(one + b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 1_000)
    assert parser.refusal == 0
    parser.feed(b"\r\n\r\n")
    assert parser.refusal == 431
    parser = _RequestParser(HttpServerLimits(max_header_bytes=1_000))
    parser.feed(one + b"GET / HTTP/1.1\r\nX: ")
    parser.feed(b"x" * 1_001)
    assert parser.refusal == 431


def test_any_number_of_offers_to_upgrade() -> None:
    """Each is passed over; a thousand in one piece are as good as one."""
    parser = _RequestParser(FOREVER)
    parser.feed(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n" * 1_000)
    assert (len(parser.ready), parser.refusal) == (1_000, 0)


async def test_a_refused_client_that_still_sends_gets_to_read_the_refusal() -> None:
    """What a refused client sends meanwhile is read and dropped, so the close does not take the reply with it."""
    limits = HttpServerLimits(max_body_bytes=1_000)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_http(echo, listeners, limits=limits))
        stream = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 500000\r\n\r\n" + b"x" * 500_000)
        assert (await read_all(stream)).startswith(b"HTTP/1.1 413 ")
        await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_a_refused_client_that_resets_is_no_error_of_a_handler() -> None:
    """A reset in the middle of a refusal ends that connection, and is neither counted nor reported."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    errors: list[Exception] = []
    async with trio.open_nursery() as nursery:
        server: HttpServer = await nursery.start(partial(serve_http, echo, listeners, on_error=errors.append))
        stream = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
        await stream.send_all(b"nonsense\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400 ")
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()
        while server.statistics().connections:
            await trio.sleep(0.001)
        assert (server.statistics().handler_errors, errors) == (0, [])
        nursery.cancel_scope.cancel()


@given(st.data())
def test_parser_gives_the_same_for_every_cut(data: st.DataObject) -> None:
    """However valid or broken input is cut, the requests and the refusal are those of the input in one piece."""
    piece = st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: h\r\n\r\n",
            b"POST /x HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhello",
            b"POST /y HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
            b"GET /u HTTP/1.1\r\nHost: h\r\nUpgrade: a\r\nConnection: upgrade\r\n\r\n",
            b"GET /c HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
            b"broken\r\n",
            b"\r\n",
        ]
    )
    whole = b"".join(data.draw(st.lists(piece, max_size=6)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    assert _parsed([whole]) == _parsed([whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)])


def _parsed(pieces: list[bytes]) -> tuple[list[tuple[object, ...]], int]:
    parser = _RequestParser(HttpServerLimits())
    for piece in pieces:
        if piece and not parser.refusal:
            parser.feed(piece)
    served: list[tuple[object, ...]] = []
    for request in parser.ready:
        served.append((request.method, request.target, request.headers, request.body, request.is_keep_alive))
        if not request.is_keep_alive:
            return served, 0  # what comes after a close is never looked at
    return served, parser.refusal


# Errors of handlers.


async def test_a_handler_that_raises_costs_its_own_connection_only() -> None:
    """The client gets a 500, the error is reported once, and other connections do not notice."""
    errors: list[Exception] = []

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        if request.path == "/bad":
            raise ValueError("a bug")
        await reply.send(200, body=b"fine")

    async with open_http_server(handler, limits=FOREVER, on_error=errors.append) as server:
        async with trio.open_nursery() as nursery:
            good, bad = WireClient(_connect(server, nursery)), WireClient(_connect(server, nursery))
            assert (await good.request("GET", "/")).status == 200
            reply = await bad.request("GET", "/bad")
            assert (reply.status, reply.header("connection")) == (500, "close")
            assert await bad.stream.receive_some() == b""
            assert (await good.request("GET", "/")).body == b"fine"
            assert server.statistics().connections == 1
            await good.stream.aclose()
        assert [str(error) for error in errors] == ["a bug"]
        assert server.statistics().handler_errors == 1
        assert server.statistics().connections == 0


def _connect(server: HttpServer, nursery: trio.Nursery) -> trio.abc.Stream:
    ours, theirs = memory_stream_pair()
    nursery.start_soon(server.serve_stream, theirs)
    return ours


async def test_a_handler_that_raises_in_a_stream_cuts_it() -> None:
    """After the head no status can tell: the client sees a reply without its end."""
    errors: list[Exception] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200, first=b"part")
        raise ValueError("a bug")

    async with serving(handler, on_error=errors.append) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        got = await read_all(client.stream)
    assert got.endswith(b"part\r\n")
    assert b"500" not in got
    assert len(errors) == 1


@pytest.mark.parametrize("status", [200, 777])
async def test_a_reply_that_cannot_be_written_is_a_500(status: int) -> None:
    """A header that may not be sent, or a status that is none, fails before the first byte."""
    errors: list[Exception] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(status, [("X", "a\r\nb")] if status == 200 else ())

    async with serving(handler, on_error=errors.append) as client:
        assert (await client.request("GET", "/")).status == 500
    assert len(errors) == 1


@pytest.mark.parametrize("is_started", [False, True])
async def test_a_handler_that_forgets_to_reply_has_failed(is_started: bool) -> None:
    """Returning without a finished reply is an error like any other."""
    errors: list[Exception] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        if is_started:
            await reply.start(200)

    async with serving(handler, on_error=errors.append) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        got = await read_all(client.stream)
    assert got.startswith(b"HTTP/1.1 200" if is_started else b"HTTP/1.1 500")
    assert "without finishing its reply" in str(errors[0])


async def test_an_exception_group_of_a_handler_is_contained_whole() -> None:
    """Handlers with nurseries raise groups; those are contained and reported as they are."""
    errors: list[Exception] = []

    async def handler(_request: ServerRequest, _reply: ServerReply) -> None:
        async with trio.open_nursery():
            raise ValueError("inside")

    async with serving(handler, on_error=errors.append) as client:
        assert (await client.request("GET", "/")).status == 500
    assert isinstance(errors[0], ExceptionGroup)


async def test_cancelling_the_server_is_not_contained(autojump_clock: trio.testing.MockClock) -> None:
    """A cancel from outside passes through a running handler and the connection is closed."""
    finished = []

    async def handler(_request: ServerRequest, _reply: ServerReply) -> None:
        try:
            await trio.sleep_forever()
        finally:
            finished.append(True)

    ours, theirs = memory_stream_pair()
    with trio.move_on_after(0.05) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_http_connection(theirs, handler, limits=FOREVER))
            await ours.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert scope.cancelled_caught
    assert finished == [True]
    assert theirs.is_closed


# Clients that leave.


async def test_a_client_that_leaves_is_noticed_while_the_handler_works() -> None:
    """The disconnect scope is cancelled by the client's end, and the handler can tell it from its own end."""
    told: list[bool] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        async with reply.open_disconnect_scope() as scope:
            await trio.sleep_forever()
        told.extend([scope.cancelled_caught, reply.is_disconnected])

    async with serving(handler) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        await client.stream.aclose()
    assert told == [True, True]


async def test_the_disconnect_scope_keeps_what_is_pipelined_meanwhile(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Requests that arrive while the client is watched are answered afterwards, in order and whole."""

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        async with reply.open_disconnect_scope() as scope:
            await trio.sleep(5)
        assert not scope.cancelled_caught
        await reply.send(200, body=request.path.encode() + b"%d" % len(request.body))

    async with serving(handler) as client:
        await client.stream.send_all(b"GET /1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /2 HTTP/1.1\r\nHo")
        await trio.sleep(1)
        await client.stream.send_all(b"st: h\r\nContent-Length: 3\r\n\r\nabc")
        received = b""
        while not received.endswith(b"/23"):
            received += await client.stream.receive_some()
        assert b"/10" in received


async def test_reading_ahead_is_bounded() -> None:
    """While a client is watched no more than a buffer of its data is taken; the rest waits on its side."""
    blocked = trio.Event()

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        if request.path == "/first":
            async with reply.open_disconnect_scope():
                await blocked.wait()
        await reply.send(200, body=b"%d" % len(request.body))

    async with serving(handler) as client, trio.open_nursery() as nursery:
        await client.stream.send_all(b"GET /first HTTP/1.1\r\nHost: h\r\n\r\n")
        sent = []

        async def flood() -> None:
            await client.stream.send_all(b"POST /second HTTP/1.1\r\nHost: h\r\nContent-Length: 1000000\r\n\r\n")
            for _ in range(100):
                await client.stream.send_all(b"x" * 10_000)
                sent.append(10_000)

        nursery.start_soon(flood)
        await trio.testing.wait_all_tasks_blocked()
        assert 65_536 <= sum(sent) <= 4 * 65_536
        blocked.set()
        received = b""
        while not received.endswith(b"1000000"):
            received += await client.stream.receive_some()


async def test_errors_are_logged_unless_somebody_takes_them(caplog: pytest.LogCaptureFixture) -> None:
    """Without a callback an error of a handler goes to the log, with its traceback."""

    async def handler(_request: ServerRequest, _reply: ServerReply) -> None:
        raise ValueError("a bug")

    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_http_connection(theirs, handler, limits=FOREVER))
        assert (await WireClient(ours).request("GET", "/")).status == 500
        await ours.aclose()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert "a bug" in str(record.exc_info[1])


async def test_watching_again_and_again_works_on_one_connection() -> None:
    """A handler may open the scope several times, over many requests, and an error inside leaves as itself."""

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        with pytest.raises(KeyError):
            async with reply.open_disconnect_scope():
                raise KeyError("itself")
        async with reply.open_disconnect_scope():
            await reply.start(200, first=b"x")
        await reply.finish()

    async with serving(handler) as client:
        for _ in range(10):
            assert (await client.request("GET", "/")).body == b"x"


async def test_sending_to_a_client_that_left_breaks_and_is_no_error_of_the_handler() -> None:
    """A failed send tells the handler; when it lets that pass, nobody is alarmed."""
    seen: list[bool] = []

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200)
        await trio.testing.wait_all_tasks_blocked()
        try:
            while True:
                await reply.write(b"x" * 1_000)
        finally:
            seen.append(reply.is_disconnected)

    async with serving(handler) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await client.stream.receive_some()
        await client.stream.aclose()
    assert seen == [True]


async def test_a_half_closed_client_gets_its_reply(autojump_clock: trio.testing.MockClock) -> None:
    """A client that sends its end of file after the request still waits for the answer."""

    async def slow(_request: ServerRequest, reply: ServerReply) -> None:
        await trio.sleep(0.02)
        await reply.send(200, body=b"here")

    assert (await raw_exchange(slow, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")).endswith(b"here")


async def test_a_request_cut_short_is_dropped_without_a_word() -> None:
    """End of file in the middle of a request ends the connection; there is nobody to answer."""
    assert await raw_exchange(echo, b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf") == b""


# Time.


async def test_idle_connections_are_closed(autojump_clock: trio.testing.MockClock) -> None:
    """A connection without a request is closed after the idle time, and a request begins a new one."""
    limits = HttpServerLimits(idle_timeout_s=10)
    async with serving(echo, limits=limits) as client:
        await trio.sleep(9)
        await client.request("GET", "/")
        started = trio.current_time()
        assert await client.stream.receive_some() == b""
        assert trio.current_time() - started == pytest.approx(10)


async def test_a_request_that_dribbles_in_is_answered_408(autojump_clock: trio.testing.MockClock) -> None:
    """The time for one request runs from its first byte, however often a byte comes."""
    limits = HttpServerLimits(idle_timeout_s=1_000, request_timeout_s=30, linger_s=1)
    async with serving(echo, limits=limits) as client, trio.open_nursery() as nursery:

        async def dribble() -> None:
            for byte in b"GET / HTTP/1.1\r\nHost: hhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhhh":
                await client.stream.send_all(bytes([byte]))
                await trio.sleep(1)

        nursery.start_soon(dribble)
        started = trio.current_time()
        data = await client.stream.receive_some()
        assert data.startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - started == pytest.approx(30)
        nursery.cancel_scope.cancel()


async def test_a_slow_handler_is_no_idle_connection(autojump_clock: trio.testing.MockClock) -> None:
    """Idle and request times do not run while a handler works."""

    async def slow(_request: ServerRequest, reply: ServerReply) -> None:
        await trio.sleep(500)
        await reply.send(200)

    limits = HttpServerLimits(idle_timeout_s=5, request_timeout_s=5, send_timeout_s=5)
    async with serving(slow, limits=limits) as client:
        assert (await client.request("GET", "/")).status == 200
        assert trio.current_time() >= 500


async def test_a_client_that_does_not_read_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    """A send that gets stuck ends the connection after its time."""

    async def flood(_request: ServerRequest, reply: ServerReply) -> None:
        await reply.start(200)
        while True:
            await reply.write(b"x" * 65_536)

    async with serving(flood, limits=HttpServerLimits(send_timeout_s=20)) as client:
        await client.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        await trio.sleep(21)
        with pytest.raises(trio.BrokenResourceError):
            await client.stream.send_all(b"x")


async def test_infinite_times_set_no_timers(autojump_clock: trio.testing.MockClock) -> None:
    """Without limits on time nothing is scheduled, so virtual time stands still around an idle connection."""
    async with serving(echo) as client:
        await client.request("GET", "/")
        with trio.move_on_after(1_000_000):
            await client.stream.receive_some()
        assert trio.current_time() >= 1_000_000
        assert (await client.request("GET", "/")).status == 200


# Whole servers.


@pytest.mark.net
async def test_serve_http_on_sockets() -> None:
    """Real sockets: many clients at once, keep-alive, large bodies both ways."""

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        await reply.send(200, body=request.body * 2)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server: HttpServer = await nursery.start(
            lambda task_status: serve_http(handler, listeners, task_status=task_status)
        )
        address = listeners[0].socket.getsockname()

        async def work(number: int) -> None:
            client = WireClient(await trio.open_tcp_stream(*address))
            for size in (0, 10, 700_000):
                body = bytes([number]) * size
                assert (await client.request("POST", "/", body=body)).body == body * 2
            await client.stream.aclose()

        async with trio.open_nursery() as workers:
            for number in range(8):
                workers.start_soon(work, number)
        assert server.statistics().requests == 24
        assert server.statistics().accepted == 8
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match=r".*"):
        await trio.open_tcp_stream(*address)


@pytest.mark.net
async def test_serves_tls() -> None:
    """Behind TLS, good and bad requests alike; such streams have no half-close to linger with."""
    authority = trustme.CA()
    theirs, ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(theirs)
    authority.configure_trust(ours)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_ssl_over_tcp_listeners(0, theirs, host="127.0.0.1", https_compatible=True)
        nursery.start_soon(lambda: serve_http(echo, listeners))
        port = listeners[0].transport_listener.socket.getsockname()[1]  # type: ignore[attr-defined]  # the Listener is of sockets

        async def connect() -> trio.abc.Stream:
            tcp = await trio.open_tcp_stream("127.0.0.1", port)
            return trio.SSLStream(tcp, ours, server_hostname="localhost", https_compatible=True)

        client = WireClient(await connect())
        for body in (b"", b"x" * 200_000):
            assert (await client.request("POST", "/", body=body)).body == b"POST /  None %d" % len(body)
        await client.stream.aclose()
        bad = await connect()
        await bad.send_all(b"nonsense\r\n\r\n")
        assert (await bad.receive_some()).startswith(b"HTTP/1.1 400 ")
        await bad.aclose()
        nursery.cancel_scope.cancel()


@pytest.mark.net
async def test_a_client_that_resets_its_connection_hurts_nobody() -> None:
    """RST while idle, while a handler works and while a reply is sent: no error of a handler, and the server lives."""
    errors: list[Exception] = []
    entered = trio.Event()

    async def handler(request: ServerRequest, reply: ServerReply) -> None:
        if request.path == "/stream":
            entered.set()
            async with reply.open_disconnect_scope():
                await reply.start(200)
                while True:
                    await reply.write(b"x" * 10_000)
        else:
            await reply.send(200)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server: HttpServer = await nursery.start(
            lambda task_status: serve_http(handler, listeners, on_error=errors.append, task_status=task_status)
        )
        for path in (None, "/", "/stream"):
            stream = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if path is not None:
                await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
                await stream.receive_some(1)
            await stream.aclose()
        assert entered.is_set()
        with trio.fail_after(5):
            while server.statistics().connections:
                await trio.sleep(0.005)
        assert errors == []
        nursery.cancel_scope.cancel()


@pytest.mark.net
async def test_drain_finishes_what_runs_and_closes_the_rest() -> None:
    """After drain no new connections, idle ones closed, the running reply sent with a close; then it returns."""
    entered, release = trio.Event(), trio.Event()

    async def handler(_request: ServerRequest, reply: ServerReply) -> None:
        entered.set()
        await release.wait()
        await reply.send(200, body=b"late")

    returned = trio.Event()
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listeners[0].socket.getsockname()

    async def serve(task_status: trio.TaskStatus[HttpServer]) -> None:
        await serve_http(handler, listeners, task_status=task_status)
        returned.set()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            server: HttpServer = await nursery.start(serve)
            idle, busy = (
                WireClient(await trio.open_tcp_stream(*address)),
                WireClient(await trio.open_tcp_stream(*address)),
            )
            await busy.stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            await entered.wait()
            server.drain()
            assert repr(server).startswith("<HttpServer draining")
            assert await idle.stream.receive_some() == b""
            assert not returned.is_set()
            release.set()
            got = await read_all(busy.stream)
            assert got.endswith(b"late")
            assert b"Connection: close\r\n" in got
            await returned.wait()
            with pytest.raises(OSError, match=r".*"):
                await trio.open_tcp_stream(*address)
            await idle.stream.aclose()
            await busy.stream.aclose()


@pytest.mark.net
async def test_drain_gives_up_after_its_time() -> None:
    """A handler that never ends is cancelled when the drain time is over."""

    async def handler(_request: ServerRequest, _reply: ServerReply) -> None:
        await trio.sleep_forever()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            limits = HttpServerLimits(drain_timeout_s=0.05)
            server: HttpServer = await nursery.start(
                lambda task_status: serve_http(handler, listeners, limits=limits, task_status=task_status)
            )
            stream = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
            await stream.send_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            while server.statistics().requests == 0:
                await trio.sleep(0.001)
            server.drain()
            assert await read_all(stream) == b""
            await stream.aclose()


async def test_connections_above_the_limit_are_answered_503() -> None:
    """One connection too many is told so and closed; the others go on."""
    limits = HttpServerLimits(max_connections=1, idle_timeout_s=math.inf)
    async with open_http_server(echo, limits=limits) as server, trio.open_nursery() as nursery:
        first = WireClient(_connect(server, nursery))
        assert (await first.request("GET", "/")).status == 200
        second = WireClient(_connect(server, nursery))
        got = b""
        while b"Service Unavailable" not in got[20:]:
            got += await second.stream.receive_some()
        assert got.startswith(b"HTTP/1.1 503 ")
        await second.stream.aclose()
        assert (await first.request("GET", "/")).status == 200
        assert server.statistics().refused == 1
        await first.stream.aclose()


# Headers.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", "a\r\nY: b"),
        ("X", "a\nb"),
        ("X", "\x00"),
        ("X", "€"),
        ("X Y", "a"),
        ("X:", "a"),
        ("", "a"),
        ("Content-Length", "1"),
        ("transfer-encoding", "chunked"),
        ("Connection", "close"),
    ],
)
def test_headers_that_would_break_the_message_are_refused(name: str, value: str) -> None:
    """Line ends in values, bad names, and the framing headers never get out."""
    with pytest.raises(ValueError, match=r"header|server"):
        encode_headers([(name, value)])


def test_headers_are_encoded_once_and_joined() -> None:
    """Blocks are plain header lines and can be put together."""
    block = join_headers(encode_headers([("A", "1")]), encode_headers([("B", "é")]))
    assert block == b"A: 1\r\nB: \xe9\r\n"
