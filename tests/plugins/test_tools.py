"""The tool registry: tools for every chat, from a list or a function, beside or in place of the chat's own."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from worlds import Handler, completion, open_world, replies, there

import gorouter_trio as gr
from gorouter_trio.plugins import ToolRegistryPlugin
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tools.md").read_text("utf-8")
ADA = "ada-has-a-long-key-1"
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
@pytest.mark.parametrize("made_of", ["list", "registry"])
async def test_modes(made_of, where, mode, given, offered, result, autojump_clock):
    """What the model is offered, and whose tool runs, on every path; of a `gr.ToolRegistry` as of a list."""
    tools = [ours, our_same]
    plugin = ToolRegistryPlugin(tools, mode=mode)
    if made_of == "registry":
        plugin = ToolRegistryPlugin(gr.ToolRegistry(tools, mode=mode))
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


@pytest.mark.parametrize("mode", ["override", "merge", "if_empty"])
async def test_no_tools_for_a_chat_without(mode, autojump_clock):
    """Where neither the chat nor the plugin has any, the request speaks of none."""
    plugin = ToolRegistryPlugin(lambda _context, _state: [], mode=mode)
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        await world.client.chat("1")
    assert "tools" not in world.sent[0].body


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
        (ours, "merge", "list of tools"),
        (list, "merge", "function of"),
    ],
)
def test_bad_registries(tools, mode, problem):
    """Each is refused, and named."""
    with pytest.raises(gr.ConfigError, match=problem):
        ToolRegistryPlugin(tools, mode=mode)


@gr.tool
async def weather() -> str:
    """Tells the weather."""
    return "rain"


@gr.tool
async def clock() -> str:
    """Tells the time."""
    return "noon"


def called(name: str) -> bytes:
    return completion("", tool_calls=[("1", name)])


async def test_the_snippet_of_the_docs(autojump_clock):
    """The registry of docs/tools.md gives its tools to a chat, and more of them to a session; the model calls them."""
    snippet = there(re.search(r"```python\n(.*?)```", PAGE.partition("## Registries")[2], re.DOTALL)).group(1)
    snippet += "    timely = await client.session('s').ask('When?')\n    return reply, timely\n"
    async with open_world(answer=replies(called("weather"), YES, called("clock"), YES)) as world:
        door = SimpleNamespace(**{**vars(gr), "open_client": world.another_client})
        space: dict[str, Any] = {"gr": door, "weather": weather, "clock": clock}
        exec(compile(f"async def run():\n{textwrap.indent(snippet, '    ')}", "docs/tools.md", "exec"), space)
        reply, timely = await space["run"]()
    assert [names(sent) for sent in world.sent] == [["weather"]] * 2 + [["weather", "clock"]] * 2
    assert [call.text for each in (reply, timely) for call in each.tool_calls] == ["rain", "noon"]


async def test_a_registry_is_told_who_asks(autojump_clock):
    """Its function gets the principal, the session, and the tools that the turn brings."""
    asked: list[gr.ToolQuery] = []

    async def provide(query: gr.ToolQuery) -> list[gr.Tool[..., Any]]:
        asked.append(query)
        return []

    auth = ApiKeyAuth(api_keys={ADA: Principal(id="ada", tenant="t1")})
    fields: dict[str, Any] = {"security": SecurityConfig(default_policy="allow-all", auth=auth)}
    plugin = ToolRegistryPlugin(gr.ToolRegistry(provide))
    async with open_world(answer=replies(YES), plugins=[plugin], **fields) as world:
        await world.client.chat("1", tools=[ours])
        await world.client.session("s", access_token=ADA).ask("2")
    assert [list(query.own) for query in asked] == [[ours], []]
    assert (asked[0].principal, asked[0].session) == (None, None)
    assert there(asked[1].principal).id == "ada"
    assert there(asked[1].session).endswith("s")
    assert [names(sent) for sent in world.sent] == [["ours"], []]


async def test_no_tools_in_the_place_of_all(autojump_clock):
    """Where none are left, the request says nothing of tools: providers refuse a choice among none."""
    plugin = ToolRegistryPlugin([], mode="override")
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        await world.client.chat("1", tools=[ours], tool_choice="auto", parallel_tool_calls=False, temperature=1)
        await world.client.session("s", tools=[ours]).ask("2", tool_choice="required")
    assert [set(sent.body) & {"tools", "tool_choice", "parallel_tool_calls"} for sent in world.sent] == [set(), set()]
    assert world.sent[0].body["temperature"] == 1


async def test_a_registry_that_gives_no_tools(autojump_clock):
    """What is no tool refuses the chat, as with any other provider."""
    plugin = ToolRegistryPlugin(gr.ToolRegistry(lambda _query: "ours"))  # type: ignore[arg-type, return-value]  # on purpose
    async with open_world(answer=replies(YES), plugins=[plugin]) as world:
        with pytest.raises(gr.ExtensionError, match="list of tools"):
            await world.client.chat("1")


def test_the_mode_of_a_registry():
    """It has one already: another one for the plugin is a contradiction."""
    ToolRegistryPlugin(gr.ToolRegistry([ours], mode="override"), mode="override")
    with pytest.raises(gr.ConfigError, match="is override, and cannot be merge"):
        ToolRegistryPlugin(gr.ToolRegistry([ours], mode="override"), mode="merge")
