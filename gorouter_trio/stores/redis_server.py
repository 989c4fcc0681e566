"""How a Redis is set up: what it keeps over a crash, and what is to be feared; and having its files written anew."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

import trio
from msgspec import Struct

from .._contain import contain
from ..errors import StoreError

if TYPE_CHECKING:
    from ..transport.resp import Argument, Reply

__all__ = ["Ask", "ServerReport", "decide_report", "inspect_server", "inspect_through", "rewrite_files"]

_POLL_S = 0.02
# What a server says that writes already.
_BUSY = ("in progress", "child process is active")
_SETTINGS = ("appendonly", "appendfsync", "save", "maxmemory", "maxmemory-policy")


class Ask(Protocol):
    """Sends a command and returns its reply."""

    async def __call__(self, *command: Argument) -> Reply: ...


class ServerReport(Struct, frozen=True):
    """What the server keeps over a crash, as `RedisStore.durability` tells it, and what to warn of."""

    durability: str = "unknown"
    warnings: tuple[str, ...] = ()


async def inspect_server(ask: Ask, *, has_ttl: bool) -> ServerReport:
    """Ask the server how it is set up. Where it does not say, that is what there is to warn of.

    Raises `StoreError` when it cannot be reached.
    """
    settings: dict[str, str] = {}
    role = "master"
    try:
        for name in _SETTINGS:
            settings |= _pairs(await ask("CONFIG", "GET", name))
        told = await ask("ROLE")
        role = _text(told[0]) if isinstance(told, list) and told else role
    except StoreError as exc:
        if exc.kind not in {"refused", "denied"}:
            raise
        settings = {}
    return decide_report(settings, role=role, has_ttl=has_ttl)


async def inspect_through(ask: Ask, *, has_ttl: bool) -> ServerReport:
    """`inspect_server` through a client that is not ours, of whose errors only it knows what they mean.

    Where the server answers, they mean that it does not say how it is set up. Raises what the client raises where not.
    """
    report = await contain(partial(inspect_server, ask, has_ttl=has_ttl), report=_leave)
    if report is not None:
        return report
    await ask("PING")
    return decide_report({}, role="", has_ttl=has_ttl)


def _leave(_error: Exception) -> None:
    """It is seen by what is asked next."""


def decide_report(settings: dict[str, str], *, role: str, has_ttl: bool) -> ServerReport:
    """What settings come to. Pure."""
    if "appendonly" not in settings:
        return ServerReport(
            "unknown", ("the server does not tell how it is set up (CONFIG GET): what a crash of it loses is unknown",)
        )
    warnings: list[str] = []
    durability = _durability(settings)
    said = _SAYINGS.get(durability)
    if said:
        warnings.append(said)
    if role != "master":
        warnings.append(f"the server is a {role}, no master: it takes no writes, or loses them")
    policy = settings.get("maxmemory-policy", "noeviction")
    may_evict = policy.startswith("allkeys") or (policy.startswith("volatile") and has_ttl)
    if settings.get("maxmemory", "0") != "0" and may_evict:
        warnings.append(f"the server drops sessions when its memory is full (maxmemory-policy {policy})")
    return ServerReport(durability, tuple(warnings))


_SAYINGS = {
    "none": "the server keeps nothing: a restart of it loses every session (set appendonly yes)",
    "rdb": "the server saves snapshots only: a crash loses what was written since the last one (set appendonly yes)",
    "aof-no": "the server leaves it to its system when to write (appendfsync no): a loss of power loses up to a minute",
}


def _durability(settings: dict[str, str]) -> str:
    if settings["appendonly"] == "yes":
        return f"aof-{settings.get('appendfsync', 'everysec')}"
    return "rdb" if settings.get("save") else "none"


async def rewrite_files(ask: Ask) -> None:
    """Have the server write what files it keeps anew, and wait until it has.

    Raises `StoreError` when it does not do so.
    """
    info = await _persistence(ask)
    if info.get("aof_enabled") == "1":
        await _have_rewritten(ask, "BGREWRITEAOF", status="aof_last_bgrewrite_status")
    if _pairs(await ask("CONFIG", "GET", "save")).get("save") or info.get("rdb_saves", "0") != "0":
        await _have_rewritten(ask, "BGSAVE", status="rdb_last_bgsave_status")


async def _have_rewritten(ask: Ask, command: str, *, status: str) -> None:
    while not await _begin_rewriting(ask, command):
        pass
    info = await _wait_until_free(ask)
    if info.get(status, "ok") != "ok":
        raise StoreError(f"the server could not write its files anew ({command}); see its log", kind="io")


async def _begin_rewriting(ask: Ask, command: str) -> bool:
    """Whether the server has begun; False when somebody else was faster."""
    # One that runs already has begun before, and may have the text in it.
    await _wait_until_free(ask)
    try:
        await ask(command)
    except StoreError as exc:
        if exc.kind != "refused" or not any(saying in exc.message for saying in _BUSY):
            raise
        return False
    return True


async def _wait_until_free(ask: Ask) -> dict[str, str]:
    """Wait until no child of the server writes, nor is to."""
    while True:
        info = await _persistence(ask)
        busy = ("rdb_bgsave_in_progress", "aof_rewrite_in_progress", "aof_rewrite_scheduled")
        if all(info.get(name, "0") == "0" for name in busy):
            return info
        await trio.sleep(_POLL_S)


async def _persistence(ask: Ask) -> dict[str, str]:
    told = _text(await ask("INFO", "persistence"))
    return {name: value for name, _, value in (line.partition(":") for line in told.splitlines())}


def _pairs(reply: Reply) -> dict[str, str]:
    """What CONFIG GET says: a dict, or in RESP2 a flat list."""
    if isinstance(reply, dict):
        return {_text(name): _text(value) for name, value in reply.items()}
    items = cast("list[object]", reply)
    return {_text(items[at]): _text(items[at + 1]) for at in range(0, len(items) - 1, 2)}


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
