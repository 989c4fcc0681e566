"""Sweeps go through every step, find what is right clean, and catch what is broken at the step where it breaks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from decimal import Decimal
from functools import partial
from typing import Any, Unpack

import pytest
import trio

import gorouter_trio as gr
from gorouter_trio._turns.stream import ChatStream
from gorouter_trio.client import Client
from gorouter_trio.pool.budget import BudgetBook, Reservation
from gorouter_trio.pool.workers import Pool, Ticket
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.testing import (
    FailStore,
    Hang,
    Link,
    Say,
    ScriptedModel,
    Stall,
    SweepReport,
    World,
    WorldSettings,
    check_sent_once,
    sweep,
    sweep_io,
    use_tool,
)
from gorouter_trio.testing.faults import Direction
from gorouter_trio.testing.sweep import Steps
from gorouter_trio.transport.http_server import ServerReply, ServerRequest
from gorouter_trio.wire.codec import encode_prompt, render_body
from gorouter_trio.wire.mail import HttpCall
from gorouter_trio.wire.requests import ChatKeywords

Scenario = Callable[[World], Awaitable[object]]

SIMULATOR = SimulatorConfig(latency_s=0.5, first_token_s=0.2, tokens_per_s=60, jitter=0.3, reply_tokens=8)
SETTINGS: WorldSettings = {"simulator": SIMULATOR, "link": Link(latency_s=0.05, jitter_s=0.02)}


async def _chat(world: World) -> None:
    await world.client.chat("Hello?")


async def _stream(world: World) -> None:
    async with world.client.stream("Hello?") as stream:
        await stream.collect()


async def _ask(world: World) -> None:
    await world.client.session("s").ask("Hello?")


async def _session_stream(world: World) -> None:
    async with world.client.session("s").stream("Hello?") as stream:
        await stream.collect()


async def _batch(world: World) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Row {number}"}]} for number in range(2)]
    async with world.client.batch(rows, max_in_flight=2) as results:
        async for _result in results:
            pass


async def _shutdown(world: World) -> None:
    """A client that is closed while a session is asked, a stream is read and a chat waits."""
    async with world.open_client(pool=gr.PoolLimits(max_connections=2)) as client, trio.open_nursery() as nursery:
        for work in (client.session("s").ask, client.chat, client.chat):
            nursery.start_soon(work, "Hello?")
        await trio.sleep(0.6)
        nursery.cancel_scope.cancel()


async def _limited(world: World) -> None:
    """Chats of two lanes and a stream that wait for rates, for keys and for each other, and one that is tried again."""

    async def stream() -> None:
        async with world.client.stream("Hello?") as reply:
            await reply.collect()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(world.client.chat, "[[fault 429_upstream x1]]", lane="batch", tenant="t"))
        nursery.start_soon(world.client.chat, "Hello?")
        nursery.start_soon(stream)


async def _paced(world: World) -> None:
    """A stream and a chat, one after the other, which wait for their turn."""
    await _stream(world)
    await _chat(world)


@asynccontextmanager
async def _with_limits(world: World) -> AsyncIterator[None]:
    rates = gr.RateLimits(requests_per_minute=120, tokens_per_minute=12_000, max_in_flight=1)
    async with world.open_client(api_key={"sk-a": 1, "sk-b": 1}, rates=rates):
        yield
        # What was taken and not used is given back, if not at once: the cost of a lost answer may be looked up now.
        with trio.fail_after(60):
            while any(key.in_flight for key in world.client.statistics().keys):
                await trio.sleep(0.1)
        s = world.client.statistics()
        assert [model.in_flight for model in s.models] == [0] * len(s.models)


SCENARIOS = [_chat, _stream, _ask, _session_stream, _batch, _shutdown, _paced, _limited]


def _name(scenario: object) -> str:
    return getattr(scenario, "__name__", "?").strip("_")


def _setup(scenario: Scenario) -> Callable[[World], AbstractAsyncContextManager[object]] | None:
    if scenario in {_limited, _paced}:
        return _with_limits
    return (lambda _world: nullcontext()) if scenario is _shutdown else None


def _lively(world: World) -> Awaitable[None] | None:
    """A check: the client that was struck answers the next request."""
    return _answers(world) if world.clients else None


async def _answers(world: World) -> None:
    world.serve(world.simulator)
    with trio.fail_after(30):
        assert (await world.client.chat("And now?")).text
        assert (await world.client.session("s").ask("And now?")).text


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
def test_every_step_can_be_cancelled(
    scenario: Scenario, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """After a cancel at any step of any task, everything is as it was and the client answers."""
    report = sweep(scenario, setup=_setup(scenario), check=_lively, seed=seed, **SETTINGS)
    report.raise_failures()
    assert report.steps >= 10
    assert report.runs == report.steps + 1
    record_property("figure", f"cancel sweep of {_name(scenario)}: {report.steps} steps, all clean")


# What `_limited` itself waits for is its nursery, whose error is a group.
@pytest.mark.parametrize("scenario", SCENARIOS[:-1], ids=_name)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
def test_every_wait_can_raise(
    scenario: Scenario, sticky: bool, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """After an exception at any place where the scenario waits, once or at each from there on, the same."""
    report = sweep(
        scenario,
        setup=_setup(scenario),
        check=_lively,
        seed=seed,
        error=BoomError,
        sticky=sticky,
        at="scenario",
        **SETTINGS,
    )
    report.raise_failures()
    kind = "sticky raise" if sticky else "raise"
    record_property("figure", f"{kind} sweep of {_name(scenario)}: {report.steps} steps, all clean")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
def test_every_operation_can_fail(
    scenario: Scenario, sticky: bool, seed: int, record_property: Callable[[str, object], None]
) -> None:
    """After a failure of any operation on network or store, with all retries, the same."""
    report = sweep_io(
        scenario,
        setup=_setup(scenario),
        check=_lively,
        seed=seed,
        sticky=sticky,
        allow=(gr.GorouterError, ExceptionGroup),
        **SETTINGS,
    )
    report.raise_failures()
    assert report.steps >= 3
    kind = "sticky fail" if sticky else "fail"
    record_property("figure", f"{kind} sweep of {_name(scenario)}: {report.steps} operations, all clean")


@pytest.mark.long
@pytest.mark.timeout(3_600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=_name)
@pytest.mark.parametrize("make", [RuntimeError, OSError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_every_step_with_many_seeds(scenario: Scenario, make: type[BaseException], seed: int) -> None:
    """The sweeps hold for other interleavings, and for exceptions that end programs."""
    for number in range(5):
        sweep(scenario, setup=_setup(scenario), check=_lively, seed=seed + number, **SETTINGS).raise_failures()
        sweep(
            scenario, setup=_setup(scenario), check=_lively, seed=seed + number, error=make, **SETTINGS
        ).raise_failures()


class BoomError(Exception):
    """What a sweep raises."""


# --- what is broken ---------------------------------------------------------------------------------------------------


class LeakyClient(Client):
    """Forgets to give the connection back when a stream is left otherwise than at its end."""

    @asynccontextmanager
    async def stream(  # type: ignore[override]  # what the scenario uses
        self, prompt: object, *, raw_chunks: bool = False, **options: Unpack[ChatKeywords]
    ) -> AsyncIterator[ChatStream]:
        body = render_body(self._defaults.call(options)[0], encode_prompt(prompt), streaming=True)  # type: ignore[arg-type]  # a str
        reader = await self._runtime.pipeline.open_reader(HttpCall(body=body, streaming=True))
        yield ChatStream(reader, raw_chunks=raw_chunks)
        reader.close()


def _failed_steps(report: SweepReport, problem: str) -> set[int]:
    return {failure.step for failure in report.failures if problem in failure.problem}


def _assert_fails_to_the_end(report: SweepReport, problem: str) -> None:
    """Every step fails but the last ones, in which the answer is there and nothing is left that could be struck."""
    failed = _failed_steps(report, problem)
    assert failed == set(range(1, len(failed) + 1))
    assert len(failed) >= max(1, report.steps - 3)


def test_a_leaked_slot_is_caught() -> None:
    """A client that loses its slot on a cancel fails at the steps at which the stream was open, and no sooner."""

    async def scenario(world: World) -> None:
        async with LeakyClient(world.client._runtime).stream("Hello?") as stream:
            await stream.collect()

    report = sweep(scenario, **SETTINGS)
    leaks = _failed_steps(report, "1 pool slots are taken, 0 were before")
    assert leaks
    assert min(leaks) > 5
    assert 0 not in leaks
    assert not report.is_clean
    with pytest.raises(AssertionError, match="pool slots are taken"):
        report.raise_failures()
    assert sweep(_stream, **SETTINGS).is_clean


def test_a_leaked_hold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that keeps a place of the model and of the key for a cancelled request fails, for both of them."""
    release = Pool.release

    def forget(pool: Pool, ticket: Ticket) -> None:
        release(pool, ticket)
        if ticket.route is not None and not ticket.status:
            ticket.route.in_flight += 1
            ticket.route.key.in_flight += 1

    monkeypatch.setattr(Pool, "release", forget)
    report = sweep(_chat, **SETTINGS)
    of_model = _failed_steps(report, "1 requests of model 'openai/gpt-4o-mini' are in flight, 0 were before")
    assert of_model
    assert 0 not in of_model
    assert of_model == _failed_steps(report, "are in flight, 0 were before") == _failed_steps(report, "of key '0'")


@asynccontextmanager
async def _with_budget(world: World) -> AsyncIterator[None]:
    async with world.open_client(budget=gr.Budget(usd=100, unpriced_usd="0.01")):
        yield


def test_a_leaked_reservation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that goes on holding what was set aside for a cancelled request fails, with the count and the money."""
    settle = BudgetBook.settle

    def settle_if_known(book: BudgetBook, reservation: Reservation, usd: Decimal | None) -> None:
        if usd is not None:
            settle(book, reservation, usd)

    sweep(_chat, setup=_with_budget, **SETTINGS).raise_failures()
    monkeypatch.setattr(BudgetBook, "release", lambda _book, _reservation: None)
    monkeypatch.setattr(BudgetBook, "settle", settle_if_known)
    report = sweep(_chat, setup=_with_budget, **SETTINGS)
    leaks = _failed_steps(report, "1 reservations are held, 0 were before")
    assert leaks
    assert 0 not in leaks
    assert leaks == _failed_steps(report, "0.01 USD of the budget of the client are held, 0 were before")


def test_the_cost_of_a_lost_answer_is_waited_for() -> None:
    """What is set aside until the cost of a cancelled stream was looked up is not lost, however long that takes."""
    slow = SimulatorConfig(latency_s=0.5, tokens_per_s=20, reply_tokens=8, generation_lag_s=60)
    sweep(_stream, setup=_with_budget, simulator=slow).raise_failures()


@pytest.mark.parametrize("at", ["all", "scenario"])
def test_a_swallowed_cancel_is_caught(at: Steps) -> None:
    """A scenario that goes on after its cancel fails at every step that could be cancelled."""

    async def scenario(world: World) -> None:
        try:
            await world.client.chat("Hello?")
        except trio.Cancelled:
            world.record("swallowed")

    report = sweep(scenario, at=at, **SETTINGS)
    _assert_fails_to_the_end(report, "swallowed its cancel")


def test_a_swallowed_error_is_caught() -> None:
    """What is raised into a scenario has to come out of it."""

    async def scenario(world: World) -> None:
        try:
            await world.client.chat("Hello?")
        except BoomError:
            world.record("swallowed")

    report = sweep(scenario, error=BoomError, at="scenario", **SETTINGS)
    _assert_fails_to_the_end(report, "swallowed BoomError")


def test_another_error_is_caught() -> None:
    """A cancelled scenario that raises something of its own instead is told, unless that is allowed."""

    async def scenario(world: World) -> None:
        try:
            await world.client.chat("Hello?")
        except trio.Cancelled as exc:
            raise LookupError("instead") from exc

    report = sweep(scenario, **SETTINGS)
    _assert_fails_to_the_end(report, "LookupError: instead")
    assert sweep(scenario, allow=(LookupError,), **SETTINGS).is_clean


class LossyStore(MemoryStore):
    """Writes answers down without their tool calls, so that what the tools say is left over."""

    async def append(self, key: str, entries: object, *, expected_version: int) -> int:
        lossy = [_without_calls(entry) for entry in entries]  # type: ignore[attr-defined]  # entries of a session
        return await super().append(key, lossy, expected_version=expected_version)


def _without_calls(entry: bytes) -> bytes:
    before, found, rest = entry.partition(b',"tool_calls":[')
    return before + rest[rest.index(b"]") + 1 :] if found else entry


async def _use_a_tool(world: World) -> None:
    world.serve(ScriptedModel([use_tool("weather"), Say("It is cold.", after_s=1)], loop=True))
    session = world.client.session("s")
    reply = await session.ask("How is the weather?")
    call_id = (reply.message.tool_calls or [])[0].id
    await session.ask([gr.ToolMessage(tool_call_id=call_id, content="3 degrees")])


def test_a_tool_call_may_be_cancelled_anywhere() -> None:
    """A session in the middle of a tool call can go on after every cancel."""
    sweep(_use_a_tool, check=_lively, **SETTINGS).raise_failures()


def test_an_orphan_tool_message_is_caught() -> None:
    """A history with a tool message that answers nothing is found, in what would be sent next as well."""

    @asynccontextmanager
    async def with_a_lossy_store(world: World) -> AsyncIterator[None]:
        async with world.open_client(store=LossyStore()):
            yield

    async def scenario(world: World) -> None:
        await _use_a_tool(world)
        # A client that is opened later reads what was stored.
        async with world.open_client(store=world.client._runtime.store) as later:
            await later.session("s").ask("Thanks.")

    report = sweep(scenario, setup=with_a_lossy_store, **SETTINGS)
    assert not report.is_clean
    assert any("tool" in failure.problem for failure in report.failures)
    assert sweep(scenario, at="scenario", **SETTINGS).is_clean


def test_an_orphan_in_a_request_is_caught() -> None:
    """A bot that sends a tool message without its call is refused by the world, and the sweep tells."""

    async def scenario(world: World) -> None:
        prompt: list[gr.Message] = [gr.UserMessage("Hi"), gr.ToolMessage(tool_call_id="call_1", content="3 degrees")]
        await world.client.chat(prompt)

    report = sweep(scenario, allow=(gr.BadRequestError,), **SETTINGS)
    assert _failed_steps(report, "a provider would refuse a request") == {0}
    assert report.steps == 0


class DoubleClient(Client):
    """Sends everything twice, and gives out the second answer."""

    async def chat(self, prompt: str, **options: Unpack[ChatKeywords]) -> gr.ChatResult:  # type: ignore[override]
        await super().chat(prompt, **options)
        return await super().chat(prompt, **options)


def test_a_double_send_is_caught() -> None:
    """A client that sends a request twice is told from one that does not."""

    async def scenario(world: World) -> None:
        await DoubleClient(world.client._runtime).chat("Hello?")

    report = sweep(scenario, check=check_sent_once, **SETTINGS)
    assert _failed_steps(report, "1 of 2 chat requests were sent twice") == {0}
    assert sweep(_chat, check=check_sent_once, **SETTINGS).is_clean


@pytest.mark.parametrize("error", [gr.RateLimitError, OSError("an instance"), lambda: "a text"])
def test_what_makes_no_exception_is_refused(error: Any) -> None:
    """A class that wants arguments, an exception in place of what makes one, and something else."""
    with pytest.raises(TypeError, match=r"argument|callable|makes no exception"):
        sweep(_chat, error=error, **SETTINGS)


def test_a_task_that_stays_is_caught() -> None:
    """A scenario that starts a task somewhere else and does not end it leaves it behind."""

    @asynccontextmanager
    async def with_a_nursery(world: World) -> AsyncIterator[None]:
        async with world.open_client(), trio.open_nursery() as nursery:
            world.nursery = nursery  # type: ignore[attr-defined]  # for the scenario
            yield
            nursery.cancel_scope.cancel()

    async def linger() -> None:
        await trio.sleep_forever()

    async def scenario(world: World) -> None:
        world.nursery.start_soon(linger)  # type: ignore[attr-defined]  # as above
        await world.client.chat("Hello?")

    report = sweep(scenario, setup=with_a_nursery, **SETTINGS)
    assert "linger" in report.failures[0].problem


@pytest.mark.parametrize("direction", ["request", "reply"])
@pytest.mark.parametrize("reply", ["Hello.", Hang()], ids=["text", "hang"])
def test_a_stall_is_nobodys_fault(direction: Direction, reply: str | Hang) -> None:
    """The server of a connection that stands still cannot hear that the client has closed it, and may go on."""

    async def scenario(world: World) -> None:
        world.serve(ScriptedModel([reply, reply, reply], loop=True))
        await world.client.chat("Hello?")

    stall = Stall(request=1, direction=direction)
    sweep_io(scenario, faults=[stall], allow=(gr.GorouterError,)).raise_failures()


def test_a_slow_server_is_nobodys_fault() -> None:
    """A whole reply is made to its end, and nobody is blamed for it who did not wait for that."""
    sweep(_chat, simulator=SimulatorConfig(latency_s=30)).raise_failures()


def test_a_server_that_stays_is_caught() -> None:
    """A server that heard of the end of its connection and does not let go of it is told, once all is closed."""

    class Stubborn:
        async def handler(self, _request: ServerRequest, _reply: ServerReply) -> None:
            await trio.sleep_forever()

    async def scenario(world: World) -> None:
        world.serve(Stubborn())
        with trio.move_on_after(1):
            await world.client.chat("Hello?")

    report = sweep(scenario, **SETTINGS)
    assert [failure.problem for failure in report.failures] == [
        "1 connections are served on, after the server has heard of their end"
    ]


def test_a_connection_that_stays_is_caught() -> None:
    """A connection that nobody closes is told, while the client is open and after it."""

    async def scenario(world: World) -> None:
        await world.network.connect("host", 80)

    report = sweep(scenario, **SETTINGS)
    problems = [failure.problem for failure in report.failures]
    assert {"1 connections are open, 0 of them in a pool", "1 connections are left after the close"} <= set(problems)


def test_a_file_that_stays_is_caught() -> None:
    """A descriptor that is open after a run and was not before is told."""
    opened = []

    async def scenario(world: World) -> None:
        opened.append(open(__file__, "rb"))  # noqa: ASYNC230, SIM115 - that is the point
        await world.client.chat("Hello?")

    try:
        report = sweep(scenario, **SETTINGS)
    finally:
        for file in opened:
            file.close()
    assert "test_sweep.py" in report.failures[0].problem


def test_a_check_is_told_with_its_step() -> None:
    """What a check of the user's raises is a failure of that step."""

    def never_billed(world: World) -> None:
        assert world.simulator.statistics().charged_nanousd == 0, "it cost something"

    report = sweep(_stream, check=[never_billed], **SETTINGS)
    assert _failed_steps(report, "it cost something") == {0}
    assert report.steps == 0
    assert "step 0 (seed 0): AssertionError: it cost something" in str(report.failures[0])


def test_a_sweep_of_faults_in_the_store() -> None:
    """A plan of faults holds during a sweep as well: here, the store fails once in every run."""
    settings: WorldSettings = {**SETTINGS, "faults": [FailStore(operation="append", nth=2)]}
    report = sweep(_ask, allow=(gr.HistoryNotSaved,), **settings)
    report.raise_failures()
    assert report.steps >= 10
