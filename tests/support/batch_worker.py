"""A batch job in a process that is killed: run again and again until it is whole."""

from __future__ import annotations

from collections.abc import Callable

from gorouter_trio.batch.settings import BatchJob
from gorouter_trio.client import open_client
from gorouter_trio.config import PoolLimits


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
