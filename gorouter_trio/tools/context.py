"""What a tool may know about the call that it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..security.rules import Principal

__all__ = ["ToolContext"]


@final
class ToolContext:
    """The call that a tool serves: given to a parameter that is annotated with this type, never to the model.

    `principal` is who is asking, None where nobody authenticated. `session` and `turn_id` are those of the
    conversation, None in a chat without one. `deadline` is on the clock of trio; `remaining_s` is what is left.
    `idempotent` says that the tool was declared so: the call may have run before, in a turn that was resumed.
    `token` is opaque: who gives work to a session from inside a tool hands it on, so that a tool which calls
    into its own session is refused instead of waiting for itself.

    Its fields do not change. It may be used from the tool's thread.
    """

    __slots__ = (
        "_clock",
        "_report",
        "call_id",
        "deadline",
        "idempotent",
        "principal",
        "session",
        "token",
        "tool",
        "turn_id",
    )

    def __init__(
        self,
        *,
        tool: str,
        call_id: str = "",
        principal: Principal | None = None,
        session: str | None = None,
        turn_id: str | None = None,
        deadline: float = float("inf"),
        idempotent: bool = False,
        token: object = None,
        report: Callable[[str, float | None], None] | None = None,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.tool = tool
        self.call_id = call_id
        self.principal = principal
        self.session = session
        self.turn_id = turn_id
        self.deadline = deadline
        self.idempotent = idempotent
        self.token = token
        self._report = report
        self._clock = clock

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; zero or less when it has passed."""
        return self.deadline - self._clock()

    def progress(self, message: str, *, fraction: float | None = None) -> None:
        """Tell whoever watches how far the tool is; `fraction` is 0 to 1. Never waits, and may be lost.

        A long message is cut; of many in a row from a thread or a process only the newest is told.
        """
        if self._report is not None:
            self._report(message, fraction)

    def __repr__(self) -> str:
        return f"ToolContext(tool={self.tool!r}, call_id={self.call_id!r}, session={self.session!r})"
