# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 7: models, the key, the credits.

python examples/kit_07_services.py --simulate
"""

from __future__ import annotations

import trio
from _client import open_example_client

import gorouter_trio as gr


async def main() -> None:
    """Not every key may look at the credits, which is an error of its own."""
    async with open_example_client() as client:
        models = await client.models()
        key = await client.key()
        print(len(models), "models; key:", key.label, "limit:", key.limit)
        try:
            balance = await client.credits()
            print("credits:", balance.total_credits, "used:", balance.total_usage)
        except gr.PermissionDeniedError as exc:
            print("credits:", exc.message)


if __name__ == "__main__":
    trio.run(main)
