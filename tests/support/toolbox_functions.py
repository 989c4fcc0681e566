"""Functions for tools that run in a process of their own: such must be importable."""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, NoReturn, cast

import trio
from msgspec import Struct

import gorouter_trio as gr

HUGE = 1_000_000_000


class Sum(Struct):
    left: int
    right: int


@gr.tool(isolation="process")
def add(numbers: Sum, *, ctx: gr.ToolContext) -> dict[str, Any]:
    """Adds two numbers."""
    ctx.progress("adding", fraction=0.5)
    who = None if ctx.principal is None else ctx.principal.id
    return {"sum": numbers.left + numbers.right, "call": ctx.call_id, "session": ctx.session, "who": who}


@gr.tool(isolation="process")
async def add_later(numbers: Sum, *, ctx: gr.ToolContext) -> int:
    """Adds two numbers, on trio."""
    await trio.sleep(0.001)
    assert 0 < ctx.remaining_s < 100
    return numbers.left + numbers.right


def _hidden(x: int) -> int:
    return x


hidden = _hidden
del _hidden


def raw(arguments: Mapping[str, object]) -> object:
    """For a tool with a schema of its own."""
    return dict(arguments)


def _open_files() -> list[str]:
    """What the open files of this process are, but for libraries: libffi keeps itself open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        # The one that lists them is closed again.
        with suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in names if ".so" not in name]


@gr.tool(isolation="process")
def environment() -> dict[str, Any]:
    """What a process sees of where it runs."""
    return {
        "names": sorted(os.environ),
        "files": _open_files(),
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "parent": os.getppid(),
        "random": random.random(),
    }


_calls: list[int] = []


@gr.tool(isolation="process")
def remember() -> int:
    """How many calls this process has seen."""
    _calls.append(1)
    return len(_calls)


@gr.tool(isolation="process")
def read_odd_name(ctx: gr.ToolContext) -> None:
    """Looks for a file whose name is not UTF-8."""
    name = os.fsdecode(b"\xe9")
    ctx.progress(f"reading {name}")
    raise gr.ToolError(f"there is no {name}", details={name: 1})


@gr.tool(isolation="process")
def odd_progress(ctx: gr.ToolContext) -> str:
    """Tells how far it is in what are no numbers from 0 to 1."""
    for fraction in (Decimal("0.5"), "half", 10**400, float("nan"), object(), 1):
        ctx.progress("on", fraction=cast("float", fraction))
    return "done"


@gr.tool(isolation="process")
def control_characters(count: int) -> str:
    """A text of which JSON makes six times as many bytes."""
    return "\x1b" * count


@gr.tool(isolation="process")
def hostile(kind: str, mark: str = "") -> object:
    """Does what `kind` says."""
    return HOSTILE[kind](mark)


def _hold_the_lock(_mark: str) -> object:
    # A call through PyDLL keeps the interpreter's lock while the C function runs.
    return ctypes.PyDLL(None).sleep(3_600)


def _spin(_mark: str) -> object:
    while True:
        pass


def _sleep(_mark: str) -> object:
    return select.select([], [], [], 3_600)


def _fork(mark: str) -> object:
    if os.fork() == 0:
        _write(mark)
        while True:
            signal.pause()
    while mark and not os.path.exists(mark):
        pass
    return "parent"


def _spawn(mark: str) -> object:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(mark, "w") as file:
        file.write(str(process.pid))
    while True:
        signal.pause()


def _write(mark: str) -> None:
    if mark:
        with open(mark, "w") as file:
            file.write(str(os.getpid()))


def _crash(_mark: str) -> object:
    return ctypes.string_at(0)


def _raise_exit(_mark: str) -> NoReturn:
    raise SystemExit(3)


def _raise_interrupt(_mark: str) -> NoReturn:
    raise KeyboardInterrupt


def _raise_tool_error(_mark: str) -> NoReturn:
    raise gr.ToolError("tell the model", details={"code": 7, "odd": object()})


def _raise_secret(_mark: str) -> NoReturn:
    raise RuntimeError("/etc/secret path")


def _forge(_mark: str) -> object:
    """Writes what is no frame to every socket that it has."""
    for fd in range(3, 64):
        try:
            os.write(fd, b"R\xff\xff\xff\xff" + b"x" * 1_000)
        except OSError:
            continue
    return None


def _forge_frame(_mark: str) -> object:
    for fd in range(3, 64):
        try:
            os.write(fd, b"R\x00\x00\x00\x05nope!")
        except OSError:
            continue
    return None


def _cycle(_mark: str) -> object:
    found: list[object] = []
    found.append(found)
    return found


def _ignore_signals(_mark: str) -> object:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        signal.pause()


HOSTILE: dict[str, Callable[[str], object]] = {
    "hold the lock": _hold_the_lock,
    "spin": _spin,
    "sleep": _sleep,
    "fork": _fork,
    "spawn": _spawn,
    "crash": _crash,
    "exit": _raise_exit,
    "interrupt": _raise_interrupt,
    "hard exit": lambda _mark: os._exit(1),
    "kill": lambda _mark: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _mark: os.kill(os.getpid(), signal.SIGSTOP),
    "ignore signals": _ignore_signals,
    "tool error": _raise_tool_error,
    "secret": _raise_secret,
    "forge": _forge,
    "forge frame": _forge_frame,
    "large": lambda _mark: "x" * 50_000_000,
    "huge": lambda _mark: "x" * HUGE,
    "cycle": _cycle,
    "nan": lambda _mark: [float("nan")],
    "object": lambda _mark: object(),
    "close": lambda _mark: os.closerange(0, 64),
    "fine": lambda _mark: "fine",
}
