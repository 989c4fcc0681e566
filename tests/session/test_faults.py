"""Stores that fail, hang or raise what nobody expected; and actors that end."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
import trio
import trio.testing
from failing_store import FailingStore, Moment
from histories import check_history
from worlds import DONE, chunk, completion, errors, open_world, replies, streams, there

import gorouter_trio as gr
from gorouter_trio.simulator import SimulatorConfig

SLOW = SimulatorConfig(latency_s=1, tokens_per_s=10, comment_interval_s=0)
GRACE_S = 3.0
SESSIONS = gr.SessionConfig(shutdown_grace_s=GRACE_S)


class StoreError(gr.GorouterError):
    """What a store of this package would raise."""


def texts(history):
    return [entry.message.content for entry in history]


async def next_turn_is_right(world, session, *, before):
    """One more turn: it is answered, its request is valid, and begins with the messages `before`."""
    world.api.answer = world.simulator.handler
    with trio.fail_after(20):
        assert (await session.ask("[[say well]]")).text == "well"
    assert check_history(world.sent[-1].messages) == []
    assert world.sent[-1].contents == [*before, "[[say well]]"]
    assert texts(await session.history()) == [*before, "[[say well]]", "well"]


async def take_turn(session, how):
    if how == "ask":
        return await session.ask("q", turn_id="t")
    async with session.stream("q", turn_id="t") as stream:
        return await stream.collect()


MOMENTS: list[Moment] = ["before", "after", "hang", "hang_after"]
ERRORS = [StoreError, RuntimeError, OSError, gr.SessionConflictError]
ANSWERS = {"ask": replies(completion("A")), "stream": streams(chunk({"content": "A"}), chunk({}, finish="stop"), DONE)}


@pytest.mark.parametrize("how", ["ask", "stream"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("moment", ["before", "after"])
async def test_saving_the_answer_fails(autojump_clock, how, error, moment):
    """The paid answer is in `partial` of `HistoryNotSaved`, whatever the store raised; the next turn is right."""
    store = FailingStore(faults={3: moment}, error=error)
    async with open_world(answer=ANSWERS[how], store=store, sessions=SESSIONS) as world:
        session = world.client.session("k")
        with pytest.raises(gr.HistoryNotSaved) as caught:
            await take_turn(session, how)
        assert there(caught.value.partial).text == "A"
        assert not there(caught.value.partial).interrupted
        assert caught.value.generation_id == "gen-1"
        cause = there(caught.value.__cause__)
        assert isinstance(cause.__cause__ if error is OSError else cause, error)
        if moment == "after":
            assert (await session.ask("", turn_id="t")).text == "A", "it was stored, as the store says when asked again"
        else:
            with pytest.raises(gr.TurnInDoubtError):
                await session.ask("", turn_id="t")
        assert len(world.sent) == 1
        await next_turn_is_right(world, session, before=["q", "A"] if moment == "after" else [])


@pytest.mark.parametrize("how", ["ask", "stream"])
@pytest.mark.parametrize("moment", ["hang", "hang_after", "deaf"])
async def test_saving_the_answer_hangs(autojump_clock, how, moment):
    """A store that hangs costs the grace; the answer comes all the same, even if the store hears no cancel."""
    store = FailingStore(faults={3: moment})
    async with open_world(answer=ANSWERS[how], store=store, sessions=SESSIONS) as world:
        session = world.client.session("k")
        with pytest.raises(gr.HistoryNotSaved, match="3 s") as caught:
            await take_turn(session, how)
        assert trio.current_time() == pytest.approx(GRACE_S, abs=0.1)
        assert there(caught.value.partial).text == "A"
        if moment != "deaf":
            await next_turn_is_right(world, session, before=["q", "A"] if moment == "hang_after" else [])


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("operation", [1, 2])
async def test_loading_or_starting_fails(autojump_clock, operation, moment, error):
    """What fails before the request is sent is raised, nothing is sent, and the turn may be asked again."""
    store = FailingStore(faults={operation: moment}, error=error)
    async with open_world(answer=ANSWERS["ask"], store=store, sessions=SESSIONS) as world:
        session = world.client.session("k")
        own: type[gr.GorouterError] = gr.StoreError if error is OSError else gr.ActorGoneError
        expected = error if issubclass(error, gr.GorouterError) else own
        with pytest.raises(expected) as caught:
            await take_turn(session, "ask")
        if expected is own:
            assert isinstance(caught.value.__cause__, error)
        assert not world.sent
        assert (await take_turn(session, "ask")).text == "A"
        await next_turn_is_right(world, session, before=["q", "A"])


@pytest.mark.parametrize("error", [StoreError, RuntimeError])
@pytest.mark.parametrize("moment", ["before", "after", "hang"])
async def test_abandoning_fails(autojump_clock, moment, error):
    """When the end of a failed turn cannot be stored, its own error is raised, with a note; the next turn is right."""
    store = FailingStore(faults={3: moment}, error=error)
    async with open_world(answer=errors(400, "too long"), store=store, sessions=SESSIONS) as world:
        session = world.client.session("k")
        with pytest.raises(gr.BadRequestError, match="too long") as caught:
            await take_turn(session, "ask")
        assert "not stored" in caught.value.__notes__[0]
        await next_turn_is_right(world, session, before=[])


@pytest.mark.parametrize("error", [StoreError, RuntimeError])
@pytest.mark.parametrize("work", ["history", "clear", "fork"])
async def test_other_operations_fail(autojump_clock, work, error):
    """History, clear and fork raise what the store raised, and the session lives on."""
    store = FailingStore(error=error)
    async with open_world(answer=ANSWERS["ask"], store=store) as world:
        session = world.client.session("k")
        await take_turn(session, "ask")
        store.fail_next()
        with pytest.raises(StoreError if error is StoreError else gr.ActorGoneError, match="failed"):
            await (session.fork("k2") if work == "fork" else getattr(session, work)())
        await next_turn_is_right(world, session, before=["q", "A"])


async def answer_or_error(session, prompt):
    """The paid answer, in one way or the other, or an error that says that there is none."""
    try:
        answer = await session.ask(prompt)
    except gr.HistoryNotSaved as exc:
        answer = exc.partial
    except (StoreError, gr.ActorGoneError):
        return
    assert answer.text == "A"


@pytest.mark.parametrize("sticky", [False, True])
async def test_every_operation_fails_once_or_from_then_on(autojump_clock, sticky):
    """Whichever operation of four turns fails, in whatever way: one answer each, and a valid request after it."""
    for operation in range(1, 12):
        for moment in MOMENTS:
            faults = dict.fromkeys(range(operation, operation + 5 if sticky else operation + 1), moment)
            store = FailingStore(faults=faults, error=StoreError)
            async with open_world(answer=ANSWERS["ask"], store=store, sessions=SESSIONS) as world:
                session = world.client.session("k")
                for number in range(4):
                    with trio.move_on_after(10):
                        await answer_or_error(session, str(number))
                store.faults.clear()
                await session.ask("last")
                for sent in world.sent:
                    assert check_history(sent.messages) == [], (operation, moment)
                history = texts(await session.history())
                assert history[-2:] == ["last", "A"]
                # What is in the history is in order, and each turn at most once.
                assert history[::2] == sorted(set(history[::2]))


async def test_body_error_wins_over_a_failing_store(autojump_clock):
    """An error of the body leaves as it is, with a note, when the partial answer could not be stored."""
    store = FailingStore(faults={3: "before"}, error=StoreError)
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        with pytest.raises(ValueError, match="mine") as caught:
            async with session.stream("[[tokens 100]]") as stream:
                await anext(stream)
                raise ValueError("mine")
        assert "not stored" in caught.value.__notes__[0]
        await next_turn_is_right(world, session, before=[])


class BusyStore(FailingStore):
    """A store that runs every operation in a nursery of its own, so that a cancel comes out of it as a group."""

    async def _run(self, name, work):
        results = []

        async def run():
            results.append(await super(BusyStore, self)._run(name, work))
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            nursery.start_soon(trio.sleep_forever)
        return results[0]


@pytest.mark.parametrize("operation", [1, 2])
async def test_a_store_with_nurseries(autojump_clock, operation):
    """Cancels and errors that come out of a store in groups are cancels and errors all the same."""
    store = BusyStore(faults={operation: "hang"})
    async with open_world(answer=ANSWERS["ask"], store=store, sessions=SESSIONS) as world:
        session = world.client.session("k")

        async def ask():
            with pytest.raises(gr.TurnInterruptedError):
                await session.ask("q")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert await session.interrupt()
        store.fail_next("before")
        with pytest.raises(gr.ActorGoneError, match="ExceptionGroup"):
            await session.ask("r")
        store.fail_next("hang", skip=2)
        with pytest.raises(gr.HistoryNotSaved):
            await session.ask("s")
        await next_turn_is_right(world, session, before=[])


# The actor


async def test_an_unexpected_error_goes_to_its_asker(autojump_clock):
    """The asker gets `ActorGoneError` with the cause, others are served, the session lives."""
    store = FailingStore(faults={1: "before"}, error=ZeroDivisionError)
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        outcomes = []

        async def ask(text):
            try:
                outcomes.append((await session.ask(text)).text)
            except gr.ActorGoneError as exc:
                outcomes.append(type(exc.__cause__).__name__)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, f"[[say {number}]]")
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert outcomes == ["ZeroDivisionError", "1", "2"]


async def fail_times(session, count):
    for _ in range(count):
        with pytest.raises(gr.ActorGoneError, match="KeyError"):
            await session.ask("q")


async def test_restart_intensity(autojump_clock):
    """Five failures in 30 s are lived through; the sixth ends the actor, and the next ask starts a new one."""
    store = FailingStore(error=KeyError, faults=dict.fromkeys(range(1, 7), "before"))
    async with open_world(answer=ANSWERS["ask"], store=store) as world:
        session = world.client.session("k")
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        await fail_times(session, 5)
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == tasks + 1
        await fail_times(session, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        await next_turn_is_right(world, session, before=[])


async def test_restart_intensity_forgets(autojump_clock):
    """Failures that lie 30 s apart never end an actor."""
    store = FailingStore(error=KeyError, faults=dict.fromkeys(range(1, 20), "before"))
    async with open_world(answer=ANSWERS["ask"], store=store) as world:
        session = world.client.session("k")
        await trio.testing.wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(4):
            await fail_times(session, 4)
            await trio.sleep(31)
            assert trio.lowlevel.current_statistics().tasks_living == tasks + 1


async def test_who_is_queued_when_the_actor_ends(autojump_clock):
    """When the restarts are used up, everybody who is queued gets `ActorGoneError` with the last cause."""
    store = FailingStore(error=KeyError, faults=dict.fromkeys(range(1, 50), "before"))
    async with open_world(answer=ANSWERS["ask"], store=store) as world:
        session = world.client.session("k")
        causes = []

        async def ask():
            with pytest.raises(gr.ActorGoneError) as caught:
                await session.ask("q")
            causes.append(type(caught.value.__cause__))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ask)
        assert causes == [KeyError] * 10
        store.faults.clear()
        await next_turn_is_right(world, session, before=[])


async def test_aclose_answers_everybody(autojump_clock):
    """Closing interrupts the running turn, whose end is stored, and gives the queued ones `ActorGoneError`."""
    store = FailingStore()
    async with open_world(SLOW, store=store) as world:
        session = world.client.session("k")
        outcomes = []

        async def ask(text):
            with pytest.raises((gr.TurnInterruptedError, gr.ActorGoneError)) as caught:
                await session.ask(text)
            outcomes.append(caught.type)

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(ask, str(number))
                await trio.testing.wait_all_tasks_blocked(0.001)
            await session.aclose()
        assert sorted(kind.__name__ for kind in outcomes) == [
            "ActorGoneError",
            "ActorGoneError",
            "TurnInterruptedError",
        ]
        assert store.operations == ["load", "append", "append"]
        await next_turn_is_right(world, session, before=[])


async def test_aclose_while_the_answer_is_stored(autojump_clock):
    """A turn that is being stored when its session is closed is stored, and its asker gets the answer."""
    for moment in ("hang", "hang_after"):
        store = FailingStore(faults={3: moment})
        async with open_world(answer=ANSWERS["ask"], store=store) as world:
            session = world.client.session("k")

            async def ask(session=session):
                assert (await session.ask("q")).text == "A"

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                await trio.sleep(1)
                with trio.fail_after(1):
                    await session.aclose()
            await next_turn_is_right(world, session, before=["q", "A"])


# Shutdown


@pytest.mark.parametrize("hanging", [False, True])
async def test_client_shutdown(autojump_clock, hanging):
    """Running and queued turns, streams, slow stores: every asker gets one answer, and nothing outlives the grace."""
    store = FailingStore()
    if hanging:
        store.faults.update(dict.fromkeys(range(13, 100), "hang"))
    outcomes = []

    async def ask(session, text):
        try:
            outcomes.append((await session.ask(text)).text)
        except (gr.TurnInterruptedError, gr.ActorGoneError) as exc:
            outcomes.append(type(exc))

    async def read(session):
        try:
            async with session.stream("[[tokens 500]]") as stream:
                await stream.collect()
        except (gr.TurnInterruptedError, gr.HistoryNotSaved) as exc:
            outcomes.append(type(exc))

    async with open_world(SLOW, store=store, sessions=SESSIONS) as world:
        await trio.testing.wait_all_tasks_blocked(0.001)
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with trio.open_nursery() as nursery:
            async with world.another_client() as client:
                for key in "abc":
                    for number in range(4):
                        nursery.start_soon(ask, client.session(key), f"[[say {number}]] [[fault hang]]")
                for key in "def":
                    nursery.start_soon(read, client.session(key))
                await trio.sleep(2.5)
                started = trio.current_time()
            assert trio.current_time() - started <= GRACE_S + 1
        assert len(outcomes) == 15
        assert outcomes.count(gr.ActorGoneError) == 9
        await trio.sleep(1)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert world.client.statistics().in_flight == 0
        store.faults.clear()
        if not hanging:
            for key in "def":
                history = await world.client.session(key).history()
                assert there(history[1].call).interrupted
        for key in "abcdef":
            await world.client.session(key).ask("[[say next]]")
            assert check_history(world.sent[-1].messages) == []


async def test_shutdown_while_an_answer_is_stored(autojump_clock):
    """An answer that is being stored when the client closes is stored: what is acked is never lost."""
    for moment in ("hang", "hang_after"):
        store = FailingStore(faults={3: moment})
        async with open_world(answer=ANSWERS["ask"], store=store) as world:
            texts_seen: list[str] = []
            async with trio.open_nursery() as nursery:

                async def ask(client, seen=texts_seen):
                    seen.append((await client.session("k").ask("q")).text)

                async with world.another_client() as client:
                    nursery.start_soon(ask, client)
                    await trio.sleep(1)
            assert texts_seen == ["A"]
            assert texts(await world.client.session("k").history()) == ["q", "A"]


async def test_asking_while_the_client_closes(autojump_clock):
    """Whoever asks a closing client is told, old session or new, and is not left waiting."""
    store = FailingStore(faults={3: "hang"})
    async with open_world(SLOW, store=store, sessions=SESSIONS) as world, trio.open_nursery() as nursery:

        async def late(client):
            with pytest.raises(gr.TurnInterruptedError):
                await client.session("k").ask("[[fault hang]]")

        async def later(client):
            await trio.sleep(2)
            for key in ("k", "new"):
                with pytest.raises(gr.ActorGoneError), trio.fail_after(GRACE_S):
                    await client.session(key).ask("q")
            with pytest.raises(gr.PoolClosedError):
                await client.chat("q")

        async with world.another_client() as client:
            nursery.start_soon(late, client)
            nursery.start_soon(later, client)
            await trio.sleep(1.5)


@pytest.mark.parametrize("count", [2**64, 10**400], ids=["wide", "huge"])
async def test_a_count_beyond_all_measure(autojump_clock, count):
    """A reply that counts so costs its session nothing, nor does a log that an older version has written so."""
    store = gr.stores.MemoryStore()
    odd = completion("A").replace(b'"prompt_tokens":3', b'"prompt_tokens":%d' % count)
    async with open_world(answer=replies(odd, completion("B")), store=store) as world:
        session = world.client.session("k")
        assert [(await session.ask("q")).text for _ in range(2)] == ["A", "B"]
    held = await store.load("k")
    older = [entry.replace(b'"completion_tokens":5', b'"completion_tokens":%d' % count) for entry in held.entries]
    assert older != list(held.entries)
    await store.rewrite("k", older, expected_version=held.version)
    async with open_world(store=store) as world:
        await next_turn_is_right(world, world.client.session("k"), before=["q", "A", "q", "B"])


@pytest.mark.parametrize("odd", [Decimal("NaN"), msgspec.Raw(b'{"type":')], ids=["no number", "no JSON"])
async def test_a_message_that_has_no_json(autojump_clock, odd):
    """It is refused, and no store ever has it: the session goes on, in this process and in another."""
    store = gr.stores.MemoryStore()
    async with open_world(store=store) as world:
        session = world.client.session("k")
        with pytest.raises(gr.BadRequestError, match="messages"):
            await session.ask({"role": "user", "content": "x", "weight": odd})
        await next_turn_is_right(world, session, before=[])
    async with open_world(store=store) as world:
        await next_turn_is_right(world, world.client.session("k"), before=["[[say well]]", "well"])
