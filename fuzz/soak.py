"""Runs the client for a long time against an upstream with faults, in another process, and watches what grows.

    python fuzz/soak.py [--seconds N] [--tasks N] [--faults SHARE] [--sessions N] [--seed N]

Chats, streams, sessions, cancels and interrupts go on at once. Memory, open files, tasks and threads are sampled. It
fails (exit status 1) when memory rises by more than 1 MiB an hour over what a run needs to warm up, when anything is
left open in the end, when an error leaves the client that is none of its own, when a history would be refused by a
provider, or when an answered turn is missing from its history.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gorouter_trio.client import Client, open_client
from gorouter_trio.config import Deadlines, PoolLimits, RetryPolicy
from gorouter_trio.errors import ActorGoneError, GorouterError
from gorouter_trio.testing.history import check_history

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from gorouter_trio.session.directory import SessionRef

ROOT = Path(__file__).resolve().parents[1]
MIB = 1024 * 1024
TURNS_KEPT = 20
# What caches, arenas of the allocator and idle connections may still take after the warm-up, however short the run.
ALLOWANCE_BYTES = 4 * MIB
SLOPE_BYTES_PER_S = MIB / 3600
CONNECTIONS = 64
FAULTS = (
    "429_upstream",
    "500",
    "502_html",
    "503",
    "504",
    "524_html",
    "529",
    "error_in_200",
    "whitespace_200",
    "mid_stream_error",
    "stream_cut",
    "connection_cut",
    "hang",
)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class SoakError(Exception):
    """Something that a long run must not show."""


class Sample(Struct, frozen=True, kw_only=True):
    """What the process holds at one moment."""

    at_s: float
    resident_bytes: int
    files: int
    tasks: int
    threads: int
    operations: int


def take_sample(operations: int) -> Sample:
    return Sample(
        at_s=trio.current_time(),
        resident_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        files=len(os.listdir("/proc/self/fd")),
        tasks=trio.lowlevel.current_statistics().tasks_living,
        threads=threading.active_count(),
        operations=operations,
    )


class Load:
    """Tasks that use a client in every way there is, until told to stop."""

    def __init__(self, client: Client, rng: random.Random, *, sessions: int) -> None:
        self.client = client
        self.counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.failures: list[str] = []
        self.is_over = False
        self._rng = rng
        self._sessions = sessions
        self._ways: tuple[Callable[[random.Random], Awaitable[None]], ...] = (
            self.chat,
            self.stream,
            self.leave_stream,
            self.cancel_chat,
            self.list_models,
        )

    @property
    def operations(self) -> int:
        return sum(self.counts.values())

    async def work(self, number: int) -> None:
        """One task: its own sessions, so that it knows what has to be in them."""
        rng = random.Random(f"{self._rng.random()}:{number}")
        sessions = [self.client.session(f"soak:{number}:{n}", system="Be brief.") for n in range(self._sessions)]
        answered: Counter[str] = Counter()
        while not self.is_over:
            try:
                if rng.random() < 0.5:
                    await self.use_session(rng, rng.choice(sessions), answered)
                else:
                    await rng.choice(self._ways)(rng)
            except GorouterError as exc:
                self.note(exc)

    def note(self, exc: GorouterError) -> None:
        self.errors[type(exc).__name__] += 1
        if isinstance(exc, ActorGoneError):
            self.failures.append(f"an actor failed: {exc} ({exc.__cause__!r})")

    def prompt(self, rng: random.Random) -> str:
        return f"[[tokens {rng.choice((1, 20, 200))}]] {rng.random()}"

    async def chat(self, rng: random.Random) -> None:
        self.counts["chats"] += 1
        await self.client.chat(self.prompt(rng))

    async def stream(self, rng: random.Random) -> None:
        self.counts["streams"] += 1
        async with self.client.stream(self.prompt(rng)) as stream:
            await stream.collect()

    async def leave_stream(self, rng: random.Random) -> None:
        self.counts["streams left"] += 1
        async with self.client.stream(self.prompt(rng)) as stream:
            async for _piece in stream.text:
                break

    async def cancel_chat(self, rng: random.Random) -> None:
        self.counts["chats cancelled"] += 1
        with trio.move_on_after(rng.uniform(0, 0.01)):
            await self.client.chat(self.prompt(rng))

    async def list_models(self, _rng: random.Random) -> None:
        self.counts["model lists"] += 1
        await self.client.models()

    async def use_session(self, rng: random.Random, session: SessionRef, answered: Counter[str]) -> None:
        """A turn, sometimes stopped, and now and then a look at the whole history."""
        self.counts["turns"] += 1
        key = repr(session)
        way = rng.random()
        if way < 0.6:
            await session.ask(self.prompt(rng))
            answered[key] += 1
        elif way < 0.8:
            async with session.stream(self.prompt(rng)) as stream:
                await stream.collect()
            answered[key] += 1
        elif way < 0.9:
            with trio.move_on_after(rng.uniform(0, 0.01)):
                await session.ask(self.prompt(rng))
                answered[key] += 1
        else:
            await self.interrupt(rng, session)
        if answered[key] >= TURNS_KEPT:
            await self.check_session(session, answered[key])
            await session.clear()
            answered[key] = 0

    async def interrupt(self, rng: random.Random, session: SessionRef) -> None:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                try:
                    await session.ask(self.prompt(rng))
                except GorouterError as exc:
                    self.note(exc)

            nursery.start_soon(ask)
            await trio.sleep(rng.uniform(0, 0.01))
            await session.interrupt()

    async def check_session(self, session: SessionRef, answered: int) -> None:
        history = await session.history()
        self.counts["histories checked"] += 1
        self.failures += check_history(history)
        whole = sum(entry.call is not None and not entry.call.interrupted for entry in history)
        if whole < answered:
            self.failures.append(f"{session!r}: {answered} turns were answered, and {whole} are in the history")


@asynccontextmanager
async def open_upstream(faults: float, seed: int) -> AsyncIterator[str]:
    """A simulated OpenRouter in a process of its own; yields its base URL and prints its counters in the end."""
    command = [
        sys.executable,
        "-m",
        "gorouter_trio",
        "simulate",
        "--listen",
        "127.0.0.1:0",
        "--json",
        "--seed",
        str(seed),
    ]
    for name in FAULTS:
        command += ["--fault", f"{name}={faults / len(FAULTS)}"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=ROOT)
    output = process.stdout
    if output is None:
        raise SoakError("the upstream has no output")
    try:
        said = b""
        while b"\n" not in said:
            received = await output.receive_some()
            if not received:
                raise SoakError("the upstream did not start")
            said += received
        yield json.loads(said)["base_url"]
    finally:
        process.send_signal(signal.SIGTERM)
        with trio.move_on_after(10, shield=True):
            counters = b"".join([piece async for piece in output])
            say(f"upstream: {counters.decode().strip()}")
            await process.wait()
        if process.returncode is None:
            process.kill()


async def soak(options: argparse.Namespace) -> None:
    await trio.to_thread.run_sync(int)  # what the first thread opens stays open
    rng = random.Random(options.seed)
    async with open_upstream(options.faults, options.seed) as base_url:
        before = take_sample(0)
        async with open_client(
            api_key="sk-soak",
            base_url=base_url,
            pool=PoolLimits(max_connections=CONNECTIONS),
            retry=RetryPolicy(base_delay_s=0.01, max_delay_s=0.1, retry_after_cap_s=2.0),
            deadlines=Deadlines(headers_s=2.0, first_data_s=2.0, data_idle_s=2.0, total_s=20.0),
        ) as client:
            load = Load(client, rng, sessions=options.sessions)
            samples = await run_load(load, options)
            if not load.failures:
                await client.models()
        with trio.move_on_after(5):
            while len(os.listdir("/proc/self/fd")) > before.files:  # noqa: ASYNC110 - the system sets no event
                await trio.sleep(0.01)
        after = take_sample(load.operations)
    say(f"operations: {dict(load.counts)}")
    say(f"errors: {dict(load.errors)}")
    if load.failures:
        raise SoakError("; ".join(load.failures[:5]))
    check_left_over(before, after)
    check_growth(samples)


async def run_load(load: Load, options: argparse.Namespace) -> list[Sample]:
    samples = []
    async with trio.open_nursery() as nursery:
        for number in range(options.tasks):
            nursery.start_soon(load.work, number)
        ends_at = trio.current_time() + options.seconds
        while (left_s := ends_at - trio.current_time()) > 0 and not load.failures:
            await trio.sleep(min(left_s, max(0.5, options.seconds / 120)))
            samples.append(take_sample(load.operations))
            show_sample(samples, options)
        load.is_over = True
    return samples


def show_sample(samples: Sequence[Sample], options: argparse.Namespace) -> None:
    s = samples[-1]
    if len(samples) % 10 == 0 or options.verbose:
        say(
            f"{s.at_s - samples[0].at_s:8.1f} s  {s.resident_bytes / MIB:7.1f} MiB  {s.files:4} files  "
            f"{s.tasks:4} tasks  {s.threads:3} threads  {s.operations:9,} operations"
        )


def check_left_over(before: Sample, after: Sample) -> None:
    for name in ("files", "tasks"):
        was, now = getattr(before, name), getattr(after, name)
        if now > was:
            raise SoakError(f"{now - was} {name} left over")


def check_growth(samples: Sequence[Sample]) -> None:
    """Compare the second quarter, after the warm-up, with the last."""
    if len(samples) < 8:
        raise SoakError("too short to tell")
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    for name in ("files", "tasks", "threads"):
        first, last = max(getattr(s, name) for s in early), min(getattr(s, name) for s in late)
        if last > 1.2 * first + 5:
            raise SoakError(f"{name} grow: {first} at most early on, {last} at least in the end")
    grown = statistics.median(s.resident_bytes for s in late) - statistics.median(s.resident_bytes for s in early)
    between_s = late[0].at_s - early[0].at_s
    allowed = ALLOWANCE_BYTES + SLOPE_BYTES_PER_S * between_s
    say(f"memory: {grown / MIB:+.2f} MiB in {between_s:,.0f} s, allowed {allowed / MIB:.2f}")
    if grown > allowed:
        raise SoakError("memory grows")


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run with faults; see the head of the file.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tasks", type=int, default=24, help="tasks that use the client at once (default: 24)")
    parser.add_argument("--sessions", type=int, default=4, help="sessions a task (default: 4)")
    parser.add_argument("--faults", type=float, default=0.01, help="share of requests that meet one (default: 0.01)")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--verbose", action="store_true", help="print every sample")
    options = parser.parse_args()
    options.seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    say(f"seed {options.seed}")
    try:
        trio.run(soak, options)
    except SoakError as exc:
        say(f"FAILED: {exc}")
        return 1
    say("passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
