# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 1: a chat in a session. There, a request names a session; here a session is asked.

python examples/kit_01_basic_chat.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client


async def main() -> None:
    """One turn; its history is kept under the session's key."""
    async with open_example_client() as client:
        reply = await client.session("demo").ask("Summarize this in one sentence.")
        print(reply.text)
        # The same in one call, as the kit has it:
        again = await client.chat("And in three words?", session="demo")
        print(f"{len(await client.session('demo').history())} messages; the last from {again.model}")


if __name__ == "__main__":
    trio.run(main)
