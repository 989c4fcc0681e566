"""Who may ask, and whose sessions are whose: access tokens through the client."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from worlds import open_world, there

import gorouter_trio as gr
from gorouter_trio.plugins import MetricsPlugin
from gorouter_trio.security import (
    ApiKeyAuth,
    Principal,
    RateLimit,
    SecurityConfig,
    SessionPolicy,
    ToolPolicy,
    ToolRules,
)

ADA, BEN, EVE, BOSS = ("ada-has-a-long-key-1", "ben-has-a-long-key-1", "eve-has-a-long-key-1", "boss-has-a-long-key")
KEYS: dict[str | gr.Secret, Principal] = {
    ADA: Principal(id="ada", tenant="t1", roles={"user"}),
    BEN: Principal(id="ben", tenant="t1", roles={"user"}),
    EVE: Principal(id="eve", tenant="t2", roles={"user"}),
    BOSS: Principal(id="boss", tenant="t1", roles={"user", "boss"}),
}
WAYS = ("chat", "stream", "client.ask", "session.ask", "session.stream")


def rules(**fields: Any) -> SecurityConfig:
    """Keys of four people; whoever has none of them may do nothing."""
    auth = ApiKeyAuth(api_keys=KEYS)
    return SecurityConfig(require_authentication=True, default_policy="allow-all", auth=auth, **fields)


async def take(client: Any, way: str, prompt: str, token: str | None, **options: Any) -> gr.ChatResult[Any]:
    """One turn in one of the ways there are."""
    options["access_token"] = token
    result: gr.ChatResult[Any]
    match way:
        case "chat":
            result = await client.chat(prompt, **options)
        case "client.ask":
            result = await client.ask(prompt, user="u", **options)
        case "session.ask":
            result = await client.session("k").ask(prompt, **options)
        case _:
            opened = client.stream if way == "stream" else client.session("k").stream
            async with opened(prompt, **options) as stream:
                result = await stream.collect()
    return result


@pytest.mark.parametrize("way", WAYS)
async def test_who_has_no_key_is_sent_away(way, autojump_clock):
    """Before anything is sent; and the token is in no error."""
    async with open_world(security=rules()) as world:
        with pytest.raises(gr.AuthenticationRequiredError):
            await take(world.client, way, "Hello.", None)
        with pytest.raises(gr.InvalidTokenError) as wrong:
            await take(world.client, way, "Hello.", "some-key-that-is-wrong")
        assert "some-key" not in repr(wrong.value) + str(wrong.value)
        assert world.sent == []
        assert (await take(world.client, way, "[[say yes]]", ADA)).text == "yes"


@pytest.mark.parametrize("way", WAYS)
async def test_a_token_without_anybody_to_look_at_it(way, autojump_clock):
    """It would be ignored, so it is an error."""
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="access_token"):
            await take(world.client, way, "Hello.", ADA)
        assert world.sent == []


@pytest.mark.parametrize("way", ["completions", "embeddings"])
async def test_what_is_no_chat_is_guarded_as_well(way, autojump_clock):
    """Whoever may not chat may not have text or vectors either; nothing is sent for them."""

    async def take_it(**options: Any) -> Any:
        if way == "embeddings":
            return await world.client.embeddings("sea", model="openai/text-embedding-3-small", **options)
        return await world.client.completions("Once", **options)

    async with open_world(security=rules()) as world:
        with pytest.raises(gr.AuthenticationRequiredError):
            await take_it()
        with pytest.raises(gr.InvalidTokenError) as wrong:
            await take_it(access_token="some-key-that-is-wrong")
        assert "some-key" not in repr(wrong.value) + str(wrong.value)
        with pytest.raises(gr.BadRequestError, match="access_token"):
            await take_it(access_token=b"bytes")
        assert world.sent == []
        assert (await take_it(access_token=ADA)).usage
    async with open_world() as world:
        with pytest.raises(gr.ConfigError, match="access_token"):
            await take_it(access_token=ADA)
        assert world.sent == []


async def test_the_same_key_of_two_people_is_two_sessions(autojump_clock):
    """A session belongs to who speaks in it; neither sees the other's, and the store has them apart."""
    async with open_world(security=rules()) as world:
        ada = world.client.session("k", access_token=ADA)
        ben = world.client.session("k", access_token=BEN)
        await ada.ask("My name is Ada. [[say hello]]")
        await ben.ask("My name is Ben. [[say hello]]")
        assert "Ada" not in str(await ben.history())
        assert "Ben" not in str(await ada.history())
        assert len(world.sent[-1].messages) == 1


CALLS = {
    "ask": lambda session: session.ask("Hello."),
    "history": lambda session: session.history(),
    "clear": lambda session: session.clear(),
    "undo": lambda session: session.undo(),
    "retry": lambda session: session.retry(),
    "edit": lambda session: session.edit("t", "Hello."),
    "answer": lambda session: session.answer("q", True),
    "compact": lambda session: session.compact(),
    "interrupt": lambda session: session.interrupt(),
    "statistics": lambda session: session.statistics(),
    "fork": lambda session: session.fork("copy"),
    "aclose": lambda session: session.aclose(),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_foreign_session_is_a_missing_one(call, autojump_clock):
    """Whoever may not reach a session is told what they would be told of one that is not there."""
    async with open_world(security=rules()) as world:
        await world.client.session("k", access_token=ADA).ask("[[say hello]]")
        sent = len(world.sent)
        told = []
        for key in ("k", "missing"):
            foreign = world.client.session(key, owner=("t1", "ada"), access_token=EVE)
            with pytest.raises(gr.SessionNotFoundError) as error:
                await CALLS[call](foreign)
            told.append(str(error.value).replace(key, "KEY"))
        assert told[0] == told[1]
        assert len(world.sent) == sent
        history = await world.client.session("k", access_token=ADA).history()
        assert len(history) == 2


async def test_a_policy_opens_sessions(autojump_clock):
    """A role reaches the sessions of its tenant, and none of another; and it is the same conversation."""
    policy = SessionPolicy(tenant_roles={"boss"})
    async with open_world(security=rules(sessions=policy)) as world:
        await world.client.session("k", access_token=ADA).ask("My name is Ada. [[say hello]]")
        await world.client.session("k", access_token=EVE).ask("[[say hello]]")
        watched = world.client.session("k", owner=("t1", "ada"), access_token=BOSS)
        assert "Ada" in str(await watched.history())
        with pytest.raises(gr.SessionNotFoundError):
            await world.client.session("k", owner=("t2", "eve"), access_token=BOSS).history()
        with pytest.raises(gr.SessionNotFoundError):
            await world.client.session("k", owner=("t1", "ada"), access_token=BEN).history()


@pytest.mark.parametrize("way", WAYS)
async def test_tools_run_for_who_asks(way, autojump_clock):
    """The rules of a tool look at the principal of the turn, and the tool sees who it is."""
    seen: list[Any] = []

    async def wipe(ctx: gr.ToolContext) -> str:
        """Wipes."""
        seen.append(ctx.principal)
        return "wiped"

    async with open_world(security=rules(tools={"wipe": ToolPolicy(roles=["boss"])})) as world:
        for token, status in ((ADA, "error_security"), (BOSS, "success")):
            result = await take(world.client, way, "[[call wipe#c1]]", token, tools=[wipe])
            assert [row.status for row in result.tool_calls] == [status]
    assert [principal.id for principal in seen] == ["boss"]


async def test_a_batch_has_a_token_of_its_own(autojump_clock):
    """All rows of a job are asked for by one principal."""
    async with open_world(security=rules()) as world:
        row = {"messages": [{"role": "user", "content": "[[say 1]]"}]}
        async with world.client.batch([row]) as results:
            assert [type(result.error) async for result in results] == [gr.AuthenticationRequiredError]
        assert world.sent == []
        async with world.client.batch([row], access_token=ADA) as results:
            assert [there(result.result).text async for result in results] == ["1"]


async def test_refusals_are_events(autojump_clock):
    """Who is sent away, and which call of a tool is denied, by a rule or a limit: events of the client, and counts."""

    async def wipe() -> str:
        """Wipes."""
        return "wiped"

    limited = ToolPolicy(roles=["boss"], rate_limit=RateLimit(limit=1, period_s=60))
    policy = rules(tools={"wipe": limited})
    metrics = MetricsPlugin()
    seen: list[gr.RuntimeEvent] = []
    async with open_world(security=policy, plugins=[metrics]) as world:
        client = world.client
        for kind in (gr.ToolCallDenied, gr.AskerRefused):
            client.on(kind, seen.append)
        for token, prompt in ((ADA, "[[call wipe#c1]]"), (BOSS, "[[call wipe#c2]]"), (BOSS, "[[call wipe#c3]]")):
            await client.chat(prompt, tools=[wipe], access_token=token)
        with pytest.raises(gr.InvalidTokenError):
            await client.chat("Hello.", access_token="some-key-that-is-wrong")
        with pytest.raises(gr.SessionNotFoundError):
            await client.session("k", owner=("t1", "ada"), access_token=EVE).history()
        await trio.testing.wait_all_tasks_blocked()
        snapshot = metrics.snapshot()
    denied, limited_call, refused, foreign = seen
    assert isinstance(denied, gr.ToolCallDenied)
    assert isinstance(limited_call, gr.ToolCallDenied)
    assert isinstance(refused, gr.AskerRefused)
    assert isinstance(foreign, gr.AskerRefused)
    assert (denied.tool, denied.call_id, denied.reason, denied.principal, denied.tenant) == (
        "wipe",
        "c1",
        "access",
        "ada",
        "t1",
    )
    assert (limited_call.call_id, limited_call.reason, limited_call.principal) == ("c3", "rate_limit", "boss")
    assert there(limited_call.retry_after_s) > 0
    assert isinstance(refused.error, gr.InvalidTokenError)
    assert (refused.principal, refused.session) == (None, None)
    assert (foreign.principal, foreign.tenant, foreign.session) == ("eve", "t2", "k")
    assert "some-key" not in repr(seen)
    assert (snapshot.tool_calls_denied, snapshot.askers_refused) == (2, 2)
    assert "gorouter_tool_calls_denied_total 2" in metrics.text()


async def test_the_rules_of_a_tool_without_a_guard(autojump_clock):
    """What a tool declares is held to without `security` as well, and what is denied is an event then, too."""

    @gr.tool(rules=ToolRules(role="boss"))
    async def wipe() -> str:
        """Wipes."""
        return "wiped"

    seen: list[gr.ToolCallDenied] = []
    async with open_world() as world:
        world.client.on(gr.ToolCallDenied, seen.append)
        await world.client.chat("[[call wipe#c1]]", tools=[wipe])
        await trio.testing.wait_all_tasks_blocked()
    assert [(event.tool, event.reason, event.principal) for event in seen] == [("wipe", "access", None)]
