"""Registries: fixed and made for each turn, in each mode."""

from __future__ import annotations

from typing import Any

import pytest
import trio

import gorouter_trio as gr
from gorouter_trio.security.rules import Principal
from gorouter_trio.tools.sources import ToolQuery, ToolRegistry

A = gr.Tool(lambda: "a", name="a")
B = gr.Tool(lambda: "b", name="b")
OTHER_A = gr.Tool(lambda: "other", name="a", aliases=["c"])
NONE = gr.ToolSet()
OWN = gr.ToolSet([A])


@pytest.mark.parametrize(
    ("mode", "own", "names"),
    [
        ("override", NONE, ["a", "b"]),
        ("override", OWN, ["a", "b"]),
        ("merge", NONE, ["a", "b"]),
        ("merge", OWN, ["a", "b"]),
        ("if_empty", NONE, ["a", "b"]),
        ("if_empty", OWN, ["a"]),
    ],
)
async def test_modes(mode: Any, own: gr.ToolSet, names: list[str]) -> None:
    """A registry takes the place of a turn's tools, adds to them, or stands in for none; the turn's own win."""
    registry = ToolRegistry([OTHER_A, B], mode=mode)
    found = await registry.tools_for(ToolQuery(own=own))
    assert list(found._definitions) == names
    expected = A if len(own) and mode != "override" else OTHER_A
    assert found.find("a") is expected


async def test_provider() -> None:
    """A function is asked for each turn, told for whom, and may wait; the same tools are not made into a set again."""
    asked: list[ToolQuery] = []

    async def provide(query: ToolQuery) -> list[Any]:
        asked.append(query)
        await trio.lowlevel.checkpoint()
        return [A, B] if query.principal is not None else [A]

    registry = ToolRegistry(provide)
    ada = Principal(id="ada")
    first = await registry.tools_for(ToolQuery(own=NONE, principal=ada, session="s"))
    again = await registry.tools_for(ToolQuery(own=NONE, principal=ada))
    nobody = await registry.tools_for(ToolQuery(own=NONE))
    assert (list(first._definitions), list(nobody._definitions)) == (["a", "b"], ["a"])
    assert again.find("b") is B
    assert (asked[0].principal, asked[0].session) == (ada, "s")
    whole = ToolRegistry(lambda _query: OWN, mode="override")
    assert await whole.tools_for(ToolQuery(own=NONE)) is OWN


async def test_bad_registries() -> None:
    """Mistakes are errors: at once for a list, when they come for a function."""
    with pytest.raises(gr.ConfigError, match="mode must be one of"):
        ToolRegistry([A], mode="replace")  # type: ignore[arg-type]  # the point
    with pytest.raises(gr.ConfigError, match="is there twice"):
        ToolRegistry([A, OTHER_A])
    for no_tools in (A, "ab", 5, None, lambda a, b: [a, b]):
        with pytest.raises(gr.ConfigError, match=r"tool registry: (tools must be a list|a provider of)"):
            ToolRegistry(no_tools)  # type: ignore[arg-type]  # the point
    with pytest.raises(gr.ConfigError, match="is not a tool"):
        await ToolRegistry(lambda _query: [3]).tools_for(ToolQuery(own=NONE))  # type: ignore[list-item]  # the point
    with pytest.raises(ZeroDivisionError):
        await ToolRegistry(lambda _query: [1 / 0]).tools_for(ToolQuery(own=NONE))  # type: ignore[list-item]  # the point
