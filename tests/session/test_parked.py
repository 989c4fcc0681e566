"""Calls that wait for a reply from outside: parked in the log, over any restart, until it comes or lapses."""

from __future__ import annotations

import pickle
from contextlib import nullcontext, suppress
from decimal import Decimal
from functools import partial

import msgspec
import pytest
import trio
import trio.testing
from failing_store import FailingStore
from histories import check_history
from tool_loop import ONE_ROUND, TOOLS, Loop
from worlds import open_world, there

import gorouter_trio as gr
from gorouter_trio.errors import TurnParkedError
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.wire.codec import decode_log_entry

CLOCK_S = 1_800_000_000.0


async def kinds(store, key="k"):
    return [type(decode_log_entry(entry)).__name__ for entry in (await store.load(key)).entries]


def seams():
    """A wall clock that goes with the trio clock."""
    return gr.Seams(wall=lambda: CLOCK_S + trio.current_time())


def ask(session, loop, **options):
    return session.ask(ONE_ROUND, rounds=loop, tools=TOOLS, turn_id="t", **options)


async def next_is_right(world, session):
    assert (await session.ask("[[say well]]")).text == "well"
    assert check_history(world.sent[-1].messages) == []


def results(world):
    return {m["tool_call_id"]: m["content"] for m in world.sent[-1].messages if m["role"] == "tool"}


@pytest.mark.parametrize("reply", [True, False])
@pytest.mark.parametrize("each", [True, False])
async def test_the_reply_comes_while_the_asker_waits(autojump_clock, reply, each):
    """The call is carried out after the reply and not before, and the asker gets the answer."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session, loop, answers = world.client.session("k"), Loop(asked=("a1",), each=each), []

        async def one():
            answers.append(await ask(session, loop))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.sleep(100)
            statistics = await session.statistics()
            assert (statistics.state, statistics.waits_for, statistics.question_id) == ("parked", "reply", "a1")
            assert statistics.since_s == pytest.approx(100, abs=1)
            assert loop.ran == ["a2"]
            assert not await session.answer("unknown", True)
            assert await session.answer("a1", reply)
        assert loop.ran == (["a2", "a1"] if reply else ["a2"])
        assert answers[0].text
        assert "TurnParked" in await kinds(store)
        assert "QuestionAnswered" in await kinds(store)
        assert results(world)["a1"] == ("result of a1" if reply else "refused")
        assert not await session.answer("a1", True)
        await next_is_right(world, session)


async def test_a_question_lapses(autojump_clock):
    """Nobody replies in time: the model is told, and the turn goes on."""
    async with open_world(seams=seams()) as world:
        session = world.client.session("k")
        reply = await ask(session, Loop(asked=("a1",), until_s=CLOCK_S + 60))
        assert reply.text
        assert trio.current_time() == pytest.approx(60, abs=1)
        assert results(world)["a1"] == "lapsed"
        await next_is_right(world, session)


async def parked_store(world, *, how="leave", asked=("a1",), until_s=None, each=True):
    """A store with a parked turn whose other call has its result: its asker has left, or the process was killed."""
    store, left = MemoryStore(), MemoryStore()
    async with world.another_client(store=store) as client, trio.open_nursery() as nursery:
        session, loop = client.session("k"), Loop(asked=asked, until_s=until_s, each=each)

        async def one():
            with pytest.raises(TurnParkedError) if how == "close" else trio.CancelScope():
                await ask(session, loop)

        nursery.start_soon(one)
        await trio.sleep(5)
        await left.append("k", (await store.load("k")).entries, expected_version=0)
        if how == "close":
            await session.aclose()
        nursery.cancel_scope.cancel()
    return left if how == "kill" else store


WAYS = ["leave", "close", "kill"]


@pytest.mark.parametrize("how", WAYS)
async def test_a_turn_stays_parked(autojump_clock, how):
    """Its asker leaves, the client closes, the process dies: asked again with its tools, the turn waits on."""
    async with open_world() as world:
        store = await parked_store(world, how=how)
        assert (await kinds(store))[-1] in {"TurnParked", "ToolsAnswered"}
        sent = len(world.sent)
        async with world.another_client(store=store) as client, trio.open_nursery() as nursery:
            session, loop, answers = client.session("k"), Loop(asked=("a1",)), []
            assert (await session.statistics()).question_id is None, "it is not active"
            with pytest.raises(TurnParkedError) as caught:
                await session.ask("", turn_id="t")
            assert caught.value.question_id == "a1"
            assert (await session.statistics()).question_id == "a1"

            async def one():
                answers.append(await ask(session, loop))

            nursery.start_soon(one)
            await trio.sleep(50)
            assert len(world.sent) == sent
            assert await session.answer("a1", True)
            await trio.sleep(50)
            assert answers[0].text
            assert loop.ran == ["a1"], "the other one has its result"
            assert results(world) == {"a1": "result of a1", "a2": "result of a2"}
            assert (await kinds(store)).count("TurnParked") == 1
            await next_is_right(world, session)


@pytest.mark.parametrize("how", WAYS)
async def test_the_reply_comes_while_nobody_waits(autojump_clock, how):
    """It is stored, and the turn goes on when it is asked again, by whoever."""
    async with open_world() as world:
        store = await parked_store(world, how=how)
        async with world.another_client(store=store) as client:
            assert await client.session("k").answer("a1", True)
            assert not await client.session("k").answer("a1", False), "there is a reply"
        async with world.another_client(store=store) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            with pytest.raises(TurnParkedError):
                await session.ask("", turn_id="t")
            with pytest.raises(gr.SessionBusyError, match="a1"):
                await session.ask("something else")
            assert (await ask(session, loop)).text
            assert loop.ran == ["a1"]
            await next_is_right(world, session)


async def test_the_reply_takes_the_turn_up(autojump_clock):
    """With the tools at hand, the reply itself lets the turn go on, and its answer is there for who asks later."""
    async with open_world() as world:
        store = await parked_store(world, how="kill")
        async with world.another_client(store=store) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            assert await session.answer("a1", True, rounds=loop)
            reply = await session.ask("", turn_id="t")
            assert reply.text
            assert loop.ran == ["a1"]
            await next_is_right(world, session)


async def test_a_crash_behind_the_reply(autojump_clock):
    """Once the call was begun it is in doubt like any other."""
    async with open_world() as world:
        store = await parked_store(world, how="kill")
        left = MemoryStore()
        async with world.another_client(store=store) as client, trio.open_nursery() as nursery:
            nursery.start_soon(ask, client.session("k"), Loop(asked=("a1",), tool_s=100))
            await trio.sleep(5)
            assert await client.session("k").answer("a1", True)
            await trio.sleep(5)
            await left.append("k", (await store.load("k")).entries, expected_version=0)
            nursery.cancel_scope.cancel()
        async with world.another_client(store=left) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            with pytest.raises(gr.TurnInDoubtError):
                await ask(session, loop)
            await next_is_right(world, session)
            assert "whether it was carried out is unknown" in results(world)["a1"]


async def test_other_turns_and_a_parked_one(autojump_clock):
    """Others are refused while a question is open, go on once it has lapsed, and may interrupt where that is policy."""
    async with open_world(seams=seams()) as world:
        store = await parked_store(world, until_s=CLOCK_S + trio.current_time() + 1000)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            for work in (lambda: session.ask("q"), session.compact):
                with pytest.raises(gr.SessionBusyError, match="waits for a reply"):
                    await work()
            await session.history()
            await trio.sleep(1000)
            await next_is_right(world, session)
            assert "did not come" in results(world)["a1"]
            assert results(world)["a2"] == "result of a2"
            assert not await session.answer("a1", True)
        store = await parked_store(world)
        interrupts = gr.SessionConfig(double_texting="interrupt")
        async with world.another_client(store=store, sessions=interrupts) as client:
            await next_is_right(world, client.session("k"))


@pytest.mark.parametrize("asked", [("a1",), ("a1", "a2")])
async def test_a_reply_that_nobody_acts_on(autojump_clock, asked):
    """Other turns are told what the parked one waits for, and go on once the time of all questions is over."""
    async with open_world(seams=seams()) as world:
        store = await parked_store(world, asked=asked, until_s=CLOCK_S + trio.current_time() + 1000)
        async with world.another_client(store=store) as client:
            session = client.session("k")
            assert await session.answer("a1", True)
            waits_for = "waits for a reply to question 'a2'" if "a2" in asked else "waits to be taken up"
            with pytest.raises(gr.SessionBusyError, match=waits_for):
                await session.ask("q")
            await trio.sleep(1000)
            await next_is_right(world, session)
            assert set(results(world)) == {"a1", "a2"}
            assert "result of a1" not in results(world).values()


async def test_interrupting_and_undoing_a_parked_turn(autojump_clock):
    """An interrupt ends a turn that waits, and undo takes one back that nobody runs."""
    store = MemoryStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")
        async with trio.open_nursery() as nursery:

            async def one():
                with pytest.raises(gr.TurnInterruptedError):
                    await ask(session, Loop(asked=("a1",)))

            nursery.start_soon(one)
            await trio.sleep(5)
            assert await session.interrupt()
        assert (await kinds(store))[-1] == "TurnAbandoned"
        await next_is_right(world, session)
        left = await parked_store(world)
        async with world.another_client(store=left) as client:
            session = client.session("k")
            assert await session.undo()
            assert await session.history() == []
            await next_is_right(world, session)
            assert world.sent[-1].contents == ["[[say well]]"]


async def test_a_fork_does_not_wait(autojump_clock):
    """A fork of a session with a parked turn is without that turn: what it asks about happens once."""
    async with open_world() as world:
        store = await parked_store(world)
        async with world.another_client(store=store) as client:
            fork = await client.session("k").fork("k2")
            await next_is_right(world, fork)
            assert world.sent[-1].contents == ["[[say well]]"]
            assert not await fork.answer("a1", True)


# Operations of the store that take a second: loading, the entry of taking up, and that of the reply.
@pytest.mark.parametrize("at_s", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
@pytest.mark.parametrize("replies", [1, 2])
async def test_a_reply_while_the_turn_is_taken_up(autojump_clock, at_s, replies):
    """Wherever taking up has come to, the reply is taken, once, and the call carried out; nobody waits for ever."""
    async with open_world() as world:
        store = FailingStore(await parked_store(world), faults=dict.fromkeys(range(1, 4), "slow"))
        async with world.another_client(store=store) as client:
            session, loop, said = client.session("k"), Loop(asked=("a1",)), []

            async def answer():
                said.append(await session.answer("a1", True))

            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(ask, session, loop)
                    await trio.sleep(at_s + 0.01)
                    for _ in range(replies):
                        nursery.start_soon(answer)
            assert sorted(said) == [False, True][-replies:]
            assert loop.ran == ["a1"]
            await next_is_right(world, session)


async def test_a_reply_ahead_of_a_full_mailbox(autojump_clock):
    """One that waits for room behind other turns reaches the turn that waits for it."""
    async with open_world() as world:
        store = FailingStore(await parked_store(world), faults={1: "slow"})
        async with world.another_client(store=store, sessions=gr.SessionConfig(mailbox=1)) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    for work in (partial(ask, session, loop), session.history, session.history):
                        nursery.start_soon(work)
                        await trio.sleep(0.1)
                    assert await session.answer("a1", True)
            assert loop.ran == ["a1"]


@pytest.mark.parametrize("is_refused", [False, True])
async def test_a_reply_while_the_asker_leaves(autojump_clock, is_refused):
    """It is stored where the turn stays parked, and refused where that was ended; no reply is lost in between."""
    # The result of the other call is being written down, and is there only after a second.
    store = FailingStore(faults={5: "hang", 6: "slow"})
    async with open_world(store=store) as world:
        session, loop, said = world.client.session("k"), Loop(asked=("a1",), each=True), []

        async def answer():
            said.append(await session.answer("a1", True))

        async with trio.open_nursery() as nursery:

            async def one():
                with scope, pytest.raises(gr.TurnInterruptedError) if is_refused else nullcontext():
                    await ask(session, loop)

            scope = trio.CancelScope()
            nursery.start_soon(one)
            await trio.sleep(5)
            if is_refused:
                nursery.start_soon(session.interrupt)
                await trio.testing.wait_all_tasks_blocked()
            else:
                scope.cancel()
            for delay_s in (0, 0.5, 10):
                await trio.sleep(delay_s)
                nursery.start_soon(answer)
        assert said == [not is_refused, False, False], "the first one counts"
        assert loop.ran == ["a2"]
        if is_refused:
            assert "QuestionAnswered" not in await kinds(store)
            return
        assert (await ask(session, loop)).text
        assert loop.ran == ["a2", "a1"]
        await next_is_right(world, session)


@pytest.mark.parametrize("moment", ["hang", "before"])
async def test_the_asker_leaves_while_the_reply_is_written(autojump_clock, moment):
    """The turn goes on with the reply all the same, here; where it has failed with its store, nobody waits for one."""
    store = FailingStore()
    async with open_world(store=store) as world:
        session, loop, said = world.client.session("k"), Loop(asked=("a1",)), []

        async def one():
            with scope, suppress(gr.ActorGoneError):
                await ask(session, loop)

        async def answer():
            said.append(await session.answer("a1", True, rounds=loop))

        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            nursery.start_soon(one)
            await trio.sleep(5)
            store.fail_next(moment)
            nursery.start_soon(answer)
            await trio.sleep(5)
            scope.cancel()
        await trio.sleep(5)
        assert said == [moment == "hang"]
        assert loop.ran == (["a2", "a1"] if said[0] else ["a2"])
        if said[0]:
            assert (await ask(session, loop)).text
            assert (await kinds(store)).count("QuestionAnswered") == 1
        await next_is_right(world, session)


async def test_what_was_replied_before_a_question_was_asked(autojump_clock):
    """Ids of calls come again: what was said in the queue before then does not approve of a call that is new."""
    store = FailingStore(faults={1: "slow"})
    async with open_world(store=store) as world, trio.open_nursery() as nursery:
        session, loop, said = world.client.session("k"), Loop(asked=("a1",)), []

        async def one():
            with pytest.raises(gr.TurnInterruptedError):
                await ask(session, loop)

        async def answer():
            said.append(await session.answer("a1", True))

        nursery.start_soon(one)
        await trio.sleep(0.5)
        nursery.start_soon(answer)
        await trio.sleep(50)
        assert (await session.statistics()).state == "parked"
        assert await session.interrupt()
        await trio.sleep(50)
        assert said == [False]
        assert loop.ran == ["a2"]


@pytest.mark.parametrize("how", WAYS)
async def test_a_reply_that_comes_too_late(autojump_clock, how):
    """It counts for nothing, though nobody ran the turn when its question lapsed: the call is not carried out."""
    async with open_world(seams=seams()) as world:
        store = await parked_store(world, how=how, until_s=CLOCK_S + 60)
        async with world.another_client(store=store) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            await trio.sleep(7200)
            assert not await session.answer("a1", True, rounds=loop)
            assert "QuestionAnswered" not in await kinds(store)
            assert (await ask(session, loop)).text
            assert loop.ran == []
            assert results(world)["a1"] == "lapsed"


async def test_an_approval_that_comes_too_late(autojump_clock):
    """The tool that needed it does not run, neither then nor when the turn is asked again."""
    paid = []

    @gr.tool(rules=gr.security.ToolRules(sensitive=True))
    async def pay(amount: int) -> str:
        paid.append(amount)
        return "paid"

    async with open_world(seams=seams(), store=MemoryStore()) as world:
        session = world.client.session("k", tools=[pay], tool_limits=gr.ToolLimits(approval_s=60))
        with trio.move_on_after(5):
            await session.ask('[[call pay {"amount": 9}]]', turn_id="t")
        question_id = (await session.statistics()).question_id
        await trio.sleep(7200)
        assert question_id is not None
        assert not await session.answer(question_id, True)
        assert "not approved" in (await session.ask("", turn_id="t")).tool_calls[0].text
        assert paid == []


def asking_to_pay(paid):
    """A tool that needs an approval."""

    @gr.tool(rules=gr.security.ToolRules(sensitive=True))
    async def pay(amount: int) -> str:
        paid.append(amount)
        return "paid"

    return pay


@pytest.mark.parametrize("error", [RuntimeError, OSError])
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_question_that_is_not_stored(autojump_clock, error, moment):
    """The call is not carried out, which is written down as its result, and the turn goes on."""
    paid, store = [], FailingStore(error=error)
    async with open_world(seams=seams(), store=store) as world:
        session = world.client.session("k", tools=[asking_to_pay(paid)])
        store.fail_next(moment, skip=3)  # The first three load, begin the turn, and note the call.
        reply = await session.ask('[[call pay {"amount": 9}]]', turn_id="t")
        assert [report.has_run for report in reply.tool_calls] == [False]
        assert (await session.ask("", turn_id="t")).text == reply.text
        assert paid == []
        await next_is_right(world, session)


async def test_an_approval_that_is_written_when_its_time_ends(autojump_clock):
    """The call counts as not approved, the asker has its answer, and whoever approved is told that it was too late."""
    paid, said, store = [], [], FailingStore()
    async with open_world(seams=seams(), store=store) as world:
        session = world.client.session("k", tools=[asking_to_pay(paid)], tool_limits=gr.ToolLimits(approval_s=60))

        async def approve():
            await trio.sleep(59.5)
            store.fail_next("slow")
            said.append(await session.answer(there((await session.statistics()).question_id), True))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(approve)
            reply = await session.ask('[[call pay {"amount": 9}]]')
        assert [report.has_run for report in reply.tool_calls] == [False]
        assert (paid, said) == ([], [False])
        await next_is_right(world, session)


async def test_the_clock_of_a_computer_that_slept(autojump_clock):
    """The wall clock says whether a reply is late, also where the timer of who waits has not seen the time pass."""
    slept_s = 0
    async with open_world(seams=gr.Seams(wall=lambda: CLOCK_S + trio.current_time() + slept_s)) as world:
        session, loop = world.client.session("k"), Loop(asked=("a1",), until_s=CLOCK_S + 60)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, session, loop)
            await trio.sleep(5)
            slept_s = 7200
            assert not await session.answer("a1", True)
        assert "a1" not in loop.ran
        assert results(world)["a1"] == "lapsed"


async def test_a_parked_session_may_passivate(autojump_clock):
    """Without an asker the session is idle, and goes; the reply brings it back."""
    async with open_world(SimulatorConfig(), sessions=gr.SessionConfig(idle_s=100)) as world:
        session, loop = world.client.session("k"), Loop(asked=("a1",))
        with trio.move_on_after(5):
            await ask(session, loop)
        await trio.sleep(200)
        assert world.client._runtime.sessions.active == 0
        assert await session.answer("a1", True, rounds=loop)
        assert (await session.ask("", turn_id="t")).text
        assert loop.ran.count("a1") == 1


@pytest.mark.parametrize("odd", [object(), "\ud800", Decimal("NaN"), msgspec.Raw(b"{")])
async def test_replies_are_checked(autojump_clock, odd):
    """What is no JSON is refused before it is written, and the turn waits on."""
    async with open_world() as world:
        store = await parked_store(world)
        async with world.another_client(store=store) as client:
            session, loop = client.session("k"), Loop(asked=("a1",))
            with pytest.raises(gr.BadRequestError, match="answer: cannot be written"):
                await session.answer("a1", odd)
            assert await session.answer("a1", True, rounds=loop)
            assert (await ask(session, loop)).text


def test_the_error_can_be_pickled():
    """The question survives the way to another process."""
    error = pickle.loads(pickle.dumps(TurnParkedError("waits", question_id="q")))
    assert (error.message, error.question_id) == ("waits", "q")
