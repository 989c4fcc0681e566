"""The record of one attempt: what ledgers, metrics and traces are made from."""

from __future__ import annotations

from msgspec import Struct

from ..wire.responses import Usage

__all__ = ["AttemptRecord"]


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
