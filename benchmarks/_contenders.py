"""The clients that are compared, each doing the same work: encode the request, send it, read the whole reply, decode
it to Python values, and hand back the length of the text and the finish reason, which the driver checks.

Each is an async context manager that yields a function from a worker's number to that worker's call, so that a
contender with one connection a worker has a place for it. Imports are inside: a contender pays for itself alone.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import _wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

    import gorouter_trio as gr

# A checkout measures itself, installed or not.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

Call: TypeAlias = Callable[[], Awaitable[tuple[int, str]]]
Calls: TypeAlias = Callable[[int], Call]
Opened: TypeAlias = AbstractAsyncContextManager[Calls]

HEADERS = {"Authorization": f"Bearer {_wire.API_KEY}", "Content-Type": "application/json"}


@dataclass(frozen=True)
class Contender:
    """One client: how it runs, how it is opened, what it needs."""

    name: str
    label: str
    loop: Literal["trio", "asyncio"]
    open: Callable[[str, int], Opened]
    needs: tuple[str, ...] = ()
    """Distributions whose versions are reported, the module of the first must be there."""

    @property
    def is_installed(self) -> bool:
        """Whether what it needs can be imported."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


def url(base: str) -> str:
    """The chat endpoint under a base URL."""
    return f"{base}/chat/completions"


# --- this library -----------------------------------------------------------------------------------------------------


def _client(base: str, in_flight: int) -> AbstractAsyncContextManager[gr.Client]:
    import gorouter_trio as gr

    # As many connections as requests in flight, as every other contender has.
    pool = gr.PoolLimits(max_connections=in_flight)
    return gr.open_client(api_key=_wire.API_KEY, base_url=base, model=_wire.MODEL, pool=pool)


@asynccontextmanager
async def gorouter_chat(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.chat`."""
    async with _client(base, in_flight) as client:

        async def call() -> tuple[int, str]:
            reply = await client.chat(_wire.PROMPT)
            return len(reply.text), reply.finish_reason or ""

        yield lambda _worker: call


def gorouter_sessions(turns: int) -> Callable[[str, int], Opened]:
    """`session.ask` with the memory store, in conversations of so many turns, each then closed."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        async with _client(base, in_flight) as client:
            yield lambda worker: _Conversations(client, worker, turns).ask

    return opened


class _Conversations:
    """One conversation after the other, as one user has them."""

    def __init__(self, client: gr.Client, worker: int, turns: int) -> None:
        self._client = client
        self._worker = worker
        self._turns = turns
        self._asked = 0
        self._session = self._next()

    async def ask(self) -> tuple[int, str]:
        reply = await self._session.ask(_wire.PROMPT)
        self._asked += 1
        if self._asked % self._turns == 0:
            await self._session.aclose()
            self._session = self._next()
        return len(reply.text), reply.finish_reason or ""

    def _next(self) -> gr.SessionRef:
        return self._client.session(f"{self._worker}/{self._asked}")


@asynccontextmanager
async def gorouter_stream(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.stream`, read as events."""
    import gorouter_trio as gr

    async with _client(base, in_flight) as client:

        async def call() -> tuple[int, str]:
            length = 0
            async with client.stream(_wire.PROMPT) as stream:
                async for event in stream:
                    if isinstance(event, gr.TextDelta):
                        length += len(event.text)
            return length, stream.result.finish_reason or ""

        yield lambda _worker: call


@asynccontextmanager
async def gorouter_session_stream(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`session.stream`, read as text, in conversations of one turn."""
    async with _client(base, in_flight) as client:

        def calls(worker: int) -> Call:
            asked = 0

            async def call() -> tuple[int, str]:
                nonlocal asked
                asked += 1
                session = client.session(f"{worker}/{asked}")
                length = 0
                async with session.stream(_wire.PROMPT) as stream:
                    async for text in stream.text:
                        length += len(text)
                await session.aclose()
                return length, stream.result.finish_reason or ""

            return call

        yield calls


@asynccontextmanager
async def transport_chat(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`HttpTransport` called directly, URL and headers made once."""
    import msgspec

    import gorouter_trio as gr

    transport = gr.HttpTransport(keep=in_flight)
    encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder().decode
    request = _prepared_request(base)

    async def call() -> tuple[int, str]:
        response = await transport.handle_async_request(request(encode(_wire.request(streaming=False))))
        body = b"".join([piece async for piece in response.stream])  # type: ignore[union-attr]  # the async kind
        await response.stream.aclose()  # type: ignore[union-attr]  # the async kind
        return _plain_facts(decode(body))

    yield lambda _worker: call
    await transport.aclose()


@asynccontextmanager
async def transport_stream(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """The same for a stream, the body split and decoded by hand."""
    import msgspec

    import gorouter_trio as gr

    transport = gr.HttpTransport(keep=in_flight)
    encode = msgspec.json.Encoder().encode
    request = _prepared_request(base)

    async def call() -> tuple[int, str]:
        response = await transport.handle_async_request(request(encode(_wire.request(streaming=True))))
        events = _Events()
        async for piece in response.stream:  # type: ignore[union-attr]  # the async kind
            events.feed(piece)
        await response.stream.aclose()  # type: ignore[union-attr]  # the async kind
        return events.facts()

    yield lambda _worker: call
    await transport.aclose()


def _prepared_request(base: str) -> Callable[[bytes], httpx.Request]:
    """What makes a request from a body, for little: `httpx.Request` would parse the URL each time."""
    import httpx

    target, headers = httpx.URL(url(base)), httpx.Headers(HEADERS)
    return lambda body: httpx.Request("POST", target, headers=headers, stream=httpx.ByteStream(body))


# --- the floor --------------------------------------------------------------------------------------------------------


class _Bare:
    """One connection of one task: as little as can be between the kernel, llhttp and the JSON decoder."""

    def __init__(self, base: str, *, streaming: bool) -> None:
        import httptools
        import msgspec
        import trio

        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode
        self._encode = msgspec.json.Encoder().encode
        self._wait_readable = trio.lowlevel.wait_readable
        host, _, port = base.removeprefix("http://").partition("/")[0].partition(":")
        path = "/" + base.removeprefix("http://").partition("/")[2]
        lines = [f"POST {url(path)} HTTP/1.1", f"Host: {host}:{port}"]
        lines += [f"{name}: {value}" for name, value in HEADERS.items()]
        self._head = "\r\n".join(lines).encode() + b"\r\nContent-Length: "
        self._streaming = streaming
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)
        self._is_complete = False
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)

    def on_message_complete(self) -> None:
        self._is_complete = True

    def close(self) -> None:
        self._socket.close()

    async def call(self) -> tuple[int, str]:
        body = self._encode(_wire.request(streaming=self._streaming))
        self._is_complete = False
        sent = self._socket.send(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        if sent < len(body):
            raise OSError("a request that does not fit into the socket's buffer")
        return await (self._stream() if self._streaming else self._whole())

    async def _whole(self) -> tuple[int, str]:
        while not self._is_complete:
            await self._receive()
        reply = self._decode(b"".join(self._pieces))
        self._pieces.clear()
        return _plain_facts(reply)

    async def _stream(self) -> tuple[int, str]:
        events = _Events()
        while not self._is_complete:
            await self._receive()
            events.feed(b"".join(self._pieces))
            self._pieces.clear()
        return events.facts()

    async def _receive(self) -> None:
        await self._wait_readable(self._socket)
        self._parser.feed_data(self._socket.recv(65_536))


def bare_httptools(*, streaming: bool) -> Callable[[str, int], Opened]:
    """httptools on trio, one connection a worker, no pool, no limits, no deadlines, no errors."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        connections = [_Bare(base, streaming=streaming) for _ in range(in_flight)]
        yield lambda worker: connections[worker].call
        for connection in connections:
            connection.close()

    return opened


# --- peers ------------------------------------------------------------------------------------------------------------


def aiohttp_chat(decoder: Literal["msgspec", "json"], *, lean: bool = False) -> Callable[[str, int], Opened]:
    """aiohttp and a JSON library; see `_aiohttp_session` for `lean`."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import yarl

        encode, decode = _json(decoder)
        target = yarl.URL(url(base)) if lean else url(base)
        async with _aiohttp_session(in_flight, lean=lean) as session:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=False))
                async with session.post(target, data=body) as response:
                    return _plain_facts(decode(await response.read()))

            yield lambda _worker: call

    return opened


def aiohttp_stream(decoder: Literal["msgspec", "json"], *, lean: bool = False) -> Callable[[str, int], Opened]:
    """aiohttp, a minimal split into events, and a JSON library."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import yarl

        encode, decode = _json(decoder)
        target = yarl.URL(url(base)) if lean else url(base)
        async with _aiohttp_session(in_flight, lean=lean) as session:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=True))
                events = _Events(decode)
                async with session.post(target, data=body) as response:
                    async for piece in response.content.iter_any():
                        events.feed(piece)
                return events.facts()

            yield lambda _worker: call

    return opened


def _aiohttp_session(in_flight: int, *, lean: bool) -> AbstractAsyncContextManager[Any]:
    """As documented; or, `lean`, without cookies and time-outs, the least CPU that its options allow."""
    import aiohttp

    connector = aiohttp.TCPConnector(limit=in_flight)
    if not lean:
        return aiohttp.ClientSession(connector=connector, headers=HEADERS)
    return aiohttp.ClientSession(
        connector=connector,
        headers=HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
    )


def openai_client(*, streaming: bool, aiohttp: bool) -> Callable[[str, int], Opened]:
    """`AsyncOpenAI` on asyncio, with its own HTTP client or with its aiohttp extra."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import openai

        limits = openai.DefaultAioHttpClient if aiohttp else openai.DefaultAsyncHttpxClient
        http_client = limits(limits=_httpx_of_openai().Limits(max_connections=in_flight))
        async with openai.AsyncOpenAI(api_key=_wire.API_KEY, base_url=base, http_client=http_client) as client:
            call = _openai_stream(client) if streaming else _openai_chat(client)
            yield lambda _worker: call

    return opened


def _httpx_of_openai() -> Any:
    """openai went from httpx to httpx2 with its third version."""
    import openai

    return importlib.import_module("httpx2" if int(openai.__version__.split(".")[0]) >= 3 else "httpx")


def _openai_chat(client: Any) -> Call:
    async def call() -> tuple[int, str]:
        reply = await client.chat.completions.create(model=_wire.MODEL, messages=_wire.MESSAGES)
        choice = reply.choices[0]
        return len(choice.message.content), choice.finish_reason

    return call


def _openai_stream(client: Any) -> Call:
    async def call() -> tuple[int, str]:
        length, finish = 0, ""
        async for chunk in await client.chat.completions.create(
            model=_wire.MODEL, messages=_wire.MESSAGES, stream=True
        ):
            choice = chunk.choices[0]
            length += len(choice.delta.content or "")
            finish = choice.finish_reason or finish
        return length, finish

    return call


def httpx_chat(module: Literal["httpx", "httpx2"]) -> Callable[[str, int], Opened]:
    """`AsyncClient` on trio, shared by all tasks."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        library = importlib.import_module(module)
        encode, decode = _json("msgspec")
        limits = library.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
        async with library.AsyncClient(limits=limits, timeout=60) as client:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=False))
                response = await client.post(url(base), content=body, headers=HEADERS)
                return _plain_facts(decode(response.content))

            yield lambda _worker: call

    return opened


def httpx_stream(module: Literal["httpx", "httpx2"]) -> Callable[[str, int], Opened]:
    """`AsyncClient.stream` on trio, shared by all tasks, the body split and decoded by hand."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        library = importlib.import_module(module)
        encode, decode = _json("msgspec")
        limits = library.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
        async with library.AsyncClient(limits=limits, timeout=60) as client:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=True))
                events = _Events(decode)
                async with client.stream("POST", url(base), content=body, headers=HEADERS) as response:
                    async for piece in response.aiter_raw():
                        events.feed(piece)
                return events.facts()

            yield lambda _worker: call

    return opened


# --- what they share --------------------------------------------------------------------------------------------------


def _json(library: Literal["msgspec", "json"]) -> tuple[Callable[[object], bytes], Callable[[bytes], Any]]:
    if library == "json":
        return (lambda value: json.dumps(value).encode()), json.loads
    import msgspec

    return msgspec.json.Encoder().encode, msgspec.json.Decoder().decode


def _plain_facts(reply: Any) -> tuple[int, str]:
    choice = reply["choices"][0]
    return len(choice["message"]["content"]), choice["finish_reason"]


class _Events:
    """The least that reads a stream of this API: events split at the blank line, each decoded, text and finish kept."""

    __slots__ = ("_decode", "_finish", "_length", "_rest")

    def __init__(self, decode: Callable[[bytes], Any] | None = None) -> None:
        self._decode = decode or _json("msgspec")[1]
        self._rest = b""
        self._length = 0
        self._finish = ""

    def feed(self, received: bytes) -> None:
        *events, self._rest = (self._rest + received).split(b"\n\n")
        decode = self._decode
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                choice = decode(event[6:])["choices"][0]
                self._length += len(choice["delta"]["content"])
                if choice["finish_reason"] is not None:
                    self._finish = choice["finish_reason"]

    def facts(self) -> tuple[int, str]:
        return self._length, self._finish


_OURS = ("gorouter_trio", "trio", "httptools", "msgspec")

CHAT = (
    Contender("bare", "bare httptools on trio", "trio", bare_httptools(streaming=False), ("httptools", "trio")),
    Contender("transport", "gr.HttpTransport called directly", "trio", transport_chat, _OURS),
    Contender("chat", "**gr client.chat**", "trio", gorouter_chat, _OURS),
    Contender("ask", "**gr session.ask**, first turn", "trio", gorouter_sessions(1), _OURS),
    Contender("ask8", "**gr session.ask**, 8 turns", "trio", gorouter_sessions(8), _OURS),
    Contender(
        "aiohttp",
        "aiohttp + msgspec, leanest",
        "asyncio",
        aiohttp_chat("msgspec", lean=True),
        ("aiohttp", "msgspec"),
    ),
    Contender("aiohttp-default", "aiohttp + msgspec", "asyncio", aiohttp_chat("msgspec"), ("aiohttp", "msgspec")),
    Contender("aiohttp-json", "aiohttp + json", "asyncio", aiohttp_chat("json"), ("aiohttp",)),
    Contender("httpx2", "httpx2.AsyncClient on trio", "trio", httpx_chat("httpx2"), ("httpx2", "trio")),
    Contender("openai", "openai", "asyncio", openai_client(streaming=False, aiohttp=False), ("openai",)),
    Contender(
        "openai-aiohttp",
        "openai, aiohttp extra",
        "asyncio",
        openai_client(streaming=False, aiohttp=True),
        ("openai", "aiohttp"),
    ),
    Contender("httpx", "httpx.AsyncClient on trio", "trio", httpx_chat("httpx"), ("httpx", "trio")),
)

STREAM = (
    Contender("bare", "bare httptools on trio", "trio", bare_httptools(streaming=True), ("httptools", "trio")),
    Contender("transport", "gr.HttpTransport called directly", "trio", transport_stream, _OURS),
    Contender("stream", "**gr client.stream**", "trio", gorouter_stream, _OURS),
    Contender("session", "**gr session.stream**, first turn", "trio", gorouter_session_stream, _OURS),
    Contender(
        "aiohttp",
        "aiohttp + msgspec, leanest",
        "asyncio",
        aiohttp_stream("msgspec", lean=True),
        ("aiohttp", "msgspec"),
    ),
    Contender("aiohttp-default", "aiohttp + msgspec", "asyncio", aiohttp_stream("msgspec"), ("aiohttp", "msgspec")),
    Contender("aiohttp-json", "aiohttp + json", "asyncio", aiohttp_stream("json"), ("aiohttp",)),
    Contender("httpx2", "httpx2.AsyncClient on trio", "trio", httpx_stream("httpx2"), ("httpx2", "trio")),
    Contender("openai", "openai", "asyncio", openai_client(streaming=True, aiohttp=False), ("openai",)),
    Contender(
        "openai-aiohttp",
        "openai, aiohttp extra",
        "asyncio",
        openai_client(streaming=True, aiohttp=True),
        ("openai", "aiohttp"),
    ),
)
