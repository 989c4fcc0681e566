"""`gorouter-trio top`: what a gateway does, live in the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio
from msgspec import Struct
from rich.console import Group
from rich.live import Live
from rich.table import Table

from ..remote import open_remote
from .failures import OK, CliError
from .terminal import (
    facts_table,
    format_cost,
    format_seconds,
    is_interactive,
    make_console,
    print_json,
    printable,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from ..gateway import GatewaySnapshot
    from ..remote import RemoteClient

__all__ = ["TopJob", "draw", "run_top"]

_TOKEN_VARIABLE: Final = "GOROUTER_GATEWAY_TOKEN"  # noqa: S105 - the name of a variable


class TopJob(Struct, frozen=True, kw_only=True):
    """Which gateway to look at, how often, and how many sessions of it to show."""

    url: str
    interval_s: float = 1.0
    rows: int = 15


async def run_top(job: TopJob, *, as_json: bool) -> int:
    """Show one snapshot, or, where somebody looks at a terminal, one after the other until Ctrl-C."""
    if not job.interval_s > 0:
        raise CliError("--interval must be more than 0")
    token = os.environ.get(_TOKEN_VARIABLE) or None
    async with open_remote(job.url, token=token, patience_s=10.0) as client:
        if as_json:
            print_json(await client.statistics())
        elif is_interactive():
            await _watch(client, job)
        else:
            show(draw(await client.statistics(), None, rows=job.rows))
    return OK


async def _watch(client: RemoteClient, job: TopJob) -> None:
    before: GatewaySnapshot | None = None
    with Live(console=make_console(), auto_refresh=False, screen=True) as live:
        while True:
            now = await client.statistics()
            live.update(draw(now, before, rows=job.rows), refresh=True)
            before = now
            await trio.sleep(job.interval_s)


def draw(now: GatewaySnapshot, before: GatewaySnapshot | None, *, rows: int) -> RenderableType:
    """A snapshot as tables; rates are since the one `before`."""
    parts: list[RenderableType] = [facts_table(printable(now.name), _facts(now, before))]
    if now.sessions and rows:
        parts.append(_sessions(now, rows))
    return Group(*parts)


def _facts(now: GatewaySnapshot, before: GatewaySnapshot | None) -> Iterator[tuple[str, str]]:
    state = "draining" if now.is_draining else "running"
    yield "state", f"{state} for {format_seconds(now.uptime_s)}, loop {now.loop_lag_s * 1000:.1f} ms behind"
    yield "connections", f"{now.connections:,} of {now.principals:,} principals, {now.unauthenticated:,} saying hello"
    turns = f"{now.live_turns:,} running, {now.turns_done:,} done, {now.turns_failed:,} failed"
    yield "turns", turns + _rate(now, before)
    yield "sessions", f"{now.active_sessions:,} active"
    yield "requests", f"{now.in_flight:,} in flight, {now.queued:,} queued, {now.pool_connections:,} connections"
    yield "limits", f"{now.throttled:,} replies 429, {now.retries:,} retries" if now.throttled or now.retries else ""
    uncosted = f", {now.uncosted:,} of unknown cost" if now.uncosted else ""
    yield "spent", format_cost(now.cost_usd) + uncosted
    yield "errors", ", ".join(f"{count:,} {code}" for code, count in sorted(now.errors.items()))
    yield "closed", ", ".join(f"{count:,} with {code}" for code, count in sorted(now.closed.items()))
    yield "refused", f"{now.refused:,}" if now.refused else ""


def _rate(now: GatewaySnapshot, before: GatewaySnapshot | None) -> str:
    if before is None or now.uptime_s <= before.uptime_s:
        return ""
    done = now.turns_done + now.turns_failed - before.turns_done - before.turns_failed
    return f", {done / (now.uptime_s - before.uptime_s):.1f} a second"


def _sessions(now: GatewaySnapshot, rows: int) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in ("session", "state", "waits for", "since", "queued", "turns", "cost"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify="left" if name == "session" else "right")
    for row in now.sessions[:rows]:
        cost = "" if row.cost_usd is None else format_cost(row.cost_usd)
        cells = (printable(row.key), row.state, row.waits_for, format_seconds(row.since_s), f"{row.queued}")
        table.add_row(*cells, f"{row.turns:,}", cost)
    return table
