"""A loop of tool rounds whose tools a test scripts, and the prompts that make the simulator call them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from gorouter_trio._turns.rounds import Question, RoundJournal
from gorouter_trio.events import TextDelta
from gorouter_trio.wire.messages import AssistantMessage, ToolCall, ToolMessage
from gorouter_trio.wire.result import ChatResult
from gorouter_trio.wire.toolcalls import ToolCallReport

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
TWO_ROUNDS = "[[call f#a1]] [[call g#a2]] [[call2 f#b1]]"
ONE_ROUND = "[[call f#a1]] [[call g#a2]]"

Tool = Callable[[RoundJournal, ToolCall], Awaitable[str]]


class Loop:
    """As the pipeline's loop is to be: rounds of tools in parallel, each with the journal.

    `ran` are the ids of the calls that were begun, in order. The calls in `asked` are carried out after a reply from
    outside only. `tool` carries a call out; by default it takes `tool_s` seconds. What an earlier life may have
    carried out is not repeated, unless the loop is `harmless`. With `each`, every result is written down by itself.
    """

    def __init__(
        self,
        *,
        asked: tuple[str, ...] = (),
        until_s: float | None = None,
        tool: Tool | None = None,
        tool_s: float = 0.1,
        harmless: bool = False,
        each: bool = False,
    ) -> None:
        self.ran: list[str] = []
        self.asked = asked
        self.until_s = until_s
        self.tool = tool or self._sleep
        self.tool_s = tool_s
        self.harmless = harmless
        self.each = each

    async def __call__(self, journal: RoundJournal) -> ChatResult:
        if journal.pending is not None:
            await self._answer(journal, journal.pending)
        while True:
            answer = await journal.send()
            if not answer.message.tool_calls:
                return answer
            await journal.called(answer)
            await self._answer(journal, answer.message)

    async def _answer(self, journal: RoundJournal, message: AssistantMessage) -> None:
        results: dict[str, str] = {}
        calls = [call for call in message.tool_calls or () if call.id in journal.open_calls]
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(self._call, journal, call, results)
        if not self.each:
            await journal.answered(
                [ToolMessage(call.id, results[call.id]) for call in calls], [_report_on(call) for call in calls]
            )

    async def _call(self, journal: RoundJournal, call: ToolCall, results: dict[str, str]) -> None:
        if call.id in journal.in_doubt and not self.harmless:
            results[call.id] = "in doubt"
        elif call.id in self.asked and (
            (reply := await journal.parked(Question(call.id, call.id, {"run": call.function.name}, self.until_s)))
            != b"true"
        ):
            results[call.id] = "lapsed" if reply is None else "refused"
        else:
            journal.emit(TextDelta(f"<{call.id}>"))
            self.ran.append(call.id)
            with journal.as_tool():
                results[call.id] = await self.tool(journal, call)
        if self.each:
            await journal.answered([ToolMessage(call.id, results[call.id])])

    async def _sleep(self, _journal: RoundJournal, call: ToolCall) -> str:
        await trio.sleep(self.tool_s)
        return f"result of {call.id}"


def _report_on(call: ToolCall) -> ToolCallReport:
    return ToolCallReport(call_id=call.id, name=call.function.name, status="success")
