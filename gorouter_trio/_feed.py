"""What has happened, for those who look at it a little later: many things at a time, so that each costs little.

Theory of operation. What happens is put on a list, and a task gives the list to the observers `WAIT_S` after its
first entry came. Code that runs for many entries in a row takes a third of the CPU of code that runs once in each chat,
and what happens on the way of a chat is an entry and no more. A list that has grown to its bound is given out in the
same step, so that none is lost and the memory is bounded, whatever the observers do; and so is what there is when an
observer is taken away. Observers are plain functions: they must not wait, and what they raise is reported and harms
nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar

import trio

from ._contain import contain_sync
from .errors import ConfigError

__all__ = ["WAIT_S", "Feed", "Observer"]

R = TypeVar("R")
T = TypeVar("T")

WAIT_S: Final = 0.02
_MOST: Final = 64

Observer: TypeAlias = Callable[[Sequence[T]], None]
"""Is given what has happened, in order. Must not wait."""


class Feed(Generic[R, T]):
    """Entries as they are noted (`R`), and what observers are given for them (`T`), which `make` makes of a list.

    Nothing is to be added while there are no observers. What an observer raises goes to `report`.
    """

    __slots__ = ("_came", "_entries", "_make", "_most", "_report", "observers")

    def __init__(self, make: Callable[[Sequence[R]], Sequence[T]], *, report: Callable[[Exception], None]) -> None:
        self.observers: tuple[Observer[T], ...] = ()
        self._make = make
        self._report = report
        self._entries: list[R] = []
        self._most = _MOST
        self._came = trio.Event()

    def __repr__(self) -> str:
        return f"<Feed: {len(self.observers)} observers, {len(self._entries)} entries>"

    def observe(self, observer: Observer[T]) -> None:
        """Give what comes from now on to `observer` as well; raises `ConfigError` for what is no function."""
        if not callable(observer):
            raise ConfigError(f"observer: must be a function of a list, not {observer!r}")
        self.flush()
        self.observers = (*self.observers, observer)

    def remove(self, observer: Observer[T]) -> bool:
        """Give it what there is, and then nothing more; False when it is not there."""
        # Methods are made anew each time they are looked up, and are equal then, not the same.
        left = tuple(other for other in self.observers if other != observer)
        is_found = len(left) < len(self.observers)
        if is_found:
            self.flush()
            self.observers = left
        return is_found

    def add(self, entry: R) -> None:
        """Something has happened."""
        entries = self._entries
        entries.append(entry)
        if len(entries) >= self._most:
            self.flush()
        elif len(entries) == 1:
            self._came.set()

    def flush(self) -> None:
        """Give out what there is now."""
        entries, self._entries = self._entries, []
        if entries and self.observers:
            made = self._make(entries)
            for observer in self.observers:
                contain_sync(partial(observer, made), report=self._report)

    async def run(self) -> None:
        """Give out what comes, a moment later, until cancelled; then what there is, and what still comes at once."""
        try:
            while True:
                await self._came.wait()
                self._came = trio.Event()
                await trio.sleep(WAIT_S)
                self.flush()
        finally:
            self._most = 1
            self.flush()
