"""What a job will come to, by its first rows and the list of prices, before anything is sent."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Protocol

import msgspec
from msgspec import Struct

from ..errors import BadRequestError
from .runner import encode_row_request

if TYPE_CHECKING:
    from ..wire.catalog import Pricing
    from .input import RowSource
    from .runner import EncodeRequest

__all__ = ["JobEstimate", "Pricer", "estimate_rows"]

# Of an answer whose length nobody bounds or knows.
_TYPICAL_TOKENS: Final = 256


class JobEstimate(Struct, frozen=True, kw_only=True):
    """What a job may come to, from `sampled_rows` of its input.

    `rows` is None where the size of the input is unknown, and the sums are those of the sample then.
    `completion_tokens` supposes 256 an answer, or its bound where that is smaller; `most_completion_tokens` are the
    bounds, None where a row has none. Costs are None where a model has no price in the list (`unpriced_models`);
    `cost_usd` is what is to be expected, `most_cost_usd` the worst case; of a job that goes by the Batch API they are
    half of what the list says. `problem_rows` are rows that cannot be sent.
    """

    rows: int | None
    sampled_rows: int
    problem_rows: int
    prompt_tokens: int
    completion_tokens: int
    most_completion_tokens: int | None
    cost_usd: Decimal | None
    most_cost_usd: Decimal | None
    models: dict[str, int]
    unpriced_models: tuple[str, ...] = ()

    def by_api(self) -> JobEstimate:
        """The same by the Batch API, at half the price."""
        cost, most = self.cost_usd, self.most_cost_usd
        return msgspec.structs.replace(
            self, cost_usd=None if cost is None else cost / 2, most_cost_usd=None if most is None else most / 2
        )


class Pricer(Protocol):
    """What is known of tokens and prices."""

    def estimate_prompt(self, model: str, body: bytes) -> int:
        """About how many tokens a body has."""

    def price(self, model: str) -> Pricing | None:
        """The prices of a model."""


class _Sums:
    """The sums of a sample."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self.rows = self.problems = self.prompt = self.completion = self.most = 0
        self.is_bounded = True
        self.cost = self.most_cost = Decimal(0)
        self.models: Counter[str] = Counter()
        self.unpriced: set[str] = set()

    def add(self, body: bytes, model: str, max_tokens: int | None) -> None:
        prompt = self._pricer.estimate_prompt(model, body)
        expected = _TYPICAL_TOKENS if max_tokens is None else min(max_tokens, _TYPICAL_TOKENS)
        self.models[model] += 1
        self.prompt += prompt
        self.completion += expected
        self.most += max_tokens or 0
        self.is_bounded = self.is_bounded and max_tokens is not None
        pricing = self._pricer.price(model)
        if pricing is None:
            self.unpriced.add(model)
            return
        self.cost += _cost(pricing, prompt, expected)
        # A token is at least a byte.
        self.most_cost += _cost(pricing, len(body), max_tokens or 0)


async def estimate_rows(
    source: RowSource, encode: EncodeRequest, *, pricer: Pricer, sample: int = 1_000, limit: int | None = None
) -> JobEstimate:
    """Look at up to `sample` rows, which stay in the source; raises as reading it does."""
    sums = _Sums(pricer)
    wanted = sample if limit is None else min(sample, limit)
    while sums.rows < wanted and (row := await source.peek(sums.rows)) is not None:
        sums.rows += 1
        try:
            body, settings = encode_row_request(row, encode)
        except BadRequestError:
            sums.problems += 1
        else:
            sums.add(body, settings.model, settings.max_tokens)
    return _conclude(sums, _total(sums.rows, wanted, source.fraction, limit))


def _total(sampled: int, wanted: int, fraction: float | None, limit: int | None) -> int | None:
    """How many rows there are in all, by how much of the file the sample was."""
    if sampled < wanted or sampled == limit:
        return sampled
    if fraction is None:
        return limit
    rows = max(round(sampled / fraction), sampled) if fraction else sampled
    return rows if limit is None else min(rows, limit)


def _conclude(sums: _Sums, rows: int | None) -> JobEstimate:
    scale = rows / sums.rows if rows is not None and sums.rows else 1.0
    is_priced = not sums.unpriced
    return JobEstimate(
        rows=rows,
        sampled_rows=sums.rows,
        problem_rows=round(sums.problems * scale),
        prompt_tokens=round(sums.prompt * scale),
        completion_tokens=round(sums.completion * scale),
        most_completion_tokens=round(sums.most * scale) if sums.is_bounded else None,
        cost_usd=sums.cost * Decimal(scale) if is_priced else None,
        most_cost_usd=sums.most_cost * Decimal(scale) if is_priced and sums.is_bounded else None,
        models={model: round(count * scale) for model, count in sums.models.most_common()},
        unpriced_models=tuple(sorted(sums.unpriced)),
    )


def _cost(pricing: Pricing, prompt_tokens: int, completion_tokens: int) -> Decimal:
    prompt, completion = pricing.prompt or Decimal(0), pricing.completion or Decimal(0)
    return prompt * prompt_tokens + completion * completion_tokens + (pricing.request or Decimal(0))
