"""Leases of sessions in a store that several processes share; with a real one: `tests/stores/test_redis.py`."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from gorouter_trio.abc import LeaseOffer, SessionLease
from gorouter_trio.config import Seams
from gorouter_trio.session.ownership import SessionOwnership
from gorouter_trio.stores import MemoryStore


class Leases(MemoryStore):
    """A store with leases that renews one at a time, in `each_s` seconds; one that has gone is made anew."""

    def __init__(self, *, each_s: float) -> None:
        super().__init__()
        self._each_s = each_s
        self.leased: dict[str, SessionLease] = {}

    async def acquire_lease(self, key: str, *, owner: str, lease_s: float) -> LeaseOffer:
        await trio.lowlevel.checkpoint()
        lease = self.leased[key] = SessionLease(key, owner, len(self.leased) + 1)
        return LeaseOffer(lease, 0)

    async def renew_leases(self, leases: Sequence[SessionLease], *, lease_s: float) -> Sequence[SessionLease]:
        for lease in leases:
            await trio.sleep(self._each_s)
            self.leased.setdefault(lease.key, lease)
        return []

    async def release_leases(self, leases: Sequence[SessionLease]) -> None:
        await trio.lowlevel.checkpoint()
        for lease in leases:
            if self.leased.get(lease.key) == lease:
                del self.leased[lease.key]


async def test_what_is_released_while_leases_are_renewed(autojump_clock):
    """It is given back: nobody has to wait until a lease has ended that nobody has."""
    store = Leases(each_s=1)
    ownership = SessionOwnership(store, seams=Seams(), lease_s=100)
    async with trio.open_nursery() as nursery:
        for key in ("a", "b", "c"):
            await ownership.take(key)
        nursery.start_soon(ownership.run_renewal)
        nursery.start_soon(ownership.run_returns)
        await trio.sleep(30.5)
        ownership.release("b")
        ownership.release("c")
        await ownership.take("c")
        assert sorted(store.leased) == ["a", "c"]
        await trio.sleep(5)
        assert sorted(store.leased) == ["a", "c"]
        nursery.cancel_scope.cancel()
