"""Another store for the histories, for as long as the plugin lives: a Redis, or any other."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from ..errors import ConfigError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from ..abc import HistoryStore
    from ..client import Client
    from ..network import TlsConfig
    from ..transport.resp_client import RedisExecutor

__all__ = ["HistoryPlugin", "RedisHistoryPlugin"]

_CLOSE_S = 10.0


class HistoryPlugin:
    """Keeps the histories of sessions in `store` from its beginning to its end; then the former store is back.

    What a session was asked before the change ends in the store that it began in. `closes_store` has the store closed
    when the plugin ends, after the sessions, which end before plugins do. A store that another has put in its place
    meanwhile stays.
    """

    name = "history"

    def __init__(self, store: HistoryStore, *, closes_store: bool = False) -> None:
        self._store = store
        self._closes_store = closes_store

    @asynccontextmanager
    async def __call__(self, client: Client) -> AsyncIterator[None]:
        """Called by the client."""
        former, store = client.store, self._store
        try:
            await store.version("is it there")
            client.set_store(store)
            yield
        finally:
            if client.store is store:
                client.set_store(former)
            if self._closes_store:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                    await store.aclose()


class RedisHistoryPlugin(HistoryPlugin):
    """`HistoryPlugin` with a `RedisStore`: of a URL or of a client, or one that is given whole.

    `client` is what `RedisStore` takes, a URL or an object with `async def execute(*args)`, with its `prefix`, `ttl_s`
    and `tls`; or a store, which is its maker's to close. That the server answers is seen when the plugin begins.
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
        if callable(getattr(client, "append", None)):
            super().__init__(client)  # type: ignore[arg-type]  # a store, as just seen
            return
        if not isinstance(client, str) and not callable(getattr(client, "execute", None)):
            raise ConfigError(f"redis history: needs a URL, a client with `execute`, or a store, not {client!r}")
        from ..stores.redis import RedisStore

        super().__init__(
            RedisStore(client, prefix=prefix, ttl_s=ttl_s, tls=tls),  # type: ignore[arg-type]  # one of the two, as just seen
            closes_store=True,
        )
