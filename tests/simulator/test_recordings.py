"""Recorded conversations: found by their requests, given out byte for byte, and counted."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from decimal import Decimal

import httpx
import msgspec
import pytest
import trio
from wire_client import WireClient
from worlds import QUIET, open_world, there

import gorouter_trio as gr
from gorouter_trio.errors import ConfigError
from gorouter_trio.simulator import (
    Recording,
    Simulator,
    SimulatorConfig,
    load_recordings,
    open_recorder,
    open_simulated_network,
)
from gorouter_trio.simulator.files import parse_config
from gorouter_trio.simulator.recordings import Recordings

AUTHORIZED = {"Authorization": "Bearer sk-test"}


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
        ('{"status": 99}', "status"),
        ('{"headers": [["X-A", "two\\nlines"]]}', "headers"),
        ('{"request": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ):
        path.write_text(f'{{"body": "x"}}\n{line}\n')
        with pytest.raises(ConfigError, match=f"recorded.jsonl:2: .*{named}"):
            load_recordings(path)


async def test_headers_of_another_connection_are_passed_over(autojump_clock):
    """A reply that was copied with all of its headers is framed anew."""
    headers = (("content-length", "3"), ("Transfer-Encoding", "chunked"), ("Connection", "close"), ("X-Mine", "1"))
    config = SimulatorConfig(recordings=(Recording(method="GET", path="/credits", body="{}", headers=headers),))
    async with open_simulated_network(Simulator(config)) as network:
        client = WireClient(await network.connect("openrouter.simulated", 80))
        reply = await client.request("GET", "/api/v1/credits")
        await client.stream.aclose()
    assert (reply.status, reply.body, reply.header("x-mine"), reply.header("connection")) == (200, b"{}", "1", None)


def test_recordings_in_settings():
    """A scenario's file may hold those too that answer a request without a body."""
    config = parse_config('[[recordings]]\nmethod = "GET"\npath = "/credits"\nbody = "{}"\n')
    assert config.recordings == (Recording(method="GET", path="/credits", body="{}"),)


@asynccontextmanager
async def recording_client(path, config=None, **settings):
    """A client of a simulator whose exchanges are recorded, and the recorder."""
    async with (
        open_simulated_network(Simulator(config or SimulatorConfig())) as network,
        open_recorder(path, transport=gr.HttpTransport(network=network)) as recorder,
        gr.open_client(
            api_key="sk-or-v1-secret-of-ada",
            base_url=network.base_url,
            insecure_http=True,
            model="openai/gpt-4o-mini",
            transport=recorder.transport,
            **QUIET,
            **settings,
        ) as client,
    ):
        yield client, recorder


async def use(client):
    """A chat, a stream, a refusal and its retry, vectors, models, and a turn of a session with tools."""
    whole = await client.chat("tides [[say Low – at 04:12.]]")
    async with client.stream("tides [[say Low]]") as stream:
        streamed = await stream.collect()
    retried = await client.chat("[[fault 503 x1]] busy")
    vectors = await client.embeddings(["sea", "lake"], model="openai/text-embedding-3-small")
    models = await client.models(q="mini")
    turn = await client.session("k").ask('[[call weather {"city": "Oslo"}]]', tools=[weather])
    return [
        (whole.text, whole.generation_id, whole.cost),
        (streamed.text, streamed.generation_id, streamed.usage),
        (retried.text, retried.call.attempts),
        vectors.data,
        models,
        (turn.text, turn.generation_id, turn.tool_calls[0].text),
    ]


@gr.tool
async def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


@pytest.mark.parametrize("settings", [{}, {"compression": True}])
async def test_what_was_recorded_is_answered_again(tmp_path, settings):
    """A program runs against its recordings as it did against the API, byte for byte, and no key is in them."""
    path = tmp_path / "recorded.jsonl"
    async with recording_client(path, **settings) as (client, recorder):
        first = await use(client)
        assert recorder.written == 8
    assert b"secret-of-ada" not in path.read_bytes()
    assert "authorization" not in path.read_text().lower()
    recordings = load_recordings(path)
    assert [recording.status for recording in recordings] == [200, 200, 503, 200, 200, 200, 200, 200]
    async with open_world(SimulatorConfig(recordings=recordings, only_recordings=True)) as world:
        again = await use(world.client)
    assert again == first


async def test_what_does_not_come_to_an_end_is_not_recorded(tmp_path):
    """A stream that is left early, one that breaks off, and a cancelled call leave no half of a line."""
    path = tmp_path / "recorded.jsonl"
    async with recording_client(path, SimulatorConfig(latency_s=0.1)) as (client, recorder):
        async with client.stream("[[tokens 500]]") as stream:
            await anext(stream)
        with trio.move_on_after(0.05):
            await client.chat("slow")
        with pytest.raises(gr.StreamBrokenError):
            await client.chat("[[fault connection_cut]]")
        assert (await client.chat("[[say whole]]")).text == "whole"
        assert recorder.written == 1
    (recording,) = load_recordings(path)
    assert b"whole" in recording.content


@asynccontextmanager
async def recorded_requests(path):
    """Any HTTP client, of a simulator, and the recorder of what it sends."""
    async with (
        open_simulated_network(Simulator(SimulatorConfig())) as network,
        open_recorder(path, transport=gr.HttpTransport(network=network)) as recorder,
        httpx.AsyncClient(transport=recorder.transport, base_url=network.base_url, headers=AUTHORIZED) as client,
    ):
        yield client, recorder


@pytest.mark.parametrize("indent", [2, None])
async def test_a_request_may_have_any_layout(tmp_path, indent):
    """A program that sends JSON with spaces and line ends gets its replies again, whatever the layout then."""
    path = tmp_path / "recorded.jsonl"
    async with recorded_requests(path) as (client, _recorder):
        answer = await client.post("/chat/completions", content=json.dumps(request("tides"), indent=indent))
    (recording,) = load_recordings(path)
    assert json.loads(bytes(recording.request)) == request("tides")
    assert recording.content == answer.content
    assert Recordings([recording]).take("POST", "/chat/completions", body=json.dumps(request("tides")).encode())


@pytest.mark.parametrize("body", [b"--boundary\r\n", b'{"model": "\xff"}', b'{"model"'], ids=["file", "bytes", "cut"])
async def test_a_request_that_is_no_json_is_not_recorded(tmp_path, body):
    """It reaches the API, and the file can still be read; the recorder counts it."""
    path = tmp_path / "recorded.jsonl"
    async with recorded_requests(path) as (client, recorder):
        assert (await client.post("/chat/completions", content=body)).status_code == 400
        assert (await client.post("/chat/completions", json=request("tides"))).status_code == 200
    assert (recorder.written, recorder.skipped) == (1, 1)
    assert len(load_recordings(path)) == 1


@pytest.mark.parametrize("body", [WHOLE[:60], EVENTS[:120], "{", "data: {"])
async def test_a_reply_that_was_cut_is_in_the_books(autojump_clock, body):
    """It is given out as it is, costs nothing, and is in flight no longer."""
    recording = Recording(request=msgspec.Raw(json.dumps(request("tides")).encode()), body=body)
    simulator = Simulator(SimulatorConfig(recordings=(recording,), only_recordings=True))
    async with (
        open_simulated_network(simulator) as network,
        httpx.AsyncClient(transport=gr.HttpTransport(network=network), headers=AUTHORIZED) as client,
    ):
        answer = await client.post(f"{network.base_url}/chat/completions", json=request("tides"))
    assert answer.text == body
    s = simulator.statistics()
    assert (s.in_flight, s.completed, s.charged_nanousd) == (0, 1, 0)


async def test_a_recording_is_not_written_over(tmp_path):
    """Whoever recorded something wants to keep it."""
    path = tmp_path / "recorded.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ConfigError, match="is there already"):
        async with open_recorder(path):
            pass
    assert path.read_text() == "{}\n"
    with pytest.raises(FileNotFoundError):
        async with open_recorder(tmp_path / "no" / "such.jsonl"):
            pass
