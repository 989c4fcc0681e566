"""What calls cost by the price list: exact sums in Decimal, upper bounds for what is about to be sent, last good table.

Theory of operation. What a reply says in `usage.cost` was charged; a price list only estimates. So it is asked for
two things: the estimate of a call whose reply did not say, and the most that a request can come to cost before it is
sent. Nothing here waits or reads a clock.

Prices are those of openrouter API, "Models, pricing, endpoints", and mean this here:

- The prompt's tokens are each charged once: read from a cache, written to one, as audio, as an image, or plainly. A
  kind without a price of its own costs what plain tokens cost; audio without a price for cached audio what audio costs.
- Of the completion's tokens those of reasoning, audio and images have their own price where there is one. A price of
  zero for reasoning is how the list says that there is none.
- Requests, images and web searches are charged by number. A search without a price makes the cost unknown.
- An override holds while all its conditions are met, at the time of the request in UTC. One without any condition is
  taken for one with a condition that this version cannot read: no estimate uses it, every upper bound counts it.
- A price that is needed and is -1 makes the cost unknown. Unknown is None, never zero.

Names. A model is found by its id, or by the dated name that replies carry (`canonical_slug`). `x:free` is a model of
its own and never costs what `x` costs, nor the other way round. The other endings (`:nitro`, `:floor`, `:online` and
the like) choose among the providers of `x`: where the list has no such id they cost what `x` costs, `:online` with a
search. Nothing else is guessed: a date is not cut off a name, since dated models have prices of their own.
"""

from __future__ import annotations

import time
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from msgspec import Struct

from ..runtime_events import RuntimeEvent
from ..wire.catalog import Pricing, PricingOverride
from ..wire.pricing import CONDITIONS, PRICE_KINDS, UNKNOWN_PRICE, find_fault
from .money import ZERO, divide_usd, multiply_add_usd, multiply_usd, subtract_usd

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..config import PricePolicy
    from ..wire.catalog import Model
    from ..wire.responses import Usage

__all__ = [
    "TEXT_ONLY",
    "Consumption",
    "ModelPrice",
    "PriceBook",
    "PriceEvent",
    "PriceFailure",
    "PriceRefreshFailed",
    "PriceStatistics",
    "PriceTable",
    "PricesRefreshed",
    "Quote",
    "RequestShape",
    "consumption_of",
    "price_of",
]

_ONE: Final = Decimal(1)
_ENDLESS_USD: Final = Decimal(10) ** 12
_MOST_OUTPUT_IMAGES: Final = 10
_DAYS: Final = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_FREE: Final = ":free"
_ONLINE: Final = ":online"
_ROUTING: Final = frozenset({"nitro", "floor", "exacto", "online", "extended", "thinking"})


class Consumption(Struct, frozen=True, kw_only=True, gc=False):
    """What a call used, in the units that prices count.

    `prompt_tokens` holds the cached ones, those written to a cache, and those of audio and images; `cached_tokens` the
    cached audio, `cache_write_tokens` those that stay for an hour. `completion_tokens` holds those of reasoning, audio
    and images. `images` and `output_images` are numbers of images.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    audio_tokens: int = 0
    cached_audio_tokens: int = 0
    image_tokens: int = 0
    images: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    audio_output_tokens: int = 0
    image_output_tokens: int = 0
    output_images: int = 0
    web_searches: int = 0


class RequestShape(Struct, frozen=True, kw_only=True, gc=False):
    """What is known of a request before it is sent, besides its tokens: which prices can apply to it."""

    images: int = 0
    audio: bool = False
    long_cache: bool = False
    """Whether a part of the prompt asks for the cache that lasts an hour."""
    web_searches: int = 0
    """The most searches that it can make."""
    audio_output: bool = False
    image_output: bool = False
    unbounded: bool = False
    """Whether the prompt holds something whose tokens nobody can bound from here, such as the address of a film."""


TEXT_ONLY: Final = RequestShape()


class Quote(Struct, frozen=True, gc=False):
    """The most that a request can come to cost: `fixed_usd`, and `token_usd` for each token of its completion.

    `most_tokens` is the longest completion that the model makes, None where the list does not say.
    """

    fixed_usd: Decimal
    token_usd: Decimal
    most_tokens: int | None = None

    def worst_usd(self, max_tokens: int) -> Decimal:
        """The most that it can cost with so many completion tokens."""
        return multiply_add_usd(self.token_usd, max_tokens, self.fixed_usd)

    def affordable_tokens(self, usd: Decimal) -> int | None:
        """How many completion tokens `usd` pays for; None for any number, -1 where the prompt alone costs more."""
        left = subtract_usd(usd, self.fixed_usd)
        if left < 0:
            return -1
        # More money than sums are kept of exactly pays for anything, and a number of tokens would not fit.
        return int(divide_usd(left, self.token_usd)) if self.token_usd and left < _ENDLESS_USD else None

    def or_dearer(self, other: Quote) -> Quote:
        """A quote that covers both."""
        most = (
            None if self.most_tokens is None or other.most_tokens is None else max(self.most_tokens, other.most_tokens)
        )
        return Quote(max(self.fixed_usd, other.fixed_usd), max(self.token_usd, other.token_usd), most)

    def times(self, factor: Decimal) -> Quote:
        """The same, `factor` times as dear."""
        return (
            self
            if factor == 1
            else Quote(multiply_usd(self.fixed_usd, factor), multiply_usd(self.token_usd, factor), self.most_tokens)
        )


class ModelPrice(Struct, frozen=True, kw_only=True):
    """What is known of one model. `pricing` of None is a model whose price nobody knows, such as a router's."""

    id: str
    pricing: Pricing | None = None
    canonical_slug: str | None = None
    context_length: int | None = None
    max_completion_tokens: int | None = None


def consumption_of(
    usage: Usage,
    *,
    images: int = 0,
    output_images: int = 0,
    long_cache: bool = False,
    web_searches: int = 0,
) -> Consumption | None:
    """What `usage` counts; None when it lacks the tokens of the prompt or of the completion.

    The other arguments are what a reply does not count: images, whether cache writes were for an hour, and the searches
    where `usage` does not say.
    """
    if usage.prompt_tokens is None or usage.completion_tokens is None:
        return None
    prompt, completion = usage.prompt_tokens_details, usage.completion_tokens_details
    tools = usage.server_tool_use_details
    if tools is not None and tools.web_search_requests is not None:
        web_searches = tools.web_search_requests
    written = _count(prompt and prompt.cache_write_tokens)
    return Consumption(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=_count(prompt and prompt.cached_tokens),
        cache_write_tokens=written,
        cache_write_1h_tokens=written if long_cache else 0,
        audio_tokens=_count(prompt and prompt.audio_tokens),
        images=images,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=_count(completion and completion.reasoning_tokens),
        audio_output_tokens=_count(completion and completion.audio_tokens),
        image_output_tokens=_count(completion and completion.image_tokens),
        output_images=output_images,
        web_searches=web_searches,
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


# What a call came to


def price_of(pricing: Pricing, used: Consumption, *, at_s: float) -> Decimal | None:
    """What `used` costs in USD, for a request at `at_s` (seconds since the epoch); None when it is unknown."""
    rates = _rates_at(pricing, used.prompt_tokens, at_s=at_s) if pricing.overrides else pricing
    total = ZERO
    for count, rate in (*_prompt_items(rates, used), *_completion_items(rates, used)):
        if count <= 0:
            continue
        if rate is None or rate < 0:
            return None
        total = multiply_add_usd(count, rate, total)
    return total if pricing.discount is None else multiply_usd(total, subtract_usd(_ONE, pricing.discount))


def _prompt_items(rates: Pricing, used: Consumption) -> tuple[tuple[int, Decimal | None], ...]:
    """What the prompt and the request itself are charged for: how many, at which price."""
    audio = _or(rates.audio, rates.prompt)
    write = _or(rates.input_cache_write, rates.prompt)
    cached_audio = min(used.cached_audio_tokens, used.audio_tokens, used.cached_tokens)
    long_written = min(used.cache_write_1h_tokens, used.cache_write_tokens)
    new_audio = used.audio_tokens - cached_audio
    plain = used.prompt_tokens - used.cached_tokens - used.cache_write_tokens - new_audio - used.image_tokens
    return (
        (1, _or(rates.request, ZERO)),
        (plain, rates.prompt),
        (used.cached_tokens - cached_audio, _or(rates.input_cache_read, rates.prompt)),
        (cached_audio, _or(rates.input_audio_cache, audio)),
        (used.cache_write_tokens - long_written, write),
        (long_written, _or(rates.input_cache_write_1h, write)),
        (new_audio, audio),
        (used.image_tokens, _or(rates.image_token, rates.prompt)),
        (used.images, _or(rates.image, ZERO)),
        (used.web_searches, rates.web_search),
    )


def _completion_items(rates: Pricing, used: Consumption) -> tuple[tuple[int, Decimal | None], ...]:
    """What the completion is charged for: how many, at which price."""
    image = _or(rates.image_token, rates.completion)
    if rates.image_token is None and rates.image_output is not None and used.output_images:
        image = ZERO  # paid for by the piece
    text = used.completion_tokens - used.reasoning_tokens - used.audio_output_tokens - used.image_output_tokens
    return (
        (text, rates.completion),
        (used.reasoning_tokens, rates.internal_reasoning or rates.completion),
        (used.audio_output_tokens, _or(rates.audio_output, rates.completion)),
        (used.image_output_tokens, image),
        (used.output_images, _or(rates.image_output, ZERO)),
    )


def _or(price: Decimal | None, other: Decimal | None) -> Decimal | None:
    return other if price is None else price


def _rates_at(pricing: Pricing, prompt_tokens: int, *, at_s: float) -> Pricing:
    """The prices with the overrides that hold; later ones win, price by price."""
    found: dict[str, Decimal] = {}
    for override in pricing.overrides or ():
        if _holds(override, prompt_tokens, at_s=at_s):
            found |= {kind: price for kind in PRICE_KINDS if (price := getattr(override, kind)) is not None}
    return msgspec.structs.replace(pricing, **found) if found else pricing


def _holds(override: PricingOverride, prompt_tokens: int, *, at_s: float) -> bool:
    if _is_unconditional(override):
        return False
    if override.min_prompt_tokens is not None and prompt_tokens <= override.min_prompt_tokens:
        return False
    if override.utc_days is None and override.utc_start is None and override.utc_end is None:
        return True
    utc = time.gmtime(at_s)
    if override.utc_days is not None and _DAYS[utc.tm_wday] not in {day.lower() for day in override.utc_days}:
        return False
    start = 0 if override.utc_start is None else override.utc_start
    end = 2_400 if override.utc_end is None else override.utc_end
    clock = utc.tm_hour * 100 + utc.tm_min
    return start <= clock < end if start <= end else clock >= start or clock < end


def _is_unconditional(override: PricingOverride) -> bool:
    return all(getattr(override, name) is None for name in CONDITIONS)


# What a request can come to


class _Ceiling(Struct, frozen=True, gc=False):
    """The dearest prices that can apply to a prompt of more than `above` tokens."""

    above: int
    prompt: Decimal
    completion: Decimal
    fixed: Decimal


def _ceilings(pricing: Pricing, shape: RequestShape) -> tuple[_Ceiling, ...] | None:
    """By length of the prompt, the longest first; None when a price that may be needed is unknown.

    Hours and days do not matter: nobody knows when the request will run.
    """
    tiers = {override.min_prompt_tokens or 0 for override in pricing.overrides or ()}
    made = []
    for above in sorted(tiers | {0}, reverse=True):
        parts: list[Pricing | PricingOverride] = [pricing]
        parts += [*(o for o in pricing.overrides or () if (o.min_prompt_tokens or 0) <= above)]
        ceiling = _ceiling(parts, shape, above=above)
        if ceiling is None:
            return None
        made.append(ceiling)
    return tuple(made)


def _ceiling(parts: Sequence[Pricing | PricingOverride], shape: RequestShape, *, above: int) -> _Ceiling | None:
    prompt_kinds = ["prompt", "input_cache_read", "input_cache_write"]
    prompt_kinds += ["input_cache_write_1h"] if shape.long_cache else []
    prompt_kinds += ["audio", "input_audio_cache"] if shape.audio else []
    prompt_kinds += ["image_token"] if shape.images else []
    completion_kinds = ["completion", "internal_reasoning"]
    completion_kinds += ["audio_output"] if shape.audio_output else []
    completion_kinds += ["image_token"] if shape.image_output else []
    numbers = {"request": 1, "image": shape.images, "image_output": shape.image_output * _MOST_OUTPUT_IMAGES}
    prompt, completion = _dearest(parts, prompt_kinds), _dearest(parts, completion_kinds)
    fixed: Decimal | None = ZERO
    for kind, number in (*numbers.items(), ("web_search", shape.web_searches)):
        price = _dearest(parts, [kind]) if number else ZERO
        price = ZERO if price is None and kind != "web_search" else price
        fixed = None if fixed is None or price is None or price < 0 else multiply_add_usd(price, number, fixed)
    if prompt is None or completion is None or fixed is None or prompt < 0 or completion < 0:
        return None
    pricing = parts[0]
    discount = pricing.discount if isinstance(pricing, Pricing) else None
    rest = _ONE if discount is None else subtract_usd(_ONE, discount)
    return _Ceiling(above, multiply_usd(prompt, rest), multiply_usd(completion, rest), multiply_usd(fixed, rest))


def _dearest(parts: Sequence[Pricing | PricingOverride], kinds: Sequence[str]) -> Decimal | None:
    """The highest of these prices; -1 when one of them is unknown, None when none is given."""
    prices = [price for part in parts for kind in kinds if (price := getattr(part, kind)) is not None]
    if not prices:
        return None
    return UNKNOWN_PRICE if min(prices) < 0 else max(prices)


class PriceTable:
    """A snapshot of all prices; it never changes. `own` prices stand before those of `rows`.

    `at_s` is when the list was fetched, in seconds since the epoch; None for one that never was.
    """

    __slots__ = ("_ceilings", "_names", "_own", "at_s", "rows")

    def __init__(
        self, rows: Mapping[str, ModelPrice] = {}, *, own: Mapping[str, Pricing] = {}, at_s: float | None = None
    ) -> None:
        self.rows: Mapping[str, ModelPrice] = dict(rows)
        self.at_s = at_s
        self._own = dict(own)
        self._names = _names(self.rows, self._own)
        # What was asked for before, by found model: as many as there are models.
        self._ceilings: dict[str, tuple[_Ceiling, ...] | None] = {}

    def __repr__(self) -> str:
        return f"<PriceTable {len(self)} models, {len(self._own)} own prices, at {self.at_s}>"

    def __len__(self) -> int:
        """How many models of the list have a price."""
        return sum(row.pricing is not None for row in self.rows.values())

    def with_own(self, own: Mapping[str, Pricing]) -> PriceTable:
        """The same list with these prices before it."""
        return PriceTable(self.rows, own=own, at_s=self.at_s)

    def find(self, model: str) -> ModelPrice | None:
        """The model of this name: an id, a dated name, or one of them with an ending that chooses a provider."""
        found = self._names.get(model)
        if found is None and ":" in model:
            base, _, ending = model.rpartition(":")
            found = self._names.get(base) if ending in _ROUTING else None
            if found is not None and found.id.endswith(_FREE):
                return None
        return found

    def price(self, model: str) -> Pricing | None:
        """The prices of a model, None when they are not known."""
        found = self.find(model)
        return None if found is None else found.pricing

    def estimate(self, *models: str | None, used: Consumption, at_s: float) -> Decimal | None:
        """What `used` costs by the first of these names that has a price; None when it is unknown."""
        for model in models:
            pricing = self.price(model) if model else None
            if pricing is not None:
                return price_of(pricing, used, at_s=at_s)
        return None

    def quote(self, *models: str, prompt_tokens: int, shape: RequestShape = TEXT_ONLY) -> Quote | None:
        """The most that a request with at most so many prompt tokens can cost, whichever of the models answers it.

        None when one of them has no known price, or when what `shape` tells has none. A prompt is never longer than
        the model's context, so an unbounded one counts as that long, or is None where the list does not say.
        """
        dearest: Quote | None = None
        for model in models:
            quote = self._quote(model, prompt_tokens, shape)
            if quote is None:
                return None
            dearest = quote if dearest is None else dearest.or_dearer(quote)
        return dearest

    def _quote(self, model: str, prompt_tokens: int, shape: RequestShape) -> Quote | None:
        found = self.find(model)
        if found is None or found.pricing is None:
            return None
        if model.endswith(_ONLINE) and not shape.web_searches:
            shape = msgspec.structs.replace(shape, web_searches=1)
        if found.context_length is not None and (shape.unbounded or prompt_tokens > found.context_length):
            prompt_tokens = found.context_length
        elif shape.unbounded:
            return None
        for ceiling in self._ceilings_of(found, shape) or ():
            if prompt_tokens > ceiling.above or not ceiling.above:
                fixed = multiply_add_usd(ceiling.prompt, prompt_tokens, ceiling.fixed)
                return Quote(fixed, ceiling.completion, found.max_completion_tokens or found.context_length)
        return None

    def _ceilings_of(self, found: ModelPrice, shape: RequestShape) -> tuple[_Ceiling, ...] | None:
        pricing = found.pricing
        if pricing is None or (shape is not TEXT_ONLY and shape != TEXT_ONLY):
            return None if pricing is None else _ceilings(pricing, shape)
        try:
            return self._ceilings[found.id]
        except KeyError:
            made = self._ceilings[found.id] = _ceilings(pricing, shape)
            return made


def _names(rows: Mapping[str, ModelPrice], own: Mapping[str, Pricing]) -> dict[str, ModelPrice]:
    """Every name that a model can be found by. Ids stand before dated names, own prices before both."""
    names: dict[str, ModelPrice] = {}
    for row in rows.values():
        if row.canonical_slug:
            is_free = row.id.endswith(_FREE) and not row.canonical_slug.endswith(_FREE)
            names.setdefault(row.canonical_slug + (_FREE if is_free else ""), row)
    names |= rows
    for model, pricing in own.items():
        listed = names.get(model)
        row = ModelPrice(id=model) if listed is None else listed
        names[model] = msgspec.structs.replace(row, pricing=pricing)
        # The dated name that replies carry is the same model, unless it has an id and a price of its own.
        if listed is not None and listed.canonical_slug and listed.canonical_slug not in (rows.keys() | own.keys()):
            is_free = model.endswith(_FREE) and not listed.canonical_slug.endswith(_FREE)
            names[listed.canonical_slug + (_FREE if is_free else "")] = names[model]
    return names


# The last good table


PriceFailure = Literal["error", "hung", "broken", "shrunken"]
"""Why there is no newer table: the request failed, or took too long; what came is no list of prices, or lacks most."""


class PricesRefreshed(RuntimeEvent, frozen=True, kw_only=True):
    """There is a newer table. `models` have a price in it; `refused` are models whose new price was nonsense and which
    kept the one that they had, with the reasons in `faults` (at most ten).
    """

    models: int
    added: int = 0
    removed: int = 0
    changed: int = 0
    refused: int = 0
    faults: tuple[str, ...] = ()


class PriceRefreshFailed(RuntimeEvent, frozen=True, kw_only=True):
    """There is no newer table, and the last good one stays. `in_a_row` counts failures since the last success."""

    failure: PriceFailure
    reason: str
    in_a_row: int = 1
    kept_models: int = 0
    kept_at_s: float | None = None


PriceEvent = PricesRefreshed | PriceRefreshFailed


class PriceStatistics(Struct, frozen=True, kw_only=True):
    """A snapshot. Times are seconds since the epoch, None for never."""

    models: int
    own: int
    refreshed: int
    failed: int
    failed_in_a_row: int
    refused_rows: int
    table_at_s: float | None
    last_failure: PriceRefreshFailed | None


class PriceBook:
    """The prices in use: the last good table, under the prices that the user gave."""

    def __init__(self, policy: PricePolicy) -> None:
        self.policy = policy
        self.table = PriceTable(own=policy.own_prices())
        self._own = policy.own_prices()
        self._refreshed = self._failed = self._in_a_row = self._refused_rows = 0
        self._last_failure: PriceRefreshFailed | None = None

    def __repr__(self) -> str:
        return f"<PriceBook {self.table!r}, {self._in_a_row} failures in a row>"

    def statistics(self) -> PriceStatistics:
        """A snapshot; cheap."""
        return PriceStatistics(
            models=len(self.table),
            own=len(self._own),
            refreshed=self._refreshed,
            failed=self._failed,
            failed_in_a_row=self._in_a_row,
            refused_rows=self._refused_rows,
            table_at_s=self.table.at_s,
            last_failure=self._last_failure,
        )

    def set_own(self, own: Mapping[str, Pricing]) -> None:
        """Take these in place of the prices that the user gave before."""
        self._own = dict(own)
        self.table = self.table.with_own(self._own)

    def update(self, models: Iterable[Model], *, at_s: float) -> PriceEvent:
        """Take a new list, or refuse it and keep the last good one; says which."""
        rows, faults = self._read(models)
        refusal = self._judge(rows, len(faults))
        if refusal is not None:
            return self.fail(*refusal, at_s=at_s)
        before = self.table.rows
        self.table = PriceTable(rows, own=self._own, at_s=at_s)
        self._refreshed += 1
        self._in_a_row = 0
        self._refused_rows += len(faults)
        return PricesRefreshed(
            at_s=at_s,
            models=len(self.table),
            added=len(rows.keys() - before.keys()),
            removed=len(before.keys() - rows.keys()),
            changed=sum(rows[name].pricing != before[name].pricing for name in rows.keys() & before.keys()),
            refused=len(faults),
            faults=tuple(faults[:10]),
        )

    def fail(self, failure: PriceFailure, reason: str, *, at_s: float) -> PriceRefreshFailed:
        """Note that there is no newer list; the table stays as it is."""
        self._failed += 1
        self._in_a_row += 1
        self._last_failure = PriceRefreshFailed(
            at_s=at_s,
            failure=failure,
            reason=reason,
            in_a_row=self._in_a_row,
            kept_models=len(self.table),
            kept_at_s=self.table.at_s,
        )
        return self._last_failure

    def _read(self, models: Iterable[Model]) -> tuple[dict[str, ModelPrice], list[str]]:
        """The rows of a list, and what is wrong with those that are refused; these stay as they were."""
        rows: dict[str, ModelPrice] = {}
        faults: list[str] = []
        for model in models:
            fault = "no prices" if model.pricing is None else find_fault(model.pricing)
            if fault is None:
                rows[model.id] = _row_of(model)
                continue
            faults.append(f"{model.id}: {fault}")
            if model.id in self.table.rows:
                rows[model.id] = self.table.rows[model.id]
        return rows, faults

    def _judge(self, rows: Mapping[str, ModelPrice], refused: int) -> tuple[PriceFailure, str] | None:
        """Why a list is not to be trusted; refused rows that kept an old price do not speak for it."""
        policy, known = self.policy, len(self.table.rows)
        kept = sum(row is self.table.rows.get(name) for name, row in rows.items())
        good = len(rows) - kept
        if not good:
            return "broken", f"none of its {refused} rows has prices that can be used"
        if known >= policy.min_models > good:
            return "shrunken", f"it has {good} models, fewer than {policy.min_models}, and {known} were known"
        if good < known * policy.min_share:
            return "shrunken", f"it has {good} models, less than {policy.min_share:.0%} of the {known} that were known"
        return None


def _row_of(model: Model) -> ModelPrice:
    pricing = model.pricing
    is_known = pricing is not None and UNKNOWN_PRICE not in {pricing.prompt, pricing.completion}
    top = model.top_provider
    contexts = (model.context_length, top.context_length if top is not None else None)
    longest = top.max_completion_tokens if top is not None else None
    return ModelPrice(
        id=model.id,
        pricing=pricing if is_known else None,
        canonical_slug=model.canonical_slug,
        # A length of nothing is not known: by it, no prompt would cost anything.
        context_length=max((tokens for tokens in contexts if tokens is not None and tokens > 0), default=None),
        max_completion_tokens=None if longest is None or longest <= 0 else longest,
    )
