"""Calls in every form that the wire has been seen to take give the same report."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio.testing
from call_forms import REPLIES, STREAMS, add, now
from toolbox import open_bench

import gorouter_trio as gr
from gorouter_trio.tools.turn import ToolTurn
from gorouter_trio.wire.codec import decode_chunk, decode_completion, to_message
from gorouter_trio.wire.merge import ChunkMerge
from gorouter_trio.wire.messages import ToolCall


def from_stream(chunks: list[dict[str, Any]]) -> list[ToolCall]:
    merge = ChunkMerge()
    for each in chunks:
        merge.add([decode_chunk(json.dumps(each).encode())])
    calls = merge.message().tool_calls
    assert isinstance(calls, list)
    return calls


def from_reply(calls: list[dict[str, Any]], content: object) -> list[ToolCall]:
    message = {"role": "assistant", "content": content, "tool_calls": calls}
    body = {"id": "gen-1", "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    reply = decode_completion(b"\n         \n" + json.dumps(body).encode())
    assert reply.choices
    assert reply.choices[0].message is not None
    found = to_message(reply.choices[0].message).tool_calls
    assert isinstance(found, list)
    return found


FORMS = {
    **{f"streamed, {name}": from_stream(chunks) for name, chunks in STREAMS.items()},
    **{f"whole, {name}": from_reply(calls, "") for name, calls in REPLIES.items()},
    "whole, null content": from_reply(REPLIES["plain"], None),
}


@pytest.mark.parametrize("calls", FORMS.values(), ids=FORMS)
async def test_same_report(autojump_clock: trio.testing.MockClock, calls: list[ToolCall]) -> None:
    """Two calls give the same messages and rows, however they came (openrouter API, "Streaming")."""
    async with open_bench(add, now) as bench:
        turn = ToolTurn(limits=bench.limits)
        outcomes = await bench.supervisor.run_round(calls, bench.tools, turn=turn)
    rows = [msgspec.structs.replace(outcome.report, raw_arguments="") for outcome in outcomes]
    assert rows == [
        gr.ToolCallReport(
            call_id="c1", name="add", status="success", arguments={"a": 1, "b": 2}, text="3", has_run=True
        ),
        gr.ToolCallReport(call_id="c2", name="now", status="success", arguments={}, text="noon", has_run=True),
    ]
    assert [outcome.message.tool_call_id for outcome in outcomes] == ["c1", "c2"]


def test_reports_can_be_stored() -> None:
    """A row and an outcome come back from JSON as they were."""
    error = gr.ToolCallError(type="ValueError", message="no", details={"traceback": "..."})
    row = gr.ToolCallReport(
        call_id="c", name="n", status="error_execution", raw_arguments="{}", arguments={"a": [1]}, error=error, text="x"
    )
    assert msgspec.json.decode(msgspec.json.encode(row), type=gr.ToolCallReport) == row
    outcome = gr.ToolOutcome(gr.ToolMessage(tool_call_id="c", content="x"), row)
    assert msgspec.json.decode(msgspec.json.encode(outcome), type=gr.ToolOutcome) == outcome
