"""An async tool on a leash: it can be given up even if it swallows its cancel or hides behind a shield.

Theory of operation. trio cancels by raising `Cancelled` at a task's next checkpoint, and trusts the code in
between to let it through. A tool is not trusted so far. Its coroutine is therefore awaited through a `Leash`,
which sees every exception that trio throws in: once its scope is cancelled, the coroutine is handed a bounded
number of them, and then the next one is raised around it instead. The coroutine is closed where it stands and
never resumed. A tool that has tasks of its own running is not cut loose, since they need it to end.

`unshield` takes the shields off everything between a task and a scope, so that the cancel arrives at all. trio
has no public way to the scopes of another task, so this looks inside, and does nothing where a version of trio
looks different there.
"""

from __future__ import annotations

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
        """Called by trio."""
        return self._coroutine.send(value)

    def throw(self, kind: object, value: object = None, traceback: object = None, /) -> object:
        """Called by trio."""
        error = cast("BaseException", kind if value is None else value)
        if isinstance(error, trio.Cancelled) and self._scope.cancel_called:
            self._cancels += 1
            if (self.is_cut or self._cancels > _MAX_CANCELS) and not trio.lowlevel.current_task().child_nurseries:
                self.is_cut = True
                raise error
        return self._coroutine.throw(error)

    def close(self) -> None:
        """Close the coroutine as far as it lets itself be closed."""
        for _ in range(_MAX_CLOSES):
            # Closing runs the tool's own clean-up, which may raise anything.
            if isinstance(outcome.capture(self._coroutine.close), outcome.Value):
                return

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
