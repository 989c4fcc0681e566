# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 2: `Ask`, with a session key made from user and group.

python examples/kit_02_ask.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client

import gorouter_trio as gr


async def main() -> None:
    """Different users and groups never share a session, whatever is in their names."""
    async with open_example_client() as client:
        reply = await client.ask(
            "Explain what retry with exponential backoff means.",
            user="u-42",
            group="team-a",
            system="You are concise.",
            model="openai/gpt-4o-mini",
        )
        print(reply.text)
        key = gr.session_key("u-42", group="team-a")
        history = await client.session(key, system="You are concise.").history()
        print(f"{key}: {len(history)} messages")


if __name__ == "__main__":
    trio.run(main)
