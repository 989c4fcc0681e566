"""The simulator on real sockets, with clients that know nothing of it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from typing import TYPE_CHECKING

import h11
import pytest
import trio
from wire_client import WireClient

from gorouter_trio.simulator import Simulator, SimulatorConfig, serve_simulator

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    LeakCheck = Callable[[], AbstractAsyncContextManager[None]]

pytestmark = pytest.mark.net

KEY = ("Authorization", "Bearer sk-or-v1-0123456789abcdef")


async def test_the_base_url_is_told_when_it_can_be_used() -> None:
    """The started value is a URL that answers at once, and no longer after the server is cancelled."""
    simulator = Simulator()
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        assert base_url.startswith("http://127.0.0.1:")
        assert base_url.endswith("/api/v1")
        port = int(base_url.split(":")[2].split("/")[0])
        client = WireClient(await trio.open_tcp_stream("127.0.0.1", port))
        reply = await client.post(
            "/api/v1/chat/completions", {"messages": [{"role": "user", "content": "[[say hello]]"}]}, headers=(KEY,)
        )
        assert reply.json()["choices"][0]["message"]["content"] == "hello"
        assert reply.header("date") is not None
        await client.stream.aclose()
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match=r".*"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_a_taken_port_is_an_os_error() -> None:
    """The error of the operating system comes through as itself inside the nursery's group."""
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, Simulator())
        port = int(base_url.split(":")[2].split("/")[0])
        with pytest.raises(OSError, match="in use"):
            await serve_simulator(Simulator(), port=port)
        nursery.cancel_scope.cancel()


async def test_a_stream_left_on_a_real_socket_is_noticed_and_billed_in_part() -> None:
    """The close of a TCP connection stops the generation within moments."""
    simulator = Simulator(SimulatorConfig(tokens_per_s=200, reply_spread=0))
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        port = int(base_url.split(":")[2].split("/")[0])
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        body = json.dumps({"stream": True, "messages": [{"role": "user", "content": "[[tokens 100000]]"}]}).encode()
        client = WireClient(stream)
        await client.send("POST", "/api/v1/chat/completions", headers=(KEY,), body=body)
        received = b""
        while received.count(b"data: ") < 5:
            received += bytes(await stream.receive_some())
        await stream.aclose()
        with trio.fail_after(5):
            while simulator.statistics().in_flight:
                await trio.sleep(0.001)
        (charge,) = simulator.ledger.charges()
        assert charge.cancelled
        assert 3 <= charge.completion_tokens < 5_000
        nursery.cancel_scope.cancel()


async def test_a_batch_of_requests_over_keep_alive_connections() -> None:
    """Many requests on few connections: each answered, counted and charged once."""
    simulator = Simulator()
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        port = int(base_url.split(":")[2].split("/")[0])
        costs: list[float] = []

        async def work(first: int) -> None:
            client = WireClient(await trio.open_tcp_stream("127.0.0.1", port))
            for number in range(first, 400, 8):
                fields = {"messages": [{"role": "user", "content": f"A boat has {number} oars and 7 sails. How many?"}]}
                reply = await client.post("/api/v1/chat/completions", fields, headers=(KEY,))
                costs.append(reply.json()["usage"]["cost"])
            await client.stream.aclose()

        async with trio.open_nursery() as workers:
            for first in range(8):
                workers.start_soon(work, first)
        counts = simulator.statistics()
        assert (counts.received, counts.completed, len(costs)) == (400, 400, 400)
        assert sum(round(cost * 10**9) for cost in costs) == counts.charged_nanousd
        nursery.cancel_scope.cancel()


async def test_clients_that_come_and_go_leave_nothing_behind(rng: random.Random, no_leaks: LeakCheck) -> None:
    """Streams and whole replies cancelled at random moments: the books balance, and the next request is answered."""
    config = SimulatorConfig(latency_s=0.002, tokens_per_s=5_000, fault_rates={"stream_cut": 0.05, "502": 0.05})
    simulator = Simulator(config)
    async with no_leaks(), trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        port = int(base_url.split(":")[2].split("/")[0])

        async def churn(name: int) -> None:
            for number in range(25):
                fields = {
                    "stream": number % 2 == 0,
                    "messages": [{"role": "user", "content": f"Tide {name} {number}?"}],
                }
                with trio.move_on_after(rng.uniform(0.0002, 0.03)):
                    stream = await trio.open_tcp_stream("127.0.0.1", port)
                    async with stream:
                        with contextlib.suppress(h11.RemoteProtocolError):
                            await WireClient(stream).post("/api/v1/chat/completions", fields, headers=(KEY,))

        async with trio.open_nursery() as workers:
            for name in range(20):
                workers.start_soon(churn, name)
        with trio.fail_after(5):
            while simulator.statistics().in_flight:
                await trio.sleep(0.001)
        counts = simulator.statistics()
        assert counts.received == counts.refused + counts.processed
        assert counts.processed == counts.completed + counts.cancelled + counts.failed
        assert counts.cancelled > 0
        assert counts.completed > 0
        assert counts.charged_nanousd == sum(charge.nanousd for charge in simulator.ledger.charges())
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            fields = {"messages": [{"role": "user", "content": "[[say still here]]"}]}
            reply = await WireClient(stream).post("/api/v1/chat/completions", fields, headers=(KEY,))
            assert reply.status == 200
        nursery.cancel_scope.cancel()


OPENAI_PROGRAM = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key="sk-or-v1-test", max_retries=0, timeout=20)
message = [{"role": "user", "content": "What is 17 * 23?"}]
whole = client.chat.completions.create(model="openai/gpt-4o-mini", messages=message)
stream = client.chat.completions.create(model="openai/gpt-4o-mini", messages=message, stream=True)
chunks = list(stream)
tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
offer = {"model": "anthropic/claude-sonnet-4.5", "tools": [tool]}
called = client.chat.completions.create(messages=message, tool_choice="required", **offer)
asked = called.choices[0].message
result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "low"}
answered = client.chat.completions.create(messages=[*message, asked, result], **offer)
collect = getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream
with collect(messages=message, tool_choice="required", **offer) as stream:
    final = stream.get_final_completion()
schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
shaped = client.chat.completions.create(model="openai/gpt-4o-mini", messages=message, response_format=form)
vectors = client.embeddings.create(model="openai/text-embedding-3-small", input=["tide", "sea"]).data
prompted = client.completions.create(model="openai/gpt-4o-mini", prompt="What is 17 * 23?")
typed = client.completions.create(model="openai/gpt-4o-mini", prompt="What is 17 * 23?", stream=True)
try:
    client.chat.completions.create(model="no/such", messages=message)
except openai.BadRequestError as exc:
    refused = exc.body["message"]
models = [model.id for model in client.models.list()]
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "usage": whole.usage.total_tokens,
    "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    "finish": [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1],
    "stream_usage": chunks[-1].usage.total_tokens,
    "called": called.choices[0].message.tool_calls[0].function.name,
    "answered": answered.choices[0].message.content,
    "collected": final.choices[0].message.tool_calls[0].function.name,
    "shaped": list(json.loads(shaped.choices[0].message.content)),
    "embedded": [len(row.embedding) for row in vectors],
    "prompted": prompted.choices[0].text,
    "typed": "".join(chunk.choices[0].text for chunk in typed),
    "label": client.get("/key", cast_to=object)["data"]["label"],
    "credits": client.get("/credits", cast_to=object)["data"]["total_credits"],
    "refused": refused,
    "models": len(models),
}))
"""


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="the openai package is not installed")
async def test_the_openai_sdk_is_served() -> None:
    """Its sync client, in a process of its own: chats, streams, rounds of tools, embeddings, an error, the account."""
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, Simulator())
        finished = await trio.run_process(
            [sys.executable, "-c", OPENAI_PROGRAM, base_url], capture_stdout=True, capture_stderr=True, check=False
        )
        nursery.cancel_scope.cancel()
    assert finished.returncode == 0, finished.stderr.decode()
    told = json.loads(finished.stdout)
    assert told.pop("models") >= 60
    assert told.pop("usage") == told.pop("stream_usage") > 0
    assert told == {
        "whole": "17 * 23 = 391\n#### 391",
        "streamed": "17 * 23 = 391\n#### 391",
        "finish": "stop",
        "called": "tide",
        "answered": "According to tide: low",
        "collected": "tide",
        "shaped": ["n"],
        "embedded": [256, 256],
        "prompted": "17 * 23 = 391\n#### 391",
        "typed": "17 * 23 = 391\n#### 391",
        "label": "sk-or-v1-tes...est",
        "credits": 10_000,
        "refused": "no/such is not a valid model ID",
    }
