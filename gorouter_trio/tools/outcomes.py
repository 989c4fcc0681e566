"""What becomes of a call: the message for the model and the row of the report, whatever happened. Pure."""

from __future__ import annotations

import math
import traceback
from typing import TYPE_CHECKING, Final

import outcome
from msgspec import Struct

from ..errors import ToolError
from ..wire.codec import encode_json
from ..wire.messages import FunctionCall, ToolCall, ToolMessage
from ..wire.toolcalls import ToolCallError, ToolCallReport, ToolStatus
from .results import EncodedResult, ResultError, cut_text, sendable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..security.rules import Deny
    from .frames import ChildError

__all__ = [
    "Ending",
    "ToolOutcome",
    "captured_reason",
    "ending_of_child_error",
    "ending_of_denial",
    "ending_of_error",
    "ending_of_refusal",
    "make_outcome",
    "unique_calls",
]

_MAX_MESSAGE: Final = 4_096
_MAX_TRACEBACK: Final = 16_384
_MAX_NAME: Final = 64
_NEUTRAL: Final = "the tool failed"
_DENIED: Final = {
    "access": "this call is not allowed",
    "authentication": "this call needs a user who is signed in",
    "rate_limit": "this tool was called too often",
    "dangerous_argument": "these arguments are not allowed",
}


class ToolOutcome(Struct, frozen=True):
    """One call's end: the message that answers it, and its row of the report."""

    message: ToolMessage
    report: ToolCallReport


class Ending(Struct, frozen=True):
    """How a call ended: what the model is told, and what whoever runs the program is told besides."""

    status: ToolStatus
    text: str
    error: ToolCallError | None = None
    result: EncodedResult | None = None


def ending_of_refusal(status: ToolStatus, told: str, *, error: ToolCallError | None = None) -> Ending:
    """A call that is answered with an error: `told` is what the model gets to know of it."""
    return Ending(status, told, error or ToolCallError(type=status, message=told))


def ending_of_denial(denial: Deny) -> Ending:
    """A call that the guard denies: the model learns why, but not by which rule."""
    told = _DENIED.get(denial.reason, _DENIED["access"])
    if denial.retry_after_s is not None and math.isfinite(denial.retry_after_s):
        told += f"; try again in {math.ceil(max(denial.retry_after_s, 0))} s"
    return Ending("error_security", told, ToolCallError(type=denial.reason, message=denial.message[:_MAX_MESSAGE]))


def ending_of_error(error: BaseException) -> Ending:
    """What a tool raised: a `ToolError` is told to the model, of anything else only that it happened."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        # A nursery inside the tool wraps what its tasks raise.
        error = error.exceptions[0]
    message = _said(error)
    details: dict[str, object] = {"traceback": _traceback_of(error)}
    if isinstance(error, ToolError):
        details |= {str(key): value for key, value in error.details.items()}
    told = message if isinstance(error, (ToolError, ResultError)) else _NEUTRAL
    row = ToolCallError(type=type(error).__name__[:_MAX_NAME], message=message[:_MAX_MESSAGE], details=_plain(details))
    return Ending("error_execution", told, row)


def ending_of_child_error(error: ChildError) -> Ending:
    """The same for what the process of a tool reports."""
    details = {"traceback": error.traceback[-_MAX_TRACEBACK:], **error.details}
    row = ToolCallError(type=error.type[:_MAX_NAME], message=error.message[:_MAX_MESSAGE], details=_plain(details))
    return Ending("error_execution", error.message if error.for_model else _NEUTRAL, row)


def make_outcome(
    call: ToolCall,
    ending: Ending,
    *,
    arguments: object,
    max_bytes: int,
    keep_value: bool,
    has_run: bool,
    duration_s: float,
) -> ToolOutcome:
    """The message and the row; the text of the message has at most `max_bytes` in UTF-8."""
    if ending.result is not None:
        # From a process it may be anything: it is cut again.
        text, again = cut_text(ending.result.text, max_bytes)
        is_cut = ending.result.is_cut or again
    else:
        text, is_cut = _error_text(ending, max_bytes), False
    report = ToolCallReport(
        call_id=call.id,
        name=call.function.name,
        status=ending.status,
        raw_arguments=call.function.arguments,
        arguments=arguments,
        result=ending.result.value if ending.result is not None and keep_value else None,
        error=ending.error,
        text=text,
        is_cut=is_cut,
        has_run=has_run,
        duration_s=duration_s,
    )
    return ToolOutcome(ToolMessage(tool_call_id=call.id, content=text), report)


def unique_calls(calls: Sequence[ToolCall]) -> list[ToolCall]:
    """The calls with an id each, different from all others, as `wire.codec.to_tool_calls` gives them."""
    taken: set[str] = set()
    found: list[ToolCall] = []
    for position, call in enumerate(calls):
        name = call.id or f"call_{position}"
        while name in taken:
            name = f"{name}_{position}"
        taken.add(name)
        function = FunctionCall(call.function.name or "", call.function.arguments or "")
        found.append(call if name == call.id else ToolCall(id=name, function=function, type=call.type))
    return found


def _error_text(ending: Ending, max_bytes: int) -> str:
    """The error as JSON, in GoRouter Kit's form, with as much of its text as there is room for."""
    room = max(max_bytes - len(_error_json(ending, "")), 0)
    # Escapes make JSON longer than the text, the line feed of a mark by one, and others at most six times.
    for size in (room, room - 1, room // 6):
        text = _error_json(ending, cut_text(ending.text, size)[0])
        if len(text) <= max_bytes:
            return text.decode()
    # Not even the mark has room.
    return _error_json(ending, ending.text[: room // 12]).decode()


def _error_json(ending: Ending, told: str) -> bytes:
    return encode_json({"errorType": ending.status, "errorMessage": told})


def _said(error: BaseException) -> str:
    """What an exception says, as far as it can be made to."""
    said = outcome.capture(str, error)
    return sendable(said.value) if isinstance(said, outcome.Value) else "an exception that cannot be shown"


def _traceback_of(error: BaseException) -> str:
    lines = outcome.capture(traceback.format_exception, error)
    return sendable("".join(lines.value)[-_MAX_TRACEBACK:]) if isinstance(lines, outcome.Value) else ""


def _plain(details: dict[str, object]) -> Mapping[str, object]:
    """Details that can be stored: what is no JSON is told by its kind."""
    return {
        sendable(key): value if isinstance(outcome.capture(encode_json, value), outcome.Value) else type(value).__name__
        for key, value in details.items()
    }


def captured_reason(error: BaseException) -> str:
    """An error in one line for a log."""
    return f"{type(error).__name__}: {_said(error)[:_MAX_MESSAGE]}"
