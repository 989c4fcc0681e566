"""The SQLite store under SIGKILL: what was acknowledged is there, once and in order, and what was not is in doubt."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import crash_targets
import msgspec
import pytest
import trio

import gorouter_trio as gr
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores import SqliteStore
from gorouter_trio.testing import check_history
from gorouter_trio.testing.crash import (
    CallFault,
    Crash,
    CrashHarness,
    Kill,
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


def digest(entry: TurnAnswered) -> str:
    """The text of an answer, as it was acknowledged."""
    return crash_targets.digest(json.loads(bytes(entry.message))["content"])


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
            keys = await store.list_keys("s")
            return {key: [decode_log_entry(e) for e in (await store.load(key)).entries] for key in keys}

    def compare(self, crash: Crash, found: dict[str, list[object]]) -> list[str]:
        """What is wrong; empty when nothing is."""
        self.note(crash)
        problems = []
        self.in_doubt = 0
        for key, turns in self.acked.items():
            log = found.get(key, [])
            answers = [(e.turn_id, digest(e)) for e in log if isinstance(e, TurnAnswered)]
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


Look = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """No recovery before the test looks."""


class Tally(NamedTuple):
    """What a series of kills came to."""

    kills: int = 0
    acks: int = 0
    in_doubt: int = 0

    def __str__(self) -> str:
        return f"{self.kills:,} kills, {self.acks:,} acknowledged turns, 0 lost; {self.in_doubt} in doubt at the ends"


async def kill_sessions(path: Path, kills: Sequence[Kill], *, recover: Look = nothing) -> Tally:
    """Kill sessions on one file again and again; raises when a turn is lost, torn or doubled."""
    books = Books(path)

    async def reopen(number: int) -> dict[str, list[object]]:
        books.runs = number + 1
        await recover()
        return await books.read()

    async with open_crash_harness("crash_targets:take_turns", path=[HERE]) as harness:
        summary = await check_crashes(
            harness, kills=kills, args=lambda _number: [str(books.path)], reopen=reopen, compare=books.compare
        )
    assert summary.killed == summary.runs
    await ask_about_the_last(books)
    return Tally(summary.killed, summary.acks, books.in_doubt)


async def kill_often(directory: Path, rng: random.Random, *, times: int, files: int) -> Tally:
    """So many kills, on a few files one after the other, so that their logs do not become the longest part of it."""
    total = Tally()
    for number in range(files):
        kills = [draw_kill(rng, max_acks=30, max_delay_s=0.02) for _ in range(times // files)]
        found = await kill_sessions(directory / f"{number}.db", kills)
        total = Tally(*(sum(pair) for pair in zip(total, found, strict=True)))
    return total


async def kill_twice(directory: Path, rng: random.Random, *, times: int, files: int) -> str:
    """Kill sessions, and then what recovers from that, once or twice, before anybody looks."""
    killed = 0
    total = Tally()
    async with open_crash_harness("crash_targets:recover", path=[HERE]) as recovery:
        for number in range(files):
            path = directory / f"{number}.db"

            async def recover(path: Path = path) -> None:
                nonlocal killed
                for _ in range(rng.randint(1, 2)):
                    kill = draw_kill(rng, max_acks=2, max_delay_s=0.004)
                    killed += (await recovery.run(str(path), kill=kill)).killed

            kills = [draw_kill(rng, max_acks=20, max_delay_s=0.01) for _ in range(times // files)]
            found = await kill_sessions(path, kills, recover=recover)
            total = Tally(*(sum(pair) for pair in zip(total, found, strict=True)))
    # On a busy machine most recoveries are over before they are killed.
    assert killed > times // 10
    return f"{total}; {killed:,} kills of recoveries"


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


@pytest.mark.timeout(240)
async def test_kills_of_sessions(
    memory: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """100 SIGKILLs of a process with eight sessions on one file: no acknowledged turn is lost, torn or doubled."""
    record_property("figure", str(await kill_often(memory, rng, times=100, files=4)))


@pytest.mark.long
async def test_many_kills_of_sessions(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same with 1,000, on a disk."""
    record_property("figure", str(await kill_often(tmp_path, rng, times=1_000, files=10)))


async def test_kills_of_recoveries(
    memory: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """Killed again while it recovers, the store still has every acknowledged turn."""
    record_property("figure", await kill_twice(memory, rng, times=15, files=1))


@pytest.mark.long
async def test_many_kills_of_recoveries(
    tmp_path: Path, rng: random.Random, record_property: Callable[[str, object], None]
) -> None:
    """The same 1,000 times, on a disk."""
    record_property("figure", await kill_twice(tmp_path, rng, times=1_000, files=20))


WRITES = ["pwrite64", "fsync", "fdatasync", "openat", "ftruncate", "unlink", "close"]
LOOKS = ["pread64", "read", "write", "fcntl", "newfstatat", "mmap", "munmap"]


Found = dict[str, tuple[int, tuple[bytes, ...]]]
STEPS = list(crash_targets.CHANGES)
BEFORE: Found = {key.decode(): (version, entries) for key, version, entries in crash_targets.OLD_FILE}
AFTER: dict[str, tuple[str, tuple[int, tuple[bytes, ...]] | None]] = {
    "append": ("new", (1, (b"1", b"2"))),
    "rewrite": ("old", (3, (b"3",))),
    "delete": ("gone", None),
    "erase": ("erased", None),
}


def apply(found: Found, step: str) -> Found:
    """What the store holds after one more step."""
    if step not in AFTER:
        return found
    key, value = AFTER[step]
    kept = {name: held for name, held in found.items() if name != key}
    return kept if value is None else kept | {key: value}


def states() -> list[Found]:
    """What the store may hold after none, one, two ... of the steps."""
    after = [BEFORE]
    for step in STEPS:
        after.append(apply(after[-1], step))
    return after


async def read_store(path: Path) -> Found:
    async with SqliteStore(path) as store:
        assert [s.key for s in await store.list_sessions()] == list(await store.list_keys())
        found = {}
        for key in await store.list_keys():
            loaded = await store.load(key)
            found[key] = (loaded.version, tuple(loaded.entries))
            (told,) = await store.list_sessions(key, limit=1)
            assert (told.version, told.entries, told.bytes) == (
                loaded.version,
                len(loaded.entries),
                sum(map(len, loaded.entries)),
            )
        return found


def traces(tmp_path: Path, number: object) -> list[str]:
    """The files of a store that hold what was erased."""
    return [file.name for file in tmp_path.glob(f"{number}.db*") if crash_targets.CANARY in file.read_bytes()]


def forget(tmp_path: Path, number: object) -> None:
    for file in tmp_path.glob(f"{number}.db*"):
        file.unlink()


async def sweep_kills(syscall: str, tmp_path: Path) -> int:
    """Kill at each call in turn; returns at how many."""
    await crash_targets.make_old_file(str(tmp_path / "start.db"))
    start = (tmp_path / "start.db").read_bytes()

    def args(number: int) -> list[str]:
        (tmp_path / f"{number}.db").write_bytes(start)
        return [str(tmp_path / f"{number}.db")]

    async def check(number: int, crash: Crash) -> None:
        assert list(crash.acks) == STEPS[: len(crash.acks)]
        if "erase" in crash.acks:
            assert traces(tmp_path, number) == []
        found = await read_store(tmp_path / f"{number}.db")
        assert found in states()[len(crash.acks) : len(crash.acks) + 2]
        async with SqliteStore(tmp_path / f"{number}.db") as store:
            # Erasing again finishes what a kill cut off.
            await store.erase("erased")
            assert traces(tmp_path, number) == []
        forget(tmp_path, number)

    async with open_crash_harness("crash_targets:change_everything", path=[HERE]) as harness:
        return await kill_at_every_call(harness, syscall=syscall, args=args, check=check)


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("syscall", WRITES)
async def test_changes_at_every_call(
    syscall: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Killed at each call in turn of a migration, an append, a replacement, a deletion and an erasure, the store holds
    what the acknowledged steps made, or one step more.
    """
    record_property("figure", f"{await sweep_kills(syscall, tmp_path)} points of {syscall}")


@pytest.mark.long
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("syscall", LOOKS)
async def test_changes_at_every_other_call(
    syscall: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """The same at the calls that change nothing in a file."""
    record_property("figure", f"{await sweep_kills(syscall, tmp_path)} points of {syscall}")


# Calls that fail


async def check_fault(
    harness: CrashHarness, fault: CallFault, tmp_path: Path, start: bytes
) -> tuple[bool, Sequence[str]]:
    """One run with one fault; whether the fault was met, and what the run said."""
    path = tmp_path / "faulty.db"
    path.write_bytes(start)
    crash = await harness.run(str(path), kill=fault)
    assert crash.status == 0
    done = {ack for ack in crash.acks if " failed: " not in ack}
    if not fault.sticky:
        # The second time always works, in the same process.
        assert done == set(STEPS), crash.acks
    elif "erase" in done:
        assert traces(tmp_path, "faulty") == []
    found = await read_store(path)
    for step, (key, value) in AFTER.items():
        # Done, or failed and done or not, but never in part.
        allowed = [value] if step in done else [value, BEFORE.get(key)]
        assert found.pop(key, None) in allowed, (fault, step, crash.acks)
    assert list(found) == ["tenant:acme/principal:bob/1"]
    forget(tmp_path, "faulty")
    return len(crash.acks) != len(STEPS) or bool(done - set(STEPS)), crash.acks


async def sweep_faults(fault: CallFault, tmp_path: Path) -> tuple[int, set[str]]:
    """Let each call in turn fail, until several in a row were met by nobody; returns how many, and what was said."""
    await crash_targets.make_old_file(str(tmp_path / "start.db"))
    start = (tmp_path / "start.db").read_bytes()
    said: set[str] = set()
    calls = await count_calls(fault.syscall, tmp_path, start)
    async with open_crash_harness("crash_targets:change_under_faults", path=[HERE]) as harness:
        for nth in range(1, calls + 1):
            _, acks = await check_fault(harness, msgspec.structs.replace(fault, nth=nth), tmp_path, start)
            said.update(ack.partition(" failed: ")[2] for ack in acks)
    return calls, said - {""}


async def count_calls(syscall: str, tmp_path: Path, start: bytes) -> int:
    """How many calls the changes make when nothing fails."""
    (tmp_path / "count.db").write_bytes(start)
    log = tmp_path / "count.txt"
    code = (
        f"import crash_targets, trio; trio.run(crash_targets.change_everything, print, {str(tmp_path / 'count.db')!r})"
    )
    strace = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={syscall}", "-P", str(tmp_path / "count.db")]
    strace += ["-P", str(tmp_path / "count.db-wal"), "-P", str(tmp_path / "count.db-shm"), "-P", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    await trio.run_process([*strace, sys.executable, "-c", code], env=env, capture_stdout=True)
    forget(tmp_path, "count")
    return len(log.read_text().splitlines())


FAULTS = [
    CallFault(syscall=syscall, error=error, sticky=sticky)
    for syscall, errors in {
        "pwrite64": ["ENOSPC", "EIO"],
        "fdatasync": ["EIO", "ENOSPC"],
        "fsync": ["EIO"],
        "ftruncate": ["EIO", "ENOSPC"],
        "unlink": ["EIO"],
        "pread64": ["EIO"],
        "openat": ["EIO", "ENOSPC"],
    }.items()
    for error in errors
    for sticky in (False, True)
]
SHORT = [fault for fault in FAULTS if fault.syscall == "fdatasync" and fault.error == "EIO"]


def name_fault(fault: CallFault) -> str:
    return f"{fault.syscall} {fault.error} {'sticky' if fault.sticky else 'once'}"


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("fault", SHORT, ids=name_fault)
async def test_failing_syncs(fault: CallFault, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Whichever write to the disk fails, once or for good: a typed error, nothing in part, and the next one works."""
    calls, said = await sweep_faults(fault, tmp_path)
    assert said <= {"io", "full"}
    record_property("figure", f"{calls} points, said: {', '.join(sorted(said))}")


@pytest.mark.long
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in SHORT], ids=name_fault)
async def test_failing_calls(fault: CallFault, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The same for every call that reads, writes, opens, cuts or removes, with a full disk and a broken one."""
    calls, said = await sweep_faults(fault, tmp_path)
    assert said <= {"io", "full", "denied", "corrupt", "locked"}
    record_property("figure", f"{calls} points, said: {', '.join(sorted(said)) or 'nothing'}")
