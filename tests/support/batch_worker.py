"""A batch job in a process that is killed: run again and again until it is whole."""

from __future__ import annotations

from collections.abc import Callable

from gorouter_trio.batch.cluster import ClusterJob
from gorouter_trio.batch.cluster_wiring import make_worker
from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import open_client
from gorouter_trio.config import PoolLimits, PricePolicy, RateLimits
from gorouter_trio.transport.resp_client import RedisClient

MODEL = "openai/gpt-4o-mini"
PRICES = PricePolicy(own={MODEL: {"prompt": "0.00000015", "completion": "0.0000006"}}, on_start=False)


async def work(
    ack: Callable[[str], None], base_url: str, source: str, output: str, in_flight: str, ordered: str = ""
) -> None:
    """Go on with the job, and tell when it is done."""
    width = int(in_flight)
    job = BatchJob(
        source=source, output=output, max_in_flight=width, if_exists="resume", ordered=bool(ordered), window=4 * width
    )
    async with (
        open_client(
            api_key="sk-test",
            base_url=base_url,
            insecure_http=True,
            pool=PoolLimits(max_connections=width, adaptive_from=width),
        ) as client,
        client.batch_job(job) as running,
    ):
        ack("open")
        await running.run()
    ack("done")


async def share(
    ack: Callable[[str], None], redis_url: str, job: str, name: str, base_url: str, rpm: str, width: str
) -> None:
    """Work for a shared job within limits that all its workers share, until it is done or its budget used up."""
    async with RedisClient(redis_url) as redis:
        shared = ClusterJob(redis, job, lease_s=2.0)
        async with open_client(
            api_key="sk-same",
            base_url=base_url,
            insecure_http=True,
            shared=shared.limits,
            rates=RateLimits(requests_per_minute=float(rpm)),
            prices=PRICES,
            pool=PoolLimits(max_connections=int(width), adaptive_from=int(width)),
        ) as client:
            ack("open")
            settings = await shared.settings()
            worker = make_worker(client.runtime, shared, settings=settings, turn={}, name=name, width=int(width))
            await worker.run()
            ack(worker.stopping or "done")
