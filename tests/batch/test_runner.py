"""Batches, in virtual time: against a simulated OpenRouter, and against a run of the test's own."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from gorouter_trio.batch.rows import BatchRow, RowProblem
from gorouter_trio.batch.runner import Batch, BatchRequest, BatchResult, BatchStatistics, open_batch
from gorouter_trio.client import Client, open_client
from gorouter_trio.config import PoolLimits
from gorouter_trio.errors import AuthenticationError, BadRequestError, ConfigError, ProviderError, StreamBrokenError
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.wire.mail import CallSettings
from gorouter_trio.wire.messages import AssistantMessage, UserMessage
from gorouter_trio.wire.requests import ChatRequest
from gorouter_trio.wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from trio.testing import MockClock

    LeakCheck = Callable[[], AbstractAsyncContextManager[None]]

Answer = tuple[ChatResult, bytes]


@asynccontextmanager
async def open_simulated(
    config: SimulatorConfig | None = None, *, connections: int = 256
) -> AsyncIterator[tuple[Client, Simulator]]:
    simulator = Simulator(config)
    async with (
        open_simulated_network(simulator) as network,
        open_client(
            api_key="sk-test",
            base_url=network.base_url,
            transport=network,
            insecure_http=True,
            pool=PoolLimits(max_connections=connections),
        ) as client,
    ):
        yield client, simulator


def say(text: str, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"[[say {text}]]"}], **fields}


def author_of(result: BatchResult) -> str:
    return (result.unwrap().model or "").partition("/")[0]


async def collect(results: Batch) -> list[BatchResult]:
    return [result async for result in results]


# --- through the client -----------------------------------------------------------------------------------------------


async def test_every_request_once(autojump_clock: MockClock) -> None:
    """Each request has one result, with its own id or its index, its answer, and the reply as it came."""
    requests: list[BatchRequest] = [
        say(f"answer {n}", **({"custom_id": f"id-{n}"} if n % 2 else {})) for n in range(40)
    ]
    async with open_simulated() as (client, simulator), client.batch(requests, max_in_flight=7) as batch:
        results = sorted(await collect(batch), key=lambda r: r.index)
    assert [r.index for r in results] == list(range(40))
    assert [r.custom_id for r in results] == [f"id-{n}" if n % 2 else str(n) for n in range(40)]
    for n, r in enumerate(results):
        assert r.unwrap().text == f"answer {n}"
        assert json.loads(r.body or b"")["id"] == r.unwrap().generation_id
    assert simulator.statistics().completed == 40


async def test_requests_as_values(autojump_clock: MockClock) -> None:
    """A `ChatRequest` is a request, and names itself."""
    requests = [
        ChatRequest(messages=[UserMessage("[[say a]]")], custom_id="first"),
        ChatRequest(messages=[UserMessage("[[say b]]")], model="anthropic/claude-sonnet-4"),
    ]
    async with open_simulated() as (client, _), client.batch(requests) as batch:
        first, second = sorted(await collect(batch), key=lambda r: r.index)
    assert (first.custom_id, first.unwrap().text, author_of(first)) == ("first", "a", "openai")
    assert (second.custom_id, second.unwrap().text, author_of(second)) == ("1", "b", "anthropic")


async def test_bounded_in_flight(autojump_clock: MockClock) -> None:
    """Never more than allowed, and never fewer while there is work."""
    async with (
        open_simulated(SimulatorConfig(latency_s=1.0)) as (client, simulator),
        client.batch((say(str(n)) for n in range(40)), max_in_flight=8) as batch,
    ):
        started_at = trio.current_time()
        assert len(await collect(batch)) == 40
        assert trio.current_time() - started_at == pytest.approx(5.0, rel=0.05)
    assert simulator.statistics().max_in_flight == 8


@pytest.mark.parametrize("consumer_s", [0.0, 0.01])
async def test_ordered(consumer_s: float, autojump_clock: MockClock) -> None:
    """Results come in the order of the requests, whatever the answers' order is, also for a consumer that is slow."""
    config = SimulatorConfig(latency_s=1.0, jitter=1.0)
    indexes = []
    async with (
        open_simulated(config, connections=64) as (client, _),
        client.batch((say(str(n)) for n in range(400)), max_in_flight=32, ordered=True) as batch,
    ):
        async for result in batch:
            indexes.append(result.index)
            assert result.unwrap().text == str(result.index)
            await trio.sleep(consumer_s)
    assert indexes == list(range(400))


async def test_ordered_and_cancelled(autojump_clock: MockClock) -> None:
    """What had ended is delivered all the same, in order, without those that had not."""
    requests = [
        say(str(n)) if n != 5 else {"messages": [{"role": "user", "content": "[[fault hang]]"}]} for n in range(99)
    ]
    async with (
        open_simulated(SimulatorConfig(latency_s=0.1, jitter=1.0)) as (client, simulator),
        client.batch(requests, max_in_flight=4, ordered=True) as batch,
    ):
        indexes = [(await anext(batch)).index for _ in range(5)]
        await trio.sleep(10)
        batch.cancel()
        indexes += [result.index async for result in batch]
        completed = simulator.statistics().completed
    assert indexes == sorted(indexes)
    assert 5 not in indexes
    assert len(indexes) == completed == 5 + 31


async def test_failed_rows_are_results(autojump_clock: MockClock) -> None:
    """An error of one request is its result, with all its fields, and the others run."""
    requests: list[Any] = [
        say("fine"),
        {"messages": [{"role": "user", "content": "[[fault 401]]"}]},
        {"messages": []},
        5,
    ]
    async with open_simulated() as (client, _), client.batch(requests, max_in_flight=2) as batch:
        results = sorted(await collect(batch), key=lambda r: r.index)
        statistics = batch.statistics()
    assert results[0].unwrap().text == "fine"
    with pytest.raises(AuthenticationError):
        results[1].unwrap()
    assert isinstance(results[1].error, AuthenticationError)
    assert (results[1].error.status, results[1].error.attempts, results[1].result) == (401, 1, None)
    assert isinstance(results[2].error, BadRequestError)
    assert isinstance(results[3].error, BadRequestError)
    assert statistics == BatchStatistics(taken=4, in_flight=0, succeeded=1, failed=3, cancelled=0)


async def test_lines_that_are_no_requests(autojump_clock: MockClock) -> None:
    """They get results that name the line and the reason."""
    rows: list[BatchRequest] = [
        BatchRow(1, "a", say("fine")),
        RowProblem(2, None, "not JSON"),
        BatchRow(3, "c", {"messages": [{"role": "robot", "content": "x"}]}),
    ]
    async with open_simulated() as (client, _), client.batch(rows) as batch:
        results = sorted(await collect(batch), key=lambda r: r.index)
    assert [(r.custom_id, r.line_number) for r in results] == [("a", 1), (None, 2), ("c", 3)]
    problems = [r.error.message for r in results if r.error is not None]
    assert problems[0] == "line 2: not JSON"
    assert problems[1].startswith("line 3: messages: unknown role 'robot'")


async def test_doubtful_requests_are_not_repeated(autojump_clock: MockClock) -> None:
    """What may have been billed is sent once in a batch, twice in a chat, and as often as asked."""
    cut = "[[fault connection_cut]]"
    async with open_simulated() as (client, simulator):
        with pytest.raises(StreamBrokenError) as caught:
            await client.chat(cut)
        assert caught.value.attempts == 2
        for retries in (0, 2):
            before = simulator.statistics().received
            requests = [{"messages": [{"role": "user", "content": f"{retries} {cut}"}]}]
            async with client.batch(requests, ambiguous_retries=retries) as batch:
                (result,) = await collect(batch)
            assert isinstance(result.error, StreamBrokenError)
            assert (result.error.attempts, result.error.maybe_billed) == (retries + 1, True)
            assert simulator.statistics().received - before == retries + 1


async def test_clear_refusals_are_repeated(autojump_clock: MockClock) -> None:
    """A refusal costs nothing, so a batch asks again like everybody."""
    async with open_simulated() as (client, _):
        async with client.batch([{"messages": [{"role": "user", "content": "[[fault 503 x2]]"}]}]) as batch:
            (result,) = await collect(batch)
        assert result.unwrap().call.attempts == 3


async def test_options_hold_for_all_rows(autojump_clock: MockClock) -> None:
    """Options of the batch stand beneath those of a row."""
    requests = [{"messages": [{"role": "user", "content": "[[tokens 50]]"}], **own} for own in ({}, {"max_tokens": 5})]
    async with open_simulated() as (client, _), client.batch(requests, max_tokens=9) as batch:
        results = sorted(await collect(batch), key=lambda r: r.index)
    usages = [r.unwrap().usage for r in results]
    assert [usage and usage.completion_tokens for usage in usages] == [9, 5]


async def test_leaving_early(autojump_clock: MockClock, no_leaks: LeakCheck) -> None:
    """What runs is cancelled, nothing is left over, and the client works on."""
    async with no_leaks():
        async with open_simulated(SimulatorConfig(latency_s=5.0)) as (client, simulator):
            async with client.batch((say(str(n)) for n in range(1_000)), max_in_flight=20) as batch:
                await trio.sleep(1)
                assert batch.statistics().in_flight == 20
            assert (await client.chat("[[say on]]")).text == "on"
            await trio.sleep(10)
            assert simulator.statistics().in_flight == 0
        assert simulator.statistics().received == 21


async def test_errors_leave_as_themselves(autojump_clock: MockClock) -> None:
    """Neither an error of the body, be it a group, nor an outer cancel is wrapped or lost."""
    group = ExceptionGroup("of a nursery", [ValueError("in the body")])
    async with open_simulated(SimulatorConfig(latency_s=5.0)) as (client, _):
        with pytest.raises(ExceptionGroup) as raised:
            async with client.batch([say("x")]):
                raise group
        assert raised.value is group
        with pytest.raises(KeyError):
            async with client.batch([say("x")]):
                raise KeyError
        with trio.move_on_after(1) as scope:
            async with client.batch([say("x")]) as batch:
                await collect(batch)
        assert scope.cancelled_caught


# --- with a run of the test's own -------------------------------------------------------------------------------------


def make_run(
    delay_s: Callable[[dict[str, Any]], float] = lambda _: 0.0,
) -> Callable[[bytes, CallSettings], Awaitable[Answer]]:
    """A run that answers after a while."""

    async def run(body: bytes, _settings: CallSettings) -> Answer:
        await trio.sleep(delay_s(json.loads(body)))
        return ChatResult(message=AssistantMessage("x"), call=CallRecord()), body

    return run


def numbered(count: int) -> Iterator[dict[str, object]]:
    for n in range(count):
        yield {"messages": [{"role": "user", "content": str(n)}], "seed": n}


class Numbered:
    """The same, as an async iterable that waits `every_s` before each."""

    def __init__(self, count: int, every_s: float = 0.0) -> None:
        self._rows = numbered(count)
        self._every_s = every_s
        self.taken = 0
        self._busy = False

    def __aiter__(self) -> Numbered:
        return self

    async def __anext__(self) -> dict[str, object]:
        assert not self._busy, "two tasks iterate at a time"
        self._busy = True
        await trio.sleep(self._every_s)
        self._busy = False
        self.taken += 1
        for row in self._rows:
            return row
        raise StopAsyncIteration


async def test_order_of_completion(autojump_clock: MockClock) -> None:
    """Results come as they complete."""
    delays = [3.0, 1.0, 2.0, 0.5]
    run = make_run(lambda body: delays[body["seed"]])
    async with open_batch(numbered(4), run=run, max_in_flight=3) as batch:
        assert [r.index async for r in batch] == [1, 3, 2, 0]


async def test_slow_consumer_stops_the_input(autojump_clock: MockClock) -> None:
    """With nobody reading, no more is taken than may be held: in flight and as many results."""
    rows = Numbered(1_000)
    async with open_batch(rows, run=make_run(lambda _: 0.1), max_in_flight=5) as batch:
        await trio.sleep(60)
        assert rows.taken == 10
        assert batch.statistics() == BatchStatistics(taken=10, in_flight=0, succeeded=10, failed=0, cancelled=0)
        await batch.__anext__()
        await trio.sleep(60)
        assert rows.taken == 11


async def test_slow_input(autojump_clock: MockClock) -> None:
    """Rows that come one by one run as they come."""
    started_at = trio.current_time()
    async with open_batch(Numbered(5, every_s=1.0), run=make_run(lambda _: 0.25), max_in_flight=3) as batch:
        ended_at = [trio.current_time() - started_at async for _ in batch]
    assert ended_at == pytest.approx([1.25, 2.25, 3.25, 4.25, 5.25])


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
async def test_failing_input(is_async: bool, autojump_clock: MockClock) -> None:
    """What was taken before is delivered, then the input's own error is raised, each time it is asked."""

    def rows() -> Iterator[dict[str, object]]:
        yield from numbered(5)
        raise LookupError("the input broke")

    class Rows:
        def __init__(self) -> None:
            self._rows = rows()

        def __aiter__(self) -> Rows:
            return self

        async def __anext__(self) -> dict[str, object]:
            await trio.lowlevel.checkpoint()
            return next(self._rows)

    with pytest.raises(LookupError, match="the input broke"):
        async with open_batch(Rows() if is_async else rows(), run=make_run(lambda _: 1.0), max_in_flight=3) as batch:
            results = [(await batch.__anext__()).index for _ in range(5)]
            assert sorted(results) == [0, 1, 2, 3, 4]
            with pytest.raises(LookupError, match="the input broke"):
                await batch.__anext__()
            await batch.__anext__()


async def test_bug_in_run(autojump_clock: MockClock) -> None:
    """What is no error of a call ends the batch at once, as itself."""

    async def run(_: bytes, _settings: CallSettings) -> Answer:
        await trio.sleep(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_batch(numbered(9), run=run, max_in_flight=1) as batch:
            await collect(batch)


async def test_cancel(autojump_clock: MockClock) -> None:
    """Nothing more is taken, what runs is cancelled, and each answer that was there is delivered."""
    run = make_run(lambda body: 1.0 if body["seed"] < 10 else math.inf)
    async with open_batch(numbered(1_000), run=run, max_in_flight=4) as batch:
        await trio.sleep(10)
        # Four answers wait in the channel, and each task holds another one that it cannot deliver.
        assert batch.statistics() == BatchStatistics(taken=8, in_flight=0, succeeded=8, failed=0, cancelled=0)
        await batch.__anext__()
        await trio.sleep(10)
        batch.cancel()
        rest = await collect(batch)
        assert len(rest) == 8
        assert batch.statistics() == BatchStatistics(taken=9, in_flight=0, succeeded=9, failed=0, cancelled=0)


async def test_cancel_what_runs(autojump_clock: MockClock) -> None:
    """Requests in flight end as cancelled, and have no result."""
    async with open_batch(numbered(100), run=make_run(lambda _: math.inf), max_in_flight=4) as batch:
        await trio.sleep(1)
        assert "4 in flight" in repr(batch)
        batch.cancel()
        assert await collect(batch) == []
        assert batch.statistics() == BatchStatistics(taken=4, in_flight=0, succeeded=0, failed=0, cancelled=4)


async def test_several_consumers(autojump_clock: MockClock) -> None:
    """Each result goes to one of them, and all of them end."""
    seen: list[int] = []

    async def consume(batch: Batch) -> None:
        async for result in batch:
            seen.append(result.index)
            await trio.sleep(0.3)

    async with open_batch(numbered(30), run=make_run(), max_in_flight=4) as batch, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(consume, batch)
    assert sorted(seen) == list(range(30))


async def test_empty_input() -> None:
    """No requests, no results."""
    async with open_batch([], run=make_run(), max_in_flight=4) as batch:
        assert await collect(batch) == []


@pytest.mark.parametrize("max_in_flight", [1, 3, 50])
async def test_any_timing(max_in_flight: int, rng: random.Random, autojump_clock: MockClock) -> None:
    """Whatever takes how long, every request has exactly one result."""
    count = rng.randrange(1, 200)
    draws = random.Random(rng.getrandbits(32))

    async def run(body: bytes, _settings: CallSettings) -> Answer:
        await trio.sleep(draws.choice([0.0, 0.0, draws.random(), 10 * draws.random()]))
        if draws.random() < 0.2:
            raise ProviderError("no", status=502)
        return ChatResult(message=AssistantMessage("x"), call=CallRecord()), body

    indices = []
    async with open_batch(Numbered(count, draws.choice([0.0, 0.1])), run=run, max_in_flight=max_in_flight) as batch:
        async for result in batch:
            indices.append(result.index)
            if result.error is None:
                assert json.loads(result.body or b"")["seed"] == result.index
            await trio.sleep(draws.choice([0.0, 0.0, 0.5]))
    assert sorted(indices) == list(range(count))


async def test_memory_is_flat() -> None:
    """Three thousand rows of a kilobyte need no more memory than three hundred."""

    def rows(count: int) -> Iterator[dict[str, object]]:
        for n in range(count):
            yield {"messages": [{"role": "user", "content": f"{n} " + "x" * 1_000}]}

    async def peak(count: int) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        async with open_batch(rows(count), run=make_run(), max_in_flight=64) as batch:
            async for _ in batch:
                pass
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        few, many = await peak(300), await peak(3_000)
    finally:
        tracemalloc.stop()
    assert many < few * 1.5 + 100_000


@pytest.mark.parametrize("requests", ["text", b"bytes", {"messages": []}, ChatRequest(messages=[]), 5, None])
async def test_what_is_no_iterable_of_requests(requests: Iterable[BatchRequest]) -> None:
    """One request, or nothing iterable, is a mistake that is told at once."""
    with pytest.raises(TypeError, match="must be an iterable of requests"):
        async with open_batch(requests, run=make_run(), max_in_flight=1):
            pass


@pytest.mark.parametrize("max_in_flight", [0, -1, 1.5, True, None])
async def test_wrong_max_in_flight(max_in_flight: int) -> None:
    """It is a whole number of at least 1."""
    with pytest.raises(ConfigError, match="max_in_flight"):
        async with open_batch([], run=make_run(), max_in_flight=max_in_flight):
            pass
