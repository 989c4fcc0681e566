"""Context variables of other people's code: where they come from in tasks that serve many callers.

A task has the context variables of whoever started it. That is right for a task that works for one caller, and wrong
for one that lives on and works for others: a trace, or the fields of a log, of the first would be that of all. So such
tasks begin with none, and take on those of a caller while they work for it. Nothing of this package depends on them.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    import trio

__all__ = ["adopted", "start_clean"]


def start_clean(nursery: trio.Nursery, run: Callable[..., Awaitable[object]], *args: object) -> None:
    """`nursery.start_soon(run, *args)`, in a task without context variables."""
    Context().run(nursery.start_soon, run, *args)


@contextmanager
def adopted(context: Context | None) -> Iterator[None]:
    """The current task has the variables of `context`, if there is one, until the block is left."""
    tokens = [] if context is None else [(variable, variable.set(value)) for variable, value in context.items()]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)
