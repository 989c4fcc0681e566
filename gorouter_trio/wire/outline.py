"""What can be counted in a session's log without reading its messages, whatever the tags of its entries."""

from __future__ import annotations

from decimal import Decimal

from msgspec import Struct

from .result import CallRecord

__all__ = ["LogOutline", "MessageOutline"]


class MessageOutline(Struct, frozen=True):
    """Who says it."""

    role: str = ""


class LogOutline(Struct, frozen=True):
    """An entry of any tag by the fields that entries share; a tag that came later is counted by what it has of them.

    `calls`, `cost_usd` and `unpriced` are of calls that a compacted log has no entries of any more.
    """

    type: str
    turn_id: str = ""
    at_s: float = 0.0
    maybe_billed: bool = False
    messages: list[MessageOutline] = []
    message: MessageOutline | None = None
    call: CallRecord | None = None
    calls: int = 0
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0
