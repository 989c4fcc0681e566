"""Turns that run for the gateway's askers: in the gateway's nursery, so that no connection takes one along.

An asker is a `Subscription`: its own place in the turn's log and its own credit. Any number of them may follow one
turn, from any connection of its principal; a turn without any goes on, and is stored all the same.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec
import trio

from .._contain import contain
from ..wire.codec import encode_json
from .failures import internal_error
from .protocol import Done, Failed, Gap
from .turnlog import TurnLog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from msgspec import Struct

    from ..wire.result import ChatResult
    from .config import GatewayLimits
    from .protocol import ErrorInfo, Event, Question

__all__ = ["LiveTurn", "SlowReaderError", "Subscription", "TakeTurn", "TurnHub", "TurnKey"]

_NO_ID = b'"id":0'
_EVENT = b'{"type":"event"'


class TurnKey(NamedTuple):
    """Whose turn it is, of which session (as its asker names it), and its id."""

    tenant: str
    principal: str
    owner: tuple[str, str] | None
    session: str
    turn_id: str


class SlowReaderError(Exception):
    """A subscriber has left its stream alone for too long."""


class LiveTurn:
    """A turn that runs, or has ended lately, and what is kept of what it said."""

    def __init__(self, key: TurnKey, limits: GatewayLimits, *, after: int = 0) -> None:
        self.key = key
        self.log = TurnLog(limits.buffer_bytes, after=after)
        self.scope = trio.CancelScope()
        self.error_code = ""
        self.ended_at = math.inf
        self.subscribers = 0
        self._waiting = trio.lowlevel.ParkingLot()

    def __repr__(self) -> str:
        state = "ended" if self.is_over else "running"
        return f"<LiveTurn {self.key.turn_id!r} of {self.key.session!r}: {state}, {self.log.last_seq} messages>"

    @property
    def is_over(self) -> bool:
        """Whether the last message is there."""
        return self.log.end is not None

    def publish(self, message: Event | Question) -> None:
        """One more message; its id and seq are set here."""
        self.log.append(_encoded(message, self.log.last_seq + 1))
        self.notify()

    def finish(self, result: ChatResult[object]) -> None:
        """The answer; a session's turn is stored by now."""
        self._end(Done(id=0, seq=0, result=result))

    def fail(self, error: ErrorInfo) -> None:
        """The end without an answer."""
        self.error_code = error.code
        self._end(Failed(id=0, error=error))

    def _end(self, message: Done | Failed) -> None:
        if not self.is_over:
            self.log.finish(_encoded(message, self.log.last_seq + 1))
            self.ended_at = trio.current_time()
            self.notify()

    def notify(self) -> None:
        """Wake whoever follows the turn."""
        self._waiting.unpark_all()

    async def changed(self) -> None:
        """Wait for a message, or for credit."""
        await self._waiting.park()


async def _take_within_scope(take: TakeTurn, turn: LiveTurn) -> None:
    with turn.scope:
        await take(turn)


def _encoded(message: Struct, seq: int) -> bytes:
    return encode_json(msgspec.structs.replace(message, id=0, seq=seq))


def _with_id(body: bytes, request_id: int) -> str:
    """A kept message as one subscriber gets it; the tag and the id stand first."""
    return body.replace(_NO_ID, b'"id":%d' % request_id, 1).decode()


class Subscription:
    """One asker's place in a turn."""

    __slots__ = ("_credit", "_cursor", "_is_streamed", "_limits", "_since", "request_id", "turn")

    def __init__(
        self, turn: LiveTurn, request_id: int, *, after: int, credit: int, is_streamed: bool, limits: GatewayLimits
    ) -> None:
        self.turn = turn
        self._is_streamed = is_streamed
        self.request_id = request_id
        # The end comes in any case, also for who says to have seen it.
        self._cursor = min(after, turn.log.last_seq - turn.is_over)
        self._credit = min(credit, limits.buffer_bytes)
        self._limits = limits
        self._since = math.inf

    def grant(self, credit: int) -> None:
        """Take so much more, at most a buffer full."""
        self._credit = min(self._credit + credit, self._limits.buffer_bytes)
        self.turn.notify()

    async def run(self, send: Callable[[str], Awaitable[None]]) -> None:
        """Send what the turn says, as far as there is credit, until its end; raises `SlowReaderError`."""
        turn = self.turn
        turn.subscribers += 1
        try:
            while not self._is_done:
                text = self._next()
                if text is None:
                    await self._wait()
                elif text:
                    self._since = math.inf
                    await send(text)
        finally:
            turn.subscribers -= 1

    @property
    def _is_done(self) -> bool:
        return self.turn.is_over and self._cursor >= self.turn.log.last_seq

    def _next(self) -> str | None:
        """What to send now, empty for what is passed over; None where there is nothing, or no credit for it."""
        log = self.turn.log
        if log.end is not None and self._cursor == log.last_seq - 1:
            self._cursor = log.last_seq
            return _with_id(log.end, self.request_id)
        if self._is_streamed and self._credit <= 0:
            return None
        if self._cursor + 1 < log.first_seq:
            self._cursor = log.first_seq - 1
            return encode_json(Gap(id=self.request_id, seq=self._cursor)).decode()
        body = log.get(self._cursor + 1)
        if body is None:
            return None
        if not self._is_streamed and body.startswith(_EVENT):
            self._cursor += 1
            return ""
        if self._credit <= 0:
            return None
        self._cursor += 1
        self._credit -= len(body)
        return _with_id(body, self.request_id)

    async def _wait(self) -> None:
        """Wait for news; not for ever where news there is, and nobody to take it."""
        log = self.turn.log
        is_pressing = self._cursor < log.last_seq and (log.end is not None or self._cursor + 1 < log.first_seq)
        if not is_pressing:
            self._since = math.inf
            await self.turn.changed()
            return
        self._since = min(self._since, trio.current_time())
        with trio.move_on_at(self._since + self._limits.slow_reader_s) as scope:
            await self.turn.changed()
        if scope.cancelled_caught:
            raise SlowReaderError


TakeTurn: TypeAlias = "Callable[[LiveTurn], Awaitable[None]]"
"""Takes a turn: publishes what it says, and ends it in every case but a cancel."""


class TurnHub:
    """The turns of a gateway, by key; they run in the nursery given."""

    def __init__(self, nursery: trio.Nursery, limits: GatewayLimits, *, on_error: Callable[[Exception], None]) -> None:
        self._nursery = nursery
        self._limits = limits
        self._on_error = on_error
        self._live: dict[TurnKey, LiveTurn] = {}
        self._kept: OrderedDict[TurnKey, LiveTurn] = OrderedDict()
        self._by_principal: Counter[tuple[str, str]] = Counter()
        self._idle = trio.Event()
        self.kept_bytes = 0
        self.done = 0
        self.failed = 0
        self.errors: Counter[str] = Counter()

    @property
    def live(self) -> int:
        """How many turns run."""
        return len(self._live)

    @property
    def kept(self) -> int:
        """How many ended ones can still be joined."""
        return len(self._kept)

    def find(self, key: TurnKey, *, resumed: bool) -> LiveTurn | None:
        """The turn with this key: one that runs, or one that has ended, for who comes back.

        A session has the answer of one that has ended for who asks anew. Of a chat this is the only place to have it.
        """
        turn = self._live.get(key)
        if turn is not None:
            return turn
        kept = self._kept.get(key)
        is_known_here_only = kept is not None and not key.session and not kept.error_code
        return kept if resumed or is_known_here_only else None

    def has_room(self, tenant: str, principal: str) -> bool:
        """Whether the principal may begin one more."""
        return self._by_principal[tenant, principal] < self._limits.max_turns_per_principal

    @contextmanager
    def counted(self, tenant: str, principal: str) -> Iterator[None]:
        """Count a turn of the principal that does not run in the hub."""
        self._by_principal[tenant, principal] += 1
        try:
            yield
        finally:
            self._uncount(tenant, principal)

    def _uncount(self, tenant: str, principal: str) -> None:
        self._by_principal[tenant, principal] -= 1
        if not self._by_principal[tenant, principal]:
            del self._by_principal[tenant, principal]

    def begin(self, key: TurnKey, take: TakeTurn, *, after: int = 0) -> LiveTurn:
        """Begin a turn that is not there; its messages are numbered from above `after` on."""
        self._drop(key)
        turn = self._live[key] = LiveTurn(key, self._limits, after=after)
        self._by_principal[key.tenant, key.principal] += 1
        self._nursery.start_soon(self._run, turn, take)
        return turn

    async def _run(self, turn: LiveTurn, take: TakeTurn) -> None:
        failures: list[Exception] = []
        try:
            # Around the scope: what fails while the turn is cancelled comes out of it without the cancel.
            await contain(partial(_take_within_scope, take, turn), report=failures.append)
        finally:
            if failures:
                self._on_error(failures[0])
            if not turn.is_over:
                turn.fail(internal_error())
            self._end(turn)

    def _end(self, turn: LiveTurn) -> None:
        key = turn.key
        del self._live[key]
        self._uncount(key.tenant, key.principal)
        if turn.error_code:
            self.failed += 1
            self.errors[turn.error_code] += 1
        else:
            self.done += 1
        self._kept[key] = turn
        self.kept_bytes += turn.log.size
        self.prune()
        if not self._live:
            self._idle.set()
            self._idle = trio.Event()

    def prune(self) -> None:
        """Forget ended turns that are too old, and the oldest ones where they are too much together."""
        now = trio.current_time()
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            is_due = oldest.ended_at + self._limits.resume_s <= now
            if not is_due and self.kept_bytes <= self._limits.max_kept_bytes:
                return
            self._drop(key)

    def _drop(self, key: TurnKey) -> None:
        turn = self._kept.pop(key, None)
        if turn is not None:
            self.kept_bytes -= turn.log.size

    async def wait_idle(self) -> None:
        """Wait until no turn runs."""
        while self._live:
            await self._idle.wait()

    def cancel_all(self) -> None:
        """Stop every turn; each tells its askers."""
        for turn in list(self._live.values()):
            turn.scope.cancel()
