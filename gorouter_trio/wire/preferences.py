"""Options of a request that are objects of their own: routing, reasoning, output form, plugins.

All are frozen values in wire names, with the meaning that the API gives them (openrouter API, POST
/chat/completions). A field left at `UNSET` is not sent. Where the API grows faster than this page,
a mapping goes everywhere that one of these goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from msgspec import UNSET, Struct, UnsetType

from .messages import CacheControl, TextPart

__all__ = [
    "AudioOutput",
    "AutoRouterPlugin",
    "ContextCompressionPlugin",
    "DebugOptions",
    "FileParserPlugin",
    "FunctionChoice",
    "FunctionSpec",
    "FunctionTool",
    "GrammarFormat",
    "JsonObjectFormat",
    "JsonSchema",
    "JsonSchemaFormat",
    "MaxPrice",
    "ModerationPlugin",
    "NamedToolChoice",
    "PdfOptions",
    "Percentiles",
    "Plugin",
    "Prediction",
    "PromptCacheOptions",
    "ProviderPreferences",
    "ProviderSort",
    "ReasoningOptions",
    "ResponseFormat",
    "ResponseHealingPlugin",
    "ServerTool",
    "TextFormat",
    "Tool",
    "ToolChoice",
    "TraceOptions",
    "WebFetchPlugin",
    "WebPlugin",
    "WebSearchOptions",
]


class ProviderSort(Struct, frozen=True, kw_only=True):
    """Order endpoints `by` price, throughput, latency or exacto, across models (`partition` none) or within each."""

    by: str
    partition: Literal["model", "none"] | UnsetType = UNSET


class Percentiles(Struct, frozen=True, kw_only=True):
    """Thresholds by percentile: tokens per second, or seconds."""

    p50: float | UnsetType = UNSET
    p75: float | UnsetType = UNSET
    p90: float | UnsetType = UNSET
    p99: float | UnsetType = UNSET


class MaxPrice(Struct, frozen=True, kw_only=True):
    """Hard ceilings: USD per million tokens for prompt and completion, USD per unit for the rest."""

    prompt: float | str | UnsetType = UNSET
    completion: float | str | UnsetType = UNSET
    image: float | str | UnsetType = UNSET
    audio: float | str | UnsetType = UNSET
    request: float | str | UnsetType = UNSET


class ProviderPreferences(Struct, frozen=True, kw_only=True):
    """Which providers may serve a request, and in what order.

    A base slug such as `deepinfra` stands for all endpoints of a provider, `deepinfra/turbo` for
    one. `order`, `only` and `ignore` take slugs; `sort` turns load balancing off; `max_price` is a
    hard ceiling, the preferred throughput and latency are not.
    """

    order: Sequence[str] | UnsetType = UNSET
    only: Sequence[str] | UnsetType = UNSET
    ignore: Sequence[str] | UnsetType = UNSET
    allow_fallbacks: bool | UnsetType = UNSET
    require_parameters: bool | UnsetType = UNSET
    data_collection: Literal["allow", "deny"] | UnsetType = UNSET
    zdr: bool | UnsetType = UNSET
    enforce_distillable_text: bool | UnsetType = UNSET
    quantizations: Sequence[str] | UnsetType = UNSET
    sort: str | ProviderSort | UnsetType = UNSET
    preferred_min_throughput: float | Percentiles | UnsetType = UNSET
    preferred_max_latency: float | Percentiles | UnsetType = UNSET
    max_price: MaxPrice | UnsetType = UNSET
    options: Mapping[str, Mapping[str, object]] | UnsetType = UNSET


class ReasoningOptions(Struct, frozen=True, kw_only=True):
    """How much a model thinks, and what of it comes back.

    `effort` is max, xhigh, high, medium, low, minimal or none; `max_tokens` is a budget in tokens and
    stands instead of it. `exclude` thinks without returning it.
    """

    effort: str | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    exclude: bool | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET
    summary: str | UnsetType = UNSET
    context: str | UnsetType = UNSET
    mode: str | UnsetType = UNSET


class TextFormat(Struct, frozen=True, tag_field="type", tag="text"):
    """Plain text."""


class JsonObjectFormat(Struct, frozen=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchema(Struct, frozen=True, kw_only=True):
    """A named JSON schema; `name` is at most 64 letters, digits, `_` and `-`."""

    name: str
    schema: Mapping[str, object] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET
    description: str | UnsetType = UNSET


class JsonSchemaFormat(Struct, frozen=True, tag_field="type", tag="json_schema"):
    """JSON that obeys a schema."""

    json_schema: JsonSchema


class GrammarFormat(Struct, frozen=True, tag_field="type", tag="grammar"):
    """Text that obeys a grammar."""

    grammar: str


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat | GrammarFormat


class FunctionSpec(Struct, frozen=True, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | UnsetType = UNSET
    parameters: Mapping[str, object] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET
    defer_loading: bool | UnsetType = UNSET


class FunctionTool(Struct, frozen=True, tag_field="type", tag="function"):
    """A tool that the caller runs."""

    function: FunctionSpec
    cache_control: CacheControl | UnsetType = UNSET


class ServerTool(Struct, frozen=True, kw_only=True):
    """A tool that runs at the API: `type` is `openrouter:web_search` and its kin."""

    type: str
    parameters: Mapping[str, object] | UnsetType = UNSET


Tool: TypeAlias = FunctionTool | ServerTool


class FunctionChoice(Struct, frozen=True):
    """The function to call."""

    name: str


class NamedToolChoice(Struct, frozen=True, tag_field="type", tag="function"):
    """The model must call this function."""

    function: FunctionChoice


ToolChoice: TypeAlias = str | NamedToolChoice
"""`none`, `auto`, `required`, or one function."""


class WebPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="web"):
    """Web search before the model answers."""

    enabled: bool | UnsetType = UNSET
    engine: str | UnsetType = UNSET
    mode: str | UnsetType = UNSET
    max_results: int | UnsetType = UNSET
    max_uses: int | UnsetType = UNSET
    search_prompt: str | UnsetType = UNSET
    include_domains: Sequence[str] | UnsetType = UNSET
    exclude_domains: Sequence[str] | UnsetType = UNSET
    user_location: Mapping[str, object] | UnsetType = UNSET


class WebFetchPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="web-fetch"):
    """Fetching pages before the model answers."""

    allowed_domains: Sequence[str] | UnsetType = UNSET
    blocked_domains: Sequence[str] | UnsetType = UNSET
    max_content_tokens: int | UnsetType = UNSET
    max_uses: int | UnsetType = UNSET


class PdfOptions(Struct, frozen=True, kw_only=True):
    """The engine that reads PDFs: mistral-ocr, native or cloudflare-ai."""

    engine: str | UnsetType = UNSET


class FileParserPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="file-parser"):
    """How files are read."""

    enabled: bool | UnsetType = UNSET
    pdf: PdfOptions | UnsetType = UNSET


class ResponseHealingPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="response-healing"):
    """Repair broken JSON in replies that are not streamed."""

    enabled: bool | UnsetType = UNSET


class ContextCompressionPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="context-compression"):
    """Drop the middle of prompts that are too long; on by default for small contexts."""

    enabled: bool | UnsetType = UNSET
    engine: str | UnsetType = UNSET


class ModerationPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="moderation"):
    """Moderate the input."""


class AutoRouterPlugin(Struct, frozen=True, kw_only=True, tag_field="id", tag="auto-router"):
    """Which models `openrouter/auto` may choose."""

    enabled: bool | UnsetType = UNSET
    allowed_models: Sequence[str] | UnsetType = UNSET
    excluded_models: Sequence[str] | UnsetType = UNSET
    cost_tier: str | UnsetType = UNSET
    pin_model: bool | UnsetType = UNSET


Plugin: TypeAlias = (
    WebPlugin
    | WebFetchPlugin
    | FileParserPlugin
    | ResponseHealingPlugin
    | ContextCompressionPlugin
    | ModerationPlugin
    | AutoRouterPlugin
)


class Prediction(Struct, frozen=True, tag_field="type", tag="content"):
    """Text that the answer will largely repeat."""

    content: str | Sequence[TextPart]


class PromptCacheOptions(Struct, frozen=True, kw_only=True):
    """Prompt caching of OpenAI models: `mode` "explicit", `ttl` "30m" or "12h"."""

    mode: str | UnsetType = UNSET
    ttl: str | UnsetType = UNSET


class AudioOutput(Struct, frozen=True, kw_only=True):
    """Spoken output; works in streams only."""

    voice: str
    format: str


class TraceOptions(Struct, frozen=True, kw_only=True):
    """Names for the API's broadcast destinations."""

    trace_id: str | UnsetType = UNSET
    trace_name: str | UnsetType = UNSET
    span_name: str | UnsetType = UNSET
    generation_name: str | UnsetType = UNSET
    parent_span_id: str | UnsetType = UNSET


class WebSearchOptions(Struct, frozen=True, kw_only=True):
    """How much of what was found goes into the context: low, medium or high."""

    search_context_size: str | UnsetType = UNSET


class DebugOptions(Struct, frozen=True, kw_only=True):
    """What a stream's first chunk echoes."""

    echo_upstream_body: bool = True
