"""What a run adds up: rows, errors by kind, tokens, cost and latencies, in memory that does not grow."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

from .output import error_code

if TYPE_CHECKING:
    from ..wire.batch import OutputLine
    from ..wire.result import CallRecord
    from .runner import BatchResult

__all__ = ["Quantiles", "Tally"]


class Quantiles:
    """Quantiles of durations within 1 %, from counts by size."""

    _STEP = math.log(1.02)
    _LEAST_S = 1e-6

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return self._counts.total()

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[round(math.log(max(seconds, self._LEAST_S)) / self._STEP)] += 1

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of all do not exceed, or None when there are none."""
        rank = math.ceil(share * self._counts.total())
        for step in sorted(self._counts):
            rank -= self._counts[step]
            if rank <= 0:
                return math.exp(step * self._STEP)
        return None


class Tally:
    """The sums of the results seen so far."""

    def __init__(self) -> None:
        self.succeeded = 0
        self.errors: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cost = Decimal(0)
        self.unpriced = 0
        self.maybe_billed = 0
        self.retries = 0
        self.cached = 0
        # Of the cost: that of failed rows.
        self.failed_cost = Decimal(0)
        self.latencies = Quantiles()
        self.first_tokens = Quantiles()

    @property
    def failed(self) -> int:
        """Rows that ended in an error."""
        return self.errors.total()

    @property
    def rows(self) -> int:
        """Rows that ended."""
        return self.succeeded + self.failed

    def add(self, result: BatchResult) -> None:
        """Count one row."""
        self.maybe_billed += result.maybe_billed
        self.cached += result.cached
        if result.error is not None:
            self.errors[error_code(result.error)] += 1
            self.retries += max(result.error.attempts - 1, 0)
            if result.error.partial is not None:
                self._add_cost(result.error.partial.cost)
        elif result.result is not None:
            self.succeeded += 1
            self.retries += max(result.result.attempts - 1 - len(result.result.rounds), 0)
            for call in (*result.result.rounds, result.result.call):
                self._add_times(call)

    def add_line(self, line: OutputLine) -> None:
        """Count a row that an earlier run has written."""
        self.maybe_billed += line.maybe_billed
        self.cached += line.cached
        if line.error is not None:
            self.errors[line.error.code] += 1
            self.cost += line.error.cost_usd or 0
            self.failed_cost += line.error.cost_usd or 0
            return
        self.succeeded += 1
        usage = None if line.response is None or line.response.body is None else line.response.body.usage
        if usage is not None:
            self.prompt_tokens += usage.prompt_tokens or 0
            self.completion_tokens += usage.completion_tokens or 0
        if not line.cached:
            self._add_cost(None if usage is None else usage.cost)

    def add_call(self, call: CallRecord) -> None:
        """Count the tokens, the cost and the times of one answer."""
        self.maybe_billed += call.maybe_billed
        self.retries += call.attempts - 1
        self._add_times(call)

    def _add_times(self, call: CallRecord) -> None:
        self.latencies.add(call.duration_s)
        if call.ttft_s is not None:
            self.first_tokens.add(call.ttft_s)
        if call.usage is not None:
            self.prompt_tokens += call.usage.prompt_tokens or 0
            self.completion_tokens += call.usage.completion_tokens or 0
        self._add_cost(call.cost)

    def _add_cost(self, cost: Decimal | None) -> None:
        if cost is None:
            self.unpriced += 1
        else:
            self.cost += cost

    def errors_text(self) -> str:
        """The errors by kind, most frequent first; empty when there are none."""
        return ", ".join(f"{count:,} × {code}" for code, count in self.errors.most_common())
