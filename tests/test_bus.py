"""The event bus: bounded, in order, nobody waits, nobody is hurt."""

from __future__ import annotations

import threading

import pytest
import trio
import trio.testing

import gorouter_trio as gr
from gorouter_trio._bus import EventBus, EventFeed
from gorouter_trio.runtime_events import ChatContext, ChatFailed, ChatStarted, HandlerFailed, RuntimeEvent

CONTEXT = ChatContext(chat_id="1", model="m")


def started(number: int) -> ChatStarted:
    return ChatStarted(at_s=float(number), context=CONTEXT)


async def test_handlers_get_their_kind_in_order(autojump_clock):
    """Sync and async handlers get every event of their kind, one at a time, in order; the root is every kind."""
    seen: list[float] = []
    everything: list[RuntimeEvent] = []

    async def slowly(event: ChatStarted) -> None:
        await trio.sleep(1 if event.at_s == 0 else 0)
        seen.append(event.at_s)

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        assert not bus.has_listeners
        bus.on(ChatStarted, slowly)
        bus.on(RuntimeEvent, everything.append)
        for number in range(5):
            bus.emit(started(number))
        bus.emit(ChatFailed(context=CONTEXT, error=None))
        await bus.drain()
        nursery.cancel_scope.cancel()
    assert seen == [0, 1, 2, 3, 4]
    assert len(everything) == 6


async def test_a_slow_handler_loses_the_oldest(autojump_clock):
    """Beyond its queue the oldest events go, and are counted; nobody else is slowed down."""
    seen: list[float] = []
    quick: list[float] = []
    go_on = trio.Event()

    async def hang(event: ChatStarted) -> None:
        await go_on.wait()
        seen.append(event.at_s)

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        bus.on(ChatStarted, hang, queue=3)
        bus.on(ChatStarted, lambda event: quick.append(event.at_s))
        for number in range(10):
            bus.emit(started(number))
            await trio.testing.wait_all_tasks_blocked()
        assert quick == list(range(10))
        assert bus.dropped == 6
        go_on.set()
        await bus.drain()
        nursery.cancel_scope.cancel()
    assert seen == [0, 7, 8, 9]


async def test_a_handler_that_raises_is_told_of(autojump_clock):
    """What a handler raises is an event of its own; it goes on with the next one, and failures do not go round."""
    failures: list[HandlerFailed] = []

    def fail(event: RuntimeEvent) -> None:
        raise ValueError("no")

    def fail_too(event: HandlerFailed) -> None:
        failures.append(event)
        raise RuntimeError("nor here")

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        bus.on(ChatStarted, fail)
        bus.on(HandlerFailed, fail_too)
        for number in range(3):
            bus.emit(started(number))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [(failure.event, str(failure.error)) for failure in failures] == [("ChatStarted", "no")] * 3


async def test_off_ends_a_handler_that_hangs(autojump_clock, no_leaks):
    """`off` ends the subscription and what runs for it; another time there is nothing to end."""

    async def hang(event: ChatStarted) -> None:
        await trio.sleep_forever()

    async with no_leaks(), trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        hanging = bus.on(ChatStarted, hang)
        bus.emit(started(1))
        await trio.testing.wait_all_tasks_blocked()
        assert bus.off(hanging)
        assert not bus.off(hanging)
        await trio.testing.wait_all_tasks_blocked()
        assert not bus.has_listeners
        assert not nursery.child_tasks


async def test_off_while_it_is_drained(autojump_clock):
    """Whoever waits for the handlers to be done does not wait for one that has been ended."""

    async def once(event: ChatStarted) -> None:
        await trio.sleep(1)
        bus.off(number)

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        number = bus.on(ChatStarted, once)
        bus.emit(started(1))
        bus.emit(started(2))
        with trio.fail_after(10):
            await bus.drain()
        assert trio.current_time() == 1
        nursery.cancel_scope.cancel()


async def test_in_a_thread(no_leaks):
    """A handler that blocks can have a thread, where it still gets one event at a time, in order."""
    threads: list[int] = []

    def block(event: ChatStarted) -> None:
        threads.append(threading.get_ident())

    async with no_leaks(), trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        bus.on(ChatStarted, block, in_thread=True)
        bus.emit(started(1))
        bus.emit(started(2))
        await bus.drain()
        nursery.cancel_scope.cancel()
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_a_feed(autojump_clock):
    """Events as an iterator, of the kinds named; what is not taken in time is dropped and counted."""
    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        with bus.listen(ChatFailed, ChatStarted, queue=2) as feed:
            bus.emit(HandlerFailed(event="x", error=ValueError()))
            for number in range(3):
                bus.emit(started(number))
            assert [(await anext(feed)).at_s, (await anext(feed)).at_s] == [1, 2]
            assert feed.dropped == 1
        assert not bus.has_listeners


async def test_two_readers_of_a_feed(autojump_clock):
    """Each event wakes whoever waits: a reader that came and went takes no wakeup of the others with it."""
    got: list[tuple[str, float]] = []

    async def read(name: str, feed: EventFeed[ChatStarted], scope: trio.CancelScope) -> None:
        with scope:
            async for event in feed:
                got.append((name, event.at_s))  # noqa: PERF401 - the feed does not end

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        with bus.listen(ChatStarted) as feed:
            scopes = [trio.CancelScope(), trio.CancelScope()]
            for name, scope in zip("ab", scopes, strict=True):
                nursery.start_soon(read, name, feed, scope)
                await trio.testing.wait_all_tasks_blocked()
            for number in range(3):
                bus.emit(started(number))
                await trio.testing.wait_all_tasks_blocked()
            assert [at_s for _name, at_s in got] == [0, 1, 2]
            scopes[1].cancel()
            await trio.testing.wait_all_tasks_blocked()
            bus.emit(started(3))
            await trio.testing.wait_all_tasks_blocked()
            assert got[3:] == [("a", 3)]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("kind", "handler", "named"),
    [
        (int, print, "kind"),
        ("ChatStarted", print, "kind"),
        (ChatStarted, 5, "handler"),
        (ChatStarted, lambda: None, "handler"),
        (ChatStarted, lambda a, b: None, "handler"),
    ],
)
async def test_bad_subscriptions(kind, handler, named):
    """What is no kind of event, and what cannot be called with one event, is refused by name."""
    async with trio.open_nursery() as nursery:
        with pytest.raises(gr.ConfigError, match=named):
            EventBus(nursery).on(kind, handler)


async def test_who_hears_chats(autojump_clock):
    """Only those who listen to events of chats, or to all, are a reason to make them."""
    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        heard = [bus.hears_chats]
        for kind in (gr.PluginFailed, gr.ChatFailed, gr.RuntimeEvent):
            with bus.listen(kind):
                heard.append(bus.hears_chats)
        number = bus.on(gr.ChatStarted, lambda _event: None)
        heard.append(bus.hears_chats)
        bus.off(number)
        assert [*heard, bus.hears_chats] == [False, False, True, True, True, False]


async def test_a_feed_ends_when_it_is_left(autojump_clock):
    """For everybody who still reads it, behind what there is."""
    got: list[list[float]] = []

    async def read(feed: EventFeed[ChatStarted]) -> None:
        got.append([event.at_s async for event in feed])

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        with trio.fail_after(10):
            async with trio.open_nursery() as readers:
                with bus.listen(ChatStarted) as feed:
                    readers.start_soon(read, feed)
                    readers.start_soon(read, feed)
                    await trio.testing.wait_all_tasks_blocked()
                    bus.emit(started(1))
        assert sorted(got) == [[], [1.0]]


async def test_an_async_handler_has_no_thread():
    """It would be called there and never awaited, so it is refused."""

    class Called:
        async def __call__(self, event: ChatStarted) -> None: ...

    async def handler(event: ChatStarted) -> None: ...

    async with trio.open_nursery() as nursery:
        bus = EventBus(nursery)
        for wrong in (handler, Called()):
            with pytest.raises(gr.ConfigError, match="async"):
                bus.on(ChatStarted, wrong, in_thread=True)
        assert not bus.has_listeners
