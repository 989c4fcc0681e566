"""A reply with an odd field, saved: what fits is kept field by field, the rest stays at its default.

Decoding checks types and is all or nothing, which is what makes it fast. But an answer that was paid
for must not be lost because `created` came as a text, so what the decoder refuses is taken apart
here, on the rare path: an object into the raw JSON of its fields, each decoded by itself. A field
that would change what the reply says if it were missing is *essential*, and a reply without it is
refused after all. Text that is no text, a broken UTF-8 sequence or half a surrogate pair (servers that
cut by UTF-16 units send those), is mended with U+FFFD, as browsers do.

No decoder is made here; `wire.codec`, which owns them, hands in the way to make one.
"""

from __future__ import annotations

import re
import types
from contextlib import suppress
from typing import TYPE_CHECKING, TypeGuard, TypeVar, Union, cast, get_args, get_origin

import msgspec
from msgspec import Struct

from .batch import ApiBatchResult
from .catalog import Model, ModelEndpoint, PricingOverride, ProviderInfo
from .embeddings import Embedding, EmbeddingReply
from .responses import (
    ChatCompletion,
    Choice,
    ErrorBody,
    ReplyFunction,
    ReplyMessage,
    ReplyToolCall,
    TextChoice,
    TextCompletion,
)
from .stream import ChatChunk, ChunkChoice, Delta

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    _Decode: TypeAlias = Callable[[bytes], object]

__all__ = ["Salvage", "mend_text"]

S = TypeVar("S", bound=Struct)

_ESSENTIAL: frozenset[tuple[type[Struct], str]] = frozenset(
    {
        (ChatCompletion, "choices"),
        (Choice, "message"),
        (ReplyMessage, "content"),
        (ReplyMessage, "tool_calls"),
        (ReplyToolCall, "function"),
        (ReplyFunction, "name"),
        (ChatChunk, "choices"),
        (ChunkChoice, "delta"),
        (Delta, "content"),
        (Delta, "tool_calls"),
        (TextCompletion, "choices"),
        (TextChoice, "text"),
        (EmbeddingReply, "data"),
        (Embedding, "embedding"),
        # Without one of its conditions, an override would hold when it should not.
        (PricingOverride, "min_prompt_tokens"),
        (PricingOverride, "utc_start"),
        (PricingOverride, "utc_end"),
        (PricingOverride, "utc_days"),
    }
)
# Rows of lists that stand for themselves, so that one bad row costs only itself.
_ROWS = frozenset({ApiBatchResult, Model, ModelEndpoint, PricingOverride, ProviderInfo})
_NO_ERROR = frozenset({b"false", b"0", b'""', b"[]"})
_REFUSED = (msgspec.ValidationError, RecursionError)
_TEXT_BYTES = 4096
# In this order: a whole surrogate pair, half of one, any other escape.
_ESCAPE = re.compile(
    rb"\\(?:(u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


class Salvage:
    """Decodes Structs, and what they hold, field by field.

    `make_decoder` gives the strict decoder of a type. Decoders for a type and all that is in it are made
    when the first reply of it has to be saved: most programs never see one, and making them all takes
    a tenth of the import.
    """

    def __init__(self, make_decoder: Callable[[object], _Decode]) -> None:
        self._make_decoder = make_decoder
        self._decoders: dict[object, _Decode] = {}
        self._fields: dict[type[Struct], tuple[msgspec.structs.FieldInfo, ...]] = {}
        self._split_object = cast("Callable[[bytes], dict[str, bytes]]", make_decoder(dict[str, msgspec.Raw]))
        self._split_list = cast("Callable[[bytes], list[bytes]]", make_decoder(list[msgspec.Raw]))
        self._learn(str)
        self._learn(float)

    def decode(self, kind: type[S], data: bytes) -> S:
        """A `kind` from a JSON object, without the fields that do not fit.

        Raises `msgspec.ValidationError` when it is no object, or lacks what is essential.
        """
        self._learn(kind)
        return cast("S", self._decode_object(kind, data))

    def _decode_object(self, kind: type[Struct], data: bytes) -> Struct:
        found = self._split_object(data)
        values: dict[str, object] = {}
        for field in self._fields[kind]:
            raw = found.get(field.encode_name)
            if raw is not None:
                self._decode_field(kind, field, raw=raw, into=values)
            elif field.required:
                raise msgspec.ValidationError(f"{field.name} is missing")
        return kind(**values)

    def _decode_field(
        self, kind: type[Struct], field: msgspec.structs.FieldInfo, *, raw: bytes, into: dict[str, object]
    ) -> None:
        try:
            into[field.name] = self._decode(field.type, raw)
        except _REFUSED:
            if field.name == "error":
                into[field.name] = self._as_error(bytes(raw))
            elif (kind, field.name) in {(ErrorBody, "message"), (ReplyFunction, "arguments")}:
                into[field.name] = bytes(raw).decode("utf-8", "replace")
            elif field.required or (kind, field.name) in _ESSENTIAL:
                raise

    def _decode(self, wanted: object, raw: bytes) -> object:
        """One value: as it should be, or else in the way that its type allows."""
        try:
            return self._decoders[wanted](raw)
        except _REFUSED:
            for member in _members(wanted):
                if _is_struct(member):
                    return self._decode_object(member, raw)
                if get_origin(member) is list:
                    return self._decode_list(get_args(member)[0], raw)
                if member is int:
                    return _whole_number(self._decoders[float](raw))
            raise

    def _decode_list(self, item: object, raw: bytes) -> list[object]:
        if not _is_struct(item):
            raise msgspec.ValidationError("not a list of the right kind")
        if item not in _ROWS:
            return [self._decode(item, piece) for piece in self._split_list(raw)]
        rows: list[object] = []
        for piece in self._split_list(raw):
            with suppress(*_REFUSED):
                rows.append(self._decode(item, piece))
        return rows

    def _as_error(self, raw: bytes) -> ErrorBody | None:
        """An `error` that is no object: what it says is the message, unless it says that there is none."""
        if raw in _NO_ERROR:
            return None
        try:
            return ErrorBody(message=cast("str", self._decoders[str](raw)))
        except _REFUSED:
            return ErrorBody(message=raw[:_TEXT_BYTES].decode("utf-8", "replace"))

    def _learn(self, wanted: object) -> None:
        """Make the decoders for a type and for everything in it."""
        if wanted in self._decoders or wanted in {type(None), msgspec.UnsetType}:
            return
        self._decoders[wanted] = self._make_decoder(wanted)
        if _is_struct(wanted):
            self._fields[wanted] = msgspec.structs.fields(wanted)
            parts = [field.type for field in self._fields[wanted]]
        else:
            parts = list(get_args(wanted))
        for part in parts:
            self._learn(part)


def mend_text(data: bytes) -> bytes:
    """JSON with U+FFFD for what is no text in its strings; the same object when there is nothing to mend."""
    try:
        str(data, "utf-8")
    except UnicodeDecodeError:
        data = data.decode("utf-8", "replace").encode()
    mended = _ESCAPE.sub(lambda found: rb"\ufffd" if found[2] else found[0], data)
    return data if mended == data else mended


def _is_struct(wanted: object) -> TypeGuard[type[Struct]]:
    return isinstance(wanted, type) and issubclass(wanted, Struct)


def _members(wanted: object) -> tuple[object, ...]:
    return get_args(wanted) if get_origin(wanted) in {Union, types.UnionType} else (wanted,)


def _whole_number(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise msgspec.ValidationError("not a whole number")
