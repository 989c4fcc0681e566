"""The host of plugins: each in a task of its own, begun one after the other and ended in reverse.

Theory of operation. A plugin is something with `init(client)` and `destroy()`, an async context manager, or a function
of the client that gives one, which may hold nurseries: so each plugin is entered and left in one and
the same task. That task is shielded once it has begun, so that a cancel from outside ends plugins when their turn has
come, after what they serve; `PluginHost.end_all`, which always runs, ends each in a bounded time. A plugin that fails
to begin has never been there: what it had registered is taken back. One
that fails later, or while it ends, harms nobody else: its error is an event, and the first error of ending
is raised when all have ended.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import trio

from ._callables import can_take
from ._contain import contain
from .errors import ConfigError
from .runtime_events import PluginFailed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ._bus import EventBus

__all__ = ["END_S", "PluginHost", "Registrar", "open_plugin_host", "opener_of"]

END_S = 10.0
"""How long a plugin has to end."""


class Registrar(Protocol):
    """The client as one plugin sees it: what it registers through it can be taken back."""

    def undo(self) -> None:
        """Take back everything that was registered, also once more."""


_Opened: TypeAlias = AbstractAsyncContextManager[object]


class _Running:
    """A plugin that has begun."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.scope = trio.CancelScope()
        self.stop = trio.Event()
        self.ended = trio.Event()
        self.error: Exception | None = None


class PluginHost:
    """Made by `open_plugin_host`; plugins run in its nursery."""

    def __init__(self, nursery: trio.Nursery, bus: EventBus, *, wall: Callable[[], float]) -> None:
        self._nursery = nursery
        self._bus = bus
        self._wall = wall
        self._running: dict[str, _Running] = {}
        self._is_ending = False

    def __repr__(self) -> str:
        return f"<PluginHost: {', '.join(self._running) or 'empty'}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The plugins that run, in the order in which they began."""
        return tuple(self._running)

    async def register(self, plugin: object, client: Registrar) -> str:
        """Begin `plugin` and return its name; `client` is for it alone.

        Raises `ConfigError` for what is no plugin and for a name that is taken, and what the plugin raises while
        it begins: nothing of it is left then. Cancelling takes it back as well.
        """
        opened, name = opener_of(plugin)
        if name in self._running:
            raise ConfigError(f"plugins: there is one with the name {name!r} already")
        running = self._running[name] = _Running(name)
        try:
            await self._nursery.start(self._run, partial(opened, client), client, running)
        except BaseException:
            self._forget(running)
            client.undo()
            raise
        return name

    async def unregister(self, name: str) -> bool:
        """End the plugin with this name and take back what it registered; False when there is none.

        Raises what it raises while it ends, and `TimeoutError` for one that has to be cancelled.
        """
        running = self._running.get(name)
        if running is None:
            await trio.lowlevel.checkpoint()
            return False
        await self._end(running)
        await running.ended.wait()
        if running.error is not None:
            raise running.error
        return True

    async def end_all(self) -> None:
        """End all plugins in reverse order, each in a bounded time; raises the first error, once all have ended.

        One that takes longer is cancelled, and does not take the time of the others.
        """
        first: Exception | None = None
        self._is_ending = True
        try:
            for running in reversed(list(self._running.values())):
                await self._end(running)
                first = first or running.error
        finally:
            for running in self._running.values():
                running.scope.cancel()
        if first is not None:
            raise first

    async def _end(self, running: _Running) -> None:
        """Let a plugin end, and cancel it when it takes too long, which is its error then."""
        running.stop.set()
        with trio.move_on_after(END_S) as scope:
            await running.ended.wait()
        if scope.cancelled_caught:
            running.scope.cancel()
            running.error = TimeoutError(f"the plugin {running.name!r} did not end in {END_S:g} s")

    async def _run(
        self, opened: Callable[[], _Opened], client: Registrar, running: _Running, *, task_status: trio.TaskStatus[None]
    ) -> None:
        is_begun = False

        async def live() -> None:
            nonlocal is_begun
            async with opened():
                is_begun = True
                task_status.started()
                # Whoever began it may have been cancelled; from here on it is for the host to end it.
                await trio.lowlevel.checkpoint_if_cancelled()
                running.scope.shield = not self._is_ending
                await running.stop.wait()

        def report(error: Exception) -> None:
            running.error = error

        try:
            with running.scope:
                await contain(live, report=report)
        finally:
            client.undo()
            running.ended.set()
            if is_begun:
                self._forget(running)
        if running.error is None:
            return
        if not is_begun:
            raise running.error
        self._bus.emit(PluginFailed(at_s=self._wall(), plugin=running.name, error=running.error))

    def _forget(self, running: _Running) -> None:
        """Free its name, which may be that of another by now."""
        if self._running.get(running.name) is running:
            del self._running[running.name]


@asynccontextmanager
async def open_plugin_host(bus: EventBus, *, wall: Callable[[], float]) -> AsyncIterator[PluginHost]:
    """A host without plugins. Leaving ends them all, shielded and bounded, and raises the first error of that."""
    async with trio.open_nursery() as nursery:
        host: PluginHost = PluginHost(nursery, bus, wall=wall)
        try:
            yield host
        finally:
            bound_s = END_S * (len(host.names) + 1)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + bound_s):
                await host.end_all()
            nursery.cancel_scope.cancel()


def opener_of(plugin: object) -> tuple[Callable[[object], _Opened], str]:
    """How a plugin is opened, and what it is called."""
    name = getattr(plugin, "name", None) or getattr(plugin, "__name__", None) or type(plugin).__name__
    if not isinstance(name, str):
        raise ConfigError(f"plugins: the name of a plugin must be a text, not {name!r}")
    if isinstance(plugin, type):
        raise ConfigError(f"plugins: {name} is a class; give an object of it")
    init, destroy = getattr(plugin, "init", None), getattr(plugin, "destroy", None)
    if init is not None:
        if not (can_take(init, 1) and (destroy is None or can_take(destroy, 0))):
            raise ConfigError(f"plugins: {name} needs init(client), and destroy() if it has one")
        return partial(_initialised, init, destroy), name
    if isinstance(plugin, AbstractAsyncContextManager):
        return partial(_given, plugin), name
    if callable(plugin) and can_take(plugin, 1):
        return partial(_entered, name, plugin), name
    raise ConfigError(
        f"plugins: {name} is no plugin: it needs init(client) and destroy(), or to be an async context "
        "manager, or a function of the client that gives one"
    )


def _given(plugin: AbstractAsyncContextManager[object], _client: object) -> _Opened:
    return plugin


def _entered(name: str, plugin: Callable[[object], object], client: object) -> _Opened:
    opened = plugin(client)
    if not isinstance(opened, AbstractAsyncContextManager):
        raise ConfigError(f"plugins: {name} gave {opened!r}, which is no async context manager")
    return cast("_Opened", opened)


@asynccontextmanager
async def _initialised(
    init: Callable[[object], object], destroy: Callable[[], object] | None, client: object
) -> AsyncIterator[None]:
    await _maybe_awaited(init(client))
    try:
        yield
    finally:
        if destroy is not None:
            await _destroyed(destroy)  # noqa: ASYNC102 - shields itself, bounded


async def _destroyed(destroy: Callable[[], object]) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + END_S) as scope:
        await _maybe_awaited(destroy())
    if scope.cancelled_caught:
        raise TimeoutError(f"destroy() did not end in {END_S:g} s")


async def _maybe_awaited(returned: object) -> None:
    if inspect.isawaitable(returned):
        await cast("Awaitable[object]", returned)
