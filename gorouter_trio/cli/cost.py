"""`gorouter-trio cost`: what a ledger or stored conversations cost, by model, session, tenant, batch, or over time."""

from __future__ import annotations

import stat
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import msgspec
import trio
from rich.table import Table

from ..errors import GorouterError, NotFoundError
from ..pool.costs import CostRow, CostSum
from ..pool.ledger_file import LedgerFile, LedgerReader
from ..stores.query import CostPoint, HistoryAnalyzer, HistoryFilter, ModelUsage
from ..stores.sqlite import SqliteStore
from .failures import FAILED, OK, CliError, report, why
from .options import CommonOptions, open_chosen_client
from .terminal import clean, format_cost, print_json, printable, show

if TYPE_CHECKING:
    from ..client import Client
    from ..wire.ledger import LedgerRow

__all__ = ["CostGrouping", "CostJob", "CostReport", "NamedCost", "run_cost"]

CostGrouping = Literal["model", "session", "tenant", "batch", "purpose", "state", "day", "hour", "minute"]

_WIDTHS_S: dict[str, int] = {"minute": 60, "hour": 3_600, "day": 86_400}
_SQLITE = b"SQLite format 3\x00"
_BAR = 24
_NO_NAME = "(none)"


@dataclass(frozen=True, kw_only=True)
class CostJob:
    """What to add up, and how. Times without a zone are in UTC."""

    source: str
    by: CostGrouping = "model"
    since: datetime | None = None
    until: datetime | None = None
    top: int = 40
    plot: bool = False
    reconcile: bool = False

    def admits(self, at_s: float) -> bool:
        """Whether a time is within the bounds."""
        since, until = _epoch(self.since), _epoch(self.until)
        return (since is None or at_s >= since) and (until is None or at_s < until)


class NamedCost(CostRow, frozen=True, kw_only=True):
    """One row of the report."""

    name: str


class CostReport(msgspec.Struct, frozen=True):
    """The sums: in all, and by name, the dearest first, or in the order of time."""

    source: str
    by: CostGrouping
    total: CostRow
    rows: list[NamedCost]
    unreadable: int = 0


async def run_cost(job: CostJob, common: CommonOptions) -> int:
    """Print the sums; fails when a row that was to be looked up could not be."""
    if job.top < 1:
        raise CliError(f"--top must be at least 1, not {job.top}")
    # What is read from a pipe to look at it is gone.
    is_file = job.source != "-" and _is_file(Path(job.source))
    is_store = is_file and _is_sqlite(Path(job.source))
    if job.reconcile and (is_store or not is_file):
        raise CliError("--reconcile: needs a ledger file, to which it adds what it finds")
    code = await _reconcile(job, common) if job.reconcile else OK
    result = await _ask_store(job) if is_store else _read_ledger(job)
    if common.json:
        print_json(result)
    else:
        show(_table(result, job))
        _say_more(result)
    return code


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc


def _is_sqlite(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc


def _epoch(time: datetime | None) -> float | None:
    if time is None:
        return None
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


# A ledger


def _read_ledger(job: CostJob) -> CostReport:
    if job.source == "-":
        if sys.stdin is None:
            raise CliError("standard input is closed")
        return _add_up(job, sys.stdin.buffer)
    try:
        with Path(job.source).open("rb") as file:
            return _add_up(job, file)
    except OSError as exc:
        raise CliError(f"{job.source}: {why(exc)}") from exc


def _add_up(job: CostJob, file: IO[bytes]) -> CostReport:
    reader = LedgerReader(file)
    total, by_name = CostSum(), dict[str, CostSum]()
    count = 0
    for row in reader.rows():
        count += 1
        if not job.admits(row.at_s):
            continue
        total.add(row)
        by_name.setdefault(_name_of(row, job.by), CostSum()).add(row)
    if reader.unreadable and not count:
        raise CliError(f"{job.source}: is no ledger: none of its {reader.unreadable} lines can be read")
    return _report(job, total.row(), {name: each.row() for name, each in by_name.items()}, reader.unreadable)


def _name_of(row: LedgerRow, by: CostGrouping) -> str:
    if by in _WIDTHS_S:
        return _time_name(row.at_s, by)
    name = (row.requested_model or row.model) if by == "model" else str(getattr(row, by))
    return name or _NO_NAME


def _time_name(at_s: float, by: CostGrouping) -> str:
    if at_s <= 0:
        # Of calls that nobody noted the time of, such as those of a summary.
        return _NO_NAME
    width = _WIDTHS_S[by]
    form = "%Y-%m-%d" if by == "day" else "%Y-%m-%d %H:%M"
    try:
        return datetime.fromtimestamp(at_s // width * width, UTC).strftime(form)
    except (ValueError, OverflowError, OSError):
        return f"{at_s:g}"


def _report(job: CostJob, total: CostRow, by_name: dict[str, CostRow], unreadable: int = 0) -> CostReport:
    rows = [NamedCost(name=name, **msgspec.structs.asdict(row)) for name, row in by_name.items()]
    if job.by in _WIDTHS_S:
        rows.sort(key=lambda row: row.name)
    else:
        rows.sort(key=lambda row: (-(row.cost_usd + row.estimated_usd), row.name))
    return CostReport(source=clean(job.source), by=job.by, total=total, rows=rows, unreadable=unreadable)


# A store of histories


async def _ask_store(job: CostJob) -> CostReport:
    only = HistoryFilter(start_s=_epoch(job.since), end_s=_epoch(job.until))
    async with SqliteStore(job.source) as store:
        analyzer = HistoryAnalyzer(store)
        total = await analyzer.statistics(only=only)
        return _report(job, _of_usage(total), await _groups(analyzer, job.by, only=only))


async def _groups(analyzer: HistoryAnalyzer, by: CostGrouping, *, only: HistoryFilter) -> dict[str, CostRow]:
    match by:
        case "model":
            usages = await analyzer.usage_by_model(only=only)
            return {name: _of_usage(usage) for name, usage in usages.items()}
        case "session":
            keys = await analyzer.keys()
            return {key: _of_usage(await analyzer.statistics(key=key, only=only)) for key in keys}
        case "day" | "hour" | "minute":
            points = await analyzer.cost_over_time(by, only=only)
            return {_time_name(point.at_s, by): _of_usage(point) for point in points}
    raise CliError(f"--by {by}: stored conversations do not know it; a ledger does")


def _of_usage(usage: ModelUsage | CostPoint) -> CostRow:
    """The calls of stored answers as the ledger counts attempts; lost ones are not among them."""
    # A point in time has the sum of both only.
    completion = usage.completion_tokens if isinstance(usage, ModelUsage) else 0
    return CostRow(
        attempts=usage.calls,
        prompt_tokens=usage.total_tokens - completion,
        completion_tokens=completion,
        cost_usd=usage.cost_usd,
        unknown=usage.unpriced,
    )


# What was not found before


async def _reconcile(job: CostJob, common: CommonOptions) -> int:
    """Ask the API once more about lost rows, and add what it says to the ledger."""
    lost = _find_lost(Path(job.source))
    missing = 0
    errors: list[Exception] = []
    ledger = LedgerFile(job.source, report=errors.append)
    async with open_chosen_client(common, max_connections=4) as client, trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        for row in lost:
            after = await _look_up(client, row) if row.generation_id else None
            missing += after is None
            if after is not None:
                ledger.write(after)
        nursery.cancel_scope.cancel()
    if errors:
        raise CliError(f"{job.source}: {errors[0]}", code=FAILED)
    if missing:
        report(f"{missing} of {len(lost)} lost attempts could not be looked up")
    return FAILED if missing else OK


def _find_lost(path: Path) -> list[LedgerRow]:
    with path.open("rb") as file:
        return [row for row in LedgerReader(file).rows() if row.state in {"reconciling", "unreconciled"}]


async def _look_up(client: Client, row: LedgerRow) -> LedgerRow | None:
    try:
        info = await client.generation(row.generation_id or "", polls=1)
    except NotFoundError:
        return None
    except GorouterError as exc:
        report(f"{row.generation_id}: {exc.message}")
        return None
    cost = info.total_cost if info.total_cost is not None else info.usage
    if cost is None:
        return None
    return msgspec.structs.replace(
        row,
        state="reconciled",
        cost_usd=cost,
        prompt_tokens=info.native_tokens_prompt or row.prompt_tokens,
        completion_tokens=info.native_tokens_completion or row.completion_tokens,
        tries=row.tries + 1,
    )


# What is shown


def _table(result: CostReport, job: CostJob) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", show_footer=len(result.rows) != 1)
    has_estimates, has_gaps = result.total.estimated > 0, _gaps(result.total) > 0
    table.add_column(job.by, footer="total", overflow="fold")
    shown = result.rows[-job.top :] if job.by in _WIDTHS_S else result.rows[: job.top]
    most = max((row.cost_usd + row.estimated_usd for row in shown), default=None)
    for title, footer in zip(("calls", "tokens", "cost"), _cells(result.total), strict=True):
        table.add_column(title, footer=footer, justify="right", no_wrap=True)
    if has_estimates:
        table.add_column("estimated", footer=format_cost(result.total.estimated_usd), justify="right", no_wrap=True)
    if has_gaps:
        table.add_column("unknown", footer=f"{_gaps(result.total):,}", justify="right", no_wrap=True)
    if job.plot:
        table.add_column("", no_wrap=True)
    for row in shown:
        cells = [printable(row.name), *_cells(row)]
        cells += [format_cost(row.estimated_usd)] if has_estimates else []
        cells += [f"{_gaps(row):,}"] if has_gaps else []
        cells += [_bar(float(row.cost_usd + row.estimated_usd), float(most or 0))] if job.plot else []
        table.add_row(*cells)
    return table


def _cells(row: CostRow) -> tuple[str, str, str]:
    return f"{row.attempts:,}", f"{row.total_tokens:,}", format_cost(row.cost_usd)


def _gaps(row: CostRow) -> int:
    """How many attempts have a cost that is in no sum."""
    return row.unknown + row.reconciling + row.unreconciled


def _bar(value: float, most: float) -> str:
    """A bar in eighths of a cell."""
    eighths = round(value / most * _BAR * 8) if most else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def _say_more(result: CostReport) -> None:
    total = result.total
    if total.reconciling or total.unreconciled:
        lost = total.reconciling + total.unreconciled
        report(f"{lost} attempts may have been charged and are in no sum; --reconcile asks the API about them")
    if total.unknown:
        report(f"{total.unknown} attempts have a cost that nobody said; it is in no sum")
    if result.unreadable:
        report(f"{result.unreadable} lines of {result.source} cannot be read")
