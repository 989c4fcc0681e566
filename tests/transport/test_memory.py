"""The in-memory stream pair keeps trio's stream contract, backpressure included."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from gorouter_trio.transport.memory import MemoryStream, memory_stream_pair


async def _pair() -> tuple[MemoryStream, MemoryStream]:
    return memory_stream_pair(4_096)


async def _clogged_pair() -> tuple[MemoryStream, MemoryStream]:
    left, right = memory_stream_pair(4_096)
    await left.send_all(b"x" * 4_096)
    await right.send_all(b"y" * 4_096)
    return left, right


async def test_passes_the_two_way_conformance_suite() -> None:
    """trio's own checks for a two-way stream hold, clogged pairs included."""
    await trio.testing.check_two_way_stream(_pair, _clogged_pair)


async def test_passes_the_half_closeable_conformance_suite() -> None:
    """trio's own checks for a half-closeable stream hold, clogged pairs included."""
    await trio.testing.check_half_closeable_stream(_pair, _clogged_pair)


async def test_send_blocks_at_the_capacity_and_goes_on_as_the_peer_reads() -> None:
    """A sender never has more than the capacity in the peer's buffer, and every byte arrives in order."""
    left, right = memory_stream_pair(10)
    data = bytes(range(256)) * 4
    finished = trio.Event()
    received = bytearray()

    async def send() -> None:
        await left.send_all(data)
        finished.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert not finished.is_set()
        while len(received) < len(data):
            piece = await right.receive_some()
            assert 0 < len(piece) <= 10
            received += piece
    assert received == data
    assert finished.is_set()


async def test_the_two_directions_do_not_block_each_other() -> None:
    """A full buffer one way leaves the other way free."""
    left, right = memory_stream_pair(4)
    await left.send_all(b"full")
    with trio.fail_after(1):
        await right.send_all(b"back")
        assert await left.receive_some() == b"back"


async def test_a_blocked_sender_learns_that_the_peer_closed() -> None:
    """Closing the reading end wakes a blocked sender with BrokenResourceError, not ClosedResourceError."""
    left, right = memory_stream_pair(4)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def close_later() -> None:
            await trio.testing.wait_all_tasks_blocked()
            await right.aclose()

        with pytest.raises(trio.BrokenResourceError):
            await left.send_all(b"too much for it")


async def test_data_sent_before_a_close_is_read_before_the_end_of_file() -> None:
    """A close does not destroy what is already in the peer's buffer."""
    left, right = memory_stream_pair()
    await left.send_all(b"last words")
    await left.aclose()
    assert await right.receive_some(4) == b"last"
    assert await right.receive_some() == b" words"
    assert await right.receive_some() == b""
    with pytest.raises(trio.BrokenResourceError):
        await right.send_all(b"anyone there?")


async def test_a_cancelled_receive_takes_nothing() -> None:
    """Data that arrives after a cancelled receive belongs to the next one."""
    left, right = memory_stream_pair()
    with trio.move_on_after(0):
        await right.receive_some()
    await left.send_all(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await right.receive_some()
    assert scope.cancelled_caught
    assert await right.receive_some() == b"kept"


async def test_end_of_file_is_one_way() -> None:
    """After send_eof the peer can still answer, and this end can no longer send."""
    left, right = memory_stream_pair()
    await left.send_all(b"question")
    await left.send_eof()
    await left.send_eof()
    assert await right.receive_some() == b"question"
    assert await right.receive_some() == b""
    await right.send_all(b"answer")
    assert await left.receive_some() == b"answer"
    with pytest.raises(trio.ClosedResourceError):
        await left.send_all(b"more")


def test_capacity_must_be_positive() -> None:
    """A buffer of no bytes could never carry any."""
    with pytest.raises(ValueError, match="capacity_bytes"):
        memory_stream_pair(0)


def test_repr_tells_the_state() -> None:
    """The repr shows what is buffered and whether this end is open."""
    left, right = memory_stream_pair()
    assert repr(left) == "<MemoryStream open, 0 bytes to read>"
    left.close()
    left.close()
    assert repr(left) == "<MemoryStream closed, 0 bytes to read>"
    assert left.is_closed
    assert not right.is_closed
