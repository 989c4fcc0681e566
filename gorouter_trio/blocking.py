"""The client for programs with threads: the same names as on trio, as plain functions that block.

::

    import gorouter_trio as gr

    with gr.blocking.open_client(model="openai/gpt-4o-mini") as client:
        reply = client.chat("Reply in one short sentence.", deadline_s=30)

Every method that waits takes `deadline_s`, the seconds that it may take in all, and raises `DeadlineExceededError`
after them. Any number of threads may use one client at a time. Ctrl-C in the main thread cancels what that waits for,
waits until it has cleaned up, and is raised then.
"""

from __future__ import annotations

import contextvars
import inspect
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar, cast, overload

import trio

from ._fronts.common import (
    Bridge,
    BridgedStore,
    Core,
    FrontClient,
    FrontJob,
    SessionName,
    StreamCore,
    checked_config,
    drive,
    holding,
)
from .client import session_key
from .errors import ConfigError
from .runtime_events import RuntimeEvent
from .tools.turn import ApprovalDecision, ApprovalRequest
from .wire.requests import AskKeywords, ChatKeywords, JsonObject
from .wire.result import T_co

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from typing import Literal, Unpack

    from ._bus import EventFeed as RuntimeFeed
    from ._bus import HandlerId
    from ._fronts.common import LotReader, Signal
    from ._fronts.portal import Portal
    from ._turns.output import OutputPolicy
    from ._turns.stream import ChatStream as RuntimeStream
    from .batch.estimate import JobEstimate
    from .batch.runner import Batch as RuntimeBatch
    from .batch.runner import BatchRequest, BatchResult, BatchStatistics
    from .batch.settings import BatchJob
    from .client import Client as RuntimeClient
    from .config import ClientConfig, ContextPolicy, ToolLimits
    from .errors import GorouterError
    from .events import StreamEvent, ToolFinished, ToolStarted
    from .pool.prices import PricesRefreshed
    from .secret import Secret
    from .session.actor import SessionStatistics
    from .session.directory import SessionRef as RuntimeSession
    from .tools.context import ToolContext
    from .tools.registry import AnyTool
    from .wire.catalog import Credits, GenerationInfo, KeyInfo, Model, ModelEndpoint, ModelEndpoints, ProviderInfo
    from .wire.codec import Prompt
    from .wire.embeddings import EmbeddingInput, EmbeddingKeywords, EmbeddingResult
    from .wire.queries import ModelFilters
    from .wire.result import ChatResult, CompletionResult, HistoryEntry
    from .wire.stream import ChatChunk

T = TypeVar("T")
E = TypeVar("E", bound=RuntimeEvent)

__all__ = [
    "Approve",
    "AskTurnKeywords",
    "Batch",
    "ChatStream",
    "Client",
    "EventFeed",
    "RunningJob",
    "SessionRef",
    "Store",
    "TurnKeywords",
    "open_client",
]

_CLEANUP_S = 10.0
_LOOK_S = 0.25

Approve: TypeAlias = Callable[[ApprovalRequest], ApprovalDecision | None]
"""Asked before a sensitive tool runs, in a worker thread; None leaves the question to somebody else."""


class AskTurnKeywords(AskKeywords, total=False):
    """As `gr.AskTurnKeywords`, with an `approve` that is a plain function."""

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]
    tool_limits: ToolLimits
    approve: Approve
    access_token: str | Secret


class TurnKeywords(ChatKeywords, total=False):
    """As `gr.TurnKeywords`, with an `approve` that is a plain function."""

    response_schema: JsonObject
    output: OutputPolicy
    fallbacks: Sequence[str]
    tool_limits: ToolLimits
    approve: Approve
    access_token: str | Secret


# --- threads as a place to wait and to run in -------------------------------------------------------------------------


class _ThreadSignal:
    """A `Signal` for a thread: its async functions block."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # It is set already.
            self._lock.release()

    def pass_on(self) -> None:
        self.set()

    async def wait(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            self._lock.acquire()
            return
        # The system may give a Ctrl-C to another thread, which wakes nobody: its handler runs here, on looking up.
        while not self._lock.acquire(timeout=_LOOK_S):
            pass

    async def wait_patiently(self, is_done: Callable[[], bool], within_s: float) -> None:
        until = time.perf_counter() + within_s
        while not is_done() and (left_s := until - time.perf_counter()) > 0:
            # Ctrl-C once more ends the patience.
            self._lock.acquire(timeout=left_s)


class _ThreadHome:
    """A `Home` in worker threads: functions of the program may block there."""

    def __init__(self, portal: Portal[RuntimeClient]) -> None:
        self.portal = portal
        self.holders: set[tuple[SessionName, object]] = set()
        self.asked: contextvars.ContextVar[SessionName | None] = contextvars.ContextVar("asked")
        # As many as there are calls in need of one: a middleware keeps its thread while the next one wants another.
        self._limiter = trio.CapacityLimiter(float("inf"))

    def signal(self) -> Signal:
        return _ThreadSignal()

    def who(self) -> object:
        return threading.get_ident()

    def around(self, tool: AnyTool) -> Callable[[ToolContext, Callable[[], object]], object]:
        # Async functions are for trio, where they run.
        return self._on_trio if tool.isolation == "task" else self._in_thread

    def _in_thread(self, context: ToolContext, call: Callable[[], object]) -> object:
        with holding(self, self.asked.get(None)):
            return call()

    async def _on_trio(self, context: ToolContext, call: Callable[[], object]) -> object:
        return await cast("Awaitable[object]", call())

    def check(self, function: Callable[..., object]) -> None:
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"{function!r}: must be a plain function here, which runs in a thread, not an async one")

    def offer(self, function: Callable[[], Coroutine[object, object, None]]) -> Callable[[], object]:
        return lambda: drive(function())

    async def run(self, function: Callable[..., object], *args: object, **named: object) -> object:
        call = partial(_called, function, *args, **named)
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)

    @asynccontextmanager
    async def hold(self, function: Callable[..., object], client: object) -> AsyncIterator[None]:
        opened = await self.run(function, client)
        if not isinstance(opened, AbstractContextManager):
            raise ConfigError(f"plugins: {function!r} gave {opened!r}, which is no context manager")
        await self.run(opened.__enter__)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
                await self.run(opened.__exit__, None, None, None)  # noqa: ASYNC102 - as the line above says


def _called(function: Callable[..., object], *args: object, **named: object) -> object:
    try:
        returned = function(*args, **named)
    except BaseException as exc:
        if isinstance(exc, Exception):
            raise
        # As in every thread but the main one: neither the program nor the runtime ends by it.
        raise RuntimeError(f"ended by {type(exc).__name__} in a worker thread") from exc
    if inspect.iscoroutine(returned):
        returned.close()
        raise ConfigError(f"{function!r}: must be a plain function here, which runs in a thread, not an async one")
    return returned


class _ThreadCore(Core):
    """The core for threads, which are all one place."""

    def __init__(self, config: ClientConfig) -> None:
        super().__init__(config)
        self._bridge = Bridge(_ThreadHome(self.portal))

    def place(self) -> Bridge:
        return self._bridge


@contextmanager
def _driven(opened: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An async context manager that blocks where it waits."""
    value = drive(opened.__aenter__())
    try:
        yield value
    except BaseException as exc:
        drive(opened.__aexit__(type(exc), exc, exc.__traceback__))
        raise
    drive(opened.__aexit__(None, None, None))


# --- what programs hold -----------------------------------------------------------------------------------------------


class Store(BridgedStore):
    """A store of the program's own, for `open_client(store=gr.blocking.Store(mine))`: with the methods of
    `abc.HistoryStore` as plain functions, which run in worker threads. The program closes it.
    """


class ChatStream(Generic[T_co]):
    """A streamed answer, open inside `with client.stream(...)`; as `gr.ChatStream`, for one thread at a time.

    A reader that stops stops the server, after some hundred events.
    """

    def __init__(self, core: StreamCore[T_co]) -> None:
        self._core = core

    @property
    def generation_id(self) -> str | None:
        """The API's id of the answer, known from the start: it finds the true cost of a stream that is left early."""
        return self._core.generation_id

    @property
    def text(self) -> Iterator[str]:
        """The text alone, piece by piece, as it arrives."""
        return _Each(self._core.text)

    @property
    def objects(self) -> Iterator[object]:
        """An answer in JSON as it grows; as `gr.ChatStream.objects`."""
        return _Each(self._core.objects)

    @property
    def result(self) -> ChatResult[T_co]:
        """The whole answer; raises `StreamNotFinishedError` before the stream has ended."""
        return self._core.result

    def collect(self) -> ChatResult[T_co]:
        """Read to the end and return the whole answer."""
        return drive(self._core.collect())

    def so_far(self) -> ChatResult[object]:
        """The answer as far as it was read, for who has lost patience with the rest."""
        return self._core.so_far()

    def read_some(self) -> list[StreamEvent]:
        """The next events, all that have arrived together; none at the end. It takes up where iterating stopped."""
        return drive(self._core.read_some())

    def add_chunks(self) -> None:
        """From here on, give a `RawChunk` before the events of each chunk."""
        self._core.add_chunks()

    def run(
        self,
        *,
        on_content: Callable[[str], object] | None = None,
        on_reasoning: Callable[[str], object] | None = None,
        on_chunk: Callable[[ChatChunk], object] | None = None,
        on_event: Callable[[StreamEvent], object] | None = None,
        on_tool_executing: Callable[[ToolStarted], object] | None = None,
        on_tool_result: Callable[[ToolFinished], object] | None = None,
        on_complete: Callable[[ChatResult[T_co]], object] | None = None,
        on_error: Callable[[GorouterError], object] | None = None,
    ) -> ChatResult[T_co]:
        """Read to the end, call what was given for each piece in this thread, and return the whole answer."""
        work = self._core.run(
            on_content=on_content,
            on_reasoning=on_reasoning,
            on_chunk=on_chunk,
            on_event=on_event,
            on_tool_executing=on_tool_executing,
            on_tool_result=on_tool_result,
            on_complete=on_complete,
            on_error=on_error,
        )
        return drive(work)

    def __iter__(self) -> ChatStream[T_co]:
        return self

    def __next__(self) -> StreamEvent:
        return _next(self._core)


class _Each(Generic[T]):
    """An async iterator that blocks where it waits, as a plain one."""

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items

    def __iter__(self) -> _Each[T]:
        return self

    def __next__(self) -> T:
        return _next(self._items)


def _next(items: AsyncIterator[T]) -> T:
    try:
        return drive(cast("Coroutine[object, object, T]", items.__anext__()))
    except StopAsyncIteration:
        raise StopIteration from None


def _take_next(ready: deque[T], lots: LotReader[T]) -> T:
    """The next item of what is ready, or of the next lot; another thread may do the same."""
    while True:
        with suppress(IndexError):
            return ready.popleft()
        lot = drive(lots.read())
        if not (lot or ready):
            raise StopIteration
        ready.extend(lot)


class Batch:
    """A running batch: iterate it for the results, in the order in which they complete; as `gr.Batch`."""

    def __init__(self, core: Core, batch: RuntimeBatch, *, lots: LotReader[BatchResult]) -> None:
        self.name = batch.name
        self._core = core
        self._batch = batch
        self._lots = lots
        self._ready: deque[BatchResult] = deque()

    def __repr__(self) -> str:
        return repr(self._batch)

    def statistics(self) -> BatchStatistics:
        """A snapshot; cheap."""
        return self._core.now(self._batch.statistics)

    def cancel(self) -> None:
        """Take no more requests and cancel those that run; what had ended is still delivered. Never waits."""
        self._core.portal.tell(self._batch.cancel)

    def __iter__(self) -> Batch:
        return self

    def __next__(self) -> BatchResult:
        return _take_next(self._ready, self._lots)


class RunningJob(FrontJob):
    """A job that is open: `run` it once."""

    def run(self, *, deadline_s: float | None = None) -> None:
        """Run every row that has no answer yet; as `batch.job.RunningJob.run`. Cancelled, the job can go on later."""
        drive(self._core.call(self._job.run, deadline_s=deadline_s, is_paid=True))

    def look_ahead(self, *, sample: int = 1_000, deadline_s: float | None = None) -> JobEstimate:
        """What the job will come to by its first rows; before it is run."""
        return drive(self._core.call(partial(self._job.look_ahead, sample=sample), deadline_s=deadline_s))


class EventFeed(Generic[E]):
    """Events as an iterator, inside `with client.events(...) as feed`; as `gr.EventFeed`."""

    def __init__(self, feed: RuntimeFeed[E], lots: LotReader[E]) -> None:
        self._feed = feed
        self._lots = lots
        self._ready: deque[E] = deque()

    @property
    def dropped(self) -> int:
        """How many events were dropped, oldest first, because they were not taken in time."""
        return self._feed.dropped

    def __iter__(self) -> EventFeed[E]:
        return self

    def __next__(self) -> E:
        return _take_next(self._ready, self._lots)


class Client(FrontClient):
    """A client for threads. Made by `open_client`; its methods may be called from any number of them.

    They do and raise what those of `gr.Client` do. `deadline_s` is how long a call may take in all, after which it
    raises `DeadlineExceededError`; what else is said of cancelling there holds for Ctrl-C here.
    """

    @overload
    def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        system: str | None = None,
        session: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    def chat(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        session: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        system: str | None = None,
        session: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Ask once and return the whole answer; as `gr.Client.chat`."""
        core = self._core
        name = None if session is None else SessionName(session).asked_with(options)
        given = core.given(options, response_type)
        work = partial(core.client.chat, prompt, system=system, session=session, **given)
        return drive(core.call(work, deadline_s=deadline_s, is_paid=True, session=name))

    @overload
    def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        user: str | None = None,
        group: str | None = None,
        system: str | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[AskTurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    def ask(
        self,
        prompt: Prompt,
        *,
        user: str | None = None,
        group: str | None = None,
        system: str | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[AskTurnKeywords],
    ) -> ChatResult: ...

    def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        user: str | None = None,
        group: str | None = None,
        system: str | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[AskTurnKeywords],
    ) -> ChatResult[object]:
        """Ask for a user, in the session that belongs to them; as `gr.Client.ask`."""
        core = self._core
        name = SessionName(session_key(user, group=group)).asked_with(options) if user else None
        given = core.given(options, response_type)
        work = partial(core.client.ask, prompt, user=user, group=group, system=system, turn_id=turn_id, **given)
        return drive(core.call(work, deadline_s=deadline_s, is_paid=True, session=name))

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        system: str | None = None,
        session: str | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream[T]]: ...

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        session: str | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream]: ...

    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        system: str | None = None,
        session: str | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream[object]]:
        """Ask once with the answer streamed; as `gr.Client.stream`.

        `deadline_s` is for all of it, from now to the last event.
        """
        given = self._core.given(options, response_type)
        client = self._core.client
        opening = partial(client.stream, prompt, system=system, session=session, raw_chunks=raw_chunks, **given)
        name = None if session is None else SessionName(session).asked_with(options)
        return _stream(self._core, opening, deadline_s=deadline_s, session=name)

    def session(
        self,
        key: str,
        *,
        system: str | None = None,
        context: ContextPolicy | None = None,
        owner: tuple[str, str] | None = None,
        **options: Unpack[TurnKeywords],
    ) -> SessionRef:
        """The session with this key; as `gr.Client.session`."""
        core = self._core
        context = core.place().context(context)
        given = core.given(options)
        make = partial(core.client.session, key, system=system, context=context, owner=owner, **given)
        return SessionRef(core, core.now(make), name=SessionName(key, owner).asked_with(options))

    def passivate(self, key: str, *, deadline_s: float | None = None) -> None:
        """Let the session with this key give its memory back; as `gr.Client.passivate`."""
        work = partial(self._core.client.passivate, key)
        drive(self._core.call(work, deadline_s=deadline_s, session=SessionName(key)))

    @contextmanager
    def batch(
        self,
        requests: Iterable[BatchRequest],
        *,
        max_in_flight: int = 256,
        ambiguous_retries: int = 0,
        ordered: bool = False,
        dedup: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> Iterator[Batch]:
        """Run many requests; as `gr.Client.batch`. The input is iterated in worker threads, by one at a time.

        `deadline_s` is for all of them together.
        """
        core = self._core
        open_batch = partial(
            core.client.batch,
            max_in_flight=max_in_flight,
            ambiguous_retries=ambiguous_retries,
            ordered=ordered,
            dedup=dedup,
            **core.given(options),
        )
        with _driven(core.batch(requests, open_batch, deadline_s=deadline_s)) as (batch, lots):
            yield Batch(core, batch, lots=lots)

    @contextmanager
    def batch_job(
        self, job: BatchJob, *, ambiguous_retries: int = 0, **options: Unpack[TurnKeywords]
    ) -> Iterator[RunningJob]:
        """A job whose rows come from a file and go into one; as `gr.Client.batch_job`."""
        core = self._core
        opening = partial(core.client.batch_job, job, ambiguous_retries=ambiguous_retries, **core.given(options))
        with _driven(core.job(opening)) as running:
            yield RunningJob(core, running)

    def estimate_job(
        self,
        job: BatchJob,
        *,
        sample: int = 1_000,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> JobEstimate:
        """What a job will come to; as `gr.Client.estimate_job`."""
        work = partial(self._core.client.estimate_job, job, sample=sample, **self._core.given(options))
        return drive(self._core.call(work, deadline_s=deadline_s))

    def models(
        self,
        *,
        offset: int = 0,
        limit: int | None = None,
        deadline_s: float | None = None,
        **filters: Unpack[ModelFilters],
    ) -> list[Model]:
        """The models on offer with their prices; as `gr.Client.models`."""
        work = partial(self._core.client.models, offset=offset, limit=limit, **filters)
        return drive(self._core.call(work, deadline_s=deadline_s))

    def models_user(
        self,
        *,
        offset: int = 0,
        limit: int | None = None,
        deadline_s: float | None = None,
        **filters: Unpack[ModelFilters],
    ) -> list[Model]:
        """Those that the account's own settings admit; as `gr.Client.models_user`."""
        work = partial(self._core.client.models_user, offset=offset, limit=limit, **filters)
        return drive(self._core.call(work, deadline_s=deadline_s))

    def embedding_models(
        self, *, offset: int = 0, limit: int | None = None, deadline_s: float | None = None
    ) -> list[Model]:
        """The models that `embeddings` takes."""
        work = partial(self._core.client.embedding_models, offset=offset, limit=limit)
        return drive(self._core.call(work, deadline_s=deadline_s))

    def model_count(self, *, deadline_s: float | None = None, **filters: Unpack[ModelFilters]) -> int:
        """How many models there are; as `gr.Client.model_count`."""
        return drive(self._core.call(partial(self._core.client.model_count, **filters), deadline_s=deadline_s))

    def model(self, model: str, *, deadline_s: float | None = None) -> Model:
        """One model by its id; raises `NotFoundError` when there is none."""
        return drive(self._core.call(partial(self._core.client.model, model), deadline_s=deadline_s))

    def model_endpoints(self, model: str, *, deadline_s: float | None = None) -> ModelEndpoints:
        """Who offers a model: prices, limits, uptime, speed."""
        return drive(self._core.call(partial(self._core.client.model_endpoints, model), deadline_s=deadline_s))

    def zdr_endpoints(self, *, deadline_s: float | None = None) -> list[ModelEndpoint]:
        """The endpoints that keep no data of requests."""
        return drive(self._core.call(self._core.client.zdr_endpoints, deadline_s=deadline_s))

    def providers(self, *, deadline_s: float | None = None) -> list[ProviderInfo]:
        """All providers behind the API."""
        return drive(self._core.call(self._core.client.providers, deadline_s=deadline_s))

    def key(self, *, deadline_s: float | None = None) -> KeyInfo:
        """Limits and usage of the key in use; None for a limit is none."""
        return drive(self._core.call(self._core.client.key, deadline_s=deadline_s))

    def credits(self, *, deadline_s: float | None = None) -> Credits:
        """Credits bought and used."""
        return drive(self._core.call(self._core.client.credits, deadline_s=deadline_s))

    def generation(self, generation_id: str, *, polls: int = 10, deadline_s: float | None = None) -> GenerationInfo:
        """What the API remembers of a generation; as `gr.Client.generation`."""
        work = partial(self._core.client.generation, generation_id, polls=polls)
        return drive(self._core.call(work, deadline_s=deadline_s))

    def embeddings(
        self,
        inputs: EmbeddingInput,
        *,
        model: str,
        access_token: str | Secret | None = None,
        deadline_s: float | None = None,
        **options: Unpack[EmbeddingKeywords],
    ) -> EmbeddingResult:
        """Vectors for a text, texts or tokens, in their order; as `gr.Client.embeddings`."""
        work = partial(self._core.client.embeddings, inputs, model=model, access_token=access_token, **options)
        return drive(self._core.call(work, deadline_s=deadline_s, is_paid=True))

    def completions(
        self,
        prompt: str,
        *,
        access_token: str | Secret | None = None,
        deadline_s: float | None = None,
        **options: Unpack[ChatKeywords],
    ) -> CompletionResult:
        """What follows a prompt, by the endpoint from before chats; as `gr.Client.completions`."""
        work = partial(self._core.client.completions, prompt, access_token=access_token, **options)
        return drive(self._core.call(work, deadline_s=deadline_s, is_paid=True))

    def register(self, plugin: object, *, deadline_s: float | None = None) -> str:
        """Begin a plugin, and return its name; as `gr.Client.register`.

        Its `init` gets a client like this one. It runs in a worker thread, and so does what it registers.
        """
        return drive(self._core.register(plugin, Client, deadline_s=deadline_s))

    def unregister(self, name: str, *, deadline_s: float | None = None) -> bool:
        """End the plugin with this name; False when there is none.

        Raises what it raises while it ends, and `TimeoutError` for one that did not end in ten seconds.
        """
        return drive(self._core.call(partial(self._core.client.unregister, name), deadline_s=deadline_s))

    def on(self, kind: type[E], handler: Callable[[E], object], *, queue: int = 256) -> HandlerId:
        """Call `handler` in a worker thread with every event of `kind` from now on; as `gr.Client.on`."""
        core = self._core
        bridged = core.place().function(handler)
        return core.now(partial(core.client.on, kind, bridged, queue=queue))

    @contextmanager
    def events(self, *kinds: type[E], queue: int = 1024) -> Iterator[EventFeed[E]]:
        """Events as an iterator: `with client.events(gr.ChatFailed) as feed: for event in feed: ...`."""
        with self._core.events(partial(self._core.client.events, *kinds, queue=queue)) as (feed, lots):
            yield EventFeed(feed, lots)

    def refresh_prices(self, *, deadline_s: float | None = None) -> PricesRefreshed:
        """Fetch the list of prices now; as `gr.Client.refresh_prices`."""
        return drive(self._core.call(self._core.client.refresh_prices, deadline_s=deadline_s))


class SessionRef:
    """A session by its key, for threads; as `gr.SessionRef`. Cheap, safe to keep and pass on."""

    __slots__ = ("_core", "_name", "_ref", "key")

    def __init__(self, core: Core, ref: RuntimeSession, *, name: SessionName) -> None:
        self._core = core
        self._ref = ref
        self._name = name
        self.key = ref.key

    def __repr__(self) -> str:
        return repr(self._ref)

    @overload
    def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    def ask(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    def ask(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Take one turn and return its answer, which is stored by then; as `gr.SessionRef.ask`."""
        given = self._core.given(options, response_type)
        work = partial(self._ref.ask, prompt, turn_id=turn_id, resume=resume, **given)
        return self._call(work, deadline_s, options=options, is_paid=True)

    @overload
    def retry(
        self,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    def retry(
        self, *, turn_id: str | None = None, deadline_s: float | None = None, **options: Unpack[TurnKeywords]
    ) -> ChatResult: ...

    def retry(
        self,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Take the last turn of the history again; as `gr.SessionRef.retry`."""
        given = self._core.given(options, response_type)
        return self._call(partial(self._ref.retry, turn_id=turn_id, **given), deadline_s, options=options, is_paid=True)

    @overload
    def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Ask something else in place of the past turn `edited` and all after it; as `gr.SessionRef.edit`."""
        given = self._core.given(options, response_type)
        work = partial(self._ref.edit, edited, prompt, turn_id=turn_id, **given)
        return self._call(work, deadline_s, options=options, is_paid=True)

    def undo(self, turn_id: str | None = None, *, deadline_s: float | None = None) -> bool:
        """Leave the last turn out of the history, or the one of this id and all after it; as `gr.SessionRef.undo`."""
        return self._call(partial(self._ref.undo, turn_id), deadline_s)

    def answer(self, question_id: str, answer: object, *, deadline_s: float | None = None) -> bool:
        """Reply to a question that a turn waits for, ahead of queued turns; as `gr.SessionRef.answer`."""
        return drive(self._core.call(partial(self._ref.answer, question_id, answer), deadline_s=deadline_s))

    def compact(self, *, deadline_s: float | None = None) -> None:
        """Write the log anew, without what is not sent any more; as `gr.SessionRef.compact`."""
        self._call(self._ref.compact, deadline_s)

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream[T]]: ...

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream]: ...

    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        raw_chunks: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AbstractContextManager[ChatStream[object]]:
        """Take one turn with the answer streamed; it is stored when the `with` is left.

        As `gr.SessionRef.stream`. The thread that has it open cannot ask the session anything else: `SessionBusyError`.
        """
        given = self._core.given(options, response_type)
        opening = partial(self._ref.stream, prompt, turn_id=turn_id, resume=resume, raw_chunks=raw_chunks, **given)
        return _stream(self._core, opening, deadline_s=deadline_s, session=self._name.asked_with(options))

    def interrupt(self, *, deadline_s: float | None = None) -> bool:
        """Stop the running turn, ahead of queued ones; what had arrived is stored. False when none runs."""
        return drive(self._core.call(self._ref.interrupt, deadline_s=deadline_s))

    def history(self, *, deadline_s: float | None = None) -> list[HistoryEntry]:
        """The messages of the answered turns, in order, after the turns queued before."""
        return self._call(self._ref.history, deadline_s)

    def clear(self, *, deadline_s: float | None = None) -> None:
        """Empty the history, after the turns queued before; as `gr.SessionRef.clear`."""
        self._call(self._ref.clear, deadline_s)

    def fork(self, key: str, *, deadline_s: float | None = None, **options: Unpack[TurnKeywords]) -> SessionRef:
        """A new session with a copy of this history; as `gr.SessionRef.fork`."""
        work = partial(self._ref.fork, key, **self._core.given(options))
        ref = self._call(work, deadline_s)
        return SessionRef(self._core, ref, name=self._name._replace(key=key).asked_with(options))

    def statistics(self, *, deadline_s: float | None = None) -> SessionStatistics:
        """A snapshot; a session that is not active is idle with nothing known of it."""
        return drive(self._core.call(self._ref.statistics, deadline_s=deadline_s))

    def close(self, *, deadline_s: float | None = None) -> None:
        """End the actor: a running turn is interrupted, queued ones get `ActorGoneError`. The history stays."""
        drive(self._core.call(self._ref.aclose, deadline_s=deadline_s))

    def _call(
        self,
        work: Callable[[], Awaitable[T]],
        deadline_s: float | None,
        *,
        options: Mapping[str, object] | None = None,
        is_paid: bool = False,
    ) -> T:
        """A call that waits for the turns before it."""
        name = self._name if options is None else self._name.asked_with(options)
        return drive(self._core.call(work, deadline_s=deadline_s, is_paid=is_paid, session=name))


@contextmanager
def _stream(
    core: Core,
    opening: Callable[[], AbstractAsyncContextManager[RuntimeStream[T]]],
    *,
    deadline_s: float | None,
    session: SessionName | None,
) -> Iterator[ChatStream[T]]:
    with _driven(core.stream(opening, deadline_s=deadline_s, session=session)) as (stream, lots):
        yield ChatStream(StreamCore(stream, lots, now=core.now))


@contextmanager
def open_client(config: ClientConfig | None = None, /, **fields: object) -> Iterator[Client]:
    """A running client for threads: `with open_client(model="openai/gpt-4o-mini") as client: ...`.

    Takes and raises what `gr.open_client` does. Leaving closes the client and ends its thread. A store with a life of
    its own, such as `gr.stores.SqliteStore`, is opened and closed with the client, in its thread; give one with
    plain functions as a `Store`. Functions among the settings run in worker threads: the one for the API key,
    plugins, and what makes summaries.
    """
    core = _ThreadCore(checked_config(config, fields))
    del config, fields  # A traceback may show locals, and these may hold a key.
    drive(core.open(Client))
    try:
        yield Client(core)
    except BaseException:
        drive(core.close())
        raise
    drive(core.close())
