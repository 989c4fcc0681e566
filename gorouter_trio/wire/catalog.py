"""Replies of the service endpoints (openrouter API, "Models, pricing, endpoints" and "Other endpoints").

As in `wire.responses`, every field may be absent or null, and None then means unknown: null limits stay null.
Prices and amounts are `Decimal`, straight from the JSON text, in USD.
"""

from __future__ import annotations

from decimal import Decimal

from msgspec import Struct

__all__ = [
    "AliasTarget",
    "Architecture",
    "Benchmarks",
    "Credits",
    "EndpointPercentiles",
    "FreeModelRequests",
    "GenerationInfo",
    "KeyBudget",
    "KeyInfo",
    "Model",
    "ModelEndpoint",
    "ModelEndpoints",
    "ModelLinks",
    "ModelPage",
    "ModelReasoning",
    "PageLinks",
    "PerRequestLimits",
    "Pricing",
    "PricingOverride",
    "ProviderAttempt",
    "ProviderInfo",
    "RankedBenchmark",
    "ScoredBenchmark",
    "ToolChoiceSupport",
    "TopProvider",
]


class Architecture(Struct, frozen=True):
    """What goes in and out of a model."""

    modality: str | None = None
    input_modalities: list[str] | None = None
    output_modalities: list[str] | None = None
    tokenizer: str | None = None
    instruct_type: str | None = None


class PricingOverride(Struct, frozen=True, kw_only=True):
    """Prices that hold instead of the general ones while all of its conditions are met; a condition of None always is.

    `min_prompt_tokens` must be exceeded strictly. `utc_start` and `utc_end` are clock numbers (HHMM, 400 is 04:00) of a
    daily window in UTC without its end, which may reach over midnight; `utc_days` are names of days in lower case. A
    price of None is not overridden. Of several entries that apply, the later one wins, price by price.
    """

    min_prompt_tokens: int | None = None
    utc_start: int | None = None
    utc_end: int | None = None
    utc_days: list[str] | None = None
    prompt: Decimal | None = None
    completion: Decimal | None = None
    request: Decimal | None = None
    image: Decimal | None = None
    image_token: Decimal | None = None
    image_output: Decimal | None = None
    audio: Decimal | None = None
    audio_output: Decimal | None = None
    input_audio_cache: Decimal | None = None
    input_cache_read: Decimal | None = None
    input_cache_write: Decimal | None = None
    input_cache_write_1h: Decimal | None = None
    web_search: Decimal | None = None
    internal_reasoning: Decimal | None = None


class Pricing(Struct, frozen=True, kw_only=True):
    """USD per unit, before `discount`. -1 is a price that only the router knows; None is one that was not given.

    The unit is a token, except for `request` (a request), `image` (an input image), `image_output` (an output image)
    and `web_search` (a search). `image_token` is a token of an image, `internal_reasoning` a token of hidden reasoning.
    `input_cache_write` is the price for the usual, 5 minutes long cache. What is charged is a price times
    (1 - `discount`). A model is free when its id ends in `:free`, not because a price is zero.
    """

    prompt: Decimal | None = None
    completion: Decimal | None = None
    request: Decimal | None = None
    image: Decimal | None = None
    image_token: Decimal | None = None
    image_output: Decimal | None = None
    audio: Decimal | None = None
    audio_output: Decimal | None = None
    input_audio_cache: Decimal | None = None
    input_cache_read: Decimal | None = None
    input_cache_write: Decimal | None = None
    input_cache_write_1h: Decimal | None = None
    web_search: Decimal | None = None
    internal_reasoning: Decimal | None = None
    discount: Decimal | None = None
    overrides: list[PricingOverride] | None = None


class TopProvider(Struct, frozen=True):
    """Limits of the provider that serves the model by default."""

    context_length: int | None = None
    max_completion_tokens: int | None = None
    is_moderated: bool | None = None


class AliasTarget(Struct, frozen=True, kw_only=True):
    """The model that an alias such as `~author/family-latest` stands for now."""

    name: str | None = None
    slug: str | None = None


class PerRequestLimits(Struct, frozen=True, kw_only=True):
    """The most tokens that one request may have."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ModelLinks(Struct, frozen=True, kw_only=True):
    """`details` is the path of the model's endpoints."""

    details: str | None = None


class RankedBenchmark(Struct, frozen=True, kw_only=True):
    """A model's standing in one arena and category; `rank` 1 is the best."""

    arena: str | None = None
    category: str | None = None
    elo: float | None = None
    win_rate: float | None = None
    rank: int | None = None


class ScoredBenchmark(Struct, frozen=True, kw_only=True):
    """The indices of Artificial Analysis."""

    intelligence_index: float | None = None
    coding_index: float | None = None
    agentic_index: float | None = None


class Benchmarks(Struct, frozen=True, kw_only=True):
    """What third parties measured."""

    design_arena: list[RankedBenchmark] | None = None
    artificial_analysis: ScoredBenchmark | None = None


class ModelReasoning(Struct, frozen=True, kw_only=True):
    """How a model can be told to reason. `supported_efforts` of None admits all efforts."""

    mandatory: bool | None = None
    default_enabled: bool | None = None
    supports_max_tokens: bool | None = None
    supported_efforts: list[str | None] | None = None
    default_effort: str | None = None


class Model(Struct, frozen=True):
    """One row of GET /models. `created` is in seconds since the epoch, the other dates are ISO 8601 dates."""

    id: str
    name: str | None = None
    canonical_slug: str | None = None
    created: int | None = None
    description: str | None = None
    context_length: int | None = None
    architecture: Architecture | None = None
    pricing: Pricing | None = None
    top_provider: TopProvider | None = None
    supported_parameters: list[str] | None = None
    alias_target: AliasTarget | None = None
    hugging_face_id: str | None = None
    per_request_limits: PerRequestLimits | None = None
    default_parameters: dict[str, float | None] | None = None
    supported_voices: list[str] | None = None
    knowledge_cutoff: str | None = None
    expiration_date: str | None = None
    links: ModelLinks | None = None
    benchmarks: Benchmarks | None = None
    reasoning: ModelReasoning | None = None

    @property
    def is_free(self) -> bool:
        """Whether requests to it cost nothing: known by its id, since a price of zero may be that of a router."""
        return self.id.endswith(":free")


class PageLinks(Struct, frozen=True, kw_only=True):
    """`next` is the URL of the page after this one; None on the last."""

    next: str | None = None


class ModelPage(Struct, frozen=True):
    """A page of GET /models."""

    data: list[Model]
    total_count: int | None = None
    links: PageLinks | None = None


class EndpointPercentiles(Struct, frozen=True, kw_only=True):
    """Percentiles over the last 30 minutes."""

    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p99: float | None = None


class ToolChoiceSupport(Struct, frozen=True, kw_only=True):
    """Which forms of `tool_choice` an endpoint takes."""

    auto: bool | None = None
    none: bool | None = None
    required: bool | None = None
    function: bool | None = None


class ModelEndpoint(Struct, frozen=True, kw_only=True):
    """One provider's offer of a model. `tag` is what `provider.order` and its kin call it.

    `status` is 0 when it is well and negative when it is degraded. `uptime_*` are percentages. `latency_last_30m` is
    in milliseconds to the first token, `throughput_last_30m` in tokens a second; both are None without a key.
    """

    name: str | None = None
    tag: str | None = None
    provider_name: str | None = None
    model_id: str | None = None
    model_name: str | None = None
    context_length: int | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    pricing: Pricing | None = None
    quantization: str | None = None
    supported_parameters: list[str] | None = None
    status: int | None = None
    uptime_last_5m: float | None = None
    uptime_last_30m: float | None = None
    uptime_last_1d: float | None = None
    latency_last_30m: EndpointPercentiles | None = None
    throughput_last_30m: EndpointPercentiles | None = None
    supports_implicit_caching: bool | None = None
    supports_tool_choice: ToolChoiceSupport | None = None
    native_tools: dict[str, dict[str, object]] | None = None
    service_tier: str | None = None


class ModelEndpoints(Struct, frozen=True, kw_only=True):
    """A model and who offers it."""

    endpoints: list[ModelEndpoint]
    id: str | None = None
    name: str | None = None
    created: int | None = None
    description: str | None = None
    architecture: Architecture | None = None


class ProviderInfo(Struct, frozen=True, kw_only=True):
    """A provider behind the API; countries are two letters (ISO 3166-1)."""

    name: str
    slug: str | None = None
    privacy_policy_url: str | None = None
    terms_of_service_url: str | None = None
    status_page_url: str | None = None
    headquarters: str | None = None
    datacenters: list[str] | None = None


class Credits(Struct, frozen=True):
    """USD bought and USD spent, over the account's life."""

    total_credits: Decimal
    total_usage: Decimal

    @property
    def remaining(self) -> Decimal:
        """What is left; below zero, even free models are refused."""
        return self.total_credits - self.total_usage


class KeyBudget(Struct, frozen=True, kw_only=True):
    """A bound on spending that a key is under. `remaining_usd` of zero or less refuses requests until `resets_at`."""

    scope: str | None = None
    limit_usd: Decimal | None = None
    spend_usd: Decimal | None = None
    remaining_usd: Decimal | None = None
    reset_interval: str | None = None
    resets_at: str | None = None
    include_byok: bool | None = None
    budget_id: str | None = None
    guardrail_id: str | None = None


class FreeModelRequests(Struct, frozen=True, kw_only=True):
    """Requests to free models on this UTC day, of the whole account."""

    used: int | None = None
    limit: int | None = None
    remaining: int | None = None


class KeyInfo(Struct, frozen=True, kw_only=True):
    """The key in use; a `limit` of None means unlimited, not zero. Amounts are in USD, times are ISO 8601 in UTC."""

    label: str | None = None
    is_management_key: bool | None = None
    is_provisioning_key: bool | None = None
    limit: Decimal | None = None
    limit_reset: str | None = None
    limit_remaining: Decimal | None = None
    include_byok_in_limit: bool | None = None
    usage: Decimal | None = None
    usage_daily: Decimal | None = None
    usage_weekly: Decimal | None = None
    usage_monthly: Decimal | None = None
    byok_usage: Decimal | None = None
    byok_usage_daily: Decimal | None = None
    byok_usage_weekly: Decimal | None = None
    byok_usage_monthly: Decimal | None = None
    is_free_tier: bool | None = None
    expires_at: str | None = None
    creator_user_id: str | None = None
    organization_id: str | None = None
    workspace_id: str | None = None
    allowed_data_regions: list[str] | None = None
    free_model_daily_requests: FreeModelRequests | None = None
    budgets: list[KeyBudget] | None = None
    effective_budget: KeyBudget | None = None


class ProviderAttempt(Struct, frozen=True, kw_only=True):
    """One request that the API made to a provider for a generation; `latency` is in milliseconds."""

    provider_name: str | None = None
    status: int | None = None
    id: str | None = None
    endpoint_id: str | None = None
    model_permaslug: str | None = None
    latency: float | None = None
    is_byok: bool | None = None
    routed_service_tier: str | None = None


class GenerationInfo(Struct, frozen=True, kw_only=True):
    """What the API remembers of a generation: its true cost, also when its stream was cancelled or its reply lost.

    `latency`, `moderation_latency` and `generation_time` are in milliseconds. `usage` and `total_cost` are USD. Tokens
    called native are counted by the provider's tokenizer, which is what is billed.
    """

    id: str
    model: str | None = None
    provider_name: str | None = None
    created_at: str | None = None
    streamed: bool | None = None
    cancelled: bool | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    total_cost: Decimal | None = None
    usage: Decimal | None = None
    cache_discount: Decimal | None = None
    upstream_inference_cost: Decimal | None = None
    is_byok: bool | None = None
    tokens_prompt: int | None = None
    tokens_completion: int | None = None
    native_tokens_prompt: int | None = None
    native_tokens_completion: int | None = None
    native_tokens_completion_images: int | None = None
    native_tokens_reasoning: int | None = None
    native_tokens_cached: int | None = None
    num_media_prompt: int | None = None
    num_input_audio_prompt: int | None = None
    num_media_completion: int | None = None
    num_search_results: int | None = None
    num_fetches: int | None = None
    web_search_engine: str | None = None
    latency: float | None = None
    moderation_latency: float | None = None
    generation_time: float | None = None
    provider_responses: list[ProviderAttempt] | None = None
    service_tier: str | None = None
    api_type: str | None = None
    router: str | None = None
    origin: str | None = None
    app_id: int | None = None
    external_user: str | None = None
    user_agent: str | None = None
    http_referer: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    preset_id: str | None = None
    upstream_id: str | None = None
    response_cache_source_id: str | None = None
    data_region: str | None = None
    workspace_id: str | None = None
