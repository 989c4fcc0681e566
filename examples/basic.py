# ruff: noqa: T201 - an example prints
"""One question, one answer, and what to do when there is none.

python examples/basic.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client

import gorouter_trio as gr


async def main() -> None:
    """Ask twice: once well, once wrongly."""
    async with open_example_client() as client:
        reply = await client.chat(
            [gr.SystemMessage("You are a brief and friendly guide."), gr.UserMessage("What is a tide table?")],
            temperature=0.2,
            max_completion_tokens=120,
        )
        print(reply.text)
        print(f"{reply.model} said {reply.finish_reason!r} after {reply.duration_s:.2f} s, cost ${reply.cost}")

        # One deadline for everything: queueing, retries, the reply. It is trio's, so it composes.
        with trio.move_on_after(30) as scope:
            try:
                await client.chat("Hello!", model="nobody/no-such-model")
            except gr.RateLimitError as exc:
                print("come back in", exc.retry_after_s, "s")
            except gr.ApiError as exc:
                print(f"refused with {exc.status}: {exc.message} ({type(exc).__name__})")
            except gr.TransportError as exc:
                print("no answer:", exc, "- maybe billed" if exc.maybe_billed else "- not billed")
        if scope.cancelled_caught:
            print("that took too long")


if __name__ == "__main__":
    trio.run(main)
