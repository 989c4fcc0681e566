"""Mail between actors: frozen, tagged, closed unions, one union a mailbox.

What is heavy travels encoded: a request body, messages of a history. The same unions are meant to
cross a WebSocket later, so they hold no handles; who waits for the answer is on the envelope.
Deadlines are on the trio clock, `inf` for none.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from msgspec import Struct

__all__ = [
    "DEFAULT_SETTINGS",
    "AnswerQuestion",
    "CallSettings",
    "ClearHistory",
    "CompactHistory",
    "ForkHistory",
    "HttpCall",
    "PoolMail",
    "ReadHistory",
    "SessionMail",
    "StartTurn",
    "UndoTurns",
]


class CallSettings(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What is known of a call besides its body: what limits, prices and queues go by, so that nobody reads the body.

    `headers` are further request headers, `lane` is the queue it waits in, `tenant` whose it is, `batch` the batch that
    it is part of. `model` is the model asked for first, empty where only the API knows, and `models` are those that
    the API may ask instead; `max_tokens` bounds the completion, None where nothing does.
    """

    headers: tuple[tuple[str, str], ...] = ()
    lane: Literal["interactive", "batch"] = "interactive"
    tenant: str = ""
    batch: str = ""
    model: str = ""
    models: tuple[str, ...] = ()
    max_tokens: int | None = None


DEFAULT_SETTINGS = CallSettings()


class HttpCall(Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """One HTTP request to the API; `streaming` asks for the connection to be lent instead of a whole reply.

    `flow` is whose turn it takes in the queue, where it has no tenant: a session's key. `purpose` is what the ledger
    calls it: a chat, or a further round of one.
    """

    method: str = "POST"
    path: str = "/chat/completions"
    body: bytes = b""
    streaming: bool = False
    deadline: float = math.inf
    settings: CallSettings = DEFAULT_SETTINGS
    flow: str = ""
    purpose: Literal["chat", "tool_round", "reask"] = "chat"


PoolMail: TypeAlias = HttpCall


class StartTurn(Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Take one turn: `messages` are encoded JSON messages joined by commas, `options` an encoded object.

    `resume` takes up a turn whose outcome is in doubt. `replaces` is the id of a turn that gives way to this one, with
    all after it, "" the last one; without messages this one has those of the other.
    """

    turn_id: str
    messages: bytes
    options: bytes
    streaming: bool = False
    deadline: float = math.inf
    settings: CallSettings = DEFAULT_SETTINGS
    resume: bool = False
    replaces: str | None = None


class ReadHistory(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Answer with the session's history entries."""


class ClearHistory(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Empty the history; the session stays."""


class ForkHistory(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Copy the history to a new session with the key `target`."""

    target: str


class UndoTurns(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Leave the turn of this id and all after it out of the history, "" for the last one; answer if there was one."""

    turn_id: str = ""


class CompactHistory(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Write the log anew, without what no request needs any more."""


class AnswerQuestion(Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Reply to a question that a parked turn waits for: any JSON value, encoded. Answer whether one does.

    `turn_id` is the turn that had it before and was left meanwhile, so that it may be stored already.
    """

    question_id: str
    answer: bytes
    turn_id: str = ""


SessionMail: TypeAlias = (
    StartTurn | ReadHistory | ClearHistory | ForkHistory | UndoTurns | CompactHistory | AnswerQuestion
)
