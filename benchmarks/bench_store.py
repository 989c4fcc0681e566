"""What durable appends and turns cost: the SQLite store with group commits, without them, and SQLite used plainly.

    python benchmarks/bench_store.py --json benchmarks/results/store.json

Every append is one entry of 400 bytes to a session of the writer's own, durable when it returns (`synchronous=FULL`).
"Plain" is what is usually written: the same statements on one connection, each append in a transaction of its own,
through `trio.to_thread`. The rounds are interleaved, each on a new file beside this script's temporary directory.

A turn is `session.ask` against an API simulated in this process that answers at once: two appends and everything
around them. An activation is the first `session.history` of a session that nobody has used since the client was opened,
in a store of many, while another session takes turns.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sqlite3
import sys
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import _harness
import trio

sys.path.insert(0, str(_harness.HERE.parent))

from gorouter_trio.abc import StoredHistory
from gorouter_trio.client import open_client
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores import MemoryStore, SqliteStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gorouter_trio.abc import HistoryStore
    from gorouter_trio.client import Client
    from gorouter_trio.session.directory import SessionRef

_ENTRY = b"x" * 400
_GROUPED = "grouped"
_SQL = (
    "UPDATE sessions SET version = version + 1 WHERE key = ? AND version = ?",
    "INSERT INTO sessions (key, version) VALUES (?, 1)",
    "INSERT INTO entries (key, number, data) VALUES (?, ?, ?)",
)


class PlainStore:
    """One connection, one lock, one transaction an append."""

    def __init__(self, path: pathlib.Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=WAL").fetchall()
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("CREATE TABLE sessions (key TEXT PRIMARY KEY, version INTEGER)")
        self._connection.execute(
            "CREATE TABLE entries (key TEXT, number INTEGER, data BLOB, PRIMARY KEY (key, number))"
        )
        self._lock = trio.Lock()

    async def append(self, key: str, entries: list[bytes], *, expected_version: int) -> int:
        """Add one entry."""
        async with self._lock:
            return await trio.to_thread.run_sync(self._append, key, entries[0], expected_version)

    def _append(self, key: str, entry: bytes, version: int) -> int:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        run(_SQL[0], (key, version)) if version else run(_SQL[1], (key,))
        run(_SQL[2], (key, version, entry))
        run("COMMIT")
        return version + 1

    async def load(self, key: str) -> StoredHistory:
        """The entries of one session."""
        async with self._lock:
            query = partial(self._connection.execute, "SELECT data FROM entries WHERE key = ? ORDER BY number", (key,))
            rows = await trio.to_thread.run_sync(lambda: query().fetchall())
        return StoredHistory(len(rows), [data for (data,) in rows])

    async def aclose(self) -> None:
        """Close the file."""
        self._connection.close()


class Subject(NamedTuple):
    """A store to measure."""

    name: str
    label: str
    make: Callable[[pathlib.Path], HistoryStore | PlainStore]


SUBJECTS = (
    Subject(_GROUPED, "**SqliteStore**", SqliteStore),
    Subject("single", "SqliteStore without groups", partial(SqliteStore, max_group=1)),
    Subject("plain", "sqlite3 through `trio.to_thread`", PlainStore),
    Subject("memory", "MemoryStore, which keeps nothing", lambda _path: MemoryStore()),
)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _write(store: HistoryStore | PlainStore, writer: int, appends: int) -> None:
    for version in range(appends):
        await store.append(f"session {writer}", [_ENTRY], expected_version=version)


async def measure_appends(subject: Subject, *, writers: int, appends: int) -> tuple[float, float]:
    """Wall and CPU µs an append."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=_harness.HERE))
        store = subject.make(pathlib.Path(directory) / "store.db")
        stack.push_async_callback(store.aclose)
        await store.append("first", [_ENTRY], expected_version=0)
        wall, cpu = time.perf_counter(), _cpu_s()
        async with trio.open_nursery() as nursery:
            for writer in range(writers):
                nursery.start_soon(_write, store, writer, appends)
        wall, cpu = time.perf_counter() - wall, _cpu_s() - cpu
        total = writers * appends
        return 1e6 * wall / total, 1e6 * cpu / total


async def measure_loads(subject: Subject, *, sessions: int, entries: int) -> float:
    """Wall µs, the 99th percentile of loading one session of `entries` while others are appended to."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=_harness.HERE))
        store = subject.make(pathlib.Path(directory) / "store.db")
        stack.push_async_callback(store.aclose)
        async with trio.open_nursery() as nursery:
            for writer in range(sessions):
                nursery.start_soon(_write, store, writer, entries)
        times = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_write, store, sessions, 1_000_000)
            for number in range(sessions):
                began = time.perf_counter()
                await store.load(f"session {number}")
                times.append(time.perf_counter() - began)
            nursery.cancel_scope.cancel()
        return 1e6 * sorted(times)[len(times) * 99 // 100]


@asynccontextmanager
async def _open_client(store: HistoryStore) -> AsyncIterator[Client]:
    async with (
        open_simulated_network(Simulator()) as network,
        open_client(
            api_key="sk-bench", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
    ):
        yield client


async def _talk(session: SessionRef, turns: int) -> None:
    for _ in range(turns):
        await session.ask("Go on.")


async def measure_turns(subject: Subject, *, sessions: int, turns: int) -> float:
    """Wall µs a turn, with so many sessions at a time."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=_harness.HERE))
        store = cast("HistoryStore", subject.make(pathlib.Path(directory) / "store.db"))
        stack.push_async_callback(store.aclose)
        client = await stack.enter_async_context(_open_client(store))
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(sessions):
                nursery.start_soon(_talk, client.session(f"session {number}"), turns)
        return 1e6 * (time.perf_counter() - began) / (sessions * turns)


async def measure_activations(subject: Subject, *, sessions: int, turns: int) -> list[float]:
    """Wall µs of each activation of a session of `turns` turns, while another takes turns."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=_harness.HERE))
        store = cast("HistoryStore", subject.make(pathlib.Path(directory) / "store.db"))
        stack.push_async_callback(store.aclose)
        async with _open_client(store) as client:
            await _talk(client.session("first"), turns)
        entries = (await store.load("first")).entries
        async with trio.open_nursery() as nursery:
            for number in range(sessions):
                append = partial(store.append, f"session {number}", entries, expected_version=0)
                nursery.start_soon(append)
        client = await stack.enter_async_context(_open_client(store))
        times = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_talk, client.session("busy"), 1_000_000)
            for number in range(sessions):
                began = time.perf_counter()
                await client.session(f"session {number}").history()
                times.append(1e6 * (time.perf_counter() - began))
            nursery.cancel_scope.cancel()
        return sorted(times)


async def measure(args: argparse.Namespace) -> list[_harness.Table]:
    """All tables, rounds interleaved."""
    tables = {}
    for writers in args.writers:
        for unit in ("wall", "CPU"):
            title = f"{unit} of a durable append, {writers} writers at a time"
            tables[writers, unit] = _harness.Table(title, "µs", _GROUPED, [], subject="store")
    loads = _harness.Table(
        f"99th percentile of loading a session of {args.appends} entries, with one writer",
        "µs",
        _GROUPED,
        [],
        subject="store",
    )
    turns = _harness.Table(f"wall of a turn, {args.talks} sessions at a time", "µs", _GROUPED, [], subject="store")
    cold = _harness.Table(
        f"99th percentile of activating one of {args.cold:,} sessions of 20 turns, with one at work",
        "µs",
        _GROUPED,
        [],
        subject="store",
    )
    for table in (*tables.values(), loads):
        table.rows = [_harness.Row(s.name, s.label) for s in SUBJECTS]
    with_sessions = [s for s in SUBJECTS if s.make is not PlainStore]
    for table in (turns, cold):
        table.rows = [_harness.Row(s.name, s.label) for s in with_sessions]
    for _ in range(args.rounds):
        for position, subject in enumerate(with_sessions):
            await measure_sessions(subject, args, turns=turns.rows[position], cold=cold.rows[position])
        for position, subject in enumerate(SUBJECTS):
            for writers in args.writers:
                figures = await measure_appends(subject, writers=writers, appends=args.appends)
                for unit, value in zip(("wall", "CPU"), figures, strict=True):
                    row = tables[writers, unit].rows[position]
                    row.values.append(round(value, 1))
                    row.requests += writers * args.appends
            row = loads.rows[position]
            row.values.append(round(await measure_loads(subject, sessions=args.sessions, entries=args.appends), 1))
            row.requests += args.sessions
    return [*tables.values(), loads, turns, cold]


async def measure_sessions(
    subject: Subject, args: argparse.Namespace, *, turns: _harness.Row, cold: _harness.Row
) -> None:
    """One round of turns and activations; what is no history store has no sessions."""
    turns.values.append(round(await measure_turns(subject, sessions=args.talks, turns=args.appends), 1))
    turns.requests += args.talks * args.appends
    times = await measure_activations(subject, sessions=args.cold, turns=20)
    cold.values.append(round(times[len(times) * 99 // 100], 1))
    cold.requests += args.cold


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, few appends")
    args = parser.parse_args()
    args.appends, args.writers, args.sessions, args.talks, args.cold = 20, (1, 16, 256), 200, 256, 2_000
    if args.quick:
        args.rounds, args.appends, args.writers, args.sessions, args.talks, args.cold = 1, 4, (4,), 4, 4, 8
    report = _harness.report("store", trio.run(measure, args), distributions=["gorouter_trio", "trio"])
    report.versions["sqlite"] = sqlite3.sqlite_version
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
