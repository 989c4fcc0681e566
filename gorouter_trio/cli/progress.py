"""How far a batch is: a bar where stderr is a terminal, a line now and then where it is not."""

from __future__ import annotations

import os
import sys
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..batch.input import PACKED_MAGIC
from ..batch.report import find_limit
from .terminal import format_cost, format_seconds, make_console

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractContextManager

    from ..batch.job import RunningJob
    from ..batch.runner import Batch
    from ..batch.tally import Tally
    from ..client import Client

__all__ = ["BatchView", "JobView", "open_progress"]

_DRAW_S = 0.2
_LINE_S = 5.0
_BAR_COLUMNS = 30
_PIECE_BYTES = 1024 * 1024
_HEAD_BYTES = 4
_LEAST_FRACTION = 1e-4
_COUNTED_BYTES = 4 * 1024**3


class _View(Protocol):
    """What a progress is of."""

    @property
    def done(self) -> int:
        """Rows that have ended."""

    @property
    def fraction(self) -> float | None:
        """The part of the input that was read, where nobody has counted its rows."""

    def facts(self, elapsed_s: float, total: int | None) -> list[str]:
        """What there is to say about it."""


class BatchView:
    """A batch whose results are counted."""

    fraction = None

    def __init__(self, tally: Tally, results: Batch) -> None:
        self._tally = tally
        self._results = results

    @property
    def done(self) -> int:
        """Rows that have ended."""
        return self._tally.rows

    def facts(self, elapsed_s: float, total: int | None) -> list[str]:
        """Rate, in flight, errors, tokens, cost."""
        tally = self._tally
        return [
            f"{tally.rows / elapsed_s:,.0f} rows/s",
            f"{self._results.statistics().in_flight:,} in flight",
            f"{tally.failed:,} failed",
            f"{tally.prompt_tokens + tally.completion_tokens:,} tokens",
            format_cost(tally.cost),
        ]


class JobView:
    """A job, and what its client says of the limits."""

    def __init__(self, running: RunningJob, client: Client) -> None:
        self._running = running
        self._client = client
        tally = running.tally
        self._before = (tally.rows, tally.prompt_tokens + tally.completion_tokens, tally.cost)

    @property
    def done(self) -> int:
        """Rows that have ended."""
        return self._running.tally.rows

    @property
    def fraction(self) -> float | None:
        """The part of the input that was read."""
        return self._running.progress().fraction

    def facts(self, elapsed_s: float, total: int | None) -> list[str]:
        """Rates, in flight, what holds it back, errors by kind, tokens, cost so far and in all."""
        tally = self._running.tally
        rows, tokens, cost = self._before
        tokens = tally.prompt_tokens + tally.completion_tokens - tokens
        errors = f" ({tally.errors_text()})" if tally.failed else ""
        made = tally.rows - rows
        projected = tally.cost + (tally.cost - cost) / made * max(total - tally.rows, 0) if made and total else None
        return [
            f"{made / elapsed_s:,.0f} rows/s",
            f"{tokens / elapsed_s:,.0f} tokens/s",
            f"{self._running.progress().in_flight:,} in flight{self._limit()}",
            f"{tally.failed:,} failed{errors}",
            format_cost(tally.cost) + ("" if projected is None else f" of about {format_cost(projected)}"),
        ]

    def _limit(self) -> str:
        """What holds the job back now."""
        stopping = self._running.stopping
        if stopping is not None:
            return f", no more rows ({stopping})"
        held = find_limit(self._client.statistics())
        return f", limited by {held}" if held else ""


class _Progress:
    def __init__(self, view: _View, unit: str) -> None:
        self._view = view
        self._unit = unit
        self._started_at = trio.current_time()
        self._first = view.done
        self.counted: int | None = None

    @property
    def total(self) -> int | None:
        """Rows in all: counted, or by the part of the input that they came from."""
        if self.counted is not None:
            return self.counted
        fraction = self._view.fraction
        return round(self._view.done / fraction) if fraction and fraction > _LEAST_FRACTION else None

    def facts(self) -> str:
        """The facts in one line."""
        return ", ".join(self._view.facts(max(trio.current_time() - self._started_at, 1e-9), self.total))

    def line(self) -> str:
        """Everything in one line."""
        return f"{self._done()} {self._unit}, {self.facts()}"

    def drawing(self) -> Group:
        """A bar, and the facts below it."""
        head = Table.grid(padding=(0, 2))
        total = self.total
        bar = ProgressBar(total=total, completed=self._view.done, width=_BAR_COLUMNS, pulse=total is None)
        head.add_row(bar, f"{self._done()} {self._unit}", self._left())
        return Group(head, Text(self.facts(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _done(self) -> str:
        total = self.total
        about = "" if self.counted is not None else "~"
        return f"{self._view.done:,}" + ("" if total is None else f"/{about}{total:,}")

    def _left(self) -> str:
        """How long it will take, by the rate so far."""
        done, total = self._view.done, self.total
        made = done - self._first
        if total is None or made <= 0 or done >= total:
            return ""
        return f"{format_seconds((trio.current_time() - self._started_at) / made * (total - done))} left"


@asynccontextmanager
async def open_progress(
    view: _View,
    *,
    total: int | None = None,
    path: str | None = None,
    limit: int | None = None,
    unit: str = "rows",
) -> AsyncIterator[None]:
    """Show the progress on stderr until left; `unit` is what is counted.

    Where `total` is not known, `path` is the input, whose rows are counted on the side, up to `limit`.
    """
    progress = _Progress(view, unit)
    progress.counted = total
    on_terminal = sys.stderr is not None and sys.stderr.isatty()
    live = (
        Live(
            console=make_console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        if on_terminal
        else None
    )
    showing: AbstractContextManager[object] = live or nullcontext()
    async with trio.open_nursery() as nursery:
        if path is not None:
            nursery.start_soon(_count_rows, progress, path, limit)
        with showing:
            nursery.start_soon(partial(_draw, live, progress) if live is not None else partial(_write_lines, progress))
            yield
            nursery.cancel_scope.cancel()


async def _draw(live: Live, progress: _Progress) -> None:
    while True:
        live.update(progress.drawing(), refresh=True)
        await trio.sleep(_DRAW_S)


async def _write_lines(progress: _Progress) -> None:
    while True:
        await trio.sleep(_LINE_S)
        with suppress(OSError, ValueError):
            print(progress.line(), file=sys.stderr, flush=True)


async def _count_rows(progress: _Progress, path: str, limit: int | None) -> None:
    count = await trio.to_thread.run_sync(_count_lines, path, abandon_on_cancel=True)
    progress.counted = count if count is None or limit is None else min(count, limit)


def _count_lines(path: str) -> int | None:
    """How many lines that are not blank a file has; None where it is packed, too large, or cannot be read."""
    if not os.path.isfile(path) or os.path.getsize(path) > _COUNTED_BYTES:
        return None
    try:
        with open(path, "rb", buffering=_PIECE_BYTES) as file:
            if file.read(_HEAD_BYTES).startswith(tuple(PACKED_MAGIC)):
                return None
            file.seek(0)
            return sum(not line.isspace() for line in file)
    except OSError:
        return None
