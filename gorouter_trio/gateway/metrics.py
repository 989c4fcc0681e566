"""What a gateway tells of itself: a snapshot for people and programs, and the same as text for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import trio

from .protocol import BudgetRow, GatewaySnapshot, SessionRow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from decimal import Decimal

    from ..pool.budget import AccountStatistics
    from .core import GatewayCore

__all__ = ["metrics_text", "snapshot"]

_MOST_ROWS = 50
_MOST_BUDGETS = 20


def snapshot(core: GatewayCore) -> GatewaySnapshot:
    """What the gateway and its client do now, with the sessions that have been at it the longest."""
    pool = core.client.statistics()
    spent = core.client.cost_snapshot()
    hub = core.hub
    return GatewaySnapshot(
        name=core.config.name,
        uptime_s=trio.current_time() - core.started_at,
        is_draining=core.is_draining,
        connections=len(core.connections),
        unauthenticated=core.census.unauthenticated,
        principals=core.census.principals,
        accepted=core.accepted,
        refused=core.refused.total(),
        closed=dict(core.closed),
        live_turns=hub.live,
        kept_turns=hub.kept,
        kept_bytes=hub.kept_bytes,
        turns_done=hub.done,
        turns_failed=hub.failed,
        errors=dict(hub.errors),
        active_sessions=core.client.active_sessions,
        sessions=_rows(core),
        queued=pool.queued,
        in_flight=pool.in_flight,
        pool_connections=pool.connections,
        retries=pool.retries,
        throttled=pool.throttled,
        answered=pool.answered,
        failed=pool.failed,
        loop_lag_s=pool.loop_lag_s,
        cost_usd=spent.cost_usd + spent.estimated_usd,
        uncosted=spent.unknown + spent.reconciling + spent.unreconciled,
        budgets=[_budget(account) for account in core.client.budgets(most=_MOST_BUDGETS)],
    )


def _rows(core: GatewayCore) -> list[SessionRow]:
    busy = [
        SessionRow(
            key=key,
            state=session.state,
            queued=session.queued,
            turns=session.turns,
            waits_for=session.waits_for,
            since_s=session.since_s,
            cost_usd=session.cost_usd,
        )
        for key, session in core.client.session_statistics().items()
    ]
    busy.sort(key=lambda row: (row.state == "idle", -row.since_s))
    return busy[:_MOST_ROWS]


def _budget(account: AccountStatistics) -> BudgetRow:
    return BudgetRow(
        kind=account.kind,
        name=account.name,
        limit_usd=cast("Decimal", account.limit_usd),
        spent_usd=account.spent_usd,
        held_usd=account.held_usd,
        left_usd=cast("Decimal", account.left_usd),
    )


def metrics_text(core: GatewayCore) -> str:
    """The metrics of the gateway, and those of its client, in the text format of Prometheus."""
    of_client = getattr(core.client, "metrics_text", None)
    own = "\n".join(_lines(core)) + "\n"
    return own + (of_client() if of_client is not None else "\n".join(_pool_lines(core)) + "\n")


def _lines(core: GatewayCore) -> Iterator[str]:
    hub, census = core.hub, core.census
    yield from _metric("connections", "gauge", "WebSocket connections now", len(core.connections))
    yield from _metric("unauthenticated", "gauge", "Those of which nobody knows yet who it is", census.unauthenticated)
    yield from _metric("principals", "gauge", "Principals that are connected", census.principals)
    yield from _metric("accepted_total", "counter", "Connections since the start", core.accepted)
    yield from _metric("turns", "gauge", "Turns that run", hub.live)
    yield from _metric("turns_kept", "gauge", "Ended turns that can still be joined", hub.kept)
    yield from _metric("turns_kept_bytes", "gauge", "What is kept of them", hub.kept_bytes)
    yield from _metric("turns_done_total", "counter", "Turns with an answer", hub.done)
    yield from _metric("turns_failed_total", "counter", "Turns without", hub.failed)
    yield from _metric("draining", "gauge", "1 while the gateway goes away", int(core.is_draining))
    if core.cluster is not None:
        text = "Requests that were passed on to the gateways which have their sessions"
        yield from _metric("forwarded_total", "counter", text, core.cluster.forwarded)
    yield "# HELP gorouter_gateway_closed_total Connections that have ended, by close code"
    yield "# TYPE gorouter_gateway_closed_total counter"
    for code, count in sorted(core.closed.items()):
        yield f'gorouter_gateway_closed_total{{code="{code}"}} {count}'
    yield "# HELP gorouter_gateway_refused_total What was not let in, by why"
    yield "# TYPE gorouter_gateway_refused_total counter"
    for why, count in sorted(core.refused.items()):
        yield f'gorouter_gateway_refused_total{{why="{why}"}} {count}'


def _pool_lines(core: GatewayCore) -> Iterator[str]:
    pool = core.client.statistics()
    for name, text in (("queued", "Requests that wait"), ("in_flight", "Requests that run"), ("connections", "Open")):
        yield from _metric(name, "gauge", text, getattr(pool, name), part="pool")
    for name, text in (
        ("submitted", "Requests taken, retries included"),
        ("answered", "Requests with a reply"),
        ("failed", "Requests without"),
        ("retries", "Requests sent again"),
        ("throttled", "Replies 429"),
    ):
        yield from _metric(f"{name}_total", "counter", text, getattr(pool, name), part="pool")


def _metric(name: str, kind: str, text: str, value: float, *, part: str = "gateway") -> Iterator[str]:
    full = f"gorouter_{part}_{name}"
    yield f"# HELP {full} {text}"
    yield f"# TYPE {full} {kind}"
    yield f"{full} {value}"
