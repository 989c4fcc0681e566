"""The form check: what the API refuses for its form is refused here, and what is nearly so passes."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.errors import BadRequestError
from gorouter_trio.wire import codec
from gorouter_trio.wire.formcheck import check_form, check_headers
from gorouter_trio.wire.preferences import MaxPrice, ProviderPreferences
from gorouter_trio.wire.queries import ModelFilters
from gorouter_trio.wire.requests import ChatOptions

TOOL = {"type": "function", "function": {"name": "f"}}

# field, what is refused, what nearly was
BOUNDS: list[tuple[str, list[object], list[object]]] = [
    ("temperature", [3, 10**400, -0.1, "1", True, math.inf, 2.0001], [0, 2, 1.5, None]),
    ("top_p", [0, 1.1, -1, "x"], [1, 0.0001, None]),
    ("top_k", [-1, 1.5, True], [0, 40]),
    ("min_p", [-0.1, 1.1], [0, 1]),
    ("top_a", [-0.1, 1.1], [0, 1]),
    ("frequency_penalty", [-2.1, 2.1], [-2, 0, 2]),
    ("presence_penalty", [-2.1, 2.1], [-2, 0, 2]),
    ("repetition_penalty", [0, 2.1], [0.01, 2]),
    ("max_tokens", [0, -1, 1.5, "5"], [1, 10**6]),
    ("max_completion_tokens", [0, -1], [1]),
    ("models", [["a", "b", "c", "d"], "a", [1]], [["a", "b", "c"], []]),
    ("model", ["", "  ", 5], ["a/b"]),
    ("stop", [["a"] * 5, [1], 5], ["x", ["a"] * 4, []]),
    ("logit_bias", [{"5": 101}, {"5": "x"}, [1]], [{"5": -100}, {}]),
    ("metadata", [{str(n): "v" for n in range(17)}, {"k" * 65: "v"}, {"k[": "v"}, {"k": 1}, {"k": "v" * 513}],
        [{str(n): "v" * 512 for n in range(16)}, {"k" * 64: ""}]),
    ("tools", [[{"type": "function", "function": {"name": "a b"}}], [TOOL, TOOL], TOOL, "f",
        [{"type": "function", "function": {"name": "x" * 65}}], [{"type": "function", "function": {}}]],
        [[TOOL], [], [{"type": "openrouter:web_search"}], [{"type": "function", "function": {"name": "x" * 64}}]]),
    ("response_format",
        [{"type": "json_schema", "json_schema": {"name": "a b"}}, {"type": "json_schema", "json_schema": {}}],
        [{"type": "json_object"}, {"type": "newer"}, {"type": "json_schema", "json_schema": {"name": "a-b_1"}}]),
    ("reasoning", [{"effort": "low", "max_tokens": 5}, {"max_tokens": 0}],
        [{"effort": "newer"}, {"max_tokens": 1}, {}, {"effort": "low", "max_tokens": None}]),
    ("provider",
        [{"max_price": {"prompt": math.nan}}, ProviderPreferences(max_price=MaxPrice(completion=math.inf))],
        [{"max_price": {"prompt": 1.5, "image": "0.1"}}, {"max_price": None}, ProviderPreferences(), {"max_price": 5}]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "refused", "passes"), BOUNDS, ids=[field for field, _, _ in BOUNDS])
def test_bounds(field: str, refused: list[object], passes: list[object]) -> None:
    """Each rule refuses what is beyond it, naming the field, and nothing that is within."""
    for value in refused:
        with pytest.raises(BadRequestError, match=rf"^{field}"):
            check_form({field: value})
    for value in passes:
        check_form({field: value})


def test_top_logprobs_needs_logprobs() -> None:
    """Fields that depend on each other are looked at together, where both are there: one may stand a level lower."""
    with pytest.raises(BadRequestError, match="logprobs"):
        check_form({"top_logprobs": 3, "logprobs": False})
    check_form({"top_logprobs": 3, "logprobs": True})
    check_form({"top_logprobs": 3})
    with pytest.raises(BadRequestError, match="reasoning_effort"):
        check_form({"reasoning_effort": "low", "reasoning": {"effort": "high"}})
    check_form({"reasoning_effort": "low", "reasoning": {"effort": "low"}})


def test_typed_values_are_looked_into() -> None:
    """A Struct is checked as the mapping would be."""
    with pytest.raises(BadRequestError, match="exclude each other"):
        check_form({"reasoning": gr.ReasoningOptions(effort="low", max_tokens=5)})
    with pytest.raises(BadRequestError, match=r"tools\[0\]"):
        check_form({"tools": [gr.FunctionTool(gr.FunctionSpec(name="no spaces"))]})
    check_form({"tools": [gr.FunctionTool(gr.FunctionSpec(name="f")), gr.ServerTool(type="openrouter:datetime")]})


def test_routing_id_is_named_as_the_caller_names_it() -> None:
    """The error speaks of `routing_id`, which the API calls otherwise."""
    with pytest.raises(BadRequestError, match="routing_id"):
        codec.encode_options({"routing_id": "x" * 257})


@given(
    st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=3))
)
def test_unknown_names_pass(fields: dict[str, Any]) -> None:
    """What is newer than this package is left to the API."""
    check_form({f"x-{name}": value for name, value in fields.items()})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "tool", "tool_call_id": 5, "content": "x"},
        {"role": "user"},
        {"role": "user", "content": None},
        {"role": "user", "content": 5},
        {"role": "user", "content": {"type": "text"}},
        {"role": "user", "content": ["text"]},
        {"role": "user", "content": [{"text": "no type"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "https://x"}]},
        {"role": "user", "content": [{"type": "file"}]},
        {"role": "assistant", "content": None, "tool_calls": "f"},
        {"role": "assistant", "content": None, "tool_calls": ["f"]},
        {"role": "robot", "content": "x"},
        {"content": "x"},
    ],
)
def test_messages_without_a_form(message: dict[str, object]) -> None:
    """A message in wire names lacks nothing that its role needs."""
    with pytest.raises(BadRequestError, match=r"^messages: "):
        codec.encode_message(message)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "user", "content": [{"type": "newer than us", "x": 1}]},
        {"role": "user", "content": [gr.TextPart("typed"), {"type": "text", "text": "mapping"}]},
        {"role": "user", "content": [], "newer": True},
        {"role": "tool", "tool_call_id": "", "content": ""},
    ],
)
def test_messages_that_pass(message: dict[str, object]) -> None:
    """What may be newer, or is mended elsewhere, is left alone."""
    assert b'"role"' in codec.encode_message(message)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "x"}, {"AUTHORIZATION": "x"}, {"content-length": "5"}, {"Transfer-Encoding": "x"},
        {"Connection": "close"},
        {"a b": "x"}, {"": "x"}, {"a:": "x"}, {"a\n": "x"}, {"a": "x\r\nHost: y"}, {"a": "ü"}, {"a": 5}, {5: "a"},
        ["a"], "a: b",
    ],
)  # fmt: skip
def test_headers_that_cannot_be(headers: Any) -> None:
    """Headers that would break out of their line, or that the client sets itself, are refused."""
    with pytest.raises(BadRequestError, match="extra_headers") as caught:
        check_headers(headers)
    assert "Host: y" not in str(caught.value)


def test_the_kinds_cover_every_option() -> None:
    """The check of a file's columns knows each option of a request."""
    assert codec._OptionKinds.__struct_fields__ == ChatOptions.__struct_fields__


# Requests against the API's own description

tools = st.lists(
    st.builds(
        lambda name, description: gr.FunctionTool(gr.FunctionSpec(name=name, description=description)),
        st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
        st.text(max_size=20),
    ),
    max_size=3,
    unique_by=lambda tool: tool.function.name,
)
formats: st.SearchStrategy[gr.ResponseFormat] = st.one_of(
    st.just(gr.TextFormat()),
    st.just(gr.JsonObjectFormat()),
    st.builds(
        lambda name, strict: gr.JsonSchemaFormat(gr.JsonSchema(name=name, schema={"type": "object"}, strict=strict)),
        st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True),
        st.booleans(),
    ),
    st.builds(gr.GrammarFormat, st.text(max_size=20)),
)
slugs = st.lists(st.sampled_from(["openai", "deepinfra/turbo", "together"]), max_size=3)
percentiles = st.one_of(st.floats(0, 100), st.builds(gr.Percentiles, p50=st.floats(0, 100), p99=st.floats(0, 100)))
providers = st.builds(
    gr.ProviderPreferences,
    order=slugs,
    only=slugs,
    ignore=slugs,
    allow_fallbacks=st.booleans(),
    require_parameters=st.booleans(),
    data_collection=st.sampled_from(["allow", "deny"]),
    zdr=st.booleans(),
    quantizations=st.lists(st.sampled_from(["int4", "fp8", "bf16", "unknown"]), max_size=2),
    sort=st.one_of(
        st.sampled_from(["price", "throughput", "latency"]), st.builds(gr.ProviderSort, by=st.just("price"))
    ),
    preferred_min_throughput=percentiles,
    preferred_max_latency=percentiles,
    max_price=st.builds(gr.MaxPrice, prompt=st.sampled_from(["0.1", "5"]), completion=st.sampled_from(["1", "20"])),
)
plugins = st.lists(
    st.one_of(
        st.builds(gr.WebPlugin, max_results=st.integers(1, 10), search_prompt=st.text(max_size=10)),
        st.builds(gr.ResponseHealingPlugin, enabled=st.booleans()),
        st.builds(gr.FileParserPlugin, pdf=st.builds(gr.PdfOptions, engine=st.sampled_from(["native", "mistral-ocr"]))),
        st.just(gr.ModerationPlugin()),
        st.builds(gr.AutoRouterPlugin, allowed_models=slugs),
    ),
    max_size=2,
)
keywords: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["openai/gpt-4o-mini", "openrouter/auto", "a/b:free"]),
        "models": st.lists(st.just("a/b"), min_size=1, max_size=3),
        "temperature": st.one_of(st.floats(0, 2), st.integers(0, 2), st.none()),
        "top_p": st.floats(0.001, 1),
        "top_k": st.integers(0, 100),
        "min_p": st.floats(0, 1),
        "top_a": st.floats(0, 1),
        "frequency_penalty": st.floats(-2, 2),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.01, 2),
        "max_tokens": st.integers(1, 10**6),
        "max_completion_tokens": st.integers(1, 10**6),
        "seed": st.integers(0, 2**31),
        "stop": st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), max_size=4)),
        "logit_bias": st.dictionaries(st.integers(0, 10**5).map(str), st.integers(-100, 100), max_size=3),
        "logprobs": st.just(True),
        "response_format": formats,
        "tools": tools,
        "tool_choice": st.sampled_from(["none", "auto", "required", gr.NamedToolChoice(gr.FunctionChoice("f"))]),
        "parallel_tool_calls": st.booleans(),
        "reasoning": st.builds(gr.ReasoningOptions, effort=st.sampled_from(["high", "low", "none"])),
        "modalities": st.lists(st.sampled_from(["text", "image"]), unique=True, max_size=2),
        "service_tier": st.sampled_from(["auto", "default", "flex", "priority"]),
        "routing_id": st.text(min_size=1, max_size=256),
        "user": st.text(max_size=10),
        "metadata": st.dictionaries(st.from_regex(r"[a-z]{1,64}", fullmatch=True), st.text(max_size=50), max_size=4),
        "cache_control": st.builds(gr.CacheControl, ttl=st.sampled_from(["5m", "1h"])),
        "provider": providers,
        "plugins": plugins,
        "trace": st.builds(gr.TraceOptions, trace_id=st.text(max_size=5)),
    },
)
parts = st.one_of(
    st.builds(gr.TextPart, st.text(max_size=10)),
    st.builds(gr.ImagePart, st.builds(gr.ImageSource, st.just("https://example.com/x.png"))),
    st.builds(gr.AudioPart, st.builds(gr.InputAudio, st.just("AAAA"), st.just("wav"))),
    st.builds(gr.FilePart, st.builds(gr.FileSource, filename=st.just("a.pdf"), file_data=st.just("data:,x"))),
    st.builds(gr.VideoPart, st.builds(gr.VideoSource, st.just("https://example.com/x.mp4"))),
)
messages: st.SearchStrategy[Any] = st.lists(
    st.one_of(
        st.builds(gr.SystemMessage, st.text(max_size=10)),
        st.builds(gr.DeveloperMessage, st.text(max_size=10)),
        st.builds(gr.UserMessage, st.one_of(st.text(max_size=10), st.lists(parts, min_size=1, max_size=3))),
        st.builds(gr.AssistantMessage, st.one_of(st.none(), st.text(max_size=10))),
        st.builds(gr.ToolMessage, st.text(min_size=1, max_size=10), st.text(max_size=10)),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="session")
def description(reference_dir: Path) -> Any:
    """The API's own description."""
    yaml = pytest.importorskip("yaml")
    pytest.importorskip("jsonschema")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load((reference_dir / "openrouter" / "openapi.yaml").read_text("utf-8"), Loader=loader)


def validator(description: Any, schema: Any) -> Any:
    """What judges values by a schema of the description."""
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator({**schema, "components": description["components"]})


@pytest.fixture(scope="session")
def described(description: Any) -> Any:
    """What it says about a chat request."""
    return validator(description, {"$ref": "#/components/schemas/ChatRequest"})


@settings(max_examples=150)
@given(messages=messages, keywords=keywords)
def test_requests_are_what_the_api_describes(described: Any, messages: Any, keywords: Any) -> None:
    """Any request that is built from typed values and passes the check is one by the API's description."""
    body = codec.render_body(codec.encode_options(keywords), codec.encode_prompt(messages), streaming=True)
    problems = [f"{list(e.absolute_path)}: {e.message[:200]}" for e in described.iter_errors(json.loads(body))]
    assert problems == []


def test_money_is_sent_as_a_number() -> None:
    """A ceiling given as a Decimal keeps its digits."""
    sent = codec.encode_options({"provider": {"max_price": {"prompt": Decimal("0.10")}}})
    assert sent == b'{"provider":{"max_price":{"prompt":0.10}}}'


@pytest.fixture(scope="session")
def described_embeddings(description: Any) -> Any:
    """What it says about a request for embeddings."""
    content = description["paths"]["/embeddings"]["post"]["requestBody"]["content"]
    return validator(description, content["application/json"]["schema"])


words = st.text(min_size=1, max_size=20).filter(str.strip)
tokens = st.integers(0, 100_000)
embedding_inputs = st.one_of(
    words,
    st.lists(words, min_size=1, max_size=5),
    st.lists(tokens, min_size=1, max_size=5),
    st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.just({"content": [{"type": "text", "text": "tide"}]}), min_size=1, max_size=2),
)
embedding_keywords = st.fixed_dictionaries(
    {},
    optional={
        "dimensions": st.integers(1, 4096),
        "encoding_format": st.sampled_from(["float", "base64"]),
        "input_type": words,
        "provider": st.just(ProviderPreferences(order=["openai"], allow_fallbacks=False)),
        "user": words,
        "routing_id": words,
    },
)


@settings(max_examples=100)
@given(inputs=embedding_inputs, keywords=embedding_keywords)
def test_embeddings_are_what_the_api_describes(described_embeddings: Any, inputs: Any, keywords: Any) -> None:
    """So is any request for embeddings."""
    body, _ = codec.encode_embeddings(inputs, "openai/text-embedding-3-small", keywords=keywords)
    errors = described_embeddings.iter_errors(json.loads(body))
    assert [f"{list(error.absolute_path)}: {error.message[:200]}" for error in errors] == []


def test_every_filter_is_described_and_every_described_one_is_there(description: Any) -> None:
    """The filters of models are those of the API, but for its feeds."""
    described = {parameter["name"] for parameter in description["paths"]["/models"]["get"]["parameters"]}
    ours = set(ModelFilters.__annotations__) - {"extra"}
    assert ours | {"offset", "limit"} == described - {"use_rss", "use_rss_chat_links"}
