"""A gateway in a process of its own.

    python gateway_worker.py BASE_URL [REDIS_URL LEASE_S]

Serves a client of the API at BASE_URL to everybody, on a free port of the loopback address, and prints its URL; with a
REDIS_URL it is one of several that share the sessions there. Ends on SIGTERM, after draining, and with its input.
"""

from __future__ import annotations

import signal
import sys
from functools import partial

import trio
from gateways import ROOMY

from gorouter_trio import LedgerConfig, PoolLimits, PricePolicy, SessionConfig, open_client
from gorouter_trio.config import Secret
from gorouter_trio.gateway import ClusterConfig, GatewayConfig, serve_gateway
from gorouter_trio.stores import MemoryStore, RedisStore


async def serve(base_url: str, redis_url: str | None, lease_s: float) -> None:
    """Until SIGTERM."""
    cluster = None
    if redis_url is not None:
        cluster = ClusterConfig(redis=redis_url, secret=Secret("a secret of this test"), member_s=min(1.0, lease_s / 2))
    config = GatewayConfig(anonymous=True, limits=ROOMY, cluster=cluster)
    async with (
        open_client(
            api_key="sk-test",
            base_url=base_url,
            insecure_http=True,
            store=MemoryStore() if redis_url is None else RedisStore(redis_url),
            sessions=SessionConfig(lease_s=lease_s),
            pool=PoolLimits(max_connections=64),
            prices=PricePolicy(on_start=False, refresh_s=None),
            ledger=LedgerConfig(lookups=0),
        ) as client,
        trio.open_nursery() as nursery,
    ):
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            gateway = await nursery.start(partial(serve_gateway, client, config))
            print(gateway.url, flush=True)  # noqa: T201 - how it is told
            await anext(signals)
            gateway.drain()


if __name__ == "__main__":
    given = sys.argv[2:]
    trio.run(serve, sys.argv[1], given[0] if given else None, float(given[1]) if given else 15.0)
