"""What the service behind the simulator goes through: outages, slowness, capacities, and odd forms on the wire.

A `Scenario` says how all models behave, how single models differ, and what changes when: the later of these decides,
for each field on its own. `load_config` reads the whole of a `SimulatorConfig` with its scenario from TOML.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ._words import check_words
from .faults import FAULTS, FaultKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ._draws import Draws

__all__ = [
    "Behaviour",
    "Capacity",
    "Latency",
    "Phase",
    "Scenario",
    "Spread",
    "Wire",
    "check_rates",
]


def check_rates(rates: Mapping[FaultKind, float]) -> None:
    """Raise `ConfigError` unless these are shares of faults that exist."""
    unknown = sorted(set(rates) - set(FAULTS))
    if unknown:
        raise ConfigError(f"fault_rates: unknown fault {unknown[0]!r}; known are {', '.join(FAULTS)}")
    shares = rates.values()
    if not all(0 <= rate <= 1 for rate in shares) or sum(shares) > 1 + 1e-9:
        raise ConfigError("fault_rates must be 0 to 1 each, and at most 1 together")


class Wire(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The form of replies, as far as it varies between providers and over the years. The defaults are today's."""

    finish: Literal["double", "merged", "empty_choices", "missing"] = "double"
    """How a stream ends: the finish twice, the usage with the second; both in one event; the usage with `choices: []`;
    or with neither."""
    done: bool = True
    """Whether `[DONE]` ends a stream."""
    tool_calls: Literal["interleaved", "in_turn", "together", "whole"] = "interleaved"
    """Calls in a stream: fragments of all by turns, one call after the other, the fragments of all calls in one delta,
    or each call in one delta."""
    call_ids: Literal["once", "empty"] = "once"
    """Whether the fragments of a call repeat its id, type and name as empty strings."""
    call_index: Literal["own", "shared", "absent"] = "own"
    """The number of a call in a stream: its own, 0 for all and their id for all as well, or none."""
    failure: Literal["chunk", "no_choices", "with_usage", "no_error", "bare", "named"] = "chunk"
    """How `mid_stream_error` looks in a stream: a chunk with error and finish; the error with `choices: []` and the
    finish in another chunk; the error beside a usage and no finish; the finish alone; nothing but the error; or with a
    name for its code."""
    call_content: Literal["null", "empty"] = "null"
    """The `content` beside tool calls: null or an empty string."""
    details: Literal["full", "null", "absent"] = "full"
    """The objects whose names end in `_details`, those of the reasoning excepted."""
    key_order: Literal["current", "old"] = "current"
    """Old is that of before 2026: id, provider, model, object, created; and the role before the content."""
    comments_before: int = 0
    """Comments more than usual before the first event."""
    comment_every: int = 0
    """A comment after each so many events; 0 is none."""
    padding: int = 0
    """So many paddings before the JSON of a whole reply."""
    cut: Literal["nowhere", "anywhere", "characters", "newlines"] = "nowhere"
    """Where the pieces of a body end: as they are written, anywhere, inside each character that can be cut, or between
    the two newlines of each event. Replies are then written in pieces of at most `max_write_bytes`."""
    max_write_bytes: int = 16
    retry_after: Literal["seconds", "date", "ms"] = "seconds"
    """How a refusal says when to come back: Retry-After in seconds, as a date, or a `retry-after-ms`."""

    def __post_init__(self) -> None:
        check_words(self)
        if min(self.comments_before, self.comment_every, self.padding) < 0:
            raise ConfigError("comments_before, comment_every and padding must be 0 or more")
        if self.call_index != "own" and self.tool_calls not in {"in_turn", "whole"}:
            raise ConfigError("call_index: calls without a number of their own come in_turn or whole (tool_calls)")
        if self.max_write_bytes < 1:
            raise ConfigError(f"max_write_bytes must be at least 1, not {self.max_write_bytes}")


class Spread(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A time that is drawn for each request, in seconds."""

    median_s: float = 0.0
    spread: float = 0.0
    """Of `log_normal` the standard deviation of the logarithm, of `uniform` the part up and down."""
    kind: Literal["log_normal", "uniform", "exponential"] = "log_normal"
    max_s: float = math.inf

    def __post_init__(self) -> None:
        check_words(self)
        if not 0 <= self.median_s < math.inf or not 0 <= self.spread < math.inf or not self.max_s >= 0:
            raise ConfigError("median_s, spread and max_s must be 0 or more")

    def draw(self, draws: Draws) -> float:
        """One of them."""
        return min(self._draw(draws), self.max_s)

    def _draw(self, draws: Draws) -> float:
        match self.kind:
            case "log_normal":
                return draws.log_normal(median=self.median_s, spread=self.spread)
            case "uniform":
                return draws.jittered(self.median_s, jitter=min(1.0, self.spread))
            case "exponential":
                return -math.log2(1 - draws.unit()) * self.median_s


class Latency(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the parts of a reply take; in place of the times of `SimulatorConfig`."""

    head: Spread = Spread()
    """From the request to the head of the reply."""
    first_token: Spread = Spread()
    """From there to the first token."""
    per_token: Spread = Spread()
    """Drawn once a request: its speed."""


class Capacity(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many requests a model serves at a time, and what becomes of the others."""

    concurrent: int
    queue: int = 0
    """How many wait for their turn, in order; those beyond are refused."""
    refusal: Literal["429_upstream", "503", "529"] = "429_upstream"

    def __post_init__(self) -> None:
        check_words(self)
        if self.concurrent < 0 or self.queue < 0:
            raise ConfigError("concurrent and queue must be 0 or more")


class Behaviour(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models behave; None leaves it as it is otherwise."""

    fault_rates: dict[FaultKind, float] | None = None
    capacity: Capacity | None = None
    latency: Latency | None = None
    wire: Wire | None = None

    def __post_init__(self) -> None:
        check_rates(self.fault_rates or {})

    def overlaid(self, other: Behaviour) -> Behaviour:
        """This, with what *other* has to say."""
        given = {name: value for name in _BEHAVIOUR if (value := getattr(other, name)) is not None}
        return msgspec.structs.replace(self, **given) if given else self


_BEHAVIOUR: Final = Behaviour.__struct_fields__


class Phase(Behaviour, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A behaviour for a time, in seconds since the simulator began: half-open, and repeated for ever with *every_s*."""

    from_s: float = 0.0
    to_s: float = math.inf
    every_s: float | None = None
    models: tuple[str, ...] = ()
    """Empty is all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.from_s < self.to_s:
            raise ConfigError(f"a phase needs 0 <= from_s < to_s, not {self.from_s!r} and {self.to_s!r}")
        if self.every_s is not None and not self.to_s <= self.every_s < math.inf:
            raise ConfigError(f"every_s must be finite and not before to_s, not {self.every_s!r}")

    def is_on(self, model: str, elapsed_s: float) -> bool:
        """Whether it rules this model now."""
        if self.every_s is not None:
            elapsed_s %= self.every_s
        return self.from_s <= elapsed_s < self.to_s and (not self.models or model in self.models)

    def next_edge_s(self, elapsed_s: float) -> float:
        """When it begins or ends next; infinite when never."""
        round_s = 0.0 if self.every_s is None else elapsed_s - elapsed_s % self.every_s
        edges = [round_s + self.from_s, round_s + self.to_s]
        if self.every_s is not None:
            edges.append(round_s + self.every_s + self.from_s)
        return min((edge for edge in edges if edge > elapsed_s), default=math.inf)


class Scenario(Behaviour, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How all models behave, unless `models` says otherwise for one, or `phases` for a time."""

    models: dict[str, Behaviour] = msgspec.field(default_factory=dict)
    """By the id of the model."""
    phases: tuple[Phase, ...] = ()
    """A later one decides where two overlap."""

    def at(self, model: str, elapsed_s: float) -> Behaviour:
        """How a model behaves at a time."""
        found: Behaviour = self.overlaid(self.models[model]) if model in self.models else self
        for phase in self.phases:
            if phase.is_on(model, elapsed_s):
                found = found.overlaid(phase)
        return found

    def next_edge_s(self, elapsed_s: float) -> float:
        """When a phase begins or ends next; infinite when never."""
        return min((phase.next_edge_s(elapsed_s) for phase in self.phases), default=math.inf)
