"""Costs added up: in all, and by model, session, tenant and batch. Sums are exact, and what is unknown is no zero."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import Struct

from .money import ZERO, add_usd, subtract_usd

if TYPE_CHECKING:
    from ..wire.ledger import LedgerRow

__all__ = ["OTHERS", "CostRow", "CostSnapshot", "CostSum", "CostSums", "CostTracker"]

OTHERS: Final = "(others)"
"""The name of the row in which those are added up that are too many to keep apart."""

_MODELS: Final = 2_000


class CostRow(Struct, frozen=True, kw_only=True):
    """What some attempts come to.

    `cost_usd` is what was charged for certain. `estimated_usd` comes on top for those whose cost only the price list
    tells. `unknown` counts attempts of which neither is known, `reconciling` those that the API is still asked about,
    `unreconciled` those that it will not be asked about any more; what they cost is in no sum. `folded` is how many
    names this row stands for, above 1 only in the one called `(others)`.
    """

    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: Decimal = ZERO
    estimated_usd: Decimal = ZERO
    estimated: int = 0
    unknown: int = 0
    reconciling: int = 0
    unreconciled: int = 0
    folded: int = 1

    @property
    def total_tokens(self) -> int:
        """Tokens of prompts and completions."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def is_exact(self) -> bool:
        """Whether `cost_usd` is the whole truth."""
        return not (self.estimated or self.unknown or self.reconciling or self.unreconciled)


class CostSnapshot(CostRow, frozen=True, kw_only=True):
    """Everything, and the same by name. A request without a session, tenant or batch is in none of their rows."""

    by_model: Mapping[str, CostRow] = msgspec.field(default_factory=dict)
    by_session: Mapping[str, CostRow] = msgspec.field(default_factory=dict)
    by_tenant: Mapping[str, CostRow] = msgspec.field(default_factory=dict)
    by_batch: Mapping[str, CostRow] = msgspec.field(default_factory=dict)


class CostTracker(Protocol):
    """What counts the rows of a ledger; may be replaced. Both methods are called on the hot path and must not wait."""

    def add(self, row: LedgerRow, *, replaced: LedgerRow | None = None) -> None:
        """Count a row; `replaced` is the same row as it was counted before, when it has changed."""

    def snapshot(self) -> CostSnapshot:
        """What has been counted."""


class CostSums:
    """The tracker that a client has when it is given none. It keeps `most_names` sessions, tenants and batches each
    apart; those that were used the longest time ago are added up in one row.
    """

    __slots__ = ("_batches", "_models", "_sessions", "_tenants", "_total")

    def __init__(self, *, most_names: int = 10_000) -> None:
        self._total = CostSum()
        self._models = _Names(_MODELS)
        self._sessions, self._tenants, self._batches = _Names(most_names), _Names(most_names), _Names(most_names)

    def __repr__(self) -> str:
        return f"<CostSums {self._total.attempts} attempts, {self._total.cost_usd} USD>"

    def add(self, row: LedgerRow, *, replaced: LedgerRow | None = None) -> None:
        """See `CostTracker`."""
        sums = [self._total, self._models.sum_of(row.requested_model or row.model)]
        if row.session:
            sums.append(self._sessions.sum_of(row.session))
        if row.tenant:
            sums.append(self._tenants.sum_of(row.tenant))
        if row.batch:
            sums.append(self._batches.sum_of(row.batch))
        for each in sums:
            if replaced is not None:
                each.take_back(replaced)
            each.add(row)

    def snapshot(self) -> CostSnapshot:
        """See `CostTracker`; takes time for each name."""
        total = msgspec.structs.asdict(self._total.row())
        return CostSnapshot(
            **total,
            by_model=self._models.rows(),
            by_session=self._sessions.rows(),
            by_tenant=self._tenants.rows(),
            by_batch=self._batches.rows(),
        )


class CostSum:
    """A `CostRow` that grows: rows are added, and taken back when they have changed."""

    __slots__ = (
        *("attempts", "completion_tokens", "cost_usd", "estimated", "estimated_usd", "folded", "prompt_tokens"),
        *("reconciling", "unknown", "unreconciled"),
    )

    def __init__(self) -> None:
        self.attempts = self.prompt_tokens = self.completion_tokens = 0
        self.estimated = self.unknown = self.reconciling = self.unreconciled = 0
        self.cost_usd = self.estimated_usd = ZERO
        self.folded = 1

    def add(self, row: LedgerRow) -> None:
        """Count a row."""
        self.attempts += 1
        self.prompt_tokens += row.prompt_tokens
        self.completion_tokens += row.completion_tokens
        if row.cost_usd is not None:
            self.cost_usd = add_usd(self.cost_usd, row.cost_usd)
        else:
            self._count(row, 1)

    def take_back(self, row: LedgerRow) -> None:
        """Count a row no more."""
        self.attempts -= 1
        self.prompt_tokens -= row.prompt_tokens
        self.completion_tokens -= row.completion_tokens
        if row.cost_usd is not None:
            self.cost_usd = subtract_usd(self.cost_usd, row.cost_usd)
        else:
            self._count(row, -1)

    def _count(self, row: LedgerRow, one: int) -> None:
        """Count a row of unknown cost by its state."""
        if row.state == "reconciling":
            self.reconciling += one
        elif row.state == "unreconciled":
            self.unreconciled += one
        elif row.estimate_usd is None:
            self.unknown += one
        else:
            self.estimated += one
            self.estimated_usd = add_usd(self.estimated_usd, row.estimate_usd if one > 0 else -row.estimate_usd)

    def absorb(self, other: CostSum) -> None:
        """Add all that another one has counted."""
        # Done for every new name once there are as many as are kept.
        self.attempts += other.attempts
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.estimated += other.estimated
        self.unknown += other.unknown
        self.reconciling += other.reconciling
        self.unreconciled += other.unreconciled
        self.folded += other.folded
        self.cost_usd = add_usd(self.cost_usd, other.cost_usd)
        self.estimated_usd = add_usd(self.estimated_usd, other.estimated_usd)

    def row(self) -> CostRow:
        """The sums as they are now."""
        return CostRow(**{name: getattr(self, name) for name in self.__slots__})


class _Names:
    """Sums by name, the least recently used first."""

    __slots__ = ("_others", "_room", "_sums")

    def __init__(self, room: int) -> None:
        self._room = room
        self._sums: OrderedDict[str, CostSum] = OrderedDict()
        self._others = CostSum()
        self._others.folded = 0

    def sum_of(self, name: str) -> CostSum:
        found = self._sums.get(name)
        if found is not None:
            self._sums.move_to_end(name)
            return found
        if len(self._sums) >= self._room:
            self._fold()
        made = self._sums[name] = CostSum()
        return made

    def rows(self) -> dict[str, CostRow]:
        rows = {name: each.row() for name, each in reversed(self._sums.items())}
        return rows | {OTHERS: self._others.row()} if self._others.folded else rows

    def _fold(self) -> None:
        """Make room. A sum with a row that will change stays, or the change would be counted elsewhere."""
        name = next((name for name, each in self._sums.items() if not each.reconciling), None)
        if name is not None:
            self._others.absorb(self._sums.pop(name))
