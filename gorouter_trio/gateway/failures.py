"""Errors on their way over the wire, and back into the same classes at the other end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from .. import errors
from ..errors import ApiError, GorouterError
from .protocol import ErrorInfo

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ERROR_CODES", "TOO_MANY_REQUESTS", "error_info", "error_of", "internal_error", "refusal"]

TOO_MANY_REQUESTS: Final = "too_many_requests"
"""More requests at a time than the connection or the principal may have; nothing was begun."""

_DRAINING: Final = "draining"
_INTERNAL: Final = "internal"
# Attributes that say one thing each, all of them texts: what the error knows beyond the common fields.
_DETAILS: Final = ("phase", "kind", "problem", "budget", "model")


def _code(kind: type[GorouterError]) -> str:
    name = kind.__name__.removesuffix("Error")
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


_KINDS: Final[Mapping[str, type[GorouterError]]] = {
    _code(kind): kind
    for kind in map(errors.__dict__.get, errors.__all__)
    if isinstance(kind, type) and issubclass(kind, GorouterError)
}

ERROR_CODES: Final = (*sorted(_KINDS), _DRAINING, _INTERNAL, TOO_MANY_REQUESTS)
"""Every `code` that an error may have: those of the package's errors, and the gateway's own."""


def error_info(error: GorouterError) -> ErrorInfo:
    """What the asker gets to know of an error."""
    detail = next((str(getattr(error, name)) for name in _DETAILS if getattr(error, name, None)), None)
    status, code = (error.status, error.code) if isinstance(error, ApiError) else (None, None)
    return ErrorInfo(
        code=_code(type(error)),
        message=error.message,
        status=status,
        api_code=code,
        retry_after_s=getattr(error, "retry_after_s", None),
        maybe_billed=error.maybe_billed,
        attempts=error.attempts,
        generation_id=error.generation_id,
        question_id=getattr(error, "question_id", None),
        detail=detail,
        partial=error.partial,
    )


def internal_error() -> ErrorInfo:
    """What an asker gets to know of a bug."""
    return ErrorInfo(code=_INTERNAL, message="an error inside the gateway")


def refusal(message: str) -> ErrorInfo:
    """The gateway takes nothing new."""
    return ErrorInfo(code=_DRAINING, message=message)


def error_of(info: ErrorInfo) -> GorouterError:
    """The error that `info` tells of, as the class that it was; what only the gateway knows is a `SessionBusyError`."""
    kind = _KINDS.get(info.code)
    if kind is None:
        is_busy = info.code in {_DRAINING, TOO_MANY_REQUESTS}
        kind = errors.SessionBusyError if is_busy else errors.ActorGoneError
    error = kind.__new__(kind)
    Exception.__init__(error, info.message)
    state: dict[str, object] = {
        "message": info.message,
        "maybe_billed": info.maybe_billed,
        "attempts": info.attempts,
        "generation_id": info.generation_id,
        "partial": info.partial,
        "retry_after_s": info.retry_after_s,
        "question_id": info.question_id,
    }
    state |= dict.fromkeys(_DETAILS, info.detail)
    state |= {"status": info.status or 0, "code": info.api_code, "metadata": {}, "sent": True, "proxy_status": None}
    state |= {"limit_usd": None, "left_usd": None, "needed_usd": None, "details": {}}
    error.__dict__.update(state)
    return error
