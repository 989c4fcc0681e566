"""A TCP proxy that breaks connections on purpose: real sockets, faults by plan, inside the process of the test.

Theory of operation. Each accepted connection gets a list of faults. Per direction a `_Track`, which is pure, turns
what arrives into steps: send these bytes, pause, end, sever. A reader task feeds the track and stamps each step with
the time at which it is due; a writer task carries the steps out in their order. So a delay costs no throughput, and a
fault never overtakes the bytes that came before it. Positions are counted in bytes of a direction from the start of the
connection, or from the end of a pattern, and not in segments, which TCP does not keep; that makes a fault strike at the
same byte in every run.
"""

from __future__ import annotations

import math
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal, TypeAlias, assert_never, final, get_args

import trio
from msgspec import Struct

from ..errors import ConfigError

__all__ = [
    "FAULT_KINDS",
    "Blackhole",
    "Chop",
    "Corrupt",
    "Cut",
    "Delay",
    "Direction",
    "Duplicate",
    "Ending",
    "Fault",
    "FaultProxy",
    "HalfClose",
    "Plan",
    "ProxyStatistics",
    "Refuse",
    "Stall",
    "Strike",
    "draw_fault",
    "open_fault_proxy",
]

Direction = Literal["up", "down"]
"""`up` is from the client to the server, `down` from the server to the client."""

Ending = Literal["fin", "rst"]
"""How a connection ends: in order, or with a reset, as when a process or a machine dies."""

_RECEIVE_BYTES: Final = 65_536
_QUEUED_STEPS: Final = 16
_LINGER_S: Final = 1.0
_RESET: Final = struct.pack("ii", 1, 0)
_EITHER: Final = (*get_args(Direction), None)


def _check(fault: Struct, **rules: bool) -> None:
    """Raise `ConfigError` that names the first field whose rule does not hold."""
    for name, holds in rules.items():
        if not holds:
            raise ConfigError(f"{type(fault).__name__}: {name} cannot be {getattr(fault, name)!r}")


def _is_time(value: float) -> bool:
    return 0 <= value < math.inf


class Delay(Struct, frozen=True, kw_only=True):
    """Everything arrives `latency_s` later, and up to `jitter_s` more; order and throughput stay. None is both ways."""

    direction: Direction | None = None
    latency_s: float = 0.0
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        _check(
            self,
            direction=self.direction in _EITHER,
            latency_s=_is_time(self.latency_s),
            jitter_s=_is_time(self.jitter_s),
        )


class Chop(Struct, frozen=True, kw_only=True):
    """Bytes go out in pieces of at most `size`, `gap_s` apart; with 0 only a checkpoint apart. None is both ways."""

    direction: Direction | None = None
    size: int = 1
    gap_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, direction=self.direction in _EITHER, size=self.size >= 1, gap_s=_is_time(self.gap_s))


class _Aimed(Struct, frozen=True, kw_only=True):
    """A fault at one place of one direction: past `after` bytes, or past the first bytes equal to `after`, and then
    past `plus` more. With 0 it strikes when the connection is open.
    """

    direction: Direction = "down"
    after: int | bytes = 0
    plus: int = 0

    def __post_init__(self) -> None:
        is_place = isinstance(self.after, bytes) or self.after >= 0
        _check(self, direction=self.direction in get_args(Direction), after=is_place, plus=self.plus >= 0)


class Cut(_Aimed, frozen=True, kw_only=True):
    """Both connections are closed; what comes later in either direction is lost."""

    how: Ending = "rst"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, how=self.how in get_args(Ending))


class HalfClose(_Aimed, frozen=True, kw_only=True):
    """The receiver sees the end of this direction, and the rest of it is lost; the other direction goes on."""


class Stall(_Aimed, frozen=True, kw_only=True):
    """Nothing more is forwarded for `for_s` seconds; by default never again, until the client closes its side.

    As on any line that stands still, what is sent backs up, and sends wait: the proxy takes about a MiB more. A client
    that closes its side with more than that on the way is noticed when the stall is over, or with the proxy.
    """

    for_s: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, for_s=self.for_s >= 0)


class Corrupt(_Aimed, frozen=True, kw_only=True):
    """The next byte arrives changed: its bits in `xor` are flipped."""

    xor: int = 0x01

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, xor=0 < self.xor < 256)


class Duplicate(_Aimed, frozen=True, kw_only=True):
    """The next `length` bytes arrive twice in a row."""

    length: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, length=self.length >= 1)


class Blackhole(Struct, frozen=True):
    """The connection is accepted and read, and goes nowhere: the server never hears of it, the client hears nothing. It
    ends when the client closes its side.
    """


class Refuse(Struct, frozen=True):
    """The connection is reset as soon as it is accepted; the server never hears of it.

    For a refusal before that, as of a port where nobody listens, see `FaultProxy.stop_listening`.
    """


Fault: TypeAlias = Delay | Chop | Cut | HalfClose | Stall | Corrupt | Duplicate | Blackhole | Refuse
FAULT_KINDS: Final[tuple[type[Fault], ...]] = (
    Delay,
    Chop,
    Cut,
    HalfClose,
    Stall,
    Corrupt,
    Duplicate,
    Blackhole,
    Refuse,
)
"""Every kind of fault."""

_AimedFault: TypeAlias = Cut | HalfClose | Stall | Corrupt | Duplicate

Plan: TypeAlias = Sequence[Sequence[Fault]] | Callable[[int], Sequence[Fault]]
"""The faults of each connection, the first one being 0. A sequence leaves connections past its end alone."""


class Strike(Struct, frozen=True):
    """A fault that struck: the connection's number, and the bytes of the fault's direction that had passed."""

    connection: int
    fault: Fault
    at: int = 0


class ProxyStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of the counters. Bytes are those handed on, after all faults."""

    connections: int
    """Accepted so far."""
    open: int
    unreachable: int
    """Connections that were reset because the server could not be reached."""
    bytes_up: int
    bytes_down: int
    struck: Mapping[str, int]
    """How often each kind of fault struck, by the name of its class. A `Delay` or `Chop` strikes once a connection."""


# What a track decides


class _Send(Struct, frozen=True):
    data: bytes


class _Struck(Struct, frozen=True):
    fault: _AimedFault
    at: int


class _End(Struct, frozen=True):
    """The source has ended this direction."""


class _Lost(Struct, frozen=True):
    """The source was reset."""


_Step: TypeAlias = _Send | _Struck | _End | _Lost


class _Aim:
    """Where one fault strikes, found out while bytes pass."""

    __slots__ = ("_pattern", "_plus", "_tail", "at", "fault", "kept")

    def __init__(self, fault: _AimedFault) -> None:
        self.fault = fault
        self.kept = b""
        self._plus = fault.plus
        self._pattern = fault.after if isinstance(fault.after, bytes) else b""
        self._tail = b""
        self.at: int | None = fault.plus + fault.after if isinstance(fault.after, int) else None

    def look(self, data: bytes, start: int) -> None:
        """Look for the pattern in bytes that begin at position `start`."""
        if self.at is None:
            seen = self._tail + data
            found = seen.find(self._pattern)
            if found >= 0:
                self.at = start - len(self._tail) + found + len(self._pattern) + self._plus
            else:
                self._tail = seen[-(len(self._pattern) - 1) :] if len(self._pattern) > 1 else b""

    def strikes_in(self, start: int, end: int) -> int | None:
        """The position of the strike if all it needs has passed by `end`."""
        if self.at is None:
            return None
        at = self.at
        if isinstance(self.fault, Corrupt):
            return at if at < end else None
        if isinstance(self.fault, Duplicate):
            at += self.fault.length
        return max(at, start) if at <= end else None

    def keep(self, data: bytes, start: int) -> None:
        """Remember what a `Duplicate` is to repeat."""
        if isinstance(self.fault, Duplicate) and self.at is not None:
            first, last = self.at - start, self.at + self.fault.length - start
            self.kept += data[max(0, first) : max(0, last)]


@final
class _Track:
    """One direction of one connection: bytes in, steps out."""

    def __init__(self, faults: Sequence[_AimedFault]) -> None:
        self._aims = [_Aim(fault) for fault in faults]
        self._passed = 0

    def feed(self, data: bytes) -> list[_Step]:
        """The steps for the next bytes; with none, those that are due before the first byte."""
        start, end = self._passed, self._passed + len(data)
        self._passed = end
        due: list[tuple[int, _Aim]] = []
        for aim in self._aims:
            aim.look(data, start)
            aim.keep(data, start)
            at = aim.strikes_in(start, end)
            if at is not None:
                due.append((at, aim))
        due.sort(key=lambda strike: strike[0])
        self._aims = [aim for aim in self._aims if all(aim is not struck for _at, struck in due)]
        return list(self._steps(bytearray(data), start, due))

    def _steps(self, data: bytearray, start: int, due: Sequence[tuple[int, _Aim]]) -> Iterator[_Step]:
        done = start
        for at, aim in due:
            if isinstance(aim.fault, Corrupt):
                data[at - start] ^= aim.fault.xor
            if at > done:
                yield _Send(bytes(data[done - start : at - start]))
                done = at
            yield _Struck(aim.fault, at)
            if isinstance(aim.fault, Duplicate):
                yield _Send(aim.kept)
        if len(data) > done - start:
            yield _Send(bytes(data[done - start :]))


# Carrying it out


@final
class _Way:
    """One direction of one connection at work."""

    def __init__(self, link: _Link, direction: Direction, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        self._link = link
        self._direction = direction
        self._source = source
        self._sink = sink
        faults = link.faults
        self._track = _Track([f for f in faults if isinstance(f, _Aimed) and f.direction == direction])
        mine = (direction, None)
        self._delays = [f for f in faults if isinstance(f, Delay) and f.direction in mine]
        self._chop = next((f for f in faults if isinstance(f, Chop) and f.direction in mine), None)
        self._send_step, self._receive_step = trio.open_memory_channel[tuple[float, _Step]](_QUEUED_STEPS)
        self._due_at = -math.inf
        self._is_over = False

    async def read(self) -> None:
        """Feed the track until the source ends."""
        with self._send_step:
            await self._queue(self._track.feed(b""))
            while True:
                try:
                    data = bytes(await self._source.receive_some(_RECEIVE_BYTES))
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._link.ended(self._direction)
                    await self._queue([_Lost()])
                    return
                if not data:
                    self._link.ended(self._direction)
                    await self._queue([_End()])
                    return
                await self._queue(self._track.feed(data))

    async def _queue(self, steps: Sequence[_Step]) -> None:
        delay_s = sum(d.latency_s + self._link.rng.uniform(0.0, d.jitter_s) for d in self._delays)
        self._due_at = max(self._due_at, trio.current_time() + delay_s)
        for step in steps:
            await self._send_step.send((self._due_at, step))

    async def write(self) -> None:
        """Carry out the steps, each when it is due."""
        with self._receive_step:
            async for due_at, step in self._receive_step:
                if due_at > trio.current_time():
                    await trio.sleep_until(due_at)
                try:
                    await self._carry_out(step)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    self._link.sever("rst")

    async def _carry_out(self, step: _Step) -> None:
        match step:
            case _Send(data):
                await self._send(data)
            case _Struck(fault, at):
                self._link.struck(fault, at)
                await self._strike(fault)
            case _End():
                self._end()
            case _Lost():
                self._link.sever("rst")
            case unknown:
                assert_never(unknown)

    async def _strike(self, fault: _AimedFault) -> None:
        match fault:
            case Cut(how=how):
                self._link.sever(how)
            case HalfClose():
                self._end()
            case Stall(for_s=for_s):
                await self._stall(for_s)
            case Corrupt() | Duplicate():
                pass  # the track has done it
            case unknown:
                assert_never(unknown)

    async def _send(self, data: bytes) -> None:
        if self._is_over or self._link.is_cut:
            return
        if self._chop is None:
            await self._sink.send_all(data)
            self._link.count(self._direction, len(data))
            return
        for at in range(0, len(data), self._chop.size):
            piece = data[at : at + self._chop.size]
            await self._sink.send_all(piece)
            self._link.count(self._direction, len(piece))
            await trio.sleep(self._chop.gap_s)

    async def _stall(self, for_s: float) -> None:
        """Wait; a client that has closed its side has given up, and then the connection is over."""
        with trio.move_on_after(for_s):
            await self._link.client_ended.wait()
            self._link.sever("rst")

    def _end(self) -> None:
        self._is_over = True
        _shut(self._sink)


@final
class _Link:
    """One connection through the proxy."""

    def __init__(
        self,
        proxy: FaultProxy,
        number: int,
        *,
        faults: Sequence[Fault],
        client: trio.SocketStream,
        server: trio.SocketStream,
    ) -> None:
        self.faults = faults
        self.rng = proxy.draw_rng()
        self.is_cut = False
        self.client_ended = trio.Event()
        self._proxy = proxy
        self._number = number
        self._ends = (client, server)
        self._scope = trio.CancelScope()
        self._ways: dict[Direction, _Way] = {
            "up": _Way(self, "up", client, server),
            "down": _Way(self, "down", server, client),
        }

    async def run(self) -> None:
        for fault in self.faults:
            if isinstance(fault, (Delay, Chop)):
                self.struck(fault, 0)
        with self._scope:
            async with trio.open_nursery() as nursery:
                for way in self._ways.values():
                    nursery.start_soon(way.read)
                    nursery.start_soon(way.write)

    def ended(self, direction: Direction) -> None:
        if direction == "up":
            self.client_ended.set()

    def count(self, direction: Direction, size: int) -> None:
        self._proxy.count(direction, size)

    def struck(self, fault: Fault, at: int) -> None:
        self._proxy.note(Strike(self._number, fault, at))

    def sever(self, how: Ending) -> None:
        """End the connection on both sides. In order, what the peers still send is read and lost, or it would reset."""
        self.is_cut = True
        for end in self._ends:
            _shut(end) if how == "fin" else _reset(end)
        if how == "rst":
            self._scope.cancel()
        else:
            self._scope.deadline = trio.current_time() + _LINGER_S


def _shut(stream: trio.SocketStream) -> None:
    # Not `send_eof`, which must not be called while another task sends.
    with suppress(OSError):
        stream.socket.shutdown(socket.SHUT_WR)


def _reset(stream: trio.SocketStream) -> None:
    with suppress(OSError):
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    stream.socket.close()


@final
class FaultProxy:
    """A running proxy; made by `open_fault_proxy`. Clients connect to `host` and `port`."""

    def __init__(self, target: tuple[str, int], nursery: trio.Nursery, *, plan: Plan, rng: random.Random) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self._target = target
        self._nursery = nursery
        self.set_plan(plan)
        self._rng = rng
        self._accepting: trio.CancelScope | None = None
        self._stopped = trio.Event()
        self._links: set[_Link] = set()
        self._strikes: list[Strike] = []
        self._struck: Counter[str] = Counter()
        self._bytes = {"up": 0, "down": 0}
        self._accepted = self._open = self._unreachable = 0

    def __repr__(self) -> str:
        return f"<FaultProxy {self.host}:{self.port}, {self._open} open>"

    @property
    def strikes(self) -> Sequence[Strike]:
        """Every fault that has struck, in order."""
        return tuple(self._strikes)

    def statistics(self) -> ProxyStatistics:
        """A snapshot of the counters."""
        return ProxyStatistics(
            connections=self._accepted,
            open=self._open,
            unreachable=self._unreachable,
            bytes_up=self._bytes["up"],
            bytes_down=self._bytes["down"],
            struck=dict(self._struck),
        )

    def set_plan(self, plan: Plan) -> None:
        """Use another plan from the next connection on, which is its connection 0; raises as `open_fault_proxy`."""
        self._plan: Plan = plan if callable(plan) else [_faults(number, faults) for number, faults in enumerate(plan)]
        self._planned = 0

    def sever_all(self, how: Ending = "rst") -> int:
        """End every open connection now and say how many there were; those in a `Blackhole` stay."""
        links = list(self._links)
        for link in links:
            link.sever(how)
        return len(links)

    async def listen(self) -> None:
        """Accept connections, at the port that it had before if it had one; `open_fault_proxy` has called it."""
        listeners = await trio.open_tcp_listeners(self.port, host=self.host)
        self.port = listeners[0].socket.getsockname()[1]
        self._accepting = trio.CancelScope()
        self._stopped = trio.Event()
        self._nursery.start_soon(self._accept, listeners, self._accepting)

    async def stop_listening(self) -> None:
        """Have the system refuse connections (ECONNREFUSED) until `listen`; open ones go on."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        await self._stopped.wait()

    # For links

    def draw_rng(self) -> random.Random:
        """A random source of one connection, so that connections do not change each other's."""
        return random.Random(self._rng.getrandbits(64))

    def count(self, direction: Direction, size: int) -> None:
        """Bytes were handed on."""
        self._bytes[direction] += size

    def note(self, strike: Strike) -> None:
        """A fault has struck."""
        self._strikes.append(strike)
        self._struck[type(strike.fault).__name__] += 1

    async def _accept(self, listeners: list[trio.SocketListener], scope: trio.CancelScope) -> None:
        stopped = self._stopped
        try:
            with scope:
                await trio.serve_listeners(self._serve, listeners, handler_nursery=self._nursery)
        finally:
            stopped.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        number, self._accepted = self._accepted, self._accepted + 1
        self._open += 1
        try:
            async with client:
                await self._connect(number, client)
        finally:
            self._open -= 1

    async def _connect(self, number: int, client: trio.SocketStream) -> None:
        faults = self._next_faults()
        for fault in faults:
            if isinstance(fault, (Refuse, Blackhole)):
                self.note(Strike(number, fault))
                if isinstance(fault, Blackhole):
                    await _swallow(client)
                else:
                    _reset(client)
                return
        try:
            server = await trio.open_tcp_stream(*self._target)
        except OSError:
            self._unreachable += 1
            _reset(client)
            return
        async with server:
            link = _Link(self, number, faults=faults, client=client, server=server)
            self._links.add(link)
            try:
                await link.run()
            finally:
                self._links.discard(link)

    def _next_faults(self) -> Sequence[Fault]:
        number, self._planned = self._planned, self._planned + 1
        if callable(self._plan):
            return _faults(number, self._plan(number))
        return self._plan[number] if number < len(self._plan) else ()


def _faults(number: int, faults: Sequence[Fault]) -> tuple[Fault, ...]:
    """The faults of a connection; raises `ConfigError` for what would never strike."""
    if isinstance(faults, Struct):
        raise ConfigError(f"plan: connection {number} needs a list of faults, not {faults!r}")
    for fault in faults:
        if not isinstance(fault, FAULT_KINDS):
            raise ConfigError(
                f"plan: {fault!r} of {type(fault).__module__} would never strike; a proxy has those of {__name__}: "
                f"{', '.join(kind.__name__ for kind in FAULT_KINDS)}"
            )
    return tuple(faults)


async def _swallow(stream: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(_RECEIVE_BYTES):
            pass


@asynccontextmanager
async def open_fault_proxy(
    target_host: str, target_port: int, *, plan: Plan = (), rng: random.Random
) -> AsyncIterator[FaultProxy]:
    """A proxy on a free port of 127.0.0.1 that forwards to the target, with the faults of `plan`.

    `rng` is what jitter is drawn from. Its tasks live in a nursery of its own; leaving closes its listener and cuts
    every connection. Times are on the trio clock. A `plan` that is a function is called once a connection and must not
    raise. Raises `OSError` when no port can be had, and `ConfigError` for a plan of something else than the faults of
    this module.
    """
    try:
        async with trio.open_nursery() as nursery:
            proxy = FaultProxy((target_host, target_port), nursery, plan=plan, rng=rng)
            await proxy.listen()
            try:
                yield proxy
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The tasks of the proxy raise nothing, so a lone error is the block's own and leaves as itself.
        own = group.split(trio.Cancelled)[1]
        while isinstance(own, BaseExceptionGroup) and len(own.exceptions) == 1:
            own = own.exceptions[0]
        if own is None or isinstance(own, BaseExceptionGroup):
            raise
        raise own from own.__cause__


def draw_fault(rng: random.Random, *, reach: int = 2_000, kinds: Sequence[type[Fault]] = FAULT_KINDS) -> Fault:
    """A random fault of one of `kinds`, for a connection that carries about `reach` bytes in a direction.

    Delays and pauses are at most 20 ms long. What never ends by itself, a `Stall` or `Blackhole`, is drawn as often as
    the others: leave it out of `kinds` where nothing gives up.
    """
    kind = rng.choice(list(kinds))
    direction: Direction = rng.choice(("up", "down"))
    if kind is Delay:
        return Delay(latency_s=rng.uniform(0, 0.01), jitter_s=rng.uniform(0, 0.01))
    if kind is Chop:
        return Chop(direction=rng.choice((direction, None)), size=rng.choice((1, 2, 7, 100)))
    if kind is Blackhole or kind is Refuse:
        return kind()
    after: int | bytes = rng.choice((0, b"\r\n\r\n", rng.randrange(reach), rng.randrange(reach)))
    plus = rng.choice((0, 0, rng.randrange(reach)))
    if kind is Cut:
        return Cut(direction=direction, after=after, plus=plus, how=rng.choice(("fin", "rst")))
    if kind is HalfClose:
        return HalfClose(direction=direction, after=after, plus=plus)
    if kind is Stall:
        return Stall(direction=direction, after=after, plus=plus, for_s=rng.choice((0.02, math.inf)))
    if kind is Corrupt:
        return Corrupt(direction=direction, after=after, plus=plus, xor=rng.randrange(1, 256))
    return Duplicate(direction=direction, after=after, plus=plus, length=rng.randrange(1, 64))
