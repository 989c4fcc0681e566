"""Reading a streamed reply: bytes of a lent connection in, merged chunks out, under data deadlines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from ..errors import DeadlinePhase, GorouterError, ProviderError, StreamBrokenError
from ..wire.codec import decode_chunks, decode_completion, to_chunk
from ..wire.faults import api_error, find_header
from ..wire.merge import ChunkMerge
from ..wire.result import CallRecord, ChatResult
from ..wire.sse import SseParser

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..wire.stream import ChatChunk
    from .tracing import RequestSpans
    from .workers import Exchange, Lease, Pool

__all__ = ["ChatReader", "begin_reading"]

_DONE = b"[DONE]"
_FIRST: DeadlinePhase = "first_data"
_IDLE: DeadlinePhase = "data_idle"
_TOTAL: DeadlinePhase = "total"


class ChatReader:
    """One streamed reply, read in the consumer's task, one socket read at a time.

    `merge` holds everything that has arrived. The holder must end with `close`, however it leaves.
    """

    __slots__ = (
        "_data_at",
        "_ended",
        "_exchange",
        "_failure",
        "_first",
        "_lease",
        "_limit",
        "_parser",
        "_patience_s",
        "_phase",
        "_pool",
        "_wall",
        "merge",
        "ttft_s",
    )

    def __init__(self, pool: Pool, exchange: Exchange, *, lease: Lease, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._exchange = exchange
        self._lease = lease
        self._wall = wall
        self._parser = SseParser(max_event_bytes=pool.limits.max_body_bytes)
        self._data_at = exchange.ticket.reply_at
        # How long data may stay out, and what has ended then.
        self._patience_s, self._phase = pool.deadlines.first_data_s, _FIRST
        self._limit: tuple[float, DeadlinePhase] | None = None
        self._first: list[ChatChunk] = []
        self._failure: GorouterError | None = None
        self._ended = False
        self.merge = ChunkMerge()
        self.ttft_s: float | None = None

    @property
    def generation_id(self) -> str | None:
        """The API's id of the answer, from the header of the reply: known before its first byte."""
        return self._exchange.generation_id or self.merge.generation_id

    @property
    def is_ended(self) -> bool:
        """Whether the reply has arrived to its end."""
        return self._ended

    @property
    def failure(self) -> GorouterError | None:
        """What its holder was told, where that was an error."""
        return self._exchange.failure

    @property
    def is_answered(self) -> bool:
        """Whether the whole answer has arrived, even if the end of the stream has not."""
        return self.merge.finish_reason is not None and self._failure is None

    async def read(self) -> list[ChatChunk]:
        """The next chunks, all that arrived together; an empty list at the end of the reply.

        Raises the error that the stream carries once everything before it was given out,
        `StreamBrokenError` when it is cut, `DeadlineExceededError` when data stays out, each with
        what had arrived in `partial`. Waits for the socket at most once per list; a cancel leaves
        the reader usable by nobody but `close`.
        """
        if self._first:
            chunks, self._first = self._first, []
            return chunks
        try:
            chunks = [] if self._failure is not None else await self._read_chunks()
            if not chunks and self._failure is not None:
                raise self._failure
        except GorouterError as exc:
            self._complete_error(exc)
            raise
        return chunks

    def wait(self) -> Awaitable[None] | None:
        """What to await before `take`, or None where `read` has to be called.

        A wait without a coroutine of ours in it: when events trickle in, each costs a wake-up, and every coroutine
        between the socket and the consumer would be entered and left for it.
        """
        if self._ended or self._first or self._failure is not None:
            return None
        limit = self._limit
        if limit is None:
            # Kept until there are events: what arrives meanwhile may be comments, which are no data.
            limit = self._limit = self._deadline(self._pool.now())
        deadline, phase = limit
        return self._lease.wait(deadline, phase)

    def take(self) -> list[ChatChunk]:
        """The chunks that have arrived, none as often as not. Raises as `read`; never waits."""
        try:
            received = self._lease.take()
            if received is None:
                return []
            if received:
                events = self._parser.feed(received)
                if not events:
                    return []
                self._limit = None
                return self._take(events)
            self._ended = True
            self._look_for_failure()
        except GorouterError as exc:
            self._complete_error(exc)
            raise
        return []

    async def read_first(self) -> None:
        """Read until there is something to give out, the end, or an error, which is raised."""
        if self._is_whole():
            await self._read_whole()
        while not (self._ended or self.merge.has_data):
            self._first += await self._read_chunks()
            if self._failure is not None and not self.merge.has_data:
                raise self._failure
        self._patience_s, self._phase = self._pool.deadlines.data_idle_s, _IDLE
        self._exchange.first_data_at = self._data_at
        self.ttft_s = self._data_at - self._exchange.ticket.sent_at

    def result(self, *, interrupted: bool = False) -> ChatResult:
        """The answer from what has arrived so far."""
        merge = self.merge
        exchange = self._exchange
        call = CallRecord(
            generation_id=merge.generation_id or exchange.generation_id,
            model=merge.model,
            provider=merge.provider,
            finish_reason=merge.finish_reason,
            native_finish_reason=merge.native_finish_reason,
            usage=merge.usage,
            attempts=exchange.attempts,
            maybe_billed=exchange.state.maybe_billed,
            interrupted=interrupted,
            queue_wait_s=exchange.queue_wait_s,
            ttft_s=self.ttft_s,
            duration_s=trio.current_time() - exchange.started_at,
            finished_at_s=self._wall(),
            service_tier=merge.service_tier,
            system_fingerprint=merge.system_fingerprint,
            logprobs=merge.logprobs,
            openrouter_metadata=merge.openrouter_metadata,
            alignment=merge.alignment,
            safeguard_results=merge.safeguard_results,
        )
        return ChatResult(message=merge.message(), call=call)

    def close(self) -> None:
        """Give the connection back; before the end of the reply that closes it, which stops the server."""
        exchange, merge = self._exchange, self.merge
        exchange.usage = merge.usage
        exchange.reply_id = merge.generation_id
        exchange.answered_by = merge.model
        exchange.is_whole = self._ended
        self._lease.give_back(reusable=self._ended)
        if exchange.spans is not None:
            self._end_spans(exchange.spans, exchange.failure)

    def _end_spans(self, spans: RequestSpans, failure: GorouterError | None) -> None:
        if failure is None:
            spans.finished(self.result(interrupted=not self._ended))
        else:
            spans.failed(failure)

    async def _read_chunks(self) -> list[ChatChunk]:
        """One list of chunks from as many socket reads as it takes."""
        # The time that the consumer takes between two reads is its own, not the server's.
        since = self._pool.now() if self.merge.has_data else self._data_at
        while not self._ended:
            deadline, phase = self._deadline(since)
            received = await self._lease.receive_some(deadline=deadline, phase=phase)
            if not received:
                self._ended = True
                self._look_for_failure()
                return []
            events = self._parser.feed(received)
            if events:
                since = self._data_at = self._pool.now()
                chunks = self._take(events)
                if chunks or self._failure is not None:
                    return chunks
        return []

    def _is_whole(self) -> bool:
        """Whether the reply is no stream but one JSON value: an error, or a server that cannot stream."""
        kind = find_header(self._exchange.ticket.headers, b"content-type") or ""
        return kind[:16].lower() == "application/json"

    async def _read_whole(self) -> None:
        """Take a reply that came in one piece for a stream of one chunk; raises what it carries."""
        pieces = []
        deadline, phase = self._deadline(self._data_at)
        while piece := await self._lease.receive_some(deadline=deadline, phase=phase):
            pieces.append(piece)
        self._ended = True
        self._data_at = self._pool.now()
        self._first = [to_chunk(decode_completion(b"".join(pieces)))]
        self.merge.add(self._first)

    def _deadline(self, since: float) -> tuple[float, DeadlinePhase]:
        """Until when the next read may wait, and what has ended then."""
        deadline, total = since + self._patience_s, self._exchange.deadline
        return (deadline, self._phase) if deadline < total else (total, _TOTAL)

    def _take(self, events: list[bytes]) -> list[ChatChunk]:
        if _DONE in events:
            self._ended = True
            del events[events.index(_DONE) :]
        chunks, error = decode_chunks(events)
        merge = self.merge
        merge.add(chunks)
        if self._ended or merge.finish_reason is not None or merge.error is not None:
            self._look_for_failure()
        if error is not None and merge.error is None:
            self._failure = error
        return chunks

    def _look_for_failure(self) -> None:
        merge = self.merge
        if merge.error is not None or merge.finish_reason == "error":
            self._failure = self._stream_error()
        elif self._ended and merge.finish_reason is None:
            self._failure = StreamBrokenError("the stream ended before the reply was finished")

    def _stream_error(self) -> GorouterError:
        merge = self.merge
        if merge.error is not None:
            return api_error(merge.error, status=200, generation_id=merge.generation_id)
        reason = merge.native_finish_reason or "no reason given"
        return ProviderError(
            f"the provider ended the stream with an error ({reason})",
            status=200,
            code=502,
            generation_id=merge.generation_id,
        )

    def _complete_error(self, error: GorouterError) -> None:
        error.generation_id = error.generation_id or self.merge.generation_id or self._exchange.generation_id
        error.attempts = self._exchange.attempts
        error.maybe_billed = True
        self._exchange.failure = error
        if self.merge.has_data:
            error.partial = self.result(interrupted=True)


async def begin_reading(pool: Pool, exchange: Exchange, *, lease: Lease, wall: Callable[[], float]) -> ChatReader:
    """A reader that has its first data. What fails before that may be retried by the pool."""
    reader = ChatReader(pool, exchange, lease=lease, wall=wall)
    await reader.read_first()
    return reader
