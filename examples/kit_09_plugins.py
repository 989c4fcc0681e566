# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 9: logging, metrics and billing.

python examples/kit_09_plugins.py --simulate
"""

from __future__ import annotations

import logging
import sys

import trio
from _client import open_example_client

from gorouter_trio.plugins import BillingPlugin, BillingReport, LoggingPlugin, MetricsPlugin


def bill(report: BillingReport) -> None:
    """One report for each attempt that was sent. A cost that is not known is None, not 0."""
    cost = "unknown" if report.cost_usd is None else f"{report.cost_usd:.6f}"
    print(f"model={report.model} tokens={report.row.total_tokens} cost={cost}")


async def main() -> None:
    """Plugins end with the client, in reverse order; what they have noted is given out by then."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s")
    metrics = MetricsPlugin()
    async with open_example_client() as client:
        await client.register(LoggingPlugin())
        await client.register(metrics)
        await client.register(BillingPlugin(bill))
        await client.chat("Hello!")
    snapshot = metrics.snapshot()
    print(f"requests={snapshot.requests} succeeded={snapshot.succeeded} failed={snapshot.failed}")


if __name__ == "__main__":
    trio.run(main)
