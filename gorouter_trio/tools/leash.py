"""An async tool on a leash: it can be given up even if it swallows its cancel or hides behind a shield.

Theory of operation. trio cancels by raising `Cancelled` at a task's next checkpoint, and trusts the code in
between to let it through. A tool is not trusted so far. Its coroutine is therefore awaited through a `Leash`,
which sees every outcome that trio hands in: once its scope is cancelled, the coroutine gets a bounded number of
cancels, and then the next one is raised around it instead. The coroutine is closed where it stands and never
resumed; one that swallows even that is leaked on purpose. A tool that has tasks of its own running is not cut
loose, since they need it to end.

`unshield` takes the shields off everything between a task and a scope, so that the cancel arrives at all. trio
has no public way to the scopes of another task, so this looks inside, and does nothing where a version of trio
looks different there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Coroutine, Generator
from typing import TYPE_CHECKING, Final, TypeVar, cast

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, FrameType

__all__ = ["Leash", "unshield"]

R = TypeVar("R")

_MAX_CANCELS: Final = 100
_MAX_CLOSES: Final = 10


class Leash(Generator[object, object, R]):
    """Awaits `coroutine`, which belongs to it from now on, until it ends or is given up.

    `scope` is the cancel scope around the `await`. What the coroutine raises passes unchanged; giving up raises
    the `trio.Cancelled` that it was to get.
    """

    def __init__(self, coroutine: Coroutine[object, object, R], scope: trio.CancelScope) -> None:
        self._coroutine = coroutine
        self._scope = scope
        self._cancels = 0
        self.is_cut = False
        """Whether the coroutine was given up, or is to be at the next cancel."""

    def __await__(self) -> Generator[object, object, R]:
        return self

    def send(self, value: object, /) -> object:
        """Called by trio, which hands over what a wait gave as an outcome."""
        if isinstance(value, outcome.Error) and isinstance(value.error, trio.Cancelled) and self._is_enough():
            return value.unwrap()
        return self._coroutine.send(value)

    def throw(self, kind: object, value: object = None, traceback: object = None, /) -> object:
        """Called by trio, for what goes wrong with the wait itself."""
        return self._coroutine.throw(cast("BaseException", kind if value is None else value))

    def _is_enough(self) -> bool:
        """Whether the coroutine has had its share of cancels, and may be left alone."""
        if not self._scope.cancel_called:
            return False
        self._cancels += 1
        if not (self.is_cut or self._cancels > _MAX_CANCELS) or trio.lowlevel.current_task().child_nurseries:
            return False
        self.is_cut = True
        return True

    def close(self) -> None:
        """Close the coroutine and those that it waits for; one that does not let itself be closed is kept for ever.

        It would run on when it is collected, in the midst of whatever runs then.
        """
        # The innermost first: one that refuses would take the refusal of those inside for an error.
        for each in reversed(_awaited(self._coroutine)):
            if not _is_closed(each):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))

    # What trio looks for when it shows where a task stands.

    @property
    def cr_await(self) -> object:
        return getattr(self._coroutine, "cr_await", None)

    @property
    def cr_code(self) -> CodeType | None:
        return getattr(self._coroutine, "cr_code", None)

    @property
    def cr_frame(self) -> FrameType | None:
        return getattr(self._coroutine, "cr_frame", None)


def _awaited(coroutine: object) -> list[object]:
    """The coroutine, what it awaits, what that awaits, and so on, as far as these can be closed."""
    found: list[object] = []
    while coroutine is not None and hasattr(coroutine, "close"):
        found.append(coroutine)
        coroutine = getattr(coroutine, "cr_await", getattr(coroutine, "gi_yieldfrom", None))
    return found


def _is_closed(coroutine: object) -> bool:
    """Close a coroutine, and say whether it is."""
    close = cast("Coroutine[object, object, object]", coroutine).close
    for _ in range(_MAX_CLOSES):
        # Closing runs the tool's own clean-up, which may raise anything: then it has ended, unless it goes on waiting,
        # of which Python makes a RuntimeError.
        closed = outcome.capture(close)
        frame = getattr(coroutine, "cr_frame", getattr(coroutine, "gi_frame", None))
        if isinstance(closed, outcome.Value) or frame is None:
            return True
    return False


def unshield(task: trio.lowlevel.Task, *, within: trio.CancelScope) -> None:
    """Take off every shield between `within` and where the task and the tasks that it waits for stand."""
    for each in _family(task):
        scopes: list[trio.CancelScope] = []
        status = getattr(each, "_cancel_status", None)
        while status is not None and (scope := getattr(status, "_scope", None)) is not within:
            scopes += [scope] if scope is not None else []
            status = getattr(status, "_parent", None)
        # What is not inside of the scope any more has shields that are not ours to take off.
        for scope in scopes if status is not None else ():
            scope.shield = False


def _family(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    todo = [task]
    while todo:
        each = todo.pop()
        yield each
        todo += [child for nursery in each.child_nurseries for child in nursery.child_tasks]
