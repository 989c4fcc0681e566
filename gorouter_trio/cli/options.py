"""The options that all commands share, and the client that they ask for."""

from __future__ import annotations

import os
import random
import resource
import signal
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import trio
from cyclopts import Parameter

from ..client import Client, open_client
from ..config import DEFAULT_MODEL, ClientConfig, PoolLimits, PricePolicy, Seams, Secret
from ..simulator import Simulator, SimulatorConfig, serve_simulator
from .failures import CliError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = [
    "FLAG",
    "REALISTIC",
    "CommonOptions",
    "client_config",
    "on_interrupt",
    "open_chosen_client",
    "open_simulator",
    "open_simulator_for",
    "raise_file_limit",
]

FLAG = Parameter(negative="", show_default=False)
"""A switch without a `--no-` twin."""

# Of the order of a small hosted model, and a few times faster, since somebody waits for it.
REALISTIC = SimulatorConfig(latency_s=0.12, first_token_s=0.08, tokens_per_s=260.0, jitter=0.4)
_SIMULATED_KEY = Secret("sk-or-v1-simulated")
_SPARE_FILES = 64


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every command takes."""

    model: str | None = None
    """Model to ask, such as openai/gpt-4o-mini."""
    base_url: str | None = None
    """Where the API is; by default OPENROUTER_BASE_URL, or OpenRouter itself."""
    simulate: Annotated[bool, FLAG] = False
    """Ask an OpenRouter simulated in this process: no key, no cost."""
    seed: int | None = None
    """Seed of everything random, the simulated answers included."""
    json: Annotated[bool, FLAG] = False
    """Print data as JSON."""


def raise_file_limit(wanted: int) -> int:
    """Let the process open so many files, or as many as the system allows it; returns how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def _reserve_files(connections: int) -> None:
    needed = connections + _SPARE_FILES
    allowed = raise_file_limit(needed)
    if allowed < needed:
        raise CliError(f"so many connections need {needed} open files, and the system allows {allowed} (ulimit -n)")


@asynccontextmanager
async def open_simulator(config: SimulatorConfig) -> AsyncIterator[str]:
    """The base URL of a simulator on a loopback port of its own."""
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(serve_simulator, Simulator(config))
        try:
            yield base_url
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_chosen_client(
    options: CommonOptions,
    *,
    max_connections: int = 8,
    simulator: SimulatorConfig = REALISTIC,
    system: str | None = None,
    has_prices: bool = False,
) -> AsyncIterator[Client]:
    """The client that the options ask for; raises `CliError` when there is no key for it.

    `simulator` is what `--simulate` talks to, with the seed of the options. Without `has_prices` the list of prices,
    which is several MB, is not fetched: who asks once and shows what the API charged has no use for it.
    """
    config = msgspec.structs.replace(client_config(options, max_connections), system=system)
    if not has_prices:
        config = msgspec.structs.replace(config, prices=PricePolicy(on_start=False, refresh_s=None))
    if not options.simulate:
        _reserve_files(max_connections)
        async with open_client(config) as client:
            yield client
        return
    # Both ends of every connection are in this process.
    _reserve_files(2 * max_connections)
    async with (
        open_simulator(msgspec.structs.replace(simulator, seed=options.seed or 0)) as base_url,
        open_client(config, base_url=base_url, api_key=_SIMULATED_KEY) as client,
    ):
        yield client


@asynccontextmanager
async def open_simulator_for(options: CommonOptions) -> AsyncIterator[dict[str, object]]:
    """The settings of a client that talks to a simulator, where the options ask for one."""
    if not options.simulate:
        yield {}
        return
    async with open_simulator(msgspec.structs.replace(REALISTIC, seed=options.seed or 0)) as base_url:
        yield {"base_url": base_url, "api_key": _SIMULATED_KEY}


def client_config(options: CommonOptions, max_connections: int) -> ClientConfig:
    """The settings that the options ask for; raises `CliError` when there is no key for them."""
    if options.simulate and options.base_url is not None:
        raise CliError("--simulate and --base-url exclude each other")
    if not options.simulate and not os.environ.get("OPENROUTER_API_KEY", "").strip():
        raise CliError("no API key: set OPENROUTER_API_KEY, or use --simulate to try it without one")
    seams = Seams() if options.seed is None else Seams(random=random.Random(options.seed))
    pool = PoolLimits(max_connections=max_connections)
    return ClientConfig(base_url=options.base_url, model=options.model or DEFAULT_MODEL, pool=pool, seams=seams)


@asynccontextmanager
async def on_interrupt(act: Callable[[], None], again: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Call `act` at the first Ctrl-C, in place of a `KeyboardInterrupt`, and `again` at the second.

    The one after that is a `KeyboardInterrupt` again.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(_act_at_interrupts, [act] if again is None else [act, again])
        yield
        nursery.cancel_scope.cancel()


async def _act_at_interrupts(
    acts: list[Callable[[], None]], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        task_status.started()
        for act in acts:
            await anext(signals)
            act()
