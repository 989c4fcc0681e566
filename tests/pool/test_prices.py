"""Prices: sums by hand, names, upper bounds, and which lists are believed."""

from __future__ import annotations

import calendar
import decimal
import json
from decimal import Decimal

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from gorouter_trio.config import PricePolicy
from gorouter_trio.errors import ConfigError
from gorouter_trio.pool.prices import (
    Consumption,
    ModelPrice,
    PriceBook,
    PriceRefreshFailed,
    PricesRefreshed,
    PriceTable,
    Quote,
    RequestShape,
    consumption_of,
    price_of,
)
from gorouter_trio.wire.catalog import Model, Pricing, PricingOverride
from gorouter_trio.wire.codec import decode_models
from gorouter_trio.wire.pricing import PRICE_KINDS
from gorouter_trio.wire.responses import CompletionTokensDetails, PromptTokensDetails, Usage

D = Decimal
NOON = calendar.timegm((2026, 11, 25, 12, 0, 0))  # a Wednesday

EVERY_KIND = Pricing(
    prompt=D("0.000003"),
    completion=D("0.000015"),
    request=D("0.01"),
    image=D("0.0048"),
    image_token=D("0.00004"),
    image_output=D("0.03"),
    audio=D("0.00001"),
    audio_output=D("0.00002"),
    input_audio_cache=D("0.000001"),
    input_cache_read=D("0.0000003"),
    input_cache_write=D("0.00000375"),
    input_cache_write_1h=D("0.000006"),
    web_search=D("0.005"),
    internal_reasoning=D("0.000012"),
    discount=D("0.25"),
)


def test_every_kind_by_hand() -> None:
    """Each count times its price, summed up without rounding, less the discount."""
    used = Consumption(
        prompt_tokens=10_000,
        cached_tokens=3_000,  # 500 of them audio
        cache_write_tokens=2_000,  # 800 of them for an hour
        cache_write_1h_tokens=800,
        audio_tokens=1_500,
        cached_audio_tokens=500,
        image_tokens=700,
        images=2,
        completion_tokens=5_000,
        reasoning_tokens=2_000,
        audio_output_tokens=300,
        image_output_tokens=1_200,
        output_images=1,
        web_searches=3,
    )
    plain = 10_000 - 3_000 - 2_000 - 1_000 - 700
    by_hand = (
        D("0.01")  # the request
        + plain * D("0.000003")
        + 2_500 * D("0.0000003")
        + 500 * D("0.000001")
        + 1_200 * D("0.00000375")
        + 800 * D("0.000006")
        + 1_000 * D("0.00001")
        + 700 * D("0.00004")
        + 2 * D("0.0048")
        + 3 * D("0.005")
        + 1_500 * D("0.000015")  # text of the completion
        + 2_000 * D("0.000012")
        + 300 * D("0.00002")
        + 1_200 * D("0.00004")
        + 1 * D("0.03")
    ) * D("0.75")
    assert by_hand == D("0.1676625")
    assert price_of(EVERY_KIND, used, at_s=NOON) == by_hand
    with decimal.localcontext(prec=2):
        assert price_of(EVERY_KIND, used, at_s=NOON) == by_hand


def test_kinds_without_a_price() -> None:
    """Tokens of a kind without a price cost what plain ones cost, and reasoning at zero is not priced apart."""
    pricing = Pricing(prompt=D(2), completion=D(3), internal_reasoning=D(0))
    used = Consumption(
        prompt_tokens=10,
        cached_tokens=3,
        cache_write_tokens=2,
        cache_write_1h_tokens=1,
        audio_tokens=4,
        completion_tokens=7,
        reasoning_tokens=5,
        audio_output_tokens=1,
        image_output_tokens=1,
        images=9,
    )
    assert price_of(pricing, used, at_s=NOON) == 10 * 2 + 7 * 3


def test_images_by_the_piece() -> None:
    """Where images of the answer are priced by the piece, their tokens are not charged again."""
    pricing = Pricing(prompt=D(1), completion=D(1), image_output=D(100))
    used = Consumption(completion_tokens=50, image_output_tokens=40, output_images=2)
    assert price_of(pricing, used, at_s=NOON) == 10 + 200
    assert price_of(pricing, msgspec.structs.replace(used, output_images=0), at_s=NOON) == 50


@pytest.mark.parametrize("kind", ["prompt", "completion", "web_search", "request"])
def test_unknown_is_no_zero(kind: str) -> None:
    """A price of -1 that is needed makes the cost unknown, one that is not needed does not matter."""
    pricing = msgspec.structs.replace(EVERY_KIND, **{kind: D(-1)})
    used = Consumption(prompt_tokens=1, completion_tokens=1, web_searches=1)
    assert price_of(pricing, used, at_s=NOON) is None
    unneeded = Consumption(completion_tokens=1) if kind == "prompt" else Consumption(prompt_tokens=1)
    assert (price_of(pricing, unneeded, at_s=NOON) is None) == (kind == "request")


def test_a_search_without_a_price() -> None:
    """What a search costs cannot be told from the other prices."""
    pricing = Pricing(prompt=D(1), completion=D(1))
    assert price_of(pricing, Consumption(prompt_tokens=1, web_searches=1), at_s=NOON) is None


@pytest.mark.parametrize(
    ("prompt_tokens", "rate"), [(200_000, "1"), (200_001, "2"), (400_000, "2"), (400_001, "3"), (1, "1")]
)
def test_tiers(prompt_tokens: int, rate: str) -> None:
    """A threshold must be exceeded, and the later of two entries that apply wins."""
    pricing = Pricing(
        prompt=D(1),
        completion=D(1),
        overrides=[
            PricingOverride(min_prompt_tokens=200_000, prompt=D(2)),
            PricingOverride(min_prompt_tokens=400_000, prompt=D(3)),
        ],
    )
    used = Consumption(prompt_tokens=prompt_tokens, completion_tokens=10)
    assert price_of(pricing, used, at_s=NOON) == prompt_tokens * D(rate) + 10


def test_later_entries_win_by_price() -> None:
    """Of two entries that hold, each price comes from the last one that has it."""
    pricing = Pricing(
        prompt=D(1),
        completion=D(1),
        overrides=[
            PricingOverride(utc_start=0, prompt=D(2), completion=D(5)),
            PricingOverride(min_prompt_tokens=5, prompt=D(3)),
        ],
    )
    assert price_of(pricing, Consumption(prompt_tokens=10, completion_tokens=10), at_s=NOON) == 30 + 50


@pytest.mark.parametrize(
    ("start", "end", "days", "clock", "holds"),
    [
        (100, 400, None, (1, 0), True),
        (100, 400, None, (3, 59), True),
        (100, 400, None, (4, 0), False),
        (100, 400, None, (0, 59), False),
        (2230, 130, None, (22, 30), True),
        (2230, 130, None, (23, 59), True),
        (2230, 130, None, (0, 0), True),
        (2230, 130, None, (1, 29), True),
        (2230, 130, None, (1, 30), False),
        (2230, 130, None, (22, 29), False),
        (1200, None, None, (23, 59), True),
        (None, 1200, None, (11, 59), True),
        (None, 1200, None, (12, 0), False),
        (500, 500, None, (5, 0), False),
        (None, None, ["wednesday"], (12, 0), True),
        (None, None, ["Wednesday"], (12, 0), True),
        (None, None, ["tuesday", "thursday"], (12, 0), False),
        (2230, 130, ["wednesday"], (0, 30), True),
        (2230, 130, ["tuesday"], (0, 30), False),
        (None, None, [], (12, 0), False),
    ],
)
def test_windows(start: int, end: int, days: list[str], clock: tuple[int, int], holds: bool) -> None:
    """A window has its start and not its end, may reach over midnight, and the day is that of the request, in UTC."""
    override = PricingOverride(utc_start=start, utc_end=end, utc_days=days, prompt=D(7))
    at_s = calendar.timegm((2026, 11, 25, *clock, 0))
    paid = price_of(
        Pricing(prompt=D(1), completion=D(1), overrides=[override]), Consumption(prompt_tokens=1), at_s=at_s
    )
    assert paid == (7 if holds else 1)


def test_all_conditions_must_hold() -> None:
    """Tier and window together, and an entry without any readable condition is for no estimate."""
    both = PricingOverride(min_prompt_tokens=10, utc_start=1100, utc_end=1300, prompt=D(7))
    pricing = Pricing(prompt=D(1), completion=D(1), overrides=[both, PricingOverride(prompt=D(99))])
    assert price_of(pricing, Consumption(prompt_tokens=11), at_s=NOON) == 77
    assert price_of(pricing, Consumption(prompt_tokens=10), at_s=NOON) == 10
    assert price_of(pricing, Consumption(prompt_tokens=11), at_s=NOON + 3600) == 11
    table = PriceTable(own={"x": pricing})
    quote = table.quote("x", prompt_tokens=5)
    assert quote is not None
    assert quote.fixed_usd == 5 * 99, "an upper bound counts it"


def test_usage() -> None:
    """What a reply counts, with the details that it has."""
    usage = Usage(
        prompt_tokens=100,
        completion_tokens=50,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=40, cache_write_tokens=20, audio_tokens=5),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=30, image_tokens=2, audio_tokens=1),
    )
    assert consumption_of(usage, images=3, long_cache=True, web_searches=2, output_images=1) == Consumption(
        prompt_tokens=100,
        cached_tokens=40,
        cache_write_tokens=20,
        cache_write_1h_tokens=20,
        audio_tokens=5,
        images=3,
        completion_tokens=50,
        reasoning_tokens=30,
        audio_output_tokens=1,
        image_output_tokens=2,
        output_images=1,
        web_searches=2,
    )
    assert consumption_of(Usage(prompt_tokens=1)) is None
    assert consumption_of(Usage(prompt_tokens=1, completion_tokens=2)) == Consumption(
        prompt_tokens=1, completion_tokens=2
    )


def test_the_example_list(reference_dir) -> None:
    """The list of the API description, priced by hand from its text."""
    models = decode_models((reference_dir / "openrouter" / "examples" / "14-models.body").read_bytes())
    book = PriceBook(PricePolicy())
    assert isinstance(book.update(models, at_s=NOON), PricesRefreshed)
    used = Consumption(prompt_tokens=1_000, cached_tokens=400, completion_tokens=200)
    by_hand = 600 * D("0.00000015") + 400 * D("0.000000075") + 200 * D("0.0000006")
    assert book.table.estimate("openai/gpt-4o-mini", used=used, at_s=NOON) == by_hand == D("0.00024")
    quote = book.table.quote("openai/gpt-4o-mini", prompt_tokens=1_000)
    assert quote == Quote(D("0.00015"), D("0.0000006"), 16_384)


# --- names ------------------------------------------------------------------------------------------------------------


def row(model: str, price: int, slug: str | None = None) -> ModelPrice:
    return ModelPrice(id=model, pricing=Pricing(prompt=D(price), completion=D(price)), canonical_slug=slug)


ROWS = {
    r.id: r
    for r in (
        row("a/m", 1, "a/m-2026-01-01"),
        row("a/m:free", 0, "a/m-2026-01-01"),
        row("a/m:thinking", 5, "a/m-2026-01-01:thinking"),
        row("a/free-only:free", 0, "a/free-only-2026"),
        row("a/m-2025-05-05", 9, "a/m-2025-05-05"),
        ModelPrice(id="openrouter/auto"),
    )
}


@pytest.mark.parametrize(
    ("name", "price"),
    [
        ("a/m", 1),
        ("a/m-2026-01-01", 1),
        ("a/m:free", 0),
        ("a/m-2026-01-01:free", 0),
        ("a/m:nitro", 1),
        ("a/m-2026-01-01:floor", 1),
        ("a/m:online", 1),
        ("a/m:thinking", 5),
        ("a/m-2025-05-05", 9),
        ("a/free-only:free", 0),
        ("a/free-only-2026:free", 0),
        ("a/free-only", None),
        ("a/free-only-2026", None),
        ("a/m:free:nitro", None),
        ("a/m:whatever", None),
        ("a/m-2024-12-12", None),
        ("openrouter/auto", None),
        ("", None),
        ("nobody/nothing", None),
    ],
)
def test_names(name: str, price: int | None) -> None:
    """Ids, dated names and endings that choose a provider are found; free models are apart; the rest is unknown."""
    found = PriceTable(ROWS).price(name)
    assert (None if found is None else found.prompt) == price


def test_own_prices_win() -> None:
    """Prices of the user's own stand before the list's, under the dated name too, and also for unlisted models."""
    own = {"a/m": Pricing(prompt=D(70), completion=D(70)), "my/model": Pricing(prompt=D(80), completion=D(80))}
    table = PriceTable(ROWS).with_own(own)
    names = ("a/m", "a/m-2026-01-01", "a/m:nitro", "a/m:free", "my/model", "a/m-2025-05-05")
    assert [getattr(table.price(name), "prompt", None) for name in names] == [70, 70, 70, 0, 80, 9]


def test_the_model_that_answered_goes_first() -> None:
    """An estimate is by the first name that has a price."""
    table = PriceTable(ROWS)
    used = Consumption(prompt_tokens=1)
    assert table.estimate("a/m-2025-05-05", "a/m", used=used, at_s=0) == 9
    assert table.estimate("somebody/else", "a/m", used=used, at_s=0) == 1
    assert table.estimate(None, "", "openrouter/auto", used=used, at_s=0) is None


# --- upper bounds -----------------------------------------------------------------------------------------------------

prices = st.decimals(min_value=0, max_value=10, places=3)
maybe = st.none() | prices
counts = st.integers(0, 500)


@st.composite
def pricings(draw: st.DrawFn) -> Pricing:
    kinds = {name: draw(maybe) for name in PRICE_KINDS}
    overrides = [
        msgspec.structs.replace(
            PricingOverride(
                min_prompt_tokens=draw(st.none() | st.integers(0, 1_000)),
                utc_start=draw(st.none() | st.integers(0, 23).map(lambda hour: hour * 100)),
                utc_end=draw(st.none() | st.integers(0, 24).map(lambda hour: hour * 100)),
            ),
            **{name: draw(maybe) for name in PRICE_KINDS},
        )
        for _ in range(draw(st.integers(0, 3)))
    ]
    kinds |= {"prompt": draw(prices), "completion": draw(prices)}
    return Pricing(**kinds, discount=draw(st.none() | st.decimals(0, 1, places=2)), overrides=overrides)


@given(pricing=pricings(), data=st.data(), at_s=st.integers(0, 10**9))
def test_nothing_costs_more_than_its_quote(pricing: Pricing, data: st.DataObject, at_s: int) -> None:
    """Whatever of its prompt is cached, written, or sound, and at whatever hour: a call stays within its quote."""
    shape = RequestShape(
        images=data.draw(st.integers(0, 2)),
        audio=data.draw(st.booleans()),
        long_cache=data.draw(st.booleans()),
        audio_output=data.draw(st.booleans()),
        image_output=data.draw(st.booleans()),
    )
    cached, written, audio, plain = (data.draw(counts) for _ in range(4))
    audio = audio if shape.audio else 0
    text, reasoning, sound, picture = (data.draw(counts) for _ in range(4))
    used = Consumption(
        prompt_tokens=cached + written + audio + plain,
        cached_tokens=cached,
        cache_write_tokens=written,
        cache_write_1h_tokens=written if shape.long_cache else 0,
        audio_tokens=audio,
        images=shape.images,
        completion_tokens=text + reasoning + sound * shape.audio_output + picture * shape.image_output,
        reasoning_tokens=reasoning,
        audio_output_tokens=sound * shape.audio_output,
        image_output_tokens=picture * shape.image_output,
        output_images=shape.image_output,
    )
    bound = used.prompt_tokens + data.draw(st.integers(0, 1_000))
    quote = PriceTable(own={"m": pricing}).quote("m", prompt_tokens=bound, shape=shape)
    assert quote is not None
    cost = price_of(pricing, used, at_s=at_s)
    assert cost is not None
    assert cost <= quote.worst_usd(used.completion_tokens)


@given(fixed=st.decimals(0, 10, places=6), token=st.decimals(0, 1, places=8), usd=st.decimals(0, 20, places=6))
def test_affordable_tokens_are_affordable(fixed: Decimal, token: Decimal, usd: Decimal) -> None:
    """As many tokens as it says are within the money, and one more is not."""
    quote = Quote(fixed, token)
    affordable = quote.affordable_tokens(usd)
    if affordable is None:
        assert token == 0
    elif affordable == -1:
        assert fixed > usd
    else:
        assert quote.worst_usd(affordable) <= usd < quote.worst_usd(affordable + 1)


def test_quotes() -> None:
    """Fallbacks count as the dearest, contexts bound prompts, and what is not known has no quote."""
    rows = {
        "a": ModelPrice(id="a", pricing=Pricing(prompt=D(1), completion=D(9)), context_length=100),
        "b": ModelPrice(
            id="b", pricing=Pricing(prompt=D(2), completion=D(3), web_search=D(50)), max_completion_tokens=7
        ),
    }
    table = PriceTable(rows)
    assert table.quote("a", "b", prompt_tokens=10) == Quote(D(20), D(9), 100)
    assert table.quote("a", prompt_tokens=1_000) == Quote(D(100), D(9), 100)
    assert table.quote("a", prompt_tokens=10, shape=RequestShape(unbounded=True)) == Quote(D(100), D(9), 100)
    assert table.quote("b", prompt_tokens=10, shape=RequestShape(unbounded=True)) is None
    assert table.quote("b:online", prompt_tokens=0) == Quote(D(50), D(3), 7)
    assert table.quote("a:online", prompt_tokens=0) is None
    assert table.quote("a", "c", prompt_tokens=10) is None
    assert table.quote(prompt_tokens=10) is None


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_of_nothing_is_not_known(length: int) -> None:
    """Where the list says that a context or a completion has no tokens, a prompt costs what its own length says."""
    listed_model = {
        "id": "a",
        "context_length": length,
        "top_provider": {"context_length": length, "max_completion_tokens": length},
        "pricing": {"prompt": "1", "completion": "9"},
    }
    book = PriceBook(PricePolicy())
    book.update(decode_models(json.dumps({"data": [listed_model]}).encode()), at_s=0)
    assert book.table.quote("a", prompt_tokens=10) == Quote(D(10), D(9), None)


# --- the last good table ----------------------------------------------------------------------------------------------


def listed(count: int, price: str = "0.1", *, start: int = 0) -> list[Model]:
    pricing = {"prompt": price, "completion": price}
    data = [{"id": f"a/m{n}", "pricing": pricing} for n in range(start, start + count)]
    return decode_models(json.dumps({"data": data}).encode())


def price_in(book: PriceBook, model: str = "a/m0") -> Decimal | None:
    found = book.table.price(model)
    return None if found is None else found.prompt


def test_a_new_list() -> None:
    """Replaces the old one, says what has changed, and leaves old snapshots as they were."""
    book = PriceBook(PricePolicy())
    assert book.update(listed(60), at_s=1) == PricesRefreshed(at_s=1, models=60, added=60)
    before = book.table
    event = book.update([*listed(30, "0.2"), *listed(40, start=30)], at_s=2)
    assert event == PricesRefreshed(at_s=2, models=70, added=10, changed=30)
    assert (price_in(book), book.table.at_s) == (D("0.2"), 2)
    found = before.price("a/m0")
    assert found is not None
    assert found.prompt == D("0.1")


@pytest.mark.parametrize(
    ("models", "failure"),
    [
        ([], "broken"),
        (listed(100, "NaN"), "broken"),
        (listed(100, "-0.5"), "broken"),
        (listed(100, "Infinity"), "broken"),
        (listed(100, "150000"), "broken"),
        (listed(49), "shrunken"),
        (listed(99), "shrunken"),
        ([*listed(40, "0.3"), *listed(160, "NaN", start=40)], "shrunken"),
    ],
    ids=["empty", "NaN", "negative", "infinite", "absurd", "below 50", "below half", "mostly NaN"],
)
def test_a_list_that_is_not_believed(models: list[Model], failure: str) -> None:
    """Broken and shrunken lists leave the table as it was, and are counted."""
    book = PriceBook(PricePolicy())
    book.update(listed(200), at_s=1)
    before = book.table
    event = book.update(models, at_s=2)
    assert isinstance(event, PriceRefreshFailed)
    assert (event.failure, event.kept_models, event.kept_at_s, event.in_a_row) == (failure, 200, 1, 1)
    assert book.table is before
    statistics = book.statistics()
    assert (statistics.failed, statistics.failed_in_a_row, statistics.last_failure) == (1, 1, event)
    book.update(listed(200), at_s=3)
    assert (book.statistics().failed, book.statistics().failed_in_a_row) == (1, 0)


def test_a_bad_row_keeps_its_old_price() -> None:
    """One model with nonsense in a good list: it stays as it was, the others are new, and it is said."""
    book = PriceBook(PricePolicy())
    book.update(listed(100), at_s=1)
    event = book.update([*listed(1, "NaN"), *listed(99, "0.2", start=1), *listed(1, "-2", start=500)], at_s=2)
    assert isinstance(event, PricesRefreshed)
    assert event.refused == 2
    assert event.faults[0].startswith("a/m0: ")
    assert (price_in(book), price_in(book, "a/m1"), price_in(book, "a/m500")) == (D("0.1"), D("0.2"), None)


def test_a_router_has_no_price() -> None:
    """-1 is unknown and no nonsense; zero without `:free` is a price like others."""
    models = [Model("openrouter/auto", pricing=Pricing(prompt=D(-1), completion=D(-1))), *listed(1, "0")]
    book = PriceBook(PricePolicy())
    event = book.update(models, at_s=1)
    assert isinstance(event, PricesRefreshed)
    assert (event.models, event.refused, price_in(book, "openrouter/auto"), price_in(book)) == (1, 0, None, 0)


def test_a_small_first_list_is_believed() -> None:
    """A list of one model is fine where nothing else was known, as with a private server."""
    book = PriceBook(PricePolicy())
    book.update(listed(1), at_s=1)
    book.update(listed(1, "0.2"), at_s=2)
    assert price_in(book) == D("0.2")


def test_own_prices_survive_a_refresh() -> None:
    """Prices that the user gave, at the start or later, win over every list."""
    book = PriceBook(PricePolicy(own={"a/m0": {"prompt": "7", "completion": 8.25}}))
    assert price_in(book) == 7
    book.update(listed(60), at_s=1)
    assert (price_in(book), price_in(book, "a/m1")) == (7, D("0.1"))
    book.set_own({"a/m1": Pricing(prompt=D(5), completion=D(5))})
    assert (price_in(book), price_in(book, "a/m1")) == (D("0.1"), 5)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"x": 3}, "prices.own['x']: must be a Pricing or a mapping, not a int"),
        ({"x": {"prompt": "1"}}, "prices.own['x']: no price for the prompt or the completion"),
        ({"x": {"prompt": "-3", "completion": "1"}}, "prices.own['x']: prompt is -3"),
        ({"x": {"prompt": "NaN", "completion": "1"}}, "prices.own['x']: prompt is NaN"),
        ({"x": {"prompt": "1", "completions": "1"}}, "prices.own['x']: there is no price called 'completions'"),
        ({"x": {"prompt": "one", "completion": "1"}}, "prices.own['x']: Invalid decimal string"),
        ({"x": {"prompt": "1", "completion": "1", "discount": 2}}, "prices.own['x']: discount is 2"),
    ],
)
def test_bad_own_prices(own: dict[str, object], says: str) -> None:
    """One error that names the model and the fault."""
    with pytest.raises(ConfigError) as caught:
        PricePolicy(own=own)  # type: ignore[arg-type]  # on purpose
    assert str(caught.value).startswith(says)
