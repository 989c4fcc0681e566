"""Chats that are cancelled all the time, on real sockets: nothing wears out."""

from __future__ import annotations

import os
import random
from collections import deque

import pytest
import trio
from served import open_served_api
from worlds import open_quiet_client

import gorouter_trio as gr

TASKS = 20
CONNECTIONS = 18


class Churn:
    """Chats that are cancelled after 0.2 to 6 ms, or as much later as a slow machine takes to complete any."""

    def __init__(self, client: gr.Client, *, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self._recent: deque[bool] = deque([False] * 25 + [True] * 25, maxlen=50)
        self.completed = 0
        self.cancelled = 0
        self.longest_s = 0.006

    async def run(self, seconds: float) -> None:
        """Churn for as long as that, in 20 tasks at a time."""
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(self._chat_until, trio.current_time() + seconds)

    async def _chat_until(self, end: float) -> None:
        while trio.current_time() < end:
            with trio.move_on_after(self._rng.uniform(0.0002, self.longest_s)) as scope:
                await self._client.chat("[[say hi]]")
            self.completed += not scope.cancelled_caught
            self.cancelled += scope.cancelled_caught
            self._recent.append(scope.cancelled_caught)
            if sum(self._recent) > 30:
                self.longest_s *= 1.01
            elif self.longest_s > 0.006:
                self.longest_s /= 1.01


def open_sockets() -> int:
    """How many sockets the process holds."""
    names = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(name) and os.readlink(name).startswith("socket:") for name in names)


async def churn(seconds, *, rng, no_leaks, record_property):
    async with no_leaks(), open_served_api(latency_s=0.008, log_size=0, ledger_size=100, chunked=False) as api:
        sockets, tasks = open_sockets(), trio.lowlevel.current_statistics().tasks_living
        pool = gr.PoolLimits(max_connections=CONNECTIONS)
        async with open_quiet_client(api_key="sk-test", base_url=api.base_url, pool=pool) as client:
            work = Churn(client, rng=rng)
            await work.run(seconds)
            with trio.fail_after(2):
                started = trio.current_time()
                assert (await client.chat("[[say well]]")).text == "well"
                took_s = trio.current_time() - started
            statistics = client.statistics()
            assert (statistics.in_flight, statistics.queued) == (0, 0)
            assert statistics.workers <= CONNECTIONS
            assert statistics.connections <= CONNECTIONS
            assert open_sockets() == sockets + statistics.connections
        with trio.fail_after(2):
            while trio.lowlevel.current_statistics().tasks_living > tasks or open_sockets() > sockets:
                await trio.sleep(0.01)
        received = (await api.statistics()).received - 1
    total = work.completed + work.cancelled
    lost = received - work.completed
    figure = f"{total} chats, {work.completed} completed, {lost} cancelled after the server had them, "
    figure += f"cancels up to {work.longest_s * 1e3:.1f} ms, {statistics.opened} connections, "
    record_property("figure", figure + f"the next chat after {took_s * 1e3:.1f} ms")
    assert work.completed >= 0.2 * total
    assert lost >= 0.2 * total


@pytest.mark.net
async def test_churn(rng, no_leaks, record_property):
    """20 tasks cancel their chats for 4 s over 18 connections; then the next chat is answered at once."""
    await churn(4, rng=rng, no_leaks=no_leaks, record_property=record_property)


@pytest.mark.net
@pytest.mark.long
async def test_churn_for_long(rng, no_leaks, record_property):
    """The same for 20 s."""
    await churn(20, rng=rng, no_leaks=no_leaks, record_property=record_property)
