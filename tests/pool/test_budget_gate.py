"""Waiting for money that is held: order, cancelling, and that no reservation is lost."""

from __future__ import annotations

import random
from decimal import Decimal

import pytest
import trio
import trio.testing

from gorouter_trio.config import Budget
from gorouter_trio.errors import BudgetExceededError
from gorouter_trio.pool.budget import BudgetBook, Reservation, Spending
from gorouter_trio.pool.budget_gate import BudgetGate
from gorouter_trio.pool.prices import Quote

D = Decimal


def asked(usd: str, **fields: str) -> Spending:
    return Spending(quote=Quote(D(usd), D(0)), max_tokens=1, **fields)


def gate(**budget: object) -> BudgetGate:
    return BudgetGate(BudgetBook(Budget(**budget)))  # type: ignore[arg-type]  # fields of the settings


async def reserve(doors: BudgetGate, spending: Spending) -> Reservation:
    return doors.reserve_nowait(spending) or await doors.wait(spending)


def given(doors: BudgetGate, usd: str, **fields: str) -> Reservation:
    reservation = doors.reserve_nowait(asked(usd, **fields))
    assert reservation is not None
    return reservation


async def test_in_order(autojump_clock) -> None:
    """Callers are let through in the order in which they came, even where a later one would fit before."""
    doors = gate(usd=1)
    first = given(doors, "0.9")
    done: list[str] = []

    async def ask(name: str, usd: str) -> None:
        reservation = await reserve(doors, asked(usd))
        done.append(name)
        await trio.sleep(1)
        doors.settle(reservation, D("0.1"))

    async with trio.open_nursery() as nursery:
        for name, usd in (("a", "0.9"), ("b", "0.7"), ("c", "0.2"), ("d", "0.05")):
            nursery.start_soon(ask, name, usd)
            await trio.testing.wait_all_tasks_blocked()
        assert (done, doors.waiting) == ([], 4)
        doors.settle(first, D("0.1"))
    assert (done[:2], set(done[2:])) == (["a", "b"], {"c", "d"})
    assert (doors.waiting, doors.book.client.spent_usd, doors.book.client.held_usd) == (0, D("0.5"), 0)


async def test_refused_when_hope_ends(autojump_clock) -> None:
    """A caller that could be covered and cannot any more is told, and those behind go on."""
    doors = gate(usd=1)
    first = given(doors, "0.9")
    done: list[str] = []

    async def ask(usd: str) -> None:
        try:
            doors.settle(await reserve(doors, asked(usd)), D(usd))
        except BudgetExceededError as exc:
            done.append(f"{usd} denied, {exc.left_usd} left")
        else:
            done.append(usd)

    async with trio.open_nursery() as nursery:
        for usd in ("0.5", "0.15"):
            nursery.start_soon(ask, usd)
            await trio.testing.wait_all_tasks_blocked()
        doors.settle(first, D("0.8"))
    assert sorted(done) == ["0.15", "0.5 denied, 0.2 left"]


async def test_denied_at_once() -> None:
    """What can never fit does not wait, not even behind others; nor does anybody where waiting is off."""
    doors = gate(usd=1)
    given(doors, "0.9")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reserve, doors, asked("0.5"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BudgetExceededError):
            doors.reserve_nowait(asked("1.5"))
        nursery.cancel_scope.cancel()
    assert doors.waiting == 0
    doors = gate(usd=1, overflow="reject")
    given(doors, "0.9")
    with pytest.raises(BudgetExceededError):
        doors.reserve_nowait(asked("0.5"))


async def test_waiting_is_bounded() -> None:
    """One more than may wait is refused."""
    doors = gate(usd=1, max_waiting=1)
    given(doors, "0.9")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reserve, doors, asked("0.5"))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BudgetExceededError, match=r"budget\.max_waiting"):
            await reserve(doors, asked("0.5"))
        nursery.cancel_scope.cancel()


async def test_a_leaver_makes_room() -> None:
    """Those who stood behind a caller that leaves are looked at again."""
    doors = gate(usd=1)
    given(doors, "0.6")
    got: list[Reservation] = []
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(_wait_in, scope, doors, asked("0.5"))
        await trio.testing.wait_all_tasks_blocked()

        async def small() -> None:
            got.append(await reserve(doors, asked("0.3")))

        nursery.start_soon(small)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        scope.cancel()
    assert [reservation.usd for reservation in got] == [D("0.3")]


async def _wait_in(scope: trio.CancelScope, doors: BudgetGate, spending: Spending) -> None:
    with scope:
        await reserve(doors, spending)


async def test_several_lines(autojump_clock) -> None:
    """Waiting for one's tenant holds up nobody of another tenant; whom the next account denies waits there."""
    doors = gate(usd=1, tenant_usd="0.5")
    of_a = given(doors, "0.5", tenant="a")
    done: list[str] = []

    async def ask(tenant: str, usd: str) -> None:
        reservation = await reserve(doors, asked(usd, tenant=tenant))
        done.append(tenant)
        doors.settle(reservation, D("0.01"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, "a", "0.5")
        await trio.testing.wait_all_tasks_blocked()
        await ask("b", "0.4")
        assert done == ["b"]
        of_b = given(doors, "0.45", tenant="b")
        of_c = given(doors, "0.03", tenant="c")
        doors.settle(of_a, D("0"))
        await trio.testing.wait_all_tasks_blocked()
        assert done == ["b", "a"]
        doors.release(of_b)
        doors.release(of_c)
    assert (doors.waiting, doors.book.client.held_usd) == (0, 0)


async def test_more_credit_lets_through() -> None:
    """A limit that grew is noticed by those who wait."""
    doors = gate(from_credits=True, usd=10)
    doors.book.bound_client(D(1), spent_usd=D(0))
    given(doors, "0.9")
    got: list[Reservation] = []

    async def ask() -> None:
        got.append(await reserve(doors, asked("0.5")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert doors.book.bound_client(D(5), spent_usd=D(0))
        doors.recheck()
    assert len(got) == 1


@pytest.mark.parametrize("step", range(12))
async def test_cancelled_at_every_step(step: int) -> None:
    """Whenever a caller is cancelled, its reservation is closed exactly once, and the rest of the line is served."""
    doors = gate(usd=1)
    closed = 0

    async def ask(scope: trio.CancelScope, usd: str) -> None:
        nonlocal closed
        with scope:
            reservation = await reserve(doors, asked(usd))
            try:
                for _ in range(2):
                    await trio.lowlevel.checkpoint()
            finally:
                closed += 1
                doors.settle(reservation, D("0.1"))

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(ask, scope, "0.6")
        for at in range(step + 1):
            if at == step:
                scopes[step % 4].cancel()
            await trio.lowlevel.checkpoint()
    statistics = doors.book.statistics()
    assert (doors.waiting, statistics.open_reservations, doors.book.client.held_usd) == (0, 0, 0)
    assert statistics.settled == closed
    assert closed in {3, 4}


async def test_crowds(autojump_clock, rng: random.Random) -> None:
    """Random crowds with cancels: nobody waits for ever, no budget is overshot, every reservation is closed."""
    for _ in range(20):
        doors = gate(usd=1, tenant_usd="0.4", session_usd="0.3")
        async with trio.open_nursery() as nursery:
            for _ in range(60):
                nursery.start_soon(_customer, doors, rng)
        statistics = doors.book.statistics()
        assert (doors.waiting, statistics.open_reservations) == (0, 0)
        for account in doors.book.accounts():
            assert account.held_usd == 0
            assert account.limit_usd is not None
            assert account.spent_usd <= account.limit_usd


async def _customer(doors: BudgetGate, rng: random.Random) -> None:
    await trio.sleep(rng.random() * 5)
    usd = D(rng.randrange(1, 200)).scaleb(-3)
    spending = asked(str(usd), tenant=rng.choice(["", "t", "u"]), session=rng.choice(["", "s", "r"]))
    with trio.move_on_after(rng.choice([0.5, 5, 1000])):
        try:
            reservation = await reserve(doors, spending)
        except BudgetExceededError:
            return
        try:
            await trio.sleep(rng.random() * 2)
        finally:
            for account in doors.book.accounts():
                assert account.limit_usd is not None
                assert account.spent_usd + account.held_usd <= account.limit_usd
            doors.settle(reservation, rng.choice([usd, usd / 2, D(0), None]))
