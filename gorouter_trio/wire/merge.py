"""Chunks merged into one message (openrouter API, "Streaming").

`ChunkMerge` is pure: chunks in, one assistant message out. It follows the wire, not the schema:
the finish is sent twice, the role with every delta, tool calls in pieces that interleave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import msgspec
from msgspec import UNSET, UnsetType

from ..errors import DecodeError
from .codec import decode_json, encode_json, to_tool_calls
from .messages import AssistantMessage
from .responses import ErrorBody, ReplyFunction, ReplyToolCall, Usage

if TYPE_CHECKING:
    from .stream import ChatChunk, ChunkChoice, Delta

__all__ = ["ChunkMerge"]


class _CallPieces:
    """One tool call while its pieces arrive."""

    __slots__ = ("arguments", "id", "name", "type")

    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.type = "function"
        self.arguments: list[str] = []

    def starts_another(self, piece: ReplyToolCall) -> bool:
        """Whether `piece` opens a new call under an index that is in use.

        One engine reuses index and id for parallel calls, so a name that comes again counts as a
        new call once the arguments so far are complete, or when it is another name.
        """
        if piece.id and self.id and piece.id != self.id:
            return True
        name = piece.function.name if piece.function else None
        if not name or not self.name:
            return False
        return (name != self.name and bool(piece.id)) or _is_complete_json("".join(self.arguments))

    def add(self, piece: ReplyToolCall) -> None:
        self.id = piece.id or self.id
        self.type = piece.type or self.type
        if piece.function is not None:
            self.name = piece.function.name or self.name
            if piece.function.arguments:
                self.arguments.append(piece.function.arguments)

    def whole(self) -> ReplyToolCall:
        return ReplyToolCall(None, self.id, self.type, ReplyFunction(self.name, "".join(self.arguments)))


class ChunkMerge:
    """Chunks of one streamed reply, merged.

    Call `add` with the chunks in order. `finish_reason` is None until the reply is finished: a
    stream that ends before that is broken. `error` is the error that the stream carried, if any;
    what had arrived before it stays readable through `message`.
    """

    __slots__ = (
        "_annotations",
        "_audio",
        "_calls",
        "_current_call",
        "_details",
        "_images",
        "_parts",
        "_reasoning",
        "_refusal",
        "_text",
        "error",
        "finish_reason",
        "generation_id",
        "model",
        "native_finish_reason",
        "provider",
        "usage",
    )

    def __init__(self) -> None:
        self.generation_id: str | None = None
        self.model: str | None = None
        self.provider: str | None = None
        self.finish_reason: str | None = None
        self.native_finish_reason: str | None = None
        self.usage: Usage | None = None
        self.error: ErrorBody | None = None
        self._text: list[str] = []
        self._parts: list[msgspec.Raw] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._details: dict[tuple[object, object], dict[str, object]] = {}
        self._calls: list[_CallPieces] = []
        self._current_call: dict[int, _CallPieces] = {}
        self._annotations: list[msgspec.Raw] = []
        self._images: list[msgspec.Raw] = []
        self._audio: dict[str, object] = {}

    def add(self, chunks: list[ChatChunk]) -> None:
        """Merge chunks, in order. The common one, a piece of text and nothing else, takes the short way."""
        text = self._text
        for chunk in chunks:
            choices = chunk.choices
            if not choices or chunk.usage is not None or chunk.error is not None or self.generation_id is None:
                self._add_head(chunk)
                if not choices:
                    continue
            choice = choices[0]
            if choice.finish_reason is not None or choice.error is not None:
                self._finish(choice)
            delta = choice.delta
            if delta is None:
                continue
            content = delta.content
            if content:
                if isinstance(content, str):
                    text.append(content)
                else:
                    self._parts.extend(part.copy() for part in content)
            if delta.reasoning or delta.tool_calls or delta.reasoning_details:
                self._add_thought(delta)
            if delta.refusal or delta.annotations or delta.images or delta.audio:
                self._add_rare(delta)

    @property
    def has_data(self) -> bool:
        """Whether anything that a consumer would see has arrived."""
        return bool(self._text or self._reasoning or self._details or self._calls or self._refusal or self._parts)

    def message(self) -> AssistantMessage:
        """The assistant's message from everything merged so far; raw fields are copies."""
        return AssistantMessage(
            content=self._content(),
            refusal="".join(self._refusal) or UNSET,
            reasoning="".join(self._reasoning) or UNSET,
            reasoning_details=_raw(list(self._details.values())),
            annotations=_raw(self._annotations),
            images=_raw(self._images),
            audio=_raw(self._audio),
            tool_calls=to_tool_calls([call.whole() for call in self._calls]),
        )

    def _content(self) -> str | list[msgspec.Raw] | None:
        text = "".join(self._text)
        if self._parts:
            before = [msgspec.Raw(encode_json({"type": "text", "text": text}))] if text else []
            return before + self._parts
        return None if self._calls and not text else text

    def _add_head(self, chunk: ChatChunk) -> None:
        if self.generation_id is None:
            self.generation_id = chunk.id
            self.model = chunk.model
            self.provider = chunk.provider
        if chunk.usage is not None:
            self.usage = chunk.usage
        if chunk.error is not None:
            self.error = chunk.error

    def _finish(self, choice: ChunkChoice) -> None:
        if self.finish_reason is None:
            self.finish_reason = choice.finish_reason
        self.native_finish_reason = choice.native_finish_reason or self.native_finish_reason
        if choice.error is not None:
            self.error = choice.error

    def _add_thought(self, delta: Delta) -> None:
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
        if delta.tool_calls:
            self._add_tool_calls(delta.tool_calls)
        if delta.reasoning_details:
            self._add_details(delta.reasoning_details)

    def _add_tool_calls(self, pieces: list[ReplyToolCall]) -> None:
        for position, piece in enumerate(pieces):
            index = position if piece.index is None else piece.index
            call = self._current_call.get(index)
            if call is None or call.starts_another(piece):
                call = _CallPieces()
                self._current_call[index] = call
                self._calls.append(call)
            call.add(piece)

    def _add_details(self, pieces: list[msgspec.Raw]) -> None:
        for raw in pieces:
            piece = _decode_object(raw)
            key = (piece.get("index", len(self._details)), piece.get("type"))
            block = self._details.setdefault(key, {})
            for name, value in piece.items():
                old = block.get(name)
                if name in _APPENDED and isinstance(old, str) and isinstance(value, str):
                    block[name] = old + value
                elif value is not None or name not in block:
                    block[name] = value

    def _add_rare(self, delta: Delta) -> None:
        if delta.refusal:
            self._refusal.append(delta.refusal)
        self._annotations.extend(raw.copy() for raw in delta.annotations or ())
        self._images.extend(raw.copy() for raw in delta.images or ())
        if delta.audio:
            for name, value in _decode_object(delta.audio).items():
                old = self._audio.get(name)
                appended = name in {"data", "transcript"} and isinstance(old, str) and isinstance(value, str)
                self._audio[name] = f"{old}{value}" if appended else value


_APPENDED = frozenset({"text", "summary", "data"})


def _decode_object(raw: msgspec.Raw) -> dict[str, object]:
    """A piece as a mapping; pieces of another form carry nothing that could be merged."""
    value = decode_json(bytes(raw))
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _raw(value: list[dict[str, object]] | list[msgspec.Raw] | dict[str, object]) -> msgspec.Raw | UnsetType:
    return msgspec.Raw(encode_json(value)) if value else UNSET


def _is_complete_json(text: str) -> bool:
    try:
        decode_json(text)
    except DecodeError:
        return False
    return True
