"""Interfaces: what may be put in place of a part, and what every front of the runtime offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from msgspec import Struct

from .wire.requests import AskKeywords, ChatKeywords, JsonObject

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from typing import Self, Unpack

    from .events import StreamEvent
    from .wire.codec import Prompt
    from .wire.result import ChatResult, HistoryEntry

__all__ = [
    "ClientProtocol",
    "HistoryStore",
    "ImmediateStore",
    "LeaseOffer",
    "LeasingStore",
    "SessionLease",
    "SessionProtocol",
    "SessionView",
    "StoredHistory",
    "StoredSession",
    "StreamProtocol",
    "TextProtocol",
    "TurnOptions",
]


class StoredHistory(Struct, frozen=True):
    """A session as a store has it: encoded entries in order, and the version that they make."""

    version: int
    entries: Sequence[bytes]


class StoredSession(Struct, frozen=True):
    """What a store tells of a session without its entries: how many there are, of how many bytes together.

    `updated_at_s` is the time of the last change, in wall-clock seconds since the epoch; None where it was not noted.
    """

    key: str
    version: int
    entries: int
    bytes: int
    updated_at_s: float | None = None


class SessionLease(Struct, frozen=True):
    """The right to write to a session for a time. Each has a `token` that is higher than those given before it."""

    key: str
    owner: str
    token: int


class LeaseOffer(Struct, frozen=True):
    """What came of asking for a session: the lease and the version of the session; or, where somebody else has it, no
    lease, and for how long that is so unless they renew it.
    """

    lease: SessionLease | None
    version: int = 0
    held_s: float = 0.0


class LeasingStore(Protocol):
    """What a store may offer besides, where several processes share it: to own a session while it is worked on.

    A write with a lease is refused with `SessionConflictError`, like one with an old version, once somebody else has
    taken the session over; so is one without a lease as long as somebody has one. A lease ends by itself after its
    time; until somebody else has taken it, its owner may go on.
    """

    async def acquire_lease(self, key: str, *, owner: str, lease_s: float) -> LeaseOffer:
        """Take the session for `lease_s` seconds, unless somebody else has it."""

    async def renew_leases(self, leases: Sequence[SessionLease], *, lease_s: float) -> Sequence[SessionLease]:
        """Hold them for `lease_s` from now on; returns those that somebody else has taken over."""

    async def release_leases(self, leases: Sequence[SessionLease]) -> None:
        """Give them up; those that somebody else has taken over are theirs."""

    async def append_leased(
        self, key: str, entries: Sequence[bytes], *, expected_version: int, lease: SessionLease, lease_s: float
    ) -> int:
        """As `HistoryStore.append`."""

    async def rewrite_leased(
        self, key: str, entries: Sequence[bytes], *, expected_version: int, lease: SessionLease, lease_s: float
    ) -> int:
        """As `HistoryStore.rewrite`."""


class ImmediateStore(Protocol):
    """What a store may offer besides, where it has its data at hand: the same as `load` and `append`, without waiting.

    Sessions use it where it is there: a turn then costs two trips through the scheduler less.
    """

    def load_nowait(self, key: str) -> StoredHistory:
        """As `HistoryStore.load`."""

    def append_nowait(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.append`; what it raises has not happened."""


class HistoryStore(Protocol):
    """Where sessions are kept. Keys are any non-empty text; entries are opaque bytes.

    Keys have parts, which `stores.SessionKey` makes and reads; a store may keep the text alone. `durability` says what
    a write that has returned survives: "process" nothing beyond the process, "disk" a kill and a loss of power; a store
    of another kind names what it has.

    A version counts the changes of a session, from 0 for one that is not there. Whoever writes names the version that
    it has seen, so that two writers cannot interleave. No version comes again, not even after the session was deleted:
    the first one of a new session, 1 in a new store, is above those of the sessions that have gone. Where it is not,
    whoever has seen the old session takes the new one for it.

    A write that raises or is cancelled may have happened or not, but not in part: whoever asked for it
    loads again before the next one. A store may raise whatever it likes; an answer that it refuses
    reaches its asker in a `HistoryNotSaved`. A key that is empty or no valid Unicode is a `ConfigError`. Every method
    is a checkpoint.
    """

    @property
    def durability(self) -> str:
        """What a write that has returned survives."""

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that is not there has version 0 and no entries."""

    async def version(self, key: str) -> int:
        """The version of the session, 0 for one that is not there; cheap."""

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries and return the new version; durable on return.

        Raises `SessionConflictError`, having written nothing, when the version is another one.
        """

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries and return the new version; as `append` otherwise."""

    async def delete(self, key: str) -> bool:
        """Remove the session, whose version never comes again; False when there was none."""

    async def erase(self, key: str) -> bool:
        """Remove the session and every trace that the store can reach, also of what was deleted before.

        False when there was no such session. It may take long.
        """

    async def list_keys(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[str]:
        """Keys with the prefix, in code-point order, at most `limit`, those above `after` only."""

    async def list_sessions(self, prefix: str = "", *, after: str = "", limit: int = 1000) -> Sequence[StoredSession]:
        """What is known of the sessions that `list_keys` names, in the same order."""

    async def aclose(self) -> None:
        """Release what the store holds; whoever made the store closes it."""


class TurnOptions(ChatKeywords, total=False):
    """The options of a turn that every front takes: those of a request, a schema for the answer, and other models."""

    response_schema: JsonObject
    fallbacks: Sequence[str]


class TextProtocol(Protocol):
    """The text of a stream, piece by piece."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> str:
        """The next piece."""


class StreamProtocol(Protocol):
    """A streamed answer: iterate it for events, or its `text`, or await `collect()`."""

    @property
    def text(self) -> TextProtocol:
        """The text alone."""

    @property
    def result(self) -> ChatResult[object]:
        """The whole answer; raises `StreamNotFinishedError` before the end."""

    async def collect(self) -> ChatResult[object]:
        """Read to the end, and return the whole answer."""

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> StreamEvent:
        """The next event."""


class SessionView(Protocol):
    """What every front tells of a session: a snapshot."""

    @property
    def state(self) -> str:
        """What it does."""

    @property
    def queued(self) -> int:
        """Mail that waits."""

    @property
    def turns(self) -> int:
        """Turns that have ended."""

    @property
    def length(self) -> int:
        """Turns in the history."""

    @property
    def version(self) -> int:
        """Changes in the store."""

    @property
    def question_id(self) -> str | None:
        """The question that waits for a reply."""


class SessionProtocol(Protocol):
    """A session, here or behind a gateway: the same methods, the same errors, the same promises.

    What each does is said where the session of this process has it: `SessionRef`.
    """

    key: str

    async def ask(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> ChatResult[object]:
        """Take one turn; stored on return."""

    async def retry(self, *, turn_id: str | None = None, **options: Unpack[TurnOptions]) -> ChatResult[object]:
        """Take the last turn again."""

    async def edit(
        self, edited: str, prompt: Prompt, *, turn_id: str | None = None, **options: Unpack[TurnOptions]
    ) -> ChatResult[object]:
        """Ask something else in place of a past turn."""

    def stream(
        self,
        prompt: Prompt,
        *,
        turn_id: str | None = None,
        resume: Literal["resend"] | None = None,
        **options: Unpack[TurnOptions],
    ) -> AbstractAsyncContextManager[StreamProtocol]:
        """Take one turn with the answer streamed; stored when the block is left."""

    async def undo(self, turn_id: str | None = None) -> bool:
        """Leave the last turn, or this one with all after it, out of the history."""

    async def answer(self, question_id: str, answer: object) -> bool:
        """Reply to a question that a turn waits for."""

    async def interrupt(self) -> bool:
        """Stop the running turn."""

    async def history(self) -> list[HistoryEntry]:
        """The messages of the answered turns."""

    async def clear(self) -> None:
        """Empty the history."""

    async def compact(self) -> None:
        """Write the log anew."""

    async def fork(self, key: str) -> SessionProtocol:
        """A new session with a copy of the history."""

    async def statistics(self) -> SessionView:
        """A snapshot."""

    async def aclose(self) -> None:
        """End the session's actor; the history stays."""


class ClientProtocol(Protocol):
    """What every front of the runtime offers; see `Client`."""

    async def chat(
        self, prompt: Prompt, *, system: str | None = None, session: str | None = None, **options: Unpack[TurnOptions]
    ) -> ChatResult[object]:
        """Ask once."""

    async def ask(
        self,
        prompt: Prompt,
        *,
        user: str | None = None,
        group: str | None = None,
        system: str | None = None,
        turn_id: str | None = None,
        **options: Unpack[AskKeywords],
    ) -> ChatResult[object]:
        """Ask for a user: a turn of the session that belongs to them."""

    def stream(
        self, prompt: Prompt, *, system: str | None = None, session: str | None = None, **options: Unpack[TurnOptions]
    ) -> AbstractAsyncContextManager[StreamProtocol]:
        """Ask once with the answer streamed."""

    def session(self, key: str, *, system: str | None = None) -> SessionProtocol:
        """The session with this key; no I/O."""
