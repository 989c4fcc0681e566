"""Messages from elsewhere as turns, and the files that GoRouter Kit left."""

from __future__ import annotations

import json
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gorouter_trio as gr
from gorouter_trio.session.log import entries_of
from gorouter_trio.session.transcript import Transcript
from gorouter_trio.stores.gorouter_kit import key_of_file, read_kit_file
from gorouter_trio.stores.turns import to_turns
from gorouter_trio.testing import check_history
from gorouter_trio.wire.codec import decode_log_entry, decode_messages
from gorouter_trio.wire.messages import (
    AssistantMessage,
    FunctionCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gorouter_trio.wire.result import CallRecord, HistoryEntry

FILES = Path(__file__).resolve().parents[1] / "golden" / "gorouter-history"


def call(call_id: str) -> ToolCall:
    return ToolCall(id=call_id, function=FunctionCall("f", "{}"))


said = st.one_of(
    st.builds(UserMessage, st.sampled_from(["hi", ""])),
    st.builds(SystemMessage, st.just("be brief")),
    st.builds(ToolMessage, st.sampled_from(["a", "b", "c"]), st.just("result")),
    st.builds(AssistantMessage, st.sampled_from(["yes", "", None])),
    st.builds(
        AssistantMessage,
        st.none(),
        tool_calls=st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=2, unique=True).map(
            lambda ids: [call(i) for i in ids]
        ),
    ),
)
histories = st.lists(
    st.builds(HistoryEntry, said, st.none() | st.builds(CallRecord, finished_at_s=st.just(5.0))), max_size=9
)


def read(turns):
    """The messages that a session shows of them, and those that its next turn sends."""
    log = [decode_log_entry(entry) for entry in turns.entries]
    transcript = Transcript()
    for entry in log:
        transcript.apply(entry)
    added = transcript.render(b'{"role":"user","content":"next"}')
    return entries_of(log), decode_messages(b",".join(filter(None, [bytes(transcript.rendered), added]))), transcript


@given(history=histories)
def test_nothing_is_lost_and_what_is_sent_is_valid(history):
    """Every message is in the log, in the conversation or named; a provider accepts what is rendered."""
    turns = to_turns(history, turn_id="t")
    shown, sent, transcript = read(turns)
    left_out = {fault.position for fault in turns.set_aside}
    kept = [entry for position, entry in enumerate(history) if position not in left_out]
    said = [e.message for e in shown if "not carried out" not in str(e.message.content)]
    assert said == [entry.message for entry in kept]
    written = b"".join(turns.entries)
    for position in left_out:
        assert msgspec.json.encode(history[position].message) in written
    assert check_history([m for m in sent if not (isinstance(m, UserMessage) and not m.content)]) == []
    assert transcript.unfinished is None
    ids = [json.loads(entry)["turn_id"] for entry in turns.entries]
    assert len(set(ids)) * 2 >= len(ids)


def test_entries_of_the_seed():
    """Texts, calls and their metadata arrive; the cost to the last digit."""
    kit = read_kit_file((FILES / "user_42.json").read_bytes())
    turns = to_turns(kit.entries, turn_id="import", at_s=0.0)
    assert (kit.notes, turns.set_aside) == ((), ())
    shown, sent, _ = read(turns)
    assert [type(entry.message).__name__.removesuffix("Message") for entry in shown] == [
        *("System", "User", "Assistant", "User", "Assistant", "Tool", "Tool", "Assistant")
    ]
    first = shown[2].call
    assert first.model == "openai/gpt-4o-mini"
    assert (first.generation_id, first.finish_reason, first.finished_at_s) == (
        "gen-1741430000-a",
        "stop",
        1741430000.25,
    )
    assert (first.cost, first.usage.total_tokens) == (Decimal("0.000123"), 26)
    assert shown[4].call.attempts == 0
    assert shown[7].call.cost is None
    assert check_history(sent) == []


def test_bare_messages_of_the_seed():
    """The older form; a question that was never answered is kept and named."""
    kit = read_kit_file((FILES / "legacy-bot.json").read_bytes())
    turns = to_turns(kit.entries, turn_id="import")
    shown, _, transcript = read(turns)
    assert [entry.message.content for entry in shown] == ["Привет", "Здравствуйте!"]
    assert [(fault.position, fault.reason) for fault in turns.set_aside] == [(2, "was never answered")]
    assert transcript.turns == 2


def test_histories_that_the_seed_had_broken():
    """A tool message that nothing called for would have every later request refused: it is set aside."""
    kit = read_kit_file((FILES / "orphaned.json").read_bytes())
    turns = to_turns(kit.entries, turn_id="import")
    assert kit.notes == ("item 2: its audio, of which there was only a hint",)
    assert [(fault.position, fault.reason) for fault in turns.set_aside] == [(1, "answers no open call")]
    shown, sent, _ = read(turns)
    assert [entry.message.content for entry in shown] == ["one", "two"]
    assert check_history(sent) == []


def test_a_cleared_session_is_empty():
    """It was written as null."""
    assert read_kit_file((FILES / "cleared.json").read_bytes()).entries == ()


@pytest.mark.parametrize("name", ["torn.json", "____.json"])
def test_files_that_a_crash_cut_off(name):
    """They are refused, never taken for an empty history."""
    with pytest.raises(gr.DecodeError):
        read_kit_file((FILES / name).read_bytes())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "not a list"),
        ("[7]", "item 0: not an object"),
        ('[{"message":7}]', "item 0: message: not an object"),
        ('[{"role":"wizard","content":"x"}]', "item 0: "),
        ("[{}]", "item 0: "),
        ('[{"message":{"role":"user"},"api_call_metadata":7}]', "api_call_metadata: not an object"),
        ('[{"message":{"role":"user"},"api_call_metadata":{"cost":"x"}}]', "cost: not a number"),
        ('[{"message":{"role":"user"},"api_call_metadata":{"cost":true}}]', "cost: not a number"),
        ('[{"message":{"role":"user"},"api_call_metadata":{"model_used":1}}]', "model_used: not a text"),
        ('[{"message":{"role":"user"},"api_call_metadata":{"usage":1}}]', "usage: not an object"),
    ],
)
def test_files_of_another_form(text, says):
    """What is wrong is named."""
    with pytest.raises(gr.DecodeError, match=says):
        read_kit_file(text.encode())


@pytest.mark.parametrize("timestamp", [10**400, -(10**400)], ids=["late", "early"])
def test_a_time_that_no_clock_says(timestamp):
    """It is none; as an infinity it would have made the whole session unreadable."""
    item = {"message": {"role": "assistant", "content": "a"}, "api_call_metadata": {"timestamp": timestamp}}
    (entry,) = read_kit_file(json.dumps([item]).encode()).entries
    assert entry.call is not None
    assert entry.call.finished_at_s == 0
    assert [decode_log_entry(data) for data in to_turns([entry], turn_id="t").entries]


@given(
    data=st.binary(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["message", "role", "content", "api_call_metadata", "cost", "usage", "timestamp"]),
                inner,
                max_size=4,
            )
        ),
    ).map(msgspec.json.encode)
)
def test_any_bytes_are_read_or_refused(data):
    """No file ends the import with another error."""
    with suppress(gr.DecodeError):
        read_kit_file(data)


def test_keys_of_files():
    """The name gives the key, and whether an underscore may have been something else."""
    assert key_of_file("legacy-bot.json") == ("legacy-bot", True)
    assert key_of_file("user_42.json") == ("user_42", False)
    assert key_of_file("a.b.json") == ("a.b", True)
    assert key_of_file("default.json") == ("default", False)
