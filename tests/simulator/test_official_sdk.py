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
with OpenRouter(api_key="sk-or-v1-0123456789abcdef", server_url=sys.argv[1], timeout_ms=20_000) as client:
    whole = client.chat.send(model="openai/gpt-4o-mini", messages=message, stream=False)
    with client.chat.send(model="openai/gpt-4o-mini", messages=message, stream=True) as stream:
        chunks = list(stream)
    called = client.chat.send(
        model="anthropic/claude-sonnet-4.5", messages=message, tools=[tool], tool_choice="required", stream=False
    )
    try:
        client.chat.send(model="no/such", messages=message, stream=False)
        refused = None
    except errors.OpenRouterError as exc:
        refused = exc.status_code
    models = client.models.list()
    key = client.api_keys.get_current_key_metadata()
    credit = client.credits.get_credits()
choices = [choice for chunk in chunks for choice in chunk.choices]
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "streamed": "".join(choice.delta.content or "" for choice in choices),
    "usage": [whole.usage.total_tokens, chunks[-1].usage.total_tokens],
    "called": called.choices[0].message.tool_calls[0].function.name,
    "refused": refused,
    "models": MODELS,
    "label": key.data.label,
    "credits": credit.data.total_credits,
}))
"""


async def test_the_official_sdk_is_served() -> None:
    """A chat, a stream, a tool call, an error, the models, the key and the credits."""
    simulator = Simulator()
    program = PROGRAM.replace("MODELS", "len(getattr(models, 'data', None) or models.result.data)")
    async with trio.open_nursery() as nursery:
        base_url: str = await nursery.start(serve_simulator, simulator)
        finished = await trio.run_process(
            [sys.executable, "-c", program, base_url], capture_stdout=True, capture_stderr=True, check=False
        )
        nursery.cancel_scope.cancel()
    assert finished.returncode == 0, finished.stderr.decode()
    told = json.loads(finished.stdout)
    whole, streamed = told.pop("usage")
    assert whole == streamed > 0
    assert told == {
        "whole": "17 * 23 = 391\n#### 391",
        "streamed": "17 * 23 = 391\n#### 391",
        "called": "tide",
        "refused": 400,
        "models": len(simulator.config.models),
        "label": "sk-or-v1-012...def",
        "credits": 10_000,
    }
    assert simulator.statistics().processed == 3
