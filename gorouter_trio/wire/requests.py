"""What a chat request carries besides its messages (openrouter API, POST /chat/completions).

`ChatOptions` is the value, `ChatKeywords` the same fields as keyword arguments of `client.chat` and
its kin. A field left at `UNSET` is not sent and the provider's own default applies; null and zero
are sent as they are. Fields newer than this package go through `extra_body`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from msgspec import UNSET, Struct, UnsetType

from .messages import Message

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ChatKeywords", "ChatOptions", "ChatRequest"]


class ChatOptions(Struct, frozen=True, kw_only=True):
    """Every field of a request except `messages` and `stream`, in wire names.

    `max_completion_tokens` counts tokens including reasoning. `models` are fallbacks that the API
    tries in order. `session_id` is the API's sticky-routing id, called `routing_id` in this package.
    """

    model: str | UnsetType = UNSET
    models: list[str] | UnsetType = UNSET
    max_completion_tokens: int | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    temperature: float | None | UnsetType = UNSET
    top_p: float | None | UnsetType = UNSET
    top_k: int | None | UnsetType = UNSET
    min_p: float | None | UnsetType = UNSET
    top_a: float | None | UnsetType = UNSET
    frequency_penalty: float | None | UnsetType = UNSET
    presence_penalty: float | None | UnsetType = UNSET
    repetition_penalty: float | None | UnsetType = UNSET
    seed: int | None | UnsetType = UNSET
    stop: str | list[str] | None | UnsetType = UNSET
    logit_bias: dict[str, float] | None | UnsetType = UNSET
    logprobs: bool | None | UnsetType = UNSET
    top_logprobs: int | None | UnsetType = UNSET
    response_format: dict[str, object] | UnsetType = UNSET
    tools: list[dict[str, object]] | UnsetType = UNSET
    tool_choice: str | dict[str, object] | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    reasoning: dict[str, object] | UnsetType = UNSET
    reasoning_effort: str | UnsetType = UNSET
    verbosity: str | UnsetType = UNSET
    modalities: list[str] | UnsetType = UNSET
    provider: dict[str, object] | UnsetType = UNSET
    plugins: list[dict[str, object]] | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    session_id: str | UnsetType = UNSET
    user: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    cache_control: dict[str, object] | UnsetType = UNSET


class ChatRequest(ChatOptions, frozen=True, kw_only=True):
    """A whole request as a value, for batches.

    `custom_id` names it in the output; it is not sent.
    """

    messages: list[Message]
    custom_id: str | UnsetType = UNSET


class ChatKeywords(TypedDict, total=False):
    """The keyword arguments of a chat; see `ChatOptions`. `extra_body` adds fields as they are."""

    model: str
    models: Sequence[str]
    max_completion_tokens: int
    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    top_a: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logit_bias: Mapping[str, float] | None
    logprobs: bool | None
    top_logprobs: int | None
    response_format: Mapping[str, object]
    tools: Sequence[Mapping[str, object]]
    tool_choice: str | Mapping[str, object]
    parallel_tool_calls: bool | None
    reasoning: Mapping[str, object]
    reasoning_effort: str
    verbosity: str
    modalities: Sequence[str]
    provider: Mapping[str, object]
    plugins: Sequence[Mapping[str, object]]
    service_tier: str
    routing_id: str
    user: str
    metadata: Mapping[str, str]
    cache_control: Mapping[str, object]
    extra_body: Mapping[str, object]
