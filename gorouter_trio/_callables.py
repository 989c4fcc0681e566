"""What users give to be called: whether it can be, before it is too late to say so."""

from __future__ import annotations

import inspect
from types import MethodType

__all__ = ["can_take", "is_async", "is_same"]


def can_take(function: object, count: int) -> bool:
    """Whether `function` can be called with so many arguments; yes where it does not say, as some builtins do."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def is_async(function: object) -> bool:
    """Whether `function` is an async one, or an object that is called like one."""
    called = getattr(function, "__call__", None)  # noqa: B004 - not whether it can be called, but how
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def is_same(one: object, other: object) -> bool:
    """Whether two are one function; a method is another object each time it is looked up."""
    return one is other or (isinstance(one, MethodType) and one == other)
