"""`stream.objects`: answers in JSON, looked at while they arrive."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from call_forms import add
from hypothesis import given
from hypothesis import strategies as st
from worlds import DONE, EVENTS, chunk, open_world, streams

import gorouter_trio as gr
from gorouter_trio._turns.partial import PartialValue

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**15), 10**15) | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


class Person(msgspec.Struct):
    """Somebody."""

    name: str
    years: list[int]


def is_beginning(part: object, whole: object) -> bool:
    """Whether `part` may be what has arrived of `whole`."""
    if isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) <= len(whole) and all(map(is_beginning, part, whole))
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and is_beginning(value, whole[key]) for key, value in part.items())
    return type(part) is type(whole) and part == whole


@given(value=VALUES, indent=st.sampled_from([None, 1]), ascii_only=st.booleans(), size=st.integers(1, 9))
def test_each_value_is_a_beginning_of_the_last(value, indent, ascii_only, size):
    """Whatever the value and wherever it is cut, no part says what the whole does not, and the last is the whole."""
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    partial = PartialValue()
    seen = [partial.value for start in range(0, len(text), size) if partial.add(text[start : start + size])]
    partial.end()
    assert partial.value == value
    assert all(is_beginning(part, value) for part in seen)


def pieces(text: str, size: int = 3) -> list[bytes]:
    """The events of a stream that says `text`."""
    parts = [chunk({"content": text[at : at + size]}) for at in range(0, len(text), size)]
    return [*parts, chunk({}, finish="stop"), DONE]


@pytest.mark.parametrize("fence", ["", "```json\n"])
@pytest.mark.parametrize("way", ["stream", "session stream"])
async def test_a_form_that_grows(way, fence, autojump_clock):
    """The values come as they grow, each once, and the result has the type that was asked for."""
    text = fence + '{"name":"Ada Byron","years":[1815,1852]}' + ("\n```" if fence else "")
    async with open_world(answer=streams(*pieces(text))) as world:
        opened: Any = world.client.stream if way == "stream" else world.client.session("k").stream
        async with opened("Who?", response_type=Person) as stream:
            seen = [value async for value in stream.objects]
    assert seen[0] == {}
    assert any(value.get("name", "") in {"Ada B", "Ada By", "Ada Byr"} for value in seen)
    assert {"name": "Ada Byron", "years": [1815]} in seen
    assert not any(value.get("years") in ([1], [18], [181]) for value in seen)
    assert seen[-1] == {"name": "Ada Byron", "years": [1815, 1852]}
    assert all(one != other for one, other in pairwise(seen))
    assert stream.result.value == Person("Ada Byron", [1815, 1852])


@pytest.mark.parametrize("arguments", ['{"a":1,"b":2}', '{"a":1'])
async def test_what_is_said_before_tools_is_not_the_answer(arguments, autojump_clock):
    """A round of tools begins another answer, also where no tool was run because the call was refused."""
    call = {"index": 0, "id": "c1", "function": {"name": "add", "arguments": arguments}}

    async def answer(_request, reply):
        await reply.start(200, EVENTS)
        first = [chunk({"content": '{"sum":'}), chunk({"tool_calls": [call]}), chunk({}, finish="tool_calls"), DONE]
        for piece in first if len(world.sent) == 1 else pieces('{"sum":3}'):
            await reply.write(piece)
        await reply.finish()

    async with open_world(answer=answer) as world, world.client.stream("go", tools=[add], response_type=dict) as stream:
        assert [value async for value in stream.objects] == [{}, {}, {"sum": 3}]
        assert stream.result.value == {"sum": 3}


async def test_no_json_gives_no_value(autojump_clock):
    """Prose gives nothing, and is still there as the text."""
    async with open_world(answer=streams(*pieces("It is a nice day."))) as world, world.client.stream("go") as stream:
        assert [value async for value in stream.objects] == []
        assert stream.result.text == "It is a nice day."
    assert isinstance(stream, gr.ChatStream)
