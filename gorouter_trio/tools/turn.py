"""What the calls of one turn share: who asks, the limits, what was called before, and who approves. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from ..config import ToolLimits
from ..security.rules import Principal
from .arguments import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..security.rules import ToolGuard

__all__ = ["ApprovalDecision", "ApprovalRequest", "Approve", "ToolTurn"]


class ApprovalRequest(Struct, frozen=True, kw_only=True):
    """A question for a human: may this tool run with exactly these arguments for this principal?

    `arguments` is canonical JSON text: sorted names, no white space. `expires_at_s` is wall-clock seconds since
    the epoch; an answer that comes later counts for nothing. Can be stored, and answered after a restart.
    """

    tool: str
    arguments: str
    call_id: str
    principal: Principal | None = None
    session: str | None = None
    turn_id: str | None = None
    expires_at_s: float = 0.0

    @property
    def question_id(self) -> str:
        """What a reply names: the id of the call, and what tells it from every other call with that id.

        Some engines number their calls anew in each answer. A reply that comes late must not be taken for one to
        another call, of another turn or with other arguments.
        """
        call = "\0".join((self.turn_id or "", self.call_id, self.tool, self.arguments))
        mark = hashlib.blake2b(call.encode("utf-8", "surrogatepass"), digest_size=6)
        return f"{self.call_id}-{mark.hexdigest()}"

    def is_same_call(self, other: ApprovalRequest) -> bool:
        """Whether both ask about one and the same call, by whoever and whenever it is asked."""
        return self._call() == other._call()

    def _call(self) -> tuple[object, ...]:
        who = None if self.principal is None else (self.principal.tenant, self.principal.id)
        return (self.tool, self.arguments, self.call_id, who, self.session, self.turn_id)


class ApprovalDecision(Struct, frozen=True, kw_only=True):
    """The answer to `request`: of use for that call only, and until the request expires.

    `reason` is for the log and the report, `by` says who decided.
    """

    request: ApprovalRequest
    approved: bool
    reason: str = ""
    by: str = ""

    def allows(self, request: ApprovalRequest, *, wall: float) -> bool:
        """Whether the call that `request` asks about may run now, at `wall` seconds since the epoch."""
        return self.approved is True and self.request.is_same_call(request) and wall < self.request.expires_at_s


Approve: TypeAlias = Callable[[ApprovalRequest], Awaitable[ApprovalDecision | None]]
"""Asks whoever may approve a call; None leaves the call open, to be answered later."""


class ToolTurn:
    """One turn, for as many rounds of calls as it has. Make one a turn and give it to each round.

    `session` and `turn_id` are told to tools and to the guard. `token` is handed to tools unseen (see
    `ToolContext.token`). `approve` is asked for each sensitive call; None from it leaves the call open, to be
    answered later: see `ToolRound.open_requests`. Without it sensitive calls are refused. `decisions` are
    answers that came earlier, which are looked at first. `calls_made` are calls of rounds before this object.
    `guard` stands in front of its calls to its end, in place of the supervisor's, which may be exchanged meanwhile.
    `within` gives a context manager that is entered around each call, in the task that the tool's own is a child
    of: so whoever owns the turn knows who works for it.
    """

    __slots__ = (
        "_digests",
        "approve",
        "calls_made",
        "decisions",
        "guard",
        "limits",
        "principal",
        "session",
        "token",
        "turn_id",
        "within",
    )

    def __init__(
        self,
        *,
        limits: ToolLimits | None = None,
        principal: Principal | None = None,
        session: str | None = None,
        turn_id: str | None = None,
        token: object = None,
        approve: Approve | None = None,
        decisions: Iterable[ApprovalDecision] = (),
        calls_made: int = 0,
        guard: ToolGuard | None = None,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.limits = ToolLimits() if limits is None else limits
        self.principal = principal
        self.session = session
        self.turn_id = turn_id
        self.token = token
        self.approve = approve
        self.decisions = tuple(decisions)
        self.calls_made = calls_made
        self.guard = guard
        self.within = within
        self._digests: dict[bytes, int] = {}

    def count_call(self) -> str | None:
        """Count one call that the model asked for; what to tell it when there were too many."""
        self.calls_made += 1
        if self.calls_made > self.limits.max_calls:
            return f"no more tool calls in this turn: it has had {self.limits.max_calls}; answer with what is known"
        return None

    def count_repeat(self, tool: str, arguments: object) -> str | None:
        """Count one call by what it says; what to tell the model when it repeats itself."""
        digest = digest_of(tool, arguments)
        times = self._digests[digest] = self._digests.get(digest, 0) + 1
        if times > self.limits.max_repeats:
            return f"the same call was made {self.limits.max_repeats} times in this turn; it will not be made again"
        return None

    def decision_on(self, request: ApprovalRequest) -> ApprovalDecision | None:
        """The answer that was given to this call earlier, whatever it was."""
        return next((d for d in self.decisions if d.request.is_same_call(request)), None)
