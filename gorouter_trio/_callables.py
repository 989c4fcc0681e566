"""What users give to be called: whether it can be, before it is too late to say so."""

from __future__ import annotations

import inspect

__all__ = ["can_take"]


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
