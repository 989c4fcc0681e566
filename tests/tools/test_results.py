"""Results as text: whatever a tool returns, cut at a size, without work that the size does not bound."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import enum
import json
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any

import attrs
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Struct, UnsetType

from gorouter_trio.tools.results import ResultError, cut_text, encode_result


class Kind(enum.Enum):
    A = "a"


class Point(Struct, tag="point"):
    x: float
    y: float = 0.0


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Model(pydantic.BaseModel):
    name: str


class Account(pydantic.BaseModel):
    password: str = pydantic.Field(exclude=True)
    name: str = pydantic.Field(serialization_alias="userName")
    card: str
    token: pydantic.SecretStr
    pad: str

    @pydantic.field_serializer("card")
    def mask(self, _card: str) -> str:
        return "****"


class Renamed(Struct, rename="camel", tag="renamed"):
    first_name: str
    pad: str
    left_out: UnsetType | str = UNSET


@attrs.define(slots=False)
class Private:
    name: str
    _key: str
    pad: str


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('plain "text"', 'plain "text"'),
        ("", ""),
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (2**80, str(2**80)),
        (1.5, "1.5"),
        (float("nan"), '"nan"'),
        ([float("inf"), -float("inf")], '["inf","-inf"]'),
        (Decimal("1.10"), "1.10"),
        (Decimal("NaN"), '"NaN"'),
        ({"a": [1, (2,)]}, '{"a":[1,[2]]}'),
        ({1: "one"}, '{"1":"one"}'),
        (Point(1.0), '{"type":"point","x":1.0,"y":0.0}'),
        (Pair(Kind.A, {"n": float("nan")}), '{"left":"a","right":{"n":"nan"}}'),
        (Model(name="x"), '{"name":"x"}'),
        ([Model(name="x")], '[{"name":"x"}]'),
        (datetime.date(2025, 1, 2), '"2025-01-02"'),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (b"hi", '"aGk="'),
        (frozenset({1}), "[1]"),
        ("half \ud800 pair", "half ? pair"),
    ],
    ids=range(22),
)
def test_values(value: object, text: str) -> None:
    """A text is sent as it is, everything else as JSON."""
    found = encode_result(value, max_bytes=1024)
    assert (found.text, found.is_cut) == (text, False)


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


async def coroutine() -> int:
    return 1


def cycle() -> list[object]:
    found: list[object] = []
    found.append(found)
    return found


def deep() -> dict[str, object]:
    found: dict[str, object] = {}
    for _ in range(100_000):
        found = {"a": found}
    return found


def large_cycle() -> dict[str, object]:
    found: dict[str, object] = {"text": "x" * 50}
    found["self"] = [found] * 3
    return found


@pytest.mark.parametrize(
    "make",
    [
        generator,
        async_generator,
        coroutine,
        cycle,
        deep,
        large_cycle,
        object,
        lambda: sys,
        lambda: print,
        lambda: [{1: object()}],
    ],
    ids=range(10),
)
def test_no_values(make: Callable[[], object]) -> None:
    """What is no data is refused: generators, what contains itself, modules, functions."""
    with pytest.raises(ResultError):
        encode_result(make(), max_bytes=1024)


def test_coroutines_are_closed() -> None:
    """A coroutine that comes as a result does not warn later that nobody awaited it."""
    value = asyncio.sleep(0)
    with pytest.raises(ResultError, match="coroutine"):
        encode_result(value, max_bytes=1024)


@pytest.mark.parametrize(
    "make",
    [
        lambda: "x" * 10_000_000,
        lambda: "€" * 5_000_000,
        lambda: b"x" * 10_000_000,
        lambda: ["x" * 10_000_000],
        lambda: {"x" * 5_000_000: 1},
        lambda: list(range(2_000_000)),
        lambda: {str(i): i for i in range(300_000)},
        lambda: [Point(i) for i in range(100_000)],
        lambda: Pair("x" * 10_000_000, [1] * 1_000_000),
        lambda: Model(name="x" * 5_000_000),
        lambda: [[["x" * 100] * 100] * 100] * 100,
    ],
    ids=range(11),
)
def test_large(make: Callable[[], object]) -> None:
    """A large value is cut at the size and marked, and takes a time that the size bounds."""
    value = make()
    begin = time.process_time()
    found = encode_result(value, max_bytes=65_536, keep_value=True)
    took = time.process_time() - begin
    assert found.is_cut
    assert found.value is None
    assert len(found.text.encode()) <= 65_536
    assert len(found.text) > 15_000
    assert found.text.endswith("\n[cut: longer than 65536 bytes]")
    assert took < 1.0


def account(pad: str) -> Account:
    return Account(password="HUNTER2", name="Ada", card="4111111111111111", token=pydantic.SecretStr("HUSH"), pad=pad)


@pytest.mark.parametrize("pad", ["", "x" * 10_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (account, '{"userName":"Ada","card":"****","token":"**********","pad":"'),
        (lambda pad: [account(pad)], '[{"userName":"Ada","card":"****","token":"**********","pad":"'),
        (lambda pad: Renamed("Ada", pad), '{"type":"renamed","firstName":"Ada","pad":"'),
        (lambda pad: Pair(Private("Ada", "HUSH", pad), 1), '{"left":{"name":"Ada","pad":"'),
    ],
    ids=range(4),
)
def test_names_and_secrets(make: Callable[[str], object], text: str, pad: str) -> None:
    """What a class renames, masks or leaves out is so in a result of any size."""
    found = encode_result(make(pad), max_bytes=1024)
    assert found.text.startswith(text + pad[:100])
    assert found.is_cut == bool(pad)
    assert not any(secret in found.text for secret in ("HUNTER2", "4111", "HUSH"))


def test_large_in_what_is_left_out() -> None:
    """A result is whole when only fields that are not written are large."""
    value = Account(password="x" * 10_000, name="Ada", card="4", token=pydantic.SecretStr("t"), pad="")
    found = encode_result(value, max_bytes=1024, keep_value=True)
    assert (found.is_cut, found.value) == (False, json.loads(found.text))


def test_kept_value() -> None:
    """The value is kept as JSON where that is asked for."""
    assert encode_result(Point(1), max_bytes=1024).value is None
    assert encode_result(Point(1), max_bytes=1024, keep_value=True).value == {"type": "point", "x": 1.0, "y": 0.0}
    assert encode_result("text", max_bytes=1024, keep_value=True).value == "text"


@given(st.text(st.characters()), st.integers(64, 300))
def test_cut(text: str, size: int) -> None:
    """A text is whole or cut between characters, and never longer than the size."""
    found, is_cut = cut_text(text, size)
    assert len(found.encode()) <= size
    whole = text.encode("utf-8", "replace").decode()
    assert is_cut == (len(whole.encode()) > size)
    assert found == whole if not is_cut else whole.startswith(found.rpartition("\n[cut")[0])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20) | st.decimals(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner) | st.builds(Pair, inner, inner)
    ),
    max_leaves=30,
)


@given(VALUES)
def test_any_data(value: Any) -> None:
    """Data of any form becomes JSON that every program reads, or a text."""
    found = encode_result(value, max_bytes=1_000_000)
    assert not found.is_cut
    if not isinstance(value, str):
        json.loads(found.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found.text.encode()
