"""What is fetched again and again in the background: the list of prices, and what is left of the credits.

A refresh that fails, hangs or brings nonsense changes nothing and says so. After a failure the next one comes sooner
than usual, after waits that double from half a minute up to the interval.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio

from .._contain import contain
from ..errors import DeadlineExceededError, DecodeError, GorouterError
from .prices import PriceBook, PriceEvent, PriceFailure, PriceRefreshFailed, PricesRefreshed

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable
    from decimal import Decimal

    from ..wire.catalog import Credits, KeyInfo, Model
    from .budget_gate import BudgetGate

__all__ = ["CreditRefresh", "PriceRefresh", "Schedule", "remaining_usd"]

_RETRY_S: Final = 30.0


class Schedule:
    """Runs `work` at an interval, give or take the part `jitter`, in the task of `run`.

    `work` says whether it succeeded. Starts idle unless it has an interval; the first run is at once if `at_once`.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[bool]],
        *,
        interval_s: float | None,
        jitter: float,
        rng: random.Random,
        at_once: bool = True,
    ) -> None:
        self._work = work
        self._interval_s = interval_s
        self._jitter = jitter
        self._rng = rng
        self._failures = 0
        self._at_once = at_once
        self._due_at = math.inf
        self._changed = trio.Event()
        self._running: trio.CancelScope | None = None
        self._first_over = trio.Event()
        if not at_once:
            self._first_over.set()

    async def wait_first(self) -> None:
        """Wait until the run at the start is over, however it ended; at once where there is none."""
        if not self._first_over.is_set():
            await self._first_over.wait()

    @property
    def interval_s(self) -> float | None:
        """The seconds between two runs; None while stopped."""
        return self._interval_s

    def start(self, interval_s: float) -> None:
        """Run now, and then at this interval; one that was started before is restarted."""
        self._interval_s = interval_s
        self._failures = 0
        self._due(trio.current_time())

    def stop(self) -> None:
        """Run no more, until started again; what runs now is cancelled."""
        self._interval_s = None
        self._first_over.set()
        self._due(math.inf)
        if self._running is not None:
            self._running.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do the work when it is due. Ends by being cancelled only."""
        if self._at_once:
            self._due(trio.current_time())
        else:
            self._plan(succeeded=True)
        task_status.started()
        while True:
            while trio.current_time() < self._due_at:
                with trio.CancelScope(deadline=self._due_at):
                    await self._changed.wait()
            self._due_at = math.inf
            with trio.CancelScope() as self._running:
                succeeded = await self._work()
            self._first_over.set()
            if not self._running.cancelled_caught:
                self._plan(succeeded=succeeded)
            self._running = None

    def _plan(self, *, succeeded: bool) -> None:
        """Choose the time of the next run, unless somebody has meanwhile."""
        self._failures = 0 if succeeded else self._failures + 1
        if self._due_at < math.inf or self._interval_s is None:
            return
        spread = 1 + self._jitter * (2 * self._rng.random() - 1)
        wait_s = self._interval_s * spread
        if not succeeded:
            wait_s = min(wait_s, _RETRY_S * 2.0 ** min(self._failures - 1, 16) * spread)
        self._due_at = trio.current_time() + wait_s

    def _due(self, at: float) -> None:
        self._due_at = at
        self._changed.set()
        self._changed = trio.Event()


class PriceRefresh:
    """Keeps a `PriceBook` up to date from `fetch`, the API's list of models. Every refresh is told to `report`, which
    must not raise.
    """

    def __init__(
        self,
        book: PriceBook,
        fetch: Callable[[], Awaitable[list[Model]]],
        *,
        wall: Callable[[], float],
        rng: random.Random,
        report: Callable[[PriceEvent], None],
    ) -> None:
        self.book = book
        self._fetch = fetch
        self._wall = wall
        self._report = report
        policy = book.policy
        self.schedule = Schedule(
            self._refresh_contained,
            interval_s=policy.refresh_s,
            jitter=policy.jitter,
            rng=rng,
            at_once=policy.on_start,
        )

    async def refresh(self) -> PricesRefreshed:
        """Fetch the list now, in the caller's task.

        Raises what fetching raises, `DeadlineExceededError` when it takes longer than the policy allows, `DecodeError`
        when the list is refused; the table stays as it was then, and the failure is reported as well.
        """
        models: list[Model] | None = None
        with trio.move_on_after(self.book.policy.timeout_s):
            try:
                models = await self._fetch()
            except GorouterError as exc:
                self._fail("error", f"{type(exc).__name__}: {exc.message}")
                raise
        if models is None:
            self._fail("hung", f"no answer within {self.book.policy.timeout_s:g} s")
            raise DeadlineExceededError("the list of prices did not come in time", phase="total")
        event = self.book.update(models, at_s=self._wall())
        self._report(event)
        if isinstance(event, PriceRefreshFailed):
            raise DecodeError(f"the list of prices was refused: {event.reason}")
        return event

    async def _refresh_contained(self) -> bool:
        return await contain(self.refresh, report=self._note_bug) is not None

    def _note_bug(self, error: Exception) -> None:
        """Whatever is no error of this package has not been noted yet."""
        if not isinstance(error, GorouterError):
            self._fail("error", f"{type(error).__name__}: {error}")

    def _fail(self, failure: PriceFailure, reason: str) -> None:
        self._report(self.book.fail(failure, reason, at_s=self._wall()))


class CreditRefresh:
    """Bounds the client's budget by what the API says is left: `fetch` gives that in USD, None for no bound.

    What `fetch` raises is told to `report`, which must not raise; the bound stays as it was.
    """

    def __init__(
        self,
        gate: BudgetGate,
        fetch: Callable[[], Awaitable[Decimal | None]],
        *,
        rng: random.Random,
        report: Callable[[Exception], None],
    ) -> None:
        self._gate = gate
        self._fetch = fetch
        self._report = report
        interval_s = gate.book.budget.credits_refresh_s
        self.schedule = Schedule(self._refresh_contained, interval_s=interval_s, jitter=0.1, rng=rng)

    async def refresh(self) -> Decimal | None:
        """Ask now, in the caller's task; raises what asking raises."""
        spent_usd = self._gate.book.client.spent_usd
        left_usd = await self._fetch()
        if self._gate.book.bound_client(left_usd, spent_usd=spent_usd):
            self._gate.recheck()
        return left_usd

    async def _refresh_contained(self) -> bool:
        failed: list[Exception] = []
        with trio.move_on_after(self._gate.book.budget.credits_refresh_s) as scope:
            await contain(self.refresh, report=failed.append)
        if scope.cancelled_caught:
            failed.append(DeadlineExceededError("the credits did not come in time", phase="total"))
        for error in failed:
            self._report(error)
        return not failed


def remaining_usd(balance: Credits | None, key: KeyInfo | None) -> Decimal | None:
    """What can still be spent: the least of the credits, the key's limit and its budget; None without a bound."""
    bounds = [balance.remaining if balance is not None else None]
    if key is not None:
        bounds += [key.limit_remaining, key.effective_budget.remaining_usd if key.effective_budget else None]
    return min((bound for bound in bounds if bound is not None), default=None)
