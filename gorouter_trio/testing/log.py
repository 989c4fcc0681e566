"""The event log of a world: what happened, in order, as lines of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast, final

import trio
from msgspec import Struct

from ..errors import DecodeError
from ..wire.codec import decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EventLog", "LogEvent", "read_log"]

_OWN_KEYS = ("n", "t", "kind")


class LogEvent(Struct, frozen=True):
    """One line: its number from 1, virtual seconds since the start of the world, what happened, and to what."""

    n: int
    t: float
    kind: str
    fields: Mapping[str, object]


@final
class EventLog:
    """Lines of JSON with the keys `n`, `t` and `kind` first, and then the fields in the order in which they were given.

    A world writes its own kinds of events (docs/testing.md lists them); `record` adds yours. Two runs have done the
    same exactly when their logs are the same bytes.
    """

    def __init__(self, now: Callable[[], float] = trio.current_time) -> None:
        self._clock = now
        self._started_at: float | None = None
        self._lines: list[bytes] = []

    def __repr__(self) -> str:
        return f"<EventLog: {len(self._lines)} events>"

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def data(self) -> bytes:
        """The whole log so far, each line with its line end."""
        return b"".join(self._lines)

    def now(self) -> float:
        """Seconds since the start of the world; a log used alone starts with the first use of its clock."""
        if self._started_at is None:
            self._started_at = self._clock()
        return self._clock() - self._started_at

    def record(self, kind: str, /, **fields: object) -> None:
        """Add an event. The fields are values that JSON has, and what is in them is written now.

        Raises `TypeError` for another value, and `ValueError` for a field that the log has itself.
        """
        taken = [name for name in _OWN_KEYS if name in fields]
        if taken:
            raise ValueError(f"the log has a field {taken[0]!r} itself")
        head = {"n": len(self._lines) + 1, "t": round(self.now(), 9), "kind": kind}
        self._lines.append(encode_json({**head, **fields}) + b"\n")

    def events(self, kind: str | None = None, /, **fields: object) -> list[LogEvent]:
        """The events so far, or those of one kind, or those of a kind whose fields have these values."""
        found = read_log(self.data) if kind is None else _events_of(self._lines, kind)
        return [event for event in found if fields.items() <= event.fields.items()] if fields else found

    def tail(self, lines: int = 40) -> str:
        """The last lines, as text."""
        return b"".join(self._lines[-lines:]).decode("utf-8")


def read_log(data: bytes) -> list[LogEvent]:
    """The events of a log that was written down; raises `DecodeError` for what is none."""
    return [_read_line(line) for line in data.splitlines()]


def _events_of(lines: list[bytes], kind: str) -> list[LogEvent]:
    marker = b',"kind":%b,' % encode_json(kind)
    ending = b',"kind":%b}' % encode_json(kind)
    found = [_read_line(line) for line in lines if marker in line or ending in line]
    return [event for event in found if event.kind == kind]


def _read_line(line: bytes) -> LogEvent:
    fields = decode_json(line)
    if not isinstance(fields, dict) or not all(key in fields for key in _OWN_KEYS):
        raise DecodeError(f"not a line of an event log: {line[:80]!r}")
    number, time, kind = (fields.pop(key) for key in _OWN_KEYS)
    return LogEvent(cast("int", number), cast("float", time), cast("str", kind), fields)
