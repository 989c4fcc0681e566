"""The judge of histories: everything refused is named with who refuses it, and nothing else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio.session.transcript import Transcript
from gorouter_trio.testing.history import PROVIDERS, InvalidHistoryError, Provider, check_history, validate_history
from gorouter_trio.wire.codec import encode_json, encode_message, encode_prompt
from gorouter_trio.wire.journal import TurnAnswered, TurnStarted
from gorouter_trio.wire.messages import (
    AssistantMessage,
    FunctionCall,
    Message,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gorouter_trio.wire.result import CallRecord, HistoryEntry

ALL = "[openai, anthropic, deepseek]"
Json = dict[str, object]


def user(content: object = "hello") -> Json:
    return {"role": "user", "content": content}


def call(call_id: object = "call_a", name: object = "look", arguments: object = "{}") -> Json:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: object, content: object = None) -> Json:
    return {"role": "assistant", "content": content, "tool_calls": list(calls or (call(),))}


def result(call_id: object = "call_a", content: object = "found") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def said(content: object = "done") -> Json:
    return {"role": "assistant", "content": content}


SYSTEM: Json = {"role": "system", "content": "be brief"}

VALID: dict[str, list[Json]] = {
    "nothing": [],
    "a question": [user()],
    "a prefill": [user(), said("Well, ")],
    "instructions in the middle": [user(), said(), SYSTEM, user()],
    "a developer": [{"role": "developer", "content": "x"}, user()],
    "two users in a row": [user(), user()],
    "one call": [user(), calling(), result(), said()],
    "calls answered out of order": [user(), calling(call("a"), call("b")), result("b"), result("a"), said()],
    "rounds of calls": [user(), calling(call("a")), result("a"), calling(call("b")), result("b"), user("go on")],
    "call with text": [user(), calling(content="let me see"), result()],
    "call with an empty text": [user(), calling(content=""), result()],
    "an empty result": [user(), calling(), result(content="")],
    "a result in parts": [user(), calling(), result(content=[{"type": "text", "text": "x"}])],
    "a result without parts": [user(), calling(), result(content=[])],
    "arguments never written": [user(), calling(call(arguments="")), result()],
    "null for no calls": [user(), {**said(), "tool_calls": None}],
    "an image": [user([{"type": "image_url", "image_url": {"url": "data:,"}}])],
    "a blank part beside a full one": [user([{"type": "text", "text": " "}, {"type": "text", "text": "x"}])],
    "a drawn answer": [user(), {**said(""), "images": [{"type": "image_url"}]}, user()],
    "an id of forty characters": [user(), calling(call("c" * 40)), result("c" * 40)],
}

# Name, messages, index of the line, its text, who refuses.
REFUSED: list[tuple[str, list[Json], int, str, str]] = [
    ("no answer", [user(), calling()], 1, "the call 'call_a' has no answer directly after it", ALL),
    ("no answer before a question", [user(), calling(), user()], 1, "no answer directly after it", ALL),
    ("one of two answered", [user(), calling(call("a"), call("b")), result("b")], 1, "call 'a' has no answer", ALL),
    ("an answer to nothing", [user(), result()], 1, "answers no call before it", ALL),
    ("an answer before its call", [result(), calling(), said()], 0, "answers no call before it", ALL),
    ("an answer first of all", [result()], 0, "answers no call before it", ALL),
    ("an answer to another call", [user(), calling(), result(), result("b")], 3, "'b' answers no call", ALL),
    ("an answer after a question", [user(), calling(), user(), result()], 3, "does not directly follow its call", ALL),
    (
        "an answer after instructions",
        [user(), calling(), SYSTEM, result()],
        3,
        "does not directly follow its call",
        ALL,
    ),
    (
        "an answer to the round before",
        [user(), calling(call("a")), result("a"), calling(call("b")), result("b"), result("a")],
        5,
        "does not directly follow its call",
        ALL,
    ),
    ("answered twice", [user(), calling(), result(), result()], 3, "was answered before", "[anthropic, deepseek]"),
    (
        "an id twice in a message",
        [user(), calling(call("a"), call("a")), result("a")],
        1,
        "names a call of the same message too",
        "[anthropic, deepseek]",
    ),
    (
        "an id twice in a request",
        [user(), calling(), result(), calling(), result()],
        3,
        "names a call of messages[1] too",
        "[anthropic, deepseek]",
    ),
    ("an empty id", [user(), calling(call("")), result("")], 1, "tool_calls[0].id must be a string that is not", ALL),
    ("an answer with an empty id", [user(), calling(call("")), result("")], 2, "tool_call_id must be a string", ALL),
    ("an answer without id", [user(), calling(), {"role": "tool", "content": "x"}], 2, "tool_call_id must be", ALL),
    ("an id of a number", [user(), calling(call(7)), result(7)], 1, "tool_calls[0].id must be a string", ALL),
    (
        "an id of odd characters",
        [user(), calling(call("functions.look:0")), result("functions.look:0")],
        1,
        "more than letters, digits, _ and -",
        "[anthropic]",
    ),
    (
        "an id with a line end",
        [user(), calling(call("call_a\n")), result("call_a\n")],
        1,
        "more than letters, digits, _ and -",
        "[anthropic]",
    ),
    ("a long id", [user(), calling(call("c" * 41)), result("c" * 41)], 1, "longer than 40 characters", "[openai]"),
    ("an empty list of calls", [user(), {**said(), "tool_calls": []}], 1, "is an empty list", "[openai, deepseek]"),
    ("calls that are no list", [user(), {**said(), "tool_calls": {}}], 1, "tool_calls is a list, not {}", ALL),
    ("a call that is no object", [user(), calling("look")], 1, "tool_calls[0].id must be a string", ALL),
    ("a user who calls", [{**user(), "tool_calls": [call()]}], 0, "only the assistant calls tools, not 'user'", ALL),
    ("no name", [user(), calling(call(name="")), result()], 1, "function.name must be a string that is not", ALL),
    ("an odd name", [user(), calling(call(name="a b")), result()], 1, "is not 1 to 64", "[openai, anthropic]"),
    ("a long name", [user(), calling(call(name="n" * 65)), result()], 1, "is not 1 to 64", "[openai, anthropic]"),
    ("no function", [user(), calling({"id": "call_a", "type": "function"}), result()], 1, "function is an object", ALL),
    ("no type", [user(), calling({**call(), "type": None}), result()], 1, ".type is 'function', not None", ALL),
    (
        "arguments of an object",
        [user(), calling(call(arguments={})), result()],
        1,
        "arguments is a string, not {}",
        ALL,
    ),
    ("arguments of null", [user(), calling(call(arguments=None)), result()], 1, "is a string, not None", ALL),
    ("cut arguments", [user(), calling(call(arguments='{"a":')), result()], 1, "no JSON object", "[anthropic]"),
    ("a list for arguments", [user(), calling(call(arguments="[]")), result()], 1, "no JSON object", "[anthropic]"),
    ("an unknown role", [user(), {"role": "bot", "content": "x"}], 1, "unknown role 'bot'", ALL),
    ("an old role", [user(), {"role": "function", "name": "f", "content": "x"}], 1, "unknown role 'function'", ALL),
    ("a role of a list", [user(), {"role": ["user"], "content": "x"}], 1, "unknown role ['user']", ALL),
    ("no role", [user(), {"content": "x"}], 1, "a message needs a role", ALL),
    ("a user's null", [user(None)], 0, "content is null", ALL),
    ("a user without content", [{"role": "user"}], 0, "content is missing", ALL),
    ("a result of null", [user(), calling(), result(content=None)], 2, "content is null", ALL),
    ("an answer of null", [user(), said(None), user()], 1, "content is null", ALL),
    (
        "a refusal without content",
        [user(), {"role": "assistant", "content": None, "refusal": "no"}, user()],
        1,
        "content is null",
        "[anthropic, deepseek]",
    ),
    ("an empty answer", [user(), said(""), user()], 1, "content is blank", "[anthropic]"),
    ("an empty question", [user("")], 0, "content is blank", "[anthropic]"),
    ("a blank question", [user(" \n")], 0, "content is blank", "[anthropic]"),
    ("empty instructions", [{"role": "system", "content": ""}, user()], 0, "content is blank", "[anthropic]"),
    ("content of a number", [user(7)], 0, "content is text or a list of parts, not 7", ALL),
    ("no parts", [user([])], 0, "content has no parts", "[openai, anthropic]"),
    ("an empty part", [user([{"type": "text", "text": ""}, {"type": "text", "text": "x"}])], 0, "empty", "[anthropic]"),
    ("only a blank part", [user([{"type": "text", "text": " "}])], 0, "content is blank", "[anthropic]"),
    ("a part of null", [user([{"type": "text", "text": None}])], 0, "content[0].text is no string: None", ALL),
    ("a part without type", [user([{"text": "x"}])], 0, "content[0] is no part", ALL),
    ("a part that is text", [user(["x"])], 0, "content[0] is no part: 'x'", ALL),
    ("instructions alone", [SYSTEM], -1, "there are only instructions", "[anthropic]"),
]


@pytest.mark.parametrize("messages", VALID.values(), ids=VALID)
def test_accepts(messages: list[Json]) -> None:
    """What all three providers take is valid, also as a body."""
    assert check_history(messages) == []
    assert check_history(json.dumps({"model": "m", "messages": messages or [user()]})) == []
    validate_history(messages)


@pytest.mark.parametrize(("name", "messages", "index", "text", "who"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refuses(name: str, messages: list[Json], index: int, text: str, who: str) -> None:
    """Each problem is found where it is, by the words of its rule, for the providers that refuse it."""
    lines = check_history(messages)
    where = f"messages[{index}]: " if index >= 0 else "messages: "
    assert any(line.startswith(where) and text in line and line.endswith(who) for line in lines), lines
    assert check_history(json.dumps({"messages": messages}).encode()) == lines
    with pytest.raises(InvalidHistoryError, match="a provider would refuse") as caught:
        validate_history(messages)
    assert list(caught.value.problems) == lines


def test_one_problem_one_line() -> None:
    """A single fault gives a single line, so that a test can compare lists."""
    assert check_history([user(), calling(), user()]) == [
        f"messages[1]: the call 'call_a' has no answer directly after it {ALL}"
    ]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_one_provider(provider: Provider) -> None:
    """Only the rules of the providers asked for count, and the lines name no other."""
    for _name, messages, _index, _text, who in REFUSED:
        lines = check_history(messages, providers=[provider])
        assert all(line.endswith(f"[{provider}]") for line in lines)
        if who != ALL and provider in who:
            assert lines
    assert check_history([user("")], providers=["openai", "deepseek"]) == []


def test_prefill_may_be_forbidden() -> None:
    """The newer Claude models want the last word to be somebody else's; that is asked for."""
    assert check_history([user(), said()], allow_prefill=False) == [
        "messages[1]: the assistant has the last word (a prefill) [anthropic]"
    ]
    assert check_history([user(), calling(), result()], allow_prefill=False) == []


STRUCTS: list[Message] = [
    SystemMessage("be brief"),
    UserMessage([TextPart("look")]),
    AssistantMessage(
        tool_calls=[ToolCall("call_a", FunctionCall("look", "{}"))],
        reasoning_details=msgspec.Raw(b'[{"type":"reasoning.text","text":"hm"}]'),
    ),
    ToolMessage("call_a", "found"),
    AssistantMessage("done"),
]


def test_takes_every_form() -> None:
    """Values, history entries, mappings and every encoded form mean the same."""
    broken = [message for message in STRUCTS if not isinstance(message, ToolMessage)]
    for messages, count in ((STRUCTS, 0), (broken, 1)):
        encoded = encode_prompt(messages)
        forms: list[object] = [
            messages,
            [HistoryEntry(message) for message in messages],
            json.loads(b"[%b]" % encoded),
            encoded,
            b"[%b]" % encoded,
            b'{"messages":[%b]}' % encoded,
            {"messages": messages},
            (b'{"messages":[%b],"stream":true}' % encoded).decode(),
        ]
        for form in forms:
            assert len(check_history(form)) == count, form  # type: ignore[arg-type]  # all forms in one list


@pytest.mark.parametrize("body", [b"", b" ", b"{", b"nonsense", b"7", b"{}", b'{"messages":{}}', b'{"messages":[]}'])
def test_refuses_bodies_that_are_none(body: bytes) -> None:
    """A body without messages is a problem of the whole request."""
    (line,) = check_history(body)
    assert line.startswith("messages: ")
    assert line.endswith(ALL)


def test_refuses_what_is_no_message() -> None:
    """An array may hold anything on the wire."""
    assert check_history(b'[7,{"role":"user","content":"x"}]') == [f"messages[0]: a message is an object, not 7 {ALL}"]


def test_refuses_what_cannot_be_written() -> None:
    """A lone surrogate would poison every later request of its session."""
    (line,) = check_history([UserMessage("fine"), UserMessage("\ud800")])
    assert line.startswith("messages: message 1 cannot be written as JSON")


# --- generated histories ----------------------------------------------------------------------------------------------

_words = st.text(st.characters(codec="utf-8", exclude_categories=["Zs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)


@st.composite
def histories(draw: st.DrawFn) -> list[Json]:
    """Valid histories: questions, answers, rounds of tools with results in any order."""
    messages: list[Json] = []
    made = 0
    for _turn in range(draw(st.integers(1, 4))):
        messages.append(user(draw(_words)))
        for _round in range(draw(st.integers(0, 2))):
            ids = [f"call_{made + n}" for n in range(draw(st.integers(1, 3)))]
            made += len(ids)
            messages.append(calling(*map(call, ids), content=draw(st.none() | _words)))
            messages += [result(call_id, draw(st.just("") | _words)) for call_id in draw(st.permutations(ids))]
        messages.append(said(draw(_words)))
    return messages


@given(histories())
def test_generated_histories_are_valid(messages: list[Json]) -> None:
    """No false alarm."""
    assert check_history(messages) == []


def _of(messages: list[Json], wanted: Callable[[Json], object]) -> list[int]:
    return [index for index, message in enumerate(messages) if wanted(message)]


def _drop_result(messages: list[Json], at: int) -> None:
    del messages[at]


def _drop_call(messages: list[Json], at: int) -> None:
    del messages[at]


def _part(messages: list[Json], at: int) -> None:
    messages.insert(at, user("meanwhile"))


def _repeat(messages: list[Json], at: int) -> None:
    messages.insert(at, dict(messages[at]))


def _move_to_the_end(messages: list[Json], at: int) -> None:
    messages.append(messages.pop(at))


BREAKS: dict[str, tuple[Callable[[list[Json], int], None], str]] = {
    "a lost result": (_drop_result, "tool"),
    "a lost call": (_drop_call, "calls"),
    "a question before a result": (_part, "tool"),
    "a result twice": (_repeat, "tool"),
    "calls twice": (_repeat, "calls"),
    "a result too late": (_move_to_the_end, "tool"),
}


@pytest.mark.parametrize("name", BREAKS)
@given(data=st.data())
def test_finds_every_break(name: str, data: st.DataObject) -> None:
    """A valid history that is broken at any one place is refused."""
    messages = data.draw(histories())
    breaks, kind = BREAKS[name]
    places = _of(messages, lambda m: m["role"] == "tool" if kind == "tool" else m.get("tool_calls"))
    if places:
        breaks(messages, data.draw(st.sampled_from(places)))
        assert check_history(messages) != []


# --- what the runtime renders -----------------------------------------------------------------------------------------


def _answered(transcript: Transcript, turn_id: str, answer: AssistantMessage) -> None:
    transcript.apply(TurnStarted(turn_id, msgspec.Raw(b"[%b]" % encode_message(UserMessage("go on")))))
    transcript.apply(TurnAnswered(turn_id, msgspec.Raw(encode_json(answer)), CallRecord()))


def _request(transcript: Transcript, prompt: list[Message]) -> bytes:
    return bytes(transcript.rendered) + b"," + transcript.render(encode_prompt(prompt))


def test_a_transcript_with_open_calls_renders_a_valid_request() -> None:
    """The calls that no tool answered are answered by the transcript, in the right place."""
    transcript = Transcript()
    calls = [ToolCall("call_a", FunctionCall("look", "{}")), ToolCall("call_b", FunctionCall("look", "{}"))]
    _answered(transcript, "1", AssistantMessage(tool_calls=calls))
    prompts: list[list[Message]] = [[UserMessage("and?")], [ToolMessage("call_b", "found"), UserMessage("and?")]]
    for prompt in prompts:
        assert check_history(_request(transcript, prompt), allow_prefill=False) == []
    assert check_history(bytes(transcript.rendered)) != []


answers = st.builds(
    AssistantMessage,
    content=st.sampled_from([None, "", " ", "text"]),
    tool_calls=st.just(msgspec.UNSET)
    | st.lists(
        st.builds(
            ToolCall,
            id=st.sampled_from(["call_0", "call_1", "", "c" * 40]),
            function=st.builds(FunctionCall, name=st.just("look"), arguments=st.sampled_from(["", "{}"])),
        ),
        min_size=1,
        max_size=3,
    ),
)


@given(st.lists(answers, max_size=5))
def test_whatever_is_answered_the_next_request_is_valid(given_answers: list[AssistantMessage]) -> None:
    """Blank answers, calls that nobody carried out and ids that come again spoil no later request."""
    transcript = Transcript()
    for number, answer in enumerate(given_answers):
        _answered(transcript, str(number), answer)
        assert check_history(_request(transcript, [UserMessage("and?")]), allow_prefill=False) == []
