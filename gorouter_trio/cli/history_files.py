"""Sessions in files: exports of this program, and directories that GoRouter Kit has left."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec
import trio
from msgspec import Struct

from ..errors import DecodeError
from ..stores.gorouter_kit import key_of_file, read_kit_file
from ..stores.portable import PortableSession, decode_session, encode_session
from ..stores.turns import to_turns
from .failures import FAILED, CliError, why
from .terminal import open_stdin, print_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..abc import HistoryStore

__all__ = ["ImportReport", "export_sessions", "import_sessions"]


class ImportReport(Struct, kw_only=True):
    """What an import did: how many sessions came in, were replaced or were there already, and what went wrong.

    `notes` tell what a reader should know of what came in; `problems` name what did not. `quarantined` are the copies
    of files that cannot be read.
    """

    imported: int = 0
    replaced: int = 0
    unchanged: int = 0
    notes: list[str] = msgspec.field(default_factory=list)
    problems: list[str] = msgspec.field(default_factory=list)
    quarantined: list[str] = msgspec.field(default_factory=list)


# Out


async def export_sessions(store: HistoryStore, keys: AsyncIterator[str], *, output: str, overwrite: bool) -> int:
    """Write the sessions with these keys, one line each, to a file or stdout; returns how many there were."""
    if output == "-":
        return await _write_lines(store, keys, _Stdout())
    # A link is kept, and what it names is written.
    run = trio.to_thread.run_sync
    path = await run(_find, output)
    try:
        if await run(_is_special, path):
            return await _write_in_place(store, keys, path)
        if not overwrite and await run(os.path.exists, path):
            raise CliError(f"{output}: exists already; --overwrite replaces it")
        return await _write_beside(store, keys, path)
    except OSError as exc:
        raise CliError(f"{output}: {why(exc)}", code=FAILED) from exc


def _find(output: str) -> Path:
    return Path(os.path.realpath(output))


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which cannot be replaced, nor needs to."""
    return path.exists() and not path.is_file() and not path.is_dir()


async def _write_in_place(store: HistoryStore, keys: AsyncIterator[str], path: Path) -> int:
    # Opening a pipe waits for its reader.
    file = await trio.to_thread.run_sync(_open_special, path, abandon_on_cancel=True)
    with file:
        return await _write_lines(store, keys, file)


async def _write_beside(store: HistoryStore, keys: AsyncIterator[str], path: Path) -> int:
    """Beside its place, so that nobody finds half of it there; for its owner only, as the store is."""
    run = trio.to_thread.run_sync
    part = await run(_open_part, path)
    try:
        count = await _write_lines(store, keys, part)
        await run(_finish, part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part.name)
        # On a full disk it fails again, over what was still to be written.
        with suppress(OSError):
            part.close()
        raise
    return count


class _Stdout:
    def write(self, line: bytes) -> None:
        print_bytes(line)


async def _write_lines(store: HistoryStore, keys: AsyncIterator[str], file: IO[bytes] | _Stdout) -> int:
    count = 0
    async for key in keys:
        stored = await store.load(key)
        told = next(iter(await store.list_sessions(key, limit=1)), None) if stored.version else None
        # It may be deleted meanwhile, and another one be the first whose key begins so.
        if told is not None and told.key == key:
            line = encode_session(PortableSession(key, tuple(stored.entries), told.updated_at_s))
            await trio.to_thread.run_sync(file.write, line)
            count += 1
    return count


def _open_special(path: Path) -> IO[bytes]:
    return path.open("wb")


def _open_part(path: Path) -> IO[bytes]:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    return open(name, "wb")


def _finish(part: IO[bytes], path: Path) -> None:
    part.flush()
    os.fsync(part.fileno())
    part.close()
    os.replace(part.name, path)


# In


async def import_sessions(
    store: HistoryStore, source: str, *, quarantine: Path, prefix: str, replace: bool
) -> ImportReport:
    """Bring in what is at `source`: a directory, a file of lines, or stdin."""
    importer = _Importer(store, quarantine, prefix=prefix, replace=replace)
    try:
        if source != "-" and await trio.to_thread.run_sync(os.path.isdir, source):
            await importer.read_directory(Path(source))
        else:
            await importer.read_lines(source)
    except OSError as exc:
        raise CliError(f"{source}: {why(exc)}", code=FAILED) from exc
    return importer.report


class _Importer:
    def __init__(self, store: HistoryStore, quarantine: Path, *, prefix: str, replace: bool) -> None:
        self.report = ImportReport()
        self._store = store
        self._quarantine = quarantine
        self._prefix = prefix
        self._replace = replace

    async def read_lines(self, source: str) -> None:
        """Sessions of an export; a line that cannot be read is named, the others come in."""
        run = trio.to_thread.run_sync
        file = await run(_open_source, source)
        number = 0
        try:
            # Whoever sends the lines may never send another one.
            while line := await run(file.readline, abandon_on_cancel=source == "-"):
                number += 1
                if line.strip():
                    await self._read_line(line, f"{source}: line {number}")
        finally:
            if source != "-":
                file.close()

    async def _read_line(self, line: bytes, where: str) -> None:
        try:
            session = decode_session(line)
        except DecodeError as exc:
            self.report.problems.append(f"{where}: {exc.message}")
            return
        await self._bring(session.key, session.entries, where)

    async def read_directory(self, directory: Path) -> None:
        """The files of GoRouter Kit, in the order of their names."""
        for path in await trio.to_thread.run_sync(_list_files, directory):
            if path.suffix == ".json":
                await self._read_kit_file(path)
            else:
                self.report.notes.append(f"{path}: is no .json file and was left alone")

    async def _read_kit_file(self, path: Path) -> None:
        try:
            data = await trio.to_thread.run_sync(_read_file, path)
        except OSError as exc:
            self.report.problems.append(f"{path}: {why(exc)}")
            return
        try:
            history = read_kit_file(data)
        except DecodeError as exc:
            copy = await trio.to_thread.run_sync(_put_aside, self._quarantine, path.name, data)
            self.report.quarantined.append(str(copy))
            self.report.problems.append(f"{path}: {exc.message}; a copy is at {copy}")
            return
        key, is_certain = key_of_file(path.name)
        turns = to_turns(history.entries, turn_id="imported")
        if not is_certain:
            self.report.notes.append(
                f"{path}: its session is {key!r} here; an underscore may have been another character"
            )
        for note in history.notes:
            self.report.notes.append(f"{path}: left out of {note}")
        for fault in turns.set_aside:
            self.report.notes.append(f"{path}: item {fault.position} {fault.reason}; it is kept, but not part of it")
        await self._bring(key, turns.entries, str(path))

    async def _bring(self, key: str, entries: tuple[bytes, ...], where: str) -> None:
        key = self._prefix + key
        stored = await self._store.load(key)
        if stored.version and tuple(stored.entries) == entries:
            self.report.unchanged += 1
        elif not stored.version:
            await self._store.append(key, entries, expected_version=0)
            self.report.imported += 1
        elif self._replace:
            await self._store.rewrite(key, entries, expected_version=stored.version)
            self.report.replaced += 1
        else:
            self.report.problems.append(f"{where}: session {key!r} is there already and differs; --replace replaces it")


def _open_source(source: str) -> IO[bytes]:
    return open_stdin() if source == "-" else open(source, "rb")


def _list_files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def _read_file(path: Path) -> bytes:
    """The bytes of a plain file; a link is not followed."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("is no plain file")
        return file.read()


def _put_aside(directory: Path, name: str, data: bytes) -> Path:
    """A private copy in the directory, beside those of earlier times."""
    directory.mkdir(mode=0o700, exist_ok=True)
    number = 0
    while True:
        path = directory / (name if not number else f"{name}.{number}")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            if path.is_file() and path.read_bytes() == data:
                return path
            number += 1
            continue
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        return path
