"""The supervisor: runs what a model asks for, and gives one outcome a call, whatever happens.

Theory of operation. A *round* is the calls of one answer. Each call is a job, and each job that has begun is a task
of the supervisor, not of whoever asked: so a tool that will not end holds up nobody. The round waits, in the
caller's task, for its jobs to be *settled*, which is to have an outcome: the job settles itself when it ends, and
the round settles it when it has not ended a grace time after its deadline, or when the round is cancelled. A job is
settled once; what its tool does afterwards concerns nobody, but is counted until it has ended.

The checks of a call come first, in the order of the calls, and do not wait; a call that passes them is a job:
whoever has to approve is asked, and then the tool runs, in a task on a leash, in a thread, or in a process. A tool
may raise anything, also what is meant to end programs: it is captured, never caught, and Ctrl-C itself does not
arrive there. A tool's task has a nursery to itself, so that what it leaves open breaks that nursery and nothing else.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import textwrap
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final, cast, final

import outcome
import trio

from ..config import ToolLimits
from ..errors import ActorGoneError
from ..events import ToolEvent, ToolFinished, ToolProgress, ToolStarted
from ..pool.tracing import ToolStart
from ..security.rules import Allow, Deny, ToolAudit, ToolCheck
from ..wire.toolcalls import ToolCallError, ToolCallReport
from .arguments import ArgumentsError, canonical_json, parse_arguments
from .context import ToolContext
from .frames import ChildRequest
from .leash import Leash, unshield
from .outcomes import (
    Ending,
    ToolOutcome,
    captured_reason,
    ending_of_child_error,
    ending_of_denial,
    ending_of_error,
    ending_of_refusal,
    make_outcome,
    unique_calls,
)
from .results import EncodedResult, encode_result, sendable
from .statistics import ToolCallStatistics, ToolStatistics
from .threads import ThreadPool, TooManyThreadsError
from .turn import ApprovalRequest, ToolTurn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from typing import TypeAlias

    from ..pool.tracing import ToolSpans, Tracers
    from ..security.rules import Decision, Principal, ToolGuard
    from ..wire.messages import ToolCall
    from .process import ProcessPool
    from .registry import AnyTool, ToolSet

    _Write: TypeAlias = Callable[[list[ToolOutcome]], Awaitable[None]]

__all__ = ["ToolRound", "ToolSupervisor", "open_supervisor"]

_LOG = logging.getLogger(__name__)
_MAX_PROGRESS: Final = 1_000
_MAX_PROGRESS_TEXT: Final = 1_024
_NOT_RUN: Final = "the call was not run: the turn was cancelled before its turn came"
_CANCELLED: Final = "the turn was cancelled while the tool ran; whether it had an effect is not known"


@asynccontextmanager
async def open_supervisor(
    limits: ToolLimits | None = None,
    *,
    guard: ToolGuard | None = None,
    wall: Callable[[], float],
) -> AsyncIterator[ToolSupervisor]:
    """Run a supervisor; `limits` gives what holds for all turns together, `wall` seconds since the epoch.

    Leaving cancels what runs, and kills its processes; a tool that does not end then is given up, except a task that
    swallows every cancel while it has tasks of its own. Threads end when they end.
    """
    async with trio.open_nursery() as nursery:
        supervisor = ToolSupervisor(nursery, ToolLimits() if limits is None else limits, guard=guard, wall=wall)
        try:
            yield supervisor
        finally:
            await supervisor.aclose()


@final
class ToolSupervisor:
    """Runs rounds of calls. Made by `open_supervisor`.

    `guard` stands in front of every call; without one, tools that declare rules are refused. It may be exchanged.
    """

    def __init__(
        self, nursery: trio.Nursery, limits: ToolLimits, *, guard: ToolGuard | None, wall: Callable[[], float]
    ) -> None:
        self.guard = guard
        self.tracers: Tracers | None = None
        self.on_denied: Callable[[ToolCheck, Principal | None, Deny], None] | None = None
        """Who is told of a call that must not run; it must neither wait nor raise."""
        self.limits = limits
        self.wall = wall
        self._nursery = nursery
        self._is_closed = False
        self._slots = trio.CapacityLimiter(limits.max_running)
        self._tool_slots: dict[AnyTool, trio.CapacityLimiter] = {}
        self._threads = ThreadPool(threads=limits.max_threads, abandoned=limits.max_abandoned_threads)
        self._processes: ProcessPool | None = None
        self._jobs: set[_Job] = set()
        self._calls = 0
        self._failures = 0

    def round(
        self,
        calls: Sequence[ToolCall],
        tools: ToolSet,
        *,
        turn: ToolTurn,
        on_event: Callable[[ToolEvent], None] | None = None,
    ) -> ToolRound:
        """A round of calls, not begun yet: `await round.run()`. `on_event` must not wait."""
        return ToolRound(self, calls, tools=tools, turn=turn, on_event=on_event)

    async def run_round(
        self,
        calls: Sequence[ToolCall],
        tools: ToolSet,
        *,
        turn: ToolTurn,
        on_event: Callable[[ToolEvent], None] | None = None,
    ) -> list[ToolOutcome]:
        """One outcome a call, in the order of the calls: `ToolRound.run` of a new round.

        For calls that wait for an approval, and for what was done when a round is cancelled, use `round`.
        """
        return await self.round(calls, tools, turn=turn, on_event=on_event).run()

    def call_of(self, task: trio.lowlevel.Task) -> ToolContext | None:
        """The call that a task works for, as far as its tool runs in a task; None outside of tools.

        So a session can refuse to be called from its own tools, where nobody handed a token on.
        """
        hosts = {job.host: job.context for job in self._jobs if job.host is not None}
        each: trio.lowlevel.Task | None = task
        while each is not None:
            if each in hosts:
                return hosts[each]
            each = each.parent_nursery.parent_task if each.parent_nursery is not None else None
        return None

    def statistics(self) -> ToolStatistics:
        """A snapshot."""
        return ToolStatistics(
            running=len(self._jobs),
            given_up=sum(job.is_settled for job in self._jobs),
            threads=self._threads.running,
            abandoned_threads=self._threads.abandoned,
            processes=0 if self._processes is None else self._processes.running,
            calls=self._calls,
            failures=self._failures,
        )

    def inspect(self, now: float) -> tuple[ToolCallStatistics, ...]:
        """The calls that have begun and not ended, at `now` on the trio clock."""
        return tuple(job.statistics(now) for job in self._jobs)

    async def aclose(self) -> None:
        """Cancel what runs, and give it up where it does not end; shielded, and bounded."""
        self._is_closed = True
        self._nursery.cancel_scope.cancel()
        for job in self._jobs:
            job.abort()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(self.limits.grace_s):
                while self._jobs:
                    await next(iter(self._jobs)).ended.wait()
            for job in self._jobs:
                job.break_in()
            if self._processes is not None:
                await self._processes.aclose()

    # For rounds

    def start(self, job: _Job) -> None:
        """Check a call, and begin a job for it when it passes; raises `ActorGoneError` when this is closed."""
        if self._is_closed:
            raise ActorGoneError("the tools of this client are closed")
        checked = outcome.capture(self._check, job)
        if isinstance(checked, outcome.Error):
            job.settle(ending_of_error(checked.error))
            return
        if checked.value is not None:
            job.settle(checked.value)
            return
        self._jobs.add(job)
        self._nursery.start_soon(self._run_job, job, name=f"tool {job.call.function.name[:40]}")

    def note_settled(self, report: ToolCallReport, turn: ToolTurn, *, spans: ToolSpans | None) -> None:
        """Count a call and tell the guard of it, and whoever traces it: of one that never ran, all at once."""
        if self.tracers and spans is None:
            spans = self.tracers.begin_tool(
                ToolStart(tool=report.name, call_id=report.call_id, session=turn.session, turn_id=turn.turn_id)
            )
        if spans is not None:
            spans.finished(report)
        self._calls += 1
        self._failures += not report.is_success
        guard = turn.guard or self.guard
        if guard is None:
            return
        record = ToolAudit(
            tool=report.name,
            principal=turn.principal,
            arguments=report.raw_arguments if report.arguments is None else report.arguments,
            status=report.status,
            call_id=report.call_id,
            session=turn.session,
            error=None if report.error is None else report.error.message,
            duration_s=report.duration_s,
            at_s=self.wall(),
        )
        _contained(guard.audit, record)

    # Jobs

    @trio.lowlevel.enable_ki_protection
    async def _run_job(self, job: _Job) -> None:
        """A job from its first check to its end. Whatever happens in it ends here."""
        captured = await outcome.acapture(self._attempt, job)
        if isinstance(captured, outcome.Error):
            job.settle(job.ending_of(captured.error))
        else:
            job.settle(captured.value)
        self._jobs.discard(job)
        job.ended.set()

    async def _attempt(self, job: _Job) -> Ending:
        with job.scope:
            job.host = trio.lowlevel.current_task()
            with job.turn.within():
                refused = await self._seek_approval(job)
                return await self._run_ready(job) if refused is None else refused
        return job.ending_of(None)

    @trio.lowlevel.enable_ki_protection
    def _check(self, job: _Job) -> Ending | None:
        """All checks that do not wait: an ending where one fails."""
        name, turn = job.call.function.name, job.turn
        refused = turn.count_call()
        if refused is not None:
            return ending_of_refusal("error_limit", refused)
        if not name:
            return ending_of_refusal("error_unknown", "the call names no tool")
        if job.tool is None:
            return ending_of_refusal("error_not_found", f"there is no tool called {name[:64]!r}")
        try:
            job.arguments = parse_arguments(job.call.function.arguments, max_bytes=turn.limits.max_argument_bytes)
        except ArgumentsError as exc:
            return ending_of_refusal("error_parsing", str(exc))
        try:
            job.bind()
        except ArgumentsError as exc:
            return ending_of_refusal("error_validation", str(exc))
        return self._judge(job, job.tool)

    def _judge(self, job: _Job, tool: AnyTool) -> Ending | None:
        """What the guard says, and whether the call was made before."""
        check = ToolCheck(
            tool=tool.name,
            arguments=job.arguments,
            rules=tool.rules,
            call_id=job.call.id,
            session=job.turn.session,
        )
        decision = self._decide(check, job.turn)
        if not isinstance(decision, Allow):
            if self.on_denied is not None:
                self.on_denied(check, job.turn.principal, decision)
            return ending_of_denial(decision)
        refused = job.turn.count_repeat(tool.name, job.arguments)
        return None if refused is None else ending_of_refusal("error_limit", refused)

    def _decide(self, check: ToolCheck, turn: ToolTurn) -> Decision:
        """Fails closed: what no guard can judge does not run."""
        guard = turn.guard or self.guard
        if guard is None:
            if check.rules is None:
                return Allow()
            return Deny(
                reason="access", message=f"tool {check.tool} declares rules, and there is no guard to hold it to them"
            )
        judge = functools.partial(guard.check, turn.principal, check, now=trio.current_time(), wall=self.wall())
        decided = outcome.capture(judge)
        if isinstance(decided, outcome.Error):
            _LOG.error("the guard failed on tool %s: %s", check.tool, captured_reason(decided.error))
            return Deny(reason="access", message=f"the guard failed: {captured_reason(decided.error)}")
        if isinstance(decided.value, (Allow, Deny)):
            return decided.value
        return Deny(reason="access", message=f"the guard gave a {type(decided.value).__name__} instead of a decision")

    async def _seek_approval(self, job: _Job) -> Ending | None:
        """Ask, where the tool is sensitive: None when the call may run."""
        tool, turn = cast("AnyTool", job.tool), job.turn
        if tool.rules is None or not tool.rules.sensitive:
            return None
        request = job.approval_request(self.wall())
        decision = turn.decision_on(request)
        if decision is None and turn.approve is not None:
            job.phase = "approval"
            job.set_deadline(trio.current_time() + turn.limits.approval_s)
            decision = await turn.approve(request)
            job.set_deadline(math.inf)
            if decision is None:
                job.leave_open(request)
                return None
        if decision is not None and decision.allows(request, wall=self.wall()):
            return None
        if decision is None:
            why = "nobody can be asked to approve it"
        else:
            why = decision.reason or ("the approval has expired" if decision.approved else "it was not approved")
        return ending_of_refusal(
            "error_security", "this call was not approved", error=ToolCallError(type="approval", message=why)
        )

    async def _run_ready(self, job: _Job) -> Ending:
        """Run a call that has passed every check; its time begins here, waiting for a place included."""
        if job.is_open:
            return Ending("cancelled", _NOT_RUN)
        tool = cast("AnyTool", job.tool)
        job.begin(trio.current_time() + (job.turn.limits.timeout_s if tool.timeout_s is None else tool.timeout_s))
        async with self._slot_of(tool), self._slots:
            job.phase = "running"
            job.trace(self.tracers)
            job.tell_started()
            match tool.isolation:
                case "process":
                    return await self._run_in_process(job, tool)
                case "thread":
                    return await self._run_in_thread(job)
                case _:
                    return await self._run_in_task(job)

    @asynccontextmanager
    async def _slot_of(self, tool: AnyTool) -> AsyncIterator[None]:
        """One of the places of a tool that has a number of its own."""
        if tool.max_parallel is None:
            yield
            return
        limiter = self._tool_slots.setdefault(tool, trio.CapacityLimiter(tool.max_parallel))
        try:
            async with limiter:
                yield
        finally:
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._tool_slots.pop(tool, None)

    async def _run_in_task(self, job: _Job) -> Ending:
        # Not for concurrency: a scope or a nursery that the tool leaves open breaks this one only.
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112 - see above
            nursery.start_soon(job.capture_tool, name=f"tool {job.call.function.name[:40]}")
        return job.ending_of_captured(cast("outcome.Outcome[EncodedResult]", job.captured))

    async def _run_in_thread(self, job: _Job) -> Ending:
        try:
            captured = await self._threads.run(functools.partial(outcome.capture, job.call_tool))
        except TooManyThreadsError as exc:
            return ending_of_refusal("error_limit", "this tool cannot be run now", error=_row_of(exc))
        return job.ending_of_captured(captured)

    async def _run_in_process(self, job: _Job, tool: AnyTool) -> Ending:
        from .process import ProcessError, ProcessPool

        if self._processes is None:
            self._processes = ProcessPool(self.limits)
        request = job.child_request(tool, self.limits.max_process_bytes)
        try:
            answer = await self._processes.run(request, on_progress=job.tell_progress)
        except (ProcessError, OSError) as exc:
            return ending_of_error(exc)
        if isinstance(answer, EncodedResult):
            return Ending("success", answer.text, result=answer)
        return ending_of_child_error(answer)


@final
class ToolRound:
    """The calls of one answer. Made by `ToolSupervisor.round`; to be run once.

    `outcomes` has a place for each call, None while it has no outcome: so after a cancel it tells which calls
    ended and what the others are to be answered with. `open_requests` are approvals that were asked for and not
    given; their calls have no outcome, and are to be run in a round of their own when the answers are in the
    `decisions` of its turn.
    """

    def __init__(
        self,
        supervisor: ToolSupervisor,
        calls: Sequence[ToolCall],
        *,
        tools: ToolSet,
        turn: ToolTurn,
        on_event: Callable[[ToolEvent], None] | None,
    ) -> None:
        self._supervisor = supervisor
        self._turn = turn
        self._on_event = on_event
        self._changed = trio.Event()
        self._wakes_at = math.inf
        self._has_run = False
        self._unwritten: list[ToolOutcome] = []
        self._jobs = [_Job(self, call, turn=turn, tool=tools.find(call.function.name)) for call in unique_calls(calls)]

    @property
    def outcomes(self) -> list[ToolOutcome | None]:
        """One place a call, in the order of the calls."""
        return [job.outcome for job in self._jobs]

    @property
    def open_requests(self) -> list[ApprovalRequest]:
        """What was asked and not answered."""
        return [job.request for job in self._jobs if job.request is not None]

    async def run(self, *, write: _Write | None = None) -> list[ToolOutcome]:
        """Run the calls and return their outcomes, in the order of the calls; those left open are not among them.

        `write` is awaited, in the caller's task, with the outcomes that are new, in the order in which they came: to
        store them while other calls still run. What it raises ends the round like a cancel. After a cancel it is not
        called any more: what it has not seen is in `outcomes`.

        Cancelling stops the tools, waits for them for at most twice the grace time, and leaves an outcome for every
        call in `outcomes` before it goes on. Raises `ActorGoneError` when the supervisor is closed.
        """
        if self._has_run:
            raise RuntimeError("a round of tool calls runs once")
        self._has_run = True
        for job in self._jobs:
            job.caller_deadline = trio.current_effective_deadline()
        try:
            await trio.lowlevel.checkpoint()
            while not self._is_over():
                self._start_more()
                await self._wait_for_change()
                self._give_up(trio.current_time())
                await self._write_new(write)
        finally:
            if not self._is_over():
                await self._abort()  # noqa: ASYNC102 - shields itself, and is bounded
        return [job.outcome for job in self._jobs if job.outcome is not None]

    async def _write_new(self, write: _Write | None) -> None:
        while self._unwritten and write is not None:
            new, self._unwritten = self._unwritten, []
            await write(new)

    def note_change(self) -> None:
        """A job was settled, or left open."""
        self._changed.set()

    def note_due(self, due_at: float) -> None:
        """A job has a deadline now, which may be before the one that the round waits for."""
        if due_at < self._wakes_at:
            self._changed.set()

    def note_settled(self, settled: ToolOutcome, spans: ToolSpans | None) -> None:
        """A job was settled: tell everybody."""
        self._supervisor.note_settled(settled.report, self._turn, spans=spans)
        self._unwritten.append(settled)
        report = settled.report
        self.tell(ToolFinished(report.call_id, report.name, report.status, report.text, report.duration_s))
        self.note_change()

    def tell(self, event: ToolEvent) -> None:
        """Give an event to whoever listens; what they raise stays here."""
        if self._on_event is not None:
            _contained(self._on_event, event)

    def _is_over(self) -> bool:
        return all(job.is_settled or job.is_open for job in self._jobs)

    def _start_more(self) -> None:
        limits = self._turn.limits
        room = limits.max_parallel if limits.parallel else 1
        room -= sum(job.has_begun and not (job.is_settled or job.is_open) for job in self._jobs)
        for job in self._jobs:
            if room > 0 and not job.has_begun:
                job.has_begun = True
                self._supervisor.start(job)
                room -= not job.is_settled

    async def _wait_for_change(self) -> None:
        self._wakes_at = min((job.due_at for job in self._jobs if not job.is_settled), default=math.inf)
        with trio.move_on_at(self._wakes_at):
            await self._changed.wait()
        self._changed = trio.Event()

    def _give_up(self, now: float) -> None:
        """Settle the jobs that have not ended a grace time after their deadline."""
        for job in self._jobs:
            if not job.is_settled and now >= job.due_at:
                job.break_in()
                job.settle(job.ending_of(None))

    async def _abort(self) -> None:
        """Stop what runs and settle everything; shielded, and bounded."""
        begun = [job for job in self._jobs if job.has_begun and not job.is_settled]
        for job in self._jobs:
            job.abort()
        with trio.CancelScope(shield=True):
            await self._wait_ended(begun)
            for job in begun:
                job.break_in()
            await self._wait_ended(begun)
        for job in self._jobs:
            if not job.is_open:
                job.settle(job.ending_of(None))

    async def _wait_ended(self, jobs: list[_Job]) -> None:
        """Wait for the jobs, but not longer than the grace time."""
        with trio.move_on_after(self._turn.limits.grace_s):
            for job in jobs:
                await job.ended.wait()


@final
class _Job:
    """One call on its way to its outcome."""

    def __init__(self, round_: ToolRound, call: ToolCall, *, turn: ToolTurn, tool: AnyTool | None) -> None:
        self.call = call
        self.turn = turn
        self.tool = tool
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.host: trio.lowlevel.Task | None = None
        self.arguments: dict[str, object] | None = None
        self.context: ToolContext | None = None
        self.outcome: ToolOutcome | None = None
        self.request: ApprovalRequest | None = None
        self.captured: outcome.Outcome[EncodedResult] | None = None
        self.phase = "checks"
        self.has_begun = False
        self.is_aborted = False
        self.caller_deadline = math.inf
        self._round = round_
        self._ready: Callable[[], object] | None = None
        self._leash: Leash[object] | None = None
        self._began_at: float | None = None
        self._progress = 0
        self._newest: tuple[str, float | None] = ("", None)
        self._token: trio.lowlevel.TrioToken | None = None
        self._spans: ToolSpans | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is an outcome."""
        return self.outcome is not None

    @property
    def is_open(self) -> bool:
        """Whether the call waits for an approval that comes later."""
        return self.request is not None

    @property
    def due_at(self) -> float:
        """When to give the job up; never, as long as it has no deadline."""
        return self.scope.deadline + self.turn.limits.grace_s

    def statistics(self, now: float) -> ToolCallStatistics:
        """A snapshot."""
        return ToolCallStatistics(
            tool=self.call.function.name[:64],
            call_id=self.call.id,
            phase="given_up" if self.is_settled else self.phase,
            since_s=0.0 if self._began_at is None else now - self._began_at,
            session=self.turn.session,
            turn_id=self.turn.turn_id,
        )

    def bind(self) -> None:
        """Make the call ready; raises `ArgumentsError`."""
        tool = cast("AnyTool", self.tool)
        self._began_at = trio.current_time()
        self._token = trio.lowlevel.current_trio_token()
        self.context = ToolContext(
            tool=tool.name,
            call_id=self.call.id,
            principal=self.turn.principal,
            session=self.turn.session,
            turn_id=self.turn.turn_id,
            idempotent=tool.idempotent,
            token=self.turn.token,
            report=self._report,
            clock=trio.lowlevel.current_clock().current_time,
        )
        self._ready = tool.bind(self.arguments or {}, self.context)

    def approval_request(self, wall: float) -> ApprovalRequest:
        """What somebody has to approve."""
        return ApprovalRequest(
            tool=cast("AnyTool", self.tool).name,
            arguments=canonical_json(self.arguments).decode(),
            call_id=self.call.id,
            principal=self.turn.principal,
            session=self.turn.session,
            turn_id=self.turn.turn_id,
            expires_at_s=wall + self.turn.limits.approval_s,
        )

    def leave_open(self, request: ApprovalRequest) -> None:
        """Wait for an approval that comes later."""
        self.request = request
        self._round.note_change()

    def begin(self, deadline: float) -> None:
        """Set the deadline of the call, of which its tool is told."""
        # Whoever had to approve it has done so: what runs out now is the time for the tool.
        self.phase = "checks"
        self.set_deadline(deadline)
        cast("ToolContext", self.context).deadline = min(deadline, self.caller_deadline)

    def set_deadline(self, deadline: float) -> None:
        """Set when the call is cancelled, and with it when the round gives it up."""
        self.scope.deadline = deadline
        self._round.note_due(self.due_at)

    # The tool itself

    @trio.lowlevel.enable_ki_protection
    async def capture_tool(self) -> None:
        """Run an async tool, and keep what it returns or raises."""
        self.captured = await outcome.acapture(self._await_tool)

    async def _await_tool(self) -> EncodedResult:
        value = cast("Callable[[], object]", self._ready)()
        coroutine = value if inspect.iscoroutine(value) else _await(value)
        self._leash = Leash(coroutine, self.scope)
        try:
            return self._encoded(await self._leash)
        finally:
            self._leash.close()

    def call_tool(self) -> EncodedResult:
        """Run a sync tool; raises what it raises. Called in a thread."""
        return self._encoded(cast("Callable[[], object]", self._ready)())

    def child_request(self, tool: AnyTool, max_process_bytes: int | None) -> ChildRequest:
        """The call, for a process."""
        return ChildRequest(
            module=tool.function.__module__,
            qualname=tool.function.__qualname__,
            tool=tool.name,
            arguments=self.arguments or {},
            call_id=self.call.id,
            principal=self.turn.principal,
            session=self.turn.session,
            turn_id=self.turn.turn_id,
            remaining_s=cast("ToolContext", self.context).remaining_s,
            idempotent=tool.idempotent,
            raw_schema=tool.has_own_schema,
            max_result_bytes=self.max_result_bytes,
            keep_value=self.turn.limits.include_results,
            max_process_bytes=max_process_bytes,
        )

    @property
    def max_result_bytes(self) -> int:
        """How long the result may be."""
        own = None if self.tool is None else self.tool.max_result_bytes
        return self.turn.limits.max_result_bytes if own is None else own

    def _encoded(self, value: object) -> EncodedResult:
        return encode_result(value, max_bytes=self.max_result_bytes, keep_value=self.turn.limits.include_results)

    def abort(self) -> None:
        """Cancel the call: nobody waits for it any more."""
        self.is_aborted = True
        self.scope.cancel()

    def break_in(self) -> None:
        """See to it that the tool's task ends, if it can be made to."""
        if self._leash is not None:
            self._leash.is_cut = True
        if self.host is not None:
            unshield(self.host, within=self.scope)

    # Outcomes

    def settle(self, ending: Ending) -> None:
        """Give the call its outcome, once."""
        if self.is_settled or self.is_open:
            return
        began_at = self._began_at
        self.outcome = make_outcome(
            self.call,
            ending,
            arguments=self.arguments,
            max_bytes=self.max_result_bytes,
            keep_value=self.turn.limits.include_results,
            has_run=self.phase == "running",
            duration_s=0.0 if began_at is None else trio.current_time() - began_at,
        )
        if ending.error is not None and ending.status == "error_execution":
            _LOG.warning("tool %s failed: %s", self.call.function.name[:64], _log_text(ending.error))
        self._round.note_settled(self.outcome, self._spans)

    def ending_of_captured(self, captured: outcome.Outcome[EncodedResult]) -> Ending:
        """What a tool returned or raised."""
        if isinstance(captured, outcome.Value):
            return Ending("success", captured.value.text, result=captured.value)
        return self.ending_of(cast("outcome.Error", captured).error)

    def ending_of(self, error: BaseException | None) -> Ending:
        """What ended the job, where it did not end by itself: its deadline, a cancel, or `error`."""
        if self.is_aborted:
            return self._cancelled()
        if self.scope.cancel_called or trio.current_time() >= self.due_at:
            return self._late()
        if error is None or _is_cancel(error):
            return self._cancelled()
        if self.phase == "approval":
            row = _row_of(error, type_="approval")
            return ending_of_refusal("error_security", "this call was not approved", error=row)
        return ending_of_error(error)

    def _late(self) -> Ending:
        if self.phase == "approval":
            row = ToolCallError(type="approval", message="nobody answered in time")
            return ending_of_refusal("error_security", "this call was not approved", error=row)
        told = (
            "the tool did not end in time" if self.phase == "running" else "there was no room to run the tool in time"
        )
        return ending_of_refusal("error_timeout", told)

    def _cancelled(self) -> Ending:
        return ending_of_refusal("cancelled", _CANCELLED if self.phase == "running" else _NOT_RUN)

    # Events

    def trace(self, tracers: Tracers | None) -> None:
        """The tool begins to run, in a task or a thread that has the context variables of this one."""
        if not tracers:
            return
        self._spans = tracers.begin_tool(
            ToolStart(
                tool=cast("AnyTool", self.tool).name,
                call_id=self.call.id,
                description=cast("AnyTool", self.tool).description or "",
                session=self.turn.session,
                turn_id=self.turn.turn_id,
            )
        )
        self._spans.activate()

    def tell_started(self) -> None:
        """The tool begins to run."""
        function = self.call.function
        self._round.tell(ToolStarted(self.call.id, function.name, function.arguments))

    def tell_progress(self, message: str, fraction: float | None) -> None:
        """The tool says how far it is; in the thread of trio."""
        self._progress += 1
        if self.is_settled or self._progress > _MAX_PROGRESS:
            return
        share = fraction if isinstance(fraction, (int, float)) and 0 <= fraction <= 1 else None
        text = sendable(message[:_MAX_PROGRESS_TEXT])
        self._round.tell(ToolProgress(self.call.id, self.call.function.name, text, share))

    def _report(self, message: str, fraction: float | None) -> None:
        """The same from any thread."""
        # Here, where an error is the tool's own: on the loop it would end the whole program.
        message = str(message)[:_MAX_PROGRESS_TEXT]
        # A sync tool may run a trio of its own in its thread.
        if trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token:
            self.tell_progress(message, fraction)
            return
        self._newest = (message, fraction)
        with suppress(trio.RunFinishedError):
            cast("trio.lowlevel.TrioToken", self._token).run_sync_soon(self._tell_newest, idempotent=True)

    def _tell_newest(self) -> None:
        self.tell_progress(*self._newest)


async def _await(value: object) -> object:
    return await cast("Coroutine[object, object, object]", value)


def _is_cancel(error: BaseException) -> bool:
    """Whether there is nothing but cancels in it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_cancel(each) for each in error.exceptions)
    return isinstance(error, trio.Cancelled)


def _row_of(error: BaseException, *, type_: str = "") -> ToolCallError:
    return ToolCallError(type=type_ or type(error).__name__, message=captured_reason(error))


def _contained(function: Callable[..., object], argument: object) -> None:
    """Call something that is not ours; what it raises goes to the log."""
    captured = outcome.capture(function, argument)
    if isinstance(captured, outcome.Error):
        _LOG.error("%s failed: %s", getattr(function, "__qualname__", function), captured_reason(captured.error))


def _log_text(error: ToolCallError) -> str:
    """One entry of a log, in which no message can pass for another entry: all lines but the first are indented."""
    return (
        f"{error.type}: {error.message!r}\n{textwrap.indent(str(error.details.get('traceback', '')), '    ')}".rstrip()
    )
