"""`serve_gateway`: WebSocket and plain HTTP on one port, around one client."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

import msgspec
import trio

from .._contain import contain
from ..errors import GorouterError
from ..transport.http_server import HttpServer, HttpServerLimits, open_http_server
from .cluster import PEER_HEADER, Cluster
from .config import GatewayConfig
from .connection import Connection
from .core import GatewayCore, check_open
from .http import HttpFront
from .metrics import snapshot
from .streams import GuardedStream, PrefixedStream, is_upgrade, read_head

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from ..client import Client
    from .protocol import GatewaySnapshot

__all__ = ["Gateway", "serve_gateway"]

_BACKLOG = 1_024
_PROOF = re.compile(rb"\r\n%b:([^\r\n]*)\r\n" % PEER_HEADER.encode(), re.IGNORECASE)
_LAST_WORDS_S = 3.0
# Those that come together and say nothing are let go one after the other: over this part of the time that they have, in
# steps of the golden ratio, which leave no gap and no crowd in any stretch of arrivals.
_SPREAD = 0.3
_GOLDEN = 0.618033988749895


class Gateway:
    """A running gateway: the started value of `serve_gateway`."""

    def __init__(self, core: GatewayCore, *, url: str, http_url: str, accepting: trio.CancelScope) -> None:
        self._core = core
        self._accepting = accepting
        self.url = url
        self.http_url = http_url

    def __repr__(self) -> str:
        state = "draining" if self._core.is_draining else "running"
        return f"<Gateway {self.url}: {state}, {len(self._core.connections)} connections>"

    def statistics(self) -> GatewaySnapshot:
        """What it does now; takes some microseconds for each active session."""
        return snapshot(self._core)

    def drain(self) -> None:
        """Stop: take no new connection and no new turn, let running turns end within `limits.drain_s`, close the rest.

        `serve_gateway` returns then. Never waits.
        """
        self._accepting.cancel()


async def serve_gateway(
    client: Client,
    config: GatewayConfig | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: ssl.SSLContext | None = None,
    tools: Sequence[Callable[..., object]] = (),
    listeners: Sequence[trio.SocketListener] | None = None,
    wall: Callable[[], float] = time.time,
    on_error: Callable[[Exception], None] | None = None,
    task_status: trio.TaskStatus[Gateway] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the sessions of `client` until `Gateway.drain`, and return when everything has ended.

    The started value is the `Gateway`. Port 0 takes a free one; `listeners` are taken, and closed, in place of one at
    `host` and `port`. `tools` are functions that every turn may call; they run here. `on_error` is called with errors
    that nobody has foreseen and must not raise; without it they go to the log. The client stays its owner's to close.

    Cancelling stops at once: running turns are interrupted, and what had arrived is stored by the client's sessions.
    Raises `ConfigError` for a client that lets everybody in without `anonymous`, `OSError` for a port that is taken,
    `StoreError` where the Redis of its cluster does not answer at the beginning.
    """
    config = config or GatewayConfig()
    check_open(client, config)
    bound = listeners or await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
    urls = _urls(bound[0], host, is_tls=tls is not None)
    failure: GorouterError | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                cluster = await _join(config, urls[0], nursery=nursery, wall=wall)
            except GorouterError as exc:
                # Raised outside, where nothing makes a group of it.
                failure = exc
            else:
                core = GatewayCore(
                    client, config, nursery=nursery, wall=wall, tools=tools, cluster=cluster, on_error=on_error
                )
                await _run(core, bound, urls=urls, tls=tls, task_status=task_status, nursery=nursery)
    finally:
        for listener in bound:
            listener.socket.close()
    if failure is not None:
        raise failure


async def _run(
    core: GatewayCore,
    bound: Sequence[trio.SocketListener],
    *,
    urls: tuple[str, str],
    tls: ssl.SSLContext | None,
    task_status: trio.TaskStatus[Gateway],
    nursery: trio.Nursery,
) -> None:
    nursery.start_soon(core.keep)
    try:
        await _serve(core, bound, urls=urls, tls=tls, task_status=task_status)
    finally:
        nursery.cancel_scope.cancel()
        await _leave(core.cluster)  # noqa: ASYNC102 - shields itself, bounded


async def _leave(cluster: Cluster | None) -> None:
    """Tell the others, shielded and bounded."""
    if cluster is not None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_WORDS_S):
            await cluster.leave()
            await cluster.aclose()


async def _join(config: GatewayConfig, url: str, *, nursery: trio.Nursery, wall: Callable[[], float]) -> Cluster | None:
    if config.cluster is None:
        return None
    place = msgspec.structs.replace(config.cluster, url=config.cluster.url or url)
    cluster = Cluster(place, name=config.name, nursery=nursery, wall=wall)
    try:
        await nursery.start(cluster.run)
    except BaseException:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _LAST_WORDS_S):
            await cluster.aclose()  # noqa: ASYNC102 - as the line above says
        raise
    return cluster


async def _serve(
    core: GatewayCore,
    bound: Sequence[trio.SocketListener],
    *,
    urls: tuple[str, str],
    tls: ssl.SSLContext | None,
    task_status: trio.TaskStatus[Gateway],
) -> None:
    limits = _http_limits(core.config)
    async with (
        open_http_server(HttpFront(core).handler, limits=limits, on_error=core.report, wall=core.wall) as http,
        trio.open_nursery() as connections,
    ):
        door = _Door(core, http, tls=tls)
        task_status.started(Gateway(core, url=urls[0], http_url=urls[1], accepting=door.accepting))
        await door.accept(bound, connections)
        connections.cancel_scope.deadline = trio.current_time() + core.limits.drain_s + _LAST_WORDS_S
        http.drain()
        await core.drain()


def _http_limits(config: GatewayConfig) -> HttpServerLimits:
    limits = config.limits
    return HttpServerLimits(
        max_header_bytes=16_384,
        max_body_bytes=limits.max_message_bytes,
        max_connections=limits.max_http_connections,
        idle_timeout_s=15.0,
        request_timeout_s=10.0,
        send_timeout_s=limits.send_s,
        drain_timeout_s=limits.drain_s,
    )


def _urls(listener: trio.SocketListener, host: str, *, is_tls: bool) -> tuple[str, str]:
    address = listener.socket.getsockname()
    shown = f"[{host}]" if ":" in host else host
    secure = "s" if is_tls else ""
    return f"ws{secure}://{shown}:{address[1]}", f"http{secure}://{shown}:{address[1]}"


class _Door:
    """Takes connections in, and tells WebSocket from plain HTTP by the first request."""

    def __init__(self, core: GatewayCore, http: HttpServer, *, tls: ssl.SSLContext | None) -> None:
        self._core = core
        self._http = http
        self._tls = tls
        self._arrivals = 0
        self.accepting = trio.CancelScope()

    async def accept(self, listeners: Sequence[trio.SocketListener], connections: trio.Nursery) -> None:
        """Accept until `accepting` is cancelled; closes the listeners."""
        with self.accepting:
            await trio.serve_listeners(self._serve, list(listeners), handler_nursery=connections)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection, with everything that may go wrong in it."""
        failures: list[Exception] = []
        try:
            if self._core.census.admits_unauthenticated():
                await contain(partial(self._admit, stream), report=failures.append)
            else:
                self._core.note_refused("unauthenticated")
        finally:
            await trio.aclose_forcefully(stream)
        for exc in failures:
            if not isinstance(exc, (OSError, trio.BrokenResourceError, trio.ClosedResourceError)):
                self._core.report(exc)

    async def _admit(self, tcp: trio.SocketStream) -> None:
        census, limits = self._core.census, self._core.limits
        deadline = trio.current_time() + self._patience_s()
        address = _address(tcp)
        stream: trio.abc.Stream = tcp
        head = b""
        census.unauthenticated += 1
        try:
            with trio.move_on_at(deadline) as scope:
                stream = await self._secured(tcp)
                head = await read_head(stream)
        finally:
            census.unauthenticated -= 1
        if scope.cancelled_caught or not head:
            if scope.cancelled_caught:
                self._core.note_refused("slow")
            return
        if is_upgrade(head):
            is_peer = self._is_peer(head)
            limits = self._core.limits_for(is_peer=is_peer)
            guarded = GuardedStream(stream, head, address=address, limits=limits)
            connection = Connection(self._core, guarded, deadline=deadline, is_peer=is_peer)
            self._core.entered(connection)
            await connection.run()
        else:
            await self._http.serve_stream(PrefixedStream(stream, head, address=address))

    def _patience_s(self) -> float:
        self._arrivals += 1
        return self._core.limits.authenticate_s * (1 - _SPREAD * (self._arrivals * _GOLDEN % 1))

    def _is_peer(self, head: bytes) -> bool:
        """Whether it is another gateway of the cluster."""
        cluster = self._core.cluster
        found = None if cluster is None else _PROOF.search(head)
        return cluster is not None and found is not None and cluster.is_peer(found[1].decode("latin-1").strip())

    async def _secured(self, tcp: trio.SocketStream) -> trio.abc.Stream:
        if self._tls is None:
            return tcp
        stream = trio.SSLStream(tcp, self._tls, server_side=True, https_compatible=True)
        await stream.do_handshake()
        return cast("trio.abc.Stream", stream)


def _address(stream: trio.SocketStream) -> str:
    with suppress(OSError):
        return str(stream.socket.getpeername()[0])
    return ""
