"""The simulator's memory: counters, charges, a log of the last requests, and how often equal requests came."""

from __future__ import annotations

from collections import deque
from typing import Final, final

from .config import RequestRecord, SimulatorConfig, SimulatorStatistics
from .ledger import Ledger

_REMEMBERED_REQUESTS: Final = 65_536


@final
class Books:
    """What one simulator remembers; all of it is bounded."""

    def __init__(self, config: SimulatorConfig) -> None:
        self.ledger = Ledger(size=config.ledger_size)
        self.log: deque[RequestRecord] = deque(maxlen=config.log_size)
        self._seen: dict[bytes, int] = {}
        self._seen_before: dict[bytes, int] = {}
        self._ended = {"completed": 0, "cancelled": 0, "failed": 0, "refused": 0}
        self._received = 0
        self._processed = 0
        self._faults = 0
        self._streamed = 0
        self.in_flight = 0
        """Chat requests being answered now."""
        self._max_in_flight = 0

    def arrive(self) -> None:
        """A chat request came."""
        self._received += 1
        self.in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self.in_flight)

    def process(self, *, is_stream: bool) -> None:
        """Its generation starts."""
        self._processed += 1
        self._streamed += is_stream

    def inject(self) -> None:
        """It meets a fault."""
        self._faults += 1

    def leave(self, record: RequestRecord) -> None:
        """It has ended."""
        self.in_flight -= 1
        self._ended[record.outcome] += 1
        self.log.append(record)

    def count_equal(self, digest: bytes) -> int:
        """How many equal requests came before this one, as far as that is remembered."""
        before = self._seen.get(digest)
        if before is None:
            before = self._seen_before.pop(digest, 0)
        self._seen[digest] = before + 1
        if len(self._seen) >= _REMEMBERED_REQUESTS // 2:
            # Two dicts in turn: one that loses what is old one by one grows to several times its size now and then.
            self._seen, self._seen_before = {}, self._seen
        return before

    def statistics(self) -> SimulatorStatistics:
        """A snapshot."""
        return SimulatorStatistics(
            received=self._received,
            processed=self._processed,
            faults=self._faults,
            streamed=self._streamed,
            in_flight=self.in_flight,
            max_in_flight=self._max_in_flight,
            prompt_tokens=self.ledger.prompt_tokens,
            completion_tokens=self.ledger.completion_tokens,
            charged_nanousd=self.ledger.total_nanousd,
            **self._ended,
        )
