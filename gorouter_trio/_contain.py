"""Containment: where an exception of one part stops, so that the rest lives on.

This is one of the two modules that may catch `Exception`. Nothing is swallowed: what is caught is
reported through the callback that the owner passes in. `Cancelled` and other `BaseException`s pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["contain", "contain_sync"]

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
