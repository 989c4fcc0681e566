"""Whole recorded bodies, decoded to exactly what they say, whole and cut at every byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path

import pytest
from msgspec import UNSET

from gorouter_trio.errors import (
    ApiError,
    AuthenticationError,
    DecodeError,
    GorouterError,
    InsufficientCreditsError,
    ModerationError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
)
from gorouter_trio.wire.codec import (
    decode_chunks,
    decode_completion,
    decode_credits,
    decode_error,
    decode_generation,
    decode_key,
    decode_model_page,
    decode_models,
    encode_message,
    to_message,
)
from gorouter_trio.wire.merge import ChunkMerge
from gorouter_trio.wire.messages import AssistantMessage, FunctionCall, ToolCall
from gorouter_trio.wire.sse import SseParser

GOLDEN = Path(__file__).parent / "golden"
NOW_S = 1_795_300_000.0


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.body").read_bytes()


def merge_stream(pieces: Iterable[bytes]) -> tuple[ChunkMerge, bool]:
    """What a stream says, and whether it said that it was done."""
    parser, merge, done = SseParser(), ChunkMerge(), False
    for piece in pieces:
        events = parser.feed(piece)
        if b"[DONE]" in events:
            done = True
            events.remove(b"[DONE]")
        chunks, error = decode_chunks(events)
        assert error is None
        merge.add(chunks)
    return merge, done


def outcome(merge: ChunkMerge) -> tuple[object, ...]:
    message = merge.message()
    return (encode_message(message), merge.finish_reason, merge.usage, merge.error, merge.generation_id, merge.model)


def check_every_cut(body: bytes) -> ChunkMerge:
    whole, done = merge_stream([body])
    expected = outcome(whole)
    single = merge_stream(body[i : i + 1] for i in range(len(body)))
    assert (outcome(single[0]), single[1]) == (expected, done)
    for place in range(1, len(body)):
        merge, again = merge_stream([body[:place], body[place:]])
        assert (outcome(merge), again) == (expected, done), place
    return whole


# --- our own bodies ---------------------------------------------------------------------------------------------------


def test_plain() -> None:
    """Every field of a plain reply arrives, what is to be echoed byte for byte."""
    reply = decode_completion(golden("plain"))
    assert (reply.id, reply.model, reply.provider) == ("gen-1700000001-golden", "maker/model-2", "Maker")
    assert (reply.created, reply.service_tier, reply.system_fingerprint) == (1_700_000_001, "default", None)
    (choice,) = reply.choices or []
    assert (choice.finish_reason, choice.native_finish_reason, choice.index) == ("stop", "end_turn", 0)
    message = to_message(choice.message)  # type: ignore[arg-type]
    assert message.content == 'Grüße – 🚀 A\n"x"'
    assert message.reasoning == "because"
    assert bytes(message.reasoning_details) == (  # type: ignore[arg-type]
        b'[{"type":"reasoning.text","text":"because","signature":"c2ln","format":"anthropic-claude-v1","index":0}]'
    )
    assert bytes(message.annotations).endswith(b'"start_index":0,"end_index":1.50}}]')  # type: ignore[arg-type]
    usage = reply.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (21, 14, 35)
    assert usage.cost == Decimal("0.0000057")
    assert usage.cost_details is not None
    assert usage.cost_details.upstream_inference_prompt_cost == Decimal("1e-7")
    assert usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details.reasoning_tokens) == (2, 3)


def test_the_older_form() -> None:
    """The order of before 2026, without cost and details: unknown is None."""
    reply = decode_completion(golden("plain-old"))
    assert reply.usage is not None
    assert (reply.usage.total_tokens, reply.usage.cost, reply.usage.cost_details) == (3, None, None)
    assert to_message(reply.choices[0].message) == AssistantMessage(content="")  # type: ignore[index, arg-type]


def test_tools_within_padding() -> None:
    """Padding around the JSON is nothing; null content and missing arguments stay what they are."""
    reply = decode_completion(golden("tools-padded"))
    message = to_message(reply.choices[0].message)  # type: ignore[index, arg-type]
    assert message.content is None
    assert message.tool_calls == [
        ToolCall("call_1", FunctionCall("f", '{"a":"ü"}')),
        ToolCall("call_2", FunctionCall("g", "")),
    ]
    assert reply.usage is not None
    assert reply.usage.cost == Decimal("0.0000001")


def test_errors_within_a_200() -> None:
    """An error object, padding alone and an error in the choice are raised, with their codes and what had come."""
    with pytest.raises(ProviderError, match="The operation was aborted") as aborted:
        decode_completion(golden("error-in-200"))
    assert (aborted.value.status, aborted.value.code) == (200, 504)
    with pytest.raises(ProviderError, match="timed out") as padding:
        decode_completion(golden("padding-only"))
    assert (padding.value.code, padding.value.maybe_billed) == (504, True)
    with pytest.raises(ProviderError, match="Upstream went away") as failed:
        decode_completion(golden("choice-error"))
    assert (failed.value.code, failed.value.generation_id) == (502, "gen-1700000001-golden")
    assert failed.value.metadata == {"provider_name": "Maker"}
    assert failed.value.partial is not None
    assert (failed.value.partial.text, failed.value.partial.interrupted) == ("half an ans", True)


def test_the_page_of_an_edge() -> None:
    """An HTML page is summed up by its title."""
    error = decode_error(502, [], body=golden("edge-502"), now_s=NOW_S)
    assert isinstance(error, ProviderError)
    assert (error.message, error.code) == ("golden.example | 502: Bad gateway", 502)
    with pytest.raises(DecodeError):
        decode_completion(golden("edge-502"))


@pytest.mark.parametrize("name", ["plain", "plain-old", "tools-padded", "error-in-200", "choice-error"])
def test_a_body_that_is_cut_is_never_an_answer(name: str) -> None:
    """Each shorter part of a body is a typed error."""
    body = golden(name).rstrip()
    for place in range(len(body)):
        with pytest.raises(GorouterError):
            decode_completion(body[:place])


def test_stream_of_text() -> None:
    """Text, finish and usage of a stream, at every cut."""
    merge = check_every_cut(golden("stream-text"))
    assert merge.message() == AssistantMessage(content="Ebbe: 04:12 ☂")
    assert (merge.finish_reason, merge.native_finish_reason, merge.generation_id) == (
        "stop", "stop", "gen-1700000003-golden",
    )  # fmt: skip
    assert merge.usage is not None
    assert (merge.usage.total_tokens, merge.usage.cost) == (20, Decimal("0.0000057"))


def test_stream_of_tools() -> None:
    """Reasoning and two interleaved calls, at every cut."""
    merge = check_every_cut(golden("stream-tools"))
    message = merge.message()
    assert message.content is None
    assert message.reasoning == "Two, then."
    assert json.loads(bytes(message.reasoning_details)) == [  # type: ignore[arg-type]
        {
            "type": "reasoning.text",
            "text": "Two, then.",
            "format": "anthropic-claude-v1",
            "index": 0,
            "signature": "c2ln",
        }
    ]
    assert message.tool_calls == [
        ToolCall("call_1", FunctionCall("f", '{"a": "\\""}')),
        ToolCall("call_2", FunctionCall("g", "{}")),
    ]
    assert (merge.finish_reason, merge.native_finish_reason) == ("tool_calls", "tool_use")


def test_stream_with_an_error() -> None:
    """The error of a stream, and the text before it, at every cut."""
    merge = check_every_cut(golden("stream-error"))
    assert merge.error is not None
    assert (merge.error.code, merge.error.message) == (502, "Provider disconnected unexpectedly")
    assert merge.message().content == "The first lock"


def test_stream_that_is_cut() -> None:
    """A stream without its end is not finished, wherever it was cut, and its text is a start of the text."""
    body = golden("stream-text")
    end = body.index(b'"finish_reason":"stop"')
    for place in range(end):
        merge, done = merge_stream([body[:place]])
        assert merge.finish_reason is None
        assert not done
        assert "Ebbe: 04:12 ☂".startswith(str(merge.message().content))
    assert check_every_cut(golden("stream-cut")).finish_reason is None


# --- bodies as the API sends them, where they are at hand -------------------------------------------------------------


@pytest.fixture(scope="module")
def examples(reference_dir: Path) -> Path:
    return reference_dir / "openrouter" / "examples"


def reply_of(examples: Path, name: str) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    index = json.loads((examples / "index.json").read_bytes())[name]
    headers = [(key.encode(), value.encode()) for key, value in index["headers"]]
    return index["status"], headers, (examples / f"{name}.body").read_bytes()


def error_of(examples: Path, name: str) -> ApiError:
    status, headers, body = reply_of(examples, name)
    return decode_error(status, headers, body=body, now_s=NOW_S)


def test_example_plain(examples: Path) -> None:
    """01: a plain reply."""
    reply = decode_completion(reply_of(examples, "01-plain")[2])
    assert to_message(reply.choices[0].message) == AssistantMessage(  # type: ignore[index, arg-type]
        content="The harbour opens at 06:00 – bring the blue permit."
    )
    assert reply.usage is not None
    assert (reply.usage.total_tokens, reply.usage.cost) == (35, Decimal("0.000273"))


def test_example_tools(examples: Path) -> None:
    """02: a padded reply that calls a tool."""
    reply = decode_completion(reply_of(examples, "02-tool-call-padded")[2])
    assert to_message(reply.choices[0].message).tool_calls == [  # type: ignore[index, arg-type]
        ToolCall("call_Vw1kQm82ZpLs", FunctionCall("tide_at", '{"port":"Aber","day":"2026-11-23"}'))
    ]


def test_example_streams(examples: Path) -> None:
    """03, 04, 05: streams of text, of parallel tools, and with an error, at every cut."""
    text = check_every_cut(reply_of(examples, "03-stream-text")[2])
    assert text.message().content == "Low tide at 04:12."
    assert text.usage is not None
    assert text.usage.cost == Decimal("0.0000057")
    tools = check_every_cut(reply_of(examples, "04-stream-parallel-tools")[2]).message()
    assert tools.tool_calls == [
        ToolCall("toolu_01AberQ7", FunctionCall("tide_at", '{"port": "Aber"}')),
        ToolCall("toolu_01Bude9K", FunctionCall("tide_at", '{"port": "Bude"}')),
    ]
    assert json.loads(bytes(tools.reasoning_details))[0]["signature"] == "EqoBCkgIARABGAIiQH"  # type: ignore[arg-type]
    broken = check_every_cut(reply_of(examples, "05-stream-error-mid")[2])
    assert broken.error is not None
    assert (broken.error.code, broken.message().content) == (502, "The first lock")


def test_example_errors(examples: Path) -> None:
    """06 to 13: every error has its class, code, wait and metadata."""
    with pytest.raises(ProviderError) as aborted:
        decode_completion(reply_of(examples, "06-error-in-200")[2])
    assert (aborted.value.status, aborted.value.code) == (200, 504)
    expected: dict[str, tuple[type[ApiError], int, float | None]] = {
        "07-402-credits": (InsufficientCreditsError, 402, None),
        "08-402-in-flight": (InsufficientCreditsError, 402, 120.0),
        "09-429-upstream": (RateLimitError, 429, 1.0),
        "10-429-free-daily": (RateLimitError, 429, 1_795_305_600.0 - NOW_S),
        "11-403-moderation": (ModerationError, 403, None),
        "12-502-provider": (ProviderError, 502, None),
        "13-401": (AuthenticationError, 401, None),
    }
    for name, (kind, code, wait_s) in expected.items():
        error = error_of(examples, name)
        assert (type(error), error.status, error.code, error.retry_after_s) == (kind, code, code, wait_s), name
    assert error_of(examples, "08-402-in-flight").metadata["limit_source"] == "openrouter_in_flight_budget"
    assert "temporarily rate-limited upstream" in error_of(examples, "09-429-upstream").message
    assert error_of(examples, "09-429-upstream").generation_id == "gen-1795300009-Cw7TgBo4HyE1lPzXn6Qj"
    assert error_of(examples, "11-403-moderation").metadata["reasons"] == ["violence"]
    assert error_of(examples, "13-401").generation_id is None


def test_example_services(examples: Path) -> None:
    """14 to 16: models with prices, the key, the credits."""
    (model,) = decode_models(reply_of(examples, "14-models")[2])
    assert model.id == "openai/gpt-4o-mini"
    assert model.pricing is not None
    assert (model.pricing.prompt, model.pricing.request) == (Decimal("0.00000015"), None)
    key = decode_key(reply_of(examples, "15-key")[2])
    assert (key.limit, key.limit_remaining, key.is_free_tier) == (Decimal(25), Decimal("19.75"), False)
    account = decode_credits(reply_of(examples, "16-credits")[2])
    assert (account.total_credits, account.total_usage) == (Decimal(50), Decimal("41.5"))


@pytest.mark.parametrize("odd", [b"-5", b"1e999", b"1000000000000"])
def test_a_generation_that_cost_no_amount_of_money(odd: bytes) -> None:
    """What a lost answer cost is unknown where it is no money: a budget must not gain by it. So it is with counts."""
    body = b'{"data":{"id":"g","total_cost":%b,"usage":0.5,"native_tokens_prompt":%b,"tokens_prompt":7}}'
    found = decode_generation(body % (odd, odd if b"e" not in odd else b"-1"))
    assert (found.total_cost, found.usage) == (None, Decimal("0.5"))
    assert (found.native_tokens_prompt, found.tokens_prompt) == (None, 7)


def test_example_bodies_are_whole_or_errors(examples: Path) -> None:
    """Each shorter part of the JSON bodies is a typed error, of the replies as of the services."""
    decoders: dict[str, Callable[[bytes], object]] = {
        "01-plain": decode_completion,
        "02-tool-call-padded": decode_completion,
        "06-error-in-200": decode_completion,
        "14-models": decode_model_page,
        "15-key": decode_key,
        "16-credits": decode_credits,
    }
    for name, decode in decoders.items():
        body = reply_of(examples, name)[2]
        for place in range(len(body)):
            with pytest.raises(GorouterError):
                decode(body[:place])


def test_example_errors_that_are_cut(examples: Path) -> None:
    """An error whose body is cut keeps its class, its status, its wait and its generation, by the head alone."""
    for name in sorted(path.stem for path in examples.glob("*.body") if path.stem[:2] in {*ERROR_NUMBERS}):
        status, headers, body = reply_of(examples, name)
        whole = decode_error(status, headers, body=body, now_s=NOW_S)
        kind = PermissionDeniedError if isinstance(whole, ModerationError) else type(whole)
        for place in range(len(body)):
            cut = decode_error(status, headers, body=body[:place], now_s=NOW_S)
            assert (type(cut), cut.status, cut.code) == (kind, status, status)
            assert (cut.retry_after_s, cut.generation_id) == (whole.retry_after_s, whole.generation_id)
            assert cut.message


ERROR_NUMBERS = ("07", "08", "09", "10", "11", "12", "13")


def test_example_streams_that_are_cut(examples: Path) -> None:
    """A stream that is cut anywhere before its finish is not finished, and what it says is a start of the whole."""
    for name in ("03-stream-text", "04-stream-parallel-tools", "05-stream-error-mid"):
        body = reply_of(examples, name)[2]
        whole, _ = merge_stream([body])
        end = body.index(b'"finish_reason":"')
        for place in range(end):
            merge, done = merge_stream([body[:place]])
            message, complete = merge.message(), whole.message()
            assert (merge.finish_reason, done) == (None, False)
            assert str(complete.content or "").startswith(str(message.content or ""))
            assert str(complete.reasoning or "").startswith(str(message.reasoning or ""))
            for part, call in zip(message.tool_calls or (), complete.tool_calls or (), strict=False):
                assert call.function.arguments.startswith(part.function.arguments)


def test_every_field_of_the_example_services(examples: Path) -> None:
    """No field of the captured model, key or usage is lost: each has a typed place."""
    page = decode_model_page(reply_of(examples, "14-models")[2])
    assert (page.total_count, page.links.next if page.links else "") == (1, None)
    key = decode_key(reply_of(examples, "15-key")[2])
    for name, typed, dropped in (("14-models", page.data[0], set()), ("15-key", key, {"rate_limit"})):
        data = json.loads(reply_of(examples, name)[2])["data"]
        fields = data[0] if isinstance(data, list) else data
        assert set(fields) - dropped <= set(typed.__struct_fields__), name
        for field, value in fields.items():
            if isinstance(value, (str, bool, int)) and field not in dropped:
                assert getattr(typed, field) == value, (name, field)
    usage = decode_completion(reply_of(examples, "01-plain")[2]).usage
    assert usage is not None
    assert set(json.loads(reply_of(examples, "01-plain")[2])["usage"]) <= set(usage.__struct_fields__)


def test_absent_raw_fields_stay_absent() -> None:
    """Fields that a reply lacks, or has as null, are not made up for the echo."""
    body = b'{"choices":[{"message":{"content":"x","annotations":null,"reasoning_details":null,"images":[]}}]}'
    message = to_message(decode_completion(body).choices[0].message)  # type: ignore[index, arg-type]
    assert message.annotations is UNSET
    assert encode_message(message) == b'{"role":"assistant","content":"x","images":[]}'
