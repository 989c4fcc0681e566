"""Answers that are there already: equal requests of a batch asked once, and a file of answers for later batches.

A request is known by all that is sent: the whole body and the headers of its own. Whoever asks for what another task is
asking for waits for that one's answer, and asks itself where it failed. An answer from here costs nothing, has no
attempts, and is otherwise the one that was given.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from decimal import Decimal
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

import msgspec
import trio

from ..errors import StoreError
from ..wire.codec import decode_completion, to_message
from ..wire.result import CallRecord, ChatResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..transport.sqlite import Connection, SchemaStep, SqliteFile
    from ..wire.mail import HttpCall

__all__ = ["AnswerCache", "AnswerStore", "FileAnswers", "MemoryAnswers", "answers_file"]

_Answer: TypeAlias = "tuple[ChatResult, bytes]"

_APPLICATION_ID: Final = 0x67726163
_SCHEMA: tuple[SchemaStep, ...] = (("CREATE TABLE answers (name BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",),)


class AnswerStore(Protocol):
    """Where answers are kept, by the digests of their requests."""

    async def get(self, name: bytes) -> bytes | None:
        """The JSON of an answer."""

    async def put(self, name: bytes, body: bytes) -> None:
        """Keep an answer; durable on return, where that is what the store is for."""


class MemoryAnswers:
    """The last answers, in memory."""

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._answers: OrderedDict[bytes, bytes] = OrderedDict()

    async def get(self, name: bytes) -> bytes | None:
        """See `AnswerStore`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        return self._answers.get(name)

    async def put(self, name: bytes, body: bytes) -> None:
        """See `AnswerStore`."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._answers[name] = body
        if len(self._answers) > self._most:
            self._answers.popitem(last=False)


class FileAnswers:
    """Answers in a SQLite file, which whoever made it closes. Raises `StoreError`."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    async def get(self, name: bytes) -> bytes | None:
        """See `AnswerStore`."""

        def read(connection: Connection) -> bytes | None:
            row = connection.execute("SELECT body FROM answers WHERE name = ?", (name,)).fetchone()
            return None if row is None else bytes(row[0])

        return await self._file.read(read, subject=name.hex())

    async def put(self, name: bytes, body: bytes) -> None:
        """See `AnswerStore`."""

        def write(connection: Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO answers (name, body) VALUES (?, ?)", (name, body))

        await self._file.write(write, subject=name.hex())


class AnswerCache:
    """In front of what sends requests."""

    def __init__(self, store: AnswerStore) -> None:
        self._store = store
        self._asked: dict[bytes, trio.Event] = {}

    def __repr__(self) -> str:
        return f"<AnswerCache, {len(self._asked)} asked>"

    async def ask(self, call: HttpCall, send: Callable[[HttpCall], Awaitable[_Answer]]) -> _Answer:
        """The answer to `call`, from the store or by `send`; raises what these raise.

        An answer that cannot be kept is given all the same.
        """
        name = _name_of(call)
        while True:
            known = await self._store.get(name)
            if known is not None:
                return _from_store(known), known
            if name not in self._asked:
                break
            await self._asked[name].wait()
        asked = self._asked[name] = trio.Event()
        try:
            result, body = await send(call)
            # It is paid for: a full disk costs the next one who asks, and not this one.
            with suppress(StoreError):
                await self._store.put(name, body)
        finally:
            del self._asked[name]
            asked.set()
        return result, body


def answers_file(path: str) -> SqliteFile:
    """The file of answers at `path`, made when it is not there; whoever opens it closes it."""
    from ..transport.sqlite import SqliteFile

    return SqliteFile(path, _SCHEMA, application_id=_APPLICATION_ID)


def _name_of(call: HttpCall) -> bytes:
    digest = blake2b(call.path.encode(), digest_size=24)
    for header in call.settings.headers:
        digest.update(b"\n%b:%b" % (header[0].lower().encode(), header[1].encode()))
    digest.update(b"\n\n")
    digest.update(call.body)
    return digest.digest()


def _from_store(body: bytes) -> ChatResult:
    reply = decode_completion(body)
    choice = reply.choices[0]  # type: ignore[index]  # decode_completion has seen it
    usage = None if reply.usage is None else msgspec.structs.replace(reply.usage, cost=Decimal(0))
    call = CallRecord(
        generation_id=reply.id,
        model=reply.model,
        provider=reply.provider,
        finish_reason=choice.finish_reason,
        native_finish_reason=choice.native_finish_reason,
        usage=usage,
        attempts=0,
    )
    return ChatResult(message=to_message(choice.message), call=call)  # type: ignore[arg-type]  # as above
