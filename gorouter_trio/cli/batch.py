"""`gorouter-trio batch`: the rows of a file, many at a time, within a budget, and on from where it was cut off."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import AsyncExitStack, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import trio

from ..batch.input import find_format
from ..batch.report import JobReport, make_report
from ..batch.resume import refuse_own_file
from ..errors import BadRequestError, DecodeError, StoreError
from ..wire.codec import encode_json
from .failures import FAILED, INTERRUPTED, OK, CliError, report, why
from .options import CommonOptions, on_interrupt, open_chosen_client
from .progress import JobView, open_progress
from .terminal import clean, drop_stdout, facts_table, format_cost, format_seconds, print_json, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from ..batch.estimate import JobEstimate
    from ..batch.job import RunningJob
    from ..batch.settings import BatchJob
    from ..client import Client

__all__ = ["STOPPED", "BatchCommand", "run_batch", "show_estimate"]

_STDIN, _STDOUT = 0, 1
STOPPED: Mapping[str, str] = {
    "interrupted": "interrupted",
    "budget": "the budget does not cover another row",
    "credits": "the account's credits do not cover another row",
    "key": "the API refuses the key",
    "deadline": "the deadline has passed",
    "failures": "too many rows have failed",
}


class BatchCommand(NamedTuple):
    """What to run, what holds for every row, and where the report goes."""

    job: BatchJob
    options: Mapping[str, object]
    system: str | None = None
    report: str | None = None
    dry: bool = False


async def run_batch(command: BatchCommand, common: CommonOptions) -> int:
    """Run the job and say what came of it; returns the exit code."""
    job = command.job
    _check_streams(job)
    if command.report is not None and not command.dry:
        _check_report(command.report, job)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            open_chosen_client(common, max_connections=job.max_in_flight, system=command.system, has_prices=True)
        )
        if command.dry:
            return await show_estimate(client, command, as_json=common.json)
        running = await _open(client, command, stack)
        started_at = trio.current_time()
        interrupt = _Interrupt(running)
        async with on_interrupt(interrupt.act, interrupt.act_again), _open_progress(running, client):
            await _run(running, job)
        done = make_report(
            running,
            output=clean(str(job.output)) if job.output != _STDOUT else "-",
            duration_s=trio.current_time() - started_at,
            connections=client.statistics().opened,
        )
    return _conclude(done, command, common)


async def show_estimate(client: Client, command: BatchCommand, *, as_json: bool) -> int:
    """Say what the job will come to, and send nothing; returns the exit code."""
    try:
        estimate = await client.estimate_job(command.job, **command.options)  # type: ignore[arg-type]  # checked by the encoder
    except BadRequestError as exc:
        raise CliError(exc.message) from exc
    except (OSError, DecodeError) as exc:
        raise CliError(_about_file(exc, command.job)) from exc
    if as_json:
        print_json(estimate)
    else:
        show(facts_table("Estimate", _estimate_facts(estimate)))
    return OK


def _estimate_facts(e: JobEstimate) -> Iterator[tuple[str, str]]:
    yield "rows", (f"about {e.rows:,}" if e.rows is not None else "unknown") + f", by {e.sampled_rows:,} of them"
    yield "unusable", f"about {e.problem_rows:,}" if e.problem_rows else ""
    yield "models", ", ".join(e.models)
    most = "" if e.most_completion_tokens is None else f" (at most {e.most_completion_tokens:,})"
    yield "tokens", f"about {e.prompt_tokens:,} in, {e.completion_tokens:,}{most} out"
    bound = "" if e.most_cost_usd is None else f", at most {format_cost(e.most_cost_usd)}"
    unpriced = f": no price of {', '.join(e.unpriced_models)}" if e.unpriced_models else ""
    yield "cost", ("about " if e.cost_usd is not None else "") + format_cost(e.cost_usd) + bound + unpriced


def _conclude(done: JobReport, command: BatchCommand, common: CommonOptions) -> int:
    is_written = command.report is None or _write_report(done, command.report)
    to_stderr = command.job.output == _STDOUT
    if common.json:
        print_json(done, to_stderr=to_stderr)
    else:
        show(facts_table("Batch", _facts(done)), to_stderr=to_stderr)
    if done.stopped is not None:
        report(_last_words(done))
    if done.interrupted:
        return INTERRUPTED
    return FAILED if done.failed or done.stopped is not None or not is_written else OK


def _last_words(done: JobReport) -> str:
    words = STOPPED[done.stopped or "interrupted"]
    if done.cancelled:
        words += f": {done.cancelled} requests in flight were cancelled and may be billed"
    return words + ("; --resume goes on" if done.can_resume else "")


def _check_report(path: str, job: BatchJob) -> None:
    """Raises `CliError` for a report that would destroy a file of the job, or that cannot be written."""
    refuse_own_file(job, path, name="report")
    if job.cache is not None and os.path.realpath(path) == os.path.realpath(job.cache):
        raise CliError(f"{path} is the cache as well")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        # Whoever reads a pipe would take an opening for all that there is.
        return
    try:
        with open(path, "ab"):
            pass
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc


def _write_report(done: JobReport, path: str) -> bool:
    """Whether that worked."""
    try:
        with open(path, "wb") as file:
            file.write(encode_json(done) + b"\n")
    except OSError as exc:
        report(f"{path}: {why(exc)}; the report was not written")
        return False
    return True


# Input and output


def _check_streams(job: BatchJob) -> None:
    if job.source == _STDIN and sys.stdin is None:
        raise CliError("standard input is closed")
    if job.output == _STDOUT and sys.stdout is None:
        raise CliError("standard output is closed")


def _is_file(source: str | int) -> bool:
    return stat.S_ISREG(os.stat(source).st_mode)


async def _open(client: Client, command: BatchCommand, stack: AsyncExitStack) -> RunningJob:
    """The job, with the first rows of its input looked at.

    Raises `CliError` when that cannot be read, is empty or no JSON at all.
    """
    job = command.job
    try:
        running = await stack.enter_async_context(client.batch_job(job, **command.options))  # type: ignore[arg-type]  # checked by the encoder
        if _is_file(job.source_path):
            # Of a pipe, a thousand rows may take for ever to come.
            await running.look_ahead()
    except FileExistsError as exc:
        if exc.filename != job.output:
            raise CliError(f"{exc.filename} {exc.strerror}: --overwrite begins again") from exc
        raise CliError(f"{job.output} exists already: give another name, --resume, or --overwrite") from exc
    except BadRequestError as exc:
        raise CliError(exc.message) from exc
    except (OSError, DecodeError) as exc:
        raise CliError(_about_file(exc, job)) from exc
    return running


def _about_file(exc: OSError | DecodeError, job: BatchJob) -> str:
    """Which of the files an error is about, and what it is."""
    if isinstance(exc, DecodeError):
        return f"{_name(job.source_path)}: {exc.message}"
    return f"{exc.filename or _name(job.source_path)}: {why(exc)}"


def _name(path: str | int) -> str:
    return path if isinstance(path, str) else "standard input"


# The run


class _Interrupt:
    """Ctrl-C: once, and no more rows are taken; twice, and what is in flight is cancelled."""

    def __init__(self, running: RunningJob) -> None:
        self._running = running

    def act(self) -> None:
        """Drain."""
        self._running.drain()
        in_flight = self._running.progress().in_flight
        report(f"no more rows; {in_flight} in flight come to their end (Ctrl-C again cancels them)")

    def act_again(self) -> None:
        """Cancel."""
        self._running.cancel()


async def _run(running: RunningJob, job: BatchJob) -> None:
    try:
        await running.run()
    except StoreError as exc:
        raise CliError(f"{exc.message}; the rows written before are kept", code=FAILED) from exc
    except DecodeError as exc:
        raise CliError(f"{_name(job.source_path)}: {exc.message}; the rows before it are kept", code=FAILED) from exc
    except OSError as exc:
        if not running.has_failed_to_write:
            raise CliError(f"{_name(job.source_path)}: {why(exc)}", code=FAILED) from exc
        if job.output == _STDOUT:
            drop_stdout()
            raise CliError(f"standard output: {why(exc)}", code=FAILED) from exc
        raise CliError(f"{job.output}: {why(exc)}; the rows written before are kept", code=FAILED) from exc


def _open_progress(running: RunningJob, client: Client) -> AbstractAsyncContextManager[None]:
    job = running.job
    if job.output == _STDOUT and sys.stdout.isatty():
        # Rows and a bar on one terminal would be neither.
        return nullcontext()
    counted = isinstance(job.source, str) and find_format(job.source, job.input_format) == "jsonl"
    path = job.source if counted and isinstance(job.source, str) else None
    return open_progress(JobView(running, client), path=path, limit=job.limit)


# The report


def _facts(s: JobReport) -> Iterator[tuple[str, str]]:
    errors = ", ".join(f"{count:,} × {code}" for code, count in s.errors.items())
    resumed = f", {s.resumed_rows:,} of them before" if s.resumed_rows else ""
    yield "rows", f"{s.rows:,}{resumed}" + (f", {s.cancelled:,} more were cancelled" if s.cancelled else "")
    yield "failed", f"{s.failed:,}" + (f" ({errors})" if errors else "")
    yield "time", f"{format_seconds(s.duration_s)}, {s.rows_per_s:,.1f} rows/s"
    latency = f"p50 {format_seconds(s.latency_p50_s)}, p99 {format_seconds(s.latency_p99_s)}"
    yield "latency", latency if s.latency_p50_s is not None else ""
    yield "tokens", f"{s.prompt_tokens:,} in, {s.completion_tokens:,} out"
    unknown = f", and {s.unpriced_rows:,} rows of unknown cost" if s.unpriced_rows else ""
    budget = f" of {format_cost(s.budget_usd)}" if s.budget_usd is not None else ""
    yield "cost", format_cost(s.cost_usd) + budget + unknown
    yield "from cache", f"{s.cached_rows:,} rows" if s.cached_rows else ""
    yield "retries", f"{s.retries:,}" if s.retries else ""
    yield "sent again", f"{s.resent_rows:,} rows that were in flight before" if s.resent_rows else ""
    yield "lost answers", f"{s.maybe_billed_rows:,} rows that may be billed" if s.maybe_billed_rows else ""
    yield "connections", f"{s.connections:,}"
    yield "output", s.output if s.output != "-" else ""
