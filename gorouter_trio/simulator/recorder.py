"""Recordings made of what an API answers, while a program runs against it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Protocol, final

import msgspec
import trio

from ..errors import ConfigError
from . import _json

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator

    from ..transport.tapped import BaseTransport, TappedExchange

__all__ = ["Recorder", "open_recorder"]

# What a client of the API looks at; others say who was asked, when, and from where.
_KEPT: Final = frozenset({"content-type", "retry-after", "x-generation-id", "x-provider-name"})
_KEPT_PREFIX: Final = "x-ratelimit-"
_VERSION: Final = "/v1"


class _File(Protocol):
    async def write(self, data: bytes, /) -> int: ...

    async def flush(self) -> None: ...


@asynccontextmanager
async def open_recorder(
    path: str | os.PathLike[str], *, transport: BaseTransport | None = None
) -> AsyncIterator[Recorder]:
    """Record what is sent through `Recorder.transport` in a file that `load_recordings` reads.

        async with open_recorder("recorded.jsonl") as recorder:
            async with gr.open_client(transport=recorder.transport) as client:
                await client.chat("What is a tide?")

    `transport` is how the API is reached, the built-in transport unless given; the recorder closes it. Exchanges are
    written when the reply was read to its end, one a line, in that order. A stream that is left early, and a reply that
    breaks off, are not written, nor is what was answered to a request that is no JSON: no other could be told from it.
    Keys are not written: nothing of the headers of a request is, and of a reply's only those that clients look at. What
    was asked and answered is, as it was.

    Raises `ConfigError` when there is such a file already, and `OSError` where it cannot be made or, from the call that
    was recorded, written.
    """
    # Loads httpx, which nothing else of the simulator needs.
    from ..transport.httpx_transport import HttpTransport

    try:
        file = await trio.open_file(path, "xb")
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; remove it, or record into another file") from None
    recorder = Recorder(file, transport or HttpTransport())
    try:
        yield recorder
    finally:
        with trio.CancelScope(shield=True):
            await recorder.transport.aclose()
            await file.aclose()


@final
class Recorder:
    """Made by `open_recorder`."""

    def __init__(self, file: _File, transport: BaseTransport) -> None:
        from ..transport.tapped import TappedTransport

        self._file = file
        self._lock = trio.Lock()
        self.written = 0
        """How many exchanges are in the file."""
        self.skipped = 0
        """How many are not, because their request is no JSON."""
        self.transport: BaseTransport = TappedTransport(transport, self._write)
        """What goes into `open_client(transport=...)`, or `httpx.AsyncClient(transport=...)` on trio."""

    def __repr__(self) -> str:
        return f"<Recorder, {self.written} exchanges>"

    async def _write(self, exchange: TappedExchange) -> None:
        try:
            line = _json.encode(_entry(exchange)) + b"\n"
        except ValueError:
            self.skipped += 1
            return
        async with self._lock:
            # A line that was begun is written to its end: half of one would spoil the file.
            with trio.CancelScope(shield=True):
                await self._file.write(line)
                await self._file.flush()
            self.written += 1


def _entry(exchange: TappedExchange) -> dict[str, object]:
    entry: dict[str, object] = {"request": msgspec.Raw(_on_one_line(exchange.request_body or b"null"))}
    method, path = exchange.method, _path_of(exchange.target)
    if (method, path) != ("POST", "/chat/completions"):
        entry |= {"method": method, "path": path}
    headers = [[name, value] for name, value in exchange.headers if _is_kept(name.lower())]
    return entry | {
        "status": exchange.status,
        "headers": headers,
        "body": exchange.body.decode("utf-8", errors="replace"),
    }


def _on_one_line(body: bytes) -> bytes:
    """The JSON in a body as it can stand in a line of the file; raises `ValueError` for what is none."""
    body.decode("utf-8")
    return msgspec.json.format(body, indent=-1)


def _path_of(target: str) -> str:
    """Without what stands in front of the API's own paths."""
    _, version, path = target.partition(_VERSION)
    return path if version else target


def _is_kept(name: str) -> bool:
    return name in _KEPT or name.startswith(_KEPT_PREFIX)
