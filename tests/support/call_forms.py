"""Two calls in every form that the wire has been seen to take, and the tools that they call."""

from __future__ import annotations

from typing import Any

import gorouter_trio as gr

ADD = '{"a":1,"b":2}'


@gr.tool
async def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


@gr.tool
async def now() -> str:
    """Tells the time."""
    return "noon"


def piece(index: int | None, call_id: str | None, name: str | None, arguments: str | None) -> dict[str, Any]:
    """An entry of `tool_calls`; what is None is left out."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {"index": index, "id": call_id, "type": "function" if call_id else None, "function": function}
    return {key: value for key, value in fields.items() if value is not None}


def chunk(*pieces: dict[str, Any], content: object = None, finish: str | None = None) -> dict[str, Any]:
    delta = {"role": "assistant", "content": content, **({"tool_calls": list(pieces)} if pieces else {})}
    return {"id": "gen-1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


FINISH = [chunk(content="", finish="tool_calls"), chunk(content="", finish="tool_calls")]
STREAMS = {
    "fragments": [
        chunk(piece(0, "c1", "add", "")),
        *(chunk(piece(0, None, None, each)) for each in ADD),
        chunk(piece(1, "c2", "now", "")),
        *FINISH,
    ],
    "whole calls": [chunk(piece(0, "c1", "add", ADD), piece(1, "c2", "now", "{}")), *FINISH],
    "interleaved": [
        chunk(piece(0, "c1", "add", ""), piece(1, "c2", "now", "")),
        chunk(piece(1, None, None, "{"), piece(0, None, None, ADD[:4])),
        chunk(piece(0, None, None, ADD[4:]), piece(1, None, None, "}")),
        *FINISH,
    ],
    "repeated empty fields": [
        chunk(piece(0, "c1", "add", "")),
        chunk({"index": 0, "id": "", "type": "function", "function": {"name": "", "arguments": ADD[:5]}}),
        chunk({"index": 0, "id": None, "type": None, "function": {"name": None, "arguments": ADD[5:]}}),
        chunk(piece(1, "c2", "now", None)),
        *FINISH,
    ],
    "no index": [chunk(piece(None, "c1", "add", ADD), piece(None, "c2", "now", "")), *FINISH],
    "index used again": [chunk(piece(0, "c1", "add", ADD)), chunk(piece(0, "c2", "now", "{}")), *FINISH],
    "no finish twice": [chunk(piece(0, "c1", "add", ADD)), chunk(piece(1, "c2", "now", "{}"), finish="tool_calls")],
}
REPLIES = {
    "plain": [piece(0, "c1", "add", ADD), piece(1, "c2", "now", "{}")],
    "no arguments": [piece(0, "c1", "add", ADD), piece(1, "c2", "now", None)],
    "empty arguments": [piece(None, "c1", "add", ADD), piece(None, "c2", "now", "")],
    "spaces": [piece(0, "c1", "add", ' { "b" : 2 , "a" : 1 } '), piece(1, "c2", "now", " ")],
    "null": [piece(0, "c1", "add", ADD), piece(1, "c2", "now", "null")],
}
