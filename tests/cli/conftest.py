"""The command line as a process: started with an environment of its own, waited for, interrupted."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import pytest
import trio

from gorouter_trio.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "gorouter_trio"]


def environment(**variables: str) -> dict[str, str]:
    """Nothing of the caller's that changes what is printed, and no key unless one is given."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("OPENROUTER_", "COLUMNS", "TERM"))
    }
    return {**kept, "PYTHONUTF8": "1", "TERM": "dumb", **variables}


@dataclass(frozen=True)
class Done:
    """What a command left: exit code and texts."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line on stderr; fails when there is more, or a traceback."""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("gorouter-trio: "), self.err
        return self.err.removeprefix("gorouter-trio: ").rstrip("\n")


class RunCommand(Protocol):
    """Runs `gorouter-trio` with these arguments to its end."""

    def __call__(self, *arguments: str, stdin: bytes = b"", **variables: str) -> Done: ...


@pytest.fixture
def gorouter() -> RunCommand:
    def run(*arguments: str, stdin: bytes = b"", **variables: str) -> Done:
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            cwd=REPOSITORY,
            env=environment(**variables),
            timeout=50,
            check=False,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def inside(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """The same without a process of its own, which takes much longer to start than most commands to run."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name in os.environ:
        if name.startswith("OPENROUTER_"):
            monkeypatch.delenv(name)

    def run(*arguments: str, stdin: bytes = b"", **variables: str) -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        code = main(arguments)
        return Done(code, *capfd.readouterr())

    return run


@dataclass(frozen=True)
class Simulator:
    """A `gorouter-trio simulate` that runs."""

    base_url: str
    process: subprocess.Popen[bytes]

    def stop(self) -> Done:
        """Interrupt it and wait for its end."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=20)
        return Done(self.process.returncode, out.decode(), err.decode())


@pytest.fixture
def simulator() -> Iterator[Callable[..., Simulator]]:
    """Starts simulators, which end with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> Simulator:
        process = subprocess.Popen(
            [*COMMAND, "simulate", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=REPOSITORY,
            env=environment(),
        )
        started.append(process)
        assert process.stdout is not None
        return Simulator(process.stdout.readline().decode().strip(), process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Terminal:
    """A command on a pseudo-terminal: what it shows, and what is typed."""

    def __init__(self, master: int, process: trio.Process) -> None:
        self._master = master
        self.process = process
        self.shown = ""

    async def type(self, text: str) -> None:
        """Press the keys."""
        await trio.lowlevel.checkpoint()
        os.write(self._master, text.encode())

    async def wait_shown(self, text: str) -> str:
        """Wait until `text` is on the screen after what was waited for before; returns what came up to its end."""
        with trio.fail_after(20):
            while text not in self.shown:
                await self._read()
        before, _, self.shown = self.shown.partition(text)
        return before + text

    async def wait_ended(self) -> int:
        """Wait until the program has ended, and return its exit code; what it still shows is in `shown`."""
        with trio.fail_after(20):
            while not self._is_closed:
                await self._read()
            return await self.process.wait()

    _is_closed = False

    async def _read(self) -> None:
        await trio.lowlevel.wait_readable(self._master)
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # the other end is closed: the program has ended
            data = b""
        if not data:
            assert not self._is_closed, f"the program has ended; it showed {self.shown!r}"
            self._is_closed = True
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")


# The terminal has to be the process's own, so that Ctrl-C typed there is a signal, and one that is heeded, also where
# the tests themselves run in the background of a shell.
_ON_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def on_terminal() -> Callable[..., object]:
    """`async with on_terminal("chat", ...) as terminal:` runs a command on a terminal of 80 columns."""

    @asynccontextmanager
    async def open_terminal(*arguments: str, **variables: str) -> AsyncIterator[Terminal]:
        async with trio.open_nursery() as nursery:
            with _pseudo_terminal() as (master, slave):
                process = await nursery.start(
                    partial(
                        trio.run_process,
                        [sys.executable, "-c", _ON_TERMINAL, *COMMAND, *arguments],
                        stdin=slave,
                        stdout=slave,
                        stderr=slave,
                        start_new_session=True,
                        cwd=REPOSITORY,
                        env=environment(**variables),
                        check=False,
                    )
                )
                os.close(slave)
                yield Terminal(master, process)
                nursery.cancel_scope.cancel()

    return open_terminal


@contextmanager
def _pseudo_terminal() -> Iterator[tuple[int, int]]:
    import fcntl
    import struct
    import termios

    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        yield master, slave
    finally:
        os.close(master)
