"""HTTP/2 through a user's `httpx.AsyncClient(http2=True)`, shared or one for each connection of the pool."""

from __future__ import annotations

import ssl
from collections.abc import Callable

import httpx
import pytest
import trio
import trustme
from h2_server import H2Request, serving_h2
from scripted import DONE, delta
from worlds import open_quiet_client

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError, StreamBrokenError

pytestmark = pytest.mark.net
KEY = "sk-or-v1-c4n4ry0f7h3h2"
CANCELS = 120


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def make_user(authority: trustme.CA) -> Callable[[], httpx.AsyncClient]:
    """What makes a client of httpx that speaks HTTP/2 and nothing else."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return lambda: httpx.AsyncClient(http2=True, http1=False, verify=context, timeout=None)


async def answer(request: H2Request) -> None:
    """A chat or a stream, as asked; "hang" is answered by nothing, or by a first event."""
    assert request.headers["authorization"] == f"Bearer {KEY}"
    asked = request.json()
    text = asked["messages"][-1]["content"]
    if asked.get("stream"):
        await request.start("text/event-stream")
        await request.send(delta("first "))
        if text == "hang":
            await trio.sleep_forever()
        await request.send(delta(text) + delta(finish="stop"))
        await request.send(DONE, end=True)
        return
    if text == "hang":
        await trio.sleep_forever()
    message = {"role": "assistant", "content": text}
    body = {"id": "gen-1", "model": "m", "choices": [{"finish_reason": "stop", "message": message}]}
    await request.start("application/json")
    await request.send(httpx.Response(200, json=body).content, end=True)


async def test_many_requests_on_one_connection(
    server_side: ssl.SSLContext, make_user: Callable[[], httpx.AsyncClient], no_leaks
) -> None:
    """Chats and streams at the same time share one connection of a shared client, each with its own answer."""

    async def chat(client: gr.Client, text: str) -> None:
        assert (await client.chat(text)).text == text

    async def stream(client: gr.Client, text: str) -> None:
        async with client.stream(text) as streamed:
            assert (await streamed.collect()).text == f"first {text}"

    async with serving_h2(answer, server_side) as server, no_leaks():
        async with (
            make_user() as user,
            open_quiet_client(api_key=KEY, base_url=f"https://127.0.0.1:{server.port}/v1", transport=user) as client,
        ):
            await client.chat("first, so that there is a connection")
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(chat, client, f"{number} " * 10_000)
                    nursery.start_soon(stream, client, f"streamed {number}")
            assert client.statistics().answered == 41
        assert len(server.connections) == 1
        assert server.connections[0].peak > 1


async def hang(client: gr.Client) -> None:
    await client.chat("hang")


async def hang_streaming(client: gr.Client) -> None:
    async with client.stream("hang") as streamed:
        async for _ in streamed:
            pass


async def leave_early(client: gr.Client) -> None:
    async with client.stream("hang") as streamed:
        assert await anext(streamed.text) == "first "


async def test_cancels_beside_other_requests(
    server_side: ssl.SSLContext, make_user: Callable[[], httpx.AsyncClient], no_leaks
) -> None:
    """On a shared client, what is cancelled or left early frees its place, and others go on undisturbed.

    httpx tells the server nothing of it (it sends no RST_STREAM), and takes at most 100 such streams a connection: for
    cancels in any number each connection of the pool has a client of its own, as in the next test.
    """
    async with serving_h2(answer, server_side) as server, no_leaks():
        async with (
            make_user() as user,
            open_quiet_client(api_key=KEY, base_url=f"https://127.0.0.1:{server.port}/v1", transport=user) as client,
        ):
            await client.chat("x")
            for use in (hang, hang_streaming, leave_early):
                async with client.stream("goes on") as bystander:
                    with trio.move_on_after(0.05):
                        await use(client)
                    with trio.fail_after(5):
                        assert (await bystander.collect()).text == "first goes on"
                        assert (await client.chat("after")).text == "after"
            with trio.fail_after(5):
                while client.statistics().in_flight:
                    await trio.sleep(0.001)
        assert len(server.connections) == 1


async def test_one_client_for_each_connection_of_the_pool(
    server_side: ssl.SSLContext, make_user: Callable[[], httpx.AsyncClient], no_leaks
) -> None:
    """What makes clients is called for each connection, and each is closed with it, which is how a cancel gets through.

    More cancels than one client would survive leave nothing behind at either end.
    """
    made: list[httpx.AsyncClient] = []

    def make() -> httpx.AsyncClient:
        made.append(make_user())
        return made[-1]

    async def chat(client: gr.Client, number: int) -> None:
        assert (await client.chat(f"{number}")).text == f"{number}"

    async with serving_h2(answer, server_side) as server, no_leaks():
        async with open_quiet_client(
            api_key=KEY, base_url=f"https://127.0.0.1:{server.port}/v1", transport=make
        ) as client:
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(chat, client, number)
            assert len(made) == len(server.connections) == 4
            assert (await client.chat("again")).text == "again"
            assert len(made) == 4
            for number in range(CANCELS):
                seen = len(server.requests)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon((hang, hang_streaming)[number % 2], client)
                    while len(server.requests) == seen:
                        await trio.sleep(0.0005)
                    nursery.cancel_scope.cancel()
                with trio.fail_after(5):
                    await server.requests[seen].connection.closed.wait()
            assert (await client.chat("after")).text == "after"
            assert sum(not user.is_closed for user in made) <= 4
        assert all(user.is_closed for user in made)


async def test_a_server_that_resets_a_stream(
    server_side: ssl.SSLContext, make_user: Callable[[], httpx.AsyncClient], no_leaks
) -> None:
    """A stream that the server resets is broken, with what had arrived; the connection serves the next request."""

    async def reset(request: H2Request) -> None:
        if request.json()["messages"][-1]["content"] != "break":
            await answer(request)
            return
        await request.start("text/event-stream")
        await request.send(delta("first "))
        request.connection.h2.reset_stream(request.stream_id, error_code=2)
        await request.connection.flush()

    async with serving_h2(reset, server_side) as server, no_leaks():
        async with (
            make_user() as user,
            open_quiet_client(api_key=KEY, base_url=f"https://127.0.0.1:{server.port}/v1", transport=user) as client,
        ):
            with pytest.raises(StreamBrokenError) as broken:
                async with client.stream("break") as streamed:
                    await streamed.collect()
            assert broken.value.partial is not None
            assert broken.value.partial.text == "first "
            assert (await client.chat("after")).text == "after"
        assert len(server.connections) == 1


async def test_what_makes_something_else() -> None:
    """A callable that makes no httpx transport is told so, and not retried."""
    async with open_quiet_client(api_key=KEY, transport=lambda: object()) as client:
        with pytest.raises(ConfigError, match="transport: made a object, not an httpx"):
            await client.chat("x")
        assert client.statistics().retries == 0
