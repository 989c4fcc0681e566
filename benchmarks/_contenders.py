"""The clients that are compared, each doing the same work: encode the request, send it, read the whole reply, decode
it to Python values, and hand back the length of the text and the finish reason, which the driver checks.

Each is an async context manager that yields a function from a worker's number to that worker's call, so that a
contender with one connection a worker has a place for it. Imports are inside: a contender pays for itself alone.
"""

from __future__ import annotations

import importlib.util
import pathlib
import socket
import sys
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import _peers
import _wire
from _reading import HEADERS, Events, plain_facts, url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import httpx
    from _reading import Call, Calls, Opened

    import gorouter_trio as gr

# A checkout measures itself, installed or not.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


@dataclass(frozen=True)
class Contender:
    """One client: how it runs, how it is opened, what it needs."""

    name: str
    label: str
    loop: Literal["trio", "asyncio", "threads"]
    open: Callable[[str, int], Opened]
    needs: tuple[str, ...] = ()
    """Modules that must be there; their versions are reported."""
    is_heavy: bool = False
    """Whether it takes so long that a run measures it in its first round only."""

    @property
    def is_installed(self) -> bool:
        """Whether what it needs can be imported."""
        return all(importlib.util.find_spec(name) is not None for name in self.needs)


# --- this library -----------------------------------------------------------------------------------------------------


def _client(base: str, in_flight: int) -> AbstractAsyncContextManager[gr.Client]:
    import gorouter_trio as gr

    return gr.open_client(**_settings(base, in_flight))


def _settings(base: str, in_flight: int) -> dict[str, object]:
    import gorouter_trio as gr

    # As many connections as requests in flight, as every other contender has.
    pool = gr.PoolLimits(max_connections=in_flight)
    prices = gr.PricePolicy(on_start=False, refresh_s=None)  # The server has no list of them.
    return {"api_key": _wire.API_KEY, "base_url": base, "model": _wire.MODEL, "pool": pool, "prices": prices}


@asynccontextmanager
async def gorouter_chat(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.chat`."""
    async with _client(base, in_flight) as client:

        async def call() -> tuple[int, str]:
            reply = await client.chat(_wire.PROMPT)
            return len(reply.text), reply.finish_reason or ""

        yield lambda _worker: call


def gorouter_plugins(*names: str) -> Callable[[str, int], Opened]:
    """`client.chat` with these plugins; what they report goes nowhere, but is made and written.

    "nothing" has had a hook that was taken away again. "logging" writes lines to the null device, "handlerless" makes
    the records and leaves them to a handler that does nothing.
    """

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        async with _client(base, in_flight) as client:
            for name in names:
                await _register(client, name)

            async def call() -> tuple[int, str]:
                reply = await client.chat(_wire.PROMPT)
                return len(reply.text), reply.finish_reason or ""

            yield lambda _worker: call

    return opened


async def _register(client: gr.Client, name: str) -> None:
    import logging
    import os

    import gorouter_trio as gr
    from gorouter_trio import plugins

    if name in {"nothing", "hook"}:
        hook = gr.Hook(after=lambda _context, _state: None)
        client.add_hook(hook)
        if name == "nothing":
            client.remove_hook(hook)
    elif name in {"logging", "handlerless"}:
        logger = logging.Logger("bench", logging.INFO)
        logger.addHandler(logging.NullHandler() if name == "handlerless" else logging.FileHandler(os.devnull))
        await client.register(plugins.LoggingPlugin(logger))
    elif name == "metrics":
        await client.register(plugins.MetricsPlugin())
    elif name == "billing":
        await client.register(plugins.BillingPlugin(lambda _report: None))
    elif name == "otel":
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.trace import TracerProvider

        provider, meters = TracerProvider(), MeterProvider()
        await client.register(plugins.OpenTelemetryPlugin(tracer_provider=provider, meter_provider=meters))


@asynccontextmanager
async def gorouter_aio(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.chat` of the front for asyncio."""
    import gorouter_trio as gr

    async with gr.aio.open_client(**_settings(base, in_flight)) as client:

        async def call() -> tuple[int, str]:
            reply = await client.chat(_wire.PROMPT)
            return len(reply.text), reply.finish_reason or ""

        yield lambda _worker: call


@asynccontextmanager
async def gorouter_blocking(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.chat` of the front for threads; a call is a plain function."""
    import gorouter_trio as gr

    with gr.blocking.open_client(**_settings(base, in_flight)) as client:

        def call() -> tuple[int, str]:
            reply = client.chat(_wire.PROMPT)
            return len(reply.text), reply.finish_reason or ""

        yield lambda _worker: call  # type: ignore[return-value]  # what a thread calls


@asynccontextmanager
async def gorouter_aio_stream(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.stream` of the front for asyncio, read as events."""
    import gorouter_trio as gr

    async with gr.aio.open_client(**_settings(base, in_flight)) as client:

        async def call() -> tuple[int, str]:
            length = 0
            async with client.stream(_wire.PROMPT) as stream:
                async for event in stream:
                    if isinstance(event, gr.TextDelta):
                        length += len(event.text)
            return length, stream.result.finish_reason or ""

        yield lambda _worker: call


@asynccontextmanager
async def gorouter_blocking_stream(base: str, in_flight: int) -> AsyncIterator[Calls]:
    """`client.stream` of the front for threads, read as events."""
    import gorouter_trio as gr

    with gr.blocking.open_client(**_settings(base, in_flight)) as client:

        def call() -> tuple[int, str]:
            length = 0
            with client.stream(_wire.PROMPT) as stream:
                for event in stream:
                    if isinstance(event, gr.TextDelta):
                        length += len(event.text)
            return length, stream.result.finish_reason or ""

        yield lambda _worker: call  # type: ignore[return-value]  # what a thread calls


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
        return plain_facts(decode(body))

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
        events = Events()
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
        return plain_facts(reply)

    async def _stream(self) -> tuple[int, str]:
        events = Events()
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


_OURS = ("gorouter_trio", "trio", "httptools", "msgspec")


def _peers_for(*, streaming: bool) -> tuple[Contender, ...]:
    """Other people's clients, the lightest first."""
    aiohttp = _peers.aiohttp_stream if streaming else _peers.aiohttp_chat
    httpx = _peers.httpx_stream if streaming else _peers.httpx_chat
    openai, sdk = _peers.openai_client, _peers.openrouter_sdk
    lean = "aiohttp + msgspec, leanest"
    return (
        Contender("aiohttp", lean, "asyncio", aiohttp("msgspec", lean=True), ("aiohttp", "msgspec")),
        Contender("aiohttp-default", "aiohttp + msgspec", "asyncio", aiohttp("msgspec"), ("aiohttp", "msgspec")),
        Contender("aiohttp-json", "aiohttp + json", "asyncio", aiohttp("json"), ("aiohttp",)),
        Contender("httpx2", "httpx2.AsyncClient on trio", "trio", httpx("httpx2"), ("httpx2", "trio")),
        Contender(
            "openai-aiohttp",
            "openai, aiohttp extra",
            "asyncio",
            openai(streaming=streaming, aiohttp=True),
            ("openai", "aiohttp"),
            is_heavy=streaming,
        ),
        Contender(
            "openai", "openai", "asyncio", openai(streaming=streaming, aiohttp=False), ("openai",), is_heavy=streaming
        ),
        Contender("litellm", "litellm", "asyncio", _peers.litellm(streaming=streaming), ("litellm",), is_heavy=True),
        Contender(
            "pydantic-ai",
            "pydantic-ai",
            "asyncio",
            _peers.pydantic_ai(streaming=streaming),
            ("pydantic_ai", "openai"),
            is_heavy=True,
        ),
        Contender("httpx", "httpx.AsyncClient on trio", "trio", httpx("httpx"), ("httpx", "trio"), is_heavy=True),
        Contender(
            "sdk", "openrouter, the official SDK", "asyncio", sdk(streaming=streaming), ("openrouter",), is_heavy=True
        ),
    )


CHAT = (
    Contender("bare", "bare httptools on trio", "trio", bare_httptools(streaming=False), ("httptools", "trio")),
    Contender("transport", "gr.HttpTransport called directly", "trio", transport_chat, _OURS),
    Contender("chat", "**gr client.chat**", "trio", gorouter_chat, _OURS),
    Contender("ask", "**gr session.ask**, first turn", "trio", gorouter_sessions(1), _OURS),
    Contender("ask8", "**gr session.ask**, 8 turns", "trio", gorouter_sessions(8), _OURS),
    Contender(
        "httpx-ours",
        "httpx.AsyncClient on gr.HttpTransport",
        "trio",
        _peers.httpx_chat("httpx", ours=True),
        ("httpx", *_OURS),
    ),
    *_peers_for(streaming=False),
)

STREAM = (
    Contender("bare", "bare httptools on trio", "trio", bare_httptools(streaming=True), ("httptools", "trio")),
    Contender("transport", "gr.HttpTransport called directly", "trio", transport_stream, _OURS),
    Contender("stream", "**gr client.stream**", "trio", gorouter_stream, _OURS),
    Contender("session", "**gr session.stream**, first turn", "trio", gorouter_session_stream, _OURS),
    Contender(
        "httpx-ours",
        "httpx.AsyncClient on gr.HttpTransport",
        "trio",
        _peers.httpx_stream("httpx", ours=True),
        ("httpx", *_OURS),
    ),
    *_peers_for(streaming=True),
)

_ALL = gorouter_plugins("logging", "metrics", "billing")
_ALL_MADE = gorouter_plugins("handlerless", "metrics", "billing")
_OTEL = (*_OURS, "opentelemetry.sdk")

PLUGINS = (
    Contender("chat", "gr client.chat, no plugins", "trio", gorouter_chat, _OURS),
    Contender("nothing", "a hook that was taken away again", "trio", gorouter_plugins("nothing"), _OURS),
    Contender("hook", "one hook that does nothing", "trio", gorouter_plugins("hook"), _OURS),
    Contender("metrics", "metrics", "trio", gorouter_plugins("metrics"), _OURS),
    Contender("billing", "billing", "trio", gorouter_plugins("billing"), _OURS),
    Contender("logging", "logging, lines written", "trio", gorouter_plugins("logging"), _OURS),
    Contender("handlerless", "logging, records made", "trio", gorouter_plugins("handlerless"), _OURS),
    Contender("made", "metrics, billing, logging, records made", "trio", _ALL_MADE, _OURS),
    Contender("all", "**metrics, billing, logging**, lines written", "trio", _ALL, _OURS),
    Contender("otel", "OpenTelemetry, spans ended and dropped", "trio", gorouter_plugins("otel"), _OTEL),
)

FRONT_CHAT = (
    Contender("chat", "gr client.chat on trio", "trio", gorouter_chat, _OURS),
    Contender("aio", "**gr.aio** client.chat on asyncio", "asyncio", gorouter_aio, _OURS),
    Contender("blocking", "**gr.blocking** client.chat in threads", "threads", gorouter_blocking, _OURS),
    Contender(
        "openai", "openai on asyncio", "asyncio", _peers.openai_client(streaming=False, aiohttp=False), ("openai",)
    ),
)

FRONT_STREAM = (
    Contender("stream", "gr client.stream on trio", "trio", gorouter_stream, _OURS),
    Contender("aio", "**gr.aio** client.stream on asyncio", "asyncio", gorouter_aio_stream, _OURS),
    Contender("blocking", "**gr.blocking** client.stream in threads", "threads", gorouter_blocking_stream, _OURS),
    Contender(
        "openai",
        "openai on asyncio",
        "asyncio",
        _peers.openai_client(streaming=True, aiohttp=False),
        ("openai",),
        is_heavy=True,
    ),
)
