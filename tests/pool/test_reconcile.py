"""The search for lost costs against an API that answers late, with errors, or never; and the ledger's file."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import trio
from attempts import answered, lost

from gorouter_trio.config import LedgerConfig
from gorouter_trio.errors import ConfigError, NotFoundError, ProviderError
from gorouter_trio.pool.ledger import Ledger
from gorouter_trio.pool.ledger_file import LedgerFile, LedgerReader
from gorouter_trio.pool.reconcile import Reconciliation
from gorouter_trio.wire.catalog import GenerationInfo
from gorouter_trio.wire.codec import encode_json
from gorouter_trio.wire.ledger import LedgerRow

D = Decimal


class Service:
    """GET /generation: what it answers for an id, and when it was asked."""

    def __init__(self, lag_s: float) -> None:
        self.lag_s = lag_s
        self.asked: list[tuple[float, str]] = []
        self.broken: Exception | None = None
        self.hangs = False
        self.in_flight = self.most_in_flight = 0

    async def generation(self, generation_id: str) -> GenerationInfo:
        self.asked.append((trio.current_time(), generation_id))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await trio.sleep(1e9 if self.hangs else 0.2)
        finally:
            self.in_flight -= 1
        if self.broken is not None:
            raise self.broken
        if trio.current_time() < self.lag_s:
            raise NotFoundError(f"Generation {generation_id} not found", status=404)
        return GenerationInfo(id=generation_id, total_cost=D("0.5"))


class Place:
    def __init__(self, service: Service, **config: object) -> None:
        self.service = service
        self.ledger = Ledger(
            LedgerConfig(**config),  # type: ignore[arg-type]  # fields of the settings
            run="r",
            close_reservation=lambda _reservation, _usd: None,
        )
        self.lost: list[LedgerRow] = []
        self.errors: list[Exception] = []
        self.search = Reconciliation(
            self.ledger,
            service.generation,
            rng=random.Random(1),
            report_lost=self.lost.append,
            report_error=self.errors.append,
        )

    def lose(self, generation_id: str) -> None:
        self.ledger.enter(lost(generation_id), at_s=0, now=trio.current_time())


@asynccontextmanager
async def open_place(lag_s: float = 0.0, **config: object) -> AsyncIterator[Place]:
    place = Place(Service(lag_s), **config)
    async with trio.open_nursery() as nursery:
        for _ in range(place.ledger.config.seekers):
            nursery.start_soon(place.search.run)
        yield place
        place.search.close()
        nursery.cancel_scope.cancel()


async def test_found_after_a_lag(autojump_clock) -> None:
    """404 is asked again, after waits that double; then the row has the API's cost."""
    async with open_place(lag_s=20.0) as place:
        place.lose("gen-a")
        await place.search.wait_idle()
        (row,) = place.ledger.rows()
        assert (row.state, row.cost_usd) == ("reconciled", D("0.5"))
        assert 4 <= row.tries <= 7
        times = [at for at, _ in place.service.asked]
        assert times[0] == 1
        assert times == sorted(times)
        assert (place.lost, place.errors) == ([], [])


@pytest.mark.parametrize("how", ["404", "errors", "a bug", "hangs"])
async def test_given_up(autojump_clock, how: str) -> None:
    """What does not answer, however, ends as unreconciled and is reported, within bounded tries and time."""
    async with open_place(lag_s=1e12) as place:
        if how == "errors":
            place.service.broken = ProviderError("down", status=502)
        elif how == "a bug":
            place.service.broken = ValueError("bug")
        place.service.hangs = how == "hangs"
        place.lose("gen-a")
        await place.search.wait_idle()
        assert [row.state for row in place.lost] == ["unreconciled"]
        assert len(place.service.asked) == 10
        assert trio.current_time() < 10 * (60 + 30)
        assert len(place.errors) == (10 if how in {"errors", "a bug"} else 0)


async def test_many_at_a_time(autojump_clock) -> None:
    """So many as there are seekers are asked for at once, and every row is found."""
    async with open_place(seekers=4) as place:
        for number in range(200):
            place.lose(f"gen-{number}")
        await place.search.wait_idle()
        assert {generation_id for _, generation_id in place.service.asked} == {f"gen-{n}" for n in range(200)}
        assert (place.service.most_in_flight, len(place.service.asked)) == (4, 200)
        assert {row.state for row in place.ledger.rows()} == {"reconciled"}


async def test_an_earlier_row_does_not_wait(autojump_clock) -> None:
    """A row that comes while the search sleeps is looked up in its own time."""
    async with open_place(lag_s=100.0) as place:
        place.lose("late")
        await trio.sleep(60)
        before = len(place.service.asked)
        place.lose("early")
        await trio.sleep(1.5)
        assert (round(place.service.asked[-1][0], 1), place.service.asked[-1][1]) == (61.0, "early")
        assert len(place.service.asked) == before + 1


async def test_the_end(autojump_clock) -> None:
    """What is searched for when the client closes is unreconciled, and said."""
    async with open_place(lag_s=1e9) as place:
        place.lose("gen-a")
        await trio.sleep(5)
    assert [row.state for row in place.lost] == ["unreconciled"]
    assert [row.state for row in place.ledger.rows()] == ["unreconciled"]


# --- the file ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[LedgerRow], int]:
    with path.open("rb") as file:
        reader = LedgerReader(file)
        return list(reader.rows()), reader.unreadable


def rows(count: int) -> list[LedgerRow]:
    ledger = Ledger(LedgerConfig(), run="r", close_reservation=lambda _reservation, _usd: None)
    return [ledger.enter(answered(f"0.{number}1"), at_s=number, now=0) for number in range(count)]


def test_what_two_have_looked_up_is_read_once(tmp_path: Path) -> None:
    """A row that somebody else has looked up, and its own process found or gave up afterwards, is one row."""
    path = tmp_path / "ledger.jsonl"
    lost_row = Ledger(LedgerConfig(), run="r", close_reservation=lambda _reservation, _usd: None).enter(
        lost(), at_s=0, now=0
    )
    found_row = msgspec.structs.replace(lost_row, state="reconciled", cost_usd=D(3))
    for last in (found_row, msgspec.structs.replace(lost_row, state="unreconciled")):
        path.write_bytes(b"".join(encode_json(row) + b"\n" for row in (lost_row, found_row, last)))
        assert read(path) == ([found_row], 0)


async def test_file(tmp_path: Path) -> None:
    """Every row is in the file when the task has ended, each once and as it was last; others' rows stay."""
    path = tmp_path / "ledger.jsonl"
    errors: list[Exception] = []
    for _ in range(2):
        file = LedgerFile(path, report=errors.append)
        ledger = Ledger(
            LedgerConfig(), run=f"r{os.urandom(4).hex()}", close_reservation=lambda _reservation, _usd: None, sink=file
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(file.run)
            for _ in range(100):
                ledger.enter(answered("0.125"), at_s=1, now=0)
                await trio.lowlevel.checkpoint()
            ledger.enter(lost(), at_s=1, now=0)
            row = ledger.take_due(10)
            assert row is not None
            ledger.found(row, GenerationInfo(id="gen-1", total_cost=D(3)))
            ledger.enter(lost(), at_s=1, now=0)
            nursery.cancel_scope.cancel()
    found, unreadable = read(path)
    assert (len(found), unreadable, errors) == (204, 0, [])
    assert sum(row.cost_usd for row in found if row.cost_usd is not None) == 2 * (D("12.5") + 3)
    assert [row.state for row in found].count("reconciling") == 2
    assert path.stat().st_mode & 0o077 == 0


async def test_a_torn_file(tmp_path: Path) -> None:
    """A line that a crash cut is counted and left out; the rows around it are read."""
    path = tmp_path / "ledger.jsonl"
    file = LedgerFile(path, report=lambda _error: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(file.run)
        for row in rows(3):
            file.write(row)
        nursery.cancel_scope.cancel()
    whole = path.read_bytes()
    path.write_bytes(b'{"run": 5}\n\n' + whole[: len(whole) - 20])
    found, unreadable = read(path)
    assert ([row.row for row in found], unreadable) == ([1, 2], 2)
    # Whoever appends to it begins a line of its own, and only where one was torn.
    for size in (3, 6):
        file = LedgerFile(path, report=lambda _error: None)
        async with trio.open_nursery() as nursery:
            await nursery.start(file.run)
            for row in rows(3):
                file.write(msgspec.structs.replace(row, run=f"after{size}"))
            nursery.cancel_scope.cancel()
        found, unreadable = read(path)
        assert (len(found), unreadable) == (2 + size, 2)
    assert path.read_bytes().count(b"\n\n") == 1


async def test_no_such_folder(tmp_path: Path) -> None:
    """A file that cannot be written is an error at once."""
    file = LedgerFile(tmp_path / "no" / "ledger.jsonl", report=lambda _error: None)
    with pytest.raises(ConfigError, match=r"ledger\.path: .*No such file or directory"):
        await file.run()


async def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock) -> None:
    """Rows wait while the disk takes none or a part of them, and are written whole and once when it does."""
    path = tmp_path / "ledger.jsonl"
    errors: list[Exception] = []
    file = LedgerFile(path, report=errors.append)
    write, room = os.write, [700]

    def full(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr("gorouter_trio.pool.ledger_file.os.write", full)
    async with trio.open_nursery() as nursery:
        await nursery.start(file.run)
        for row in rows(20):
            file.write(row)
        autojump_clock.autojump_threshold = 0.05
        await trio.sleep(3)
        assert errors
        assert path.stat().st_size == 700
        room[0] = 10**9
        await trio.sleep(3)
        assert [row.row for row in read(path)[0]] == list(range(1, 21))
        nursery.cancel_scope.cancel()
    assert (file.written, file.dropped) == (20, 0)


def test_waiting_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no disk takes for too long is dropped, and counted."""
    monkeypatch.setattr("gorouter_trio.pool.ledger_file._MOST_LINES", 5)
    file = LedgerFile(tmp_path / "x", report=lambda _error: None)
    for row in rows(8):
        file.write(row)
    assert file.dropped == 3
