"""Rows of the ledger: what one attempt at a request cost, as far as is known. A stored format: it may only grow."""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from msgspec import Struct

__all__ = ["LedgerRow", "LedgerState", "Purpose"]

LedgerState = Literal["settled", "estimated", "unknown", "reconciling", "reconciled", "unreconciled"]
"""How a row came to its cost.

`settled`: the reply said it, or it is certain that nothing was charged. `estimated`: tokens are known, the cost is that
of the price list. `unknown`: neither is known. `reconciling`: the answer was lost or cut short, and the API is being
asked what it charged. `reconciled`: it said. `unreconciled`: it did not, or there is no id to ask for.
"""

Purpose = Literal["chat", "tool_round", "reask", "other"]
"""Why the request was made: for the user's message, with results of tools, to have an answer mended, something else."""


class LedgerRow(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One attempt at a request.

    `run` and `row` name it: a row that changes its state is written again under the same name, and the last one counts.
    `call` is the same for all attempts at a request, `attempt` counts them from 1. `at_s` is when it ended, in seconds
    since the epoch. `cost_usd` was charged for certain, `estimate_usd` is what the price list says; both are None when
    unknown. `upstream_usd` is what the provider charges apart, to a key of the user's own.
    """

    run: str
    row: int
    at_s: float
    state: LedgerState
    call: int = 0
    attempt: int = 1
    purpose: Purpose = "chat"
    cost_usd: Decimal | None = None
    estimate_usd: Decimal | None = None
    upstream_usd: Decimal | None = None
    generation_id: str | None = None
    model: str = ""
    requested_model: str = ""
    tenant: str = ""
    session: str = ""
    batch: str = ""
    lane: str = ""
    key_name: str = ""
    status: int = 0
    error: str = ""
    streamed: bool = False
    cancelled: bool = False
    maybe_billed: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    tries: int = 0
    """How often the API was asked what it charged."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the prompt and the completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def is_final(self) -> bool:
        """Whether the row will not change any more."""
        return self.state != "reconciling"
