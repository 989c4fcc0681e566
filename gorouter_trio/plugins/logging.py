"""A log line for every chat, through the logging of the standard library."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from msgspec import UNSET

from .._chain import ChatState, Hook
from ..errors import ApiError

if TYPE_CHECKING:
    from ..client import Client
    from ..errors import GorouterError
    from ..runtime_events import ChatContext

__all__ = ["LoggingPlugin"]

_MAX_CHARS = 300


class LoggingPlugin:
    """Logs one line for each chat, stream and session turn: model, messages, duration, tool calls, cost, error.

    What is logged is also in the record's `chat` attribute, a dict, for structured logs. Texts of users and models
    are not logged. What comes from outside is made printable, so that a line stays a line. `logger` is
    `logging.getLogger("gorouter_trio.chats")` if none is given; answers are logged at `level`, errors one above
    it, at least as warnings.
    """

    name = "logging"

    def __init__(self, logger: logging.Logger | None = None, *, level: int = logging.INFO) -> None:
        self._logger = logger or logging.getLogger("gorouter_trio.chats")
        self._level = level

    def init(self, client: Client) -> None:
        """Called by the client."""
        client.add_hook(Hook(after=self._log_answer, on_error=self._log_error, name=self.name))

    def _log_answer(self, context: ChatContext, state: ChatState) -> None:
        result = state.result
        if result is None or not self._logger.isEnabledFor(self._level):
            return
        calls = result.message.tool_calls
        facts: dict[str, object] = {
            **_facts_of(context, state),
            "answered_by": result.model,
            "finish_reason": result.finish_reason,
            "duration_s": round(result.duration_s, 3),
            "tool_calls": 0 if calls is UNSET else len(calls),
            "cost_usd": None if result.cost is None else str(result.cost),
        }
        self._log(self._level, facts)

    def _log_error(self, context: ChatContext, state: ChatState, error: GorouterError) -> None:
        level = max(self._level, logging.WARNING)
        if not self._logger.isEnabledFor(level):
            return
        facts: dict[str, object] = {
            **_facts_of(context, state),
            "error": type(error).__name__,
            "status": error.status if isinstance(error, ApiError) else None,
            "message": error.message,
            "attempts": error.attempts,
            "maybe_billed": error.maybe_billed,
        }
        self._log(level, facts)

    def _log(self, level: int, facts: dict[str, object]) -> None:
        line = " ".join(f"{name}={_printable(value)}" for name, value in facts.items() if value is not None)
        self._logger.log(level, "%s", line, extra={"chat": facts})


def _facts_of(context: ChatContext, state: ChatState) -> dict[str, object]:
    return {
        "chat": context.chat_id,
        "model": context.model,
        "session": context.session,
        "turn": context.turn_id,
        "tenant": context.tenant or None,
        "streamed": context.is_streamed or None,
        "messages": state.message_count,
    }


def _printable(value: object) -> str:
    """A value for a line of its own: a name with a line feed in it must not look like another record."""
    if not isinstance(value, str):
        return str(value)
    text = value[:_MAX_CHARS]
    if text.isprintable() and " " not in text and '"' not in text:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    return "\\" + char if char in '"\\' else char.encode("unicode_escape").decode("ascii")
