"""Admission in the pool: rates, pauses, latches, breakers and holds decide what goes out when; virtual time."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
import trio
import trio.testing
from pooled import Asked, Place, open_place, together
from scripted import DONE, Network, Peer, Request, answering, chat, delta, error, reply, stream
from source_tree import REPOSITORY

from gorouter_trio.config import BreakerPolicy, ClientConfig, PoolLimits, RateLimits, RetryPolicy, Seams
from gorouter_trio.errors import (
    CircuitOpenError,
    DeadlineExceededError,
    GorouterError,
    InsufficientCreditsError,
    OverloadedError,
    PoolFullError,
    ProviderError,
    RateLimitError,
)
from gorouter_trio.testing import World, run

NEVER = RetryPolicy(max_retries=0)
UPSTREAM = {"provider_name": "P", "limit_source": "upstream_provider_shared_pool"}


def fine(request: Request) -> bytes:
    return chat(request.json()["q"])


def times(network: Network) -> list[float]:
    return [round(at, 6) for at in network.times]


async def at_once(place: Place, count: int, *, lane: str = "interactive") -> list[GorouterError]:
    """So many requests at a time; the errors that they ended with."""
    errors: list[GorouterError] = []

    async def one(number: int) -> None:
        try:
            await place.ask(str(number), lane=lane)
        except GorouterError as exc:
            errors.append(exc)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
    return errors


# --- rates ------------------------------------------------------------------------------------------------------------


async def test_requests_go_out_at_their_rate(autojump_clock: trio.testing.MockClock) -> None:
    """60 a minute, nothing left unused: one a second, in order, and whoever waited says how long."""
    rates = RateLimits(requests_per_minute=60, margin=0)
    asked: list[Asked] = []
    async with open_place(answering(fine), rates=rates) as place:

        async def one(number: int) -> None:
            asked.append(await place.ask(str(number)))

        await together(*(lambda n=n: one(n) for n in range(5)))
        assert times(place.network) == [0, 1, 2, 3, 4]
        assert [a.text for a in asked] == list("01234")
        assert [round(a.exchange.queue_wait_s, 6) for a in asked] == [0, 1, 2, 3, 4]
        lane = place.statistics.lanes[0]
        assert (lane.name, lane.queued, lane.admitted, lane.wait_max_s) == ("interactive", 0, 5, 4)
        assert lane.wait_mean_s == pytest.approx(2)
        assert 2 <= lane.wait_p50_s <= 4
        await place.check_clean()


async def test_a_models_rate_holds_nobody_else(autojump_clock: trio.testing.MockClock) -> None:
    """A model at its limit waits; requests for another one, later in the queue, go at once."""
    rates = RateLimits(models={"slow": RateLimits(requests_per_minute=1, margin=0)})
    async with open_place(answering(fine), rates=rates) as place, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: place.ask("s", model="slow"))
            await trio.testing.wait_all_tasks_blocked()
        assert place.statistics.models[0].held_by == "requests_per_minute of the model"
        for _ in range(10):
            await place.ask("f", model="fast")
        assert trio.current_time() == 0
        assert place.statistics.queued == 2
        nursery.cancel_scope.cancel()
    # Two of the three were never sent.
    assert Counter(r.json()["q"] for r in place.network.requests) == {"s": 1, "f": 10}


async def test_tokens_are_estimated_and_put_right(autojump_clock: trio.testing.MockClock) -> None:
    """600 tokens a minute: an estimate of 100 a request is one in ten seconds; used are 20, and it becomes five."""
    rates = RateLimits(tokens_per_minute=600, margin=0, burst=0)
    usage = {"prompt_tokens": 15, "completion_tokens": 5, "total_tokens": 20, "cost": 0.1}
    serve = answering(lambda request: chat(usage=usage))
    async with open_place(serve, rates=rates, estimate=lambda call: 100) as place:
        for _ in range(50):
            await place.ask()
        late = times(place.network)
        assert late[-1] - late[-6] == pytest.approx(10, rel=0.05)
        (model,) = place.statistics.models
        assert model.token_scale == pytest.approx(0.2, rel=0.05)


async def test_the_worst_case_is_not_given_back(autojump_clock: trio.testing.MockClock) -> None:
    """Where a server counts the estimate, the usage changes nothing."""
    rates = RateLimits(tokens_per_minute=600, margin=0, burst=0, counted_tokens="worst_case")
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    async with open_place(answering(lambda r: chat(usage=usage)), rates=rates, estimate=lambda call: 100) as place:
        for _ in range(4):
            await place.ask()
        assert times(place.network) == pytest.approx([0, 10, 20, 30])


async def test_the_default_estimate(autojump_clock: trio.testing.MockClock) -> None:
    """A quarter of the body's bytes, and `max_tokens`, or what the settings say where there is none."""
    rates = RateLimits(tokens_per_minute=6_000, margin=0, burst=0, completion_tokens=400, counted_tokens="worst_case")
    async with open_place(answering(fine), rates=rates) as place:
        for max_tokens in (1_000, None, 0, None):
            await place.ask("x" * 392, max_tokens=max_tokens)
        assert times(place.network) == pytest.approx([0, 11, 16, 17])


@pytest.mark.parametrize("status", [429, 503, 400])
async def test_tokens_of_refused_requests_are_given_back(status: int, autojump_clock: trio.testing.MockClock) -> None:
    """What was not worked on used nothing: the next request does not wait for it."""
    rates = RateLimits(tokens_per_minute=60, margin=0, burst=0)
    serve = answering(lambda r: chat() if r.number else error(status, headers=["Retry-After: 1"]))
    async with open_place(serve, rates=rates, retry=NEVER, estimate=lambda call: 600) as place:
        with pytest.raises(GorouterError):
            await place.ask()
        await place.ask()
        assert trio.current_time() <= 1


async def test_what_was_never_sent_takes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A caller that leaves while its connection is being made gives its turn back."""
    rates = RateLimits(requests_per_minute=1, margin=0)
    async with open_place(answering(fine), rates=rates) as place:
        place.network.connect_s = 0.5
        with trio.move_on_after(0.1):
            await place.ask()
        await place.ask()
        assert trio.current_time() < 2
        assert len(place.network.requests) == 1
        await place.check_clean()


async def test_requests_in_flight_of_a_key(autojump_clock: trio.testing.MockClock) -> None:
    """`max_in_flight` bounds a key over all models, and a model within it."""
    most = Counter[str]()
    running = Counter[str]()

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            name = request.json()["q"]
            running[name] += 1
            running["all"] += 1
            for key in (name, "all"):
                most[key] = max(most[key], running[key])
            await trio.sleep(1)
            running[name] -= 1
            running["all"] -= 1
            await peer.send(chat())

    rates = RateLimits(max_in_flight=5, models={"m": RateLimits(max_in_flight=2)})
    async with open_place(serve, rates=rates) as place:
        await together(
            *(lambda: place.ask("m", model="m") for _ in range(12)),
            *(lambda: place.ask("n", model="n") for _ in range(12)),
        )
        assert most["all"] == 5
        assert most["m"] == 2
        # The model alone needs six; whenever a slot is free it may as well be the other's turn.
        assert 6 <= trio.current_time() <= 8
        await place.check_clean()


async def test_endpoints_that_are_no_chat_are_not_limited(autojump_clock: trio.testing.MockClock) -> None:
    """A GET passes whatever the rates and the breaker say."""
    rates = RateLimits(requests_per_minute=1, max_in_flight=1)
    async with open_place(answering(fine), rates=rates) as place:
        for _ in range(20):
            await place.ask(method="GET")
        assert trio.current_time() == 0


# --- pauses -----------------------------------------------------------------------------------------------------------


def once(first: bytes, *, model_of: str = "a") -> Callable[[Request], bytes]:
    """Answer the first request for a model so, everything else as it should be."""
    seen = 0

    def answer(request: Request) -> bytes:
        nonlocal seen
        if request.json()["q"] == model_of:
            seen += 1
            if seen == 1:
                return first
        return fine(request)

    return answer


async def test_everybody_waits_for_a_retry_after(autojump_clock: trio.testing.MockClock) -> None:
    """One request is told to wait 7 s; the others for that model are not sent before that either."""
    first = error(429, headers=["Retry-After: 7"], **UPSTREAM)
    async with open_place(answering(once(first)), pool=PoolLimits(max_connections=8)) as place:
        await place.ask("warm", model="a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: place.ask("a", model="a"))
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(5):
                nursery.start_soon(lambda: place.ask("later", model="a"))
            await trio.testing.wait_all_tasks_blocked()
            assert place.statistics.models[0].paused_s == 7
            assert place.statistics.models[0].held_by == "the provider asked for a wait"
            await place.ask("other", model="b")
            assert trio.current_time() == 0
        assert times(place.network) == [0, 0, 0] + [7] * 6
        assert place.statistics.throttled == 1
        await place.check_clean()


async def test_the_platforms_refusal_is_the_keys(autojump_clock: trio.testing.MockClock) -> None:
    """A 429 that is not a provider's pauses the whole key."""
    first = error(429, headers=["Retry-After: 3"])
    async with open_place(answering(once(first))) as place:
        await together(lambda: place.ask("a", model="a"), lambda: place.ask("b", model="b"))
        assert times(place.network) == [0, 3, 3]
        assert place.statistics.keys[0].state == "ready"


async def test_a_reset_in_milliseconds(autojump_clock: trio.testing.MockClock) -> None:
    """X-RateLimit-Reset, in epoch milliseconds, is waited for like a Retry-After."""
    first = error(429, headers=["X-RateLimit-Reset: 1000005000"])
    async with open_place(answering(once(first)), seams=Seams(wall=lambda: 1_000_000.0)) as place:
        await together(lambda: place.ask("a"), lambda: place.ask("b"))
        assert times(place.network) == [0, 5, 5]


async def test_who_cannot_wait_is_told_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """A request whose deadline comes before the end of the pause gets the refusal, and nothing of it is sent."""
    serve = answering(lambda r: error(429, headers=["Retry-After: 30"], **UPSTREAM))
    async with open_place(serve, retry=NEVER) as place:
        for deadline in (math.inf, 10.0, 29.0):
            with pytest.raises(RateLimitError) as refused:
                await place.ask(deadline=deadline)
            assert (trio.current_time(), refused.value.retry_after_s) == (0, 30)
        with trio.fail_after(20), pytest.raises(RateLimitError):
            await place.ask()
        assert (trio.current_time(), len(place.network.requests)) == (0, 1)
        await place.check_clean()


async def test_an_absurd_wait_fails_fast_for_all(autojump_clock: trio.testing.MockClock) -> None:
    """Retry-After 86,400,000: each gets it at once, with the value; the API is asked again after 120 s all the same."""
    serve = answering(lambda r: error(429, headers=["Retry-After: 86400000"], **UPSTREAM))
    async with open_place(serve) as place:
        for at in (0, 0, 60, 119.9, 120):
            await trio.sleep_until(at)
            with pytest.raises(RateLimitError) as refused:
                await place.ask()
            assert (trio.current_time(), refused.value.retry_after_s) == (at, 86_400_000)
        assert times(place.network) == [0, 120]
        await place.check_clean()


async def test_the_daily_limit_is_latched(autojump_clock: trio.testing.MockClock) -> None:
    """After the daily 429 no free model is asked until its reset; paid models go on."""
    source = {"limit_source": "openrouter_free_tier_daily"}
    daily = error(429, headers=["X-RateLimit-Reset: 1003600000"], **source)

    def answer(request: Request) -> bytes:
        return daily if request.json()["q"] == "f" and request.number == 0 else fine(request)

    async with open_place(answering(answer), seams=Seams(wall=lambda: 1_000_000.0)) as place:
        for at in (0, 10, 3_599):
            await trio.sleep_until(at)
            with pytest.raises(RateLimitError) as latched:
                await place.ask("f", model="x:free")
            assert latched.value.retry_after_s == pytest.approx(3_600 - at)
            assert latched.value.attempts == (at == 0)
            await place.ask("paid", model="x")
        await trio.sleep_until(3_600)
        await place.ask("f", model="y:free")
        assert times(place.network) == [0, 0, 10, 3_599, 3_600]


async def test_the_rate_of_free_models_is_learned(autojump_clock: trio.testing.MockClock) -> None:
    """Free models go as fast as anybody until they are refused for their rate; then all of them share 20 a minute."""
    metadata = {"limit_source": "openrouter_free_tier_daily", "headers": {"X-RateLimit-Reset": "1000010000"}}
    message = "Rate limit exceeded: free-models-per-min."
    refusal = reply({"error": {"message": message, "code": 429, "metadata": metadata}}, status=429)
    refuse = False

    def answer(request: Request) -> bytes:
        nonlocal refuse
        refused, refuse = refuse, False
        return refusal if refused else fine(request)

    async with open_place(answering(answer), seams=Seams(wall=lambda: 1_000_000.0)) as place:
        for _ in range(30):
            await place.ask(model="a:free")
        assert trio.current_time() == 0
        refuse = True
        await place.ask(model="a:free")
        assert trio.current_time() == pytest.approx(10)
        began = trio.current_time()
        for number in range(10):
            await place.ask(model=f"{number % 3}:free")
        assert trio.current_time() - began == pytest.approx(10 * 3 / 0.985, rel=0.01)
        await place.ask(model="paid")


# --- credit -----------------------------------------------------------------------------------------------------------


async def test_credit_in_flight_is_learned(autojump_clock: trio.testing.MockClock) -> None:
    """Where credit pays for four at a time, refusals become rare, and no request fails for it in the end."""
    running = refused = 0

    async def serve(peer: Peer) -> None:
        nonlocal running, refused
        while await peer.request() is not None:
            if running >= 4:
                refused += 1
                await peer.send(error(402, headers=["Retry-After: 2"], limit_source="openrouter_in_flight_budget"))
                continue
            running += 1
            await trio.sleep(1)
            running -= 1
            await peer.send(chat())

    policy = RetryPolicy(max_retries=20, quota_tokens=10_000)
    async with open_place(serve, retry=policy) as place:
        assert await at_once(place, 200) == []
        assert refused < 60
        assert trio.current_time() < 80
        assert place.statistics.keys[0].limit is not None
        await place.check_clean()


async def test_no_credit_at_all_is_final(autojump_clock: trio.testing.MockClock) -> None:
    """A lone key without credit stays in use: each request is told by the API itself."""
    serve = answering(lambda r: error(402, limit_source="openrouter_credits"))
    async with open_place(serve) as place:
        for number in range(3):
            with pytest.raises(InsufficientCreditsError):
                await place.ask()
            assert len(place.network.requests) == number + 1


# --- the breaker ------------------------------------------------------------------------------------------------------


async def test_a_model_that_fails_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    """After five requests that failed, the model's requests fail at once; others go on; one probe closes it."""
    down = True

    def answer(request: Request) -> bytes:
        return error(502) if down and request.json()["q"] == "x" else fine(request)

    async with open_place(answering(answer), retry=NEVER) as place:
        for _ in range(5):
            with pytest.raises(ProviderError):
                await place.ask("x", model="m")
        sent = len(place.network.requests)
        for _ in range(1_000):
            with pytest.raises(CircuitOpenError):
                await place.ask("x", model="m")
        with pytest.raises(CircuitOpenError, match="'m' failed too often") as opened:
            await place.ask("x", model="m")
        assert (opened.value.retry_after_s, opened.value.attempts, opened.value.maybe_billed) == (5, 0, False)
        assert (trio.current_time(), len(place.network.requests)) == (0, sent)
        await place.ask("fine", model="n")
        assert [m.breaker for m in place.statistics.models] == ["open", "closed"]
        await trio.sleep(5)
        with pytest.raises(ProviderError):
            await place.ask("x", model="m")
        await trio.sleep(9.9)
        with pytest.raises(CircuitOpenError):
            await place.ask("x", model="m")
        await trio.sleep(0.1)
        down = False
        await place.ask("x", model="m")
        await place.ask("x", model="m")
        await place.check_clean()


async def test_one_probe_at_a_time(autojump_clock: trio.testing.MockClock) -> None:
    """Half open, exactly one request goes; one that is cancelled leaves its place to the next."""
    hang = False

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            if hang:
                await trio.sleep(1)
                await peer.send(fine(request))
            else:
                await peer.send(error(500))

    async with open_place(serve, retry=NEVER) as place:
        for _ in range(5):
            with pytest.raises(ProviderError):
                await place.ask()
        await trio.sleep(5)
        hang = True
        sent = len(place.network.requests)
        with trio.move_on_after(0.5):
            await place.ask()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(place.ask)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(5):
                with pytest.raises(CircuitOpenError):
                    await place.ask()
        assert len(place.network.requests) == sent + 2
        await place.ask()
        await place.check_clean()


async def test_a_batch_waits_for_the_breaker(autojump_clock: trio.testing.MockClock) -> None:
    """Rows of a batch are not burnt while a model is down: they wait for the probe, and then all go."""
    down_until = 12.0
    serve = answering(lambda r: error(502) if trio.current_time() < down_until else fine(r))
    async with open_place(serve, retry=NEVER) as place:
        with suppress(ProviderError):
            for _ in range(5):
                with suppress(ProviderError):
                    await place.ask()
        errors = await at_once(place, 50, lane="batch")
        assert len(errors) == 1  # the first probe
        assert trio.current_time() == 15
        await place.check_clean()


async def test_a_total_outage_is_not_amplified(autojump_clock: trio.testing.MockClock, record_property) -> None:
    """60 s of nothing but 502 at 200 requests a second: hardly any is sent at all, and it recovers when it is over."""
    down = True
    asked, errors = 12_000, Counter[str]()
    serve = answering(lambda r: error(502) if down else chat())

    async def ask(place: Place) -> None:
        try:
            await place.ask()
        except GorouterError as exc:
            errors[type(exc).__name__] += 1

    async with open_place(serve, seams=Seams(random=random.Random(3))) as place:
        async with trio.open_nursery() as nursery:
            for _ in range(asked):
                nursery.start_soon(ask, place)
                await trio.sleep(0.005)
        sent = len(place.network.requests)
        assert sum(errors.values()) == asked
        assert sent <= asked * 0.02
        down = False
        ended = trio.current_time()
        while True:
            with suppress(CircuitOpenError):
                await place.ask()
                break
            await trio.sleep(0.1)
        recovered_s = trio.current_time() - ended
        assert recovered_s <= 15
        record_property(
            "figure",
            f"{sent / asked:.4f} requests sent for each asked in an outage of 60 s, back after {recovered_s:.0f} s",
        )
        await place.check_clean()


async def test_no_breaker(autojump_clock: trio.testing.MockClock) -> None:
    """With `breaker=None` every request is sent."""
    async with open_place(answering(lambda r: error(502)), retry=NEVER, breaker=None) as place:
        for _ in range(100):
            with pytest.raises(ProviderError):
                await place.ask()
        assert len(place.network.requests) == 100


async def test_another_breaker(autojump_clock: trio.testing.MockClock) -> None:
    """The policy of the settings is the breaker's."""
    policy = BreakerPolicy(consecutive=2, open_s=1)
    async with open_place(answering(lambda r: error(503)), retry=NEVER, breaker=policy) as place:
        for kind in (OverloadedError, OverloadedError, CircuitOpenError):
            with pytest.raises(kind):
                await place.ask()


# --- the queue --------------------------------------------------------------------------------------------------------


async def test_a_request_whose_time_is_over_never_leaves_the_queue(autojump_clock: trio.testing.MockClock) -> None:
    """Deadlines pass in the queue; what is sent is what has time left."""
    rates = RateLimits(requests_per_minute=60, margin=0)
    async with open_place(answering(fine), rates=rates) as place:
        late: list[float] = []

        async def one(number: int) -> None:
            if number < 3:
                await place.ask(str(number), deadline=2.5)
                return
            with pytest.raises(DeadlineExceededError) as raised:
                await place.ask(str(number), deadline=2.5)
            assert (raised.value.phase, raised.value.attempts) == ("queue", 0)
            late.append(trio.current_time())

        await together(*(lambda n=n: one(n) for n in range(10)))
        assert times(place.network) == [0, 1, 2]
        assert late == [2.5] * 7
        await place.check_clean()


async def test_a_full_lane_does_not_shut_out_the_other(autojump_clock: trio.testing.MockClock) -> None:
    """With `reject`, a batch that fills its queue refuses the batch; who comes with the other lane is queued."""
    rates = RateLimits(requests_per_minute=60, margin=0)
    limits = PoolLimits(queue=3, overflow="reject")
    async with open_place(answering(fine), rates=rates, pool=limits) as place:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(lambda: place.ask(lane="batch"))
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(PoolFullError, match="3 requests are queued already"):
                await place.ask(lane="batch")
            await place.ask("live")
            assert trio.current_time() <= 2
        await place.check_clean()


async def test_live_requests_pass_a_batch(autojump_clock: trio.testing.MockClock) -> None:
    """With a thousand rows queued at the limit, a live request is next, and its session is no better than another."""
    rates = RateLimits(requests_per_minute=60, margin=0)
    async with open_place(answering(fine), rates=rates) as place, trio.open_nursery() as nursery:
        for _ in range(1_000):
            nursery.start_soon(lambda: place.ask("row", lane="batch"))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(lambda: place.ask("a", flow="a"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lambda: place.ask("b", flow="b"))
        await trio.sleep(6.5)
        nursery.cancel_scope.cancel()
    assert [r.json()["q"] for r in place.network.requests] == ["row", "a", "b", "a", "a", "a", "a"]


async def test_a_retry_goes_back_through_admission(autojump_clock: trio.testing.MockClock) -> None:
    """A request that is tried again takes a turn of the rate once more."""
    rates = RateLimits(requests_per_minute=60, margin=0)
    serve = answering(lambda r: error(500) if r.number == 0 else fine(r))
    async with open_place(serve, rates=rates) as place:
        await together(lambda: place.ask("a"), lambda: place.ask("b"))
        assert times(place.network) == [0, 1, 2]


async def test_cancelled_before_a_backoff_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever is cancelled when the error arrives gets that, and not the error of the API."""
    async with open_place(answering(lambda r: error(503))) as place:
        with trio.CancelScope() as scope:
            original = place.pool.note_refusal

            def note(ticket) -> None:
                original(ticket)
                scope.cancel()

            place.pool.note_refusal = note  # type: ignore[method-assign]  # the moment that the test is about
            await place.ask()
        assert scope.cancelled_caught
        await place.check_clean()


async def test_the_limit_of_a_model_grows_from_where_it_begins(autojump_clock: trio.testing.MockClock) -> None:
    """100 requests at once: 4 at first, then twice as many a round trip; without adapting all at once."""

    async def serve(peer: Peer) -> None:
        while (request := await peer.request()) is not None:
            await trio.sleep(1)
            await peer.send(fine(request))

    async with open_place(serve, pool=PoolLimits(adaptive_from=4)) as place:
        assert await at_once(place, 100) == []
        counts = Counter(times(place.network))
        assert list(counts.values()) == [4, 8, 16, 32, 40]
        assert place.statistics.models[0].limit >= 40
    async with open_place(serve, pool=PoolLimits(adaptive_from=None)) as place:
        await at_once(place, 100)
        assert place.statistics.workers == 100


async def test_what_is_known_of_sending(autojump_clock: trio.testing.MockClock) -> None:
    """`on_sent` is called when a request goes out, and not while it is queued or its connection is being made."""
    sent: list[float] = []
    rates = RateLimits(requests_per_minute=60, margin=0)
    async with open_place(answering(fine), rates=rates) as place:
        place.network.connect_s = 0.25
        await place.ask(on_sent=lambda: sent.append(trio.current_time()))
        assert sent == [0.25]
        with trio.move_on_after(0.5):
            await place.ask(on_sent=lambda: sent.append(trio.current_time()))
        assert sent == [0.25]


async def test_streams_hold_their_place_until_their_end(autojump_clock: trio.testing.MockClock) -> None:
    """A stream counts as in flight as long as its reader has it, and is settled by its usage."""
    usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    whole = stream(delta("a"), delta(finish="stop", usage=usage), DONE)
    rates = RateLimits(tokens_per_minute=600, margin=0, burst=0, max_in_flight=1)
    async with open_place(answering(lambda r: whole), rates=rates, estimate=lambda call: 100) as place:
        async with place.stream() as reader:
            with trio.move_on_after(5):
                await place.read()
            assert place.statistics.keys[0].in_flight == 1
            while await reader.read():
                pass
        assert await place.read() == "a"
        # Two of ten tokens each, at ten a second.
        assert trio.current_time() == pytest.approx(5, abs=1.1)
        await place.check_clean()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_runs() -> None:
    """The code of docs/limits.md is right."""
    page = (REPOSITORY / "docs" / "limits.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    shown: list[object] = []
    namespace["print"] = lambda *values: shown.append(values)
    config = namespace["named"]
    assert isinstance(config, ClientConfig)
    assert [key.name for key in config.resolved({}).keys] == ["team", "spare"]

    async def ask(world: World) -> None:
        async with world.open_client(rates=namespace["rates"]) as client:
            await client.chat("Hello", model="openai/gpt-4o")
            namespace["show"](client)  # type: ignore[operator]  # it is the page's function

    assert run(ask).is_finished
    assert len(shown) == 1 + 2 + 1 + 1


async def test_a_pause_ends_though_others_keep_every_connection(autojump_clock: trio.testing.MockClock) -> None:
    """Requests for models that were told to wait take their turn when that is over, however many queue beside."""

    async def serve(request: Request) -> bytes:
        await trio.sleep(1)
        text = request.json()["q"]
        return error(429, headers=[f"Retry-After: {text}"], provider_name="P") if text in {"5", "15"} else fine(request)

    limits = PoolLimits(max_connections=2, adaptive_from=None)
    ended: dict[str, float] = {}

    async def again(model: str) -> None:
        await place.ask(model=model)
        ended[model] = trio.current_time()

    async with open_place(answering(serve), pool=limits, retry=NEVER) as place:
        for wait in ("5", "15"):
            with pytest.raises(RateLimitError):
                await place.ask(wait, model=f"waits {wait}")
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(partial(place.ask, f"busy {number}", model="busy"))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(again, "waits 5")
            nursery.start_soon(again, "waits 15")
        assert 6 < ended["waits 5"] < 10
        assert 17 < ended["waits 15"] < 21
        assert trio.current_time() > 50


async def test_models_that_are_held_are_not_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    """However many others are asked for meanwhile: a pause, a breaker and an own rate hold until they are over."""
    refusals = {
        "paused": error(429, headers=["Retry-After: 30"], **UPSTREAM),
        "broken": error(502, **UPSTREAM),
    }

    def answer(request: Request) -> bytes:
        return refusals.get(request.json()["q"], fine(request))

    rates = RateLimits(models={"rated": RateLimits(requests_per_minute=1, margin=0, burst=0)})
    breaker = BreakerPolicy(consecutive=1, open_s=20)
    async with open_place(answering(answer), retry=NEVER, rates=rates, breaker=breaker) as place:
        await place.ask("x", model="rated")
        for name in refusals:
            with pytest.raises(GorouterError):
                await place.ask(name, model=name)
        for number in range(3 * 1024):
            await place.ask("x", model=f"other {number}")
        assert trio.current_time() == 0
        with pytest.raises(CircuitOpenError):
            await place.ask("x", model="broken")
        await place.ask("x", model="paused")
        assert trio.current_time() == 30
        await place.ask("x", model="rated")
        assert trio.current_time() == 60
        for number in range(2 * 1024):
            await place.ask("x", model=f"another {number}")
        assert len(place.statistics.models) == 1024
        await place.check_clean()


async def test_the_number_of_remembered_models_goes_down_again(autojump_clock: trio.testing.MockClock) -> None:
    """More than are remembered may be told to wait at a time; when that is over, they are forgotten."""
    refused = error(429, headers=["Retry-After: 30"], **UPSTREAM)
    async with open_place(answering(lambda r: refused if r.json()["q"] == "no" else fine(r)), retry=NEVER) as place:
        for number in range(1500):
            with pytest.raises(RateLimitError):
                await place.ask("no", model=f"paused {number}")
        assert len(place.statistics.models) == 1500
        await trio.sleep(31)
        for number in range(500):
            await place.ask("x", model=f"other {number}")
        assert len(place.statistics.models) == 1024
