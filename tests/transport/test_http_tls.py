"""TLS: the right host and authority or no connection, no leaks, and no reply that nobody asked for."""

from __future__ import annotations

import ssl
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trustme
from scripted import Peer, reply

from gorouter_trio.errors import ConnectError, StreamBrokenError
from gorouter_trio.transport.connection import HttpConnection
from gorouter_trio.transport.connector import HttpConnector
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.transport.streams import SocketNetwork

KEY = "sk-or-v1-c4n4ry0f7h3tl5"
LONG = b"x" * 2_000_000
Serve = Callable[[Peer], Awaitable[None]]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture
def client_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@asynccontextmanager
async def listening(serve: Serve, tls: ssl.SSLContext | None) -> AsyncIterator[int]:
    async def handle(stream: trio.SocketStream) -> None:
        secure = stream if tls is None else trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            await serve(Peer(secure))
        await trio.aclose_forcefully(secure)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()
    for listener in listeners:
        await listener.aclose()


def connector(port: int, tls: ssl.SSLContext | None, host: str = "127.0.0.1") -> HttpConnector:
    return HttpConnector(Origin("https", host, port), network=SocketNetwork(), tls=tls, limits=ConnectionLimits())


def head(port: int) -> RequestHead:
    return RequestHead(
        Origin("https", "127.0.0.1", port), method="POST", target="/x", headers=[("Authorization", f"Bearer {KEY}")]
    )


async def echo(peer: Peer) -> None:
    while (request := await peer.request()) is not None:
        await peer.send(reply(request.body))


async def test_requests_over_tls(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """Small and large bodies both ways, one after another on one connection."""
    async with listening(echo, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        for body in (b"1", LONG, b"", b"2"):
            await connection.start(head(port), body)
            assert await connection.receive_all() == body
            assert connection.is_reusable
        await connection.aclose()


async def test_an_authority_that_is_not_trusted(server_side: ssl.SSLContext, no_leaks) -> None:
    """A certificate of somebody else's authority is a ConnectError that names host and reason."""
    async with listening(echo, server_side) as port, no_leaks():
        with pytest.raises(
            ConnectError, match=rf"TLS with 127\.0\.0\.1:{port} failed: the certificate does not verify"
        ):
            await connector(port, None).connect()


async def test_a_certificate_for_another_host(authority: trustme.CA, client_side: ssl.SSLContext, no_leaks) -> None:
    """A certificate of the right authority for another host is a ConnectError that names both."""
    other = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("other.example").configure_cert(other)
    async with listening(echo, other) as port, no_leaks():
        with pytest.raises(ConnectError, match=r"TLS with 127\.0\.0\.1:\d+ failed: .*127\.0\.0\.1"):
            await connector(port, client_side).connect()
        with pytest.raises(ConnectError, match=r"TLS with localhost:\d+ failed: .*localhost"):
            await connector(port, client_side, "localhost").connect()


@pytest.mark.parametrize(
    "say", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x16\x03\x01"], ids=["nothing", "http", "half"]
)
async def test_a_peer_that_speaks_no_tls(say: bytes, client_side: ssl.SSLContext, no_leaks) -> None:
    """Whatever a plain peer says to the hello, or closing on it, is a ConnectError: nothing was sent."""

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(10)
        await peer.send(say)

    async with listening(serve, None) as port, no_leaks():
        with pytest.raises(ConnectError, match="TLS with"):
            await connector(port, client_side).connect()


async def test_a_host_name_that_tls_cannot_ask_for(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks
) -> None:
    """A name that the TLS library refuses is a ConnectError as well."""

    class AnyHost:
        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            return await trio.open_tcp_stream("127.0.0.1", port)

    async with listening(echo, server_side) as port, no_leaks():
        origin = Origin("https", ".example", port)
        with pytest.raises(ConnectError, match="TLS with"):
            await HttpConnector(origin, network=AnyHost(), tls=client_side, limits=ConnectionLimits()).connect()


async def test_cancelled_during_the_handshake(client_side: ssl.SSLContext, no_leaks) -> None:
    """A peer that never answers the hello leaves no socket behind when the caller gives up."""

    async def serve(peer: Peer) -> None:
        await peer.wait_gone()

    async with listening(serve, None) as port, no_leaks():
        with trio.move_on_after(0.05) as scope:
            await connector(port, client_side).connect()
        assert scope.cancelled_caught


async def test_cancelled_at_any_step(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """Cancelled anywhere between connecting and the end of a reply, and closed: no socket, no task."""

    async def use(port: int) -> None:
        connection = await connector(port, client_side).connect()
        try:
            await connection.start(head(port), b"x" * 100_000)
            await connection.receive_all()
        finally:
            await connection.aclose()

    async with listening(echo, server_side) as port, no_leaks():
        for steps in range(0, 40, 3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(use, port)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()


async def test_a_cut_reply(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """A peer that closes without a goodbye in the middle of a reply is StreamBrokenError."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply(b"x" * 100)[:-10])

    async with listening(serve, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        await connection.start(head(port), b"")
        with pytest.raises(StreamBrokenError):
            await connection.receive_all()
        connection.close()


async def test_close_wakes_whoever_waits(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """`close` does not wait for the TLS goodbye, and ends a wait below TLS."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.wait_gone()

    async def expect_broken(connection: HttpConnection, port: int) -> None:
        with pytest.raises(StreamBrokenError):
            await connection.start(head(port), b"")

    async with listening(serve, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        assert isinstance(connection, HttpConnection)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_broken, connection, port)
            await trio.testing.wait_all_tasks_blocked()
            connection.close()
        assert connection.is_closed


async def test_an_early_refusal(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """A refusal that comes while a long request is still going out is heard through TLS as well."""
    done = trio.Event()

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1000)
        await peer.send(reply(b"too large", status=413))
        await done.wait()

    async with listening(serve, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        with trio.fail_after(5):
            await connection.start(head(port), LONG * 4)
            assert (connection.status, await connection.receive_all()) == (413, b"too large")
        assert not connection.is_reusable
        connection.close()
        done.set()


async def test_an_early_refusal_in_two_records(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks
) -> None:
    """What a refusal says is heard as well when it comes by itself, and it costs one upload."""
    done, head_read = trio.Event(), trio.Event()
    refusal = reply({"error": {"message": "Payload too large", "code": 413}}, status=413)
    cut = refusal.index(b"\r\n\r\n") + 4
    served: list[Peer] = []

    async def serve(peer: Peer) -> None:
        served.append(peer)
        await peer.stream.receive_some(1000)
        await peer.send(refusal[:cut])
        await head_read.wait()
        await peer.send(refusal[cut:])
        await done.wait()

    class Told(HttpConnection):
        """Tells when the head has been read."""

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            head_read.set()

    async with listening(serve, server_side) as port, no_leaks():
        made = await connector(port, client_side).connect()
        assert isinstance(made, HttpConnection)
        connection = Told(made._stream, ConnectionLimits())
        with trio.fail_after(5):
            await connection.start(head(port), LONG * 4)
            assert connection.status == 413
            assert b"Payload too large" in await connection.receive_all()
        assert not connection.is_sent
        connection.close()
        done.set()


async def test_an_idle_connection_that_is_no_longer_good(
    server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks
) -> None:
    """A peer that closes while nothing is asked is noticed before the next request."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(reply(b"1"))

    async with listening(serve, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        await connection.start(head(port), b"")
        assert await connection.receive_all() == b"1"
        with trio.fail_after(5):
            while connection.is_reusable:
                await trio.sleep(0.001)
        connection.close()


async def test_a_record_after_the_reply(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """A second reply in a record of its own, which waits undecrypted below, is never taken for the next one."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        secure = peer.stream
        assert isinstance(secure, trio.SSLStream)
        # Two records in one write: what send_all writes is held back and sent together.
        wire = secure.transport_stream
        held = bytearray()

        class Holding(trio.abc.SendStream):
            async def send_all(self, data: bytes | bytearray | memoryview) -> None:
                held.extend(data)

            async def wait_send_all_might_not_block(self) -> None:
                pass

            async def aclose(self) -> None:
                pass

        secure.transport_stream = trio.StapledStream(Holding(), wire)
        await secure.send_all(reply(b"mine"))
        await secure.send_all(reply(b"POISON"))
        secure.transport_stream = wire
        await wire.send_all(held)
        await peer.wait_gone()

    async with listening(serve, server_side) as port, no_leaks():
        connection = await connector(port, client_side).connect()
        await connection.start(head(port), b"")
        assert await connection.receive_all() == b"mine"
        assert not connection.is_reusable
        connection.close()


async def test_the_key_is_in_no_traceback(server_side: ssl.SSLContext, client_side: ssl.SSLContext, no_leaks) -> None:
    """Errors while a request goes out through TLS show no key, with the locals of every frame."""
    errors: list[StreamBrokenError] = []

    async def serve(peer: Peer) -> None:
        await peer.stream.receive_some(1)

    async with listening(serve, server_side) as port, no_leaks():
        for body in (b"", LONG):
            connection = await connector(port, client_side).connect()
            with pytest.raises(StreamBrokenError) as broken:
                await connection.start(head(port), body)
            errors.append(broken.value)
            connection.close()
    for error in errors:
        assert KEY not in "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
