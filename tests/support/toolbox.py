"""Rounds of tool calls without a model: a supervisor, calls as a model writes them, a guard that keeps a log."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

import gorouter_trio as gr
from gorouter_trio.events import ToolEvent
from gorouter_trio.security.rules import Allow, Decision, Principal, ToolAudit, ToolCheck, ToolGuard
from gorouter_trio.tools.outcomes import ToolOutcome
from gorouter_trio.tools.registry import ToolSet, ToolSource
from gorouter_trio.tools.supervisor import ToolRound, ToolSupervisor, open_supervisor
from gorouter_trio.tools.turn import ToolTurn
from gorouter_trio.wire.messages import FunctionCall, ToolCall
from gorouter_trio.wire.toolcalls import ToolCallReport

WALL = 1_750_000_000.0


def wall() -> float:
    """Seconds since the epoch, as far as these tests are concerned."""
    return WALL + trio.current_time()


def call(name: str, call_id: str = "call_1", /, **arguments: object) -> ToolCall:
    """A call with these arguments."""
    return ToolCall(id=call_id, function=FunctionCall(name, json.dumps(arguments)))


def raw_call(name: str, text: str, call_id: str = "call_1") -> ToolCall:
    """A call whose arguments are this text."""
    return ToolCall(id=call_id, function=FunctionCall(name, text))


@dataclass
class LoggingGuard:
    """Lets through what `decide` lets through, and keeps what it was asked and told."""

    decide: Callable[[ToolCheck], Decision] = lambda _check: Allow()
    checks: list[ToolCheck] = field(default_factory=list)
    principals: list[Principal | None] = field(default_factory=list)
    audits: list[ToolAudit] = field(default_factory=list)

    def check(self, principal: Principal | None, call: ToolCheck, *, now: float, wall: float) -> Decision:
        self.checks.append(call)
        self.principals.append(principal)
        return self.decide(call)

    def audit(self, record: ToolAudit) -> None:
        self.audits.append(record)


@dataclass
class Bench:
    """A supervisor, a set of tools, and the events of its rounds."""

    supervisor: ToolSupervisor
    tools: ToolSet
    limits: gr.ToolLimits
    events: list[ToolEvent] = field(default_factory=list)

    def round(self, calls: Iterable[ToolCall], turn: ToolTurn | None = None) -> ToolRound:
        """A round of these calls."""
        turn = turn or ToolTurn(limits=self.limits)
        return self.supervisor.round(list(calls), self.tools, turn=turn, on_event=self.events.append)

    async def run(self, *calls: ToolCall, turn: ToolTurn | None = None) -> list[ToolOutcome]:
        """The outcomes of these calls."""
        return await self.round(calls, turn).run()

    async def one(self, call: ToolCall, turn: ToolTurn | None = None) -> ToolCallReport:
        """The report of one call."""
        (outcome,) = await self.run(call, turn=turn)
        assert outcome.message.tool_call_id == outcome.report.call_id
        assert outcome.message.content == outcome.report.text
        return outcome.report


@asynccontextmanager
async def open_bench(*tools: ToolSource, guard: ToolGuard | None = None, **limits: object) -> AsyncIterator[Bench]:
    """A bench with these tools and limits."""
    settings = gr.ToolLimits(**limits)  # type: ignore[arg-type]  # the tests give the right ones
    async with open_supervisor(settings, guard=guard, wall=wall) as supervisor:
        yield Bench(supervisor, ToolSet(tools), settings)
        assert supervisor.statistics().running == supervisor.statistics().given_up


def told(report: ToolCallReport) -> str:
    """What the model is told of an error."""
    found = json.loads(report.text)
    assert found["errorType"] == report.status
    message = found["errorMessage"]
    assert isinstance(message, str)
    return message
