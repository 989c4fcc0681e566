# ruff: noqa: ASYNC240 - the files are small
"""The SQLite store when the power goes: what was acknowledged is there after any loss that a disk allows."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import crash_targets
import pytest
from power import Call, Replay, trace, without_syncs, write_state

import gorouter_trio as gr
from gorouter_trio.stores import SqliteStore

pytestmark = [
    pytest.mark.net,  # processes, and real time
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs Linux"),
]

Found = dict[str, tuple[int, tuple[bytes, ...]]]


def states(start: Found, steps: list[Callable[[Found], Found]]) -> list[Found]:
    found = [start]
    for step in steps:
        found.append(step(found[-1]))
    return found


def appending(count: int = 40) -> list[Found]:
    """What `append_everywhere` leaves after none, one, two ... of its steps."""
    found: list[Found] = [{}]
    for number in range(count):
        key = f"s{number % 4}"
        version, entries = found[-1].get(key, (0, ()))
        entry = b"%d:" % number + b"y" * (9000 if number % 5 == 0 else 40)
        found.append({**found[-1], key: (version + 1, (*entries, entry))})
    found.append({**found[-1], "s1": (count // 4 + 1, (b"compacted",))})
    for key in ("s2", "s3"):
        found.append({name: value for name, value in found[-1].items() if name != key})
    return found


def changing() -> list[Found]:
    """What `change_everything` leaves."""
    start: Found = {key.decode(): (version, entries) for key, version, entries in crash_targets.OLD_FILE}
    return states(
        start,
        [
            lambda found: found,
            lambda found: found | {"new": (1, (b"1", b"2"))},
            lambda found: found | {"old": (3, (b"3",))},
            lambda found: {key: value for key, value in found.items() if key != "gone"},
            lambda found: {key: value for key, value in found.items() if key != "erased"},
        ],
    )


async def read(path: Path) -> Found:
    if not path.exists():
        return {}
    async with SqliteStore(path) as store:
        found = {}
        for key in await store.list_keys():
            loaded = await store.load(key)
            found[key] = (loaded.version, tuple(loaded.entries))
        return found


async def lose_power(
    replay: Replay, expected: list[Found], *, directory: Path, rng: random.Random, times: int, secret: tuple[int, bytes]
) -> list[str]:
    """What went wrong in so many losses; nothing is good. The secret must be gone after so many acknowledged steps."""
    problems = []
    for number in range(times):
        acked, files = replay.crash(rng)
        write_state(directory, files)
        if acked >= secret[0] and any(secret[1] in content for content in files.values()):
            problems.append(f"loss {number}: after {acked} steps, what was erased is on the disk")
        try:
            found = await read(directory / "store.db")
        except gr.StoreError as exc:
            problems.append(f"loss {number}: {exc}")
            continue
        if found not in expected[acked : acked + 2]:
            problems.append(f"loss {number}: after {acked} steps, found { ({k: v[0] for k, v in found.items()}) }")
    return problems


async def record(target: str, memory: Path, *, inject: str = "") -> tuple[list[Call], dict[str, bytes]]:
    """The trace of a run, and the file that it began with."""
    directory = memory / "traced"
    directory.mkdir()
    start = {}
    if target != "append_everywhere":
        await crash_targets.make_old_file(str(directory / "store.db"))
        start = {"store.db": (directory / "store.db").read_bytes()}
    return await trace(target, directory, inject=inject), start


RUNS = {
    "append_everywhere": (appending, (43, b"3:yyyyyyyy")),
    "change_everything": (changing, (5, crash_targets.CANARY)),
}


async def check_losses(target: str, memory: Path, rng: random.Random, *, times: int) -> str:
    calls, start = await record(target, memory)
    make, secret = RUNS[target]
    replay = Replay(calls, memory / "traced", start)
    problems = await lose_power(replay, make(), directory=memory / "state", rng=rng, times=times, secret=secret)
    assert problems == []
    return f"{times:,} losses of power at {replay.moments} moments, 0 acknowledged changes lost"


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("target", RUNS)
async def test_losses_of_power(target, memory, rng, record_property) -> None:
    """Whichever writes since the last sync reached the disk, whole, torn or out of order, every step is there whole."""
    record_property("figure", await check_losses(target, memory, rng, times=80))


@pytest.mark.long
@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("target", RUNS)
async def test_many_losses_of_power(target, memory, rng, record_property) -> None:
    """The same 25,000 times."""
    record_property("figure", await check_losses(target, memory, rng, times=25_000))


@pytest.mark.usefixtures("tracing")
async def test_a_store_that_would_not_sync_is_found_out(memory, rng) -> None:
    """The same trace without its syncs loses what was acknowledged: these tests can fail."""
    calls, start = await record("append_everywhere", memory)
    replay = Replay(without_syncs(calls), memory / "traced", start)
    problems = await lose_power(replay, appending(), directory=memory / "state", rng=rng, times=40, secret=(99, b"-"))
    assert len(problems) > 10


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("nth", [1, 3, 5])
async def test_losses_of_power_after_a_sync_that_failed(nth, memory, rng, record_property) -> None:
    """What a failed sync did not write is lost although later ones succeed, and still nothing acknowledged is."""
    calls, start = await record("change_under_faults", memory, inject=f"fdatasync:error=EIO:when={nth}")
    assert any(call.failed for call in calls)
    replay = Replay(calls, memory / "traced", start)
    for number in range(40):
        _, files = replay.crash(rng)
        write_state(memory / "state", files)
        found = await read(memory / "state" / "store.db")
        assert found in changing(), number
    # At the end all of it was acknowledged.
    for _ in range(20):
        files = replay.end().crash(rng)
        write_state(memory / "state", files)
        assert await read(memory / "state" / "store.db") == changing()[-1]
