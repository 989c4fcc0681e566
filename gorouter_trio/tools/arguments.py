"""The arguments of a call: from the text that a model wrote to one value that everything else sees. Pure.

The text is read once. What is checked, shown to the guard and to whoever approves, hashed, reported and
given to the tool is the same value, so that no two parsers can understand the text differently. For that
reason what JSON leaves open is refused: names that come twice, NaN and the infinities, numbers that other
programs cannot hold, halves of surrogate pairs, and nesting without end. The standard library's parser is
used because it alone shows names that come twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from typing import Final, NoReturn, cast

__all__ = ["ArgumentsError", "canonical_json", "digest_of", "parse_arguments"]

# What JSON calls white space, and no more: the parser takes no other.
_BLANKS: Final = " \t\r\n"
_MAX_DEPTH: Final = 64
_MIN_INTEGER: Final = -(2**63)
_MAX_INTEGER: Final = 2**64 - 1
_MAX_DIGITS: Final = 20
# Strings, whose brackets do not count, and the brackets that do. A string without an end takes the rest, or looking for
# one at every quote would take a time that grows with the square.
_BRACKETS: Final = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


class ArgumentsError(ValueError):
    """The text is not a JSON object that every program reads in the same way; the message is for the model."""


def parse_arguments(text: str, *, max_bytes: int) -> dict[str, object]:
    """The arguments that `text` says; no text at all, and null, are no arguments.

    Raises `ArgumentsError` with what is wrong.
    """
    if len(text) > max_bytes or len(text.encode("utf-8", "replace")) > max_bytes:
        raise ArgumentsError(f"the arguments are longer than {max_bytes} bytes")
    if text.strip(_BLANKS) in {"", "null"}:
        return {}
    _check_depth(text)
    try:
        value = _decoder.decode(text)
    except ArgumentsError:
        raise
    except (ValueError, RecursionError) as exc:
        raise ArgumentsError(f"the arguments are not valid JSON: {exc}") from None
    if not isinstance(value, dict):
        raise ArgumentsError("the arguments must be a JSON object")
    try:
        canonical_json(value)
    except UnicodeEncodeError:
        raise ArgumentsError("the arguments contain half of a surrogate pair") from None
    return cast("dict[str, object]", value)


def canonical_json(value: object) -> bytes:
    """One text for each value: sorted names, no white space. `value` comes from `parse_arguments`."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(tool: str, arguments: object) -> bytes:
    """What is equal for equal calls and for no others: 16 bytes."""
    data = b"%d:%b%b" % (len(tool), tool.encode("utf-8", "surrogatepass"), canonical_json(arguments))
    return hashlib.blake2b(data, digest_size=16).digest()


def _check_depth(text: str) -> None:
    depth = 0
    for found in _BRACKETS.finditer(text):
        mark = found[0][0]
        if mark in "[{":
            depth += 1
        elif mark != '"':
            depth -= 1
        if depth > _MAX_DEPTH:
            raise ArgumentsError(f"the arguments are nested more than {_MAX_DEPTH} levels deep")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # In one go: a model can write tens of thousands of names.
        times = Counter(name for name, _value in pairs)
        twice = next(name for name, count in times.items() if count > 1)
        raise ArgumentsError(f"the arguments name {twice[:100]!r} twice in one object")
    return found


def _integer(text: str) -> int:
    if len(text) <= _MAX_DIGITS + 1 and _MIN_INTEGER <= (value := int(text)) <= _MAX_INTEGER:
        return value
    raise ArgumentsError("the arguments contain an integer that does not fit into 64 bits; write it as a string")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ArgumentsError("the arguments contain a number that is too large; write it as a string")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ArgumentsError(f"the arguments contain {text}, which is not JSON")


_decoder: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_number, parse_int=_integer
)
