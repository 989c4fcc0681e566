"""Tool calls in the form in which every provider takes them back, whatever a model has made of them. Pure.

What one provider gives out, another one refuses, and so may the same: ids are of letters, digits, `_` and `-`
(Anthropic) and at most 40 characters long (OpenAI), names likewise and of 64, and arguments are a JSON object
(Anthropic), which those of an answer that was cut off are not.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from ..errors import DecodeError
from .codec import decode_json

if TYPE_CHECKING:
    from .messages import ToolCall

__all__ = ["MAX_CALL_ID", "acceptable_call", "acceptable_id"]

MAX_CALL_ID: Final = 40
"""How many characters the id of a call may have."""

_MAX_NAME: Final = 64
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")


def acceptable_id(given: str) -> str:
    """The id, or one like it."""
    return _UNSAFE.sub("_", given)[:MAX_CALL_ID] or "call"


def acceptable_call(call: ToolCall, call_id: str) -> ToolCall:
    """The call under this id: the very same where nothing has to be changed.

    Arguments that are no JSON object become an empty one; a name that cannot be becomes one like it.
    """
    name, arguments = call.function.name, call.function.arguments
    safe_name = _UNSAFE.sub("_", name)[:_MAX_NAME] or "unknown"
    safe_arguments = arguments if not arguments or _is_object(arguments) else "{}"
    if (call.id, name, arguments) == (call_id, safe_name, safe_arguments):
        return call
    function = msgspec.structs.replace(call.function, name=safe_name, arguments=safe_arguments)
    return msgspec.structs.replace(call, id=call_id, function=function)


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(decode_json(arguments), dict)
    except DecodeError:
        return False
