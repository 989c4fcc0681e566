"""The one path that every chat, stream and session turn takes to the pool and back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from .pool.streams import ChatReader, begin_reading
from .wire.codec import decode_completion, kept, to_message
from .wire.mail import DEFAULT_SETTINGS, CallSettings, HttpCall
from .wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pool.workers import Exchange, Lease, Pool
    from .wire.responses import ChatCompletion

__all__ = ["ChatPipeline"]


class ChatPipeline:
    """Request bodies in, results or readers out."""

    __slots__ = ("_pool", "_wall")

    def __init__(self, pool: Pool, *, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._wall = wall

    async def run(
        self, body: bytes, *, settings: CallSettings = DEFAULT_SETTINGS, deadline: float = math.inf
    ) -> ChatResult:
        """One whole chat, given up at `deadline` (trio clock); no wait before a retry goes beyond it.

        Raises the errors of `Pool.request`; cancelling stops the request.
        """
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
