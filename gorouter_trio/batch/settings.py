"""What a job is told: its files, and what bounds it."""

from __future__ import annotations

import os
from decimal import Decimal, InvalidOperation
from typing import Literal, cast, get_args

import msgspec
from msgspec import Struct

from ..errors import (
    AuthenticationError,
    BudgetExceededError,
    ConfigError,
    GorouterError,
    InsufficientCreditsError,
)

__all__ = ["BatchJob", "InputFormat", "StopReason", "stop_reason"]

InputFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet"]
"""How rows are written; `auto` goes by the name, and is JSON Lines where that says nothing."""

StopReason = Literal["interrupted", "budget", "credits", "key", "deadline", "failures"]
"""Why a job took no more rows: somebody said so, its budget or the account's credits do not cover another, the key is
refused, its time is over, or too many rows have failed."""


class BatchJob(Struct, frozen=True, kw_only=True):
    """What to run. `source` and `output` are paths, or open descriptors, which have no journal.

    `input_format`, `template` (a text, see `batch.template`) and `duplicates` say how rows become requests. At most
    `max_in_flight` run at a time, and `limit` bounds the rows that are taken. With `ordered`, lines come in the order
    of the input, and no row is run that is more than `window` behind the first without an answer.

    `if_exists` says what becomes of an output that is there: "fail", "resume", which goes on with it, or "overwrite".
    `retry_failed` goes on with it and runs the rows again that have failed. `journal` is the path of the journal, by
    default that of the output with ".journal"; False keeps none, and such a job cannot go on after a kill.

    `budget_usd` bounds what all runs of the job together may cost, as the `Budget.batch_usd` of the client does; it may
    be a float or a text, and is kept as a Decimal. `deadline_s` are the seconds after which this run takes
    no more rows, `max_failures` the rows that may fail in it.

    `via` is how rows are sent: "live", each as a chat; "api", by the API's own Batch API, at half the price and within
    a day, for rows without tools that are run here; "auto", by the Batch API where the deadline leaves it a day and
    there is a price to be halved.

    `dedup` asks equal requests once, as far as the last 10,000 answers go. `cache` is the path of a file of answers,
    for this job and others: what is in it is not asked again. Both are for requests that may well have one answer.

    Paths are kept as texts. Raises `ConfigError` for a setting that cannot be, with its name.
    """

    source: str | int | os.PathLike[str]
    output: str | int | os.PathLike[str]
    input_format: InputFormat = "auto"
    template: str | None = None
    duplicates: Literal["refuse", "suffix"] = "refuse"
    max_in_flight: int = 256
    limit: int | None = None
    ordered: bool = False
    window: int = 4096
    if_exists: Literal["fail", "resume", "overwrite"] = "fail"
    retry_failed: bool = False
    journal: str | bool | os.PathLike[str] = True
    budget_usd: Decimal | float | str | None = None
    deadline_s: float | None = None
    max_failures: int | None = None
    via: Literal["live", "api", "auto"] = "live"
    dedup: bool = False
    cache: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "window", "limit", "max_failures"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: must be a whole number of at least 1, not {value!r}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name in ("ordered", "retry_failed", "dedup"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be True or False, not {getattr(self, name)!r}")
        if self.template is not None and not isinstance(self.template, str):
            raise ConfigError(f"template: must be a text, not a {type(self.template).__name__}")
        for name, others in _PATHS.items():
            msgspec.structs.force_setattr(self, name, _checked_path(name, getattr(self, name), others))
        if self.budget_usd is not None:
            msgspec.structs.force_setattr(self, "budget_usd", _checked_usd("budget_usd", self.budget_usd))
        if self.deadline_s is not None:
            _check_above_0("deadline_s", self.deadline_s)

    @property
    def source_path(self) -> str | int:
        """`source` as it is kept."""
        return cast("str | int", self.source)

    @property
    def output_path(self) -> str | int:
        """`output` as it is kept."""
        return cast("str | int", self.output)

    @property
    def cache_path(self) -> str | None:
        """`cache` as it is kept."""
        return cast("str | None", self.cache)

    @property
    def most_usd(self) -> Decimal | None:
        """`budget_usd` as it is kept."""
        return cast("Decimal | None", self.budget_usd)

    def settings(self) -> dict[str, object]:
        """What has to be the same for a job to go on."""
        return {"template": self.template, "duplicates": self.duplicates}


# Sums and products of amounts must stay within what a Decimal holds.
_MOST_USD = Decimal("1e100")
_CHOICES: dict[str, tuple[str, ...]] = {
    "input_format": get_args(InputFormat),
    "duplicates": ("refuse", "suffix"),
    "if_exists": ("fail", "resume", "overwrite"),
    "via": ("live", "api", "auto"),
}
# Which settings are paths, and what they may be besides.
_PATHS: dict[str, tuple[type, ...]] = {"source": (int,), "output": (int,), "journal": (bool,), "cache": (type(None),)}


def _checked_path(name: str, value: object, others: tuple[type, ...]) -> object:
    if isinstance(value, others) and isinstance(value, bool) == (bool in others):
        return value
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise ConfigError(f"{name}: must be a path, not {value!r}")
    if not path:
        raise ConfigError(f"{name}: is empty")
    return path


def _checked_usd(name: str, value: object) -> Decimal:
    """An amount as it was written: a float stands for its shortest decimal form."""
    try:
        usd = Decimal(str(value).strip())
    except InvalidOperation:
        usd = Decimal("NaN")
    if isinstance(value, bool) or not (usd.is_finite() and 0 < usd <= _MOST_USD):
        raise ConfigError(f"{name}: must be an amount in USD above 0, such as Decimal('1.50'), not {value!r}")
    return usd


def _check_above_0(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(f"{name}: must be a number of seconds above 0, not {value!r}")


def stop_reason(error: GorouterError) -> StopReason | None:
    """Why a request that was refused without a charge means that all others would be."""
    if error.maybe_billed or error.partial is not None:
        return None
    match error:
        case BudgetExceededError():
            return "budget"
        case InsufficientCreditsError():
            return "credits"
        case AuthenticationError():
            return "key"
        case _:
            return None
