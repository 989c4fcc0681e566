"""The files of a job when it is opened: new, or brought to where it can go on."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, cast

import trio

from ..errors import ConfigError, StoreError
from .journal import DONE, RELEASED, SENT, UNKNOWN, JournalState, journal_file, load_journal, mark_rows, write_facts
from .output import OutputFile, OutputMode, open_output
from .scan import FAILED, FAILED_IN_DOUBT, OutputScan, read_line, rewrite_output, scan_output
from .tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from ..transport.sqlite import SqliteFile
    from .settings import BatchJob

__all__ = ["JobFiles", "journal_path", "open_files", "refuse_own_file", "sort_output"]

_CLOSE_S = 30.0
_FORMAT = 1


class JobFiles:
    """The output, open behind its last whole line, the journal, and what both say of rows that were run before.

    `was_reopened` says that rows are run whose places in the output are before others'.
    """

    def __init__(self, output: OutputFile, *, journal: SqliteFile | None, name: str) -> None:
        self.output = output
        self.journal = journal
        self.name = name
        self.state = JournalState()
        self.tally = Tally()
        self.was_reopened = False

    def spent_usd(self) -> Decimal:
        """What the runs before have cost, by all lines that they wrote; not what may have been charged besides."""
        dropped = str(self.state.facts.get("dropped_usd", 0))
        return self.tally.cost + Decimal(dropped)

    async def sort(self) -> None:
        """Bring the output into the order of the input, if it is not."""
        if self.was_reopened:
            await sort_output(self.output)


def refuse_own_file(job: BatchJob, path: str, *, name: str) -> None:
    """Raises `ConfigError` where `path`, which is to be the `name`, is the input, output or journal of the job."""
    files = {"input": job.source_path, "output": job.output_path, "journal": journal_path(job)}
    for what, own in files.items():
        if what != name and own is not None and _is_same(path, own):
            raise ConfigError(f"{path} is the {what} as well")


def _is_same(path: str, other: str | int) -> bool:
    if isinstance(other, str) and os.path.realpath(path) == os.path.realpath(other):
        return True
    if not os.path.isfile(path):
        # Devices and pipes may well be several things.
        return False
    try:
        return os.path.samestat(os.stat(path), os.stat(other))
    except FileNotFoundError:
        return False


async def sort_output(output: OutputFile) -> None:
    """Bring an output into the order of the input, if it is not; raises `OSError`, having changed nothing."""
    if output.path is not None:
        scan = await trio.to_thread.run_sync(scan_output, output.path, _ignore)
        if not scan.is_sorted:
            await _rewrite(output, scan, keep=lambda _place: True)


async def _rewrite(output: OutputFile, scan: OutputScan, *, keep: Callable[[int], bool]) -> None:
    """Write an output anew, by another file that takes its place; raises `OSError`, having changed nothing."""
    # A link is kept, and what it names is written.
    path = _real(cast("str", output.path))
    target = f"{path}.new"
    try:
        await trio.to_thread.run_sync(partial(rewrite_output, path, scan, keep=keep, target=target))
        output.replace(target)
    except BaseException:
        with suppress(OSError):
            os.unlink(target)
        raise


def journal_path(job: BatchJob) -> str | None:
    """Where the journal of a job is; None where it has none."""
    if job.journal is False or not isinstance(job.output, str):
        return None
    if os.path.exists(job.output) and not os.path.isfile(job.output):
        # A pipe or a device, of which nothing can be read back.
        return None
    return job.journal if isinstance(job.journal, str) else f"{job.output}.journal"


@asynccontextmanager
async def open_files(
    job: BatchJob, *, settings: Mapping[str, object], new_id: Callable[[], str]
) -> AsyncIterator[JobFiles]:
    """The files of a job; see `BatchJob.if_exists`.

    Raises `FileExistsError` for an output that may not be touched, `ConfigError` where output and journal, or the
    settings and those of the runs before, do not belong together, the `OSError`s of opening and `StoreError`.
    """
    path = journal_path(job)
    for name, other in (("output", job.output), ("journal", path)):
        if isinstance(other, str):
            refuse_own_file(job, other, name=name)
    goes_on = job.if_exists == "resume" or job.retry_failed
    is_there = path is not None and _exists(path)
    if goes_on and path is None:
        raise ConfigError("resume: there is no journal, so that nobody knows which rows were sent")
    if goes_on and not is_there and isinstance(job.output, str) and _has_content(job.output):
        raise ConfigError(
            f"{job.output} has no journal ({path}), so that the job cannot go on; overwrite it, or move it"
        )
    mode: OutputMode = "append" if goes_on else "overwrite" if job.if_exists == "overwrite" else "new"
    if mode == "new" and is_there and path is not None and not _has_content(str(job.output)):
        raise FileExistsError(17, f"is the journal of a job whose output is not there ({job.output})", path)
    if mode == "overwrite" and is_there and path is not None:
        await _refuse_other(path)
    async with AsyncExitStack() as stack:
        output = await stack.enter_async_context(open_output(job.output_path, mode=mode))
        if path is not None and is_there and not goes_on:
            _remove(path)
        journal = None if path is None else journal_file(path)
        if journal is not None:
            stack.push_async_callback(_close, journal)
        files = JobFiles(output, journal=journal, name=new_id())
        if journal is not None:
            await _take_up(files, journal, job=job, settings=settings)
        yield files


async def _take_up(files: JobFiles, journal: SqliteFile, *, job: BatchJob, settings: Mapping[str, object]) -> None:
    files.state = state = await load_journal(journal)
    if not state.facts:
        await write_facts(journal, {"format": _FORMAT, "name": files.name, "settings": settings})
        return
    files.name = str(state.facts.get("name", files.name))
    _refuse_other_settings(state.facts.get("settings"), settings)
    path = cast("str", files.output.path)
    scan = await trio.to_thread.run_sync(scan_output, path, files.tally.add_line)
    files.output.cut(scan.size)
    adopted = _compare(state, scan, path=path)
    if adopted and not state.facts.get("reopening"):
        for row in adopted:
            state.states[row] = DONE
        await mark_rows(journal, adopted, state=DONE, facts={})
    for row in scan.in_doubt:
        # The line says so, whatever the journal had heard of it.
        if state.state(row) == DONE:
            state.doubts.setdefault(row, 1)
    if state.facts.get("reopening"):
        # A kill came between the marks and the rewriting.
        scan = await _drop_reopened(files, scan, journal=journal)
    if job.retry_failed:
        await _reopen(files, scan, journal=journal)
    for row, text in state.parked.items():
        # Not in the output yet, and paid for all the same.
        files.tally.add_line(read_line(text, f"{path}: row {row} of its journal")[1])
    files.was_reopened = bool(state.facts.get("was_reopened"))


def _refuse_other_settings(before: object, now: Mapping[str, object]) -> None:
    known, now = _flat(before), _flat(now)
    for name in sorted(known.keys() | now.keys()):
        if known.get(name) != now.get(name):
            raise ConfigError(
                f"the job began with other settings: {name} was {known.get(name)!r} and is {now.get(name)!r} now; "
                "give the same ones, or begin again with another output"
            )


def _flat(settings: object) -> dict[str, object]:
    """Settings by name, the options of requests among them."""
    found: dict[str, object] = {}
    for name, value in settings.items() if isinstance(settings, dict) else ():
        found |= value if isinstance(value, dict) else {name: value}
    return found


def _compare(state: JournalState, scan: OutputScan, *, path: str) -> list[int]:
    """Bring journal and output together: rows whose lines were written before the journal had heard of it.

    Raises `ConfigError` when lines are missing, or are of rows that were never sent.
    """
    adopted: list[int] = []
    seen = bytearray(state.rows)
    for row in scan.numbers:
        if state.state(row) == UNKNOWN:
            raise ConfigError(f"{path} has a line for row {row}, of which its journal knows nothing")
        if seen[row]:
            raise ConfigError(f"{path} has two lines for row {row}")
        seen[row] = 1
        if state.states[row] != DONE:
            adopted.append(row)
        state.parked.pop(row, None)
    lost = sum(1 for row, mark in enumerate(state.states) if mark == DONE and not seen[row] and row not in state.parked)
    if lost:
        raise ConfigError(
            f"{path} has lost {lost} lines that the journal says were written; bring them back, or begin again"
        )
    return adopted


async def _reopen(files: JobFiles, scan: OutputScan, *, journal: SqliteFile) -> None:
    """Take rows that have failed out of the output, so that they are run again."""
    rows = {row: failure for row, failure in zip(scan.numbers, scan.failed, strict=True) if failure}
    if not rows:
        return
    facts = {"reopening": True, "was_reopened": True, "dropped_usd": str(files.spent_usd() - _kept(files))}
    # Those whose answers were lost may have been billed, and the next answer has to say so.
    for failure, state in ((FAILED, RELEASED), (FAILED_IN_DOUBT, SENT)):
        chosen = [row for row, found in rows.items() if found == failure]
        await mark_rows(journal, chosen, state=state, facts=facts)
        for row in chosen:
            files.state.states[row] = state
            if state == SENT and row in files.state.doubts:
                files.state.doubts[row] -= 1
    files.state.facts |= facts
    await _drop_reopened(files, scan, journal=journal)


def _kept(files: JobFiles) -> Decimal:
    """What the lines that stay have cost."""
    return files.tally.cost - files.tally.failed_cost


async def _drop_reopened(files: JobFiles, scan: OutputScan, *, journal: SqliteFile) -> OutputScan:
    """Write the output anew without the rows that are to be run again; what it has then."""
    states = files.state.states
    path = cast("str", files.output.path)
    if any(states[row] != DONE for row in scan.numbers):
        await _rewrite(files.output, scan, keep=lambda place: states[scan.numbers[place]] == DONE)
        files.tally = Tally()
        scan = await trio.to_thread.run_sync(scan_output, path, files.tally.add_line)
    await write_facts(journal, {"reopening": False})
    return scan


async def _refuse_other(path: str) -> None:
    """Raises `StoreError` for what is no journal, and so is not to be removed as one; a damaged one may be."""
    journal = journal_file(path)
    try:
        await journal.read(_ignore, subject="")
    except StoreError as exc:
        if exc.kind not in {"corrupt", "newer"}:
            raise
    finally:
        await _close(journal)  # noqa: ASYNC102 - shields itself, bounded


async def _close(journal: SqliteFile) -> None:
    with trio.move_on_after(_CLOSE_S, shield=True):
        await journal.aclose()


def _real(path: str) -> str:
    return os.path.realpath(path)


def _exists(path: str) -> bool:
    return os.path.exists(path)


def _has_content(path: str) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) > 0


def _remove(path: str) -> None:
    for name in (path, f"{path}-wal", f"{path}-shm"):
        with suppress(FileNotFoundError):
            os.unlink(name)


def _ignore(_line: object) -> None:
    return None
