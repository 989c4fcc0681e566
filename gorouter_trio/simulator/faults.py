"""The failures that the simulator can inject, each in the form in which OpenRouter or its edge shows it.

A *refusal* is answered before anything is generated and never costs. Other faults befall a generation that has begun:
some are charged all the same, because the reply was made and lost on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from email.utils import formatdate
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec
from msgspec import Struct

from . import _json

if TYPE_CHECKING:
    from .limits import Refused

__all__ = [
    "FAULTS",
    "USER_ID",
    "ErrorReply",
    "Fault",
    "FaultContext",
    "FaultKind",
    "Maker",
    "bad_request",
    "context_length",
    "credits_spent",
    "error_body",
    "in_flight_full",
    "limited",
    "plain",
    "schema_refused",
    "with_retry_after",
]

FaultKind = Literal[
    "400_context",
    "400_provider",
    "401",
    "402_credits",
    "402_in_flight",
    "403_key_limit",
    "403_moderation",
    "404_no_endpoints",
    "408",
    "429_admission",
    "429_free_daily",
    "429_upstream",
    "500",
    "502",
    "502_html",
    "503",
    "504",
    "524_html",
    "529",
    "error_in_200",
    "whitespace_200",
    "mid_stream_error",
    "stream_cut",
    "connection_cut",
    "hang",
    "stall",
    "mid_stream_stall",
]
"""The names of the faults. A number is the HTTP status; the others:

* `error_in_200`: a 200 with nothing but an error; in a stream, as its first and only event.
* `whitespace_200`: a 200 that ends after its padding, in a stream after its comments. Charged: the answer was made.
* `mid_stream_error`: a part of the reply, then an error with finish reason `error`. Not charged.
* `stream_cut`: the connection is closed in the middle of the reply. Charged for what was sent; a whole reply in full.
* `connection_cut`: the connection is closed without an answer, after the generation. Charged.
* `hang`: nothing is ever sent. Like the stalls, it ends and is charged when the client gives up.
* `stall`: a 200, and then keep-alives (comments in a stream, padding in a whole reply) for ever.
* `mid_stream_stall`: a part of the stream before the keep-alives; a whole reply has none.
"""

USER_ID: Final = "user_2sim0000000000000000000000"
_CREDITS_URL: Final = "https://openrouter.ai/settings/credits"
_DAY_MS: Final = 86_400_000
_HIGH_BALANCE_REQUESTS: Final = 1_000


class FaultContext(Struct, frozen=True, kw_only=True):
    """What the texts of an error are about."""

    model: str
    provider: str
    prompt: str
    prompt_tokens: int
    max_tokens: int
    affordable_tokens: int
    context_length: int
    now_s: float
    retry_after_s: int | None = None


class ErrorReply(Struct, frozen=True):
    """An error answered with a status of its own."""

    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


Maker: TypeAlias = Callable[[FaultContext], ErrorReply]


class Fault(Struct, frozen=True):
    """How a fault behaves: `reply` is None for those that are no status of their own."""

    reply: Maker | None
    is_refusal: bool = False
    is_charged: bool = False


def error_body(message: str, code: int, *, metadata: Mapping[str, object] | None = None, user: bool = True) -> bytes:
    """An error as the API writes it: message, code, metadata, and the account's `user_id` beside it."""
    error: dict[str, object] = {"message": message, "code": code}
    if metadata is not None:
        error["metadata"] = metadata
    return _json.encode({"error": error, "user_id": USER_ID} if user else {"error": error})


def bad_request(message: str, *, error_type: str | None = None) -> ErrorReply:
    """A 400 for the form of a request."""
    return ErrorReply(400, error_body(message, 400, metadata={"error_type": error_type} if error_type else None))


def plain(status: int, message: str) -> ErrorReply:
    """An error with a message only, as it comes before a request belongs to an account."""
    return ErrorReply(status, error_body(message, status, user=False))


def context_length(context: FaultContext) -> ErrorReply:
    """A 400 for a prompt that does not fit."""
    total = context.prompt_tokens + context.max_tokens
    message = (
        f"This endpoint's maximum context length is {context.context_length} tokens. However, you requested about "
        f"{total} tokens ({context.prompt_tokens} of text input, {context.max_tokens} in the output)."
    )
    return bad_request(message, error_type="context_length_exceeded")


def credits_spent(context: FaultContext) -> ErrorReply:
    """A 402 that says how many tokens the rest of the credits would pay for."""
    message = (
        "This request requires more credits, or fewer max_tokens. You requested up to "
        f"{context.max_tokens} tokens, but can only afford {context.affordable_tokens}. To increase, visit "
        f"{_CREDITS_URL} and add more credits"
    )
    hint = f"Add credits at {_CREDITS_URL}, or lower max_tokens / prompt size to fit your remaining balance."
    metadata = {"limit_source": "openrouter_credits", "remedy_hint": hint, "provider_name": None}
    return ErrorReply(402, error_body(message, 402, metadata=metadata))


def in_flight_full(context: FaultContext) -> ErrorReply:
    """A 402 for a request that the credits would pay for, were it not for those in flight."""
    wait = str(120 if context.retry_after_s is None else context.retry_after_s)
    message = (
        "This request would exceed your available credits given your current in-flight requests. "
        "Retry after in-flight requests settle, or add credits."
    )
    hint = (
        "Retry after your in-flight requests settle (see the Retry-After header). Adding credits at "
        f"{_CREDITS_URL} raises your in-flight budget, up to a capped ceiling."
    )
    metadata = {
        "reason": "in_flight_budget_exhausted",
        "limit_source": "openrouter_in_flight_budget",
        "remedy_hint": hint,
        "headers": {"Retry-After": wait},
    }
    return ErrorReply(402, error_body(message, 402, metadata=metadata), (("Retry-After", wait),))


def _provider_400(context: FaultContext) -> ErrorReply:
    raw = _json.encode({"error": {"message": "unsupported value in the request", "type": "invalid_request_error"}})
    return _provider_error(context, 400, raw.decode("utf-8"))


def _provider_error(context: FaultContext, status: int, raw: str, **more: object) -> ErrorReply:
    metadata = {
        "raw": raw,
        "provider_name": context.provider,
        "is_byok": False,
        "provider_error_code": str(status),
        **more,
    }
    return ErrorReply(status, error_body("Provider returned error", status, metadata=metadata))


def schema_refused(context: FaultContext, *, name: str, fault: str) -> ErrorReply:
    """A provider's 400 for a schema that its strict mode does not take."""
    message = f"Invalid schema for response_format '{name}': {fault}"
    raw = {"error": {"message": message, "type": "invalid_request_error", "param": "response_format", "code": None}}
    return _provider_error(context, 400, _json.encode(raw).decode("utf-8"))


def _unknown_key(_context: FaultContext) -> ErrorReply:
    return plain(401, "User not found.")


def _key_limit(_context: FaultContext) -> ErrorReply:
    metadata = {
        "limit_source": "openrouter_key_limit",
        "scope": "key",
        "remedy_hint": "Raise the limit of this key, or wait for its reset.",
    }
    return ErrorReply(403, error_body("Key limit exceeded (weekly limit).", 403, metadata=metadata))


def _moderation(context: FaultContext) -> ErrorReply:
    message = (
        f'{context.model} requires moderation on {context.provider}. Your input was flagged for "violence". '
        "No credits were charged."
    )
    text = context.prompt
    metadata = {
        "reasons": ["violence"],
        "flagged_input": text if len(text) <= 100 else f"{text[:48]}...{text[-49:]}",
        "provider_name": context.provider,
        "model_slug": context.model,
    }
    return ErrorReply(403, error_body(message, 403, metadata=metadata))


def _no_endpoints(context: FaultContext) -> ErrorReply:
    return ErrorReply(404, error_body(f"No endpoints found for {context.model}.", 404))


def _timed_out(_context: FaultContext) -> ErrorReply:
    return ErrorReply(408, error_body("Request timed out", 408))


def _admission(context: FaultContext) -> ErrorReply:
    wait = str(10 if context.retry_after_s is None else context.retry_after_s)
    metadata = {
        "limit_source": "openrouter_admission_control",
        "remedy_hint": "Retry after the time in the Retry-After header.",
        "headers": {"Retry-After": wait},
    }
    message = "OpenRouter could not verify available credits for this request in time. Retry shortly."
    return ErrorReply(429, error_body(message, 429, metadata=metadata), (("Retry-After", wait),))


def limited(refused: Refused, context: FaultContext) -> ErrorReply:
    """A 429 for a request beyond a rate limit, in the form of whoever set it."""
    limit = refused.limit
    wait_s = max(1, math.ceil(refused.wait_s)) if context.retry_after_s is None else context.retry_after_s
    if limit.source == "upstream":
        return _upstream_429(msgspec.structs.replace(context, retry_after_s=wait_s))
    headers = {
        "X-RateLimit-Limit": str(limit.amount),
        "X-RateLimit-Remaining": str(refused.remaining),
        "X-RateLimit-Reset": str(refused.reset_ms),
    }
    if limit.source == "free_tier":
        return _free_tier(headers, is_daily=limit.kind == "fixed")
    headers["Retry-After"] = str(wait_s)
    metadata = {"error_type": "rate_limit_exceeded", "headers": headers}
    return ErrorReply(429, error_body("Rate limit exceeded", 429, metadata=metadata), tuple(headers.items()))


def with_retry_after(error: ErrorReply, form: Literal["date", "ms"], *, now_s: float) -> ErrorReply:
    """The same error with its Retry-After as an HTTP date, or as a `retry-after-ms`."""
    headers = tuple([_reworded(name, value, form=form, now_s=now_s) for name, value in error.headers])
    return msgspec.structs.replace(error, headers=headers)


def _reworded(name: str, value: str, *, form: Literal["date", "ms"], now_s: float) -> tuple[str, str]:
    if name != "Retry-After":
        return name, value
    if form == "ms":
        return "retry-after-ms", str(int(value) * 1_000)
    return name, formatdate(math.ceil(now_s) + int(value), usegmt=True)


def _free_tier(headers: Mapping[str, str], *, is_daily: bool) -> ErrorReply:
    name = "free-models-per-min"
    if is_daily and int(headers["X-RateLimit-Limit"]) >= _HIGH_BALANCE_REQUESTS:
        name = "free-models-per-day-high-balance"
    elif is_daily:
        name = "free-models-per-day. Add 10 credits to unlock 1000 free model requests per day"
    metadata = {"headers": headers, "limit_source": "openrouter_free_tier_daily"}
    body = error_body(f"Rate limit exceeded: {name}", 429, metadata=metadata)
    return ErrorReply(429, body, tuple(headers.items()))


def _free_daily(context: FaultContext) -> ErrorReply:
    midnight_ms = (int(context.now_s * 1_000) // _DAY_MS + 1) * _DAY_MS
    headers = {"X-RateLimit-Limit": "50", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(midnight_ms)}
    return _free_tier(headers, is_daily=True)


def _upstream_429(context: FaultContext) -> ErrorReply:
    wait = 1 if context.retry_after_s is None else context.retry_after_s
    settings = "https://openrouter.ai/settings/integrations"
    raw = (
        f"{context.model} is temporarily rate-limited upstream. Please retry shortly, or add your own key to "
        f"accumulate your rate limits: {settings}"
    )
    hint = (
        f"Retry shortly, add your own provider key ({settings}), or route to another provider with provider "
        "routing: https://openrouter.ai/docs/features/provider-routing"
    )
    made = _provider_error(
        context,
        429,
        raw,
        limit_source="upstream_provider_shared_pool",
        remedy_hint=hint,
        retry_after_seconds=wait,
        headers={"Retry-After": str(wait)},
    )
    return ErrorReply(429, made.body, (("Retry-After", str(wait)),))


def _server_error(_context: FaultContext) -> ErrorReply:
    return ErrorReply(500, error_body("Internal Server Error", 500))


def _bad_gateway(context: FaultContext) -> ErrorReply:
    raw = '{"error":{"message":"upstream connect error","type":"server_error"}}'
    other = "DeepInfra" if context.provider != "DeepInfra" else "Together"
    previous = {"code": 502, "message": "Provider returned error", "provider_name": other, "raw": "bad gateway"}
    return _provider_error(context, 502, raw, previous_errors=[previous])


def _unavailable(context: FaultContext) -> ErrorReply:
    message = "No provider is available that meets your routing requirements right now."
    headers = () if context.retry_after_s is None else (("Retry-After", str(context.retry_after_s)),)
    return ErrorReply(503, error_body(message, 503, metadata={"error_type": "provider_overloaded"}), headers)


def _upstream_timeout(_context: FaultContext) -> ErrorReply:
    return ErrorReply(504, error_body("The operation was aborted", 504))


def _overloaded(context: FaultContext) -> ErrorReply:
    return _provider_error(context, 529, "Overloaded")


def _edge_page(status: int, text: str) -> Maker:
    page = (
        f"<!DOCTYPE html>\n<html>\n<head><title>openrouter.ai | {status}: {text}</title></head>\n"
        f"<body><h1>{text}</h1><p>Error code {status}</p></body>\n</html>\n"
    ).encode("ascii")
    return lambda _context: ErrorReply(status, page, content_type="text/html; charset=UTF-8")


FAULTS: Final[dict[FaultKind, Fault]] = {
    "400_context": Fault(context_length, is_refusal=True),
    "400_provider": Fault(_provider_400, is_refusal=True),
    "401": Fault(_unknown_key, is_refusal=True),
    "402_credits": Fault(credits_spent, is_refusal=True),
    "402_in_flight": Fault(in_flight_full, is_refusal=True),
    "403_key_limit": Fault(_key_limit, is_refusal=True),
    "403_moderation": Fault(_moderation, is_refusal=True),
    "404_no_endpoints": Fault(_no_endpoints, is_refusal=True),
    "408": Fault(_timed_out, is_refusal=True),
    "429_admission": Fault(_admission, is_refusal=True),
    "429_free_daily": Fault(_free_daily, is_refusal=True),
    "429_upstream": Fault(_upstream_429, is_refusal=True),
    "500": Fault(_server_error),
    "502": Fault(_bad_gateway),
    "502_html": Fault(_edge_page(502, "Bad gateway")),
    "503": Fault(_unavailable, is_refusal=True),
    "504": Fault(_upstream_timeout),
    "524_html": Fault(_edge_page(524, "A timeout occurred"), is_charged=True),
    "529": Fault(_overloaded, is_refusal=True),
    "error_in_200": Fault(None),
    "whitespace_200": Fault(None, is_charged=True),
    "mid_stream_error": Fault(None),
    "stream_cut": Fault(None, is_charged=True),
    "connection_cut": Fault(None, is_charged=True),
    "hang": Fault(None, is_charged=True),
    "stall": Fault(None, is_charged=True),
    "mid_stream_stall": Fault(None, is_charged=True),
}
"""Every fault by its name. Never changed after import."""
