"""The fault proxy on real sockets: each fault does what it says, at the byte it names, and nothing else."""

from __future__ import annotations

import errno
import math
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.errors import ConfigError
from gorouter_trio.testing import faults
from gorouter_trio.testing.proxy import (
    FAULT_KINDS,
    Blackhole,
    Chop,
    Corrupt,
    Cut,
    Delay,
    Direction,
    Duplicate,
    Fault,
    FaultProxy,
    HalfClose,
    Plan,
    Refuse,
    Stall,
    _AimedFault,
    _Send,
    _Struck,
    _Track,
    draw_fault,
    open_fault_proxy,
)

pytestmark = pytest.mark.net

SENT = bytes(range(256)) * 40
TEXT = b"abc--def--ghi"


class Echo:
    """A server that sends back what it gets, and remembers it by connection."""

    def __init__(self) -> None:
        self.port = 0
        self.received: list[bytearray] = []
        self.endings: list[str] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        got = bytearray()
        self.received.append(got)
        try:
            while data := await stream.receive_some():
                got += data
                await stream.send_all(data)
            self.endings.append("fin")
            await stream.send_eof()
        except trio.BrokenResourceError:
            self.endings.append("rst")


@asynccontextmanager
async def open_server(handler: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[int]:
    """A TCP server on a free port, which is yielded."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_echo(plan: Plan = ()) -> AsyncIterator[tuple[Echo, FaultProxy]]:
    echo = Echo()
    async with (
        open_server(echo.serve) as port,
        open_fault_proxy("127.0.0.1", port, plan=plan, rng=random.Random(7)) as proxy,
    ):
        yield echo, proxy


async def converse(
    proxy: FaultProxy, data: bytes = TEXT, *, wait_s: float = 5.0, eof: bool = True
) -> tuple[bytes, str]:
    """Send everything, say that it is all, and read to the end: what came back, and how it ended."""
    got = bytearray()
    with trio.move_on_after(wait_s):
        try:
            async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(_send, stream, data, eof)
                async for piece in stream:
                    got += piece
            return bytes(got), "fin"
        except* trio.BrokenResourceError:
            pass
        return bytes(got), "rst"
    return bytes(got), "silence"


async def _send(stream: trio.SocketStream, data: bytes, eof: bool) -> None:
    # Whoever reads tells how the connection ended.
    try:
        await stream.send_all(data)
        if eof:
            await stream.send_eof()
    except trio.BrokenResourceError:
        pass


async def settle(proxy: FaultProxy) -> None:
    with trio.fail_after(5):
        while proxy.statistics().open:
            await trio.sleep(0.001)


# --- one fault at a time ----------------------------------------------------------------------------------------------


async def test_without_faults_nothing_changes() -> None:
    """Bytes of both directions arrive whole and are counted; so does the end."""
    async with open_echo() as (echo, proxy):
        assert await converse(proxy, SENT) == (SENT, "fin")
        await settle(proxy)
        assert bytes(echo.received[0]) == SENT
        assert echo.endings == ["fin"]
        s = proxy.statistics()
        assert (s.connections, s.open, s.unreachable) == (1, 0, 0)
        assert (s.bytes_up, s.bytes_down, s.struck) == (len(SENT), len(SENT), {})


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("after", [0, 1, 5, b"--", b"--def-"])
async def test_cut(direction: Direction, how: str, after: int | bytes) -> None:
    """A cut lets exactly the bytes before it through, and both sides see how it was made."""
    fault = Cut(direction=direction, after=after, how=how)  # type: ignore[arg-type]  # literals from parametrize
    at = after if isinstance(after, int) else TEXT.index(after) + len(after)
    async with open_echo([[fault]]) as (echo, proxy):
        got, ending = await converse(proxy)
        await settle(proxy)
        s = proxy.statistics()
        assert TEXT.startswith(got)
        assert ending == how
        assert (s.bytes_up if direction == "up" else s.bytes_down) == at
        assert proxy.strikes[0].fault is fault
        assert proxy.strikes[0].at == at
        assert s.struck == {"Cut": 1}
        if how == "fin":
            assert got == (TEXT[:at] if direction == "down" else got)
        # The client's own end may have reached the server before a cut of the other direction.
        assert set(echo.endings) <= ({how} if direction == "up" else {how, "fin"})
        assert await converse(proxy) == (TEXT, "fin")


async def test_cut_counts_beyond_a_pattern() -> None:
    """`plus` is counted from the end of the pattern, wherever the pieces were cut."""
    async with open_echo([[Chop(size=1), Cut(direction="down", after=b"--", plus=3, how="fin")]]) as (_echo, proxy):
        assert await converse(proxy) == (b"abc--def", "fin")


async def test_half_close() -> None:
    """The client sees the end early and may go on sending, which the server gets."""
    async with open_echo([[HalfClose(direction="down", after=4)]]) as (echo, proxy):
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            await stream.send_all(b"abcdef")
            got = b"".join([piece async for piece in stream])
            await stream.send_all(b"more")
            await stream.send_eof()
            await settle(proxy)
        assert got == b"abcd"
        assert bytes(echo.received[0]) == b"abcdefmore"
        assert echo.endings == ["fin"]


async def test_half_close_upwards() -> None:
    """The server sees the end of the request early and still answers."""
    async with open_echo([[HalfClose(direction="up", after=4)]]) as (echo, proxy):
        assert await converse(proxy) == (TEXT[:4], "fin")
        assert bytes(echo.received[0]) == TEXT[:4]


async def test_stall_for_a_while() -> None:
    """A pause delays everything behind it and loses nothing."""
    async with open_echo([[Stall(direction="down", after=2, for_s=0.05)]]) as (_echo, proxy):
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            began = trio.current_time()
            await stream.send_all(TEXT)
            got = b""
            while len(got) < len(TEXT):
                got += await stream.receive_some()
        assert got == TEXT
        assert trio.current_time() - began >= 0.05


async def test_stall_for_ever() -> None:
    """After the stall nothing comes; once the receiver gives up, the connection is gone from the proxy too."""
    async with open_echo([[Stall(direction="down", after=5)]]) as (_echo, proxy):
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            await stream.send_all(TEXT)
            got = b""
            while len(got) < 5:
                got += await stream.receive_some()
            with trio.move_on_after(0.05) as scope:
                await stream.receive_some()
            assert scope.cancelled_caught
        assert got == TEXT[:5]
        await settle(proxy)


async def test_corrupt() -> None:
    """One byte is changed, in one direction."""
    async with open_echo([[Corrupt(direction="up", after=3, xor=0xFF)]]) as (echo, proxy):
        got, _ = await converse(proxy, b"\x00" * 8)
        assert got == b"\x00\x00\x00\xff\x00\x00\x00\x00" == bytes(echo.received[0])


async def test_duplicate() -> None:
    """A stretch of bytes arrives twice."""
    async with open_echo([[Duplicate(direction="up", after=b"abc", length=5)]]) as (echo, proxy):
        await converse(proxy)
        assert bytes(echo.received[0]) == b"abc--def--def--ghi"


async def test_chop() -> None:
    """The bytes come one at a time; a reader that keeps up sees the pieces."""
    async with open_echo([[Chop(direction="down", size=1, gap_s=0.001)]]) as (_echo, proxy):
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            await stream.send_all(TEXT)
            pieces: list[bytes] = []
            while sum(map(len, pieces)) < len(TEXT):
                pieces.append(bytes(await stream.receive_some()))
        assert b"".join(pieces) == TEXT
        assert len(pieces) > len(TEXT) / 2


async def test_delay_keeps_order_and_throughput() -> None:
    """Latency is added once and not once a segment; what was sent first arrives first, jitter or not."""
    async with open_echo([[Delay(latency_s=0.04, jitter_s=0.01)]]) as (_echo, proxy):
        began = trio.current_time()
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            for _ in range(10):
                await stream.send_all(TEXT)
                await trio.sleep(0.005)
            got = b""
            while len(got) < 10 * len(TEXT):
                got += await stream.receive_some()
        took = trio.current_time() - began
        assert got == TEXT * 10
        assert 0.08 <= took < 0.4  # one after the other they would take 10 * 0.08 s
        assert proxy.statistics().struck == {"Delay": 1}


async def test_blackhole() -> None:
    """The server never hears of it, the client never hears anything."""
    async with open_echo([[Blackhole()]]) as (echo, proxy):
        assert await converse(proxy, wait_s=0.05, eof=False) == (b"", "silence")
        assert echo.received == []
        await settle(proxy)


async def test_refuse() -> None:
    """The client is reset, the server never hears of it."""
    async with open_echo([[Refuse()]]) as (echo, proxy):
        assert await converse(proxy) == (b"", "rst")
        assert echo.received == []
        assert proxy.statistics().struck == {"Refuse": 1}


async def test_server_out_of_reach() -> None:
    """A server that is not there counts, and resets the client."""
    async with open_fault_proxy("127.0.0.1", 1, rng=random.Random(0)) as proxy:
        assert await converse(proxy) == (b"", "rst")
        assert proxy.statistics().unreachable == 1


async def test_stop_listening_and_listen_again() -> None:
    """While stopped, the system refuses; open connections live on; the port stays the same."""
    async with open_echo() as (_echo, proxy):
        port = proxy.port
        async with await trio.open_tcp_stream(proxy.host, port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            await proxy.stop_listening()
            with pytest.raises(OSError, match="connect") as caught:
                await trio.open_tcp_stream(proxy.host, port)
            assert isinstance(caught.value.__cause__, BaseExceptionGroup)
            (cause,) = caught.value.__cause__.exceptions
            assert isinstance(cause, OSError)
            assert cause.errno == errno.ECONNREFUSED
            await stream.send_all(b"y")
            assert await stream.receive_some() == b"y"
            await proxy.listen()
            assert proxy.port == port
        assert await converse(proxy) == (TEXT, "fin")


async def test_sever_all() -> None:
    """Every connection can be cut from outside."""
    async with open_echo() as (echo, proxy):
        async with await trio.open_tcp_stream(proxy.host, proxy.port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            assert proxy.sever_all() == 1
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await settle(proxy)
        assert echo.endings == ["rst"]


async def test_resets_pass_through() -> None:
    """A server that dies resets its client through the proxy, after all that it had sent."""

    async def die(stream: trio.SocketStream) -> None:
        await stream.send_all(b"last words")
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.aclose()

    async with open_server(die) as port, open_fault_proxy("127.0.0.1", port, rng=random.Random(0)) as proxy:
        got, ending = await converse(proxy, b"", eof=False)
    assert ending == "rst"
    assert b"last words".startswith(got)


# --- plans ------------------------------------------------------------------------------------------------------------


async def test_plans() -> None:
    """A sequence and a function choose by the number of the connection; a new plan starts from 0."""
    asked: list[int] = []

    def plan(number: int) -> Sequence[Fault]:
        asked.append(number)
        return [Cut(direction="down", after=number, how="fin")]

    async with open_echo([[], [Cut(direction="down", after=1, how="fin")]]) as (_echo, proxy):
        assert [(await converse(proxy))[0] for _ in range(3)] == [TEXT, TEXT[:1], TEXT]
        proxy.set_plan(plan)
        assert [(await converse(proxy))[0] for _ in range(3)] == [b"", TEXT[:1], TEXT[:2]]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("plan", [[Cut()], [[], [faults.Cut(after_bytes=3)]]], ids=["flat", "of a world"])
async def test_a_plan_that_would_never_strike_is_refused(plan: Any) -> None:
    """Faults that are no lists of faults, and those of worlds, are told before a test passes without them."""
    with pytest.raises(ConfigError, match=r"^plan: .*Cut\("):
        async with open_fault_proxy("127.0.0.1", 1, plan=plan, rng=random.Random(0)):
            pass
    async with open_fault_proxy("127.0.0.1", 1, rng=random.Random(0)) as proxy:
        with pytest.raises(ConfigError, match=r"^plan: .*Cut\("):
            proxy.set_plan(plan)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Chop(size=0), "size"),
        (lambda: Chop(gap_s=math.nan), "gap_s"),
        (lambda: Corrupt(after=-1), "after"),
        (lambda: Corrupt(xor=256), "xor"),
        (lambda: Cut(how="reset"), "how"),  # type: ignore[arg-type]
        (lambda: Delay(latency_s=-1), "latency_s"),
        (lambda: Duplicate(length=0), "length"),
        (lambda: HalfClose(plus=-1), "plus"),
        (lambda: Stall(direction="reply"), "direction"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_fault_is_refused(make: Callable[[], object], field: str) -> None:
    """A setting out of range is named when the fault is made, not in a task of the proxy."""
    with pytest.raises(ConfigError, match=field):
        make()


async def test_leaving_cuts_everything(no_leaks: Callable[[], AbstractAsyncContextManager[None]]) -> None:
    """No task, socket or listener is left, whatever was going on."""
    async with no_leaks():
        async with open_echo([[], [Blackhole()], [Stall(after=1)], [Chop(gap_s=10)]]) as (_echo, proxy):
            streams = [await trio.open_tcp_stream(proxy.host, proxy.port) for _ in range(4)]
            for stream in streams:
                await stream.send_all(TEXT)
            while proxy.statistics().open < 4:
                await trio.sleep(0.001)
        for stream in streams:
            await stream.aclose()


async def test_errors_of_the_block_leave_as_themselves() -> None:
    """A failed assertion inside is not wrapped into a group."""
    with pytest.raises(ZeroDivisionError):
        async with open_fault_proxy("127.0.0.1", 1, rng=random.Random(0)):
            _ = 1 / 0


async def test_cancelling_passes() -> None:
    """A deadline around the proxy ends it."""
    with trio.move_on_after(0.02) as scope:
        async with open_echo() as (_echo, _proxy):
            await trio.sleep_forever()
    assert scope.cancelled_caught


# --- tracks: the same fault at the same byte, however the bytes come --------------------------------------------------

positions = st.integers(0, 30) | st.binary(min_size=1, max_size=3).map(lambda pattern: bytes(b % 3 for b in pattern))
aimed = st.one_of(
    st.builds(Cut, after=positions, plus=st.integers(0, 5)),
    st.builds(Stall, after=positions, plus=st.integers(0, 5)),
    st.builds(Corrupt, after=positions, plus=st.integers(0, 5), xor=st.integers(1, 255)),
    st.builds(Duplicate, after=positions, plus=st.integers(0, 5), length=st.integers(1, 6)),
)


def trace(faults: Sequence[_AimedFault], pieces: Sequence[bytes]) -> list[object]:
    """What a track does, with adjacent bytes joined."""
    track = _Track(faults)
    steps: list[object] = []
    for piece in [b"", *pieces]:
        for step in track.feed(piece):
            if isinstance(step, _Send) and steps and isinstance(steps[-1], bytes):
                steps[-1] += step.data
            elif isinstance(step, _Send):
                steps.append(step.data)
            elif isinstance(step, _Struck):
                steps.append((step.fault, step.at))
    return steps


def expected(fault: _AimedFault, data: bytes) -> tuple[bytes, int | None]:
    """What one fault makes of the whole, worked out at a glance: the bytes that arrive, and where it strikes."""
    if isinstance(fault.after, bytes):
        found = data.find(fault.after)
        at = found + len(fault.after) + fault.plus if found >= 0 else math.inf
    else:
        at = fault.after + fault.plus
    if isinstance(fault, Duplicate):
        end = at + fault.length
        if end > len(data):
            return data, None
        return data[: int(end)] + data[int(at) :], int(end)
    if isinstance(fault, Corrupt):
        if at >= len(data):
            return data, None
        changed = bytearray(data)
        changed[int(at)] ^= fault.xor
        return bytes(changed), int(at)
    return data, int(at) if at <= len(data) else None


@st.composite
def cut_up(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    data = bytes(b % 3 for b in draw(st.binary(max_size=40)))
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    edges = [0, *cuts, len(data)]
    return data, [data[a:b] for a, b in pairwise(edges) if b > a]


@given(fault=aimed, cut=cut_up())
def test_a_fault_strikes_at_its_byte_however_cut(fault: _AimedFault, cut: tuple[bytes, list[bytes]]) -> None:
    """One fault does the same to the same bytes in whatever pieces they arrive."""
    data, pieces = cut
    steps = trace([fault], pieces)
    sent = b"".join(step for step in steps if isinstance(step, bytes))
    strikes = [step[1] for step in steps if isinstance(step, tuple)]
    want, at = expected(fault, data)
    assert sent == want
    assert strikes == ([] if at is None else [at])


@given(faults=st.lists(aimed, max_size=4), cut=cut_up())
def test_several_faults_do_the_same_however_cut(faults: list[_AimedFault], cut: tuple[bytes, list[bytes]]) -> None:
    """Several faults of one direction strike in the order of their places, independent of the pieces."""
    data, pieces = cut
    whole = trace(faults, [data] if data else [])
    parts = trace(faults, pieces)
    assert b"".join(s for s in whole if isinstance(s, bytes)) == b"".join(s for s in parts if isinstance(s, bytes))
    places = [[s[1] for s in steps if isinstance(s, tuple)] for steps in (whole, parts)]
    assert places[0] == places[1] == sorted(places[0])


def test_drawn_faults_cover_every_kind(rng: random.Random) -> None:
    """The drawing reaches all kinds and keeps to those asked for."""
    assert {type(draw_fault(rng)) for _ in range(500)} == set(FAULT_KINDS)
    assert {type(draw_fault(rng, kinds=[Cut])) for _ in range(20)} == {Cut}
