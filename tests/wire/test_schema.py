"""Schemas of Python types, plain and strict, and values from JSON that follows them."""

from __future__ import annotations

import datetime
import enum
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired, Optional, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from gorouter_trio.errors import ConfigError, DecodeError
from gorouter_trio.wire.schema import JsonType, decode_as, json_schema_of, make_strict

jsonschema = pytest.importorskip("jsonschema")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Place(Struct):
    """Where somebody lives."""

    city: Annotated[str, Meta(min_length=1, description="Name of the city")]
    zip: Annotated[str, Meta(pattern="^[0-9]+$")] | None = None


@dataclass
class Pet:
    name: str
    tags: list[str] = field(default_factory=list)


class Link(TypedDict):
    href: str
    title: NotRequired[str]


class Node(Struct):
    value: int
    next: Node | None = None


class Circle(Struct, tag="circle"):
    radius: float


class Square(Struct, tag="square"):
    side: float


class Person(Struct):
    name: str
    age: Annotated[int, Meta(ge=0, le=150)]
    place: Place
    shape: Circle | Square
    pets: list[Pet]
    links: tuple[Link, ...]
    pair: tuple[int, str]
    unique: set[int]
    colour: Colour = Colour.RED
    level: Level = Level.LOW
    kind: Literal["a", "b"] = "a"
    when: datetime.datetime | None = None
    id: uuid.UUID | None = None
    price: Decimal = Decimal("1.50")
    photo: bytes = b""
    count: int = 3


class Street(pydantic.BaseModel):
    name: str = pydantic.Field(min_length=1)


class Streets(pydantic.RootModel[list[Street]]):
    pass


class Address(pydantic.BaseModel):
    """An address."""

    street: Street
    number: int = pydantic.Field(gt=0, description="House number")
    extra: Street | None = None
    kind: Literal["home", "work"] = "home"


class Visit(Struct):
    address: Address
    more: list[Street] = []


PERSON: dict[str, Any] = {
    "name": "Ada",
    "age": 36,
    "place": {"city": "London", "zip": None},
    "shape": {"type": "circle", "radius": 1.5},
    "pets": [{"name": "Tom", "tags": []}],
    "links": [{"href": "x", "title": "y"}],
    "pair": [1, "one"],
    "unique": [1, 2],
    "colour": "blue",
    "level": 2,
    "kind": "b",
    "when": None,
    "id": None,
    "price": "2.50",
    "photo": "aGk=",
    "count": 4,
}


def nodes(schema: object) -> Iterator[dict[str, Any]]:
    """Every schema within a schema; the names of properties and definitions are no schemas."""
    if isinstance(schema, list):
        for part in schema:
            yield from nodes(part)
    elif isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            if key in {"properties", "$defs"}:
                yield from nodes(list(part.values()))
            elif key in {"items", "anyOf"}:
                yield from nodes(part)


def assert_strict(schema: dict[str, Any]) -> None:
    """What a server that enforces schemas demands of one."""
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["type"] == "object"
    for node in nodes(schema):
        assert {"type", "anyOf", "$ref"} & set(node), node
        assert "$ref" not in node or set(node) == {"$ref"}
        assert not {"default", "oneOf", "allOf", "minLength", "discriminator", "prefixItems", "uniqueItems"} & set(node)
        if node.get("type") == "object":
            assert node["additionalProperties"] is False
            assert node["required"] == list(node["properties"])
    for node in nodes(schema):
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"]


def test_plain_schema() -> None:
    """A class gives an object with its fields, constraints and descriptions; what has a default is optional."""
    schema = json_schema_of(Person)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(PERSON, schema)
    assert schema["type"] == "object"
    assert schema["required"] == ["name", "age", "place", "shape", "pets", "links", "pair", "unique"]
    definitions: Any = schema["$defs"]
    assert definitions["Place"]["description"] == "Where somebody lives."
    assert definitions["Place"]["properties"]["city"] == {
        "type": "string",
        "minLength": 1,
        "description": "Name of the city",
    }


@pytest.mark.parametrize("kind", [Person, Node, Place, Pet, Link, Address, Visit, list[Pet], int, Circle | Square])
def test_strict_schema(kind: type) -> None:
    """Every object is closed and complete, and only what a server can enforce is there."""
    assert_strict(json_schema_of(kind, strict=True))


def test_strict_describes_what_it_cannot_say() -> None:
    """A default, a length and an encoding are told to the model in words."""
    properties: Any = json_schema_of(Person, strict=True)["properties"]
    assert properties["count"] == {"type": "integer", "description": "(default: 3)"}
    assert "base64" in properties["photo"]["description"]
    definitions: Any = json_schema_of(Person, strict=True)["$defs"]
    assert definitions["Place"]["properties"]["city"]["description"] == "Name of the city (minLength: 1)"
    assert definitions["Colour"]["type"] == "string"
    assert properties["kind"]["type"] == "string"
    assert make_strict({"enum": ["a", 3]})["type"] == ["integer", "string"]


def test_strict_values_decode() -> None:
    """What a strict schema accepts becomes a value, of the nested types too."""
    person = JsonType(Person, strict=True)
    jsonschema.validate(PERSON, person.schema)
    value = person.decode(json.dumps(PERSON))
    assert value.place == Place("London")
    assert value.shape == Circle(1.5)
    assert value.colour is Colour.BLUE
    assert value.price == Decimal("2.50")
    assert person.convert(PERSON) == value
    assert repr(person) == "JsonType(Person)"


def test_numbers_keep_their_digits() -> None:
    """A Decimal is made from the text, not from a float."""

    class Price(Struct):
        amount: Decimal

    assert decode_as(Price, b'{"amount":0.10000000000000000555}').amount == Decimal("0.10000000000000000555")


def test_recursive() -> None:
    """A type that holds itself keeps its definition; the root is in place nevertheless."""
    schema: Any = json_schema_of(Node, strict=True)
    variants = schema["properties"]["next"]["anyOf"]
    assert sorted(variants, key=str) == [{"$ref": "#/$defs/Node"}, {"type": "null"}]
    assert_strict(schema)
    assert decode_as(Node, '{"value":1,"next":{"value":2,"next":null}}').next == Node(2)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[int], '{"value":[1,2]}', [1, 2]),
        (int, '{"value":3}', 3),
        (Literal["a", "b"], '{"value":"b"}', "b"),
        (Colour, '{"value":"red"}', Colour.RED),
        (Circle | Square, '{"value":{"type":"square","side":2}}', Square(2)),
        (list[Street], '{"value":[{"name":"x"}]}', [Street(name="x")]),
        (Streets, '{"value":[{"name":"x"}]}', Streets([Street(name="x")])),
    ],
)
def test_wrapped(kind: type, text: str, value: object) -> None:
    """What is no object is wrapped in one, and comes out unwrapped."""
    for strict in (False, True):
        found: JsonType[object] = JsonType(kind, strict=strict)
        assert found.is_wrapped
        jsonschema.validate(json.loads(text), found.schema)
        assert found.decode(text) == value
    assert not JsonType(dict[str, int]).is_wrapped


def test_pydantic() -> None:
    """A pydantic model gives its own schema and checks its own values."""
    assert decode_as(Address, '{"street":{"name":"a"},"number":1}').number == 1
    assert JsonType(Address).convert({"street": {"name": "a"}, "number": 1}).street.name == "a"
    with pytest.raises(DecodeError, match=r"not a Address: Input should be greater than 0 - at `\$.number`"):
        decode_as(Address, '{"street":{"name":"a"},"number":0}')


def test_pydantic_inside() -> None:
    """A pydantic model inside a Struct has its definitions at the root, and is made from JSON too."""
    schema: Any = json_schema_of(Visit)
    assert "Street" in schema["$defs"]
    assert "$defs" not in schema["properties"]["address"]
    jsonschema.validate({"address": {"street": {"name": "a"}, "number": 1}}, schema)
    visit = decode_as(Visit, '{"address":{"street":{"name":"a"},"number":1},"more":[{"name":"b"}]}')
    assert visit.address.number == 1
    assert visit.more[0].name == "b"
    with pytest.raises(DecodeError, match="number"):
        decode_as(Visit, '{"address":{"street":{"name":"a"},"number":0}}')


def test_pydantic_is_not_imported() -> None:
    """Schemas of types that are not pydantic's load nothing of it."""
    code = (
        "import sys, gorouter_trio.wire.schema as s\n"
        "assert s.decode_as(list[int], b'{\"value\":[1]}') == [1]\n"
        "assert 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (dict[str, int], r"\$: an object with free keys"),
        (dict, r"\$: an object with free keys"),
        (Any, "anything goes"),
        (list, "anything goes"),
        (msgspec.defstruct("A", [("m", dict[str, int])]), r"\$.m: an object with free keys"),
        (msgspec.defstruct("B", [("m", list[Any])]), r"\$.m\[\]: anything goes"),
        (msgspec.defstruct("C", [("m", object)]), r"\$.m: anything goes"),
    ],
)
def test_no_strict_schema(kind: type, where: str) -> None:
    """What cannot be enforced is refused with its place, and has a plain schema all the same."""
    with pytest.raises(ConfigError, match=where):
        json_schema_of(kind, strict=True)
    jsonschema.Draft202012Validator.check_schema(json_schema_of(kind))


def test_empty_object() -> None:
    """A class without fields is a closed object, not a mapping."""

    class Nothing(Struct):
        pass

    assert_strict(json_schema_of(Nothing, strict=True))


class Backwards(pydantic.BaseModel):
    call: Callable[[], int]


@pytest.mark.parametrize("kind", [type(sys), complex, msgspec.defstruct("D", [("c", complex)]), Backwards])
def test_no_schema(kind: type) -> None:
    """A type that JSON does not know is refused, by name."""
    with pytest.raises(ConfigError, match="has no JSON schema"):
        json_schema_of(kind)


def test_two_types_of_one_name() -> None:
    """Definitions cannot share a name unless they are the same."""

    other = msgspec.defstruct("Street", [("length", int)])
    with pytest.raises(ConfigError, match="two different types are called Street"):
        json_schema_of(msgspec.defstruct("Map", [("visit", Visit), ("street", other)]))


def test_object_accepts_anything() -> None:
    """`object` is a place where any JSON may stand."""

    class Box(Struct):
        inside: object

    assert decode_as(Box, '{"inside":[1,{"a":null}]}').inside == [1, {"a": None}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "truncated"),
        ("nonsense", "malformed"),
        ('{"city":""}', r"length >= 1 - at `\$.city`"),
        ("[]", "Expected `object`"),
        ('{"zip":"1"}', "missing required field `city`"),
        ('{"city":"\\ud800"}', "truncated|surrogate"),
        ('{"city":NaN}', "malformed"),
        ("[" * 100_000, "nested too deeply|Expected `object`"),
        ('{"x":' * 100_000, "nested too deeply|truncated"),
    ],
)
def test_wrong_values(text: str, reason: str) -> None:
    """What does not fit is one error that says where, whatever the text is."""
    with pytest.raises(DecodeError, match=reason):
        decode_as(Place, text)


def test_names() -> None:
    """A name for the schema is one that the API accepts."""
    assert JsonType(Person).name == "Person"
    assert JsonType(list[int]).name == "list"
    for union in (Circle | Square, Optional[Circle]):  # noqa: UP045  # the older spelling is of another class
        assert JsonType[object](union).name == "value"  # type: ignore[arg-type]  # a union is no class to mypy


SCHEMAS = st.recursive(
    st.sampled_from(
        [{"type": "string", "minLength": 1}, {"type": "integer", "default": 3}, {"enum": ["a"]}, {"type": ["null"]}]
    ),
    lambda inner: st.one_of(
        st.builds(lambda i: {"type": "array", "items": i, "uniqueItems": True}, inner),
        st.builds(lambda a, b: {"oneOf": [a, b]}, inner, inner),
        st.builds(lambda i: {"allOf": [i], "description": "d"}, inner),
        st.builds(
            lambda p: {"type": "object", "properties": p, "required": []},
            st.dictionaries(st.sampled_from(["default", "$ref", "type", "x"]), inner),
        ),
    ),
    max_leaves=8,
)


@given(SCHEMAS)
def test_any_schema_made_strict(inner: dict[str, Any]) -> None:
    """Schemas from elsewhere become strict as well, properties named like keywords included."""
    strict = make_strict({"type": "object", "properties": {"x": inner}, "required": []})
    assert_strict(strict)
    assert make_strict(strict) == strict
