"""Chunks merged into one message (openrouter API, "Streaming").

`ChunkMerge` is pure: chunks in, one assistant message out. It follows the wire, not the schema:
the finish is sent twice, the role with every delta, tool calls in pieces that interleave.
"""

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import msgspec
from msgspec import UNSET, UnsetType

from ..errors import DecodeError
from .codec import checked_usage, decode_json, encode_json, is_utf8, keep_raw, kept, split_object, to_tool_calls
from .messages import AssistantMessage
from .responses import ErrorBody, Logprobs, ReplyFunction, ReplyToolCall, RouterMetadata, TokenLogprob, Usage

if TYPE_CHECKING:
    from .stream import ChatChunk, ChunkChoice, Delta

__all__ = ["CallMerge", "ChunkMerge"]

_NULL = b"null"
_DETAIL_TEXTS = frozenset({"text", "summary", "data"})
_AUDIO_TEXTS = frozenset({"data", "transcript"})
# So many pieces of a text are joined: as objects of their own they take ten times as much.
_MANY = 256
# Details that may come without an index and still in pieces; the others are whole.
_LOOSE_KINDS = frozenset({b'"reasoning.text"', b'"reasoning.summary"'})


class _CallPieces:
    """One tool call while its pieces arrive."""

    __slots__ = (
        "_depth",
        "_escaped",
        "_in_text",
        "_scanned",
        "arguments",
        "id",
        "name",
        "named_again",
        "number",
        "type",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.id = ""
        self.name = ""
        self.type = "function"
        self.arguments: list[str] = []
        self.named_again = False
        self._scanned = 0
        self._depth = 0
        self._in_text = False
        self._escaped = False

    def starts_another(self, piece: ReplyToolCall) -> bool:
        """Whether `piece` opens a new call under an index that is in use.

        One engine reuses index and id for parallel calls, and others send both again with every
        piece. So a name opens a new call when it comes with another id, when it is another name with
        an id or after complete arguments, and when it is the same name and arguments follow complete
        ones.
        """
        name = piece.function.name if piece.function else None
        if name and self.name:
            if piece.id and self.id and piece.id != self.id:
                return True
            if name != self.name:
                return bool(piece.id) or self._is_complete()
        repeats = bool(name and self.name) or self.named_again
        return repeats and bool(piece.function and piece.function.arguments) and self._is_complete()

    def next_call(self, number: int) -> _CallPieces:
        """A call of the same name: what a piece opens that has none of its own."""
        call = _CallPieces(number)
        call.id, call.name, call.type = self.id, self.name, self.type
        return call

    def add(self, piece: ReplyToolCall) -> None:
        self.id = piece.id or self.id
        self.type = piece.type or self.type
        if piece.function is not None:
            self.named_again = bool(self.name and piece.function.name)
            self.name = piece.function.name or self.name
            if piece.function.arguments:
                self.arguments.append(piece.function.arguments)

    def whole(self) -> ReplyToolCall:
        return ReplyToolCall(None, self.id, self.type, ReplyFunction(self.name, "".join(self.arguments)))

    def _is_complete(self) -> bool:
        """Whether the arguments so far end with the bracket that closes them; looks at each character once."""
        for position in range(self._scanned, len(self.arguments)):
            for character in self.arguments[position]:
                self._scan(character)
        self._scanned = len(self.arguments)
        return self._depth == 0 and not self._in_text and bool(self.arguments)

    def _scan(self, character: str) -> None:
        if self._in_text:
            self._in_text = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_text = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1


class CallMerge:
    """Tool calls of one answer, merged from their pieces."""

    __slots__ = ("_calls", "_current")

    def __init__(self) -> None:
        self._calls: list[_CallPieces] = []
        self._current: dict[int | str, _CallPieces] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, pieces: list[ReplyToolCall]) -> list[int]:
        """Merge the pieces of one delta, and say which call of the answer each belongs to, counted from 0."""
        return [self._add(piece, position) for position, piece in enumerate(pieces)]

    def whole(self) -> list[ReplyToolCall]:
        """The calls as far as they have arrived."""
        return [call.whole() for call in self._calls]

    def _add(self, piece: ReplyToolCall, position: int) -> int:
        name = piece.function.name if piece.function else None
        slot: int | str = position if piece.index is None else piece.index
        if piece.index is None and piece.id and (name or piece.id in self._current):
            slot = piece.id
        call = self._current.get(slot)
        if call is None or call.starts_another(piece):
            call = _CallPieces(len(self._calls)) if name or call is None else call.next_call(len(self._calls))
            self._calls.append(call)
        self._current[slot] = call
        if piece.index is None:
            # Where pieces have no index, those without an id belong to the call that was spoken of last.
            self._current[position] = call
        call.add(piece)
        return call.number


class _Block:
    """An object that comes in pieces: the fields in `texts` are appended, the others are set."""

    __slots__ = ("_fields", "_pieces", "_texts")

    def __init__(self, texts: frozenset[str]) -> None:
        self._texts = texts
        self._fields: dict[str, msgspec.Raw] = {}
        self._pieces: dict[str, list[str]] = {}

    def add(self, fields: dict[str, msgspec.Raw]) -> None:
        for name, raw in fields.items():
            value = bytes(raw)
            if name in self._texts and value[:1] == b'"':
                with suppress(DecodeError):
                    self._pieces.setdefault(name, []).append(str(decode_json(value)))
                    # Holds the field's place in the order in which fields came.
                    self._fields.setdefault(name, raw.copy())
            elif (value != _NULL or name not in self._fields) and is_utf8(raw):
                self._fields[name] = msgspec.Raw(value)

    def is_signed(self) -> bool:
        """Whether the signature has come, which is the last piece of a block."""
        return bytes(self._fields.get("signature", _NULL)) != _NULL

    def whole(self) -> dict[str, object]:
        return self._fields | {name: "".join(pieces) for name, pieces in self._pieces.items()}

    def pieces(self, name: str) -> list[str]:
        """What has arrived of a text."""
        return self._pieces.get(name, [])


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
        "_details",
        "_images",
        "_logprobs",
        "_loose",
        "_parts",
        "_reasoning",
        "_reasoning_blocks",
        "_refusal",
        "_text",
        "_text_blocks",
        "alignment",
        "error",
        "finish_reason",
        "generation_id",
        "model",
        "native_finish_reason",
        "openrouter_metadata",
        "provider",
        "safeguard_results",
        "service_tier",
        "system_fingerprint",
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
        self.service_tier: str | None = None
        self.system_fingerprint: str | None = None
        self.openrouter_metadata: RouterMetadata | None = None
        self.alignment: msgspec.Raw | UnsetType = UNSET
        self.safeguard_results: msgspec.Raw | UnsetType = UNSET
        self._text: list[str] = []
        # How many at the front of a list are joined ones.
        self._text_blocks = self._reasoning_blocks = 0
        self._parts: list[msgspec.Raw] = []
        self._reasoning: list[str] = []
        self._refusal: list[str] = []
        self._details: dict[tuple[object, bytes], _Block] = {}
        self._loose: tuple[bytes, _Block] | None = None
        self._calls = CallMerge()
        self._annotations: list[msgspec.Raw] = []
        self._images: list[msgspec.Raw] = []
        self._audio = _Block(_AUDIO_TEXTS)
        self._logprobs: list[Logprobs] = []

    def add(self, chunks: list[ChatChunk]) -> None:
        """Merge chunks, in order. The common one, a piece of text and nothing else, takes the short way."""
        text = self._text
        is_headless = self.generation_id is None
        for chunk in chunks:
            choices = chunk.choices
            if not choices or chunk.usage is not None or chunk.error is not None or is_headless:
                self._add_head(chunk)
                is_headless = self.generation_id is None
                if not choices:
                    continue
            choice = choices[0]
            if choice.finish_reason or choice.error is not None:
                self._finish(choice)
                self._add_head(chunk)
            if choice.logprobs is not None:
                self._logprobs.append(choice.logprobs)
            delta = choice.delta
            if delta is None:
                continue
            content = delta.content
            if content:
                if content.__class__ is str:
                    text.append(content)
                else:
                    self._parts += keep_raw(cast("list[msgspec.Raw]", content))
            if delta.reasoning or delta.tool_calls or delta.reasoning_details:
                self._add_thought(delta)
            if delta.refusal or delta.annotations or delta.images or delta.audio:
                self._add_rare(delta)
        if len(text) - self._text_blocks > _MANY:
            self._text_blocks = _fold(text, self._text_blocks)

    @property
    def has_data(self) -> bool:
        """Whether anything that a consumer would see has arrived."""
        spoken = self._text or self._reasoning or self._details or self._calls or self._refusal or self._parts
        return bool(spoken or self._annotations or self._images or self._audio.whole())

    def message(self) -> AssistantMessage:
        """The assistant's message from everything merged so far; raw fields are copies."""
        return AssistantMessage(
            content=self._content(),
            refusal="".join(self._refusal) or UNSET,
            reasoning="".join(self._reasoning) or UNSET,
            reasoning_details=_raw([block.whole() for block in self._details.values()]),
            annotations=_raw(self._annotations),
            images=_raw(self._images),
            audio=_raw(_joined_audio(self._audio)),
            tool_calls=to_tool_calls(self._calls.whole()),
        )

    @property
    def logprobs(self) -> Logprobs | None:
        """Log probabilities of all tokens that have arrived, where any came."""
        if not self._logprobs:
            return None
        content = _chained([piece.content for piece in self._logprobs])
        return Logprobs(content, _chained([piece.refusal for piece in self._logprobs]))

    def _content(self) -> str | list[msgspec.Raw] | None:
        text = "".join(self._text)
        if text:
            # The pieces are as much again, for as long as the stream is kept.
            self._text[:] = [text]
            self._text_blocks = 1
        if self._parts:
            before = [msgspec.Raw(encode_json({"type": "text", "text": text}))] if text else []
            return before + self._parts
        return None if self._calls and not text else text

    def _add_head(self, chunk: ChatChunk) -> None:
        self.generation_id = self.generation_id or chunk.id
        self.model = chunk.model or self.model
        self.provider = chunk.provider or self.provider
        self.service_tier = chunk.service_tier or self.service_tier
        self.system_fingerprint = chunk.system_fingerprint or self.system_fingerprint
        if chunk.usage is not None:
            self.usage = checked_usage(chunk.usage)
        if chunk.error is not None:
            self.error = chunk.error
        if chunk.openrouter_metadata is not None:
            self.openrouter_metadata = chunk.openrouter_metadata
        if chunk.alignment is not UNSET:
            self.alignment = kept(chunk.alignment)
        if chunk.safeguard_results is not UNSET:
            self.safeguard_results = kept(chunk.safeguard_results)

    def _finish(self, choice: ChunkChoice) -> None:
        self.finish_reason = self.finish_reason or choice.finish_reason or None
        self.native_finish_reason = choice.native_finish_reason or self.native_finish_reason
        if choice.error is not None:
            self.error = choice.error

    def _add_thought(self, delta: Delta) -> None:
        if delta.reasoning:
            self._reasoning.append(delta.reasoning)
            if len(self._reasoning) - self._reasoning_blocks > _MANY:
                self._reasoning_blocks = _fold(self._reasoning, self._reasoning_blocks)
        if delta.tool_calls:
            self._calls.add(delta.tool_calls)
        if delta.reasoning_details:
            self._add_details(delta.reasoning_details)

    def _add_details(self, pieces: list[msgspec.Raw]) -> None:
        for raw in pieces:
            fields = _fields_of(raw)
            if fields:
                self._block_of(fields).add(fields)

    def _block_of(self, fields: dict[str, msgspec.Raw]) -> _Block:
        """The block that a piece belongs to: by index and type, or without an index the one before it."""
        kind = bytes(fields.get("type", _NULL))
        index = bytes(fields.get("index", _NULL))
        if index != _NULL:
            return self._details.setdefault((index, kind), _Block(_DETAIL_TEXTS))
        if self._loose is not None and self._loose[0] == kind and not self._loose[1].is_signed():
            return self._loose[1]
        block = self._details[len(self._details), kind] = _Block(_DETAIL_TEXTS)
        self._loose = (kind, block) if kind in _LOOSE_KINDS else None
        return block

    def _add_rare(self, delta: Delta) -> None:
        if delta.refusal:
            self._refusal.append(delta.refusal)
        self._annotations += keep_raw(delta.annotations or [])
        self._images += keep_raw(delta.images or [])
        if delta.audio:
            self._audio.add(_fields_of(delta.audio))


def _fold(pieces: list[str], blocks: int) -> int:
    """Join what is behind the first `blocks`; how many there are then. Each piece is copied once, however many come."""
    pieces[blocks:] = ["".join(pieces[blocks:])]
    return blocks + 1


def _fields_of(raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """A piece as its fields; pieces of another form carry nothing that could be merged."""
    try:
        return split_object(raw)
    except DecodeError:
        return {}


def _joined_audio(block: _Block) -> dict[str, object]:
    """The audio of an answer; pieces of base64 that are padded each for itself are joined as what they stand for."""
    audio = block.whole()
    pieces = block.pieces("data")
    if any(piece.endswith("=") for piece in pieces[:-1]):
        with suppress(binascii.Error, ValueError):
            content = b"".join([base64.b64decode(piece, validate=True) for piece in pieces])
            audio["data"] = base64.b64encode(content).decode("ascii")
    return audio


def _chained(lists: list[list[TokenLogprob] | None]) -> list[TokenLogprob] | None:
    found = [part for part in lists if part is not None]
    return [token for part in found for token in part] if found else None


def _raw(value: list[dict[str, object]] | list[msgspec.Raw] | dict[str, object]) -> msgspec.Raw | UnsetType:
    return msgspec.Raw(encode_json(value)) if value else UNSET
