"""Whether a request has the form that the API accepts, seen before anything is sent. Pure.

Only what the API refuses for its form is refused here, by the ranges of openrouter API, POST
/chat/completions. What only a provider can know, such as whether a model exists or how long its
context is, is left to it. Names that are not known here pass.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from msgspec import UNSET, Struct

from ..errors import BadRequestError
from .preferences import MaxPrice

__all__ = ["check_embedding_form", "check_form", "check_headers", "check_message"]

_MAX_MODELS = 3
_MAX_STOPS = 4
_MAX_ROUTING_ID = 256
_MAX_METADATA = 16
_MAX_METADATA_KEY = 64
_MAX_METADATA_VALUE = 512
_OWN_HEADERS = frozenset(
    {
        "accept-encoding",
        "authorization",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME_RULE = "1 to 64 letters, digits, '_' or '-'"


def check_form(fields: Mapping[str, object]) -> None:
    """Raise `BadRequestError` naming the first field that the API would refuse, and the rule."""
    for name, value in fields.items():
        if value is UNSET or value is None:
            continue
        check = _CHECKS.get(name)
        if check is not None:
            check(name, value)
    _check_together(fields)


def check_embedding_form(fields: Mapping[str, object]) -> None:
    """The same for a request of POST /embeddings."""
    _check_model("model", fields.get("model"))
    given = fields.get("input")
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not given:
        raise _refuse("input", "a text, or a list of texts or of tokens, and not empty", given)
    if fields.get("dimensions") is not None:
        _whole(1)("dimensions", fields["dimensions"])
    if fields.get("encoding_format") not in (None, "float", "base64"):
        raise _refuse("encoding_format", "float or base64", fields["encoding_format"])


def check_headers(headers: object) -> tuple[tuple[str, str], ...]:
    """Request headers as pairs; raises `BadRequestError` for one that is not, or that is not the caller's to set."""
    if headers is None:
        return ()
    if not isinstance(headers, Mapping):
        raise _refuse("extra_headers", "a mapping of names and texts", headers)
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise _refuse("extra_headers", "a mapping whose names are header names", name)
        if name.lower() in _OWN_HEADERS:
            raise BadRequestError(f"extra_headers: {name} is set by the client itself", status=400)
        # The value may be a secret: it is not shown.
        if not isinstance(value, str) or not (value.isascii() and value.isprintable()):
            raise BadRequestError(f"extra_headers[{name!r}]: must be printable ASCII text", status=400)
    return tuple(headers.items())


def check_message(message: Mapping[str, object]) -> None:
    """Raise `BadRequestError` when a message in wire names, whose role is known, lacks what its role needs."""
    role = message["role"]
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise _refuse("messages: a tool message's tool_call_id", "a text", message.get("tool_call_id"))
    if role != "assistant" and message.get("content") is None:
        raise BadRequestError(f"messages: a {role} message needs content", status=400)
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        _check_parts(content)
    elif content is not None and not isinstance(content, str):
        raise _refuse("messages: content", "a text or a list of parts", content)
    calls = message.get("tool_calls")
    if calls is not None:
        _check_calls(calls)


def _check_parts(parts: Sequence[object]) -> None:
    for position, part in enumerate(parts):
        where = f"messages: content[{position}]"
        if isinstance(part, Struct):
            continue
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise _refuse(where, "a part with a type", part)
        # A type that is not known here passes: it may be newer than this package.
        needed = _PARTS.get(cast("str", part["type"]))
        if needed is not None and not isinstance(part.get(needed[0]), needed[1]):
            raise _refuse(f"{where}.{needed[0]}", needed[2], part.get(needed[0]))


def _check_calls(calls: object) -> None:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        raise _refuse("messages: tool_calls", "a list of calls", calls)
    for position, call in enumerate(calls):
        # Ids and names may be missing: histories of other programs are mended when they are rendered.
        if not isinstance(call, (Mapping, Struct)):
            raise _refuse(f"messages: tool_calls[{position}]", "a call", call)


_PARTS: Mapping[str, tuple[str, type | tuple[type, ...], str]] = {
    "text": ("text", str, "a text"),
    "image_url": ("image_url", (Mapping, Struct), "an object with a url"),
    "input_audio": ("input_audio", (Mapping, Struct), "an object with data and format"),
    "video_url": ("video_url", (Mapping, Struct), "an object with a url"),
    "file": ("file", (Mapping, Struct), "an object with file_data or file_id"),
}


def _refuse(name: str, rule: str, value: object) -> BadRequestError:
    # Not `repr`: a value may be of any size, and contain itself.
    return BadRequestError(f"{name}: must be {rule}, not {reprlib.repr(value)}", status=400)


def _number(low: float, high: float, *, above_low: bool = False) -> Callable[[str, object], None]:
    rule = f"a number {'above' if above_low else 'from'} {low:g} {'up ' if above_low else ''}to {high:g}"

    def check(name: str, value: object) -> None:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A whole number is finite, and may be too long for a float.
        right = right and (isinstance(value, int) or math.isfinite(cast("float", value)))
        if not right or not low <= cast("float", value) <= high or (above_low and value == low):
            raise _refuse(name, rule, value)

    return check


def _whole(low: int, high: int | None = None) -> Callable[[str, object], None]:
    rule = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def check(name: str, value: object) -> None:
        right = isinstance(value, int) and not isinstance(value, bool)
        if not right or cast("int", value) < low or (high is not None and cast("int", value) > high):
            raise _refuse(name, rule, value)

    return check


def _check_model(name: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise _refuse(name, "a model's name", value)


def _check_models(name: str, value: object) -> None:
    models = _strings(name, value)
    if len(models) > _MAX_MODELS:
        raise _refuse(name, f"at most {_MAX_MODELS} fallback models", value)


def _check_stop(name: str, value: object) -> None:
    if not isinstance(value, str) and len(_strings(name, value)) > _MAX_STOPS:
        raise _refuse(name, f"a string or at most {_MAX_STOPS} strings", value)


def _strings(name: str, value: object) -> Sequence[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise _refuse(name, "a list of strings", value)
    return cast("Sequence[str]", value)


def _check_logit_bias(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise _refuse(name, "an object of token ids and numbers", value)
    for token, bias in value.items():
        _number(-100, 100)(f"{name}[{token!r}]", bias)


def _check_routing_id(name: str, value: object) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_ROUTING_ID:
        raise _refuse("routing_id" if name == "session_id" else name, f"1 to {_MAX_ROUTING_ID} characters", value)


def _check_metadata(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or len(value) > _MAX_METADATA:
        raise _refuse(name, f"an object of at most {_MAX_METADATA} strings", value)
    for key, text in value.items():
        if not isinstance(key, str) or len(key) > _MAX_METADATA_KEY or "[" in key or "]" in key:
            raise _refuse(f"{name} key", f"at most {_MAX_METADATA_KEY} characters without brackets", key)
        if not isinstance(text, str) or len(text) > _MAX_METADATA_VALUE:
            raise _refuse(f"{name}[{key!r}]", f"a string of at most {_MAX_METADATA_VALUE} characters", text)


def _check_reasoning(name: str, value: object) -> None:
    effort, budget = _get(value, "effort"), _get(value, "max_tokens")
    if effort is not None and budget is not None:
        raise BadRequestError(f"{name}: effort and max_tokens exclude each other; give one", status=400)
    if budget is not None:
        _whole(1)(f"{name}.max_tokens", budget)


def _check_provider(name: str, value: object) -> None:
    # In JSON it would be null, and so no ceiling at all.
    prices = _get(value, "max_price")
    for kind in MaxPrice.__struct_fields__:
        price = _get(prices, kind)
        if isinstance(price, float) and not math.isfinite(price):
            raise _refuse(f"{name}.max_price.{kind}", "a number that can be sent", price)


def _check_tools(name: str, value: object) -> None:
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
        raise _refuse(name, "a list of tools", value)
    seen: set[str] = set()
    for position, tool in enumerate(value):
        function = _get(tool, "function")
        if function is None:
            continue
        called = _get(function, "name")
        if not isinstance(called, str) or not _NAME.fullmatch(called):
            raise _refuse(f"{name}[{position}].function.name", _NAME_RULE, called)
        if called in seen:
            raise BadRequestError(f"{name}[{position}].function.name: {called!r} is there twice", status=400)
        seen.add(called)


def _check_response_format(name: str, value: object) -> None:
    schema = _get(value, "json_schema")
    if schema is not None:
        called = _get(schema, "name")
        if not isinstance(called, str) or not _NAME.fullmatch(called):
            raise _refuse(f"{name}.json_schema.name", _NAME_RULE, called)


def _check_together(fields: Mapping[str, object]) -> None:
    # A level beneath may have said it already: only what these fields say themselves is looked at.
    logprobs = _get(fields, "logprobs")
    if _get(fields, "top_logprobs") is not None and logprobs is not None and logprobs is not True:
        raise BadRequestError("top_logprobs: needs logprobs=True", status=400)
    effort = _get(fields, "reasoning_effort")
    other = _get(_get(fields, "reasoning"), "effort")
    if effort is not None and other is not None and effort != other:
        raise BadRequestError(f"reasoning_effort: {effort!r} contradicts reasoning.effort {other!r}", status=400)


def _get(value: object, name: str) -> object | None:
    """A field of a mapping or a Struct; None where it is absent, unset or null."""
    if isinstance(value, Mapping):
        found = value.get(name)
    else:
        found = getattr(value, name, None) if isinstance(value, Struct) else None
    return None if found is UNSET else cast("object | None", found)


_CHECKS: Mapping[str, Callable[[str, object], None]] = {
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _check_logit_bias,
    "max_completion_tokens": _whole(1),
    "max_tokens": _whole(1),
    "metadata": _check_metadata,
    "min_p": _number(0, 1),
    "model": _check_model,
    "models": _check_models,
    "presence_penalty": _number(-2, 2),
    "provider": _check_provider,
    "reasoning": _check_reasoning,
    "repetition_penalty": _number(0, 2, above_low=True),
    "response_format": _check_response_format,
    "session_id": _check_routing_id,
    "stop": _check_stop,
    "temperature": _number(0, 2),
    "tools": _check_tools,
    "top_a": _number(0, 1),
    "top_k": _whole(0),
    "top_logprobs": _whole(0, 20),
    "top_p": _number(0, 1, above_low=True),
}
