"""What may change while a client runs: model, key, store, guard, tracker. What was asked before goes on as it was."""

from __future__ import annotations

import traceback

import pytest
import trio
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.pool.costs import CostSums
from gorouter_trio.security import Allow, Decision, Deny, ToolAudit, ToolCheck
from gorouter_trio.simulator import SimulatorConfig
from gorouter_trio.stores import MemoryStore
from gorouter_trio.transport.http_server import ServerReply, ServerRequest

YES = completion("Yes.")


def models_of(world) -> list[object]:
    return [sent.body["model"] for sent in world.sent]


async def test_model(autojump_clock):
    """Chats, sessions that are open and refs that were made before take the new model, what names its own keeps it."""
    async with open_world(answer=replies(YES), model="a/old") as world:
        client = world.client
        session, own = client.session("s"), client.session("o", model="c/own")
        await session.ask("1")
        await own.ask("1")
        client.set_model("b/new")
        assert client.default_model == "b/new"
        await client.chat("2")
        await client.chat("2", model="d/named")
        await session.ask("2")
        await client.session("s").ask("2")
        await own.ask("2")
        assert client.ledger_rows()[-1].requested_model == "c/own"
    assert models_of(world) == ["a/old", "c/own", "b/new", "d/named", "b/new", "b/new", "c/own"]


async def test_a_turn_keeps_its_model(autojump_clock):
    """A turn that runs, and one queued behind it, go on with the model that they were asked of, in all rounds."""

    @gr.tool
    async def look() -> str:
        """Look."""
        world.client.set_model("b/new")
        await trio.sleep(1)
        return "seen"

    answers = replies(completion("", tool_calls=[("1", "look")]), YES)
    async with open_world(answer=answers, model="a/old") as world:
        session = world.client.session("s", tools=[look])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "1")
            nursery.start_soon(session.ask, "2")
        await session.ask("3")
    assert models_of(world) == ["a/old", "a/old", "a/old", "b/new"]


async def test_options_that_differ_are_told_apart_all_the_same(autojump_clock):
    """A session that is open with other options is a conflict, also after a change of the model."""
    async with open_world(answer=replies(YES), model="a/old") as world:
        await world.client.session("s", temperature=0).ask("1")
        world.client.set_model("b/new")
        with pytest.raises(gr.SessionConflictError):
            world.client.session("s")
        await world.client.session("s", temperature=0).ask("2")
    assert models_of(world) == ["a/old", "b/new"]


@pytest.mark.parametrize("model", ["", "  ", 5, None])
async def test_no_model(model, autojump_clock):
    """What is no name is refused, and the old one stays."""
    async with open_world(answer=replies(YES), model="a/old") as world:
        with pytest.raises(gr.ConfigError, match="model"):
            world.client.set_model(model)
        await world.client.chat("1")
    assert models_of(world) == ["a/old"]


async def test_key(autojump_clock):
    """What is in flight keeps its key, what comes after has the new one; several with names as well."""
    world_open = trio.Event()

    async def answer(request: ServerRequest, reply: ServerReply) -> None:
        if not world_open.is_set():
            await world_open.wait()
        await replies(YES)(request, reply)

    def keys() -> list[str]:
        return [sent.headers.get("authorization", sent.headers.get("Authorization", "")) for sent in world.sent]

    async with open_world(answer=answer, api_key="sk-old") as world:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.client.chat, "1")
            await trio.testing.wait_all_tasks_blocked()
            world.client.set_api_key("sk-new")
            nursery.start_soon(world.client.chat, "2")
            await trio.testing.wait_all_tasks_blocked()
            world_open.set()
        world.client.set_api_key([gr.ApiKey(key="sk-a", name="a"), gr.ApiKey(key="sk-b", name="b")])
        await world.client.chat("3")
        await world.client.chat("4")
        assert [key.name for key in world.client.statistics().keys] == ["a", "b"]
    assert keys()[:2] == ["Bearer sk-old", "Bearer sk-new"]
    assert sorted(keys()[2:]) == ["Bearer sk-a", "Bearer sk-b"]


@pytest.mark.parametrize("key", ["", "  ", [], "sk-s3cr3t\nx", 5, ["sk-s3cr3t", "sk-s3cr3t"], {"sk-s3cr3t": -1}, None])
async def test_no_key(key, autojump_clock):
    """What is no key is refused without being shown, and the old one stays."""
    async with open_world(answer=replies(YES), api_key="sk-old") as world:
        with pytest.raises(gr.ConfigError, match="api_key") as caught:
            world.client.set_api_key(key)
        shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
        ours = shown[shown.index("gorouter_trio/client.py") :]
        assert "s3cr3t" not in ours
        assert (await world.client.chat("1")).text == "Yes."
    assert "Bearer sk-old" in world.sent[0].headers.values()


async def test_a_key_that_was_refused_is_replaced(autojump_clock):
    """A client whose only key is revoked goes on with the next one."""
    answers = replies((401, b'{"error":{"code":401,"message":"no"}}'), YES)
    async with open_world(answer=answers) as world:
        with pytest.raises(gr.AuthenticationError):
            await world.client.chat("1")
        world.client.set_api_key("sk-new")
        assert (await world.client.chat("2")).text == "Yes."


async def test_store(autojump_clock, no_leaks):
    """What a session was asked before ends in the old store, what is queued as well; what comes after, in the new."""
    old, new = MemoryStore(), MemoryStore()
    async with no_leaks(), open_world(store=old) as world:
        client = world.client
        session = client.session("s")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.ask, "first [[tokens 50]]")
            nursery.start_soon(session.ask, "second [[tokens 50]]")
            await trio.testing.wait_all_tasks_blocked()
            client.set_store(new)
            assert client.store is new
            nursery.start_soon(session.ask, "third")
        assert len(await session.history()) == 2
    assert (await old.version("s"), await new.version("s")) == (4, 2)


class BrokenStore(MemoryStore):
    """A store that is not there any more for whoever asks."""

    is_broken = False

    async def load(self, key):
        await trio.lowlevel.checkpoint()
        if self.is_broken:
            raise gr.StoreError("the store is closed", kind="closed")
        return await super().load(key)


@pytest.mark.parametrize("overflow", ["block", "reject", "drop_oldest"])
async def test_store_of_a_session_with_a_full_mailbox(overflow, autojump_clock, no_leaks):
    """A session without room for more mail keeps all that it has, and nobody else hears of it."""
    old, new = MemoryStore(), MemoryStore()
    sessions = gr.SessionConfig(mailbox=1, overflow=overflow)
    async with no_leaks(), open_world(SimulatorConfig(latency_s=5), store=old, sessions=sessions) as world:
        client = world.client
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.session("s").ask, "first")
            await trio.sleep(1)
            nursery.start_soon(client.session("s").ask, "second")
            nursery.start_soon(client.session("other").ask, "third")
            await trio.sleep(1)
            client.set_store(new)
            assert client.inspect().leaving_sessions == 2
        assert client.inspect().leaving_sessions == 0
        await client.session("s").ask("fourth")
    assert (await old.version("s"), await old.version("other"), await new.version("s")) == (4, 2, 2)


async def test_store_that_is_broken_is_exchanged(autojump_clock, no_leaks):
    """That a store is broken is the usual reason to exchange it: whoever needs it is told, the others go on."""
    old, new = BrokenStore(), MemoryStore()
    async with no_leaks(), open_world(SimulatorConfig(latency_s=5), store=old) as world:
        client, told = world.client, []

        async def ask(key, text):
            told.append((await client.session(key).ask(text)).turn_id)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "s", "first")
            nursery.start_soon(ask, "other", "second")
            await trio.sleep(1)
            old.is_broken = True
            client.set_store(new)
            await client.session("s").ask("third")
        assert len(told) == 2
        assert client.inspect().leaving_sessions == 0
    assert await new.version("s") == 2


async def test_store_that_is_none(autojump_clock):
    """What is no store is refused, and named for what it lacks."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match=r"store: an? object is no history store: it has no method load$"):
            world.client.set_store(object())  # type: ignore[arg-type]  # on purpose


class Guard:
    """Allows or denies everything."""

    def __init__(self, name: str, *, allows: bool) -> None:
        self.name = name
        self._allows = allows
        self.audited: list[str] = []

    def check(self, principal: object, call: ToolCheck, *, now: float, wall: float) -> Decision:
        return Allow() if self._allows else Deny(reason="access", message=self.name)

    def audit(self, record: ToolAudit) -> None:
        self.audited.append(record.tool)


def calling(name: str, times: int = 1):
    """Calls the tool once a chat, then answers."""
    bodies = [completion("", tool_calls=[("1", name)]), YES] * times
    return replies(*bodies)


async def test_guard(autojump_clock):
    """A turn keeps the guard that it began with, the next has the new one; None is that of a client without."""
    strict, lax = Guard("strict", allows=False), Guard("lax", allows=True)

    @gr.tool
    async def look() -> str:
        """Look."""
        world.client.set_security(strict)
        return "seen"

    rounds = [completion("", tool_calls=[("1", "look")]), completion("", tool_calls=[("2", "look")]), YES]
    async with open_world(answer=replies(*rounds, *rounds, *rounds), security=lax) as world:
        first = await world.client.chat("1", tools=[look])
        second = await world.client.chat("2", tools=[look])
        assert [call.status for call in (*first.tool_calls, *second.tool_calls)] == [
            *["success"] * 2,
            *["error_security"] * 2,
        ]
        assert world.client.security is strict
        with pytest.raises(gr.ConfigError, match="security"):
            world.client.set_security(5)
        assert world.client.security is strict
        world.client.set_security(None)
        assert (await world.client.chat("3", tools=[look])).tool_calls[0].is_success
    assert (lax.audited, strict.audited) == (["look"] * 2, ["look"] * 2)


async def test_guards_of_several(autojump_clock):
    """Each takes its own guard away, in whatever order; nobody's end lets through one that was taken away."""
    first, second = Guard("first", allows=False), Guard("second", allows=False)
    async with open_world() as world:
        at_first = world.client.security
        pop_first = world.client.push_security(first)
        pop_second = world.client.push_security(second)
        pop_first()
        assert world.client.security is second
        pop_second()
        pop_second()
        assert world.client.security is at_first


async def test_tracker(autojump_clock):
    """Rows are counted by the new one from now on."""
    mine = CostSums()
    async with open_world(answer=replies(YES)) as world:
        await world.client.chat("1")
        before = world.client.cost_tracker
        world.client.set_cost_tracker(mine)
        await world.client.chat("2")
        await world.client.chat("3")
        assert world.client.cost_snapshot().attempts == 2
        assert (before.snapshot().attempts, mine.snapshot().attempts) == (1, 2)
        with pytest.raises(gr.ConfigError, match=r"tracker: .*add"):
            world.client.set_cost_tracker(object())  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("wrong", ["60", None, True, [], -1, 0.5])
async def test_numbers_of_the_wrong_kind(autojump_clock, wrong):
    """What is no number of rows or of tries, or no time, is refused by name before anything is done."""
    async with open_world(answer=replies(YES)) as world:
        client = world.client
        with pytest.raises(gr.ConfigError, match="most"):
            client.budgets(most=wrong)
        with pytest.raises(gr.ConfigError, match="sessions"):
            client.inspect(sessions=wrong)
        with pytest.raises(gr.ConfigError, match="polls"):
            await client.generation("gen-1", polls=wrong)
        if wrong != 0.5:
            with pytest.raises(gr.ConfigError, match="interval_s"):
                client.start_price_refresh(wrong)
    assert not world.sent
