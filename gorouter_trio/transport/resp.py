"""One connection to a Redis server: commands and replies in order, for any number of tasks.

Theory of operation. Replies come in the order of the commands, and nothing else says whose they are. So a command is
put into the line of those that wait in the same step in which its bytes are put into the buffer that goes out, and
stays in it until its reply is there, whoever has gone meanwhile: the reply of a caller who was cancelled is read and
dropped, and the next one is the next one's. There is no way around the line, and so no reply that reaches another.

No task of its own serves the connection. Of the callers that wait one *leads*: it reads from the socket, for all of
them, until its own reply has come, or it is cancelled; then the next one in the line leads. One *flushes* what all have
put into the buffer; where several replies have come at a time, several commands follow at a time, and it lets the
others put theirs into the buffer before. So commands of concurrent callers share system calls, and a caller alone has
no switch of tasks but that of its read.

A command that has no reply at its deadline fails the connection, because all behind it have none either. What was in
flight on a connection that fails may have been carried out: errors say so by their kind.
"""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

import hiredis
import outcome
import trio

from ..errors import StoreError, StoreErrorKind
from .streams import bottom, drop, quiet_check, reason_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .streams import Closable

__all__ = ["Argument", "ErrorReply", "Reply", "RespConnection", "RespReader", "pack", "store_error"]

Argument: TypeAlias = str | bytes | int | float
"""What a command is made of."""

Reply: TypeAlias = "object"
"""What a server answers: bytes, int, float, bool, None, lists and dicts of these. RESP2 has flat lists for dicts."""

_MORE: Final = object()
_IN_SCRIPT: Final = re.compile(r"^ERR Error running script .*@user_script: ?\d+: -?([A-Z]+) ", re.DOTALL)
_MOST_PENDING = 65_536
_MOST_UNSENT_BYTES = 256 * 1024 * 1024
_IDLE_S = 0.5

_KINDS: Final[dict[str, StoreErrorKind]] = {
    "LOADING": "loading",
    "READONLY": "read_only",
    "MISCONF": "read_only",
    "NOREPLICAS": "read_only",
    "OOM": "full",
    "NOAUTH": "denied",
    "WRONGPASS": "denied",
    "NOPERM": "denied",
    "BUSY": "locked",
    "TRYAGAIN": "locked",
    "CLUSTERDOWN": "locked",
    "MASTERDOWN": "locked",
    "UNBLOCKED": "locked",
    "WRONGTYPE": "foreign",
}
_HINTS: Final[dict[str, str]] = {
    "LOADING": "it is still loading its data",
    "READONLY": "it is a replica, and takes no writes",
    "MISCONF": "it takes no writes, because it cannot save them",
    "NOREPLICAS": "it takes no writes, because too few replicas are there",
    "OOM": "its memory is full (maxmemory)",
    "WRONGTYPE": "the key holds something else",
}


class ErrorReply(Exception):  # noqa: N818 - what a server says, never raised
    """An error that a server has answered with: its code, such as "WRONGTYPE", and the whole of its text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # Older servers put what a command in a script has answered behind where in the script it stands.
        inner = _IN_SCRIPT.search(text)
        self.code = text.partition(" ")[0] if inner is None else inner[1]
        self.text = text


def store_error(reply: ErrorReply, command: str = "") -> StoreError:
    """What an error reply is to the caller: the command did nothing."""
    about = f" to {command}" if command else ""
    hint = _HINTS.get(reply.code)
    said = f"{hint}: {reply.text}" if hint else reply.text
    return StoreError(f"Redis answered{about}: {said}", kind=_KINDS.get(reply.code, "refused"))


def pack(command: tuple[Argument, ...]) -> bytes:
    """A command as it goes over the wire; raises `TypeError` for what cannot be part of one."""
    return hiredis.pack_command(command)  # type: ignore[arg-type,no-any-return]  # its stub has a command of one part


class RespReader:
    """Replies out of bytes, RESP2 and RESP3. Errors are given as `ErrorReply`, also those inside of lists."""

    __slots__ = ("_reader",)

    def __init__(self) -> None:
        self._reader = hiredis.Reader(notEnoughData=_MORE, replyError=ErrorReply)

    def feed(self, data: bytes | bytearray, *, keeps_pushed: bool = False) -> list[Reply]:
        """The replies that are whole now, and, where it is kept, what the server pushes by itself, in order.

        Raises `StoreError` for what is no RESP.
        """
        found: list[Reply] = []
        reader = self._reader
        try:
            reader.feed(data if type(data) is bytes else bytes(data))
            while (reply := reader.gets()) is not _MORE:
                if keeps_pushed or type(reply) is not hiredis.PushNotification:
                    found.append(reply)
        except (hiredis.HiredisError, UnicodeDecodeError, TypeError) as exc:
            # A TypeError is a map whose key no dict can have.
            raise StoreError(f"what answers there is no Redis: {exc}", kind="foreign") from None
        return found


class _Call:
    """A command that waits for its reply. Without a `task` its caller is not parked, or has gone."""

    __slots__ = ("deadline", "is_done", "is_gone", "reply", "task")

    def __init__(self, deadline: float, *, is_gone: bool = False) -> None:
        self.deadline = deadline
        self.task: trio.lowlevel.Task | None = None
        self.is_done = False
        self.is_gone = is_gone
        self.reply: Reply = None


class _Failure:
    """Why a connection has ended, for each that was in its line."""

    __slots__ = ("kind", "message")

    def __init__(self, kind: StoreErrorKind, message: str) -> None:
        self.kind: StoreErrorKind = kind
        self.message = message

    def error(self) -> StoreError:
        return StoreError(self.message, kind=self.kind)


class RespConnection:
    """A connection on `stream`, which is this one's from now on; `name` is who is on the other side, for errors."""

    __slots__ = (
        "_bottom",
        "_failure",
        "_has_leader",
        "_is_flushing",
        "_is_quiet",
        "_is_shared",
        "_now",
        "_out",
        "_pending",
        "_reader",
        "_send_nowait",
        "_stream",
        "_unsent",
        "_used_at",
        "commands",
        "dropped",
        "name",
        "sends",
    )

    def __init__(self, stream: trio.abc.Stream, *, name: str) -> None:
        self.name = name
        self._stream = stream
        self._bottom: Closable = bottom(stream)
        self._is_quiet = quiet_check(stream)
        # One call into the kernel without any scope around it, where the stream is a socket of ours.
        self._send_nowait: Callable[[bytes], int] | None = getattr(stream, "send_nowait", None)
        self._reader = RespReader()
        self._out: list[bytes] = []
        self._unsent = 0
        self._pending: deque[_Call] = deque()
        self._has_leader = self._is_flushing = self._is_shared = False
        self._failure: _Failure | None = None
        self._now = trio.lowlevel.current_clock().current_time
        self._used_at = self._now()
        self.commands = self.sends = self.dropped = 0

    def __repr__(self) -> str:
        state = "open" if self._failure is None else f"failed: {self._failure.kind}"
        return f"<RespConnection to {self.name}, {state}: {len(self._pending)} in flight>"

    @property
    def in_flight(self) -> int:
        """How many commands have no reply yet, those whose callers have gone included."""
        return len(self._pending)

    @property
    def is_open(self) -> bool:
        """Whether a command may be given to it. An idle connection that the server has closed is found out here."""
        if self._failure is None and (self._pending or self._now() - self._used_at > _IDLE_S):
            self._look()
        return self._failure is None

    @property
    def is_closed(self) -> bool:
        """Whether it has ended, as far as anybody has noticed."""
        return self._failure is not None

    async def call(self, data: bytes, *, deadline: float) -> Reply:
        """Send a packed command and return its reply, an `ErrorReply` if that is what it is.

        Raises `StoreError` when the connection fails first: of the kind "io" or "timeout", whether the command was
        carried out is unknown then. Cancelling leaves at once; the command is carried out or not.
        """
        return await self.call_all((data,), deadline=deadline)

    async def call_all(self, commands: Iterable[bytes], *, deadline: float) -> Reply:
        """`call` for several commands that nothing comes between; the reply is that of the last one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return await self._wait_for(self._put(commands, deadline)[-1], deadline)

    async def call_each(self, commands: Iterable[bytes], *, deadline: float) -> list[Reply]:
        """`call_all`, with the replies of all."""
        await trio.lowlevel.checkpoint_if_cancelled()
        calls = self._put(commands, deadline)
        await self._wait_for(calls[-1], deadline)
        return [call.reply for call in calls]

    async def _wait_for(self, call: _Call, deadline: float) -> Reply:
        try:
            if not self._is_flushing:
                await self._flush(deadline)
            while not call.is_done:
                if self._has_leader:
                    await self._park(call)
                else:
                    await self._lead(call)
        finally:
            call.is_gone = True
        reply = call.reply
        if type(reply) is _Failure:
            raise reply.error()
        return reply

    def close(self) -> None:
        """End it at once: what is in flight fails, and whether it was carried out is unknown."""
        self.fail("closed", "the connection to Redis was closed")

    async def aclose(self) -> None:
        """`close`, and wait for a stream that has to be waited for: bounded, and whatever happens around it."""
        self.close()
        await drop(self._bottom)

    def fail(self, kind: StoreErrorKind, message: str) -> None:
        """End it because of something; the first reason stands."""
        if self._failure is not None:
            return
        self._failure = _Failure(kind, message)
        self._out.clear()
        self._bottom.close()
        for call in self._pending:
            self._settle(call, self._failure)
        self._pending.clear()

    async def send_raw(self, data: bytes) -> None:
        """Send bytes past the line, for a connection that is not shared and has only pushed messages from now on."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._broken(exc) from exc

    async def receive_raw(self) -> bytes | bytearray:
        """What arrives on such a connection; cancelling loses nothing. Raises `StoreError` at its end."""
        try:
            data = await self._stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise self._broken(exc) from exc
        if not data:
            raise StoreError(f"{self.name} closed the connection", kind="io")
        return data

    # The line

    def _put(self, commands: Iterable[bytes], deadline: float) -> list[_Call]:
        """Put commands into the buffer and, in the same step, into the line; the last one is waited for."""
        if self._failure is not None:
            raise self._failure.error()
        if len(self._pending) >= _MOST_PENDING or self._unsent >= _MOST_UNSENT_BYTES:
            raise StoreError(f"{len(self._pending)} commands are in flight to {self.name} already", kind="locked")
        calls: list[_Call] = []
        for data in commands:
            self._out.append(data)
            self._unsent += len(data)
            calls.append(_Call(deadline, is_gone=True))
        calls[-1].is_gone = False
        self._pending += calls
        self.commands += len(calls)
        return calls

    def _settle(self, call: _Call, reply: Reply) -> None:
        call.reply = reply
        call.is_done = True
        self.dropped += call.is_gone
        task, call.task = call.task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    async def _park(self, call: _Call) -> None:
        """Wait for the reply, or to be woken as the one who leads."""

        def leave(_raise_cancel: object) -> trio.lowlevel.Abort:
            call.task = None
            call.is_gone = True
            return trio.lowlevel.Abort.SUCCEEDED

        call.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(leave)

    # Sending

    async def _flush(self, deadline: float) -> None:
        """Send what is in the buffer, and what comes into it meanwhile."""
        self._is_flushing = True
        try:
            if self._is_shared:
                # Those who were answered together are about to put their next commands into it.
                await trio.lowlevel.cancel_shielded_checkpoint()
            while self._out:
                data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
                self._out.clear()
                await self._send(data, deadline)
                self._unsent = sum(map(len, self._out))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.fail("io", self._broken(exc).message)
        finally:
            self._is_flushing = False

    async def _send(self, data: bytes, deadline: float) -> None:
        self.sends += 1
        if self._send_nowait is not None:
            sent = self._send_nowait(data)
            if sent == len(data):
                return
            data = data[sent:]
        # Half a command would be the end of the connection, so a cancel waits, as long as the command may take.
        with trio.CancelScope(shield=True, deadline=deadline) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            self._expire()

    # Reading

    async def _lead(self, call: _Call) -> None:
        """Read for all until `call` has its reply."""
        self._has_leader = True
        try:
            await self._read_until(call)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self.fail("io", self._broken(exc).message)
        finally:
            self._has_leader = False
            if self._pending:
                self._appoint()

    async def _read_until(self, call: _Call) -> None:
        with trio.CancelScope(deadline=self._first_deadline()) as scope:
            while not call.is_done:
                self._take(await self._stream.receive_some())
                if not call.is_done:
                    scope.deadline = self._first_deadline()
        if scope.cancelled_caught and not call.is_done:
            self._expire()

    def _take(self, data: bytes | bytearray) -> None:
        """Give each reply to the one whose turn it is; no bytes are the end."""
        if not data:
            self.fail("io", f"{self.name} closed the connection")
            return
        try:
            replies = self._reader.feed(data)
        except StoreError as exc:
            self.fail(exc.kind, f"{self.name}: {exc.message}")
            return
        pending = self._pending
        self._is_shared = len(replies) > 1
        self._used_at = self._now()
        for reply in replies:
            if not pending:
                self.fail("foreign", f"{self.name} sent a reply that nobody had asked for")
                return
            self._settle(pending.popleft(), reply)

    def _appoint(self) -> None:
        """Wake the first in the line who is parked, to lead."""
        for call in self._pending:
            if call.task is not None:
                task, call.task = call.task, None
                trio.lowlevel.reschedule(task, outcome.Value(None))
                return

    def _first_deadline(self) -> float:
        """When the first of those who still wait has waited for too long."""
        return next((call.deadline for call in self._pending if not call.is_gone), float("inf"))

    def _broken(self, exc: trio.BrokenResourceError | trio.ClosedResourceError) -> StoreError:
        if self._failure is not None:
            return self._failure.error()
        why = "was closed" if isinstance(exc, trio.ClosedResourceError) else f"broke: {reason_of(exc)}"
        return StoreError(f"the connection to {self.name} {why}", kind="io")

    def _expire(self) -> None:
        self.fail("timeout", f"{self.name} did not answer in time; whether it has done what was asked is unknown")

    def _look(self) -> None:
        """See whether the connection is still good, without waiting."""
        is_quiet = self._is_quiet is None or self._is_quiet()
        if not self._pending:
            if not is_quiet:
                self.fail("io", f"{self.name} has closed the connection")
        elif is_quiet and not self._has_leader and self._pending[0].deadline < self._now():
            # All who were in the line have gone, so that nobody was there to see it.
            self._expire()
