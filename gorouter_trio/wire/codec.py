"""The only place where this package turns values into JSON and back.

Encoding is done once: a message is encoded when it enters a history or a request, and a request
body is a join of encoded messages. Replies are decoded leniently, into `wire.responses`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from ..errors import ApiError, BadRequestError, DecodeError, ProviderError
from .catalog import Credits, KeyInfo, Model
from .faults import api_error, body_summary, error_from_reply
from .journal import LogEntry
from .messages import AssistantMessage, FunctionCall, Message, ToolCall
from .requests import ChatKeywords, ChatOptions, ChatRequest
from .responses import ChatCompletion, ErrorBody, ReplyMessage, ReplyToolCall
from .stream import ChatChunk

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

__all__ = [
    "Prompt",
    "decode_chunk",
    "decode_chunks",
    "decode_completion",
    "decode_credits",
    "decode_error",
    "decode_json",
    "decode_key",
    "decode_log_entry",
    "decode_message",
    "decode_messages",
    "decode_models",
    "encode_json",
    "encode_message",
    "encode_options",
    "encode_prompt",
    "encode_request",
    "join_options",
    "render_body",
    "to_message",
    "to_tool_calls",
]

T = TypeVar("T")

if TYPE_CHECKING:
    Prompt: TypeAlias = str | Message | Mapping[str, object] | Sequence[Message | Mapping[str, object]]

_encoder = msgspec.json.Encoder(decimal_format="number")
encode_json = _encoder.encode
"""Any value of this package as JSON bytes; Decimals as numbers."""

_decode_any = msgspec.json.Decoder().decode
_decode_completion = msgspec.json.Decoder(ChatCompletion).decode
_chunk_decoder = msgspec.json.Decoder(ChatChunk)
_decode_message = msgspec.json.Decoder(Message).decode
_decode_messages = msgspec.json.Decoder(list[Message]).decode
_decode_log_entry = msgspec.json.Decoder(LogEntry).decode
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class _ModelsReply(msgspec.Struct, frozen=True):
    data: list[Model]


class _ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorBody | str | None = None


class _CreditsReply(msgspec.Struct, frozen=True):
    data: Credits


class _KeyReply(msgspec.Struct, frozen=True):
    data: KeyInfo


_decode_models_reply = msgspec.json.Decoder(_ModelsReply).decode
_decode_error_reply = msgspec.json.Decoder(_ErrorReply).decode
_decode_credits_reply = msgspec.json.Decoder(_CreditsReply).decode
_decode_key_reply = msgspec.json.Decoder(_KeyReply).decode


# Requests


def encode_prompt(prompt: Prompt) -> bytes:
    """A prompt as encoded messages, joined by commas.

    A string is one user message; mappings are sent as they are after a look at their role. Raises
    `BadRequestError` when there is no message or one is not a message.
    """
    if isinstance(prompt, str):
        return b'{"role":"user","content":' + encode_json(prompt) + b"}"
    if isinstance(prompt, msgspec.Struct) or _is_mapping(prompt):
        return encode_message(cast("Message | Mapping[str, object]", prompt))
    encoded = [encode_message(message) for message in cast("Sequence[Message | Mapping[str, object]]", prompt)]
    if not encoded:
        raise _bad_request("messages: a request needs at least one message")
    return b",".join(encoded)


def encode_message(message: Message | Mapping[str, object]) -> bytes:
    """One message as JSON bytes; raises `BadRequestError` when its role is unknown."""
    if not isinstance(message, msgspec.Struct):
        if not _is_mapping(message):
            raise _bad_request(f"messages: a {type(message).__name__} is not a message")
        if message.get("role") not in _ROLES:
            roles = ", ".join(sorted(_ROLES))
            raise _bad_request(f"messages: unknown role {message.get('role')!r}; use one of {roles}")
    try:
        return encode_json(message)
    except (TypeError, ValueError, UnicodeEncodeError, RecursionError) as exc:
        raise _bad_request(f"messages: cannot be written as JSON: {exc}") from exc


def encode_options(keywords: ChatKeywords) -> bytes:
    """The options of a request as one encoded JSON object.

    Raises `BadRequestError` for a value that is not JSON, and `TypeError` for an unknown name, as
    a call with an unknown keyword does.
    """
    fields = dict(keywords)
    extra = cast("Mapping[str, object] | None", fields.pop("extra_body", None))
    if "routing_id" in fields:
        fields["session_id"] = fields.pop("routing_id")
    try:
        encoded = encode_json(ChatOptions(**fields))  # type: ignore[arg-type]  # the TypedDict has checked them
        return join_options(encoded, encode_json(dict(extra))) if extra else encoded
    except (ValueError, UnicodeEncodeError, RecursionError) as exc:
        raise _bad_request(f"the options cannot be written as JSON: {exc}") from exc


def encode_request(request: ChatRequest | Mapping[str, object], *, defaults: bytes = b"{}") -> bytes:
    """The body of a whole request, as a batch has it; `defaults` are encoded options beneath its own.

    A mapping is a request body in wire names. `custom_id` and `stream` are not sent. Raises
    `BadRequestError` when it has no messages or cannot be written as JSON.
    """
    if isinstance(request, ChatRequest):
        fields = {name: getattr(request, name) for name in request.__struct_fields__}
        fields = {name: value for name, value in fields.items() if value is not UNSET}
    elif _is_mapping(request):
        fields = dict(request)
    else:
        raise _bad_request(f"a {type(request).__name__} is not a request")
    messages = fields.pop("messages", None)
    if isinstance(messages, (str, bytes)) or not hasattr(messages, "__iter__"):
        raise _bad_request("messages: a request needs a list of messages")
    for name in ("custom_id", "stream", "stream_options"):
        fields.pop(name, None)
    encoded = encode_prompt(cast("Prompt", list(cast("Sequence[Message]", messages))))
    try:
        options = join_options(defaults, encode_json(fields))
    except (TypeError, ValueError, UnicodeEncodeError, RecursionError) as exc:
        raise _bad_request(f"the request cannot be written as JSON: {exc}") from exc
    return render_body(options, encoded, streaming=False)


def join_options(first: bytes, second: bytes) -> bytes:
    """Two encoded objects as one; where both have a name, `second` wins."""
    if first == b"{}" or second == b"{}":
        return second if first == b"{}" else first
    merged = _decode_any(first) | _decode_any(second)
    return encode_json(merged)


def render_body(options: bytes, messages: bytes, *, streaming: bool) -> bytes:
    """The body of a request from its encoded options and encoded messages."""
    head = options[:-1] + (b',"stream":true,' if streaming else b",") if options != b"{}" else b"{"
    if options == b"{}" and streaming:
        head = b'{"stream":true,'
    return b'%b"messages":[%b]}' % (head, messages)


# Replies


def decode_completion(body: bytes, *, generation_id: str | None = None) -> ChatCompletion:
    """The reply in a 200 body, which has at least one choice with a message.

    Raises the error that the body carries: `ApiError` by its own code, `ProviderError` with code
    504 for a body of padding only (an upstream timeout that may have been billed), `DecodeError`
    for anything that is not a reply.
    """
    try:
        reply = _decode_completion(body)
    except _MALFORMED as exc:
        raise _not_a_reply(body, exc, generation_id=generation_id) from exc
    if reply.error is not None:
        raise api_error(reply.error, status=200, generation_id=reply.id or generation_id)
    choice = reply.choices[0] if reply.choices else None
    if choice is not None and choice.error is not None:
        raise api_error(choice.error, status=200, generation_id=reply.id or generation_id)
    if choice is None or choice.message is None:
        raise _decode_error("the reply has no choices", generation_id=reply.id or generation_id)
    return reply


def to_message(reply: ReplyMessage) -> AssistantMessage:
    """The assistant message of a reply in the form that is kept and echoed; raw fields are copies."""
    content = reply.content
    return AssistantMessage(
        content=content if content is None or isinstance(content, str) else [part.copy() for part in content],
        refusal=UNSET if reply.refusal is None else reply.refusal,
        reasoning=UNSET if reply.reasoning is None else reply.reasoning,
        reasoning_details=UNSET if reply.reasoning_details is None else reply.reasoning_details.copy(),
        annotations=UNSET if reply.annotations is None else reply.annotations.copy(),
        images=UNSET if reply.images is None else reply.images.copy(),
        audio=UNSET if reply.audio is None else reply.audio.copy(),
        tool_calls=to_tool_calls(reply.tool_calls),
    )


def to_tool_calls(calls: list[ReplyToolCall] | None) -> list[ToolCall] | UnsetType:
    """The calls of a reply in the form that a request echoes; an empty id gets one from its position."""
    if not calls:
        return UNSET
    return [
        ToolCall(
            id=call.id or f"call_{position}",
            type=call.type or "function",
            function=FunctionCall(
                (call.function.name if call.function else None) or "",
                (call.function.arguments if call.function else None) or "",
            ),
        )
        for position, call in enumerate(calls)
    ]


def decode_chunk(data: bytes) -> ChatChunk:
    """One chunk of a stream; raises `DecodeError`."""
    try:
        return _chunk_decoder.decode(data)
    except _MALFORMED as exc:
        raise _decode_error(f"a chunk of the stream is not what the API promises: {exc}") from exc


def decode_chunks(events: list[bytes]) -> list[ChatChunk]:
    """Several chunks in one pass; raises `DecodeError`."""
    if len(events) == 1:
        return [decode_chunk(events[0])]
    try:
        return _chunk_decoder.decode_lines(b"\n".join(events))
    except _MALFORMED as exc:
        raise _decode_error(f"a chunk of the stream is not what the API promises: {exc}") from exc


def decode_models(body: bytes) -> list[Model]:
    """The rows of GET /models; raises `DecodeError`."""
    return _service(_decode_models_reply, body).data


def decode_credits(body: bytes) -> Credits:
    """GET /credits, out of its `data` envelope; raises `DecodeError`."""
    return _service(_decode_credits_reply, body).data


def decode_key(body: bytes) -> KeyInfo:
    """GET /key, out of its `data` envelope; raises `DecodeError`."""
    return _service(_decode_key_reply, body).data


def decode_error(status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, *, now_s: float) -> ApiError:
    """The error that a reply outside 2xx stands for, whatever its body is: JSON, HTML or nothing.

    `now_s` is wall-clock seconds since the epoch, for a Retry-After that is a date.
    """
    try:
        error = _decode_error_reply(body).error
    except _MALFORMED:
        error = None
    if isinstance(error, str):
        error = ErrorBody(message=error)
    return error_from_reply(status, headers, error or ErrorBody(message=body_summary(body)), now_s=now_s)


# Stored values


def decode_message(data: bytes) -> Message:
    """A message that was encoded by `encode_message`; raises `DecodeError`."""
    return cast("Message", _service(_decode_message, data))


def decode_messages(joined: bytes) -> list[Message]:
    """Messages that were joined by `encode_prompt`; raises `DecodeError`."""
    return _service(_decode_messages, b"[%b]" % joined)


def decode_log_entry(data: bytes) -> LogEntry:
    """An entry of a session's log; raises `DecodeError`. Its raw fields pin `data`."""
    return cast("LogEntry", _service(_decode_log_entry, data))


def decode_json(data: bytes | str) -> object:
    """Any JSON value; raises `DecodeError`."""
    try:
        return cast("object", _decode_any(data))
    except _MALFORMED as exc:
        raise _decode_error(f"not JSON: {exc}") from exc


def _service(decode: Callable[[bytes], T], body: bytes) -> T:
    try:
        return decode(body)
    except _MALFORMED as exc:
        raise _decode_error(f"the reply is not what the API promises: {exc}") from exc


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def _bad_request(message: str) -> BadRequestError:
    return BadRequestError(message, status=400)


def _decode_error(message: str, *, generation_id: str | None = None) -> DecodeError:
    error = DecodeError(message)
    error.generation_id = generation_id
    error.maybe_billed = True
    return error


def _not_a_reply(body: bytes, exc: Exception, *, generation_id: str | None) -> ProviderError | DecodeError:
    if body.strip():
        return _decode_error(f"the reply is not what the API promises: {exc}", generation_id=generation_id)
    error = ProviderError(
        "the reply is empty: the provider timed out", status=200, code=504, generation_id=generation_id
    )
    error.maybe_billed = True
    return error
