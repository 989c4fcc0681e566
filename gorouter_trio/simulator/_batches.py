"""The Batch API: requests that are taken in one go, worked on in their time, and fetched when they are done.

Nothing runs in between: what has become of a batch follows from the clock when somebody asks. Its requests are done one
after the other over `SimulatorConfig.batch_s`; those that are not done after `batch_window_s` expire, and cost nothing.
Answers cost half. Directives in prompts steer them, as in live requests; a fault that is no status of its own is an
error of the request.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final, Literal, final

import msgspec
import trio
from msgspec import Raw, Struct

from . import _json, forms
from ._draws import Draws
from .directives import NONE, read_directives
from .faults import FAULTS, ErrorReply, FaultContext, bad_request, plain
from .forms import Generation
from .ledger import Charge
from .model import Writer
from .requests import ChatRequest, parse_chat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ._exchange import World
    from .catalog import SimulatedModel

__all__ = ["BatchDesk"]

_ENDPOINT: Final = "/v1/chat/completions"
_MOST_REQUESTS: Final = 5_000
_MOST_BYTES: Final = 200_000_000
_MOST_BATCHES: Final = 10_000
_MOST_LISTED: Final = 100
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Ordered(Struct):
    custom_id: str
    body: Raw


class _Submission(Struct):
    endpoint: str
    requests: list[_Ordered]
    model: str | None = None
    completion_window: str = "24h"


_decode_submission: Final = _json.decoder(_Submission)
_decode_fields: Final = _json.decoder(dict[str, Raw])


class _Batch:
    """One batch; `results` are there once it has ended."""

    def __init__(self, submission: _Submission, *, batch_id: str, model: SimulatedModel, key: str) -> None:
        self.id = batch_id
        self.model = model
        self.key = key
        self.requests: Sequence[_Ordered] = submission.requests
        self.total = len(submission.requests)
        self.at_s = trio.current_time()
        self.created_at = 0
        self.expires_at = 0
        self.failed = 0
        self.results: list[dict[str, object]] | None = None
        self.status: Literal["validating", "in_progress", "completed", "expired"] = "validating"


@final
class BatchDesk:
    """The batches of one account; the oldest are forgotten beyond 10,000."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._batches: OrderedDict[str, _Batch] = OrderedDict()
        self._submitted = 0

    def submit(self, body: bytes, key: str) -> bytes | ErrorReply:
        """Take a batch in, and say what it is called."""
        submission = self._read(body)
        if isinstance(submission, ErrorReply):
            return submission
        model = self._world.models.get(submission.model or "")
        if model is None:
            return bad_request(f"{submission.model} is not a valid model ID")
        wall = self._world.wall()
        batch = _Batch(
            submission,
            batch_id=f"batch_{Draws(b'batch %d:%b' % (self._submitted, body[:4096])).alnum(24)}",
            model=model,
            key=key,
        )
        self._submitted += 1
        batch.created_at = int(wall)
        batch.expires_at = int(wall + self._world.config.batch_window_s)
        self._batches[batch.id] = batch
        if len(self._batches) > _MOST_BATCHES:
            self._batches.popitem(last=False)
        return self._shown(batch, with_results=True)

    def find(self, batch_id: str) -> bytes | ErrorReply:
        """A batch as it stands, with its results when it has ended."""
        batch = self._batches.get(batch_id)
        if batch is None:
            return plain(404, f"Batch {batch_id} not found")
        self._advance(batch)
        return self._shown(batch, with_results=True)

    def list(self, *, limit: int, after: str | None) -> bytes:
        """Batches without results, newest first, those older than `after`."""
        batches = list(reversed(self._batches.values()))
        names = [batch.id for batch in batches]
        start = names.index(after) + 1 if after in names else 0
        page = batches[start : start + max(1, min(limit, _MOST_LISTED))]
        for batch in page:
            self._advance(batch)
        shown = [Raw(self._shown(batch, with_results=False)) for batch in page]
        return _json.encode({"object": "list", "data": shown, "has_more": start + len(page) < len(batches)})

    def delete(self, batch_id: str) -> bytes | ErrorReply:
        """Forget a batch that has ended."""
        batch = self._batches.get(batch_id)
        if batch is None:
            return plain(404, f"Batch {batch_id} not found")
        self._advance(batch)
        if batch.results is None:
            return plain(409, f"Batch {batch_id} is {batch.status}")
        del self._batches[batch_id]
        return _json.encode({"id": batch_id, "object": "batch", "deleted": True})

    def _read(self, body: bytes) -> _Submission | ErrorReply:
        """The batch in a body, or what is wrong with it. The field `requests` has to come last."""
        if len(body) > _MOST_BYTES:
            return ErrorReply(413, plain(413, "Request body too large").body)
        try:
            submission = _decode_submission(body)
            is_last = list(_decode_fields(body))[-1] == "requests"
        except _MALFORMED as exc:
            return bad_request(f"Invalid request: {exc}", error_type="invalid_request")
        fault = None if is_last else "requests must be the last field"
        names = {request.custom_id for request in submission.requests}
        if submission.endpoint != _ENDPOINT:
            fault = f"endpoint {submission.endpoint} is not simulated"
        elif not 1 <= len(submission.requests) <= _MOST_REQUESTS:
            fault = f"requests must have 1 to {_MOST_REQUESTS} items"
        elif len(names) < len(submission.requests):
            fault = "custom_id must be unique"
        return submission if fault is None else bad_request(f"Invalid request: {fault}", error_type="invalid_request")

    # What becomes of a batch.

    def _done_s(self, batch: _Batch) -> float:
        config = self._world.config
        return batch.at_s + min(config.batch_s, config.batch_window_s)

    def _advance(self, batch: _Batch) -> None:
        """Bring a batch to where it is by now."""
        if batch.results is not None:
            return
        batch.status = "in_progress"
        if trio.current_time() < self._done_s(batch):
            return
        in_time = self._finished(batch)
        batch.results = [
            self._answer(batch, request) if number < in_time else self._expired(batch, request)
            for number, request in enumerate(batch.requests)
        ]
        batch.status = "completed" if in_time == batch.total else "expired"
        batch.requests = ()

    def _finished(self, batch: _Batch) -> int:
        """How many of its requests are done by now."""
        config = self._world.config
        elapsed_s = min(trio.current_time() - batch.at_s, config.batch_window_s)
        share = 1.0 if config.batch_s <= elapsed_s else elapsed_s / config.batch_s
        return int(batch.total * share)

    def _expired(self, batch: _Batch, request: _Ordered) -> dict[str, object]:
        batch.failed += 1
        error = {"code": "batch_expired", "message": "This request could not be executed before the batch expired."}
        return {
            "id": f"{batch.id}:{request.custom_id}",
            "custom_id": request.custom_id,
            "response": None,
            "error": error,
        }

    def _answer(self, batch: _Batch, request: _Ordered) -> dict[str, object]:
        status, body = self._generate(batch, bytes(request.body))
        batch.failed += status != 200
        response = {"status_code": status, "request_id": f"req-{batch.id}", "body": Raw(body)}
        shown = {"id": f"{batch.id}:{request.custom_id}", "custom_id": request.custom_id, "response": response}
        return {**shown, "error": None}

    def _generate(self, batch: _Batch, body: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer to one request, which is charged when it has one."""
        chat = parse_chat(body)
        if isinstance(chat, ErrorReply):
            return chat.status, chat.body
        config, model = self._world.config, batch.model
        reading = chat.read(config.seed, model.id)
        directives = read_directives(reading.prompt) if config.directives else NONE
        times = self._world.books.count_equal(reading.digest)
        fault = FAULTS[directives.fault] if directives.fault is not None else None
        if fault is not None:
            reply = fault.reply(self._context(chat, model, reading.prompt)) if fault.reply is not None else None
            reply = reply or plain(502, "Provider returned error")
            return reply.status, reply.body
        writer = Writer(chat, model, config=config, directives=directives, reading=reading, times=times)
        generation = Generation(
            id=self._world.new_id(Draws(b"batch %d:%b" % (times, reading.digest))),
            created=int(self._world.wall()),
            model=_at_half_price(model),
            face=self._world.faces[model.id],
            answer=writer.write(),
            prompt_tokens=reading.tokens,
        )
        self._charge(generation, batch.key)
        return 200, forms.completion(generation)

    def _charge(self, generation: Generation, key: str) -> None:
        answer, now_s = generation.answer, trio.current_time()
        self._world.books.ledger.enter(
            Charge(
                generation_id=generation.id,
                model=generation.model,
                created=generation.created,
                streamed=False,
                cancelled=False,
                finish_reason=answer.finish_reason,
                native_finish_reason=generation.native_finish_reason,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=answer.completion_tokens,
                reasoning_tokens=answer.reasoning_tokens,
                nanousd=generation.cost_nanousd(answer.completion_tokens),
                latency_s=0.0,
                duration_s=0.0,
                ended_at_s=now_s,
                key=key,
            )
        )

    def _context(self, chat: ChatRequest, model: SimulatedModel, prompt: str) -> FaultContext:
        return FaultContext(
            model=model.id,
            provider=model.provider,
            prompt=prompt,
            prompt_tokens=0,
            max_tokens=chat.limit or model.max_completion_tokens,
            affordable_tokens=0,
            context_length=model.context_length,
            now_s=self._world.wall(),
            retry_after_s=self._world.config.retry_after_s,
        )

    def _shown(self, batch: _Batch, *, with_results: bool) -> bytes:
        is_done = batch.results is not None
        finished = batch.total if is_done else self._finished(batch)
        shown: dict[str, object] = {
            "id": batch.id,
            "object": "batch",
            "endpoint": _ENDPOINT,
            "model": batch.model.id,
            "completion_window": "24h",
            "status": batch.status,
            "created_at": batch.created_at,
            "expires_at": batch.expires_at,
            "finalized_at": int(self._world.wall()) if is_done else None,
            "request_counts": {"total": batch.total, "completed": finished - batch.failed, "failed": batch.failed},
            "error": None,
        }
        return _json.encode({**shown, "results": batch.results} if with_results else shown)


def _at_half_price(model: SimulatedModel) -> SimulatedModel:
    return msgspec.structs.replace(
        model,
        prompt_nanousd=model.prompt_nanousd // 2,
        completion_nanousd=model.completion_nanousd // 2,
        request_nanousd=model.request_nanousd // 2,
    )
