"""Containment: where an exception of one part stops, so that the rest lives on, or leaves its nurseries as itself.

This is one of the two modules that may catch `Exception`. Nothing is swallowed: what is caught is
reported through the callback that the owner passes in. `Cancelled` and other `BaseException`s pass.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

__all__ = ["contain", "contain_sync", "lone_error", "ungrouped"]

T = TypeVar("T")


async def contain(work: Callable[[], Awaitable[T]], *, report: Callable[[Exception], None]) -> T | None:
    """Run `work`; an `Exception` of it goes to `report` and None is returned.

    An exception group is reported whole when everything in it is an `Exception`; one that also
    holds a `Cancelled` or another `BaseException` passes. `report` must not raise.
    """
    try:
        return await work()
    except Exception as exc:  # noqa: BLE001 - this module exists to do that
        report(exc)
        return None


def contain_sync(work: Callable[[], T], *, report: Callable[[Exception], None]) -> T | None:
    """`contain` for a function that does not wait."""
    try:
        return work()
    except Exception as exc:  # noqa: BLE001 - this module exists to do that
        report(exc)
        return None


@asynccontextmanager
async def ungrouped(opened: AbstractAsyncContextManager[T]) -> AsyncIterator[T]:
    """The same context manager, whose nurseries do not wrap up a lone error; see `lone_error`."""
    body: BaseException | None = None
    try:
        async with opened as value:
            try:
                yield value
            except BaseException as exc:
                body = exc
                raise
        return
    except BaseExceptionGroup as group:
        lone = lone_error(group, body)
    # Raised out here, where no exception is being handled, it keeps the context that it came with.
    try:
        raise lone
    finally:
        del body, lone  # a traceback that leads to itself would stay until the next collection


def lone_error(group: BaseExceptionGroup[BaseException], body: BaseException | None) -> BaseException:
    """What nurseries around a body wrapped up in `group`: the error of the body itself, where nothing else failed.

    The body may have raised a group of its own, which is left as it is. Groups do not stay the same
    object on their way through a nursery, what is in them does.
    """
    of_body = [] if body is None else list(_leaves(body))
    others = [
        exc
        for exc in _leaves(group)
        if not isinstance(exc, trio.Cancelled) and not any(exc is theirs for theirs in of_body)
    ]
    if not others:
        return next(_leaves(group)) if body is None else body
    is_lone = len(others) == 1 and all(isinstance(exc, trio.Cancelled) for exc in of_body)
    return others[0] if is_lone else group


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
