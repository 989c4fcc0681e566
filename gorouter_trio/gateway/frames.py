"""What comes in, counted before it is parsed: frames, pieces of messages, bytes and their pace. Pure and clock-free.

The WebSocket library behind this keeps every piece of a message in a list, answers every ping, and has no limit on
either, so what passes a bound has to be stopped here, where it costs a few operations a frame (RFC 6455 section 5.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from .config import GatewayLimits

__all__ = ["Bucket", "FrameMeter", "Violation"]

_CONTROL = 0x08
_FIN = 0x80
_MASKED = 0x80
_LENGTH = 0x7F
_MAX_HEADER = 14


class Violation(Struct, frozen=True):
    """Why a connection has to be closed: the close code, and a few words."""

    code: int
    reason: str


class Bucket:
    """So many a second, and so many at once; full at first."""

    __slots__ = ("_burst", "_rate", "_since", "_tokens")

    def __init__(self, rate: float, burst: float, *, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._since = now

    def take(self, now: float) -> bool:
        """Take one; False when there is none."""
        self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class FrameMeter:
    """Reads the headers of a client's frames as their bytes come by."""

    __slots__ = ("_control", "_fragments", "_frames", "_head", "_left", "_limits", "_message_bytes", "_since")

    def __init__(self, limits: GatewayLimits, *, now: float) -> None:
        self._limits = limits
        self._frames = Bucket(limits.frames_per_s, limits.frame_burst, now=now)
        self._control = Bucket(limits.control_frames_per_s, limits.control_frame_burst, now=now)
        self._head = b""
        self._left = 0
        self._fragments = 0
        self._message_bytes = 0
        self._since = math.inf

    def deadline(self) -> float:
        """When what was begun has to go on at the latest: a message has to come at some pace; `inf` between messages.

        Bytes that have come push it back.
        """
        if self._since == math.inf:
            return math.inf
        limits = self._limits
        arrived = self._message_bytes - self._left
        return self._since + limits.message_grace_s + max(arrived, 0) / limits.min_bytes_per_s

    def feed(self, data: bytes | bytearray, now: float) -> Violation | None:
        """Take what has come; the first bound that it passes, if it does."""
        position, size = 0, len(data)
        while position < size:
            if self._left:
                taken = min(self._left, size - position)
                self._left -= taken
                position += taken
                self._end_frame()
                continue
            if self._since == math.inf:
                self._since = now
            head = self._head + data[position : position + _MAX_HEADER - len(self._head)]
            length = _header_length(head)
            if len(head) < length:
                self._head = bytes(head)
                return None
            position += length - len(self._head)
            self._head = b""
            if (violation := self._take(head, now)) is not None:
                return violation
        return None

    def _take(self, head: bytes | bytearray, now: float) -> Violation | None:
        """A whole header."""
        limits = self._limits
        size = _payload_length(head)
        if head[0] & _CONTROL:
            # A long one is an error of the protocol, which the library answers; it must only not be counted on.
            self._left = size
            self._end_frame()
            return None if self._control.take(now) else Violation(1008, "too many pings")
        self._fragments += 1
        self._message_bytes += size
        if self._message_bytes > limits.max_message_bytes:
            return Violation(1009, f"a message may have {limits.max_message_bytes} bytes")
        if self._fragments > limits.max_fragments:
            return Violation(1008, f"a message may come in {limits.max_fragments} frames")
        if not self._frames.take(now):
            return Violation(1008, "too many frames")
        self._left = size
        if head[0] & _FIN:
            self._fragments = 0
            if size == 0:
                self._message_bytes = 0
        self._end_frame()
        return None

    def _end_frame(self) -> None:
        if self._left == 0 and self._fragments == 0:
            self._message_bytes = 0
            self._since = math.inf


def _header_length(head: bytes | bytearray) -> int:
    """How long the header is that begins so, as far as that is known."""
    if len(head) < 2:
        return 2
    length = head[1] & _LENGTH
    return 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if head[1] & _MASKED else 0)


def _payload_length(head: bytes | bytearray) -> int:
    length = head[1] & _LENGTH
    if length == 126:
        return int.from_bytes(head[2:4], "big")
    return int.from_bytes(head[2:10], "big") if length == 127 else length
