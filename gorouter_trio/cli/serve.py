"""`gorouter-trio serve`: a gateway in front of a client, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import hashlib
import os
import signal
import ssl
import sys
import tomllib
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import msgspec
import trio
from msgspec import Struct

from ..config import Budget, Secret
from ..errors import ConfigError
from ..gateway import ClusterConfig, GatewayConfig, GatewayLimits, serve_gateway
from ..security import ApiKeyAuth, Principal, SecurityConfig
from ..stores import SqliteStore
from ..tools.registry import Tool
from .batch_options import import_named, is_module_name
from .failures import OK, CliError, find_failure, why
from .options import CommonOptions, open_chosen_client, raise_file_limit
from .simulate import parse_address
from .terminal import print_error, print_json, print_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from ..abc import HistoryStore
    from ..gateway import Gateway

__all__ = ["ServeJob", "find_tools", "read_principals", "run_serve"]

_SECRET_VARIABLE: Final = "GOROUTER_CLUSTER_SECRET"  # noqa: S105 - the name of a variable
_SPARE_FILES: Final = 512
_MIN_TOKEN: Final = 16


class ServeJob(Struct, frozen=True, kw_only=True):
    """What is served, to whom, and where."""

    listen: str
    principals: Path | None = None
    anonymous: bool = False
    origins: Sequence[str] = ()
    models: Sequence[str] | None = None
    operators: Sequence[str] = ("operator",)
    approvers: Sequence[str] = ()
    store: Path | None = None
    redis: str | None = None
    cluster_url: str | None = None
    tools: Sequence[str] = ()
    cert: Path | None = None
    key: Path | None = None
    connections: int = 20_000
    per_address: int = 256
    upstream: int = 64
    drain_s: float = 10.0
    budget_usd: str | None = None
    tenant_budget_usd: str | None = None
    session_budget_usd: str | None = None


class _Person(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    token: str | None = None
    sha256: str | None = None
    tenant: str = ""
    roles: list[str] = []
    scopes: list[str] = []


def read_principals(path: Path) -> ApiKeyAuth:
    """The principals of a TOML file by the digest of their tokens; raises `CliError` that names what is wrong.

    Each is a table with its id as name, a `token` or its `sha256`, and if it likes `tenant`, `roles` and `scopes`.
    """
    try:
        tables = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), dict[str, _Person])
        return ApiKeyAuth(api_keys=_entries(tables))
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise CliError(f"{path}: not TOML: {exc}") from None
    except msgspec.ValidationError as exc:
        raise CliError(f"{path}: {exc}") from None
    except ConfigError as exc:
        raise CliError(f"{path}: {exc.message}") from None


def _entries(tables: Mapping[str, _Person]) -> dict[str | Secret, Principal]:
    found: dict[str | Secret, Principal] = {}
    for name, person in tables.items():
        digest, principal = _entry(name, person)
        if digest in found:
            raise ConfigError(f"{name}: has the token of {found[digest].id}, and nobody could tell them apart")
        found[digest] = principal
    return found


def _entry(name: str, person: _Person) -> tuple[str, Principal]:
    if (person.token is None) == (person.sha256 is None):
        raise ConfigError(f"{name}: needs a token or the sha256 of one")
    if person.token is not None and len(person.token) < _MIN_TOKEN:
        raise ConfigError(f"{name}: a token must have {_MIN_TOKEN} characters at least")
    if person.token is not None and person.token != person.token.strip():
        # Nobody minds them in what a client brings, so that it would not be this one.
        raise ConfigError(f"{name}: a token must have no spaces or line ends around it")
    digest = person.sha256 if person.token is None else hashlib.sha256(person.token.encode()).hexdigest()
    digest = cast("str", digest).lower()
    principal = Principal(id=name, tenant=person.tenant, roles=frozenset(person.roles), scopes=frozenset(person.scopes))
    return f"sha256:{digest}", principal


async def run_serve(job: ServeJob, common: CommonOptions) -> int:
    """Serve until SIGTERM or Ctrl-C, and drain then; a second one stops at once."""
    host, port = parse_address(job.listen)
    config, tls, tools = _config(job), _tls(job), find_tools(job.tools)
    security, budget = None if job.principals is None else _security(job.principals), _budget(job)
    raise_file_limit(job.connections + job.upstream + _SPARE_FILES)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(_open_store(job))
        fields = {"store": store, "security": security, "budget": budget}
        client = await stack.enter_async_context(
            open_chosen_client(common, max_connections=job.upstream, has_prices=True, fields=fields)
        )
        serve = partial(serve_gateway, client, config, host=host, port=port, tls=tls, tools=tools)
        try:
            await _serve(serve, as_json=common.json)
        except BaseExceptionGroup as group:
            failure = find_failure(group)
            if not isinstance(failure, OSError):
                raise
            raise CliError(f"{job.listen}: {why(failure)}") from failure
    return OK


async def _serve(serve: Callable[..., Awaitable[object]], *, as_json: bool) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            gateway: Gateway = await nursery.start(_serve_and_end, serve, nursery.cancel_scope)
            if as_json:
                print_json({"url": gateway.url, "http_url": gateway.http_url})
            else:
                print_text(f"{gateway.url}\n")
            await _stop_at_signals(signals, gateway, nursery.cancel_scope)


async def _serve_and_end(
    serve: Callable[..., Awaitable[object]], scope: trio.CancelScope, *, task_status: trio.TaskStatus[Gateway]
) -> None:
    """Serve, and end the command with the gateway, which waits for signals meanwhile."""
    await serve(task_status=task_status)
    scope.cancel()


async def _stop_at_signals(signals: AsyncIterator[int], gateway: Gateway, scope: trio.CancelScope) -> None:
    await anext(signals)
    if sys.stderr is not None and sys.stderr.isatty():
        print_error("Running turns may end; once more stops them.\n")
    gateway.drain()
    await anext(signals)
    scope.cancel()


def _security(path: Path) -> SecurityConfig:
    return SecurityConfig(auth=read_principals(path), require_authentication=True, default_policy="allow-all")


def _budget(job: ServeJob) -> Budget:
    """What may be spent; raises `CliError`."""
    try:
        return Budget(usd=job.budget_usd, tenant_usd=job.tenant_budget_usd, session_usd=job.session_budget_usd)
    except ConfigError as exc:
        raise CliError(exc.message) from None


def _config(job: ServeJob) -> GatewayConfig:
    if job.anonymous == (job.principals is not None):
        raise CliError("who may connect? give --principals FILE, or --anonymous to let everybody in")
    try:
        limits = GatewayLimits(max_connections=job.connections, max_per_address=job.per_address, drain_s=job.drain_s)
        return GatewayConfig(
            origins=job.origins,
            anonymous=job.anonymous,
            models=job.models,
            operator_roles=job.operators,
            approver_roles=job.approvers,
            limits=limits,
            cluster=_cluster(job),
        )
    except ConfigError as exc:
        raise CliError(exc.message) from exc


def _cluster(job: ServeJob) -> ClusterConfig | None:
    if job.cluster_url is None:
        return None
    secret = os.environ.get(_SECRET_VARIABLE, "")
    if job.redis is None or not secret:
        raise CliError(f"--cluster-url needs --redis, and the common secret of the gateways in {_SECRET_VARIABLE}")
    return ClusterConfig(redis=job.redis, secret=Secret(secret), url=job.cluster_url)


def _tls(job: ServeJob) -> ssl.SSLContext | None:
    if job.cert is None:
        if job.key is not None:
            raise CliError("--tls-key needs --tls-cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    try:
        context.load_cert_chain(job.cert, job.key)
    except (OSError, ssl.SSLError) as exc:
        raise CliError(f"{job.cert}: {exc}") from exc
    return context


def find_tools(names: Sequence[str]) -> list[Tool[..., object]]:
    """The tools of modules, those in a `module:name` alone; raises `CliError`."""
    found: list[Tool[..., object]] = []
    for name in names:
        module_name, _, attribute = name.partition(":")
        if not is_module_name(module_name):
            raise CliError(f"--tools must be MODULE or MODULE:NAME, not {name!r}")
        try:
            module = import_named(module_name)
        except ImportError as exc:
            raise CliError(f"--tools {name}: {exc}") from exc
        values = [getattr(module, attribute, None)] if attribute else list(vars(module).values())
        tools = [value for value in values if isinstance(value, Tool)]
        if not tools:
            raise CliError(f"--tools {name}: there is no tool in it")
        # One module may have taken a tool from another, and a turn would refuse to have it twice.
        found += [tool for tool in tools if not any(tool is other for other in found)]
    return found


@asynccontextmanager
async def _open_store(job: ServeJob) -> AsyncIterator[HistoryStore | None]:
    if job.store is not None and job.redis is not None:
        raise CliError("--store and --redis exclude each other")
    if job.redis is not None:
        # What only this needs is not loaded without it.
        from ..stores.redis import RedisStore

        async with RedisStore(job.redis) as redis:
            yield redis
    elif job.store is not None:
        async with SqliteStore(job.store) as store:
            yield store
    else:
        yield None
