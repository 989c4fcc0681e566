"""`POST /v1/chat/completions` as other clients know it, made of turns and their events. Pure: no I/O.

The API that is spoken is OpenRouter's own form of it (openrouter API, POST /chat/completions), which clients of the
OpenAI API understand. The session of a request is in its headers; without one the request is a chat of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, cast

import msgspec
from msgspec import UNSET, Struct

from ..errors import ApiError, BadRequestError, DecodeError, GorouterError, InvalidTokenError
from ..events import ReasoningDelta, RefusalDelta, TextDelta, ToolCallDelta
from ..wire.codec import decode_json, encode_json, make_decoder
from .failures import error_info
from .protocol import SYSTEM_ROLES, AskOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..events import StreamEvent
    from ..wire.result import ChatResult

__all__ = ["CompletionRequest", "CompletionStream", "completion_body", "error_body", "read_request", "status_of"]

_DONE: Final = b"data: [DONE]\n\n"
# What clients send of their own accord, and what has no meaning here.
_PASSED_OVER: Final = frozenset({"stream_options", "store", "usage", "n", "session_id"})
_MOST_MESSAGES: Final = 10_000
_STATUSES: Final[Mapping[str, int]] = {
    "authentication_required": 401,
    "invalid_token": 401,
    "access_denied": 403,
    "session_not_found": 404,
    "session_busy": 429,
    "session_conflict": 409,
    "turn_in_doubt": 409,
    "turn_interrupted": 409,
    "turn_parked": 409,
    "budget_exceeded": 402,
    "unpriceable_request": 402,
    "pool_full": 503,
    "pool_closed": 503,
    "circuit_open": 503,
    "actor_gone": 503,
    "deadline_exceeded": 504,
    "config": 400,
}

_decode_options = make_decoder(AskOptions)


class CompletionRequest(Struct, frozen=True, kw_only=True):
    """A request, read and checked. `messages` are all of its messages."""

    messages: Sequence[Mapping[str, object]]
    options: AskOptions
    is_streamed: bool = False
    includes_usage: bool = False

    @property
    def system(self) -> str | None:
        """The text of the system messages at the front, if there are some; raises `BadRequestError` for what is none.

        It is that of a session, which has one text.
        """
        texts = [
            _text(message.get("content"), f"messages[{position}].content")
            for position, message in enumerate(self.messages[: self._first])
        ]
        return "\n\n".join(texts) if texts else None

    @property
    def _first(self) -> int:
        """The place of the first message behind the system messages at the front."""
        roles = (message.get("role") for message in self.messages)
        return next((place for place, role in enumerate(roles) if role not in SYSTEM_ROLES), len(self.messages))

    def newest(self) -> list[Mapping[str, object]]:
        """What a session has not heard yet: the messages behind the last answer, without its system message.

        Clients of this API send the whole conversation each time; the session has it already.
        """
        start = self._first
        for position, message in enumerate(self.messages):
            if message.get("role") == "assistant":
                start = position + 1
        return list(self.messages[start:])


def _text(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise _bad(f"{place}: the system message of a session must be text")
    return "".join(cast("list[str]", texts))


def read_request(body: bytes) -> CompletionRequest:
    """The request in a body; raises `BadRequestError` that names what is wrong."""
    try:
        fields = decode_json(body)
    except DecodeError as exc:
        raise _bad(f"the body is {exc.message}") from None
    if not isinstance(fields, dict):
        raise _bad("the body is no JSON object")
    messages = fields.pop("messages", None)
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise _bad("messages: must be a list of messages")
    if len(messages) > _MOST_MESSAGES:
        raise _bad(f"messages: at most {_MOST_MESSAGES} are allowed")
    for position, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise _bad(f"messages[{position}].role: must be a text")
    stream = fields.pop("stream", False)
    if not isinstance(stream, (bool, type(None))):
        raise _bad("stream: must be true or false")
    n = fields.get("n")
    if n is not None and n != 1:
        raise _bad("n: only one answer is given")
    stream_options = fields.get("stream_options")
    includes_usage = isinstance(stream_options, dict) and stream_options.get("include_usage") is True
    options = {name: value for name, value in fields.items() if name not in _PASSED_OVER}
    return CompletionRequest(
        messages=messages, options=_options(options), is_streamed=bool(stream), includes_usage=includes_usage
    )


def _options(fields: Mapping[str, object]) -> AskOptions:
    try:
        return cast("AskOptions", _decode_options(encode_json(fields)))
    except msgspec.ValidationError as exc:
        raise _bad(str(exc)) from None


def _bad(message: str) -> BadRequestError:
    return BadRequestError(message, status=400)


def completion_body(result: ChatResult[object], *, created: int) -> bytes:
    """The body of a whole reply."""
    choice = {
        "index": 0,
        "message": result.message,
        "finish_reason": result.finish_reason or "stop",
        "native_finish_reason": result.native_finish_reason,
        "logprobs": result.logprobs,
    }
    return encode_json(
        {
            "id": result.generation_id or "gen-unknown",
            "object": "chat.completion",
            "created": created,
            "model": result.model or "",
            "provider": result.provider,
            "choices": [choice],
            "usage": _usage(result),
        }
    )


def _usage(result: ChatResult[object]) -> object:
    """Tokens of the last call; the cost is that of the whole turn."""
    if result.usage is None:
        return None
    fields = msgspec.structs.asdict(result.usage)
    return {**fields, "cost": result.cost} if result.rounds else result.usage


def status_of(error: GorouterError) -> int:
    """The HTTP status that tells of an error."""
    if isinstance(error, ApiError):
        return error.status if 400 <= error.status < 600 else 502
    if isinstance(error, InvalidTokenError) and error.problem == "too_many_attempts":
        return 429
    return _STATUSES.get(error_info(error).code, 502)


def error_body(error: GorouterError, *, status: int) -> bytes:
    """The body that tells of an error, in the form of the API."""
    info = error_info(error)
    return encode_json({"error": {"code": status, "type": info.code, "message": info.message, "param": None}})


class CompletionStream:
    """Turns the events of one turn into server-sent events.

    Calls of tools that run here are not the client's affair: it sees those of the answer, which it has to run itself.
    """

    def __init__(self, request: CompletionRequest, *, created: int, own_tools: bool) -> None:
        self._includes_usage = request.includes_usage
        self._created = created
        # Where tools run here, whose calls they are is known with the answer only.
        self._holds_calls = own_tools
        self._model = str(request.options.model or "")
        self._id = "gen-unknown"
        self._is_begun = False

    def identify(self, generation_id: str | None) -> None:
        """The id of the answer, as far as it is known from the start."""
        self._id = generation_id or self._id

    def take(self, event: StreamEvent) -> bytes:
        """The server-sent events for one event; empty for what the API has no words for."""
        match event:
            case TextDelta(text):
                return self._delta({"content": text})
            case ReasoningDelta(text):
                return self._delta({"reasoning": text})
            case RefusalDelta(text):
                return self._delta({"refusal": text})
            case ToolCallDelta() if not self._holds_calls:
                return self._delta({"tool_calls": [_call_delta(event)]})
            case _:
                return b""

    def finish(self, result: ChatResult[object]) -> bytes:
        """The end of the stream."""
        self._id = result.generation_id or self._id
        self._model = result.model or self._model
        return b"".join(self._last(result)) + _DONE

    def _last(self, result: ChatResult[object]) -> Iterator[bytes]:
        calls = result.message.tool_calls
        if self._holds_calls and calls is not UNSET:
            for index, call in enumerate(calls):
                delta = ToolCallDelta(index, call.id, call.function.name, call.function.arguments)
                yield self._delta({"tool_calls": [_call_delta(delta)]})
        yield self._chunk([{"index": 0, "delta": {}, "finish_reason": result.finish_reason or "stop"}])
        if self._includes_usage:
            yield self._chunk([], usage=_usage(result))

    def fail(self, error: GorouterError) -> bytes:
        """An error after the head of the reply: it comes as an event, as the API has it."""
        body = decode_json(error_body(error, status=status_of(error)))
        return self._chunk([{"index": 0, "delta": {}, "finish_reason": "error"}], **cast("dict[str, object]", body))

    def _delta(self, delta: dict[str, object]) -> bytes:
        if not self._is_begun:
            self._is_begun = True
            delta = {"role": "assistant", **delta}
        return self._chunk([{"index": 0, "delta": delta, "finish_reason": None}])

    def _chunk(self, choices: list[dict[str, object]], **more: object) -> bytes:
        fields = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }
        return b"data: %b\n\n" % encode_json(fields)


def _call_delta(event: ToolCallDelta) -> dict[str, object]:
    function: dict[str, object] = {"arguments": event.arguments}
    delta: dict[str, object] = {"index": event.index, "function": function}
    if event.name:
        function["name"] = event.name
    if event.id:
        delta |= {"id": event.id, "type": "function"}
    return delta
