"""Registries: tools that are added to turns from one place, a fixed list or one that is made for each turn.

A client takes one in a plugin, `plugins.ToolRegistryPlugin`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal, TypeAlias, cast

from msgspec import Struct

from .._callables import can_take
from ..errors import ConfigError
from ..security.rules import Principal
from .registry import Tool, ToolSet, ToolSource

__all__ = ["RegistryMode", "ToolProvider", "ToolQuery", "ToolRegistry"]

RegistryMode = Literal["override", "merge", "if_empty"]
"""What a registry does with a turn's own tools: take their place, add to them those whose names are free, or stand in
for them where there are none."""

_MODES = ("override", "merge", "if_empty")


class ToolQuery(Struct, frozen=True, kw_only=True):
    """Whom tools are wanted for: `own` are the tools that the turn has already.

    `principal` is who asks, None for nobody, `session` the key of the session whose turn it is, None for a chat.
    """

    own: ToolSet
    principal: Principal | None = None
    session: str | None = None


ToolProvider: TypeAlias = Callable[[ToolQuery], Iterable[ToolSource] | Awaitable[Iterable[ToolSource]]]
"""Gives the tools of a turn, at once or after a wait."""


class ToolRegistry:
    """Tools for turns: `tools` is a fixed list, or a function that is asked before each turn.

    `plugins.ToolRegistryPlugin(registry)` gives them to every chat, stream and session turn of a client. A function
    that gives the very same tools again costs nothing but its own time. Raises `ConfigError` for tools that are none,
    when this is made, or for those of a function, when they come.
    """

    def __init__(self, tools: Iterable[ToolSource] | ToolProvider, *, mode: RegistryMode = "merge") -> None:
        if mode not in _MODES:
            raise ConfigError(f"tool registry: mode must be one of {', '.join(_MODES)}, not {mode!r}")
        self.mode: RegistryMode = mode
        is_function = callable(tools) and not isinstance(tools, Tool)
        if is_function and not can_take(tools, 1):
            raise ConfigError(f"tool registry: a provider of tools must be a function of (query), not {tools!r}")
        self._provide = cast("ToolProvider", tools) if is_function else None
        self._last: tuple[ToolSource, ...] = () if is_function else _listed(tools)
        self._set = ToolSet(self._last)

    async def tools_for(self, query: ToolQuery) -> ToolSet:
        """The tools of one turn. Raises what the function raises; cancelling cancels it."""
        if self.mode == "if_empty" and len(query.own):
            return query.own
        provided = self._set if self._provide is None else await self._ask(query)
        if self.mode == "override" or not len(query.own):
            return provided
        return query.own.merged(provided) if len(provided) else query.own

    async def _ask(self, query: ToolQuery) -> ToolSet:
        found = cast("ToolProvider", self._provide)(query)
        tools = await found if inspect.isawaitable(found) else found
        if isinstance(tools, ToolSet):
            return tools
        wanted = _listed(tools)
        if len(wanted) != len(self._last) or any(a is not b for a, b in zip(wanted, self._last, strict=True)):
            self._last, self._set = wanted, ToolSet(wanted)
        return self._set


def _listed(tools: object) -> tuple[ToolSource, ...]:
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Iterable):
        raise ConfigError(f"tool registry: tools must be a list of tools, or a function for one, not {tools!r}")
    return tuple(cast("Iterable[ToolSource]", tools))
