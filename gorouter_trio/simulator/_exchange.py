"""One chat request from its arrival to its end: admission, faults, generation, sending, and the charge.

    arrive -> refuse
           -> process -> send, whole or as a stream -> completed | cancelled | failed -> settle

A stream that its client leaves is cancelled, and billed as its provider does. A whole reply is generated, and
billed, to its end whether or not somebody still waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, final

import msgspec
import trio
from msgspec import Struct

from . import _json
from ._admission import Admission, Ticket
from ._books import Books
from ._delivery import Delivery
from ._draws import Draws
from ._extras import find_extras
from ._jobs import JOBS, Job, Kind
from ._schemas import find_strict_fault
from ._slots import Course, Slots
from .catalog import SimulatedModel
from .config import RequestRecord, SimulatorConfig
from .directives import NONE, Directives, read_directives
from .faults import (
    FAULTS,
    ErrorReply,
    FaultContext,
    FaultKind,
    bad_request,
    context_length,
    schema_refused,
    with_retry_after,
)
from .forms import Face, Generation
from .ledger import Charge
from .limits import Demand
from .model import Answer, Writer
from .outlet import Outlet, Pace

if TYPE_CHECKING:
    from ..transport.http_server import ServerReply, ServerRequest
    from .requests import ChatRequest, Reading
    from .scenario import Behaviour

_NO_ANSWER: Final = Answer(
    text="",
    thoughts="",
    is_thinking_hidden=True,
    calls=(),
    finish_reason="stop",
    completion_tokens=0,
    reasoning_tokens=0,
)
_DEFAULT_MAX_TOKENS: Final = 4_096
_CLIENT_CLOSED: Final = 499
_VARIANTS: Final = frozenset({"nitro", "floor", "exacto", "extended", "thinking", "online"})


class World(Struct, frozen=True):
    """What all exchanges of one simulator share."""

    config: SimulatorConfig
    models: dict[str, SimulatedModel]
    embedding_models: dict[str, SimulatedModel]
    faces: dict[str, Face]
    books: Books
    wall: Callable[[], float]
    on_request: Callable[[RequestRecord], None] | None
    admission: Admission
    course: Course | None

    def find_model(self, chat: ChatRequest) -> SimulatedModel | None:
        """The first model that the request names and the catalog has; the default when it names none."""
        if chat.model is None and not chat.models:
            return self.models[self.config.default_model]
        found = self._resolve(chat.model) if chat.model is not None else None
        for name in chat.models or () if found is None else ():
            found = found or self._resolve(name)
        return found

    def _resolve(self, name: str) -> SimulatedModel | None:
        if name in self.models:
            return self.models[name]
        if name == "openrouter/auto":
            return self.models[self.config.default_model]
        base, _, variant = name.partition(":")
        return self.models.get(base) if variant in _VARIANTS else None

    def new_id(self, draws: Draws) -> str:
        """A generation id that is not in the ledger."""
        while True:
            made = f"gen-{int(self.wall())}-{draws.alnum(20)}"
            if self.books.ledger.find(made) is None:
                return made


@final
class Exchange:
    """The life of one chat request."""

    def __init__(
        self, world: World, request: ServerRequest, *, reply: ServerReply, key: str, kind: Kind = "chat"
    ) -> None:
        self._world = world
        self._request = request
        self._reply = reply
        self._outlet = Outlet(reply, world.config)
        self._key = key
        self._kind = kind
        self._started_at_s = trio.current_time()
        # Until there is a generation, which is what can fail.
        self._outcome: Literal["completed", "cancelled", "failed", "refused"] = "refused"
        self._fault: FaultKind | None = None
        self._model: SimulatedModel | None = None
        self._is_stream = False
        self._pace = Pace()
        self._charge: Charge | None = None
        self._ticket: Ticket | None = None
        self._slots: Slots | None = None
        self._behaviour: Behaviour | None = None
        self._is_booked = False

    async def run(self) -> None:
        """Answer the request, and see to it that it is counted once, whatever happens."""
        self._world.books.arrive()
        try:
            await self._answer()
        finally:
            if not self._is_booked:
                self._book()

    async def _answer(self) -> None:
        job = JOBS[self._kind](self._request.body)
        if isinstance(job, ErrorReply):
            await self._refuse_at_once(job)
            return
        chat = job.chat
        self._is_stream = bool(chat.stream)
        if job.kind == "embeddings":
            self._model = self._world.embedding_models.get(chat.model or "")
        else:
            self._model = self._world.find_model(chat)
        if self._model is None:
            name = chat.model or next(iter(chat.models or ()), "")
            await self._refuse_at_once(bad_request(f"{name} is not a valid model ID"))
        else:
            await self._consider(job, self._model)

    async def _consider(self, job: Job, model: SimulatedModel) -> None:
        """Draw what happens to the request, and let it happen."""
        chat = job.chat
        config, books = self._world.config, self._world.books
        reading = chat.read(config.seed, model.id)
        directives = read_directives(reading.prompt) if config.directives else NONE
        times = books.count_equal(reading.digest)
        luck = self._outlet.draws = Draws(b"luck %d:%b" % (times, reading.digest))
        self._outlet.generation_id = self._world.new_id(luck)
        if self._world.course is not None:
            self._behave(self._world.course.behaviour(model.id))
        self._pace = Pace.draw(config, luck, latency=self._behaviour.latency if self._behaviour is not None else None)
        refusal = self._admit(chat, model, reading)
        if refusal is None and self._world.course is not None:
            refusal = await self._take_place(self._world.course.slots(model.id), self._context(chat, model, reading))
            if self._reply.is_finished:
                return
        if refusal is None:
            self._fault = self._draw_fault(directives, times)
        error: ErrorReply | None = None
        if self._fault is not None:
            books.inject()
            fault = FAULTS[self._fault]
            error = fault.reply(self._context(chat, model, reading)) if fault.reply is not None else None
            refusal = error if fault.is_refusal else None
        if refusal is not None:
            await self._outlet.sleep_until(self._pace.latency_s)
            await self._refuse(refusal)
            return
        books.process(is_stream=self._is_stream)
        self._outcome = "failed"
        writer = Writer(chat, model, config=config, directives=directives, reading=reading, times=times)
        generation = Generation(
            id=self._outlet.generation_id,
            created=int(self._world.wall()),
            model=model,
            face=self._world.faces[model.id],
            answer=_NO_ANSWER if job.kind == "embeddings" else writer.write(),
            prompt_tokens=reading.tokens,
        )
        extras = find_extras(chat, refusal=directives.refuse, has_metadata=self._wants_metadata())
        await self._generate(generation, error, job=msgspec.structs.replace(job, extras=extras))

    def _wants_metadata(self) -> bool:
        names = ("x-openrouter-metadata", "x-openrouter-experimental-metadata")
        return any((self._request.get(name) or "").lower() == "enabled" for name in names)

    # Before the generation.

    async def _refuse_at_once(self, refusal: ErrorReply) -> None:
        body = self._request.body
        times = self._world.books.count_equal(b"unread" + body[:64])
        self._outlet.generation_id = self._world.new_id(Draws(b"unread %d:%b" % (times, body)))
        await self._refuse(refusal)

    async def _refuse(self, refusal: ErrorReply) -> None:
        self._outcome = "refused"
        self._outlet.status = refusal.status
        self._book()
        await self._outlet.error(self._dressed(refusal))

    def _behave(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self._outlet.wire = behaviour.wire

    def _dressed(self, error: ErrorReply) -> ErrorReply:
        wire = self._outlet.wire
        if wire is None or wire.retry_after == "seconds" or not error.headers:
            return error
        return with_retry_after(error, wire.retry_after, now_s=self._world.wall())

    async def _take_place(self, slots: Slots, context: FaultContext) -> ErrorReply | None:
        """Take a place at the provider, now or later, or be refused. A stream that is left in the queue is ended."""
        capacity = self._behaviour.capacity if self._behaviour is not None else None
        if not slots.take_nowait():
            if capacity is not None and not slots.can_wait():
                refuse = FAULTS[capacity.refusal].reply
                return refuse(context) if refuse is not None else None
            if self._is_stream:
                async with self._reply.open_disconnect_scope() as scope:
                    await slots.wait()
                if scope.cancelled_caught:
                    self._leave_queue()
                    return None
            else:
                await slots.wait()
            self._outlet.begin_again()
        self._slots = slots
        return None

    def _leave_queue(self) -> None:
        self._outcome = "refused"
        self._outlet.status = _CLIENT_CLOSED
        self._book()
        self._reply.abort()

    def _admit(self, chat: ChatRequest, model: SimulatedModel, reading: Reading) -> ErrorReply | None:
        """Refuse what does not fit the model, the account or its limits."""
        is_long = reading.tokens + min(chat.limit or 1, model.max_completion_tokens) > model.context_length
        if is_long and self._kind != "embeddings":
            return context_length(self._context(chat, model, reading))
        refused = self._find_schema_fault(chat, model, reading)
        if refused is not None:
            return refused
        demand = Demand(self._key, model.id, reading.tokens, _max_tokens(chat, model))
        answer = self._world.admission.admit(demand, model=model, context=lambda: self._context(chat, model, reading))
        if isinstance(answer, ErrorReply):
            return answer
        self._ticket = answer
        return None

    def _find_schema_fault(self, chat: ChatRequest, model: SimulatedModel, reading: Reading) -> ErrorReply | None:
        """What the provider with the strictest strict mode says about a schema."""
        form = chat.response_format.json_schema if chat.response_format is not None else None
        if form is None or not form.strict or model.style != "openai":
            return None
        fault = find_strict_fault(_json.decode_any(bytes(form.schema)))
        return schema_refused(self._context(chat, model, reading), name=form.name, fault=fault) if fault else None

    def _context(self, chat: ChatRequest, model: SimulatedModel, reading: Reading) -> FaultContext:
        return FaultContext(
            model=model.id,
            provider=model.provider,
            prompt=reading.prompt,
            prompt_tokens=reading.tokens,
            max_tokens=_max_tokens(chat, model),
            affordable_tokens=self._world.admission.purse.affordable_tokens(model, reading.tokens),
            context_length=model.context_length,
            now_s=self._world.wall(),
            retry_after_s=self._world.config.retry_after_s,
        )

    def _draw_fault(self, directives: Directives, times: int) -> FaultKind | None:
        if directives.fault is not None:
            return directives.fault if directives.fault_times is None or times < directives.fault_times else None
        rates = self._world.config.fault_rates
        if self._behaviour is not None and self._behaviour.fault_rates is not None:
            rates = self._behaviour.fault_rates
        if not rates:
            return None
        drawn = self._outlet.draws.unit()
        for kind, rate in rates.items():
            drawn -= rate
            if drawn < 0:
                return kind
        return None

    # The generation.

    async def _generate(self, generation: Generation, error: ErrorReply | None, *, job: Job) -> None:
        """Send the reply as far as its fault and its client let it, and settle the bill."""
        delivery = Delivery(
            generation,
            self._outlet,
            reply=self._reply,
            pace=self._pace,
            config=self._world.config,
            fault=self._fault,
            job=job,
            before_end=lambda: self._end(generation),
        )
        try:
            is_gone = not await self._deliver(delivery, error)
        except trio.BrokenResourceError:
            if not self._reply.is_disconnected:
                raise
            is_gone = True
        if self._is_booked:
            return
        if is_gone and self._is_stream:
            self._outcome = "cancelled"
            self._settle(generation, self._billed_when_cancelled(generation, delivery.tokens_sent))
        elif self._fault == "stream_cut" and self._is_stream:
            self._settle(generation, delivery.tokens_sent)
        else:
            self._settle(generation, self._billed(generation))

    async def _deliver(self, delivery: Delivery, error: ErrorReply | None) -> bool:
        """Send what there is to send; says whether the client stayed for it."""
        if error is not None:
            await delivery.send_error(self._dressed(error))
        elif self._fault == "hang":
            await delivery.hang()
            return False
        elif self._fault in {"stall", "mid_stream_stall"}:
            await delivery.stall(is_stream=self._is_stream)
            return False
        elif self._fault == "connection_cut":
            await delivery.vanish()
        elif self._is_stream:
            return await delivery.send_stream()
        else:
            await delivery.send_whole()
        return True

    def _end(self, generation: Generation) -> None:
        """Settle and book, just before the last bytes go: who has them all finds them in the books."""
        if self._fault is None:
            self._outcome = "completed"
        self._settle(generation, self._billed(generation))
        self._book()

    # The books.

    def _billed(self, generation: Generation) -> int:
        """The completion tokens to bill for a generation that nobody cancelled."""
        is_charged = self._fault is None or FAULTS[self._fault].is_charged
        return generation.answer.completion_tokens if is_charged else 0

    def _is_charged_for_its_prompt(self) -> bool:
        """Whether it has no completion, and costs all the same."""
        return self._kind == "embeddings" and (self._fault is None or FAULTS[self._fault].is_charged)

    def _billed_when_cancelled(self, generation: Generation, tokens_sent: int) -> int:
        """The completion tokens to bill for a stream that its client left."""
        policy = self._world.config.cancel_billing
        if policy == "generated" or (policy == "provider" and generation.model.stops_billing_when_cancelled):
            return tokens_sent
        return generation.answer.completion_tokens

    def _settle(self, generation: Generation, tokens: int) -> None:
        """Charge an ended generation for *tokens* of completion; without any, it is free."""
        answer = generation.answer
        is_whole = tokens == answer.completion_tokens and self._outcome != "cancelled"
        now_s = trio.current_time()
        self._charge = Charge(
            generation_id=generation.id,
            model=generation.model,
            created=generation.created,
            streamed=self._is_stream,
            cancelled=self._outcome == "cancelled",
            finish_reason=answer.finish_reason if is_whole else None,
            native_finish_reason=generation.native_finish_reason if is_whole else None,
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=tokens,
            reasoning_tokens=min(tokens, answer.reasoning_tokens),
            nanousd=generation.cost_nanousd(tokens) if tokens or self._is_charged_for_its_prompt() else 0,
            latency_s=self._pace.latency_s,
            duration_s=now_s - self._started_at_s,
            ended_at_s=now_s,
            key=self._key,
        )
        self._world.books.ledger.enter(self._charge)

    def _book(self) -> None:
        """Count the request as ended, once."""
        self._is_booked = True
        charge = self._charge
        if self._slots is not None:
            self._slots.release()
        if self._ticket is not None:
            self._world.admission.leave(self._ticket, charge.completion_tokens if charge is not None else 0)
        record = RequestRecord(
            generation_id=self._outlet.generation_id,
            model=self._model.id if self._model is not None else None,
            status=self._outlet.status,
            outcome=self._outcome,
            fault=self._fault,
            streamed=self._is_stream,
            prompt_tokens=charge.prompt_tokens if charge is not None else 0,
            completion_tokens=charge.completion_tokens if charge is not None else 0,
            charged_nanousd=charge.nanousd if charge is not None else 0,
            started_at_s=self._started_at_s,
            duration_s=trio.current_time() - self._started_at_s,
        )
        self._world.books.leave(record)
        if self._world.on_request is not None:
            self._world.on_request(record)


def _max_tokens(chat: ChatRequest, model: SimulatedModel) -> int:
    """The completion tokens that a request may come to cost."""
    return min(chat.limit or _DEFAULT_MAX_TOKENS, model.max_completion_tokens)
