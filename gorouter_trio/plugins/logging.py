"""A log line for every chat, through the logging of the standard library."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Final, TextIO, TypeAlias, TypeGuard

from msgspec import UNSET

from .._contain import contain_sync
from ..errors import ApiError, ConfigError, InvalidOutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .._turns.observing import EndedChat
    from ..client import Client
    from ..errors import GorouterError
    from ..runtime_events import ChatContext
    from ..wire.result import ChatResult

__all__ = ["LoggingPlugin"]

_MAX_CHARS: Final = 300
_MOST_KEPT: Final = 1_000


class LoggingPlugin:
    """Logs one line for each chat, stream and session turn: model, messages, duration, tool calls, cost, error.

    What is logged is also in the record's `chat` attribute, a dict, for structured logs. Texts of users and models are
    not logged, nor is what was wrong with the form of an answer, which quotes it. What comes from outside is made
    printable, so that a line stays a line. `logger` is `logging.getLogger("gorouter_trio.chats")` if none is given;
    answers are logged at `level`, errors one above it, at least as warnings. Records are made some hundredths of a
    second after the chat has ended, many at a time, and say when that was; those that are waiting are lost when the
    process is killed. Where one `StreamHandler` or `FileHandler` is all there is to call, their lines are written
    together, in order. Handlers run on the loop: one that may wait belongs behind a `QueueHandler`.
    """

    name = "logging"

    def __init__(self, logger: logging.Logger | None = None, *, level: int = logging.INFO) -> None:
        if not isinstance(logger, (logging.Logger, type(None))):
            raise ConfigError(f"logging: logger must be a logging.Logger, not {logger!r}")
        if isinstance(level, bool) or not isinstance(level, int):
            raise ConfigError(f"logging: level must be a level of the logging module, not {level!r}")
        self._logger = logger or logging.getLogger("gorouter_trio.chats")
        self._level = level
        self._records = _Records(self._logger)
        self._models, self._answerers, self._reasons = _Pairs("model"), _Pairs("answered_by"), _Pairs("finish_reason")

    def init(self, client: Client) -> None:
        """Called by the client."""
        client.observe(self._log_all)

    def _log_all(self, chats: Sequence[EndedChat]) -> None:
        level, error_level = self._level, max(self._level, logging.WARNING)
        shows_answers, shows_errors = self._logger.isEnabledFor(level), self._logger.isEnabledFor(error_level)
        if not (shows_answers or shows_errors):
            return
        make_answer, make_error = self._records.maker(level), self._records.maker(error_level)
        records: list[logging.LogRecord] = []
        for chat in chats:
            if chat.result is not None:
                if shows_answers:
                    line, facts = self._answered(chat, chat.result)
                    records.append(make_answer(line, facts, chat.at_s))
            elif chat.error is not None and shows_errors:
                line, facts = self._failed(chat, chat.error)
                records.append(make_error(line, facts, chat.at_s))
        _give_out(records, self._logger)

    def _answered(self, chat: EndedChat, result: ChatResult[object]) -> tuple[str, dict[str, object]]:
        """The line of an answer, and its facts; they are the same, in the same order, but for what is None."""
        call, calls = result.call, result.message.tool_calls
        cost = result.cost if result.rounds or call.usage is None else call.usage.cost
        context, count = chat.context, chat.message_count
        chat_id, model, answered_by, reason = context.chat_id, context.model, call.model, call.finish_reason
        whose, pairs = ("", {}) if _is_plain(context) else _more_of(context)
        tool_calls = len(result.tool_calls) or (0 if calls is UNSET else len(calls))
        duration_s = f"{call.duration_s:.3f}"
        cost_usd = None if cost is None else str(cost)
        facts: dict[str, object] = {
            "chat": chat_id,
            "model": model,
            **pairs,
            "messages": count,
            "answered_by": answered_by,
            "finish_reason": reason,
            "duration_s": float(duration_s),
            "tool_calls": tool_calls,
            "cost_usd": cost_usd,
        }
        line = (
            f"chat={chat_id}{self._models[model]}{whose} messages={count}{self._answerers[answered_by]}"
            f"{self._reasons[reason]} duration_s={duration_s} tool_calls={tool_calls}"
        )
        if cost_usd is not None:
            line += f" cost_usd={cost_usd}"
        if call.attempts > 1 or result.rounds:
            facts["attempts"] = result.attempts
            line += f" attempts={result.attempts}"
        return line, facts

    def _failed(self, chat: EndedChat, error: GorouterError) -> tuple[str, dict[str, object]]:
        """The line of an error, and its facts."""
        context, count = chat.context, chat.message_count
        whose, pairs = ("", {}) if _is_plain(context) else _more_of(context)
        told: dict[str, object] = {
            "error": type(error).__name__,
            "status": error.status if isinstance(error, ApiError) else None,
            "message": None if isinstance(error, InvalidOutputError) else error.message,
            "attempts": error.attempts,
            "maybe_billed": error.maybe_billed,
        }
        line = f"chat={context.chat_id}{self._models[context.model]}{whose} messages={count}{_line_of(told)}"
        return line, {"chat": context.chat_id, "model": context.model, **pairs, "messages": count, **told}


def _is_plain(context: ChatContext) -> bool:
    return context.session is None and not context.tenant and not context.is_streamed


def _more_of(context: ChatContext) -> tuple[str, dict[str, object]]:
    """What there is to say of some chats only: a piece of the line, and facts."""
    facts: dict[str, object] = {}
    if context.session is not None:
        facts["session"] = context.session
        facts["turn"] = context.turn_id
    if context.tenant:
        facts["tenant"] = context.tenant
    if context.is_streamed:
        facts["streamed"] = True
    return _line_of(facts), facts


def _line_of(facts: Mapping[str, object]) -> str:
    return "".join(
        f" {name}={_printable(value) if isinstance(value, str) else value}"
        for name, value in facts.items()
        if value is not None
    )


class _Pairs(dict[str | None, str]):
    """Pieces of lines by their values: names of models and reasons to finish are few, and are made printable once."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __missing__(self, value: str | None) -> str:
        if len(self) >= _MOST_KEPT:
            self.clear()
        pair = self[value] = _line_of({self._name: value})
        return pair


_Maker: TypeAlias = "Callable[[str, dict[str, object], float], logging.LogRecord]"
"""Makes a record of a line, its facts, and when that was, in seconds since the epoch."""


class _Records:
    """Makes records as `Logger.makeRecord` does, of which nothing but the time and the text is new each time."""

    def __init__(self, logger: logging.Logger) -> None:
        like = logging.LogRecord(logger.name, logging.NOTSET, LoggingPlugin.__module__, 0, "", (), None, "chat")
        self._logger = logger
        self._began_ms = like.created * 1_000 - like.relativeCreated
        self._common = {**vars(like), "chat": None}

    def maker(self, level: int) -> _Maker:
        """What makes records of this level, as many as there are to be made at a time."""
        if logging.getLogRecordFactory() is not logging.LogRecord:
            # Somebody wants records of another kind.
            return partial(self._make_by_factory, level)
        return partial(self._make, {**self._common, "levelno": level, "levelname": logging.getLevelName(level)})

    def _make(
        self, common: dict[str, object], line: str, facts: dict[str, object], created: float
    ) -> logging.LogRecord:
        fields = common.copy()
        fields["msg"] = line
        fields["chat"] = facts
        fields["created"] = created
        fields["msecs"] = created % 1 * 1_000
        fields["relativeCreated"] = created * 1_000 - self._began_ms
        record = _new_record(logging.LogRecord)
        record.__dict__ = fields
        return record

    def _make_by_factory(self, level: int, line: str, facts: dict[str, object], _created: float) -> logging.LogRecord:
        logger, module = self._logger, LoggingPlugin.__module__
        return logger.makeRecord(logger.name, level, module, 0, line, (), None, "chat", {"chat": facts})


_new_record: Final = logging.LogRecord.__new__


def _give_out(records: Sequence[logging.LogRecord], logger: logging.Logger) -> None:
    """`Logger.handle` for each; for much less where there is one handler, as there often is, and nobody to ask."""
    handler = _only_handler(logger)
    if handler is None:
        for record in records:
            logger.handle(record)
        return
    if handler.level:
        records = [record for record in records if record.levelno >= handler.level]
    if records and _can_write_at_once(handler):
        text = contain_sync(partial(_text_of, handler, records), report=_do_nothing)
        if text is not None and _write(text, handler, last=records[-1]):
            return
    for record in records:
        handler.handle(record)


def _only_handler(logger: logging.Logger) -> logging.Handler | None:
    """The handler that all records of a logger come to; None where there are more, or anything else has a say."""
    kind = type(logger)
    is_own = kind.handle is not logging.Logger.handle or kind.callHandlers is not logging.Logger.callHandlers
    if is_own or logger.disabled or logger.filters:
        return None
    handlers: list[logging.Handler] = []
    at: logging.Logger | None = logger
    while at is not None:
        handlers += at.handlers
        at = at.parent if at.propagate else None
    return handlers[0] if len(handlers) == 1 else None


def _can_write_at_once(handler: logging.Handler) -> TypeGuard[logging.StreamHandler[TextIO]]:
    """Whether it writes to a stream in the way of the standard library, and nobody has changed how."""
    if type(handler) not in {logging.StreamHandler, logging.FileHandler} or handler.filters:
        return False
    return vars(handler).get("stream") is not None and vars(handler).keys().isdisjoint(("handle", "emit", "flush"))


def _text_of(handler: logging.StreamHandler[TextIO], records: Sequence[logging.LogRecord]) -> str:
    format_, end = handler.format, handler.terminator
    return "".join([format_(record) + end for record in records])


def _write(text: str, handler: logging.StreamHandler[TextIO], *, last: logging.LogRecord) -> bool:
    """Write and flush once, as the handler does for a record; what goes wrong is told as it tells it.

    False where nothing was written, because one of the lines has no form in the encoding of the stream.
    """
    is_written = True

    def write() -> None:
        handler.stream.write(text)
        handler.flush()

    def report(error: Exception) -> None:
        nonlocal is_written
        if isinstance(error, UnicodeError):
            is_written = False
        else:
            handler.handleError(last)

    handler.acquire()
    try:
        contain_sync(write, report=report)
    finally:
        handler.release()
    return is_written


def _do_nothing(_error: Exception) -> None:
    """The handler meets what is wrong with a record, and tells of it."""


def _printable(value: str) -> str:
    """A value for a line of its own: a name with a line feed in it must not look like another record."""
    text = value[:_MAX_CHARS]
    if text.isprintable() and " " not in text and '"' not in text:
        return text
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    return "\\" + char if char in '"\\' else char.encode("unicode_escape").decode("ascii")
