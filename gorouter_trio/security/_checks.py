"""Checks of settings: each raises `SecurityConfigError` with the place, or gives the value as it is kept."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import TypeGuard, TypeVar

from ..errors import SecurityConfigError

__all__ = [
    "check_choice",
    "check_count",
    "check_kind",
    "check_name",
    "check_names",
    "check_seconds",
    "frozen_mapping",
    "is_finite",
]

T = TypeVar("T")

_MAX_NAME_BYTES = 4096


def check_name(place: str, value: object) -> str:
    """A name: text that is not blank, can be encoded, and is no longer than a session's id may be."""
    if not isinstance(value, str):
        raise SecurityConfigError(f"{place}: must be a str, not a {type(value).__name__}")
    if not value.strip():
        raise SecurityConfigError(f"{place}: must not be blank")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise SecurityConfigError(f"{place}: holds half of a surrogate pair, which is no text") from None
    if size > _MAX_NAME_BYTES:
        raise SecurityConfigError(f"{place}: is {size} bytes long, more than {_MAX_NAME_BYTES}")
    return value


def check_names(place: str, value: object) -> tuple[str, ...]:
    """Several names, in their order. A lone str is refused: it would be taken for its letters."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, AbstractSet)):
        raise SecurityConfigError(f"{place}: must be several names, such as ['a', 'b'], not {type(value).__name__}")
    return tuple(check_name(f"{place}[{index}]", name) for index, name in enumerate(value))


def check_count(place: str, value: object, *, least: int, most: int) -> None:
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SecurityConfigError(f"{place}: must be a whole number from {least} to {most}, not {value!r}")


def check_seconds(place: str, value: object, *, most: float, zero: bool = False) -> None:
    """A duration above zero, or from zero on, up to `most` seconds."""
    if not is_finite(value):
        raise SecurityConfigError(f"{place}: must be a number of seconds, not {value!r}")
    if not (value >= 0 if zero else value > 0) or value > most:
        least = "from 0" if zero else "more than 0"
        raise SecurityConfigError(f"{place}: must be {least} and at most {most:g} seconds, not {value!r}")


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a number that a float can be; a bool is none."""
    # Compared, since `math.isfinite` raises for an int that no float can be.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max


def check_choice(place: str, value: object, choices: Sequence[str]) -> None:
    """One of several words."""
    if value not in choices:
        raise SecurityConfigError(f"{place}: must be one of {', '.join(choices)}, not {value!r}")


def check_kind(place: str, value: object, kind: type[T]) -> T:
    """A value of one type; a subclass of it will do, except that a bool is no int."""
    if not isinstance(value, kind):
        raise SecurityConfigError(f"{place}: must be a {kind.__name__}, not a {type(value).__name__}")
    return value


def frozen_mapping(place: str, value: object, kind: type[T]) -> Mapping[str, T]:
    """A copy that nobody can change, of a mapping from names to values of one type."""
    if not isinstance(value, Mapping):
        raise SecurityConfigError(f"{place}: must be a mapping, not a {type(value).__name__}")
    return MappingProxyType(
        {check_name(f"{place}: a key", name): check_kind(f"{place}[{name!r}]", v, kind) for name, v in value.items()}
    )
