# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 11: who may call which tool.

python examples/kit_11_security.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client, staged

import gorouter_trio as gr
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig, ToolPolicy

TOKEN = "demo-token-of-the-example"  # noqa: S105 - of a simulated user


@gr.tool(name="sum")
async def add(a: float, b: float) -> float:
    """Adds two numbers."""
    return a + b


async def main() -> None:
    """Nothing is allowed but what the configuration says; a turn needs a token, and a tool its scopes."""
    user = Principal(id="u-1", roles={"user"}, scopes={"tools:run"})
    config = SecurityConfig(
        default_policy="deny-all",
        require_authentication=True,
        auth=ApiKeyAuth(api_keys={TOKEN: user}),
        tools={"sum": ToolPolicy(allow=True, scopes={"tools:run"})},
    )
    prompt = "Use tool sum for 7 and 5." + staged('[[call sum {"a": 7, "b": 5}]]')
    async with open_example_client() as client:
        client.set_security(config)
        reply = await client.chat(prompt, tools=[add], access_token=TOKEN)
        print("with the token:", *(call.status for call in reply.tool_calls))
        try:
            await client.chat(prompt, tools=[add])
        except gr.AuthenticationRequiredError as exc:
            print(f"without: {type(exc).__name__}")


if __name__ == "__main__":
    trio.run(main)
