"""Thousands of hostile calls at once: one outcome each, in time and in size, and everything else goes on."""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import toolbox_functions
import trio
from toolbox import call, open_bench, raw_call

import gorouter_trio as gr
from gorouter_trio.tools.turn import ToolTurn
from gorouter_trio.wire.messages import ToolCall

TIMEOUT_S = 0.3
RELEASE = threading.Event()


class Odd(BaseException):
    """An exception that nobody knows."""


def cycle() -> list[object]:
    found: list[object] = []
    found.append(found)
    return found


def nested_list() -> list[object]:
    found: list[object] = []
    for _ in range(5_000):
        found = [found]
    return found


RAISES: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("secret"),
    "tool error": lambda: gr.ToolError("x" * 1_000_000),
    "exit": lambda: SystemExit(1),
    "interrupt": KeyboardInterrupt,
    "generator exit": GeneratorExit,
    "odd": Odd,
    "group": lambda: ExceptionGroup("g", [ValueError(), ExceptionGroup("h", [KeyError(1)])]),
    "base group": lambda: BaseExceptionGroup("g", [SystemExit(1), Odd()]),
}
RETURNS: dict[str, Callable[[], object]] = {
    "large": lambda: "x" * 5_000_000,
    "large list": lambda: ["x" * 1_000] * 20_000,
    "cycle": cycle,
    "deep": nested_list,
    "nan": lambda: [float("nan"), {"a": float("inf")}],
    "object": object,
    "generator": lambda: (n for n in range(3)),
    "surrogate": lambda: {"a": "\ud800"},
    "bytes": lambda: b"\xff" * 100,
    "fine": lambda: "fine",
}


async def swallow() -> None:
    while True:
        with suppress(BaseException):
            await trio.sleep_forever()


async def shield() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def leave_nursery() -> object:
    opened = await trio.open_nursery().__aenter__()
    opened.start_soon(trio.sleep, 0.01)
    return "left"


HANGS: dict[str, Any] = {"forever": trio.sleep_forever, "swallow": swallow, "shield": shield}


@gr.tool
async def in_task(kind: str, number: int) -> object:
    """Misbehaves in a task."""
    if kind in RAISES:
        raise RAISES[kind]()
    if kind in RETURNS:
        return RETURNS[kind]()
    if kind == "late raise":
        try:
            await trio.sleep_forever()
        finally:
            raise RAISES["error"]()
    return await HANGS[kind]()


@gr.tool
def in_thread(kind: str, number: int) -> object:
    """Misbehaves in a thread."""
    if kind in RAISES:
        raise RAISES[kind]()
    if kind in RETURNS:
        return RETURNS[kind]()
    if kind == "c":
        # Sleeps in C without the interpreter's lock, as drivers do.
        return ctypes.CDLL(None).usleep(900_000)
    RELEASE.wait(30)
    return None


def hostile_call(rng: random.Random, number: int, *, processes: bool) -> ToolCall:
    """One of everything that a model and a tool can do wrong."""
    name = f"c{number}"
    where = rng.choices(["task", "thread", "process", "model"], [60, 25, 5 if processes else 0, 10])[0]
    if where == "process":
        kinds = [kind for kind in toolbox_functions.HOSTILE if kind not in {"spawn", "fork", "huge"}]
        return call("hostile", name, kind=rng.choice(kinds), mark="")
    if where == "model":
        text = rng.choice(["", "{", "[" * 1_000, '{"a":NaN}', '{"kind":"\\ud800"}', '{"kind":1,"kind":2}', "nonsense"])
        return raw_call(rng.choice(["", "nope", "in_task"]), text, name)
    if where == "thread":
        hangs = ["hang", "c"] if rng.random() < 0.1 else []
        return call("in_thread", name, kind=rng.choice([*RAISES, *RETURNS, *hangs]), number=number)
    return call("in_task", name, kind=rng.choice([*RAISES, *RETURNS, *HANGS, "late raise"]), number=number)


@dataclass
class Storm:
    """What a storm of calls gave: how many, how long the longest took, and how long another task was not served."""

    done: int = 0
    longest_s: float = 0.0
    gap_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.done} hostile calls of {TIMEOUT_S} s at most, one outcome each within {self.longest_s:.2f} s; "
            f"longest gap of another task {1_000 * self.gap_s:.0f} ms"
        )


async def storm(count: int, rng: random.Random, *, processes: bool, turns: int = 8) -> Storm:
    """So many hostile calls, in rounds of up to 20 by several turns at once, each outcome checked."""
    seen = Storm()
    limits: dict[str, Any] = {
        "timeout_s": TIMEOUT_S,
        "max_calls": 10**9,
        "max_repeats": 10**9,
        "max_parallel": 8,
        "max_abandoned_threads": 20,
        "max_processes": 4,
    }

    async def tick() -> None:
        while True:
            begin = time.monotonic()
            await trio.sleep(0.01)
            seen.gap_s = max(seen.gap_s, time.monotonic() - begin - 0.01)

    async with open_bench(in_task, in_thread, toolbox_functions.hostile, **limits) as bench:

        async def run_turn(share: int) -> None:
            turn = ToolTurn(limits=bench.limits)
            while share > 0:
                calls = [hostile_call(rng, n, processes=processes) for n in range(min(share, 20))]
                share -= len(calls)
                outcomes = await bench.supervisor.run_round(calls, bench.tools, turn=turn)
                assert [outcome.message.tool_call_id for outcome in outcomes] == [each.id for each in calls]
                for outcome in outcomes:
                    assert isinstance(outcome.message.content, str)
                    assert len(outcome.message.content.encode()) <= 64 * 1024
                    seen.longest_s = max(seen.longest_s, outcome.report.duration_s)
                    assert "secret" not in outcome.message.content
                seen.done += len(outcomes)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            async with trio.open_nursery() as turns_nursery:
                for number in range(turns):
                    turns_nursery.start_soon(run_turn, count // turns + (number < count % turns))
            nursery.cancel_scope.cancel()
        assert bench.supervisor.statistics().running == 0
        # Disk and names are served, whatever hangs.
        with trio.fail_after(5):
            assert await trio.Path(__file__).read_text()
            assert await trio.socket.getaddrinfo("localhost", 80)
        RELEASE.set()
        assert bench.supervisor.statistics().calls == seen.done == count
    # Where the machine itself does not serve this program, nothing is in time.
    assert seen.longest_s <= TIMEOUT_S + 1 + seen.gap_s
    gc.collect()
    return seen


@pytest.fixture(autouse=True)
def _hold_threads() -> Any:
    """Threads that hang do so until the test is over."""
    RELEASE.clear()
    yield
    RELEASE.set()


async def test_hostile_calls(rng: random.Random, record_property: Any, caplog: Any) -> None:
    """A few hundred hostile calls in tasks and threads."""
    caplog.set_level("CRITICAL")
    record_property("figure", str(await storm(300, rng, processes=False, turns=4)))


@pytest.mark.long
@pytest.mark.net
async def test_ten_thousand_hostile_calls(rng: random.Random, record_property: Any, caplog: Any) -> None:
    """10,000 of them, also in processes: crash, spin, hold the lock, forge frames."""
    caplog.set_level("CRITICAL")
    begin = time.monotonic()
    seen = await storm(10_000, rng, processes=True)
    record_property("figure", f"{seen}; {time.monotonic() - begin:.0f} s in all")
