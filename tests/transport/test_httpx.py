"""httpx both ways round: our transport under its client, and its transports, clients and mocks under ours."""

from __future__ import annotations

import gzip
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress

import httpx
import pytest
import trio
import trio.testing
import trustme
from scripted import DONE, STREAM_HEAD, Network, Peer, Request, answering, chat, chunks, delta, reply, shown_by, stream
from worlds import open_quiet_client

import gorouter_trio as gr
from gorouter_trio.errors import ConnectError, DecodeError, GorouterError, StreamBrokenError
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.transport.httpx_connection import HttpxConnection
from gorouter_trio.transport.httpx_transport import HttpTransport

KEY = "sk-or-v1-c4n4ry0f7h3f4c3"
HEAD = RequestHead(
    Origin("http", "h.example", 80), method="POST", target="/x", headers=[("Authorization", f"Bearer {KEY}")]
)
LIMITS = ConnectionLimits()
Serve = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def memory(serve: Serve, **settings: float) -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(nursery, serve, **settings)  # type: ignore[arg-type]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[int]:
    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await serve(Peer(stream))

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


# --- our transport under an httpx client ------------------------------------------------------------------------------


def mirror(request: Request) -> bytes:
    shown = f"{request.method} {request.target} {request.headers.get('x-a')} {request.headers['host']} ".encode()
    return reply(shown + request.body, headers=["X-B: \u00e9".encode("utf-8").decode("latin-1")])


async def test_get_and_post_on_one_connection() -> None:
    """Requests of every kind arrive as httpx made them, and reuse the connection."""
    async with (
        memory(answering(mirror)) as network,
        httpx.AsyncClient(transport=HttpTransport(network=network)) as client,
    ):
        got = await client.get("http://h.example:81/a%20b?c=d", headers={"X-A": "1"})
        assert (got.status_code, got.content) == (200, b"GET /a%20b?c=d 1 h.example:81 ")
        posted = await client.post("http://h.example:81/p", json={"a": "é"})
        assert posted.content == 'POST /p None h.example:81 {"a":"é"}'.encode()
        uploaded = await client.put("http://h.example:81/", content=_uploaded(), headers={"Host": "virtual.example"})
        assert uploaded.content == b"PUT / None virtual.example onetwo"
        assert len(network.ends) == 1
        await client.get("http://other.example/")
        assert len(network.ends) == 2
        assert network.open == 2
    assert network.open == 0


async def _uploaded() -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"


async def test_what_httpx_adds_works() -> None:
    """Redirects, decompression, HEAD and streaming go through httpx as over its own transport."""

    def answer(request: Request) -> bytes:
        if request.target == "/old":
            return reply(b"", status=302, headers=["Location: /new"])
        if request.method == "HEAD":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
        if request.target == "/stream":
            return STREAM_HEAD + chunks([b"one ", b"two"])
        return reply(gzip.compress(b"inflated " * 100), headers=["Content-Encoding: gzip"])

    async with memory(answering(answer)) as network:
        async with httpx.AsyncClient(
            transport=HttpTransport(network=network), base_url="http://h", follow_redirects=True
        ) as client:
            assert (await client.get("/old")).text == "inflated " * 100
            assert (await client.head("/x")).headers["content-length"] == "999"
            async with client.stream("GET", "/stream") as response:
                assert [text async for text in response.aiter_text()] == ["one two"]
            assert (await client.get("/x")).text == "inflated " * 100
            assert len(network.ends) == 2  # HEAD costs its connection
        assert network.open == 0


# httpx reads through generators of its own, and trio complains of those that are left in the middle.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_stream_that_is_left_early() -> None:
    """Leaving a streamed response closes its connection: it is in the middle of a reply."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD, b"3\r\none\r\n")
        await peer.wait_gone()

    async with memory(serve) as network, httpx.AsyncClient(transport=HttpTransport(network=network)) as client:
        async with client.stream("GET", "http://h/") as response, aclosing(response.aiter_raw()) as pieces:  # type: ignore[type-var]  # httpx types its generators as iterators
            assert await anext(pieces) == b"one"
            assert network.open == 1
        assert network.open == 0


async def _cut(peer: Peer) -> None:
    await peer.request()
    await peer.send(reply(b"x" * 10)[:-3])


async def _garbage(peer: Peer) -> None:
    await peer.send(b"SSH-2.0\r\n")
    await peer.wait_gone()


async def _half_a_head(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n\x00"[:25])


async def _bad_chunk(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    await peer.wait_gone()


@pytest.mark.parametrize(
    ("serve", "error"),
    [
        (_cut, httpx.ReadError),
        (_garbage, httpx.RemoteProtocolError),
        (_half_a_head, httpx.ReadError),
        (_bad_chunk, httpx.RemoteProtocolError),
    ],
)
async def test_errors_are_httpxs_own(serve: Serve, error: type[Exception]) -> None:
    """What goes wrong on the way is raised as httpx would raise it, and the connection is closed."""
    async with memory(serve) as network, httpx.AsyncClient(transport=HttpTransport(network=network)) as client:
        with pytest.raises(error) as raised:
            await client.get("http://h/", headers={"Authorization": KEY})
        assert network.open == 0
        assert isinstance(raised.value, httpx.RequestError)
        assert raised.value.request.url == "http://h/"


async def test_requests_that_cannot_be_sent() -> None:
    """Schemes that are none of ours and header values that break their line are refused before connecting."""
    async with (
        memory(answering(mirror)) as network,
        httpx.AsyncClient(transport=HttpTransport(network=network)) as client,
    ):
        for url in ("ftp://h/", "ws://h/"):
            with pytest.raises(httpx.UnsupportedProtocol):
                await client.get(url)
        with pytest.raises(httpx.LocalProtocolError) as refused:
            await client.get("http://h/", headers={"Authorization": f"{KEY}\r\nX: y"})
        assert KEY not in str(refused.value)
        assert network.attempts == 0
        network.refuse.append(OSError("no"))
        with pytest.raises(httpx.ConnectError):
            await client.get("http://h/")


async def test_timeouts(autojump_clock: trio.testing.MockClock) -> None:
    """httpx's connect and read timeouts hold, for the head and for each piece of the body."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if request.target == "/late":
                await trio.sleep(6)
            await peer.send(STREAM_HEAD)
            for _ in range(3):
                await peer.send(b"1\r\nx\r\n")
                await trio.sleep(6 if request.target == "/slow" else 4)
            await peer.send(b"0\r\n\r\n")

    async with (
        memory(serve) as network,
        httpx.AsyncClient(transport=HttpTransport(network=network), timeout=5) as client,
    ):
        started = trio.current_time()
        assert (await client.get("http://h/")).text == "xxx"
        assert trio.current_time() - started == pytest.approx(12)
        for path, error, waited_s in (("/late", httpx.ReadTimeout, 5), ("/slow", httpx.ReadTimeout, 5)):
            started = trio.current_time()
            with pytest.raises(error):
                await client.get(f"http://h{path}")
            assert trio.current_time() - started == pytest.approx(waited_s)
        network.connect_s = 10
        with pytest.raises(httpx.ConnectTimeout):
            await client.get("http://elsewhere/")
        assert (await client.get("http://h/", timeout=None)).text == "xxx"
    assert network.open == 0


async def test_a_kept_connection_that_was_closed_is_replaced(no_leaks) -> None:
    """A connection that its peer has closed is not used; one that is found closed by the request is replaced."""
    served = 0

    async def serve(peer: Peer) -> None:
        nonlocal served
        served += 1
        if await peer.request() is not None:
            await peer.send(reply(b"%d" % served))

    async with (
        memory(serve) as network,
        no_leaks(),
        httpx.AsyncClient(transport=HttpTransport(network=network)) as client,
    ):
        assert [(await client.get("http://h/")).content for _ in range(3)] == [b"1", b"2", b"3"]
    async with listening(serve) as port, no_leaks(), httpx.AsyncClient(transport=HttpTransport()) as client:
        for expected in (b"4", b"5"):
            assert (await client.get(f"http://127.0.0.1:{port}/")).content == expected
            await trio.sleep(0.01)


async def test_concurrent_requests_and_the_number_kept(no_leaks) -> None:
    """Requests at the same time have a connection each; at most `keep` of an origin stay, and none after `aclose`."""
    async with listening(answering(lambda request: reply(request.target.encode()))) as port, no_leaks():
        transport = HttpTransport(keep=2)
        client = httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{port}")

        async def get(number: int) -> None:
            assert (await client.get(f"/{number}")).text == f"/{number}"

        async with client:
            async with trio.open_nursery() as nursery:
                for number in range(6):
                    nursery.start_soon(get, number)
            assert sum(map(len, transport._idle.values())) == 2
        assert sum(map(len, transport._idle.values())) == 0


async def test_cancelled_requests_leave_nothing(no_leaks) -> None:
    """Cancelled at any step, plain or streamed, no connection stays open but the idle ones."""

    async def use(client: httpx.AsyncClient) -> None:
        for steps in range(12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.get, "/")
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        assert (await client.get("/")).status_code == 200

    serve = answering(lambda request: reply(b"x" * 1000))
    async with (
        listening(serve) as port,
        no_leaks(),
        httpx.AsyncClient(transport=HttpTransport(), base_url=f"http://127.0.0.1:{port}") as client,
    ):
        await use(client)


async def test_a_broken_request_shows_no_key() -> None:
    """Errors of our transport under httpx hold no header in the locals of our frames."""
    async with memory(_cut) as network, httpx.AsyncClient(transport=HttpTransport(network=network)) as client:
        request = client.build_request("GET", "http://h/", headers={"Authorization": f"Bearer {KEY}"})
        with pytest.raises(httpx.ReadError) as broken:
            await client.send(request)
    assert "transport/httpx_transport.py" in shown_by(broken.value)
    assert KEY not in shown_by(broken.value)


async def test_tls_under_httpx(no_leaks) -> None:
    """https with a context of one's own."""
    authority = trustme.CA()
    server, trusting = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(trusting)

    async def serve(peer: Peer) -> None:
        peer.stream = trio.SSLStream(peer.stream, server, server_side=True, https_compatible=True)
        await answering(lambda request: reply(b"secure"))(peer)

    async with listening(serve) as port, no_leaks():
        async with httpx.AsyncClient(transport=HttpTransport(tls=trusting)) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/")).text == "secure"
        async with httpx.AsyncClient(transport=HttpTransport()) as client:
            with pytest.raises(httpx.ConnectError, match="does not verify"):
                await client.get(f"https://127.0.0.1:{port}/")


# --- transports, clients and mocks of users under ours ----------------------------------------------------------------

Kind = Callable[[], httpx.AsyncBaseTransport | httpx.AsyncClient]
REAL: dict[str, Kind] = {"transport": httpx.AsyncHTTPTransport, "client": httpx.AsyncClient, "our own": HttpTransport}


@pytest.fixture(params=list(REAL.values()), ids=list(REAL))
async def user(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncBaseTransport | httpx.AsyncClient]:
    """A user's transport or client, closed by the user."""
    made = request.param()
    try:
        yield made
    finally:
        await made.aclose()


def _api(request: Request) -> bytes:
    if request.headers.get("authorization") != f"Bearer {KEY}":
        return reply({"error": {"message": "no key", "code": 401}}, status=401)
    if request.method == "GET":
        return reply({"data": {"total_credits": 5, "total_usage": 1.5}})
    asked = request.json()["messages"][-1]["content"]
    if asked == "fail":
        return reply({"error": {"message": "no", "code": 400}}, status=400)
    if request.json().get("stream"):
        return stream(delta("a "), delta(asked), delta(finish="stop", usage={"cost": 0.5}), DONE)
    return chat(asked)


async def test_a_users_transport_or_client(user: httpx.AsyncBaseTransport | httpx.AsyncClient) -> None:
    """Chats, streams, service calls and errors through what the user brought."""
    async with (
        listening(answering(_api)) as port,
        open_quiet_client(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", transport=user) as client,
    ):
        for _ in range(3):
            assert (await client.chat("hello")).text == "hello"
        async with client.stream("you") as streamed:
            assert [text async for text in streamed.text] == ["a ", "you"]
            assert streamed.result.cost is not None
        assert (await client.credits()).total_credits == 5
        with pytest.raises(gr.BadRequestError, match="no"):
            await client.chat("fail")
        async with client.stream("left early") as streamed:
            await anext(streamed.text)
        assert (await client.chat("still there")).text == "still there"


async def test_a_users_transport_with_cancels(no_leaks) -> None:
    """Cancelled chats and streams over a user's transport end at once, and leave nothing when it is closed."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if request.json().get("stream"):
                await peer.send(STREAM_HEAD, chunks([delta("a")], end=b""))
            if request.json()["messages"][0]["content"] == "hang":
                await peer.wait_gone()
            await peer.send(chat("fine"))

    async with listening(serve) as port, no_leaks():
        for kind in (httpx.AsyncClient, HttpTransport):
            async with (
                kind() as user,
                open_quiet_client(api_key=KEY, base_url=f"http://127.0.0.1:{port}", transport=user) as client,
            ):
                with trio.move_on_after(0.05) as scope:
                    await client.chat("hang")
                assert scope.cancelled_caught
                with trio.move_on_after(0.05) as scope:
                    async with client.stream("hang") as streamed:
                        async for _ in streamed:
                            pass
                assert scope.cancelled_caught
                with trio.fail_after(5):
                    assert (await client.chat("go on")).text == "fine"


def _mock(handler: Callable[[httpx.Request], object]) -> httpx.MockTransport:
    return httpx.MockTransport(handler)  # type: ignore[arg-type]


def _completion(text: str) -> dict[str, object]:
    return {"id": "gen-1", "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


async def test_a_mock_transport() -> None:
    """httpx.MockTransport stands in for the network, with sync and async handlers, and sees the whole request."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=_completion("mocked"), headers={"X-Generation-Id": "gen-h"})

    async def slow_handler(request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        return handler(request)

    for mock in (_mock(handler), _mock(slow_handler)):
        async with open_quiet_client(
            api_key=KEY, base_url="https://h.example/api/v1", transport=mock, app_name="A"
        ) as client:
            result = await client.chat("x")
            assert (result.text, result.generation_id) == ("mocked", "gen-1")
    assert {str(request.url) for request in seen} == {"https://h.example/api/v1/chat/completions"}
    assert seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert seen[0].headers["x-title"] == "A"


async def test_errors_of_a_users_transport_are_ours() -> None:
    """httpx's exceptions become this package's, and say whether something was sent; others pass as they are."""
    cases: list[tuple[Exception, type[Exception], bool]] = [
        (httpx.ConnectError("x"), ConnectError, False), (httpx.ConnectTimeout("x"), ConnectError, False),
        (httpx.PoolTimeout("x"), ConnectError, False), (httpx.ProxyError("x"), ConnectError, False),
        (httpx.UnsupportedProtocol("x"), ConnectError, False), (httpx.LocalProtocolError("x"), ConnectError, False),
        (httpx.InvalidURL("x"), ConnectError, False), (httpx.ReadTimeout(""), StreamBrokenError, True),
        (httpx.ReadError("x"), StreamBrokenError, True), (httpx.WriteError("x"), StreamBrokenError, True),
        (httpx.RemoteProtocolError("x"), StreamBrokenError, True), (httpx.DecodingError("x"), DecodeError, True),
    ]  # fmt: skip
    for error, kind, billed in cases:

        def handler(request: httpx.Request, error: Exception = error) -> httpx.Response:
            raise error

        async with open_quiet_client(
            api_key=KEY, base_url="https://h", transport=_mock(handler), retry=gr.RetryPolicy(max_retries=0)
        ) as client:
            with pytest.raises(kind) as raised:
                await client.chat("x")
            assert isinstance(raised.value, GorouterError)
            assert (raised.value.maybe_billed, raised.value.__cause__) == (billed, error)

    def broken(request: httpx.Request) -> httpx.Response:
        raise RuntimeError("a bug of the user's")

    async with open_quiet_client(api_key=KEY, base_url="https://h", transport=_mock(broken)) as client:
        with pytest.raises(RuntimeError, match="a bug of the user's"):
            await client.chat("x")


async def test_a_users_transport_that_cannot_be_closed_ends_no_client(autojump_clock: trio.testing.MockClock) -> None:
    """What closing a user's transport raises, when it was idle for too long or at the end, harms nobody."""

    class Broken(httpx.MockTransport):
        async def aclose(self) -> None:
            closings.append(1)
            raise RuntimeError("cannot be closed")

    closings: list[int] = []
    async with open_quiet_client(
        api_key=KEY,
        base_url="https://h",
        transport=lambda: Broken(lambda _request: httpx.Response(200, json=_completion("fine"))),
        pool=gr.PoolLimits(keepalive_s=1.0),
    ) as client:
        assert (await client.chat("x")).text == "fine"
        await trio.sleep(5)
        assert len(closings) == 1
        assert (await client.chat("x")).text == "fine"


async def test_a_users_body_is_bounded_as_decoded() -> None:
    """A reply that unpacks to more than the limit is refused, and closed, before it fills the memory."""
    bomb = gzip.compress(b"\0" * 50_000_000)
    closed: list[bool] = []

    class Bomb(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for start in range(0, len(bomb), 512):
                yield bomb[start : start + 512]

        async def aclose(self) -> None:
            closed.append(True)

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=Bomb())

    limits = gr.PoolLimits(max_body_bytes=1_000_000)
    async with open_quiet_client(api_key=KEY, base_url="https://h", transport=_mock(handler), pool=limits) as client:
        with pytest.raises(DecodeError, match="over 1000000 bytes"):
            await client.chat("x")
    assert closed


async def test_no_generator_is_left_in_the_middle(recwarn: pytest.WarningsRecorder) -> None:
    """A reply of a user's transport that is closed early ends the generators that read it."""
    finished: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                await trio.lowlevel.checkpoint()
                yield b"x"
        finally:
            finished.append("body")

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=pieces())

    connection = HttpxConnection(_mock(handler), LIMITS)
    await connection.start(HEAD, b"")
    assert await connection.receive_some() == b"x"
    assert not connection.is_complete
    await connection.aclose()
    assert finished == ["body"]
    assert connection.is_complete
    assert not connection.is_reusable
    with pytest.raises(StreamBrokenError):
        await connection.start(HEAD, b"")


async def test_close_wakes_whoever_waits_on_a_users_transport() -> None:
    """`close` ends a wait in the user's transport with StreamBrokenError; an outer cancel passes as a cancel."""

    async def handler(request: httpx.Request) -> httpx.Response:
        await trio.sleep_forever()
        raise AssertionError

    async def expect_broken(connection: HttpxConnection) -> None:
        with pytest.raises(StreamBrokenError):
            await connection.start(HEAD, b"")

    connection = HttpxConnection(_mock(handler), LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_broken, connection)
        await trio.testing.wait_all_tasks_blocked()
        connection.close()
    other = HttpxConnection(_mock(handler), LIMITS)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other.start, HEAD, b"")
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_errors_below_a_users_transport_show_no_key() -> None:
    """The frames of httpx and what is below it hold the request's headers; our errors do not carry them."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1)
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nx")

    async with httpx.AsyncHTTPTransport() as user:
        async with listening(serve) as port:
            head = RequestHead(
                Origin("http", "127.0.0.1", port),
                method="POST",
                target="/x",
                headers=[("Authorization", f"Bearer {KEY}")],
            )
            connection = HttpxConnection(user, LIMITS)
            with pytest.raises(StreamBrokenError) as cut:
                await connection.start(head, b"x" * 5_000_000)
                await connection.receive_all()
            await connection.aclose()
        connection = HttpxConnection(user, LIMITS)
        with pytest.raises(ConnectError) as refused:
            await connection.start(head, b"")
    for error in (cut.value, refused.value):
        assert "transport/httpx_connection.py" in shown_by(error)
        assert KEY not in shown_by(error)


FOREIGN = """
import httpx

class Transport(httpx.AsyncBaseTransport):
    async def handle_async_request(self, request):
        raw = list(request.headers.raw)
        try:
            raise OSError("below")
        except OSError as exc:
            raise httpx.WriteError("broken") from exc
"""


async def test_frames_of_a_users_transport_are_let_go() -> None:
    """What holds the key in a local below httpx does not come up with the error; kind and words of the causes do."""
    names: dict[str, type[httpx.AsyncBaseTransport]] = {}
    exec(compile(FOREIGN, "elsewhere/transport.py", "exec"), names)
    connection = HttpxConnection(names["Transport"](), LIMITS)
    with pytest.raises(StreamBrokenError) as broken:
        await connection.start(HEAD, b"")
    assert isinstance(broken.value.__cause__, httpx.WriteError)
    assert isinstance(broken.value.__cause__.__cause__, OSError)
    assert "transport/httpx_connection.py" in shown_by(broken.value)
    assert KEY not in shown_by(broken.value)


def test_limits_have_defaults() -> None:
    """Headers 64 KiB, bodies 64 MiB."""
    assert (ConnectionLimits().max_header_bytes, ConnectionLimits().max_body_bytes) == (65_536, 67_108_864)
