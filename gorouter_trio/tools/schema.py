"""Arguments held to a JSON schema that somebody wrote by hand or sent: tools that are not made from a signature.

The one place that knows jsonschema-rs (extra `schema`). Its regular expressions give up instead of running
for ever, and references out of the schema are refused, not fetched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, cast

from ..errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["SchemaCheck"]

_MAX_REASONS = 3
_MAX_REASON = 300


class SchemaCheck:
    """Says what in a call's arguments does not obey a schema.

    Raises `ConfigError` when the schema is none, refers to something outside itself, or the extra is not
    installed: arguments that nobody can check are not run.
    """

    __slots__ = ("_errors_of",)

    def __init__(self, schema: Mapping[str, object]) -> None:
        try:
            import jsonschema_rs
        except ModuleNotFoundError:
            raise ConfigError(
                "a tool with a schema of its own needs jsonschema-rs: pip install 'gorouter-trio[schema]'"
            ) from None
        try:
            validator = jsonschema_rs.validator_for(dict(schema), retriever=_refuse_to_fetch, mask="the value")
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"parameters: not a JSON schema: {str(exc).splitlines()[0]}") from exc
        self._errors_of = cast("Callable[[object], Iterable[jsonschema_rs.ValidationError]]", validator.iter_errors)

    def reasons(self, arguments: object) -> list[str]:
        """The first things that are wrong, each with its place; none when the arguments obey."""
        found: list[str] = []
        try:
            for error in self._errors_of(arguments):
                place = "".join(f".{step}" for step in error.instance_path)
                found.append(f"{error.message[:_MAX_REASON]} - at `${place[:_MAX_REASON]}`")
                if len(found) == _MAX_REASONS:
                    break
        except ValueError as exc:
            # A pattern that gave up: what could not be checked has not passed.
            found.append(str(exc)[:_MAX_REASON])
        return found


def _refuse_to_fetch(address: str) -> NoReturn:
    raise ValueError(f"the schema refers to {address}; put what it refers to into its $defs")
