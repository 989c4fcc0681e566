"""Middleware and hooks: what users put around every chat, stream and session turn.

Theory of operation. A chain is a stack of middlewares around one innermost step, and hooks at fixed points
in that step: `before` may refuse a chat, `after` and `on_error` look at how it ended. A chat that nothing
is put around never comes here.

What a middleware sees and changes is the request as it would be sent, the history of a session included;
what a session keeps is what its user said and what the model answered. So nothing that is put around a
turn can break a history.

A chain that only looks, with no middleware and no `before` in it, changes no request: a plain chat needs no loop then
(see `_pipeline.py`), and its hooks cost little more than themselves. Observers cost least: what has ended is noted and
given to them some hundredths of a second later, all at a time, since code that runs for many chats in a row takes a
third of the CPU of code that runs once in each. See `_feed.py`.

Errors of theirs are the chat's errors: a `GorouterError` as it is, anything else in an `ExtensionError`
that names who raised it. After an answer was given and paid for, a hook cannot take it away any more.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, cast

from msgspec import Struct

from .._callables import can_take, is_same
from .._contain import contain, contain_sync
from .._feed import Feed
from ..errors import BadRequestError, ConfigError, ExtensionError, GorouterError
from ..runtime_events import ChatContext, ChatFailed, ChatFinished, ChatStarted, HookFailed
from ..tools.registry import ToolSet
from ..wire.codec import decode_json, encode_json, encode_message, encode_options, split_list
from .observing import EndedChat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._bus import EventBus
    from ..security.rules import Principal
    from ..tools.registry import ToolSource
    from ..wire.result import ChatResult
    from .observing import NotedChat
    from .request import TurnRequest

__all__ = ["Chain", "ChatState", "Hook", "Middleware", "Next"]

Next: TypeAlias = Callable[[], Awaitable[None]]
"""Runs the rest of the chat, to its end; `state.result` is its answer then. To be awaited at most once."""


class ChatState:
    """What a middleware and the hooks of one chat share, and may change.

    `messages` and `options` are the request in wire names, decoded when they are first looked at; change
    them before the chat is sent, or put others in their place. `tools` are those that are run here, and may be
    exchanged as well, for a `ToolSet` or a list of tools: the request then offers the new ones. `result` is the
    answer: None until there is one, and settable, also without anything having been sent. `principal` is who asks,
    where the client has `security`. `meta` is free for notes between extensions.
    """

    __slots__ = (
        "_decoded_messages",
        "_decoded_options",
        "_messages",
        "_options",
        "_tools",
        "meta",
        "principal",
        "result",
        "tools_were_changed",
    )

    def __init__(
        self, options: bytes, messages: bytes, tools: ToolSet | None = None, *, principal: Principal | None = None
    ) -> None:
        self._tools = tools
        self.principal = principal
        self.tools_were_changed = False
        self._options = options
        self._messages = messages
        self._decoded_options: dict[str, object] | None = None
        self._decoded_messages: list[dict[str, object]] | None = None
        self.result: ChatResult[object] | None = None
        self.meta: dict[str, object] = {}

    @property
    def options(self) -> dict[str, object]:
        """Everything of the request except `messages` and `stream`."""
        if self._decoded_options is None:
            self._decoded_options = cast("dict[str, object]", decode_json(self._options))
        return self._decoded_options

    @options.setter
    def options(self, options: dict[str, object]) -> None:
        self._decoded_options = options

    @property
    def tools(self) -> ToolSet | None:
        """The tools that are run here."""
        return self._tools

    @tools.setter
    def tools(self, tools: ToolSet | None) -> None:
        given = cast("Iterable[ToolSource] | None", tools)
        self._tools = given if given is None or isinstance(given, ToolSet) else ToolSet(given)
        self.tools_were_changed = True

    @property
    def messages(self) -> list[dict[str, object]]:
        """The messages of the request, the history of a session included."""
        if self._decoded_messages is None:
            self._decoded_messages = cast("list[dict[str, object]]", decode_json(b"[%b]" % self._messages))
        return self._decoded_messages

    @messages.setter
    def messages(self, messages: list[dict[str, object]]) -> None:
        self._decoded_messages = _listed(messages)

    @property
    def has_decoded_messages(self) -> bool:
        """Whether somebody has looked at the messages, and may have changed them."""
        return self._decoded_messages is not None

    @property
    def raw_messages(self) -> bytes:
        """The messages as they came, encoded and joined by commas."""
        return self._messages

    @property
    def message_count(self) -> int:
        """How many messages there are, without decoding them."""
        if self._decoded_messages is not None:
            return len(self._decoded_messages)
        return len(split_list(b"[%b]" % self._messages))

    def encoded(self) -> tuple[bytes, bytes]:
        """Options and messages as they are to be sent; what was not changed keeps its bytes.

        Raises `BadRequestError` for what an extension has made of them, if that is no request.
        """
        return self._encoded_options(), self._encoded_messages()

    def _encoded_options(self) -> bytes:
        options = self._decoded_options
        if options is None or options == decode_json(self._options):
            return self._options
        return encode_options({"extra_body": options})

    def _encoded_messages(self) -> bytes:
        if self._decoded_messages is None:
            return self._messages
        if not self._decoded_messages:
            raise BadRequestError("messages: an extension has left no message to send", status=400)
        # The same value in the same words: numbers keep their last digit, and signed blocks their signature.
        as_it_came = {encode_json(decode_json(bytes(raw))): bytes(raw) for raw in split_list(b"[%b]" % self._messages)}
        encoded = map(encode_message, self._decoded_messages)
        return b",".join(as_it_came.get(message, message) for message in encoded)


def _listed(messages: object) -> list[dict[str, object]]:
    """What can be gone through once as a list: it is sent first and counted afterwards."""
    if isinstance(messages, list):
        return messages
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise BadRequestError(f"messages: must be a list of messages, not a {type(messages).__name__}", status=400)
    return list(messages)


class Middleware(Protocol):
    """Something around a chat: does its part, awaits `proceed` for the rest, does what is left.

    It may change `state` before, look at `state.result` after, set a result without going on, or raise.
    Cancelling the chat cancels it.
    """

    async def __call__(self, context: ChatContext, state: ChatState, proceed: Next, /) -> None:
        """Be around one chat."""


HookFunction: TypeAlias = Callable[[ChatContext, ChatState], Awaitable[object] | object]
ErrorHookFunction: TypeAlias = Callable[[ChatContext, ChatState, GorouterError], Awaitable[object] | object]


class Hook(Struct, frozen=True, kw_only=True):
    """Functions to call at the three points of a chat, sync or async, each optional.

    `before` is called before anything is sent, and refuses the chat by raising. `after` is called when there is
    an answer (stored, in a session), `on_error` when there is an error instead; what these two raise is told
    as `HookFailed` and changes nothing. They are called in the order of registration.
    """

    before: HookFunction | None = None
    after: HookFunction | None = None
    on_error: ErrorHookFunction | None = None
    name: str = "hook"

    def __post_init__(self) -> None:
        for phase, count in (("before", 2), ("after", 2), ("on_error", 3)):
            function = getattr(self, phase)
            if function is not None and not can_take(function, count):
                wanted = "(context, state)" if count == 2 else "(context, state, error)"
                raise ConfigError(f"hook {self.name!r}: {phase} must be a function of {wanted}, not {function!r}")


class _Calls(NamedTuple):
    """The functions of all hooks, in order, and where an error of theirs goes that has no place to go."""

    before: tuple[tuple[str, HookFunction], ...] = ()
    after: tuple[tuple[HookFunction, Callable[[Exception], None]], ...] = ()
    on_error: tuple[tuple[ErrorHookFunction, Callable[[Exception], None]], ...] = ()


class Chain:
    """The middlewares and hooks of one runtime. Registering takes effect for the chats that start afterwards."""

    def __init__(self, bus: EventBus, *, wall: Callable[[], float]) -> None:
        self._bus = bus
        self._wall = wall
        self._middlewares: tuple[Middleware, ...] = ()
        self._hooks: tuple[Hook, ...] = ()
        self._calls = _Calls()
        self._last_number = 0
        self.ended: Feed[NotedChat, EndedChat] = Feed(
            self._ended, report=partial(self._tell_failed_hook, "observer", "ended")
        )

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to go through, and nobody to tell."""
        return not (self._middlewares or self._hooks or self._bus.hears_chats or self.ended.observers)

    @property
    def only_notes(self) -> bool:
        """Whether there is nothing but observers."""
        return not (self._middlewares or self._hooks or self._bus.hears_chats)

    @property
    def only_looks(self) -> bool:
        """Whether nothing here could change a request or refuse it."""
        return not (self._middlewares or self._calls.before)

    def use(self, middleware: Middleware) -> None:
        """Put `middleware` inside those that are there: the first one is the outermost.

        Raises `ConfigError` for what cannot be called with (context, state, proceed).
        """
        if not can_take(middleware, 3):
            raise ConfigError(f"middleware: must be an async function of (context, state, proceed), not {middleware!r}")
        self._middlewares = (*self._middlewares, middleware)

    def remove(self, middleware: Middleware) -> bool:
        """Take `middleware` out again; False when it is not there."""
        left = tuple(other for other in self._middlewares if not is_same(other, middleware))
        is_found = len(left) < len(self._middlewares)
        self._middlewares = left
        return is_found

    def add_hook(self, hook: Hook) -> None:
        """Call `hook` from now on."""
        if not isinstance(hook, Hook):
            raise ConfigError(f"hook: must be a Hook, not {hook!r}")
        self._set_hooks((*self._hooks, hook))

    def remove_hook(self, hook: Hook) -> bool:
        """Take `hook` out again; False when it is not there."""
        left = tuple(other for other in self._hooks if other is not hook)
        is_found = len(left) < len(self._hooks)
        self._set_hooks(left)
        return is_found

    def _set_hooks(self, hooks: tuple[Hook, ...]) -> None:
        def reporter(hook: Hook, phase: str) -> Callable[[Exception], None]:
            return partial(self._tell_failed_hook, hook.name, phase)

        self._hooks = hooks
        self._calls = _Calls(
            before=tuple((hook.name, hook.before) for hook in hooks if hook.before is not None),
            after=tuple((hook.after, reporter(hook, "after")) for hook in hooks if hook.after is not None),
            on_error=tuple((hook.on_error, reporter(hook, "on_error")) for hook in hooks if hook.on_error is not None),
        )

    async def run(self, context: ChatContext, state: ChatState, innermost: Next) -> ChatResult[object]:
        """Run `innermost`, which sets `state.result`, inside everything that is registered now.

        Raises its errors, those of the middlewares and of the `before` hooks.
        """
        calls = self._calls
        proceed: Next = partial(self._inside, context, state, innermost=innermost, calls=calls)
        for middleware in reversed(self._middlewares):
            proceed = partial(_enter, middleware, context, state, _Once(proceed))
        if self._bus.hears_chats:
            self._bus.emit(ChatStarted(at_s=self._wall(), context=context))
        error: GorouterError | None = None
        try:
            await proceed()
            if state.result is not None:
                self._note(context, state, None)
                if self._bus.hears_chats:
                    self._bus.emit(ChatFinished(at_s=self._wall(), context=context, result=state.result))
                return state.result
            error = ExtensionError("a middleware has neither gone on nor given a result")
        except GorouterError as exc:
            error = exc
        except BaseException:
            self._tell_end(context, None)
            raise
        # What was paid for is not lost with the extension that failed after it.
        error.partial = error.partial or state.result
        await _call_each(calls.on_error, context, state, error)
        self._note(context, state, error)
        self._tell_end(context, error)
        raise error

    async def _inside(self, context: ChatContext, state: ChatState, *, innermost: Next, calls: _Calls) -> None:
        for name, before in calls.before:
            await _translated(f"the before hook {name!r}", partial(_call, before, context, state))
        await innermost()
        await _call_each(calls.after, context, state)

    def _note(self, context: ChatContext, state: ChatState, error: GorouterError | None) -> None:
        if self.ended.observers:
            messages = state.message_count if state.has_decoded_messages else (state.raw_messages,)
            result = state.result if error is None else None
            self.ended.add((context, context.is_streamed, messages, self._wall(), result, error))

    def _ended(self, noted: Sequence[NotedChat]) -> list[EndedChat]:
        return [
            EndedChat(
                what if isinstance(what, ChatContext) else self.context_of(what, is_streamed=is_streamed),
                messages,
                at_s,
                result,
                error,
            )
            for what, is_streamed, messages, at_s, result, error in noted
        ]

    def context_of(
        self, request: TurnRequest, *, is_streamed: bool = False, is_completion: bool = False
    ) -> ChatContext:
        """What the chat with this first request is, under an id of its own."""
        self._last_number += 1
        settings = request.settings
        return ChatContext(
            chat_id=str(self._last_number),
            model=settings.model,
            is_streamed=is_streamed,
            is_completion=is_completion,
            session=request.session,
            turn_id=request.turn_id,
            tenant=settings.tenant,
            lane=settings.lane,
        )

    def _tell_end(self, context: ChatContext, error: GorouterError | None) -> None:
        if self._bus.hears_chats:
            self._bus.emit(ChatFailed(at_s=self._wall(), context=context, error=error))

    def _tell_failed_hook(self, name: str, phase: str, error: Exception) -> None:
        if self._bus.has_listeners:
            self._bus.emit(HookFailed(at_s=self._wall(), hook=name, phase=phase, error=error))


class _Once:
    """A `Next` that may be awaited once: a chat that is sent twice is paid twice."""

    __slots__ = ("_is_used", "_proceed")

    def __init__(self, proceed: Next) -> None:
        self._proceed = proceed
        self._is_used = False

    async def __call__(self) -> None:
        if self._is_used:
            raise ExtensionError("a middleware has gone on twice")
        self._is_used = True
        await self._proceed()


async def _enter(middleware: Middleware, context: ChatContext, state: ChatState, proceed: Next) -> None:
    name = getattr(middleware, "__qualname__", type(middleware).__name__)
    await _translated(f"the middleware {name!r}", partial(middleware, context, state, proceed))


async def _translated(who: str, work: Callable[[], Awaitable[object]]) -> None:
    """Run what a user has written; an `Exception` of it that is not of this package becomes an `ExtensionError`."""
    failures: list[Exception] = []
    await contain(work, report=failures.append)
    for failure in failures:
        if isinstance(failure, GorouterError):
            raise failure
        raise ExtensionError(f"{who} failed: {type(failure).__name__}: {failure}") from failure


async def _call_each(
    calls: Iterable[tuple[Callable[..., Awaitable[object] | object], Callable[[Exception], None]]], *args: object
) -> None:
    """Call all of these, whatever the others do; most neither wait nor return anything."""
    for function, report in calls:
        returned = contain_sync(partial(function, *args), report=report)
        if returned is not None and inspect.isawaitable(returned):
            await contain(partial(_wait_for, returned), report=report)


async def _wait_for(returned: Awaitable[object]) -> None:
    await returned


async def _call(function: Callable[..., Awaitable[object] | object], *args: object) -> None:
    returned = function(*args)
    if inspect.isawaitable(returned):
        await returned
