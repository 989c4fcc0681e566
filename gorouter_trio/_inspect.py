"""What a running client is doing: a tree of values, and numbers for Prometheus. Nothing is kept for either.

What is asked for is read off the parts when it is asked for, in one step: a snapshot is of one moment.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import trio
from msgspec import Struct

from ._prometheus import MetricFamily, Sample
from .pool.budget import BudgetStatistics
from .pool.ledger import LedgerStatistics
from .pool.prices import PriceStatistics
from .pool.statistics import PoolStatistics, WorkerStatistics
from .session.actor import SessionStatistics
from .tools.statistics import ToolCallStatistics, ToolStatistics

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ._runtime import Runtime

__all__ = ["ClientSnapshot", "SessionSnapshot", "families", "inspect_runtime"]


class SessionSnapshot(Struct, frozen=True, kw_only=True):
    """A session that is active, under its key: its `statistics` say what it waits for, and for how long."""

    key: str
    statistics: SessionStatistics


class ClientSnapshot(Struct, frozen=True, kw_only=True):
    """The tree of tasks of a client at one moment; `msgspec.json.encode` writes it.

    `at_s` is in wall-clock seconds since the epoch. `sessions` are those that are active, the one that has waited
    longest for something else than mail first, at most as many as were asked for, of `active_sessions`.
    `leaving_sessions` finish what they were asked before the store was changed. `workers` are the tasks of the pool,
    each with its connection, `tool_calls` those that run or wait for a place. Tasks that observe, listen and serve
    plugins are told by their numbers.
    """

    at_s: float
    model: str
    active_sessions: int
    leaving_sessions: int
    sessions: tuple[SessionSnapshot, ...]
    pool: PoolStatistics
    workers: tuple[WorkerStatistics, ...]
    tools: ToolStatistics
    tool_calls: tuple[ToolCallStatistics, ...]
    plugins: tuple[str, ...]
    observers: int
    listeners: int
    dropped_events: int
    budget: BudgetStatistics
    ledger: LedgerStatistics
    prices: PriceStatistics


def inspect_runtime(runtime: Runtime, *, sessions: int) -> ClientSnapshot:
    """What `runtime` is doing now, with at most so many sessions."""
    found = sorted(runtime.sessions.inspect().items(), key=_waits_longest)
    accounting, bus = runtime.accounting, runtime.bus
    return ClientSnapshot(
        at_s=runtime.config.seams.wall(),
        model=runtime.config.model,
        active_sessions=runtime.sessions.active,
        leaving_sessions=runtime.sessions.leaving,
        sessions=tuple(SessionSnapshot(key=key, statistics=each) for key, each in itertools.islice(found, sessions)),
        pool=runtime.pool.statistics(),
        workers=runtime.pool.inspect(),
        tools=runtime.tools.statistics(),
        tool_calls=runtime.tools.inspect(trio.current_time()),
        plugins=runtime.plugins.names,
        observers=len(runtime.chain.ended.observers) + len(accounting.ledger.changes.observers),
        listeners=bus.listening,
        dropped_events=bus.dropped,
        budget=accounting.gate.book.statistics(),
        ledger=accounting.ledger.statistics(),
        prices=accounting.prices.statistics(),
    )


def _waits_longest(item: tuple[str, SessionStatistics]) -> tuple[bool, float]:
    statistics = item[1]
    return statistics.waits_for == "mail", -statistics.since_s


# For Prometheus


def families(runtime: Runtime) -> Iterator[MetricFamily]:
    """What the parts of a runtime count and have, each a family."""
    yield from _of_pool(runtime.pool.statistics())
    tools, ledger = runtime.tools.statistics(), runtime.accounting.ledger.statistics()
    yield _gauge("sessions_active", "Sessions that are in memory.", runtime.sessions.active)
    yield _gauge("tools_running", "Tool calls that have begun and not ended.", tools.running)
    yield _counter("tool_runs_total", "Tool calls that were settled.", tools.calls)
    yield _counter("tool_runs_failed_total", "Tool calls that were settled without success.", tools.failures)
    yield _counter("events_dropped_total", "Events that listeners were too slow for.", runtime.bus.dropped)
    yield _gauge("ledger_reconciling", "Attempts whose cost the API is still asked about.", ledger.reconciling)
    yield _counter("ledger_unreconciled_total", "Attempts whose cost was not found.", ledger.unreconciled)
    yield from _of_costs(runtime)


def _of_pool(pool: PoolStatistics) -> Iterator[MetricFamily]:
    lanes, models, keys = pool.lanes, pool.models, pool.keys
    yield _family("requests_queued", "gauge", "Requests in the queue.", ((("lane", e.name), e.queued) for e in lanes))
    admitted = ((("lane", e.name), e.admitted) for e in lanes)
    yield _family("requests_admitted_total", "counter", "Requests that were given to a worker.", admitted)
    yield _gauge("requests_waiting", "Requests that wait for room in the queue.", pool.waiting)
    yield _gauge("requests_in_flight", "Requests with a worker, streams that are read included.", pool.in_flight)
    yield _gauge("connections", "Open connections.", pool.connections)
    yield _counter("connections_opened_total", "Connections opened.", pool.opened)
    yield _counter("requests_submitted_total", "Attempts that were submitted.", pool.submitted)
    yield _counter("requests_answered_total", "Attempts that were answered, with whatever status.", pool.answered)
    yield _counter("requests_failed_total", "Attempts without an answer.", pool.failed)
    yield _counter("requests_abandoned_total", "Attempts whose caller left.", pool.abandoned)
    yield _counter("requests_throttled_total", "Answers with status 429.", pool.throttled)
    yield _counter("retries_total", "Retries.", pool.retries)
    yield _gauge("retry_quota_tokens", "What is left of the retry quota.", pool.retry_quota_tokens)
    yield _gauge("loop_lag_seconds", "How long a task that could run waited for its turn lately.", pool.loop_lag_s)
    of_model = ((("model", e.name), e.in_flight) for e in models)
    yield _family("model_requests_in_flight", "gauge", "Requests in flight by model.", of_model)
    limits = ((("model", e.name), e.limit) for e in models)
    yield _family("model_requests_limit", "gauge", "How many may be in flight by model.", limits)
    is_open = ((("model", e.name), int(e.breaker != "closed")) for e in models)
    yield _family("model_breaker_open", "gauge", "1 where a model is left alone for its failures.", is_open)
    of_key = ((("key", e.name), e.in_flight) for e in keys)
    yield _family("key_requests_in_flight", "gauge", "Requests in flight by key.", of_key)
    ready = ((("key", e.name), int(e.state == "ready")) for e in keys)
    yield _family("key_ready", "gauge", "1 where a key may be used now.", ready)


def _of_costs(runtime: Runtime) -> Iterator[MetricFamily]:
    costs = runtime.accounting.cost_snapshot().by_model
    charged = ((("model", model), float(row.cost_usd)) for model, row in costs.items())
    yield _family("cost_usd_total", "counter", "What was charged for certain, by the model asked for.", charged)
    estimated = ((("model", model), float(row.estimated_usd)) for model, row in costs.items())
    yield _family("cost_estimated_usd", "gauge", "What comes on top by the price list.", estimated)
    unknown = ((("model", model), row.unknown + row.unreconciled) for model, row in costs.items())
    yield _family("cost_unknown_attempts", "gauge", "Attempts whose cost nobody knows.", unknown)
    samples = [
        Sample(count, (("model", model), ("type", kind)))
        for model, row in costs.items()
        for kind, count in (("input", row.prompt_tokens), ("output", row.completion_tokens))
    ]
    yield MetricFamily("gorouter_tokens_total", "counter", "Tokens, as the API counted them.", tuple(samples))


def _gauge(name: str, meaning: str, value: float) -> MetricFamily:
    return MetricFamily(f"gorouter_{name}", "gauge", meaning, (Sample(value),))


def _counter(name: str, meaning: str, value: int) -> MetricFamily:
    return MetricFamily(f"gorouter_{name}", "counter", meaning, (Sample(value),))


def _family(name: str, kind: str, meaning: str, values: Iterable[tuple[tuple[str, str], float]]) -> MetricFamily:
    samples = tuple(Sample(value, (label,)) for label, value in values)
    return MetricFamily(f"gorouter_{name}", "counter" if kind == "counter" else "gauge", meaning, samples)
