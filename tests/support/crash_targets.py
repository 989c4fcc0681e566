"""What the crash tests run and kill: logs that keep their promise, logs that break it, and a session in memory."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import trio

from gorouter_trio.client import open_client
from gorouter_trio.session.directory import SessionRef
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores.sqlite import SqliteStore
from gorouter_trio.transport.sqlite import SqliteFile
from gorouter_trio.wire.messages import UserMessage

Ack = Callable[[str], None]


def write_log(ack: Ack, path: str, count: str = "1000000") -> None:
    """Append lines, each durable before it is acknowledged; whatever a crash left half written goes first."""
    mend_log(lambda _line: None, path)
    number = len(read_log(path))
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for _ in range(int(count)):
        os.write(file, f"line {number}\n".encode())
        os.fsync(file)
        ack(f"line {number}")
        number += 1


def mend_log(ack: Ack, path: str) -> None:
    """Cut a log back to its last whole line."""
    if os.path.exists(path):
        with open(path, "rb+") as file:
            data = file.read()
            whole = data.rfind(b"\n") + 1
            if whole != len(data):
                file.truncate(whole)
                os.fsync(file.fileno())
    ack("mended")


def read_log(path: str) -> list[str]:
    """The whole lines of a log."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        return file.read().decode().split("\n")[:-1]


def promise_too_early(ack: Ack, path: str) -> None:
    """A log that acknowledges what is still in a buffer of the process."""
    with open(path, "w", encoding="ascii") as file:
        for number in range(1_000_000):
            file.write(f"line {number}\n")
            ack(f"line {number}")


def rewrite_in_place(ack: Ack, path: str) -> None:
    """A log that is written anew from its beginning for each line."""
    lines: list[str] = []
    for number in range(1_000_000):
        lines.append(f"line {number}\n")
        with open(path, "w", encoding="ascii") as file:
            for line in lines:
                file.write(line)
                file.flush()
            os.fsync(file.fileno())
        ack(f"line {number}")


def say(ack: Ack, *words: str) -> None:
    """Acknowledge each word and end."""
    for word in words:
        ack(word)


def say_and_wait(ack: Ack, *words: str) -> None:
    """Acknowledge each word and never end."""
    say(ack, *words)
    while True:
        signal.pause()


def fail(ack: Ack) -> None:
    """Raise."""
    ack("so far")
    raise LookupError("on purpose")


async def chat_in_memory(ack: Ack, key: str) -> None:
    """Take turns of a session whose store is this process's memory."""
    async with (
        open_simulated_network(Simulator()) as network,
        open_client(api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network) as client,
    ):
        session = client.session(key)
        while True:
            ack((await session.ask("go on")).text)


SESSIONS = 8


async def take_turns(ack: Ack, path: str) -> None:
    """Take turns of several sessions at once on a SQLite store; a turn is acknowledged once its answer was given."""
    async with (
        SqliteStore(path) as store,
        open_simulated_network(Simulator()) as network,
        open_client(
            api_key="sk-test", base_url=network.base_url, insecure_http=True, transport=network, store=store
        ) as client,
        trio.open_nursery() as nursery,
    ):
        for number in range(SESSIONS):
            nursery.start_soon(_talk, client.session(f"s{number}"), ack)


async def _talk(session: SessionRef, ack: Ack) -> None:
    turn = sum(isinstance(entry.message, UserMessage) for entry in await session.history())
    while True:
        # Whatever a crash left in doubt has used its id up.
        turn_id = f"{turn}-{os.getpid()}"
        result = await session.ask(f"turn {turn}", turn_id=turn_id)
        ack(json.dumps([session.key, turn_id, result.text]))
        turn += 1


async def change_everything(ack: Ack, path: str) -> None:
    """Append, replace, delete and erase, on a file whose format is brought up to date first."""
    async with SqliteStore(path) as store:
        ack("append" if await store.append("new", [b"1", b"2"], expected_version=0) else "")
        ack("rewrite" if await store.rewrite("old", [b"3"], expected_version=2) else "")
        ack("delete" if await store.delete("gone") else "")
        ack("erase" if await store.erase("erased") else "")


async def fill_for_changes(path: str) -> None:
    """What `change_everything` starts from."""
    async with SqliteStore(path) as store:
        await store.append("old", [b"1"], expected_version=0)
        await store.append("old", [b"2"], expected_version=1)
        await store.append("gone", [b"x" * 9000], expected_version=0)
        await store.append("erased", [b"the canary sings"], expected_version=0)


def migrate(ack: Ack, path: str) -> None:
    """Bring a file up to date through two steps, and say so."""

    async def run() -> None:
        file = SqliteFile(path, MIGRATIONS, application_id=7)
        await file.write(lambda connection: None, subject="")
        ack("migrated")
        await file.aclose()

    trio.run(run)


MIGRATIONS = (
    ("CREATE TABLE t (a)", "INSERT INTO t VALUES (1), (2)"),
    ("ALTER TABLE t ADD COLUMN b", "UPDATE t SET b = a * 2"),
    ("CREATE TABLE u AS SELECT * FROM t", "DROP TABLE t", "ALTER TABLE u RENAME TO t"),
)
