# ruff: noqa: ASYNC240 - the files are small
"""The SQLite store: what a file adds to the promises that every store keeps."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import sqlite3
import stat
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import gorouter_trio as gr
from gorouter_trio.errors import StoreError
from gorouter_trio.stores import SqliteStore
from gorouter_trio.transport.sqlite import SqliteFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be."""
    return tmp_path / "histories.db"


async def fill(store: SqliteStore, key: str, count: int) -> None:
    """Append `count` entries, one at a time."""
    for number in range(count):
        await store.append(key, [str(number).encode()], expected_version=number)


async def test_it_is_all_there_again(path: Path) -> None:
    """What one store wrote, the next one reads."""
    async with SqliteStore(path) as store:
        await fill(store, "k", 20)
        await store.append("other", [b"x", b"", bytes(range(256))], expected_version=0)
    async with SqliteStore(path) as store:
        assert [int(entry) for entry in (await store.load("k")).entries] == list(range(20))
        assert (await store.load("other")).entries == (b"x", b"", bytes(range(256)))


async def test_files_are_private(tmp_path: Path) -> None:
    """The file, its log and a directory made for it can be read by their owner alone."""
    path = tmp_path / "new" / "deep" / "h.db"
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
        for file in path.parent.iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [file.name for file in path.parent.iterdir()] == ["h.db"]


async def test_no_thread_is_left(path: Path) -> None:
    """Closing ends both threads; a store that was never used has none."""
    before = threading.active_count()
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
        await store.load("k")
        assert threading.active_count() == before + 2
    # What a thread has to say before it ends is heard a moment before the system has ended it.
    with trio.fail_after(10):
        while threading.active_count() > before:
            await trio.sleep(0.01)
    async with SqliteStore(path):
        assert threading.active_count() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("path", value) for value in (None, "", ".", "/", "a\0b", "a\ud800", b"a.db", 5)),
        *(("busy_s", value) for value in (None, -1, math.nan, math.inf, "5")),
        *(("max_group", value) for value in (None, 0, 1.5)),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, name: str, value: object) -> None:
    """They are refused by name at once; they ended in a thread, or left the callers waiting."""
    settings: dict[str, Any] = {"path": tmp_path / "h.db", name: value}
    with pytest.raises(gr.ConfigError, match=f"{name}: must be"):
        SqliteStore(**settings)


async def test_a_system_without_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot be had fails the one call, with that; the next one tries again."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with SqliteStore(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(StoreError, match="no thread") as caught:
                await store.append("k", [b"1"], expected_version=0)
            assert caught.value.kind == "denied"
        with trio.fail_after(20):
            assert await store.append("k", [b"1"], expected_version=0) == 1
            assert (await store.load("k")).entries == (b"1",)


async def test_a_closed_store_says_so(path: Path) -> None:
    """Every call after closing is refused."""
    store = SqliteStore(path)
    await store.append("k", [b"1"], expected_version=0)
    await store.aclose()
    for call in (store.load, store.delete, store.erase, store.list_keys):
        with pytest.raises(gr.StoreError) as caught:
            await call("k")
        assert caught.value.kind == "closed"


async def test_writes_that_come_together_are_committed_together(path: Path) -> None:
    """A hundred writers share commits; conflicts among them hurt nobody else."""
    async with SqliteStore(path) as store:
        await store.append("taken", [b"0"], expected_version=0)
        conflicts = []

        async def write(number: int) -> None:
            try:
                await store.append("taken" if number % 10 == 0 else f"k{number}", [b"1"], expected_version=0)
            except gr.SessionConflictError:
                conflicts.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(write, number)
        statistics = store.statistics()
        assert statistics.writes == 101
        assert statistics.commits < 50
        assert sorted(conflicts) == list(range(0, 100, 10))
        assert len(await store.list_keys("k")) == 90


async def test_one_write_a_commit(path: Path) -> None:
    """`max_group` of 1 turns groups off."""
    async with SqliteStore(path, max_group=1) as store, trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(partial(store.append, f"k{number}", [b"1"], expected_version=0))
    assert store.statistics().commits == store.statistics().writes == 20


async def test_a_broken_write_does_not_take_its_group_along(path: Path) -> None:
    """A write that cannot be carried out fails alone."""
    async with SqliteStore(path) as store:
        await store.load("k")
        failures = []

        async def write(number: int) -> None:
            try:
                if number == 7:
                    await store._file.write(lambda c: c.execute("INSERT INTO nowhere VALUES (1)"), subject="k7")
                await store.append(f"k{number}", [b"1"], expected_version=0)
            except sqlite3.Error as exc:
                failures.append((number, exc))

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(write, number)
        assert [number for number, _ in failures] == [7]
        assert len(await store.list_keys()) == 19


async def test_a_cancelled_write_is_seen_by_the_next_load(path: Path) -> None:
    """Whoever loads after a write that was given up sees whether it happened, and it does not happen later."""
    async with SqliteStore(path) as store:
        version, cancelled = 0, 0
        for number in range(300):
            with trio.move_on_after(number % 20 * 2e-5) as scope:
                await store.append("k", [str(number).encode()], expected_version=version)
            cancelled += scope.cancelled_caught
            loaded = await store.load("k")
            assert loaded.version in {version, version + 1}
            assert loaded.version == version + 1 or scope.cancelled_caught
            version = loaded.version
            assert len(loaded.entries) == version
        assert cancelled


async def test_two_stores_on_one_file(path: Path) -> None:
    """The second writer of a version gets a conflict, and both see what is committed."""
    async with SqliteStore(path) as one, SqliteStore(path) as two:
        await one.append("k", [b"1"], expected_version=0)
        assert (await two.load("k")).version == 1
        await two.append("k", [b"2"], expected_version=1)
        with pytest.raises(gr.SessionConflictError):
            await one.append("k", [b"3"], expected_version=1)
        assert (await one.load("k")).entries == (b"1", b"2")


def write_in_another_process(path: str, count: int, results: multiprocessing.Queue[int]) -> None:
    """Append to one session until `count` appends succeeded, loading again after each conflict."""

    async def run() -> int:
        conflicts = written = 0
        async with SqliteStore(path) as store:
            while written < count:
                version = (await store.load("k")).version
                try:
                    await store.append("k", [f"{os.getpid()}:{written}".encode()], expected_version=version)
                    written += 1
                except gr.SessionConflictError:
                    conflicts += 1
        return conflicts

    results.put(trio.run(run))


async def test_two_processes_do_not_interleave(path: Path) -> None:
    """Each append of each process is there once, in that process's order."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=write_in_another_process, args=(str(path), 100, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        await trio.to_thread.run_sync(process.join)
        assert process.exitcode == 0
    async with SqliteStore(path) as store:
        loaded = await store.load("k")
    assert loaded.version == len(loaded.entries) == 200
    for process in processes:
        own = [entry.decode() for entry in loaded.entries if entry.startswith(b"%d:" % (process.pid or 0))]
        assert own == [f"{process.pid}:{number}" for number in range(100)]


def open_new_files(paths: list[str], barrier: threading.Barrier, results: multiprocessing.Queue[list[str]]) -> None:
    """For another process: write into each of these files, which do not exist yet, when the others do."""

    async def run() -> list[str]:
        failures = []
        for path in paths:
            await trio.to_thread.run_sync(barrier.wait)
            try:
                async with SqliteStore(path) as store:
                    await store.append(str(os.getpid()), [b"x"], expected_version=0)
            except gr.StoreError as exc:
                failures.append(str(exc))
        return failures

    results.put(trio.run(run))


async def test_processes_that_open_a_new_file_together(tmp_path: Path) -> None:
    """Each waits for the others: none takes the file for a stranger's, or for locked."""
    context = multiprocessing.get_context("spawn")
    results, barrier = context.Queue(), context.Barrier(3)
    paths = [str(tmp_path / f"{number}.db") for number in range(25)]
    processes = [context.Process(target=open_new_files, args=(paths, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    failures = [await trio.to_thread.run_sync(results.get) for _ in processes]
    for process in processes:
        await trio.to_thread.run_sync(process.join)
    assert failures == [[], [], []]
    for path in paths:
        async with SqliteStore(path) as store:
            assert len(await store.list_keys()) == 3


def traces(directory: Path, text: bytes) -> list[str]:
    """The files that hold `text`."""
    return [file.name for file in directory.iterdir() if text in file.read_bytes()]


async def test_erasing_leaves_no_trace(path: Path) -> None:
    """Nothing of an erased session is in any file while the store is open; others are untouched."""
    secret = b"the canary sings at dawn" * 50
    async with SqliteStore(path) as store:
        await store.append("canary-key", [secret] * 20, expected_version=0)
        await store.append("canary-key", [secret], expected_version=1)
        await store.append("other", [b"stays"], expected_version=0)
        assert traces(path.parent, secret[:24])
        assert await store.erase("canary-key")
        assert traces(path.parent, secret[:24]) == []
        assert traces(path.parent, b"canary-key") == []
        assert not await store.erase("canary-key")
        assert (await store.load("other")).entries == (b"stays",)


async def test_a_rewrite_leaves_no_trace_once_closed(path: Path) -> None:
    """What a rewrite replaced is gone from the file."""
    async with SqliteStore(path) as store:
        await store.append("k", [b"the canary sings at dawn"], expected_version=0)
        await store.rewrite("k", [b"new"], expected_version=1)
    assert traces(path.parent, b"canary sings") == []


# What goes wrong


async def test_a_locked_file(path: Path) -> None:
    """A process that holds the file longer than we wait is named as the reason; later everything works."""
    async with SqliteStore(path, busy_s=0.05) as store:
        await store.append("k", [b"1"], expected_version=0)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(gr.StoreError, match="another process holds the file") as caught:
            await store.append("k", [b"2"], expected_version=1)
        assert caught.value.kind == "locked"
        assert (await store.load("k")).version == 1
        holder.execute("ROLLBACK")
        holder.close()
        assert await store.append("k", [b"2"], expected_version=1) == 2


async def test_a_file_that_is_something_else(path: Path) -> None:
    """Neither a text nor somebody's database is overwritten."""
    path.write_text("These are my notes, not a database.\n" * 100)
    before = path.read_bytes()
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError) as caught:
            await store.append("k", [b"1"], expected_version=0)
    assert caught.value.kind == "foreign"
    assert path.read_bytes() == before
    path.unlink()
    with sqlite3.connect(path) as theirs:
        theirs.execute("CREATE TABLE notes (text)")
    theirs.close()
    before = path.read_bytes()
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError, match="something else") as caught:
            await store.load("k")
    assert caught.value.kind == "foreign"
    assert path.read_bytes() == before


async def test_a_file_of_a_newer_version(path: Path) -> None:
    """A format that we do not know is left alone."""
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version=99")
    newer.close()
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError, match="newer version") as caught:
            await store.load("k")
    assert caught.value.kind == "newer"


async def test_a_damaged_file_after_a_crash(path: Path) -> None:
    """A file that was not closed is checked when it is opened: damage is found before anything is written."""
    async with SqliteStore(path) as store:
        for number in range(40):
            await store.append(f"k{number}", [b"x" * 3000], expected_version=0)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for page in range(2, size // 4096):
            file.seek(page * 4096)
            file.write(b"\xff" * 64)
    (path.parent / f"{path.name}-wal").write_bytes(b"left behind")
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError, match="damaged") as caught:
            await store.append("new", [b"1"], expected_version=0)
    assert caught.value.kind == "corrupt"
    assert path.stat().st_size == size


async def test_a_link_is_refused(path: Path) -> None:
    """A symbolic link in the place of the file is not followed."""
    target = path.parent / "target.db"
    path.symlink_to(target)
    async with SqliteStore(path) as store:
        with pytest.raises(gr.StoreError, match="symbolic link"):
            await store.append("k", [b"1"], expected_version=0)
    assert not target.exists()


async def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    """A path through a file is refused by name."""
    (tmp_path / "file").write_text("")
    async with SqliteStore(tmp_path / "file" / "h.db") as store:
        with pytest.raises(gr.StoreError, match=r"h\.db") as caught:
            await store.load("k")
    assert caught.value.kind == "denied"


async def test_a_failed_commit_is_looked_into(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a disk error the file is opened and checked again before the next write, which works."""
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
        opened: list[bool] = []
        file = store._file._file
        real = file.open_for_writing

        def spy(*, check: bool) -> sqlite3.Connection:
            opened.append(check)
            return real(check=check)

        monkeypatch.setattr(file, "open_for_writing", spy)

        def fail(connection: sqlite3.Connection) -> None:
            raise OSError(errno.EIO, "I/O error")

        with pytest.raises(gr.StoreError):
            await store._file.write(fail, subject="k")
        assert await store.append("k", [b"2"], expected_version=1) == 2
        assert opened == [True]


async def test_a_thread_that_meets_the_unexpected_answers_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever: the error goes to the asker, and the next one is served."""
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
        monkeypatch.setattr(store._file._writer, "_write", lambda _jobs: [][0])
        with trio.fail_after(5), pytest.raises(IndexError):
            await store.append("k", [b"2"], expected_version=1)
        monkeypatch.undo()
        assert await store.append("k", [b"2"], expected_version=1) == 2


@pytest.mark.parametrize("is_surveyed", [False, True])
async def test_a_store_that_is_left_by_a_cancel_is_closed(path: Path, is_surveyed: bool) -> None:
    """Nobody waits for it, and it ends all the same: its threads, its files, and what was queued; the log last."""
    with trio.CancelScope() as scope:
        async with SqliteStore(path) as store:
            await store.append("k", [b"1"], expected_version=0)
            await store.load("k")
            if is_surveyed:
                await store._file.survey(lambda c: c.execute("SELECT count(*) FROM sessions").fetchall())
            threads = [thread for thread in threading.enumerate() if path.name in thread.name]
            scope.cancel()
    assert scope.cancelled_caught
    assert len(threads) == 2 + is_surveyed
    for call in (store.append("k", [b"2"], expected_version=1), store.load("k")):
        with pytest.raises(gr.StoreError) as caught:
            await call
        assert caught.value.kind == "closed"
    for thread in threads:
        await trio.to_thread.run_sync(thread.join)
    # The log goes with the last of the connections.
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    await store.aclose()


async def test_migrations_are_taken_once_and_in_order(path: Path) -> None:
    """A file of an older format takes the missing steps and keeps what it has."""
    steps = [["CREATE TABLE t (a)"], ["ALTER TABLE t ADD COLUMN b", "UPDATE t SET b = a * 2"]]
    old = SqliteFile(path, steps[:1], application_id=7)
    await old.write(lambda c: c.execute("INSERT INTO t VALUES (1), (2)").fetchall(), subject="")
    await old.aclose()
    for _ in range(2):
        new = SqliteFile(path, steps, application_id=7)
        assert await new.read(lambda c: c.execute("SELECT a, b FROM t").fetchall(), subject="") == [(1, 2), (2, 4)]
        await new.aclose()
    again = SqliteFile(path, steps[:1], application_id=7)
    with pytest.raises(gr.StoreError, match="newer"):
        await again.read(lambda c: None, subject="")
    await again.aclose()


async def test_additions_are_there_whoever_made_the_file(path: Path) -> None:
    """A file of the same format gets them when it is opened, whoever is writing; older programs open it as before."""
    steps = [["CREATE TABLE t (a)"]]
    for additions in ([], ["CREATE TABLE IF NOT EXISTS more (b)"], []):
        file = SqliteFile(path, steps, additions=additions, application_id=7)
        assert await file.read(lambda c: c.execute("SELECT * FROM t").fetchall(), subject="") == []
        await file.aclose()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    file = SqliteFile(path, steps, additions=["CREATE TABLE IF NOT EXISTS more (b)"], application_id=7, busy_s=0)
    assert await file.read(lambda c: c.execute("SELECT * FROM more").fetchall(), subject="") == []
    await file.aclose()
    other.close()


async def test_what_older_versions_delete_is_noted(path: Path) -> None:
    """A file that was made before deletions were noted notes them once it was opened, also those of older versions."""
    async with SqliteStore(path) as store:
        await store.append("k", [b"1"], expected_version=0)
    old = sqlite3.connect(path, isolation_level=None)
    for name in ("TRIGGER note_deletion", "TABLE deletions"):
        old.execute(f"DROP {name}")
    async with SqliteStore(path) as store:
        assert await store.append("k", [b"2"], expected_version=1) == 2
        old.execute("PRAGMA trusted_schema=OFF")
        old.execute("DELETE FROM entries")
        assert old.execute("DELETE FROM sessions WHERE key = x'6b' RETURNING id").fetchall() == [(1,)]
        old.close()
        assert await store.append("k", [b"3"], expected_version=0) == 3
        assert list(await store.list_keys()) == ["k"]


async def test_a_migration_that_fails_changes_nothing(path: Path) -> None:
    """A step is taken whole or not at all."""
    broken = SqliteFile(path, [["CREATE TABLE t (a)", "CREATE TABLE t (a)"]], application_id=7)
    with pytest.raises(sqlite3.OperationalError):
        await broken.write(lambda c: None, subject="")
    await broken.aclose()
    whole = SqliteFile(path, [["CREATE TABLE t (a)"]], application_id=7)
    assert await whole.read(lambda c: c.execute("SELECT * FROM t").fetchall(), subject="") == []
    await whole.aclose()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
async def test_a_full_disk(tmp_path: Path) -> None:
    """Writes fail with the reason, what was there stays, and they work again once there is room."""
    limit = 40
    async with SqliteStore(tmp_path / "h.db") as store:
        await store.append("k", [b"first"], expected_version=0)
        await store._file.write(lambda c: c.execute(f"PRAGMA max_page_count={limit}").fetchall(), subject="")
        version = 1
        with pytest.raises(gr.StoreError, match="disk is full") as caught:
            while True:
                version = await store.append("k", [b"x" * 4000], expected_version=version)
        assert caught.value.kind == "full"
        loaded = await store.load("k")
        assert loaded.version == version == len(loaded.entries)
        await store._file.write(lambda c: c.execute("PRAGMA max_page_count=100000").fetchall(), subject="")
        assert await store.append("k", [b"x" * 4000], expected_version=version) == version + 1
