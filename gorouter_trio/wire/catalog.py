"""Replies of the service endpoints (openrouter API, "Models, pricing, endpoints" and "Other endpoints")."""

from __future__ import annotations

from decimal import Decimal

from msgspec import Struct

__all__ = ["Architecture", "Credits", "KeyInfo", "Model", "Pricing", "TopProvider"]


class Architecture(Struct, frozen=True):
    """What goes in and out of a model."""

    modality: str | None = None
    input_modalities: list[str] | None = None
    output_modalities: list[str] | None = None
    tokenizer: str | None = None
    instruct_type: str | None = None


class Pricing(Struct, frozen=True):
    """USD per unit, the unit being a token unless the name says otherwise; -1 means unknown."""

    prompt: Decimal | None = None
    completion: Decimal | None = None
    request: Decimal | None = None
    image: Decimal | None = None
    input_cache_read: Decimal | None = None
    input_cache_write: Decimal | None = None
    web_search: Decimal | None = None
    internal_reasoning: Decimal | None = None


class TopProvider(Struct, frozen=True):
    """Limits of the provider that serves the model by default."""

    context_length: int | None = None
    max_completion_tokens: int | None = None
    is_moderated: bool | None = None


class Model(Struct, frozen=True):
    """One row of GET /models."""

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


class Credits(Struct, frozen=True):
    """USD bought and USD spent, over the account's life; the remainder is their difference."""

    total_credits: Decimal
    total_usage: Decimal


class KeyInfo(Struct, frozen=True):
    """The key in use; a `limit` of None means unlimited, not zero."""

    label: str | None = None
    limit: Decimal | None = None
    limit_remaining: Decimal | None = None
    limit_reset: str | None = None
    usage: Decimal | None = None
    usage_daily: Decimal | None = None
    usage_weekly: Decimal | None = None
    usage_monthly: Decimal | None = None
    is_free_tier: bool | None = None
    expires_at: str | None = None
