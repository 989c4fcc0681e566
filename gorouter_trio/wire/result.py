"""What a call returns: one frozen value, the same for chat, stream and session turns."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Generic

from msgspec import UNSET, Struct

from .messages import AssistantMessage, Message
from .responses import Usage

if TYPE_CHECKING:
    # With a default, so that a plain `ChatResult` is one whose value is None; at run time the typing module's will do.
    from typing_extensions import TypeVar

    T_co = TypeVar("T_co", default=None, covariant=True)
else:
    from typing import TypeVar

    T_co = TypeVar("T_co", covariant=True)

__all__ = ["CallRecord", "ChatResult", "HistoryEntry"]


class CallRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known about the call that made an answer; stored beside the message in a history.

    `finished_at_s` is wall-clock seconds since the epoch. `queue_wait_s` is the time spent waiting
    for the pool, `ttft_s` the time from sending to the first data, `duration_s` everything from
    the caller's request to the whole answer. `attempts` counts requests sent, retries included.
    `maybe_billed` says that an attempt before this one may have been charged as well.
    `interrupted` marks an answer that was stopped before its end.
    """

    generation_id: str | None = None
    model: str | None = None
    provider: str | None = None
    finish_reason: str | None = None
    native_finish_reason: str | None = None
    usage: Usage | None = None
    attempts: int = 1
    maybe_billed: bool = False
    interrupted: bool = False
    queue_wait_s: float = 0.0
    ttft_s: float | None = None
    duration_s: float = 0.0
    finished_at_s: float = 0.0

    @property
    def cost(self) -> Decimal | None:
        """USD really charged, or None when the reply did not say: unknown is never zero."""
        return None if self.usage is None else self.usage.cost


class ChatResult(Struct, Generic[T_co], frozen=True, kw_only=True):
    """The answer to one chat, stream or session turn.

    `call` is the call that gave it, `rounds` are the calls before that in the same turn: those whose tools
    were run, and those whose answer had not the form that was asked for. `value` is the answer as the
    `response_type` that was asked for, None otherwise. `invalid` says why there is no value where an
    answer without the right form was admitted.
    """

    message: AssistantMessage
    call: CallRecord
    turn_id: str | None = None
    rounds: tuple[CallRecord, ...] = ()
    value: T_co = None  # type: ignore[assignment]  # None is right for a plain result, and a typed one is never made without
    invalid: str | None = None

    @property
    def text(self) -> str:
        """The answer's text; empty when the model only called tools or refused."""
        return self.message.content if isinstance(self.message.content, str) else ""

    @property
    def reasoning(self) -> str | None:
        """The model's visible reasoning, if it sent any."""
        return None if self.message.reasoning is UNSET else self.message.reasoning

    @property
    def usage(self) -> Usage | None:
        """Tokens and cost as the API reported them, of the call that gave the answer."""
        return self.call.usage

    @property
    def cost(self) -> Decimal | None:
        """USD really charged for the whole turn, all its rounds, or None when a reply did not say."""
        if not self.rounds:
            return self.call.cost
        costs = [call.cost for call in (*self.rounds, self.call)]
        return None if None in costs else sum((cost for cost in costs if cost is not None), Decimal(0))

    @property
    def attempts(self) -> int:
        """Requests that were sent for the whole turn, retries included."""
        return self.call.attempts + sum(call.attempts for call in self.rounds)

    @property
    def maybe_billed(self) -> bool:
        """Whether an attempt whose answer was lost may have been charged as well."""
        return self.call.maybe_billed or any(call.maybe_billed for call in self.rounds)

    @property
    def model(self) -> str | None:
        """The model that answered; often a dated name, not the one asked for."""
        return self.call.model

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, `tool_calls`, `content_filter`, `error`, or something newer."""
        return self.call.finish_reason

    @property
    def generation_id(self) -> str | None:
        """The API's id of this answer."""
        return self.call.generation_id

    @property
    def duration_s(self) -> float:
        """Seconds from the request to the whole answer, queueing and retries included."""
        return self.call.duration_s

    @property
    def interrupted(self) -> bool:
        """Whether the answer was stopped before its end."""
        return self.call.interrupted


class HistoryEntry(Struct, frozen=True):
    """One message of a session, the call that made it where a call did, and the id of its turn."""

    message: Message
    call: CallRecord | None = None
    turn_id: str | None = None
