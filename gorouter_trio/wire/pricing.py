"""What is a price and what is nonsense."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

from .catalog import Pricing, PricingOverride

__all__ = ["CONDITIONS", "PRICE_KINDS", "UNKNOWN_PRICE", "find_fault"]

CONDITIONS: Final = frozenset({"min_prompt_tokens", "utc_start", "utc_end", "utc_days"})
"""The fields of an override that are no prices."""
PRICE_KINDS: Final = tuple(name for name in PricingOverride.__struct_fields__ if name not in CONDITIONS)
"""The names of all prices."""
UNKNOWN_PRICE: Final = Decimal(-1)
"""What stands for a price that only the router knows."""

_TOO_MUCH: Final = Decimal(1_000)


def find_fault(pricing: Pricing) -> str | None:
    """Why these prices are nonsense, in a few words, or None: NaN, below zero, above 1,000 USD a unit, none at all."""
    for part in (pricing, *(pricing.overrides or ())):
        for kind in PRICE_KINDS:
            price: Decimal | None = getattr(part, kind)
            if price is not None and not _is_price(price):
                return f"{kind} is {price}"
    if pricing.prompt is None or pricing.completion is None:
        return "no price for the prompt or the completion"
    discount = pricing.discount
    if discount is not None and not (discount.is_finite() and 0 <= discount <= 1):
        return f"discount is {discount}"
    return None


def _is_price(price: Decimal) -> bool:
    return price.is_finite() and (0 <= price <= _TOO_MUCH or price == UNKNOWN_PRICE)
