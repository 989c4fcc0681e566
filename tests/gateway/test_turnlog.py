"""What is kept of a turn: the newest messages within the bound, and its end, for every reader at its own pace."""

from __future__ import annotations

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from gorouter_trio.events import TextDelta
from gorouter_trio.gateway.config import GatewayLimits
from gorouter_trio.gateway.protocol import ErrorInfo, Event
from gorouter_trio.gateway.turnlog import TurnLog
from gorouter_trio.gateway.turns import LiveTurn, SlowReaderError, Subscription, TurnHub, TurnKey

KEY = TurnKey("", "ada", None, "s", "t")


@given(st.lists(st.binary(max_size=40), max_size=60), st.integers(1, 200), st.integers(0, 9))
def test_the_newest_are_kept(bodies, limit, after):
    """Those that fit, in order, and none that does not."""
    log = TurnLog(limit, after=after)
    for body in bodies:
        log.append(body)
    kept = [log.get(seq) for seq in range(log.first_seq, log.last_seq + 1)]
    assert log.last_seq == after + len(bodies)
    assert kept == (bodies[-len(kept) :] if kept else [])
    assert log.size == sum(len(body or b"") for body in kept)
    # No more memory than the bound, and none left that one more message would have had room in.
    assert log.size * 9 // 8 + 4 * len(kept) <= limit
    more = bodies[len(bodies) - len(kept) - 1 :] if len(kept) < len(bodies) else None
    assert more is None or sum(map(len, more)) * 9 // 8 + 4 * len(more) > limit
    assert log.get(log.first_seq - 1) is None
    assert log.get(log.last_seq + 1) is None


def test_a_long_turn_costs_what_is_kept():
    """Whatever has gone by is forgotten, where messages began as well."""
    log = TurnLog(4_000)
    for number in range(20_000):
        log.append(b"%08d" % number)
    # 13 bytes each: an eighth for the room to grow, and four for where it begins.
    assert (log.first_seq, log.last_seq, log.size) == (19_694, 20_000, 307 * 8)
    assert [log.get(seq) for seq in (19_693, 19_694, 20_000)] == [None, b"00019693", b"00019999"]
    assert len(log._starts) <= 2_000


def test_the_end_is_always_kept():
    """However long it is."""
    log = TurnLog(20)
    log.append(b"x" * 8)
    assert log.finish(b"y" * 50) == 2
    assert log.get(1) == b"x" * 8
    assert log.end == b"y" * 50


def publish(turn, *texts):
    for text in texts:
        turn.publish(Event(id=0, seq=0, event=TextDelta(text)))


def limits(**more):
    return GatewayLimits(**{"buffer_bytes": 10_000, "slow_reader_s": 10.0, **more})


def reader(turn, *, after=0, credit=10_000, is_streamed=True, **more):
    return Subscription(turn, 7, after=after, credit=credit, is_streamed=is_streamed, limits=limits(**more))


async def follow(subscription, found):
    async def send(text):
        found.append(msgspec.json.decode(text))
        await trio.lowlevel.checkpoint()

    await subscription.run(send)


async def test_many_readers(autojump_clock):
    """Each has all of it, from where it says it is, with its own id."""
    turn = LiveTurn(KEY, limits())
    first, second = [], []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, reader(turn), first)
        publish(turn, "a", "b")
        await wait_all_tasks_blocked()
        assert [message["event"]["text"] for message in first] == ["a", "b"]
        nursery.start_soon(follow, reader(turn, after=1), second)
        publish(turn, "c")
        turn.fail(ErrorInfo(code="internal", message="x"))
    assert [message["seq"] for message in first] == [1, 2, 3, 4]
    assert [message["seq"] for message in second] == [2, 3, 4]
    assert {message["id"] for message in first + second} == {7}
    assert first[-1]["type"] == "failed"


async def test_credit(autojump_clock):
    """Without credit nothing comes but the end, whose reader waits for what was before it."""
    turn, found = LiveTurn(KEY, limits()), []
    subscription = reader(turn, credit=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, subscription, found)
        publish(turn, "a", "b", "c")
        await wait_all_tasks_blocked()
        assert len(found) == 1
        subscription.grant(70)
        await wait_all_tasks_blocked()
        assert len(found) == 2
        turn.fail(ErrorInfo(code="internal", message="x"))
        subscription.grant(1_000)
    assert [message["seq"] for message in found] == [1, 2, 3, 4]


async def test_a_gap(autojump_clock):
    """Who falls behind by more than the buffer is told what it misses, and goes on with what is newer."""
    turn, found = LiveTurn(KEY, limits(buffer_bytes=300)), []
    subscription = reader(turn, credit=0, buffer_bytes=300)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, subscription, found)
        publish(turn, *"abcdefghij")
        await wait_all_tasks_blocked()
        subscription.grant(5_000)
        await wait_all_tasks_blocked()
        turn.fail(ErrorInfo(code="internal", message="x"))
        subscription.grant(5_000)
    assert found[0]["type"] == "gap"
    assert [message["seq"] for message in found] == list(range(found[0]["seq"], 12))


@pytest.mark.parametrize("ended", [True, False])
async def test_a_slow_reader(autojump_clock, ended):
    """Who leaves a gap, or the end, waiting for ten seconds is given up; who only pauses is not."""
    turn, found = LiveTurn(KEY, limits(buffer_bytes=300)), []
    publish(turn, "a", "b")
    subscription = reader(turn, credit=0, buffer_bytes=300)
    with trio.move_on_after(1_000) as scope:
        await follow(subscription, found)
    assert scope.cancelled_caught, "a pause"
    if ended:
        turn.fail(ErrorInfo(code="internal", message="x"))
    else:
        publish(turn, *"cdefghij")
    began = trio.current_time()
    with pytest.raises(SlowReaderError):
        await follow(subscription, found)
    assert trio.current_time() - began == pytest.approx(10)


async def test_who_does_not_stream(autojump_clock):
    """It has the end, and no pieces."""
    turn, found = LiveTurn(KEY, limits()), []
    publish(turn, "a", "b")
    turn.fail(ErrorInfo(code="internal", message="x"))
    await follow(reader(turn, is_streamed=False), found)
    assert [message["type"] for message in found] == ["failed"]


@pytest.mark.parametrize("buffer_bytes", [10_000, 300])
async def test_who_does_not_stream_needs_no_credit(autojump_clock, buffer_bytes):
    """What it is not sent costs nothing: the end comes at once, also where pieces are lost."""
    turn, found = LiveTurn(KEY, limits(buffer_bytes=buffer_bytes)), []
    publish(turn, *"abcdefghij")
    turn.fail(ErrorInfo(code="internal", message="x"))
    began = trio.current_time()
    await follow(reader(turn, is_streamed=False, credit=0), found)
    assert [message["type"] for message in found] == (["failed"] if buffer_bytes == 10_000 else ["gap", "failed"])
    assert trio.current_time() == began


@pytest.mark.parametrize("after", [2, 3, 4, 100])
async def test_the_end_comes_again(autojump_clock, after):
    """Whatever its asker says to have seen."""
    turn, found = LiveTurn(KEY, limits()), []
    publish(turn, "a", "b")
    turn.fail(ErrorInfo(code="internal", message="x"))
    with trio.fail_after(1):
        await follow(reader(turn, after=after), found)
    assert [(message["type"], message["seq"]) for message in found] == [("failed", 3)]


async def test_the_hub(autojump_clock):
    """Turns run without readers, can be joined for a minute after their end, and are bounded together."""
    errors = []
    async with trio.open_nursery() as nursery:
        hub = TurnHub(nursery, limits(resume_s=60.0, max_kept_bytes=500), on_error=errors.append)

        async def take(turn):
            publish(turn, "a")
            await trio.sleep(1)
            turn.fail(ErrorInfo(code="session_busy", message="x"))

        async def crash(turn):
            await trio.lowlevel.checkpoint()
            raise RuntimeError("a bug")

        hub.begin(KEY, take)
        assert hub.find(KEY, resumed=False) is not None
        await hub.wait_idle()
        assert hub.find(KEY, resumed=False) is None
        assert hub.find(KEY, resumed=True) is not None
        for number in range(8):
            hub.begin(KEY._replace(turn_id=f"t{number}"), take)
        assert hub.live == 8
        await hub.wait_idle()
        assert hub.kept_bytes <= 500
        await trio.sleep(61)
        hub.prune()
        assert (hub.kept, hub.kept_bytes) == (0, 0)
        turn = hub.begin(KEY, crash)
        await hub.wait_idle()
        assert turn.error_code == "internal"
        assert [str(error) for error in errors] == ["a bug"]
        stopped = hub.begin(KEY, take)
        await wait_all_tasks_blocked()
        hub.cancel_all()
        await hub.wait_idle()
        assert stopped.is_over
        assert hub.errors["session_busy"] == 9


async def test_a_bug_while_a_turn_is_stopped(autojump_clock):
    """It costs that turn, as every bug does, and not the gateway with all the others."""
    errors = []

    async def clean_up_wrongly():
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("a bug")

    async def crash(_turn):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up_wrongly)
            nursery.start_soon(trio.sleep_forever)

    async with trio.open_nursery() as nursery:
        hub = TurnHub(nursery, limits(), on_error=errors.append)
        turn = hub.begin(KEY, crash)
        await wait_all_tasks_blocked()
        turn.scope.cancel()
        await hub.wait_idle()
        assert turn.error_code == "internal"
        assert [str(error) for group in errors for error in group.exceptions] == ["a bug"]
