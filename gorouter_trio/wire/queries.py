"""Paths of the service endpoints with their queries (openrouter API, "Models, pricing, endpoints"). Pure."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import TypedDict, TypeGuard
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from ..errors import BadRequestError

__all__ = ["ModelFilters", "generation_path", "model_path", "next_page_query", "page_path"]

_MAX_PAGE = 1_000
# A whole number may be too long for a float.
_MAX_NUMBER = sys.float_info.max
_SEGMENT = re.compile(r"[^\s/?#%\\\ud800-\udfff]+")
_HALVES = re.compile(r"[\ud800-\udfff]")
_LISTS = frozenset({"supported_parameters", "output_modalities", "input_modalities", "model_authors", "providers"})
_TEXTS = frozenset({"category", "sort", "q", "arch", "region"})
_SWITCHES = frozenset({"distillable", "zdr"})


class ModelFilters(TypedDict, total=False):
    """Which models, and in which order. Prices are in USD per million tokens; lists admit what fits one of their words.

    `output_modalities` is "text" where it is not given, and "all" for everything. `sort` is most-popular, newest,
    top-weekly, pricing-low-to-high, pricing-high-to-low, context-high-to-low, throughput-high-to-low,
    latency-low-to-high, intelligence-high-to-low, coding-high-to-low, agentic-high-to-low or
    design-arena-elo-high-to-low. `q` searches names and slugs, `context` is the least context length in tokens,
    `region` is "eu" or "us". Success rates of tools are 0 to 1. Names that the API learns later go through `extra`.
    """

    category: str
    supported_parameters: str | Sequence[str]
    output_modalities: str | Sequence[str]
    input_modalities: str | Sequence[str]
    sort: str
    q: str
    context: int
    min_price: float
    max_price: float
    min_output_price: float
    max_output_price: float
    arch: str
    model_authors: str | Sequence[str]
    providers: str | Sequence[str]
    distillable: bool
    zdr: bool
    region: str
    min_age_days: int
    max_age_days: int
    min_intelligence_index: float
    max_intelligence_index: float
    min_coding_index: float
    max_coding_index: float
    min_agentic_index: float
    max_agentic_index: float
    min_tool_success_rate: float
    max_tool_success_rate: float
    extra: Mapping[str, str]


_NAMES = frozenset(ModelFilters.__annotations__)


def page_path(path: str, filters: Mapping[str, object], *, offset: int = 0, limit: int | None = None) -> str:
    """`path` with a query for `filters`, from row `offset` on, at most `limit` rows a page where that is given.

    Raises `BadRequestError` for a value of the wrong kind, and `TypeError` for an unknown name, as a call does.
    """
    query: dict[str, str] = {}
    for name, value in filters.items():
        if name not in _NAMES:
            raise TypeError(f"there is no filter {name!r}; use extra for one that is newer than this package")
        if name == "extra":
            query.update(_texts(name, value))
        else:
            query[name] = _value(name, value)
    if offset:
        query["offset"] = _count("offset", offset, least=0)
    if limit is not None:
        query["limit"] = str(min(int(_count("limit", limit, least=1)), _MAX_PAGE))
    return f"{path}?{urlencode(query, quote_via=quote)}" if query else path


def next_page_query(path: str, following: str) -> str:
    """The path of the page after that of `path`, by the URL that its reply gave.

    Only the query of that URL counts, over that of `path`: it is no reason to ask another host.
    """
    base, _, query = path.partition("?")
    merged = dict(parse_qsl(query)) | dict(parse_qsl(urlsplit(following).query))
    return f"{base}?{urlencode(merged, quote_via=quote)}" if merged else base


def model_path(before: str, model: object, *, after: str = "") -> str:
    """The path of something about a model; raises `BadRequestError` when its id is not of the form author/slug."""
    parts = model.split("/") if isinstance(model, str) else []
    if len(parts) != 2 or not all(_SEGMENT.fullmatch(part) and part not in {".", ".."} for part in parts):
        raise BadRequestError(f"model: must be an id of the form author/slug, not {model!r:.200}", status=400)
    return before + quote("/".join(parts), safe="/:~@") + after


def generation_path(generation_id: object) -> str:
    """The path of a generation; raises `BadRequestError` when the id is no text."""
    if not _is_text(generation_id):
        raise BadRequestError(f"generation_id: must be the id of a generation, not {generation_id!r:.200}", status=400)
    return "/generation?" + urlencode({"id": generation_id}, quote_via=quote)


def _value(name: str, value: object) -> str:
    if name in _LISTS and not isinstance(value, (str, bytes)) and isinstance(value, Sequence):
        return ",".join([_text(name, word) for word in value])
    if name in _LISTS or name in _TEXTS:
        return _text(name, value)
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise _refuse(name, "true or false", value)
        return "true" if value else "false"
    if name == "context" or name.endswith("_days"):
        return _count(name, value, least=0)
    return _number(name, value)


def _texts(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise _refuse(name, "a mapping of names and texts", value)
    return {_text(name, key): _text(name, text) for key, text in value.items()}


def _text(name: str, value: object) -> str:
    if not _is_text(value):
        raise _refuse(name, "a text", value)
    return value


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it can stand in a query, and says something: half a surrogate pair has no UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and _HALVES.search(value) is None


def _count(name: str, value: object, *, least: int) -> str:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _refuse(name, f"a whole number of at least {least}", value)
    return str(value)


def _number(name: str, value: object) -> str:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MAX_NUMBER:
        raise _refuse(name, "a number", value)
    return f"{value:.12g}"


def _refuse(name: str, rule: str, value: object) -> BadRequestError:
    return BadRequestError(f"{name}: must be {rule}, not {value!r:.200}", status=400)
