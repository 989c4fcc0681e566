"""Words in settings: in a file they are checked as it is read, in Python a misspelt one would be taken for another."""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args, get_origin

import msgspec
from msgspec import Struct

from ..errors import ConfigError

__all__ = ["check_words"]


def check_words(settings: Struct) -> None:
    """Raise `ConfigError` unless each field that takes one of some words has one of those."""
    for name, words in _words_of(type(settings)).items():
        value = getattr(settings, name)
        if value not in words:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, words))}, not {value!r}")


@cache
def _words_of(kind: type[Struct]) -> dict[str, tuple[object, ...]]:
    fields = msgspec.structs.fields(kind)
    return {field.name: get_args(field.type) for field in fields if get_origin(field.type) is Literal}
