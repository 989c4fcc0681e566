"""Settings of a simulator as TOML: the same names as in Python, with `[scenario.wire]` for what is nested there."""

from __future__ import annotations

import json
import math
import tomllib
from typing import TYPE_CHECKING, Final, cast

import msgspec

from ..errors import ConfigError
from .config import SimulatorConfig
from .limits import FreeTier, Limit
from .scenario import Capacity, Latency, Phase, Scenario, Wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["load_config", "parse_config", "show_config"]

_EXAMPLE: Final = SimulatorConfig(
    limits=(Limit(requests=600),),
    free_tier=FreeTier(requests_per_day=1_000),
    scenario=Scenario(
        capacity=Capacity(concurrent=64),
        latency=Latency(),
        wire=Wire(),
        phases=(Phase(from_s=60.0, to_s=90.0, every_s=600.0, fault_rates={"503": 1.0}),),
    ),
)
_TABLES: Final = frozenset({"free_tier", "scenario", "capacity", "latency", "wire", "head", "first_token", "per_token"})
_ARRAYS: Final = frozenset({"limits", "phases"})
_UNSET: Final = {"tokens": "", "retry_after_s": "5", "api_keys": '["sk-or-v1-example"]', "fault_rates": "{}"}


def load_config(path: Path) -> SimulatorConfig:
    """Read a file; raises `ConfigError` that names it and the line or the key, and `OSError`."""
    try:
        return parse_config(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: not UTF-8 at byte {exc.start}") from None
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from None


def parse_config(text: str) -> SimulatorConfig:
    """The settings in a TOML document; raises `ConfigError` that names the line or the key."""
    try:
        return msgspec.convert(tomllib.loads(text), SimulatorConfig)
    except msgspec.ValidationError as exc:
        reason, _, place = str(exc).partition(" - at `")
        raise ConfigError(f"{place.rstrip('`').removeprefix('$').lstrip('.') or 'settings'}: {reason}") from None
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"not TOML: {exc}") from None


def show_config() -> str:
    """A TOML document with every setting and its default; those that are not set stand there as comments."""
    lines = ["# Settings of a simulated OpenRouter. What is commented out is not set; the values show the form."]
    catalog = {"models": None, "embedding_models": None}
    defaults = cast("dict[str, object]", _plain(msgspec.to_builtins(SimulatorConfig())))
    lines += _table(defaults | catalog, is_set=True)
    given = cast("dict[str, object]", _plain(msgspec.to_builtins(_EXAMPLE)))
    lines += ["", "# [[limits]]", *_table(cast("list[dict[str, object]]", given["limits"])[0])]
    for name in ("free_tier", "scenario"):
        lines += _nested(name, cast("dict[str, object]", given[name]))
    return "\n".join([*lines, ""])


def _plain(value: object) -> object:
    """The same with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _nested(name: str, fields: dict[str, object]) -> Iterator[str]:
    """A table that is not set, and those inside it."""
    if plain := [*_table(fields)]:
        yield from ("", f"# [{name}]", *plain)
    for key, value in fields.items():
        if key in _ARRAYS:
            for item in cast("list[dict[str, object]]", value):
                yield from ("", f"# [[{name}.{key}]]", *_table(item))
        elif key in _TABLES and isinstance(value, dict) and value:
            yield from _nested(f"{name}.{key}", value)


def _table(fields: Mapping[str, object], *, is_set: bool = False) -> Iterator[str]:
    """The fields of one table that are no tables themselves."""
    for name, value in fields.items():
        if name in _TABLES or name in _ARRAYS or (name.endswith("models") and not isinstance(value, list)):
            continue
        mark = "" if is_set and value is not None else "# "
        shown = _UNSET.get(name, "[]") if value is None else _literal(value)
        if shown:
            yield f"{mark}{name} = {shown}"


def _literal(value: object) -> str:
    if isinstance(value, float):
        return "inf" if math.isinf(value) else repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join([f"{json.dumps(key)} = {_literal(item)}" for key, item in value.items()]) + "}"
    return json.dumps(value)
