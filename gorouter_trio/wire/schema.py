"""Python types as JSON: a schema for the model to follow, and values of the type from what it wrote.

Types are what msgspec knows (Structs, dataclasses, TypedDicts, attrs classes, enums, `Literal`, unions, containers,
constraints in `Annotated[..., msgspec.Meta(...)]`), and pydantic models anywhere among them. pydantic is never
imported here: a class that has pydantic's methods is asked through them.

A *strict* schema is one that a server can enforce token by token: every object is closed and has all its
properties required, the root is an object, and only the keywords of that subset are used (openrouter API,
POST /chat/completions, `response_format` and `tools`). What the subset cannot say, such as a default or the
length of a string, goes into the description for the model to read, and is checked when the value comes.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Generic, NoReturn, TypeAlias, TypeVar, Union, cast, get_origin

import msgspec

from ..errors import ConfigError, DecodeError
from .codec import make_decoder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["JsonType", "Schema", "decode_as", "json_schema_of", "make_strict", "to_json_value", "without_indentation"]

T = TypeVar("T")

Schema: TypeAlias = dict[str, object]
"""A JSON schema, draft 2020-12."""

_REFERENCE = "#/$defs/"
_WRAPPED = "value"
_KEPT = frozenset(
    {
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "description",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "multipleOf",
        "pattern",
        "properties",
        "required",
        "title",
        "type",
    }
)
_FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uuid"})
# Replaced by something else, or of no use to a model.
_DROPPED = frozenset({"$defs", "$schema", "allOf", "discriminator", "examples", "oneOf", "prefixItems"})
_JSON_TYPES: Mapping[type, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_REFUSED = (msgspec.DecodeError, ValueError, TypeError, RecursionError)


class JsonType(Generic[T]):
    """A type with its schema and the way back from JSON. Make it once and keep it: making one takes milliseconds.

    The schema's root is an object, as the API demands: a type that is none, such as `list[int]`, is wrapped in
    an object with the one property `value`, and `decode` takes it out again. `name` is a name for the schema
    that the API accepts.

    Raises `ConfigError` for a type that has no schema, or with `strict` none that can be enforced; the message
    names the place.
    """

    __slots__ = ("_decode", "_kind", "is_wrapped", "name", "schema")

    def __init__(self, kind: type[T], *, strict: bool = False) -> None:
        self._kind = kind
        self.name = re.sub(r"[^A-Za-z0-9_-]+", "_", _name_of(kind) or "").strip("_")[:64] or _WRAPPED
        schema = _schema_of(kind)
        self.is_wrapped = not _is_object(schema)
        if self.is_wrapped:
            schema = _wrap(schema)
        self.schema: Schema = make_strict(schema) if strict else schema
        self._decode = _decoder_of(kind, wrapped=self.is_wrapped)

    def decode(self, data: bytes | str) -> T:
        """The value that `data`, JSON text, stands for; raises `DecodeError` that names the place that is wrong."""
        try:
            return cast("T", self._decode(data))
        except _REFUSED as exc:
            raise DecodeError(f"not a {self.name}: {_reason(exc)}") from exc

    def convert(self, value: object) -> T:
        """The same from decoded JSON; a wrapped type is given without its wrapper."""
        try:
            if _is_pydantic(self._kind):
                return cast("T", _from_pydantic(self._kind, value))
            return msgspec.convert(value, self._kind, dec_hook=_from_pydantic)
        except _REFUSED as exc:
            raise DecodeError(f"not a {self.name}: {_reason(exc)}") from exc

    def __repr__(self) -> str:
        return f"JsonType({self.name})"


def json_schema_of(kind: type[object], *, strict: bool = False) -> Schema:
    """The JSON schema of a type; see `JsonType`, which is also what to keep when values are decoded as well."""
    return JsonType(kind, strict=strict).schema


def decode_as(kind: type[T], data: bytes | str) -> T:
    """A value of `kind` from JSON text that follows `json_schema_of(kind)`; raises `DecodeError`."""
    return JsonType(kind).decode(data)


def make_strict(schema: Mapping[str, object]) -> Schema:
    """A strict form of a schema whose references all point into its own `$defs`.

    It accepts no value that the given schema refuses, except where a keyword had to go into a description.
    Raises `ConfigError` for what strict mode cannot say: objects with free keys, and places where anything goes.
    """
    definitions = cast("Mapping[str, Schema]", schema.get("$defs", {}))
    strict = _strict(_without(schema, "$defs"), "$")
    if definitions:
        strict["$defs"] = {name: _strict(part, f"$defs.{name}") for name, part in definitions.items()}
    return strict


def to_json_value(value: object) -> object:
    """A value of any type that has a schema as what JSON is made of; raises `TypeError` for others."""
    return msgspec.to_builtins(value, builtin_types=(Decimal,), str_keys=True, enc_hook=_dump)


def _name_of(kind: object) -> str | None:
    """The name of a class; None for what has none, as unions, whatever their Python calls them."""
    return None if get_origin(kind) in {Union, types.UnionType} else getattr(kind, "__name__", None)


# Schemas


def _schema_of(kind: object) -> Schema:
    """The schema of a type with its root in place and every definition under `$defs` of the root."""
    try:
        if _is_pydantic(kind):
            found = _pydantic_schema(kind)
        else:
            (found,), parts = msgspec.json.schema_components(
                (kind,), schema_hook=_pydantic_schema, ref_template=_REFERENCE + "{name}"
            )
            found = {**found, "$defs": without_indentation(parts)}
    except (TypeError, NameError, ValueError, AttributeError, RuntimeError) as exc:
        # A RuntimeError is pydantic's own: of a model that is not whole, or has a field that is none of JSON's.
        raise ConfigError(f"{_name_of(kind) or kind} has no JSON schema: {exc}") from exc
    definitions: dict[str, Schema] = {}
    root = cast("Schema", _hoist(found, definitions))
    return _with_definitions(_in_place(root, definitions), definitions)


def without_indentation(definitions: Mapping[str, Schema]) -> dict[str, Schema]:
    """The definitions with their descriptions as they are meant: before Python 3.13 docstrings keep the indent."""
    cleaned = dict(definitions)
    for name, part in definitions.items():
        said = part.get("description")
        if isinstance(said, str):
            cleaned[name] = {**part, "description": inspect.cleandoc(said)}
    return cleaned


def _hoist(node: object, into: dict[str, Schema]) -> object:
    """The same without `$defs` anywhere in it, which are gathered in `into`."""
    if isinstance(node, list):
        return [_hoist(part, into) for part in node]
    if not isinstance(node, dict):
        return node
    for name, part in cast("Mapping[str, object]", node.get("$defs", {})).items():
        hoisted = cast("Schema", _hoist(part, into))
        if into.setdefault(name, hoisted) != hoisted:
            raise ConfigError(
                f"two different types are called {name}; rename one, so that a schema can tell them apart"
            )
    return {key: _hoist(part, into) for key, part in node.items() if key != "$defs"}


def _in_place(root: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The root with a reference replaced by what it refers to."""
    reference = root.get("$ref")
    if not isinstance(reference, str):
        return root
    return {**definitions[reference.removeprefix(_REFERENCE)], **_without(root, "$ref")}


def _with_definitions(root: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The root with those definitions that it needs."""
    needed: set[str] = set()
    todo = [root]
    while todo:
        for name in _references(todo.pop()):
            if name not in needed:
                needed.add(name)
                todo.append(definitions[name])
    return {**root, "$defs": {name: definitions[name] for name in sorted(needed)}} if needed else root


def _references(node: object) -> Iterator[str]:
    if isinstance(node, list):
        for part in node:
            yield from _references(part)
    elif isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str):
            yield reference.removeprefix(_REFERENCE)
        for part in node.values():
            yield from _references(part)


def _is_object(schema: Mapping[str, object]) -> bool:
    return schema.get("type") == "object"


def _wrap(schema: Schema) -> Schema:
    inner = _without(schema, "$defs")
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return {"type": "object", "properties": {_WRAPPED: inner}, "required": [_WRAPPED], **definitions}


def _without(schema: Mapping[str, object], name: str) -> Schema:
    return {key: part for key, part in schema.items() if key != name}


# Strict schemas


def _strict(node: object, where: str) -> Schema:
    """One place of a schema, and all within it, in strict form."""
    if not isinstance(node, Mapping):
        _refuse(where, "anything goes here")
    merged = _merge_all_of(cast("Mapping[str, object]", node), where)
    strict: Schema = {key: part for key, part in merged.items() if key in _KEPT}
    if merged.get("format") in _FORMATS:
        strict["format"] = merged["format"]
    variants = merged.get("anyOf", merged.get("oneOf"))
    if isinstance(variants, list):
        strict["anyOf"] = [_strict(variant, f"{where}|{position}") for position, variant in enumerate(variants)]
    if _is_object(merged):
        strict |= _strict_object(merged, where)
    elif merged.get("type") == "array":
        strict["items"] = _strict_items(merged, where)
    _name_type(strict)
    if not {"type", "anyOf", "$ref"} & set(strict):
        _refuse(where, "anything goes here")
    _describe(strict, merged)
    return _without_siblings(strict)


def _merge_all_of(node: Mapping[str, object], where: str) -> Mapping[str, object]:
    parts = node.get("allOf")
    if not isinstance(parts, list):
        return node
    if len(parts) != 1:
        _refuse(where, "allOf of several schemas")
    return _merge_all_of({**cast("Schema", parts[0]), **_without(node, "allOf")}, where)


def _strict_object(node: Mapping[str, object], where: str) -> Schema:
    properties = cast("Mapping[str, object]", node.get("properties", {}))
    others = node.get("additionalProperties", False)
    # A class that lets other fields in has fields of its own, and is closed; a mapping has none.
    is_class = "properties" in node and isinstance(others, bool) and (bool(properties) or not others)
    if not is_class or "patternProperties" in node:
        _refuse(where, "an object with free keys")
    return {
        "properties": {name: _strict(part, f"{where}.{name}") for name, part in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }


def _strict_items(node: Mapping[str, object], where: str) -> Schema:
    first = node.get("prefixItems")
    if not isinstance(first, list):
        return _strict(node.get("items", {}), f"{where}[]")
    # Which place has which type cannot be said; how many there are can.
    kinds: list[Schema] = []
    for position, part in enumerate(first):
        kind = _strict(part, f"{where}[{position}]")
        if kind not in kinds:
            kinds.append(kind)
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


def _name_type(strict: Schema) -> None:
    """Add the type that the choices of an enum have: strict schemas need one everywhere."""
    choices = strict.get("enum", [strict["const"]] if "const" in strict else None)
    if isinstance(choices, list) and "type" not in strict:
        kinds = sorted({_JSON_TYPES.get(type(choice), "object") for choice in choices})
        strict["type"] = kinds[0] if len(kinds) == 1 else kinds


def _describe(strict: Schema, given: Mapping[str, object]) -> None:
    """Move what strict mode does not know into the description."""
    lost = {key: part for key, part in given.items() if key not in strict and key not in _DROPPED}
    if lost.get("default", False) is None:
        del lost["default"]
    if lost:
        rules = "; ".join(f"{key}: {json.dumps(part, ensure_ascii=False)}" for key, part in lost.items())
        strict["description"] = f"{given.get('description', '')} ({rules})".strip()


def _without_siblings(strict: Schema) -> Schema:
    """A reference stands alone in strict schemas."""
    if "$ref" not in strict or len(strict) == 1:
        return strict
    return {"anyOf": [{"$ref": strict["$ref"]}], **_without(strict, "$ref")}


def _refuse(where: str, what: str) -> NoReturn:
    raise ConfigError(
        f"{where}: {what}, which strict mode cannot enforce; use a class with fields, a list of such, or strict=False"
    )


# Values


def _decoder_of(kind: object, *, wrapped: bool) -> Callable[[bytes | str], object]:
    if _is_pydantic(kind) and not wrapped:
        return cast("Callable[[bytes | str], object]", kind.model_validate_json)  # type: ignore[attr-defined]  # is there
    if not wrapped:
        return make_decoder(kind, hook=_from_pydantic)
    decode = make_decoder(msgspec.defstruct("Wrapped", [(_WRAPPED, kind)]), hook=_from_pydantic)
    return lambda data: getattr(decode(data), _WRAPPED)


def _is_pydantic(kind: object) -> bool:
    return isinstance(kind, type) and hasattr(kind, "model_json_schema") and hasattr(kind, "model_validate_json")


def _pydantic_schema(kind: object) -> Schema:
    """The schema of a class that msgspec does not know."""
    if kind is object:
        return {"description": "any JSON value"}
    if not _is_pydantic(kind):
        raise TypeError(f"{kind!r} is not a type that can be written as JSON")
    return cast("Schema", kind.model_json_schema())  # type: ignore[attr-defined]  # is there


def _from_pydantic(kind: object, value: object) -> object:
    """A value of a class that msgspec does not know."""
    if kind is object:
        return value
    if not _is_pydantic(kind):
        raise TypeError(f"{kind!r} is not a type that can be read from JSON")
    try:
        return cast("object", kind.model_validate(value))  # type: ignore[attr-defined]  # is there
    except ValueError as exc:
        raise ValueError(_reason(exc)) from exc


def _dump(value: object) -> object:
    """A value of a class that msgspec does not know, as one that it knows."""
    if not _is_pydantic(type(value)):
        raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
    return cast("object", value.model_dump(mode="json", by_alias=True))  # type: ignore[attr-defined]  # is there


def _reason(exc: Exception) -> str:
    """What is wrong, in a line: pydantic writes several, and ends with an address of its own."""
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    errors = getattr(exc, "errors", None)
    if not callable(errors):
        return str(exc)
    first = cast("list[dict[str, object]]", errors(include_url=False, include_input=False))[0]
    path = "".join(f".{step}" for step in cast("tuple[object, ...]", first["loc"]))
    return f"{first['msg']} - at `${path}`"
