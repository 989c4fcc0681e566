"""Cancelling a round at every step: an outcome for every call, nothing left running, the next round works."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from cancel_sweep import sweep
from toolbox import Bench, LoggingGuard, call, open_bench

import gorouter_trio as gr
from gorouter_trio.events import ToolFinished, ToolStarted
from gorouter_trio.security.rules import ToolRules
from gorouter_trio.tools.supervisor import ToolRound
from gorouter_trio.tools.turn import ToolTurn


@gr.tool
async def echo(text: str, delay_s: float = 0.0) -> str:
    await trio.sleep(delay_s)
    return text


@gr.tool
async def nested(number: int) -> int:
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(trio.sleep, 0.5)
    return number


@gr.tool
async def failing() -> None:
    await trio.sleep(0.1)
    raise gr.ToolError("no")


@gr.tool(timeout_s=0.3)
async def late() -> None:
    await trio.sleep_forever()


@gr.tool
async def stubborn() -> str:
    for _ in range(3):
        with suppress(BaseException):
            await trio.sleep(0.2)
    return "stubborn"


PAY = gr.Tool(echo.function, name="pay", rules=ToolRules(sensitive=True))


@dataclass
class Place:
    bench: Bench
    guard: LoggingGuard
    rounds: list[ToolRound] = field(default_factory=list)
    calls: int = 0

    async def run(self, *calls: Any, **settings: Any) -> None:
        turn = ToolTurn(limits=self.bench.limits, **settings)
        self.rounds.append(self.bench.round(calls, turn))
        self.calls += len(calls)
        await self.rounds[-1].run()


def place(**limits: Any) -> Callable[[], Any]:
    @asynccontextmanager
    async def open_place() -> AsyncIterator[Place]:
        guard = LoggingGuard()
        async with open_bench(echo, nested, failing, late, stubborn, PAY, guard=guard, **limits) as bench:
            yield Place(bench, guard)

    return open_place


async def check(place: Place, is_whole: bool) -> None:
    """One outcome and one event a call, each audited once; no job is left, and the bench works."""
    bench = place.bench
    for round_ in place.rounds:
        outcomes = [outcome for outcome in round_.outcomes if outcome is not None]
        assert len(outcomes) == len(round_.outcomes)
        assert is_whole == all(outcome.report.status != "cancelled" for outcome in outcomes) or not is_whole
    finished = [event.call_id for event in bench.events if isinstance(event, ToolFinished)]
    assert len(finished) == len(set(finished)) == place.calls
    assert [audit.call_id for audit in place.guard.audits] == finished
    started = {event.call_id for event in bench.events if isinstance(event, ToolStarted)}
    assert started <= set(finished)
    assert bench.supervisor.statistics().running == 0
    assert bench.supervisor._slots.borrowed_tokens == 0
    assert not bench.supervisor._tool_slots
    assert (await bench.one(call("echo", "last", text="fine"))).text == "fine"


async def parallel(place: Place) -> None:
    await place.run(
        call("echo", "a", text="1", delay_s=0.2),
        call("nested", "b", number=3),
        call("failing", "c"),
        call("nope", "d"),
        call("echo", "e", text="2"),
    )


async def sequential(place: Place) -> None:
    await place.run(
        call("echo", "a", text="1", delay_s=0.2), call("late", "b"), call("failing", "c"), call("nested", "d", number=1)
    )


async def two_rounds(place: Place) -> None:
    await place.run(call("echo", "a", text="1", delay_s=0.1), call("failing", "b"))
    await place.run(call("echo", "c", text="2", delay_s=0.1))


async def approved(place: Place) -> None:
    async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
        await trio.sleep(1)
        return gr.ApprovalDecision(request=request, approved=True)

    await place.run(call("pay", "a", text="1"), call("echo", "b", text="2"), approve=approve)


async def unwilling(place: Place) -> None:
    await place.run(call("stubborn", "a"), call("echo", "b", text="2", delay_s=0.1))


@pytest.mark.parametrize(
    ("scenario", "limits"),
    [
        (parallel, {}),
        (parallel, {"max_parallel": 2, "max_running": 1}),
        (sequential, {"parallel": False}),
        (two_rounds, {}),
        (approved, {}),
        (unwilling, {}),
    ],
    ids=["parallel", "crowded", "sequential", "two rounds", "approved", "unwilling"],
)
async def test_cancel_at_every_step(
    autojump_clock: trio.testing.MockClock, scenario: Any, limits: dict[str, Any], record_property: Any
) -> None:
    """Wherever a round is cut off, every call has its outcome and nothing is left."""
    report = await sweep(place(**limits), scenario, check=check)
    record_property("figure", f"{scenario.__name__}: {report}")
    assert report.cut_off > 8


async def test_closing_at_every_step(autojump_clock: trio.testing.MockClock) -> None:
    """Wherever the supervisor is closed under a round, the round has an outcome for every call."""
    for steps in range(60):
        rounds: list[ToolRound] = []

        async def ask(bench: Bench, rounds: list[ToolRound] = rounds) -> None:
            rounds.append(bench.round([call("echo", "a", text="1", delay_s=0.2), call("nested", "b", number=1)]))
            with suppress(gr.ActorGoneError):
                await rounds[-1].run()

        async with trio.open_nursery() as nursery, place()() as opened:
            nursery.start_soon(ask, opened.bench)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            await opened.bench.supervisor.aclose()
        for round_ in rounds:
            assert all(outcome is not None for outcome in round_.outcomes)
