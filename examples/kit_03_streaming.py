# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 3: an answer with callbacks while it is written.

python examples/kit_03_streaming.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client


async def main() -> None:
    """`stream.run` takes a callback for each kind of event; iterating, and `stream.text`, do without."""
    async with open_example_client() as client, client.stream("Stream a short answer.") as stream:
        result = await stream.run(on_content=lambda part: print(part, end="", flush=True))
    print(f"\nmodel={result.model} finish={result.finish_reason} duration_ms={result.duration_s * 1000:.0f}")


if __name__ == "__main__":
    trio.run(main)
