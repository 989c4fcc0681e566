"""What a request of each generating endpoint comes to: a conversation, and the body of the answer to it."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal

import msgspec
from msgspec import Struct

from . import _json, forms
from ._extras import Extras
from .faults import ErrorReply, bad_request
from .forms import Generation
from .requests import ChatRequest, Message, parse_chat

__all__ = ["JOBS", "Job", "Kind"]

Kind = Literal["chat", "text", "embeddings"]

_MAX_INPUTS: Final = 2_048
_MAX_DIMENSIONS: Final = 4_096
_DIMENSIONS: Final = 256


class Job(Struct, frozen=True):
    """A request as it was read: the conversation that it comes to, and how the answer to it is written."""

    kind: Kind
    chat: ChatRequest
    write: Callable[[Generation], bytes] = forms.completion
    extras: Extras | None = None
    """What the answer has besides its text; only in a chat."""


class _TextRequest(ChatRequest):
    """The fields of POST /completions: those of a chat, with a prompt in place of messages."""

    prompt: str | None = None


class _EmbeddingRequest(Struct):
    model: str | None = None
    input: str | list[object] | None = None
    dimensions: int | None = None
    encoding_format: str | None = None


_decode_text: Final = _json.decoder(_TextRequest)
_decode_embedding: Final = _json.decoder(_EmbeddingRequest)
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _parse_chat(body: bytes) -> Job | ErrorReply:
    chat = parse_chat(body)
    return chat if isinstance(chat, ErrorReply) else Job("chat", chat)


def _parse_text(body: bytes) -> Job | ErrorReply:
    try:
        request = _decode_text(body)
    except msgspec.ValidationError as exc:
        return bad_request(f"Invalid request: {exc}", error_type="invalid_request")
    except _MALFORMED:
        return bad_request("Input must have at least 1 token.")
    if not request.prompt:
        return bad_request('Input required: specify "prompt" or "messages"')
    # What else is wrong with it is said of it as of a chat.
    as_chat = msgspec.structs.replace(request, messages=[Message("user", request.prompt)], tools=None)
    chat = parse_chat(_json.encode({name: value for name, value in _fields(as_chat) if name != "prompt"}))
    return chat if isinstance(chat, ErrorReply) else Job("text", chat, forms.text_completion)


def _fields(request: Struct) -> list[tuple[str, object]]:
    return [(name, value) for name in request.__struct_fields__ if (value := getattr(request, name)) is not None]


def _parse_embeddings(body: bytes) -> Job | ErrorReply:
    try:
        request = _decode_embedding(body)
    except msgspec.ValidationError as exc:
        return bad_request(f"Invalid request: {exc}", error_type="invalid_request")
    except _MALFORMED:
        return bad_request("Input must have at least 1 token.")
    texts = _texts_of(request)
    dimensions = _DIMENSIONS if request.dimensions is None else request.dimensions
    if request.model is None:
        return bad_request("Invalid request: model is required", error_type="invalid_request")
    if not texts or not all(texts) or len(texts) > _MAX_INPUTS:
        return bad_request(f"Invalid request: input takes 1 to {_MAX_INPUTS} texts", error_type="invalid_request")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        return bad_request(f"Invalid request: dimensions must be 1 to {_MAX_DIMENSIONS}", error_type="invalid_request")
    chat = ChatRequest(model=request.model, messages=[Message("user", text) for text in texts], max_tokens=1)
    is_packed = request.encoding_format == "base64"
    return Job("embeddings", chat, partial(_write_embeddings, texts=texts, dimensions=dimensions, is_packed=is_packed))


def _texts_of(request: _EmbeddingRequest) -> list[str]:
    """The inputs as texts: of tokens each is a word, of other kinds of input the texts in them count."""
    given = request.input
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(token, int) for token in given):
        return [_text_of(given)]
    return [_text_of(one) for one in given or ()]


def _text_of(one: object) -> str:
    if isinstance(one, list):
        return " ".join([_text_of(token) for token in one])
    if isinstance(one, dict):
        return _text_of(one.get("content") or one.get("text") or one.get("type") or "")
    return str(one)


def _write_embeddings(generation: Generation, *, texts: Sequence[str], dimensions: int, is_packed: bool) -> bytes:
    rows = []
    for index, text in enumerate(texts):
        vector = _vector(text, dimensions)
        if is_packed:
            shown = f'"{base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode("ascii")}"'
        else:
            shown = f"[{','.join(map(_json.number, vector))}]"
        rows.append(f'{{"object":"embedding","embedding":{shown},"index":{index}}}')
    return forms.embeddings(generation, rows)


def _vector(text: str, dimensions: int) -> list[float]:
    """A unit vector: texts that share words are near each other."""
    sums = [0] * dimensions
    for word in text.lower().split() or [text]:
        marks = hashlib.shake_128(word.strip(".,;:!?").encode("utf-8", "surrogatepass")).digest(dimensions)
        sums = [total + mark - 128 for total, mark in zip(sums, marks, strict=True)]
    length = math.sqrt(sum([number * number for number in sums])) or 1.0
    return [round(number / length, 8) for number in sums]


JOBS: Final[dict[Kind, Callable[[bytes], Job | ErrorReply]]] = {
    "chat": _parse_chat,
    "text": _parse_text,
    "embeddings": _parse_embeddings,
}
"""How the requests of each endpoint are read, or what the API would say about them. Never changed after import."""
