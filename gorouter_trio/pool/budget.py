"""Budgets: money is set aside before a request is sent, so that no number of requests at a time can overshoot one.

Theory of operation. A request belongs to several accounts at once: the client's, its tenant's, its session's, its
batch's. `BudgetBook.admit` sets its worst case aside in all of them, or in none. Afterwards the reservation is settled
once: with what it really cost; or released, when it is certain that nothing was charged; or, while nobody knows, it is
kept, until the charge was looked up. One that stays unknown for ever counts as spent in full.

    left = limit - spent - held          spent grows by what is charged, held is what reservations set aside

A request without a bound on its completion gets one: what the budget says, or less where the budget does not pay for
that. Nothing here waits or reads a clock; `pool.budget_gate` lets callers wait for money that is only held.
"""

from __future__ import annotations

import heapq
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal, cast

from msgspec import Struct

from ..errors import BudgetExceededError, UnpriceableRequestError
from .money import ZERO, add_usd, subtract_usd
from .prices import Quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import Budget

__all__ = [
    "Account",
    "AccountStatistics",
    "BudgetBook",
    "BudgetDenied",
    "BudgetKind",
    "BudgetStatistics",
    "Reservation",
    "Spending",
]

BudgetKind = Literal["client", "tenant", "session", "batch"]
"""Whose budget it is. A request belongs to at most one account of each kind."""

_UNNAMED: Final = ""
_ENDLESS: Final = Decimal("Infinity")


class Spending(Struct, frozen=True, kw_only=True):
    """A request that wants to be paid for: the most that it can cost, and the accounts that it belongs to.

    `quote` is None where the price is unknown. `max_tokens` is the bound that the request has already.
    """

    quote: Quote | None
    max_tokens: int | None = None
    model: str = ""
    tenant: str = ""
    session: str = ""
    batch: str = ""


class BudgetDenied(Struct, frozen=True, kw_only=True):
    """A request that does not fit. `may_wait` says that it could once what is held now is settled."""

    account: Account
    needed_usd: Decimal
    may_wait: bool

    def error(self) -> BudgetExceededError:
        """The same as an error for the caller."""
        account = self.account
        left = max(subtract_usd(account.unspent_usd, account.held_usd), ZERO)
        held = f", {account.held_usd} of it held by requests in flight" if account.held_usd else ""
        return BudgetExceededError(
            f"{account.title} does not cover the request: {left} USD of {account.total_usd} USD are left{held}, and it "
            f"may cost up to {self.needed_usd} USD; raise the budget, or ask for fewer max_tokens",
            budget=account.title,
            limit_usd=account.total_usd,
            left_usd=left,
            needed_usd=self.needed_usd,
        )


class AccountStatistics(Struct, frozen=True, kw_only=True):
    """One account in USD. `assumed_usd` is the part of `spent_usd` that nobody could confirm, `overrun_usd` what
    requests cost beyond their worst case.
    """

    kind: BudgetKind
    name: str
    limit_usd: Decimal | None
    spent_usd: Decimal
    held_usd: Decimal
    left_usd: Decimal | None
    assumed_usd: Decimal
    overrun_usd: Decimal
    reservations: int


class BudgetStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot: the client's account, how many others there are, and what became of reservations."""

    client: AccountStatistics
    accounts: int
    open_reservations: int
    settled: int
    released: int
    assumed: int
    denied: int


class Account:
    """What may be spent, was spent, and is set aside, in USD. A `limit_usd` of infinity is none."""

    __slots__ = (
        "assumed_usd",
        "beyond_usd",
        "held_usd",
        "is_ending",
        "is_open",
        "kind",
        "limit_usd",
        "name",
        "on_short",
        "overrun_usd",
        "reservations",
        "spent_usd",
        "total_usd",
    )

    def __init__(
        self, kind: BudgetKind, name: str, *, limit_usd: Decimal = _ENDLESS, spent_usd: Decimal = ZERO
    ) -> None:
        self.kind: BudgetKind = kind
        self.name = name
        self.limit_usd = limit_usd
        self.spent_usd = spent_usd
        self.held_usd = self.assumed_usd = self.overrun_usd = ZERO
        self.reservations = 0
        self.is_open = True
        self.is_ending = False
        # Of an account that is shared with other processes, `limit_usd` is what they let this one spend so far.
        self.total_usd = limit_usd
        self.beyond_usd = ZERO
        self.on_short: Callable[[Decimal], None] | None = None

    def __repr__(self) -> str:
        return f"<Account {self.title}: {self.spent_usd} spent, {self.held_usd} held of {self.limit_usd} USD>"

    @property
    def title(self) -> str:
        """What errors call it."""
        return "the client's budget" if self.kind == "client" else f"the budget of {self.kind} {self.name!r}"

    @property
    def unspent_usd(self) -> Decimal:
        """What is not spent, whether or not it is held, or is with other processes."""
        unspent = subtract_usd(self.limit_usd, self.spent_usd)
        return unspent if self.on_short is None else add_usd(unspent, self.beyond_usd)

    @property
    def left_usd(self) -> Decimal:
        """What is neither spent nor held, and at hand; below zero after an overrun."""
        return subtract_usd(subtract_usd(self.limit_usd, self.spent_usd), self.held_usd)

    def share(self, total_usd: Decimal, *, on_short: Callable[[Decimal], None]) -> None:
        """From now on the limit is one for several processes; `on_short` hears what a request would need here."""
        self.total_usd = self.beyond_usd = total_usd
        self.limit_usd = self.spent_usd
        self.on_short = on_short

    def set_limit(self, usd: Decimal) -> None:
        """Another limit: of all processes, where they share it."""
        self.total_usd = usd
        if self.on_short is None:
            self.limit_usd = usd

    def statistics(self) -> AccountStatistics:
        """A snapshot."""
        is_limited = self.total_usd != _ENDLESS
        return AccountStatistics(
            kind=self.kind,
            name=self.name,
            limit_usd=self.total_usd if is_limited else None,
            spent_usd=self.spent_usd,
            held_usd=self.held_usd,
            left_usd=subtract_usd(self.unspent_usd, self.held_usd) if is_limited else None,
            assumed_usd=self.assumed_usd,
            overrun_usd=self.overrun_usd,
            reservations=self.reservations,
        )


def _part_left(account: Account) -> float:
    """What is neither spent nor held, in proportion to the limit; nothing of a limit of nothing."""
    left_usd = subtract_usd(account.unspent_usd, account.held_usd)
    return float(left_usd) / float(account.total_usd) if account.total_usd else -math.inf


class Reservation:
    """Money set aside for one attempt at a request. It is closed once, by the book that made it.

    `max_tokens` is the bound that the request has to be sent with, or None where it keeps its own.
    """

    __slots__ = ("accounts", "is_open", "max_tokens", "usd")

    def __init__(self, accounts: tuple[Account, ...], usd: Decimal, *, max_tokens: int | None) -> None:
        self.accounts = accounts
        self.usd = usd
        self.max_tokens = max_tokens
        self.is_open = True

    def __repr__(self) -> str:
        return f"<Reservation {'open' if self.is_open else 'closed'}, {self.usd} USD in {len(self.accounts)} accounts>"


class BudgetBook:
    """All accounts of a client. An account of a tenant, session or batch is opened by its first request."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        # Looked at for every request, while there are six places to look in.
        self._is_set = budget.is_set
        # The settings hold Decimals, whatever they were given.
        self._headroom = cast("Decimal", budget.headroom)
        self._unpriced_usd = cast("Decimal | None", budget.unpriced_usd)
        self._usd = cast("Decimal | None", budget.usd)
        self._tenants = cast("Mapping[str, Decimal]", budget.tenants)
        limits = {"tenant": budget.tenant_usd, "session": budget.session_usd, "batch": budget.batch_usd}
        self._limits = cast("Mapping[BudgetKind, Decimal | None]", limits)
        self._accounts: dict[tuple[BudgetKind, str], Account] = {}
        self.client = Account("client", _UNNAMED, limit_usd=_ENDLESS if self._usd is None else self._usd)
        self._only_client: tuple[Account, ...] = (self.client,)
        self.on_account: Callable[[Account], None] | None = None
        """Called with each account that is opened from now on."""
        self._open = self._settled = self._released = self._assumed = self._denied = 0

    def __repr__(self) -> str:
        return f"<BudgetBook {self.client!r}, {len(self._accounts)} other accounts, {self._open} reservations>"

    @property
    def is_bounding(self) -> bool:
        """Whether any request can be denied: the settings bound something, or an account was opened."""
        return self._is_set or bool(self._accounts)

    @property
    def is_shared(self) -> bool:
        """Whether accounts are those of several processes."""
        return self.on_account is not None

    def statistics(self) -> BudgetStatistics:
        """A snapshot; cheap."""
        return BudgetStatistics(
            client=self.client.statistics(),
            accounts=len(self._accounts),
            open_reservations=self._open,
            settled=self._settled,
            released=self._released,
            assumed=self._assumed,
            denied=self._denied,
        )

    # Accounts

    def accounts(self) -> list[AccountStatistics]:
        """All accounts, the client's first."""
        return [account.statistics() for account in (self.client, *self._accounts.values())]

    def tightest(self, most: int) -> list[AccountStatistics]:
        """At most so many accounts with a limit, the one with the smallest part of it left first.

        Takes time for each account.
        """
        limited = (account for account in (self.client, *self._accounts.values()) if account.total_usd != _ENDLESS)
        return [account.statistics() for account in heapq.nsmallest(most, limited, key=_part_left)]

    def account(self, kind: BudgetKind, name: str = "") -> AccountStatistics | None:
        """One account, None when it is not open."""
        found = self.client if kind == "client" else self._accounts.get((kind, name))
        return None if found is None else found.statistics()

    def open_account(
        self,
        kind: BudgetKind,
        name: str,
        *,
        usd: Decimal | None = None,
        spent_usd: Decimal = ZERO,
        is_local: bool = False,
    ) -> Account:
        """Open an account, or set the limit of one that is open: `usd`, or what the settings give its kind.

        `spent_usd` is what was spent before it was closed the last time, for instance by what a session's history says;
        it counts only where the account is not open. One that `is_local` has a name that no other process has, and is
        not shared. Raises `BudgetExceededError` when too many accounts are open.
        """
        account = self._accounts.get((kind, name))
        if account is None:
            return self._new_account(kind, name, usd=usd, spent_usd=spent_usd, is_local=is_local)
        if usd is not None:
            was_bound = account.total_usd.is_finite()
            account.set_limit(usd)
            if not was_bound and self.on_account is not None:
                # It becomes one to share only now.
                self.on_account(account)
        return account

    def close_account(self, kind: BudgetKind, name: str) -> Decimal | None:
        """Forget an account and return what was spent of it; None when it is not open, or holds reservations."""
        account = self._accounts.get((kind, name))
        if account is None or account.reservations:
            return None
        del self._accounts[kind, name]
        account.is_open = False
        return account.spent_usd

    def end_account(self, kind: BudgetKind, name: str) -> None:
        """Nobody will spend of an account any more: it is closed as soon as it holds no reservation."""
        account = self._accounts.get((kind, name))
        if account is not None:
            account.is_ending = True
            self.close_account(kind, name)

    def bound_client(self, remaining_usd: Decimal | None, *, spent_usd: Decimal) -> bool:
        """Bound the client's budget by what the API says is left; True when that leaves more than before.

        None is no bound of the API: that of the settings is left.
        `spent_usd` is what the client's account had spent before the API was asked. What was charged meanwhile counts
        twice until the API is asked again, so this errs on the low side.
        """
        limit = _ENDLESS if remaining_usd is None else add_usd(spent_usd, max(remaining_usd, ZERO))
        if self._usd is not None:
            limit = min(limit, self._usd)
        is_more = limit > self.client.limit_usd
        self.client.set_limit(limit)
        return is_more

    def accounts_of(self, spending: Spending) -> tuple[Account, ...]:
        """The accounts with a limit that a request belongs to, the client's among them in any case."""
        found = self._only_client
        if spending.tenant or spending.session or spending.batch:
            named: tuple[tuple[BudgetKind, str], ...] = (
                ("tenant", spending.tenant),
                ("session", spending.session),
                ("batch", spending.batch),
            )
            for kind, name in named:
                account = self._find(kind, name) if name else None
                if account is not None:
                    found = (*found, account)
        return found

    def _find(self, kind: BudgetKind, name: str) -> Account | None:
        account = self._accounts.get((kind, name))
        if account is None and self._limit(kind, name) is not None:
            account = self._new_account(kind, name)
        return account

    def _limit(self, kind: BudgetKind, name: str) -> Decimal | None:
        return self._tenants.get(name, self._limits[kind]) if kind == "tenant" else self._limits[kind]

    def _new_account(
        self,
        kind: BudgetKind,
        name: str,
        *,
        usd: Decimal | None = None,
        spent_usd: Decimal = ZERO,
        is_local: bool = False,
    ) -> Account:
        if len(self._accounts) >= self.budget.max_accounts:
            raise BudgetExceededError(
                f"{len(self._accounts)} accounts are open (budget.max_accounts), and forgetting one would forget what "
                "it has spent; close those that are not needed any more",
                budget=f"the budget of {kind} {name!r}",
            )
        limit = self._limit(kind, name) if usd is None else usd
        account = Account(kind, name, limit_usd=_ENDLESS if limit is None else limit, spent_usd=spent_usd)
        self._accounts[kind, name] = account
        if self.on_account is not None and not is_local:
            self.on_account(account)
        return account

    # Reservations

    def admit(self, spending: Spending) -> Reservation | BudgetDenied:
        """Set the worst case of a request aside in all its accounts, or say which of them does not cover it.

        Raises `UnpriceableRequestError` when nobody can say what it may cost, `BudgetExceededError` when an account
        had to be opened and there are too many.
        """
        accounts = self.accounts_of(spending)
        usd, max_tokens = self._worst(spending, accounts)
        denied = self._judge(accounts, usd)
        if denied is not None:
            self._denied += 1
            return denied
        for account in accounts:
            account.held_usd = add_usd(account.held_usd, usd)
            account.reservations += 1
        self._open += 1
        return Reservation(accounts, usd, max_tokens=max_tokens)

    def peek(self, spending: Spending) -> BudgetDenied | None:
        """What `admit` would deny a request for; sets nothing aside and raises as it does."""
        accounts = self.accounts_of(spending)
        return self._judge(accounts, self._worst(spending, accounts)[0])

    def settle(self, reservation: Reservation, usd: Decimal | None) -> None:
        """Close a reservation with what the request cost; None, nobody knows, counts the whole of it as spent."""
        self._close(reservation)
        charged = reservation.usd if usd is None else usd
        self._settled += usd is not None
        self._assumed += usd is None
        for account in reservation.accounts:
            account.spent_usd = add_usd(account.spent_usd, charged)
            if usd is None:
                account.assumed_usd = add_usd(account.assumed_usd, charged)
            elif charged > reservation.usd:
                overrun = subtract_usd(charged, reservation.usd)
                account.overrun_usd = add_usd(account.overrun_usd, overrun)

    def release(self, reservation: Reservation) -> None:
        """Close a reservation of which it is certain that nothing was charged."""
        self._close(reservation)
        self._released += 1

    def _close(self, reservation: Reservation) -> None:
        if not reservation.is_open:
            raise ValueError("the reservation was closed before")
        reservation.is_open = False
        self._open -= 1
        for account in reservation.accounts:
            account.held_usd = subtract_usd(account.held_usd, reservation.usd)
            account.reservations -= 1
            if account.is_ending:
                self.close_account(account.kind, account.name)

    def _worst(self, spending: Spending, accounts: tuple[Account, ...]) -> tuple[Decimal, int | None]:
        """The most that a request can cost, and the bound on its completion where it is given one."""
        quote = spending.quote
        if quote is None:
            if self._unpriced_usd is None:
                raise UnpriceableRequestError(
                    f"{spending.model or 'the model'}: what the request may cost is not known, and there is a budget; "
                    "give a price (prices=PricePolicy(own=...)), or an amount to set aside (budget.unpriced_usd)",
                    model=spending.model,
                )
            return self._unpriced_usd, None
        quote = quote.times(self._headroom)
        if spending.max_tokens is not None:
            return quote.worst_usd(spending.max_tokens), None
        granted = self._grant(quote, accounts)
        return quote.worst_usd(granted), granted

    def _grant(self, quote: Quote, accounts: tuple[Account, ...]) -> int:
        """The bound for a request that has none: by the settings, by the model, and by what is not spent yet.

        What is only held does not shorten an answer; the request waits for it instead. The floor is granted even when
        it is too dear, so that the denial says what would have been needed.
        """
        budget = self.budget
        wanted = budget.max_tokens if quote.most_tokens is None else min(budget.max_tokens, quote.most_tokens)
        unspent = min([account.unspent_usd if budget.may_wait else account.left_usd for account in accounts])
        affordable = None if unspent == _ENDLESS else quote.affordable_tokens(unspent)
        if affordable is None or affordable >= wanted:
            return wanted
        return max(affordable, min(budget.min_tokens, wanted))

    def _judge(self, accounts: tuple[Account, ...], usd: Decimal) -> BudgetDenied | None:
        """The account that does not cover `usd`; one that never will goes before one that might."""
        denied: BudgetDenied | None = None
        for account in accounts:
            if account.left_usd >= usd:
                continue
            may_wait = account.unspent_usd >= usd
            if may_wait and account.on_short is not None:
                account.on_short(usd)
            if denied is None or not may_wait:
                denied = BudgetDenied(account=account, needed_usd=usd, may_wait=may_wait)
            if not may_wait:
                break
        return denied
