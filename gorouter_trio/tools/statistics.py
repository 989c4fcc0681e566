"""What a supervisor of tools can be asked: snapshots."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["ToolCallStatistics", "ToolStatistics"]


class ToolStatistics(Struct, frozen=True, kw_only=True):
    """A look at a supervisor.

    `running` are jobs that have begun and not ended, `given_up` those of them whose outcome was given without them,
    because their tool does not end. `threads` are threads at work, `abandoned_threads` those of them that nobody
    waits for. `processes` are calls that have one now. `calls` counts all that were ever settled, `failures` those
    without success.
    """

    running: int
    given_up: int
    threads: int
    abandoned_threads: int
    processes: int
    calls: int
    failures: int


class ToolCallStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of one call that has begun and not ended.

    `phase` is `checks` while it waits for a place to run in, `approval` while somebody is asked, `running`, or
    `given_up` where its outcome was given without it. `since_s` is how many seconds ago the call's turn came.
    """

    tool: str
    call_id: str
    phase: str
    since_s: float
    session: str | None = None
    turn_id: str | None = None
