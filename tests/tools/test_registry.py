"""Tools made of functions: schemas, docstrings, limits, names, and what cannot be a tool."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import pydantic
import pytest
import toolbox_functions
from msgspec import Meta, Struct

import gorouter_trio as gr
from gorouter_trio.security.rules import ToolRules
from gorouter_trio.tools.arguments import ArgumentsError
from gorouter_trio.tools.docstrings import parse_docstring

jsonschema = pytest.importorskip("jsonschema")


class Unit(enum.Enum):
    CELSIUS = "c"
    KELVIN = "k"


class Place(Struct):
    """A place on earth."""

    city: str
    country: str = "FR"


@dataclasses.dataclass
class Window:
    start: int
    end: int = 10


class Extra(TypedDict):
    a: int
    b: NotRequired[str]


class Model(pydantic.BaseModel):
    level: int = pydantic.Field(ge=0)


@gr.tool
async def weather(
    place: Place,
    days: Annotated[int, Meta(ge=1, le=14, description="How many days")] = 3,
    /,
    unit: Unit = Unit.CELSIUS,
    *,
    detail: Literal["short", "long"] = "short",
    window: Window | None = None,
    extra: Extra | None = None,
    tags: list[str] = [],  # noqa: B006 - what people write
    model: Model | None = None,
    ctx: gr.ToolContext,
) -> str:
    """Tells the weather.

    In any place.

    Args:
        place: Where.
        days: Not this one.
        unit (Unit): The unit,
            in two lines.
        ctx: What the model must not see.

    Returns:
        A text.
    """
    return repr((place, days, unit, detail, window, extra, tags, model, ctx.call_id))


def bound(tool: gr.AnyTool, **arguments: object) -> Callable[[], object]:
    return tool.bind(arguments, gr.ToolContext(tool=tool.name, call_id="call_7"))


def test_schema() -> None:
    """The signature becomes a closed schema: types, constraints, defaults, descriptions; the context is not in it."""
    schema: Any = weather.parameters
    jsonschema.Draft202012Validator.check_schema(schema)
    assert (weather.name, weather.description) == ("weather", "Tells the weather.\n\nIn any place.")
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["place"]
    properties = schema["properties"]
    assert list(properties) == ["place", "days", "unit", "detail", "window", "extra", "tags", "model"]
    assert properties["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 14,
        "description": "How many days",
        "default": 3,
    }
    assert properties["detail"]["enum"] == ["long", "short"]
    assert properties["place"]["description"] == "Where."
    assert properties["unit"]["description"] == "The unit, in two lines."
    assert properties["unit"]["default"] == "c"
    assert schema["$defs"]["Place"]["description"] == "A place on earth."
    assert set(schema["$defs"]) == {"Place", "Unit", "Window", "Extra"}


async def test_bind() -> None:
    """Arguments become values of the parameters' types; what is not given is left to the function."""
    call = bound(weather, place={"city": "Paris"}, unit="k", window={"start": 2}, extra={"a": 1}, model={"level": 2})
    assert await call() == repr(  # type: ignore[misc]  # an async function
        (Place("Paris"), 3, Unit.KELVIN, "short", Window(2), {"a": 1}, [], Model(level=2), "call_7")
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "missing required field `place`"),
        ({"place": {"city": 3}}, r"Expected `str`, got `int` - at `\$.place.city`"),
        ({"place": {"city": "x"}, "days": 15}, r"Expected `int` <= 14 - at `\$.days`"),
        ({"place": {"city": "x"}, "days": "3"}, "Expected `int`, got `str`"),
        ({"place": {"city": "x"}, "unit": "f"}, "Invalid enum value 'f'"),
        ({"place": {"city": "x"}, "detail": "x"}, "Invalid enum value 'x'"),
        ({"place": {"city": "x"}, "ctx": {}}, "unknown field `ctx`"),
        ({"place": {"city": "x"}, "nope": 1}, "unknown field `nope`"),
        ({"place": {"city": "x"}, "window": {"end": 1}}, "missing required field `start`"),
        ({"place": {"city": "x"}, "model": {"level": -1}}, "greater than or equal to 0"),
        ({"place": [1]}, "Expected `object`, got `array`"),
    ],
    ids=range(11),
)
def test_bind_refuses(arguments: dict[str, object], reason: str) -> None:
    """What does not fit is refused with its place; the context cannot be given by a model."""
    with pytest.raises(ArgumentsError, match=f"the arguments do not fit: .*{reason}"):
        bound(weather, **arguments)


def test_values_are_the_tools_own() -> None:
    """A tool that changes what it got changes nothing that others see."""

    @gr.tool
    def change(data: dict[str, list[int]], anything: Any) -> None:
        data["a"].append(1)
        anything["b"] = 2

    arguments: dict[str, Any] = {"data": {"a": []}, "anything": {}}
    bound(change, **arguments)()
    assert arguments == {"data": {"a": []}, "anything": {}}


def test_local_types() -> None:
    """A type that is defined where the tool is, inside a function, is found."""

    class Local(Struct):
        x: int

    @gr.tool
    def use(value: Local) -> int:
        return value.x

    @gr.tool(name="other")
    def use_too(value: Local) -> int:
        return value.x

    assert bound(use, value={"x": 3})() == 3
    assert bound(use_too, value={"x": 4})() == 4


def test_call_passes() -> None:
    """A tool is still the function to those who call it."""

    @gr.tool
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8
    assert repr(double) == "Tool(double)"


def test_settings() -> None:
    """The settings of a tool are kept, and shown to the model where it is concerned."""
    rules = ToolRules(role="admin")

    @gr.tool(
        name="say-it",
        description="Says it.",
        aliases=("say", "speak"),
        rules=rules,
        timeout_s=2,
        max_result_bytes=2000,
        max_parallel=1,
        idempotent=True,
        strict=True,
    )
    def say(text: str, times: int = 1) -> str:
        """Not this."""
        return text * times

    assert (say.name, say.aliases, say.rules, say.timeout_s) == ("say-it", ("say", "speak"), rules, 2)
    assert (say.max_result_bytes, say.max_parallel, say.idempotent, say.isolation) == (2000, 1, True, "thread")
    definition = json.loads(gr.ToolSet([say]).encoded)[0]
    assert definition["type"] == "function"
    assert definition["function"]["strict"] is True
    assert definition["function"]["description"] == "Says it."
    assert definition["function"]["parameters"]["required"] == ["text", "times"]


def test_kinds_of_functions() -> None:
    """Methods, partials and callable objects are functions too."""

    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def add(self, by: int) -> int:
            """Adds."""
            self.count += by
            return self.count

        async def __call__(self, text: str) -> str:
            return text

    counter = Counter()
    add = gr.Tool(counter.add)
    assert list(add.parameters["properties"]) == ["by"]  # type: ignore[call-overload]  # a mapping
    assert bound(add, by=2)() == 2
    assert add.description == "Adds."
    assert gr.Tool(functools.partial(counter.add, by=5), name="five").name == "five"
    assert gr.Tool(counter, name="echo").isolation == "task"
    assert gr.Tool(lambda: 3, name="three").parameters["properties"] == {}


def _generator() -> Iterator[int]:
    yield 1


async def _async_generator() -> AsyncIterator[int]:
    yield 1


def _untyped(x) -> None: ...


def _star(*args: int) -> None: ...


def _stars(**kwargs: int) -> None: ...


def _odd(x: Callable[[], int]) -> None: ...


def _unknown(x: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821 - the point


def _plain(x: int) -> None: ...


async def _async(x: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "settings", "reason"),
    [
        (3, {}, "made of a function, not of a int"),
        (_generator, {}, "does not yield"),
        (_async_generator, {}, "does not yield"),
        (_untyped, {}, "tool _untyped: parameter x has no type"),
        (_star, {}, r"tool _star: \*args: 'int' takes anything|takes anything"),
        (_stars, {}, "takes anything"),
        (_odd, {}, "tool _odd: .* has no JSON schema"),
        (_unknown, {}, "tool _unknown: a type in its signature cannot be found: name 'NoSuchType'"),
        (lambda: 1, {}, "'<lambda>': a name is 1 to 64 letters"),
        (_plain, {"name": "with space"}, "a name is 1 to 64"),
        (_plain, {"name": "x" * 65}, "a name is 1 to 64"),
        (_plain, {"name": 3}, "a name is 1 to 64"),
        (_plain, {"aliases": ["a", "a"]}, "aliases must be other names"),
        (_plain, {"aliases": ["_plain"]}, "aliases must be other names"),
        (_plain, {"aliases": [""]}, "aliases must be other names"),
        (_plain, {"aliases": 5}, "aliases must be other names"),
        (_plain, {"timeout_s": 10**400}, "timeout_s must be"),
        (_plain, {"rules": {"role": "x"}}, "rules must be ToolRules"),
        (_plain, {"timeout_s": 0}, "timeout_s must be a number above 0"),
        (_plain, {"timeout_s": float("inf")}, "timeout_s must be"),
        (_plain, {"timeout_s": "3"}, "timeout_s must be"),
        (_plain, {"max_parallel": 1.5}, "max_parallel must be"),
        (_plain, {"max_result_bytes": True}, "max_result_bytes must be"),
        (_plain, {"isolation": "fork"}, "isolation must be one of"),
        (_plain, {"isolation": "task"}, "an async function runs in a task"),
        (_async, {"isolation": "thread"}, "an async function runs in a task"),
        (lambda: 1, {"name": "x", "isolation": "process"}, "a function at the top of a module"),
        (functools.partial(_plain, x=1), {"name": "x", "isolation": "process"}, "a function at the top of a module"),
        (_plain, {"parameters": {"type": "strnig"}}, "tool _plain: parameters: is no JSON schema"),
        (
            _plain,
            {"parameters": {"$ref": "http://127.0.0.1:9/x"}},
            "parameters: is no JSON schema: .*http://127.0.0.1:9/x",
        ),
    ],
    ids=range(30),
)
def test_no_tools(function: Any, settings: dict[str, Any], reason: str) -> None:
    """What cannot be a tool is refused when it is made, with what to do."""
    with pytest.raises(gr.ConfigError, match=reason):
        gr.Tool(function, **settings)


def test_strict_tools_need_closed_types() -> None:
    """A strict tool with a parameter that no server can enforce is refused, with the place."""

    def put(values: dict[str, int]) -> None: ...

    assert gr.Tool(put).name == "put"
    with pytest.raises(gr.ConfigError, match=r"tool put: \$.values: an object with free keys"):
        gr.Tool(put, strict=True)


RAW = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[a-z]+$"}, "days": {"type": "integer", "maximum": 3}},
    "required": ["city"],
    "additionalProperties": False,
}


def test_own_schema() -> None:
    """A tool with a schema of its own gets a mapping that obeys it, and a context if it names one."""

    def run(arguments: Mapping[str, object], ctx: gr.ToolContext) -> object:
        return arguments, ctx.call_id

    tool = gr.Tool(run, name="raw", parameters=RAW)
    assert tool.parameters == RAW
    assert tool.has_own_schema
    assert bound(tool, city="paris")() == ({"city": "paris"}, "call_7")
    assert bound(gr.Tool(dict, name="raw", parameters=RAW), city="x")() == {"city": "x"}
    with pytest.raises(ArgumentsError, match="is a required property"):
        bound(tool)
    with pytest.raises(ArgumentsError, match=r"\$.days: 5 is greater than the maximum of 3"):
        bound(tool, city="x", days=5)
    with pytest.raises(ArgumentsError, match=r"\$.city: .*; \$.days: .* is not of type .*; \$: Additional"):
        bound(tool, city="1" * 10_000, days="x", more=1)
    with pytest.raises(ArgumentsError) as caught:
        bound(tool, city="1" * 10_000)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"properties": {"a": {"type": ["integer", "null"]}}}, {"a": None}, {"a": "x"}),
        ({"properties": {"a": {"enum": [1, "x"]}}}, {"a": "x"}, {"a": 2}),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"type": "array", "minItems": 1}}},
            {"a": [1]},
            {"a": []},
        ),
        ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, {"b": 1}, {"c": 1}),
        ({"properties": {"a": {"multipleOf": 0.5}}}, {"a": 1.5}, {"a": 1.2}),
    ],
    ids=range(5),
)
def test_own_schema_like_the_reference(schema: dict[str, Any], good: dict[str, Any], bad: dict[str, Any]) -> None:
    """A schema means what the reference implementation says that it means."""
    tool = gr.Tool(lambda arguments: arguments, name="raw", parameters={"type": "object", **schema})
    reference = jsonschema.Draft202012Validator({"type": "object", **schema})
    assert reference.is_valid(good)
    bound(tool, **good)
    assert not reference.is_valid(bad)
    with pytest.raises(ArgumentsError):
        bound(tool, **bad)


def test_own_schema_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra there is no such tool: arguments that nobody can check are not run."""
    monkeypatch.setitem(__import__("sys").modules, "jsonschema_rs", None)
    with pytest.raises(gr.ConfigError, match=r"pip install 'gorouter-trio\[schema\]'"):
        gr.Tool(lambda arguments: arguments, name="raw", parameters=RAW)


# Sets


def test_set() -> None:
    """A set has one name space, keeps the order, and takes functions, tools and definitions."""
    other = gr.Tool(lambda: 1, name="other", aliases=["also"])
    search = gr.ServerTool(type="openrouter:web_search")
    wire = {"type": "function", "function": {"name": "mine", "parameters": {"type": "object"}}}
    tools = gr.ToolSet([_plain, other, search, wire, gr.FunctionTool(gr.FunctionSpec(name="yours"))])
    names = [entry.get("function", entry).get("name", entry["type"]) for entry in json.loads(tools.encoded)]
    assert names == ["_plain", "other", "openrouter:web_search", "mine", "yours"]
    assert tools.find("also") is other
    assert tools.find("mine") is None
    assert tools.find("nope") is None
    assert len(tools) == 5
    assert tools.has_functions
    assert not gr.ToolSet([search, wire]).has_functions
    assert repr(tools) == "ToolSet(_plain, other, openrouter:web_search, mine, yours)"
    assert [type(source) for source in tools] == [gr.Tool, gr.Tool, gr.ServerTool, dict, gr.FunctionTool]


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ([_plain, _plain], "'_plain' is there twice"),
        ([gr.Tool(_plain, aliases=["x"]), gr.Tool(_async, name="x")], "'x' is there twice, in _plain and in x"),
        ([gr.Tool(_plain, aliases=["x"]), gr.Tool(_async, aliases=["x"])], "'x' is there twice"),
        ([_plain, {"type": "function", "function": {"name": "_plain"}}], "'_plain' is there twice"),
        ([3], "a int is not a tool"),
        ([int], "a type is not a tool"),
        ([{}], "a definition needs a name"),
        ([{"type": "function", "function": {}}], "a definition needs a name"),
        (3, "must be a list of tools, not a int"),
        (None, "must be a list of tools, not a NoneType"),
        ([{"type": "function", "function": {"name": "x", "description": object()}}], "cannot be written as JSON"),
        ([gr.Tool(_plain, description="\ud800")], "cannot be written as JSON"),
    ],
    ids=range(12),
)
def test_no_set(sources: list[Any], reason: str) -> None:
    """A name that means two tools is refused (seed defect T8), and so is what is no tool."""
    with pytest.raises(gr.ConfigError, match=reason):
        gr.ToolSet(sources)


def test_merged() -> None:
    """Merging adds tools whose names are free."""
    mine = gr.ToolSet([gr.Tool(lambda: 1, name="a", aliases=["b"])])
    theirs = gr.ToolSet([gr.Tool(lambda: 2, name=name) for name in ("b", "c")])
    merged = mine.merged(theirs)
    assert repr(merged) == "ToolSet(a, c)"
    assert merged.find("b") is mine.find("a")


def test_process_tools_must_be_found() -> None:
    """A tool in a process is what its module has by that name."""
    assert gr.ToolSet([toolbox_functions.add])
    with pytest.raises(gr.ConfigError, match="tool add: a tool in a process must be importable"):
        gr.ToolSet([gr.Tool(toolbox_functions.hidden, name="add", isolation="process")])


# Docstrings


@pytest.mark.parametrize(
    "text",
    [
        """Does it.

        Really.

        Args:
            a: The first.
            b (int, optional): The second,
                in two lines.
            *c: The rest.

        Raises:
            d: Not a parameter.
        """,
        """
        Does it.

        Really.

        Parameters
        ----------
        a : int
            The first.
        b : int, optional
            The second,
            in two lines.
        *c
            The rest.

        Returns
        -------
        d : int
            Not a parameter.
        """,
        """Does it.

        Really.

        :param a: The first.
        :param int b: The second,
            in two lines.
        :param c: The rest.
        :returns d: Not a parameter.
        :raises ValueError: nor this.
        """,
        """Does it.

        Really.

        @param a: The first.
        @param b: The second,
            in two lines.
        @param c: The rest.
        @return: nothing
        """,
    ],
    ids=["google", "numpy", "sphinx", "epydoc"],
)
def test_docstrings(text: str) -> None:
    """The description and the parameters are read in each of the usual styles."""
    found = parse_docstring(text)
    assert found.description == "Does it.\n\nReally."
    assert found.parameters == {"a": "The first.", "b": "The second, in two lines.", "c": "The rest."}


@pytest.mark.parametrize(
    ("text", "description", "parameters"),
    [
        (None, "", {}),
        ("", "", {}),
        ("One line.", "One line.", {}),
        ("Note that: it is fine.", "Note that: it is fine.", {}),
        ("Args:", "", {}),
        ("Args:\nno indent: text", "", {}),
        ("D.\n\nSays:\n    a: b", "D.\n\nSays:\n    a: b", {}),
        ("Args:\n    a, b: both", "", {}),
        ("D.\n\nParameters\n----------\na, b : int\n    Both.", "D.", {"a": "Both.", "b": "Both."}),
        ("D.\n\nArgs:\n    a: x\n\n        y: z\n    b:\n", "D.", {"a": "x y: z"}),
        (":param: nothing\n:param a b c: last", "", {"c": "last"}),
    ],
    ids=range(11),
)
def test_odd_docstrings(text: str | None, description: str, parameters: dict[str, str]) -> None:
    """What is not quite in any style does no harm."""
    found = parse_docstring(text)
    assert (found.description, dict(found.parameters)) == (description, parameters)


def test_context() -> None:
    """The context shows neither the principal nor the token."""
    context = gr.ToolContext(tool="t", call_id="c", token="secret")
    assert "secret" not in repr(context)
    context.progress("nobody listens")
    assert context.remaining_s == float("inf")
    assert msgspec.UNSET is not context.principal


def test_a_schema_of_ones_own_for_the_decorator() -> None:
    """`tool` takes the settings of `Tool`, the schema too."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}

    @gr.tool(parameters=schema)
    def weather(arguments: Mapping[str, object]) -> str:
        return f"rain in {arguments['city']}"

    assert (weather.parameters, weather.has_own_schema) == (schema, True)
    assert weather.bind({"city": "Ulm"}, gr.ToolContext(tool="weather"))() == "rain in Ulm"
