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
    "PromptTokensDetails",
    "ReplyFunction",
    "ReplyMessage",
    "ReplyToolCall",
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


class CostDetails(Struct, frozen=True, gc=False):
    """What the upstream provider charged, in USD."""

    upstream_inference_cost: Decimal | None = None
    upstream_inference_prompt_cost: Decimal | None = None
    upstream_inference_completions_cost: Decimal | None = None


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


class ErrorBody(Struct, frozen=True):
    """The `error` object, wherever it appears; `code` is a number or a string on the wire."""

    message: str | None = None
    code: int | str | None = None
    metadata: dict[str, object] | None = None


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
