"""Which ids a batch has had: the first few in memory, all of them in a temporary file when they are more.

Ids are told apart by 64 bits of a hash. Two different ones among a million are taken for the same in one batch of
37 million; then a row is refused that need not have been, and nothing is sent twice.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..transport.sqlite import ScratchTable

__all__ = ["IdTable"]

_IN_MEMORY: Final = 4096


class IdTable:
    """Ids, each with the number of the line that has it; lines count from 1. Whoever made it closes it.

    Its memory is flat: 4,096 ids, or 2 MiB. Calls raise `StoreError` when the file cannot be written.
    """

    __slots__ = ("_count", "_few", "_file")

    def __init__(self) -> None:
        self._count = 0
        self._few: dict[int, int] = {}
        self._file: ScratchTable | None = None

    def __len__(self) -> int:
        return self._count

    def find(self, name: str) -> int:
        """The line that has the id, or 0."""
        mark = _mark(name)
        return (self._few.get(mark) if self._file is None else self._file.find(mark)) or 0

    def claim(self, name: str, line: int) -> int:
        """Take the id for `line`; the line that has it already, or 0 when there was none."""
        mark = _mark(name)
        first = self._few.get(mark) if self._file is None else self._file.claim(mark, line)
        if first is not None:
            return first
        self._count += 1
        if self._file is None:
            self._few[mark] = line
            if self._count > _IN_MEMORY:
                self._spill()
        return 0

    def close(self) -> None:
        """Forget all; may be called twice."""
        if self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        from ..transport.sqlite import ScratchTable

        self._file = ScratchTable()
        for mark, line in self._few.items():
            self._file.claim(mark, line)
        self._few = {}


def _mark(name: str) -> int:
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
