"""The task that asks the API what lost answers cost (GET /generation), and tells the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .._contain import contain
from ..errors import GorouterError, NotFoundError

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

    from ..wire.catalog import GenerationInfo
    from ..wire.ledger import LedgerRow
    from .ledger import Ledger

__all__ = ["Reconciliation"]


class Reconciliation:
    """Looks up the rows of a ledger that are reconciling.

    `fetch` gives what the API knows of a generation id, and raises `NotFoundError` as long as it knows nothing; any
    other error counts as one more try that found nothing. `report_lost` is told every row that stays unreconciled,
    `report_error` what `fetch` raised besides; neither may raise.
    """

    def __init__(
        self,
        ledger: Ledger,
        fetch: Callable[[str], Awaitable[GenerationInfo]],
        *,
        rng: random.Random,
        report_lost: Callable[[LedgerRow], None],
        report_error: Callable[[Exception], None],
    ) -> None:
        self._ledger = ledger
        self._fetch = fetch
        self._rng = rng
        self._report_lost = report_lost
        self._report_error = report_error
        self._changed = trio.Event()
        ledger.on_search = self._poke

    async def run(self) -> None:
        """Look up rows as they become due, one at a time; may run in several tasks. Ends by being cancelled."""
        while True:
            row = self._ledger.take_due(trio.current_time())
            if row is None:
                await self._wait_due()
            else:
                await self._look_up(row)

    async def wait_idle(self) -> None:
        """Wait until no row is reconciling: each has been found, or given up. The tasks have to run meanwhile."""
        await trio.lowlevel.checkpoint()
        while self._ledger.searching:
            await self._changed.wait()

    def close(self) -> None:
        """End the search; rows that were not found yet are reported as lost."""
        for row in self._ledger.close():
            self._report_lost(row)
        self._poke()

    async def _wait_due(self) -> None:
        with trio.CancelScope(deadline=self._ledger.next_lookup_at()):
            await self._changed.wait()

    async def _look_up(self, row: LedgerRow) -> None:
        info: GenerationInfo | None = None
        with trio.move_on_after(self._ledger.config.lookup_timeout_s):
            info = await contain(lambda: self._ask(row.generation_id or ""), report=self._report_error)
        if info is not None and (info.total_cost is not None or info.usage is not None):
            self._ledger.found(row, info)
        else:
            lost = self._ledger.missed(row, now=trio.current_time(), rng=self._rng)
            if lost is not None:
                self._report_lost(lost)
        self._poke()

    async def _ask(self, generation_id: str) -> GenerationInfo | None:
        try:
            return await self._fetch(generation_id)
        except NotFoundError:
            return None  # not yet: a generation appears some seconds after its end
        except GorouterError as exc:
            self._report_error(exc)
            return None

    def _poke(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
