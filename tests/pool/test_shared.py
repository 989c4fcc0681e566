"""Limits and budgets that several clients keep together: used up, never exceeded, and free of those that have died."""

from __future__ import annotations

import random
import statistics
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest
import trio
from pooled import open_place
from redis_server import fresh_prefix, shared_redis
from scripted import chat
from shared_backend import MemoryBackend

import gorouter_trio as gr
from gorouter_trio.config import Budget, RateLimits
from gorouter_trio.errors import BudgetExceededError, ConfigError, DeadlineExceededError
from gorouter_trio.pool.budget import BudgetBook, Spending
from gorouter_trio.pool.budget_gate import BudgetGate
from gorouter_trio.pool.prices import PriceBook
from gorouter_trio.pool.shared import MoneyAsk, RateAsk, SlotAsk, open_shared_limits
from gorouter_trio.pool.shared_redis import RedisLimits
from gorouter_trio.simulator import Limit, Scenario, SimulatorConfig
from gorouter_trio.simulator.scenario import Latency, Spread
from gorouter_trio.testing import Link, World, run

LINK = Link(latency_s=0.03, jitter_s=0.02)


def ask_rate(**fields):
    others = {"interval_s": 0.1, "tolerance_s": 0.0, "horizon_s": 0.5, "owed": 0.0, "first": 1.0, "size": 1.0}
    return RateAsk(**others | {"count": 100} | fields)


def ask_slots(holder, in_use, wanted, **fields):
    return SlotAsk(holder=holder, in_use=in_use, wanted=wanted, **{"most": 10, "ttl_s": 15.0} | fields)


def ask_money(holder, spent, wanted, **fields):
    others = {"held_nano": 0, "least_nano": 0, "limit_nano": 1000, "ttl_s": 30.0}
    return MoneyAsk(holder=holder, spent_nano=spent, wanted_nano=wanted, **others | fields)


@pytest.fixture
async def limits():
    """The counts in a Redis that others use as well."""
    async with RedisLimits(shared_redis().url, prefix=fresh_prefix()) as made:
        yield made


BOTH = pytest.mark.parametrize("where", ["memory", pytest.param("redis", marks=pytest.mark.net)])


@pytest.fixture
def backend(where, limits):
    """The model of the counts, and what has to agree with it."""
    return MemoryBackend(latency_s=0.0) if where == "memory" else limits


# What the counts say


@BOTH
async def test_turns_of_a_rate(backend):
    """Turns are given for the near future, each one an interval behind the one before, to whoever asks."""
    first = await backend.take_rate("r", ask_rate(count=3))
    assert first.count == 3
    assert first.first_in_s == pytest.approx(0, abs=0.001)
    second = await backend.take_rate("r", ask_rate())
    assert second.first_in_s == pytest.approx(0.3, abs=0.05)
    assert second.count == 3
    assert (await backend.take_rate("r", ask_rate())).count == 0
    # What is given back is the next one's; what was used beyond is waited for.
    assert (await backend.take_rate("r", ask_rate(owed=-2.0))).count == 2
    assert (await backend.take_rate("r", ask_rate(owed=3.0))).count == 0
    assert (await backend.take_rate("other", ask_rate(tolerance_s=0.25, count=20))).count == 8


@BOTH
async def test_turns_of_several_units(backend):
    """A request of many tokens goes when all before it are paid, and is paid by those behind it."""
    given = await backend.take_rate("r", ask_rate(interval_s=0.001, first=2_000.0, size=100.0, count=5))
    assert given.count == 1
    after = await backend.take_rate("r", ask_rate(interval_s=0.001, first=1.0, count=1))
    assert after.count == 0


@BOTH
async def test_places_in_flight(backend):
    """All places are given out, no more, and a holder that others wait for gives up what it does not use."""
    assert (await backend.take_slots("s", ask_slots("a", 0, 20))).count == 10
    refused = await backend.take_slots("s", ask_slots("b", 0, 4))
    assert (refused.count, refused.others_wait) == (0, True)
    # Its part is five; the two beyond are in use, and others' only when they are not.
    back = await backend.take_slots("s", ask_slots("a", 7, 20))
    assert (back.count, back.others_wait) == (5, True)
    assert (await backend.take_slots("s", ask_slots("b", 0, 9))).count == 3
    assert (await backend.take_slots("s", ask_slots("a", 0, 0))).count == 0
    assert (await backend.take_slots("s", ask_slots("b", 3, 9))).count == 9


@BOTH
async def test_places_of_the_dead(backend):
    """What a holder had is free again after its time; one that lives in spite of that has what it uses."""
    assert (await backend.take_slots("s", ask_slots("a", 0, 10, ttl_s=0.05))).count == 10
    await trio.sleep(0.1)
    assert (await backend.take_slots("s", ask_slots("b", 0, 4))).count == 4
    late = await backend.take_slots("s", ask_slots("a", 10, 10))
    assert late.count == 6
    assert (await backend.take_slots("s", ask_slots("c", 0, 5))).count == 0


@BOTH
async def test_money(backend):
    """What all have at hand and have spent together is never more than the limit; what is told twice counts once."""
    first = await backend.take_money("m", ask_money("a", 0, 400))
    assert (first.at_hand_nano, first.spent_nano) == (400, 0)
    assert (await backend.take_money("m", ask_money("b", 0, 800))).at_hand_nano == 600
    for _ in range(2):
        told = await backend.take_money("m", ask_money("a", 300, 200))
        assert (told.at_hand_nano, told.spent_nano) == (100, 300)
    assert (await backend.take_money("m", ask_money("b", 100, 0))).at_hand_nano == 0
    assert (await backend.take_money("m", ask_money("a", 300, 10_000))).at_hand_nano == 600


@BOTH
async def test_too_little_money_is_left_to_others(backend):
    """What does not pay for a request is no use at hand: it goes back, but for what requests in flight hold."""
    assert (await backend.take_money("m", ask_money("a", 0, 600))).at_hand_nano == 600
    assert (await backend.take_money("m", ask_money("b", 0, 900, least_nano=500))).at_hand_nano == 0
    assert (await backend.take_money("m", ask_money("a", 0, 1200, held_nano=200, least_nano=1200))).at_hand_nano == 200
    assert (await backend.take_money("m", ask_money("b", 0, 900, least_nano=500))).at_hand_nano == 800


@pytest.mark.parametrize(("lost", "left"), [("spent", 600), ("free", 1000)])
@BOTH
async def test_money_of_the_dead(where, lost, left):
    """What a process had at hand when it died counts as spent, or is free again, as the settings say."""
    async with RedisLimits(shared_redis().url, prefix=fresh_prefix(), lost=lost) as limits:
        backend = MemoryBackend(latency_s=0.0, lost=lost) if where == "memory" else limits
        assert (await backend.take_money("m", ask_money("a", 0, 400, ttl_s=0.05))).at_hand_nano == 400
        assert (await backend.take_money("m", ask_money("b", 0, 10_000, ttl_s=0.01))).at_hand_nano == 600
        await backend.take_money("m", ask_money("b", 0, 0))
        await trio.sleep(0.1)
        assert (await backend.take_money("m", ask_money("b", 0, 10_000))).at_hand_nano == left
        # It lives after all, and tells what it spent: that is no less.
        late = await backend.take_money("m", ask_money("a", 100, 0))
        assert late.spent_nano == 1000 - left + 100


@pytest.mark.net
async def test_a_budget_begun_anew(limits):
    """A budget can be forgotten, as for the next month."""
    await limits.take_money("client:", ask_money("a", 1000, 0))
    assert await limits.forget_budget("client")
    assert not await limits.forget_budget("tenant", "acme")
    assert (await limits.take_money("client:", ask_money("b", 0, 1000))).at_hand_nano == 1000


@pytest.mark.net
async def test_a_budget_begun_anew_while_it_is_used(limits):
    """Who lives tells all that it ever spent: what it told before does not count again."""
    await limits.take_money("client:", ask_money("a", 1000, 0))
    assert await limits.forget_budget("client")
    assert await limits.read_budget("client") is None
    assert (await limits.take_money("client:", ask_money("a", 1000, 0))).spent_nano == 0
    assert (await limits.take_money("client:", ask_money("a", 1250, 0))).spent_nano == 250
    assert not await limits.forget_budget("client", "another")


@pytest.mark.net
@pytest.mark.parametrize(("lost", "spent"), [("spent", 500), ("free", 100)])
async def test_a_look_at_a_budget(lost, spent):
    """What all spent, what of it the dead may have, and what the living have at hand; looking changes nothing."""
    async with RedisLimits(shared_redis().url, prefix=fresh_prefix(), lost=lost) as limits:
        assert await limits.read_budget("batch", "b") is None
        await limits.take_money("batch:b", ask_money("dead", 0, 400, ttl_s=0.01))
        await limits.take_money("batch:b", ask_money("alive", 100, 300))
        await trio.sleep(0.02)
        for _ in range(2):
            found = await limits.read_budget("batch", "b")
            assert found is not None
            assert (found.spent_usd, found.assumed_usd, found.held_usd) == tuple(
                Decimal(nano) / 10**9 for nano in (spent, spent - 100, 300)
            )
    with pytest.raises(gr.ConfigError, match="lost_after_s: must be from 2 to 30"):
        RedisLimits(shared_redis().url, lost_after_s=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("client", None), ("client", 6379), ("prefix", 1), ("prefix", None), ("lost", []), ("lost_after_s", "5")],
)
def test_settings_of_the_wrong_kind(name: str, value: object) -> None:
    """They are refused by name at once: with a client that is none, every request would wait until its deadline."""
    settings: dict[str, Any] = {"client": "redis://localhost", name: value}
    with pytest.raises(gr.ConfigError, match=f"{name}: must be"):
        RedisLimits(**settings)


# Pools


def saturate(*, seed, seconds, clients=3, requests=600, tokens=None, workers=32, kind="sliding", dies_at=None):
    """Several clients that share limits and are asked without end, and a service that counts for itself."""
    limits = (Limit(requests=requests, kind=kind), *(() if tokens is None else (Limit(tokens=tokens, kind=kind),)))
    simulator = SimulatorConfig(
        limits=limits,
        clock_offset_s=17.3,
        scenario=Scenario(latency=Latency(head=Spread(median_s=1.0, spread=0.5, max_s=10))),
        reply_tokens=60,
    )
    rates = gr.RateLimits(requests_per_minute=requests, tokens_per_minute=tokens)
    backend = MemoryBackend()

    async def live(world: World, number: int, answered: list[int]) -> None:
        async with world.open_client(api_key="sk-same", rates=rates, shared=backend) as client:
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    while True:
                        await client.chat("Hello " * 45)

                for _ in range(workers):
                    nursery.start_soon(ask)
                await trio.sleep(dies_at if dies_at is not None and number == 0 else seconds)
                # Not by a deadline: a client that sees one raises what it would wait out beyond it.
                nursery.cancel_scope.cancel()
            answered[number] = client.statistics().answered

    async def scenario(world: World):
        answered = [0] * clients
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(live, world, number, answered)
        return answered, world.simulator.limit_windows(), backend.calls

    return run(scenario, seed=seed, simulator=simulator, link=LINK).value


@pytest.mark.parametrize("kind", ["sliding", "fixed", "token_bucket"])
def test_three_clients_on_one_rate(kind, seed, record_property):
    """Three clients use 97 % of 600 requests a minute together, each its part, and never more than all of it."""
    answered, windows, calls = saturate(seed=seed, seconds=180, kind=kind)
    used = [w.used / w.limit.amount for w in windows if w.limit.requests is not None][1:-1]
    record_property(
        "figure", f"{kind}: {statistics.mean(used):.2%} used, at most {max(used):.1%}; {answered}; {calls} questions"
    )
    assert statistics.mean(used) >= 0.97
    assert max(used) <= 1
    assert min(answered) > 0.2 * sum(answered)


def test_three_clients_on_tokens(seed, record_property):
    """The same of tokens, which are put right when the replies are there."""
    answered, windows, calls = saturate(seed=seed, seconds=240, requests=6_000, tokens=50_000)
    # What replies take is learned in the first minute and a half.
    used = [w.used / w.limit.amount for w in windows if w.limit.tokens is not None][2:-1]
    record_property(
        "figure", f"{statistics.mean(used):.2%} used, at most {max(used):.1%}; {answered}; {calls} questions"
    )
    assert statistics.mean(used) >= 0.94
    # The service counts a reply when it ends: a few of those under way, a tenth of a minute's tokens, end in the next.
    assert max(used) <= 1.03


def test_the_rate_of_one_that_went(seed):
    """When one of three has gone, the others have all of the rate."""
    _, windows, _ = saturate(seed=seed, seconds=200, dies_at=60)
    used = [w.used / w.limit.amount for w in windows if w.limit.requests is not None]
    assert used[2] >= 0.97


async def test_places_are_shared_out(autojump_clock):
    """Ten places for two clients: never more in flight, and each has its part while both want more."""
    most = {"now": 0, "most": 0}
    backend = MemoryBackend()

    def count(change):
        most["now"] += change
        most["most"] = max(most["most"], most["now"])

    async def serve(peer):
        while await peer.request() is not None:
            count(1)
            await trio.sleep(0.5)
            count(-1)
            await peer.send(chat())

    served = [0, 0]

    async def live(number, delay_s):
        await trio.sleep(delay_s)
        async with (
            open_shared_limits(backend, holder=str(number), rng=random.Random(number)) as shared,
            open_place(serve, rates=gr.RateLimits(max_in_flight=10), shared=shared) as place,
        ):
            with trio.move_on_after(20 - delay_s):
                async with trio.open_nursery() as nursery:

                    async def ask():
                        while True:
                            await place.ask()
                            served[number] += 1

                    for _ in range(20):
                        nursery.start_soon(ask)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live, 0, 0)
        nursery.start_soon(live, 1, 2)
    assert most["most"] <= 10
    assert sum(served) > 0.9 * 10 * 2 * 20
    assert min(served) > 0.3 * sum(served)


# Budgets


QUOTES = PriceBook(gr.PricePolicy(own={"m": {"prompt": "0.000001", "completion": "0.000001"}}))


class Cut:
    """A backend that one process cannot reach: it fails, or does not answer."""

    def __init__(self, inner, *, is_hung):
        self.inner = inner
        self.is_hung = is_hung
        self.is_cut = False

    def __getattr__(self, name):
        async def call(*args):
            if self.is_cut and self.is_hung:
                await trio.sleep_forever()
            if self.is_cut:
                raise OSError("no way there")
            return await getattr(self.inner, name)(*args)

        return call


def spending(**fields):
    quote = QUOTES.table.quote("m", prompt_tokens=100)
    return Spending(quote=quote, max_tokens=900, model="m", **fields)


async def spend(backend, holder, *, usd="1", actual="0.0003", tasks=20, rng, deny=None, tenant="", seconds=300):
    """A client that spends until its budget is used up; returns what it spent, by its own account."""
    async with open_shared_limits(backend, holder=holder, rng=rng) as shared:
        assert shared is not None
        budget = Budget(tenant_usd=usd) if tenant else Budget(usd=usd)
        gate = BudgetGate(BudgetBook(budget))
        shared.share_budget(gate)
        spent = [Decimal(0)]

        async def go():
            while True:
                try:
                    reservation = gate.reserve_nowait(spending(tenant=tenant)) or await gate.wait(
                        spending(tenant=tenant)
                    )
                except BudgetExceededError:
                    return
                await trio.sleep(rng.uniform(0.05, 0.3))
                gate.settle(reservation, Decimal(actual))
                spent[0] += Decimal(actual)

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(go)
        return spent[0]


@pytest.mark.parametrize("tenant", ["", "acme"])
async def test_three_clients_on_one_budget(autojump_clock, rng, record_property, tenant):
    """Three clients use a budget up together to the last request that it pays for, and not a cent more."""
    backend = MemoryBackend()
    spent: list[Decimal] = []

    async def live(number):
        spent.append(await spend(backend, str(number), rng=random.Random(number), tenant=tenant))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(live, number)
    record_property("figure", f"{sum(spent)} of 1 USD by three clients, {backend.calls} questions")
    assert sum(spent) <= 1
    assert sum(spent) >= Decimal("0.97")
    (name,) = backend.spent
    assert Decimal(backend.spent[name]) / 10**9 == sum(spent)


@pytest.mark.parametrize("is_open_before", [False, True])
async def test_an_account_with_an_amount_of_its_own(autojump_clock, rng, is_open_before):
    """An account that is opened with an amount, or given one later, is one for all as well."""
    backend = MemoryBackend()
    async with (
        open_shared_limits(backend, holder="a", rng=rng) as one,
        open_shared_limits(backend, holder="b", rng=rng) as other,
    ):
        spent = Decimal(0)
        for shared in (one, other):
            assert shared is not None
            gate = BudgetGate(BudgetBook(Budget()))
            shared.share_budget(gate)
            if is_open_before:
                gate.book.open_account("batch", "b")
            gate.book.open_account("batch", "b", usd=Decimal("0.005"))
            with pytest.raises(BudgetExceededError):
                while True:
                    gate.settle(await gate.wait(spending(batch="b")), Decimal("0.001"))
                    spent += Decimal("0.001")
        assert spent == Decimal("0.005")


async def test_money_is_handed_on(autojump_clock, rng):
    """What one has at hand and does not need, another has a little later."""
    backend = MemoryBackend()
    async with open_shared_limits(backend, holder="idle", rng=rng) as shared:
        assert shared is not None
        gate = BudgetGate(BudgetBook(Budget(usd="0.01")))
        shared.share_budget(gate)
        gate.settle(await gate.wait(spending()), Decimal("0.0001"))
        spent = await spend(backend, "busy", usd="0.01", rng=rng, tasks=2)
        assert spent >= Decimal("0.0085")
        told = gate.book.account("client")
        assert told is not None
        assert told.limit_usd == Decimal("0.01")


async def test_a_backend_that_is_gone(autojump_clock, rng, caplog):
    """Without the backend what is at hand is used up; then requests wait, and go on when it is back."""
    backend = MemoryBackend()
    async with open_shared_limits(backend, holder="a", rng=rng) as shared:
        assert shared is not None
        gate = BudgetGate(BudgetBook(Budget(usd="1")))
        shared.share_budget(gate)
        gate.settle(await gate.wait(spending()), Decimal("0.0001"))
        backend.is_broken = True
        reserved = 0
        with trio.move_on_after(5):
            while True:
                await gate.wait(spending())
                reserved += 1
        assert 0 < reserved < 20
        assert shared.statistics().failure == "the backend is gone"
        assert len(caplog.records) == 1
        backend.is_broken = False
        with trio.fail_after(2):
            await gate.wait(spending())


@pytest.mark.parametrize("is_hung", [False, True])
async def test_places_that_cannot_be_renewed(autojump_clock, is_hung):
    """A process that the backend cannot hear from has its places for as long as it was given them, and no longer."""
    busy = most = 0

    async def serve(peer):
        nonlocal busy, most
        while await peer.request() is not None:
            busy += 1
            most = max(most, busy)
            await trio.sleep(1)
            busy -= 1
            await peer.send(chat("x"))

    backend = MemoryBackend()
    cut: Any = Cut(backend, is_hung=is_hung)
    rates = RateLimits(max_in_flight=4)
    async with (
        open_shared_limits(cut, holder="a", rng=random.Random(1)) as first,
        open_shared_limits(backend, holder="b", rng=random.Random(2)) as second,
        open_place(serve, shared=first, rates=rates) as lone,
        open_place(serve, shared=second, rates=rates) as other,
    ):

        async def load(place):
            with suppress(DeadlineExceededError):
                while True:
                    await place.ask("x", model="m", deadline=60)

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(load, lone)
            await trio.sleep(5)
            assert most == 4
            cut.is_cut = True
            for _ in range(8):
                nursery.start_soon(load, other)
            await trio.sleep(20)
            # The places of the one are the other's by now, and what it had begun with them has ended.
            most = 0
            await trio.sleep(20)
            assert other.statistics.in_flight == 4
            assert lone.statistics.in_flight == 0
            assert most == 4


async def test_what_cannot_be_shared(autojump_clock, rng):
    """A budget bound by credits, and keys that a function gives, are refused, and so is what is no backend."""
    async with open_shared_limits(MemoryBackend(), holder="a", rng=rng) as shared:
        assert shared is not None
        with pytest.raises(ConfigError, match="from_credits"):
            shared.share_budget(BudgetGate(BudgetBook(Budget(from_credits=True))))
    with pytest.raises(ConfigError, match="shared: must be"):
        gr.ClientConfig(api_key="k", shared=object())
    with pytest.raises(ConfigError, match="function"):
        async with gr.open_client(api_key=lambda: "sk-k", shared=MemoryBackend()):
            pass
    for fields in ({"prefix": "{"}, {"lost": "maybe"}):
        settings: Any = fields
        with pytest.raises(ConfigError, match=next(iter(fields))):
            RedisLimits("redis://h", **settings)
