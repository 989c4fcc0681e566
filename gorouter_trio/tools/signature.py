"""A function's signature as what a model may give it: a JSON type made of the parameters, and the way back."""

from __future__ import annotations

import enum
import inspect
from typing import TYPE_CHECKING, Annotated, Final, cast, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from ..errors import ConfigError, DecodeError
from ..wire.schema import JsonType, Schema
from .arguments import ArgumentsError
from .context import ToolContext

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .docstrings import Docstring

__all__ = ["Signature"]

# Defaults that a schema can show, and that msgspec takes as they are.
_PLAIN: Final = (str, int, float, bool, type(None), enum.Enum)


class Signature:
    """The parameters of `function`, checked when this is made.

    Every parameter needs a type that JSON can express; one of the type `ToolContext` is not shown to the
    model. `namespace` holds names that annotations may use besides those of the function's module. Raises
    `ConfigError` that names the parameter.
    """

    __slots__ = ("_context", "_defaults", "_positional", "_type")

    def __init__(
        self,
        function: Callable[..., object],
        *,
        docstring: Docstring,
        name: str,
        strict: bool = False,
        namespace: Mapping[str, object] | None = None,
    ) -> None:
        parameters = _parameters_of(function, namespace, name=name)
        self._context = next((p.name for p in parameters if p.annotation is ToolContext), None)
        shown = [p for p in parameters if p.name != self._context]
        self._positional = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
        self._defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        fields = [_field(p, docstring.parameters.get(p.name, ""), name=name) for p in shown]
        try:
            kind = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
            self._type: JsonType[Struct] = JsonType(kind, strict=strict)
        except (ConfigError, TypeError, ValueError) as exc:
            raise ConfigError(f"tool {name}: {exc}") from exc

    @property
    def schema(self) -> Schema:
        """The JSON schema of the arguments."""
        return {key: part for key, part in self._type.schema.items() if key != "title"}

    def bind(
        self, arguments: Mapping[str, object], context: ToolContext
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """What to call the function with; raises `ArgumentsError` where the arguments do not fit.

        What is not given is left to the function's own defaults.
        """
        try:
            values = self._type.convert(dict(arguments))
        except DecodeError as exc:
            raise ArgumentsError(f"the arguments do not fit: {exc.message.partition(': ')[2]}") from exc
        named = {name: getattr(values, name) for name in arguments}
        if self._context is not None:
            named[self._context] = context
        # All of those that go by position are needed, also the defaults of those before one that is given.
        positional = tuple(named.pop(name, self._defaults.get(name)) for name in self._positional)
        return positional, named


def _parameters_of(
    function: Callable[..., object], namespace: Mapping[str, object] | None, *, name: str
) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function, eval_str=True, locals=namespace)
    except NameError as exc:
        raise ConfigError(
            f"tool {name}: a type in its signature cannot be found: {exc}; do not import it for type checkers only"
        ) from exc
    except (TypeError, ValueError, SyntaxError) as exc:
        raise ConfigError(f"tool {name}: its signature cannot be read: {exc}") from exc
    return list(signature.parameters.values())


def _field(parameter: inspect.Parameter, described: str, *, name: str) -> tuple[str, object, object]:
    """A parameter as a field of a Struct: name, type, default."""
    if parameter.kind in {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        raise ConfigError(f"tool {name}: {parameter} takes anything; name the parameters, so that a model can")
    if parameter.annotation is inspect.Parameter.empty:
        raise ConfigError(f"tool {name}: parameter {parameter.name} has no type")
    kind = parameter.annotation
    if described and not _has_description(kind):
        kind = Annotated[kind, Meta(description=described)]
    default = parameter.default
    if default is inspect.Parameter.empty:
        return (parameter.name, kind, msgspec.NODEFAULT)
    if isinstance(default, _PLAIN):
        return (parameter.name, kind, default)
    return (parameter.name, kind, msgspec.field(default_factory=lambda: default))


def _has_description(kind: object) -> bool:
    if get_origin(kind) is not Annotated:
        return False
    metas = (part for part in cast("tuple[object, ...]", get_args(kind))[1:] if isinstance(part, Meta))
    return any(meta.description for meta in metas)
