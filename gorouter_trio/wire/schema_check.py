"""Whether a value follows a JSON schema that somebody else has written (the extra `schema`: jsonschema-rs)."""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

__all__ = ["SchemaCheck"]

_MAX_PROBLEMS = 3
_MAX_CHARS = 300


class _Problem(Protocol):
    message: str
    instance_path: list[object]


class SchemaCheck:
    """A JSON schema, compiled. References to other documents are refused, never fetched.

    Raises `ConfigError` for what is no schema, and when jsonschema-rs is not installed.
    """

    __slots__ = ("_validator", "schema")

    def __init__(self, schema: Mapping[str, object]) -> None:
        self.schema = dict(schema)
        library = _library()
        try:
            # Patterns by an engine that takes linear time: the model writes what they are run on.
            self._validator = library.validator_for(
                self.schema, retriever=_refuse, pattern_options=library.RegexOptions()
            )
        except (library.ValidationError, ValueError) as exc:
            message = getattr(exc, "message", str(exc)).partition("\n")[0]
            raise ConfigError(f"response_schema: is no JSON schema: {message}") from exc

    def problem(self, value: object) -> str | None:
        """What is wrong with `value`, decoded JSON, in one line; None when it follows the schema.

        A value that is nested too deeply to be checked does not follow it.
        """
        try:
            found = cast("list[_Problem]", list(itertools.islice(self._validator.iter_errors(value), _MAX_PROBLEMS)))
        except ValueError as exc:
            return f"$: cannot be checked: {exc}"
        return "; ".join(map(_in_words, found)) if found else None


def _in_words(problem: _Problem) -> str:
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in problem.instance_path)
    return f"${where}: {problem.message[:_MAX_CHARS]}"


def _refuse(uri: str) -> object:
    raise ValueError(f"the schema refers to another document, {uri}")


def _library() -> ModuleType:
    try:
        return importlib.import_module("jsonschema_rs")
    except ImportError:
        raise ConfigError(
            "response_schema: checking answers needs jsonschema-rs; pip install 'gorouter-trio[schema]'"
        ) from None
