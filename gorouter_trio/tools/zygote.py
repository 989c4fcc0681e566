"""The other end of `tools.process`: a process that has imported a tool's module and forks one child a call.

Theory of operation. Starting a Python and importing a module takes a fraction of a second; forking takes a few
milliseconds. So one process per module, the zygote, is started afresh with an environment of its own, imports the
module and does nothing else; each call gets a child of it, which no other call has touched and which is gone
afterwards. The zygote runs no tool, so it cannot be hung or corrupted by one.

Over the control socket come commands of one byte: `F` with a socket in ancillary data forks a child that serves one
call on that socket, and answers with its process id, or 0; `R` and an id waits for that child, which was killed, and
answers `r`. Children that ended stay unwaited for until then, so that their id belongs to nobody else. When the
socket closes, all of them are killed.

A child is the leader of a session and process group of its own. It reads one request and writes frames: a byte that
says what it is, four bytes of length, JSON.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import resource
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Final, TypeAlias, cast

import outcome
import trio
from msgspec import Struct

from ..errors import ToolError
from ..wire.codec import decode_json, encode_json, make_decoder
from .arguments import ArgumentsError
from .context import ToolContext
from .frames import HEAD, ChildError, ChildProgress, ChildRequest
from .registry import AnyTool, Tool
from .results import EncodedResult, ResultError, encode_result, sendable

__all__ = ["serve_forks"]

_ID: Final = struct.Struct("!I")
_MAX_TEXT: Final = 16_384


_decode_request: Final = make_decoder(ChildRequest)
_Send: TypeAlias = Callable[[bytes, Struct], None]


def serve_forks(control_fd: int, module: str) -> None:
    """Import `module` and serve the control socket until it closes."""
    control = socket.socket(fileno=control_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    imported = outcome.capture(importlib.import_module, module)
    if isinstance(imported, outcome.Error):
        text = "".join(traceback.format_exception_only(imported.error)).strip()
        control.sendall(b"E" + text.encode("utf-8", "replace")[:_MAX_TEXT])
        return
    control.sendall(b"K")
    children: set[int] = set()
    try:
        while _serve_command(control, children):
            pass
    finally:
        for child in children:
            _kill(child)


def _serve_command(control: socket.socket, children: set[int]) -> bool:
    """Serve one command; False when the other side has gone."""
    command, sockets, _flags, _address = socket.recv_fds(control, 1, 1)
    if command == b"F":
        child = _fork(control, sockets[0])
        os.close(sockets[0])
        children.add(child) if child else None
        control.sendall(_ID.pack(child))
    elif command == b"R":
        (child,) = _ID.unpack(control.recv(_ID.size, socket.MSG_WAITALL))
        os.waitpid(child, 0)
        children.discard(child)
        control.sendall(b"r")
    return command != b""


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):
        outcome.capture(kill, child, signal.SIGKILL)


def _fork(control: socket.socket, fd: int) -> int:
    """The id of a new child, 0 where there cannot be one."""
    forked = outcome.capture(os.fork)
    if isinstance(forked, outcome.Error):
        return 0
    child = forked.unwrap()
    if child == 0:
        # Nothing of what was on the stack above may run in the child.
        outcome.capture(_serve_call, control, fd)
        os._exit(0)
    return child


# In the child


def _serve_call(control: socket.socket, fd: int) -> None:
    os.setsid()
    control.close()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    channel = socket.socket(fileno=fd)
    request = cast("ChildRequest", _decode_request(_read_request(channel)))
    _limit(request)

    def send(kind: bytes, frame: Struct) -> None:
        data = encode_json(frame)
        channel.sendall(HEAD.pack(kind, len(data)) + data)

    result = outcome.capture(_call, request, send)
    if isinstance(result, outcome.Value):
        send(b"R", result.value)
    else:
        send(b"E", _error_of(result.error))


def _read_request(channel: socket.socket) -> bytes:
    head = channel.recv(HEAD.size, socket.MSG_WAITALL)
    _kind, length = HEAD.unpack(head)
    return channel.recv(length, socket.MSG_WAITALL) if length else b""


def _limit(request: ChildRequest) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if request.max_process_bytes is not None:
        resource.setrlimit(resource.RLIMIT_AS, (request.max_process_bytes, request.max_process_bytes))


def _call(request: ChildRequest, send: _Send) -> EncodedResult:
    ready = _find(request).bind(request.arguments, _context(request, send))
    value = ready()
    if inspect.iscoroutine(value):
        value = trio.run(_await, value)
    return encode_result(value, max_bytes=request.max_result_bytes, keep_value=request.keep_value)


async def _await(coroutine: Coroutine[object, object, object]) -> object:
    return await coroutine


def _find(request: ChildRequest) -> AnyTool:
    """The tool: what stands in the module, or one made of the function that stands there."""
    found: object = importlib.import_module(request.module)
    for part in request.qualname.split("."):
        found = getattr(found, part)
    if isinstance(found, Tool):
        return found
    # The arguments have been held to the schema where it is known.
    parameters = {"type": "object"} if request.raw_schema else None
    return Tool(cast("Callable[..., object]", found), name=request.tool, parameters=parameters)


def _context(request: ChildRequest, send: _Send) -> ToolContext:
    return ToolContext(
        tool=request.tool,
        call_id=request.call_id,
        principal=request.principal,
        session=request.session,
        turn_id=request.turn_id,
        idempotent=request.idempotent,
        deadline=_clock() + request.remaining_s,
        clock=_clock,
        report=functools.partial(_report, send),
    )


def _report(send: _Send, message: str, fraction: float | None) -> None:
    # What is none is left out, as of tools that run elsewhere: it has no form in which it could be sent.
    share = float(fraction) if isinstance(fraction, (int, float)) and 0 <= fraction <= 1 else None
    send(b"P", ChildProgress(sendable(str(message)[:1024]), share))


_clock: Final = time.perf_counter


def _error_of(error: BaseException) -> ChildError:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    said = outcome.capture(str, error)
    lines = outcome.capture(traceback.format_exception, error)
    for_model = isinstance(error, (ToolError, ArgumentsError, ResultError))
    details = error.details if isinstance(error, ToolError) else {}
    return ChildError(
        type=type(error).__name__[:200],
        message=sendable(said.value[:_MAX_TEXT]) if isinstance(said, outcome.Value) else "",
        traceback=sendable("".join(lines.value)[-_MAX_TEXT:]) if isinstance(lines, outcome.Value) else "",
        for_model=for_model,
        details={sendable(str(key)): _plain(value) for key, value in details.items()},
    )


def _plain(value: object) -> object:
    """A value as it can be sent: what is no JSON is told by its kind."""
    encoded = outcome.capture(encode_json, value)
    return decode_json(encoded.value) if isinstance(encoded, outcome.Value) else type(value).__name__
