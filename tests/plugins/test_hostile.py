"""Plugins that raise, block and leak on purpose: every chat has its one answer, and nothing is left."""

from __future__ import annotations

from collections import Counter
from contextlib import asynccontextmanager
from typing import Any, NoReturn, cast

import pytest
import trio
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import BillingPlugin, LoggingPlugin, MetricsPlugin

YES = completion("Yes.")


class Raising:
    """Raises wherever it can, but where that would refuse a chat."""

    name = "raising"

    def init(self, client: gr.Client) -> None:
        client.add_hook(gr.Hook(after=self.fail, name="raising"))
        client.observe(self.fail)
        client.observe_ledger(self.fail)
        client.add_metrics(self.fail)
        client.on(gr.ChatFinished, self.fail)
        client.add_tracer(self)

    def fail(self, *_: object) -> NoReturn:
        raise RuntimeError("on purpose")

    def begin_request(self, _call: object) -> None:
        self.fail()

    def begin_tool(self, _start: object) -> None:
        self.fail()

    def destroy(self) -> None:
        self.fail()


class Blocking:
    """Waits for ever wherever nobody has to wait for it, and for a moment where a chat does."""

    name = "blocking"

    def init(self, client: gr.Client) -> None:
        client.use(self.slowly)
        client.on(gr.RuntimeEvent, self.hang)
        client.on(gr.ChatStarted, self.hang, queue=1)

    async def slowly(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        await trio.sleep(0.01)
        await proceed()

    async def hang(self, _event: gr.RuntimeEvent) -> None:
        await trio.sleep_forever()

    async def destroy(self) -> None:
        await trio.sleep_forever()


@asynccontextmanager
async def leaking(client: gr.Client):
    """Starts a task for every chat and ends none, and does not end itself."""
    async with trio.open_nursery() as nursery:

        async def leak(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
            nursery.start_soon(trio.sleep_forever)
            await proceed()

        client.use(leak)
        client.add_hook(gr.Hook(before=lambda _context, _state: None))
        yield
        # Left like this, the nursery waits for its tasks for ever.


@asynccontextmanager
async def falling(client: gr.Client):
    """Falls over in the middle of its life."""
    async with trio.open_nursery() as nursery:

        async def fall() -> None:
            await trio.sleep(0.05)
            raise RuntimeError("fallen")

        nursery.start_soon(fall)
        yield


async def never(_report: object) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("chats", [600, pytest.param(10_000, marks=pytest.mark.long)])
async def test_plugins_from_hell(chats, autojump_clock, no_leaks, caplog, record_property):
    """Chats, sessions and streams are answered once each, the honest plugins count them all, and no task is left."""
    answered: Counter[str] = Counter()
    metrics = MetricsPlugin()
    lost: list[int] = []
    billing = BillingPlugin(never, queue=10, drain_s=1, on_error=lambda _error, report: lost.append(report.row.call))
    hostile = [Raising(), Blocking(), leaking, falling]

    async def worker(client: gr.Client, number: int) -> None:
        session = client.session(f"s{number}")
        for each in range(number, chats, 50):
            if each % 3 == 0:
                answered[(await client.chat("Well?")).text] += 1
            elif each % 3 == 1:
                answered[(await session.ask("Well?")).text] += 1
            else:
                async with client.stream("Well? [[say Yes.]]") as stream:
                    answered[(await stream.collect()).text] += 1

    caplog.set_level("CRITICAL", "gorouter_trio.tools")
    async with no_leaks():
        began = 0.0
        with pytest.raises((RuntimeError, TimeoutError)):
            async with open_world(notes=False, plugins=[metrics, LoggingPlugin(), billing, *hostile]) as world:
                simulated = world.api.answer

                async def answer(request, reply):
                    stream = b'"stream":true' in request.body
                    await (simulated if stream else replies(YES))(request, reply)

                world.api.answer = answer
                async with trio.open_nursery() as nursery:
                    for number in range(50):
                        nursery.start_soon(worker, world.client, number)
                honest = ("metrics", "logging", "billing")
                assert world.client.inspect().plugins == (*honest, "raising", "blocking", "leaking")
                assert "gorouter_chats_succeeded_total" in world.client.metrics_text()
                seen = metrics.snapshot()
                began = trio.current_time()
        assert trio.current_time() - began < 30
    assert answered == {"Yes.": chats}
    assert (seen.succeeded, seen.failed) == (chats, 0)
    assert len(lost) == chats
    left = chats - answered.total()
    record_property("figure", f"{chats:,} chats among plugins that raise, block and leak: {left} lost, 0 tasks left")


class Reluctant:
    """Registers everything there is, and then fails to begin."""

    name = "reluctant"

    def init(self, client: gr.Client) -> None:
        client.use(self.around)
        client.add_hook(gr.Hook(before=self.never))
        client.observe(self.never)
        client.observe_ledger(self.never)
        client.add_metrics(self.never)
        client.add_tracer(self)
        client.on(gr.RuntimeEvent, self.never)
        client.push_security(Closed())
        raise ValueError("cannot begin")

    async def around(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        raise AssertionError("it is gone")

    def never(self, *_: object) -> NoReturn:
        raise AssertionError("it is gone")

    begin_request = begin_tool = never


class Closed:
    """A guard that lets nothing through."""

    def check(self, *_: object, **__: object) -> object:
        raise AssertionError("it is gone")

    def audit(self, _record: object) -> None:
        raise AssertionError("it is gone")


async def test_one_that_fails_to_begin_leaves_the_client_as_it_was(autojump_clock):
    """Whatever it had registered is taken back: extensions, observers, listeners, metrics, tracers, its guard."""

    @gr.tool
    async def look() -> str:
        """Look."""
        return "seen"

    answer = replies(completion("", tool_calls=[("1", "look")]), YES)
    async with open_world(answer=answer) as world:
        client = world.client
        before, guard, text = client.inspect(), client.security, client.metrics_text()
        with pytest.raises(ValueError, match="cannot begin"):
            await client.register(Reluctant())
        after = client.inspect()
        assert (after.plugins, after.observers, after.listeners) == (before.plugins, before.observers, before.listeners)
        assert client.security is guard
        assert client.metrics_text() == text
        with client.events(gr.HookFailed) as feed:
            assert (await client.chat("Well?", tools=[look])).tool_calls[0].is_success
            with trio.move_on_after(1) as scope:
                await anext(feed)
        assert scope.cancelled_caught


HOOK, LOGGING = cast("Any", gr.Hook), cast("Any", LoggingPlugin)


@pytest.mark.parametrize(
    ("register", "named"),
    [
        (lambda client: client.use(5), "middleware"),
        (lambda client: client.use(lambda context: None), "middleware"),
        (lambda client: client.add_hook(lambda context, state: None), "hook"),
        (lambda client: client.observe("x"), "observer"),
        (lambda client: client.observe_ledger(None), "observer"),
        (lambda client: client.on(gr.ChatFailed, lambda: None), "handler"),
        (lambda client: HOOK(name="mine", before=lambda context: None), "hook 'mine': before"),
        (lambda client: HOOK(name="mine", on_error=lambda context, state: None), "hook 'mine': on_error"),
        (lambda client: HOOK(name="mine", after=3), "hook 'mine': after"),
        (lambda client: client.push_security(None), "security"),
        (lambda client: LOGGING("x"), "logging: logger"),
        (lambda client: LOGGING(level="INFO"), "logging: level"),
    ],
)
async def test_wrong_signatures(register, named, autojump_clock):
    """What cannot be called as it will be is refused where it is registered, by its name."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match=named):
            register(world.client)
