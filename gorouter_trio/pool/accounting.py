"""Prices, token counts, budgets and the ledger of one client, as the two hooks around an attempt see them.

    before it is sent    call, reservation = await accounting.admit(call)      where anything is bounded
    after it has ended   accounting.finish(attempt, ..., reservation=reservation)
    never sent           accounting.release(reservation)

A reservation is for one attempt: a retry takes one of its own, since what it retries may have been charged as well.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec
import trio

from ..wire.mail import HttpCall
from .budget import BudgetBook, Reservation, Spending
from .budget_gate import BudgetGate
from .ledger import BATCHES, Ledger, LedgerSink, Owner
from .money import ZERO
from .prices import TEXT_ONLY, PriceBook, PriceEvent, RequestShape, consumption_of
from .reconcile import Reconciliation
from .refresh import CreditRefresh, PriceRefresh
from .tokens import TokenEstimator

_WITH_COMPLETION = frozenset({"/chat/completions", "/completions"})

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
    from decimal import Decimal

    from ..config import ClientConfig
    from ..wire.catalog import GenerationInfo, Model, Pricing
    from ..wire.ledger import LedgerRow
    from ..wire.mail import CallSettings
    from ..wire.responses import Usage
    from .costs import CostSnapshot, CostTracker
    from .ledger import Attempt

__all__ = ["Accounting", "AccountingReports", "AccountingService", "open_accounting", "with_max_tokens"]


class AccountingService(NamedTuple):
    """What the tasks ask the API for: the list of models, a generation, and what is left to spend (None: no bound)."""

    models: Callable[[], Awaitable[list[Model]]]
    generation: Callable[[str], Awaitable[GenerationInfo]]
    remaining_usd: Callable[[], Awaitable[Decimal | None]]


class AccountingReports(NamedTuple):
    """Who is told what happens in the background; none of them may raise."""

    prices: Callable[[PriceEvent], None]
    lost: Callable[[LedgerRow], None]
    error: Callable[[Exception], None]


class Accounting:
    """Made by `open_accounting`. Its parts may be used as well: `prices`, `tokens`, `gate`, `ledger`."""

    def __init__(
        self,
        config: ClientConfig,
        *,
        tracker: CostTracker | None = None,
        sink: LedgerSink | None = None,
        report: Callable[[Exception], None] | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        self.prices = PriceBook(config.prices)
        self.tokens = TokenEstimator()
        self.gate = BudgetGate(BudgetBook(config.budget))
        self.ledger = Ledger(
            config.ledger,
            run=config.seams.new_id(),
            close_reservation=self.gate.settle,
            tracker=tracker,
            sink=sink,
            report=report,
        )
        self._wall, self._new_id = config.seams.wall, config.seams.new_id
        self._now = now or trio.lowlevel.current_clock().current_time
        self.price_refresh: PriceRefresh
        self.credit_refresh: CreditRefresh | None = None
        self.reconciliation: Reconciliation

    def __repr__(self) -> str:
        return f"<Accounting {self.prices!r}, {self.gate!r}, {self.ledger!r}>"

    @property
    def is_bounded(self) -> bool:
        """Whether there is any budget; without one nothing has to be reserved."""
        return self.gate.book.is_bounding

    def cost_snapshot(self) -> CostSnapshot:
        """What everything cost so far."""
        return self.ledger.tracker.snapshot()

    def spending(
        self,
        body: bytes,
        *,
        model: str,
        max_tokens: int | None,
        fallbacks: Sequence[str] = (),
        tenant: str = "",
        session: str = "",
        batch: str = "",
    ) -> Spending:
        """What a request with this body, an encoded object whose messages come last, can come to cost."""
        bound = self.tokens.bound_prompt(model, body, fallbacks=fallbacks)
        quote = self.prices.table.quote(model, *fallbacks, prompt_tokens=bound.tokens, shape=bound.shape)
        return Spending(quote=quote, max_tokens=max_tokens, model=model, tenant=tenant, session=session, batch=batch)

    def reserve_nowait(self, spending: Spending) -> Reservation | None:
        """See `BudgetGate.reserve_nowait`."""
        return self.gate.reserve_nowait(spending)

    async def reserve(self, spending: Spending) -> Reservation:
        """Wait for what `reserve_nowait` did not give; see `BudgetGate.wait`."""
        return await self.gate.wait(spending)

    async def admit(self, call: HttpCall) -> tuple[HttpCall, Reservation | None]:
        """Set aside what `call` may cost; the call as it is to be sent, and the reservation, none for what is free.

        Waits until the first list of prices and the credits are there, where they are needed, and for money where the
        budget allows that. Raises `BudgetExceededError` and `UnpriceableRequestError`; cancelling sets nothing aside.
        """
        if call.method != "POST" or call.path == BATCHES:
            return call, None
        if self.credit_refresh is not None:
            await self.credit_refresh.schedule.wait_first()
        is_chat = call.path in _WITH_COMPLETION
        spending = self._spending_of(call, is_chat=is_chat)
        if spending.quote is None:
            await self.price_refresh.schedule.wait_first()
            spending = self._spending_of(call, is_chat=is_chat)
        reservation = self.reserve_nowait(spending) or await self.reserve(spending)
        if reservation.max_tokens is not None and is_chat:
            call = msgspec.structs.replace(call, body=with_max_tokens(call.body, reservation.max_tokens))
        return call, reservation

    def _spending_of(self, call: HttpCall, *, is_chat: bool) -> Spending:
        settings = call.settings
        return self.spending(
            call.body,
            model=settings.model,
            max_tokens=settings.max_tokens if is_chat else 0,
            fallbacks=settings.models,
            tenant=settings.tenant,
            session=call.flow,
            batch=settings.batch,
        )

    def price(self, model: str) -> Pricing | None:
        """The prices of a model; see `PriceTable.price`."""
        return self.prices.table.price(model)

    def estimate_prompt(self, model: str, body: bytes) -> int:
        """About how many tokens a body has; see `TokenEstimator.estimate_prompt`."""
        return self.tokens.estimate_prompt(model, body)

    def open_batch(self, name: str, *, usd: Decimal | None, spent_usd: Decimal = ZERO) -> bool:
        """Bound what requests of the batch `name` may cost in all; `spent_usd` of it was spent before.

        The bound is the lower of `usd` and what the settings give a batch; returns whether there is one.
        """
        book = self.gate.book
        bounds = [bound for bound in (usd, cast("Decimal | None", book.budget.batch_usd)) if bound is not None]
        if bounds:
            book.open_account("batch", name, usd=min(bounds), spent_usd=spent_usd)
        return bool(bounds)

    @contextmanager
    def local_batch(self) -> Iterator[str]:
        """A new batch of this process alone, by its name: until the end of the block, with an account where the
        settings bound batches.

        What is held there then is settled as ever, and closes the account. Raises `BudgetExceededError` when too many
        accounts are open.
        """
        name, book = self._new_id(), self.gate.book
        if book.budget.batch_usd is not None:
            book.open_account("batch", name, is_local=True)
        try:
            yield name
        finally:
            book.end_account("batch", name)

    def forget_batch(self, name: str) -> None:
        """Close the account of the batch `name`, unless something is held there still, or other processes share it."""
        if not self.gate.book.is_shared:
            self.gate.book.close_account("batch", name)

    async def assume_spent(self, body: bytes, settings: CallSettings) -> None:
        """A request may have been charged in another life: count its worst case as spent; raises as `admit`."""
        call = HttpCall(body=body, settings=settings)
        _call, reservation = await self.admit(call)
        if reservation is not None:
            self.gate.settle(reservation, None)

    def release(self, reservation: Reservation) -> None:
        """Nothing was sent: give the reservation back. There is no row, since nothing was attempted."""
        self.gate.release(reservation)

    def finish(
        self,
        attempt: Attempt,
        *,
        body: bytes = b"",
        owner: Owner | None = None,
        answered_by: str = "",
        reservation: Reservation | None = None,
    ) -> LedgerRow:
        """An attempt has ended: learn from it, enter it, and settle its reservation, now or when its cost is known."""
        usage = attempt.usage
        at_s = self._wall()
        estimate: Decimal | None = None
        if usage is not None:
            self.tokens.observe(attempt.model, body, usage=usage)
            if usage.cost is None:
                estimate = self.estimate(usage, answered_by, attempt.model, body=body, at_s=at_s)
        return self.ledger.enter(
            attempt,
            at_s=at_s,
            now=self._now(),
            owner=owner or Owner(),
            answered_by=answered_by,
            estimate_usd=estimate,
            reservation=reservation,
        )

    def finish_batched(
        self, attempt: Attempt, *, owner: Owner, answered_by: str = "", reservation: Reservation | None = None
    ) -> LedgerRow:
        """`finish` for a request that the Batch API has answered, at half the prices of the list."""
        usage, estimate = attempt.usage, None
        if usage is not None and usage.cost is None:
            whole = self.estimate(usage, answered_by, attempt.model)
            estimate = None if whole is None else whole / 2
        return self.ledger.enter(
            attempt,
            at_s=self._wall(),
            now=self._now(),
            owner=owner,
            answered_by=answered_by,
            estimate_usd=estimate,
            reservation=reservation,
        )

    def estimate(self, usage: Usage, *models: str, body: bytes = b"", at_s: float | None = None) -> Decimal | None:
        """What this usage costs by the prices of the first of the models that has any; None when it is unknown."""
        # What the options admit is one search at least; how many a tool made, only the reply could tell.
        shape: RequestShape = self.tokens.bound_prompt(models[0] if models else "", body).shape if body else TEXT_ONLY
        used = consumption_of(
            usage, images=shape.images, long_cache=shape.long_cache, web_searches=min(shape.web_searches, 1)
        )
        if used is None:
            return None
        return self.prices.table.estimate(*models, used=used, at_s=self._wall() if at_s is None else at_s)


def with_max_tokens(body: bytes, max_tokens: int | None) -> bytes:
    """A body that had no bound on its completion with one; the same where there is none to give."""
    return body if max_tokens is None else b'{"max_tokens":%d,%b' % (max_tokens, body[1:])


@asynccontextmanager
async def open_accounting(
    config: ClientConfig,
    service: AccountingService,
    *,
    reports: AccountingReports,
    tracker: CostTracker | None = None,
    sink: LedgerSink | None = None,
) -> AsyncIterator[Accounting]:
    """The accounting of a client with its tasks: price refresh, lookups, the credits' bound.

    Rows go to `sink` as well. Leaving ends the search for what was lost: rows that are reconciling then are
    unreconciled, and are written as such. Attempts may still be entered after that, by requests that end with the pool,
    so a sink has to outlive both.
    """
    rng = config.seams.random
    async with trio.open_nursery() as nursery:
        accounting = Accounting(config, tracker=tracker, sink=sink, report=reports.error)
        accounting.price_refresh = PriceRefresh(
            accounting.prices, service.models, wall=config.seams.wall, rng=rng, report=reports.prices
        )
        accounting.reconciliation = Reconciliation(
            accounting.ledger, service.generation, rng=rng, report_lost=reports.lost, report_error=reports.error
        )
        nursery.start_soon(accounting.price_refresh.schedule.run)
        nursery.start_soon(accounting.ledger.changes.run)
        for _ in range(config.ledger.seekers):
            nursery.start_soon(accounting.reconciliation.run)
        if config.budget.from_credits:
            accounting.credit_refresh = CreditRefresh(
                accounting.gate, service.remaining_usd, rng=rng, report=reports.error
            )
            nursery.start_soon(accounting.credit_refresh.schedule.run)
        try:
            yield accounting
        finally:
            accounting.reconciliation.close()
            nursery.cancel_scope.cancel()
