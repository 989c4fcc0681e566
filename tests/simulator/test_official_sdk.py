"""OpenRouter's own SDK as a client of the simulator: over real sockets, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import trio

from gorouter_trio.simulator import Simulator, serve_simulator

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(
        importlib.util.find_spec("openrouter") is None, reason="the openrouter package is not installed"
    ),
]

PROGRAM = """
import json, sys
from openrouter import OpenRouter, errors

tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
message = [{"role": "user", "content": "What is 17 * 23?"}]
mini, sonnet = "openai/gpt-4o-mini", "anthropic/claude-sonnet-4.5"
offer = {"model": sonnet, "tools": [tool]}

def streamed(client, **fields):
    with client.chat.send(messages=message, stream=True, **fields) as stream:
        return [(chunk, choice.delta) for chunk in stream for choice in chunk.choices]

with OpenRouter(api_key="sk-or-v1-0123456789abcdef", server_url=sys.argv[1], timeout_ms=20_000) as client:
    whole = client.chat.send(model=mini, messages=message, stream=False)
    pieces = streamed(client, model=mini)
    asked = client.chat.send(messages=message, tool_choice="required", stream=False, **offer).choices[0].message
    result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "low"}
    answered = client.chat.send(messages=[*message, asked, result], stream=False, **offer)
    calls = [delta.tool_calls[0] for _, delta in streamed(client, tool_choice="required", **offer) if delta.tool_calls]
    rich = {"model": mini, "logprobs": True, "top_logprobs": 2, "plugins": [{"id": "web"}], "modalities": ["image"]}
    images = client.chat.send(messages=message, stream=False, **rich).choices[0].message.images
    logged = [chunk for chunk, _ in streamed(client, **rich) if getattr(chunk.choices[0], "logprobs", None)]
    try:
        client.chat.send(model="no/such", messages=message, stream=False)
        refused = None
    except errors.OpenRouterError as exc:
        refused = exc.status_code
    pages, page = 0, client.models.list(sort="newest", limit=30)
    while page is not None and page.result.data:
        pages, page = pages + len(page.result.data), page.next()
    vectors = client.embeddings.generate(input=["tide", "tide"], model="openai/text-embedding-3-small").data
    told = {
        "whole": whole.choices[0].message.content,
        "streamed": "".join(delta.content or "" for _, delta in pieces),
        "usage": [whole.usage.total_tokens, pieces[-1][0].usage.total_tokens],
        "called": [asked.tool_calls[0].function.name, calls[0].function.name],
        "answered": answered.choices[0].message.content,
        "images": len(images),
        "logged": len(logged) > 3,
        "refused": refused,
        "models": pages,
        "count": client.models.count().data.count,
        "model": client.models.get(author="openai", slug="gpt-4o-mini").data.name,
        "endpoints": len(client.endpoints.list(author="openai", slug="gpt-4o-mini").data.endpoints),
        "zdr": len(client.endpoints.list_zdr_endpoints().data) > 0,
        "providers": len(client.providers.list().data) > 5,
        "embedded": vectors[0].embedding == vectors[1].embedding,
        "generation": client.generations.get_generation(id=whole.id).data.total_cost == whole.usage.cost,
        "label": client.api_keys.get_current_key_metadata().data.label,
        "credits": client.credits.get_credits().data.total_credits,
    }
print(json.dumps(told))
"""


async def test_the_official_sdk_is_served() -> None:
    """Chats, streams, rounds of tools, an error, every service endpoint: its strict models take all of it."""
    simulator = Simulator()
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        finished = await trio.run_process(
            [sys.executable, "-c", PROGRAM, base_url], capture_stdout=True, capture_stderr=True, check=False
        )
        nursery.cancel_scope.cancel()
    assert finished.returncode == 0, finished.stderr.decode()
    told = json.loads(finished.stdout)
    whole, streamed = told.pop("usage")
    assert whole == streamed > 0
    assert told == {
        "whole": "17 * 23 = 391\n#### 391",
        "streamed": "17 * 23 = 391\n#### 391",
        "called": ["tide", "tide"],
        "answered": "According to tide: low",
        "images": 1,
        "logged": True,
        "refused": 400,
        "models": len(simulator.config.models),
        "count": len(simulator.config.models),
        "model": "OpenAI: GPT-4o-mini",
        "endpoints": 1,
        "zdr": True,
        "providers": True,
        "embedded": True,
        "generation": True,
        "label": "sk-or-v1-012...def",
        "credits": 10_000,
    }
    assert simulator.statistics().processed == 8
