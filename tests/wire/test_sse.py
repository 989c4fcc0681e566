"""Server-sent events: the same events for the same bytes, however they are cut."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gorouter_trio.errors import DecodeError
from gorouter_trio.wire.sse import SseParser


def parse(pieces: Iterable[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def by_the_standard(text: bytes) -> list[bytes]:
    """The data of each event by the words of the HTML standard, from the whole text at once."""
    events: list[bytes] = []
    data: list[bytes] = []
    *lines, _unfinished = re.split(rb"\r\n|\n|\r", text.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        if not line:
            if data:
                events.append(b"\n".join(data))
            data = []
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            data.append(value[1:] if value[:1] == b" " else value)
    return events


def cuts(text: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(text) + 1) for p in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


CHUNK = b'data: {"id":"gen-1","choices":[{"delta":{"content":"\xe2\x82\xac"}}]}\n\n'

TEXTS = {
    "as the API sends it": b": OPENROUTER PROCESSING\n\n" * 2 + CHUNK * 3 + b"data: [DONE]\n\n",
    "comments in between": CHUNK + b": OPENROUTER PROCESSING\n\n" + CHUNK + b":\n\n: x\n" + CHUNK,
    "crlf": (CHUNK * 2 + b": c\n\n" + CHUNK).replace(b"\n", b"\r\n"),
    "cr": (CHUNK * 2 + b": c\n\n" + CHUNK).replace(b"\n", b"\r"),
    "mixed line ends": b"data: a\r\n\ndata: b\r\r\ndata: c\n\r\ndata: d\n\n\r\ndata: e\r\n\r\n",
    "byte order mark": b"\xef\xbb\xbf" + CHUNK * 2,
    "a second mark is text": b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n",
    "several data lines": b"data: {\ndata:  1\ndata\ndata:}\n\ndata: x\n\n",
    "other fields": b"event: message\nid: 7\nretry: 10\ndata: a\nid\n\nevent: b\n\ndata: c\nevent: d\n\n",
    "no space and no colon": b"data:a\n\ndata\n\ndata:  b\n\ndata : c\n\ndatabase: d\n\nDATA: e\n\n",
    "empty events": b"\n\n\n\ndata: a\n\n\n\n\ndata:\n\ndata: \n\n\n",
    "unfinished": CHUNK + b"data: never ended\n",
    "no events at all": b": only\n\n: comments\n\n",
    "nothing": b"",
    "looks like the short form": b"data: a\n\ndata: b\ndata: c\n\ndata: d\n\ndata: e\n\nevent: x\ndata: f\n\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_every_cut_gives_what_the_standard_says(text: bytes) -> None:
    """Whole, in two at every byte, byte by byte and in threes, the events are those of the standard."""
    expected = by_the_standard(text)
    assert parse([text]) == expected
    assert parse(text[i : i + 1] for i in range(len(text))) == expected
    assert parse(text[i : i + 3] for i in range(0, len(text), 3)) == expected
    for place in range(len(text) + 1):
        assert parse([text[:place], text[place:]]) == expected, place


def test_what_the_events_are() -> None:
    """The data comes without the field's name and with one space less; several lines are joined by LF."""
    assert parse([TEXTS["several data lines"]]) == [b"{\n 1\n\n}", b"x"]
    assert parse([TEXTS["no space and no colon"]]) == [b"a", b"", b" b"]
    assert parse([TEXTS["other fields"]]) == [b"a", b"c"]
    assert parse([TEXTS["mixed line ends"]]) == [b"a", b"b", b"c", b"d", b"e"]
    assert parse([TEXTS["a second mark is text"]]) == [b"b"]


LINES = st.sampled_from(
    [
        b"data: a",
        b"data: {}",
        b"data:",
        b"data",
        b"data:b",
        b": c",
        b":",
        b"id: 1",
        b"event: x",
        b"",
        b"",
        b"",
        b"x",
        b"\xef\xbb\xbf",
    ]
)
ENDS = st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"])
GENERATED = st.lists(st.tuples(LINES, ENDS).map(b"".join), max_size=20).map(b"".join)


@given(
    text=GENERATED | st.binary(max_size=80) | st.sampled_from(list(TEXTS.values())),
    places=st.lists(st.integers(0, 10**6), max_size=12),
)
@example(text=b"data: a\n\n\r\ndata: b\n\n", places=[9])
@example(text=b"data: a\r\n\r\n", places=[8, 10])
@example(text=b"\xef\xbb\xbfdata: a\n\n", places=[1, 2])
def test_any_text_in_any_pieces(text: bytes, places: list[int]) -> None:
    """Generated texts, cut anywhere and as often as one likes, give the events of the standard."""
    assert parse(cuts(text, places)) == by_the_standard(text)


def test_empty_pieces_change_nothing() -> None:
    """A read that brought nothing is no end of a line, not even after a CR."""
    assert parse([b"data: a\r", b"", b"\n", b"", b"\r", b"", b"\n"]) == [b"a"]


@pytest.mark.parametrize(
    "pieces",
    [[b"data: " + b"x" * 150], [b"data: xxxxxxxx"] * 20, [b"data: xxxxxxxxxx\n"] * 15, [b": " + b"y" * 150]],
    ids=["one read", "many reads", "many lines", "a comment"],
)
def test_an_event_over_the_cap_is_refused(pieces: list[bytes]) -> None:
    """What one unfinished event holds in memory is bounded, in whatever way it grows."""
    parser = SseParser(max_event_bytes=100)
    with pytest.raises(DecodeError, match="over 100 bytes"):
        for piece in pieces:
            parser.feed(piece)


def test_the_cap_is_for_one_event() -> None:
    """Any number of events under the cap pass, in each of the forms."""
    parser = SseParser(max_event_bytes=100)
    for _ in range(50):
        assert parser.feed(b"data: " + b"x" * 60) == []
        assert parser.feed(b"\n\n") == [b"x" * 60]
        assert parser.feed(b"data: " + b"y" * 40 + b"\ndata: " + b"z" * 40 + b"\n\n") == [b"y" * 40 + b"\n" + b"z" * 40]
        assert parser.feed(b": " + b"c" * 60 + b"\n\n") == []


def test_a_long_line_in_small_pieces_is_held_and_not_copied() -> None:
    """4 MB in one line in pieces of 1,000 bytes: every piece is kept as it came until the line is whole."""
    parser = SseParser()
    pieces = [b"data: ", *[bytes([65 + i % 26]) * 1000 for i in range(4_000)]]
    for piece in pieces:
        assert parser.feed(piece) == []
    assert all(kept is piece for kept, piece in zip(parser._pending, pieces, strict=True))
    assert parser.feed(b"\n\n") == [b"".join(pieces[1:])]


def test_a_long_event_of_many_lines_is_linear(rng: random.Random) -> None:
    """Multi-line data of 1 MB in small pieces is joined once, at its end."""
    line = b"data: " + b"y" * 94 + b"\n"
    text = line * 10_000 + b"\n"
    parser = SseParser()
    events: list[bytes] = []
    position = 0
    while position < len(text):
        size = rng.randrange(1, 1000)
        events += parser.feed(text[position : position + size])
        position += size
        assert sum(map(len, parser._pending)) <= 100
    assert events == [b"\n".join([b"y" * 94] * 10_000)]
