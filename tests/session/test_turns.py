"""Turns of a session: what is sent, what is remembered, and what a turn id promises."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from histories import check_history
from worlds import DONE, chunk, completion, errors, open_world, replies, streams, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.journal import TurnStarted
from gorouter_trio.wire.messages import AssistantMessage, UserMessage


def texts(history):
    return [entry.message.content for entry in history]


async def test_a_conversation(autojump_clock):
    """Each turn sends everything before it and remembers itself."""
    async with open_world() as world:
        session = world.client.session("user:42")
        await session.ask("My name is Ada.")
        reply = await session.ask("What is my name?")
        assert "Ada" in reply.text
        history = await session.history()
        assert [type(entry.message).__name__ for entry in history] == ["UserMessage", "AssistantMessage"] * 2
        assert texts(history)[2:] == ["What is my name?", reply.text]
        assert history[3].call == reply.call
        assert history[2].call is None
        assert world.sent[1].contents == [*texts(history)[:3]]


async def test_the_system_message_is_sent_and_never_stored(autojump_clock):
    """Every request begins with the system message, and no history shows it."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        session = world.client.session("k", system="Be brief.")
        for text in ("one", "two"):
            await session.ask(text)
        assert world.sent[0].contents == ["Be brief.", "one"]
        assert world.sent[1].contents == ["Be brief.", "one", "Yes.", "two"]
        assert texts(await session.history()) == ["one", "Yes.", "two", "Yes."]
        assert not any(b"Be brief" in entry for entry in (await store.load("k")).entries)


async def test_options_of_session_and_turn(autojump_clock):
    """A session's options hold for each turn, a turn's own for that turn, and the client's model beneath both."""
    async with open_world(model="a/b", answer=replies(completion())) as world:
        session = world.client.session("k", temperature=0, seed=1)
        await session.ask("one")
        await session.ask("two", temperature=None, model="c/d")
        await session.ask("three")
        bodies = [sent.body for sent in world.sent]
        assert [body["temperature"] for body in bodies] == [0, None, 0]
        assert [body["seed"] for body in bodies] == [1, 1, 1]
        assert [body["model"] for body in bodies] == ["a/b", "c/d", "a/b"]


async def test_results_say_their_turn(autojump_clock):
    """A result carries the id of its turn: the one given, or a new one."""
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k")
        assert (await session.ask("a", turn_id="t-1")).turn_id == "t-1"
        made = [(await session.ask("b")).turn_id for _ in range(3)]
        assert len({*made, "t-1"}) == 4


@pytest.mark.parametrize("name", ["", 17, 0, b"x", "\ud800"])
async def test_what_cannot_be_an_id(autojump_clock, name):
    """An id that could not be read again is refused before anything is sent or stored, and the session goes on."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        session = world.client.session("k")
        await session.ask("a", turn_id="t-1")
        attempts = {
            "ask": lambda: session.ask("b", turn_id=name),
            "stream": lambda: session.stream("b", turn_id=name).__aenter__(),
            "retry": lambda: session.retry(turn_id=name),
            "edit": lambda: session.edit("t-1", "b", turn_id=name),
            "edited": lambda: session.edit(name, "b"),
            "undo": lambda: session.undo(name),
        }
        for attempt in attempts.values():
            with pytest.raises(gr.ConfigError, match=r"turn_id|edited"):
                await attempt()
        keys: Any = (name, 42)
        for key in keys:
            with pytest.raises(gr.ConfigError, match="session: the key"):
                await session.fork(key)
        assert len(world.sent) == 1
        assert await store.version("k") == 2
        await session.aclose()
        await session.ask("b")
        assert texts(await session.history()) == ["a", "Yes.", "b", "Yes."]


async def test_a_client_that_draws_the_same_ids_again(autojump_clock):
    """A seeded client over a store that it has used before never takes a new turn for an old one."""
    store, seams = MemoryStore(), gr.Seams(new_id=lambda: "id")
    async with open_world(answer=replies(completion("old"))) as world:
        results = []
        for _ in range(3):
            async with world.another_client(store=store, seams=seams) as client:
                results.append(await client.session("k").ask("q"))
        assert len({result.turn_id for result in results}) == 3
        assert len(world.sent) == 3


async def test_many_messages_in_one_turn(autojump_clock):
    """A turn may bring several messages of any kind, and they are remembered as they came."""
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k")
        await session.ask(
            [gr.UserMessage("q"), {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
        )
        assert texts(await session.history()) == ["q", "a", "r", "Yes."]


# Keys and refs


@pytest.mark.parametrize("key", ["", "\ud800", "x" * 4097, "й" * 2049, 42, b"x", None])
async def test_what_cannot_be_a_key(autojump_clock, key):
    """Keys are 1 byte to 4 KiB of Unicode text."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="session"):
            world.client.session(key)


async def test_different_keys_are_different_sessions(autojump_clock):
    """No two keys share a history, however alike a file system or an eye would find them."""
    keys = ["a/b", "a_b", "a:b", "A/b", "Иван", "Пётр", "____", "..", "é", "e\u0301", "x" * 4096, "\x00", " "]
    async with open_world(answer=replies(completion())) as world:
        for key in keys:
            await world.client.session(key).ask(f"I am {key!r}")
        for key in keys:
            assert texts(await world.client.session(key).history()) == [f"I am {key!r}", "Yes."]


async def test_a_ref_is_cheap_and_does_nothing_by_itself(autojump_clock):
    """Making a ref starts no task and asks no store."""
    async with open_world() as world:
        await trio.testing.wait_all_tasks_blocked()
        before = trio.lowlevel.current_statistics().tasks_living
        refs = [world.client.session(f"k{number}") for number in range(1000)]
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before
        assert repr(refs[3]) == "<SessionRef 'k3'>"


async def test_same_key_with_different_options(autojump_clock):
    """Opening an active session with other options is an error, with the same ones it is the same session."""
    async with open_world(answer=replies(completion())) as world:
        early = world.client.session("k", temperature=1)
        session = world.client.session("k", system="s", temperature=0)
        await session.ask("one")
        for system, options in ((None, {}), ("s", {}), ("t", {"temperature": 0}), ("s", {"temperature": 0.5})):
            with pytest.raises(gr.SessionConflictError):
                world.client.session("k", system=system, **options)
        with pytest.raises(gr.SessionConflictError):
            await early.ask("two")
        await world.client.session("k", system="s", temperature=0).ask("two")
        assert len(await session.history()) == 4
        assert len(world.sent) == 2


# What fails


async def test_a_failed_turn_is_left_out(autojump_clock):
    """A turn that ends in an error raises it, is no part of history, and the session goes on."""
    async with open_world(answer=replies(completion("One."))) as world:
        session = world.client.session("k")
        await session.ask("one")
        world.api.answer = errors(400, "too long")
        with pytest.raises(gr.BadRequestError, match="too long"):
            await session.ask("two")
        world.api.answer = replies(completion("Three."))
        await session.ask("three")
        assert world.sent[-1].contents == ["one", "One.", "three"]
        assert texts(await session.history()) == ["one", "One.", "three", "Three."]


async def test_a_request_of_the_wrong_form_stores_nothing(autojump_clock):
    """What is refused before sending never touches the log."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        session = world.client.session("k")
        wrong: list[Any] = [[], {"role": "nobody"}, gr.ToolMessage("x", "orphan")]
        for prompt in wrong:
            with pytest.raises(gr.BadRequestError):
                await session.ask(prompt)
        assert (await store.load("k")).version == 0
        assert not world.sent


async def test_callers_deadline_ends_the_turn(autojump_clock):
    """`trio.fail_after` around `ask` ends the turn on time and leaves the session in order."""
    async with open_world(SimulatorConfig(latency_s=5)) as world:
        session = world.client.session("k")
        with pytest.raises(trio.TooSlowError), trio.fail_after(2):
            await session.ask("slow")
        assert trio.current_time() < 3
        await session.ask("quick")
        assert world.sent[-1].contents == ["quick"]


async def test_retries_do_not_begin_what_the_deadline_ends(autojump_clock):
    """A turn carries its asker's deadline: a wait beyond it is not begun, and the error itself is raised."""
    async with open_world(SimulatorConfig(retry_after_s=30)) as world:
        session = world.client.session("k")
        with trio.fail_after(10), pytest.raises(gr.OverloadedError):
            await session.ask("[[fault 503]]")
        assert trio.current_time() < 1


# At most once


async def test_a_turn_id_is_answered_once(autojump_clock):
    """Asked again, a turn gives its stored answer, and nothing is sent; that holds for other clients, too."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")
        first = await session.ask("Tell me about tides.", turn_id="t")
        await session.ask("And more.")
        again = await session.ask("something else entirely", turn_id="t")
        assert again == first
        async with world.another_client() as other:
            assert await other.session("k").ask("", turn_id="t") == first
        assert len(world.sent) == 2
        assert len(await session.history()) == 4


async def test_a_stored_answer_is_streamed_as_well(autojump_clock):
    """A stream of a turn that was answered gives its stored answer in every way that a stream is read."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    pieces = [
        chunk({"reasoning": "hm"}),
        chunk({"content": "Yes."}),
        chunk({"tool_calls": [call]}),
        chunk({}, finish="tool_calls"),
        DONE,
    ]
    async with open_world(answer=streams(*pieces)) as world:
        session = world.client.session("k")
        async with session.stream("q", turn_id="t") as stream:
            first = await stream.collect()
        async with session.stream("q", turn_id="t") as stream:
            with pytest.raises(gr.StreamNotFinishedError):
                _ = stream.result
            events = [event async for event in stream]
            assert stream.result == first
        assert events == [
            gr.ReasoningDelta("hm"),
            gr.TextDelta("Yes."),
            gr.ToolCallDelta(0, "c", "f", "{}"),
            gr.StreamFinished(finish_reason="tool_calls"),
        ]
        async with session.stream("q", turn_id="t") as stream:
            assert [text async for text in stream.text] == ["Yes."]
        assert first.turn_id == "t"
        assert len(world.sent) == 1


class Sum(msgspec.Struct):
    """A form of answers."""

    value: int


async def test_a_stored_answer_has_the_form_that_is_asked_for(autojump_clock):
    """Asked again for a type, a turn gives the value of its stored answer; one of another form is an error, unpaid."""
    store = MemoryStore()
    async with open_world(answer=replies(completion("7"), completion('{"value": 7}')), store=store) as world:
        session = world.client.session("k")
        first = await session.ask("q", turn_id="t", response_type=Sum)
        assert (first.value, len(first.rounds)) == (Sum(7), 1)
        async with world.another_client() as other:
            for asked in (session, other.session("k")):
                assert await asked.ask("q", turn_id="t", response_type=Sum) == first
                async with asked.stream("q", turn_id="t", response_type=Sum) as stream:
                    assert await stream.collect() == first
                with pytest.raises(gr.InvalidOutputError) as info:
                    await asked.ask("q", turn_id="t", response_type=list[int])
                assert (there(info.value.partial).text, info.value.maybe_billed) == (first.text, False)
                assert (await asked.ask("q", turn_id="t")).text == first.text
        assert len(world.sent) == 2


async def test_the_answer_of_a_turn_that_was_added(autojump_clock):
    """What was added to a history is asked for by its turn id as well, with a question or without one."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        greeting, more = AssistantMessage("hello"), AssistantMessage("by the way")
        await gr.HistoryManager(store).add("k", [greeting, UserMessage("q"), AssistantMessage("a"), more])
        session = world.client.session("k")
        for entry in await session.history():
            if isinstance(entry.message, AssistantMessage):
                again = await session.ask("", turn_id=entry.turn_id)
                assert (again.text, again.turn_id) == (entry.message.content, entry.turn_id)
        assert world.sent == []


async def test_a_refused_turn_may_be_asked_again(autojump_clock):
    """What cannot have been billed is sent again under its id."""
    async with open_world(answer=errors(402)) as world:
        session = world.client.session("k")
        with pytest.raises(gr.InsufficientCreditsError):
            await session.ask("q", turn_id="t")
        world.api.answer = replies(completion())
        assert (await session.ask("q", turn_id="t")).text == "Yes."


async def crashed_store(world, key, turn_id):
    """A store as a process leaves it that is killed while a turn runs."""
    store, left = MemoryStore(), MemoryStore()
    async with world.another_client(store=store) as doomed:
        await doomed.session(key).ask("before")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: doomed.session(key).ask("[[fault hang]]", turn_id=turn_id))
            await trio.sleep(1)
            stored = await store.load(key)
            await left.append(key, stored.entries, expected_version=0)
            nursery.cancel_scope.cancel()
    return left


async def test_a_turn_in_doubt(autojump_clock):
    """After a crash, the turn that ran is in doubt for whoever asks for it, for ever; the others go on."""
    async with open_world() as world:
        store = await crashed_store(world, "k", "t")
        asked = len(world.sent)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            for _ in range(2):
                with pytest.raises(gr.TurnInDoubtError) as caught:
                    await session.ask("again", turn_id="t")
                assert caught.value.maybe_billed
            assert len(world.sent) == asked
            reply = await session.ask("next")
            with pytest.raises(gr.TurnInDoubtError):
                async with session.stream("again", turn_id="t"):
                    pass
            assert texts(await session.history())[2:] == ["next", reply.text]
        assert len(world.sent) == asked + 1
        assert "[[fault hang]]" not in world.sent[-1].contents


async def test_others_go_first_over_a_turn_in_doubt(autojump_clock):
    """A turn in doubt that somebody else's turn has passed by is as much in doubt as before."""
    async with open_world() as world:
        store = await crashed_store(world, "k", "t")
        async with world.another_client(store=store) as client:
            session = client.session("k")
            assert len(await session.history()) == 2
            await session.ask("next")
            with pytest.raises(gr.TurnInDoubtError):
                await session.ask("again", turn_id="t")
        async with world.another_client(store=store) as client:
            with pytest.raises(gr.TurnInDoubtError):
                await client.session("k").ask("again", turn_id="t")


async def test_messages_that_are_added_behind_a_turn_in_doubt(autojump_clock):
    """The doubt stays: the turn is not sent again unasked, and is counted."""
    store = MemoryStore()
    await store.append(
        "k", [encode_json(TurnStarted("t", msgspec.Raw(b'[{"role":"user","content":"pay"}]')))], expected_version=0
    )
    async with open_world(store=store) as world:
        added: Any = [gr.UserMessage("hi"), gr.AssistantMessage("hello")]
        await gr.HistoryManager(store, owner=world.client).add("k", added)
        session = world.client.session("k")
        with pytest.raises(gr.TurnInDoubtError):
            await session.ask("pay", turn_id="t")
        assert world.sent == []
        assert (await gr.stores.HistoryAnalyzer(store).statistics()).in_doubt == 1
        await session.ask("pay", turn_id="t", resume="resend")
        assert world.sent[-1].contents == ["hi", "hello", "pay"]


async def test_an_interrupted_turn_is_not_sent_again(autojump_clock):
    """A turn that was sent and cancelled may have been billed: under its id it is not sent a second time."""
    async with open_world() as world:
        session = world.client.session("k")
        with trio.move_on_after(1):
            await session.ask("[[fault hang]]", turn_id="t")
        with pytest.raises(gr.TurnInDoubtError):
            await session.ask("q", turn_id="t")
        assert len(world.sent) == 1


# History, clear, fork, statistics, aclose


async def test_clear(autojump_clock):
    """Clearing empties the history and leaves the session as it was opened."""
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k", system="s")
        await session.ask("one")
        await session.clear()
        assert await session.history() == []
        await session.ask("two")
        assert world.sent[-1].contents == ["s", "two"]


async def test_history_and_clear_take_their_turn(autojump_clock):
    """They act after the turns that were queued before them."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        session = world.client.session("k")
        seen = {}

        async def look(name, work):
            seen[name] = await work()

        async with trio.open_nursery() as nursery:
            for name, work in {
                "ask": lambda: session.ask("one"),
                "history": session.history,
                "clear": session.clear,
                "after": session.history,
            }.items():
                nursery.start_soon(look, name, work)
                await trio.testing.wait_all_tasks_blocked()
        assert len(seen["history"]) == 2
        assert seen["after"] == []


async def test_fork(autojump_clock):
    """A fork has the history, the system message and the options, and goes its own way."""
    async with open_world(model="a/b", answer=replies(completion())) as world:
        session = world.client.session("k", system="s", temperature=0)
        await session.ask("one", turn_id="t")
        fork = await session.fork("k2", seed=7)
        await fork.ask("two")
        await session.ask("three")
        assert world.sent[1].contents == ["s", "one", "Yes.", "two"]
        assert world.sent[2].contents == ["s", "one", "Yes.", "three"]
        body = world.sent[1].body
        assert (body["model"], body["temperature"], body["seed"]) == ("a/b", 0, 7)
        assert texts(await fork.history()) == ["one", "Yes.", "two", "Yes."]
        assert (await fork.ask("", turn_id="t")).text == "Yes."
        assert len(world.sent) == 3


async def test_fork_to_what_exists(autojump_clock):
    """A fork never writes to a session that is there already, active or stored."""
    store = MemoryStore()
    async with open_world(answer=replies(completion()), store=store) as world:
        session, other = world.client.session("k"), world.client.session("other")
        await session.ask("one")
        await other.ask("mine")
        with pytest.raises(gr.SessionConflictError):
            await session.fork("other")
        await other.aclose()
        with pytest.raises(gr.SessionConflictError):
            await session.fork("other")
        await world.client.session("empty").history()
        with pytest.raises(gr.SessionConflictError):
            await session.fork("empty")
        assert texts(await other.history()) == ["mine", "Yes."]
        await session.ask("the session is as before")
        assert len(await session.history()) == 4


async def test_statistics(autojump_clock):
    """A snapshot tells what the session does."""
    async with open_world(SimulatorConfig(latency_s=1)) as world:
        session = world.client.session("k")
        assert (await session.statistics()).state == "idle"
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(session.ask, "q")
            await trio.sleep(0.5)
            running = await session.statistics()
            assert (running.state, running.queued, running.turns) == ("running", 2, 0)
        ended = await session.statistics()
        assert (ended.state, ended.queued, ended.turns, ended.version) == ("idle", 0, 3, 6)
        assert ended.rendered_bytes > 100
        await session.aclose()
        assert (await session.statistics()).state == "idle"


async def test_aclose_and_again(autojump_clock):
    """Closing a session ends its task; the next message starts it again where it was."""
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k")
        await session.aclose()
        await session.ask("one")
        tasks = trio.lowlevel.current_statistics().tasks_living
        await session.aclose()
        await session.aclose()
        assert trio.lowlevel.current_statistics().tasks_living == tasks - 1
        await session.ask("two")
        assert world.sent[-1].contents == ["one", "Yes.", "two"]


async def test_operations_are_checkpoints(autojump_clock):
    """Every async method of a session is a checkpoint, also when there is nothing to do."""
    async with open_world(answer=replies(completion())) as world:
        session = world.client.session("k")
        for method in (session.interrupt, session.aclose, session.statistics, session.history, session.clear):
            with trio.testing.assert_checkpoints():
                await method()
        with trio.testing.assert_checkpoints():
            await session.ask("q")
        with trio.testing.assert_checkpoints():
            await session.interrupt()


# Tools


def tool(call_id, content):
    return gr.ToolMessage(tool_call_id=call_id, content=content)


async def test_calls_and_results_over_turns(autojump_clock):
    """An answer that calls tools is followed by their results, which the next turn brings."""
    async with open_world(answer=replies(completion(None, tool_calls=[("x", "f"), ("y", "g")]), completion())) as world:
        session = world.client.session("k")
        reply = await session.ask("go")
        assert [call.id for call in reply.message.tool_calls or ()] == ["x", "y"]
        await session.ask([tool("y", "Y"), tool("x", "X")])
        messages = world.sent[-1].messages
        assert check_history(messages) == []
        assert [message.get("tool_call_id") for message in messages] == [None, None, "x", "y"]


async def test_results_that_never_come(autojump_clock):
    """A user who goes on talking over open calls gets an answer, not a refusal by the provider."""
    async with open_world(answer=replies(completion(None, tool_calls=[("x", "f")]), completion())) as world:
        session = world.client.session("k")
        await session.ask("go")
        await session.ask("never mind")
        messages = world.sent[-1].messages
        assert check_history(messages) == []
        assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]
        with pytest.raises(gr.BadRequestError, match="no open call"):
            await session.ask(tool("x", "too late"))
        assert len(world.sent) == 2


async def test_the_same_ids_in_every_answer(autojump_clock):
    """A model that calls every call `call_0` has a valid history, and its results find their calls."""
    async with open_world(answer=replies(completion(None, tool_calls=[("call_0", "f"), ("", "g")]))) as world:
        session = world.client.session("k")
        reply = await session.ask("go")
        for _ in range(3):
            reply = await session.ask([tool(call.id, "r") for call in reply.message.tool_calls or ()])
            assert check_history(world.sent[-1].messages) == []
            assert [m["content"] for m in world.sent[-1].messages if m["role"] == "tool"][-2:] == ["r", "r"]


async def test_details_come_back_as_they_were(autojump_clock):
    """Reasoning details, annotations and null content are echoed byte for byte."""
    details = b'[{"type":"reasoning.encrypted","data":"\\u00e9==","n":1.10}]'
    body = completion(None, tool_calls=[("x", "f")], reasoning_details="@", annotations="#")
    body = body.replace(b'"@"', details).replace(b'"#"', b'[{"a":1e2}]')
    async with open_world(answer=replies(body, completion())) as world:
        session = world.client.session("k")
        await session.ask("go")
        await session.ask(tool("x", "X"))
        assert b'"reasoning_details":' + details in world.sent[-1].raw
        assert b'"annotations":[{"a":1e2}]' in world.sent[-1].raw
        assert b'"content":null' in world.sent[-1].raw


async def test_an_answer_that_says_nothing(autojump_clock):
    """An empty answer is given to its asker and stored, and does not poison the next request."""
    async with open_world(answer=replies(completion(""), completion())) as world:
        session = world.client.session("k")
        assert (await session.ask("one")).text == ""
        await session.ask("two")
        assert check_history(world.sent[-1].messages) == []
        assert texts(await session.history()) == ["one", "", "two", "Yes."]


async def test_the_history_grows_by_what_is_new(autojump_clock):
    """Each request begins with the bytes of the one before it: nothing is encoded again."""
    async with open_world(answer=replies(completion("Ü \u2028 é"))) as world:
        session = world.client.session("k", system="s")
        for number in range(5):
            await session.ask(f"turn {number}")
        bodies = [sent.raw[: sent.raw.rindex(b"]")] for sent in world.sent]
        for before, after in itertools.pairwise(bodies):
            assert after.startswith(before)
        assert msgspec.json.decode(world.sent[-1].raw)["messages"][2]["content"] == "Ü \u2028 é"
