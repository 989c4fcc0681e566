"""Background refreshes in virtual time: prices that fail, shrink, hang or are nonsense, and credits."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal

import pytest
import trio
import trio.testing

from gorouter_trio.config import Budget, PricePolicy
from gorouter_trio.errors import DeadlineExceededError, DecodeError, ProviderError
from gorouter_trio.pool.budget import BudgetBook
from gorouter_trio.pool.budget_gate import BudgetGate
from gorouter_trio.pool.prices import PriceBook, PriceEvent, PriceRefreshFailed, PricesRefreshed
from gorouter_trio.pool.refresh import CreditRefresh, PriceRefresh, Schedule, remaining_usd
from gorouter_trio.wire.catalog import Credits, KeyBudget, KeyInfo, Model, Pricing

D = Decimal
HOUR = 3600.0


def listed(count: int, price: str = "1") -> list[Model]:
    return [Model(f"m{n}", pricing=Pricing(prompt=D(price), completion=D(price))) for n in range(count)]


class Service:
    """GET /models as it answers now, and when it was asked."""

    def __init__(self) -> None:
        self.answer: list[Model] | Exception | float = listed(100)
        self.asked_at: list[float] = []

    async def models(self) -> list[Model]:
        self.asked_at.append(trio.current_time())
        await trio.sleep(0.1)
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, float):
            await trio.sleep(self.answer)
            return listed(100)
        return self.answer


class Place:
    def __init__(self, policy: PricePolicy) -> None:
        self.service = Service()
        self.events: list[PriceEvent] = []
        self.book = PriceBook(policy)
        self.refresh = PriceRefresh(
            self.book,
            self.service.models,
            wall=lambda: 1_000_000 + trio.current_time(),
            rng=random.Random(7),
            report=self.events.append,
        )


@asynccontextmanager
async def open_place(**policy: object) -> AsyncIterator[Place]:
    place = Place(PricePolicy(**policy))  # type: ignore[arg-type]  # fields of the settings
    async with trio.open_nursery() as nursery:
        await nursery.start(place.refresh.schedule.run)
        yield place
        nursery.cancel_scope.cancel()


async def test_at_the_start_and_every_six_hours(autojump_clock) -> None:
    """The list is fetched at once in the background, and then every 6 h, give or take a tenth, not in step."""
    async with open_place() as place:
        assert len(place.book.table) == 0, "opening does not wait for it"
        await trio.sleep(1)
        assert len(place.book.table) == 100
        await trio.sleep(40 * HOUR)
        gaps = [b - a for a, b in zip(place.service.asked_at, place.service.asked_at[1:], strict=False)]
    assert place.service.asked_at[0] == 0
    assert len(gaps) >= 5
    assert all(5.4 * HOUR <= gap <= 6.6 * HOUR + 1 for gap in gaps), gaps
    assert len({round(gap) for gap in gaps}) == len(gaps)


@pytest.mark.parametrize(
    ("answer", "failure", "says"),
    [
        (ProviderError("down", status=502), "error", "ProviderError: down"),
        (ValueError("a bug"), "error", "ValueError: a bug"),
        (listed(40), "shrunken", "it has 40 models, fewer than 50, and 100 were known"),
        ([], "broken", "none of its 0 rows has prices that can be used"),
        (listed(100, "NaN"), "broken", "none of its 100 rows has prices that can be used"),
        (1e9, "hung", "no answer within 60 s"),
    ],
    ids=["fails", "has a bug", "shrinks", "is empty", "is NaN", "hangs"],
)
async def test_what_fails_changes_nothing(autojump_clock, answer: object, failure: str, says: str) -> None:
    """The table stays the very same, and it is said within one interval; afterwards prices are fetched again."""
    async with open_place(refresh_s=600.0) as place:
        await trio.sleep(1)
        before = place.book.table
        place.service.answer = answer  # type: ignore[assignment]  # one of three
        await trio.sleep(600 * 1.1 + 61)
        events = [event for event in place.events if isinstance(event, PriceRefreshFailed)]
        assert place.book.table is before
        assert (events[0].failure, events[0].reason, events[0].kept_models) == (failure, says, 100)
        assert events[0].at_s - 1_000_000 <= 1 + 600 * 1.1 + 61
        assert place.book.statistics().failed_in_a_row == len(events)
        place.service.answer = listed(120)
        await trio.sleep(700)
        assert isinstance(place.events[-1], PricesRefreshed)
        assert len(place.book.table) == 120
        assert place.book.statistics().failed_in_a_row == 0


async def test_failures_come_back_sooner(autojump_clock) -> None:
    """Without any list at the start, waiting six hours would be wrong: 30 s, doubling, at most the interval."""
    async with open_place() as place:
        place.service.answer = ProviderError("down", status=502)
        await trio.sleep(30 * HOUR)
        gaps = [b - a for a, b in zip(place.service.asked_at, place.service.asked_at[1:], strict=False)]
    expected = [min(30 * 2.0**n, 6 * HOUR) for n in range(len(gaps))]
    assert len(gaps) >= 11
    assert all(0.9 * e <= gap - 0.1 <= 1.1 * e + 0.001 for e, gap in zip(expected, gaps, strict=True)), gaps


async def test_asked_for(autojump_clock) -> None:
    """`refresh` does it now and raises what is wrong; the failure is reported once."""
    async with open_place(on_start=False, refresh_s=None, timeout_s=5.0) as place:
        assert (await place.refresh.refresh()).models == 100
        place.service.answer = ProviderError("down", status=502)
        with pytest.raises(ProviderError, match="down"):
            await place.refresh.refresh()
        place.service.answer = listed(3)
        with pytest.raises(DecodeError, match="the list of prices was refused: it has 3 models"):
            await place.refresh.refresh()
        place.service.answer = 10.0
        with pytest.raises(DeadlineExceededError):
            await place.refresh.refresh()
        failures = [event.failure for event in place.events if isinstance(event, PriceRefreshFailed)]
        assert failures == ["error", "shrunken", "hung"]
        with trio.move_on_after(0.05):
            await place.refresh.refresh()
        assert len(place.events) == 4, "being cancelled is no failure"


async def test_start_stop_restart(autojump_clock) -> None:
    """As with the seed: started with an interval, restarted with another, stopped; a fetch that runs is cancelled."""
    async with open_place(on_start=False, refresh_s=None, jitter=0) as place:
        asked = place.service.asked_at
        await trio.sleep(100 * HOUR)
        assert (asked, place.refresh.schedule.interval_s) == ([], None)
        place.refresh.schedule.start(60)
        await trio.sleep(150)
        assert len(asked) == 3
        place.refresh.schedule.start(1000)
        await trio.sleep(950)
        assert (len(asked), place.refresh.schedule.interval_s) == (4, 1000)
        place.service.answer = 1e9
        place.refresh.schedule.start(1000)
        await trio.sleep(5)
        place.refresh.schedule.stop()
        await trio.sleep(10_000)
        assert (len(asked), place.events[-1].__class__) == (5, PricesRefreshed)
        place.service.answer = listed(50)
        place.refresh.schedule.start(1000)
        await trio.sleep(1)
        assert len(place.book.table) == 50


async def test_restarted_while_it_runs(autojump_clock) -> None:
    """Stopping and starting in the midst of a run begins a new one."""
    runs: list[float] = []

    async def work() -> bool:
        runs.append(trio.current_time())
        await trio.sleep(10)
        return True

    schedule = Schedule(work, interval_s=100, jitter=0, rng=random.Random(0))
    async with trio.open_nursery() as nursery:
        await nursery.start(schedule.run)
        await trio.sleep(5)
        schedule.stop()
        schedule.start(50)
        await trio.sleep(70)
        nursery.cancel_scope.cancel()
    assert runs == [0, 5, 65]


# --- credits ----------------------------------------------------------------------------------------------------------


async def test_credits_are_followed(autojump_clock) -> None:
    """The client's budget is what the API has left; a failure leaves it as it was and is reported."""
    gate = BudgetGate(BudgetBook(Budget(usd=10, from_credits=True, credits_refresh_s=100)))
    answers: list[Callable[[], Awaitable[Decimal | None]]] = []
    errors: list[Exception] = []

    async def remaining() -> Decimal | None:
        return await answers[0]()

    async def left(usd: str | None) -> Decimal | None:
        await trio.lowlevel.checkpoint()
        return None if usd is None else D(usd)

    async def fails() -> Decimal | None:
        await trio.lowlevel.checkpoint()
        raise ProviderError("down", status=502)

    async def hangs() -> Decimal | None:
        await trio.sleep_forever()
        return None

    refresh = CreditRefresh(gate, remaining, rng=random.Random(1), report=errors.append)
    answers.append(lambda: left("3"))
    async with trio.open_nursery() as nursery:
        await nursery.start(refresh.schedule.run)
        await trio.sleep(1)
        assert gate.book.client.limit_usd == 3
        for answer in (fails, hangs):
            answers[0] = answer
            await trio.sleep(200)
            assert gate.book.client.limit_usd == 3
        # A limit that was lifted is none any more: what is left is that of the settings.
        answers[0] = lambda: left(None)
        await trio.sleep(200)
        assert gate.book.client.limit_usd == 10
        answers[0] = lambda: left("2")
        await trio.sleep(200)
        assert gate.book.client.limit_usd == 2
        answers[0] = lambda: left("50")
        await trio.sleep(300)
        assert gate.book.client.limit_usd == 10
        nursery.cancel_scope.cancel()
    kinds = {type(error).__name__ for error in errors}
    assert kinds == {"ProviderError", "DeadlineExceededError"}


def test_a_bound_that_is_lifted() -> None:
    """Where the settings bound nothing, nothing is bound any more, and those who wait are looked at again."""
    book = BudgetBook(Budget(from_credits=True))
    assert not book.bound_client(D(1), spent_usd=D(0))
    assert book.client.statistics().limit_usd == 1
    assert book.bound_client(None, spent_usd=D("0.5"))
    assert book.client.statistics().limit_usd is None


def test_what_remains() -> None:
    """The least of the credits, the key's limit and its budget."""
    balance = Credits(D(50), D("41.5"))
    assert remaining_usd(balance, None) == D("8.5")
    assert remaining_usd(balance, KeyInfo(limit_remaining=D(3))) == 3
    assert remaining_usd(balance, KeyInfo(effective_budget=KeyBudget(remaining_usd=D(2)))) == 2
    assert remaining_usd(None, KeyInfo()) is None
