"""What stands between a request and its generation: credits that can be held, and rate limits."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, final

import trio
from msgspec import Struct

from .faults import ErrorReply, FaultContext, credits_spent, in_flight_full, limited
from .limits import Demand, Grant, LimitWindow, RateLimits, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from .catalog import SimulatedModel
    from .config import SimulatorConfig
    from .ledger import Ledger

__all__ = ["Admission", "Purse", "Ticket"]

_NS: Final = 1_000_000_000


@final
class Purse:
    """The credits that are neither spent nor held, in integer nano-dollars. Times are on the trio clock."""

    def __init__(self, config: SimulatorConfig, ledger: Ledger) -> None:
        self._held_nanousd = 0
        self._config = config
        self._ledger = ledger
        self._settling: deque[tuple[float, int]] = deque()

    @property
    def budget_nanousd(self) -> int:
        """What requests in flight may hold together."""
        left = max(0, self._config.credits_nanousd - self._ledger.total_nanousd)
        share = self._config.in_flight_share
        return left if share == 1 else int(left * share)

    def affordable_tokens(self, model: SimulatedModel, prompt_tokens: int) -> int:
        """How many completion tokens one request could have, were nothing else in flight."""
        left = self.budget_nanousd - prompt_tokens * model.prompt_nanousd - model.request_nanousd
        if not model.completion_nanousd:
            return model.max_completion_tokens if left >= 0 else 0
        return max(0, left) // model.completion_nanousd

    def may_hold(self, nanousd: int, now_s: float) -> bool:
        """Whether so much more can be held now."""
        return self.held_nanousd(now_s) + nanousd <= self.budget_nanousd

    def held_nanousd(self, now_s: float) -> int:
        """What is held now: by requests in flight, and by those that settle."""
        while self._settling and self._settling[0][0] <= now_s:
            self._held_nanousd -= self._settling.popleft()[1]
        return self._held_nanousd

    def hold(self, nanousd: int) -> None:
        """Set aside what a request may come to cost."""
        self._held_nanousd += nanousd

    def release(self, nanousd: int, now_s: float) -> None:
        """Give it back, at once or after the settlement."""
        if self._config.settlement_s and nanousd:
            self._settling.append((now_s + self._config.settlement_s, nanousd))
        else:
            self._held_nanousd -= nanousd


class Ticket(Struct, frozen=True):
    """What an admitted request holds."""

    nanousd: int
    grant: Grant


@final
class Admission:
    """The account's doors. A request passes all of them or leaves no trace but a count of its refusal."""

    def __init__(self, config: SimulatorConfig, ledger: Ledger, *, wall: Callable[[], float]) -> None:
        self.purse = Purse(config, ledger)
        self._wall = wall
        self._epoch_ns: int | None = None
        self._free = config.free_tier.limits(config.credits_nanousd) if config.free_tier is not None else ()
        limits = (*config.limits, *self._free)
        self._limits = RateLimits(limits) if limits else None

    def admit(
        self, demand: Demand, *, model: SimulatedModel, context: Callable[[], FaultContext]
    ) -> Ticket | ErrorReply:
        """Let a request in, or say what it is answered."""
        purse = self.purse
        cost = demand.prompt_tokens * model.prompt_nanousd + demand.max_tokens * model.completion_nanousd
        cost += model.request_nanousd
        if cost and purse.affordable_tokens(model, demand.prompt_tokens) < demand.max_tokens:
            return credits_spent(context())
        if cost and not purse.may_hold(cost, trio.current_time()):
            return in_flight_full(context())
        grant: Grant = []
        if self._limits is not None:
            answer = self._limits.admit(demand, self._now_ns())
            if isinstance(answer, Refused):
                return limited(answer, context())
            grant = answer
        purse.hold(cost)
        return Ticket(cost, grant)

    def leave(self, ticket: Ticket, completion_tokens: int) -> None:
        """An admitted request has ended, with so many tokens billed."""
        self.purse.release(ticket.nanousd, trio.current_time())
        if ticket.grant and self._limits is not None:
            self._limits.settle(ticket.grant, completion_tokens, now_ns=self._now_ns())

    def limit_windows(self) -> list[LimitWindow]:
        """See `RateLimits.windows`."""
        return [] if self._limits is None else self._limits.windows()

    def free_requests(self) -> tuple[int, int]:
        """How many requests to free models were made today, and how many a day are allowed."""
        if self._limits is None or not self._free:
            return 0, 1_000
        daily = self._free[1]
        return daily.amount - self._limits.remaining(daily, self._now_ns()), daily.amount

    def _now_ns(self) -> int:
        """Time since the epoch that runs with the trio clock: a step of the wall clock does not bend windows."""
        now_ns = round(trio.current_time() * _NS)
        if self._epoch_ns is None:
            self._epoch_ns = round(self._wall() * _NS) - now_ns
        return self._epoch_ns + now_ns
