"""Structured output: the form that an answer must have, and the value that it stands for.

The schema goes to the API with the request; whether the model keeps to it is the provider's affair, so every
answer is decoded and checked here as well. One that does not fit is asked for again, with what is wrong with
it, as often as the policy says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, cast

from msgspec import Struct

from ..errors import ConfigError, DecodeError
from ..wire.codec import decode_json, encode_json
from ..wire.schema import JsonType, make_strict
from ..wire.schema_check import SchemaCheck

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AnswerForm", "FormCache", "OutputPolicy", "form_of"]

_FENCED: Final = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\n(.*?)\n?\s*```\s*", re.DOTALL)
_JSON_OBJECT: Final[Mapping[str, object]] = {"type": "json_object"}

_Decode: TypeAlias = "Callable[[str], object]"


class OutputPolicy(Struct, frozen=True, kw_only=True):
    """How strictly the form of an answer is held to.

    `reasks` bounds how often the model is asked again with what was wrong; each time is a request of its own
    and is paid. `strict_schema` asks providers to enforce the schema, which then has to be one that can be
    enforced. An answer that does not fit in the end raises `InvalidOutputError`, or with `on_invalid="none"`
    is a result whose `value` is None and whose `invalid` says why.
    """

    reasks: int = 1
    strict_schema: bool = True
    on_invalid: Literal["raise", "none"] = "raise"

    def __post_init__(self) -> None:
        if isinstance(self.reasks, bool) or not isinstance(cast("object", self.reasks), int) or self.reasks < 0:
            raise ConfigError(f"output.reasks: must be a whole number of at least 0, not {self.reasks!r}")
        if self.on_invalid not in ("raise", "none"):
            raise ConfigError(f"output.on_invalid: must be one of raise, none, not {self.on_invalid!r}")


class AnswerForm(Struct, frozen=True):
    """A form: what goes into the request, and the way from a text to a value, which raises `DecodeError`.

    `response_type` and `response_schema` are what it was made of.
    """

    response_format: Mapping[str, object]
    read: _Decode
    policy: OutputPolicy
    response_type: object = None
    response_schema: object = None

    def decode(self, text: str) -> object:
        """The value of an answer; raises `DecodeError` that says what is wrong.

        A fence around the JSON, which models like to draw, is not held against it.
        """
        fenced = _FENCED.fullmatch(text)
        text = fenced.group(1) if fenced else text.strip()
        if not text:
            raise DecodeError("the answer is empty")
        return self.read(text)


def form_of(
    response_type: type[object] | None = None,
    response_schema: Mapping[str, object] | None = None,
    policy: OutputPolicy | None = None,
) -> AnswerForm | None:
    """The form that a type or a JSON schema stands for; None when neither is given.

    `dict` is any JSON object, without a schema. Making a form compiles it: keep it for the next call.
    Raises `ConfigError` for what has no schema, and for both at once.
    """
    if response_type is not None and response_schema is not None:
        raise ConfigError("response_type and response_schema: give one of them, not both")
    _check_policy(policy)
    policy = policy or OutputPolicy()
    if response_type is dict:
        return AnswerForm(_JSON_OBJECT, _read_object, policy, response_type)
    if response_type is not None:
        kind = JsonType(response_type, strict=policy.strict_schema)
        return AnswerForm(_json_schema(kind.name, kind.schema, policy), kind.decode, policy, response_type)
    return None if response_schema is None else _form_of_schema(response_schema, policy)


def _form_of_schema(schema: Mapping[str, object], policy: OutputPolicy) -> AnswerForm:
    """A schema may come as it is, or named, as `response_format` has it."""
    if not isinstance(schema, Mapping):
        raise ConfigError(f"response_schema: must be a JSON schema as a mapping, not a {type(schema).__name__}")
    named = schema if isinstance(schema.get("schema"), Mapping) and "name" in schema else {"schema": schema}
    inner = cast("Mapping[str, object]", named["schema"])
    check = SchemaCheck(inner)
    name = str(named.get("name", inner.get("title", "answer")))
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:64] or "answer"
    sent = make_strict(inner) if policy.strict_schema else dict(inner)

    def read(text: str) -> object:
        value = decode_json(text)
        problem = check.problem(value)
        if problem is not None:
            raise DecodeError(problem)
        return value

    return AnswerForm(_json_schema(name, sent, policy), read, policy, response_schema=schema)


def _check_policy(policy: object) -> None:
    if policy is not None and not isinstance(policy, OutputPolicy):
        raise ConfigError(f"output: must be an OutputPolicy, not a {type(policy).__name__}")


def _json_schema(name: str, schema: Mapping[str, object], policy: OutputPolicy) -> Mapping[str, object]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": policy.strict_schema, "schema": schema}}


def _read_object(text: str) -> object:
    value = decode_json(text)
    if not isinstance(value, dict):
        raise DecodeError("not a JSON object")
    return value


class FormCache:
    """The forms that one client has been asked for, so that a type is compiled once; the oldest go first."""

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._forms: dict[object, AnswerForm] = {}

    def get(self, response_type: object, response_schema: object, policy: object) -> AnswerForm | None:
        """As `form_of`."""
        _check_policy(policy)
        if response_type is None and response_schema is None:
            return None
        key = (response_type, None if response_schema is None else _schema_key(response_schema), policy)
        try:
            form = self._forms.get(key)
        except TypeError as exc:
            raise ConfigError(f"response_type: must be a type, not {response_type!r}") from exc
        if form is None:
            made = form_of(
                cast("type[object] | None", response_type),
                cast("Mapping[str, object] | None", response_schema),
                cast("OutputPolicy | None", policy),
            )
            if made is None:
                return None
            form = self._forms[key] = made
            if len(self._forms) > self._limit:
                del self._forms[next(iter(self._forms))]
        return form


def _schema_key(schema: object) -> bytes:
    try:
        return encode_json(schema)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"response_schema: cannot be written as JSON: {exc}") from exc
