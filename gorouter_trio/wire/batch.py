"""Lines of a batch's output as they are read back, and the objects of OpenRouter's Batch API (POST /batches)."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import msgspec
from msgspec import Struct

__all__ = [
    "DONE_STATES",
    "ApiBatch",
    "ApiBatchCounts",
    "ApiBatchError",
    "ApiBatchPage",
    "ApiBatchReply",
    "ApiBatchResult",
    "OutputLine",
]


class _Tokens(Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: Decimal | None = None


class _Answer(Struct, frozen=True):
    usage: _Tokens | None = None


class _Reply(Struct, frozen=True):
    status_code: int = 0
    body: _Answer | None = None


class _Failure(Struct, frozen=True):
    code: str = ""
    cost_usd: Decimal | None = None


class OutputLine(Struct, frozen=True):
    """What of a line a later run has to know: whose it is, and what it adds to the sums."""

    id: str
    custom_id: str | None = None
    response: _Reply | None = None
    error: _Failure | None = None
    maybe_billed: bool = False
    cached: bool = False


DONE_STATES: Final = frozenset(("completed", "failed", "expired", "cancelled"))
"""The states of a batch that do not change any more."""


class ApiBatchCounts(Struct, frozen=True):
    """How many requests of a batch there are, and how many have ended."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class ApiBatchReply(Struct, frozen=True):
    """The answer to one request: the status and the body that it would have had live."""

    status_code: int = 0
    request_id: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class ApiBatchError(Struct, frozen=True):
    """Why a request, or a batch, has no answer."""

    code: str | int | None = None
    message: str = ""


class ApiBatchResult(Struct, frozen=True):
    """What became of one request."""

    custom_id: str
    id: str = ""
    response: ApiBatchReply | None = None
    error: ApiBatchError | None = None


class ApiBatch(Struct, frozen=True):
    """A batch as the API tells of it; `results` stand in it when it is asked for by its id, and has ended."""

    id: str
    status: str = ""
    endpoint: str = ""
    model: str | None = None
    created_at: float | str | None = None
    expires_at: float | str | None = None
    request_counts: ApiBatchCounts = ApiBatchCounts()
    results: list[ApiBatchResult] | None = None
    error: ApiBatchError | None = None

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in DONE_STATES


class ApiBatchPage(Struct, frozen=True):
    """A page of the list of batches, newest first."""

    data: list[ApiBatch]
    has_more: bool = False
