"""What the commands print: text and tables on stdout, all through one place, in forms that people read."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from decimal import Decimal
from typing import IO, TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..wire.codec import encode_json
from .failures import FAILED, CliError, printable, why

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

    from ..wire.result import CallRecord

__all__ = [
    "clean",
    "describe_call",
    "drop_stdout",
    "facts_table",
    "format_cost",
    "format_seconds",
    "is_interactive",
    "make_console",
    "open_stdin",
    "paint",
    "print_bytes",
    "print_error",
    "print_json",
    "print_text",
    "printable",
    "show",
]

_WIDTH = 80
_TEN_CENTS = Decimal("0.1")


def make_console(*, stderr: bool = False, file: IO[str] | None = None) -> Console:
    """A console of at most 80 columns on stdout or stderr, or one that writes to `file` what these would show."""
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    # Brackets and colons of a key, a path or an error are text, and neither styles nor small pictures.
    console = Console(file=file or stream, force_terminal=is_terminal, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, _WIDTH)
    return console


def is_interactive() -> bool:
    """Whether a person types and reads: stdin and stdout are terminals."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def open_stdin() -> IO[bytes]:
    """What comes on standard input; raises `CliError` when it is closed.

    A thread that waits for it may be abandoned: with `sys.stdin`, it would keep the interpreter from ending.
    """
    if sys.stdin is None:
        raise CliError("standard input is closed")
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:
        # One that somebody has put there, and that is in memory.
        return sys.stdin.buffer


def print_text(text: str) -> None:
    """Write to stdout at once; raises `CliError` when nobody reads it or it is full."""
    print_bytes(text.encode(sys.stdout.encoding, "replace") if sys.stdout is not None else b"")


def print_bytes(data: bytes) -> None:
    """The same for data, whatever the encoding of the terminal is."""
    if sys.stdout is None:
        raise CliError("standard output is closed", code=FAILED)
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as exc:
        drop_stdout()
        raise CliError(f"standard output: {why(exc)}", code=FAILED) from exc


def print_json(value: object, *, to_stderr: bool = False) -> None:
    """One line of JSON."""
    line = encode_json(value).decode() + "\n"
    print_error(line) if to_stderr else print_text(line)


def show(renderable: RenderableType, *, to_stderr: bool = False) -> None:
    """A table, or several."""
    text = _render(renderable, stderr=to_stderr)
    print_error(text) if to_stderr else print_text(text)


def print_error(text: str) -> None:
    """Write to stderr, if anybody reads it."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


def drop_stdout() -> None:
    """Give up on stdout, so that nothing fails again when the interpreter flushes it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def facts_table(title: str, facts: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values; rows with an empty value are left out."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(name, printable(value))
    return table


def paint(text: str, style: str, *, stderr: bool = False) -> str:
    """The text in a style, where the stream is a terminal that shows styles."""
    return _render(Text(text, style=style, end=""), stderr=stderr, soft_wrap=True)


def _render(renderable: RenderableType, *, stderr: bool, soft_wrap: bool = False) -> str:
    # Into memory and not to the stream, so that one place writes and knows what a failed write means.
    file = io.StringIO()
    console = make_console(stderr=stderr, file=file)
    console.print(renderable, end="", soft_wrap=soft_wrap)
    text = file.getvalue()
    return text if console.is_terminal else "\n".join(line.rstrip() for line in text.split("\n"))


def describe_call(call: CallRecord) -> str:
    """One line about an answer: model, tokens, cost, time, and how it ended if not in the common way."""
    usage = call.usage
    parts = [
        printable(call.model or ""),
        f"{usage.prompt_tokens or 0:,} + {usage.completion_tokens or 0:,} tokens" if usage else "tokens unknown",
        f"cost {format_cost(call.cost)}" if call.cost is None else format_cost(call.cost),
        format_seconds(call.duration_s or None),
        "interrupted" if call.interrupted else "",
        f"finish: {printable(call.finish_reason)}" if call.finish_reason not in {None, "stop"} else "",
    ]
    return ", ".join(part for part in parts if part)


def clean(text: str) -> str:
    """What was typed or given in bytes that are no UTF-8 becomes replacement characters."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def format_seconds(seconds: float | None) -> str:
    """A duration as people say it; empty when it is not known."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def format_cost(usd: Decimal | None) -> str:
    """US dollars, to the cent or, below ten of them, to three digits that count; `unknown` is not zero."""
    if usd is None:
        return "unknown"
    if usd == 0 or abs(usd) >= _TEN_CENTS:
        return f"${usd:,.2f}"
    return f"${usd:.{2 - usd.adjusted()}f}"
