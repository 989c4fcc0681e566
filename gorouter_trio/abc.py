"""Interfaces: what may be put in place of a part, and what every front of the runtime offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

__all__ = [
    "HistoryStore",
    "ImmediateStore",
    "LeaseOffer",
    "LeasingStore",
    "SessionLease",
    "StoredHistory",
    "StoredSession",
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

    A version counts the changes of a session, from 0 for one that was never written. Whoever
    writes names the version that it has seen, so that two writers cannot interleave.

    A write that raises or is cancelled may have happened or not, but not in part: whoever asked for it
    loads again before the next one. A store may raise whatever it likes; an answer that it refuses
    reaches its asker in a `HistoryNotSaved`. A key that is empty or no valid Unicode is a `ConfigError`. Every method
    is a checkpoint.
    """

    @property
    def durability(self) -> str:
        """What a write that has returned survives."""

    async def load(self, key: str) -> StoredHistory:
        """The whole session; one that was never written has version 0 and no entries."""

    async def version(self, key: str) -> int:
        """The version of the session, 0 for one that was never written; cheap."""

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Add entries and return the new version; durable on return.

        Raises `SessionConflictError`, having written nothing, when the version is another one.
        """

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """Replace all entries and return the new version; as `append` otherwise."""

    async def delete(self, key: str) -> bool:
        """Remove the session with its version; False when there was none."""

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
