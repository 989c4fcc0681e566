"""The front for asyncio: cancelling, deadlines, backpressure, loops, callbacks, and what is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from fronted import OWN_THREAD, Stage, settings, simulator_in_thread, staged

import gorouter_trio as gr
from gorouter_trio import aio
from gorouter_trio._fronts import portal
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig

pytestmark = pytest.mark.net


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with simulator_in_thread() as url:
        yield url


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as found:
        yield found


async def reached(semaphore: threading.Semaphore) -> None:
    """Wait for something that happens in another thread."""
    assert await asyncio.to_thread(semaphore.acquire, timeout=20)


async def settled(client: aio.Client) -> None:
    """Wait until nothing is in flight: nobody waits for a connection to be closed, which takes a moment."""
    async with asyncio.timeout(10):
        while client.statistics().in_flight:
            await asyncio.sleep(0)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in OWN_THREAD]


# --- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelling_a_chat_stops_the_request(stage: Stage) -> None:
    """`task.cancel` closes the connection, and the task is through only then."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            task = asyncio.create_task(client.chat("hang"))
            await reached(stage.arrived)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(client)
            await reached(stage.left)
            assert (await client.chat("hello")).text == "hello"

    asyncio.run(main())


@pytest.mark.parametrize("how", ["timeout", "wait_for", "deadline_s", "group"])
def test_every_way_to_give_up_stops_the_request(stage: Stage, how: str) -> None:
    """`asyncio.timeout`, `wait_for`, a failing sibling and `deadline_s` all do."""

    async def give_up(client: aio.Client) -> None:
        if how == "timeout":
            async with asyncio.timeout(0.05):
                await client.chat("hang")
        elif how == "wait_for":
            await asyncio.wait_for(client.chat("hang"), 0.05)
        elif how == "deadline_s":
            await client.chat("hang", deadline_s=0.05)
        else:
            async with asyncio.TaskGroup() as group:
                group.create_task(client.chat("hang"))
                await reached(stage.arrived)
                raise KeyError

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            with pytest.raises((TimeoutError, gr.DeadlineExceededError, ExceptionGroup)) as caught:
                await give_up(client)
            if how == "deadline_s":
                assert isinstance(caught.value, gr.DeadlineExceededError)
                assert (caught.value.phase, caught.value.maybe_billed) == ("total", True)
            await settled(client)
            await reached(stage.left)

    asyncio.run(main())


async def _stream(client: aio.Client, session: aio.SessionRef) -> None:
    async with client.stream("[[tokens 60]]") as stream:
        async for _event in stream:
            pass


async def _session_stream(client: aio.Client, session: aio.SessionRef) -> None:
    async with session.stream("[[tokens 60]]") as stream:
        async for _event in stream:
            pass


async def _chat(client: aio.Client, session: aio.SessionRef) -> None:
    await client.chat("[[tokens 20]]")


async def _ask(client: aio.Client, session: aio.SessionRef) -> None:
    await session.ask("[[tokens 20]]")


async def _tool(client: aio.Client, session: aio.SessionRef) -> None:
    async def pause(city: str) -> str:
        await asyncio.sleep(0)
        return city

    await session.ask('[[call pause {"city": "Aber"}]]', tools=[pause])


async def _batch(client: aio.Client, session: aio.SessionRef) -> None:
    async def rows() -> AsyncIterator[dict[str, object]]:
        for number in range(5):
            await asyncio.sleep(0)
            yield {"messages": [{"role": "user", "content": f"[[say {number}]]"}]}

    async with client.batch(rows(), max_in_flight=2) as results:
        async for _result in results:
            pass


WORK = [_chat, _stream, _ask, _session_stream, _tool, _batch]


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_cancelling_at_any_step_leaves_everything_in_order(base_url: str, work: Callable[..., Awaitable[None]]) -> None:
    """After a cancel at each of many steps nothing is in flight, and the session goes on."""

    async def main() -> int:
        async with aio.open_client(**settings(base_url)) as client:
            cancelled = 0
            for step in range(40):
                session = client.session(f"s{step}")
                task = asyncio.ensure_future(work(client, session))
                for _ in range(step):
                    await asyncio.sleep(0 if step < 30 else 0.0002)
                task.cancel()
                (found,) = await asyncio.gather(task, return_exceptions=True)
                assert found is None or isinstance(found, asyncio.CancelledError)
                cancelled += found is not None
                await settled(client)
                if work in {_ask, _session_stream, _tool}:
                    assert (await session.ask("[[say on]]")).text == "on"
                    await session.aclose()
            assert not client._core.place().home.holders
            return cancelled

    assert asyncio.run(main()) > 10
    assert own_threads() == []


def test_a_second_cancel_does_not_cut_the_cleaning_up_short(stage: Stage) -> None:
    """Whoever cancels twice, or again and again, waits all the same until the request has gone."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            task = asyncio.create_task(client.chat("hang"))
            await reached(stage.arrived)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            assert task.cancelled()
            await settled(client)

    asyncio.run(main())


def test_cancelling_while_it_is_opened_ends_it(base_url: str) -> None:
    """At whatever step: no thread is left."""

    async def open_it() -> None:
        async with aio.open_client(**settings(base_url)):
            pass

    async def main() -> None:
        for step in range(12):
            task = asyncio.create_task(open_it())
            for _ in range(step):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert own_threads() == []

    asyncio.run(main())


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_left_early_closes_its_connection(stage: Stage) -> None:
    """The server that streams for ever notices, and the client is as before."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            async with client.stream("endless") as stream:
                async for event in stream:
                    assert isinstance(event, gr.TextDelta)
                    break
            await reached(stage.left)
            await settled(client)
            with pytest.raises(gr.StreamNotFinishedError):
                _ = stream.result

    asyncio.run(main())


def test_what_there_is_of_a_stream_can_be_looked_at(stage: Stage) -> None:
    """Before its end, which looking does not bring about."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client, client.stream("halt 2") as stream:
            await anext(stream)
            await anext(stream)
            early = stream.so_far()
            assert (early.text, early.interrupted) == ("piece piece ", True)
            stage.go_on()
            assert (await stream.collect()).text == stream.so_far().text
            assert not stream.so_far().interrupted

    asyncio.run(main())


def test_a_reader_that_stops_stops_the_server(stage: Stage, record_property: Callable[[str, object], None]) -> None:
    """Some hundred events are read ahead, and what fits into sockets is sent; not more."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client, client.stream("endless") as stream:
            await anext(aiter(stream))
            sent = -1
            while sent != stage.pieces_sent:
                sent = stage.pieces_sent
                await asyncio.sleep(0.1)
            waiting = len(stream._lots._lent._items)
            record_property("figure", f"{waiting} events wait for a reader that has stopped, {sent} were sent")
            assert waiting < 2_000

    asyncio.run(main())


def test_a_deadline_covers_the_whole_stream(stage: Stage) -> None:
    """It is raised while reading, with the type that it has everywhere, and the connection is closed."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            with pytest.raises(gr.DeadlineExceededError) as caught:
                async with client.stream("halt 3", deadline_s=0.2) as stream:
                    texts = [text async for text in stream.text]
            assert caught.value.partial is not None
            assert caught.value.partial.text == "piece " * 3
            await reached(stage.left)
            with pytest.raises(gr.DeadlineExceededError):
                async with client.stream("hang", deadline_s=0.05):
                    pass
            # Once everything was read, nothing is late any more.
            async with client.stream("say 2", deadline_s=0.3) as stream:
                texts = [text async for text in stream.text]
                await asyncio.sleep(0.4)
            assert len(texts) == 2

    asyncio.run(main())


def test_a_deadline_of_a_turn_leaves_its_session_in_order(stage: Stage) -> None:
    """The turn is interrupted, the history valid, and the next turn is taken."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            session = client.session("s")
            with pytest.raises(gr.DeadlineExceededError):
                await session.ask("hang", deadline_s=0.1)
            await reached(stage.left)
            with pytest.raises(gr.DeadlineExceededError):
                async with session.stream("halt 2", deadline_s=0.2) as stream:
                    await stream.collect()
            assert (await session.ask("hello", deadline_s=20)).text == "hello"
            assert (await session.history())[-1].message.content == "hello"

    asyncio.run(main())


def test_an_error_of_the_body_leaves_as_it_is(stage: Stage) -> None:
    """Also out of a stream that is open."""

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            with pytest.raises(ZeroDivisionError):
                async with client.stream("endless") as stream:
                    await anext(aiter(stream))
                    _ = 1 / 0
            await reached(stage.left)

    asyncio.run(main())


# --- many at once, loops ----------------------------------------------------------------------------------------------


def test_a_thousand_calls_at_once(base_url: str) -> None:
    """All are answered, each with its own answer."""

    async def main() -> list[str]:
        async with aio.open_client(**settings(base_url)) as client:
            replies = await asyncio.gather(*(client.chat(f"[[say {number}]]") for number in range(1_000)))
            return [reply.text for reply in replies]

    assert asyncio.run(main()) == [str(number) for number in range(1_000)]


def test_several_tasks_read_one_batch(base_url: str) -> None:
    """Each result goes to one of them, and all of them hear of the end."""
    rows = [{"messages": [{"role": "user", "content": f"[[say {number}]]"}]} for number in range(100)]

    async def main() -> None:
        async with aio.open_client(**settings(base_url)) as client, client.batch(rows) as results:

            async def read() -> list[str]:
                return [result.unwrap().text async for result in results]

            async with asyncio.timeout(20):
                found = await asyncio.gather(*(read() for _ in range(5)))
            assert sorted(int(text) for part in found for text in part) == list(range(100))

    asyncio.run(main())


def test_whoever_still_reads_what_was_left_hears_of_the_end(stage: Stage) -> None:
    """Tasks that wait for the next event or piece do not wait for ever."""

    async def main() -> None:
        async def read(items: Any) -> list[Any]:
            return [item async for item in items]

        async with aio.open_client(**settings(stage.base_url)) as client, asyncio.timeout(20):
            with client.events(gr.ChatFailed) as feed:
                readers = [asyncio.create_task(read(feed)) for _ in range(2)]
                await asyncio.sleep(0)
            assert await asyncio.gather(*readers) == [[], []]
            async with client.stream("halt 2") as stream:
                await reached(stage.halted)
                reader = asyncio.create_task(read(stream))
                while not stream._lots._reading:
                    await asyncio.sleep(0)
            await reader

    asyncio.run(main())


def test_several_loops_share_one_client(base_url: str) -> None:
    """Each in a thread of its own, opened by one and used by all."""

    async def use(client: aio.Client, name: int) -> list[str]:
        found = await asyncio.gather(*(client.chat(f"[[say {name}.{number}]]") for number in range(50)))
        async with client.stream(f"[[say {name}]]") as stream:
            text = "".join([text async for text in stream.text])
        return [*(reply.text for reply in found), text]

    async def main() -> None:
        async with aio.open_client(**settings(base_url)) as client:
            work = [asyncio.to_thread(asyncio.run, use(client, name)) for name in range(4)]
            for name, found in enumerate(await asyncio.gather(*work)):
                assert found == [*(f"{name}.{number}" for number in range(50)), str(name)]

    asyncio.run(main())


def test_outside_of_a_loop_it_is_refused(base_url: str) -> None:
    """With an error that says so."""

    async def main() -> aio.Client:
        async with aio.open_client(**settings(base_url)) as client:
            with pytest.raises(gr.ConfigError, match="where a loop runs"):
                await asyncio.to_thread(client.session, "s")

            def listen() -> None:
                with client.events(gr.ChatFailed):
                    pass

            with pytest.raises(gr.ConfigError, match="where a loop runs"):
                await asyncio.to_thread(listen)
            assert not client._core.client.runtime.bus.has_listeners
            return client

    asyncio.run(main())


# --- callbacks --------------------------------------------------------------------------------------------------------

_VAR: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="nothing")


def test_async_tools_run_on_the_loop_in_the_callers_context(base_url: str) -> None:
    """With its variables, and concurrently with the program; a plain one has a thread."""

    async def main() -> None:
        loop, threads = asyncio.get_running_loop(), []

        @gr.tool
        async def where(city: str) -> str:
            await asyncio.sleep(0)
            assert asyncio.get_running_loop() is loop
            return f"{city} {_VAR.get()}"

        def plain(city: str) -> str:
            threads.append(threading.current_thread())
            return f"{city} {_VAR.get()}"

        async with aio.open_client(**settings(base_url)) as client:
            _VAR.set("here")
            for tool in (where, plain):
                name = tool.name if isinstance(tool, gr.Tool) else tool.__name__
                reply = await client.chat(f'[[call {name} {{"city": "Aber"}}]]', tools=[tool])
                assert [call.text for call in reply.tool_calls] == ["Aber here"]
            assert threading.main_thread() not in threads

    asyncio.run(main())


def test_a_turn_of_a_session_has_the_context_of_its_asker(base_url: str) -> None:
    """For its tools and approvals: of each turn another one, whoever woke the session."""

    async def main() -> None:
        async def where(city: str) -> str:
            return f"{city} {_VAR.get()}"

        async def ask(session: aio.SessionRef, name: str) -> str:
            _VAR.set(name)
            return (await session.ask('[[call where {"city": "Aber"}]]')).tool_calls[0].text

        async with aio.open_client(**settings(base_url)) as client:
            session = client.session("s", tools=[where])
            found = await asyncio.gather(*(ask(session, name) for name in "abc"))
            assert found == ["Aber a", "Aber b", "Aber c"]

    asyncio.run(main())


ADA: dict[str, Any] = {"access_token": "key-of-ada-0123456789"}
GUARDS: list[dict[str, Any]] = [
    {},
    {
        "security": SecurityConfig(
            auth=ApiKeyAuth(api_keys={ADA["access_token"]: Principal(id="ada")}),
            require_authentication=True,
            default_policy="allow-all",
        )
    },
]


@pytest.mark.parametrize("guard", GUARDS, ids=["open", "secured"])
def test_a_tool_that_asks_its_own_session_is_refused(base_url: str, guard: dict[str, Any]) -> None:
    """At once, instead of waiting until its time is up."""
    token = ADA if guard else {}

    async def main() -> None:
        async with aio.open_client(**settings(base_url, **guard)) as client:

            async def ask_again(city: str) -> str:
                with pytest.raises(gr.SessionBusyError, match="wait for itself"):
                    await session.ask("[[say x]]")
                return (await client.session("other", **token).ask("[[say y]]")).text

            session = client.session("s", tools=[ask_again], **token)
            reply = await session.ask('[[call ask_again {"city": "Aber"}]]', deadline_s=20)
            assert [call.text for call in reply.tool_calls] == ["y"]

    asyncio.run(main())


def test_cancelling_a_chat_cancels_its_tool(base_url: str) -> None:
    """On the loop, where it may clean up, and is through before the chat is."""

    async def main() -> None:
        began, ended = asyncio.Event(), []

        async def slow(city: str) -> str:
            try:
                began.set()
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(city)
            return city

        async with aio.open_client(**settings(base_url)) as client:
            task = asyncio.create_task(client.chat('[[call slow {"city": "Aber"}]]', tools=[slow]))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == ["Aber"]

    asyncio.run(main())


def test_a_middleware_may_give_up_what_it_goes_on_with(stage: Stage) -> None:
    """A timeout of its own around the rest cancels the request."""

    async def impatient(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        try:
            async with asyncio.timeout(0.05):
                await proceed()
        except TimeoutError:
            raise gr.ToolError("too slow for me") from None

    async def main() -> None:
        async with aio.open_client(**settings(stage.base_url)) as client:
            client.use(impatient)
            with pytest.raises(gr.ToolError, match="too slow"):
                await client.chat("hang")
            await reached(stage.left)
            assert (await client.chat("hello")).text == "hello"

    asyncio.run(main())


def test_a_middleware_that_goes_on_behind_its_end_is_told_so(base_url: str) -> None:
    """In a task that it has left behind: the client goes on for everybody."""
    late: list[asyncio.Task[None]] = []

    async def main() -> None:
        go = asyncio.Event()

        async def leaves_one_behind(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
            async def again() -> None:
                await go.wait()
                await proceed()

            late.append(asyncio.create_task(again()))
            await proceed()

        async with aio.open_client(**settings(base_url)) as client:
            client.use(leaves_one_behind)
            await client.chat("[[say x]]")
            client.unuse(leaves_one_behind)
            go.set()
            with pytest.raises(gr.ConfigError, match="has ended"):
                await asyncio.wait_for(late[0], 20)
            assert (await client.chat("[[say y]]", deadline_s=20)).text == "y"

    asyncio.run(main())


def test_handlers_are_called_on_the_loop(base_url: str) -> None:
    """One that fails is heard of, and harms nobody."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        finished: asyncio.Queue[object] = asyncio.Queue()

        async def handle(event: gr.ChatFinished) -> None:
            assert asyncio.get_running_loop() is loop
            await finished.put(event.result.text)
            raise ValueError("mine")

        async with aio.open_client(**settings(base_url)) as client:
            client.on(gr.ChatFinished, handle)
            client.on(gr.HandlerFailed, lambda event: finished.put_nowait(str(event.error)))
            await client.chat("[[say x]]")
            assert [await finished.get(), await finished.get()] == ["x", "mine"]

    asyncio.run(main())


def test_a_store_of_the_program_runs_on_the_loop(base_url: str) -> None:
    """Histories are written and read by async functions of asyncio."""

    class Mine:
        durability = "process"

        def __init__(self) -> None:
            self.kept: dict[str, list[bytes]] = {}

        async def load(self, key: str) -> gr.abc.StoredHistory:
            await asyncio.sleep(0)
            entries = self.kept.get(key, [])
            return gr.abc.StoredHistory(len(entries), entries)

        async def append(self, key: str, entries: Any, *, expected_version: int) -> int:
            await asyncio.sleep(0)
            held = self.kept.setdefault(key, [])
            assert len(held) == expected_version
            held += entries
            return len(held)

    async def main() -> None:
        mine = Mine()
        async with aio.open_client(**settings(base_url, store=aio.Store(mine))) as client:
            await client.session("s").ask("[[say one]]")
        assert mine.kept["s"]
        async with aio.open_client(**settings(base_url, store=aio.Store(mine))) as client:
            assert [e.message.content for e in await client.session("s").history()] == ["[[say one]]", "one"]

    asyncio.run(main())


def test_a_store_in_a_file_is_opened_and_closed_with_the_client(base_url: str, tmp_path: Any) -> None:
    """Its own loop is that of the runtime."""

    async def main() -> None:
        for turn in range(2):
            store = gr.stores.SqliteStore(tmp_path / "histories.db")
            async with aio.open_client(**settings(base_url, store=store)) as client:
                assert len(await client.session("s").history()) == 2 * turn
                await client.session("s").ask("[[say one]]")

    asyncio.run(main())


def test_an_async_key_provider_runs_on_the_loop(base_url: str) -> None:
    """It is asked for each request."""

    async def main() -> None:
        asked = []

        async def provide() -> str:
            asked.append(asyncio.current_task())
            return "sk-fresh"

        async with aio.open_client(**settings(base_url) | {"api_key": provide}) as client:
            await client.chat("[[say x]]")
            await client.chat("[[say x]]")
        assert len(asked) >= 2

    asyncio.run(main())


# --- the end ----------------------------------------------------------------------------------------------------------


def test_closing_answers_every_call_that_runs(stage: Stage) -> None:
    """Chats, streams and turns of sessions that are in the midst of it get an error, and nobody waits for ever."""

    async def main() -> None:
        async def read(client: aio.Client) -> None:
            async with client.stream("halt 2") as stream:
                async for _event in stream:
                    pass

        async with aio.open_client(**settings(stage.base_url)) as client:
            work = [client.chat("hang"), client.session("s").ask("hang"), read(client)]
            tasks = [asyncio.ensure_future(each) for each in work]
            for _ in tasks:
                await reached(stage.arrived)
            await reached(stage.halted)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, gr.GorouterError) for error in found), found
        assert isinstance(found[0], gr.PoolClosedError)

    asyncio.run(main())
    assert own_threads() == []


def test_calls_that_race_with_the_end_are_answered(base_url: str) -> None:
    """Calls are made from another loop all the while: each has an answer or an error of this package."""

    async def hammer(client: aio.Client, go: threading.Event) -> list[object]:
        found: list[object] = []
        while not (found and isinstance(found[-1], gr.GorouterError)):
            found += await asyncio.gather(*(client.chat("[[say x]]") for _ in range(5)), return_exceptions=True)
            go.set()
        return found

    async def main() -> None:
        go = threading.Event()
        async with aio.open_client(**settings(base_url)) as client:
            work = asyncio.ensure_future(asyncio.to_thread(asyncio.run, hammer(client, go)))
            await asyncio.to_thread(go.wait)
        async with asyncio.timeout(20):
            found = await work
        assert all(isinstance(each, gr.ChatResult | gr.PoolClosedError) for each in found)

    for _ in range(5):
        asyncio.run(main())


def test_an_error_shows_both_sides_and_no_secret(base_url: str) -> None:
    """The traceback leads from the program's line into the runtime; the key is not in it."""

    async def main() -> str:
        async with aio.open_client(**settings(base_url) | {"api_key": "sk-very-secret"}) as client:
            with pytest.raises(gr.ApiError) as caught:
                await client.chat("[[fault 403_moderation]]")
            error = caught.value
            shown = traceback.TracebackException.from_exception(error, capture_locals=True)
            own = [f for f in shown.stack if "test_aio.py" not in f.filename]
            assert "sk-very-secret" not in "".join(f"{f.filename} {f.locals}" for f in own)
            return "".join(traceback.format_exception(error))

    shown = asyncio.run(main())
    assert "test_aio.py" in shown
    assert "workers.py" in shown


def test_nothing_is_left_to_the_collector(base_url: str) -> None:
    """Calls and streams, answered and refused, leave no cycles of their own."""

    async def main() -> None:
        async with aio.open_client(**settings(base_url)) as client:
            wrong: Any = {"temperature": "warm"}

            async def work() -> None:
                await client.chat("[[say x]]")
                with contextlib.suppress(gr.BadRequestError):
                    await client.chat("x", **wrong)
                async with client.stream("[[say x]]") as stream:
                    await stream.collect()

            kinds = (portal.Call, portal.Lent, gr.BadRequestError, aio.ChatStream)
            await work()
            gc.collect()
            before = {id(each) for each in gc.get_objects() if isinstance(each, kinds)}
            gc.disable()
            try:
                await work()
                client.statistics()  # The runtime is through with what it has just answered.
                left = [each for each in gc.get_objects() if isinstance(each, kinds) and id(each) not in before]
                assert [type(each).__name__ for each in left] == []
            finally:
                gc.enable()

    asyncio.run(main())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_is_refused(base_url: str) -> None:
    """With an error that says what to do; the end of the client does not hang there."""

    async def main() -> int:
        async with aio.open_client(**settings(base_url)) as client:
            await client.chat("[[say x]]")
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    client.statistics()
                except gr.ConfigError as exc:
                    code = 0 if "forked" in str(exc) else 2
                client._core.portal.stop()
                code += 0 if client._core.portal.join(1) else 4
                os._exit(code)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            return os.waitstatus_to_exitcode(status)

    assert asyncio.run(main()) == 0
