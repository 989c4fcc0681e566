"""JSON in and out: absent, null and zero stay apart, money stays exact, bad input gives typed errors."""

from __future__ import annotations

import json
import math
import re
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from gorouter_trio.errors import ApiError, BadRequestError, DecodeError, GorouterError, ProviderError, RateLimitError
from gorouter_trio.wire import codec
from gorouter_trio.wire.journal import AnswerDiscarded, TurnAbandoned, TurnAnswered, TurnCalled, TurnStarted
from gorouter_trio.wire.mail import CallSettings
from gorouter_trio.wire.messages import (
    AssistantMessage,
    DeveloperMessage,
    FunctionCall,
    ImagePart,
    ImageSource,
    Message,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gorouter_trio.wire.preferences import MaxPrice, ProviderPreferences
from gorouter_trio.wire.requests import ChatKeywords, ChatOptions, ChatRequest
from gorouter_trio.wire.responses import (
    CompletionTokensDetails,
    CostDetails,
    PromptTokensDetails,
    ServerToolUse,
    Usage,
)
from gorouter_trio.wire.result import CallRecord

DEEP = 1_000_000  # Python 3.14 follows hundreds of thousands of levels


def sent(prompt: object, **options: Any) -> dict[str, Any]:
    """The request body as a server reads it."""
    encoded = codec.render_body(
        codec.encode_options(options),  # type: ignore[arg-type]
        codec.encode_prompt(prompt),  # type: ignore[arg-type]
        streaming=False,
    )
    return json.loads(encoded)  # type: ignore[no-any-return]


# --- requests ---------------------------------------------------------------------------------------------------------


def test_absent_null_and_zero_are_three_things() -> None:
    """A field that was not given is not sent, null is null, zero and false and the empty text are themselves."""
    assert sent("hi", temperature=0, seed=None, min_p=0.0, parallel_tool_calls=False, user="", stop=[]) == {
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0, "seed": None, "min_p": 0.0, "parallel_tool_calls": False, "user": "", "stop": [],
    }  # fmt: skip
    assert sent("hi") == {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("name", ["model", "models", "max_tokens", "max_completion_tokens"])
def test_null_where_it_says_nothing_is_not_sent(name: str) -> None:
    """A model or a bound of null is one that is not given: what is beneath stays, in the body and in the settings."""
    beneath = CallSettings(model="a/b", models=("c/d",), max_tokens=5)
    null: Any = {name: None}
    assert codec.encode_call(null, beneath=beneath) == (b"{}", beneath)
    assert codec.encode_call({"extra_body": null}, beneath=beneath) == (b"{}", beneath)
    given: Any = {"model": "e/f", "models": ["g/h"], "max_tokens": 7, "max_completion_tokens": 7}
    both: Any = {**given, "extra_body": null}
    for keywords in (both, given):
        options, settings = codec.encode_call(keywords, beneath=beneath)
        assert json.loads(options) == given
        assert settings == CallSettings(model="e/f", models=("g/h",), max_tokens=7)
    body, settings = codec.encode_request({"messages": [UserMessage("a")], **null}, beneath=beneath)
    assert (json.loads(body).keys(), settings) == ({"messages"}, beneath)


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (UserMessage(""), {"role": "user", "content": ""}),
        (AssistantMessage(), {"role": "assistant", "content": None}),
        (AssistantMessage(""), {"role": "assistant", "content": ""}),
        (AssistantMessage(tool_calls=[ToolCall("a", FunctionCall("f"))]),
         {"role": "assistant", "content": None,
          "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
        (ToolMessage("a", ""), {"role": "tool", "tool_call_id": "a", "content": ""}),
        (SystemMessage([TextPart("x")]), {"role": "system", "content": [{"type": "text", "text": "x"}]}),
        (UserMessage([ImagePart(ImageSource("data:,", "low"))]),
         {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}]}),
    ],
)  # fmt: skip
def test_messages_on_the_wire(message: Message, wire: dict[str, Any]) -> None:
    """Messages are sent with what they hold and nothing else, and come back equal."""
    encoded = codec.encode_message(message)
    assert json.loads(encoded) == wire
    assert codec.decode_message(encoded) == message
    assert codec.encode_prompt(message) == encoded
    assert json.loads(codec.encode_prompt([wire])) == wire


@pytest.mark.parametrize(
    "raw",
    [
        b'[{"type":"reasoning.text","text":"a \\u00e9","n":1.50,"big":123456789012345678901234567890}]',
        b'[ {"spaced" : [1e5, -0.0, "\\ud83d\\ude80"]} ]',
        b"[]",
        b"{}",
    ],
)
def test_what_is_echoed_is_echoed_byte_for_byte(raw: bytes) -> None:
    """Raw fields and content parts go out with the bytes that came in: in a request, and through a stored message."""
    body = b'{"choices":[{"message":{"content":[%b],"reasoning_details":%b,"annotations":%b}}]}' % (raw, raw, raw)
    message = codec.to_message(codec.decode_completion(body).choices[0].message)  # type: ignore[index, arg-type]
    encoded = codec.encode_message(message)
    assert encoded == b'{"role":"assistant","content":[%b],"reasoning_details":%b,"annotations":%b}' % (raw, raw, raw)
    assert codec.encode_message(codec.decode_message(encoded)) == encoded


@pytest.mark.parametrize("content", [None, "", "x"])
def test_content_null_and_empty_are_kept_apart(content: str | None) -> None:
    """The content of a reply is echoed as null, as "" or as text, whichever it was."""
    body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    message = codec.to_message(codec.decode_completion(body).choices[0].message)  # type: ignore[index, arg-type]
    assert json.loads(codec.encode_message(message)) == {"role": "assistant", "content": content}


def test_a_mapping_is_sent_as_it_is() -> None:
    """Mappings of any kind are messages when their role is one, unknown fields included."""
    message = {"role": "user", "content": [{"type": "new"}], "future": 1}
    assert sent(message)["messages"] == [message]
    assert sent([types.MappingProxyType(message), UserMessage("x")])["messages"][0] == message
    assert sent(iter([message]))["messages"] == [message]


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        (),
        5,
        None,
        object(),
        [5],
        ["text"],
        [None],
        {"role": "robot", "content": "x"},
        {"content": "x"},
        {"role": ["user"]},
        "\ud800",
        {"role": "user", "content": "\udfff"},
        UserMessage("\ud800"),
        {"role": "user", "content": object()},
        TextPart("not a message"),
        [ChatOptions()],
        b"bytes",
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_prompts_that_are_none(prompt: object) -> None:
    """What is no message, and text that cannot be written, is refused as a bad request before anything is sent."""
    with pytest.raises(BadRequestError, match="messages: ") as refused:
        codec.encode_prompt(prompt)  # type: ignore[arg-type]
    assert refused.value.status == 400


def test_nesting_without_end_is_refused() -> None:
    """A message that contains itself, or nests without end, is a bad request and no crash."""
    loop: dict[str, Any] = {"role": "user"}
    loop["content"] = [loop]
    deep: Any = []
    for _ in range(DEEP):
        deep = [deep]
    for message in (loop, {"role": "user", "content": deep}):
        with pytest.raises(BadRequestError):
            codec.encode_message(message)
    with pytest.raises(BadRequestError):
        codec.encode_options({"metadata": loop})


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": math.nan}, {"top_p": math.inf}, {"seed": Decimal("NaN")}, {"user": "\ud800"},
        {"metadata": {"a": object()}}, {"extra_body": {"x": -math.inf}}, {"extra_body": {"x": object()}},
        {"logit_bias": {"50256": -math.inf}}, {"provider": ProviderPreferences(max_price=MaxPrice(prompt=math.nan))},
        {"extra_body": {"a": [{"b": (1.5, math.nan)}]}}, {"extra_body": {"messages": []}},
        {"extra_body": {"stream": True}},
    ],
    ids=lambda options: re.sub(r" at 0x\w+", "", repr(options)),
)  # fmt: skip
def test_options_that_cannot_be_sent(options: ChatKeywords) -> None:
    """NaN is not sent as null, and what is no JSON or belongs to the call is refused."""
    with pytest.raises(BadRequestError):
        codec.encode_options(options)


def test_an_unknown_option_is_a_mistake_of_the_caller() -> None:
    """An unknown keyword is a TypeError, as for any function."""
    with pytest.raises(TypeError, match="temprature"):
        codec.encode_options({"temprature": 1})  # type: ignore[typeddict-unknown-key]


def test_money_goes_out_as_numbers() -> None:
    """Decimals are written as JSON numbers, to the last digit."""
    encoded = codec.encode_options({"provider": {"max_price": {"prompt": Decimal("1E-7"), "request": Decimal("0.10")}}})
    assert b"1E-7" in encoded
    assert json.loads(encoded, parse_float=Decimal) == {
        "provider": {"max_price": {"prompt": Decimal("1E-7"), "request": Decimal("0.10")}}
    }


def test_joining_options_keeps_their_bytes() -> None:
    """The second object wins, and numbers keep their digits: they are not read and written again."""
    first = b'{"model":"a","price":0.12345678901234567890123,"seed":123456789012345678901234567890,"x":1.50}'
    joined = codec.join_options(first, b'{"model":"b"}')
    assert joined == b'{"model":"b","price":0.12345678901234567890123,"seed":123456789012345678901234567890,"x":1.50}'
    assert codec.join_options(b"{}", first) == codec.join_options(first, b"{}") == first
    assert codec.join_options(b"{}", b"{}") == b"{}"


def test_joining_options_leaves_one_bound() -> None:
    """`max_tokens` and `max_completion_tokens` are one option: that of the upper level holds, as the settings say."""
    lower, higher = b'{"max_completion_tokens":3000}', b'{"max_tokens":50}'
    assert codec.join_options(lower, higher) == higher
    assert codec.join_options(higher, lower) == lower
    assert codec.join_options(lower, b'{"seed":1}') == b'{"max_completion_tokens":3000,"seed":1}'
    options, settings = codec.encode_call({"max_completion_tokens": 3000, "extra_body": {"max_tokens": 50}})
    assert (options, settings.max_tokens) == (higher, 50)
    _, settings = codec.encode_call({"max_completion_tokens": 50, "max_tokens": 3000})
    assert settings.max_tokens == 3000
    _, settings = codec.encode_request({"messages": [UserMessage("a")], "max_tokens": 7}, defaults=lower)
    assert settings.max_tokens == 7


@pytest.mark.parametrize(
    ("lower", "higher", "joined"),
    [
        ({"reasoning": {"effort": "high", "exclude": True}}, {"reasoning_effort": "low"},
         {"reasoning": {"exclude": True}, "reasoning_effort": "low"}),
        ({"reasoning": {"max_tokens": 9}}, {"reasoning_effort": "low"}, {"reasoning": {}, "reasoning_effort": "low"}),
        ({"reasoning_effort": "low"}, {"reasoning": {"effort": "high"}}, {"reasoning": {"effort": "high"}}),
        ({"reasoning_effort": "low"}, {"reasoning": {"exclude": True}},
         {"reasoning_effort": "low", "reasoning": {"exclude": True}}),
        ({"reasoning": None}, {"reasoning_effort": "low"}, {"reasoning": None, "reasoning_effort": "low"}),
        ({"reasoning": {"effort": "high"}}, {"reasoning": {"exclude": True}}, {"reasoning": {"exclude": True}}),
    ],
    ids=str,
)  # fmt: skip
def test_joining_options_leaves_one_effort(lower: object, higher: object, joined: object) -> None:
    """The call's holds beside the client's, whichever name each has: the API refuses two that contradict."""
    assert codec.decode_json(codec.join_options(codec.encode_json(lower), codec.encode_json(higher))) == joined


def test_settings_of_whole_options() -> None:
    """Options that have nothing beneath them: the rest of the settings stays."""
    before = CallSettings(model="a/b", models=("c/d",), max_tokens=5, tenant="t")
    assert codec.settings_of_whole({"seed": 1}, before) == CallSettings(tenant="t")
    named: Any = {"model": "e/f", "models": ["g/h"], "max_tokens": 7}
    assert codec.settings_of_whole(named, before) == CallSettings(
        model="e/f", models=("g/h",), max_tokens=7, tenant="t"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("options", [b"{}", b'{"model":"m","temperature":0}'])
def test_a_body_is_one_object(options: bytes, streaming: bool) -> None:
    """Options, the stream flag and the messages make one JSON object."""
    body = json.loads(codec.render_body(options, b'{"a":1},{"b":2}', streaming=streaming))
    expected = {**json.loads(options), "messages": [{"a": 1}, {"b": 2}]}
    assert body == (expected | {"stream": True} if streaming else expected)


def test_routing_and_extra_fields() -> None:
    """`routing_id` is the API's `session_id`, and `extra_body` adds fields or overrides them."""
    body = sent("hi", routing_id="r", temperature=1, extra_body={"safe_prompt": True, "temperature": 0.5})
    assert (body["session_id"], body["safe_prompt"], body["temperature"]) == ("r", True, 0.5)
    assert "extra_body" not in body


def test_a_whole_request() -> None:
    """A batch request is rendered from a value or a mapping, without what only the batch needs."""
    value = ChatRequest(messages=[UserMessage("a")], custom_id="1", temperature=0, model="m")
    mapping = {
        "messages": [{"role": "user", "content": "a"}],
        "custom_id": "1",
        "temperature": 0,
        "model": "m",
        "stream": True,
    }
    expected = {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "model": "m", "seed": 1}
    for request in (value, mapping):
        body, settings = codec.encode_request(request, defaults=b'{"seed":1,"model":"x"}')
        assert json.loads(body) == expected
        assert settings.model == "m"
    wrong: list[Any] = [{}, {"messages": "x"}, {"messages": None}, {"messages": []}, 5, {"messages": [1]}]
    wrong += [
        {"messages": mapping["messages"], "x": object()},
        {"messages": mapping["messages"], "temperature": math.nan},
    ]
    for request in wrong:
        with pytest.raises(BadRequestError):
            codec.encode_request(request)


NO_JSON = [Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), msgspec.Raw(b'{"type":'), msgspec.Raw(b'"\xff"')]


@pytest.mark.parametrize("odd", NO_JSON, ids=range(len(NO_JSON)))
def test_what_has_no_json_is_refused_wherever_it_stands(odd: Any) -> None:
    """A Decimal that is no number, or raw JSON that is none, goes neither into a request nor into a history."""
    user: Any = {"role": "user", "content": "x"}
    for message in ({**user, "weight": odd}, {"role": "user", "content": [{"type": "x", "y": odd}]}):
        for prompt in (message, [user, message]):
            with pytest.raises(BadRequestError, match="messages: cannot be written"):
                codec.encode_prompt(prompt)
    with pytest.raises(BadRequestError, match="messages: cannot be written"):
        codec.encode_message(UserMessage([odd]))
    for options in ({"trace": {"x": odd}}, {"extra_body": {"x": [odd]}}):
        with pytest.raises(BadRequestError, match="options cannot be written"):
            codec.encode_options(options)  # type: ignore[arg-type]  # what a caller without a type checker may give
    for defaults in (b"{}", b'{"seed":1}'):
        with pytest.raises(BadRequestError, match="request cannot be written"):
            codec.encode_request({"messages": [user], "provider": {"max_price": {"prompt": odd}}}, defaults=defaults)
    with pytest.raises(BadRequestError, match="request cannot be written"):
        codec.encode_embeddings("x", "m", keywords={"extra_body": {"x": {"y": odd}}})


@given(text=st.text())
def test_any_text_that_is_text_goes_through(text: str) -> None:
    """Every text arrives as it was, control characters and quotes and all planes included."""
    assert sent(text)["messages"][0]["content"] == text
    assert json.loads(codec.encode_message({"role": "user", "content": text}))["content"] == text


# --- replies ----------------------------------------------------------------------------------------------------------

ODD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "padding": b"\n         \n" * 9,
    "html": b"<html><body>nope</body></html>",
    "null": b"null",
    "list": b"[]",
    "number": b"3",
    "nothing": b"{}",
    "no choices": b'{"choices":[]}',
    "null choices": b'{"choices":null}',
    "no message": b'{"choices":[{"finish_reason":"stop"}]}',
    "null message": b'{"choices":[{"message":null}]}',
    "content is an object": b'{"choices":[{"message":{"content":{"a":1}}}]}',
    "content is a number": b'{"choices":[{"message":{"content":5}}]}',
    "choices is an object": b'{"choices":{"message":{"content":"x"}}}',
    "trailing garbage": b'{"choices":[{"message":{"content":"x"}}]} x',
    "two values": b'{"choices":[{"message":{"content":"x"}}]}{}',
    "a NaN": b'{"choices":[{"message":{"content":"x"}}],"created":NaN}',
    "a mark": b'\xef\xbb\xbf{"choices":[{"message":{"content":"x"}}]}',
    "depth": b'{"choices":[{"message":{"content":"x"}}],"deep":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "depth in a raw field": b'{"choices":[{"message":{"content":"x","annotations":'
    + b"[" * DEEP
    + b"]" * DEEP
    + b"}}]}",
    "depth of objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "open brackets": b"[" * DEEP,
    "utf-16": '{"choices":[]}'.encode("utf-16"),
    "nul": b"\0" * 40,
}

DECODERS: dict[str, Callable[[bytes], object]] = {
    "completion": codec.decode_completion,
    "chunk": codec.decode_chunk,
    "models": codec.decode_models,
    "key": codec.decode_key,
    "credits": codec.decode_credits,
    "message": codec.decode_message,
    "messages": codec.decode_messages,
    "log entry": codec.decode_log_entry,
    "json": codec.decode_json,
    "object": codec.split_object,
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES.keys())
def test_bodies_that_are_no_reply(body: bytes) -> None:
    """Each is a typed error that says it may have been billed."""
    with pytest.raises(GorouterError) as refused:
        codec.decode_completion(body, generation_id="gen-x")
    assert isinstance(refused.value, (DecodeError, ProviderError))
    assert refused.value.maybe_billed
    assert refused.value.generation_id == "gen-x"


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS.keys())
@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES.keys())
def test_no_decoder_raises_anything_else(decode: Callable[[bytes], object], body: bytes) -> None:
    """Whatever is given to a decoder, it answers or raises an error of ours."""
    with suppress(GorouterError):
        decode(body)


@given(body=st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_typed_error(body: bytes) -> None:
    """Random bytes, to every decoder."""
    for decode in DECODERS.values():
        with suppress(GorouterError):
            decode(body)
    assert isinstance(codec.decode_error(500, [], body=body, now_s=0), ApiError)
    codec.decode_chunks([body, body])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["", "error", "stop", "1e400", "NaN", "0.01"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
PLACES = [
    ("id",),
    ("created",),
    ("model",),
    ("usage",),
    ("usage", "cost"),
    ("usage", "cost_details"),
    ("error",),
    ("choices",),
    ("error", "code"),
    ("error", "metadata"),
    ("error", "message"),
    ("choices", 0),
    ("choices", 0, "message"),
    ("choices", 0, "finish_reason"),
    ("choices", 0, "error"),
    ("choices", 0, "message", "content"),
    ("choices", 0, "message", "tool_calls"),
    ("choices", 0, "message", "tool_calls", 0),
    ("choices", 0, "message", "annotations"),
    ("choices", 0, "message", "tool_calls", 0, "function"),
    ("choices", 0, "message", "tool_calls", 0, "index"),
    ("choices", 0, "message", "tool_calls", 0, "function", "arguments"),
    ("choices", 0, "message", "reasoning_details"),
]


def template() -> dict[str, Any]:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "kept", "tool_calls": [call], "reasoning": "why"}
    return {
        "id": "gen-1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 1, "cost": 0.5, "cost_details": {"upstream_inference_cost": 0.5}},
    }


@given(place=st.sampled_from(PLACES), value=JSON, streamed=st.booleans())
def test_any_value_in_any_place(place: tuple[Any, ...], value: Any, streamed: bool) -> None:
    """One field of a good reply replaced by anything: an answer that can be stored and echoed, or a typed error."""
    body = template()
    if streamed:
        body["choices"][0]["delta"] = body["choices"][0].pop("message")
        place = tuple("delta" if step == "message" and place[0] == "choices" else step for step in place)
    at: Any = body
    for step in place[:-1]:
        at = at.setdefault(step, {}) if isinstance(at, dict) else at[step]
    at[place[-1]] = value
    encoded = json.dumps(body).encode()
    try:
        if streamed:
            chunks, error = codec.decode_chunks([encoded])
            assert bool(chunks) != bool(error)
            return
        reply = codec.decode_completion(encoded)
    except GorouterError:
        return
    message = codec.to_message(reply.choices[0].message)  # type: ignore[index, arg-type]
    stored = codec.encode_json(
        TurnAnswered("t", msgspec.Raw(codec.encode_message(message)), CallRecord(usage=reply.usage))
    )
    codec.decode_log_entry(stored)


def test_a_finish_of_error_is_an_error() -> None:
    """A reply that finished with an error and gives no error object is raised as a provider's failure."""
    choice = {"finish_reason": "error", "native_finish_reason": "MALFORMED_FUNCTION_CALL", "message": {"content": "x"}}
    body = json.dumps({"choices": [choice]}).encode()
    with pytest.raises(ProviderError, match="MALFORMED_FUNCTION_CALL") as raised:
        codec.decode_completion(body)
    assert raised.value.code == 502
    assert raised.value.partial is not None
    assert raised.value.partial.text == "x"


def test_the_error_comes_first() -> None:
    """An error is raised even beside choices, with its own code."""
    error = {"code": "rate_limit_exceeded", "message": "slow"}
    body = json.dumps({"error": error, "choices": [{"message": {"content": "x"}}], "id": "gen-1"}).encode()
    with pytest.raises(RateLimitError, match="slow") as raised:
        codec.decode_completion(body)
    assert (raised.value.status, raised.value.code, raised.value.generation_id) == (200, "rate_limit_exceeded", "gen-1")


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("0.0000057", Decimal("0.0000057")),
        ("1e-7", Decimal("1e-7")),
        ("0", Decimal(0)),
        ('"0.5"', Decimal("0.5")),
        ("0.1234567890123456789", Decimal("0.1234567890123456789")),
        ("null", None),
        ('"NaN"', None),
        ('"Infinity"', None),
        ('"sNaN"', None),
        ("-1", None),
        ("1e99999999", None),
        ('"free"', None),
        ("[1]", None),
        ("true", None),
        ("1e9999999999999999999999", None),
    ],
)
def test_cost(text: str, cost: Decimal | None) -> None:
    """A cost is exact to its last digit, or unknown; an amount that is none does not cost the answer."""
    body = b'{"choices":[{"message":{"content":"x"}}],"usage":{"total_tokens":3,"cost":%b}}' % text.encode()
    usage = codec.decode_completion(body).usage
    assert usage is not None
    assert (usage.cost, usage.total_tokens) == (cost, 3)


def test_checked_usage() -> None:
    """Sound usage is the same object; counts below zero and a NaN in the details become None, the rest stays."""
    sound = Usage(prompt_tokens=1, cost=Decimal("0.1"), cost_details=CostDetails(Decimal(0)))
    assert codec.checked_usage(sound) is sound
    odd = Usage(prompt_tokens=-1, completion_tokens=2, cost=Decimal("0.1"), cost_details=CostDetails(Decimal("NaN")))
    assert codec.checked_usage(odd) == Usage(completion_tokens=2, cost=Decimal("0.1"))


@pytest.mark.parametrize(
    "count", ["1000000000000", "18446744073709551616", "1e300", "1" + 400 * "0", "-1"], ids=range(5)
)
def test_counts_that_no_request_has(count: str) -> None:
    """A count beyond all measure is unknown, wherever it stands, and so it is in a log of an older version."""
    text = (
        f'{{"prompt_tokens":{count},"completion_tokens":{count},"total_tokens":{count},"cost":0.1,'
        f'"prompt_tokens_details":{{"cached_tokens":{count}}},"server_tool_use_details":{{"web_search_requests":2}},'
        f'"completion_tokens_details":{{"reasoning_tokens":{count}}}}}'
    )
    checked = Usage(
        cost=Decimal("0.1"),
        prompt_tokens_details=PromptTokensDetails(),
        completion_tokens_details=CompletionTokensDetails(),
        server_tool_use_details=ServerToolUse(web_search_requests=2),
    )
    body = f'{{"choices":[{{"message":{{"content":"x"}}}}],"usage":{text}}}'
    assert codec.decode_completion(body.encode()).usage == checked
    digits = text.replace(count, str(int(Decimal(count))))
    for tag in ("answered", "called", "discarded"):
        stored = f'{{"type":"{tag}","turn_id":"t","message":{{}},"call":{{"usage":{digits}}}}}'
        entry = codec.decode_log_entry(stored.encode())
        assert isinstance(entry, (TurnAnswered, TurnCalled, AnswerDiscarded))
        assert entry.call.usage == checked


def test_a_tenant_without_utf8() -> None:
    """What its requests cost could not be written into the ledger."""
    with pytest.raises(BadRequestError, match=r"^tenant: "):
        codec.encode_call({"tenant": "a\ud800"})


def test_an_extra_body_in_a_body() -> None:
    """It is sent as it is, so the bound in it bounds nothing, and no less is set aside for it."""
    fields = {"model": "a/b", "max_tokens": 500, "extra_body": {"model": "c/d", "max_tokens": 1}}
    body, settings = codec.encode_request({"messages": [UserMessage("a")], **fields})
    assert {**json.loads(body), "messages": None} == {**fields, "messages": None}
    assert (settings.model, settings.max_tokens) == ("a/b", 500)


@pytest.mark.parametrize("kind", [PromptTokensDetails, CompletionTokensDetails, ServerToolUse])
@pytest.mark.parametrize("count", [-1, 10**12])
def test_every_count_that_no_request_has(kind: type[msgspec.Struct], count: int) -> None:
    """Each by itself, since some are prices' worth: searches of less than none made an estimate less than nothing."""
    place = {
        PromptTokensDetails: "prompt_tokens_details",
        CompletionTokensDetails: "completion_tokens_details",
        ServerToolUse: "server_tool_use_details",
    }[kind]
    for name in kind.__struct_fields__:
        usage = msgspec.structs.replace(Usage(prompt_tokens=1), **{place: kind(**{name: count})})
        assert codec.checked_usage(usage) == msgspec.structs.replace(usage, **{place: kind()}), name


def test_chunks_up_to_the_bad_one() -> None:
    """What came before an event that is no chunk is given out, and the error beside it, however events arrive."""
    good = [b'{"id":"%d"}' % i for i in range(3)]
    chunks, error = codec.decode_chunks([good[0], good[1], b"{", good[2]])
    assert [c.id for c in chunks] == ["0", "1"]
    assert isinstance(error, DecodeError)
    assert error.maybe_billed
    assert codec.decode_chunks([]) == ([], None)


@pytest.mark.parametrize("odd", [b"", b" ", b'{"id":"1"}\n{"id":"2"}', b'{"id":"1"} {"id":"2"}', b'{"id":\n"1"}'])
def test_events_together_are_events_alone(odd: bytes) -> None:
    """Several events in one read are what each of them is by itself: blank ones nothing, two values an error."""
    alone, error = codec.decode_chunks([odd])
    assert (error is not None) == (odd.count(b"id") == 2)
    together, same = codec.decode_chunks([b'{"id":"0"}', odd, b'{"id":"3"}'])
    assert [c.id for c in together[: len(alone) + 1]] == ["0", *(c.id for c in alone)]
    assert (error is None) == (same is None)


def test_a_whole_reply_as_a_chunk() -> None:
    """A reply in one piece becomes the one chunk of a stream with everything that it said."""
    body = (
        b'{"id":"g","choices":[{"finish_reason":"tool_calls","message":{"content":"x","reasoning":"r",'
        b'"annotations":[{"a":1}],'
        b'"reasoning_details":[{"type":"t"}],"tool_calls":[{"id":"a","function":{"name":"f"}}]}}],"usage":{"cost":1}}'
    )
    reply = codec.decode_completion(body)
    made = codec.to_chunk(reply)
    delta = made.choices[0].delta  # type: ignore[index]
    assert delta is not None
    assert (delta.content, delta.reasoning, made.usage) == ("x", "r", reply.usage)
    assert [bytes(piece) for piece in (delta.annotations or []) + (delta.reasoning_details or [])] == [
        b'{"a":1}',
        b'{"type":"t"}',
    ]
    assert made.choices[0].finish_reason == "tool_calls"  # type: ignore[index]


def test_service_replies_that_are_errors() -> None:
    """An error object inside a 200 of a service endpoint is raised as what it is."""
    for decode in (codec.decode_models, codec.decode_key, codec.decode_credits):
        with pytest.raises(RateLimitError, match="slow"):
            decode(b'{"error":{"code":429,"message":"slow"}}')


def test_raw_copies_do_not_pin_the_body() -> None:
    """A message that is kept lets go of the reply that it was cut from."""
    body = b'{"choices":[{"message":{"content":[1],"annotations":[1],"audio":{}}}]}'
    before = sys.getrefcount(body)
    reply = codec.decode_completion(body)
    message = codec.to_message(reply.choices[0].message)  # type: ignore[index, arg-type]
    assert sys.getrefcount(body) > before
    del reply
    assert sys.getrefcount(body) == before
    assert codec.encode_message(message) == b'{"role":"assistant","content":[1],"annotations":[1],"audio":{}}'


def test_stored_entries_come_back() -> None:
    """Log entries of every kind are read as they were written, cost included."""
    call = CallRecord(usage=Usage(cost=Decimal("1e-7"), prompt_tokens=0), generation_id="g", interrupted=True)
    for entry in (
        TurnStarted("t", msgspec.Raw(b'[{"role":"user","content":"x"}]'), 1.5),
        TurnAnswered("t", msgspec.Raw(b'{"role":"assistant","content":null}'), call),
        TurnAbandoned("t", "why", maybe_billed=True),
    ):
        back = codec.decode_log_entry(codec.encode_json(entry))
        assert codec.encode_json(back) == codec.encode_json(entry)
        assert type(back) is type(entry)


def test_tool_calls_keep_unique_ids() -> None:
    """Ids that are missing, or come twice in a whole reply, are replaced: results are matched by them."""
    entries = [{"id": "a"}, {"id": "a"}, {"id": ""}, {"id": "call_2"}, {"function": {"arguments": None}}]
    body = json.dumps({"choices": [{"message": {"tool_calls": entries}}]}).encode()
    calls = codec.to_message(codec.decode_completion(body).choices[0].message).tool_calls  # type: ignore[index, arg-type]
    assert calls is not UNSET
    assert [call.id for call in calls] == ["a", "a_1", "call_2", "call_2_3", "call_4"]
    assert {(call.function.name, call.function.arguments, call.type) for call in calls} == {("", "", "function")}


NEWER: list[tuple[dict[str, Any], Message]] = [
    (
        {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "newer", "x": [1.50]}], "flag": True},
        UserMessage([TextPart("see"), msgspec.Raw(b'{"type":"newer","x":[1.5]}')]),
    ),
    (
        {"role": "user", "content": [{"type": "text"}], "name": "Ada"},
        UserMessage([msgspec.Raw(b'{"type":"text"}')], "Ada"),
    ),
    ({"role": "system", "content": [{"type": "y"}], "name": 5}, SystemMessage([msgspec.Raw(b'{"type":"y"}')])),
    ({"role": "developer", "content": [5]}, DeveloperMessage([msgspec.Raw(b"5")])),
    (
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": 5}]},
        ToolMessage("c", [msgspec.Raw(b'{"type":"image_url","image_url":5}')]),
    ),
    (
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": None}}, {"id": "c"}], "name": "B"},
        AssistantMessage(None, "B", tool_calls=[ToolCall("call_0", FunctionCall("")), ToolCall("c", FunctionCall(""))]),
    ),
    ({"role": "assistant", "content": [{"type": "y"}]}, AssistantMessage([msgspec.Raw(b'{"type":"y"}')])),
]


@pytest.mark.parametrize(("sent", "read"), NEWER, ids=range(len(NEWER)))
def test_messages_newer_than_this_package_can_be_read(sent: dict[str, Any], read: Message) -> None:
    """What a mapping was sent with, and our types do not know, is raw or left out; the rest is there."""
    encoded = json.dumps(sent, separators=(",", ":")).encode()
    assert codec.decode_messages(encoded + b',{"role":"user","content":"and"}') == [read, UserMessage("and")]
    assert codec.decode_message(encoded) == read
    again = codec.encode_message(read)
    assert codec.decode_message(again) == read


@pytest.mark.parametrize(
    "data", [b'{"role":"x","content":"y"}', b"5", b"{}", b'{"role":"user"}', b'{"role":"user"', b""]
)
def test_what_is_no_message_is_not_read(data: bytes) -> None:
    """It is a `DecodeError`, alone and among others."""
    with pytest.raises(DecodeError):
        codec.decode_message(data)
    with pytest.raises(DecodeError):
        codec.decode_messages(b'{"role":"user","content":"z"},' + data)
