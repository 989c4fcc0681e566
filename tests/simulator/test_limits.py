"""The simulator's rate limits and holds, against references that count again from the outside."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import h11
import pytest
import trio
import trio.testing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_client import WireClient, WireReply

from gorouter_trio.errors import ConfigError
from gorouter_trio.simulator import (
    FreeTier,
    Limit,
    SimulatedNetwork,
    Simulator,
    SimulatorConfig,
    _tokens,
    open_simulated_network,
)
from gorouter_trio.simulator.catalog import MODELS
from gorouter_trio.simulator.limits import Demand, RateLimits, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

KEY = "sk-or-v1-0123456789abcdef"
CHAT = "/api/v1/chat/completions"
WALL = 1_795_300_010.0
MINI = "openai/gpt-4o-mini"
SONNET = "anthropic/claude-sonnet-4.5"
FREE = next(model.id for model in MODELS if model.is_free)
CATALOG = {model.id: model for model in MODELS}
SECOND = 1_000_000_000
PROMPT_TOKENS = _tokens.count("Hi there.") + 4


@asynccontextmanager
async def simulated(**fields: Any) -> AsyncIterator[tuple[Simulator, SimulatedNetwork]]:
    """A simulator with these settings that starts at a fixed time, and the way to it."""
    start_s = trio.current_time()
    simulator = Simulator(SimulatorConfig(**fields), wall=lambda: WALL + trio.current_time() - start_s)
    async with open_simulated_network(simulator) as network:
        yield simulator, network
    assert simulator.statistics().in_flight == 0


async def ask(network: SimulatedNetwork, *, key: str = KEY, model: str = MINI, **fields: Any) -> WireReply:
    """One chat request on a connection of its own."""
    client = WireClient(await network.connect("openrouter.simulated", 80))
    body = {"model": model, "messages": [{"role": "user", "content": "Hi there."}], **fields}
    try:
        return await client.post(CHAT, body, headers=(("Authorization", f"Bearer {key}"),))
    finally:
        await client.stream.aclose()


# Each kind of window, by a reference that recounts everything from the list of what was admitted.


def is_allowed(limit: Limit, admitted: Sequence[tuple[int, int]], now: int, amount: int) -> bool:
    """Whether the limit's definition lets this through, given all (time, amount) admitted before, in nanoseconds."""
    window = round(limit.window_s * SECOND)
    if limit.kind == "sliding":
        return sum(a for t, a in admitted if now - t < window) + amount <= limit.amount
    if limit.kind == "fixed":
        return sum(a for t, a in admitted if t // window == now // window) + amount <= limit.amount
    level, at = Fraction(limit.amount), 0
    for t, a in admitted:
        level = min(Fraction(limit.amount), level + Fraction(limit.amount * (t - at), window)) - a
        at = t
    return min(Fraction(limit.amount), level + Fraction(limit.amount * (now - at), window)) >= amount


@settings(deadline=None)
@given(
    kind=st.sampled_from(["token_bucket", "fixed", "sliding"]),
    amount=st.integers(1, 12),
    window_ms=st.integers(10, 3_000),
    arrivals=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 5)), max_size=60),
)
@example(kind="token_bucket", amount=1, window_ms=15, arrivals=[(70, 1), (400, 1), (15, 1)])
def test_each_kind_admits_what_its_definition_does(
    kind: Any, amount: int, window_ms: int, arrivals: list[tuple[int, int]]
) -> None:
    """Request by request the same decision as the reference; a refusal's wait is exact to the nanosecond."""
    limit = Limit(tokens=amount, window_s=window_ms / 1_000, kind=kind)
    limits = RateLimits([limit])
    admitted: list[tuple[int, int]] = []
    now = 1_795_300_000 * SECOND
    for gap_ms, tokens in arrivals:
        now += gap_ms * 1_000_000
        asked = min(tokens, amount)
        answer = limits.admit(Demand(KEY, MINI, tokens, 0), now)
        assert isinstance(answer, Refused) == (not is_allowed(limit, admitted, now, asked))
        if isinstance(answer, Refused):
            due = now + round(answer.wait_s * SECOND)
            assert is_allowed(limit, admitted, due + 1, asked)
            assert not is_allowed(limit, admitted, due - 2, asked)
            assert answer.reset_ms >= due // 1_000_000
        else:
            admitted.append((now, asked))
    windows = limits.windows()
    assert sum(w.admitted for w in windows) == len(admitted)
    assert sum(w.refused for w in windows) == len(arrivals) - len(admitted)
    window = round(limit.window_s * SECOND)
    for w in windows:
        number = round(w.start_s * SECOND / window)  # start_s is exact to 0.24 us only: windows are told by number
        assert abs(w.start_s - number * window / SECOND) < 1e-6
        inside = [a for t, a in admitted if t // window == number]
        assert w.used == sum(inside)
        assert w.admitted == len(inside)


@pytest.mark.parametrize(("kind", "first_minute"), [("token_bucket", 60 + 59), ("fixed", 60 + 60), ("sliding", 60)])
async def test_a_minute_of_overload_gets_what_the_kind_allows(autojump_clock, kind, first_minute) -> None:
    """Sixty a minute, asked ten times a second: the burst, and the refill, are those of the kind.

    The minute begins ten seconds before a whole one, so a fixed window starts anew in it.
    """
    rng = random.Random(1)
    async with simulated(limits=(Limit(requests=60, kind=kind),)) as (simulator, network):
        statuses = []
        begin = trio.current_time()
        while trio.current_time() < begin + 59.5:
            statuses.append((await ask(network)).status)
            await trio.sleep(rng.uniform(0.05, 0.15))
        windows = simulator.limit_windows()
    assert set(statuses) == {200, 429}
    assert abs(statuses.count(200) - first_minute) <= 1
    assert sum(w.admitted for w in windows) == statuses.count(200)
    assert sum(w.refused for w in windows) == statuses.count(429)
    assert {w.scope for w in windows} == {"sk-or-v1-012...def"}


# What a refusal says.


async def test_platform_refusals_carry_the_limit_and_when_to_come_back(autojump_clock) -> None:
    """Headers and metadata agree; waiting for Retry-After is enough, and for the reset too."""
    async with simulated(limits=(Limit(requests=2, window_s=30, kind="sliding"),)) as (_, network):
        assert (await ask(network)).status == 200
        await trio.sleep(10)
        assert (await ask(network)).status == 200
        reply = await ask(network)
        assert reply.status == 429
        error = reply.json()["error"]
        assert error["message"] == "Rate limit exceeded"
        assert error["metadata"]["error_type"] == "rate_limit_exceeded"
        assert error["metadata"]["headers"] == {
            "X-RateLimit-Limit": "2",
            "X-RateLimit-Remaining": "0",
            "X-RateLimit-Reset": str(round((WALL + 30) * 1_000)),
            "Retry-After": "20",
        }
        for name, value in error["metadata"]["headers"].items():
            assert reply.header(name) == value
        await trio.sleep(19.5)
        assert (await ask(network)).status == 429
        await trio.sleep(0.5)
        assert (await ask(network)).status == 200


async def test_upstream_refusals_have_the_form_of_the_shared_pool(autojump_clock) -> None:
    """`Provider returned error` with its raw text and a Retry-After, without X-RateLimit headers; one count a model."""
    limit = Limit(requests=1, window_s=8, per="model", source="upstream")
    async with simulated(limits=(limit,)) as (simulator, network):
        assert (await ask(network)).status == 200
        assert (await ask(network, model=SONNET)).status == 200
        reply = await ask(network, key="sk-other")
        assert reply.status == 429
        metadata = reply.json()["error"]["metadata"]
        assert metadata["limit_source"] == "upstream_provider_shared_pool"
        assert metadata["retry_after_seconds"] == 8
        assert reply.header("retry-after") == "8"
        assert reply.header("x-ratelimit-limit") is None
        assert [w.scope for w in simulator.limit_windows()] == [SONNET, MINI]


async def test_free_models_have_a_minute_and_a_day(autojump_clock) -> None:
    """Twenty a minute and fifty a day over all keys; the day's latch holds until midnight UTC and names it."""
    async with simulated(free_tier=FreeTier(), credits_nanousd=0) as (_, network):
        admitted = 0
        for number in range(22):
            admitted += (await ask(network, model=FREE, key=f"sk-{number}")).status == 200
        assert admitted == 20
        reply = await ask(network, model=FREE)
        assert reply.json()["error"]["message"] == "Rate limit exceeded: free-models-per-min"
        assert reply.header("retry-after") is None
        assert reply.header("x-ratelimit-limit") == "20"
        while admitted < 50:
            await trio.sleep(4)
            admitted += (await ask(network, model=FREE)).status == 200
        await trio.sleep(120)
        reply = await ask(network, model=FREE)
        assert reply.status == 429
        assert reply.json()["error"] == {
            "message": "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests "
            "per day",
            "code": 429,
            "metadata": {
                "headers": {
                    "X-RateLimit-Limit": "50",
                    "X-RateLimit-Remaining": "0",
                    "X-RateLimit-Reset": "1795305600000",
                },
                "limit_source": "openrouter_free_tier_daily",
            },
        }
        client = WireClient(await network.connect("openrouter.simulated", 80))
        key = (await client.request("GET", "/api/v1/key", headers=(("Authorization", f"Bearer {KEY}"),))).json()
        assert key["data"]["free_model_daily_requests"] == {"used": 50, "limit": 50, "remaining": 0}
        await client.stream.aclose()
        assert (await ask(network)).status == 402, "no credits for a paid model"
        await trio.sleep_until(trio.current_time() + 1_795_305_600 - WALL)
        assert (await ask(network, model=FREE)).status == 200


async def test_who_bought_ten_credits_has_a_thousand_a_day(autojump_clock) -> None:
    """The high-balance variant of the message, and paid models are not limited."""
    tier = FreeTier(requests_per_min=2_000)
    async with simulated(free_tier=tier, reply_tokens=8, credits_nanousd=10 * SECOND) as (_, network):
        client = WireClient(await network.connect("openrouter.simulated", 80))
        body = {"model": FREE, "messages": [{"role": "user", "content": "Briefly?"}], "max_tokens": 1}
        headers = (("Authorization", f"Bearer {KEY}"),)
        statuses = [(await client.post(CHAT, body, headers=headers)).status for _ in range(1_000)]
        assert set(statuses) == {200}
        refused = await client.post(CHAT, body, headers=headers)
        await client.stream.aclose()
        assert refused.json()["error"]["message"] == "Rate limit exceeded: free-models-per-day-high-balance"
        assert (await ask(network)).status == 200


async def test_tokens_count_when_they_are_made(autojump_clock) -> None:
    """The prompt at admission, the completion at its end; what overdraws a bucket has to be filled up again."""
    limit = Limit(tokens=100, window_s=100, kind="token_bucket")
    async with simulated(limits=(limit,)) as (simulator, network):
        reply = await ask(network, messages=[{"role": "user", "content": "[[tokens 200]]"}])
        used = reply.json()["usage"]["total_tokens"]
        assert simulator.limit_windows()[0].used == used > 200
        refused = await ask(network)
        assert refused.header("x-ratelimit-remaining") == "0"
        wait_s = int(refused.header("retry-after") or 0)
        assert used - 100 < wait_s <= used - 100 + 10
        await trio.sleep(wait_s - 1)
        assert (await ask(network)).status == 429
        await trio.sleep(1)
        assert (await ask(network)).status == 200


async def test_worst_cases_count_at_once_and_for_good(autojump_clock) -> None:
    """A limit on worst cases counts max_tokens at admission, whatever comes of it."""
    limit = Limit(tokens=1_000, count="worst_case")
    async with simulated(limits=(limit,)) as (simulator, network):
        assert (await ask(network, max_tokens=600)).status == 200
        assert (await ask(network, max_tokens=600)).status == 429
        assert (await ask(network, max_tokens=300)).status == 200
        assert 900 < simulator.limit_windows()[0].used < 950


async def test_all_limits_or_none(autojump_clock) -> None:
    """A request that one limit refuses is counted by no other."""
    limits = (Limit(requests=100), Limit(requests=1, per="key_model", models=(MINI,)))
    async with simulated(limits=limits) as (simulator, network):
        assert [(await ask(network)).status for _ in range(5)] == [200, 429, 429, 429, 429]
        wide, narrow = simulator.limit_windows()
        assert (wide.admitted, wide.refused) == (1, 0)
        assert (narrow.admitted, narrow.refused) == (1, 4)
        assert narrow.scope.endswith(f" {MINI}")


async def test_the_servers_clock_may_be_ahead(autojump_clock) -> None:
    """An offset moves the ids, the dates and the resets, not the waits."""
    async with simulated(limits=(Limit(requests=1, window_s=60),), clock_offset_s=7_200) as (_, network):
        assert (await ask(network)).json()["created"] == WALL + 7_200
        refused = await ask(network)
        assert refused.header("retry-after") == "60"
        assert refused.header("x-ratelimit-reset") == str(round((WALL + 7_260) * 1_000))


@pytest.mark.parametrize(
    "fields", [{}, {"requests": 1, "tokens": 1}, {"requests": 0}, {"requests": 1, "window_s": 0.0}], ids=str
)
def test_limits_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    """At construction, with the reason."""
    with pytest.raises(ConfigError):
        Limit(**fields)


@pytest.mark.parametrize("fields", [{"requests_per_day": 0}, {"requests_per_min": 0}], ids=str)
def test_a_free_tier_that_admits_nothing_is_refused(fields: dict[str, Any]) -> None:
    """Zero is not taken for the default."""
    with pytest.raises(ConfigError, match=next(iter(fields))):
        FreeTier(**fields)


# Credits: held, then settled.


def worst_nanousd(prompt_tokens: int, max_tokens: int) -> int:
    """The worst case of a request to the small model."""
    model = CATALOG[MINI]
    return prompt_tokens * model.prompt_nanousd + max_tokens * model.completion_nanousd


async def test_requests_in_flight_hold_their_worst_case(autojump_clock) -> None:
    """What would fit alone waits for the others: a 402 with a Retry-After; what never fits gets one without."""
    credit = worst_nanousd(PROMPT_TOKENS, 1_000) + worst_nanousd(PROMPT_TOKENS, 400)
    async with simulated(credits_nanousd=credit, latency_s=5.0) as (simulator, network):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for, network, 1_000)
            await trio.sleep(1)
            assert simulator.held_nanousd == worst_nanousd(PROMPT_TOKENS, 1_000)
            waits = await ask(network, max_tokens=800)
            assert waits.status == 402
            error = waits.json()["error"]
            assert error["metadata"]["reason"] == "in_flight_budget_exhausted"
            assert waits.header("retry-after") == error["metadata"]["headers"]["Retry-After"] == "120"
            never = await ask(network, max_tokens=1_500)
            assert never.json()["error"]["metadata"]["limit_source"] == "openrouter_credits"
            assert never.header("retry-after") is None
            spent = simulator.ledger.total_nanousd
            can = (credit - spent - worst_nanousd(PROMPT_TOKENS, 0)) // CATALOG[MINI].completion_nanousd
            assert f"can only afford {can}." in never.json()["error"]["message"]
        assert simulator.held_nanousd == 0
        assert (await ask(network, max_tokens=800)).status == 200


async def ask_for(network: SimulatedNetwork, max_tokens: int) -> None:
    """A request that has to succeed."""
    assert (await ask(network, max_tokens=max_tokens)).status == 200


async def test_holds_outlast_the_request_while_it_settles(autojump_clock) -> None:
    """The settlement window, and the share of the balance that may be held."""
    fields = {"credits_nanousd": 2 * worst_nanousd(PROMPT_TOKENS, 1_000), "in_flight_share": 0.5, "settlement_s": 30.0}
    async with simulated(**fields) as (simulator, network):
        assert (await ask(network, max_tokens=900)).status == 200
        assert simulator.held_nanousd == worst_nanousd(PROMPT_TOKENS, 900)
        assert (await ask(network, max_tokens=900)).json()["error"]["metadata"][
            "reason"
        ] == "in_flight_budget_exhausted"
        await trio.sleep(29)
        assert simulator.held_nanousd == worst_nanousd(PROMPT_TOKENS, 900)
        await trio.sleep(2)
        assert simulator.held_nanousd == 0
        assert (await ask(network, max_tokens=900)).status == 200


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    moves=st.lists(
        st.tuples(
            st.sampled_from(["whole", "stream", "leave"]),
            st.integers(1, 400),
            st.floats(0, 3),
            st.floats(0.01, 2),
            st.sampled_from([MINI, SONNET, FREE, "google/gemini-2.5-flash"]),
        ),
        min_size=1,
        max_size=20,
    ),
    faulty=st.booleans(),
)
def test_the_ledger_adds_up(seed: int, moves: list[Any], faulty: bool) -> None:
    """Concurrent chats, streams, streams that are left, faults: each processed request is charged once, by what was
    made at its model's prices; never more than its hold; the totals are the sums; no hold is left; credits are not
    overdrawn.
    """
    faults = {"502": 0.1, "mid_stream_error": 0.1, "stream_cut": 0.1, "429_upstream": 0.1} if faulty else {}
    credit = 3_000_000
    fields: dict[str, Any] = {"seed": seed, "fault_rates": faults, "credits_nanousd": credit}

    async def main() -> None:
        async with simulated(**fields, latency_s=0.2, tokens_per_s=100.0, jitter=0.5) as (simulator, network):
            async with trio.open_nursery() as nursery:
                for move in moves:
                    nursery.start_soon(make_move, network, *move)
                    await trio.lowlevel.checkpoint()
            await trio.sleep(60)
            counts, charges = simulator.statistics(), simulator.ledger.charges()
            assert counts.processed == len(charges) == len({charge.generation_id for charge in charges})
            for charge in charges:
                full = charge.prompt_tokens * charge.model.prompt_nanousd
                full += charge.completion_tokens * charge.model.completion_nanousd + charge.model.request_nanousd
                assert charge.nanousd == (full if charge.completion_tokens else 0)
            assert sum(charge.nanousd for charge in charges) == simulator.ledger.total_nanousd <= credit
            assert simulator.ledger.total_nanousd == counts.charged_nanousd
            records = [record for record in simulator.recent_requests() if record.outcome != "refused"]
            assert sum(record.charged_nanousd for record in records) == simulator.ledger.total_nanousd
            assert simulator.held_nanousd == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def make_move(
    network: SimulatedNetwork, kind: str, max_tokens: int, start_s: float, stay_s: float, model: str
) -> None:
    """A client that asks, and perhaps leaves."""
    await trio.sleep(start_s)
    client = WireClient(await network.connect("openrouter.simulated", 80))
    messages = [{"role": "user", "content": "Tides?"}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": kind != "whole"}
    try:
        with trio.move_on_after(stay_s if kind == "leave" else 60):
            await client.post(CHAT, body, headers=(("Authorization", f"Bearer {KEY}"),))
    except (h11.RemoteProtocolError, trio.BrokenResourceError):
        pass
    finally:
        await client.stream.aclose()
