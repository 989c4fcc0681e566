"""The guard in front of tools and turns, which may be exchanged while the client runs; there is always one.

Theory of operation. Guards are a stack: what was given when the client was opened is at the bottom, and each plugin
that brings one puts it on top and takes its own out again, wherever it stands by then. So plugins may end in any order:
nobody's end lets a guard through that was taken away, and the tools never stand open.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import trio

from .errors import ConfigError
from .security.simple import SimpleGuard

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._turns.gate import Gate
    from .security.rules import ToolGuard
    from .tools.supervisor import ToolSupervisor

__all__ = ["Guards", "guard_of"]


def guard_of(given: object | None) -> ToolGuard:
    """What stands in front of tools and turns; without a setting, the rules that tools declare.

    Raises `ConfigError` for what is no guard.
    """
    if given is None:
        return SimpleGuard()
    if hasattr(given, "default_policy"):
        # A configuration. What only a manager needs is not loaded without one.
        from .security.config import SecurityConfig
        from .security.manager import SecurityManager

        if isinstance(given, SecurityConfig):
            return SecurityManager(given)
    if not (callable(getattr(given, "check", None)) and callable(getattr(given, "audit", None))):
        raise ConfigError(
            f"security: must be a SecurityConfig, a SecurityManager or a guard of tools, not a {type(given).__name__}"
        )
    return cast("ToolGuard", given)


class _Post:
    """A guard at its place in the stack, and the task that delivers its events while it is on top."""

    def __init__(self, guard: ToolGuard) -> None:
        self.guard = guard
        self.scope: trio.CancelScope | None = None


class Guards:
    """The guards of one client; tasks of theirs run in the nursery given."""

    def __init__(self, guard: ToolGuard, *, gate: Gate, tools: ToolSupervisor, nursery: trio.Nursery) -> None:
        self._gate = gate
        self._tools = tools
        self._nursery = nursery
        self._posts = [_Post(guard)]
        self._stand()

    def __repr__(self) -> str:
        return f"<Guards: {self.guard!r}, {len(self._posts) - 1} below>"

    @property
    def guard(self) -> ToolGuard:
        """The one that stands in front now."""
        return self._posts[-1].guard

    def set(self, given: object | None) -> None:
        """Put a guard in the place of the one in front; raises `ConfigError`, having changed nothing."""
        post = _Post(guard_of(given))
        self._leave(self._posts.pop())
        self._posts.append(post)
        self._stand()

    def push(self, given: object) -> Callable[[], None]:
        """Put a guard in front; what is returned takes it away again. Raises `ConfigError`, having changed nothing."""
        if given is None:
            raise ConfigError("security: a plugin must bring a guard; without one nothing would be held back")
        post = _Post(guard_of(given))
        self._leave(self._posts[-1])
        self._posts.append(post)
        self._stand()
        return partial(self._remove, post)

    def _remove(self, post: _Post) -> None:
        if post in self._posts:
            self._leave(post)
            self._posts.remove(post)
            self._stand()

    def _stand(self) -> None:
        """Whoever is on top stands in front, in one step."""
        post = self._posts[-1]
        self._tools.guard = post.guard
        self._gate.change(post.guard)
        if post.scope is None and hasattr(post.guard, "run_events"):
            post.scope = trio.CancelScope()
            self._nursery.start_soon(_run_events, post.guard, post.scope)

    def _leave(self, post: _Post) -> None:
        scope, post.scope = post.scope, None
        if scope is not None:
            scope.cancel()


async def _run_events(guard: object, scope: trio.CancelScope) -> None:
    with scope:
        while True:
            try:
                await guard.run_events()  # type: ignore[attr-defined]  # whoever starts this has looked
            except RuntimeError:
                # Somebody else delivers them: another client, or this one a moment ago.
                await trio.sleep(1)
