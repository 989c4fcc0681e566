"""Faults: what goes wrong in a world, where and when, written down beforehand.

A fault says what happens and names what it happens to; what is not named matches everything::

    Cut(request=3, after_bytes=100)                     the reply to the third request breaks off after 100 bytes
    Drop(direction="request", probability=0.01)         one request in a hundred gets lost
    Stall(connection=1, for_s=30)                       the first connection stands still for half a minute
    Refuse(since_s=3600, until_s=7200)                  for an hour, nobody can connect
    FailStore(operation="append", nth=2, when="after")  the second append is written, and fails all the same
    SkewClock(at_s=60, by_s=-3600)                      after a minute, the wall clock is set back by an hour

Requests, connections and operations are numbered from 1, over the whole world, in the order in which they begin. A
request is what a client sends on a connection before it hears something; its reply is what comes back before the next
one. Chance is drawn from the seed of the world, for each fault by itself. Times are virtual seconds since its start.
Every fault that strikes is in the log.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, TypeVar, cast, final, get_args

from msgspec import Struct

from ..errors import ConfigError

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from .log import EventLog

__all__ = [
    "Aim",
    "Corrupt",
    "Cut",
    "Delay",
    "Direction",
    "Drop",
    "Duplicate",
    "FailOperation",
    "FailStore",
    "Fault",
    "FaultPlan",
    "HangStore",
    "MessageFault",
    "NetworkFault",
    "Refuse",
    "SkewClock",
    "Stall",
    "StoreFault",
    "StoreOperation",
    "check_faults",
]

Direction = Literal["request", "reply"]
"""Which way bytes go: from the client, or to it."""

StoreOperation = Literal[
    "load", "version", "append", "rewrite", "delete", "erase", "list_keys", "list_sessions", "aclose"
]
"""The methods of a `HistoryStore`."""


class _Selector(Struct, frozen=True, kw_only=True):
    """`probability` is drawn once for each thing that matches otherwise; `times` is how many are struck at most."""

    probability: float = 1.0
    times: int | None = None
    since_s: float = 0.0
    until_s: float = math.inf

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"{name}: probability must be 0 to 1, not {self.probability!r}")
        for field in self.__struct_fields__:
            value = getattr(self, field)
            is_bad = isinstance(value, (int, float)) and (math.isnan(value) or value < _LEAST.get(field, -math.inf))
            if is_bad:
                raise ConfigError(f"{name}: {field} must be at least {_LEAST[field]}, not {value!r}")
            words = _WORDS.get(field) or _WORDS.get(f"{name}.{field}")
            if words is not None and value not in words:
                raise ConfigError(f"{name}: {field} must be one of {', '.join(map(repr, words))}, not {value!r}")
        if self.since_s >= self.until_s:
            raise ConfigError(f"{name}: since_s must be before until_s, or it never strikes")


_LEAST = {
    "after_bytes": 0,
    "after_s": 0,
    "by_s": 0,
    "connection": 1,
    "for_s": 0,
    "nth": 1,
    "request": 1,
    "size": 1,
    "since_s": 0,
    "times": 1,
    "until_s": 0,
}
# A word that there is not would be taken for another, or the fault would never strike.
_WORDS: Final[dict[str, tuple[str | None, ...]]] = {
    "direction": get_args(Direction),
    "operation": (None, *get_args(StoreOperation)),
    "when": ("before", "after"),
    "Cut.how": ("reset", "end"),
    "Refuse.how": ("refused", "unreachable", "silent"),
}


class NetworkFault(_Selector, frozen=True, kw_only=True):
    """`host` is the one that the client asked for, `connection` the number of the connection."""

    connection: int | None = None
    host: str | None = None


class MessageFault(NetworkFault, frozen=True, kw_only=True):
    """Strikes the request with the number `request`, or the reply to it, at the byte after `after_bytes` others.

    A message that is shorter is left alone.
    """

    request: int | None = None
    direction: Direction = "reply"
    after_bytes: int = 0


class Drop(MessageFault, frozen=True, kw_only=True):
    """Bytes get lost: `size` of them, or all the rest of the message. The connection stays open."""

    size: int | None = None


class Delay(MessageFault, frozen=True, kw_only=True):
    """What follows arrives `by_s` later."""

    by_s: float


class Cut(MessageFault, frozen=True, kw_only=True):
    """The connection ends there, both ways: with a reset, or with an orderly end of file."""

    how: Literal["reset", "end"] = "reset"


class Corrupt(MessageFault, frozen=True, kw_only=True):
    """The next `size` bytes arrive as others."""

    size: int = 1


class Duplicate(MessageFault, frozen=True, kw_only=True):
    """What follows in the same write arrives twice."""


class Stall(MessageFault, frozen=True, kw_only=True):
    """Nothing more arrives on the connection, in neither direction, for `for_s`; its end neither."""

    for_s: float = math.inf


class Refuse(NetworkFault, frozen=True, kw_only=True):
    """Connecting fails after `after_s`: refused, unreachable, or with no answer at all (`silent`)."""

    how: Literal["refused", "unreachable", "silent"] = "refused"
    after_s: float = 0.0


class StoreFault(_Selector, frozen=True, kw_only=True):
    """`nth` counts the operations that match otherwise, `since_s` and `until_s` included, also those that another fault
    strikes; `sticky` strikes all from there on.
    """

    operation: StoreOperation | None = None
    key: str | None = None
    nth: int | None = None
    sticky: bool = False


def _io_error() -> Exception:
    return OSError(errno.EIO, "the store failed (simulated)")


class FailStore(StoreFault, frozen=True, kw_only=True):
    """The operation raises `error()`: before it has done anything, or after it was done."""

    when: Literal["before", "after"] = "before"
    error: Callable[[], Exception] = _io_error

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.error):
            raise ConfigError(f"FailStore: error must be a class or a function that makes one, not {self.error!r}")


class HangStore(StoreFault, frozen=True, kw_only=True):
    """The operation takes `for_s` longer: before it does anything, or after it was done. By default for ever."""

    when: Literal["before", "after"] = "before"
    for_s: float = math.inf


class SkewClock(Struct, frozen=True, kw_only=True):
    """From `at_s` on, the wall clock shows `by_s` more, or less. Durations are not measured with it."""

    at_s: float
    by_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.at_s) and math.isfinite(self.by_s)):
            raise ConfigError(f"SkewClock: at_s and by_s must be finite, not {self.at_s!r} and {self.by_s!r}")


class FailOperation(Struct, frozen=True, kw_only=True):
    """The `nth` thing that the client asks of the outside world fails: a connect, send, receive or store operation.

    `sticky` fails all from there on. This is what `sweep_io` goes through.
    """

    nth: int
    sticky: bool = False

    def __post_init__(self) -> None:
        if self.nth < 1:
            raise ConfigError(f"FailOperation: nth must be at least 1, not {self.nth!r}")


Fault: TypeAlias = (
    Drop | Delay | Cut | Corrupt | Duplicate | Stall | Refuse | FailStore | HangStore | SkewClock | FailOperation
)

_KINDS: Final[tuple[type[Fault], ...]] = get_args(Fault)
_OF_STORES: Final = (FailStore, HangStore, FailOperation)


def check_faults(faults: Sequence[object], *, of_store: bool = False) -> None:
    """Raise `ConfigError` unless these are faults of a world, or of a store that is used alone."""
    kinds = _OF_STORES if of_store else _KINDS
    for fault in faults:
        if not isinstance(fault, kinds):
            raise ConfigError(
                f"faults: {fault!r} of {type(fault).__module__} would never strike; "
                f"{'a store' if of_store else 'a world'} has those of {__name__}: "
                f"{', '.join(sorted(kind.__name__ for kind in kinds))}"
            )


@final
class Aim:
    """One fault of a plan, with its luck and its count. `strike` writes it down."""

    def __init__(self, fault: _Selector, *, rng: random.Random, log: EventLog) -> None:
        self.fault = fault
        self.rng = rng
        self._log = log
        self._taken = 0
        self._seen = 0

    def is_due(self, now: float) -> bool:
        """Whether the fault would strike what matches it otherwise, at `now`.

        That is counted, and chance drawn for it, also where another fault strikes in its place: no fault depends on the
        others.
        """
        fault = self.fault
        if not fault.since_s <= now < fault.until_s or not self._counts():
            return False
        if fault.times is not None and self._taken >= fault.times:
            return False
        return fault.probability >= 1 or self.rng.random() < fault.probability

    def _counts(self) -> bool:
        """Whether what matches now is the nth, or after it, where that matters."""
        fault = self.fault
        if not isinstance(fault, StoreFault) or fault.nth is None:
            return True
        self._seen += 1
        return self._seen == fault.nth or (fault.sticky and self._seen > fault.nth)

    def take(self) -> None:
        """The fault strikes what it was due for."""
        self._taken += 1

    def strike(self, **where: object) -> None:
        """Write down that the fault has struck."""
        self._log.record("fault", fault=type(self.fault).__name__, **where)


@final
class FaultPlan:
    """The faults of one world and what has become of them so far; raises `ConfigError` for what is none."""

    def __init__(self, faults: Sequence[Fault], *, rng: Callable[[str], random.Random], log: EventLog) -> None:
        check_faults(faults)
        self._log = log
        self._aims = [
            Aim(fault, rng=rng(f"faults/{number}"), log=log)
            for number, fault in enumerate(faults, start=1)
            if isinstance(fault, _Selector)
        ]
        self._skews = sorted(_of_type(faults, SkewClock), key=lambda skew: skew.at_s)
        self._skewed = 0
        self._failing = list(_of_type(faults, FailOperation))
        self.operations = 0

    def on_connect(self, *, connection: int, host: str, now: float) -> Refuse | None:
        """The refusal that this attempt to connect meets."""
        aim = _first([aim for aim in self._aims if _refuses(aim.fault, connection, host) and aim.is_due(now)])
        if aim is None:
            return None
        refusal = cast("Refuse", aim.fault)
        aim.strike(connection=connection, how=refusal.how)
        return refusal

    def on_request(self, *, connection: int, host: str, request: int, now: float) -> dict[Direction, list[Aim]]:
        """The faults that are aimed at this request and at its reply, in the order of their bytes."""
        aims: dict[Direction, list[Aim]] = {"request": [], "reply": []}
        for aim in self._aims:
            fault = aim.fault
            if not isinstance(fault, MessageFault) or fault.request not in {None, request}:
                continue
            if _fits(fault, connection, host) and aim.is_due(now):
                aim.take()
                aims[fault.direction].append(aim)
        for direction in aims.values():
            direction.sort(key=_position)
        return aims

    def on_store(self, *, operation: StoreOperation, key: str | None, now: float) -> Aim | None:
        """The fault that this operation of the store meets: the first in the plan, of those that are due."""
        return _first([aim for aim in self._aims if _is_for(aim.fault, operation, key) and aim.is_due(now)])

    def on_operation(self, operation: str) -> bool:
        """Whether this operation of a client on the outside world fails."""
        self.operations += 1
        for fault in self._failing:
            if self.operations == fault.nth or (fault.sticky and self.operations > fault.nth):
                self._log.record("fault", fault="FailOperation", operation=operation, number=self.operations)
                return True
        return False

    def stop_failing(self) -> None:
        """Let all operations after this one succeed, where `FailOperation` is what stands against them."""
        self._failing.clear()

    def skew_s(self, now: float) -> float:
        """By how much the wall clock is wrong at `now`; the first reading after a step writes the step down."""
        while self._skewed < len(self._skews) and self._skews[self._skewed].at_s <= now:
            self._log.record("fault", fault="SkewClock", by_s=self._skews[self._skewed].by_s)
            self._skewed += 1
        return sum(skew.by_s for skew in self._skews[: self._skewed])


def _fits(fault: NetworkFault, connection: int, host: str) -> bool:
    return fault.connection in {None, connection} and fault.host in {None, host}


def _refuses(fault: _Selector, connection: int, host: str) -> bool:
    return isinstance(fault, Refuse) and _fits(fault, connection, host)


def _is_for(fault: _Selector, operation: StoreOperation, key: str | None) -> bool:
    return isinstance(fault, StoreFault) and fault.operation in {None, operation} and fault.key in {None, key}


def _first(due: list[Aim]) -> Aim | None:
    """The one that strikes."""
    if not due:
        return None
    due[0].take()
    return due[0]


def _position(aim: Aim) -> int:
    return aim.fault.after_bytes if isinstance(aim.fault, MessageFault) else 0


_F = TypeVar("_F")


def _of_type(faults: Sequence[object], kind: type[_F]) -> Iterator[_F]:
    return (fault for fault in faults if isinstance(fault, kind))
