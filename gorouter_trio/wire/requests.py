"""What a chat request carries besides its messages (openrouter API, POST /chat/completions).

`ChatOptions` is the value, `ChatKeywords` the same fields as keyword arguments of `client.chat` and
its kin. A field left at `UNSET` is not sent and the provider's own default applies; null and zero
are sent as they are, but for `model`, `models` and the bounds on the completion, where None is as
good as nothing. What is an object of its own has a type in `wire.preferences`, and a mapping in
wire names is as good. Fields newer than this package go through `extra_body`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, TypedDict

from msgspec import UNSET, Struct, UnsetType

from .messages import CacheControl, Message
from .preferences import (
    AudioOutput,
    DebugOptions,
    Plugin,
    Prediction,
    PromptCacheOptions,
    ProviderPreferences,
    ReasoningOptions,
    ResponseFormat,
    Tool,
    ToolChoice,
    TraceOptions,
    WebSearchOptions,
)

__all__ = ["AskKeywords", "ChatKeywords", "ChatOptions", "ChatRequest", "JsonObject"]

JsonObject: TypeAlias = Mapping[str, object]
"""An object in wire names, sent as it is."""


class ChatOptions(Struct, frozen=True, kw_only=True):
    """Every field of a request except `messages` and `stream`, in wire names.

    `max_completion_tokens` counts tokens including reasoning. `models` are fallbacks that the API
    tries in order. `session_id` is the API's sticky-routing id, called `routing_id` in this package.
    """

    model: str | UnsetType = UNSET
    models: Sequence[str] | UnsetType = UNSET
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
    stop: str | Sequence[str] | None | UnsetType = UNSET
    logit_bias: Mapping[str, float] | None | UnsetType = UNSET
    logprobs: bool | None | UnsetType = UNSET
    top_logprobs: int | None | UnsetType = UNSET
    response_format: ResponseFormat | JsonObject | UnsetType = UNSET
    structured_outputs: bool | UnsetType = UNSET
    tools: Sequence[Tool | JsonObject] | UnsetType = UNSET
    tool_choice: ToolChoice | JsonObject | UnsetType = UNSET
    parallel_tool_calls: bool | None | UnsetType = UNSET
    reasoning: ReasoningOptions | JsonObject | UnsetType = UNSET
    reasoning_effort: str | UnsetType = UNSET
    include_reasoning: bool | UnsetType = UNSET
    verbosity: str | UnsetType = UNSET
    prediction: Prediction | JsonObject | UnsetType = UNSET
    modalities: Sequence[str] | UnsetType = UNSET
    image_config: JsonObject | UnsetType = UNSET
    audio: AudioOutput | JsonObject | UnsetType = UNSET
    provider: ProviderPreferences | JsonObject | UnsetType = UNSET
    plugins: Sequence[Plugin | JsonObject] | UnsetType = UNSET
    transforms: Sequence[str] | UnsetType = UNSET
    route: str | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    session_id: str | UnsetType = UNSET
    user: str | UnsetType = UNSET
    metadata: Mapping[str, str] | UnsetType = UNSET
    trace: TraceOptions | JsonObject | UnsetType = UNSET
    cache_control: CacheControl | JsonObject | UnsetType = UNSET
    prompt_cache_key: str | UnsetType = UNSET
    prompt_cache_options: PromptCacheOptions | JsonObject | UnsetType = UNSET
    web_search_options: WebSearchOptions | JsonObject | UnsetType = UNSET
    stop_server_tools_when: Sequence[JsonObject] | UnsetType = UNSET
    deferred_tools: JsonObject | UnsetType = UNSET
    debug: DebugOptions | JsonObject | UnsetType = UNSET


class ChatRequest(ChatOptions, frozen=True, kw_only=True):
    """A whole request as a value, for batches.

    `custom_id` names it in the output; it is not sent.
    """

    messages: Sequence[Message | JsonObject]
    custom_id: str | UnsetType = UNSET


class AskKeywords(TypedDict, total=False):
    """The keyword arguments of `client.ask`; see `ChatOptions`. They are those of a chat without the API's `user`.

    `tools` may be functions, which are run here, or definitions. `extra_body` adds fields as they are, and wins over
    the named ones. `extra_headers` adds request
    headers. `lane` is the queue of the pool that the request waits in, `tenant` whose request it is.
    """

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
    response_format: ResponseFormat | JsonObject
    structured_outputs: bool
    tools: Sequence[Tool | JsonObject | Callable[..., object]]
    tool_choice: ToolChoice | JsonObject
    parallel_tool_calls: bool | None
    reasoning: ReasoningOptions | JsonObject
    reasoning_effort: str
    include_reasoning: bool
    verbosity: str
    prediction: Prediction | JsonObject
    modalities: Sequence[str]
    image_config: JsonObject
    audio: AudioOutput | JsonObject
    provider: ProviderPreferences | JsonObject
    plugins: Sequence[Plugin | JsonObject]
    transforms: Sequence[str]
    route: str
    service_tier: str
    routing_id: str
    metadata: Mapping[str, str]
    trace: TraceOptions | JsonObject
    cache_control: CacheControl | JsonObject
    prompt_cache_key: str
    prompt_cache_options: PromptCacheOptions | JsonObject
    web_search_options: WebSearchOptions | JsonObject
    stop_server_tools_when: Sequence[JsonObject]
    deferred_tools: JsonObject
    debug: DebugOptions | JsonObject
    extra_body: JsonObject
    extra_headers: Mapping[str, str]
    lane: Literal["interactive", "batch"]
    tenant: str


class ChatKeywords(AskKeywords, total=False):
    """The keyword arguments of a chat; see `AskKeywords`. `user` is the API's name for an end user."""

    user: str
