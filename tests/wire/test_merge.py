"""Chunks of a stream merged into one message, in every form that the wire has been seen to take."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from types import EllipsisType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from gorouter_trio.wire.codec import decode_chunk, encode_json
from gorouter_trio.wire.merge import ChunkMerge
from gorouter_trio.wire.messages import AssistantMessage, FunctionCall, ToolCall


def chunk(delta: dict[str, Any] | None = None, *, finish: str | None = None, **top: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": "", **(delta or {})}, "finish_reason": finish}
    return {"id": "gen-1", "model": "m/x-2026", "provider": "P", "choices": [choice], **top}


def merged(*chunks: dict[str, Any]) -> ChunkMerge:
    merge = ChunkMerge()
    for each in chunks:
        merge.add([decode_chunk(json.dumps(each).encode())])
    return merge


def calls(*deltas: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The calls that tool-call deltas make, as id, name, arguments."""
    message = merged(*(chunk({"content": None, "tool_calls": delta}) for delta in deltas)).message()
    return [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or []]


def piece(arguments: str | EllipsisType | None = None, *, index: int | None = 0, **rest: Any) -> dict[str, Any]:
    """One entry of `tool_calls`; `name` goes where it belongs."""
    function = {k: v for k, v in (("name", rest.pop("name", ...)), ("arguments", arguments)) if v is not ...}
    entry: dict[str, Any] = {"function": function, **rest}
    return entry if index is None else {"index": index, **entry}


def first(name: str, call_id: str, arguments: str = "", *, index: int | None = 0) -> dict[str, Any]:
    return piece(arguments, index=index, id=call_id, type="function", name=name)


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_is_joined_and_the_role_is_not() -> None:
    """Content is appended, the role of every delta assigned; empty and null content add nothing."""
    merge = merged(
        chunk({"content": ""}), chunk({"content": "Low"}), chunk({"content": None}), chunk({"content": " tide"})
    )
    assert merge.message() == AssistantMessage(content="Low tide")
    assert (merge.generation_id, merge.model, merge.provider) == ("gen-1", "m/x-2026", "P")


def test_a_long_text_takes_its_length() -> None:
    """Thousands of pieces, of what is said and of what was thought, are not kept as so many objects; none is lost."""
    said = [f"{number} " for number in range(5_000)]
    merge = ChunkMerge()
    for position, each in enumerate(said):
        merge.add([decode_chunk(json.dumps(chunk({"content": each, "reasoning": each.upper() + "."})).encode())])
        if position == 2_500:
            assert merge.message().content == "".join(said[:2_501])
    assert len(merge._text) < 300
    assert len(merge._reasoning) < 300
    message = merge.message()
    assert message.content == "".join(said)
    assert message.reasoning == "".join(each + "." for each in said)


def test_the_finish_comes_twice() -> None:
    """The second finish changes nothing, and the usage that comes with it is taken."""
    usage = {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20, "cost": 0.0000057}
    merge = merged(
        chunk({"content": "hi"}),
        chunk(finish="stop"),
        chunk(finish="stop", usage=usage, service_tier="default"),
    )
    assert merge.finish_reason == "stop"
    assert merge.usage is not None
    assert (merge.usage.total_tokens, merge.usage.cost) == (20, Decimal("0.0000057"))
    assert merge.message().content == "hi"


@pytest.mark.parametrize(
    "last",
    [
        [chunk(finish="stop", usage={"total_tokens": 3})],
        [chunk(finish="stop"), {"id": "gen-1", "choices": [], "usage": {"total_tokens": 3}}],
        [chunk(finish="stop"), {"choices": None, "usage": {"total_tokens": 3}}],
        [chunk(finish="stop"), {"usage": {"total_tokens": 3}}],
        [{"choices": [], "usage": {"total_tokens": 3}}, chunk(finish="stop")],
        [chunk(finish="stop"), chunk(finish="stop", usage={"total_tokens": 3}), chunk(usage=None)],
    ],
    ids=["with the finish", "empty choices", "null choices", "no choices", "before the finish", "null after it"],
)
def test_usage_in_each_place(last: list[dict[str, Any]]) -> None:
    """Usage comes with the finish, in a chunk of its own, or before; a null after it takes nothing away."""
    merge = merged(chunk({"content": "a"}), *last)
    assert merge.usage is not None
    assert merge.usage.total_tokens == 3
    assert merge.finish_reason == "stop"


def test_the_first_finish_decides_and_an_empty_one_is_none() -> None:
    """`finish_reason` of "" is not a finish; a later reason does not replace the first."""
    assert merged(chunk({"content": "a"}, finish="")).finish_reason is None
    assert merged(chunk(finish=""), chunk(finish="tool_calls"), chunk(finish="stop")).finish_reason == "tool_calls"


def test_head_fields_that_come_late() -> None:
    """A first chunk without id or model (a debug echo) does not hide those that follow."""
    merge = merged({"choices": [], "model": None}, chunk({"content": "x"}))
    assert (merge.generation_id, merge.model, merge.provider) == ("gen-1", "m/x-2026", "P")


def test_amounts_that_are_no_money_are_unknown() -> None:
    """NaN from a provider reaches neither the result nor a store."""
    merge = merged(chunk(finish="stop", usage={"cost": "NaN", "prompt_tokens": -4, "completion_tokens": 5}))
    assert merge.usage is not None
    assert (merge.usage.cost, merge.usage.prompt_tokens, merge.usage.completion_tokens) == (None, None, 5)


# --- tool calls -------------------------------------------------------------------------------------------------------


def test_pieces_interleave() -> None:
    """Pieces go to the call of their index, several in one delta, cut anywhere, escapes included."""
    assert calls(
        [first("tide_at", "a")],
        [piece('{"port": "Ab')],
        [first("tide_at", "b", index=1)],
        [piece('{"port": ', index=1)],
        [piece("er\\"), piece('"Bude"}', index=1)],
        [piece('""}')],
    ) == [("a", "tide_at", '{"port": "Aber\\""}'), ("b", "tide_at", '{"port": "Bude"}')]


def test_a_whole_call_in_one_delta() -> None:
    """Two whole calls in one delta are two calls."""
    assert calls([first("f", "a", '{"x":1}'), first("g", "b", "{}", index=1)]) == [
        ("a", "f", '{"x":1}'),
        ("b", "g", "{}"),
    ]


@pytest.mark.parametrize("blank", ["", None], ids=["empty", "null"])
def test_ids_and_names_resent_blank(blank: str | None) -> None:
    """Blank ids, names and types in later pieces do not replace what came first."""
    later = piece(":1}", id=blank, type=blank, name=blank)
    assert calls([first("f", "a", '{"x"')], [later]) == [("a", "f", '{"x":1}')]


def test_id_and_name_resent_with_every_piece() -> None:
    """A backend that repeats id and name with every fragment still makes one call."""
    pieces = ["", '{"x"', ":", '{"y": "}"', "}", "}", ""]
    assert calls(*[[first("f", "a", text)] for text in pieces]) == [("a", "f", '{"x":{"y": "}"}}')]


def test_index_and_id_reused_for_parallel_calls() -> None:
    """Another name, or the same with arguments after complete ones, under one index and id is another call."""
    assert calls(
        [first("f", "a")], [piece('{"x":1}')], [first("g", "a")], [piece('{"y":2}')], [first("g", "a", '{"y":3}')]
    ) == [("a", "f", '{"x":1}'), ("a_1", "g", '{"y":2}'), ("a_2", "g", '{"y":3}')]


def test_the_same_call_again_in_two_steps() -> None:
    """The same name again without arguments opens a call only when arguments follow."""
    again = [[first("f", "a", '{"x":1}')], [first("f", "a")]]
    assert calls(*again) == [("a", "f", '{"x":1}')]
    assert calls(*again, [piece('{"x":2}')]) == [("a", "f", '{"x":1}'), ("a_1", "f", '{"x":2}')]


def test_calls_without_arguments() -> None:
    """Missing, null and empty arguments are the empty text, also when the next call reuses the index."""
    assert calls(
        [piece(..., id="a", name="f")], [first("g", "a")], [first("h", "b", index=1)], [piece(None, index=1)]
    ) == [
        ("a", "f", ""),
        ("a_1", "g", ""),
        ("b", "h", ""),
    ]


def test_missing_indices_mean_the_position() -> None:
    """Without an index the position in the delta counts, and an id where there is one."""
    assert calls(
        [first("f", "a", "{", index=None), first("g", "b", "{", index=None)],
        [piece("}", index=None), piece('"k":1}', index=None)],
    ) == [("a", "f", "{}"), ("b", "g", '{"k":1}')]
    assert calls(
        [first("f", "a", "{", index=None)],
        [first("f", "b", "{", index=None)],
        [piece('"k":', index=None, id="a")],
        [piece('"m":', index=None, id="b")],
        [piece("2}", index=None)],
        [piece("1}", index=None, id="a")],
    ) == [("a", "f", '{"k":1}'), ("b", "f", '{"m":2}')]


def test_an_id_that_changes_with_every_piece() -> None:
    """A nameless piece with a new id belongs to the call of its index."""
    (call,) = calls([first("f", "a", '{"x"')], [piece(":1", id="b")], [piece("}", id="c")])
    assert call[1:] == ("f", '{"x":1}')


def test_a_call_without_an_id_gets_one_of_its_own() -> None:
    """Missing ids are made up from the position, and never come twice."""
    assert calls([piece("{}", name="f")], [piece("{}", name="g", index=1)], [first("h", "call_1", "{}", index=2)]) == [
        ("call_0", "f", "{}"),
        ("call_1", "g", "{}"),
        ("call_1_2", "h", "{}"),
    ]


def test_function_null_or_missing() -> None:
    """An entry without a function carries its id and no more."""
    assert calls([{"index": 0, "id": "a"}], [{"index": 0, "function": None}], [piece("{}", name="f")]) == [
        ("a", "f", "{}")
    ]


def test_content_of_a_message_that_calls() -> None:
    """Null content beside calls stays null, text stays text."""
    silent = merged(chunk({"content": None, "tool_calls": [first("f", "a", "{}")]})).message()
    assert silent.content is None
    assert silent.tool_calls == [ToolCall("a", FunctionCall("f", "{}"))]
    spoken = merged(chunk({"content": "Let me see."}), chunk({"tool_calls": [first("f", "a", "{}")]})).message()
    assert spoken.content == "Let me see."


@given(
    texts=st.lists(
        st.dictionaries(
            st.text(max_size=3), st.text(max_size=4) | st.integers() | st.lists(st.text(max_size=2), max_size=2)
        ),
        min_size=1,
        max_size=4,
    ),
    resend=st.booleans(),
    data=st.data(),
)
def test_arguments_survive_any_cut(texts: list[dict[str, Any]], resend: bool, data: st.DataObject) -> None:
    """Any arguments, cut anywhere and interleaved in any order, come out as they went in."""
    whole = [json.dumps(arguments) for arguments in texts]
    rest = [_fragments(text, data) for text in whole]
    deltas = [[first(f"f{i}", f"id{i}", index=i)] for i in range(len(whole))]
    while any(rest):
        i = data.draw(st.sampled_from([i for i, left in enumerate(rest) if left]))
        again = {"id": f"id{i}", "name": f"f{i}"} if resend else {}
        deltas.append([piece(rest[i].pop(0), index=i, **again)])
    assert calls(*deltas) == [(f"id{i}", f"f{i}", text) for i, text in enumerate(whole)]


def _fragments(text: str, data: st.DataObject) -> list[str]:
    edges = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True) if a < b]


# --- reasoning --------------------------------------------------------------------------------------------------------


def details(*pieces: dict[str, Any] | Any) -> list[dict[str, Any]]:
    raw = merged(*(chunk({"reasoning_details": [p]}) for p in pieces)).message().reasoning_details
    return [] if raw is UNSET else json.loads(bytes(raw))


def test_reasoning_merges_by_index_and_type() -> None:
    """Text is appended within one index and type, and a signature alone in a later delta belongs to its block."""
    text = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
    assert details(
        {**text, "text": "Two ports,"},
        {"type": "reasoning.summary", "summary": "a", "index": 0},
        {**text, "text": " two calls."},
        {"type": "reasoning.summary", "summary": "b", "index": 0},
        {**text, "index": 1, "text": "other"},
        {**text, "signature": "EqoB"},
    ) == [
        {**text, "text": "Two ports, two calls.", "signature": "EqoB"},
        {"type": "reasoning.summary", "summary": "ab", "index": 0},
        {**text, "index": 1, "text": "other"},
    ]


def test_the_order_of_fields_and_what_is_no_text_stay_as_they_came() -> None:
    """Fields keep the order of their first coming and their bytes: numbers are not rewritten."""
    merge = ChunkMerge()
    merge.add(
        [
            decode_chunk(
                b'{"id":"g","choices":[{"delta":{"reasoning_details":[{"type":"reasoning.encrypted","data":"ab","x":1.50,"index":0,'
                b'"big":123456789012345678901234567890}]}}]}'
            )
        ]
    )
    merge.add(
        [
            decode_chunk(
                b'{"choices":[{"delta":{"reasoning_details":[{"index":0,"type":"reasoning.encrypted","data":"cd"}]}}]}'
            )
        ]
    )
    assert bytes(merge.message().reasoning_details) == (  # type: ignore[arg-type]
        b'[{"type":"reasoning.encrypted","data":"abcd","x":1.50,"index":0,"big":123456789012345678901234567890}]'
    )


def test_null_never_replaces_a_value() -> None:
    """The last signature that is not null counts; null stands only where nothing else came."""
    text = {"type": "reasoning.text", "index": 0}
    assert details(
        {**text, "text": "a", "signature": None}, {**text, "signature": "s1"}, {**text, "signature": None}
    ) == [{**text, "text": "a", "signature": "s1"}]
    assert details({**text, "text": None}) == [{**text, "text": None}]


def test_details_without_an_index() -> None:
    """Texts without an index continue the one before until it is signed; encrypted ones are whole."""
    text, blob = {"type": "reasoning.text"}, {"type": "reasoning.encrypted"}
    assert details(
        {**text, "text": "a"}, {**text, "text": "b", "signature": "s"}, {**text, "text": "c"},
        {**blob, "data": "x"}, {**blob, "data": "y"},
    ) == [
        {**text, "text": "ab", "signature": "s"}, {**text, "text": "c"}, {**blob, "data": "x"}, {**blob, "data": "y"},
    ]  # fmt: skip


@pytest.mark.parametrize("odd", [1, "x", None, [], {"index": [1], "type": {"a": 1}, "text": 5}], ids=repr)
def test_odd_details_do_no_harm(odd: Any) -> None:
    """Details of another form than expected neither raise nor spoil the others."""
    good = {"type": "reasoning.text", "index": 7, "text": "kept"}
    assert good in details(odd, good, odd)


def test_reasoning_text_is_joined() -> None:
    """`reasoning` is the visible text, apart from the details that repeat it."""
    merge = merged(chunk({"reasoning": "Two "}), chunk({"reasoning": "calls."}), chunk({"reasoning": ""}))
    assert merge.message().reasoning == "Two calls."
    assert merge.message().reasoning_details is UNSET


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_refusal_annotations_images() -> None:
    """A refusal is joined; annotations and images are collected as they came."""
    merge = merged(
        chunk({"annotations": [{"type": "url_citation", "n": 1}]}),
        chunk({"refusal": "I can"}),
        chunk({"refusal": "not."}),
        chunk({"annotations": [{"type": "file"}], "images": [{"image_url": {"url": "data:,"}}]}),
    )
    message = merge.message()
    assert message.refusal == "I cannot."
    assert bytes(message.annotations) == b'[{"type": "url_citation", "n": 1},{"type": "file"}]'  # type: ignore[arg-type]
    assert bytes(message.images) == b'[{"image_url": {"url": "data:,"}}]'  # type: ignore[arg-type]


def test_audio_in_pieces() -> None:
    """Audio data and transcript are appended, id and expiry set."""
    merge = merged(
        chunk({"audio": {"id": "a1", "transcript": "He"}}),
        chunk({"audio": {"data": "AAAA"}}),
        chunk({"audio": {"data": "BBBB", "transcript": "llo", "expires_at": 9}}),
        chunk({"audio": None}),
    )
    assert json.loads(bytes(merge.message().audio)) == {  # type: ignore[arg-type]
        "id": "a1", "transcript": "Hello", "data": "AAAABBBB", "expires_at": 9,
    }  # fmt: skip


def test_content_in_parts() -> None:
    """Content that comes as parts is kept as parts, after text that came before."""
    part = {"type": "text", "text": "b"}
    parts = merged(chunk({"content": "a"}), chunk({"content": [part]})).message().content
    assert isinstance(parts, list)
    assert [json.loads(bytes(p)) for p in parts] == [{"type": "text", "text": "a"}, part]


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "x"},
        {"content": [{"type": "text"}]},
        {"reasoning": "x"},
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"tool_calls": [first("f", "a")]},
        {"refusal": "x"},
        {"images": [{}]},
        {"annotations": [{}]},
        {"audio": {"id": "a"}},
    ],
    ids=lambda delta: next(iter(delta)),
)
def test_everything_a_consumer_sees_is_data(delta: dict[str, Any]) -> None:
    """After any of these a request may not be sent again."""
    assert not merged(chunk(), chunk(finish="stop")).has_data
    assert merged(chunk(delta)).has_data


@pytest.mark.parametrize(
    ("error_chunk", "message", "code"),
    [
        (chunk(finish="error", error={"code": 502, "message": "gone"}), "gone", 502),
        ({"error": {"code": "server_error", "message": "gone"}, "choices": []}, "gone", "server_error"),
        ({"error": {"message": "gone"}}, "gone", None),
        ({"error": {"code": 400, "message": "gone", "metadata": {"raw": {}}}, "choices": None}, "gone", 400),
        ({"error": "gone"}, "gone", None),
        ({"choices": [{"delta": {}, "error": {"code": 429.0, "message": "gone"}}]}, "gone", 429),
        (chunk({"content": ""}, usage={"cost": 1}, error={"code": 503, "message": "gone"}), "gone", 503),
    ],
    ids=["top level", "empty choices", "bare", "null choices", "text", "in the choice", "with usage"],
)
def test_errors_in_every_variant(error_chunk: dict[str, Any], message: str, code: object) -> None:
    """An error is found wherever it stands, and what came before it stays readable."""
    merge = merged(chunk({"content": "The first"}), error_chunk)
    assert merge.error is not None
    assert (merge.error.message, merge.error.code) == (message, code)
    assert merge.message().content == "The first"


def test_an_error_without_an_error_object() -> None:
    """A finish of "error" alone is kept as the finish reason, with the provider's word for it."""
    last = chunk(finish="error")
    last["choices"][0]["native_finish_reason"] = "MALFORMED_FUNCTION_CALL"
    merge = merged(chunk({"content": "x"}), last)
    assert merge.error is None
    assert (merge.finish_reason, merge.native_finish_reason) == ("error", "MALFORMED_FUNCTION_CALL")


def test_choices_and_deltas_that_are_missing() -> None:
    """Null or absent choices and deltas are passed over."""
    merge = merged({"id": "g"}, {"choices": [{"delta": None}]}, {"choices": [{}]}, chunk({"content": "x"}))
    assert merge.message().content == "x"


def test_text_that_is_no_text_is_left_out() -> None:
    """Raw JSON that is not UTF-8, or holds half a surrogate pair, is left out and raises nothing."""
    merge = ChunkMerge()
    for bad in (b'"\xff"', b'"\\ud800"'):
        merge.add(
            [
                decode_chunk(
                    b'{"id":"g","choices":[{"delta":{"annotations":[{"a":%b}],"reasoning_details":[{"type":"reasoning.text","text":%b,'
                    b'"signature":%b}],"audio":{"data":%b}}}]}' % (bad, bad, bad, bad)
                )
            ]
        )
    encode_json(merge.message()).decode()


def test_merging_is_linear_in_what_arrives() -> None:
    """20,000 pieces of everything that is appended are merged in the time of a few of them, not of their square."""
    many = 20_000
    deltas: list[dict[str, Any]] = [
        {"reasoning_details": [{"type": "reasoning.text", "text": "x" * 40, "index": 0}]},
        {"audio": {"data": "A" * 40}},
        {"tool_calls": [first("f", "a", '{"k' if i == 0 else "x" * 40) for i in range(1)]},
    ]
    chunks = [decode_chunk(json.dumps(chunk(delta)).encode()) for delta in deltas]
    more = decode_chunk(json.dumps(chunk({"tool_calls": [first("f", "a", "x" * 40)]})).encode())
    chunks[2], opening = more, chunks[2]
    merge = ChunkMerge()
    merge.add([opening])
    started = time.process_time()
    for _ in range(many):
        merge.add(chunks)
    message = merge.message()
    assert time.process_time() - started < 5
    assert len(bytes(message.reasoning_details)) > 40 * many  # type: ignore[arg-type]
    assert message.tool_calls[0].function.arguments == '{"k' + "x" * 40 * many  # type: ignore[index]
