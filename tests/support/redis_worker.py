"""Takes turns of a session on a Redis, as a process of its own.

    python redis_worker.py URL NAME COUNT LEASE_S DELAY_S

Says `+id` on a line of its own for each answered turn, as soon as it is, `!error` for what else was raised, and `.` at
its end. Each turn takes the model DELAY_S. A COUNT of 0 goes on for ever.
"""

from __future__ import annotations

import itertools
import sys

import trio

from gorouter_trio import (
    ActorGoneError,
    HistoryNotSaved,
    SessionConfig,
    SessionConflictError,
    StoreError,
    TurnInDoubtError,
    open_client,
)
from gorouter_trio.simulator import Simulator, SimulatorConfig, open_simulated_network
from gorouter_trio.stores import RedisStore

KEY = "shared"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def take_turns(url: str, name: str, count: int, lease_s: float, delay_s: float) -> None:
    """Ask, and say what came of it."""
    async with (
        RedisStore(url) as store,
        open_simulated_network(Simulator(SimulatorConfig(latency_s=delay_s))) as network,
        open_client(
            api_key="sk-test",
            base_url=network.base_url,
            insecure_http=True,
            transport=network,
            store=store,
            sessions=SessionConfig(lease_s=lease_s),
        ) as client,
    ):
        session = client.session(KEY)
        for number in itertools.count():
            if count and number == count:
                break
            turn_id = f"{name}.{number}"
            try:
                await session.ask(f"[[say {turn_id}]]", turn_id=turn_id)
            except (SessionConflictError, HistoryNotSaved, StoreError, ActorGoneError, TurnInDoubtError) as exc:
                say(f"!{type(exc).__name__}")
            else:
                say(f"+{turn_id}")
    say(".")


if __name__ == "__main__":
    trio.run(take_turns, sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]))
