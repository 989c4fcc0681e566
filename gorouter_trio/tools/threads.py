"""Threads for sync tools: a limiter of their own, and a count of those that nobody waits for any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ThreadPool", "TooManyThreadsError"]

T = TypeVar("T")


class TooManyThreadsError(Exception):
    """So many threads hang past their deadline that no new ones are started."""


class ThreadPool:
    """Runs functions in threads, at most `threads` at a time and none while `abandoned` hang.

    trio's own threads, which read files and look names up, are not touched.
    """

    def __init__(self, *, threads: int, abandoned: int) -> None:
        self._limiter = trio.CapacityLimiter(threads)
        self._max_abandoned = abandoned
        self._left: list[_Run] = []

    @property
    def running(self) -> int:
        """Threads at work, abandoned ones included."""
        return int(self._limiter.borrowed_tokens)

    @property
    def abandoned(self) -> int:
        """Threads that work on after their call was given up: they cannot be killed."""
        # The threads themselves only ever set a flag.
        self._left = [run for run in self._left if not run.has_ended]
        return len(self._left)

    async def run(self, function: Callable[[], T]) -> T:
        """The result of `function`, or what it raises. Raises `TooManyThreadsError`.

        Cancelling leaves the thread to itself.
        """
        if self.abandoned >= self._max_abandoned:
            raise TooManyThreadsError(f"{len(self._left)} threads of tools hang past their deadline")
        run = _Run()
        try:
            return await trio.to_thread.run_sync(run.call, function, abandon_on_cancel=True, limiter=self._limiter)
        finally:
            run.is_left = True
            if run.has_begun and not run.has_ended:
                self._left.append(run)


class _Run:
    """One function in one thread. Each side sets its flag before it looks at the other's: a thread that comes to
    life after it was left does nothing, and one that was left after it came to life is counted."""

    __slots__ = ("has_begun", "has_ended", "is_left")

    def __init__(self) -> None:
        self.has_begun = False
        self.has_ended = False
        self.is_left = False

    def call(self, function: Callable[[], T]) -> T:
        self.has_begun = True
        try:
            if self.is_left:
                raise TooManyThreadsError("nobody waits for this thread any more")
            return function()
        finally:
            self.has_ended = True
