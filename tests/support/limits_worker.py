"""Asks as fast as it may, as a process of its own.

    python limits_worker.py REDIS PREFIX BASE_URL RPM BUDGET_USD SECONDS TASKS

Its rate and its budget are those of all who have the same prefix. Says at its end how many were answered, how many of
them refused for their number, and what they cost.
"""

from __future__ import annotations

import random
import sys
from decimal import Decimal

import trio

import gorouter_trio as gr
from gorouter_trio.errors import BudgetExceededError
from gorouter_trio.pool.budget import BudgetBook, Spending
from gorouter_trio.pool.budget_gate import BudgetGate
from gorouter_trio.pool.prices import PriceBook
from gorouter_trio.pool.shared import open_shared_limits
from gorouter_trio.pool.shared_redis import RedisLimits

MODEL = "openai/gpt-4o-mini"
PRICES = gr.PricePolicy(own={MODEL: {"prompt": "0.00000015", "completion": "0.0000006"}})


async def work(
    redis: str, prefix: str, base_url: str, rpm: float, budget: str, *, seconds: float, tasks: int
) -> tuple[int, int, Decimal]:
    """Ask until the time is over or the budget is used up."""
    spent, answered = Decimal(0), 0
    async with (
        RedisLimits(redis, prefix=prefix) as limits,
        open_shared_limits(limits, holder=str(random.getrandbits(64)), rng=random.Random()) as shared,
        gr.open_client(
            api_key="sk-same",
            base_url=base_url,
            insecure_http=True,
            shared=limits,
            rates=gr.RateLimits(requests_per_minute=rpm),
            retry=gr.RetryPolicy(max_retries=0),
        ) as client,
    ):
        assert shared is not None
        gate = BudgetGate(BudgetBook(gr.Budget(usd=budget)))
        shared.share_budget(gate)
        quote = PriceBook(PRICES).table.quote(MODEL, prompt_tokens=40)
        wanted = Spending(quote=quote, max_tokens=100, model=MODEL)

        async def ask() -> None:
            nonlocal spent, answered
            while True:
                try:
                    reservation = gate.reserve_nowait(wanted) or await gate.wait(wanted)
                except BudgetExceededError:
                    return
                cost = None
                try:
                    reply = await client.chat("Hello?", model=MODEL, max_tokens=100)
                    cost = reply.call.usage.cost if reply.call.usage is not None else None
                    answered += 1
                    spent += cost or 0
                except gr.RateLimitError:
                    cost = Decimal(0)
                finally:
                    gate.settle(reservation, cost)

        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(ask)
        return answered, client.statistics().throttled, spent


async def main(args: list[str]) -> None:
    redis, prefix, base_url, rpm, budget, seconds, tasks = args
    told = await work(redis, prefix, base_url, float(rpm), budget, seconds=float(seconds), tasks=int(tasks))
    print(*told)  # noqa: T201 - what the test reads


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
