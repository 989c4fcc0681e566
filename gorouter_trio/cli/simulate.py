"""`gorouter-trio simulate`: an OpenRouter on this machine, for programs in any language."""

from __future__ import annotations

import signal
import sys
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec
import trio

from ..errors import ConfigError
from ..simulator import (
    Behaviour,
    Latency,
    Recording,
    Scenario,
    Simulator,
    SimulatorConfig,
    SimulatorStatistics,
    Spread,
    load_recordings,
    serve_simulator,
)
from ..simulator.files import load_config
from .failures import OK, CliError, find_failure, why
from .options import raise_file_limit
from .terminal import facts_table, format_cost, print_error, print_json, print_text, show

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["choose_config", "parse_address", "parse_faults", "read_recordings", "run_simulate"]

B = TypeVar("B", bound=Behaviour)

_NANOUSD = Decimal(1_000_000_000)
_FILES = 65_536
_PORT_DIGITS = 5


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, the host in brackets where it has colons itself; raises `CliError`."""
    host, colon, port = text.rpartition(":")
    is_port = port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS and int(port) <= 65535
    if not colon or not host or not is_port:
        raise CliError(f"--listen must look like 127.0.0.1:8080, not {text!r}; port 0 takes a free one")
    host = host.removeprefix("[").removesuffix("]")
    try:
        # What looks names up does this too, and ends in an error of another kind where there is no such name.
        host.encode("idna")
    except UnicodeError:
        raise CliError(f"--listen: {host!r} cannot be the name of a host") from None
    return host, int(port)


def parse_faults(texts: Sequence[str]) -> dict[str, float]:
    """NAME=SHARE of each text; raises `CliError`."""
    rates: dict[str, float] = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            rates[name] = float(share)
        except ValueError:
            raise CliError(f"--fault must look like 429_upstream=0.05, not {text!r}") from None
    return rates


def read_recordings(path: Path) -> tuple[Recording, ...]:
    """The recordings in a file; raises `CliError`."""
    try:
        return load_recordings(path)
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc
    except ConfigError as exc:
        raise CliError(str(exc)) from exc


def choose_config(path: Path | None, options: Mapping[str, object]) -> SimulatorConfig:
    """The settings of a file, or the default ones, with these in their place; raises `CliError`.

    They go before what the scenario of the file says too.
    """
    try:
        config = SimulatorConfig() if path is None else load_config(path)
        config = msgspec.structs.replace(config, **options)
        if config.scenario is None:
            return config
        return msgspec.structs.replace(config, scenario=_overruled(config.scenario, options))
    except OSError as exc:
        raise CliError(f"{path}: {why(exc)}") from exc
    except ConfigError as exc:
        raise CliError(str(exc)) from exc


def _overruled(scenario: Scenario, options: Mapping[str, object]) -> Scenario:
    """The scenario with what the options say of faults and times, wherever it says something of these."""
    return msgspec.structs.replace(
        _with_options(scenario, options),
        models={name: _with_options(behaviour, options) for name, behaviour in scenario.models.items()},
        phases=tuple([_with_options(phase, options) for phase in scenario.phases]),
    )


def _with_options(behaviour: B, options: Mapping[str, object]) -> B:
    if behaviour.fault_rates is not None and "fault_rates" in options:
        behaviour = msgspec.structs.replace(behaviour, fault_rates=options["fault_rates"])
    if behaviour.latency is not None:
        behaviour = msgspec.structs.replace(behaviour, latency=_timed(behaviour.latency, options))
    return behaviour


def _timed(latency: Latency, options: Mapping[str, object]) -> Latency:
    jitter, speed = options.get("jitter"), options.get("tokens_per_s")
    medians = {
        "head": options.get("latency_s"),
        "first_token": options.get("first_token_s"),
        "per_token": 1 / speed if isinstance(speed, (int, float)) and speed else speed,
    }
    made: dict[str, Spread] = {}
    for name, median_s in medians.items():
        spread: Spread = getattr(latency, name)
        if median_s is not None:
            spread = Spread(median_s=cast("float", median_s))
        if jitter is not None:
            spread = msgspec.structs.replace(spread, kind="uniform", spread=jitter)
        made[name] = spread
    return Latency(**made)


async def run_simulate(config: SimulatorConfig, *, listen: str, as_json: bool) -> int:
    """Serve until Ctrl-C or SIGTERM, then print the counters; being stopped so is success."""
    host, port = parse_address(listen)
    simulator = Simulator(config)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        try:
            await _serve(simulator, signals, host=host, port=port, as_json=as_json)
        except BaseExceptionGroup as group:
            failure = find_failure(group)
            if not isinstance(failure, OSError):
                raise
            raise CliError(f"{listen}: {why(failure)}") from failure
    _show_counters(simulator.statistics(), as_json=as_json)
    return OK


async def _serve(simulator: Simulator, signals: AsyncIterator[int], *, host: str, port: int, as_json: bool) -> None:
    raise_file_limit(_FILES)
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(partial(serve_simulator, simulator, host=host, port=port))
        if as_json:
            print_json({"base_url": base_url})
        else:
            print_text(f"{base_url}\n")
        if sys.stderr is not None and sys.stderr.isatty():
            print_error("Any key that begins with sk- is good. Ctrl-C stops it.\n")
        await anext(signals)
        nursery.cancel_scope.cancel()


def _show_counters(counters: SimulatorStatistics, *, as_json: bool) -> None:
    if as_json:
        print_json(counters)
    else:
        show(facts_table("Simulated", _facts(counters)))


def _facts(c: SimulatorStatistics) -> Iterator[tuple[str, str]]:
    yield "requests", f"{c.received:,}"
    yield "answered", f"{c.completed:,}"
    for name, count in (("refused", c.refused), ("failed", c.failed), ("left by the client", c.cancelled)):
        yield name, f"{count:,}" if count else ""
    yield "at a time", f"{c.max_in_flight:,} at most"
    yield "tokens", f"{c.prompt_tokens:,} in, {c.completion_tokens:,} out"
    yield "charged", format_cost(c.charged_nanousd / _NANOUSD)
