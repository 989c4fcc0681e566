"""Tools for every chat, from a list or from a function that is asked each time."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

from .._callables import can_take
from .._turns.chain import ChatState, Hook
from ..errors import ConfigError, ExtensionError
from ..runtime_events import ChatContext
from ..tools.registry import Tool, ToolSet, ToolSource
from ..tools.sources import ToolQuery, ToolRegistry

if TYPE_CHECKING:
    from ..client import Client

__all__ = ["ToolProvider", "ToolRegistryMode", "ToolRegistryPlugin"]

ToolRegistryMode = Literal["override", "merge", "if_empty"]
"""What becomes of the tools that a chat brings: they give way, they stay and win where names are the same, or they stay
and nothing is added."""

ToolProvider: TypeAlias = Callable[[ChatContext, ChatState], Iterable[ToolSource] | Awaitable[Iterable[ToolSource]]]
"""Gives the tools of one chat, or an awaitable of them."""


class ToolRegistryPlugin:
    """Gives tools to every chat, stream and session turn that starts: `tools`, or those that a function gives for it.

    The function is called with the context and the state of the chat before it is sent, may be async, and refuses the
    chat by raising. `mode` says what becomes of the tools that the chat brings, "merge" unless it is given. `tools` may
    be a `ToolRegistry` as well, which has a mode of its own. `name` tells two of these apart.

    Raises `ConfigError` for what cannot be a tool, and for two tools of one name.
    """

    def __init__(
        self,
        tools: Iterable[ToolSource] | ToolProvider | ToolRegistry,
        *,
        mode: ToolRegistryMode | None = None,
        name: str = "tool registry",
    ) -> None:
        if mode not in (None, "override", "merge", "if_empty"):
            raise ConfigError(f"{name}: mode must be override, merge or if_empty, not {mode!r}")
        self.name = name
        self._mode = mode or "merge"
        self._provider: ToolProvider | None = None
        self._registry: ToolRegistry | None = None
        self._tools = ToolSet()
        if isinstance(tools, ToolRegistry):
            if mode not in (None, tools.mode):
                raise ConfigError(f"{name}: the mode of the registry is {tools.mode}, and cannot be {mode} here")
            self._registry = tools
        elif not callable(tools) or isinstance(tools, Tool):
            self._tools = self._made(tools)
        elif not can_take(tools, 2):
            raise ConfigError(f"{name}: a provider of tools must be a function of (context, state), not {tools!r}")
        else:
            self._provider = tools

    def init(self, client: Client) -> None:
        """Called by the client."""
        client.add_hook(Hook(before=self._give, name=self.name))

    async def _give(self, context: ChatContext, state: ChatState) -> None:
        theirs = _tools_of(state)
        if self._registry is not None:
            query = ToolQuery(own=theirs, principal=state.principal, session=context.session)
            chosen = await self._asked(self._registry, query)
            if chosen is not theirs and (len(chosen) or len(theirs)):
                state.tools = chosen
            return
        if len(theirs) and self._mode == "if_empty":
            return
        ours = self._tools if self._provider is None else await self._provided(self._provider, context, state)
        if self._mode == "override":
            if len(ours) or len(theirs):
                state.tools = ours
        elif len(ours):
            state.tools = theirs.merged(ours) if len(theirs) else ours

    async def _asked(self, registry: ToolRegistry, query: ToolQuery) -> ToolSet:
        try:
            return await registry.tools_for(query)
        except ConfigError as exc:
            raise ExtensionError(str(exc)) from exc

    async def _provided(self, provider: ToolProvider, context: ChatContext, state: ChatState) -> ToolSet:
        given = provider(context, state)
        if inspect.isawaitable(given):
            given = await given
        try:
            return self._made(given)
        except ConfigError as exc:
            raise ExtensionError(str(exc)) from exc

    def _made(self, tools: object) -> ToolSet:
        if isinstance(tools, ToolSet):
            return tools
        if isinstance(tools, (str, bytes)) or not isinstance(tools, Iterable):
            raise ConfigError(f"{self.name}: tools must be a list of tools, or a function for one, not {tools!r}")
        return ToolSet(tools)


def _tools_of(state: ChatState) -> ToolSet:
    """The tools that a chat brings: those that are run here, or definitions of such as are not."""
    if state.tools is not None:
        return state.tools
    definitions = state.options.get("tools")
    return ToolSet(definitions) if isinstance(definitions, list) else ToolSet()
