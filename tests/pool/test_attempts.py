"""Records of attempts: exactly one for each that reached a connection, however it ended, with what is known of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from typing import Any

import pytest
import trio
import trio.testing
from pooled import Place, open_place
from scripted import DONE, Peer, Request, Serve, answering, chat, delta, error, stream

from gorouter_trio.config import Deadlines, RateLimits, RetryPolicy
from gorouter_trio.errors import GorouterError
from gorouter_trio.pool.attempts import AttemptRecord

NEVER = RetryPolicy(max_retries=0)
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "cost": 0.25}


@asynccontextmanager
async def recorded(serve: Serve, **fields: Any) -> AsyncIterator[tuple[Place, list[AttemptRecord]]]:
    """A place, and the records of its attempts; afterwards there is one for each request that the server has seen."""
    records: list[AttemptRecord] = []
    async with open_place(serve, on_attempt=records.append, **fields) as place:
        yield place, records
        await place.check_clean()
        sent = len(place.network.requests)
    assert len(records) == sent


async def test_an_answer(autojump_clock: trio.testing.MockClock) -> None:
    """Who asked, with which key, what came back, and when each step was."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            await trio.sleep(2)
            await peer.send(chat(usage=USAGE))

    rates = RateLimits(requests_per_minute=60, margin=0)
    async with recorded(serve, rates=rates) as (place, records):
        place.network.connect_s = 0.5
        await place.ask("q", model="m", tenant="t", lane="batch", flow="ignored")
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: place.ask("q", model="m", flow="session"))
                await trio.testing.wait_all_tasks_blocked()
    first, second, third = records
    assert first.usage is not None
    assert first.usage.cost == Decimal("0.25")
    assert (first.model, first.tenant, first.lane, first.flow) == ("m", "t", "batch", "t")
    assert (first.key, first.key_index, first.prompt_bytes, first.generation_id) == ("0", 0, 9, "gen-1")
    assert (first.status, first.error, first.maybe_billed, first.cancelled, first.streamed) == (
        200, None, False, False, False,
    )  # fmt: skip
    assert (first.queued_at, first.taken_at, first.sent_at, first.first_data_at, first.ended_at) == (
        0, 0, 0.5, 2.5, 2.5,
    )  # fmt: skip
    assert (second.lane, second.flow, second.tenant) == ("interactive", "session", "")
    assert third.taken_at - third.queued_at == pytest.approx(1)
    assert [r.call for r in records] == [1, 2, 3]


async def test_every_attempt_of_a_request(autojump_clock: trio.testing.MockClock) -> None:
    """Retries are attempts of the same call; connecting in vain is none, but counts as a try."""
    raws = [error(503), error(502), chat(usage=USAGE)]
    async with recorded(answering(lambda r: raws[r.number])) as (place, records):
        place.network.refuse.append(OSError(111, "Connection refused"))
        asked = await place.ask()
        assert asked.exchange.attempts == 3
    assert [(r.call, r.attempt, r.status, r.error, r.maybe_billed) for r in records] == [
        (1, 2, 503, "OverloadedError", False),
        (1, 3, 502, "ProviderError", False),
        (1, 4, 200, None, False),
    ]
    assert [r.usage is None for r in records] == [True, True, False]


def hanging(*pieces: bytes) -> Serve:
    """Answers with these pieces and then hangs."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(*pieces)
        await peer.wait_gone()

    return serve


HEAD = b"HTTP/1.1 200 X\r\nX-Generation-Id: gen-7\r\nContent-Length: 500\r\n\r\n{"


@pytest.mark.parametrize("pieces", [(), (HEAD,)], ids=["no head", "in the body"])
async def test_a_cancel(pieces: tuple[bytes, ...], autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled after it was sent: one record, which may be billed."""
    async with recorded(hanging(*pieces)) as (place, records):
        with trio.move_on_after(1):
            await place.ask()
    (record,) = records
    assert (record.cancelled, record.maybe_billed, record.error) == (True, True, "Cancelled")
    assert record.ended_at == 1


async def test_cancelled_before_sending(autojump_clock: trio.testing.MockClock) -> None:
    """What was queued or connecting is no attempt."""
    async with recorded(answering(lambda r: chat()), rates=RateLimits(max_in_flight=1)) as (place, _records):
        place.network.connect_s = 5
        with trio.move_on_after(1):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(place.ask)
                nursery.start_soon(place.ask)
        await trio.sleep(2)  # connecting goes on for a moment


@pytest.mark.parametrize(
    ("pieces", "kind", "status"),
    [((), "DeadlineExceededError", None), ((HEAD,), "DeadlineExceededError", 200)],
    ids=["headers", "body"],
)
async def test_a_deadline(
    pieces: tuple[bytes, ...], kind: str, status: int | None, autojump_clock: trio.testing.MockClock
) -> None:
    """A deadline in any phase after the sending is one record, which may be billed."""
    deadlines = Deadlines(headers_s=3, first_data_s=3)
    async with recorded(hanging(*pieces), deadlines=deadlines, retry=NEVER) as (place, records):
        with pytest.raises(GorouterError):
            await place.ask()
    assert [(r.error, r.maybe_billed, r.cancelled) for r in records] == [(kind, True, False)]


async def test_a_reply_that_cannot_be_read() -> None:
    """An answer that makes no sense was one all the same."""
    broken = b"HTTP/1.1 200 X\r\nContent-Length: 3\r\n\r\n{]}"
    async with recorded(answering(lambda r: broken)) as (place, records):
        with pytest.raises(GorouterError):
            await place.ask()
    assert [(r.status, r.error) for r in records] == [(200, "DecodeError")]


WHOLE = stream(delta("a"), delta("b"), delta(finish="stop", usage=USAGE), DONE)


async def test_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    """Read to its end: its usage, when its first data came, and when its reader was through."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await trio.sleep(1)
        await peer.send(WHOLE[:150])
        await trio.sleep(1)
        await peer.send(WHOLE[150:])

    async with recorded(serve) as (place, records), place.stream() as reader:
        while await reader.read():
            pass
        assert records == []
        await trio.sleep(3)
    (record,) = records
    assert record.usage is not None
    assert (record.streamed, record.error, record.cancelled, record.generation_id) == (True, None, False, "gen-1")
    assert (record.first_data_at, record.ended_at) == (2, 5)


async def test_a_stream_left_early() -> None:
    """Left before its end: it may be billed, and how much is not known."""
    async with recorded(hanging(WHOLE[:400])) as (place, records):
        async with place.stream() as reader:
            assert reader.merge.has_data
        assert [(r.cancelled, r.maybe_billed, r.usage, r.error) for r in records] == [(True, True, None, None)]
        reader.close()
        assert len(records) == 1


async def test_a_stream_that_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """Cancelled while it is read."""
    async with recorded(hanging(WHOLE[:400])) as (place, records):
        with trio.move_on_after(1):
            async with place.stream() as reader:
                while True:
                    await reader.read()
    assert [(r.cancelled, r.maybe_billed) for r in records] == [(True, True)]


async def test_a_stream_that_breaks() -> None:
    """Cut after the first delta: the error, once."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(WHOLE[:400])

    async with recorded(serve) as (place, records):
        with pytest.raises(GorouterError):
            async with place.stream() as reader:
                while True:
                    await reader.read()
    assert [(r.error, r.cancelled, r.maybe_billed) for r in records] == [("StreamBrokenError", False, True)]


async def test_a_stream_refused_and_begun_again(autojump_clock: trio.testing.MockClock) -> None:
    """An error instead of the stream, an error as its first event, and a stream: three attempts of one call."""
    broken = stream(b'data: {"error": {"code": 502, "message": "no"}}\n\n')
    raws = [error(503), broken, WHOLE]
    async with recorded(answering(lambda r: raws[r.number])) as (place, records):
        assert await place.read() == "ab"
    assert [(r.attempt, r.status, r.error) for r in records] == [
        (1, 503, "OverloadedError"),
        (2, 200, "ProviderError"),
        (3, 200, None),
    ]


async def test_one_record_each_in_a_churn(autojump_clock: trio.testing.MockClock, rng) -> None:
    """With cancels, refusals, streams left early and retries all over, there is one for each that was sent."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            await trio.sleep(rng.random())
            await peer.send(answer(request))

    def answer(request: Request) -> bytes:
        if rng.random() < 0.2:
            return error(rng.choice([429, 500, 503]))
        return WHOLE if b"stream" in request.body else chat(usage=USAGE)

    async def one(place: Place) -> None:
        with trio.move_on_after(rng.random() * 3), suppress(GorouterError):
            if rng.random() < 0.5:
                await place.ask(model=rng.choice("mn"))
                return
            async with place.stream() as reader:
                while rng.random() < 0.8 and await reader.read():
                    pass

    async with recorded(serve, rates=RateLimits(requests_per_minute=3_000, max_in_flight=10)) as (place, records):
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(one, place)
                await trio.sleep(rng.random() * 0.05)
        await trio.sleep(5)
        # How many depends on the order in which tasks run; about 200, and many in any case.
        assert len(records) > 100
        assert len({(r.call, r.attempt) for r in records}) == len(records)
        s = place.statistics
        assert [key.in_flight for key in s.keys] == [0]
        assert [model.in_flight for model in s.models] == [0] * len(s.models)
