"""Connections of a world keep trio's stream contract, take the time they should, and break the way they are told to."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from gorouter_trio.errors import ConfigError
from gorouter_trio.testing import Corrupt, Cut, Delay, Drop, Duplicate, EventLog, Fault, Link, Stall
from gorouter_trio.testing._wire import WireConnection, WireStream
from gorouter_trio.testing.faults import Aim, Direction, FaultPlan


class Wires:
    """A network of connections without a server: the test has both ends."""

    def __init__(self, *faults: Fault) -> None:
        self.log = EventLog()
        self.plan = FaultPlan(faults, rng=random.Random, log=self.log)
        self.requests = 0

    def on_request(self, connection: WireConnection) -> tuple[int, dict[Direction, list[Aim]]]:
        self.requests += 1
        return self.requests, self.plan.on_request(
            connection=connection.number, host=connection.host, request=self.requests, now=self.log.now()
        )

    def on_reply(self, connection: WireConnection) -> None:
        pass

    def pair(self, link: Link | None = None) -> tuple[WireStream, WireStream]:
        connection = WireConnection(1, "host", link=link or Link(), rng=random.Random, network=self)
        return connection.client, connection.server


async def _pair() -> tuple[WireStream, WireStream]:
    return Wires().pair(Link(capacity_bytes=4_096))


async def _clogged_pair() -> tuple[WireStream, WireStream]:
    left, right = await _pair()
    await left.send_all(b"x" * 4_096)
    await right.send_all(b"y" * 4_096)
    return left, right


async def _read_all(stream: WireStream) -> bytes:
    received = b""
    while piece := await stream.receive_some():
        received += piece
    return received


# --- the contract -----------------------------------------------------------------------------------------------------


async def test_passes_the_two_way_conformance_suite() -> None:
    """trio's own checks for a two-way stream hold, clogged pairs included."""
    await trio.testing.check_two_way_stream(_pair, _clogged_pair)


async def test_passes_the_half_closeable_conformance_suite() -> None:
    """trio's own checks for a half-closeable stream hold, clogged pairs included."""
    await trio.testing.check_half_closeable_stream(_pair, _clogged_pair)


async def test_passes_the_suites_with_latency(autojump_clock: MockClock) -> None:
    """The contract holds for connections that take their time, cut what arrives, and have a speed."""
    links = [Link(latency_s=0.5, jitter_s=0.2), Link(max_piece_bytes=2_000), Link(bytes_per_s=1e6, latency_s=0.01)]
    for link in links:

        async def make(link: Link = link) -> tuple[WireStream, WireStream]:
            return Wires().pair(link)

        await trio.testing.check_two_way_stream(make, None)
        await trio.testing.check_half_closeable_stream(make, None)


async def test_a_cancelled_receive_takes_nothing(autojump_clock: MockClock) -> None:
    """Bytes that arrive after a cancel are there for the next one who receives."""
    client, server = Wires().pair(Link(latency_s=1))
    await client.send_all(b"hello")
    with trio.move_on_after(0.5) as scope:
        await server.receive_some()
    assert scope.cancelled_caught
    assert await server.receive_some() == b"hello"


async def test_a_quiet_connection_is_told_apart(autojump_clock: MockClock) -> None:
    """An idle connection is quiet until bytes, or the end, have really arrived."""
    client, server = Wires().pair(Link(latency_s=1))
    assert client.is_quiet()
    server.close()
    assert client.is_quiet()
    await trio.sleep(1)
    assert not client.is_quiet()


# --- time -------------------------------------------------------------------------------------------------------------


async def test_bytes_take_the_latency(autojump_clock: MockClock) -> None:
    """A piece arrives exactly the latency after it was sent, however many are on their way."""
    client, server = Wires().pair(Link(latency_s=0.25))
    arrivals = []
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            while await server.receive_some():
                arrivals.append(trio.current_time())

        for _ in range(5):
            await client.send_all(b"x")
            await trio.sleep(0.1)
        client.close()
    assert arrivals == pytest.approx([0.25, 0.35, 0.45, 0.55, 0.65])


async def test_jitter_delays_but_never_reorders(autojump_clock: MockClock) -> None:
    """With jitter larger than the distance of the pieces, they arrive in order and none too late."""
    client, server = Wires().pair(Link(latency_s=0.1, jitter_s=5))
    for number in range(50):
        await client.send_all(bytes([number]))
        await trio.sleep(0.01)
    client.close()
    assert await _read_all(server) == bytes(range(50))
    assert 1 < trio.current_time() <= 0.5 + 0.1 + 5


async def test_a_slow_connection_carries_its_speed(autojump_clock: MockClock) -> None:
    """So many bytes a second, and a sender waits when as many are on their way as the connection holds."""
    client, server = Wires().pair(Link(bytes_per_s=1_000, capacity_bytes=1_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"x" * 5_000)
        received = 0
        while received < 5_000:
            received += len(await server.receive_some())
    assert trio.current_time() == pytest.approx(5)


async def test_pieces_are_cut_small() -> None:
    """Nothing larger than the limit is received at once, and the bytes are the same."""
    client, server = Wires().pair(Link(max_piece_bytes=3))
    await client.send_all(bytes(range(100)))
    client.close()
    pieces = []
    while piece := await server.receive_some():
        pieces.append(piece)
    assert b"".join(pieces) == bytes(range(100))
    assert {len(piece) for piece in pieces} == {1, 2, 3}


@pytest.mark.parametrize("field", ["latency_s", "jitter_s", "bytes_per_s", "max_piece_bytes"])
def test_a_link_has_no_negative_settings(field: str) -> None:
    """A wrong setting is named when it is made."""
    with pytest.raises(ConfigError, match=field):
        Link(**{field: -1})
    with pytest.raises(ConfigError, match="capacity_bytes"):
        Link(capacity_bytes=0)


# --- faults -----------------------------------------------------------------------------------------------------------


async def _exchange(
    *faults: Fault, request: bytes = b"0123456789", reply: bytes = b"abcdefghij"
) -> tuple[bytes, bytes]:
    """What arrives of a request and of the reply to it, both ended orderly by their senders."""
    client, server = Wires(*faults).pair()
    await client.send_all(request)
    await server.send_all(reply)
    for stream in (client, server):
        await stream.send_eof()
    return await _read_all(server), await _read_all(client)


async def test_drop_loses_bytes() -> None:
    """The rest of the message, or so many bytes of it, in the direction that is named."""
    assert await _exchange(Drop(after_bytes=3)) == (b"0123456789", b"abc")
    assert await _exchange(Drop(after_bytes=3, size=2)) == (b"0123456789", b"abcfghij")
    assert await _exchange(Drop(direction="request")) == (b"", b"abcdefghij")


async def test_drop_goes_on_over_writes_until_the_message_ends() -> None:
    """What is dropped is a part of the message, not of a write; the next message is whole again."""
    client, server = Wires(Drop(direction="request", request=1, after_bytes=2, size=5)).pair()
    for piece in (b"012", b"345", b"678"):
        await client.send_all(piece)
    await server.send_all(b"reply")
    await client.send_all(b"next")
    client.close()
    assert await _read_all(server) == b"01" + b"78" + b"next"


async def test_corrupt_changes_bytes() -> None:
    """As many bytes as it says are others, at their place; the length is the same."""
    _, reply = await _exchange(Corrupt(after_bytes=4, size=2))
    assert (reply[:4], reply[6:]) == (b"abcd", b"ghij")
    assert reply[4] != b"e"[0]
    assert reply[5] != b"f"[0]


async def test_duplicate_repeats_the_rest_of_a_write() -> None:
    """What follows in the same write comes twice."""
    assert (await _exchange(Duplicate(after_bytes=7)))[1] == b"abcdefghijhij"


async def test_delay_holds_back_what_follows(autojump_clock: MockClock) -> None:
    """Bytes before the place arrive in time, those after it later."""
    client, server = Wires(Delay(direction="request", after_bytes=2, by_s=3)).pair(Link(latency_s=0.5))
    await client.send_all(b"0123")
    assert (await server.receive_some(), trio.current_time()) == (b"01", 0.5)
    assert (await server.receive_some(), trio.current_time()) == (b"23", 3.5)


async def test_cut_resets_both_ways(autojump_clock: MockClock) -> None:
    """What came before the place is delivered; then receiving and sending fail at both ends."""
    client, server = Wires(Cut(after_bytes=4)).pair(Link(latency_s=0.5))
    await client.send_all(b"request")
    assert await server.receive_some() == b"request"
    await server.send_all(b"abcdefgh")
    assert await client.receive_some() == b"abcd"
    for stream in (client, server):
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await stream.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"more")


async def test_cut_with_an_end_looks_orderly() -> None:
    """The receiver sees an end of file where the bytes stop."""
    assert await _exchange(Cut(after_bytes=4, how="end")) == (b"0123456789", b"abcd")


async def test_a_cut_wakes_a_sender_that_waits_for_room(autojump_clock: MockClock) -> None:
    """Nobody stays blocked on a connection that is gone."""
    client, server = Wires(Cut(direction="request", after_bytes=50)).pair(Link(capacity_bytes=10))

    async def read() -> None:
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await _read_all(server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        with trio.fail_after(1), pytest.raises(trio.BrokenResourceError, match="gone"):
            await client.send_all(b"x" * 100)


async def test_stall_stops_both_directions(autojump_clock: MockClock) -> None:
    """Neither bytes nor the end of file arrive before the time is over."""
    client, server = Wires(Stall(direction="request", after_bytes=2, for_s=60)).pair()
    await client.send_all(b"0123")
    assert await server.receive_some() == b"01"
    await server.send_all(b"abc")
    server.close()
    assert await _read_all(client) == b"abc"
    assert trio.current_time() == 60


async def test_a_stall_for_ever_lets_nothing_through(autojump_clock: MockClock) -> None:
    """By default nothing arrives any more, not even that the peer has gone."""
    client, server = Wires(Stall()).pair()
    await client.send_all(b"request")
    await server.send_all(b"reply")
    server.close()
    with trio.move_on_after(1e6) as scope:
        await client.receive_some()
    assert scope.cancelled_caught


async def test_faults_strike_where_they_are_aimed_and_say_so() -> None:
    """One fault for the second request, one for the reply to the third: each is in the log with its place."""
    wires = Wires(Corrupt(request=2, direction="request", after_bytes=1), Cut(request=3, after_bytes=2, how="end"))
    client, server = wires.pair()
    for _ in range(2):
        await client.send_all(b"request")
        await server.send_all(b"reply")
    await client.send_all(b"request")
    await server.send_all(b"reply")
    assert (await _read_all(client))[-2:] == b"re"
    assert [event.fields for event in wires.log.events("fault")] == [
        {"fault": "Corrupt", "connection": 1, "request": 2, "direction": "request", "at": 1},
        {"fault": "Cut", "connection": 1, "request": 3, "direction": "reply", "at": 2},
    ]


async def test_a_message_that_is_too_short_is_left_alone() -> None:
    """A fault aimed behind the end of a message does not strike, nor is it in the log."""
    wires = Wires(Cut(after_bytes=100))
    client, server = wires.pair()
    await client.send_all(b"request")
    await server.send_all(b"reply")
    server.close()
    assert await _read_all(client) == b"reply"
    assert wires.log.events("fault") == []


async def test_faults_at_one_place_all_strike() -> None:
    """Several faults are taken in the order of their bytes, and then of the plan."""
    client, server = Wires(Cut(after_bytes=5, how="end"), Corrupt(after_bytes=2), Drop(after_bytes=2, size=1)).pair()
    await client.send_all(b"request")
    await server.send_all(b"abcdefgh")
    assert await _read_all(client) == b"abde"
