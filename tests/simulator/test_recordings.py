"""Recorded conversations: found by their requests, given out byte for byte, and counted."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from worlds import open_world, there

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError
from gorouter_trio.simulator import Recording, SimulatorConfig, load_recordings
from gorouter_trio.simulator.files import parse_config


def request(content, **more):
    return {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": content}], **more}


WHOLE = (
    '{"id":"gen-7","choices":[{"message":{"role":"assistant","content":"Low – at 04:12."},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8,"cost":0.0000057}}'
)
EVENTS = (
    ': OPENROUTER PROCESSING\n\ndata: {"id":"gen-8","choices":[{"delta":{"content":"Lo"},"finish_reason":null}]}\n\n'
    'data: {"id":"gen-8","choices":[{"delta":{"content":"w"},"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,"cost":0.001}}\n\ndata: [DONE]\n\n'
)
LINES = [
    {"request": request("tides"), "body": f"\n         \n{WHOLE}"},
    {"request": request("tides", stream=True), "body": EVENTS, "headers": [["X-Generation-Id", "gen-8"]]},
    {"request": request("busy"), "status": 503, "json": {"error": {"code": 503, "message": "busy"}}},
    {"request": request("busy"), "json": json.loads(WHOLE)},
    {"method": "GET", "path": "/models?q=sea", "json": {"data": [{"id": "sea/one"}]}},
]


@pytest.fixture
def recordings(tmp_path):
    path = tmp_path / "recorded.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return load_recordings(path)


async def test_recordings_are_replayed(autojump_clock, recordings):
    """Chat, stream, a refusal and its retry, a query: each as it was, and charged as its usage says."""
    async with open_world(SimulatorConfig(recordings=recordings, max_write_bytes=7)) as world:
        whole = await world.client.chat("tides")
        assert (whole.text, whole.generation_id, whole.cost) == ("Low – at 04:12.", "gen-7", Decimal("0.0000057"))
        async with world.client.stream("tides") as stream:
            assert [text async for text in stream.text] == ["Lo", "w"]
        assert stream.generation_id == "gen-8"
        retried = await world.client.chat("busy")
        assert (retried.text, retried.call.attempts) == (whole.text, 2)
        assert (await world.client.chat("busy")).call.attempts == 1
        assert [model.id for model in await world.client.models(q="sea")] == ["sea/one"]
        statistics = world.simulator.statistics()
        assert (statistics.received, statistics.processed, statistics.refused, statistics.streamed) == (5, 4, 1, 1)
        assert statistics.charged_nanousd == 3 * 5_700 + 1_000_000
        assert statistics.completion_tokens == 3 * 5 + 2


async def test_what_was_not_recorded(autojump_clock, recordings):
    """It is simulated as ever, or refused when only recordings are wanted; another order of fields is no difference."""
    async with open_world(SimulatorConfig(recordings=recordings)) as world:
        assert (await world.client.chat("[[say hello]]")).text == "hello"
        reordered = {"messages": request("tides")["messages"], "model": "openai/gpt-4o-mini"}
        async with world.client.batch([reordered]) as results:
            assert [there(row.result).text async for row in results] == ["Low – at 04:12."]
    async with open_world(SimulatorConfig(recordings=recordings, only_recordings=True)) as world:
        assert (await world.client.chat("tides")).text
        with pytest.raises(gr.NotFoundError, match="No recording of POST /chat/completions"):
            await world.client.chat("something else")
        with pytest.raises(gr.NotFoundError, match="GET /credits"):
            await world.client.credits()


def test_files_that_are_wrong(tmp_path):
    """The file and the line are named."""
    path = tmp_path / "recorded.jsonl"
    for line, named in (
        ('{"request": 1, "stauts": 200}', "stauts"),
        ('{"request": {]}', ""),
        ("5", "object"),
        ('{"status": "x"}', "status"),
    ):
        path.write_text(f'{{"body": "x"}}\n{line}\n')
        with pytest.raises(ConfigError, match=f"recorded.jsonl:2: .*{named}"):
            load_recordings(path)


def test_recordings_in_settings():
    """A scenario's file may hold those too that answer a request without a body."""
    config = parse_config('[[recordings]]\nmethod = "GET"\npath = "/credits"\nbody = "{}"\n')
    assert config.recordings == (Recording(method="GET", path="/credits", body="{}"),)
