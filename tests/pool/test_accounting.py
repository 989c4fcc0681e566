"""All of the accounting together, against a server with books of its own: nothing unaccounted, nothing overshot."""

from __future__ import annotations

import random
import time
from decimal import Decimal
from functools import partial
from pathlib import Path

import pytest
import trio
from attempts import answered
from paid import Paid, open_paid

from gorouter_trio.config import Budget, ClientConfig, LedgerConfig, PoolLimits, PricePolicy
from gorouter_trio.errors import BudgetExceededError, UnpriceableRequestError
from gorouter_trio.pool.accounting import Accounting, with_max_tokens
from gorouter_trio.pool.ledger import Owner
from gorouter_trio.pool.ledger_file import LedgerReader
from gorouter_trio.pool.prices import PricesRefreshed
from gorouter_trio.simulator import Simulator, SimulatorConfig
from gorouter_trio.wire.codec import decode_json
from gorouter_trio.wire.responses import Usage

D = Decimal


def simulated(seed: int = 0, **fields: object) -> Simulator:
    pace = {"latency_s": 0.5, "first_token_s": 0.2, "tokens_per_s": 100.0, "jitter": 0.5}
    config = SimulatorConfig(seed=seed, **{**pace, **fields})  # type: ignore[arg-type]  # fields of the settings
    return Simulator(config, wall=lambda: 1_800_000_000 + trio.current_time())


async def test_one_call(autojump_clock) -> None:
    """Its row, its cost to the last digit, and what is left of the budget."""
    async with open_paid(simulated(), budget=Budget(usd="0.01")) as place:
        await trio.sleep(5)
        row = await place.chat("Hello there", tenant="t", owner=Owner(session="s", batch="b"))
        assert (row.state, row.tenant, row.session, row.batch) == ("settled", "t", "s", "b")
        assert row.cost_usd == place.charged_usd > 0
        assert (row.requested_model, row.model) == ("openai/gpt-4o-mini", "openai/gpt-4o-mini-2024-07-18")
        client = place.accounting.gate.book.client
        assert (client.spent_usd, client.held_usd) == (place.charged_usd, 0)
        by = place.accounting.cost_snapshot()
        assert by.by_tenant["t"].cost_usd == by.by_session["s"].cost_usd == by.by_batch["b"].cost_usd == by.cost_usd
        estimate = place.accounting.estimate(
            Usage(prompt_tokens=row.prompt_tokens, completion_tokens=row.completion_tokens),
            row.model,
            row.requested_model,
        )
        assert estimate == row.cost_usd, "the price list of the server says the same"


async def test_the_bound_is_sent(autojump_clock) -> None:
    """A request without a bound gets the budget's, and the answer keeps to it."""
    async with open_paid(simulated(), budget=Budget(usd=1, max_tokens=20)) as place:
        await trio.sleep(5)
        row = await place.chat("[[tokens 300]]", max_tokens=None)
        assert row.completion_tokens == 20
    assert decode_json(with_max_tokens(b'{"model":"m","messages":[]}', 7)) == {
        "max_tokens": 7, "model": "m", "messages": []
    }  # fmt: skip


async def test_nothing_is_sent_without_a_price(autojump_clock) -> None:
    """With a budget, a model whose price is unknown is refused before anything goes out; without one it is sent."""
    async with open_paid(simulated(), budget=Budget(usd=1)) as place:
        await trio.sleep(5)
        with pytest.raises(UnpriceableRequestError, match="openrouter/auto"):
            await place.chat("Hello", model="openrouter/auto")
        with pytest.raises(BudgetExceededError):
            await place.chat("Hello", model="openai/gpt-4-turbo", max_tokens=100_000)
        assert place.simulator.statistics().received == 0
    async with open_paid(simulated()) as place:
        row = await place.chat("Hello", model="openrouter/auto")
        assert row.cost_usd == place.charged_usd > 0


async def test_the_tasks_and_the_file(autojump_clock, tmp_path: Path) -> None:
    """One place opens it all: prices, the credits' bound, the file; at the end what is lost is written as such."""
    path = tmp_path / "ledger.jsonl"
    budget = Budget(from_credits=True)
    async with open_paid(simulated(), budget=budget, ledger=LedgerConfig(path=path), remaining="0.25") as place:
        await trio.sleep(5)
        client = place.accounting.gate.book.client
        assert (client.limit_usd, place.accounting.is_bounded) == (D("0.25"), True)
        await place.chat("Hello")
        await place.chat("[[fault stream_cut]] Hello", streamed=True)
        assert place.accounting.ledger.searching == 1
        with pytest.raises(BudgetExceededError):
            await place.chat("Hello", model="openai/gpt-4-turbo", max_tokens=100_000)
    assert [event.models for event in place.prices if isinstance(event, PricesRefreshed)] == [place.models_on_offer]
    with path.open("rb") as file:
        rows = list(LedgerReader(file).rows())
    assert [(row.row, row.state) for row in rows] == [(1, "settled"), (2, "unreconciled")]
    assert place.lost == rows[1:]


def test_bounded_by_an_account() -> None:
    """A batch with a budget of its own bounds a client that has none."""
    accounting = Accounting(ClientConfig(api_key="k"), now=lambda: 0.0)
    assert not accounting.is_bounded
    accounting.gate.book.open_account("batch", "night", usd=D(1))
    assert accounting.is_bounded


# --- 200 tasks at the edge --------------------------------------------------------------------------------------------

EDGE_MODELS = ("anthropic/claude-opus-4.1", "openai/gpt-4-turbo", "x-ai/grok-4")


async def spend_up(seed: int) -> tuple[Decimal, Decimal, Decimal]:
    """200 tasks ask until the budget of one dollar is used up; what was charged, was committed at most, and overrun."""
    rng = random.Random(seed)
    prompts = [f"[[tokens {rng.randrange(5, 400)}]] {'word ' * rng.randrange(60)}{n}" for n in range(200)]

    async def task(place: Paid, prompt: str, model: str) -> None:
        await trio.sleep(rng.random())
        try:
            while True:
                limit = rng.choice([None, 30, 150, 500])
                await place.chat(prompt, model=model, max_tokens=limit, streamed=rng.random() < 0.3)
        except BudgetExceededError:
            pass

    models = [m.id for m in SimulatorConfig().models if m.id in EDGE_MODELS]
    budget = Budget(usd=1, max_tokens=600)
    pool = PoolLimits(max_connections=200)
    async with open_paid(simulated(seed, tokens_per_s=0.0), budget=budget, pool=pool) as place:
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            for prompt in prompts:
                nursery.start_soon(task, place, prompt, rng.choice(models))
        client = place.accounting.gate.book.client
        assert (client.held_usd, place.accounting.gate.waiting) == (0, 0)
        assert client.spent_usd == place.charged_usd == place.accounting.cost_snapshot().cost_usd
        return place.charged_usd, place.most_committed_usd, client.overrun_usd


@pytest.mark.parametrize("number", range(2))
async def test_a_dollar_is_used_and_not_overshot(autojump_clock, rng: random.Random, record_property, number) -> None:
    """200 tasks at once on a budget of one dollar: never above it, and at least 95 % of it is used."""
    charged, committed, overrun = await spend_up(rng.getrandbits(32))
    record_property("figure", f"charged {charged:.4f} of 1 USD, committed {committed:.4f} at most, overrun {overrun}")
    assert overrun == 0
    assert D("0.95") <= charged <= 1
    assert committed <= 1


@pytest.mark.long
def test_a_thousand_dollars(seed: int, record_property) -> None:
    """The same with 1,000 seeds."""
    results = [trio.run(spend_up, seed + n, clock=trio.testing.MockClock(autojump_threshold=0)) for n in range(1_000)]
    least = min(charged for charged, _, _ in results)
    record_property("figure", f"1,000 seeds: least used {least:.4f} USD, most {max(r[0] for r in results):.4f}")
    assert all(overrun == 0 and charged <= 1 and committed <= 1 for charged, committed, overrun in results)
    assert least >= D("0.95")


# --- faults and cancels -----------------------------------------------------------------------------------------------

FAULTS = {
    "429_upstream": 0.05,
    "503": 0.03,
    "500": 0.02,
    "502": 0.02,
    "504": 0.02,
    "524_html": 0.02,
    "402_in_flight": 0.01,
    "error_in_200": 0.03,
    "whitespace_200": 0.03,
    "mid_stream_error": 0.04,
    "stream_cut": 0.05,
    "connection_cut": 0.03,
}


async def account_for(count: int, seed: int, *, tasks: int = 50) -> dict[str, int]:
    """So many calls with faults, cancels and streams left early; then our books against the server's."""
    rng = random.Random(seed)
    simulator = simulated(
        seed, fault_rates=FAULTS, generation_lag_s=8.0, ledger_size=count + 10, cancel_billing="provider"
    )
    config = LedgerConfig(rows=count + 10, searches=count + 10, names=count + 20)
    todo = iter(range(count))

    async def work(place: Paid) -> None:
        for number in todo:
            owner = Owner(session=f"s{number % 37}", batch="b", purpose=rng.choice(["chat", "tool_round", "reask"]))
            model = rng.choice(["openai/gpt-4o-mini", "google/gemini-2.5-flash", "perplexity/sonar"])
            prompt = f"[[tokens {rng.randrange(1, 120)}]] {number}"
            leave = rng.choice([None, None, 0, 1, 5])
            with trio.move_on_after(rng.choice([0.6, 1.5, *(8 * [1e3])])):
                await place.chat(
                    prompt, model=model, owner=owner, streamed=rng.random() < 0.6, leave_after=leave, tenant="t"
                )

    budget = Budget(usd=1_000, tenant_usd=1_000, session_usd=100, batch_usd=1_000)
    pool = PoolLimits(max_connections=tasks)
    async with open_paid(simulator, ledger=config, budget=budget, pool=pool) as place:
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(work, place)
        await trio.sleep(30)
        await place.accounting.reconciliation.wait_idle()
        return _compare(place, count)


def _compare(place: Paid, count: int) -> dict[str, int]:
    """Every row against the server's charge, every charge against a row, and the sums against each other."""
    rows = place.accounting.ledger.rows()
    costs = place.accounting.cost_snapshot()
    charges = {charge.generation_id: D(charge.nanousd).scaleb(-9) for charge in place.simulator.ledger.charges()}
    states: dict[str, int] = {
        state: sum(row.state == state for row in rows) for state in sorted({row.state for row in rows})
    }
    assert len(rows) == costs.attempts == count
    assert costs.reconciling == 0
    for row in rows:
        if row.cost_usd:
            assert row.cost_usd == charges.pop(row.generation_id or "")
        elif row.cost_usd is not None:
            assert charges.pop(row.generation_id or "", D(0)) == 0, row
    lost = [row for row in rows if row.state == "unreconciled"]
    for row in lost:
        charges.pop(row.generation_id or "", None)
    left_over = [usd for usd in charges.values() if usd]
    assert len(left_over) <= sum(row.generation_id is None for row in lost), "each of them is visible as unreconciled"
    assert place.charged_usd == costs.cost_usd + sum(left_over)
    assert costs.unreconciled == len(lost) == len([*place.lost, *(row for row in lost if not row.tries)])
    books = place.accounting.gate.book.accounts()
    assert all(account.held_usd == 0 for account in books)
    assert books[0].spent_usd == costs.cost_usd + books[0].assumed_usd
    assert books[0].spent_usd >= place.charged_usd
    assert sum(account.spent_usd for account in books if account.kind == "session") == books[0].spent_usd
    assert place.errors == []
    return states


async def test_our_books_are_the_servers(autojump_clock, seed: int, record_property) -> None:
    """Faults, cancels and streams left early: after reconciliation the sums agree, and what is missing is visible."""
    states = await account_for(400, seed)
    record_property("figure", ", ".join(f"{count} {state}" for state, count in states.items()) + ": sums agree exactly")
    assert states["reconciled"] > 0


@pytest.mark.long
async def test_a_hundred_thousand_calls(autojump_clock, seed: int, record_property) -> None:
    """The same with 10^5 calls."""
    states = await account_for(100_000, seed, tasks=200)
    record_property("figure", ", ".join(f"{count:,} {state}" for state, count in states.items()) + ": sums agree")


@pytest.mark.parametrize("step", range(24))
async def test_cancelled_at_every_step(step: int) -> None:
    """Whenever a paid chat is cancelled, its reservation is closed or kept by a row, and closed once that is found."""
    simulator = simulated(latency_s=0.0, first_token_s=0.0, tokens_per_s=0.0)
    async with open_paid(simulator, budget=Budget(usd="0.02", max_tokens=500)) as place:
        while not len(place.accounting.prices.table):
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(partial(place.chat, "[[tokens 50]]", max_tokens=None, streamed=bool(step % 2)))
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        book = place.accounting.gate.book
        assert book.statistics().open_reservations == place.accounting.ledger.searching
        for row in place.accounting.ledger.close():
            assert row.state == "unreconciled"
        statistics = book.statistics()
        assert (statistics.open_reservations, statistics.client.held_usd) == (0, 0)
        assert statistics.client.spent_usd >= place.charged_usd
        assert statistics.settled + statistics.assumed == place.accounting.cost_snapshot().attempts


# --- what it costs ----------------------------------------------------------------------------------------------------


async def test_cost_of_the_hooks(record_property) -> None:
    """Bounding, reserving, learning, entering and settling, for one call, in microseconds."""
    own = {"m": {"prompt": "0.00000015", "completion": "0.0000006"}}
    config = ClientConfig(api_key="k", budget=Budget(usd=10**6), prices=PricePolicy(own=own))
    accounting = Accounting(config)
    body = b'{"model":"m","max_tokens":100,"messages":[{"role":"user","content":"%b"}]}' % (b"What is a tide? " * 60)
    attempt = answered("0.0001", model="m", prompt=240, completion=80, tenant="t")
    owner = Owner(session="s")

    def reserve_and_finish() -> None:
        spending = accounting.spending(body, model="m", max_tokens=100, tenant="t", session="s")
        reservation = accounting.reserve_nowait(spending)
        accounting.finish(attempt, body=body, owner=owner, reservation=reservation)

    def finish() -> None:
        accounting.finish(attempt, body=body, owner=owner)

    figures = {}
    for name, hook in (("with a budget", reserve_and_finish), ("ledger alone", finish)):
        times = []
        for _ in range(7):
            begun = time.process_time()
            for _ in range(1_000):
                hook()
            times.append((time.process_time() - begun) / 1_000)
        figures[name] = min(times) * 1e6
    record_property("figure", ", ".join(f"{name} {us:.1f} µs" for name, us in figures.items()) + " a call")
    assert figures["with a budget"] < 60
