"""What a stream yields: a closed union of frozen values, tagged, so that they can cross a WebSocket as they are."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from .wire.attachments import Annotation, OutputAudio, OutputImage
from .wire.responses import Logprobs, Usage
from .wire.stream import ChatChunk
from .wire.toolcalls import ToolStatus

__all__ = [
    "AnnotationDelta",
    "AudioDelta",
    "ImageDelta",
    "LogprobsDelta",
    "RawChunk",
    "ReasoningDelta",
    "RefusalDelta",
    "StreamEvent",
    "StreamFinished",
    "TextDelta",
    "ToolCallDelta",
    "ToolEvent",
    "ToolFinished",
    "ToolProgress",
    "ToolStarted",
]


class TextDelta(Struct, frozen=True, gc=False, tag="text"):
    """A piece of the answer's text."""

    text: str


class ReasoningDelta(Struct, frozen=True, gc=False, tag="reasoning"):
    """A piece of the model's visible reasoning."""

    text: str


class RefusalDelta(Struct, frozen=True, gc=False, tag="refusal"):
    """A piece of a refusal."""

    text: str


class ToolCallDelta(Struct, frozen=True, gc=False, tag="tool_call"):
    """A piece of a tool call: `arguments` is a fragment of JSON text.

    `index` counts the calls of the answer from 0, whatever the provider numbers them by: the pieces of one call have
    one index, and the call is `message.tool_calls[index]` in the end. `id` and `name` are empty where a piece has none.
    """

    index: int
    id: str
    name: str
    arguments: str


class AnnotationDelta(Struct, frozen=True, tag="annotation"):
    """A page that the answer cites, or a file that was read for it; whole. It often comes before the text."""

    annotation: Annotation


class ImageDelta(Struct, frozen=True, tag="image"):
    """An image, whole."""

    image: OutputImage


class AudioDelta(Struct, frozen=True, tag="audio"):
    """A piece of spoken answer: of its `data` (base64, each piece for itself), of its `transcript`, or of both."""

    audio: OutputAudio


class LogprobsDelta(Struct, frozen=True, tag="logprobs"):
    """Log probabilities of the tokens in the piece of text that came just before."""

    logprobs: Logprobs


class StreamFinished(Struct, frozen=True, kw_only=True, tag="finished"):
    """The answer has arrived, whole. The last event, once: on the wire the finish is sent twice."""

    finish_reason: str | None
    native_finish_reason: str | None = None
    usage: Usage | None = None


class RawChunk(Struct, frozen=True, gc=False, tag="raw_chunk"):
    """A chunk as decoded; yielded before the events made from it when raw chunks were asked for."""

    chunk: ChatChunk


class ToolStarted(Struct, frozen=True, gc=False, tag="tool_started"):
    """A tool begins to run, after all checks; `arguments` is the JSON text that the model wrote."""

    call_id: str
    name: str
    arguments: str


class ToolProgress(Struct, frozen=True, gc=False, tag="tool_progress"):
    """What a running tool says about how far it is; `fraction` is 0 to 1, None when it does not know."""

    call_id: str
    name: str
    message: str
    fraction: float | None = None


class ToolFinished(Struct, frozen=True, gc=False, tag="tool_finished"):
    """A call has ended, in whatever way, also one that never ran; `result` is the text that the model gets."""

    call_id: str
    name: str
    status: ToolStatus
    result: str
    duration_s: float


ToolEvent: TypeAlias = ToolStarted | ToolProgress | ToolFinished
"""What a round of tool calls tells while it runs."""

StreamEvent: TypeAlias = (
    TextDelta
    | ReasoningDelta
    | RefusalDelta
    | ToolCallDelta
    | AnnotationDelta
    | ImageDelta
    | AudioDelta
    | LogprobsDelta
    | ToolEvent
    | StreamFinished
    | RawChunk
)
"""Everything that iterating a stream can give."""
