"""Cancelling a scenario at every step it takes.

A *step* is what one task does between two yields to the scheduler. All tasks count that run meanwhile, so the scenario
is also cut off between any two things that its servers do. The order of tasks that could run at the same time is drawn
from a seed instead of at random: the same seed gives the same steps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from unittest import mock

import trio
import trio.testing
from trio._core import _run as scheduler

T = TypeVar("T")


@contextmanager
def fixed_order(seed: int) -> Iterator[None]:
    """Let trio run tasks in an order that follows from `seed`."""
    state = scheduler._r.getstate()
    with mock.patch.object(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", new=True):
        scheduler._r.seed(seed)
        try:
            yield
        finally:
            scheduler._r.setstate(state)


class StepWatch(trio.abc.Instrument):
    """Counts the steps of all tasks; calls `act` after step number `stop_at`."""

    def __init__(self, stop_at: int | None = None, act: Callable[[], object] = lambda: None) -> None:
        self.steps = 0
        self._stop_at = stop_at
        self._act = act

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps == self._stop_at:
            self._act()


async def cut_off(scenario: Callable[[], Awaitable[object]], *, at: int | None) -> tuple[int, bool]:
    """Run `scenario` and cancel it after step `at`; returns the steps taken, and whether it was cut off."""
    with trio.CancelScope() as scope:
        watch = StepWatch(at, scope.cancel)
        trio.lowlevel.add_instrument(watch)
        try:
            await scenario()
        finally:
            trio.lowlevel.remove_instrument(watch)
    return watch.steps, scope.cancelled_caught


@dataclass(slots=True)
class Report:
    """What a sweep did."""

    runs: int = 0
    cut_off: int = 0
    steps: int = 0

    def __str__(self) -> str:
        return f"{self.steps} steps, {self.runs} runs, {self.cut_off} cut off"


async def sweep(
    open_place: Callable[[], AbstractAsyncContextManager[T]],
    scenario: Callable[[T], Awaitable[object]],
    *,
    check: Callable[[T, bool], Awaitable[None]],
    seeds: Iterable[int] = range(2),
) -> Report:
    """Run `scenario` in a fresh place once for each step that it takes, and cancel it there.

    `check` looks at the place afterwards; it is told whether the scenario came to its end. Leaving the place must leave
    no task behind.
    """
    report = Report()
    for seed in seeds:
        steps, at = None, 0
        while steps is None or at <= steps:
            before = trio.lowlevel.current_statistics().tasks_living
            with fixed_order(seed):
                async with open_place() as place:
                    await trio.testing.wait_all_tasks_blocked()
                    taken, is_cut_off = await cut_off(partial(scenario, place), at=at or None)
                    await check(place, not is_cut_off)
            steps = taken if steps is None else steps
            left = trio.lowlevel.current_statistics().tasks_living - before
            assert left == 0, f"cut off at step {at} of {steps} (seed {seed}), {left} tasks are left"
            report.runs += 1
            report.cut_off += is_cut_off
            report.steps = max(report.steps, steps)
            at += 1
    return report
