"""What the simulated models remember of a conversation, so that a chat with them makes sense."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .requests import Message

_STATED: Final = re.compile(r"\bmy ((?:[a-z]+ ){0,3}?[a-z]+) (?:is|are|was) ([^.,;!?\n]{1,60})", re.IGNORECASE)
_NAMED: Final = re.compile(r"\b(?:[Cc]all me|I am called|I'm called) ([A-Z][\w'-]*)")
_ASKED: Final = re.compile(
    r"\bwhat(?:'s|’s| is| are| was)? my ((?:[a-z]+ ){0,3}?[a-z]+?)(?: again)?\s*(?:[?.!]|$)", re.IGNORECASE
)
_FIRST_PERSON: Final = ("my ", "My ", "I ", "all me", "I'm", " i ")
_LONGEST_GREETING: Final = 24
_ASKED_WHO: Final = re.compile(r"\bwho am i\b", re.IGNORECASE)
_ASKED_BACK: Final = re.compile(
    r"\bwhat did i (?:just )?(?:say|ask|tell)|\bmy (?:last|previous|first) (?:message|question)", re.IGNORECASE
)
_GREETED: Final = re.compile(r"^\s*(?:hi|hello|hey|good (?:morning|evening|afternoon))\b[\s,!.]*$", re.IGNORECASE)


def answer_from_memory(conversation: Sequence[Message]) -> str | None:
    """An answer that needs what the user said before, or None when the last message asks for no such thing."""
    if conversation[-1].role != "user":
        return None
    question = conversation[-1].text
    if not _may_ask(question):
        return None
    earlier = [message.text for message in conversation[:-1] if message.role == "user"]
    if _ASKED_BACK.search(question):
        first = " first " in question.lower()
        return f"You said: “{earlier[0 if first else -1]}”" if earlier else "This is the first thing you have said."
    asked = _ASKED.search(question)
    if asked is not None or _ASKED_WHO.search(question):
        return _tell(asked.group(1).lower() if asked is not None else "name", earlier)
    if _GREETED.match(question):
        name = _facts(earlier).get("name")
        return f"Hello, {name}! How can I help?" if name else "Hello! How can I help?"
    return None


def acknowledge(text: str) -> str | None:
    """The first sentence of a reply to a message that tells something, such as `my name is Ada`."""
    if "?" in text or not _may_ask(text) or not (facts := _facts([text])):
        return None
    name = facts.pop("name", None)
    told = "; ".join(f"your {thing} is {value}" for thing, value in facts.items())
    greeting = f"Nice to meet you, {name}!" if name else ""
    return " ".join(part for part in (greeting, f"I will remember that {told}." if told else "") if part)


def _may_ask(text: str) -> bool:
    """A cheap test before the patterns: most prompts are about something else."""
    return len(text) < _LONGEST_GREETING or any(word in text for word in _FIRST_PERSON)


def _tell(thing: str, earlier: Iterable[str]) -> str:
    value = _facts(earlier).get(thing)
    return f"Your {thing} is {value}." if value else f"You have not told me your {thing} yet."


def _facts(texts: Iterable[str]) -> dict[str, str]:
    """What the user said about themselves, the latest word on each thing."""
    facts: dict[str, str] = {}
    for text in texts:
        for thing, value in _STATED.findall(text):
            facts[thing.lower()] = value.strip()
        for name in _NAMED.findall(text):
            facts["name"] = name
    return facts
