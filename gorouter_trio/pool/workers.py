"""The worker pool: a bounded queue, and workers that own one connection each.

Theory of operation. A request is a ticket. `Pool.request` runs in the caller's task: it submits the
ticket, waits for the worker's answer, decodes it, and decides about a retry, so that a backoff holds
no worker and a retry queues again like any other request. Idle workers wait on a stack: the
connection used last is used next, and the ones that a burst needed go cold and are closed. A worker
is started only when no other is idle. A caller that finds the queue full and may wait has its place in
line as well: whoever comes later does not overtake it.

Streams are lent, not relayed. When the headers of a streamed reply are in, the worker answers with a
lease of its connection and waits; the consumer's own task reads from the socket, so a consumer that
stops reading stops the server, and the worker takes the next request only when the lease is back.

A caller that is cancelled abandons its ticket in the same step: a queued one leaves the queue, a
running one has its connection closed, which ends the worker's wait. Nothing waits for that. Deadlines
end a request in the same way; one keeper watches them all.
"""

from __future__ import annotations

import inspect
import math
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import trio

from .._contain import contain
from .._contexts import start_clean
from .._mailbox import ReplySlot
from ..config import LANES
from ..errors import (
    ApiError,
    AuthenticationError,
    BudgetError,
    ConfigError,
    ConnectError,
    DeadlineExceededError,
    DeadlinePhase,
    DecodeError,
    GorouterError,
    PoolClosedError,
    PoolFullError,
    RateLimitError,
    StreamBrokenError,
)
from ..wire.codec import decode_error
from ..wire.faults import find_header
from .admission import Admission
from .attempts import AttemptRecord
from .deadlines import Alarm, DeadlineKeeper
from .fairness import MOST_COST, FairQueue
from .keys import HeadMaker, KeyRing
from .ledger import BATCHES, Owner
from .retry import GiveUp, RetryQuota, RetryState, classify, decide, is_about_key
from .statistics import LagMeter, PoolStatistics, WaitMeter, WorkerStatistics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ..config import ClientConfig, Deadlines, PoolLimits
    from ..transport.http import Connection, Connector, RequestHead
    from ..wire.mail import HttpCall, PoolMail
    from ..wire.responses import Usage
    from .accounting import Accounting
    from .admission import Hold, ModelGate, Route
    from .budget import Reservation
    from .fairness import Flow
    from .keys import KeyState
    from .shared import SharedLimits
    from .statistics import WorkerState
    from .tracing import RequestSpans

__all__ = ["Exchange", "HeadMaker", "Lease", "Pool", "PoolStatistics", "Ticket", "estimate_tokens", "open_pool"]

T = TypeVar("T")

_DRAIN_S = 1.0
_SPARE_CONNECT_S = 1.0
_CLEANUP_S = 2.0
_NEVER = -math.inf
_TOKENS_A_TURN = 1024
_LAG_MASK = 63
# Of a request that goes out: half a megabit.
_LEAST_BYTES_PER_S = 65_536


class _KeysChangedError(Exception):
    """A request that waits in the queue has to ask for its key again."""


class Ticket(ReplySlot[None]):
    """One attempt at a request: what to send, what came back, and when (trio clock)."""

    __slots__ = (
        "body",
        "call",
        "charged",
        "cost",
        "data_at",
        "deadline",
        "deadline_at",
        "error",
        "gate",
        "gives_up_at",
        "head",
        "headers",
        "is_probe",
        "is_retry",
        "is_waiting",
        "key",
        "lease",
        "on_sent",
        "place",
        "pool",
        "queued_at",
        "reply_at",
        "resolved_at",
        "route",
        "sent_at",
        "started_at",
        "status",
        "tokens",
        "worker",
    )

    def __init__(self, pool: Pool, call: PoolMail, *, now: float, deadline: float) -> None:
        super().__init__()
        self.pool = pool
        self.call = call
        self.deadline = deadline
        self.queued_at = now
        self.started_at = now
        # When the head of the reply came, and when what follows its padding did.
        self.reply_at = self.data_at = now
        self.sent_at = _NEVER
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        # The refusal that it was answered with, once the limits know of it.
        self.error: GorouterError | None = None
        self.lease: Lease | None = None
        # Watched while it is queued; a scope of its own would cost more than the queue.
        self.deadline_at = math.inf
        self.worker: _Worker | None = None
        self.on_sent: Callable[[], None] | None = None
        self.resolved_at = _NEVER
        # What admission and the queue go by.
        self.key: KeyState | None = None
        self.route: Route | None = None
        self.place: Flow | None = None
        self.tokens = 0
        self.charged = 0.0
        self.is_retry = self.is_probe = self.is_waiting = False

    gate: ModelGate
    head: RequestHead
    cost: float
    gives_up_at: float

    @property
    def lane(self) -> str:
        """The lane it waits in."""
        return self.call.settings.lane

    @property
    def flow(self) -> str:
        """Whose turn it takes."""
        return self.call.settings.tenant or self.call.flow

    @property
    def is_sent(self) -> bool:
        """Whether anything of it went out."""
        return self.sent_at is not _NEVER

    def on_abandon(self) -> None:
        """Leave the queue, or stop the worker."""
        self.pool.abandon(self)

    def expire(self) -> None:
        """It has waited in the queue for too long; called by the keeper."""
        self.pool.give_up(self)


class Lease:
    """A connection on loan to the task that consumes a stream.

    The holder reads with `receive_some` and must end with `give_back`, in whatever way it leaves;
    that never waits and may be called twice.
    """

    __slots__ = ("_connection", "_exchange", "_returned", "_waiting", "_worker")

    def __init__(self, worker: _Worker, connection: Connection) -> None:
        self._exchange: Exchange | None = None
        self._worker = worker
        self._connection = connection
        self._returned = False
        self._waiting = trio.Event()

    async def receive_some(self, *, deadline: float, phase: DeadlinePhase) -> bytes:
        """The next piece of the body, empty at its end.

        Raises `DeadlineExceededError` with `phase` at `deadline` (trio clock), `StreamBrokenError`
        when the connection breaks or is taken back meanwhile.
        """
        if self._returned:
            raise StreamBrokenError("the stream was closed")
        worker = self._worker
        worker.watch(deadline, phase)
        try:
            return await self._connection.receive_some()
        except StreamBrokenError:
            if worker.expired:
                raise _too_late(phase) from None
            raise
        finally:
            worker.deadline_at = math.inf

    def wait(self, deadline: float, phase: DeadlinePhase) -> Awaitable[None] | None:
        """What to await before `take`, until `deadline`; None where `receive_some` has to be called."""
        waiting = None if self._returned else self._connection.wait_arrival()
        if waiting is not None:
            self._worker.watch(deadline, phase)
        return waiting

    def take(self) -> bytes | None:
        """What has arrived; None when nothing has, empty at the end. Raises as `receive_some`."""
        worker = self._worker
        worker.deadline_at = math.inf
        try:
            return self._connection.take_arrival()
        except StreamBrokenError:
            if worker.expired:
                raise _too_late(worker.phase) from None
            raise

    def begin(self, exchange: Exchange) -> None:
        """The stream has begun: the attempt is over when the connection is back, which it may be already."""
        if self._returned:
            self._worker.pool.end_stream(exchange)
        else:
            self._exchange = exchange

    def give_back(self, *, reusable: bool) -> None:
        """Return the connection; not `reusable` closes it at once."""
        if not self._returned:
            self._returned = True
            # A wait that was cancelled leaves its deadline behind.
            self._worker.deadline_at = math.inf
            if not reusable:
                self._connection.close()
            self._waiting.set()
            exchange, self._exchange = self._exchange, None
            if exchange is not None:
                self._worker.pool.end_stream(exchange)

    async def wait_returned(self) -> None:
        """Wait until the holder has given it back; used by the worker."""
        await self._waiting.wait()


class Exchange:
    """One request from submission to its answer, over all attempts; what results are made from.

    `attempts` counts those that were sent, `tries` all. Who decodes the reply puts its `usage`, its `reply_id` and the
    model that it was `answered_by` here; who reads a stream also its `first_data_at`, its `failure` and whether it
    `is_whole`.
    """

    __slots__ = (
        "answered_by",
        "attempts",
        "deadline",
        "error",
        "failure",
        "first_data_at",
        "is_whole",
        "number",
        "queue_wait_s",
        "reply_id",
        "reservation",
        "spans",
        "started_at",
        "state",
        "ticket",
        "tries",
        "usage",
    )

    def __init__(self, number: int, *, now: float, deadline: float) -> None:
        self.number = number
        self.started_at = now
        self.deadline = deadline
        self.attempts = self.tries = 0
        self.queue_wait_s = 0.0
        self.state = RetryState()
        self.ticket: Ticket = cast("Ticket", None)
        self.usage: Usage | None = None
        self.reply_id: str | None = None
        self.answered_by: str | None = None
        self.reservation: Reservation | None = None
        # Whoever traces the request.
        self.spans: RequestSpans | None = None
        # What the last attempt failed with, where there is another.
        self.error: GorouterError | None = None
        self.first_data_at: float | None = None
        self.failure: GorouterError | None = None
        self.is_whole = False

    @property
    def generation_id(self) -> str | None:
        """The id in the header of the last reply, or in its body, if there was one."""
        return find_header(self.ticket.headers, b"x-generation-id") or self.reply_id


class Pool:
    """Made by `open_pool`. All methods are for tasks of the same trio run."""

    def __init__(
        self,
        config: ClientConfig,
        connector: Connector,
        *,
        heads: HeadMaker,
        nursery: trio.Nursery,
        on_attempt: Callable[[AttemptRecord], None] | None = None,
        estimate: Callable[[HttpCall], int] | None = None,
        shared: SharedLimits | None = None,
    ) -> None:
        self.connector = connector
        self._make_head = heads
        self.limits: PoolLimits = config.pool
        self.deadlines: Deadlines = config.deadlines
        self._policy = config.retry
        self._seams = config.seams
        self._quota = RetryQuota(config.retry.quota_tokens)
        self._on_attempt = on_attempt
        self._accounting: Accounting | None = None
        self._completion_tokens = config.rates.completion_tokens
        self._estimate = estimate or partial(estimate_tokens, completion_tokens=config.rates.completion_tokens)
        self._ring = KeyRing(config)
        self._has_provider = self._ring.provider is not None
        self._admission = Admission(config, self._ring)
        self.idle: list[_Worker] = []
        # In order of their start, so that runs with one seed stay the same.
        self._workers: dict[_Worker, None] = {}
        self.lag = LagMeter()
        self.keeper = DeadlineKeeper(self._workers, lag=self.lag)
        self.alarm = Alarm(self._on_alarm, lag=self.lag)
        self.now = trio.lowlevel.current_clock().current_time
        self._queue: FairQueue[Ticket] = FairQueue({lane: config.pool.lanes.get(lane, 0.0) for lane in LANES})
        self.queue_keeper = DeadlineKeeper(self._queue, lag=self.lag)
        self._waits = {lane: WaitMeter() for lane in LANES}
        self._admitted = dict.fromkeys(LANES, 0)
        self._held_by_keys: dict[str, None] = {}
        # What waits for something before the queue, each in a scope of its own.
        self._early: dict[trio.CancelScope, None] = {}
        self._nursery: trio.Nursery | None = nursery
        self._shared = shared
        if shared is not None:
            self._admission.share(shared)
            shared.on_refill, shared.queued = self._on_refill, self._count_queued
        self._went_idle = trio.Event()
        self.answered = self.failed = self.opened = 0
        self._submitted = self._abandoned = self._retries = self._throttled = self._exchanges = 0

    def __repr__(self) -> str:
        s = self.statistics()
        state = "closed" if self._nursery is None else "open"
        return f"<Pool {state}: {s.in_flight} in flight, {s.queued} queued, {s.connections} connections>"

    def charge_to(self, accounting: Accounting) -> None:
        """From now on, enter each billable attempt there, set aside what it may cost, and estimate tokens by it."""
        self._accounting = accounting
        tokens, completion_tokens = accounting.tokens, self._completion_tokens

        def estimate(call: HttpCall) -> int:
            bound = call.settings.max_tokens
            prompt_tokens = tokens.estimate_prompt(call.settings.model, call.body)
            return prompt_tokens + (completion_tokens if bound is None else bound)

        self._estimate = estimate

    def change_keys(self, config: ClientConfig) -> None:
        """Use the keys of `config` for what is sent from now on, by those that wait as well.

        Raises `ConfigError` where the limits of the keys are kept together with other processes.
        """
        if self._shared is not None:
            raise ConfigError("api_key: cannot change while limits are shared between processes; open another client")
        self._ring.change(config)
        self._has_provider = self._ring.provider is not None
        self._admission.forget_keys(config)
        self._held_by_keys.clear()
        self._take_keys_back()
        self._queue.free_all()
        if self._nursery is not None:
            self._let_go(self.now())

    def _take_keys_back(self) -> None:
        """None of those that wait goes with a key of before; where a function gives them, it is asked again."""
        for ticket in list(self._queue):
            ticket.key = None
            if self._has_provider:
                self._queue.remove(ticket)
                self._submitted -= 1
                ticket.fail(_KeysChangedError())

    def statistics(self) -> PoolStatistics:
        """A snapshot; cheap."""
        now = self.now()
        queue, waits = self._queue, self._waits.items()
        queued = {lane: queue.size_of(lane) for lane, _ in waits}
        waiting = sum(max(0, size - self.limits.queue) for size in queued.values())
        return PoolStatistics(
            queued=queue.size - waiting,
            waiting=waiting,
            in_flight=len(self._workers) - len(self.idle),
            workers=len(self._workers),
            connections=sum(worker.is_connected for worker in self._workers),
            opened=self.opened,
            submitted=self._submitted,
            answered=self.answered,
            failed=self.failed,
            abandoned=self._abandoned,
            retries=self._retries,
            retry_quota_tokens=self._quota.tokens,
            throttled=self._throttled,
            lanes=tuple(m.statistics(name, queued=queued[name], admitted=self._admitted[name]) for name, m in waits),
            models=tuple(gate.statistics(now) for gate in self._admission.gates.values()),
            keys=tuple(key.statistics(now) for key in self._ring),
            loop_lag_s=self.lag.lag_s,
            loop_lag_max_s=self.lag.max_s,
        )

    def inspect(self) -> tuple[WorkerStatistics, ...]:
        """What each worker does; takes time for each of them."""
        now = self.now()
        return tuple(worker.statistics(now) for worker in self._workers)

    async def request(
        self,
        call: HttpCall,
        decode: Callable[[Exchange], T],
        *,
        ambiguous_retries: int | None = None,
        on_sent: Callable[[], None] | None = None,
        spans: RequestSpans | None = None,
    ) -> T:
        """Send `call`, with retries, and return what `decode` makes of the whole reply.

        `ambiguous_retries` stands in for the policy's, where it is not None. `on_sent` is called when the first
        byte of an attempt is about to go out: as long as it was not, nothing can have been billed. `spans` are told of
        each attempt.
        Raises what the reply stands for, what `decode` raises, `TransportError` when no answer came,
        `PoolError` when nothing was sent. Cancelling stops the request.
        """
        exchange = self._begin(call)
        exchange.state.ambiguous_limit = ambiguous_retries
        exchange.spans = spans
        asked, accounting = call, self._accounting
        while True:
            if accounting is not None and accounting.is_bounded:
                call = await self._reserve(accounting, asked, exchange)
            try:
                await self._attempt(call, exchange, on_sent)
                result = decode(exchange)
            except GorouterError as exc:
                self._end_attempt(exchange, exc)
                await self._back_off(exc, exchange)
            except BaseException as exc:
                self._end_attempt(exchange, exc)
                raise
            else:
                self._succeed(exchange)
                if (
                    accounting is not None
                    or exchange.ticket.tokens
                    or self._on_attempt is not None
                    or spans is not None
                ):
                    self._end_attempt(exchange, None)
                return result

    async def request_stream(
        self,
        call: HttpCall,
        begin: Callable[[Exchange, Lease], Awaitable[T]],
        *,
        on_sent: Callable[[], None] | None = None,
        spans: RequestSpans | None = None,
    ) -> T:
        """Send `call`, with retries, and return what `begin` makes of the lease of its connection.

        `begin` may read from the lease; an error that it raises is retried like one before it, so
        it must raise only while nothing has been given to the consumer. On an error or a cancel the
        lease is taken back; after success it belongs to the caller. `on_sent` and `spans` are as in `request`.
        """
        exchange = self._begin(call)
        exchange.spans = spans
        asked, accounting = call, self._accounting
        while True:
            if accounting is not None and accounting.is_bounded:
                call = await self._reserve(accounting, asked, exchange)
            try:
                result = await self._begin_stream(call, exchange, begin, on_sent)
            except GorouterError as exc:
                self._end_attempt(exchange, exc)
                await self._back_off(exc, exchange)
            except BaseException as exc:
                self._end_attempt(exchange, exc)
                raise
            else:
                self._succeed(exchange)
                return result

    def _begin(self, call: HttpCall) -> Exchange:
        now = self.now()
        self._exchanges += 1
        return Exchange(self._exchanges, now=now, deadline=min(call.deadline, now + self.deadlines.total_s))

    async def _begin_stream(
        self,
        call: HttpCall,
        exchange: Exchange,
        begin: Callable[[Exchange, Lease], Awaitable[T]],
        on_sent: Callable[[], None] | None,
    ) -> T:
        await self._attempt(call, exchange, on_sent)
        lease = cast("Lease", exchange.ticket.lease)
        try:
            result = await begin(exchange, lease)
        except BaseException:
            lease.give_back(reusable=False)
            raise
        lease.begin(exchange)
        return result

    async def _reserve(self, accounting: Accounting, call: HttpCall, exchange: Exchange) -> HttpCall:
        """Set aside what an attempt may come to cost, and return the call with the bound that this takes.

        An attempt that a budget refuses was none: a retry that is not paid for ends in the error that it was to mend.
        """
        try:
            call, exchange.reservation = await self._within(exchange.deadline, lambda: accounting.admit(call))
        except (BudgetError, DeadlineExceededError, PoolClosedError) as exc:
            if exchange.error is None:
                raise
            exchange.error.add_note(f"and it was not sent again: {exc}")
            exchange.error.maybe_billed = exchange.error.maybe_billed or exchange.state.maybe_billed
            raise exchange.error from None
        return call

    async def _within(self, deadline: float, work: Callable[[], Awaitable[T]]) -> T:
        """Do what comes before the queue, until the deadline of the request or the end of the client."""
        if self._nursery is None:
            raise PoolClosedError("the client is closed")
        with trio.CancelScope(deadline=deadline) as scope:
            self._early[scope] = None
            try:
                return await work()
            finally:
                del self._early[scope]
        if self._nursery is None:
            raise PoolClosedError("the client was closed before the request was queued")
        raise _too_late("queue")

    async def _provide(self, exchange: Exchange) -> KeyState | None:
        """The key that the function gives now; None where keys were given meanwhile instead of a function.

        Raises what the function raises, and `ConfigError` for what is no key. A checkpoint if the function is one.
        """
        while self._has_provider:
            if self._nursery is None:
                # Asked now, an async function would give what nobody awaits.
                raise PoolClosedError("the client is closed")
            changes = self._ring.changes
            given = self._ring.ask()
            if inspect.isawaitable(given):
                given = await self._within(exchange.deadline, partial(_await, given))
            if self._ring.changes == changes:
                return self._ring.state_of(given, now=self.now())
        return None

    async def _attempt(self, call: HttpCall, exchange: Exchange, on_sent: Callable[[], None] | None) -> None:
        """One trip through the queue and a worker; raises for every status outside 2xx."""
        exchange.tries += 1
        if exchange.tries > 1:
            exchange.usage = exchange.reply_id = exchange.answered_by = exchange.first_data_at = None
        while True:
            ticket = exchange.ticket = Ticket(self, call, now=self.now(), deadline=exchange.deadline)
            ticket.is_retry = exchange.tries > 1
            if exchange.deadline <= ticket.queued_at:
                raise _too_late("total")
            if on_sent is not None:
                ticket.on_sent = on_sent
            if self._has_provider:
                ticket.key = await self._provide(exchange)
            try:
                self._submit(ticket)
                await ticket.wait()
                break
            except _KeysChangedError:
                exchange.queue_wait_s += self.now() - ticket.queued_at
            finally:
                # To the sending: a connection that had to be made was waited for as well.
                exchange.queue_wait_s += max(ticket.started_at, ticket.sent_at) - ticket.queued_at
                exchange.attempts += ticket.sent_at is not _NEVER
        if ticket.resolved_at is not _NEVER:
            self.lag.add(self.now() - ticket.resolved_at)
        if ticket.error is not None:
            raise ticket.error

    async def _back_off(self, error: GorouterError, exchange: Exchange) -> None:
        """Wait before the next attempt, or raise `error` with what is known about the request."""
        # Who is cancelled already gets that, and not the error as if time were up.
        await trio.lowlevel.checkpoint_if_cancelled()
        has_other_key = await self._has_other_key(error, exchange)
        now = trio.current_time()
        verdict = decide(
            error,
            policy=self._policy,
            state=exchange.state,
            quota=self._quota,
            rng=self._seams.random,
            remaining_s=min(exchange.deadline, trio.current_effective_deadline()) - now,
            cooldown_s=self._cooldown_s(exchange.ticket, now),
            has_other_key=has_other_key,
        )
        error.attempts = exchange.attempts
        error.generation_id = error.generation_id or exchange.generation_id
        if isinstance(verdict, GiveUp):
            error.maybe_billed = error.maybe_billed or verdict.maybe_billed
            raise error
        exchange.error = error
        self._retries += 1
        await self._sleep(verdict.delay_s)

    async def _sleep(self, delay_s: float) -> None:
        """Wait between two attempts, or until the pool is closed, which the next attempt is told."""
        if self._nursery is None:
            return
        with trio.CancelScope() as scope:
            self._early[scope] = None
            try:
                await trio.sleep(delay_s)
            finally:
                del self._early[scope]

    async def _has_other_key(self, error: GorouterError, exchange: Exchange) -> bool:
        """Whether what this key was refused can be tried with another one; a provider is asked for it."""
        ticket = exchange.ticket
        if not is_about_key(error) or ticket.route is None:
            return False
        if self._ring.provider is None:
            return self._admission.has_other_key(ticket, self.now())
        if not isinstance(error, AuthenticationError):
            return False
        try:
            return await self._provide(exchange) is not ticket.key
        except (DeadlineExceededError, PoolClosedError):
            return False

    def _cooldown_s(self, ticket: Ticket, now: float) -> float:
        """How long everybody waits who wants the same."""
        if ticket.route is None or now >= self._admission.troubled_until:
            return 0.0
        return max(0.0, self._admission.cooldown_until(ticket.gate, now) - now)

    # What became of an attempt

    def _succeed(self, exchange: Exchange) -> None:
        """An answer was decoded, or a stream has its first data."""
        self._quota.give_back(exchange.state.held_tokens)
        ticket = exchange.ticket
        route = ticket.route
        if route is None:
            return
        adaptive, breaker = route.adaptive, ticket.gate.breaker
        if breaker.streak or adaptive.cuts or not breaker.is_closed or route.key.governor is not None:
            now = self.now()
            self._admission.succeed(ticket, now, is_retry=ticket.is_retry)
            self._look_again(ticket.gate)
            return
        breaker.successes += 1
        if route.in_flight >= adaptive.limit and not ticket.is_retry:
            adaptive.succeed(self.now(), in_flight=route.in_flight)
            self._look_again(ticket.gate)

    def note_refusal(self, ticket: Ticket) -> None:
        """A reply outside 2xx is there: the limits learn of it before anything else is sent; used by workers."""
        error = decode_error(ticket.status, ticket.headers, body=ticket.body, now_s=self._seams.wall())
        ticket.error = error
        self._throttled += ticket.status == 429
        self._admission.fail(ticket, error, now=self.now(), is_retry=ticket.is_retry)

    def end_stream(self, exchange: Exchange) -> None:
        """The connection of a stream that had begun is back; used by leases."""
        failure = exchange.failure
        self._end_attempt(exchange, failure, is_left=failure is None and not exchange.is_whole)

    def _end_attempt(self, exchange: Exchange, error: BaseException | None, *, is_left: bool = False) -> None:
        """An attempt is over: put right what it was charged for, tell the limits, and tell of it."""
        ticket = exchange.ticket
        if exchange.spans is not None:
            exchange.spans.attempted(_record_of(exchange, error, now=self.now(), is_left=is_left))
        reservation, exchange.reservation = exchange.reservation, None
        if reservation is not None and not ticket.is_sent:
            cast("Accounting", self._accounting).release(reservation)
        if ticket.route is None:
            return
        now = self.now()
        if isinstance(error, GorouterError) and ticket.is_sent and ticket.error is None:
            self._throttled += isinstance(error, RateLimitError)
            self._admission.fail(ticket, error, now=now, is_retry=ticket.is_retry)
        elif ticket.is_probe and error is not None and ticket.error is None:
            self._admission.end_probe(ticket)
        if exchange.usage is not None:
            self._admission.settle(ticket, exchange.usage)
        elif not ticket.is_sent or _left_undone(error):
            self._admission.refund(ticket, was_sent=ticket.is_sent)
        if error is not None or ticket.tokens:
            self._look_again(ticket.gate)
        if ticket.is_sent and (self._accounting is not None or self._on_attempt is not None):
            self._tell(_record_of(exchange, error, now=now, is_left=is_left), exchange, reservation)

    def _tell(self, record: AttemptRecord, exchange: Exchange, reservation: Reservation | None) -> None:
        """Enter an attempt that was sent into the ledger, and tell of it."""
        call = exchange.ticket.call
        if self._accounting is not None and call.method == "POST" and call.path != BATCHES:
            owner = Owner(session=call.flow, batch=call.settings.batch, purpose=call.purpose)
            answered_by = exchange.answered_by or ""
            self._accounting.finish(
                record, body=call.body, owner=owner, answered_by=answered_by, reservation=reservation
            )
        if self._on_attempt is not None:
            self._on_attempt(record)

    # The queue

    def _submit(self, ticket: Ticket) -> None:
        """Give the ticket to a worker if it may go at once, or queue it."""
        if self._nursery is None:
            raise PoolClosedError("the client is closed")
        admission = self._admission
        call = ticket.call
        model = call.settings.model
        gate = admission.gates.get(model) or admission.make_gate(model, ticket.queued_at)
        ticket.gate = gate = admission.service if call.method == "GET" else gate
        route = gate.route
        # Without rates and troubles there is nothing to look at but the route, and only its key to use.
        if (
            route is not None
            and not self._queue.size
            and admission.is_plain
            and ticket.queued_at >= admission.troubled_until
            and route.in_flight < route.adaptive.limit
            and (self.idle or len(self._workers) < self.limits.max_connections)
        ):
            key = route.key
            ticket.route = route
            route.in_flight += 1
            key.in_flight += 1
            key.sent += 1
            self._submitted += 1
            self._prepare(ticket, key)
            self._hand_over(ticket)
        else:
            self._queue_up(ticket)

    def _queue_up(self, ticket: Ticket) -> None:
        """Put the ticket in its place, and let go whoever may; if that is not this one, its deadline holds there."""
        lane = ticket.lane
        ticket.gives_up_at = min(ticket.deadline, trio.current_effective_deadline())
        ticket.cost = 1.0
        if self._admission.counts_tokens and ticket.call.method != "GET":
            ticket.tokens = self._estimate(ticket.call)
            ticket.cost = min(max(ticket.tokens / _TOKENS_A_TURN, 1.0), MOST_COST)
        part = None if ticket.key is None else ticket.key.index
        self._queue.push(ticket, lane=lane, group=ticket.gate.name, part=part, flow=ticket.flow)
        self._submitted += 1
        self._let_go(self.now())
        if ticket.place is None:
            return
        if self.limits.overflow == "reject" and self._queue.size_of(lane) > self.limits.queue:
            self._queue.remove(ticket)
            self._submitted -= 1
            raise PoolFullError(f"{self._queue.size_of(lane)} requests are queued already (pool.queue)")
        ticket.is_waiting = True
        ticket.deadline_at = ticket.deadline
        if ticket.deadline < self.queue_keeper.next_wake:
            self.queue_keeper.hurry(ticket.deadline)

    def give_up(self, ticket: Ticket) -> None:
        """The deadline of a queued ticket has passed; used by tickets."""
        self._queue.remove(ticket)
        self.failed += ticket.fail(_too_late("queue"))
        self._look_again(ticket.gate)

    def _let_go(self, now: float) -> None:
        """Give workers whatever may go now."""
        while self.idle or len(self._workers) < self.limits.max_connections:
            ticket = self._next(now)
            if ticket is None:
                return
            self._hand_over(ticket)

    def _next(self, now: float) -> Ticket | None:
        """The ticket whose turn it is, admitted; what may not go now is passed over, or keeps everything."""
        queue = self._queue
        while (ticket := queue.head()) is not None:
            hold = self._try_to_admit(ticket, now)
            if hold is None:
                queue.take_head()
                if ticket.is_resolved:
                    continue
                return ticket
            if hold.is_for_all:
                self.alarm.set(hold.until)
                return self._next_service(now)
            if hold.is_of_key:
                self._held_by_keys[ticket.gate.name] = None
            queue.hold_head(hold.until)
            # Now, since with every worker busy nobody may come to the end of the queue before the hold is over.
            self.alarm.set(hold.until)
        self.alarm.set(queue.next_due())
        return None

    def _next_service(self, now: float) -> Ticket | None:
        """The next request that is for no model, which passes what keeps all those that are."""
        while (ticket := self._queue.first_of(self._admission.service.name)) is not None:
            self._try_to_admit(ticket, now)
            self._queue.remove(ticket)
            if not ticket.is_resolved:
                return ticket
        return None

    def _try_to_admit(self, ticket: Ticket, now: float) -> Hold | None:
        """Admit the ticket and make its head, or fail it; or say what keeps it."""
        try:
            if ticket.deadline <= now:
                raise _too_late("queue")
            hold = self._admission.admit(ticket, now)
            if hold is None and ticket.route is not None:
                self._prepare(ticket, ticket.route.key)
        except (GorouterError, ValueError) as exc:
            self.failed += ticket.fail(exc)
            if ticket.route is not None:
                self._admission.release(ticket.route)
                self._admission.refund(ticket, was_sent=False)
            return None
        return hold

    def _prepare(self, ticket: Ticket, key: KeyState) -> None:
        """Make the head of an admitted ticket; from here on the worker watches its deadline."""
        call = ticket.call
        settings = call.settings
        head = None if settings.headers else key.heads.get((call.method, call.path))
        ticket.head = head or key.head(call.method, call.path, extra=settings.headers, make=self._make_head)
        self._admitted[settings.lane] += 1
        if ticket.is_waiting:
            ticket.is_waiting = False
            ticket.deadline_at = math.inf
            self._waits[settings.lane].add(self.now() - ticket.queued_at)

    def _hand_over(self, ticket: Ticket) -> None:
        """Give an admitted ticket to the worker that was busy last, or to a new one."""
        if self.idle:
            self.idle.pop().take(ticket)
        else:
            worker = _Worker(self)
            self._workers[worker] = None
            start_clean(cast("trio.Nursery", self._nursery), worker.run, ticket)

    def _look_again(self, gate: ModelGate) -> None:
        """Something about a model may have become better."""
        if self._queue.size:
            self._queue.free(gate.name)
            self._let_go(self.now())

    def _on_alarm(self, now: float) -> None:
        """A hold ends."""
        self._queue.free_due(now)
        self.alarm.set(self._queue.next_due())
        self._let_go(now)

    def _on_refill(self) -> None:
        """There may be more of what is shared with other processes."""
        now = self.now()
        for name in () if self._shared is None else self._shared.gates:
            self._queue.free(name)
        self._on_alarm(now)

    def _count_queued(self) -> int:
        return self._queue.size

    def abandon(self, ticket: Ticket) -> None:
        """The caller of `ticket` has gone; used by tickets."""
        self._abandoned += 1
        if ticket.worker is not None:
            ticket.worker.leave_alone()
        elif self._queue.remove(ticket):
            self._look_again(ticket.gate)

    def release(self, ticket: Ticket) -> None:
        """The request of `ticket` is not in flight any more; used by workers."""
        route = ticket.route
        if route is None:
            return
        key = route.key
        route.in_flight -= 1
        key.in_flight -= 1
        if route.adaptive.marked_at is not None:
            route.adaptive.end(sent_at=ticket.started_at, is_refused=ticket.status == 429)
        if key.governor is not None:
            key.governor.end(sent_at=ticket.started_at, is_refused=ticket.status == 402)
        if self._queue.size:
            self._queue.free(route.gate.name, key.index if self._has_provider else None)
            while self._held_by_keys:
                self._queue.free(self._held_by_keys.popitem()[0])

    def next_ticket(self) -> Ticket | None:
        """The ticket a worker should take now; used by workers."""
        if not self._queue.size or self._nursery is None:
            return None
        return self._next(self.now())

    def let_others_go(self) -> None:
        """A slot is free, and the worker that had it is not yet; used by workers."""
        if self._queue.size and self._nursery is not None:
            self._let_go(self.now())

    def go_idle(self, worker: _Worker) -> None:
        """Put a worker on the stack; used by workers."""
        self.idle.append(worker)
        if not self._went_idle.is_set():
            self._went_idle.set()

    def retire(self, worker: _Worker) -> None:
        """A worker has ended; used by workers."""
        self._workers.pop(worker, None)

    async def close_cold_connections(self) -> None:
        """Close the connections of workers that were idle for too long; runs as long as the pool."""
        if self.limits.keepalive_s == math.inf:
            return
        while True:
            await self._went_idle.wait()
            while (cold_at := min((worker.cold_at for worker in self.idle), default=math.inf)) < math.inf:
                await trio.sleep_until(cold_at)
                now = self.now()
                for worker in [worker for worker in self.idle if worker.cold_at <= now]:
                    await worker.close_cold_connection(now)
            self._went_idle = trio.Event()

    def close(self) -> None:
        """Refuse new requests; those that are queued, or will be, end with `PoolClosedError`."""
        self._nursery = None
        for scope in self._early:
            scope.cancel()
        for ticket in self._queue.clear():
            self.failed += ticket.fail(PoolClosedError("the client was closed while the request was queued"))


class _Worker:
    """A task with one connection.

    `deadline_at` is watched by the pool's keeper. Whoever must stop the worker's request calls
    `stop`, which closes the connection, so that what waits on it ends with `StreamBrokenError`.
    """

    __slots__ = (
        "_connecting",
        "_stopped",
        "_task",
        "_ticket",
        "connection",
        "deadline_at",
        "expired",
        "idle_since",
        "phase",
        "pool",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._task: trio.lowlevel.Task | None = None
        self._ticket: Ticket | None = None
        self.phase: DeadlinePhase = "connect"
        self._connecting: trio.CancelScope | None = None
        self._stopped = False
        self.connection: Connection | None = None
        self.deadline_at = math.inf
        self.expired = False
        self.idle_since = math.inf

    @property
    def is_connected(self) -> bool:
        """Whether the worker has an open connection."""
        return self.connection is not None and not self.connection.is_closed

    @property
    def cold_at(self) -> float:
        """When the worker, if it stays idle, has kept its connection long enough; `inf` without one."""
        return self.idle_since + self.pool.limits.keepalive_s if self.is_connected else math.inf

    def statistics(self, now: float) -> WorkerStatistics:
        """A snapshot."""
        ticket = self._ticket
        if ticket is None:
            since = now if self.idle_since == math.inf else self.idle_since
            return WorkerStatistics(state="idle", since_s=now - since, is_connected=self.is_connected)
        state, since = self._progress(ticket)
        return WorkerStatistics(
            state=state,
            since_s=max(0.0, now - since),
            is_connected=self.is_connected,
            model=ticket.call.settings.model,
            flow=ticket.flow,
            lane=ticket.lane,
            key="" if ticket.route is None else ticket.route.key.name,
        )

    def _progress(self, ticket: Ticket) -> tuple[WorkerState, float]:
        if ticket.lease is not None:
            return "lent", ticket.reply_at
        if ticket.status:
            return "receiving", ticket.reply_at
        return ("waiting", ticket.sent_at) if ticket.is_sent else ("connecting", ticket.started_at)

    async def run(self, ticket: Ticket) -> None:
        """Serve tickets until the pool ends; a failure of one ticket fails that ticket."""
        self._ticket = ticket
        # The frame lives as long as the worker, and would keep its first request and the answer to it.
        del ticket
        try:
            while True:
                await contain(self._serve_tickets, report=self._fail_ticket)
                await self._close_connection()
        finally:
            closed = PoolClosedError("the client was closed while the request was running")
            closed.maybe_billed = self.phase != "connect"
            self._fail_ticket(closed)
            self.pool.retire(self)
            await self._close_connection()  # noqa: ASYNC102 - shields itself, bounded

    def take(self, ticket: Ticket) -> None:
        """Wake this idle worker with a ticket."""
        self._ticket = ticket
        task, self._task = cast("trio.lowlevel.Task", self._task), None
        trio.lowlevel.reschedule(task)

    def watch(self, deadline: float, phase: DeadlinePhase) -> None:
        """Stop the request at `deadline`, which ends `phase`."""
        self.phase = phase
        self.deadline_at = deadline
        if deadline < self.pool.keeper.next_wake:
            self.pool.keeper.hurry(deadline)

    def expire(self) -> None:
        """The deadline has passed; called by the keeper."""
        self.expired = True
        self.stop()

    def stop(self) -> None:
        """Stop what the worker is doing for its ticket."""
        self._stopped = True
        if self._connecting is not None:
            self._connecting.cancel()
        self.drop_connection()

    def leave_alone(self) -> None:
        """The caller has gone. Connecting goes on for a moment: the next request can use what it gives.

        Were it stopped, callers that leave sooner than a connection takes would never get one.
        """
        if self._connecting is None or self._stopped:
            self.stop()
        else:
            self.watch(min(self.deadline_at, self.pool.now() + _SPARE_CONNECT_S), "connect")

    def drop_connection(self) -> None:
        """Close the connection at once; the worker notices."""
        if self.connection is not None:
            self.connection.close()

    async def close_cold_connection(self, now: float) -> None:
        """Close the connection, unless the worker has been woken since; it may be woken meanwhile."""
        connection = self.connection
        if connection is not None and self.cold_at <= now:
            await _close(connection)

    async def _serve_tickets(self) -> None:
        pool = self.pool
        while True:
            if self._ticket is None:
                self._ticket = pool.next_ticket()
            if self._ticket is None:
                await self._wait_for_ticket()
            # No local name: an idle worker would keep its last request, and with that a whole conversation.
            await self._serve(cast("Ticket", self._ticket))
            self._ticket = None

    async def _wait_for_ticket(self) -> None:
        """Park on the stack of idle workers."""
        pool = self.pool
        self.idle_since = pool.now()
        self._task = trio.lowlevel.current_task()
        pool.go_idle(self)
        await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)

    def _stop_waiting(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        self.pool.idle.remove(self)
        return trio.lowlevel.Abort.SUCCEEDED

    async def _serve(self, ticket: Ticket) -> None:
        """Take one ticket to its answer; the connection is closed unless the reply ended cleanly."""
        if ticket.abandoned:
            self.pool.release(ticket)
            return
        ticket.worker = self
        self.expired = self._stopped = False
        try:
            await self._exchange(ticket)
            if ticket.lease is not None:
                await self._wait_for_lease(ticket.lease)
        except GorouterError as exc:
            self.drop_connection()
            if isinstance(exc, StreamBrokenError) and not exc.sent:
                ticket.sent_at = _NEVER
            self.pool.failed += ticket.fail(self._too_late(ticket) if self.expired else exc)
        finally:
            self.deadline_at = math.inf
            self.pool.release(ticket)
        connection = self.connection
        if connection is not None and (connection.is_closed or not connection.is_complete):
            self.pool.let_others_go()
            await self._close_connection()

    async def _exchange(self, ticket: Ticket) -> None:
        """Send and receive, each part under its deadline; answers the ticket."""
        pool = self.pool
        deadlines = pool.deadlines
        now = ticket.started_at = pool.now()
        connection = self.connection
        is_fresh = connection is not None and now < self.idle_since + pool.limits.keepalive_s and connection.is_reusable
        self.idle_since = math.inf
        if connection is None or not is_fresh:
            self.watch(min(ticket.deadline, now + deadlines.connect_s), "connect")
            connection = await self._connect()
            if ticket.abandoned:
                return
            now = pool.now()
        body = ticket.call.body
        self.watch(min(ticket.deadline, now + deadlines.headers_s + len(body) // _LEAST_BYTES_PER_S), "headers")
        ticket.sent_at = now
        if ticket.on_sent is not None:
            ticket.on_sent()
        await connection.start(ticket.head, body)
        ticket.reply_at = ticket.data_at = now = pool.now()
        status = ticket.status = connection.status
        ticket.headers = connection.headers
        is_good = 200 <= status < 300
        if is_good and ticket.call.streaming:
            ticket.lease = Lease(self, connection)
        else:
            if not connection.is_complete:
                self.watch(min(ticket.deadline, now + deadlines.first_data_s), "first_data")
            if is_good:
                is_here = connection.is_complete
                ticket.body = await connection.receive_all()
                if not is_here:
                    ticket.data_at = pool.now()
            else:
                ticket.body = await self._receive_refusal(ticket, connection)
                pool.note_refusal(ticket)
        if not pool.answered & _LAG_MASK:
            ticket.resolved_at = pool.now()
        if ticket.resolve(None):
            pool.answered += 1
        elif ticket.lease is not None:
            ticket.lease.give_back(reusable=False)

    async def _receive_refusal(self, ticket: Ticket, connection: Connection) -> bytes:
        """The body of a refusal, empty where it is cut, unreadable or late: its status says what became of the request.

        Without a status nobody would know, and what was refused would be asked for again, or held to be charged.
        """
        try:
            return await connection.receive_all()
        except (StreamBrokenError, DecodeError):
            if ticket.abandoned or self.pool.now() >= ticket.deadline:
                raise
            connection.close()
            return b""

    async def _wait_for_lease(self, lease: Lease) -> None:
        """Wait until the stream is over; its last bytes may still be on the way."""
        connection = cast("Connection", self.connection)
        try:
            await lease.wait_returned()
        finally:
            lease.give_back(reusable=False)
        if not connection.is_complete and not connection.is_closed:
            with trio.move_on_after(_DRAIN_S):
                await contain(connection.receive_all, report=lambda _error: connection.close())

    async def _connect(self) -> Connection:
        await self._close_connection()
        if not self._stopped:
            with trio.CancelScope() as self._connecting:
                self.connection = await self.pool.connector.connect()
                self.pool.opened += 1
            self._connecting = None
        # Being stopped may come too late for the connecting, and must not be lost: nobody waits for the answer.
        if self.connection is None or self._stopped:
            raise ConnectError("connecting was stopped")
        return self.connection

    async def _close_connection(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await _close(connection)

    def _fail_ticket(self, error: Exception) -> None:
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self.pool.failed += ticket.fail(error)

    def _too_late(self, ticket: Ticket) -> DeadlineExceededError:
        error = _too_late(self.phase if self.pool.now() < ticket.deadline else "total")
        error.maybe_billed = self.phase != "connect"
        return error


async def _close(connection: Connection) -> None:
    connection.close()
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
        # A user's transport may raise anything here, which says nothing of any request, and would end all of them.
        await contain(connection.aclose, report=lambda _error: None)


async def _await(given: Awaitable[T]) -> T:
    return await given


def _too_late(phase: DeadlinePhase) -> DeadlineExceededError:
    return DeadlineExceededError(f"the request's deadline passed ({phase})", phase=phase)


def estimate_tokens(call: HttpCall, *, completion_tokens: int) -> int:
    """How many tokens a request may come to: a quarter of its bytes, and all that its completion may have.

    `completion_tokens` stands in where the request sets no bound.
    """
    bound = call.settings.max_tokens
    return len(call.body) // 4 + (completion_tokens if bound is None else bound)


def _left_undone(error: BaseException | None) -> bool:
    """Whether a request that was sent was not worked on."""
    if isinstance(error, ApiError) and error.status >= 300:
        return classify(error) != "ambiguous"
    return isinstance(error, GorouterError) and classify(error) in {"unsent", "refused", "throttled"}


def _record_of(exchange: Exchange, error: BaseException | None, *, now: float, is_left: bool = False) -> AttemptRecord:
    """The record of an exchange's last attempt, which ended with `error` or without, or was left before its end."""
    ticket = exchange.ticket
    call = ticket.call
    settings = call.settings
    key = None if ticket.route is None else ticket.route.key
    cancelled = is_left or not (error is None or isinstance(error, Exception))
    return AttemptRecord(
        call=exchange.number,
        attempt=exchange.tries,
        method=call.method,
        path=call.path,
        model=settings.model,
        tenant=settings.tenant,
        lane=settings.lane,
        flow=ticket.flow,
        key="" if key is None else key.name,
        key_index=-1 if key is None else key.index,
        prompt_bytes=len(call.body),
        generation_id=exchange.generation_id,
        status=ticket.status or None,
        error=None if error is None else type(error).__name__,
        usage=exchange.usage,
        maybe_billed=_is_maybe_billed(exchange, error, cancelled=cancelled),
        cancelled=cancelled,
        streamed=call.streaming,
        queued_at=ticket.queued_at,
        taken_at=ticket.started_at,
        sent_at=ticket.sent_at,
        first_data_at=exchange.first_data_at or (ticket.reply_at if ticket.status else None),
        ended_at=now,
    )


def _is_maybe_billed(exchange: Exchange, error: BaseException | None, *, cancelled: bool) -> bool:
    if exchange.usage is not None and exchange.usage.cost is not None:
        return False
    if cancelled:
        return True
    if not isinstance(error, GorouterError):
        return error is not None
    return error.maybe_billed or classify(error) == "ambiguous"


@asynccontextmanager
async def open_pool(
    config: ClientConfig,
    connector: Connector,
    *,
    make_head: HeadMaker,
    on_attempt: Callable[[AttemptRecord], None] | None = None,
    estimate: Callable[[HttpCall], int] | None = None,
    shared: SharedLimits | None = None,
) -> AsyncIterator[Pool]:
    """A running pool. Leaving closes it: queued and running requests end with `PoolClosedError`.

    `on_attempt` is called once for each attempt that reached a connection, when it is over, also when its caller
    has gone; it must neither wait nor raise. `estimate` says how many tokens a request may come to, where
    there are limits of tokens; `estimate_tokens` by default. `shared` keeps the limits together with other processes.
    """
    async with trio.open_nursery() as nursery:
        pool = Pool(
            config,
            connector,
            heads=make_head,
            nursery=nursery,
            on_attempt=on_attempt,
            estimate=estimate,
            shared=shared,
        )
        nursery.start_soon(pool.close_cold_connections)
        nursery.start_soon(pool.keeper.run)
        nursery.start_soon(pool.queue_keeper.run)
        nursery.start_soon(pool.alarm.run)
        try:
            yield pool
        finally:
            pool.close()
            nursery.cancel_scope.cancel()
