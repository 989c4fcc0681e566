# ruff: noqa: ASYNC221, ASYNC240 - the files are small, and the commands are over at once
"""The SQLite store on disks that are full, read-only or broken, and on files of older formats and hidden text."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import crash_targets
import pytest

import gorouter_trio as gr
from gorouter_trio.abc import StoredSession
from gorouter_trio.stores import SqliteStore
from gorouter_trio.transport import sqlite as transport

Found = dict[str, tuple[int, tuple[bytes, ...]]]


async def read(store: SqliteStore) -> Found:
    found = {}
    for key in await store.list_keys():
        loaded = await store.load(key)
        found[key] = (loaded.version, tuple(loaded.entries))
    return found


# --- file systems of their own ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(path)]
    may_mount = os.geteuid() == 0 and shutil.which("mount") is not None
    if not may_mount or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


async def fill_and_free(disk: Path, *, cycles: int) -> str:
    """Append until the disk is full, free some, go on, in one process; says how often, and what was kept meanwhile."""
    ballast = disk / "ballast"
    kept = 0
    # To rewrite the file there is no room.
    async with SqliteStore(disk / "h.db", erase_rewrites=False) as store:
        for cycle in range(cycles):
            ballast.write_bytes(b"\0" * 300_000)
            written = await fill_up(store, cycle)
            kept += len(written)
            assert sorted(await store.list_keys()) == sorted(written)
            ballast.unlink()
            # There is room again, and the same store goes on.
            first = written[0]
            version = await store.version(first)
            assert await store.append(first, [b"y"], expected_version=version) == version + 1
            assert (await store.load(first)).entries[1:] == (b"y",)
            for key in written:
                # Which empties the log as well: a small disk has no room for both.
                assert await store.erase(key)
    async with SqliteStore(disk / "h.db") as store:
        assert await read(store) == {}
    check_file(disk / "h.db")
    return f"{cycles} cycles, {kept:,} appends kept"


async def fill_up(store: SqliteStore, cycle: int) -> list[str]:
    """Append to one session after the other until it failed three times; the keys of those that are there."""
    written: list[str] = []
    full = 0
    while full < 3:
        key = f"{cycle}-{len(written)}"
        try:
            await store.append(key, [b"x" * 5_000], expected_version=0)
            written.append(key)
        except gr.StoreError as exc:
            assert exc.kind == "full"  # noqa: PT017 - the others are successes
            full += 1
            assert await store.version(key) == 0
    return written


def check_file(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()


async def test_a_full_disk_again_and_again(small_disk, record_property) -> None:
    """Each time it is full the error says so, nothing is lost, and the next append works without a restart."""
    record_property("figure", await fill_and_free(small_disk, cycles=5))


@pytest.mark.long
async def test_a_full_disk_a_hundred_times(small_disk, record_property) -> None:
    """The same a hundred times."""
    record_property("figure", await fill_and_free(small_disk, cycles=100))


async def test_a_disk_that_became_read_only(small_disk) -> None:
    """Reading goes on, writing says why it does not, and works again afterwards."""
    async with SqliteStore(small_disk / "h.db") as store:
        await store.append("k", [b"1"], expected_version=0)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    async with SqliteStore(small_disk / "h.db") as store, SqliteStore(small_disk / "new.db") as new:
        for made in (store, new):
            with pytest.raises(gr.StoreError, match="cannot be opened or written") as caught:
                await made.append("k", [b"2"], expected_version=1)
            assert caught.value.kind == "denied"
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        assert await store.append("k", [b"2"], expected_version=1) == 2


# --- statements that fail ---------------------------------------------------------------------------------------------


class Disk:
    """Lets the `nth` statement of all connections fail, before or after it was carried out."""

    def __init__(self, *, nth: int, error: str, sticky: bool, after: bool) -> None:
        self.nth, self.error, self.sticky, self.after = nth, error, sticky, after
        self.count = 0
        self.was_met = False

    def run(self, work: Callable[[], sqlite3.Cursor]) -> sqlite3.Cursor:
        self.count += 1
        fails = self.count >= self.nth if self.sticky else self.count == self.nth
        if fails and not self.after:
            self.fail()
        result = work()
        if fails:
            # As a statement that has failed is.
            result.close()
            self.fail()
        return result

    def fail(self) -> None:
        self.was_met = True
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = self.error
        raise error

    def connect(self, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        disk = self

        class Connection(sqlite3.Connection):
            def execute(self, *args: Any) -> sqlite3.Cursor:
                return disk.run(partial(super().execute, *args))

            def executemany(self, *args: Any) -> sqlite3.Cursor:
                return disk.run(partial(super().executemany, *args))

        connection: sqlite3.Connection = CONNECT(*args, factory=Connection, **kwargs)
        return connection


CONNECT = sqlite3.connect
AFTER = {
    "append": ("new", (1, (b"1", b"2"))),
    "rewrite": ("old", (3, (b"3",))),
    "delete": ("gone", None),
    "erase": ("erased", None),
}
BEFORE: Found = {key.decode(): (version, entries) for key, version, entries in crash_targets.OLD_FILE}


async def change_on(disk: Disk, path: Path) -> dict[str, str]:
    """What became of each change of a file of the first format: "done", or the kind of its error."""
    said = {}
    async with SqliteStore(path, busy_s=0.01) as store:
        for name, change in crash_targets.CHANGES.items():
            try:
                await change(store)
                said[name] = "done"
            except gr.StoreError as exc:
                said[name] = exc.kind
        # The disk is well again, and the same store goes on.
        disk.nth, disk.sticky = -1, False
        found = await read(store)
        for name, (key, value) in AFTER.items():
            allowed = [value] if said[name] == "done" else [value, BEFORE.get(key)]
            assert found.get(key) in allowed, (name, said)
        version = await store.version("afterwards")
        assert await store.append("afterwards", [b"1"], expected_version=version) > version
    check_file(path)
    return said


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize(
    ("error", "after"), [("SQLITE_IOERR_FSYNC", False), ("SQLITE_IOERR_FSYNC", True), ("SQLITE_FULL", False)]
)
async def test_each_statement_fails(error, after, sticky, tmp_path, monkeypatch, record_property) -> None:
    """Whichever statement fails, of opening, migrating, writing or erasing: a typed error, nothing in part, and on."""
    await crash_targets.make_old_file(str(tmp_path / "start.db"))
    start = (tmp_path / "start.db").read_bytes()
    nth = 0
    while True:
        nth += 1
        disk = Disk(nth=nth, error=error, sticky=sticky, after=after)
        monkeypatch.setattr(sqlite3, "connect", disk.connect)
        path = tmp_path / f"{nth}.db"
        path.write_bytes(start)
        said = await change_on(disk, path)
        assert set(said.values()) <= {"done", "io" if "IOERR" in error else "full"}
        path.unlink()
        if not disk.was_met:
            assert set(said.values()) == {"done"}
            break
    record_property("figure", f"{nth} statements")
    assert nth > 40


# --- formats ----------------------------------------------------------------------------------------------------------


async def test_a_file_of_the_first_format(tmp_path) -> None:
    """It is brought up to date: sizes are counted, owners have columns, times are unknown until the next change."""
    path = tmp_path / "h.db"
    await crash_targets.make_old_file(str(path))
    async with SqliteStore(path, wall=lambda: 9.0) as store:
        assert await read(store) == BEFORE
        assert list(await store.list_sessions("o")) == [StoredSession("old", 2, 2, 2, None)]
        await store.append("old", [b"345"], expected_version=2)
        assert list(await store.list_sessions("o")) == [StoredSession("old", 3, 3, 5, 9.0)]
    connection = sqlite3.connect(path)
    owners = connection.execute("SELECT tenant, principal FROM sessions WHERE tenant != ''").fetchall()
    assert owners == [("acme", "bob")]
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    plan = connection.execute(
        "EXPLAIN QUERY PLAN SELECT key FROM sessions WHERE tenant = 'acme' AND tenant != ''"
    ).fetchall()
    assert "sessions_by_owner" in str(plan)
    connection.close()


async def test_entries_of_a_newer_format(tmp_path) -> None:
    """A session that a later version has written to is not read half; the others are."""
    path = tmp_path / "h.db"
    async with SqliteStore(path) as store:
        for key in ("k", "other"):
            await store.append(key, [b"1"], expected_version=0)
        await store._file.write(lambda c: c.execute("UPDATE sessions SET format = 2 WHERE key = x'6b'"), subject="k")
        with pytest.raises(gr.StoreError, match="newer version") as caught:
            await store.load("k")
        assert caught.value.kind == "newer"
        assert (await store.load("other")).version == 1
        await store.append("k", [b"2"], expected_version=1)
        with pytest.raises(gr.StoreError, match="newer version"):
            await store.load("k")
        # What replaces everything is ours again.
        await store.rewrite("k", [b"3"], expected_version=2)
        assert (await store.load("k")).entries == (b"3",)


# --- privacy ----------------------------------------------------------------------------------------------------------


async def test_every_directory_made_is_private(tmp_path) -> None:
    """Not only the last one."""
    old = os.umask(0)
    try:
        async with SqliteStore(tmp_path / "a" / "b" / "c" / "h.db") as store:
            await store.append("k", [b"1"], expected_version=0)
            for file in (tmp_path / "a").rglob("*"):
                assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    finally:
        os.umask(old)


async def test_a_link_that_comes_between_is_refused(tmp_path, monkeypatch) -> None:
    """The file is looked at again once it is open."""
    path, target = tmp_path / "h.db", tmp_path / "target.db"
    async with SqliteStore(target) as store:
        await store.append("k", [b"1"], expected_version=0)
    before = target.read_bytes()

    def swap(*_args: object) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    monkeypatch.setattr(transport, "_make_directories", swap)
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError, match="symbolic link"):
            await store.append("k", [b"2"], expected_version=1)
    assert target.read_bytes() == before


async def erase_at_random(rng: random.Random, directory: Path) -> int:
    """Random changes of sessions with a mark each; returns how many erasures left no trace of it in any file."""
    versions: dict[str, int] = {}
    erased = 0
    async with SqliteStore(directory / "h.db") as store:
        for _ in range(rng.randrange(20, 120)):
            mark = f"canary{rng.randrange(8)}"
            key = mark + "x" * rng.choice([0, 5, 300])
            step = rng.choices(["append", "rewrite", "delete", "erase"], weights=[70, 10, 8, 12])[0]
            entries = [mark.encode() * rng.choice([1, 3, 30, 200, 1500]) for _ in range(rng.choice([1, 1, 2, 8]))]
            if step in {"append", "rewrite"}:
                write = store.append if step == "append" else store.rewrite
                versions[key] = await write(key, entries, expected_version=versions.get(key, 0))
                continue
            await (store.erase(key) if step == "erase" else store.delete(key))
            versions.pop(key, None)
            if step == "erase" and not any(other.startswith(mark) for other in versions):
                erased += 1
                for file in directory.iterdir():
                    assert mark.encode() not in file.read_bytes(), file.name
    return erased


async def test_erasing_among_others(tmp_path, rng, record_property) -> None:
    """Whatever was written around it, an erased session is in no file, not even in what a page no longer uses."""
    record_property("figure", f"{await erase_often(tmp_path, rng, times=4)} erasures")


@pytest.mark.long
async def test_erasing_among_others_for_long(tmp_path, rng, record_property) -> None:
    """The same 300 times."""
    record_property("figure", f"{await erase_often(tmp_path, rng, times=300)} erasures")


async def erase_often(tmp_path: Path, rng: random.Random, *, times: int) -> int:
    erased = 0
    for number in range(times):
        directory = tmp_path / str(number)
        directory.mkdir()
        erased += await erase_at_random(rng, directory)
        for file in directory.iterdir():
            file.unlink()
    return erased


async def test_a_reader_elsewhere_delays_an_erasure(tmp_path) -> None:
    """While another process reads the log its traces stay, and the error says so; again, and they are gone."""
    path = tmp_path / "h.db"
    async with SqliteStore(path, busy_s=0.05) as store:
        await store.append("k", [crash_targets.CANARY], expected_version=0)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM entries").fetchall()
        with pytest.raises(gr.StoreError, match="traces stay") as caught:
            await store.erase("k")
        assert caught.value.kind == "locked"
        assert (await store.load("k")).version == 0
        other.execute("COMMIT")
        other.close()
        assert not await store.erase("k")
        assert [file.name for file in tmp_path.iterdir() if crash_targets.CANARY in file.read_bytes()] == []
