"""Takes turns of one session on a SQLite file, as a process of its own: `python second_process.py PATH NAME COUNT`.

Says on each line the id of a turn that was answered.
"""

from __future__ import annotations

import sys

import trio

from gorouter_trio import GorouterError, HistoryNotSaved, SessionConflictError, open_client
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores import SqliteStore

KEY = "shared"


async def take_turns(path: str, name: str, count: int) -> tuple[list[str], dict[str, int]]:
    """Ask `count` times; returns the ids of the answered turns, and how often what else was raised."""
    answered: list[str] = []
    errors: dict[str, int] = {}
    async with (
        SqliteStore(path) as store,
        open_simulated_network(Simulator()) as network,
        open_client(
            api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
    ):
        session = client.session(KEY)
        for number in range(count):
            turn_id = f"{name}{number}"
            try:
                await session.ask(f"[[say {turn_id}]]", turn_id=turn_id)
            except (SessionConflictError, HistoryNotSaved) as exc:
                errors[type(exc).__name__] = errors.get(type(exc).__name__, 0) + 1
            else:
                answered.append(turn_id)
            await trio.sleep(0.001)
    return answered, errors


if __name__ == "__main__":
    try:
        acked, _errors = trio.run(take_turns, sys.argv[1], sys.argv[2], int(sys.argv[3]))
    except GorouterError as exc:
        sys.exit(repr(exc))
    print(*acked, sep="\n")  # noqa: T201 - what the other process reads
