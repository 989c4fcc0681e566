"""Attempts at requests, as the pool tells of them after their end."""

from __future__ import annotations

from decimal import Decimal

from msgspec import Struct

from gorouter_trio.wire.responses import Usage


class Attempted(Struct, frozen=True, kw_only=True):
    call: int = 1
    attempt: int = 1
    model: str = "m"
    tenant: str = ""
    lane: str = "interactive"
    key: str = ""
    generation_id: str | None = "gen-1"
    status: int | None = 200
    error: str | None = None
    usage: Usage | None = None
    maybe_billed: bool = False
    cancelled: bool = False
    streamed: bool = False
    sent_at: float = 0.0
    ended_at: float = 0.0


def answered(usd: str | None, *, prompt: int = 10, completion: int = 5, **fields: object) -> Attempted:
    """A reply with usage; its cost in USD, None where it does not say."""
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cost=None if usd is None else Decimal(usd))
    return Attempted(usage=usage, **fields)  # type: ignore[arg-type]  # fields of Attempted


def lost(generation_id: str | None = "gen-1", **fields: object) -> Attempted:
    """An answer that did not arrive, and may have been charged."""
    return Attempted(generation_id=generation_id, maybe_billed=True, status=None, error="StreamBrokenError", **fields)  # type: ignore[arg-type]  # fields of Attempted


REFUSED = Attempted(status=429, generation_id=None, error="RateLimitError")
