"""How a generation is sent: whole or as a stream, at its pace, and as far as its fault lets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import msgspec
import trio
from msgspec import Struct

from . import forms
from ._extras import add_to_ending, add_to_events, add_to_whole
from ._reshape import reshape_ending, reshape_events, reshape_text, reshape_whole
from .forms import Event, StreamForm
from .outlet import JSON_HEADERS, STREAM_HEADERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..transport.http_server import ServerReply
    from ._extras import Extras
    from ._jobs import Job
    from .config import SimulatorConfig
    from .faults import ErrorReply, FaultKind
    from .forms import Generation
    from .outlet import Outlet, Pace
    from .scenario import Wire

_KEEP_ALIVE_S: Final = 0.5
_ERROR_EVENT: Final = b"data: " + forms.TIMED_OUT + b"\n\n" + forms.DONE


class _Script(Struct, frozen=True):
    """A stream as its fault leaves it: events, what ends them, and after how many tokens that is due."""

    events: list[Event]
    last: bytes
    tokens: int
    is_cut: bool = False


@final
class Delivery:
    """One generation on its way to the client. Every method raises as `ServerReply` does.

    *before_end* is called just before the last bytes of a reply that is not cut.
    """

    def __init__(
        self,
        generation: Generation,
        outlet: Outlet,
        *,
        reply: ServerReply,
        pace: Pace,
        config: SimulatorConfig,
        fault: FaultKind | None,
        job: Job,
        before_end: Callable[[], None],
    ) -> None:
        self.tokens_sent = 0
        """Completion tokens that a stream has sent so far."""
        self._generation = generation
        self._outlet = outlet
        self._reply = reply
        self._pace = pace
        self._config = config
        self._fault = fault
        self._job = job
        self._before_end = before_end

    async def send_error(self, error: ErrorReply) -> None:
        """Answer with a status of its own, where the head would have come."""
        await self._outlet.sleep_until(self._pace.latency_s)
        self._outlet.status = error.status
        self._before_end()
        await self._outlet.error(error)

    async def hang(self) -> None:
        """Send nothing until the client gives up."""
        async with self._reply.open_disconnect_scope():
            await trio.sleep_forever()

    async def stall(self, *, is_stream: bool) -> None:
        """Send a 200 with or without a part of the stream, and then keep-alives until the client gives up."""
        alive = forms.COMMENT if is_stream else forms.PADDING
        headers = STREAM_HEADERS if is_stream else JSON_HEADERS
        async with self._reply.open_disconnect_scope():
            await self._outlet.sleep_until(self._pace.latency_s)
            await self._outlet.write(alive, headers=headers)
            if is_stream and self._fault == "mid_stream_stall":
                await self._send_events(self._part(StreamForm(self._generation).events()))
            while True:
                await trio.sleep(self._config.comment_interval_s or _KEEP_ALIVE_S)
                await self._outlet.write(alive)

    async def vanish(self) -> None:
        """Generate everything, and close the connection without a word of it."""
        await self._outlet.sleep_until(self._pace.due_s(self._generation.answer.completion_tokens))
        self._reply.abort()

    async def send_whole(self) -> None:
        """Send the reply, or what the fault makes of it, when all tokens are generated."""
        generation, outlet = self._generation, self._outlet
        await outlet.pad_until(self._pace.due_s(generation.answer.completion_tokens), latency_s=self._pace.latency_s)
        wire = outlet.wire
        padding = b"" if self._reply.is_started else forms.PADDING * 3
        match self._fault:
            case "error_in_200":
                body = padding + forms.TIMED_OUT
            case "whitespace_200":
                body = padding
            case "mid_stream_error":
                is_chat = self._job.kind == "chat"
                body = forms.failed_completion(generation) if is_chat else forms.TIMED_OUT
            case "stream_cut":
                body = self._job.write(generation)
                await outlet.write(body[: len(body) // 2])
                self._reply.abort()
                return
            case _:
                body = self._job.write(generation)
                if self._job.extras is not None and self._job.kind == "chat":
                    body = add_to_whole(body, generation, extras=self._job.extras)
                if wire is not None:
                    body = forms.PADDING * wire.padding + reshape_whole(body, wire)
        self._outlet.status = 200
        self._before_end()
        await outlet.whole(body)

    async def send_stream(self) -> bool:
        """Send the stream as far as the fault lets it; says whether the client stayed to the end."""
        form = StreamForm(self._generation)
        wire = self._outlet.wire
        is_usual = self._job.kind == "chat" and self._job.extras is None and wire is None and self._fault is None
        if is_usual and self._pace.is_instant and not self._outlet.cuts:
            body = self._comment() + form.content() + form.ending()
            self._outlet.status = 200
            self._before_end()
            await self._outlet.whole(body, headers=STREAM_HEADERS, chunked=True)
            return True
        async with self._reply.open_disconnect_scope() as scope:
            script = self._script(form)
            if self._job.extras is not None and self._job.kind == "chat":
                script = self._with_extras(script, self._job.extras)
            if wire is not None:
                script = _reshaped(script, wire)
            await self._send_script(_as_text(script) if self._job.kind == "text" else script)
        return not scope.cancelled_caught

    def _script(self, form: StreamForm) -> _Script:
        match self._fault:
            case "error_in_200":
                return _Script([], _ERROR_EVENT, 0)
            case "whitespace_200":
                return _Script([], forms.COMMENT, self._generation.answer.completion_tokens)
            case "mid_stream_error":
                events = self._part(form.events())
                return _Script(events, form.error(), _out(events))
            case "stream_cut":
                events = self._part(form.events())
                return _Script(events, b"", _out(events), is_cut=True)
            case _:
                return _Script(form.events(), form.ending(), self._generation.answer.completion_tokens)

    def _with_extras(self, script: _Script, extras: Extras) -> _Script:
        events = add_to_events(script.events, self._generation, extras=extras)
        last = add_to_ending(script.last, self._generation, extras=extras)
        return msgspec.structs.replace(script, events=events, last=last)

    def _part(self, events: list[Event]) -> list[Event]:
        """At least one event, and not all when there are several."""
        return events[: self._outlet.draws.between(1, max(1, len(events) - 1))]

    async def _send_script(self, script: _Script) -> None:
        outlet, pace = self._outlet, self._pace
        await outlet.sleep_until(pace.latency_s)
        before = forms.COMMENT * outlet.wire.comments_before if outlet.wire is not None else b""
        await outlet.write(before + self._comment(), headers=STREAM_HEADERS)
        await self._send_events(script.events)
        await outlet.comment_until(pace.due_s(script.tokens))
        if script.is_cut:
            self._reply.abort()
        else:
            self._before_end()
            await outlet.finish(script.last)

    async def _send_events(self, events: list[Event]) -> None:
        position = 0
        while position < len(events):
            await self._outlet.comment_until(self._pace.due_s(events[position].tokens))
            position = await self._send_due(events, position)

    async def _send_due(self, events: list[Event], start: int) -> int:
        """Send in one write what is due by now, at least one event; returns the position after it."""
        now_s = self._outlet.elapsed_s
        end = start + 1
        while end < len(events) and self._pace.due_s(events[end].tokens) <= now_s:
            end += 1
        await self._outlet.write(b"".join([event.data for event in events[start:end]]))
        self.tokens_sent = events[end - 1].tokens
        return end

    def _comment(self) -> bytes:
        return forms.COMMENT if self._config.comment_interval_s else b""


def _out(events: list[Event]) -> int:
    """How many tokens are out after these; an answer without a text may have no events."""
    return events[-1].tokens if events else 0


def _reshaped(script: _Script, wire: Wire) -> _Script:
    last = reshape_ending(script.last, wire) if forms.DONE in script.last else script.last
    return msgspec.structs.replace(script, events=reshape_events(script.events, wire), last=last)


def _as_text(script: _Script) -> _Script:
    """The same as a stream of /completions."""
    events = reshape_text(script.events)
    (last,) = reshape_text([Event(script.last, 0)])
    return msgspec.structs.replace(script, events=events, last=last.data)
