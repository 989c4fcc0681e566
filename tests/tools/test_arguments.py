"""The text of arguments, read once: what is refused, and that equal arguments are equal."""

from __future__ import annotations

import json
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.tools.arguments import ArgumentsError, canonical_json, digest_of, parse_arguments

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)
OBJECTS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=5)


def parse(text: str) -> dict[str, object]:
    return parse_arguments(text, max_bytes=100_000)


@pytest.mark.parametrize("text", ["", "  \n ", "{}", "null", " { } "])
def test_no_arguments(text: str) -> None:
    """No text, null and an empty object are no arguments (openrouter API, "Non-stream response")."""
    assert parse(text) == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ('{"a":1} {"b":2}', "not valid JSON: Extra data"),
        ("{'a':1}", "not valid JSON"),
        ('{"a":"\n"}', "not valid JSON: Invalid control character"),
        ("[1]", "must be a JSON object"),
        ('"text"', "must be a JSON object"),
        ("3", "must be a JSON object"),
        ('{"a":NaN}', "NaN, which is not JSON"),
        ('{"a":[-Infinity]}', "-Infinity, which is not JSON"),
        ('{"a":1e400}', "number that is too large"),
        ('{"a":18446744073709551616}', "integer that does not fit into 64 bits"),
        ('{"a":-9223372036854775809}', "integer that does not fit into 64 bits"),
        ('{"a":' + "9" * 5_000 + "}", "integer that does not fit into 64 bits"),
        ('{"a":1,"b":{"c":1,"c":2}}', "name 'c' twice"),
        ('{"a":1,"\\u0061":2}', "name 'a' twice"),
        ('{"a":"\\ud800"}', "half of a surrogate pair"),
        ('{"\\udfff":1}', "half of a surrogate pair"),
        ('{"a":' + "[" * 65 + "]" * 65 + "}", "nested more than 64 levels"),
        ('{"a":' * 10_000, "nested more than 64 levels"),
        ("[" * 90_000, "nested more than 64 levels"),
        ('{"a":"' + "x" * 100_000 + '"}', "longer than 100000 bytes"),
        ('{"a":"' + "é" * 60_000 + '"}', "longer than 100000 bytes"),
    ],
    ids=range(22),
)
def test_refused(text: str, reason: str) -> None:
    """What is not JSON, or is not read alike by every program, is refused with a reason for the model."""
    with pytest.raises(ArgumentsError, match=reason) as caught:
        parse(text)
    assert len(str(caught.value)) < 300


def test_edges() -> None:
    """The largest numbers, the deepest nesting and brackets in strings are fine."""
    assert parse('{"a":18446744073709551615,"b":-9223372036854775808,"c":1e308}')["a"] == 2**64 - 1
    assert parse('{"a":' + "[" * 63 + "]" * 63 + "}")
    assert parse('{"a":"' + "[{" * 1_000 + '\\""}') == {"a": "[{" * 1_000 + '"'}
    assert parse('{"a":"\\ud83d\\ude00"}') == {"a": "😀"}


@given(OBJECTS)
def test_any_object(value: dict[str, object]) -> None:
    """Every object comes back as it is, and can be encoded by the package's own encoder."""
    found = parse(json.dumps(value))
    assert found == value
    assert msgspec.json.decode(msgspec.json.encode(found)) == msgspec.json.decode(canonical_json(value))


@given(OBJECTS)
def test_canonical(value: dict[str, object]) -> None:
    """The order of names and the white space make no difference to what a call is; the tool does."""
    turned = dict(reversed(list(value.items())))
    spaced = parse(json.dumps(turned, indent=3))
    assert canonical_json(spaced) == canonical_json(value)
    assert digest_of("a", spaced) == digest_of("a", value)
    assert digest_of("a", spaced) != digest_of("b", value)


@given(st.text())
def test_any_text(text: str) -> None:
    """Any text at all is an object or refused, and nothing else."""
    try:
        value = parse(text)
    except ArgumentsError:
        return
    canonical_json(value)


def test_evil_text_is_read_fast() -> None:
    """Text made to be slow for a parser is refused within the time that its length takes."""
    begin = time.process_time()
    for text in ('{"a":' + '"\\' * 40_000, '{"' * 40_000, '"' * 90_000, "\\" * 90_000, '{"a":"' + '\\"' * 40_000):
        with pytest.raises(ArgumentsError):
            parse(text)
    assert time.process_time() - begin < 2


def test_a_name_that_comes_twice_is_found_fast() -> None:
    """However many names a model writes, the one that comes twice is told within the time that reading takes."""
    names = ",".join(f'"{number}":0' for number in range(25_000))
    begin = time.process_time()
    with pytest.raises(ArgumentsError, match="name '24999' twice"):
        parse_arguments(f'{{{names},"24999":0}}', max_bytes=1_000_000)
    assert time.process_time() - begin < 2
