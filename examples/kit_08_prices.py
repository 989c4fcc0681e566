# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 8: prices, and what everything cost.

python examples/kit_08_prices.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client


async def main() -> None:
    """Prices are fetched in the background by default; here it is done by hand."""
    async with open_example_client() as client:
        refreshed = await client.refresh_prices()
        client.start_price_refresh(6 * 3600)
        await client.chat("Hello!")
        snapshot = client.cost_snapshot()
        print(f"{refreshed.models} prices; total {snapshot.cost_usd} USD, {snapshot.total_tokens} tokens")
        price = client.price("openai/gpt-4o-mini")
        print("no price known" if price is None else f"{price.prompt} USD a prompt token")
        client.stop_price_refresh()


if __name__ == "__main__":
    trio.run(main)
