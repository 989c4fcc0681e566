"""Processes for tools that block, hold the interpreter's lock, or are not trusted.

Every call has a process of its own, forked from one that has imported the tool's module (see `tools.zygote`), and
that process and all in its group are killed as soon as the call is over, in whatever way. It inherits no file, no
memory of this program, and of the environment only what a Python needs and what `ToolLimits.process_env` names. What
comes back is read up to a size and believed no more than any other input.

A tool gets no root directory, no network and no user of its own here: for code of strangers, add the operating
system's own sandbox.
"""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final, cast

import msgspec
import trio

from ..wire.codec import encode_json, make_decoder
from .frames import HEAD, ChildError, ChildProgress, ChildRequest
from .results import EncodedResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import ToolLimits

__all__ = ["ProcessError", "ProcessPool"]

_BOOT: Final = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    f"from {__package__}.zygote import serve_forks; serve_forks(int(sys.argv[1]), sys.argv[2])"
)
_ENVIRONMENT: Final = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "PYTHONHASHSEED",
    "PYTHONDONTWRITEBYTECODE",
)
_SLACK_BYTES: Final = 256 * 1024
# Escapes make of a byte of a result up to six, and its value may be there beside its text.
_MAX_GROWTH: Final = 12
_HANDSHAKE_S: Final = 5.0
_CLOSE_S: Final = 1.0
_ID_BYTES: Final = 4


class ProcessError(Exception):
    """The process of a tool could not be started, ended without an answer, or sent something else."""


class _LeftError(Exception):
    """Whoever was starting the process has left it, or it has died."""


class ProcessPool:
    """Runs calls in processes, `limits.max_processes` at the same time. To be closed by whoever made it."""

    def __init__(self, limits: ToolLimits) -> None:
        self._limiter = trio.CapacityLimiter(limits.max_processes)
        self._extra = tuple(limits.process_env)
        self._zygotes: dict[str, _Zygote] = {}

    @property
    def running(self) -> int:
        """Calls that have a process now."""
        return int(self._limiter.borrowed_tokens)

    async def run(
        self, request: ChildRequest, *, on_progress: Callable[[str, float | None], None]
    ) -> EncodedResult | ChildError:
        """What the tool gave. Raises `ProcessError`.

        Cancelling kills the process; after that the wait for its end is shielded, and short.
        """
        async with self._limiter:
            zygote, child = await self._fork(request.module)
            try:
                await child.send(request)
                return await child.receive(max_bytes=request.max_result_bytes, on_progress=on_progress)
            finally:
                child.kill()
                await zygote.bury(child)  # noqa: ASYNC102 - shields itself, and is bounded

    async def aclose(self) -> None:
        """End all processes; shielded, and bounded."""
        zygotes, self._zygotes = list(self._zygotes.values()), {}
        for zygote in zygotes:
            await zygote.aclose()

    async def _fork(self, module: str) -> tuple[_Zygote, _Child]:
        zygote = await self._zygote_of(module)
        try:
            return zygote, await zygote.fork()
        except ProcessError:
            if not zygote.is_broken:
                raise
        # It died since the last call. Nothing has been run, so another may.
        zygote = await self._zygote_of(module)
        return zygote, await zygote.fork()

    async def _zygote_of(self, module: str) -> _Zygote:
        while True:
            found = self._zygotes.get(module)
            if found is None or found.is_broken:
                left, found = found, _Zygote(module, self._environment())
                self._zygotes[module] = found
                if left is not None:
                    await left.aclose()
            with suppress(_LeftError):
                await found.start()
                return found

    def _environment(self) -> dict[str, str]:
        names = {*_ENVIRONMENT, *self._extra}
        return {name: value for name, value in os.environ.items() if name in names}


class _Zygote:
    """The process that forks the children of one module."""

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._module = module
        self._environment = environment
        self._lock = trio.Lock()
        self._process: trio.Process | None = None
        self._control: trio.SocketStream | None = None
        self._is_ready = False
        self.is_broken = False

    async def start(self) -> None:
        """Start the process unless it runs, and wait until it has imported the module. Cancelling ends it.

        Raises `_LeftError` when it is broken: then it takes no calls, which would end with it, but is to be replaced.
        """
        async with self._lock:
            if self.is_broken:
                raise _LeftError
            if self._is_ready:
                return
            try:
                await self._start()
            finally:
                if not self._is_ready:
                    await self.aclose()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._control = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        with theirs:
            command = [sys.executable, "-c", _BOOT, str(theirs.fileno()), self._module, *sys.path]
            self._process = await trio.lowlevel.open_process(
                command,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        answer = await self._control.receive_some(_SLACK_BYTES)
        if bytes(answer) != b"K":
            reason = bytes(answer[1:]).decode("utf-8", "replace") or "the process ended"
            raise ProcessError(f"{self._module} cannot be imported in a process: {reason}")
        self._is_ready = True

    async def fork(self) -> _Child:
        """A new child, which waits for its request."""
        ours, theirs = socket.socketpair()
        child = _Child(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        try:
            with theirs:
                rights = array.array("i", [theirs.fileno()]).tobytes()
                answer = await self._command(b"F", _ID_BYTES, rights=rights)
            child.id = int.from_bytes(answer)
        finally:
            if not child.id:
                child.kill()
        if not child.id:
            raise ProcessError("no process could be started")
        return child

    async def bury(self, child: _Child) -> None:
        """Wait for a child that was killed; shielded, and bounded."""
        if child.id and not self.is_broken:
            with trio.CancelScope(shield=True), suppress(ProcessError):
                await self._command(b"R" + child.id.to_bytes(_ID_BYTES), 1)

    async def _command(self, command: bytes, answer_bytes: int, *, rights: bytes = b"") -> bytes:
        """Send a command and wait for its answer: not to be cancelled in between, but never for long."""
        async with self._lock:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _HANDSHAKE_S):
                # One that others have waited for in vain is not waited for again.
                answer = None if self.is_broken else await self._exchange(command, answer_bytes, rights)
                if answer is not None:
                    return answer
            self.is_broken = True
            raise ProcessError(f"the process of {self._module} has ended, or does not answer")

    async def _exchange(self, command: bytes, answer_bytes: int, rights: bytes) -> bytes | None:
        if self._control is None:
            return None
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        answer = b""
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            await self._control.socket.sendmsg([command], ancillary)
            while len(answer) < answer_bytes and (piece := await self._control.receive_some(answer_bytes)):
                answer += piece
        return answer if len(answer) == answer_bytes else None

    async def aclose(self) -> None:
        """End the process and its children; shielded, and bounded."""
        self.is_broken = True
        if self._control is not None:
            # It kills its children, and ends.
            self._control.socket.close()
        if self._process is None:
            return
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_CLOSE_S if self._is_ready else 0):
                await self._process.wait()
            self._process.kill()
            await self._process.wait()


class _Child:
    """The process of one call, seen from here; what it sends is not trusted."""

    def __init__(self, channel: trio.SocketStream) -> None:
        self.id = 0
        self._channel = channel
        self._buffer = bytearray()

    async def send(self, request: ChildRequest) -> None:
        data = encode_json(request)
        try:
            await self._channel.send_all(HEAD.pack(b"C", len(data)) + data)
        except trio.BrokenResourceError:
            raise ProcessError("the process ended before it took the call") from None

    async def receive(
        self, *, max_bytes: int, on_progress: Callable[[str, float | None], None]
    ) -> EncodedResult | ChildError:
        """The result, or the error; what it tells before goes to `on_progress`."""
        while True:
            head = await self._read(HEAD.size)
            kind, length = HEAD.unpack(head)
            if length > _MAX_GROWTH * max_bytes + _SLACK_BYTES:
                raise ProcessError("the process sent more than a result may have")
            frame = await self._read(length)
            try:
                match kind:
                    case b"R":
                        return cast("EncodedResult", _decode_result(frame))
                    case b"E":
                        return cast("ChildError", _decode_error(frame))
                    case _:
                        progress = cast("ChildProgress", _decode_progress(frame))
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise ProcessError("the process sent something else than a result") from exc
            on_progress(progress.message, progress.fraction)

    async def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            try:
                piece = await self._channel.receive_some(_SLACK_BYTES)
            except trio.BrokenResourceError:
                piece = b""
            if not piece:
                raise ProcessError("the process ended without a result")
            self._buffer += piece
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    def kill(self) -> None:
        """End the process, and all that it started in its group."""
        self._channel.socket.close()
        if self.id:
            for kill in (os.killpg, os.kill):
                with suppress(ProcessLookupError, PermissionError):
                    kill(self.id, signal.SIGKILL)


_decode_result: Final = make_decoder(EncodedResult)
_decode_error: Final = make_decoder(ChildError)
_decode_progress: Final = make_decoder(ChildProgress)
