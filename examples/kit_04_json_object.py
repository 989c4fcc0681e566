# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 4: any JSON object.

python examples/kit_04_json_object.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client


async def main() -> None:
    """`response_type=dict` asks for an object, decodes it, and asks again where the answer is none."""
    async with open_example_client() as client:
        reply = await client.chat("Return JSON with fields title and score.", response_type=dict)
        print(type(reply.value).__name__, reply.value)


if __name__ == "__main__":
    trio.run(main)
