"""Which ids a batch has had, in 12 bytes each however long they are: a hash table of arrays.

Ids are told apart by 64 bits of a hash. Two different ones among a million are taken for the same in one batch of
37 million; then a row is refused that need not have been, and nothing is sent twice.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

__all__ = ["IdTable"]

_FIRST_SIZE = 1024


class IdTable:
    """Ids, each with the number of the line that has it. Lines count from 1 to 2**32 - 1."""

    __slots__ = ("_count", "_hashes", "_lines", "_mask")

    def __init__(self) -> None:
        self._count = 0
        self._make(_FIRST_SIZE)

    def __len__(self) -> int:
        return self._count

    def find(self, name: str) -> int:
        """The line that has the id, or 0."""
        return self._lines[self._find(_mark(name))]

    def claim(self, name: str, line: int) -> int:
        """Take the id for `line`; the line that has it already, or 0 when there was none."""
        mark = _mark(name)
        place = self._find(mark)
        if self._lines[place]:
            return self._lines[place]
        self._hashes[place] = mark
        self._lines[place] = line
        self._count += 1
        # At three quarters, a search looks at some four places.
        if self._count * 4 > len(self._lines) * 3:
            self._grow()
        return 0

    def _find(self, mark: int) -> int:
        """Where the hash is, or would be."""
        place = mark & self._mask
        while self._lines[place] and self._hashes[place] != mark:
            place = (place + 1) & self._mask
        return place

    def _make(self, size: int) -> None:
        self._hashes = array("Q", bytes(8 * size))
        self._lines = array("I", bytes(4 * size))
        self._mask = size - 1

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._make(2 * len(lines))
        for mark, line in zip(hashes, lines, strict=True):
            if line:
                place = self._find(mark)
                self._hashes[place], self._lines[place] = mark, line


def _mark(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
