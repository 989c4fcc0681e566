"""Waiting for money that is only held: callers line up, and reservations that close let them through.

A request that does not fit now, but would if what is in flight cost nothing, may wait: most requests cost less than
their worst case, so without waiting a budget could not be used up. Callers stand in line at the account that denied
them, in the order in which they came; whoever comes later does not overtake them, even if there is room for something
smaller. A caller whom an account can never cover again is refused at once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .._mailbox import ReplySlot
from ..errors import BudgetExceededError
from .budget import Account, BudgetBook, BudgetDenied, Reservation, Spending

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = ["BudgetGate"]


class BudgetGate:
    """The doors of a `BudgetBook`. Every reservation that it gives out has to come back: `settle` or `release`."""

    def __init__(self, book: BudgetBook) -> None:
        self.book = book
        self._lines: dict[Account, OrderedDict[_Waiter, None]] = {}
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<BudgetGate {self.book!r}, {self._waiting} waiting>"

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return self._waiting

    def reserve_nowait(self, spending: Spending) -> Reservation | None:
        """Set the worst case aside; None when the caller has to `wait` for it.

        Raises `BudgetExceededError` when the budgets do not cover it and waiting is not allowed or would not help,
        `UnpriceableRequestError` when nobody can say what it may cost.
        """
        if self._lines and self._line_of(spending) is not None:
            denied = self.book.peek(spending)
            if denied is None:
                return None
        else:
            verdict = self.book.admit(spending)
            if isinstance(verdict, Reservation):
                return verdict
            denied = verdict
        if denied.may_wait and self.book.budget.may_wait:
            return None
        raise denied.error()

    async def wait(self, spending: Spending) -> Reservation:
        """Stand in line for what `reserve_nowait` did not give, and return it.

        Raises as `reserve_nowait`, also when so many wait already as `budget.max_waiting` allows. Cancelling leaves the
        line; a reservation that was given by then is returned, not lost. Callers wait as long as the requests before
        them take, and those have deadlines.
        """
        waiter = _Waiter(self, spending)
        account = self._line_of(spending)
        if account is None:
            verdict = self.book.admit(spending)
            if isinstance(verdict, Reservation):
                waiter.resolve(verdict)
                return await waiter.wait()
            if not verdict.may_wait:
                raise verdict.error()
            account = verdict.account
        if self._waiting >= self.book.budget.max_waiting:
            raise BudgetExceededError(
                f"{self._waiting} requests wait for {account.title} already (budget.max_waiting)", budget=account.title
            )
        self._join(waiter, account)
        return await waiter.wait()

    def settle(self, reservation: Reservation, usd: Decimal | None) -> None:
        """`BudgetBook.settle`, and let those through for whom there is room now."""
        self.book.settle(reservation, usd)
        if self._lines:
            self._serve(reservation.accounts)

    def release(self, reservation: Reservation) -> None:
        """`BudgetBook.release`, and let those through for whom there is room now."""
        self.book.release(reservation)
        if self._lines:
            self._serve(reservation.accounts)

    def recheck(self) -> None:
        """Look at every line again, after limits have changed."""
        self._serve(tuple(self._lines))

    def leave(self, waiter: _Waiter) -> None:
        """A caller has gone; used by waiters. Those behind may have stood there only because of it."""
        account = waiter.account
        self._part(waiter)
        if account is not None:
            self._serve((account,))

    def _line_of(self, spending: Spending) -> Account | None:
        """The first of a request's accounts where somebody waits."""
        if not self._lines:
            return None
        return next((account for account in self.book.accounts_of(spending) if account in self._lines), None)

    def _join(self, waiter: _Waiter, account: Account) -> None:
        waiter.account = account
        self._lines.setdefault(account, OrderedDict())[waiter] = None
        self._waiting += 1

    def _part(self, waiter: _Waiter) -> None:
        account, waiter.account = waiter.account, None
        if account is not None:
            line = self._lines[account]
            del line[waiter]
            self._waiting -= 1
            if not line:
                del self._lines[account]

    def _serve(self, accounts: tuple[Account, ...]) -> None:
        for account in accounts:
            while (line := self._lines.get(account)) is not None:
                if not self._serve_first(next(iter(line)), account):
                    break

    def _serve_first(self, waiter: _Waiter, account: Account) -> bool:
        """Answer the first in a line if that can be done now; it may have to go and stand in another one."""
        verdict = self._judge(waiter.spending)
        if isinstance(verdict, BudgetDenied) and verdict.may_wait:
            if verdict.account is account:
                return False
            self._part(waiter)
            self._join(waiter, verdict.account)
            return True
        self._part(waiter)
        if isinstance(verdict, Reservation):
            waiter.resolve(verdict)
        else:
            waiter.fail(verdict.error() if isinstance(verdict, BudgetDenied) else verdict)
        return True

    def _judge(self, spending: Spending) -> Reservation | BudgetDenied | BudgetExceededError:
        try:
            return self.book.admit(spending)
        except BudgetExceededError as exc:
            return exc


class _Waiter(ReplySlot[Reservation]):
    """One caller in one line."""

    __slots__ = ("account", "gate", "spending")

    def __init__(self, gate: BudgetGate, spending: Spending) -> None:
        super().__init__()
        self.gate = gate
        self.spending = spending
        self.account: Account | None = None

    def on_abandon(self) -> None:
        """Leave the line."""
        self.gate.leave(self)
