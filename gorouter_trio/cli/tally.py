"""What a run adds up: rows, errors by kind, tokens, cost and latencies, in memory that does not grow."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING

from ..batch.output import error_code

if TYPE_CHECKING:
    from ..batch.runner import BatchResult
    from ..wire.result import CallRecord

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
        if result.error is not None:
            self.errors[error_code(result.error)] += 1
            self.maybe_billed += result.error.maybe_billed
            self.retries += max(result.error.attempts - 1, 0)
        elif result.result is not None:
            self.succeeded += 1
            self.add_call(result.result.call)

    def add_call(self, call: CallRecord) -> None:
        """Count the tokens, the cost and the times of one answer."""
        self.latencies.add(call.duration_s)
        self.maybe_billed += call.maybe_billed
        self.retries += call.attempts - 1
        if call.ttft_s is not None:
            self.first_tokens.add(call.ttft_s)
        if call.usage is not None:
            self.prompt_tokens += call.usage.prompt_tokens or 0
            self.completion_tokens += call.usage.completion_tokens or 0
        if call.cost is None:
            self.unpriced += 1
        else:
            self.cost += call.cost

    def errors_text(self) -> str:
        """The errors by kind, most frequent first; empty when there are none."""
        return ", ".join(f"{count:,} × {code}" for code, count in self.errors.most_common())
