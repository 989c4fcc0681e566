"""`gorouter-trio chat`: a conversation in one session, or one question."""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager, suppress
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING

import trio
from msgspec import Struct

from ..batch.tally import Tally
from ..config import DEFAULT_MODEL
from ..errors import GorouterError
from ..events import ReasoningDelta, RefusalDelta, StreamEvent, TextDelta
from ..wire.messages import AssistantMessage
from .failures import INTERRUPTED, OK, CliError, describe_error, redact, report
from .options import CommonOptions, on_interrupt, open_chosen_client
from .terminal import (
    clean,
    describe_call,
    format_cost,
    is_interactive,
    open_stdin,
    paint,
    print_error,
    print_json,
    print_text,
    printable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..session.directory import SessionRef
    from ..wire.result import ChatResult, HistoryEntry

__all__ = ["ChatAnswer", "ChatJob", "run_chat"]

_PROMPT = "> "
_HELP = """\
/history  what was said          /cost  tokens and cost so far
/clear    forget it              /quit  leave (or Ctrl-D)
Ctrl-C stops an answer that is being written. A message may begin with // for a slash.
"""
_MAX_STDIN_BYTES = 16 * 1024 * 1024


class ChatJob(Struct, frozen=True, kw_only=True):
    """What to talk about: the session's key, its instructions, and the one question if there is only one."""

    session: str
    system: str | None
    prompt: str | None


class ChatAnswer(Struct, frozen=True, kw_only=True):
    """One answer, as `--json` prints it."""

    session: str
    text: str
    reasoning: str | None
    model: str | None
    finish_reason: str | None
    generation_id: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost_usd: Decimal | None
    duration_s: float
    interrupted: bool


async def run_chat(job: ChatJob, common: CommonOptions) -> int:
    """Ask once when there is a question in the job or on stdin, else talk until the end of input; the exit code."""
    prompt = job.prompt
    if prompt is None and not is_interactive():
        prompt = await _read_stdin()
    if prompt is not None and not prompt.strip():
        raise CliError("the question is empty")
    async with open_chosen_client(common) as client:
        session = client.session(job.session, system=None if job.system is None else clean(job.system))
        if prompt is not None:
            return await _ask_once(session, clean(prompt), common)
        return await _Conversation(session, common).run()


async def _read_stdin() -> str:
    if sys.stdin is None:
        raise CliError("there is no question: use -p, or pipe it in")
    read = partial(open_stdin().read, _MAX_STDIN_BYTES + 1)
    data: bytes = await trio.to_thread.run_sync(read, abandon_on_cancel=True)
    if len(data) > _MAX_STDIN_BYTES:
        raise CliError(f"standard input is longer than {_MAX_STDIN_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise CliError(f"standard input is not UTF-8: byte {data[exc.start]:#04x} at {exc.start}") from exc


async def _ask_once(session: SessionRef, prompt: str, common: CommonOptions) -> int:
    with trio.CancelScope() as scope:
        async with on_interrupt(scope.cancel):
            result = await _answer(session, prompt, as_json=common.json)
            if not common.json:
                print_error(paint(describe_call(result.call), "dim", stderr=True) + "\n")
    if scope.cancelled_caught:
        report("interrupted")
        return INTERRUPTED
    return OK


async def _answer(session: SessionRef, prompt: str, *, as_json: bool) -> ChatResult:
    """Take one turn and print the answer as it comes, or as JSON when it is there."""
    writer = _AnswerWriter(quiet=as_json)
    try:
        async with session.stream(prompt) as stream:
            async for event in stream:
                writer.write(event)
        result = stream.result
    finally:
        writer.end()
    if as_json:
        print_json(_to_answer(session.key, result))
    return result


def _to_answer(key: str, result: ChatResult) -> ChatAnswer:
    usage = result.usage
    return ChatAnswer(
        session=key,
        text=result.text,
        reasoning=result.reasoning,
        model=result.model,
        finish_reason=result.finish_reason,
        generation_id=result.generation_id,
        prompt_tokens=usage.prompt_tokens if usage else None,
        completion_tokens=usage.completion_tokens if usage else None,
        cost_usd=result.cost,
        duration_s=result.duration_s,
        interrupted=result.interrupted,
    )


class _AnswerWriter:
    """Prints the events of one answer; reasoning is dim and stands before the text."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._last = "\n"
        self._reasoned = False

    def write(self, event: StreamEvent) -> None:
        if isinstance(event, ReasoningDelta):
            self._reasoned = True
            self._print(paint(printable(event.text), "dim"), event.text)
        elif isinstance(event, (TextDelta, RefusalDelta)):
            if self._reasoned:
                self._reasoned = False
                self._print("\n\n", "\n")
            self._print(printable(event.text), event.text)

    def end(self) -> None:
        """End the line, if one was begun."""
        if not self._last.endswith("\n"):
            self._print("\n", "\n")

    def _print(self, shown: str, text: str) -> None:
        if shown and not self._quiet:
            self._last = text
            print_text(shown)


class _Conversation:
    """Reads messages and commands from the terminal until it is told to stop.

    Ctrl-C cancels what is going on: the answer that is being written, or the reading of the next
    message, which ends the conversation.
    """

    def __init__(self, session: SessionRef, common: CommonOptions) -> None:
        self._session = session
        self._as_json = common.json
        self._model = f"{common.model or DEFAULT_MODEL}{' (simulated)' if common.simulate else ''}"
        self._tally = Tally()
        self._scope = trio.CancelScope()

    async def run(self) -> int:
        """The exit code: 130 when it was ended by Ctrl-C."""
        self._greet()
        with _kept_terminal():
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_interrupts)
                code = await self._talk()
                nursery.cancel_scope.cancel()
        return code

    def _greet(self) -> None:
        print_text(paint(f"{self._model}. /help lists the commands, Ctrl-D ends.", "dim") + "\n")

    async def _watch_interrupts(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                self._scope.cancel()

    async def _talk(self) -> int:
        while True:
            with trio.CancelScope() as self._scope:
                line = await _read_line()
            if self._scope.cancelled_caught:
                print_text("\n")
                return INTERRUPTED
            if line is None or line.strip() in {"/quit", "/exit"}:
                return OK
            await self._act(line)

    async def _act(self, line: str) -> None:
        text = line.strip()
        with trio.CancelScope() as self._scope:
            try:
                if text.startswith("/") and not text.startswith("//"):
                    await self._command(text)
                elif text:
                    await self._reply(text.removeprefix("/") if text.startswith("//") else line)
            except GorouterError as exc:
                told = printable(redact(describe_error(exc)))
                print_error(paint(f"error: {told}", "red", stderr=True) + "\n")
        if self._scope.cancelled_caught:
            # Its cost is known to the service alone, and much later.
            self._tally.unpriced += 1
            print_text(paint("stopped; what had come is kept", "dim") + "\n\n")

    async def _reply(self, text: str) -> None:
        result = await _answer(self._session, clean(text), as_json=self._as_json)
        self._tally.add_call(result.call)
        if not self._as_json:
            print_text(paint(describe_call(result.call), "dim") + "\n\n")

    async def _command(self, text: str) -> None:
        match text:
            case "/help":
                print_text(_HELP)
            case "/history":
                print_text("".join(map(_show_entry, await self._session.history())) or "nothing yet\n")
            case "/clear":
                await self._session.clear()
                print_text(paint("forgotten", "dim") + "\n")
            case "/cost":
                print_text(self._cost() + "\n")
            case _:
                print_text(f"there is no {printable(text.split()[0])}; /help lists the commands\n")

    def _cost(self) -> str:
        tally = self._tally
        unknown = f", and {tally.unpriced} of unknown cost" if tally.unpriced else ""
        tokens = f"{tally.prompt_tokens:,} + {tally.completion_tokens:,} tokens"
        return f"{tally.latencies.count:,} answers, {tokens}, {format_cost(tally.cost)}{unknown}"


def _show_entry(entry: HistoryEntry) -> str:
    message = entry.message
    role = str(message.__struct_config__.tag)
    content = message.content
    text = content if isinstance(content, str) else "" if content is None else f"({len(content)} parts)"
    mark = " (interrupted)" if isinstance(message, AssistantMessage) and entry.call and entry.call.interrupted else ""
    return paint(f"{role}{mark}: ", "bold") + printable(text) + "\n"


async def _read_line() -> str | None:
    """What is typed next, without its line end; None at the end of input. Cancelling leaves a thread that waits."""
    try:
        return await trio.to_thread.run_sync(input, _PROMPT, abandon_on_cancel=True)
    except EOFError:
        print_text("\n")
        return None


@contextmanager
def _kept_terminal() -> Iterator[None]:
    """Line editing where the system has it, and the terminal as it was afterwards, even if a reader was abandoned."""
    with suppress(ImportError):
        import readline  # noqa: F401 - being imported is all it takes
    import termios

    before = termios.tcgetattr(sys.stdin.fileno())
    try:
        yield
    finally:
        with suppress(termios.error):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
