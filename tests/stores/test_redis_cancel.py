"""Cancelling at every step of what goes to a Redis: the connection stays in step, and what is kept stays whole."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest
import trio
from cancel_sweep import sweep
from redis_server import fresh_prefix, shared_redis

import gorouter_trio as gr
from gorouter_trio.errors import SessionConflictError
from gorouter_trio.session.transcript import Transcript
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores import RedisStore
from gorouter_trio.wire.codec import decode_log_entry

pytestmark = pytest.mark.net


@asynccontextmanager
async def open_store():
    """A store that is not connected yet."""
    async with RedisStore(shared_redis().url, prefix=fresh_prefix(), timeout_s=3) as store:
        yield store


async def check_store(store: RedisStore, _is_whole: bool) -> None:
    """What is there is a beginning of what was to be, and everything works on the same connection."""
    for key in ("k", "l"):
        stored = await store.load(key)
        assert list(stored.entries) == [b"%d" % number for number in range(stored.version)]
        assert await store.append(key, [b"x"], expected_version=stored.version) == stored.version + 1
    assert store._own is not None
    assert store._own.statistics().in_flight == 0
    assert store._own.connected <= 2


async def write(store: RedisStore) -> None:
    """From connecting to the third append."""
    for version in range(3):
        await store.append("k", [b"%d" % version], expected_version=version)
    await store.load("k")
    await store.list_sessions()


async def write_together(store: RedisStore) -> None:
    """Several tasks on one connection, of which some lead and some send for the others."""

    async def fill(key: str) -> None:
        for version in range(3):
            await store.append(key, [b"%d" % version], expected_version=version)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill, "k")
        nursery.start_soon(fill, "l")
        for _ in range(4):
            nursery.start_soon(store.version, "k")


async def own(store: RedisStore) -> None:
    """A lease taken, used and given back; one that is left over would keep others out, so it is given up first."""
    try:
        lease = (await store.acquire_lease("k", owner="a", lease_s=0.05)).lease
        assert lease is not None
        await store.append_leased("k", [b"0"], expected_version=0, lease=lease, lease_s=0.05)
        await store.renew_leases([lease], lease_s=0.05)
        await store.release_leases([lease])
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.06)


@pytest.mark.parametrize("scenario", [write, write_together, own])
async def test_cancelled_at_every_step(scenario, record_property):
    """Wherever a caller is cut off, nothing is out of step afterwards."""
    record_property("figure", str(await sweep(open_store, scenario, check=check_store, seeds=[0])))


@asynccontextmanager
async def open_talk():
    """A client whose sessions are kept there."""
    async with (
        open_store() as store,
        open_simulated_network(Simulator()) as network,
        gr.open_client(
            api_key="sk-k", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
    ):
        await store.check()
        yield store, client


async def take_turn(place) -> None:
    """One turn, with its lease."""
    await place[1].session("k").ask("[[say yes]]")


async def check_talk(place, _is_whole: bool) -> None:
    """The log is valid, nobody holds the session, and the next turn works."""
    store, client = place
    assert (await client.session("k").ask("[[say well]]")).text == "well"
    transcript = Transcript()
    for entry in (await store.load("k")).entries:
        transcript.apply(decode_log_entry(entry))
    assert transcript.machine is None
    for _ in range(100):
        offer = await store.acquire_lease("k", owner="other", lease_s=1)
        if offer.lease is not None:
            break
        await trio.sleep(0.005)
    else:
        raise SessionConflictError("the session is held still")


async def test_a_turn_cancelled_at_every_step(record_property):
    """A turn that is cut off anywhere leaves a valid log and no lease."""
    record_property("figure", str(await sweep(open_talk, take_turn, check=check_talk, seeds=[0])))
