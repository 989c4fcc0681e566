# ruff: noqa: ASYNC240 - the files are small
"""The SQLite store under SIGKILL: what was acknowledged is there, once and in order, and what was not is in doubt."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import crash_targets
import pytest

import gorouter_trio as gr
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores import SqliteStore
from gorouter_trio.testing import check_history
from gorouter_trio.testing.crash import (
    Crash,
    Kill,
    can_trace,
    check_crashes,
    draw_kill,
    kill_at_every_call,
    open_crash_harness,
)
from gorouter_trio.wire.codec import decode_log_entry
from gorouter_trio.wire.journal import TurnAbandoned, TurnAnswered, TurnStarted

HERE = Path(crash_targets.__file__).parent

pytestmark = [
    pytest.mark.net,  # processes, and real time
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]


class Books:
    """What was acknowledged over all runs, and what the store is found to hold."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.acked: dict[str, list[tuple[str, str]]] = {}
        self.in_doubt = 0
        self.runs = 0

    def note(self, crash: Crash) -> None:
        """Add the acknowledgements of one run."""
        for ack in crash.acks:
            key, turn_id, text = json.loads(ack)
            self.acked.setdefault(key, []).append((turn_id, text))

    async def read(self) -> dict[str, list[object]]:
        """The log of each session."""
        async with SqliteStore(self.path) as store:
            keys = await store.list_keys()
            return {key: [decode_log_entry(e) for e in (await store.load(key)).entries] for key in keys}

    def compare(self, crash: Crash, found: dict[str, list[object]]) -> list[str]:
        """What is wrong; empty when nothing is."""
        self.note(crash)
        problems = []
        self.in_doubt = 0
        for key, turns in self.acked.items():
            log = found.get(key, [])
            answers = [(e.turn_id, json.loads(bytes(e.message))["content"]) for e in log if isinstance(e, TurnAnswered)]
            started = [e.turn_id for e in log if isinstance(e, TurnStarted)]
            ended = [e.turn_id for e in log if isinstance(e, (TurnAnswered, TurnAbandoned))]
            # An answer that was stored just before the kill has no acknowledgement; the next run began after it.
            mine = [answer for answer in answers if answer in turns]
            if mine != turns:
                problems.append(f"{key}: acknowledged {turns[-3:]}, found {answers[-3:]}")
            if len(set(started)) != len(started) or len(set(ended)) != len(ended):
                problems.append(f"{key}: a turn is there twice")
            if ended != started and ended != started[:-1]:
                problems.append(f"{key}: the turns {started[-3:]} ended as {ended[-3:]}")
            if len(answers) - len(mine) > self.runs + 1:
                problems.append(f"{key}: more answers than can have been under way")
            self.in_doubt += ended != started
        return problems


async def kill_sessions(tmp_path: Path, kills: Sequence[Kill], *, record: Callable[[str, object], None]) -> None:
    books = Books(tmp_path / "histories.db")

    async def reopen(number: int) -> dict[str, list[object]]:
        books.runs = number + 1
        return await books.read()

    async with open_crash_harness("crash_targets:take_turns", path=[HERE]) as harness:
        summary = await check_crashes(
            harness, kills=kills, args=lambda _number: [str(books.path)], reopen=reopen, compare=books.compare
        )
    assert summary.killed == summary.runs
    await ask_about_the_last(books)
    record("figure", f"{summary.killed} kills, {summary.acks:,} acknowledged turns, 0 lost; {books.in_doubt} in doubt")


async def ask_about_the_last(books: Books) -> None:
    """The turns that the last kill cut off are in doubt, once, and every history goes on."""
    logs = await books.read()
    async with (
        SqliteStore(books.path) as store,
        open_simulated_network(Simulator()) as network,
        gr.open_client(
            api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
    ):
        for key, log in logs.items():
            session = client.session(key)
            last = log[-1]
            if isinstance(last, TurnStarted):
                with pytest.raises(gr.TurnInDoubtError) as caught:
                    await session.ask("again", turn_id=last.turn_id)
                assert caught.value.maybe_billed
            else:
                assert isinstance(last, (TurnAnswered, TurnAbandoned))
            assert (await session.ask("and now?")).text
            history = [entry.message for entry in await session.history()]
            assert check_history(history) == []


async def test_kills_of_sessions(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """100 SIGKILLs of a process with eight sessions on one file: no acknowledged turn is lost, torn or doubled."""
    kills = [draw_kill(rng, max_acks=30, max_delay_s=0.02) for _ in range(100)]
    await kill_sessions(tmp_path, kills, record=record_property)


@pytest.mark.long
async def test_many_kills_of_sessions(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same with 1,000."""
    kills = [draw_kill(rng, max_acks=30, max_delay_s=0.02) for _ in range(1_000)]
    await kill_sessions(tmp_path, kills, record=record_property)


SYSCALLS = ["pwrite64", "fsync", "fdatasync", "openat", "ftruncate", "unlink", "close"]


@pytest.fixture
async def tracing() -> None:
    if not await can_trace():
        pytest.skip("strace is not installed, or may not trace here")


STEPS = ["append", "rewrite", "delete", "erase"]
BEFORE = {"old": (2, (b"1", b"2")), "gone": (1, (b"x" * 9000,)), "erased": (1, (b"the canary sings",))}


def states() -> list[dict[str, tuple[int, tuple[bytes, ...]]]]:
    """What the store may hold after none, one, two ... of the steps."""
    after = [dict(BEFORE)]
    after.append(after[-1] | {"new": (1, (b"1", b"2"))})
    after.append(after[-1] | {"old": (3, (b"3",))})
    after.append({key: value for key, value in after[-1].items() if key != "gone"})
    after.append({key: value for key, value in after[-1].items() if key != "erased"})
    return after


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("syscall", SYSCALLS)
async def test_changes_at_every_call(
    syscall: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at each call in turn, the store holds what the acknowledged steps made, or one step more."""
    async with open_crash_harness("crash_targets:change_everything", path=[HERE]) as harness:
        await crash_targets.fill_for_changes(str(tmp_path / "start.db"))
        start = (tmp_path / "start.db").read_bytes()

        def args(number: int) -> list[str]:
            (tmp_path / f"{number}.db").write_bytes(start)
            return [str(tmp_path / f"{number}.db")]

        async def check(number: int, crash: Crash) -> None:
            assert list(crash.acks) == STEPS[: len(crash.acks)]
            async with SqliteStore(tmp_path / f"{number}.db") as store:
                found = {}
                for key in await store.list_keys():
                    loaded = await store.load(key)
                    found[key] = (loaded.version, tuple(loaded.entries))
                assert found in states()[len(crash.acks) : len(crash.acks) + 2]
                # Erasing again finishes what a kill cut off.
                await store.erase("erased")
                for file in tmp_path.glob(f"{number}.db*"):
                    assert b"canary" not in file.read_bytes()
            for file in tmp_path.glob(f"{number}.db*"):
                file.unlink()

        points = await kill_at_every_call(harness, syscall=syscall, args=args, check=check)
        record_property("figure", f"{points} points of {syscall}")


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("syscall", ["pwrite64", "fsync", "openat"])
async def test_migrations_at_every_call(
    syscall: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at each call in turn, the file has taken a number of whole steps, and takes the rest when opened again."""
    async with (
        open_crash_harness("crash_targets:migrate", path=[HERE]) as harness,
        open_crash_harness("crash_targets:migrate", path=[HERE]) as again,
    ):

        async def check(number: int, crash: Crash) -> None:
            path = tmp_path / f"{number}.db"
            assert not crash.acks or whole(path) == [(1, 2), (2, 4)]
            assert (await again.run(str(path))).acks == ("migrated",)
            assert whole(path) == [(1, 2), (2, 4)]

        points = await kill_at_every_call(
            harness, syscall=syscall, args=lambda number: [str(tmp_path / f"{number}.db")], check=check
        )
        record_property("figure", f"{points} points of {syscall}")


def whole(path: Path) -> list[tuple[int, int]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT a, b FROM t").fetchall()
    finally:
        connection.close()
