"""JSON of the simulator's own: what it shared with the client's codec, it could not prove about it.

Output is what `JSON.stringify` makes: compact, raw UTF-8, and numbers as ECMAScript writes them.
"""

# ruff: noqa: TID251 - the second place for encoders and decoders, for the reason above

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NANO: Final = 1_000_000_000
"""Money is counted in integer nano-dollars; this many are one dollar."""

_MAX_PLAIN: Final = 21
_MIN_PLAIN: Final = -6

_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder()

encode: Final = _encoder.encode
"""A value of dicts, lists, strings, integers, booleans, None and `msgspec.Raw` as JSON."""

decode_any: Final = _decoder.decode
"""JSON as dicts, lists and scalars; raises `msgspec.DecodeError`."""


decode_exact: Final = msgspec.json.Decoder(float_hook=lambda text: msgspec.Raw(text.encode("ascii"))).decode
"""The same, with numbers that have a point or an exponent kept as they are written."""


_sorted: Final = msgspec.json.Encoder(order="sorted").encode


def canonical(data: bytes, *, without: str = "") -> bytes:
    """The same JSON for the same value, whatever the order of its fields; raises `msgspec.DecodeError`.

    The field `without` of an object counts as not there.
    """
    value = _decoder.decode(data)
    if without and isinstance(value, dict):
        value.pop(without, None)
    return _sorted(value)


def quote(text: str) -> str:
    """The string *text* as a JSON literal."""
    return _encoder.encode(text).decode("utf-8")


def dollars(nanousd: int) -> str:
    """An amount as ECMAScript's Number::toString writes it in dollars: `0`, `0.0000057`, `5.7e-7`, never `0.0`."""
    if nanousd < 0:
        return f"-{dollars(-nanousd)}"
    whole, fraction = divmod(nanousd, NANO)
    if fraction == 0:
        return str(whole)
    if whole == 0 and fraction < 1_000:  # below 10**-6 ECMAScript changes to exponents, without padding
        digits = str(fraction)
        mantissa = digits.rstrip("0")
        point = f".{mantissa[1:]}" if len(mantissa) > 1 else ""
        return f"{mantissa[0]}{point}e-{10 - len(digits)}"
    return f"{whole}.{fraction:09d}".rstrip("0")


def number(value: float) -> str:
    """A finite number as ECMAScript's Number::toString writes it: `0.1`, `0.00001`, `1e-7`, `2`, never `2.0`."""
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    text = "".join(map(str, digits)).rstrip("0")
    before = len(digits) + int(exponent)
    return ("-" if sign else "") + _placed(text, before)


def _placed(digits: str, before: int) -> str:
    """Digits with `before` of them in front of the point, as far as ECMAScript does without an exponent."""
    if 0 < before <= _MAX_PLAIN:
        whole = digits[:before].ljust(before, "0")
        return f"{whole}.{digits[before:]}" if digits[before:] else whole
    if _MIN_PLAIN < before <= 0:
        return f"0.{'0' * -before}{digits}"
    mantissa = f"{digits[0]}.{digits[1:]}" if len(digits) > 1 else digits
    return f"{mantissa}e{before - 1:+d}"


def raw_number(value: float) -> msgspec.Raw:
    """`number` as a value for `encode`."""
    return msgspec.Raw(number(value).encode("ascii"))


def raw_dollars(nanousd: int) -> msgspec.Raw:
    """`dollars` as a value for `encode`."""
    return msgspec.Raw(dollars(nanousd).encode("ascii"))


def decimal_string(nanousd: int) -> str:
    """A price as the model list writes it: a plain decimal in a string, never with an exponent."""
    whole, fraction = divmod(nanousd, NANO)
    return f"{whole}.{fraction:09d}".rstrip("0") if fraction else str(whole)


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    """A function that decodes JSON into *kind*; raises `msgspec.DecodeError`."""
    return msgspec.json.Decoder(kind).decode


def with_spaces(text: str) -> str:
    """The JSON document *text* with a space after each colon and comma; raises `ValueError` when it is none."""
    return json.dumps(json.loads(text), ensure_ascii=False)
