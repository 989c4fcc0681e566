"""What a stream yields: a closed union of frozen values."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .wire.stream import ChatChunk
from .wire.toolcalls import ToolStatus

__all__ = [
    "RawChunk",
    "ReasoningDelta",
    "RefusalDelta",
    "StreamEvent",
    "TextDelta",
    "ToolCallDelta",
    "ToolEvent",
    "ToolFinished",
    "ToolProgress",
    "ToolStarted",
]


class TextDelta(Struct, frozen=True, gc=False):
    """A piece of the answer's text."""

    text: str


class ReasoningDelta(Struct, frozen=True, gc=False):
    """A piece of the model's visible reasoning."""

    text: str


class RefusalDelta(Struct, frozen=True, gc=False):
    """A piece of a refusal."""

    text: str


class ToolCallDelta(Struct, frozen=True, gc=False):
    """A piece of a tool call: `index` tells calls apart, `arguments` is a fragment of JSON text."""

    index: int
    id: str
    name: str
    arguments: str


class RawChunk(Struct, frozen=True, gc=False):
    """A chunk as decoded; yielded before the events made from it when raw chunks were asked for."""

    chunk: ChatChunk


class ToolStarted(Struct, frozen=True, gc=False):
    """A tool begins to run, after all checks; `arguments` is the JSON text that the model wrote."""

    call_id: str
    name: str
    arguments: str


class ToolProgress(Struct, frozen=True, gc=False):
    """What a running tool says about how far it is; `fraction` is 0 to 1, None when it does not know."""

    call_id: str
    name: str
    message: str
    fraction: float | None = None


class ToolFinished(Struct, frozen=True, gc=False):
    """A call has ended, in whatever way, also one that never ran; `result` is the text that the model gets."""

    call_id: str
    name: str
    status: ToolStatus
    result: str
    duration_s: float


ToolEvent: TypeAlias = ToolStarted | ToolProgress | ToolFinished
"""What a round of tool calls tells while it runs."""

StreamEvent: TypeAlias = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta | RawChunk | ToolEvent
"""Everything that iterating a stream can give."""
