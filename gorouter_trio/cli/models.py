"""`gorouter-trio models`: what is on offer and at which prices, filtered and sorted."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from .failures import FAILED, OK, CliError, report
from .options import CommonOptions, open_chosen_client
from .terminal import print_json, printable, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..wire.catalog import Model

__all__ = ["ModelQuery", "ModelSort", "run_models"]

ModelSort = Literal["name", "price", "output-price", "context", "newest"]

_MILLION = Decimal(1_000_000)
_ENDLESS = Decimal("Infinity")


@dataclass(frozen=True, kw_only=True)
class ModelQuery:
    """Which models to list, and in which order. Prices are USD for a million tokens."""

    words: Sequence[str] = ()
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    parameters: Sequence[str] = ()
    max_price: str | None = None
    max_output_price: str | None = None
    min_context: int | None = None
    only_free: bool = False
    sort: ModelSort = "name"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise CliError(f"--limit: must be at least 1, not {self.limit}")
        self.ceilings()

    def ceilings(self) -> tuple[Decimal, Decimal]:
        """The highest prices of prompt and completion."""
        return _amount("--max-price", self.max_price), _amount("--max-output-price", self.max_output_price)

    def choose(self, models: Sequence[Model]) -> list[Model]:
        """The models that all filters admit, in order."""
        return sorted(filter(self._admits, models), key=_ORDERS[self.sort])[: self.limit]

    def _admits(self, model: Model) -> bool:
        architecture = model.architecture
        inputs = (architecture.input_modalities if architecture is not None else None) or ()
        outputs = (architecture.output_modalities if architecture is not None else None) or ()
        text = f"{model.id} {model.name or ''}".lower()
        highest, highest_output = self.ceilings()
        return (
            all(word.lower() in text for word in self.words)
            and set(self.inputs) <= set(inputs)
            and set(self.outputs) <= set(outputs)
            and set(self.parameters) <= set(model.supported_parameters or ())
            and (model.is_free or not self.only_free)
            and (self.min_context is None or (model.context_length or 0) >= self.min_context)
            and (self.max_price is None or _price(model, "prompt") <= highest)
            and (self.max_output_price is None or _price(model, "completion") <= highest_output)
        )


def _amount(option: str, text: str | None) -> Decimal:
    if text is None:
        return _ENDLESS
    try:
        amount = Decimal(text)
    except InvalidOperation:
        raise CliError(f"{option}: must be USD for a million tokens, not {text!r}") from None
    if not (amount.is_finite() and amount >= 0):
        raise CliError(f"{option}: must be zero or more, not {text}")
    return amount


def _price(model: Model, kind: Literal["prompt", "completion"]) -> Decimal:
    """USD for a million tokens; one that nobody knows is above every other."""
    price: Decimal | None = getattr(model.pricing, kind, None)
    return _ENDLESS if price is None or price < 0 else price * _MILLION


_ORDERS = {
    "name": lambda m: m.id,
    "price": lambda m: (_price(m, "prompt"), _price(m, "completion"), m.id),
    "output-price": lambda m: (_price(m, "completion"), _price(m, "prompt"), m.id),
    "context": lambda m: (-(m.context_length or 0), m.id),
    "newest": lambda m: (-(m.created or 0), m.id),
}


async def run_models(query: ModelQuery, common: CommonOptions) -> int:
    """Print the models that `query` finds; fails when there are none."""
    async with open_chosen_client(common, max_connections=1) as client:
        # The list has only models that write text, unless it is asked for all.
        models = await (client.models(output_modalities="all") if query.outputs else client.models())
    found = query.choose(models)
    if common.json:
        print_json(found)
    elif found:
        show(_table(found))
    if not found:
        is_search = query == ModelQuery(words=query.words, sort=query.sort, limit=query.limit)
        words = " ".join(query.words)
        report(f"no model has {words!r} in its name" if words and is_search else "there is no such model")
        return FAILED
    return OK


def _table(models: Sequence[Model]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("model", overflow="fold")
    for title in ("context", "in, $/M", "out, $/M"):
        table.add_column(title, justify="right", no_wrap=True)
    for model in models:
        context = "" if model.context_length is None else f"{model.context_length:,}"
        table.add_row(printable(model.id), context, _cell(model, "prompt"), _cell(model, "completion"))
    return table


def _cell(model: Model, kind: Literal["prompt", "completion"]) -> str:
    price = _price(model, kind)
    if not price.is_finite():
        return "varies"
    if model.is_free and not price:
        return "free"
    # All digits that there are, two at least: a rounded price is another price.
    places = max(2, -int(price.normalize().as_tuple().exponent))
    return f"{price:,.{places}f}"
