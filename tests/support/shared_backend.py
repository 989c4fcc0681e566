"""What clients of one process share, in virtual time: the decisions of the Redis scripts, in Python."""

from __future__ import annotations

import math

import trio

from gorouter_trio.pool.shared import MoneyAsk, MoneyGrant, RateAsk, RateGrant, SlotAsk, SlotGrant

__all__ = ["MemoryBackend"]


class MemoryBackend:
    """Answers after `latency_s`; while `is_broken` each call fails."""

    def __init__(self, *, latency_s: float = 0.002, lost: str = "spent") -> None:
        self.latency_s = latency_s
        self.lost = lost
        self.is_broken = False
        self.calls = 0
        self.due: dict[str, float] = {}
        self.slots: dict[str, dict[str, tuple[int, int, float]]] = {}
        self.spent: dict[str, int] = {}
        self.money: dict[str, dict[str, tuple[int, int, float]]] = {}

    async def _answer(self) -> float:
        self.calls += 1
        await trio.sleep(self.latency_s / 2)
        if self.is_broken:
            raise OSError("the backend is gone")
        return trio.current_time()

    async def take_rate(self, name: str, ask: RateAsk) -> RateGrant:
        now = await self._answer()
        due = self.due.get(name, -math.inf)
        due = max(due, now - 1000) + ask.owed * ask.interval_s
        at = start = max(due, now - ask.tolerance_s)
        given, amount = 0, ask.first
        while given < ask.count and at <= now + ask.horizon_s:
            given, at, amount = given + 1, at + amount * ask.interval_s, ask.size
        self.due[name] = at if given else due
        await trio.sleep(self.latency_s / 2)
        return RateGrant(given, start - now)

    async def take_slots(self, name: str, ask: SlotAsk) -> SlotGrant:
        now = await self._answer()
        all_ = self.slots.setdefault(name, {})
        for holder in [holder for holder, (_, _, until) in all_.items() if until < now]:
            del all_[holder]
        others = [told for holder, told in all_.items() if holder != ask.holder]
        waits = any(wants > places for places, wants, _ in others)
        given = min(ask.wanted, ask.most - sum(places for places, _, _ in others))
        if waits:
            holders = 1 + sum(places > 0 or wants > 0 for places, wants, _ in others)
            given = min(given, max(ask.most // holders, 1))
        given = max(given, 0)
        all_[ask.holder] = (max(given, ask.in_use), ask.wanted, now + ask.ttl_s)
        if not given and not ask.wanted:
            del all_[ask.holder]
        await trio.sleep(self.latency_s / 2)
        return SlotGrant(given, waits)

    async def take_money(self, name: str, ask: MoneyAsk) -> MoneyGrant:
        now = await self._answer()
        all_ = self.money.setdefault(name, {})
        spent, others = self.spent.get(name, 0), 0
        for holder, (hand, told, until) in list(all_.items()):
            if until < now and hand:
                spent += hand if self.lost == "spent" else 0
                all_[holder] = (0, told, until)
            if holder != ask.holder:
                others += all_[holder][0]
        mine, before, _ = all_.get(ask.holder, (0, 0, 0.0))
        delta = max(ask.spent_nano - before, 0)
        spent, mine = spent + delta, max(mine - delta, 0)
        free = ask.limit_nano - spent - others - mine
        mine = mine + min(ask.wanted_nano - mine, max(free, 0)) if ask.wanted_nano > mine else ask.wanted_nano
        if mine < ask.least_nano:
            mine = min(mine, ask.held_nano)
        self.spent[name] = spent
        all_[ask.holder] = (mine, max(ask.spent_nano, before), now + ask.ttl_s)
        await trio.sleep(self.latency_s / 2)
        return MoneyGrant(mine, spent)
