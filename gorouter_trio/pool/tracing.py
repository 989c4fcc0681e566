"""What a tracer is told of requests and tool calls while they run: the seam for traces, of whatever make.

A tracer is called in the task of whoever sent the request, with that caller's context variables, and in the task of the
tool. It must not wait. What it raises is reported and harms nobody.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from .._contain import contain_sync

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..wire.mail import HttpCall
    from ..wire.result import ChatResult
    from ..wire.toolcalls import ToolCallReport
    from .attempts import AttemptRecord

__all__ = ["RequestSpan", "RequestSpans", "ToolSpan", "ToolSpans", "ToolStart", "Tracer", "Tracers"]


class RequestSpan(Protocol):
    """One request with all its attempts, as a tracer sees it. Ended once, by `finished` or `failed`."""

    def attempted(self, record: AttemptRecord) -> None:
        """An attempt is over; `sent_at` is minus infinity where nothing was sent."""

    def finished(self, result: ChatResult) -> None:
        """There is an answer; of a stream that was left early what had arrived, marked `interrupted`."""

    def failed(self, error: BaseException) -> None:
        """There is none."""


class ToolStart(Struct, frozen=True, kw_only=True):
    """A tool call that begins, or that was refused before it could."""

    tool: str
    call_id: str
    description: str = ""
    session: str | None = None
    turn_id: str | None = None


class ToolSpan(Protocol):
    """One tool call, as a tracer sees it."""

    def activate(self) -> None:
        """The tool is about to run in this task, or in one that has the context variables of this one."""

    def finished(self, report: ToolCallReport) -> None:
        """The call has its outcome."""


class Tracer(Protocol):
    """Makes spans; None leaves the request or the call alone."""

    def begin_request(self, call: HttpCall) -> RequestSpan | None:
        """A request for a chat is about to be queued."""

    def begin_tool(self, start: ToolStart) -> ToolSpan | None:
        """A tool call begins."""


class Tracers:
    """The tracers of one client; what they raise goes to `report`."""

    __slots__ = ("_report", "_tracers")

    def __init__(self, *, report: Callable[[Exception], None]) -> None:
        self._report = report
        self._tracers: tuple[Tracer, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._tracers)

    def add(self, tracer: Tracer) -> None:
        """Tell `tracer` of what begins from now on."""
        self._tracers = (*self._tracers, tracer)

    def remove(self, tracer: Tracer) -> bool:
        """Tell it of nothing more that begins; False when it was not there."""
        left = tuple(other for other in self._tracers if other is not tracer)
        is_found = len(left) < len(self._tracers)
        self._tracers = left
        return is_found

    def begin_request(self, call: HttpCall) -> RequestSpans:
        """The spans of a request."""
        begun = [contain_sync(partial(each.begin_request, call), report=self._report) for each in self._tracers]
        return RequestSpans([span for span in begun if span is not None], self._report)

    def begin_tool(self, start: ToolStart) -> ToolSpans:
        """The spans of a tool call."""
        begun = [contain_sync(partial(each.begin_tool, start), report=self._report) for each in self._tracers]
        return ToolSpans([span for span in begun if span is not None], self._report)


class RequestSpans:
    """The spans of one request, one a tracer."""

    __slots__ = ("_report", "_spans")

    def __init__(self, spans: list[RequestSpan], report: Callable[[Exception], None]) -> None:
        self._spans = spans
        self._report = report

    def attempted(self, record: AttemptRecord) -> None:
        """See `RequestSpan`."""
        for span in self._spans:
            contain_sync(partial(span.attempted, record), report=self._report)

    def finished(self, result: ChatResult) -> None:
        """See `RequestSpan`; whatever comes after the end is not told."""
        spans, self._spans = self._spans, []
        for span in spans:
            contain_sync(partial(span.finished, result), report=self._report)

    def failed(self, error: BaseException) -> None:
        """As `finished`."""
        spans, self._spans = self._spans, []
        for span in spans:
            contain_sync(partial(span.failed, error), report=self._report)


class ToolSpans:
    """The spans of one tool call, one a tracer."""

    __slots__ = ("_report", "_spans")

    def __init__(self, spans: list[ToolSpan], report: Callable[[Exception], None]) -> None:
        self._spans = spans
        self._report = report

    def activate(self) -> None:
        """See `ToolSpan`."""
        for span in self._spans:
            contain_sync(span.activate, report=self._report)

    def finished(self, outcome: ToolCallReport) -> None:
        """See `ToolSpan`."""
        spans, self._spans = self._spans, []
        for span in spans:
            contain_sync(partial(span.finished, outcome), report=self._report)
