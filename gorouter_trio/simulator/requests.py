"""Chat requests as the simulator reads them: types of its own, lenient where the API is, and the API's refusals."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec
from msgspec import Struct

from . import _json, _tokens
from .faults import ErrorReply, bad_request

__all__ = [
    "CALL_TOKENS",
    "CalledFunction",
    "ChatRequest",
    "JsonSchema",
    "Message",
    "OfferedFunction",
    "Part",
    "Plugin",
    "Reading",
    "Reasoning",
    "ResponseFormat",
    "Tool",
    "ToolCall",
    "ToolChoice",
    "parse_chat",
]

_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool"})
_MAX_FALLBACKS: Final = 3
_MAX_STOPS: Final = 4
_MAX_LOGPROBS: Final = 20
_MESSAGE_TOKENS: Final = 4
_IMAGE_TOKENS: Final = 85
CALL_TOKENS: Final = 6
"""What a tool call or an offered tool counts for, besides its text."""
_NOTHING: Final = msgspec.Raw(b"null")


class Part(Struct):
    """A piece of a message; only text is read, the other kinds are counted."""

    type: str = "text"
    text: str | None = None


class CalledFunction(Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCall(Struct):
    id: str | None = None
    function: CalledFunction | None = None


class Message(Struct):
    role: str
    content: str | list[Part] | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None

    @property
    def text(self) -> str:
        """The text of the message, its parts joined by line ends."""
        if isinstance(self.content, list):
            return "\n".join([part.text for part in self.content if part.text])
        return self.content or ""

    @property
    def other_parts(self) -> int:
        """How many images, files and the like it has."""
        return sum(part.type != "text" for part in self.content) if isinstance(self.content, list) else 0


class OfferedFunction(Struct):
    name: str
    parameters: msgspec.Raw = _NOTHING


class Tool(Struct):
    type: str = "function"
    function: OfferedFunction | None = None


class ToolChoice(Struct):
    type: str = "function"
    function: CalledFunction | None = None


class JsonSchema(Struct):
    name: str = ""
    schema: msgspec.Raw = _NOTHING
    strict: bool | None = None


class ResponseFormat(Struct):
    type: str = "text"
    json_schema: JsonSchema | None = None


class Reasoning(Struct):
    effort: str | None = None
    max_tokens: int | None = None
    exclude: bool | None = None
    enabled: bool | None = None


class Plugin(Struct):
    id: str = ""
    enabled: bool | None = None


class ChatRequest(Struct):
    """The fields of a chat request that the simulator acts on; all others are accepted and ignored."""

    model: str | None = None
    models: list[str] | None = None
    messages: list[Message] | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: list[str] | None = None
    plugins: list[Plugin] | None = None

    @property
    def conversation(self) -> list[Message]:
        """The messages; `parse_chat` lets none through without any."""
        return self.messages or []

    @property
    def stops(self) -> list[str]:
        """The stop sequences."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """The limit on completion tokens, reasoning included."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def functions(self) -> dict[str, OfferedFunction]:
        """The offered functions by name; server tools are left out."""
        return {tool.function.name: tool.function for tool in self.tools or () if tool.function is not None}

    def read(self, seed: int, model: str) -> Reading:
        """Go through the conversation once, for all that has to be known of it."""
        prompt = ""
        tokens = 0
        parts = [str(seed), model, str(self.seed), str(self.temperature), str(self.top_p)]
        for message in self.conversation:
            text = message.text
            if message.role == "user":
                prompt = text
            parts += (message.role, text)
            tokens += _tokens.count(text) + _MESSAGE_TOKENS + _IMAGE_TOKENS * message.other_parts
            for call in message.tool_calls or ():
                arguments = (call.function and call.function.arguments) or ""
                parts.append(arguments)
                tokens += CALL_TOKENS + _tokens.count(arguments)
        for name, function in self.functions.items() if self.tools else ():
            parts.append(name)
            tokens += CALL_TOKENS + len(bytes(function.parameters)) // 4
        if self.response_format is not None:
            parts.append(self.response_format.type)
        key = "\x1f".join(parts).encode("utf-8", "surrogatepass")
        return Reading(prompt, tokens, hashlib.blake2b(key, digest_size=16).digest())


class Reading(Struct, frozen=True, gc=False):
    """What a conversation comes to."""

    prompt: str
    """What the user said last."""
    tokens: int
    """Prompt tokens: those of the texts, some for each message, image and offered tool."""
    digest: bytes
    """What the reply depends on: the simulator's seed, the model, the messages, and what shapes an answer.

    Neither the order of JSON fields nor limits, stop sequences and streaming matter: those cut or carry the same
    answer. Equal requests have equal digests on every machine.
    """


_decoder: Final = _json.decoder(ChatRequest)


def parse_chat(body: bytes) -> ChatRequest | ErrorReply:
    """Read a request body, or say what the API would say about it."""
    try:
        request = _decoder(body)
    except msgspec.ValidationError as exc:
        return bad_request(f"Invalid request: {exc}", error_type="invalid_request")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return bad_request("Input must have at least 1 token.")
    return _find_fault(request) or request


def _find_fault(request: ChatRequest) -> ErrorReply | None:
    if request.messages is None:
        return bad_request('Input required: specify "prompt" or "messages"')
    if not request.messages:
        return bad_request("Input must have at least 1 token.")
    if len(request.models or ()) > _MAX_FALLBACKS:
        return bad_request(f"'models' array must have {_MAX_FALLBACKS} items or fewer.")
    for message in request.messages:
        if message.role not in _ROLES:
            return _invalid(f"messages: unknown role {message.role!r}")
    if request.limit is not None and request.limit < 1:
        return _invalid("max_tokens must be at least 1")
    if request.temperature is not None and not 0 <= request.temperature <= 2:
        return _invalid("temperature must be 0 to 2")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= _MAX_LOGPROBS:
        return _invalid(f"top_logprobs must be 0 to {_MAX_LOGPROBS}")
    if "audio" in (request.modalities or ()) and not request.stream:
        return bad_request("Audio output requires stream: true")
    if len(request.stops) > _MAX_STOPS:
        return _invalid(f"stop takes at most {_MAX_STOPS} sequences")
    return _find_tool_fault(request)


def _find_tool_fault(request: ChatRequest) -> ErrorReply | None:
    choice = request.tool_choice
    if isinstance(choice, ToolChoice):
        name = choice.function.name if choice.function is not None else None
        if name is not None and name not in request.functions:
            return _invalid(f"tool_choice names {name!r}, which is not among the tools")
    elif choice == "required" and not request.functions:
        return _invalid("tool_choice is required, but there are no tools")
    return None


def _invalid(reason: str) -> ErrorReply:
    return bad_request(f"Invalid request: {reason}", error_type="invalid_request")
