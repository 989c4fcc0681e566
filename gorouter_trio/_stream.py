"""The stream that users hold: events, text, or the whole answer, from one reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio
from msgspec import UNSET

from .errors import StreamNotFinishedError
from .events import RawChunk, ReasoningDelta, RefusalDelta, StreamEvent, TextDelta, ToolCallDelta

if TYPE_CHECKING:
    from .wire.result import ChatResult
    from .wire.stream import ChatChunk, Delta

__all__ = ["ChatStream", "ChunkSource", "TextStream"]


class ChunkSource(Protocol):
    """What a stream reads from: the reader of a reply, or a session's loan of one."""

    async def read(self) -> list[ChatChunk] | tuple[StreamEvent, ...]:
        """The next chunks, all that arrived together, or, as a tuple, events; an empty list at the end."""

    def result(self) -> ChatResult:
        """The answer from everything that was read."""


class ChatStream:
    """A streamed answer, open inside `async with client.stream(...)`.

    Iterate it for events, or iterate `text` for the text alone, or await `collect()` for the
    result; each takes up where the last one stopped. Leaving the `async with` early closes the
    connection, which stops the server on the providers that can be stopped.

    Iterating raises what the stream carries, with what had arrived in `partial`. Each socket read
    is a checkpoint; events that arrived together only check for cancellation.
    """

    def __init__(self, source: ChunkSource, *, raw_chunks: bool = False) -> None:
        self._source = source
        self._raw_chunks = raw_chunks
        self._events: list[StreamEvent] = []
        self._position = 0
        self._result: ChatResult | None = None

    @classmethod
    def of_result(cls, result: ChatResult) -> ChatStream:
        """A stream that gives out a stored answer: a session turn asked again by its `turn_id`.

        There are no chunks of it any more: `raw_chunks` adds nothing.
        """
        stream = cls(_NothingToRead(result))
        stream._events = _events_of(result)
        return stream

    @property
    def text(self) -> TextStream:
        """The text alone, piece by piece, as it arrives."""
        return TextStream(self)

    @property
    def result(self) -> ChatResult:
        """The whole answer; raises `StreamNotFinishedError` before the stream has ended."""
        if self._result is None:
            raise StreamNotFinishedError("the stream has not ended; iterate it, or await collect()")
        return self._result

    async def collect(self) -> ChatResult:
        """Read to the end and return the whole answer."""
        async for _event in self:
            pass
        return self.result

    def __aiter__(self) -> ChatStream:
        return self

    async def __anext__(self) -> StreamEvent:
        position = self._position
        if position >= len(self._events):
            await self._read()
            position = 0
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        self._position = position + 1
        return self._events[position]

    async def _read(self) -> None:
        """Replace the events that were given out by the next ones."""
        if self._result is not None:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        while chunks := await self._source.read():
            self._events = list(chunks) if isinstance(chunks, tuple) else self._make_events(chunks)
            if self._events:
                return
        self._result = self._source.result()
        raise StopAsyncIteration

    def _make_events(self, chunks: list[ChatChunk]) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        for chunk in chunks:
            if self._raw_chunks:
                events.append(RawChunk(chunk))
            if not chunk.choices:
                continue
            delta = chunk.choices[0].delta
            if delta is None:
                continue
            content = delta.content
            if content and content.__class__ is str:
                events.append(TextDelta(content))
            if delta.reasoning or delta.tool_calls or delta.refusal:
                events += _rarer_events(delta)
        return events


class TextStream:
    """The text of a `ChatStream`, as an async iterator of strings."""

    def __init__(self, stream: ChatStream) -> None:
        self._stream = stream

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while True:
            event = await self._stream.__anext__()
            if event.__class__ is TextDelta:
                return event.text


class _NothingToRead:
    """The source of a stored answer."""

    def __init__(self, answer: ChatResult) -> None:
        self._answer = answer

    async def read(self) -> list[ChatChunk]:
        await trio.lowlevel.checkpoint()
        return []

    def result(self) -> ChatResult:
        return self._answer


def _events_of(result: ChatResult) -> list[StreamEvent]:
    """A whole answer as events, one a kind and call."""
    message = result.message
    events: list[StreamEvent] = []
    if result.reasoning:
        events.append(ReasoningDelta(result.reasoning))
    if result.text:
        events.append(TextDelta(result.text))
    if message.refusal is not UNSET and message.refusal:
        events.append(RefusalDelta(message.refusal))
    for index, call in enumerate(message.tool_calls or ()):
        events.append(ToolCallDelta(index, call.id, call.function.name, call.function.arguments))
    return events


def _rarer_events(delta: Delta) -> list[StreamEvent]:
    events: list[StreamEvent] = []
    if delta.reasoning:
        events.append(ReasoningDelta(delta.reasoning))
    if delta.refusal:
        events.append(RefusalDelta(delta.refusal))
    for position, call in enumerate(delta.tool_calls or ()):
        function = call.function
        events.append(
            ToolCallDelta(
                position if call.index is None else call.index,
                call.id or "",
                (function.name if function else None) or "",
                (function.arguments if function else None) or "",
            )
        )
    return events
