"""What GoRouter Kit left in a Redis, brought into a store: its keys `chat_history:<session>`, in both of its forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct, field

from ..errors import DecodeError, StoreError
from ..transport.resp_client import RedisClient
from .gorouter_kit import key_of_file, read_kit_file
from .turns import to_turns

if TYPE_CHECKING:
    from ..abc import HistoryStore
    from ..transport.resp_client import RedisExecutor

__all__ = ["KitImport", "import_kit_redis"]

_GLOB: Final = str.maketrans({character: f"\\{character}" for character in "*?[]^\\-"})
_COUNT = 200


class KitImport(Struct, kw_only=True):
    """How many sessions came in, were replaced, or were there already; what to know of them, and what did not come in.

    A session that is there already and differs is among the `problems`, unless it was to be replaced.
    """

    imported: int = 0
    replaced: int = 0
    unchanged: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


async def import_kit_redis(
    client: RedisExecutor, store: HistoryStore, *, prefix: str = "chat_history:", replace: bool = False
) -> KitImport:
    """Bring the sessions of GoRouter Kit into `store`, and leave them where they are. Once more, it changes nothing.

    Its keys are session ids with `_` for every unusual character, so an id is not always certain: a note says so. Goes
    through the server's keys with SCAN, in a cluster those of the node of the URL, which a note says. Raises what the
    client and the store raise.
    """
    report, cursor, seen = KitImport(), b"0", set[bytes]()
    while True:
        reply = await client.execute("SCAN", cursor, "MATCH", f"{prefix.translate(_GLOB)}*", "COUNT", _COUNT)
        cursor, names = cast("tuple[bytes, list[bytes]]", reply)
        for name in names:
            # A scan may name a key more than once.
            if name not in seen:
                seen.add(name)
                await _bring(client, store, name, prefix=prefix, replace=replace, report=report)
        if cursor == b"0":
            break
    if isinstance(client, RedisClient) and client.is_cluster:
        report.notes.append(
            "a cluster: only sessions of the node of the URL were found; do the same with each other one"
        )
    return report


async def _bring(
    client: RedisExecutor, store: HistoryStore, name: bytes, *, prefix: str, replace: bool, report: KitImport
) -> None:
    where = name.decode(errors="replace")
    try:
        data = await client.execute("GET", name)
        if data is None:
            return
        history = read_kit_file(cast("bytes", data))
    except DecodeError as exc:
        report.problems.append(f"{where}: {exc.message}")
        return
    except StoreError as exc:
        if exc.kind != "foreign":
            raise
        report.problems.append(f"{where}: is no text, and so no session")
        return
    key, is_certain = key_of_file(where.removeprefix(prefix))
    turns = to_turns(history.entries, turn_id="imported")
    if not is_certain:
        report.notes.append(f"{where}: its session is {key!r} here; an underscore may have been another character")
    report.notes += [f"{where}: left out of {note}" for note in history.notes]
    report.notes += [f"{where}: item {fault.position} {fault.reason}; it is kept apart" for fault in turns.set_aside]
    await _store(store, key, turns.entries, where=where, replace=replace, report=report)


async def _store(
    store: HistoryStore, key: str, entries: tuple[bytes, ...], *, where: str, replace: bool, report: KitImport
) -> None:
    if not key:
        report.problems.append(f"{where}: a session without an id")
        return
    stored = await store.load(key)
    if stored.version and tuple(stored.entries) == entries:
        report.unchanged += 1
    elif not stored.version:
        await store.append(key, entries, expected_version=0)
        report.imported += 1
    elif replace:
        await store.rewrite(key, entries, expected_version=stored.version)
        report.replaced += 1
    else:
        report.problems.append(f"{where}: session {key!r} is there already and differs")
