"""The thread with the runtime: few wake-ups for many calls, calls that are refused, and loops that are gone."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import outcome
import pytest
import trio
from fronted import OWN_THREAD, settings, simulator_in_thread

import gorouter_trio as gr
from gorouter_trio import aio, blocking
from gorouter_trio._fronts.portal import Call, Lent, Portal


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with simulator_in_thread() as url:
        yield url


@asynccontextmanager
async def nothing() -> AsyncIterator[str]:
    yield "open"


class Running:
    """A portal over nothing, and what it has told."""

    def __init__(self, opening: Callable[..., object] = nothing) -> None:
        self.changed = threading.Semaphore(0)
        self.portal: Portal[str] = Portal(opening)  # type: ignore[arg-type]  # some of them fail

    def __enter__(self) -> Portal[str]:
        self.portal.start(self.changed.release)
        assert self.changed.acquire(timeout=10)
        return self.portal

    def __exit__(self, *exc: object) -> None:
        self.portal.stop()
        assert self.portal.join(10)


def ask(portal: Portal[str], call: Call[int]) -> int:
    """The answer to a call."""
    done = threading.Semaphore(0)
    call.on_settled = done.release
    portal.submit(call)
    assert done.acquire(timeout=10)
    return call.unwrap()


async def three() -> int:
    await trio.lowlevel.checkpoint()
    return 3


def test_a_call_is_answered_once() -> None:
    """And what it was made of is let go."""
    with Running() as portal:
        call = Call(three)
        assert ask(portal, call) == 3
        assert call.captured is None
        assert portal.run_sync(lambda: 4) == 4


def test_what_fails_to_open_says_why() -> None:
    """The thread ends by itself."""

    @asynccontextmanager
    async def failing() -> AsyncIterator[str]:
        await trio.lowlevel.checkpoint()
        raise OSError("no way")
        yield ""

    running = Running(failing)
    with running as portal:
        assert isinstance(portal.opened, outcome.Error)
        assert str(portal.opened.error) == "no way"
        assert portal.ended is not None
        with pytest.raises(gr.PoolClosedError):
            portal.submit(Call(three))


def test_what_fails_to_close_says_so() -> None:
    """As how the thread has ended; what ran got an answer before."""

    @asynccontextmanager
    async def failing() -> AsyncIterator[str]:
        yield "open"
        raise OSError("cannot close")

    running = Running(failing)
    with running as portal:
        call = Call(trio.sleep_forever)
        done = threading.Semaphore(0)
        call.on_settled = done.release
        portal.submit(call)
    assert done.acquire(timeout=10)
    with pytest.raises(gr.PoolClosedError):
        call.unwrap()
    assert isinstance(portal.ended, outcome.Error)


def test_a_runtime_that_breaks_answers_its_calls() -> None:
    """Those that run, those that are lent, and those that come later."""

    broken = trio.Event()

    @asynccontextmanager
    async def breaking() -> AsyncIterator[str]:
        async with trio.open_nursery() as nursery:

            async def fail() -> None:
                await broken.wait()
                raise OSError("broken")

            nursery.start_soon(fail)
            yield "open"

    running = Running(breaking)
    with running as portal:
        call, done = Call(trio.sleep_forever), threading.Semaphore(0)
        call.on_settled = done.release
        portal.submit(call)

        @asynccontextmanager
        async def held() -> AsyncIterator[Callable[..., object]]:
            yield three

        lent: Lent[int] = Lent(portal.tell, held, on_change=done.release, room=1)  # type: ignore[arg-type]  # never read
        portal.lend(lent)
        assert done.acquire(timeout=10)
        portal.tell(broken.set)
        for _ in range(2):
            assert done.acquire(timeout=10)
        assert isinstance(lent.left, outcome.Error)
        assert running.changed.acquire(timeout=10)
    assert isinstance(portal.ended, outcome.Error)


def start_cancelled(portal: Portal[str], call: Call[None]) -> None:
    """Start a call that is cancelled in the same step."""
    portal._start(call)
    call.cancel()


def test_a_cancelled_call_has_cleaned_up_when_it_is_settled() -> None:
    """Also one that was cancelled before it could begin, which never runs."""
    seen: list[str] = []

    async def work() -> None:
        seen.append("begun")
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.lowlevel.checkpoint()
            seen.append("cleaned up")

    with Running() as portal:
        for begin in (True, False):
            done, call = threading.Semaphore(0), Call(work)
            call.on_settled = done.release
            if begin:
                portal.submit(call)
                while not seen:
                    portal.run_sync(bool)
            else:
                portal.tell(partial(start_cancelled, portal, call))
            portal.tell(call.cancel)
            assert done.acquire(timeout=10)
            with pytest.raises(gr.PoolClosedError):
                call.unwrap()
    assert seen == ["begun", "cleaned up"] * (len(seen) // 2)


@pytest.mark.net
def test_many_calls_share_wake_ups(
    base_url: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """A thousand chats at once wake the loop and the runtime some dozen times together, not thousands."""
    woken = {"loop": 0, "runtime": 0}

    async def main() -> None:
        loop = asyncio.get_running_loop()
        plain = loop.call_soon_threadsafe

        def counted(*args: object, **named: object) -> object:
            woken["loop"] += 1
            return plain(*args, **named)  # type: ignore[arg-type]  # as they came

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        async with aio.open_client(**settings(base_url, pool=gr.PoolLimits(adaptive_from=None))) as client:
            portal = client._core.portal
            drain = portal._drain

            def drained() -> None:
                woken["runtime"] += 1
                drain()

            monkeypatch.setattr(portal, "_drain", drained)
            await asyncio.gather(*(client.chat("[[say x]]") for _ in range(1_000)))

    asyncio.run(main())
    record_property(
        "figure", f"1,000 chats at once woke the runtime {woken['runtime']} times, the loop {woken['loop']}"
    )
    assert woken["runtime"] < 100
    assert woken["loop"] < 300


@pytest.mark.net
def test_asyncio_finds_nothing_wrong_in_its_debug_mode(base_url: str) -> None:
    """It looks whether anything is called from the wrong thread."""

    async def main() -> None:
        async def tool(city: str) -> str:
            await asyncio.sleep(0)
            return city

        async with aio.open_client(**settings(base_url)) as client:
            await asyncio.gather(*(client.chat('[[call tool {"city": "Aber"}]]', tools=[tool]) for _ in range(20)))
            async with client.stream("[[tokens 50]]") as stream:
                await stream.collect()
            task = asyncio.create_task(client.chat("x"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main(), debug=True)


@pytest.mark.net
def test_a_loop_that_is_gone_is_no_harm(base_url: str) -> None:
    """What its tasks waited for ends, what it should have called fails, and the client goes on for others."""

    async def main() -> None:
        async with aio.open_client(**settings(base_url)) as client:

            def use_and_go() -> None:
                loop = asyncio.new_event_loop()

                async def register() -> None:
                    client.add_hook(gr.Hook(after=lambda context, state: seen.append(state)))
                    client.on(gr.ChatFinished, seen.append)

                loop.run_until_complete(register())
                loop.close()

            seen: list[object] = []
            await asyncio.to_thread(use_and_go)
            with client.events(gr.HookFailed) as feed:
                assert (await client.chat("[[say x]]")).text == "x"
                assert "closed" in str((await anext(aiter(feed))).error)
            assert seen == []

    asyncio.run(main())


@pytest.mark.net
def test_a_loop_that_goes_before_it_is_through_is_no_harm(base_url: str) -> None:
    """What was on its way to it fails, and the chat that waits for that goes on."""

    async def register(client: aio.Client, around: Any) -> None:
        client.use(around)

    async def main() -> None:
        async def around(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
            await proceed()

        async with aio.open_client(**settings(base_url)) as client:
            other = asyncio.new_event_loop()
            await asyncio.to_thread(other.run_until_complete, register(client, around))
            outbox = client._core._bridges[other].home.outbox  # type: ignore[attr-defined]  # what a loop has
            chat = asyncio.create_task(client.chat("[[say x]]"))
            while not outbox._is_woken:
                await asyncio.sleep(0.001)
            other.close()
            with pytest.raises(gr.ExtensionError, match="loop of the program is closed"):
                await asyncio.wait_for(chat, 20)
            assert client.unuse(around)
            assert (await client.chat("[[say y]]")).text == "y"

    asyncio.run(main())


@pytest.mark.net
def test_clients_do_not_know_of_each_other(base_url: str) -> None:
    """Several at once, of both kinds, in one process."""

    async def main() -> list[str]:
        async with aio.open_client(**settings(base_url)) as one, aio.open_client(**settings(base_url)) as two:
            with blocking.open_client(**settings(base_url)) as three:
                text = (await asyncio.to_thread(three.chat, "[[say 3]]")).text
            replies = await asyncio.gather(one.chat("[[say 1]]"), two.chat("[[say 2]]"))
            assert one.statistics().answered == two.statistics().answered == 1
            return [text, *(reply.text for reply in replies)]

    assert asyncio.run(main()) == ["3", "1", "2"]
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name in OWN_THREAD]
