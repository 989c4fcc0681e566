# ruff: noqa: T201 - an example prints
"""Conversations: each is an actor that takes its turns one after the other; different ones run at the same time.

python examples/sessions.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client, staged

import gorouter_trio as gr


async def talk(client: gr.Client, name: str) -> None:
    """One user's conversation. Whoever uses the same key, from whatever task, talks in the same conversation."""
    session = client.session(f"user:{name}", system="You are concise.")
    await session.ask(f"My name is {name}.")
    reply = await session.ask("What is my name?")
    print(f"{name}: {reply.text}")


async def main() -> None:
    """Two users at once; then one who interrupts, and one history with two ends."""
    async with open_example_client() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, client, "Ada")
            nursery.start_soon(talk, client, "Grace")

        session = client.session("user:Ada", system="You are concise.")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupt_soon, session)
            try:
                prompt = "Recite all you know about harbours." + staged("[[tokens 5000]]")
                async with session.stream(prompt) as stream:
                    await stream.collect()
            except gr.TurnInterruptedError as exc:
                print(f"interrupted after {len(exc.partial.text.split())} words, which the history keeps")

        other = await session.fork("user:Ada/b")
        await other.ask("In this branch we talk about tides.")
        for key, ref in (("user:Ada", session), ("user:Ada/b", other)):
            history = await ref.history()
            print(f"{key}: {len(history)} messages, the last from the {type(history[-1].message).__name__}")


async def interrupt_soon(session: gr.SessionRef) -> None:
    """Stop the running turn after a moment, as a user who types again does."""
    await trio.sleep(0.3)
    await session.interrupt()


if __name__ == "__main__":
    trio.run(main)
