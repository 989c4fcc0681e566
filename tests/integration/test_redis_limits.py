"""Three processes on one rate and one budget, over a real Redis, against a service that counts for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager
from decimal import Decimal

import limits_worker
import pytest
import trio
from redis_server import fresh_prefix, shared_redis

from gorouter_trio.simulator import Limit, Simulator, SimulatorConfig, serve_simulator

pytestmark = pytest.mark.net


@asynccontextmanager
async def open_service(**settings):
    """A simulated service on a real port; gives it with its address."""
    simulator = Simulator(SimulatorConfig(**settings))
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(serve_simulator, simulator)
        yield simulator, base_url
        nursery.cancel_scope.cancel()


async def run_three(base_url, *, rpm, budget, seconds, tasks=8, kill_after_s=None):
    """Three workers, one of which may be killed; what the others said."""
    command = [sys.executable, limits_worker.__file__, shared_redis().url, fresh_prefix(), base_url]
    command += [str(rpm), str(budget), str(seconds), str(tasks)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    told = []

    async def live(number):
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
        said = b""
        assert process.stdout is not None
        async with process.stdout:
            if number == 0 and kill_after_s is not None:
                await trio.sleep(kill_after_s)
                process.kill()
            async for data in process.stdout:
                said += data
        assert await process.wait() == 0 or kill_after_s is not None
        if said:
            told.append(said.decode().split())

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(live, number)
    return [(int(answered), int(throttled), Decimal(spent)) for answered, throttled, spent in told]


def fullest(times, window_s):
    """The most requests that came in any window of this length."""
    most = first = 0
    for last, at in enumerate(times):
        while times[first] <= at - window_s:
            first += 1
        most = max(most, last - first + 1)
    return most


async def test_three_processes_at_a_rate(record_property):
    """Three processes ask 97 % of 6,000 times a minute together, evenly."""
    times: list[float] = []
    simulator = Simulator(SimulatorConfig(reply_tokens=5), on_request=lambda _record: times.append(trio.current_time()))
    async with trio.open_nursery() as nursery:
        base_url = await nursery.start(serve_simulator, simulator)
        told = await run_three(base_url, rpm=6_000, budget=100, seconds=3)
        nursery.cancel_scope.cancel()
    middle = [at for at in times if times[0] + 0.7 < at < times[0] + 2.4]
    used = (len(middle) - 1) / (middle[-1] - middle[0]) / 100
    record_property(
        "figure",
        f"{used:.1%} of 6,000 a minute, {fullest(times, 1.0)} in the fullest second; {[t[0] for t in told]} answered",
    )
    assert 0.95 <= used <= 1
    # A second's worth, and the burst that a pause allows.
    assert fullest(times, 1.0) <= 100 * 1.0 + 0.005 * 6_000 + 5


@pytest.mark.long
@pytest.mark.timeout(400)
async def test_three_processes_on_one_rate(record_property):
    """Three processes use 97 % of 600 requests a minute, which the service counts for itself, and never more."""
    async with open_service(limits=(Limit(requests=600, kind="sliding"),), reply_tokens=5) as (simulator, base_url):
        told = await run_three(base_url, rpm=600, budget=100, seconds=260)
        used = [window.used / window.limit.amount for window in simulator.limit_windows()]
    answered, throttled = [t[0] for t in told], sum(t[1] for t in told)
    record_property(
        "figure", f"{min(used[1:-1]):.1%} to {max(used):.1%} a minute used; {answered} answered, {throttled} refused"
    )
    assert min(used[1:-1]) >= 0.97
    assert max(used) <= 1
    assert not throttled


@pytest.mark.parametrize("kill_after_s", [None, 1.0])
async def test_three_processes_on_one_budget(record_property, kill_after_s):
    """Three processes use up a budget, and the service has charged no more; so when one is killed in the midst."""
    budget = Decimal("0.02")
    async with open_service(reply_tokens=60, latency_s=0.02) as (simulator, base_url):
        told = await run_three(
            base_url,
            rpm=60_000,
            budget=budget,
            # Long before that it is used up, but for what the one that was killed had at hand.
            seconds=40 if kill_after_s is None else 8,
            tasks=4,
            kill_after_s=kill_after_s,
        )
        charged = Decimal(simulator.ledger.total_nanousd).scaleb(-9)
    record_property("figure", f"{charged} of {budget} USD charged ({charged / budget:.1%}), {told} told")
    assert charged <= budget
    assert charged >= budget * (Decimal("0.97") if kill_after_s is None else Decimal("0.85"))
    if kill_after_s is None:
        assert sum(spent for _, _, spent in told) == charged
