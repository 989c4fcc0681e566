# ruff: noqa: T201 - an example prints
# ruff: noqa: TID251 - it is about asyncio
"""A program on asyncio: time limits, many calls at once, a stream, and a session with a tool that runs on the loop.

python examples/asyncio_app.py --simulate
"""

from __future__ import annotations

import asyncio

from _client import front_settings, staged

import gorouter_trio as gr


async def first_answers(client: gr.aio.Client) -> None:
    """Four questions at once, one of which does not get the time that it needs."""
    questions = [
        "Why are tides?",
        "What is a sextant?",
        "Who was Ada?",
        "Tell all you know." + staged("[[tokens 900]]"),
    ]

    async def ask(question: str) -> str | None:
        try:
            # asyncio's own time limits cancel what runs in the client at once; `deadline_s` raises a typed error.
            async with asyncio.timeout(20):
                return (await client.chat(question, max_tokens=1_000, deadline_s=1.0)).text
        except gr.DeadlineExceededError:
            return None

    answers = await asyncio.gather(*map(ask, questions))
    print(sum(answer is not None for answer in answers), "of", len(answers), "in time")


async def stream(client: gr.aio.Client) -> None:
    """Text as it arrives. A reader that stops stops the server; leaving the block closes the connection."""
    pieces = 0
    async with client.stream("Tell a short story." + staged("[[tokens 60]]")) as answer:
        async for text in answer.text:
            print(text, end="", flush=True)
            pieces += 1
    print(f"\n-- {pieces} pieces")


async def converse(client: gr.aio.Client) -> None:
    """A session, with a tool that is a coroutine function of this program."""
    loop = asyncio.get_running_loop()

    @gr.tool
    async def look_up(name: str) -> str:
        """Look a person up."""
        await asyncio.sleep(0.01)  # whatever asyncio library it takes
        return f"{name} is known; the loop went on: {asyncio.get_running_loop() is loop}"

    session = client.session("user:ada", system="Be brief.", tools=[look_up])
    reply = await session.ask("Who is Ada?" + staged('[[call look_up {"name": "Ada"}]]'))
    print(*(call.text for call in reply.tool_calls))
    await session.ask("Thank you.")
    history = [entry for entry in await session.history() if not isinstance(entry.message, gr.ToolMessage)]
    spoken = [entry for entry in history if entry.message.content]
    print(f"{len(spoken)} messages kept; ${client.cost_snapshot().cost_usd}")


async def main() -> None:
    """One client for the whole program."""
    async with gr.aio.open_client(**front_settings()) as client:
        await first_answers(client)
        await stream(client)
        await converse(client)


if __name__ == "__main__":
    asyncio.run(main())
