"""Errors as they stand on the wire, turned into the tree of `errors` (openrouter API, "Errors").

One decoder for every place an error can stand in: an HTTP error status, a 200 whose body is an
error or only padding, a choice, a stream. Bodies may be HTML or empty, codes ints or strings.
"""

from __future__ import annotations

import datetime
import email.utils
import math
import re
from typing import TYPE_CHECKING

from ..errors import (
    ApiError,
    AuthenticationError,
    BadRequestError,
    InsufficientCreditsError,
    ModerationError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .responses import ErrorBody

__all__ = ["api_error", "body_summary", "error_from_reply", "find_header", "parse_retry_after", "status_of"]

_MESSAGE_CHARS = 500
_BODY_CHARS = 300
# What is looked at of a longer text: the rest cannot matter, and may be megabytes.
_LOOK_AT_CHARS = 8192
# 30 million years: what an absurd number of seconds is cut to.
_MAX_WAIT_S = 1e15

_BY_STATUS: dict[int, type[ApiError]] = {
    401: AuthenticationError,
    402: InsufficientCreditsError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ProviderError,
    409: ProviderError,
    425: ProviderError,
    429: RateLimitError,
    503: OverloadedError,
    529: OverloadedError,
}

# Names that stand where a number should: `metadata.error_type` of this API, and the types and codes of the APIs that it
# speaks beside its own (/messages and /responses).
_STATUS_BY_NAME = {
    "api_error": 500,
    "authentication": 401,
    "authentication_error": 401,
    "billing_error": 402,
    "content_policy_violation": 403,
    "context_length_exceeded": 400,
    "image_content_policy_violation": 403,
    "image_download_failed": 400,
    "image_not_found": 404,
    "image_too_large": 400,
    "image_too_small": 400,
    "invalid_image": 400,
    "invalid_prompt": 400,
    "invalid_request": 400,
    "invalid_request_error": 400,
    "max_tokens_exceeded": 400,
    "not_found": 404,
    "not_found_error": 404,
    "overloaded_error": 529,
    "payload_too_large": 413,
    "payment_required": 402,
    "permission_denied": 403,
    "permission_error": 403,
    "precondition_failed": 412,
    "provider_overloaded": 503,
    "provider_unavailable": 502,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "refusal": 403,
    "server": 500,
    "server_error": 500,
    "string_too_long": 400,
    "timeout": 504,
    "timeout_error": 504,
    "token_limit_exceeded": 400,
    "unmapped": 500,
    "unprocessable": 422,
    "unsupported_image_format": 400,
}


def find_header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The first header called `name` (given in lower case), as text, or None."""
    for key, value in headers:
        if len(key) == len(name) and key.lower() == name:
            return value.decode("latin-1")
    return None


def parse_retry_after(value: str, *, now_s: float | None) -> float | None:
    """Seconds to wait by a Retry-After value, at least 0; None when it is not one (RFC 9110, 10.2.3).

    Takes delta seconds, also with a fraction, and the three HTTP date forms. `now_s` is wall-clock
    seconds since the epoch; without it a date says nothing.
    """
    value = value.strip()
    if re.fullmatch(r"[+-]?\d{1,400}(\.\d{0,9})?", value, re.ASCII):
        return min(max(0.0, float(value)), _MAX_WAIT_S)
    when_s = _parse_date(value)
    return None if when_s is None or now_s is None else max(0.0, when_s - now_s)


def _parse_date(value: str) -> float | None:
    """An HTTP date as seconds since the epoch."""
    if len(value) > 64 or not re.search(r"\d:\d\d:\d\d", value, re.ASCII):
        return None
    try:
        parsed = email.utils.parsedate_tz(value)
        if parsed is None:
            return None
        year, month, day, hour, minute, second = parsed[:6]
        at = datetime.datetime(year, month, day, hour, minute, min(second, 59), tzinfo=datetime.UTC)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    # HTTP dates are in GMT; the form of asctime does not say so.
    return at.timestamp() - (parsed[9] or 0)


def status_of(code: int | str | None, metadata: Mapping[str, object]) -> int:
    """The HTTP status that an error object inside a 200 stands for; 500 when it does not say."""
    if isinstance(code, int):
        return code
    if code is not None:
        if code.isascii() and code.isdigit() and len(code) == 3:
            return int(code)
        if code in _STATUS_BY_NAME:
            return _STATUS_BY_NAME[code]
    return _STATUS_BY_NAME.get(str(metadata.get("error_type")), 500)


def error_from_reply(
    status: int, headers: Sequence[tuple[bytes, bytes]], *, error: ErrorBody, now_s: float
) -> ApiError:
    """The error that an HTTP reply outside 2xx stands for, from its decoded error object."""
    return api_error(
        error,
        status=status,
        retry_after_s=_retry_after(status, headers, error.metadata or {}, now_s=now_s),
        generation_id=find_header(headers, b"x-generation-id") or _generation_in(error.metadata or {}),
    )


def _generation_in(metadata: Mapping[str, object]) -> str | None:
    """The generation's id where a body has it, in place of the header: the request id of /messages."""
    request_id = metadata.get("request_id")
    return request_id if isinstance(request_id, str) and request_id.startswith("gen-") else None


def api_error(
    error: ErrorBody,
    *,
    status: int,
    retry_after_s: float | None = None,
    generation_id: str | None = None,
) -> ApiError:
    """The exception for an error object; inside a 200 the object's own code decides the class."""
    metadata = _metadata_of(error)
    decisive = status if status >= 300 else status_of(error.code, metadata)
    kind = _BY_STATUS.get(decisive, BadRequestError if 400 <= decisive < 500 else ProviderError)
    if kind is PermissionDeniedError and "reasons" in metadata:
        kind = ModerationError
    return kind(
        _message(error, metadata),
        status=status,
        code=error.code if error.code is not None else decisive,
        metadata=metadata,
        retry_after_s=_metadata_retry_after(metadata, now_s=None) if retry_after_s is None else retry_after_s,
        generation_id=generation_id,
    )


def _metadata_of(error: ErrorBody) -> Mapping[str, object]:
    """The metadata, and in it what other forms of an error have beside them."""
    kind = error.error_type or error.type
    found: dict[str, object] = {}
    if kind is not None:
        found["error_type"] = kind
    if error.availability is not None:
        found["availability"] = error.availability
    return {**found, **(error.metadata or {})} if found else error.metadata or {}


def body_summary(body: bytes) -> str:
    """A line for a body that is no JSON error: the title of an HTML page, or its first characters."""
    text = body[:_LOOK_AT_CHARS].decode("utf-8", "replace")
    title = re.search(r"<title[^<>]*>([^<]*)", text, re.IGNORECASE)
    line = _one_line(title.group(1) if title else re.sub(r"<[^<>]*>", " ", text))
    return line[:_BODY_CHARS] if line else "the reply has no body"


def _message(error: ErrorBody, metadata: Mapping[str, object]) -> str:
    message = _one_line(error.message or "") or "the API reported an error without a message"
    if message == "Provider returned error":
        raw = metadata.get("raw")
        # A provider's error object, or its text.
        while isinstance(raw, dict):
            raw = raw.get("error") or raw.get("message")
        if isinstance(raw, str) and raw:
            message = f"{message}: {_one_line(raw)}"
    return message[:_MESSAGE_CHARS]


def _one_line(text: str) -> str:
    """`text` without control characters, so that a log line stays one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:_LOOK_AT_CHARS]).split())


def _retry_after(
    status: int, headers: Sequence[tuple[bytes, bytes]], metadata: Mapping[str, object], *, now_s: float
) -> float | None:
    asked = (value.decode("latin-1") for name, value in headers if name.lower() == b"retry-after")
    wait_s = _first_wait(asked, now_s=now_s)
    if wait_s is None:
        wait_s = _metadata_retry_after(metadata, now_s=now_s)
    if wait_s is None and status == 429:
        reset = find_header(headers, b"x-ratelimit-reset") or _metadata_header(metadata, "x-ratelimit-reset")
        wait_s = _until_reset(str(reset), now_s=now_s)
    return wait_s


def _metadata_retry_after(metadata: Mapping[str, object], *, now_s: float | None) -> float | None:
    names = ("retry_after_seconds", "retry_after_seconds_raw", "retry_after")
    asked = [metadata.get(name) for name in names]
    availability = metadata.get("availability")
    if isinstance(availability, dict):
        asked.append(availability.get("retry_after"))
    return _first_wait([*asked, _metadata_header(metadata, "retry-after")], now_s=now_s)


def _metadata_header(metadata: Mapping[str, object], name: str) -> object:
    """The header of a provider's reply that the metadata quote."""
    headers = metadata.get("headers")
    if not isinstance(headers, dict):
        return None
    return next((value for key, value in headers.items() if str(key).lower() == name), None)


def _first_wait(values: Iterable[object], *, now_s: float | None) -> float | None:
    """The first of the values that says how long to wait; numbers are seconds."""
    for value in values:
        if isinstance(value, str):
            wait_s = parse_retry_after(value, now_s=now_s)
            if wait_s is not None:
                return wait_s
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value > -math.inf:
            return float(min(max(0.0, value), _MAX_WAIT_S))
    return None


def _until_reset(value: str, *, now_s: float) -> float | None:
    """Seconds until an X-RateLimit-Reset, which is epoch milliseconds on this API."""
    value = value.strip()
    return max(0.0, int(value) / 1000 - now_s) if re.fullmatch(r"\d{1,16}", value, re.ASCII) else None
