"""The only place where this package turns values into JSON and back.

Encoding is done once: a message is encoded when it enters a history or a request, and a request
body is a join of encoded messages. Replies are decoded leniently, into `wire.responses`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import msgspec
from msgspec import UNSET, UnsetType

from ..errors import ApiError, BadRequestError, ConfigError, DecodeError, ProviderError
from .batch import ApiBatch, ApiBatchPage, OutputLine
from .catalog import (
    Credits,
    GenerationInfo,
    KeyInfo,
    Model,
    ModelEndpoint,
    ModelEndpoints,
    ModelPage,
    ProviderInfo,
)
from .embeddings import EmbeddingInput, EmbeddingKeywords, EmbeddingReply
from .faults import api_error, body_summary, error_from_reply
from .formcheck import check_embedding_form, check_form, check_headers, check_message
from .journal import AnswerDiscarded, LogEntry, TurnAnswered, TurnCalled
from .ledger import LedgerRow
from .mail import DEFAULT_SETTINGS, CallSettings
from .messages import (
    AssistantMessage,
    ContentPart,
    DeveloperMessage,
    FunctionCall,
    Message,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from .outline import LogOutline
from .requests import ChatKeywords, ChatOptions, ChatRequest
from .responses import (
    ChatCompletion,
    Choice,
    CompletionTokensDetails,
    CostDetails,
    ErrorBody,
    PromptTokensDetails,
    ReplyFunction,
    ReplyMessage,
    ReplyToolCall,
    ServerToolUse,
    TextCompletion,
    Usage,
)
from .result import CallRecord, ChatResult
from .salvage import Salvage, mend_text
from .stream import ChatChunk, ChunkChoice, Delta
from .toolcalls import ToolCallReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "Prompt",
    "add_system",
    "check_options",
    "checked_usage",
    "decode_api_batch",
    "decode_api_batch_page",
    "decode_chunk",
    "decode_chunks",
    "decode_completion",
    "decode_credits",
    "decode_embeddings",
    "decode_endpoint_list",
    "decode_endpoints",
    "decode_error",
    "decode_generation",
    "decode_json",
    "decode_key",
    "decode_ledger_row",
    "decode_log_entry",
    "decode_log_outline",
    "decode_message",
    "decode_messages",
    "decode_model",
    "decode_model_count",
    "decode_model_page",
    "decode_models",
    "decode_output_line",
    "decode_providers",
    "decode_reports",
    "decode_roles",
    "decode_text_completion",
    "encode_call",
    "encode_embeddings",
    "encode_json",
    "encode_message",
    "encode_name",
    "encode_options",
    "encode_prompt",
    "encode_request",
    "encode_text_prompt",
    "is_utf8",
    "join_body",
    "join_options",
    "keep_raw",
    "kept",
    "make_decoder",
    "render_body",
    "settings_of_whole",
    "split_list",
    "split_object",
    "to_chunk",
    "to_message",
    "to_tool_calls",
]

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

Prompt: TypeAlias = str | Message | Mapping[str, object] | Sequence[Message | Mapping[str, object]]
"""What a chat takes: the text of one user message, a message, or messages, each typed or a mapping in wire names."""


_Headers: TypeAlias = tuple[tuple[str, str], ...]


class _Role(msgspec.Struct, frozen=True):
    role: str = ""


def _late(kind: type[T]) -> Callable[[bytes | str | msgspec.Raw], T]:
    """A decoder that is made when it is first used: together they took a tenth of the time of our own import."""
    made: Callable[[bytes | str | msgspec.Raw], T] | None = None

    def decode(data: bytes | str | msgspec.Raw) -> T:
        nonlocal made
        if made is None:
            made = msgspec.json.Decoder(kind).decode
        return made(data)

    return decode


_encoder = msgspec.json.Encoder(decimal_format="number")
encode_json = _encoder.encode
"""Any value of this package as JSON bytes; Decimals as numbers."""

_decode_any = msgspec.json.Decoder().decode
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode
_split_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_split_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_completion = msgspec.json.Decoder(ChatCompletion).decode
_chunk_decoder = msgspec.json.Decoder(ChatChunk)
_decode_message = msgspec.json.Decoder(Message).decode
_decode_messages = msgspec.json.Decoder(list[Message]).decode
_decode_part = cast("Callable[[msgspec.Raw], ContentPart]", msgspec.json.Decoder(ContentPart).decode)
_decode_text_part = msgspec.json.Decoder(TextPart).decode
_decode_role = msgspec.json.Decoder(_Role).decode
_decode_roles = msgspec.json.Decoder(list[_Role]).decode
_decode_log_entry = msgspec.json.Decoder(LogEntry).decode
_decode_log_outline = msgspec.json.Decoder(LogOutline).decode
_decode_output_line = _late(OutputLine)
_decode_api_batch = _late(ApiBatch)
_decode_api_batch_page = _late(ApiBatchPage)
_decode_ledger_row = _late(LedgerRow)
_decode_reports = _late(list[ToolCallReport])
_LF = 10  # a number: looking for it takes an eighth of looking for bytes
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_FREE = Decimal(0)
_TOO_MUCH = Decimal(10) ** 12
_TOO_MANY = 10**12
_GENERATION_COUNTS = tuple(name for name in GenerationInfo.__struct_fields__ if "tokens_" in name)
_NO_DETAILS = CostDetails()
_NO_PROMPT_DETAILS = PromptTokensDetails()
_NO_COMPLETION_DETAILS = CompletionTokensDetails()
_NO_TOOL_USE = ServerToolUse()
_EMPTY = msgspec.Raw(b'""')
_WITH_CALL = (TurnAnswered, TurnCalled, AnswerDiscarded)
_NOT_JSON = (TypeError, ValueError, RecursionError, msgspec.DecodeError)
_SETTINGS = frozenset({"extra_headers", "lane", "tenant"})
# Options that are settings as well, besides those that `extra_body` may hold.
_KNOWN_OPTIONS = frozenset({"model", "models", "max_tokens", "max_completion_tokens", "extra_body"})
# Options where null says no more than their absence, to the API as here.
_NEVER_NULL = ("model", "models", "max_tokens", "max_completion_tokens")
# Two names of one option.
_BOUNDS = frozenset({"max_tokens", "max_completion_tokens"})
# What of `reasoning` says how much is to be thought, as `reasoning_effort` does.
_EFFORTS = frozenset({"effort", "max_tokens", "enabled"})
_LANES = ("interactive", "batch")
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_MESSAGES = frozenset({SystemMessage, DeveloperMessage, UserMessage, AssistantMessage, ToolMessage})


class _OptionKinds(msgspec.Struct, frozen=True):
    """The kind of JSON that each option takes: what a line of a file can get wrong."""

    model: str = ""
    models: list[str] = []
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    top_a: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, object] = {}
    structured_outputs: bool | None = None
    tools: list[dict[str, object]] = []
    tool_choice: str | dict[str, object] = ""
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, object] = {}
    reasoning_effort: str = ""
    include_reasoning: bool | None = None
    verbosity: str = ""
    prediction: dict[str, object] = {}
    modalities: list[str] = []
    image_config: dict[str, object] = {}
    audio: dict[str, object] = {}
    provider: dict[str, object] = {}
    plugins: list[dict[str, object]] = []
    transforms: list[str] = []
    route: str = ""
    service_tier: str = ""
    session_id: str = ""
    user: str = ""
    metadata: dict[str, str] = {}
    trace: dict[str, object] = {}
    cache_control: dict[str, object] = {}
    prompt_cache_key: str = ""
    prompt_cache_options: dict[str, object] = {}
    web_search_options: dict[str, object] = {}
    x_search_filter: dict[str, object] = {}
    stop_server_tools_when: list[dict[str, object]] = []
    deferred_tools: dict[str, object] = {}
    debug: dict[str, object] = {}


class _ErrorReply(msgspec.Struct, frozen=True):
    """The body of an error: that of this API, or of those that it speaks beside its own."""

    error: ErrorBody | str | None = None
    error_type: str | None = None
    request_id: str | None = None
    openrouter_metadata: dict[str, object] | None = None


class _ZodIssue(msgspec.Struct, frozen=True):
    """One complaint about a query, in the list that a refused query's message holds as JSON."""

    message: str = ""
    path: list[str | int] = []


class _CreditsReply(msgspec.Struct, frozen=True):
    data: Credits


class _KeyReply(msgspec.Struct, frozen=True):
    data: KeyInfo


class _ModelReply(msgspec.Struct, frozen=True):
    data: Model


class _Count(msgspec.Struct, frozen=True):
    count: int


class _CountReply(msgspec.Struct, frozen=True):
    data: _Count


class _EndpointsReply(msgspec.Struct, frozen=True):
    data: ModelEndpoints


class _EndpointListReply(msgspec.Struct, frozen=True):
    data: list[ModelEndpoint]


class _ProvidersReply(msgspec.Struct, frozen=True):
    data: list[ProviderInfo]


class _GenerationReply(msgspec.Struct, frozen=True):
    data: GenerationInfo


_decode_model_page = _late(ModelPage)
_decode_model_reply = _late(_ModelReply)
_decode_count_reply = _late(_CountReply)
_decode_endpoints_reply = _late(_EndpointsReply)
_decode_endpoint_list_reply = _late(_EndpointListReply)
_decode_providers_reply = _late(_ProvidersReply)
_decode_generation_reply = _late(_GenerationReply)
_decode_embedding_reply = _late(EmbeddingReply)
_decode_text_completion = _late(TextCompletion)
_decode_error_reply = _late(_ErrorReply)
_decode_zod_issues = _late(list[_ZodIssue])
_decode_credits_reply = _late(_CreditsReply)
_decode_key_reply = _late(_KeyReply)
_salvage = Salvage(lambda kind: msgspec.json.Decoder(kind).decode)


# Requests


def encode_prompt(prompt: Prompt) -> bytes:
    """A prompt as encoded messages, joined by commas.

    A string is one user message; mappings are sent as they are after a look at their role. Raises
    `BadRequestError` when there is no message or one is not a message.
    """
    if isinstance(prompt, str):
        try:
            return b'{"role":"user","content":' + encode_json(prompt) + b"}"
        except UnicodeEncodeError as exc:
            raise _bad_request(f"messages: cannot be written as JSON: {exc.reason}") from None
    if isinstance(prompt, msgspec.Struct) or _is_mapping(prompt):
        return encode_message(cast("Message | Mapping[str, object]", prompt))
    if not hasattr(prompt, "__iter__"):
        raise _bad_request(f"messages: a {type(prompt).__name__} is not a message")
    encoded = [encode_message(message) for message in cast("Sequence[Message | Mapping[str, object]]", prompt)]
    if not encoded:
        raise _bad_request("messages: a request needs at least one message")
    return b",".join(encoded)


def encode_message(message: Message | Mapping[str, object]) -> bytes:
    """One message as JSON bytes; raises `BadRequestError` when it is none, or its role is unknown."""
    if message.__class__ not in _MESSAGES:
        message = _checked_mapping(message)
    return _encode_given(message, "messages:")


def _encode_given(value: object, what: str) -> bytes:
    """What a caller gave, as JSON bytes; raises `BadRequestError` about `what` when it has no JSON."""
    try:
        encoded = encode_json(value)
        if b"null" in encoded:
            _refuse_endless(value)
        # A Decimal that is no number, and raw JSON that is none, are written as they are: nobody could read them again.
        if not is_utf8(_decode_raw(encoded)):
            raise _bad_request(f"{what} cannot be written as JSON: not UTF-8")
    except _NOT_JSON as exc:
        raise _bad_request(f"{what} cannot be written as JSON: {exc}") from exc
    return encoded


def add_system(system: bytes, messages: bytes) -> bytes:
    """Encoded messages with an encoded system message in front, unless they have one, or there is none to add."""
    if not system or _has_system(messages):
        return messages
    return b"%b,%b" % (system, messages)


def _has_system(messages: bytes) -> bool:
    if b'"system"' not in messages and b'"developer"' not in messages:
        return False
    return not {"system", "developer"}.isdisjoint(decode_roles(b"[%b]" % messages))


def encode_options(keywords: ChatKeywords) -> bytes:
    """The options of a request as one encoded JSON object; a model, models or a bound of None are not given.

    Raises `BadRequestError` for a value that is not JSON, and `TypeError` for an unknown name, as
    a call with an unknown keyword does.
    """
    fields = dict(cast("Mapping[str, object]", keywords))
    extra = _extra_body(fields.pop("extra_body", None))
    if "routing_id" in fields:
        fields["session_id"] = fields.pop("routing_id")
    _drop_nulls(fields)
    options = ChatOptions(**fields)  # type: ignore[arg-type]  # the TypedDict has checked them
    _refuse_numbers_without_json(fields)
    _refuse_numbers_without_json(extra)
    check_form({**fields, **extra})
    encoded = _encode_given(options, "the options")
    return join_options(encoded, _encode_given(extra, "the options")) if extra else encoded


def _extra_body(given: object) -> dict[str, object]:
    if given is None:
        return {}
    if not _is_mapping(given):
        raise _bad_request(f"extra_body: must be a mapping, not a {type(given).__name__}")
    extra = dict(cast("Mapping[str, object]", given))
    for name in ("messages", "stream"):
        if name in extra:
            raise _bad_request(f"extra_body: {name} is set by the call itself")
    _drop_nulls(extra)
    return extra


def _drop_nulls(fields: dict[str, object]) -> None:
    """Take out what is null where that says nothing: in a body it would hide the bound that a budget puts there."""
    for name in _NEVER_NULL:
        if name in fields and fields[name] is None:
            del fields[name]


def encode_call(keywords: ChatKeywords, *, beneath: CallSettings = DEFAULT_SETTINGS) -> tuple[bytes, CallSettings]:
    """The keyword arguments of a call: its options, encoded, and what is not part of the body.

    What is not given is as in `beneath`; headers are added to those there. Raises as `encode_options`,
    and `BadRequestError` for headers, a lane or a tenant that cannot be.
    """
    if _SETTINGS.isdisjoint(keywords):
        encoded = encode_options(keywords)
        return encoded, beneath if _KNOWN_OPTIONS.isdisjoint(keywords) else _settings_of(keywords, beneath)
    fields = dict(cast("Mapping[str, object]", keywords))
    lane = fields.pop("lane", beneath.lane)
    tenant = fields.pop("tenant", beneath.tenant)
    headers = _headers_above(beneath.headers, check_headers(fields.pop("extra_headers", None)))
    if lane not in _LANES:
        raise _bad_request(f"lane: must be one of {', '.join(_LANES)}, not {lane!r}")
    if not isinstance(tenant, str):
        raise _bad_request(f"tenant: must be a text, not a {type(tenant).__name__}")
    if _has_half_a_pair(tenant):
        # The ledger could not write what its requests cost.
        raise _bad_request("tenant: is not valid Unicode")
    settings = msgspec.structs.replace(beneath, headers=headers, lane=lane, tenant=tenant)
    encoded = encode_options(cast("ChatKeywords", fields))
    return encoded, _settings_of(fields, settings)


def _has_half_a_pair(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _headers_above(first: _Headers, second: _Headers) -> _Headers:
    """Headers of two levels as one; their names have no case."""
    return tuple({name.lower(): (name, value) for name, value in (*first, *second)}.values())


def _settings_of(options: Mapping[str, object], beneath: CallSettings) -> CallSettings:
    """`beneath` with the model and the bound on the completion that checked options name."""
    fields = dict(options)
    _drop_nulls(fields)
    fields = _above(fields, _extra_body(fields.get("extra_body")))
    model = fields.get("model")
    # Where one level says both, nobody knows which of them holds.
    bound = max((bound for name in _BOUNDS if isinstance(bound := fields.get(name), int)), default=None)
    others = fields.get("models")
    return msgspec.structs.replace(
        beneath,
        model=model if isinstance(model, str) else beneath.model,
        models=tuple(map(str, others)) if isinstance(others, (list, tuple)) else beneath.models,
        max_tokens=beneath.max_tokens if bound is None else bound,
    )


def settings_of_whole(options: Mapping[str, object], settings: CallSettings) -> CallSettings:
    """`settings` of a request with these options and no others: what they do not name, nothing beneath them does."""
    return _settings_of(options, msgspec.structs.replace(settings, model="", models=(), max_tokens=None))


def check_options(fields: Mapping[str, object]) -> None:
    """Raise `BadRequestError` that names a field of `fields`, in wire names, with a value of the wrong kind."""
    try:
        msgspec.convert(fields, _OptionKinds)
    except msgspec.ValidationError as exc:
        what, _, where = str(exc).rpartition(" - at `$.")
        raise _bad_request(f"{where.rstrip('`')}: {what}" if where else str(exc)) from exc


def encode_request(
    request: ChatRequest | Mapping[str, object],
    *,
    defaults: bytes = b"{}",
    system: bytes = b"",
    beneath: CallSettings = DEFAULT_SETTINGS,
) -> tuple[bytes, CallSettings]:
    """The body of a whole request, as a batch has it, and its settings.

    `defaults` are encoded options beneath its own, `beneath` are their settings, `system` is an encoded
    system message for requests that have none.

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
    _drop_nulls(fields)
    encoded = encode_prompt(cast("Prompt", list(cast("Sequence[Message]", messages))))
    _refuse_numbers_without_json(fields)
    check_form(fields)
    options = join_options(defaults, _encode_given(fields, "the request"))
    # In a body, an `extra_body` is a field like any other: what it says holds for nothing.
    settings = beneath if _KNOWN_OPTIONS.isdisjoint(fields) else _settings_of({**fields, "extra_body": None}, beneath)
    return render_body(options, add_system(system, encoded), streaming=False), settings


def encode_embeddings(
    given: EmbeddingInput, model: str, *, keywords: EmbeddingKeywords, beneath: CallSettings = DEFAULT_SETTINGS
) -> tuple[bytes, CallSettings]:
    """The body of POST /embeddings, and its settings.

    Raises `BadRequestError` when there is nothing to embed or a value is of the wrong kind, and `TypeError` for an
    unknown name.
    """
    fields = dict(cast("Mapping[str, object]", keywords))
    unknown = fields.keys() - EmbeddingKeywords.__annotations__.keys()
    if unknown:
        raise TypeError(f"there is no keyword {min(unknown)!r}; use extra_body for one that is newer than this package")
    extra = _extra_body(fields.pop("extra_body", None))
    headers = _headers_above(beneath.headers, check_headers(fields.pop("extra_headers", None)))
    if "routing_id" in fields:
        fields["session_id"] = fields.pop("routing_id")
    fields = {"model": model, "input": given, **fields, **extra}
    check_embedding_form(fields)
    body = _encode_given(fields, "the request")
    return body, msgspec.structs.replace(beneath, headers=headers, model=cast("str", fields["model"]), max_tokens=None)


def encode_text_prompt(prompt: object, options: bytes) -> bytes:
    """The body of POST /completions from its prompt and encoded options; raises `BadRequestError`."""
    if not isinstance(prompt, str) or not prompt:
        raise _bad_request(f"prompt: must be a text, and not empty, not {prompt!r:.200}")
    return join_options(options, _encode_given({"prompt": prompt}, "prompt:"))


def join_options(first: bytes, second: bytes) -> bytes:
    """Two encoded objects as one; where both have a name, `second` wins, and so it does with a bound of either name.

    The same holds for how much is to be thought, which has two names as well.
    """
    if first == b"{}" or second == b"{}":
        return second if first == b"{}" else first
    lower, upper = _split_object(first), _split_object(second)
    if b'"reasoning' in first and b'"reasoning' in second:
        _leave_one_effort(lower, upper)
    return encode_json(_above(lower, upper))


def _leave_one_effort(lower: dict[str, msgspec.Raw], upper: Mapping[str, msgspec.Raw]) -> None:
    """Take out of `lower` the effort that `upper` gives by its other name: the API refuses two that differ."""
    if not _EFFORTS.isdisjoint(_fields_of(upper.get("reasoning"))):
        lower.pop("reasoning_effort", None)
    beneath = _fields_of(lower.get("reasoning"))
    if "reasoning_effort" in upper and not _EFFORTS.isdisjoint(beneath):
        rest = {name: value for name, value in beneath.items() if name not in _EFFORTS}
        lower["reasoning"] = msgspec.Raw(encode_json(rest))


def _fields_of(raw: msgspec.Raw | None) -> dict[str, object]:
    value = None if raw is None else _decode_any(raw)
    return value if isinstance(value, dict) else {}


def _above(first: dict[str, T], second: dict[str, T]) -> dict[str, T]:
    """Options of two levels as one; a bound of the first would hold beside the other one that settings have."""
    if not _BOUNDS.isdisjoint(second):
        first = {name: value for name, value in first.items() if name not in _BOUNDS or name in second}
    return first | second


def render_body(options: bytes, messages: bytes, *, streaming: bool) -> bytes:
    """The body of a request from its encoded options and encoded messages."""
    head = options[:-1] + (b',"stream":true,' if streaming else b",") if options != b"{}" else b"{"
    if options == b"{}" and streaming:
        head = b'{"stream":true,'
    return b'%b"messages":[%b]}' % (head, messages)


def join_body(options: bytes, messages: Iterable[bytes | bytearray], *, streaming: bool) -> bytes:
    """The body of a request whose messages stand in several places, each encoded and joined by commas, or empty.

    What may be long, the history, is copied once.
    """
    parts: list[bytes | bytearray] = [options[:-1], b',"stream":true,"messages":[' if streaming else b',"messages":[']
    if options == b"{}":
        parts[1] = b'"stream":true,"messages":[' if streaming else b'"messages":['
    for piece in messages:
        if piece:
            parts += (piece, b",")
    parts[-1] = b"]}" if len(parts) > 2 else parts[-1] + b"]}"
    return b"".join(parts)


# Replies


def decode_completion(body: bytes, *, generation_id: str | None = None) -> ChatCompletion:
    """The reply in a 200 body, which has at least one choice with a message.

    Raises the error that the body carries: `ApiError` by its own code, `ProviderError` with code
    504 for a body of padding only (an upstream timeout that may have been billed) and with code 502
    for a reply that finished with an error nobody explains, `DecodeError` for anything that is not a
    reply. A message that came beside an error is in `partial`. Fields of an odd type are left out.
    """
    try:
        reply = _decode_completion(body)
    except _MALFORMED as exc:
        reply = _salvaged_reply(body, exc, generation_id=generation_id)
    choice = reply.choices[0] if reply.choices else None
    if reply.error is not None or (choice is not None and _is_failed(choice)):
        error = None if reply.error is None else _error_of(body) or reply.error
        raise _error_in_reply(reply, choice, error=error, generation_id=reply.id or generation_id)
    if choice is None or choice.message is None:
        raise _decode_error("the reply has no choices", generation_id=reply.id or generation_id)
    usage = reply.usage
    if usage is not None:
        checked = checked_usage(usage)
        if checked is not usage:
            return msgspec.structs.replace(reply, usage=checked)
    return reply


def checked_usage(usage: Usage) -> Usage:
    """`usage`, or a copy in which None stands for counts that no request has and for amounts that are no money.

    A provider's NaN, or its thousand-digit number, must reach neither a sum nor a store.
    """
    if _is_plausible(usage):
        return usage
    details = usage.cost_details
    return msgspec.structs.replace(
        usage,
        prompt_tokens_details=_without_odd_counts(usage.prompt_tokens_details),
        completion_tokens_details=_without_odd_counts(usage.completion_tokens_details),
        server_tool_use_details=_without_odd_counts(usage.server_tool_use_details),
        cost=usage.cost if _is_plausible(Usage(cost=usage.cost)) else None,
        cost_details=details if _is_plausible(Usage(cost_details=details)) else None,
        prompt_tokens=_count_or_none(usage.prompt_tokens),
        completion_tokens=_count_or_none(usage.completion_tokens),
        total_tokens=_count_or_none(usage.total_tokens),
    )


def _is_plausible(usage: Usage) -> bool:
    """Whether one request can have used that; every reply passes here, so it is one expression."""
    details = usage.cost_details or _NO_DETAILS
    prompt = usage.prompt_tokens_details or _NO_PROMPT_DETAILS
    completion = usage.completion_tokens_details or _NO_COMPLETION_DETAILS
    tools = usage.server_tool_use_details or _NO_TOOL_USE
    try:
        return (
            _FREE <= (usage.cost or _FREE) < _TOO_MUCH
            and _FREE <= (details.upstream_inference_cost or _FREE) < _TOO_MUCH
            and _FREE <= (details.upstream_inference_prompt_cost or _FREE) < _TOO_MUCH
            and _FREE <= (details.upstream_inference_completions_cost or _FREE) < _TOO_MUCH
            and _FREE <= (details.server_tool_cost or _FREE) < _TOO_MUCH
            and 0 <= (prompt.cached_tokens or 0) < _TOO_MANY
            and 0 <= (prompt.cache_write_tokens or 0) < _TOO_MANY
            and 0 <= (prompt.audio_tokens or 0) < _TOO_MANY
            and 0 <= (prompt.video_tokens or 0) < _TOO_MANY
            and 0 <= (completion.reasoning_tokens or 0) < _TOO_MANY
            and 0 <= (completion.image_tokens or 0) < _TOO_MANY
            and 0 <= (completion.audio_tokens or 0) < _TOO_MANY
            and 0 <= (completion.accepted_prediction_tokens or 0) < _TOO_MANY
            and 0 <= (completion.rejected_prediction_tokens or 0) < _TOO_MANY
            and 0 <= (usage.prompt_tokens or 0) < _TOO_MANY
            and 0 <= (usage.completion_tokens or 0) < _TOO_MANY
            and 0 <= (usage.total_tokens or 0) < _TOO_MANY
            and 0 <= (tools.web_search_requests or 0) < _TOO_MANY
            and 0 <= (tools.tool_calls_requested or 0) < _TOO_MANY
            and 0 <= (tools.tool_calls_executed or 0) < _TOO_MANY
        )
    except InvalidOperation:
        # NaN cannot be compared.
        return False


def to_message(reply: ReplyMessage) -> AssistantMessage:
    """The assistant message of a reply in the form that is kept and echoed; raw fields are copies."""
    content = reply.content
    return AssistantMessage(
        content=content if content is None or isinstance(content, str) else keep_raw(content),
        refusal=UNSET if reply.refusal is None else reply.refusal,
        reasoning=UNSET if reply.reasoning is None else reply.reasoning,
        reasoning_details=UNSET if reply.reasoning_details is UNSET else kept(reply.reasoning_details),
        annotations=UNSET if reply.annotations is UNSET else kept(reply.annotations),
        images=UNSET if reply.images is UNSET else kept(reply.images),
        audio=UNSET if reply.audio is UNSET else kept(reply.audio),
        tool_calls=to_tool_calls(reply.tool_calls),
    )


def keep_raw(pieces: list[msgspec.Raw]) -> list[msgspec.Raw]:
    """Copies of raw JSON, which do not pin what it was cut from.

    The decoder does not look into raw JSON, so pieces that are not UTF-8 are found here and left out:
    echoed, they would spoil every later request.
    """
    return [piece.copy() for piece in pieces if is_utf8(piece)]


def kept(raw: msgspec.Raw | UnsetType) -> msgspec.Raw | UnsetType:
    """A copy of a field of raw JSON, if it is there and text; null is the same as absent."""
    if raw is UNSET or bytes(raw) == b"null" or not is_utf8(raw):
        return UNSET
    return raw.copy()


def encode_name(what: str, name: object) -> bytes:
    """The bytes of what a session or a turn is called by.

    Raises `ConfigError`, which begins with `what`, for what is no text, empty, or no Unicode: it can be neither stored
    nor found again.
    """
    if not isinstance(name, str):
        raise ConfigError(f"{what} must be a text that is not empty, not {name!r}; str() makes it one")
    if not name:
        raise ConfigError(f"{what} must be a text that is not empty")
    try:
        return name.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{what} is not valid Unicode: {exc.reason}") from exc


def is_utf8(raw: msgspec.Raw) -> bool:
    """Whether raw JSON is text at all."""
    try:
        str(raw, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def to_chunk(reply: ChatCompletion) -> ChatChunk:
    """A whole reply as the one chunk of a stream."""
    choice = (reply.choices or [Choice()])[0]
    message = choice.message or ReplyMessage()
    delta = Delta(
        content=message.content,
        reasoning=message.reasoning,
        reasoning_details=_pieces(message.reasoning_details),
        tool_calls=message.tool_calls,
        refusal=message.refusal,
        annotations=_pieces(message.annotations),
        images=_pieces(message.images),
        audio=message.audio,
    )
    return ChatChunk(
        choices=[ChunkChoice(delta, choice.finish_reason or "stop", choice.native_finish_reason, choice.logprobs)],
        id=reply.id,
        model=reply.model,
        provider=reply.provider,
        usage=reply.usage,
        created=reply.created,
        service_tier=reply.service_tier,
        system_fingerprint=reply.system_fingerprint,
        openrouter_metadata=reply.openrouter_metadata,
        alignment=reply.alignment,
        safeguard_results=reply.safeguard_results,
    )


def to_tool_calls(calls: list[ReplyToolCall] | None) -> list[ToolCall] | UnsetType:
    """The calls of a reply in the form that a request echoes.

    Each has an id of its own: results are matched by it, so an id that is missing or comes twice
    is replaced by one made from its position.
    """
    if not calls:
        return UNSET
    taken: set[str] = set()
    return [_to_tool_call(call, position, taken=taken) for position, call in enumerate(calls)]


def _to_tool_call(call: ReplyToolCall, position: int, *, taken: set[str]) -> ToolCall:
    function = call.function or ReplyFunction()
    identity = call.id or f"call_{position}"
    while identity in taken:
        identity = f"{identity}_{position}"
    taken.add(identity)
    return ToolCall(
        id=identity,
        type=call.type or "function",
        function=FunctionCall(function.name or "", function.arguments or ""),
    )


def decode_chunk(data: bytes) -> ChatChunk:
    """One chunk of a stream, without fields of an odd type; raises `DecodeError`."""
    try:
        return _chunk_decoder.decode(data)
    except _MALFORMED as exc:
        try:
            return _salvaged(ChatChunk, data, exc)
        except _MALFORMED:
            raise _decode_error(f"a chunk of the stream is not what the API promises: {exc}") from exc


def decode_chunks(events: list[bytes]) -> tuple[list[ChatChunk], DecodeError | None]:
    """The chunks before the first event that is none, and the error which that event is.

    Events without data are passed over.
    """
    if len(events) == 1 and _LF not in events[0]:
        # What is malformed is looked at again below.
        try:
            return [_chunk_decoder.decode(events[0])], None
        except _MALFORMED:
            pass
    chunks: list[ChatChunk] = []
    # One event may hold two lines, or none: what is not one line and one chunk an event is looked at again.
    # (Joining to look for a line end is a sixth of the cost of counting them.)
    if _LF not in b"".join(events):
        try:
            chunks = _chunk_decoder.decode_lines(b"\n".join(events))
        except _MALFORMED:
            chunks = []
    if len(chunks) == len(events):
        return chunks, None
    chunks = []
    for event in events:
        if event and not event.isspace():
            try:
                chunks.append(decode_chunk(event))
            except DecodeError as error:
                return chunks, error
    return chunks, None


def decode_model_page(body: bytes) -> ModelPage:
    """A page of GET /models and its kin, without rows that have no id; raises as `decode_completion` does."""
    return _finite(_service(ModelPage, _decode_model_page, body=body))


def decode_models(body: bytes) -> list[Model]:
    """The rows of such a page."""
    return decode_model_page(body).data


def decode_model(body: bytes) -> Model:
    """GET /model/{author}/{slug}, out of its `data` envelope as all that follow; raises as `decode_completion` does."""
    return _finite(_service(_ModelReply, _decode_model_reply, body=body).data)


def decode_model_count(body: bytes) -> int:
    """GET /models/count."""
    return _service(_CountReply, _decode_count_reply, body=body).data.count


def decode_endpoints(body: bytes) -> ModelEndpoints:
    """GET /models/{author}/{slug}/endpoints."""
    return _finite(_service(_EndpointsReply, _decode_endpoints_reply, body=body).data)


def decode_endpoint_list(body: bytes) -> list[ModelEndpoint]:
    """GET /endpoints/zdr."""
    return _finite(_service(_EndpointListReply, _decode_endpoint_list_reply, body=body)).data


def decode_providers(body: bytes) -> list[ProviderInfo]:
    """GET /providers."""
    return _service(_ProvidersReply, _decode_providers_reply, body=body).data


def decode_generation(body: bytes) -> GenerationInfo:
    """GET /generation, with None for amounts that are no money and counts that no request has, as in a reply."""
    info = _finite(_service(_GenerationReply, _decode_generation_reply, body=body).data)
    odd: dict[str, None] = {}
    for name in ("total_cost", "usage", "upstream_inference_cost"):
        amount: Decimal | None = getattr(info, name)
        if amount is not None and not _FREE <= amount < _TOO_MUCH:
            odd[name] = None
    for name in _GENERATION_COUNTS:
        count: int | None = getattr(info, name)
        if count != _count_or_none(count):
            odd[name] = None
    return msgspec.structs.replace(info, **odd) if odd else info


def decode_credits(body: bytes) -> Credits:
    """GET /credits."""
    credit = _service(_CreditsReply, _decode_credits_reply, body=body).data
    if not (credit.total_credits.is_finite() and credit.total_usage.is_finite()):
        raise _decode_error("the credits are not numbers")
    return credit


def decode_key(body: bytes) -> KeyInfo:
    """GET /key."""
    return _finite(_service(_KeyReply, _decode_key_reply, body=body).data)


def decode_embeddings(body: bytes) -> EmbeddingReply:
    """POST /embeddings, whose `data` is there and in the order of the inputs; raises as `decode_completion` does."""
    reply = _service(EmbeddingReply, _decode_embedding_reply, body=body)
    if reply.error is not None:
        raise api_error(reply.error, status=200, generation_id=reply.id)
    if reply.data is None:
        raise _decode_error("the reply has no embeddings", generation_id=reply.id)
    ordered = sorted(reply.data, key=lambda embedding: embedding.index or 0)
    usage = None if reply.usage is None else checked_usage(reply.usage)
    return msgspec.structs.replace(reply, data=ordered, usage=usage)


def decode_text_completion(body: bytes) -> TextCompletion:
    """POST /completions, which has at least one choice; raises as `decode_completion` does."""
    reply = _service(TextCompletion, _decode_text_completion, body=body)
    choice = reply.choices[0] if reply.choices else None
    error = reply.error or (choice.error if choice is not None else None)
    if error is not None:
        raise api_error(error, status=200, generation_id=reply.id)
    if choice is None:
        raise _decode_error("the reply has no choices", generation_id=reply.id)
    if choice.finish_reason == "error":
        raise api_error(_unsaid(choice.native_finish_reason), status=200, generation_id=reply.id)
    usage = None if reply.usage is None else checked_usage(reply.usage)
    return msgspec.structs.replace(reply, usage=usage)


def decode_error(status: int, headers: Sequence[tuple[bytes, bytes]], *, body: bytes, now_s: float) -> ApiError:
    """The error that a reply outside 2xx stands for, whatever its body is: JSON, HTML or nothing.

    `now_s` is wall-clock seconds since the epoch, for a Retry-After that is a date.
    """
    error = _error_of(body) or ErrorBody(message=body_summary(body))
    return error_from_reply(status, headers, error=error, now_s=now_s)


# Stored values


def decode_message(data: bytes) -> Message:
    """A message that was encoded by `encode_message`; raises `DecodeError`.

    What a mapping had that is newer than this package does not make it unreadable: parts of another kind
    stay raw JSON, calls without an id or a name get one as in a reply, other fields are left out.
    """
    try:
        return cast("Message", _decode_message(data))
    except _MALFORMED:
        return _stored(_newer_message, data)


def decode_messages(joined: bytes) -> list[Message]:
    """Messages that were joined by `encode_prompt`, each as by `decode_message`; raises `DecodeError`."""
    listed = b"[%b]" % joined
    try:
        return _decode_messages(listed)
    except _MALFORMED:
        return [decode_message(bytes(raw)) for raw in _stored(_split_list, listed)]


def _newer_message(data: bytes) -> Message:
    fields = _split_object(data)
    role = _decode_role(data).role
    if role == "assistant":
        message = to_message(_salvage.decode(ReplyMessage, data))
        return msgspec.structs.replace(message, name=_named(fields))
    if role not in _ROLES or "content" not in fields:
        raise msgspec.ValidationError(f"a message of role {role!r}, or one without content")
    content, name = fields["content"], _named(fields)
    match role:
        case "system":
            return SystemMessage(_read_content(content, _decode_text_part), name)
        case "developer":
            return DeveloperMessage(_read_content(content, _decode_text_part), name)
        case "user":
            return UserMessage(_read_content(content, _decode_part), name)
        case _:
            call_id = fields.get("tool_call_id", _EMPTY)
            return ToolMessage(str(_decode_any(call_id)), _read_content(content, _decode_part), name)


def _named(fields: Mapping[str, msgspec.Raw]) -> str | UnsetType:
    name = _decode_any(fields["name"]) if "name" in fields else None
    return name if isinstance(name, str) else UNSET


def _read_content(raw: msgspec.Raw, decode: Callable[[msgspec.Raw], T]) -> str | list[T | msgspec.Raw]:
    """A content with its parts, those of a kind that is not known as they are."""
    if bytes(raw)[:1] == b'"':
        return str(_decode_any(raw))
    parts: list[T | msgspec.Raw] = []
    for part in _split_list(raw):
        try:
            parts.append(decode(part))
        except _MALFORMED:
            parts.append(part.copy())
    return parts


def decode_log_entry(data: bytes) -> LogEntry:
    """An entry of a session's log; raises `DecodeError`. Its raw fields pin `data`.

    Counts that no request has are None, as in a reply: older versions have stored them.
    """
    entry = cast("LogEntry", _stored(_decode_log_entry, data))
    if isinstance(entry, _WITH_CALL) and entry.call.usage is not None:
        usage = checked_usage(entry.call.usage)
        if usage is not entry.call.usage:
            return msgspec.structs.replace(entry, call=msgspec.structs.replace(entry.call, usage=usage))
    return entry


def decode_log_outline(data: bytes) -> LogOutline:
    """What can be counted in an entry of a session's log, whatever its tag; raises `DecodeError`."""
    return _stored(_decode_log_outline, data)


def decode_reports(data: bytes) -> list[ToolCallReport]:
    """What became of the calls of a round, as a session's log has it; raises `DecodeError`."""
    return _stored(_decode_reports, data)


def decode_ledger_row(data: bytes) -> LedgerRow:
    """A row of a ledger file; raises `DecodeError`."""
    return _stored(_decode_ledger_row, data)


def decode_output_line(data: bytes) -> OutputLine:
    """A line of a batch's output; raises `DecodeError`."""
    return _stored(_decode_output_line, data)


def decode_api_batch(body: bytes) -> ApiBatch:
    """The object of POST /batches and GET /batches/{id}."""
    return _service(ApiBatch, _decode_api_batch, body=body)


def decode_api_batch_page(body: bytes) -> ApiBatchPage:
    """GET /batches."""
    return _service(ApiBatchPage, _decode_api_batch_page, body=body)


def decode_roles(data: bytes) -> list[str]:
    """The roles in an encoded list of messages, whatever else is in them; raises `DecodeError`."""
    return [message.role for message in _stored(_decode_roles, data)]


def decode_json(data: bytes | str) -> object:
    """Any JSON value; raises `DecodeError`."""
    try:
        return cast("object", _decode_any(data))
    except _MALFORMED as exc:
        raise DecodeError(f"not JSON: {exc}") from exc


def split_list(data: bytes | msgspec.Raw) -> list[msgspec.Raw]:
    """The items of a JSON list, each as raw JSON, which pins `data`; raises `DecodeError`."""
    try:
        return _split_list(data)
    except _MALFORMED as exc:
        raise DecodeError(f"not a JSON list: {exc}") from exc


def make_decoder(
    kind: object, *, hook: Callable[[object, object], object] | None = None
) -> Callable[[bytes | str], object]:
    """A strict decoder of any type; `hook` is msgspec's `dec_hook`. Raises msgspec's own errors."""
    return msgspec.json.Decoder(kind, dec_hook=hook).decode


def split_object(data: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, each as raw JSON, which pins `data`; raises `DecodeError`."""
    try:
        return _split_object(data)
    except _MALFORMED as exc:
        raise DecodeError(f"not a JSON object: {exc}") from exc


def _stored(decode: Callable[[bytes], T], data: bytes) -> T:
    try:
        return decode(data)
    except _MALFORMED as exc:
        raise DecodeError(f"a stored value cannot be read: {exc}") from exc


# Parts of the above


def _salvaged(kind: type[S], data: bytes, exc: Exception) -> S:
    """What can be had of data that the decoder refused with `exc`; raises an error of `_MALFORMED`."""
    mended = mend_text(data)
    if mended is data and not isinstance(exc, msgspec.ValidationError):
        raise exc
    return _salvage.decode(kind, mended)


def _service(kind: type[S], decode: Callable[[bytes], S], *, body: bytes) -> S:
    try:
        return decode(body)
    except _MALFORMED as exc:
        with suppress(*_MALFORMED):
            return _salvaged(kind, body, exc)
        raise _failed_reply(body, exc, generation_id=None) from exc


def _salvaged_reply(body: bytes, exc: Exception, *, generation_id: str | None) -> ChatCompletion:
    with suppress(*_MALFORMED):
        return _salvaged(ChatCompletion, body, exc)
    raise _failed_reply(body, exc, generation_id=generation_id) from exc


def _failed_reply(body: bytes, exc: Exception, *, generation_id: str | None) -> ApiError | DecodeError:
    """What a 200 stands for whose body is not the reply: the error in it, an upstream timeout, or nothing known."""
    error = _error_of(body)
    if error is not None:
        return api_error(error, status=200, generation_id=generation_id)
    if body.strip():
        return _decode_error(f"the reply is not what the API promises: {exc}", generation_id=generation_id)
    timeout = ProviderError(
        "the reply is empty: the provider timed out", status=200, code=504, generation_id=generation_id
    )
    timeout.maybe_billed = True
    return timeout


def _is_failed(choice: Choice) -> bool:
    return choice.error is not None or choice.finish_reason == "error"


def _error_in_reply(
    reply: ChatCompletion, choice: Choice | None, *, error: ErrorBody | None, generation_id: str | None
) -> ApiError:
    body = error
    if body is None and choice is not None:
        body = choice.error or _unsaid(choice.native_finish_reason)
    made = api_error(body or ErrorBody(), status=200, generation_id=generation_id)
    message = None if choice is None else choice.message
    if choice is not None and message is not None and (message.content or message.reasoning or message.tool_calls):
        call = CallRecord(
            generation_id=generation_id,
            model=reply.model,
            provider=reply.provider,
            finish_reason=choice.finish_reason,
            native_finish_reason=choice.native_finish_reason,
            usage=None if reply.usage is None else checked_usage(reply.usage),
            interrupted=True,
        )
        made.partial = ChatResult(message=to_message(message), call=call)
    return made


def _unsaid(native_finish_reason: str | None) -> ErrorBody:
    """The error of a reply that ended with one and does not say which."""
    native = native_finish_reason or "no reason given"
    return ErrorBody(message=f"the provider ended the reply with an error ({native})", code=502)


def _error_of(body: bytes) -> ErrorBody | None:
    """The error object of a body, if it has one, with what stands beside it."""
    try:
        reply = _decode_error_reply(body)
    except _MALFORMED as exc:
        try:
            reply = _salvaged(_ErrorReply, body, exc)
        except _MALFORMED:
            return None
    error = reply.error
    if error is None:
        return None
    if isinstance(error, str):
        error = ErrorBody(message=error)
    if error.name == "ZodError":
        error = msgspec.structs.replace(error, message=_zod_message(error.message or ""))
    beside = {"request_id": reply.request_id, "openrouter_metadata": reply.openrouter_metadata}
    beside = {name: value for name, value in beside.items() if value is not None}
    return msgspec.structs.replace(
        error,
        error_type=error.error_type or reply.error_type,
        metadata={**beside, **(error.metadata or {})} if beside else error.metadata,
    )


def _zod_message(text: str) -> str:
    """What was wrong with a query, a clause for each complaint, instead of a list in JSON."""
    try:
        issues = _decode_zod_issues(text)
    except _MALFORMED:
        return text
    clauses = [
        f"{'.'.join(map(str, issue.path))}: {issue.message}" if issue.path else issue.message for issue in issues
    ]
    return "; ".join(clauses) or text


def _finite(value: S) -> S:
    """The same with None, unknown, for amounts that are NaN or infinite: msgspec takes those from texts."""
    odd: dict[str, object] = {}
    for name in value.__struct_fields__:
        old = getattr(value, name)
        new = _finite_field(old)
        if new is not old:
            odd[name] = new
    return msgspec.structs.replace(value, **odd) if odd else value


def _finite_field(value: object) -> object:
    if isinstance(value, Decimal):
        return value if value.is_finite() else None
    if isinstance(value, msgspec.Struct):
        return _finite(value)
    if isinstance(value, list) and value and isinstance(value[0], msgspec.Struct):
        checked = [_finite(item) for item in value]
        return checked if any(new is not old for new, old in zip(checked, value, strict=True)) else value
    return value


def _count_or_none(count: int | None) -> int | None:
    return count if count is not None and 0 <= count < _TOO_MANY else None


def _without_odd_counts(counts: S | None) -> S | None:
    """The same with None for counts that no request has."""
    if counts is None:
        return None
    checked = {name: _count_or_none(value) for name, value in msgspec.structs.asdict(counts).items()}
    return msgspec.structs.replace(counts, **checked)


def _pieces(raw: msgspec.Raw | UnsetType) -> list[msgspec.Raw] | None:
    """The entries of a list kept as raw JSON; None for anything else."""
    if raw is UNSET:
        return None
    try:
        return _split_list(raw)
    except _MALFORMED:
        return None


def _checked_mapping(message: object) -> dict[str, object]:
    if not _is_mapping(message):
        raise _bad_request(f"messages: a {type(message).__name__} is not a message")
    fields = dict(cast("Mapping[str, object]", message))
    role = fields.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _bad_request(f"messages: unknown role {role!r}; use one of {', '.join(sorted(_ROLES))}")
    check_message(fields)
    return fields


def _refuse_numbers_without_json(fields: Mapping[str, object]) -> None:
    """NaN and the infinities, which JSON cannot say: a float would silently become null, a Decimal break the body."""
    for name, value in fields.items():
        if isinstance(value, (float, Decimal)) and not math.isfinite(value):
            raise _bad_request(f"{name}: {value} is not a number that can be sent")


def _refuse_endless(value: object) -> None:
    """Raise `ValueError` for a NaN or an infinity anywhere in a value, which is written as null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a number that can be sent")
        return
    if isinstance(value, msgspec.Struct):
        parts: Iterable[object] = msgspec.structs.asdict(value).values()
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = value
    else:
        return
    for part in parts:
        _refuse_endless(part)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def _bad_request(message: str) -> BadRequestError:
    return BadRequestError(message, status=400)


def _decode_error(message: str, *, generation_id: str | None = None) -> DecodeError:
    error = DecodeError(message)
    error.generation_id = generation_id
    error.maybe_billed = True
    return error
