"""The record of one attempt: what ledgers, metrics and traces are made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from ..errors import GorouterError
from ..wire.responses import Usage
from .retry import classify

if TYPE_CHECKING:
    from .workers import Exchange

__all__ = ["AttemptRecord", "record_attempt"]


class AttemptRecord(Struct, frozen=True, kw_only=True):
    """One attempt that reached a connection, once it is over. Times are on the trio clock.

    `call` is the same for all attempts of one request, `attempt` counts them from 1, also those that reached no
    connection. `flow` is the session or tenant whose turn it was. `key` is the name of the API key, or its number.
    `prompt_bytes` is the size of the request's body.

    `status` is the HTTP status, None where no head arrived. `error` is the name of the error's class, None for an
    answer; what was cancelled or left before its end is `cancelled` as well. `usage` is what the reply
    said. `maybe_billed` marks what may have been charged without its charge being known.

    It was queued at `queued_at`, a connection took it at `taken_at`, its first byte went out at `sent_at`, the
    first data (for a whole reply: its head) came at `first_data_at`, if any did, and it was over at `ended_at`.
    """

    call: int
    attempt: int
    method: str
    path: str
    model: str
    tenant: str
    lane: str
    flow: str
    key: str
    key_index: int
    prompt_bytes: int
    generation_id: str | None
    status: int | None
    error: str | None
    usage: Usage | None
    maybe_billed: bool
    cancelled: bool
    streamed: bool
    queued_at: float
    taken_at: float
    sent_at: float
    first_data_at: float | None
    ended_at: float


def record_attempt(
    exchange: Exchange, error: BaseException | None, *, now: float, is_left: bool = False
) -> AttemptRecord:
    """The record of an exchange's last attempt, which ended with `error` or without, or was left before its end."""
    ticket = exchange.ticket
    call = ticket.call
    settings = call.settings
    key = None if ticket.route is None else ticket.route.key
    cancelled = is_left or not (error is None or isinstance(error, Exception))
    return AttemptRecord(
        call=exchange.number,
        attempt=exchange.tries,
        method=call.method,
        path=call.path,
        model=settings.model,
        tenant=settings.tenant,
        lane=settings.lane,
        flow=ticket.flow,
        key="" if key is None else key.name,
        key_index=-1 if key is None else key.index,
        prompt_bytes=len(call.body),
        generation_id=exchange.generation_id,
        status=ticket.status or None,
        error=None if error is None else type(error).__name__,
        usage=exchange.usage,
        maybe_billed=_is_maybe_billed(exchange, error, cancelled=cancelled),
        cancelled=cancelled,
        streamed=call.streaming,
        queued_at=ticket.queued_at,
        taken_at=ticket.started_at,
        sent_at=ticket.sent_at,
        first_data_at=exchange.first_data_at or (ticket.reply_at if ticket.status else None),
        ended_at=now,
    )


def _is_maybe_billed(exchange: Exchange, error: BaseException | None, *, cancelled: bool) -> bool:
    if exchange.usage is not None and exchange.usage.cost is not None:
        return False
    if cancelled:
        return True
    if not isinstance(error, GorouterError):
        return error is not None
    return error.maybe_billed or classify(error) == "ambiguous"
