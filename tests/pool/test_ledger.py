"""The ledger: what each attempt becomes, the search for lost costs, and sums that agree with the rows."""

from __future__ import annotations

import decimal
import random
import types
from decimal import Decimal

import hypothesis.strategies as st
import pytest
from attempts import REFUSED, Attempted, answered, lost
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gorouter_trio.config import Budget, LedgerConfig
from gorouter_trio.errors import ConfigError
from gorouter_trio.pool.budget import BudgetBook, Reservation, Spending
from gorouter_trio.pool.costs import OTHERS, CostSnapshot, CostSums
from gorouter_trio.pool.ledger import Ledger, Owner
from gorouter_trio.pool.prices import Quote
from gorouter_trio.wire.catalog import GenerationInfo
from gorouter_trio.wire.codec import decode_ledger_row, encode_json
from gorouter_trio.wire.ledger import LedgerRow
from gorouter_trio.wire.responses import CompletionTokensDetails, CostDetails, PromptTokensDetails, Usage

D = Decimal
RNG = random.Random(1)


class Bank:
    """A ledger above a budget, and every row that was written."""

    def __init__(self, **config: object) -> None:
        self.book = BudgetBook(Budget(usd=1000))
        self.written: list[LedgerRow] = []
        self.errors: list[Exception] = []
        self.ledger = Ledger(
            LedgerConfig(**config),  # type: ignore[arg-type]  # fields of the settings
            run="r",
            close_reservation=self.book.settle,
            sink=self,
            report=self.errors.append,
        )

    def write(self, row: LedgerRow) -> None:
        self.written.append(row)

    def reserve(self, usd: str = "1") -> Reservation:
        reservation = self.book.admit(Spending(quote=Quote(D(usd), D(0)), max_tokens=1))
        assert isinstance(reservation, Reservation)
        return reservation

    def enter(self, attempt: Attempted, *, now: float = 0.0, estimate: str | None = None, **owner: str) -> LedgerRow:
        return self.ledger.enter(
            attempt,
            at_s=now,
            now=now,
            owner=Owner(**owner),  # type: ignore[arg-type]  # fields of Owner
            answered_by="m-2026",
            estimate_usd=None if estimate is None else D(estimate),
            reservation=self.reserve(),
        )

    @property
    def costs(self) -> CostSnapshot:
        return self.ledger.tracker.snapshot()

    @property
    def spent(self) -> Decimal:
        return self.book.client.spent_usd


@pytest.mark.parametrize(
    ("attempt", "estimate", "state", "cost", "spent"),
    [
        (answered("0.25"), None, "settled", D("0.25"), D("0.25")),
        (answered("0"), "0.3", "settled", D(0), D(0)),
        (answered(None), "0.3", "estimated", None, D("0.3")),
        (answered(None), None, "unknown", None, D(1)),
        (REFUSED, None, "settled", D(0), D(0)),
        (Attempted(status=None, generation_id=None, error="ConnectError"), None, "settled", D(0), D(0)),
        (lost(None), None, "unreconciled", None, D(1)),
        (lost("gen-1"), None, "reconciling", None, D(0)),
        (lost("gen-1", cancelled=True, streamed=True), None, "reconciling", None, D(0)),
        (Attempted(status=200), None, "reconciling", None, D(0)),
        (Attempted(status=200, generation_id=None), None, "unreconciled", None, D(1)),
        (answered("0.25", maybe_billed=True), None, "settled", D("0.25"), D("0.25")),
        (answered(None, maybe_billed=True), "0.3", "reconciling", None, D(0)),
    ],
)
def test_what_an_attempt_becomes(
    attempt: Attempted, estimate: str | None, state: str, cost: Decimal | None, spent: Decimal
) -> None:
    """The reply's cost is the truth, then that nothing can have been charged, then the estimate, then the search."""
    bank = Bank()
    row = bank.enter(attempt, estimate=estimate)
    assert (row.state, row.cost_usd) == (state, cost)
    assert bank.spent == spent
    assert (bank.book.client.held_usd == 1) == (state == "reconciling")
    assert bank.ledger.rows() == [row] == bank.written
    assert decode_ledger_row(encode_json(row)) == row


def test_what_a_row_says() -> None:
    """Whose it was, what for, which model was asked and which answered, and the tokens."""
    usage = Usage(
        prompt_tokens=100,
        completion_tokens=40,
        cost=D("0.1"),
        is_byok=True,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=60),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=30),
        cost_details=CostDetails(upstream_inference_cost=D("0.9")),
    )
    attempt = Attempted(
        call=7, attempt=2, usage=usage, tenant="t", lane="batch", key="k1", streamed=True, generation_id="g"
    )
    row = Bank().enter(attempt, now=5.0, session="s", batch="b", purpose="tool_round")
    assert row == LedgerRow(
        run="r",
        row=1,
        at_s=5.0,
        state="settled",
        call=7,
        attempt=2,
        purpose="tool_round",
        cost_usd=D("0.1"),
        upstream_usd=D("0.9"),
        generation_id="g",
        model="m-2026",
        requested_model="m",
        tenant="t",
        session="s",
        batch="b",
        lane="batch",
        key_name="k1",
        status=200,
        streamed=True,
        prompt_tokens=100,
        completion_tokens=40,
        reasoning_tokens=30,
        cached_tokens=60,
    )


def test_found() -> None:
    """The API's cost settles the row and its reservation; the row is written again under its number."""
    bank = Bank()
    before = bank.enter(lost())
    assert bank.ledger.take_due(0.5) is None
    assert bank.ledger.next_lookup_at() == 1.0
    assert bank.ledger.take_due(1.0) == before
    info = GenerationInfo(
        id="gen-1", total_cost=D("0.125"), native_tokens_prompt=90, native_tokens_completion=12, model="m-dated"
    )
    after = bank.ledger.found(before, info)
    assert after is not None
    assert (after.row, after.state, after.cost_usd, after.total_tokens, after.tries) == (
        *(before.row, "reconciled", D("0.125"), 102, 1),
    )
    assert (bank.spent, bank.book.client.held_usd) == (D("0.125"), 0)
    assert bank.written == [before, after]
    costs = bank.costs
    assert (costs.attempts, costs.cost_usd, costs.reconciling, costs.is_exact) == (1, D("0.125"), 0, True)


def test_never_found() -> None:
    """After the last try the row is unreconciled for everybody to see, and its worst case counts as spent."""
    bank = Bank(lookups=4, first_lookup_s=1.0, last_lookup_s=3.0)
    bank.enter(lost())
    waits, now = [], 0.0
    last: LedgerRow | None = None
    for _ in range(4):
        at = bank.ledger.next_lookup_at()
        waits.append(at - now)
        now = at
        row = bank.ledger.take_due(now)
        assert row is not None
        last = bank.ledger.missed(row, now=now, rng=RNG)
    assert waits[0] == 1
    assert all(1 <= waits[1] <= 2 and 1.5 <= wait <= 3 for wait in waits[2:]), waits
    assert last is not None
    assert (last.state, last.tries, last.cost_usd) == ("unreconciled", 4, None)
    assert bank.ledger.next_lookup_at() == float("inf")
    assert (bank.spent, bank.book.client.assumed_usd) == (1, 1)
    costs = bank.costs
    assert (costs.unreconciled, costs.cost_usd, costs.is_exact) == (1, 0, False)
    assert (bank.ledger.statistics().unreconciled, bank.ledger.statistics().lookups) == (1, 4)


def test_a_search_without_end() -> None:
    """However often a row is looked up, the wait stays within the longest one."""
    bank = Bank(lookups=3000, first_lookup_s=1.0, last_lookup_s=3.0)
    row, now = bank.enter(lost()), 0.0
    for _ in range(2000):
        assert bank.ledger.missed(row, now=now, rng=RNG) is None
        assert bank.ledger.next_lookup_at() <= now + 3.0


def test_the_search_is_bounded() -> None:
    """A row too many is unreconciled at once, and so is everything that is lost after the end."""
    bank = Bank(searches=1, names=10)
    bank.enter(lost())
    assert bank.enter(lost()).state == "unreconciled"
    (ended,) = bank.ledger.close()
    assert ended.state == "unreconciled"
    assert bank.ledger.found(ended, GenerationInfo(id="g", total_cost=D(1))) is None
    assert bank.ledger.missed(ended, now=9, rng=RNG) is None
    assert bank.enter(lost()).state == "unreconciled"
    assert (bank.costs.unreconciled, bank.spent, bank.book.client.held_usd) == (3, 3, 0)


def test_rows_are_bounded_and_sums_are_not() -> None:
    """Old rows go, what they cost stays."""
    bank = Bank(rows=3)
    for _ in range(10):
        bank.enter(answered("0.1"))
    assert [row.row for row in bank.ledger.rows()] == [8, 9, 10]
    assert (bank.costs.attempts, bank.costs.cost_usd) == (10, 1)


def test_names_are_bounded() -> None:
    """The least recently used sessions become one row that says how many it stands for; lost rows stay apart."""
    sums = CostSums(most_names=2)

    def row(session: str, number: int, state: str = "settled") -> LedgerRow:
        cost = D("0.5") if state != "reconciling" else None
        return LedgerRow(run="r", row=number, at_s=0, state=state, session=session, cost_usd=cost)  # type: ignore[arg-type]  # a state

    first = row("a", 1, "reconciling")
    sums.add(first)
    for number, session in enumerate("bcdb", 2):
        sums.add(row(session, number))
    by_session = sums.snapshot().by_session
    assert list(by_session) == ["b", "a", OTHERS]
    assert (by_session[OTHERS].folded, by_session[OTHERS].cost_usd) == (3, D("1.5"))
    sums.add(row("a", 1, "reconciled"), replaced=first)
    assert sums.snapshot().by_session["a"].cost_usd == D("0.5")
    assert sum(each.attempts for each in sums.snapshot().by_session.values()) == sums.snapshot().attempts == 5


def test_a_sink_that_fails() -> None:
    """What a sink or a tracker raises is counted and reported; the reservation is closed all the same."""
    bank = Bank()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    bank.write = fail  # type: ignore[method-assign]  # the failure under test
    bank.ledger.tracker = types.SimpleNamespace(add=fail, snapshot=CostSnapshot)
    bank.enter(answered("0.25"))
    assert (len(bank.errors), bank.ledger.statistics().failed_writes, bank.spent) == (2, 2, D("0.25"))


def test_bad_settings() -> None:
    """There must be more names than searches, or folding could not find a row to fold."""
    with pytest.raises(ConfigError, match=r"ledger\.names: must be a whole number of at least 4097"):
        LedgerConfig(names=10)


# --- any order of events ----------------------------------------------------------------------------------------------

costs_usd = st.decimals(0, 100, places=12)
owners = st.sampled_from(["", "a", "b", "c", "d", "e"])


class Bookkeeping(RuleBasedStateMachine):
    """Attempts of all kinds, found, missed, and the end, against sums of the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank(rows=100_000, searches=3, names=4, lookups=3)
        self.now = 0.0
        self.taken: list[LedgerRow] = []
        self.reservations = 0
        # Of its own: what an example before has drawn must not change this one, which may be a repetition.
        self.rng = random.Random(0)

    @rule(usd=st.none() | costs_usd, estimate=st.none() | costs_usd, session=owners, tenant=owners, batch=owners)
    def answer(self, usd: Decimal | None, estimate: Decimal | None, session: str, tenant: str, batch: str) -> None:
        attempt = answered(None if usd is None else str(usd), tenant=tenant, model=f"m{tenant}")
        self.reservations += 1
        estimated = None if estimate is None else str(estimate)
        self.bank.enter(attempt, now=self.now, estimate=estimated, session=session, batch=batch)

    @rule(known=st.booleans(), session=owners, tenant=owners)
    def lose(self, known: bool, session: str, tenant: str) -> None:
        self.reservations += 1
        self.bank.enter(lost("gen-1" if known else None, tenant=tenant), now=self.now, session=session)

    @rule(wait=st.floats(0, 100))
    def take(self, wait: float) -> None:
        self.now += wait
        row = self.bank.ledger.take_due(self.now)
        if row is not None:
            self.taken.append(row)

    @precondition(lambda self: self.taken)
    @rule(usd=costs_usd)
    def find(self, usd: Decimal) -> None:
        self.bank.ledger.found(self.taken.pop(), GenerationInfo(id="gen-1", total_cost=usd, tokens_prompt=3))

    @precondition(lambda self: self.taken)
    @rule()
    def miss(self) -> None:
        self.bank.ledger.missed(self.taken.pop(), now=self.now, rng=self.rng)

    @invariant()
    def sums_are_those_of_the_rows(self) -> None:
        rows = self.bank.ledger.rows()
        costs = self.bank.costs
        assert costs.attempts == len(rows) == len({row.row for row in rows}) == self.reservations
        assert costs.cost_usd == sum(row.cost_usd for row in rows if row.cost_usd is not None)
        assert costs.total_tokens == sum(row.total_tokens for row in rows)
        states = [row.state for row in rows]
        assert costs.reconciling == states.count("reconciling") == self.bank.ledger.searching
        assert costs.unreconciled == states.count("unreconciled")
        assert (costs.estimated, costs.unknown) == (states.count("estimated"), states.count("unknown"))
        assert costs.estimated_usd == sum(row.estimate_usd or 0 for row in rows if row.state == "estimated")

    @invariant()
    def names_add_up(self) -> None:
        rows = self.bank.ledger.rows()
        for by, name in ((self.bank.costs.by_session, "session"), (self.bank.costs.by_tenant, "tenant")):
            named = [row for row in rows if getattr(row, name)]
            assert sum(each.attempts for each in by.values()) == len(named)
            assert sum(each.cost_usd for each in by.values()) == sum(row.cost_usd or 0 for row in named)
            assert all(each.reconciling >= 0 for each in by.values())
            assert len(by) <= 5
        by_model = self.bank.costs.by_model.values()
        assert sum(each.cost_usd for each in by_model) == self.bank.costs.cost_usd

    @invariant()
    def reservations_follow_the_rows(self) -> None:
        statistics = self.bank.book.statistics()
        assert statistics.open_reservations == self.bank.ledger.searching
        assert self.bank.book.client.held_usd == self.bank.ledger.searching
        known = [row.estimate_usd if row.state == "estimated" else row.cost_usd for row in self.bank.ledger.rows()]
        rest = sum(row.state in {"unreconciled", "unknown"} for row in self.bank.ledger.rows())
        assert self.bank.spent == sum(usd for usd in known if usd is not None) + rest

    @rule()
    def end(self) -> None:
        for row in self.bank.ledger.close():
            assert row.state == "unreconciled"
        self.taken.clear()

    def teardown(self) -> None:
        self.bank.ledger.close()
        assert self.bank.book.statistics().open_reservations == 0


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.decimals(0, 10**6, places=15), max_size=50))
def test_sums_are_exact(amounts: list[Decimal]) -> None:
    """Sums are those of integers, whatever precision the program has set."""
    sums = CostSums()
    with decimal.localcontext(prec=3):
        for number, usd in enumerate(amounts):
            sums.add(LedgerRow(run="r", row=number, at_s=0, state="settled", cost_usd=usd))
    total = sums.snapshot().cost_usd
    assert int(total.scaleb(15)) == sum(int(usd.scaleb(15)) for usd in amounts)
