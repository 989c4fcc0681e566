"""The client for asyncio programs: the same names as on trio, over a runtime in a thread of its own.

::

    import gorouter_trio as gr

    async with gr.aio.open_client(model="openai/gpt-4o-mini") as client:
        reply = await client.chat("Reply in one short sentence.", deadline_s=30)

Every method that waits takes `deadline_s`, the seconds that it may take in all, and raises
`DeadlineExceededError` after them. Cancelling (`task.cancel`, `asyncio.timeout`, `asyncio.wait_for`) cancels what runs
in the runtime at once, and waits until that has cleaned up.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections import deque
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar, cast, overload

import outcome
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
    holding,
)
from .client import session_key
from .errors import ConfigError
from .runtime_events import RuntimeEvent
from .wire.result import T_co

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterable,
        AsyncIterator,
        Awaitable,
        Callable,
        Coroutine,
        Iterable,
        Iterator,
        Mapping,
    )
    from typing import Literal, Unpack

    from ._bus import EventFeed as RuntimeFeed
    from ._bus import Handler, HandlerId
    from ._fronts.common import LotReader, Signal
    from ._fronts.portal import Portal
    from ._turns.request import AskTurnKeywords, TurnKeywords
    from ._turns.stream import ChatStream as RuntimeStream
    from .batch.estimate import JobEstimate
    from .batch.runner import Batch as RuntimeBatch
    from .batch.runner import BatchRequest, BatchResult, BatchStatistics
    from .batch.settings import BatchJob
    from .client import Client as RuntimeClient
    from .config import ClientConfig, ContextPolicy
    from .pool.prices import PricesRefreshed
    from .secret import Secret
    from .session.actor import SessionStatistics
    from .session.directory import SessionRef as RuntimeSession
    from .tools.context import ToolContext
    from .tools.registry import AnyTool
    from .wire.catalog import (
        Credits,
        GenerationInfo,
        KeyInfo,
        Model,
        ModelEndpoint,
        ModelEndpoints,
        ProviderInfo,
    )
    from .wire.codec import Prompt
    from .wire.embeddings import EmbeddingInput, EmbeddingKeywords, EmbeddingResult
    from .wire.queries import ModelFilters
    from .wire.requests import ChatKeywords
    from .wire.result import ChatResult, CompletionResult, HistoryEntry

T = TypeVar("T")
E = TypeVar("E", bound=RuntimeEvent)

__all__ = ["Batch", "ChatStream", "Client", "EventFeed", "RunningJob", "SessionRef", "Store", "open_client"]

_CLEANUP_S = 2.0
_LOOK_S = 0.5


# --- the loop as a place to wait and to run at ------------------------------------------------------------------------


class _Outbox:
    """What the runtime wants done on a loop; many things cost one wake-up."""

    def __init__(self, portal: Portal[RuntimeClient], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._portal = portal
        self._queue: deque[Callable[[], object]] = deque()
        self._is_woken = False
        # Not that of whoever wakes it.
        self._context = contextvars.Context()

    def post(self, function: Callable[[], object]) -> bool:
        """Have a function called on the loop, from the thread of the runtime; False when the loop is closed."""
        if self.loop.is_closed():
            return False
        self._queue.append(function)
        if not self._is_woken:
            self._is_woken = True
            self._portal.tell_soon(self._wake)
        return True

    def _wake(self) -> None:
        with suppress(RuntimeError):  # The loop was closed meanwhile.
            self.loop.call_soon_threadsafe(self._deliver, context=self._context)

    def _deliver(self) -> None:
        # Lowered before the queue is emptied: what comes after that wakes again.
        self._is_woken = False
        queue = self._queue
        try:
            while queue:
                queue.popleft()()
        finally:
            if queue:
                self._is_woken = True
                self._wake()


class _LoopSignal:
    """A `Signal` for a coroutine of the loop."""

    __slots__ = ("_futures", "_is_set", "_outbox")

    def __init__(self, outbox: _Outbox) -> None:
        self._outbox = outbox
        self._futures: list[asyncio.Future[None]] = []
        self._is_set = False

    def set(self) -> None:
        self._outbox.post(self.pass_on)

    def pass_on(self) -> None:
        self._is_set = True
        futures, self._futures = self._futures, []
        for future in futures:
            if not future.done():
                future.set_result(None)

    async def wait(self) -> None:
        if not self._is_set:
            future = self._outbox.loop.create_future()
            self._futures.append(future)
            await future
        self._is_set = False

    async def wait_patiently(self, is_done: Callable[[], bool], within_s: float) -> None:
        loop = self._outbox.loop
        until = loop.time() + within_s
        timer = loop.call_at(until, self.pass_on)
        interrupt: asyncio.CancelledError | None = None
        while not is_done() and loop.time() < until:
            try:
                await self.wait()
            except asyncio.CancelledError as exc:  # noqa: ASYNC103 - raised in the end, once there is nothing to lose
                interrupt = exc
        timer.cancel()
        if interrupt is not None:
            raise interrupt


class _Errand:
    """A function of the program on its way to the loop and back."""

    def __init__(self, home: _LoopHome, function: Callable[[], object]) -> None:
        self._home = home
        self._function = function
        self._context = contextvars.copy_context()
        self._future: asyncio.Future[object] | None = None
        self._is_cancelled = False
        self.ended = trio.Event()
        self.captured: outcome.Outcome[object] | None = None

    def begin(self) -> None:
        """Call the function, on the loop."""
        if self._is_cancelled:
            self._end(outcome.Error(RuntimeError("cancelled before it began")))
            return
        captured = self._context.run(outcome.capture, self._function)
        if isinstance(captured, outcome.Value) and inspect.isawaitable(captured.value):
            # A coroutine as it is: cancelled before it has begun, nobody would have awaited it.
            work = captured.value if inspect.iscoroutine(captured.value) else _awaited(captured.value)
            self._future = self._home.outbox.loop.create_task(work, context=self._context)
            self._future.add_done_callback(self._note_done)
            return
        self._end(captured)
        if isinstance(captured, outcome.Error) and not isinstance(captured.error, Exception):
            # Ctrl-C and the like are for the program.
            raise captured.error

    def cancel(self) -> None:
        """Cancel what the function has begun, on the loop."""
        self._is_cancelled = True
        if self._future is not None:
            self._future.cancel()

    def _note_done(self, future: asyncio.Future[object]) -> None:
        error = asyncio.CancelledError() if future.cancelled() else future.exception()
        self._end(outcome.Value(future.result()) if error is None else outcome.Error(error))

    def _end(self, captured: outcome.Outcome[object]) -> None:
        if isinstance(captured, outcome.Error) and not isinstance(captured.error, Exception):
            # The runtime goes on when the program does not.
            captured = outcome.Error(RuntimeError(f"ended by {type(captured.error).__name__} on the asyncio loop"))
        self.captured = captured
        self._home.portal.tell(self.ended.set)


async def _awaited(value: Awaitable[object]) -> object:
    return await value


class _LoopHome:
    """A `Home` on one loop: async functions of the program run there."""

    def __init__(self, portal: Portal[RuntimeClient], loop: asyncio.AbstractEventLoop) -> None:
        self.portal = portal
        self.holders: set[tuple[SessionName, object]] = set()
        self.asked: contextvars.ContextVar[SessionName | None] = contextvars.ContextVar("asked")
        self.outbox = _Outbox(portal, loop)

    def signal(self) -> Signal:
        return _LoopSignal(self.outbox)

    def who(self) -> object:
        return asyncio.current_task()

    def check(self, function: Callable[..., object]) -> None:
        pass

    def around(self, tool: AnyTool) -> Callable[[ToolContext, Callable[[], object]], object]:
        return self._on_loop if tool.isolation == "task" else self._in_thread

    async def _on_loop(self, context: ToolContext, call: Callable[[], object]) -> object:
        async def run() -> object:
            with holding(self, self.asked.get(None)):
                return await cast("Awaitable[object]", call())

        return await self.run(run)

    def _in_thread(self, context: ToolContext, call: Callable[[], object]) -> object:
        return call()

    def offer(self, function: Callable[[], Coroutine[object, object, None]]) -> Callable[[], object]:
        return function

    async def run(self, function: Callable[..., object], *args: object, **named: object) -> object:
        errand = _Errand(self, partial(function, *args, **named))
        if not self.outbox.post(errand.begin):
            raise RuntimeError("the asyncio loop of the program is closed")
        try:
            await self._wait_ended(errand)
        except trio.Cancelled:
            self.outbox.post(errand.cancel)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
                await errand.ended.wait()  # noqa: ASYNC102 - as the line above says
            raise
        return cast("outcome.Outcome[object]", errand.captured).unwrap()

    async def _wait_ended(self, errand: _Errand) -> None:
        while not errand.ended.is_set():
            with trio.move_on_after(_LOOK_S):
                await errand.ended.wait()
            if errand.captured is None and self.outbox.loop.is_closed():
                # What it had to do yet is never done, and nobody is told.
                raise RuntimeError("the asyncio loop of the program is closed")

    @asynccontextmanager
    async def hold(self, function: Callable[..., object], client: object) -> AsyncIterator[None]:
        begun, stop = trio.Event(), asyncio.Event()

        async def live() -> None:
            opened = function(client)
            if not isinstance(opened, AbstractAsyncContextManager):
                raise ConfigError(f"plugins: {function!r} gave {opened!r}, which is no async context manager")
            async with opened:
                self.portal.tell(begun.set)
                await stop.wait()

        async def run() -> outcome.Outcome[object]:
            captured = await outcome.acapture(self.run, live)
            begun.set()
            return captured

        ended: list[outcome.Outcome[object]] = []
        async with trio.open_nursery() as nursery:

            async def keep() -> None:
                ended.append(await run())

            nursery.start_soon(keep)
            await begun.wait()
            if not ended:
                yield
            self.outbox.post(stop.set)
        ended[0].unwrap()


class _LoopCore(Core):
    """The core for asyncio: each loop that calls is a place of its own."""

    def __init__(self, config: ClientConfig) -> None:
        super().__init__(config)
        self._bridges: dict[asyncio.AbstractEventLoop, Bridge] = {}

    def place(self) -> Bridge:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigError("this client is for asyncio: call it where a loop runs") from None
        bridge = self._bridges.get(loop)
        if bridge is None:
            for closed in [other for other in self._bridges if other.is_closed()]:
                self._bridges.pop(closed, None)
            bridge = self._bridges[loop] = Bridge(_LoopHome(self.portal, loop))
        return bridge


# --- what programs hold -----------------------------------------------------------------------------------------------


class Store(BridgedStore):
    """A store of the program's own, for `open_client(store=gr.aio.Store(mine))`: with the methods of
    `abc.HistoryStore`, which run on the loop that opens the client. The program closes it.
    """


class ChatStream(StreamCore[T_co]):
    """A streamed answer, open inside `async with client.stream(...)`; as `gr.ChatStream`.

    Handlers of `run` are called on the loop. A reader that stops stops the server, after some hundred events.
    """


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

    def __aiter__(self) -> Batch:
        return self

    async def __anext__(self) -> BatchResult:
        while not self._ready:
            lot = await self._lots.read()
            if not lot and not self._ready:
                raise StopAsyncIteration
            self._ready.extend(lot)
        return self._ready.popleft()


class RunningJob(FrontJob):
    """A job that is open: `run` it once."""

    async def run(self, *, deadline_s: float | None = None) -> None:
        """Run every row that has no answer yet; as `batch.job.RunningJob.run`. Cancelled, the job can go on later."""
        await self._core.call(self._job.run, deadline_s=deadline_s, is_paid=True)

    async def look_ahead(self, *, sample: int = 1_000, deadline_s: float | None = None) -> JobEstimate:
        """What the job will come to by its first rows; before it is run."""
        return await self._core.call(partial(self._job.look_ahead, sample=sample), deadline_s=deadline_s)


class EventFeed(Generic[E]):
    """Events as an async iterator, inside `with client.events(...) as feed`; as `gr.EventFeed`."""

    def __init__(self, feed: RuntimeFeed[E], lots: LotReader[E]) -> None:
        self._feed = feed
        self._lots = lots
        self._ready: deque[E] = deque()

    @property
    def dropped(self) -> int:
        """How many events were dropped, oldest first, because they were not taken in time."""
        return self._feed.dropped

    def __aiter__(self) -> EventFeed[E]:
        return self

    async def __anext__(self) -> E:
        while not self._ready:
            lot = await self._lots.read()
            if not lot:
                raise StopAsyncIteration
            self._ready.extend(lot)
        return self._ready.popleft()


class Client(FrontClient):
    """A client for asyncio. Made by `open_client`; its methods may be called from any number of tasks and loops.

    They do and raise what those of `gr.Client` do. `deadline_s` is how long a call may take in all, after which it
    raises `DeadlineExceededError`; what else is said of cancelling there holds for cancelling the task here. What does
    not wait there waits here for the next step of the runtime, some dozen microseconds.
    """

    @overload
    async def chat(
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
    async def chat(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        session: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    async def chat(
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
        return await core.call(work, deadline_s=deadline_s, is_paid=True, session=name)

    @overload
    async def ask(
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
    async def ask(
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

    async def ask(
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
        return await core.call(work, deadline_s=deadline_s, is_paid=True, session=name)

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
    ) -> AbstractAsyncContextManager[ChatStream[T]]: ...

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
    ) -> AbstractAsyncContextManager[ChatStream]: ...

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
    ) -> AbstractAsyncContextManager[ChatStream[object]]:
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
        """The session with this key; as `gr.Client.session`. Its tools run on this loop."""
        core = self._core
        context = core.place().context(context)
        given = core.given(options)
        make = partial(core.client.session, key, system=system, context=context, owner=owner, **given)
        return SessionRef(core, core.now(make), name=SessionName(key, owner).asked_with(options))

    async def passivate(self, key: str, *, deadline_s: float | None = None) -> None:
        """Let the session with this key give its memory back; as `gr.Client.passivate`."""
        work = partial(self._core.client.passivate, key)
        await self._core.call(work, deadline_s=deadline_s, session=SessionName(key))

    @asynccontextmanager
    async def batch(
        self,
        requests: Iterable[BatchRequest] | AsyncIterable[BatchRequest],
        *,
        max_in_flight: int = 256,
        ambiguous_retries: int = 0,
        ordered: bool = False,
        dedup: bool = False,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> AsyncIterator[Batch]:
        """Run many requests; as `gr.Client.batch`. The input is iterated on this loop.

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
        async with core.batch(requests, open_batch, deadline_s=deadline_s) as (batch, lots):
            yield Batch(core, batch, lots=lots)

    @asynccontextmanager
    async def batch_job(
        self, job: BatchJob, *, ambiguous_retries: int = 0, **options: Unpack[TurnKeywords]
    ) -> AsyncIterator[RunningJob]:
        """A job whose rows come from a file and go into one; as `gr.Client.batch_job`."""
        core = self._core
        opening = partial(core.client.batch_job, job, ambiguous_retries=ambiguous_retries, **core.given(options))
        async with core.job(opening) as running:
            yield RunningJob(core, running)

    async def estimate_job(
        self,
        job: BatchJob,
        *,
        sample: int = 1_000,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> JobEstimate:
        """What a job will come to; as `gr.Client.estimate_job`."""
        work = partial(self._core.client.estimate_job, job, sample=sample, **self._core.given(options))
        return await self._core.call(work, deadline_s=deadline_s)

    async def models(
        self,
        *,
        offset: int = 0,
        limit: int | None = None,
        deadline_s: float | None = None,
        **filters: Unpack[ModelFilters],
    ) -> list[Model]:
        """The models on offer with their prices; as `gr.Client.models`."""
        work = partial(self._core.client.models, offset=offset, limit=limit, **filters)
        return await self._core.call(work, deadline_s=deadline_s)

    async def models_user(
        self,
        *,
        offset: int = 0,
        limit: int | None = None,
        deadline_s: float | None = None,
        **filters: Unpack[ModelFilters],
    ) -> list[Model]:
        """Those that the account's own settings admit; as `gr.Client.models_user`."""
        work = partial(self._core.client.models_user, offset=offset, limit=limit, **filters)
        return await self._core.call(work, deadline_s=deadline_s)

    async def embedding_models(
        self, *, offset: int = 0, limit: int | None = None, deadline_s: float | None = None
    ) -> list[Model]:
        """The models that `embeddings` takes."""
        work = partial(self._core.client.embedding_models, offset=offset, limit=limit)
        return await self._core.call(work, deadline_s=deadline_s)

    async def model_count(self, *, deadline_s: float | None = None, **filters: Unpack[ModelFilters]) -> int:
        """How many models there are; as `gr.Client.model_count`."""
        return await self._core.call(partial(self._core.client.model_count, **filters), deadline_s=deadline_s)

    async def model(self, model: str, *, deadline_s: float | None = None) -> Model:
        """One model by its id; raises `NotFoundError` when there is none."""
        return await self._core.call(partial(self._core.client.model, model), deadline_s=deadline_s)

    async def model_endpoints(self, model: str, *, deadline_s: float | None = None) -> ModelEndpoints:
        """Who offers a model: prices, limits, uptime, speed."""
        return await self._core.call(partial(self._core.client.model_endpoints, model), deadline_s=deadline_s)

    async def zdr_endpoints(self, *, deadline_s: float | None = None) -> list[ModelEndpoint]:
        """The endpoints that keep no data of requests."""
        return await self._core.call(self._core.client.zdr_endpoints, deadline_s=deadline_s)

    async def providers(self, *, deadline_s: float | None = None) -> list[ProviderInfo]:
        """All providers behind the API."""
        return await self._core.call(self._core.client.providers, deadline_s=deadline_s)

    async def key(self, *, deadline_s: float | None = None) -> KeyInfo:
        """Limits and usage of the key in use; None for a limit is none."""
        return await self._core.call(self._core.client.key, deadline_s=deadline_s)

    async def credits(self, *, deadline_s: float | None = None) -> Credits:
        """Credits bought and used."""
        return await self._core.call(self._core.client.credits, deadline_s=deadline_s)

    async def generation(
        self, generation_id: str, *, polls: int = 10, deadline_s: float | None = None
    ) -> GenerationInfo:
        """What the API remembers of a generation; as `gr.Client.generation`."""
        work = partial(self._core.client.generation, generation_id, polls=polls)
        return await self._core.call(work, deadline_s=deadline_s)

    async def embeddings(
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
        return await self._core.call(work, deadline_s=deadline_s, is_paid=True)

    async def completions(
        self,
        prompt: str,
        *,
        access_token: str | Secret | None = None,
        deadline_s: float | None = None,
        **options: Unpack[ChatKeywords],
    ) -> CompletionResult:
        """What follows a prompt, by the endpoint from before chats; as `gr.Client.completions`."""
        work = partial(self._core.client.completions, prompt, access_token=access_token, **options)
        return await self._core.call(work, deadline_s=deadline_s, is_paid=True)

    async def register(self, plugin: object, *, deadline_s: float | None = None) -> str:
        """Begin a plugin, and return its name; as `gr.Client.register`.

        Its `init` gets a client like this one. It runs on this loop, and so does what it registers.
        """
        return await self._core.register(plugin, Client, deadline_s=deadline_s)

    async def unregister(self, name: str, *, deadline_s: float | None = None) -> bool:
        """End the plugin with this name; False when there is none.

        Raises what it raises while it ends, and `TimeoutError` for one that did not end in ten seconds.
        """
        return await self._core.call(partial(self._core.client.unregister, name), deadline_s=deadline_s)

    def on(self, kind: type[E], handler: Handler[E], *, queue: int = 256, in_thread: bool = False) -> HandlerId:
        """Call `handler`, sync or async, on this loop with every event of `kind` from now on; as `gr.Client.on`."""
        core = self._core
        bridged = cast("Handler[E]", handler if in_thread else core.place().function(handler))
        return core.now(partial(core.client.on, kind, bridged, queue=queue, in_thread=in_thread))

    @contextmanager
    def events(self, *kinds: type[E], queue: int = 1024) -> Iterator[EventFeed[E]]:
        """Events as an async iterator: `with client.events(gr.ChatFailed) as feed: async for event in feed: ...`."""
        with self._core.events(partial(self._core.client.events, *kinds, queue=queue)) as (feed, lots):
            yield EventFeed(feed, lots)

    async def refresh_prices(self, *, deadline_s: float | None = None) -> PricesRefreshed:
        """Fetch the list of prices now; as `gr.Client.refresh_prices`."""
        return await self._core.call(self._core.client.refresh_prices, deadline_s=deadline_s)


class SessionRef:
    """A session by its key, for asyncio; as `gr.SessionRef`. Cheap, safe to keep and pass on."""

    __slots__ = ("_core", "_name", "_ref", "key")

    def __init__(self, core: Core, ref: RuntimeSession, *, name: SessionName) -> None:
        self._core = core
        self._ref = ref
        self._name = name
        self.key = ref.key

    def __repr__(self) -> str:
        return repr(self._ref)

    @overload
    async def ask(
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
    async def ask(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    async def ask(
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
        return await self._call(work, deadline_s, options=options, is_paid=True)

    @overload
    async def retry(
        self,
        *,
        response_type: type[T],
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    async def retry(
        self, *, turn_id: str | None = None, deadline_s: float | None = None, **options: Unpack[TurnKeywords]
    ) -> ChatResult: ...

    async def retry(
        self,
        *,
        response_type: type[object] | None = None,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Take the last turn of the history again; as `gr.SessionRef.retry`."""
        given = self._core.given(options, response_type)
        return await self._call(
            partial(self._ref.retry, turn_id=turn_id, **given), deadline_s, options=options, is_paid=True
        )

    @overload
    async def edit(
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
    async def edit(
        self,
        edited: str,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        deadline_s: float | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult: ...

    async def edit(
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
        return await self._call(work, deadline_s, options=options, is_paid=True)

    async def undo(self, turn_id: str | None = None, *, deadline_s: float | None = None) -> bool:
        """Leave the last turn out of the history, or the one of this id and all after it; as `gr.SessionRef.undo`."""
        return await self._call(partial(self._ref.undo, turn_id), deadline_s)

    async def answer(self, question_id: str, answer: object, *, deadline_s: float | None = None) -> bool:
        """Reply to a question that a turn waits for, ahead of queued turns; as `gr.SessionRef.answer`."""
        return await self._core.call(partial(self._ref.answer, question_id, answer), deadline_s=deadline_s)

    async def compact(self, *, deadline_s: float | None = None) -> None:
        """Write the log anew, without what is not sent any more; as `gr.SessionRef.compact`."""
        await self._call(self._ref.compact, deadline_s)

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
    ) -> AbstractAsyncContextManager[ChatStream[T]]: ...

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
    ) -> AbstractAsyncContextManager[ChatStream]: ...

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
    ) -> AbstractAsyncContextManager[ChatStream[object]]:
        """Take one turn with the answer streamed; it is stored when the `async with` is left.

        As `gr.SessionRef.stream`. The task that has it open cannot ask the session anything else: `SessionBusyError`.
        """
        given = self._core.given(options, response_type)
        opening = partial(self._ref.stream, prompt, turn_id=turn_id, resume=resume, raw_chunks=raw_chunks, **given)
        return _stream(self._core, opening, deadline_s=deadline_s, session=self._name.asked_with(options))

    async def interrupt(self, *, deadline_s: float | None = None) -> bool:
        """Stop the running turn, ahead of queued ones; what had arrived is stored. False when none runs."""
        return await self._core.call(self._ref.interrupt, deadline_s=deadline_s)

    async def history(self, *, deadline_s: float | None = None) -> list[HistoryEntry]:
        """The messages of the answered turns, in order, after the turns queued before."""
        return await self._call(self._ref.history, deadline_s)

    async def clear(self, *, deadline_s: float | None = None) -> None:
        """Empty the history, after the turns queued before; as `gr.SessionRef.clear`."""
        await self._call(self._ref.clear, deadline_s)

    async def fork(self, key: str, *, deadline_s: float | None = None, **options: Unpack[TurnKeywords]) -> SessionRef:
        """A new session with a copy of this history; as `gr.SessionRef.fork`."""
        work = partial(self._ref.fork, key, **self._core.given(options))
        ref = await self._call(work, deadline_s)
        return SessionRef(self._core, ref, name=self._name._replace(key=key).asked_with(options))

    async def statistics(self, *, deadline_s: float | None = None) -> SessionStatistics:
        """A snapshot; a session that is not active is idle with nothing known of it."""
        return await self._core.call(self._ref.statistics, deadline_s=deadline_s)

    async def aclose(self, *, deadline_s: float | None = None) -> None:
        """End the actor: a running turn is interrupted, queued ones get `ActorGoneError`. The history stays."""
        await self._core.call(self._ref.aclose, deadline_s=deadline_s)

    async def _call(
        self,
        work: Callable[[], Awaitable[T]],
        deadline_s: float | None,
        *,
        options: Mapping[str, object] | None = None,
        is_paid: bool = False,
    ) -> T:
        """A call that waits for the turns before it."""
        name = self._name if options is None else self._name.asked_with(options)
        return await self._core.call(work, deadline_s=deadline_s, is_paid=is_paid, session=name)


@asynccontextmanager
async def _stream(
    core: Core,
    opening: Callable[[], AbstractAsyncContextManager[RuntimeStream[T]]],
    *,
    deadline_s: float | None,
    session: SessionName | None,
) -> AsyncIterator[ChatStream[T]]:
    async with core.stream(opening, deadline_s=deadline_s, session=session) as (stream, lots):
        yield ChatStream(stream, lots, now=core.now)


@asynccontextmanager
async def open_client(config: ClientConfig | None = None, /, **fields: object) -> AsyncIterator[Client]:
    """A running client for asyncio: `async with open_client(model="openai/gpt-4o-mini") as client: ...`.

    Takes and raises what `gr.open_client` does. Leaving closes the client and ends its thread, also when it is
    cancelled meanwhile. A store with a life of its own, such as `gr.stores.SqliteStore`, is opened and closed with the
    client, in its thread; give a store that is made for asyncio as a `Store`. Functions among the settings run on this
    loop: the one for the API key, plugins, and what makes summaries.
    """
    core = _LoopCore(checked_config(config, fields))
    del config, fields  # A traceback may show locals, and these may hold a key.
    await core.open(Client)
    try:
        yield Client(core)
    except BaseException:
        await core.close()  # noqa: ASYNC102 - bounded, and not to be interrupted
        raise
    await core.close()
