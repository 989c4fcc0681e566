"""Other people's clients as contenders, each as its documentation shows it, with as many connections as it needs."""

from __future__ import annotations

import importlib
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import _wire
from _reading import HEADERS, Events, json_library, plain_facts, url

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from _reading import Call, Calls, Opened


def aiohttp_chat(decoder: Literal["msgspec", "json"], *, lean: bool = False) -> Callable[[str, int], Opened]:
    """aiohttp and a JSON library; see `_aiohttp_session` for `lean`."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import yarl

        encode, decode = json_library(decoder)
        target = yarl.URL(url(base)) if lean else url(base)
        async with _aiohttp_session(in_flight, lean=lean) as session:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=False))
                async with session.post(target, data=body) as response:
                    return plain_facts(decode(await response.read()))

            yield lambda _worker: call

    return opened


def aiohttp_stream(decoder: Literal["msgspec", "json"], *, lean: bool = False) -> Callable[[str, int], Opened]:
    """aiohttp, a minimal split into events, and a JSON library."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import yarl

        encode, decode = json_library(decoder)
        target = yarl.URL(url(base)) if lean else url(base)
        async with _aiohttp_session(in_flight, lean=lean) as session:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=True))
                events = Events(decode)
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


def httpx_chat(module: Literal["httpx", "httpx2"], *, ours: bool = False) -> Callable[[str, int], Opened]:
    """`AsyncClient` on trio, shared by all tasks, on its own transport or on this library's."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        library = importlib.import_module(module)
        encode, decode = json_library("msgspec")
        async with _httpx_client(library, in_flight, ours=ours) as client:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=False))
                response = await client.post(url(base), content=body, headers=HEADERS)
                return plain_facts(decode(response.content))

            yield lambda _worker: call

    return opened


def httpx_stream(module: Literal["httpx", "httpx2"], *, ours: bool = False) -> Callable[[str, int], Opened]:
    """`AsyncClient.stream` on trio, shared by all tasks, the body split and decoded by hand."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        library = importlib.import_module(module)
        encode, decode = json_library("msgspec")
        async with _httpx_client(library, in_flight, ours=ours) as client:

            async def call() -> tuple[int, str]:
                body = encode(_wire.request(streaming=True))
                events = Events(decode)
                async with client.stream("POST", url(base), content=body, headers=HEADERS) as response:
                    async for piece in response.aiter_raw():
                        events.feed(piece)
                return events.facts()

            yield lambda _worker: call

    return opened


def _httpx_client(library: Any, in_flight: int, *, ours: bool) -> AbstractAsyncContextManager[Any]:
    if ours:
        import gorouter_trio as gr

        return library.AsyncClient(transport=gr.HttpTransport(keep=in_flight), timeout=60)
    return library.AsyncClient(limits=_limits(library, in_flight), timeout=60)


def _limits(library: Any, in_flight: int) -> Any:
    return library.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)


def openrouter_sdk(*, streaming: bool) -> Callable[[str, int], Opened]:
    """OpenRouter's own SDK, its async client given room for as many connections."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import httpx
        from openrouter import OpenRouter

        async with (
            httpx.AsyncClient(limits=_limits(httpx, in_flight), timeout=60) as http_client,
            OpenRouter(api_key=_wire.API_KEY, server_url=base, async_client=http_client) as client,
        ):

            async def chat() -> tuple[int, str]:
                reply = await client.chat.send_async(model=_wire.MODEL, messages=_wire.MESSAGES, stream=False)
                choice = reply.choices[0]
                return len(choice.message.content), choice.finish_reason

            async def stream() -> tuple[int, str]:
                length, finish = 0, ""
                async with await client.chat.send_async(
                    model=_wire.MODEL, messages=_wire.MESSAGES, stream=True
                ) as chunks:
                    async for chunk in chunks:
                        choice = chunk.choices[0]
                        length += len(choice.delta.content or "")
                        finish = choice.finish_reason or finish
                return length, finish

            yield lambda _worker: stream if streaming else chat

    return opened


def litellm(*, streaming: bool) -> Callable[[str, int], Opened]:
    """`litellm.acompletion` with its OpenRouter provider and its table of prices from the package."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        # Read when it is imported: no look for newer prices, and room for as many connections to one host.
        os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        os.environ["AIOHTTP_CONNECTOR_LIMIT_PER_HOST"] = str(max(in_flight, 500))
        library = importlib.import_module("litellm")
        given = {
            "model": f"openrouter/{_wire.MODEL}",
            "messages": _wire.MESSAGES,
            "api_base": base,
            "api_key": _wire.API_KEY,
        }

        async def chat() -> tuple[int, str]:
            choice = (await library.acompletion(**given)).choices[0]
            return len(choice.message.content), choice.finish_reason

        async def stream() -> tuple[int, str]:
            length, finish = 0, ""
            async for chunk in await library.acompletion(**given, stream=True):
                choice = chunk.choices[0]
                length += len(choice.delta.content or "")
                finish = choice.finish_reason or finish
            return length, finish

        yield lambda _worker: stream if streaming else chat

    return opened


def pydantic_ai(*, streaming: bool) -> Callable[[str, int], Opened]:
    """An `Agent` with the OpenRouter model, no tools and no instructions."""

    @asynccontextmanager
    async def opened(base: str, in_flight: int) -> AsyncIterator[Calls]:
        import openai
        from pydantic_ai import Agent
        from pydantic_ai.models.openrouter import OpenRouterModel
        from pydantic_ai.providers.openrouter import OpenRouterProvider

        http_client = openai.DefaultAsyncHttpxClient(limits=_limits(_httpx_of_openai(), in_flight))
        async with openai.AsyncOpenAI(api_key=_wire.API_KEY, base_url=base, http_client=http_client) as client:
            agent = Agent(OpenRouterModel(_wire.MODEL, provider=OpenRouterProvider(openai_client=client)))

            async def chat() -> tuple[int, str]:
                reply = await agent.run(_wire.PROMPT)
                return len(reply.output), reply.response.finish_reason or ""

            async def stream() -> tuple[int, str]:
                length = 0
                async with agent.run_stream(_wire.PROMPT) as reply:
                    async for text in reply.stream_text(delta=True, debounce_by=None):
                        length += len(text)
                    return length, reply.response.finish_reason or ""

            yield lambda _worker: stream if streaming else chat

    return opened
