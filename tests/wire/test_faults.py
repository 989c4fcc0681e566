"""Errors of the wire: their class by status and code, the wait that was asked for, one bounded line of text."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.errors import (
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
from gorouter_trio.wire.codec import decode_completion, decode_error
from gorouter_trio.wire.faults import api_error, body_summary, find_header, parse_retry_after, status_of
from gorouter_trio.wire.responses import ErrorBody

NOW_S = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT


def error(status: int, body: object = b"", **headers: str) -> ApiError:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return decode_error(status, raw, body=body if isinstance(body, bytes) else json.dumps(body).encode(), now_s=NOW_S)


def in_200(code: object, **metadata: object) -> ApiError:
    with pytest.raises(ApiError) as raised:
        decode_completion(json.dumps({"error": {"message": "m", "code": code, "metadata": metadata or None}}).encode())
    return raised.value


# --- classes ----------------------------------------------------------------------------------------------------------

CLASSES: dict[int, type[ApiError]] = {
    400: BadRequestError, 401: AuthenticationError, 402: InsufficientCreditsError, 403: PermissionDeniedError,
    404: NotFoundError, 405: BadRequestError, 408: ProviderError, 409: ProviderError, 410: BadRequestError,
    412: BadRequestError, 413: BadRequestError, 422: BadRequestError, 425: ProviderError, 429: RateLimitError,
    451: BadRequestError, 499: BadRequestError, 500: ProviderError, 501: ProviderError, 502: ProviderError,
    503: OverloadedError, 504: ProviderError, 524: ProviderError, 529: OverloadedError, 302: ProviderError,
}  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), CLASSES.items())
def test_class_by_status(status: int, kind: type[ApiError]) -> None:
    """The HTTP status decides, whatever the body says; inside a 200 the error's own code, a number or its digits."""
    assert type(error(status)) is kind
    outside = error(status, {"error": {"message": "m", "code": 400}})
    assert (type(outside), outside.status, outside.code) == (kind, status, 400)
    for code in (status, str(status), float(status)):
        inside = in_200(code)
        assert (type(inside), inside.status) == (kind, 200)
        assert inside.code == code


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("rate_limit_exceeded", RateLimitError),
        ("server_error", ProviderError),
        ("invalid_prompt", BadRequestError),
        ("provider_overloaded", OverloadedError),
        ("payment_required", InsufficientCreditsError),
        ("timeout", ProviderError),
        ("authentication", AuthenticationError),
        ("something_new", ProviderError),
        ("", ProviderError),
        (None, ProviderError),
        (0, ProviderError),
        (-1, ProviderError),
        (10**30, ProviderError),
        ("٤٠٤", ProviderError),
        ("4040", ProviderError),
    ],
)
def test_class_by_name(code: int | str | None, kind: type[ApiError]) -> None:
    """Names that stand for statuses are known; what is not known is a failure of the provider."""
    assert type(in_200(code)) is kind


def test_class_by_error_type() -> None:
    """`metadata.error_type` decides where the code says nothing."""
    assert type(in_200(None, error_type="rate_limit_exceeded")) is RateLimitError
    assert type(in_200("new", error_type="context_length_exceeded")) is BadRequestError
    assert type(in_200(None, error_type=["odd"])) is ProviderError
    assert type(in_200(400, error_type="rate_limit_exceeded")) is BadRequestError
    assert status_of("provider_overloaded", {}) == 503
    assert status_of(None, {"error_type": "timeout"}) == 504


ERROR_TYPES = {
    400: [
        "context_length_exceeded", "max_tokens_exceeded", "token_limit_exceeded", "string_too_long", "invalid_request",
        "invalid_prompt", "invalid_image", "image_too_large", "image_too_small", "unsupported_image_format",
        "image_download_failed", "invalid_request_error",
    ],
    401: ["authentication", "authentication_error"],
    402: ["payment_required", "billing_error"],
    403: ["permission_denied", "content_policy_violation", "refusal", "permission_error"],
    404: ["not_found", "image_not_found", "not_found_error"],
    412: ["precondition_failed"],
    413: ["payload_too_large"],
    422: ["unprocessable"],
    429: ["rate_limit_exceeded", "rate_limit_error"],
    500: ["server", "unmapped", "server_error", "api_error"],
    502: ["provider_unavailable"],
    503: ["provider_overloaded"],
    504: ["timeout", "timeout_error"],
    529: ["overloaded_error"],
}  # fmt: skip


@pytest.mark.parametrize(("status", "names"), ERROR_TYPES.items())
def test_every_error_type_has_its_class(status: int, names: list[str]) -> None:
    """The names of the API's errors, and of the APIs that it speaks beside its own, as code and as type."""
    for name in names:
        assert status_of(name, {}) == status_of(None, {"error_type": name}) == status, name
        assert type(in_200(name)) is CLASSES[status]
        assert type(in_200(None, error_type=name)) is CLASSES[status]


def test_errors_in_the_form_of_messages() -> None:
    """The error of /messages: its type is kept, and its request id is the generation when no header names it."""
    inner = {"type": "rate_limit_error", "message": "slow down", "error_type": "rate_limit_exceeded"}
    body = {"type": "error", "error": inner, "request_id": "gen-1-abc"}
    made = error(429, body)
    assert (type(made), made.message, made.generation_id) == (RateLimitError, "slow down", "gen-1-abc")
    assert made.metadata == {"error_type": "rate_limit_exceeded", "request_id": "gen-1-abc"}
    assert error(429, body, X_Generation_Id="gen-2").generation_id == "gen-2"
    assert error(429, {**body, "request_id": None}).generation_id is None
    assert error(429, {**body, "request_id": "req-7"}).generation_id is None
    del inner["error_type"]
    with pytest.raises(RateLimitError) as caught:
        decode_completion(json.dumps(body).encode())
    assert caught.value.metadata["error_type"] == "rate_limit_error"


def test_errors_in_the_form_of_responses() -> None:
    """The error of /responses has a name for its code, and the type of it beside it."""
    body = {
        "id": "resp_1",
        "status": "failed",
        "error": {"code": "image_content_policy_violation", "message": "no"},
        "error_type": "content_policy_violation",
    }
    with pytest.raises(PermissionDeniedError) as caught:
        decode_completion(json.dumps(body).encode())
    assert (caught.value.code, caught.value.metadata) == (
        "image_content_policy_violation", {"error_type": "content_policy_violation"},
    )  # fmt: skip


ISSUES = [
    {"code": "invalid_type", "path": ["limit"], "message": "Expected number, received string"},
    {"code": "custom", "path": ["a", 0], "message": "no"},
    {"code": "custom", "path": [], "message": "nothing to do"},
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ISSUES), "limit: Expected number, received string; a.0: no; nothing to do"),
        (json.dumps(ISSUES, indent=2), "limit: Expected number, received string; a.0: no; nothing to do"),
        ("[]", "[]"),
        ("plain words", "plain words"),
        ("[5]", "[5]"),
        ("", "the API reported an error without a message"),
    ],
)
def test_refused_queries(text: str, message: str) -> None:
    """What a validator says in JSON is said in a line."""
    made = error(400, {"success": False, "error": {"name": "ZodError", "message": text}})
    assert (type(made), made.code, made.message) == (BadRequestError, 400, message)


def test_what_stands_beside_an_error() -> None:
    """Availability and routing are kept in the metadata; the wait in the former counts when no other is given."""
    availability = {"code": "no_endpoints", "retryable": True, "retry_after": 7, "fallback_models": ["a/b"]}
    routing = {"requested": "a/b", "attempt": 2}
    body = {
        "error": {"code": 503, "message": "m", "availability": availability, "metadata": {"a": 1}},
        "user_id": "user_1",
        "openrouter_metadata": routing,
    }
    made = error(503, body)
    assert made.metadata == {"availability": availability, "openrouter_metadata": routing, "a": 1}
    assert made.retry_after_s == 7
    assert error(503, body, Retry_After="2").retry_after_s == 2
    body["error"] = "only words"
    assert error(503, body).message == "only words"


def test_moderation() -> None:
    """A 403 with reasons is a moderation, one without is not."""
    body = {"error": {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"], "flagged_input": "x"}}}
    assert type(error(403, body)) is ModerationError
    assert error(403, body).metadata["reasons"] == ["violence"]
    assert type(error(403, {"error": {"message": "limit", "code": 403}})) is PermissionDeniedError
    assert type(in_200(403, reasons=["x"])) is ModerationError


def test_fields() -> None:
    """Status, code, message, metadata and generation id arrive as they came."""
    made = error(
        502, {"error": {"message": "m", "code": "server_error", "metadata": {"a": [1]}}}, X_Generation_Id="gen-9"
    )
    assert (made.status, made.code, made.message, made.metadata, made.generation_id) == (
        502, "server_error", "m", {"a": [1]}, "gen-9",
    )  # fmt: skip
    assert error(500, {"error": {"message": "m"}}).code == 500
    assert error(500, {"error": None}).message != ""


# --- the line of text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "a\nb\x1b[31mc\x00 d\u2028e\u202ef"}}, "a b [31mc d e f"),
        ({"error": {"message": "x" * 10_000}}, "x" * 500),
        ({"error": {"message": ""}}, "the API reported an error without a message"),
        ({"error": {"message": " \n "}}, "the API reported an error without a message"),
        ({"error": "just text"}, "just text"),
        ({"success": False, "error": {"name": "ZodError", "message": "bad query"}}, "bad query"),
        ({"type": "error", "error": {"type": "overloaded_error", "message": "later"}}, "later"),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": "upstream\r\nsaid no"}}},
            "Provider returned error: upstream said no",
        ),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": {"error": {"message": "deep"}}}}},
            "Provider returned error: deep",
        ),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": {"error": "flat"}}}},
            "Provider returned error: flat",
        ),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": [1]}}}, "Provider returned error"),
        ({"error": {"message": "Provider returned error", "metadata": {"raw": ""}}}, "Provider returned error"),
        (b"<html><head><TITLE lang=en> 502:\n Bad gateway </TITLE></head><body>...</body></html>", "502: Bad gateway"),
        (b"<html><body><h1>No title</h1> here</body></html>", "No title here"),
        (b"plain words", "plain words"),
        (b"", "the reply has no body"),
        (b"\xff\xfe\x00", "\ufffd\ufffd"),
        ([1, 2], "[1, 2]"),
        (b"null", "null"),
        (b"x" * 10_000, "x" * 300),
    ],
)
def test_messages_are_one_bounded_line(body: Any, message: str) -> None:
    """A message is one printable line of bounded length, from whatever the body is."""
    assert error(500, body).message == message


@given(text=st.text(max_size=300), status=st.integers(300, 599))
def test_any_message_is_one_line(text: str, status: int) -> None:
    """Any text becomes one printable line."""
    for made in (error(status, {"error": {"message": text}}), error(status, text.encode("utf-8", "replace"))):
        assert made.message
        assert made.message.isprintable()
        assert len(made.message) <= 500


@pytest.mark.parametrize("body", [b"<" * 10**6, b"<title" * 10**5, b"<a" * 10**6, b" " * 10**7, b"\x00" * 10**7])
def test_long_bodies_are_summed_up_quickly(body: bytes) -> None:
    """No body makes the summary slow: only its beginning is looked at, and never twice."""
    started = time.process_time()
    body_summary(body)
    api_error(ErrorBody(message=body.decode()), status=500)
    assert time.process_time() - started < 0.5


def test_the_text_of_an_error() -> None:
    """str() shows message, status and code; nothing of the metadata, which may quote the prompt."""
    text = str(error(403, {"error": {"message": "m", "code": 403, "metadata": {"flagged_input": "secret prompt"}}}))
    assert text == "m (status 403, code 403)"


# --- how long to wait -------------------------------------------------------------------------------------------------

WAITS: list[tuple[str, float | None]] = [
    ("0", 0.0),
    ("1", 1.0),
    ("120", 120.0),
    (" 7 ", 7.0),
    ("1.5", 1.5),
    ("0.001", 0.001),
    ("3.", 3.0),
    ("+4", 4.0),
    ("-0", 0.0),
    ("-10", 0.0),
    ("-1100", 0.0),
    ("86400000", 86_400_000.0),
    ("9" * 18, 999_999_999_999_999.9 // 1 + 1),
    ("1" + "0" * 34, 1e15),
    ("9" * 400, 1e15),
    ("inf", None),
    ("-inf", None),
    ("nan", None),
    ("1e5", None),
    ("1e308", None),
    ("0x10", None),
    ("1,5", None),
    ("1_000", None),
    ("٣", None),
    ("", None),
    (" ", None),
    ("soon", None),
    ("12 s", None),
    ("1;2", None),
    ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
    ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
    ("Sun Nov  6 08:50:37 1994", 60.0),
    ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
    ("Sun, 06 Nov 1994 08:49:36 GMT", 0.0),
    ("Tue, 01 Jan 1980 00:00:00 GMT", 0.0),
    ("Sun, 06 Nov 1994 09:49:37 +0100", 0.0),
    ("Sun, 06 Nov 1994 08:49:60 GMT", 22.0),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 252_618_189_022.0),
    ("Mon, 99 Nov 1994 08:49:37 GMT", None),
    ("Mon, 06 Nov 1994 99:99:99 GMT", None),
    ("Mon, 06 Foo 1994 08:49:37 GMT", None),
    ("08:49:37", None),
    ("1994-11-06T08:50:37Z", None),
    ("Sun, 06 Nov 99999999999999999999 08:49:37 GMT", None),
    ("Sun, 06 Nov 1994 08:50:37 GMT" + " " * 100 + "x", None),
]


@pytest.mark.parametrize(("value", "wait_s"), WAITS, ids=[repr(value[:40]) for value, _ in WAITS])
def test_retry_after(value: str, wait_s: float | None) -> None:
    """Seconds, fractions and the three date forms are understood, anything else is no wait at all."""
    assert parse_retry_after(value, now_s=NOW_S) == wait_s
    if value.isascii():
        assert error(429, Retry_After=value).retry_after_s == wait_s
    assert (
        error(503, {"error": {"message": "m", "metadata": {"headers": {"Retry-After": value}}}}).retry_after_s == wait_s
    )


def test_dates_are_gmt_wherever_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of asctime names no zone; it is GMT all the same."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert parse_retry_after("Sun Nov  6 08:50:37 1994", now_s=NOW_S) == 60.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_without_a_clock_a_date_says_nothing() -> None:
    """Inside a 200 there is no clock: seconds count, dates do not."""
    assert parse_retry_after("Sun, 06 Nov 1994 08:50:37 GMT", now_s=None) is None
    assert parse_retry_after("7", now_s=None) == 7.0
    assert in_200(429, headers={"Retry-After": "7"}).retry_after_s == 7.0
    assert in_200(429, retry_after_seconds=2.5).retry_after_s == 2.5


@given(
    value=st.text(max_size=60)
    | st.from_regex(r"[A-Z][a-z]{2},? ?\d{1,3}[ -][A-Z][a-z]{2}[ -]\d{1,6} \d{1,3}:\d\d:\d\d.{0,6}")
)
def test_any_retry_after(value: str) -> None:
    """Whatever the header says, the wait is a finite number of seconds from 0, or none."""
    wait_s = parse_retry_after(value, now_s=NOW_S)
    assert wait_s is None or (math.isfinite(wait_s) and wait_s >= 0)


@pytest.mark.parametrize(
    ("metadata", "wait_s"),
    [
        ({"retry_after_seconds": 3}, 3.0),
        ({"retry_after_seconds": 0.25}, 0.25),
        ({"retry_after_seconds": "4"}, 4.0),
        ({"retry_after_seconds_raw": "5.5"}, 5.5),
        ({"retry_after": 6}, 6.0),
        ({"headers": {"retry-after": "7"}}, 7.0),
        ({"headers": {"Retry-After": 8}}, 8.0),
        ({"retry_after_seconds": -3}, 0.0),
        ({"retry_after_seconds": 10**400}, 1e15),
        ({"retry_after_seconds": True}, None),
        ({"retry_after_seconds": None, "retry_after": "9"}, 9.0),
        ({"retry_after_seconds": [1]}, None),
        ({"headers": "x"}, None),
        ({"headers": [["Retry-After", "1"]]}, None),
        ({}, None),
        ({"retry_after_seconds": "soon", "headers": {"Retry-After": "2"}}, 2.0),
    ],
)
def test_waits_in_the_metadata(metadata: dict[str, Any], wait_s: float | None) -> None:
    """Every place in the metadata that can name a wait is looked at, numbers and texts alike."""
    body = {"error": {"message": "m", "code": 429, "metadata": metadata}}
    assert api_error(ErrorBody("m", 429, metadata), status=200).retry_after_s == wait_s
    if metadata.get("retry_after_seconds") != 10**400:
        assert error(429, body).retry_after_s == wait_s
    assert error(429, body, Retry_After="30").retry_after_s == 30.0


def test_the_first_header_that_says_something_counts() -> None:
    """Two Retry-After headers: the first that can be read; names are matched in any case."""
    headers = [(b"retry-after", b"soon"), (b"RETRY-AFTER", b"5"), (b"Retry-After", b"9")]
    assert decode_error(503, headers, body=b"", now_s=NOW_S).retry_after_s == 5.0
    assert find_header(headers, b"retry-after") == "soon"
    assert find_header([], b"x") is None


@pytest.mark.parametrize(
    ("reset", "wait_s"),
    [
        (str(int((NOW_S + 90) * 1000)), 90.0),
        (str(int((NOW_S - 90) * 1000)), 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("1" * 30, None),
    ],
)
def test_reset_in_milliseconds(reset: str, wait_s: float | None) -> None:
    """X-RateLimit-Reset is epoch milliseconds, as a header and within the metadata, and counts for a 429 alone."""
    assert error(429, X_RateLimit_Reset=reset).retry_after_s == wait_s
    quoted = {"error": {"message": "m", "metadata": {"headers": {"X-RateLimit-Reset": reset}}}}
    assert error(429, quoted).retry_after_s == wait_s
    assert error(500, X_RateLimit_Reset=reset).retry_after_s is None
    assert error(429, X_RateLimit_Reset=reset, Retry_After="1").retry_after_s == 1.0
