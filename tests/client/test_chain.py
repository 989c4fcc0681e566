"""Middlewares, hooks and events around chats."""

from __future__ import annotations

from decimal import Decimal

import pytest
import trio
from call_forms import now
from worlds import completion, open_world, replies

import gorouter_trio as gr

ANSWER = "Yes."


class Refusal(gr.GorouterError):
    """An error of the program's own."""


def noting(notes: list[str], name: str):
    async def middleware(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        notes.append(f"{name} in")
        await proceed()
        assert state.result is not None
        notes.append(f"{name} out {state.result.text}")

    return middleware


def noting_hook(notes: list[str], name: str) -> gr.Hook:
    return gr.Hook(
        before=lambda _context, _state: notes.append(f"before {name}"),
        after=lambda _context, _state: notes.append(f"after {name}"),
    )


async def test_the_order_of_everything(autojump_clock):
    """The first middleware is the outermost; hooks are called inside, in order; events frame it all."""
    notes: list[str] = []
    async with open_world(answer=replies(completion(ANSWER))) as world:
        client = world.client
        client.use(noting(notes, "a"))
        client.use(noting(notes, "b"))
        for name in ("1", "2"):
            client.add_hook(noting_hook(notes, name))
        with client.events() as feed:
            await client.chat("Well?")
            assert isinstance(await anext(feed), gr.ChatStarted)
            finished = await anext(feed)
    assert isinstance(finished, gr.ChatFinished)
    assert finished.result.text == ANSWER
    assert notes == ["a in", "b in", "before 1", "before 2", "after 1", "after 2", f"b out {ANSWER}", f"a out {ANSWER}"]


async def test_a_middleware_changes_the_request(autojump_clock):
    """Options and messages may be changed in place or exchanged; what is not changed keeps its bytes."""

    async def change(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        state.options["temperature"] = 0
        state.options["model"] = "c/d"
        state.messages.insert(0, {"role": "system", "content": "Be brief."})
        await proceed()

    exact = {"role": "user", "content": "1", "name": "x", "number": Decimal("1.10")}
    async with open_world(answer=replies(completion(ANSWER))) as world:
        world.client.use(change)
        await world.client.chat([exact], seed=5)
        (sent,) = world.sent
    assert sent.raw.endswith(b',{"role":"user","content":"1","name":"x","number":1.10}]}')
    assert {key: sent.body[key] for key in ("model", "temperature", "seed")} == {
        "model": "c/d",
        "temperature": 0,
        "seed": 5,
    }
    assert sent.contents == ["Be brief.", "1"]


async def test_messages_that_can_be_gone_through_once(autojump_clock):
    """They are sent, and the answer is not lost because nobody could count them afterwards."""

    def drop_the_first(_context: gr.ChatContext, state: gr.ChatState) -> None:
        state.messages = (message for message in state.messages[1:])  # type: ignore[assignment]  # the point

    seen: list[gr.EndedChat] = []
    async with open_world(answer=replies(completion(ANSWER))) as world:
        world.client.add_hook(gr.Hook(before=drop_the_first))
        world.client.observe(seen.extend)
        result = await world.client.chat([gr.SystemMessage("Be brief."), gr.UserMessage("Well?")])
        world.client.flush_observers()
    assert (result.text, [chat.message_count for chat in seen]) == (ANSWER, [1])
    assert [message["role"] for message in world.sent[0].body["messages"]] == ["user"]


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("messages", 5, gr.BadRequestError),
        ("messages", "Well?", gr.BadRequestError),
        ("messages", None, gr.BadRequestError),
        ("tools", 5, gr.ConfigError),
        ("tools", [5], gr.ConfigError),
    ],
)
async def test_what_cannot_be_a_request(field, value, error, autojump_clock):
    """What an extension puts there that cannot be sent is refused with an error of this package."""
    async with open_world(answer=replies(completion(ANSWER))) as world:
        world.client.add_hook(gr.Hook(before=lambda _context, state: setattr(state, field, value)))
        with pytest.raises(error, match=field):
            await world.client.chat("Well?")
    assert not world.sent


async def test_tools_as_a_list(autojump_clock):
    """An extension may give tools as a chat takes them."""
    async with open_world(answer=replies(completion(None, tool_calls=[("c", "now")]), completion(ANSWER))) as world:
        world.client.add_hook(gr.Hook(before=lambda _context, state: setattr(state, "tools", [now])))
        result = await world.client.chat("Well?")
    assert [(row.name, row.text) for row in result.tool_calls] == [("now", "noon")]


async def test_a_middleware_answers_by_itself(autojump_clock):
    """With a result set and without going on, nothing is sent."""

    async def remember(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        state.result = kept

    async with open_world(answer=replies(completion(ANSWER))) as world:
        kept = await world.client.chat("Well?")
        world.client.use(remember)
        assert await world.client.chat("Well?") is kept
        assert len(world.sent) == 1
        assert world.client.unuse(remember)
        assert not world.client.unuse(remember)


class Counting:
    """A middleware that is a method; all of them are equal."""

    def __init__(self) -> None:
        self.count = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counting)

    __hash__ = None  # type: ignore[assignment]  # as a dataclass has it

    async def around(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        self.count += 1
        await proceed()


async def test_a_method_is_taken_out(autojump_clock):
    """A method of an object is the same each time it is given; that of another object is not."""
    one, other = Counting(), Counting()
    async with open_world(answer=replies(completion(ANSWER))) as world:
        world.client.use(one.around)
        world.client.use(other.around)
        await world.client.chat("Well?")
        assert world.client.unuse(one.around)
        assert not world.client.unuse(one.around)
        await world.client.chat("Well?")
    assert (one.count, other.count) == (1, 2)


def raising(error: Exception):
    async def middleware(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        raise error

    return middleware


async def nothing(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
    """Neither goes on nor answers."""


async def twice(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
    await proceed()
    await proceed()


async def test_errors_of_extensions(autojump_clock):
    """A veto leaves as itself; anything else is the cause of an ExtensionError, and what was paid for is in it."""
    errors: list[gr.GorouterError] = []
    async with open_world(answer=replies(*[completion(ANSWER)] * 4)) as world:
        client = world.client
        hook = gr.Hook(on_error=lambda _context, _state, error: errors.append(error))
        client.add_hook(hook)
        for middleware, kind, cause in (
            (raising(Refusal("no")), Refusal, None),
            (raising(ValueError("oops")), gr.ExtensionError, ValueError),
            (nothing, gr.ExtensionError, None),
            (twice, gr.ExtensionError, None),
        ):
            client.use(middleware)
            with pytest.raises(kind) as caught:
                await client.chat("Well?")
            assert isinstance(caught.value.__cause__, cause or type(None))
            assert client.unuse(middleware)
        assert len(world.sent) == 1
        assert [type(error) for error in errors] == [Refusal, *[gr.ExtensionError] * 3]
        assert errors[-1].partial is not None
        assert errors[-1].partial.text == ANSWER


async def test_hooks_veto_and_cannot_take_an_answer_away(autojump_clock):
    """What `before` raises refuses the chat before it is sent; `after` and `on_error` fail with an event only."""

    def refuse(context: gr.ChatContext, state: gr.ChatState) -> None:
        if state.messages[-1]["content"] == "Bad":
            raise Refusal("not that")

    async def fail(*_args: object) -> None:
        raise ValueError("oops")

    async with open_world(answer=replies(completion(ANSWER))) as world:
        world.client.add_hook(gr.Hook(before=refuse, after=fail, on_error=fail, name="mine"))
        with world.client.events(gr.HookFailed) as feed:
            with pytest.raises(Refusal):
                await world.client.chat("Bad")
            assert not world.sent
            assert (await world.client.chat("Good")).text == ANSWER
            failures = [await anext(feed), await anext(feed)]
    assert [(failure.hook, failure.phase) for failure in failures] == [("mine", "on_error"), ("mine", "after")]


async def test_a_cancel_passes_through(autojump_clock, no_leaks):
    """A chat that is cancelled inside a middleware is cancelled, and told as failed without an error."""

    async def hang(context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        await trio.sleep_forever()

    async with no_leaks(), open_world(answer=replies(completion(ANSWER))) as world:
        world.client.use(hang)
        with world.client.events(gr.ChatFailed) as feed:
            with trio.move_on_after(1) as scope:
                await world.client.chat("Well?")
            assert scope.cancelled_caught
            assert (await anext(feed)).error is None


@pytest.mark.parametrize("hook", [5, None, print])
async def test_bad_hooks(hook, autojump_clock):
    """What is no hook is refused."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="hook"):
            world.client.add_hook(hook)
    with pytest.raises(gr.ConfigError, match="before"):
        gr.Hook(before=5)  # type: ignore[arg-type]  # the point of the test


async def test_observers(autojump_clock):
    """They get every chat once, with what it was and how it ended, in order, also what there is at the end."""
    seen: list[gr.EndedChat] = []
    rows: list[gr.LedgerChange] = []

    async with open_world(answer=replies(completion(ANSWER))) as world:
        client = world.client
        client.observe(seen.extend)
        client.observe_ledger(rows.extend)
        await client.chat("1", model="a/b", tenant="t")
        await client.session("s", system="Be brief.").ask("2")
        world.api.answer = replies((400, b"{}"))
        with pytest.raises(gr.BadRequestError):
            await client.chat("3")
        await trio.sleep(1)
        assert [(chat.context.session, chat.message_count, chat.result is None) for chat in seen] == [
            (None, 1, False),
            ("s", 2, False),
            (None, 1, True),
        ]
        assert (seen[0].context.model, seen[0].context.tenant) == ("a/b", "t")
        assert isinstance(seen[2].error, gr.BadRequestError)
        assert len({chat.context.chat_id for chat in seen}) == 3
        assert [change.row.status for change in rows] == [200, 200, 400]
        world.api.answer = replies(completion(ANSWER))
        await client.chat("4")
    assert (len(seen), len(rows)) == (4, 4)


class Looking:
    """Is around chats, but does nothing: with it, every chat takes the way of those that are looked at."""

    async def __call__(self, context: gr.ChatContext, state: gr.ChatState, proceed: gr.Next) -> None:
        await proceed()


@pytest.mark.parametrize("middleware", [False, True], ids=["light", "whole"])
async def test_observers_see_the_same_on_both_ways(middleware, autojump_clock):
    """Chats, streams and turns that only observers look at take a shorter way, and are noted as on the other one."""
    seen: list[gr.EndedChat] = []
    async with open_world(answer=replies(completion(ANSWER))) as world:
        client, simulated = world.client, world.simulator.handler
        client.observe(seen.extend)
        if middleware:
            client.use(Looking())
        session = client.session("s", system="Be brief.")
        await session.ask("1", turn_id="one", tenant="t")
        await session.ask("1", turn_id="one", tenant="t")
        await session.ask("2")
        world.api.answer = simulated
        async with session.stream("3 [[say Yes.]]") as stream:
            await stream.collect()
        async with client.stream("4 [[say Yes.]]") as stream:
            await stream.collect()
        async with client.stream("5 [[tokens 300]]") as stream:
            await anext(stream)
        async with session.stream("6 [[tokens 300]]") as stream:
            await anext(stream)
        world.api.answer = replies((400, b"{}"))
        with pytest.raises(gr.BadRequestError):
            await session.ask("7")
        for opened in (session.stream("8"), client.stream("9")):
            with pytest.raises(gr.BadRequestError):
                async with opened:
                    pass
    facts: list[tuple[object, ...]] = []
    for chat in seen:
        context, text = chat.context, "" if chat.result is None else chat.result.text
        what = (context.session, context.turn_id == "one", context.tenant, context.is_streamed)
        facts.append((*what, chat.message_count, text, type(chat.error).__name__))
    none = "NoneType"
    assert facts == [
        ("s", True, "t", False, 2, ANSWER, none),
        ("s", False, "", False, 4, ANSWER, none),
        ("s", False, "", True, 6, "Yes.", none),
        (None, False, "", True, 1, "Yes.", none),
        ("s", False, "", False, 10, "", "BadRequestError"),
        ("s", False, "", True, 10, "", "BadRequestError"),
        (None, False, "", True, 1, "", "BadRequestError"),
    ]
    assert [chat.context.chat_id for chat in seen] == sorted({chat.context.chat_id for chat in seen}, key=int)
