"""The runtime: services and sessions in their nurseries, in the order in which they must end."""

from __future__ import annotations

import hmac
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

import trio

from ._pipeline import ChatPipeline
from .errors import ConfigError
from .pool.workers import Pool, open_pool
from .session.directory import SessionDirectory
from .stores.memory import MemoryStore
from .transport.connector import connector
from .transport.http import ConnectionLimits, Connector, Origin, RequestHead

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from .abc import HistoryStore
    from .config import ClientConfig, Secret

__all__ = ["Runtime", "open_runtime"]

_USER_AGENT = "gorouter-trio"


class Runtime:
    """What a client is a face of. Made by `open_runtime`."""

    __slots__ = ("config", "pipeline", "pool", "sessions", "store")

    def __init__(
        self, config: ClientConfig, pool: Pool, pipeline: ChatPipeline, sessions: SessionDirectory, store: HistoryStore
    ) -> None:
        self.config = config
        self.pool = pool
        self.pipeline = pipeline
        self.sessions = sessions
        self.store = store


@asynccontextmanager
async def open_runtime(config: ClientConfig) -> AsyncIterator[Runtime]:
    """Run the pool, and the session actors above it; `config` must be resolved.

    Leaving cancels the sessions first, which save what they have, and the pool after them.
    """
    origin = _origin(cast("str", config.base_url))
    store = cast("HistoryStore", config.store) if config.store is not None else MemoryStore()
    async with open_pool(config, _connector(config, origin), make_head=_head_maker(config, origin)) as pool:
        pipeline = ChatPipeline(pool, wall=config.seams.wall)
        async with trio.open_nursery() as nursery:
            sessions = SessionDirectory(
                nursery,
                pipeline=pipeline,
                store=store,
                config=config.sessions,
                seams=config.seams,
                routing_key=_routing_key(cast("Secret", config.api_key)),
            )
            nursery.start_soon(sessions.run)
            try:
                yield Runtime(config, pool, pipeline, sessions, store)
            finally:
                sessions.close()
                nursery.cancel_scope.cancel()


def _routing_key(api_key: Secret) -> bytes:
    """What routing ids are hashed with: the same for the same key, and no way back to it."""
    return hmac.digest(api_key.reveal().encode(), b"gorouter-trio routing ids", "sha256")


def _origin(base_url: str) -> Origin:
    parts = urlsplit(base_url)
    return Origin(parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def _connector(config: ClientConfig, origin: Origin) -> Connector:
    limits = ConnectionLimits(max_header_bytes=config.pool.max_header_bytes, max_body_bytes=config.pool.max_body_bytes)
    if config.tls is not None and not isinstance(config.tls, ssl.SSLContext):
        raise ConfigError("tls: must be an ssl.SSLContext")
    try:
        return connector(origin, transport=config.transport, tls=config.tls, limits=limits)
    except TypeError as exc:
        raise ConfigError(str(exc)) from exc


class _HeadMaker:
    """Request heads of one client; the key is read when a head is made and kept nowhere else."""

    def __init__(self, config: ClientConfig, origin: Origin) -> None:
        self._config = config
        self._origin = origin
        self._prefix = urlsplit(cast("str", config.base_url)).path

    def __call__(self, method: str, path: str, extra: tuple[tuple[str, str], ...] = ()) -> RequestHead:
        config = self._config
        headers = [
            ("User-Agent", _USER_AGENT),
            ("Accept-Encoding", "identity"),
            ("Authorization", f"Bearer {cast('Secret', config.api_key).reveal()}"),
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
        return RequestHead(self._origin, method=method, target=self._prefix + path, headers=headers)


def _head_maker(config: ClientConfig, origin: Origin) -> _HeadMaker:
    return _HeadMaker(config, origin)
