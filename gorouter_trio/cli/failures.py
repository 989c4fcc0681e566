"""How a command fails: one line on stderr and an exit code, never a traceback for somebody's mistake."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING

import trio

from ..errors import ApiError, ConfigError, GorouterError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "OK",
    "USAGE",
    "CliError",
    "describe_error",
    "find_failure",
    "hide_keys_in_tracebacks",
    "printable",
    "redact",
    "report",
    "report_failure",
    "why",
]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

_KEY_VARIABLE = "OPENROUTER_API_KEY"
_SHORTEST_SECRET = 4
# What a model or a server writes must not steer the terminal: C0 and C1 controls go, except line feed and tab.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class CliError(Exception):
    """Ends the command with one line and an exit code."""

    def __init__(self, message: str, *, code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def redact(text: str) -> str:
    """The text without the API key."""
    key = os.environ.get(_KEY_VARIABLE, "").strip()
    return text.replace(key, "…") if len(key) >= _SHORTEST_SECRET else text


def printable(text: str) -> str:
    """The text without control characters, except line feeds and tabs."""
    return text.translate(_CONTROLS)


def report(message: str) -> None:
    """One line on stderr, if anybody reads it."""
    line = printable(" ".join(redact(message).split()))
    with suppress(OSError, ValueError):
        print(f"gorouter-trio: {line}", file=sys.stderr, flush=True)


def why(error: OSError) -> str:
    """The reason of a system error in words."""
    return error.strerror or str(error) or type(error).__name__


def report_failure(error: BaseException) -> int | None:
    """Say what went wrong, and return the exit code; None for an error that is a bug."""
    match error:
        case CliError():
            report(error.message)
            return error.code
        case ConfigError():
            report(error.message)
            return USAGE
        case GorouterError():
            report(describe_error(error))
            return FAILED
        case KeyboardInterrupt():
            report("interrupted")
            return INTERRUPTED
        case _:
            return None


def describe_error(error: GorouterError) -> str:
    """An error of a call in one line."""
    lead, wait = "", None
    if isinstance(error, ApiError):
        # The status of an error inside a 200 says nothing, its code does.
        lead, wait = f"{error.status if error.status >= 300 else error.code}: ", error.retry_after_s
    notes = [
        f"asked {error.attempts} times" if error.attempts > 1 else "",
        f"the server asks to wait {wait:g} s" if wait is not None else "",
        "it may have been billed" if error.maybe_billed else "",
    ]
    shown = "; ".join(note for note in notes if note)
    return f"{lead}{error.message}" + (f" ({shown})" if shown else "")


def find_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the group is about: the first error in it that is no cancel; the group itself when there is none."""
    for inner in group.exceptions:
        found = find_failure(inner) if isinstance(inner, BaseExceptionGroup) else inner
        if not isinstance(found, (trio.Cancelled, BaseExceptionGroup)):
            return found
    return group


def hide_keys_in_tracebacks() -> None:
    """From now on, the traceback of a bug shows no key, in this thread or another."""
    sys.excepthook = _print_redacted
    threading.excepthook = lambda args: _print_redacted(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    with suppress(OSError, ValueError):
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
