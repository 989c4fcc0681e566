"""The event bus: what happens in a runtime, told to whoever listens, without anybody waiting for them.

Theory of operation. `emit` never waits and never raises: it puts the event into the bounded queue of
each listener that wants its type and goes on. A listener that is slower than the events loses the
oldest ones, and is told how many (`dropped`). Each handler has a task of its own, so that one that
hangs hurts nobody but itself; one that raises is contained, and what it raised becomes an event.

A handler that is a plain function runs on the loop, and must not block it, as nothing on a loop may;
`in_thread` gives it a thread.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, TypeAlias, TypeVar, cast

import trio
from msgspec import Struct

from ._callables import is_async
from ._contain import contain
from .errors import ConfigError
from .runtime_events import ChatFailed, ChatFinished, ChatStarted, HandlerFailed, RuntimeEvent

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["EventBus", "EventFeed", "Handler", "HandlerId", "Listener"]

E = TypeVar("E", bound=RuntimeEvent)

_OF_CHATS: Final = (ChatStarted, ChatFinished, ChatFailed)

Handler: TypeAlias = Callable[[E], Awaitable[object] | object]
"""Takes one event; what it returns is awaited if it can be, and otherwise of no interest."""


class HandlerId(Struct, frozen=True):
    """What `off` takes to end a subscription."""

    number: int


class Listener:
    """The queue of one subscription. `dropped` counts the events that it was too slow for."""

    __slots__ = ("_has_ended", "_idle", "_queue", "_wakeup", "dropped", "kinds", "limit")

    def __init__(self, kinds: tuple[type[RuntimeEvent], ...], limit: int) -> None:
        self.kinds = kinds
        self.limit = limit
        self.dropped = 0
        self._queue: deque[RuntimeEvent] = deque()
        self._wakeup = trio.Event()
        self._idle = trio.Event()
        self._has_ended = False

    def put(self, event: RuntimeEvent) -> None:
        """Queue `event`; when there is no room, the oldest one goes."""
        if len(self._queue) >= self.limit:
            self._queue.popleft()
            self.dropped += 1
        self._queue.append(event)
        self._wakeup.set()
        if self._idle.is_set():
            self._idle = trio.Event()

    async def get(self) -> RuntimeEvent:
        """The next event; waits for one. Cancelling loses none. Raises `trio.EndOfChannel` where none come any more."""
        while not self._queue:
            if self._has_ended:
                raise trio.EndOfChannel
            self._idle.set()
            if self._wakeup.is_set():
                # Only then: another reader may wait for the same one.
                self._wakeup = trio.Event()
            await self._wakeup.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._queue.popleft()

    async def wait_idle(self) -> None:
        """Wait until the reader has taken everything and wants more, or has left."""
        await self._idle.wait()

    def leave(self) -> None:
        """The reader has left: there is nothing to wait for any more."""
        self._idle.set()

    def end(self) -> None:
        """Nothing more comes: whoever still reads has what there is."""
        self._has_ended = True
        self._wakeup.set()


class EventFeed(Generic[E]):
    """Events as an async iterator, inside `with client.events(...) as feed`. It ends when it is left, not by itself.

    Several tasks may read it; each event goes to one of them.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    @property
    def dropped(self) -> int:
        """How many events were dropped, oldest first, because they were not taken in time."""
        return self._listener.dropped

    def __aiter__(self) -> EventFeed[E]:
        return self

    async def __anext__(self) -> E:
        await trio.lowlevel.checkpoint()
        try:
            return cast("E", await self._listener.get())
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class EventBus:
    """The listeners of one runtime; handlers run in the nursery given and end with it."""

    def __init__(self, nursery: trio.Nursery, *, threads: int = 4) -> None:
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(threads)
        self._listeners: dict[int, Listener] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._last_number = 0
        self.hears_chats = False
        """Whether anybody listens to events of chats; other events are nothing that a chat would have to make."""

    def __repr__(self) -> str:
        return f"<EventBus: {len(self._listeners)} listeners>"

    @property
    def has_listeners(self) -> bool:
        """Whether making an event is worth while."""
        return bool(self._listeners)

    @property
    def listening(self) -> int:
        """How many subscriptions there are."""
        return len(self._listeners)

    @property
    def dropped(self) -> int:
        """Events that the present listeners were too slow for."""
        return sum(listener.dropped for listener in self._listeners.values())

    def emit(self, event: RuntimeEvent) -> None:
        """Tell everybody who wants this type of event. Never waits, never raises."""
        for listener in self._listeners.values():
            if isinstance(event, listener.kinds):
                listener.put(event)

    def on(self, kind: type[E], handler: Handler[E], *, queue: int = 256, in_thread: bool = False) -> HandlerId:
        """Call `handler` with each event of `kind` from now on; events come one at a time, in order.

        Up to `queue` events wait for it; beyond that the oldest are dropped. Raises `ConfigError` for
        what is no handler or no kind of event.
        """
        _check_kinds((kind,))
        if len(_positional(handler)) != 1:
            raise ConfigError(f"handler: must be a function of one event, not {handler!r}")
        if in_thread and is_async(handler):
            raise ConfigError(f"handler: {handler!r} is async and runs on the loop: a thread would not wait for it")
        number, listener = self._subscribe((kind,), queue)
        scope = self._scopes[number] = trio.CancelScope()
        # Its listener gives it no other events.
        takes_event = cast("Callable[[RuntimeEvent], object]", handler)
        call = partial(self._in_thread if in_thread else _call, takes_event)
        self._nursery.start_soon(self._run_handler, listener, call, scope)
        return HandlerId(number)

    def off(self, handler_id: HandlerId) -> bool:
        """End a subscription, also in the middle of its handler; False when it had ended."""
        scope = self._scopes.pop(handler_id.number, None)
        self._forget(handler_id.number)
        if scope is not None:
            scope.cancel()
        return scope is not None

    @contextmanager
    def listen(self, *kinds: type[E], queue: int = 1024) -> Iterator[EventFeed[E]]:
        """Events of these kinds (of all kinds when none is named) as an async iterator, while the block lasts."""
        _check_kinds(kinds)
        number, listener = self._subscribe(kinds or (RuntimeEvent,), queue)
        try:
            yield EventFeed(listener)
        finally:
            self._forget(number)
            listener.end()

    async def drain(self) -> None:
        """Wait until every handler has had what is queued for it, or is off; those that hang are waited for."""
        for number in list(self._scopes):
            listener = self._listeners.get(number)
            if listener is not None:
                await listener.wait_idle()

    def _subscribe(self, kinds: tuple[type[RuntimeEvent], ...], queue: int) -> tuple[int, Listener]:
        _check_queue(queue)
        self._last_number += 1
        listener = self._listeners[self._last_number] = Listener(kinds, queue)
        self._note_kinds()
        return self._last_number, listener

    def _forget(self, number: int) -> None:
        listener = self._listeners.pop(number, None)
        if listener is not None:
            listener.leave()
        self._note_kinds()

    def _note_kinds(self) -> None:
        kinds = [kind for listener in self._listeners.values() for kind in listener.kinds]
        self.hears_chats = any(issubclass(event, kind) for event in _OF_CHATS for kind in kinds)

    async def _run_handler(
        self, listener: Listener, call: Callable[[RuntimeEvent], Awaitable[None]], scope: trio.CancelScope
    ) -> None:
        with scope:
            while True:
                # No local name: who waits for the next event would keep the last one, with its chat.
                await self._handle(await listener.get(), call)
                await trio.lowlevel.checkpoint()

    def _tell_failure(self, event: RuntimeEvent, error: Exception) -> None:
        # A handler of failures that fails would otherwise go round for ever.
        if not isinstance(event, HandlerFailed):
            self.emit(HandlerFailed(event=type(event).__name__, error=error))

    async def _handle(self, event: RuntimeEvent, call: Callable[[RuntimeEvent], Awaitable[None]]) -> None:
        await contain(partial(call, event), report=partial(self._tell_failure, event))

    async def _in_thread(self, handler: Callable[[RuntimeEvent], object], event: RuntimeEvent) -> None:
        await trio.to_thread.run_sync(handler, event, limiter=self._limiter, abandon_on_cancel=True)


async def _call(handler: Callable[[RuntimeEvent], object], event: RuntimeEvent) -> None:
    returned = handler(event)
    if inspect.isawaitable(returned):
        await returned


def _check_kinds(kinds: tuple[object, ...]) -> None:
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, RuntimeEvent)):
            raise ConfigError(f"kind: must be a class of event, not {kind!r}")


def _check_queue(queue: object) -> None:
    if isinstance(queue, bool) or not isinstance(queue, int) or queue < 1:
        raise ConfigError(f"queue: must be a whole number of at least 1, not {queue!r}")


def _positional(handler: object) -> list[str]:
    """The names of the arguments that a call must give: one where a builtin does not say, none for no function."""
    if not callable(handler):
        return []
    try:
        parameters = inspect.signature(handler).parameters.values()
    except (TypeError, ValueError):
        return ["event"]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    takes_one = any(p.kind in (*kinds, inspect.Parameter.VAR_POSITIONAL) for p in parameters)
    return needed or (["event"] if takes_one else [])
