"""Many connections, what each takes of memory, and what is left when they are gone."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import trio
from gateway_attackers import open_attack
from gateways import Healthy, LoopLag, limits, open_gateway, open_talk

from gorouter_trio.gateway import GatewayConfig

pytestmark = pytest.mark.net

SUPPORT = Path(__file__).parents[1] / "support"


def resident():
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def line_of(stream):
    """The line that comes next, and alone."""
    line = b""
    while not line.endswith(b"\n"):
        received = await stream.receive_some()
        assert received, "the clients have ended"
        line += received
    return line


async def test_a_close_without_time(monkeypatch):
    """A connection whose close came to no end is counted no more: thousands that end at once leave nothing behind."""
    monkeypatch.setattr("gorouter_trio.gateway.connection._CLOSE_S", 0.0)
    async with open_gateway() as behind:
        async with open_talk(behind.url):
            assert behind.gateway.statistics().connections == 1
        with trio.fail_after(5):
            while behind.gateway.statistics().connections:
                await trio.sleep(0.01)  # until the gateway has noticed
        assert behind.gateway.statistics().principals == 0
        assert behind.errors == []


async def crowd(count, *, turns):
    """Connect so many clients, in a process of their own.

    Bytes for each, idle and after turns, and for each round of turns the seconds of CPU that the gateway took and those
    on the clock.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 1_000), hard))
    environment = {**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}"}
    config = GatewayConfig(
        anonymous=True, limits=limits(max_connections=count, authenticate_s=60.0, ping_s=600.0, resume_s=0.2)
    )
    try:
        async with open_gateway(config, notes=False) as behind:
            before = resident()
            process = await trio.lowlevel.open_process(
                [sys.executable, str(SUPPORT / "gateway_crowd.py"), behind.url, str(count)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )  # fmt: skip
            said = cast("trio.abc.ReceiveStream", process.stdout)
            asked = cast("trio.abc.SendStream", process.stdin)
            assert await line_of(said) == b"ready\n"
            assert behind.gateway.statistics().connections == count
            idle = (resident() - before) / count
            took = []
            for _ in range(turns):
                began_s = time.process_time()
                await asked.send_all(b"\n")
                seconds = float(await line_of(said))
                took.append((time.process_time() - began_s, seconds))
            after = (resident() - before) / count
            process.kill()
            await process.wait()
            await asked.aclose()
            await said.aclose()
            with trio.fail_after(180):
                while behind.gateway.statistics().connections:
                    await trio.sleep(0.2)  # until the gateway has noticed
            statistics = behind.gateway.statistics()
            assert (statistics.unauthenticated, statistics.principals, statistics.live_turns) == (0, 0, 0)
            assert behind.errors == []
            return idle, after, took
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_hundreds(figure):
    """What a connection takes is small, and all is given back after a kill -9 of the clients."""
    idle, _after, _took = await crowd(300, turns=1)
    assert idle < 131_072
    figure(f"300 connections: {idle / 1024:.0f} KiB each")


@pytest.mark.long
async def test_ten_thousand(figure):
    """Ten thousand connections take turns, in time that grows as their number and bounded memory; all is given back."""
    # In this order: the memory that the first ones gave back would be counted as free to the others.
    idle, after, took = await crowd(10_000, turns=2)
    _idle, _after, few = await crowd(2_000, turns=2)
    assert idle < 65_536
    # An active session and its history stay, whoever has asked for it.
    assert after < 131_072
    # Five times as many may take five times as long; time that grows as the square would be 25 times.
    cpu_s, few_cpu_s = min(took)[0], min(few)[0]
    assert cpu_s < 10 * few_cpu_s
    figure(
        f"10,000 connections: {idle / 1024:.0f} KiB each idle, {after / 1024:.0f} KiB each after two turns with a "
        f"session each; 10,000 turns: {cpu_s:.1f} s of CPU, {min(took)[1]:.1f} s, 2,000: {few_cpu_s:.1f} s of CPU"
    )


# Row 31


async def besieged(behind, count, *, healthy, baseline_s, pause_s):
    """The longest that a dribbler was let, and the p99 of the healthy ones without and with dribblers, in seconds.

    And how far the loop was behind.
    """
    asked, lag = Healthy(), LoopLag()
    async with AsyncExitStack() as stack:
        talks = [await stack.enter_async_context(open_talk(behind.url)) for _ in range(healthy)]
        async with trio.open_nursery() as nursery:
            for talk in talks:
                nursery.start_soon(partial(asked.ask_on, talk, pause_s=pause_s))
            nursery.start_soon(lag.run)
            await trio.sleep(baseline_s)
            alone = asked.p99()
            async with open_attack("dribble", behind.url, count) as attackers:
                await attackers.wait_connected()
                asked.took.clear()
                attack = await attackers.wait_ended()
            beside = asked.p99()
            nursery.cancel_scope.cancel()
    assert len(attack.took) == count
    return max(attack.took), alone, beside, lag.most_s


def open_files():
    """How many files and sockets this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def wait_for_files(count):
    """Wait until no more are open than there were."""
    with trio.fail_after(10):
        while open_files() > count:
            await trio.sleep(0.05)  # the far ends close


async def test_slowloris(figure):
    """Who dribbles is gone in time, before and after the upgrade, and nobody else waits for it."""
    config = GatewayConfig(anonymous=True, limits=limits(authenticate_s=0.8, message_grace_s=0.8))
    async with open_gateway(config) as behind:
        files = open_files()
        longest, _alone, p99, lag_s = await besieged(behind, 60, healthy=2, baseline_s=0.2, pause_s=0.01)
        assert longest < 3 + 4 * lag_s
        assert behind.gateway.statistics().unauthenticated == 0
        await wait_for_files(files)
    figure(f"60 dribblers gone after {longest:.1f} s (bound 0.8 s); p99 of a healthy one {p99 * 1000:.0f} ms meanwhile")


@pytest.mark.long
async def test_two_thousand_dribblers(figure):
    """Likewise with the limits as they are, beside a hundred healthy connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8_000), hard))
    try:
        async with open_gateway(GatewayConfig(anonymous=True, limits=limits())) as behind:
            files = open_files()
            longest, alone, p99, lag_s = await besieged(behind, 2_000, healthy=100, baseline_s=10.0, pause_s=0.5)
            assert longest < 10
            # Twice as long is wanted. All are let go within the same second, half a second of work.
            assert p99 < 2 * alone + 0.25
            assert behind.gateway.statistics().unauthenticated == 0
            await wait_for_files(files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    figure(
        f"2,000 dribblers gone after {longest:.1f} s; p99 of a hundred healthy ones {alone * 1000:.0f} ms before and "
        f"{p99 * 1000:.0f} ms meanwhile, the loop up to {lag_s:.2f} s behind; no file left open"
    )
