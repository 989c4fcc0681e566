"""Proxies of every kind, in memory and on real sockets: tunnels, forwarding, refusals, cuts at every byte, cancels."""

from __future__ import annotations

import pickle
import random
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import trio
import trio.testing
import trustme
from proxies import FakeProxy, listening
from scripted import (
    DONE,
    Peer,
    PlayedStream,
    Request,
    answering,
    chat,
    delta,
    reply,
    shown_by,
    stream,
)
from worlds import open_quiet_client

import gorouter_trio as gr
from gorouter_trio.errors import ConnectError
from gorouter_trio.network import Proxy, parse_proxy
from gorouter_trio.secret import Secret
from gorouter_trio.testing.proxy import Cut, Ending, open_fault_proxy
from gorouter_trio.transport.connector import HttpConnector
from gorouter_trio.transport.http import ConnectionLimits, Network, Origin, RequestHead
from gorouter_trio.transport.httpx_transport import HttpTransport
from gorouter_trio.transport.streams import SocketNetwork

KEY = "sk-or-v1-c4n4ry0f7h3pr0xy"
PASSWORD = "c4n4ry-pr0xy-p4ss"
LIMITS = ConnectionLimits()
SECURE = Origin("https", "api.example", 443)
PLAIN = Origin("http", "api.example", 8080)
GRANTED = b"HTTP/1.1 200 Connection established\r\nX-Proxy: 1\r\n\r\n"
SOCKS_GRANTED = b"\x05\x00" + b"\x05\x00\x00\x03\x04name\x00\x50"


def named(url: str) -> Proxy:
    return parse_proxy(Secret(url), field="proxy")


def head(origin: Origin, proxy: Proxy | None = None) -> RequestHead:
    return RequestHead(origin, method="POST", target="/x", headers=[("Authorization", f"Bearer {KEY}")], proxy=proxy)


class Played:
    """A network whose every connection plays the same pieces."""

    def __init__(self, pieces: list[bytes | Exception]) -> None:
        self.pieces = pieces
        self.streams: list[PlayedStream] = []
        self.dialled: list[tuple[str, int]] = []

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.dialled.append((host, port))
        self.streams.append(PlayedStream(self.pieces))
        return self.streams[-1]


def through(proxy: Proxy, network: Network, origin: Origin = PLAIN, tls: ssl.SSLContext | None = None) -> HttpConnector:
    return HttpConnector(origin, network=network, tls=tls, limits=LIMITS, proxy=proxy)


# --- what goes over the wire ------------------------------------------------------------------------------------------


async def test_plain_http_is_forwarded() -> None:
    """A proxy is asked for the whole URL of a plain-http target, with its own authorization, and Host is the API's."""
    proxy = named(f"http://me:{PASSWORD}@proxy.example:3128")
    network = Played([reply(b"forwarded"), reply(b"again")])
    connection = await through(proxy, network).connect()
    assert network.dialled == [("proxy.example", 3128)]
    for expected in (b"forwarded", b"again"):
        await connection.start(head(PLAIN, proxy), b"{}")
        assert await connection.receive_all() == expected
        assert connection.is_reusable
    sent = bytes(network.streams[0].sent).split(b"\r\n")
    assert sent[0] == b"POST http://api.example:8080/x HTTP/1.1"
    assert sent[1] == b"Host: api.example:8080"
    assert b"Proxy-Authorization: Basic bWU6YzRuNHJ5LXByMHh5LXA0c3M=" in sent


async def test_a_forwarding_proxy_that_refuses() -> None:
    """407 can only be the proxy's own: a ConnectError with the status; other statuses are taken for the API's."""
    proxy = named("http://proxy.example:3128")
    connection = await through(proxy, Played([reply(b"who are you", status=407)])).connect()
    with pytest.raises(ConnectError, match=r"the proxy http://proxy\.example:3128 refused .*: 407") as refused:
        await connection.start(head(PLAIN, proxy), b"{}")
    assert refused.value.proxy_status == 407
    connection = await through(proxy, Played([reply(b"no", status=503)])).connect()
    await connection.start(head(PLAIN, proxy), b"{}")
    assert connection.status == 503


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", 407, r"407 Proxy Authentication Required$"),
        (b"HTTP/1.0 403 Forbidden\r\nContent-Length: 5\r\n\r\nno no", 403, r"403 Forbidden$"),
        (b"HTTP/1.1 502\r\n\r\n", 502, r": 502$"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 504 Late\r\n\r\n", 504, r"504 Late$"),
        (b"HTTP/1.1 403 \x1b[31mred\x07\r\n\r\n", 403, r"403 \[31mred$"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://portal\r\n\r\n", 302, r"302 Found$"),
        (b"SSH-2.0-x\r\n\r\n", None, "did not answer in HTTP/1.1"),
        (b"HTTP/2.0 200 OK\r\n\r\n", None, "did not answer in HTTP/1.1"),
        (b"HTTP/1.1 2000 OK\r\n\r\n", None, "did not answer in HTTP/1.1"),
        (GRANTED + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nPOISON", None, "before anything was asked for"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, None, "more than 65536 bytes of headers"),
        (b"HTTP/1.1 200 OK\r\n", None, "closed the connection without an answer"),
        (b"", None, "closed the connection without an answer"),
    ],
)  # fmt: skip
async def test_answers_to_connect(answer: bytes, status: int | None, words: str) -> None:
    """A refusal has its status and reason, whatever else comes says what it is, and the stream is closed."""
    network = Played([answer, b""])
    with pytest.raises(ConnectError, match=words) as refused:
        await through(named(f"http://u:{PASSWORD}@proxy.example:3128"), network, SECURE).connect()
    assert refused.value.proxy_status == status
    assert network.streams[0].is_closed
    assert bytes(network.streams[0].sent).startswith(b"CONNECT api.example:443 HTTP/1.1\r\nHost: api.example:443\r\n")
    assert PASSWORD not in shown_by(refused.value)
    assert refused.value.message.isprintable()


@pytest.mark.parametrize(
    ("url", "answer", "words"),
    [
        ("socks5://p", b"\x05\xff", "wants another kind of authentication"),
        ("socks5://p", b"\x05\x02", "wants another kind of authentication"),
        ("socks5://p", b"HT", "does not speak SOCKS 5"),
        (f"socks5://u:{PASSWORD}@p", b"\x05\x02\x01\x01", "refused the user or the password"),
        *[
            ("socks5://p", b"\x05\x00\x05" + bytes([code]) + b"\x00\x01", f"api.example:8080: {code} {words}")
            for code, words in ((1, "general"), (2, "not allowed"), (5, "connection refused"), (9, "no reason known"))
        ],
    ],
)
async def test_answers_of_a_socks_proxy(url: str, answer: bytes, words: str) -> None:
    """Each kind of refusal in words, with nothing of the password."""
    network = Played([answer[n : n + 1] for n in range(len(answer))])
    with pytest.raises(ConnectError, match=words) as refused:
        await through(named(url), network).connect()
    assert network.streams[0].is_closed
    assert PASSWORD not in shown_by(refused.value)


@pytest.mark.parametrize(
    ("host", "sent"),
    [
        ("api.example", b"\x03\x0bapi.example"), ("10.1.2.3", b"\x01\x0a\x01\x02\x03"),
        ("fd00::1", b"\x04\xfd" + b"\0" * 14 + b"\x01"),
    ],
)  # fmt: skip
async def test_a_socks_proxy_gets_the_name(host: str, sent: bytes) -> None:
    """It looks names up itself; addresses go as addresses; a request then goes as to the API itself."""
    origin = Origin("http", host, 8080)
    network = Played([b"\x05\x00", b"\x05\x00\x00\x01", b"\0\0\0\0\0\0", reply(b"fine")])
    connection = await through(named("socks5://p"), network, origin).connect()
    await connection.start(head(origin, named("socks5://p")), b"")
    assert await connection.receive_all() == b"fine"
    assert bytes(network.streams[0].sent).startswith(
        b"\x05\x01\x00" + b"\x05\x01\x00" + sent + b"\x1f\x90POST /x HTTP/1.1\r\n"
    )


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_tunnel_that_is_cut_at_every_byte(how: str, trusting: ssl.SSLContext) -> None:
    """A cut in any part of the proxy's answer is a ConnectError that names the proxy, and nothing is sent."""
    for url, answer in (("http://p:1", GRANTED), ("socks5://p:1", SOCKS_GRANTED)):
        for end in range(len(answer)):
            pieces: list[bytes | Exception] = [answer[n : n + 1] for n in range(end)]
            pieces.append(b"" if how == "fin" else trio.BrokenResourceError("reset"))
            network = Played(pieces)
            with pytest.raises(ConnectError, match=rf"the proxy {url} (closed|broke) the connection"):
                await through(named(url), network, SECURE, trusting).connect()
            assert network.streams[0].is_closed
            assert KEY.encode() not in network.streams[0].sent


async def test_a_proxys_answer_in_single_bytes() -> None:
    """However it arrives, the tunnel stands, and TLS begins right after it."""
    for url, answer in (("http://p:1", GRANTED), ("socks5://p:1", SOCKS_GRANTED)):
        network = Played([*(answer[n : n + 1] for n in range(len(answer))), b"no TLS"])
        with pytest.raises(ConnectError, match=r"TLS with api\.example failed"):
            await through(named(url), network, SECURE).connect()


# --- real sockets -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def _server_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


def secured(serve, context: ssl.SSLContext):
    async def over_tls(stream: trio.abc.Stream) -> None:
        secure = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        await secure.do_handshake()
        await serve(secure)

    return over_tls


def api(request: Request) -> bytes:
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert not [name for name in request.headers if name.startswith("proxy-")]
    if request.json().get("stream"):
        return stream(delta("one "), delta("two"), delta(finish="stop"), DONE)
    return chat(request.json()["messages"][-1]["content"])


async def serve_api(stream: trio.abc.Stream) -> None:
    await answering(api)(Peer(stream))


@asynccontextmanager
async def world(kind: str, api_scheme: str, authority: trustme.CA, fake: FakeProxy) -> AsyncIterator[tuple[str, str]]:
    """An API and a proxy; yields the base URL and the proxy's URL without credentials."""
    serve = secured(serve_api, _server_side(authority)) if api_scheme == "https" else serve_api
    serve_proxy = secured(fake.serve, _server_side(authority)) if kind == "https" else fake.serve
    async with listening(serve) as api_port, listening(serve_proxy) as proxy_port:
        yield f"{api_scheme}://localhost:{api_port}/v1", f"{kind}://127.0.0.1:{proxy_port}"


@pytest.mark.net
@pytest.mark.parametrize("credentials", [None, "us er:p/a:ss"], ids=["open", "password"])
@pytest.mark.parametrize("api_scheme", ["http", "https"])
@pytest.mark.parametrize("kind", ["http", "https", "socks5"])
async def test_chats_and_streams_through_a_proxy(
    kind: str, api_scheme: str, credentials: str | None, authority: trustme.CA, trusting: ssl.SSLContext, no_leaks
) -> None:
    """Whole and streamed replies, many on one connection, through every kind of proxy to either kind of API."""
    fake = FakeProxy(credentials)
    async with world(kind, api_scheme, authority, fake) as (base_url, proxy), no_leaks():
        user = "" if credentials is None else "us%20er:p%2Fa%3Ass@"
        async with open_quiet_client(
            api_key=KEY, base_url=base_url, proxy=proxy.replace("://", f"://{user}"), tls=trusting
        ) as client:
            for text in ("first", "x" * 300_000, "last"):
                assert (await client.chat(text)).text == text
            async with client.stream("x") as streamed:
                assert (await streamed.collect()).text == "one two"
            assert client.statistics().opened == 1
    first, _, _ = fake.asked[0].partition(" ")
    assert first == {"socks5": "SOCKS"}.get(kind, "POST" if api_scheme == "http" else "CONNECT")


@pytest.mark.net
@pytest.mark.parametrize("kind", ["http", "socks5"])
async def test_a_wrong_password(kind: str, authority: trustme.CA, trusting: ssl.SSLContext, no_leaks) -> None:
    """The proxy's refusal is a ConnectError that shows no password, and nothing has reached the API."""
    fake = FakeProxy("right:one")
    async with (
        world(kind, "https", authority, fake) as (base_url, proxy),
        no_leaks(),
        open_quiet_client(
            api_key=KEY,
            base_url=base_url,
            proxy=Secret(proxy.replace("://", f"://wrong:{PASSWORD}@")),
            tls=trusting,
            retry=gr.RetryPolicy(max_retries=0),
        ) as client,
    ):
        with pytest.raises(ConnectError, match="refused") as refused:
            await client.chat("x")
        assert not refused.value.maybe_billed
        assert PASSWORD not in shown_by(refused.value)
        assert KEY not in shown_by(refused.value)


@pytest.mark.net
async def test_proxies_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, authority: trustme.CA, trusting: ssl.SSLContext
) -> None:
    """HTTPS_PROXY is taken for hosts elsewhere, not for this machine, and not when the settings say direct."""
    for name in ("https_proxy", "all_proxy", "no_proxy", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeProxy()
    async with world("http", "https", authority, fake) as (base_url, proxy):
        port = int(base_url.rpartition(":")[2].removesuffix("/v1"))
        authority_for = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("api.example").configure_cert(authority_for)
        async with listening(secured(serve_api, authority_for)) as other_port:
            fake.dial = partial(_dial_instead, {"api.example": other_port})
            monkeypatch.setenv("HTTPS_PROXY", proxy)
            async with open_quiet_client(api_key=KEY, base_url="https://api.example/v1", tls=trusting) as client:
                assert (await client.chat("far")).text == "far"
            assert fake.asked == ["CONNECT api.example:443"]
            async with open_quiet_client(api_key=KEY, base_url=f"https://localhost:{port}/v1", tls=trusting) as client:
                assert (await client.chat("near")).text == "near"
            assert len(fake.asked) == 1
            never = gr.RetryPolicy(max_retries=0)
            async with open_quiet_client(
                api_key=KEY, base_url="https://api.invalid/v1", proxy="direct", tls=trusting, retry=never
            ) as client:
                with pytest.raises(ConnectError, match=r"cannot connect to api\.invalid"):
                    await client.chat("x")
            assert len(fake.asked) == 1


async def _dial_instead(ports: dict[str, int], host: str, port: int) -> trio.abc.Stream:
    return await trio.open_tcp_stream("127.0.0.1", ports.get(host, port))


@pytest.mark.net
async def test_a_proxy_that_is_not_there(no_leaks) -> None:
    """The error names the proxy and not the API, and is retried as whatever was not sent."""
    async with listening(lambda stream: stream.aclose()) as port:
        pass
    async with no_leaks():
        retry = gr.RetryPolicy(max_retries=1, base_delay_s=0.001)
        async with open_quiet_client(api_key=KEY, proxy=f"http://127.0.0.1:{port}", retry=retry) as client:
            with pytest.raises(ConnectError, match=rf"the proxy http://127\.0\.0\.1:{port}: Connection refused"):
                await client.chat("x")
            assert client.statistics().retries == 1


@pytest.mark.net
async def test_certificates_on_the_way(authority: trustme.CA, trusting: ssl.SSLContext, no_leaks) -> None:
    """A proxy's certificate that does not verify names the proxy; the API's names the API, through the tunnel."""
    fake = FakeProxy(dial=partial(_dial_instead, {}))
    async with world("https", "https", authority, fake) as (base_url, proxy), no_leaks():
        origin = Origin("https", "localhost", int(base_url.rpartition(":")[2].removesuffix("/v1")))
        with pytest.raises(ConnectError, match=rf"TLS with the proxy {re.escape(proxy)} failed: the certificate does"):
            await HttpConnector(origin, network=SocketNetwork(), limits=LIMITS, proxy=named(proxy)).connect()
        wrong = Origin("https", "127.0.0.2", origin.port)
        fake_host = HttpConnector(wrong, network=SocketNetwork(), tls=trusting, limits=LIMITS, proxy=named(proxy))
        with pytest.raises(ConnectError, match=r"TLS with 127\.0\.0\.2:\d+ failed: the certificate does not verify"):
            await fake_host.connect()


@pytest.mark.net
@pytest.mark.parametrize("kind", ["http", "https", "socks5"])
async def test_cancelled_at_any_step(kind: str, authority: trustme.CA, trusting: ssl.SSLContext, no_leaks) -> None:
    """Cancelled during connect, CONNECT, either TLS or the reply: no socket and no task is left."""

    async def use(origin: Origin, proxy: Proxy) -> None:
        connection = await through(proxy, SocketNetwork(), origin, trusting).connect()
        try:
            await connection.start(head(origin, proxy), b'{"messages": [{"content": "x"}]}')
            await connection.receive_all()
        finally:
            await connection.aclose()

    async with world(kind, "https", authority, FakeProxy()) as (base_url, url):
        origin = Origin("https", "localhost", int(base_url.rpartition(":")[2].removesuffix("/v1")))
        proxy = named(url)
        async with no_leaks():
            for steps in range(0, 60, 3):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(use, origin, proxy)
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    nursery.cancel_scope.cancel()


@pytest.mark.net
@pytest.mark.parametrize("kind", ["http", "https", "socks5"])
async def test_cuts_between_client_and_proxy(
    kind: str, authority: trustme.CA, trusting: ssl.SSLContext, rng: random.Random, no_leaks
) -> None:
    """A chat whose first connection is cut in CONNECT, a handshake or the reply is answered on its second."""
    retry = gr.RetryPolicy(max_retries=1, base_delay_s=0.0)
    async with world(kind, "https", authority, FakeProxy()) as (base_url, proxy), no_leaks():
        port = int(proxy.rpartition(":")[2])
        async with open_fault_proxy("127.0.0.1", port, rng=rng) as between:
            url = f"{kind}://127.0.0.1:{between.port}"

            async def ask() -> int:
                async with open_quiet_client(
                    api_key=KEY, base_url=base_url, proxy=url, tls=trusting, retry=retry
                ) as client:
                    assert (await client.chat("x")).text == "x"
                    return client.statistics().retries

            assert await ask() == 0
            whole = between.statistics().bytes_down
            # Signatures differ in length from one handshake to the next, by a few bytes.
            cuts = [*range(0, whole - 12, max(1, whole // 24)), whole - 12]
            for number, after in enumerate(cuts):
                how: Ending = "rst" if number % 2 else "fin"
                between.set_plan([[Cut(direction="down", after=after, how=how)]])
                with trio.fail_after(5):
                    assert await ask() == 1, f"cut after {after} of {whole}"


async def test_a_proxy_that_never_answers(autojump_clock: trio.testing.MockClock) -> None:
    """The connect deadline covers the proxy's part, and nothing has been sent."""
    network = Played([])
    deadlines = gr.Deadlines(connect_s=5)
    async with open_quiet_client(
        api_key=KEY,
        base_url="https://api.example/v1",
        transport=network,
        proxy="http://p:1",
        deadlines=deadlines,
        retry=gr.RetryPolicy(max_retries=0),
    ) as client:
        started = trio.current_time()
        with pytest.raises(gr.DeadlineExceededError) as late:
            await client.chat("x")
        assert trio.current_time() - started == pytest.approx(5)
        assert (late.value.phase, late.value.maybe_billed) == ("connect", False)
    assert network.streams[0].is_closed


@pytest.mark.net
async def test_httpx_over_our_transport_through_a_proxy(
    authority: trustme.CA, trusting: ssl.SSLContext, no_leaks
) -> None:
    """The transport under httpx takes a proxy as well, and its refusal is httpx's ProxyError."""

    async def serve(stream: trio.abc.Stream) -> None:
        await answering(lambda request: reply(request.target.encode()))(Peer(stream))

    fake = FakeProxy("u:p")
    async with (
        listening(secured(serve, _server_side(authority))) as secure,
        listening(serve) as plain,
        listening(fake.serve) as port,
        no_leaks(),
    ):
        transport = HttpTransport(tls=trusting, proxy=f"http://u:p@127.0.0.1:{port}")
        async with httpx.AsyncClient(transport=transport) as client:
            assert (await client.get(f"https://localhost:{secure}/a?b")).text == "/a?b"
            assert (await client.get(f"http://localhost:{plain}/c")).text == "/c"
        transport = HttpTransport(tls=trusting, proxy=Secret(f"http://u:{PASSWORD}@127.0.0.1:{port}"))
        async with httpx.AsyncClient(transport=transport) as client:
            for url in (f"https://localhost:{secure}/", f"http://localhost:{plain}/"):
                with pytest.raises(httpx.ProxyError, match="407") as refused:
                    await client.get(url)
                assert PASSWORD not in shown_by(refused.value)


# --- unix sockets -----------------------------------------------------------------------------------------------------


@pytest.mark.net
async def test_a_unix_socket(tmp_path, no_leaks) -> None:
    """Requests go to the socket, with the base URL's host in their head; one that is not there is a ConnectError."""
    path = tmp_path / "api.sock"
    seen: list[str] = []

    def answer(request: Request) -> bytes:
        seen.append(request.headers["host"])
        return api(request)

    async def serve(listener: trio.SocketListener) -> None:
        async def handle(stream: trio.abc.Stream) -> None:
            await answering(answer)(Peer(stream))
            await stream.aclose()

        await trio.serve_listeners(handle, [listener])

    listening_socket = trio.socket.socket(trio.socket.AF_UNIX)
    await listening_socket.bind(str(path))
    listening_socket.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, trio.SocketListener(listening_socket))
        async with (
            no_leaks(),
            open_quiet_client(api_key=KEY, base_url="http://api.internal/v1", unix_socket=path) as client,
        ):
            assert (await client.chat("near")).text == "near"
            async with client.stream("x") as streamed:
                assert (await streamed.collect()).text == "one two"
            assert client.statistics().opened == 1
        nursery.cancel_scope.cancel()
    assert set(seen) == {"api.internal"}
    never = gr.RetryPolicy(max_retries=0)
    gone = str(tmp_path / "gone")
    async with open_quiet_client(api_key=KEY, base_url="http://x/v1", unix_socket=gone, retry=never) as client:
        with pytest.raises(ConnectError, match="No such file"):
            await client.chat("x")


# --- what goes with what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"proxy": "http://p:1"}, {"tls": gr.TlsConfig()}, {"tls": ssl.create_default_context()}]
)
async def test_a_users_httpx_has_settings_of_its_own(settings: dict[str, object]) -> None:
    """Proxies and certificates beside a transport of httpx would be passed over in silence: refused by name."""
    for transport in (httpx.MockTransport(lambda _: httpx.Response(200)), httpx.AsyncHTTPTransport):
        with pytest.raises(gr.ConfigError, match=rf"^{next(iter(settings))}: set it at the httpx transport"):
            async with open_quiet_client(api_key=KEY, transport=transport, **settings):
                pass


def test_errors_of_proxies_pickle() -> None:
    """A ConnectError keeps its status in a pickle."""
    error = pickle.loads(pickle.dumps(ConnectError("no", proxy_status=407)))
    assert (error.message, error.proxy_status) == ("no", 407)
