"""A session against a plain list: whatever is done to it, cut off or killed, it has what the list has."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_loop import TOOLS, Loop
from worlds import DONE, EVENTS, JSON, World, chunk, completion, open_world

import gorouter_trio as gr
from gorouter_trio.abc import HistoryStore
from gorouter_trio.stores import MemoryStore
from gorouter_trio.testing import check_history

KINDS = (
    *("ask", "ask", "stream", "tools", "streamed tools", "leave", "cancel", "interrupt", "crash", "again"),
    *("passivate", "reload", "clear", "fork", "undo", "undo earlier", "edit", "retry", "compact", "conflict", "fail"),
)
OPERATION = st.tuples(st.sampled_from(KINDS), st.integers(0, 39), st.integers(0, 9))
OPERATIONS = st.lists(OPERATION, min_size=1, max_size=50)


class Api:
    """Answers `r1`, `r2`, and so on, after a second; calls tools in answer to a message that asks for them."""

    def __init__(self) -> None:
        self.count = 0
        self.bodies: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.fails = False

    async def answer(self, request: Any, reply: Any) -> None:
        body = msgspec.json.decode(bytes(request.body))
        self.bodies.append(body)
        self.problems += check_history(body)
        self.count += 1
        await trio.sleep(1)
        if self.fails:
            await reply.send(400, JSON, body=b'{"error":{"code":400,"message":"no"}}')
            return
        last = body["messages"][-1]
        calls = [("a1", "f"), ("a2", "g")] if "tools" in body and last["role"] == "user" else []
        if not body.get("stream"):
            await reply.send(200, JSON, body=completion(None if calls else f"r{self.count}", tool_calls=calls))
            return
        await reply.start(200, EVENTS)
        for number, (call_id, name) in enumerate(calls):
            piece = {"index": number, "id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
            await reply.write(chunk({"tool_calls": [piece]}))
            await trio.sleep(0.1)
        for letter in "" if calls else f"r{self.count}":
            await reply.write(chunk({"content": letter}))
            await trio.sleep(0.1)
        await reply.write(chunk({}, finish="tool_calls" if calls else "stop"))
        await reply.write(DONE)
        await reply.finish()


Turn = tuple[str, list[object]]


class Model:
    """The list: turns with their ids and what was said in them."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    @property
    def contents(self) -> list[object]:
        return [content for _, said in self.turns for content in said]

    @property
    def sent(self) -> list[object]:
        """What of it a request has: not an answer that was cut off before it said anything, nor its question."""
        kept = [said[:-1] if said[-1] == "" else said for _, said in self.turns]
        return [content for said in kept if len(said) > 1 for content in said]

    def cut(self, place: int) -> None:
        del self.turns[place:]


class Run:
    """One run of operations on a session and its model."""

    def __init__(self, world: World, api: Api, store: HistoryStore) -> None:
        self.world, self.api, self.store = world, api, store
        self.model = Model()
        self.number = 0
        self.doubtful: list[str] = []
        self.key = "k"
        self.client = world.client
        self.managers: list[Any] = []

    @property
    def session(self) -> Any:
        return self.client.session(self.key)

    def new(self) -> tuple[str, str]:
        self.number += 1
        return f"t{self.number}", f"u{self.number}"

    async def check(self) -> None:
        """The history is the list's, and so is what a request would have."""
        assert [entry.message.content for entry in await self.session.history()] == self.model.contents
        assert not self.api.problems

    async def accept(self, turn_id: str, prompt: str, *, base: list[Turn] | None = None) -> None:
        """A turn was cut off: it is wholly there, in part, or not; take what is for what was."""
        base = self.model.turns if base is None else base
        history = [entry.message.content for entry in await self.session.history()]
        for before in (self.model.turns, base):
            contents = [content for _, said in before for content in said]
            if history == contents:
                self.model.turns = list(before)
                return
            rest = history[len(contents) :]
            if history[: len(contents)] == contents and rest[0] == prompt and len(rest) <= 5:
                self.model.turns = [*before, (turn_id, rest)]
                return
        raise AssertionError((history, self.model.turns, prompt))

    # One method an operation: how long it may take, in tenths of a second, and a choice

    async def take(self, how: str, turn_id: str, prompt: str) -> None:
        options: dict[str, Any] = {"turn_id": turn_id}
        if "tools" in how:
            options |= {"rounds": Loop(each=len(prompt) % 2 == 0), "tools": TOOLS}
        if "stream" not in how:
            await self.session.ask(prompt, **options)
            return
        async with self.session.stream(prompt, **options) as stream:
            await stream.collect()

    async def whole(self, how: str, _time: int, _choice: int) -> None:
        turn_id, prompt = self.new()
        before = len(self.api.bodies)
        await self.take(how, turn_id, prompt)
        said: list[object] = [prompt, f"r{self.api.count}"]
        if "tools" in how:
            said[1:1] = [None, "result of a1", "result of a2"]
        first = [message.get("content") for message in self.api.bodies[before]["messages"]]
        said_before = [content for content in first if not str(content).startswith("The call")]
        assert said_before == [*self.model.sent, prompt]
        self.model.turns.append((turn_id, said))

    async def leave(self, _how: str, time: int, _choice: int) -> None:
        turn_id, prompt = self.new()
        async with self.session.stream(prompt, turn_id=turn_id) as stream:
            for _ in range(time % 3):
                await anext(stream, None)
        await self.accept(turn_id, prompt)

    async def cancel(self, _how: str, time: int, choice: int) -> None:
        turn_id, prompt = self.new()
        with trio.move_on_after(time / 10):
            await self.take(("ask", "stream", "tools", "streamed tools")[choice % 4], turn_id, prompt)
        await self.accept(turn_id, prompt)

    async def interrupt(self, _how: str, time: int, choice: int) -> None:
        turn_id, prompt = self.new()

        async def one() -> None:
            with suppress(gr.TurnInterruptedError):
                await self.take(("ask", "stream", "tools", "streamed tools")[choice % 4], turn_id, prompt)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            await trio.sleep(time / 10)
            await self.session.interrupt()
        await self.accept(turn_id, prompt)

    async def crash(self, _how: str, time: int, choice: int) -> None:
        """The process is killed in the midst of a turn: what is left is what the store had then."""
        turn_id, prompt = self.new()
        left = MemoryStore()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.take, ("ask", "stream", "tools", "streamed tools")[choice % 4], turn_id, prompt)
                await trio.sleep(time / 10)
                for key in await self.store.list_keys():
                    stored = await self.store.load(key)
                    await left.append(key, stored.entries, expected_version=0)
                scope.cancel()
        self.store = left
        await self.restart()
        await self.accept(turn_id, prompt)
        if self.model.turns[-1:] == [] or self.model.turns[-1][0] != turn_id or len(self.model.turns[-1][1]) in {2, 4}:
            sent = self.api.count
            try:
                await self.session.ask("again", turn_id=turn_id)
            except gr.TurnInDoubtError:
                assert self.api.count == sent
            else:
                if self.api.count > sent:
                    self.model.turns.append((turn_id, ["again", f"r{self.api.count}"]))

    async def again(self, _how: str, _time: int, choice: int) -> None:
        """A turn that was answered is asked again: it costs nothing."""
        if self.model.turns:
            turn_id, said = self.model.turns[choice % len(self.model.turns)]
            sent = self.api.count
            try:
                assert (await self.session.ask("", turn_id=turn_id)).text == (said[-1] or "")
            except gr.TurnInDoubtError:
                assert said[-1] is None or str(said[-1]).startswith("result"), "it has no answer"
            assert self.api.count == sent

    async def passivate(self, _how: str, _time: int, _choice: int) -> None:
        await trio.sleep(2_000)
        assert self.client._runtime.sessions.active == 0

    async def reload(self, _how: str, _time: int, _choice: int) -> None:
        await self.session.aclose()

    async def clear(self, _how: str, _time: int, _choice: int) -> None:
        await self.session.clear()
        self.model.cut(0)

    async def fork(self, _how: str, _time: int, _choice: int) -> None:
        fork = await self.session.fork(f"fork {self.number}-{len(await self.store.list_keys())}")
        self.key = fork.key

    async def undo(self, how: str, _time: int, choice: int) -> None:
        if how == "undo":
            assert await self.session.undo() == bool(self.model.turns)
            self.model.cut(len(self.model.turns) - 1 if self.model.turns else 0)
        elif self.model.turns:
            place = choice % len(self.model.turns)
            assert await self.session.undo(self.model.turns[place][0])
            self.model.cut(self.last_place(place))

    async def edit(self, how: str, time: int, choice: int) -> None:
        """A turn takes another's place, unless it fails or is cut off."""
        if not self.model.turns:
            return
        place = self.last_place(choice % len(self.model.turns)) if how == "edit" else len(self.model.turns) - 1
        turn_id, prompt = self.new()
        edited, said = self.model.turns[place]
        before = self.model.turns[:place]
        with trio.move_on_after(time / 10 + 0.05) as scope:
            if how == "edit":
                await self.session.edit(edited, prompt, turn_id=turn_id)
            else:
                prompt = str(said[0])
                await self.session.retry(turn_id=turn_id)
        if scope.cancelled_caught:
            await self.accept(turn_id, prompt, base=before)
        else:
            self.model.turns = [*before, (turn_id, [prompt, f"r{self.api.count}"])]

    def last_place(self, place: int) -> int:
        """An id that was used again stands for its last turn."""
        ids = [turn_id for turn_id, _ in self.model.turns]
        return len(ids) - 1 - ids[::-1].index(ids[place])

    async def compact(self, _how: str, _time: int, _choice: int) -> None:
        await self.session.compact()

    async def conflict(self, _how: str, _time: int, _choice: int) -> None:
        """Another process takes a turn; this one notices, and then goes on from there."""
        turn_id, prompt = self.new()
        await self.session.undo("nothing")
        async with self.world.another_client(store=self.store) as other:
            await other.session(self.key).ask(prompt, turn_id=turn_id)
        self.model.turns.append((turn_id, [prompt, f"r{self.api.count}"]))
        with pytest.raises(gr.SessionConflictError):
            await self.session.ask("late")

    async def fail(self, _how: str, _time: int, _choice: int) -> None:
        self.api.fails = True
        with pytest.raises(gr.BadRequestError):
            await self.session.ask("bad")
        self.api.fails = False

    async def restart(self) -> None:
        """A client of its own, as a new process has it; the one before it lives on beside it, unused."""
        manager = self.world.another_client(store=self.store)
        self.client = await manager.__aenter__()
        self.managers.append(manager)


METHODS = dict.fromkeys(("ask", "stream", "tools", "streamed tools"), "whole")
METHODS |= {"undo earlier": "undo", "retry": "edit"}


async def run_all(operations: list[tuple[str, int, int]]) -> None:
    api, store = Api(), MemoryStore()
    async with open_world(answer=api.answer, store=store, notes=False) as world:
        run = Run(world, api, store)
        try:
            for how, time, choice in operations:
                await getattr(run, METHODS.get(how, how))(how, time, choice)
                await run.check()
            await run.whole("ask", 0, 0)
            await run.check()
        finally:
            for manager in reversed(run.managers):
                await manager.__aexit__(None, None, None)


@given(OPERATIONS)
@settings(max_examples=60)
def test_a_session_is_a_list(operations: list[tuple[str, int, int]]) -> None:
    """Asks, streams, tools, cancels, crashes, edits and the rest: as in a list, and no request is invalid."""
    trio.run(run_all, operations, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.long
@given(st.lists(OPERATION, min_size=45, max_size=50))
@settings(max_examples=2_000)
def test_a_session_is_a_list_for_long(operations: list[tuple[str, int, int]]) -> None:
    """The same, 2,000 times up to 50 operations."""
    trio.run(run_all, operations, clock=trio.testing.MockClock(autojump_threshold=0))
