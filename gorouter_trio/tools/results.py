"""Results of tools as the text that a model gets: JSON, or a text as it is, cut at a size and marked. Pure.

Whatever a tool returns, the work is bounded by the size that is kept, not by the size of the value: a
value is measured first, up to a budget, and one that is larger is written piece by piece until the room
is used up. A pydantic model is the exception: what it leaves out, renames or masks only its own serialisation
says, so it is written whole before it is cut.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from decimal import Decimal
from typing import TYPE_CHECKING, Final, cast

from msgspec import UNSET, Struct

from ..wire.codec import decode_json, encode_json
from ..wire.schema import to_json_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["EncodedResult", "ResultError", "cut_text", "encode_result", "sendable"]

_MAX_DEPTH: Final = 100
_NODE_BYTES: Final = 2
_TOO_DEEP: Final = "the result contains itself, or is nested too deeply"
_LISTS: Final = (list, tuple, set, frozenset)
_ENDLESS: Final = (
    (inspect.isasyncgen, "an async generator"),
    (inspect.isgenerator, "a generator"),
    (inspect.iscoroutine, "a coroutine"),
)


class ResultError(TypeError):
    """A tool returned what cannot be written as JSON."""


class EncodedResult(Struct, frozen=True):
    """A result as text, whether it was cut, and its value as JSON where that was asked for."""

    text: str
    is_cut: bool = False
    value: object = None


def encode_result(value: object, *, max_bytes: int, keep_value: bool = False) -> EncodedResult:
    """`value` as text of at most `max_bytes` in UTF-8: a text as it is, anything else as JSON.

    NaN and the infinities, which JSON does not have, are written as texts. Raises `ResultError` for values
    that are no data: generators, functions, files, what contains itself.
    """
    _refuse_endless(value)
    if isinstance(value, str):
        text, is_cut = cut_text(value, max_bytes)
        return EncodedResult(text, is_cut, text if keep_value and not is_cut else None)
    if not _fits(value, budget=4 * max_bytes):
        # Fields that are not written may be all that is large.
        encoded = _written(value, 4 * max_bytes)
    else:
        encoded = _encode(value).decode()
    text, is_cut = cut_text(encoded, max_bytes)
    return EncodedResult(text, is_cut, decode_json(text) if keep_value and not is_cut else None)


def cut_text(text: str, max_bytes: int) -> tuple[str, bool]:
    """`text` with at most `max_bytes` in UTF-8, and whether something is missing; a mark at its end says so.

    Halves of surrogate pairs, which cannot be sent, become question marks.
    """
    if len(text) <= max_bytes:
        data = text.encode("utf-8", "replace")
        if len(data) <= max_bytes:
            return data.decode(), False
    return _cut(text[: max_bytes + 1], max_bytes), True


def sendable(text: str) -> str:
    """`text` with question marks in place of halves of surrogate pairs, as names of files may have them."""
    return text.encode("utf-8", "replace").decode()


def _cut(text: str, max_bytes: int) -> str:
    mark = f"\n[cut: longer than {max_bytes} bytes]"
    room = max(max_bytes - len(mark), 0)
    return text.encode("utf-8", "replace")[:room].decode("utf-8", "ignore") + mark


def _refuse_endless(value: object) -> None:
    for is_kind, name in _ENDLESS:
        if is_kind(value):
            # One that was never started warns when it is thrown away, unless it is closed.
            close = getattr(value, "close", None)
            if close is not None:
                cast("Callable[[], None]", close)()
            raise ResultError(f"the tool returned {name}; a tool returns one value")


def _encode(value: object) -> bytes:
    try:
        return encode_json(_finite(to_json_value(value)))
    except RecursionError:
        raise ResultError(_TOO_DEEP) from None
    except (TypeError, ValueError, OverflowError) as exc:
        raise ResultError(f"the result cannot be written as JSON: {exc}") from exc


def _fits(value: object, *, budget: int) -> bool:
    """Whether a value is small, as far as one can see without running any code of it.

    Raises `ResultError` for one that is nested without end, which a walk in depth finds at once.
    """
    todo = [(value, 0)]
    while todo and budget >= 0:
        part, depth = todo.pop()
        if depth > _MAX_DEPTH:
            raise ResultError(_TOO_DEEP)
        budget -= _NODE_BYTES
        if isinstance(part, (str, bytes, bytearray, memoryview)):
            budget -= len(part)
        else:
            todo += [(inner, depth + 1) for inner in _parts(part, budget)]
    return budget >= 0


def _parts(value: object, budget: int) -> Iterable[object]:
    """What is within a value, as much of it as the budget may allow."""
    if isinstance(value, dict):
        return [*_some(value, budget), *_some(value.values(), budget)]
    if isinstance(value, _LISTS):
        return _some(value, budget)
    return _fields(value).values()


def _some(parts: object, budget: int) -> list[object]:
    """The first parts: what would exceed the budget anyway is not looked at."""
    room = max(budget // _NODE_BYTES + 1, 0)
    return [part for part, _ in zip(cast("list[object]", parts), range(room + 1), strict=False)]


def _fields(value: object) -> dict[str, object]:
    """The fields of an object that is written as a JSON object, under the names that are written."""
    if isinstance(value, Struct):
        names = zip(value.__struct_encode_fields__, value.__struct_fields__, strict=True)
        fields = {shown: getattr(value, name, None) for shown, name in names}
        config = value.__struct_config__
        fields = fields if config.tag_field is None else {config.tag_field: config.tag, **fields}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    elif hasattr(type(value), "__attrs_attrs__"):
        fields = {name: part for name, part in _own(value).items() if not name.startswith("_")}
    else:
        return _own(value) if _is_model(value) else {}
    return {name: part for name, part in fields.items() if part is not UNSET}


def _own(value: object) -> dict[str, object]:
    return dict(getattr(value, "__dict__", {}))


def _is_model(value: object) -> bool:
    """Whether it is a pydantic model; pydantic itself is never imported here."""
    return hasattr(type(value), "model_dump")


def _finite(value: object, depth: int = 0) -> object:
    """The same, which is made of builtins, with texts for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Decimal):
        return value if value.is_finite() else str(value)
    if depth > _MAX_DEPTH:
        raise ResultError(_TOO_DEEP)
    if isinstance(value, dict):
        return {key: _finite(part, depth + 1) for key, part in value.items()}
    if isinstance(value, _LISTS):
        return [_finite(part, depth + 1) for part in value]
    return value


def _written(value: object, room: int) -> str:
    """The beginning of a large value as JSON, of about `room` characters."""
    pieces: list[str] = []
    for piece in _pieces(value, room, 0):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            break
    return "".join(pieces)


def _pieces(value: object, room: int, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ResultError(_TOO_DEEP)
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value[:room])
    fields = value if isinstance(value, dict) else {} if _is_model(value) else _fields(value)
    if fields or isinstance(value, dict):
        yield from _pieces_of_object(cast("dict[object, object]", fields), room, depth)
    elif isinstance(value, _LISTS):
        yield "["
        for position, part in enumerate(value):
            yield "," if position else ""
            yield from _pieces(part, room, depth + 1)
        yield "]"
    else:
        yield _encode(value[:room] if isinstance(value, str) else value).decode("utf-8", "replace")


def _pieces_of_object(fields: dict[object, object], room: int, depth: int) -> Iterator[str]:
    yield "{"
    for position, (name, part) in enumerate(fields.items()):
        yield "," if position else ""
        yield from _pieces(str(name)[:room], room, depth + 1)
        yield ":"
        yield from _pieces(part, room, depth + 1)
    yield "}"
