"""A judge of histories, made for these tests alone: what OpenAI or Anthropic would answer 400 to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ROLES = {"system", "developer", "user", "assistant", "tool"}


def check_history(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """What is wrong with the messages of a request, a line each; nothing is good.

    Refused are unknown roles, empty messages, calls that are not answered by exactly one tool message each right
    behind them, tool messages that answer nothing, and ids that are empty, too long or used twice.
    """
    problems: list[str] = []
    seen: set[str] = set()
    waiting: list[str] = []
    for place, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            problems.append(f"{place}: role {role!r}")
        if role == "tool":
            call_id = message.get("tool_call_id")
            if call_id not in waiting:
                problems.append(f"{place}: answers no call that waits ({call_id!r})")
            waiting = [other for other in waiting if other != call_id]
            continue
        problems += [f"{place}: {call_id!r} is not answered" for call_id in waiting]
        waiting = [call["id"] for call in message.get("tool_calls") or ()]
        for call_id in waiting:
            if not call_id or len(call_id) > 40:
                problems.append(f"{place}: bad id {call_id!r}")
            if call_id in seen:
                problems.append(f"{place}: id {call_id!r} stands twice")
            seen.add(call_id)
        if is_empty(message):
            problems.append(f"{place}: a message of the {role} says nothing")
    return problems + [f"end: {call_id!r} is not answered" for call_id in waiting]


def is_empty(message: Mapping[str, object]) -> bool:
    """Whether a message has neither content nor anything that may stand in its place."""
    if any(message.get(name) for name in ("tool_calls", "refusal", "images", "audio")):
        return False
    content = message.get("content")
    return not (content.strip() if isinstance(content, str) else content)
