"""Loss of power, from a trace of system calls: what a disk may hold at any moment of a run.

A file system promises nothing about what was not synced: of the writes since the last sync of a file, any may have
reached the disk, whole or some of their sectors, in any order; so with the names since the last sync of a directory.
After a sync that failed it promises no more than that, and a later sync that succeeds does not make up for it: the
pages count as clean.

The run is traced with strace; its acknowledgements are writes to a file of their own and stand in the same order.
"""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import trio

HERE = Path(__file__).parent
SECTOR = 512
_CALLS = "openat,pwrite64,write,ftruncate,fsync,fdatasync,unlink"
_LINE = re.compile(r"(?:(\d+) +)?(\w+)\((.*)\) += (-?\d+)(?:<[^>]*>)?(?: (E\w+).*)?$")
_FD = re.compile(r"\d+<([^>]*)>")
_NAME = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(?:\.\.\.)?')


@dataclass(frozen=True)
class Call:
    """One call that succeeded or failed: its name, the file, and what it wrote where or cut to."""

    name: str
    path: str
    failed: bool = False
    data: bytes = b""
    offset: int = 0
    creates: bool = False


@dataclass
class File:
    """A file on the disk, and what was done to it since it was synced."""

    content: bytes = b""
    pending: list[Call] = field(default_factory=list)
    doomed: list[Call] = field(default_factory=list)

    def live(self) -> bytes:
        """What a running process sees."""
        content = self.content
        for call in [*self.doomed, *self.pending]:
            content = _apply(content, call)
        return content


def _apply(content: bytes, call: Call) -> bytes:
    if call.name == "ftruncate":
        return content[: call.offset].ljust(call.offset, b"\0")
    padded = content.ljust(call.offset, b"\0")
    return padded[: call.offset] + call.data + padded[call.offset + len(call.data) :]


class Disk:
    """The files of one directory while a trace is replayed."""

    def __init__(self, directory: str, start: dict[str, bytes]) -> None:
        self._directory = directory
        self.files = {name: File(content) for name, content in start.items()}
        self.names = dict.fromkeys(start, True)
        self.changed_names: list[tuple[str, bool]] = []

    def take(self, call: Call) -> None:
        """One more call has happened."""
        name = os.path.basename(call.path)
        if call.path == self._directory:
            if call.name in {"fsync", "fdatasync"} and not call.failed:
                self.names.update(self.changed_names)
                self.changed_names = []
        elif call.failed:
            if call.name in {"fsync", "fdatasync"}:
                file = self.files[name]
                file.doomed += file.pending
                file.pending = []
        elif call.name == "openat":
            if call.creates and not self._exists(name):
                self.files[name] = File()
                self.changed_names.append((name, True))
        elif call.name == "unlink":
            self.changed_names.append((name, False))
        elif call.name in {"fsync", "fdatasync"}:
            self._sync(self.files[name])
        else:
            self.files[name].pending.append(call)

    def _exists(self, name: str) -> bool:
        return dict([*self.names.items(), *self.changed_names]).get(name, False)

    def _sync(self, file: File) -> None:
        content = file.content
        for call in file.pending:
            content = _apply(content, call)
        # What a failed sync has lost stays lost, unless it was written again.
        file.content, file.pending = content, []

    def crash(self, rng: random.Random) -> dict[str, bytes]:
        """The files that there may be after a loss of power now."""
        names = self.names | dict(change for change in self.changed_names if rng.random() < 0.5)
        return {name: _survivors(self.files[name], rng) for name, exists in names.items() if exists}


def _survivors(file: File, rng: random.Random) -> bytes:
    content = file.content
    style = rng.choice(["none", "all", "prefix", "any", "torn"])
    calls = [*file.doomed, *file.pending]
    if style == "prefix":
        calls = calls[: rng.randrange(len(calls) + 1)]
    if style == "none":
        calls = []
    for call in calls:
        if style in {"all", "prefix"}:
            content = _apply(content, call)
        elif call.name == "ftruncate" or style == "any":
            content = _apply(content, call) if rng.random() < 0.5 else content
        else:
            content = _apply_torn(content, call, rng)
    return content


def _apply_torn(content: bytes, call: Call, rng: random.Random) -> bytes:
    """Some sectors of a write."""
    for start in range(0, len(call.data), SECTOR):
        if rng.random() < 0.5:
            part = Call("pwrite64", call.path, data=call.data[start : start + SECTOR], offset=call.offset + start)
            content = _apply(content, part)
    return content


def without_syncs(calls: list[Call]) -> list[Call]:
    """The trace of a store that forgets to sync."""
    return [call for call in calls if call.name not in {"fsync", "fdatasync"}]


async def trace(target: str, directory: Path, *, inject: str = "") -> list[Call]:
    """The calls of `crash_targets.<target>` on `store.db` in the directory; acknowledgements are writes to `acks`."""
    log = directory.parent / f"{directory.name}.strace"
    acks = directory.parent / f"{directory.name}.acks"
    code = (
        "import crash_targets, os, trio\n"
        f"fd = os.open({str(acks)!r}, os.O_WRONLY | os.O_CREAT, 0o600)\n"
        "ack = lambda text: os.write(fd, text.encode() + b'\\n')\n"
        f"trio.run(crash_targets.{target}, ack, {str(directory / 'store.db')!r})\n"
    )
    command = ["strace", "-f", "-y", "-qq", "-xx", "-s", "100000", "-o", str(log), "-e", f"trace={_CALLS}"]
    command += ["-e", "signal=none", *(["-e", f"inject={inject}"] if inject else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    await trio.run_process([*command, sys.executable, "-c", code], env=env)
    wanted = (str(directory), f"{directory}/", str(acks))
    calls = [call for call in _parse(log.read_text()) if call.path.startswith(wanted)]
    log.unlink()
    acks.unlink()
    return [call for call in calls if not call.path.endswith("-shm")]


def _parse(text: str) -> list[Call]:
    calls = []
    unfinished: dict[str, str] = {}
    for line in text.splitlines():
        pid = line.split(None, 1)[0]
        if line.endswith("<unfinished ...>"):
            unfinished[pid] = line.removesuffix("<unfinished ...>").rstrip()
            continue
        resumed = re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line)
        whole = unfinished.pop(pid) + resumed[1] if resumed else line
        found = _LINE.match(whole.replace(" (INJECTED)", ""))
        if found is not None:
            call = _call(found[2], found[3], failed=found[4] == "-1", result=found[4])
            if call is not None:
                calls.append(call)
    return calls


def _call(name: str, arguments: str, *, failed: bool, result: str) -> Call | None:
    texts = [bytes.fromhex(text.replace("\\x", "")) for text in _NAME.findall(arguments)]
    if name in {"openat", "unlink"}:
        return Call(name, os.fsdecode(texts[0]), failed=failed, creates="O_CREAT" in arguments)
    file = _FD.match(arguments)
    if file is None:
        return None
    path = os.fsdecode(bytes.fromhex(file[1].replace("\\x", ""))) if file[1].startswith("\\x") else file[1]
    if name in {"fsync", "fdatasync"}:
        return Call(name, path, failed=failed)
    if name == "ftruncate":
        return Call(name, path, failed=failed, offset=int(arguments.rpartition(",")[2]))
    data = texts[0][: max(int(result), 0)]
    offset = int(arguments.rpartition(",")[2]) if name == "pwrite64" else 0
    return Call(name, path, failed=failed, data=data, offset=offset)


class Replay:
    """Crash states of one trace."""

    def __init__(self, calls: list[Call], directory: Path, start: dict[str, bytes]) -> None:
        self._calls = calls
        self._directory = str(directory)
        self._start = start
        self._disks: list[Disk] = []
        self._acked: list[int] = []
        disk, acked = Disk(self._directory, start), 0
        for call in calls:
            if call.path.endswith(".acks"):
                acked += call.name == "write"
                continue
            disk.take(call)
            self._disks.append(copy.deepcopy(disk))
            self._acked.append(acked)

    @property
    def moments(self) -> int:
        """How many moments there are: one behind each call."""
        return len(self._disks)

    def end(self) -> Disk:
        """The disk when the run is over."""
        return self._disks[-1]

    def crash(self, rng: random.Random) -> tuple[int, dict[str, bytes]]:
        """A loss of power at a random moment: what was acknowledged by then, and the files."""
        moment = rng.randrange(len(self._disks))
        # An acknowledgement that comes right behind the call is not given yet.
        return self._acked[moment], self._disks[moment].crash(rng)


def write_state(directory: Path, files: dict[str, bytes]) -> None:
    """Put the files where a store finds them."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
