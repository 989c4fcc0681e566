"""Budgets: what is set aside, what is spent, what is denied, and that the sums always agree."""

from __future__ import annotations

import pickle
from decimal import Decimal

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from worlds import there

from gorouter_trio.config import Budget
from gorouter_trio.errors import BudgetExceededError, ConfigError, UnpriceableRequestError
from gorouter_trio.pool.budget import BudgetBook, BudgetDenied, Reservation, Spending
from gorouter_trio.pool.prices import Quote

D = Decimal
CHEAP = Quote(D("0.01"), D("0.001"), 1_000)


def asked(usd: str, **fields: str) -> Spending:
    """A request that may cost exactly so much."""
    return Spending(quote=Quote(D(usd), D(0)), max_tokens=1, **fields)


def admitted(book: BudgetBook, spending: Spending) -> Reservation:
    verdict = book.admit(spending)
    assert isinstance(verdict, Reservation), verdict
    return verdict


def denied(book: BudgetBook, spending: Spending) -> BudgetDenied:
    verdict = book.admit(spending)
    assert isinstance(verdict, BudgetDenied), verdict
    return verdict


def test_reserve_and_settle() -> None:
    """The worst case is held until the end, and then what it cost is spent."""
    book = BudgetBook(Budget(usd=1))
    reservation = admitted(book, Spending(quote=CHEAP, max_tokens=100))
    assert (reservation.usd, reservation.max_tokens) == (D("0.11"), None)
    assert (book.client.held_usd, book.client.left_usd) == (D("0.11"), D("0.89"))
    book.settle(reservation, D("0.04"))
    assert (book.client.held_usd, book.client.spent_usd, book.client.left_usd) == (0, D("0.04"), D("0.96"))


def test_a_budget_beyond_all_measure() -> None:
    """So much money pays for any request, also where the tokens that it pays for could not be counted."""
    book = BudgetBook(Budget(usd="1e70"))
    assert admitted(book, Spending(quote=Quote(D("0.01"), D("0.000001"), 500))).max_tokens == 500


def test_closed_once() -> None:
    """A reservation that is closed a second time is a mistake, and changes nothing."""
    book = BudgetBook(Budget(usd=1))
    reservation = admitted(book, asked("0.5"))
    book.release(reservation)
    for close in (book.release, lambda r: book.settle(r, D(1)), lambda r: book.settle(r, None)):
        with pytest.raises(ValueError, match="closed before"):
            close(reservation)
    assert (book.client.held_usd, book.client.spent_usd) == (0, 0)


def test_unknown_cost_is_the_worst() -> None:
    """What nobody could tell is spent in full, and shown apart; what cost more than the worst case is an overrun."""
    book = BudgetBook(Budget(usd=1))
    book.settle(admitted(book, asked("0.3")), None)
    book.settle(admitted(book, asked("0.1")), D("0.15"))
    client = book.statistics().client
    assert (client.spent_usd, client.assumed_usd, client.overrun_usd) == (D("0.45"), D("0.3"), D("0.05"))


def test_denied() -> None:
    """The error names the budget, what is left and what was needed; it says so before anything is sent."""
    book = BudgetBook(Budget(usd="1", tenant_usd="0.5", tenants={"vip": 2}))
    admitted(book, asked("0.3", tenant="a"))
    verdict = denied(book, asked("0.3", tenant="a"))
    assert verdict.may_wait
    error = verdict.error()
    assert (error.budget, error.limit_usd, error.left_usd, error.needed_usd) == (
        *("the budget of tenant 'a'", D("0.5"), D("0.2"), D("0.3")),
    )
    assert str(error).startswith(
        "the budget of tenant 'a' does not cover the request: 0.2 USD of 0.5 USD are left, 0.3 of it held by requests "
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.left_usd) == (str(error), D("0.2"))
    assert not denied(book, asked("0.6", tenant="a")).may_wait
    assert denied(book, asked("0.8", tenant="vip")).account is book.client


def test_all_or_none() -> None:
    """A request that one of its budgets denies holds nothing in the others; the hopeless one is named first."""
    book = BudgetBook(Budget(usd=1, tenant_usd="0.5", session_usd="0.2", batch_usd="0.1"))
    admitted(book, asked("0.9"))
    verdict = denied(book, asked("0.15", tenant="t", session="s", batch="b"))
    assert (verdict.account.kind, verdict.may_wait) == ("batch", False)
    assert [account.held_usd for account in book.accounts()] == [D("0.9"), 0, 0, 0]


def test_a_bound_for_requests_without_one() -> None:
    """It is that of the settings, of the model, or what is not spent yet; never below the floor."""
    book = BudgetBook(Budget(usd=1, max_tokens=500, min_tokens=50))
    free = Spending(quote=CHEAP)
    first = admitted(book, free)
    assert (first.max_tokens, first.usd) == (500, D("0.51"))
    short = admitted(book, Spending(quote=Quote(D(0), D("0.001"), 20)))
    assert short.max_tokens == 20
    book.release(short)
    assert denied(book, free).may_wait, "what is held does not shorten an answer"
    book.settle(first, D("0.5"))
    book.client.spent_usd = D("0.8")
    shortened = admitted(book, free)
    assert shortened.max_tokens == 190
    book.release(shortened)
    book.client.spent_usd = D("0.95")
    verdict = denied(book, free)
    assert (verdict.may_wait, verdict.needed_usd) == (False, D("0.06"))


def test_without_waiting_held_money_shortens() -> None:
    """Where requests do not wait, what is held counts as gone."""
    book = BudgetBook(Budget(usd=1, max_tokens=500, overflow="reject"))
    held = admitted(book, asked("0.8"))
    assert admitted(book, Spending(quote=CHEAP)).max_tokens == 190
    assert held.is_open


def test_unpriceable() -> None:
    """No price is no budget, unless the settings say what to set aside."""
    with pytest.raises(UnpriceableRequestError, match="openrouter/auto: what the request may cost is not known") as e:
        BudgetBook(Budget(usd=1)).admit(Spending(quote=None, model="openrouter/auto"))
    assert pickle.loads(pickle.dumps(e.value)).model == "openrouter/auto"
    reservation = admitted(BudgetBook(Budget(usd=1, unpriced_usd="0.25")), Spending(quote=None))
    assert (reservation.usd, reservation.max_tokens) == (D("0.25"), None)


def test_headroom() -> None:
    """Every worst case times a factor, where another provider may be dearer."""
    book = BudgetBook(Budget(usd=1, headroom=1.5))
    assert admitted(book, asked("0.2")).usd == D("0.30")


def test_accounts_are_bounded() -> None:
    """One more is refused rather than another forgotten, unless one is closed, with what it has spent."""
    book = BudgetBook(Budget(session_usd=1, max_accounts=2))
    first = admitted(book, asked("0.4", session="a"))
    admitted(book, asked("0.4", session="b"))
    with pytest.raises(BudgetExceededError, match=r"budget\.max_accounts"):
        book.admit(asked("0.4", session="c"))
    assert book.close_account("session", "a") is None, "it holds a reservation"
    book.settle(first, D("0.3"))
    assert book.close_account("session", "a") == D("0.3")
    admitted(book, asked("0.4", session="c"))
    book.settle(admitted(book, asked("0.4", session="c")), D("0.4"))
    assert book.account("session", "a") is None


def test_an_account_that_ends() -> None:
    """It is closed at once, or with its last reservation; one of this process alone is not shared."""
    book, shared = BudgetBook(Budget(batch_usd=1)), []
    book.on_account = lambda account: shared.append(account.name)
    held = admitted(book, asked("0.4", batch="everybody's"))
    book.open_account("batch", "mine", is_local=True)
    other = admitted(book, asked("0.4", batch="mine"))
    assert shared == ["everybody's"]
    book.end_account("batch", "mine")
    book.end_account("batch", "nobody's")
    assert there(book.account("batch", "mine")).held_usd == D("0.4")
    book.settle(other, D("0.1"))
    assert book.account("batch", "mine") is None
    book.settle(held, D("0.1"))
    assert book.account("batch", "everybody's") is not None
    book.end_account("batch", "everybody's")
    assert book.account("batch", "everybody's") is None


def test_an_account_opened_again() -> None:
    """Spending of before counts, and a single account may have a limit of its own."""
    book = BudgetBook(Budget(session_usd=1))
    book.open_account("session", "old", spent_usd=D("0.9"))
    assert not denied(book, asked("0.2", session="old")).may_wait
    book.open_account("batch", "night", usd=D("0.1"))
    assert denied(book, asked("0.2", batch="night")).account.name == "night"
    admitted(book, asked("5", batch="day"))


def test_credits_bound_the_client() -> None:
    """What the API has left bounds the budget, on the low side, and never above the user's own."""
    book = BudgetBook(Budget(usd=10, from_credits=True))
    book.settle(admitted(book, asked("1")), D(1))
    assert not book.bound_client(D(4), spent_usd=D(1))
    assert book.client.left_usd == 4
    assert book.bound_client(D(100), spent_usd=D(1))
    assert book.client.limit_usd == 10
    book.bound_client(D(-3), spent_usd=D(1))
    assert book.client.left_usd == 0
    assert BudgetBook(Budget(from_credits=True)).bound_client(D(5), spent_usd=D(0)) is False


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"usd": -1}, "budget.usd: must be zero or more and finite, not -1"),
        ({"usd": "NaN"}, "budget.usd: must be zero or more and finite, not 'NaN'"),
        ({"usd": "1e999999"}, "budget.usd: must be at most 1E+100, not '1e999999'"),
        ({"session_usd": "a dollar"}, "budget.session_usd: must be an amount in USD, not 'a dollar'"),
        ({"usd": True}, "budget.usd: must be an amount in USD, such as Decimal('1.50'), not True"),
        ({"tenants": {"a": []}}, "budget.tenants['a']: must be an amount in USD, such as Decimal('1.50'), not []"),
        ({"headroom": "0.5"}, "budget.headroom: must be at least 1, not 0.5"),
        ({"overflow": "maybe"}, "budget.overflow: must be one of block, reject, not 'maybe'"),
    ],
)
def test_bad_settings(fields: dict[str, object], says: str) -> None:
    """One error that names the setting."""
    with pytest.raises(ConfigError) as caught:
        Budget(**fields)  # type: ignore[arg-type]  # on purpose
    assert str(caught.value) == says


def test_amounts_are_what_was_written() -> None:
    """A float stands for its shortest decimal form."""
    assert Budget(usd=0.1).usd == D("0.1")
    assert (Budget().is_set, Budget(usd=0).is_set, Budget(tenants={"a": 1}).is_set) == (False, True, True)


# --- any order of events ----------------------------------------------------------------------------------------------

amounts = st.decimals(min_value=0, max_value=2, places=6)
names = st.sampled_from(["", "a", "b"])


class Bookkeeping(RuleBasedStateMachine):
    """Reservations of all kinds, closed in all ways, against sums kept beside."""

    open_ones = Bundle("open")

    def __init__(self) -> None:
        super().__init__()
        self.book = BudgetBook(Budget(usd=5, tenant_usd=3, session_usd=2, batch_usd=1))
        self.held: dict[Reservation, Decimal] = {}
        self.spent = D(0)
        self.overrun = D(0)
        self.made = self.closed = 0

    @rule(target=open_ones, usd=amounts, tenant=names, session=names, batch=names)
    def reserve(self, usd: Decimal, tenant: str, session: str, batch: str) -> Reservation | None:
        spending = Spending(quote=Quote(usd, D(0)), max_tokens=1, tenant=tenant, session=session, batch=batch)
        accounts = self.book.accounts_of(spending)
        fits = all(account.left_usd >= usd for account in accounts)
        peeked = self.book.peek(spending)
        verdict = self.book.admit(spending)
        assert isinstance(verdict, Reservation) == fits == (peeked is None)
        if isinstance(verdict, BudgetDenied):
            assert verdict.may_wait == all(account.unspent_usd >= usd for account in accounts)
            return None
        self.held[verdict] = usd
        self.made += 1
        return verdict

    @rule(reservation=consumes(open_ones), share=st.decimals(0, 1, places=3))
    def settle(self, reservation: Reservation | None, share: Decimal) -> None:
        if reservation is not None:
            cost = self.held.pop(reservation) * share
            self.book.settle(reservation, cost)
            self.spent += cost
            self.closed += 1

    @rule(reservation=consumes(open_ones), more=amounts)
    def overrun_(self, reservation: Reservation | None, more: Decimal) -> None:
        if reservation is not None:
            cost = self.held.pop(reservation) + more
            self.book.settle(reservation, cost)
            self.spent += cost
            self.overrun += more
            self.closed += 1

    @rule(reservation=consumes(open_ones))
    def assume(self, reservation: Reservation | None) -> None:
        if reservation is not None:
            self.spent += self.held.pop(reservation)
            self.book.settle(reservation, None)
            self.closed += 1

    @rule(reservation=consumes(open_ones))
    def release(self, reservation: Reservation | None) -> None:
        if reservation is not None:
            del self.held[reservation]
            self.book.release(reservation)
            self.closed += 1

    @invariant()
    def sums_agree(self) -> None:
        client = self.book.client
        assert client.held_usd == sum(self.held.values())
        assert client.spent_usd == self.spent
        assert client.overrun_usd == self.overrun
        statistics = self.book.statistics()
        assert statistics.open_reservations == len(self.held) == self.made - self.closed
        assert statistics.settled + statistics.released + statistics.assumed == self.closed

    @invariant()
    def nothing_is_overshot(self) -> None:
        for account in self.book.accounts():
            assert account.held_usd >= 0
            assert account.limit_usd is not None
            assert account.spent_usd + account.held_usd <= account.limit_usd + account.overrun_usd
            assert account.reservations >= 0


TestBookkeeping = Bookkeeping.TestCase
