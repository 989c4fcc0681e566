# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 6: a tool, and the report on its calls.

python examples/kit_06_tools.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client, staged

import gorouter_trio as gr


@gr.tool(name="sum")
async def add(a: float, b: float) -> dict[str, float]:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return {"value": a + b}


async def main() -> None:
    """The schema comes from the signature; arguments are checked before the function is called."""
    async with open_example_client() as client:
        reply = await client.chat(
            "Use tool sum for 7 and 5, then answer." + staged('[[call sum {"a": 7, "b": 5}]]'),
            tools=[add],
            tool_limits=gr.ToolLimits(include_results=True),
        )
        for call in reply.tool_calls:
            print(
                f"tool={call.name} status={call.status} result={call.result} duration_ms={call.duration_s * 1000:.0f}"
            )
        print(reply.text)


if __name__ == "__main__":
    trio.run(main)
