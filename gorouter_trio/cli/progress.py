"""How far a batch is: a bar where stderr is a terminal, a line now and then where it is not."""

from __future__ import annotations

import os
import sys
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING

import trio
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .terminal import format_cost, format_seconds, make_console

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractContextManager

    from ..batch.runner import Batch
    from .tally import Tally

__all__ = ["open_progress"]

_DRAW_S = 0.2
_LINE_S = 5.0
_BAR_COLUMNS = 30
_PIECE_BYTES = 1024 * 1024
_COUNTED_BYTES = 4 * 1024**3


class _Progress:
    def __init__(self, tally: Tally, results: Batch) -> None:
        self._tally = tally
        self._results = results
        self._started_at = trio.current_time()
        self.total: int | None = None

    def facts(self) -> str:
        """Rate, in flight, errors, tokens, cost."""
        tally = self._tally
        elapsed_s = max(trio.current_time() - self._started_at, 1e-9)
        tokens = tally.prompt_tokens + tally.completion_tokens
        parts = [
            f"{tally.rows / elapsed_s:,.0f} rows/s",
            f"{self._results.statistics().in_flight:,} in flight",
            f"{tally.failed:,} failed",
            f"{tokens:,} tokens",
            format_cost(tally.cost),
        ]
        return ", ".join(parts)

    def line(self) -> str:
        """Everything in one line."""
        return f"{self._done()} rows, {self.facts()}"

    def drawing(self) -> Group:
        """A bar, and the facts below it."""
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.total, completed=self._tally.rows, width=_BAR_COLUMNS, pulse=self.total is None)
        head.add_row(bar, f"{self._done()} rows", self._left())
        return Group(head, Text(self.facts(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _done(self) -> str:
        return f"{self._tally.rows:,}" + ("" if self.total is None else f"/{self.total:,}")

    def _left(self) -> str:
        """How long it will take, by the rate so far."""
        rows = self._tally.rows
        if self.total is None or not 0 < rows < self.total:
            return ""
        return f"{format_seconds((trio.current_time() - self._started_at) / rows * (self.total - rows))} left"


@asynccontextmanager
async def open_progress(
    tally: Tally, results: Batch, *, total: int | None = None, path: str | None = None, limit: int | None = None
) -> AsyncIterator[None]:
    """Show the progress on stderr until left.

    Where `total` is not known, `path` is the input, whose rows are counted on the side, up to `limit`.
    """
    progress = _Progress(tally, results)
    progress.total = total
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
    progress.total = count if count is None or limit is None else min(count, limit)


def _count_lines(path: str) -> int | None:
    """How many lines that are not blank a file has; None when it is too large to be read twice, or cannot be."""
    if not os.path.isfile(path) or os.path.getsize(path) > _COUNTED_BYTES:
        return None
    try:
        with open(path, "rb", buffering=_PIECE_BYTES) as file:
            return sum(not line.isspace() for line in file)
    except OSError:
        return None
