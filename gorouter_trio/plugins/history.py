"""Another store for the histories, for as long as the plugin lives: a Redis, or any other."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

import trio

from ..errors import ConfigError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable

    from ..abc import HistoryStore
    from ..client import Client
    from ..network import TlsConfig
    from ..transport.resp_client import RedisExecutor

__all__ = ["HistoryPlugin", "RedisHistoryPlugin"]

_CLOSE_S = 10.0


class HistoryPlugin:
    """Keeps the histories of sessions in `store` from its beginning to its end; then the former store is back.

    What a session was asked before the change ends in the store that it began in. `closes_store` has the store closed
    when the plugin ends, after the sessions, which end before plugins do; a plugin that fails to begin leaves it open,
    and may be begun again. Stores are a stack, as guards are: whichever plugin ends first takes its own away, and a
    store that another has put in its place meanwhile stays.

    Raises `ConfigError` for what is no store.
    """

    name = "history"

    def __init__(self, store: HistoryStore, *, closes_store: bool = False) -> None:
        if not _is_store(store):
            raise ConfigError(f"{self.name}: needs a store of histories, not {store!r}")
        self._store = store
        self._closes_store = closes_store

    @asynccontextmanager
    async def __call__(self, client: Client) -> AsyncIterator[None]:
        """Called by the client."""
        is_begun = False
        try:
            async with _in_use(self._store, client):
                is_begun = True
                yield
        finally:
            if is_begun and self._closes_store:
                await _close(self._store)  # noqa: ASYNC102 - shields itself, and is bounded


class RedisHistoryPlugin(HistoryPlugin):
    """`HistoryPlugin` with a `RedisStore`: of a URL or of a client, or one that is given whole.

    `client` is what `RedisStore` takes, a URL or an object with `async def execute(*args)`, with its `prefix`, `ttl_s`
    and `tls`; or a store, which is its maker's to close. That the server answers is seen when the plugin begins; after
    it has ended, or has failed to begin, it may be begun again.
    """

    name = "redis history"

    def __init__(
        self,
        client: str | RedisExecutor | HistoryStore,
        *,
        prefix: str = "gorouter",
        ttl_s: float | None = None,
        tls: TlsConfig | ssl.SSLContext | None = None,
    ) -> None:
        self._make: Callable[[], HistoryStore] | None = None
        if _is_store(client):
            super().__init__(cast("HistoryStore", client))
            return
        if not isinstance(client, str) and not callable(getattr(client, "execute", None)):
            raise ConfigError(f"redis history: needs a URL, a client with `execute`, or a store, not {client!r}")
        from ..stores.redis import RedisStore

        self._make = partial(RedisStore, cast("str | RedisExecutor", client), prefix=prefix, ttl_s=ttl_s, tls=tls)
        # What cannot be is told here, not when the plugin begins.
        super().__init__(self._make())

    @asynccontextmanager
    async def __call__(self, client: Client) -> AsyncIterator[None]:
        """Called by the client."""
        if self._make is None:
            async with super().__call__(client):
                yield
            return
        # One that was closed cannot be opened again.
        store = self._make()
        try:
            async with _in_use(store, client):
                yield
        finally:
            await _close(store)  # noqa: ASYNC102 - shields itself, and is bounded


def _is_store(given: object) -> bool:
    return all(callable(getattr(given, name, None)) for name in ("append", "load", "version"))


@asynccontextmanager
async def _in_use(store: HistoryStore, client: Client) -> AsyncIterator[None]:
    """Let `store` have the histories once it has been seen to answer."""
    await store.version("is it there")
    pop = client.push_store(store)
    try:
        yield
    finally:
        pop()


async def _close(store: HistoryStore) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
        await store.aclose()
