"""What the fronts for asyncio and for threads have in common: everything but how they wait.

Theory of operation. A front is a client of the runtime in another thread (`portal`). `Core` has the ways to use it:
a call with one answer, a stream, a batch, a look at a snapshot. It is written once, as async functions that wait for
nothing but a `Signal`. On asyncio that is a future of the loop; for threads it blocks the thread, so that such an async
function never waits where anybody could see it, and `drive` runs it like any other function.

The program's own functions (tools, approvals, middleware, hooks, handlers, plugins, stores) run at its `Home`, a loop
or worker threads, each in a copy of the context of whoever asked. A cancel goes both ways, and waits on the other side
until what was cancelled has cleaned up, for a bounded time.
"""

from __future__ import annotations

import contextvars
import copy
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import msgspec
import outcome
import trio

from .._callables import is_same
from .._plugin_host import opener_of
from .._turns.chain import Hook
from .._turns.stream import ChatStream, ChunkSource
from ..client import Client, merged_config, open_client, without_secrets
from ..config import hide_keys
from ..errors import ConfigError, DeadlineExceededError, PoolClosedError, SessionBusyError
from ..events import StreamEvent, StreamFinished
from ..runtime_events import RuntimeEvent
from ..secret import Secret
from ..tools.registry import Tool
from ..wire.result import T_co
from .portal import LONGEST_S, Call, Lent, Portal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

    from .._bus import EventFeed, HandlerId
    from .._feed import Observer
    from .._inspect import ClientSnapshot
    from .._runtime import MetricsSource
    from .._turns.chain import ChatState, Middleware, Next
    from .._turns.observing import EndedChat
    from ..abc import HistoryStore, StoredHistory, StoredSession
    from ..batch.job import JobProgress, RunningJob
    from ..batch.runner import Batch, BatchRequest, BatchResult
    from ..batch.settings import StopReason
    from ..config import ApiKey, ClientConfig, ContextPolicy
    from ..pool.budget import AccountStatistics, BudgetStatistics
    from ..pool.costs import CostSnapshot, CostTracker
    from ..pool.ledger import LedgerChange
    from ..pool.tracing import Tracer
    from ..pool.workers import PoolStatistics
    from ..runtime_events import ChatContext
    from ..security.rules import ToolGuard
    from ..session.actor import SessionStatistics
    from ..tools.context import ToolContext
    from ..tools.registry import AnyTool
    from ..wire.catalog import Pricing
    from ..wire.ledger import LedgerRow
    from ..wire.result import ChatResult
    from ..wire.stream import ChatChunk

    _Lot: TypeAlias = tuple[list[BatchRequest], outcome.Outcome[object] | None]

__all__ = [
    "Bridge",
    "BridgedStore",
    "Core",
    "FrontClient",
    "FrontJob",
    "Home",
    "LotReader",
    "SessionName",
    "Signal",
    "StreamCore",
    "call_runtime",
    "checked_config",
    "drive",
    "holding",
]

T = TypeVar("T")
E = TypeVar("E", bound=RuntimeEvent)

_STREAM_ROOM = 256
_BATCH_ROOM = 64
_INPUT_LOT = 64
_INPUT_S = 0.005
_MAX_BRIDGED_TOOLS = 256
_SLACK_S = 1.0
_CLOSING_S = 30.0
_JOIN_S = 1.0
_END_S = 10.0


class SessionName(NamedTuple):
    """What a caller knows a session by: its key, its owner where that is named, and the token that it is asked with.

    The same two times is the same session; its full name is known in the runtime only, where tokens are looked at.
    """

    key: str
    owner: tuple[str, str] | None = None
    token: Secret | None = None

    def asked_with(self, options: Mapping[str, object]) -> SessionName:
        """The name of what is asked with these options, which may bring a token of their own."""
        token = options.get("access_token")
        if token is None:
            return self
        return self._replace(token=Secret(token) if isinstance(token, str) else cast("Secret", token))


AskedSession: TypeAlias = "contextvars.ContextVar[SessionName | None]"


class Signal(Protocol):
    """What a caller waits for; it may be set before, and more often than it is waited for.

    Where several wait, one of them is woken at least, who passes it on.
    """

    def set(self) -> None:
        """Wake who waits, or who will. In the thread of the runtime."""

    def pass_on(self) -> None:
        """Wake another one who waits, or who will. From where they wait."""

    async def wait(self) -> None:
        """Wait until it has been set, and take that back. Raises what interrupts the caller."""

    async def wait_patiently(self, is_done: Callable[[], bool], within_s: float) -> None:
        """Wait until something is so, at most so long, whatever interrupts the caller meanwhile."""


class Home(Protocol):
    """Where the functions of the program run, and its callers wait."""

    portal: Portal[Client]
    holders: set[tuple[SessionName, object]]
    """Sessions that somebody there is in the midst of, with who that is: whose stream is open, whose tool runs."""
    asked: AskedSession
    """In the context of a turn, and so of its tools: its session, by the name that its asker there had for it."""

    def signal(self) -> Signal:
        """A signal for somebody who waits there."""

    def who(self) -> object:
        """Who is calling there: a task, a thread."""

    def check(self, function: Callable[..., object]) -> None:
        """Raise `ConfigError` for a function that cannot run there."""

    def around(self, tool: AnyTool) -> Callable[[ToolContext, Callable[[], object]], object]:
        """What makes the calls of this tool: where its function belongs, and known to be part of the turn."""

    async def run(self, function: Callable[..., object], *args: object, **named: object) -> object:
        """Run a function of the program, and await what it returns if need be. In the runtime.

        Raises what it raises. Cancelling cancels it there, and waits for that as long as it is patient.
        """

    def hold(self, function: Callable[..., object], client: object) -> AbstractAsyncContextManager[object]:
        """A plugin that is a function of the client: entered and left there, by the same task if there are any."""

    def offer(self, function: Callable[[], Coroutine[object, object, None]]) -> Callable[[], object]:
        """An async function in the form that the program calls."""


def drive(coroutine: Coroutine[object, object, T]) -> T:
    """The result of an async function that blocks where it waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    coroutine.close()
    raise ConfigError("an async function cannot be awaited here: give a plain one")


# --- the program's functions ------------------------------------------------------------------------------------------


class _Bridged:
    """A function of the program as one of the runtime; equal to another where the function and its home are."""

    def __init__(self, home: Home, function: Callable[..., object]) -> None:
        self.__wrapped__ = function
        self.__qualname__ = getattr(function, "__qualname__", type(function).__name__)
        self._home = home

    async def __call__(self, *args: object, **named: object) -> object:
        return await self._home.run(self.__wrapped__, *args, **named)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Bridged)
            and self._home is other._home
            and self.__wrapped__ == other.__wrapped__
            and type(self) is type(other)
        )

    def __hash__(self) -> int:
        return hash((id(self._home), self.__wrapped__))


class _BridgedMiddleware(_Bridged):
    """A middleware of the program: what it goes on with runs here, as part of the same turn."""

    async def __call__(self, *args: object, **named: object) -> object:
        context, state, proceed = cast("tuple[ChatContext, ChatState, Next]", args)
        async with trio.open_nursery() as nursery:
            go_on = partial(call_runtime, self._home, proceed, nursery=nursery)
            captured = await outcome.acapture(
                self._home.run, self.__wrapped__, context, state, self._home.offer(go_on), **named
            )
        return captured.unwrap()


class Bridge:
    """Brings the functions of a program at one home into the runtime. What is given twice gives the same twice."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self._tools: dict[object, object] = {}

    def options(self, given: Mapping[str, object]) -> Mapping[str, object]:
        """The options of a turn or a session."""
        if not ("tools" in given or "approve" in given):
            return given
        changed = dict(given)
        tools = changed.get("tools")
        if isinstance(tools, Iterable) and not isinstance(tools, (str, bytes, Mapping)):
            changed["tools"] = [self._tool(source) for source in tools]
        if callable(changed.get("approve")):
            changed["approve"] = self.function(cast("Callable[..., object]", changed["approve"]))
        return changed

    def function(self, function: Callable[..., object]) -> Callable[..., Awaitable[object]]:
        """Any function that is called from the runtime; raises `ConfigError` for what cannot be called."""
        if not callable(function):
            raise ConfigError(f"{function!r}: must be a function")
        self.home.check(function)
        return _Bridged(self.home, function)

    def middleware(self, middleware: Callable[..., object]) -> Callable[..., Awaitable[object]]:
        """A middleware; raises `ConfigError` for what cannot be called."""
        if not callable(middleware):
            raise ConfigError(f"middleware: must be a function of (context, state, proceed), not {middleware!r}")
        self.home.check(middleware)
        return _BridgedMiddleware(self.home, middleware)

    def hook(self, hook: Hook) -> Hook:
        """The functions of a hook."""
        if not isinstance(hook, Hook):
            raise ConfigError(f"hook: must be a Hook, not {hook!r}")
        given = {phase: getattr(hook, phase) for phase in ("before", "after", "on_error")}
        return msgspec.structs.replace(
            hook, **{phase: None if function is None else self.function(function) for phase, function in given.items()}
        )

    def context(self, context: ContextPolicy | None) -> ContextPolicy | None:
        """What makes summaries."""
        if context is None or context.summarise is None:
            return context
        return msgspec.structs.replace(context, summarise=self.function(context.summarise))

    def plugin(self, plugin: object, face: Callable[[Client], object]) -> object:
        """A plugin, which gets `face` of the client that is made for it. Raises `ConfigError` for what is none."""
        if isinstance(plugin, AbstractContextManager):
            name = getattr(plugin, "name", None) or type(plugin).__name__
        else:
            _open, name = opener_of(plugin)
        return _BridgedPlugin(self.home, plugin, face=face, name=name)

    def config(self, config: ClientConfig) -> ClientConfig:
        """The functions among the settings, but for the plugins: they get a client, which is not there yet."""
        changes: dict[str, object] = {"plugins": ()}
        if callable(config.api_key):
            changes["api_key"] = self.function(config.api_key)
        if isinstance(config.store, BridgedStore):
            changes["store"] = config.store.at(self.home)
        changes["sessions"] = msgspec.structs.replace(config.sessions, context=self.context(config.sessions.context))
        return msgspec.structs.replace(config, **changes)

    def _tool(self, source: object) -> object:
        is_tool = isinstance(source, Tool)
        if not is_tool and (not callable(source) or isinstance(source, type)):
            return source
        try:
            known = self._tools.get(source)
        except TypeError:
            # What has no hash cannot be told from another of its kind.
            return self._run_at_home(source)
        if known is None:
            known = self._tools[source] = self._run_at_home(source)
            if len(self._tools) > _MAX_BRIDGED_TOOLS:
                self._tools.pop(next(iter(self._tools)), None)
        return known

    def _run_at_home(self, source: object) -> AnyTool:
        # Asked of an object, since a tool is no subclass of anything.
        tool = source if type(source) is Tool else Tool(cast("Callable[..., object]", source))
        return cast("AnyTool", tool).run_by(self.home.around(cast("AnyTool", tool)))


class _BridgedPlugin:
    """A plugin of the program."""

    def __init__(self, home: Home, plugin: object, *, face: Callable[[Client], object], name: str) -> None:
        self.name = name
        self._home = home
        self._plugin = plugin
        self._face = face

    def __call__(self, client: Client) -> AbstractAsyncContextManager[object]:
        """Open it; called by the host."""
        face = self._face(client)
        if hasattr(self._plugin, "init"):
            return self._begun(face)
        if isinstance(self._plugin, (AbstractAsyncContextManager, AbstractContextManager)):
            return self._home.hold(lambda _face: self._plugin, face)
        return self._home.hold(cast("Callable[..., object]", self._plugin), face)

    @asynccontextmanager
    async def _begun(self, face: object) -> AsyncIterator[None]:
        await self._home.run(cast("_Plugin", self._plugin).init, face)
        try:
            yield
        finally:
            destroy = getattr(self._plugin, "destroy", None)
            if destroy is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _END_S):
                    await self._home.run(destroy)  # noqa: ASYNC102 - as the line above says


class _Plugin(Protocol):
    def init(self, client: object) -> object:
        """Begin."""


class BridgedStore:
    """A store of the program's own: each method of a `HistoryStore`, called where the program runs.

    Give it to `open_client(store=...)` of a front. Its methods are as those of `abc.HistoryStore`, async ones for the
    front for asyncio, plain ones for threads.
    """

    def __init__(self, store: object) -> None:
        self._store = store
        self._home: Home | None = None

    @property
    def durability(self) -> str:
        """What a write that has returned survives."""
        return str(getattr(self._store, "durability", "process"))

    def at(self, home: Home) -> BridgedStore:
        """The same store, with its home."""
        other = copy.copy(self)
        other._home = home  # noqa: SLF001 - one of its own kind
        return other

    async def load(self, key: str) -> StoredHistory:
        """As `HistoryStore.load`."""
        return cast("StoredHistory", await self._run("load", key))

    async def version(self, key: str) -> int:
        """As `HistoryStore.version`."""
        return cast("int", await self._run("version", key))

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.append`."""
        return cast("int", await self._run("append", key, entries, expected_version=expected_version))

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.rewrite`."""
        return cast("int", await self._run("rewrite", key, entries, expected_version=expected_version))

    async def delete(self, key: str) -> bool:
        """As `HistoryStore.delete`."""
        return cast("bool", await self._run("delete", key))

    async def erase(self, key: str) -> bool:
        """As `HistoryStore.erase`."""
        return cast("bool", await self._run("erase", key))

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """As `HistoryStore.list_keys`."""
        return cast("Sequence[str]", await self._run("list_keys", prefix, after=after, limit=limit))

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """As `HistoryStore.list_sessions`."""
        return cast("Sequence[StoredSession]", await self._run("list_sessions", prefix, after=after, limit=limit))

    async def aclose(self) -> None:
        """The program has made the store, and closes it."""
        await trio.lowlevel.checkpoint()

    async def _run(self, method: str, *args: object, **named: object) -> object:
        return await cast("Home", self._home).run(getattr(self._store, method), *args, **named)


# --- opening ----------------------------------------------------------------------------------------------------------


def checked_config(config: ClientConfig | None, fields: dict[str, object]) -> ClientConfig:
    """What the arguments of `open_client` come to; raises `ConfigError`."""
    return merged_config(config, without_secrets(fields))


@asynccontextmanager
async def _open(config: ClientConfig) -> AsyncIterator[Client]:
    """The client in the runtime, and around it what has to be opened in the same loop: a store, a network in memory."""
    async with AsyncExitStack() as stack:
        if _has_to_be_opened(config.transport):
            opened = cast("AbstractAsyncContextManager[object]", config.transport)
            config = msgspec.structs.replace(config, transport=await stack.enter_async_context(opened))
        if hasattr(config.store, "__aenter__"):
            await stack.enter_async_context(cast("AbstractAsyncContextManager[object]", config.store))
        yield await stack.enter_async_context(open_client(config))


def _context_of(home: Home, session: SessionName | None) -> contextvars.Context:
    """The context of a call about this session, which the tools of its turn run in."""
    context = contextvars.copy_context()
    context.run(home.asked.set, session)
    return context


@contextmanager
def holding(home: Home, session: SessionName | None) -> Iterator[None]:
    """Whoever is calling is in the midst of this session, if it is one."""
    if session is None or (holder := (session, home.who())) in home.holders:
        yield
        return
    home.holders.add(holder)
    try:
        yield
    finally:
        home.holders.discard(holder)


async def call_runtime(
    home: Home,
    work: Callable[[], Awaitable[T]],
    *,
    deadline_s: float | None = None,
    is_paid: bool = False,
    nursery: trio.Nursery | None = None,
    patience_s: float = _CLOSING_S,
    context: contextvars.Context | None = None,
    is_inner: bool = False,
) -> T:
    """The answer to a call, from its home. Cancelling cancels it, and waits until that is through."""
    signal = home.signal()
    call = Call(work, deadline_s=deadline_s, on_settled=signal.set, is_paid=is_paid, context=context)
    home.portal.submit(call, nursery, is_inner=is_inner)
    try:
        while call.captured is None:
            await signal.wait()
    except BaseException as exc:
        home.portal.tell(call.cancel)
        if not isinstance(exc, GeneratorExit):
            await signal.wait_patiently(lambda: call.captured is not None, patience_s)  # noqa: ASYNC102 - bounded
        raise
    return call.unwrap()


class LotReader(Generic[T]):
    """What is lent, as its reader sees it: lot after lot."""

    def __init__(self, lent: Lent[T], signal: Signal) -> None:
        self._lent = lent
        self._signal = signal
        # A list, since counting is no single step of a thread.
        self._reading: list[None] = []
        self.partial: Callable[[], ChatResult[object] | None] = _no_partial
        """What had arrived of an answer that was cut off from here."""

    async def read(self) -> list[T]:
        """The next items, all that there are; none at the end. Raises what reading them there has raised.

        Several may read at a time: each item goes to one of them.
        """
        items: list[T] = []
        self._reading.append(None)
        try:
            while not (items := self._lent.take()):
                if self._lent.check_end():
                    break
                await self._signal.wait()
        finally:
            self._reading.pop()
            if self._reading or not items:
                # What has woken this one was for the others as well, the end also for who leaves.
                self._signal.pass_on()
        return items


def _has_to_be_opened(transport: object) -> bool:
    """Whether this is what gives a transport when it is entered, and none yet."""
    is_one = any(hasattr(transport, name) for name in ("handle_async_request", "request", "connect"))
    return hasattr(transport, "__aenter__") and not is_one


class Core:
    """A client of the runtime in another thread; `place` of a subclass gives the bridge to where its caller is."""

    def __init__(self, config: ClientConfig) -> None:
        self._config = config
        self.portal: Portal[Client] = Portal(self._opening)
        self.client: Client = cast("Client", None)
        self.registered: list[tuple[object, object]] = []
        """Middlewares and hooks as they were given, and as they are there."""
        self._patience_s = min(config.sessions.shutdown_grace_s, LONGEST_S) + _SLACK_S
        self._is_of_plugin = False

    def place(self) -> Bridge:
        """The bridge to where the caller is."""
        raise NotImplementedError

    def of(self, client: Client) -> Core:
        """The same for the client of a plugin, which ends while the pool is still there."""
        other = copy.copy(self)
        other.client = client
        other._is_of_plugin = True  # noqa: SLF001 - one of its own kind
        return other

    # Its life

    def _opening(self) -> AbstractAsyncContextManager[Client]:
        return _open(self._config)

    async def open(self, face: Callable[[Core], object]) -> None:
        """Start the runtime and wait until it is open, and plugins have begun; they get `face` of their clients.

        Raises what opening raises; cancelling ends it.
        """
        bridge, plugins = self.place(), self._config.plugins
        self._config = bridge.config(self._config)
        self._signal = bridge.home.signal()
        self.portal.start(self._signal.set)
        try:
            while self.portal.opened is None and self.portal.ended is None:
                await self._signal.wait()
            if self.portal.opened is None and self.portal.ended is not None:
                self.portal.ended.unwrap()
            self.client = cast("outcome.Outcome[Client]", self.portal.opened).unwrap()
            for plugin in plugins:
                await self.register(plugin, face)
        except BaseException:
            self.portal.stop()
            await self._wait_ended()  # noqa: ASYNC102 - bounded
            raise

    async def close(self) -> None:
        """End the runtime, and wait for that, whatever interrupts the caller. Raises what ending it raises."""
        if self.portal.is_foreign:
            return
        self.portal.stop()
        await self._wait_ended()
        if self.portal.ended is not None:
            self.portal.ended.unwrap()

    async def _wait_ended(self) -> None:
        portal = self.portal
        try:
            await self._signal.wait_patiently(lambda: portal.ended is not None, self._patience_s + _CLOSING_S)
        finally:
            if portal.ended is not None:
                portal.join(_JOIN_S)

    # Ways to use it

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        deadline_s: float | None = None,
        is_paid: bool = False,
        session: SessionName | None = None,
    ) -> T:
        """The answer to a call. Cancelling cancels it, and waits until that is through.

        `session` is the one whose turns it waits for; raises `SessionBusyError` where it would wait for itself.
        """
        home = self.place().home
        self._check_holder(home, session)
        return await call_runtime(
            home,
            work,
            deadline_s=deadline_s,
            is_paid=is_paid,
            patience_s=self._patience_s,
            context=_context_of(home, session),
            is_inner=self._is_of_plugin,
        )

    def given(self, options: Mapping[str, object], response_type: type[object] | None = None) -> Mapping[str, Any]:
        """The options of a turn, with functions that the runtime can call."""
        given = self.place().options(options) if options else options
        return given if response_type is None else {"response_type": response_type, **given}

    def now(self, function: Callable[[], T]) -> T:
        """What a function of the client that does not wait returns."""
        return self.portal.run_sync(function)

    async def register(self, plugin: object, face: Callable[[Core], object], *, deadline_s: float | None = None) -> str:
        """Begin a plugin; it gets `face` of its own client."""
        bridged = self.place().plugin(plugin, lambda client: face(self.of(client)))
        return await self.call(partial(self.client.register, bridged), deadline_s=deadline_s)

    @asynccontextmanager
    async def lend(
        self,
        opening: Callable[[], AbstractAsyncContextManager[Callable[[], Awaitable[list[T]]]]],
        *,
        room: int,
        deadline_s: float | None = None,
        is_paid: bool = False,
        session: SessionName | None = None,
    ) -> AsyncIterator[LotReader[T]]:
        """Something of the runtime to read from. Leaving waits until it was left there; cancelling as well."""
        home = self.place().home
        signal = home.signal()
        lent = Lent(
            self.portal.tell,
            opening,
            on_change=signal.set,
            room=room,
            deadline_s=deadline_s,
            is_paid=is_paid,
            context=_context_of(home, session),
        )
        self.portal.lend(lent)
        try:
            while lent.opened is None:
                await signal.wait()
        except BaseException as exc:
            lent.cancel()
            await self._wait_left(lent, signal, exc)  # noqa: ASYNC102 - bounded
            raise
        lent.opened.unwrap()
        try:
            yield LotReader(lent, signal)
        except BaseException as exc:
            lent.leave()
            await self._wait_left(lent, signal, exc)  # noqa: ASYNC102 - bounded
            failure = lent.failure()
            if failure is not None and failure is not exc:
                exc.add_note(f"and leaving the stream failed: {failure}")
            raise
        lent.leave()
        await self._wait_left(lent, signal)
        failure = lent.failure()
        if failure is not None:
            raise failure

    async def _wait_left(self, lent: Lent[T], signal: Signal, exc: BaseException | None = None) -> None:
        # Who is closed by the collector may not wait any more.
        if not isinstance(exc, GeneratorExit):
            try:
                await signal.wait_patiently(lambda: lent.left is not None, self._patience_s)
            finally:
                # Somebody may be reading yet.
                signal.pass_on()

    @asynccontextmanager
    async def stream(
        self,
        open_stream: Callable[[], AbstractAsyncContextManager[ChatStream[T]]],
        *,
        deadline_s: float | None = None,
        session: SessionName | None = None,
    ) -> AsyncIterator[tuple[ChatStream[T], LotReader[StreamEvent]]]:
        """A stream of the runtime, and where it is read; `session` is the one whose turn it is, as for `call`."""
        home = self.place().home
        self._check_holder(home, session)
        held: _Held[ChatStream[T]] = _Held()
        opening = partial(_stream_opened, open_stream, held)
        lending = self.lend(opening, room=_STREAM_ROOM, deadline_s=deadline_s, is_paid=True, session=session)
        async with lending as lots:
            lots.partial = held.partial
            with holding(home, session):
                yield held.value, lots

    def _check_holder(self, home: Home, session: SessionName | None) -> None:
        """Raise `SessionBusyError` where the caller is in the midst of this session, and would wait for itself."""
        if session is not None and home.holders and (session, home.who()) in home.holders:
            raise SessionBusyError(
                f"session {session.key!r}: its stream is open here, or this is a tool of its turn: "
                "it would wait for itself"
            )

    @asynccontextmanager
    async def batch(
        self,
        requests: object,
        open_batch: Callable[[object], AbstractAsyncContextManager[Batch]],
        *,
        deadline_s: float | None = None,
    ) -> AsyncIterator[tuple[Batch, LotReader[BatchResult]]]:
        """A batch of the runtime, and where its results are read; `requests` are read where the program runs."""
        held: _Held[Batch] = _Held()
        source = _input(self.place().home, requests)
        opening = partial(_batch_opened, partial(open_batch, source), held)
        async with self.lend(opening, room=_BATCH_ROOM, deadline_s=deadline_s, is_paid=True) as lots:
            yield held.value, lots

    @asynccontextmanager
    async def job(self, open_job: Callable[[], AbstractAsyncContextManager[RunningJob]]) -> AsyncIterator[RunningJob]:
        """A job of the runtime, opened and closed there."""
        held: _Held[RunningJob] = _Held()
        async with self.lend(partial(_job_opened, open_job, held), room=1):
            yield held.value

    @contextmanager
    def events(
        self, open_feed: Callable[[], AbstractContextManager[EventFeed[E]]]
    ) -> Iterator[tuple[EventFeed[E], LotReader[E]]]:
        """Events of the runtime, and where they are read."""
        signal = self.place().home.signal()
        opened = self.now(open_feed)
        feed = self.now(opened.__enter__)
        try:
            lent = Lent(self.portal.tell, partial(_feed_opened, feed), on_change=signal.set, room=_BATCH_ROOM)
            self.portal.lend(lent)
            try:
                yield feed, LotReader(lent, signal)
            finally:
                lent.leave()
        finally:
            self.now(partial(opened.__exit__, None, None, None))


class FrontClient:
    """What a client of a front does without waiting for anything but the next step of its runtime."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def __repr__(self) -> str:
        return repr(self._core.client)

    def use(self, middleware: Callable[..., object]) -> None:
        """As `gr.Client.use`: around every chat that starts from now on. It runs where the program does."""
        core = self._core
        bridged = cast("Middleware", core.place().middleware(middleware))
        core.now(partial(core.client.use, bridged))
        core.registered.append((middleware, bridged))

    def unuse(self, middleware: Callable[..., object]) -> bool:
        """Take `middleware` out again; False when it was not there."""
        return self._take_back(middleware, lambda bridged: self._core.client.unuse(cast("Middleware", bridged)))

    def add_hook(self, hook: Hook) -> None:
        """As `gr.Client.add_hook`; the functions are called where the program runs."""
        core = self._core
        bridged = core.place().hook(hook)
        core.now(partial(core.client.add_hook, bridged))
        core.registered.append((hook, bridged))

    def remove_hook(self, hook: Hook) -> bool:
        """Take `hook` out again; False when it was not there."""
        return self._take_back(hook, lambda bridged: self._core.client.remove_hook(cast("Hook", bridged)))

    def _take_back(self, given: object, remove: Callable[[object], bool]) -> bool:
        is_found = False
        for entry in [entry for entry in self._core.registered if is_same(entry[0], given)]:
            self._core.registered.remove(entry)
            is_found = self._core.now(partial(remove, entry[1])) or is_found
        return is_found

    def off(self, handler_id: HandlerId) -> bool:
        """End what `on` began, also in the middle of a call; False when it had ended."""
        return self._core.now(partial(self._core.client.off, handler_id))

    def cost_snapshot(self) -> CostSnapshot:
        """What everything cost so far: in all, by model, tenant, session and batch."""
        return self._core.now(self._core.client.cost_snapshot)

    def ledger_rows(self) -> list[LedgerRow]:
        """The last rows of the ledger, oldest first; see `LedgerConfig` for how many are kept."""
        return self._core.now(self._core.client.ledger_rows)

    def budget(self) -> BudgetStatistics:
        """What is left to spend, and what is set aside for requests in flight."""
        return self._core.now(self._core.client.budget)

    def budgets(self, *, most: int = 100) -> list[AccountStatistics]:
        """The budgets with a limit: at most so many, the one with the smallest part of it left first."""
        return self._core.now(partial(self._core.client.budgets, most=most))

    def price(self, model: str) -> Pricing | None:
        """The prices of a model from the list in use, USD for a unit; None when they are not known."""
        return self._core.now(partial(self._core.client.price, model))

    def set_prices(self, own: Mapping[str, Pricing | Mapping[str, object]]) -> None:
        """Take these prices in place of those that were given before; as `PricePolicy.own`, whose errors it raises."""
        self._core.now(partial(self._core.client.set_prices, own))

    def start_price_refresh(self, interval_s: float = 21_600.0) -> None:
        """Refresh prices now and then every `interval_s` seconds, in place of the interval before."""
        self._core.now(partial(self._core.client.start_price_refresh, interval_s))

    def stop_price_refresh(self) -> None:
        """Refresh prices no more, until started again; the last ones stay."""
        self._core.now(self._core.client.stop_price_refresh)

    def statistics(self) -> PoolStatistics:
        """A snapshot of the pool; cheap."""
        return self._core.now(self._core.client.statistics)

    def session_statistics(self) -> dict[str, SessionStatistics]:
        """A snapshot of each active session, by its full key, the one that was used the longest time ago first."""
        return self._core.now(self._core.client.session_statistics)

    @property
    def active_sessions(self) -> int:
        """How many sessions are active: have an actor."""
        return self._core.client.active_sessions

    def inspect(self, *, sessions: int = 1_000) -> ClientSnapshot:
        """What everything in the client does now; as `gr.Client.inspect`."""
        return self._core.now(partial(self._core.client.inspect, sessions=sessions))

    # Observers, tracers and sources of numbers: what must not wait is called where it happens, in the runtime's thread

    def observe(self, observer: Observer[EndedChat]) -> None:
        """As `gr.Client.observe`; called in the thread of the runtime, for which it must be quick and safe."""
        self._core.now(partial(self._core.client.observe, observer))

    def unobserve(self, observer: Observer[EndedChat]) -> bool:
        """Give `observer` what has ended so far, and then nothing more; False when it was not there."""
        return self._core.now(partial(self._core.client.unobserve, observer))

    def observe_ledger(self, observer: Observer[LedgerChange]) -> None:
        """As `gr.Client.observe_ledger`; called as the observers of `observe`."""
        self._core.now(partial(self._core.client.observe_ledger, observer))

    def unobserve_ledger(self, observer: Observer[LedgerChange]) -> bool:
        """Give `observer` what there is, and then nothing more; False when it was not there."""
        return self._core.now(partial(self._core.client.unobserve_ledger, observer))

    def flush_observers(self) -> None:
        """Give all observers what has ended so far, now."""
        self._core.now(self._core.client.flush_observers)

    def add_tracer(self, tracer: Tracer) -> None:
        """As `gr.Client.add_tracer`; called as the observers of `observe`."""
        self._core.now(partial(self._core.client.add_tracer, tracer))

    def remove_tracer(self, tracer: Tracer) -> bool:
        """Tell `tracer` of nothing more; False when it was not there."""
        return self._core.now(partial(self._core.client.remove_tracer, tracer))

    def metrics_text(self) -> str:
        """The numbers of the client in the text format of Prometheus; as `gr.Client.metrics_text`."""
        return self._core.now(self._core.client.metrics_text)

    def add_metrics(self, source: MetricsSource) -> None:
        """As `gr.Client.add_metrics`; called as the observers of `observe`."""
        self._core.now(partial(self._core.client.add_metrics, source))

    def remove_metrics(self, source: MetricsSource) -> bool:
        """Ask `source` no more; False when it was not there."""
        return self._core.now(partial(self._core.client.remove_metrics, source))

    # What may change while it runs

    @property
    def base_url(self) -> str:
        """Where the API is."""
        return self._core.client.base_url

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return self._core.client.default_model

    def set_model(self, model: str) -> None:
        """Ask `model` from now on where a request names none; as `gr.Client.set_model`."""
        self._core.now(partial(self._core.client.set_model, model))

    def set_api_key(self, api_key: str | Secret | Sequence[str | Secret | ApiKey] | Mapping[str, float]) -> None:
        """Use this key, or these, from now on; as `gr.Client.set_api_key`."""
        try:
            change = partial(self._core.client.set_api_key, hide_keys(api_key))  # type: ignore[arg-type]  # keys, hidden
        finally:
            # A traceback may show locals, and this is one of them.
            del api_key
        self._core.now(change)

    @property
    def store(self) -> HistoryStore:
        """The store of the histories in use. Its methods are for the runtime."""
        return self._core.client.store

    def set_store(self, store: HistoryStore) -> None:
        """Keep the histories of sessions there from now on; as `gr.Client.set_store`.

        A store of the program's own is given as a `Store`. Nobody but the program closes it.
        """
        self._core.now(partial(self._core.client.set_store, self._bridged(store)))

    def push_store(self, store: HistoryStore) -> Callable[[], None]:
        """As `set_store`, until what is returned is called; as `gr.Client.push_store`."""
        return partial(self._core.now, self._core.now(partial(self._core.client.push_store, self._bridged(store))))

    def _bridged(self, store: HistoryStore) -> HistoryStore:
        return store.at(self._core.place().home) if isinstance(store, BridgedStore) else store

    @property
    def security(self) -> ToolGuard:
        """What stands in front of tools and turns: as it was given, or made of the `SecurityConfig` that was given."""
        return self._core.client.security

    def set_security(self, security: object | None) -> None:
        """Let this guard stand in front of tools and turns from now on; as `gr.Client.set_security`."""
        self._core.now(partial(self._core.client.set_security, security))

    def push_security(self, security: object) -> Callable[[], None]:
        """As `set_security`, until what is returned is called; as `gr.Client.push_security`."""
        return partial(self._core.now, self._core.now(partial(self._core.client.push_security, security)))

    @property
    def cost_tracker(self) -> CostTracker:
        """What counts the rows of the ledger."""
        return self._core.client.cost_tracker

    def set_cost_tracker(self, tracker: CostTracker) -> None:
        """Let `tracker` count the rows of the ledger from now on; as `gr.Client.set_cost_tracker`."""
        self._core.now(partial(self._core.client.set_cost_tracker, tracker))


class FrontJob:
    """A job that is open, without what waits; as `batch.job.RunningJob`."""

    def __init__(self, core: Core, job: RunningJob) -> None:
        self._core = core
        self._job = job
        self.job = job.job
        self.name = job.name

    def __repr__(self) -> str:
        return repr(self._job)

    def progress(self) -> JobProgress:
        """A snapshot; cheap."""
        return self._core.now(self._job.progress)

    def drain(self, reason: StopReason = "interrupted") -> None:
        """Take no more rows; those in flight come to their end. The job can go on later. Never waits."""
        self._core.portal.tell(partial(self._job.drain, reason))

    def cancel(self) -> None:
        """Cancel what is in flight as well, which may be billed. The job can go on later. Never waits."""
        self._core.portal.tell(self._job.cancel)


def _no_partial() -> None:
    return None


class _Held(Generic[T]):
    """Where the runtime puts what it has opened, before it says that it has."""

    value: T
    cut: outcome.Outcome[ChatResult[object]] | None = None
    """What a stream had come to when it was cut off, as far as it could tell."""

    def partial(self) -> ChatResult[object] | None:
        return self.cut.value if isinstance(self.cut, outcome.Value) else None


@asynccontextmanager
async def _stream_opened(
    open_stream: Callable[[], AbstractAsyncContextManager[ChatStream[T]]], held: _Held[ChatStream[T]]
) -> AsyncIterator[Callable[[], Awaitable[list[StreamEvent]]]]:
    async with open_stream() as held.value:
        try:
            yield held.value.read_some
        except BaseException:
            held.cut = outcome.capture(held.value.so_far)
            raise


@asynccontextmanager
async def _batch_opened(
    open_batch: Callable[[], AbstractAsyncContextManager[Batch]], held: _Held[Batch]
) -> AsyncIterator[Callable[[], Awaitable[list[BatchResult]]]]:
    async with open_batch() as held.value:
        yield partial(_next_of, held.value)


@asynccontextmanager
async def _job_opened(
    open_job: Callable[[], AbstractAsyncContextManager[RunningJob]], held: _Held[RunningJob]
) -> AsyncIterator[Callable[[], Awaitable[list[None]]]]:
    async with open_job() as held.value:
        yield _nothing


async def _nothing() -> list[None]:
    await trio.lowlevel.checkpoint()
    return []


@asynccontextmanager
async def _feed_opened(feed: EventFeed[E]) -> AsyncIterator[Callable[[], Awaitable[list[E]]]]:
    yield partial(_next_of, feed)


async def _next_of(items: AsyncIterator[T]) -> list[T]:
    try:
        return [await anext(items)]
    except StopAsyncIteration:
        return []


class StreamCore(ChatStream[T_co]):
    """A stream of the runtime, read where it is lent to; `now` is that of its `Core`."""

    def __init__(
        self,
        stream: ChatStream[T_co],
        lots: LotReader[StreamEvent],
        *,
        now: Callable[[Callable[[], ChatResult[object]]], ChatResult[object]],
    ) -> None:
        super().__init__(_Elsewhere(stream, now))
        self._stream = stream
        self._lots = lots
        self._finish: StreamFinished | None = None

    async def __anext__(self) -> StreamEvent:
        position = self._position
        if position >= len(self._events):
            await self._read()
            position = 0
        self._position = position + 1
        return self._events[position]

    async def read_some(self) -> list[StreamEvent]:
        """As `gr.ChatStream.read_some`."""
        position, self._position = self._position, len(self._events)
        if position < len(self._events):
            return self._events[position:]
        try:
            await self._read()
        except StopAsyncIteration:
            return []
        self._position = len(self._events)
        return self._events[:]

    async def _read(self) -> None:
        if self._finish is None:
            if self._result is not None:
                raise StopAsyncIteration
            if self._raw_chunks:
                self._stream.add_chunks()
            try:
                events = await self._lots.read()
            except (DeadlineExceededError, PoolClosedError) as exc:
                # Cut off from here, so that the reader there had nothing to say.
                exc.partial = exc.partial or self._lots.partial()
                raise
            # The end comes by itself, as where it was read: it is then that there is a result.
            if events and isinstance(events[-1], StreamFinished):
                self._finish = cast("StreamFinished", events.pop())
            if events:
                self._events = events
                return
        if self._finish is None:
            raise StopAsyncIteration
        self._events, self._finish = [self._finish], None
        self._result = self._stream.result


class _Elsewhere(ChunkSource):
    """The source of a stream that is read by another thread."""

    def __init__(
        self, stream: ChatStream[object], now: Callable[[Callable[[], ChatResult[object]]], ChatResult[object]]
    ) -> None:
        self._stream = stream
        self._now = now

    @property
    def generation_id(self) -> str | None:
        return self._stream.generation_id

    async def read(self) -> list[ChatChunk]:
        raise NotImplementedError

    def result(self) -> ChatResult[object]:
        # Asked of the thread that reads meanwhile.
        return self._now(self._stream.so_far)


def _input(home: Home, requests: object) -> object:
    """The input of a batch, to be iterated where the program runs; what is at hand, or no input at all, as it is."""
    if isinstance(requests, (str, bytes, Mapping, list, tuple)):
        return requests
    if isinstance(requests, AsyncIterable):
        return _Input(home, _take_one, aiter(requests))
    return _Input(home, _take_lot, iter(requests)) if isinstance(requests, Iterable) else requests


class _Input(Generic[T]):
    """An input that is iterated at its home, a lot at a time where it does not wait."""

    def __init__(self, home: Home, take: Callable[[T], Awaitable[_Lot] | _Lot], iterator: T) -> None:
        self._home = home
        self._take = partial(take, iterator)
        self._lot: deque[BatchRequest] = deque()
        self._error: BaseException | None = None
        self._is_ended = False

    def __aiter__(self) -> _Input[T]:
        return self

    async def __anext__(self) -> BatchRequest:
        if not (self._lot or self._is_ended):
            items, captured = cast("_Lot", await self._home.run(self._take))
            self._lot.extend(items)
            self._is_ended = captured is not None
            self._error = captured.error if isinstance(captured, outcome.Error) else None
        if self._lot:
            return self._lot.popleft()
        if self._error is not None and not isinstance(self._error, StopIteration):
            raise self._error
        raise StopAsyncIteration


def _take_lot(iterator: Iterator[BatchRequest]) -> _Lot:
    """A lot, as many as come at once."""
    lot: list[BatchRequest] = []
    enough_at = time.perf_counter() + _INPUT_S
    while len(lot) < _INPUT_LOT:
        captured = outcome.capture(next, iterator)
        if isinstance(captured, outcome.Error):
            return lot, captured
        lot.append(captured.value)
        if time.perf_counter() >= enough_at:
            break
    return lot, None


async def _take_one(iterator: AsyncIterator[BatchRequest]) -> _Lot:
    async for request in iterator:
        return [request], None
    return [], outcome.Value(None)
