"""Processes that are killed at a random or an exact moment, and a look at what they had promised.

A *target* is a function `module:function` that does something durable again and again. It is called with an `ack`
function and the arguments of the run, and calls `ack(text)` each time that something is durable, not before. The
harness collects the acknowledgements over a pipe, ends the process with SIGKILL, and leaves it to the caller to reopen
what the process wrote and to compare.

Theory of operation. Starting Python takes tens of milliseconds, so one process imports the target and forks a child for
each run. The child waits at a gate until its killer is in place. Its parent reports its end before it takes the exit
status, so that the number which is killed is always this child's and never somebody else's. A pipe holds what was
written to it before a kill, and a line of it is written in one piece, so no acknowledgement is torn.

Linux; a kill at the k-th system call needs strace, and the right to trace.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, TypeVar, cast, final

import trio
from msgspec import Struct

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

__all__ = [
    "CallFault",
    "CommandCrash",
    "Crash",
    "CrashError",
    "CrashHarness",
    "CrashSummary",
    "Kill",
    "can_trace",
    "check_crashes",
    "compare_log",
    "draw_kill",
    "kill_at_every_call",
    "open_crash_harness",
    "run_and_kill",
    "run_command_and_kill",
]

T = TypeVar("T")

_PARENT: Final = "from gorouter_trio.testing.crash import _serve_runs; _serve_runs()"
_MAX_ACK_BYTES: Final = 2_000
_POLL_S: Final = 0.001
_END_S: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1


class CrashError(AssertionError):
    """A promise that a crash broke, or a run that went wrong by itself."""


class Kill(Struct, frozen=True, kw_only=True):
    """When the process gets SIGKILL.

    After `after_acks` acknowledgements and `delay_s` seconds more; or, where a `syscall` is named, as it enters its
    `nth` call of that name, which is then not carried out. Calls are counted per thread, from the start of the run;
    writing an acknowledgement is a `write` too.
    """

    after_acks: int = 0
    delay_s: float = 0.0
    syscall: str = ""
    nth: int = 1


class CallFault(Struct, frozen=True, kw_only=True):
    """A system call that fails: the `nth` of its name, and with `sticky` all after it as well, with this `error`.

    `error` is a name such as "EIO"; the call is not carried out then. Calls are counted as for `Kill`, but the process
    goes on.
    """

    syscall: str
    error: str
    nth: int = 1
    sticky: bool = False


class Crash(Struct, frozen=True, kw_only=True):
    """A run that is over. `status` is the exit status, or the negative number of the signal that ended it."""

    acks: tuple[str, ...]
    status: int

    @property
    def killed(self) -> bool:
        """Whether it was killed; otherwise it came to its own end first."""
        return self.status == -signal.SIGKILL


class CrashSummary(Struct, frozen=True, kw_only=True):
    """What a series of runs came to."""

    runs: int
    killed: int
    acks: int


def draw_kill(rng: random.Random, *, max_acks: int = 0, max_delay_s: float = 0.02) -> Kill:
    """A random moment: after up to `max_acks` acknowledgements, up to `max_delay_s` later."""
    return Kill(after_acks=rng.randint(0, max_acks), delay_s=rng.uniform(0.0, max_delay_s))


def compare_log(acked: Sequence[str], found: Sequence[str], *, in_flight: int = 1) -> list[str]:
    """What is wrong with a log that was read back after a crash; empty when nothing is.

    `acked` has to stand at its beginning, in order; behind it may stand what was under way, at most `in_flight` items.
    """
    problems = [
        f"item {index} was acknowledged as {want!r}"
        + (f" and is {found[index]!r}" if index < len(found) else " and lost")
        for index, want in enumerate(acked)
        if index >= len(found) or found[index] != want
    ]
    if len(found) > len(acked) + in_flight:
        problems.append(f"{len(found)} items are there, more than {len(acked)} acknowledged and {in_flight} under way")
    return problems


# The harness, in the process of the test


@final
class CrashHarness:
    """Runs of one target, one at a time; made by `open_crash_harness`."""

    def __init__(self, process: trio.Process, reports: trio.lowlevel.FdStream) -> None:
        self._process = process
        self._reports = reports
        self._buffer = bytearray()
        self._is_busy = False

    async def run(self, *args: str, kill: Kill | CallFault | None = None) -> Crash:
        """Call the target with `ack` and `args` in a process of its own, and end it as `kill` says.

        With a `CallFault` the process meets that instead of its end. Without `kill`, or when the moment does not come,
        the process runs to its end. Raises `CrashError` when the target raised, with its traceback on stderr, or cannot
        be run. A cancel kills the process and leaves the harness unusable. Only one task may run at a time
        (`trio.BusyResourceError`).
        """
        if self._is_busy:
            raise trio.BusyResourceError("another run is going on, or one was cancelled")
        for arg in args:
            if not isinstance(arg, str):
                raise TypeError(f"args: a target is called with texts, not with {arg!r}")
        self._is_busy = True
        await self._order({"args": args})
        run = _Run(int(await self._expect("started")), kill)
        try:
            async with _traced(run.pid, kill):
                await self._order("go")
                await self._collect(run)
        except BaseException:
            # Nobody else can have the number: it is not taken back before "reap".
            os.kill(run.pid, signal.SIGKILL)
            raise
        await self._order("reap")
        status = int(await self._expect("status"))
        self._is_busy = False
        if status and status != -signal.SIGKILL:
            raise CrashError(f"the target ended with status {status}; its traceback is on stderr")
        return Crash(acks=tuple(run.acks), status=status)

    async def _collect(self, run: _Run) -> None:
        """Read until the process has ended, and have it killed meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.kill_in_time)
            while True:
                kind, text = await self._next_report()
                if kind != "ack":
                    break
                run.take_ack(text)
            nursery.cancel_scope.cancel()
        if kind != "ended":
            raise CrashError(f"the process of the target reported {kind!r} {text}")

    async def _order(self, order: object) -> None:
        stdin = cast("trio.abc.SendStream", self._process.stdin)
        with suppress(trio.BrokenResourceError):  # the reports tell that it is gone
            await stdin.send_all(json.dumps(order).encode() + b"\n")

    async def _expect(self, wanted: str) -> str:
        kind, text = await self._next_report()
        if kind != wanted:
            raise CrashError(f"the process of the target reported {kind!r} {text}, not {wanted!r}")
        return text

    async def _next_report(self) -> tuple[str, str]:
        while b"\n" not in self._buffer:
            data = await self._reports.receive_some()
            if not data:
                return "gone", "(its traceback is on stderr)"
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        kind, text = json.loads(line)
        return str(kind), str(text)


@final
class _Run:
    def __init__(self, pid: int, kill: Kill | CallFault | None) -> None:
        self.pid = pid
        self.acks: list[str] = []
        self._kill = kill if isinstance(kill, Kill) else None
        self._due = trio.Event()
        self._mind()

    def take_ack(self, text: str) -> None:
        self.acks.append(text)
        self._mind()

    def _mind(self) -> None:
        if self._kill is not None and not self._kill.syscall and len(self.acks) >= self._kill.after_acks:
            self._due.set()

    async def kill_in_time(self) -> None:
        await self._due.wait()
        if self._kill is not None:
            await trio.sleep(self._kill.delay_s)
            os.kill(self.pid, signal.SIGKILL)


@asynccontextmanager
async def open_crash_harness(target: str, *, path: Sequence[str | Path] = ()) -> AsyncIterator[CrashHarness]:
    """A harness for the target `module:function`, which may be async and then runs under trio.

    The module is looked for in `path` and then where this process finds its modules. Leaving ends the processes.
    """
    search = os.pathsep.join([*map(str, path), *[entry or str(Path.cwd()) for entry in sys.path]])
    reading, writing = os.pipe()
    reports = trio.lowlevel.FdStream(reading)
    try:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", _PARENT, target, str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": search},
        )
    except BaseException:
        reports.close()
        raise
    finally:
        os.close(writing)
    try:
        yield CrashHarness(process, reports)
    finally:
        reports.close()
        with trio.move_on_after(_END_S, shield=True):
            await _end(process)


async def run_and_kill(
    target: str, *, kill: Kill | None, args: Sequence[str] = (), path: Sequence[str | Path] = ()
) -> Crash:
    """One run of a target; for several, `open_crash_harness` is faster."""
    async with open_crash_harness(target, path=path) as harness:
        return await harness.run(*args, kill=kill)


async def check_crashes(
    harness: CrashHarness,
    *,
    kills: Iterable[Kill],
    args: Callable[[int], Sequence[str]],
    reopen: Callable[[int], Awaitable[T]],
    compare: Callable[[Crash, T], Sequence[str]],
) -> CrashSummary:
    """Run the target once a kill, reopen what each run left, and compare it with what was acknowledged.

    `args` and `reopen` get the number of the run. Raises `CrashError` with everything needed to repeat the first run
    for which `compare` names a problem.
    """
    runs = killed = acks = 0
    for number, kill in enumerate(kills):
        crash = await harness.run(*args(number), kill=kill)
        problems = compare(crash, await reopen(number))
        if problems:
            shown = "\n".join(problems[:20])
            raise CrashError(f"run {number}, {kill}, {len(crash.acks)} acknowledged, status {crash.status}:\n{shown}")
        runs, killed, acks = runs + 1, killed + crash.killed, acks + len(crash.acks)
    return CrashSummary(runs=runs, killed=killed, acks=acks)


async def kill_at_every_call(
    harness: CrashHarness,
    *,
    syscall: str,
    args: Callable[[int], Sequence[str]],
    check: Callable[[int, Crash], Awaitable[None]],
    limit: int = 10_000,
) -> int:
    """Kill the target at its first call of `syscall`, at its second, and so on, until a run comes to its end.

    `check` gets the number of the run, from 1, and what became of it, the run to the end included; it raises when
    something is wrong. Returns the number of kills. In a target of several threads, a kill comes when any of them has
    made so many calls. Needs `can_trace`.
    """
    for nth in range(1, limit + 1):
        crash = await harness.run(*args(nth), kill=Kill(syscall=syscall, nth=nth))
        await check(nth, crash)
        if not crash.killed:
            return nth - 1
    raise CrashError(f"the target still makes {syscall} after {limit} calls")


# Commands


class CommandCrash(Struct, frozen=True, kw_only=True):
    """A command that is over: `status` as of `Crash`, and whatever it had printed."""

    status: int
    stdout: bytes
    stderr: bytes

    @property
    def killed(self) -> bool:
        """Whether it was killed; otherwise it came to its own end first."""
        return self.status == -signal.SIGKILL


async def run_command_and_kill(
    command: Sequence[str],
    *,
    when: Callable[[], bool] | None = None,
    delay_s: float = 0.0,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> CommandCrash:
    """Run a command and kill it `delay_s` after `when` first says so; without `when`, after its start.

    `when` is asked every millisecond, and right after the kill nothing more happens to the command, so that it may note
    what it saw. Only the process of the command is killed. A cancel kills it too.
    """
    process = await trio.lowlevel.open_process(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=dict(env) if env is not None else None,
    )
    printed: dict[str, bytes] = {}
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_all, process.stdout, printed, "stdout")
            nursery.start_soon(_read_all, process.stderr, printed, "stderr")
            await _kill_when(process, when, delay_s)
    finally:
        with trio.move_on_after(_END_S, shield=True):
            await _end(process)
    return CommandCrash(status=cast("int", process.returncode), stdout=printed["stdout"], stderr=printed["stderr"])


async def _kill_when(process: trio.Process, when: Callable[[], bool] | None, delay_s: float) -> None:
    """Kill a process `delay_s` after `when` says so; one that has ended by itself stays so."""
    while process.poll() is None and not (when is None or when()):  # noqa: ASYNC110 - another process sets no event
        await trio.sleep(_POLL_S)
    with trio.move_on_after(delay_s):
        await process.wait()
    process.kill()


async def _read_all(stream: trio.abc.ReceiveStream | None, into: dict[str, bytes], name: str) -> None:
    into[name] = b"".join([piece async for piece in stream]) if stream is not None else b""


async def _end(process: trio.Process) -> None:
    """Kill a process that this module started, unless it has ended, and take its exit status."""
    if process.returncode is None:
        process.kill()
    await process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            await stream.aclose()


# Tracing


async def can_trace() -> bool:
    """Whether strace is installed and may trace here."""
    if shutil.which("strace") is None:
        return False
    done = await trio.run_process(
        ["strace", "-qq", "-o", os.devnull, sys.executable, "-c", ""], check=False, capture_stderr=True
    )
    return done.returncode == 0


@asynccontextmanager
async def _traced(pid: int, kill: Kill | CallFault | None) -> AsyncIterator[None]:
    """Have strace in place where a kill asks for it. It ends with the process that it traces."""
    if kill is None or not kill.syscall:
        yield
        return
    inject = f"inject={kill.syscall}:{_injection(kill)}"
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={kill.syscall}", "-e", inject, "-p", str(pid)]
    tracer = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while tracer.poll() is None and not _is_traced(pid):  # noqa: ASYNC110 - nobody would set an event
            await trio.sleep(_POLL_S)
        if tracer.returncode is not None:
            said = b"".join([piece async for piece in cast("trio.abc.ReceiveStream", tracer.stderr)])
            # Without a word, the call in which the process waits was the one to end it: both had gone in between.
            if said:
                raise CrashError(f"strace cannot trace: {said.decode(errors='replace').strip()}")
        yield
    finally:
        with trio.move_on_after(_END_S, shield=True):
            await _end(tracer)


def _injection(kill: Kill | CallFault) -> str:
    if isinstance(kill, Kill):
        return f"signal=KILL:when={kill.nth}"
    return f"error={kill.error}:when={kill.nth}{'+' if kill.sticky else ''}"


def _is_traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    return any(line.split()[1] != "0" for line in status.splitlines() if line.startswith("TracerPid:"))


# In the processes of the target


def _serve_runs() -> None:
    """The process that forks: one run an order, until there are no more orders."""
    target, reports = _load(sys.argv[1]), int(sys.argv[2])
    orders = os.fdopen(os.dup(0), "rb", buffering=0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    while order := orders.readline():
        args = json.loads(order)["args"]
        gate, opener = os.pipe()
        pid = os.fork()
        if pid == 0:
            orders.close()
            os.close(opener)
            _run_child(target, args, gate=gate, reports=reports)
        os.close(gate)
        _report(reports, "started", str(pid))
        if not orders.readline():
            return  # the child finds its gate closed
        with suppress(BrokenPipeError):  # killed already
            os.write(opener, b"!")
        os.close(opener)
        # Waits without taking the status, so that the number stays the child's until "reap".
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        _report(reports, "ended", str(pid))
        orders.readline()
        _report(reports, "status", str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


def _load(target: str) -> Callable[..., object]:
    module, _, name = target.partition(":")
    return cast("Callable[..., object]", getattr(import_module(module), name))


def _run_child(target: Callable[..., object], args: Sequence[str], *, gate: int, reports: int) -> NoReturn:
    """One run; leaves by `_exit`, so that nothing of the forking process runs a second time."""
    status = 1
    try:
        _die_with_parent()
        if os.read(gate, 1):
            os.close(gate)
            _call(target, args, reports)
            status = 0
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stderr.flush()
        os._exit(status)


def _call(target: Callable[..., object], args: Sequence[str], reports: int) -> None:
    def ack(text: str) -> None:
        _report(reports, "ack", text)

    if inspect.iscoroutinefunction(target):
        trio.run(target, ack, *args)
    else:
        target(ack, *args)


def _report(reports: int, kind: str, text: str) -> None:
    line = json.dumps([kind, text]).encode() + b"\n"
    if len(line) > _MAX_ACK_BYTES:
        raise ValueError(f"an acknowledgement has at most {_MAX_ACK_BYTES} bytes")
    os.write(reports, line)


def _die_with_parent() -> None:
    """Not outlive the process that started this one, as far as the system offers it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
