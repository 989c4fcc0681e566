"""A log line for every chat, through the logging of the standard library."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from msgspec import UNSET

from ..errors import ApiError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .._observing import EndedChat
    from ..client import Client
    from ..errors import GorouterError
    from ..wire.result import ChatResult

__all__ = ["LoggingPlugin"]

_MAX_CHARS: Final = 300
_MOST_KEPT: Final = 1_000
# Texts that are made here, and need no look at what is in them.
_OURS: Final = frozenset({"chat", "cost_usd", "error"})


class LoggingPlugin:
    """Logs one line for each chat, stream and session turn: model, messages, duration, tool calls, cost, error.

    What is logged is also in the record's `chat` attribute, a dict, for structured logs. Texts of users and models
    are not logged. What comes from outside is made printable, so that a line stays a line. `logger` is
    `logging.getLogger("gorouter_trio.chats")` if none is given; answers are logged at `level`, errors one above
    it, at least as warnings. Records are made some hundredths of a second after the chat has ended, many at a time,
    and say when that was. Handlers run on the loop: one that may wait belongs behind a `QueueHandler`.
    """

    name = "logging"

    def __init__(self, logger: logging.Logger | None = None, *, level: int = logging.INFO) -> None:
        if not isinstance(logger, (logging.Logger, type(None))):
            raise ConfigError(f"logging: logger must be a logging.Logger, not {logger!r}")
        if isinstance(level, bool) or not isinstance(level, int):
            raise ConfigError(f"logging: level must be a level of the logging module, not {level!r}")
        self._logger = logger or logging.getLogger("gorouter_trio.chats")
        self._level = level
        self._records = _Records(self._logger.name)
        self._printed: dict[str, str] = {}

    def init(self, client: Client) -> None:
        """Called by the client."""
        client.observe(self._log_all)

    def _log_all(self, chats: Sequence[EndedChat]) -> None:
        level, error_level = self._level, max(self._level, logging.WARNING)
        shows_answers, shows_errors = self._logger.isEnabledFor(level), self._logger.isEnabledFor(error_level)
        if not (shows_answers or shows_errors):
            return
        for chat in chats:
            if chat.result is not None and shows_answers:
                self._log(level, _facts_of(chat, chat.result), chat.at_s)
            elif chat.error is not None and shows_errors:
                self._log(error_level, _facts_of_error(chat, chat.error), chat.at_s)

    def _log(self, level: int, facts: dict[str, object], at_s: float) -> None:
        printed = self._printed
        pairs: list[str] = []
        for name, value in facts.items():
            if value.__class__ is str and name not in _OURS:
                pairs.append(f"{name}={printed.get(value) or self._print(value)}")
            elif value is not None:
                pairs.append(f"{name}={value}")
        line = " ".join(pairs)
        if logging.getLogRecordFactory() is logging.LogRecord:
            self._logger.handle(self._records.make(level, line, facts=facts, created=at_s))
        else:
            # Somebody wants records of another kind.
            self._logger.log(level, "%s", line, extra={"chat": facts})

    def _print(self, value: str) -> str:
        """A text that has not been printed lately; names of models and reasons to finish are few."""
        if len(self._printed) >= _MOST_KEPT:
            self._printed.clear()
        text = self._printed[value] = _printable(value)
        return text


class _Records:
    """Makes log records as `Logger.makeRecord` does, of which nothing but the time and the text is new each time."""

    def __init__(self, logger: str) -> None:
        like = logging.LogRecord(logger, logging.NOTSET, LoggingPlugin.__module__, 0, "", (), None, "chat")
        self._began_ms = like.created * 1_000 - like.relativeCreated
        self._common = {**vars(like), "chat": None}
        self._levels: dict[int, dict[str, object]] = {}

    def make(self, level: int, line: str, *, facts: dict[str, object], created: float) -> logging.LogRecord:
        """A record of something that happened at `created`, in seconds since the epoch."""
        common = self._levels.get(level)
        if common is None:
            common = self._levels[level] = {**self._common, "levelno": level, "levelname": logging.getLevelName(level)}
        fields = common.copy()
        fields["msg"] = line
        fields["chat"] = facts
        fields["created"] = created
        fields["msecs"] = created % 1 * 1_000
        fields["relativeCreated"] = created * 1_000 - self._began_ms
        record = logging.LogRecord.__new__(logging.LogRecord)
        record.__dict__ = fields
        return record


def _facts_of(chat: EndedChat, result: ChatResult[object]) -> dict[str, object]:
    call, calls, cost = result.call, result.message.tool_calls, result.cost
    facts = _facts_of_request(chat)
    facts["answered_by"] = call.model
    facts["finish_reason"] = call.finish_reason
    facts["duration_s"] = round(call.duration_s, 3)
    facts["tool_calls"] = len(result.tool_calls) or (0 if calls is UNSET else len(calls))
    facts["cost_usd"] = None if cost is None else str(cost)
    if call.attempts > 1 or result.rounds:
        facts["attempts"] = result.attempts
    return facts


def _facts_of_error(chat: EndedChat, error: GorouterError) -> dict[str, object]:
    facts = _facts_of_request(chat)
    facts["error"] = type(error).__name__
    facts["status"] = error.status if isinstance(error, ApiError) else None
    facts["message"] = error.message
    facts["attempts"] = error.attempts
    facts["maybe_billed"] = error.maybe_billed
    return facts


def _facts_of_request(chat: EndedChat) -> dict[str, object]:
    context = chat.context
    facts: dict[str, object] = {"chat": context.chat_id, "model": context.model}
    if context.session is not None:
        facts["session"] = context.session
        facts["turn"] = context.turn_id
    if context.tenant:
        facts["tenant"] = context.tenant
    if context.is_streamed:
        facts["streamed"] = True
    facts["messages"] = chat.message_count
    return facts


def _printable(value: str) -> str:
    """A value for a line of its own: a name with a line feed in it must not look like another record."""
    text = value[:_MAX_CHARS]
    if text.isprintable() and " " not in text and '"' not in text:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    return "\\" + char if char in '"\\' else char.encode("unicode_escape").decode("ascii")
