"""Entries of a session's log: what a store keeps, encoded once and never edited.

A log is a sequence of turns. A turn starts with the user's messages, before anything is sent, and
ends answered or abandoned; one that only started is in doubt. The tags and fields are a stored
format: they may grow fields with defaults, nothing else.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
from msgspec import Struct

from .result import CallRecord

__all__ = ["LogEntry", "TurnAbandoned", "TurnAnswered", "TurnStarted"]


class TurnStarted(Struct, frozen=True, tag="started"):
    """The user's messages, a JSON array; `at_s` is wall-clock seconds since the epoch."""

    turn_id: str
    messages: msgspec.Raw
    at_s: float = 0.0


class TurnAnswered(Struct, frozen=True, tag="answered"):
    """The assistant's message, whole or, where the call says `interrupted`, what had arrived of it."""

    turn_id: str
    message: msgspec.Raw
    call: CallRecord


class TurnAbandoned(Struct, frozen=True, tag="abandoned"):
    """The turn ended without an answer; it is not part of later requests."""

    turn_id: str
    reason: str
    maybe_billed: bool = False


LogEntry: TypeAlias = TurnStarted | TurnAnswered | TurnAbandoned
