"""Values that satisfy a JSON schema, for the arguments of tool calls and for structured replies.

Read are `type`, `properties`, `required`, `items`, `prefixItems`, `enum`, `const`, `anyOf`, `oneOf`, `allOf`, local
`$ref`s, `format`, and the bounds of numbers, strings and arrays. `pattern`, `not` and conditions are not: a value for
such a schema may miss them, as a real model's may.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeAlias, cast, final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ._draws import Draws

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"
Schema: TypeAlias = "Mapping[str, Json]"

_MAX_DEPTH: Final = 6
_FORMATS: Final = {
    "date": "2026-11-23",
    "date-time": "2026-11-23T06:00:00Z",
    "time": "06:00:00Z",
    "duration": "PT1H",
    "email": "harbour@example.com",
    "hostname": "example.com",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000001",
}


@final
class SchemaWriter:
    """Makes values for the schemas of one document, with words taken from *words* where strings are free."""

    def __init__(self, root: Schema, draws: Draws, *, words: Sequence[str]) -> None:
        self._root = root
        self._draws = draws
        self._words = words or ("value",)
        self._heights: dict[str, float] = {}
        self._makers: Mapping[str, Callable[[Schema, int], Json]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda _schema, _depth: self._draws.chance(0.5),
            "null": lambda _schema, _depth: None,
        }

    def value(self) -> Json:
        """A value for the whole document."""
        return self._value(dict(self._root), 0)

    def _value(self, schema: Json, depth: int) -> Json:
        if not isinstance(schema, dict):
            return self._draws.choice(self._words)
        schema = self._resolved(schema)
        if "const" in schema:
            return schema["const"]
        options = schema.get("enum")
        if isinstance(options, list) and options:
            return self._draws.choice(options)
        for key in ("anyOf", "oneOf"):
            branches = schema.get(key)
            if isinstance(branches, list) and branches:
                return self._value(self._branch(branches, depth), depth)
        return self._makers.get(self._kind(schema, depth), self._string)(schema, depth)

    def _branch(self, branches: list[Json], depth: int) -> Json:
        if depth < _MAX_DEPTH:
            return self._draws.choice(branches)
        simple = [b for b in branches if isinstance(b, dict) and b.get("type") in {"null", "string", "boolean"}]
        return simple[0] if simple else min(branches, key=self._height)

    def _height(self, schema: Json) -> float:
        """How deep the shallowest value for *schema* is; infinite where it comes back to itself."""
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return 0
        target = schema.get("$ref")
        if isinstance(target, str):
            if target not in self._heights:
                self._heights[target] = math.inf
                self._heights[target] = self._height(self._find(target))
            return self._heights[target]
        for key in ("anyOf", "oneOf"):
            branches = schema.get(key)
            if isinstance(branches, list) and branches:
                return min(map(self._height, branches))
        inner = self._needed(self._resolved(schema))
        return 1 + max(map(self._height, inner)) if inner else 0

    def _needed(self, schema: dict[str, Json]) -> list[Json]:
        """The schemas of what no value for *schema* goes without."""
        properties, required = schema.get("properties"), schema.get("required")
        needed: list[Json] = []
        if isinstance(properties, dict) and isinstance(required, list):
            needed += [properties[name] for name in required if isinstance(name, str) and name in properties]
        if _whole(schema, "minItems", 0) > 0:
            needed.append(schema.get("items", {}))
        return needed

    def _resolved(self, schema: dict[str, Json]) -> dict[str, Json]:
        """*schema* with its `$ref` followed and its `allOf` merged in."""
        hops = 0
        while isinstance(target := schema.get("$ref"), str) and hops < 32:
            found = self._find(target)
            schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
            hops += 1
        parts = schema.get("allOf")
        if isinstance(parts, list):
            rest: dict[str, Json] = {key: value for key, value in schema.items() if key != "allOf"}
            for part in parts:
                if isinstance(part, dict):
                    rest = _merged(rest, self._resolved(part))
            return rest
        return schema

    def _find(self, pointer: str) -> dict[str, Json]:
        place: Json = dict(self._root)
        for step in pointer.lstrip("#").split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            place = place.get(step) if isinstance(place, dict) else None
        return place if isinstance(place, dict) else {}

    def _kind(self, schema: Schema, depth: int) -> str:
        kind = schema.get("type")
        if isinstance(kind, list) and kind:
            kinds = [k for k in kind if k != "null"] if depth < _MAX_DEPTH else ["null"] if "null" in kind else kind
            kind = (kinds or kind)[0]
        if isinstance(kind, str):
            return kind
        return "object" if "properties" in schema else "array" if "items" in schema else "string"

    def _object(self, schema: Schema, depth: int) -> Json:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            properties = {}
        required = schema.get("required")
        names = list(properties)
        if depth >= _MAX_DEPTH - 1:
            names = [name for name in names if isinstance(required, list) and name in required]
        made = {name: self._value(properties[name], depth + 1) for name in names}
        for name in required if isinstance(required, list) else ():
            if isinstance(name, str) and name not in made:
                made[name] = self._draws.choice(self._words)
        return made

    def _array(self, schema: Schema, depth: int) -> Json:
        first = schema.get("prefixItems")
        made = [self._value(item, depth + 1) for item in first] if isinstance(first, list) else []
        least = _whole(schema, "minItems", 0)
        most = _whole(schema, "maxItems", max(least, 3))
        count = (
            least if depth >= _MAX_DEPTH - 1 else self._draws.between(max(least, min(1, most)), min(most, least + 2))
        )
        while len(made) < count:
            item = self._value(schema.get("items", {}), depth + 1)
            if schema.get("uniqueItems") is True and item in made:
                item = self._distinct(item, len(made))
            made.append(item)
        return made

    def _distinct(self, item: Json, number: int) -> Json:
        return f"{item} {number}" if isinstance(item, str) else item + number if isinstance(item, int) else item

    def _string(self, schema: Schema, _depth: int) -> Json:
        form = schema.get("format")
        text = _FORMATS.get(form) if isinstance(form, str) else None
        if text is None:
            text = self._draws.choice(self._words)
        least = _whole(schema, "minLength", 0)
        while len(text) < least:
            text += f" {self._draws.choice(self._words)}"
        most = schema.get("maxLength")
        return text[:most] if isinstance(most, int) else text

    def _integer(self, schema: Schema, _depth: int) -> Json:
        low, high = _bounds(schema, 1.0)
        step = schema.get("multipleOf")
        step = max(1, round(step)) if isinstance(step, (int, float)) else 1
        first, last = math.ceil(low / step), math.floor(high / step)
        return step * self._draws.between(first, max(first, min(last, first + 60_000)))

    def _number(self, schema: Schema, depth: int) -> Json:
        step = schema.get("multipleOf")
        low, high = _bounds(schema, 0.0)
        if isinstance(step, (int, float)):
            first = math.ceil(low / step)
            return step * self._draws.between(first, max(first, min(math.floor(high / step), first + 60_000)))
        exclusive = "exclusiveMinimum" in schema or "exclusiveMaximum" in schema
        if high - low >= 2:
            return self._integer(
                {"minimum": math.ceil(low) + exclusive, "maximum": math.floor(high) - exclusive}, depth
            )
        return (low + high) / 2 if high > low else low


def _bounds(schema: Schema, step: float) -> tuple[float, float]:
    """The range of a number, with exclusive ends moved in by *step*."""
    low, high = _float(schema, "minimum"), _float(schema, "maximum")
    below, above = _float(schema, "exclusiveMinimum"), _float(schema, "exclusiveMaximum")
    if below is not None:
        low = max(below + step, low if low is not None else below + step)
    if above is not None:
        high = min(above - step, high if high is not None else above - step)
    if low is None:
        low = min(1.0, high) if high is not None else 1.0
    return low, max(low, high if high is not None else low + 99)


def _float(schema: Schema, key: str) -> float | None:
    value = schema.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _whole(schema: Schema, key: str, default: int) -> int:
    value = schema.get(key)
    return value if isinstance(value, int) else default


def _merged(one: dict[str, Json], other: dict[str, Json]) -> dict[str, Json]:
    """Two schemas that both hold."""
    merged = {**one, **other}
    for key in ("properties", "required"):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            merged[key] = {**mine, **theirs}
        elif isinstance(mine, list) and isinstance(theirs, list):
            merged[key] = [*mine, *[name for name in theirs if name not in mine]]
    return merged


def make_value(schema: object, draws: Draws, *, words: Sequence[str]) -> Json:
    """A value that satisfies *schema* (decoded JSON); *words* are what free strings are made of."""
    root = cast("Schema", schema) if isinstance(schema, dict) else {}
    return SchemaWriter(root, draws, words=words).value()


def find_strict_fault(schema: object) -> str | None:
    """What keeps a schema from strict mode, in the words of the provider that is strictest; None when nothing does.

    Its root is an object; every object lists all of its properties as required and admits no others.
    """
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"None\"'."
    return _strict_fault(cast("dict[str, Json]", schema), ())


def _strict_fault(schema: Json, place: tuple[str, ...]) -> str | None:
    if not isinstance(schema, dict):
        return None
    context = f"In context=({', '.join(map(repr, place))}),"
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, dict):
        if schema.get("additionalProperties") is not False:
            return f"{context} 'additionalProperties' is required to be supplied and to be false."
        names = list(properties) if isinstance(properties, dict) else []
        required = schema.get("required")
        missing = [name for name in names if not isinstance(required, list) or name not in required]
        if missing:
            return (
                f"{context} 'required' is required to be supplied and to be an array including every key in "
                f"properties. Missing '{missing[0]}'."
            )
    return next((fault for step, part in _parts(schema) if (fault := _strict_fault(part, (*place, *step)))), None)


def _parts(schema: dict[str, Json]) -> list[tuple[tuple[str, ...], Json]]:
    """The schemas inside a schema, and the way to each."""
    found: list[tuple[tuple[str, ...], Json]] = []
    for key in ("properties", "$defs", "definitions"):
        inner = schema.get(key)
        if isinstance(inner, dict):
            found += [((key, name), part) for name, part in inner.items()]
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        branches = schema.get(key)
        if isinstance(branches, list):
            found += [((key, str(number)), part) for number, part in enumerate(branches)]
    return [*found, (("items",), schema.get("items"))]
