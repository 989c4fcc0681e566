"""The service endpoints: the catalog, the account, generations, embeddings, and completions without a conversation.

All go through the pool, with its retries and deadlines. Reading changes nothing and costs nothing, so what fails there
was not billed, and an ambiguous failure is tried again like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import trio

from .errors import GorouterError, NotFoundError
from .wire.codec import (
    decode_api_batch,
    decode_api_batch_page,
    decode_credits,
    decode_embeddings,
    decode_endpoint_list,
    decode_endpoints,
    decode_generation,
    decode_key,
    decode_model,
    decode_model_count,
    decode_model_page,
    decode_providers,
    decode_text_completion,
    kept,
)
from .wire.embeddings import EmbeddingResult
from .wire.mail import CallSettings, HttpCall
from .wire.queries import generation_path, model_path, next_page_query, page_path
from .wire.result import CallRecord, CompletionResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .pool.workers import Exchange, Pool
    from .wire.batch import ApiBatch, ApiBatchPage
    from .wire.catalog import Credits, GenerationInfo, KeyInfo, Model, ModelEndpoint, ModelEndpoints, ProviderInfo

    T = TypeVar("T")

__all__ = ["Services"]

# A request with a header of its own has its head made for itself; the others' are kept for ever, one a path.
_ONCE = CallSettings(headers=(("Accept", "application/json"),))
_MAX_PAGES = 1_000
_FIRST_POLL_S = 0.5
_POLL_GROWTH = 1.6
_MAX_POLL_S = 10.0


class Services:
    """The endpoints of one client. Errors are those of `Pool.request`; cancelling stops the request."""

    def __init__(self, pool: Pool, *, read_retries: int, total_s: float, wall: Callable[[], float]) -> None:
        self._pool = pool
        self._read_retries = read_retries
        self._total_s = total_s
        self._wall = wall

    async def models(
        self, path: str, filters: Mapping[str, object], *, offset: int = 0, limit: int | None = None
    ) -> list[Model]:
        """Models from row `offset` on, at most `limit`, following the links from page to page."""
        where: str | None = page_path(path, filters, offset=offset, limit=limit)
        found: list[Model] = []
        seen: set[str] = set()
        while where is not None and where not in seen and len(seen) < _MAX_PAGES:
            seen.add(where)
            page = await self._get(where, decode_model_page)
            found += page.data
            following = page.links.next if page.links is not None else None
            is_enough = limit is not None and len(found) >= limit
            where = next_page_query(where, following) if following and page.data and not is_enough else None
        return found[:limit]

    async def count_models(self, filters: Mapping[str, object]) -> int:
        """How many models there are."""
        return await self._get(page_path("/models/count", filters), decode_model_count)

    async def model(self, model: str) -> Model:
        """One model."""
        return await self._get(model_path("/model/", model), decode_model)

    async def endpoints(self, model: str) -> ModelEndpoints:
        """Who offers a model."""
        return await self._get(model_path("/models/", model, after="/endpoints"), decode_endpoints)

    async def zdr_endpoints(self) -> list[ModelEndpoint]:
        """Endpoints that keep no data."""
        return await self._get("/endpoints/zdr", decode_endpoint_list)

    async def providers(self) -> list[ProviderInfo]:
        """All providers."""
        return await self._get("/providers", decode_providers)

    async def key(self) -> KeyInfo:
        """The key in use."""
        return await self._get("/key", decode_key)

    async def credits(self) -> Credits:
        """The account's credits."""
        return await self._get("/credits", decode_credits)

    async def generation(self, generation_id: str, *, polls: int) -> GenerationInfo:
        """A generation, asked for up to `polls` times while it is not found."""
        path = generation_path(generation_id)
        until = trio.current_time() + self._total_s
        delay_s = _FIRST_POLL_S
        for left in range(max(polls, 1) - 1, -1, -1):
            try:
                return await self._get(path, decode_generation)
            except NotFoundError:
                if not left or trio.current_time() + delay_s > until:
                    raise
            await trio.sleep(delay_s)
            delay_s = min(delay_s * _POLL_GROWTH, _MAX_POLL_S)
        raise AssertionError("the last try returns or raises")

    async def submit_batch(self, body: bytes) -> ApiBatch:
        """Hand in a batch of requests; never sent twice, so that an ambiguous failure says `maybe_billed`."""
        call = HttpCall(path="/batches", body=body, settings=_ONCE)
        return await self._pool.request(call, lambda e: decode_api_batch(e.ticket.body), ambiguous_retries=0)

    async def find_batch(self, batch_id: str) -> ApiBatch:
        """A batch as it stands, with its results when it has ended."""
        return await self._get(f"/batches/{quote(batch_id, safe='')}", decode_api_batch)

    async def list_batches(self, *, limit: int = 100, after: str | None = None) -> ApiBatchPage:
        """Batches without results, newest first."""
        more = "" if after is None else f"&after={quote(after, safe='')}"
        return await self._get(f"/batches?limit={limit}{more}", decode_api_batch_page)

    async def embed(self, body: bytes, settings: CallSettings) -> EmbeddingResult:
        """Vectors for the input in `body`."""

        def decode(exchange: Exchange) -> EmbeddingResult:
            reply = decode_embeddings(exchange.ticket.body)
            exchange.usage = reply.usage
            exchange.reply_id = reply.id
            exchange.answered_by = reply.model
            return EmbeddingResult(
                data=reply.data or [],
                model=reply.model,
                generation_id=reply.id or exchange.generation_id,
                usage=reply.usage,
                attempts=exchange.attempts,
            )

        return await self._pool.request(HttpCall(path="/embeddings", body=body, settings=settings), decode)

    async def complete(self, body: bytes, settings: CallSettings) -> CompletionResult:
        """What follows the prompt in `body`."""
        call = HttpCall(path="/completions", body=body, settings=settings)
        return await self._pool.request(call, self._completion)

    def _completion(self, exchange: Exchange) -> CompletionResult:
        ticket = exchange.ticket
        reply = decode_text_completion(ticket.body)
        choice = reply.choices[0]  # type: ignore[index]  # decode_text_completion has seen it
        exchange.usage = reply.usage
        exchange.reply_id = reply.id
        exchange.answered_by = reply.model
        call = CallRecord(
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
            duration_s=trio.current_time() - exchange.started_at,
            finished_at_s=self._wall(),
            service_tier=reply.service_tier,
            system_fingerprint=reply.system_fingerprint,
        )
        return CompletionResult(
            text=choice.text or "", call=call, reasoning=choice.reasoning, logprobs=kept(choice.logprobs)
        )

    async def _get(self, path: str, decode: Callable[[bytes], T]) -> T:
        def decode_reply(exchange: Exchange) -> T:
            return decode(exchange.ticket.body)

        call = HttpCall(method="GET", path=path, settings=_ONCE)
        try:
            return await self._pool.request(call, decode_reply, ambiguous_retries=self._read_retries)
        except GorouterError as exc:
            exc.maybe_billed = False
            raise
