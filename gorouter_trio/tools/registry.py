"""Tools as values: what one is, how a function becomes one, and the set that a turn may use."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, Generic, Literal, ParamSpec, TypeAlias, TypeVar, cast, final, overload

from msgspec import UNSET, Struct

from .._callables import is_async
from ..errors import ConfigError
from ..security.rules import ToolRules
from ..wire.codec import encode_json
from ..wire.preferences import FunctionSpec, FunctionTool, ServerTool
from ..wire.schema_check import SchemaCheck
from .arguments import ArgumentsError
from .docstrings import parse_docstring
from .signature import Signature

if TYPE_CHECKING:
    from types import FrameType

    from ..wire.schema import Schema
    from .context import ToolContext

    _AroundCall: TypeAlias = Callable[[ToolContext, Callable[[], object]], object]

__all__ = ["AnyTool", "Isolation", "Tool", "ToolSet", "ToolSource", "tool"]

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Isolation = Literal["task", "thread", "process"]
"""Where a tool runs: an async function in a task of its own, a sync one in a thread, either in a process.

A task and a thread share the program's memory and its lock: a tool that computes for long, that may crash the
interpreter or is not trusted belongs into a process, which is killed when its time is up. A thread cannot be
killed; one that hangs goes on hanging, is counted, and takes up one of `ToolLimits.max_abandoned_threads`."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHOICES: Final = ("task", "thread", "process")


@final
class Tool(Generic[P, R_co]):
    """A function that a model may call, with its schema, its limits and its rules. Made once; never changes.

    The schema comes from the signature, the descriptions from `Annotated[..., msgspec.Meta(description=...)]` and
    from the docstring. With `parameters`, a JSON schema, it is that schema instead, and the function takes one
    mapping and, if it names one, a `ctx`; the extra `schema` is needed to check arguments against it.

    `name` and `description` stand instead of the function's own. `aliases` are other names that a model may use.
    `rules` hold with any guard, and without one the tool is refused. `timeout_s`, `max_result_bytes` and
    `max_parallel` (at the same time in the whole client) stand instead of `ToolLimits`. `idempotent` allows to run
    it again when a turn is resumed of which nobody knows how far it got. `strict` asks the server to hold the
    model to the schema. `isolation` is explained there; a tool in a process must be importable by name: a function
    at the top of a module other than `__main__`, not a closure, a lambda or a method of an object.

    Calling the tool calls the function. Raises `ConfigError` for what cannot be a tool.
    """

    __slots__ = (
        "__weakref__",
        "_around",
        "_check",
        "_signature",
        "_takes_context",
        "aliases",
        "definition",
        "description",
        "function",
        "idempotent",
        "isolation",
        "max_parallel",
        "max_result_bytes",
        "name",
        "rules",
        "timeout_s",
    )

    def __init__(
        self,
        function: Callable[P, R_co],
        *,
        name: str | None = None,
        description: str | None = None,
        parameters: Mapping[str, object] | None = None,
        aliases: Iterable[str] = (),
        rules: ToolRules | None = None,
        timeout_s: float | None = None,
        max_result_bytes: int | None = None,
        max_parallel: int | None = None,
        isolation: Isolation | None = None,
        idempotent: bool = False,
        strict: bool = False,
        namespace: Mapping[str, object] | None = None,
    ) -> None:
        self.name = _checked_name(_name_of(function) if name is None else name, function)
        self.function = function
        self.aliases = _checked_aliases(aliases, self.name)
        docstring = parse_docstring(function.__doc__ if inspect.isroutine(function) else None)
        self.description = docstring.description if description is None else description
        self.rules = _checked_rules(rules, self.name)
        self.timeout_s = _checked_limit("timeout_s", timeout_s, tool=self.name, least=0)
        self.max_result_bytes = cast("int | None", _checked_limit("max_result_bytes", max_result_bytes, tool=self.name))
        self.max_parallel = cast("int | None", _checked_limit("max_parallel", max_parallel, tool=self.name))
        self.isolation = _checked_isolation(isolation, function, tool=self.name)
        self.idempotent = idempotent
        self._check = None if parameters is None else _schema_check(parameters, self.name)
        self._signature: Signature | None = None
        self._around: _AroundCall | None = None
        self._takes_context = False
        if parameters is None:
            self._signature = Signature(
                function, docstring=docstring, name=self.name, strict=strict, namespace=namespace
            )
        else:
            self._takes_context = _names_context(function)
        schema = dict(parameters) if self._signature is None else self._signature.schema  # type: ignore[arg-type]  # one of the two
        self.definition = _definition(self.name, self.description, schema=schema, strict=strict)

    @property
    def parameters(self) -> Schema:
        """The JSON schema of the arguments."""
        return cast("Schema", self.definition.function.parameters)

    @property
    def has_own_schema(self) -> bool:
        """Whether the schema was given, not made from the signature."""
        return self._signature is None

    def bind(self, arguments: Mapping[str, object], context: ToolContext) -> Callable[[], object]:
        """The call, ready to be made; raises `ArgumentsError`, with a message for the model, where they do not fit.

        The function gets values of its own: changing them changes nothing that others see.
        """
        own = copy.deepcopy(dict(arguments))
        call = self._bind(own, context)
        return call if self._around is None else functools.partial(self._around, context, call)

    def _bind(self, own: dict[str, object], context: ToolContext) -> Callable[[], object]:
        if self._signature is not None:
            positional, named = self._signature.bind(own, context)
            return functools.partial(cast("Callable[..., object]", self.function), *positional, **named)
        problem = None if self._check is None else self._check.problem(own)
        if problem is not None:
            raise ArgumentsError(f"the arguments do not fit: {problem}")
        call = functools.partial(cast("Callable[..., object]", self.function), own)
        return functools.partial(call, ctx=context) if self._takes_context else call

    def run_by(self, around: _AroundCall) -> Tool[P, R_co]:
        """The same tool, whose calls are made by `around`, as async as its function is; not those in a process."""
        other = copy.copy(self)
        other._around = around  # noqa: SLF001 - one of its own kind
        return other

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Tool({self.name})"


AnyTool: TypeAlias = Tool[..., object]
"""A tool of any signature."""

ToolSource: TypeAlias = AnyTool | Callable[..., object] | FunctionTool | ServerTool | Mapping[str, object]
"""What `tools=` takes: tools, functions to make tools of, and definitions, in types or in wire names, of functions that
the caller runs or of tools that run at the API."""


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, object] | None = None,
    aliases: Iterable[str] = (),
    rules: ToolRules | None = None,
    timeout_s: float | None = None,
    max_result_bytes: int | None = None,
    max_parallel: int | None = None,
    isolation: Isolation | None = None,
    idempotent: bool = False,
    strict: bool = False,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    parameters: Mapping[str, object] | None = None,
    aliases: Iterable[str] = (),
    rules: ToolRules | None = None,
    timeout_s: float | None = None,
    max_result_bytes: int | None = None,
    max_parallel: int | None = None,
    isolation: Isolation | None = None,
    idempotent: bool = False,
    strict: bool = False,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a tool of a function: `@tool`, or `@tool(timeout_s=5)` with the settings of `Tool`."""
    namespace = _local_names(inspect.currentframe())

    def make(function: Callable[P, R]) -> Tool[P, R]:
        return Tool(
            function,
            name=name,
            description=description,
            parameters=parameters,
            aliases=aliases,
            rules=rules,
            timeout_s=timeout_s,
            max_result_bytes=max_result_bytes,
            max_parallel=max_parallel,
            isolation=isolation,
            idempotent=idempotent,
            strict=strict,
            namespace=namespace,
        )

    return make if function is None else make(function)


class ToolSet:
    """The tools of a turn: one name space of names and aliases, in the order given. Never changes.

    Functions become tools; definitions without a function are sent to the model, and a call of one is answered
    with `error_not_found`. Raises `ConfigError` for a name that is there twice, and for what is no tool.
    """

    __slots__ = ("_definitions", "_tools", "encoded")

    def __init__(self, tools: Iterable[ToolSource] = ()) -> None:
        self._tools: dict[str, AnyTool] = {}
        self._definitions: dict[str, FunctionTool | ServerTool | Mapping[str, object]] = {}
        taken: dict[str, str] = {}
        if not isinstance(cast("object", tools), Iterable):
            raise ConfigError(f"tools: must be a list of tools, not a {type(tools).__name__}")
        for source in tools:
            self._add(_checked_source(source), taken)
        self.encoded = _encoded(self._definitions)
        """The value of a request's `tools`, as JSON."""

    def _add(self, source: AnyTool | FunctionTool | ServerTool | Mapping[str, object], taken: dict[str, str]) -> None:
        key = _key_of(source)
        names = (key, *source.aliases) if isinstance(source, Tool) else (key,)
        for name in names:
            if name in taken:
                raise ConfigError(f"tools: {name!r} is there twice, in {taken[name]} and in {key}")
            taken[name] = key
            if isinstance(source, Tool):
                self._tools[name] = source
        self._definitions[key] = source.definition if isinstance(source, Tool) else source
        if isinstance(source, Tool) and source.isolation == "process":
            _check_importable(source)

    @property
    def definitions(self) -> tuple[FunctionTool | ServerTool | Mapping[str, object], ...]:
        """What the model is told of each tool."""
        return tuple(self._definitions.values())

    @property
    def has_functions(self) -> bool:
        """Whether there is anything here that a supervisor can run."""
        return bool(self._tools)

    def find(self, name: str) -> AnyTool | None:
        """The tool that has this name or alias."""
        return self._tools.get(name)

    def is_for_caller(self, name: str) -> bool:
        """Whether this is a definition without a function: the caller of the chat runs it."""
        return name in self._definitions and name not in self._tools

    def merged(self, others: ToolSet) -> ToolSet:
        """These tools and those of `others` whose names are free here."""
        mine = {*self._definitions, *self._tools}
        more = [s for s in others if mine.isdisjoint((_key_of(s), *(s.aliases if isinstance(s, Tool) else ())))]
        return ToolSet([*self, *more])

    def __iter__(self) -> Iterator[AnyTool | FunctionTool | ServerTool | Mapping[str, object]]:
        for key, definition in self._definitions.items():
            yield self._tools.get(key, definition)

    def __len__(self) -> int:
        return len(self._definitions)

    def __repr__(self) -> str:
        return f"ToolSet({', '.join(self._definitions)})"


# Checks


def _name_of(function: Callable[..., object]) -> str:
    inner = function.func if isinstance(function, functools.partial) else function
    return getattr(inner, "__name__", type(inner).__name__)


def _checked_name(name: object, function: object) -> str:
    if not callable(function):
        raise ConfigError(f"a tool is made of a function, not of a {type(function).__name__}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"tool {name}: a tool returns one value, it does not yield")
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(f"tool {name!r}: a name is 1 to 64 letters, digits, '_' or '-'; give one with name=")
    return name


def _checked_aliases(aliases: object, name: str) -> tuple[str, ...]:
    if not isinstance(aliases, Iterable):
        raise ConfigError(f"tool {name}: aliases must be other names, each once, not {aliases!r}")
    found: tuple[object, ...] = (aliases,) if isinstance(aliases, str) else tuple(aliases)
    if not all(isinstance(alias, str) and alias for alias in found) or len({name, *found}) <= len(found):
        raise ConfigError(f"tool {name}: aliases must be other names, each once, not {found!r}")
    return cast("tuple[str, ...]", found)


def _checked_rules(rules: object, name: str) -> ToolRules | None:
    if rules is not None and not isinstance(rules, ToolRules):
        raise ConfigError(f"tool {name}: rules must be ToolRules, not a {type(rules).__name__}")
    return rules


def _checked_limit(setting: str, value: object, *, tool: str, least: int = 1) -> float | None:
    if value is None:
        return None
    kinds = (int, float) if setting.endswith("_s") else int
    right = (
        isinstance(value, kinds) and not isinstance(value, bool) and least <= cast("float", value) <= sys.float_info.max
    )
    if not right or value == 0:
        raise ConfigError(f"tool {tool}: {setting} must be a number above 0, not {value!r}")
    return cast("float", value)


def _checked_isolation(isolation: object, function: Callable[..., object], *, tool: str) -> Isolation:
    runs_in_task = is_async(function)
    if isolation is None:
        return "task" if runs_in_task else "thread"
    if isolation not in _CHOICES:
        raise ConfigError(f"tool {tool}: isolation must be one of {', '.join(_CHOICES)}, not {isolation!r}")
    if isolation != "process" and (isolation == "task") != runs_in_task:
        raise ConfigError(f"tool {tool}: an async function runs in a task, a sync one in a thread, either in a process")
    if isolation == "process" and ("<" in getattr(function, "__qualname__", "<") or _module_of(function) == "__main__"):
        raise ConfigError(
            f"tool {tool}: a tool in a process must be a function at the top of a module that can be imported, "
            "not one of __main__, a closure, a lambda or a method of an object"
        )
    return isolation


def _names_context(function: Callable[..., object]) -> bool:
    """Whether a function wants a context; one that cannot say gets none, as functions written in C."""
    try:
        return "ctx" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _module_of(function: Callable[..., object]) -> str:
    return getattr(function, "__module__", None) or ""


def _check_importable(tool: AnyTool) -> None:
    """A child finds the function by its name: it must be what stands there."""
    function = tool.function
    found: object = sys.modules.get(_module_of(function))
    for part in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    if found is not function and getattr(found, "function", None) is not function:
        raise ConfigError(
            f"tool {tool.name}: a tool in a process must be importable, and {_module_of(function)}."
            f"{getattr(function, '__qualname__', '')} is something else"
        )


def _encoded(definitions: Mapping[str, object]) -> bytes:
    try:
        return encode_json(list(definitions.values()))
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"tools: a definition cannot be written as JSON: {exc}") from exc


def _schema_check(parameters: Mapping[str, object], name: str) -> SchemaCheck:
    try:
        return SchemaCheck(parameters)
    except ConfigError as exc:
        # The check is made for answers first.
        raise ConfigError(f"tool {name}: parameters: {exc.message.removeprefix('response_schema: ')}") from exc


def _definition(name: str, description: str, *, schema: Mapping[str, object], strict: bool) -> FunctionTool:
    return FunctionTool(
        FunctionSpec(name=name, description=description or UNSET, parameters=schema, strict=True if strict else UNSET)
    )


def _checked_source(source: object) -> AnyTool | FunctionTool | ServerTool | Mapping[str, object]:
    if isinstance(source, (Tool, FunctionTool, ServerTool, Mapping)):
        return source
    if callable(source) and not isinstance(source, type):
        return Tool(source)
    raise ConfigError(f"tools: a {type(source).__name__} is not a tool; give functions, tools or definitions")


def _key_of(source: AnyTool | FunctionTool | ServerTool | Mapping[str, object]) -> str:
    """The name in the set: the function's, or for what runs at the API its type."""
    if isinstance(source, Tool):
        return source.name
    if isinstance(source, FunctionTool):
        return source.function.name
    if isinstance(source, Struct):
        return source.type
    function = source.get("function")
    name = function.get("name") if isinstance(function, Mapping) else getattr(function, "name", source.get("type"))
    if not isinstance(name, str):
        raise ConfigError(f"tools: a definition needs a name, not {name!r}")
    return name


def _local_names(frame: FrameType | None) -> dict[str, object]:
    """The names where `tool` was called, for annotations that are strings and name a type of a function's body."""
    caller = frame.f_back if frame is not None else None
    return dict(caller.f_locals) if caller is not None and caller.f_locals is not caller.f_globals else {}
