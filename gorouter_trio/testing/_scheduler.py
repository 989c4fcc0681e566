"""All that this package touches of trio's inside, in one place, checked before it is used.

trio has no public way to make a run repeat itself or to raise something else than a cancel in a waiting task; the
hypothesis plugin of its own test suite does the first in the way that is used here.
"""

from __future__ import annotations

import gc
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, cast, final

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["StepCounter", "deterministic_run", "interrupt_task", "was_cancelled"]

_COLLECT_EVERY: Final = 500_000


class _Scheduler:
    """The two names of `trio._core._run` that decide in which order tasks run."""

    _ALLOW_DETERMINISTIC_SCHEDULING: bool
    _r: random.Random


def _scheduler() -> _Scheduler:
    from trio._core import _run

    found = cast("_Scheduler", _run)
    missing = [name for name in _Scheduler.__annotations__ if not hasattr(found, name)]
    if missing:
        raise RuntimeError(
            f"trio {trio.__version__} has no {missing[0]} in its scheduler any more, so a run cannot be repeated with "
            "it; use a version of trio that this version of gorouter_trio was tested with"
        )
    return found


@contextmanager
def deterministic_run(seed: str) -> Iterator[None]:
    """What `trio.run` does inside depends on `seed` alone, as far as trio and Python are concerned.

    Tasks that may run at the same time run in an order drawn from the seed. The functions of the module `random` are
    seeded, and the garbage collector runs at fixed steps only (`StepCounter`), so that finalisers do. Everything is as
    before afterwards. Raises `RuntimeError` for a trio in which this does not work. The state belongs to the process:
    no other thread may run trio meanwhile.
    """
    scheduler = _scheduler()
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING, scheduler._r.getstate(), random.getstate()  # noqa: SLF001 - see the module
    collecting = gc.isenabled()
    gc.disable()
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True  # noqa: SLF001 - see the module
    scheduler._r.seed(f"{seed}/scheduler")  # noqa: SLF001 - see the module
    random.seed(f"{seed}/random")
    try:
        yield
    finally:
        allowed, order, module = before
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = allowed  # noqa: SLF001 - see the module
        scheduler._r.setstate(order)  # noqa: SLF001 - see the module
        random.setstate(module)
        if collecting:
            gc.enable()


@final
class StepCounter(trio.abc.Instrument):
    """Counts the steps of all tasks, and collects garbage at fixed ones."""

    def __init__(self) -> None:
        self.steps = 0

    def after_task_step(self, _task: trio.lowlevel.Task) -> None:
        """Called by trio."""
        self.steps += 1
        if self.steps % _COLLECT_EVERY == 0:
            gc.collect()


class _Status:
    """What is known of a cancel status: its scope, and the status around it."""

    _scope: trio.CancelScope
    _parent: _Status | None


class _Task:
    """What is known of a task: how it waits, what it will wake with, and its innermost cancel status."""

    _abort_func: Callable[[object], object] | None
    _next_send: object
    _cancel_status: _Status

    def _attempt_abort(self, raise_cancel: Callable[[], object]) -> None: ...


def was_cancelled(task: trio.lowlevel.Task, *, within: trio.CancelScope) -> bool:
    """Whether the task, which is about to run, wakes with a `trio.Cancelled` that the scope `within` may have sent."""
    inside = cast("_Task", task)
    value = inside._next_send  # noqa: SLF001 - see the module
    if not (isinstance(value, outcome.Error) and isinstance(value.error, trio.Cancelled)):
        return False
    return not _is_shielded(inside._cancel_status, within)  # noqa: SLF001 - see the module


def interrupt_task(task: trio.lowlevel.Task, error: BaseException, *, within: trio.CancelScope) -> bool:
    """Raise `error` where the task waits, just as a cancel of the scope `within` would be raised there.

    False, and nothing done, when a cancel could not arrive now: the task does not wait, it waits for something that
    cannot be interrupted, or a shield is in between.
    """
    inside = cast("_Task", task)
    if inside._abort_func is None or _is_shielded(inside._cancel_status, within):  # noqa: SLF001 - see the module
        return False

    def raise_error() -> None:
        raise error

    inside._attempt_abort(raise_error)  # noqa: SLF001 - see the module
    return isinstance(inside._next_send, outcome.Error)  # noqa: SLF001 - see the module


def _is_shielded(status: _Status | None, within: trio.CancelScope) -> bool:
    while status is not None and status._scope is not within:  # noqa: SLF001 - see the module
        if status._scope.shield:  # noqa: SLF001 - see the module
            return True
        status = status._parent  # noqa: SLF001 - see the module
    return status is None
