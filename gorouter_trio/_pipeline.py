"""The one path that every chat, stream and session turn takes to the pool and back."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import trio

from ._chain import ChatState
from .pool.streams import ChatReader, begin_reading
from .runtime_events import ChatContext
from .wire.codec import decode_completion, encode_call, join_body, to_message
from .wire.mail import DEFAULT_SETTINGS, CallSettings, HttpCall
from .wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._chain import Chain
    from .pool.workers import Exchange, Lease, Pool
    from .wire.responses import ChatCompletion

__all__ = ["ChatPipeline", "Commit", "TurnRequest"]

Commit: TypeAlias = "Callable[[ChatResult], Awaitable[None]]"
"""Makes an answer durable, before anybody is told of it."""


class TurnRequest:
    """One chat, stream or session turn before it is sent.

    `options` is an encoded object; `pieces` are encoded messages, joined by commas, in as many places as they
    stand in; `settings` is what is known of both. `deadline` is on the trio clock.
    """

    __slots__ = ("deadline", "options", "pieces", "session", "settings", "turn_id")

    def __init__(
        self,
        options: bytes,
        pieces: tuple[bytes | bytearray, ...],
        *,
        settings: CallSettings = DEFAULT_SETTINGS,
        deadline: float = math.inf,
        session: str | None = None,
        turn_id: str | None = None,
    ) -> None:
        self.options = options
        self.pieces = pieces
        self.settings = settings
        self.deadline = deadline
        self.session = session
        self.turn_id = turn_id

    def call(self, *, streaming: bool = False) -> HttpCall:
        """The HTTP request that asks for it."""
        body = join_body(self.options, self.pieces, streaming=streaming)
        flow = self.session or ""
        return HttpCall(body=body, streaming=streaming, deadline=self.deadline, settings=self.settings, flow=flow)

    def as_changed(self, state: ChatState) -> TurnRequest:
        """The request that extensions have made of it; raises `BadRequestError` when that is none."""
        options, messages = state.encoded()
        settings = self.settings
        if options is not self.options:
            _, settings = encode_call({"extra_body": state.options}, beneath=settings)
        return TurnRequest(
            options,
            (messages,),
            settings=settings,
            deadline=self.deadline,
            session=self.session,
            turn_id=self.turn_id,
        )


class ChatPipeline:
    """Turns in, results or readers out."""

    __slots__ = ("_chain", "_chat_ids", "_pool", "_wall")

    def __init__(self, pool: Pool, chain: Chain, *, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._chain = chain
        self._chat_ids = itertools.count(1)
        self._wall = wall

    async def run(self, request: TurnRequest, commit: Commit | None = None) -> ChatResult:
        """One whole turn, given up at its deadline; no wait before a retry goes beyond it.

        `commit` is awaited with the answer before anybody else sees it. Raises the errors of
        `Pool.request`, of the extensions and of `commit`; cancelling stops the request.
        """
        if self._chain.is_empty:
            result = await self._pool.request(request.call(), self._decode)
            if commit is not None:
                await commit(result)
            return result
        state = ChatState(request.options, b",".join(piece for piece in request.pieces if piece))
        innermost = partial(self._run_changed, request, state, commit=commit)
        return await self._chain.run(self._context(request), state, innermost)

    async def _run_changed(self, request: TurnRequest, state: ChatState, *, commit: Commit | None) -> None:
        result = await self._pool.request(request.as_changed(state).call(), self._decode)
        if commit is not None:
            await commit(result)
        state.result = result

    def _context(self, request: TurnRequest, *, is_streamed: bool = False) -> ChatContext:
        settings = request.settings
        return ChatContext(
            chat_id=str(next(self._chat_ids)),
            model=settings.model,
            is_streamed=is_streamed,
            session=request.session,
            turn_id=request.turn_id,
            tenant=settings.tenant,
            lane=settings.lane,
        )

    async def run_body(
        self, body: bytes, *, settings: CallSettings = DEFAULT_SETTINGS, deadline: float = math.inf
    ) -> ChatResult:
        """One whole chat whose body is made already."""
        return await self._pool.request(HttpCall(body=body, deadline=deadline, settings=settings), self._decode)

    async def run_with_body(
        self, body: bytes, settings: CallSettings, *, ambiguous_retries: int | None = None
    ) -> tuple[ChatResult, bytes]:
        """`run`, and the JSON of the reply as it came, without padding around it.

        `ambiguous_retries` stands in for that of the retry policy, where it is not None.
        """

        def decode(exchange: Exchange) -> tuple[ChatResult, bytes]:
            return self._decode(exchange), exchange.ticket.body.strip()

        return await self._pool.request(
            HttpCall(body=body, settings=settings), decode, ambiguous_retries=ambiguous_retries
        )

    async def open_stream(self, body: bytes, *, settings: CallSettings = DEFAULT_SETTINGS) -> ChatReader:
        """A reader of the streamed reply, which has its first data; the caller must close it."""
        return await self._pool.request_stream(HttpCall(body=body, streaming=True, settings=settings), self._begin)

    async def _begin(self, exchange: Exchange, lease: Lease) -> ChatReader:
        return await begin_reading(self._pool, exchange, lease=lease, wall=self._wall)

    def _decode(self, exchange: Exchange) -> ChatResult:
        ticket = exchange.ticket
        return self._result(decode_completion(ticket.body), exchange)

    def _result(self, reply: ChatCompletion, exchange: Exchange) -> ChatResult:
        choice = reply.choices[0]  # type: ignore[index]  # decode_completion has seen it
        ticket = exchange.ticket
        exchange.usage = reply.usage
        exchange.reply_id = reply.id
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
                ttft_s=ticket.reply_at - ticket.started_at,
                duration_s=trio.current_time() - exchange.started_at,
                finished_at_s=self._wall(),
            ),
        )
