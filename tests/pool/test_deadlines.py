"""The keeper of deadlines against a naive model, and every deadline of a request, exact to the tick in virtual time."""

from __future__ import annotations

import math
import random

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from pooled import Place, open_place
from scripted import COMMENT, STREAM_HEAD, Peer, answering, chat, delta

from gorouter_trio.config import Deadlines, PoolLimits, RetryPolicy
from gorouter_trio.errors import DeadlineExceededError, DeadlinePhase
from gorouter_trio.pool.deadlines import DeadlineKeeper

ONCE = RetryPolicy(max_retries=0)
LIMITS = Deadlines(connect_s=3, headers_s=5, first_data_s=7, data_idle_s=11, total_s=100)


# --- the keeper -------------------------------------------------------------------------------------------------------


class Item:
    """Something watched; notes when it expired."""

    def __init__(self, keeper: DeadlineKeeper) -> None:
        self.keeper = keeper
        self.deadline_at = math.inf
        self.expired_at: list[float] = []

    def expire(self) -> None:
        self.expired_at.append(trio.current_time())

    def set(self, deadline: float) -> None:
        """As a worker does it."""
        self.deadline_at = deadline
        if deadline < self.keeper.next_wake:
            self.keeper.hurry(deadline)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 5).map(lambda s: round(s, 2)),
        st.integers(0, 4),
        st.one_of(st.just(math.inf), st.floats(-2, 8).map(lambda s: round(s, 2))),
    ),
    max_size=25,
)


@given(steps=STEPS)
def test_the_keeper_against_a_naive_model(steps: list[tuple[float, int, float]]) -> None:
    """Deadlines set, moved and cleared at any time: each that is not replaced before it passes expires at its time."""
    trio.run(_compare, steps, clock=trio.testing.MockClock(autojump_threshold=0))


async def _compare(steps: list[tuple[float, int, float]]) -> None:
    items: list[Item] = []
    keeper = DeadlineKeeper(items)
    items += [Item(keeper) for _ in range(5)]
    expected: list[list[float]] = [[] for _ in items]
    pending = [math.inf] * 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        for pause_s, which, ahead_s in [*steps, (20.0, 0, math.inf)]:
            # Half a step aside: nothing is set at an instant at which something is due, whose order nobody promises.
            await trio.sleep(pause_s + 0.005 * (pause_s > 0))
            now = trio.current_time()
            _expire(pending, expected, now)
            await trio.testing.wait_all_tasks_blocked()
            items[which].set(now + ahead_s)
            pending[which] = now + ahead_s
            if ahead_s <= 0:
                expected[which].append(now)
                pending[which] = math.inf
                await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [item.expired_at for item in items] == [pytest.approx(times) for times in expected]


def _expire(pending: list[float], expected: list[list[float]], now: float) -> None:
    for which, deadline in enumerate(pending):
        if deadline <= now:
            expected[which].append(deadline)
            pending[which] = math.inf


async def test_the_keeper_wakes_rarely(autojump_clock: trio.testing.MockClock, rng: random.Random) -> None:
    """10,000 deadlines that are set and cleared before they pass wake the keeper a few times, not 10,000."""
    wakes = 0

    class Counted(DeadlineKeeper):
        def _expire_due(self, now: float) -> float:
            nonlocal wakes
            wakes += 1
            return super()._expire_due(now)

    items: list[Item] = []
    keeper = Counted(items)
    items += [Item(keeper) for _ in range(20)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        for _ in range(10_000):
            item = rng.choice(items)
            item.set(trio.current_time() + 90)
            await trio.sleep(0.01)
            item.deadline_at = math.inf
        nursery.cancel_scope.cancel()
    assert not any(item.expired_at for item in items)
    assert wakes <= 5


# --- the phases of a request ------------------------------------------------------------------------------------------


async def late(place: Place, *, streamed: bool = False) -> tuple[DeadlineExceededError, float]:
    """The error of a request that is too late, and after how long it came."""
    started = trio.current_time()
    with pytest.raises(DeadlineExceededError) as raised:
        await (place.read() if streamed else place.ask())
    return raised.value, trio.current_time() - started


async def _silent(peer: Peer) -> None:
    await peer.request()
    await peer.wait_gone()


async def _padding(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await peer.send(b"b\r\n\n         \n\r\n")
        await trio.sleep(1)


async def _comments(peer: Peer) -> None:
    await peer.request()
    await peer.send(STREAM_HEAD)
    while True:
        await peer.send(b"%x\r\n%b\r\n" % (len(COMMENT), COMMENT))
        await trio.sleep(1)


async def _comments_after_data(peer: Peer) -> None:
    await peer.request()
    await peer.send(STREAM_HEAD)
    for event in [delta(), delta("a"), COMMENT, delta("b")]:
        await peer.send(b"%x\r\n%b\r\n" % (len(event), event))
        await trio.sleep(2)
    while True:
        await peer.send(b"%x\r\n%b\r\n" % (len(COMMENT), COMMENT))
        await trio.sleep(1)


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_connect(streamed: bool, autojump_clock: trio.testing.MockClock) -> None:
    """Connecting ends at its deadline; nothing was sent, nothing can have been billed."""
    async with open_place(_silent, deadlines=LIMITS, retry=ONCE) as place:
        place.network.connect_s = math.inf
        error, after_s = await late(place, streamed=streamed)
        assert (error.phase, after_s, error.maybe_billed, error.attempts) == ("connect", 3, False, 0)
        await place.check_clean()


@pytest.mark.parametrize("streamed", [False, True], ids=["plain", "streamed"])
async def test_headers(streamed: bool, autojump_clock: trio.testing.MockClock) -> None:
    """A server that says nothing is given up at the headers' deadline, counted from the request; it may bill."""
    async with open_place(_silent, deadlines=LIMITS, retry=ONCE) as place:
        place.network.connect_s = 2
        error, after_s = await late(place, streamed=streamed)
        assert (error.phase, after_s, error.maybe_billed) == ("headers", 2 + 5, True)
        await place.check_clean()


async def test_padding_is_not_data(autojump_clock: trio.testing.MockClock) -> None:
    """A plain reply that is padded for ever ends at the deadline of its first data."""
    async with open_place(_padding, deadlines=LIMITS, retry=ONCE) as place:
        error, after_s = await late(place)
        assert (error.phase, after_s, error.maybe_billed) == ("first_data", 7, True)
        await place.check_clean()


async def test_comments_are_not_data(autojump_clock: trio.testing.MockClock) -> None:
    """A stream of nothing but comments ends at the deadline of its first data."""
    async with open_place(_comments, deadlines=LIMITS, retry=ONCE) as place:
        error, after_s = await late(place, streamed=True)
        assert (error.phase, after_s, error.maybe_billed) == ("first_data", 7, True)
        await place.check_clean()


async def test_data_idle(autojump_clock: trio.testing.MockClock) -> None:
    """Between two data events only data counts; the text that had come is in the error."""
    async with open_place(_comments_after_data, deadlines=LIMITS, retry=ONCE) as place:
        error, after_s = await late(place, streamed=True)
        assert (error.phase, after_s, error.maybe_billed) == ("data_idle", 3 * 2 + 11, True)
        assert error.partial is not None
        assert (error.partial.text, error.partial.interrupted) == ("ab", True)
        await place.check_clean()


async def test_the_consumers_own_time_is_not_idleness(autojump_clock: trio.testing.MockClock) -> None:
    """A consumer may take longer between two reads than the server may between two events."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD)
        for event in [delta("a"), delta("b"), delta("c", "stop"), b"data: [DONE]\n\n"]:
            await peer.send(b"%x\r\n%b\r\n" % (len(event), event))
            await trio.sleep(10)
        await peer.send(b"0\r\n\r\n")

    async with open_place(serve, deadlines=LIMITS, retry=ONCE) as place, place.stream() as reader:
        while await reader.read():
            await trio.sleep(25)
        assert reader.result().text == "abc"


@pytest.mark.parametrize("serve", [_silent, _padding], ids=["headers", "padding"])
async def test_total(serve: object, autojump_clock: trio.testing.MockClock) -> None:
    """The total deadline, or a nearer one of the call, cuts every phase and is not retried."""
    limits = Deadlines(connect_s=30, headers_s=50, first_data_s=70, total_s=20)
    async with open_place(serve, deadlines=limits) as place:  # type: ignore[arg-type]
        error, after_s = await late(place)
        assert (error.phase, after_s, error.maybe_billed, error.attempts) == ("total", 20, True, 1)
        started = trio.current_time()
        with pytest.raises(DeadlineExceededError) as nearer:
            await place.ask(deadline=started + 4)
        assert (nearer.value.phase, trio.current_time() - started) == ("total", 4)
        place.network.connect_s = math.inf
        error, after_s = await late(place)
        assert (error.phase, after_s, error.maybe_billed) == ("total", 20, False)
        await place.check_clean()


async def test_total_of_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    """A stream that goes on and on ends at the total deadline."""

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(STREAM_HEAD)
        while True:
            event = delta("x")
            await peer.send(b"%x\r\n%b\r\n" % (len(event), event))
            await trio.sleep(2)

    async with open_place(serve, deadlines=LIMITS) as place:
        error, after_s = await late(place, streamed=True)
        assert (error.phase, after_s) == ("total", 100)
        assert error.partial is not None
        assert error.partial.text == "x" * 50
        await place.check_clean()


async def test_queue(autojump_clock: trio.testing.MockClock) -> None:
    """A request that no worker took before its deadline ends in the queue, just then, and harms no other."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            await trio.sleep(80)
            await peer.send(chat("slow"))

    limits = Deadlines(headers_s=90, total_s=100)
    ended: list[tuple[DeadlinePhase, float, bool, int]] = []

    async def too_late(place: Place, deadline: float) -> None:
        with pytest.raises(DeadlineExceededError) as raised:
            await place.ask(deadline=deadline)
        error = raised.value
        ended.append((error.phase, trio.current_time() - started, error.maybe_billed, error.attempts))

    pool = PoolLimits(max_connections=1, queue=1)
    async with open_place(serve, deadlines=limits, pool=pool) as place:
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def first() -> None:
                assert (await place.ask()).text == "slow"

            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(too_late, place, started + 5)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(too_late, place, started + 6)
            nursery.start_soon(too_late, place, started + 90)
            await trio.testing.wait_all_tasks_blocked()
            assert (place.statistics.queued, place.statistics.waiting) == (1, 2)
        # The last one was taken at 80 and sent: that is no longer the queue.
        assert ended == [("queue", 5, False, 0), ("queue", 6, False, 0), ("total", 90, True, 1)]
        await place.check_clean()


@pytest.mark.parametrize(("pause_s", "answers"), [(0.9, True), (1.5, False)])
async def test_a_long_request_has_longer(autojump_clock: trio.testing.MockClock, pause_s: float, answers: bool) -> None:
    """A second for every 64 KiB: a slow line is enough, and one that hardly moves is given up."""
    size = 1 << 20

    async def serve(peer: Peer) -> None:
        rest = size
        while rest > 0 and (piece := await peer.stream.receive_some(65_536)):
            rest -= len(piece)
            await trio.sleep(pause_s)
        if rest <= 0:
            await peer.send(chat("in time"))

    async with open_place(serve, deadlines=Deadlines(headers_s=3), retry=ONCE) as place:
        if answers:
            assert (await place.ask("x" * size)).text == "in time"
            assert 14 < trio.current_time() < 19
        else:
            with pytest.raises(DeadlineExceededError) as raised:
                await place.ask("x" * size)
            assert (raised.value.phase, trio.current_time()) == ("headers", 3 + 16)
        await place.check_clean()


async def test_deadlines_across_retries(autojump_clock: trio.testing.MockClock) -> None:
    """Each attempt has its own phases; the total holds for all of them together, waits included."""
    limits = Deadlines(headers_s=5, total_s=12)
    policy = RetryPolicy(max_retries=9, ambiguous_retries=9, base_delay_s=0)
    async with open_place(_silent, deadlines=limits, retry=policy) as place:
        error, after_s = await late(place)
        assert (error.phase, after_s, error.attempts, error.maybe_billed) == ("total", 12, 3, True)
        assert [round(at - place.network.times[0]) for at in place.network.times] == [0, 5, 10]
        await place.check_clean()


async def test_a_deadline_in_the_past(autojump_clock: trio.testing.MockClock) -> None:
    """A request whose time is up before it begins takes none, and is not sent."""
    async with open_place(answering(lambda request: chat())) as place:
        await place.ask()
        started = trio.current_time()
        for deadline in (started, started - 5, -math.inf):
            with pytest.raises(DeadlineExceededError) as raised:
                await place.ask(deadline=deadline)
            assert raised.value.phase == "total"
        assert trio.current_time() == started
        assert len(place.network.requests) == 1
        await place.check_clean()


async def test_an_answer_at_the_last_moment(autojump_clock: trio.testing.MockClock) -> None:
    """Replies around each deadline: before it they are answers, after it errors, and never anything else."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            await trio.sleep(request.json()["q"])
            await peer.send(chat("in time"))

    async with open_place(serve, deadlines=Deadlines(headers_s=5), retry=ONCE) as place:
        for delay_s in (4.9, 4.999, 5.001, 5.1):
            if delay_s < 5:
                assert (await place.ask(delay_s)).text == "in time"  # type: ignore[arg-type]
            else:
                with pytest.raises(DeadlineExceededError):
                    await place.ask(delay_s)  # type: ignore[arg-type]
        await place.check_clean()
