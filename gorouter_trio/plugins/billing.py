"""A report for every attempt at a request: who asked, what it cost, how long it took."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import trio
from msgspec import Struct

from .._callables import can_take, is_async
from .._contain import contain, contain_sync
from .._plugin_host import END_S
from ..errors import ConfigError, ExtensionError
from ..wire.ledger import LedgerRow
from ..wire.responses import Usage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from decimal import Decimal

    from ..client import Client
    from ..pool.ledger import LedgerChange

__all__ = ["BillingErrorHandler", "BillingPlugin", "BillingReport", "BillingReporter", "BillingStatistics"]

_LOG = logging.getLogger("gorouter_trio.billing")


class BillingReport(Struct, frozen=True, kw_only=True):
    """One attempt at a request, as the ledger has it: `row`.

    `usage` is what the reply said and `duration_s` the time from the first byte sent to the end; both are None in an
    update: a report on a row that was reported before with an unknown cost, under the same `row.run` and `row.row`.
    """

    row: LedgerRow
    usage: Usage | None = None
    duration_s: float | None = None

    @property
    def is_update(self) -> bool:
        """Whether the row was reported before, and takes the place of that one."""
        return self.duration_s is None

    @property
    def model(self) -> str:
        """The model that answered, or else the one that was asked for."""
        return self.row.model or self.row.requested_model

    @property
    def cost_usd(self) -> Decimal | None:
        """What was charged, or else what the price list says; None when neither is known, which is not zero."""
        return self.row.estimate_usd if self.row.cost_usd is None else self.row.cost_usd

    @property
    def has_price(self) -> bool:
        """Whether the cost is known, if only from the price list."""
        return self.cost_usd is not None

    @property
    def at_s(self) -> float:
        """When the attempt ended, in wall-clock seconds since the epoch."""
        return self.row.at_s


BillingReporter: TypeAlias = Callable[[BillingReport], Awaitable[object] | object]
BillingErrorHandler: TypeAlias = Callable[[Exception, BillingReport], object]


class BillingStatistics(Struct, frozen=True, kw_only=True):
    """Reports that the reporter took, that it failed on, that found no room, and that wait."""

    reported: int
    failed: int
    dropped: int
    queued: int


class BillingPlugin:
    """Gives a `BillingReport` to `reporter` for each attempt that was sent: retries, rounds of tools and streams too.

    Reports wait in a queue for a task that gives them to the reporter, sync or async, one after the other and in order:
    no chat waits for it. `mode="thread"` calls a sync reporter in a thread, for one that waits, and `mode="inline"`
    calls it without a queue, on the loop. At most `queue` reports wait; what finds no room goes to
    `on_error` with an `ExtensionError`, as does what the reporter raises. Without an `on_error` that is logged, to
    `gorouter_trio.billing`. When the client closes, what is queued is still given out, for at most `drain_s` seconds,
    which must be less than ten. A plugin is for one client at a time.
    """

    name = "billing"

    def __init__(
        self,
        reporter: BillingReporter,
        *,
        on_error: BillingErrorHandler | None = None,
        mode: Literal["queue", "thread", "inline"] = "queue",
        queue: int = 4_096,
        drain_s: float = 5.0,
    ) -> None:
        if not can_take(reporter, 1):
            raise ConfigError(f"billing: reporter must be a function of a report, not {reporter!r}")
        if on_error is not None and (not can_take(on_error, 2) or is_async(on_error)):
            raise ConfigError(f"billing: on_error must be a plain function of (error, report), not {on_error!r}")
        if mode not in {"queue", "thread", "inline"}:
            raise ConfigError(f"billing: mode must be queue, thread or inline, not {mode!r}")
        if mode != "queue" and is_async(reporter):
            raise ConfigError(
                f"billing: an async reporter takes its reports from the queue; mode={mode!r} is for others"
            )
        _check_number("queue", queue, least=1)
        _check_number("drain_s", drain_s, least=0)
        if drain_s >= END_S:
            raise ConfigError(f"billing: drain_s must be less than {END_S:g}, the seconds that a plugin has to end")
        self._reporter = reporter
        self._on_error = on_error
        self._mode = mode
        self._room = queue
        self._drain_s = drain_s
        self._queue: deque[LedgerChange] = deque()
        self._came = trio.Event()
        self._is_closing = False
        self._is_begun = False
        self._reported = self._failed = self._dropped = 0

    def __repr__(self) -> str:
        return f"<BillingPlugin: {self._reported} reported, {len(self._queue)} queued>"

    @asynccontextmanager
    async def __call__(self, client: Client) -> AsyncIterator[None]:
        """Called by the client."""
        if self._is_begun:
            # Two tasks at one queue would report what is first in it twice.
            raise ConfigError("billing: the plugin has begun with another client; each needs one of its own")
        self._is_begun, self._is_closing = True, False
        try:
            async with self._taking(client):
                yield
        finally:
            self._is_begun = False
        for change in self._left():
            self._drop(change, "the client closed before it was reported")

    @asynccontextmanager
    async def _taking(self, client: Client) -> AsyncIterator[None]:
        """Take rows while the body runs, and give out what there is of them after it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work)
            client.observe_ledger(self._take)
            try:
                yield
            finally:
                client.unobserve_ledger(self._take)
                self._is_closing = True
                self._came.set()
                nursery.cancel_scope.shield = True
                nursery.cancel_scope.deadline = trio.current_time() + self._drain_s

    def statistics(self) -> BillingStatistics:
        """A snapshot."""
        return BillingStatistics(
            reported=self._reported, failed=self._failed, dropped=self._dropped, queued=len(self._queue)
        )

    def _take(self, changes: Sequence[LedgerChange]) -> None:
        """Rows were entered."""
        if self._mode == "inline":
            for change in changes:
                self._report_inline(_report_of(change))
            return
        room = self._room - len(self._queue)
        self._queue.extend(changes[:room])
        for change in changes[room:]:
            self._drop(change, f"{self._room} reports wait already")
        self._came.set()

    async def _work(self) -> None:
        while not (self._is_closing and not self._queue):
            if not self._queue:
                self._came = trio.Event()
                await self._came.wait()
            while self._queue:
                # One that the reporter is at stays in the queue: cut off, it is told like the others.
                if self._mode == "thread":
                    await self._report_in_thread(_report_of(self._queue[0]))
                elif (returned := contain_sync(self._report_queued, report=self._fail_first)) is not None:
                    await self._finish(returned)
            await trio.lowlevel.checkpoint()

    def _report_queued(self) -> Awaitable[object] | None:
        """Give out reports until one has to be waited for, which is returned; those before cost no coroutine each."""
        queue, reporter = self._queue, self._reporter
        while queue:
            returned = reporter(_report_of(queue[0]))
            if returned is not None and inspect.isawaitable(returned):
                return returned
            queue.popleft()
            self._reported += 1
        return None

    def _fail_first(self, error: Exception) -> None:
        self._fail(_report_of(self._queue.popleft()), error)

    async def _finish(self, returned: Awaitable[object]) -> None:
        await self._wait(partial(_wait_for, returned), _report_of(self._queue[0]))

    async def _report_in_thread(self, report: BillingReport) -> None:
        await self._wait(partial(trio.to_thread.run_sync, self._report_at_once, report, abandon_on_cancel=True), report)

    def _report_at_once(self, report: BillingReport) -> None:
        """Give out a report where nobody waits for what comes of it."""
        returned = self._reporter(report)
        if inspect.isawaitable(returned):
            if inspect.iscoroutine(returned):
                returned.close()
            raise ExtensionError(f"billing: the reporter is async, and mode={self._mode!r} does not wait for it")

    async def _wait(self, call: Callable[[], Awaitable[object]], report: BillingReport) -> None:
        """Wait for the first one in the queue."""
        failed = self._failed
        await contain(call, report=partial(self._fail, report))
        self._queue.popleft()
        self._reported += self._failed == failed

    def _report_inline(self, report: BillingReport) -> None:
        failed = self._failed
        contain_sync(partial(self._report_at_once, report), report=partial(self._fail, report))
        self._reported += self._failed == failed

    def _fail(self, report: BillingReport, error: Exception) -> None:
        self._failed += 1
        self._tell(error, report)

    def _drop(self, change: LedgerChange, why: str) -> None:
        self._dropped += 1
        self._tell(ExtensionError(f"billing: {why}"), _report_of(change))

    def _tell(self, error: Exception, report: BillingReport) -> None:
        if self._on_error is None:
            _log(error)
        else:
            contain_sync(partial(self._on_error, error, report), report=_log)

    def _left(self) -> list[LedgerChange]:
        left = list(self._queue)
        self._queue.clear()
        return left


def _check_number(name: str, value: object, *, least: int) -> None:
    kinds = (int, float) if name.endswith("_s") else int
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        raise ConfigError(f"billing: {name} must be a number of at least {least}, not {value!r}")


def _report_of(change: LedgerChange) -> BillingReport:
    row, attempt = change
    if attempt is None:
        return BillingReport(row=row)
    return BillingReport(row=row, usage=attempt.usage, duration_s=attempt.ended_at - attempt.sent_at)


def _log(error: Exception) -> None:
    _LOG.error("a report was not taken: %s: %r", type(error).__name__, str(error))


async def _wait_for(returned: Awaitable[object]) -> None:
    await returned
