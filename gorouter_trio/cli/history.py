"""`gorouter-trio history`: what a store holds, what it has cost, and how it gets in and out."""

from __future__ import annotations

import heapq
import os
import re
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import trio
from cyclopts import App, Parameter
from msgspec import UNSET, Struct
from rich.table import Table

from ..errors import DecodeError
from ..session.log import entries_of
from ..stores.keys import SessionKey
from ..stores.query import Bucket, CostPoint, HistoryAnalyzer, HistoryFilter, HistoryStatistics, ModelUsage
from ..stores.sqlite import SqliteStore
from ..wire.codec import decode_log_entry
from .failures import FAILED, OK, CliError, report
from .history_files import ImportReport, export_sessions, import_sessions
from .options import FLAG
from .plot import choose_bucket, cost_table, format_time
from .terminal import (
    clean,
    describe_call,
    facts_table,
    format_cost,
    is_interactive,
    open_stdin,
    paint,
    print_error,
    print_json,
    print_text,
    printable,
    show,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Sequence

    from ..abc import HistoryStore, StoredHistory, StoredSession
    from ..wire.messages import Message
    from ..wire.result import HistoryEntry

__all__ = [
    "FilterOptions",
    "HistoryReport",
    "RemovalReport",
    "Selection",
    "StoreOptions",
    "delete",
    "export",
    "import_",
    "list_sessions",
    "make_history_app",
    "show_session",
    "show_statistics",
]

_PAGE = 500
_MOST_NAMES = 5
_DASH = Parameter(allow_leading_hyphen=True)
_AGO = re.compile(r"(\d+)([dhm])")
_UNITS_S = {"d": 86_400, "h": 3_600, "m": 60}
_MANY = Parameter(negative="", consume_multiple=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where the histories are."""

    store: Path
    """The file of the store."""
    json: Annotated[bool, FLAG] = False
    """Print data as JSON."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which sessions."""

    prefix: Annotated[str, _DASH] = ""
    """Only sessions whose keys begin so."""
    tenant: Annotated[str | None, _DASH] = None
    """Only sessions of this tenant."""
    principal: Annotated[str | None, _DASH] = None
    """Only sessions of this principal, of the tenant that is named or of none."""

    @property
    def has_owner(self) -> bool:
        """Whether they are those of somebody."""
        return self.tenant is not None or self.principal is not None

    @property
    def start(self) -> str:
        """What all their keys begin with."""
        if not self.has_owner:
            return self.prefix
        if self.prefix:
            raise CliError("--prefix and --tenant or --principal exclude each other")
        return SessionKey.prefix(tenant=self.tenant or "", principal=self.principal)

    @property
    def is_everything(self) -> bool:
        """Whether nothing was named."""
        return not self.prefix and self.tenant is None and self.principal is None

    def admits(self, key: str) -> bool:
        """Whether a key that begins so is meant: one without an owner may look like that of a tenant."""
        if not self.has_owner:
            return True
        parts = SessionKey.parse(key)
        return parts.tenant == (self.tenant or "") and self.principal in {None, parts.principal}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which entries count."""

    since: str | None = None
    """From then on: 2026-03-08, 2026-03-08T10:30 (UTC where no offset is given), or 7d, 12h, 30m ago."""
    until: str | None = None
    """Until before then."""
    model: Annotated[list[str] | None, _MANY] = None
    """Only calls that this model has answered, by the name that stats lists, often with a date; several times too."""
    role: Annotated[list[str] | None, _MANY] = None
    """Only messages of this role; may be given several times."""
    finish_reason: Annotated[list[str] | None, _MANY] = None
    """Only calls that ended so; may be given several times."""
    min_cost: str | None = None
    """Only calls that cost at least so many dollars."""

    def to_filter(self, now_s: float) -> HistoryFilter:
        """The filter that these make."""
        return HistoryFilter(
            start_s=_parse_time(self.since, "--since", now_s=now_s),
            end_s=_parse_time(self.until, "--until", now_s=now_s),
            models=self.model or (),
            roles=self.role or (),
            finish_reasons=self.finish_reason or (),
            min_cost_usd=_parse_usd(self.min_cost),
        )


class HistoryReport(Struct, frozen=True, kw_only=True):
    """What `stats --json` prints."""

    statistics: HistoryStatistics
    bucket: str
    over_time: list[CostPoint]


class RemovalReport(Struct, frozen=True, kw_only=True):
    """What `delete --json` prints."""

    sessions: int
    erased: bool


def make_history_app() -> App:
    """The commands."""
    app = App(name="history", help="Stored conversations: list, show, add up, export, import, delete.")
    for command, name in (
        (list_sessions, "list"),
        (show_session, "show"),
        (show_statistics, "stats"),
        (export, "export"),
        (import_, "import"),
        (delete, "delete"),
    ):
        app.command(command, name=name)
    return app


# list


async def list_sessions(
    *,
    where: StoreOptions,
    which: Selection | None = None,
    sort: Literal["updated", "key"] = "updated",
    limit: int = 50,
) -> int:
    """List the sessions of a store, the last changed first.

    Parameters
    ----------
    sort
        By the time of the last change, or by key.
    limit
        At most so many; 0 lists all.
    """
    which = which or Selection()
    if limit < 0:
        raise CliError("--limit: must not be below 0")
    async with _open_store(where.store) as store:
        found, total = await _pick(store, which, sort=sort, limit=limit)
    if where.json:
        print_json(found)
    elif found:
        show(_sessions_table(found))
        if total > len(found):
            print_error(paint(f"{total - len(found):,} more (--limit 0 lists all)", "dim", stderr=True) + "\n")
    if not found:
        report("there are no sessions" if which.is_everything else "no session has such a key")
        return FAILED
    return OK


async def _pick(store: SqliteStore, which: Selection, *, sort: str, limit: int) -> tuple[list[StoredSession], int]:
    """The sessions to list, and how many there are; in memory are no more than are listed and one page."""
    total = 0
    kept: list[StoredSession] = []
    async for page in _pages(store, which):
        total += len(page)
        kept += page
        if not limit:
            continue
        kept = kept[:limit] if sort == "key" else heapq.nsmallest(limit, kept, key=_last_first)
    return kept if sort == "key" else sorted(kept, key=_last_first), total


def _last_first(session: StoredSession) -> tuple[float, str]:
    return -(session.updated_at_s or 0.0), session.key


async def _pages(store: SqliteStore, which: Selection) -> AsyncIterator[list[StoredSession]]:
    after = ""
    while page := await store.list_sessions(which.start, after=after, limit=_PAGE):
        yield [session for session in page if which.admits(session.key)]
        after = page[-1].key


def _sessions_table(sessions: Sequence[StoredSession]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("session", overflow="fold")
    table.add_column("entries", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last change", no_wrap=True)
    for session in sessions:
        size = _format_bytes(session.bytes)
        table.add_row(_shown_key(session.key), f"{session.entries:,}", size, format_time(session.updated_at_s))
    return table


def _format_bytes(size: int) -> str:
    if size < 1000:
        return f"{size} B"
    amount = size / 1000
    for unit in ("kB", "MB"):
        if amount < 1000:
            return f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def _shown_key(key: str) -> str:
    """The key in one line, with marks for what would steer the terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in key)


# show


async def show_session(key: Annotated[str, _DASH], /, *, where: StoreOptions, last: int | None = None) -> int:
    """Show what was said in a session.

    Parameters
    ----------
    key
        Key of the session.
    last
        Only so many messages, the last ones.
    """
    if last is not None and last < 1:
        raise CliError("--last: must be above 0")
    async with _open_store(where.store) as store:
        stored = await store.load(key)
    if not stored.version:
        raise CliError(f"there is no session {key!r}", code=FAILED)
    entries, unreadable = _read_log(stored.entries)
    shown = entries if last is None else entries[-last:]
    if where.json:
        print_json(shown)
    else:
        print_text("\n".join(map(_entry_text, shown)))
    if unreadable:
        report(f"{unreadable} stored entries cannot be read by this version")
        return FAILED
    return OK


def _read_log(encoded: Sequence[bytes]) -> tuple[list[HistoryEntry], int]:
    log, unreadable = [], 0
    for data in encoded:
        try:
            log.append(decode_log_entry(data))
        except DecodeError:
            unreadable += 1
    return entries_of(log), unreadable


def _entry_text(entry: HistoryEntry) -> str:
    message = entry.message
    role = str(message.__struct_config__.tag)
    lines = [paint(role, "bold")]
    lines += [printable(line) for line in _said(message) if line]
    if entry.call is not None and entry.call.attempts:
        at = format_time(entry.call.finished_at_s)
        lines.append(paint(", ".join(filter(None, [at, describe_call(entry.call)])), "dim"))
    return "\n".join(lines) + "\n"


def _said(message: Message) -> Iterator[str]:
    """What a message says, in lines."""
    reasoning = getattr(message, "reasoning", UNSET)
    if reasoning is not UNSET and reasoning:
        yield paint(printable(reasoning), "dim italic")
    content = message.content
    if isinstance(content, str):
        yield content
    elif content is not None:
        for part in content:
            yield str(getattr(part, "text", None) or f"[{_kind(part)}]")
    refusal = getattr(message, "refusal", UNSET)
    if refusal is not UNSET and refusal:
        yield f"refused: {refusal}"
    calls = getattr(message, "tool_calls", UNSET)
    for call in calls if calls is not UNSET and calls else ():
        yield f"calls {call.function.name}({call.function.arguments})"


def _kind(part: object) -> str:
    config = getattr(part, "__struct_config__", None)
    return "part" if config is None else str(config.tag)


# stats


async def show_statistics(
    key: Annotated[str | None, _DASH] = None,
    /,
    *,
    where: StoreOptions,
    which: Selection | None = None,
    only: FilterOptions | None = None,
    bucket: Bucket | None = None,
) -> int:
    """Add up calls, tokens and costs, by model and over time.

    Parameters
    ----------
    key
        Key of one session; without it, all that the options name.
    bucket
        Width of a stretch of time; by default what fits.
    """
    which = which or Selection()
    if key is not None and not which.is_everything:
        raise CliError("a key and --prefix, --tenant or --principal exclude each other")
    chosen = (only or FilterOptions()).to_filter(time.time())
    async with _open_store(where.store) as store:
        analyzer = await _analyzer(store, which)
        if key is not None and not await store.version(key):
            raise CliError(f"there is no session {key!r}", code=FAILED)
        found = await analyzer.statistics(key=key, prefix=which.start, only=chosen)
        bucket = bucket or choose_bucket(found.first_at_s, found.last_at_s)
        points = await analyzer.cost_over_time(bucket, key=key, prefix=which.start, only=chosen)
        if missing := set(chosen.models) - set(found.by_model):
            known = await analyzer.usage_by_model(key=key, prefix=which.start)
            for model in sorted(missing - set(known)):
                report(_no_call_of(model, known))
    if where.json:
        print_json(HistoryReport(statistics=found, bucket=bucket, over_time=points))
        return OK
    show(facts_table("Histories", _facts(found)))
    if found.by_model:
        print_text("\n")
        show(_models_table(found.by_model))
    if points:
        print_text("\n")
        show(cost_table(points, bucket))
    return OK


def _no_call_of(model: str, known: Collection[str]) -> str:
    """That a model has answered nothing, with the names that may have been meant."""
    meant = [name for name in known if name.startswith(model)] or list(known)
    listed = ", ".join(meant[:_MOST_NAMES]) + (", ..." if len(meant) > _MOST_NAMES else "")
    return f"no call was answered by {model!r}" + (f", but by {listed}" if listed else "")


class _Admitted:
    """The sessions of a store that a selection admits, as far as adding them up needs it."""

    def __init__(self, store: SqliteStore, which: Selection) -> None:
        self._store = store
        self._which = which

    async def list_keys(self, prefix: str, *, after: str, limit: int) -> list[str]:
        """A page of keys; empty behind the last one only."""
        while page := await self._store.list_keys(prefix, after=after, limit=limit):
            if admitted := [key for key in page if self._which.admits(key)]:
                return admitted
            after = page[-1]
        return []

    async def load(self, key: str) -> StoredHistory:
        """See `HistoryStore`."""
        return await self._store.load(key)


async def _analyzer(store: SqliteStore, which: Selection) -> HistoryAnalyzer:
    """What adds up the sessions that are selected; by itself a store knows no more of them than their prefix."""
    after = ""
    while which.has_owner and (page := await store.list_keys(which.start, after=after, limit=_PAGE)):
        if not all(map(which.admits, page)):
            return HistoryAnalyzer(cast("HistoryStore", _Admitted(store, which)))
        after = page[-1]
    return HistoryAnalyzer(store)


def _facts(s: HistoryStatistics) -> Iterator[tuple[str, str]]:
    yield "sessions", f"{s.sessions:,}"
    yield "messages", f"{s.entries:,}" + (f" of {s.total_entries:,}" if s.entries != s.total_entries else "")
    yield "calls", f"{s.calls:,}"
    yield "tokens", f"{s.prompt_tokens:,} in, {s.completion_tokens:,} out"
    yield "cost", _cost_of(s)
    yield "ended by", ", ".join(f"{printable(reason)} {count:,}" for reason, count in s.finish_reasons.items())
    yield "abandoned", f"{s.abandoned:,} turns" if s.abandoned else ""
    yield "in doubt", f"{s.in_doubt:,} turns, which may have been billed" if s.in_doubt else ""
    yield "unreadable", f"{s.unreadable:,} entries" if s.unreadable else ""
    yield "from", format_time(s.first_at_s)
    yield "to", format_time(s.last_at_s)


def _cost_of(usage: ModelUsage) -> str:
    if usage.calls and usage.unpriced == usage.calls:
        return format_cost(None)
    return format_cost(usage.cost_usd) + (f" and {usage.unpriced:,} calls of unknown cost" if usage.unpriced else "")


def _models_table(usages: dict[str, ModelUsage]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for name in ("calls", "in", "out", "cost"):
        table.add_column(name, justify="right", no_wrap=name != "cost")
    for model, usage in usages.items():
        tokens = (f"{usage.prompt_tokens:,}", f"{usage.completion_tokens:,}")
        table.add_row(printable(model), f"{usage.calls:,}", *tokens, _cost_of(usage))
    return table


def _parse_time(text: str | None, option: str, *, now_s: float) -> float | None:
    if text is None:
        return None
    ago = _AGO.fullmatch(text)
    try:
        if ago is not None:
            return now_s - int(ago[1]) * _UNITS_S[ago[2]]
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise CliError(f"{option} must look like 2026-03-08, 2026-03-08T10:30 or 7d, not {text!r}") from None


def _parse_usd(text: str | None) -> Decimal | None:
    if text is None:
        return None
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        raise CliError(f"--min-cost must be an amount in dollars, not {text!r}")
    return amount


# export, import


async def export(
    keys: Annotated[list[str] | None, _DASH] = None,
    /,
    *,
    where: StoreOptions,
    which: Selection | None = None,
    output: Annotated[str, Parameter(name=["--output", "-o"], allow_leading_hyphen=True)] = "-",
    overwrite: Annotated[bool, FLAG] = False,
) -> int:
    """Write sessions as JSON Lines, one a line, byte for byte as they are stored.

    Parameters
    ----------
    keys
        Keys of the sessions; without them, all that the options name.
    output
        Where the lines go; - is standard output.
    overwrite
        Replace an output that exists.
    """
    which = which or Selection()
    if keys and not which.is_everything:
        raise CliError("keys and --prefix, --tenant or --principal exclude each other")
    if output != "-" and _is_of_store(output, where.store):
        raise CliError(f"{output}: is a file of the store itself")
    async with _open_store(where.store) as store:
        chosen = _named(store, keys) if keys else _chosen(store, which)
        count = await export_sessions(store, chosen, output=output, overwrite=overwrite)
    if output != "-":
        _say(where, {"sessions": count, "output": clean(output)}, f"{count:,} sessions written to {output}")
    return OK


def _is_of_store(output: str, store: Path) -> bool:
    own = os.path.realpath(store)
    is_link = os.path.isfile(output) and os.path.isfile(own) and os.path.samefile(output, own)
    return is_link or os.path.realpath(output) in {own, f"{own}-wal", f"{own}-shm"}


async def import_(
    source: Annotated[str, _DASH],
    /,
    *,
    where: StoreOptions,
    prefix: Annotated[str, _DASH] = "",
    replace: Annotated[bool, FLAG] = False,
) -> int:
    """Bring sessions into a store: from an export, or from a directory that GoRouter Kit has left.

    What is there already and differs is left alone and named. Files that cannot be read are copied aside, next to the
    store, and named. Running it again changes nothing.

    Parameters
    ----------
    source
        A file of JSON Lines, - for standard input, or a directory such as .gorouter-history.
    prefix
        Put in front of every key.
    replace
        Replace the sessions that are there already and differ.
    """
    await _refuse_other(where.store)
    async with SqliteStore(where.store) as store:
        result = await import_sessions(
            store, source, quarantine=_quarantine(where.store), prefix=prefix, replace=replace
        )
    for note in result.notes:
        report(note)
    for problem in result.problems:
        report(problem)
    if where.json:
        print_json(result)
    else:
        show(facts_table("Imported", _import_facts(result)))
    return FAILED if result.problems else OK


def _quarantine(store: Path) -> Path:
    return store.with_name(store.name + ".quarantine")


def _import_facts(result: ImportReport) -> Iterator[tuple[str, str]]:
    yield "sessions", f"{result.imported:,}"
    yield "replaced", f"{result.replaced:,}" if result.replaced else ""
    yield "there already", f"{result.unchanged:,}" if result.unchanged else ""
    yield "left out", f"{len(result.problems):,}" if result.problems else ""
    yield "put aside", ", ".join(map(printable, result.quarantined))


# delete


async def delete(
    keys: Annotated[list[str] | None, _DASH] = None,
    /,
    *,
    where: StoreOptions,
    which: Selection | None = None,
    all: Annotated[bool, FLAG] = False,  # noqa: A002 - the name of the option
    erase: Annotated[bool, FLAG] = False,
    yes: Annotated[bool, FLAG] = False,
) -> int:
    """Delete sessions.

    Parameters
    ----------
    keys
        Keys of the sessions; without them, all that the options name.
    all
        Every session of the store.
    erase
        Leave no trace of them in any file of the store.
    yes
        Do not ask.
    """
    which = which or Selection()
    if sum((bool(keys), not which.is_everything, all)) != 1:
        raise CliError("name sessions by their keys, or by --prefix, --tenant or --principal, or all with --all")
    async with _open_store(where.store) as store:
        chosen = _named(store, keys, erase=erase) if keys else _chosen(store, which)
        found = [key async for key in chosen]
        if not found and erase:
            # Of an erasure that failed half way, the traces are left and no session.
            await store.vacuum()
            raise CliError("no session has such a key; what was deleted before is erased", code=FAILED)
        if not found:
            raise CliError("no session has such a key", code=FAILED)
        if not yes:
            await _confirm(found, erase=erase)
        for key in found:
            await store.delete(key)
        if erase:
            # Takes along what was deleted before.
            await store.erase(found[-1])
    _say(where, RemovalReport(sessions=len(found), erased=erase), f"{len(found):,} sessions deleted")
    return OK


async def _confirm(keys: Sequence[str], *, erase: bool) -> None:
    if not is_interactive():
        raise CliError("nobody is there to ask: confirm with --yes")
    what = f"session {_shown_key(keys[0])}" if len(keys) == 1 else f"{len(keys):,} sessions"
    print_error(f"{'Erase' if erase else 'Delete'} {what}? [y/N] ")
    answer = await trio.to_thread.run_sync(open_stdin().readline, abandon_on_cancel=True)
    if answer.strip().lower() not in {b"y", b"yes"}:
        raise CliError("nothing was deleted", code=FAILED)


# What they share


@asynccontextmanager
async def _open_store(path: Path) -> AsyncIterator[SqliteStore]:
    """A store that is there already: looking at nothing must not make a file."""
    if not await trio.to_thread.run_sync(partial(Path.exists, path)):
        raise CliError(f"{path}: there is no such file")
    await _refuse_other(path)
    async with SqliteStore(path) as store:
        yield store


async def _refuse_other(path: Path) -> None:
    """A directory, or what is no file at all, cannot be a store."""
    if await trio.to_thread.run_sync(lambda: path.exists() and not path.is_file()):
        raise CliError(f"{path}: is no file")


async def _named(store: SqliteStore, keys: Sequence[str], *, erase: bool = False) -> AsyncIterator[str]:
    for key in dict.fromkeys(keys):
        if await store.version(key):
            yield key
        elif erase:
            report(f"there is no session {key!r}")
        else:
            raise CliError(f"there is no session {key!r}", code=FAILED)


async def _chosen(store: SqliteStore, which: Selection) -> AsyncIterator[str]:
    async for page in _pages(store, which):
        for session in page:
            yield session.key


def _say(where: StoreOptions, data: object, text: str) -> None:
    if where.json:
        print_json(data)
    else:
        print_error(text + "\n")
