"""The front for threads: many of them, deadlines, backpressure, Ctrl-C, callbacks, and what is left behind."""

from __future__ import annotations

import contextvars
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import outcome
import pytest
from fronted import OWN_THREAD, Stage, settings, simulator_in_thread, staged

import gorouter_trio as gr
from gorouter_trio import blocking
from gorouter_trio.security import ApiKeyAuth, Principal, SecurityConfig

pytestmark = pytest.mark.net

REPOSITORY = Path(__file__).parents[2]
_VAR: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="nothing")


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with simulator_in_thread() as url:
        yield url


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as found:
        yield found


def reached(semaphore: threading.Semaphore) -> None:
    """Wait for something that happens in another thread."""
    assert semaphore.acquire(timeout=20)


def own_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name in OWN_THREAD]


def in_thread(work: Callable[..., Any], *args: object) -> Future[Any]:
    """What a thread of its own comes to."""
    found: Future[Any] = Future()

    def run() -> None:
        captured = outcome.capture(work, *args)
        if isinstance(captured, outcome.Error):
            found.set_exception(captured.error)
        else:
            found.set_result(captured.value)

    threading.Thread(target=run, daemon=True).start()
    return found


def test_a_thousand_calls_from_many_threads(base_url: str) -> None:
    """Each gets its own answer."""
    with blocking.open_client(**settings(base_url)) as client, ThreadPoolExecutor(100) as threads:
        replies = list(threads.map(lambda number: client.chat(f"[[say {number}]]").text, range(1_000)))
    assert replies == [str(number) for number in range(1_000)]


def test_a_deadline_stops_the_request(stage: Stage) -> None:
    """For whole calls and for streams, with the type that it has everywhere."""
    with blocking.open_client(**settings(stage.base_url)) as client:
        with pytest.raises(gr.DeadlineExceededError) as caught:
            client.chat("hang", deadline_s=0.05)
        assert (caught.value.phase, caught.value.maybe_billed) == ("total", True)
        reached(stage.left)
        with pytest.raises(gr.DeadlineExceededError), client.stream("halt 3", deadline_s=0.2) as stream:
            stream.collect()
        reached(stage.left)
        with pytest.raises(gr.DeadlineExceededError), client.stream("hang", deadline_s=0.05):
            pass
        for wrong in (-1, float("nan"), "1", True):
            with pytest.raises(gr.ConfigError, match="deadline_s"):
                client.chat("hello", deadline_s=wrong)  # type: ignore[arg-type]  # that is the point


def test_a_stream_left_early_closes_its_connection(stage: Stage) -> None:
    """Also when the body raises."""
    with blocking.open_client(**settings(stage.base_url)) as client:
        with client.stream("endless") as stream:
            for _event in stream:
                break
        reached(stage.left)
        with pytest.raises(ZeroDivisionError), client.stream("endless") as stream:
            next(stream)
            _ = 1 / 0
        reached(stage.left)


def test_a_reader_that_stops_stops_the_server(stage: Stage) -> None:
    """What is read ahead is bounded."""
    with blocking.open_client(**settings(stage.base_url)) as client, client.stream("endless") as stream:
        next(stream)
        sent = -1
        while sent != stage.pieces_sent:
            sent = stage.pieces_sent
            threading.Event().wait(0.1)
        assert len(stream._core._lots._lent._items) < 2_000


def test_closing_answers_every_call_that_runs(stage: Stage) -> None:
    """Whoever waits in another thread gets an error."""

    def read(client: blocking.Client) -> None:
        with client.stream("halt 2") as stream:
            stream.collect()

    with blocking.open_client(**settings(stage.base_url)) as client:
        waiting = [in_thread(client.chat, "hang"), in_thread(client.session("s").ask, "hang"), in_thread(read, client)]
        for _ in waiting:
            reached(stage.arrived)
        reached(stage.halted)
    assert all(isinstance(each.exception(20), gr.GorouterError) for each in waiting)
    assert isinstance(waiting[0].exception(), gr.PoolClosedError)
    assert [cast("gr.GorouterError", each.exception()).maybe_billed for each in waiting] == [True] * 3
    assert own_threads() == []


def test_calls_that_race_with_the_end_are_answered(base_url: str) -> None:
    """Each has an answer or a `PoolClosedError`; none waits for ever."""

    def hammer(client: blocking.Client, go: threading.Event) -> None:
        while True:
            client.chat("[[say x]]")
            go.set()

    for _ in range(5):
        go = threading.Event()
        with blocking.open_client(**settings(base_url)) as client:
            waiting = [in_thread(hammer, client, go) for _ in range(8)]
            assert go.wait(20)
        assert {type(each.exception(20)) for each in waiting} == {gr.PoolClosedError}


def test_several_threads_read_one_batch(base_url: str) -> None:
    """Each result goes to one of them, and all of them hear of the end."""
    rows = [{"messages": [{"role": "user", "content": f"[[say {number}]]"}]} for number in range(100)]
    with blocking.open_client(**settings(base_url)) as client, client.batch(rows) as results:
        readers = [in_thread(lambda: [result.unwrap().text for result in results]) for _ in range(5)]
        found = [text for reader in readers for text in reader.result(20)]
    assert sorted(map(int, found)) == list(range(100))


def test_whoever_still_reads_what_was_left_hears_of_the_end(stage: Stage) -> None:
    """Threads that wait for the next event do not wait for ever, nor does who reads on behind the end."""
    with blocking.open_client(**settings(stage.base_url)) as client:
        with client.events(gr.ChatFailed) as feed:
            readers = [in_thread(list, feed) for _ in range(3)]
            while len(feed._lots._reading) < 3:
                threading.Event().wait(0.001)
        assert [reader.result(20) for reader in readers] == [[], [], []]
        with client.stream("halt 2") as stream:
            reached(stage.halted)
        assert in_thread(list, stream).result(20) is not None


def test_the_callers_variables_reach_its_functions(base_url: str) -> None:
    """Tools, approvals and middleware see them, in worker threads."""
    seen: list[tuple[str, str, bool]] = []

    def note(what: str) -> None:
        seen.append((what, _VAR.get(), threading.current_thread() is threading.main_thread()))

    def tool(city: str) -> str:
        note("tool")
        return city

    def middleware(context: gr.ChatContext, state: gr.ChatState, proceed: Callable[[], None]) -> None:
        note("middleware")
        proceed()

    with blocking.open_client(**settings(base_url)) as client:
        client.use(middleware)
        client.add_hook(gr.Hook(before=lambda context, state: note("hook")))
        _VAR.set("mine")
        client.chat('[[call tool {"city": "Aber"}]]', tools=[tool])
    assert seen == [("middleware", "mine", False), ("hook", "mine", False), ("tool", "mine", False)]


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
    """At once, instead of waiting until its time is up; others it may ask."""
    token = ADA if guard else {}
    with blocking.open_client(**settings(base_url, **guard)) as client:

        def ask_again(city: str) -> str:
            with pytest.raises(gr.SessionBusyError, match="wait for itself"):
                session.history()
            return client.session("other", **token).ask("[[say y]]").text

        session = client.session("s", tools=[ask_again], **token)
        reply = session.ask('[[call ask_again {"city": "Aber"}]]', deadline_s=20)
        assert [call.text for call in reply.tool_calls] == ["y"]


def test_a_tool_may_be_an_object_without_a_hash(base_url: str) -> None:
    """It is called like any other."""

    class Counter:
        __name__ = "count"

        def __init__(self) -> None:
            self.calls = 0

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Counter)

        __hash__ = None  # type: ignore[assignment]  # that is the point

        def __call__(self, city: str) -> int:
            self.calls += 1
            return self.calls

    with blocking.open_client(**settings(base_url)) as client:
        reply = client.chat('[[call count {"city": "Aber"}]]', tools=[Counter()])
        assert [call.text for call in reply.tool_calls] == ["1"]


def test_many_middlewares_at_once_do_not_wait_for_each_others_threads(base_url: str) -> None:
    """Each holds a thread while the next one wants another."""

    def middleware(context: gr.ChatContext, state: gr.ChatState, proceed: Callable[[], None]) -> None:
        proceed()

    def other(context: gr.ChatContext, state: gr.ChatState, proceed: Callable[[], None]) -> None:
        proceed()

    rows = [{"messages": [{"role": "user", "content": "[[say x]]"}]} for _ in range(60)]
    with blocking.open_client(**settings(base_url)) as client:
        client.use(middleware)
        client.use(other)
        with client.batch(rows, max_in_flight=60) as results:
            assert {result.unwrap().text for result in results} == {"x"}


def test_a_middleware_that_goes_on_too_late_is_told_so(base_url: str) -> None:
    """When its chat has been given up meanwhile: nobody else's call suffers."""
    late, found = threading.Event(), Future[Any]()

    def slow(context: gr.ChatContext, state: gr.ChatState, proceed: Callable[[], None]) -> None:
        assert late.wait(20)
        found.set_result(outcome.capture(proceed))

    with blocking.open_client(**settings(base_url)) as client:
        client.use(slow)
        with pytest.raises(gr.DeadlineExceededError):
            client.chat("[[say x]]", deadline_s=0.05)
        client.unuse(slow)
        late.set()
        assert isinstance(found.result(20).error, gr.ConfigError)
        assert client.chat("[[say y]]", deadline_s=20).text == "y"


def test_a_function_that_ends_its_thread_ends_nothing_else(base_url: str) -> None:
    """Neither a handler that does takes the client along, nor a middleware."""

    def leave(*args: object) -> None:
        sys.exit(3)

    with blocking.open_client(**settings(base_url)) as client:
        client.on(gr.ChatFinished, leave)
        with client.events(gr.HandlerFailed) as feed:
            assert client.chat("[[say x]]").text == "x"
            assert "SystemExit" in str(next(feed).error)
        client.use(leave)
        with pytest.raises(gr.ExtensionError, match="SystemExit"):
            client.chat("[[say x]]")
        client.unuse(leave)
        assert client.chat("[[say y]]").text == "y"


def test_async_functions_are_refused(base_url: str) -> None:
    """Where they could not run, before anything happens."""

    async def handler(event: gr.ChatFinished) -> None: ...

    with blocking.open_client(**settings(base_url)) as client:
        with pytest.raises(gr.ConfigError, match="plain function"):
            client.on(gr.ChatFinished, handler)
        with pytest.raises(gr.ConfigError, match="plain function"):
            client.use(handler)
        with pytest.raises(gr.ConfigError, match="plain"), client.stream("[[say x]]") as stream:
            stream.run(on_content=lambda text: _Waiting())


class _Waiting:
    """What would wait for a loop."""

    def __await__(self) -> Iterator[None]:
        yield


def test_the_runtime_does_not_wait_for_itself(base_url: str) -> None:
    """A call in the thread of the runtime is refused instead of hanging."""
    with blocking.open_client(**settings(base_url)) as client:
        found: Future[object] = Future()

        def call() -> None:
            try:
                client.statistics()
            except gr.ConfigError as exc:
                found.set_result(str(exc))

        client._core.portal.tell(call)
        assert "wait for itself" in str(found.result(20))


# --- the end of a process ---------------------------------------------------------------------------------------------

_HEAD = """
import os, signal, sys, threading, time
import gorouter_trio as gr
settings = dict(api_key="sk-fronts", base_url=sys.argv[1], prices=gr.PricePolicy(on_start=False, refresh_s=None))
def own():
    return [t.name for t in threading.enumerate() if t.name == "gorouter-trio runtime"]
"""

_INTERRUPTED = (
    _HEAD
    + """
try:
    with gr.blocking.open_client(**settings) as client:
        print("open", flush=True)
        try:
            {work}
        except KeyboardInterrupt:
            print("interrupted", client.statistics().queued, flush=True)
            print(client.chat("again").text, flush=True)
            raise
except KeyboardInterrupt:
    print("left", own(), flush=True)
"""
)


def run_code(code: str, base_url: str) -> subprocess.Popen[str]:
    """A program in a process of its own."""
    return subprocess.Popen(
        # Started in the background of a shell, a process would ignore Ctrl-C.
        [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler)\n{code}", base_url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


@pytest.mark.parametrize(
    "work",
    [
        'client.chat("hang")',
        'client.session("s").ask("hang")',
        'with client.stream("halt 2") as stream: stream.collect()',
        'with client.batch([{"messages": [{"role": "user", "content": "hang"}]}]) as results: next(results)',
    ],
    ids=["chat", "ask", "stream", "batch"],
)
def test_ctrl_c_stops_the_request_and_leaves_no_thread(stage: Stage, work: str) -> None:
    """It is raised where the program waits, the client may be used on, and the end of it is an ordinary one."""
    with run_code(_INTERRUPTED.format(work=work), stage.base_url) as program:
        reached(stage.arrived)
        if "halt" in work:
            reached(stage.halted)
        program.send_signal(signal.SIGINT)
        output, errors = program.communicate(timeout=30)
    assert output.splitlines() == ["open", "interrupted 0", "again", "left []"], errors
    assert program.returncode == 0, errors


@pytest.mark.parametrize("front", ["blocking", "aio"])
def test_ctrl_c_while_many_threads_and_tasks_wait(stage: Stage, front: str) -> None:
    """The program ends, soon, and as one that was interrupted."""
    work = {
        "blocking": "kept = gr.blocking.open_client(**settings)\nclient = kept.__enter__()\n"
        "for _ in range(5): threading.Thread(target=client.chat, args=('hang',), daemon=True).start()\n"
        "client.chat('hang')",
        "aio": "import asyncio\nasync def main():\n"
        "    async with gr.aio.open_client(**settings) as client:\n"
        "        await asyncio.gather(*(client.chat('hang') for _ in range(6)))\n"
        "asyncio.run(main())",
    }
    with run_code(_HEAD + work[front], stage.base_url) as program:
        for _ in range(6):
            reached(stage.arrived)
        program.send_signal(signal.SIGINT)
        _output, errors = program.communicate(timeout=30)
    assert program.returncode in {-signal.SIGINT, 130}, errors
    assert "KeyboardInterrupt" in errors
    assert "Fatal Python error" not in errors


@pytest.mark.parametrize(
    "code",
    [
        "kept = gr.blocking.open_client(**settings); client = kept.__enter__(); client.session('s').ask('one')",
        "kept = gr.blocking.open_client(**settings); client = kept.__enter__()\n"
        "held = client.stream('endless'); stream = held.__enter__(); next(stream)",
        "client = gr.blocking.open_client(**settings).__enter__()",
        "import asyncio\nkept = gr.aio.open_client(**settings)\nasyncio.run(kept.__aenter__())",
        "import asyncio\nloop = asyncio.new_event_loop()\nkept = gr.aio.open_client(**settings)\n"
        "client = loop.run_until_complete(kept.__aenter__())\nloop.run_until_complete(client.chat('one'))",
    ],
    ids=["session", "stream", "forgotten", "asyncio", "loop"],
)
def test_the_interpreter_ends_with_a_client_left_open(stage: Stage, code: str) -> None:
    """It does not hang, and says nothing."""
    with run_code(_HEAD + code + "\nprint('over', flush=True)", stage.base_url) as program:
        output, errors = program.communicate(timeout=30)
    assert (output, program.returncode) == ("over\n", 0), errors
    assert "Error" not in errors
    assert "Exception" not in errors


def test_what_a_left_client_holds_is_saved_at_exit(stage: Stage, tmp_path: Path) -> None:
    """The end of the interpreter is an ordinary end of the client, as far as it is soon."""
    code = (
        f"store = gr.stores.SqliteStore({str(tmp_path / 'kept.db')!r})\n"
        "kept = gr.blocking.open_client(store=store, **settings)\nclient = kept.__enter__()\n"
        "held = client.session('s').stream('halt 2')\nstream = held.__enter__()\nnext(stream)"
    )
    with run_code(_HEAD + code, stage.base_url) as program:
        _, errors = program.communicate(timeout=30)
    assert program.returncode == 0, errors
    store = gr.stores.SqliteStore(tmp_path / "kept.db")
    with blocking.open_client(**settings(stage.base_url, store=store)) as client:
        contents = [entry.message.content for entry in client.session("s").history()]
    assert contents[0] == "halt 2"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_is_refused_and_ends(stage: Stage) -> None:
    """Calls there raise, leaving the block and the end of the interpreter do not hang, and the parent goes on."""
    code = (
        _HEAD
        + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
with gr.blocking.open_client(**settings) as client:
    client.chat("before")
    child = os.fork()
    try:
        said = f"{'parent' if child else 'child'} {client.chat('after').text}"
    except gr.ConfigError as exc:
        said = f"refused: {'forked' in str(exc)}"
    # In one piece: two processes write.
    os.write(1, f"{said}\\n".encode())
    if child:
        os.write(1, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\\n".encode())
"""
    )
    with run_code(code, stage.base_url) as program:
        output, errors = program.communicate(timeout=30)
    assert sorted(output.splitlines()) == ["0", "parent after", "refused: True"], errors
    assert program.returncode == 0, errors
