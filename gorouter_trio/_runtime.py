"""The runtime: services and sessions in their nurseries, in the order in which they must end."""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import trio

from ._bus import EventBus
from ._chain import Chain
from ._pipeline import ChatPipeline
from ._plugin_host import PluginHost, open_plugin_host
from .config import DIRECT
from .errors import ConfigError
from .pool.shared import SharedBackend, open_shared_limits
from .pool.workers import Pool, open_pool
from .session.directory import SessionDirectory
from .session.ownership import open_ownership
from .stores.memory import MemoryStore
from .transport.compression import accept_encoding
from .transport.connector import connector
from .transport.http import ConnectionLimits, Connector, Origin, RequestHead

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

    from .abc import HistoryStore
    from .config import ClientConfig
    from .network import Proxy, TlsConfig
    from .secret import Secret

__all__ = ["Runtime", "open_runtime"]

_USER_AGENT = "gorouter-trio"
_DRAIN_S = 2.0


class Runtime:
    """What a client is a face of. Made by `open_runtime`."""

    __slots__ = ("bus", "chain", "config", "pipeline", "plugins", "pool", "sessions", "store")

    def __init__(
        self,
        config: ClientConfig,
        *,
        bus: EventBus,
        chain: Chain,
        pool: Pool,
        pipeline: ChatPipeline,
        plugins: PluginHost,
        sessions: SessionDirectory,
        store: HistoryStore,
    ) -> None:
        self.config = config
        self.bus = bus
        self.chain = chain
        self.pool = pool
        self.pipeline = pipeline
        self.plugins = plugins
        self.sessions = sessions
        self.store = store


@asynccontextmanager
async def open_runtime(config: ClientConfig) -> AsyncIterator[Runtime]:
    """Run the pool, and the session actors above it; `config` must be resolved.

    Leaving cancels the sessions first, which save what they have, ends the plugins, then the pool, and last what
    listens.
    """
    origin = _origin(cast("str", config.base_url))
    store = cast("HistoryStore", config.store) if config.store is not None else MemoryStore(wall=config.seams.wall)
    async with (
        _open_bus() as bus,
        open_shared_limits(
            cast("SharedBackend | None", config.shared), holder=config.seams.new_id(), rng=config.seams.random
        ) as shared,
        open_pool(config, _connector(config, origin), make_head=_head_maker(config, origin), shared=shared) as pool,
        open_plugin_host(bus, wall=config.seams.wall) as plugins,
        open_ownership(store, config.sessions, seams=config.seams) as ownership,
        trio.open_nursery() as nursery,
    ):
        chain = Chain(bus, wall=config.seams.wall)
        pipeline = ChatPipeline(pool, chain, wall=config.seams.wall)
        sessions = SessionDirectory(
            nursery,
            pipeline=pipeline,
            store=store,
            config=config.sessions,
            seams=config.seams,
            routing_key=_routing_key(config),
            ownership=ownership,
        )
        nursery.start_soon(sessions.run)
        try:
            yield Runtime(
                config,
                bus=bus,
                chain=chain,
                pool=pool,
                pipeline=pipeline,
                plugins=plugins,
                sessions=sessions,
                store=store,
            )
        finally:
            sessions.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _open_bus() -> AsyncIterator[EventBus]:
    """A bus whose handlers get, at the end, a moment for what is queued."""
    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        try:
            yield bus
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _DRAIN_S):
                await bus.drain()
            nursery.cancel_scope.cancel()


def _routing_key(config: ClientConfig) -> bytes:
    """What routing ids are hashed with: the same for the same (first) key, and no way back to it.

    Where a function gives the keys, which change, it is another one for each client.
    """
    secret = config.keys[0].secret.reveal().encode() if config.keys else secrets.token_bytes(32)
    return hmac.digest(secret, b"gorouter-trio routing ids", "sha256")


def _origin(base_url: str) -> Origin:
    parts = urlsplit(base_url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def _connector(config: ClientConfig, origin: Origin) -> Connector:
    pool = config.pool
    limits = ConnectionLimits(
        max_header_bytes=pool.max_header_bytes,
        max_body_bytes=pool.max_body_bytes,
        max_compression_ratio=pool.max_compression_ratio,
    )
    try:
        return connector(
            origin,
            transport=config.transport,
            tls=cast("TlsConfig | ssl.SSLContext | None", config.tls),
            limits=limits,
            proxy=_proxy(config),
            unix_socket=None if config.unix_socket is None else os.fspath(config.unix_socket),
        )
    except TypeError as exc:
        raise ConfigError(str(exc)) from exc


def _proxy(config: ClientConfig) -> Proxy | None:
    """The proxy of settings that are resolved."""
    return None if config.proxy == DIRECT else cast("Proxy | None", config.proxy)


class _HeadMaker:
    """Request heads of one client; the key is read when a head is made and kept nowhere else."""

    def __init__(self, config: ClientConfig, origin: Origin) -> None:
        self._config = config
        self._origin = origin
        self._prefix = urlsplit(cast("str", config.base_url)).path
        self._accept_encoding = accept_encoding(config.compression)

    def __call__(
        self, method: str, path: str, extra: tuple[tuple[str, str], ...] = (), *, key: Secret | None = None
    ) -> RequestHead:
        config = self._config
        secret = config.keys[0].secret if key is None else key
        headers = [
            ("User-Agent", _USER_AGENT),
            ("Accept-Encoding", self._accept_encoding),
            ("Authorization", f"Bearer {secret.reveal()}"),
        ]
        if method == "POST":
            headers.append(("Content-Type", "application/json"))
        if config.app_name:
            headers += [("X-OpenRouter-Title", config.app_name), ("X-Title", config.app_name)]
        if config.referer:
            headers.append(("HTTP-Referer", config.referer))
        if extra:
            named = {name.lower() for name, _value in extra}
            headers = [*(header for header in headers if header[0].lower() not in named), *extra]
        return RequestHead(
            self._origin, method=method, target=self._prefix + path, headers=headers, proxy=_proxy(config)
        )


def _head_maker(config: ClientConfig, origin: Origin) -> _HeadMaker:
    return _HeadMaker(config, origin)
