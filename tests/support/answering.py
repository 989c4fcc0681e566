"""Sessions over a pipeline that answers at once: what they cost themselves, without pool, sockets and server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any, cast

import trio

from gorouter_trio._turns.gate import Gate
from gorouter_trio._turns.request import TurnEncoder
from gorouter_trio.abc import HistoryStore, StoredHistory
from gorouter_trio.config import Seams, SessionConfig
from gorouter_trio.session.actor import SessionOptions
from gorouter_trio.session.directory import SessionDirectory, SessionRef
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.mail import HttpCall
from gorouter_trio.wire.messages import AssistantMessage
from gorouter_trio.wire.responses import Usage
from gorouter_trio.wire.result import CallRecord, ChatResult

OPTIONS = SessionOptions(b"", b'{"model":"test/model"}')


class Answering:
    """A pipeline whose answers have `size` characters; it counts the bytes that it is given to send."""

    is_noting = False

    def __init__(self, size: int = 200) -> None:
        self.text = "a" * size
        self.sent_bytes = 0

    def loop(self, _extras: object) -> None:
        """One request is all there is to a turn."""

    async def send(self, call: HttpCall, **_: Any) -> ChatResult:
        self.sent_bytes += len(call.body)
        usage = Usage(len(call.body) // 4, 50, len(call.body) // 4 + 50, Decimal("0.001"))
        return ChatResult(message=AssistantMessage(self.text), call=CallRecord(model="test/model", usage=usage))


class Forgetful:
    """A store that keeps nothing, so that what is left in memory is not the histories."""

    async def load(self, _key: str) -> StoredHistory:
        await trio.lowlevel.checkpoint()
        return StoredHistory(0, ())

    async def append(self, _key: str, _entries: Sequence[bytes], *, expected_version: int) -> int:
        await trio.lowlevel.checkpoint()
        return expected_version + 1


class Place:
    """A directory of sessions and the pipeline beneath it."""

    def __init__(self, directory: SessionDirectory, pipeline: Answering) -> None:
        self.directory = directory
        self.pipeline = pipeline

    def session(self, key: str) -> SessionRef:
        return self.directory.ref(key, OPTIONS)


@asynccontextmanager
async def open_sessions(
    store: object | None = None, *, config: SessionConfig | None = None, size: int = 200
) -> AsyncIterator[Place]:
    """A directory that runs until the block is left."""
    pipeline = Answering(size)
    async with trio.open_nursery() as nursery:
        directory = SessionDirectory(
            nursery,
            pipeline=cast("Any", pipeline),
            encoder=TurnEncoder(),
            gate=Gate(None, wall=Seams().wall),
            store=cast("HistoryStore", store if store is not None else MemoryStore()),
            config=config or SessionConfig(),
            seams=Seams(),
            routing_key=b"k",
        )
        nursery.start_soon(directory.run)
        yield Place(directory, pipeline)
        directory.close()
        nursery.cancel_scope.cancel()
