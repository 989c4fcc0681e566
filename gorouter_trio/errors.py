"""Every error this package raises, in one tree.

::

    GorouterError
    ├── ApiError                      the API answered, and the answer is an error
    │   ├── BadRequestError           400, 413, 422, and requests refused before anything was sent
    │   ├── AuthenticationError       401
    │   ├── InsufficientCreditsError  402
    │   ├── PermissionDeniedError     403
    │   │   └── ModerationError       403 with the reasons of a moderation
    │   ├── NotFoundError             404
    │   ├── RateLimitError            429
    │   └── ProviderError             408, 409, 425, 5xx, an error inside a 200 or in a stream
    │       └── OverloadedError       503, 529
    ├── TransportError                no usable answer arrived
    │   ├── ConnectError              nothing was sent (DNS, TCP, TLS, proxy)
    │   ├── DeadlineExceededError     a wall-clock deadline passed; `phase` says which
    │   ├── StreamBrokenError         the reply was cut before its end
    │   └── DecodeError               the reply is not what the API promises
    ├── PoolError
    │   ├── CircuitOpenError          the model failed again and again, and is left alone for a while
    │   ├── PoolFullError             the request queue is full and the policy is to reject
    │   └── PoolClosedError           the pool is closed or closing
    ├── SessionError
    │   ├── SessionBusyError          the mailbox or the session's policy refuses another turn
    │   ├── SessionNotFoundError      there is none, or none that the caller may know of
    │   ├── SessionConflictError      somebody else wrote to the session, or it is open with other options
    │   ├── TurnInDoubtError          a turn was sent and its answer is unknown
    │   ├── TurnInterruptedError      the turn was interrupted; `partial` holds what had arrived
    │   ├── TurnParkedError           the turn waits for a reply from outside, and nobody waits for the turn
    │   └── HistoryNotSaved           the answer was paid for and delivered, but not stored
    ├── BudgetError
    │   ├── BudgetExceededError       a budget does not cover the request; nothing was sent
    │   └── UnpriceableRequestError   nobody can say what the request may cost; nothing was sent
    ├── StoreError                    a store of histories cannot be read or written; `kind` says why
    ├── SecurityError                 the guard refused
    │   ├── AccessDeniedError         the caller has no right to it
    │   ├── AuthenticationRequiredError   nobody is authenticated, and somebody has to be
    │   ├── InvalidTokenError         the access token is unknown, expired, revoked or malformed
    │   ├── ToolRateLimitError        too many calls; `retry_after_s` says when there is room again
    │   ├── DangerousArgumentError    an argument that a rule forbids
    │   └── SecurityConfigError       a rule that cannot be right (also a ConfigError)
    ├── ToolError                     raised by a tool: its message is for the model
    ├── ActorGoneError                the actor ended before it could answer
    ├── InvalidOutputError            the answer has not the form that was asked for; it is in `partial`
    ├── ExtensionError                a middleware or a hook failed; its own exception is the cause
    ├── StreamNotFinishedError        the result of a stream was read before its end
    └── ConfigError                   a setting is missing or wrong

What came from the network carries the same fields everywhere: see `GorouterError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal

    from .wire.result import ChatResult

__all__ = [
    "AccessDeniedError",
    "ActorGoneError",
    "ApiError",
    "AuthenticationError",
    "AuthenticationRequiredError",
    "BadRequestError",
    "BudgetError",
    "BudgetExceededError",
    "CircuitOpenError",
    "ConfigError",
    "ConnectError",
    "DangerousArgumentError",
    "DeadlineExceededError",
    "DeadlinePhase",
    "DecodeError",
    "ExtensionError",
    "GorouterError",
    "HistoryNotSaved",
    "InsufficientCreditsError",
    "InvalidOutputError",
    "InvalidTokenError",
    "ModerationError",
    "NotFoundError",
    "OverloadedError",
    "PermissionDeniedError",
    "PoolClosedError",
    "PoolError",
    "PoolFullError",
    "ProviderError",
    "RateLimitError",
    "SecurityConfigError",
    "SecurityError",
    "SessionBusyError",
    "SessionConflictError",
    "SessionError",
    "SessionNotFoundError",
    "StoreError",
    "StoreErrorKind",
    "StreamBrokenError",
    "StreamNotFinishedError",
    "TokenProblem",
    "ToolError",
    "ToolRateLimitError",
    "TransportError",
    "TurnInDoubtError",
    "TurnInterruptedError",
    "TurnParkedError",
    "UnpriceableRequestError",
]

DeadlinePhase = Literal["queue", "connect", "headers", "first_data", "data_idle", "total"]
"""The part of a request during which its deadline passed (DESIGN.md, the pool, "Deadlines")."""

StoreErrorKind = Literal[
    "corrupt",
    "full",
    "locked",
    "denied",
    "newer",
    "foreign",
    "closed",
    "io",
    "unreachable",
    "timeout",
    "loading",
    "read_only",
    "refused",
]
"""Why a store failed: its file is damaged, its disk full, another process holds it, the file system does not allow it,
it was written by a newer version or by something else, it is closed, or the disk failed.

Of a store behind a network also: `unreachable`, nothing was sent; `io` and `timeout`, the connection broke or no answer
came in time, and whether the last write happened is unknown; `loading`, `read_only` and `refused`, it answered that it
does nothing of the kind now, as long as it is a replica, or at all."""

TokenProblem = Literal[
    "unknown", "malformed", "expired", "not_yet_valid", "revoked", "too_many_attempts", "unavailable"
]
"""Why an access token was refused. Nobody who does not hold a genuine token gets to see anything but `unknown`,
`malformed` and `too_many_attempts`; `unavailable` is an authenticator of the program's own that failed."""


class GorouterError(Exception):
    """The root of the tree.

    `message` is one line without secrets. `maybe_billed` is true when the provider may have
    charged for a request whose answer was lost. `attempts` counts the requests that were sent.
    `generation_id` finds the charge later; `partial` is what had arrived before the error.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message
        self.generation_id: str | None = None
        self.partial: ChatResult[object] | None = None
        self.maybe_billed = False
        self.attempts = 0


class ApiError(GorouterError):
    """The API answered with an error.

    `status` is the HTTP status, which is 200 for errors inside a body or a stream; `code` is the
    error's own code, an int where the wire had a number. `metadata` is the error's metadata as
    decoded JSON. `retry_after_s` is the wait that the server asked for, in seconds, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: int | str | None = None,
        metadata: Mapping[str, object] | None = None,
        retry_after_s: float | None = None,
        generation_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code: int | str | None = status if code is None else code
        self.metadata: Mapping[str, object] = metadata or {}
        self.retry_after_s = retry_after_s
        self.generation_id = generation_id

    def __str__(self) -> str:
        return f"{self.message} (status {self.status}, code {self.code})"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by state: the constructor takes keyword arguments, which `Exception` does not keep."""
        return (_rebuild, (type(self), self.message, self.__dict__))


class BadRequestError(ApiError):
    """The request is wrong in form (400, 413, 422), or was refused here before it was sent."""


class AuthenticationError(ApiError):
    """The key is missing, unknown or disabled (401)."""


class InsufficientCreditsError(ApiError):
    """Credits, a key's limit or the in-flight budget do not cover the request (402)."""


class PermissionDeniedError(ApiError):
    """The key or a guardrail does not allow the request (403)."""


class ModerationError(PermissionDeniedError):
    """The input was flagged by a moderation (403); `metadata["reasons"]` says why."""


class NotFoundError(ApiError):
    """No such model, endpoint or generation (404)."""


class RateLimitError(ApiError):
    """Too many requests (429); `retry_after_s` is the wait asked for, where the server gave one."""


class ProviderError(ApiError):
    """The provider behind the API failed."""


class OverloadedError(ProviderError):
    """The provider has no room now (503, 529)."""


class TransportError(GorouterError):
    """No usable answer arrived."""


class ConnectError(TransportError):
    """The connection could not be made: nothing was sent, nothing can have been billed.

    `proxy_status` is the HTTP status with which a proxy refused, or None.
    """

    def __init__(self, message: str, *, proxy_status: int | None = None) -> None:
        super().__init__(message)
        self.proxy_status = proxy_status


class DeadlineExceededError(TransportError):
    """A wall-clock deadline passed during `phase`."""

    def __init__(self, message: str, *, phase: DeadlinePhase) -> None:
        super().__init__(message)
        self.phase: DeadlinePhase = phase

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class StreamBrokenError(TransportError):
    """The connection ended before the reply did. `sent` says whether the request had gone out."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class DecodeError(TransportError):
    """The reply is malformed: broken HTTP, JSON that does not parse, or a shape nobody promised."""


class PoolError(GorouterError):
    """The pool did not take the request; nothing was sent."""


class PoolFullError(PoolError):
    """The bounded queue in front of the workers is full and the policy is to reject."""


class CircuitOpenError(PoolError):
    """The model failed again and again, so that its requests are refused for the next `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class PoolClosedError(PoolError):
    """The pool is closed or closing."""


class SessionError(GorouterError):
    """A session refused or lost a turn."""


class SessionBusyError(SessionError):
    """The session's mailbox is full, or its policy rejects a turn while one is running."""


class SessionNotFoundError(SessionError):
    """There is no such session, or none that the caller may know of."""


class SessionConflictError(SessionError):
    """The session was written by somebody else, or is open with different options."""


class TurnInDoubtError(SessionError):
    """The turn was sent, and whether it was answered is unknown; it is not sent again unasked (`resume="resend"`)."""


class TurnInterruptedError(SessionError):
    """The turn was interrupted, by `interrupt()` or by a newer message; `partial` is what had arrived."""


class TurnParkedError(SessionError):
    """A call of the turn waits for a reply to `question_id`; asked again under its id, the turn goes on from there."""

    def __init__(self, message: str, *, question_id: str) -> None:
        super().__init__(message)
        self.question_id = question_id

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class HistoryNotSaved(SessionError):  # noqa: N818 - the name is the contract of DESIGN.md section 2
    """The answer arrived and is in `partial`, complete; it could not be stored."""


class BudgetError(GorouterError):
    """A request is not paid for; nothing was sent."""


class BudgetExceededError(BudgetError):
    """A budget does not cover what the request may cost at most; nothing was sent.

    `budget` says which one. `left_usd` is what is neither spent nor held by requests in flight, `needed_usd` the worst
    case of the request. Amounts are None where too many budgets or too many waiting requests are the reason.
    """

    def __init__(
        self,
        message: str,
        *,
        budget: str,
        limit_usd: Decimal | None = None,
        left_usd: Decimal | None = None,
        needed_usd: Decimal | None = None,
    ) -> None:
        super().__init__(message)
        self.budget = budget
        self.limit_usd = limit_usd
        self.left_usd = left_usd
        self.needed_usd = needed_usd

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class UnpriceableRequestError(BudgetError):
    """There is a budget, and the price of `model`, or of something in the request, is not known; nothing was sent."""

    def __init__(self, message: str, *, model: str = "") -> None:
        super().__init__(message)
        self.model = model

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class StoreError(GorouterError):
    """A store could not read or write; `kind` says why. What it holds is as it was, or a note says otherwise."""

    def __init__(self, message: str, *, kind: StoreErrorKind) -> None:
        super().__init__(message)
        self.kind: StoreErrorKind = kind

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class ToolError(GorouterError):
    """Raised inside a tool to tell the model what went wrong: the message becomes the result of the call.

    Any other exception gives the model a short neutral message; the whole of it goes into the log and the
    execution report. `details` goes into the report only.
    """

    def __init__(self, message: str, *, details: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.details: Mapping[str, object] = details or {}

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class SecurityError(GorouterError):
    """The guard refused; the message is for the caller's log and holds no secret."""


class AccessDeniedError(SecurityError):
    """The caller has no right to what was asked."""


class AuthenticationRequiredError(SecurityError):
    """No access token was given, and one is required."""


class InvalidTokenError(SecurityError):
    """The access token does not hold. `problem` says why; `retry_after_s` is set after too many failed attempts."""

    def __init__(self, message: str, *, problem: TokenProblem, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.problem: TokenProblem = problem
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class ToolRateLimitError(SecurityError):
    """Too many calls of a tool; in `retry_after_s` seconds there is room for one again."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__))


class DangerousArgumentError(SecurityError):
    """An argument that a rule forbids: of a tool call, or a URL or path that leads where it must not."""


class ActorGoneError(GorouterError):
    """The actor ended before it could answer; the mail was not acted upon, or its outcome is unknown."""


class InvalidOutputError(GorouterError):
    """The answer has not the form that was asked for, also after asking again; `partial` is the last answer."""


class ExtensionError(GorouterError):
    """A middleware or a `before` hook raised something of its own, which is the cause, or broke its contract."""


class StreamNotFinishedError(GorouterError):
    """`result` was read before the stream had ended."""


class ConfigError(GorouterError):
    """A setting is missing or wrong; the message names it."""


class SecurityConfigError(SecurityError, ConfigError):
    """A setting of the guard is wrong; the message names the place. Raised when the setting is made."""


def _rebuild(kind: type[GorouterError], message: str, state: dict[str, object]) -> GorouterError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error
