"""The messages about one turn, kept within bounds for whoever reads slowly or comes back. Pure."""

from __future__ import annotations

from array import array

__all__ = ["TurnLog"]

_MANY = 512
# Places are counted up to here and then from 0 again: no more than this is ever kept.
_WRAP = 2**32


class TurnLog:
    """Encoded messages by `seq`, from 1 on: the last ones, in so many bytes of memory, and the end, always kept.

    `after` is the last message of an earlier life, whose asker has it already.
    """

    __slots__ = ("_base", "_data", "_first", "_gone", "_limit", "_starts", "end", "last_seq")

    def __init__(self, limit: int, *, after: int = 0) -> None:
        self._limit = limit
        # One piece of memory, from which taking off the front costs nothing: thousands of turns with hundreds of
        # messages each would take a third more as objects, and leave the heap in shreds.
        self._data = bytearray()
        # Where messages begin, counted from the first one ever; those of the first `_gone` are not kept any more.
        self._starts = array("I")
        self._base = self._gone = 0
        self._first = after + 1
        self.last_seq = after
        self.end: bytes | None = None

    @property
    def size(self) -> int:
        """How much is kept."""
        return len(self._data) + (0 if self.end is None else len(self.end))

    @property
    def first_seq(self) -> int:
        """The oldest message that is kept, one above the last where none is."""
        return self._first

    def append(self, body: bytes) -> int:
        """Keep one more message, in place of the oldest ones where there is no room; returns its seq."""
        self.last_seq += 1
        self._starts.append((self._base + len(self._data)) % _WRAP)
        self._data += body
        while len(self._starts) > self._gone and self._taken() > self._limit:
            self._drop_first()
        return self.last_seq

    def finish(self, body: bytes) -> int:
        """Keep the end of the turn, whatever its length; returns its seq."""
        self.last_seq += 1
        self.end = _exactly(body)
        return self.last_seq

    def get(self, seq: int) -> bytes | None:
        """The message with this seq, the end excepted; None for one that is not kept, or not there yet."""
        if not self._first <= seq < self._first + len(self._starts) - self._gone:
            return None
        start, end = self._place(self._gone + seq - self._first)
        return bytes(self._data[start:end])

    def _taken(self) -> int:
        """Bytes of memory: a bytearray has up to an eighth more than it holds, to grow into."""
        places = len(self._starts) - self._gone
        return len(self._data) * 9 // 8 + places * self._starts.itemsize

    def _place(self, index: int) -> tuple[int, int]:
        starts = self._starts
        end = (starts[index + 1] - self._base) % _WRAP if index + 1 < len(starts) else len(self._data)
        return (starts[index] - self._base) % _WRAP, end

    def _drop_first(self) -> None:
        size = self._place(self._gone)[1]
        del self._data[:size]
        self._base += size
        self._first += 1
        self._gone += 1
        if self._gone >= _MANY and self._gone * 2 > len(self._starts):
            del self._starts[: self._gone]
            self._gone = 0


def _exactly(body: bytes) -> bytes:
    """A copy: what an encoder gives has up to its length once more behind it, which nobody counts."""
    return bytes(memoryview(body))
