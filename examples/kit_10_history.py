# ruff: noqa: T201 - an example prints
"""GoRouter Kit, example 10: stores of histories, a manager over them, and what they tell.

python examples/kit_10_history.py --simulate
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import trio
from _client import open_example_client

import gorouter_trio as gr
from gorouter_trio.stores import HistoryFilter, MemoryStore, SqliteStore


async def main() -> None:
    """In memory, then on disk; the store is changed while the client runs."""
    with tempfile.TemporaryDirectory() as folder:
        async with SqliteStore(Path(folder) / "history.db") as disk, open_example_client(store=MemoryStore()) as client:
            await client.session("user:42").ask("This is kept in memory only.")
            client.set_store(disk)
            await client.session("user:42").ask("This is kept on disk.")
            manager = gr.HistoryManager(disk, owner=client, ttl_s=30 * 60, cleanup_s=5 * 60)
            print(f"{len(await manager.entries('user:42'))} messages on disk")
            stats = await manager.analyzer.statistics(key="user:42", only=HistoryFilter(roles={"assistant"}))
            print(f"calls={stats.calls} cost={stats.cost_usd}")


if __name__ == "__main__":
    trio.run(main)
