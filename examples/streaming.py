# ruff: noqa: T201 - an example prints
"""An answer while it is written: as text, as events, and left before its end.

python examples/streaming.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client

import gorouter_trio as gr


async def main() -> None:
    """Three ways to read a stream."""
    async with open_example_client() as client:
        async with client.stream("Tell me about lighthouses, in one paragraph.") as stream:
            async for text in stream.text:
                print(text, end="", flush=True)
        print(
            f"\n-- {stream.result.usage.completion_tokens} tokens, first one after {stream.result.call.ttft_s:.2f} s\n"
        )

        pieces = 0
        async with client.stream("And about the people who keep them?") as stream:
            async for event in stream:
                match event:
                    case gr.TextDelta():
                        pieces += 1
                    case gr.ReasoningDelta(text=text):
                        print(f"(thinking: {text})")
                    case gr.ToolCallDelta(name=name):
                        print(f"(calling {name})")
        print(f"-- {pieces} pieces, then {stream.result.finish_reason!r}\n")

        # Leaving early closes the connection, which stops the billing where the provider can be stopped.
        async with client.stream("Now write a very long story about one of them.") as stream:
            beginning = ""
            async for text in stream.text:
                beginning += text
                if len(beginning) > 60:
                    break
        print(f"-- left after {beginning!r}")


if __name__ == "__main__":
    trio.run(main)
