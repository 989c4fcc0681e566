# ruff: noqa: T201 - an example prints
"""GoRouter Kit, the program `plugins`: a middleware, a hook, events, and tools for every chat.

python examples/kit_plugins.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client, staged

import gorouter_trio as gr
from gorouter_trio.plugins import MetricsPlugin, ToolRegistryPlugin


@gr.tool
async def clock() -> str:
    """What time it is."""
    return "12:00"


async def polite(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
    """A middleware sees the request and the answer, and may change both."""
    state.options["temperature"] = 0.2
    await proceed()
    print(f"chat {context.chat_id} of {context.model} ended")


def refuse_secrets(context: gr.ChatContext, state: gr.ChatState) -> None:
    """A hook that refuses a chat by raising."""
    if "secret" in str(state.messages[-1]["content"]):
        raise gr.BadRequestError("no secrets, please", status=400)


class Announcer:
    """A plugin: begun with the client, ended with it; what it registers goes with it."""

    name = "announcer"

    async def init(self, client: gr.Client) -> None:
        """Called when it is registered."""
        client.use(polite)
        client.add_hook(gr.Hook(before=refuse_secrets, name="secrets"))
        client.on(gr.ChatFailed, lambda event: print(f"event: {type(event.error).__name__}"))

    async def destroy(self) -> None:
        """Called when the client closes."""
        print("announcer ends")


async def main() -> None:
    """Three plugins, one of them of our own."""
    metrics = MetricsPlugin()
    async with open_example_client(plugins=[Announcer(), metrics, ToolRegistryPlugin([clock])]) as client:
        reply = await client.chat("What time is it?" + staged("[[call clock {}]]"))
        print(f"tools: {[call.name for call in reply.tool_calls]}")
        try:
            await client.chat("Tell me a secret.")
        except gr.BadRequestError as exc:
            print(f"refused: {exc.message}")
    seen = metrics.snapshot()
    print(f"requests={seen.requests} failed={seen.failed} tools={seen.tool_calls}")


if __name__ == "__main__":
    trio.run(main)
