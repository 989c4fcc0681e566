"""Server-sent events without I/O: bytes in, the data of whole events out (HTML Living Standard, 9.2.6).

Only `data` carries meaning on this API, so `event`, `id` and `retry` lines are accepted and passed
over, as comments are. Lines may end in LF, CRLF or CR; a byte order mark at the start is skipped; a
line may be of any length up to the cap; bytes may be cut anywhere.
"""

from __future__ import annotations

import re

from ..errors import DecodeError

__all__ = ["SseParser"]

_LINE_END = re.compile(rb"\r\n|\n|\r")
# As numbers: looking for one in bytes takes an eighth of looking for bytes of length 1.
_LF, _CR = b"\n\r"
_BOM = b"\xef\xbb\xbf"


class SseParser:
    """Feed it what arrives; it gives back the data of each event that is complete.

    `max_event_bytes` bounds what one unfinished event may hold in memory.
    """

    __slots__ = ("_at_start", "_data", "_max_event_bytes", "_pending", "_pending_bytes", "_skip_lf")

    def __init__(self, *, max_event_bytes: int = 64 * 1024 * 1024) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._data: list[bytes] = []
        self._skip_lf = False
        self._at_start = True

    def feed(self, received: bytes) -> list[bytes]:
        """Take the next bytes and return the data of the events that they complete, in order.

        Raises `DecodeError` when one event grows over the cap.
        """
        end = len(received) - 2
        # One usual event, whole, with nothing before it: what a read brings when events trickle in.
        if (
            received.find(b"\n") == end
            and received[:6] == b"data: "
            and received[-1] == _LF
            and not (self._pending or self._data or self._skip_lf or self._at_start)
            and _CR not in received
        ):
            return [received[6:end]]
        if self._skip_lf and received:
            received = received.removeprefix(b"\n")
            self._skip_lf = False
        if _LF not in received and _CR not in received:
            self._hold(received)
            return []
        if self._pending:
            self._pending.append(received)
            received = b"".join(self._pending)
            self._pending_bytes -= sum(map(len, self._pending[:-1]))
            self._pending.clear()
        if self._at_start:
            received = received.removeprefix(_BOM)
            self._at_start = False
        if self._data or _CR in received:
            return self._take_text(received)
        return self._take_blocks(received)

    def _take_blocks(self, text: bytes) -> list[bytes]:
        """The form the API always sends: one `data: ` line an event, LF, a blank line."""
        end = text.rfind(b"\n\n")
        rest = text[end + 2 :] if end >= 0 else text
        if _LF in rest:
            return self._take_text(text)
        events: list[bytes] = []
        if end >= 0:
            events = text[6:end].split(b"\n\ndata: ")
            if text[:6] != b"data: " or b"\n" in b"".join(events):
                return self._take_text(text)
        self._hold(rest)
        return events

    def _take_text(self, text: bytes) -> list[bytes]:
        self._skip_lf = text.endswith(b"\r")
        *lines, rest = _LINE_END.split(text)
        events = self._take_lines(lines)
        self._hold(rest)
        return events

    def _take_lines(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data.clear()
                    self._pending_bytes = 0
            elif line.startswith(b"data"):
                self._take_data(line)
        return events

    def _take_data(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._count(len(value))

    def _hold(self, rest: bytes) -> None:
        if rest:
            self._pending.append(rest)
            self._count(len(rest))

    def _count(self, size: int) -> None:
        self._pending_bytes += size
        if self._pending_bytes > self._max_event_bytes:
            raise DecodeError(f"one event of the stream is over {self._max_event_bytes} bytes")
