"""One contender in a process of its own: warm up, measure, print one line of JSON.

    python benchmarks/_client.py chat aiohttp --port 8080 --in-flight 64 --cpu-s 1.5

The CPU is that of this process (user and system, all threads) by getrusage around the measured requests. How many they
are follows from what the warm-up cost, so that fast and slow contenders are measured for about as long.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import resource
import sys
import threading
import time
from typing import TYPE_CHECKING

import _contenders
import _wire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from _contenders import Call, Contender

    Run = Callable[[list[Call], int, tuple[int, str]], Awaitable[None]]


FIELDS = {
    "chat": _contenders.CHAT,
    "stream": _contenders.STREAM,
    "plugins": _contenders.PLUGINS,
    "front-chat": _contenders.FRONT_CHAT,
    "front-stream": _contenders.FRONT_STREAM,
}


def cpu_s() -> float:
    """CPU seconds of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def control(port: int, target: str) -> dict[str, object]:
    """Ask the server something; it counts from there."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", target)
    facts: dict[str, object] = json.loads(connection.getresponse().read())
    connection.close()
    return facts


async def _worker(call: Call, tickets: range, taken: list[int], expected: tuple[int, str]) -> None:
    while taken[0] < len(tickets):
        taken[0] += 1
        found = await call()
        if found != expected:
            raise SystemExit(f"expected {expected}, got {found}")


async def run_trio(calls: list[Call], count: int, expected: tuple[int, str]) -> None:
    """`count` requests, one worker a call."""
    import trio

    tickets, taken = range(count), [0]
    async with trio.open_nursery() as nursery:
        for call in calls:
            nursery.start_soon(_worker, call, tickets, taken, expected)


async def run_asyncio(calls: list[Call], count: int, expected: tuple[int, str]) -> None:
    """The same on asyncio."""
    tickets, taken = range(count), [0]
    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(_worker(call, tickets, taken, expected))


async def run_threads(calls: list[Call], count: int, expected: tuple[int, str]) -> None:
    """The same in threads, one a worker; the calls are plain functions."""
    tickets, taken, failures = range(count), [0], []

    def work(call: Callable[[], tuple[int, str]]) -> None:
        while taken[0] < len(tickets) and not failures:
            # As exact as it can be without a lock, which would be measured as well.
            taken[0] += 1
            found = call()
            if found != expected:
                failures.append(found)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise SystemExit(f"expected {expected}, got {failures[0]}")


async def measure(contender: Contender, args: argparse.Namespace) -> dict[str, object]:
    """Open, warm up, measure, close."""
    streaming = args.kind.endswith("stream")
    text = _wire.STREAM_TEXT if streaming else _wire.PLAIN_TEXT
    expected = (len(text), _wire.FINISH)
    run = {"trio": run_trio, "asyncio": run_asyncio, "threads": run_threads}[contender.loop]
    control(args.port, "/gap?0")
    async with contender.open(f"http://127.0.0.1:{args.port}{_wire.PATH}", args.in_flight) as calls_of:
        calls = [calls_of(worker) for worker in range(args.in_flight)]
        estimate = await _warm_up(run, calls, expected, args.cpu_s)
        count = max(round(args.cpu_s / estimate), args.in_flight)
        if args.gap_s:
            count = args.in_flight * args.gap_lots
        gc.collect()
        control(args.port, f"/gap?{args.gap_s}")
        started, before = time.perf_counter(), cpu_s()
        await run(calls, count, expected)
        spent, elapsed = cpu_s() - before, time.perf_counter() - started
    facts = control(args.port, "/stats")
    if facts["wrong"] or facts["requests"] != count:
        raise SystemExit(f"the server saw other requests than were meant: {facts}")
    return {"cpu_us": 1e6 * spent / count, "requests": count, "rate": count / elapsed}


async def _warm_up(run: Run, calls: list[Call], expected: tuple[int, str], enough_s: float) -> float:
    """One lot of requests connects and imports, another one is for the estimate unless the first was long enough."""
    lots = 0
    while lots < 2:
        before = cpu_s()
        await run(calls, len(calls), expected)
        spent = cpu_s() - before
        lots += 1
        if spent > enough_s:
            break
    return max(spent / len(calls), 20e-6)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(FIELDS))
    parser.add_argument("contender")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--cpu-s", type=float, default=1.0, help="how long to measure, in CPU seconds")
    parser.add_argument("--gap-s", type=float, default=0.0, help="time between the events of a stream")
    parser.add_argument("--gap-lots", type=int, default=1, help="streams a worker when there are gaps")
    return parser.parse_args()


def main() -> None:
    """Run one contender."""
    args = arguments()
    contender = {contender.name: contender for contender in FIELDS[args.kind]}[args.contender]
    try:
        result = _run(contender, args)
    except BaseExceptionGroup as group:
        # All workers fail alike; one of them says it.
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    json.dump(result, sys.stdout)


def _run(contender: Contender, args: argparse.Namespace) -> dict[str, object]:
    if contender.loop != "trio":
        return asyncio.run(measure(contender, args))
    import trio

    return trio.run(measure, contender, args)


if __name__ == "__main__":
    main()
