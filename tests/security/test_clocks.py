"""Clock jumps: limits and remembered tokens go by the monotonic clock, tokens by the wall clock (row 44)."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from jwt_forge import GOOD_HEADER, SECRET, WALL, signed

import gorouter_trio as gr
from gorouter_trio.security import (
    Allow,
    JwtAuth,
    Principal,
    RateLimit,
    SecurityConfig,
    SecurityManager,
    ToolCheck,
    ToolPolicy,
)

DAY_S, YEAR_S = 86_400.0, 365 * 86_400.0
JUMPS = (DAY_S, -DAY_S, YEAR_S, -YEAR_S)
CALL = ToolCheck(tool="x", arguments=None)


class World:
    """A manager, the trio clock, and a wall clock that jumps when told."""

    def __init__(self, **fields: Any) -> None:
        tools = {"x": ToolPolicy(allow=True, rate_limit=RateLimit(limit=2, period_s=60.0))}
        self.manager = SecurityManager(SecurityConfig(auth=JwtAuth(key=SECRET), tools=tools, **fields))
        self.offset = WALL - trio.current_time()

    def wall(self) -> float:
        return trio.current_time() + self.offset

    def is_allowed(self) -> bool:
        decision = self.manager.check(Principal(id="u"), CALL, now=trio.current_time(), wall=self.wall())
        return decision == Allow()

    async def authenticate(self, token: str, *, source: str = "") -> Principal | None:
        return await self.manager.authenticate(token, now=trio.current_time(), wall=self.wall(), source=source)


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_limits_do_not_move(autojump_clock: trio.testing.MockClock, jump_s: float) -> None:
    """A wall clock that jumps gives nobody a call early, and keeps nobody waiting longer."""
    world = World()
    assert [world.is_allowed() for _ in range(3)] == [True, True, False]
    world.offset += jump_s
    await trio.sleep(59.9)
    assert not world.is_allowed()
    world.offset -= 2 * jump_s
    await trio.sleep(0.2)
    assert world.is_allowed()


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_tokens_follow_the_wall_clock(autojump_clock: trio.testing.MockClock, jump_s: float) -> None:
    """A token that the wall clock says is over, or has not begun, is refused though it is remembered."""
    world = World()
    token = signed(GOOD_HEADER, {"sub": "u", "iat": WALL, "exp": WALL + 3_600})
    assert await world.authenticate(token) is not None
    world.offset += jump_s
    with pytest.raises(gr.InvalidTokenError) as caught:
        await world.authenticate(token)
    assert caught.value.problem == ("expired" if jump_s > 0 else "not_yet_valid")
    world.offset -= jump_s
    assert await world.authenticate(token) is not None


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_the_cache_does_not_move(autojump_clock: trio.testing.MockClock, jump_s: float) -> None:
    """How long a token is remembered is counted on the monotonic clock."""
    asked: list[str] = []

    def look_up(token: str) -> Principal:
        asked.append(token)
        return Principal(id="u")

    auth = gr.security.CustomAuth(authenticate=look_up)
    world = World()
    world.manager.update_config(auth=auth)
    for _ in range(3):
        await world.authenticate("token")
        world.offset += jump_s
    assert len(asked) == 1
    await trio.sleep(300)
    await world.authenticate("token")
    assert len(asked) == 2


async def test_a_suspended_machine(autojump_clock: trio.testing.MockClock) -> None:
    """After an hour asleep in which the monotonic clock stood still, limits still hold and tokens are over."""
    world = World()
    token = signed(GOOD_HEADER, {"sub": "u", "exp": WALL + 600})
    await world.authenticate(token)
    assert [world.is_allowed() for _ in range(2)] == [True, True]
    world.offset += 3_600
    assert not world.is_allowed()
    with pytest.raises(gr.InvalidTokenError):
        await world.authenticate(token)


@pytest.mark.parametrize("jump_s", JUMPS)
async def test_failed_attempts_do_not_move(autojump_clock: trio.testing.MockClock, jump_s: float) -> None:
    """A source that has to wait waits on the monotonic clock."""
    world = World(failed_attempts=RateLimit(limit=1, period_s=60.0))
    for problem, wait_s in (
        ("malformed", 0.0),
        ("too_many_attempts", 59.9),
        ("too_many_attempts", 0.2),
        ("malformed", 0),
    ):
        with pytest.raises(gr.InvalidTokenError) as caught:
            await world.authenticate("guess", source="10.0.0.1")
        assert caught.value.problem == problem
        world.offset += jump_s
        await trio.sleep(wait_s)
