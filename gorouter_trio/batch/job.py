"""A batch job: rows of a file in, their lines in another out, within a budget, and on from where it was cut off.

Theory of operation. As in `runner`, a fixed number of tasks pull rows, and what they share decides without waiting.
A puller marks its row in the journal, sends it, and hands its line to the recorder; it takes no other row before that
line is durable. So a kill meets at most as many rows as there are pullers: they are sent again by the run that takes
the job up, with `maybe_billed` in their lines.

A job that is taken up reads its input from the start. Rows that the journal knows are compared by their digests, and
those that still have to be run are held back until all of them were seen to be as they were: nothing is sent for a job
whose input has changed.
"""

from __future__ import annotations

from collections import deque
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, cast

import msgspec
import trio
from msgspec import Struct

from .._contain import lone_error
from ..errors import (
    BadRequestError,
    BudgetExceededError,
    ConfigError,
    GorouterError,
    UnpriceableRequestError,
)
from .api import ApiPart, ApiRun, ApiServices, choose_back_end, load_parts
from .cache import AnswerCache, FileAnswers, MemoryAnswers, answers_file
from .estimate import JobEstimate, Pricer, estimate_rows
from .input import LimitedRows, RowSource, open_rows
from .jobrow import JobRow
from .journal import DONE, SENT, UNKNOWN, Recorder, RowMark
from .order import OrderWindow
from .output import encode_row
from .resume import JobFiles, journal_path, open_files, refuse_own_file
from .runner import BatchResult, Intake, encode_row_request, names_of
from .settings import StopReason, stop_reason
from .template import Template

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from decimal import Decimal

    from ..wire.mail import CallSettings
    from .runner import BatchRequest, EncodeRequest, RunRequest
    from .settings import BatchJob

__all__ = [
    "JobBudget",
    "JobProgress",
    "JobServices",
    "RunningJob",
    "estimate_job",
    "open_job",
]


_CLOSE_S = 30.0


class JobBudget(Protocol):
    """What a job may spend."""

    def open_batch(self, name: str, *, usd: Decimal | None, spent_usd: Decimal = ...) -> bool:
        """Bound the requests of the batch `name`, of which so much was spent before; again, by another amount.

        Whoever gives the budget may bound a batch by less, or where `usd` is None; returns whether there is a bound.
        """

    def forget_batch(self, name: str) -> None:
        """Close the batch's account, unless something is held there still, or other processes share it."""

    async def assume_spent(self, body: bytes, settings: CallSettings) -> None:
        """A request may have been billed in a run before: count the most that it can have cost as spent.

        Raises `BudgetExceededError` where the budget does not cover that, `UnpriceableRequestError` where nobody
        knows what that is.
        """


class JobServices(NamedTuple):
    """What a job needs of a client: how a row becomes a request, how that is run, and who bounds its cost.

    `run_for` takes the answers that are there already, `encode_for` the name of the batch. `settings` are those of the
    client that change what is sent, by name.
    """

    encode_for: Callable[[str], EncodeRequest]
    run_for: Callable[[AnswerCache | None], RunRequest]
    budget: JobBudget
    pricer: Pricer
    api: ApiServices
    settings: Mapping[str, object]
    new_id: Callable[[], str]


class JobProgress(Struct, frozen=True, kw_only=True):
    """A look at a running job. `rows` were written, `earlier_rows` of them by runs before; `fraction` is the part of
    the input that was read, None where its size is unknown."""

    rows: int
    earlier_rows: int
    in_flight: int
    taken: int
    fraction: float | None
    stopping: StopReason | None


class RunningJob:
    """A job that is open: `run` it once. Made by `open_job`."""

    def __init__(
        self,
        job: BatchJob,
        services: JobServices,
        *,
        source: RowSource,
        files: JobFiles,
        parts: list[ApiPart],
        answers: AnswerCache | None = None,
        is_bounded: bool = False,
    ) -> None:
        self.job = job
        self._is_bounded = is_bounded
        self.name = files.name
        self.tally = files.tally
        self.earlier_rows = files.tally.rows
        self.resent = self.cancelled = self.released = 0
        self.stopping: StopReason | None = None
        self.estimate: JobEstimate | None = None
        self.stopped = trio.Event()
        self._services = services
        self._run_request = services.run_for(answers)
        self._encode = services.encode_for(files.name)
        self._files = files
        self._state = files.state
        self._source = source
        self._intake = Intake(LimitedRows(source, job.limit))
        self._refusal: ConfigError | None = None
        self._held: deque[JobRow] = deque()
        self._known = sum(state != UNKNOWN for state in files.state.states)
        self._checked = 0
        self._has_compared = False
        self._comparing = trio.Lock()
        self._in_flight = 0
        self._failed_before = files.tally.failed
        # A job that runs rows anew among others cannot append in order: its output is sorted at the end.
        is_windowed = job.ordered and not files.was_reopened
        self._window = OrderWindow[tuple[int, bytes]](job.window) if is_windowed else None
        self._scope = trio.CancelScope()
        self.via: Literal["live", "api"] = "live"
        self.api = ApiRun(self, services.api, parts=parts, journal=files.journal)
        self.recorder = Recorder(files.output, files.journal, on_failure=self._scope.cancel)

    def __repr__(self) -> str:
        return f"<RunningJob {self.name}: {self.tally.rows} rows, {self._in_flight} in flight>"

    @property
    def has_journal(self) -> bool:
        """Whether the job can go on after it was stopped."""
        return self._files.journal is not None

    @property
    def has_failed_to_write(self) -> bool:
        """Whether it was the output or the journal that ended the run."""
        return self.recorder.error is not None

    def is_done(self, row: int) -> bool:
        """Whether a run before has written the row."""
        return self._state.state(row) == DONE

    def progress(self) -> JobProgress:
        """A snapshot; cheap."""
        return JobProgress(
            rows=self.tally.rows,
            earlier_rows=self.earlier_rows,
            in_flight=self._in_flight,
            taken=self._intake.taken,
            fraction=self._source.fraction,
            stopping=self.stopping,
        )

    async def choose_back_end(self) -> None:
        """Decide what `via` comes to."""
        self.via = "api" if self.job.via == "api" else "live"
        if self.job.via == "auto" and _why_not_by_api(self.job, self._services) is None:
            # At the price of the list, which says whether there is anything to save.
            estimate = await self.look_ahead(sample=100)
            self.via = choose_back_end(self.job.deadline_s, estimate)
            self.estimate = estimate.by_api() if self.via == "api" else estimate

    async def look_ahead(self, *, sample: int = 1_000) -> JobEstimate:
        """What the job will come to by its first rows, kept in `estimate`; before it is run."""
        estimate = await estimate_rows(
            self._source, self._encode, pricer=self._services.pricer, sample=sample, limit=self.job.limit
        )
        self.estimate = estimate.by_api() if self.via == "api" else estimate
        return self.estimate

    def drain(self, reason: StopReason = "interrupted") -> None:
        """Take no more rows; those in flight come to their end. The job can go on later. Never waits."""
        if self.stopping is None:
            self.stopping = reason
            self.stopped.set()
            if self._window is not None:
                # The row that they wait for may be put back, as they will be.
                self._window.open()

    def cancel(self) -> None:
        """Cancel what is in flight as well, which may be billed. The job can go on later. Never waits."""
        self.drain()
        self._scope.cancel()

    async def run(self) -> None:
        """Run every row that has no answer yet.

        Raises `OSError` and `StoreError` when output or journal cannot be written, what reading the input raises, and
        `ConfigError` when the input is not the one that the job began with. Cancelling is as a kill: the job can go on.
        """
        try:
            await self._run()
        except BaseExceptionGroup as group:
            lone = lone_error(group, None)
            raise lone from lone.__cause__
        self._raise_failure()
        if self.job.ordered:
            await self._files.sort()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.recorder.run)
            if self.job.deadline_s is not None:
                nursery.start_soon(self._watch_deadline, trio.current_time() + self.job.deadline_s)
            with self._scope:
                await self._run_back_ends()
            self._emit_stranded()
            self.recorder.close()
            await self.recorder.ended.wait()
            nursery.cancel_scope.cancel()

    def _emit_stranded(self) -> None:
        """Answers that wait for others which do not come in this run: they are paid for, and only a journal keeps them.

        Afterwards they are in the output, in order but for what is missing.
        """
        if self._window is not None and not self.has_journal:
            self.recorder.emit([line for _row, line in self._window.drain()], unparked=())

    async def _run_back_ends(self) -> None:
        async with trio.open_nursery() as nursery:
            # What an earlier run has handed in is collected in any case.
            nursery.start_soon(self.api.run)
            if self.via == "live":
                for _ in range(self.job.max_in_flight):
                    nursery.start_soon(self._pull)

    def _raise_failure(self) -> None:
        error = self.recorder.error or self._refusal or self._intake.error
        if error is not None:
            raise error from error.__cause__

    async def _watch_deadline(self, deadline: float) -> None:
        await trio.sleep_until(deadline)
        self.drain("deadline")

    async def _pull(self) -> None:
        while self.stopping is None and (row := await self.next_row()) is not None:
            self._in_flight += 1
            try:
                await self._run_row(row)
            finally:
                self._in_flight -= 1

    # Which row comes next

    async def next_row(self) -> JobRow | None:
        """The next row that has to be run."""
        # One task at a time: whether all rows were there cannot be said while another is in the midst of one.
        if not self._has_compared:
            async with self._comparing:
                await self._compare()
        if self._refusal is not None:
            return None
        if self._held:
            return self._held.popleft()
        taken = await self._intake.take()
        return None if taken is None else self._prepare(*taken)

    async def _compare(self) -> None:
        """Pass by the rows that the journal knows, and see whether all of them are there."""
        while not self._has_compared:
            taken = await self._intake.take() if self._checked < self._known else None
            row = None if taken is None else self._prepare(*taken)
            if row is not None and row.mark.row < self._state.rows:
                await self._pass_by(row)
            else:
                self._refuse_lost(is_behind=row is not None)
                self._has_compared = True

    async def _pass_by(self, row: JobRow) -> None:
        """A row that the journal knows: see whether it is the same, and hold it back where it has to be run."""
        number = row.mark.row
        state = self._state.state(number)
        if state == UNKNOWN or self._state.digests[number] != row.mark.digest:
            name = "" if row.custom_id is None else f" (id {row.custom_id!r})"
            self._refuse(f"line {number} is another{name}; give the same input, or begin again")
            self._has_compared = True
            return
        doubts = self._state.unknown_sends(number)
        if number in self.api.rows:
            # It is with the Batch API, which will tell.
            doubts -= 1
        elif state != DONE:
            self.resent += state == SENT
            mark = msgspec.structs.replace(row.mark, doubts=doubts)
            self._held.append(msgspec.structs.replace(row, mark=mark, was_in_flight=doubts > 0))
        elif ready := self._restored(row):
            self.recorder.emit([line for _row, line in ready], unparked=[row for row, _line in ready])
        await self._assume_spent(row, doubts)
        self._checked += 1

    def _refuse_lost(self, *, is_behind: bool) -> None:
        """Refuse an input that has ended, or come to a row behind those that the journal knows, without all of them."""
        is_cut = self._intake.error is not None or (self.job.limit is not None and self._intake.taken >= self.job.limit)
        if self._checked < self._known and (is_behind or not is_cut):
            lost = self._known - self._checked
            self._refuse(f"{lost} of the {self._known} rows that were run are not in it any more")

    def _refuse(self, reason: str) -> None:
        if self._refusal is None:
            self._refusal = ConfigError(f"the input is not the one that the job began with: {reason}")

    def _restored(self, row: JobRow) -> list[tuple[int, bytes]]:
        """Lines that were parked and can get into the output, now that this row was passed."""
        line = self._state.parked.pop(row.mark.row, None)
        if self._window is None:
            return [] if line is None else [(row.mark.row, line)]
        return self._window.put(row.position, None if line is None else (row.mark.row, line))

    def _prepare(self, index: int, request: BatchRequest) -> JobRow:
        custom_id, line_number = names_of(request, index)
        number = index if line_number is None else line_number
        body, settings, error = b"", None, None
        try:
            body, settings = encode_row_request(request, self._encode)
        except BadRequestError as exc:
            error = exc
        digest = blake2b(body or str(error).encode(), digest_size=8, key=(custom_id or "").encode()[:64]).digest()
        mark = RowMark(number, int.from_bytes(digest, "little", signed=True))
        return JobRow(index, custom_id, line_number, mark, body, settings, error)

    async def _assume_spent(self, row: JobRow, times: int) -> None:
        """Before anything is sent, what was sent without anybody knowing what became of it counts as paid for."""
        if not self._is_bounded or row.settings is None:
            return
        for _ in range(times):
            try:
                await self._services.budget.assume_spent(row.body, row.settings)
            except BudgetExceededError:
                self.drain("budget")
                return
            except UnpriceableRequestError:
                # There is nothing to count, and no reason to stop others: run again, the row itself fails with this.
                return

    # One row

    async def _run_row(self, row: JobRow) -> None:
        if self._window is not None:
            await self._window.wait_room(row.position)
        try:
            await self.recorder.begin(row.mark)
            if row.error is not None:
                await self.record(row, self.failed(msgspec.structs.replace(row, was_in_flight=False), row.error))
                return
            if self.stopping is not None:
                self.put_back(row)
                return
            result = await self._send(row)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if result is not None:
            await self.record(row, result)

    async def _send(self, row: JobRow) -> BatchResult | None:
        """The result of a row; None for one that was not charged, and is left for a later run."""
        try:
            result, reply = await self._run_request(row.body, cast("CallSettings", row.settings))
        except GorouterError as exc:
            reason = stop_reason(exc)
            if reason is None:
                return self.failed(row, exc)
            self.drain(reason)
            self.put_back(row)
            return None
        return BatchResult(
            custom_id=row.custom_id,
            index=row.position,
            result=result,
            body=reply,
            line_number=row.line_number,
            was_in_flight=row.was_in_flight,
            cached=result.attempts == 0,
        )

    def put_back(self, row: JobRow) -> None:
        """The row was not sent: a later run does that. One that was in flight before stays in doubt."""
        self.released += 1
        self.recorder.release(row.mark)

    def failed(self, row: JobRow, error: GorouterError) -> BatchResult:
        """The result of a row that has none but an error."""
        return BatchResult(
            custom_id=row.custom_id,
            index=row.position,
            error=error,
            line_number=row.line_number,
            was_in_flight=row.was_in_flight,
        )

    async def record(self, row: JobRow, result: BatchResult) -> None:
        """Write what came of a row; returns when that is durable."""
        await self.record_result(row.mark, result, position=row.position)

    async def record_result(self, mark: RowMark, result: BatchResult, *, position: int) -> None:
        """The same for a row by its mark and its place in the input."""
        line = encode_row(result)
        self.tally.add(result)
        if (outcome := result.error or result.result) is not None and outcome.maybe_billed:
            mark = msgspec.structs.replace(mark, doubts=mark.doubts + 1)
        if self._window is None:
            await self.recorder.finish(mark, [line])
        elif ready := self._window.put(position, (mark.row, line)):
            unparked = [other for other, _line in ready if other != mark.row]
            await self.recorder.finish(mark, [text for _row, text in ready], unparked=unparked)
        else:
            await self.recorder.park(mark, line)
        most = self.job.max_failures
        if most is not None and self.tally.failed - self._failed_before >= most:
            self.drain("failures")


async def estimate_job(job: BatchJob, services: JobServices, *, sample: int = 1_000) -> JobEstimate:
    """What a job will come to, with nothing sent and nothing written; raises as `open_job` for its input."""
    template = None if job.template is None else Template(job.template)
    async with (
        open_rows(
            job.source_path, input_format=job.input_format, template=template, duplicates=job.duplicates
        ) as source,
        _checked(source, job),
    ):
        estimate = await estimate_rows(
            source, services.encode_for(""), pricer=services.pricer, sample=sample, limit=job.limit
        )
    via = job.via
    if via == "auto" and _why_not_by_api(job, services) is None:
        via = choose_back_end(job.deadline_s, estimate)
    return estimate.by_api() if via == "api" else estimate


@asynccontextmanager
async def open_job(job: BatchJob, services: JobServices) -> AsyncIterator[RunningJob]:
    """Open the input, the output and the journal of a job, and bring them to where it can go on.

    Raises `ConfigError` for settings or files that do not belong together, with what is different; the errors of
    `open_rows`, `open_files` and the `StoreError`s of journal and cache. Leaving closes everything; it is
    `RunningJob.run` that runs the job.
    """
    if job.via == "api" and (reason := _why_not_by_api(job, services)) is not None:
        raise ConfigError(f"via: the Batch API {reason}")
    template = None if job.template is None else Template(job.template)
    async with (
        open_rows(
            job.source_path, input_format=job.input_format, template=template, duplicates=job.duplicates
        ) as source,
        _checked(source, job),
        _open_answers(job) as answers,
        open_files(job, settings={**job.settings(), **services.settings}, new_id=services.new_id) as files,
    ):
        # Where a run before was this client's as well, its account has what is counted anew here.
        services.budget.forget_batch(files.name)
        is_bounded = services.budget.open_batch(files.name, usd=job.most_usd, spent_usd=files.spent_usd())
        parts = [] if files.journal is None else await load_parts(files.journal)
        running = RunningJob(
            job, services, source=source, files=files, parts=parts, answers=answers, is_bounded=is_bounded
        )
        await running.api.take_stock()
        await running.choose_back_end()
        yield running


@asynccontextmanager
async def _open_answers(job: BatchJob) -> AsyncIterator[AnswerCache | None]:
    """The answers that are there already; None where nobody wants them."""
    if job.cache_path is None:
        yield AnswerCache(MemoryAnswers()) if job.dedup else None
        return
    refuse_own_file(job, job.cache_path, name="cache")
    file = answers_file(job.cache_path)
    try:
        answers = FileAnswers(file)
        # A file that cannot be used is found out before an output is made, and not by every row.
        await answers.get(b"")
        yield AnswerCache(answers)
    finally:
        with trio.move_on_after(_CLOSE_S, shield=True):
            await file.aclose()


def _why_not_by_api(job: BatchJob, services: JobServices) -> str | None:
    if job.dedup or job.cache is not None:
        return "asks nobody before; leave dedup and cache away, or send the rows live"
    return "needs a journal" if journal_path(job) is None else services.api.refusal


@asynccontextmanager
async def _checked(source: RowSource, job: BatchJob) -> AsyncIterator[None]:
    """An input that is none is refused before an output is made or emptied."""
    try:
        await source.check()
    except ConfigError as exc:
        name = job.source if isinstance(job.source, str) else "standard input"
        raise ConfigError(
            f"{name} {exc.message}" if exc.message.startswith("is ") else f"{name}: {exc.message}"
        ) from exc
    yield
