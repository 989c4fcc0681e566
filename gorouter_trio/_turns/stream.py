"""The stream that users hold: events, text, callbacks, or the whole answer, from one reader."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, cast

import msgspec
import trio
from msgspec import UNSET

from ..errors import GorouterError, StreamNotFinishedError
from ..events import (
    AnnotationDelta,
    AudioDelta,
    ImageDelta,
    LogprobsDelta,
    RawChunk,
    ReasoningDelta,
    RefusalDelta,
    StreamEvent,
    StreamFinished,
    TextDelta,
    ToolCallDelta,
    ToolFinished,
    ToolStarted,
)
from ..wire.attachments import read_annotations, read_audio, read_images, read_texts, read_thoughts
from ..wire.merge import CallMerge
from ..wire.result import T_co
from .partial import PartialValue

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import TypeVar

    from ..wire.responses import ReplyToolCall
    from ..wire.result import ChatResult
    from ..wire.stream import ChatChunk, Delta

    T = TypeVar("T")
    Handler: TypeAlias = Callable[[T], Awaitable[object] | object]

__all__ = ["ChatStream", "ChunkSource", "ObjectStream", "TextStream"]


class ChunkSource(Protocol):
    """What a stream reads from: the reader of a reply, or a session's loan of one. Others take it as their base."""

    @property
    def generation_id(self) -> str | None:
        """The API's id of the answer, from the header of the reply."""

    async def read(self) -> list[ChatChunk] | tuple[StreamEvent, ...]:
        """The next chunks, all that arrived together, or, as a tuple, events; an empty list at the end."""

    def wait(self) -> Awaitable[None] | None:
        """What to await before `take`; None where `read` has to be called. It may raise `trio.ClosedResourceError`."""
        return None

    def take(self) -> list[ChatChunk]:
        """The chunks that have arrived, perhaps none; never waits."""
        return []

    def result(self) -> ChatResult[object]:
        """The answer from everything that was read."""


class ChatStream(Generic[T_co]):
    """A streamed answer, open inside `async with client.stream(...)`.

    Iterate it for events, or iterate `text` for the text alone, or `objects` for what there is of an answer
    in JSON, or await `collect()` for the result, or `run(...)` with callbacks; each takes up where the last
    one stopped. Leaving the `async with` early closes the connection, which stops the server on the providers
    that can be stopped.

    Iterating raises what the stream carries, with what had arrived in `partial`. Each socket read
    is a checkpoint; events that arrived together only check for cancellation.
    """

    def __init__(self, source: ChunkSource, *, raw_chunks: bool = False) -> None:
        self._source = source
        self._raw_chunks = raw_chunks
        self._events: list[StreamEvent] = []
        self._position = 0
        self._result: ChatResult[T_co] | None = None
        self._calls: CallMerge | None = None
        self._has_reasoning_text = False
        self._is_over = False

    @classmethod
    def of_result(cls, result: ChatResult[T_co]) -> ChatStream[T_co]:
        """A stream that gives out a stored answer: a session turn asked again by its `turn_id`.

        There are no chunks of it any more: `raw_chunks` adds nothing.
        """
        stream = cls(_NothingToRead(result))
        stream._events = _events_of(result)
        return stream

    @property
    def generation_id(self) -> str | None:
        """The API's id of the answer, known from the start: it finds the true cost of a stream that is left early."""
        return self._source.generation_id

    @property
    def text(self) -> TextStream:
        """The text alone, piece by piece, as it arrives."""
        return TextStream(self)

    @property
    def objects(self) -> ObjectStream:
        """An answer in JSON as it grows: the value of what has arrived, each time it is another one.

        Objects and lists have the members that have begun to arrive, strings what there is of them; numbers come when
        they are whole. The values are plain and not checked: what the answer stands for in the end, of the type that
        was asked for, is `result.value`. Answers before rounds of tools are not among them.
        """
        return ObjectStream(self)

    @property
    def result(self) -> ChatResult[T_co]:
        """The whole answer; raises `StreamNotFinishedError` before the stream has ended."""
        if self._result is None:
            raise StreamNotFinishedError("the stream has not ended; iterate it, or await collect()")
        return self._result

    def so_far(self) -> ChatResult[object]:
        """The answer as far as it was read, for who has lost patience with the rest: `interrupted` if some is missing.

        Looking changes nothing: the stream can be read on.
        """
        result = self._result or self._source.result()
        if result.finish_reason is not None:
            return result
        return msgspec.structs.replace(result, call=msgspec.structs.replace(result.call, interrupted=True))

    async def read_some(self) -> list[StreamEvent]:
        """The next events, all that have arrived together; none at the end. It takes up where iterating stopped."""
        position, self._position = self._position, len(self._events)
        if position >= len(self._events):
            try:
                await self._read()
            except StopAsyncIteration:
                return []
            position, self._position = 0, len(self._events)
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        return self._events[position:]

    async def collect(self) -> ChatResult[T_co]:
        """Read to the end and return the whole answer."""
        async for _event in self:
            pass
        return self.result

    async def run(
        self,
        *,
        on_content: Handler[str] | None = None,
        on_reasoning: Handler[str] | None = None,
        on_chunk: Handler[ChatChunk] | None = None,
        on_event: Handler[StreamEvent] | None = None,
        on_tool_executing: Handler[ToolStarted] | None = None,
        on_tool_result: Handler[ToolFinished] | None = None,
        on_complete: Handler[ChatResult[T_co]] | None = None,
        on_error: Handler[GorouterError] | None = None,
    ) -> ChatResult[T_co]:
        """Read to the end, call what was given for each piece, and return the whole answer.

        A handler is a function or an async one; the next piece waits for it, and an error that it
        raises leaves as it is. `on_chunk` is called with each chunk before the events made from it,
        `on_event` with every event before the handler of its own kind. `on_complete` comes last;
        `on_error` is called with what the stream raises, which is then raised.
        """
        self._raw_chunks = self._raw_chunks or on_chunk is not None
        failure: GorouterError | None = None
        while True:
            # What a handler raises, of whatever kind, is not the stream's.
            try:
                event = await self.__anext__()
            except StopAsyncIteration:
                break
            except GorouterError as exc:
                failure = exc
                break
            await _call(on_event, event)
            match event:
                case TextDelta(text):
                    await _call(on_content, text)
                case ReasoningDelta(text):
                    await _call(on_reasoning, text)
                case RawChunk(chunk):
                    await _call(on_chunk, chunk)
                case ToolStarted():
                    await _call(on_tool_executing, event)
                case ToolFinished():
                    await _call(on_tool_result, event)
                case _:
                    pass
        if failure is not None:
            await _call(on_error, failure)
            try:
                raise failure
            finally:
                del failure  # a traceback that leads to itself would stay until the next collection
        await _call(on_complete, self.result)
        return self.result

    def add_chunks(self) -> None:
        """From here on, give a `RawChunk` before the events of each chunk."""
        self._raw_chunks = True

    def __aiter__(self) -> ChatStream[T_co]:
        return self

    async def __anext__(self) -> StreamEvent:
        position = self._position
        if position >= len(self._events):
            source = self._source
            while (waiting := source.wait()) is not None:
                try:  # noqa: SIM105 - `suppress` is not free, and this is done for every event
                    await waiting
                except trio.ClosedResourceError:
                    pass  # what it means `take` says
                self._events = self._make_events(source.take())
                if self._events:
                    break
            else:
                await self._read()
            position = 0
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
        self._position = position + 1
        return self._events[position]

    async def _read(self) -> None:
        """Replace the events that were given out by the next ones."""
        if self._result is not None:
            if self._is_over:
                await trio.lowlevel.checkpoint()
            else:
                # The end is like one more event that was there already.
                await trio.lowlevel.checkpoint_if_cancelled()
                self._is_over = True
            raise StopAsyncIteration
        while found := await self._source.read():
            if isinstance(found, tuple):
                self._events = list(found)
                # What follows is another answer, whose calls count from 0 again; it may be another model's.
                self._calls, self._has_reasoning_text = None, False
            else:
                self._events = self._make_events(found)
            if self._events:
                return
        self._result = cast("ChatResult[T_co]", self._source.result())
        self._events = [_finish_of(self._result)]

    def _make_events(self, chunks: list[ChatChunk]) -> list[StreamEvent]:
        """The events of chunks. The common chunk, a piece of text and nothing else, takes the short way."""
        events: list[StreamEvent] = []
        add = events.append
        raw_chunks = self._raw_chunks
        for chunk in chunks:
            if raw_chunks:
                add(RawChunk(chunk))
            choices = chunk.choices
            if not choices:
                continue
            choice = choices[0]
            delta = choice.delta
            if delta is None:
                continue
            content = delta.content
            if content:
                if content.__class__ is str:
                    add(TextDelta(content))
                else:
                    events += [TextDelta(text) for text in read_texts(cast("list[msgspec.Raw]", content))]
            if (
                delta.reasoning
                or delta.tool_calls
                or delta.reasoning_details
                or delta.refusal
                or delta.annotations
                or delta.images
                or delta.audio
            ):
                events += self._rarer_events(delta)
            if choice.logprobs is not None:
                add(LogprobsDelta(choice.logprobs))
        return events

    def _rarer_events(self, delta: Delta) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if reasoning := self._reasoning_of(delta):
            events.append(ReasoningDelta(reasoning))
        if delta.refusal:
            events.append(RefusalDelta(delta.refusal))
        if delta.tool_calls:
            events += self._call_events(delta.tool_calls)
        events += [AnnotationDelta(annotation) for annotation in read_annotations(delta.annotations or ())]
        events += [ImageDelta(image) for image in read_images(delta.images or ())]
        audio = read_audio(delta.audio) if delta.audio else None
        if audio is not None:
            events.append(AudioDelta(audio))
        return events

    def _reasoning_of(self, delta: Delta) -> str:
        """A piece of reasoning. Most send it twice, as text and in blocks: the blocks count where there is no text."""
        if delta.reasoning:
            self._has_reasoning_text = True
            return delta.reasoning
        return "" if self._has_reasoning_text else read_thoughts(delta.reasoning_details or ())

    def _call_events(self, pieces: list[ReplyToolCall]) -> list[StreamEvent]:
        self._calls = CallMerge() if self._calls is None else self._calls
        return [
            ToolCallDelta(
                index,
                piece.id or "",
                (piece.function.name if piece.function else None) or "",
                (piece.function.arguments if piece.function else None) or "",
            )
            for index, piece in zip(self._calls.add(pieces), pieces, strict=True)
        ]


class TextStream:
    """The text of a `ChatStream`, as an async iterator of strings."""

    def __init__(self, stream: ChatStream[object]) -> None:
        self._stream = stream

    def __aiter__(self) -> TextStream:
        return self

    async def __anext__(self) -> str:
        while True:
            event = await self._stream.__anext__()
            if event.__class__ is TextDelta:
                return event.text


class ObjectStream:
    """The values of a `ChatStream` whose answer is JSON, as an async iterator; see `ChatStream.objects`."""

    def __init__(self, stream: ChatStream[object]) -> None:
        self._stream = stream
        self._partial = PartialValue()

    def __aiter__(self) -> ObjectStream:
        return self

    async def __anext__(self) -> object:
        while True:
            event = await self._stream.__anext__()
            match event:
                case TextDelta(text):
                    is_other = self._partial.add(text)
                case ToolStarted() | ToolFinished():
                    # A call that is refused is finished without having been started.
                    self._partial, is_other = PartialValue(), False
                case StreamFinished():
                    is_other = self._partial.end()
                case _:
                    is_other = False
            if is_other:
                return self._partial.value


class _NothingToRead(ChunkSource):
    """The source of a stored answer."""

    def __init__(self, answer: ChatResult[object]) -> None:
        self._answer = answer

    @property
    def generation_id(self) -> str | None:
        return self._answer.generation_id

    async def read(self) -> list[ChatChunk]:
        await trio.lowlevel.checkpoint()
        return []

    def result(self) -> ChatResult[object]:
        return self._answer


def _events_of(result: ChatResult[object]) -> list[StreamEvent]:
    """A whole answer as events, one a kind and call; the finish is not among them."""
    message = result.message
    events: list[StreamEvent] = []
    if result.reasoning:
        events.append(ReasoningDelta(result.reasoning))
    events += [AnnotationDelta(annotation) for annotation in result.annotations]
    if result.text:
        events.append(TextDelta(result.text))
    if result.logprobs is not None:
        events.append(LogprobsDelta(result.logprobs))
    if message.refusal is not UNSET and message.refusal:
        events.append(RefusalDelta(message.refusal))
    events += [ImageDelta(image) for image in result.images]
    if result.audio is not None:
        events.append(AudioDelta(result.audio))
    for index, call in enumerate(message.tool_calls or ()):
        events.append(ToolCallDelta(index, call.id, call.function.name, call.function.arguments))
    return events


def _finish_of(result: ChatResult[object]) -> StreamFinished:
    return StreamFinished(
        finish_reason=result.finish_reason, native_finish_reason=result.native_finish_reason, usage=result.usage
    )


async def _call(handler: Handler[T] | None, value: T) -> None:
    """Call a handler, and wait for what it returns if that is awaitable."""
    if handler is not None:
        returned = handler(value)
        if inspect.isawaitable(returned):
            await returned
