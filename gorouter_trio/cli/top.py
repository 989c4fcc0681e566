"""`gorouter-trio top`: what a gateway does, live in the terminal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio
from msgspec import Struct
from rich.cells import cell_len
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
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from ..gateway import GatewaySnapshot
    from ..remote import RemoteClient

__all__ = ["TopJob", "draw", "run_top"]

_GAP: Final = 2
_LEAST: Final = 12
_TOKEN_VARIABLE: Final = "GOROUTER_GATEWAY_TOKEN"  # noqa: S105 - the name of a variable


class TopJob(Struct, frozen=True, kw_only=True):
    """Which gateway to look at, how often, and how many sessions of it to show."""

    url: str
    interval_s: float = 1.0
    rows: int = 15
    patience_s: float = 10.0


async def run_top(job: TopJob, *, as_json: bool) -> int:
    """Show one snapshot, or, where somebody looks at a terminal, one after the other until Ctrl-C."""
    if not job.interval_s > 0:
        raise CliError("--interval must be more than 0")
    if not job.patience_s > 0:
        raise CliError("--patience must be more than 0")
    token = os.environ.get(_TOKEN_VARIABLE) or None
    async with open_remote(job.url, token=token, patience_s=job.patience_s) as client:
        if as_json:
            print_json(await client.statistics())
        elif is_interactive():
            await _watch(client, job)
        else:
            show(draw(await client.statistics(), None, rows=job.rows, width=make_console().width))
    return OK


async def _watch(client: RemoteClient, job: TopJob) -> None:
    before: GatewaySnapshot | None = None
    with Live(console=make_console(), auto_refresh=False, screen=True) as live:
        while True:
            now = await client.statistics()
            live.update(draw(now, before, rows=job.rows, width=live.console.width), refresh=True)
            before = now
            await trio.sleep(job.interval_s)


def draw(now: GatewaySnapshot, before: GatewaySnapshot | None, *, rows: int, width: int = 80) -> RenderableType:
    """A snapshot as tables of so many columns; rates are since the one `before`."""
    parts: list[RenderableType] = [facts_table(printable(now.name), _facts(now, before))]
    if now.budgets and rows:
        parts.append(_budgets(now, rows=rows, width=width))
    if now.sessions and rows:
        parts.append(_sessions(now, rows=rows, width=width))
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


def _budgets(now: GatewaySnapshot, *, rows: int, width: int) -> Table:
    """What is spent against what may be, the fullest first."""
    lines = []
    for row in now.budgets[:rows]:
        used = f"{1 - row.left_usd / row.limit_usd:.0%}" if row.limit_usd else ""
        amounts = map(format_cost, (row.spent_usd, row.held_usd, row.limit_usd, row.left_usd))
        lines.append((f"{row.kind} {row.name}".strip(), *amounts, used))
    return _table(("budget", "spent", "held", "limit", "left", "used"), lines, width=width)


def _sessions(now: GatewaySnapshot, *, rows: int, width: int) -> Table:
    lines = []
    for row in now.sessions[:rows]:
        cost = "" if row.cost_usd is None else format_cost(row.cost_usd)
        cells = (row.state, row.waits_for, format_seconds(row.since_s), f"{row.queued}", f"{row.turns:,}", cost)
        lines.append((row.key, *cells))
    return _table(("session", "state", "waits for", "since", "queued", "turns", "cost"), lines, width=width)


def _table(names: Sequence[str], lines: Sequence[Sequence[str]], *, width: int) -> Table:
    """Lines under their names; the first column has what the others leave, and shows the ends of what is too long."""
    table = Table(box=None, pad_edge=False, title_justify="left")
    used = 0
    for number, name in enumerate(names[1:], start=1):
        used += _GAP + max(len(name), *(len(line[number]) for line in lines))
    room = max(width - used, len(names[0]), _LEAST)
    for name in names:
        is_first = name == names[0]
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify="left" if is_first else "right")
    for first, *others in lines:
        table.add_row(_end_of(printable(first), room), *map(printable, others))
    return table


def _end_of(text: str, room: int) -> str:
    return text if cell_len(text) <= room else "…" + text[-(room - 1) :]
