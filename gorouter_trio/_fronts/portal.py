"""One trio run in a thread of its own, and the way in and out of it: what the fronts for other programs stand on.

Theory of operation. Whoever wants something of the runtime makes a `Call`, an async function with what it is called
in (a deadline, the caller's context), and submits it; the call runs as a task of the runtime and is settled once.
Whatever is held over several steps, such as a stream, is `Lent`: one task of the runtime enters it, reads it ahead as
far as there is room, and leaves it, since a nursery must be left by the task that has entered it.

Both directions are a queue with a flag. Who puts something into an empty queue wakes the other side, who finds it
woken does not: so that a thousand calls at once cost a wake-up or two, and not a thousand. The flag is lowered before
the queue is emptied, so nothing can be left behind.

What crosses between threads is handed over, never shared: a call belongs to its caller until it is submitted, to the
runtime until it is settled, and to its caller again.

A runtime that ends first refuses new calls, then takes back what is lent, closes the client, which fails what waits
for it with the error that it has for this, and cancels what is left after a moment. No call is left without its answer.
"""

from __future__ import annotations

import atexit
import contextvars
import math
import os
import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import outcome
import trio

from ..errors import ConfigError, DeadlineExceededError, GorouterError, PoolClosedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

__all__ = ["LONGEST_S", "Call", "Lent", "Portal"]

T = TypeVar("T")
V = TypeVar("V")

LONGEST_S = 1e9
"""Longer than anybody waits, and no more than what clocks and locks can count."""

_LAST_CALLS_S = 1.0
_AT_EXIT_S = 3.0


class Portal(Generic[V]):
    """A thread with a trio run in it, in which `opening` is entered; `opened` is what that has come to.

    `start` begins it and `stop` ends it; neither waits. Calls may be submitted from any thread but its own. A process
    that was forked from this one is refused: the thread has stayed behind.
    """

    def __init__(self, opening: Callable[[], AbstractAsyncContextManager[V]]) -> None:
        self._opening = opening
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._inbox: list[tuple[Callable[[object], None], object]] = []
        self._is_woken = False
        self._is_refusing = True
        self._is_over = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._calls: trio.Nursery | None = None
        self._lent: trio.Nursery | None = None
        self._body = trio.CancelScope()
        self._due: list[Callable[[], object]] = []
        self._teller: trio.lowlevel.Task | None = None
        self._stopping: trio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="gorouter-trio runtime", daemon=True)
        self._on_change: Callable[[], object] = bool
        self.opened: outcome.Outcome[V] | None = None
        """What entering has given or raised, once it has."""
        self.ended: outcome.Outcome[None] | None = None
        """How the runtime has ended, once it has."""

    def __repr__(self) -> str:
        state = "closed" if self._is_refusing else "open"
        return f"<Portal {state}>"

    # Its life

    @property
    def is_foreign(self) -> bool:
        """Whether this process is not the one that has the thread."""
        return os.getpid() != self._pid

    def start(self, on_change: Callable[[], object]) -> None:
        """Begin; `on_change` is called in the thread when it is open, and when it has ended, opened or not."""
        self._on_change = on_change
        # A daemon does not keep the interpreter from ending; what it has open gets a moment then.
        atexit.register(self._end_at_exit)
        self._thread.start()

    def stop(self) -> None:
        """Refuse new calls, and end. Also while it is still being opened, and again."""
        if not self.is_foreign:
            self._is_refusing = True
            self._post(Portal._begin_to_stop, self)

    def join(self, within_s: float | None = None) -> bool:
        """Wait until the thread has ended; False when that takes longer."""
        if self.is_foreign:
            return True
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _end_at_exit(self) -> None:
        self.stop()
        self.join(_AT_EXIT_S)

    def _begin_to_stop(self) -> None:
        self._is_refusing = True
        if self._stopping is None:
            self._body.cancel()
        else:
            self._stopping.set()

    def _run(self) -> None:
        """The thread."""
        captured = outcome.capture(trio.run, self._main)
        self._finish()
        atexit.unregister(self._end_at_exit)
        self.ended = captured
        self._on_change()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        # Of the run, not of a nursery here: it is needed until the last call is answered, and holds nobody up.
        trio.lowlevel.spawn_system_task(self._tell_due)
        # What came before there was a token has woken nobody.
        self._drain()
        # Around the client: whoever waits for something of it while it closes is answered by it.
        async with trio.open_nursery() as self._calls:
            captured = await outcome.acapture(self._serve)
            self._is_refusing = True
            self._calls.cancel_scope.deadline = trio.current_time() + _LAST_CALLS_S
        self._finish()
        if isinstance(self.opened, outcome.Value):
            captured.unwrap()
        elif isinstance(captured, outcome.Error):
            self.opened = captured
        else:
            self.opened = outcome.Error(PoolClosedError("the client was closed before it was open"))

    async def _serve(self) -> None:
        with self._body:
            async with self._opening() as value:
                self._stopping = trio.Event()
                async with trio.open_nursery() as self._lent:
                    self.opened, self._is_refusing = outcome.Value(value), False
                    self._on_change()
                    await self._stopping.wait()
                    self._lent.cancel_scope.cancel()

    def _finish(self) -> None:
        """From here on nobody would do anything any more; what came in at the last moment is answered here."""
        with self._lock:
            self._is_refusing = self._is_over = True
            left, self._inbox = self._inbox, []
        for _do, subject in left:
            if isinstance(subject, (Call, Lent)):
                subject.refuse()
        self._tell_all()

    # The way in

    def submit(self, call: Call[T], nursery: trio.Nursery | None = None, *, is_inner: bool = False) -> None:
        """Run the call as a task of the runtime, or of a nursery of it: a `ConfigError` where that is closed by then.

        One that `is_inner` is taken while the runtime ends as well, as one in a nursery is. Raises `PoolClosedError`,
        and `ConfigError` in a forked process.
        """
        call.nursery = nursery
        is_inner = is_inner or nursery is not None
        self._enter(self._start_inner if is_inner else self._start, call, is_inner=is_inner)

    def lend(self, lent: Lent[T]) -> None:
        """Have it entered. Raises as `submit`."""
        self._enter(self._start_lent, lent)

    def run_sync(self, function: Callable[[], T]) -> T:
        """What a function that does not wait gives in the thread of the runtime: waits for one step of that.

        Also while that ends, and afterwards at once: there is nobody left whom it could meet.
        """
        if self._is_over and not self.is_foreign:
            return function()
        done = threading.Lock()
        done.acquire()
        call = Call(cast("Callable[[], Awaitable[T]]", function), on_settled=done.release)
        self._enter(_call_now, call, is_inner=True)
        done.acquire()
        return call.unwrap()

    def tell(self, function: Callable[[], object]) -> None:
        """Call a function that neither waits nor raises in the thread of the runtime, as long as that runs."""
        if not self.is_foreign:
            self._post(_do, function)

    def _enter(self, do: Callable[[T], None], subject: T, *, is_inner: bool = False) -> None:
        if os.getpid() != self._pid:
            raise ConfigError(
                f"the client was opened in process {self._pid}, from which this one was forked: open a client here"
            )
        if threading.get_ident() == self._thread.ident:
            raise ConfigError("the client was called in the thread of its own runtime, which would wait for itself")
        if (self._is_refusing and not is_inner) or not self._post(do, subject):
            raise PoolClosedError("the client is closed")

    def _post(self, do: Callable[[T], None], subject: T) -> bool:
        """Queue something to do; False when nobody would do it any more."""
        with self._lock:
            if self._is_over:
                return False
            self._inbox.append((cast("Callable[[object], None]", do), subject))
            # In this order: a Ctrl-C in between leaves one wake-up too many, not one too few.
            if not self._is_woken and self._token is not None:
                self._token.run_sync_soon(self._drain)
                self._is_woken = True
        return True

    def _drain(self) -> None:
        with self._lock:
            self._is_woken = False
            inbox, self._inbox = self._inbox, []
        for do, subject in inbox:
            do(subject)

    # The way out

    def tell_soon(self, function: Callable[[], object]) -> None:
        """Call a function that wakes somebody elsewhere, once what can be done now is done.

        Who is woken in the midst of that takes the interpreter's lock, and finds little to do. In the thread only.
        """
        self._due.append(function)
        teller, self._teller = self._teller, None
        if teller is not None:
            trio.lowlevel.reschedule(teller)
        elif self._is_over:
            self._tell_all()

    async def _tell_due(self) -> None:
        """The task that does; it runs behind all tasks that run now."""
        try:
            while True:
                self._tell_all()
                self._teller = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._stop_telling)
        finally:
            self._tell_all()

    def _stop_telling(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._teller = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _tell_all(self) -> None:
        due, self._due = self._due, []
        for function in due:
            function()

    # What is done in the thread

    def _start(self, call: Call[T]) -> None:
        if self._is_refusing:
            call.refuse()
        else:
            self._start_inner(call)

    def _start_inner(self, call: Call[T]) -> None:
        nursery = call.nursery or self._calls
        if nursery is None:
            call.refuse()
        else:
            call.start(nursery)

    def _start_lent(self, lent: Lent[T]) -> None:
        if self._is_refusing or self._lent is None:
            lent.refuse()
        else:
            lent.start(self._lent)


def _call_now(call: Call[T]) -> None:
    call.run_now()


def _do(function: Callable[[], object]) -> None:
    function()


class Call(Generic[T]):
    """An async function on its way through the runtime, with its deadline and in a copy of its caller's context.

    `deadline_s` counts from now. `on_settled` is called once, in the thread of the runtime, when there is an answer.
    It runs in `context`, where there is one, instead of a copy of its caller's. A call that `is_paid` may have been
    billed when its time is up, or the client is closed meanwhile.
    """

    __slots__ = (
        "_context",
        "_expires_at",
        "_is_cancelled",
        "_is_paid",
        "_scope",
        "_work",
        "captured",
        "nursery",
        "on_settled",
    )

    def __init__(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        deadline_s: float | None = None,
        on_settled: Callable[[], object] = bool,
        is_paid: bool = False,
        context: contextvars.Context | None = None,
    ) -> None:
        self._expires_at = math.inf if deadline_s is None else _expiry(deadline_s)
        self._context = contextvars.copy_context() if context is None else context
        self._work = work
        self._scope: trio.CancelScope | None = None
        self._is_cancelled = False
        self._is_paid = is_paid
        self.nursery: trio.Nursery | None = None
        self.on_settled = on_settled
        self.captured: outcome.Outcome[T] | None = None

    def unwrap(self) -> T:
        """The answer, once; raises the error that stands in its place."""
        captured, self.captured = self.captured, None
        try:
            return cast("outcome.Outcome[T]", captured).unwrap()
        finally:
            del captured  # a traceback that leads to itself would stay until the next collection

    # In the thread of the runtime

    def cancel(self) -> None:
        """Cancel it, if it has not been settled; it is settled when its cleaning up is through."""
        self._is_cancelled = True
        if self._scope is not None:
            self._scope.cancel()

    def refuse(self, error: Exception | None = None) -> None:
        """Settle it without having run it."""
        self._settle(outcome.Error(error or PoolClosedError("the client is closed")))

    def start(self, nursery: trio.Nursery) -> None:
        """Run it as a task of this nursery; one that has ended meanwhile refuses it."""
        try:
            self._context.run(nursery.start_soon, self._run)
        except RuntimeError:
            # Whoever breaks off the emptying of the inbox here takes the answers of all others that are in it along.
            is_inner = nursery is self.nursery
            self.refuse(ConfigError("the call that this is a part of has ended") if is_inner else None)

    def run_now(self) -> None:
        """Run it on the spot: its function does not wait."""
        self._settle(self._context.run(outcome.capture, cast("Callable[[], T]", self._work)))

    def forget_deadline(self) -> None:
        """It may take as long as it likes from here on."""
        cast("trio.CancelScope", self._scope).deadline = math.inf

    async def _run(self) -> None:
        expires_at = self._expires_at
        with trio.CancelScope() as self._scope:
            if expires_at < math.inf:
                self._scope.deadline = _on_trio_clock(expires_at)
            if self._is_cancelled:
                self._scope.cancel()
            captured = await outcome.acapture(self._work)
        if isinstance(captured, outcome.Error) and _is_cancel(captured.error):
            captured = outcome.Error(self._why_cancelled())
        self._settle(captured)
        del captured  # from Python 3.12 on the frames of a traceback lead here, and so to the traceback

    def _why_cancelled(self) -> Exception:
        scope = cast("trio.CancelScope", self._scope)
        is_late = trio.current_time() >= scope.deadline and not self._is_cancelled
        error: GorouterError = PoolClosedError("the client was closed meanwhile")
        if is_late:
            error = DeadlineExceededError("the call did not end within its deadline_s", phase="total")
        error.maybe_billed = self._is_paid
        return error

    def _settle(self, captured: outcome.Outcome[T]) -> None:
        self.captured = captured
        tell = self.on_settled
        # Both may lead back to this.
        self._work, self.on_settled = cast("Callable[[], Awaitable[T]]", bool), bool
        tell()


class Lent(Generic[T]):
    """An async context manager of the runtime on loan: entered, read, and left by one task there.

    `tell` is that of the portal. `opening` gives a function that reads the next items, all that are there, and none
    at the end. Reading begins with the first `take` and goes ahead of it until `room` items wait. `on_change` is called
    in the thread of the runtime: when it was `opened`, when there is something to take for who found nothing, at the
    `end`, when it was `left`.

    Leaving stops the reading and leaves the context manager as if nothing had happened; cancelling, and the deadline,
    `deadline_s` from now on, cancel it where it is. Once everything was read the deadline does not count any more.
    """

    def __init__(
        self,
        tell: Callable[[Callable[[], object]], None],
        opening: Callable[[], AbstractAsyncContextManager[Callable[[], Awaitable[list[T]]]]],
        *,
        on_change: Callable[[], object],
        room: int,
        deadline_s: float | None = None,
        is_paid: bool = False,
        context: contextvars.Context | None = None,
    ) -> None:
        self._tell = tell
        self._opening = opening
        self._on_change = on_change
        self._room = room
        self._call: Call[None] = Call(
            self._hold, deadline_s=deadline_s, on_settled=self._note_left, is_paid=is_paid, context=context
        )
        self._lock = threading.Lock()
        self._items: list[T] = []
        # Full, so that nothing is read before somebody wants it.
        self._is_full = True
        self._is_awaited = False
        self._is_told = False
        self._taken: trio.Event | None = None
        self._leaving: trio.Event | None = None
        self._reading = trio.CancelScope()
        self.opened: outcome.Outcome[None] | None = None
        """That it was entered, or what that raised."""
        self.end: outcome.Outcome[None] | None = None
        """That there is nothing more to take than what waits, or what reading it raised."""
        self.left: outcome.Outcome[None] | None = None
        """That it was left, or what that raised."""

    # For the reader

    def take(self) -> list[T]:
        """What was read and not taken yet. Nothing where there is nothing yet, and after the `end`."""
        with self._lock:
            items, self._items = self._items, []
            self._is_awaited = not items
            was_full, self._is_full = self._is_full, False
        if was_full:
            self._tell(self._note_taken)
        return items

    def check_end(self) -> bool:
        """Whether everything was taken, for who has found nothing to take; raises what has ended the reading."""
        if self.end is None or self._items:
            return False
        self._is_told = True
        if isinstance(self.end, outcome.Error):
            raise self.end.error
        return True

    def leave(self) -> None:
        """Have it left. Never waits, and may be called again."""
        self._tell(self._note_leaving)

    def cancel(self) -> None:
        """Cancel it. Never waits, and may be called again."""
        self._tell(self._call.cancel)

    def failure(self) -> BaseException | None:
        """What was wrong with it that its reader has not heard of, once it was left."""
        left = self.left
        if not isinstance(left, outcome.Error):
            return None
        is_told = isinstance(self.end, outcome.Error) and self.end.error is left.error and self._is_told
        return None if is_told or isinstance(left.error, PoolClosedError) else left.error

    # In the thread of the runtime

    def start(self, nursery: trio.Nursery) -> None:
        """Run it as a task of this nursery."""
        self._call.start(nursery)

    def refuse(self) -> None:
        """Answer without having entered it."""
        self._call.refuse()

    async def _hold(self) -> None:
        self._leaving = trio.Event()
        async with self._opening() as read:
            self.opened = outcome.Value(None)
            self._on_change()
            with self._reading:
                captured = await outcome.acapture(self._read_all, read)
                if isinstance(captured, outcome.Error) and _is_cancel(captured.error):
                    captured.unwrap()
                self._call.forget_deadline()
                self.end = captured
                self._on_change()
            await self._leaving.wait()

    async def _read_all(self, read: Callable[[], Awaitable[list[T]]]) -> None:
        while True:
            while self._is_full:
                self._taken = trio.Event()
                await self._taken.wait()
            items = await read()
            if not items:
                return
            with self._lock:
                self._items += items
                self._is_full = len(self._items) >= self._room
                is_awaited, self._is_awaited = self._is_awaited, False
            if is_awaited:
                self._on_change()

    def _note_taken(self) -> None:
        if self._taken is not None:
            self._taken.set()

    def _note_leaving(self) -> None:
        if self._leaving is None:
            self.end = outcome.Value(None)
            self._call.cancel()
        else:
            self._leaving.set()
            self._reading.cancel()

    def _note_left(self) -> None:
        captured = cast("outcome.Outcome[None]", self._call.captured)
        if self.opened is None:
            self.opened = captured
        if self.end is None:
            self.end = outcome.Error(captured.error) if isinstance(captured, outcome.Error) else outcome.Value(None)
        self.left = captured
        self._on_change()


def _expiry(deadline_s: object) -> float:
    """When a call is to end that may take so long, by the clock of the system that trio goes by as well."""
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, (int, float)) or not deadline_s >= 0:
        raise ConfigError(f"deadline_s: must be a number of seconds, 0 or more, not {deadline_s!r}")
    return time.perf_counter() + deadline_s if deadline_s < LONGEST_S else math.inf


def _on_trio_clock(expires_at: float) -> float:
    return trio.current_time() + expires_at - time.perf_counter()


def _is_cancel(error: BaseException) -> bool:
    """Whether there is nothing but cancels in it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cancel(each) for each in error.exceptions)
    return isinstance(error, trio.Cancelled)
