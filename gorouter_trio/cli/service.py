"""`gorouter-trio models`, `key` and `credits`: what the service says about itself and the account."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

from rich.table import Table

from .failures import FAILED, OK, report
from .options import CommonOptions, open_chosen_client
from .terminal import facts_table, format_cost, print_json, printable, show

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..wire.catalog import Credits, KeyInfo, Model

__all__ = ["run_credits", "run_key", "run_models"]

_MILLION = Decimal(1_000_000)


async def run_models(search: str | None, common: CommonOptions) -> int:
    """Print the models on offer, those with the words of `search` in their id or name if it is given."""
    async with open_chosen_client(common, max_connections=1) as client:
        models = await client.models()
    words = (search or "").lower().split()
    found = [m for m in models if all(word in f"{m.id} {m.name or ''}".lower() for word in words)]
    if common.json:
        print_json(found)
    elif found:
        show(_models_table(found))
    if not found:
        report(f"no model has {search!r} in its name" if search else "there are no models")
        return FAILED
    return OK


def _models_table(models: list[Model]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    table.add_column("context", justify="right", no_wrap=True)
    table.add_column("in, $/M", justify="right", no_wrap=True)
    table.add_column("out, $/M", justify="right", no_wrap=True)
    for model in sorted(models, key=lambda m: m.id):
        pricing = model.pricing
        context = "" if model.context_length is None else f"{model.context_length:,}"
        prices = (_per_million(price) for price in ((pricing.prompt, pricing.completion) if pricing else (None, None)))
        table.add_row(printable(model.id), context, *prices)
    return table


def _per_million(price: Decimal | None) -> str:
    if price is None or price < 0:
        return "varies"
    return "free" if price == 0 else f"{price * _MILLION:,.2f}"


async def run_key(common: CommonOptions) -> int:
    """Print the limits and the usage of the key in use."""
    async with open_chosen_client(common, max_connections=1) as client:
        key = await client.key()
    if common.json:
        print_json(key)
    else:
        show(facts_table("Key", _key_facts(key)))
    return OK


def _key_facts(key: KeyInfo) -> Iterator[tuple[str, str]]:
    reset = f", renewed {key.limit_reset}" if key.limit_reset else ""
    yield "label", printable(key.label or "")
    yield "limit", "none" if key.limit is None else format_cost(key.limit) + reset
    yield "left of it", "" if key.limit is None else format_cost(key.limit_remaining)
    yield "used", format_cost(key.usage)
    for name, usage in (("today", key.usage_daily), ("this week", key.usage_weekly), ("this month", key.usage_monthly)):
        yield name, "" if usage is None else format_cost(usage)
    yield "free tier", "" if key.is_free_tier is None else "yes" if key.is_free_tier else "no"
    yield "expires", key.expires_at or ""


async def run_credits(common: CommonOptions) -> int:
    """Print what was bought, used and is left."""
    async with open_chosen_client(common, max_connections=1) as client:
        balance = await client.credits()
    if common.json:
        print_json(balance)
    else:
        show(facts_table("Credits", _credit_facts(balance)))
    return OK


def _credit_facts(balance: Credits) -> Iterator[tuple[str, str]]:
    yield "bought", format_cost(balance.total_credits)
    yield "used", format_cost(balance.total_usage)
    yield "left", format_cost(balance.total_credits - balance.total_usage)
