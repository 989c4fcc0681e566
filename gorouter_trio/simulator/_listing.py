"""The model list as a query wants it: filtered, sorted, and cut into pages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Final
from urllib.parse import quote, urlencode

from msgspec import Struct

from ._json import encode
from .catalog import SimulatedModel
from .faults import ErrorReply
from .forms import provider_slug, supported_parameters

__all__ = ["Listing", "keeps_nothing", "read_listing"]

_MAX_PAGE: Final = 1_000
_DAY_S: Final = 86_400
_SORTS: Final[dict[str, Callable[[SimulatedModel], int]]] = {
    "most-popular": lambda _model: 0,
    "top-weekly": lambda _model: 0,
    "newest": lambda model: -model.created,
    "pricing-low-to-high": lambda model: model.prompt_nanousd + model.completion_nanousd,
    "pricing-high-to-low": lambda model: -model.prompt_nanousd - model.completion_nanousd,
    "context-high-to-low": lambda model: -model.context_length,
    "throughput-high-to-low": lambda model: _drawn(model, "throughput"),
    "latency-low-to-high": lambda model: _drawn(model, "latency"),
    "intelligence-high-to-low": lambda model: -_index(model, "intelligence"),
    "coding-high-to-low": lambda model: -_index(model, "coding"),
    "agentic-high-to-low": lambda model: -_index(model, "agentic"),
    "design-arena-elo-high-to-low": lambda model: -_index(model, "elo"),
}


class Listing(Struct, frozen=True):
    """A page, and how many models there are on all pages."""

    page: Sequence[SimulatedModel]
    total: int
    next_query: str | None = None
    """The query of the page after it."""


def read_listing(
    query: Sequence[tuple[str, str]],
    catalog: Sequence[SimulatedModel],
    *,
    now_s: float,
    default_output: str = "text",
) -> Listing | ErrorReply:
    """What a query lists; names that are not known are passed over, as the API does."""
    fields = dict(query)
    try:
        wanted = {name: _READERS[name](name, value) for name, value in fields.items() if name in _READERS}
        offset = _whole("offset", fields.get("offset", "0"))
        limit = _whole("limit", fields["limit"]) if "limit" in fields else _MAX_PAGE
        order = _SORTS[_one_of("sort", fields["sort"], _SORTS)] if "sort" in fields else None
        if not 1 <= limit <= _MAX_PAGE:
            raise _QueryError("limit", f"Number must be 1 to {_MAX_PAGE}")
    except _QueryError as exc:
        return exc.reply()
    wanted.setdefault("output_modalities", _words("", default_output))
    found = [
        model
        for model in catalog
        if all(_is_met(model, name, value=value, now_s=now_s) for name, value in wanted.items())
    ]
    if order is not None:
        found.sort(key=order)
    page = found[offset : offset + limit]
    end = offset + len(page)
    following = {**fields, "offset": str(end), "limit": str(limit)} if end < len(found) else None
    return Listing(page, len(found), None if following is None else urlencode(following, quote_via=quote))


def keeps_nothing(model: SimulatedModel) -> bool:
    """Whether its provider retains no data."""
    return _drawn(model, model.provider) % 2 == 0


class _QueryError(Exception):
    """A query that is not well-formed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name
        self.reason = reason

    def reply(self) -> ErrorReply:
        """The 400 that the API answers, in the form of its validator."""
        issue = {"code": "custom", "path": [self.name], "message": self.reason}
        issues = encode([issue]).decode("utf-8")
        return ErrorReply(400, encode({"success": False, "error": {"name": "ZodError", "message": issues}}))


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise _QueryError(name, "Expected a whole number")
    return int(text)


def _number(name: str, text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite():
        raise _QueryError(name, "Expected a number")
    return value


def _words(_name: str, text: str) -> frozenset[str]:
    return frozenset([word.strip().lower() for word in text.split(",")])


def _text(_name: str, text: str) -> str:
    return text.lower()


def _one_of(name: str, text: str, known: Mapping[str, object] | Sequence[str]) -> str:
    if text not in known:
        raise _QueryError(name, f"Invalid enum value. Expected {' | '.join(known)}")
    return text


def _switch(name: str, text: str) -> str:
    return _one_of(name, text, ("true", "false"))


def _region(name: str, text: str) -> str:
    return _one_of(name, text, ("eu", "us"))


_BOUNDS: Final = ("price", "output_price", "age_days", "intelligence_index", "coding_index", "agentic_index")
_READERS: Final[dict[str, Callable[[str, str], object]]] = {
    "category": _text,
    "supported_parameters": _words,
    "output_modalities": _words,
    "input_modalities": _words,
    "q": _text,
    "context": _whole,
    "arch": _text,
    "model_authors": _words,
    "providers": _words,
    "distillable": _switch,
    "zdr": _switch,
    "region": _region,
    **{f"{end}_{name}": _number for name in (*_BOUNDS, "tool_success_rate") for end in ("min", "max")},
}


def _is_met(model: SimulatedModel, name: str, value: object, now_s: float) -> bool:
    """Whether a model is what a filter wants."""
    if isinstance(value, Decimal):
        measured = _measure(model, name[4:], now_s=now_s)
        return measured >= value if name.startswith("min_") else measured <= value
    if isinstance(value, int):
        return model.context_length >= value
    if isinstance(value, frozenset):
        return _has_words(model, name, words=value)
    match name:
        case "category":
            return _drawn(model, str(value)) % 3 == 0
        case "q":
            return str(value) in f"{model.id} {model.name}".lower()
        case "arch":
            return model.tokenizer.lower() == value
        case "distillable":
            return (model.hugging_face_id is not None) == (value == "true")
        case "zdr":
            return keeps_nothing(model) or value == "false"
        case _:
            return _drawn(model, str(value)) % 2 == 0


def _has_words(model: SimulatedModel, name: str, *, words: frozenset[str]) -> bool:
    match name:
        case "supported_parameters":
            return words <= set(supported_parameters(model))
        case "output_modalities":
            return "all" in words or not words.isdisjoint(model.outputs)
        case "input_modalities":
            return not words.isdisjoint(model.inputs)
        case "model_authors":
            return model.author in words
        case _:
            return model.provider.lower() in words or provider_slug(model.provider) in words


def _measure(model: SimulatedModel, name: str, *, now_s: float) -> Decimal:
    match name:
        case "price":
            return Decimal(model.prompt_nanousd) / 1_000
        case "output_price":
            return Decimal(model.completion_nanousd) / 1_000
        case "age_days":
            return Decimal(int(now_s) - model.created) / _DAY_S
        case "tool_success_rate":
            return Decimal(900 + _drawn(model, name) % 100) / 1_000
        case _:
            return Decimal(_index(model, name.removesuffix("_index")))


def _index(model: SimulatedModel, name: str) -> int:
    """A mark of 10 to 69 that says nothing about the real model."""
    return 10 + _drawn(model, name) % 60


def _drawn(model: SimulatedModel, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{name}\n{model.id}".encode(), digest_size=4).digest(), "big")
