"""Compressed replies: every coding at every cut, pieces as they are flushed, broken data, and bombs."""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import json
import random
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

import httpx
import pytest
import trio
import trio.testing
from scripted import DONE, STREAM_HEAD, Network, Peer, PlayedStream, answering, chat, chunks, delta, reply
from worlds import open_quiet_client

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError, DecodeError, ProviderError
from gorouter_trio.transport.compression import BodyDecoder, accept_encoding, make_decoder
from gorouter_trio.transport.connection import HttpConnection
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead

brotli = pytest.importorskip("brotli")
zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

HEAD = RequestHead(Origin("http", "h.example", 80), method="POST", target="/x", headers=[])
LIMITS = ConnectionLimits()
BODY = b"".join(b'{"n": %d, "text": "the tide turns"}\n' % n for n in range(40)) + bytes(range(256))
_TESTS = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024


def _raw_deflate(data: bytes) -> bytes:
    made = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return made.compress(data) + made.flush()


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip, members": ("GZIP", lambda data: gzip.compress(data[:100]) + gzip.compress(b"") + gzip.compress(data[100:])),
    "x-gzip": ("x-gzip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "deflate, bare": ("deflate", _raw_deflate),
    "br": ("br", lambda data: brotli.compress(data, quality=5)),
    "zstd": ("zstd", zstd.compress),
    "zstd, frames": ("identity, zstd", lambda data: zstd.compress(data[:100]) + zstd.compress(data[100:])),
}
CODINGS = ("gzip", "deflate", "br", "zstd")


def encoded(name: str, data: bytes) -> tuple[str, bytes]:
    coding, encode = ENCODERS[name]
    return coding, encode(data)


def framed(data: bytes, coding: str, how: str = "length") -> bytes:
    header = f"Content-Encoding: {coding}"
    if how == "length":
        return reply(data, headers=[header])
    head = f"HTTP/1.1 200 OK\r\n{header}\r\n"
    if how == "end":
        return f"{head}\r\n".encode() + data
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks([data[:7], data[7:]])


async def fetched(pieces: Iterable[bytes | Exception], *, somewhat: bool, limits: ConnectionLimits = LIMITS) -> bytes:
    """The body of a reply that arrives in these pieces, taken whole or piece by piece."""
    connection = HttpConnection(PlayedStream([*pieces]), limits)
    await connection.start(HEAD, b"{}")
    if not somewhat:
        return await connection.receive_all()
    taken = bytearray()
    while piece := await connection.receive_some():
        taken += piece
    assert connection.is_complete
    return bytes(taken)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("how", ["length", "chunked", "end"])
async def test_every_coding_however_it_arrives(name: str, how: str) -> None:
    """The body is the same for every framing and every size of pieces, taken whole or piece by piece."""
    coding, data = encoded(name, BODY)
    raw = framed(data, coding, how)
    last: list[bytes | Exception] = [b""] if how == "end" else []
    for size in (1, 2, 13, 100_000):
        for somewhat in (False, True):
            assert await fetched([*cut(raw, size), *last], somewhat=somewhat) == BODY


@pytest.mark.parametrize("name", ENCODERS)
def test_a_large_body_comes_in_pieces(name: str, rng: random.Random) -> None:
    """What unpacks to megabytes comes out a piece at a time, none larger than is needed."""
    body = b"".join(b"%09d" % rng.randrange(10**9) for _ in range(400_000))
    coding, data = encoded(name, body)
    decoder = make_decoder(coding, LIMITS)
    assert decoder is not None
    taken = list(_pieces(decoder, cut(data, 65_536)))
    decoder.finish()
    assert b"".join(taken) == body
    assert max(map(len, taken)) <= MIB


def _pieces(decoder: BodyDecoder, received: Iterable[bytes]) -> Iterator[bytes]:
    for data in received:
        yield decoder.decode(data)
        while not decoder.needs_input:
            yield decoder.decode()


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("body", [b"", b"x"])
async def test_small_bodies(name: str, body: bytes) -> None:
    """Nothing, and one byte; a reply without a body at all need not be in the coding that it names."""
    coding, data = encoded(name, body)
    assert await fetched([framed(data, coding)], somewhat=False) == body
    assert await fetched([framed(b"", coding)], somewhat=False) == b""


class _Flushing:
    """A compressor that makes what it was given complete."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        if coding == "br":
            self._made = brotli.Compressor(quality=4)
        elif coding == "zstd":
            self._made = zstd.ZstdCompressor()
        else:
            self._made = zlib.compressobj(wbits=31 if coding == "gzip" else 15)

    def flush(self, data: bytes) -> bytes:
        if self._coding == "br":
            return bytes(self._made.process(data) + self._made.flush())
        if self._coding == "zstd":
            return bytes(self._made.compress(data, self._made.FLUSH_BLOCK))
        return bytes(self._made.compress(data) + self._made.flush(zlib.Z_SYNC_FLUSH))

    def finish(self) -> bytes:
        return bytes(self._made.finish() if self._coding == "br" else self._made.flush())


@pytest.mark.parametrize("coding", CODINGS)
async def test_what_was_flushed_comes_out_at_once(coding: str) -> None:
    """Each event of a stream is whole in the hands of the reader before the next one has been sent."""
    flushing = _Flushing(coding)
    stream = PlayedStream(
        [f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()]
    )
    connection = HttpConnection(stream, LIMITS)
    await connection.start(HEAD, b"{}")
    for number in range(50):
        event = delta(f"piece {number} ")
        stream.pieces.append(chunks([flushing.flush(event)], end=b""))
        with trio.fail_after(1):
            assert await connection.receive_some() == event
    stream.pieces.append(chunks([flushing.finish()]))
    assert await connection.receive_some() == b""
    assert connection.is_reusable


@pytest.mark.parametrize("coding", CODINGS)
async def test_chats_and_streams(coding: str, no_leaks) -> None:
    """Through the whole client: asked for by name, decoded, on one connection; a stream may be left early."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            assert request.headers["accept-encoding"] == coding
            if not request.json().get("stream"):
                body = chat(request.json()["messages"][-1]["content"]).partition(b"\r\n\r\n")[2]
                await peer.send(framed(ENCODERS[coding][1](body), coding, "chunked"))
                continue
            flushing = _Flushing(coding)
            await peer.send(STREAM_HEAD.replace(b"\r\n\r\n", f"\r\nContent-Encoding: {coding}\r\n\r\n".encode()))
            for event in (delta("one "), delta("two"), delta(finish="stop")):
                await peer.send(chunks([flushing.flush(event)], end=b""))
                await trio.lowlevel.checkpoint()
            await peer.send(chunks([flushing.flush(DONE), flushing.finish()]))

    async with no_leaks(), trio.open_nursery() as nursery:
        network = Network(nursery, serve)
        async with open_quiet_client(
            api_key="k", base_url="http://localhost/v1", transport=network, compression=(coding,)
        ) as client:
            for text in ("first", "x" * 300_000, "last"):
                assert (await client.chat(text)).text == text
            async with client.stream("x") as streamed:
                assert (await streamed.collect()).text == "one two"
            await trio.testing.wait_all_tasks_blocked()
            assert (await client.chat("after")).text == "after"
            assert client.statistics().opened == 1
            async with client.stream("x") as streamed:
                await anext(streamed.text)
            assert (await client.chat("still")).text == "still"
        nursery.cancel_scope.cancel()


# --- broken data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
async def test_data_that_are_cut_at_every_byte(name: str) -> None:
    """A body whose framing is whole and whose data are not is a DecodeError, wherever it was cut."""
    coding, data = encoded(name, BODY[:300])
    whole_without_the_rest = {len(gzip.compress(BODY[:100]))} if name == "gzip, members" else set()
    if name == "gzip, members":
        whole_without_the_rest.add(len(gzip.compress(BODY[:100]) + gzip.compress(b"")))
    if name == "zstd, frames":
        whole_without_the_rest.add(len(zstd.compress(BODY[:100])))
    for end in set(range(1, len(data))) - whole_without_the_rest:
        with pytest.raises(DecodeError, match="ends in the middle of its"):
            await fetched([framed(data[:end], coding)], somewhat=bool(end % 2))


@pytest.mark.parametrize("name", ENCODERS)
async def test_data_that_are_changed_at_every_byte(name: str, rng: random.Random) -> None:
    """A changed byte is a DecodeError or, where the coding has no checksum, another body; nothing else is raised."""
    coding, data = encoded(name, BODY[:300])
    outcomes = {"refused": 0, "unnoticed": 0}
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << rng.randrange(8)
        try:
            await fetched([framed(bytes(changed), coding)], somewhat=False)
            outcomes["unnoticed"] += 1
        except DecodeError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0


@pytest.mark.parametrize("name", ENCODERS)
async def test_bytes_after_the_end(name: str) -> None:
    """What follows the data inside the body belongs to nothing: a DecodeError."""
    coding, data = encoded(name, BODY)
    with pytest.raises(DecodeError, match="the reply's body"):
        await fetched([framed(data + b"POISON", coding)], somewhat=False)


@pytest.mark.parametrize("coding", ["lzma", "gzip, br", "gzip, gzip", "b r", "\u00fc"])
async def test_codings_that_are_none(coding: str) -> None:
    """An unknown coding, and one upon another, is a DecodeError that names it; an error reply is an error still."""
    with pytest.raises(DecodeError, match="is encoded as"):
        await fetched([framed(b"xx", coding.encode().decode("latin-1"))], somewhat=False)
    async with trio.open_nursery() as nursery:
        refused = reply(b"\x00\xff", status=503, headers=[f"Content-Encoding: {coding.encode().decode('latin-1')}"])
        network = Network(nursery, answering(lambda request: refused))
        never = gr.RetryPolicy(max_retries=0)
        async with open_quiet_client(
            api_key="k", base_url="http://localhost", transport=network, retry=never
        ) as client:
            with pytest.raises(ProviderError) as error:
                await client.chat("x")
            assert error.value.status == 503
        nursery.cancel_scope.cancel()


async def test_a_coding_that_was_not_asked_for() -> None:
    """By default replies are asked for as they are; one that comes compressed all the same is decoded."""
    seen: list[str] = []

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            seen.append(request.headers["accept-encoding"])
            await peer.send(framed(gzip.compress(chat("fine").partition(b"\r\n\r\n")[2]), "gzip"))

    async with trio.open_nursery() as nursery:
        network = Network(nursery, serve)
        async with open_quiet_client(api_key="k", base_url="http://localhost", transport=network) as client:
            assert (await client.chat("x")).text == "fine"
        nursery.cancel_scope.cancel()
    assert seen == ["identity"]


async def test_an_error_reply_that_is_compressed() -> None:
    """The API's words come out of it."""
    body = json.dumps({"error": {"message": "too much", "code": 400}}).encode()
    refused = reply(gzip.compress(body), status=400, headers=["Content-Encoding: gzip"])
    async with trio.open_nursery() as nursery:
        network = Network(nursery, answering(lambda request: refused))
        async with open_quiet_client(api_key="k", base_url="http://localhost", transport=network) as client:
            with pytest.raises(gr.BadRequestError, match="too much"):
                await client.chat("x")
        nursery.cancel_scope.cancel()


# --- what is asked for ------------------------------------------------------------------------------------------------


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, everything that can be decoded here, or what was named, in that order."""
    assert accept_encoding(False) == accept_encoding(()) == accept_encoding([]) == "identity"
    assert accept_encoding(True) == "zstd, br, gzip, deflate"
    assert accept_encoding(["gzip", "zstd"]) == "gzip, zstd"
    with pytest.raises(ConfigError, match=r"^compression: 'lzma' is none of zstd, br, gzip, deflate"):
        accept_encoding(["lzma"])
    with pytest.raises(ConfigError, match=r"^compression: \['gzip'\] is none of"):
        accept_encoding([["gzip"]])  # type: ignore[list-item]  # what a caller without a type checker may give
    with pytest.raises(ConfigError, match=r"^compression: 5 is none of"):
        accept_encoding([5])  # type: ignore[list-item]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert accept_encoding(True) == "gzip, deflate"
    with pytest.raises(ConfigError, match=r"^compression: br needs the extra: pip install gorouter-trio\["):
        accept_encoding(["br"])
    monkeypatch.setattr(importlib, "import_module", _not_installed)
    with pytest.raises(DecodeError, match=r"encoded as zstd: needs gorouter-trio\[compression\]"):
        make_decoder("zstd", LIMITS)


def _not_installed(name: str) -> None:
    raise ModuleNotFoundError(name)


async def test_a_client_that_cannot_decode_what_it_would_ask_for() -> None:
    """It is refused before anything opens."""
    with pytest.raises(ConfigError, match="compression"):
        async with open_quiet_client(api_key="k", compression=["lzma"]):
            raise AssertionError("opened")


# --- bombs ------------------------------------------------------------------------------------------------------------


def bomb(coding: str, mib: int) -> Iterator[bytes]:
    """What unpacks to so many MiB of zeros, as long as nobody looks at its checksum."""
    flushing = _Flushing(coding)
    zeros = bytes(MIB)
    start = flushing.flush(zeros)
    yield start
    if coding in {"gzip", "deflate"}:
        flushing = _Flushing(coding)
        flushing.flush(b"")
        block = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        one = block.compress(zeros) + block.flush(zlib.Z_FULL_FLUSH)
        yield from (one for _ in range(mib - 1))
    else:
        yield from (flushing.flush(zeros) for _ in range(mib - 1))


@pytest.mark.parametrize("coding", CODINGS)
async def test_what_unpacks_too_far_is_refused(coding: str) -> None:
    """More than the ratio, beyond 8 MiB, ends the reply; less than that passes whatever its ratio is."""
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces = [head, *(chunks([piece], end=b"") for piece in bomb(coding, 32))]
    with pytest.raises(DecodeError, match="unpacks to more than 100 times its size"):
        await fetched(pieces, somewhat=False)
    small = ENCODERS[coding][1](bytes(7 * MIB))
    assert len(small) * 100 < 7 * MIB
    assert await fetched([framed(small, coding)], somewhat=False) == bytes(7 * MIB)
    lenient = ConnectionLimits(max_compression_ratio=10**6)
    large = ENCODERS[coding][1](bytes(9 * MIB))
    assert await fetched([framed(large, coding)], somewhat=True, limits=lenient) == bytes(9 * MIB)
    short = ConnectionLimits(max_compression_ratio=10**6, max_body_bytes=2 * MIB)
    with pytest.raises(DecodeError, match=f"over {2 * MIB} bytes"):
        await fetched([framed(large, coding)], somewhat=True, limits=short)


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_long_stream_that_was_compressed_in_one_go(coding: str, rng: random.Random) -> None:
    """Thousands of events that differ in a word unpack to over 100 times their size, and are no bomb."""
    events = b"".join(delta(f"{rng.getrandbits(12):08x}") for _ in range(12_000))
    assert len(events) > MIB
    data = ENCODERS[coding][1](events)
    assert await fetched([framed(data, coding)], somewhat=True) == events


async def test_a_window_that_no_reply_needs() -> None:
    """zstd data that ask for a window of 128 MiB are refused before there is one."""
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    made = zstd.ZstdCompressor(options=options)
    data = made.compress(BODY) + made.flush()
    with pytest.raises(DecodeError, match="not zstd"):
        await fetched([framed(data, "zstd")], somewhat=False)


BOMBED = """
import pathlib, sys, trio
sys.path[:0] = {paths!r}
import gorouter_trio as gr
from scripted import Network, Peer, chunks
from transport.test_compression import bomb

async def serve(peer):
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\\r\\nContent-Encoding: {coding}\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
    for piece in bomb({coding!r}, 1024):
        await peer.send(chunks([piece], end=b""))

async def main():
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    quiet = gr.PricePolicy(on_start=False)
    status = lambda name: int(pathlib.Path("/proc/self/status").read_text().partition(name)[2].split()[0])
    async with trio.open_nursery() as nursery:
        network = Network(nursery, serve)
        async with gr.open_client(api_key="k", base_url="http://localhost", transport=network, prices=quiet) as client:
            before = status("VmRSS:")
            try:
                await client.chat("x")
            except gr.DecodeError as error:
                print(status("VmHWM:") - before, error)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_of_a_gib_fills_no_memory(coding: str, record_property: Callable[[str, object], None]) -> None:
    """A reply that would unpack to 1 GiB is refused with the process grown by less than 32 MiB."""
    paths = [path for path in sys.path if path.endswith("support")] + [str(_TESTS)]
    code = BOMBED.format(coding=coding, paths=paths)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    grown_kib, _, words = done.stdout.partition(" ")
    assert "unpacks to more than 100 times" in words
    record_property("figure", f"{coding} bomb of 1 GiB: {int(grown_kib) / 1024:.1f} MiB more at the peak (at most 32)")
    assert int(grown_kib) < 32 * 1024


# --- users' httpx -----------------------------------------------------------------------------------------------------


def _transport(coding: str, data: bytes, closed: list[bool]) -> httpx.MockTransport:
    class Body(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            for piece in cut(data, 50_000):
                await trio.lowlevel.checkpoint()
                yield piece

        async def aclose(self) -> None:
            closed.append(True)

    return httpx.MockTransport(lambda _: httpx.Response(200, headers={"Content-Encoding": coding}, stream=Body()))


@pytest.mark.parametrize("name", ENCODERS)
async def test_replies_of_a_users_transport(name: str) -> None:
    """They are decoded here, with the same bounds, whatever httpx has decoders for."""
    coding, data = encoded(name, chat("x" * 100_000).partition(b"\r\n\r\n")[2])
    closed: list[bool] = []
    async with open_quiet_client(
        api_key="k", base_url="https://h", transport=_transport(coding, data, closed), compression=True
    ) as client:
        assert (await client.chat("x")).text == "x" * 100_000
    assert closed == [True]


@pytest.mark.parametrize("coding", CODINGS)
async def test_bombs_of_a_users_transport(coding: str) -> None:
    """One read of 50 kB that unpacks to tens of MiB is refused in the middle, and the reply is closed."""
    closed: list[bool] = []
    data = b"".join(bomb(coding, 64))
    async with open_quiet_client(
        api_key="k", base_url="https://h", transport=_transport(coding, data, closed)
    ) as client:
        with pytest.raises(DecodeError, match="unpacks to more than 100 times"):
            await client.chat("x")
    assert closed == [True]
