"""The client: the public face of a runtime."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, cast, overload

import msgspec

from ._callables import can_take
from ._completion import run_completion
from ._contain import ungrouped
from ._inspect import families, inspect_runtime
from ._prometheus import render
from ._runtime import Runtime, open_runtime
from ._turns.request import TurnExtras, TurnRequest, access_secret
from .batch.cache import AnswerCache, MemoryAnswers
from .batch.runner import open_batch
from .config import DIRECT, ClientConfig, PricePolicy, hide_keys
from .errors import ConfigError
from .secret import Secret
from .session.actor import SessionOptions
from .wire.codec import add_system, encode_embeddings, encode_name, encode_prompt

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from typing import TypeVar, Unpack

    from ._bus import EventFeed, Handler, HandlerId
    from ._feed import Observer
    from ._inspect import ClientSnapshot
    from ._runtime import MetricsSource
    from ._turns.chain import Hook, Middleware
    from ._turns.observing import EndedChat
    from ._turns.request import AskTurnKeywords, TurnKeywords
    from ._turns.stream import ChatStream
    from .abc import HistoryStore
    from .batch.estimate import JobEstimate
    from .batch.job import RunningJob
    from .batch.runner import Batch, BatchRequest
    from .batch.settings import BatchJob
    from .config import ApiKey, ContextPolicy
    from .pool.accounting import Accounting
    from .pool.budget import AccountStatistics, BudgetStatistics
    from .pool.costs import CostSnapshot, CostTracker
    from .pool.ledger import LedgerChange
    from .pool.prices import PricesRefreshed
    from .pool.tracing import Tracer
    from .pool.workers import PoolStatistics
    from .runtime_events import RuntimeEvent
    from .security.rules import ToolGuard
    from .session.actor import SessionStatistics
    from .session.directory import SessionRef
    from .wire.catalog import (
        Credits,
        GenerationInfo,
        KeyInfo,
        Model,
        ModelEndpoint,
        ModelEndpoints,
        Pricing,
        ProviderInfo,
    )
    from .wire.codec import Prompt
    from .wire.embeddings import EmbeddingInput, EmbeddingKeywords, EmbeddingResult
    from .wire.ledger import LedgerRow
    from .wire.mail import CallSettings
    from .wire.queries import ModelFilters
    from .wire.requests import ChatKeywords
    from .wire.result import ChatResult, CompletionResult

    T = TypeVar("T")
    E = TypeVar("E", bound=RuntimeEvent)

__all__ = ["Client", "merged_config", "open_client", "session_key", "without_secrets"]


class Client:
    """Chats, streams, sessions and the service endpoints over one shared pool. Made by `open_client`.

    All methods may be called from any number of tasks of the trio run that opened the client.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._defaults = runtime.defaults
        self._services = runtime.services

    def __repr__(self) -> str:
        return f"<Client {self._runtime.config.base_url} {self._runtime.config.model}>"

    @overload
    async def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        system: str | None = None,
        session: str | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[T]: ...

    @overload
    async def chat(
        self, prompt: Prompt, *, system: str | None = None, session: str | None = None, **options: Unpack[TurnKeywords]
    ) -> ChatResult: ...

    async def chat(
        self,
        prompt: Prompt,
        *,
        response_type: type[object] | None = None,
        system: str | None = None,
        session: str | None = None,
        **options: Unpack[TurnKeywords],
    ) -> ChatResult[object]:
        """Ask once and return the whole answer; nothing is remembered, unless a `session` is named.

        `prompt` is a text, a message, or a sequence of messages. `system` stands in for the client's
        default system message where the prompt has none of its own. With `session`, this is one turn of
        the session with that key, as `client.session(session).ask` takes it.

        With a `response_type` (a Struct, dataclass, TypedDict, pydantic model, `dict` for any JSON object, ...) or
        a `response_schema`, the answer is JSON of that form and `value` what it stands for; an answer of another
        form is asked for again as `output` (an `OutputPolicy`) says, and raises `InvalidOutputError` in the end.
        `fallbacks` are models to ask when the one before has failed for reasons of its own.

        `tools` that are functions (or `Tool`s) are run here when the model calls them, within `tool_limits`, and their
        results sent back until there is an answer; `tool_calls` of the result says what became of each call. A tool
        that is sensitive asks `approve` first. `access_token` says who asks, where the client has `security`.

        Raises `BadRequestError` before anything is sent when the request has no right form, `ApiError`
        for what the API answers, `TransportError` when no answer comes, `PoolError` and `BudgetError` when nothing was
        sent, `SecurityError` for who may not ask. Cancelling stops the request; the API may bill it all the same.
        """
        given = options if response_type is None else {"response_type": response_type, **options}
        if session is not None:
            return await self.session(session, system=system).ask(prompt, **cast("TurnKeywords", given))
        encoded, settings, extras = self._defaults.turn(given)
        request = self._request(encoded, self._messages(prompt, system), settings)
        return await self._runtime.pipeline.run(request, extras)

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
        **options: Unpack[AskTurnKeywords],
    ) -> ChatResult[object]:
        """Ask for a user: one turn of the session that belongs to `user`, within `group` if one is named.

        Without a user this is a plain chat. Different users and groups never share a session: see
        `session_key`. Errors as in `session.ask`; `ConfigError` for a group or a `turn_id` without a user.
        """
        given = cast("TurnKeywords", options if response_type is None else {"response_type": response_type, **options})
        if user:
            ref = self.session(session_key(user, group=group), system=system)
            return await ref.ask(prompt, turn_id=turn_id, **given)
        if group or turn_id is not None:
            raise ConfigError(f"{'group' if group else 'turn_id'}: needs a user, whose session it is about")
        return await self.chat(prompt, system=system, **given)

    @overload
    def stream(
        self,
        prompt: Prompt,
        *,
        response_type: type[T],
        system: str | None = None,
        session: str | None = None,
        raw_chunks: bool = False,
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
        **options: Unpack[TurnKeywords],
    ) -> AbstractAsyncContextManager[ChatStream[object]]:
        """Ask once with the answer streamed: `async with client.stream(...) as stream: ...`; arguments as in `chat`.

        Entering waits for the first data, with retries; nothing is sent twice after that. Leaving
        early closes the connection. `raw_chunks` adds a `RawChunk` before the events of each chunk. The rounds of
        tools are one stream, with events for what is run in between. An answer without the form that was asked for is
        not asked for again, since it was read already. Errors as in `chat`, on entering and while iterating.
        """
        given = options if response_type is None else {"response_type": response_type, **options}
        if session is not None:
            ref = self.session(session, system=system)
            return ref.stream(prompt, raw_chunks=raw_chunks, **cast("TurnKeywords", given))
        encoded, settings, extras = self._defaults.turn(given)
        request = self._request(encoded, self._messages(prompt, system), settings)
        return self._runtime.pipeline.stream(request, extras, raw_chunks=raw_chunks)

    def session(
        self,
        key: str,
        *,
        system: str | None = None,
        context: ContextPolicy | None = None,
        owner: tuple[str, str] | None = None,
        **options: Unpack[TurnKeywords],
    ) -> SessionRef:
        """The session with this key; no I/O. `system` and the options hold for each of its turns.

        Without a `system` it is the client's default; an empty one is none. `context` stands in for the one of
        `SessionConfig`: how much of the history is sent.
        Any Unicode text of 1 byte to 4 KiB is a key, and different keys are different sessions.

        Where the client has `security`, the session is that of the principal of `access_token`, and none of anybody
        else; `owner`, a tenant and the id of a principal, asks for somebody else's, which exists: see
        `SecurityConfig.sessions`.

        Raises `ConfigError` for another key, `SessionConflictError` when the session is open with
        different options.
        """
        keywords = {name: value for name, value in options.items() if name != "access_token"}
        encoded, settings, extras = self._defaults.turn(options)
        token = None
        if extras is not None and extras.token is not None:
            token = extras.token
            extras = msgspec.structs.replace(extras, token=None)
            extras = None if extras == TurnExtras() else extras
        own_system = self._defaults.system_message(system)
        session = SessionOptions(
            own_system, encoded, settings, context, extras, keywords=keywords, base=self._defaults.number
        )
        return self._runtime.sessions.ref(key, session, token=token, owner=owner)

    async def passivate(self, key: str) -> None:
        """Let the session with this key give its memory back, once it has answered what it was asked before.

        Its next message activates it again. Whoever changes a stored history while a client runs passivates the session
        first; `HistoryManager` does. Cancelling stops the waiting alone. Raises `SessionBusyError` for a tool of its
        turn, and for whoever holds a stream of it: those it would wait for.
        """
        await self._runtime.sessions.passivate(key)

    def batch(
        self,
        requests: Iterable[BatchRequest] | AsyncIterable[BatchRequest],
        *,
        max_in_flight: int = 256,
        ordered: bool = False,
        dedup: bool = False,
        ambiguous_retries: int = 0,
        **options: Unpack[TurnKeywords],
    ) -> AbstractAsyncContextManager[Batch]:
        """Run many requests: `async with client.batch(requests) as results: async for result in results: ...`.

        `requests` is any iterable, or async iterable, of `ChatRequest`s or of request bodies in wire
        names, either with a `custom_id` if it likes; it is read only as there is room. At most
        `max_in_flight` run at a time, fewer where the pool has fewer connections. The options hold for
        the requests that do not give them. What may have been billed already is sent again only
        `ambiguous_retries` times, whatever the retry policy says. With `dedup`, equal requests are sent once, as far as
        the last 10,000 answers go; the results of the others are `cached`, and cost nothing.

        The requests are a batch of their own, which `Budget.batch_usd` bounds, and a row of `cost_snapshot().by_batch`
        under its `name`.

        Results come as they complete, or with `ordered` in the order of the requests, and a request that failed has its
        error there: iterating raises only what the input raised. A consumer that stops reading stops the input. Leaving
        early cancels what runs. Raises `ConfigError`, and `TypeError` for what is no iterable of requests;
        `BudgetExceededError` where so many budgets are open that there can be none for this batch.
        """
        defaults, settings, extras = self._defaults.turn({"lane": "batch", **options})
        pipeline = self._runtime.pipeline
        answers = AnswerCache(MemoryAnswers()) if dedup else None
        run = partial(pipeline.run_with_body, extras=extras, ambiguous_retries=ambiguous_retries, answers=answers)
        open_named = partial(
            open_batch,
            requests,
            run=run,
            max_in_flight=max_in_flight,
            ordered=ordered,
            defaults=defaults,
            system=self._defaults.system,
        )
        return _own_batch(open_named, settings, accounting=self._runtime.accounting)

    @property
    def runtime(self) -> Runtime:
        """What the client is the face of; for parts of this package."""
        return self._runtime

    def batch_job(
        self, job: BatchJob, *, ambiguous_retries: int = 0, **options: Unpack[TurnKeywords]
    ) -> AbstractAsyncContextManager[RunningJob]:
        """A job whose rows come from a file and go into one: `async with client.batch_job(job) as running: await
        running.run()`.

        The options hold for the rows that do not give them, as in `batch`: a `response_schema`, `tools`, and so on. The
        journal beside the output makes that a job which was killed goes on where it was: see `BatchJob`. Raises as
        `batch.job.open_job`. Leaving closes the files.
        """
        # Only jobs need a journal and all that.
        from .batch.job import open_job
        from .batch.wiring import job_services

        return open_job(job, job_services(self._runtime, options, ambiguous_retries=ambiguous_retries))

    async def estimate_job(self, job: BatchJob, *, sample: int = 1_000, **options: Unpack[TurnKeywords]) -> JobEstimate:
        """What a job will come to, by `sample` rows of its input and the list of prices; nothing is sent or written.

        Waits for the first list of prices. Raises as `batch_job` for the job's input and settings.
        """
        from .batch.job import estimate_job
        from .batch.wiring import job_services

        services = job_services(self._runtime, options)
        await self._runtime.accounting.price_refresh.schedule.wait_first()
        return await estimate_job(job, services, sample=sample)

    async def models(
        self, *, offset: int = 0, limit: int | None = None, **filters: Unpack[ModelFilters]
    ) -> list[Model]:
        """The models on offer with their prices, as `filters` admit them: all pages, or `limit` from `offset` on.

        Without a limit, an offset or filters the API gives the whole list at once, which is several MB. Raises
        `BadRequestError` before anything is sent for a filter that is of the wrong kind, and as `chat`.
        """
        return await self._services.models("/models", filters, offset=offset, limit=limit)

    async def models_user(
        self, *, offset: int = 0, limit: int | None = None, **filters: Unpack[ModelFilters]
    ) -> list[Model]:
        """Those that the account's own settings admit; the API takes `output_modalities` and `sort`. As `models`."""
        return await self._services.models("/models/user", filters, offset=offset, limit=limit)

    async def embedding_models(self, *, offset: int = 0, limit: int | None = None) -> list[Model]:
        """The models that `embeddings` takes. As `models`."""
        return await self._services.models("/embeddings/models", {}, offset=offset, limit=limit)

    async def model_count(self, **filters: Unpack[ModelFilters]) -> int:
        """How many models there are; the API takes `output_modalities`. As `models`."""
        return await self._services.count_models(filters)

    async def model(self, model: str) -> Model:
        """One model by its id; raises `NotFoundError` when there is none, and as `models`."""
        return await self._services.model(model)

    async def model_endpoints(self, model: str) -> ModelEndpoints:
        """Who offers a model: prices, limits, uptime, speed; raises as `model`."""
        return await self._services.endpoints(model)

    async def zdr_endpoints(self) -> list[ModelEndpoint]:
        """The endpoints that keep no data of requests. Errors as in `models`."""
        return await self._services.zdr_endpoints()

    async def providers(self) -> list[ProviderInfo]:
        """All providers behind the API. Errors as in `models`."""
        return await self._services.providers()

    async def key(self) -> KeyInfo:
        """Limits and usage of the key in use; None for a limit is none. Errors as in `models`."""
        return await self._services.key()

    async def credits(self) -> Credits:
        """Credits bought and used. Errors as in `models`."""
        return await self._services.credits()

    async def generation(self, generation_id: str, *, polls: int = 10) -> GenerationInfo:
        """What the API remembers of a generation: what it cost, also when its reply was lost or left.

        A generation can be looked up some seconds after its end, so one that is not found is asked for again, up to
        `polls` times with growing pauses (about a minute with 10) and no longer than the total deadline. Raises
        `NotFoundError` after that, and as `models`.
        """
        _check_count("polls", polls)
        return await self._services.generation(generation_id, polls=polls)

    async def embeddings(
        self,
        inputs: EmbeddingInput,
        *,
        model: str,
        access_token: str | Secret | None = None,
        **options: Unpack[EmbeddingKeywords],
    ) -> EmbeddingResult:
        """Vectors for a text, texts or tokens, in their order.

        `model` is one of `embedding_models`. `access_token` says who asks, where the client has `security`. Errors as
        in `chat`; cancelling stops the request, which may be billed.
        """
        body, settings = encode_embeddings(inputs, model, keywords=options, beneath=self._defaults.settings)
        await self._check_asker(access_token)
        return await self._services.embed(body, settings)

    async def completions(
        self, prompt: str, *, access_token: str | Secret | None = None, **options: Unpack[ChatKeywords]
    ) -> CompletionResult:
        """What follows a prompt, by the endpoint from before chats; options and errors as in `chat`, without tools.

        Middlewares, hooks and observers see a chat of one message.
        """
        encoded, settings = self._defaults.call(options)
        await self._check_asker(access_token)
        runtime = self._runtime
        return await run_completion(
            prompt,
            encoded,
            settings=settings,
            chain=runtime.chain,
            pipeline=runtime.pipeline,
            send=self._services.complete,
        )

    async def _check_asker(self, access_token: str | Secret | None) -> None:
        token = None if access_token is None else access_secret(access_token)
        await self._runtime.sessions.gate.check(token)

    # What users put around chats, and what they hear of them

    async def register(self, plugin: object) -> str:
        """Begin a plugin, and return its name (its `name`, or that of its class or function).

        A plugin is an object with `init(client)` and, if it likes, `destroy()`, each sync or async, an async context
        manager, or a function of the client that gives one. It is ended with the client, after the sessions and
        before the pool, in reverse order of registration; what it registered is taken back then. Raises
        `ConfigError` for what is no plugin or has the name of another, and what the plugin raises while it begins:
        the client is as it was then.
        """
        return await self._runtime.plugins.register(plugin, _PluginClient(self._runtime))

    async def unregister(self, name: str) -> bool:
        """End the plugin with this name; False when there is none.

        Raises what it raises while it ends, and `TimeoutError` for one that did not end in ten seconds.
        """
        return await self._runtime.plugins.unregister(name)

    def use(self, middleware: Middleware) -> None:
        """Put `middleware`, an async function of (context, state, proceed), around every chat that starts from now on.

        Chats, streams, batch rows and session turns alike; the first one is the outermost. What it raises that is
        no `GorouterError` reaches the caller in an `ExtensionError`.
        """
        self._runtime.chain.use(middleware)

    def unuse(self, middleware: Middleware) -> bool:
        """Take `middleware` out again; False when it was not there."""
        return self._runtime.chain.remove(middleware)

    def add_hook(self, hook: Hook) -> None:
        """Call the functions of `hook` before and after every chat that starts from now on, and on its error."""
        self._runtime.chain.add_hook(hook)

    def remove_hook(self, hook: Hook) -> bool:
        """Take `hook` out again; False when it was not there."""
        return self._runtime.chain.remove_hook(hook)

    def observe(self, observer: Observer[EndedChat]) -> None:
        """Give every chat, stream and session turn that ends from now on to `observer`, a plain function of a list.

        The cheapest way to look: it is called a moment later, with what has ended meanwhile (`EndedChat`s, in order),
        and loses nothing. It must not wait; what it raises is an event, `HookFailed`.
        """
        self._runtime.chain.ended.observe(observer)

    def unobserve(self, observer: Observer[EndedChat]) -> bool:
        """Give `observer` what has ended so far, and then nothing more; False when it was not there."""
        return self._runtime.chain.ended.remove(observer)

    def observe_ledger(self, observer: Observer[LedgerChange]) -> None:
        """Give the rows of the ledger to `observer`, a plain function of a list, a moment after they are entered.

        As `observe`; what it raises is counted in the ledger's statistics and told as `AccountingFailed`.
        """
        self._runtime.accounting.ledger.changes.observe(observer)

    def unobserve_ledger(self, observer: Observer[LedgerChange]) -> bool:
        """Give `observer` what there is, and then nothing more; False when it was not there."""
        return self._runtime.accounting.ledger.changes.remove(observer)

    def on(self, kind: type[E], handler: Handler[E], *, queue: int = 256, in_thread: bool = False) -> HandlerId:
        """Call `handler`, sync or async, with every event of `kind` from now on: one at a time, in order.

        Nobody waits for it: up to `queue` events do, and beyond that the oldest are dropped. What it raises is
        an event, `HandlerFailed`. A plain function runs on the loop and must not block it, unless it is called
        `in_thread`. When the client closes, it gets a moment for what is queued.
        """
        return self._runtime.bus.on(kind, handler, queue=queue, in_thread=in_thread)

    def off(self, handler_id: HandlerId) -> bool:
        """End what `on` began, also in the middle of a call; False when it had ended."""
        return self._runtime.bus.off(handler_id)

    def events(self, *kinds: type[E], queue: int = 1024) -> AbstractContextManager[EventFeed[E]]:
        """Events as an async iterator: `with client.events(gr.ChatFailed) as feed: async for event in feed: ...`.

        Without a kind, all of them. Up to `queue` events wait to be taken; beyond that the oldest are dropped
        and counted.
        """
        return self._runtime.bus.listen(*kinds, queue=queue)

    def add_tracer(self, tracer: Tracer) -> None:
        """Tell `tracer` of each request for a chat and each tool call that begins from now on; see `Tracer`."""
        for method in ("begin_request", "begin_tool"):
            if not can_take(getattr(tracer, method, None), 1):
                raise ConfigError(f"tracer: {tracer!r} has no {method} that takes one argument")
        self._runtime.tracers.add(tracer)

    def remove_tracer(self, tracer: Tracer) -> bool:
        """Tell `tracer` of nothing more; False when it was not there."""
        return self._runtime.tracers.remove(tracer)

    def flush_observers(self) -> None:
        """Give all observers what has ended so far, now."""
        self._runtime.chain.ended.flush()
        self._runtime.accounting.ledger.changes.flush()

    # What it does

    def inspect(self, *, sessions: int = 1_000) -> ClientSnapshot:
        """What everything in the client does now: sessions, what each waits for and since when, pool, workers, tools.

        At most so many `sessions` are listed, those that have waited longest first. One step, without I/O; it takes
        time for each session and worker, and nothing is kept for it while nobody asks.
        """
        _check_count("sessions", sessions)
        return inspect_runtime(self._runtime, sessions=sessions)

    def metrics_text(self) -> str:
        """The numbers of the client in the text format of Prometheus (0.0.4), for whoever scrapes them.

        Those of the pool, the sessions, the tools and the costs, and what plugins add: the metrics plugin its counts
        and histograms. Names begin with `gorouter_`, and a name means one thing: of two families the first one counts.
        """
        self.flush_observers()
        return render(chain(families(self._runtime), self._runtime.extra_metrics()))

    def add_metrics(self, source: MetricsSource) -> None:
        """Ask `source`, a function that gives families, for more of them each time that `metrics_text` is called."""
        if not can_take(source, 0):
            raise ConfigError(f"source: must be a function without arguments, not {source!r}")
        self._runtime.metrics_sources.append(source)

    def remove_metrics(self, source: MetricsSource) -> bool:
        """Ask `source` no more; False when it was not there."""
        sources = self._runtime.metrics_sources
        is_found = source in sources
        if is_found:
            sources.remove(source)
        return is_found

    # What may change while it runs: for what is asked from then on

    @property
    def base_url(self) -> str:
        """Where the API is."""
        return cast("str", self._runtime.config.base_url)

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return self._runtime.config.model

    def set_model(self, model: str) -> None:
        """Ask `model` from now on where a request names none; raises `ConfigError` for what is no name.

        What was asked before goes on with the model that it was asked of. Sessions take the new one with their next
        turn, unless they were opened with one of their own.
        """
        self._runtime.set_model(model)

    def set_api_key(self, api_key: str | Secret | Sequence[str | Secret | ApiKey] | Mapping[str, float]) -> None:
        """Use this key, or these, from now on: any form of `ClientConfig.api_key`, whose errors it raises.

        Requests in flight keep theirs; those that wait in the queue go with the new one. What was learned of the old
        keys, their rates and pauses, goes with them. The key itself is not given back: `statistics().keys` has names.
        """
        try:
            hidden = hide_keys(api_key)
        finally:
            # A traceback may show locals, and this is one of them.
            del api_key
        self._runtime.set_api_key(hidden)

    @property
    def store(self) -> HistoryStore:
        """The store of the histories in use."""
        return self._runtime.store

    def set_store(self, store: HistoryStore) -> None:
        """Keep the histories of sessions there from now on; raises `ConfigError` for what is no store.

        What sessions were asked before ends in the old store, which stays its maker's to close; each session goes on
        with what the new one has of it.
        """
        self._runtime.set_store(store)

    def push_store(self, store: HistoryStore) -> Callable[[], None]:
        """As `set_store`, until what is returned is called: then this store is taken away, wherever it stands.

        The one that was there before comes back, unless others have come in front, which stay.
        """
        return self._runtime.push_store(store)

    @property
    def security(self) -> ToolGuard:
        """What stands in front of tools and turns: as it was given, or made of the `SecurityConfig` that was given."""
        return self._runtime.guards.guard

    def set_security(self, security: object | None) -> None:
        """Let this guard stand in front of tools and turns from now on, as `ClientConfig.security`.

        None is the guard of a client without `security`: the rules that tools declare hold all the same. A turn that
        runs keeps the guard that it began with. Raises `ConfigError` for what is no guard; the one before stays then.
        """
        self._runtime.guards.set(security)

    def push_security(self, security: object) -> Callable[[], None]:
        """As `set_security`, until what is returned is called: then this guard is taken away, wherever it stands.

        The one that was there before comes back, unless others have come in front, which stay. None is no guard here.
        """
        return self._runtime.guards.push(security)

    @property
    def cost_tracker(self) -> CostTracker:
        """What counts the rows of the ledger."""
        return self._runtime.accounting.ledger.tracker

    def set_cost_tracker(self, tracker: CostTracker) -> None:
        """Let `tracker` count the rows of the ledger from now on; what the one before has counted stays there.

        Raises `ConfigError` for what is no tracker.
        """
        for method, count in (("add", 1), ("snapshot", 0)):
            if not can_take(getattr(tracker, method, None), count):
                raise ConfigError(f"tracker: needs add(row, replaced=...) and snapshot(), {tracker!r} has no {method}")
        self._runtime.accounting.ledger.tracker = tracker

    # What it costs

    def cost_snapshot(self) -> CostSnapshot:
        """What everything cost so far: in all, by model, tenant, session and batch. Cheap."""
        return self._runtime.accounting.cost_snapshot()

    def ledger_rows(self) -> list[LedgerRow]:
        """The last rows of the ledger, oldest first; see `LedgerConfig` for how many are kept."""
        return self._runtime.accounting.ledger.rows()

    def budget(self) -> BudgetStatistics:
        """What is left to spend, and what is set aside for requests in flight."""
        return self._runtime.accounting.gate.book.statistics()

    def budgets(self, *, most: int = 100) -> list[AccountStatistics]:
        """The budgets with a limit: at most so many, the one with the smallest part of it left first.

        Those of tenants, sessions and batches are there from their first request on. Takes time for each of them.
        """
        _check_count("most", most)
        return self._runtime.accounting.gate.book.tightest(most)

    def price(self, model: str) -> Pricing | None:
        """The prices of a model from the list in use, USD for a unit; None when they are not known. No I/O."""
        return self._runtime.accounting.prices.table.price(model)

    def set_prices(self, own: Mapping[str, Pricing | Mapping[str, object]]) -> None:
        """Take these prices in place of those that were given before; as `PricePolicy.own`, whose errors it raises."""
        self._runtime.accounting.prices.set_own(PricePolicy(own=own).own_prices())

    async def refresh_prices(self) -> PricesRefreshed:
        """Fetch the list of prices now.

        Raises as `models`, and `DecodeError` when the list is no good: the last good one stays.
        """
        return await self._runtime.accounting.price_refresh.refresh()

    def start_price_refresh(self, interval_s: float = 21_600.0) -> None:
        """Refresh prices now and then every `interval_s` seconds, in place of the interval before."""
        _check_interval("interval_s", interval_s)
        self._runtime.accounting.price_refresh.schedule.start(interval_s)

    def stop_price_refresh(self) -> None:
        """Refresh prices no more, until started again; the last ones stay."""
        self._runtime.accounting.price_refresh.schedule.stop()

    def statistics(self) -> PoolStatistics:
        """A snapshot of the pool; cheap."""
        return self._runtime.pool.statistics()

    def session_statistics(self) -> dict[str, SessionStatistics]:
        """A snapshot of each active session, by its full key, the one that was used the longest time ago first."""
        return self._runtime.sessions.inspect()

    @property
    def active_sessions(self) -> int:
        """How many sessions are active: have an actor."""
        return self._runtime.sessions.active

    def _request(self, options: bytes, messages: bytes, settings: CallSettings) -> TurnRequest:
        return TurnRequest(options, (messages,), settings=settings)

    def _messages(self, prompt: Prompt, system: str | None) -> bytes:
        """The encoded messages of a chat, with a system message in front where there is one to add."""
        messages = encode_prompt(prompt)
        if system is None and not self._defaults.system:
            return messages
        return add_system(self._defaults.system_message(system), messages)


class _PluginClient(Client):
    """The client as a plugin gets it: the same, but what is registered through it goes when the plugin does."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._undo: list[Callable[[], object]] = []

    def use(self, middleware: Middleware) -> None:
        """As `Client.use`."""
        super().use(middleware)
        self._undo.append(partial(self.unuse, middleware))

    def add_hook(self, hook: Hook) -> None:
        """As `Client.add_hook`."""
        super().add_hook(hook)
        self._undo.append(partial(self.remove_hook, hook))

    def observe(self, observer: Observer[EndedChat]) -> None:
        """As `Client.observe`."""
        super().observe(observer)
        self._undo.append(partial(self.unobserve, observer))

    def add_tracer(self, tracer: Tracer) -> None:
        """As `Client.add_tracer`."""
        super().add_tracer(tracer)
        self._undo.append(partial(self.remove_tracer, tracer))

    def add_metrics(self, source: MetricsSource) -> None:
        """As `Client.add_metrics`."""
        super().add_metrics(source)
        self._undo.append(partial(self.remove_metrics, source))

    def observe_ledger(self, observer: Observer[LedgerChange]) -> None:
        """As `Client.observe_ledger`."""
        super().observe_ledger(observer)
        self._undo.append(partial(self.unobserve_ledger, observer))

    def on(self, kind: type[E], handler: Handler[E], *, queue: int = 256, in_thread: bool = False) -> HandlerId:
        """As `Client.on`."""
        handler_id = super().on(kind, handler, queue=queue, in_thread=in_thread)
        self._undo.append(partial(self.off, handler_id))
        return handler_id

    def push_security(self, security: object) -> Callable[[], None]:
        """As `Client.push_security`; the guard goes with the plugin at the latest."""
        pop = super().push_security(security)
        self._undo.append(pop)
        return pop

    def push_store(self, store: HistoryStore) -> Callable[[], None]:
        """As `Client.push_store`; the store goes with the plugin at the latest."""
        pop = super().push_store(store)
        self._undo.append(pop)
        return pop

    def undo(self) -> None:
        """Take back everything that was registered through this client."""
        while self._undo:
            self._undo.pop()()


@asynccontextmanager
async def _own_batch(
    open_named: Callable[..., AbstractAsyncContextManager[Batch]], settings: CallSettings, *, accounting: Accounting
) -> AsyncIterator[Batch]:
    """A batch whose requests are entered under a name of their own."""
    with accounting.local_batch() as name:
        async with open_named(settings=msgspec.structs.replace(settings, batch=name)) as results:
            yield results


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name}: must be a whole number of at least 0, not {value!r}")


def _check_interval(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ConfigError(f"{name}: must be a number of seconds, more than zero and finite, not {value!r}")


def session_key(user: str, *, group: str | None = None) -> str:
    """The key of the session that belongs to `user`, within `group` if there is one.

    `user:<user>` or `group:<group>/user:<user>`, with `%`, `/` and `:` inside a name percent-encoded, so that
    different names never make the same key. Raises `ConfigError` for a name that is no text.
    """
    encode_name("user:", user)
    if not group:
        return f"user:{_quoted(user)}"
    encode_name("group:", group)
    return f"group:{_quoted(group)}/user:{_quoted(user)}"


def _quoted(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F").replace(":", "%3A")


@asynccontextmanager
async def open_client(config: ClientConfig | None = None, /, **fields: object) -> AsyncIterator[Client]:
    """A running client: `async with open_client(model="openai/gpt-4o-mini") as client: ...`.

    Takes a `ClientConfig`, or its fields by name, or both, the names winning. Raises `ConfigError`
    before anything is opened. Leaving interrupts running turns, saves what they have, and closes
    every connection. An error of the body leaves as itself, not in an exception group.
    """
    fields = without_secrets(fields)
    resolved = merged_config(config, fields).resolved()
    async with ungrouped(_open_runtime_and_plugins(resolved)) as client:
        yield client


def without_secrets(fields: dict[str, object]) -> dict[str, object]:
    """The fields with a `Secret` for each secret string: a traceback of what is wrong with others may show locals."""
    secret = {name: fields[name] for name in ("api_key", "proxy") if isinstance(fields.get(name), str)}
    return fields | {name: Secret(str(value)) for name, value in secret.items() if value != DIRECT}


@asynccontextmanager
async def _open_runtime_and_plugins(config: ClientConfig) -> AsyncIterator[Client]:
    async with open_runtime(config) as runtime:
        client = Client(runtime)
        for plugin in config.plugins:
            await client.register(plugin)
        yield client


def merged_config(config: ClientConfig | None, fields: dict[str, object]) -> ClientConfig:
    unknown = sorted(set(fields) - set(ClientConfig.__struct_fields__))
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such setting; see ClientConfig")
    return msgspec.structs.replace(config or ClientConfig(), **fields)
