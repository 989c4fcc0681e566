"""Tools of a Model Context Protocol server: a program on this machine, or an address. Needs the extra `mcp`.

Theory of operation. The `mcp` package keeps a connection in task groups of its own, which cancel whoever opened
them when the server misbehaves. So the connection lives in a task here, and what happens to it ends there: calls
that wait get an error, and the server is connected to again, a few times within half a minute. A server is not
trusted: its names are checked, its schemas compiled before use, its descriptions cut, and it says nothing about
what may run again or needs no approval. The rules of its tools are those that whoever connects it gives.

This is the one module that knows `mcp` and anyio.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar, cast, final
from urllib.parse import urlsplit

import anyio
import httpx2
import trio
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp.types import PaginatedRequestParams

from .._callables import can_take
from .._contain import contain, ungrouped
from ..errors import ConfigError, ConnectError, ToolError
from ..security.rules import ToolRules
from .registry import Tool, ToolSet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from anyio.abc import ObjectSendStream
    from mcp.client._transport import ReadStream, TransportStreams
    from mcp.shared.message import SessionMessage

    from .context import ToolContext

__all__ = ["McpServer", "open_mcp"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_NAME_CHARACTERS: Final = re.compile(r"[^A-Za-z0-9_-]")
_ADDRESS: Final = re.compile(r"(\w://)(?:[^\s/?#]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_MAX_NAME: Final = 64
_MAX_DESCRIPTION: Final = 4_096
_MAX_PAGES: Final = 100
_CONNECT_S: Final = 30.0
_RESTARTS: Final = 5
_RESTART_WINDOW_S: Final = 30.0
_UNREACHABLE: Final = (MCPError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, RuntimeError, ValueError)

if TYPE_CHECKING:
    _OpenStreams: TypeAlias = Callable[[], AbstractAsyncContextManager[TransportStreams]]


@asynccontextmanager
async def open_mcp(
    target: str | Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    headers: Mapping[str, str] | None = None,
    prefix: str = "",
    rules: ToolRules | Callable[[str], ToolRules | None] | None = None,
    timeout_s: float | None = None,
    max_tools: int = 128,
) -> AsyncIterator[McpServer]:
    """Connect to a server and keep the connection; `async with open_mcp(...) as server: ... tools=server.tools`.

    `target` is a command with its arguments, which is started and spoken to over its standard input and output, or
    the http or https address of a server (streamable HTTP). A command gets the variables in `env` and those that a
    shell needs, nothing else of the environment; what it writes to its standard error is dropped. `headers` go with
    every request to an address.

    `prefix` stands before the names of the tools, `rules` are theirs, or gives those of each by the server's name for
    it. `timeout_s` is the time of a call. Of more than `max_tools` tools the first are taken.

    Raises `ConnectError` when the server cannot be reached or does not speak the protocol, and `ConfigError` for a
    target that is none and for settings that cannot be. Leaving ends the connection, and the command with all that it
    started. An error of the body leaves as itself, not in an exception group.
    """
    settings = _Settings(prefix, rules, timeout_s, max_tools)
    server = McpServer(_transport(target, env=env, cwd=cwd, headers=headers), settings, name=_shown(target))
    async with ungrouped(_connected(server)):
        yield server


@asynccontextmanager
async def _connected(server: McpServer) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


class _Settings:
    """How a server's tools become tools here."""

    def __init__(
        self,
        prefix: str,
        rules: ToolRules | Callable[[str], ToolRules | None] | None,
        /,
        timeout_s: float | None,
        max_tools: int,
    ) -> None:
        if not isinstance(cast("object", prefix), str):
            raise ConfigError(f"MCP server: prefix must be a text, not {prefix!r}")
        if rules is not None and not isinstance(rules, ToolRules) and not can_take(rules, 1):
            raise ConfigError(f"MCP server: rules must be ToolRules, or a function of a name, not {rules!r}")
        if timeout_s is not None and not _is_number(timeout_s, (int, float)):
            raise ConfigError(f"MCP server: timeout_s must be a number above 0, not {timeout_s!r}")
        if not _is_number(max_tools, int):
            raise ConfigError(f"MCP server: max_tools must be a whole number above 0, not {max_tools!r}")
        self.prefix = prefix
        self.timeout_s = timeout_s
        self.max_tools = max_tools
        self._rules = rules

    def rules_of(self, name: str) -> ToolRules | None:
        """The rules of a tool by the server's name for it."""
        return self._rules(name) if callable(self._rules) else self._rules


@final
class McpServer:
    """A connected server. Made by `open_mcp`.

    `tools` are what it offers, as of the last connection or `refresh`; `skipped` tells of each tool that could not be
    taken why. While the server is away, calls are answered with an error that the model is told.
    """

    def __init__(self, open_streams: _OpenStreams, settings: _Settings, *, name: str) -> None:
        self.name = name
        self.tools = ToolSet()
        self.skipped: Mapping[str, str] = {}
        self._open_streams = open_streams
        self._settings = settings
        self._session: ClientSession | None = None
        self._calls: set[trio.CancelScope] = set()
        self._failures: list[Exception] = []
        self._is_known = False

    @property
    def is_connected(self) -> bool:
        """Whether the server can be called now."""
        return self._session is not None

    def __repr__(self) -> str:
        return f"McpServer({self.name}, {len(self.tools)} tools, {'connected' if self.is_connected else 'away'})"

    async def refresh(self) -> ToolSet:
        """Ask the server for its tools again; raises `ToolError` when it does not answer."""
        session = self._reachable()
        await self._ask(partial(self._learn, session))
        return self.tools

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, and again when the connection breaks; started when the tools are known."""
        starts: deque[float] = deque(maxlen=_RESTARTS + 1)
        while True:
            now = trio.current_time()
            if len(starts) > _RESTARTS and now - starts[0] < _RESTART_WINDOW_S:
                _LOG.error("the MCP server %s ended %d times; it is left alone for a while", self.name, _RESTARTS)
                await trio.sleep_until(starts[0] + _RESTART_WINDOW_S)
            starts.append(trio.current_time())
            self._failures.clear()
            await contain(partial(self._connect, task_status), report=self._failures.append)
            reason = _reason(self._failures)
            if not self._is_known:
                raise ConnectError(f"the MCP server {self.name} cannot be used: {reason}")
            _LOG.warning("the connection to the MCP server %s has ended: %s", self.name, reason)

    async def _connect(self, task_status: trio.TaskStatus[None]) -> None:
        """One connection, from its beginning to its end."""
        ended = trio.Event()
        send, receive = anyio.create_memory_object_stream["SessionMessage | Exception"](0)
        with trio.CancelScope(deadline=trio.current_time() + _CONNECT_S) as scope:
            async with (
                send,
                receive,
                self._open_streams() as (incoming, outgoing),
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(_pump, incoming, send, ended)
                async with ClientSession(receive, outgoing) as session:
                    await session.initialize()
                    await self._learn(session)
                    scope.deadline = math.inf
                    await self._serve(session, ended, task_status)
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise TimeoutError(f"no connection within {_CONNECT_S:g} s")

    async def _serve(self, session: ClientSession, ended: trio.Event, task_status: trio.TaskStatus[None]) -> None:
        """Let calls through until the connection ends."""
        self._session = session
        if not self._is_known:
            self._is_known = True
            task_status.started()
        try:
            await ended.wait()
        finally:
            self._lose()

    def _lose(self) -> None:
        """The connection has ended: nobody waits for it any longer."""
        self._session = None
        for scope in self._calls:
            scope.cancel()

    # Tools

    async def _learn(self, session: ClientSession) -> None:
        tools: list[Tool[..., object]] = []
        skipped: dict[str, str] = {}
        for described in await self._list(session):
            name = str(described.get("name"))
            try:
                if len(tools) == self._settings.max_tools:
                    raise ConfigError(f"there are more than {self._settings.max_tools} tools")
                tools.append(self._make_tool(described, name, {tool.name for tool in tools}))
            except ConfigError as exc:
                skipped[name] = exc.message
                _LOG.warning("tool %r of the MCP server %s is left out: %s", name, self.name, exc.message)
        self.tools, self.skipped = ToolSet(tools), skipped

    async def _list(self, session: ClientSession) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        cursor: str | None = None
        for _ in range(_MAX_PAGES):
            page = await session.list_tools(params=None if cursor is None else PaginatedRequestParams(cursor=cursor))
            found += [tool.model_dump(mode="json", by_alias=True) for tool in page.tools]
            cursor = page.next_cursor
            if cursor is None or len(found) > self._settings.max_tools:
                break
        return found

    def _make_tool(self, described: Mapping[str, object], name: str, taken: set[str]) -> Tool[..., object]:
        shown = _NAME_CHARACTERS.sub("_", self._settings.prefix + name)[:_MAX_NAME]
        if shown in taken:
            raise ConfigError(f"its name {shown} is taken")
        schema = described.get("inputSchema")
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise ConfigError("its schema is not that of an object")

        async def call(arguments: Mapping[str, object], ctx: ToolContext) -> object:
            return await self._call(name, arguments, ctx)

        return Tool(
            call,
            name=shown,
            description=str(described.get("description") or "")[:_MAX_DESCRIPTION],
            parameters=cast("Mapping[str, object]", schema),
            rules=self._settings.rules_of(name),
            timeout_s=self._settings.timeout_s,
        )

    # Calls

    async def _call(self, name: str, arguments: Mapping[str, object], ctx: ToolContext) -> object:
        async def progress(done: float, total: float | None, message: str | None) -> None:  # noqa: ASYNC124 - mcp's form
            ctx.progress(message or "", fraction=done / total if total else None)

        session = self._reachable()
        ask = partial(session.call_tool, name, dict(arguments), progress_callback=progress)
        result = (await self._ask(ask)).model_dump(mode="json", by_alias=True)
        text = _text_of(result)
        if result.get("isError"):
            raise ToolError(text if isinstance(text, str) and text else "the tool failed")
        return text

    def _reachable(self) -> ClientSession:
        if self._session is None:
            raise ToolError("the server of this tool is not running now")
        return self._session

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        """What the server answers; a server that ends meanwhile ends the wait."""
        scope = trio.CancelScope()
        self._calls.add(scope)
        try:
            with scope:
                return await ask()
        except _UNREACHABLE as exc:
            raise ToolError(f"the server of this tool refused: {_first_line(exc)}") from exc
        finally:
            self._calls.discard(scope)
        raise ToolError("the server of this tool ended before it answered; whether the call had an effect is not known")


# Connections


def _transport(
    target: str | Sequence[str],
    *,
    env: Mapping[str, str] | None,
    cwd: str | None,
    headers: Mapping[str, str] | None,
) -> _OpenStreams:
    _check_texts("env", env)
    _check_texts("headers", headers)
    if not isinstance(target, str):
        # Of what is none, such as a variable that is not set, no more than its kind is shown.
        whole = list(target) if isinstance(cast("object", target), Sequence) else [target]
        command = [part for part in whole if isinstance(part, str)]
        if not command or len(command) < len(whole):
            kinds = ", ".join(type(part).__name__ for part in whole) or "nothing"
            raise ConfigError(f"MCP server: a command is a list of texts, not one of {kinds}")
        parameters = StdioServerParameters(command=command[0], args=command[1:], env=dict(env or {}), cwd=cwd)
        return partial(_open_command, parameters)
    try:
        parts = urlsplit(target)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        given = _shown(target) if "://" in target else "another text"
        raise ConfigError(f"MCP server: give an http or https address, or a command as a list, not {given}")
    if headers and parts.scheme == "http" and parts.hostname not in {"localhost", "127.0.0.1", "::1"}:
        raise ConfigError(f"MCP server: http would send the headers to {parts.hostname} in the clear; use https")
    return partial(_open_address, target, dict(headers or {}))


def _check_texts(name: str, given: object) -> None:
    """Names and values, which may be secrets and are not shown."""
    if given is None:
        return
    if not isinstance(given, Mapping) or not all(isinstance(part, str) for pair in given.items() for part in pair):
        raise ConfigError(f"MCP server: {name} must be a mapping of texts to texts")


def _is_number(given: object, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(given, kinds) and not isinstance(given, bool) and 0 < cast("float", given) <= sys.float_info.max


@asynccontextmanager
async def _open_command(parameters: StdioServerParameters) -> AsyncIterator[TransportStreams]:
    with open(os.devnull, "w") as nowhere:  # noqa: ASYNC230 - there is nothing to wait for
        async with stdio_client(parameters, errlog=nowhere) as streams:
            yield streams


@asynccontextmanager
async def _open_address(address: str, headers: dict[str, str]) -> AsyncIterator[TransportStreams]:
    # How long an answer may take is the caller's to say; each connect has a bound of its own.
    timeout = httpx2.Timeout(_CONNECT_S, read=None)
    async with (
        httpx2.AsyncClient(headers=headers, timeout=timeout) as client,
        streamable_http_client(address, http_client=client) as streams,
    ):
        yield streams


async def _pump(
    incoming: ReadStream[SessionMessage | Exception],
    send: ObjectSendStream[SessionMessage | Exception],
    ended: trio.Event,
) -> None:
    """Hand on what the server says; its end is what this is for."""
    try:
        async with send:
            async for message in incoming:
                await send.send(message)
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        return
    finally:
        ended.set()


# What came from the server


def _text_of(result: Mapping[str, object]) -> object:
    """A result as one value: its texts, with a note in place of what is none; else its structured content."""
    blocks = cast("list[Mapping[str, object]]", result.get("content") or [])
    if not blocks:
        return result.get("structuredContent")
    return "\n".join(_text_of_block(block) for block in blocks)


def _text_of_block(block: Mapping[str, object]) -> str:
    resource = block.get("resource")
    if isinstance(resource, Mapping):
        return str(resource.get("text", f"[{resource.get('mimeType') or 'data'} at {resource.get('uri')}]"))
    match block.get("type"):
        case "text":
            return str(block.get("text"))
        case "resource_link":
            return f"[{block.get('name')} at {block.get('uri')}]"
        case kind:
            return f"[{kind}: {block.get('mimeType')}]"


def _shown(target: str | Sequence[str]) -> str:
    """A target for a log: without a password, a query, which may hold a key, and without arguments."""
    return _without_secrets(target) if isinstance(target, str) else str(next(iter(target), ""))


def _without_secrets(text: str) -> str:
    """A text with its addresses shortened to what they lead to."""
    return _ADDRESS.sub(r"\1\2", text)


def _reason(failures: Sequence[BaseException]) -> str:
    """The innermost reason that there is."""
    error = failures[-1] if failures else None
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return "it closed the connection" if error is None else _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return _without_secrets(text.splitlines()[0])[:300]
