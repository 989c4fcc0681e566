"""The one path that every chat, stream and session turn takes to the pool and back."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import trio

from ._chain import ChatState
from ._turns import Finish, Rounds, TurnExtras, TurnRequest
from .errors import GorouterError
from .pool.retry import warrants_fallback
from .pool.streams import ChatReader, begin_reading
from .runtime_events import ChatContext
from .wire.codec import decode_completion, kept, to_message
from .wire.mail import DEFAULT_SETTINGS, CallSettings, HttpCall
from .wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ._chain import Chain
    from .pool.workers import Exchange, Lease, Pool
    from .wire.responses import ChatCompletion

__all__ = ["ChatPipeline", "Commit"]

Commit: TypeAlias = "Callable[[ChatResult[object]], Awaitable[None]]"
"""Makes an answer durable, before anybody is told of it."""


class ChatPipeline:
    """Turns in, results or readers out."""

    __slots__ = ("_chain", "_chat_ids", "_pool", "_wall")

    def __init__(self, pool: Pool, chain: Chain, *, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._chain = chain
        self._chat_ids = itertools.count(1)
        self._wall = wall

    async def run(self, request: TurnRequest, commit: Commit | None = None) -> ChatResult[object]:
        """One whole turn, given up at its deadline; no wait before a retry goes beyond it.

        `commit` is awaited with the answer before anybody else sees it. Raises the errors of `Pool.request`,
        of the extensions and of `commit`, and `InvalidOutputError`; cancelling stops the request.
        """
        if self._chain.is_empty:
            return await self._run_rounds(request, commit)
        state = ChatState(request.options, request.messages())
        innermost = partial(self._run_changed, request, state, commit=commit)
        return await self._chain.run(self._context(request), state, innermost)

    async def _run_changed(self, request: TurnRequest, state: ChatState, *, commit: Commit | None) -> None:
        state.result = await self._run_rounds(request.as_changed(state), commit)

    async def _run_rounds(self, request: TurnRequest, commit: Commit | None) -> ChatResult[object]:
        result: ChatResult[object]
        if request.extras is None:
            result = await self._pool.request(request.call(), self._decode)
        else:
            result = await self._ask_until_done(request, request.extras)
        if commit is not None:
            await commit(result)
        return result

    async def _ask_until_done(self, request: TurnRequest, extras: TurnExtras) -> ChatResult[object]:
        rounds = Rounds(extras)
        added: tuple[bytes, ...] = ()
        last: ChatResult | None = None
        while True:
            try:
                last = await self._ask_models(request, added, extras)
            except GorouterError as exc:
                # The rounds before it were paid for.
                exc.partial = exc.partial or last
                raise
            step = rounds.take(last)
            if isinstance(step, Finish):
                return step.result
            added = (*added, step.messages())

    async def _ask_models(self, request: TurnRequest, added: tuple[bytes, ...], extras: TurnExtras) -> ChatResult:
        """One round: the model asked for, then each fallback until one answers."""
        for fallback in extras.fallbacks:
            try:
                return await self._pool.request(request.call(added), self._decode)
            except GorouterError as exc:
                if not warrants_fallback(exc):
                    raise
            request = request.for_model(fallback)
        return await self._pool.request(request.call(added), self._decode)

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
        self,
        body: bytes,
        *,
        settings: CallSettings = DEFAULT_SETTINGS,
        deadline: float = math.inf,
        flow: str = "",
        on_sent: Callable[[], None] | None = None,
    ) -> ChatResult:
        """One whole chat whose body is made already; `flow` and `on_sent` are as in `HttpCall` and `Pool.request`."""
        call = HttpCall(body=body, deadline=deadline, settings=settings, flow=flow)
        return await self._pool.request(call, self._decode, on_sent=on_sent)

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

    async def open_stream(
        self,
        body: bytes,
        *,
        settings: CallSettings = DEFAULT_SETTINGS,
        deadline: float = math.inf,
        flow: str = "",
        on_sent: Callable[[], None] | None = None,
    ) -> ChatReader:
        """A reader of the streamed reply, which has its first data; the caller must close it.

        Opening is given up at `deadline` (trio clock); whoever reads has its own. `flow` and `on_sent` are as in
        `HttpCall` and `Pool.request`.
        """
        call = HttpCall(body=body, streaming=True, deadline=deadline, settings=settings, flow=flow)
        return await self._pool.request_stream(call, self._begin, on_sent=on_sent)

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
                service_tier=reply.service_tier,
                system_fingerprint=reply.system_fingerprint,
                logprobs=choice.logprobs,
                openrouter_metadata=reply.openrouter_metadata,
                alignment=kept(reply.alignment),
                safeguard_results=kept(reply.safeguard_results),
            ),
        )
