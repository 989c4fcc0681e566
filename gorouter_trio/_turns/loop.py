"""The loop of a turn: extensions around it, and in it as many requests as its tools and the form of its answer take.

One loop for everything: chats, streams and turns of sessions differ in their `RoundJournal` only, which says where
the conversation is kept and how an answer comes. What the loop decides is decided in `_turns.Rounds`; here it is done.

Extensions see the request as it would be sent first, and what they make of it holds for all rounds: what the rounds
add follows it. They are through before the asker is told, and after the answer is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never, cast

from msgspec import UNSET

from ..errors import DecodeError, GorouterError
from ..pool.retry import warrants_fallback
from ..tools.outcomes import unique_calls
from ..tools.registry import ToolSet
from ..tools.turn import ApprovalDecision, ToolTurn
from ..wire.codec import decode_json, encode_json, join_options, settings_of_whole, split_object
from ..wire.messages import ToolMessage
from ..wire.toolcalls import ToolCallReport
from .chain import ChatState
from .request import AskAgain, CallTools, Finish, Rounds, TurnExtras
from .rounds import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..config import ToolLimits
    from ..tools.outcomes import ToolOutcome
    from ..tools.supervisor import ToolRound, ToolSupervisor
    from ..tools.turn import ApprovalRequest
    from ..wire.messages import AssistantMessage, ToolCall
    from ..wire.result import ChatResult
    from .chain import Chain
    from .request import TurnRequest
    from .rounds import RoundJournal

__all__ = ["LoopServices", "TurnLoop"]

_NO_EXTRAS = TurnExtras()
_NO_TOOLS = ToolSet()
# Providers refuse an empty list of tools, and a choice among none.
_OF_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_NOT_REPEATED = "The call was interrupted; whether it was carried out is unknown, and it was not repeated."


class LoopServices:
    """What all loops of a client share."""

    __slots__ = ("chain", "limits", "tools", "wall")

    def __init__(self, chain: Chain, tools: ToolSupervisor, *, limits: ToolLimits, wall: Callable[[], float]) -> None:
        self.chain = chain
        self.tools = tools
        self.limits = limits
        self.wall = wall


class TurnLoop:
    """The loop of turns with these extras; see `_rounds.TakeRounds`. It holds nothing of a turn and may be kept."""

    __slots__ = ("_extras", "_services")

    def __init__(self, services: LoopServices, extras: TurnExtras | None = None) -> None:
        self._services = services
        self._extras = extras or _NO_EXTRAS

    def __eq__(self, other: object) -> bool:
        """Whether turns may be taken by one as by the other."""
        return isinstance(other, TurnLoop) and (self._services, self._extras) == (other._services, other._extras)

    __hash__ = object.__hash__

    @property
    def has_tools(self) -> bool:
        """Whether it can run anything; extensions may add more."""
        return self._extras.tools is not None

    def recall(self, answer: ChatResult) -> ChatResult[object]:
        """The stored answer of a turn, with its value; raises `InvalidOutputError` where it has not the form."""
        if self._extras.form is None:
            return answer
        rounds = Rounds(self._extras, tools=None, limits=self._services.limits, may_reask=False)
        rounds.records, rounds.reports = answer.rounds, list(answer.tool_calls)
        return cast("Finish", rounds.take(answer)).result

    async def __call__(self, journal: RoundJournal) -> ChatResult[object]:
        """Take the turn of `journal` to its answer, which is committed, and return what extensions make of it.

        Raises the errors of the requests, of the extensions, of the journal, and `InvalidOutputError`. A cancel
        leaves what tools have done to the journal.
        """
        chain = self._services.chain
        if chain.is_empty:
            return await _Turn(self._services, self._extras, journal).run()
        request = journal.request()
        extras = self._extras
        state = ChatState(request.options, request.messages(), extras.tools, principal=extras.principal)

        async def innermost() -> None:
            turn = _Turn(self._services, self._extras, journal, state=state, base=request)
            state.result = await turn.run()

        return await chain.run(chain.context_of(request, is_streamed=journal.is_streamed), state, innermost)


class _Turn:
    """One turn on its way."""

    def __init__(
        self,
        services: LoopServices,
        extras: TurnExtras,
        journal: RoundJournal,
        *,
        state: ChatState | None = None,
        base: TurnRequest | None = None,
    ) -> None:
        self._services = services
        self._extras = extras
        self._journal = journal
        self._tools = extras.tools if state is None else state.tools
        self._change = None if state is None or base is None else _Change(state, base)
        self._limits = extras.limits or services.limits
        self._asked_again = b""
        self._calls = ToolTurn(
            limits=self._limits,
            principal=extras.principal,
            approve=self._approve,
            within=journal.as_tool,
            session=journal.session,
            turn_id=journal.turn_id,
            token=extras.token,
            guard=services.tools.guard,
        )

    async def run(self) -> ChatResult[object]:
        """Ask, run tools and ask again until there is an answer."""
        journal = self._journal
        rounds = Rounds(self._extras, tools=self._tools, limits=self._limits, may_reask=not journal.is_streamed)
        last: ChatResult[object] | None = None
        try:
            if journal.open_calls and journal.pending is not None:
                rounds.rounds_made = 1
                await self._answer_calls(journal.pending, rounds)
            while True:
                last = answer = await self._ask(rounds)
                step = await self._decide(answer, rounds)
                if isinstance(step, Finish):
                    await journal.commit(step.result)
                    return step.result
        except GorouterError as exc:
            # What was paid for is not lost with what failed after it.
            exc.partial = exc.partial or last
            raise

    async def _decide(self, answer: ChatResult, rounds: Rounds) -> Finish | CallTools | AskAgain:
        """Do what follows an answer, as far as it is not its end."""
        failure: GorouterError | None = None
        step: Finish | CallTools | AskAgain | None = None
        try:
            step = rounds.take(answer)
        except GorouterError as exc:
            failure = exc
        if failure is not None or step is None:
            await self._journal.discarded(answer)
            raise cast("GorouterError", failure)
        match step:
            case Finish():
                pass
            case CallTools():
                self._asked_again = b""
                await self._journal.called(answer)
                await self._answer_calls(answer.message, rounds)
            case AskAgain():
                await self._journal.discarded(answer)
                added = step.messages()
                self._asked_again = b"%b,%b" % (self._asked_again, added) if self._asked_again else added
            case _:
                assert_never(step)
        return step

    # Requests

    async def _ask(self, rounds: Rounds) -> ChatResult:
        """The model asked for, then each fallback until one answers."""
        request = self._request(rounds)
        for fallback in self._extras.fallbacks:
            try:
                return await self._journal.send(request)
            except GorouterError as exc:
                if not warrants_fallback(exc):
                    raise
            request = request.for_model(fallback)
        return await self._journal.send(request)

    def _request(self, rounds: Rounds) -> TurnRequest:
        request = self._journal.request()
        if self._change is not None:
            request = self._change.applied(request)
        if rounds.rounds_made:
            request = request.free_to_answer().with_purpose("tool_round")
        return request.with_more(self._asked_again).with_purpose("reask") if self._asked_again else request

    # Tools

    async def _answer_calls(self, message: AssistantMessage, rounds: Rounds) -> None:
        """Give each open call its result, and write down each as it comes."""
        journal = self._journal
        is_open = set(journal.open_calls)
        calls = [] if message.tool_calls is UNSET else unique_calls(message.tool_calls)
        calls = [call for call in calls if call.id in is_open]
        doubtful = [call for call in calls if call.id in journal.in_doubt and not self._may_repeat(call)]
        if doubtful:
            reports = [_not_repeated(call) for call in doubtful]
            rounds.reports += reports
            await journal.answered([ToolMessage(call.id, _NOT_REPEATED) for call in doubtful], reports)
            calls = [call for call in calls if call not in doubtful]
        if calls:
            await self._run_calls(calls, rounds)

    async def _run_calls(self, calls: Sequence[ToolCall], rounds: Rounds) -> None:
        journal = self._journal
        tools = self._tools or _NO_TOOLS
        work = self._services.tools.round(calls, tools, turn=self._calls, on_event=journal.emit)
        written: set[str] = set()

        async def write(outcomes: Sequence[ToolOutcome]) -> None:
            await journal.answered(*_parts(outcomes))
            written.update(outcome.message.tool_call_id for outcome in outcomes)

        try:
            # Written down as they come, reported in the order of the calls.
            rounds.reports += [outcome.report for outcome in await work.run(write=write)]
        except BaseException:
            _keep(journal, work, written)
            raise

    def _may_repeat(self, call: ToolCall) -> bool:
        tool = None if self._tools is None else self._tools.find(call.function.name)
        return tool is not None and tool.idempotent

    async def _approve(self, request: ApprovalRequest) -> ApprovalDecision | None:
        """Ask the program; if it leaves the question open, or there is none to ask, park the call for somebody else."""
        if self._extras.approve is not None:
            decision = await self._extras.approve(request)
            if decision is not None:
                return decision
        question = Question(
            question_id=request.question_id,
            call_id=request.call_id,
            question=request,
            until_s=request.expires_at_s,
        )
        reply = await self._journal.parked(question)
        if reply is None:
            return ApprovalDecision(request=request, approved=False, reason="nobody has approved it in time")
        return _decision_of(request, reply)


class _Change:
    """What extensions have made of the first request, for every request of the turn."""

    def __init__(self, state: ChatState, base: TurnRequest) -> None:
        self._base_options = base.options
        self._base_messages = base.messages()
        self._options, self._messages = state.encoded()
        self._settings = base.settings
        if state.tools_were_changed:
            self._options = _with_tools(self._options, state.tools)
        if self._options is not self._base_options:
            self._settings = settings_of_whole(state.options, base.settings)

    def applied(self, request: TurnRequest) -> TurnRequest:
        """The request with the changes; what was added to the first one follows what they made of that."""
        if self._options is not self._base_options:
            request = request.with_options(self._options, self._settings)
        if self._messages is self._base_messages:
            return request
        messages = request.messages()
        added = messages[len(self._base_messages) :] if messages.startswith(self._base_messages) else b""
        return request.with_messages(self._messages + added)


def _with_tools(options: bytes, tools: ToolSet | None) -> bytes:
    """The options with these tools and no others; without any, nothing is left that speaks of tools."""
    if tools is not None and len(tools):
        return join_options(options, b'{"tools":%b}' % tools.encoded)
    return encode_json({name: raw for name, raw in split_object(options).items() if name not in _OF_TOOLS})


def _parts(outcomes: Sequence[ToolOutcome]) -> tuple[list[ToolMessage], list[ToolCallReport]]:
    return [outcome.message for outcome in outcomes], [outcome.report for outcome in outcomes]


def _keep(journal: RoundJournal, work: ToolRound, written: set[str]) -> None:
    """Of a round that was cut off, leave to the journal what its tools have done."""
    done = [
        outcome
        for outcome in work.outcomes
        if outcome is not None and outcome.report.has_run and outcome.message.tool_call_id not in written
    ]
    journal.keep(*_parts(done))


def _not_repeated(call: ToolCall) -> ToolCallReport:
    return ToolCallReport(
        call_id=call.id,
        name=call.function.name,
        status="cancelled",
        raw_arguments=call.function.arguments,
        text=_NOT_REPEATED,
    )


def _decision_of(request: ApprovalRequest, reply: bytes) -> ApprovalDecision:
    """A reply is true or false, or an object with `approved`, `reason` and `by`; anything else does not approve."""
    try:
        said = decode_json(reply)
    except DecodeError:
        said = None
    fields = said if isinstance(said, dict) else {"approved": said}
    return ApprovalDecision(
        request=request,
        approved=fields.get("approved") is True,
        reason=str(fields.get("reason") or ""),
        by=str(fields.get("by") or ""),
    )
