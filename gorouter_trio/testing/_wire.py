"""Connections that take time: the two ends of a byte stream, and what is on its way between them.

Theory of operation. No task carries the bytes. Sending puts a piece on a lane with the time at which it arrives, and
receiving waits for that time; so a connection costs what its two ends do, and latency is exact. Each lane draws its
jitter from a stream of its own, in the order of its sends, so that chance on one connection cannot shift another.

Faults are worked in where bytes are put on a lane, in the task that sends them. Closing must do without a checkpoint
and may happen anywhere, also while trio delivers cancels, whose order is not fixed: it writes nothing to the log.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from typing import TYPE_CHECKING, Literal, Protocol, final

import trio
from msgspec import Struct

from ..errors import ConfigError
from .faults import Corrupt, Cut, Delay, Drop, Duplicate, Stall

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from .faults import Aim, Direction, FaultPlan

__all__ = ["Link", "WireConnection", "WireStream"]

_RECEIVE_BYTES = 65_536


class Link(Struct, frozen=True, kw_only=True):
    """What every connection of a world is like, each way. Times are virtual seconds.

    A piece arrives `latency_s` after it was sent, and up to `jitter_s` later, never before the one ahead of it.
    Connecting takes a round trip. `bytes_per_s` is the speed of a connection, 0 for no limit. `max_piece_bytes` above 0
    cuts what arrives into pieces of 1 to this many bytes. `capacity_bytes` may be on their way before senders wait.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    max_piece_bytes: int = 0
    capacity_bytes: int = 65_536

    def __post_init__(self) -> None:
        for name in ("latency_s", "jitter_s", "bytes_per_s", "max_piece_bytes"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be 0 or more, not {value!r}")
        if self.capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes must be at least 1, not {self.capacity_bytes!r}")

    def draw_latency_s(self, rng: random.Random) -> float:
        """How long one piece takes."""
        return self.latency_s + (self.jitter_s * rng.random() if self.jitter_s else 0.0)


@final
class _Lane:
    """One direction. `ends_at` and `ending` tell what the receiver meets behind the last piece; from `broken_at` on,
    sending fails; `to_drop` bytes of the message are still to be lost."""

    __slots__ = (
        "_free_at",
        "_last_due",
        "_link",
        "_rng",
        "aims",
        "broken_at",
        "digest",
        "ending",
        "ends_at",
        "in_flight",
        "is_abandoned",
        "pieces",
        "position",
        "readable",
        "sent",
        "to_drop",
        "writable",
    )

    def __init__(self, link: Link, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._free_at = -math.inf
        self._last_due = -math.inf
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.in_flight = 0
        self.sent = 0
        self.digest = hashlib.blake2b(digest_size=8)
        self.ends_at = self.broken_at = math.inf
        self.ending: Literal["end", "reset"] = "end"
        self.is_abandoned = False
        self.aims: list[Aim] = []
        self.position = 0
        self.to_drop = 0.0
        self.readable = trio.lowlevel.ParkingLot()
        self.writable = trio.lowlevel.ParkingLot()

    # Sending

    @property
    def room(self) -> int:
        """How many bytes may be sent now."""
        return self._link.capacity_bytes - self.in_flight

    def begin_message(self, aims: list[Aim]) -> None:
        """The next byte is the first of a message, at which these faults are aimed."""
        self.aims = aims
        self.position = 0
        self.to_drop = 0.0

    def put(self, data: bytes) -> None:
        """Send `data`, which no fault changes any more."""
        self.position += len(data)
        if self.to_drop:
            lost = int(min(self.to_drop, len(data)))
            self.to_drop -= lost
            data = data[lost:]
        if self.is_abandoned:
            self.in_flight += len(data)
        elif data:
            self._carry(data)

    def _carry(self, data: bytes) -> None:
        if self._link.max_piece_bytes:
            at = 0
            while at < len(data):
                size = self._rng.randint(1, self._link.max_piece_bytes)
                self._add(data[at : at + size])
                at += size
        else:
            self._add(data)
        self.readable.unpark_all()

    def _add(self, data: bytes) -> None:
        now = trio.current_time()
        if self._link.bytes_per_s:
            now = self._free_at = max(now, self._free_at) + len(data) / self._link.bytes_per_s
        self._last_due = max(now + self._link.draw_latency_s(self._rng), self._last_due)
        self.pieces.append((self._last_due, data))
        self.in_flight += len(data)

    def hold_until(self, time: float) -> None:
        """Nothing that is sent from now on arrives before `time`."""
        self._last_due = max(self._last_due, time)

    def arrival(self) -> float:
        """When what is sent now would arrive, without jitter."""
        return max(trio.current_time() + self._link.latency_s, self._last_due)

    def end(self, at: float, *, how: Literal["end", "reset"] = "end") -> None:
        """The receiver meets the end at `at`; the first one counts."""
        if at < self.ends_at:
            self.ends_at = at
            self.ending = how
            self.readable.unpark_all()

    def break_at(self, time: float) -> None:
        """Sending fails from `time` on."""
        if time < self.broken_at:
            self.broken_at = time
            self.writable.unpark_all()

    def abandon(self) -> None:
        """Nobody will receive any more; what is on its way takes up room until the sender learns of it."""
        self.is_abandoned = True
        self.pieces.clear()
        self.readable.unpark_all()
        self.writable.unpark_all()

    # Receiving

    def next_change(self) -> float:
        """When there is something to receive, as far as is known."""
        return min(self.pieces[0][0] if self.pieces else math.inf, self.ends_at)

    def take(self, max_bytes: int) -> bytes | None:
        """What has arrived, empty at the end, None while there is nothing. Raises at a reset."""
        now = trio.current_time()
        taken: list[bytes] = []
        size = 0
        while self.pieces and self.pieces[0][0] <= min(now, self.ends_at) and size < max_bytes:
            piece = self._take_piece(max_bytes - size)
            taken.append(piece)
            size += len(piece)
            if self._link.max_piece_bytes:
                break
        if taken:
            self.in_flight -= size
            self.writable.unpark_all()
            return b"".join(taken)
        if now < self.ends_at:
            return None
        if self.ending == "reset":
            raise trio.BrokenResourceError("the connection was reset")
        return b""

    def _take_piece(self, max_bytes: int) -> bytes:
        due, piece = self.pieces[0]
        if len(piece) <= max_bytes:
            self.pieces.popleft()
            return piece
        self.pieces[0] = (due, piece[max_bytes:])
        return piece[:max_bytes]


async def _wait(lot: trio.lowlevel.ParkingLot, until: float) -> None:
    """Wait until somebody wakes the lot, or until a time."""
    if until == math.inf:
        await lot.park()
    else:
        with trio.CancelScope(deadline=until):
            await lot.park()


@final
class WireConnection:
    """Two ends and two lanes. `client` and `server` are the ends, each to be closed by who has it."""

    def __init__(
        self, number: int, host: str, *, link: Link, rng: Callable[[str], random.Random], network: _Network
    ) -> None:
        self.number = number
        self.host = host
        self._network = network
        self._is_replying = True
        self.request = 0
        self._up = _Lane(link, rng(f"connection/{number}/request"))
        self._down = _Lane(link, rng(f"connection/{number}/reply"))
        self.client = WireStream(self, incoming=self._down, outgoing=self._up)
        self.server = WireStream(self, incoming=self._up, outgoing=self._down)

    def __repr__(self) -> str:
        return f"<WireConnection {self.number} to {self.host}>"

    @property
    def is_closed(self) -> bool:
        """Whether both ends were closed."""
        return self.client.is_closed and self.server.is_closed

    @property
    def has_ended_at_server(self) -> bool:
        """Whether the client's end of the stream has arrived, or a reset."""
        return self._up.ends_at <= trio.current_time()

    def totals(self) -> dict[str, object]:
        """How much was sent either way, and what, as a digest."""
        return {
            "sent": self._up.sent,
            "received": self._down.sent,
            "digests": [self._up.digest.hexdigest(), self._down.digest.hexdigest()],
        }

    def fail_operation(self, stream: WireStream, operation: str) -> bool:
        """Whether what the client does now is to fail; then the connection is reset."""
        if stream is not self.client or not self._network.plan.on_operation(operation):
            return False
        self.cut(trio.current_time(), how="reset")
        return True

    def send(self, stream: WireStream, data: bytes) -> None:
        """Put `data` on its way, with the faults that are aimed at it."""
        is_reply = stream is self.server
        if is_reply != self._is_replying:
            self._turn_around(is_reply=is_reply)
        lane = self._down if is_reply else self._up
        lane.sent += len(data)
        lane.digest.update(data)
        while lane.aims and lane.position + len(data) > (at := _offset(lane.aims[0])):
            ahead = max(0, at - lane.position)
            if ahead:
                lane.put(data[:ahead])
            aim = lane.aims.pop(0)
            aim.strike(connection=self.number, request=self.request, direction=_name(is_reply), at=lane.position)
            data = self._strike(aim, lane, data[ahead:])
            if not data:
                return
        lane.put(data)

    def cut(self, at: float, *, how: Literal["end", "reset"]) -> None:
        """End the connection both ways at a time."""
        for lane in (self._up, self._down):
            lane.end(at, how=how)
            lane.break_at(at)

    def _turn_around(self, *, is_reply: bool) -> None:
        """The other side begins to speak: with a request, or with its reply."""
        self._is_replying = is_reply
        if is_reply:
            self._network.on_reply(self)
            return
        self.request, aims = self._network.on_request(self)
        self._up.begin_message(aims["request"])
        self._down.begin_message(aims["reply"])

    def _strike(self, aim: Aim, lane: _Lane, data: bytes) -> bytes:
        """Let the fault happen to `data`; returns what is still to be sent of it."""
        match aim.fault:
            case Drop(size=size):
                # What is being lost already stays so.
                lane.to_drop = max(lane.to_drop, math.inf if size is None else size)
            case Delay(by_s=by_s):
                lane.hold_until(lane.arrival() + by_s)
            case Cut(how=how):
                self.cut(lane.arrival(), how=how)
                return b""
            case Corrupt(size=size):
                return _corrupted(data[:size], aim.rng) + data[size:]
            case Duplicate():
                position = lane.position
                lane.put(data)
                lane.position = position
            case Stall(for_s=for_s):
                for either in (self._up, self._down):
                    either.hold_until(trio.current_time() + for_s)
        return data


class _Network(Protocol):
    """What a connection needs of its network."""

    plan: FaultPlan

    def on_request(self, connection: WireConnection) -> tuple[int, dict[Direction, list[Aim]]]:
        """A request begins; its number and the faults that are aimed at it."""

    def on_reply(self, connection: WireConnection) -> None:
        """A reply begins."""


def _check_max_bytes(max_bytes: object) -> None:
    if max_bytes is not None and not isinstance(max_bytes, int):
        raise TypeError("max_bytes must be an int or None")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError("max_bytes must be at least 1")


def _offset(aim: Aim) -> int:
    return getattr(aim.fault, "after_bytes", 0)


def _name(is_reply: bool) -> Direction:
    return "reply" if is_reply else "request"


def _corrupted(data: bytes, rng: random.Random) -> bytes:
    return bytes(byte ^ rng.randint(1, 255) for byte in data)


@final
class WireStream(trio.abc.HalfCloseableStream):
    """One end of a connection. It behaves like a TCP stream; `close` closes without a checkpoint.

    A cancelled `send_all` may have sent a part of its data. A cancelled `receive_some` has taken nothing.
    """

    __slots__ = ("_closed", "_connection", "_ended", "_incoming", "_outgoing", "_receiving", "_sending")

    def __init__(self, connection: WireConnection, *, incoming: _Lane, outgoing: _Lane) -> None:
        self._connection = connection
        self._incoming = incoming
        self._outgoing = outgoing
        self._closed = False
        self._ended = False
        self._sending = False
        self._receiving = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "eof sent" if self._ended else "open"
        return f"<WireStream of connection {self._connection.number}, {state}>"

    @property
    def is_closed(self) -> bool:
        """Whether this end was closed."""
        return self._closed

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, not even the peer's end."""
        return not self._closed and self._incoming.next_change() > trio.current_time()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, waiting for the first byte; empty once the peer has ended.

        Raises `trio.BrokenResourceError` when the connection was reset, `trio.ClosedResourceError` when this end is
        closed, also while waiting, `trio.BusyResourceError` when another task is receiving.
        """
        _check_max_bytes(max_bytes)
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        try:
            await trio.lowlevel.checkpoint()
            if self._connection.fail_operation(self, "receive") and not self._closed:
                # Not what has arrived before: the operation is to fail, not the one after it.
                raise trio.BrokenResourceError("the connection was reset")
            return await self._receive(max_bytes or _RECEIVE_BYTES)
        finally:
            self._receiving = False

    async def _receive(self, max_bytes: int) -> bytes:
        lane = self._incoming
        while not self._closed:
            if (received := lane.take(max_bytes)) is not None:
                return received
            await _wait(lane.readable, lane.next_change())
        raise trio.ClosedResourceError("this stream was closed")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything, waiting while too much is on its way.

        Raises `trio.ClosedResourceError` when this end is closed or at its end of file, `trio.BrokenResourceError` once
        it is known here that the peer has gone, `trio.BusyResourceError` when another task is sending.
        """
        with self._alone_sending(), memoryview(data) as view:
            await trio.lowlevel.checkpoint()
            self._connection.fail_operation(self, "send")
            self._check_writable()
            sent = 0
            while sent < len(view):
                sent += await self._send_some(view[sent:])

    async def _send_some(self, rest: memoryview) -> int:
        await self._wait_for_room()
        with rest[: self._outgoing.room] as part:
            self._connection.send(self, bytes(part))
            return len(part)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room; raises like `send_all`."""
        with self._alone_sending():
            await trio.lowlevel.checkpoint()
            self._check_writable()
            await self._wait_for_room()

    async def send_eof(self) -> None:
        """Tell the peer that no more data comes; receiving goes on. Idempotent."""
        with self._alone_sending():
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            self._end()

    async def aclose(self) -> None:
        """`close`, and a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close this end: the peer reads what was sent and then the end, and its sends break once it could know."""
        if not self._closed:
            self._closed = True
            self._end()
            self._incoming.break_at(self._outgoing.ends_at)
            self._incoming.abandon()
            self._outgoing.writable.unpark_all()

    def _end(self) -> None:
        self._ended = True
        self._outgoing.end(self._outgoing.arrival())

    async def _wait_for_room(self) -> None:
        lane = self._outgoing
        while lane.room <= 0:
            await _wait(lane.writable, lane.broken_at)
            self._check_writable()

    def _check_writable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._ended:
            raise trio.ClosedResourceError("this stream sent its end of file")
        if self._outgoing.broken_at <= trio.current_time():
            raise trio.BrokenResourceError("the peer has gone")

    def _alone_sending(self) -> _Alone:
        return _Alone(self)


@final
class _Alone:
    """Refuses a second sender."""

    __slots__ = ("_stream",)

    def __init__(self, stream: WireStream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream._sending:  # noqa: SLF001 - the two are one class in two parts
            raise trio.BusyResourceError("another task is sending on this stream")
        self._stream._sending = True  # noqa: SLF001 - as above

    def __exit__(self, *_exc: object) -> None:
        self._stream._sending = False  # noqa: SLF001 - as above
