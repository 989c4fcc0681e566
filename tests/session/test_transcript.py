"""The transcript: what a log renders to is accepted by every provider, wherever it was cut."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from histories import check_history
from hypothesis import given
from hypothesis import strategies as st
from worlds import there

from gorouter_trio import BadRequestError, ToolMessage, UserMessage
from gorouter_trio.session.log import compact, entries_of, turns_of
from gorouter_trio.session.transcript import Transcript
from gorouter_trio.testing import check_history as judge
from gorouter_trio.wire.codec import decode_log_entry, encode_json, encode_prompt
from gorouter_trio.wire.journal import (
    HistoryCompacted,
    HistoryFolded,
    QuestionAnswered,
    ToolsAnswered,
    TurnAbandoned,
    TurnAnswered,
    TurnCalled,
    TurnParked,
    TurnsDropped,
    TurnStarted,
)
from gorouter_trio.wire.messages import AssistantMessage, FunctionCall, ToolCall
from gorouter_trio.wire.result import CallRecord


def started(turn_id, *messages):
    return TurnStarted(turn_id, msgspec.Raw(b"[%b]" % encode_prompt(list(messages))))


def answered(turn_id, message, *, interrupted=False):
    return TurnAnswered(turn_id, msgspec.Raw(encode_json(message)), CallRecord(interrupted=interrupted))


def called(turn_id):
    return TurnCalled(turn_id, msgspec.Raw(encode_json(calling("call"))), CallRecord())


def calling(*ids, content=None):
    return AssistantMessage(content, tool_calls=[ToolCall(i, FunctionCall("f", "{}")) for i in ids])


def transcript_of(*log):
    transcript = Transcript()
    for entry in log:
        transcript.apply(entry)
    return transcript


def rendered(transcript, *prompt):
    """The messages of the next request, as a provider sees them."""
    added = transcript.render(encode_prompt(list(prompt)))
    comma = b"," if transcript.rendered else b""
    return msgspec.json.decode(b"[" + bytes(transcript.rendered) + comma + added + b"]")


def brief(messages):
    """Messages as `role:content` or `role(ids)`."""
    return [
        f"{m['role']}({m['tool_call_id']})"
        if m["role"] == "tool"
        else f"{m['role']}:{m['content']}" + "".join(f"({c['id']})" for c in m.get("tool_calls", ()))
        for m in messages
    ]


HI = UserMessage("hi")


def test_answered_turns_are_rendered_in_order():
    """User and assistant, turn by turn, in front of the new message."""
    transcript = transcript_of(
        started("1", UserMessage("a")),
        answered("1", AssistantMessage("A")),
        started("2", UserMessage("b")),
        answered("2", AssistantMessage("B")),
    )
    assert brief(rendered(transcript, HI)) == ["user:a", "assistant:A", "user:b", "assistant:B", "user:hi"]
    assert transcript.turns == 2


def test_system_messages_stand_in_front():
    """The system message is rendered once, in front, whatever the log is."""
    transcript = Transcript(b'{"role":"system","content":"s"}')
    assert brief(rendered(transcript, HI)) == ["system:s", "user:hi"]
    transcript.apply(started("1", UserMessage("a")))
    transcript.apply(answered("1", AssistantMessage("A")))
    assert brief(rendered(transcript, HI)) == ["system:s", "user:a", "assistant:A", "user:hi"]


def test_abandoned_turns_are_left_out():
    """A turn without an answer is no part of later requests, and neither is one that has no end yet."""
    transcript = transcript_of(
        started("1", UserMessage("a")),
        TurnAbandoned("1", "ProviderError"),
        started("2", UserMessage("b")),
    )
    assert brief(rendered(transcript, HI)) == ["user:hi"]
    assert transcript.unfinished == "2"


def test_outcomes_tell_what_may_be_sent_again():
    """Answered is stored, abandoned may be sent again, billed perhaps may not."""
    transcript = transcript_of(
        started("1", HI),
        answered("1", AssistantMessage("A")),
        started("2", HI),
        TurnAbandoned("2", "RateLimitError"),
        started("3", HI),
        TurnAbandoned("3", "interrupted", maybe_billed=True),
    )
    assert [transcript.outcome(turn_id) for turn_id in "1234"] == ["answered", "abandoned", "in_doubt", None]


@pytest.mark.parametrize("content", [None, "", " \n\t", "\u00a0", []])
def test_blank_answers_are_not_rendered(content):
    """An answer that says nothing is left out, what the user said stays; an interrupted one goes as a whole."""
    blank = AssistantMessage(content)
    whole = transcript_of(started("1", UserMessage("a")), answered("1", blank))
    assert brief(rendered(whole, HI)) == ["user:a", "user:hi"]
    cut = transcript_of(started("1", UserMessage("a")), answered("1", blank, interrupted=True))
    assert brief(rendered(cut, HI)) == ["user:hi"]
    assert cut.outcome("1") == "answered"


@pytest.mark.parametrize("content", ["\nx", " x", '"', "\\", "[", "null", "\u0000x"])
def test_answers_that_look_blank_are_rendered(content):
    """Whatever has a visible character is an answer, also one that begins with a blank or an escape."""
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", AssistantMessage(content)))
    assert rendered(transcript, HI)[1]["content"] == content


@pytest.mark.parametrize("content", [None, "", " "])
def test_a_refusal_is_what_was_said(content):
    """Its text stands where there is no other: most providers refuse a blank beside it, in every later turn."""
    refusal = AssistantMessage(content, refusal="I will not.")
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", refusal))
    messages = rendered(transcript, HI)
    assert messages[1] == {"role": "assistant", "content": "I will not.", "refusal": "I will not."}
    assert judge(messages) == []


@pytest.mark.parametrize("arguments", ['{"city": "Aber', "[1]", "null", "3", "none", '{"a": NaN}', "[" * 2_000])
@pytest.mark.parametrize("is_answered", [True, False])
def test_arguments_that_are_no_object(arguments, is_answered):
    """As of an answer that was cut off: what no provider could read again is rendered as an empty object."""
    message = AssistantMessage(None, tool_calls=[ToolCall("c", FunctionCall("f", arguments))])
    result = [ToolsAnswered("1", msgspec.Raw(encode_json([ToolMessage("c", "Not JSON.")])), msgspec.Raw(b"[]"))]
    whole = [TurnCalled("1", msgspec.Raw(encode_json(message)), CallRecord()), *result]
    log = [answered("1", message)] if is_answered else [*whole, answered("1", AssistantMessage("Well."))]
    messages = rendered(transcript_of(started("1", UserMessage("a")), *log), HI)
    assert messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert judge(messages) == []


def test_calls_of_another_form():
    """Ids and names that one provider makes and another refuses are rendered so that everybody takes them."""
    calls = [("functions.f:0", "get weather"), ("functions/f:0", "f" * 70), ("x" * 90, ""), ("", "ok")]
    message = AssistantMessage(None, tool_calls=[ToolCall(i, FunctionCall(name, "{}")) for i, name in calls])
    messages = rendered(transcript_of(started("1", UserMessage("a")), answered("1", message)), HI)
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["functions_f_0", "functions_f_0_1", "x" * 40, "call"]
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == [
        "get_weather", "f" * 64, "unknown", "ok",
    ]  # fmt: skip
    assert judge(messages) == []


def test_details_are_echoed_byte_for_byte():
    """What the provider signed comes back to it with every digit and escape as it was."""
    details = b'[{"type":"reasoning.encrypted","data":"\\u00e9\\/==","n":1.10,"big":123456789012345678901234567890}]'
    message = AssistantMessage("A", reasoning_details=msgspec.Raw(details))
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", message))
    assert details in transcript.rendered
    with_calls = AssistantMessage(
        None,
        reasoning_details=msgspec.Raw(details),
        tool_calls=[ToolCall("c", FunctionCall("f", '{"a": 1}')), ToolCall("c", FunctionCall("f", "{}"))],
    )
    renamed = transcript_of(started("1", UserMessage("a")), answered("1", with_calls))
    assert details in renamed.rendered
    assert [call["id"] for call in rendered(renamed, HI)[1]["tool_calls"]] == ["c", "c_1"]


# Tools


def test_open_calls_are_closed():
    """A call that nobody answers gets a synthetic answer in front of whatever comes next."""
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", calling("x", "y")))
    messages = rendered(transcript, HI)
    assert brief(messages) == ["user:a", "assistant:None(x)(y)", "tool(x)", "tool(y)", "user:hi"]
    assert "not carried out" in messages[2]["content"]
    assert check_history(messages) == []


def test_given_answers_stand_where_they_belong():
    """Tool messages come first, in the order of the calls, wherever in the prompt they were, gaps filled."""
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", calling("x", "y", "z")))
    messages = rendered(transcript, HI, ToolMessage("z", "Z"), ToolMessage("x", "X"))
    assert brief(messages)[2:] == ["tool(x)", "tool(y)", "tool(z)", "user:hi"]
    assert [messages[2]["content"], messages[4]["content"]] == ["X", "Z"]
    assert check_history(messages) == []


def test_answers_in_order_keep_their_bytes():
    """A prompt that is right as it is goes out unchanged, unknown fields and number forms included."""
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", calling("x")))
    prompt = b'{"role":"tool","tool_call_id":"x","content":"X","newer":1.50},{"role":"user","content":"\\u0041"}'
    assert transcript.render(prompt) == prompt
    two = transcript_of(started("1", UserMessage("a")), answered("1", calling("w", "x")))
    assert two.render(prompt).endswith(prompt)


def test_nothing_is_rendered_twice_with_the_answer():
    """What was rendered for a request is what stays: the next request begins with the same bytes."""
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", calling("x", "y")))
    first = rendered(transcript, ToolMessage("y", "Y"))
    transcript.apply(started("2", ToolMessage("y", "Y")))
    transcript.apply(answered("2", AssistantMessage("done")))
    assert rendered(transcript, HI)[: len(first)] == first
    assert brief(rendered(transcript, HI))[-2:] == ["assistant:done", "user:hi"]


def test_calls_stay_open_over_an_abandoned_turn():
    """A turn that failed has answered nothing: the tools' results can be given again."""
    transcript = transcript_of(
        started("1", UserMessage("a")),
        answered("1", calling("x")),
        started("2", ToolMessage("x", "X")),
        TurnAbandoned("2", "ProviderError"),
    )
    assert brief(rendered(transcript, ToolMessage("x", "X")))[2:] == ["tool(x)"]


@pytest.mark.parametrize(
    ("ids", "prompt", "fault"),
    [
        ([], [ToolMessage("x", "X")], "no open call"),
        (["y"], [ToolMessage("x", "X")], "no open call"),
        (["x"], [ToolMessage("x", "X"), ToolMessage("x", "X")], "answered already"),
        (["x"], [HI, ToolMessage("y", "X")], "no open call"),
    ],
)
def test_orphans_are_refused(ids, prompt, fault):
    """A tool message that answers nothing, or a second time, is refused before anything is sent."""
    message = calling(*ids) if ids else AssistantMessage("A")
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", message))
    before = bytes(transcript.rendered)
    with pytest.raises(BadRequestError, match=fault):
        transcript.render(encode_prompt(prompt))
    assert transcript.rendered == before


@pytest.mark.parametrize("calls", ["x", {"id": "x"}, [1], [None, {"id": "x"}]])
def test_calls_of_no_form_are_refused(calls):
    """Calls that a prompt brings and that are none are refused, not stumbled over."""
    prompt = {"role": "assistant", "content": None, "tool_calls": calls}
    with pytest.raises(BadRequestError, match="tool_calls"):
        Transcript().render(encode_prompt(prompt))


@pytest.mark.parametrize("call", [{}, {"id": None}, {"id": 5}])
def test_calls_without_an_id_get_one(call):
    """A prompt's call without an id that could be answered gets one."""
    prompt = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    assert check_history(rendered(Transcript(), prompt, HI)) == []


def test_ids_that_repeat_are_made_distinct():
    """Engines that number calls anew in each answer give valid requests, and their ids are still understood."""
    transcript = transcript_of(
        started("1", UserMessage("a")),
        answered("1", calling("call_0", "call_0")),
        started("2", ToolMessage("call_0", "first"), ToolMessage("call_0", "second")),
        answered("2", calling("call_0")),
    )
    messages = rendered(transcript, ToolMessage("call_0", "third"))
    assert check_history(messages) == []
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["first", "second", "third"]


@pytest.mark.parametrize("given", ["", "x" * 40])
def test_renamed_ids_have_a_form_that_providers_take(given):
    """Empty ids get one, and long ones stay within what OpenAI takes."""
    transcript = transcript_of(
        started("1", UserMessage("a")), answered("1", calling(given)), started("2", HI), answered("2", calling(given))
    )
    assert check_history(rendered(transcript, HI)) == []


def test_prompts_with_a_conversation_of_their_own():
    """A prompt may bring assistant messages with calls and their results; what it left open is closed."""
    prompt = [UserMessage("q"), calling("p"), ToolMessage("p", "P"), calling("r"), UserMessage("s"), calling("p")]
    transcript = transcript_of(started("1", UserMessage("a")), answered("1", calling("x")))
    messages = rendered(transcript, *prompt)
    assert check_history(messages) == []
    transcript.apply(started("2", *prompt))
    transcript.apply(answered("2", calling("p")))
    assert check_history(rendered(transcript, HI)) == []


def test_the_word_tool_in_a_text_changes_nothing():
    """Prompts that merely talk about tools keep their bytes."""
    for text in ("tool", '"tool"', '{"role":"tool"}', "tool_calls"):
        prompt = encode_prompt(text)
        assert transcript_of(started("1", HI), answered("1", AssistantMessage(text))).render(prompt) == prompt


def test_entries_are_the_messages_of_the_answered_turns():
    """History shows what was said and the call that said it, interrupted answers included, abandoned turns not."""
    log = [
        started("1", UserMessage("a")),
        answered("1", AssistantMessage("A")),
        started("2", UserMessage("b")),
        TurnAbandoned("2", "x"),
        started("3", UserMessage("c"), UserMessage("d")),
        answered("3", AssistantMessage(""), interrupted=True),
        started("4", UserMessage("e")),
    ]
    entries = entries_of(log)
    assert [entry.message.content for entry in entries] == ["a", "A", "c", "d", ""]
    assert [entry.call is not None for entry in entries] == [False, True, False, False, True]
    assert there(entries[-1].call).interrupted


def test_an_answered_turn_stays_answered():
    """What an earlier try of a turn left in doubt is no doubt any more once it was answered, compacted or not."""
    for tries in (
        [TurnAbandoned("1", "DeadlineExceededError", maybe_billed=True)],
        [called("1"), TurnAbandoned("1", "interrupted", maybe_billed=True)],
    ):
        answer = [started("1", HI), answered("1", AssistantMessage("A"))]
        log = [started("1", HI), *tries, started("2", HI), answered("2", AssistantMessage("B")), *answer]
        for gone in ([TurnsDropped("1")], [TurnsDropped("2")], [HistoryFolded(msgspec.Raw(b"{}"), "1")]):
            short = compact([*log, *gone])
            assert transcript_of(*short).outcome("1") == "forgotten", short
            assert compact(short) == short
    as_it_was_compacted_once: Any = [HistoryCompacted(("1",), 1), TurnAbandoned("1", "in doubt", maybe_billed=True)]
    assert transcript_of(*as_it_was_compacted_once).outcome("1") == "forgotten"
    assert compact(as_it_was_compacted_once) == as_it_was_compacted_once[:1]


@pytest.mark.parametrize("steps", [[], ["called"]])
def test_a_turn_without_an_end_that_others_follow(steps):
    """It is in doubt as if it had ended so, whatever comes behind it; and so it is in a compacted log."""
    start = [started("1", HI), *(called("1") for _ in steps)]
    for follows in (
        [started("2", HI), answered("2", AssistantMessage("B"))],
        [answered("2", AssistantMessage("B"))],
        [TurnAbandoned("2", "RateLimitError")],
        [TurnsDropped("2")],
    ):
        transcript = transcript_of(*start, *follows)
        assert (transcript.outcome("1"), transcript.machine) == ("in_doubt", None)
        ended = transcript_of(*start, TurnAbandoned("1", "in doubt", maybe_billed=True), *follows)
        assert rendered(transcript, HI) == rendered(ended, HI)
        short = compact([*start, *follows])
        assert transcript_of(*short).outcome("1") == "in_doubt"
        assert rendered(transcript_of(*short), HI) == rendered(ended, HI)
    answer = [started("3", HI), answered("3", AssistantMessage("C"))]
    folded = [*start, *follows, *answer, HistoryFolded(msgspec.Raw(b"{}"), "3")]
    assert transcript_of(*compact(folded)).outcome("1") == "in_doubt"


def test_a_later_try_that_was_refused():
    """What has become of a turn last is what a compacted log says of it, though an earlier try has run a tool."""
    tries = [started("1", HI), called("1"), TurnAbandoned("1", "interrupted", maybe_billed=True)]
    log = [*tries, started("1", HI), TurnAbandoned("1", "InsufficientCreditsError"), started("2", HI), called("2")]
    short = compact(log)
    assert transcript_of(*short).outcome("1") == transcript_of(*log).outcome("1") == "abandoned"
    assert transcript_of(*short).unfinished == "2"
    assert compact(short) == short


def test_a_later_try_in_doubt_that_has_gone():
    """The doubt of a later try stays, though that has given way to another turn and the one before it has not."""
    tries = [started("1", HI), called("1"), TurnAbandoned("1", "refused")]
    again = [started("1", HI), called("1"), TurnAbandoned("1", "interrupted", maybe_billed=True)]
    start = msgspec.structs.replace(started("2", HI), replaces="1")
    log = [*tries, *again, start, answered("2", AssistantMessage("A"))]
    short = compact(log)
    assert transcript_of(*short).outcome("1") == transcript_of(*log).outcome("1") == "in_doubt"
    assert [turn.turn_id for turn in turns_of(short)] == ["1", "2"]
    assert compact(short) == short


def test_turns_that_were_joined_stay_in_doubt():
    """Each id of a turn that was sent and not answered keeps its doubt in a compacted log."""
    start = msgspec.structs.replace(started("1", HI), joined=("2",))
    short = compact([start, TurnAbandoned("1", "interrupted", maybe_billed=True)])
    assert [transcript_of(*short).outcome(turn_id) for turn_id in "12"] == ["in_doubt", "in_doubt"]


def test_a_summary_in_a_log_of_an_earlier_version():
    """Which has no number of turns, stands for all up to the last turn of its id."""
    turns = [entry for turn_id in "121" for entry in (started(turn_id, HI), answered(turn_id, AssistantMessage("A")))]
    so_far = msgspec.Raw(b'{"role":"system","content":"so far"}')
    for fold, folded in ((HistoryFolded(so_far, "1"), 3), (HistoryFolded(so_far, "1", upto=1), 1)):
        log = [*turns, fold]
        assert transcript_of(*log).folded == folded
        assert len(turns_of(compact(log))) == 3 - folded
        assert rendered_all(transcript_of(*compact(log))) == rendered_all(transcript_of(*log))
    assert encode_json(HistoryFolded(so_far)) == b'{"type":"folded","message":%b}' % so_far


# Any log at all

ids = st.sampled_from(["call_0", "call_1", "a", ""])
answers = st.one_of(
    st.builds(AssistantMessage, st.sampled_from(["A", "", " ", None])),
    st.builds(lambda some: calling(*some), st.lists(ids, min_size=1, max_size=3)),
    st.builds(lambda some: calling(*some, content="thinking"), st.lists(ids, min_size=1, max_size=3)),
)
prompts = st.sampled_from(
    [
        (HI,),
        (ToolMessage("call_0", "r"),),
        (ToolMessage("a", "r"), HI),
        (HI, ToolMessage("call_0", "r"), ToolMessage("call_0", "r")),
        (HI, calling("a"), ToolMessage("a", "r"), HI),
    ]
)
ends = st.one_of(
    st.tuples(st.just("answered"), answers),
    st.tuples(st.just("interrupted"), st.builds(AssistantMessage, st.sampled_from(["A", "", " "]))),
    st.tuples(st.sampled_from(["abandoned", "lost"]), st.none()),
)


@given(st.lists(st.tuples(prompts, ends), max_size=12), prompts)
def test_any_log_renders_validly(turns, last):
    """Whatever was asked, answered, interrupted or lost: what is rendered next is what providers accept."""
    transcript = Transcript()
    for number, (prompt, (end, message)) in enumerate([*turns, (last, ("lost", None))]):
        try:
            messages = rendered(transcript, *prompt)
        except BadRequestError:
            continue
        assert check_history(messages) == []
        transcript.apply(started(str(number), *prompt))
        if end in {"answered", "interrupted"}:
            transcript.apply(answered(str(number), message, interrupted=end == "interrupted"))
        elif end == "abandoned":
            transcript.apply(TurnAbandoned(str(number), "x"))


# Rounds, cuts, folds

Step = tuple[str, tuple[str, ...]]
rounds = st.lists(
    st.tuples(
        st.lists(ids, min_size=1, max_size=3).map(lambda some: tuple(distinct(some))),
        st.sampled_from(["all", "backwards", "one by one", "some", "none", "parked", "replied"]),
    ),
    max_size=3,
)
turn_plans = st.tuples(
    prompts,
    rounds,
    st.sampled_from(["answered", "called", "interrupted", "blank", "abandoned", "lost", "in doubt"]),
    st.sampled_from(["", "", "", "again", "replace", "joined", "undo", "undo earlier", "fold", "first"]),
)


def distinct(some):
    """Ids as the codec gives them to the calls of one answer: none is empty, none twice."""
    return [f"{call_id or 'call'}{number}" for number, call_id in enumerate(some)]


def round_entries(turn_id, call_ids, how):
    """One round of tools; whether all its calls have results."""
    results = [ToolMessage(call_id, f"R {call_id}") for call_id in call_ids]
    yield TurnCalled(turn_id, msgspec.Raw(encode_json(calling(*call_ids))), CallRecord())
    if how in {"parked", "replied"}:
        yield TurnParked(turn_id, "q", call_ids[0])
    if how == "replied":
        yield QuestionAnswered(turn_id, "q", msgspec.Raw(b"true"), taken=True)
    if how == "backwards":
        results.reverse()
    if how in {"all", "backwards", "replied"}:
        yield ToolsAnswered(turn_id, msgspec.Raw(encode_json(results)))
    elif how == "some":
        yield ToolsAnswered(turn_id, msgspec.Raw(encode_json(results[1:] or results)))
    elif how == "one by one":
        for result in reversed(results):
            yield ToolsAnswered(turn_id, msgspec.Raw(encode_json([result])))


def turn_entries(number, plan, earlier, transcript):
    """The entries of one turn, as long as each may follow the one before."""
    prompt, steps, end, extra = plan
    turn_id = f"t{number}"
    if extra == "again":
        again = [f"t{other}" for other in range(number) if transcript.outcome(f"t{other}") in {"abandoned", "in_doubt"}]
        turn_id = [*again, turn_id][0]
    if extra == "undo" and earlier:
        yield TurnsDropped(earlier[-1])
    elif extra == "undo earlier" and earlier:
        yield TurnsDropped(earlier[len(earlier) // 2])
    elif extra == "fold" and transcript.length:
        place = transcript.length // 2
        if not transcript.is_inside(place + 1):
            message = msgspec.Raw(b'{"role":"system","content":"so far"}')
            yield HistoryFolded(message, transcript.turn_at(place), upto=place + 1)
    try:
        transcript.render(encode_prompt(list(prompt)))
    except BadRequestError:
        prompt = (HI,)
    start = started(turn_id, *prompt)
    if extra == "replace" and earlier:
        start = msgspec.structs.replace(start, replaces=earlier[len(earlier) // 2])
    elif extra == "joined":
        start = msgspec.structs.replace(start, joined=(f"j{number}",))
    elif extra == "first":
        start = msgspec.structs.replace(start, first=transcript.length // 2)
    yield start
    for call_ids, how in steps:
        yield from round_entries(turn_id, call_ids, how)
        if transcript.machine is None or transcript.machine.state == "calling":
            yield TurnAbandoned(turn_id, "cut", maybe_billed=True)
            return
    if end in {"answered", "called", "blank"}:
        messages = {"answered": AssistantMessage("A"), "called": calling("call_0", "x"), "blank": AssistantMessage("")}
        yield answered(turn_id, messages[end])
    elif end == "interrupted":
        yield answered(turn_id, AssistantMessage(" "), interrupted=True)
    elif end != "lost":
        yield TurnAbandoned(turn_id, "x", maybe_billed=end == "in doubt")


def every_rendering(transcript):
    """The requests that may come next: with all of the history, with less at either end, and going on."""
    for first in range(transcript.length + 1):
        if not transcript.is_inside(first):
            yield first, None
    for end in range(transcript.length):
        yield 0, end


def request(transcript, added, first=0, end=None):
    return msgspec.json.decode(b"[%b]" % b"".join(transcript.pieces(added, first=first, end=end)))


def rendered_all(transcript):
    return request(transcript, encode_prompt("hi"))


@given(st.lists(turn_plans, max_size=6))
def test_every_prefix_of_every_log_renders_validly(plans):
    """Wherever a log ends, with rounds, parked calls, edits, undone and folded turns: providers accept what follows."""
    transcript, log, earlier = Transcript(), [], []
    for number, plan in enumerate(plans):
        for entry in turn_entries(number, plan, earlier, transcript):
            if isinstance(entry, TurnStarted) and entry.replaces:
                entry = msgspec.structs.replace(entry, messages=started("", HI).messages)
            transcript.apply(entry)
            log.append(entry)
            for first, end in every_rendering(transcript):
                assert check_history(request(transcript, encode_prompt("hi"), first, end)) == [], (log, first, end)
            if transcript.machine is not None and transcript.machine.rounds:
                assert check_history(request(transcript, b"")) == []
        earlier = [transcript.turn_at(place) for place in range(transcript.length)]
    again = transcript_of(*log)
    assert again.rendered == transcript.rendered
    check_the_log_alone(log, transcript)


def check_the_log_alone(log, transcript):
    """What people see of a log, and its compact form, say the same as what is sent."""
    assert [turn.turn_id for turn in turns_of(log)] == [transcript.turn_at(n) for n in range(transcript.length)]
    seen = [entry.message.content for entry in entries_of(log)]
    sent = [message.get("content") for message in request(transcript, encode_prompt("hi"))[:-1]]
    if not transcript.folded:
        assert [content for content in sent if content in {"A", "so far"}] == [c for c in seen if c in {"A", "so far"}]
    short = [decode_log_entry(encode_json(entry)) for entry in compact(log)]
    compacted = transcript_of(*short)
    texts_only = [(m["role"], m.get("content")) for m in request(transcript, encode_prompt("hi"))]
    assert [(m["role"], m.get("content")) for m in request(compacted, encode_prompt("hi"))] == texts_only
    assert check_history(request(compacted, encode_prompt("hi"))) == []
    assert (compacted.calls, compacted.cost_usd, compacted.unpriced) == (
        transcript.calls,
        transcript.cost_usd,
        transcript.unpriced,
    )
    starts = [entry for entry in log if isinstance(entry, TurnStarted)]
    for turn_id in {turn_id for start in starts for turn_id in (start.turn_id, *start.joined)}:
        before, after = transcript.outcome(turn_id), compacted.outcome(turn_id)
        assert after == before or (before, after) in {("answered", "forgotten"), ("abandoned", None)}
    assert compact(short) == short
