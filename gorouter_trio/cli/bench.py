"""`gorouter-trio bench`: how fast models answer, at a number of requests in flight or at a rate.

With a rate, requests begin at their times whatever became of those before, at random distances (a Poisson process),
and are measured from the time at which they were due. A slow answer so counts for everybody behind it, as it does for
real users; a tool that only waits for its own answers does not see them (coordinated omission).
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, cast

import trio
from msgspec import Struct
from rich.table import Table

from ..batch.output import error_code
from ..batch.tally import Quantiles
from ..errors import GorouterError
from ..events import TextDelta
from .failures import FAILED, INTERRUPTED, OK, CliError, report
from .options import on_interrupt, open_chosen_client
from .plot import bar
from .progress import open_progress
from .terminal import format_cost, format_seconds, print_json, printable, show

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..client import Client
    from ..wire.responses import Usage
    from ..wire.result import ChatResult
    from .options import CommonOptions

__all__ = ["BenchJob", "BenchReport", "Spread", "run_bench"]

_MOST_REQUESTS = 1_000_000
_MOST_IN_FLIGHT = 10_000
_BARS = 10
_SHARES = (0.5, 0.9, 0.99)
_TTFT_TITLE = "time to first token"


@dataclass(frozen=True, kw_only=True)
class BenchJob:
    """What to measure. `rate` is requests a second; None keeps `in_flight` of them running all the time."""

    models: Sequence[str]
    requests: int = 100
    in_flight: int = 8
    rate: float | None = None
    warmup: int = 2
    prompt: str = "Explain in one paragraph why the tides differ from day to day."
    max_tokens: int = 200
    stream: bool = True
    temperature: float | None = None

    def check(self) -> None:
        """Raise `CliError` for a number that cannot be meant."""
        for name, value, least, most in (
            ("--requests", self.requests, 1, _MOST_REQUESTS),
            ("--in-flight", self.in_flight, 1, _MOST_IN_FLIGHT),
            ("--warmup", self.warmup, 0, _MOST_REQUESTS),
            ("--max-tokens", self.max_tokens, 1, _MOST_REQUESTS),
        ):
            if not least <= value <= most:
                raise CliError(f"{name} must be from {least:,} to {most:,}, not {value:,}")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise CliError(f"--rate must be a number above 0, not {self.rate}")
        if not self.prompt.strip():
            raise CliError("--prompt is empty")


class Spread(Struct, frozen=True):
    """Median, 90th and 99th percentile, within 1 %; seconds, or tokens a second."""

    p50: float | None
    p90: float | None
    p99: float | None


class BenchReport(Struct, frozen=True, kw_only=True):
    """What one model did. The times are of answers that came; `ttft_s` and `gap_s` where they were streamed.

    `tokens_per_s` is of the text of one answer, from its first token on; `throughput_tokens_per_s` of all together,
    reasoning included. `queued_s` is waiting on this side, for a connection or for a limit. `begun_late` counts
    requests that began more than a tenth of a second after they were due, because this machine did not keep up.
    """

    model: str
    asked: int
    succeeded: int
    failed: int
    errors: dict[str, int]
    elapsed_s: float
    requests_per_s: float
    throughput_tokens_per_s: float
    ttft_s: Spread
    duration_s: Spread
    gap_s: Spread
    tokens_per_s: Spread
    queued_s: Spread
    retries: int
    begun_late: int
    completion_tokens: int
    cost_usd: Decimal | None


class _Times:
    """When the text of a stream came (trio clock)."""

    first_at: float | None = None
    last_at = 0.0
    pieces = 0

    def note(self, now: float) -> None:
        """A piece has come."""
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        self.pieces += 1


class _Measure:
    """What was measured of one model so far."""

    def __init__(self, model: str, requests: int) -> None:
        self.model = model
        self.requests = requests
        self.succeeded = 0
        self.errors: Counter[str] = Counter()
        self.ttft, self.duration, self.gap, self.speed, self.queued = (Quantiles() for _ in range(5))
        self.durations: list[float] = []
        self.first_tokens: list[float] = []
        self.began_at = self.ended_at = 0.0
        self.retries = self.late = self.tokens = self.unpriced = 0
        self.cost = Decimal(0)

    @property
    def done(self) -> int:
        """Requests that have ended."""
        return self.succeeded + self.errors.total()

    @property
    def fraction(self) -> None:
        """The number is known from the start."""
        return

    def facts(self, elapsed_s: float, total: int | None) -> list[str]:
        """Rate, failures, tokens, and the median so far."""
        middle = self.duration.quantile(0.5)
        return [
            printable(self.model),
            f"{self.done / elapsed_s:,.1f} a second",
            f"{self.errors.total():,} failed",
            f"{self.tokens:,} tokens",
            "" if middle is None else f"half within {format_seconds(middle)}",
        ]

    def add(self, result: ChatResult, *, due_at: float, times: _Times) -> None:
        """Count an answer that was due to be asked for at `due_at`."""
        took_s = trio.current_time() - due_at
        usage = result.usage
        tokens = (usage.completion_tokens or 0) if usage is not None else 0
        self.succeeded += 1
        self.tokens += tokens
        self.retries += result.attempts - 1
        self.queued.add(result.call.queue_wait_s)
        self.duration.add(took_s)
        self.durations.append(took_s)
        if result.cost is None:
            self.unpriced += 1
        else:
            self.cost += result.cost
        if times.first_at is not None:
            self._add_times(times, times.first_at - due_at, tokens - _thought(usage))

    def _add_times(self, times: _Times, ttft_s: float, tokens: int) -> None:
        self.ttft.add(ttft_s)
        self.first_tokens.append(ttft_s)
        streaming_s = times.last_at - (times.first_at or 0.0)
        if times.pieces > 1:
            self.gap.add(streaming_s / (times.pieces - 1))
        if tokens > 1 and streaming_s > 0:
            self.speed.add((tokens - 1) / streaming_s)

    def report(self) -> BenchReport:
        """The figures."""
        elapsed = max(self.ended_at - self.began_at, 1e-9)
        return BenchReport(
            model=self.model,
            asked=self.done,
            succeeded=self.succeeded,
            failed=self.errors.total(),
            errors=dict(self.errors.most_common()),
            elapsed_s=elapsed,
            requests_per_s=self.done / elapsed,
            throughput_tokens_per_s=self.tokens / elapsed,
            ttft_s=_spread(self.ttft),
            duration_s=_spread(self.duration),
            gap_s=_spread(self.gap),
            tokens_per_s=_spread(self.speed),
            queued_s=_spread(self.queued),
            retries=self.retries,
            begun_late=self.late,
            completion_tokens=self.tokens,
            cost_usd=self.cost if self.succeeded > self.unpriced else None,
        )


def _thought(usage: Usage | None) -> int:
    """The tokens that were made before the text began."""
    details = usage.completion_tokens_details if usage is not None else None
    return (details.reasoning_tokens or 0) if details is not None else 0


def _spread(quantiles: Quantiles) -> Spread:
    return Spread(*(quantiles.quantile(share) for share in _SHARES))


async def run_bench(job: BenchJob, common: CommonOptions) -> int:
    """Measure one model after the other and print what came out; fails when a request did."""
    job.check()
    measures = [_Measure(model, job.requests) for model in job.models]
    connections = job.in_flight if job.rate is None else min(job.requests, _MOST_IN_FLIGHT)
    with trio.CancelScope() as scope:
        async with open_chosen_client(common, max_connections=connections) as client, on_interrupt(scope.cancel):
            for number, measure in enumerate(measures):
                await _measure(client, job, measure, rng=random.Random(f"{common.seed}/{number}"))
    measured = [measure for measure in measures if measure.done]
    if common.json:
        print_json([measure.report() for measure in measured])
    else:
        _show(measured, is_streamed=job.stream)
    if scope.cancelled_caught:
        report("interrupted")
        return INTERRUPTED
    return FAILED if not measured or any(measure.errors for measure in measured) else OK


async def _measure(client: Client, job: BenchJob, measure: _Measure, *, rng: random.Random) -> None:
    # Connections, and caches of the provider, are warm before anything counts.
    async with trio.open_nursery() as nursery:
        for _ in range(job.warmup):
            nursery.start_soon(_ask, client, job, _Measure(measure.model, job.warmup), trio.current_time())
    measure.began_at = trio.current_time()
    try:
        async with open_progress(measure, total=job.requests, unit="requests"):
            if job.rate is None:
                await _keep_in_flight(client, job, measure)
            else:
                await _begin_at_rate(client, job, measure, rng=rng, rate=job.rate)
    finally:
        measure.ended_at = trio.current_time()


async def _keep_in_flight(client: Client, job: BenchJob, measure: _Measure) -> None:
    tickets = iter(range(job.requests))

    async def work() -> None:
        for _ in tickets:
            await _ask(client, job, measure, trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(min(job.in_flight, job.requests)):
            nursery.start_soon(work)


async def _begin_at_rate(client: Client, job: BenchJob, measure: _Measure, *, rng: random.Random, rate: float) -> None:
    due_at = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(job.requests):
            await trio.sleep_until(due_at)
            measure.late += trio.current_time() - due_at > 0.1
            nursery.start_soon(_ask, client, job, measure, due_at)
            due_at += rng.expovariate(rate)


async def _ask(client: Client, job: BenchJob, measure: _Measure, due_at: float) -> None:
    options: dict[str, object] = {"model": measure.model, "max_tokens": job.max_tokens}
    if job.temperature is not None:
        options["temperature"] = job.temperature
    times = _Times()
    try:
        if job.stream:
            result = await _read_stream(client, job.prompt, options, times)
        else:
            result = await client.chat(job.prompt, **options)  # type: ignore[call-overload]  # checked there
    except GorouterError as exc:
        measure.errors[error_code(exc)] += 1
    else:
        measure.add(result, due_at=due_at, times=times)


async def _read_stream(client: Client, prompt: str, options: dict[str, object], times: _Times) -> ChatResult:
    async with client.stream(prompt, **options) as stream:  # type: ignore[call-overload]  # checked there
        async for event in stream:
            if isinstance(event, TextDelta):
                times.note(trio.current_time())
    return cast("ChatResult", stream.result)


# What people see


def _show(measures: Sequence[_Measure], *, is_streamed: bool) -> None:
    reports = [measure.report() for measure in measures]
    if not reports:
        return
    show(_table(reports, is_streamed=is_streamed))
    for found in reports:
        for line in _notes(found):
            report(f"{printable(found.model)}: {line}")
    if len(measures) == 1:
        (measure,) = measures
        if measure.first_tokens:
            show(_histogram(_TTFT_TITLE, measure.first_tokens))
        if measure.durations:
            show(_histogram("whole answer", measure.durations))


def _table(reports: Sequence[BenchReport], *, is_streamed: bool) -> Table:
    """A column a model, since figures are many and models are few."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    for found in reports:
        table.add_column(printable(found.model), justify="right", overflow="fold")
    rows: list[tuple[str, list[str]]] = [
        ("answered", [f"{r.succeeded:,} of {r.asked:,}" for r in reports]),
        ("requests/s", [f"{r.requests_per_s:,.1f}" for r in reports]),
        ("tokens/s, all", [f"{r.throughput_tokens_per_s:,.0f}" for r in reports]),
        ("tokens/s, one, p50", [_number(r.tokens_per_s.p50) for r in reports]),
        *_spread_rows("first token", [r.ttft_s for r in reports]),
        *_spread_rows("whole answer", [r.duration_s for r in reports]),
        ("between pieces, p50", [format_seconds(r.gap_s.p50) for r in reports]),
        ("queued here, p99", [format_seconds(r.queued_s.p99) for r in reports]),
        ("cost", [format_cost(r.cost_usd) for r in reports]),
        ("cost of 1,000", [format_cost(_of_thousand(r)) for r in reports]),
    ]
    streamed_only = ("first token", "between", "tokens/s, one")
    for name, cells in rows:
        if is_streamed or not name.startswith(streamed_only):
            table.add_row(name, *cells)
    return table


def _spread_rows(name: str, spreads: Sequence[Spread]) -> Iterator[tuple[str, list[str]]]:
    for share in ("p50", "p90", "p99"):
        yield f"{name}, {share}", [format_seconds(getattr(spread, share)) for spread in spreads]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _of_thousand(found: BenchReport) -> Decimal | None:
    return None if found.cost_usd is None else found.cost_usd * 1000 / found.succeeded


def _notes(found: BenchReport) -> Iterator[str]:
    if found.failed:
        kinds = ", ".join(f"{name}: {count:,}" for name, count in found.errors.items())
        yield f"{found.failed:,} failed ({kinds})"
    if found.retries:
        yield f"{found.retries:,} were sent again, which is in their times"
    if found.begun_late:
        yield f"{found.begun_late:,} began late: this machine does not keep up with the rate"


def _histogram(title: str, seconds: Sequence[float]) -> Table:
    """Bars of how many took how long; each stretch is as much longer than the one before."""
    least, most = max(min(seconds), 1e-6), max(*seconds, 1e-6)
    ratio = max((most / least) ** (1 / _BARS), 1.0001)
    counts = [0] * _BARS
    for value in seconds:
        place = int(math.log(max(value, least) / least) / math.log(ratio))
        counts[min(place, _BARS - 1)] += 1
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(no_wrap=True, style="green")
    table.add_column(justify="right", no_wrap=True)
    for place, count in enumerate(counts):
        table.add_row(f"to {format_seconds(least * ratio ** (place + 1))}", bar(count / max(counts)), f"{count:,}")
    return table
