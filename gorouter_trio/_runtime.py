"""The runtime: services and sessions in their nurseries, in the order in which they must end."""

from __future__ import annotations

import hmac
import os
import secrets
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, cast
from urllib.parse import urlsplit

import msgspec
import trio

from ._bus import EventBus
from ._contain import contain_sync
from ._guards import Guards, guard_of
from ._pipeline import ChatPipeline
from ._plugin_host import PluginHost, open_plugin_host
from ._prometheus import render
from ._services import Services
from ._turns.chain import Chain
from ._turns.defaults import CallDefaults
from ._turns.gate import Gate
from ._turns.loop import LoopServices
from ._turns.request import TurnEncoder
from .config import DIRECT
from .errors import ConfigError, PermissionDeniedError
from .pool.accounting import Accounting, AccountingReports, AccountingService, open_accounting
from .pool.ledger_file import open_ledger_file
from .pool.refresh import remaining_usd
from .pool.shared import SharedBackend, open_shared_limits
from .pool.tracing import Tracers
from .pool.workers import Pool, open_pool
from .runtime_events import AccountingFailed, CostUnknown, HookFailed, ToolCallDenied
from .session.directory import SessionDirectory
from .session.ownership import open_owners
from .stores.memory import MemoryStore
from .tools.supervisor import ToolSupervisor, open_supervisor
from .transport.compression import accept_encoding
from .transport.connector import connector
from .transport.http import ConnectionLimits, Connector, Origin, RequestHead

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager
    from decimal import Decimal

    from ._prometheus import MetricFamily
    from .abc import HistoryStore
    from .config import ClientConfig
    from .network import Proxy, TlsConfig
    from .pool.ledger import LedgerSink
    from .pool.shared import SharedLimits
    from .secret import Secret
    from .security.rules import Deny, Principal, ToolCheck
    from .session.ownership import Owners
    from .wire.catalog import GenerationInfo, Model

__all__ = ["MetricsSource", "Runtime", "open_runtime"]

MetricsSource: TypeAlias = "Callable[[], Iterable[MetricFamily]]"
"""Gives what it measures, as families; must not wait."""

_USER_AGENT = "gorouter-trio"
_DRAIN_S = 2.0
_STORE_METHODS = ("load", "version", "append", "rewrite", "delete", "erase", "list_keys", "list_sessions", "aclose")


class Runtime:
    """What a client is a face of. Made by `open_runtime`."""

    __slots__ = (
        "_owners",
        "_stores",
        "accounting",
        "bus",
        "chain",
        "config",
        "defaults",
        "guards",
        "metrics_sources",
        "pipeline",
        "plugins",
        "pool",
        "services",
        "sessions",
        "tools",
        "tracers",
    )

    def __init__(
        self,
        config: ClientConfig,
        *,
        accounting: Accounting,
        bus: EventBus,
        chain: Chain,
        defaults: CallDefaults,
        guards: Guards,
        owners: Owners,
        pipeline: ChatPipeline,
        plugins: PluginHost,
        pool: Pool,
        services: Services,
        sessions: SessionDirectory,
        store: HistoryStore,
        tools: ToolSupervisor,
        tracers: Tracers,
    ) -> None:
        self.accounting = accounting
        self.bus = bus
        self.chain = chain
        self.config = config
        self.defaults = defaults
        self.guards = guards
        self.metrics_sources: list[MetricsSource] = []
        self._owners = owners
        self.pipeline = pipeline
        self.plugins = plugins
        self.pool = pool
        self.services = services
        self.sessions = sessions
        self._stores = [_Place(store)]
        self.tools = tools
        self.tracers = tracers

    def extra_metrics(self) -> Iterator[MetricFamily]:
        """What plugins measure; a source that fails is an event, and is left out."""
        for source in self.metrics_sources:
            yield from contain_sync(partial(_listed, source), report=self._tell_failed_source) or ()

    def _tell_failed_source(self, error: Exception) -> None:
        at_s = self.config.seams.wall()
        self.bus.emit(HookFailed(at_s=at_s, hook="metrics source", phase="metrics", error=error))

    def set_model(self, model: str) -> None:
        """Ask `model` where nothing else is named; raises `ConfigError`, having changed nothing."""
        config = msgspec.structs.replace(self.config, model=model)
        self.defaults.change(config)
        self.config = config

    def set_api_key(self, api_key: object) -> None:
        """Use these keys from now on; raises `ConfigError`, having changed nothing."""
        config = msgspec.structs.replace(self.config, api_key=api_key)
        # What stands for no key is not looked up in the environment again.
        config = config.resolved({})
        self.pool.change_keys(config)
        self.config = config

    @property
    def store(self) -> HistoryStore:
        """The store of the histories in use."""
        return self._stores[-1].store

    def set_store(self, store: HistoryStore) -> None:
        """Keep histories there from now on; raises `ConfigError`, having changed nothing."""
        self._change_store(store)
        self._stores[-1] = _Place(store)

    def push_store(self, store: HistoryStore) -> Callable[[], None]:
        """The same until what is returned is called: then this one is taken away, wherever it stands by then."""
        self._change_store(store)
        place = _Place(store)
        self._stores.append(place)
        return partial(self._remove_store, place)

    def _remove_store(self, place: _Place) -> None:
        if place not in self._stores:
            return
        former = self.store
        self._stores.remove(place)
        if self.store is not former:
            self._change_store(self.store)

    def _change_store(self, store: HistoryStore) -> None:
        self.sessions.change_store(_checked(store), self._owners.of(store))


class _Place:
    """A store at its place in the stack; one that stands there twice has two."""

    __slots__ = ("store",)

    def __init__(self, store: HistoryStore) -> None:
        self.store = store


def _listed(source: MetricsSource) -> list[MetricFamily]:
    families = list(source())
    # What is no family shows here, where it harms nobody's else.
    render(families)
    return families


@asynccontextmanager
async def open_runtime(config: ClientConfig) -> AsyncIterator[Runtime]:
    """Run the pool with its accounting, the tools' supervisor, and the session actors above; `config` must be resolved.

    Leaving cancels the sessions and streams first, which save what they have, ends the plugins and the tools, then the
    pool, and last what listens. What the end of the pool cuts off has its rows in the ledger's file.
    """
    wall, guard, store = config.seams.wall, guard_of(config.security), _store(config)
    origin = _origin(cast("str", config.base_url))
    async with (
        _open_bus() as bus,
        _open_shared(config) as shared,
        open_ledger_file(config.ledger, report=_teller_of_failures(config, bus)) as sink,
        open_pool(config, _connector(config, origin), make_head=_head_maker(config, origin), shared=shared) as pool,
        _open_accounting(config, services := _services(config, pool), bus, sink) as accounting,
        open_supervisor(config.tools, guard=guard, wall=wall) as tools,
        open_plugin_host(bus, wall=wall) as plugins,
        open_owners(config.sessions, seams=config.seams) as owners,
        trio.open_nursery() as nursery,
    ):
        pool.charge_to(accounting)
        tracers = tools.tracers = _tracers(bus, wall)
        if shared is not None:
            shared.share_budget(accounting.gate)
        chain = Chain(bus, wall=wall)
        encoder, gate = TurnEncoder(), Gate(guard, wall=wall, on_refused=bus.emit)
        tools.on_denied = partial(_tell_denied, bus, wall)
        defaults = CallDefaults(config, encoder)
        loops = LoopServices(chain, tools, limits=config.tools, wall=wall)
        pipeline = ChatPipeline(pool, loops, gate=gate, nursery=nursery, tracers=tracers, wall=wall)
        sessions = SessionDirectory(
            nursery,
            pipeline=pipeline,
            defaults=defaults,
            encoder=encoder,
            gate=gate,
            store=store,
            config=config.sessions,
            seams=config.seams,
            routing_key=_routing_key(config),
            ownership=owners.of(store),
        )
        nursery.start_soon(sessions.run)
        nursery.start_soon(chain.ended.run)
        guards = Guards(guard, gate=gate, tools=tools, nursery=nursery)
        try:
            yield Runtime(
                config,
                accounting=accounting,
                bus=bus,
                chain=chain,
                defaults=defaults,
                guards=guards,
                owners=owners,
                pipeline=pipeline,
                plugins=plugins,
                pool=pool,
                services=services,
                sessions=sessions,
                store=store,
                tools=tools,
                tracers=tracers,
            )
        finally:
            sessions.close()
            nursery.cancel_scope.cancel()


def _open_shared(config: ClientConfig) -> AbstractAsyncContextManager[SharedLimits | None]:
    backend = cast("SharedBackend | None", config.shared)
    return open_shared_limits(backend, holder=config.seams.new_id(), rng=config.seams.random)


def _store(config: ClientConfig) -> HistoryStore:
    return MemoryStore(wall=config.seams.wall) if config.store is None else _checked(config.store)


def _checked(store: object) -> HistoryStore:
    missing = [name for name in _STORE_METHODS if not callable(getattr(store, name, None))]
    if missing:
        # Not the repr: a URL that was meant for `RedisStore` has a password in it.
        raise ConfigError(f"store: a {type(store).__name__} is no history store: it has no method {missing[0]}")
    return cast("HistoryStore", store)


def _tracers(bus: EventBus, wall: Callable[[], float]) -> Tracers:
    return Tracers(report=lambda error: bus.emit(HookFailed(at_s=wall(), hook="tracer", phase="trace", error=error)))


def _tell_denied(
    bus: EventBus, wall: Callable[[], float], check: ToolCheck, principal: Principal | None, deny: Deny
) -> None:
    if not bus.has_listeners:
        return
    who, tenant = (None, "") if principal is None else (principal.id, principal.tenant)
    bus.emit(
        ToolCallDenied(
            at_s=wall(),
            tool=check.tool,
            call_id=check.call_id,
            reason=deny.reason,
            message=deny.message,
            principal=who,
            tenant=tenant,
            session=check.session,
            retry_after_s=deny.retry_after_s,
        )
    )


def _services(config: ClientConfig, pool: Pool) -> Services:
    return Services(
        pool, read_retries=config.retry.max_retries, total_s=config.deadlines.total_s, wall=config.seams.wall
    )


def _teller_of_failures(config: ClientConfig, bus: EventBus) -> Callable[[Exception], None]:
    return lambda error: bus.emit(AccountingFailed(at_s=config.seams.wall(), error=error))


def _open_accounting(
    config: ClientConfig, services: Services, bus: EventBus, sink: LedgerSink | None
) -> AbstractAsyncContextManager[Accounting]:
    wall = config.seams.wall

    async def models() -> list[Model]:
        return await services.models("/models", {})

    async def generation(generation_id: str) -> GenerationInfo:
        return await services.generation(generation_id, polls=1)

    async def left_usd() -> Decimal | None:
        key = await services.key()
        try:
            balance = await services.credits()
        except PermissionDeniedError:
            # Only some keys may ask.
            balance = None
        return remaining_usd(balance, key)

    reports = AccountingReports(
        prices=bus.emit,
        lost=lambda row: bus.emit(CostUnknown(at_s=wall(), row=row)),
        error=_teller_of_failures(config, bus),
    )
    return open_accounting(config, AccountingService(models, generation, left_usd), reports=reports, sink=sink)


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
