"""A guard from elsewhere, for as long as the plugin lives."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias, cast

from .._callables import can_take
from .._guards import guard_of
from ..errors import ConfigError
from ..security.rules import ToolGuard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..client import Client

__all__ = ["ExternalSecurityPlugin", "GuardFactory"]

GuardFactory: TypeAlias = Callable[[ToolGuard], object]
"""Makes a guard, given the one in front now; may be async."""


class ExternalSecurityPlugin:
    """Puts a guard in front of tools and turns when it begins, and takes it away when it ends; the former is back then.

    `security` is a guard, a `SecurityConfig`, or a function, async or not, that makes one of these from the guard in
    front. A function that fails, or gives none, ends the beginning of the plugin with its error, and the former guard
    stays in front. Others may put guards in front meanwhile: each is taken away by whoever has brought it, in whatever
    order, and there is always one.
    """

    name = "external security"

    def __init__(self, security: object | GuardFactory) -> None:
        if security is None:
            raise ConfigError("external security: needs a guard, or a function that makes one")
        self._factory: Callable[[ToolGuard], object] | None = None
        self._security: object = security
        if inspect.isroutine(security):
            if not can_take(security, 1):
                raise ConfigError(f"external security: a factory must be a function of a guard, not {security!r}")
            self._factory = cast("Callable[[ToolGuard], object]", security)
        else:
            self._security = guard_of(security)

    @asynccontextmanager
    async def __call__(self, client: Client) -> AsyncIterator[None]:
        """Called by the client."""
        security = self._security
        if self._factory is not None:
            security = self._factory(client.security)
            if inspect.isawaitable(security):
                security = await cast("Awaitable[object]", security)
        if security is None:
            raise ConfigError("external security: the factory gave no guard; the former one stays")
        pop = client.push_security(security)
        try:
            yield
        finally:
            pop()
