"""What docs/redis.md says holds: its code compiles, its names are there, its user may do what the store does."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import pytest
from redis_server import RedisProcess, running_redis

import gorouter_trio as gr
import gorouter_trio.redis
from gorouter_trio.errors import StoreError
from gorouter_trio.pool.shared import MoneyAsk, RateAsk, SlotAsk
from gorouter_trio.redis import RedisLimits, RedisStore
from gorouter_trio.transport.resp_address import parse_url

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "redis.md").read_text("utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", PYTHON)
def test_the_code(code: str) -> None:
    """It compiles, and what it takes from the package is there."""
    compile(code, "docs/redis.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    for path in re.findall(r"\bgr\.([\w.]+)", code):
        found: object = gr
        for name in path.split("."):
            found = getattr(found, name)
    for names in re.findall(r"from gorouter_trio.redis import (.*)", code):
        for name in names.split(", "):
            assert hasattr(gorouter_trio.redis, name)


def test_the_urls() -> None:
    """The forms of URLs that it shows are read."""
    forms = re.findall(r"^\| `([a-z+]+://[^`]*)`", TEXT, re.MULTILINE)
    assert len(forms) == 4
    for form in forms:
        url = form.replace("[:port]", ":7000").replace("…", "h").replace("/db", "/1").replace("?db=1", "")
        parse_url(url.replace("[", "").replace("]", ""))


def test_the_kinds_and_durabilities() -> None:
    """All kinds of errors that a server can lead to are explained, and all that `durability` can be."""
    for kind in (
        "unreachable",
        "loading",
        "locked",
        "read_only",
        "full",
        "denied",
        "io",
        "timeout",
        "foreign",
        "newer",
    ):
        assert f"`{kind}`" in TEXT
    for durability in ("aof-always", "aof-everysec", "aof-no", "rdb", "none", "unknown"):
        assert f'`"{durability}"`' in TEXT


async def use_all(server: RedisProcess) -> None:
    """Everything that a program does, as the user of the page."""
    url = f"unix://bot:pw@{server.socket}"
    async with RedisStore(url, ttl_s=60) as store:
        await store.append("k", [b"1"], expected_version=0)
        await store.rewrite("k", [b"1"], expected_version=1)
        await store.load("k")
        await store.version("k")
        await store.list_sessions()
        lease = (await store.acquire_lease("k", owner="a", lease_s=5)).lease
        assert lease is not None
        await store.renew_leases([lease], lease_s=5)
        await store.append_leased("k", [b"2"], expected_version=2, lease=lease, lease_s=5)
        await store.release_leases([lease])
        await store.reindex()
        assert await store.erase("k")
        assert store.durability == "none"
    async with RedisLimits(url) as limits:
        rate = RateAsk(interval_s=1, tolerance_s=0, horizon_s=1, owed=0, first=1, size=1, count=1)
        assert (await limits.take_rate("r", rate)).count == 1
        await limits.take_slots("s", SlotAsk(holder="a", in_use=0, wanted=1, most=1, ttl_s=1))
        money = MoneyAsk(
            holder="a", spent_nano=0, wanted_nano=1, held_nano=0, least_nano=0, limit_nano=1, ttl_s=random.random() + 1
        )
        assert (await limits.take_money("m", money)).at_hand_nano == 1
        assert await limits.forget_budget("client") is False


@pytest.mark.net
async def test_the_rights_of_its_user() -> None:
    """A user with the rights that the page names can use everything, and nothing beside it."""
    (rights,) = re.findall(r"^`(\+@read[^`]*)`", TEXT, re.MULTILINE)
    user = ("--user", "bot", "on", ">pw", "~{gorouter}:*", "-@all", *rights.split())
    with running_redis("--save", "", *user) as server:
        await use_all(server)
        async with RedisStore(f"unix://bot:pw@{server.socket}", prefix="other") as store:
            with pytest.raises(StoreError) as caught:
                await store.append("k", [], expected_version=0)
            assert caught.value.kind == "denied"
