"""A job for several machines: its rows wait in a Redis, workers take them, and whoever likes collects the answers.

Theory of operation. Rows are entries of a stream, read by a consumer group; an entry belongs to one worker until that
one has finished it, or has not been heard of for `lease_s`: then another claims it. Workers renew what they have.
Before a row is sent, its bit in *sent* is set, so that whoever sends a row a second time knows, and says
`maybe_billed`. An answer is put into the stream *out* together with the row's bit in *done*, by one script that does
nothing where that bit is set: so every row has one line, however many workers had it.

Entries have the numbers of their rows as ids, so that a job whose submission was cut off is submitted again from where
it was.

Limits and the budget are shared by `ClusterJob.limits`, which is to be the `shared=` of the workers' clients: a worker
has money in its name in the Redis before it sends a row, and tells afterwards what that came to. What one has there
when it dies counts as spent once its lease is over, since nobody knows what was charged of it. A row that the budget
does not cover is given back to the stream, and its worker takes no more; a larger budget reaches workers that still
run, and later ones go on with what is left.

Keys have the name of the job in braces, so that all of them are on one node of a cluster.
"""

from __future__ import annotations

import hashlib
from contextlib import aclosing
from decimal import Decimal
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import msgspec
import trio
from msgspec import Struct

from ..errors import BadRequestError, ConfigError, GorouterError, StoreError
from ..pool.shared_redis import RedisLimits, SharedBudget
from ..transport.resp_client import RedisClient, RedisScript
from ..transport.resp_link import PASSING
from ..wire.codec import decode_json, encode_json
from ..wire.mail import CallSettings
from .output import encode_row, open_output
from .resume import sort_output
from .runner import BatchResult, encode_row_request, names_of
from .scan import OutputScan, scan_output
from .settings import StopReason, stop_reason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

    from ..transport.resp import Argument, Reply
    from .job import JobBudget
    from .output import OutputFile
    from .rows import BatchRow, RowProblem
    from .runner import EncodeRequest, RunRequest

__all__ = ["ClusterJob", "ClusterStatus", "Collected", "Worker"]

_GROUP: Final = "workers"
# Who has the rows that were not sent, until a worker claims them.
_NOBODY: Final = "-"
_PAGE: Final = 200
_SUBMITTED_AT_A_TIME: Final = 200
_WAIT_S: Final = 0.5
# What the limits take; a worker that is only slow has its money counted twice at worst.
_LOST_AFTER_S: Final = (2.0, 30.0)
_NANO: Final = Decimal(10) ** 9
_ZERO: Final = Decimal(0)
_LINE_START: Final = b'{"id":"batch_req_'
_UNSPENT: Final = SharedBudget(spent_usd=_ZERO, assumed_usd=_ZERO, held_usd=_ZERO)


def _script(source: str) -> RedisScript:
    return RedisScript(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


# A row and its marks: whether it had been sent before.
_SEND: Final = _script("return redis.call('SETBIT', KEYS[1], ARGV[1], 1)")
# A row that was not sent, and is left to others at once. KEYS: rows, sent. ARGV: entry, row, who has it, its mark
# before, lease in ms.
_RELEASE: Final = _script(
    f"local found = redis.call('XPENDING', KEYS[1], '{_GROUP}', ARGV[1], ARGV[1], 1) "
    "if #found == 0 or found[1][2] ~= ARGV[3] then return 0 end "
    "redis.call('SETBIT', KEYS[2], ARGV[2], ARGV[4]) "
    f"redis.call('XCLAIM', KEYS[1], '{_GROUP}', '{_NOBODY}', 0, ARGV[1], 'IDLE', ARGV[5], 'JUSTID') return 1"
)
# A worker that has ended; one that has rows is not forgotten. KEYS: rows. ARGV: its name.
_LEAVE: Final = _script(
    f"if #redis.call('XPENDING', KEYS[1], '{_GROUP}', '-', '+', 1, ARGV[1]) > 0 then return 0 end "
    f"redis.call('XGROUP', 'DELCONSUMER', KEYS[1], '{_GROUP}', ARGV[1]) return 1"
)
# The one line of a row. KEYS: facts, rows, out, done. ARGV: row, entry or '', line, whether it failed, its cost.
_FINISH: Final = _script(
    "local first = redis.call('SETBIT', KEYS[4], ARGV[1], 1) == 0 "
    "if first then redis.call('XADD', KEYS[3], '*', 'line', ARGV[3]) "
    "redis.call('HINCRBY', KEYS[1], 'done', 1) redis.call('HINCRBY', KEYS[1], 'failed', ARGV[4]) "
    "redis.call('HINCRBY', KEYS[1], 'cost_nano', ARGV[5]) end "
    f"if ARGV[2] ~= '' then redis.call('XACK', KEYS[2], '{_GROUP}', ARGV[2]) redis.call('XDEL', KEYS[2], ARGV[2]) end "
    "return first and 1 or 0"
)
# A row that is handed in, once. KEYS: facts, rows. ARGV: row, entry.
_SUBMIT: Final = _script(
    "local last = tonumber(redis.call('HGET', KEYS[1], 'submitted') or '0') "
    "if tonumber(ARGV[1]) <= last then return 0 end "
    "redis.call('XADD', KEYS[2], ARGV[1] .. '-0', 'row', ARGV[2]) "
    "redis.call('HSET', KEYS[1], 'submitted', ARGV[1]) redis.call('HINCRBY', KEYS[1], 'total', 1) return 1"
)


class _Entry(Struct, frozen=True, array_like=True):
    """A row as it waits: what is sent for it, or why nothing can be."""

    number: int
    position: int
    custom_id: str | None
    line_number: int | None
    body: str
    settings: CallSettings
    problem: str | None


class ClusterStatus(Struct, frozen=True, kw_only=True):
    """Where a job is: rows handed in so far and whether that is all of them, rows that have their lines, rows that
    workers have now, and how many workers have been heard of within their lease.

    `cost_usd` is what the lines say. Of a budget, `spent_usd` is what was charged, with `assumed_usd` of it for what
    workers had in flight when they died; `reserved_usd` is what those that run have set aside, `left_usd` the rest.
    `stopped` says why the last worker that stopped took no more rows.
    """

    name: str
    total: int
    is_submitted: bool
    done: int
    failed: int
    undone: int
    in_flight: int
    workers: int
    cost_usd: Decimal
    budget_usd: Decimal | None
    spent_usd: Decimal | None
    assumed_usd: Decimal | None
    reserved_usd: Decimal | None
    left_usd: Decimal | None
    stopped: str | None

    @property
    def is_done(self) -> bool:
        """Whether every row has its line."""
        return self.is_submitted and self.done >= self.total

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come by itself: every row has its line, or all workers have stopped."""
        return self.is_done or (self.stopped is not None and not self.workers)


class Collected(NamedTuple):
    """What a file has of the lines of a job: how many were `new`, and how many it has in all."""

    new: int
    lines: int


class ClusterJob:
    """The job `name` in a Redis, which whoever opened it closes. Every method raises `StoreError` where that fails.

    `limits` are for the clients of its workers.
    """

    def __init__(self, redis: RedisClient, name: str, *, prefix: str = "gorouter:batch", lease_s: float = 30.0) -> None:
        if not name or "{" in name or "}" in name or not name.isprintable():
            raise ConfigError("job: must be a printable text without braces that is not empty")
        if not lease_s > 0:
            raise ConfigError(f"lease_s: must be above 0, not {lease_s!r}")
        self.redis = redis
        self.name = name
        self.lease_s = lease_s
        base = f"{prefix}:{{{name}}}"
        self.facts, self.rows, self.out = f"{base}:facts", f"{base}:rows", f"{base}:out"
        self.sent, self.done = f"{base}:sent", f"{base}:done"
        lost_after_s = min(max(lease_s, _LOST_AFTER_S[0]), _LOST_AFTER_S[1])
        self.limits = RedisLimits(redis, prefix=f"{prefix}:{name}", lost_after_s=lost_after_s)

    def __repr__(self) -> str:
        return f"<ClusterJob {self.name!r} in {self.redis!r}>"

    async def submit(
        self,
        rows: AsyncIterator[BatchRow | RowProblem],
        encode: EncodeRequest,
        *,
        settings: object = None,
        budget_usd: Decimal | None = None,
    ) -> int:
        """Hand in rows, and say that these are all; returns how many there are. Again, it goes on where it was cut off.

        `budget_usd` is what all workers may spend; given again, it is another one, and a larger one lets rows be run
        that the one before did not cover. Raises `ConfigError` where the job was begun with other `settings`.
        """
        await self._begin(settings, budget_usd)
        position = 0
        pending: list[_Entry] = []
        async for row in rows:
            pending.append(_entry_of(row, position, encode=encode))
            position += 1
            if len(pending) >= _SUBMITTED_AT_A_TIME:
                await self._hand_in(pending)
                pending = []
        await self._hand_in(pending)
        await self.redis.execute_again("HSET", self.facts, "is_submitted", 1)
        return position

    async def _begin(self, settings: object, budget_usd: Decimal | None) -> None:
        known = encode_json(settings).decode()
        if not await self.redis.execute_again("HSETNX", self.facts, "settings", known):
            before = _text(await self.redis.execute_again("HGET", self.facts, "settings"))
            if decode_json(before) != decode_json(known):
                raise ConfigError(f"the job {self.name!r} was begun with other settings: {before}")
        if budget_usd is not None:
            await self.redis.execute_again("HSET", self.facts, "budget_usd", str(budget_usd))
            await self.redis.execute_again("HDEL", self.facts, "stopped")
        try:
            await self.redis.execute_again("XGROUP", "CREATE", self.rows, _GROUP, "0", "MKSTREAM")
        except StoreError as exc:
            if "BUSYGROUP" not in exc.message:
                raise

    async def _hand_in(self, entries: Sequence[_Entry]) -> None:
        # One after the other: their ids have to grow.
        for entry in entries:
            args: tuple[Argument, ...] = (_number(entry), encode_json(entry))
            await self.redis.evaluate(_SUBMIT, keys=(self.facts, self.rows), args=args)

    async def status(self) -> ClusterStatus:
        """Where the job is; raises `ConfigError` when there is none of this name."""
        facts = _pairs(await self.redis.execute_again("HGETALL", self.facts))
        if not facts:
            raise ConfigError(f"there is no job {self.name!r} in this Redis; submit it first")
        reply = cast("list[Reply]", await self.redis.execute_again("XINFO", "CONSUMERS", self.rows, _GROUP))
        consumers = {_text(found["name"]): found for found in map(_pairs, reply)}
        consumers.pop(_NOBODY, None)
        counts = {name: int(_text(facts.get(name, b"0"))) for name in ("total", "done", "failed", "cost_nano")}
        budget_usd = _budget_of(facts)
        money = None if budget_usd is None else await self.limits.read_budget("batch", self.name) or _UNSPENT
        return ClusterStatus(
            name=self.name,
            total=counts["total"],
            is_submitted="is_submitted" in facts,
            done=counts["done"],
            failed=counts["failed"],
            undone=counts["total"] - counts["done"],
            in_flight=sum(int(_text(found["pending"])) for found in consumers.values()),
            workers=sum(int(_text(found["idle"])) <= 1000 * self.lease_s for found in consumers.values()),
            cost_usd=Decimal(counts["cost_nano"]) / _NANO,
            budget_usd=budget_usd,
            spent_usd=None if money is None else money.spent_usd,
            assumed_usd=None if money is None else money.assumed_usd,
            reserved_usd=None if money is None else money.held_usd,
            left_usd=_left_of(budget_usd, money),
            stopped=_text(facts["stopped"]) if "stopped" in facts else None,
        )

    async def collect(self, path: str, *, ordered: bool = False, follow: bool = True) -> Collected:
        """Write the lines of the job behind those that the file at `path` has.

        With `follow`, until every row has its line or all workers have stopped. With `ordered`, the file is brought
        into the order of the input after that. Lines stay in the Redis until the job is deleted. Raises `OSError`, and
        `ConfigError` for a file that is no output of this job, whose lines stay as they are.
        """
        async with open_output(path, mode="append") as output:
            scan, known = await trio.to_thread.run_sync(_read_collected, path)
            output.cut(scan.size)
            async with aclosing(self._lines(follow=follow)) as pages:
                collected = await self._append(pages, output, known=known)
            if collected is None:
                output.cut(scan.size)
                raise ConfigError(f"{path} has answers that are not those of the job {self.name!r}")
            if ordered:
                await sort_output(output)
        return collected

    async def _append(
        self, pages: AsyncIterator[list[bytes]], output: OutputFile, *, known: Mapping[int, bytes]
    ) -> Collected | None:
        """Write lines of rows that are not `known`; None when one of those has another line."""
        seen = set(known)
        count = 0
        async for lines in pages:
            if any(_is_other(line, known) for line in lines):
                return None
            new = [line for line in lines if _row_of(line) not in seen]
            seen.update(map(_row_of, new))
            count += len(lines)
            await output.write(b"".join(new))
            await output.sync()
        return Collected(len(seen) - len(known), count)

    async def _lines(self, *, follow: bool) -> AsyncGenerator[list[bytes], None]:
        """The lines of the job, page by page."""
        last = "-"
        is_last = not follow
        while True:
            page = cast(
                "list[tuple[bytes, list[bytes]]]",
                await self.redis.execute_again("XRANGE", self.out, last, "+", "COUNT", _PAGE),
            )
            if page:
                last = f"({page[-1][0].decode()}"
                yield [fields[1] for _name, fields in page]
            elif is_last:
                return
            elif (await self.status()).is_over:
                # The last lines may have come between the page that had none and this.
                is_last = True
            else:
                await trio.sleep(_WAIT_S)

    async def delete(self) -> None:
        """Forget the job with all its rows and lines."""
        await self.redis.execute_again("DEL", self.facts, self.rows, self.out, self.sent, self.done)
        await self.limits.forget_budget("batch", self.name)

    async def settings(self) -> dict[str, object]:
        """What the job was begun with; raises `ConfigError` when there is none of this name."""
        known = await self.redis.execute_again("HGET", self.facts, "settings")
        if known is None:
            raise ConfigError(f"there is no job {self.name!r} in this Redis; submit it first")
        return cast("dict[str, object]", decode_json(_text(known)) or {})

    async def budget_usd(self) -> Decimal | None:
        """What all workers may spend, as it is now; None is no bound."""
        found = await self.redis.execute_again("HGET", self.facts, "budget_usd")
        return None if found is None else Decimal(_text(found))


class Worker:
    """Takes rows of a job and runs them, `width` at a time, under a `name` of its own. `run` it once.

    `budget` is that of the client, which has to share `ClusterJob.limits`: `cluster_wiring.make_worker` sees to that.
    """

    def __init__(self, job: ClusterJob, run: RunRequest, *, budget: JobBudget, name: str, width: int = 64) -> None:
        if not name or name == _NOBODY:
            raise ConfigError(f"name: a worker cannot be called {name!r}")
        self._job = job
        self._run = run
        self._budget = budget
        self._name = name
        self._has: set[str] = set()
        self._send, self._receive = trio.open_memory_channel[tuple[str, _Entry]](0)
        self._width = width
        self._freed = trio.Event()
        self._cursor = "0-0"
        self.finished = self.failed = self.claimed = 0
        self.stopping: StopReason | None = None

    def __repr__(self) -> str:
        return f"<Worker {self._name}: {self.finished} finished, {len(self._has)} in flight>"

    def drain(self, reason: StopReason = "interrupted") -> None:
        """Take no more rows; those in flight come to their end."""
        if self.stopping is None:
            self.stopping = reason

    async def run(self) -> None:
        """Work until every row of the job has its line, or until drained. Raises `StoreError`.

        A Redis that is away for less than its client's `timeout_s` is waited for. Cancelling leaves its rows to others,
        after the job's `lease_s`.
        """
        job = self._job
        await job.redis.execute_again("HDEL", job.facts, "stopped")
        await self._look_at_budget()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._renew)
            async with trio.open_nursery() as pullers:
                for _ in range(self._width):
                    pullers.start_soon(self._pull)
                async with self._send:
                    await self._take()
            nursery.cancel_scope.cancel()
        await job.redis.evaluate(_LEAVE, keys=(job.rows,), args=(self._name,))

    async def _take(self) -> None:
        """Hand rows to the pullers: new ones, or those of workers that are gone."""
        next_look = 0.0
        while self.stopping is None:
            entries: list[tuple[str, _Entry]] = []
            if len(self._has) >= self._width:
                # What nobody here can run yet is others' to take.
                self._freed = trio.Event()
                await self._freed.wait()
            if trio.current_time() >= next_look:
                entries = await self._claim()
                next_look = trio.current_time() + (0.0 if entries else self._job.lease_s / 3)
            entries = entries or await self._read()
            if not entries and (await self._job.status()).is_done:
                return
            # All of them are this worker's from now on, also those that wait for a puller.
            self._has.update(name for name, _entry in entries)
            for name, entry in entries:
                await self._send.send((name, entry))

    async def _read(self) -> list[tuple[str, _Entry]]:
        job = self._job
        count = self._width - len(self._has)
        try:
            reply = await job.redis.execute_blocking(
                *("XREADGROUP", "GROUP", _GROUP, self._name, "COUNT", count),
                *("BLOCK", int(1000 * _WAIT_S), "STREAMS", job.rows, ">"),
                wait_s=_WAIT_S,
            )
        except StoreError as exc:
            if exc.kind not in PASSING:
                raise
            # What comes next waits for the server. Rows of a reply that was lost are claimed when their lease is over.
            return []
        return _entries(next(iter(_pairs(reply).values()))) if reply else []

    async def _claim(self) -> list[tuple[str, _Entry]]:
        """Rows of workers that were not heard of for the lease."""
        job = self._job
        idle = int(1000 * job.lease_s)
        reply = await job.redis.execute_again(
            "XAUTOCLAIM",
            job.rows,
            _GROUP,
            self._name,
            idle,
            self._cursor,
            "COUNT",
            self._width - len(self._has),
        )
        self._cursor = _text(cast("list[Reply]", reply)[0])
        found = [(name, entry) for name, entry in _entries(cast("list[Reply]", reply)[1]) if name not in self._has]
        self.claimed += len(found)
        return found

    async def _renew(self) -> None:
        """Say now and then that the rows which this worker has are its own still."""
        job = self._job
        while True:
            await trio.sleep(job.lease_s / 3)
            if self._has:
                names = tuple(self._has)
                await job.redis.execute_again("XCLAIM", job.rows, _GROUP, self._name, 0, *names, "JUSTID")
            await self._look_at_budget()

    async def _look_at_budget(self) -> None:
        """Bound what is spent by what was said last."""
        usd = await self._job.budget_usd()
        if usd is not None:
            self._budget.open_batch(self._job.name, usd=usd)

    async def _pull(self) -> None:
        async for name, entry in self._receive:
            await self._finish(name, entry)

    async def _finish(self, name: str, entry: _Entry) -> None:
        job, row = self._job, entry.number
        sent = cast("int", await job.redis.evaluate(_SEND, keys=(job.sent,), args=(row,)))
        result = await self._result(entry, was_in_flight=bool(sent) and entry.problem is None)
        if result is None:
            # Nothing was sent: whoever has the money, or another key, may do that.
            given = (name, row, self._name, sent, round(1000 * job.lease_s))
            await job.redis.evaluate(_RELEASE, keys=(job.rows, job.sent), args=given)
            self._drop(name)
            return
        failed = int(result.error is not None)
        keys = (job.facts, job.rows, job.out, job.done)
        args: tuple[Argument, ...] = (row, name, encode_row(result), failed, _cost_nano(result))
        await job.redis.evaluate(_FINISH, keys=keys, args=args)
        self._drop(name)
        self.finished += 1
        self.failed += failed

    def _drop(self, name: str) -> None:
        self._has.discard(name)
        self._freed.set()

    async def _result(self, entry: _Entry, *, was_in_flight: bool) -> BatchResult | None:
        try:
            if entry.problem is not None:
                raise BadRequestError(entry.problem, status=400)
            result, reply = await self._run(entry.body.encode(), entry.settings)
        except GorouterError as exc:
            reason = stop_reason(exc)
            if reason is not None:
                self.drain(reason)
                await self._job.redis.execute_again("HSET", self._job.facts, "stopped", reason)
                return None
            return _result_of(entry, was_in_flight=was_in_flight, error=exc)
        done = _result_of(entry, was_in_flight=was_in_flight)
        return msgspec.structs.replace(done, result=result, body=reply, cached=result.attempts == 0)


def _result_of(entry: _Entry, *, was_in_flight: bool, error: GorouterError | None = None) -> BatchResult:
    return BatchResult(
        custom_id=entry.custom_id,
        index=entry.position,
        line_number=entry.line_number,
        was_in_flight=was_in_flight,
        error=error,
    )


def _cost_nano(result: BatchResult) -> int:
    """What a row's line says that it cost."""
    outcome = result.error.partial if result.error is not None else result.result
    return 0 if outcome is None or result.cached else int((outcome.cost or _ZERO) * _NANO)


def _budget_of(facts: dict[str, Reply]) -> Decimal | None:
    return Decimal(_text(facts["budget_usd"])) if "budget_usd" in facts else None


def _left_of(budget_usd: Decimal | None, money: SharedBudget | None) -> Decimal | None:
    if budget_usd is None or money is None:
        return None
    return max(budget_usd - money.spent_usd - money.held_usd, _ZERO)


def _entry_of(row: BatchRow | RowProblem, position: int, *, encode: EncodeRequest) -> _Entry:
    custom_id, line_number = names_of(row, position)
    number = position if line_number is None else line_number
    body, settings, problem = b"", CallSettings(), None
    try:
        body, settings = encode_row_request(row, encode)
    except BadRequestError as exc:
        problem = exc.message
    return _Entry(number, position, custom_id, line_number, body.decode(), settings, problem)


def _number(entry: _Entry) -> int:
    # Ids of entries begin at 1, and so do lines.
    return entry.number if entry.line_number is not None else entry.number + 1


def _entries(reply: Reply) -> list[tuple[str, _Entry]]:
    """Entries of a stream; those that were finished meanwhile come without their fields."""
    items = cast("list[tuple[bytes, list[bytes] | None] | None]", reply)
    return [
        (item[0].decode(), msgspec.convert(decode_json(item[1][1]), _Entry))
        for item in items
        if item is not None and item[1]
    ]


def _row_of(line: bytes) -> int:
    return int(line.partition(b"batch_req_")[2].partition(b'"')[0])


def _pairs(reply: Reply) -> dict[str, Reply]:
    if isinstance(reply, dict):
        return {_text(name): value for name, value in reply.items()}
    items = cast("list[Reply]", reply or [])
    if items and isinstance(items[0], list):
        # A list of pairs, as the older protocol has streams.
        return {_text(pair[0]): pair[1] for pair in cast("list[list[Reply]]", items)}
    return {_text(items[at]): items[at + 1] for at in range(0, len(items), 2)}


def _text(value: Reply) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_collected(path: str) -> tuple[OutputScan, dict[int, bytes]]:
    """The lines of a file, and their digests by row.

    Raises `ConfigError` for a file of something else, of which nothing may be cut off.
    """
    scan = scan_output(path, _ignore)
    with open(path, "rb") as file:
        digests = {row: _digest(file.readline()) for row in scan.numbers}
        begun = file.read(len(_LINE_START))
    if not _LINE_START.startswith(begun):
        raise ConfigError(f"{path} ends with what is no line of a batch's output")
    return scan, digests


def _is_other(line: bytes, known: Mapping[int, bytes]) -> bool:
    """Whether the row of a line has another one."""
    digest = known.get(_row_of(line))
    return digest is not None and digest != _digest(line)


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()


def _ignore(_line: object) -> None:
    return None
