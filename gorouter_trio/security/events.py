"""What a security manager tells those who watch it: frozen values, in order, and never in the way of a decision.

An event holds no token, no key, no secret of the configuration, and arguments only where `audit_arguments` says so. It
names a principal by id and tenant. Events are told as JSON too: `msgspec.json.encode` writes the seed's event name
under `event`.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import trio
from msgspec import Struct

from .._contain import contain, contain_sync
from .arguments import FindingKind
from .rules import DenyReason

if TYPE_CHECKING:
    from trio import TaskStatus

__all__ = [
    "AccessDenied",
    "AccessGranted",
    "ArgumentAudited",
    "AuthFailed",
    "AuthSucceeded",
    "ConfigUpdated",
    "Emitter",
    "EventHandler",
    "RateLimitHit",
    "RateLimitsCleared",
    "SecurityEvent",
    "SecurityFault",
    "TokenCacheCleared",
    "ToolCalled",
]

_QUEUE = 1_024


class SecurityEvent(Struct, frozen=True, kw_only=True, tag_field="event"):
    """What they all have: `at_s`, wall-clock seconds since the epoch, None where the caller gave no time."""

    at_s: float | None = None


class AccessGranted(SecurityEvent, frozen=True, kw_only=True, tag="access:granted"):
    """A call may run."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str


class AccessDenied(SecurityEvent, frozen=True, kw_only=True, tag="access:denied"):
    """A call was denied by a rule on who may call; `message` names the rule."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str
    reason: DenyReason
    message: str


class SecurityFault(SecurityEvent, frozen=True, kw_only=True, tag="security:error"):
    """A call was denied for its arguments, or because a check failed; `message` names the rule or the failure."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str
    message: str


class ArgumentAudited(SecurityEvent, frozen=True, kw_only=True, tag="security:audit"):
    """A rule on arguments was broken, and is only audited: the call was not denied for it."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str
    finding: FindingKind
    rule: str


class RateLimitHit(SecurityEvent, frozen=True, kw_only=True, tag="ratelimit:hit"):
    """A call was denied because its caller has used up a limit."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str
    retry_after_s: float


class AuthSucceeded(SecurityEvent, frozen=True, kw_only=True, tag="auth:success"):
    """A token was accepted; `cached` when it was known from before."""

    principal: str
    tenant: str
    cached: bool


class AuthFailed(SecurityEvent, frozen=True, kw_only=True, tag="auth:failed"):
    """A token was refused, for `problem`; `source` is where the attempt came from."""

    problem: str
    source: str


class TokenCacheCleared(SecurityEvent, frozen=True, kw_only=True, tag="auth:cache:cleared"):
    """No token is remembered any more."""


class RateLimitsCleared(SecurityEvent, frozen=True, kw_only=True, tag="ratelimit:cleared"):
    """The calls of one principal are forgotten, or of everybody where `principal` is None."""

    principal: str | None
    tenant: str


class ConfigUpdated(SecurityEvent, frozen=True, kw_only=True, tag="config:updated"):
    """The configuration was exchanged; `changed` names the fields that differ, without their values."""

    changed: tuple[str, ...]


class ToolCalled(SecurityEvent, frozen=True, kw_only=True, tag="tool:call"):
    """A call has ended. `arguments` is None unless the configuration says `audit_arguments`."""

    tool: str
    principal: str | None
    tenant: str
    session: str | None
    call_id: str
    status: str
    error: str | None
    duration_s: float
    arguments: object = None


EventHandler: TypeAlias = Callable[[SecurityEvent], Awaitable[None] | None]
"""What is called with an event; it may be async where `run_events` runs."""

E = TypeVar("E", bound=SecurityEvent)


class Emitter:
    """Hands events to handlers, in the order in which they came.

    Without `run_events`, a handler is called by whoever emits, after the decision is made; an async one cannot be.
    With it, events wait in a queue of 1,024 for a task that calls the handlers, and whoever emits never waits; an event
    that finds the queue full is dropped. What handlers raise is counted and kept from everybody else.
    """

    def __init__(self, *, queue: int = _QUEUE) -> None:
        self._handlers: dict[int, tuple[type[SecurityEvent], EventHandler]] = {}
        self._queue: deque[SecurityEvent] = deque()
        self._bound = queue
        self._next_id = 1
        self._runner: trio.Event | None = None
        self._delivering = False
        self.failed = 0
        self.dropped = 0

    def on(self, kind: type[E], handler: Callable[[E], Awaitable[None] | None]) -> int:
        """Call `handler` with every event of `kind` (`SecurityEvent`: all); gives the number that `off` takes."""
        number = self._next_id
        self._next_id += 1
        self._handlers[number] = (kind, cast("EventHandler", handler))
        return number

    def off(self, number: int) -> None:
        """Call that handler no more."""
        self._handlers.pop(number, None)

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens: without handlers no event need be made."""
        return bool(self._handlers)

    def emit(self, event: SecurityEvent) -> None:
        """Tell everybody, now or soon; never raises, never waits."""
        if not self._handlers:
            return
        if len(self._queue) < self._bound:
            self._queue.append(event)
        else:
            self.dropped += 1
        # Also where it was dropped: what a handler has filled the queue with would stand there for ever.
        if self._runner is not None:
            self._runner.set()
        elif not self._delivering:
            self._deliver_now()

    async def run_events(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Call handlers as events come, until cancelled; what is queued then goes to handlers that are not async.

        One task at a time may run this; another raises `RuntimeError`.
        """
        if self._runner is not None:
            raise RuntimeError("the events of this security manager are being delivered already")
        self._runner = trio.Event()
        try:
            task_status.started()
            while True:
                await self._runner.wait()
                self._runner = trio.Event()
                while self._queue:
                    await self._deliver(self._queue.popleft())
        finally:
            self._runner = None
            self._deliver_now()

    async def _deliver(self, event: SecurityEvent) -> None:
        for handler in self._those_for(event):
            await contain(partial(_call, handler, event), report=self._note_failure)

    def _deliver_now(self) -> None:
        """In a loop here instead of one in another: a handler may cause events of its own."""
        self._delivering = True
        try:
            for _ in range(self._bound):
                if not self._queue:
                    return
                event = self._queue.popleft()
                for handler in self._those_for(event):
                    contain_sync(partial(self._call_now, handler, event), report=self._note_failure)
        finally:
            self._delivering = False

    def _call_now(self, handler: EventHandler, event: SecurityEvent) -> None:
        outcome = handler(event)
        if inspect.iscoroutine(outcome):
            outcome.close()
            self.dropped += 1

    def _those_for(self, event: SecurityEvent) -> list[EventHandler]:
        return [handler for kind, handler in self._handlers.values() if isinstance(event, kind)]

    def _note_failure(self, _: Exception) -> None:
        self.failed += 1


async def _call(handler: EventHandler, event: SecurityEvent) -> None:
    outcome = handler(event)
    if outcome is not None:
        await outcome
