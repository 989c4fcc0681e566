"""One SQLite file: a thread that writes, in group commits, and a thread that reads.

Theory of operation. A write that is durable waits for the disk, and the disk takes about as long for one as for a
hundred. So whoever writes puts a job on the queue of the writer thread, which takes everything that has gathered while
it was committing, runs it in one transaction, and answers all of it at once. Nothing waits on purpose for company:
alone, a job is committed at once. No task of trio touches a connection, so no cancel can stop one half way. A job whose
asker leaves is dropped while it is queued; later it is in doubt, and whoever asks about the same subject is served by
the writer, behind it.

A refusal (`GorouterError`) of one job leaves the others alone, because it has written nothing. Any other error rolls
the group back: where it is not the file's but the job's, each is tried alone then. After a commit that failed nobody
knows what the disk has: the connection is closed, and the file is opened and checked again before the next job.

The settings are those that SQLite names for "durable once committed" (sqlite.org/pragma.html): a write-ahead log with
`synchronous=FULL`. `secure_delete` overwrites what is deleted.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import outcome
import trio
from msgspec import Struct

from .._contain import contain_sync
from .._mailbox import ReplySlot
from ..errors import GorouterError, StoreError, StoreErrorKind

__all__ = ["SQLITE_VERSION", "Connection", "SchemaStep", "ScratchTable", "SqliteFile", "SqliteStatistics"]

T = TypeVar("T")

Connection: TypeAlias = sqlite3.Connection
"""What jobs run on; they end no transaction and leave no statement open."""

_Work: TypeAlias = Callable[[Connection], T]

SchemaStep: TypeAlias = Sequence[str | Callable[[Connection], object]]
"""What brings a file from one format to the next, in one transaction: statements, and functions of the connection."""

SQLITE_VERSION = sqlite3.sqlite_version_info

_KINDS: dict[str, StoreErrorKind] = {
    "SQLITE_CORRUPT": "corrupt",
    "SQLITE_NOTADB": "foreign",
    "SQLITE_FULL": "full",
    "SQLITE_BUSY": "locked",
    "SQLITE_LOCKED": "locked",
    "SQLITE_READONLY": "denied",
    "SQLITE_PERM": "denied",
    "SQLITE_AUTH": "denied",
    "SQLITE_CANTOPEN": "denied",
    "SQLITE_IOERR": "io",
    "SQLITE_PROTOCOL": "locked",
    "SQLITE_INTERRUPT": "closed",
}
_ERRNO_KINDS: dict[int | None, StoreErrorKind] = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EIO: "io",
}
# What the log may keep of a time of many writes, once it was written back.
_LOG_BYTES = 16 * 1024 * 1024
_MEMORY_BYTES = 64 * 1024 * 1024
_SCRATCH_KIB = 2048
_MOST_SWITCHES = 100
_SAYINGS: dict[StoreErrorKind, str] = {
    "corrupt": "the file is damaged; nothing was written to it: keep a copy, then recover it with the sqlite3 program",
    "foreign": "the file is no SQLite database; choose another path",
    "full": "the disk is full; free some space and try again",
    "locked": "another process holds the file",
    "denied": "the file or its directory cannot be opened or written",
    "io": "the disk failed",
    "closed": "the store was closed meanwhile",
}


class SqliteStatistics(Struct, frozen=True):
    """A snapshot: transactions committed, jobs in them, and the most that were in one."""

    commits: int
    writes: int
    largest_group: int


class _Job(ReplySlot[object]):
    """Work for a thread, and the asker who waits for what becomes of it."""

    __slots__ = ("result", "subject", "token", "work", "writes")

    def __init__(self, work: _Work[object], *, subject: str, writes: bool) -> None:
        super().__init__()
        self.work = work
        self.subject = subject
        self.writes = writes
        self.token = trio.lowlevel.current_trio_token()
        self.result: outcome.Outcome[object] | None = None


class SqliteFile:
    """The file at `path`, made when it is not there, open from the first job until `aclose`.

    `schema` is a list of steps; the file keeps the number of steps that it has taken, and takes the others
    when it is opened. `additions` are statements that older programs can live with, carried out at every opening: they
    do nothing where they have been. `application_id` marks files of this kind.
    `busy_s` bounds the wait for another process. `max_group` bounds the jobs of one transaction; with
    1 there are no groups.

    A new file, and a directory that has to be made for it, can be read by their owner only.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        schema: Sequence[SchemaStep],
        *,
        additions: Sequence[str] = (),
        application_id: int,
        busy_s: float = 5.0,
        max_group: int = 512,
    ) -> None:
        self._file = _File(Path(path), schema, additions, application_id=application_id, busy_s=busy_s)
        self._lock = threading.Lock()
        self._in_doubt: dict[str, int] = {}
        self._reader = _Reader(self._file, self._lock)
        self._surveyor = _Surveyor(self._file, self._lock)
        self._writer = _Writer(
            self._file, self._lock, self._in_doubt, max_group=max_group, behind=(self._reader, self._surveyor)
        )

    def __repr__(self) -> str:
        return f"<SqliteFile {str(self._file.path)!r}>"

    async def read(self, work: _Work[T], *, subject: str) -> T:
        """Run `work` on a connection that sees everything committed, and what is being written of `subject`.

        `subject` is "" for work that is about everything. Raises `StoreError`, and what `work` raises.
        Cancelling leaves the work to itself.
        """
        job = _Job(cast("_Work[object]", work), subject=subject, writes=False)
        with self._lock:
            # The file is made by the writer, and what is in doubt is behind it as well.
            behind = not self._file.is_made or (subject in self._in_doubt if subject else bool(self._in_doubt))
        (self._writer if behind else self._reader).post(job)
        return cast("T", await job.wait())

    async def survey(self, work: _Work[T]) -> T:
        """Run `work`, which may take long, on a connection that sees everything committed; others do not wait for it.

        Raises `StoreError`, and what `work` raises. Cancelling stops the statement that it runs.
        """
        if not self._file.is_made:
            await self.read(_do_nothing, subject="")
        job = _Survey(cast("_Work[object]", work), self._surveyor)
        self._surveyor.post(job)
        return cast("T", await job.wait())

    async def write(self, work: _Work[T], *, subject: str) -> T:
        """Run `work` in a transaction and return what it returned once that is on the disk.

        Raises `StoreError`, having written nothing unless its message says so, and what `work` raises,
        which must have written nothing if it is a `GorouterError`. Cancelling takes the job out of the
        queue or, once it has been taken, leaves it in doubt.
        """
        job = _Job(cast("_Work[object]", work), subject=subject, writes=True)
        self._writer.post(job)
        return cast("T", await job.wait())

    async def scrub(self, *, rewrite: bool) -> None:
        """Remove what is left of deleted rows; durable on return.

        That is what the write-ahead log keeps and, with `rewrite`, what lies unused in the pages of the file:
        `secure_delete` overwrites what is deleted, but not the copies that moving rows between pages has left before.
        Then it takes as long as writing the whole file, and nobody else writes meanwhile.

        Raises `StoreError`, of the kind "locked" where another process reads the log.
        """
        job = _Job(partial(_scrub, path=self._file.log_path, rewrite=rewrite), subject="", writes=False)
        self._writer.post(job)
        await job.wait()

    def statistics(self) -> SqliteStatistics:
        """A snapshot; cheap."""
        writer = self._writer
        return SqliteStatistics(writer.commits, writer.writes, writer.largest_group)

    async def aclose(self) -> None:
        """Do what is queued, then close; later jobs get a `StoreError`. May be called twice.

        A cancel stops the waiting, not the closing.
        """
        threads = (self._surveyor, self._reader, self._writer)
        # All are told before anything is waited for, which a cancel may be the end of.
        ends = [thread.close() for thread in threads]
        self._surveyor.stop()
        for thread, ended in zip(threads, ends, strict=True):
            await ended.wait()
            thread.join()  # it has nothing left to do


class _File:
    """Opens connections to the file; what it says, it says to threads."""

    def __init__(
        self, path: Path, schema: Sequence[SchemaStep], additions: Sequence[str], *, application_id: int, busy_s: float
    ) -> None:
        self.path = path
        self.log_path = path.with_name(f"{path.name}-wal")
        self.is_made = False
        self._schema = schema
        self._additions = additions
        self._application_id = application_id
        self._busy_s = busy_s

    def open_for_writing(self, *, check: bool) -> Connection:
        """A connection to the file, made and brought up to date; `check` looks for damage first."""
        self._make()
        # A log that was left behind is one of a crash.
        was_cut_off = _size(self.log_path) > 0
        connection = self._connect()
        with _closed_on_error(connection):
            self._prepare(connection, check=check or was_cut_off)
        self.is_made = True
        return connection

    def open_for_reading(self) -> Connection:
        """A connection that cannot write, to a file that was made."""
        connection = self._connect()
        with _closed_on_error(connection):
            connection.execute("PRAGMA query_only=ON")
            # What is sorted stands in no file beside this one.
            connection.execute("PRAGMA temp_store=MEMORY")
        return connection

    def explain(self, exc: Exception) -> Exception:
        """A `StoreError` where `exc` is the file's fault, `exc` itself where it is that of the work."""
        name = getattr(exc, "sqlite_errorname", "") if isinstance(exc, sqlite3.Error) else ""
        kind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), None)
        if isinstance(exc, OSError):
            kind = _ERRNO_KINDS.get(exc.errno, "denied")
        if kind is None:
            return exc
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        error = StoreError(f"{self.path}: {_SAYINGS[kind]} ({reason})", kind=kind)
        error.__cause__ = exc
        return error

    def _connect(self) -> Connection:
        # By URI, because a plain path would make a file that somebody has removed meanwhile.
        uri = f"{self.path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=self._busy_s)
        with _closed_on_error(connection):
            # SQLite follows a link in the place of the file (of its log it does not).
            if not stat.S_ISREG(os.lstat(self.path).st_mode):
                raise self._is_a_link()
        return connection

    def _is_a_link(self) -> StoreError:
        return StoreError(f"{self.path}: is a symbolic link or no file; name the file itself", kind="denied")

    def _make(self) -> None:
        """Make the file if it is not there, for its owner only, and refuse a link in its place."""
        if self.path.is_symlink():
            raise self._is_a_link()
        _make_directories(self.path.absolute().parent)
        # Never opened here when it exists: closing it again would drop the locks of this process.
        with suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))

    def _prepare(self, connection: Connection, *, check: bool) -> None:
        run = connection.execute
        self._refuse_foreign(connection)
        if check and (found := run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise StoreError(f"{self.path}: {_SAYINGS['corrupt']} ({found})", kind="corrupt")
        self._switch_to_log(connection)
        run("PRAGMA synchronous=FULL")
        run("PRAGMA secure_delete=ON").fetchone()
        run("PRAGMA foreign_keys=ON")
        run("PRAGMA trusted_schema=OFF")
        run(f"PRAGMA journal_size_limit={_LOG_BYTES}").fetchone()
        self._migrate(connection)
        for statement in self._additions:
            run(statement)
        _sync_directory(self.path.parent)

    def _switch_to_log(self, connection: Connection) -> None:
        """Have the file write ahead, once nobody else is at it: SQLite waits for a lock, but not for this one."""
        for _ in range(_MOST_SWITCHES):
            try:
                connection.execute("PRAGMA journal_mode=WAL").fetchone()
            except sqlite3.OperationalError as exc:
                if not getattr(exc, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
                    raise
            else:
                return
            # Waits for all others, for as long as `busy_s`.
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL").fetchone()

    def _refuse_foreign(self, connection: Connection) -> None:
        # At one moment: another process may be making the file what it is to be.
        connection.execute("BEGIN")
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        is_empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("COMMIT")
        if owner != self._application_id and not (is_empty and owner == 0):
            raise StoreError(
                f"{self.path}: the database belongs to something else; choose another path", kind="foreign"
            )
        if version > len(self._schema):
            raise StoreError(
                f"{self.path}: was written by a newer version (format {version}, this one knows {len(self._schema)})",
                kind="newer",
            )

    def _migrate(self, connection: Connection) -> None:
        """Take the steps that the file has not taken, each in a transaction of its own."""
        for step in count(connection.execute("PRAGMA user_version").fetchone()[0]):
            if step >= len(self._schema):
                return
            connection.execute("BEGIN IMMEDIATE")
            # Another process may have been faster.
            if connection.execute("PRAGMA user_version").fetchone()[0] == step:
                for action in self._schema[step]:
                    connection.execute(action) if isinstance(action, str) else action(connection)
                connection.execute(f"PRAGMA application_id={self._application_id}")
                connection.execute(f"PRAGMA user_version={step + 1}")
            connection.execute("COMMIT")


class _Thread:
    """A thread with one connection and a queue; started by the first job, ended by `close`, `behind` these others.

    The queue is as long as there are tasks that wait, and no longer.
    """

    def __init__(self, file: _File, lock: threading.Lock, *, behind: Sequence[_Thread] = ()) -> None:
        self._file = file
        self._behind = behind
        # A condition of its own on the common lock: a job wakes one thread.
        self._wake = threading.Condition(lock)
        self._queue: deque[_Job] = deque()
        self._thread: threading.Thread | None = None
        self._is_closing = self._has_ended = False
        self.connection: Connection | None = None
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    def post(self, job: _Job) -> None:
        """Queue the job; the thread answers it."""
        with self._wake:
            if self._is_closing:
                raise StoreError(f"{self._file.path}: the store is closed", kind="closed")
            if self._thread is None:
                self._thread = self._start()
            self.take_note(job)
            self._queue.append(job)
            self._wake.notify()

    def _start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=f"sqlite {self._file.path.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise StoreError(f"{self._file.path}: the system gives no thread ({exc})", kind="denied") from exc
        return thread

    def close(self) -> trio.Event:
        """Let the thread end behind what is queued; returns what is set then."""
        ended = trio.Event()
        with self._wake:
            self._is_closing = True
            if self._thread is None or self._has_ended:
                ended.set()
            else:
                self._waiting.append((trio.lowlevel.current_trio_token(), ended))
                self._wake.notify()
        return ended

    def join(self) -> None:
        """Wait, in a thread, for the end of this one."""
        with self._wake:
            thread = self._thread
        if thread is not None:
            thread.join()

    def take_note(self, job: _Job) -> None:
        """`job` is being queued; called with the lock."""

    def forget(self, job: _Job) -> None:
        """`job` is over; called with the lock."""

    def execute(self, jobs: list[_Job]) -> None:
        """Give each job its result; in the thread."""
        raise NotImplementedError

    def take(self) -> list[_Job]:
        """The next jobs from the queue, which has one; called with the lock."""
        return [self._queue.popleft()]

    def _run(self) -> None:
        while jobs := self._next_jobs():
            self._serve(jobs)
            # The thread waits now, and would keep what the last ones have written.
            jobs.clear()
        for other in self._behind:
            other.join()
        if self.connection is not None:
            with suppress(sqlite3.Error):  # everything in it is committed
                self.connection.close()
        with self._wake:
            self._has_ended = True
            waiting, self._waiting = self._waiting, []
        for token, ended in waiting:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(ended.set)

    def _serve(self, jobs: list[_Job]) -> None:
        failed = _capture(partial(self.execute, jobs), self._file)
        for job in jobs:
            # Whatever happens, nobody waits for ever.
            job.result = job.result or failed
        self._deliver(jobs)

    def _next_jobs(self) -> list[_Job]:
        """Jobs whose askers still wait; none at the end."""
        wanted: list[_Job] = []
        with self._wake:
            while not wanted:
                self._wake.wait_for(lambda: self._queue or self._is_closing)
                if not self._queue:
                    break
                wanted = self._sift(self.take())
        return wanted

    def _sift(self, jobs: list[_Job]) -> list[_Job]:
        """The jobs that somebody waits for."""
        for job in jobs:
            if job.abandoned:
                self.forget(job)
        return [job for job in jobs if not job.abandoned]

    def _deliver(self, jobs: list[_Job]) -> None:
        with self._wake:
            for job in jobs:
                self.forget(job)
        for token in {job.token for job in jobs}:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(_settle, [job for job in jobs if job.token is token])


class _Reader(_Thread):
    """Answers one question after the other."""

    def execute(self, jobs: list[_Job]) -> None:
        """Run the one job."""
        for job in jobs:
            job.result = _capture(partial(self._read, job), self._file)

    def _read(self, job: _Job) -> object:
        if self.connection is None:
            self.connection = self._file.open_for_reading()
        return job.work(self.connection)


class _Survey(_Job):
    """A job that is stopped when nobody waits for it any more."""

    __slots__ = ("_surveyor",)

    def __init__(self, work: _Work[object], surveyor: _Surveyor) -> None:
        super().__init__(work, subject="", writes=False)
        self._surveyor = surveyor

    def on_abandon(self) -> None:
        """Stop the statement."""
        self._surveyor.stop(self)


class _Surveyor(_Reader):
    """Answers what takes long, one question after the other."""

    def __init__(self, file: _File, lock: threading.Lock) -> None:
        super().__init__(file, lock)
        self._current: _Job | None = None

    def execute(self, jobs: list[_Job]) -> None:
        """Run the one job, which `stop` ends."""
        with self._wake:
            (self._current,) = jobs
        super().execute(jobs)
        with self._wake:
            self._current = None

    def stop(self, job: _Job | None = None) -> None:
        """Let the statement that runs fail, if it is that of `job` or none is named."""
        with self._wake:
            if self._current is not None and job in {None, self._current} and self.connection is not None:
                self.connection.interrupt()


class _Writer(_Thread):
    """Runs writes in groups, and what has to be behind them."""

    def __init__(
        self,
        file: _File,
        lock: threading.Lock,
        in_doubt: dict[str, int],
        *,
        max_group: int,
        behind: Sequence[_Thread],
    ) -> None:
        # Whoever closes last writes the log back, which only who may write can do.
        super().__init__(file, lock, behind=behind)
        self._in_doubt = in_doubt
        self._max_group = max_group
        self._needs_check = False
        self.commits = self.writes = self.largest_group = 0

    def take_note(self, job: _Job) -> None:
        """Count the writes under way for each subject."""
        if job.writes:
            self._in_doubt[job.subject] = self._in_doubt.get(job.subject, 0) + 1

    def forget(self, job: _Job) -> None:
        """The write is over."""
        if not job.writes:
            return
        left = self._in_doubt[job.subject] - 1
        if left:
            self._in_doubt[job.subject] = left
        else:
            del self._in_doubt[job.subject]

    def take(self) -> list[_Job]:
        """One reading job, or all writes up to the next one."""
        jobs = [self._queue.popleft()]
        while jobs[0].writes and self._queue and self._queue[0].writes and len(jobs) < self._max_group:
            jobs.append(self._queue.popleft())
        return jobs

    def execute(self, jobs: list[_Job]) -> None:
        """Run the jobs; those of a group that failed, one by one."""
        opened = _capture(self._open, self._file)
        if isinstance(opened, outcome.Error):
            for job in jobs:
                job.result = opened
        elif not jobs[0].writes:
            jobs[0].result = _capture(partial(jobs[0].work, cast("Connection", self.connection)), self._file)
        else:
            self._write(jobs)

    def _write(self, jobs: list[_Job]) -> None:
        failure = self._commit(jobs)
        if isinstance(failure, StoreError) and failure.kind == "full" and self._shrink():
            failure = self._commit(jobs)
        if failure is None:
            return
        if len(jobs) > 1 and not isinstance(failure, StoreError):
            for job in jobs:
                self.execute([job])
            return
        for job in jobs:
            job.result = outcome.Error(failure)

    def _shrink(self) -> bool:
        """Make room on a full disk: write the log back, which holds each page as often as it was changed."""
        connection = self.connection
        if connection is None:
            return False
        failures: list[Exception] = []
        log = contain_sync(
            lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone(), report=failures.append
        )
        return not failures and log is not None and not log[0]

    def _open(self) -> None:
        if self.connection is None:
            self.connection = self._file.open_for_writing(check=self._needs_check)
            self._needs_check = False

    def _commit(self, jobs: list[_Job]) -> Exception | None:
        """Run the jobs in one transaction; returns why it was rolled back."""
        failures: list[Exception] = []
        contain_sync(partial(self._transact, jobs), report=failures.append)
        if not failures:
            self.commits += 1
            self.writes += len(jobs)
            self.largest_group = max(self.largest_group, len(jobs))
            return None
        return self._give_up(self._file.explain(failures[0]))

    def _transact(self, jobs: list[_Job]) -> None:
        connection = cast("Connection", self.connection)
        connection.execute("BEGIN IMMEDIATE")
        for job in jobs:
            try:
                job.result = outcome.Value(job.work(connection))
            except GorouterError as exc:
                job.result = outcome.Error(exc)
        connection.execute("COMMIT")

    def _give_up(self, error: Exception) -> Exception:
        """Roll back; where the disk failed, throw the connection away. Returns `error`, which says so then."""
        connection = cast("Connection", self.connection)
        _roll_back(connection)
        is_certain = not isinstance(error, StoreError) or error.kind in {"locked", "full"}
        if is_certain and not connection.in_transaction:
            return error
        # A disk that failed to write may have written: the file says what it has, once it was checked.
        self.connection = None
        self._needs_check = True
        with suppress(sqlite3.Error):
            connection.close()
        error.add_note("whether it was written is unknown until it is read again")
        return error


class _closed_on_error:  # noqa: N801 - reads as a statement
    """Close the connection unless the body ends well."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            # Closing alone would wait for cursors that the traceback holds, and keep the lock meanwhile.
            _roll_back(self._connection)
            self._connection.close()


def _roll_back(connection: Connection) -> None:
    if connection.in_transaction:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _do_nothing(_connection: Connection) -> None:
    pass


def _capture(work: Callable[[], object], file: _File) -> outcome.Outcome[object]:
    failures: list[Exception] = []
    value = contain_sync(work, report=failures.append)
    return outcome.Error(file.explain(failures[0])) if failures else outcome.Value(value)


def _settle(jobs: list[_Job]) -> None:
    """Answer the askers; in their run."""
    for job in jobs:
        match job.result:
            case outcome.Value(value=value):
                job.resolve(value)
            case outcome.Error(error=StoreError() as error):
                # One each: a raised exception belongs to its task.
                job.fail(_copy(error))
            case outcome.Error(error=error):
                job.fail(error)


def _copy(error: StoreError) -> StoreError:
    copied = StoreError(error.message, kind=error.kind)
    copied.__cause__ = error.__cause__
    for note in getattr(error, "__notes__", ()):
        copied.add_note(note)
    return copied


def _scrub(connection: Connection, *, path: Path, rewrite: bool) -> None:
    if rewrite:
        (pages,), (size,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
        # What is rewritten stands in no other file, unless it is too much for memory.
        connection.execute(f"PRAGMA temp_store={'MEMORY' if pages * size <= _MEMORY_BYTES else 'FILE'}")
        connection.execute("VACUUM")
    busy, _pages, _moved = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise StoreError(
            "the deletion is done, but its traces stay in the log while another process reads it; try again",
            kind="locked",
        )
    # SQLite cuts the log without a sync: after a loss of power it would be as long as before.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(path: Path) -> None:
    """Make what is missing of the path, for its owner only, and the names durable."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory.parent)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_directory(path: Path) -> None:
    """Make the names of new files durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ScratchTable:
    """Numbers by numbers, both of 64 bits with a sign, in a temporary file without a name; for one thread.

    At most 2 MiB of them are in memory. A call was measured at 2.6 µs when there were 200,000, and at 3.9 µs with a
    million: too little for a thread. The file stands where SQLite puts its own (`SQLITE_TMPDIR`, `TMPDIR`, /var/tmp,
    /tmp), and goes with `close`, or with the process. Calls raise `StoreError` when it cannot be written.
    """

    def __init__(self) -> None:
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_SCRATCH_KIB}"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("CREATE TABLE numbers (name INTEGER PRIMARY KEY, value INTEGER NOT NULL)")
        # Nothing of it has to outlive the process, so nothing is ever committed.
        self._connection.execute("BEGIN")

    def claim(self, name: int, value: int) -> int | None:
        """Keep `value` where there is none yet, and return None; else the one that is there."""
        try:
            if self._connection.execute("INSERT OR IGNORE INTO numbers VALUES (?, ?)", (name, value)).rowcount:
                return None
        except sqlite3.Error as exc:
            raise _scratch_error(exc) from exc
        return self.find(name)

    def find(self, name: int) -> int | None:
        """The value that is there."""
        try:
            row = self._connection.execute("SELECT value FROM numbers WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error as exc:
            raise _scratch_error(exc) from exc
        return None if row is None else cast("int", row[0])

    def close(self) -> None:
        """Forget all; may be called twice."""
        self._connection.close()


def _scratch_error(exc: sqlite3.Error) -> StoreError:
    name = getattr(exc, "sqlite_errorname", None) or ""
    kind: StoreErrorKind = next((kind for start, kind in _KINDS.items() if name.startswith(start)), "io")
    return StoreError(f"a temporary file: {_SAYINGS[kind]} ({exc}); TMPDIR names another place", kind=kind)
