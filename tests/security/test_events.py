"""Events: all of them, in order, without secrets, and never in the way of a decision."""

# Wrong settings are made on purpose, and what a decision or a field is, the next line tells.
# mypy: disable-error-code="arg-type,misc"

from __future__ import annotations

import logging

import msgspec
import pytest
import trio
from jwt_forge import GOOD, SECRET, WALL

import gorouter_trio as gr
from gorouter_trio.security import (
    Allow,
    ApiKeyAuth,
    DangerousArguments,
    JwtAuth,
    Principal,
    RateLimit,
    SecurityConfig,
    SecurityEvent,
    SecurityManager,
    ToolAudit,
    ToolCalled,
    ToolCheck,
    ToolPolicy,
)
from gorouter_trio.security.events import Emitter, TokenCacheCleared

ADA = Principal(id="ada", tenant="t")
LIMIT = RateLimit(limit=2, period_s=60.0)


def managed(**fields) -> SecurityManager:
    tools = {"a": ToolPolicy(allow=True), "b": ToolPolicy(allow=False), "c": ToolPolicy(allow=True, rate_limit=LIMIT)}
    rules = DangerousArguments(blocked_values=("bad",))
    return SecurityManager(SecurityConfig(tools=tools, dangerous_arguments=rules, **fields))


def call(tool: str, arguments: object = None) -> ToolCheck:
    return ToolCheck(tool=tool, arguments=arguments, call_id="call-1", session="s")


def told(manager: SecurityManager) -> list[SecurityEvent]:
    events: list[SecurityEvent] = []
    manager.on(SecurityEvent, events.append)
    return events


async def test_every_step_is_told() -> None:
    """The seed's eleven events, by their names, in the order in which things happened."""
    manager = managed(auth=JwtAuth(key=SECRET))
    events = told(manager)
    await manager.authenticate(GOOD, now=0.0, wall=WALL)
    with pytest.raises(gr.InvalidTokenError):
        await manager.authenticate("nonsense", now=0.0, wall=WALL)
    for one in (call("a"), call("b"), call("a", "bad"), call("c"), call("c"), call("c")):
        manager.check(ADA, one, now=0.0, wall=WALL)
    manager.audit(ToolAudit(tool="a", principal=ADA, arguments={"x": 1}, status="success", call_id="call-1"))
    manager.update_config(dangerous_arguments=DangerousArguments(blocked_values=("bad",), audit_only=True))
    manager.check(ADA, call("a", "bad"), now=0.0, wall=WALL)
    manager.clear_token_cache()
    manager.clear_rate_limits("ada", tenant="t")
    names = [msgspec.json.decode(msgspec.json.encode(event))["event"] for event in events]
    assert names == [
        "auth:success", "auth:failed", "access:granted", "access:denied", "security:error", "access:granted",
        "access:granted", "ratelimit:hit", "tool:call", "config:updated", "security:audit", "access:granted",
        "auth:cache:cleared", "ratelimit:cleared",
    ]  # fmt: skip


def test_what_an_event_says() -> None:
    """Who, what, where, when and why; arguments only where they were asked for (A23)."""
    manager = managed()
    events = told(manager)
    manager.check(ADA, call("b", {"secret": 1}), now=0.0, wall=5.0)
    assert events == [
        gr.security.AccessDenied(
            tool="b", principal="ada", tenant="t", session="s", call_id="call-1", reason="access",
            message="tool 'b' is denied by its policy", at_s=5.0,
        )
    ]  # fmt: skip
    record = ToolAudit(tool="a", principal=None, arguments={"pin": 7}, status="error_execution", error="no", at_s=9.0)
    manager.audit(record)
    manager.update_config(audit_arguments=True)
    manager.audit(record)
    plain, full = (event for event in events if isinstance(event, ToolCalled))
    assert (plain.arguments, full.arguments) == (None, {"pin": 7})
    assert (plain.principal, plain.status, plain.error, plain.at_s) == (None, "error_execution", "no", 9.0)
    with pytest.raises(AttributeError):
        plain.status = "success"


def test_the_audit_log() -> None:
    """The hook gets every record, without arguments unless they were asked for, and may fail."""
    records: list[ToolAudit] = []

    def hook(record: ToolAudit) -> None:
        records.append(record)
        raise OSError("disk full")

    manager = SecurityManager(SecurityConfig(), audit=hook)
    record = ToolAudit(tool="a", principal=ADA, arguments={"pin": 7}, status="success")
    manager.audit(record)
    manager.update_config(audit_arguments=True)
    manager.audit(record)
    assert records == [msgspec.structs.replace(record, arguments=None), record]
    assert manager.statistics().handlers_failed == 2


def test_handlers_are_contained() -> None:
    """What one raises reaches neither the decision nor the other handlers, and is counted (A23)."""
    manager = managed()
    seen: list[str] = []

    def broken(event: SecurityEvent) -> None:
        raise RuntimeError("handler")

    manager.on(SecurityEvent, broken)
    manager.on(gr.security.AccessGranted, lambda event: seen.append(event.tool))
    assert manager.check(ADA, call("a"), now=0.0, wall=0.0) == Allow()
    assert seen == ["a"]
    assert manager.statistics().handlers_failed == 1


def test_listening_and_not() -> None:
    """Handlers come in the order they were added, for their kind alone, until they are taken off."""
    manager = managed()
    seen: list[str] = []
    first = manager.on(SecurityEvent, lambda event: seen.append("first"))
    manager.on(gr.security.AccessGranted, lambda event: seen.append("second"))
    manager.check(ADA, call("a"), now=0.0, wall=0.0)
    manager.check(ADA, call("b"), now=0.0, wall=0.0)
    assert seen == ["first", "second", "first"]
    manager.off(first)
    manager.off(first)
    manager.check(ADA, call("b"), now=0.0, wall=0.0)
    assert seen == ["first", "second", "first"]


def test_a_handler_that_causes_events() -> None:
    """A handler may use the manager: its events come after the one it was told, and never without end."""
    manager = managed()
    order: list[str] = []

    def asks_again(event: gr.security.AccessGranted) -> None:
        order.append(event.tool)
        manager.check(ADA, call("a"), now=0.0, wall=0.0)
        order.append("done")

    manager.on(gr.security.AccessGranted, asks_again)
    assert manager.check(ADA, call("a"), now=0.0, wall=0.0) == Allow()
    assert order[:4] == ["a", "done", "a", "done"]
    assert len(order) == 2 * 1_024


def test_a_handler_that_causes_too_many_events() -> None:
    """What finds no room is dropped; when the handler is quiet again, events are told again."""
    emitter, seen = Emitter(queue=8), []

    def chatter(event: SecurityEvent) -> None:
        seen.append(event)
        if len(seen) < 20:
            emitter.emit(event)
            emitter.emit(event)

    emitter.on(SecurityEvent, chatter)
    for _ in range(5):
        emitter.emit(TokenCacheCleared())
    before = len(seen)
    emitter.emit(TokenCacheCleared())
    assert len(seen) == before + 1


async def test_a_task_for_events(autojump_clock: trio.testing.MockClock) -> None:
    """With `run_events` a slow or async handler delays nobody, the order stays, and a full queue drops (A23)."""
    manager = managed()
    seen: list[float] = []

    async def slow(event: SecurityEvent) -> None:
        await trio.sleep(10)
        seen.append(event.at_s)

    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run_events)
        manager.on(SecurityEvent, slow)
        start = trio.current_time()
        for wall in range(1_100):
            assert manager.check(ADA, call("a"), now=0.0, wall=float(wall)) == Allow()
        assert trio.current_time() == start
        assert seen == []
        await trio.sleep(1_100 * 10)
        nursery.cancel_scope.cancel()
    assert seen == [float(wall) for wall in range(1_024)]
    assert manager.statistics().events_dropped == 1_100 - 1_024


async def test_the_end_of_that_task(autojump_clock: trio.testing.MockClock) -> None:
    """Handlers that need no waiting get what was queued at the cancel; afterwards they are called at once again."""
    manager = managed()
    seen: list[float] = []
    manager.on(SecurityEvent, lambda event: seen.append(event.at_s))
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run_events)
        with pytest.raises(RuntimeError, match="being delivered already"):
            await manager.run_events()
        manager.check(ADA, call("a"), now=0.0, wall=1.0)
        assert seen == []
        nursery.cancel_scope.cancel()
    assert seen == [1.0]
    manager.check(ADA, call("a"), now=0.0, wall=2.0)
    assert seen == [1.0, 2.0]


def test_nobody_listens() -> None:
    """An event that nobody asked for goes nowhere, and waits nowhere."""
    emitter = Emitter(queue=1)
    for _ in range(3):
        emitter.emit(SecurityEvent())
    assert emitter.dropped == 0


def test_an_async_handler_without_that_task() -> None:
    """It cannot be called, which is counted and warns of nothing."""
    manager = managed()

    async def handler(event: SecurityEvent) -> None:
        await trio.lowlevel.checkpoint()

    manager.on(SecurityEvent, handler)
    manager.check(ADA, call("a"), now=0.0, wall=1.0)
    assert manager.statistics().events_dropped == 1


async def test_a_failing_async_handler(autojump_clock: trio.testing.MockClock) -> None:
    """It is counted, and the task that called it goes on; a sync handler may return nothing."""
    manager = managed()
    seen: list[float] = []

    async def broken(event: SecurityEvent) -> None:
        raise OSError

    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run_events)
        manager.on(SecurityEvent, broken)
        manager.on(SecurityEvent, lambda event: seen.append(event.at_s))
        for wall in (1.0, 2.0):
            manager.check(ADA, call("a"), now=0.0, wall=wall)
            await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert seen == [1.0, 2.0]
    assert manager.statistics().handlers_failed == 2


def test_updating_tells_no_secret() -> None:
    """The event of a new configuration names the fields that changed, and none of their values (A14)."""
    manager = managed(auth=ApiKeyAuth(api_keys={"a key of enough letters": ADA}))
    events = told(manager)
    manager.update_config(auth=JwtAuth(key=SECRET), debug=True, wall=3.0)
    manager.update_config(debug=True)
    assert events == [
        gr.security.ConfigUpdated(changed=("auth", "debug"), at_s=3.0),
        gr.security.ConfigUpdated(changed=()),
    ]


def test_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    """With `debug` each decision is one line of the log, whatever stands in the names."""
    caplog.set_level(logging.DEBUG, "gorouter_trio.security")
    manager = managed(debug=True)
    manager.check(ADA, call("a"), now=0.0, wall=0.0)
    manager.check(None, call("b\nFAKE \x1b[31m"), now=0.0, wall=0.0)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "call of 'a' by 'ada': allowed"
    assert second.startswith(r"call of 'b\nFAKE \x1b[31m' by nobody: denied (access): ")
    assert "\n" not in second
    caplog.clear()
    managed().check(ADA, call("a"), now=0.0, wall=0.0)
    assert caplog.records == []
