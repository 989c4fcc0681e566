"""The gateway over TLS: who trusts the authority gets in, and who does not is told so at once."""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import cast

import pytest
import trio
import trustme
from gateways import ADA_KEY, limits, open_gateway, secured
from worlds import there

from gorouter_trio.errors import ConfigError, ConnectError, InvalidTokenError
from gorouter_trio.events import TextDelta
from gorouter_trio.gateway import GatewayConfig
from gorouter_trio.network import TlsConfig
from gorouter_trio.remote import open_remote
from gorouter_trio.security import SecurityManager

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def server_side(authority, name="127.0.0.1"):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture
def ca_file(authority, tmp_path):
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


def trusting(authority, how, ca_file):
    """What a user gives: a context of its own, or the file of the authority."""
    if how == "file":
        return TlsConfig(ca_file=ca_file)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("how", ["context", "file"])
async def test_turns(authority, ca_file, how):
    """Turns, streams and the end of a token come over wss as they do over ws."""
    tls = trusting(authority, how, ca_file)
    async with open_gateway(GatewayConfig(), security=secured(), serve={"tls": server_side(authority)}) as behind:
        assert behind.url.startswith("wss://")
        assert behind.gateway.http_url.startswith("https://")
        async with open_remote(behind.url, token=ADA_KEY, tls=tls) as client:
            session = client.session("s")
            assert (await session.ask("[[say well]]")).text == "well"
            async with session.stream("[[tokens 40]]") as stream:
                pieces = [event.text async for event in stream if isinstance(event, TextDelta)]
            assert "".join(pieces) == stream.result.text
            assert len(await session.history()) == 4
            cast("SecurityManager", behind.client.security).revoke_token(ADA_KEY)
            with trio.fail_after(5):
                while not behind.gateway.statistics().closed:
                    await trio.sleep(0.01)  # until it is noticed
            with pytest.raises(InvalidTokenError):
                await session.history()
        assert behind.errors == []
        assert behind.gateway.statistics().closed["4401"]


async def test_plain_http(authority, ca_file):
    """Health is told over https, on the same port."""
    async with open_gateway(serve={"tls": server_side(authority)}) as behind:
        host, _, port = behind.url.removeprefix("wss://").rpartition(":")
        tcp = await trio.open_tcp_stream(host, int(port))
        context = trusting(authority, "context", ca_file)
        async with trio.SSLStream(tcp, context, server_hostname=host, https_compatible=True) as stream:
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            reply = b""
            while received := await stream.receive_some():
                reply += received
        assert reply.startswith(b"HTTP/1.1 200 ")
        assert behind.errors == []


@pytest.mark.parametrize("wrong", ["authority", "name", "no TLS"])
async def test_a_wrong_certificate(authority, ca_file, wrong):
    """One error that says why, at once: nothing is said to whoever is there, and nothing is tried again."""
    tls = server_side(authority, "gateway.example" if wrong == "name" else "127.0.0.1")
    async with open_gateway(serve={} if wrong == "no TLS" else {"tls": tls}) as behind:
        trusted = None if wrong == "authority" else trusting(authority, "file", ca_file)
        url = behind.url.replace("ws://", "wss://")
        with trio.fail_after(5), pytest.raises(ConnectError) as caught:
            async with open_remote(url, token=ADA_KEY, tls=trusted):
                pass
        reason = "wrong version number" if wrong == "no TLS" else "the certificate does not verify"
        assert reason in caught.value.message
        assert behind.url.partition("//")[2] in caught.value.message
        assert ADA_KEY not in repr(caught.value)
        assert behind.gateway.statistics().accepted == 0
        assert behind.errors == []


async def test_a_certificate_that_ends_later(authority, ca_file):
    """A gateway that has worked may get a certificate again: requests say what is wrong, and go on when it is not."""
    tls = server_side(authority)
    async with open_gateway(serve={"tls": tls}) as behind:  # noqa: SIM117 - one line each
        async with open_remote(behind.url, tls=TlsConfig(ca_file=ca_file), patience_s=2.0) as client:
            session = client.session("s")
            await session.ask("[[say well]]")
            trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
            await trio.aclose_forcefully(there(client._wire._link)._websocket._stream)
            with pytest.raises(ConnectError, match="the certificate does not verify"):
                await session.history()
            authority.issue_cert("127.0.0.1").configure_cert(tls)
            client._wire._patience_s = 10.0
            assert len(await session.history()) == 2


async def test_who_says_nothing_in_the_handshake(authority):
    """A connection without a handshake is closed in time, and holds no place."""
    quick = GatewayConfig(anonymous=True, limits=limits(authenticate_s=0.2))
    async with open_gateway(quick, serve={"tls": server_side(authority)}) as behind:
        host, _, port = behind.url.removeprefix("wss://").rpartition(":")
        for said in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"):
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(said)
                # What it has not read makes it a reset.
                with trio.fail_after(5), suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass
        assert behind.gateway.statistics().unauthenticated == 0
        assert behind.errors == []


@pytest.mark.parametrize(
    "url", ["http://x", "ws://", "ws://:80", "ws://x:99999", "wss://x:y", "ws://x:0", "ws://a:b@x"]
)
async def test_urls(url):
    """What is no place to connect to is refused before anything is tried."""
    with pytest.raises(ConfigError, match="url"):
        async with open_remote(url):
            pass


async def test_files_that_are_none(tmp_path):
    """Likewise settings whose files cannot be used."""
    with pytest.raises(ConfigError, match=r"tls\.ca_file"):
        async with open_remote("wss://127.0.0.1:9", tls=TlsConfig(ca_file=tmp_path / "none.pem")):
            pass
