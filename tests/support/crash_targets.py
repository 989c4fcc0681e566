"""What the crash tests run and kill: logs that keep their promise, logs that break it, and a session in memory."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Awaitable, Callable

import trio

from gorouter_trio.client import open_client
from gorouter_trio.errors import SessionConflictError, StoreError
from gorouter_trio.session.directory import SessionRef
from gorouter_trio.simulator import Simulator, open_simulated_network
from gorouter_trio.stores.sqlite import _APPLICATION_ID as APPLICATION_ID
from gorouter_trio.stores.sqlite import _SCHEMA as SCHEMA
from gorouter_trio.stores.sqlite import SqliteStore
from gorouter_trio.transport.sqlite import Connection, SqliteFile
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


def digest(text: str) -> str:
    """A text that is too long for an acknowledgement, in short."""
    return hashlib.sha256(text.encode()).hexdigest()


async def _talk(session: SessionRef, ack: Ack) -> None:
    turn = sum(isinstance(entry.message, UserMessage) for entry in await session.history())
    while True:
        # Whatever a crash left in doubt has used its id up.
        turn_id = f"{turn}-{os.getpid()}"
        result = await session.ask(f"turn {turn}", turn_id=turn_id)
        ack(json.dumps([session.key, turn_id, digest(result.text)]))
        turn += 1


CANARY = b"the canary sings"
OLD_FILE = (
    (b"old", 2, (b"1", b"2")),
    (b"gone", 1, (b"x" * 9000,)),
    (b"erased", 1, (CANARY,)),
    (b"tenant:acme/principal:bob/1", 1, (b"theirs",)),
)
"""The sessions of a file in the first format: key, version, entries."""


async def make_old_file(path: str) -> None:
    """A file in the first format, with the sessions of `OLD_FILE`."""

    def fill(connection: Connection) -> None:
        for number, (key, version, entries) in enumerate(OLD_FILE, 1):
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", (number, key, version, len(entries)))
            for place, data in enumerate(entries):
                row = (number, place, data)
                connection.execute("INSERT INTO entries (session, number, data) VALUES (?, ?, ?)", row)

    file = SqliteFile(path, SCHEMA[:1], application_id=APPLICATION_ID)
    await file.write(fill, subject="")
    await file.aclose()


CHANGES: dict[str, Callable[[SqliteStore], Awaitable[object]]] = {
    "load": lambda store: store.load("old"),
    "append": lambda store: store.append("new", [b"1", b"2"], expected_version=0),
    "rewrite": lambda store: store.rewrite("old", [b"3"], expected_version=2),
    "delete": lambda store: store.delete("gone"),
    "erase": lambda store: store.erase("erased"),
}
"""Everything that a store does to a file; the first one brings it up to date."""


async def change_everything(ack: Ack, path: str) -> None:
    """Bring a file of the first format up to date, then append, replace, delete and erase."""
    async with SqliteStore(path) as store:
        for name, change in CHANGES.items():
            await change(store)
            ack(name)


async def change_under_faults(ack: Ack, path: str) -> None:
    """The same, each step a second time when the disk failed, saying what became of it; other errors end the run."""
    async with SqliteStore(path, busy_s=0.05) as store:
        for name, change in CHANGES.items():
            for _ in range(2):
                try:
                    await change(store)
                except StoreError as exc:
                    ack(f"{name} failed: {exc.kind}")
                except SessionConflictError:
                    # The first time it was written, although the disk failed.
                    ack(name)
                    break
                else:
                    ack(name)
                    break


async def recover(ack: Ack, path: str) -> None:
    """What is done after a crash: open, look at everything, write and remove something, close."""
    async with SqliteStore(path) as store:
        for key in await store.list_keys():
            await store.load(key)
        ack("looked")
        await store.append("recovered", [], expected_version=await store.version("recovered"))
        ack("written")
        await store.erase("recovered")
        ack("erased")


async def append_everywhere(ack: Ack, path: str, count: str = "40") -> None:
    """Append to several sessions, some entries larger than a page; acknowledge each; compact one, delete one."""
    async with SqliteStore(path) as store:
        for number in range(int(count)):
            key, version = f"s{number % 4}", number // 4
            entry = b"%d:" % number + b"y" * (9000 if number % 5 == 0 else 40)
            await store.append(key, [entry], expected_version=version)
            ack(json.dumps([key, version + 1]))
        await store.rewrite("s1", [b"compacted"], expected_version=int(count) // 4)
        ack(json.dumps(["s1", int(count) // 4 + 1]))
        await store.delete("s2")
        ack(json.dumps(["s2", 0]))
        await store.erase("s3")
        ack(json.dumps(["s3", 0]))
