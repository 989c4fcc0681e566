"""What a plugin is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ..client import Client

__all__ = ["ClientPlugin"]


class ClientPlugin(Protocol):
    """Something that is begun with a client, or when it is registered, and ended with the client, in reverse order.

    Both methods may be async; `destroy` may be missing. What was registered through the client that `init` is given
    goes with the plugin. A function of the client that gives an async context manager is a plugin as well, and may
    hold a nursery.
    """

    @property
    def name(self) -> str:
        """What it is called; two plugins of one client cannot have the same name."""

    def init(self, client: Client, /) -> Awaitable[object] | object:
        """Begin. What it raises is what `register` raises, and the client is as it was before."""

    def destroy(self) -> Awaitable[object] | object:
        """End."""
