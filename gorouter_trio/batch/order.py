"""Putting results back into the order of the input, within a bounded window.

The window begins at the first row that has not come out yet. Rows behind its end wait before they are sent, so that one
slow row keeps a bounded number of answers in memory, and not all that follow.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

__all__ = ["OrderWindow"]

T = TypeVar("T")


class OrderWindow(Generic[T]):
    """Up to `size` rows between the first that is missing and the last that may be run. Indexes count from 0."""

    __slots__ = ("_is_open", "_items", "_room", "_size", "next_index")

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: dict[int, T | None] = {}
        self._room: deque[tuple[int, trio.Event]] = deque()
        self._is_open = False
        self.next_index = 0

    def __repr__(self) -> str:
        return f"<OrderWindow at {self.next_index}, {len(self._items)} waiting>"

    def put(self, index: int, item: T | None) -> list[T]:
        """Take what came of a row, None for nothing; what can come out now, in order."""
        self._items[index] = item
        ready: list[T] = []
        while self.next_index in self._items:
            found = self._items.pop(self.next_index)
            self.next_index += 1
            if found is not None:
                ready.append(found)
        while self._room and self._room[0][0] < self.next_index + self._size:
            self._room.popleft()[1].set()
        return ready

    async def wait_room(self, index: int) -> None:
        """Wait until the row may be run; rows are to come in order, so that whoever is first waits least."""
        if self._is_open or index < self.next_index + self._size:
            return
        event = trio.Event()
        self._room.append((index, event))
        await event.wait()

    def open(self) -> None:
        """Let all go on that wait, and nobody wait from now on: rows that others wait for may never come."""
        self._is_open = True
        while self._room:
            self._room.popleft()[1].set()

    def drain(self) -> list[T]:
        """What waits for rows that will not come any more, in order."""
        items = [self._items[index] for index in sorted(self._items)]
        self._items.clear()
        return [item for item in items if item is not None]
