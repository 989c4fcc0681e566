"""Reproducible chance: a stream of draws that depends on a key and on nothing else."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Final, TypeVar, final

T = TypeVar("T")

_BLOCK_BYTES: Final = 1_024
_NORMAL: Final = NormalDist()


@final
class Draws:
    """Draws from SHAKE-256 of a key.

    The same key gives the same draws on every machine and Python, which `random.Random` promises for `random()` only;
    making one costs 3 us.
    """

    __slots__ = ("_block", "_blocks", "_key", "_position")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._blocks = 0
        self._block = b""
        self._position = _BLOCK_BYTES

    def integer(self) -> int:
        """A number below 2**16."""
        if self._position >= _BLOCK_BYTES:
            self._refill()
        position = self._position
        self._position = position + 2
        block = self._block
        return block[position] << 8 | block[position + 1]

    def below(self, limit: int) -> int:
        """A number in [0, *limit*), for limits well below 2**16."""
        return self.integer() * limit >> 16

    def between(self, low: int, high: int) -> int:
        """A number in [*low*, *high*]."""
        return low + self.below(high - low + 1)

    def unit(self) -> float:
        """A number in [0, 1)."""
        return (self.integer() << 16 | self.integer()) / 4_294_967_296

    def chance(self, probability: float) -> bool:
        """True with *probability*."""
        return self.unit() < probability

    def choice(self, options: Sequence[T]) -> T:
        """One of *options*."""
        return options[self.integer() * len(options) >> 16]

    def log_normal(self, *, median: float, spread: float) -> float:
        """A positive number around *median*; *spread* is the standard deviation of its logarithm."""
        if spread <= 0:
            return median
        return median * math.exp(spread * _NORMAL.inv_cdf((self.integer() + 0.5) / 65_536))

    def jittered(self, value: float, *, jitter: float) -> float:
        """*value* changed by at most its *jitter*th part."""
        return value * (1 + jitter * (2 * self.unit() - 1)) if jitter and value else value

    def alnum(self, length: int) -> str:
        """A string of at most 80 letters and digits."""
        count = (length * 3 + 3) // 4
        if self._position + count > _BLOCK_BYTES:
            self._refill()
        taken = self._block[self._position : self._position + count]
        self._position += count + (count & 1)  # draws of integers are two bytes wide and stay aligned
        return base64.b64encode(taken, altchars=b"xY").decode("ascii")[:length]

    def _refill(self) -> None:
        self._block = hashlib.shake_256(b"%d:%b" % (self._blocks, self._key)).digest(_BLOCK_BYTES)
        self._blocks += 1
        self._position = 0
