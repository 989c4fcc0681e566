"""The tool registry: tools for every chat, from a list or a function, beside or in place of the chat's own."""

from __future__ import annotations

import pytest
from worlds import Handler, completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import ToolRegistryPlugin

YES = completion("Yes.")


def calling(name: str) -> Handler:
    return replies(completion("", tool_calls=[("1", name)]), YES)


@gr.tool
async def ours() -> str:
    """One of the registry's."""
    return "ours"


@gr.tool(name="same")
async def our_same() -> str:
    """One whose name the chat has as well."""
    return "ours"


@gr.tool(name="same")
async def their_same() -> str:
    """One of the chat."""
    return "theirs"


def names(sent) -> list[str]:
    return [tool["function"]["name"] for tool in sent.body.get("tools", [])]


@pytest.mark.parametrize(
    ("mode", "given", "offered", "result"),
    [
        ("merge", [their_same], ["same", "ours"], '"theirs"'),
        ("merge", [], ["ours", "same"], '"ours"'),
        ("override", [their_same], ["ours", "same"], '"ours"'),
        ("if_empty", [their_same], ["same"], '"theirs"'),
        ("if_empty", [], ["ours", "same"], '"ours"'),
    ],
)
@pytest.mark.parametrize("where", ["chat", "session", "stream"])
async def test_modes(where, mode, given, offered, result, autojump_clock):
    """What the model is offered, and whose tool runs, on every path."""
    plugin = ToolRegistryPlugin([ours, our_same], mode=mode)
    fields = {"tools": given} if given else {}
    if where == "stream":
        async with (
            open_world(plugins=[plugin]) as world,
            world.client.stream("Well? [[call same {}]]", **fields) as stream,
        ):
            reply = await stream.collect()
    else:
        async with open_world(answer=calling("same"), plugins=[plugin]) as world:
            front = world.client.chat if where == "chat" else world.client.session("s", **fields).ask
            reply = await (front("Well?", **fields) if where == "chat" else front("Well?"))
    assert names(world.sent[0]) == offered
    assert [call.text for call in reply.tool_calls] == [result.strip('"')]


async def test_definitions_of_the_caller(autojump_clock):
    """Tools that the caller runs count as tools of the chat, and stay the caller's."""
    theirs = {"type": "function", "function": {"name": "mine", "parameters": {"type": "object"}}}
    async with open_world(answer=calling("mine"), plugins=[ToolRegistryPlugin([ours])]) as world:
        reply = await world.client.chat("Well?", tools=[theirs])
    assert names(world.sent[0]) == ["mine", "ours"]
    assert reply.finish_reason == "tool_calls"
    async with open_world(answer=replies(YES), plugins=[ToolRegistryPlugin([ours], mode="if_empty")]) as world:
        await world.client.chat("Well?", tools=[theirs])
    assert names(world.sent[0]) == ["mine"]


async def test_a_provider(autojump_clock):
    """A function is asked each time, and may wait; what it raises refuses the chat, and so does what is no list."""
    given: list[object] = [[ours], [], ValueError("none today"), "ours", [5]]

    async def provide(context: gr.ChatContext, state: gr.ChatState) -> object:
        now = given.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    async with open_world(answer=replies(YES), plugins=[ToolRegistryPlugin(provide)]) as world:  # type: ignore[arg-type]  # on purpose
        await world.client.chat("1")
        await world.client.chat("2")
        for problem in ("none today", "must be a list of tools", "tool"):
            with pytest.raises(gr.ExtensionError, match=problem):
                await world.client.chat("3")
    assert [names(sent) for sent in world.sent] == [["ours"], []]


async def test_it_goes_with_its_tools(autojump_clock):
    """After the plugin has ended, chats have their own tools only."""
    async with open_world(answer=replies(YES)) as world:
        name = await world.client.register(ToolRegistryPlugin([ours]))
        await world.client.chat("1")
        await world.client.unregister(name)
        await world.client.chat("2")
    assert [names(sent) for sent in world.sent] == [["ours"], []]


@pytest.mark.parametrize(
    ("tools", "mode", "problem"),
    [
        ([ours], "sometimes", "mode"),
        ([ours, ours], "merge", "twice"),
        ([5], "merge", "tool"),
        ("ours", "merge", "list of tools"),
        (5, "merge", "list of tools"),
        (list, "merge", "function of"),
    ],
)
def test_bad_registries(tools, mode, problem):
    """Each is refused, and named."""
    with pytest.raises(gr.ConfigError, match=problem):
        ToolRegistryPlugin(tools, mode=mode)
