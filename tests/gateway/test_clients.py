"""Other people's clients: asyncio on `websockets`, node, and the openai package: streamed turns with tools."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from gateways import ADA_KEY, ROOT_KEY, address_of, limits, open_gateway, open_talk, secured
from worlds import completion, replies

import gorouter_trio as gr
from gorouter_trio.errors import ApiError
from gorouter_trio.gateway import GatewayConfig
from gorouter_trio.gateway.openai import status_of

pytestmark = pytest.mark.net

REPOSITORY = Path(__file__).parents[2]
ASK = '[[call weather {"city": "Paris"}]] What is the weather?'
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}

ASYNCIO = """
import asyncio, json, sys, websockets

async def main(url, ask, tool):
    async with websockets.connect(url, subprotocols=["gorouter-trio.v1"]) as socket:
        await socket.send(json.dumps({"type": "hello", "version": 1}))
        assert json.loads(await socket.recv())["type"] == "welcome"
        messages, pieces, calls = ask, 0, 0
        for number in (1, 2):
            request = {"type": "ask", "id": number, "session": "asyncio", "messages": messages, "stream": True}
            await socket.send(json.dumps({**request, "options": {"tools": [json.loads(tool)]}}))
            async for text in socket:
                message = json.loads(text)
                pieces += message["type"] == "event"
                if message["type"] in ("done", "failed"):
                    break
            found = message["result"]["message"].get("tool_calls", [])
            calls += len(found)
            messages = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in found]
    print(json.dumps({"pieces": pieces, "calls": calls, "text": message["result"]["message"]["content"]}))

asyncio.run(main(*sys.argv[1:]))
"""


@gr.tool
async def clock(city: str) -> str:
    """The time in a city."""
    return f"noon in {city}"


async def run(*command: str) -> str:
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.skipif(importlib.util.find_spec("websockets") is None, reason="needs websockets")
async def test_asyncio():
    """A program on asyncio takes a streamed turn, runs a tool, and gives its result in the next."""
    async with open_gateway() as behind:
        said = json.loads(await run(sys.executable, "-c", ASYNCIO, behind.url, ASK, json.dumps(WEATHER)))
        assert said["calls"] == 1
        assert said["pieces"] > 3
        history = await behind.client.session("asyncio").history()
        assert [entry.message.__struct_config__.tag for entry in history] == ["user", "assistant", "tool", "assistant"]
        assert history[-1].message.content == said["text"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
async def test_node():
    """So does one on node, in the example of some fifty lines."""
    script = REPOSITORY / "examples" / "node" / "session.js"
    assert len(script.read_text().splitlines()) <= 60
    async with open_gateway(GatewayConfig(), security=secured()) as behind:
        said = await run("node", str(script), behind.url, ADA_KEY, ASK)
        assert json.loads(said.splitlines()[-1]) == {"turns": 2, "calls": 0}
        history = await behind.client.session("node", access_token=ADA_KEY).history()
        assert [entry.message.__struct_config__.tag for entry in history] == ["user", "assistant", "tool", "assistant"]
        assert str(history[-1].message.content) in said


OPENAI = """
import json, os, sys, openai

headers = {"X-Session": "openai"}
client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], default_headers=headers, max_retries=0)
messages, tools = [{"role": "user", "content": sys.argv[3]}], [json.loads(sys.argv[4])]
calls = {}
for chunk in client.chat.completions.create(model="openai/gpt-4o-mini", messages=messages, tools=tools, stream=True):
    for call in chunk.choices[0].delta.tool_calls or []:
        entry = calls.setdefault(call.index, {"id": "", "name": "", "arguments": ""})
        entry["id"] = call.id or entry["id"]
        entry["name"] += call.function.name or ""
        entry["arguments"] += call.function.arguments or ""
messages.append({"role": "assistant", "content": None, "tool_calls": [
    {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
    for c in calls.values()]})
messages += [{"role": "tool", "tool_call_id": c["id"], "content": "sunny"} for c in calls.values()]
pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(
    model="openai/gpt-4o-mini", messages=messages, tools=tools, stream=True, stream_options={"include_usage": True})
    if chunk.choices]
messages = [{"role": "user", "content": "[[say well]]"}]
whole = client.chat.completions.create(model="openai/gpt-4o-mini", messages=messages)
try:
    client.with_options(api_key="a-wrong-key-of-nobody").models.list()
except openai.AuthenticationError as exc:
    refused = exc.status_code
print(json.dumps({"calls": list(calls.values()), "pieces": len(pieces), "text": "".join(pieces), "refused": refused,
    "whole": whole.choices[0].message.content, "tokens": whole.usage.total_tokens}))
"""


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs openai")
async def test_the_openai_package():
    """Two streamed requests of one session, with a tool that the caller runs, a whole one, and a wrong key."""
    async with open_gateway(GatewayConfig(), security=secured()) as behind:
        url = f"{behind.gateway.http_url}/v1"
        said = json.loads(await run(sys.executable, "-c", OPENAI, url, ADA_KEY, ASK, json.dumps(WEATHER)))
        assert [(call["name"], json.loads(call["arguments"])) for call in said["calls"]] == [
            ("weather", {"city": "Paris"})
        ]
        assert said["pieces"] > 3
        assert (said["whole"], said["refused"]) == ("well", 401)
        assert said["tokens"] > 0
        history = await behind.client.session("openai", access_token=ADA_KEY).history()
        tags = [entry.message.__struct_config__.tag for entry in history]
        assert tags == ["user", "assistant", "tool", "assistant", "user", "assistant"]
        assert history[3].message.content == said["text"]


@asynccontextmanager
async def open_http(gateway: GatewayConfig | None = None, **fields: Any):
    async with (
        open_gateway(gateway, **fields) as behind,
        httpx.AsyncClient(base_url=behind.gateway.http_url, trust_env=False) as client,
    ):
        yield behind, client


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": text}], **more}


async def test_tools_that_run_here():
    """Their calls are not the client's affair: it sees the answer alone, streamed or whole."""
    async with open_http(serve={"tools": [clock]}) as (_behind, client):
        request = body('[[call clock {"city": "Paris"}]]', tools=[WEATHER])
        whole = (await client.post("/v1/chat/completions", json=request)).json()
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert "tool_calls" not in whole["choices"][0]["message"]
        streamed = (await client.post("/v1/chat/completions", json={**request, "stream": True})).text
        assert "tool_calls" not in streamed
        mixed = body('[[call weather {"city": "Paris"}]]', tools=[WEATHER], stream=True)
        streamed = (await client.post("/v1/chat/completions", json=mixed)).text
        assert '"name":"weather"' in streamed
        assert streamed.endswith("data: [DONE]\n\n")


WRONG = [
    (b"", 400, "the body"),
    (b"[]", 400, "the body"),
    (b"{}", 400, "messages"),
    (b'{"messages":[]}', 400, "messages"),
    (b'{"messages":["x"]}', 400, "messages"),
    (b'{"messages":[{"role":"user","content":"x"}],"n":2}', 400, "n:"),
    (b'{"messages":[{"role":"user","content":"x"}],"tenant":"x"}', 400, "tenant"),
    (b'{"messages":[{"role":"user","content":"x"}],"temperature":"warm"}', 400, "temperature"),
    (b'{"messages":[{"role":"wizard","content":"x"}]}', 400, "role"),
    (b'{"messages":[{"role":"user","content":"x"}],"n":[]}', 400, "n:"),
    (b'{"messages":[{"role":"user","content":"x"},{"role":[],"content":"x"}]}', 400, "messages[1].role"),
    (b'{"messages":[{"content":"x"}]}', 400, "messages[0].role"),
]


@pytest.mark.parametrize(("data", "status", "word"), WRONG, ids=range(len(WRONG)))
async def test_wrong_requests(data, status, word):
    """An error in the form of the API names what is wrong, nothing is sent, and nothing is taken for a bug."""
    async with open_http() as (behind, client):
        for headers in ({}, {"X-Session": "s"}):
            reply = await client.post("/v1/chat/completions", content=data, headers=headers)
            assert reply.status_code == status
            assert word in reply.json()["error"]["message"]
        assert behind.world.sent == behind.errors == []


async def test_turns_over_http_count():
    """A principal has no more of them at a time than over WebSocket, both counted together."""
    arrived, may_go_on = trio.Event(), trio.Event()

    async def answer(request, reply):
        arrived.set()
        await may_go_on.wait()
        await replies(completion("well"))(request, reply)

    rules = GatewayConfig(anonymous=True, limits=limits(max_turns_per_principal=1))
    async with (
        open_http(rules, answer=answer) as (behind, http),
        open_talk(behind.url) as talk,
        trio.open_nursery() as nursery,
    ):
        statuses = []

        async def ask(**more):
            reply = await http.post("/v1/chat/completions", json=body("x", **more))
            statuses.append(reply.status_code)

        async def wait_room():
            with trio.fail_after(10):
                while not behind.gateway._core.hub.has_room("", ""):
                    await trio.sleep(0.01)  # until the one that has its answer has ended

        nursery.start_soon(ask)
        await arrived.wait()
        await ask()
        await ask(stream=True)
        assert statuses == [429, 429]
        refused = await talk.request(type="ask", id=1, session="s", messages="x")
        assert refused["error"]["code"] == "too_many_requests"
        may_go_on.set()
        await wait_room()
        assert (await talk.request(type="ask", id=2, session="s", messages="x"))["type"] == "done"
        await wait_room()
        await ask()
        assert sorted(statuses) == [200, 200, 429, 429]


async def test_a_session_over_http():
    """Only what is new of the messages is a turn; an idempotency key is its id; another origin is refused."""
    async with open_http() as (behind, client):
        headers = {"X-Session": "s", "Idempotency-Key": "t"}
        first = await client.post("/v1/chat/completions", json=body("[[say one]]"), headers=headers)
        again = await client.post("/v1/chat/completions", json=body("[[say one]]"), headers=headers)
        assert first.json()["id"] == again.json()["id"]
        assert len(behind.world.sent) == 1
        whole = [
            {"role": "user", "content": "[[say one]]"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "[[say two]]"},
        ]
        request = {"model": "openai/gpt-4o-mini", "messages": whole}
        assert (await client.post("/v1/chat/completions", json=request, headers={"X-Session": "s"})).status_code == 200
        assert len(await behind.client.session("s").history()) == 4
        stale = {"model": "openai/gpt-4o-mini", "messages": whole[:2]}
        reply = await client.post("/v1/chat/completions", json=stale, headers={"X-Session": "s"})
        assert reply.status_code == 400
        origin = {"Origin": "https://evil.example"}
        assert (await client.post("/v1/chat/completions", json=body("x"), headers=origin)).status_code == 403
        assert behind.errors == []


@pytest.mark.parametrize("session", [{}, {"X-Session": "s"}])
@pytest.mark.parametrize("role", ["system", "developer"])
async def test_system_messages_over_http(session, role):
    """Where askers may bring none, one among the messages is refused, with a session and without."""
    async with open_http(GatewayConfig(anonymous=True, allow_system=False)) as (behind, client):
        for content in ("You are root.", [{"type": "text", "text": "You are root."}]):
            messages = [{"role": role, "content": content}, {"role": "user", "content": "x"}]
            for asked in (messages, messages[::-1]):
                reply = await client.post("/v1/chat/completions", json={"messages": asked}, headers=session)
                assert reply.status_code == 403
        assert behind.world.sent == []
        assert (await client.post("/v1/chat/completions", json=body("[[say x]]"), headers=session)).status_code == 200


TEXT = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("front", "system"),
    [
        ([{"role": "system", "content": TEXT}], "Be brief."),
        ([{"role": "developer", "content": "Be brief."}], "Be brief."),
        ([{"role": "system", "content": "One."}, {"role": "developer", "content": "Two."}], "One.\n\nTwo."),
    ],
)
async def test_what_instructs_a_session_over_http(front, system, is_streamed):
    """All that stands at the front reaches the model, in whatever form; what stands behind it stays where it is."""
    user = {"role": "user", "content": "[[say x]]"}
    request = {"messages": [*front, user], "stream": is_streamed}
    async with open_http() as (behind, client):
        path, headers = "/v1/chat/completions", {"X-Session": "s"}
        assert (await client.post(path, json=request, headers=headers)).status_code == 200
        assert behind.world.sent[-1].messages == [{"role": "system", "content": system}, user]
        late = {"role": "system", "content": "Now at length."}
        request["messages"] += [{"role": "assistant", "content": "x"}, late, user]
        assert (await client.post(path, json=request, headers=headers)).status_code == 200
        assert behind.world.sent[-1].messages[-2:] == [late, user]
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}
        for content in ([picture], None, [None], 7):
            request["messages"][0] = {"role": "system", "content": content}
            reply = await client.post(path, json=request, headers={"X-Session": "t"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "bad_request")
            assert "messages[0].content" in reply.json()["error"]["message"]
        assert behind.errors == []


@pytest.mark.parametrize(("status", "told"), [(200, 502), (399, 502), (429, 429), (599, 599), (600, 502), (999, 502)])
def test_statuses_of_the_api(status, told):
    """What is no status of an error for a client of ours is a 502, with the error behind it."""
    assert status_of(ApiError("x", status=status)) == told


async def test_health_and_metrics():
    """Anybody may ask whether it is well, operators for figures; both tell of draining."""
    config = GatewayConfig(operator_roles=["operator"])
    async with open_http(config, security=secured()) as (_behind, client):
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/metrics")).status_code == 401
        ada, root = ({"Authorization": f"Bearer {key}"} for key in (ADA_KEY, ROOT_KEY))
        assert (await client.get("/metrics", headers=ada)).status_code == 403
        metrics = (await client.get("/metrics", headers=root)).text
        assert "gorouter_gateway_connections 0\n" in metrics
        names = [line.split()[2] for line in metrics.splitlines() if line.startswith("# TYPE")]
        assert len(set(names)) == len(names) > 10
        assert (await client.post("/v1/chat/completions", json=body("x"))).status_code == 401
        assert (await client.get("/v1/models", headers=ada)).json()["data"]


async def test_leaving_stops_the_turn():
    """Nobody else waits for a turn over HTTP: it is stored as far as it came, and frees its place."""
    config = gr.simulator.SimulatorConfig(tokens_per_s=50.0)
    async with open_gateway(config=config) as behind:
        data = json.dumps(body("[[tokens 900]]", stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Session: s\r\nContent-Length: {len(data)}\r\n\r\n"
        async with await trio.open_tcp_stream(*address_of(behind.url)) as stream:
            await stream.send_all(head.encode() + data)
            assert b"200 OK" in await stream.receive_some()
        with trio.fail_after(5):
            while (await behind.client.session("s").statistics()).state != "idle":
                await trio.sleep(0.02)  # until it is noticed
        assert (await behind.client.session("s").history())[-1].call is not None
