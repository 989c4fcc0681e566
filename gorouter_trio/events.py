"""What a stream yields: a closed union of frozen values."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .wire.stream import ChatChunk

__all__ = ["RawChunk", "ReasoningDelta", "RefusalDelta", "StreamEvent", "TextDelta", "ToolCallDelta"]


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


StreamEvent: TypeAlias = TextDelta | ReasoningDelta | RefusalDelta | ToolCallDelta | RawChunk
"""Everything that iterating a stream can give."""
