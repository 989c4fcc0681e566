"""Counts and distributions of chats: a snapshot as a value, and the text that Prometheus scrapes."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING, Final

from msgspec import UNSET, Struct

from .._prometheus import MetricFamily, Sample, render
from ..runtime_events import AskerRefused, ToolCallDenied

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .._turns.observing import EndedChat
    from ..client import Client
    from ..wire.responses import Usage
    from ..wire.result import ChatResult

__all__ = ["Histogram", "Metrics", "MetricsPlugin"]

_BOUNDS_S: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    600.0,
)


_QUEUE: Final = 4_096


class Histogram(Struct, frozen=True, kw_only=True):
    """How many values were at most each bound (seconds), and how many there were in all; sums as Prometheus has them.

    `counts` has one number for each of `bounds`, each including those before it.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    count: int
    total_s: float

    def quantile(self, q: float) -> float | None:
        """About the value that a share `q` (0 to 1) is below, between two bounds in proportion; None without values."""
        if not self.count:
            return None
        rank = max(1, math.ceil(q * self.count))
        place = bisect.bisect_left(self.counts, rank)
        if place == len(self.bounds):
            return self.bounds[-1]
        below = self.counts[place - 1] if place else 0
        start, end = self.bounds[place - 1] if place else 0.0, self.bounds[place]
        # Rounding may lead a hair beyond the bound.
        return min(start + (end - start) * (rank - below) / (self.counts[place] - below), end)


class Metrics(Struct, frozen=True, kw_only=True):
    """A snapshot. `requests` counts chats, streams and turns that have ended, not those given up from outside.

    `tool_calls` counts the calls that models asked for, `tool_calls_denied` those that the guard did not let run, and
    `askers_refused` who was let through to no turn. `last_duration_s` is that of the last answer. The time to the
    first token and between tokens are known of streams only.
    """

    requests: int
    succeeded: int
    failed: int
    tool_calls: int
    tool_calls_denied: int = 0
    askers_refused: int = 0
    prompt_tokens: int
    completion_tokens: int
    last_duration_s: float | None
    queue_wait: Histogram
    first_token: Histogram
    between_tokens: Histogram
    duration: Histogram


class _Distribution:
    """A histogram that grows."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS_S) + 1)
        self._total = 0.0

    def add(self, value_s: float) -> None:
        self._counts[bisect.bisect_left(_BOUNDS_S, value_s)] += 1
        self._total += value_s

    def snapshot(self) -> Histogram:
        running = 0
        sums: list[int] = []
        for count in self._counts[:-1]:
            running += count
            sums.append(running)
        return Histogram(bounds=_BOUNDS_S, counts=tuple(sums), count=running + self._counts[-1], total_s=self._total)


class MetricsPlugin:
    """Counts every chat, stream and session turn. Memory is constant; a chat costs about a microsecond."""

    name = "metrics"

    def __init__(self) -> None:
        self._succeeded = self._failed = self._tool_calls = 0
        self._denied = self._refused = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._last_duration_s: float | None = None
        self._client: Client | None = None
        self._queue_wait = _Distribution()
        self._first_token = _Distribution()
        self._between_tokens = _Distribution()
        self._duration = _Distribution()

    def init(self, client: Client) -> None:
        """Called by the client."""
        client.observe(self._count)
        client.on(ToolCallDenied, self._count_denied, queue=_QUEUE)
        client.on(AskerRefused, self._count_refused, queue=_QUEUE)
        client.add_metrics(self._families)
        self._client = client

    def snapshot(self) -> Metrics:
        """The counts so far."""
        if self._client is not None:
            self._client.flush_observers()
        return Metrics(
            requests=self._succeeded + self._failed,
            succeeded=self._succeeded,
            failed=self._failed,
            tool_calls=self._tool_calls,
            tool_calls_denied=self._denied,
            askers_refused=self._refused,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            last_duration_s=self._last_duration_s,
            queue_wait=self._queue_wait.snapshot(),
            first_token=self._first_token.snapshot(),
            between_tokens=self._between_tokens.snapshot(),
            duration=self._duration.snapshot(),
        )

    def text(self) -> str:
        """The counts in the text format of Prometheus, version 0.0.4; they are in `client.metrics_text()` as well."""
        return render(self._families())

    def _families(self) -> list[MetricFamily]:
        return list(_families_of(self.snapshot()))

    def _count_denied(self, _event: ToolCallDenied) -> None:
        self._denied += 1

    def _count_refused(self, _event: AskerRefused) -> None:
        self._refused += 1

    def _count(self, chats: Sequence[EndedChat]) -> None:
        waits, durations, tokens = self._queue_wait.add, self._duration.add, self._count_tokens
        for chat in chats:
            result = chat.result
            if result is None:
                self._failed += 1
                continue
            call = result.call
            self._succeeded += 1
            waits(call.queue_wait_s)
            durations(call.duration_s)
            tokens(call.usage)
            if result.rounds or result.tool_calls or result.message.tool_calls is not UNSET:
                self._count_rounds(result)
            if chat.context.is_streamed:
                self._count_stream(result)
        self._last_duration_s = next(
            (chat.result.call.duration_s for chat in reversed(chats) if chat.result is not None), self._last_duration_s
        )

    def _count_rounds(self, result: ChatResult[object]) -> None:
        calls = result.message.tool_calls
        self._tool_calls += len(result.tool_calls) or (0 if calls is UNSET else len(calls))
        for earlier in result.rounds:
            self._count_tokens(earlier.usage)

    def _count_stream(self, result: ChatResult[object]) -> None:
        if result.call.ttft_s is not None:
            self._first_token.add(result.call.ttft_s)
            between_s = _between_tokens_s(result)
            if between_s is not None:
                self._between_tokens.add(between_s)

    def _count_tokens(self, usage: Usage | None) -> None:
        if usage is not None:
            self._prompt_tokens += usage.prompt_tokens or 0
            self._completion_tokens += usage.completion_tokens or 0


def _between_tokens_s(result: ChatResult[object]) -> float | None:
    """The mean time between two tokens of a stream."""
    call = result.call
    tokens = None if call.usage is None else call.usage.completion_tokens
    if tokens is None or tokens < 2 or call.ttft_s is None:
        return None
    return max(0.0, call.duration_s - call.queue_wait_s - call.ttft_s) / (tokens - 1)


def _families_of(metrics: Metrics) -> Iterator[MetricFamily]:
    counters: Sequence[tuple[str, str, int]] = (
        ("chats_succeeded_total", "Chats, streams and turns that ended with an answer.", metrics.succeeded),
        ("chats_failed_total", "Chats, streams and turns that ended with an error.", metrics.failed),
        ("tool_calls_total", "Tool calls that models asked for.", metrics.tool_calls),
        ("tool_calls_denied_total", "Tool calls that the guard did not let run.", metrics.tool_calls_denied),
        ("askers_refused_total", "Askers who were let through to no turn.", metrics.askers_refused),
        ("prompt_tokens_total", "Prompt tokens of answers, by the API.", metrics.prompt_tokens),
        (
            "completion_tokens_total",
            "Completion tokens of answers, by the API.",
            metrics.completion_tokens,
        ),
    )
    for name, meaning, value in counters:
        yield MetricFamily(f"gorouter_{name}", "counter", meaning, (Sample(value),))
    histograms: Sequence[tuple[str, str, Histogram]] = (
        ("queue_wait_seconds", "Time spent waiting for the pool.", metrics.queue_wait),
        ("first_token_seconds", "Time from sending to the first data of a stream.", metrics.first_token),
        ("between_tokens_seconds", "Mean time between the tokens of a stream.", metrics.between_tokens),
        ("chat_seconds", "Time from the request to the whole answer.", metrics.duration),
    )
    for name, meaning, histogram in histograms:
        yield MetricFamily(f"gorouter_{name}", "histogram", meaning, _samples_of(histogram))


def _samples_of(histogram: Histogram) -> tuple[Sample, ...]:
    counts = zip(histogram.bounds, histogram.counts, strict=True)
    buckets = [Sample(count, (("le", f"{bound:g}"),), "_bucket") for bound, count in counts]
    return (
        *buckets,
        Sample(histogram.count, (("le", "+Inf"),), "_bucket"),
        Sample(round(histogram.total_s, 6), (), "_sum"),
        Sample(histogram.count, (), "_count"),
    )
