"""How much of a history is sent: turns, tokens, summaries."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest
import trio
from failing_store import FailingStore
from histories import check_history
from hypothesis import example, given
from hypothesis import strategies as st
from tool_loop import ONE_ROUND, TOOLS, Loop
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.config import ContextPolicy
from gorouter_trio.session.context import Context, decide
from gorouter_trio.session.log import compact
from gorouter_trio.session.transcript import Transcript
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.codec import decode_log_entry, encode_json
from gorouter_trio.wire.journal import HistoryFolded, TurnAnswered, TurnsDropped, TurnStarted
from gorouter_trio.wire.messages import AssistantMessage, FunctionCall, ToolCall
from gorouter_trio.wire.responses import CompletionTokensDetails, Usage
from gorouter_trio.wire.result import CallRecord

CALLING = AssistantMessage(None, tool_calls=[ToolCall("x", FunctionCall("f", "{}"))])
SIZE = st.integers(1, 400)


def transcript_of(*turns, system=b""):
    """A transcript of turns: (the new messages, the answer, usage or None)."""
    transcript = Transcript(system)
    for number, (asked, answer, usage) in enumerate(turns):
        transcript.apply(TurnStarted(str(number), msgspec.Raw(encode_json([asked]))))
        transcript.apply(TurnAnswered(str(number), msgspec.Raw(encode_json(answer)), CallRecord(usage=usage)))
    return transcript


def plain(count, usage=None):
    return [(gr.UserMessage("u" * 40), AssistantMessage("a" * 40), usage)] * count


@pytest.mark.parametrize(("turns", "limit", "first"), [(0, 3, 0), (3, 3, 0), (4, 3, 1), (10, 3, 7), (10, 1, 9)])
def test_last_turns(turns, limit, first):
    """Of the past turns the last n are sent."""
    assert decide(ContextPolicy(max_turns=limit), transcript_of(*plain(turns)), new_bytes=1) == Context(first)
    assert decide(None, transcript_of(*plain(turns)), new_bytes=1) == Context()


def test_a_call_keeps_its_result():
    """A turn whose messages answer the calls of the one before it is not sent without that one."""
    answering = (gr.ToolMessage("x", "R"), AssistantMessage("A"), None)
    transcript = transcript_of(*plain(3), (gr.UserMessage("q"), CALLING, None), answering)
    assert decide(ContextPolicy(max_turns=1), transcript, new_bytes=1) == Context(3)
    assert decide(ContextPolicy(max_tokens=5), transcript, new_bytes=1) == Context(5)
    waiting = transcript_of(*plain(3), (gr.UserMessage("q"), CALLING, None))
    assert decide(ContextPolicy(max_tokens=5), waiting, new_bytes=1) == Context(3), (
        "the new message may have its result"
    )


def test_tokens_are_those_that_replies_counted():
    """What a turn has added to the usage is what it counts for, whatever its bytes; reasoning is not sent again."""

    def usage(prompt, completion, reasoning=0):
        return Usage(prompt, completion, completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning))

    turns = [
        (gr.UserMessage("a"), AssistantMessage("A"), usage(100, 50)),
        (gr.UserMessage("b"), AssistantMessage("B"), usage(250, 900, 800)),
        (gr.UserMessage("c"), AssistantMessage("C"), usage(400, 100)),
    ]
    transcript = transcript_of(*turns)
    assert [transcript.tokens_before(place) for place in range(4)] == [0, 150, 350, 500]
    assert decide(ContextPolicy(max_tokens=500), transcript, new_bytes=0) == Context(0)
    assert decide(ContextPolicy(max_tokens=499), transcript, new_bytes=0) == Context(1)
    assert decide(ContextPolicy(max_tokens=349), transcript, new_bytes=0) == Context(2)
    assert decide(ContextPolicy(max_tokens=149), transcript, new_bytes=0) == Context(3)


def test_tokens_go_on_where_turns_were_left_out():
    """A reply whose request left turns out counted only the rest."""
    transcript = transcript_of(*plain(2, Usage(100, 20)))
    before = transcript.tokens_before(2)
    transcript.apply(TurnStarted("x", msgspec.Raw(b'[{"role":"user","content":"q"}]'), first=1))
    answer = TurnAnswered("x", msgspec.Raw(encode_json(AssistantMessage("A"))), CallRecord(usage=Usage(90, 30)))
    transcript.apply(answer)
    assert transcript.tokens_before(3) == max(transcript.tokens_before(1) + 120, before)


def test_what_is_not_counted_is_estimated():
    """Without usage, tokens go by bytes, the system message and the new ones included."""
    transcript = transcript_of(*plain(10), system=b'{"role":"system","content":"%b"}' % (b"s" * 400))
    whole = transcript.fixed_tokens + transcript.tokens_before(10)
    assert whole == pytest.approx(len(transcript.rendered) / 4, abs=12)
    assert decide(ContextPolicy(max_tokens=whole), transcript, new_bytes=0) == Context(0)
    assert decide(ContextPolicy(max_tokens=whole), transcript, new_bytes=40) == Context(1)
    assert decide(ContextPolicy(max_tokens=1), transcript, new_bytes=40) == Context(10)


@given(st.lists(st.tuples(SIZE, SIZE, st.booleans()), max_size=12), st.integers(1, 400), st.integers(0, 400))
def test_the_limit_holds(turns, limit, new_bytes):
    """By its own count, a request is within the limit, and has every turn that fits."""
    log = []
    seen = 0
    for asked, said, is_counted in turns:
        seen += asked + said
        log.append(
            (
                gr.UserMessage("u" * asked),
                AssistantMessage("a" * said),
                Usage(seen - said, said) if is_counted else None,
            )
        )
    transcript = transcript_of(*log)
    first = decide(ContextPolicy(max_tokens=limit), transcript, new_bytes=new_bytes).first
    room = limit - transcript.fixed_tokens - new_bytes // 4
    kept = transcript.tokens_before(len(log)) - transcript.tokens_before(first)
    assert kept <= room or first == len(log)
    assert first == 0 or transcript.tokens_before(len(log)) - transcript.tokens_before(first - 1) > room


@pytest.mark.parametrize(
    "fields",
    [
        {"max_turns": 0},
        {"max_tokens": -1},
        {"max_turns": 1.5},
        {"keep_turns": -1},
        {"summarise": 5, "max_turns": 1},
        {"summarise": print},
    ],
)
def test_what_cannot_be_a_policy(fields):
    """A limit that cannot be is refused by name."""
    with pytest.raises(gr.ConfigError, match="context"):
        ContextPolicy(**fields)
    with pytest.raises(gr.ConfigError, match=r"sessions\.context"):
        gr.SessionConfig(context=5)  # type: ignore[arg-type]  # on purpose


# In a session

ABC = [completion(text) for text in "ABCDEFGH"]


def sessions(**fields):
    return gr.SessionConfig(context=ContextPolicy(**fields))


async def test_the_last_turns_are_sent(autojump_clock):
    """The system message stays, the oldest turns are not sent, the history keeps everything."""
    async with open_world(answer=replies(*ABC), sessions=sessions(max_turns=2)) as world:
        session = world.client.session("k", system="s")
        for text in "abcd":
            await session.ask(text)
        assert world.sent[-1].contents == ["s", "b", "B", "c", "C", "d"]
        assert len(await session.history()) == 8
        async with world.another_client(store=world.client._runtime.store) as other:
            await other.session("k", system="s").ask("e")
        assert world.sent[-1].contents == ["s", "c", "C", "d", "D", "e"]
        await session.aclose()
        await session.edit((await session.history())[4].turn_id or "", "c?")
        assert world.sent[-1].contents == ["s", "a", "A", "b", "B", "c?"]


async def test_a_session_of_its_own_kind(autojump_clock):
    """A session may be opened with a policy of its own, which is part of what it was opened with."""
    async with open_world(answer=replies(*ABC), sessions=sessions(max_turns=2)) as world:
        session = world.client.session("k", context=ContextPolicy(max_turns=1))
        for text in "abc":
            await session.ask(text)
        assert world.sent[-1].contents == ["b", "B", "c"]
        with pytest.raises(gr.SessionConflictError):
            world.client.session("k")
        fork = await session.fork("k2")
        await fork.ask("d")
        assert world.sent[-1].contents == ["c", "C", "d"]


async def test_rounds_have_the_same_context(autojump_clock):
    """Every request of a turn leaves out the same turns; within the turn nothing is."""
    async with open_world(SimulatorConfig(), sessions=sessions(max_turns=1)) as world:
        session = world.client.session("k")
        for text in "ab":
            await session.ask(text)
        await session.ask(ONE_ROUND, rounds=Loop(), tools=TOOLS)
        assert [len(sent.messages) for sent in world.sent[-2:]] == [3, 6]
        assert world.sent[-1].messages[:3] == world.sent[-2].messages
        await session.ask("c")
        assert check_history(world.sent[-1].messages) == []
        assert len(world.sent[-1].messages) == 6


class Summary:
    """A summariser that notes what it was given."""

    def __init__(self):
        self.given = []
        self.error = None

    async def __call__(self, messages):
        self.given.append([message.content for message in messages])
        await trio.sleep(1)
        if self.error is not None:
            raise self.error
        return f"so far {len(self.given)}"


async def test_summaries(autojump_clock):
    """What would be left out is folded once, stored, and stands in front from then on; folded again, with the rest."""
    summary, store = Summary(), MemoryStore()
    config = sessions(max_turns=3, keep_turns=1, summarise=summary)
    async with open_world(answer=replies(*ABC), sessions=config, store=store) as world:
        session = world.client.session("k", system="s")
        for text in "abcd":
            await session.ask(text)
        assert summary.given == []
        await session.ask("e")
        assert summary.given == [["a", "A", "b", "B", "c", "C"]]
        assert world.sent[-1].contents == ["s", "so far 1", "d", "D", "e"]
        for text in "fg":
            await session.ask(text)
        assert len(summary.given) == 1
        assert world.sent[-1].contents == ["s", "so far 1", "d", "D", "e", "E", "f", "F", "g"]
        async with world.another_client() as other:
            await other.session("k", system="s").ask("h")
        assert summary.given[1] == ["so far 1", "d", "D", "e", "E", "f", "F"]
        assert world.sent[-1].contents == ["s", "so far 2", "g", "G", "h"]
        assert len(await session.history()) == 16
        folds = [
            entry
            for entry in map(decode_log_entry, (await store.load("k")).entries)
            if isinstance(entry, HistoryFolded)
        ]
        assert len(folds) == 2


async def test_undoing_what_is_folded(autojump_clock):
    """Turns that a summary stands for are there again when the history is cut back to them; compaction drops them."""
    summary = Summary()
    config = sessions(max_turns=3, keep_turns=1, summarise=summary)
    async with open_world(answer=replies(*ABC), sessions=config) as world:
        session = world.client.session("k")
        for text in "abcde":
            await session.ask(text, turn_id=text)
        assert await session.undo("c")
        await session.ask("f")
        assert world.sent[-1].contents == ["a", "A", "b", "B", "f"]
        for text in "gh":
            await session.ask(text, turn_id=text)
        world.api.answer = replies(completion("I"))
        await session.ask("i")
        assert world.sent[-1].contents[0] == "so far 2"
        sent = world.sent[-1].contents
        await session.compact()
        await session.ask("j")
        assert world.sent[-1].contents == [*sent, "I", "j"]
        with pytest.raises(gr.SessionConflictError, match="compacted"):
            await session.ask("", turn_id="a")
        assert (await session.history())[0].message.content == "so far 2"


@pytest.mark.parametrize("how", ["error", "bad message"])
async def test_a_summary_that_fails(autojump_clock, how):
    """The turn is taken with the whole history, the failure is told, and the next turn tries again."""
    summary = Summary()
    summary.error = ZeroDivisionError("no")
    config = sessions(max_turns=1, keep_turns=0, summarise=summary if how == "error" else _bad)
    async with open_world(answer=replies(*ABC), sessions=config) as world:
        session = world.client.session("k")
        for text in "abc":
            await session.ask(text)
        assert world.sent[-1].contents == ["a", "A", "b", "B", "c"]
        assert (await session.statistics()).failure
        if how == "error":
            summary.error = None
            await session.ask("d")
            assert world.sent[-1].contents == ["so far 2", "d"]
            assert not (await session.statistics()).failure


class Talk:
    """A log that grows by turns as a session takes them, under one policy, counted as a provider counts."""

    def __init__(self, policy, log=(), *, number=0):
        self.policy, self.number = policy, number
        self.log = []
        self.transcript = Transcript(SYSTEM)
        self.write(*log)

    def write(self, *entries):
        for entry in entries:
            self.log.append(decode_log_entry(encode_json(entry)))
            self.transcript.apply(self.log[-1])

    def decide(self, size):
        return decide(self.policy, self.transcript, new_bytes=size)

    def ask(self, size, *, is_counted=True, is_undone=False):
        """Take one turn, and return the request that it was sent in."""
        transcript, message = self.transcript, encode_json(gr.UserMessage("u" * size))
        if is_undone and transcript.length > transcript.folded:
            self.write(TurnsDropped(cast(str, transcript.last_turn)))
        context = self.decide(len(message))
        if context.fold:
            summary = msgspec.Raw(encode_json(gr.SystemMessage("so far" * 9)))
            self.write(HistoryFolded(summary, transcript.turn_at(context.fold - 1), upto=context.fold))
            context = self.decide(len(message))
        request = b"".join(transcript.pieces(message, first=context.first))
        self.number += 1
        usage = Usage(len(request) // 3, size // 3) if is_counted else None
        self.write(
            TurnStarted(str(self.number), msgspec.Raw(b"[%b]" % message), first=context.first),
            TurnAnswered(
                str(self.number), msgspec.Raw(encode_json(AssistantMessage("a" * size))), CallRecord(usage=usage)
            ),
        )
        return request


SYSTEM = encode_json(gr.SystemMessage("s" * 100))
TALKS = st.lists(st.tuples(SIZE, st.booleans(), st.booleans()), max_size=12)
POLICIES = st.builds(
    ContextPolicy,
    max_tokens=st.integers(100, 1000),
    max_turns=st.sampled_from([None, 3]),
    keep_turns=st.sampled_from([0, 2]),
    summarise=st.sampled_from([None, Summary()]),
)


@given(policy=POLICIES, before=TALKS, between=TALKS, after=TALKS)
@example(
    policy=ContextPolicy(max_tokens=400), before=[(90, True, False)] * 12, between=[], after=[(90, True, False)] * 3
)
def test_a_compacted_log_is_under_the_same_limit(policy, before, between, after):
    """With turns left out, folded and undone, counted and estimated: what is sent is what would be sent without."""
    whole = Talk(policy)
    for size, is_counted, is_undone in before:
        whole.ask(size, is_counted=is_counted, is_undone=is_undone)
    short = Talk(policy, compact(whole.log, system=SYSTEM), number=whole.number)
    for turns in (between, after):
        for size, is_counted, is_undone in turns:
            sent = whole.ask(size, is_counted=is_counted, is_undone=is_undone)
            assert short.ask(size, is_counted=is_counted, is_undone=is_undone) == sent
        short = Talk(policy, compact(short.log, system=SYSTEM), number=whole.number)
        shift = whole.transcript.folded
        for size in (1, 500):
            was, now = whole.decide(size), short.decide(size)
            assert (max(was.first - shift, 0), max(was.fold - shift, 0)) == (now.first, now.fold)


async def test_compaction_keeps_the_limit(autojump_clock):
    """A session under a limit of tokens sends after its compaction no more than before."""
    async with open_world() as world:
        session = world.client.session("k", system="s" * 100, context=ContextPolicy(max_tokens=400))
        for _ in range(20):
            await session.ask("[[say a]] " + "some words here " * 8)
        sent = len(world.sent[-1].messages)
        await session.compact()
        await session.ask("[[say a]] " + "some words here " * 8)
        assert len(world.sent[-1].messages) == sent


@pytest.mark.parametrize("empty", ["", " \n", {"role": "user", "content": []}, AssistantMessage(None)])
async def test_a_summary_that_says_nothing(autojump_clock, empty):
    """It stands for no turn: it is not stored, and the model sees the whole history."""

    async def summarise(_messages):
        await trio.lowlevel.checkpoint()
        return empty

    async with open_world(answer=replies(*ABC), sessions=sessions(max_turns=1, summarise=summarise)) as world:
        session = world.client.session("k")
        for text in "abc":
            await session.ask(text)
        assert world.sent[-1].contents == ["a", "A", "b", "B", "c"]
        assert "empty" in (await session.statistics()).failure


async def test_a_summary_of_a_turn_whose_id_comes_again(autojump_clock):
    """It stands for the turns that it was made of, and not for those up to the later turn of the same id."""
    given, store = [], MemoryStore()

    async def summarise(messages):
        await trio.lowlevel.checkpoint()
        given.append([message.content for message in messages if isinstance(message, gr.UserMessage)])
        return "so far"

    policy = ContextPolicy(max_turns=3, keep_turns=3, summarise=summarise)
    async with open_world(SimulatorConfig(latency_s=0.2), store=store) as world:
        session = world.client.session("k", context=policy)
        with trio.move_on_after(0.35):
            await session.ask("[[call f#a1]]", turn_id="t1", rounds=Loop(tool_s=0.1), tools=TOOLS)
        await session.ask("two [[say two]]", turn_id="t2")
        await session.ask("one [[say one]]", turn_id="t1", resume="resend")
        await session.ask("three [[say three]]")
        await session.ask("four [[say four]]")
        kept = ["so far", "two [[say two]]", "two", "one [[say one]]", "one", "three [[say three]]", "three"]
        assert given == [["[[call f#a1]]"]]
        assert world.sent[-1].contents == [*kept, "four [[say four]]"]
        async with world.another_client(store=store) as client:
            session = client.session("k")
            await session.ask("five [[say five]]")
            five = [*kept, "four [[say four]]", "four", "five [[say five]]"]
            assert world.sent[-1].contents == five
            await session.compact()
            await session.ask("six")
            assert world.sent[-1].contents == [*five, "five", "six"]


async def _bad(_messages):
    return {"role": "nobody"}


async def test_cancelling_a_summary(autojump_clock):
    """An asker that leaves while the summary is made has sent nothing, and the next turn makes it."""
    summary, store = Summary(), FailingStore()
    config = sessions(max_turns=1, keep_turns=0, summarise=summary)
    async with open_world(answer=replies(*ABC), sessions=config, store=store) as world:
        session = world.client.session("k")
        for text in "ab":
            await session.ask(text)
        with trio.move_on_after(0.5):
            await session.ask("lost")
        assert len(world.sent) == 2
        await session.ask("c")
        assert world.sent[-1].contents == ["so far 2", "c"]


async def test_a_summary_that_asks_its_own_session(autojump_clock):
    """It is told so instead of waiting for itself; asking the client is what it may do."""
    caught = []
    async with open_world() as world:

        async def summarise(messages):
            try:
                await world.client.session("k").ask("summarise")
            except gr.SessionBusyError as exc:
                caught.append(exc)
            return (await world.client.chat([*messages, gr.UserMessage("[[say short]]")])).message

        async with world.another_client(sessions=sessions(max_turns=1, keep_turns=0, summarise=summarise)) as client:
            world.client = client
            session = client.session("k")
            for text in "abc":
                await session.ask(text)
            assert world.sent[-1].contents == ["short", "c"]
            assert len(caught) == 1
