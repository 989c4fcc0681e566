# ruff: noqa: T201 - an example prints
"""GoRouter Kit, the program `history`: a conversation that outlives its client, and its statistics.

python examples/kit_history.py --simulate
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from _client import open_example_client

import gorouter_trio as gr
from gorouter_trio.stores import SqliteStore


async def main() -> None:
    """Two clients, one after the other, and one conversation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.db"
        for question in ("My name is Ada.", "What is my name?"):
            async with SqliteStore(path) as store, open_example_client(store=store) as client:
                reply = await client.session("user:42", system="You are concise.").ask(question)
                print(reply.text)
        async with SqliteStore(path) as store:
            manager = gr.HistoryManager(store)
            for entry in await manager.entries("user:42"):
                print(f"{type(entry.message).__name__}: {entry.call.model if entry.call else ''}")
            stats = await manager.analyzer.statistics(key="user:42")
            print(f"{stats.calls} calls, cost {stats.cost_usd} USD")


if __name__ == "__main__":
    trio.run(main)
