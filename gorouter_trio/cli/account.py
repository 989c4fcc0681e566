"""`gorouter-trio key` and `credits`: what the service says about the account."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from .failures import OK
from .options import CommonOptions, open_chosen_client
from .terminal import facts_table, format_cost, print_json, printable, show

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from ..client import Client
    from ..wire.catalog import Credits, KeyBudget, KeyInfo

__all__ = ["run_credits", "run_key"]

T = TypeVar("T")


async def run_key(common: CommonOptions) -> int:
    """Print the limits and the usage of the key in use."""
    return await _run("Key", common, ask=lambda client: client.key(), facts=_key_facts)


async def run_credits(common: CommonOptions) -> int:
    """Print what was bought, used and is left."""
    return await _run("Credits", common, ask=lambda client: client.credits(), facts=_credit_facts)


async def _run(
    title: str,
    common: CommonOptions,
    *,
    ask: Callable[[Client], Awaitable[T]],
    facts: Callable[[T], Iterator[tuple[str, str]]],
) -> int:
    async with open_chosen_client(common, max_connections=1) as client:
        answer = await ask(client)
    if common.json:
        print_json(answer)
    else:
        show(facts_table(title, facts(answer)))
    return OK


def _key_facts(key: KeyInfo) -> Iterator[tuple[str, str]]:
    reset = f", renewed {printable(key.limit_reset)}" if key.limit_reset else ""
    yield "label", printable(key.label or "")
    yield "limit", "none" if key.limit is None else format_cost(key.limit) + reset
    yield "left of it", "" if key.limit is None else format_cost(key.limit_remaining)
    yield "used", format_cost(key.usage)
    for name, usage in (("today", key.usage_daily), ("this week", key.usage_weekly), ("this month", key.usage_monthly)):
        yield name, "" if usage is None else format_cost(usage)
    if key.effective_budget is not None:
        yield "budget", _budget_fact(key.effective_budget)
    free = key.free_model_daily_requests
    if free is not None and free.used is not None and free.limit is not None:
        yield "free requests", f"{free.used:,} of {free.limit:,} today"
    yield "free tier", "" if key.is_free_tier is None else "yes" if key.is_free_tier else "no"
    yield "expires", printable(key.expires_at or "")


def _budget_fact(budget: KeyBudget) -> str:
    parts = [f"{format_cost(budget.remaining_usd)} of {format_cost(budget.limit_usd)} left"]
    parts += [f"of the {printable(budget.scope)}"] if budget.scope else []
    parts += [f"renewed {printable(budget.resets_at)}"] if budget.resets_at else []
    return ", ".join(parts)


def _credit_facts(balance: Credits) -> Iterator[tuple[str, str]]:
    yield "bought", format_cost(balance.total_credits)
    yield "used", format_cost(balance.total_usage)
    yield "left", format_cost(balance.remaining)
