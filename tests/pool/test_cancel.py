"""Cancelling anything, at every step: no worker, no place in the queue, no connection is lost, and nobody harmed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing
from pooled import Place, open_place
from scripted import (
    DONE,
    STREAM_HEAD,
    Peer,
    PlayedStream,
    Request,
    Serve,
    answering,
    chat,
    chunks,
    delta,
    error,
    stream,
)
from worlds import open_quiet_client

from gorouter_trio.config import Deadlines, PoolLimits, RetryPolicy
from gorouter_trio.errors import DeadlineExceededError, GorouterError
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network

WHOLE = (delta("a"), delta("b"), delta(finish="stop"), DONE)


class StepCounter(trio.abc.Instrument):
    """Counts the steps of all tasks and cancels a scope at one of them."""

    def __init__(self, scope: trio.CancelScope, at: int, note: Callable[[], object] = lambda: None) -> None:
        self.scope, self.at, self.note, self.steps = scope, at, note, 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self.at:
            self.scope.cancel()
            self.note()


async def cancelled_at(step: int, scenario: Callable[[], Awaitable[object]]) -> bool:
    """Run the scenario, cancel it at a step of the whole world, and say whether it came to its end before that."""
    with trio.CancelScope() as scope:
        counter = StepCounter(scope, step)
        trio.lowlevel.add_instrument(counter)
        try:
            await scenario()
        finally:
            trio.lowlevel.remove_instrument(counter)
    return not scope.cancelled_caught


def in_pieces(raw: bytes, count: int = 4) -> list[bytes]:
    size = -(-len(raw) // count)
    return [raw[i : i + size] for i in range(0, len(raw), size)]


def slowly(answer: Callable[[Request], bytes]) -> Serve:
    """Answers in pieces with steps in between."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            for piece in in_pieces(answer(request)):
                await peer.send(piece)
                for _ in range(3):
                    await trio.lowlevel.checkpoint()

    return serve


def by_kind(request: Request) -> bytes:
    return stream(*WHOLE) if request.json().get("stream") else chat(request.json()["q"])


async def ask(place: Place) -> None:
    assert (await place.ask("mine")).text == "mine"


async def read(place: Place) -> None:
    assert await place.read() == "ab"


async def leave(place: Place) -> None:
    async with place.stream() as reader:
        await reader.read()


async def long_request(place: Place) -> None:
    await place.ask("x" * 200_000)


async def ask_twice(place: Place) -> None:
    await ask(place)
    await ask(place)


SCENARIOS = [ask, read, leave, long_request, ask_twice]


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
async def test_cancelled_at_every_step(scenario: Callable[[Place], Awaitable[None]], warm: bool) -> None:
    """One request alone, cancelled at each step that it takes: the pool is clean and the next request answered."""
    for step in range(1, 10_000):
        async with open_place(slowly(by_kind), pool=PoolLimits(max_connections=1)) as place:
            if warm:
                await ask(place)
            await trio.testing.wait_all_tasks_blocked()
            ended = await cancelled_at(step, lambda place=place: scenario(place))  # type: ignore[misc]
            await place.check_clean()
            with trio.fail_after(1):
                await ask(place)
                await read(place)
            await place.check_clean()
            assert place.statistics.workers == 1
        if ended:
            break
    assert step > 5


async def test_cancelled_at_every_step_among_others() -> None:
    """The same with others running, queued and waiting for room: each of them gets its own answer."""
    limits = PoolLimits(max_connections=2, queue=2)
    for step in range(1, 10_000):
        async with open_place(slowly(by_kind), pool=limits) as place:
            answers: list[str] = []

            async def other(name: str, place: Place = place, answers: list[str] = answers) -> None:
                answers.append((await place.ask(name)).text)

            async def mine(place: Place = place) -> None:
                for call in (ask, read):
                    await call(place)

            async with trio.open_nursery() as nursery:
                for number in range(7):
                    nursery.start_soon(other, str(number))
                ended = await cancelled_at(step, mine)
            assert sorted(answers) == list("0123456")
            await place.check_clean()
            with trio.fail_after(1):
                await ask(place)
        if ended:
            break
    assert step > 20


@pytest.mark.parametrize("first", [error(503), error(504), b""], ids=["refused", "ambiguous", "cut"])
async def test_cancelled_at_every_step_of_a_retry(first: bytes) -> None:
    """Cancelled around a failure and its backoff: a cancel, or the failure that came before it, and a clean pool."""
    ends: list[str] = []
    for step in range(1, 10_000):
        async with open_place(_fails_first(first), retry=RetryPolicy(base_delay_s=0)) as place:
            try:
                ends.append("answered" if await cancelled_at(step, lambda place=place: ask(place)) else "cancelled")  # type: ignore[misc]
            except GorouterError:
                ends.append("failed")
            await place.check_clean()
            with trio.fail_after(1):
                await ask(place)
        if ends[-1] == "answered":
            break
    assert len(ends) > 10
    assert set(ends) <= {"answered", "cancelled", "failed"}
    assert ends.count("cancelled") > len(ends) / 2


def _fails_first(first: bytes) -> Serve:
    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if request.number:
                await peer.send(chat(request.json()["q"]))
            elif first:
                await peer.send(first)
            else:
                return

    return serve


async def test_stopped_in_the_moment_of_connecting(autojump_clock: trio.testing.MockClock) -> None:
    """A caller that leaves as its connection is made has nothing sent for it, however the two fall together."""
    sent: list[tuple[int, int]] = []

    class Network:
        """Connects in a few steps, to peers that never answer."""

        def __init__(self) -> None:
            self.streams: list[PlayedStream] = []

        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            # As with a socket: once the kernel has answered, a cancel comes too late for the connecting.
            await trio.lowlevel.cancel_shielded_checkpoint()
            self.streams.append(PlayedStream([]))
            return self.streams[-1]

        def sent(self) -> int:
            return sum(len(stream.sent) for stream in self.streams)

    for step in range(1, 40):
        for warm in (False, True):
            network = Network()
            async with open_place(answering(by_kind), transport=network) as place:
                if warm:  # a connection that has to be closed first
                    with trio.move_on_after(0.01):
                        await place.ask()
                    await trio.testing.wait_all_tasks_blocked()
                before = network.sent()
                at_the_cancel: list[int] = []
                with trio.CancelScope() as scope:
                    counter = StepCounter(scope, step, lambda n=network, a=at_the_cancel: a.append(n.sent()))  # type: ignore[misc]
                    trio.lowlevel.add_instrument(counter)
                    try:
                        with trio.move_on_after(0.05):
                            await place.ask()
                    finally:
                        trio.lowlevel.remove_instrument(counter)
                await trio.testing.wait_all_tasks_blocked()
                if at_the_cancel:
                    assert network.sent() == at_the_cancel[0], step
                    sent.append((before, network.sent()))
                s = place.statistics
                # A connection that was being made is kept for the next request.
                assert s.in_flight == 0
                assert s.connections <= 1
    assert len(sent) > 10


async def test_callers_that_leave_early_get_a_connection_in_the_end(autojump_clock: trio.testing.MockClock) -> None:
    """Callers with less patience than connecting takes do not starve: what the first began serves a later one."""
    simulator = Simulator(SimulatorConfig(latency_s=0))
    async with open_simulated_network(simulator) as inner:

        class SlowToConnect:
            async def connect(self, host: str, port: int) -> trio.abc.Stream:
                await trio.sleep(0.01)
                return await inner.connect(host, port)

        async with open_quiet_client(
            api_key="sk-or-v1-k", base_url="http://127.0.0.1/api/v1", transport=SlowToConnect()
        ) as client:
            answers = 0
            for _ in range(3):
                with trio.move_on_after(0.006):
                    answers += bool((await client.chat("[[say hello]]")).text)
            assert answers >= 1
            assert client.statistics().opened == 1


async def test_a_connection_for_nobody_is_not_waited_for_long(autojump_clock: trio.testing.MockClock) -> None:
    """A worker whose caller has gone gives up connecting after a second, and is free."""

    class Blackhole:
        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            await trio.sleep_forever()

    async with open_quiet_client(api_key="sk-or-v1-k", base_url="http://127.0.0.1/v1", transport=Blackhole()) as client:
        with trio.move_on_after(0.5):
            await client.chat("hello")
        assert client.statistics().in_flight == 1
        await trio.sleep(1.01)
        assert client.statistics().in_flight == 0


class StubbornStream(PlayedStream):
    """A stream that still gives out what had arrived when it was closed."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self.pieces:
            return await super().receive_some(max_bytes)
        await trio.lowlevel.cancel_shielded_checkpoint()
        piece = self.pieces.pop(0)
        assert isinstance(piece, bytes)
        return piece


@pytest.mark.parametrize("call", [ask, read], ids=["plain", "streamed"])
async def test_an_answer_that_comes_to_nobody(call: Callable[[Place], Awaitable[None]]) -> None:
    """The reply may arrive in the step in which its caller leaves: the worker goes on, and lends nothing to nobody."""

    class Network:
        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            raw = chat("mine") if call is ask else stream(*WHOLE)
            return StubbornStream(in_pieces(raw, 3))

    for step in range(1, 40):
        async with open_place(answering(by_kind), transport=Network()) as place:
            ended = await cancelled_at(step, lambda place=place: call(place))  # type: ignore[misc]
            await trio.testing.wait_all_tasks_blocked()
            assert place.statistics.in_flight == 0
            place.pool.idle[-1].drop_connection()
            with trio.fail_after(1):
                await call(place)
        if ended:
            break
    assert step > 5


async def test_deadlines_at_every_moment(autojump_clock: trio.testing.MockClock) -> None:
    """A deadline that falls into any part of a request, connecting and closing included, holds and leaves nothing."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            for piece in in_pieces(by_kind(request)):
                await trio.sleep(1)
                await peer.send(piece)

    async with open_place(serve, deadlines=Deadlines(connect_s=50)) as place:
        place.network.connect_s = 3
        for tenths in range(1, 85):
            for call in (place.ask, place.read):
                started = trio.current_time()
                with suppress(DeadlineExceededError):
                    await _until(place, call == place.read, started + tenths / 10)
                assert trio.current_time() <= started + tenths / 10 + 1e-6
                await place.check_clean()
        await ask(place)


async def _until(place: Place, streamed: bool, deadline: float) -> None:
    if not streamed:
        await place.ask(deadline=deadline)
        return
    async with place.stream(deadline=deadline) as reader:
        while await reader.read():
            pass


async def test_random_cancels_of_everything(rng: random.Random, autojump_clock: trio.testing.MockClock) -> None:
    """Hundreds of requests of every kind, cancelled at random: each ends in one way, and nothing is lost."""
    ends: Counter[str] = Counter()

    def answer(request: Request) -> bytes:
        return error(503) if rng.random() < 0.1 else by_kind(request)

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if rng.random() < 0.05:
                return
            for piece in in_pieces(answer(request)):
                await trio.sleep(rng.random())
                await peer.send(piece)

    async def one(place: Place) -> None:
        await trio.sleep(rng.random() * 200)
        call = rng.choice([ask, read, leave])
        with trio.move_on_after(rng.choice([0, rng.random() * 4, 1_000])) as scope:
            try:
                await call(place)
                ends["answered"] += 1
            except GorouterError as failed:
                ends[type(failed).__name__] += 1
        ends["cancelled"] += scope.cancelled_caught

    limits = PoolLimits(max_connections=5, queue=10, keepalive_s=3)
    async with open_place(serve, pool=limits) as place:
        place.network.connect_s = 0.2
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(one, place)
        assert sum(ends.values()) == 500
        assert ends["answered"] > 50
        assert ends["cancelled"] > 50
        await trio.sleep(20)
        await place.check_clean()
        assert place.statistics.connections == 0


async def test_a_consumers_cancel_during_the_drain(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that is done but not at its end is drained by its worker: a cancel of the consumer does not matter."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            await peer.send(STREAM_HEAD, chunks(WHOLE, end=b""))
            await trio.sleep(0.5)
            await peer.send(b"0\r\n\r\n")

    async with open_place(serve) as place:
        with trio.CancelScope() as scope:
            await place.read()
            scope.cancel()
        await trio.sleep(0.6)
        await place.check_clean()
        assert place.statistics.connections == 1
        assert await place.read() == "ab"
        assert place.statistics.opened == 1
