"""An answer that was paid for is not lost because of one odd field."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.errors import BadRequestError, DecodeError, RateLimitError
from gorouter_trio.wire import codec
from gorouter_trio.wire.catalog import PricingOverride
from gorouter_trio.wire.responses import ReplyFunction, Usage
from gorouter_trio.wire.salvage import mend_text


def reply(message: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {
        "id": "gen-1",
        "choices": [{"message": {"content": "kept", **(message or {})}, "finish_reason": "stop"}],
        **top,
    }


def decoded(body: dict[str, Any]) -> Any:
    return codec.decode_completion(json.dumps(body).encode())


@pytest.mark.parametrize(
    "odd",
    [
        {"created": "yesterday"},
        {"created": 17.5},
        {"usage": []},
        {"usage": "none"},
        {"model": 4},
        {"provider": {"name": "x"}},
        {"service_tier": True},
        {"usage": {"cost": "free"}},
        {"usage": {"cost_details": 1}},
        {"id": 5},
        {"error": False},
        {"error": []},
        {"error": ""},
        {"error": 0},
    ],
    ids=json.dumps,
)
def test_an_odd_field_does_not_cost_the_answer(odd: dict[str, Any]) -> None:
    """The answer is there; what could not be read is left at its default."""
    result = decoded(reply(**odd))
    assert result.choices[0].message.content == "kept"
    assert result.choices[0].finish_reason == "stop"


def test_the_rest_of_an_odd_object_is_kept() -> None:
    """Within usage, too, only what is odd is left out; whole numbers written as floats are numbers."""
    result = decoded(reply(usage={"prompt_tokens": 21.0, "completion_tokens": "5", "total_tokens": 2.5, "cost": 0.1,
                                  "prompt_tokens_details": {"cached_tokens": 3, "audio_tokens": "x"}}))  # fmt: skip
    assert result.usage == msgspec.structs.replace(
        Usage(prompt_tokens=21, cost=Decimal("0.1")), prompt_tokens_details=result.usage.prompt_tokens_details
    )
    assert (result.usage.prompt_tokens_details.cached_tokens, result.usage.prompt_tokens_details.audio_tokens) == (
        3,
        None,
    )


def test_odd_parts_of_the_message() -> None:
    """Reasoning, refusal and annotations of another type are left out, and raw fields stay as they came."""
    result = decoded(reply({"reasoning": {"a": 1}, "refusal": [], "annotations": {"n": 1}}, created="x"))
    message = codec.to_message(result.choices[0].message)
    assert codec.encode_message(message) == b'{"role":"assistant","content":"kept","annotations":{"n": 1}}'


def test_arguments_that_are_json_already() -> None:
    """Arguments that came as an object are kept as its text, which is what they should have been."""
    call = {"id": "a", "function": {"name": "f", "arguments": {"x": [1, "é"]}}, "index": "0"}
    result = decoded(reply({"tool_calls": [call]}))
    (made,) = result.choices[0].message.tool_calls
    assert made.function == ReplyFunction("f", json.dumps(call["function"]["arguments"]))  # type: ignore[index]
    assert made.index is None


@pytest.mark.parametrize(
    "message",
    [
        {"content": {"text": "x"}},
        {"content": 5},
        {"content": True},
        {"tool_calls": {"id": "a"}},
        {"tool_calls": ["a"]},
        {"tool_calls": [{"id": "a", "function": "f"}]},
        {"tool_calls": [{"id": "a", "function": {"name": 5}}]},
    ],
    ids=json.dumps,
)
def test_what_the_answer_says_is_never_left_out(message: dict[str, Any]) -> None:
    """Content and calls that cannot be read make the reply unreadable: half an answer is none."""
    with pytest.raises(DecodeError) as refused:
        decoded(reply(message))
    assert refused.value.maybe_billed
    delta = {"choices": [{"delta": message}]}
    with pytest.raises(DecodeError):
        codec.decode_chunk(json.dumps(delta).encode())


@pytest.mark.parametrize(
    "top", [{"choices": {"a": 1}}, {"choices": "x"}, {"choices": [1]}, {"choices": [{"delta": []}]}]
)
def test_a_chunk_without_its_choices_is_no_chunk(top: dict[str, Any]) -> None:
    """Text must not vanish from a stream because its chunk was odd."""
    with pytest.raises(DecodeError):
        codec.decode_chunk(json.dumps(top).encode())


def test_odd_chunks() -> None:
    """Usage, ids and indices of another type do not end a stream."""
    chunk = codec.decode_chunk(
        b'{"id":7,"usage":[],"created":"x","choices":[{"delta":{"content":"kept","tool_calls":[{"index":1.0,"id":3}]}}]}'
    )
    delta = chunk.choices[0].delta  # type: ignore[index]
    assert delta is not None
    assert delta.content == "kept"
    assert [(call.index, call.id) for call in delta.tool_calls or []] == [(1, None)]


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        ("text", "text", 500),
        (["a"], '["a"]', 500),
        (3, "3", 500),
        (True, "true", 500),
        ({"message": {"a": 1}, "code": 400.0}, '{"a": 1}', 400),
        ({"message": None, "code": True}, "without a message", 500),
        ({"message": "m", "code": 400, "metadata": "odd"}, "m", 400),
        ({"code": [], "message": "m"}, "m", 500),
    ],
)
def test_errors_of_another_form(error: object, message: str, code: int) -> None:
    """An error is an error in whatever form it comes; in a 200, in a stream and beside a status."""
    for raised in (_raised(lambda: decoded({"error": error})), _raised(lambda: decoded(reply(error=error)))):
        assert message in raised.message
        assert raised.code == code
    chunk = codec.decode_chunk(json.dumps({"error": error}).encode())
    assert chunk.error is not None
    beside = codec.decode_error(429, [], body=json.dumps({"error": error}).encode(), now_s=0)
    assert isinstance(beside, RateLimitError)
    assert message in beside.message


def _raised(call: Any) -> Any:
    with pytest.raises(Exception) as raised:
        call()
    return raised.value


def test_an_error_beside_choices_that_cannot_be_read() -> None:
    """The error says more than the choices do."""
    with pytest.raises(BadRequestError, match="bad"):
        decoded({"error": {"code": 400, "message": "bad"}, "choices": "x"})


def test_rows_stand_for_themselves() -> None:
    """An odd field of a model costs that field, a row without an id that row."""
    rows = [
        {"id": "a/b", "context_length": "long", "pricing": {"prompt": "0.1", "image": "?"}},
        {"name": "no id"},
        5,
        {"id": "c/d"},
    ]
    models = codec.decode_models(json.dumps({"data": rows}).encode())
    assert [(m.id, m.context_length) for m in models] == [("a/b", None), ("c/d", None)]
    assert models[0].pricing is not None
    assert (models[0].pricing.prompt, models[0].pricing.image) == (Decimal("0.1"), None)
    key = codec.decode_key(b'{"data":{"limit":"x","usage":1.5,"label":3}}')
    assert (key.limit, key.usage, key.label) == (None, Decimal("1.5"), None)
    with pytest.raises(DecodeError):
        codec.decode_credits(b'{"data":{"total_credits":1}}')
    with pytest.raises(DecodeError):
        codec.decode_credits(b'{"data":{"total_credits":1,"total_usage":"x"}}')


def test_results_of_a_batch_stand_for_themselves() -> None:
    """One that cannot be read costs itself, and not the answers of the others, which were paid for."""
    results = [{"custom_id": "a", "response": {"status_code": 200, "body": {}}}, {"custom_id": None}, "odd"]
    batch = codec.decode_api_batch(json.dumps({"id": "b", "status": "completed", "results": results}).encode())
    assert [result.custom_id for result in batch.results or ()] == ["a"]


@pytest.mark.parametrize("body", ['{"has_more":false}', '{"data":null}', '{"data":[{"status":"completed"}]}', "{}"])
def test_a_list_of_batches_that_cannot_be_read(body: str) -> None:
    """It is no empty one: a batch that is not in the list is taken for one that never arrived, and is sent again."""
    with pytest.raises(DecodeError):
        codec.decode_api_batch_page(body.encode())
    with pytest.raises(RateLimitError):
        codec.decode_api_batch_page(b'{"error":{"code":429,"message":"slow down"}}')
    assert codec.decode_api_batch_page(b'{"data":[],"has_more":false}').data == []


def test_prices_that_are_no_numbers() -> None:
    """NaN and infinity, which may come as texts, are unknown prices; -1 is the API's own word for that and stays."""
    pricing = {"prompt": "NaN", "completion": "-1", "request": "Infinity", "image": "0"}
    (model,) = codec.decode_models(json.dumps({"data": [{"id": "a/b", "pricing": pricing}]}).encode())
    assert model.pricing is not None
    prices = (model.pricing.prompt, model.pricing.completion, model.pricing.request, model.pricing.image)
    assert prices == (None, Decimal(-1), None, Decimal(0))
    key = codec.decode_key(b'{"data":{"limit":"NaN","usage":"1.5"}}')
    assert (key.limit, key.usage) == (None, Decimal("1.5"))
    with pytest.raises(DecodeError, match="not numbers"):
        codec.decode_credits(b'{"data":{"total_credits":"NaN","total_usage":1}}')


# --- text that is none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (rb'"a\ud83d"', "a\ufffd"),
        (rb'"\ude80b"', "\ufffdb"),
        (rb'"\ud83d\ude80"', "\U0001f680"),
        (rb'"\uD83D\uD83D\uDE80"', "\ufffd\U0001f680"),
        (rb'"\\ud83d"', r"\ud83d"),
        (rb'"\\\ud83d\""', '\\\ufffd"'),
        (b'"\xff\xc3\xa9\xe2\x82"', "\ufffdé\ufffd"),
        (b'"\xed\xa0\xbd"', "\ufffd" * 3),
    ],
)
def test_broken_text_is_mended(raw: bytes, text: str) -> None:
    """Half a surrogate pair and broken UTF-8 cost one character, not the answer, whole or streamed."""
    body = b'{"choices":[{"message":{"content":%b}}]}' % raw
    assert codec.decode_completion(body).choices[0].message.content == text  # type: ignore[index, union-attr]
    chunk = codec.decode_chunk(b'{"choices":[{"delta":{"content":%b}}]}' % raw)
    assert chunk.choices[0].delta.content == text  # type: ignore[index, union-attr]


@given(text=st.text(alphabet=st.characters(exclude_categories=())), ascii_only=st.booleans())
def test_any_string_with_halves_of_pairs(text: str, ascii_only: bool) -> None:
    """Every string of UTF-16 units comes out as itself with U+FFFD for what is no character."""
    raw = json.dumps(text, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    body = b'{"choices":[{"message":{"content":%b}}]}' % raw
    content = codec.decode_completion(body).choices[0].message.content  # type: ignore[index, union-attr]
    if ascii_only:
        assert content == text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    else:
        assert content == json.loads(raw.decode("utf-8", "replace"))
    assert json.loads(codec.encode_json(content)) == content


def test_sound_text_is_not_touched() -> None:
    """What needs no mending is the same object, escapes and all."""
    for data in (b'{"a":"\\\\ud800 \\u00e9 \\ud83d\\ude80 \xc3\xa9"}', b"", b"no json \\"):
        assert mend_text(data) is data


def test_overrides_of_prices() -> None:
    """An override keeps its conditions or goes: without one of them it would hold when it should not."""
    overrides = [
        {"min_prompt_tokens": 200000.0, "prompt": "0.00000250", "completion": "x"},
        {"utc_start": "late", "prompt": "0.1"},
        {"utc_start": 2200, "utc_end": 400, "utc_days": ["monday"], "prompt": "NaN", "audio": "0.5"},
    ]
    pricing = {"prompt": "0.1", "discount": 0.25, "overrides": overrides}
    (model,) = codec.decode_models(json.dumps({"data": [{"id": "a/b", "pricing": pricing}]}).encode())
    assert model.pricing is not None
    assert model.pricing.discount == Decimal("0.25")
    assert model.pricing.overrides == [
        PricingOverride(min_prompt_tokens=200_000, prompt=Decimal("0.00000250")),
        PricingOverride(utc_start=2200, utc_end=400, utc_days=["monday"], audio=Decimal("0.5")),
    ]
