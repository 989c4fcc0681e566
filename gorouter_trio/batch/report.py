"""What came of a job, as people and programs read it."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from msgspec import Struct

from .estimate import JobEstimate

if TYPE_CHECKING:
    from ..pool.statistics import PoolStatistics
    from .job import RunningJob

__all__ = ["JobReport", "find_limit", "make_report"]


class JobReport(Struct, frozen=True, kw_only=True):
    """The sums of a job, as `--json` prints them.

    `rows` and what follows count all runs of the job; `resumed_rows` of them were written by runs before this one.
    `duration_s`, `rows_per_s`, latencies, `retries` and `connections` are of this run. `cost_usd` is the sum of what
    answers said they cost; `unpriced_rows` said nothing. `resent_rows` had been in flight when a run before was cut
    off, `maybe_billed_rows` may have been charged more than once. `cancelled` were in flight when this run was
    cancelled, `released` were taken and not sent. `stopped` is why the run took no more rows, null when it took all.
    """

    job: str
    rows: int
    succeeded: int
    failed: int
    errors: dict[str, int]
    interrupted: bool
    stopped: str | None
    can_resume: bool
    resumed_rows: int
    resent_rows: int
    cached_rows: int
    cancelled: int
    released: int
    duration_s: float
    rows_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    prompt_tokens: int
    completion_tokens: int
    cost_usd: Decimal
    budget_usd: Decimal | None
    unpriced_rows: int
    maybe_billed_rows: int
    retries: int
    connections: int
    output: str
    estimate: JobEstimate | None = None


def make_report(running: RunningJob, *, output: str, duration_s: float, connections: int) -> JobReport:
    """The report of a job that has ended, or as it stands."""
    tally, stopped = running.tally, running.stopping
    rows = tally.rows - running.earlier_rows
    return JobReport(
        job=running.name,
        rows=tally.rows,
        succeeded=tally.succeeded,
        failed=tally.failed,
        errors=dict(tally.errors),
        interrupted=stopped == "interrupted",
        stopped=stopped,
        can_resume=running.has_journal,
        resumed_rows=running.earlier_rows,
        resent_rows=running.resent,
        cached_rows=tally.cached,
        cancelled=running.cancelled,
        released=running.released,
        duration_s=duration_s,
        rows_per_s=rows / duration_s if duration_s else 0.0,
        latency_p50_s=tally.latencies.quantile(0.5),
        latency_p99_s=tally.latencies.quantile(0.99),
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        cost_usd=tally.cost,
        budget_usd=running.job.most_usd,
        unpriced_rows=tally.unpriced,
        maybe_billed_rows=tally.maybe_billed,
        retries=tally.retries,
        connections=connections,
        output=output,
        estimate=running.estimate,
    )


def find_limit(pool: PoolStatistics) -> str:
    """What holds requests back now, in a few words; empty when nothing does."""
    for key in pool.keys:
        if key.state != "ready":
            return f"key {key.name} ({key.state} for {key.ready_in_s:,.0f} s)"
    held = [model for model in pool.models if model.held_by]
    if held:
        model = held[0]
        pause = f" for {model.paused_s:,.0f} s" if model.paused_s else ""
        return f"{model.held_by}{pause}, {model.limit:,} at a time"
    if pool.queued and pool.in_flight >= pool.workers:
        return f"{pool.workers:,} connections"
    return ""
