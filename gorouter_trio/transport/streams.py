"""Byte streams: sockets, others' streams, TLS above them, and how they are dropped at once.

A connection has to be closed by whoever cancels it, in a step that does not wait. So every stream in use here has a
`close` beside `aclose`: `closable` gives one to those that have none, and `bottom` finds the stream under the TLS,
whose goodbye nobody waits for.
"""

from __future__ import annotations

import os
import select
import socket as stdlib_socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = [
    "Closable",
    "SocketNetwork",
    "SocketStream",
    "UnixNetwork",
    "bottom",
    "closable",
    "drop",
    "quiet_check",
    "reason_of",
]

_READ_BYTES = 64 * 1024
_CLEANUP_S = 2.0


class SocketStream(trio.abc.Stream):
    """A TCP socket as a trio stream, with one system call a send.

    `send_all` is a checkpoint only when the kernel does not take everything at once: the read that
    follows every request is one always, and a second task switch a request is what it would cost.
    """

    __slots__ = ("_arrivals", "_fd", "_socket")

    def __init__(self, socket: stdlib_socket.socket) -> None:
        socket.setblocking(False)
        self._socket = socket
        # A number, which trio takes without asking the socket for it.
        self._fd = socket.fileno()
        # Peeking at the socket costs an exception when nothing is there, which is the usual case.
        self._arrivals = select.poll()
        self._arrivals.register(socket, select.POLLIN)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Cancelling leaves an unknown part sent."""
        with memoryview(data) as view:
            sent = self._send(view)
            while sent < len(view):
                await trio.lowlevel.wait_writable(self._socket)
                with view[sent:] as rest:
                    sent += self._send(rest)

    def send_nowait(self, data: bytes) -> int:
        """Send what the kernel takes at once; returns how many bytes that were."""
        with memoryview(data) as view:
            return self._send(view)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the kernel has room."""
        await trio.lowlevel.wait_writable(self._socket)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, waiting for the first byte; empty once the peer has ended."""
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the socket is closed")
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(max_bytes or _READ_BYTES)
            except BlockingIOError:
                continue
            except OSError as exc:
                raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    def wait_arrival(self) -> Awaitable[None]:
        """What to await until something can be received: trio's own awaitable, with no coroutine of ours around it."""
        return trio.lowlevel.wait_readable(self._fd)  # noqa: ASYNC105 - the caller awaits it

    def receive_nowait(self) -> bytes | None:
        """What has arrived; None when nothing has, empty once the peer has ended. Never waits."""
        try:
            return self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as exc:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the socket is closed") from exc
            raise trio.BrokenResourceError(f"receiving failed: {exc}") from exc

    def is_quiet(self) -> bool:
        """Whether nothing has arrived, not even the peer's end: an idle connection that is still good."""
        return self._socket.fileno() >= 0 and not self._arrivals.poll(0)

    def close(self) -> None:
        """Close at once, waking whoever waits with `ClosedResourceError`."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._fd = -1

    async def aclose(self) -> None:
        """Close at once."""
        self.close()
        await trio.lowlevel.checkpoint()

    def _send(self, data: memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError("the socket is closed") from exc
            raise trio.BrokenResourceError(f"sending failed: {exc}") from exc


class SocketNetwork:
    """TCP with happy eyeballs (RFC 8305)."""

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A connected TCP stream; raises `OSError`."""
        return await trio.open_tcp_stream(host, port)


class UnixNetwork:
    """One Unix domain socket in the place of every host and port."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def connect(self, _host: str, _port: int) -> trio.abc.Stream:
        """A stream connected to the socket; raises `OSError`."""
        return await trio.open_unix_socket(self._path)


class _InterruptibleStream(trio.abc.Stream):
    """Somebody's stream, with a `close` that does not wait.

    `close` wakes whoever waits on it; the stream itself is closed by `aclose`, which has to follow.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._scopes: set[trio.CancelScope] = set()
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._open():
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        with self._open():
            await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        with self._open():
            return await self._stream.receive_some(max_bytes)
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._closed = True
        for scope in self._scopes:
            scope.cancel()

    async def aclose(self) -> None:
        self.close()
        await trio.aclose_forcefully(self._stream)

    @contextmanager
    def _open(self) -> Iterator[None]:
        if self._closed:
            raise trio.ClosedResourceError("the stream is closed")
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught:
            raise trio.ClosedResourceError("the stream was closed")


def closable(stream: trio.abc.Stream) -> trio.abc.Stream:
    """The stream, or one in its place, with a `close` that does not wait."""
    if isinstance(stream, trio.SocketStream):
        return SocketStream(stdlib_socket.socket(fileno=stream.socket.detach()))
    return stream if callable(getattr(stream, "close", None)) else _InterruptibleStream(stream)


class Closable(Protocol):
    def close(self) -> None: ...

    async def aclose(self) -> None: ...


def bottom(stream: trio.abc.Stream) -> Closable:
    """The stream under the TLS, which closes without waiting."""
    while isinstance(stream, trio.SSLStream):
        stream = stream.transport_stream
    return cast("Closable", stream)


def quiet_check(stream: trio.abc.Stream) -> Callable[[], bool] | None:
    """What tells whether an idle connection is still as the last reply left it, as far as its stream can say."""
    is_quiet: Callable[[], bool] | None = getattr(bottom(stream), "is_quiet", None)
    if not isinstance(stream, trio.SSLStream) or is_quiet is None:
        return is_quiet
    layers = list(_tls_layers(stream))

    def is_quiet_below_tls() -> bool:
        return is_quiet() and not any(map(_holds_something, layers))

    return is_quiet_below_tls


def _tls_layers(stream: trio.abc.Stream) -> Iterator[trio.SSLStream[trio.abc.Stream]]:
    while isinstance(stream, trio.SSLStream):
        yield stream
        stream = stream.transport_stream


def _holds_something(layer: trio.SSLStream[trio.abc.Stream]) -> bool:
    """A record that came together with the end of a reply waits in here, where the socket does not show it."""
    undecrypted = getattr(layer, "_incoming", None)
    return bool(undecrypted is not None and undecrypted.pending) or layer.pending() > 0


async def drop(closable: Closable) -> None:
    """Close, and wait a little for what has to be waited for, whatever happens around it."""
    closable.close()
    with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEANUP_S):
        await closable.aclose()


def reason_of(exc: BaseException) -> str:
    """What went wrong, in the words of the system where it has some."""
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ else exc
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate does not verify: {cause.verify_message}"
    if isinstance(cause, ssl.SSLError) and cause.reason:
        # What a TLS error has for an errno is none of the system's.
        return cause.reason.replace("_", " ").lower()
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, stdlib_socket.gaierror):
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause)
    inner = cause.__cause__
    if isinstance(inner, BaseExceptionGroup) and isinstance(inner.exceptions[0], OSError):
        return reason_of(inner.exceptions[0])
    return str(inner) if isinstance(inner, OSError) else str(cause)
