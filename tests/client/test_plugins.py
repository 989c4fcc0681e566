"""Plugins: begun in order, ended in reverse, taken back whole, harming nobody."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from failing_store import FailingStore
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig


class Noted:
    """A plugin that notes what happens to it, and may fail on purpose."""

    def __init__(self, name: str, notes: list[str], *, fails: str = "") -> None:
        self.name = name
        self._notes = notes
        self._fails = fails

    async def init(self, client: gr.Client) -> None:
        client.use(self.around)
        client.add_hook(gr.Hook(after=lambda _context, _state: self._notes.append(f"{self.name} after")))
        client.on(gr.ChatFinished, lambda _event: self._notes.append(f"{self.name} told"))
        self._notes.append(f"{self.name} begins")
        if self._fails == "init":
            raise ValueError(f"{self.name} cannot begin")

    async def around(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        self._notes.append(f"{self.name} around")
        await proceed()

    def destroy(self) -> None:
        self._notes.append(f"{self.name} ends")
        if self._fails == "destroy":
            raise ValueError(f"{self.name} cannot end")


def yes():
    return replies(completion("Yes."))


async def test_the_life_of_plugins(autojump_clock, no_leaks):
    """They are around chats while they live; the client ends them in reverse order."""
    notes: list[str] = []
    async with no_leaks():
        async with open_world(answer=yes(), plugins=[Noted("a", notes)]) as world:
            assert await world.client.register(Noted("b", notes)) == "b"
            await world.client.chat("Well?")
        assert notes[:2] == ["a begins", "b begins"]
        assert notes[2:6] == ["a around", "b around", "a after", "b after"]
        assert sorted(notes[6:8]) == ["a told", "b told"]
        assert notes[8:] == ["b ends", "a ends"]


async def test_ended_early(autojump_clock):
    """What a plugin registered goes with it; another time there is nothing to end."""
    notes: list[str] = []
    async with open_world(answer=yes()) as world:
        await world.client.register(Noted("a", notes))
        assert await world.client.unregister("a")
        assert not await world.client.unregister("a")
        await world.client.chat("Well?")
    assert notes == ["a begins", "a ends"]


async def test_one_that_cannot_begin(autojump_clock):
    """Its error is the caller's, and nothing of it is left; its name is free again."""
    notes: list[str] = []
    async with open_world(answer=yes()) as world:
        with pytest.raises(ValueError, match="a cannot begin"):
            await world.client.register(Noted("a", notes, fails="init"))
        await world.client.chat("Well?")
        await world.client.register(Noted("a", notes))
    assert notes == ["a begins", "a begins", "a ends"]


async def test_errors_of_ending(autojump_clock):
    """All are ended, and the first error is raised."""
    notes: list[str] = []
    with pytest.raises(ValueError, match="c cannot end"):
        async with open_world(answer=yes()) as world:
            for name, fails in (("a", "destroy"), ("b", ""), ("c", "destroy")):
                await world.client.register(Noted(name, notes, fails=fails))
    assert notes[-3:] == ["c ends", "b ends", "a ends"]


async def test_an_async_context_manager(autojump_clock, no_leaks):
    """A function of the client may give a context manager, which may hold a nursery; it runs in one task."""
    notes: list[object] = []

    @asynccontextmanager
    async def audit(client: gr.Client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            entered = trio.lowlevel.current_task()
            yield
            notes.append(trio.lowlevel.current_task() is entered)
            nursery.cancel_scope.cancel()

    async with no_leaks(), open_world(answer=yes()) as world:
        assert await world.client.register(audit) == "audit"
    assert notes == [True]


class Held:
    """An async context manager that knows nothing of the client."""

    name = "held"

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    async def __aenter__(self) -> None:
        self._notes.append("in")

    async def __aexit__(self, *_: object) -> None:
        self._notes.append("out")


async def test_an_object_to_be_entered(autojump_clock):
    """Something that is opened and closed with the client."""
    notes: list[str] = []
    async with open_world(plugins=[Held(notes)]) as world:
        assert world.client.inspect().plugins == ("held",)
        assert notes == ["in"]
    assert notes == ["in", "out"]


async def test_one_that_fails_later(autojump_clock):
    """A plugin whose background task fails is gone, with an event; the client goes on."""

    @asynccontextmanager
    async def brittle(client: gr.Client):
        async with trio.open_nursery() as nursery:

            async def fail() -> None:
                await trio.sleep(1)
                raise ValueError("broken")

            nursery.start_soon(fail)
            yield

    async with open_world(answer=yes()) as world:
        await world.client.register(brittle)
        with world.client.events(gr.PluginFailed) as feed:
            failed = await anext(feed)
        assert failed.plugin == "brittle"
        assert (await world.client.chat("Well?")).text == "Yes."


class HangingPlugin:
    """Never ends."""

    async def init(self, client: gr.Client) -> None:
        pass

    async def destroy(self) -> None:
        await trio.sleep_forever()


async def test_one_that_does_not_end(autojump_clock, no_leaks):
    """Ending is bounded, and one that takes longer is an error."""
    async with no_leaks():
        start = trio.current_time()
        with pytest.raises(TimeoutError, match="HangingPlugin"):
            async with open_world(answer=yes(), plugins=[HangingPlugin()]):
                pass
        assert trio.current_time() - start < 25


async def test_one_that_is_ended_early_and_does_not_end(autojump_clock):
    """Whoever ends it is told that it was cut off, as when the client closes."""
    async with open_world(answer=yes()) as world:
        name = await world.client.register(HangingPlugin())
        with trio.fail_after(25), pytest.raises(TimeoutError, match="did not end"):
            await world.client.unregister(name)
        assert await world.client.register(HangingPlugin()) == name
        with pytest.raises(TimeoutError):
            await world.client.unregister(name)


async def test_a_context_manager_that_does_not_end(autojump_clock):
    """It has the same time as any other plugin, also where it is ended alone."""

    @asynccontextmanager
    async def hangs(_client: gr.Client) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await trio.sleep_forever()

    async with open_world(answer=yes()) as world:
        name = await world.client.register(hangs)
        with trio.fail_after(25), pytest.raises(TimeoutError, match="did not end in 10 s"):
            await world.client.unregister(name)
        assert world.client.inspect().plugins == ()


class NoInit:
    """No plugin."""


@pytest.mark.parametrize("plugin", [5, "x", NoInit(), HangingPlugin, lambda: None, None])
async def test_no_plugins(plugin, autojump_clock):
    """What is no plugin is refused."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="plugin"):
            await world.client.register(plugin)


async def test_names_are_taken(autojump_clock):
    """Two plugins cannot have one name."""
    notes: list[str] = []
    async with open_world() as world:
        await world.client.register(Noted("a", notes))
        with pytest.raises(gr.ConfigError, match="'a'"):
            await world.client.register(Noted("a", notes))
    assert notes == ["a begins", "a ends"]


async def test_a_cancel_from_outside(autojump_clock, no_leaks):
    """Plugins end in reverse, after the sessions: what those store when they are cut off still goes through them."""
    notes: list[str] = []

    class Store(FailingStore):
        async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
            await trio.sleep(0.1)
            version = await super().append(key, entries, expected_version=expected_version)
            notes.append("stored")
            return version

    class Slow(Noted):
        async def destroy(self) -> None:  # type: ignore[override]  # a plugin's may be either
            await trio.sleep(1)
            super().destroy()

    async with no_leaks():
        with trio.move_on_after(5) as scope:
            plugins = [Noted("a", notes), Slow("b", notes)]
            slow = SimulatorConfig(latency_s=1, tokens_per_s=1, comment_interval_s=0)
            async with (
                open_world(slow, store=Store(), plugins=plugins) as world,
                world.client.session("s").stream("Well?") as stream,
            ):
                await stream.collect()
        assert scope.cancelled_caught
        assert notes[-3:] == ["stored", "b ends", "a ends"]
        assert trio.current_time() - scope.deadline < 3


async def test_a_cancel_from_outside_and_one_that_does_not_end(autojump_clock, no_leaks):
    """Ending is bounded then, too, also for plugins that others begin as they end."""

    class Begins(HangingPlugin):
        name = "begins"

        async def init(self, client: gr.Client) -> None:
            self._client = client

        async def destroy(self) -> None:
            await self._client.register(HangingPlugin())
            await trio.sleep_forever()

    async with no_leaks():
        with trio.move_on_after(5) as scope, pytest.raises(TimeoutError, match="begins"):
            async with open_world(answer=yes(), plugins=[Begins()]):
                await trio.sleep_forever()
        assert trio.current_time() - scope.deadline < 40


async def test_beginning_in_a_cancelled_scope(autojump_clock):
    """That is a cancel as any other, and nothing of the plugin is left."""
    notes: list[str] = []
    async with open_world(answer=yes()) as world:
        with trio.CancelScope() as scope:
            scope.cancel()
            await world.client.register(Noted("a", notes))
        assert scope.cancelled_caught
        assert world.client.inspect().plugins == ()
        await world.client.chat("Well?")
        assert "a around" not in notes
        await world.client.register(Noted("a", notes))
