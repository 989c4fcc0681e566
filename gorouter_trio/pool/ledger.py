"""The ledger: a row for every attempt at a request, and the search for what lost answers cost.

Theory of operation. An attempt that ended is entered once. Where the reply said what it cost, or nothing was charged,
that is all. Where the answer was lost, cut short or cancelled, the row stays *reconciling*, and what it will be is
looked up under its generation id: the API knows it after some seconds. Until then a reservation of the budget stays
with the row. The search has an end, and a row that it did not find is visible as *unreconciled*, its reservation taken
for spent. Nothing here waits or reads a clock; `pool.reconcile` is the task that asks.

Bounded: the last rows are kept, the sums are exact for ever, and of rows that are looked up at a time there are at most
so many; one more is unreconciled at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import msgspec
from msgspec import Struct

from .._contain import contain_sync
from .._feed import Feed
from ..wire.ledger import LedgerRow, LedgerState, Purpose
from .budget import Reservation
from .costs import CostSums, CostTracker
from .money import ZERO

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence
    from decimal import Decimal

    from ..config import LedgerConfig
    from ..wire.catalog import GenerationInfo
    from ..wire.responses import Usage

__all__ = ["BATCHES", "Attempt", "Ledger", "LedgerChange", "LedgerSink", "LedgerStatistics", "Owner"]

BATCHES: Final = "/batches"
"""Where batches are handed in: their requests are paid for and entered one by one, by whoever does that."""

_NO_ATTEMPT: Final = float("inf")
# Beyond this many, the wait is long since the longest one, and the number grows without end.
_MOST_DOUBLINGS: Final = 60


class Attempt(Protocol):
    """One attempt at a request, after its end: what the pool tells of it.

    `status` is None without a reply, `error` the name of an error's class or None. `maybe_billed` says that the
    provider may have charged for it and the reply does not tell what; a cancelled attempt has it from the moment its
    first byte was sent.
    """

    @property
    def call(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def model(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def lane(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def generation_id(self) -> str | None: ...
    @property
    def status(self) -> int | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def usage(self) -> Usage | None: ...
    @property
    def maybe_billed(self) -> bool: ...
    @property
    def cancelled(self) -> bool: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def sent_at(self) -> float: ...
    @property
    def ended_at(self) -> float: ...


class LedgerChange(NamedTuple):
    """A row that was entered, with the attempt that it is of; or one whose cost was found later, without."""

    row: LedgerRow
    attempt: Attempt | None


class Owner(Struct, frozen=True, kw_only=True):
    """Whose request it was, besides its tenant, and what for."""

    session: str = ""
    batch: str = ""
    purpose: Purpose = "chat"


_NOBODY: Final = Owner()


class LedgerSink(Protocol):
    """Where rows go besides memory. Called on the hot path: it must not wait. What it raises is reported."""

    def write(self, row: LedgerRow) -> None:
        """Take a row; one that is reconciling comes again when it has ended, under the same name."""


class LedgerStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot: rows entered so far, those kept in memory, and what became of the lost ones."""

    entered: int
    kept: int
    reconciling: int
    reconciled: int
    unreconciled: int
    lookups: int
    failed_writes: int


class _Search(Struct):
    """A row that is looked up."""

    row: LedgerRow
    reservation: Reservation | None
    tries: int = 0


class _Judgement(NamedTuple):
    state: LedgerState
    cost_usd: Decimal | None


class Ledger:
    """All rows of one run. `close_reservation` is called once for every reservation that came with a row.

    What a tracker or a sink raises goes to `report`, which must not raise, and stops nothing.
    """

    def __init__(
        self,
        config: LedgerConfig,
        *,
        run: str,
        close_reservation: Callable[[Reservation, Decimal | None], None],
        tracker: CostTracker | None = None,
        sink: LedgerSink | None = None,
        report: Callable[[Exception], None] | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.tracker: CostTracker = tracker or CostSums(most_names=config.names)
        self._close_reservation = close_reservation
        self._sink = sink
        self._report = report or _do_nothing
        self._rows: deque[LedgerRow] = deque(maxlen=config.rows)
        self._searches: dict[int, _Search] = {}
        self._due: list[tuple[float, int]] = []
        self._entered = self._reconciled = self._unreconciled = self._lookups = self._failed_writes = 0
        self.changes: Feed[tuple[LedgerRow, Attempt | None], LedgerChange] = Feed(_changes_of, report=self._note)
        """Who looks at rows as they are entered."""
        self.on_search: Callable[[], None] = _do_nothing
        """Called when there is a row to look up; set by the task that does so."""
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<Ledger {self._entered} rows, {len(self._searches)} reconciling, {self._unreconciled} unreconciled>"

    def statistics(self) -> LedgerStatistics:
        """A snapshot; cheap."""
        return LedgerStatistics(
            entered=self._entered,
            kept=len(self._rows),
            reconciling=len(self._searches),
            reconciled=self._reconciled,
            unreconciled=self._unreconciled,
            lookups=self._lookups,
            failed_writes=self._failed_writes,
        )

    def rows(self) -> list[LedgerRow]:
        """The last rows, oldest first; those that are reconciling come last, however old they are."""
        return [*self._rows, *(search.row for search in self._searches.values())]

    def enter(
        self,
        attempt: Attempt,
        *,
        at_s: float,
        now: float,
        owner: Owner = _NOBODY,
        answered_by: str = "",
        estimate_usd: Decimal | None = None,
        reservation: Reservation | None = None,
    ) -> LedgerRow:
        """Enter an attempt that has ended; the reservation is closed now, or when its cost has been looked up.

        `at_s` is in seconds since the epoch, `now` on the trio clock. `answered_by` is the model that the reply names,
        `estimate_usd` what the price list says.
        """
        state, cost_usd = self._judge(attempt, estimate_usd)
        self._entered += 1
        known = _Known(self.run, self._entered, at_s, state, cost_usd, estimate_usd, answered_by)
        row = _row_of(attempt, owner, known)
        if state == "reconciling":
            self._searches[row.row] = _Search(row, reservation)
            heapq.heappush(self._due, (now + self.config.first_lookup_s, row.row))
            self._record(row)
            self.on_search()
        else:
            self._unreconciled += state == "unreconciled"
            self._finish(row, reservation)
        if self.changes.observers:
            self.changes.add((row, attempt))
        return row

    def _judge(self, attempt: Attempt, estimate_usd: Decimal | None) -> _Judgement:
        usage = attempt.usage
        if usage is not None and usage.cost is not None:
            return _Judgement("settled", usage.cost)
        is_answered = 200 <= (attempt.status or 0) < 300
        if attempt.maybe_billed or (is_answered and usage is None):
            config = self.config
            can_ask = config.lookups > 0 and attempt.generation_id is not None and len(self._searches) < config.searches
            return _Judgement("reconciling" if can_ask and not self._is_closed else "unreconciled", None)
        if not is_answered and usage is None:
            return _Judgement("settled", ZERO)
        return _Judgement("unknown" if estimate_usd is None else "estimated", None)

    # The search

    @property
    def searching(self) -> int:
        """How many rows are being looked up."""
        return len(self._searches)

    def next_lookup_at(self) -> float:
        """When the next row is to be looked up (trio clock); infinity when none is."""
        return self._due[0][0] if self._due else _NO_ATTEMPT

    def take_due(self, now: float) -> LedgerRow | None:
        """A row to look up now; what came of it has to be told by `found` or `missed`."""
        if not self._due or self._due[0][0] > now:
            return None
        _, number = heapq.heappop(self._due)
        self._lookups += 1
        return self._searches[number].row

    def found(self, row: LedgerRow, info: GenerationInfo) -> LedgerRow | None:
        """The API said what a row cost; the row as it is now, None when the ledger was closed meanwhile."""
        search = self._searches.pop(row.row, None)
        if search is None:
            return None
        self._reconciled += 1
        after = msgspec.structs.replace(
            row,
            state="reconciled",
            cost_usd=info.total_cost if info.total_cost is not None else info.usage,
            upstream_usd=info.upstream_inference_cost if info.is_byok else None,
            model=info.model or row.model,
            prompt_tokens=_first(info.native_tokens_prompt, info.tokens_prompt, row.prompt_tokens),
            completion_tokens=_first(info.native_tokens_completion, info.tokens_completion, row.completion_tokens),
            reasoning_tokens=_first(info.native_tokens_reasoning, row.reasoning_tokens),
            cached_tokens=_first(info.native_tokens_cached, row.cached_tokens),
            tries=search.tries + 1,
        )
        self._finish(after, search.reservation, replaced=row)
        self._tell_change(after)
        return after

    def missed(self, row: LedgerRow, *, now: float, rng: random.Random) -> LedgerRow | None:
        """The API did not say; the row as unreconciled when that was the last try, None when there will be another.

        The wait before try n + 1 is drawn from half to the whole of first_lookup_s * 2**n, up to last_lookup_s.
        """
        search = self._searches.get(row.row)
        if search is None:
            return None
        search.tries += 1
        config = self.config
        if search.tries >= config.lookups:
            return self._give_up(row.row)
        longest = min(config.first_lookup_s * 2.0 ** min(search.tries, _MOST_DOUBLINGS), config.last_lookup_s)
        heapq.heappush(self._due, (now + longest * (0.5 + rng.random() / 2), row.row))
        return None

    def close(self) -> list[LedgerRow]:
        """End the search: what was not found is unreconciled, and so is what is entered lost from now on."""
        self._is_closed = True
        self._due.clear()
        return [self._give_up(number) for number in list(self._searches)]

    def _give_up(self, number: int) -> LedgerRow:
        search = self._searches.pop(number)
        self._unreconciled += 1
        after = msgspec.structs.replace(search.row, state="unreconciled", tries=search.tries)
        self._finish(after, search.reservation, replaced=search.row)
        self._tell_change(after)
        return after

    def _tell_change(self, row: LedgerRow) -> None:
        if self.changes.observers:
            self.changes.add((row, None))

    # Where rows go

    def _finish(self, row: LedgerRow, reservation: Reservation | None, *, replaced: LedgerRow | None = None) -> None:
        if reservation is not None:
            self._close_reservation(reservation, row.estimate_usd if row.state == "estimated" else row.cost_usd)
        self._rows.append(row)
        self._record(row, replaced=replaced)

    def _record(self, row: LedgerRow, *, replaced: LedgerRow | None = None) -> None:
        contain_sync(lambda: self.tracker.add(row, replaced=replaced), report=self._note)
        if self._sink is not None:
            sink = self._sink
            contain_sync(lambda: sink.write(row), report=self._note)

    def _note(self, error: Exception) -> None:
        self._failed_writes += 1
        self._report(error)


def _changes_of(entries: Sequence[tuple[LedgerRow, Attempt | None]]) -> list[LedgerChange]:
    # By the class, this would be a call of a Python function for each.
    new = partial(tuple.__new__, LedgerChange)
    return [new(entry) for entry in entries]


def _do_nothing(_error: Exception | None = None) -> None:
    """What is called when nobody wants to be."""


class _Known(NamedTuple):
    run: str
    row: int
    at_s: float
    state: LedgerState
    cost_usd: Decimal | None
    estimate_usd: Decimal | None
    model: str


def _row_of(attempt: Attempt, owner: Owner, known: _Known) -> LedgerRow:
    usage = attempt.usage
    prompt = completion = reasoning = cached = 0
    upstream: Decimal | None = None
    if usage is not None:
        prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
        of_prompt, of_completion = usage.prompt_tokens_details, usage.completion_tokens_details
        cached = (of_prompt.cached_tokens or 0) if of_prompt is not None else 0
        reasoning = (of_completion.reasoning_tokens or 0) if of_completion is not None else 0
        if usage.is_byok and usage.cost_details is not None:
            upstream = usage.cost_details.upstream_inference_cost
    return LedgerRow(
        run=known.run,
        row=known.row,
        at_s=known.at_s,
        state=known.state,
        call=attempt.call,
        attempt=attempt.attempt,
        purpose=owner.purpose,
        cost_usd=known.cost_usd,
        estimate_usd=known.estimate_usd,
        upstream_usd=upstream,
        generation_id=attempt.generation_id,
        model=known.model,
        requested_model=attempt.model,
        tenant=attempt.tenant,
        session=owner.session,
        batch=owner.batch,
        lane=attempt.lane,
        key_name=attempt.key,
        status=attempt.status or 0,
        error=attempt.error or "",
        streamed=attempt.streamed,
        cancelled=attempt.cancelled,
        maybe_billed=attempt.maybe_billed,
        prompt_tokens=prompt,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
        cached_tokens=cached,
    )


def _first(*counts: int | None) -> int:
    return next((count for count in counts if count is not None), 0)
