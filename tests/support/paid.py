"""Chats that are paid for: the accounting of a client between a pool and a simulator that charges, in virtual time.

One chat here is one attempt, so that what is judged is the accounting and not the retries.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec
import trio
from attempts import Attempted

from gorouter_trio.config import ClientConfig, RetryPolicy, Secret
from gorouter_trio.errors import GorouterError, StreamBrokenError
from gorouter_trio.pool.accounting import (
    Accounting,
    AccountingReports,
    AccountingService,
    open_accounting,
    with_max_tokens,
)
from gorouter_trio.pool.budget import Reservation
from gorouter_trio.pool.ledger import Owner
from gorouter_trio.pool.ledger_file import open_ledger_file
from gorouter_trio.pool.prices import PriceEvent
from gorouter_trio.pool.streams import ChatReader, begin_reading
from gorouter_trio.pool.workers import Exchange, Lease, Pool, open_pool
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.transport.connector import connector
from gorouter_trio.transport.http import ConnectionLimits, Origin, RequestHead
from gorouter_trio.wire.catalog import GenerationInfo, Model
from gorouter_trio.wire.codec import (
    decode_completion,
    decode_generation,
    decode_models,
    encode_json,
    encode_prompt,
    render_body,
)
from gorouter_trio.wire.ledger import LedgerRow
from gorouter_trio.wire.mail import HttpCall
from gorouter_trio.wire.responses import Usage

ORIGIN = Origin("http", "openrouter.simulated", 80)


@dataclass
class Paid:
    """The pieces, and everything that was reported."""

    pool: Pool
    accounting: Accounting
    simulator: Simulator
    prices: list[PriceEvent] = field(default_factory=list)
    lost: list[LedgerRow] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    most_committed_usd: Decimal = Decimal(0)
    left_usd: Decimal | None = None

    async def chat(
        self,
        prompt: str,
        *,
        model: str = "openai/gpt-4o-mini",
        max_tokens: int | None = 100,
        tenant: str = "",
        owner: Owner | None = None,
        leave_after: int | None = None,
        streamed: bool = False,
    ) -> LedgerRow:
        """One paid attempt; a streamed one may be left after so many reads. Raises what forbids sending it."""
        owner = owner or Owner()
        options: dict[str, object] = {"model": model}
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
        body = render_body(encode_json(options), encode_prompt(prompt), streaming=streamed)
        spending = self.accounting.spending(
            body, model=model, max_tokens=max_tokens, tenant=tenant, session=owner.session, batch=owner.batch
        )
        reservation: Reservation | None = None
        if self.accounting.is_bounded:
            reservation = self.accounting.reserve_nowait(spending) or await self.accounting.reserve(spending)
            body = with_max_tokens(body, reservation.max_tokens)
            client = self.accounting.gate.book.client
            self.most_committed_usd = max(self.most_committed_usd, client.spent_usd + client.held_usd)
        trial = _Trial(self, body, Attempted(model=model, tenant=tenant, streamed=streamed, generation_id=None))
        try:
            await (trial.stream(leave_after) if streamed else trial.ask())
        finally:
            # Until the end says otherwise, the request was sent and its answer lost.
            row = self.accounting.finish(
                trial.seen, body=body, owner=owner, answered_by=trial.answered_by, reservation=reservation
            )
        return row

    async def models(self) -> list[Model]:
        """GET /models."""
        call = HttpCall(method="GET", path="/models")
        return await self.pool.request(call, lambda exchange: decode_models(exchange.ticket.body))

    async def generation(self, generation_id: str) -> GenerationInfo:
        """GET /generation, once."""
        call = HttpCall(method="GET", path=f"/generation?id={generation_id}")
        return await self.pool.request(call, lambda exchange: decode_generation(exchange.ticket.body))

    async def remaining_usd(self) -> Decimal | None:
        """What the API says is left, as the test chose it."""
        await trio.lowlevel.checkpoint()
        return self.left_usd

    @property
    def models_on_offer(self) -> int:
        """How many models the server has."""
        return len(self.simulator.config.models)

    @property
    def charged_usd(self) -> Decimal:
        """What the server has charged."""
        return Decimal(self.simulator.ledger.total_nanousd).scaleb(-9)


class _Trial:
    """One attempt on its way: `seen` is what is known of it so far."""

    def __init__(self, place: Paid, body: bytes, seen: Attempted) -> None:
        self.place = place
        self.body = body
        self.seen = _changed(seen, maybe_billed=True, cancelled=True, status=None)
        self.answered_by = ""

    async def ask(self) -> None:
        try:
            await self.place.pool.request(HttpCall(body=self.body), self._decode)
        except GorouterError as exc:
            self._failed(exc)

    async def stream(self, leave_after: int | None) -> None:
        call = HttpCall(body=self.body, streaming=True)
        try:
            reader = await self.place.pool.request_stream(call, self._begin)
        except GorouterError as exc:
            self._failed(exc)
            return
        try:
            await self._read(reader, leave_after)
        except GorouterError as exc:
            self._failed(exc, usage=reader.merge.usage)
        finally:
            reader.close()

    async def _read(self, reader: ChatReader, leave_after: int | None) -> None:
        reads = 0
        while leave_after is None or reads < leave_after:
            if not await reader.read():
                self._ended(reader.result().usage)
                return
            reads += 1

    def _decode(self, exchange: Exchange) -> None:
        self.seen = _changed(self.seen, generation_id=exchange.generation_id, status=exchange.ticket.status)
        reply = decode_completion(exchange.ticket.body, generation_id=exchange.generation_id)
        self.answered_by = reply.model or ""
        self._ended(reply.usage)

    async def _begin(self, exchange: Exchange, lease: Lease) -> ChatReader:
        self.seen = _changed(self.seen, generation_id=exchange.generation_id, status=exchange.ticket.status)
        return await begin_reading(self.place.pool, exchange, lease=lease, wall=lambda: 0.0)

    def _ended(self, usage: Usage | None) -> None:
        self.seen = _changed(self.seen, usage=usage, maybe_billed=False, cancelled=False)

    def _failed(self, error: GorouterError, usage: Usage | None = None) -> None:
        self.seen = _changed(
            self.seen,
            generation_id=error.generation_id or self.seen.generation_id,
            status=getattr(error, "status", None),
            error=type(error).__name__,
            # The pool takes a used connection that closes at once for one that was closed before. Nobody can know.
            maybe_billed=error.maybe_billed or isinstance(error, StreamBrokenError),
            cancelled=False,
            usage=usage,
        )


def _changed(seen: Attempted, **fields: object) -> Attempted:
    return msgspec.structs.replace(seen, **fields)


@asynccontextmanager
async def open_paid(simulator: Simulator, *, remaining: str | None = None, **fields: object) -> AsyncIterator[Paid]:
    """The pool, the accounting with its tasks, and the simulator; `fields` are settings of the client."""
    given = {"retry": RetryPolicy(max_retries=0), **fields}
    config = ClientConfig(api_key="sk-or-v1-x", base_url="http://localhost", **given).resolved({})  # type: ignore[arg-type]  # fields of the settings
    limits = ConnectionLimits(max_header_bytes=65536, max_body_bytes=2**26)
    async with open_simulated_network(simulator) as network:
        made = connector(ORIGIN, transport=network, tls=None, limits=limits)
        errors: list[Exception] = []
        async with (
            open_ledger_file(config.ledger, report=errors.append) as sink,
            open_pool(config, made, make_head=_make_head) as pool,
        ):
            place = Paid(pool, Accounting(config), simulator, errors=errors)
            place.left_usd = None if remaining is None else Decimal(remaining)
            service = AccountingService(place.models, place.generation, place.remaining_usd)
            reports = AccountingReports(place.prices.append, place.lost.append, place.errors.append)
            async with open_accounting(config, service, reports=reports, sink=sink) as place.accounting:
                yield place


def _make_head(
    method: str, path: str, extra: tuple[tuple[str, str], ...] = (), *, key: Secret | None = None
) -> RequestHead:
    headers = [("Authorization", "Bearer sk-or-v1-x"), ("Content-Type", "application/json"), *extra]
    return RequestHead(ORIGIN, method=method, target=f"/api/v1{path}", headers=headers)
