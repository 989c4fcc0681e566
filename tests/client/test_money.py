"""Money through the whole client: chats, streams, sessions, tools and re-asks, against the server's own ledger."""

from __future__ import annotations

import random
from contextlib import suppress
from decimal import Decimal
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from call_forms import add
from worlds import World, errors, open_world

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.simulator.faults import FaultKind

D = Decimal
MODELS = ("anthropic/claude-opus-4.1", "openai/gpt-4-turbo", "x-ai/grok-4")
PRICED: dict[str, Any] = {"prices": gr.PricePolicy(refresh_s=None), "ledger": gr.LedgerConfig()}
FAULTS: dict[FaultKind, float] = {
    "429_upstream": 0.05,
    "503": 0.03,
    "500": 0.02,
    "502": 0.02,
    "504": 0.02,
    "error_in_200": 0.03,
    "mid_stream_error": 0.04,
    "stream_cut": 0.05,
    "connection_cut": 0.03,
}


class Sum(msgspec.Struct):
    """The form that some answers are to have."""

    total: int


def prompt_of(rng: random.Random, name: str) -> tuple[str, dict[str, object]]:
    """A prompt of some kind, with the options that it needs."""
    kind = rng.choice(["plain", "plain", "tools", "form"])
    if kind == "tools":
        return f'[[call add#{name} {{"a": 1, "b": 2}}]] [[tokens 20]]', {"tools": [add]}
    if kind == "form":
        return rng.choice(["Sum?", "Sum? [[broken]]"]), {
            "response_type": Sum,
            "output": gr.OutputPolicy(on_invalid="none"),
        }
    return f"[[tokens {rng.randrange(5, 300)}]] {'word ' * rng.randrange(60)}", {}


async def spend(client: Any, rng: random.Random, name: str, *, sessions: int = 20, **options: object) -> None:
    """One turn in one of the ways there are; a stream may be left early."""
    prompt, more = prompt_of(rng, name)
    options |= more
    way = rng.randrange(4)
    if way == 0:
        await client.chat(prompt, **options)
    elif way == 1:
        await client.session(f"s{rng.randrange(sessions)}").ask(prompt, **options)
    else:
        opened = client.stream if way == 2 else client.session(f"s{rng.randrange(sessions)}").stream
        async with opened(prompt, **options) as stream:
            leave_after = rng.choice([None, None, 3])
            seen = 0
            async for _event in stream:
                seen += 1
                if seen == leave_after:
                    break


def charged_usd(world: World) -> Decimal:
    """What the server has charged, from its own integers."""
    return sum((D(charge.nanousd).scaleb(-9) for charge in world.simulator.ledger.charges()), D(0))


async def spend_a_dollar(seed: int) -> tuple[Decimal, gr.AccountStatistics]:
    """200 tasks until the budget is used up: what was charged, and the account of the client."""
    rng = random.Random(seed)

    async def task(client: gr.Client, name: str) -> None:
        await trio.sleep(rng.random())
        try:
            for number in range(10_000):
                limit = rng.choice([{}, {"max_tokens": 30}, {"max_tokens": 500}])
                with trio.move_on_after(rng.choice([0.5, 1000, 1000, 1000])):
                    await spend(client, rng, f"{name}n{number}", model=rng.choice(MODELS), **limit)
        except (gr.BudgetExceededError, gr.InvalidOutputError):
            pass

    simulated = SimulatorConfig(seed=seed, tokens_per_s=200)
    async with open_world(
        simulated,
        notes=False,
        budget=gr.Budget(usd=1, max_tokens=600),
        pool=gr.PoolLimits(max_connections=200),
        **PRICED,
    ) as world:
        await world.client.refresh_prices()
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(task, world.client, f"t{number}")
        await trio.sleep(600)
        budget, costs = world.client.budget(), world.client.cost_snapshot()
        assert (budget.client.held_usd, budget.open_reservations) == (0, 0)
        # Those whose fate stays unknown count at their worst.
        assert budget.client.spent_usd == costs.cost_usd + budget.client.assumed_usd
        return charged_usd(world), budget.client


async def test_a_dollar_is_used_and_not_overshot(autojump_clock, seed, record_property):
    """200 tasks with tools, re-asks, cancels and streams left early: never above the budget, and it can be used."""
    charged, account = await spend_a_dollar(seed)
    record_property(
        "figure",
        f"charged {charged:.4f} of 1 USD, {account.assumed_usd:.4f} for lost answers, overrun {account.overrun_usd}",
    )
    assert account.overrun_usd == 0
    assert charged <= account.spent_usd <= 1
    assert account.spent_usd >= D("0.95")


async def test_a_retry_that_is_not_paid_for_may_have_been_billed_before(autojump_clock):
    """What counts as spent is told in the error, and no fallback is asked, which would be paid for as well."""
    own = {"a/dear": {"prompt": "0", "completion": "0.001"}, "b/cheap": {"prompt": "0", "completion": "0.0001"}}
    async with open_world(
        answer=errors(504),
        budget=gr.Budget(usd="1.5"),
        prices=gr.PricePolicy(own=own, on_start=False, refresh_s=None),
        ledger=gr.LedgerConfig(lookups=0),
    ) as world:
        with pytest.raises(gr.ProviderError) as raised:
            await world.client.chat("Hi", model="a/dear", fallbacks=["b/cheap"], max_tokens=1000)
        assert (raised.value.attempts, raised.value.maybe_billed, len(world.sent)) == (1, True, 1)
        assert world.client.budget().client.spent_usd == 1


@pytest.mark.parametrize("spend_slowly", ["chat", "stream", "row"])
async def test_what_the_close_cuts_off_is_in_the_file(autojump_clock, tmp_path, spend_slowly):
    """Requests of tasks that outlive the client were sent, and may have been billed: each has its row in the file."""
    path = tmp_path / "ledger.jsonl"
    seen: list[gr.LedgerChange] = []

    async def spend(client: Any) -> None:
        with pytest.raises(gr.PoolClosedError):
            await {"chat": chat_without_bound, "stream": stream_without_bound, "row": row_without_bound}[spend_slowly](
                client
            )

    async with (
        trio.open_nursery() as nursery,
        open_world(SimulatorConfig(latency_s=5.0), ledger=gr.LedgerConfig(path=path)) as world,
    ):
        world.client.observe_ledger(seen.extend)
        nursery.start_soon(spend, world.client)
        await trio.sleep(1)
    assert [change.row.state for change in seen] == ["unreconciled"]
    with path.open("rb") as file:
        assert [(row.state, row.maybe_billed) for row in gr.LedgerReader(file).rows()] == [("unreconciled", True)]


LONG = "[[tokens 2000]]"  # at the simulator's price of this model more than twice what UNBOUNDED has
UNBOUNDED: dict[str, Any] = {"model": "openai/gpt-4o-mini", "budget": gr.Budget(usd="0.0005"), **PRICED}


async def chat_without_bound(client: Any, **options: object) -> None:
    """A chat."""
    await client.chat(LONG, **options)


async def stream_without_bound(client: Any, **options: object) -> None:
    """A stream, read to its end."""
    async with client.stream(LONG, **options) as stream:
        await stream.collect()


async def ask_without_bound(client: Any, **options: object) -> None:
    """A turn of a session."""
    await client.session("s").ask(LONG, **options)


async def complete_without_bound(client: Any, **options: object) -> None:
    """A completion."""
    await client.completions(LONG, **options)


async def row_without_bound(client: Any, **options: object) -> None:
    """A row of a batch."""
    row = {"messages": [{"role": "user", "content": LONG}], **options}
    async with client.batch([row]) as results:
        async for result in results:
            result.unwrap()


async def assert_within_budget(spend_much: Any, *, default: dict[str, object] | None = None, **options: object) -> None:
    """A request that would cost more than there is if nothing bounded it costs no more than there is."""
    async with open_world(options=default or {}, **UNBOUNDED) as world:
        await world.client.refresh_prices()
        await spend_much(world.client, **options)
        assert 0 < charged_usd(world) <= D("0.0005")
        assert world.client.budget().client.overrun_usd == 0


@pytest.mark.parametrize("default", [{}, {"max_tokens": 100}, {"max_completion_tokens": None}])
@pytest.mark.parametrize("options", [{"max_tokens": None}, {"max_completion_tokens": None}])
@pytest.mark.parametrize("spend_much", [chat_without_bound, stream_without_bound, ask_without_bound, row_without_bound])
async def test_a_bound_of_null_is_none_given(autojump_clock, spend_much, default, options):
    """None where a bound could stand leaves the request bounded, by its defaults or by what is left to spend."""
    await assert_within_budget(spend_much, default=default, **options)


@pytest.mark.parametrize("spend_much", [chat_without_bound, stream_without_bound, ask_without_bound])
async def test_a_bound_of_either_name_stands_alone(autojump_clock, spend_much):
    """A call's bound takes the place of a default of the other name, which would hold instead of it."""
    default: dict[str, object] = {"max_completion_tokens": 3000}
    await assert_within_budget(spend_much, default=default, max_tokens=50)
    await assert_within_budget(spend_much, default=default, extra_body={"max_tokens": 50})


async def test_a_bound_of_a_session_of_the_other_name(autojump_clock):
    """The same between a session and its turn."""

    async def ask(client: Any) -> None:
        await client.session("s", max_completion_tokens=3000).ask(LONG, max_tokens=50)

    await assert_within_budget(ask)


@pytest.mark.parametrize("left", [{}, {"max_tokens": None}])
async def test_an_extension_takes_a_bound_away(autojump_clock, left):
    """What an extension leaves of the options is all there is: a bound that it took away is given anew."""

    async def unbounded(_context: Any, state: Any, proceed: Any) -> None:
        del state.options["max_tokens"]
        state.options |= left
        await proceed()

    for spend_much in (chat_without_bound, stream_without_bound, ask_without_bound, complete_without_bound):

        async def spend_inside(client: Any, spend_much: Any = spend_much, **options: object) -> None:
            client.use(unbounded)
            await spend_much(client, **options)

        await assert_within_budget(spend_inside, max_tokens=50)


@pytest.mark.long
def test_many_dollars(seed, record_property):
    """The same with 1,000 seeds."""
    clocks = (trio.testing.MockClock(autojump_threshold=0) for _ in range(1_000))
    found = [trio.run(spend_a_dollar, seed + number, clock=clock) for number, clock in enumerate(clocks)]
    spent = [account.spent_usd for _, account in found]
    record_property("figure", f"1,000 seeds: {min(spent):.4f} to {max(spent):.4f} of 1 USD spent, never overrun")
    assert all(account.overrun_usd == 0 and charged <= account.spent_usd <= 1 for charged, account in found)
    assert min(spent) >= D("0.95")


def rows_of(count: int) -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": f"[[tokens 40]] tell me about {n}"}]} for n in range(count)]


async def test_a_batch_has_a_budget(autojump_clock):
    """`batch_usd` bounds each call of `client.batch`, which is a row of the costs, and an account while it runs."""
    limit = D("0.0001")
    async with open_world(notes=False, budget=gr.Budget(batch_usd=limit), **PRICED) as world:
        await world.client.refresh_prices()
        names: list[str] = []
        for _ in range(2):
            async with world.client.batch(rows_of(20), max_tokens=50) as batch:
                names.append(batch.name)
                results = [result async for result in batch]
                (account,) = world.client.budgets()
            assert (account.kind, account.limit_usd) == ("batch", limit)
            assert 0 < sum(result.error is None for result in results) < 20
            assert {type(result.error) for result in results if result.error} == {gr.BudgetExceededError}
            assert world.client.budget().accounts == 0
        costs = world.client.cost_snapshot().by_batch
        assert sorted(costs) == sorted(names)
        assert len(costs) == 2
        assert all(0 < row.cost_usd <= limit for row in costs.values())
        assert sum(row.cost_usd for row in costs.values()) == charged_usd(world)


async def test_a_batch_that_is_left_keeps_no_account(autojump_clock):
    """What its requests may have cost counts as spent, and its account is closed."""
    simulated = SimulatorConfig(latency_s=5.0)
    async with open_world(simulated, notes=False, budget=gr.Budget(batch_usd=1), **PRICED) as world:
        await world.client.refresh_prices()
        async with world.client.batch(rows_of(20), max_tokens=50, max_in_flight=4):
            await trio.sleep(1)
            assert world.client.budget().accounts == 1
        await trio.sleep(1_800)
        assert world.client.budget().assumed == 4
        assert (world.client.budget().accounts, world.client.budget().open_reservations) == (0, 0)


async def account_for(count: int, seed: int, *, tasks: int = 50) -> dict[str, int]:
    """So many turns with faults, cancels and streams left early; then our books against the server's."""
    rng = random.Random(seed)
    simulated = SimulatorConfig(
        seed=seed, fault_rates=FAULTS, generation_lag_s=8.0, ledger_size=20 * count, latency_s=0.2, tokens_per_s=200
    )
    ledger = gr.LedgerConfig(rows=20 * count, names=20 * count + 10, searches=20 * count)
    todo = iter(range(count))
    sessions = max(20, count // 20)  # of about ten turns: long ones cost what the budget has, and more

    async def work(client: gr.Client) -> None:
        for number in todo:
            with trio.move_on_after(rng.choice([0.6, 1.5, *(8 * [1e3])])), suppress(gr.GorouterError):
                model = rng.choice(MODELS)
                await spend(client, rng, f"c{number}", sessions=sessions, model=model, max_tokens=400)

    async with open_world(
        simulated,
        notes=False,
        pool=gr.PoolLimits(max_connections=tasks),
        prices=gr.PricePolicy(refresh_s=None),
        budget=gr.Budget(usd=10_000, session_usd=10_000),
        ledger=ledger,
    ) as world:
        await trio.sleep(5)
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(work, world.client)
        await trio.sleep(3_600)
        return compare(world)


def compare(world: World) -> dict[str, int]:
    """Every row against the server's charge, every charge against a row, and the sums against each other."""
    rows, costs = world.client.ledger_rows(), world.client.cost_snapshot()
    charges = {charge.generation_id: D(charge.nanousd).scaleb(-9) for charge in world.simulator.ledger.charges()}
    assert len(rows) == costs.attempts
    assert costs.reconciling == 0
    for row in rows:
        if row.cost_usd is not None:
            assert row.cost_usd == charges.pop(row.generation_id or "", D(0)), row
    lost = [row for row in rows if row.state == "unreconciled"]
    for row in lost:
        charges.pop(row.generation_id or "", None)
    left_over = [usd for usd in charges.values() if usd]
    assert len(left_over) <= sum(row.generation_id is None for row in lost), "each of them is visible as unreconciled"
    assert costs.unreconciled == len(lost)
    account = world.client.budget().client
    assert account.held_usd == 0
    assert account.spent_usd == costs.cost_usd + account.assumed_usd >= charged_usd(world)
    return {state: sum(row.state == state for row in rows) for state in sorted({row.state for row in rows})} | {
        purpose: sum(row.purpose == purpose for row in rows) for purpose in sorted({row.purpose for row in rows})
    }


async def test_our_books_are_the_servers(autojump_clock, seed, record_property):
    """Rounds of tools, re-asks, faults, cancels and streams left early: each attempt has its row and its cost."""
    found = await account_for(300, seed)
    record_property("figure", ", ".join(f"{count} {name}" for name, count in found.items()) + ": sums agree exactly")
    assert found["tool_round"] > 20
    assert found["reask"] > 5


@pytest.mark.long
async def test_a_hundred_thousand_turns(autojump_clock, seed, record_property):
    """The same with 10^5 turns."""
    found = await account_for(100_000, seed, tasks=200)
    record_property("figure", ", ".join(f"{count:,} {name}" for name, count in found.items()) + ": sums agree exactly")
