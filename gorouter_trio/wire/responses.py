"""Replies of the API, decoded leniently (openrouter API, "Non-stream response").

Fields, enum values and types are added there without notice: unknown fields are ignored, every
enum is a plain string, and every field except a list entry may be absent or null. A field of
another type than here is dropped rather than the reply with it (`wire.salvage`).
Money is `Decimal`, straight from the JSON text.

Fields that are kept as raw JSON are `UNSET` when absent, and hold `null` when the wire has null:
msgspec reads a union of Raw and None as None alone.
"""

from __future__ import annotations

from decimal import Decimal

import msgspec
from msgspec import UNSET, Struct, UnsetType

__all__ = [
    "ChatCompletion",
    "Choice",
    "CompletionTokensDetails",
    "CostDetails",
    "ErrorBody",
    "Logprobs",
    "PromptTokensDetails",
    "ReplyFunction",
    "ReplyMessage",
    "ReplyToolCall",
    "RoutedAttempt",
    "RouterEndpoint",
    "RouterEndpoints",
    "RouterMetadata",
    "ServerToolUse",
    "TextChoice",
    "TextCompletion",
    "TokenAlternative",
    "TokenLogprob",
    "Usage",
]


class PromptTokensDetails(Struct, frozen=True, gc=False):
    """Parts of `prompt_tokens`."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None
    video_tokens: int | None = None


class CompletionTokensDetails(Struct, frozen=True, gc=False):
    """Parts of `completion_tokens`."""

    reasoning_tokens: int | None = None
    image_tokens: int | None = None
    audio_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class CostDetails(Struct, frozen=True, gc=False):
    """What the upstream provider charged, and what the API's own tools cost, in USD."""

    upstream_inference_cost: Decimal | None = None
    upstream_inference_prompt_cost: Decimal | None = None
    upstream_inference_completions_cost: Decimal | None = None
    server_tool_cost: Decimal | None = None


class ServerToolUse(Struct, frozen=True, gc=False):
    """How often the API's own tools ran."""

    web_search_requests: int | None = None
    tool_calls_requested: int | None = None
    tool_calls_executed: int | None = None


class Usage(Struct, frozen=True, gc=False):
    """Tokens by the provider's own tokenizer, and `cost`, the USD that was really charged.

    `completion_tokens` includes reasoning. None means that the reply did not say.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cost: Decimal | None = None
    is_byok: bool | None = None
    prompt_tokens_details: PromptTokensDetails | None = None
    cost_details: CostDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    server_tool_use_details: ServerToolUse | None = None


class ErrorBody(Struct, frozen=True):
    """The `error` object, wherever it appears; `code` is a number or a string on the wire.

    `type` and `error_type` stand there in the forms of other APIs, `name` where a query was refused.
    """

    message: str | None = None
    code: int | str | None = None
    metadata: dict[str, object] | None = None
    type: str | None = None
    error_type: str | None = None
    name: str | None = None
    availability: dict[str, object] | None = None


class TokenAlternative(Struct, frozen=True):
    """A token that could have come, with the logarithm of its probability; `bytes` are its UTF-8."""

    token: str = ""
    logprob: float | None = None
    bytes: list[int] | None = None


class TokenLogprob(Struct, frozen=True):
    """A token that came, with the logarithm of its probability, and the likeliest in its place."""

    token: str = ""
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: list[TokenAlternative] | None = None


class Logprobs(Struct, frozen=True):
    """Log probabilities of the answer's tokens, in order; of the refusal's, where it refused."""

    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


class RouterEndpoint(Struct, frozen=True, kw_only=True):
    """A provider that could have served the request."""

    provider: str | None = None
    model: str | None = None
    selected: bool | None = None


class RouterEndpoints(Struct, frozen=True, kw_only=True):
    """Those that could have served it."""

    total: int | None = None
    available: list[RouterEndpoint] | None = None


class RoutedAttempt(Struct, frozen=True, kw_only=True):
    """A provider that was tried, and the HTTP status that it answered."""

    provider: str | None = None
    model: str | None = None
    status: int | None = None


class RouterMetadata(Struct, frozen=True, kw_only=True):
    """How the API routed a request; sent with the request header `X-OpenRouter-Metadata: enabled`."""

    requested: str | None = None
    strategy: str | None = None
    region: str | None = None
    summary: str | None = None
    attempt: int | None = None
    is_byok: bool | None = None
    endpoints: RouterEndpoints | None = None
    attempts: list[RoutedAttempt] | None = None
    params: dict[str, object] | None = None
    pipeline: list[dict[str, object]] | None = None
    generation_time: int | None = None


class ReplyFunction(Struct, frozen=True):
    """A function as the reply names it; both fields may be null or missing."""

    name: str | None = None
    arguments: str | None = None


class ReplyToolCall(Struct, frozen=True):
    """A tool call, or in a stream a piece of one."""

    index: int | None = None
    id: str | None = None
    type: str | None = None
    function: ReplyFunction | None = None


class ReplyMessage(Struct, frozen=True):
    """The assistant's message as the reply has it; raw fields pin the body they were cut from."""

    content: str | list[msgspec.Raw] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_details: msgspec.Raw | UnsetType = UNSET
    tool_calls: list[ReplyToolCall] | None = None
    annotations: msgspec.Raw | UnsetType = UNSET
    images: msgspec.Raw | UnsetType = UNSET
    audio: msgspec.Raw | UnsetType = UNSET


class Choice(Struct, frozen=True):
    """The one choice; there is no `n` in this API."""

    message: ReplyMessage | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    index: int | None = None
    error: ErrorBody | None = None
    logprobs: Logprobs | None = None


class ChatCompletion(Struct, frozen=True):
    """A whole reply; `error` may stand in place of `choices`, with HTTP status 200."""

    id: str | None = None
    model: str | None = None
    provider: str | None = None
    created: int | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: ErrorBody | None = None
    openrouter_metadata: RouterMetadata | None = None
    alignment: msgspec.Raw | UnsetType = UNSET
    safeguard_results: msgspec.Raw | UnsetType = UNSET


class TextChoice(Struct, frozen=True):
    """The one choice of a reply of POST /completions."""

    text: str | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    index: int | None = None
    reasoning: str | None = None
    error: ErrorBody | None = None
    logprobs: msgspec.Raw | UnsetType = UNSET


class TextCompletion(Struct, frozen=True):
    """A reply of POST /completions, the endpoint from before chats; `error` may stand in place of `choices`."""

    id: str | None = None
    model: str | None = None
    provider: str | None = None
    created: int | None = None
    system_fingerprint: str | None = None
    service_tier: str | None = None
    choices: list[TextChoice] | None = None
    usage: Usage | None = None
    error: ErrorBody | None = None
