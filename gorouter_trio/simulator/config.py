"""What a simulation is set up with, and what can be read off it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from ..errors import ConfigError
from ._words import check_words
from .catalog import EMBEDDING_MODELS, MODELS, SimulatedModel
from .faults import FaultKind
from .limits import ALL_FREE, FreeTier, Limit
from .recordings import Recording
from .scenario import Scenario, check_rates

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CancelBilling",
    "RequestRecord",
    "SimulatorConfig",
    "SimulatorStatistics",
]

CancelBilling = Literal["provider", "generated", "everything"]
"""What a cancelled stream costs: as its provider does it, the tokens generated so far, or the whole completion."""


class SimulatorConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of a simulated OpenRouter. Everything random follows from `seed` and the request alone.

    Times are on the trio clock, so a mock clock rules them. Raises `ConfigError` for a value out of range.
    """

    seed: int = 0
    latency_s: float = 0.0
    """From the request to the head of the reply."""
    first_token_s: float = 0.0
    """From the head to the first token."""
    tokens_per_s: float = 0.0
    """Speed of generation; 0 is as fast as possible."""
    jitter: float = 0.0
    """The part by which latency, time to the first token and speed of a request may differ from these, 0 to 1."""
    comment_interval_s: float = 0.5
    """A stream sends a comment with its head and then at this interval while there is nothing else; 0 sends none."""
    padding_interval_s: float = 0.0
    """A whole reply that takes longer commits to a 200 and pads its body at this interval; 0 does not."""
    max_write_bytes: int = 0
    """Above 0, bodies go out in pieces of 1 to this many bytes, cut anywhere, also inside a character."""
    chunked: bool = True
    """As OpenRouter does it: no Content-Length. False sends whole replies with a length, which is a little faster."""
    fault_rates: dict[FaultKind, float] = msgspec.field(default_factory=dict)
    """The share of chat requests that meets each fault; their sum is at most 1."""
    retry_after_s: int | None = None
    """Overrides the Retry-After that refusals carry."""
    api_keys: tuple[str, ...] | None = None
    """The keys that are good; None is every key that starts with `sk-`."""
    models: tuple[SimulatedModel, ...] = MODELS
    embedding_models: tuple[SimulatedModel, ...] = EMBEDDING_MODELS
    default_model: str = "openai/gpt-4o-mini"
    """What a request without a model gets."""
    credits_nanousd: int = 10_000_000_000_000
    """Credits bought; when they are spent, requests to paid models are answered 402."""
    in_flight_share: float = 1.0
    """The part of the unspent credits, 0 to 1, that requests in flight may hold. Each holds its worst case, with all
    of its `max_tokens`, and is answered 402 when that is too much: with a Retry-After if it only has to wait."""
    settlement_s: float = 0.0
    """How long after its end a request goes on holding its worst case."""
    limits: tuple[Limit, ...] = ()
    """Rate limits of the chat; beyond them requests are answered 429. See `simulator.limits`."""
    free_tier: FreeTier | None = None
    """The limits of the `:free` models; None does not limit them."""
    scenario: Scenario | None = None
    """What happens over time, and how replies look; what it says goes before the times, faults and sizes given here."""
    recordings: tuple[Recording, ...] = ()
    """Requests that are answered as they were once: see `simulator.recordings`. They cost what their usage says."""
    only_recordings: bool = False
    """Whether a request that was not recorded is answered 404 rather than by the simulator."""
    clock_offset_s: float = 0.0
    """By how much the server's wall clock is ahead of the one that it is given."""
    reply_tokens: int = 110
    """Median length of a prose reply."""
    reply_spread: float = 0.5
    """Standard deviation of the logarithm of the length; 0 makes every prose reply the same length."""
    generation_lag_s: float = 0.0
    """How long after its end a generation can not be looked up yet."""
    cancel_billing: CancelBilling = "provider"
    batch_s: float = 0.0
    """How long a batch of the Batch API takes, its requests one after the other."""
    batch_window_s: float = 86_400.0
    """After how long the requests of a batch expire that are not done."""
    directives: bool = True
    """Whether the prompt may steer the simulator: see `simulator.directives`."""
    ledger_size: int = 20_000
    """Generations that can be looked up; totals stay exact beyond."""
    log_size: int = 256
    """Requests that `Simulator.recent_requests` remembers."""

    def __post_init__(self) -> None:
        check_words(self)
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be 0 or more, not {value!r}")
        if isinstance(self.api_keys, str):
            raise ConfigError("api_keys must be a tuple of keys, not one key")
        if not math.isfinite(self.clock_offset_s):
            raise ConfigError(f"clock_offset_s must be finite, not {self.clock_offset_s!r}")
        if self.retry_after_s is not None and not 0 <= self.retry_after_s <= _MAX_RETRY_AFTER_S:
            raise ConfigError(f"retry_after_s must be 0 to {_MAX_RETRY_AFTER_S}, not {self.retry_after_s!r}")
        if self.in_flight_share > 1:
            raise ConfigError(f"in_flight_share must be 0 to 1, not {self.in_flight_share!r}")
        if self.jitter > 1:
            raise ConfigError(f"jitter must be 0 to 1, not {self.jitter!r}")
        if self.reply_tokens < 1:
            raise ConfigError(f"reply_tokens must be at least 1, not {self.reply_tokens!r}")
        check_rates(self.fault_rates)
        self._check_models()

    def _check_models(self) -> None:
        ids = [model.id for model in (*self.models, *self.embedding_models)]
        if len(set(ids)) != len(ids):
            raise ConfigError("models: an id stands twice")
        for place, names in self._named_models():
            unknown = names - set(ids)
            if unknown:
                raise ConfigError(f"{place}: {min(unknown)!r} is not among the models")
        if self.default_model not in {model.id for model in self.models}:
            raise ConfigError(f"default_model {self.default_model!r} is not among the models")

    def _named_models(self) -> Iterator[tuple[str, set[str]]]:
        """The models that a setting is for, and where it stands."""
        for number, limit in enumerate(self.limits):
            yield f"limits[{number}].models", set(limit.models) - {ALL_FREE}
        if self.scenario is not None:
            yield "scenario.models", set(self.scenario.models)
            for number, phase in enumerate(self.scenario.phases):
                yield f"scenario.phases[{number}].models", set(phase.models)


_MAX_RETRY_AFTER_S = 1_000_000_000
_NOT_NEGATIVE = (
    "latency_s",
    "first_token_s",
    "tokens_per_s",
    "jitter",
    "comment_interval_s",
    "padding_interval_s",
    "max_write_bytes",
    "credits_nanousd",
    "in_flight_share",
    "settlement_s",
    "reply_spread",
    "generation_lag_s",
    "batch_s",
    "batch_window_s",
    "ledger_size",
    "log_size",
)


class SimulatorStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot of a simulator's counters. Once nothing is in flight, received = refused + processed and
    processed = completed + cancelled + failed.
    """

    received: int = 0
    """Requests for a generation that arrived: chats, completions and embeddings."""
    refused: int = 0
    """Answered with an error before any generation: bad requests and refusing faults, and what the end of the simulator
    has met there. Never charged."""
    processed: int = 0
    """Generations started."""
    completed: int = 0
    """Generations that ran to their end, and were sent off."""
    cancelled: int = 0
    """Streams that the client left before their end."""
    failed: int = 0
    """Generations that ended in a fault, or with the simulator."""
    faults: int = 0
    """Faults injected, refusing ones included."""
    in_flight: int = 0
    """Such requests that are being answered now."""
    max_in_flight: int = 0
    streamed: int = 0
    """Generations that were streamed."""
    prompt_tokens: int = 0
    """Prompt tokens of the charged generations."""
    completion_tokens: int = 0
    """Completion tokens of the charged generations, reasoning included."""
    charged_nanousd: int = 0
    """The sum of all charges."""


class RequestRecord(Struct, frozen=True, kw_only=True, gc=False):
    """One request for a generation, as the simulator's log tells it when the request has ended."""

    generation_id: str | None
    """None when it was turned away before it had one."""
    model: str | None
    status: int
    """HTTP status; 0 when the connection was cut instead."""
    outcome: Literal["completed", "cancelled", "failed", "refused"]
    fault: FaultKind | None
    streamed: bool
    prompt_tokens: int
    completion_tokens: int
    charged_nanousd: int
    started_at_s: float
    """On the trio clock."""
    duration_s: float
