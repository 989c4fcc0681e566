"""Sessions on a Redis: several processes, killed and stopped at any time, and a server that is."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import redis_worker
import trio
from redis_server import free_port, running_redis

import gorouter_trio as gr
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.stores import RedisStore
from gorouter_trio.wire.codec import decode_log_entry
from gorouter_trio.wire.journal import TurnAbandoned, TurnAnswered, TurnResumed, TurnStarted

pytestmark = pytest.mark.net


async def read_log(url, key=redis_worker.KEY):
    async with RedisStore(url) as store:
        return [decode_log_entry(entry) for entry in (await store.load(key)).entries]


def check_log(log):
    """Each turn has its end right behind its start, and one answer at most; returns the answered ids."""
    open_turn = None
    answered = []
    for entry in log:
        match entry:
            case TurnStarted(turn_id=turn_id):
                assert open_turn is None, f"{turn_id} began within {open_turn}"
                open_turn = turn_id
            case TurnAnswered(turn_id=turn_id) | TurnAbandoned(turn_id=turn_id):
                assert open_turn == turn_id, f"{turn_id} ended within {open_turn}"
                open_turn = None
                if isinstance(entry, TurnAnswered):
                    answered.append(turn_id)
            case TurnResumed():
                pass
    assert len(answered) == len(set(answered))
    return answered


class Worker:
    """A process that takes turns, and what it has said so far."""

    def __init__(self, process):
        self.process = process
        self.acked: list[str] = []
        self.errors: Counter[str] = Counter()
        self.is_done = False
        self.has_said = trio.Event()
        self._rest = b""

    async def listen(self):
        async for data in self.process.stdout:
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._hear(line.decode())
        await self.process.wait()

    def _hear(self, line):
        if line == ".":
            self.is_done = True
        elif line[0] == "+":
            self.acked.append(line[1:])
        else:
            self.errors[line[1:]] += 1
        self.has_said.set()
        self.has_said = trio.Event()


@asynccontextmanager
async def running_worker(url, name, *, count=0, lease_s=0.5, delay_s=0.0):
    """A worker; it is killed on leaving if it runs still."""
    command = [sys.executable, redis_worker.__file__, url, name, str(count), str(lease_s), str(delay_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
    worker = Worker(process)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.listen)
        try:
            yield worker
        finally:
            process.kill()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await process.wait()
                await trio.aclose_forcefully(process.stdout)  # type: ignore[arg-type]  # it is a pipe


@pytest.mark.parametrize("turns", [40, pytest.param(1_000, marks=pytest.mark.long)])
async def test_two_processes_take_turns(record_property, turns):
    """Two processes ask one session at the same time: all turns of both are there, in one order, and none conflicts."""
    with running_redis() as server:
        async with (
            running_worker(server.url, "a", count=turns, lease_s=5, delay_s=0.001) as a,
            running_worker(server.url, "b", count=turns, lease_s=5, delay_s=0.001) as b,
        ):
            with trio.fail_after(30 + turns):
                while not (a.is_done and b.is_done):
                    await (b if a.is_done else a).has_said.wait()
        answered = check_log(await read_log(server.url))
    assert sorted(answered) == sorted(a.acked + b.acked)
    assert len(answered) == 2 * turns
    assert not a.errors
    assert not b.errors
    changes = sum(one[0] != other[0] for one, other in itertools.pairwise(answered))
    record_property(
        "figure", f"{len(answered)} turns of two processes, {changes} changes of owner: 0 lost, 0 interleaved"
    )


@pytest.mark.parametrize("faults", [6, pytest.param(100, marks=pytest.mark.long)])
async def test_owners_that_die_and_stop(rng, record_property, faults):
    """Processes that are killed, or stopped for longer than their lease, at any time: others go on with the session."""
    lease_s = 0.4
    acked: list[str] = []
    kinds: Counter[str] = Counter()
    waits: list[float] = []
    with running_redis() as server:

        async def live(name, *, task_status):
            """One worker after another, each of which meets its fault."""
            number = 0
            while sum(kinds.values()) < faults:
                number += 1
                async with running_worker(server.url, f"{name}{number}", lease_s=lease_s, delay_s=0.02) as worker:
                    await worker.has_said.wait()
                    if number == 1:
                        task_status.started()
                    await trio.sleep(rng.uniform(0.0, 0.3))
                    kind = rng.choice(["kill", "stop"])
                    kinds[kind] += 1
                    if kind == "stop":
                        worker.process.send_signal(signal.SIGSTOP)
                        await trio.sleep(lease_s + rng.uniform(0.0, 0.5))
                        worker.process.send_signal(signal.SIGCONT)
                        await worker.has_said.wait()
                acked.extend(worker.acked)

        async with trio.open_nursery() as nursery:
            await nursery.start(live, "a")
            await nursery.start(live, "b")
        start = trio.current_time()
        async with running_worker(server.url, "last", count=1, lease_s=lease_s) as worker:
            while not worker.acked:
                await worker.has_said.wait()
            waits.append(trio.current_time() - start)
        answered = check_log(await read_log(server.url))
    assert set(acked) <= set(answered)
    assert "last.0" in answered
    record_property(
        "figure",
        f"{kinds['kill']} killed, {kinds['stop']} stopped; {len(acked)} acknowledged turns: 0 lost, 0 twice, 0 by "
        "a stale owner",
    )


async def test_a_stopped_owner_cannot_write(record_property):
    """An owner that sleeps through its lease in the midst of a turn finds it taken over, and writes nothing."""
    with running_redis() as server:
        async with running_worker(server.url, "old", count=2, lease_s=0.3, delay_s=0.3) as old:
            while not old.acked:
                await old.has_said.wait()
            # Its second turn is on its way to the model.
            await trio.sleep(0.15)
            old.process.send_signal(signal.SIGSTOP)
            start = trio.current_time()
            async with running_worker(server.url, "new", count=3, lease_s=0.3) as new:
                while not new.is_done:
                    await new.has_said.wait()
            took_s = trio.current_time() - start
            old.process.send_signal(signal.SIGCONT)
            while not old.is_done:
                await old.has_said.wait()
        log = await read_log(server.url)
    assert old.acked == ["old.0"]
    assert old.errors == {"HistoryNotSaved": 1}
    assert new.acked == ["new.0", "new.1", "new.2"]
    assert check_log(log) == ["old.0", "new.0", "new.1", "new.2"]
    assert [entry.reason for entry in log if isinstance(entry, TurnAbandoned)] == ["in doubt"]
    record_property("figure", f"taken over and three turns taken in {took_s:.1f} s, its start included (lease 0.3 s)")


async def test_a_turn_in_doubt_is_so_for_others():
    """A turn whose process died is in doubt for the process that takes over, and can be sent again there."""
    with running_redis() as server:
        async with running_worker(server.url, "dead", lease_s=0.3, delay_s=0.5) as dead:
            while len(await read_log(server.url)) < 1:
                await trio.sleep(0.01)
            dead.process.kill()
        async with open_here(server.url, lease_s=0.3) as client:
            session = client.session(redis_worker.KEY)
            with pytest.raises(gr.TurnInDoubtError) as caught:
                await session.ask("[[say dead.0]]", turn_id="dead.0")
            assert caught.value.maybe_billed
            again = await session.ask("[[say dead.0]]", turn_id="dead.0", resume="resend")
            assert "dead.0" in again.text
        assert check_log(await read_log(server.url)) == ["dead.0"]


@asynccontextmanager
async def open_here(url, *, lease_s=15.0, latency_s=0.0, timeout_s=5.0):
    """A client in this process."""
    async with (
        RedisStore(url, timeout_s=timeout_s) as store,
        open_simulated_network(Simulator(SimulatorConfig(latency_s=latency_s))) as network,
        gr.open_client(
            api_key="sk-test",
            base_url=network.base_url,
            insecure_http=True,
            transport=network,
            store=store,
            sessions=gr.SessionConfig(lease_s=lease_s),
        ) as client,
    ):
        yield client


async def test_a_session_is_free_between_turns():
    """A process that is idle, or has closed, keeps nobody waiting; what others wrote is in its next turn."""
    with running_redis() as server:
        async with open_here(server.url) as one, open_here(server.url) as other:
            for number in range(6):
                with trio.fail_after(2):
                    await (one, other)[number % 2].session("k").ask(f"[[say {number}]]")
            history = await one.session("k").history()
            assert len(history) == 12
        async with open_here(server.url) as third:
            with trio.fail_after(2):
                await third.session("k").clear()
                await third.session("k").ask("a")


async def test_a_session_that_is_long_in_use():
    """Who waits for longer than a lease lasts, while its owner lives, is told so, and has sent nothing."""
    with running_redis() as server:
        async with (
            open_here(server.url, lease_s=0.3, latency_s=3) as one,
            open_here(server.url, lease_s=0.3) as other,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(one.session("k").ask, "a")
            await trio.sleep(0.1)
            start = trio.current_time()
            with pytest.raises(gr.SessionConflictError, match="used by another process"):
                await other.session("k").ask("b")
            assert 1.2 < trio.current_time() - start < 2.5
        assert len(check_log(await read_log(server.url, "k"))) == 1


async def test_a_cancelled_asker_leaves_no_lease():
    """A turn that is cancelled while it waits for its session, or runs, gives the session back."""
    with running_redis() as server:
        async with open_here(server.url, latency_s=0.2) as one, open_here(server.url) as other:
            for delay_s in (0.0, 0.001, 0.002, 0.005, 0.05):
                with trio.move_on_after(delay_s):
                    await one.session("k").ask("a")
                with trio.fail_after(1):
                    await other.session("k").ask("b")
        check_log(await read_log(server.url, "k"))


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.long)])
async def test_a_server_that_is_killed(rng, record_property, kills):
    """A server with an append-only file that is killed again and again: what was acknowledged is there, once."""
    acked: dict[str, list[str]] = {}
    errors: Counter[str] = Counter()
    gaps: list[float] = []
    back_at = [0.0]
    with running_redis("--appendonly", "yes", "--appendfsync", "always", "--port", str(free_port())) as server:
        async with open_here(server.url, lease_s=5, timeout_s=8) as client:

            async def talk(key):
                session = client.session(key)
                for number in itertools.count():
                    turn_id = f"{key}.{number}"
                    try:
                        await session.ask(f"[[say {turn_id}]]", turn_id=turn_id)
                    except (gr.SessionConflictError, gr.HistoryNotSaved, gr.StoreError) as exc:
                        errors[type(exc).__name__] += 1
                    else:
                        acked.setdefault(key, []).append(turn_id)
                        if back_at[0]:
                            gaps.append(trio.current_time() - back_at[0])
                            back_at[0] = 0.0

            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(talk, f"k{number}")
                for _ in range(kills):
                    await trio.sleep(rng.uniform(0.02, 0.25))
                    server.kill()
                    await trio.sleep(rng.uniform(0.0, 0.1))
                    await trio.to_thread.run_sync(server.start)
                    back_at[0] = trio.current_time()
                    while back_at[0]:
                        await trio.sleep(0.005)
                nursery.cancel_scope.cancel()
        for key, turn_ids in acked.items():
            assert set(turn_ids) <= set(check_log(await read_log(server.url, key)))
    total = sum(map(len, acked.values()))
    assert total > kills
    assert max(gaps) < 1.0
    record_property(
        "figure",
        f"{kills} kills, {total} acknowledged turns: 0 lost, 0 twice; the next one at most {max(gaps):.2f} s after the "
        f"server's return; {sum(errors.values())} turns not stored {dict(errors)}",
    )
