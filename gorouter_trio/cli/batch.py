"""`gorouter-trio batch`: the rows of a file, many at a time."""

from __future__ import annotations

import os
import sys
from contextlib import AsyncExitStack, nullcontext
from decimal import Decimal
from typing import TYPE_CHECKING

import trio
from msgspec import Struct

from ..batch.input import RowSource, open_rows
from ..batch.output import OutputFile, encode_row, open_output
from ..batch.rows import BatchRow, RowProblem
from .failures import FAILED, INTERRUPTED, OK, CliError, report, why
from .options import CommonOptions, on_interrupt, open_chosen_client
from .progress import open_progress
from .tally import Tally
from .terminal import drop_stdout, facts_table, format_cost, format_seconds, print_json, show

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from contextlib import AbstractAsyncContextManager

    from ..batch.runner import Batch, BatchStatistics
    from ..client import Client

__all__ = ["BatchJob", "BatchSummary", "run_batch"]

_STDIN, _STDOUT = 0, 1
_LOOKED_AT = 100


class BatchJob(Struct, frozen=True, kw_only=True):
    """What to run: paths, `-` being stdin or stdout, and how."""

    source: str
    output: str
    max_in_flight: int
    limit: int | None
    overwrite: bool

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise CliError(f"--max-in-flight must be at least 1, not {self.max_in_flight}")
        if self.limit is not None and self.limit < 1:
            raise CliError(f"--limit must be at least 1, not {self.limit}")


class BatchSummary(Struct, frozen=True, kw_only=True):
    """What ran, as `--json` prints it. `cost_usd` is the sum of what the answers said they cost;
    `unpriced_rows` said nothing. `cancelled` were in flight when the batch was interrupted."""

    rows: int
    succeeded: int
    failed: int
    errors: dict[str, int]
    interrupted: bool
    cancelled: int
    duration_s: float
    rows_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Decimal
    unpriced_rows: int
    maybe_billed_rows: int
    retries: int
    connections: int
    output: str


async def run_batch(job: BatchJob, common: CommonOptions) -> int:
    """Run the job and say what came of it; returns the exit code."""
    async with AsyncExitStack() as stack:
        source = await _open_source(job, stack)
        client = await stack.enter_async_context(open_chosen_client(common, max_connections=job.max_in_flight))
        output = await _open_output(job, stack)
        summary = await _run(job, source, client, output)
        await _written(output.sync(), job)
    _show_summary(summary, as_json=common.json, to_stderr=job.output == "-")
    if summary.interrupted:
        report(f"interrupted: {summary.cancelled} requests in flight were cancelled and may be billed")
        return INTERRUPTED
    return FAILED if summary.failed else OK


# Input and output


async def _open_source(job: BatchJob, stack: AsyncExitStack) -> RowSource:
    """The input, looked at: raises `CliError` when it cannot be read, is empty or no JSON at all."""
    name = _name(job.source, "standard input")
    if job.source == "-" and sys.stdin is None:
        raise CliError("standard input is closed")
    try:
        source = await stack.enter_async_context(open_rows(_STDIN if job.source == "-" else job.source))
        problem = await _find_problem(source)
    except OSError as exc:
        raise CliError(f"{name}: {why(exc)}") from exc
    if problem is not None:
        raise CliError(f"{name} {problem}")
    return source


async def _find_problem(source: RowSource) -> str | None:
    """Why a file is no input at all; None as soon as a line is a JSON object."""
    first: BatchRow | RowProblem | None = None
    for count in range(_LOOKED_AT):
        row = await source.peek(count)
        if row is None:
            break
        if isinstance(row, BatchRow) or row.is_json:
            return None
        first = first or row
    return f"is not JSON Lines: {first.message}" if isinstance(first, RowProblem) else "is empty"


async def _open_output(job: BatchJob, stack: AsyncExitStack) -> OutputFile:
    if job.output == "-":
        if sys.stdout is None:
            raise CliError("standard output is closed")
        return await stack.enter_async_context(open_output(_STDOUT))
    try:
        _refuse_same_file(job)
        return await stack.enter_async_context(open_output(job.output, overwrite=job.overwrite))
    except FileExistsError as exc:
        raise CliError(f"{job.output} exists already: give another name, or --overwrite") from exc
    except OSError as exc:
        raise CliError(f"{job.output}: {why(exc)}") from exc


def _refuse_same_file(job: BatchJob) -> None:
    if not os.path.isfile(job.output):
        return
    source = os.fstat(_STDIN) if job.source == "-" else os.stat(job.source)
    if os.path.samestat(source, os.stat(job.output)):
        raise CliError(f"{job.output} is the input as well")


def _name(path: str, dash: str) -> str:
    return dash if path == "-" else path


# The run


class _Limited:
    """The first rows of a source."""

    def __init__(self, source: RowSource, limit: int | None) -> None:
        self._source = source
        self._left = limit

    def __aiter__(self) -> _Limited:
        return self

    async def __anext__(self) -> BatchRow | RowProblem:
        if self._left is not None:
            if not self._left:
                await trio.lowlevel.checkpoint()
                raise StopAsyncIteration
            self._left -= 1
        return await self._source.__anext__()


async def _run(job: BatchJob, source: RowSource, client: Client, output: OutputFile) -> BatchSummary:
    tally = Tally()
    started_at = trio.current_time()
    rows = _Limited(source, job.limit)
    async with client.batch(rows, max_in_flight=job.max_in_flight) as results:
        interrupt = _Interrupt(results)
        async with on_interrupt(interrupt.act), _open_progress(job, tally, results):
            await _collect(job, results, output, tally)
    return _summarise(
        job,
        tally,
        results.statistics(),
        interrupted=interrupt.happened,
        duration_s=trio.current_time() - started_at,
        connections=client.statistics().opened,
    )


def _open_progress(job: BatchJob, tally: Tally, results: Batch) -> AbstractAsyncContextManager[None]:
    if job.output == "-" and sys.stdout.isatty():
        # Rows and a bar on one terminal would be neither.
        return nullcontext()
    return open_progress(tally, results, path=None if job.source == "-" else job.source, limit=job.limit)


class _Interrupt:
    """Ctrl-C: the batch is cancelled, and what had ended is still written."""

    def __init__(self, results: Batch) -> None:
        self._results = results
        self.happened = False

    def act(self) -> None:
        self.happened = True
        self._results.cancel()


async def _collect(job: BatchJob, results: Batch, output: OutputFile, tally: Tally) -> None:
    try:
        async for result in results:
            await _written(output.write(encode_row(result)), job)
            tally.add(result)
    except OSError as exc:
        raise CliError(f"{_name(job.source, 'standard input')}: {why(exc)}", code=FAILED) from exc


async def _written(writing: Awaitable[None], job: BatchJob) -> None:
    try:
        await writing
    except OSError as exc:
        if job.output == "-":
            drop_stdout()
            raise CliError(f"standard output: {why(exc)}", code=FAILED) from exc
        raise CliError(f"{job.output}: {why(exc)}; the rows written before are kept", code=FAILED) from exc


# The summary


def _summarise(
    job: BatchJob,
    tally: Tally,
    statistics: BatchStatistics,
    *,
    interrupted: bool,
    duration_s: float,
    connections: int,
) -> BatchSummary:
    return BatchSummary(
        rows=tally.rows,
        succeeded=tally.succeeded,
        failed=tally.failed,
        errors=dict(tally.errors),
        interrupted=interrupted,
        cancelled=statistics.cancelled,
        duration_s=duration_s,
        rows_per_s=tally.rows / duration_s if duration_s else 0.0,
        latency_p50_s=tally.latencies.quantile(0.5),
        latency_p99_s=tally.latencies.quantile(0.99),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        cost_usd=tally.cost,
        unpriced_rows=tally.unpriced,
        maybe_billed_rows=tally.maybe_billed,
        retries=tally.retries,
        connections=connections,
        output=job.output,
    )


def _show_summary(summary: BatchSummary, *, as_json: bool, to_stderr: bool) -> None:
    if as_json:
        print_json(summary, to_stderr=to_stderr)
    else:
        show(facts_table("Batch", _facts(summary)), to_stderr=to_stderr)


def _facts(s: BatchSummary) -> Iterator[tuple[str, str]]:
    errors = ", ".join(f"{count:,} × {code}" for code, count in s.errors.items())
    yield "rows", f"{s.rows:,}" + (f", {s.cancelled:,} more were cancelled" if s.cancelled else "")
    yield "failed", f"{s.failed:,}" + (f" ({errors})" if errors else "")
    yield "time", f"{format_seconds(s.duration_s)}, {s.rows_per_s:,.1f} rows/s"
    latency = f"p50 {format_seconds(s.latency_p50_s)}, p99 {format_seconds(s.latency_p99_s)}"
    yield "latency", latency if s.succeeded else ""
    yield "tokens", f"{s.prompt_tokens:,} in, {s.completion_tokens:,} out"
    unknown = f", and {s.unpriced_rows:,} rows of unknown cost" if s.unpriced_rows else ""
    yield "cost", format_cost(s.cost_usd) + unknown
    yield "retries", f"{s.retries:,}" if s.retries else ""
    yield "lost answers", f"{s.maybe_billed_rows:,} rows that may be billed" if s.maybe_billed_rows else ""
    yield "connections", f"{s.connections:,}"
    yield "output", s.output if s.output != "-" else ""
