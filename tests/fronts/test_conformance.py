"""The same scenarios on trio, asyncio and threads give the same answers, events, errors and histories."""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fronted import KINDS, OWN_THREAD, Front, _Face, run_scenario, simulator_in_thread

import gorouter_trio as gr
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig
from gorouter_trio.security.rules import ToolRules

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with simulator_in_thread() as url:
        yield url


Same = Callable[[Callable[[Front], Awaitable[Any]]], Any]


@pytest.fixture
def same(base_url: str) -> Same:
    """Runs a scenario on each front; they must come to the same, which is returned, and leave no thread behind."""

    def run(scenario: Callable[[Front], Awaitable[Any]]) -> Any:
        found = {kind: run_scenario(kind, scenario, base_url) for kind in KINDS}
        assert found["aio"] == found["trio"]
        assert found["blocking"] == found["trio"]
        assert not [thread.name for thread in threading.enumerate() if thread.name in OWN_THREAD]
        return found["trio"]

    return run


def shown(result: gr.ChatResult[Any]) -> tuple[object, ...]:
    """What is the same each time."""
    return (result.text, result.model, result.finish_reason, result.cost, result.value, result.message)


def failed(exc: BaseException) -> tuple[object, ...]:
    return (type(exc), str(exc))


async def refused(work: Callable[[], Awaitable[object]]) -> tuple[object, ...]:
    """What a call that fails raises."""
    try:
        await work()
    except gr.GorouterError as exc:
        return failed(exc)
    raise AssertionError("it did not fail")


def test_chats(same: Same) -> None:
    """Answers, typed answers, sessions and users by name, and what is refused, here or there."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            typed = await client.chat('[[say {"a": 1}]]', response_type=dict)
            return [
                shown(await client.chat("Hello", system="Be kind.")),
                shown(typed),
                shown(await client.chat("[[say one]]", session="s")),
                shown(await client.ask("[[say two]]", user="u", group="g")),
                [entry.message for entry in await client.session("group:g/user:u").history()],
                await refused(lambda: client.chat("x", model="nobody/none")),
                await refused(lambda: client.chat("x", temperature="warm")),
                await refused(lambda: client.chat("[[fault 403_moderation]]")),
                await refused(lambda: client.ask("x", group="g")),
                await refused(lambda: client.session("").ask("x")),
            ]

    results = same(scenario)
    assert results[1][4] == {"a": 1}
    assert results[5][0] is gr.NotFoundError or results[5][0] is gr.BadRequestError
    assert results[6][0] is gr.BadRequestError
    assert results[7][0] is gr.ModerationError


def test_streams(same: Same) -> None:
    """Events, text, objects, callbacks and the result of a stream, and what there is of it before its end."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            async with client.stream("[[tokens 40]]", raw_chunks=True) as stream:
                first = await anext(aiter(stream))
                early = await _result_of(stream)
                kinds = {type(event) for event in [first, *[e async for e in stream]]}
                whole = shown(stream.result)
                again = [e async for e in stream]
            async with client.stream("[[say a b c]]") as stream:
                texts = "".join([text async for text in stream.text])
            async with client.stream('[[say {"a": [1, 2]}]]') as stream:
                objects = [value async for value in stream.objects][-1]
            async with client.stream("[[say x]]") as stream:
                collected = shown(await stream.collect())
                some = await stream.read_some()
            return [
                type(first),
                early,
                kinds,
                whole,
                again,
                texts,
                objects,
                collected,
                some,
                await _callbacks(front, client),
            ]

    results = same(scenario)
    assert results[0] is gr.RawChunk
    assert results[1] is gr.StreamNotFinishedError
    assert {gr.TextDelta, gr.StreamFinished, gr.RawChunk} <= results[2]
    assert results[4] == []
    assert results[5] == "a b c"
    assert results[6] == {"a": [1, 2]}
    assert results[8] == []


async def _result_of(stream: Any) -> object:
    try:
        return shown(stream.result)
    except gr.StreamNotFinishedError as exc:
        return type(exc)


async def _callbacks(front: Front, client: Any) -> list[object]:
    seen: list[object] = []

    def note(kind: str) -> Callable[..., Any]:
        async def call(value: object) -> None:
            seen.append((kind, value if isinstance(value, str) else type(value)))

        return front.function(call)

    async with client.stream("[[say one two]]") as stream:
        await stream.run(
            on_content=note("content"), on_chunk=note("chunk"), on_complete=note("complete"), on_event=note("event")
        )
    try:
        async with client.stream("[[fault stream_error]]") as stream:
            await stream.run(on_error=note("error"))
    except gr.GorouterError as exc:
        seen.append(failed(exc))
    return seen


def test_sessions(same: Same) -> None:
    """Turns, repeated, retried, edited, undone, forked, compacted, cleared; an early end is stored as such."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            session = client.session("s", system="Be brief.")
            one = await session.ask("[[say one]]", turn_id="t1")
            repeated = await session.ask("[[say else]]", turn_id="t1")
            await session.ask("[[say two]]", turn_id="t2")
            retried = await session.retry(turn_id="t3")
            edited = await session.edit("t1", "[[say edited]]", turn_id="t4")
            fork = await session.fork("s2", temperature=0.5)
            undone = await session.undo()
            async with session.stream("[[tokens 300]]", turn_id="t5") as stream:
                await anext(aiter(stream))
                busy = await refused(session.history)
            statistics = await session.statistics()
            await session.compact()
            facts = [
                shown(one), shown(repeated), shown(retried), shown(edited), undone, busy[0],
                [entry.message for entry in await fork.history()],
                len(await session.history()),
                statistics.state,
                await session.interrupt(),
                await session.answer("nothing", True),
                await refused(lambda: session.fork("s2")),
                await refused(lambda: session.edit("gone", "x")),
                _conflict(client),
                session.key, repr(session),
            ]  # fmt: skip
            await session.clear()
            facts.append(await session.history())
            await session.aclose()
            await client.passivate("s")
            return facts

    results = same(scenario)
    assert results[0] == results[1]
    assert results[5] is gr.SessionBusyError
    assert results[-1] == []


ADA, BOB = ({"access_token": f"key-of-{name}-0123456789"} for name in ("ada", "bob"))


def test_whoever_would_wait_for_itself_is_refused(same: Same) -> None:
    """Inside a stream every other call of that session is, a second stream as well."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            session = client.session("s")
            async with session.stream("[[tokens 300]]") as stream:
                await anext(aiter(stream))
                found = await refused_all(client, session)
                given_up = partial(client.passivate, "s", **({} if front.kind == "trio" else {"deadline_s": 10}))
                found.append((await refused(given_up))[0])
            return [*found, (await session.ask("[[say after]]")).text]

    assert same(scenario) == [gr.SessionBusyError] * 5 + ["after"]


def test_whose_session_it_is_decides(same: Same) -> None:
    """Where principals have sessions of one name, that of another one is no reason to refuse."""
    keys: Any = {
        ADA["access_token"]: Principal(id="ada"),
        BOB["access_token"]: Principal(id="bob"),
    }
    guard = SecurityConfig(auth=ApiKeyAuth(api_keys=keys), require_authentication=True, default_policy="allow-all")

    async def scenario(front: Front) -> Any:
        async with front.open_client(security=guard) as client:
            session = client.session("s", **ADA)
            async with session.stream("[[tokens 300]]") as stream:
                await anext(aiter(stream))
                found = await refused_all(client, session, **ADA)
                found.append((await client.session("s", **BOB).ask("[[say bob]]")).text)
                found.append((await session.ask("[[say bob]]", **BOB)).text)
            return [*found, (await session.ask("[[say after]]")).text]

    assert same(scenario) == [gr.SessionBusyError] * 4 + ["bob", "bob", "after"]


async def refused_all(client: Any, session: Any, **token: str) -> list[object]:
    """What calls of the session raise, each."""

    async def stream(source: Any, **named: object) -> None:
        async with source.stream("[[say x]]", **named):
            pass

    calls = (
        lambda: session.ask("[[say x]]"),
        lambda: client.chat("[[say x]]", session=session.key, **token),
        lambda: stream(session),
        lambda: stream(client, session=session.key, **token),
    )
    return [(await refused(call))[0] for call in calls]


def _conflict(client: Any) -> object:
    try:
        client.session("s", system="Be long.")
    except gr.SessionConflictError as exc:
        return failed(exc)
    return None


def test_batches(same: Same) -> None:
    """Lists, generators and async generators run; rows that fail say so; an input that raises is heard of."""

    async def scenario(front: Front) -> Any:
        def rows(count: int) -> Iterator[dict[str, object]]:
            for number in range(count):
                content = f"[[say {number}]]" if number != 3 else "[[fault 403_moderation]]"
                yield {"custom_id": f"r{number}", "messages": [{"role": "user", "content": content}]}

        def broken() -> Iterator[dict[str, object]]:
            yield from rows(2)
            raise KeyError("no more")

        async def slow() -> Any:
            for row in rows(5):
                yield row

        async with front.open_client() as client:
            found: list[object] = []
            for requests in (list(rows(80)), rows(80), rows(5) if front.kind == "blocking" else slow()):
                async with client.batch(requests, max_in_flight=4, temperature=0.1) as results:
                    assert results.name
                    lot = [(r.custom_id, r.error and type(r.error), r.result and r.result.text) async for r in results]
                    found.append((sorted(lot, key=str), results.statistics(), repr(results)))
            async with client.batch(broken()) as results:
                answered = []
                try:
                    answered += [r.custom_id async for r in results]
                except KeyError as exc:
                    found.append(str(exc))
            async with client.batch(rows(50), max_in_flight=2) as results:
                await anext(aiter(results))
                results.cancel()
            return [*found, await _wrong(client)]

    results = same(scenario)
    assert [len(lot) for lot, *_ in results[:3]] == [80, 80, 5]
    assert results[3] == "'no more'"


async def _wrong(client: Any) -> object:
    found = []
    for requests in ("text", {"messages": []}, 5):
        try:
            async with client.batch(requests):
                pass
        except TypeError as exc:
            found.append(str(exc))
    return found


def test_tools(same: Same) -> None:
    """Tools run where they belong, ask for approval, tell how far they are, and what became of them is reported."""

    async def scenario(front: Front) -> Any:
        @gr.tool
        async def weather(city: str, *, ctx: gr.ToolContext) -> str:
            """Look the weather up."""
            ctx.progress("looking", fraction=0.5)
            assert ctx.remaining_s > 0
            return f"rain in {city}"

        def population(city: str) -> int:
            """Count people."""
            if city == "Nowhere":
                raise gr.ToolError("there is no such place")
            return len(city)

        @gr.tool(rules=ToolRules(sensitive=True))
        def launch() -> str:
            return "gone"

        async def approve(request: gr.ApprovalRequest) -> gr.ApprovalDecision:
            return gr.ApprovalDecision(request=request, approved=request.call_id == "yes", reason="because")

        tools = [population, launch] if front.kind == "blocking" else [weather, population, launch]
        approving = front.function(approve)
        async with front.open_client() as client:
            found = []
            for prompt in (
                '[[call population {"city": "Aber"}]]', '[[call population {"city": "Nowhere"}]]',
                "[[call launch#yes {}]]", "[[call launch#no {}]]",
            ):  # fmt: skip
                reply = await client.chat(prompt, tools=tools, approve=approving)
                found.append([(c.name, c.status, c.text) for c in reply.tool_calls])
            session = client.session("tools", tools=tools, approve=approving)
            assert client.session("tools", tools=tools, approve=approving).key == "tools"
            async with session.stream('[[call population {"city": "Aber"}]]') as stream:
                events = [type(event).__name__ async for event in stream if isinstance(event, gr.ToolEvent)]
            again = await client.session("tools", tools=tools, approve=approving).ask("[[say more]]")
            return [found, events, again.text]

    found, events, _more = same(scenario)
    assert found[0] == [("population", "success", "4")]
    assert [lot[0][1] for lot in found[1:]] == ["error_execution", "success", "error_security"]
    assert events[0] == "ToolStarted"


def test_extensions(same: Same) -> None:
    """Middleware, hooks, handlers, feeds and plugins are around every chat, and go when they are taken out."""

    async def scenario(front: Front) -> Any:
        seen: list[object] = []

        async def around(context: gr.ChatContext, state: gr.ChatState, proceed: Any) -> None:
            state.options["temperature"] = 0.3
            seen.append(("before", context.model))
            await proceed()
            seen.append(("after", state.result and state.result.text))

        async def fails(context: gr.ChatContext, state: gr.ChatState, proceed: Any) -> None:
            raise ValueError("mine")

        async def note(context: gr.ChatContext, state: gr.ChatState) -> None:
            seen.append(("hook", state.result and state.result.text))

        async def finished(event: gr.ChatFinished) -> None:
            seen.append(("event", event.result.text))

        class Plugin:
            name = "mine"

            def init(self, client: Any) -> None:
                client.add_hook(gr.Hook(before=front.function(note)))
                seen.append("plugin begun")

            def destroy(self) -> None:
                seen.append("plugin ended")

        middleware, failing, hook = front.function(around), front.function(fails), gr.Hook(after=front.function(note))
        async with front.open_client(plugins=[Plugin()]) as client:
            client.use(middleware)
            client.add_hook(hook)
            handler = client.on(gr.ChatFinished, front.function(finished))
            with client.events(gr.ChatStarted) as feed:
                await client.chat("[[say x]]")
                seen.append(type(await anext(aiter(feed))))
                seen.append(feed.dropped)
            seen.extend([client.off(handler), client.off(handler), await client.unregister("mine")])
            client.use(failing)
            seen.append((await refused(lambda: client.chat("x")))[0])
            seen.extend([client.unuse(failing), client.unuse(middleware), client.unuse(middleware)])
            seen.extend([client.remove_hook(hook), client.remove_hook(hook)])
            seen.append((await client.chat("[[say plain]]")).text)
            seen.append(await client.register(_opened_plugin(front, seen)))
        # A handler runs beside: whether it was called before it was taken out, is nobody's promise.
        return sorted(str(entry) for entry in seen if entry != ("event", "x"))

    seen = same(scenario)
    assert "('hook', 'x')" in seen
    assert "('after', 'x')" in seen
    assert "held and left" in seen


def test_a_plugin_may_use_its_client_while_it_ends(same: Same) -> None:
    """The pool is still there, also when it ends with the client; a client that is closed is not."""

    async def scenario(front: Front) -> Any:
        seen: list[object] = []

        async def ask(client: Any) -> None:
            seen.append((await client.chat("[[say bye]]")).text)

        class Plugin:
            name = "mine"

            def init(self, client: Any) -> None:
                self.client = client

            @property
            def destroy(self) -> Any:
                work = front.function(ask)
                return lambda: work(self.client)

        plugin = Plugin()
        async with front.open_client(plugins=[plugin]) as client:
            await client.chat("[[say x]]")
        mine: Any = _Face(plugin.client) if front.kind == "blocking" else plugin.client
        seen.append((await refused(lambda: mine.chat("[[say x]]")))[0])
        return seen

    assert same(scenario) == ["bye", gr.PoolClosedError]


def test_methods_are_taken_out_again(same: Same) -> None:
    """Whose objects are made anew each time they are looked up; one that is there twice goes twice."""

    class Counter:
        def __init__(self, front: Front) -> None:
            self.chats = 0
            self.is_plain = front.kind == "blocking"

        def plain(self, context: gr.ChatContext, state: gr.ChatState, proceed: Any) -> None:
            self.chats += 1
            proceed()

        async def is_async(self, context: gr.ChatContext, state: gr.ChatState, proceed: Any) -> None:
            self.chats += 1
            await proceed()

        @property
        def around(self) -> Any:
            return self.plain if self.is_plain else self.is_async

    async def scenario(front: Front) -> Any:
        counter = Counter(front)
        async with front.open_client() as client:
            client.use(counter.around)
            client.use(counter.around)
            await client.chat("[[say x]]")
            taken = [client.unuse(counter.around), client.unuse(counter.around)]
            await client.chat("[[say x]]")
        return taken, counter.chats

    assert same(scenario) == ([True, False], 2)


@pytest.mark.parametrize("grace_s", [1e12, float("inf")])
def test_patience_without_an_end(same: Same, grace_s: float) -> None:
    """Whatever clocks and locks can count."""

    async def scenario(front: Front) -> Any:
        async with front.open_client(sessions=gr.SessionConfig(shutdown_grace_s=grace_s)) as client:
            bounds: list[Any] = [{}] if front.kind == "trio" else [{"deadline_s": s} for s in (1e300, 10**400, 1e12)]
            said = {(await client.chat("[[say x]]", **bound)).text for bound in bounds}
            async with client.stream("[[say x]]", **bounds[0]) as stream:
                said.add((await stream.collect()).text)
        return said

    assert same(scenario) == {"x"}


def test_what_cannot_be_called_is_no_handler(same: Same) -> None:
    """It is refused where it is given, and so is a queue that has no room."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            wrong: list[Any] = [
                lambda: client.on(gr.ChatFinished, 5),
                lambda: client.on(gr.ChatFinished, print, queue="5"),
                lambda: client.on(gr.ChatFinished, print, queue=0),
                lambda: client.on(gr.ChatFinished, print, queue=float("nan")),
                lambda: client.on(gr.ChatFinished, print, queue=None),
            ]
            return [(await refused(each))[0] for each in wrong]

    assert set(same(scenario)) == {gr.ConfigError}


def _opened_plugin(front: Front, seen: list[object]) -> Any:
    from contextlib import asynccontextmanager, contextmanager

    def noted() -> Iterator[None]:
        yield
        seen.append("held and left")

    @contextmanager
    def plain(client: Any) -> Iterator[None]:
        yield from noted()

    @asynccontextmanager
    async def is_async(client: Any) -> Any:
        for _ in noted():
            yield

    plain.__name__ = is_async.__name__ = "opened"
    return plain if front.kind == "blocking" else is_async


def test_services(same: Same) -> None:
    """What the API tells, and what the client knows of its costs."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            models = await client.models(limit=3)
            reply = await client.chat("[[say hi]]")
            client.set_prices({"a/b": {"prompt": "0.001", "completion": "0.002"}})
            client.start_price_refresh(3600.0)
            client.stop_price_refresh()
            refreshed = await client.refresh_prices()
            key, generation = await client.key(), await client.generation(reply.call.generation_id)
            return [
                [model.id for model in models],
                len(await client.models_user(limit=2)),
                len(await client.embedding_models(limit=2)),
                await client.model_count(),
                (await client.model(models[0].id)).id,
                len((await client.model_endpoints(models[0].id)).endpoints),
                len(await client.zdr_endpoints()) > 0,
                len(await client.providers()) > 0,
                key.label,
                generation.model,
                type(await client.credits()).__name__,
                len((await client.embeddings(["a", "b"], model="openai/text-embedding-3-small")).data),
                (await client.completions("Once upon")).text,
                client.price("a/b"),
                client.price("nobody/none"),
                len(client.ledger_rows()) > 0,
                type(refreshed).__name__,
                client.statistics().answered > 5,
                type(client.budget()).__name__,
                client.cost_snapshot().cost_usd is not None,
                await refused(lambda: client.model("nobody/none")),
            ]

    results = same(scenario)
    assert results[13].prompt is not None


def test_changes_while_it_runs(same: Same) -> None:
    """Another model, key, store and guard; what observes and measures is there and goes."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            ended: list[object] = []
            found: list[object] = [client.default_model, client.base_url == front.base_url, client.active_sessions]
            client.observe(ended.extend)
            client.observe_ledger(ended.extend)
            client.set_model("openai/gpt-4o")
            client.set_api_key("sk-another")
            found.append((await client.chat("[[say x]]")).model)
            await client.session("s").ask("[[say y]]")
            client.flush_observers()
            found += [sorted(type(each).__name__ for each in ended), client.unobserve(ended.extend)]
            found += [
                client.unobserve_ledger(ended.extend),
                sorted(client.session_statistics()),
                client.active_sessions,
            ]
            found += [type(client.inspect(sessions=5)).__name__, client.metrics_text().startswith("# ")]
            store = gr.stores.MemoryStore()
            client.set_store(store)
            found += [client.store is store, await client.session("s").history()]
            pop_store = client.push_store(gr.stores.MemoryStore())
            found.append(client.store is store)
            pop_store()
            found.append(client.store is store)
            guard = client.security
            pop = client.push_security(
                gr.security.SecurityManager(gr.security.SecurityConfig(default_policy="allow-all"))
            )
            found.append(client.security is guard)
            pop()
            found += [client.security is guard, client.cost_tracker is not None]
            client.set_security(None)
            for wrong in (lambda: client.set_model(""), lambda: client.set_api_key(""), lambda: client.set_store(5)):
                try:
                    wrong()
                except gr.ConfigError as exc:
                    found.append(str(exc))
            return found

    results = same(scenario)
    assert results[0] != results[3]
    assert len(results) == 21


def test_jobs(same: Same, tmp_path: Path) -> None:
    """Rows from a file, estimated, run, and written to another."""

    async def scenario(front: Front) -> Any:
        source, output = tmp_path / f"{front.kind}.jsonl", tmp_path / f"{front.kind}.out"
        source.write_text("".join(f'{{"prompt": "[[say {number}]]"}}\n' for number in range(20)))
        job = gr.BatchJob(source=str(source), output=str(output))
        async with front.open_client() as client:
            await client.refresh_prices()
            estimate = await client.estimate_job(job)
            async with client.batch_job(job, temperature=0.5) as running:
                ahead = await running.look_ahead()
                await running.run()
                progress = running.progress()
            rows = map(json.loads, output.read_text("utf-8").splitlines())
            texts = sorted(row["response"]["body"]["choices"][0]["message"]["content"] for row in rows)
            return [estimate.rows, ahead.rows, progress.rows, texts, running.name == job.output]

    results = same(scenario)
    assert results[2] == 20


def test_what_is_closed_says_so(same: Same) -> None:
    """After the end every call is refused, and what only looks still looks."""

    async def scenario(front: Front) -> Any:
        async with front.open_client() as client:
            session = client.session("s")
            await session.ask("[[say x]]")
        found = [(await refused(work))[0] for work in (lambda: client.chat("x"), client.key, lambda: session.ask("x"))]
        try:
            async with client.stream("x"):
                pass
        except gr.GorouterError as exc:
            found.append(type(exc))
        return [
            *(kind in {gr.PoolClosedError, gr.ActorGoneError} for kind in found),
            client.statistics().answered,
        ]

    assert same(scenario)[:4] == [True] * 4


def test_settings_are_checked_first(same: Same) -> None:
    """A wrong setting is a `ConfigError` before anything is begun, and no secret is in it."""

    async def scenario(front: Front) -> Any:
        found = []
        for fields in (
            {"nonsense": 1},
            {"model": ""},
            {"api_key": "sk-secret\x00"},
            {"plugins": [5]},
            {"proxy": "nonsense"},
        ):
            try:
                async with front.open_client(**fields):
                    pass
            except gr.ConfigError as exc:
                found.append(failed(exc))
        return found

    results = same(scenario)
    assert len(results) == 5
    assert "secret" not in str(results)
