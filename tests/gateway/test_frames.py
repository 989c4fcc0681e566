"""Frames are counted as they come by: their number, their pieces, their size and their pace, however they are cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.gateway.config import GatewayLimits
from gorouter_trio.gateway.frames import Bucket, FrameMeter, Violation

SMALL = GatewayLimits(
    max_message_bytes=1_000, max_fragments=4, frames_per_s=1.0, frame_burst=10, control_frames_per_s=1.0,
    control_frame_burst=3,
)  # fmt: skip


def frame(size, *, opcode=1, fin=True, masked=True):
    """A frame as a client sends it."""
    first = bytes([opcode | (0x80 if fin else 0)])
    mask = 0x80 if masked else 0
    if size < 126:
        head = first + bytes([mask | size])
    elif size < 65_536:
        head = first + bytes([mask | 126]) + size.to_bytes(2, "big")
    else:
        head = first + bytes([mask | 127]) + size.to_bytes(8, "big")
    return head + (b"mask" if masked else b"") + b"x" * min(size, 5_000)


def feed(meter, data, *, cut=None, now=0.0):
    """What the meter says to all of it, in pieces of `cut` bytes."""
    step = cut or max(len(data), 1)
    for start in range(0, len(data), step):
        violation = meter.feed(data[start : start + step], now)
        if violation is not None:
            return violation
    return None


CASES = [
    (frame(5) * 10, None),
    (frame(5) * 11, 1008),
    (frame(0) * 11, 1008),
    (frame(1_000), None),
    (frame(1_001), 1009),
    (frame(2**40), 1009),
    (frame(600, fin=False) + frame(500, opcode=0), 1009),
    (frame(0, fin=False) + frame(0, opcode=0, fin=False) * 2 + frame(0, opcode=0), None),
    (frame(0, fin=False) + frame(0, opcode=0, fin=False) * 4, 1008),
    (frame(2, opcode=9) * 3, None),
    (frame(2, opcode=9) * 4, 1008),
    (frame(2, opcode=10) * 4, 1008),
    (frame(5, fin=False) + frame(2, opcode=9) + frame(5, opcode=0) + frame(900), None),
]


@pytest.mark.parametrize(("data", "code"), CASES)
@pytest.mark.parametrize("cut", [None, 1, 2, 3, 7])
def test_bounds(data, code, cut):
    """Each bound holds exactly, and does not depend on how the bytes are cut."""
    violation = feed(FrameMeter(SMALL, now=0.0), data, cut=cut)
    assert (None if violation is None else violation.code) == code


@given(st.lists(st.tuples(st.integers(0, 400), st.sampled_from([1, 2, 9, 10])), max_size=12), st.data())
def test_cuts_change_nothing(frames, data):
    """Any stream of whole frames gives the same answer in one piece and in any pieces."""
    stream = b"".join(frame(size, opcode=opcode) for size, opcode in frames)
    whole = feed(FrameMeter(SMALL, now=0.0), stream)
    meter, rest, found = FrameMeter(SMALL, now=0.0), stream, None
    while rest and found is None:
        size = data.draw(st.integers(1, len(rest)))
        found, rest = meter.feed(rest[:size], 0.0), rest[size:]
    assert found == whole


def test_a_message_has_to_come_at_some_pace():
    """Its deadline is pushed back by what arrives, and there is none between messages."""
    limits = GatewayLimits(message_grace_s=5.0, min_bytes_per_s=100.0)
    meter = FrameMeter(limits, now=0.0)
    assert meter.deadline() == math.inf
    data = frame(1_000)
    meter.feed(data[:1], 10.0)
    assert meter.deadline() == 15.0
    meter.feed(data[1:508], 11.0)
    assert meter.deadline() == 20.0
    meter.feed(data[508:], 12.0)
    assert meter.deadline() == math.inf
    meter.feed(frame(3, fin=False), 20.0)
    assert meter.deadline() == pytest.approx(25.03)
    meter.feed(frame(3, opcode=0), 21.0)
    assert meter.deadline() == math.inf


def test_a_bucket_refills():
    """So many at once, and so many a second after that; a long silence saves no more than a burst."""
    bucket = Bucket(2.0, 4, now=0.0)
    assert [bucket.take(0.0) for _ in range(5)] == [True] * 4 + [False]
    assert bucket.take(0.5)
    assert not bucket.take(0.5)
    assert [bucket.take(1_000.0) for _ in range(5)] == [True] * 4 + [False]


def test_a_violation_says_why():
    """It has a close code and words for the close frame."""
    violation = feed(FrameMeter(SMALL, now=0.0), frame(5_000))
    assert violation == Violation(1009, "a message may have 1000 bytes")
