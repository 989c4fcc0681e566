"""What the simulated account was charged, per generation, in integer nano-dollars.

It is the other side of a client's own bookkeeping and shares no code with it. A charge is entered once, when a
generation has ended; the totals are exact for ever, single generations can be looked up until newer ones push
them out.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from msgspec import Raw, Struct

from ._json import encode, raw_dollars
from .catalog import SimulatedModel
from .model import FinishReason

__all__ = [
    "Charge",
    "Ledger",
    "generation_body",
]

_MAX_KEYS = 4_096


class Charge(Struct, frozen=True, kw_only=True, gc=False):
    """One ended generation and what it cost."""

    generation_id: str
    model: SimulatedModel
    created: int
    streamed: bool
    cancelled: bool
    finish_reason: FinishReason | None
    native_finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    nanousd: int
    latency_s: float
    """From the request to the head of the reply."""
    duration_s: float
    """From the request to the end of the generation."""
    ended_at_s: float
    """On the trio clock."""
    key: str


@final
class Ledger:
    """The account's charges. *size* generations can be looked up."""

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._charges: OrderedDict[str, Charge] = OrderedDict()
        self._by_key: OrderedDict[str, int] = OrderedDict()
        self.total_nanousd = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def __repr__(self) -> str:
        return f"<Ledger {len(self._charges)} generations, {self.total_nanousd} nano-dollars>"

    def enter(self, charge: Charge) -> None:
        """Enter an ended generation; one that cost nothing can be looked up too."""
        self.total_nanousd += charge.nanousd
        if charge.nanousd or not charge.cancelled:
            self.prompt_tokens += charge.prompt_tokens
            self.completion_tokens += charge.completion_tokens
        self._by_key[charge.key] = self._by_key.pop(charge.key, 0) + charge.nanousd
        if len(self._by_key) > _MAX_KEYS:
            self._by_key.popitem(last=False)
        self._charges[charge.generation_id] = charge
        if len(self._charges) > self._size:
            self._charges.popitem(last=False)

    def count(self, prompt_tokens: int, completion_tokens: int, *, nanousd: int) -> None:
        """Add what a recorded reply cost to the totals; it can not be looked up."""
        self.total_nanousd += nanousd
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def find(self, generation_id: str) -> Charge | None:
        """The charge of a generation, or None when it is unknown, unfinished or forgotten."""
        return self._charges.get(generation_id)

    def used_by(self, key: str) -> int:
        """What requests with this key cost, in nano-dollars."""
        return self._by_key.get(key, 0)

    def charges(self) -> list[Charge]:
        """The charges that can be looked up, oldest first."""
        return list(self._charges.values())


def generation_body(charge: Charge, *, created_at: str) -> bytes:
    """The reply of `/generation`; *created_at* is an ISO 8601 time."""
    latency_ms = round(charge.latency_s * 1_000)
    cost = raw_dollars(charge.nanousd)
    data: dict[str, object] = {
        "created_at": created_at,
        "model": charge.model.served_as,
        "app_id": None,
        "external_user": None,
        "streamed": charge.streamed,
        "cancelled": charge.cancelled,
        "latency": latency_ms,
        "moderation_latency": None,
        "generation_time": round(charge.duration_s * 1_000),
        "tokens_prompt": charge.prompt_tokens,
        "tokens_completion": charge.completion_tokens,
        "native_tokens_prompt": charge.prompt_tokens,
        "native_tokens_completion": charge.completion_tokens,
        "native_tokens_completion_images": 0,
        "native_tokens_reasoning": charge.reasoning_tokens,
        "native_tokens_cached": 0,
        "num_media_prompt": None,
        "num_input_audio_prompt": None,
        "num_media_completion": 0,
        "num_search_results": None,
        "num_fetches": None,
        "web_search_engine": None,
        "origin": "",
        "is_byok": False,
        "finish_reason": charge.finish_reason,
        "native_finish_reason": charge.native_finish_reason,
        "service_tier": None,
        "usage": cost,
        "router": None,
        "user_agent": None,
        "http_referer": None,
    }
    data |= _provider_side(charge, latency_ms, cost)
    return encode({"data": data})


def _provider_side(charge: Charge, latency_ms: int, cost: Raw) -> dict[str, object]:
    response = {
        "endpoint_id": "00000000-0000-4000-8000-000000000002",
        "id": f"chatcmpl-{charge.generation_id[-20:]}",
        "is_byok": False,
        "latency": latency_ms,
        "model_permaslug": charge.model.served_as,
        "provider_name": charge.model.provider,
        "status": 200,
    }
    return {
        "request_id": f"req-{charge.generation_id[4:]}",
        "session_id": None,
        "preset_id": None,
        "api_type": "embeddings" if charge.model.outputs == ("embeddings",) else "completions",
        "id": charge.generation_id,
        "upstream_id": response["id"],
        "provider_responses": [response],
        "total_cost": cost,
        "cache_discount": None,
        "upstream_inference_cost": 0,
        "provider_name": charge.model.provider,
        "response_cache_source_id": None,
        "data_region": "global",
        "workspace_id": "00000000-0000-4000-8000-000000000001",
    }
