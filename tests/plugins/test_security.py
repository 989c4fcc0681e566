"""A guard from elsewhere: in front while the plugin lives, and nobody is let through by its coming or going."""

from __future__ import annotations

import pytest
from worlds import completion, open_world, replies

import gorouter_trio as gr
from gorouter_trio.plugins import ExternalSecurityPlugin
from gorouter_trio.security import Allow, ApiKeyAuth, Decision, Deny, Principal, SecurityConfig, ToolAudit, ToolCheck

CALL = completion("", tool_calls=[("1", "look")])
TOKEN = "a token that is long enough to be one"
YES = completion("Yes.")


@gr.tool
async def look() -> str:
    """Look."""
    return "seen"


class Guard:
    """Allows or denies everything."""

    def __init__(self, *, allows: bool) -> None:
        self._allows = allows

    def check(self, principal: object, call: ToolCheck, *, now: float, wall: float) -> Decision:
        return Allow() if self._allows else Deny(reason="access", message="no")

    def audit(self, record: ToolAudit) -> None:
        pass


async def status(client: gr.Client) -> str:
    """What becomes of a call."""
    return (await client.chat("Look.", tools=[look])).tool_calls[0].status


async def test_in_front_while_it_lives(autojump_clock):
    """The guard is there from the beginning of the plugin to its end, and the former one before and after."""
    strict, lax = Guard(allows=False), Guard(allows=True)
    async with open_world(answer=replies(*[CALL, YES] * 3), security=strict) as world:
        assert await status(world.client) == "error_security"
        name = await world.client.register(ExternalSecurityPlugin(lax))
        assert await status(world.client) == "success"
        await world.client.unregister(name)
        assert world.client.security is strict
        assert await status(world.client) == "error_security"


async def test_a_factory(autojump_clock):
    """It is given the guard in front, may be async, and may give a configuration."""
    strict = Guard(allows=False)
    seen: list[object] = []

    async def make(former: object) -> object:
        seen.append(former)
        return SecurityConfig(require_authentication=True, auth=ApiKeyAuth(api_keys={TOKEN: Principal(id="u")}))

    async with open_world(answer=replies(YES), security=strict) as world:
        name = await world.client.register(ExternalSecurityPlugin(make))
        assert seen == [strict]
        with pytest.raises(gr.AuthenticationRequiredError):
            await world.client.chat("Well?")
        assert (await world.client.chat("Well?", access_token=TOKEN)).text == "Yes."
        await world.client.unregister(name)
        assert world.client.security is strict


def failing(former: object) -> object:
    raise ValueError("no guard today")


@pytest.mark.parametrize("factory", [failing, lambda _former: None, lambda _former: 5])
async def test_a_factory_that_fails(factory, autojump_clock):
    """The plugin has never been there, and the former guard stays."""
    strict = Guard(allows=False)
    async with open_world(answer=replies(CALL, YES), security=strict) as world:
        with pytest.raises((ValueError, gr.ConfigError)):
            await world.client.register(ExternalSecurityPlugin(factory))
        assert world.client.security is strict
        assert await status(world.client) == "error_security"


@pytest.mark.parametrize("security", [None, 5, lambda: Guard(allows=True)])
def test_no_guards(security):
    """What is no guard is refused when the plugin is made."""
    with pytest.raises(gr.ConfigError, match="security"):
        ExternalSecurityPlugin(security)
