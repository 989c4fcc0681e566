"""What type checkers see of the fronts; never run."""

from __future__ import annotations

from typing import assert_type

from msgspec import Struct

import gorouter_trio as gr


class Person(Struct):
    name: str


async def check_aio() -> None:
    async with gr.aio.open_client(model="m") as client:
        assert_type(client, gr.aio.Client)
        assert_type((await client.chat("x", response_type=Person, deadline_s=1.0)).value, Person)
        assert_type(await client.chat("x", temperature=0.5), gr.ChatResult[None])
        async with client.stream("x", response_type=Person) as stream:
            assert_type(stream, gr.aio.ChatStream[Person])
            async for event in stream:
                assert_type(event, gr.StreamEvent)
            async for text in stream.text:
                assert_type(text, str)
            assert_type((await stream.collect()).value, Person)
        session = client.session("s")
        assert_type(session, gr.aio.SessionRef)
        assert_type((await session.ask("x", response_type=Person)).value, Person)
        assert_type((await session.retry(response_type=Person)).value, Person)
        assert_type(await session.history(), list[gr.HistoryEntry])
        async with client.batch([]) as results:
            async for result in results:
                assert_type(result, gr.BatchResult)
        with client.events(gr.ChatFailed) as feed:
            async for failed in feed:
                assert_type(failed, gr.ChatFailed)
        assert_type(client.statistics(), gr.PoolStatistics)


def check_blocking() -> None:
    def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision | None:
        return None

    with gr.blocking.open_client(model="m") as client:
        assert_type(client, gr.blocking.Client)
        assert_type(client.chat("x", response_type=Person, deadline_s=1.0).value, Person)
        assert_type(client.chat("x", approve=approve), gr.ChatResult[None])
        with client.stream("x", response_type=Person) as stream:
            assert_type(stream, gr.blocking.ChatStream[Person])
            for event in stream:
                assert_type(event, gr.StreamEvent)
            for text in stream.text:
                assert_type(text, str)
            assert_type(stream.collect().value, Person)
        session = client.session("s")
        assert_type(session, gr.blocking.SessionRef)
        assert_type(session.ask("x", response_type=Person).value, Person)
        assert_type(session.edit("t", "x", response_type=Person).value, Person)
        assert_type(session.history(), list[gr.HistoryEntry])
        with client.batch([]) as results:
            for result in results:
                assert_type(result, gr.BatchResult)
        with client.events(gr.ChatFailed) as feed:
            for failed in feed:
                assert_type(failed, gr.ChatFailed)
