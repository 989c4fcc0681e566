"""What a job is told: its files, and what bounds it."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

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

    `budget_usd` bounds what all runs of the job together may cost, `deadline_s` the seconds after which this run takes
    no more rows, `max_failures` the rows that may fail in it.

    `via` is how rows are sent: "live", each as a chat; "api", by the API's own Batch API, at half the price and within
    a day, for rows without tools that are run here; "auto", by the Batch API where the deadline leaves it a day and
    there is a price to be halved.

    `dedup` asks equal requests once, as far as the last 10,000 answers go. `cache` is the path of a file of answers,
    for this job and others: what is in it is not asked again. Both are for requests that may well have one answer.
    """

    source: str | int
    output: str | int
    input_format: InputFormat = "auto"
    template: str | None = None
    duplicates: Literal["refuse", "suffix"] = "refuse"
    max_in_flight: int = 256
    limit: int | None = None
    ordered: bool = False
    window: int = 4096
    if_exists: Literal["fail", "resume", "overwrite"] = "fail"
    retry_failed: bool = False
    journal: str | bool = True
    budget_usd: Decimal | None = None
    deadline_s: float | None = None
    max_failures: int | None = None
    via: Literal["live", "api", "auto"] = "live"
    dedup: bool = False
    cache: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "window", "limit", "max_failures"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}: must be a whole number of at least 1, not {value!r}")
        if self.budget_usd is not None and not self.budget_usd > 0:
            raise ConfigError(f"budget_usd: must be above 0, not {self.budget_usd}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"deadline_s: must be above 0, not {self.deadline_s}")

    def settings(self) -> dict[str, object]:
        """What has to be the same for a job to go on."""
        return {"template": self.template, "duplicates": self.duplicates}


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
