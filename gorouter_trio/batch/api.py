"""The Batch API as a back end of jobs: rows are handed in by thousands, at half the price, and fetched within a day.

Theory of operation. Rows gather in *parts* of one model each, within the API's limits. A part is written into the
journal before it is handed in, with the id that it was given after that, and its rows count as sent from then on; so a
job that was killed goes on by asking for its parts, and sends nothing twice. A part whose id was never heard of may
have been taken in or not: it is looked for among the account's batches, by its model, its size and its time, and its
rows are handed in again, as rows that may have been billed, only when it is not found there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, TypeVar, cast

import msgspec
import trio
from msgspec import Struct

from ..errors import (
    ApiError,
    BudgetExceededError,
    CircuitOpenError,
    GorouterError,
    PoolFullError,
    ProviderError,
    RateLimitError,
    TransportError,
    UnpriceableRequestError,
)
from ..pool.ledger import Owner
from ..wire.codec import decode_completion, decode_error, decode_json, encode_json, to_message
from ..wire.mail import HttpCall
from ..wire.responses import Usage
from ..wire.result import CallRecord, ChatResult
from .journal import RowMark
from .runner import BatchResult
from .settings import StopReason, stop_reason

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ..pool.accounting import Accounting
    from ..pool.budget import Reservation
    from ..transport.sqlite import Connection, SqliteFile
    from ..wire.batch import ApiBatch, ApiBatchPage, ApiBatchResult
    from ..wire.mail import CallSettings
    from .estimate import JobEstimate
    from .jobrow import JobRow
    from .journal import Recorder

__all__ = [
    "ApiAttempt",
    "ApiMoney",
    "ApiPart",
    "ApiReservation",
    "ApiRun",
    "ApiServices",
    "JobHost",
    "choose_back_end",
    "load_parts",
]

_ENDPOINT: Final = "/v1/chat/completions"
_WINDOW_S: Final = 86_400.0
# The API takes 5,000 requests and 200 MB; answers are of the size of questions, and have to fit a reply of 64 MiB.
_MOST_BYTES: Final = 16 * 1024 * 1024
_MOST_PARTS: Final = 32
_MOST_PAGES: Final = 20
_CLOCK_SKEW_S: Final = 300.0
_FIRST_POLL_S: Final = 2.0
_POLL_GROWTH: Final = 1.5
_PATIENCE_S: Final = 3_600.0
_WRITERS: Final = 64

# What may be over when it is asked again; live rows go on meanwhile.
_OUTAGES: Final = (TransportError, ProviderError, RateLimitError, CircuitOpenError, PoolFullError)

T = TypeVar("T")

_PUT: Final = (
    "INSERT OR REPLACE INTO parts (part, state, batch_id, model, rows, submitted_at) VALUES (?, ?, ?, ?, ?, ?)"
)


class ApiAttempt(Struct, frozen=True, kw_only=True):
    """A request of a batch after its end, as the ledger takes it: see `pool.ledger.Attempt`.

    The API tells nothing of the time that a single one took, nor of the key.
    """

    model: str
    tenant: str
    generation_id: str | None
    status: int | None
    error: str | None
    usage: Usage | None
    maybe_billed: bool
    ended_at: float
    call: int = 0
    attempt: int = 1
    lane: str = "batch"
    key: str = ""
    cancelled: bool = False
    streamed: bool = False

    @property
    def sent_at(self) -> float:
        """When it ended."""
        return self.ended_at


class ApiReservation(Protocol):
    """Money that is set aside for requests that are handed in."""

    async def reserve(self, call: HttpCall) -> tuple[HttpCall, object]:
        """Set aside what a request may cost; the call as it is to be sent, and what to `settle`.

        Raises `BudgetExceededError`.
        """

    def enter(self, attempt: ApiAttempt, reservation: object | None, *, batch: str, answered_by: str) -> None:
        """A request of a batch has ended: enter it into the ledger, and settle its reservation where there is one."""

    def release(self, reservation: object) -> None:
        """A request was not handed in after all."""


class ApiServices(NamedTuple):
    """What the back end needs of a client. `refusal` says why rows cannot go there at all, None when they can."""

    submit: Callable[[bytes], Awaitable[ApiBatch]]
    find: Callable[[str], Awaitable[ApiBatch]]
    list: Callable[[str | None], Awaitable[ApiBatchPage]]
    money: ApiReservation
    wall: Callable[[], float]
    finish: Callable[[ChatResult], ChatResult[object]]
    refusal: str | None = None
    max_requests: int = 5_000
    max_poll_s: float = 60.0


class ApiMoney:
    """The budgets of a client, for requests that are handed in."""

    def __init__(self, accounting: Accounting) -> None:
        self._accounting = accounting

    async def reserve(self, call: HttpCall) -> tuple[HttpCall, object]:
        """See `ApiReservation`. Supposes the price of a live request, which is twice what it will be."""
        return await self._accounting.admit(call) if self._accounting.is_bounded else (call, None)

    def enter(self, attempt: ApiAttempt, reservation: object | None, *, batch: str, answered_by: str) -> None:
        """See `ApiReservation`."""
        self._accounting.finish_batched(
            attempt,
            owner=Owner(batch=batch),
            answered_by=answered_by,
            reservation=cast("Reservation | None", reservation),
        )

    def release(self, reservation: object) -> None:
        """See `ApiReservation`."""
        self._accounting.release(cast("Reservation", reservation))


class JobHost(Protocol):
    """What the back end needs of its job; see `RunningJob`."""

    name: str
    via: Literal["live", "api"]
    stopping: StopReason | None
    stopped: trio.Event
    recorder: Recorder
    released: int

    async def next_row(self) -> JobRow | None:
        """The next row that has to be run."""

    async def record(self, row: JobRow, result: BatchResult) -> None:
        """Write what came of a row."""

    async def record_result(self, mark: RowMark, result: BatchResult, *, position: int) -> None:
        """The same for a row by its mark."""

    def failed(self, row: JobRow, error: GorouterError) -> BatchResult:
        """The result of a row that failed."""

    def put_back(self, row: JobRow) -> None:
        """Leave a row for a later run."""

    def drain(self, reason: StopReason) -> None:
        """Take no more rows."""

    def is_done(self, row: int) -> bool:
        """Whether a run before has written the row."""


class _PartRow(Struct, frozen=True, array_like=True):
    """A row that was handed in, as far as its line needs it."""

    row: int
    digest: int
    position: int
    custom_id: str | None
    line_number: int | None
    was_in_flight: bool
    # Not in journals of an earlier version.
    tenant: str = ""
    doubts: int = 0

    @property
    def mark(self) -> RowMark:
        """The row for the journal."""
        return RowMark(self.row, self.digest, self.doubts)


class ApiPart:
    """Rows that are handed in together. `state` is what the journal says of it."""

    def __init__(self, number: int, model: str, *, rows: list[_PartRow]) -> None:
        self.number = number
        self.model = model
        self.rows = rows
        self.state: Literal["submitting", "submitted", "done"] = "submitting"
        self.batch_id = ""
        self.submitted_at = 0.0
        # Not in the journal: after a kill, a budget counts their rows by what they come to.
        self.reservations: dict[int, object] = {}

    def __repr__(self) -> str:
        return f"<ApiPart {self.number}, {self.state}, {len(self.rows)} rows of {self.model}>"


class _Gathering:
    """Rows of one model on their way into a part."""

    def __init__(self) -> None:
        self.rows: list[tuple[JobRow, bytes, object]] = []
        self.size = 0


class ApiRun:
    """The parts of one job: gathered, handed in, asked for, and written."""

    def __init__(
        self, running: JobHost, services: ApiServices, *, parts: list[ApiPart], journal: SqliteFile | None
    ) -> None:
        self._running = running
        self._services = services
        self._journal = journal
        self._open = {part.number: part for part in parts if part.state != "done"}
        self._next_number = max((part.number for part in parts), default=-1) + 1
        self._room = trio.Semaphore(_MOST_PARTS)
        self.rows: frozenset[int] = frozenset()

    @property
    def parts(self) -> int:
        """How many parts are with the API."""
        return len(self._open)

    async def take_stock(self) -> None:
        """Find parts whose ids were not heard of, and forget those that are not there: their rows are sent anew.

        To be called once, before `run`. Afterwards `rows` are those that are with the API.
        """
        for part in list(self._open.values()):
            part.rows = [row for row in part.rows if not self._running.is_done(row.row)]
            if part.state == "submitting" and not await self._find_lost(part):
                part.state = "done"
                await self._put(part)
                del self._open[part.number]
        self.rows = frozenset(row.row for part in self._open.values() for row in part.rows)

    async def run(self) -> None:
        """Collect what was handed in before and, where the job goes this way, hand in all that is left."""
        async with trio.open_nursery() as nursery:
            for part in list(self._open.values()):
                nursery.start_soon(self._take_up, part)
            if self._running.via == "api":
                await self._gather(nursery)

    # Into parts

    async def _gather(self, nursery: trio.Nursery) -> None:
        running = self._running
        models: dict[str, _Gathering] = {}
        while running.stopping is None and (row := await running.next_row()) is not None:
            if row.error is not None:
                await self._refuse(row, row.error)
            else:
                await self._add(row, models, nursery=nursery)
        for model, gathering in models.items():
            await self._close(model, gathering, nursery=nursery)

    async def _add(self, row: JobRow, models: dict[str, _Gathering], *, nursery: trio.Nursery) -> None:
        settings = cast("CallSettings", row.settings)
        try:
            call, reservation = await self._reserve(row, models, nursery=nursery)
        except BudgetExceededError:
            self._running.drain("budget")
            self._running.put_back(row)
            return
        except UnpriceableRequestError as exc:
            await self._refuse(row, exc)
            return
        gathering = models.setdefault(settings.model, _Gathering())
        if gathering.size + len(call.body) > _MOST_BYTES and gathering.rows:
            await self._close(settings.model, gathering, nursery=nursery)
            gathering = models[settings.model] = _Gathering()
        gathering.rows.append((row, call.body, reservation))
        gathering.size += len(call.body)
        if len(gathering.rows) >= self._services.max_requests:
            del models[settings.model]
            await self._close(settings.model, gathering, nursery=nursery)

    async def _refuse(self, row: JobRow, error: GorouterError) -> None:
        """A row that is not handed in: its line says why."""
        await self._running.recorder.begin(row.mark)
        await self._running.record(row, self._running.failed(row, error))

    async def _reserve(
        self, row: JobRow, models: dict[str, _Gathering], *, nursery: trio.Nursery
    ) -> tuple[HttpCall, object]:
        """The money for a row. What has gathered is handed in before this waits: its money comes back only then."""
        call = HttpCall(body=row.body, settings=cast("CallSettings", row.settings))
        with trio.CancelScope() as at_once:
            at_once.cancel()
            return await self._services.money.reserve(call)
        for model in list(models):
            await self._close(model, models.pop(model), nursery=nursery)
        return await self._services.money.reserve(call)

    async def _close(self, model: str, gathering: _Gathering, *, nursery: trio.Nursery) -> None:
        """Make a part of what has gathered, hand it in, and have it watched."""
        await self._room.acquire()
        rows = [row for row, _body, _money in gathering.rows]
        part = ApiPart(self._next_number, model, rows=[_part_row(row) for row in rows])
        self._next_number += 1
        self._open[part.number] = part
        part.reservations = {row.mark.row: money for row, _body, money in gathering.rows}
        body = self._body(model, gathering)
        await self._running.recorder.begin_all([row.mark for row in rows])
        part.submitted_at = self._services.wall()
        await self._put(part)
        if await self._submit(part, body):
            nursery.start_soon(self._collect, part)

    def _body(self, model: str, gathering: _Gathering) -> bytes:
        # The API wants `requests` to come last.
        head = encode_json({"endpoint": _ENDPOINT, "model": model, "completion_window": "24h"})
        requests = [
            b'{"custom_id":"%b","body":%b}' % (self._name(row.mark.row).encode(), body)
            for row, body, _money in gathering.rows
        ]
        return b'%b,"requests":[%b]}' % (head[:-1], b",".join(requests))

    def _name(self, row: int) -> str:
        return f"{self._running.name[:12]}-{row}"

    async def _submit(self, part: ApiPart, body: bytes) -> bool:
        """Hand a part in; whether it is with the API now.

        An outage is waited out for an hour, or until the job stops. The rows fail with a part that was refused.
        """
        until = trio.current_time() + _PATIENCE_S
        delay_s = min(_FIRST_POLL_S, self._services.max_poll_s)
        while (error := await self._hand_in(part, body)) is not None:
            if error.maybe_billed:
                return await self._find_or_fail(part, error)
            reason = stop_reason(error)
            if reason is None and isinstance(error, _OUTAGES):
                await self._pause(delay_s)
                delay_s = min(delay_s * _POLL_GROWTH, self._services.max_poll_s)
                reason = self._running.stopping
                if reason is None and trio.current_time() < until:
                    continue
            if reason is None:
                await self._fail(part, error)
            else:
                await self._take_back(part, reason)
            return False
        return True

    async def _hand_in(self, part: ApiPart, body: bytes) -> GorouterError | None:
        try:
            batch = await self._services.submit(body)
        except GorouterError as exc:
            return exc
        await self._was_submitted(part, batch.id)
        return None

    async def _find_or_fail(self, part: ApiPart, error: GorouterError) -> bool:
        """A part may be with the API: look for it. Where the job stops before that is known, the next run does."""
        is_there = await self._ask(partial(self._find_lost, part))
        if is_there is False:
            await self._fail(part, error)
        return bool(is_there)

    async def _was_submitted(self, part: ApiPart, batch_id: str) -> None:
        part.batch_id, part.state = batch_id, "submitted"
        await self._put(part)

    async def _take_back(self, part: ApiPart, reason: StopReason) -> None:
        """A part was refused as all others would be: its rows are left for a later run."""
        self._running.drain(reason)
        for row in part.rows:
            if (money := part.reservations.pop(row.row, None)) is not None:
                self._services.money.release(money)
            self._running.recorder.release(row.mark)
        self._running.released += len(part.rows)
        await self._end(part)

    async def _fail(self, part: ApiPart, error: GorouterError) -> None:
        await self._write_all([(row, self._failed(row, error)) for row in part.rows], part)
        await self._end(part)

    # Out of parts

    async def _take_up(self, part: ApiPart) -> None:
        """A part of an earlier run."""
        await self._room.acquire()
        await self._collect(part)

    async def _find_lost(self, part: ApiPart) -> bool:
        """Look for a part whose id was not heard of; whether it is with the API."""
        known = {other.batch_id for other in self._open.values()}
        after: str | None = None
        found: list[ApiBatch] = []
        for _ in range(_MOST_PAGES):
            page = await self._services.list(after)
            found += [batch for batch in page.data if batch.id not in known and _may_be(batch, part)]
            is_past = any(_time_of(batch) < part.submitted_at - _CLOCK_SKEW_S for batch in page.data)
            if not page.has_more or not page.data or is_past:
                break
            after = page.data[-1].id
        if len(found) != 1:
            return False
        await self._was_submitted(part, found[0].id)
        return True

    async def _collect(self, part: ApiPart) -> None:
        """Ask for a part until it has ended, then write its rows."""
        batch = await self._ask(partial(self._find_ended, part))
        if batch is None:
            # It stays with the API, and the next run asks for it.
            return
        results = {result.custom_id: result for result in batch.results or ()}
        lines = [(row, self._result(row, results.get(self._name(row.row)), batch)) for row in part.rows]
        await self._write_all(lines, part)
        await self._end(part)

    async def _find_ended(self, part: ApiPart) -> ApiBatch | None:
        batch = await self._services.find(part.batch_id)
        return batch if batch.is_done else None

    async def _ask(self, call: Callable[[], Awaitable[T | None]]) -> T | None:
        """Call until there is something, through outages; None when the job stops before that.

        A key that is refused, or another reason for which all requests would be, stops the job as it does for live
        rows. Raises other errors.
        """
        delay_s = min(_FIRST_POLL_S, self._services.max_poll_s)
        while (found := await self._call(call)) is None and self._running.stopping is None:
            await self._pause(delay_s)
            delay_s = min(delay_s * _POLL_GROWTH, self._services.max_poll_s)
        return found

    async def _call(self, call: Callable[[], Awaitable[T | None]]) -> T | None:
        try:
            return await call()
        except GorouterError as exc:
            if (reason := stop_reason(exc)) is not None:
                self._running.drain(reason)
            elif not isinstance(exc, _OUTAGES):
                raise
            return None

    async def _pause(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._running.stopped.wait()

    def _result(self, row: _PartRow, answer: ApiBatchResult | None, batch: ApiBatch) -> BatchResult:
        try:
            result, body = self._read(answer, batch)
        except GorouterError as exc:
            exc.attempts = exc.attempts or 1
            return self._failed(row, exc)
        return BatchResult(
            custom_id=row.custom_id,
            index=row.position,
            result=result,
            body=body,
            line_number=row.line_number,
            was_in_flight=row.was_in_flight,
        )

    def _read(self, answer: ApiBatchResult | None, batch: ApiBatch) -> tuple[ChatResult[object], bytes]:
        """The answer to a request; raises the error that it has in its place."""
        response = None if answer is None else answer.response
        if response is None or bytes(response.body) == b"null":
            error = (None if answer is None else answer.error) or batch.error
            code = f"batch_{batch.status}" if error is None or error.code is None else error.code
            reason = "the batch has no answer to the request" if error is None else error.message
            raise ProviderError(reason, status=504 if batch.status == "expired" else 502, code=code)
        body = bytes(response.body)
        if response.status_code >= 300:
            raise decode_error(response.status_code, (), body=body, now_s=self._services.wall())
        reply = decode_completion(body)
        choice = reply.choices[0]  # type: ignore[index]  # decode_completion has seen it
        call = CallRecord(
            generation_id=reply.id,
            model=reply.model,
            provider=reply.provider,
            finish_reason=choice.finish_reason,
            native_finish_reason=choice.native_finish_reason,
            usage=reply.usage,
            finished_at_s=self._services.wall(),
        )
        message = to_message(choice.message)  # type: ignore[arg-type]  # as above
        return self._services.finish(ChatResult(message=message, call=call)), body

    def _failed(self, row: _PartRow, error: GorouterError) -> BatchResult:
        return BatchResult(
            custom_id=row.custom_id,
            index=row.position,
            error=error,
            line_number=row.line_number,
            was_in_flight=row.was_in_flight,
        )

    async def _write_all(self, lines: Sequence[tuple[_PartRow, BatchResult]], part: ApiPart) -> None:
        """Write the rows of a part, some at a time: those at the same time share a commit."""
        left = iter(lines)

        async def write() -> None:
            for row, result in left:
                self._settle(part, row, result=result)
                await self._running.record_result(row.mark, result, position=row.position)

        async with trio.open_nursery() as nursery:
            for _ in range(min(_WRITERS, len(lines))):
                nursery.start_soon(write)

    def _settle(self, part: ApiPart, row: _PartRow, *, result: BatchResult) -> None:
        attempt, answered_by = _attempt_of(result, model=part.model, tenant=row.tenant)
        reservation = part.reservations.pop(row.row, None)
        # As for live rows: before the line is written, since it was charged whether or not that works.
        self._services.money.enter(attempt, reservation, batch=self._running.name, answered_by=answered_by)

    async def _end(self, part: ApiPart) -> None:
        part.state = "done"
        await self._put(part)
        del self._open[part.number]
        self._room.release()

    async def _put(self, part: ApiPart) -> None:
        if self._journal is not None:
            rows = encode_json(part.rows if part.state != "done" else [])
            values = (part.number, part.state, part.batch_id, part.model, rows, part.submitted_at)
            await self._journal.write(lambda connection: _run(connection, values), subject="")


def _run(connection: Connection, values: tuple[object, ...]) -> None:
    connection.execute(_PUT, values)


async def load_parts(journal: SqliteFile) -> list[ApiPart]:
    """The parts that a journal knows; raises `StoreError`."""
    return await journal.read(_load, subject="")


def _load(connection: Connection) -> list[ApiPart]:
    parts: list[ApiPart] = []
    for number, state, batch_id, model, rows, at_s in connection.execute(
        "SELECT part, state, batch_id, model, rows, submitted_at FROM parts ORDER BY part"
    ):
        part = ApiPart(number, model, rows=msgspec.convert(decode_json(rows), list[_PartRow]))
        part.state, part.batch_id, part.submitted_at = state, batch_id, at_s
        parts.append(part)
    return parts


def choose_back_end(deadline_s: float | None, estimate: JobEstimate) -> Literal["live", "api"]:
    """The Batch API where a day is time enough, and half the price is less: what costs nothing is asked live."""
    has_time = deadline_s is not None and deadline_s >= _WINDOW_S
    is_cheaper = estimate.cost_usd is not None and estimate.cost_usd > 0
    return "api" if has_time and is_cheaper else "live"


def _part_row(row: JobRow) -> _PartRow:
    mark = row.mark
    return _PartRow(
        row=mark.row,
        digest=mark.digest,
        position=row.position,
        custom_id=row.custom_id,
        line_number=row.line_number,
        was_in_flight=row.was_in_flight,
        tenant="" if row.settings is None else row.settings.tenant,
        doubts=mark.doubts,
    )


def _attempt_of(result: BatchResult, *, model: str, tenant: str) -> tuple[ApiAttempt, str]:
    """A result for the ledger, and the model that has answered. An answer of the wrong form is one, and was charged."""
    error = result.error
    answer = result.result if error is None else error.partial
    call = None if answer is None else answer.call
    status = 200 if call is not None else error.status if isinstance(error, ApiError) else None
    attempt = ApiAttempt(
        model=model,
        tenant=tenant,
        generation_id=call.generation_id if call is not None else error.generation_id if error is not None else None,
        status=status,
        error=type(error).__name__ if call is None else None,
        usage=None if call is None else call.usage,
        maybe_billed=call is None and error is not None and error.maybe_billed,
        ended_at=trio.current_time(),
    )
    return attempt, "" if call is None else call.model or ""


def _may_be(batch: ApiBatch, part: ApiPart) -> bool:
    is_size = batch.request_counts.total == len(part.rows)
    return is_size and batch.model == part.model and _time_of(batch) >= part.submitted_at - _CLOCK_SKEW_S


def _time_of(batch: ApiBatch) -> float:
    return float(batch.created_at) if isinstance(batch.created_at, (int, float)) else 0.0
