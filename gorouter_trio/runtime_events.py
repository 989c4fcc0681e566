"""What a runtime tells its listeners (`client.on`, `client.events`): frozen values, past participles.

`at_s` is wall-clock seconds since the epoch. Nothing here holds a key or a token; what users and models
said is in the `result` of a chat, and nowhere else.
"""

from __future__ import annotations

from msgspec import Struct

from .errors import GorouterError
from .wire.ledger import LedgerRow
from .wire.result import ChatResult

__all__ = [
    "AccountingFailed",
    "AskerRefused",
    "ChatContext",
    "ChatFailed",
    "ChatFinished",
    "ChatStarted",
    "CostUnknown",
    "HandlerFailed",
    "HookFailed",
    "PluginFailed",
    "RuntimeEvent",
    "ToolCallDenied",
]


class RuntimeEvent(Struct, frozen=True, kw_only=True):
    """The root of all events; listening to it is listening to everything."""

    at_s: float = 0.0


class ChatContext(Struct, frozen=True, kw_only=True):
    """What a chat is, and stays, from its start to its end.

    `chat_id` is unique within the client. `session` and `turn_id` are None outside sessions. `is_completion` is what
    `client.completions` asks: its prompt is the one message, to which none may be added, and it has no tools.
    """

    chat_id: str
    model: str
    is_streamed: bool = False
    is_completion: bool = False
    session: str | None = None
    turn_id: str | None = None
    tenant: str = ""
    lane: str = "interactive"


class ChatStarted(RuntimeEvent, frozen=True, kw_only=True):
    """A chat, stream or session turn has begun; nothing was sent yet."""

    context: ChatContext


class ChatFinished(RuntimeEvent, frozen=True, kw_only=True):
    """It has ended with an answer, which is stored where it is a session's."""

    context: ChatContext
    result: ChatResult[object]


class ChatFailed(RuntimeEvent, frozen=True, kw_only=True):
    """It has ended with an error; None stands for a cancel from outside."""

    context: ChatContext
    error: GorouterError | None


class HookFailed(RuntimeEvent, frozen=True, kw_only=True):
    """A hook raised where its error has no place to go: after an answer, or while an error was told."""

    hook: str
    phase: str
    error: Exception


class HandlerFailed(RuntimeEvent, frozen=True, kw_only=True):
    """A handler of events raised; `event` names the type of the event that it got."""

    event: str
    error: Exception


class ToolCallDenied(RuntimeEvent, frozen=True, kw_only=True):
    """A tool was not run for who asked: no right to it, too many calls, an argument that a rule forbids.

    `reason` is a `security.DenyReason`. `message` may name the rule; the model is told the reason alone. `principal` is
    None where nobody was authenticated.
    """

    tool: str
    call_id: str
    reason: str
    message: str
    principal: str | None = None
    tenant: str = ""
    session: str | None = None
    retry_after_s: float | None = None


class AskerRefused(RuntimeEvent, frozen=True, kw_only=True):
    """Somebody was refused before anything was asked: no token, or no good one, or a session that is not theirs.

    `session` is the key that was asked for, where it is about a session, and `principal` whoever it was, if that is
    known.
    """

    error: GorouterError
    principal: str | None = None
    tenant: str = ""
    session: str | None = None


class CostUnknown(RuntimeEvent, frozen=True, kw_only=True):
    """What an attempt cost could not be found out: its row stays in the ledger as unreconciled."""

    row: LedgerRow


class AccountingFailed(RuntimeEvent, frozen=True, kw_only=True):
    """Something about the accounting failed in the background: the ledger's file, a lookup, the credits."""

    error: Exception


class PluginFailed(RuntimeEvent, frozen=True, kw_only=True):
    """A plugin raised after it had begun, or while it ended; it is gone, and so is what it had registered."""

    plugin: str
    error: Exception
