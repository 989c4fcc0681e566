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

import math
from collections import OrderedDict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import trio
from msgspec import Struct

from .._contain import contain
from .._mailbox import ReplySlot
from ..errors import (
    ConnectError,
    DeadlineExceededError,
    DeadlinePhase,
    GorouterError,
    PoolClosedError,
    PoolFullError,
    StreamBrokenError,
)
from ..wire.codec import decode_error
from ..wire.faults import find_header
from ..wire.mail import DEFAULT_SETTINGS
from .deadlines import DeadlineKeeper
from .retry import GiveUp, RetryQuota, RetryState, decide

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from ..config import ClientConfig, Deadlines, PoolLimits
    from ..transport.http import Connection, Connector, RequestHead
    from ..wire.mail import HttpCall, PoolMail

__all__ = ["Exchange", "HeadMaker", "Lease", "Pool", "PoolStatistics", "Ticket", "open_pool"]

T = TypeVar("T")

_DRAIN_S = 1.0
_SPARE_CONNECT_S = 1.0
_CLEANUP_S = 2.0


class HeadMaker(Protocol):
    """Makes the head of a request; `extra` headers are added to those of the client, and stand in for its own."""

    def __call__(self, method: str, path: str, extra: tuple[tuple[str, str], ...] = ()) -> RequestHead:
        """The head, made anew."""


class PoolStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of the pool.

    `submitted` counts requests that were taken, retries included; each ends as `answered` (whatever
    the status), `failed` (no answer) or `abandoned` (its caller left, or its deadline passed in the
    queue). `queued` requests wait for a worker, `waiting` ones for room in the queue. `in_flight` holds
    streams that are lent. `connections` are open now, `opened` were opened so far.
    """

    queued: int
    waiting: int
    in_flight: int
    workers: int
    connections: int
    opened: int
    submitted: int
    answered: int
    failed: int
    abandoned: int
    retries: int
    retry_quota_tokens: int


class Ticket(ReplySlot[None]):
    """One attempt at a request: what to send, what came back, and when (trio clock)."""

    __slots__ = (
        "body",
        "call",
        "deadline",
        "head",
        "headers",
        "lease",
        "pool",
        "queue_scope",
        "queued_at",
        "reply_at",
        "started_at",
        "status",
        "worker",
    )

    def __init__(self, pool: Pool, call: PoolMail, *, head: RequestHead, now: float, deadline: float) -> None:
        super().__init__()
        self.pool = pool
        self.call = call
        self.head = head
        self.deadline = deadline
        self.queued_at = now
        self.started_at = now
        self.reply_at = now
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.lease: Lease | None = None
        self.queue_scope: trio.CancelScope | None = None
        self.worker: _Worker | None = None

    def on_abandon(self) -> None:
        """Leave the queue, or stop the worker."""
        self.pool.abandon(self)


class Lease:
    """A connection on loan to the task that consumes a stream.

    The holder reads with `receive_some` and must end with `give_back`, in whatever way it leaves;
    that never waits and may be called twice.
    """

    __slots__ = ("_connection", "_returned", "_waiting", "_worker")

    def __init__(self, worker: _Worker, connection: Connection) -> None:
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

    def give_back(self, *, reusable: bool) -> None:
        """Return the connection; not `reusable` closes it at once."""
        if not self._returned:
            self._returned = True
            if not reusable:
                self._connection.close()
            self._waiting.set()

    async def wait_returned(self) -> None:
        """Wait until the holder has given it back; used by the worker."""
        await self._waiting.wait()


class Exchange:
    """One request from submission to its answer, over all attempts; what results are made from."""

    __slots__ = ("attempts", "deadline", "queue_wait_s", "started_at", "state", "ticket")

    def __init__(self, *, now: float, deadline: float) -> None:
        self.started_at = now
        self.deadline = deadline
        self.attempts = 0
        self.queue_wait_s = 0.0
        self.state = RetryState()
        self.ticket: Ticket = cast("Ticket", None)

    @property
    def generation_id(self) -> str | None:
        """The id in the header of the last reply, if there was one."""
        return find_header(self.ticket.headers, b"x-generation-id")


class Pool:
    """Made by `open_pool`. All methods are for tasks of the same trio run."""

    def __init__(
        self,
        config: ClientConfig,
        connector: Connector,
        *,
        heads: HeadMaker,
        nursery: trio.Nursery,
    ) -> None:
        self.connector = connector
        self._make_head = heads
        self.limits: PoolLimits = config.pool
        self.deadlines: Deadlines = config.deadlines
        self._policy = config.retry
        self._seams = config.seams
        self._quota = RetryQuota(config.retry.quota_tokens)
        self._heads: dict[tuple[str, str], RequestHead] = {}
        self.idle: list[_Worker] = []
        # In order of their start, so that runs with one seed stay the same.
        self._workers: dict[_Worker, None] = {}
        self.keeper = DeadlineKeeper(self._workers)
        self.now = trio.lowlevel.current_clock().current_time
        self._queue: OrderedDict[Ticket, None] = OrderedDict()
        self._outside: OrderedDict[Ticket, None] = OrderedDict()
        self._nursery: trio.Nursery | None = nursery
        self._went_idle = trio.Event()
        self.answered = self.failed = self.opened = 0
        self._submitted = self._abandoned = self._retries = 0

    def __repr__(self) -> str:
        s = self.statistics()
        state = "closed" if self._nursery is None else "open"
        return f"<Pool {state}: {s.in_flight} in flight, {s.queued} queued, {s.connections} connections>"

    def statistics(self) -> PoolStatistics:
        """A snapshot; cheap."""
        return PoolStatistics(
            queued=len(self._queue),
            waiting=len(self._outside),
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
        )

    async def request(
        self, call: HttpCall, decode: Callable[[Exchange], T], *, ambiguous_retries: int | None = None
    ) -> T:
        """Send `call`, with retries, and return what `decode` makes of the whole reply.

        `ambiguous_retries` stands in for the policy's, where it is not None.
        Raises what the reply stands for, what `decode` raises, `TransportError` when no answer came,
        `PoolFullError` or `PoolClosedError` when nothing was sent. Cancelling stops the request.
        """
        now = self.now()
        exchange = Exchange(now=now, deadline=min(call.deadline, now + self.deadlines.total_s))
        exchange.state.ambiguous_limit = ambiguous_retries
        while True:
            try:
                await self._attempt(call, exchange)
                result = decode(exchange)
            except GorouterError as exc:
                await self._back_off(exc, exchange)
            else:
                self._quota.give_back(exchange.state.held_tokens)
                return result

    async def request_stream(self, call: HttpCall, begin: Callable[[Exchange, Lease], Awaitable[T]]) -> T:
        """Send `call`, with retries, and return what `begin` makes of the lease of its connection.

        `begin` may read from the lease; an error that it raises is retried like one before it, so
        it must raise only while nothing has been given to the consumer. On an error or a cancel the
        lease is taken back; after success it belongs to the caller.
        """
        now = self.now()
        exchange = Exchange(now=now, deadline=min(call.deadline, now + self.deadlines.total_s))
        while True:
            try:
                result = await self._begin_stream(call, exchange, begin)
            except GorouterError as exc:
                await self._back_off(exc, exchange)
            else:
                self._quota.give_back(exchange.state.held_tokens)
                return result

    async def _begin_stream(
        self, call: HttpCall, exchange: Exchange, begin: Callable[[Exchange, Lease], Awaitable[T]]
    ) -> T:
        await self._attempt(call, exchange)
        lease = cast("Lease", exchange.ticket.lease)
        try:
            return await begin(exchange, lease)
        except BaseException:
            lease.give_back(reusable=False)
            raise

    async def _attempt(self, call: HttpCall, exchange: Exchange) -> None:
        """One trip through the queue and a worker; raises for every status outside 2xx."""
        head = self._heads.get((call.method, call.path))
        if call.settings is not DEFAULT_SETTINGS and call.settings.headers:
            head = self._make_head(call.method, call.path, call.settings.headers)
        elif head is None:
            head = self._heads[call.method, call.path] = self._make_head(call.method, call.path)
        now = self.now()
        ticket = exchange.ticket = Ticket(self, call, head=head, now=now, deadline=exchange.deadline)
        if exchange.deadline <= now:
            raise _too_late("total")
        try:
            if self._hand_over(ticket):
                await ticket.wait()
            else:
                await self._wait_in_queue(ticket)
        finally:
            exchange.queue_wait_s += ticket.started_at - ticket.queued_at
            exchange.attempts += ticket.worker is not None
        if not 200 <= ticket.status < 300:
            raise decode_error(ticket.status, ticket.headers, body=ticket.body, now_s=self._seams.wall())

    async def _back_off(self, error: GorouterError, exchange: Exchange) -> None:
        """Wait before the next attempt, or raise `error` with what is known about the request."""
        now = trio.current_time()
        verdict = decide(
            error,
            policy=self._policy,
            state=exchange.state,
            quota=self._quota,
            rng=self._seams.random,
            remaining_s=min(exchange.deadline, trio.current_effective_deadline()) - now,
        )
        if isinstance(verdict, GiveUp):
            error.attempts = exchange.attempts
            error.maybe_billed = error.maybe_billed or verdict.maybe_billed
            error.generation_id = error.generation_id or exchange.generation_id
            raise error
        self._retries += 1
        await trio.sleep(verdict.delay_s)

    # The queue

    def _hand_over(self, ticket: Ticket) -> bool:
        """Give the ticket to a worker if one is free or may be started."""
        if self._nursery is None:
            raise PoolClosedError("the client is closed")
        if self._queue:
            return False
        if self.idle:
            self.idle.pop().take(ticket)
        elif len(self._workers) < self.limits.max_connections:
            worker = _Worker(self)
            self._workers[worker] = None
            self._nursery.start_soon(worker.run, ticket)
        else:
            return False
        self._submitted += 1
        return True

    async def _wait_in_queue(self, ticket: Ticket) -> None:
        """Queue, and wait for the answer; the deadline holds meanwhile, and later the worker's does."""
        if len(self._queue) < self.limits.queue:
            self._queue[ticket] = None
        elif self.limits.overflow == "reject":
            raise PoolFullError(f"{len(self._queue)} requests are queued already (pool.queue)")
        else:
            self._outside[ticket] = None
        self._submitted += 1
        with trio.CancelScope(deadline=ticket.deadline) as ticket.queue_scope:
            await ticket.wait()
        if ticket.queue_scope.cancelled_caught:
            raise _too_late("queue")

    def abandon(self, ticket: Ticket) -> None:
        """The caller of `ticket` has gone; used by tickets."""
        self._abandoned += 1
        if ticket.worker is not None:
            ticket.worker.leave_alone()
        elif ticket in self._queue:
            del self._queue[ticket]
            self._let_in()
        else:
            self._outside.pop(ticket, None)

    def next_ticket(self) -> Ticket | None:
        """The ticket a worker should take now; used by workers."""
        if not self._queue:
            return None
        ticket, _ = self._queue.popitem(last=False)
        self._let_in()
        cast("trio.CancelScope", ticket.queue_scope).deadline = math.inf
        return ticket

    def _let_in(self) -> None:
        """There is room in the queue for the first who waits for it."""
        if self._outside:
            ticket, _ = self._outside.popitem(last=False)
            self._queue[ticket] = None

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
                    await worker.close_idle_connection()
            self._went_idle = trio.Event()

    def close(self) -> None:
        """Refuse new requests and answer the queued ones with `PoolClosedError`."""
        self._nursery = None
        for ticket in [*self._queue, *self._outside]:
            self.failed += ticket.fail(PoolClosedError("the client was closed while the request was queued"))
        self._queue.clear()
        self._outside.clear()


class _Worker:
    """A task with one connection.

    `deadline_at` is watched by the pool's keeper. Whoever must stop the worker's request calls
    `stop`, which closes the connection, so that what waits on it ends with `StreamBrokenError`.
    """

    __slots__ = (
        "_connecting",
        "_phase",
        "_pool",
        "_stopped",
        "_task",
        "_ticket",
        "connection",
        "deadline_at",
        "expired",
        "idle_since",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._task: trio.lowlevel.Task | None = None
        self._ticket: Ticket | None = None
        self._phase: DeadlinePhase = "connect"
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
        return self.idle_since + self._pool.limits.keepalive_s if self.is_connected else math.inf

    async def run(self, ticket: Ticket) -> None:
        """Serve tickets until the pool ends; a failure of one ticket fails that ticket."""
        self._ticket = ticket
        try:
            while True:
                await contain(self._serve_tickets, report=self._fail_ticket)
                await self._close_connection()
        finally:
            closed = PoolClosedError("the client was closed while the request was running")
            closed.maybe_billed = self._phase != "connect"
            self._fail_ticket(closed)
            self._pool.retire(self)
            await self._close_connection()  # noqa: ASYNC102 - shields itself, bounded

    def take(self, ticket: Ticket) -> None:
        """Wake this idle worker with a ticket."""
        self._ticket = ticket
        task, self._task = cast("trio.lowlevel.Task", self._task), None
        trio.lowlevel.reschedule(task)

    def watch(self, deadline: float, phase: DeadlinePhase) -> None:
        """Stop the request at `deadline`, which ends `phase`."""
        self._phase = phase
        self.deadline_at = deadline
        if deadline < self._pool.keeper.next_wake:
            self._pool.keeper.hurry(deadline)

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
            self.watch(min(self.deadline_at, self._pool.now() + _SPARE_CONNECT_S), "connect")

    def drop_connection(self) -> None:
        """Close the connection at once; the worker notices."""
        if self.connection is not None:
            self.connection.close()

    async def close_idle_connection(self) -> None:
        """Close the connection of a worker that is idle; it may be woken meanwhile."""
        connection = self.connection
        if connection is not None:
            await _close(connection)

    async def _serve_tickets(self) -> None:
        pool = self._pool
        while True:
            if self._ticket is None:
                self._ticket = pool.next_ticket()
            if self._ticket is None:
                await self._wait_for_ticket()
            ticket = cast("Ticket", self._ticket)
            if not ticket.abandoned:
                await self._serve(ticket)
            self._ticket = None

    async def _wait_for_ticket(self) -> None:
        """Park on the stack of idle workers."""
        pool = self._pool
        self.idle_since = pool.now()
        self._task = trio.lowlevel.current_task()
        pool.go_idle(self)
        await trio.lowlevel.wait_task_rescheduled(self._stop_waiting)

    def _stop_waiting(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        self._pool.idle.remove(self)
        return trio.lowlevel.Abort.SUCCEEDED

    async def _serve(self, ticket: Ticket) -> None:
        """Take one ticket to its answer; the connection is closed unless the reply ended cleanly."""
        ticket.worker = self
        self.expired = self._stopped = False
        try:
            await self._exchange(ticket)
        except GorouterError as exc:
            self.drop_connection()
            self._pool.failed += ticket.fail(self._too_late(ticket) if self.expired else exc)
        finally:
            self.deadline_at = math.inf
        if ticket.lease is not None:
            await self._wait_for_lease(ticket.lease)
        connection = self.connection
        if connection is not None and (connection.is_closed or not connection.is_complete):
            await self._close_connection()

    async def _exchange(self, ticket: Ticket) -> None:
        """Send and receive, each part under its deadline; answers the ticket."""
        pool = self._pool
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
        self.watch(min(ticket.deadline, now + deadlines.headers_s), "headers")
        await connection.start(ticket.head, ticket.call.body)
        ticket.reply_at = now = pool.now()
        ticket.status = connection.status
        ticket.headers = connection.headers
        if ticket.call.streaming and 200 <= connection.status < 300:
            ticket.lease = Lease(self, connection)
        else:
            if not connection.is_complete:
                self.watch(min(ticket.deadline, now + deadlines.first_data_s), "first_data")
            ticket.body = await connection.receive_all()
        if ticket.resolve(None):
            pool.answered += 1
        elif ticket.lease is not None:
            ticket.lease.give_back(reusable=False)

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
                self.connection = await self._pool.connector.connect()
                self._pool.opened += 1
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
            self._pool.failed += ticket.fail(error)

    def _too_late(self, ticket: Ticket) -> DeadlineExceededError:
        error = _too_late(self._phase if self._pool.now() < ticket.deadline else "total")
        error.maybe_billed = self._phase != "connect"
        return error


async def _close(connection: Connection) -> None:
    connection.close()
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
        await connection.aclose()


def _too_late(phase: DeadlinePhase) -> DeadlineExceededError:
    return DeadlineExceededError(f"the request's deadline passed ({phase})", phase=phase)


@asynccontextmanager
async def open_pool(config: ClientConfig, connector: Connector, *, make_head: HeadMaker) -> AsyncIterator[Pool]:
    """A running pool. Leaving closes it: queued and running requests end with `PoolClosedError`."""
    async with trio.open_nursery() as nursery:
        pool = Pool(config, connector, heads=make_head, nursery=nursery)
        nursery.start_soon(pool.close_cold_connections)
        nursery.start_soon(pool.keeper.run)
        try:
            yield pool
        finally:
            pool.close()
            nursery.cancel_scope.cancel()
