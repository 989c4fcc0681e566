"""What a connection may say next: the order of messages, the ids of requests, their number and their pace.

Pure and clock-free. It decides on each message and says what to do; doing it, and who the principal is, are elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from msgspec import Struct

from ..errors import DecodeError
from .failures import TOO_MANY_REQUESTS
from .frames import Bucket, Violation
from .protocol import (
    VERSION,
    Cancel,
    ClientMessage,
    ErrorInfo,
    Failed,
    Grant,
    Hello,
    decode_client_message,
)

if TYPE_CHECKING:
    from .config import GatewayLimits

__all__ = ["ConnectionMachine", "Greet", "Ignore", "Move", "Refuse", "Serve", "Steer"]


class Greet(Struct, frozen=True):
    """The hello: authenticate, and welcome."""

    hello: Hello


class Serve(Struct, frozen=True):
    """A request to act upon; it ends with `ConnectionMachine.end`."""

    request: ClientMessage
    id: int


class Steer(Struct, frozen=True):
    """About a request that runs."""

    message: Grant | Cancel


class Refuse(Struct, frozen=True):
    """Answer so, and do nothing."""

    failed: Failed


class Ignore(Struct, frozen=True):
    """About a request that has ended meanwhile: nothing is to be done."""


Move: TypeAlias = Greet | Serve | Steer | Refuse | Ignore | Violation


class ConnectionMachine:
    """One connection's side of the protocol."""

    __slots__ = ("_bucket", "_last_id", "_limits", "_running", "state")

    def __init__(self, limits: GatewayLimits, *, now: float) -> None:
        self._limits = limits
        self._bucket = Bucket(limits.messages_per_s, limits.message_burst, now=now)
        self._running: set[int] = set()
        self._last_id = 0
        self.state: Literal["greeting", "authenticating", "open"] = "greeting"

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._running)

    def take(self, message: str | bytes, *, now: float) -> Move:
        """What to do about a message."""
        if not isinstance(message, str):
            return Violation(1003, "binary messages are not taken")
        if not self._bucket.take(now):
            return Violation(1008, "too many messages")
        try:
            decoded = decode_client_message(message)
        except DecodeError as exc:
            return Violation(4400, exc.message)
        if isinstance(decoded, Hello):
            return self._greet(decoded)
        if self.state != "open":
            return Violation(4409, "the first message has to be a hello")
        if isinstance(decoded, (Grant, Cancel)):
            return self._steer(decoded)
        return self._serve(decoded)

    def open(self) -> None:
        """The principal is known: requests may come."""
        self.state = "open"

    def end(self, request_id: int) -> None:
        """The request has its answer."""
        self._running.discard(request_id)

    def _greet(self, hello: Hello) -> Move:
        if self.state != "greeting":
            return Violation(4409, "a second hello")
        if hello.version != VERSION:
            return Violation(4406, f"this gateway speaks version {VERSION}")
        self.state = "authenticating"
        return Greet(hello)

    def _steer(self, message: Grant | Cancel) -> Move:
        if message.id > self._last_id:
            return Violation(4409, f"there was no request {message.id}")
        return Steer(message) if message.id in self._running else Ignore()

    def _serve(self, request: ClientMessage) -> Move:
        match request:
            case Hello() | Grant() | Cancel():
                raise AssertionError("is dealt with before")
            case _:
                request_id = request.id
        if request_id <= self._last_id:
            return Violation(4409, f"the id {request_id} is not above {self._last_id}")
        self._last_id = request_id
        if len(self._running) >= self._limits.max_requests:
            message = f"{self._limits.max_requests} requests run on this connection"
            return Refuse(Failed(id=request_id, error=ErrorInfo(code=TOO_MANY_REQUESTS, message=message)))
        self._running.add(request_id)
        return Serve(request, request_id)
