"""The one path that every chat, stream and session turn takes to the pool and back."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ._turns.chain import ChatState
from ._turns.loan import TurnLoan, patience
from ._turns.loop import LoopServices, TurnLoop
from ._turns.plain import ChatJournal, StreamJournal
from ._turns.request import TurnRequest
from ._turns.stream import ChatStream
from .errors import GorouterError, StreamNotFinishedError
from .pool.streams import ChatReader, begin_reading
from .wire.codec import decode_completion, encode_json, kept, split_object, to_message
from .wire.mail import CallSettings, HttpCall
from .wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    import trio

    from ._turns.gate import Gate
    from ._turns.request import TurnExtras
    from .pool.tracing import Tracers
    from .pool.workers import Exchange, Lease, Pool
    from .runtime_events import ChatContext
    from .wire.responses import ChatCompletion

__all__ = ["Answers", "ChatPipeline"]

_LEAVE_S = 10.0


class Answers(Protocol):
    """Answers that are there already; see `batch.cache.AnswerCache`."""

    async def ask(
        self, call: HttpCall, send: Callable[[HttpCall], Awaitable[tuple[ChatResult, bytes]]]
    ) -> tuple[ChatResult, bytes]:
        """The answer to `call` and its JSON, from here or by `send`."""


class ChatPipeline:
    """Turns in, results or streams out. Loops of streams run in the nursery given."""

    __slots__ = ("_gate", "_loop", "_loops", "_nursery", "_pool", "_tracers", "_wall")

    def __init__(
        self,
        pool: Pool,
        loops: LoopServices,
        *,
        gate: Gate,
        nursery: trio.Nursery,
        tracers: Tracers,
        wall: Callable[[], float],
    ) -> None:
        self._pool = pool
        self._tracers = tracers
        self._loops = loops
        self._loop = TurnLoop(loops)
        self._gate = gate
        self._nursery = nursery
        self._wall = wall

    def loop(self, extras: TurnExtras | None) -> TurnLoop | None:
        """The loop that turns with these extras need now; None where one request is all there is to them.

        Who takes a turn without one notes how it has ended: see `note`.
        """
        if extras is not None and (extras.has_rounds or not self._loops.chain.only_notes):
            return TurnLoop(self._loops, extras)
        return None if self._loops.chain.only_notes else self._loop

    async def run(self, request: TurnRequest, extras: TurnExtras | None = None) -> ChatResult[object]:
        """One whole chat, given up at its deadline; no wait before a retry goes beyond it.

        Raises the errors of `Gate.admit`, of `Pool.request` and of `TurnLoop`; cancelling stops the request.
        """
        extras = await self._admit(extras)
        chain = self._loops.chain
        if not chain.only_notes or (extras is not None and extras.has_rounds):
            return await self._run_looked_at(request, extras, self.send)
        try:
            result = await self.send(request.call())
        except GorouterError as exc:
            self.note(request, request.pieces, exc)
            raise
        if chain.ended.observers:
            chain.ended.add((request, False, request.pieces, result.call.finished_at_s, result, None))
        return result

    @asynccontextmanager
    async def stream(
        self, request: TurnRequest, extras: TurnExtras | None = None, *, raw_chunks: bool = False
    ) -> AsyncIterator[ChatStream[object]]:
        """One streamed chat. Entering waits for its first data; leaving early stops the server."""
        loop = self.loop(await self._admit(extras))
        if loop is None:
            try:
                reader = await self.open_reader(request.call(streaming=True))
            except GorouterError as exc:
                self.note(request, request.pieces, exc, is_streamed=True)
                raise
            stream = ChatStream[object](reader, raw_chunks=raw_chunks)
            try:
                yield stream
            finally:
                reader.close()
                if self._loops.chain.ended.observers:
                    self._note_stream(request, reader, stream)
            return
        journal = StreamJournal(request, self.open_reader)
        self._nursery.start_soon(journal.run, loop)
        try:
            opened = await journal.opened.wait()
        except BaseException:
            journal.leave()
            raise
        if not isinstance(opened, TurnLoan):
            yield ChatStream.of_result(opened)
            return
        try:
            yield ChatStream(opened, raw_chunks=raw_chunks)
        except BaseException:
            await _leave(opened)  # noqa: ASYNC102 - shields itself, bounded
            raise
        failure = await _leave(opened)
        if failure is not None:
            raise failure

    async def send(self, call: HttpCall, *, on_sent: Callable[[], None] | None = None) -> ChatResult:
        """One whole request; `on_sent` is as in `Pool.request`, and so are the errors."""
        if self._tracers:
            return await self._traced(call, self._decode, on_sent=on_sent)
        return await self._pool.request(call, self._decode, on_sent=on_sent)

    async def _traced(
        self,
        call: HttpCall,
        decode: Callable[[Exchange], ChatResult],
        *,
        ambiguous_retries: int | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> ChatResult:
        """One whole request, and its spans."""
        spans = self._tracers.begin_request(call)
        try:
            result = await self._pool.request(
                call, decode, ambiguous_retries=ambiguous_retries, on_sent=on_sent, spans=spans
            )
        except BaseException as exc:
            spans.failed(exc)
            raise
        spans.finished(result)
        return result

    async def run_with_body(
        self,
        body: bytes,
        settings: CallSettings,
        *,
        extras: TurnExtras | None = None,
        ambiguous_retries: int | None = None,
        answers: Answers | None = None,
    ) -> tuple[ChatResult[object], bytes]:
        """A whole chat whose body is made, as a batch has it, and the JSON of its last reply without padding.

        `ambiguous_retries` stands in for that of the retry policy, where it is not None. `answers` are looked at
        before anything is sent.
        """
        replies: list[bytes] = []

        def decode(exchange: Exchange) -> ChatResult:
            result = self._decode(exchange)
            replies[:] = (exchange.ticket.body.strip(),)
            return result

        request = partial(self._traced if self._tracers else self._pool.request, ambiguous_retries=ambiguous_retries)

        async def ask(call: HttpCall) -> tuple[ChatResult, bytes]:
            return await request(call, decode), replies[0]

        async def send(call: HttpCall) -> ChatResult:
            if answers is None:
                return await request(call, decode)
            result, replies[:] = await _one_reply(answers, call, ask)
            return result

        extras = await self._admit(extras)
        chain = self._loops.chain
        if not chain.only_notes or (extras is not None and extras.has_rounds):
            result = await self._run_looked_at(_request_of(body, settings), extras, send)
        elif chain.ended.observers:
            result = await self._run_noted(_request_of(body, settings), send)
        else:
            return await send(HttpCall(body=body, settings=settings)), replies[0]
        return result, replies[0] if replies else encode_json(result.message)

    async def open_reader(self, call: HttpCall, *, on_sent: Callable[[], None] | None = None) -> ChatReader:
        """A reader of the streamed reply, which has its first data; the caller must close it.

        Opening is given up at the call's deadline (trio clock); whoever reads has its own.
        """
        if not self._tracers:
            return await self._pool.request_stream(call, self._begin, on_sent=on_sent)
        spans = self._tracers.begin_request(call)
        try:
            return await self._pool.request_stream(call, self._begin, on_sent=on_sent, spans=spans)
        except BaseException as exc:
            spans.failed(exc)
            raise

    async def _admit(self, extras: TurnExtras | None) -> TurnExtras | None:
        is_free = self._gate.is_open and (extras is None or extras.token is None)
        return extras if is_free else await self._gate.admit(extras)

    async def _run_looked_at(
        self, request: TurnRequest, extras: TurnExtras | None, send: Callable[[HttpCall], Awaitable[ChatResult]]
    ) -> ChatResult[object]:
        """One chat with something around it, or with more than one request; without a loop where nothing needs one."""
        chain = self._loops.chain
        if not chain.only_looks or (extras is not None and extras.has_rounds):
            loop = self._loop if extras is None else TurnLoop(self._loops, extras)
            return await loop(ChatJournal(request, send))
        state = ChatState(request.options, request.messages())

        async def ask() -> None:
            state.result = await send(request.call())

        return await chain.run(chain.context_of(request), state, ask)

    async def _run_noted(
        self, request: TurnRequest, send: Callable[[HttpCall], Awaitable[ChatResult]]
    ) -> ChatResult[object]:
        """One request whose end is noted."""
        try:
            result = await send(request.call())
        except GorouterError as exc:
            self.note(request, request.pieces, exc)
            raise
        self.note(request, request.pieces, result)
        return result

    def _note_stream(self, request: TurnRequest, reader: ChatReader, stream: ChatStream[object]) -> None:
        """Note the end of a stream that was read to it; one that was left before has none."""
        if reader.failure is not None:
            self.note(request, request.pieces, reader.failure, is_streamed=True)
            return
        with suppress(StreamNotFinishedError):
            self.note(request, request.pieces, stream.result, is_streamed=True)

    @property
    def is_noting(self) -> bool:
        """Whether anybody looks at what is noted."""
        return bool(self._loops.chain.ended.observers)

    def note(
        self,
        request: TurnRequest | ChatContext,
        messages: Sequence[bytes | bytearray] | bytes,
        outcome: ChatResult[object] | GorouterError,
        *,
        is_streamed: bool = False,
    ) -> None:
        """Note for the observers how a turn without a loop has ended; `messages` as in `NotedChat`."""
        chain = self._loops.chain
        if not chain.ended.observers:
            return
        if isinstance(outcome, ChatResult):
            chain.ended.add((request, is_streamed, messages, outcome.call.finished_at_s, outcome, None))
        else:
            chain.ended.add((request, is_streamed, messages, self._wall(), None, outcome))

    async def _begin(self, exchange: Exchange, lease: Lease) -> ChatReader:
        reader = await begin_reading(self._pool, exchange, lease=lease, wall=self._wall)
        exchange.deadline = exchange.started_at + self._pool.deadlines.total_s
        return reader

    def _decode(self, exchange: Exchange) -> ChatResult:
        ticket = exchange.ticket
        return self._result(decode_completion(ticket.body), exchange)

    def _result(self, reply: ChatCompletion, exchange: Exchange) -> ChatResult:
        choice = reply.choices[0]  # type: ignore[index]  # decode_completion has seen it
        ticket = exchange.ticket
        exchange.usage = reply.usage
        exchange.reply_id = reply.id
        exchange.answered_by = reply.model
        return ChatResult(
            message=to_message(choice.message),  # type: ignore[arg-type]  # as above
            call=CallRecord(
                generation_id=reply.id or exchange.generation_id,
                model=reply.model,
                provider=reply.provider,
                finish_reason=choice.finish_reason,
                native_finish_reason=choice.native_finish_reason,
                usage=reply.usage,
                attempts=exchange.attempts,
                maybe_billed=exchange.state.maybe_billed,
                queue_wait_s=exchange.queue_wait_s,
                ttft_s=ticket.data_at - ticket.sent_at,
                duration_s=self._pool.now() - exchange.started_at,
                finished_at_s=self._wall(),
                service_tier=reply.service_tier,
                system_fingerprint=reply.system_fingerprint,
                logprobs=choice.logprobs,
                openrouter_metadata=reply.openrouter_metadata,
                alignment=kept(reply.alignment),
                safeguard_results=kept(reply.safeguard_results),
            ),
        )


async def _one_reply(
    answers: Answers, call: HttpCall, ask: Callable[[HttpCall], Awaitable[tuple[ChatResult, bytes]]]
) -> tuple[ChatResult, list[bytes]]:
    result, body = await answers.ask(call, ask)
    return result, [body]


def _request_of(body: bytes, settings: CallSettings) -> TurnRequest:
    """A body in its parts."""
    fields = split_object(body)
    messages = bytes(fields.pop("messages"))[1:-1]
    return TurnRequest(encode_json(fields), (messages,), settings=settings)


async def _leave(loan: TurnLoan) -> GorouterError | None:
    """Give the loan back, and wait until its turn has ended; returns what was wrong with that."""
    loan.give_back()
    try:
        with patience(_LEAVE_S):
            await loan.saved.wait()
    except GorouterError as exc:
        return exc
    return None
