"""A provider whose answers are long: in a test, or in a process of its own, where its memory counts for nobody else.

As a script: `endless.py PIECES WORDS` serves it on a free port of the loopback address, prints its base URL, and ends
with its input.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import trio
from worlds import DONE, Handler, chunk, streams

from gorouter_trio.transport.http_server import HttpServerLimits, serve_http

__all__ = ["endless", "open_endless_api"]

SUPPORT = Path(__file__).parent


def endless(pieces: int, *, words: int = 10) -> Handler:
    """An answer of so many pieces, as fast as it is read."""
    return streams(*[chunk({"content": "word " * words}) for _ in range(pieces)], chunk(finish="stop"), DONE)


@asynccontextmanager
async def open_endless_api(pieces: int, *, words: int) -> AsyncIterator[str]:
    """Serve `endless` from a process of its own; its base URL. Leaving ends the process."""
    process = await trio.lowlevel.open_process(
        [sys.executable, __file__, str(pieces), str(words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}"},
    )
    said = cast("trio.abc.ReceiveStream", process.stdout)
    try:
        url = b""
        with trio.fail_after(20):
            while not url.endswith(b"\n"):
                received = await said.receive_some()
                assert received, "the provider has ended"
                url += received
        yield url.decode().strip()
    finally:
        process.kill()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 5):
            await process.wait()
            await trio.aclose_forcefully(said)
            await trio.aclose_forcefully(cast("trio.abc.SendStream", process.stdin))


async def _serve(pieces: int, words: int) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=2_048)
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        limits = HttpServerLimits(max_connections=5_000)
        await nursery.start(partial(serve_http, endless(pieces, words=words), listeners, limits=limits))
        print(f"http://127.0.0.1:{port}/api/v1", flush=True)  # noqa: T201 - how it is told
        async for _line in trio.wrap_file(sys.stdin):
            pass
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(_serve, int(sys.argv[1]), int(sys.argv[2]))
