"""One scenario for three fronts: trio, asyncio and threads, and the servers that it talks to.

A scenario is an async function of a `Front`. On trio and asyncio it runs as it is; for threads, `Front.face` makes
awaitables of the blocking methods that have their result at once, so that the same lines run there.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Literal, cast

import trio

import gorouter_trio as gr
from gorouter_trio._fronts.common import drive
from gorouter_trio.simulator import Simulator, SimulatorConfig, serve_simulator

Kind = Literal["trio", "aio", "blocking"]
KINDS: tuple[Kind, ...] = ("trio", "aio", "blocking")

# What does not wait, on all fronts.
PLAIN = {
    "session", "use", "unuse", "add_hook", "remove_hook", "on", "off", "cost_snapshot", "ledger_rows", "budget",
    "budgets",
    "price", "set_prices", "start_price_refresh", "stop_price_refresh", "cancel", "session_statistics", "inspect",
    "observe", "unobserve", "observe_ledger", "unobserve_ledger", "flush_observers", "add_tracer", "remove_tracer",
    "metrics_text", "add_metrics", "remove_metrics", "set_model", "set_api_key", "set_store", "set_security",
    "push_security", "push_store", "set_cost_tracker", "progress", "drain",
}  # fmt: skip
OWN_THREAD = ("gorouter-trio runtime",)


# --- servers in a thread ----------------------------------------------------------------------------------------------


@contextmanager
def serving_in_thread(serve: Callable[..., Awaitable[object]]) -> Iterator[Any]:
    """Runs `serve` with a task status in a trio loop of its own, and yields what that was started with."""
    began, stop = threading.Event(), threading.Event()
    found: list[Any] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            found.extend([await nursery.start(serve), trio.lowlevel.current_trio_token(), nursery.cancel_scope])
            began.set()
            await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,), name="server", daemon=True)
    thread.start()
    assert began.wait(10)
    try:
        yield found[0]
    finally:
        stop.set()
        found[1].run_sync_soon(found[2].cancel)
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def simulator_in_thread(config: SimulatorConfig | None = None) -> Iterator[str]:
    """A simulator on a real socket; yields its base URL."""
    with serving_in_thread(partial(serve_simulator, Simulator(config or SimulatorConfig()))) as base_url:
        yield cast("str", base_url)


class Stage:
    """A server that stops where a test wants it to, and tells how far it is. Used from the test's thread.

    A prompt "hang" is never answered; "endless" is streamed until the client goes; "halt N" is streamed for N pieces
    and then for nothing more until `go_on`; "say N" has N pieces and ends; anything else is answered with itself.
    """

    def __init__(self) -> None:
        self.base_url = ""
        self.arrived = threading.Semaphore(0)
        """Raised for each request that is there."""
        self.halted = threading.Semaphore(0)
        self.left = threading.Semaphore(0)
        """Raised for each reply that its client did not wait for."""
        self.pieces_sent = 0
        self.connections = 0
        self.prompts: list[str] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._may_go_on = trio.Event()

    def go_on(self) -> None:
        """Let every reply that has halted go on."""
        assert self._token is not None
        self._token.run_sync_soon(self._may_go_on.set)

    async def serve(self, *, task_status: trio.TaskStatus[Stage]) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.base_url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/api/v1"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_listeners, self._talk, listeners))
            task_status.started(self)

    async def _talk(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        buffer = b""
        try:
            while True:
                while b"\r\n\r\n" not in buffer:
                    buffer += (received := await stream.receive_some())
                    if not received:
                        raise trio.BrokenResourceError
                head, _, buffer = buffer.partition(b"\r\n\r\n")
                length = next(
                    (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
                )
                while len(buffer) < length:
                    buffer += await stream.receive_some()
                body, buffer = buffer[:length], buffer[length:]
                await self._answer(stream, json.loads(body or b"{}"))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # The client has gone.
        finally:
            self.connections -= 1
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.SocketStream, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"] if "messages" in body else ""
        self.prompts.append(prompt)
        self.arrived.release()
        word, _, number = prompt.partition(" ")
        if word == "hang":
            await self._wait_left(stream)
        elif not body.get("stream"):
            message = {"role": "assistant", "content": prompt}
            reply = {"id": "gen-1", "model": "m", "choices": [{"finish_reason": "stop", "message": message}]}
            await stream.send_all(_http(json.dumps(reply).encode()))
        else:
            await self._stream(stream, word, int(number) if number.isdigit() else 2)

    async def _stream(self, stream: trio.SocketStream, word: str, number: int) -> None:
        await stream.send_all(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        while word == "endless" or sent < number:
            try:
                await stream.send_all(_piece("piece ", None))
            except trio.BrokenResourceError:
                self.left.release()
                raise
            sent += 1
            self.pieces_sent += 1
        if word == "halt":
            self.halted.release()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wait_left, stream)
                await self._may_go_on.wait()
                nursery.cancel_scope.cancel()
        await stream.send_all(_piece("", "stop") + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def _wait_left(self, stream: trio.SocketStream) -> None:
        try:
            received = await stream.receive_some()
        except trio.BrokenResourceError:
            received = b""
        assert not received
        self.left.release()
        raise trio.BrokenResourceError


def _http(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _piece(text: str, finish: str | None) -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    event = b"data: " + json.dumps({"id": "gen-1", "model": "m", "choices": [choice]}).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


@contextmanager
def staged() -> Iterator[Stage]:
    """A stage on a real socket."""
    with serving_in_thread(Stage().serve) as stage:
        yield cast("Stage", stage)


def settings(base_url: str, **fields: object) -> dict[str, Any]:
    """Settings of a client of such a server, which has no list of prices to fetch."""
    prices = gr.PricePolicy(on_start=False, refresh_s=None)
    return {"api_key": "sk-fronts", "base_url": base_url, "prices": prices, **fields}


# --- the three fronts -------------------------------------------------------------------------------------------------


class Front:
    """What a scenario is given: how to open a client, and how to write a function for it."""

    def __init__(self, kind: Kind, base_url: str) -> None:
        self.kind = kind
        self.base_url = base_url

    @asynccontextmanager
    async def open_client(self, **fields: object) -> AsyncIterator[Any]:
        """A client, with awaitable methods."""
        given = settings(self.base_url, **fields)
        if self.kind == "trio":
            async with gr.open_client(**given) as client:
                yield client
        elif self.kind == "aio":
            async with gr.aio.open_client(**given) as client:
                yield client
        else:
            with gr.blocking.open_client(**given) as client:
                yield _Face(client)

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """An async function that waits for nothing but its arguments, in the form that this front takes."""
        if self.kind != "blocking":
            return function

        def run(*args: Any) -> Any:
            return drive(function(*map(_awaitable, args)))

        run.__name__ = function.__name__
        return run


def _awaitable(argument: Any) -> Any:
    if isinstance(argument, gr.blocking.Client):
        return _Face(argument)
    if not inspect.isfunction(argument):
        return argument

    async def call() -> Any:
        return argument()

    return call


def run_scenario(kind: Kind, scenario: Callable[[Front], Awaitable[Any]], base_url: str) -> Any:
    """What the scenario returns on this front."""
    front = Front(kind, base_url)
    if kind == "trio":
        return trio.run(scenario, front)
    if kind == "aio":
        return asyncio.run(cast("Any", scenario(front)))
    return drive(cast("Any", scenario(front)))


class _Face:
    """An object of the front for threads with awaitable methods."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "aclose":
            name = "close"
        value = getattr(self._inner, name)
        if not callable(value) or name in {"store", "security", "cost_tracker"}:
            return _faced(value)
        if name in PLAIN or (name == "statistics" and not isinstance(self._inner, gr.blocking.SessionRef)):
            return lambda *args, **named: _faced(value(*args, **named))
        if name in {"stream", "batch", "batch_job", "events"}:
            return lambda *args, **named: _FacedContext(value(*args, **named))

        async def call(*args: Any, **named: Any) -> Any:
            return _faced(value(*args, **named))

        return call

    def __repr__(self) -> str:
        return repr(self._inner)

    def __aiter__(self) -> _Face:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._inner)
        except StopIteration:
            raise StopAsyncIteration from None


class _FacedContext:
    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __enter__(self) -> Any:
        return _faced(self._opened.__enter__())

    def __exit__(self, *exc: object) -> Any:
        return self._opened.__exit__(*exc)

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> Any:
        return self._opened.__exit__(*exc)


def _faced(value: Any) -> Any:
    front = gr.blocking
    kinds = (front.SessionRef, front.ChatStream, front.Batch, front.RunningJob, front.EventFeed)
    is_iterator = type(value).__name__ == "_Each"
    return _Face(value) if isinstance(value, kinds) or is_iterator else value
