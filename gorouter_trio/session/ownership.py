"""Whose a session is, where several processes share a store.

Theory of operation. While a session acts on what changes it, its process has a lease of it, renewed in the background.
Another process waits for the lease, in line, and so takes the next turn; it learns with it at which version the session
is, and loads what was written meanwhile. The lease of a process that has died ends after its time, and whoever takes
the session then finds its turn in the log, without an end: in doubt.

Time alone proves nothing: a process may be stopped for longer than its lease, and wake up to write. So each lease has a
token, and the store checks it in the same step in which it writes.
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

import trio
from msgspec import Struct

from .._contain import contain
from ..abc import SessionLease
from ..errors import SessionConflictError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ..abc import HistoryStore, LeasingStore, StoredHistory
    from ..config import Seams, SessionConfig

__all__ = ["Owners", "OwnershipStatistics", "SessionLog", "SessionOwnership", "open_owners", "open_ownership"]

_LOG = logging.getLogger("gorouter_trio.sessions")
_RENEWALS = 3
_FIRST_POLL_S = 0.01
_MOST_POLL_S = 0.1
# Redis ends leases by the millisecond.
_TICK_S = 0.002
# A lease of the store is shorter than `lease_s`, so that whoever takes over has answered by then.
_TERM = 0.9
_POLL_GROWTH = 1.5
_CLOSE_S = 2.0
_MARGIN_S = 1.0
_ANY_TOKEN = 0


class SessionLog(Protocol):
    """The part of a store that one session needs."""

    async def load(self, key: str) -> StoredHistory:
        """As `HistoryStore.load`."""

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.append`."""

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        """As `HistoryStore.rewrite`."""


class OwnershipStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot: sessions held now, leases taken so far, those that somebody else took over, and the last failure."""

    held: int
    taken: int
    lost: int
    failure: str


class _OwnedLog:
    """The store for the one who has a session: what it writes there goes with its lease."""

    def __init__(self, store: HistoryStore, lease: SessionLease, *, lease_s: float) -> None:
        self._store = store
        self._leasing = cast("LeasingStore", store)
        self._lease = lease
        self._lease_s = lease_s

    async def load(self, key: str) -> StoredHistory:
        return await self._store.load(key)

    async def append(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        if key != self._lease.key:
            return await self._store.append(key, entries, expected_version=expected_version)
        return await self._leasing.append_leased(
            key, entries, expected_version=expected_version, lease=self._lease, lease_s=self._lease_s
        )

    async def rewrite(self, key: str, entries: Sequence[bytes], *, expected_version: int) -> int:
        if key != self._lease.key:
            return await self._store.rewrite(key, entries, expected_version=expected_version)
        return await self._leasing.rewrite_leased(
            key, entries, expected_version=expected_version, lease=self._lease, lease_s=self._lease_s
        )


class SessionOwnership:
    """The leases of one client; made by `open_ownership`, whose tasks renew them and give them back."""

    def __init__(self, store: HistoryStore, *, seams: Seams, lease_s: float) -> None:
        self.owner = seams.new_id()
        self.lease_s = lease_s
        self._term_s = _TERM * lease_s
        self._store = store
        self._leasing = cast("LeasingStore", store)
        self._rng = seams.random
        self._held: dict[str, SessionLease] = {}
        self._returned: dict[str, SessionLease] = {}
        self._has_returned = trio.Event()
        self._taken = self._lost = 0
        self._failure = ""
        self._is_down = False

    def __repr__(self) -> str:
        return f"<SessionOwnership of {self.owner}: {len(self._held)} sessions held>"

    def statistics(self) -> OwnershipStatistics:
        """A snapshot; cheap."""
        return OwnershipStatistics(held=len(self._held), taken=self._taken, lost=self._lost, failure=self._failure)

    async def take(self, key: str) -> tuple[SessionLog, int]:
        """Have the session: what to write to it with, until `release`, and the version that it is at.

        Waits while another process has it, for as long as a lease lasts: by then one that has died has it no more.
        Raises `SessionConflictError` when it still has it then, and what the store raises.
        """
        poll_s = _FIRST_POLL_S
        until = trio.current_time() + self.lease_s + _MARGIN_S
        while True:
            # Asked for and not answered, it may be ours all the same: then it goes back like any other.
            self._held[key] = SessionLease(key, self.owner, _ANY_TOKEN)
            try:
                if key in self._returned:
                    # Given back first, or who waits for it would never have it from one who always asks again.
                    await self.give_back()
                offer = await self._leasing.acquire_lease(key, owner=self.owner, lease_s=self._term_s)
            except BaseException:
                self.release(key)
                raise
            if offer.lease is not None:
                self._held[key] = offer.lease
                self._taken += 1
                return _OwnedLog(self._store, offer.lease, lease_s=self._term_s), offer.version
            del self._held[key]
            left_s = until - trio.current_time()
            if left_s <= 0:
                raise SessionConflictError(f"session {key!r} is being used by another process")
            pause_s = min(poll_s * self._rng.uniform(0.5, 1.0), left_s)
            if 0 < offer.held_s < pause_s:
                pause_s = offer.held_s + _TICK_S
            await trio.sleep(pause_s)
            poll_s = min(poll_s * _POLL_GROWTH, _MOST_POLL_S)

    def release(self, key: str) -> None:
        """Give the session back; never waits."""
        lease = self._held.pop(key, None)
        if lease is not None:
            self._returned[key] = lease
            self._has_returned.set()

    async def run_renewal(self) -> None:
        """Renew what is held, until cancelled."""
        while True:
            await trio.sleep(self._term_s / _RENEWALS)
            await contain(self._renew, report=self._note)

    async def run_returns(self) -> None:
        """Give back what was released, until cancelled."""
        while True:
            await self._has_returned.wait()
            await contain(self.give_back, report=self._note)

    async def give_back(self) -> None:
        """Give back what was released, now."""
        self._has_returned = trio.Event()
        returned, self._returned = self._returned, {}
        if returned:
            await self._leasing.release_leases(list(returned.values()))

    async def _renew(self) -> None:
        # Those without a token yet are being asked for.
        held = [lease for lease in self._held.values() if lease.token != _ANY_TOKEN]
        if not held:
            return
        try:
            lost = await self._leasing.renew_leases(held, lease_s=self._term_s)
        finally:
            self._return_again(held)
        self._is_down = False
        for lease in lost:
            if self._held.get(lease.key) is lease:
                self._lost += 1
                _LOG.warning("session %r was taken over by another process while a turn of it ran", lease.key)

    def _return_again(self, renewed: Sequence[SessionLease]) -> None:
        """What was released meanwhile: renewing many takes a while, and a lease that has gone is made anew by it."""
        for lease in renewed:
            if lease.key not in self._held:
                self._returned.setdefault(lease.key, lease)
                self._has_returned.set()

    def _note(self, error: Exception) -> None:
        """Leases that could not be renewed or returned end by themselves."""
        self._failure = str(error)
        if self._is_down:
            return
        self._is_down = True
        _LOG.warning("leases of sessions could not be renewed or returned: %s", error)


@asynccontextmanager
async def open_ownership(
    store: HistoryStore, config: SessionConfig, *, seams: Seams
) -> AsyncIterator[SessionOwnership | None]:
    """The ownership of a client's sessions; None where the store has no leases, or the settings want none.

    To be left when no session runs any more: what is still to be given back is, within 2 s.
    """
    if config.lease_s is None or not hasattr(store, "acquire_lease"):
        yield None
        return
    ownership = SessionOwnership(store, seams=seams, lease_s=config.lease_s)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ownership.run_renewal)
        nursery.start_soon(ownership.run_returns)
        try:
            yield ownership
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                await contain(ownership.give_back, report=ownership._note)  # noqa: SLF001 - of the same module


class Owners:
    """The ownerships of a client whose store may be exchanged: one for each store that it has had."""

    def __init__(self, nursery: trio.Nursery, config: SessionConfig, *, seams: Seams) -> None:
        self._nursery = nursery
        self._config = config
        self._seams = seams
        self._made: list[tuple[HistoryStore, SessionOwnership]] = []

    def of(self, store: HistoryStore) -> SessionOwnership | None:
        """That of `store`, made when it is first asked for; None where it has no leases, or the settings want none."""
        for known, ownership in self._made:
            if known is store:
                return ownership
        if self._config.lease_s is None or not hasattr(store, "acquire_lease"):
            return None
        made = SessionOwnership(store, seams=self._seams, lease_s=self._config.lease_s)
        self._made.append((store, made))
        self._nursery.start_soon(made.run_renewal)
        self._nursery.start_soon(made.run_returns)
        return made

    async def give_back(self) -> None:
        """Give back everything that was released."""
        for _store, ownership in self._made:
            await contain(ownership.give_back, report=ownership._note)  # noqa: SLF001 - of the same module


@asynccontextmanager
async def open_owners(config: SessionConfig, *, seams: Seams) -> AsyncIterator[Owners]:
    """As `open_ownership`, for stores that come one after the other."""
    async with trio.open_nursery() as nursery:
        owners = Owners(nursery, config, seams=seams)
        try:
            yield owners
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_S):
                await owners.give_back()
