"""The stream that users hold: events, text, or the whole answer, from one reader."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .errors import StreamNotFinishedError
from .events import RawChunk, ReasoningDelta, RefusalDelta, StreamEvent, TextDelta, ToolCallDelta

if TYPE_CHECKING:
    from .pool.streams import ChatReader
    from .wire.result import ChatResult
    from .wire.stream import ChatChunk, Delta

__all__ = ["ChatStream", "TextStream"]


class ChatStream:
    """A streamed answer, open inside `async with client.stream(...)`.

    Iterate it for events, or iterate `text` for the text alone, or await `collect()` for the
    result; each takes up where the last one stopped. Leaving the `async with` early closes the
    connection, which stops the server on the providers that can be stopped.

    Iterating raises what the stream carries, with what had arrived in `partial`. Each socket read
    is a checkpoint; events that arrived together only check for cancellation.
    """

    def __init__(self, reader: ChatReader | None, *, raw_chunks: bool = False) -> None:
        self._reader = reader
        self._raw_chunks = raw_chunks
        self._events: list[StreamEvent] = []
        self._position = 0
        self._result: ChatResult | None = None

    @classmethod
    def of_result(cls, result: ChatResult) -> ChatStream:
        """A stream that gives out a stored answer: a session turn asked again by its `turn_id`."""
        stream = cls(None)
        stream._events = [TextDelta(result.text)] if result.text else []
        stream._result = result
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
        if self._position < len(self._events):
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._read()
        event = self._events[self._position]
        self._position += 1
        return event

    async def _read(self) -> None:
        """Replace the events that were given out by the next ones."""
        while self._result is None and self._reader is not None:
            chunks = await self._reader.read()
            if not chunks:
                self._result = self._reader.result()
                break
            self._events = self._make_events(chunks)
            self._position = 0
            if self._events:
                return
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
