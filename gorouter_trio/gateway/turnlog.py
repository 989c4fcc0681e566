"""The messages about one turn, kept within bounds for whoever reads slowly or comes back. Pure."""

from __future__ import annotations

from collections import deque

__all__ = ["TurnLog"]


class TurnLog:
    """Encoded messages by `seq`, from 1 on: the last ones, up to so many bytes, and the end, which is always kept.

    `after` is the last message of an earlier life, whose asker has it already.
    """

    __slots__ = ("_bytes", "_entries", "_first", "_limit", "end", "last_seq")

    def __init__(self, limit: int, *, after: int = 0) -> None:
        self._limit = limit
        self._entries: deque[bytes] = deque()
        self._bytes = 0
        self._first = after + 1
        self.last_seq = after
        self.end: bytes | None = None

    @property
    def size(self) -> int:
        """How much is kept."""
        return self._bytes + (0 if self.end is None else len(self.end))

    @property
    def first_seq(self) -> int:
        """The oldest message that is kept, one above the last where none is."""
        return self._first

    def append(self, body: bytes) -> int:
        """Keep one more message, in place of the oldest ones where there is no room; returns its seq."""
        self.last_seq += 1
        self._entries.append(body)
        self._bytes += len(body)
        while self._bytes > self._limit:
            self._bytes -= len(self._entries.popleft())
            self._first += 1
        return self.last_seq

    def finish(self, body: bytes) -> int:
        """Keep the end of the turn, whatever its length; returns its seq."""
        self.last_seq += 1
        self.end = body
        return self.last_seq

    def get(self, seq: int) -> bytes | None:
        """The message with this seq, the end excepted; None for one that is not kept, or not there yet."""
        position = seq - self._first
        return self._entries[position] if 0 <= position < len(self._entries) else None
