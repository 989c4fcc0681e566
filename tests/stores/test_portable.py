"""Sessions as lines of text: what goes out comes in again, byte for byte."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.stores.portable import PortableSession, decode_session, encode_session

entries = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [b"{}", b'{"a": 1.10}', b'{"a":\n1}', b" {}", b'"x"', b"{]}", b'{"type":"base64"}', b"", b'{"a":"\xff"}']
    ),
)
sessions = st.builds(
    PortableSession,
    st.text(min_size=1, max_size=9),
    st.lists(entries, max_size=5).map(tuple),
    st.none() | st.floats(0, 1e10),
)


@given(session=sessions)
def test_out_and_in(session):
    """Any session is one line, and comes back as it was."""
    line = encode_session(session)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_session(line) == session


def test_others_can_read_it():
    """Entries stand there as JSON, not as a text of it."""
    line = encode_session(PortableSession("k", (b'{"type":"started"}', b"\0")))
    assert json.loads(line)["entries"] == [{"type": "started"}, "AA=="]


@given(session=sessions, cut=st.integers(0, 200))
def test_a_torn_line_is_refused(session, cut):
    """A line that was cut anywhere is no shorter session."""
    line = encode_session(session).rstrip(b"\n")
    if cut < len(line):
        with pytest.raises(gr.DecodeError):
            decode_session(line[:cut])


@given(data=st.binary(max_size=30))
def test_any_bytes_are_read_or_refused(data):
    """No line ends the import with another error."""
    with suppress(gr.DecodeError):
        decode_session(data)
        decode_session(b'{"format":"gorouter-trio/history","version":1,"key":"k","entries":[%b]}' % data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "not a session of ours"),
        ({"version": 2}, "another version"),
        ({"key": ""}, "the key"),
        ({"key": 7}, "the key"),
        ({"entries": {}}, "not a JSON list"),
        ({"entries": [7]}, "entry 0 is neither"),
        ({"entries": ["%"]}, "entry 0 is neither"),
        ({"entries": ["YQ==", "Ä"]}, "entry 1 is neither"),
    ],
)
def test_lines_of_another_form(change, says):
    """What is wrong is named."""
    line = {"format": "gorouter-trio/history", "version": 1, "key": "k", "entries": [], **change}
    with pytest.raises(gr.DecodeError, match=says):
        decode_session(json.dumps(line).encode())
