"""Bars in the terminal: an amount for each stretch of time."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from rich.table import Table

from ..stores.query import BUCKETS, Bucket, CostPoint
from .terminal import format_cost

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["bar", "choose_bucket", "cost_table", "format_time"]

_COLUMNS = 32
_ROWS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FORMS: dict[Bucket, str] = {"minute": "%Y-%m-%d %H:%M", "hour": "%Y-%m-%d %H:00", "day": "%Y-%m-%d"}


def format_time(at_s: float | None, bucket: Bucket = "minute") -> str:
    """A time in UTC, as exact as the stretch; empty when it is not known."""
    try:
        return datetime.fromtimestamp(at_s, UTC).strftime(_FORMS[bucket]) if at_s else ""
    except (ValueError, OverflowError, OSError):
        return f"{at_s:g}"


def bar(share: float, columns: int = _COLUMNS) -> str:
    """A bar of which `share` is filled; what is above nothing shows at least a sliver."""
    eighths = round(share * columns * 8)
    if share > 0:
        eighths = max(eighths, 1)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")


def choose_bucket(first_s: float | None, last_s: float | None) -> Bucket:
    """The stretch that shows a span of time best."""
    span_s = (last_s or 0) - (first_s or 0)
    if span_s <= 2 * 3600:
        return "minute"
    return "hour" if span_s <= 3 * 86_400 else "day"


def cost_table(points: Sequence[CostPoint], bucket: Bucket) -> Table:
    """Cost over time, or calls where no cost is known: a row a stretch, neighbours together where there are many."""
    rows = _even_rows([point for point in points if point.at_s > 0], BUCKETS[bucket])
    rows += [point for point in points if point.at_s <= 0]
    is_priced = any(point.cost_usd for point in rows)
    amounts = [point.cost_usd if is_priced else Decimal(point.calls) for point in rows]
    most = max(amounts, default=Decimal(0)) or Decimal(1)
    what = "Cost" if is_priced else "Calls"
    table = Table(title=f"{what} over time (UTC)", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("since", style="dim", no_wrap=True)
    table.add_column("", no_wrap=True, style="green", min_width=_COLUMNS)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("calls", justify="right", no_wrap=True)
    for point, amount in zip(rows, amounts, strict=True):
        since = format_time(point.at_s, bucket) or "unknown"
        table.add_row(since, bar(float(amount / most)), _cost_text(point), f"{point.calls:,}" if point.calls else "")
    return table


def _even_rows(points: Sequence[CostPoint], width_s: int) -> list[CostPoint]:
    """The points with the empty stretches between them, and so many in one row that there are not too many rows."""
    if not points:
        return []
    first_s = points[0].at_s
    stretches = int((points[-1].at_s - first_s) // width_s) + 1
    row_s = -(-stretches // _ROWS) * width_s
    rows = [CostPoint(at_s=first_s + number * row_s) for number in range(-(-stretches * width_s // row_s))]
    for point in points:
        row = rows[int((point.at_s - first_s) // row_s)]
        row.calls += point.calls
        row.total_tokens += point.total_tokens
        row.cost_usd += point.cost_usd
        row.unpriced += point.unpriced
    return rows


def _cost_text(point: CostPoint) -> str:
    if not point.calls:
        return ""
    if point.unpriced == point.calls:
        return format_cost(None)
    return format_cost(point.cost_usd) + ("+" if point.unpriced else "")
