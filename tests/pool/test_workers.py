"""The pool: connections are reused and grown as needed, bounds hold, order is kept, results say what was sent."""

from __future__ import annotations

import math
import random
from contextlib import suppress

import pytest
import trio
import trio.testing
from pooled import Place, open_place, together
from scripted import Peer, PlayedStream, Request, Serve, answering, chat, error, reply

from gorouter_trio.config import PoolLimits, RetryPolicy, Seams
from gorouter_trio.errors import (
    AuthenticationError,
    BadRequestError,
    ConnectError,
    DeadlineExceededError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    OverloadedError,
    PoolClosedError,
    PoolFullError,
    ProviderError,
    RateLimitError,
    StreamBrokenError,
)
from gorouter_trio.pool.attempts import AttemptRecord
from gorouter_trio.wire.mail import HttpCall

NEVER = RetryPolicy(max_retries=0)


class Held:
    """A server that answers each request when it is told to; `running` are the requests that wait for it."""

    def __init__(self) -> None:
        self.running: dict[str, trio.Event] = {}
        self.order: list[str] = []

    async def serve(self, peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            name = request.json()["q"]
            self.order.append(name)
            self.running[name] = trio.Event()
            await self.running[name].wait()
            del self.running[name]
            await peer.send(chat(name))

    async def finish(self, name: str) -> None:
        self.running[name].set()
        await trio.testing.wait_all_tasks_blocked()


# --- connections ------------------------------------------------------------------------------------------------------


async def test_one_connection_for_one_after_another() -> None:
    """Requests that follow each other share one worker and one connection."""
    async with open_place(answering(lambda request: chat(request.json()["q"]))) as place:
        for number in range(20):
            assert (await place.ask(str(number))).text == str(number)
        s = place.statistics
        assert (s.workers, s.opened, s.answered, s.submitted) == (1, 1, 20, 20)
        await place.check_clean()


async def test_growth_only_when_needed_and_to_the_bound() -> None:
    """A worker more is started when all are busy, never above `max_connections`; the rest waits."""
    held = Held()
    async with open_place(held.serve, pool=PoolLimits(max_connections=3)) as place, trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(place.ask, str(number))
            await trio.testing.wait_all_tasks_blocked()
            s = place.statistics
            assert (s.workers, s.in_flight, s.queued) == (min(number + 1, 3), min(number + 1, 3), max(0, number - 2))
        assert len(place.network.ends) == 3
        for name in "012345":
            await held.finish(name)
        assert held.order == list("012345")
        assert place.statistics.opened == 3
        await place.check_clean()


async def test_the_connection_used_last_is_used_next() -> None:
    """After a burst the requests stay on the warmest connection; the others go cold."""
    held = Held()
    async with open_place(held.serve) as place:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(place.ask, name)
                await trio.testing.wait_all_tasks_blocked()
            for name in "acb":
                await held.finish(name)
        warmest = place.pool.idle[-1]
        for number in range(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(place.ask, str(number))
                await trio.testing.wait_all_tasks_blocked()
                assert warmest not in place.pool.idle
                await held.finish(str(number))
            assert place.pool.idle[-1] is warmest
        assert place.statistics.opened == 3


async def test_cold_connections_are_closed_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """A connection is closed when it was idle for `keepalive_s`, neither earlier nor later, and lives on when used."""
    held = Held()
    async with open_place(held.serve, pool=PoolLimits(keepalive_s=30)) as place:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(place.ask, name)
            await trio.testing.wait_all_tasks_blocked()
            for pause_s, name in ((0, "a"), (4, "b"), (4, "c")):
                await trio.sleep(pause_s)
                await held.finish(name)
        counts = []
        for until_s in (29.9, 30.1, 33.9, 34.1, 37.9):
            await trio.sleep_until(until_s)
            counts.append(place.statistics.connections)
        assert counts == [3, 2, 2, 1, 1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.ask, "d")
            await trio.testing.wait_all_tasks_blocked()
            await held.finish("d")
        await trio.sleep_until(67.8)
        assert (place.statistics.connections, place.statistics.opened) == (1, 3)
        await trio.sleep_until(68.0)
        assert (place.statistics.connections, place.network.open) == (0, 0)
        nobody = trio.current_time()
        await trio.sleep(10_000)
        assert trio.current_time() == nobody + 10_000
        await place.check_clean()


@pytest.mark.parametrize(("keepalive_s", "opened"), [(0, 3), (5, 2), (math.inf, 1)])
async def test_how_long_a_connection_is_kept(
    keepalive_s: float, opened: int, autojump_clock: trio.testing.MockClock
) -> None:
    """0 keeps none, infinity keeps all, and what was idle too long is not used even where nobody closed it yet."""
    limits = PoolLimits(keepalive_s=keepalive_s)
    async with open_place(answering(lambda request: chat()), pool=limits) as place:
        await place.ask()
        await trio.sleep(4)
        await place.ask()
        await trio.sleep(6)
        await place.ask()
        assert place.statistics.opened == opened


async def test_a_busy_connection_does_not_go_cold(autojump_clock: trio.testing.MockClock) -> None:
    """Only idleness makes a connection cold: one that goes from request to request is kept."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            await trio.sleep(4)
            await peer.send(chat())

    async with open_place(serve, pool=PoolLimits(max_connections=1, keepalive_s=10)) as place:
        await place.ask()
        await trio.sleep(5)
        await together(*[place.ask] * 12)
        assert trio.current_time() == 4 + 5 + 12 * 4
        assert place.statistics.opened == 1


async def test_a_connection_idle_too_long_is_not_used() -> None:
    """The worker itself looks at the time: that the closing task has not run yet is no reason to use it."""
    async with open_place(answering(lambda request: chat()), pool=PoolLimits(keepalive_s=30)) as place:
        await place.ask()
        (worker,) = place.pool.idle
        worker.idle_since -= 31
        await place.ask()
        assert place.statistics.opened == 2


@pytest.mark.parametrize(
    "raw",
    [
        reply(b"x", status=500),
        chat().replace(b"HTTP/1.1", b"HTTP/1.0"),
        chat().replace(b"200 X", b"200 X\r\nConnection: close"),
    ],
    ids=["an error", "1.0", "closing"],
)
async def test_connections_after_replies_of_each_kind(raw: bytes) -> None:
    """An error reply leaves the connection good; a reply that closes does not."""
    async with open_place(answering(lambda request: raw), retry=NEVER) as place:
        for _ in range(3):
            with suppress(ProviderError):
                await place.ask()
        assert place.statistics.opened == (1 if b"500" in raw else 3)
        await place.check_clean()


# --- the queue --------------------------------------------------------------------------------------------------------


async def test_order_in_the_queue_and_in_front_of_it() -> None:
    """First come, first served, also for callers that wait for room in the queue: nobody overtakes."""
    held = Held()
    limits = PoolLimits(max_connections=1, queue=3)
    names = [f"{number:02}" for number in range(30)]
    async with open_place(held.serve, pool=limits) as place, trio.open_nursery() as nursery:
        for name in names[:20]:
            nursery.start_soon(place.ask, name)
            await trio.testing.wait_all_tasks_blocked()
        assert (place.statistics.queued, place.statistics.waiting) == (3, 16)
        for late in names[20:]:
            # A new caller comes in the very moment in which there is room for those who wait.
            held.running[held.order[-1]].set()
            nursery.start_soon(place.ask, late)
            await trio.testing.wait_all_tasks_blocked()
            assert place.statistics.queued == 3
        while held.running:
            await held.finish(next(iter(held.running)))
        assert held.order == names
        await place.check_clean()


async def test_a_full_queue_that_rejects() -> None:
    """With `reject` the caller beyond the bound gets `PoolFullError` at once, and nothing of it is sent."""
    held = Held()
    limits = PoolLimits(max_connections=1, queue=2, overflow="reject")
    async with open_place(held.serve, pool=limits) as place, trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(place.ask, name)
            await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            with pytest.raises(PoolFullError, match=r"2 requests are queued already") as full:
                await place.ask("refused")
            assert (full.value.attempts, full.value.maybe_billed) == (0, False)
        await held.finish("a")
        nursery.start_soon(place.ask, "d")
        await trio.testing.wait_all_tasks_blocked()
        for name in "bcd":
            await held.finish(name)
        assert held.order == list("abcd")
        await place.check_clean()


async def test_callers_that_leave_make_room() -> None:
    """Cancelled in the queue or in front of it a caller's place goes to the next, and nothing of it is sent."""
    held = Held()
    limits = PoolLimits(max_connections=1, queue=2)
    scopes: dict[str, trio.CancelScope] = {}

    async def ask(place: Place, name: str) -> None:
        with trio.CancelScope() as scopes[name]:
            await place.ask(name)

    async with open_place(held.serve, pool=limits) as place, trio.open_nursery() as nursery:
        for name in "abcdefg":
            nursery.start_soon(ask, place, name)
            await trio.testing.wait_all_tasks_blocked()
        assert (place.statistics.queued, place.statistics.waiting) == (2, 4)
        scopes["b"].cancel()  # in the queue
        scopes["e"].cancel()  # in front of it
        await trio.testing.wait_all_tasks_blocked()
        assert (place.statistics.queued, place.statistics.waiting) == (2, 2)
        for name in "acdfg":
            await held.finish(name)
        assert held.order == list("acdfg")
        assert place.statistics.abandoned == 2
        await place.check_clean()


async def test_thousands_leave_the_queue_quickly() -> None:
    """A queue of thousands whose callers are all cancelled is empty in an instant."""
    held = Held()
    async with open_place(held.serve, pool=PoolLimits(max_connections=1, queue=10_000)) as place:
        async with trio.open_nursery() as nursery:
            for number in range(5_000):
                nursery.start_soon(place.ask, str(number))
            await trio.testing.wait_all_tasks_blocked()
            assert place.statistics.queued == 4_999
            nursery.cancel_scope.cancel()
        assert place.statistics.abandoned == 5_000
        await place.check_clean()


async def test_a_caller_that_is_cancelled_already_sends_nothing() -> None:
    """Nothing of a request goes out whose caller is cancelled before it begins, though a connection waits for it."""
    async with open_place(answering(lambda request: chat())) as place:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await place.ask("never")
            assert scope.cancelled_caught
            await place.check_clean()
            await place.ask("kept")
        assert [request.json()["q"] for request in place.network.requests] == ["kept"] * 3


# --- retries ----------------------------------------------------------------------------------------------------------


def script(*replies: bytes) -> Serve:
    """Answers in their order, the last one for ever."""
    left = list(replies)
    return answering(lambda request: left.pop(0) if len(left) > 1 else left[0])


@pytest.mark.parametrize(
    ("first", "attempts", "billed"),
    [
        (error(503), 2, False),
        (error(429), 2, False),
        (error(529), 2, False),
        (error(408), 2, False),
        (error(500), 2, False),
        (error(502), 2, False),
        (error(504), 2, True),
        (error(524), 2, True),
        (reply(b"\n         \n"), 2, True),
        (reply({"error": {"message": "m", "code": 503}}), 2, False),
        (reply({"error": {"message": "m", "code": 504}}), 2, True),
        (reply(b"<html><title>502</title>", status=502), 2, False),
    ],
)
async def test_a_failure_and_then_an_answer(
    first: bytes, attempts: int, billed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The answer of the second attempt says how many were sent, and whether the first may have been billed as well."""
    async with open_place(script(first, chat("second"))) as place:
        asked = await place.ask()
        assert (asked.text, asked.exchange.attempts, asked.exchange.state.maybe_billed) == ("second", attempts, billed)
        assert place.statistics.retries == attempts - 1
        assert place.statistics.retry_quota_tokens == 500
        assert place.statistics.opened == 1
        await place.check_clean()


@pytest.mark.parametrize(
    ("raw", "kind", "attempts", "billed"),
    [
        (error(503), OverloadedError, 4, False),
        (error(500), ProviderError, 3, False),
        (error(504), ProviderError, 2, True),
        (error(400), BadRequestError, 1, False),
        (error(402, limit_source="openrouter_credits"), InsufficientCreditsError, 1, False),
        (error(429, limit_source="openrouter_free_tier_daily"), RateLimitError, 1, False),
        (reply(b"{}"), DecodeError, 1, True),
        (reply(b"not json"), DecodeError, 1, True),
        (b"SSH-2.0\r\n", DecodeError, 1, True),
    ],
)
async def test_a_failure_for_ever(
    raw: bytes, kind: type[Exception], attempts: int, billed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """The error that is raised in the end says how many requests were sent, and whether one may have been billed."""
    async with open_place(script(raw)) as place:
        with pytest.raises(kind) as raised:
            await place.ask()
        found = raised.value
        assert (found.attempts, found.maybe_billed) == (attempts, billed)  # type: ignore[attr-defined]
        assert len(place.network.requests) == attempts
        await place.check_clean()


async def test_generation_ids() -> None:
    """The id in the header of the last reply is on the error, and on what is made of an answer."""
    raw = error(400, headers=["X-Generation-Id: gen-400"])
    async with open_place(script(raw)) as place:
        with pytest.raises(BadRequestError) as refused:
            await place.ask()
        assert refused.value.generation_id == "gen-400"
    cut = chat().replace(b"200 X", b"200 X\r\nX-Generation-Id: gen-cut")[:-5]

    async def serve(peer: Peer) -> None:
        await peer.request()
        await peer.send(cut)

    async with open_place(serve, retry=NEVER) as place:
        with pytest.raises(StreamBrokenError) as broken:
            await place.ask()
        assert (broken.value.generation_id, broken.value.maybe_billed) == ("gen-cut", True)


async def test_connecting_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    """Refused connections are retried, unbilled, until the retries are used up."""
    async with open_place(answering(lambda request: chat("there"))) as place:
        place.network.refuse += [OSError(111, "Connection refused")] * 3
        assert (await place.ask()).text == "there"
        place.network.refuse += [OSError(111, "Connection refused")] * 4
        for _, theirs in place.network.ends:
            theirs.close()
        place.pool.idle[-1].drop_connection()
        with pytest.raises(ConnectError, match="Connection refused") as refused:
            await place.ask()
        assert place.network.attempts == 1 + 3 + 4
        assert (refused.value.attempts, refused.value.maybe_billed) == (0, False)
        await place.check_clean()


async def test_a_kept_connection_that_the_server_closed() -> None:
    """A connection found closed by the next request costs a retry, no bill, and the request arrives once."""
    times = 0

    async def serve(peer: Peer) -> None:
        nonlocal times
        times += 1
        if await peer.request() is not None:
            await peer.send(chat(str(times)))

    async with open_place(serve, retry=RetryPolicy(ambiguous_retries=0, base_delay_s=0)) as place:
        for number in range(1, 6):
            asked = await place.ask()
            assert (asked.text, asked.exchange.state.maybe_billed) == (str(number), False)
        assert len(place.network.requests) == 5


async def test_waits_are_the_servers(autojump_clock: trio.testing.MockClock) -> None:
    """Retry-After is waited out in full; above the cap the error comes at once with the value."""
    async with open_place(script(error(429, headers=["Retry-After: 7"]), chat())) as place:
        started = trio.current_time()
        await place.ask()
        assert trio.current_time() - started == 7
    async with open_place(script(error(503, headers=["Retry-After: 121"]))) as place:
        started = trio.current_time()
        with pytest.raises(OverloadedError) as refused:
            await place.ask()
        assert (trio.current_time() - started, refused.value.retry_after_s, refused.value.attempts) == (0, 121.0, 1)


async def test_a_date_is_read_by_the_wall_clock(autojump_clock: trio.testing.MockClock) -> None:
    """A Retry-After that is a date is measured against the wall clock of the settings."""
    raw = error(503, headers=["Retry-After: Sun, 06 Nov 1994 08:50:07 GMT"])
    seams = Seams(wall=lambda: 784_111_777.0)
    async with open_place(script(raw, chat()), seams=seams) as place:
        started = trio.current_time()
        await place.ask()
        assert trio.current_time() - started == 30


async def test_no_wait_past_the_callers_deadline(autojump_clock: trio.testing.MockClock) -> None:
    """A wait that would not end in time is not begun, be it the call's deadline or the caller's scope."""
    raw = error(429, headers=["Retry-After: 7"])
    async with open_place(script(raw)) as place:
        started = trio.current_time()
        with pytest.raises(RateLimitError):
            await place.ask(deadline=started + 6)
        with pytest.raises(RateLimitError), trio.fail_after(6):
            await place.ask()
        assert trio.current_time() == started
        with pytest.raises(RateLimitError) as second, trio.fail_after(8):
            await place.ask()
        # It waited for the end of the pause that the first was given, and was told to wait as long again.
        assert (trio.current_time() - started, second.value.attempts) == (7, 1)
        await place.check_clean()


async def test_a_backoff_holds_no_worker(autojump_clock: trio.testing.MockClock) -> None:
    """While one request waits to be sent again, others use the only connection."""

    def answer(request: Request) -> bytes:
        if request.json()["q"] == "again" and request.number == 0:
            return error(503)
        return chat(request.json()["q"])

    policy = RetryPolicy(base_delay_s=60, max_delay_s=60)
    async with open_place(answering(answer), pool=PoolLimits(max_connections=1), retry=policy) as place:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.ask, "again")
            await trio.testing.wait_all_tasks_blocked()
            for number in range(5):
                assert (await place.ask(str(number))).text == str(number)
            assert trio.current_time() == 0
        assert [request.json()["q"] for request in place.network.requests] == ["again", *"01234", "again"]


async def test_an_outage_is_not_amplified(autojump_clock: trio.testing.MockClock, record_property) -> None:
    """60 s of nothing but 502 at 200 a second, and no breaker: at most 1.1 sent for each asked, then it recovers."""
    down = True
    asked = 12_000
    failed = 0

    async def ask(place: Place) -> None:
        nonlocal failed
        try:
            await place.ask()
        except ProviderError:
            failed += 1

    serve = answering(lambda request: error(502) if down else chat())
    async with open_place(serve, seams=Seams(random=random.Random(3)), breaker=None) as place:
        async with trio.open_nursery() as nursery:
            for _ in range(asked):
                nursery.start_soon(ask, place)
                await trio.sleep(0.005)
        sent = len(place.network.requests)
        assert failed == asked
        assert asked < sent <= asked * 1.01
        record_property("figure", f"{sent / asked:.4f} requests sent for each asked in an outage of 60 s")
        down = False
        for _ in range(600):
            await place.ask()
        assert place.statistics.retry_quota_tokens == 500
        await place.check_clean()


async def test_some_failures_are_retried_away(autojump_clock: trio.testing.MockClock) -> None:
    """With one reply in ten failing, nearly all requests succeed at little more than one sent for each."""
    rng = random.Random(11)
    serve = answering(lambda request: error(503) if rng.random() < 0.1 else chat())
    failed = 0
    async with open_place(serve, seams=Seams(random=rng)) as place:
        for _ in range(1_000):
            try:
                await place.ask()
            except OverloadedError:
                failed += 1
        assert failed <= 2
        assert len(place.network.requests) <= 1_200


async def test_a_calls_own_limit_of_ambiguous_retries(autojump_clock: trio.testing.MockClock) -> None:
    """A call may allow fewer retries after which the request may have been processed twice."""
    async with open_place(script(error(504))) as place:
        for limit, attempts in ((0, 1), (2, 3), (None, 2)):
            with pytest.raises(ProviderError) as raised:
                await place.ask(ambiguous_retries=limit)
            assert raised.value.attempts == attempts


# --- failures of others -----------------------------------------------------------------------------------------------


async def test_a_bug_in_a_transport_fails_its_request_alone() -> None:
    """An exception that nobody expects reaches the caller as itself; the worker serves the next request."""

    class Buggy:
        def __init__(self) -> None:
            self.calls = 0
            self.place: Place

        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            self.calls += 1
            if self.calls % 2:
                raise RuntimeError("a bug of somebody's")
            return await self.place.network.connect(host, port)

    buggy = Buggy()
    async with open_place(answering(lambda request: chat()), transport=buggy) as place:
        buggy.place = place
        for _ in range(3):
            with pytest.raises(RuntimeError, match="a bug of somebody's"):
                await place.ask()
            assert (await place.ask()).text == "hello"
            place.pool.idle[-1].drop_connection()
        await place.check_clean()


async def test_a_bug_in_a_stream_costs_its_connection() -> None:
    """The connection of a stream that raises something unexpected is closed at once."""

    class Network:
        def __init__(self) -> None:
            self.streams: list[PlayedStream] = []

        async def connect(self, host: str, port: int) -> trio.abc.Stream:
            await trio.lowlevel.checkpoint()
            self.streams.append(PlayedStream([chat()[:30], RuntimeError("a bug of somebody's")]))
            return self.streams[-1]

    network = Network()
    async with open_place(answering(lambda request: chat()), transport=network) as place:
        for count in (1, 2):
            with pytest.raises(RuntimeError, match="a bug of somebody's"):
                await place.ask()
            await trio.testing.wait_all_tasks_blocked()
            assert [stream.is_closed for stream in network.streams] == [True] * count
            assert (place.statistics.connections, place.statistics.in_flight) == (0, 0)


async def test_a_reply_over_the_limit_costs_its_connection() -> None:
    """A reply that is refused for its size ends its connection, also when it had arrived to its end."""
    limits = PoolLimits(max_body_bytes=2048)
    async with open_place(answering(lambda request: chat("x" * 3000)), pool=limits) as place:
        with pytest.raises(DecodeError, match="over 2048 bytes") as refused:
            await place.ask()
        assert refused.value.maybe_billed
        await place.check_clean()
        assert place.statistics.connections == 0


async def test_a_bug_in_the_decoding_reaches_the_caller() -> None:
    """What `decode` raises that is no error of ours passes as it is, and leaves the connection good."""
    async with open_place(answering(lambda request: reply(b"x"))) as place:

        def broken(exchange: object) -> None:
            raise RuntimeError("a bug of the caller's")

        for _ in range(2):
            with pytest.raises(RuntimeError, match="a bug of the caller's"):
                await place.pool.request(HttpCall(), broken)
        assert place.statistics.opened == 1
        await place.check_clean()


# --- closing ----------------------------------------------------------------------------------------------------------


async def test_closing_answers_everybody() -> None:
    """Queued requests, those in front of the queue and running ones get `PoolClosedError`; no task is left."""
    held = Held()
    ends: dict[str, PoolClosedError] = {}

    async def ask(place: Place, name: str) -> None:
        with pytest.raises(PoolClosedError) as closed:
            await place.ask(name)
        ends[name] = closed.value

    async with trio.open_nursery() as nursery:
        before = trio.lowlevel.current_statistics().tasks_living
        async with open_place(held.serve, pool=PoolLimits(max_connections=1, queue=1)) as place:
            for name in "abc":
                nursery.start_soon(ask, place, name)
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert set(ends) == set("abc")
        assert {name: e.maybe_billed for name, e in ends.items()} == {"a": True, "b": False, "c": False}
        assert {name: e.attempts for name, e in ends.items()} == {"a": 1, "b": 0, "c": 0}
        assert trio.lowlevel.current_statistics().tasks_living == before
        assert place.network.open == 0
        with pytest.raises(PoolClosedError):
            await place.ask("late")
        assert "closed" in repr(place.pool)


async def test_closing_while_connecting() -> None:
    """A request whose connection is still being made was not sent, and cannot have been billed."""
    ends: list[PoolClosedError] = []

    async def ask(place: Place) -> None:
        with pytest.raises(PoolClosedError) as closed:
            await place.ask()
        ends.append(closed.value)

    async with trio.open_nursery() as nursery, open_place(answering(lambda request: chat())) as place:
        place.network.connect_s = math.inf
        nursery.start_soon(ask, place)
        await trio.testing.wait_all_tasks_blocked()
    assert [e.maybe_billed for e in ends] == [False]


async def test_closing_during_a_backoff(autojump_clock: trio.testing.MockClock) -> None:
    """A request that waits to be sent again hears at once that the pool is closed."""
    serve = answering(lambda request: error(503, headers=["Retry-After: 5"]))
    began = trio.current_time()
    async with trio.open_nursery() as nursery, open_place(serve) as place:

        @nursery.start_soon
        async def ask() -> None:
            with pytest.raises(PoolClosedError):
                await place.ask()

        await trio.testing.wait_all_tasks_blocked()
    assert trio.current_time() - began < 1


async def test_reprs_show_the_state() -> None:
    """The pool's repr counts what it does."""
    held = Held()
    async with open_place(held.serve, pool=PoolLimits(max_connections=1)) as place, trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(place.ask, name)
            await trio.testing.wait_all_tasks_blocked()
        assert repr(place.pool) == "<Pool open: 1 in flight, 1 queued, 1 connections>"
        await held.finish("a")
        await held.finish("b")
    assert repr(place.pool).startswith("<Pool closed: 0 in flight")


async def test_requests_together() -> None:
    """Many at a time over few connections are each answered with their own reply."""
    async with open_place(answering(lambda r: chat(r.json()["q"])), pool=PoolLimits(max_connections=7)) as place:

        async def ask(name: str) -> None:
            for number in range(10):
                assert (await place.ask(f"{name}-{number}")).text == f"{name}-{number}"

        await together(*(lambda name=str(n): ask(name) for n in range(40)))
        assert place.statistics.answered == 400
        assert place.statistics.opened <= 7
        await place.check_clean()


def close_slowly(connection: object) -> None:
    """Closing takes its time, as it may with a transport of the user's."""

    class Slow(type(connection)):  # type: ignore[misc]  # whatever it is
        __slots__ = ()

        async def aclose(self) -> None:
            self.close()
            await trio.sleep(0.5)

    connection.__class__ = Slow


async def test_a_connection_that_is_used_again_is_not_closed(autojump_clock: trio.testing.MockClock) -> None:
    """Those that are cold are closed one after the other; one that is given a request meanwhile is not."""

    async def serve(peer: Peer) -> None:
        while await peer.request() is not None:
            await trio.sleep(1)
            await peer.send(chat())

    async with open_place(serve, pool=PoolLimits(keepalive_s=10), retry=RetryPolicy(max_retries=0)) as place:
        await together(*[place.ask] * 3)
        for worker in place.pool.idle:
            close_slowly(worker.connection)
        await trio.sleep(10.1)
        await together(*[place.ask] * 3)
        await place.check_clean()


async def test_what_comes_before_the_queue_has_an_end(autojump_clock: trio.testing.MockClock) -> None:
    """A function that does not give a key is waited for until the request's deadline, or the end of the client."""

    async def hangs() -> str:
        await trio.sleep_forever()
        return ""

    errors: list[Exception] = []

    async def ask(deadline: float) -> None:
        try:
            await place.ask(deadline=deadline)
        except GorouterError as exc:
            errors.append(exc)

    async with trio.open_nursery() as nursery:
        async with open_place(answering(lambda r: chat()), api_key=hangs) as place:
            nursery.start_soon(ask, 5)
            nursery.start_soon(ask, math.inf)
            await trio.sleep(10)
            assert [type(error) for error in errors] == [DeadlineExceededError]
        await trio.sleep(1)
        assert [type(error) for error in errors] == [DeadlineExceededError, PoolClosedError]


async def test_a_closed_client_asks_for_no_key() -> None:
    """The function is not called, so that nothing of it is left unawaited."""
    asked = []

    async def gives() -> str:
        return "sk-test"

    def ask() -> object:
        asked.append(True)
        return gives()

    async with open_place(answering(lambda r: chat()), api_key=ask) as place:
        await place.ask()
    with pytest.raises(PoolClosedError):
        await place.ask()
    assert len(asked) == 1


# --- refusals whose body does not come --------------------------------------------------------------------------------

SPOILED = {
    "cut": b"Content-Length: 100\r\n\r\n{",
    "cut in a chunk": b"Transfer-Encoding: chunked\r\n\r\n9\r\n{",
    "no gzip": b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello",
    "late": b"Content-Length: 100\r\n\r\n{",
}


def spoiled(head: bytes, how: str) -> Serve:
    """Refuses a request of each connection with `head` and a body that is spoiled so; later ones are answered."""
    seen: list[object] = []

    async def serve(peer: Peer) -> None:
        request = await peer.request()
        assert request is not None
        seen.append(request)
        if len(seen) > 1:
            await peer.send(chat("well"))
            return
        await peer.send(b"HTTP/1.1 " + head + b"\r\n" + SPOILED[how])
        if how == "late":
            await peer.wait_gone()

    return serve


@pytest.mark.parametrize("how", SPOILED)
async def test_a_refusal_holds_without_its_body(how: str, autojump_clock: trio.testing.MockClock) -> None:
    """A limit with the time to wait, or a key that is refused, is that, was sent once, and is not held to be billed."""
    for head, kind, wait_s in (
        (b"429 Too Many Requests\r\nRetry-After: 300", RateLimitError, 300.0),
        (b"401 Unauthorized", AuthenticationError, None),
    ):
        records: list[AttemptRecord] = []
        async with open_place(spoiled(head, how), on_attempt=records.append) as place:
            with pytest.raises(kind) as raised:
                await place.ask()
            assert (raised.value.retry_after_s, raised.value.maybe_billed, raised.value.attempts) == (wait_s, False, 1)
            assert [(record.status, record.maybe_billed) for record in records] == [(raised.value.status, False)]
            assert len(place.network.requests) == 1
            await place.check_clean()


@pytest.mark.parametrize("how", SPOILED)
async def test_a_refusal_without_its_body_is_sent_again(how: str, autojump_clock: trio.testing.MockClock) -> None:
    """What may be sent again after a refusal is, when the refusal says so."""
    async with open_place(spoiled(b"503 Service Unavailable\r\nRetry-After: 2", how)) as place:
        assert (await place.ask()).text == "well"
        first, second = place.network.times
        assert second - first >= 2
        await place.check_clean()


async def test_a_late_refusal_is_over_with_its_request(autojump_clock: trio.testing.MockClock) -> None:
    """A body that keeps a request beyond its deadline ends it there, and a cancel is a cancel."""
    async with open_place(spoiled(b"503 Service Unavailable", "late")) as place:
        with pytest.raises(DeadlineExceededError) as late:
            await place.ask(deadline=trio.current_time() + 4)
        assert late.value.phase == "total"
        await place.check_clean()
    async with open_place(spoiled(b"503 Service Unavailable", "late")) as place:
        with trio.move_on_after(4) as scope:
            await place.ask()
        assert scope.cancelled_caught
        await place.check_clean()
