"""The log is lines of JSON with a fixed order of keys, and finds its events again."""

from __future__ import annotations

import pytest

from gorouter_trio.errors import DecodeError
from gorouter_trio.testing import EventLog, LogEvent, read_log


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> EventLog:
    """A log with three events, at 0 and 2.5 seconds."""
    log = EventLog(clock)
    log.record("connect", connection=1, host="a")
    clock.time += 2.5
    log.record("close", connection=1)
    log.record("connect", connection=2, host="b")
    return log


def test_the_bytes_are_fixed(log: EventLog) -> None:
    """Number, time and kind come first, then the fields as they were given, one line an event."""
    assert log.data == (
        b'{"n":1,"t":0.0,"kind":"connect","connection":1,"host":"a"}\n'
        b'{"n":2,"t":2.5,"kind":"close","connection":1}\n'
        b'{"n":3,"t":2.5,"kind":"connect","connection":2,"host":"b"}\n'
    )
    assert len(log) == 3
    assert log.tail(1).startswith('{"n":3')


def test_events_are_found(log: EventLog) -> None:
    """All of them, those of a kind, and those with certain fields."""
    assert len(log.events()) == 3
    assert [event.n for event in log.events("connect")] == [1, 3]
    assert log.events("connect", host="b") == [LogEvent(3, 2.5, "connect", {"connection": 2, "host": "b"})]
    assert log.events(connection=1) == log.events()[:2]
    assert log.events("conn") == []


def test_a_log_is_read_back(log: EventLog) -> None:
    """What was written down is the same log."""
    assert read_log(log.data) == log.events()
    assert read_log(b"") == []
    with pytest.raises(DecodeError):
        read_log(b"not a log\n")
    for odd in (b"[1]\n", b'{"n":1}\n'):
        with pytest.raises(DecodeError):
            read_log(odd)


def test_what_is_written_stays(clock: Clock) -> None:
    """A list that changes afterwards does not change the log."""
    log = EventLog(clock)
    items = [1]
    log.record("items", items=items)
    items.append(2)
    assert log.events("items")[0].fields == {"items": [1]}


def test_fields_of_the_log_itself_are_refused(log: EventLog) -> None:
    """Nobody overwrites the number or the time."""
    with pytest.raises(ValueError, match="'t'"):
        log.record("x", t=5)
    with pytest.raises(TypeError):
        log.record("x", value=object())
    assert len(log) == 3


def test_kinds_that_look_like_others(clock: Clock) -> None:
    """A kind is not found inside the fields of another event."""
    log = EventLog(clock)
    log.record("outer", text='","kind":"inner",')
    log.record("inner")
    assert [event.n for event in log.events("inner")] == [2]
