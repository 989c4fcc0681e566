"""Mailboxes against a plain list, and answers that are given exactly once, whoever is cancelled meanwhile."""

from __future__ import annotations

import random
from typing import Literal

import outcome
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from gorouter_trio._mailbox import Mailbox, MailboxStatistics, OverflowPolicy, ReplySlot


class Mail:
    """Mail that is equal to all other mail, as values may be: only identity tells it apart."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mail)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"mail {self.number}"


# --- against a model --------------------------------------------------------------------------------------------------

Operation = tuple[Literal["post", "post_nowait", "receive", "take", "remove", "cancel", "close"], int]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["post"] * 6 + ["post_nowait", "receive", "receive", "receive", "take", "remove", "cancel"]),
        st.integers(0, 30),
    )
    | st.tuples(st.just("close"), st.just(0)),
    max_size=30,
)
Outcome = str | Mail


class Model:
    """What a mailbox promises, with lists. `ended` has the outcome of each call that is over, by its number."""

    def __init__(self, capacity: int, policy: OverflowPolicy) -> None:
        self.capacity, self.policy = capacity, policy
        self.queue: list[Mail] = []
        self.posters: list[tuple[int, Mail]] = []
        self.reader: int | None = None
        self.closed = False
        self.ended: dict[int, Outcome] = {}
        self.dropped: list[Mail] = []

    def post(self, call: int, mail: Mail, *, waits: bool) -> None:
        if self.closed:
            self.ended[call] = "closed"
        elif self.reader is not None:
            self.ended |= {self.reader: mail, call: "posted"}
            self.reader = None
        elif len(self.queue) < self.capacity and not self.posters:
            self.queue.append(mail)
            self.ended[call] = "posted"
        elif self.policy == "drop_oldest":
            self.dropped.append(self.queue.pop(0))
            self.queue.append(mail)
            self.ended[call] = "posted"
        elif waits and self.policy == "block":
            self.posters.append((call, mail))
        else:
            self.ended[call] = "full"

    def receive(self, call: int) -> None:
        if self.reader is not None:
            self.ended[call] = "busy"
        elif self.closed:
            self.ended[call] = "closed"
        elif self.queue:
            self.ended[call] = self.queue.pop(0)
            self.let_in()
        else:
            self.reader = call

    def take(self, *, even: bool) -> Mail | None:
        if not self.queue or (self.queue[0].number % 2 == 0) != even:
            return None
        taken = self.queue.pop(0)
        self.let_in()
        return taken

    def let_in(self) -> None:
        if self.posters:
            call, mail = self.posters.pop(0)
            self.queue.append(mail)
            self.ended[call] = "posted"

    def remove(self, mail: Mail) -> bool:
        if not any(mail is queued for queued in self.queue):
            return False
        self.queue = [queued for queued in self.queue if queued is not mail]
        self.let_in()
        return True

    def cancel(self, call: int) -> None:
        if call in self.ended:
            return
        self.ended[call] = "cancelled"
        self.posters = [(other, mail) for other, mail in self.posters if other != call]
        self.reader = None if self.reader == call else self.reader

    def close(self) -> list[Mail]:
        waiting = [call for call, _ in self.posters] + ([] if self.reader is None else [self.reader])
        self.ended |= dict.fromkeys(waiting, "closed")
        unread, self.queue, self.posters, self.reader, self.closed = self.queue, [], [], None, True
        return unread


class Driver:
    """The same calls, made on a real mailbox, each in a task of its own."""

    def __init__(self, mailbox: Mailbox[Mail], nursery: trio.Nursery) -> None:
        self.mailbox, self.nursery = mailbox, nursery
        self.ended: dict[int, Outcome] = {}
        self.scopes: dict[int, trio.CancelScope] = {}

    async def call(self, number: int, mail: Mail | None) -> None:
        with trio.CancelScope() as self.scopes[number]:
            self.ended[number] = await self._outcome(mail)
        if self.scopes[number].cancelled_caught:
            self.ended[number] = "cancelled"

    async def _outcome(self, mail: Mail | None) -> Outcome:
        try:
            if mail is None:
                return await self.mailbox.receive()
            await self.mailbox.post(mail)
        except trio.WouldBlock:
            return "full"
        except trio.ClosedResourceError:
            return "closed"
        except trio.BusyResourceError:
            return "busy"
        return "posted"

    def post_nowait(self, number: int, mail: Mail) -> None:
        try:
            self.mailbox.post_nowait(mail)
            self.ended[number] = "posted"
        except trio.WouldBlock:
            self.ended[number] = "full"
        except trio.ClosedResourceError:
            self.ended[number] = "closed"


@given(operations=OPERATIONS, capacity=st.integers(1, 3), policy=st.sampled_from(["block", "reject", "drop_oldest"]))
def test_a_mailbox_is_a_list_with_a_bound(operations: list[Operation], capacity: int, policy: OverflowPolicy) -> None:
    """Order, bound, all policies, taking, removing, cancelling and closing are as in a plain list, call by call."""
    trio.run(_compare, operations, Model(capacity, policy))


async def _compare(operations: list[Operation], model: Model) -> None:
    dropped: list[Mail] = []
    mailbox: Mailbox[Mail] = Mailbox(model.capacity, policy=model.policy, on_drop=dropped.append)
    mails: list[Mail] = []
    async with trio.open_nursery() as nursery:
        driver = Driver(mailbox, nursery)
        for number, (operation, choice) in enumerate(operations):
            if operation in {"post", "post_nowait"}:
                mails.append(Mail(number))
            _apply(operation, number, choice=choice, mails=mails, model=model, driver=driver)
            await trio.testing.wait_all_tasks_blocked()
            assert _numbers(driver.ended) == _numbers(model.ended)
            assert [mail.number for mail in dropped] == [mail.number for mail in model.dropped]
            assert mailbox.statistics() == MailboxStatistics(
                len(model.queue), model.capacity, len(model.posters), model.closed
            )
        assert [mail.number for mail in mailbox.close()] == [mail.number for mail in model.close()]
        await trio.testing.wait_all_tasks_blocked()
        assert _numbers(driver.ended) == _numbers(model.ended)


def _apply(operation: str, number: int, *, choice: int, mails: list[Mail], model: Model, driver: Driver) -> None:
    if operation == "post":
        model.post(number, mails[-1], waits=True)
        driver.nursery.start_soon(driver.call, number, mails[-1])
    elif operation == "post_nowait":
        model.post(number, mails[-1], waits=False)
        driver.post_nowait(number, mails[-1])
    elif operation == "receive":
        model.receive(number)
        driver.nursery.start_soon(driver.call, number, None)
    elif operation == "take":
        even = choice % 2 == 0
        taken = driver.mailbox.take_nowait(lambda mail: (mail.number % 2 == 0) == even)
        assert taken is model.take(even=even)
    elif operation == "remove" and mails:
        mail = mails[choice % len(mails)]
        assert driver.mailbox.remove(mail) == model.remove(mail)
    elif operation == "cancel" and driver.scopes:
        call = list(driver.scopes)[choice % len(driver.scopes)]
        model.cancel(call)
        driver.scopes[call].cancel()
    elif operation == "close":
        assert [mail.number for mail in driver.mailbox.close()] == [mail.number for mail in model.close()]


def _numbers(ended: dict[int, Outcome]) -> dict[int, str | int]:
    return {call: result.number if isinstance(result, Mail) else result for call, result in ended.items()}


async def test_picking_from_anywhere(autojump_clock) -> None:
    """Mail is picked out of the queue or from a poster that waits for room, who goes on; the rest keeps its order."""
    mailbox: Mailbox[int] = Mailbox(2)
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(mailbox.post, number)
            await trio.testing.wait_all_tasks_blocked()
        assert mailbox.pick_nowait(lambda mail: mail == 3) == 3
        assert mailbox.statistics().waiting_posters == 2
        assert mailbox.pick_nowait(lambda mail: mail == 1) == 1
        assert mailbox.statistics().waiting_posters == 1
        assert mailbox.pick_nowait(lambda mail: mail > 4) is None
        assert [await mailbox.receive() for _ in range(3)] == [0, 2, 4]
    assert mailbox.pick_nowait(lambda _mail: True) is None


# --- together ---------------------------------------------------------------------------------------------------------


async def test_nothing_is_lost_or_doubled_when_everybody_is_cancelled(rng: random.Random) -> None:
    """Posters and the reader are cancelled at random: what was posted is read or unread, once, in order."""
    mailbox: Mailbox[tuple[int, int]] = Mailbox(3)
    posted: list[tuple[int, int]] = []
    received: list[tuple[int, int]] = []

    async def post_many(poster: int) -> None:
        for number in range(60):
            with trio.CancelScope() as scope:
                if rng.random() < 0.3:
                    scope.cancel()
                await mailbox.post((poster, number))
                posted.append((poster, number))
            if rng.random() < 0.3:
                await trio.lowlevel.checkpoint()

    async def read() -> None:
        while True:
            with trio.CancelScope() as scope:
                if rng.random() < 0.3:
                    scope.cancel()
                received.append(await mailbox.receive())

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as posters:
            nursery.start_soon(read)
            for poster in range(8):
                posters.start_soon(post_many, poster)
        nursery.cancel_scope.cancel()
    received += mailbox.close()
    assert sorted(received) == sorted(posted)
    for poster in range(8):
        numbers = [number for who, number in received if who == poster]
        assert numbers == sorted(numbers)


async def test_closing_wakes_everybody_with_an_error_of_their_own() -> None:
    """All posters and the reader of a closed mailbox get `ClosedResourceError`, each its own exception."""
    full: Mailbox[int] = Mailbox(1)
    empty: Mailbox[int] = Mailbox(1)
    full.post_nowait(0)
    errors: list[trio.ClosedResourceError] = []

    async def expect_closed(call: object) -> None:
        with pytest.raises(trio.ClosedResourceError) as raised:
            await call()  # type: ignore[operator]
        errors.append(raised.value)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(expect_closed, lambda number=number: full.post(number))
        nursery.start_soon(expect_closed, empty.receive)
        await trio.testing.wait_all_tasks_blocked()
        assert full.close() == [0]
        assert empty.close() == []
    assert len({id(error) for error in errors}) == 4
    assert full.close() == []
    await expect_closed(full.receive)


async def test_two_readers_are_refused_also_when_both_began_with_mail() -> None:
    """A second reader gets `BusyResourceError`, even when it began while there was still mail."""
    mailbox: Mailbox[int] = Mailbox(2)
    mailbox.post_nowait(1)
    outcomes: list[object] = []

    async def read() -> None:
        outcomes.append(await outcome.acapture(mailbox.receive))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert len(outcomes) == 2
        mailbox.post_nowait(2)
    values = [o.value for o in outcomes if isinstance(o, outcome.Value)]
    (error,) = [o.error for o in outcomes if isinstance(o, outcome.Error)]
    assert values == [1, 2]
    assert isinstance(error, trio.BusyResourceError)


async def test_posting_receiving_and_waiting_let_others_run() -> None:
    """All three are checkpoints, also when they need not wait: a loop around them starves nobody."""
    mailbox: Mailbox[int] = Mailbox(10)
    slots: list[ReplySlot[str]] = [ReplySlot() for _ in range(10)]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        seen = []
        for calls in ([lambda: mailbox.post(1)] * 10, [mailbox.receive] * 10, [slot.wait for slot in slots]):
            before = turns
            for slot in slots:
                slot.resolve("x")
            for call in calls:
                await call()
            seen.append(turns - before)
        nursery.cancel_scope.cancel()
    assert all(between >= 9 for between in seen), seen


async def test_a_cancelled_receive_leaves_the_mail() -> None:
    """Mail is taken or left, never lost between the two."""
    mailbox: Mailbox[int] = Mailbox(2)
    mailbox.post_nowait(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await mailbox.receive()
    assert scope.cancelled_caught
    assert await mailbox.receive() == 1


# --- answers ----------------------------------------------------------------------------------------------------------


class NotedSlot(ReplySlot[str]):
    """A slot that notes being abandoned, and what was known then."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[bool] = []

    def on_abandon(self) -> None:
        self.noted.append(self.abandoned)


async def test_one_answer_and_no_second() -> None:
    """The first answer counts, value or error, whether the asker waits already or not yet."""
    for answered_before in (True, False):
        slot: ReplySlot[str] = ReplySlot()
        results: list[str] = []

        async def ask(slot: ReplySlot[str] = slot, results: list[str] = results) -> None:
            results.append(await slot.wait())

        async with trio.open_nursery() as nursery:
            if not answered_before:
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
            assert not slot.is_resolved
            assert slot.resolve("first")
            assert slot.is_resolved
            assert not slot.resolve("second")
            assert not slot.fail(ValueError("third"))
            if answered_before:
                nursery.start_soon(ask)
        assert results == ["first"]


async def test_an_error_is_an_answer() -> None:
    """`fail` raises in the asker; a value afterwards is refused."""
    slot: ReplySlot[str] = ReplySlot()
    assert slot.fail(ValueError("no"))
    assert not slot.resolve("late")
    with pytest.raises(ValueError, match="no"):
        await slot.wait()


async def test_a_cancelled_asker_is_known_at_once() -> None:
    """The slot is abandoned in the step of the cancel, before any other task runs, and takes no answer."""
    slot = NotedSlot()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(slot.wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert slot.noted == [True]
        assert not slot.resolve("late")
        assert not slot.fail(ValueError("late"))
    assert not slot.is_resolved


async def test_an_answer_given_before_the_cancel_is_taken() -> None:
    """Whoever answered may rely on it: the asker gets the answer, though it is cancelled in the same step."""
    for wait_first in (True, False):
        slot = NotedSlot()
        got: list[str] = []

        async def ask(slot: NotedSlot = slot, got: list[str] = got) -> None:
            got.append(await slot.wait())

        async with trio.open_nursery() as nursery:
            if wait_first:
                nursery.start_soon(ask)
                await trio.testing.wait_all_tasks_blocked()
            assert slot.resolve("kept")
            nursery.cancel_scope.cancel()
            if not wait_first:
                nursery.start_soon(ask)
        assert got == ["kept"]
        assert slot.noted == []
