# ruff: noqa: T201 - an example prints
"""GoRouter Kit, the program `basic`: a chat, and what to do when there is none.

python examples/kit_basic.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client

import gorouter_trio as gr


async def main() -> None:
    """Errors say what they are by their class, and carry what the API said."""
    async with open_example_client() as client:
        reply = await client.chat([gr.UserMessage("Reply in one short sentence.")])
        print(reply.text)
        try:
            await client.chat([])
        except gr.BadRequestError as exc:
            print(f"bad request: {exc.message}")
        try:
            await client.chat("Hello!", model="nobody/no-such-model")
        except gr.ApiError as exc:
            print(f"api error: status={exc.status} message={exc.message}")


if __name__ == "__main__":
    trio.run(main)
