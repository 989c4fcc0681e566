"""Mailboxes and answers: how tasks hand each other work.

Theory of operation. A mailbox is a bounded queue with one rule for what happens when it is full. An
ask is a mail with a `ReplySlot` on it: the asker parks on the slot, the actor resolves it, once.
Both wake the other side directly through the scheduler, one task switch a hop, because an event and
a channel on top of it were measured at twice the cost. All state changes are sync; a cancelled
asker marks its slot abandoned in the same step in which it is woken, so that an actor never answers
nobody without knowing (`resolve` says False then).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Generic, Literal, TypeVar, cast

import outcome
import trio
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Mailbox", "MailboxStatistics", "OverflowPolicy", "ReplySlot"]

T = TypeVar("T")

OverflowPolicy = Literal["block", "reject", "drop_oldest"]
"""What posting to a full mailbox does: wait for room, raise `trio.WouldBlock`, or put out what waits longest."""


class ReplySlot(Generic[T]):
    """The place where one asker waits for its one answer."""

    __slots__ = ("_outcome", "_task", "abandoned")

    def __init__(self) -> None:
        self._outcome: outcome.Outcome[T] | None = None
        self._task: trio.lowlevel.Task | None = None
        self.abandoned = False

    @property
    def is_resolved(self) -> bool:
        """Whether the answer is there."""
        return self._outcome is not None

    async def wait(self) -> T:
        """Wait for the answer and return it, or raise the error that stands in its place. To be called once.

        Cancelling abandons the slot, unless the answer is there: what was given is always taken.
        """
        if self._outcome is None:
            self._task = trio.lowlevel.current_task()
            return cast("T", await trio.lowlevel.wait_task_rescheduled(self._abandon))
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self._outcome.unwrap()

    def resolve(self, value: T) -> bool:
        """Answer; False when the asker has gone or was answered before."""
        return self._settle(outcome.Value(value))

    def fail(self, error: BaseException) -> bool:
        """Answer with an error; False when the asker has gone or was answered before."""
        return self._settle(outcome.Error(error))

    def on_abandon(self) -> None:
        """Called in the same step in which the asker is cancelled; for subclasses."""

    def _settle(self, result: outcome.Outcome[T]) -> bool:
        if self.abandoned or self._outcome is not None:
            return False
        self._outcome = result
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, result)
        return True

    def _abandon(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self.abandoned = True
        self._task = None
        self.on_abandon()
        return trio.lowlevel.Abort.SUCCEEDED


class MailboxStatistics(Struct, frozen=True):
    """A look at a mailbox: mail queued, its bound, and posters waiting for room."""

    queued: int
    capacity: int
    waiting_posters: int
    is_closed: bool


class Mailbox(Generic[T]):
    """A bounded queue with one reader.

    `capacity` counts mail. When it is full, `post` follows `policy`; with "drop_oldest", `on_drop` is given
    the mail that is put out, in the same step. Closing gives back what was not read, so that whoever owns
    the mailbox can answer it.
    """

    __slots__ = ("_capacity", "_closed", "_on_drop", "_policy", "_posters", "_queue", "_reader")

    def __init__(
        self, capacity: int, *, policy: OverflowPolicy = "block", on_drop: Callable[[T], object] | None = None
    ) -> None:
        self._capacity = capacity
        self._policy = policy
        self._on_drop = on_drop
        self._queue: deque[T] = deque()
        self._posters: deque[tuple[trio.lowlevel.Task, T]] = deque()
        self._reader: trio.lowlevel.Task | None = None
        self._closed = False

    async def post(self, mail: T) -> None:
        """Queue `mail`, in order of arrival.

        Raises `trio.WouldBlock` when the mailbox is full and its policy is to reject, and
        `trio.ClosedResourceError` when it is closed, also while waiting. Cancelling posts nothing.
        """
        try:
            self.post_nowait(mail)
        except trio.WouldBlock:
            if self._policy == "reject":
                raise
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        waiting = (trio.lowlevel.current_task(), mail)
        self._posters.append(waiting)

        def give_up(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._posters.remove(waiting)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)

    def post_nowait(self, mail: T) -> None:
        """Queue `mail` or raise `trio.WouldBlock` when full, `trio.ClosedResourceError` when closed.

        Never full is a mailbox that puts out the oldest.
        """
        if self._closed:
            raise trio.ClosedResourceError("the mailbox is closed")
        if self._reader is not None:
            reader, self._reader = self._reader, None
            trio.lowlevel.reschedule(reader, outcome.Value(mail))
        elif len(self._queue) < self._capacity and not self._posters:
            self._queue.append(mail)
        elif self._policy == "drop_oldest":
            oldest = self._queue.popleft()
            self._queue.append(mail)
            if self._on_drop is not None:
                self._on_drop(oldest)
        else:
            raise trio.WouldBlock

    @property
    def is_awaited(self) -> bool:
        """Whether the reader waits for mail, so that there is none, and none on its way to it."""
        return self._reader is not None

    @property
    def has_mail(self) -> bool:
        """Whether mail is queued; where none is, nobody waits for room either."""
        return bool(self._queue)

    def waiting(self) -> list[T]:
        """What is queued, and what waits for room."""
        return [*self._queue, *(mail for _task, mail in self._posters)]

    async def receive(self) -> T:
        """The next mail; waits for one. Raises `trio.ClosedResourceError` once closed."""
        if self._reader is not None:
            raise trio.BusyResourceError("another task reads this mailbox")
        if self._closed:
            raise trio.ClosedResourceError("the mailbox is closed")
        if self._queue:
            # The checkpoint comes first: mail taken before a cancel would be lost.
            await trio.lowlevel.checkpoint()
            if self._queue:
                return self._take()
            if self._closed:
                raise trio.ClosedResourceError("the mailbox is closed")
            if self._reader is not None:
                raise trio.BusyResourceError("another task reads this mailbox")
        self._reader = trio.lowlevel.current_task()
        return cast("T", await trio.lowlevel.wait_task_rescheduled(self._stop_reading))

    def take_nowait(self, accept: Callable[[T], bool]) -> T | None:
        """The next mail if it is here and `accept` says yes to it; for its reader, while that does not wait."""
        return self._take() if self._queue and accept(self._queue[0]) else None

    def pick_nowait(self, accept: Callable[[T], bool]) -> T | None:
        """The first mail that `accept` says yes to, ahead of all other: from the queue or of who waits for room."""
        for mail in self._queue:
            if accept(mail):
                self.remove(mail)
                return mail
        for waiting in self._posters:
            task, mail = waiting
            if accept(mail):
                self._posters.remove(waiting)
                trio.lowlevel.reschedule(task)
                return mail
        return None

    def remove(self, mail: T) -> bool:
        """Take `mail` out of the queue; False when it is not there any more."""
        for position, queued in enumerate(self._queue):
            if queued is mail:
                del self._queue[position]
                self._admit_poster()
                return True
        return False

    def close(self) -> list[T]:
        """Close, wake everybody who waits with `trio.ClosedResourceError`, give back unread mail."""
        self._closed = True
        unread = list(self._queue)
        self._queue.clear()
        waiting = [task for task, _mail in self._posters]
        self._posters.clear()
        if self._reader is not None:
            waiting.append(self._reader)
            self._reader = None
        for task in waiting:
            # One error each: an outcome can be taken once, and a raised exception belongs to its task.
            trio.lowlevel.reschedule(task, outcome.Error(trio.ClosedResourceError("the mailbox is closed")))
        return unread

    def statistics(self) -> MailboxStatistics:
        """A snapshot."""
        return MailboxStatistics(len(self._queue), self._capacity, len(self._posters), self._closed)

    def _take(self) -> T:
        mail = self._queue.popleft()
        self._admit_poster()
        return mail

    def _admit_poster(self) -> None:
        if self._posters:
            task, mail = self._posters.popleft()
            self._queue.append(mail)
            trio.lowlevel.reschedule(task)

    def _stop_reading(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED
